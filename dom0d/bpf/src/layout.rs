//! What the daemon and the programs in the kernel share: the only definition of it. `build.rs` makes the
//! programs' header of this file.
//!
//! All numbers are in the host's byte order but where a field says otherwise.

/// Servers of a service that can have their vif's frames told apart.
pub const SLOTS: usize = 8;

/// Ports of a PSC.
pub const PORTS: usize = 16;

/// Why frames went which way; see [`COUNTERS`].
pub const REASONS: usize = 21;

/// In [`Control::active`] instead of a slot: nobody is the OVM.
pub const NO_SLOT: u64 = 0xff;

/// In [`Conversation::passing`]: the kernel forwards.
pub const PASSING: u32 = 1;

/// In [`Conversation::passing`]: the kernel forwards everything, for good, because the daemon was away.
pub const ALONE: u32 = 2;

/// In [`Record::flags`]: the kernel has forwarded the segment.
pub const FORWARDED: u16 = 1;

/// In [`Record::flags`]: the kernel forwards nothing of this conversation any more until it is told to.
pub const HANDED_OVER: u16 = 2;

/// In [`Record::flags`]: the segment came from a client.
pub const FROM_CLIENT: u16 = 4;

/// In [`Record::flags`]: it was forwarded because the daemon was away, or had been.
pub const UNATTENDED: u16 = 8;

/// In [`Record::flags`]: who receives the segment takes it without a look at its TCP checksum.
pub const TRUSTED: u16 = 16;

/// In [`Control::policy`]: a daemon that stays away does not stop conversations.
pub const SERVE: u16 = 1;

/// Ports per protocol that a contained domain may be allowed to send to.
pub const ALLOWED: usize = 16;

/// Own addresses per family that a contained domain may say it has.
pub const ADDRESSES: usize = 2;

/// Mark of a server's frame that speaks for the PSC, translated.
pub const MARK: u32 = 0x5553;

/// Names of the counters, in the order of their places.
pub const COUNTERS: [&str; REASONS] = [
    "client_forwarded",
    "client_to_daemon",
    "server_forwarded",
    "server_to_daemon",
    "rvm_to_daemon",
    "ring_full",
    "ring_share_full",
    "rvm_ring_full",
    "unrecorded",
    "handed_over",
    "foreign_client",
    "foreign_server",
    "rewrite_failed",
    "not_service_port",
    "too_long",
    "wrong_epoch",
    "no_conversation",
    "malformed_options",
    "late_fence",
    "unattended",
    "other_vlan",
];

/// One declaration for both languages.
macro_rules! shared {
    ($($(#[$about:meta])* struct $name:ident as $c:literal {
        $($(#[$field_about:meta])* $field:ident: $kind:ty,)*
    })*) => {
        $(
            $(#[$about])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
            pub struct $name { $($(#[$field_about])* pub $field: $kind,)* }
        )*

        const STRUCTS: &[(&str, &str, usize, &[(&str, &str)])] = &[$((
            stringify!($name), $c, size_of::<$name>(), &[$((stringify!($field), stringify!($kind))),*],
        )),*];
    };
}

shared! {
    /// A server as the programs know it.
    struct Server as "server" {
        /// Number of its vif's interface; 0 if the slot is free.
        ifindex: u32,
        /// 1 if it has an IPv4 address.
        has_v4: u8,
        /// 1 if it has an IPv6 address.
        has_v6: u8,
        /// The guest's MAC.
        mac: [u8; 6],
        /// IPv4 address, network order.
        v4: [u8; 4],
        /// IPv6 address.
        v6: [u8; 16],
    }

    /// What holds for the whole service. In memory that the daemon maps.
    struct Control as "control" {
        /// Epoch of the plane, shifted left by 8, and the slot of the OVM: who may speak. One store of
        /// this word is fence and promotion.
        active: u64,
        /// When the daemon last came round, in nanoseconds of CLOCK_MONOTONIC.
        heartbeat_ns: u64,
        /// How old that may be before the policy counts.
        grace_ns: u64,
        /// Segments forwarded without a record, by the policy.
        unrecorded: u64,
        /// What to do when the ring is full and the daemon is gone.
        policy: u16,
        /// The VLAN that the service's frames are tagged with; 0 if they have no tag.
        vlan: u16,
        /// The PSC's MAC.
        psc_mac: [u8; 6],
        /// 1 if the PSC has an IPv4 address.
        has_v4: u8,
        /// 1 if the PSC has an IPv6 address.
        has_v6: u8,
        /// The PSC's IPv4 address, network order.
        psc_v4: [u8; 4],
        /// The PSC's IPv6 address.
        psc_v6: [u8; 16],
        /// The service's ports; 0 where there are fewer.
        ports: [u16; 16],
        /// The servers by slot.
        servers: [Server; 8],
    }

    /// What a domain may send from one vif: a contained one what it is allowed; the OVM all but its own segments of the
    /// service, which the daemon forwards, translated. Everything else is dropped.
    struct Hold as "hold" {
        /// Frames dropped of a contained domain.
        dropped: u64,
        /// 1 if it is the OVM of a service.
        is_ovm: u32,
        /// 1 if it may ask for addresses, as a client of DHCP and DHCPv6.
        dhcp: u32,
        /// 1 if it may be found by those it may send to: say which MAC its own addresses have.
        found: u32,
        /// Keeps the size a multiple of eight.
        padding: u32,
        /// UDP ports that it may send to; 0 where there are fewer.
        udp: [u16; 16],
        /// TCP ports that it may send to, or for the OVM those of the service; 0 where there are fewer.
        tcp: [u16; 16],
        /// Its own IPv4 addresses, network order; 0 where there are fewer.
        v4: [u8; 8],
        /// Its own IPv6 addresses; 0 where there are fewer.
        v6: [u8; 32],
    }

    /// Names a conversation: client and port of the PSC.
    struct Key as "key" {
        /// The client's address; an IPv4 address in the first four bytes, the others 0.
        client: [u8; 16],
        /// The client's port.
        client_port: u16,
        /// The PSC's port.
        psc_port: u16,
        /// 4 or 6.
        version: u32,
    }

    /// A conversation that the kernel forwards. But for the first fields it is the protocol's `Flow`.
    struct Conversation as "conversation" {
        /// The epoch of the plane that this is for.
        epoch: u32,
        /// Whether the kernel forwards.
        passing: u32,
        /// The client's next hop.
        client_mac: [u8; 6],
        /// Shift of the windows that the server advertises.
        server_shift: u8,
        /// Shift of the windows that the client is told.
        told_shift: u8,
        /// 1 if both sides send timestamps.
        timestamps: u32,
        /// Added to the server's sequence numbers for the client.
        seq_delta: u32,
        /// Added to the server's TSval for the client.
        ts_delta: u32,
        /// The server's TSval when it was promoted.
        ts_floor: u32,
        /// The server's latest TSval.
        server_tsval: u32,
        /// Latest TSval that the client was told.
        told_tsval: u32,
        /// TS.Recent of the client's segments.
        ts_recent: u32,
        /// RCV.NXT of what is recorded of the client.
        up_nxt: u32,
        /// Highest acknowledgment that the client was told.
        told_acked: u32,
        /// Furthest right edge of the server's window.
        server_edge: u32,
        /// SND.NXT towards the client.
        down_nxt: u32,
        /// SND.UNA towards the client.
        client_acked: u32,
        /// Right edge of the client's window.
        client_edge: u32,
        /// Shift of the windows that the client advertises.
        client_shift: u32,
        /// Where its [`Bounds`] are.
        place: u32,
    }

    /// Beyond which right edges nobody is told to send. In memory that the daemon maps.
    struct Bounds as "bounds" {
        /// For the client, in its own sequence numbers.
        up: u32,
        /// For the server, in the sequence numbers that the client knows.
        down: u32,
    }

    /// Begins each record of a ring; the packet follows, from its IP header on, as it came.
    struct Record as "record" {
        /// Bytes of the packet.
        length: u32,
        /// What it is, and what was done.
        flags: u16,
        /// The server's slot, for a server's segment.
        slot: u16,
        /// Epoch of the plane in which it came.
        epoch: u32,
        /// The frame's source address.
        source_mac: [u8; 6],
        /// Keeps the size a multiple of eight.
        padding: u16,
        /// If it was forwarded: right edge of the window that its receiver was told.
        edge: u32,
    }
}

/// The header for the programs.
pub fn c_header() -> String {
    let mut header = String::from("/* Made by build.rs of src/layout.rs. */\n#pragma once\n");
    for (name, value) in [
        ("SLOTS", SLOTS as u64),
        ("PORTS", PORTS as u64),
        ("REASONS", REASONS as u64),
        ("NO_SLOT", NO_SLOT),
        ("PASSING", u64::from(PASSING)),
        ("ALONE", u64::from(ALONE)),
        ("FORWARDED", u64::from(FORWARDED)),
        ("HANDED_OVER", u64::from(HANDED_OVER)),
        ("FROM_CLIENT", u64::from(FROM_CLIENT)),
        ("UNATTENDED", u64::from(UNATTENDED)),
        ("TRUSTED", u64::from(TRUSTED)),
        ("SERVE", u64::from(SERVE)),
        ("ALLOWED", ALLOWED as u64),
        ("ADDRESSES", ADDRESSES as u64),
        ("MARK", u64::from(MARK)),
    ] {
        header.push_str(&format!("#define {name} {value}\n"));
    }
    for (place, name) in COUNTERS.iter().enumerate() {
        header.push_str(&format!("#define COUNT_{} {place}\n", name.to_uppercase()));
    }
    for (_, c, size, fields) in STRUCTS {
        header.push_str(&format!("struct {c} {{\n"));
        for (field, kind) in *fields {
            let inner = kind.trim_matches(['[', ']']);
            let (element, count) = match inner.split_once(';') {
                Some((element, count)) => (element.trim(), format!("[{}]", count.trim())),
                None => (inner, String::new()),
            };
            let c_kind = match element {
                "u8" | "u16" | "u32" | "u64" => format!("__{element}"),
                other => {
                    let known = STRUCTS.iter().find(|(name, ..)| *name == other);
                    format!("struct {}", known.map_or(other, |(_, c, ..)| c))
                }
            };
            header.push_str(&format!("\t{c_kind} {field}{count};\n"));
        }
        header.push_str(&format!("}};\n_Static_assert(sizeof(struct {c}) == {size}, \"{c}\");\n"));
    }
    header
}
