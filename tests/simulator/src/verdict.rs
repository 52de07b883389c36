//! Judges the end of a run: what every client got, and what the servers hold.

use understudy_protocol::{Role, ServerId, ServerStatus};

use crate::application::KEYS;
use crate::client::{Client, Ending, Outcome, Step};
use crate::guest::Health;
use crate::link::LinkKnobs;
use crate::observer::{Conversation, Leg};
use crate::stack::LONGEST_RTO_US;
use crate::world::World;

type Verdict = Result<(), (&'static str, String)>;

pub(crate) fn judge(world: &mut World) -> Verdict {
    engine(world)?;
    connections(world)?;
    servers(world)?;
    bytes(world)
}

/// Checks that the engine found no rule broken by a fault of its own.
fn engine(world: &World) -> Verdict {
    let counters = world.service.status().counters;
    match counters.iter().find(|(name, times)| name.starts_with("broken_rule_") && **times > 0) {
        Some((name, times)) => Err(("assertion", format!("{name} {times} times"))),
        None => Ok(()),
    }
}

/// Checks that every answer was right, whatever happened, and that no client was cut off without a reason.
fn connections(world: &mut World) -> Verdict {
    let clients = core::mem::take(&mut world.clients);
    let result = clients.iter().enumerate().try_for_each(|(c, client)| {
        // What hostile clients get does not matter.
        let judged = if c < world.honest() { client.connections.len() } else { 0 };
        (0..judged).try_for_each(|n| connection(world, c, client, n))
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
        Some(Outcome::WrongByte(position)) if !world.untrue_served && !world.forgetful_served => {
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
    let why = || if stuck { why_stuck(world, c, client, n) } else { why_reset(world, client, n) };
    match world.excuse.or_else(why) {
        Some(excuse) => {
            world.coverage.hit(&format!("harm excused: {excuse}"));
            Ok(())
        }
        None => Err(("survival", format!("{name} {harm}"))),
    }
}

/// Whether a dead service's kernel reset a handshake, of which no replica knows.
fn why_reset(world: &World, client: &Client, index: usize) -> Option<&'static str> {
    let (own, psc) = client.ends(index)?;
    let conversation = world.observer.conversation_of(own, psc)?;
    if world.refused.contains(&(own, conversation.isn)) {
        return Some("the service died during the handshake");
    }
    if world.died.iter().any(|dead| is_lone_close(world, *dead, conversation)) {
        return Some("a dead service closed it alone");
    }
    let lied = |(id, leg): (&ServerId, &Leg)| world.observer.liars.contains(id) && leg.fin.is_some();
    if !world.died.is_empty() && conversation.legs.iter().any(lied) {
        return Some("a liar shared a dead service's close");
    }
    let closed =
        |(id, leg): &(&ServerId, &Leg)| world.killed.contains(id) && (leg.fin.is_some() || leg.reset);
    if !world.died.is_empty() && conversation.legs.iter().filter(closed).count() > 1 {
        return Some("two dead services closed it alike");
    }
    // Without a conversation that disputes a close, refused SYNs are no evidence.
    let refused = world.died.iter().any(|dead| conversation.legs.get(dead).is_some_and(|leg| leg.reset));
    (refused && conversation.view.is_none()).then_some("a dead service refused")
}

/// Whether a dead service's kernel closed this conversation, and no other early enough that replicas could dispute both
/// closes before this one's hold ended (half a hold): only several closes are evidence. Other conversations could not be closed
/// yet, or the link lost their FINs.
fn is_lone_close(world: &World, dead: ServerId, conversation: &Conversation) -> bool {
    let Some(leg) = conversation.legs.get(&dead) else { return false };
    let passed =
        leg.reset && conversation.reset_to_client || leg.fin.is_some() && leg.fin == conversation.sent_fin;
    let hold = world.knobs.timing.close_hold.as_micros() as u64;
    let together = |c: &&Conversation| {
        let end = c.legs.get(&dead).and_then(|leg| leg.fin);
        let shared = c.legs.iter().any(|(id, leg)| *id != dead && leg.fin.is_some() && leg.fin == end);
        if c.client_reset || shared || !world.disputable.contains(&(c.client, c.isn)) {
            // The client had closed, too, or this close had another cause, or replicas were behind.
            return false;
        }
        let closed = c.legs.get(&dead).and_then(|leg| leg.closed_at).zip(leg.closed_at);
        closed.is_some_and(|(one, other)| one.abs_diff(other) <= hold / 2)
    };
    passed && world.observer.conversations.iter().filter(together).count() <= 1
}

/// Why a connection may hang although no evidence could show it, or for reasons outside the engine.
fn why_stuck(world: &World, c: usize, client: &Client, index: usize) -> Option<&'static str> {
    if forgotten(world, client, index) {
        return Some("smoltcp forgot to retransmit");
    }
    if client.waits_for_turn(index, &world.agreement) {
        // The connection that it waits for is judged instead.
        return Some("another connection is stuck");
    }
    let ovm = world.service.ovm().and_then(|id| world.guest_of(id))?;
    let (own, psc) = client.ends(index)?;
    let conversation = world.observer.conversation_of(own, psc);
    if conversation.is_some_and(|c| c.reset_to_client && world.refused.contains(&(own, c.isn))) {
        // The client did not learn of the promotion, and the OVM sends nothing: RVMs know no such conversation.
        return Some("the service died during the handshake");
    }
    // A new OVM gets no new bytes before it has sent everything that clients were sent.
    let all = world.service.conversations(0, usize::MAX);
    let waits = all.iter().any(|c| (c.client, c.psc) == (own, psc) && c.recuperating);
    if waits && world.guests[ovm].forgot(world.now, None) {
        return Some("smoltcp forgot to retransmit what others wait for");
    }
    let lossy = |links: &[LinkKnobs], index: usize| links.get(index).is_some_and(|link| !link.faithful());
    let moves = conversation.is_some_and(|c| world.now < c.moved_at + 2 * LONGEST_RTO_US);
    // What smoltcp retransmits beyond the client's window is lost each time.
    let id = world.guests[ovm].id;
    let leg = conversation.and_then(|c| c.legs.get(&id));
    let overran = leg.is_some_and(|leg| leg.overran);
    if moves && (overran || lossy(&world.knobs.client_links, c) || lossy(&world.knobs.guest_links, ovm)) {
        return Some("lost packets made it slow");
    }
    if conversation.is_some_and(Conversation::is_deadlocked) {
        return Some("two smoltcp stacks in a deadlock");
    }
    if world.guests[ovm].health == Health::Spinning && conversation.is_some_and(Conversation::is_acknowledged)
    {
        return Some("the OVM spun, and an acknowledgement of it was lost");
    }
    let is_promotable = |server: &ServerStatus| server.not_promotable.is_none();
    if world.lost_behind_lossy && !world.service.status().servers.iter().any(is_promotable) {
        // Clients do not wait for a slow replica (rule 4); then there is no witness of a hang.
        return Some("its last replica was evicted, behind a link that loses packets");
    }
    // The client can't send enough for RVMs to answer; or windows that never have room for a segment show nothing
    // when they are zero.
    let tiny = world.guests[ovm].receive_buffer() < usize::from(world.guests[ovm].mtu());
    let shut = conversation.is_some_and(|c| c.window_shut);
    match world.guests[ovm].health {
        Health::Hung => (tiny || shut).then_some("the OVM hung with its window shut"),
        // smoltcp shrinks a window that it had offered; the client is not told.
        Health::Spinning => {
            (tiny && leg.is_some_and(|leg| leg.window_shut)).then_some("the OVM spun with a tiny window shut")
        }
        _ => None,
    }
}

/// Whether the connection is stuck because a TCP stack at one of its ends does nothing.
fn forgotten(world: &World, client: &Client, index: usize) -> bool {
    let now = world.now;
    let ovm = world.service.ovm().and_then(|id| world.guest_of(id));
    let Some((own, _)) = client.ends(index) else {
        return false;
    };
    client.forgot(now, index) || ovm.is_some_and(|g| world.guests[g].forgot(now, Some(own)))
}

/// Checks that every acknowledged request is in the state of the server that serves, and of each that could.
fn servers(world: &mut World) -> Verdict {
    if world.lies_served || world.forgetful_served {
        return Ok(());
    }
    let status = world.service.status();
    for server in &status.servers {
        let serves = server.role != Role::Rvm;
        // A replica that is behind gets what it lacks if it is promoted.
        if !serves && (server.not_promotable.is_some() || server.behind_bytes > 0) {
            continue;
        }
        let Some(guest) = world.guest_of(server.server) else {
            continue;
        };
        let unordered = unordered_keys(world, server.server);
        let guest = &world.guests[guest];
        if guest.health != Health::Running {
            continue;
        }
        for (key, unordered) in unordered.into_iter().enumerate() {
            let (want, have) = (world.agreement.shared.logs[key], guest.shared.logs[key]);
            let settled = !world.agreement.unknown[key] && !world.agreement.in_use(key) && !unordered;
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

/// Checks that each replica that could take over has every byte that an OVM acknowledged.
fn bytes(world: &mut World) -> Verdict {
    if world.lies_served || world.forgetful_served || world.untrue_served {
        return Ok(());
    }
    let status = world.service.status();
    let promotable = |server: &&ServerStatus| {
        let lies = world.observer.liars.contains(&server.server) || world.resetters.contains(&server.server);
        server.role == Role::Rvm && server.not_promotable.is_none() && server.behind_bytes == 0 && !lies
    };
    for server in status.servers.iter().filter(promotable) {
        let id = server.server;
        let attached = world.observer.attached.get(&id).copied().unwrap_or(0);
        for conversation in world.observer.latest().filter(|c| c.began > attached) {
            let leg = conversation.legs.get(&id);
            // A replica that closed by itself does not need the rest.
            if leg.is_some_and(|leg| leg.reset || leg.fin.is_some()) {
                continue;
            }
            // A FIN is no byte of data.
            let has = leg.map_or(0, |leg| leg.acked) + 1;
            if has < conversation.ovm_acked {
                return Err((
                    "no acknowledged byte is missing",
                    format!(
                        "{id:?} is promotable and acknowledged {:?} of {}, the OVM {}",
                        leg.map(|leg| leg.acked),
                        conversation.client,
                        conversation.ovm_acked
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Keys of conversations in which a server diverged: the order does not apply to it there (rule 3).
fn unordered_keys(world: &World, server: ServerId) -> [bool; KEYS] {
    let mut keys = [false; KEYS];
    let diverged = |c: &&Conversation| c.diverged(server);
    for conversation in world.observer.conversations.iter().filter(diverged) {
        for client in &world.clients {
            for (index, plan) in client.knobs.plans.iter().enumerate() {
                if client.ends(index).is_some_and(|(own, _)| own == conversation.client) {
                    for step in &plan.steps {
                        if let Step::Shared { key, .. } = step {
                            keys[usize::from(*key)] = true;
                        }
                    }
                }
            }
        }
    }
    keys
}
