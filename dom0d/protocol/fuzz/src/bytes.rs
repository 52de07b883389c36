//! The input of a target, taken byte by byte, with zeros after its end.

/// See the module.
pub(crate) struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub(crate) fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// The error to add to a number: mostly 0, sometimes small, seldom large.
    pub(crate) fn error(&mut self) -> u32 {
        match self.byte() {
            0..=150 => 0,
            small @ 151..=230 => (i32::from(small) - 190) as u32,
            huge => (u32::from(huge) - 230).wrapping_mul(0x0a3d_70a3),
        }
    }
}
