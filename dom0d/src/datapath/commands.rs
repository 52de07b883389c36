//! Answers operators' requests between packets, on the data-path thread.

use std::collections::BTreeMap;
use std::time::Duration;

use understudy_api::{Answer, Attach, Attached, Command, Done, Failover, OnDomain, Promoted, Switchover};
use understudy_driver::Engine as _;
use understudy_protocol::{self as protocol, Input, Instant, OperatorError, Seeding, ServerId};

use super::DataPath;
use crate::clock;
use crate::command::{
    CONVERSATIONS_LIMIT, CommandError, Conversations, DaemonStatus, Hold, Reply, Request, ServiceReport,
    Statement,
};
use crate::domain::DomainRef;
use crate::host::HostError;
use crate::host::fencing::Job;
use crate::message::Source;
use crate::service::{Place, Service};

type Outcome<T> = Result<T, CommandError>;

impl DataPath {
    /// Answers a request. If whoever asked is gone, the answer is lost, but not what was done.
    pub(super) fn answer(&mut self, now: Instant, request: Request) {
        match request {
            Request::Status { reply } => drop(reply.send(Ok(self.status()))),
            Request::Conversations { service, skip, limit, reply } => {
                drop(reply.send(self.conversations(&service, skip, limit)));
            }
            Request::Command { service, command, reply } => self.carry_out(now, &service, command, reply),
            Request::Hold { service, domain, drain, limit, reply } => {
                let held = reply.send(self.hold(now, &service, &domain, (drain, limit)));
                if let Err(Ok(Hold { hold, .. })) = held {
                    // Nobody would ever release it.
                    self.answer(now, Request::Release { service, hold });
                }
            }
            Request::Holding { service, hold, reply } => {
                drop(reply.send(self.index(&service).map(|index| self.services[index].holding(hold))));
            }
            Request::Release { service, hold } => {
                if let Ok(index) = self.index(&service) {
                    let (service, mut around) = self.split(index);
                    service.release(now, hold, &mut around);
                }
            }
        }
    }

    /// Carries out a command.
    fn carry_out(&mut self, now: Instant, service: &str, command: Command, reply: Reply<Answer>) {
        let answer = match command {
            Command::Attach(attach) => self.attach(now, service, &attach).map(Answer::Attached),
            Command::Detach(OnDomain { domain }) => {
                self.detach(now, service, &domain).map(|domain| Answer::Done(Done { domain }))
            }
            Command::Switchover(Switchover { to }) => {
                self.switchover(now, service, to.as_deref()).map(Answer::Promoted)
            }
            Command::Failover(Failover { to, force }) => {
                self.failover(now, service, to.as_deref(), force).map(Answer::Promoted)
            }
            Command::Pause(OnDomain { domain }) => {
                return self.set_paused(now, service, &domain, true, reply);
            }
            Command::Resume(OnDomain { domain }) => {
                return self.set_paused(now, service, &domain, false, reply);
            }
        };
        drop(reply.send(answer));
    }

    fn index(&self, service: &str) -> Outcome<usize> {
        let mut services = self.services.iter();
        services.position(|known| known.name() == service).ok_or_else(|| CommandError::UnknownService {
            service: service.to_owned(),
            known: self.services.iter().map(|s| s.name().to_owned()).collect(),
        })
    }

    fn status(&mut self) -> DaemonStatus {
        let placement = |problems: &BTreeMap<Source, Vec<String>>, index| {
            let found = problems.get(&Source::Placement(index));
            found.cloned().unwrap_or_default()
        };
        let services: Vec<ServiceReport> = (0..self.services.len())
            .map(|index| {
                let problems = placement(&self.problems, index);
                self.services[index].status(problems)
            })
            .collect();
        let problems = self
            .problems
            .iter()
            .filter(|(source, _)| !matches!(source, Source::Placement(_)))
            .flat_map(|(_, problems)| problems.iter().cloned())
            .collect();
        let counters = self.counters;
        let uptime = clock::now().since(self.started).as_millis();
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            uptime_ms: u64::try_from(uptime).unwrap_or(u64::MAX),
            hypervisor: self.hypervisor_name,
            problems,
            counters: BTreeMap::from([
                ("liveness_polls", counters.liveness_polls),
                ("liveness_errors", counters.liveness_errors),
                ("starved", counters.starved),
                ("rules_written", counters.rules_written),
                ("rules_restored", counters.rules_restored),
                ("programs_restored", counters.programs_restored),
                ("interfaces_lost", counters.interfaces_lost),
                ("fenced", counters.fenced),
            ]),
            services,
        }
    }

    fn conversations(&self, service: &str, skip: usize, limit: usize) -> Outcome<Conversations> {
        let service = &self.services[self.index(service)?];
        let conversations = service.engine.conversations(skip, limit.min(CONVERSATIONS_LIMIT));
        let ids =
            conversations.iter().flat_map(|conversation| conversation.legs.iter().map(|leg| leg.server));
        let servers = ids.filter_map(|id| Some((id.0, service.domain(id)?.clone()))).collect();
        Ok(Conversations { total: service.engine.status().conversations, conversations, servers })
    }

    fn attach(&mut self, now: Instant, service: &str, attach: &Attach) -> Outcome<Attached> {
        let (statement, domain) = (Statement::of(attach)?, attach.domain.as_str());
        let index = self.index(service)?;
        let (service, mut around) = self.split(index);
        let id = find(service, domain)?;
        let name = service.name().to_owned();
        let refused = |error| refused(&name, domain, error);
        if service.engine.ovm() == Some(id) {
            return Err(refused(OperatorError::IsOvm));
        }
        let Some(statement) = statement else {
            return Err(CommandError::NoStatement { service: name, domain: domain.to_owned() });
        };
        usable(service, id, domain)?;
        let (seeding, draining) = match statement {
            Statement::Identical => (Seeding::AssumeIdentical, false),
            Statement::IdenticalAfterDrain { timeout } => (Seeding::Drain { deadline: now + timeout }, true),
            Statement::Copied { .. } => (Seeding::Copied, false),
        };
        let id = if let Statement::Copied { hold } = statement {
            service.copied(now, (id, hold), &mut around).map_err(refused)?
        } else if service.servers[&id].place == Place::Queued {
            if is_seeded(service, id) {
                return Err(refused(OperatorError::AlreadyAttached));
            }
            service.engine.command(now, protocol::Command::Seed { server: id, seeding }).map_err(refused)?;
            service.drain(now, &mut around);
            id
        } else {
            service.attach(now, id, seeding, &mut around).map_err(refused)?
        };
        Ok(Attached {
            domain: service.servers[&id].domain.clone(),
            server: id,
            draining: draining && !is_seeded(service, id),
        })
    }

    fn hold(
        &mut self,
        now: Instant,
        service: &str,
        domain: &str,
        limits: (Duration, Duration),
    ) -> Outcome<Hold> {
        let index = self.index(service)?;
        let (service, mut around) = self.split(index);
        let id = find(service, domain)?;
        let name = service.name().to_owned();
        let refused = |error| refused(&name, domain, error);
        if service.engine.ovm() == Some(id) {
            return Err(refused(OperatorError::IsOvm));
        }
        if service.is_queued(id) && is_seeded(service, id) {
            return Err(refused(OperatorError::AlreadyAttached));
        }
        usable(service, id, domain)?;
        service.hold_clients(now, id, limits, &mut around).map_err(refused)
    }

    fn detach(&mut self, now: Instant, service: &str, domain: &str) -> Outcome<DomainRef> {
        let index = self.index(service)?;
        let (service, mut around) = self.split(index);
        let id = match find(service, domain) {
            Ok(id) => id,
            Err(error) => match service.find_unusable(domain).map(|known| known.domain.clone()) {
                // It is no server: its vifs are released, and it won't join if it becomes usable.
                Some(domain) if !service.memory.is_detached(domain.uuid) => {
                    service.memory.set_detached(domain.uuid, true);
                    service.memory_changed = true;
                    service.rules_changed = true;
                    return Ok(domain);
                }
                _ => return Err(error),
            },
        };
        let queued = service.is_queued(id);
        if queued {
            let detached = service.engine.command(now, protocol::Command::Detach { server: id });
            detached.map_err(|error| refused(service.name(), domain, error))?;
        } else if service.servers[&id].place == Place::Detached {
            let error = OperatorError::UnknownServer;
            return Err(refused(service.name(), domain, error));
        }
        // A server that is not in the queue is kept from joining it, too.
        let domain = service.servers[&id].domain.clone();
        service.server_mut(id, |server| server.place = Place::Detached);
        service.memory.set_detached(domain.uuid, true);
        service.memory_changed = true;
        service.rules_changed = true;
        service.drain(now, &mut around);
        Ok(domain)
    }

    fn switchover(&mut self, now: Instant, service: &str, to: Option<&str>) -> Outcome<Promoted> {
        let index = self.index(service)?;
        let (service, mut around) = self.split(index);
        let id = to.map(|to| find(service, to)).transpose()?;
        let switchover = Input::Command(protocol::Command::Switchover { to: id });
        let promoted = service.cut_over(now, &mut around, Some(switchover));
        promoted.map_err(|error| refused(service.name(), to.unwrap_or(""), error))?;
        promoted_reply(service)
    }

    fn failover(&mut self, now: Instant, service: &str, to: Option<&str>, force: bool) -> Outcome<Promoted> {
        let index = self.index(service)?;
        let (service, mut around) = self.split(index);
        let id = to.map(|to| find(service, to)).transpose()?;
        match id {
            // After a restart, when the domain promoted last is gone: nobody can say whose state is
            // right but the operator.
            Some(id) if force && service.engine.ovm().is_none() => service.install(now, id, &mut around),
            _ => {
                let failover = Input::Command(protocol::Command::Failover { to: id, force });
                service.cut_over(now, &mut around, Some(failover))
            }
        }
        .map_err(|error| refused(service.name(), to.unwrap_or(""), error))?;
        service.drain(now, &mut around);
        promoted_reply(service)
    }

    /// Pauses a domain, or resumes it; the fencing thread answers.
    fn set_paused(&mut self, now: Instant, service: &str, domain: &str, pause: bool, reply: Reply<Answer>) {
        let found = self.index(service).and_then(|index| {
            let id = find(&self.services[index], domain)?;
            Ok((index, id))
        });
        let (index, server) = match found {
            Ok(found) => found,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let life = self.services[index].servers[&server].life();
        // Announced first, and to all that the domain serves: the next look may be the one that sees it paused.
        for service in (0..self.services.len()).filter(|_| pause) {
            let (service, mut around) = self.split(service);
            if let Some(id) = service.find_life(life) {
                service.maintenance_began(now, id, &mut around);
            }
        }
        let (service, around) = self.split(index);
        let (name, domain) = (service.name().to_owned(), service.servers[&server].domain.clone());
        let done = Box::new(move |result: Result<(), HostError>| {
            drop(reply.send(match result {
                Ok(()) => Ok(Answer::Done(Done { domain })),
                Err(error) => Err(CommandError::Hypervisor {
                    service: name,
                    domain: domain.name,
                    error: error.to_string(),
                }),
            }));
        });
        // If the thread has ended, so has the reply, and whoever asked is told that dom0d stops.
        let _ = around.jobs.send(Job::SetPaused { service: index, server, domain: life, pause, done });
    }
}

fn find(service: &Service, domain: &str) -> Outcome<ServerId> {
    if let Some(id) = service.find(domain) {
        return Ok(id);
    }
    Err(match service.find_unusable(domain) {
        Some(known) => CommandError::Unusable {
            service: service.name().to_owned(),
            domain: domain.to_owned(),
            reason: known.reason.clone(),
        },
        None => CommandError::UnknownDomain {
            service: service.name().to_owned(),
            domain: domain.to_owned(),
            known: service.domain_names(),
        },
    })
}

/// Whether a domain can be a server as it is now.
fn usable(service: &Service, id: ServerId, domain: &str) -> Outcome<()> {
    let server = &service.servers[&id];
    let reason = if !service.plane.ports.has_server(id) {
        "its vif can't be used at the moment; see understudy status"
    } else if !server.running {
        "its domain does not run (paused, suspended or shut down); resume it (understudy resume, xl unpause) or start it"
    } else if matches!(server.place, Place::Preparing(_)) {
        "its vif is being prepared; try again in a moment"
    } else if service.engine.ovm().is_none() {
        "the service has no OVM that its state could equal"
    } else {
        return Ok(());
    };
    let (service, domain) = (service.name().to_owned(), domain.to_owned());
    Err(CommandError::Unusable { service, domain, reason: reason.to_owned() })
}

fn refused(service: &str, domain: &str, error: OperatorError) -> CommandError {
    CommandError::Refused {
        service: service.to_owned(),
        domain: (!domain.is_empty()).then(|| domain.to_owned()),
        error,
    }
}

fn is_seeded(service: &Service, id: ServerId) -> bool {
    let status = service.engine.status();
    let mut servers = status.servers.iter();
    servers.any(|server| server.server == id && server.stale.is_none())
}

/// Whom a promotion made the OVM.
fn promoted_reply(service: &Service) -> Outcome<Promoted> {
    let Some(server) = service.engine.ovm() else {
        return Err(refused(service.name(), "", OperatorError::NothingLeft));
    };
    let unknown = || DomainRef { name: String::new(), uuid: uuid::Uuid::nil(), domid: 0 };
    Ok(Promoted {
        domain: service.domain(server).cloned().unwrap_or_else(unknown),
        server,
        epoch: service.engine.epoch(),
    })
}
