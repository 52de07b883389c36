//! An operator's mistake is refused with a message that says what is wrong, on which service or domain,
//! and what to do. Nothing is lost by it.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::client::redis::load::Plan;
use crate::host::{Fault, Lab, LabConfig, Service, Vlan};
use crate::stage::Stage;
use crate::stage::operator::{explains, program};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("refusals/orders", orders),
        Scenario::new("refusals/nothing-left", nothing_left),
        Scenario::new("refusals/configuration", configuration),
        Scenario::new("refusals/address-in-use", |lab| address_in_use(lab, None)),
        Scenario::new("refusals/address-in-use/vlan", |lab| {
            address_in_use(lab, Some(Vlan { id: 5, filtered: false }))
        }),
        Scenario::new("refusals/unknown-domain", unknown_domain),
        Scenario::new("refusals/no-bridge", no_bridge),
        Scenario::new("refusals/no-root", no_root),
        Scenario::new("refusals/missing-tool", missing_tool),
    ]
}

/// Impossible attaches and unknown names, under load.
fn orders(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = Plan::new(stage.psc(Service::Redis)?, "refused").start(&stage.client())?;
    let operator = &stage.operator;
    operator.refused(&["attach", "nosuch", "guest-2", "--assume-identical"], &["nosuch"])?;
    operator.refused(&["attach", "redis", "guest-9", "--assume-identical"], &["guest-9"])?;
    operator.refused(&["attach", "redis", "guest-1", "--assume-identical"], &["guest-1", "OVM"])?;
    operator.refused(&["attach", "redis", "guest-2", "--assume-identical"], &["guest-2"])?;
    operator.refused(&["attach", "redis", "guest-2"], &["--assume-identical", "--drain"])?;
    operator.refused(&["detach", "redis", "guest-1"], &["guest-1", "OVM"])?;
    operator.refused(&["detach", "redis", "guest-9"], &["guest-9"])?;
    operator.refused(&["switchover", "redis", "--to", "guest-9"], &["guest-9"])?;
    operator.refused(&["failover", "redis", "--to", "guest-1"], &["guest-1"])?;
    // A domain that is down.
    stage.lab.fault(Fault::Destroy, "guest-3")?;
    stage.events.wait("evicted", "redis", 0, Duration::from_secs(5))?;
    operator.refused(&["attach", "redis", "guest-3", "--assume-identical"], &["guest-3"])?;
    load.wait_answers(500, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)
}

/// The last server is neither detached nor failed over from.
fn nothing_left(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = Plan::new(stage.psc(Service::Redis)?, "last").start(&stage.client())?;
    stage.operator.order(&["detach", "redis", "guest-2"])?;
    stage.operator.refused(&["detach", "redis", "guest-1"], &["guest-1"])?;
    stage.operator.refused(&["failover", "redis"], &["redis"])?;
    stage.operator.refused(&["switchover", "redis"], &["redis"])?;
    load.wait_answers(500, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    ensure!(outcome.troubles() == 0, "clients noticed: {:#?}", outcome.errors);
    Ok(())
}

/// `check-config` and dom0d both refuse an invalid file, and name the key and the line.
fn configuration(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis, Service::Http]), &|line| {
        println!("  {line}");
    })?;
    let good = lab.default_config();
    let cases: [(&str, String, &[&str]); 7] = [
        ("an unknown key", good.replacen("ports =", "prots =", 1), &["prots", "line"]),
        ("a value of the wrong type", good.replacen("ports = [6379]", "ports = \"6379\"", 1), &["ports"]),
        ("two services on one PSC", good.replacen("10.77.0.101", "10.77.0.100", 1), &["10.77.0.100"]),
        ("two services of one name", good.replacen("name = \"http\"", "name = \"redis\"", 1), &["redis"]),
        (
            "an OVM that is its own replica",
            good.replacen("rvms = [\"guest-2\"]", "rvms = [\"guest-1\"]", 1),
            &["guest-1"],
        ),
        ("no services", String::new(), &["service"]),
        ("not TOML", "[[service]\nname = ".to_owned(), &["line"]),
    ];
    for (what, text, saying) in cases {
        let path = lab.directory().join("wrong.toml");
        fs::write(&path, &text)?;
        let output = Command::new(program("understudy")?).arg("check-config").arg(&path).output()?;
        ensure!(!output.status.success(), "check-config took {what}");
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        explains(&format!("check-config on {what}"), &said, saying)?;
        let error = lab.start_dom0d(&text).err().with_context(|| format!("dom0d started with {what}"))?;
        explains(&format!("dom0d on {what}"), &format!("{error:#}"), saying)?;
        println!("  {what}: {}", said.trim().lines().next().unwrap_or_default());
    }
    Ok(())
}

/// The PSC is an address that somebody on the network has, or that a guest of the service has.
fn address_in_use(lab: &str, vlan: Option<Vlan>) -> Result<()> {
    let plan = LabConfig { vlan, ..Stage::plan(lab, 1, &[Service::Redis]) };
    let lab = Lab::up(plan, &|line| println!("  {line}"))?;
    for (whose, address) in [("the client's", "10.77.0.1"), ("a guest's", "10.77.0.12")] {
        let config = lab.default_config().replacen("10.77.0.100", address, 1);
        match lab.start_dom0d(&config) {
            Err(error) => {
                explains(&format!("dom0d with {whose} address as PSC"), &format!("{error:#}"), &[address])?
            }
            Ok(dom0d) => {
                // It may start and refuse the service only: other services must not suffer.
                let operator = crate::stage::operator::Operator::new(dom0d.control_socket())?;
                let deadline = std::time::Instant::now() + Duration::from_secs(10);
                loop {
                    let service = operator.service("redis")?;
                    let said = service.problems.join("; ");
                    if !service.serving && said.contains(address) {
                        println!("  {said}");
                        break;
                    }
                    ensure!(
                        std::time::Instant::now() < deadline,
                        "dom0d took {whose} address as PSC: serving {}, problems {said:?}",
                        service.serving
                    );
                    std::thread::sleep(Duration::from_millis(50));
                }
                dom0d.stop()?;
            }
        }
    }
    // Whoever had the address still has it.
    lab.dom0().run(&["ip", "link", "show", "xenbr0"])?;
    lab.client().run(&["redis-cli", "-h", "10.77.0.11", "PING"])?;
    Ok(())
}

/// An OVM that does not exist yet: dom0d waits for it, says so, and serves once it appears.
fn unknown_domain(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis]), &|line| println!("  {line}"))?;
    lab.rename("guest-1", "other-1")?;
    let config = lab.default_config();
    let stage = Stage::take_unready(lab, &config)?;
    std::thread::sleep(Duration::from_millis(500));
    let service = stage.operator.service("redis")?;
    let said = service.problems.join("; ");
    ensure!(
        !service.serving && said.contains("guest-1"),
        "the status does not say that guest-1 is missing: {said:?}"
    );
    println!("  {said}");
    stage.lab.rename("other-1", "guest-1")?;
    stage.wait_ready(&config)?;
    let load = Plan::new(stage.psc(Service::Redis)?, "late").start(&stage.client())?;
    load.wait_answers(200, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)
}

/// A vif that is no port of a bridge (as with vif-route), and a bridge that does not exist: the
/// service is refused with the reason, and served once that is mended.
fn no_bridge(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis]), &|line| println!("  {line}"))?;
    let vif = lab.domain("guest-1")?.vif.clone();
    let config = lab.default_config();
    lab.dom0().run(&["ip", "link", "set", &vif, "nomaster"])?;
    let stage = Stage::take_unready(lab, &config)?;
    expect_problem(&stage, &[&vif])?;
    stage.lab.dom0().run(&["ip", "link", "set", &vif, "master", "xenbr0"])?;
    stage.wait_ready(&config)?;
    let Stage { lab, dom0d, .. } = stage;
    dom0d.context("no dom0d")?.stop()?;
    let config = config.replacen("xenbr0", "xenbr7", 1);
    match Stage::take_unready(lab, &config) {
        Ok(stage) => expect_problem(&stage, &["xenbr7"]),
        Err(error) => explains("dom0d", &format!("{error:#}"), &["xenbr7"]),
    }
}

/// The redis service does not serve, and its problems soon say why.
fn expect_problem(stage: &Stage, saying: &[&str]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let service = stage.operator.service("redis")?;
        let mut said = service.problems.join("; ");
        for known in &service.known {
            said.push_str(&format!("; {}: {}", known.domain.name, known.reason));
        }
        ensure!(!service.serving, "the service serves");
        let explained = explains("the status", &said, saying);
        if explained.is_ok() || Instant::now() >= deadline {
            println!("  {said}");
            return explained;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Without root dom0d says so at once and touches nothing.
fn no_root(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 0, &[Service::Redis]), &|line| println!("  {line}"))?;
    let config = lab.directory().join("unprivileged.toml");
    fs::write(&config, lab.default_config())?;
    let said = refused(
        &lab,
        &config,
        |command| {
            command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        },
        &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
    )?;
    explains("dom0d without root", &said, &["root"])
}

/// Without `nft` it can't keep the kernel from forwarding by itself, and says what to install.
fn missing_tool(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 0, &[Service::Redis]), &|line| println!("  {line}"))?;
    let config = lab.directory().join("bare.toml");
    fs::write(&config, lab.default_config())?;
    let said = refused(
        &lab,
        &config,
        |command| {
            command.env("PATH", "/nonexistent");
        },
        &[],
    )?;
    explains("dom0d without nft", &said, &["nft"])
}

/// Runs dom0d in dom0 in a way that must fail within ten seconds; returns what it said.
pub(super) fn refused(
    lab: &Lab,
    config: &std::path::Path,
    prepare: impl Fn(&mut Command),
    wrapper: &[&str],
) -> Result<String> {
    let dom0d = program("dom0d")?;
    let mut words: Vec<String> = wrapper.iter().map(|w| (*w).to_owned()).collect();
    words.push(dom0d.display().to_string());
    let dom0 = lab.dom0();
    let mut command = dom0.command(&words[0]);
    command
        .args(&words[1..])
        .arg("--config")
        .arg(config)
        .arg("--lab")
        .arg(lab.directory())
        .env("XENSTORED_PATH", lab.directory().join("xenstored.sock"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    prepare(&mut command);
    let mut child = dom0.spawn(&mut command)?;
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if std::time::Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("dom0d runs although it can't do its work");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let output = child.wait_with_output()?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    ensure!(!status.success(), "dom0d exited with 0: {said}");
    println!("  {}", said.trim());
    Ok(said)
}
