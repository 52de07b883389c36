//! Stops a guest's network stack in microseconds: the policy of two nftables base chains on its
//! interface, switched by a netlink message that was prepared beforehand.
//!
//! Frames are dropped inside the guest's namespace, so that dom0 sees a link that is up and silent.
//! Running `nft` at the moment of the fault would take milliseconds, in which the guest still ACKs.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::Host;
use super::network::GUEST_INTERFACE;

const TABLE: &str = "lab";
const CHAINS: [&str; 2] = ["ingress", "egress"];

// linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFPROTO_NETDEV: u8 = 5;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// Lets a guest's frames pass, or none of them, in both directions.
#[derive(Debug)]
pub(crate) struct Gate {
    socket: OwnedFd,
    shut: Vec<u8>,
    open: Vec<u8>,
}

impl Gate {
    /// Makes the chains in the guest's namespace; open.
    pub(crate) fn new(guest: &Host) -> Result<Gate> {
        // Before anything else on the device, also before the rules that impair the link.
        let mut script = format!("add table netdev {TABLE};");
        for chain in CHAINS {
            script.push_str(&format!(
                "add chain netdev {TABLE} {chain} \
                 {{ type filter hook {chain} device \"{GUEST_INTERFACE}\" priority -500; \
                 policy accept; }};"
            ));
        }
        guest.run(&["nft", &script])?;
        let socket = guest.enter(|| {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkNetFilter,
            )?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
            Ok::<_, nix::Error>(socket)
        })?;
        let socket = socket.context("opening a netfilter netlink socket")?;
        Ok(Gate { socket, shut: batch(NF_DROP), open: batch(NF_ACCEPT) })
    }

    /// From now on nothing passes.
    pub(crate) fn shut(&self) -> Result<()> {
        self.send(&self.shut)
    }

    /// From now on everything passes.
    pub(crate) fn open(&self) -> Result<()> {
        self.send(&self.open)
    }

    fn send(&self, batch: &[u8]) -> Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        let fd = self.socket.as_raw_fd();
        sendmsg(fd, &[IoSlice::new(batch)], &[], MsgFlags::empty(), Some(&kernel))
            .context("switching the guest's network: sending to nftables")?;
        let mut acknowledged = 0;
        while acknowledged < CHAINS.len() {
            let mut buffer = [0; 4096];
            let len = recv(fd, &mut buffer, MsgFlags::empty())
                .context("switching the guest's network: nftables does not answer")?;
            acknowledged += acknowledgements(&buffer[..len])?;
        }
        Ok(())
    }
}

/// How many messages the kernel says it has carried out.
fn acknowledgements(mut bytes: &[u8]) -> Result<usize> {
    let mut count = 0;
    while bytes.len() >= 20 {
        let len = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        ensure!((20..=bytes.len()).contains(&len), "nftables answered something else");
        let error = i32::from_ne_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]);
        if u16::from_ne_bytes([bytes[4], bytes[5]]) == NLMSG_ERROR {
            if error != 0 {
                bail!(
                    "nftables refused to switch the guest's network: {}",
                    nix::errno::Errno::from_raw(-error)
                );
            }
            count += 1;
        }
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(count)
}

/// One transaction that sets both chains' policy.
fn batch(policy: u32) -> Vec<u8> {
    let mut bytes = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES, &[]);
    for chain in CHAINS {
        let mut attributes = attribute(NFTA_CHAIN_TABLE, &nul_ended(TABLE));
        attributes.extend(attribute(NFTA_CHAIN_NAME, &nul_ended(chain)));
        attributes.extend(attribute(NFTA_CHAIN_POLICY, &policy.to_be_bytes()));
        let kind = (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_NEWCHAIN;
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        bytes.extend(message(kind, flags, NFPROTO_NETDEV, 0, &attributes));
    }
    bytes.extend(message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES, &[]));
    bytes
}

/// `struct nlmsghdr`, `struct nfgenmsg`, attributes.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(20 + attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]); // sequence number and port, of no use here
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend_from_slice(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nul_ended(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}
