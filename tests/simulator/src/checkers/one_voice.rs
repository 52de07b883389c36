//! Rule 1, one voice: what a client is sent for the first time in an epoch comes from the server
//! that serves in that epoch, or was recorded from a former one while that served.

use super::Checker;
use crate::observer::{Observer, Seen};

pub(crate) struct OneVoice;

impl Checker for OneVoice {
    fn rule(&self) -> &'static str {
        "one voice"
    }

    fn see(&mut self, observer: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::ToClient(segment) = seen else {
            return Ok(());
        };
        let Some(conversation) = observer.conversation_of(segment.dst, segment.src) else {
            return Err(format!("a client that never spoke is sent {segment}"));
        };
        let Some(ovm) = observer.ovm else {
            return Err(format!("nobody serves and a client is sent {segment}"));
        };
        if segment.syn || segment.rst || observer.liars.contains(&ovm) {
            return Ok(());
        }
        let Some(position) = conversation.view_position(segment.seq) else {
            return Err(format!("no SYN-ACK was sent before {segment}"));
        };
        let leg = conversation.legs.get(&ovm);
        if leg.is_some_and(|leg| leg.contradicts_itself) {
            return Ok(());
        }
        for (from, to) in conversation.sent.unknown(position, segment.payload.len()) {
            for at in from..to {
                let byte = segment.payload[(at as i64 - position) as usize];
                let produced = leg.and_then(|leg| leg.produced.get(at));
                let recorded = conversation.recorded.iter().any(|leg| leg.produced.get(at) == Some(byte));
                if produced != Some(byte) && !recorded {
                    return Err(format!(
                        "position {at} of the answers to {} is sent as {byte:#04x}, but the OVM {ovm:?} said {produced:x?} ({segment})",
                        segment.dst
                    ));
                }
            }
        }
        if segment.fin {
            let end = position + segment.payload.len() as i64;
            let said = leg.and_then(|leg| leg.fin);
            let recorded = conversation.recorded.iter().any(|leg| leg.fin == Some(end));
            if conversation.sent_fin.is_none() && said != Some(end) && !recorded {
                return Err(format!(
                    "{} is sent FIN at {end}, but the OVM {ovm:?} said {said:?} ({segment})",
                    segment.dst
                ));
            }
        }
        Ok(())
    }
}
