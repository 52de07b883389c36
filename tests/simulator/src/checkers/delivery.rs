//! The daemon plays the client faithfully: servers get the client's bytes, within their window, and
//! no acknowledgement of bytes that they have not sent or the client has not got.

use super::Checker;
use crate::observer::{Observer, Seen};

pub(crate) struct Delivery;

impl Checker for Delivery {
    fn rule(&self) -> &'static str {
        "delivery to servers"
    }

    fn see(&mut self, observer: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::ToServer(server, segment) = seen else {
            return Ok(());
        };
        let Some(conversation) = observer.conversation_of(segment.src, segment.dst) else {
            return Err(format!("{server:?} is sent {segment}, but no client spoke"));
        };
        if segment.syn {
            if segment.seq != conversation.isn {
                return Err(format!(
                    "{server:?} is sent a SYN with another ISN than the client's {} ({segment})",
                    conversation.isn
                ));
            }
            return Ok(());
        }
        if segment.rst {
            return Ok(());
        }
        let position = conversation.client_position(segment.seq);
        let end = position + segment.payload.len() as i64;
        let acknowledged_probe = segment.payload.len() == 1;
        if !acknowledged_probe && let Some(at) = conversation.received.conflict(position, segment.payload) {
            return Err(format!(
                "{server:?} is handed another byte at {at} than the client sent ({segment})"
            ));
        }
        if observer.is_refused(conversation, *server) {
            return Ok(());
        }
        if !conversation.received.unknown(position, segment.payload.len()).is_empty() {
            return Err(format!("{server:?} is handed bytes that the client did not send ({segment})"));
        }
        if segment.fin && conversation.client_fin != Some(end) {
            return Err(format!(
                "{server:?} is handed FIN at {end}, the client's is at {:?} ({segment})",
                conversation.client_fin
            ));
        }
        let Some(leg) = conversation.legs.get(server) else {
            return Ok(());
        };
        if observer.liars.contains(server) {
            return Ok(());
        }
        let (Some(iss), Some(ack)) = (leg.iss, segment.ack) else {
            return Ok(());
        };
        let acked = i64::from(ack.wrapping_sub(iss.wrapping_add(1)) as i32);
        let mut said = leg.produced.contiguous() as i64;
        if leg.fin == Some(said) {
            said += 1;
        }
        if acked > said && !leg.contradicts_itself {
            return Err(format!(
                "{server:?} is acknowledged up to {acked} but has said {said} only ({segment})"
            ));
        }
        let is_ovm = observer.ovm == Some(*server);
        // The daemon supplies what an OVM sent to a silent client. The FIN counts one.
        let ovm = observer.ovm.and_then(|ovm| conversation.legs.get(&ovm));
        let mut kept = conversation.sent.contiguous();
        // One OVM's bytes close another's gaps.
        while let Some(end) =
            conversation.recorded.iter().chain(ovm).find_map(|leg| leg.produced.run_at(kept))
        {
            kept = end;
        }
        if acked > conversation.client_acked.max(kept as i64 + 1) && !is_ovm {
            return Err(format!(
                "{server:?} is acknowledged up to {acked}, the client acknowledged {} and the OVM said {kept} ({segment})",
                conversation.client_acked
            ));
        }
        // One byte beyond a full window is a probe.
        if !is_ovm && end > leg.window_edge + 1 && !segment.payload.is_empty() {
            return Err(format!(
                "{server:?} is handed bytes up to {end}, its window ends at {} ({segment})",
                leg.window_edge
            ));
        }
        Ok(())
    }
}
