//! Which configurations are taken, and what an operator is told about those that are not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use understudy_protocol::{CandidatePolicy, LagPolicy, Limits, Timing};

use super::*;

const SMALLEST: &str = r#"
[[service]]
name = "redis"
psc = "10.77.0.100"
ports = [6379]
ovm = "redis-1"
"#;

fn load(text: &str) -> Config {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> String {
    text.parse::<Config>().err().unwrap_or_else(|| panic!("was taken: {text}")).to_string()
}

/// The smallest configuration with more keys in its service.
fn with(keys: &str) -> String {
    format!("{SMALLEST}{keys}\n")
}

#[test]
fn the_smallest_configuration_has_the_documented_defaults() {
    let config = load(SMALLEST);
    assert_eq!(config.control_socket, Path::new(DEFAULT_CONTROL_SOCKET));
    assert_eq!(config.liveness_poll, Duration::from_millis(1));
    let service = &config.services[0];
    assert_eq!(service.engine.name, "redis");
    assert_eq!(service.engine.limits, Limits::default());
    assert_eq!(service.engine.timing, Timing::default());
    assert_eq!(service.psc_mac, [0x0a, 0x75, 10, 77, 0, 100]);
    assert_eq!(service.fence, Fence::Pause);
    assert_eq!(service.attach, AttachAs::Known);
    assert_eq!(service.pause_grace, Duration::ZERO);
    assert_eq!(service.on_shutdown_request, OnShutdownRequest::None);
}

/// The example says what the defaults are; this keeps it true.
#[test]
fn the_example_shows_the_defaults() {
    let example = include_str!("../../../dom0d.example.toml");
    let plain = load(example);
    let uncommented: String = example
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(key) if key.starts_with('[') || key.contains(" = ") => format!("{key}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let full = load(&uncommented);
    assert_eq!(full.control_socket, plain.control_socket);
    assert_eq!(full.liveness_poll, plain.liveness_poll);
    assert_eq!(full.capture_buffer, plain.capture_buffer);
    let (full, plain) = (&full.services[0], &plain.services[0]);
    assert_eq!(full.engine.limits, plain.engine.limits);
    assert_eq!(full.engine.timing, plain.engine.timing);
    assert_eq!(full.engine.candidate, plain.engine.candidate);
    assert_eq!(full.engine.on_lag, plain.engine.on_lag);
    assert_eq!(full.fence, plain.fence);
    assert_eq!((full.plane, full.daemon_grace), (plain.plane, plain.daemon_grace));
    assert_eq!(full.on_daemon_loss, plain.on_daemon_loss);
    assert_eq!(full.attach, plain.attach);
    assert_eq!(full.pause_grace, plain.pause_grace);
    assert_eq!(full.maintenance_limit, plain.maintenance_limit);
    assert_eq!(full.on_shutdown_request, plain.on_shutdown_request);
    assert_eq!(full.own_connections, plain.own_connections);
    assert_eq!((full.engine.masks.len(), full.allow.len(), full.addresses.len()), (3, 2, 1));
}

#[test]
fn every_key_is_read() {
    let config = load(
        r#"
control_socket = "/tmp/c.sock"
liveness_poll_ms = 2
capture_buffer_mib = 8

[[service]]
name = "web"
psc = ["10.77.0.101", "fd77::101"]
ports = [80, 8080]
bridge = "xenbr0"
vlan = 5
ovm = "web-1"
rvms = ["web-?", "2f8b5f0e-3c53-4d0a-9d8e-1f2f3a4b5c6d"]
psc_mac = "02:00:00:00:00:01"
plane = "bpf"
daemon_grace_ms = 700
on_daemon_loss = "protect"
fence = "destroy"
candidate = "queue"
on_lag = "wait"
masks = ["http-date", "postgresql-backend-key", { prefix = "id=", length = 8 }, { prefix = [255, 0], length = 2 }]
attach = "assume-identical"
pause_grace_ms = 5
maintenance_limit_ms = 1000
on_shutdown_request = "switchover"
allow = ["dhcp", "udp/123", "tcp/53"]
own_connections = "tolerate"
addresses = { "web-1" = ["10.77.0.11", "fd77::11"], "web-2" = "10.77.0.12" }

[service.limits]
conversations = 10

[service.timing]
unacked_limit_ms = 300
"#,
    );
    assert_eq!(config.capture_buffer, 8 << 20);
    let service = &config.services[0];
    assert_eq!(service.engine.psc.len(), 2);
    assert_eq!((service.plane, service.daemon_grace), (Plane::Bpf, Duration::from_millis(700)));
    assert_eq!(service.on_daemon_loss, OnDaemonLoss::Protect);
    assert_eq!(service.vlan, Some(5));
    assert_eq!(service.engine.candidate, CandidatePolicy::Queue);
    assert_eq!(service.engine.on_lag, LagPolicy::Wait);
    assert_eq!(service.engine.limits.conversations, 10);
    assert_eq!(service.engine.limits.embryonic, Limits::default().embryonic);
    assert_eq!(service.engine.timing.unacked_limit, Duration::from_millis(300));
    assert_eq!(service.engine.masks[2].prefix, b"id=");
    assert_eq!(service.engine.masks[3].prefix, [255, 0]);
    assert_eq!(service.allow, [Allowed::Dhcp, Allowed::Udp(123), Allowed::Tcp(53)]);
    assert_eq!(service.own_connections, OwnConnections::Tolerate);
    assert!(matches!(service.rvms[1], Selector::Uuid(_)));
    assert_eq!(service.addresses[1].1, ["10.77.0.12".parse::<IpAddr>().unwrap()]);
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    for (text, key) in [
        (with("prots = [1]"), "prots"),
        (format!("socket = 1\n{SMALLEST}"), "socket"),
        (with("[service.limits]\nconversation = 1"), "conversation"),
        (with("[service.timing]\nunacked_limit = 1"), "unacked_limit"),
    ] {
        let error = refused(&text);
        assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
        assert!(error.contains("line "), "{error}");
    }
}

#[test]
fn a_missing_key_is_named() {
    for key in ["name", "psc", "ports", "ovm"] {
        let text: String =
            SMALLEST.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect();
        let error = refused(&text);
        assert!(error.contains(&format!("missing field `{key}`")), "{error}");
    }
}

#[test]
fn two_services_on_one_psc_are_refused() {
    let other = SMALLEST.replace("\"redis\"", "\"other\"");
    let error = refused(&format!("{SMALLEST}{other}"));
    assert!(error.contains("service other: psc: 10.77.0.100 is the PSC of service redis too"), "{error}");
}

#[test]
fn two_services_of_one_name_are_refused() {
    let other = SMALLEST.replace("0.100", "0.101");
    let error = refused(&format!("{SMALLEST}{other}"));
    assert!(error.contains("service redis: name: two services"), "{error}");
}

#[test]
fn a_psc_that_is_a_guests_address_is_refused() {
    let error = refused(&with("addresses = { \"redis-1\" = \"10.77.0.100\" }"));
    assert!(error.contains("is the service's PSC"), "{error}");
    let other = SMALLEST.replace("\"redis\"", "\"other\"").replace("0.100", "0.101");
    let error = refused(&format!("{SMALLEST}{other}addresses = {{ \"redis-9\" = \"10.77.0.100\" }}\n"));
    assert!(error.contains("10.77.0.100 of redis-9 is the PSC of service redis"), "{error}");
}

#[test]
fn every_contradiction_is_told_at_once_with_service_and_key() {
    let text = SMALLEST.replace("10.77.0.100", "10.77.0.300").replace("[6379]", "[]");
    let error = refused(&text);
    assert!(error.contains("service redis: psc: \"10.77.0.300\" is no IP address"), "{error}");
    assert!(error.contains("service redis: ports: is empty"), "{error}");
}

#[test]
fn what_can_not_work_is_refused() {
    for (keys, expected) in [
        ("rvms = [\"redis-1\"]", "rvms: redis-1 is the service's `ovm` too"),
        ("rvms = [\"a\", \"a\"]", "rvms: a is named twice"),
        ("rvms = [\"\"]", "rvms: is empty"),
        (
            "rvms = [\"a\", \"b\", \"c\", \"d\", \"e\", \"f\", \"g\", \"h\", \"spare-*\"]",
            "rvms: names 8 domains; a service has at most 7 replicas",
        ),
        ("psc_mac = \"01:00:00:00:00:01\"", "psc_mac: "),
        ("psc_mac = \"02:00:00:00:01\"", "psc_mac: "),
        ("bridge = \"a-very-long-bridge-name\"", "bridge: "),
        ("vlan = 0", "vlan: is 0"),
        ("vlan = 4095", "vlan: is 4095"),
        ("allow = [\"everything\"]", "allow: "),
        ("allow = [\"udp/0\"]", "allow: "),
        ("masks = [{ prefix = \"\", length = 1 }]", "masks: "),
        ("masks = [{ prefix = \"a\", length = 300 }]", "masks: "),
        ("masks = [\"date\"]", "http-date"),
        ("plane = \"xdp\"", "unknown variant `xdp`"),
        ("on_daemon_loss = \"panic\"", "unknown variant `panic`"),
        ("daemon_grace_ms = 0", "daemon_grace_ms: "),
        ("fence = \"shoot\"", "unknown variant `shoot`"),
        ("pause_grace_ms = 86400001", "pause_grace_ms: "),
        ("[service.limits]\nconversations = 0", "limits: conversations is 0"),
        ("[service.timing]\nunacked_limit_ms = 0", "timing.unacked_limit_ms: "),
        ("addresses = { \"a\" = [\"10.0.0.1\", \"10.0.0.2\"] }", "two IPv4 addresses"),
        ("addresses = { \"a\" = \"10.0.0.1\", \"b\" = \"10.0.0.1\" }", "is given to a and to b"),
        ("addresses = { \"a*\" = \"10.0.0.1\" }", "is a pattern"),
        ("addresses = { \"redis-2\" = \"10.0.0.1\" }", "redis-2 is neither `ovm` nor among the `rvms`"),
    ] {
        let error = refused(&with(keys));
        assert!(error.contains(expected), "{keys}: {error}");
    }
    for (from, to, expected) in [
        ("\"10.77.0.100\"", "\"127.0.0.1\"", "psc: 127.0.0.1 is not the address of a host"),
        ("\"10.77.0.100\"", "\"10.77.0.100/24\"", "is no IP address"),
        ("\"10.77.0.100\"", "[]", "psc: names no address"),
        ("\"10.77.0.100\"", "[\"10.0.0.1\", \"10.0.0.2\"]", "psc: has two IPv4"),
        ("[6379]", "[0]", "ports: 0 is no TCP port"),
        ("[6379]", "[1, 1]", "ports: names a port twice"),
        ("\"redis\"", "\"my redis\"", "service #1: name: "),
    ] {
        let error = refused(&SMALLEST.replace(from, to));
        assert!(error.contains(expected), "{to}: {error}");
    }
    assert!(refused("").contains("service: there is none"));
    assert!(refused("[[service]").contains("line 1"));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nonexistent/dom0d.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/dom0d.toml"), "{error}");
}

#[test]
fn patterns_match_as_a_shell_would() {
    let uuid = Uuid::nil();
    for (pattern, name, expected) in [
        ("redis-1", "redis-1", true),
        ("redis-1", "redis-10", false),
        ("redis-?", "redis-1", true),
        ("redis-?", "redis-", false),
        ("redis-*", "redis-", true),
        ("*-1", "a-1-1", true),
        ("*-1", "a-1-2", false),
        ("a*b*c", "axxbyyc", true),
        ("a*b*c", "axxcyyb", false),
        ("*", "", true),
        ("?", "", false),
    ] {
        assert_eq!(Selector::new(pattern).matches(name, uuid), expected, "{pattern} {name}");
    }
}

#[test]
fn a_uuid_is_no_name() {
    let text = "2f8b5f0e-3c53-4d0a-9d8e-1f2f3a4b5c6d";
    let uuid = Uuid::try_parse(text).unwrap();
    assert!(Selector::new(text).matches("whatever", uuid));
    assert!(!Selector::new(text).matches(text, Uuid::nil()));
}
