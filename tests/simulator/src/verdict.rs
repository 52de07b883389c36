//! The end of a run: what every client got, and what the servers hold.

use understudy_protocol::Role;

use crate::application::KEYS;
use crate::client::{Client, Ending, Outcome};
use crate::guest::Health;
use crate::observer::Conversation;
use crate::world::World;

type Verdict = Result<(), (&'static str, String)>;

pub(crate) fn judge(world: &mut World) -> Verdict {
    connections(world)?;
    servers(world)
}

/// Every answer was right, whatever happened; and nobody was cut off without a reason.
fn connections(world: &mut World) -> Verdict {
    let clients = core::mem::take(&mut world.clients);
    let result = clients.iter().enumerate().try_for_each(|(c, client)| {
        (0..client.connections.len()).try_for_each(|n| connection(world, c, client, n))
    });
    world.clients = clients;
    result
}

fn connection(world: &mut World, c: usize, client: &Client, n: usize) -> Verdict {
    let (connection, plan) = (&client.connections[n], &client.knobs.plans[n]);
    let name = format!(
        "connection {n} of client {c} (port {}, {} of {} requests answered, {} bytes)",
        connection.port, connection.answered, connection.issued, connection.received
    );
    let harm = match &connection.outcome {
        Some(Outcome::WrongByte(position)) if !world.untrue_served => {
            return Err(("client result", format!("{name} got a wrong byte at {position}")));
        }
        Some(Outcome::WrongByte(_)) => "got a wrong byte",
        Some(Outcome::Completed) => {
            world.coverage.hit("connection.completed");
            if world.promotions > 0 {
                world.coverage.hit("connection.completed over a promotion");
            }
            return Ok(());
        }
        Some(Outcome::Aborted) => {
            world.coverage.hit("connection.aborted");
            return Ok(());
        }
        None if plan.ending == Ending::Stay && connection.idle() => return Ok(()),
        Some(Outcome::Reset) => "was reset",
        Some(Outcome::Truncated) => "was closed too early",
        None => "is stuck",
    };
    let stuck = connection.outcome.is_none();
    let why = || if stuck { why_stuck(world, client, n) } else { why_reset(world, client, n) };
    match world.excuse.or_else(why) {
        Some(excuse) => {
            world.coverage.hit(&format!("harm excused: {excuse}"));
            Ok(())
        }
        None => Err(("survival", format!("{name} {harm}"))),
    }
}

/// A dead service's kernel resets what it had only half opened; no replica knows of it.
fn why_reset(world: &World, client: &Client, index: usize) -> Option<&'static str> {
    let (own, psc) = client.ends(index)?;
    let conversation = world.observer.conversation_of(own, psc)?;
    if world.refused.contains(&(own, conversation.isn)) {
        return Some("the service died during the handshake");
    }
    // With no conversation left to dispute anything, refused SYNs are evidence of nothing.
    let ovm = world.service.ovm().and_then(|id| world.guest_of(id))?;
    let dead = world.guests[ovm].health == Health::Killed;
    (dead && conversation.view.is_none()).then_some("a dead service refused")
}

/// Reasons for a connection to hang that no evidence can show, or that are not the engine's.
fn why_stuck(world: &World, client: &Client, index: usize) -> Option<&'static str> {
    if forgotten(world, client, index) {
        return Some("smoltcp forgot to retransmit");
    }
    if client.waits_for_turn(index, &world.agreement) {
        // The one that it waits for is judged.
        return Some("another connection is stuck");
    }
    let ovm = world.service.ovm().and_then(|id| world.guest_of(id))?;
    let (own, psc) = client.ends(index)?;
    let conversation = world.observer.conversation_of(own, psc);
    if conversation.is_some_and(Conversation::is_deadlocked) {
        return Some("two smoltcp stacks in a deadlock");
    }
    if world.guests[ovm].health == Health::Spinning && conversation.is_some_and(Conversation::is_acknowledged)
    {
        return Some("the OVM spun, and an acknowledgement of it was lost");
    }
    // The client can't say so much that RVMs could answer it.
    (world.guests[ovm].health == Health::Hung && conversation.is_some_and(|c| c.window_shut))
        .then_some("the OVM hung with its window shut")
}

/// The connection is stuck since a TCP stack at one of its ends does nothing.
fn forgotten(world: &World, client: &Client, index: usize) -> bool {
    let now = world.now;
    let ovm = world.service.ovm().and_then(|id| world.guest_of(id));
    let Some((own, _)) = client.ends(index) else {
        return false;
    };
    client.forgot(now, index) || ovm.is_some_and(|g| world.guests[g].forgot(now, own))
}

/// Every acknowledged request is in the state of the server that serves, and of each that could.
fn servers(world: &mut World) -> Verdict {
    let status = world.service.status();
    for server in &status.servers {
        let serves = server.role != Role::Rvm;
        // One that is behind is given what it lacks should it be promoted.
        if !serves && (server.not_promotable.is_some() || server.behind_bytes > 0) {
            continue;
        }
        let Some(guest) = world.guest_of(server.server) else {
            continue;
        };
        // In a conversation in which it diverged it is held to no order any more (rule 2.3).
        if !serves && world.observer.conversations.iter().any(|c| c.diverged(server.server)) {
            continue;
        }
        let guest = &world.guests[guest];
        if guest.health != Health::Running {
            continue;
        }
        for key in 0..KEYS {
            let (want, have) = (world.agreement.shared.logs[key], guest.shared.logs[key]);
            let settled = !world.agreement.unknown[key] && !world.agreement.in_use(key);
            if settled && want != have {
                return Err((
                    if serves { "nothing lost" } else { "no stale hero" },
                    format!(
                        "{:?} ({}) has {have:?} for key {key}, the clients were told {want:?}",
                        server.server,
                        if serves { "OVM" } else { "promotable" },
                    ),
                ));
            }
            world.coverage.hit("state compared");
        }
    }
    Ok(())
}
