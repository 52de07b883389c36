//! Hostile clients: they twist segments of their own conversations, and send segments from addresses that nobody has. They
//! know the protocol, the service and its addresses, and guess the rest.

use core::net::{IpAddr, SocketAddr};

use crate::forge::{self, Twist};
use crate::prng::Prng;

/// The behaviour of one hostile client.
#[derive(Clone, Debug)]
pub(crate) struct Hostility {
    /// How often, in a hundred, one of its stack's segments is twisted.
    pub(crate) twist_percent: u32,
    /// How often, in a hundred, a twisted segment replaces the true one instead of being sent beside it.
    pub(crate) instead_percent: u32,
    /// The ways in which it twists.
    pub(crate) twists: Vec<Twist>,
    /// Forged segments, each with its delay after the previous one.
    pub(crate) volley: Vec<(u64, Shot)>,
}

/// A forged segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shot {
    /// A SYN from an address that nobody has.
    SynOfNobody,
    /// A SYN of its own, whose SYN-ACK its stack refuses.
    Syn,
    /// An acknowledgment of no conversation, from an address that nobody has.
    AckOfNobody,
    /// A RST at a guessed number, in the name of a client whose conversation is open.
    Reset,
    /// Random bytes.
    Noise,
}

impl Hostility {
    pub(crate) fn draw(rng: &mut Prng) -> Self {
        let kinds = rng.between(1, 4);
        let twists = (0..kinds).map(|_| *rng.pick(&Twist::ALL)).collect();
        let shots = if rng.percent(60) { rng.log_between(1, 40) } else { 0 };
        // Rarely more than one kind, so that each has time to do harm.
        let kind = |rng: &mut Prng| {
            *rng.pick(&[
                Shot::SynOfNobody,
                Shot::SynOfNobody,
                Shot::Syn,
                Shot::AckOfNobody,
                Shot::Reset,
                Shot::Noise,
            ])
        };
        let (first, mixed) = (kind(rng), rng.percent(25));
        let volley = (0..shots)
            .map(|_| (rng.log_between(1, 400_000), if mixed { kind(rng) } else { first }))
            .collect();
        Self {
            twist_percent: *rng.pick(&[0, 2, 10, 10, 50, 100]),
            instead_percent: *rng.pick(&[0, 0, 50, 100]),
            twists,
            volley,
        }
    }

    /// The packets that leave in place of a segment of its stack.
    pub(crate) fn twist(&self, rng: &mut Prng, packet: Vec<u8>) -> Vec<Vec<u8>> {
        if !rng.percent(self.twist_percent) {
            return vec![packet];
        }
        let twist = *rng.pick(&self.twists);
        let twisted = forge::twisted(rng, &packet, twist);
        if rng.percent(self.instead_percent) { vec![twisted] } else { vec![twisted, packet] }
    }
}

impl Shot {
    /// The packet; `own` are the client's addresses, `open` the conversations that there are.
    pub(crate) fn packet(
        self,
        rng: &mut Prng,
        own: &[IpAddr],
        psc: &[SocketAddr],
        open: &[(SocketAddr, SocketAddr, u32)],
    ) -> Option<Vec<u8>> {
        let psc = *rng.pick(psc);
        let port = rng.between(1_024, 65_535) as u16;
        let own = own.iter().copied().find(|own| own.is_ipv4() == psc.is_ipv4())?;
        Some(match self {
            Self::SynOfNobody => {
                let from = SocketAddr::new(nobody(rng, psc.is_ipv6()), port);
                forge::syn(rng, from, psc)
            }
            Self::Syn => forge::syn(rng, SocketAddr::new(own, port), psc),
            Self::AckOfNobody => {
                let from = SocketAddr::new(nobody(rng, psc.is_ipv6()), port);
                forge::acknowledgment(rng, from, psc)
            }
            Self::Reset => {
                let last = open.len().checked_sub(1)?;
                let &(client, psc, sequence) = open.get(rng.between(0, last as u64) as usize)?;
                // smoltcp believes one anywhere in its window.
                let guess = sequence.wrapping_add(rng.between(1 << 24, 1 << 31) as u32);
                forge::reset(client, psc, guess, rng.percent(50).then(|| rng.next() as u32))
            }
            Self::Noise => forge::noise(rng),
        })
    }
}

/// An address that no host has.
fn nobody(rng: &mut Prng, ipv6: bool) -> IpAddr {
    let number = NOBODY + rng.between(0, 9) as u8;
    if ipv6 {
        IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number)])
    } else {
        IpAddr::from([10, 77, 0, number])
    }
}

/// The last byte of the first hostile client's addresses, and of the first address that nobody has.
const HOSTILE: u8 = 230;
const NOBODY: u8 = 240;

/// The addresses of a hostile client.
pub(crate) fn addresses(index: usize) -> Vec<IpAddr> {
    let number = HOSTILE + index as u8;
    vec![IpAddr::from([10, 77, 0, number]), IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number)])]
}

fn last_byte(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(v4) => v4.octets()[3],
        IpAddr::V6(v6) => v6.octets()[15],
    }
}

/// Nobody answers for it.
pub(crate) fn is_nobody(address: IpAddr) -> bool {
    last_byte(address) >= NOBODY
}

/// Whether segments of this address may be forged.
pub(crate) fn is_hostile(address: IpAddr) -> bool {
    last_byte(address) >= HOSTILE
}
