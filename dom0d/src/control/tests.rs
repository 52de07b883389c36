//! The control server over a real Unix socket; the data path is a thread that answers from a script.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod connections;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use understudy_api::{Answer, Attached, Command, CopyEnd, Done, HoldState, Promoted};
use understudy_protocol::{
    ConversationStatus, EventKind, Evidence, LegStatus, NotPromotable, OperatorError, Role, ServerId,
    ServerStatus, ServiceStatus, StaleReason, Uncovered,
};
use uuid::Uuid;

use super::*;
use crate::command::{CommandError, Conversations, DaemonStatus, ServiceReport, Statement};
use crate::domain::{DomainRef, KnownDomain};
use crate::message::Message;
use crate::report::{DaemonEvent, Happening, TimedEvent};
use crate::wake::Waker;

/// A control server on a socket of its own, and the commands that it sent.
struct Daemon {
    directory: PathBuf,
    events: Events,
    asked: mpsc::Receiver<String>,
    relist: Relist,
    server: JoinHandle<()>,
}

impl Daemon {
    fn start() -> Self {
        let directory = directory();
        let (sender, messages) = mpsc::channel();
        let (record, asked) = mpsc::channel();
        thread::spawn(move || {
            for message in messages {
                if let Message::Request(request) = message {
                    let _ = record.send(format!("{request:?}"));
                    answer(request);
                }
            }
        });
        let requests = Requests::new(sender, Waker::new().unwrap());
        let (events, _) = tokio::sync::broadcast::channel(crate::report::EVENTS_KEPT);
        let socket = ControlSocket::listen(&directory.join("control.sock")).unwrap();
        let relist = Relist::default();
        let server = tokio::spawn(serve(socket, requests, relist.clone(), &events));
        Self { directory, events, asked, relist, server }
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("control.sock")
    }

    /// Sends a request as it is and reads the answer to its end: status and body.
    async fn raw(&self, request: &[u8]) -> (u16, String) {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        // A server that refuses a body may close before it has read it all.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let limit = Duration::from_secs(20);
        let _ = tokio::time::timeout(limit, read).await.expect("the answer has no end");
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let (status, body) = self.text(path).await;
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    async fn text(&self, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: dom0\r\nconnection: close\r\n\r\n");
        self.raw(request.as_bytes()).await
    }

    async fn post(&self, path: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: dom0\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let (status, body) = self.raw(request.as_bytes()).await;
        (status, serde_json::from_str(&body).unwrap())
    }

    fn happened(&self, unix_us: u64, kind: Happening) {
        let event = TimedEvent {
            unix_us,
            monotonic_us: unix_us / 2,
            service: Some("redis".to_owned()),
            domains: BTreeMap::from([(1, domain(1)), (2, domain(2))]),
            kind,
        };
        self.events.send(Arc::new(event)).unwrap();
    }

    async fn kept(&self, lines: usize) {
        for _ in 0..200 {
            if self.text("/v1/events").await.1.matches("\"seq\"").count() >= lines {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{lines} events did not arrive");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.server.abort();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn directory() -> PathBuf {
    std::env::temp_dir().join(format!("understudy-control-{}", Uuid::new_v4()))
}

fn domain(id: u32) -> DomainRef {
    DomainRef { name: format!("redis-{id}"), uuid: Uuid::from_u128(u128::from(id)), domid: id as u16 }
}

fn refused(domain: &str, error: OperatorError) -> CommandError {
    CommandError::Refused { service: "redis".to_owned(), domain: Some(domain.to_owned()), error }
}

fn known(service: &str) -> Result<(), CommandError> {
    match service {
        "redis" => Ok(()),
        _ => {
            Err(CommandError::UnknownService { service: service.to_owned(), known: vec!["redis".to_owned()] })
        }
    }
}

/// The script of the data path: a service `redis` with the OVM redis-1, the promotable redis-2 and
/// the stale redis-3.
fn answer(request: Request) {
    match request {
        Request::Status { reply } => drop(reply.send(Ok(report()))),
        Request::Conversations { service, reply, .. } => {
            drop(reply.send(known(&service).map(|()| conversations())));
        }
        // The reply is dropped, as when the daemon stops.
        Request::Command { command: Command::Resume(_), .. } => {}
        Request::Command { service, command, reply } => drop(reply.send(carry_out(&service, command))),
        Request::Hold { reply, .. } => {
            let end = |id| CopyEnd { domain: domain(id), addresses: vec![[10, 0, 0, id as u8].into()] };
            drop(reply.send(Ok(crate::command::Hold { hold: 7, from: end(1), to: end(3) })));
        }
        Request::Holding { reply, .. } => drop(reply.send(Ok(HoldState::Held))),
        Request::Release { hold, .. } => RELEASED.store(hold, Ordering::SeqCst),
    }
}

fn carry_out(service: &str, command: Command) -> Result<Answer, CommandError> {
    known(service)?;
    let attached =
        |id, draining| Ok(Answer::Attached(Attached { domain: domain(id), server: ServerId(3), draining }));
    match command {
        Command::Attach(attach) => match (attach.domain.as_str(), Statement::of(&attach)?) {
            (name, None) => {
                Err(CommandError::NoStatement { service: service.to_owned(), domain: name.to_owned() })
            }
            ("redis-1", _) => Err(refused("redis-1", OperatorError::IsOvm)),
            (name, Some(Statement::Identical)) => Err(refused(name, OperatorError::ConversationsOpen(3))),
            (_, Some(Statement::Copied { hold })) => attached(hold as u32, false),
            (_, Some(Statement::IdenticalAfterDrain { .. })) => attached(3, true),
        },
        Command::Detach(_) => Err(refused("redis-2", OperatorError::NothingLeft)),
        Command::Switchover(_) => {
            Ok(Answer::Promoted(Promoted { domain: domain(2), server: ServerId(2), epoch: 2 }))
        }
        Command::Failover(_) => Err(CommandError::Hypervisor {
            service: service.to_owned(),
            domain: "redis-1".to_owned(),
            error: "can't be paused".to_owned(),
        }),
        Command::Pause(_) | Command::Resume(_) => Ok(Answer::Done(Done { domain: domain(2) })),
    }
}

fn report() -> DaemonStatus {
    let server = |id, role, not_promotable, stale| ServerStatus {
        server: ServerId(id),
        role,
        not_promotable,
        stale,
        covered: 5,
        uncovered: 1,
        diverged: 0,
        behind_bytes: 17,
    };
    let unseeded = StaleReason::NotSeeded;
    DaemonStatus {
        version: "0.1.0",
        pid: 7,
        uptime_ms: 61_000,
        hypervisor: "lab",
        problems: Vec::new(),
        counters: BTreeMap::from([("liveness_polls", 9)]),
        services: vec![ServiceReport {
            name: "redis".to_owned(),
            psc: vec!["10.77.0.100".parse().unwrap()],
            psc_mac: "02:00:00:00:00:01".to_owned(),
            ports: vec![6379],
            plane: "pcap",
            bridge: Some("xenbr0".to_owned()),
            serving: true,
            problems: Vec::new(),
            status: ServiceStatus {
                epoch: 1,
                servers: vec![
                    server(1, Role::Ovm, Some(NotPromotable::IsOvm), None),
                    server(2, Role::Rvm, None, None),
                    server(3, Role::Rvm, Some(NotPromotable::Stale(unseeded)), Some(unseeded)),
                ],
                conversations: 6,
                embryonic: 0,
                recuperating: 0,
                retained_bytes: 4_096,
                counters: BTreeMap::from([("conversations", 2)]),
            },
            servers: (1..=3).map(|id| (id, domain(id))).collect(),
            known: vec![KnownDomain { domain: domain(4), reason: "its vif is not on xenbr0".to_owned() }],
            contained: vec!["vif2.0".to_owned()],
            plane_counters: BTreeMap::from([("tagged frames", 3)]),
        }],
    }
}

fn conversations() -> Conversations {
    Conversations {
        conversations: vec![ConversationStatus {
            client: "10.77.0.1:40000".parse().unwrap(),
            psc: "10.77.0.100:6379".parse().unwrap(),
            state: "established",
            recuperating: false,
            received_bytes: 100,
            sent_bytes: 200,
            legs: vec![
                LegStatus {
                    server: ServerId(2),
                    acknowledged_bytes: 100,
                    produced_bytes: 200,
                    uncovered: None,
                    diverged_at: None,
                },
                LegStatus {
                    server: ServerId(3),
                    acknowledged_bytes: 0,
                    produced_bytes: 0,
                    uncovered: Some(Uncovered::AttachedLater),
                    diverged_at: None,
                },
            ],
        }],
        servers: (1..=3).map(|id| (id, domain(id))).collect(),
        total: 6,
    }
}

#[tokio::test]
async fn status_names_domains_and_says_why_one_is_not_promotable() {
    let daemon = Daemon::start();
    let (status, body) = daemon.get("/v1/status").await;
    assert_eq!(status, 200);
    assert_eq!(body["ready"], true);
    let service = &body["services"][0];
    assert_eq!(service["counters"]["conversations"], 2);
    assert_eq!(service["known"][0]["domain"]["name"], "redis-4");

    let ovm = &service["servers"][0];
    assert_eq!(ovm["domain"]["name"], "redis-1");
    assert_eq!((&ovm["role"], &ovm["queue_state"]), (&json!("ovm"), &json!(2)));
    assert_eq!((&ovm["promotable"], &ovm["why"]), (&json!(false), &Value::Null));
    assert_eq!(service["servers"][1]["promotable"], true);
    let stale = &service["servers"][2];
    assert_eq!(stale["not_promotable"], json!({"stale": "not_seeded"}));
    assert!(stale["why"].as_str().unwrap().contains("nobody has stated"));

    // What the CLI reads is what was written.
    let read: Status = serde_json::from_value(body.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), body);
    assert_eq!(daemon.get("/v1/services").await.1["services"], body["services"]);
}

#[tokio::test]
async fn conversations_are_paged() {
    let daemon = Daemon::start();
    let path = "/v1/services/redis/conversations?skip=5&limit=1";
    let (status, body) = daemon.get(path).await;
    assert_eq!(status, 200);
    assert!(daemon.asked.recv().unwrap().contains("skip: 5, limit: 1"));
    assert_eq!((&body["total"], &body["skip"]), (&json!(6), &json!(5)));
    let legs = &body["conversations"][0]["legs"];
    assert_eq!((&legs[0]["domain"], &legs[0]["covered"]), (&json!("redis-2"), &json!(true)));
    assert_eq!((&legs[1]["covered"], &legs[1]["uncovered"]), (&json!(false), &json!("attached_later")));

    for bad in ["limit=-1", "limit=x", "offset=3"] {
        let path = format!("/v1/services/redis/conversations?{bad}");
        let (status, body) = daemon.get(&path).await;
        assert_eq!((status, &body["error"]["code"]), (400, &json!("bad_request")), "{bad}");
    }
}

#[tokio::test]
async fn commands_reach_the_data_path() {
    let daemon = Daemon::start();
    let (status, body) = daemon.post("/v1/services/redis/switchover", "").await;
    assert_eq!((status, &body["domain"]["name"], &body["epoch"]), (200, &json!("redis-2"), &json!(2)));
    assert!(daemon.asked.recv().unwrap().contains("to: None"));

    let body = r#"{"domain":"redis-3","drain":true,"drain_timeout_ms":1500}"#;
    let (status, body) = daemon.post("/v1/services/redis/attach", body).await;
    assert_eq!((status, &body["draining"]), (200, &json!(true)));
    assert!(daemon.asked.recv().unwrap().contains("drain_timeout_ms: Some(1500)"));

    let (status, body) = daemon.post("/v1/services/redis/pause", r#"{"domain":"redis-2"}"#).await;
    assert_eq!((status, &body["domain"]["uuid"]), (200, &json!(Uuid::from_u128(2))));
}

#[tokio::test]
async fn a_hook_s_notice_asks_for_a_new_list_and_for_nothing_else() {
    let daemon = Daemon::start();
    for bad in [
        r#"{}"#,
        r#"{"event":"add"}"#,
        r#"{"event":"online","domid":65536}"#,
        r#"{"event":"online","mac":""}"#,
    ] {
        let (status, body) = daemon.post("/v1/notify", bad).await;
        assert_eq!((status, &body["error"]["code"]), (400, &json!("bad_request")), "{bad}");
    }
    assert!(!daemon.relist.is_asked().await);
    for notice in [
        r#"{"event":"online","vif":"vif7.0","domid":7,"domain":null}"#,
        r#"{"event":"offline","vif":null,"domid":null,"domain":"a b"}"#,
        r#"{"event":"online"}"#,
    ] {
        assert_eq!(daemon.post("/v1/notify", notice).await, (200, json!({})), "{notice}");
    }
    assert!(daemon.relist.is_asked().await);
    assert!(!daemon.relist.is_asked().await, "several notices are one");
    assert!(daemon.asked.try_recv().is_err(), "the data path is left alone");
    assert_eq!(daemon.get("/v1/notify").await.0, 405);
}

#[tokio::test]
async fn refusals_have_a_status_a_code_and_a_remedy() {
    let daemon = Daemon::start();
    let cases = [
        ("nginx/switchover", "{}", 404, "unknown_service"),
        ("r%2Fdis/switchover", "{}", 404, "unknown_service"),
        ("%ff/switchover", "{}", 400, "bad_request"),
        ("redis/attach", r#"{"domain":"redis-3"}"#, 400, "no_statement"),
        ("redis/attach", r#"{"domain":"redis-1","assume_identical":true}"#, 409, "is_ovm"),
        ("redis/attach", r#"{"domain":"redis-3","assume_identical":true}"#, 409, "conversations_open"),
        ("redis/attach", r#"{"domain":"redis-3","assume_identical":true,"drain":true}"#, 400, "bad_request"),
        ("redis/attach", r#"{"domain":"redis-3","drain_timeout_ms":1}"#, 400, "bad_request"),
        (
            "redis/attach",
            r#"{"domain":"redis-3","drain":true,"drain_timeout_ms":99999999}"#,
            400,
            "bad_request",
        ),
        ("redis/detach", r#"{"domain":"redis-2"}"#, 409, "nothing_left"),
        ("redis/failover", "", 502, "hypervisor"),
        ("redis/resume", r#"{"domain":"redis-2"}"#, 503, "stopping"),
    ];
    for (path, body, status, code) in cases {
        let (got, answer) = daemon.post(&format!("/v1/services/{path}"), body).await;
        assert_eq!((got, &answer["error"]["code"]), (status, &json!(code)), "{path} {body}: {answer}");
        assert!(!answer["error"]["message"].as_str().unwrap().is_empty());
    }
    let (_, answer) = daemon.post("/v1/services/nginx/switchover", "").await;
    assert!(answer["error"]["message"].as_str().unwrap().ends_with("has: redis"));
}

#[tokio::test]
async fn bad_requests_are_answered_in_the_api_s_own_words() {
    let daemon = Daemon::start();
    for body in [
        "{",
        "[]",
        "null",
        "\u{0}",
        r#"{"domain":7}"#,
        "{}",
        r#"{"domian":"x"}"#,
        &format!("{}1", "[".repeat(10_000)),
    ] {
        let (status, answer) = daemon.post("/v1/services/redis/attach", body).await;
        assert_eq!((status, &answer["error"]["code"]), (400, &json!("bad_request")), "{body}");
    }

    let huge = format!(r#"{{"domain":"{}"}}"#, "x".repeat(BODY_LIMIT));
    let (status, answer) = daemon.post("/v1/services/redis/attach", &huge).await;
    assert_eq!((status, &answer["error"]["code"]), (413, &json!("body_too_large")));
    // A length that is announced only, and one that is not announced at all.
    let announced =
        b"POST /v1/services/redis/attach HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{";
    assert_eq!(daemon.raw(announced).await.0, 413);
    let half = b"POST /v1/services/redis/attach HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{";
    assert_eq!(daemon.raw(half).await.0, 408);
    let mut chunked =
        b"POST /v1/services/redis/attach HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..8 {
        chunked.extend_from_slice(b"1000\r\n");
        chunked.extend_from_slice(&[b' '; 0x1000]);
        chunked.extend_from_slice(b"\r\n");
    }
    assert_eq!(daemon.raw(&chunked).await.0, 413);

    let (status, answer) = daemon.post("/v1/services/redis/reboot", "{}").await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("no_such_path")));
    let (status, answer) = daemon.get("/v2").await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("no_such_path")));
    let (status, answer) = daemon.get("/v1/services/redis/attach").await;
    assert_eq!((status, &answer["error"]["code"]), (405, &json!("wrong_method")));
    assert_eq!(daemon.raw(b"\x16\x03\x01garbage\r\n\r\n").await.0, 400);
    assert!(daemon.asked.try_recv().is_err(), "nothing was asked of the data path");
    assert_eq!(daemon.get("/v1/status").await.0, 200);
}

#[tokio::test]
async fn events_come_with_backlog_and_follow() {
    let daemon = Daemon::start();
    daemon.happened(
        1_000_000,
        Happening::Protocol(EventKind::Suspected { server: ServerId(1), evidence: Evidence::DomainPaused }),
    );
    daemon.happened(
        2_000_000,
        Happening::Protocol(EventKind::CutOver {
            epoch: 2,
            from: Some(ServerId(1)),
            to: ServerId(2),
            evidence: Some(Evidence::DomainPaused),
            conversations: 6,
        }),
    );
    daemon.kept(2).await;

    let request = b"GET /v1/events?follow=true HTTP/1.0\r\n\r\n";
    let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut next = async || loop {
        let line = lines.next_line().await.unwrap().unwrap();
        if line.starts_with('{') {
            return serde_json::from_str::<Value>(&line).unwrap();
        }
    };
    assert_eq!(
        next().await,
        json!({
            "seq": 1,
            "time": "1970-01-01T00:00:01.000000Z",
            "monotonic_us": 500_000,
            "service": "redis",
            "domains": {
                "1": {"name": "redis-1", "uuid": Uuid::from_u128(1), "domid": 1},
                "2": {"name": "redis-2", "uuid": Uuid::from_u128(2), "domid": 2},
            },
            "event": "suspected",
            "server": 1,
            "evidence": "domain_paused",
        })
    );
    let cut_over = next().await;
    let read: understudy_api::Event = serde_json::from_value(cut_over.clone()).unwrap();
    assert_eq!(read.domain("to").as_deref(), Some("redis-2"));
    assert_eq!(serde_json::to_value(&read).unwrap(), cut_over);

    daemon.happened(3_000_000, Happening::Daemon(DaemonEvent::Fenced { server: ServerId(1), by: "pause" }));
    let fenced = next().await;
    assert_eq!((&fenced["seq"], &fenced["event"]), (&json!(3), &json!("fenced")));

    let (_, body) = daemon.text("/v1/events?since=1970-01-01T00:00:02Z").await;
    assert_eq!(body.matches("\"seq\"").count(), 2);
    let (status, body) = daemon.text("/v1/events?since=0s").await;
    assert_eq!((status, body.contains('{')), (200, false), "{body}");
    assert_eq!(daemon.get("/v1/events?since=noon").await.0, 400);
}

#[tokio::test]
async fn followers_are_bounded_and_leave_room_when_they_go() {
    let daemon = Daemon::start();
    let mut followers = Vec::new();
    for _ in 0..FOLLOWERS {
        let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
        let request = b"GET /v1/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut head = [0; 16];
        stream.read_exact(&mut head).await.unwrap();
        followers.push(stream);
    }
    let (status, body) = daemon.get("/v1/events?follow=true").await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("too_many_followers")));
    assert_eq!(daemon.get("/v1/status").await.0, 200);

    drop(followers.pop());
    let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
    for _ in 0..200 {
        let request = b"GET /v1/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        if head.ends_with(b"200") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        stream = UnixStream::connect(daemon.socket()).await.unwrap();
    }
    panic!("the place of a follower that left stayed taken");
}

#[tokio::test]
async fn a_slow_follower_is_told_what_it_missed() {
    let history = History::new(4);
    let (events, received) = tokio::sync::broadcast::channel(16);
    for unix_us in 1..=10 {
        let kind = DaemonEvent::Problem { message: "xenstored is gone".to_owned() };
        let event = TimedEvent {
            unix_us,
            monotonic_us: unix_us,
            service: None,
            domains: BTreeMap::new(),
            kind: Happening::Daemon(kind),
        };
        events.send(Arc::new(event)).unwrap();
    }
    drop(events);
    history.record(received).await;

    let (lines, place) = history.read(3, 2);
    let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["event"], &lines[0]["count"]), (&json!("events_lost"), &json!(4)));
    assert_eq!((&lines[1]["seq"], &lines[2]["seq"], place), (&json!(7), &json!(8), 9));
    assert_eq!(history.read(place, 256).0.len(), 2);
    assert_eq!(history.read(11, 256), (Vec::new(), 11));
    assert_eq!((history.oldest(), history.since(8)), (7, 8));
}

#[test]
fn kinds_of_events_are_objects() {
    let kinds = [
        Happening::Protocol(EventKind::FirstByte { epoch: 1 }),
        Happening::Protocol(EventKind::NoCandidate {
            server: None,
            evidence: Evidence::NoProgress,
            because: vec![(ServerId(3), NotPromotable::Stale(StaleReason::MissedBytes))],
        }),
        Happening::Daemon(DaemonEvent::Solved { message: String::new() }),
    ];
    for kind in kinds {
        let value = serde_json::to_value(&kind).unwrap();
        assert!(value["event"].is_string(), "{value}");
    }
}

#[tokio::test]
async fn monitoring_sees_every_number() {
    let daemon = Daemon::start();
    let (status, page) = daemon.text("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "understudy_build{version=\"0.1.0\"} 1",
        "understudy_service_serving{service=\"redis\"} 1",
        "understudy_service_promotable_rvms{service=\"redis\"} 1",
        "understudy_server_queue_state{service=\"redis\",domain=\"redis-1\",server=\"1\"} 2",
        "understudy_server_promotable{service=\"redis\",domain=\"redis-3\",server=\"3\"} 0",
        "understudy_engine_conversations_total{service=\"redis\"} 2",
        "understudy_plane_tagged_frames_total{service=\"redis\"} 3",
        "understudy_daemon_liveness_polls_total 9",
        "# EOF",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
    }
    assert_eq!(daemon.text("/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(daemon.text("/readyz").await, (200, "ok\n".to_owned()));
}

#[tokio::test]
async fn a_service_that_does_not_serve_makes_the_daemon_not_ready() {
    let mut report = report();
    report.services[0].serving = false;
    assert!(!view::status(report).ready);
}

/// The hold that was released last.
static RELEASED: AtomicU64 = AtomicU64::new(0);

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_held_for_as_long_as_whoever_asked_is_there() {
    let daemon = Daemon::start();
    let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
    let body = r#"{"domain":"redis-3"}"#;
    let request = format!(
        "POST /v1/services/redis/hold HTTP/1.1\r\nhost: dom0\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut said = String::new();
    while said.matches(r#""is":"held""#).count() < 2 {
        let mut bytes = [0; 4096];
        let read = stream.read(&mut bytes).await.unwrap();
        assert!(read > 0, "{said}");
        said += &String::from_utf8_lossy(&bytes[..read]);
    }
    assert!(said.contains(r#""hold":7"#) && said.contains("10.0.0.3"), "{said}");
    let attached = daemon.post("/v1/services/redis/attach", r#"{"domain":"redis-3","copied":7}"#).await;
    assert_eq!(attached.0, 200, "{attached:?}");
    assert_eq!(RELEASED.load(Ordering::SeqCst), 0);
    // As when it is killed.
    drop(stream);
    for _ in 0..200 {
        if RELEASED.load(Ordering::SeqCst) == 7 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("nobody lets clients in again");
}
