//! What a replica gets, when, and what it can't do.

use super::*;

#[test]
fn a_replica_is_never_acknowledged_more_than_the_client_acknowledged() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_hears(0);
    assert_eq!(story.server_hears(1).payload, b"ask");
    // The replica is faster.
    story.server_sends(1, 1, b"answer", 4);
    story.silence();
    story.server_sends(0, 1, b"answer", 4);
    assert_eq!(story.client_hears().payload, b"answer");
    story.silence();
    story.client_says(Say { seq: at(4), ack: iss(0) + 7, ..Say::default() });
    story.server_hears(0);
    assert_eq!(story.server_hears(1).ack, iss(1).wrapping_add(7));
    assert_eq!(story.service.status().servers[1].diverged, 0);
}

#[test]
fn cause_comes_before_effect() {
    // A byte that the client sends after it saw the answer waits until the replica has answered too.
    let mut story = Story::established(1);
    story.client_sends(1, b"a", 1);
    story.server_hears(0);
    story.server_hears(1);
    story.server_sends(0, 1, b"A", 2);
    story.client_hears();
    story.client_sends(2, b"b", 2);
    assert_eq!(story.server_hears(0).payload, b"b");
    assert!(story.servers[1].iter().all(|heard| heard.payload.is_empty()));
    story.servers[1].clear();
    story.server_sends(1, 1, b"A", 2);
    assert!(story.servers[1].iter().any(|heard| heard.payload == b"b"));
}

#[test]
fn a_replica_that_answers_first_is_not_kept_waiting() {
    let mut story = Story::established(1);
    story.client_sends(1, b"a", 1);
    story.server_sends(1, 1, b"A", 2);
    story.server_sends(0, 1, b"A", 2);
    story.servers[1].clear();
    story.client_sends(2, b"b", 2);
    assert!(story.servers[1].iter().any(|heard| heard.payload == b"b"));
}

#[test]
fn a_replica_that_dropped_the_third_segment_is_sent_nothing_beyond_the_clients_iss() {
    // The replica answered with a cookie, and its service's accept queue is full. It takes any other sequence number
    // for forged.
    let mut story = Story::established(1);
    story.client_sends(1, b"a", 1);
    story.client_sends(2, b"b", 1);
    story.client_says(Say {
        seq: at(3),
        ack: iss(0) + 1,
        flags: Flags::FIN.with(Flags::ACK),
        ..Say::default()
    });
    story.server_sends(0, 1, b"A", 4);
    story.wait(Duration::from_secs(1));
    assert!(story.servers[1].len() > 1, "sent again");
    assert!(story.servers[1].iter().all(|heard| heard.seq == at(1)), "{:?}", story.servers[1]);
    story.servers[1].clear();
    story.server_sends(1, 1, b"", 3);
    assert_eq!((story.server_hears(1).seq, story.servers[1].len()), (at(3), 0), "the FIN");
}

#[test]
fn a_different_answer_diverges_and_harms_nobody() {
    let mut story = Story::established(1);
    story.client_sends(1, b"q", 1);
    story.server_sends(0, 1, b"right", 2);
    assert_eq!(story.client_hears().payload, b"right");
    story.server_sends(1, 1, b"riXht", 2);
    assert!(story.client.is_empty());
    assert!(
        matches!(story.events.as_slice(), [EventKind::Diverged { position: 2, .. }]),
        "{:?}",
        story.events
    );
    assert_eq!(story.service.status().servers[1].diverged, 1);
}

#[test]
fn a_replicas_reset_uncovers_and_the_client_hears_nothing() {
    let mut story = Story::established(1);
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), flags: Flags::RST, ..Say::default() });
    story.wait(Duration::from_secs(1));
    assert!(story.client.is_empty());
    assert!(
        matches!(story.events.as_slice(), [EventKind::Stale { server: ServerId(1), .. }]),
        "{:?}",
        story.events
    );
}

#[test]
fn a_lost_segment_to_a_replica_is_sent_again() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    assert_eq!(story.server_hears(1).payload, b"ask");
    story.wait(Duration::from_millis(210));
    assert_eq!(story.server_hears(1).payload, b"ask");
}

#[test]
fn a_replicas_closed_window_is_respected_and_probed() {
    let mut story = Story::established(1);
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(1), window: 0, ..Say::default() });
    story.client_sends(1, b"ask", 1);
    assert!(story.servers[1].is_empty());
    story.wait(Duration::from_millis(250));
    assert_eq!(story.server_hears(1).seq, at(0), "a probe");
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(1), window: 2, ..Say::default() });
    assert_eq!(story.server_hears(1).payload, b"as");
}

#[test]
fn a_super_packet_is_split_for_the_client() {
    let mut story = Story::established(0);
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, window: 60_000, ..Say::default() });
    let answer = vec![b'x'; 4000];
    story.server_sends(0, 1, &answer, 1);
    let sizes: Vec<_> = story.client.iter().map(|heard| heard.payload.len()).collect();
    assert_eq!(sizes, [1460, 1460, 1080]);
}

#[test]
fn what_the_client_acknowledges_without_having_been_sent_is_dropped() {
    let mut story = Story::established(1);
    story.client_sends(1, b"x", 500);
    story.silence();
    assert_eq!(story.service.status().counters["bad_ack"], 1);
}

#[test]
fn a_window_that_shuts_on_bytes_in_flight_is_probed() {
    let mut story = Story::established(1);
    story.client_sends(1, b"abc", 1);
    assert_eq!(story.server_hears(1).payload, b"abc");
    // The replica had no room for the last byte, and its window update is lost.
    story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(3), window: 0, ..Say::default() });
    story.wait(Duration::from_millis(500));
    let probe = story.server_hears(1);
    assert_eq!((probe.seq, probe.payload.len()), (at(2), 0));
}

#[test]
fn a_replica_that_leaves_before_it_had_everything_is_stale_at_once() {
    let mut story = Story::established(2);
    story.client_sends(1, b"set", 1);
    story.server_sends(0, 1, b"ok", 4);
    // The new OVM lacks the bytes, too. What counts is the acknowledgment that the client was sent.
    story.command(Command::Failover { to: Some(ServerId(1)), force: false }).unwrap();
    story.drain();
    let leaves = Say { seq: iss(2).wrapping_add(1), ack: at(1), flags: Flags::RST, ..Say::default() };
    story.server_says(2, leaves);
    assert!(story.service.status().servers[1].stale.is_some());
}

#[test]
fn a_replica_is_told_what_arrived_beyond_a_gap() {
    // Without SACK blocks its kernel ignores a duplicate ACK, and waits for its timer.
    let mut story = Story::established(1);
    story.server_sends(1, 11, b"late", 1);
    let told = story.server_hears(1);
    let edge = |position: u32| iss(1).wrapping_add(position);
    assert_eq!((told.ack, told.sack.iter().collect::<Vec<_>>()), (edge(1), vec![(edge(11), edge(15))]));
}

#[test]
fn a_replica_that_is_ahead_in_one_conversation_is_behind_in_another_all_the_same() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"a long answer", 4);
    story.peer.set_port(story.peer.port() + 1);
    story.servers.iter_mut().for_each(VecDeque::clear);
    story.establish(1);
    story.client_sends(1, b"ask", 1);
    let behind = |story: &Story| story.service.status().servers[1].behind_bytes;
    assert_eq!(behind(&story), 3);
    story.server_sends(1, 1, b"", 4);
    story.server_sends(0, 1, b"answer", 4);
    assert_eq!(behind(&story), 6);
    story.server_sends(1, 1, b"answer and more", 4);
    assert_eq!(behind(&story), 0);
}

#[test]
fn a_replica_keeps_the_window_that_it_was_told_when_the_clients_shrinks() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, &[b'x'; 900], 4);
    story.servers[1].clear();
    story.client_says(Say { seq: at(4), ack: iss(0) + 1, window: 100, ..Say::default() });
    story.server_sends(1, 1, &[b'x'; 100], 4);
    story.client_says(Say { seq: at(4), ack: iss(0) + 101, window: 0, ..Say::default() });
    let told = story.servers[1].pop_back().unwrap();
    assert_eq!((told.ack, told.window), (iss(1).wrapping_add(101), 900));
    // The replica may have sent that much before it learned of the smaller window.
    story.server_sends(1, 101, &[b'x'; 900], 4);
    assert_eq!(story.service.status().servers[1].behind_bytes, 0);
}

#[test]
fn the_next_request_takes_the_acknowledgment_of_a_replicas_answer_along() {
    let mut story = Story::established(1);
    story.client_sends(1, b"one", 1);
    story.server_sends(0, 1, b"answer", 4);
    story.client_sends(4, b"two", 7);
    assert_eq!(story.server_hears(1).payload, b"one");
    assert!(story.server_hears(1).payload.is_empty(), "the second was asked after the answer to the first");
    story.server_sends(1, 1, b"answer", 4);
    let next = story.server_hears(1);
    assert_eq!((next.payload.as_slice(), next.ack), (b"two".as_slice(), iss(1).wrapping_add(7)));
    assert!(story.servers[1].is_empty(), "one packet is enough");
}

#[test]
fn the_byte_of_a_replicas_window_probe_is_kept_and_answered() {
    let mut story = Story::established(1);
    // The answers fill the client's window.
    let window = usize::from(Say::default().window);
    for server in [0, 1] {
        story.server_sends(server, 1, &vec![b'a'; window], 1);
    }
    story.client_says(Say { seq: at(1), ack: iss(0) + 1 + window as u32, window: 0, ..Say::default() });
    story.servers[1].clear();
    story.server_sends(1, 1 + window as u32, b"p", 1);
    let end = iss(1).wrapping_add(1 + window as u32);
    assert_eq!(story.server_hears(1).ack, end, "the client has not acknowledged it");
    // The OVM's own byte reaches the client; the replica need not repeat its byte.
    story.client_says(Say { seq: at(1), ack: iss(0) + 1 + window as u32, ..Say::default() });
    story.server_sends(0, 1 + window as u32, b"p", 1);
    story.client_says(Say { seq: at(1), ack: iss(0) + 2 + window as u32, ..Say::default() });
    assert_eq!(story.servers[1].back().map(|heard| heard.ack), Some(end.wrapping_add(1)));
}
