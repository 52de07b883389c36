//! A service continues in another process, or says why it can't.

use super::*;
use crate::{Bounds, NotPromotable, RestoreError, StaleReason, Transmit, Uncovered};

/// A conversation in which an RVM lacks both directions, and something arrived beyond a gap.
fn busy() -> Story {
    let mut story = Story::established(2);
    story.client_sends(1, b"question", 1);
    story.client_sends(20, b"beyond a gap", 1);
    story.server_sends(0, 1, b"answer", 9);
    story.client.clear();
    story.servers.iter_mut().for_each(VecDeque::clear);
    story
}

fn restored(story: &Story) -> Result<Service, RestoreError> {
    Service::restore(&story.service.save())
}

#[test]
fn what_waits_to_be_polled_is_saved_too() {
    let mut story = busy();
    let ctx = &mut story.service.ctx;
    let (server, client, psc) = (ServerId(7), CLIENT.parse().unwrap(), PSC.parse().unwrap());
    let mut expected = vec![
        Output::Cutover { epoch: u64::MAX, from: None, to: server },
        Output::Fence(server),
        Output::StopPlane { accused: ServerId(3), evidence: Evidence::NoProgress },
        Output::Rule(Rule::TakeBack { client, psc }),
        Output::Rule(Rule::Extend { entry: 3, bounds: Bounds { up: 1, down: u32::MAX } }),
    ];
    let events = [
        EventKind::Attached { server, seeded: true },
        EventKind::Detached { server },
        EventKind::Evicted { server, reason: StaleReason::Lagged },
        EventKind::Stale { server, reason: StaleReason::NotSeeded },
        EventKind::Seeded { server },
        EventKind::DrainFailed { server, open: 3, reason: crate::Release::ConversationsOpen },
        EventKind::Held,
        EventKind::Released { reason: crate::Release::OvmChanged },
        EventKind::Suspected { server, evidence: Evidence::DomainGone },
        EventKind::CutOver {
            epoch: u64::MAX,
            from: Some(server),
            to: server,
            evidence: None,
            conversations: 50_000,
        },
        EventKind::Recovering { server },
        EventKind::Recovered { server },
        EventKind::FirstByte { epoch: 2 },
        EventKind::Recuperated { epoch: 2, recuperated: 1, reset: 0 },
        EventKind::NoCandidate {
            server: None,
            evidence: Evidence::Operator,
            because: vec![
                (server, NotPromotable::Stale(StaleReason::TookMore)),
                (ServerId(8), NotPromotable::NotRunning),
            ],
        },
        EventKind::Diverged { server, client, position: u64::MAX },
        EventKind::Unprotected { client: "[fd00::1]:80".parse().unwrap(), reason: Uncovered::TableFull },
        EventKind::Reset { client },
    ];
    expected.extend(events.map(|kind| Output::Event(Event { at: Instant::from_micros(u64::MAX), kind })));
    expected.push(Output::Transmit(Transmit {
        to: Destination::Client(LINK),
        packet: b"\x45packet".to_vec(),
        segment: 1448,
    }));
    expected.iter().for_each(|output| ctx.outbox.push(output.clone()));
    let mut service = restored(&story).unwrap();
    assert_eq!(std::iter::from_fn(|| service.poll(story.now)).collect::<Vec<_>>(), expected);
}

#[test]
fn the_same_state_is_the_same_bytes() {
    let mut story = Story::new(2);
    for port in 5000..5100 {
        story.peer = std::net::SocketAddr::new([10, 0, 0, 1].into(), port);
        story.client_says(Say { seq: CLIENT_ISS, flags: Flags::SYN, ..Say::default() });
        if port % 2 == 0 {
            story.syn_ack(0);
            story.client_says(Say { seq: at(1), ack: iss(0) + 1, ..Say::default() });
        }
    }
    assert_eq!((story.service.status().conversations, story.service.status().embryonic), (50, 50));
    assert!(restored(&story).unwrap().save() == story.service.save());
}

#[test]
fn damage_is_noticed() {
    let story = busy();
    let saved = story.service.save();
    let restore = |bytes: &[u8]| Service::restore(bytes).map(drop);
    assert_eq!(restore(&saved), Ok(()));
    for length in 0..saved.len() {
        assert_eq!(restore(&saved[..length]), Err(RestoreError::Unreadable), "{length} bytes");
    }
    for at in 0..saved.len() {
        let mut damaged = saved.clone();
        damaged[at] ^= 1 << (at % 8);
        assert_eq!(restore(&damaged), Err(RestoreError::Unreadable), "byte {at}");
        // With a right checksum over damaged bytes, `restore` may succeed or fail, but must not panic.
        let (body, checksum) = damaged.split_last_chunk_mut::<4>().unwrap();
        *checksum = crc32fast::hash(body).to_le_bytes();
        let _ = restore(&damaged);
    }
}

#[test]
fn another_format_is_not_read() {
    let story = busy();
    let mut saved = story.service.save();
    saved[0] += 1;
    let (body, checksum) = saved.split_last_chunk_mut::<4>().unwrap();
    *checksum = crc32fast::hash(body).to_le_bytes();
    let error = Service::restore(&saved).map(drop);
    assert!(matches!(error, Err(RestoreError::OtherFormat(_))), "{error:?}");
}

#[test]
fn another_configuration_comes_into_force_if_it_fits_the_conversations() {
    let story = busy();
    let reconfigured = |change: fn(&mut ServiceConfig)| {
        let mut service = restored(&story)?;
        let mut config = service.config().clone();
        change(&mut config);
        service.reconfigure(config).map(|()| service)
    };
    let misfits: [fn(&mut ServiceConfig); 3] = [
        |config| config.psc[0] = [10, 0, 0, 101].into(),
        |config| config.ports.push(443),
        |config| config.limits.conversations -= 1,
    ];
    for misfit in misfits {
        assert!(matches!(reconfigured(misfit), Err(RestoreError::OtherConfiguration(_))));
    }
    let service = reconfigured(|config| {
        config.name.push('2');
        config.timing.close_hold = Duration::from_millis(7);
        config.limits.retained_bytes = 1 << 20;
        config.masks.push(crate::Mask::http_date());
    });
    let service = service.unwrap();
    let config = service.config();
    assert_eq!(
        (config.name.as_str(), config.timing.close_hold.as_millis(), config.limits.retained_bytes),
        ("story2", 7, 1 << 20)
    );
    assert_eq!((service.status().conversations, config.masks.len()), (1, 1));
}

#[test]
fn what_a_replica_repeats_can_be_recalled_and_what_it_says_otherwise_can_not() {
    let mut story = Story::established(1);
    story.client_sends(1, b"question", 1);
    let answer = [b"the answer ".as_slice(); 40].concat();
    story.server_sends(0, 1, &answer, 9);
    let said = |story: &Story, position: u32, payload: &[u8]| {
        let say = Say { seq: iss(1).wrapping_add(position), ack: at(9), payload, ..Say::default() };
        let packet = story.server_packet(1, &say);
        let (head, tail) = story.service.repetition(ServerId(1), &packet)?;
        let bytes = restored(story).unwrap().recall(&tail).unwrap();
        assert!([head, &bytes].concat() == packet);
        Some(bytes.len())
    };
    assert_eq!(said(&story, 1, &answer), Some(440));
    assert_eq!(said(&story, 12, &answer[11..]), Some(429), "also ahead of its turn");
    assert_eq!(said(&story, 2, &answer), None);
    assert_eq!(said(&story, 1, &[answer.as_slice(), b"and more"].concat()), None);
    assert_eq!(said(&story, 1, &answer[..100]), None, "not worth it");
    let mut padded = story.server_packet(
        1,
        &Say { seq: iss(1).wrapping_add(1), ack: at(9), payload: &answer, ..Say::default() },
    );
    padded.push(0);
    assert_eq!(story.service.repetition(ServerId(1), &padded), None);
    let of_the_ovm =
        story.server_packet(0, &Say { seq: iss(0) + 1, ack: at(9), payload: &answer, ..Say::default() });
    assert_eq!(story.service.repetition(ServerId(0), &of_the_ovm), None);
}
