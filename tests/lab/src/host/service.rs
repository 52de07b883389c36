//! The real services that run in each domU, and how their state is copied.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A service of the lab's domUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Service {
    /// redis-server, no persistence, DEBUG allowed.
    Redis,
    /// nginx: `GET /large.bin`, `PUT /upload/NAME`.
    Http,
    /// PostgreSQL, trust authentication, role and database `postgres`.
    Postgresql,
}

impl Service {
    /// Every service.
    pub(crate) const ALL: [Service; 3] = [Service::Redis, Service::Http, Service::Postgresql];

    /// Its name in dom0d's configuration and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Service::Redis => "redis",
            Service::Http => "http",
            Service::Postgresql => "postgresql",
        }
    }

    /// Its TCP port.
    pub(crate) fn port(self) -> u16 {
        match self {
            Service::Redis => 6379,
            Service::Http => 80,
            Service::Postgresql => 5432,
        }
    }

    /// Its PSC is 10.77.0.100 + this, fd77::100 + this.
    pub(crate) fn psc_offset(self) -> u8 {
        match self {
            Service::Redis => 0,
            Service::Http => 1,
            Service::Postgresql => 2,
        }
    }
}

pub(crate) fn restart(_directory: &Path, _domain: &str, _service: Service) -> Result<()> {
    Ok(())
}

pub(crate) fn copy_state(_directory: &Path, _from: &str, _to: &str) -> Result<()> {
    Ok(())
}
