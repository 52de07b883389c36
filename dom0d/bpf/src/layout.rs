//! The one definition of what the daemon and the programs in the kernel share. `build.rs` makes the programs' C header from
//! it.
//!
//! All numbers are in the host's byte order unless a field says otherwise.

/// Servers per service.
pub const SLOTS: usize = 8;

/// Ports per service.
pub const PORTS: usize = 16;

/// Number of counters; see [`COUNTERS`].
pub const REASONS: usize = 21;

/// In [`Control::active`] instead of a slot: nobody is the OVM.
pub const NO_SLOT: u64 = 0xff;

/// In [`Conversation::passing`]: the kernel passes the conversation.
pub const PASSING: u32 = 1;

/// In [`Conversation::passing`]: the kernel passes everything until the conversation ends, because the daemon was away.
pub const ALONE: u32 = 2;

/// In [`Record::flags`]: the kernel passed the segment.
pub const FORWARDED: u16 = 1;

/// In [`Record::flags`]: from this segment on the kernel passes nothing of the conversation, until the daemon installs it again.
pub const HANDED_OVER: u16 = 2;

/// In [`Record::flags`]: the segment came from a client.
pub const FROM_CLIENT: u16 = 4;

/// In [`Record::flags`]: the kernel passed the segment because the daemon is or was away.
pub const UNATTENDED: u16 = 8;

/// In [`Record::flags`]: the receiver takes the segment without verifying its TCP checksum.
pub const TRUSTED: u16 = 16;

/// In [`Control::policy`]: conversations continue while the daemon is away.
pub const SERVE: u16 = 1;

/// Ports per protocol that a contained domain may be allowed to send to.
pub const ALLOWED: usize = 16;

/// Own addresses per family that a contained domain may announce.
pub const ADDRESSES: usize = 2;

/// Mark of an OVM's frame that was translated, so that it comes from the PSC.
pub const MARK: u32 = 0x5553;

/// Names of the counters, by their index.
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

    /// The state of the whole service, in memory that the daemon maps.
    struct Control as "control" {
        /// Who may speak: the plane's epoch, shifted left by 8, and the slot of the OVM. One store of this word is fence
        /// and promotion (rule 1).
        active: u64,
        /// When the daemon last came round, in nanoseconds of CLOCK_MONOTONIC.
        heartbeat_ns: u64,
        /// How old the heartbeat may be before `policy` applies, in nanoseconds.
        grace_ns: u64,
        /// Segments passed without a record, because `policy` says so.
        unrecorded: u64,
        /// [`SERVE`], or 0: what happens once the daemon is away.
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
        /// The service's ports; unused ones are 0.
        ports: [u16; 16],
        /// The servers by slot.
        servers: [Server; 8],
    }

    /// What a domain may send from one vif. A contained domain may send what it is allowed; the OVM everything but segments of
    /// the service under its own address, which the daemon forwards, translated. Everything else is dropped.
    struct Hold as "hold" {
        /// How many frames of a contained domain were dropped.
        dropped: u64,
        /// 1 if it is the OVM of a service.
        is_ovm: u32,
        /// 1 if it may be a client of DHCP and DHCPv6.
        dhcp: u32,
        /// 1 if it may answer ARP and ND for its own addresses, so that those it may send to find it.
        found: u32,
        /// Keeps the size a multiple of eight.
        padding: u32,
        /// UDP ports that it may send to; unused ones are 0.
        udp: [u16; 16],
        /// TCP ports that it may send to, or the service's ports for the OVM; unused ones are 0.
        tcp: [u16; 16],
        /// Its own IPv4 addresses, network order; unused ones are 0.
        v4: [u8; 8],
        /// Its own IPv6 addresses; unused ones are 0.
        v6: [u8; 32],
    }

    /// Identifies a conversation: the client's socket and the PSC's port.
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

    /// A conversation that the kernel passes. Behind `client_mac` its fields are those of the protocol's `Flow`.
    struct Conversation as "conversation" {
        /// The plane's epoch for which this is valid.
        epoch: u32,
        /// 0, [`PASSING`] or [`ALONE`].
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
        /// RCV.NXT of the client's recorded stream.
        up_nxt: u32,
        /// Highest acknowledgment sent to the client.
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
        /// Index of its [`Bounds`].
        place: u32,
    }

    /// The furthest right edges of the windows that client and server are told, in memory that the daemon maps.
    struct Bounds as "bounds" {
        /// For the client, in its own sequence numbers.
        up: u32,
        /// For the server, in the sequence numbers that the client knows.
        down: u32,
    }

    /// The head of each record in a ring. The packet follows as it came, beginning with its IP header.
    struct Record as "record" {
        /// Bytes of the packet.
        length: u32,
        /// Flags, such as [`FORWARDED`].
        flags: u16,
        /// The server's slot, for a server's segment.
        slot: u16,
        /// The plane's epoch when it came.
        epoch: u32,
        /// The frame's source address.
        source_mac: [u8; 6],
        /// Keeps the size a multiple of eight.
        padding: u16,
        /// If it was passed: right edge of the window that its receiver was told.
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
