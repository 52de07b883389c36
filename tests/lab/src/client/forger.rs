//! A TCP client whose every segment can be bent before it is sent. It has an address of its own, for which no kernel answers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::frames::{ACK, Mac, PSH, RST, SYN, Segment, arp_answer, parse};
use super::random::Random;
use super::sniff::Wire;

/// How long to wait for a segment of a handshake, or for the answer to an honest request.
const PATIENCE: Duration = Duration::from_secs(10);

/// One connection.
pub(crate) struct Forger {
    wire: Wire,
    psc_mac: Mac,
    here: SocketAddr,
    psc: SocketAddr,
    /// SND.NXT and RCV.NXT.
    next: u32,
    received: u32,
    began: Instant,
    /// The server's latest TSval.
    echo: u32,
    /// What the server said, in order, since it was last taken.
    pub(crate) said: Vec<u8>,
    pub(crate) was_reset: bool,
}

impl Forger {
    /// Connects from `address`, from the namespace's only interface.
    pub(crate) fn connect(address: Ipv4Addr, psc: SocketAddr, psc_mac: Mac) -> Result<Self> {
        let mut random = Random::new(u64::from(u32::from(address)) ^ 0x5eed);
        let port = 20_000 + random.below(40_000) as u16;
        let mut forger = Self {
            wire: Wire::open_only()?,
            psc_mac,
            here: SocketAddr::new(IpAddr::V4(address), port),
            psc,
            next: random.next() as u32,
            received: 0,
            began: Instant::now(),
            echo: 0,
            said: Vec::new(),
            was_reset: false,
        };
        let mut syn = forger.segment(SYN, b"");
        syn.options = [&[2, 4, 0x05, 0xb4, 4, 2, 1, 3, 3, 7][..], &syn.options].concat();
        forger.send(&syn.frame(forger.wire.mac, psc_mac))?;
        forger.next = forger.next.wrapping_add(1);
        let deadline = Instant::now() + PATIENCE;
        while forger.received == 0 {
            ensure!(Instant::now() < deadline, "no SYN-ACK for {address}");
            forger.hear(Duration::from_millis(100))?;
        }
        forger.acknowledge()?;
        Ok(forger)
    }

    /// The next segment, with everything as it should be.
    pub(crate) fn segment(&self, flags: u8, payload: &[u8]) -> Segment {
        let mut segment = Segment::new(self.here, self.psc, flags);
        segment.sequence = self.next;
        segment.acknowledgment = if flags & ACK == 0 { 0 } else { self.received };
        let time = 7_000 + self.began.elapsed().as_millis() as u32;
        segment.options = [&[1, 1, 8, 10], &time.to_be_bytes()[..], &self.echo.to_be_bytes()].concat();
        segment.payload = payload.to_vec();
        segment
    }

    /// A frame of the segment, to be bent.
    pub(crate) fn frame(&self, segment: &Segment) -> Vec<u8> {
        segment.frame(self.wire.mac, self.psc_mac)
    }

    /// Sends a frame as it is; SND.NXT stays.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        self.wire.send(frame).map(drop)
    }

    /// Moves SND.NXT behind `length` bytes that were sent.
    pub(crate) fn advance(&mut self, length: usize) {
        self.next = self.next.wrapping_add(length as u32);
    }

    /// An acknowledgment as it should be.
    pub(crate) fn acknowledge(&self) -> Result<()> {
        self.send(&self.frame(&self.segment(ACK, b"")))
    }

    /// Resets the connection.
    pub(crate) fn reset(self) -> Result<()> {
        self.send(&self.frame(&self.segment(RST | ACK, b"")))
    }

    /// Sends an honest request again and again until it is answered; returns the first line of the answer.
    pub(crate) fn ask(&mut self, request: &[u8]) -> Result<String> {
        self.said.clear();
        let again = self.segment(ACK | PSH, request).sequence;
        self.advance(request.len());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut segment = self.segment(ACK | PSH, request);
            segment.sequence = again;
            self.send(&self.frame(&segment))?;
            if let Some(line) = self.line(Duration::from_millis(300))? {
                return Ok(line);
            }
            ensure!(!self.was_reset, "the connection was reset");
            ensure!(Instant::now() < deadline, "no answer to {:?}", String::from_utf8_lossy(request));
        }
    }

    /// The line that the server says within `limit`, acknowledged.
    pub(crate) fn line(&mut self, limit: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline && !self.was_reset {
            self.hear(deadline.saturating_duration_since(Instant::now()))?;
            if let Some(end) = self.said.windows(2).position(|pair| pair == b"\r\n") {
                self.acknowledge()?;
                let line = String::from_utf8_lossy(&self.said[..end]).into_owned();
                self.said.drain(..end + 2);
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    /// Receives one segment, if one comes in time; true if it brought new bytes. Answers ARP questions for this address.
    pub(crate) fn hear(&mut self, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        let mut frame = vec![0; 64 << 10];
        while let Some(length) = self.wire.frame(deadline, &mut frame)? {
            let frame = &frame[..length];
            let IpAddr::V4(here) = self.here.ip() else { bail!("forgers speak IPv4") };
            if let Some(answer) = arp_answer(frame, self.wire.mac, here) {
                self.send(&answer)?;
                continue;
            }
            let Some(seen) = parse(frame).filter(|seen| seen.to == self.here && seen.from == self.psc) else {
                continue;
            };
            self.was_reset |= seen.flags & RST != 0;
            if seen.tsval != 0 {
                self.echo = seen.tsval;
            } else if seen.flags & SYN != 0 {
                self.echo = tsval_of_syn(frame).unwrap_or(0);
            }
            if seen.flags & SYN != 0 {
                self.received = seen.sequence.wrapping_add(1);
                return Ok(true);
            }
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            let text = &frame[14 + total - seen.payload..14 + total];
            // What was heard already is left out; behind a gap all is sent again.
            let known = self.received.wrapping_sub(seen.sequence) as usize;
            let Some(new) = text.get(known..).filter(|new| !new.is_empty()) else { return Ok(false) };
            self.said.extend_from_slice(new);
            self.received = self.received.wrapping_add(new.len() as u32);
            return Ok(true);
        }
        Ok(false)
    }
}

fn tsval_of_syn(frame: &[u8]) -> Option<u32> {
    let at = 54 + frame.get(54..)?.windows(2).position(|pair| pair == [8, 10])?;
    Some(u32::from_be_bytes(frame.get(at + 2..at + 6)?.try_into().ok()?))
}

/// A way to bend the frame of a segment.
pub(crate) type Bend = fn(&mut Vec<u8>);

/// Frames that a receiver's kernel drops, or that can be read in more than one way. They are IPv4, with timestamps as their only
/// options.
pub(crate) const BENDS: [(&str, Bend); 22] = [
    ("MSS of 3 bytes", |frame| with_options(frame, &[2, 3, 0, 1])),
    ("window scale of 2", |frame| with_options(frame, &[3, 2, 1, 1])),
    ("SACK permitted of 3", |frame| with_options(frame, &[4, 3, 0, 1])),
    ("MSS beyond the SYN", |frame| with_options(frame, &[2, 4, 5, 0xb4])),
    ("SACK without blocks", |frame| with_options(frame, &[5, 2, 1, 1])),
    ("SACK of 9", |frame| with_options(frame, &[5, 9, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1])),
    ("timestamps of 9", |frame| with_options(frame, &[8, 9, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1])),
    ("timestamps twice", |frame| with_options(frame, &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0])),
    ("TCP-MD5 of 4", |frame| with_options(frame, &[19, 4, 0, 0])),
    ("TCP-AO of 4", |frame| with_options(frame, &[29, 4, 0, 0])),
    ("unknown of 0", |frame| with_options(frame, &[253, 0, 1, 1])),
    ("unknown of 1", |frame| with_options(frame, &[253, 1, 1, 1])),
    ("unknown beyond the end", |frame| with_options(frame, &[1, 1, 253, 3])),
    ("unknown", |frame| with_options(frame, &[253, 4, 1, 2])),
    BROKEN_IP,
    BROKEN_TCP,
    PARTIAL_TCP,
    ("a record of the route", |frame| with_ip_options(frame, &[7, 7, 4, 0, 0, 0, 0, 0])),
    ("a loose source route", |frame| with_ip_options(frame, &[131, 7, 4, 10, 77, 0, 1, 0])),
    ("IP options that overrun", |frame| with_ip_options(frame, &[7, 9, 4, 0])),
    ("no hops left", |frame| {
        frame[22] = 0;
        sum_ip(frame);
    }),
    ("a reserved bit of either header", |frame| {
        frame[20] |= 0x80;
        frame[46] |= 0x0e;
        sum_ip(frame);
        sum_tcp(frame);
    }),
];

/// A wrong checksum of the IP header.
pub(crate) const BROKEN_IP: (&str, Bend) = ("a broken IP header", |frame| frame[24] ^= 0x5a);
/// A wrong checksum of the segment.
pub(crate) const BROKEN_TCP: (&str, Bend) = ("a broken segment", |frame| frame[50] ^= 0x5a);
/// The sum that a local guest leaves to its device, though there is none.
pub(crate) const PARTIAL_TCP: (&str, Bend) = ("a checksum of the pseudo-header", |frame| {
    let check = !super::frames::checksum(&[&frame[26..34], &[0, 6], &segment_length(frame)]);
    frame[50..52].copy_from_slice(&check.to_be_bytes());
});

fn segment_length(frame: &[u8]) -> [u8; 2] {
    (u16::from_be_bytes([frame[16], frame[17]]) - 20).to_be_bytes()
}

fn with_options(frame: &mut Vec<u8>, options: &[u8]) {
    let end = 34 + usize::from(frame[46] >> 4) * 4;
    frame.splice(end..end, options.iter().copied());
    frame[46] += ((options.len() / 4) << 4) as u8;
    lengthen(frame, options.len());
    sum_tcp(frame);
}

fn with_ip_options(frame: &mut Vec<u8>, options: &[u8]) {
    frame.splice(34..34, options.iter().copied());
    frame[14] += (options.len() / 4) as u8;
    lengthen(frame, options.len());
}

fn lengthen(frame: &mut [u8], by: usize) {
    let total = u16::from_be_bytes([frame[16], frame[17]]) + by as u16;
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    sum_ip(frame);
}

fn sum_ip(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let check = super::frames::checksum(&[&frame[14..14 + usize::from(frame[14] & 15) * 4]]);
    frame[24..26].copy_from_slice(&check.to_be_bytes());
}

/// Of a frame without IP options.
fn sum_tcp(frame: &mut [u8]) {
    frame[50..52].fill(0);
    let check = super::frames::checksum(&[&frame[26..34], &[0, 6], &segment_length(frame), &frame[34..]]);
    frame[50..52].copy_from_slice(&check.to_be_bytes());
}

/// A command as Redis reads it.
pub(crate) fn command(words: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    super::redis::script::command(&mut bytes, words);
    bytes
}

impl std::fmt::Debug for Forger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forger").field("here", &self.here).finish_non_exhaustive()
    }
}

/// The address of the `n`th forger: none of the lab's own.
pub(crate) fn address(n: usize) -> Result<Ipv4Addr> {
    let host = u8::try_from(n).ok().and_then(|n| 150_u8.checked_add(n)).context("too many forgers")?;
    Ok(Ipv4Addr::new(10, 77, 0, host))
}
