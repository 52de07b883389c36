//! Lists the domains anew whenever xenstore changes. Keeps a connection to xenstored, watches what matters, and survives a
//! xenstored that restarts.
//!
//! A task that both drained a watch and asked xenstore would deadlock inside xenstore-rs once nine events wait (its
//! dispatcher blocks on the watch's channel and answers nobody). So each watch has a task of its own that only sets a
//! flag, and the lister, which asks, waits for that flag. The crate does not report that its connection died either:
//! every request has a deadline, and the lister queries an idle connection now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use xenstore_rs::AsyncWatch;
use xenstore_rs::tokio::XsTokio;

use super::listing::{alive, list, request_to};
use super::{Snapshot, changes};

/// What discovery knows at the moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// The last list, also while xenstored can't be reached: a lost connection ends no domain.
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    /// Why the list may be out of date, and what to do.
    pub(crate) problem: Option<String>,
}

/// Watched for the daemon's whole life.
const WATCHED: [&str; 3] = ["@introduceDomain", "@releaseDomain", "/local/domain/0/backend/vif"];

/// Events come in bursts (a vif being connected is a dozen); wait this long for the rest of one.
const SETTLE: Duration = Duration::from_millis(10);

/// How often an idle connection is tried.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// After how many quiet [`KEEPALIVE`]s the list is made anew all the same: xenstore-rs drops an event
/// whose path is not UTF-8.
const RELIST: u32 = 15;

/// Shortest time from one list to the next.
const ASKED: Duration = Duration::from_millis(100);

/// How long what a toolstack asked of a domain is shown after it was read: the guest clears the node as
/// soon as it obeys, and may take long to do so.
const OBEYS: Duration = Duration::from_secs(10);

/// Longest wait for a watch to be set.
const WATCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits before xenstored is tried again: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How other threads ask for a new list, when they know of a change for which xenstore may send no event.
#[derive(Clone, Debug, Default)]
pub(crate) struct Relist(Arc<Notify>);

impl Relist {
    /// Asks for a new list, and does not wait. All requests until the list is made count as one.
    pub(crate) fn ask(&self) {
        self.0.notify_one();
    }

    /// Whether a list was asked for since the last call.
    #[cfg(test)]
    pub(crate) async fn is_asked(&self) -> bool {
        timeout(Duration::ZERO, self.0.notified()).await.is_ok()
    }

    /// Resolves once a list was asked for, but not too soon after the last list.
    async fn asked(&self, last: Instant) {
        sleep_until(last + ASKED).await;
        self.0.notified().await;
    }
}

/// Publishes the domains of this host, until the receivers are gone.
pub(crate) async fn watch_domains(found: watch::Sender<Found>, relist: Relist) {
    let mut wait = BACKOFF.0;
    while !found.is_closed() {
        let error = match connect().await {
            Ok(mut connection) => {
                wait = BACKOFF.0;
                tokio::select! {
                    error = connection.follow(&found, &relist) => error,
                    () = found.closed() => return,
                }
            }
            Err(error) => error,
        };
        tracing::warn!(%error, "xenstore can't be used; trying again");
        let problem = format!(
            "xenstored can't be used ({error}); new and changed domains are not seen until it runs again (systemctl status xenstored)"
        );
        found.send_modify(|found| found.problem = Some(problem));
        tokio::select! {
            () = sleep(wait) => wait = (wait * 2).min(BACKOFF.1),
            () = found.closed() => return,
        }
    }
}

async fn connect() -> io::Result<Connection> {
    let xenstore = XsTokio::new().await?;
    let mut connection = Connection {
        xenstore,
        changed: Arc::new(Notify::new()),
        watches: JoinSet::new(),
        domain_watches: BTreeMap::new(),
        requests: Arc::default(),
    };
    connection.watches.spawn(read_requests(
        connection.xenstore.clone(),
        Arc::clone(&connection.requests),
        Arc::clone(&connection.changed),
    ));
    for path in WATCHED {
        let changed = Arc::clone(&connection.changed);
        connection.watch(path.to_owned(), move || changed.notify_one()).await?;
    }
    Ok(connection)
}

/// One connection with its watches; dropping it ends both.
struct Connection {
    xenstore: XsTokio,
    /// The coalescing set: since everything is listed anew, which path changed does not matter.
    changed: Arc<Notify>,
    watches: JoinSet<()>,
    domain_watches: BTreeMap<u16, Vec<tokio::task::AbortHandle>>,
    requests: Arc<Requests>,
}

/// What toolstacks ask of domains, read the moment its watch fires: a list may come too late for it.
#[derive(Default)]
struct Requests {
    unread: Mutex<BTreeSet<u16>>,
    told: Notify,
    read: Mutex<BTreeMap<u16, (String, Instant)>>,
}

impl Requests {
    /// A domain's node was written.
    fn tell(&self, domid: u16) {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).insert(domid);
        self.told.notify_one();
    }

    /// Adds what was asked of a domain, and of no other, to a list of domains.
    fn add_to(&self, snapshot: &mut Snapshot) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.retain(|_, (_, at)| at.elapsed() < OBEYS);
        for domain in &mut snapshot.domains {
            let asked = read.get(&domain.domid).map(|(request, _)| request.clone());
            domain.shutdown_request = domain.shutdown_request.take().or(asked);
        }
    }
}

async fn read_requests(xenstore: XsTokio, requests: Arc<Requests>, changed: Arc<Notify>) {
    loop {
        // Wakes also when what was read has been shown for long enough: asked again, it is news again.
        let told = timeout(OBEYS, requests.told.notified()).await.is_ok();
        if !told && requests.read.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            continue;
        }
        let unread = mem::take(&mut *requests.unread.lock().unwrap_or_else(PoisonError::into_inner));
        for domid in unread {
            // The lister reports a connection that fails.
            if let Ok(Some(request)) = request_to(&xenstore, domid).await {
                let mut read = requests.read.lock().unwrap_or_else(PoisonError::into_inner);
                read.insert(domid, (request, Instant::now()));
            }
        }
        changed.notify_one();
        // A guest that rewrites its node without end costs no more than this.
        sleep(SETTLE).await;
    }
}

impl Connection {
    async fn watch(
        &mut self,
        path: String,
        tell: impl Fn() + Send + 'static,
    ) -> io::Result<tokio::task::AbortHandle> {
        let xenstore = self.xenstore.clone();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        // The stream borrows its path, so it lives where it is drained.
        let handle = self.watches.spawn(async move {
            match xenstore.watch(&path).await {
                Ok(mut events) => {
                    let _ = ready.send(Ok(()));
                    while events.next().await.is_some() {
                        tell();
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        });
        match timeout(WATCH_TIMEOUT, is_ready).await {
            Ok(Ok(result)) => result.map(|()| handle),
            Ok(Err(_)) => Err(io::Error::other("the watch ended before it was set")),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "setting a watch was not answered")),
        }
    }

    /// Makes a list after each change; returns why the connection is no longer usable.
    async fn follow(&mut self, found: &watch::Sender<Found>, relist: &Relist) -> io::Error {
        loop {
            let mut snapshot = match list(&self.xenstore).await {
                Ok(snapshot) => snapshot,
                Err(error) => return error,
            };
            self.requests.add_to(&mut snapshot);
            snapshot.note_received(found.borrow().snapshot.as_deref());
            if let Err(error) = self.watch_each(&snapshot).await {
                return error;
            }
            publish(found, snapshot);
            if let Err(error) = self.wait_for_change(relist).await {
                return error;
            }
        }
    }

    /// Returns when the list must be made anew: after an event, when asked, and at the latest after [`RELIST`].
    async fn wait_for_change(&self, relist: &Relist) -> io::Result<()> {
        let last = Instant::now();
        for _ in 0..RELIST {
            let reason = async {
                tokio::select! {
                    () = self.changed.notified() => {}
                    () = relist.asked(last) => {}
                }
            };
            if timeout(KEEPALIVE, reason).await.is_ok() {
                // A guest that rewrites a watched node without end costs no more than this.
                sleep(SETTLE.max(ASKED.saturating_sub(last.elapsed()))).await;
                return Ok(());
            }
            alive(&self.xenstore).await?;
        }
        Ok(())
    }

    /// Names change (migration), and the toolstack asks for shutdowns; neither shows in [`WATCHED`].
    async fn watch_each(&mut self, snapshot: &Snapshot) -> io::Result<()> {
        let alive: Vec<u16> = snapshot.domains.iter().map(|d| d.domid).collect();
        self.domain_watches.retain(|domid, watches| {
            let keep = alive.contains(domid);
            if !keep {
                watches.iter().for_each(tokio::task::AbortHandle::abort);
            }
            keep
        });
        for domid in alive {
            if !self.domain_watches.contains_key(&domid) {
                let home = format!("/local/domain/{domid}");
                let (changed, requests) = (Arc::clone(&self.changed), Arc::clone(&self.requests));
                let watches = vec![
                    self.watch(format!("{home}/name"), move || changed.notify_one()).await?,
                    self.watch(format!("{home}/control/shutdown"), move || requests.tell(domid)).await?,
                ];
                self.domain_watches.insert(domid, watches);
            }
        }
        // Watches that were aborted are taken out of the set.
        while self.watches.try_join_next().is_some() {}
        Ok(())
    }
}

fn publish(found: &watch::Sender<Found>, snapshot: Snapshot) {
    found.send_if_modified(|found| {
        let same = found.snapshot.as_deref() == Some(&snapshot);
        if same && found.problem.is_none() {
            return false;
        }
        log_changes(found.snapshot.as_deref(), &snapshot);
        found.snapshot = Some(Arc::new(snapshot));
        found.problem = None;
        true
    });
}

fn log_changes(before: Option<&Snapshot>, after: &Snapshot) {
    let nothing = Snapshot::default();
    let before = before.unwrap_or(&nothing);
    let changes = changes(before, after);
    for domain in changes.appeared {
        tracing::info!(domid = domain.domid, name = domain.name, uuid = %domain.uuid, "domain appeared");
    }
    for domain in changes.gone {
        tracing::info!(domid = domain.domid, name = domain.name, uuid = %domain.uuid, "domain gone");
    }
    for domain in changes.changed {
        tracing::debug!(?domain, "domain changed");
    }
    if after.garbage > before.garbage {
        tracing::warn!(nodes = after.garbage, "xenstore has nodes that make no sense; they are skipped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn any_number_of_askers_costs_one_list() {
        let relist = Relist::default();
        let asked_within = async |limit, last| timeout(limit, relist.asked(last)).await.is_ok();
        let long_ago = Instant::now();
        sleep(ASKED).await;
        for _ in 0..10_000 {
            relist.clone().ask();
        }
        assert!(asked_within(KEEPALIVE, long_ago).await, "the first is heard");
        assert!(!asked_within(ASKED, long_ago).await, "and stands for all");

        relist.ask();
        let later = Instant::now() + Duration::from_secs(3_600);
        assert!(!asked_within(ASKED, later).await, "a flood gets one list per while");
        let last = Instant::now();
        assert!(asked_within(KEEPALIVE, last).await, "what was asked too soon is not forgotten");
        assert!(last.elapsed() >= ASKED);
    }
}
