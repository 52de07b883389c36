//! 32-bit sequence numbers at the edge, 64-bit stream positions inside (RFC 9293 §3.4).
//!
//! Position 0 is the SYN, 1 the first byte of data; a FIN takes the position after the last byte.
//! Sequence numbers come from hostile peers and are never ordered by `<`: they become positions
//! here, nearest to one that is known, or nothing.

/// The sequence number of `position` in a stream that began with `iss`.
pub(crate) const fn seq_of(iss: u32, position: u64) -> u32 {
    iss.wrapping_add(position as u32)
}

/// The position nearest to `near` whose sequence number is `seq`; `None` if it lies before the SYN.
pub(crate) const fn position_of(iss: u32, seq: u32, near: u64) -> Option<u64> {
    let distance = seq.wrapping_sub(iss).wrapping_sub(near as u32) as i32;
    near.checked_add_signed(distance as i64)
}

/// `a` is later than `b` on a 32-bit circle (timestamps, RFC 7323 §5.2).
pub(crate) const fn later(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_survive_the_wrap() {
        let iss = u32::MAX - 2;
        for position in [0, 1, 2, 3, 4, (1 << 32) + 5, (7 << 32) - 1] {
            assert_eq!(position_of(iss, seq_of(iss, position), position), Some(position));
            assert_eq!(position_of(iss, seq_of(iss, position), position + 70_000), Some(position));
        }
    }

    #[test]
    fn before_the_syn_is_nothing() {
        assert_eq!(position_of(100, 99, 0), None);
        assert_eq!(position_of(100, 100 + (1 << 31), 0), None);
        assert_eq!(position_of(100, 99, 1), None);
    }
}
