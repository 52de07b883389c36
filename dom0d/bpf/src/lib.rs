//! The fast path in the kernel. Client and OVM talk through two tc programs that translate between them. The daemon reads
//! copies of what passed, and handles itself what does not pass.
//!
//! ```text
//!  client ── bridge ── anchor ⇥ egress:  program `client` ──redirect──▶ vif of the OVM
//!                        ▲                    │ record, first
//!                        │                    ▼
//!                        │              lossless ring ──▶ daemon ──▶ replicas
//!                        │                    ▲
//!                        │                    │ record, first
//!                     bridge ◀──passes── vif ⇤ ingress: program `server` (of a replica: its own lossy ring)
//! ```
//!
//! * **Who may speak** is one word, epoch and slot, which [`Tap::activate`] stores. The store is fence and promotion at once
//!   (rule 1), however many conversations there are.
//! * **A conversation** passes while it has an entry of the present epoch ([`Tap::install`]) and each of its segments is new
//!   in its direction. `understudy_protocol::Flow` specifies what is new, and the translation. The first segment that is
//!   not new goes to the daemon, with all that follow, until the daemon installs the entry again. The daemon learns of it
//!   from the record, and records are in order.
//! * **Order.** Both directions of clients and OVM share one ring, in the order of reservations. Whatever passed under
//!   an older epoch lies before the ring's end as it was after [`Tap::activate`] ([`Tap::end`], [`Tap::next_before`]),
//!   however much clients send later.
//! * **Room.** The windows that client and OVM are told end at bounds, which the daemon moves on as replicas follow
//!   ([`Tap::extend`]). If the daemon does not run for a while, bulk transfers stop at these bounds before the ring is full.
//! * **Alone.** If the daemon is away for longer than its grace and the policy is to serve, the kernel passes everything,
//!   translated as far as the entry says, and conversations begin and end without the daemon. A conversation that passed so
//!   stays with the kernel until it ends.
//! * **Waking.** Records of what passed do not wake the daemon, which reads them at its next look. Records of what waits
//!   for the daemon wake it at once.
//!
//! [`layout`] is the one definition of what both sides share. The programs are C, in `programs/`, compiled by
//! `build.rs`.

mod contain;
mod inject;
pub mod layout;
mod load;
mod pages;
mod shared;
mod tap;

pub use contain::{CONTAIN_NUMBER, Containment, Holds, load_containment};
pub use inject::{Cut, Injector, ignore_outgoing};
pub use load::{
    CONTAIN_PRIORITY, LoadError, PRIORITY, Programs, Settings, is_pinned, load, number, prepared_interfaces,
    take_off, unpin,
};
pub use pages::Pages;
pub use tap::{Copied, Packet, RingEnd, Source, Tap};

// As many servers as the engine has slots for.
const _: () = assert!(layout::SLOTS == understudy_protocol::MAX_SERVERS);

/// The layout that programs, maps and daemon agree on, as text. Pinned maps of another layout can't be used.
pub const LAYOUT: &str =
    concat!(include_str!(concat!(env!("OUT_DIR"), "/layout.h")), include_str!("../programs/maps.h"));

impl layout::Conversation {
    /// An entry for a conversation. `place`, the index of its bounds, is its own and below [`Settings::conversations`];
    /// [`Tap::install`] sets its epoch and bounds.
    pub fn new(flow: &understudy_protocol::Flow, client_mac: [u8; 6], place: u32) -> Self {
        Self {
            epoch: 0,
            passing: layout::PASSING,
            client_mac,
            server_shift: flow.server_shift,
            told_shift: flow.told_shift,
            timestamps: u32::from(flow.timestamps),
            seq_delta: flow.seq_delta,
            ts_delta: flow.ts_delta,
            ts_floor: flow.ts_floor,
            server_tsval: flow.server_tsval,
            told_tsval: flow.told_tsval,
            ts_recent: flow.ts_recent,
            up_nxt: flow.up_nxt,
            told_acked: flow.told_acked,
            server_edge: flow.server_edge,
            down_nxt: flow.down_nxt,
            client_acked: flow.client_acked,
            client_edge: flow.client_edge,
            client_shift: u32::from(flow.client_shift),
            place,
        }
    }

    /// The protocol's view of it, within these bounds.
    pub fn flow(&self, bounds: layout::Bounds) -> understudy_protocol::Flow {
        understudy_protocol::Flow {
            seq_delta: self.seq_delta,
            ts_delta: self.ts_delta,
            ts_floor: self.ts_floor,
            server_tsval: self.server_tsval,
            told_tsval: self.told_tsval,
            ts_recent: self.ts_recent,
            up_nxt: self.up_nxt,
            told_acked: self.told_acked,
            server_edge: self.server_edge,
            down_nxt: self.down_nxt,
            client_acked: self.client_acked,
            client_edge: self.client_edge,
            client_shift: self.client_shift as u8,
            server_shift: self.server_shift,
            told_shift: self.told_shift,
            timestamps: self.timestamps != 0,
            bounds: understudy_protocol::Bounds { up: bounds.up, down: bounds.down },
        }
    }
}

impl layout::Key {
    /// The conversation of `client` with port `psc_port` of the PSC.
    pub fn new(client: std::net::SocketAddr, psc_port: u16) -> Self {
        let mut key = Self { client_port: client.port(), psc_port, ..Self::default() };
        match client.ip() {
            std::net::IpAddr::V4(v4) => {
                key.version = 4;
                key.client[..4].copy_from_slice(&v4.octets());
            }
            std::net::IpAddr::V6(v6) => {
                key.version = 6;
                key.client = v6.octets();
            }
        }
        key
    }
}
