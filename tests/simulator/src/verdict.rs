//! The end of a run: what every client got, and what the servers hold.

use understudy_protocol::Role;

use crate::application::KEYS;
use crate::client::{Client, Ending, Outcome};
use crate::guest::Health;
use crate::world::World;

type Verdict = Result<(), (&'static str, String)>;

pub(crate) fn judge(world: &mut World) -> Verdict {
    connections(world)?;
    servers(world)
}

/// Every answer was right, whatever happened; and nobody was cut off without a reason.
fn connections(world: &mut World) -> Verdict {
    let promoted = world.promotions > 0;
    let spinning = world
        .service
        .ovm()
        .and_then(|id| world.guest_of(id))
        .is_some_and(|g| world.guests[g].health == Health::Spinning);
    let clients = core::mem::take(&mut world.clients);
    let result = each_connection(world, &clients, promoted, spinning);
    world.clients = clients;
    result
}

fn each_connection(world: &mut World, clients: &[Client], promoted: bool, spinning: bool) -> Verdict {
    for (c, client) in clients.iter().enumerate() {
        for (n, (connection, plan)) in client.connections.iter().zip(&client.knobs.plans).enumerate() {
            let name = format!(
                "connection {n} of client {c} (port {}, {} of {} requests answered, {} bytes)",
                connection.port, connection.answered, connection.issued, connection.received
            );
            let harm = match &connection.outcome {
                Some(Outcome::WrongByte(_)) if world.untrue_served => Some("got a wrong byte"),
                Some(Outcome::WrongByte(position)) => {
                    return Err(("client result", format!("{name} got a wrong byte at {position}")));
                }
                Some(Outcome::Completed) => {
                    world.coverage.hit("connection.completed");
                    if promoted {
                        world.coverage.hit("connection.completed over a promotion");
                    }
                    None
                }
                Some(Outcome::Aborted) => {
                    world.coverage.hit("connection.aborted");
                    None
                }
                Some(Outcome::Reset) => Some("was reset"),
                Some(Outcome::Truncated) => Some("was closed too early"),
                None if plan.ending == Ending::Stay && client.finished() => None,
                // A SYN that nobody answers is evidence of nothing: no replica has seen it.
                None if spinning && (client.opening(n) || connection.waits_to_open()) => {
                    world.coverage.hit("harm excused: spun with no conversation");
                    None
                }
                None if forgotten(world, client, n) => {
                    world.coverage.hit("harm excused: smoltcp forgot to retransmit");
                    None
                }
                None => Some("is stuck"),
            };
            let Some(harm) = harm else { continue };
            match world.excuse {
                Some(excuse) => world.coverage.hit(&format!("harm excused: {excuse}")),
                None => return Err(("survival", format!("{name} {harm}"))),
            }
        }
    }
    Ok(())
}

/// The connection is stuck since a TCP stack at one of its ends does nothing.
fn forgotten(world: &World, client: &Client, index: usize) -> bool {
    // When nothing is left to happen, nobody will send any more.
    let now = if world.nothing_left() { u64::MAX } else { world.now };
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
            if !world.agreement.unknown[key] && want != have {
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
