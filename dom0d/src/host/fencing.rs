//! Silences deposed servers for good, and pauses and resumes domains for operators.
//!
//! The data path's own fence holds from the cutover on (rule 1). This thread pauses or destroys the domain beside it, verifies
//! the result, and retries until it is verified. It waits for the hypervisor so that the data path need not.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use understudy_api::config::Fence;
use understudy_protocol::ServerId;

use super::{Host, HostError, Shutdown};
use crate::domain::DomainId;

/// Waits before an attempt is repeated: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A job on a domain.
pub(crate) enum Job {
    /// Silence a deposed server, until it is verified.
    Fence {
        /// Index of the service.
        service: usize,
        /// Its id there.
        server: ServerId,
        /// The domain.
        domain: DomainId,
        /// How.
        by: Fence,
    },
    /// Pause or resume for an operator, once.
    SetPaused {
        /// Index of the service.
        service: usize,
        /// Its id there.
        server: ServerId,
        /// The domain.
        domain: DomainId,
        /// Pause; otherwise resume.
        pause: bool,
        /// Called with the result, after the data path was told of it.
        done: Box<dyn FnOnce(Result<(), HostError>) + Send>,
    },
}

/// The result of a [`Job`], for the data path.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The server is silent, verified.
    Fenced {
        /// Index of the service.
        service: usize,
        /// Its id there.
        server: ServerId,
        /// How.
        by: Fence,
    },
    /// It is not silent yet; the attempt is repeated.
    FenceFailed {
        /// Index of the service.
        service: usize,
        /// Its id there.
        server: ServerId,
        /// Why.
        error: String,
    },
    /// A domain was paused or resumed for an operator, or not.
    SetPaused {
        /// Index of the service.
        service: usize,
        /// Its id there.
        server: ServerId,
        /// Pause; otherwise resume.
        pause: bool,
        /// It was carried out.
        done: bool,
    },
}

struct Pending {
    service: usize,
    server: ServerId,
    domain: DomainId,
    by: Fence,
    next: Instant,
    wait: Duration,
    told: Option<String>,
}

/// Starts the thread; it ends when the sender of jobs is dropped.
pub(crate) fn spawn(
    hypervisor: Box<dyn Host>,
    tell: impl Fn(Outcome) + Send + 'static,
) -> io::Result<(mpsc::Sender<Job>, JoinHandle<()>)> {
    let (sender, jobs) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("fencing".to_owned())
        .spawn(move || work(hypervisor, &jobs, tell))?;
    Ok((sender, thread))
}

fn work(mut hypervisor: Box<dyn Host>, jobs: &mpsc::Receiver<Job>, tell: impl Fn(Outcome)) {
    let mut pending: Vec<Pending> = Vec::new();
    loop {
        let wait = pending
            .iter()
            .map(|fence| fence.next.saturating_duration_since(Instant::now()))
            .min()
            .unwrap_or(Duration::from_secs(3600));
        match jobs.recv_timeout(wait) {
            Ok(Job::Fence { service, server, domain, by }) => pending.push(Pending {
                service,
                server,
                domain,
                by,
                next: Instant::now(),
                wait: BACKOFF.0,
                told: None,
            }),
            Ok(Job::SetPaused { service, server, domain, pause, done }) => {
                let result = if pause {
                    hypervisor.pause(domain)
                } else {
                    // The operator wants it to run; a fence under way would pause it again.
                    pending.retain(|fence| fence.domain != domain);
                    hypervisor.unpause(domain)
                };
                tell(Outcome::SetPaused { service, server, pause, done: result.is_ok() });
                done(result);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        pending.retain_mut(|fence| fence.next > now || !attempt(hypervisor.as_mut(), fence, now, &tell));
    }
}

/// Tries once; `true` if the server is silent.
fn attempt(hypervisor: &mut dyn Host, fence: &mut Pending, now: Instant, tell: &impl Fn(Outcome)) -> bool {
    let (service, server, by) = (fence.service, fence.server, fence.by);
    let error = match silence(hypervisor, fence.domain, by) {
        Ok(true) => {
            tell(Outcome::Fenced { service, server, by });
            return true;
        }
        Ok(false) => format!("the hypervisor agreed to {} it, but the domain still runs", by.name()),
        Err(error) => error.to_string(),
    };
    // Told once per reason; a domain that can't be paused for an hour is one event.
    if fence.told.as_ref() != Some(&error) {
        fence.told = Some(error.clone());
        tell(Outcome::FenceFailed { service, server, error });
    }
    fence.next = now + fence.wait;
    fence.wait = (fence.wait * 2).min(BACKOFF.1);
    false
}

/// Pauses or destroys, and looks whether it is done.
fn silence(hypervisor: &mut dyn Host, domain: DomainId, by: Fence) -> Result<bool, HostError> {
    match by {
        // The rules at its vif do it; the data path watches over those.
        Fence::Isolate => return Ok(true),
        Fence::Destroy => hypervisor.destroy(domain)?,
        Fence::Pause => match hypervisor.pause(domain) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => return Ok(true),
            Err(error) => return Err(error),
        },
    }
    let state =
        hypervisor.domains()?.iter().find(|state| state.domid == domain.domid && state.uuid == domain.uuid);
    Ok(match (by, state) {
        (_, None) => true,
        (_, Some(state)) if state.dying || state.shutdown == Some(Shutdown::Final) => true,
        (Fence::Pause, Some(state)) => state.paused,
        (_, Some(_)) => false,
    })
}

fn is_gone(error: &HostError) -> bool {
    matches!(
        error,
        HostError::Gone { .. }
            | HostError::Xen(xen_sys::Error::NoSuchDomain { .. } | xen_sys::Error::DomidReused { .. })
    )
}
