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
