//! Has somebody else changed our nft table, and what has it counted? Asks the kernel itself (nfnetlink): it tells of each
//! transaction of anybody, and nft(8) would cost a process each time.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// linux/netfilter/nfnetlink.h, nf_tables.h, linux/netlink.h.
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWGEN: u16 = 15;
const NFT_MSG_NEWOBJ: u16 = 18;
const NFT_MSG_GETOBJ: u16 = 19;
const NFTA_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_DATA: u16 = 4;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 20;

/// Messages taken in one go.
const MESSAGES: usize = 4_096;

/// Watches one table.
pub(super) struct RulesetWatch {
    family: u8,
    table: &'static str,
    told: OwnedFd,
    asked: OwnedFd,
    touched: bool,
    transactions: usize,
}

impl RulesetWatch {
    /// Watches the table of this family and name.
    pub(super) fn open(family: u8, table: &'static str) -> nix::Result<Self> {
        let open = |flags| {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | flags,
                SockProtocol::NetlinkNetFilter,
            )
        };
        let (told, asked) = (open(SockFlag::SOCK_NONBLOCK)?, open(SockFlag::empty())?);
        bind(told.as_raw_fd(), &NetlinkAddr::new(0, 1 << (NFNLGRP_NFTABLES - 1)))?;
        setsockopt(&asked, sockopt::ReceiveTimeout, &TimeVal::seconds(1))?;
        Ok(Self { family, table, told, asked, touched: false, transactions: 0 })
    }

    /// Forgets what it was told of so far.
    pub(super) fn forget(&mut self) {
        self.listen();
        (self.touched, self.transactions) = (false, 0);
    }

    /// Whether somebody changed the table since it last forgot. When in doubt, somebody did.
    pub(super) fn is_touched(&mut self) -> bool {
        self.listen();
        self.touched
    }

    /// Transactions of anybody on any table since it last forgot.
    pub(super) fn transactions(&mut self) -> usize {
        self.listen();
        self.transactions
    }

    fn listen(&mut self) {
        let mut buffer = [0; 16_384];
        for _ in 0..MESSAGES {
            match recv(self.told.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => {
                    for message in Messages(&buffer[..length]) {
                        let is_generation = message.kind == kind(NFT_MSG_NEWGEN);
                        self.transactions += usize::from(is_generation);
                        let is_ours = message.family == self.family
                            && attribute(message.attributes, NFTA_TABLE).and_then(text) == Some(self.table);
                        self.touched |= !is_generation && is_ours;
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // More than there was room for (ENOBUFS): it may have been in there.
                Err(_) => {
                    self.touched = true;
                    return;
                }
            }
        }
    }

    /// The packets that the table's named counters have counted; none if it is not there.
    pub(super) fn counters(&self) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::new();
        if self.ask().is_err() {
            return counters;
        }
        let mut buffer = vec![0; 65_536];
        for _ in 0..MESSAGES {
            let length = match recv(self.asked.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(_) => break,
            };
            for message in Messages(&buffer[..length]) {
                if message.kind == NLMSG_DONE || message.kind == NLMSG_ERROR {
                    return counters;
                }
                let of = |kind| attribute(message.attributes, kind);
                let packets = of(NFTA_OBJ_DATA).and_then(|data| attribute(data, NFTA_COUNTER_PACKETS));
                let packets = packets.and_then(|bytes| Some(u64::from_be_bytes(bytes.try_into().ok()?)));
                if message.kind == kind(NFT_MSG_NEWOBJ)
                    && let (Some(name), Some(packets)) = (of(NFTA_OBJ_NAME).and_then(text), packets)
                {
                    counters.insert(name.to_owned(), packets);
                }
            }
        }
        counters
    }

    fn ask(&self) -> nix::Result<()> {
        let name = [self.table.as_bytes(), &[0]].concat();
        let length = (HEADERS + 4 + name.len()).next_multiple_of(4);
        let mut request = u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes().to_vec();
        request.extend(kind(NFT_MSG_GETOBJ).to_ne_bytes());
        request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        request.extend([0; 8]);
        request.extend([self.family, 0, 0, 0]);
        request.extend((4 + name.len() as u16).to_ne_bytes());
        request.extend(NFTA_TABLE.to_ne_bytes());
        request.extend(name);
        request.resize(length, 0);
        let kernel = NetlinkAddr::new(0, 0);
        sendmsg(self.asked.as_raw_fd(), &[IoSlice::new(&request)], &[], MsgFlags::empty(), Some(&kernel))?;
        Ok(())
    }
}

fn kind(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// A message of nfnetlink.
struct Message<'a> {
    kind: u16,
    family: u8,
    attributes: &'a [u8],
}

/// The messages in a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(self.0.get(..4)?.try_into().ok()?) as usize;
        let message = self.0.get(..length).filter(|message| message.len() >= 16)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            family: message.get(16).copied().unwrap_or_default(),
            attributes: message.get(HEADERS..).unwrap_or_default(),
        })
    }
}

/// What is in the first attribute of a kind.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let content = attributes.get(4..length)?;
        if kind == wanted {
            return Some(content);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().map(|text| text.trim_end_matches('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_lengths_that_lie_end_the_search() {
        let attributes =
            [&6u16.to_ne_bytes()[..], &[1, 0], b"a\0", &[0, 0], &8u16.to_ne_bytes(), &[2, 0], b"word"]
                .concat();
        if cfg!(target_endian = "little") {
            assert_eq!(attribute(&attributes, 1).and_then(text), Some("a"));
            assert_eq!(attribute(&attributes, 2), Some(&b"word"[..]));
            assert_eq!(attribute(&attributes, 3), None);
        }
        for length in 0..attributes.len() {
            let _ = attribute(&attributes[..length], 3);
            assert!(Messages(&attributes[..length]).count() <= length);
        }
        assert_eq!(attribute(&[0, 0, 1, 0], 1), None);
        assert_eq!(Messages(&[0; 64]).count(), 0);
    }
}
