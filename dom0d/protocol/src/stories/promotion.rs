//! The OVM is gone; the conversation is not.

use super::*;
use crate::NotPromotable;

#[test]
fn the_cutover_comes_before_any_packet_and_the_old_ovm_is_silent() {
    let mut story = Story::established(1);
    story.fail_ovm();
    assert_eq!(
        story.outputs,
        [Output::Cutover { epoch: 2, from: Some(ServerId(0)), to: ServerId(1) }, Output::Fence(ServerId(0)),]
    );
    story.server_sends(0, 1, b"ghost", 1);
    assert!(story.client.is_empty());
    assert_eq!(story.service.status().counters["fenced"], 1);
}

#[test]
fn an_answer_that_only_the_replica_has_reaches_the_client_at_once() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"answer", 4);
    assert!(story.client.is_empty());
    story.fail_ovm();
    let heard = story.client_hears();
    assert_eq!((heard.seq, heard.ack, heard.payload.as_slice()), (iss(0) + 1, at(4), &b"answer"[..]));
    story.wait(Duration::from_millis(1));
    assert!(
        story
            .events
            .iter()
            .any(|event| matches!(event, EventKind::Recuperated { recuperated: 1, reset: 0, .. }))
    );
}

#[test]
fn bytes_that_the_ovm_acknowledged_and_the_replica_lacks_are_supplied() {
    let mut story = Story::established(1);
    story.client_sends(1, b"write", 1);
    story.servers[1].clear(); // lost on its vif
    story.server_sends(0, 1, b"", 6);
    assert_eq!(story.client_hears().ack, at(6));
    story.fail_ovm();
    story.wait(Duration::from_millis(210));
    assert_eq!(story.server_hears(1).payload, b"write");
    assert!(story.client.iter().all(|heard| heard.ack == at(6)), "never takes an ACK back");
    story.server_sends(1, 1, b"done", 6);
    assert_eq!(story.client.back().map(|heard| heard.payload.clone()), Some(b"done".to_vec()));
}

#[test]
fn what_the_client_lacks_is_sent_again_without_waiting_for_a_timer() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"lost", 2);
    story.client.clear(); // lost on the way
    story.fail_ovm();
    assert_eq!(story.client_hears().payload, b"lost");
}

#[test]
fn a_new_ovm_that_answers_differently_resets_the_conversation() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"right", 2);
    story.client.clear();
    story.fail_ovm();
    story.client.clear();
    story.server_sends(1, 1, b"wrong", 2);
    story.wait(Duration::from_millis(2));
    assert!(story.client.iter().any(|heard| heard.flags.has(Flags::RST)), "{:?}", story.client);
    assert!(story.client.iter().all(|heard| !heard.payload.windows(5).any(|bytes| bytes == b"wrong")));
    // The reset is exact once the client has told its RCV.NXT.
    story.client.clear();
    story.client_says(Say { seq: at(2), ack: iss(0) + 3, ..Say::default() });
    let reset = story.client_hears();
    assert_eq!((reset.seq, reset.flags), (iss(0) + 3, Flags::RST));
}

#[test]
fn a_stale_replica_is_not_promoted_though_nothing_else_is_left() {
    let mut story = Story::new(0);
    story.command(Command::Attach { spec: spec(1), seeding: Seeding::Unseeded }).unwrap();
    story.open();
    story.fail_ovm();
    assert!(story.outputs.is_empty());
    assert!(
        story
            .events
            .iter()
            .any(|event| matches!(event, EventKind::NoCandidate { because, .. } if because.len() == 1))
    );
    assert_eq!(story.command(Command::Failover { to: Some(ServerId(1)), force: true }), Ok(()));
}

#[test]
fn silence_of_the_ovm_alone_is_evidence_after_its_limit() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"", 4);
    story.wait(Duration::from_millis(245));
    assert!(story.outputs.is_empty());
    assert!(story.servers[0].len() >= 2, "the OVM was reminded");
    story.wait(Duration::from_millis(10));
    assert!(story.events.iter().any(|event| matches!(
        event,
        EventKind::Suspected { evidence: Evidence::UnacknowledgedSegment, .. }
    )));
}

#[test]
fn an_answer_that_the_ovm_does_not_begin_is_evidence_after_its_limit() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"", 4);
    story.server_sends(1, 1, b"answer", 4);
    story.wait(Duration::from_millis(245));
    assert!(story.outputs.is_empty());
    story.wait(Duration::from_millis(10));
    assert!(
        story
            .events
            .iter()
            .any(|event| matches!(event, EventKind::Suspected { evidence: Evidence::NoProgress, .. }))
    );
    assert_eq!(story.client.back().map(|heard| heard.payload.clone()), Some(b"answer".to_vec()));
}

#[test]
fn the_wait_begins_when_the_ovm_was_handed_the_request_last() {
    for repeated in [false, true] {
        let mut story = Story::established(1);
        story.client_sends(1, b"ask", 1);
        story.server_sends(1, 1, b"answer", 4);
        story.wait(Duration::from_millis(40));
        if repeated {
            // The earlier copy may have been lost on the way to the OVM.
            story.client_sends(1, b"ask", 1);
        }
        // A delayed ACK (RFC 9293 §3.8.6.3).
        story.server_sends(0, 1, b"", 4);
        story.wait(Duration::from_millis(215));
        let suspected = story
            .events
            .iter()
            .any(|event| matches!(event, EventKind::Suspected { evidence: Evidence::NoProgress, .. }));
        assert_eq!(suspected, !repeated);
    }
}

#[test]
fn the_wait_begins_anew_when_a_reminder_may_have_brought_the_request() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"answer", 4);
    story.wait(Duration::from_millis(220));
    story.server_sends(0, 1, b"", 4);
    let suspected = |story: &Story| story.events.iter().any(|e| matches!(e, EventKind::Suspected { .. }));
    story.wait(Duration::from_millis(200));
    assert!(!suspected(&story));
    story.wait(Duration::from_millis(60));
    assert!(suspected(&story));
}

#[test]
fn a_window_that_stays_shut_where_a_replicas_is_open_is_evidence() {
    let mut story = Story::established(1);
    story.client_sends(1, b"upload", 1);
    let open = Say { seq: iss(1).wrapping_add(1), ack: at(7), window: 5000, ..Say::default() };
    story.server_says(1, open);
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(7), window: 0, ..Say::default() });
    story.wait(Duration::from_millis(245));
    assert!(story.outputs.is_empty());
    story.wait(Duration::from_millis(10));
    assert!(
        story
            .events
            .iter()
            .any(|event| matches!(event, EventKind::Suspected { evidence: Evidence::NoProgress, .. }))
    );
}

#[test]
fn a_planned_switchover_and_back_keeps_the_conversation() {
    let mut story = Story::established(1);
    for (to, other, position) in [(1, 0, 1u32), (0, 1, 2)] {
        assert_eq!(story.command(Command::Switchover { to: None }), Ok(()));
        story.drain();
        story.client.clear();
        story.client_sends(position, b"q", position);
        story.server_sends(to, position, b"A", position + 1);
        assert_eq!(story.client_hears().payload, b"A");
        story.server_sends(other, position, b"A", position + 1);
        story.client_says(Say { seq: at(position + 1), ack: iss(0) + position + 1, ..Say::default() });
        story.client.clear();
    }
    assert_eq!(story.service.status().counters["resets"], 0);
    assert_eq!(story.service.status().servers.iter().filter(|server| server.stale.is_some()).count(), 0);
}

#[test]
fn an_ovm_that_was_an_rvm_for_no_time_at_all_goes_on() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    for server in [0, 1] {
        story.server_sends(server, 1, b"A", 2);
    }
    story.client_says(Say { seq: at(2), ack: iss(0) + 2, ..Say::default() });
    story.command(Command::Switchover { to: None }).unwrap();
    story.drain();
    story.client_sends(2, b"r", 2);
    story.server_sends(1, 2, b"B", 3);
    story.client_says(Say { seq: at(3), ack: iss(0) + 3, ..Say::default() });
    // Two switchovers, there and back, before the conversation has a turn.
    story.command(Command::Switchover { to: None }).unwrap();
    story.command(Command::Switchover { to: None }).unwrap();
    story.drain();
    story.client.clear();
    story.servers[1].clear();
    story.client_sends(3, b"s", 3);
    assert_eq!(story.server_hears(1).payload, b"s");
    story.server_sends(1, 3, b"C", 4);
    assert_eq!(story.client_hears().payload, b"C");
}

#[test]
fn a_former_ovm_may_acknowledge_what_the_client_itself_sent_it_beyond_a_gap() {
    let mut story = Story::configured(1, |config| config.limits.inflight_bytes = 1);
    story.establish(1);
    story.client_sends(2, b"bc", 1);
    assert_eq!(story.server_hears(0).payload, b"bc");
    story.command(Command::Switchover { to: None }).unwrap();
    story.drain();
    story.servers[0].clear();
    story.client_sends(1, b"a", 1);
    assert_eq!(story.server_hears(0).payload, b"a");
    story.server_sends(0, 1, b"", 4);
    let acknowledged = story.service.conversations(0, 1)[0].legs[0].acknowledged_bytes;
    assert_eq!(acknowledged, 3);
}

#[test]
fn a_new_ovm_still_gets_the_bytes_of_a_conversation_that_had_to_be_reset() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"right", 2);
    story.server_sends(1, 1, b"wrong", 2);
    story.servers[1].clear();
    story.client_sends(2, b"set", 6);
    story.server_sends(0, 6, b"ok", 5);
    story.servers[1].clear(); // lost on its vif
    story.fail_ovm();
    story.wait(Duration::from_millis(210));
    assert!(story.client.iter().any(|heard| heard.flags.has(Flags::RST)));
    assert!(story.servers[1].iter().all(|heard| !heard.flags.has(Flags::RST)));
    assert!(story.servers[1].iter().any(|heard| heard.payload == b"set"));
    story.servers[1].clear();
    // The new OVM has read the request: its answer is as long as the old one's.
    story.server_sends(1, 6, b"ok", 5);
    let reset = story.servers[1].pop_back().unwrap();
    assert_eq!((reset.seq, reset.flags.has(Flags::RST)), (at(5), true));
}

#[test]
fn what_a_new_ovm_says_where_it_differed_is_never_for_the_client() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"right", 2);
    story.fail_ovm();
    story.server_sends(1, 1, b"wrong", 1);
    story.wait(Duration::from_secs(70));
    story.client.clear();
    // The new OVM has not acknowledged the client's byte yet, so it was not reset, and retransmits its answer.
    story.server_sends(1, 1, b"wrong", 1);
    assert!(story.client.is_empty());
}

#[test]
fn a_new_ovm_is_not_counted_as_ahead_of_its_own_answers() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"answer", 4);
    story.fail_ovm();
    assert_eq!(story.service.ctx.queue.ovm_server().map(|ovm| ovm.sums.behind), Some(0));
}

#[test]
fn a_new_ovm_whose_window_stays_shut_is_accused() {
    let mut story = Story::established(2);
    story.client_sends(1, b"upload", 1);
    story.servers[1].clear();
    story.servers[2].clear();
    story.server_sends(0, 1, b"", 7);
    let open = Say { seq: iss(2).wrapping_add(1), ack: at(7), window: 5000, ..Say::default() };
    story.server_says(2, open);
    story.command(Command::Failover { to: Some(ServerId(1)), force: false }).unwrap();
    story.drain();
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(4), window: 0, ..Say::default() });
    story.wait(Duration::from_millis(260));
    assert_eq!(story.service.ovm(), Some(ServerId(2)), "{:?}", story.events);
}

#[test]
fn an_ovm_that_may_not_have_heard_of_the_clients_acknowledgment_is_not_accused() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"part", 4);
    story.server_sends(1, 1, b"part, rest", 4);
    // The acknowledgment was lost. A keepalive repeats it, but strict servers ignore the acknowledgment of a keepalive.
    story.client_says(Say { seq: at(3), ack: iss(0) + 5, payload: b"k", ..Say::default() });
    story.wait(Duration::from_millis(400));
    assert!(story.outputs.is_empty(), "{:?}", story.events);
    story.client_says(Say { seq: at(4), ack: iss(0) + 5, ..Say::default() });
    story.wait(Duration::from_millis(260));
    assert!(!story.outputs.is_empty());
}

/// Nobody answers a connection that a replica opens, so its state may differ from the OVM's by now.
#[test]
fn a_replica_that_opens_connections_of_its_own_is_promoted_only_by_an_operator() {
    let mut story = Story::established(1);
    for server in [0, 1] {
        story.tell(Input::OwnConnection { server: ServerId(server) });
    }
    let status = story.service.status();
    let why: Vec<_> = status.servers.iter().map(|server| server.not_promotable).collect();
    assert_eq!(why, [Some(NotPromotable::IsOvm), Some(NotPromotable::OwnConnections)]);
    story.fail_ovm();
    assert_eq!(story.service.ovm(), Some(ServerId(0)));
    assert!(matches!(
        story.events.last(),
        Some(EventKind::NoCandidate { because, .. }) if *because == [(ServerId(1), NotPromotable::OwnConnections)]
    ));
    assert_eq!(
        story.command(Command::Failover { to: Some(ServerId(1)), force: false }),
        Err(OperatorError::NotPromotable)
    );
    assert_eq!(story.command(Command::Failover { to: Some(ServerId(1)), force: true }), Ok(()));
}

#[test]
fn a_service_has_seven_replicas_and_no_more_and_outlives_seven_of_its_servers() {
    let mut story = Story::established(7);
    assert_eq!(
        story.command(Command::Attach { spec: spec(8), seeding: Seeding::Unseeded }),
        Err(OperatorError::QueueFull(MAX_SERVERS))
    );
    for survivor in 1..=7 {
        story.fail_ovm();
        story.wait(Duration::from_millis(5));
        assert_eq!(story.service.ovm(), Some(ServerId(survivor)));
        let position = survivor;
        story.client_sends(position, b"?", position);
        for server in survivor..=7 {
            story.server_sends(server, position, b"!", position + 1);
        }
        assert_eq!(story.client.pop_back().map(|heard| heard.payload), Some(b"!".to_vec()), "{survivor}");
        story.client_says(Say { seq: at(position + 1), ack: iss(0) + position + 1, ..Say::default() });
        story.wait(Duration::from_millis(1));
        // The engine allows only three unplanned promotions within the window.
        story.wait(story.service.config().timing.promotion_window);
        story.client.clear();
    }
}
