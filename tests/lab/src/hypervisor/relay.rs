//! Impairs one host's link: while it does, every frame of the host's `eth0` takes a detour through
//! this process, which loses, duplicates, delays and overtakes. There is no netem everywhere.
//!
//! ```text
//! out:  stack -> eth0 egress hook -fwd-> out0 ~veth~ out1 -> relay -> eth0 (marked: passes the hook)
//! in:   eth0 ingress hook -fwd-> in0 ~veth~ in1 -> relay -> in1 (marked) ~veth~ in0
//!         -> tc redirect -> eth0 ingress (marked: passes the hook) -> stack
//! ```
//!
//! It happens inside the host's namespace: dom0 sees neither an interface change nor the detour.
//! Frames leave the detour cut to MTU size with their checksums filled, as those of a network card.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike as _, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;

use crate::client::random::Random;
use crate::host::{Group, Host, Link, in_group};

use super::lock;

/// Mark of the frames that have been through the relay.
const MARK: u32 = 0x1ab;
/// How much longer a frame is held that others are to overtake.
const REORDER_HOLD: Duration = Duration::from_millis(2);
/// Most frames that wait in one direction; a further one is lost, as in any queue.
const QUEUE_MAX: usize = 10_000;
/// Longest frame: one that could not be cut is an error, not a surprise.
const FRAME_MAX: usize = 65_536;
/// Frames taken in before those that are due are sent.
const BATCH: usize = 64;
/// Socket buffer for bursts while the relay sends.
const BUFFER_BYTES: usize = 8 << 20;
/// How often a relay that has nothing to do looks whether it is to end.
const IDLE: Duration = Duration::from_millis(50);

/// A running impairment.
#[derive(Debug)]
pub(super) struct Relay {
    host: Host,
    /// Where its helpers run: a frozen domain's group would stop them.
    helpers: Group,
    shared: Arc<Shared>,
    directions: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    link: Mutex<Link>,
    ending: AtomicBool,
}

impl Relay {
    /// Leads the host's frames through a new relay.
    pub(super) fn insert(host: &Host, helpers: Group, link: Link) -> Result<Relay> {
        let shared = Arc::new(Shared { link: Mutex::new(link), ending: AtomicBool::new(false) });
        let mut relay = Relay { host: host.clone(), helpers, shared, directions: Vec::new() };
        if let Err(error) = relay.plumb() {
            if let Err(also) = relay.remove() {
                eprintln!("{also:#}");
            }
            return Err(error.context(format!("impairing the link of {}", host.name)));
        }
        Ok(relay)
    }

    fn plumb(&mut self) -> Result<()> {
        let host = &self.host;
        self.shell(
            "set -e\n\
             mac=$(cat /sys/class/net/eth0/address)\n\
             for way in in out; do\n\
               ip link add ${way}0 type veth peer name ${way}1\n\
               for end in ${way}0 ${way}1; do\n\
                 echo 1 > /proc/sys/net/ipv6/conf/$end/disable_ipv6\n\
                 ip link set $end arp off\n\
                 ethtool -K $end tx off sg off tso off gso off gro off > /dev/null\n\
               done\n\
             done\n\
             # Frames that come back in by in0 are for the same MAC as on eth0.\n\
             ip link set in0 address $mac\n\
             tc qdisc add dev in0 clsact\n\
             tc filter add dev in0 ingress protocol all u32 match u32 0 0 \
               action mirred ingress redirect dev eth0\n\
             for end in in0 in1 out0 out1; do ip link set $end up; done\n",
        )?;
        let sockets = host.enter(|| -> Result<_> {
            let out = (packet_socket("out1", true)?, packet_socket("eth0", false)?);
            let back = packet_socket("in1", true)?;
            let back = (back.try_clone()?, back);
            Ok([("out", out), ("in", back)])
        })??;
        for (seed, (way, (from, to))) in sockets.into_iter().enumerate() {
            let shared = Arc::clone(&self.shared);
            let direction = Direction::new(from, to, 0x5eed + seed as u64);
            let work = move || direction.run(&shared);
            let thread = std::thread::Builder::new().name(format!("relay-{way}"));
            self.directions.push(thread.spawn(work).context("starting a thread")?);
        }
        // Last, so that no frame is led where nobody reads.
        self.shell(&format!(
            "nft -f - <<'end'\n\
                 table netdev link {{\n\
                 chain outbound {{\n type filter hook egress device \"eth0\" priority 0; policy accept;\n \
                 meta mark != {MARK} fwd to \"out0\"\n }}\n\
                 chain inbound {{\n type filter hook ingress device \"eth0\" priority 0; policy accept;\n \
                 meta mark != {MARK} fwd to \"in0\"\n }}\n\
                 }}\n\
                 end\n"
        ))
    }

    /// Changes what it does to frames that come from now on.
    pub(super) fn set(&self, link: Link) {
        *lock(&self.shared.link) = link;
    }

    /// Lets frames take the direct way again; those still inside are sent at once.
    pub(super) fn remove(mut self) -> Result<()> {
        let direct = self.shell("nft delete table netdev link 2>/dev/null || true\n");
        self.end();
        direct?;
        self.shell(
            "for end in in0 out0; do\n\
               [ ! -e /sys/class/net/$end ] || ip link del $end\n\
             done\n",
        )
        .with_context(|| format!("restoring the link of {}", self.host.name))
    }

    /// Forgets it with the namespace that it is in.
    pub(super) fn abandon(mut self) {
        self.end();
    }

    fn shell(&self, script: &str) -> Result<()> {
        let mut command = in_group(&self.helpers, "sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let output = self.host.spawn(&mut command)?.wait_with_output()?;
        if !output.status.success() {
            bail!("{}: {}", self.host.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    fn end(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        for thread in self.directions.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One way through the relay.
struct Direction {
    from: OwnedFd,
    to: OwnedFd,
    waiting: BinaryHeap<Reverse<Waiting>>,
    arrivals: u64,
    /// When the link is done with what was put on it.
    busy_until: Instant,
    random: Random,
}

/// Ordered by when it is due, then by arrival.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    arrival: u64,
    frame: Vec<u8>,
}

impl Direction {
    fn new(from: OwnedFd, to: OwnedFd, seed: u64) -> Direction {
        Direction {
            from,
            to,
            waiting: BinaryHeap::new(),
            arrivals: 0,
            busy_until: Instant::now(),
            random: Random::new(seed),
        }
    }

    fn run(mut self, shared: &Shared) {
        let mut buffer = vec![0; FRAME_MAX];
        while !shared.ending.load(Ordering::Relaxed) {
            self.wait();
            let link = *lock(&shared.link);
            for _ in 0..BATCH {
                match recv(self.from.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(len) => self.take(&buffer[..len], &link),
                    Err(Errno::EAGAIN | Errno::EINTR) => break,
                    Err(error) => {
                        eprintln!("relay: reading: {error}");
                        return;
                    }
                }
            }
            self.send_due(Instant::now());
        }
        while let Some(Reverse(waiting)) = self.waiting.pop() {
            self.send(&waiting.frame);
        }
    }

    /// Until a frame arrives or is due.
    fn wait(&self) {
        let limit = self
            .waiting
            .peek()
            .map_or(IDLE, |Reverse(next)| next.due.saturating_duration_since(Instant::now()).min(IDLE));
        let mut fds = [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)];
        // Interrupted is as good as woken.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(limit)), None);
    }

    fn take(&mut self, frame: &[u8], link: &Link) {
        if self.chance(link.loss) {
            return;
        }
        self.queue(frame, link);
        if self.chance(link.duplicate) {
            self.queue(frame, link);
        }
    }

    fn queue(&mut self, frame: &[u8], link: &Link) {
        if self.waiting.len() >= QUEUE_MAX {
            return;
        }
        let mut due = Instant::now();
        if let Some(rate) = link.rate_bits {
            let bits = frame.len() as u64 * 8;
            let on_the_wire = Duration::from_nanos(bits.saturating_mul(1_000_000_000) / rate);
            self.busy_until = self.busy_until.max(due) + on_the_wire;
            due = self.busy_until;
        }
        due += link.delay;
        if self.chance(link.reorder) {
            due += REORDER_HOLD;
        }
        self.arrivals += 1;
        let waiting = Waiting { due, arrival: self.arrivals, frame: frame.to_vec() };
        self.waiting.push(Reverse(waiting));
    }

    fn send_due(&mut self, now: Instant) {
        while self.waiting.peek().is_some_and(|Reverse(next)| next.due <= now) {
            if let Some(Reverse(waiting)) = self.waiting.pop() {
                self.send(&waiting.frame);
            }
        }
    }

    fn send(&self, frame: &[u8]) {
        // A full queue behind the relay loses frames as one before it does.
        let _ = send(self.to.as_raw_fd(), frame, MsgFlags::empty());
    }

    /// True with this probability.
    fn chance(&mut self, part: f64) -> bool {
        // 53 bits, what a f64 in [0, 1) holds.
        ((self.random.next() >> 11) as f64) < part * (1_u64 << 53) as f64
    }
}

/// A packet socket on one interface of this thread's namespace, whose frames carry the mark.
fn packet_socket(interface: &str, receives: bool) -> Result<OwnedFd> {
    let protocol = receives.then_some(SockProtocol::EthAll);
    let made = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
    let made = made.context("opening a packet socket")?;
    setsockopt(&made, sockopt::Mark, &MARK).context("marking a socket's frames")?;
    setsockopt(&made, sockopt::RcvBufForce, &BUFFER_BYTES).context("sizing a packet socket")?;
    let address = getifaddrs()
        .context("listing interfaces")?
        .filter(|entry| entry.interface_name == interface)
        .filter_map(|entry| entry.address)
        .find(|address| address.family() == Some(AddressFamily::Packet))
        .with_context(|| format!("{interface} has no link address"))?;
    bind(made.as_raw_fd(), &address).with_context(|| format!("binding to {interface}"))?;
    Ok(made)
}
