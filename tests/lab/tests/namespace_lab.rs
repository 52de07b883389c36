//! The namespace lab against itself, by the verbs that a person uses: are its faults what they claim
//! to be, and does nothing of it stay behind? Needs root, and installs what it lacks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Labs are built one after the other: they share two CPUs and apt.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A lab of this name, taken down when dropped.
struct Lab {
    name: &'static str,
}

impl Lab {
    fn up(name: &'static str, replicas: &str, services: &str) -> Lab {
        let lab = Lab { name };
        lab.ok(&["up", "--no-dom0d", "--replicas", replicas, "--services", services]);
        lab
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
        command.args(words).env("LAB_NAME", self.name).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What it printed; panics with what it complained of.
    fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// What it complained of; panics if it did not.
    fn refused(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(!output.status.success(), "{words:?} was done: {}", text(&output.stdout));
        text(&output.stderr)
    }

    fn client(&self, words: &[&str]) -> Output {
        self.run(&[&["exec", "client", "--"], words].concat())
    }

    fn ping(&self, address: &str) -> bool {
        let words = ["timeout", "1", "redis-cli", "-h", address, "PING"];
        text(&self.client(&words).stdout).trim() == "PONG"
    }

    fn domain(&self, name: &str) -> Option<Value> {
        let status: Value = serde_json::from_str(&self.ok(&["status", "--json"])).unwrap();
        status["domains"].as_array().unwrap().iter().find(|domain| domain["name"] == name).cloned()
    }

    fn directory(&self) -> PathBuf {
        Path::new("/run/understudy-lab").join(self.name)
    }

    /// The entry of `domains.json`.
    fn info(&self, domid: &Value) -> Option<Value> {
        let text = fs::read_to_string(self.directory().join("domains.json")).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        all["domains"].as_array().unwrap().iter().find(|domain| &domain["domid"] == domid).cloned()
    }

    /// Asks the hypervisor as dom0d does.
    fn ask(&self, request: &Value) -> Value {
        let mut stream = UnixStream::connect(self.directory().join("hypervisor.sock")).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// What of it is there, of namespaces, control groups and mounts.
    fn remains(&self) -> Vec<String> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let netns = entry.file_name().to_string_lossy().into_owned();
            all.extend(netns.starts_with(&format!("{}-", self.name)).then_some(netns));
        }
        let group = format!("understudy-lab-{}", self.name);
        for hierarchy in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let group = Path::new(hierarchy).join(&group);
            all.extend(group.exists().then(|| group.display().to_string()));
        }
        all.extend(self.directory().exists().then(|| self.directory().display().to_string()));
        all
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let output = self.run(&["down"]);
        if !std::thread::panicking() {
            assert!(output.status.success(), "{}", text(&output.stderr));
            assert_eq!(self.remains(), Vec::<String>::new());
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn alone() -> impl Drop {
    ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_frozen_domain_is_silent_on_a_link_that_stays_up_and_runs_on_when_thawed() {
    let _alone = alone();
    let lab = Lab::up("tfr", "0", "redis");
    let domid = lab.domain("guest-1").unwrap()["domid"].clone();
    assert!(lab.ping("10.77.0.11") && lab.ping("fd77::11"));

    for (fault, paused) in [("freeze", true), ("spin", false)] {
        lab.ok(&["fault", fault, "guest-1"]);
        assert_eq!(lab.info(&domid).unwrap()["paused"], paused, "{fault}");
        // Not even its kernel answers: no handshake, no ARP.
        lab.client(&["ip", "neigh", "flush", "dev", "eth0"]);
        assert!(!lab.ping("10.77.0.11") && !lab.ping("fd77::11"), "{fault}");
        let vif = lab.ok(&["exec", "dom0", "--", "ip", "-br", "link", "show", "vif1.0"]);
        assert!(vif.contains("LOWER_UP"), "{vif}");
        assert!(lab.refused(&["exec", "guest-1", "--", "true"]).contains("thaw"));
        lab.ok(&["thaw", "guest-1"]);
        // The client's kernel may have to give up its questions for the MAC first.
        until("it answers", || lab.ping("10.77.0.11") && lab.ping("fd77::11"));
        assert_eq!(lab.info(&domid).unwrap()["paused"], false);
    }

    // Pauses count, as Xen counts them; a thaw undoes all.
    for _ in 0..2 {
        assert_eq!(lab.ask(&json!({"op": "pause", "domid": domid}))["ok"], true);
    }
    assert_eq!(lab.ask(&json!({"op": "unpause", "domid": domid}))["ok"], true);
    assert_eq!(lab.info(&domid).unwrap()["paused"], true);
    assert_eq!(lab.ask(&json!({"op": "unpause", "domid": domid}))["ok"], true);
    assert!(lab.ping("10.77.0.11"));
    let refusal = lab.ask(&json!({"op": "unpause", "domid": domid}));
    assert_eq!(refusal["ok"], false);
    assert!(refusal["error"].as_str().unwrap().contains("not paused"), "{refusal}");
    assert_eq!(lab.ask(&json!({"op": "levitate"}))["ok"], false);
}

#[test]
fn a_hung_service_has_a_kernel_and_a_killed_one_has_no_port() {
    let _alone = alone();
    let lab = Lab::up("thk", "0", "redis,http");
    lab.ok(&["fault", "hang", "guest-1", "--service", "redis"]);
    let connect = "exec 3<>/dev/tcp/10.77.0.11/6379 && echo connected";
    assert_eq!(text(&lab.client(&["bash", "-c", connect]).stdout), "connected\n");
    assert!(!lab.ping("10.77.0.11"));
    lab.ok(&["thaw", "guest-1"]);
    assert!(lab.ping("10.77.0.11"));

    lab.ok(&["fault", "kill", "guest-1", "--service", "redis"]);
    until("redis' port is closed", || !lab.client(&["bash", "-c", connect]).status.success());
    let connect = "exec 3<>/dev/tcp/10.77.0.11/80 && echo connected";
    assert_eq!(text(&lab.client(&["bash", "-c", connect]).stdout), "connected\n");
    assert!(lab.refused(&["fault", "kill", "guest-1", "--service", "redis"]).contains("not run"));
    assert!(lab.refused(&["fault", "crash", "guest-1", "--service", "http"]).contains("hang"));
}

#[test]
fn domains_come_and_go_as_toolstack_and_xenstore_tell() {
    let _alone = alone();
    let lab = Lab::up("tlf", "1", "redis");
    let read = |path: &str| {
        let words = ["exec", "dom0", "--", "xenstore-read", path];
        lab.run(&words).status.success().then(|| lab.ok(&words).trim().to_owned())
    };
    let first = lab.domain("guest-2").unwrap();
    assert_eq!(read("/local/domain/2/name").unwrap(), "guest-2");
    let vm = format!("/vm/{}", first["uuid"].as_str().unwrap());
    assert_eq!(read("/local/domain/2/vm").unwrap(), vm);
    let backend = "/local/domain/0/backend/vif/2/0";
    assert_eq!(read(&format!("{backend}/ip")).unwrap(), "10.77.0.12 fd77::12");
    assert_eq!(read(&format!("{backend}/state")).unwrap(), "4");
    assert_eq!(read(&format!("{backend}/hotplug-status")).unwrap(), "connected");

    let back = || lab.domain("guest-2").is_some_and(|domain| domain["domid"] != first["domid"]);
    lab.ok(&["fault", "reboot", "guest-2"]);
    until("the domain is back", || back() && lab.ping("10.77.0.12"));
    let second = lab.domain("guest-2").unwrap();
    assert_eq!(second["uuid"], first["uuid"]);
    assert_eq!(read(backend), None);
    assert_eq!(read("/local/domain/2/name"), None);

    lab.ok(&["fault", "crash", "guest-2"]);
    assert_eq!(lab.info(&second["domid"]).unwrap()["shutdown"], "crash");
    until("xl has destroyed it", || lab.info(&second["domid"]).is_none());
    lab.ok(&["create", "guest-2"]);
    let third = lab.domain("guest-2").unwrap();
    assert_ne!(third["uuid"], first["uuid"]);
    assert!(third["domid"].as_u64() > second["domid"].as_u64());

    lab.ok(&["fault", "poweroff", "guest-2"]);
    until("it is off", || lab.domain("guest-2").is_none());
    assert_eq!(lab.ask(&json!({"op": "destroy", "domid": 1}))["ok"], true);
    assert!(lab.domain("guest-1").is_none());
    let links = lab.ok(&["exec", "dom0", "--", "ip", "-br", "link"]);
    assert!(!links.contains("vif"), "{links}");
    assert!(lab.refused(&["fault", "freeze", "guest-1"]).contains("no domain \"guest-1\""));
    assert!(lab.refused(&["create", "guest-9"]).contains("guest-2"));
}

#[test]
fn an_impaired_link_delays_loses_and_reorders_and_is_restored() {
    let _alone = alone();
    let lab = Lab::up("tli", "0", "redis,http");
    let fetch = "curl -sS --max-time 60 http://10.77.0.11/large.bin | sha256sum";
    let whole = lab.ok(&["exec", "client", "--", "sh", "-c", fetch]);
    let rtt_ms = || {
        let script = "s=$(date +%s%N); i=0; while [ $i -lt 5 ]; do redis-cli -h fd77::11 PING \
                      > /dev/null; i=$((i+1)); done; echo $(( ($(date +%s%N) - s) / 5000000 ))";
        lab.ok(&["exec", "client", "--", "sh", "-c", script]).trim().parse::<u64>().unwrap()
    };
    lab.ok(&["link", "client", "--delay", "20"]);
    // A connection and a question: two round trips of 40 ms.
    let slow = rtt_ms();
    assert!((80..200).contains(&slow), "{slow} ms");
    lab.ok(&["link", "client", "--loss", "1", "--duplicate", "1", "--reorder", "1"]);
    lab.ok(&["link", "guest-1", "--rate", "2000"]);
    assert_eq!(lab.ok(&["exec", "client", "--", "sh", "-c", fetch]), whole);
    let nstat = ["exec", "client", "--", "nstat", "-asz", "TcpExtTCPDSACKOldSent"];
    let dsacks = lab.ok(&nstat);
    let count = dsacks.lines().last().unwrap().split_whitespace().nth(1).unwrap();
    assert_ne!(count, "0", "no duplicate arrived: {dsacks}");

    lab.ok(&["link", "client", "--loss", "100"]);
    assert!(!lab.ping("10.77.0.11"));
    lab.ok(&["link", "client"]);
    lab.ok(&["link", "guest-1"]);
    let quick = rtt_ms();
    assert!(quick < 40, "{quick} ms");
    for host in ["client", "guest-1"] {
        let links = lab.ok(&["exec", host, "--", "ls", "/sys/class/net"]);
        assert_eq!(links.split_whitespace().collect::<Vec<_>>(), ["eth0", "lo"], "{host}");
        let rules = lab.ok(&["exec", host, "--", "nft", "list", "ruleset"]);
        assert!(!rules.contains("fwd"), "{rules}");
    }
    assert!(lab.refused(&["link", "client", "--loss", "101"]).contains("between 0 and 100"));
    assert!(lab.refused(&["link", "dom0", "--loss", "1"]).contains("no link of its own"));
}

#[test]
fn the_state_of_every_service_is_copied() {
    let _alone = alone();
    let lab = Lab::up("tcp", "1", "redis,http,postgresql");
    let shell = |script: &str| lab.ok(&["exec", "client", "--", "sh", "-c", script]);
    shell("redis-cli -h 10.77.0.11 SET key value");
    shell("redis-cli -h 10.77.0.12 SET stale value");
    shell("echo body | curl -sS --fail -T - http://10.77.0.11/upload/file");
    shell("psql -h 10.77.0.11 -U postgres -c 'CREATE TABLE t AS SELECT generate_series(1, 1000)'");
    lab.ok(&["copy-state", "guest-1", "guest-2"]);
    assert_eq!(shell("redis-cli -h 10.77.0.12 KEYS '*'"), "key\n");
    assert_eq!(shell("curl -sS --fail http://10.77.0.12/upload/file"), "body\n");
    let count = shell("psql -h 10.77.0.12 -U postgres -Atc 'SELECT count(*) FROM t'");
    assert_eq!(count, "1000\n");
}

#[test]
fn nothing_stays_behind_whatever_ends_a_lab() {
    let _alone = alone();
    // Its hypervisor dies: what is left is known as stale, and the next `up` removes it.
    let lab = Lab::up("tbh", "0", "redis");
    assert!(lab.refused(&["up", "--no-dom0d"]).contains("is up already"));
    assert!(lab.ping("10.77.0.11"));
    let group = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(|hierarchy| Path::new(hierarchy).join("understudy-lab-tbh/hypervisor/cgroup.kill"));
    fs::write(group.iter().find(|file| file.exists()).unwrap(), "1").unwrap();
    until("the hypervisor is gone", || !lab.run(&["status"]).status.success());
    lab.ok(&["up", "--no-dom0d", "--replicas", "0", "--services", "redis"]);
    assert!(lab.ping("10.77.0.11"));
    lab.ok(&["down"]);
    assert_eq!(lab.remains(), Vec::<String>::new());
    lab.ok(&["down"]);
    assert!(lab.refused(&["status"]).contains("no lab \"tbh\" is up"));

    // Ctrl-C while it is being built.
    let mut up = lab
        .command(&["up", "--no-dom0d", "--replicas", "1", "--services", "redis,postgresql"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("something is built", || !lab.remains().is_empty());
    std::thread::sleep(Duration::from_millis(300));
    let interrupted = Command::new("kill").args(["-INT", &up.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let mut said = String::new();
    up.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(up.wait().unwrap().code(), Some(130), "{said}");
    assert!(said.contains("interrupted"), "{said}");
    assert_eq!(lab.remains(), Vec::<String>::new());
}

#[test]
fn a_lab_that_cannot_be_is_refused_with_the_reason() {
    let lab = Lab { name: "tno" };
    assert!(lab.refused(&["up", "--replicas", "4", "--no-dom0d"]).contains("at most 3"));
    let mut named = lab.command(&["status"]);
    let output = named.env("LAB_NAME", "much-too-long").output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("1 to 4 letters"));
    let missing = ["up", "--config", "/nonexistent.toml", "--replicas", "0"];
    assert!(lab.refused(&missing).contains("/nonexistent.toml"));
}
