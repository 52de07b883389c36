//! Every fault of the OVM, in every situation, with one replica and with three; one of them over IPv6, and in a VLAN.

use std::time::Duration;

use anyhow::Result;

use super::Scenario;
use super::transfer::{Direction, HalfClosed, Large};
use crate::client::redis::load::Plan;
use crate::host::{Fault, LabConfig, Service, Vlan};
use crate::stage::Stage;
use crate::stage::failover::Failover;

const FAULTS: [Fault; 6] =
    [Fault::Freeze, Fault::Crash, Fault::Destroy, Fault::Hang, Fault::Kill, Fault::Spin];

/// What the clients are doing when the fault strikes.
#[derive(Clone, Copy, Debug)]
enum Situation {
    Idle,
    Pipeline,
    Download,
    Upload,
    HalfClosed,
    Thousand,
}

const SITUATIONS: [(Situation, &str); 6] = [
    (Situation::Idle, "idle"),
    (Situation::Pipeline, "pipeline"),
    (Situation::Download, "download"),
    (Situation::Upload, "upload"),
    (Situation::HalfClosed, "half-closed"),
    (Situation::Thousand, "thousand"),
];

/// How clients and servers are connected.
#[derive(Clone, Copy, Debug, Default)]
struct Network {
    ipv6: bool,
    vlan: Option<Vlan>,
}

const TAGGED: Vlan = Vlan { id: 5, filtered: false };
const FILTERED: Vlan = Vlan { id: 5, filtered: true };

const NETWORKS: [(Network, &str); 4] = [
    (Network { ipv6: true, vlan: None }, "ipv6"),
    (Network { ipv6: false, vlan: Some(TAGGED) }, "vlan"),
    (Network { ipv6: true, vlan: Some(TAGGED) }, "vlan-ipv6"),
    (Network { ipv6: false, vlan: Some(FILTERED) }, "vlan-filtered"),
];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (situation, name) in SITUATIONS {
        for fault in FAULTS {
            for replicas in [1, 3] {
                let fault_name = format!("{fault:?}").to_lowercase();
                all.push(
                    Scenario::new(format!("failover/{name}/{fault_name}/{replicas}"), move |lab| {
                        play(lab, situation, fault, replicas, Network::default())
                    })
                    .within(Duration::from_secs(180)),
                );
            }
        }
    }
    for (situation, name) in [
        (Situation::Idle, "idle"),
        (Situation::Pipeline, "pipeline"),
        (Situation::Download, "download"),
        (Situation::Upload, "upload"),
    ] {
        for (network, network_name) in NETWORKS {
            let scenario = Scenario::new(format!("failover/{name}/freeze/1/{network_name}"), move |lab| {
                play(lab, situation, Fault::Freeze, 1, network)
            });
            let filtered = network.vlan.is_some_and(|vlan| vlan.filtered);
            let obstacle = if filtered { no_filter } else { || Ok(None) };
            all.push(scenario.within(Duration::from_secs(180)).unless(obstacle));
        }
    }
    all
}

fn play(lab: &str, situation: Situation, fault: Fault, replicas: usize, network: Network) -> Result<()> {
    match situation {
        Situation::Idle => idle(lab, fault, replicas, network),
        Situation::Pipeline => pipeline(lab, fault, replicas, network),
        Situation::Download => large(lab, fault, replicas, Direction::Download, network),
        Situation::Upload => large(lab, fault, replicas, Direction::Upload, network),
        Situation::HalfClosed => half_closed(lab, fault, replicas),
        Situation::Thousand => thousand(lab, fault, replicas),
    }
}

fn no_filter() -> Result<Option<&'static str>> {
    let can = Vlan::can_be_filtered()?;
    Ok((!can).then_some("this kernel's bridges can't tell VLANs apart (CONFIG_BRIDGE_VLAN_FILTERING)"))
}

fn stage(lab: &str, replicas: usize, service: Service, network: Network) -> Result<Stage> {
    let plan = LabConfig { vlan: network.vlan, ..Stage::plan(lab, replicas, &[service]) };
    Stage::up_with(plan, |config| config)
}

/// Eight connections that asked, and then are silent when the fault strikes.
fn idle(lab: &str, fault: Fault, replicas: usize, network: Network) -> Result<()> {
    let stage = stage(lab, replicas, Service::Redis, network)?;
    let target = stage.psc_of_family(Service::Redis, network.ipv6)?;
    let load = Plan::new(target, "idle").start(&stage.client())?;
    load.wait_answers(200, Duration::from_secs(20))?;
    load.hold(Duration::from_secs(10))?;
    let at = stage.strike(Service::Redis, fault)?;
    if matches!(fault, Fault::Hang | Fault::Spin) {
        // Nothing tells these two from an idle guest until somebody asks.
        load.go_on();
    }
    let failover = Failover::observe(&stage, Service::Redis, fault, at)?;
    load.go_on();
    load.wait_answers(200, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()
}

/// Eight connections with 32 requests outstanding each.
fn pipeline(lab: &str, fault: Fault, replicas: usize, network: Network) -> Result<()> {
    let stage = stage(lab, replicas, Service::Redis, network)?;
    let mut plan = Plan::new(stage.psc_of_family(Service::Redis, network.ipv6)?, "pipeline");
    plan.depth = 32;
    plan.pace = Some(Duration::from_millis(20));
    let load = plan.start(&stage.client())?;
    load.wait_answers(5_000, Duration::from_secs(30))?;
    let at = stage.strike(Service::Redis, fault)?;
    let failover = Failover::observe(&stage, Service::Redis, fault, at)?;
    load.wait_answers(5_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()
}

/// A transfer of 300 MB, a third of which is done when the fault strikes.
fn large(lab: &str, fault: Fault, replicas: usize, direction: Direction, network: Network) -> Result<()> {
    let stage = stage(lab, replicas, Service::Http, network)?;
    let large = Large::begin(&stage, direction, network.ipv6)?;
    large.wait_part(0.33)?;
    let at = stage.strike(Service::Http, fault)?;
    let failover = Failover::observe(&stage, Service::Http, fault, at)?;
    large.expect_whole(&stage)?;
    failover.expect_plausible()
}

/// A client that has sent its FIN and still reads a long answer.
fn half_closed(lab: &str, fault: Fault, replicas: usize) -> Result<()> {
    let stage = Stage::up(lab, replicas, &[Service::Postgresql])?;
    let session = HalfClosed::begin(&stage)?;
    session.wait_part(0.2)?;
    let at = stage.strike(Service::Postgresql, fault)?;
    let failover = Failover::observe(&stage, Service::Postgresql, fault, at)?;
    session.expect_whole(&stage)?;
    failover.expect_plausible()
}

/// A thousand open connections, a hundred of which ask all the time.
fn thousand(lab: &str, fault: Fault, replicas: usize) -> Result<()> {
    let stage = Stage::up(lab, replicas, &[Service::Redis])?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "thousand");
    plan.connections = 1_000;
    plan.busy = 100;
    plan.pace = Some(Duration::from_millis(50));
    let load = plan.start(&stage.client())?;
    load.wait_answers(2_000, Duration::from_secs(30))?;
    let at = stage.strike(Service::Redis, fault)?;
    let failover = Failover::observe(&stage, Service::Redis, fault, at)?;
    load.wait_answers(2_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()
}
