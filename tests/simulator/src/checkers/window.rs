//! Rule 2, for windows: acknowledgements to a client and its window's right edge never move back over
//! a promotion.

use std::collections::BTreeMap;

use super::{Checker, Licence};
use crate::observer::{Observer, Seen};

#[derive(Clone, Copy)]
struct Promise {
    epoch: u64,
    ack: i64,
    edge: i64,
    earlier: Option<(i64, i64)>,
}

pub(crate) struct Window {
    in_order: bool,
    check_edge: bool,
    promises: BTreeMap<usize, Promise>,
}

impl Window {
    pub(crate) fn new(licence: &Licence) -> Self {
        Self {
            in_order: licence.servers_in_order,
            check_edge: licence.equal_windows,
            promises: BTreeMap::new(),
        }
    }
}

impl Checker for Window {
    fn rule(&self) -> &'static str {
        "acknowledgement and window"
    }

    fn see(&mut self, observer: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::ToClient(segment) = seen else {
            return Ok(());
        };
        let (Some(index), Some(ack)) = (
            observer.index_of(segment.dst, segment.src),
            segment.ack.filter(|_| !segment.rst && !segment.syn),
        ) else {
            return Ok(());
        };
        let conversation = &observer.conversations[index];
        let Some((_, scale)) = conversation.view else {
            return Ok(());
        };
        let ack = conversation.client_position(ack);
        let edge = ack + (i64::from(segment.window) << scale);
        let promise =
            self.promises.entry(index).or_insert(Promise { epoch: observer.epoch, ack, edge, earlier: None });
        if promise.epoch != observer.epoch {
            promise.epoch = observer.epoch;
            promise.earlier = Some((promise.ack, promise.edge));
        }
        let bound = if self.in_order { Some((promise.ack, promise.edge)) } else { promise.earlier };
        let now = *promise;
        promise.ack = promise.ack.max(ack);
        promise.edge = promise.edge.max(edge);
        let Some((least_ack, least_edge)) = bound else {
            return Ok(());
        };
        if ack < least_ack {
            return Err(format!("{} is acknowledged up to {ack} after {least_ack} ({segment})", segment.dst));
        }
        // Rescaling rounds down, by less than one unit of the largest scale in play.
        let widest = conversation.legs.values().map(|leg| leg.window_scale).max().unwrap_or(0).max(scale);
        if self.check_edge && edge + (1 << widest) <= least_edge && now.epoch == promise.epoch {
            return Err(format!(
                "{} was given a window up to {least_edge}, now {edge} ({segment})",
                segment.dst
            ));
        }
        Ok(())
    }
}
