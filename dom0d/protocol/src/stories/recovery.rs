//! An OVM that stalled is deposed but not fenced, and no server that fell back is promoted before it has caught up.

use super::*;
use crate::{NotPromotable, StaleReason};

impl Story {
    /// Why the server can't be promoted.
    fn obstacle(&self, server: u32) -> Option<NotPromotable> {
        let status = self.service.status();
        let found = status.servers.iter().find(|status| status.server == ServerId(server));
        found.unwrap_or_else(|| panic!("server {server} is not in the queue")).not_promotable
    }

    fn has(&self, event: &EventKind) -> bool {
        self.events.contains(event)
    }

    fn is_fenced(&self, server: u32) -> bool {
        self.outputs.contains(&Output::Fence(ServerId(server)))
    }

    /// `server` acknowledges the client's bytes up to `acked`, and answers nothing.
    fn acknowledges(&mut self, server: u32, acked: u32) {
        self.server_sends(server, 1, b"", acked);
    }

    /// The OVM's service hangs on a request of the client that the RVMs answer.
    fn stalled(rvms: u32) -> Self {
        let mut story = Self::established(rvms);
        story.client_sends(1, b"ask", 1);
        story.acknowledges(0, 4);
        for rvm in 1..=rvms {
            story.server_sends(rvm, 1, b"answer", 4);
        }
        story.wait(Duration::from_millis(255));
        assert_eq!(story.service.ovm(), Some(ServerId(1)), "{:?}", story.events);
        story.client.clear();
        story.client_says(Say { seq: at(4), ack: iss(0) + 7, ..Say::default() });
        story.client.clear();
        story.servers.iter_mut().for_each(VecDeque::clear);
        story
    }
}

#[test]
fn a_stalled_ovm_loses_its_seat_and_is_promotable_again_once_it_has_caught_up() {
    let mut story = Story::stalled(1);
    let server = ServerId(0);
    assert!(!story.is_fenced(0) && story.has(&EventKind::Recovering { server }));
    assert_eq!(story.obstacle(0), Some(NotPromotable::Recovering));
    story.wait(Duration::from_millis(450));
    assert_eq!(story.obstacle(0), Some(NotPromotable::Recovering));
    // At last the old OVM continues. Its client already has this answer from the new OVM.
    story.server_sends(0, 1, b"answer", 4);
    story.wait(Duration::from_millis(300));
    assert!(story.client.is_empty(), "{:?}", story.client);
    assert!(story.has(&EventKind::Recovered { server }), "{:?}", story.events);
    assert_eq!((story.obstacle(0), story.service.status().counters["recovered"]), (None, 1));
    // It follows like any other replica, and takes over when needed.
    story.client_sends(4, b"more", 7);
    assert_eq!(story.servers[0].pop_back().unwrap().payload, b"more");
    story.server_sends(0, 7, b"again", 8);
    assert!(story.client.is_empty());
    story.fail_ovm();
    assert_eq!(story.service.ovm(), Some(server));
    assert_eq!(story.client_hears().payload, b"again");
    assert_eq!(story.service.status().counters["resets"], 0);
}

#[test]
fn an_ovm_whose_kernel_stalled_is_given_all_that_it_missed() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(1, 1, b"answer", 4);
    story.wait(Duration::from_millis(255));
    assert_eq!((story.service.ovm(), story.is_fenced(0)), (Some(ServerId(1)), false));
    // A later request, which the client could only make after the answer.
    story.client_sends(4, b"then", 7);
    story.server_sends(1, 7, b"!", 8);
    story.wait(Duration::from_millis(450));
    assert_eq!(story.obstacle(0), Some(NotPromotable::Recovering));
    story.servers[0].clear();
    story.server_sends(0, 1, b"answer", 4);
    assert!(story.servers[0].iter().any(|heard| heard.payload == b"then"), "{:?}", story.servers[0]);
    story.wait(Duration::from_millis(50));
    assert_eq!(story.obstacle(0), Some(NotPromotable::Recovering));
    story.server_sends(0, 7, b"!", 8);
    story.wait(Duration::from_millis(300));
    assert_eq!(story.obstacle(0), None);
}

#[test]
fn an_ovm_that_hangs_for_good_is_fenced_after_its_limit() {
    let mut story = Story::stalled(2);
    story.wait(Duration::from_millis(9_700));
    assert!(!story.is_fenced(0));
    story.wait(Duration::from_millis(400));
    let evicted = EventKind::Evicted { server: ServerId(0), reason: StaleReason::Deposed };
    assert!(story.is_fenced(0) && story.has(&evicted), "{:?}", story.events);
    assert_eq!(story.service.status().counters["recover_limit"], 1);
    assert_eq!(story.obstacle(2), None);
}

#[test]
fn without_a_limit_to_recover_in_it_is_fenced_at_once() {
    let mut story = Story::configured(1, |config| config.timing.recover_limit = Duration::ZERO);
    story.establish(1);
    story.client_sends(1, b"ask", 1);
    story.acknowledges(0, 4);
    story.server_sends(1, 1, b"answer", 4);
    story.wait(Duration::from_millis(255));
    assert!(story.is_fenced(0));
}

#[test]
fn while_it_recovers_it_is_nobodys_successor() {
    let mut story = Story::stalled(1);
    story.fail_ovm();
    assert_eq!(story.service.ovm(), Some(ServerId(1)));
    let because = vec![(ServerId(0), NotPromotable::Recovering)];
    let nobody =
        |event: &EventKind| matches!(event, EventKind::NoCandidate { because: why, .. } if *why == because);
    assert!(story.events.iter().any(nobody), "{:?}", story.events);
}

#[test]
fn while_it_recovers_it_speaks_against_nobody() {
    let mut story = Story::stalled(2);
    // The new OVM is slow with this request, and only the deposed OVM has acknowledged it.
    story.client_sends(4, b"more", 7);
    story.server_sends(0, 1, b"answer", 8);
    story.wait(Duration::from_millis(260));
    assert_eq!(story.service.ovm(), Some(ServerId(1)), "{:?}", story.events);
}

#[test]
fn where_it_answers_otherwise_that_conversation_alone_is_lost_to_it() {
    let mut story = Story::stalled(1);
    story.server_sends(0, 1, b"anger!", 4);
    story.wait(Duration::from_millis(300));
    let server = ServerId(0);
    assert!(story.has(&EventKind::Recovered { server }), "{:?}", story.events);
    let status = story.service.status();
    assert_eq!((status.servers[0].covered, status.servers[0].diverged), (0, 1));
    story.fail_ovm();
    story.wait(Duration::from_millis(2));
    assert_eq!(story.service.ovm(), Some(server));
    assert!(story.client.iter().any(|heard| heard.flags.has(Flags::RST)));
}

#[test]
fn evidence_of_its_domain_ends_its_chance() {
    for evidence in [Evidence::DomainGone, Evidence::DomainPaused] {
        let mut story = Story::stalled(1);
        story.tell(Input::Evidence { server: ServerId(0), evidence });
        story.drain();
        let evicted = EventKind::Evicted { server: ServerId(0), reason: StaleReason::MissedBytes };
        assert!(story.has(&evicted) && story.is_fenced(0), "{:?}", story.events);
    }
}

#[test]
fn other_faults_still_cost_it_its_life() {
    let mut story = Story::established(1);
    story.fail_ovm();
    assert!(story.is_fenced(0));
}

/// A replica that has not answered for so long that it lags.
fn lagging() -> Story {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"answer", 4);
    story.acknowledges(1, 4);
    story.client_sends(4, b"more", 7);
    story.server_sends(0, 7, b"yes", 8);
    story.client_says(Say { seq: at(8), ack: iss(0) + 10, ..Say::default() });
    story.wait(Duration::from_millis(10_200));
    assert_eq!(story.obstacle(1), Some(NotPromotable::Lagging));
    story
}

#[test]
fn a_refused_promotion_does_not_make_a_lagging_replica_promotable() {
    let mut story = lagging();
    for _ in 0..3 {
        story.fail_ovm();
        story.wait(Duration::from_secs(1));
        assert_eq!(
            (story.service.ovm(), story.obstacle(1)),
            (Some(ServerId(0)), Some(NotPromotable::Lagging))
        );
    }
    // It produces its first answer, and then the rest.
    story.server_sends(1, 1, b"answer", 4);
    story.wait(Duration::from_millis(300));
    assert_eq!(story.obstacle(1), Some(NotPromotable::Lagging));
    story.server_sends(1, 7, b"yes", 8);
    story.wait(Duration::from_millis(300));
    assert_eq!(story.obstacle(1), None);
    story.fail_ovm();
    assert_eq!(story.service.ovm(), Some(ServerId(1)));
}

#[test]
fn a_domain_that_stops_and_goes_on_excuses_nobody_else() {
    let mut story = Story::established(2);
    let flap = |story: &mut Story, server: u32| {
        for running in [false, true] {
            story.tell(Input::Running { server: ServerId(server), running });
            story.wait(Duration::from_millis(50));
        }
    };
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"answer", 4);
    story.acknowledges(1, 4);
    story.server_sends(2, 1, b"answer", 4);
    story.client_sends(4, b"more", 7);
    for _ in 0..102 {
        flap(&mut story, 2);
    }
    assert_eq!(story.obstacle(1), Some(NotPromotable::Lagging));
    // A replica's domain that stops and continues does not excuse the OVM either.
    let mut story = Story::established(2);
    story.client_sends(1, b"ask", 1);
    story.acknowledges(0, 4);
    for rvm in [1, 2] {
        story.server_sends(rvm, 1, b"answer", 4);
    }
    for _ in 0..3 {
        flap(&mut story, 2);
    }
    assert_ne!(story.service.ovm(), Some(ServerId(0)), "{:?}", story.events);
}

#[test]
fn one_that_answers_otherwise_is_not_behind_for_ever() {
    let mut story = Story::established(1);
    story.client_sends(1, b"ask", 1);
    story.server_sends(0, 1, b"a long answer", 4);
    story.server_sends(1, 1, b"short", 4);
    let behind = |story: &Story| story.service.status().servers[1].behind_bytes;
    assert_eq!(behind(&story), 0);
    story.client_sends(4, b"more", 14);
    story.server_sends(0, 14, b"another long answer", 8);
    story.server_sends(1, 6, b"none", 8);
    assert_eq!(behind(&story), 0);
}
