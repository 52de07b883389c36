//! A service as bytes, so that another process can go on where this one was.
//!
//! Saved is all of the state and, of the configuration, what the state depends on. The same state is the same
//! bytes. Who adds to the state adds to what is saved, and raises [`FORMAT`].

use core::net::IpAddr;
use serde::{Deserialize, Serialize};

use crate::config::ServiceConfig;
use crate::service::Service;

/// Which shape the saved state has; another one can't be read.
const FORMAT: u32 = 10;

/// Bytes that a conversation with three RVMs takes at most while it is idle.
const IDLE: usize = 1 << 10;

/// Why a saved service can't be restored. It is lost then: begin with [`Service::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not, or not wholly, what [`Service::save`] returned.
    #[error("the saved state is damaged or cut short")]
    Unreadable,
    /// Saved by a version of this crate whose state has another shape.
    #[error("the saved state has format {0}, and only format {FORMAT} can be read")]
    OtherFormat(u32),
    /// Saved under a configuration that the state does not fit any more; what differs.
    #[error("the state was saved under a configuration with {0}")]
    OtherConfiguration(&'static str),
}

/// What the state depends on of a configuration.
#[derive(Debug, Serialize, Deserialize)]
struct Basis {
    name: String,
    psc: Vec<IpAddr>,
    ports: Vec<u16>,
    conversations: u32,
    seed: u64,
}

impl Basis {
    fn of(config: &ServiceConfig) -> Self {
        Self {
            name: config.name.clone(),
            psc: config.psc.clone(),
            ports: config.ports.clone(),
            conversations: config.limits.conversations,
            seed: config.seed,
        }
    }

    fn check(&self, config: &ServiceConfig) -> Result<(), RestoreError> {
        let other = if self.name != config.name {
            "another service name"
        } else if self.psc != config.psc {
            "other PSC addresses"
        } else if self.ports != config.ports {
            "other ports"
        } else if self.conversations != config.limits.conversations {
            "another limit of conversations"
        } else {
            return Ok(());
        };
        Err(RestoreError::OtherConfiguration(other))
    }
}

impl Service {
    /// The whole service as bytes for [`Service::restore`], what waits to be polled included. They are secret as
    /// the clients' traffic is, which they contain as far as an RVM still lacks it.
    pub fn save(&self) -> Vec<u8> {
        let mut bytes =
            vec![0; self.ctx.accounts.retained() as usize + (1 + self.ctx.accounts.open() as usize) * IDLE];
        loop {
            match self.save_in(&mut bytes) {
                Some(length) => {
                    bytes.truncate(length);
                    return bytes;
                }
                None => bytes.resize(2 * bytes.len(), 0),
            }
        }
    }

    /// As [`Service::save`], in the beginning of `room`; gives how many bytes of it. `None` if they are too few.
    pub fn save_in(&self, room: &mut [u8]) -> Option<usize> {
        let Self {
            ctx,
            table,
            handshakes,
            unplanned,
            drain,
            work,
            timers,
            next_tick,
            sweep,
            next_resets,
            links,
            unknown,
            passable,
            idle,
        } = self;
        let state = (
            (ctx, table, handshakes, unplanned, drain, work, timers),
            (next_tick, sweep, next_resets, links, unknown, passable, idle),
        );
        let (format, body) = room.split_first_chunk_mut()?;
        *format = FORMAT.to_le_bytes();
        let length = match postcard::to_slice(&(Basis::of(&ctx.config), state), body) {
            Ok(written) => format.len() + written.len(),
            Err(postcard::Error::SerializeBufferFull) => return None,
            // Nothing of the state refuses to be written; were it otherwise, nothing readable would be there.
            Err(_) => format.len(),
        };
        let (written, rest) = room.split_at_mut(length);
        *rest.first_chunk_mut()? = crc32fast::hash(written).to_le_bytes();
        Some(length + size_of::<u32>())
    }

    /// The service that was saved as `bytes`, which may come from another process: it goes on exactly as the
    /// saved one would have.
    ///
    /// `config` must have the saved one's name, PSC, ports and [`crate::Limits::conversations`]; its
    /// [`ServiceConfig::seed`] counts for nothing, the saved one stays in use. Everything else may differ, and is
    /// in force from the next input on: waits that have begun end when they would have.
    pub fn restore(config: ServiceConfig, bytes: &[u8]) -> Result<Self, RestoreError> {
        let (bytes, checksum) = bytes.split_last_chunk().ok_or(RestoreError::Unreadable)?;
        let (format, body) = bytes.split_first_chunk().ok_or(RestoreError::Unreadable)?;
        if crc32fast::hash(bytes) != u32::from_le_bytes(*checksum) {
            return Err(RestoreError::Unreadable);
        }
        let format = u32::from_le_bytes(*format);
        if format != FORMAT {
            return Err(RestoreError::OtherFormat(format));
        }
        let unreadable = |_| RestoreError::Unreadable;
        let (basis, body) = postcard::take_from_bytes::<Basis>(body).map_err(unreadable)?;
        basis.check(&config)?;
        let (
            (ctx, table, handshakes, unplanned, drain, work, timers),
            (next_tick, sweep, next_resets, links, unknown, passable, idle),
        ) = postcard::from_bytes(body).map_err(unreadable)?;
        let mut service = Self {
            ctx,
            table,
            handshakes,
            unplanned,
            drain,
            work,
            timers,
            next_tick,
            sweep,
            next_resets,
            links,
            unknown,
            passable,
            idle,
        };
        service.ctx.config = ServiceConfig { seed: basis.seed, ..config };
        Ok(service)
    }
}
