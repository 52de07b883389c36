//! Clients are held while a server is made equal to the OVM.

use super::*;
use crate::Release;

const DRAIN: Duration = Duration::from_secs(5);
const LIMIT: Duration = Duration::from_secs(60);

fn hold(story: &mut Story) -> Result<(), OperatorError> {
    let held = story.command(Command::Hold { deadline: story.now + DRAIN, limit: LIMIT });
    story.drain();
    held
}

fn released(story: &Story) -> Option<Release> {
    story.events.iter().find_map(|event| match event {
        EventKind::Released { reason } => Some(*reason),
        _ => None,
    })
}

fn copied(story: &mut Story, server: u32) -> Result<(), OperatorError> {
    let attached = story.command(Command::Attach { spec: spec(server), seeding: Seeding::Copied });
    story.drain();
    attached
}

/// Another client's SYN.
fn knock(story: &mut Story) {
    story.peer.set_port(story.peer.port() + 1);
    story.client_says(Say { seq: at(0), flags: Flags::SYN, ..Say::default() });
}

#[test]
fn nothing_of_clients_reaches_the_ovm_until_the_copy_is_attached() {
    let mut story = Story::new(0);
    // A client whose handshake the OVM has answered, and an unknown client.
    knock(&mut story);
    story.server_says(
        0,
        Say { seq: iss(0), ack: at(1), flags: Flags::SYN.with(Flags::ACK), ..Say::default() },
    );
    story.servers[0].clear();
    hold(&mut story).unwrap();
    assert!(story.events.contains(&EventKind::Held) && story.service.is_held());
    story.client_says(Say { seq: at(1), ack: iss(0) + 1, payload: b"set", ..Say::default() });
    story.peer.set_port(9);
    story.client_says(Say { seq: 5, ack: 7, payload: b"set", ..Say::default() });
    knock(&mut story);
    story.wait(Duration::from_secs(10));
    assert!(story.servers[0].is_empty(), "it was written to while it was copied");
    assert_eq!(hold(&mut story), Err(OperatorError::DrainUnderWay));
    copied(&mut story, 1).unwrap();
    assert_eq!(released(&story), Some(Release::Seeded));
    assert!(story.service.status().servers[1].not_promotable.is_none());
    assert_eq!(story.server_hears(0).flags, Flags::SYN, "who waited is let in");
}

#[test]
fn a_copy_counts_only_while_clients_are_held() {
    let mut story = Story::new(0);
    assert_eq!(copied(&mut story, 1), Err(OperatorError::NotHeld));
    hold(&mut story).unwrap();
    knock(&mut story);
    story.wait(LIMIT);
    assert_eq!(released(&story), Some(Release::Limit));
    assert_eq!(story.server_hears(0).flags, Flags::SYN);
    assert_eq!(copied(&mut story, 1), Err(OperatorError::NotHeld));
    story.events.clear();
    hold(&mut story).unwrap();
    story.command(Command::Release).unwrap();
    story.drain();
    assert_eq!(released(&story), Some(Release::GivenUp));
    assert_eq!(copied(&mut story, 1), Err(OperatorError::NotHeld));
}

#[test]
fn open_conversations_have_until_the_deadline() {
    let mut story = Story::established(0);
    hold(&mut story).unwrap();
    story.client_sends(1, b"set", 1);
    assert_eq!(story.server_hears(0).payload, b"set", "who is in goes on");
    assert!(!story.service.is_held());
    assert_eq!(copied(&mut story, 1), Err(OperatorError::NotHeld));
    story.wait(DRAIN);
    assert_eq!(released(&story), Some(Release::ConversationsOpen));
}

#[test]
fn a_copy_during_which_clients_came_past_the_engine_counts_for_nothing() {
    let mut story = Story::new(0);
    hold(&mut story).unwrap();
    let say = Segment {
        src: story.peer,
        dst: PSC.parse().unwrap(),
        seq: 5,
        ack: 7,
        flags: Flags::ACK,
        window: 9,
        urgent: 0,
        options: Options::default(),
        ecn: 0,
        payload: b"set",
    };
    story.tell(Input::Client { link: LINK, passage: Passage::Unattended, packet: &say.emit() });
    story.drain();
    assert_eq!(released(&story), Some(Release::Unattended));
    assert_eq!(copied(&mut story, 1), Err(OperatorError::NotHeld));
    story.events.clear();
    hold(&mut story).unwrap();
    story.tell(Input::Untold);
    story.drain();
    assert_eq!(released(&story), Some(Release::Unattended));
}

#[test]
fn a_copy_of_an_ovm_that_was_deposed_counts_for_nothing() {
    let mut story = Story::new(1);
    hold(&mut story).unwrap();
    story.tell(Input::Evidence { server: ServerId(0), evidence: Evidence::DomainGone });
    story.drain();
    assert_eq!(copied(&mut story, 2), Err(OperatorError::NotHeld));
    assert_eq!(released(&story), Some(Release::OvmChanged));
    // The hold also ends if no copy is attached.
    let mut story = Story::new(1);
    hold(&mut story).unwrap();
    story.command(Command::Switchover { to: None }).unwrap();
    story.drain();
    story.wait(Duration::from_millis(200));
    assert_eq!(released(&story), Some(Release::OvmChanged));
}

#[test]
fn a_statement_about_an_ovm_ends_with_it() {
    let mut story = Story::established(1);
    let deadline = story.now + DRAIN;
    story.command(Command::Attach { spec: spec(2), seeding: Seeding::Drain { deadline } }).unwrap();
    story.command(Command::Switchover { to: Some(ServerId(1)) }).unwrap();
    story.wait(Duration::from_millis(200));
    assert!(story.events.contains(&EventKind::DrainFailed {
        server: ServerId(2),
        open: 1,
        reason: Release::OvmChanged
    }));
    assert!(story.service.status().servers[2].not_promotable.is_some());
}
