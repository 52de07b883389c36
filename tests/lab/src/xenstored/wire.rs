//! The layout of xenstore messages (Xen's public header `io/xs_wire.h`), and its error names.

/// Longest payload of a message; a longer one ends the connection, as in C xenstored.
pub(super) const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path.
pub(super) const ABSOLUTE_PATH_MAX: usize = 3072;
/// Longest relative path.
pub(super) const RELATIVE_PATH_MAX: usize = 2048;
/// Bytes of `struct xsd_sockmsg`.
pub(super) const HEADER_LEN: usize = 16;

/// `enum xsd_sockmsg_type`, as far as clients may send or receive it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Read,
    GetPerms,
    Watch,
    Unwatch,
    TransactionStart,
    TransactionEnd,
    Introduce,
    Release,
    GetDomainPath,
    Write,
    Mkdir,
    Rm,
    SetPerms,
    WatchEvent,
    Error,
    IsDomainIntroduced,
    Resume,
    SetTarget,
    ResetWatches,
    DirectoryPart,
}

const KINDS: [(u32, Kind); 21] = [
    (1, Kind::Directory),
    (2, Kind::Read),
    (3, Kind::GetPerms),
    (4, Kind::Watch),
    (5, Kind::Unwatch),
    (6, Kind::TransactionStart),
    (7, Kind::TransactionEnd),
    (8, Kind::Introduce),
    (9, Kind::Release),
    (10, Kind::GetDomainPath),
    (11, Kind::Write),
    (12, Kind::Mkdir),
    (13, Kind::Rm),
    (14, Kind::SetPerms),
    (15, Kind::WatchEvent),
    (16, Kind::Error),
    (17, Kind::IsDomainIntroduced),
    (18, Kind::Resume),
    (19, Kind::SetTarget),
    (21, Kind::ResetWatches),
    (22, Kind::DirectoryPart),
];

impl Kind {
    /// The kind with this number, if it is known.
    pub(super) fn from_number(number: u32) -> Option<Kind> {
        KINDS.iter().find(|(known, _)| *known == number).map(|&(_, kind)| kind)
    }

    fn number(self) -> u32 {
        // Every kind is in the table; 0xffff is XS_INVALID.
        KINDS.iter().find(|&&(_, kind)| kind == self).map_or(0xffff, |&(number, _)| number)
    }
}

/// `struct xsd_sockmsg`, in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u32,
    pub(super) request: u32,
    pub(super) transaction: u32,
    pub(super) len: u32,
}

impl Header {
    pub(super) fn parse(bytes: [u8; HEADER_LEN]) -> Header {
        let field = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Header { kind: field(0), request: field(4), transaction: field(8), len: field(12) }
    }
}

/// A whole message, header and payload. The payload must not be longer than [`PAYLOAD_MAX`].
pub(super) fn message(kind: Kind, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&kind.number().to_ne_bytes());
    bytes.extend_from_slice(&request.to_ne_bytes());
    bytes.extend_from_slice(&transaction.to_ne_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Errors, which travel by name (`xsd_errors`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Errno {
    Inval,
    Exist,
    NoEnt,
    NoSpc,
    NoSys,
    Busy,
    Again,
    TooBig,
}

impl Errno {
    pub(super) fn name(self) -> &'static str {
        match self {
            Errno::Inval => "EINVAL",
            Errno::Exist => "EEXIST",
            Errno::NoEnt => "ENOENT",
            Errno::NoSpc => "ENOSPC",
            Errno::NoSys => "ENOSYS",
            Errno::Busy => "EBUSY",
            Errno::Again => "EAGAIN",
            Errno::TooBig => "E2BIG",
        }
    }
}
