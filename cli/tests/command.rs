//! The command as an operator runs it: output, errors and exit codes. dom0d's part is played by a
//! socket with answers of the control API; the control server has tests of its own.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

const DOMAIN: &str = r#"{"name":"redis-2","uuid":"00000000-0000-0000-0000-000000000002","domid":2}"#;

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("understudy-cli-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
        command.arg("--socket").arg(self.0.join("control.sock")).args(arguments).stdin(Stdio::null());
        command
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Answers each request by what `answer` makes of its first line and body; gives the requests.
fn listen(
    directory: &Directory,
    answer: impl Fn(&str) -> (u16, String) + Send + 'static,
) -> mpsc::Receiver<String> {
    let listener = UnixListener::bind(directory.0.join("control.sock")).unwrap();
    let (sender, requests) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = request(&mut stream);
            let (status, body) = answer(&request);
            let head =
                format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.write_all((head + &body).as_bytes());
            if sender.send(request).is_err() {
                return;
            }
        }
    });
    requests
}

/// `GET /path` or `POST /path {body}`.
fn request(stream: &mut UnixStream) -> String {
    let mut read = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&read);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                .map_or(0, |(_, length)| length.parse().unwrap());
            if body.len() >= length {
                let line = head.lines().next().unwrap();
                let line = line.trim_end_matches(" HTTP/1.1");
                return format!("{line} {body}").trim_end().to_owned();
            }
        }
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "half a request");
        read.extend_from_slice(&buffer[..count]);
    }
}

fn services(names: &[&str]) -> (u16, String) {
    let services = names.iter().map(|name| {
        format!(
            r#"{{"name":"{name}","psc":["10.77.0.100"],"psc_mac":"02:00:00:00:00:01","ports":[6379],
            "plane":"pcap","bridge":null,"serving":true,"problems":[],"epoch":1,"servers":[],"known":[],
            "conversations":0,"embryonic":0,"recuperating":0,"retained_bytes":0,"counters":{{}},
            "plane_counters":{{}},"of_a_later_version":1}}"#
        )
    });
    let services: Vec<String> = services.collect();
    (200, format!(r#"{{"services":[{}]}}"#, services.join(",")))
}

fn promoted() -> (u16, String) {
    (200, format!(r#"{{"domain":{DOMAIN},"server":2,"epoch":2}}"#))
}

fn refusal(status: u16, code: &str, message: &str) -> (u16, String) {
    let body = format!(r#"{{"error":{{"code":"{code}","message":"{message}"}}}}"#);
    (status, body)
}

fn event(seq: u32, event: &str) -> String {
    format!(
        r#"{{"seq":{seq},"time":"2026-11-23T10:00:00.000000Z","monotonic_us":5,"service":"redis","domains":{{"2":{DOMAIN}}},{event}}}"#
    ) + "\n"
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn without_dom0d_it_says_how_to_start_it() {
    let directory = Directory::new();
    let output = directory.run(&["status"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("systemctl start dom0d"));
    assert_eq!(stdout(&output), "");

    drop(UnixListener::bind(directory.0.join("control.sock")).unwrap());
    let output = directory.run(&["--json", "services"]);
    assert_eq!(output.status.code(), Some(3));
    let error: serde_json::Value = serde_json::from_str(&stderr(&output)).unwrap();
    assert_eq!(error["error"]["code"], "unreachable");
    assert!(error["error"]["message"].as_str().unwrap().contains("left behind"));
}

#[test]
fn without_permission_it_asks_for_root() {
    // Permissions don't stop root, so the command runs as another user, from where that one can reach it.
    let directory = Directory::new();
    let command = directory.0.join("understudy");
    std::fs::copy(env!("CARGO_BIN_EXE_understudy"), &command).unwrap();
    let socket = directory.0.join("control.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut as_nobody = Command::new("setpriv");
    as_nobody.args(["--reuid=65534", "--clear-groups", "--"]).arg(command);
    let output = as_nobody.arg("--socket").arg(socket).arg("status").output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("only root may"), "{}", stderr(&output));
}

#[test]
fn something_else_on_the_socket_is_no_dom0d() {
    let directory = Directory::new();
    let _requests = listen(&directory, |_| (200, "hello".to_owned()));
    let output = directory.run(&["status"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("something else listens there"));
}

#[test]
fn a_refusal_is_passed_on() {
    let directory = Directory::new();
    let _requests = listen(&directory, |_| {
        refusal(404, "unknown_service", "no service is named x\u{1b}[2J; the configuration has: redis")
    });
    let output = directory.run(&["switchover", "x"]);
    assert_eq!(output.status.code(), Some(3), "an escape is no valid JSON");

    let directory = Directory::new();
    let _requests = listen(&directory, |_| refusal(404, "unknown_service", "the configuration has: redis"));
    let output = directory.run(&["switchover", "x"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "understudy: the configuration has: redis\n");
    let output = directory.run(&["switchover", "x", "--json"]);
    assert_eq!(
        stderr(&output),
        r#"{"error":{"code":"unknown_service","message":"the configuration has: redis"}}"#.to_owned() + "\n"
    );
}

#[test]
fn the_only_service_need_not_be_named() {
    let directory = Directory::new();
    let requests = listen(&directory, |request| match request {
        "GET /v1/services" => services(&["web 1"]),
        _ => promoted(),
    });
    let output = directory.run(&["switchover", "--to", "redis-2"]);
    assert_eq!(stdout(&output), "web 1: redis-2 serves now (epoch 2)\n", "{}", stderr(&output));
    let asked: Vec<String> = requests.iter().take(2).collect();
    assert_eq!(asked[1], r#"POST /v1/services/web%201/switchover {"to":"redis-2"}"#);

    let output = directory.run(&["services"]);
    assert!(stdout(&output).starts_with("SERVICE  PSC"));
    let output = directory.run(&["--json", "failover", "redis", "--force"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["domain"]["name"], "redis-2");
}

#[test]
fn of_several_services_one_must_be_named() {
    let directory = Directory::new();
    let requests = listen(&directory, |_| services(&["redis", "web"]));
    let output = directory.run(&["pause", "redis-2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("name one of redis, web"));
    assert_eq!(requests.try_iter().count(), 1, "nothing was commanded");
}

#[test]
fn an_attach_needs_a_statement() {
    let directory = Directory::new();
    let output = directory.run(&["attach", "redis", "redis-2"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--assume-identical"));
}

#[test]
fn a_drain_is_waited_for() {
    for (end, code, said) in [
        (r#""event":"seeded","server":2"#, 0, "redis-2 is in the queue"),
        (
            r#""event":"drain_failed","server":2,"open":3,"reason":"conversations_open""#,
            1,
            "3 conversations were still open at its deadline. redis-2 is not promotable; try again with a longer --timeout",
        ),
        (
            r#""event":"drain_failed","server":2,"open":0,"reason":"ovm_changed""#,
            1,
            "whose state it may not equal. redis-2 is not promotable; bring its state in line with the present OVM's",
        ),
    ] {
        let directory = Directory::new();
        let requests = listen(&directory, move |request| match request.starts_with("GET /v1/events") {
            true => {
                let of_another = event(1, r#""event":"seeded","server":7"#);
                (200, of_another + &event(2, end))
            }
            false => (200, format!(r#"{{"domain":{DOMAIN},"server":2,"draining":true}}"#)),
        });
        let output = directory.run(&["attach", "redis", "redis-2", "--drain", "--timeout", "90s"]);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        let asked: Vec<String> = requests.iter().take(2).collect();
        assert_eq!(
            asked,
            [
                "GET /v1/events?follow=true&since=0s",
                r#"POST /v1/services/redis/attach {"domain":"redis-2","assume_identical":false,"drain":true,"drain_timeout_ms":90000}"#,
            ]
        );
        let text = stdout(&output) + &stderr(&output);
        assert!(text.contains(said), "{text}");
    }
}

#[test]
fn a_hook_s_notice_names_what_the_hook_knows() {
    let directory = Directory::new();
    let requests = listen(&directory, |_| (200, "{}".to_owned()));
    let output = directory.run(&["notify", "online", "--domid", "7", "--vif=-v $(x)"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stdout(&output), "dom0d looks for domains now\n");
    let told = r#"POST /v1/notify {"event":"online","vif":"-v $(x)","domid":7,"domain":null}"#;
    assert_eq!(requests.recv().unwrap(), told);

    let output = directory.run(&["--json", "notify", "offline", "--domid", "7", "--vif=", "--domain="]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "{}\n"), "{}", stderr(&output));
    let told = r#"POST /v1/notify {"event":"offline","vif":null,"domid":7,"domain":null}"#;
    assert_eq!(requests.recv().unwrap(), told);

    directory.run(&["notify", "offline", "--domain=a b"]);
    let told = r#"POST /v1/notify {"event":"offline","vif":null,"domid":null,"domain":"a b"}"#;
    assert_eq!(requests.recv().unwrap(), told);
}

#[test]
fn a_notice_waits_for_nobody() {
    let directory = Directory::new();
    let notify = || {
        let begin = Instant::now();
        let output = directory.run(&["notify", "online", "--domid", "7", "--vif="]);
        assert_eq!(output.status.code(), Some(3));
        assert_eq!((stdout(&output).as_str(), stderr(&output).lines().count()), ("", 1));
        (stderr(&output), begin.elapsed())
    };
    assert!(notify().0.contains("dom0d is not running"));

    // Connections are taken by the kernel, and nobody ever answers.
    let _listener = UnixListener::bind(directory.0.join("control.sock")).unwrap();
    let (error, took) = notify();
    assert!(error.contains("does not answer") && error.contains("waited 1 s"), "{error}");
    assert!((1..10).contains(&took.as_secs()), "{took:?}");
}

#[test]
fn conversations_are_asked_for_page_by_page() {
    let directory = Directory::new();
    let requests = listen(&directory, |request| {
        let count = match request.contains("skip=10&limit=1000") {
            true => 1_000,
            false => 7,
        };
        let row = r#"{"client":"10.77.0.1:1","psc":"10.77.0.100:6379","state":"established",
            "recuperating":false,"received_bytes":0,"sent_bytes":0,"unprotected":null,"legs":[]}"#;
        let rows = vec![row; count].join(",");
        let body = format!(r#"{{"service":"redis","total":1017,"skip":10,"conversations":[{rows}]}}"#);
        (200, body)
    });
    let output = directory.run(&["conversations", "redis", "--json", "--limit", "1500", "--skip", "10"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["conversations"].as_array().unwrap().len(), 1_007);
    let asked: Vec<String> = requests.iter().take(2).collect();
    assert!(asked[1].ends_with("?skip=1010&limit=500"), "{}", asked[1]);
}

#[test]
fn events_are_lines_and_a_closed_pipe_is_no_error() {
    let directory = Directory::new();
    let requests = listen(&directory, |_| {
        let lines = (0..5_000).map(|seq| event(seq, r#""event":"seeded","server":2"#));
        (200, lines.collect())
    });
    let output = directory.run(&["events", "--since", "2026-11-23T10:00:00Z"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stdout(&output).lines().next(),
        Some("2026-11-23T10:00:00.000000Z  redis: redis-2 is seeded: its state equals the OVM's")
    );
    assert_eq!(requests.recv().unwrap(), "GET /v1/events?follow=false&since=2026-11-23T10%3A00%3A00Z");

    let mut child = directory
        .command(&["events", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 8];
    let mut pipe = child.stdout.take().unwrap();
    pipe.read_exact(&mut first).unwrap();
    assert_eq!(&first, br#"{"seq":0"#);
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));

    // A follower whose daemon goes away did not get what it asked for.
    let output = directory.run(&["events", "--follow"]);
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn a_configuration_is_checked_without_dom0d() {
    let directory = Directory::new();
    let path = directory.0.join("dom0d.toml");
    let path = path.to_str().unwrap();
    let good = "[[service]]\nname = \"redis\"\npsc = \"10.77.0.100\"\nports = [6379]\nbridge = \"xenbr0\"\novm = \"redis-1\"\nrvms = [\"redis-2\"]\n";
    std::fs::write(path, good).unwrap();
    let output = directory.run(&["check-config", path]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("is valid: service redis"));
    let output = directory.run(&["check-config", path, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["services"][0], "redis");

    std::fs::write(path, format!("{good}colour = \"red\"\n")).unwrap();
    let output = directory.run(&["check-config", path]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("colour"), "{}", stderr(&output));

    let output = directory.run(&["check-config", "/nonexistent.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("can't read /nonexistent.toml"));
}
