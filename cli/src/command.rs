//! Carries out each command: asks dom0d, and shows its answer.

use std::time::Duration;

use serde::de::DeserializeOwned;
use understudy_api as api;
use understudy_api::{
    Attach, Attached, Conversations, DEFAULT_DRAIN_TIMEOUT_MS, Done, Event, Failover, Hold, Notice,
    NoticeEvent, OnDomain, Promoted, Services, Status, Switchover,
};

use crate::arguments::{Arguments, Command, What};
use crate::check_config::check_config;
use crate::copy::copy_to;
use crate::daemon::{Daemon, Events, percent_encoded};
use crate::failed::Failed;
use crate::output::Output;
use crate::{sentence, show};

/// Conversations in one request; dom0d answers with no more.
const PAGE: u32 = 1_000;

/// How long after a drain's deadline dom0d may report its end.
const DRAIN_SLACK: Duration = Duration::from_secs(5);

pub(crate) async fn carry_out(arguments: Arguments, output: &Output) -> Result<(), Failed> {
    let daemon = &Daemon { socket: arguments.socket };
    match arguments.command {
        Command::Status => {
            let status: Status = daemon.get("/v1/status").await?;
            output.result(&status, || show::status(&status))
        }
        Command::Services => {
            let services: Services = daemon.get("/v1/services").await?;
            output.result(&services, || show::services(&services))
        }
        Command::Conversations { service, limit, skip } => {
            let service = named(daemon, service).await?;
            let page = conversations(daemon, &service, skip, limit).await?;
            output.result(&page, || show::conversations(&page))
        }
        Command::Attach { service, domain, assume_identical, drain, copy, timeout, copy_limit } => {
            let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            let (timeout, limit_ms) = (timeout.map(ms), copy_limit.map(ms));
            match copy {
                Some(command) => {
                    let service = named(daemon, service).await?;
                    let hold = Hold { domain, drain_timeout_ms: timeout, limit_ms };
                    copy_to(daemon, &service, &hold, &command, output).await
                }
                None => {
                    let body =
                        Attach { domain, assume_identical, drain, drain_timeout_ms: timeout, copied: None };
                    attach(daemon, service, body, output).await
                }
            }
        }
        Command::Detach { service, domain } => {
            let command = api::Command::Detach(OnDomain { domain });
            let (service, done): (_, Done) = send(daemon, service, &command).await?;
            output.result(&done, || format!("{service}: {} is out of the queue\n", done.domain.name))
        }
        Command::Switchover { service, to } => {
            let command = api::Command::Switchover(Switchover { to });
            let (service, promoted): (_, Promoted) = send(daemon, service, &command).await?;
            output.result(&promoted, || now_serves(&service, &promoted))
        }
        Command::Failover { service, to, force } => {
            let command = api::Command::Failover(Failover { to, force });
            let (service, promoted): (_, Promoted) = send(daemon, service, &command).await?;
            output.result(&promoted, || now_serves(&service, &promoted))
        }
        Command::Pause { service, domain } => {
            let command = api::Command::Pause(OnDomain { domain });
            let (service, done): (_, Done) = send(daemon, service, &command).await?;
            output.result(&done, || {
                format!(
                    "{service}: {name} is paused for maintenance; end it with `understudy resume {name}`\n",
                    name = done.domain.name
                )
            })
        }
        Command::Resume { service, domain } => {
            let command = api::Command::Resume(OnDomain { domain });
            let (service, done): (_, Done) = send(daemon, service, &command).await?;
            output.result(&done, || format!("{service}: {} runs\n", done.domain.name))
        }
        Command::Notify { event, domid, vif, domain } => {
            let event = match event {
                What::Online => NoticeEvent::Online,
                What::Offline => NoticeEvent::Offline,
            };
            let named = |name: &String| !name.is_empty();
            let notice = Notice { event, vif: vif.filter(named), domid, domain: domain.filter(named) };
            let noticed = daemon.notify(&notice).await?;
            output.result(&noticed, || "dom0d looks for domains now\n".to_owned())
        }
        Command::Events { follow, since } => events(daemon, follow, since, output).await,
        Command::CheckConfig { path } => check_config(&path, output),
    }
}

/// Sends a command to the named service, or to the only one; returns the service's name and the answer.
async fn send<T: DeserializeOwned>(
    daemon: &Daemon,
    service: Option<String>,
    command: &api::Command,
) -> Result<(String, T), Failed> {
    let service = named(daemon, service).await?;
    let answer = daemon.command(&service, command).await?;
    Ok((service, answer))
}

/// The service's name, or that of the only service.
async fn named(daemon: &Daemon, service: Option<String>) -> Result<String, Failed> {
    match service {
        Some(service) => Ok(service),
        None => only_service(daemon).await,
    }
}

async fn only_service(daemon: &Daemon) -> Result<String, Failed> {
    let services: Services = daemon.get("/v1/services").await?;
    let mut names = services.services.into_iter().map(|service| service.name);
    match (names.next(), names.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(Failed::refused("no_service", "dom0d has no service")),
        (Some(first), Some(second)) => {
            let names: Vec<String> = [first, second].into_iter().chain(names).collect();
            Err(Failed::Usage(format!("there are several services: name one of {}", names.join(", "))))
        }
    }
}

fn now_serves(service: &str, promoted: &Promoted) -> String {
    let (domain, epoch) = (&promoted.domain.name, promoted.epoch);
    format!("{service}: {domain} serves now (epoch {epoch})\n")
}

/// Asks page by page. A row may appear twice or not at all, since conversations come and go between pages.
async fn conversations(
    daemon: &Daemon,
    service: &str,
    skip: u32,
    limit: u32,
) -> Result<Conversations, Failed> {
    let path = format!("/v1/services/{}/conversations", percent_encoded(service));
    let mut all: Option<Conversations> = None;
    let mut taken = 0;
    loop {
        let wanted = (limit - taken).min(PAGE);
        let from = skip.saturating_add(taken);
        let page: Conversations = daemon.get(&format!("{path}?skip={from}&limit={wanted}")).await?;
        let got = u32::try_from(page.conversations.len()).unwrap_or(u32::MAX);
        taken = taken.saturating_add(got);
        let last = got < wanted || taken >= limit;
        let all = match &mut all {
            None => all.insert(page),
            Some(all) => {
                all.total = page.total;
                all.conversations.extend(page.conversations);
                all
            }
        };
        if last {
            return Ok(all.clone());
        }
    }
}

async fn attach(
    daemon: &Daemon,
    service: Option<String>,
    body: Attach,
    output: &Output,
) -> Result<(), Failed> {
    if !body.assume_identical && !body.drain {
        return Err(Failed::Usage(format!(
            "say what the state of {} is: --assume-identical if it equals the OVM's now, --drain if it does once open conversations have ended, --copy COMMAND to make it equal",
            body.domain
        )));
    }
    let service = named(daemon, service).await?;
    // Listen first: the drain may end at once.
    let mut events = match body.drain {
        true => Some(daemon.events("?follow=true&since=0s").await?),
        false => None,
    };
    let timeout_ms = body.drain_timeout_ms.unwrap_or(DEFAULT_DRAIN_TIMEOUT_MS);
    let mut attached: Attached = daemon.command(&service, &api::Command::Attach(body)).await?;
    if let (true, Some(events)) = (attached.draining, &mut events) {
        let timeout = Duration::from_millis(timeout_ms);
        output.notice(&format!(
            "{service}: you state that {} has everything that clients wrote until now. A copy made while they wrote does not; use --copy then",
            attached.domain.name
        ));
        output.notice(&format!(
            "{service}: waiting up to {} s for open conversations to end; new clients wait",
            timeout.as_secs_f64()
        ));
        let end = drained(events, &service, &attached);
        match tokio::time::timeout(timeout + DRAIN_SLACK, end).await {
            Ok(end) => end?,
            Err(_) => {
                let message = format!(
                    "service {service}: dom0d did not report the end of the drain; see `understudy status`"
                );
                return Err(Failed::refused("drain_unknown", message));
            }
        }
        attached.draining = false;
    }
    output.result(&attached, || {
        format!("{service}: {} is in the queue, and promotable once it has caught up\n", attached.domain.name)
    })
}

/// Waits until the drain has succeeded.
async fn drained(events: &mut Events<'_>, service: &str, attached: &Attached) -> Result<(), Failed> {
    let server = u64::from(attached.server.0);
    while let Some(line) = events.next().await? {
        let Ok(event) = serde_json::from_str::<Event>(&line) else {
            continue;
        };
        if event.service.as_deref() != Some(service) || event.number("server") != Some(server) {
            continue;
        }
        match event.kind() {
            "seeded" => return Ok(()),
            "drain_failed" | "detached" | "evicted" => {
                let advice = match event.text("reason") {
                    Some("conversations_open") => "try again with a longer --timeout or fewer clients",
                    _ => "bring its state in line with the present OVM's, then try again",
                };
                let message = format!(
                    "service {service}: {}. {} is not promotable; {advice}",
                    sentence::sentence(&event),
                    attached.domain.name
                );
                return Err(Failed::refused(event.kind(), message));
            }
            _ => {}
        }
    }
    Err(ended())
}

async fn events(daemon: &Daemon, follow: bool, since: Option<String>, output: &Output) -> Result<(), Failed> {
    let mut query = format!("?follow={follow}");
    if let Some(since) = since {
        query += &format!("&since={}", percent_encoded(&since));
    }
    let mut events = daemon.events(&query).await?;
    while let Some(line) = events.next().await? {
        output.line(&line, || match serde_json::from_str(&line) {
            Ok(event) => show::event(&event),
            Err(_) => line.clone(),
        })?;
    }
    match follow {
        true => Err(ended()),
        false => Ok(()),
    }
}

fn ended() -> Failed {
    Failed::Unreachable("dom0d stopped, and the stream of events with it; see its log".to_owned())
}
