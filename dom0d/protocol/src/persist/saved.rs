//! A service as bytes, so that another process can go on where this one was.
//!
//! ```text
//! format (u32) | the service with its configuration (postcard of the structs as they are declared) | CRC-32 of both (u32)
//! ```
//!
//! Numbers are little-endian, and the same state is the same bytes. Whoever changes what is declared raises [`FORMAT`]; a
//! version that is to read the format before keeps the structs of that format, and turns them into today's.

use crate::config::ServiceConfig;
use crate::service::Service;

/// Which shape the saved state has; another one can't be read.
const FORMAT: u32 = 10;

/// Bytes that a conversation with three RVMs takes at most while it is idle.
const IDLE: usize = 1 << 10;

/// Why a saved service can't be restored, or not under a configuration. It is lost then: begin with [`Service::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not, or not wholly, what [`Service::save`] returned.
    #[error("the saved state is damaged or cut short")]
    Unreadable,
    /// Saved by a version of this crate whose state has another shape.
    #[error("the saved state has format {0}, and only format {FORMAT} can be read")]
    OtherFormat(u32),
    /// The state does not fit the configuration; what differs.
    #[error("the state was saved under a configuration with {0}")]
    OtherConfiguration(&'static str),
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
        let (format, body) = room.split_first_chunk_mut()?;
        *format = FORMAT.to_le_bytes();
        let length = match postcard::to_slice(self, body) {
            Ok(written) => format.len() + written.len(),
            Err(postcard::Error::SerializeBufferFull) => return None,
            // Nothing of the state refuses to be written; were it otherwise, nothing readable would be there.
            Err(_) => format.len(),
        };
        let (written, rest) = room.split_at_mut(length);
        *rest.first_chunk_mut()? = crc32fast::hash(written).to_le_bytes();
        Some(length + size_of::<u32>())
    }

    /// The service that was saved as `bytes`, which may come from another process: under its own configuration it goes on
    /// exactly as the saved one would have.
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

    /// Goes on under another configuration from the next input on; waits that have begun end when they would have.
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
