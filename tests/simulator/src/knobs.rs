//! Everything that a run depends on, drawn from its seed.

use core::time::Duration;

use smoltcp::socket::tcp::CongestionControl;
use understudy_protocol::{CandidatePolicy, LagPolicy, Limits, Timing};

use crate::application::{KEYS, op};
use crate::client::{ClientKnobs, Ending, Plan, Step};
use crate::disguise::DisguiseKnobs;
use crate::fault::{Fault, Join, Scheduled, Target, When};
use crate::forge::Twist;
use crate::guest::GuestKnobs;
use crate::hostile::Hostility;
use crate::link::LinkKnobs;
use crate::prng::Prng;
use crate::stack::StackKnobs;

/// What a run is mainly about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Theme {
    /// Nothing fails.
    Plain,
    /// The OVM fails once.
    Failover,
    /// The OVM fails again and again.
    Chain,
    /// Only RVMs misbehave.
    BadReplicas,
    /// The operator at work.
    Operator,
    /// Anything.
    Everything,
    /// Hostile clients, and hostile RVMs; see [`Knobs::draw_hostile`].
    Hostile,
}

/// Everything a run depends on.
#[derive(Clone, Debug)]
pub(crate) struct Knobs {
    pub(crate) theme: Theme,
    pub(crate) clients: Vec<ClientKnobs>,
    /// What the hostile clients, which come last, do beside their plans.
    pub(crate) hostile: Vec<Hostility>,
    pub(crate) client_links: Vec<LinkKnobs>,
    /// The OVM first.
    pub(crate) guests: Vec<GuestKnobs>,
    pub(crate) guest_links: Vec<LinkKnobs>,
    pub(crate) limits: Limits,
    pub(crate) timing: Timing,
    pub(crate) candidate: CandidatePolicy,
    pub(crate) on_lag: LagPolicy,
    pub(crate) faults: Vec<Scheduled>,
    /// How often the daemon looks at domains.
    pub(crate) poll_us: u64,
    /// How long a fence takes.
    pub(crate) fence_us: u64,
    /// How late the daemon's timers are at most.
    pub(crate) timer_lateness_us: u64,
    /// How often, in a million inputs, the engine is saved and replaced by one restored from that.
    pub(crate) restores_per_million: u32,
}

impl Knobs {
    pub(crate) fn draw(seed: u64) -> Self {
        // From a stream of their own, so that a seed's other choices stay the same.
        let mut restores = Prng::fork(seed, "restores", 0);
        let mut rng = Prng::fork(seed, "knobs", 0);
        let rng = &mut rng;
        let theme = *rng.pick(&[
            Theme::Plain,
            Theme::Failover,
            Theme::Failover,
            Theme::Chain,
            Theme::BadReplicas,
            Theme::Operator,
            Theme::Everything,
        ]);
        let replicas = match theme {
            Theme::Plain => rng.between(0, 3),
            Theme::Chain => rng.between(2, 3),
            _ => rng.between(1, 3),
        } as usize;
        let timestamps = rng.percent(75);
        let small_numbers = rng.percent(30);
        let guest_model = stack(rng, timestamps, small_numbers);
        let guests: Vec<_> = (0..=replicas).map(|_| guest(rng, &guest_model)).collect();
        let guest_links = guests
            .iter()
            .enumerate()
            .map(|(i, guest)| {
                let link = guest_link(rng, i, theme);
                checksummed(&guest.stack, link)
            })
            .collect();
        let clean_clients = rng.percent(40);
        let clients: Vec<_> = (0..rng.log_between(1, 6)).map(|_| client(rng, timestamps)).collect();
        let client_links = clients
            .iter()
            .map(|client| {
                let link = client_link(rng, clean_clients);
                checksummed(&client.stack, link)
            })
            .collect();
        let faults = faults(rng, theme, clients.len());
        Self {
            theme,
            clients,
            hostile: Vec::new(),
            client_links,
            guests,
            guest_links,
            limits: Limits::default(),
            timing: Timing {
                progress_limit: Duration::from_millis(rng.between(100, 400)),
                ..Timing::default()
            },
            candidate: if rng.percent(75) { CandidatePolicy::Progress } else { CandidatePolicy::Queue },
            on_lag: LagPolicy::Evict,
            faults,
            poll_us: 1000,
            fence_us: rng.between(50, 20_000),
            timer_lateness_us: if rng.percent(50) { 0 } else { 1500 },
            restores_per_million: if restores.percent(30) {
                restores.log_between(200, 50_000) as u32
            } else {
                0
            },
        }
    }

    /// The knobs of a seed with hostile clients, and in some runs hostile RVMs. Otherwise servers and links are healthy, except
    /// that the OVM may fail once: any other harm is done by the hostile.
    pub(crate) fn draw_hostile(seed: u64) -> Self {
        let mut knobs = Self::draw(seed);
        let mut rng = Prng::fork(seed, "hostile", 0);
        let rng = &mut rng;
        knobs.theme = Theme::Hostile;
        let model = knobs.guests[0].stack.clone();
        while knobs.guests.len() < 2 {
            knobs.guests.push(guest(rng, &model));
        }
        knobs.guest_links = knobs
            .guests
            .iter()
            .map(|_| LinkKnobs {
                delay_us: rng.log_between(10, 300),
                jitter_us: rng.log_between(1, 100),
                ..LinkKnobs::default()
            })
            .collect();
        for _ in 0..rng.between(1, 3) {
            let mut client = client(rng, model.timestamp_tick_us.is_some());
            for step in client.plans.iter_mut().flat_map(|plan| &mut plan.steps) {
                // The others agree on who uses which key.
                if let Step::Shared { size, .. } = *step {
                    *step = Step::Request { op: op::APPEND, size };
                }
            }
            knobs.clients.push(client);
            knobs.client_links.push(client_link(rng, true));
            knobs.hostile.push(Hostility::draw(rng));
        }
        knobs.faults.clear();
        let mut add = |when, fault| knobs.faults.push(Scheduled { when, fault });
        match rng.between(0, 9) {
            0..=4 => {}
            5..=7 => {
                for _ in 0..rng.between(1, 3) {
                    let target = Target::Rvm(rng.between(0, 2) as usize);
                    let packets = rng.log_between(1, 300) as u32;
                    let fault = match rng.between(0, 4) {
                        0 => Fault::Garbage { target, packets },
                        1 => Fault::ResetAll(target),
                        2 => Fault::Mutated { target, packets },
                        _ => Fault::Twisted { target, twist: *rng.pick(&Twist::ALL), packets },
                    };
                    add(moment(rng), fault);
                }
            }
            _ => add(moment(rng), blow(rng)),
        }
        knobs
    }
}

fn stack(rng: &mut Prng, timestamps: bool, small: bool) -> StackKnobs {
    let mtu = *rng.pick(&[576, 1280, 1500, 1500, 1500, 9000]);
    let (low, high) = if small { (600, 4096) } else { (4096, 262_144) };
    StackKnobs {
        // IPv6 needs 1280.
        mtu: mtu.max(1280),
        receive_buffer: rng.log_between(low, high) as usize,
        send_buffer: rng.log_between(low, high) as usize,
        ack_delay_us: *rng.pick(&[0, 0, 10_000, 40_000]),
        nagle: rng.percent(30),
        keep_alive_us: rng.percent(10).then_some(300_000),
        congestion_control: *rng.pick(&[
            CongestionControl::None,
            CongestionControl::Reno,
            CongestionControl::Cubic,
        ]),
        timestamp_tick_us: timestamps.then_some(*rng.pick(&[1000, 1000, 4000, 10_000])),
        timestamp_offset: if rng.percent(30) {
            0u32.wrapping_sub(rng.between(0, 3000) as u32)
        } else {
            rng.next() as u32
        },
        disguise: DisguiseKnobs {
            wrap_percent: *rng.pick(&[0, 30, 100]),
            no_sack: rng.percent(20),
            no_window_scale: rng.percent(15),
            partial_checksums: false,
            mss: rng.percent(15).then_some(*rng.pick(&[536, 1000, 1400])),
        },
    }
}

/// Replicas are alike in what they negotiate, and differ in all that may differ.
fn guest(rng: &mut Prng, model: &StackKnobs) -> GuestKnobs {
    let mut stack = model.clone();
    stack.timestamp_offset = rng.next() as u32;
    stack.disguise.wrap_percent = *rng.pick(&[0, 30, 100]);
    stack.disguise.partial_checksums = rng.percent(30);
    stack.ack_delay_us = *rng.pick(&[0, 0, 10_000, 40_000]);
    stack.nagle = rng.percent(30);
    stack.send_buffer = rng.log_between(2048, 262_144) as usize;
    let think = if rng.percent(50) { (0, 0) } else { (0, rng.log_between(10, 20_000)) };
    GuestKnobs {
        stack,
        think_us: think,
        read_size: *rng.pick(&[100, 1460, 65_536, 65_536]),
        write_size: *rng.pick(&[50, 1000, 65_536, 65_536]),
    }
}

fn guest_link(rng: &mut Prng, index: usize, theme: Theme) -> LinkKnobs {
    let mut link = LinkKnobs {
        delay_us: rng.log_between(10, 300),
        jitter_us: rng.log_between(1, 100),
        ..LinkKnobs::default()
    };
    let impaired = theme != Theme::Plain && rng.percent(if index == 0 { 15 } else { 40 });
    if impaired {
        impair(rng, &mut link);
        if index != 0 && rng.percent(30) {
            link.delay_us = rng.between(1000, 50_000);
        }
    }
    link
}

fn client_link(rng: &mut Prng, clean: bool) -> LinkKnobs {
    let mut link = LinkKnobs {
        delay_us: rng.log_between(20, 60_000),
        jitter_us: rng.log_between(1, 2000),
        ..LinkKnobs::default()
    };
    if !clean && rng.percent(70) {
        impair(rng, &mut link);
    }
    link
}

/// Corruption behind a checksum that is not filled in yet would go unnoticed.
fn checksummed(stack: &StackKnobs, mut link: LinkKnobs) -> LinkKnobs {
    if stack.disguise.partial_checksums {
        link.corruption = 0;
    }
    link
}

fn impair(rng: &mut Prng, link: &mut LinkKnobs) {
    for rate in [&mut link.loss, &mut link.duplication, &mut link.reordering, &mut link.corruption] {
        if rng.percent(60) {
            *rate = rng.log_between(1000, 50_000) as u32;
        }
    }
}

fn client(rng: &mut Prng, timestamps: bool) -> ClientKnobs {
    let small = rng.percent(20);
    let timestamps = timestamps && rng.percent(90);
    let mut stack = stack(rng, timestamps, small);
    stack.disguise.partial_checksums = rng.percent(10);
    let plans = (0..rng.log_between(1, 4)).map(|_| plan(rng)).collect();
    ClientKnobs { stack, plans }
}

fn plan(rng: &mut Prng) -> Plan {
    let kind = rng.between(0, 9);
    let mut steps = Vec::new();
    let requests = rng.log_between(1, 60);
    let shared_only = rng.percent(30);
    match kind {
        0 => steps.push(Step::Download { size: rng.log_between(1000, 300_000) as usize }),
        1 => steps.push(Step::Request { op: op::PUT, size: rng.log_between(1000, 300_000) as usize }),
        _ => {
            for _ in 0..requests {
                let size = rng.log_between(1, 3000) as usize;
                let choice = if shared_only { 50 } else { rng.between(0, 99) };
                steps.push(match choice {
                    0..=29 => Step::Request { op: op::APPEND, size },
                    30..=44 => Step::Request { op: op::ECHO, size },
                    45..=74 => {
                        Step::Shared { key: rng.between(0, KEYS as u64 - 1) as u8, size: size.min(200) }
                    }
                    75..=82 => Step::Download { size: rng.log_between(1, 40_000) as usize },
                    83..=90 => Step::Request { op: op::PUT, size: rng.log_between(1, 40_000) as usize },
                    _ => Step::Pause { us: rng.log_between(100, 400_000) },
                });
            }
        }
    }
    Plan {
        start_us: if rng.percent(50) { rng.between(0, 2000) } else { rng.log_between(1, 1_000_000) },
        ipv6: rng.percent(30),
        steps,
        pipeline: if rng.percent(50) { 1 } else { rng.log_between(1, 16) as usize },
        ending: *rng.pick(&[
            Ending::Close,
            Ending::Close,
            Ending::HalfClose,
            Ending::HalfClose,
            Ending::Quit,
            Ending::Quit,
            Ending::Abort,
            Ending::Stay,
        ]),
        slow_reading: rng
            .percent(15)
            .then(|| (rng.log_between(500, 20_000) as usize, rng.log_between(1000, 100_000))),
        write_size: *rng.pick(&[7, 1000, 65_536, 65_536]),
        reuse_port: false,
    }
}

fn moment(rng: &mut Prng) -> When {
    if rng.percent(75) {
        When::Packets(rng.log_between(4, 2000))
    } else {
        When::At(rng.log_between(500, 2_000_000))
    }
}

/// What makes an OVM fail.
fn blow(rng: &mut Prng) -> Fault {
    let target = Target::Ovm;
    match rng.between(0, 5) {
        0 | 1 => Fault::Freeze(target),
        2 => Fault::Crash(target),
        3 => Fault::Hang(target),
        4 => Fault::Spin(target),
        _ => Fault::Kill { target, orderly: rng.percent(50) },
    }
}

/// An RVM's misbehaviour.
fn annoyance(rng: &mut Prng) -> Fault {
    let target = Target::Rvm(rng.between(0, 2) as usize);
    match rng.between(0, 11) {
        0 => Fault::Freeze(target),
        1 => Fault::Thaw(target),
        2 => Fault::Crash(target),
        3 => Fault::Hang(target),
        4 => Fault::Spin(target),
        5 => Fault::Kill { target, orderly: rng.percent(50) },
        6 => Fault::Slow { target, us: rng.log_between(100, 2_000_000) },
        7 => Fault::WrongAnswer(target),
        8 => Fault::Garbage { target, packets: rng.log_between(1, 300) as u32 },
        9 => Fault::Mutated { target, packets: rng.log_between(1, 300) as u32 },
        10 => Fault::ResetAll(target),
        _ => Fault::CutServer { target, us: rng.log_between(1000, 20_000_000) },
    }
}

fn operation(rng: &mut Prng) -> Fault {
    match rng.between(0, 6) {
        0..=2 => Fault::Switchover,
        3 => Fault::Failover { force: rng.percent(20) },
        4 => Fault::Detach(Target::Rvm(rng.between(0, 2) as usize)),
        _ => Fault::Attach(match rng.between(0, 3) {
            0 => Join::Unseeded,
            1 => Join::AssumeIdentical,
            _ => Join::Drain { deadline_us: rng.log_between(1000, 5_000_000) },
        }),
    }
}

fn faults(rng: &mut Prng, theme: Theme, clients: usize) -> Vec<Scheduled> {
    let mut faults = Vec::new();
    let mut add = |when, fault| faults.push(Scheduled { when, fault });
    match theme {
        Theme::Plain | Theme::Hostile => {}
        Theme::Failover => {
            let when = moment(rng);
            add(when, blow(rng));
        }
        Theme::Chain => {
            let when = moment(rng);
            add(when, blow(rng));
            for n in 1..=rng.between(1, 2) {
                let wait = rng.log_between(1, 1_000_000);
                add(When::AfterPromotion(n, wait), blow(rng));
            }
        }
        Theme::BadReplicas => {
            for _ in 0..rng.between(1, 5) {
                let when = moment(rng);
                add(when, annoyance(rng));
            }
        }
        Theme::Operator => {
            for _ in 0..rng.between(1, 4) {
                let when = moment(rng);
                add(when, operation(rng));
            }
        }
        Theme::Everything => {
            for _ in 0..rng.between(1, 6) {
                let when = moment(rng);
                let fault = match rng.between(0, 2) {
                    0 => blow(rng),
                    1 => annoyance(rng),
                    _ => operation(rng),
                };
                add(when, fault);
            }
        }
    }
    if theme != Theme::Plain && theme != Theme::BadReplicas && rng.percent(50) {
        let wait = rng.log_between(10, 3_000_000);
        add(When::AfterPromotion(1, wait), Fault::Thaw(Target::Deposed));
    }
    if theme != Theme::Plain && rng.percent(15) {
        let when = moment(rng);
        add(
            when,
            Fault::CutClient {
                client: rng.between(0, clients as u64 - 1) as usize,
                us: rng.log_between(1000, 10_000_000),
            },
        );
    }
    if rng.percent(10) {
        let when = moment(rng);
        add(when, Fault::StarveDom0 { us: rng.log_between(1000, 500_000) });
    }
    faults
}
