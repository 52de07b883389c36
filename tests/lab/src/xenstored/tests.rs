//! xenstored against the real clients of `xenstore-utils`, and against clients that mean harm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::Xenstored;

static NEXT: AtomicU32 = AtomicU32::new(0);

struct Fixture {
    xenstored: Xenstored,
    socket: PathBuf,
}

impl Fixture {
    fn new() -> Fixture {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("lab-xenstored-{}-{number}.sock", std::process::id()));
        Fixture { xenstored: Xenstored::new(&socket).unwrap(), socket }
    }

    fn command(&self, client: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(client);
        command.args(arguments).env("XENSTORED_PATH", &self.socket);
        command
    }

    /// Runs a real client; what it printed, or what it complained.
    fn client(&self, client: &str, arguments: &[&str]) -> Result<String, String> {
        let output = self
            .command(client, arguments)
            .output()
            .unwrap_or_else(|error| panic!("{client}: {error}; install xenstore-utils"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn watch(&self, paths: &[&str]) -> Watcher {
        let mut child = self
            .command("xenstore-watch", paths)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("xenstore-watch: {error}; install xenstore-utils"));
        let lines = BufReader::new(child.stdout.take().unwrap());
        Watcher { child, lines }
    }

    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Raw { stream }
    }
}

struct Watcher {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Watcher {
    fn next(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that writes its messages by hand.
struct Raw {
    stream: UnixStream,
}

impl Raw {
    fn send(&mut self, kind: u32, transaction: u32, payload: &[u8]) {
        let mut bytes = Vec::new();
        for field in [kind, 7, transaction, u32::try_from(payload.len()).unwrap()] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> (u32, Vec<u8>) {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; field(12) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        (field(0), payload)
    }

    fn ask(&mut self, kind: u32, transaction: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        self.send(kind, transaction, payload);
        self.receive()
    }
}

const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const WATCH: u32 = 4;
const TRANSACTION_START: u32 = 6;
const TRANSACTION_END: u32 = 7;
const WRITE: u32 = 11;
const RM: u32 = 13;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;
const IS_DOMAIN_INTRODUCED: u32 = 17;
const DIRECTORY_PART: u32 = 22;

#[test]
fn the_real_clients_write_read_list_and_remove() {
    let lab = Fixture::new();
    lab.xenstored.write("/local/domain/1/name", "guest-1").unwrap();
    assert_eq!(lab.client("xenstore-read", &["/local/domain/1/name"]).unwrap(), "guest-1\n");

    lab.client("xenstore-write", &["/tool/understudy/a", "one", "/tool/understudy/b", "two"]).unwrap();
    assert_eq!(
        lab.client("xenstore-ls", &["-f", "/tool"]).unwrap(),
        "/tool/understudy = \"\"\n/tool/understudy/a = \"one\"\n/tool/understudy/b = \"two\"\n"
    );
    assert_eq!(lab.client("xenstore-list", &["/"]).unwrap(), "local\ntool\n");
    assert!(lab.client("xenstore-exists", &["/tool/understudy/a"]).is_ok());

    lab.client("xenstore-rm", &["/tool/understudy"]).unwrap();
    assert!(lab.client("xenstore-exists", &["/tool/understudy/a"]).is_err());
    let complaint = lab.client("xenstore-read", &["/tool/understudy/a"]).unwrap_err();
    assert!(complaint.contains("couldn't read"), "{complaint}");

    // A path that is not absolute is dom0's.
    lab.client("xenstore-write", &["device/x", "y"]).unwrap();
    assert_eq!(lab.client("xenstore-read", &["/local/domain/0/device/x"]).unwrap(), "y\n");
}

#[test]
fn the_real_clients_see_and_set_permissions() {
    let lab = Fixture::new();
    lab.xenstored.write("/a", "").unwrap();
    lab.client("xenstore-chmod", &["/a", "n0", "r3"]).unwrap();
    // Children inherit them.
    lab.client("xenstore-write", &["/a/b", "v"]).unwrap();
    let listing = lab.client("xenstore-ls", &["-p", "/"]).unwrap();
    assert!(listing.contains("b = \"v\"") && listing.contains("(n0,r3)"), "{listing}");
    assert!(lab.client("xenstore-chmod", &["/none", "n0"]).is_err());
}

#[test]
fn a_watch_fires_at_once_then_for_changes_below_and_for_removal_above() {
    let lab = Fixture::new();
    lab.xenstored.write("/local/domain/0/backend/vif/1/0/state", "1").unwrap();
    let mut above = lab.watch(&["/local/domain/0/backend"]);
    let mut on = lab.watch(&["/local/domain/0/backend/vif/1/0/state"]);
    assert_eq!(above.next(), "/local/domain/0/backend");
    assert_eq!(on.next(), "/local/domain/0/backend/vif/1/0/state");

    lab.client("xenstore-write", &["/local/domain/0/backend/vif/1/0/state", "4"]).unwrap();
    assert_eq!(above.next(), "/local/domain/0/backend/vif/1/0/state");
    assert_eq!(on.next(), "/local/domain/0/backend/vif/1/0/state");

    // Nothing but a change at or below the watched node fires.
    lab.client("xenstore-write", &["/local/domain/0/backendx", ""]).unwrap();
    lab.xenstored.remove("/local/domain/0/backend/vif/1").unwrap();
    assert_eq!(above.next(), "/local/domain/0/backend/vif/1");
    assert_eq!(on.next(), "/local/domain/0/backend/vif/1/0/state");
}

#[test]
fn special_watches_tell_of_domains() {
    let lab = Fixture::new();
    let mut introduced = lab.watch(&["@introduceDomain"]);
    let mut released = lab.watch(&["@releaseDomain"]);
    assert_eq!(introduced.next(), "@introduceDomain");
    assert_eq!(released.next(), "@releaseDomain");
    lab.xenstored.introduce(5);
    assert_eq!(introduced.next(), "@introduceDomain");
    let mut raw = lab.raw();
    assert_eq!(raw.ask(IS_DOMAIN_INTRODUCED, 0, b"5\0").1, b"T\0");
    lab.xenstored.announce_shutdown();
    assert_eq!(released.next(), "@releaseDomain");
    assert_eq!(raw.ask(IS_DOMAIN_INTRODUCED, 0, b"5\0").1, b"T\0");
    lab.xenstored.release(5);
    assert_eq!(released.next(), "@releaseDomain");
    assert_eq!(raw.ask(IS_DOMAIN_INTRODUCED, 0, b"5\0").1, b"F\0");
}

#[test]
fn a_relative_watch_is_told_relative_paths() {
    let lab = Fixture::new();
    let mut watcher = lab.watch(&["backend"]);
    assert_eq!(watcher.next(), "backend");
    lab.xenstored.write("/local/domain/0/backend/vif", "").unwrap();
    assert_eq!(watcher.next(), "backend/vif");
}

#[test]
fn a_directory_longer_than_a_message_is_listed_in_parts() {
    let lab = Fixture::new();
    for number in 0..600 {
        lab.xenstored.write(&format!("/many/child-{number:04}"), "").unwrap();
    }
    let mut raw = lab.raw();
    assert_eq!(raw.ask(DIRECTORY, 0, b"/many\0"), (ERROR, b"E2BIG\0".to_vec()));
    assert_eq!(lab.client("xenstore-list", &["/many"]).unwrap().lines().count(), 600);
    let (kind, end) = raw.ask(DIRECTORY_PART, 0, b"/many\0999999\0");
    assert_eq!(kind, DIRECTORY_PART);
    assert!(end.ends_with(b"\0\0"), "an empty name after the generation: {end:?}");
}

#[test]
fn a_transaction_is_seen_whole_or_tried_again() {
    let lab = Fixture::new();
    lab.xenstored.write("/a", "1").unwrap();
    let mut watcher = lab.watch(&["/a"]);
    watcher.next();
    let (mut one, mut two) = (lab.raw(), lab.raw());

    let (_, id) = one.ask(TRANSACTION_START, 0, b"\0");
    let id: u32 = std::str::from_utf8(&id[..id.len() - 1]).unwrap().parse().unwrap();
    assert_eq!(one.ask(WRITE, id, b"/a/b\0x").1, b"OK\0");
    assert_eq!(one.ask(READ, id, b"/a/b\0").1, b"x");
    assert_eq!(two.ask(READ, 0, b"/a/b\0"), (ERROR, b"ENOENT\0".to_vec()));
    assert_eq!(one.ask(TRANSACTION_END, id, b"T\0").1, b"OK\0");
    assert_eq!(two.ask(READ, 0, b"/a/b\0").1, b"x");
    assert_eq!(watcher.next(), "/a/b");

    let (_, id) = one.ask(TRANSACTION_START, 0, b"\0");
    let id: u32 = std::str::from_utf8(&id[..id.len() - 1]).unwrap().parse().unwrap();
    assert_eq!(one.ask(READ, id, b"/a\0").1, b"1");
    assert_eq!(two.ask(WRITE, 0, b"/a\x002").1, b"OK\0");
    assert_eq!(one.ask(WRITE, id, b"/c\0z").1, b"OK\0");
    assert_eq!(one.ask(TRANSACTION_END, id, b"T\0"), (ERROR, b"EAGAIN\0".to_vec()));
    assert_eq!(two.ask(READ, 0, b"/c\0"), (ERROR, b"ENOENT\0".to_vec()));

    // Given up: nothing happened. A transaction of another connection does not exist.
    let (_, id) = one.ask(TRANSACTION_START, 0, b"\0");
    let id: u32 = std::str::from_utf8(&id[..id.len() - 1]).unwrap().parse().unwrap();
    assert_eq!(one.ask(RM, id, b"/a\0").1, b"OK\0");
    assert_eq!(two.ask(READ, id, b"/a\0"), (ERROR, b"ENOENT\0".to_vec()));
    assert_eq!(one.ask(TRANSACTION_END, id, b"F\0").1, b"OK\0");
    assert_eq!(two.ask(READ, 0, b"/a\0").1, b"2");
}

#[test]
fn a_hostile_client_gets_errors_and_harms_nobody() {
    let lab = Fixture::new();
    let mut raw = lab.raw();
    let invalid = (ERROR, b"EINVAL\0".to_vec());
    for payload in [
        &b""[..],
        b"\0",
        b"/unterminated",
        b"/a//b\0",
        b"/a/\0",
        b"/a b\0",
        b"\xff\xfe\0",
        b"@introduceDomain\0",
    ] {
        assert_eq!(raw.ask(READ, 0, payload), invalid, "{payload:?}");
    }
    let mut long = vec![b'a'; 4000];
    long[0] = b'/';
    long.push(0);
    assert_eq!(raw.ask(READ, 0, &long), invalid);
    assert_eq!(raw.ask(RM, 0, b"/\0"), invalid);
    assert_eq!(raw.ask(WRITE, 0, b"no end"), invalid);
    assert_eq!(raw.ask(WATCH, 0, b"@other\0token\0"), invalid);
    assert_eq!(raw.ask(DIRECTORY_PART, 0, b"/\0-1\0"), invalid);
    assert_eq!(raw.ask(READ, 99, b"/\0"), (ERROR, b"ENOENT\0".to_vec()));
    for kind in [0, 15, 16, 20, 23, 0xffff, u32::MAX] {
        assert_eq!(raw.ask(kind, 0, b"/\0"), (ERROR, b"ENOSYS\0".to_vec()), "{kind}");
    }
    for _ in 0..16 {
        assert_eq!(raw.ask(TRANSACTION_START, 0, b"\0").0, TRANSACTION_START);
    }
    assert_eq!(raw.ask(TRANSACTION_START, 0, b"\0"), (ERROR, b"ENOSPC\0".to_vec()));

    // A payload longer than the protocol allows ends the connection, nothing else.
    let mut flood = lab.raw();
    let header: Vec<u8> = [READ, 0, 0, u32::MAX].iter().flat_map(|field| field.to_ne_bytes()).collect();
    flood.stream.write_all(&header).unwrap();
    assert_eq!(flood.stream.read(&mut [0; 16]).unwrap(), 0);
    assert_eq!(raw.ask(READ, 0, b"/\0"), (READ, Vec::new()));
}

#[test]
fn a_watcher_that_never_reads_is_dropped_and_its_memory_with_it() {
    let lab = Fixture::new();
    let mut deaf = lab.raw();
    assert_eq!(deaf.ask(WATCH, 0, b"/\0token\0").0, WATCH);
    assert_eq!(deaf.receive().0, WATCH_EVENT);
    let path = format!("/{}", "x".repeat(2000));
    for _ in 0..4000 {
        lab.xenstored.write(&path, "").unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while lab.xenstored.connected() > 0 {
        assert!(Instant::now() < deadline, "the deaf watcher is still connected");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_restart_closes_connections_and_keeps_contents() {
    let mut lab = Fixture::new();
    lab.xenstored.write("/a", "1").unwrap();
    let mut raw = lab.raw();
    assert_eq!(raw.ask(READ, 0, b"/a\0").1, b"1");
    lab.xenstored.stop();
    assert_eq!(raw.stream.read(&mut [0; 16]).unwrap(), 0);
    assert!(UnixStream::connect(&lab.socket).is_err());
    lab.xenstored.start().unwrap();
    assert_eq!(lab.client("xenstore-read", &["/a"]).unwrap(), "1\n");
}
