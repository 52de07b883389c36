//! `attach --copy`: dom0d holds clients as long as this process reads its answer; meanwhile this process runs the operator's
//! command.

use std::net::IpAddr;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use understudy_api as api;
use understudy_api::{Attach, Attached, CopyEnd, Hold, HoldState, Holding};

use crate::daemon::Daemon;
use crate::failed::Failed;
use crate::output::Output;

/// How often the operator is told that the copy is still running.
const PROGRESS: Duration = Duration::from_secs(10);

/// How long a command may take to end after SIGTERM, before it is killed.
const END: Duration = Duration::from_secs(3);

/// The operator's command, with all processes that it started.
struct Copy {
    child: Child,
    begun: Instant,
    told: Instant,
}

impl Copy {
    fn begin(command: &str, service: &str, holding: &Holding) -> Result<Self, Failed> {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(command).stdin(Stdio::null()).process_group(0).env("UNDERSTUDY_SERVICE", service);
        for (prefix, CopyEnd { domain, addresses }) in [("FROM", &holding.from), ("TO", &holding.to)] {
            let name = |rest: &str| format!("UNDERSTUDY_{prefix}{rest}");
            let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            shell.env(name(""), &domain.name).env(name("_UUID"), domain.uuid.to_string());
            shell.env(name("_DOMID"), domain.domid.to_string()).env(name("_ADDRESSES"), addresses.join(" "));
            shell.env(name("_ADDRESS"), addresses.first().map_or("", String::as_str));
        }
        let child = shell.spawn();
        let child =
            child.map_err(|error| Failed::refused("copy_failed", format!("can't run sh: {error}")))?;
        Ok(Self { child, begun: Instant::now(), told: Instant::now() })
    }

    fn signal(&self, signal: Signal) {
        // It leads its own process group. Once it has been waited for it has no id.
        if let Some(group) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    /// Ends the command with all processes that it started.
    async fn end(mut self) {
        self.signal(Signal::SIGTERM);
        let _ = tokio::time::timeout(END, self.child.wait()).await;
        self.signal(Signal::SIGKILL);
    }
}

pub(crate) async fn copy_to(
    daemon: &Daemon,
    service: &str,
    body: &Hold,
    command: &str,
    output: &Output,
) -> Result<(), Failed> {
    // Before clients are held, so that no signal ends this process unnoticed.
    let signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    let [interrupt, terminate, hangup] = signals;
    let (mut interrupt, mut terminate, mut hangup) = (
        interrupt.map_err(Failed::Output)?,
        terminate.map_err(Failed::Output)?,
        hangup.map_err(Failed::Output)?,
    );
    let mut lines = daemon.hold(service, body).await?;
    let mut copy: Option<Copy> = None;
    let mut open = None;
    let mut hold = 0;
    let not = format!("clients are let in again, and {} is not seeded", body.domain);
    let ended: Result<ExitStatus, Failed> = loop {
        let done = async {
            match &mut copy {
                Some(copy) => copy.child.wait().await,
                None => std::future::pending().await,
            }
        };
        let line = tokio::select! {
            status = done => break status.map_err(Failed::Output),
            line = lines.next() => match line {
                Ok(line) => line,
                Err(failed) => break Err(failed),
            },
            _ = interrupt.recv() => break Err(Failed::refused("cancelled", format!("cancelled: {not}"))),
            _ = terminate.recv() => break Err(Failed::refused("cancelled", format!("cancelled: {not}"))),
            _ = hangup.recv() => break Err(Failed::refused("cancelled", format!("cancelled: {not}"))),
        };
        let holding: Option<Holding> = line.and_then(|line| serde_json::from_str(&line).ok());
        let Some(holding) = holding else {
            let message = format!("dom0d stopped and no longer holds clients, see its log; {not}");
            break Err(Failed::refused("hold_lost", message));
        };
        hold = holding.hold;
        match &holding.state {
            HoldState::Draining { open: now } if open != Some(*now) => {
                open = Some(*now);
                output.notice(&format!(
                    "{service}: new clients wait until {now} open conversations have ended"
                ));
            }
            HoldState::Draining { .. } => {}
            HoldState::Held => match &mut copy {
                None => {
                    output.notice(&format!(
                        "{service}: clients wait; copying from {} to {}",
                        holding.from.domain.name, holding.to.domain.name
                    ));
                    match Copy::begin(command, service, &holding) {
                        Ok(begun) => copy = Some(begun),
                        Err(failed) => break Err(failed),
                    }
                }
                Some(copy) if copy.told.elapsed() >= PROGRESS => {
                    copy.told = Instant::now();
                    let seconds = copy.begun.elapsed().as_secs();
                    output.notice(&format!("{service}: copying, {seconds} s so far; clients wait"));
                }
                Some(_) => {}
            },
            HoldState::Over { reason } => {
                break Err(Failed::refused("hold_over", format!("service {service}: {reason}: {not}")));
            }
        }
    };
    let ended = ended.and_then(|status| match status.success() {
        true => Ok(()),
        false => Err(Failed::refused("copy_failed", format!("the copy command ended with {status}: {not}"))),
    });
    if let Err(failed) = ended {
        // First: it lets clients in again.
        drop(lines);
        if let Some(copy) = copy {
            copy.end().await;
        }
        return Err(failed);
    }
    let attach = Attach { domain: body.domain.clone(), copied: Some(hold), ..Attach::default() };
    let attached: Attached = daemon.command(service, &api::Command::Attach(attach)).await?;
    drop(lines);
    let took = copy.map_or(0, |copy| copy.begun.elapsed().as_secs());
    output.result(&attached, || {
        format!(
            "{service}: {} is in the queue and promotable; its state was copied in {took} s, and clients are let in again\n",
            attached.domain.name
        )
    })
}
