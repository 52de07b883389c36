//! The three segments, and everything that goes wrong around them.

use super::*;

#[test]
fn a_replica_is_opened_when_the_clients_third_segment_comes() {
    let mut story = Story::new(1);
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    story.server_hears(0);
    story.syn_ack(0);
    story.client_hears();
    story.silence();
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, ..Say::default() });
    assert_eq!(story.server_hears(0).flags, Flags::ACK);
    assert_eq!(story.server_hears(1).flags, Flags::SYN);
    story.silence();
}

#[test]
fn a_syn_flood_costs_replicas_nothing_and_stays_bounded() {
    let mut story = Story::configured(1, |config| config.limits.embryonic = 8);
    for seq in 0..1000 {
        story.client_says(Say { seq, flags: Flags::SYN, ..Say::default() });
    }
    assert!(story.servers[1].is_empty());
    let status = story.service.status();
    assert!(status.embryonic <= 8);
    assert_eq!((status.conversations, status.retained_bytes), (0, 0));
}

#[test]
fn client_data_may_overtake_the_replicas_syn_ack() {
    let mut story = Story::new(1);
    story.open();
    story.server_hears(1);
    story.client_sends(1, b"early", 1);
    assert_eq!(story.server_hears(0).payload, b"early");
    story.silence();
    story.syn_ack(1);
    let fed = story.server_hears(1);
    assert_eq!((fed.seq, fed.ack, fed.payload.as_slice()), (at(1), iss(1).wrapping_add(1), &b"early"[..]));
}

#[test]
fn a_replica_without_the_clients_timestamps_does_not_cover_and_turns_stale() {
    let mut story = Story::new(1);
    story.timestamps = true;
    story.open();
    story.server_hears(1);
    story.timestamps = false;
    story.syn_ack(1);
    assert!(story.events.iter().any(|event| matches!(event, EventKind::Stale { server: ServerId(1), .. })));
    assert_eq!(story.service.status().servers[1].uncovered, 1);
}

#[test]
fn a_lost_syn_to_a_replica_is_sent_again() {
    let mut story = Story::new(1);
    story.open();
    story.server_hears(1);
    story.wait(Duration::from_millis(250));
    assert_eq!(story.server_hears(1).flags, Flags::SYN);
}

#[test]
fn the_same_addresses_again_are_a_new_conversation() {
    let mut story = Story::established(1);
    story.client_sends(1, b"x", 1);
    story.server_hears(0);
    story.server_hears(1);
    story.server_sends(1, 1, b"", 2);
    // The client begins a new connection without closing the old one.
    let again = CLIENT_ISS.wrapping_add(1 << 20);
    let syn = || Say { seq: again, flags: Flags::SYN, ..Say::default() };
    story.client_says(syn());
    // Nobody knows yet whether the OVM has that byte: it is asked.
    assert_eq!((story.server_hears(0).payload, story.client.len()), (b"x".to_vec(), 0));
    story.server_sends(0, 1, b"", 2);
    story.client_hears();
    story.client_says(syn());
    let challenge = story.client_hears();
    assert_eq!((challenge.seq, challenge.ack, challenge.flags), (iss(0) + 1, at(2), Flags::ACK));
    story.silence();
    story.client_says(Say { seq: challenge.ack, flags: Flags::RST, ..Say::default() });
    assert_eq!(story.server_hears(0).flags, Flags::RST);
    assert!(story.server_hears(1).flags.has(Flags::RST));
    story.client_says(syn());
    assert_eq!(story.server_hears(0).seq, again);
    let new_iss = iss(0) + 70_000;
    let answer = Say {
        seq: new_iss,
        ack: again.wrapping_add(1),
        flags: Flags::SYN.with(Flags::ACK),
        ..Say::default()
    };
    story.server_says(0, answer);
    story.client_hears();
    story.client_says(Say { seq: again.wrapping_add(1), ack: new_iss + 1, ..Say::default() });
    assert_eq!(story.server_hears(0).ack, new_iss + 1);
    assert_eq!(story.server_hears(1).seq, again);
    assert_eq!(story.service.status().conversations, 1);
}

#[test]
fn a_full_table_leaves_the_new_flow_unprotected_and_the_old_alone() {
    let mut story = Story::configured(1, |config| config.limits.conversations = 0);
    story.open();
    assert!(story.servers[1].is_empty());
    story.client_sends(1, b"hello", 1);
    assert_eq!(story.server_hears(0).payload, b"hello");
    story.server_sends(0, 1, b"world", 6);
    assert_eq!(story.client_hears().payload, b"world");
    let rvm = &story.service.status().servers[1];
    assert!(rvm.not_promotable.is_some(), "it missed bytes");
}

/// A handshake that the OVM has answered and the client has not completed.
fn half_open(rvms: u32) -> Story {
    let mut story = Story::new(rvms);
    story.timestamps = true;
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, tsval: 100, ..Say::default() });
    story.syn_ack(0);
    story.client.clear();
    story.servers[0].clear();
    story
}

#[test]
fn a_former_ovm_that_repeats_its_syn_ack_is_let_be() {
    let mut story = half_open(1);
    story.command(Command::Switchover { to: None }).unwrap();
    story.drain();
    story.syn_ack(0);
    story.silence();
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, tsval: 100, tsecr: 1000, ..Say::default() });
    assert_eq!(story.server_hears(0).flags, Flags::ACK);
    assert_eq!(story.server_hears(1).flags, Flags::SYN);
}

#[test]
fn a_keepalive_tells_that_a_deposed_servers_handshake_was_completed() {
    let mut story = half_open(1);
    story.fail_ovm();
    story.client_says(Say { seq: CLIENT_ISS, ack: iss(0) + 1, payload: b"?", tsval: 100, ..Say::default() });
    assert_eq!(story.server_hears(1).flags, Flags::SYN);
    assert_eq!(story.service.status().conversations, 1);
}

#[test]
fn an_ovm_that_answers_in_mid_handshake_serves_nobody_yet() {
    let mut story = half_open(1);
    let later = tsval(0) + 500;
    // The client's third segment was lost; it sends a keepalive.
    story.client_says(Say { seq: CLIENT_ISS, ack: iss(0) + 1, payload: b"?", tsval: 100, ..Say::default() });
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(1), tsval: later, tsecr: 100, ..Say::default() });
    assert_eq!(story.client_hears().timestamps, Some((later, 100)));
    assert_eq!(story.service.status().servers[1].stale, None);
    // If another server continues from here, the TSvals that the client gets still do not run backwards.
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, tsval: 100, tsecr: later, ..Say::default() });
    story.syn_ack(1);
    story.fail_ovm();
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, payload: b"q", tsval: 100, ..Say::default() });
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(2), tsval: tsval(1), ..Say::default() });
    let told: Vec<_> = story.client.iter().filter_map(|heard| heard.timestamps).collect();
    assert!(!told.is_empty() && told.iter().all(|(tsval, _)| *tsval >= later), "{told:?}");
}

#[test]
fn a_client_that_is_gone_before_a_replica_knew_of_it_harms_no_replica() {
    let mut story = Story::new(1);
    story.open();
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, flags: Flags::RST, ..Say::default() });
    story.wait(Duration::from_secs(62));
    assert_eq!(story.service.status().servers[1].stale, None);
}
