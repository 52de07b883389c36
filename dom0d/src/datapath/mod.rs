//! The data-path thread: everything that packets pass through, and what must happen between two of them.
//!
//! It sleeps in one ppoll(2) over all captures and a waker until an engine, an announcement or a look at the domains is due.
//! Nothing that it calls waits: files, netlink, nft and the hypervisor belong to other threads, which send it a [`Message`].

mod commands;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use understudy_protocol::Instant;

use crate::clock;
use crate::containment::{Numbered, RuleSet, RulesNews};
use crate::host::Host;
use crate::host::fencing::{Job, Outcome};
use crate::message::{LostInterface, Message, Source};
use crate::report::{DaemonEvent, Happening, Reporter};
use crate::service::{Doomed, Server, Service, Surroundings};
use crate::store::memory::Memory;
use crate::wake::Waker;

/// Messages taken before packets have their turn again.
const MESSAGES: usize = 32;

/// How often captures are polled while rings have something. Rings are looked at without a system call; a poll for each
/// segment took a third of the thread's time.
const POLL_WHILE_BUSY: Duration = Duration::from_micros(100);

/// What the data path sends to the other threads.
pub(crate) struct Outboxes {
    /// Where events go.
    pub(crate) reporter: Reporter,
    /// What is to be done to domains.
    pub(crate) jobs: mpsc::Sender<Job>,
    /// Rules for the kernel.
    pub(crate) rules: mpsc::Sender<Numbered>,
    /// What to write down.
    pub(crate) memory: mpsc::Sender<Memory>,
    /// Interfaces to open again.
    pub(crate) lost: tokio::sync::mpsc::UnboundedSender<LostInterface>,
    /// When the loop last began a round, in microseconds of the clock: for the watchdog.
    pub(crate) heartbeat: Arc<AtomicU64>,
}

/// The state of the thread.
pub(crate) struct DataPath {
    pub(super) services: Vec<Service>,
    pub(super) outboxes: Outboxes,
    pub(super) hypervisor_name: &'static str,
    pub(super) problems: BTreeMap<Source, Vec<String>>,
    pub(super) started: Instant,
    hypervisor: Box<dyn Host>,
    messages: mpsc::Receiver<Message>,
    waker: Waker,
    liveness_poll: Duration,
    starvation: Duration,
    looked: Instant,
    polled: Instant,
    pub(super) next_server: u32,
    rules_version: u64,
    memory: Memory,
    /// Domains that a service is fencing; the other services have not heard yet.
    doomed: Vec<Doomed>,
    pub(super) counters: Counters,
}

/// Monotonic counters of the daemon as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Looks at the domains.
    pub(crate) liveness_polls: u64,
    /// Looks that failed.
    pub(crate) liveness_errors: u64,
    /// Times that the thread was not run for so long that waits were measured anew.
    pub(crate) starved: u64,
    /// Times that the rules were written.
    pub(crate) rules_written: u64,
    /// Times that they were put back after somebody else had changed them.
    pub(crate) rules_restored: u64,
    /// Times that a tc program was put back after somebody else had taken it away.
    pub(crate) programs_restored: u64,
    /// Interfaces lost.
    pub(crate) interfaces_lost: u64,
    /// Fences verified.
    pub(crate) fenced: u64,
}

impl DataPath {
    /// A data path for these services, which have neither places nor servers yet.
    pub(crate) fn new(
        services: Vec<Service>,
        (hypervisor_name, hypervisor): (&'static str, Box<dyn Host>),
        (messages, waker): (mpsc::Receiver<Message>, Waker),
        liveness_poll: Duration,
        memory: Memory,
        outboxes: Outboxes,
    ) -> Self {
        let now = clock::now();
        let starvation = services
            .iter()
            .map(|service| service.config.engine.timing.starvation)
            .min()
            .unwrap_or(Duration::from_millis(50));
        Self {
            next_server: services.iter().map(|service| service.first_server).max().unwrap_or(1),
            services,
            outboxes,
            hypervisor_name,
            problems: BTreeMap::new(),
            started: now,
            hypervisor,
            messages,
            waker,
            liveness_poll,
            starvation,
            looked: now,
            polled: now,
            rules_version: 0,
            memory,
            doomed: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        loop {
            let now = clock::now();
            self.outboxes.heartbeat.store(now.as_micros(), Ordering::Relaxed);
            if now.since(self.looked) >= self.liveness_poll {
                self.look(now);
            }
            let Some(mut busy) = self.take_messages(now) else {
                return self.farewell();
            };
            self.spread(now);
            for index in 0..self.services.len() {
                let (service, mut around) = self.split(index);
                if service.is_opening(now, &mut around) {
                    continue;
                }
                busy |= service.forward(now, &mut around);
                busy |= service.timeout(now, &mut around);
                self.spread(now);
            }
            self.pass_on();
            // Called in any case, for the heartbeat: the kernel must not take a busy daemon for a dead one.
            let wait = self.wait(now);
            if busy && now.since(self.polled) < POLL_WHILE_BUSY {
                self.services.iter_mut().for_each(|service| service.plane.set_ready(&[]));
            } else {
                self.polled = now;
                self.sleep(if busy { Duration::ZERO } else { wait });
            }
        }
    }

    fn farewell(mut self) {
        for service in &mut self.services {
            service.farewell();
        }
        self.pass_on();
    }

    /// A service, and what it uses of everything else.
    pub(super) fn split(&mut self, index: usize) -> (&mut Service, Surroundings<'_>) {
        let around = Surroundings {
            reporter: &self.outboxes.reporter,
            jobs: &self.outboxes.jobs,
            next_server: &mut self.next_server,
            doomed: &mut self.doomed,
        };
        (&mut self.services[index], around)
    }

    /// Tells every service which domains another service is about to pause or destroy, and why. When the next look at the
    /// domains finds them stopped, no service takes that for a new fault.
    fn spread(&mut self, now: Instant) {
        while let Some(doomed) = self.doomed.pop() {
            for index in 0..self.services.len() {
                let (service, mut around) = self.split(index);
                service.doomed(now, doomed, &mut around);
            }
        }
    }

    fn look(&mut self, now: Instant) {
        let starved = now.since(self.looked) >= self.starvation;
        self.looked = now;
        self.counters.liveness_polls += 1;
        self.counters.starved += u64::from(starved);
        let problem = match self.hypervisor.domains() {
            Ok(domains) => {
                for service in &mut self.services {
                    let mut around = Surroundings {
                        reporter: &self.outboxes.reporter,
                        jobs: &self.outboxes.jobs,
                        next_server: &mut self.next_server,
                        doomed: &mut self.doomed,
                    };
                    if !service.is_opening(now, &mut around) {
                        service.look(now, domains, starved, &mut around);
                    }
                }
                None
            }
            Err(error) => {
                self.counters.liveness_errors += 1;
                Some(format!("the states of domains can't be read, so their faults are not seen: {error}"))
            }
        };
        // Compared without building a list: this runs every millisecond.
        let known = self.problems.get(&Source::Hypervisor);
        let same = match (&problem, known) {
            (None, None) => true,
            (Some(problem), Some(known)) => known.first() == Some(problem),
            _ => false,
        };
        if !same {
            self.set_problems(now, Source::Hypervisor, problem.into_iter().collect());
        }
    }

    /// Takes some messages; whether there may be more, or `None` when told to stop.
    fn take_messages(&mut self, now: Instant) -> Option<bool> {
        for _ in 0..MESSAGES {
            match self.messages.try_recv() {
                Ok(Message::Stop) | Err(mpsc::TryRecvError::Disconnected) => return None,
                Ok(message) => self.take(now, message),
                Err(mpsc::TryRecvError::Empty) => return Some(false),
            }
        }
        Some(true)
    }

    fn take(&mut self, now: Instant, message: Message) {
        match message {
            Message::Request(request) => self.answer(now, request),
            Message::Anchored { service, bridge, device } => {
                let (service, mut around) = self.split(service);
                service.anchored(now, bridge, device, &mut around);
            }
            Message::Arrived { service, arrival, vif } => {
                // The version that pass_on gives to the rules which this changes.
                let version = self.rules_version + 1;
                let (service, mut around) = self.split(service);
                service.arrived(now, &arrival, vif, version, &mut around);
            }
            Message::Moved { service, from, to, vif } => {
                let (service, mut around) = self.split(service);
                service.moved(now, from, &to, &vif, &mut around);
            }
            Message::Departed { service, domain } => {
                let (service, mut around) = self.split(service);
                service.departed(now, domain, &mut around);
            }
            Message::Renamed { service, domain, name } => self.services[service].renamed(domain, &name),
            Message::Unusable { service, known } => {
                let (service, mut around) = self.split(service);
                service.unusable(now, known, &mut around);
            }
            Message::ShutdownRequested { service, domain, request } => {
                let (service, mut around) = self.split(service);
                service.shutdown_requested(now, domain, request, &mut around);
            }
            Message::Problems { source, problems } => self.set_problems(now, source, problems),
            Message::Vifs { service, vifs } => self.services[service].set_vifs(vifs),
            Message::Restored { service, what } => {
                self.counters.programs_restored += 1;
                self.restored(now, service, &what);
            }
            Message::Rules(RulesNews::Applied(version, result)) => self.rules_applied(now, version, result),
            Message::Rules(RulesNews::Restored(result)) => {
                self.counters.rules_restored += 1;
                match result {
                    Ok(()) => {
                        for index in 0..self.services.len() {
                            self.restored(now, index, "the nft table `bridge understudy`");
                        }
                    }
                    Err(error) => self.rules_failed(now, &error),
                }
            }
            Message::Rules(RulesNews::Counted(refused)) => {
                for ((service, refusal), count) in refused {
                    if let Some(service) = self.services.get_mut(service) {
                        service.refused.insert(refusal.name(), count);
                    }
                }
            }
            Message::Outcome(outcome) => self.outcome(now, outcome),
            Message::Stop => {}
        }
    }

    fn rules_applied(&mut self, now: Instant, version: u64, result: Result<(), String>) {
        self.counters.rules_written += 1;
        match result {
            Ok(()) => {
                self.set_problems(now, Source::Rules, Vec::new());
                for index in 0..self.services.len() {
                    let (service, mut around) = self.split(index);
                    service.rules_applied(now, version, &mut around);
                }
            }
            Err(error) => self.rules_failed(now, &error),
        }
    }

    fn rules_failed(&mut self, now: Instant, error: &str) {
        let problem = format!("the kernel's rules can't be written, so no domain joins a queue: {error}");
        self.set_problems(now, Source::Rules, vec![problem]);
    }

    fn restored(&mut self, now: Instant, service: usize, what: &str) {
        let (service, around) = self.split(service);
        service.daemon_event(now, DaemonEvent::Restored { what: what.to_owned() }, &around);
    }

    fn outcome(&mut self, now: Instant, outcome: Outcome) {
        let (index, event) = match outcome {
            Outcome::Fenced { service, server, by } => {
                self.counters.fenced += 1;
                let by = by.name();
                (service, DaemonEvent::Fenced { server, by })
            }
            Outcome::FenceFailed { service, server, error } => {
                (service, DaemonEvent::FenceFailed { server, error })
            }
            Outcome::SetPaused { service, server, pause, done } => {
                // The operator named one service, but the pause is the domain's.
                let life = self.services[service].servers.get(&server).map(Server::life);
                for index in 0..self.services.len() {
                    let (service, mut around) = self.split(index);
                    let Some(server) = life.and_then(|life| service.find_life(life)) else { continue };
                    // A pause that did not happen excuses nothing; a resume ends what there was.
                    if pause != done {
                        service.maintenance_ended(now, server, &mut around);
                    }
                    if !pause && done {
                        service.server_mut(server, |server| server.fenced = false);
                    }
                }
                return;
            }
        };
        let (service, around) = self.split(index);
        service.daemon_event(now, event, &around);
    }

    /// Replaces the problems that one part of the daemon has, and reports the new ones and those that are over.
    fn set_problems(&mut self, now: Instant, source: Source, problems: Vec<String>) {
        let before = self.problems.remove(&source).unwrap_or_default();
        let service = match source {
            Source::Placement(index) => Some(self.services[index].name()),
            _ => None,
        };
        let report = |event| {
            let happening = Happening::Daemon(event);
            self.outboxes.reporter.report(now, service, happening, |_| None);
        };
        for message in before.iter().filter(|message| !problems.contains(message)) {
            report(DaemonEvent::Solved { message: message.clone() });
        }
        for message in problems.iter().filter(|message| !before.contains(message)) {
            report(DaemonEvent::Problem { message: message.clone() });
        }
        if !problems.is_empty() {
            self.problems.insert(source, problems);
        }
    }

    /// Tells the other threads what changed.
    fn pass_on(&mut self) {
        let mut rules_changed = false;
        let mut memory_changed = false;
        for (index, service) in self.services.iter_mut().enumerate() {
            if std::mem::take(&mut service.surroundings_changed) || service.rules_changed {
                service.note_surroundings(self.next_server);
            }
            rules_changed |= std::mem::take(&mut service.rules_changed);
            service.note_equals();
            memory_changed |= std::mem::take(&mut service.memory_changed);
            for loss in service.plane.ports.take_losses() {
                self.counters.interfaces_lost += 1;
                let server = loss.server.and_then(|id| service.servers.get(&id));
                tracing::warn!(service = service.name(), error = loss.error, "an interface was lost");
                let lost = LostInterface { service: index, domain: server.map(Server::life) };
                // Without placement the daemon is stopping.
                let _ = self.outboxes.lost.send(lost);
            }
        }
        if rules_changed {
            self.send_rules();
        }
        if memory_changed {
            for service in &self.services {
                let name = service.name().to_owned();
                self.memory.services.insert(name, service.memory.clone());
            }
            let _ = self.outboxes.memory.send(self.memory.clone());
        }
    }

    fn send_rules(&mut self) {
        let mut rules = RuleSet::default();
        for service in &self.services {
            service.add_rules(&mut rules);
        }
        self.rules_version += 1;
        for service in &mut self.services {
            service.rules_sent(self.rules_version);
        }
        let numbered = Numbered { version: self.rules_version, rules };
        let _ = self.outboxes.rules.send(numbered);
    }

    fn wait(&mut self, now: Instant) -> Duration {
        let look = self.looked + self.liveness_poll;
        let services = self.services.iter_mut();
        let due = services.filter_map(|service| service.next_timeout(now)).fold(look, Instant::min);
        due.since(clock::now())
    }

    /// Sleeps until something is to be read, somebody wakes the thread, or the time is over.
    fn sleep(&mut self, wait: Duration) {
        let captures: Vec<_> = self.services.iter().map(|service| service.plane.fds()).collect();
        let mut polled: Vec<PollFd<'_>> =
            captures.iter().flatten().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        polled.push(PollFd::new(self.waker.fd(), PollFlags::POLLIN));
        // On an error (EINTR, ENOMEM) nothing counts as ready; the next round polls again.
        let woken = ppoll(&mut polled, Some(TimeSpec::from_duration(wait)), None).is_ok();
        let flags = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::POLLIN);
        let ready: Vec<PollFlags> =
            polled.iter().map(|fd| if woken { flags(fd) } else { PollFlags::empty() }).collect();
        let counts: Vec<usize> = captures.iter().map(Vec::len).collect();
        drop(polled);
        drop(captures);
        let mut rest = ready.as_slice();
        for (service, count) in self.services.iter_mut().zip(counts) {
            let (own, others) = rest.split_at(count);
            service.plane.set_ready(own);
            rest = others;
        }
        if rest.first().is_some_and(|flags| !flags.is_empty()) {
            self.waker.clear();
        }
    }
}
