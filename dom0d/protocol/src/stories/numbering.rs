//! Each server has its own numbers, and the client sees one view of them.

use super::*;

#[test]
fn after_a_promotion_every_number_is_translated_both_ways() {
    let mut story = Story::established(1);
    story.fail_ovm();
    story.client.clear();
    story.client_sends(1, b"ask", 1);
    let fed = story.server_hears(1);
    assert_eq!((fed.seq, fed.ack, fed.payload.as_slice()), (at(1), iss(1).wrapping_add(1), &b"ask"[..]));
    story.server_sends(1, 1, b"answer", 4);
    let heard = story.client_hears();
    assert_eq!((heard.seq, heard.ack, heard.payload.as_slice()), (iss(0) + 1, at(4), &b"answer"[..]));
    let mut sack = SackBlocks::default();
    sack.push(iss(0) + 3, iss(0) + 5);
    story.client_says(Say { seq: at(4), ack: iss(0) + 2, sack, ..Say::default() });
    let passed = story.server_hears(1);
    let mut expected = SackBlocks::default();
    expected.push(iss(1).wrapping_add(3), iss(1).wrapping_add(5));
    assert_eq!((passed.ack, passed.sack), (iss(1).wrapping_add(2), expected));
}

#[test]
fn time_never_runs_backwards_for_the_client() {
    let mut story = Story::new(2);
    story.timestamps = true;
    story.establish(2);
    let mut last = 0;
    for promotion in 0..2 {
        story.fail_ovm();
        let server = promotion + 1;
        story.server_says(
            server,
            Say {
                seq: iss(server).wrapping_add(1 + 3 * promotion),
                ack: at(1),
                payload: b"abc",
                tsval: tsval(server).wrapping_add(40),
                ..Say::default()
            },
        );
        while let Some(heard) = story.client.pop_front() {
            let (tsval, _) = heard.timestamps.expect("timestamps");
            assert!(tsval >= last && tsval < 2000, "{tsval} after {last}");
            last = tsval;
        }
        story.client_says(Say {
            seq: at(1),
            ack: iss(0) + 4 + 3 * promotion,
            tsval: 101,
            tsecr: last,
            ..Say::default()
        });
        // Meanwhile the second RVM has produced the same answer.
        for other in server + 1..=2 {
            story.server_says(
                other,
                Say {
                    seq: iss(other).wrapping_add(1),
                    ack: at(1),
                    payload: b"abc",
                    tsval: tsval(other).wrapping_add(40),
                    ..Say::default()
                },
            );
        }
    }
    assert!(last >= 1000);
}

#[test]
fn a_tsecr_that_the_new_ovm_never_sent_is_not_shown_to_it() {
    let mut story = Story::new(1);
    story.timestamps = true;
    story.establish(1);
    story.fail_ovm();
    story.servers[1].clear();
    // The client still echoes the old OVM's TSval.
    story.client_says(Say {
        seq: at(1),
        ack: iss(0) + 1,
        payload: b"x",
        tsval: 102,
        tsecr: 990,
        ..Say::default()
    });
    let (_, tsecr) = story.server_hears(1).timestamps.expect("timestamps");
    assert_eq!(tsecr, tsval(1));
}
