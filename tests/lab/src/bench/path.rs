//! The paths from the client to a server that are measured side by side.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use super::proxy::Proxy;
use crate::host::{Lab, Plane, Service};
use crate::stage::operator::Operator;
use crate::stage::pinning::{Pinning, pin_process};
use crate::stage::{own_address, unhurried, with_plane, with_replicas};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// The bridge alone.
    Plain,
    /// The same, while a second client does the same with `guest-2`: the fair limit for a machine that carries every byte
    /// twice.
    PlainTwice,
    /// HAProxy in dom0 in front of the same server.
    Proxy,
    /// dom0d with this number of replicas.
    Replicated {
        /// `None`: as the lab's configuration says.
        plane: Option<Plane>,
        replicas: usize,
    },
}

impl Path {
    /// dom0d with 0, 1, ... replicas.
    pub(crate) fn with_up_to(plane: Option<Plane>, replicas: usize) -> impl Iterator<Item = Self> {
        (0..=replicas).map(move |replicas| Path::Replicated { plane, replicas })
    }

    /// As reports call it.
    pub(crate) fn name(self) -> String {
        match self {
            Path::Plain => "plain".to_owned(),
            Path::PlainTwice => "plain, twice".to_owned(),
            Path::Proxy => "haproxy".to_owned(),
            Path::Replicated { plane, replicas } => {
                let plane = plane.map_or(String::new(), |plane| format!("{} ", plane.name()));
                format!("{plane}{replicas} replicas")
            }
        }
    }

    /// Servers beside the first that must hold the same.
    pub(crate) fn replicas(self) -> usize {
        match self {
            Path::Plain | Path::Proxy => 0,
            Path::PlainTwice => 1,
            Path::Replicated { replicas, .. } => replicas,
        }
    }

    /// Opens the path, runs `work` with its address, and closes it. Returns also how many replicas were lost meanwhile.
    /// Nothing else may run in dom0.
    pub(crate) fn with<T>(
        self,
        lab: &Lab,
        pinning: Pinning,
        service: Service,
        work: impl FnOnce(SocketAddr) -> Result<T>,
    ) -> Result<(T, usize)> {
        match self {
            Path::Plain | Path::PlainTwice => {
                Ok((work(own_address(&lab.domain("guest-1")?, service)?.1)?, 0))
            }
            Path::Proxy => {
                let proxy = Proxy::start(lab)?;
                pin_process(proxy.pid(), pinning.dom0d_and_rvms)?;
                Ok((work(Proxy::address(service))?, 0))
            }
            Path::Replicated { plane, replicas } => {
                let config = unhurried(&with_replicas(&lab.default_config(), replicas));
                let config = plane.map_or(config.clone(), |plane| with_plane(&config, plane));
                let dom0d = lab.start_dom0d(&config)?;
                pin_process(dom0d.pid(), pinning.dom0d_and_rvms)?;
                let operator = Operator::new(dom0d.control_socket())?;
                operator.seed_all(&config)?;
                let psc = operator.service(service.name())?.psc;
                let psc = psc.into_iter().find(IpAddr::is_ipv4).context("the PSC has no IPv4 address")?;
                let done = work(SocketAddr::new(psc, service.port()))?;
                let left = operator.service(service.name())?.promotable();
                dom0d.stop()?;
                Ok((done, replicas - left))
            }
        }
    }
}
