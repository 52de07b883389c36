//! What clients, servers and strangers try to do.

use super::*;

#[test]
fn an_ovm_that_contradicts_itself_beyond_a_gap_is_held_to_its_first_word() {
    let mut story = Story::established(1);
    story.server_sends(0, 100, b"first", 1);
    assert_eq!(story.client_hears().payload, b"first");
    story.server_sends(0, 99, b"!other", 1);
    assert_eq!(story.client_hears().payload, b"!first");
}

/// What a server received: position, text, and whether it had FIN.
fn heard_by(story: &mut Story, server: u32) -> Vec<(u32, Vec<u8>, bool)> {
    let heard = story.servers[server as usize].drain(..);
    heard
        .map(|heard| (heard.seq.wrapping_sub(CLIENT_ISS), heard.payload, heard.flags.has(Flags::FIN)))
        .collect()
}

fn is_promotable(story: &Story, server: usize) -> bool {
    story.service.status().servers[server].not_promotable.is_none()
}

#[test]
fn a_client_that_contradicts_itself_is_held_to_its_first_word_everywhere() {
    let mut story = Story::established(1);
    story.client_sends(4, b"first", 1);
    assert_eq!(heard_by(&mut story, 0), [(4, b"first".to_vec(), false)]);
    story.client_sends(1, b"SETother!", 1);
    assert_eq!(heard_by(&mut story, 0), [(1, b"SETfirst!".to_vec(), false)]);
    assert_eq!(heard_by(&mut story, 1), [(1, b"SETfirst!".to_vec(), false)]);
    assert!(is_promotable(&story, 1));
}

#[test]
fn the_ovm_gets_nothing_beyond_the_window_that_was_told() {
    let mut story = Story::established(1);
    // The window is 1000 bytes; some kernels accept a whole segment that begins in it.
    story.client_sends(1, &[7; 1300], 1);
    assert_eq!(heard_by(&mut story, 0), [(1, vec![7; 1000], false)]);
    story.server_sends(0, 1, b"", 1001);
    assert!(is_promotable(&story, 1));
}

#[test]
fn a_probe_of_a_closed_window_is_answered_without_its_byte() {
    let mut story = Story::established(0);
    story.client_sends(1, &[7; 1000], 1);
    story.servers[0].clear();
    story.server_says(0, Say { seq: iss(0) + 1, ack: at(1001), window: 0, ..Say::default() });
    story.client_sends(1001, b"?", 1);
    assert_eq!(heard_by(&mut story, 0), [(1000, vec![], false)]);
}

#[test]
fn text_behind_a_fin_reaches_nobody() {
    let mut story = Story::established(1);
    story.client_says(Say {
        seq: at(4),
        ack: iss(0) + 1,
        flags: Flags::FIN.with(Flags::ACK),
        payload: b"d",
        ..Say::default()
    });
    story.client_sends(1, b"abcdEVIL", 1);
    let all: Vec<u8> = heard_by(&mut story, 0).into_iter().flat_map(|(_, text, _)| text).collect();
    assert_eq!(all, b"dabcd");
    story.client_sends(5, b"EVIL", 1);
    assert!(heard_by(&mut story, 0).iter().all(|(_, text, _)| text.is_empty()));
    assert!(heard_by(&mut story, 1).iter().all(|(_, text, _)| !text.ends_with(b"EVIL")));
}

#[test]
fn a_fin_before_recorded_text_is_none() {
    let mut story = Story::established(1);
    story.client_sends(5, b"later", 1);
    story.client_says(Say {
        seq: at(1),
        ack: iss(0) + 1,
        flags: Flags::FIN.with(Flags::ACK),
        payload: b"ab",
        ..Say::default()
    });
    assert_eq!(heard_by(&mut story, 0), [(5, b"later".to_vec(), false), (1, b"ab".to_vec(), false)]);
}

#[test]
fn a_segment_of_another_time_elicits_an_answer_and_nothing_else() {
    // A guest whose TS.Recent is 0 accepts any TSval (Linux does); the daemon follows RFC 7323.
    let mut story = Story::new(1);
    story.timestamps = true;
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    story.syn_ack(0);
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, tsecr: 1000, ..Say::default() });
    story.servers[0].clear();
    story.client_says(Say {
        seq: at(1),
        ack: iss(0) + 1,
        tsval: (1 << 31) + 5,
        payload: b"SET",
        ..Say::default()
    });
    assert_eq!(heard_by(&mut story, 0), [(1, vec![], false)]);
}

#[test]
fn a_reset_before_recorded_text_is_challenged_by_the_daemon() {
    // The OVM may or may not have accepted the text by now: a replica could not know what to keep.
    let mut story = Story::established(1);
    story.client_sends(1, b"SET", 1);
    story.servers[0].clear();
    story.client_says(Say { seq: at(1), flags: Flags::RST, ..Say::default() });
    assert_eq!(heard_by(&mut story, 0), []);
    let challenge = story.client_hears();
    assert_eq!((challenge.ack, challenge.flags), (at(1), Flags::ACK));
    story.server_sends(0, 1, b"", 4);
    story.client_hears();
    story.server_sends(1, 1, b"", 4);
    story.client_says(Say { seq: at(4), flags: Flags::RST, ..Say::default() });
    assert_eq!(story.server_hears(0).flags, Flags::RST);
    assert_eq!(story.service.status().conversations, 0);
    assert!(is_promotable(&story, 1));
    // What the client sends after its own RST does not reach the OVM alone.
    story.client_sends(4, b"EVIL", 1);
    assert_eq!(heard_by(&mut story, 0), []);
}

#[test]
fn nobody_speaks_in_the_name_of_a_guest() {
    // The guest's kernel would silently drop the SYN, and look dead.
    let mut story = Story::new(1);
    for server in 0..2 {
        let syn = Segment {
            src: format!("10.0.0.{}:7000", 10 + server).parse().unwrap(),
            dst: PSC.parse().unwrap(),
            seq: 1,
            ack: 0,
            flags: Flags::SYN,
            window: 1000,
            urgent: 0,
            options: Options::default(),
            ecn: 0,
            payload: b"",
        };
        story.tell(Input::Client { link: LINK, passage: Passage::Kept, packet: &syn.emit() });
        story.drain();
    }
    story.silence();
}

#[test]
fn a_deposed_server_is_silent_from_the_cutover_itself() {
    let mut story = Story::established(1);
    story.command(Command::Switchover { to: Some(ServerId(1)) }).unwrap();
    // Before anything else happens in the conversation.
    let late = Segment {
        src: "10.0.0.10:80".parse().unwrap(),
        dst: CLIENT.parse().unwrap(),
        seq: iss(0) + 1,
        ack: at(1),
        flags: Flags::ACK,
        window: 1000,
        urgent: 0,
        options: Options::default(),
        ecn: 0,
        payload: b"late",
    };
    story.tell(Input::Server { server: ServerId(0), passage: Passage::Kept, packet: &late.emit() });
    story.drain();
    assert!(story.client.iter().all(|heard| heard.payload.is_empty()));
}

#[test]
fn a_reset_beside_the_exact_position_closes_nothing() {
    let mut story = Story::established(1);
    story.client_says(Say { seq: at(50), flags: Flags::RST, ..Say::default() });
    assert_eq!((story.client_hears().ack, story.service.status().conversations), (at(1), 1));
    story.client_says(Say { seq: at(50_000), flags: Flags::RST, ..Say::default() });
    assert_eq!(story.service.status().conversations, 1);
    story.silence();
}

#[test]
fn a_third_segment_that_the_ovm_refuses_opens_nothing() {
    for (seq, ack) in [(at(1), iss(0) + 500), (at(5000), iss(0) + 1), (at(1), iss(0))] {
        let mut story = Story::new(1);
        story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
        story.syn_ack(0);
        story.client_says(Say { seq, ack, ..Say::default() });
        assert_eq!(story.service.status().conversations, 0);
        assert!(story.servers[1].is_empty());
    }
}

#[test]
fn a_replica_that_takes_nothing_does_not_stop_the_client() {
    let mut story = Story::configured(1, |config| config.limits.conversation_bytes = 4 << 10);
    story.establish(1);
    let mut position = 1;
    for _ in 0..60 {
        story.wait(Duration::from_millis(20));
        story.client_sends(position, &[7; 500], 1);
        let taken: usize = story.servers[0].drain(..).map(|heard| heard.payload.len()).sum();
        position += taken as u32;
        story.server_sends(0, 1, b"", position);
        // The replica makes just enough progress that no time limit evicts it.
        story.server_sends(1, 1, b"", 1 + position / 500);
        story.servers[1].clear();
    }
    assert!(position > 9_000, "{position}");
    assert!(story.events.iter().any(|event| matches!(event, EventKind::Evicted { .. })));
}

#[test]
fn a_client_that_acknowledges_byte_by_byte_does_not_stop_replicas() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, &[5; 800], 4);
    story.server_sends(1, 1, &[5; 800], 4);
    story.servers[1].clear();
    for acked in 2..6 {
        story.wait(Duration::from_millis(300));
        story.client_says(Say { seq: at(4), ack: iss(0) + acked, ..Say::default() });
    }
    let told = story.servers[1].iter().map(|heard| heard.ack.wrapping_sub(iss(1))).max();
    assert_eq!(told, Some(801));
}

#[test]
fn a_replica_fills_no_memory_beyond_the_clients_window() {
    let mut story = Story::established(1);
    let before = story.service.status().retained_bytes;
    for segment in 0..100 {
        story.server_sends(1, 2 + segment * 1000, &[9; 999], 1);
        story.servers[1].clear();
    }
    let retained = story.service.status().retained_bytes - before;
    // The window is 1000 bytes.
    assert!(retained < 2_000, "{retained}");
}

#[test]
fn a_tiny_mss_does_not_multiply_packets() {
    let mut story = Story::new(1);
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    for server in 0..2 {
        let syn_ack = Segment {
            src: format!("10.0.0.{}:80", 10 + server).parse().unwrap(),
            dst: CLIENT.parse().unwrap(),
            seq: iss(server),
            ack: at(1),
            flags: Flags::SYN.with(Flags::ACK),
            window: 1000,
            urgent: 0,
            options: Options { mss: Some(1), ..Options::default() },
            ecn: 0,
            payload: b"",
        };
        story.tell(Input::Server {
            server: ServerId(server),
            passage: Passage::Kept,
            packet: &syn_ack.emit(),
        });
        story.client_says(Say { seq: at(1), ack: iss(0) + 1, ..Say::default() });
        story.servers.iter_mut().for_each(VecDeque::clear);
    }
    story.client_sends(1, &[7; 880], 1);
    // The replica gets the rest once it has shown that it has the connection.
    story.server_sends(1, 1, b"", 89);
    assert_eq!((story.servers[0].len(), story.servers[1].len()), (10, 10));
}

#[test]
fn addresses_used_again_at_once_do_not_make_replicas_stale() {
    let mut story = Story::established(1);
    story.client_sends(1, b"SET", 1);
    story.client_says(Say { seq: at(4), flags: Flags::RST, ..Say::default() });
    story.servers.iter_mut().for_each(VecDeque::clear);
    let again = || Say { seq: at(100_000), flags: Flags::SYN, ..Say::default() };
    story.client_says(again());
    assert!(story.servers[0].is_empty());
    story.server_sends(1, 1, b"", 4);
    story.client_says(again());
    assert_eq!(story.server_hears(0).flags, Flags::SYN);
    assert!(is_promotable(&story, 1));
}

#[test]
fn a_syn_in_an_open_conversation_reaches_no_server() {
    // An OVM that closed for it would refuse what replicas took.
    let mut story = Story::established(1);
    for seq in [CLIENT_ISS, at(1), at(100_000)] {
        story.client_says(Say { seq, flags: Flags::SYN, payload: b"SET", ..Say::default() });
        let challenge = story.client_hears();
        assert_eq!((challenge.seq, challenge.ack, challenge.flags), (iss(0) + 1, at(1), Flags::ACK));
        story.silence();
    }
    story.fail_ovm();
    story.silence();
    assert_eq!(story.service.status().conversations, 1);
}

#[test]
fn a_request_that_no_service_reads_evicts_nobody() {
    // The replica's receive buffer is the smaller one.
    for reads in [false, true] {
        let mut story = Story::established(1);
        story.client_sends(1, &[7; 500], 1);
        story.server_sends(0, 1, b"", 501);
        story.server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(101), window: 0, ..Say::default() });
        story.client_sends(501, &[7; 100], 1);
        for second in 0..15 {
            story.wait(Duration::from_secs(1));
            // The replica's kernel lives, and reports a closed window.
            story.server_says(
                1,
                Say { seq: iss(1).wrapping_add(1), ack: at(501), window: 0, ..Say::default() },
            );
            let window = if reads { 1000 + second } else { 900 };
            story.server_says(0, Say { seq: iss(0) + 1, ack: at(601), window, ..Say::default() });
        }
        let evicted = story.events.iter().any(|event| matches!(event, EventKind::Evicted { .. }));
        assert_eq!(evicted, reads);
    }
}

#[test]
fn an_ovm_that_acknowledges_too_much_is_not_counted_as_behind_for_ever() {
    let mut story = Story::established(0);
    story.server_sends(0, 1, b"", 12);
    story.client_sends(1, &[7; 100], 1);
    story.server_sends(0, 1, b"", 101);
    assert_eq!(story.service.status().servers[0].behind_bytes, 0);
}

#[test]
fn a_fin_behind_a_held_reset_leaves_no_deadline_that_can_not_be_met() {
    let mut story = Story::established(1);
    let close = |flags| Say { seq: iss(0) + 1, ack: at(1), flags, ..Say::default() };
    story.server_says(0, close(Flags::RST.with(Flags::ACK)));
    story.server_says(0, close(Flags::FIN.with(Flags::ACK)));
    story.wait(Duration::from_secs(2));
    assert!(story.service.next_timeout().is_none_or(|due| due > story.now));
    assert_eq!(story.service.status().conversations, 0);
}

#[test]
fn what_an_ovm_says_beyond_the_clients_window_keeps_nobody_from_recuperating() {
    let mut story = Story::established(1);
    story.server_sends(0, 1 << 30, b"far", 1);
    story.server_sends(0, 900, &[9; 400], 1);
    let heard = story.client.drain(..).map(|heard| heard.payload.len()).sum::<usize>();
    // A window of 1000 bytes, and the byte of a probe.
    assert_eq!(heard, 102);
    story.server_says(
        0,
        Say { seq: iss(0) + (1 << 20), ack: at(1), flags: Flags::FIN.with(Flags::ACK), ..Say::default() },
    );
    assert!(is_promotable(&story, 1));
    story.silence();
}

#[test]
fn an_ovm_that_acknowledges_what_nobody_was_told_to_send_is_not_heard() {
    let mut story = Story::established(1);
    story.server_sends(0, 1, b"lie", 80_000);
    story.silence();
    assert!(is_promotable(&story, 1));
}

#[test]
fn what_the_ovm_acknowledges_and_nobody_recorded_every_replica_lacks() {
    // It does not matter how the bytes reached the OVM: a host that can reach the guest's own address can send it some.
    let mut story = Story::established(2);
    story.client_sends(1, b"SET", 1);
    story.server_hears(0);
    story.server_sends(0, 1, b"OK", 12);
    // The client still gets the acknowledgment and the answer.
    let answer = story.client_hears();
    assert_eq!((answer.ack, answer.payload), (at(12), b"OK".to_vec()));
    for replica in [1, 2] {
        assert!(!is_promotable(&story, replica));
    }
    story.client_sends(12, b"GET", 3);
    assert_eq!(heard_by(&mut story, 0), [(12, b"GET".to_vec(), false)]);
    story.server_sends(0, 3, b"1", 15);
    assert_eq!(story.client_hears().payload, b"1");
    let status = story.service.status();
    assert_eq!((status.servers[0].behind_bytes, status.counters["acknowledged_unrecorded"]), (0, 1));
    // No replica is known to equal the OVM, so none is promoted.
    story.fail_ovm();
    assert_eq!(story.service.ovm(), Some(ServerId(0)));
}

/// The client's segment with an IP header that `change` has modified.
fn with_ip_header(mut packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut packet);
    packet
}

#[test]
fn what_a_guests_kernel_drops_acknowledges_nothing() {
    let mut story = Story::established(1);
    story.client_sends(1, b"GET big", 1);
    for server in 0..2 {
        story.server_sends(server, 1, &[7; 800], 8);
    }
    story.servers.iter_mut().for_each(VecDeque::clear);
    let acknowledgment = story.client_packet(&Say { seq: at(8), ack: iss(0) + 801, ..Say::default() });
    let broken = [
        // The checksum of the IP header, that of the segment, a record of the route.
        with_ip_header(acknowledgment.clone(), |packet| packet[10] ^= 0x5a),
        with_ip_header(acknowledgment.clone(), |packet| packet[36] ^= 0x5a),
        with_ip_header(acknowledgment, |packet| {
            packet.splice(20..20, [7, 3, 4, 0]);
            (packet[0], packet[3]) = (0x46, packet[3] + 4);
            packet[10..12].fill(0);
            let sum: u32 =
                packet[..24].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }),
    ];
    for packet in broken {
        story.tell(Input::Client { link: LINK, passage: Passage::Kept, packet: &packet });
        story.drain();
    }
    assert!(story.servers.iter().all(VecDeque::is_empty), "it was handed on: {:?}", story.servers);
    let counters = story.service.status().counters;
    let counted = ["malformed_header", "bad_checksum", "ip_options"].map(|name| counters[name]);
    assert_eq!(counted, [1, 1, 1]);
}

#[test]
fn urgent_pointers_reach_no_server() {
    let mut story = Story::established(1);
    story.client_says(Say {
        seq: at(1),
        ack: iss(0) + 1,
        flags: Flags::ACK.with(Flags::URG),
        payload: b"!",
        ..Say::default()
    });
    for server in 0..2 {
        let heard = story.server_hears(server);
        assert_eq!((heard.payload.as_slice(), heard.flags.has(Flags::URG)), (&b"!"[..], false));
    }
}

#[test]
fn a_request_that_the_ovm_refused_is_kept_from_replicas_or_makes_them_stale() {
    for given in [false, true] {
        let mut story = Story::established(1);
        if !given {
            // The replica's window is closed for now.
            story
                .server_says(1, Say { seq: iss(1).wrapping_add(1), ack: at(1), window: 0, ..Say::default() });
        }
        story.client_sends(1, b"SET", 1);
        story.server_says(
            0,
            Say { seq: iss(0) + 1, ack: at(1), flags: Flags::RST.with(Flags::ACK), ..Say::default() },
        );
        story.wait(Duration::from_millis(30));
        assert_eq!(is_promotable(&story, 1), !given);
        let bytes: usize = story.servers[1].drain(..).map(|heard| heard.payload.len()).sum();
        assert_eq!(bytes, if given { 3 } else { 0 });
    }
}

#[test]
fn what_is_left_of_an_unknown_conversation_makes_nobody_stale() {
    let mut story = Story::new(1);
    let close = Say { seq: iss(0) + 1, ack: at(1), flags: Flags::FIN.with(Flags::ACK), ..Say::default() };
    story.server_says(0, close);
    story.client_says(Say { seq: at(1), ack: iss(0) + 2, ..Say::default() });
    story.server_sends(0, 2, b"", 1);
    assert!(is_promotable(&story, 1));
}

#[test]
fn an_unknown_conversation_is_refused_where_a_replica_would_lack_it() {
    for (seeding, refused) in [(Seeding::AssumeIdentical, true), (Seeding::Unseeded, false)] {
        let mut story = Story::new(0);
        story.command(Command::Attach { spec: spec(1), seeding }).unwrap();
        story.drain();
        story.client_sends(1, b"SET", 2);
        let heard = story.server_hears(0);
        assert_eq!((heard.flags.has(Flags::RST), heard.payload.is_empty()), (refused, refused));
        if refused {
            let reset = story.client_hears();
            assert_eq!((reset.seq, reset.flags), (iss(0) + 2, Flags::RST));
            // If the OVM has that conversation, it is refused, too.
            story.server_sends(0, 2, b"OK", 4);
            assert_eq!(story.server_hears(0).flags, Flags::RST);
            assert!(story.client.iter().all(|heard| heard.payload.is_empty()));
        } else {
            story.server_sends(0, 2, b"OK", 4);
            assert_eq!(story.client_hears().payload, b"OK");
        }
        assert_eq!(is_promotable(&story, 1), refused);
        assert_eq!(story.service.status().counters["unknown_refused"] > 0, refused);
    }
}

#[test]
fn a_handshake_that_others_pushed_out_costs_nobody_a_replica() {
    let mut story = Story::configured(1, |config| config.limits.embryonic = 8);
    let pushed: std::net::SocketAddr = "10.0.0.1:6000".parse().unwrap();
    story.establish(1);
    let honest = std::mem::replace(&mut story.peer, pushed);
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    story.syn_ack(0);
    story.wait(Duration::from_secs(1));
    for port in 7000..7020 {
        story.peer.set_port(port);
        story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    }
    story.client.clear();
    story.servers.iter_mut().for_each(VecDeque::clear);
    story.peer = pushed;
    story.client_sends(1, b"SET", 1);
    assert!(story.server_hears(0).flags.has(Flags::RST));
    assert!(story.client_hears().flags.has(Flags::RST));
    story.silence();
    assert!(is_promotable(&story, 1));
    // A handshake that the client's segment does not complete costs no replica either.
    story.wait(Duration::from_secs(1));
    story.servers.iter_mut().for_each(VecDeque::clear);
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    story.syn_ack(0);
    story.servers[0].clear();
    story.client_says(Say { seq: at(5_000), ack: iss(0) + 1, payload: b"SET", ..Say::default() });
    assert_eq!(story.server_hears(0).payload, b"");
    story.server_sends(0, 1, b"220 ready", 1);
    assert!(story.server_hears(0).flags.has(Flags::RST) && is_promotable(&story, 1));
    story.peer = honest;
    story.client.clear();
    story.client_sends(1, b"q", 1);
    assert_eq!(story.server_hears(0).payload, b"q");
}

#[test]
fn a_handshake_has_its_time_however_many_others_begin() {
    let mut story = Story::configured(1, |config| config.limits.embryonic = 8);
    story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    let honest = story.peer;
    for port in 7000..7100 {
        story.peer.set_port(port);
        story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
    }
    story.peer = honest;
    story.syn_ack(0);
    story.client.clear();
    story.servers.iter_mut().for_each(VecDeque::clear);
    story.client_sends(1, b"SET", 1);
    assert_eq!(story.server_hears(0).payload, b"SET");
    assert_eq!(story.service.status().counters["unknown_refused"], 0);
}

#[test]
fn one_conversation_at_a_standstill_deposes_nobody() {
    for others_go_on in [false, true] {
        let mut story = Story::established(1);
        story.client_sends(1, b"SET", 1);
        story.server_sends(1, 1, b"", 4);
        story.servers.iter_mut().for_each(VecDeque::clear);
        story.peer.set_port(story.peer.port() + 1);
        story.client.clear();
        story.establish(1);
        for position in 1..40 {
            story.wait(Duration::from_millis(20));
            if others_go_on {
                story.client_sends(position, b"x", 1);
                story.server_sends(0, 1, b"", position + 1);
                story.server_sends(1, 1, b"", position + 1);
            }
        }
        assert_eq!(story.service.ovm() == Some(ServerId(0)), others_go_on);
    }
}

#[test]
fn what_is_kept_for_all_conversations_is_bounded() {
    let mut story = Story::configured(1, |config| config.limits.retained_bytes = 3_000);
    story.establish(1);
    let mut position = 1;
    for _ in 0..20 {
        story.servers[0].clear();
        story.client_sends(position, &[7; 500], 1);
        position += story.servers[0].iter().map(|heard| heard.payload.len() as u32).sum::<u32>();
        story.server_sends(0, 1, b"", position);
        assert!(story.service.status().retained_bytes < 4_000);
        // The replica acknowledges nothing, and no other limit is near.
        story.wait(Duration::from_millis(20));
    }
    assert!(story.events.iter().any(|event| matches!(event, EventKind::Evicted { .. })));
    assert!(position > 7_000, "{position}");
}

#[test]
fn without_room_a_segment_is_passed_to_nobody_until_its_sender_repeats_it() {
    let mut story = Story::configured(0, |config| config.limits.retained_bytes = 500);
    story.establish(0);
    story.client_sends(1, &[7; 500], 1);
    assert_eq!(story.server_hears(0).payload.len(), 500);
    story.client_sends(501, &[7; 100], 1);
    assert_eq!(heard_by(&mut story, 0), []);
    story.server_sends(0, 1, b"", 501);
    story.client_sends(501, &[7; 100], 1);
    assert_eq!(story.server_hears(0).payload.len(), 100);
}

#[test]
fn bytes_beyond_gaps_find_no_room_before_anybody_is_evicted_for_them() {
    let mut story = Story::configured(2, |config| {
        config.limits.out_of_order_bytes = 4_000;
        config.limits.retained_bytes = 8_000;
    });
    let honest = story.peer;
    story.establish(2);
    for port in 6000..6020 {
        story.peer.set_port(port);
        story.client.clear();
        story.servers.iter_mut().for_each(VecDeque::clear);
        story.establish(2);
        story.client_sends(100, &[b'y'; 500], 1);
    }
    story.wait(Duration::from_secs(1));
    let status = story.service.status();
    assert!(status.counters["out_of_order_bytes"] > 0 && status.retained_bytes < 5_000, "{status:?}");
    assert!(is_promotable(&story, 1) && is_promotable(&story, 2));
    // Segments in order find room; a client whose bytes beyond a gap found none retransmits them once the gap has
    // closed.
    story.peer = honest;
    story.servers.iter_mut().for_each(VecDeque::clear);
    story.client_sends(2, b"bc", 1);
    assert!(story.servers[0].is_empty());
    story.client_sends(1, b"abc", 1);
    story.server_sends(0, 1, b"", 4);
    for server in 0..3 {
        assert_eq!(story.server_hears(server).payload, b"abc");
    }
}

/// A kernel keeps a half-open connection only for some time, and the client decides when it completes its handshake.
#[test]
fn replicas_get_a_late_first_request_once_the_ovm_takes_it() {
    let hears = |story: &mut Story| -> Vec<usize> {
        (1..3).map(|n| story.servers[n].drain(..).map(|heard| heard.payload.len()).sum()).collect()
    };
    let late = || {
        let mut story = Story::established(2);
        story.wait(Duration::from_secs(1));
        story.client_sends(1, b"SET", 1);
        assert_eq!(story.server_hears(0).payload, b"SET");
        assert_eq!(hears(&mut story), [0, 0]);
        story
    };
    let mut taken = late();
    taken.server_sends(0, 1, b"", 4);
    assert_eq!(hears(&mut taken), [3, 3]);
    // An OVM whose kernel is dead refuses nothing.
    let mut silent = late();
    silent.wait(Duration::from_millis(20));
    assert_eq!(hears(&mut silent), [3, 3]);
    let mut refused = late();
    refused.server_says(0, Say { seq: iss(0) + 1, flags: Flags::RST, ..Say::default() });
    refused.wait(Duration::from_millis(30));
    assert_eq!(hears(&mut refused), [0, 0]);
    assert!(refused.client_hears().flags.has(Flags::RST));
    assert!(is_promotable(&refused, 1) && is_promotable(&refused, 2));
}

#[test]
fn replicas_get_nothing_that_a_client_sends_after_the_ovm_has_reset() {
    let mut story = Story::established(2);
    story.server_says(
        0,
        Say { seq: iss(0) + 1, ack: at(1), flags: Flags::RST.with(Flags::ACK), ..Say::default() },
    );
    story.client_sends(1, b"SET", 1);
    story.wait(Duration::from_millis(30));
    let bytes: usize = story.servers[1..].iter().flatten().map(|heard| heard.payload.len()).sum();
    assert_eq!(bytes, 0);
    assert!(is_promotable(&story, 1) && is_promotable(&story, 2));
}

#[test]
fn nobody_is_evicted_where_that_would_free_nothing() {
    let mut story = Story::configured(1, |config| config.limits.retained_bytes = 2_000);
    story.establish(1);
    // The client acknowledges nothing, and the replica has produced the same answer.
    for server in [0, 1] {
        story.server_sends(server, 1, &[b'x'; 990], 1);
    }
    story.peer.set_port(6000);
    story.client.clear();
    story.servers.iter_mut().for_each(VecDeque::clear);
    story.establish(1);
    for server in [0, 1] {
        story.server_sends(server, 1, &[b'x'; 990], 1);
    }
    story.wait(Duration::from_secs(1));
    assert!(story.service.status().retained_bytes >= 2_000 && is_promotable(&story, 1));
}
