//! A client's ACKs, silence or address never accuse an OVM (rule 11).

use super::*;
use crate::Sign;

fn is_suspected(story: &Story) -> bool {
    story.events.iter().any(|event| matches!(event, EventKind::Suspected { .. }))
}

/// Lets time pass; the OVM's kernel answers whenever the engine asks it.
fn wait_alive(story: &mut Story, time: Duration) {
    let (until, ovm) = (story.now + time, story.service.ovm().expect("an OVM"));
    while story.now < until {
        let before = story.asked;
        story.wait(Duration::from_millis(1));
        if story.asked != before {
            story.tell(Input::Sign { server: ovm, sign: Sign::Answered });
            story.drain();
        }
    }
}

#[test]
fn a_segment_that_only_the_ovm_does_not_acknowledge_accuses_no_living_kernel() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"", 4);
    wait_alive(&mut story, Duration::from_secs(2));
    assert!(!is_suspected(&story));
    assert!(story.asked[0] > 0, "it was asked");
    assert!(story.service.status().counters["acquittals"] > 0);
    // Now it dies.
    story.wait(Duration::from_millis(260));
    assert!(is_suspected(&story));
}

/// A client's SYN that the OVM does not answer, and that the replica answers when it is asked.
fn unanswered_syn(story: &mut Story, lives: bool) {
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    for _ in 0..20 {
        match lives {
            true => wait_alive(story, Duration::from_millis(100)),
            false => story.wait(Duration::from_millis(100)),
        }
        if story.servers[1].pop_front().is_some() {
            story.syn_ack(1);
        }
    }
}

#[test]
fn a_handshake_that_the_ovm_can_not_answer_accuses_no_living_kernel() {
    for lives in [true, false] {
        let mut story = Story::new(1);
        unanswered_syn(&mut story, lives);
        assert_eq!(is_suspected(&story), !lives);
        assert!(story.asked[0] > 0, "it was asked");
    }
}

#[test]
fn an_ovm_that_asks_for_the_address_of_a_client_is_alive() {
    let mut story = Story::new(1);
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    for _ in 0..5 {
        let asks = Sign::Asked { target: story.peer.ip(), link: None };
        story.tell(Input::Sign { server: ServerId(0), sign: asks });
        story.wait(Duration::from_secs(1));
    }
    assert!(story.servers[1].is_empty(), "nobody else was asked");
    assert!(!is_suspected(&story));
}

#[test]
fn what_a_replica_says_by_its_own_clock_accuses_nobody() {
    for asked_before in [false, true] {
        let mut story = Story::established(1);
        let (mut up, mut down) = (1, 1);
        if asked_before {
            story.client_sends(1, b"ask", 1);
            for server in [0, 1] {
                story.server_sends(server, 1, b"ok", 4);
            }
            (up, down) = (4, 3);
            story.client_says(Say { seq: at(up), ack: iss(0) + down, ..Say::default() });
        }
        // The replica's timers are half a second, or one and a half seconds, ahead.
        for ahead in [1, 2] {
            for _ in 0..ahead {
                story.wait(Duration::from_millis(500));
                story.server_sends(1, down, b"tick", up);
                down += 4;
            }
            wait_alive(&mut story, Duration::from_millis(900));
            for late in (1..=ahead).rev() {
                let position = down - 4 * late;
                story.server_sends(0, position, b"tick", up);
                story.client_says(Say { seq: at(up), ack: iss(0) + position + 4, ..Say::default() });
                wait_alive(&mut story, Duration::from_millis(500));
            }
        }
        assert!(!is_suspected(&story), "{asked_before}");
    }
}

#[test]
fn an_answer_that_the_ovm_breaks_off_is_evidence() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"the first half", 4);
    story.client_says(Say { seq: at(4), ack: iss(0) + 15, ..Say::default() });
    story.wait(Duration::from_millis(100));
    // The replica is later, and produces the whole answer at once.
    story.server_sends(1, 1, b"the first half", 4);
    story.server_sends(1, 15, b", and the other", 4);
    wait_alive(&mut story, Duration::from_millis(245));
    assert!(!is_suspected(&story));
    wait_alive(&mut story, Duration::from_millis(10));
    assert!(is_suspected(&story));
}

/// Nagle's algorithm (RFC 9293 §3.7.4): a replica holds the rest of its answer back until the client acknowledges.
#[test]
fn an_answer_that_a_replica_continues_once_it_is_acknowledged_is_evidence() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    for server in [0, 1] {
        story.server_sends(server, 1, b"the first half", 4);
    }
    wait_alive(&mut story, Duration::from_millis(100));
    story.client_says(Say { seq: at(4), ack: iss(0) + 15, ..Say::default() });
    story.server_sends(1, 15, b", and the other", 4);
    wait_alive(&mut story, Duration::from_millis(255));
    assert!(is_suspected(&story));
}

#[test]
fn a_replica_that_lacks_the_request_does_not_deny_that_the_ovm_hangs() {
    let mut story = Story::established(2);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"", 4);
    story.server_sends(2, 1, b"answer", 4);
    wait_alive(&mut story, Duration::from_millis(255));
    assert!(is_suspected(&story));
}

#[test]
fn an_ovm_is_given_the_clients_acknowledgment_again_before_it_is_accused() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"part", 4);
    story.server_sends(1, 1, b"part", 4);
    // A segment that the engine accepts, and the OVM's kernel never receives.
    story.client_says(Say { seq: at(4), ack: iss(0) + 5, ..Say::default() });
    story.server_sends(1, 5, b"rest", 4);
    story.servers[0].clear();
    wait_alive(&mut story, Duration::from_millis(60));
    let heard: Vec<_> = story.servers[0].iter().map(|heard| (heard.seq, heard.ack)).collect();
    assert_eq!(heard, [(at(4), iss(0) + 5), (at(3), iss(0) + 5)]);
    // The OVM continues.
    story.server_sends(0, 5, b"rest", 4);
    wait_alive(&mut story, Duration::from_millis(300));
    assert!(!is_suspected(&story));
}

#[test]
fn an_ovm_that_can_not_reach_the_client_is_not_accused_of_saying_nothing() {
    for (asked_for, link) in [(CLIENT, None), ("10.0.0.254:0", Some(LINK)), ("10.0.0.77:0", None)] {
        let target: std::net::SocketAddr = asked_for.parse().unwrap();
        let mut story = Story::established(1);
        story.client_sends(1, b"ask", 1);
        story.server_sends(0, 1, b"", 4);
        story.server_sends(1, 1, b"answer", 4);
        story.tell(Input::Sign { server: ServerId(0), sign: Sign::Asked { target: target.ip(), link } });
        wait_alive(&mut story, Duration::from_millis(600));
        let is_stranger = asked_for == "10.0.0.77:0";
        assert_eq!(is_suspected(&story), is_stranger, "{asked_for}");
        if !is_stranger {
            // The OVM has reached the client, and hangs.
            story.server_sends(0, 1, b"", 4);
            wait_alive(&mut story, Duration::from_millis(510));
            assert!(is_suspected(&story), "{asked_for}");
        }
    }
}

#[test]
fn evidence_against_one_server_deposes_no_other() {
    let mut story = Story::new(2);
    story.tell(Input::PlanePasses);
    story.establish(2);
    story.client_sends(1, b"ask", 1);
    for server in [1, 2] {
        story.server_sends(server, 1, b"", 4);
    }
    story.wait(Duration::from_millis(260));
    let against = Output::StopPlane { accused: ServerId(0), evidence: Evidence::UnacknowledgedSegment };
    assert!(story.outputs.contains(&against), "{:?}", story.outputs);
    // An operator's command arrives before the caller confirms the evidence.
    story.tell(Input::PlaneStopped);
    story.command(Command::Switchover { to: Some(ServerId(1)) }).unwrap();
    story.drain();
    story.tell(Input::Confirmed { accused: ServerId(0), evidence: Evidence::UnacknowledgedSegment });
    story.drain();
    assert_eq!(story.service.ovm(), Some(ServerId(1)));
}
