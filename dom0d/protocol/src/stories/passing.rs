//! What the engine asks of a data plane that passes conversations by itself.

use super::*;
use crate::{Flow, LagPolicy, StaleReason};

/// Bytes by which the OVM may be ahead.
const AHEAD: u32 = 500;

/// A conversation that the plane passes, and how.
struct Passing {
    story: Story,
    flow: Flow,
}

impl Passing {
    fn begin() -> Self {
        Self::with_replicas(1)
    }

    fn with_replicas(rvms: u32) -> Self {
        Self::configured(rvms, |_| {})
    }

    fn configured(rvms: u32, change: impl FnOnce(&mut ServiceConfig)) -> Self {
        let mut story = Story::configured(rvms, |config| {
            config.limits.ahead_bytes = AHEAD;
            change(config);
        });
        story.tell(Input::PlanePasses);
        story.establish(rvms);
        let handover = story.handover().expect("nothing is in flight");
        assert_eq!(story.handover(), None);
        Self { story, flow: handover.flow }
    }

    /// The client sends a segment that the plane passes. Returns the right edge that the OVM is told, as a position.
    fn client_says(&mut self, say: Say<'_>) -> u32 {
        let packet = self.story.client_packet(&say);
        let edge = self.flow.client_to_server(&mut packet.clone(), [10, 0, 0, 10].into()).unwrap();
        self.story.tell(Input::Client {
            link: LINK,
            passage: Passage::Passed { edge, trusted: true },
            packet: &packet,
        });
        self.follow();
        edge.wrapping_sub(iss(0))
    }

    /// The OVM sends a segment that the plane passes. Returns the right edge that the client is told, as a position.
    fn ovm_says(&mut self, say: Say<'_>) -> u32 {
        let packet = self.story.server_packet(0, &say);
        let edge = self.flow.server_to_client(&mut packet.clone(), [10, 0, 0, 100].into()).unwrap();
        let passage = Passage::Passed { edge, trusted: true };
        self.story.tell(Input::Server { server: ServerId(0), passage, packet: &packet });
        self.follow();
        edge.wrapping_sub(CLIENT_ISS)
    }

    fn follow(&mut self) {
        self.story.drain();
        for output in self.story.outputs.drain(..) {
            match output {
                Output::Rule(Rule::Extend { bounds, .. }) => self.flow.bounds = bounds,
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn a_download_waits_for_a_replica_that_is_behind_and_is_told_to_go_on() {
    let mut passing = Passing::begin();
    // The OVM was already told of the client's whole window, which stays valid.
    assert_eq!(passing.flow.bounds.down.wrapping_sub(iss(0)), 1001);
    let answer = [b'x'; 1000];
    passing.ovm_says(Say { seq: iss(0) + 1, ack: at(1), payload: &answer, ..Say::default() });
    let edge = passing.client_says(Say { seq: at(1), ack: iss(0) + 1001, ..Say::default() });
    assert_eq!(edge, 1001, "the window is shut, though the client has room");
    let mut story = passing.story;
    assert_eq!(story.servers[0], []);
    // The replica produces the same answer, in two parts.
    story.server_sends(1, 1, &answer[..400], 1);
    assert_eq!(story.outputs, [], "it is too far behind still");
    story.server_sends(1, 401, &answer[400..], 1);
    let update = story.server_hears(0);
    assert_eq!((update.seq, update.ack, update.payload.len()), (at(1), iss(0) + 1001, 0));
    assert_eq!(u32::from(update.window), AHEAD);
    let [Output::Rule(Rule::Extend { bounds, .. })] = story.outputs[..] else {
        panic!("{:?}", story.outputs)
    };
    assert_eq!(bounds.down.wrapping_sub(iss(0)), 1001 + AHEAD);
    assert_eq!(story.servers[0], [], "once is enough");
}

#[test]
fn an_upload_waits_for_a_replica_that_is_behind_and_is_told_to_go_on() {
    let mut passing = Passing::begin();
    let request = [b'x'; 1000];
    passing.client_says(Say { seq: at(1), ack: iss(0) + 1, payload: &request, ..Say::default() });
    passing.story.servers[1].clear();
    let edge = passing.ovm_says(Say { seq: iss(0) + 1, ack: at(1001), ..Say::default() });
    assert_eq!(edge, 1001, "the window is shut, though the OVM has room");
    let mut story = passing.story;
    assert!(story.client.is_empty());
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(1001), ..Say::default() });
    let update = story.client_hears();
    assert_eq!((update.seq, update.ack, update.payload.len()), (iss(0) + 1, at(1001), 0));
    assert_eq!(u32::from(update.window), AHEAD);
    let [Output::Rule(Rule::Extend { bounds, .. })] = story.outputs[..] else {
        panic!("{:?}", story.outputs)
    };
    assert_eq!(bounds.up.wrapping_sub(CLIENT_ISS), 1001 + AHEAD);
    assert!(story.client.is_empty(), "once is enough");
}

#[test]
fn an_ovm_that_was_stopped_for_one_replica_is_not_blamed_by_the_others() {
    let mut passing = Passing::with_replicas(3);
    let answer = [b'x'; 1400];
    passing.ovm_says(Say { seq: iss(0) + 1, ack: at(1), payload: &answer[..1000], ..Say::default() });
    let edge = passing.client_says(Say { seq: at(1), ack: iss(0) + 1001, ..Say::default() });
    assert_eq!(edge, 1001);
    let mut story = passing.story;
    for replica in [2, 3] {
        story.server_sends(replica, 1, &answer, 1);
    }
    story.wait(Duration::from_millis(400));
    assert!(
        !story.outputs.iter().any(|output| matches!(output, Output::StopPlane { .. })),
        "{:?}",
        story.outputs
    );
}

#[test]
fn what_the_plane_passed_into_a_window_that_the_client_took_back_is_recorded() {
    let mut passing = Passing::begin();
    // The plane leaves this segment to the daemon, and does not notice the smaller window.
    passing.story.client_says(Say { seq: at(1), ack: iss(0) + 1, window: 100, ..Say::default() });
    let answer = [b'x'; 1000];
    passing.ovm_says(Say { seq: iss(0) + 1, ack: at(1), payload: &answer, ..Say::default() });
    let status = passing.story.service.status();
    assert!(status.servers.iter().all(|server| server.stale.is_none()), "{:?}", status.servers);
}

#[test]
fn nobody_waits_for_a_replica_that_is_gone() {
    let mut passing = Passing::begin();
    let answer = [b'x'; 1000];
    passing.ovm_says(Say { seq: iss(0) + 1, ack: at(1), payload: &answer, ..Say::default() });
    passing.client_says(Say { seq: at(1), ack: iss(0) + 1001, ..Say::default() });
    let mut story = passing.story;
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), flags: Flags::RST, ..Say::default() });
    assert_eq!(u32::from(story.server_hears(0).window), 1000, "all that the client has room for");
}

#[test]
fn what_went_on_without_the_daemon_is_left_alone_and_no_replica_is_promotable() {
    let Passing { mut story, .. } = Passing::begin();
    let packet = story.server_packet(0, &Say { seq: iss(0) + 500, ack: at(1), ..Say::default() });
    story.tell(Input::Server { server: ServerId(0), passage: Passage::Unattended, packet: &packet });
    story.drain();
    assert!(story.client.is_empty() && story.servers[0].is_empty(), "it goes on");
    assert!(story.server_hears(1).flags.has(Flags::RST));
    assert_eq!(story.outputs, [], "the plane keeps it");
    let status = story.service.status();
    assert_eq!(
        (status.conversations, status.servers[1].stale),
        (0, Some(StaleReason::UncoveredConversation))
    );
    assert!(
        matches!(story.events.as_slice(), [EventKind::Unprotected { .. }, EventKind::Stale { .. }]),
        "{:?}",
        story.events
    );
}

#[test]
fn the_echo_of_a_repetition_that_the_daemon_sent_on_is_not_taken_for_that_of_the_original() {
    let mut story = Story::new(1);
    story.timestamps = true;
    story.tell(Input::PlanePasses);
    story.establish(1);
    let mut flow = story.handover().expect("nothing is in flight").flow;
    let psc = [10, 0, 0, 100].into();
    let say = Say { seq: iss(0) + 1, ack: at(1), payload: b"answer", tsval: 2_000, ..Say::default() };
    flow.server_to_client(&mut story.server_packet(0, &say), psc).unwrap();
    let again = Say { tsval: 3_000, ..say };
    assert_eq!(flow.server_to_client(&mut story.server_packet(0, &again), psc), Err(crate::Aside::Daemon));
    let heard = Say { seq: at(1), ack: iss(0) + 7, tsval: 1_000, tsecr: 3_000, ..Say::default() };
    let mut packet = story.client_packet(&heard);
    flow.client_to_server(&mut packet, [10, 0, 0, 10].into()).unwrap();
    let Ok(wire::Parsed::Tcp(segment)) = wire::parse(&packet) else { panic!("{packet:?}") };
    assert_eq!(segment.options.timestamps.map(|(_, echo)| echo), Some(3_000));
}

/// A download of length `time`. All replicas except the last follow at once; in the rounds for which `stops` is true,
/// the last one stays so far behind that it stops the OVM.
fn slowed_download(rvms: u32, on_lag: LagPolicy, time: Duration, stops: impl Fn(u32) -> bool) -> Story {
    let mut passing = Passing::configured(rvms, |config| config.on_lag = on_lag);
    let (mut end, piece) = (1, [b'x'; 50]);
    let mut behind = 1;
    let until = passing.story.now + time;
    for round in 0.. {
        if passing.story.now >= until {
            break;
        }
        // The OVM sends as much as it may, and the client acknowledges it.
        let limit = passing.flow.bounds.down.wrapping_sub(iss(0)).min(end + 400);
        while end + 50 <= limit {
            passing.ovm_says(Say { seq: iss(0) + end, ack: at(1), payload: &piece, ..Say::default() });
            end += 50;
            passing.client_says(Say { seq: at(1), ack: iss(0) + end, ..Say::default() });
            for quick in 1..rvms {
                passing.story.server_sends(quick, end - 50, &piece, 1);
            }
            passing.follow();
        }
        while (behind + if stops(round) { 450 } else { 50 }) <= end {
            passing.story.server_sends(rvms, behind, &piece, 1);
            behind += 50;
            passing.follow();
        }
        passing.story.wait(Duration::from_millis(10));
        passing.follow();
        passing.story.client.clear();
        passing.story.servers.iter_mut().for_each(VecDeque::clear);
    }
    passing.story
}

#[test]
fn a_replica_that_slows_clients_for_long_is_evicted_though_it_follows() {
    let evicted = |story: &Story| {
        story.events.contains(&EventKind::Evicted { server: ServerId(2), reason: StaleReason::Lagged })
    };
    let after = |ms, on_lag| slowed_download(2, on_lag, Duration::from_millis(ms), |_| true);
    assert!(!evicted(&after(4_000, LagPolicy::Evict)), "it is given half of its limit");
    let story = after(6_000, LagPolicy::Evict);
    assert!(evicted(&story), "{:?}", story.events);
    assert_eq!(story.service.status().servers.len(), 2, "the quick one stays");
    assert!(!evicted(&after(6_000, LagPolicy::Wait)), "the operator chose that clients wait");
    // A replica that is only a little slower than the OVM stays.
    let story = slowed_download(2, LagPolicy::Evict, Duration::from_secs(20), |round| round % 4 == 0);
    assert!(!evicted(&story));
}

/// The client's next segment with these bytes after its options.
fn with_options(story: &Story, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let say = Say { seq: at(1), ack: iss(0) + 1, payload, ..Say::default() };
    let mut packet = story.client_packet(&say);
    packet.splice(40..40, options.iter().copied());
    packet[32] += (options.len() as u8 / 4) << 4;
    packet[3] += options.len() as u8;
    repair(&mut packet);
    packet
}

/// Puts both checksums of an IPv4 packet right.
fn repair(packet: &mut [u8]) {
    let sum = |bytes: &[u8]| -> u32 {
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
    };
    let fold = |sum: u32| !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].fill(0);
    let header = fold(sum(&packet[..20]));
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    packet[36..38].fill(0);
    let length = packet.len() as u32 - 20;
    let check = fold(sum(&packet[12..20]) + 6 + length + sum(&packet[20..]));
    packet[36..38].copy_from_slice(&check.to_be_bytes());
}

/// Options that the plane and the engine might read differently.
const AMBIGUOUS: [&[u8]; 14] = [
    &[2, 3, 0, 1],
    &[3, 2, 1, 1],
    &[4, 3, 0, 1],
    &[2, 4, 5, 0xb4],
    &[3, 3, 7, 1],
    &[4, 2, 1, 1],
    &[5, 2, 1, 1],
    &[5, 9, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    &[8, 9, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    &[19, 4, 0, 0],
    &[29, 4, 0, 0],
    &[253, 0, 1, 1],
    &[253, 1, 1, 1],
    &[1, 1, 253, 3],
];

#[test]
fn what_is_passed_is_what_the_engine_takes() {
    for options in AMBIGUOUS {
        let Passing { story, mut flow } = Passing::begin();
        let mut packet = with_options(&story, options, b"SET");
        let passed = flow.client_to_server(&mut packet, [10, 0, 0, 10].into());
        assert_eq!(passed, Err(crate::Aside::DaemonFromNow), "{options:?}");
    }
}

#[test]
fn what_the_engine_can_not_take_though_it_was_passed_every_replica_lacks_at_once() {
    let (up, down) = (iss(0) + 1001, at(1001));
    for options in AMBIGUOUS {
        let Passing { mut story, .. } = Passing::with_replicas(2);
        let packet = with_options(&story, options, b"SET");
        let can_read = wire::parse(&packet).is_ok_and(
            |parsed| matches!(parsed, wire::Parsed::Tcp(segment) if !segment.options.authenticated),
        );
        let passage = Passage::Passed { edge: up, trusted: true };
        story.tell(Input::Client { link: LINK, passage, packet: &packet });
        story.drain();
        for replica in [1, 2] {
            let stale = story.service.status().servers[replica].stale;
            assert_eq!(stale.is_none(), can_read, "{options:?}");
        }
    }
    // Passed bytes of the OVM that the engine can't read, and passed segments of a client or the OVM in an unknown
    // conversation.
    for case in 0..4 {
        let Passing { mut story, .. } = Passing::begin();
        let say = Say { seq: iss(0) + 1, ack: at(1), payload: b"answer", ..Say::default() };
        let passage = Passage::Passed { edge: down, trusted: true };
        match case {
            0 => {
                let mut packet = story.server_packet(0, &say);
                packet[32] = 0xf0;
                story.tell(Input::Server { server: ServerId(0), passage, packet: &packet });
            }
            1 | 2 => {
                story.peer.set_port(4999);
                let packet = story.server_packet(0, &say);
                let say = Say { seq: at(1), ack: iss(0) + 1, ..say };
                match case {
                    1 => story.tell(Input::Server { server: ServerId(0), passage, packet: &packet }),
                    _ => {
                        let packet = story.client_packet(&say);
                        story.tell(Input::Client { link: LINK, passage, packet: &packet });
                    }
                }
            }
            _ => {
                // A segment without data has nothing that a replica could lack.
                let packet = story.client_packet(&Say { seq: at(1), ack: iss(0) + 1, ..Say::default() });
                let passage = Passage::Passed { edge: up, trusted: true };
                story.tell(Input::Client { link: LINK, passage, packet: &packet });
            }
        }
        story.drain();
        assert_eq!(story.service.status().servers[1].stale.is_none(), case == 3, "case {case}");
    }
}

#[test]
fn a_checksum_is_what_its_receiver_takes_it_for() {
    // A right, a partial and a wrong checksum, for a receiver that checks it and for a receiver that trusts its device.
    for (check, trusted, taken) in [
        (None, false, true),
        (Some(0_u16), false, false),
        (Some(1), false, false),
        (None, true, true),
        (Some(0), true, true),
        (Some(1), true, true),
    ] {
        let Passing { mut story, .. } = Passing::begin();
        let say = Say { seq: at(1), ack: iss(0) + 1, payload: b"SET", ..Say::default() };
        let mut packet = story.client_packet(&say);
        if let Some(wrong) = check {
            let pseudo: u32 =
                packet[12..20].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
            let pseudo = pseudo + 6 + packet.len() as u32 - 20;
            let pseudo = (pseudo & 0xffff) + (pseudo >> 16) + u32::from(wrong);
            packet[36..38].copy_from_slice(&(pseudo as u16).to_be_bytes());
        }
        story.servers[1].clear();
        let passage = Passage::Passed { edge: iss(0) + 1001, trusted };
        story.tell(Input::Client { link: LINK, passage, packet: &packet });
        story.drain();
        assert_eq!(!story.servers[1].is_empty(), taken, "{check:?} {trusted}");
        // A receiver that checks the checksum drops the segment, so no replica lacks anything unless the OVM
        // acknowledges it nevertheless.
        assert_eq!(story.service.status().servers[1].stale, None);
        story.server_says(0, Say { seq: iss(0) + 1, ack: at(4), ..Say::default() });
        assert_eq!(story.service.status().servers[1].stale.is_none(), taken);
    }
}

#[test]
fn an_acknowledgment_beyond_the_window_is_none_to_the_ovm_and_does_not_pass() {
    let Passing { mut story, mut flow } = Passing::begin();
    let answer = Say { seq: iss(0) + 1, ack: at(1), payload: &[7; 400], ..Say::default() };
    let mut packet = story.server_packet(0, &answer);
    flow.server_to_client(&mut packet, [10, 0, 0, 100].into()).unwrap();
    // The window ends at 1001.
    for (position, passes) in [(1, true), (1001, true), (1002, false), (1 << 29, false)] {
        let say = Say { seq: at(position), ack: iss(0) + 401, ..Say::default() };
        let mut packet = story.client_packet(&say);
        let passed = flow.client_to_server(&mut packet, [10, 0, 0, 10].into());
        assert_eq!(passed.is_ok(), passes, "{position}: {passed:?}");
    }
    story.drain();
}

#[test]
fn what_was_passed_is_taken_though_the_engine_is_a_step_behind() {
    // On another CPU the plane passes an answer, and the client's acknowledgment of it enters the ring first. There the
    // window had advanced, and the engine already knows a later TSval of the client.
    let mut story = Story::new(1);
    story.timestamps = true;
    story.tell(Input::PlanePasses);
    story.establish(1);
    assert!(story.handover().is_some());
    let says = [
        Say { seq: at(1), ack: iss(0) + 1, payload: b"a", tsval: 500, tsecr: 1000, ..Say::default() },
        Say { seq: at(2), ack: iss(0) + 100, payload: b"b", tsval: 400, tsecr: 1000, ..Say::default() },
        Say { seq: at(3), ack: iss(0) + 1, payload: &[7; 2_000], tsval: 500, tsecr: 1000, ..Say::default() },
    ];
    for say in says {
        let packet = story.client_packet(&say);
        let passage = Passage::Passed { edge: iss(0) + 1001, trusted: true };
        story.tell(Input::Client { link: LINK, passage, packet: &packet });
        story.drain();
    }
    let status = story.service.status();
    assert_eq!(status.servers[1].stale, None);
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(2003), tsval: 1001, tsecr: 500, ..Say::default() });
    assert_eq!(story.service.status().servers[1].stale, None);
}
