//! The control server: HTTP/1.1 JSON on a Unix socket.

use tokio::net::UnixListener;

use crate::command::Commands;
use crate::event::Events;

/// Serves until the listener fails.
pub(crate) async fn serve(
    listener: UnixListener,
    commands: Commands,
    events: Events,
) -> std::io::Result<()> {
    let _ = (commands, events);
    listener.accept().await.map(|_| ())
}
