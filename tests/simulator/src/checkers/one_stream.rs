//! Rule 2, one stream: a client never sees two bytes for one position, nor an acknowledgement of
//! what dom0 never had.

use super::Checker;
use crate::observer::{Observer, Seen};

pub(crate) struct OneStream;

impl Checker for OneStream {
    fn rule(&self) -> &'static str {
        "one stream"
    }

    fn see(&mut self, observer: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::ToClient(segment) = seen else {
            return Ok(());
        };
        let Some(conversation) = observer.conversation_of(segment.dst, segment.src) else {
            return Ok(());
        };
        if conversation.reset_to_client || conversation.client_reset {
            // The client's connection is gone.
            return Ok(());
        }
        let who = segment.dst;
        if let Some(ack) = segment.ack
            && !segment.rst
        {
            let acked = conversation.client_position(ack);
            let mut received = conversation.received.contiguous() as i64;
            if conversation.client_fin == Some(received) {
                received += 1;
            }
            if acked > received {
                return Err(format!(
                    "{who} is acknowledged up to {acked}, but dom0 has its bytes up to {received} only ({segment})"
                ));
            }
        }
        if segment.rst {
            return Ok(());
        }
        if segment.syn {
            return match conversation.view {
                Some((iss, scale)) if iss != segment.seq || scale != segment.window_scale.unwrap_or(0) => {
                    Err(format!(
                        "{who} is sent two different SYN-ACKs: ISS {iss} scale {scale}, then {segment}"
                    ))
                }
                _ => Ok(()),
            };
        }
        let Some(position) = conversation.view_position(segment.seq) else {
            return Ok(());
        };
        // A keepalive or window probe of a server repeats what was acknowledged, with any byte.
        let acknowledged = position + segment.payload.len() as i64 <= conversation.client_acked
            && segment.payload.len() == 1;
        if !acknowledged && let Some(at) = conversation.sent.conflict(position, segment.payload) {
            return Err(format!("{who} is sent two different bytes at position {at} ({segment})"));
        }
        let end = position + segment.payload.len() as i64;
        if let Some(fin) = conversation.sent_fin
            && !acknowledged
            && (end > fin && !segment.payload.is_empty() || segment.fin && end != fin)
        {
            return Err(format!(
                "{who} was sent FIN at {fin}, now {} at {end} ({segment})",
                if segment.fin { "FIN" } else { "data" }
            ));
        }
        if segment.fin && (conversation.sent.high() as i64) > end {
            return Err(format!(
                "{who} is sent FIN at {end}, but has data up to {} ({segment})",
                conversation.sent.high()
            ));
        }
        Ok(())
    }
}
