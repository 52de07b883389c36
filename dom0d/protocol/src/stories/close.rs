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
fn a_conversation_that_the_ovm_reset_is_not_counted_any_more() {
    let mut story = Story::established(0);
    story.server_says(
        0,
        Say { seq: iss(0) + 1, ack: at(1), flags: Flags::RST.with(Flags::ACK), ..Say::default() },
    );
    let status = story.service.status();
    assert_eq!((status.conversations, status.servers[0].covered), (0, 0));
}
