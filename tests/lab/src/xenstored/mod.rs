//! A small xenstored that speaks the real wire protocol on a Unix socket, so that dom0d's discovery
//! runs its real code where there is no Xen. Everybody who connects is dom0, as on Xen's own socket.
//!
//! Rules are those of Xen's `docs/misc/xenstore.txt` and of C xenstored 4.17 where that is silent.

mod server;
mod session;
mod store;
#[cfg(test)]
mod tests;
mod wire;

pub(crate) use server::Xenstored;
