//! A service as bytes, so that another process can continue where this one stopped.
//!
//! ```text
//! format (u32) | the service with its configuration (postcard of the structs as they are declared) | CRC-32 of both (u32)
//! ```
//!
//! Numbers are little-endian, and the same state gives the same bytes. Whoever changes a saved struct raises
//! [`FORMAT`]. A version that is to read an older format keeps the structs of that format, and converts them.

use crate::config::ServiceConfig;
use crate::service::Service;

/// The format of the saved state. This version reads no other.
const FORMAT: u32 = 11;

/// Most bytes that an idle conversation with three RVMs takes.
const IDLE: usize = 1 << 10;

/// Why a saved service can't be restored, or not reconfigured. Its state is lost then: begin with [`Service::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not those that [`Service::save`] returned, or not all of them.
    #[error("the saved state is damaged or cut short")]
    Unreadable,
    /// A version of this crate with another format saved the state.
    #[error("the saved state has format {0}, and only format {FORMAT} can be read")]
    OtherFormat(u32),
    /// The state does not fit the configuration. Says which part differs.
    #[error("the state was saved under a configuration with {0}")]
    OtherConfiguration(&'static str),
}

impl Service {
    /// The whole service as bytes for [`Service::restore`], including the outputs that wait to be polled. The bytes are
    /// as secret as the clients' traffic: they contain whatever of it an RVM still lacks.
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

    /// Like [`Service::save`], but writes to the beginning of `room`. Returns the number of bytes written; `None` if
    /// `room` is too small.
    pub fn save_in(&self, room: &mut [u8]) -> Option<usize> {
        let (format, body) = room.split_first_chunk_mut()?;
        *format = FORMAT.to_le_bytes();
        let length = match postcard::to_slice(self, body) {
            Ok(written) => format.len() + written.len(),
            Err(postcard::Error::SerializeBufferFull) => return None,
            // No part of the state refuses to be serialized. If one did, this would write no body, and `restore` would
            // refuse it.
            Err(_) => format.len(),
        };
        let (written, rest) = room.split_at_mut(length);
        *rest.first_chunk_mut()? = crc32fast::hash(written).to_le_bytes();
        Some(length + size_of::<u32>())
    }

    /// The service that was saved as `bytes`, perhaps by another process. It continues under its own configuration
    /// exactly as the saved service would have.
    pub fn restore(bytes: &[u8]) -> Result<Self, RestoreError> {
        let (bytes, checksum) = bytes.split_last_chunk().ok_or(RestoreError::Unreadable)?;
        let (format, body) = bytes.split_first_chunk().ok_or(RestoreError::Unreadable)?;
        if crc32fast::hash(bytes) != u32::from_le_bytes(*checksum) {
            return Err(RestoreError::Unreadable);
        }
        match u32::from_le_bytes(*format) {
            FORMAT => postcard::from_bytes(body).map_err(|_| RestoreError::Unreadable),
            format => Err(RestoreError::OtherFormat(format)),
        }
    }

    /// Replaces the configuration from the next input on. Waits that have begun end when they would have ended before.
    ///
    /// The PSC, the ports and [`crate::Limits::conversations`] must be the same: conversations depend on them.
    pub fn reconfigure(&mut self, config: ServiceConfig) -> Result<(), RestoreError> {
        let present = &self.ctx.config;
        let other = if present.psc != config.psc {
            "other PSC addresses"
        } else if present.ports != config.ports {
            "other ports"
        } else if present.limits.conversations != config.limits.conversations {
            "another limit of conversations"
        } else {
            self.ctx.config = config;
            return Ok(());
        };
        Err(RestoreError::OtherConfiguration(other))
    }
}
