//! Rule 6, bounded: what the engine holds stays within its limits.

use super::{Checker, Licence};
use crate::observer::{Observer, Seen};

pub(crate) struct Bounded {
    retained_limit: u64,
}

impl Bounded {
    pub(crate) fn new(licence: &Licence) -> Self {
        Self { retained_limit: licence.retained_limit }
    }
}

impl Checker for Bounded {
    fn rule(&self) -> &'static str {
        "bounded"
    }

    fn see(&mut self, _: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        if let Seen::Status(status) = seen
            && status.retained_bytes > self.retained_limit
        {
            return Err(format!(
                "{} bytes are retained, more than {}",
                status.retained_bytes, self.retained_limit
            ));
        }
        Ok(())
    }
}
