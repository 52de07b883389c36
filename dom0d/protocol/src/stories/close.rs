//! FIN and RST: held, shared, disputed.

use super::*;

fn fin(story: &mut Story, server: u32, position: u32) {
    let say = Say {
        seq: iss(server).wrapping_add(position),
        ack: at(1),
        flags: Flags::FIN.with(Flags::ACK),
        ..Say::default()
    };
    story.server_says(server, say);
}

#[test]
fn a_shared_fin_passes_at_once() {
    let mut story = Story::established(1);
    fin(&mut story, 0, 1);
    assert!(story.client.iter().all(|heard| !heard.flags.has(Flags::FIN)));
    story.client.clear();
    fin(&mut story, 1, 1);
    let heard = story.client_hears();
    assert_eq!((heard.seq, heard.flags), (iss(0) + 1, Flags::FIN.with(Flags::ACK)));
}

#[test]
fn a_lone_fin_passes_after_the_hold() {
    let mut story = Story::established(1);
    fin(&mut story, 0, 1);
    story.client.clear();
    story.wait(Duration::from_millis(19));
    story.silence();
    story.wait(Duration::from_millis(2));
    assert!(story.client_hears().flags.has(Flags::FIN));
}

#[test]
fn a_conversation_is_in_the_state_of_the_ovms_tcp() {
    let state = |story: &Story| story.service.conversations(0, 1)[0].state;
    // The OVM closes first.
    let mut story = Story::established(0);
    assert_eq!(state(&story), "ESTABLISHED");
    fin(&mut story, 0, 1);
    assert_eq!(state(&story), "FIN-WAIT-1");
    story.client_says(Say { seq: at(1), ack: iss(0) + 2, ..Say::default() });
    assert_eq!(state(&story), "FIN-WAIT-2");
    // The client closes first.
    let mut story = Story::established(0);
    let flags = Flags::FIN.with(Flags::ACK);
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, flags, ..Say::default() });
    assert_eq!(state(&story), "ESTABLISHED", "the OVM has not said that it has the FIN");
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(2), ..Say::default() });
    assert_eq!(state(&story), "CLOSE-WAIT");
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(2), flags, ..Say::default() });
    assert_eq!(state(&story), "LAST-ACK");
}

#[test]
fn both_sides_close_and_the_replica_follows() {
    let mut story = Story::established(1);
    story.client_says(Say {
        seq: at(1),
        ack: iss(0) + 1,
        flags: Flags::FIN.with(Flags::ACK),
        ..Say::default()
    });
    assert!(story.server_hears(0).flags.has(Flags::FIN));
    assert!(story.server_hears(1).flags.has(Flags::FIN));
    for server in [1, 0] {
        let say = Say {
            seq: iss(server).wrapping_add(1),
            ack: at(2),
            flags: Flags::FIN.with(Flags::ACK),
            ..Say::default()
        };
        story.server_says(server, say);
    }
    assert!(story.client_hears().flags.has(Flags::FIN));
    story.client_says(Say { seq: at(2), ack: iss(0) + 2, ..Say::default() });
    assert_eq!(story.service.status().conversations, 0);
    assert_eq!(story.server_hears(1).ack, iss(1).wrapping_add(2));
    story.wait(Duration::from_secs(61));
    assert_eq!(story.service.status().retained_bytes, 0);
}

#[test]
fn a_clients_reset_reaches_the_replica_behind_its_data() {
    let mut story = Story::established(1);
    story.client_sends(1, b"abc", 1);
    story.server_hears(0);
    story.server_hears(1);
    story.client_says(Say { seq: at(4), flags: Flags::RST, ..Say::default() });
    assert!(story.server_hears(0).flags.has(Flags::RST));
    story.silence();
    story.server_sends(1, 1, b"", 4);
    let heard = story.server_hears(1);
    assert_eq!((heard.seq, heard.flags.has(Flags::RST)), (at(4), true));
}

#[test]
fn what_a_client_left_unacknowledged_at_its_reset_stops_no_replica() {
    // A kernel with Nagle's algorithm says the rest of an answer only when what it said before is acknowledged.
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"answer", 2);
    story.server_sends(1, 1, b"answ", 2);
    story.client_says(Say { seq: at(2), ack: iss(0) + 3, ..Say::default() });
    story.servers[1].clear();
    story.client_says(Say { seq: at(2), flags: Flags::RST, ..Say::default() });
    assert_eq!(story.server_hears(1).ack, iss(1).wrapping_add(5));
}

#[test]
fn a_conversation_that_the_ovm_reset_is_not_counted_any_more() {
    let mut story = Story::established(0);
    story.server_says(
        0,
        Say { seq: iss(0) + 1, ack: at(1), flags: Flags::RST.with(Flags::ACK), ..Say::default() },
    );
    let status = story.service.status();
    assert_eq!((status.conversations, status.servers[0].covered), (0, 0));
}

#[test]
fn a_reset_is_not_shared_by_a_replica_that_still_repeats_its_fin() {
    let mut story = Story::established(1);
    fin(&mut story, 1, 1);
    fin(&mut story, 0, 1);
    assert!(story.client_hears().flags.has(Flags::FIN));
    // The FIN was lost: the client probes, and the OVM has no such connection any more.
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, ..Say::default() });
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(1), flags: Flags::RST, ..Say::default() });
    assert!(story.client.is_empty(), "held");
    story.fail_ovm();
    assert!(story.client_hears().flags.has(Flags::FIN), "said again by the replica");
    assert_eq!(story.service.status().counters["resets"], 0);
}

#[test]
fn a_reset_behind_a_held_fin_is_held_in_its_place() {
    let mut story = Story::established(1);
    fin(&mut story, 0, 1);
    story.client.clear();
    story.server_says(0, Say { seq: iss(0) + 2, ack: at(1), flags: Flags::RST, ..Say::default() });
    assert!(story.client.is_empty());
    story.wait(Duration::from_millis(21));
    let reset = story.client_hears();
    assert_eq!((reset.seq, reset.flags.has(Flags::RST)), (iss(0) + 1, true), "where the client is");
}

/// The client says `set` and closes, the OVM answers and closes, and fails; the replica has taken nothing.
fn closed_and_failed() -> Story {
    let mut story = Story::established(1);
    story.client_sends(1, b"set", 1);
    story.server_sends(0, 1, b"ok", 4);
    let closes = Flags::FIN.with(Flags::ACK);
    story.client_says(Say { seq: at(4), ack: iss(0) + 3, flags: closes, ..Say::default() });
    story.server_says(0, Say { seq: iss(0) + 3, ack: at(5), flags: closes, ..Say::default() });
    story.wait(Duration::from_millis(21));
    story.client_says(Say { seq: at(5), ack: iss(0) + 4, ..Say::default() });
    assert_eq!(story.service.status().conversations, 0);
    story.fail_ovm();
    story
}

#[test]
fn what_ended_for_the_client_is_supplied_until_the_new_ovm_has_it() {
    let mut story = closed_and_failed();
    story.wait(Duration::from_secs(70));
    story.servers[1].clear();
    story.client.clear();
    // A keepalive of the new OVM must not reach the client, which does not know the new OVM's sequence numbers.
    story.server_says(1, Say { seq: iss(1), ack: at(1), ..Say::default() });
    assert!(story.client.is_empty());
    assert_eq!(story.server_hears(1).ack, iss(1).wrapping_add(1));
    story.wait(Duration::from_secs(5));
    assert_eq!(story.server_hears(1).payload, b"set");
    story.server_sends(1, 1, b"ok", 5);
    let closes = Flags::FIN.with(Flags::ACK);
    story.server_says(1, Say { seq: iss(1).wrapping_add(3), ack: at(5), flags: closes, ..Say::default() });
    assert_eq!(story.servers[1].back().map(|heard| heard.ack), Some(iss(1).wrapping_add(4)));
    story.wait(Duration::from_secs(2));
    assert_eq!(story.service.status().retained_bytes, 0);
    assert!(story.client.is_empty());
}

#[test]
fn nothing_equals_an_ovm_that_still_has_to_take_what_clients_were_promised() {
    let mut story = closed_and_failed();
    let refused = story.command(Command::Attach { spec: spec(2), seeding: Seeding::AssumeIdentical });
    assert_eq!(refused, Err(crate::OperatorError::ConversationsOpen(1)));
}

#[test]
fn a_reset_of_the_ovm_beside_the_exact_position_is_challenged() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"answer", 2);
    story.client.clear();
    story.servers[0].clear();
    story.server_says(0, Say { seq: iss(0) + 4, ack: at(2), flags: Flags::RST, ..Say::default() });
    assert!(story.client.is_empty());
    let challenge = story.server_hears(0);
    assert_eq!((challenge.seq, challenge.ack, challenge.flags), (at(2), iss(0) + 1, Flags::ACK));
    story.server_says(0, Say { seq: iss(0) + 1, flags: Flags::RST, ..Say::default() });
    story.wait(Duration::from_millis(21));
    assert!(story.client_hears().flags.has(Flags::RST));
}

#[test]
fn a_reset_of_a_replica_beside_the_exact_position_is_challenged() {
    // A new OVM in SYN-RECEIVED answers a client's wrong acknowledgment with one, and goes on (RFC 9293 §3.10.7.4).
    let mut story = Story::established(1);
    story.server_says(1, Say { seq: iss(1).wrapping_add(40), flags: Flags::RST, ..Say::default() });
    let challenge = story.server_hears(1);
    assert_eq!((challenge.seq, challenge.ack, challenge.flags), (at(1), iss(1).wrapping_add(1), Flags::ACK));
    story.client_sends(1, b"q", 1);
    assert_eq!(story.server_hears(1).payload, b"q");
    // One that is gone answers exactly.
    story.server_says(1, Say { seq: challenge.ack, flags: Flags::RST, ..Say::default() });
    story.client_sends(2, b"q", 1);
    assert!(story.servers[1].is_empty());
}

#[test]
fn replicas_are_heard_before_a_close_passes_that_was_held_while_the_daemon_was_not_run() {
    for late in [35, 200] {
        let mut story = Story::established(1);
        // So that nothing else is overdue.
        story.wait(Duration::from_millis(1));
        fin(&mut story, 0, 1);
        story.client.clear();
        story.now = story.now + Duration::from_millis(late);
        story.tell(Input::Timeout);
        story.drain();
        story.wait(Duration::from_millis(15));
        assert!(story.client.is_empty());
        story.wait(Duration::from_millis(6));
        assert!(story.client_hears().flags.has(Flags::FIN));
    }
}

#[test]
fn what_a_kernel_takes_behind_its_dead_services_fin_is_not_asked_of_replicas() {
    let mut story = Story::established(1);
    fin(&mut story, 0, 1);
    story.client_sends(1, b"abc", 1);
    story.server_sends(0, 2, b"", 4);
    story.wait(Duration::from_millis(16));
    assert_eq!(story.service.ctx.closes.disputed(), 1, "the replica goes on where the OVM closed");
}

#[test]
fn an_unseeded_replica_shares_no_close_and_disputes_none() {
    for seeded in [0, 1] {
        let mut story = Story::new(seeded);
        let unseeded = seeded + 1;
        story.command(Command::Attach { spec: spec(unseeded), seeding: Seeding::Unseeded }).unwrap();
        story.establish(unseeded);
        fin(&mut story, unseeded, 1);
        fin(&mut story, 0, 1);
        let passed = story.client.iter().any(|heard| heard.flags.has(Flags::FIN));
        assert_eq!(passed, seeded == 0, "held for one that could take over");
        story.wait(Duration::from_millis(16));
        assert_eq!(story.service.ctx.closes.disputed(), seeded as usize);
    }
}

#[test]
fn a_replica_that_delays_its_acknowledgment_is_asked_before_a_close_passes() {
    let mut story = Story::established(1);
    story.client_sends(1, b"abc", 1);
    assert_eq!(story.server_hears(1).payload, b"abc");
    story.server_sends(0, 1, b"", 4);
    fin(&mut story, 0, 1);
    assert!(story.servers[1].is_empty());
    story.wait(Duration::from_millis(15));
    assert_eq!(story.server_hears(1).payload, b"abc", "again: a TCP answers that at once");
    story.server_sends(1, 1, b"", 4);
    assert_eq!(story.service.ctx.closes.disputed(), 1);
    story.wait(Duration::from_millis(4));
    assert!(story.servers[1].is_empty());
}

#[test]
fn a_connection_that_went_on_behind_its_reset_is_refused_where_it_is() {
    let mut story = Story::established(1);
    story.client_sends(1, b"abc", 1);
    story
        .server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(4), flags: Flags::RST, ..Say::default() });
    story.servers[1].clear();
    story.server_sends(1, 1, b"ok", 4);
    let reset = story.server_hears(1);
    assert_eq!((reset.seq, reset.flags), (at(4), Flags::RST));
}

#[test]
fn a_reset_is_not_shared_by_a_replica_that_has_closed_and_hears_the_client_out() {
    let mut story = Story::established(1);
    fin(&mut story, 1, 1);
    fin(&mut story, 0, 1);
    assert!(story.client_hears().flags.has(Flags::FIN));
    story.client_says(Say { seq: at(1), ack: iss(0) + 2, ..Say::default() });
    story.server_says(0, Say { seq: iss(0) + 2, ack: at(1), flags: Flags::RST, ..Say::default() });
    assert!(story.client.is_empty(), "held");
    story.fail_ovm();
    story.client_sends(1, b"last words", 2);
    assert!(story.servers[1].iter().any(|heard| heard.payload == b"last words"));
    assert_eq!(story.service.status().counters["resets"], 0);
}

/// The OVM closes both conversations, the replica neither. `listens`: whether the OVM accepts each SYN of the daemon;
/// the last value holds for all further SYNs.
fn lone_closes(listens: &[bool]) -> Story {
    let mut story = Story::established(1);
    story.peer.set_port(story.peer.port() + 1);
    story.client.clear();
    story.establish(1);
    story.client.clear();
    story.wait(Duration::from_millis(50));
    story.servers.iter_mut().for_each(VecDeque::clear);
    for port in [5000, 5001] {
        story.wait(Duration::from_millis(8));
        story.peer.set_port(port);
        fin(&mut story, 0, 1);
    }
    let mut answers = listens.iter().copied().chain(listens.last().copied().into_iter().cycle());
    let asked = |story: &mut Story| {
        (0..30).find_map(|_| {
            story.wait(Duration::from_millis(1));
            story.servers[0].iter().rfind(|heard| heard.flags == Flags::SYN).cloned()
        })
    };
    let mut times = 0;
    while let Some(listens) = answers.next()
        && let Some(asked) = asked(&mut story)
    {
        times += 1;
        let flags = if listens { Flags::SYN } else { Flags::RST };
        assert!(![5000, 5001].contains(&story.sender.port()));
        story.peer = story.sender;
        let ack = asked.seq.wrapping_add(1);
        story.servers[0].clear();
        story.server_says(0, Say { seq: 77, ack, flags: flags.with(Flags::ACK), ..Say::default() });
        let refused = story.servers[0].iter().any(|heard| heard.flags == Flags::RST && heard.seq == ack);
        assert_eq!(refused, listens, "nobody wants that connection");
    }
    assert!(times >= listens.len(), "asked {times} times");
    story.wait(Duration::from_millis(25));
    if listens.is_empty() {
        assert!(
            story.client.iter().all(|heard| !heard.flags.has(Flags::FIN)),
            "the closes wait for an answer"
        );
        story.wait(Duration::from_secs(1));
    }
    story
}

#[test]
fn closes_that_no_replica_shares_are_evidence_if_the_service_refuses_connections() {
    // A service that does not answer may have a full backlog. In the last case it dies connection by connection, and
    // its listening socket last.
    for (listens, dead) in
        [(&[false][..], true), (&[], false), (&[true], false), (&[true, true, false], true)]
    {
        let story = lone_closes(listens);
        let suspected = story
            .events
            .iter()
            .any(|event| matches!(event, EventKind::Suspected { evidence: Evidence::UnsharedClose, .. }));
        assert_eq!(suspected, dead, "{listens:?}");
        let closed = story.client.iter().filter(|heard| heard.flags.has(Flags::FIN)).count();
        assert_eq!(closed, if dead { 0 } else { 2 }, "{listens:?}");
        assert!(story.client.iter().all(|heard| heard.seq != 77), "no client hears of the question");
    }
}
