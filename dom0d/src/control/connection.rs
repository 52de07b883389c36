//! Connections to the control server, and their limits: a client that sends nothing, sends half a request, or does not read
//! its answer is disconnected after a few seconds.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::Sleep;

/// Connections at a time, those included that follow events; others wait to be accepted.
pub(super) const CONNECTIONS: usize = 128;

/// How long a request's head may take to arrive, from the connection or from the request before.
pub(super) const HEAD_TIME: Duration = Duration::from_secs(10);

/// How long a client may read nothing of what is there for it.
pub(super) const READ_TIME: Duration = Duration::from_secs(10);

/// After an error of accept(2) (too many open files), before the next try.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves whoever connects.
pub(super) async fn accept(listener: UnixListener, app: Router) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Closed by nobody.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::error!(%error, "control connections can't be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(app.clone());
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
        let stream = TokioIo::new(Impatient { stream, stalled: None });
        let connection = server.serve_connection(stream, service);
        tokio::spawn(async move {
            // The client's affair: whatever ended it, it has gone or will not read why.
            let _ = connection.await;
            drop(permit);
        });
    }
}

/// A connection that breaks when what is written to it is not read.
struct Impatient {
    stream: UnixStream,
    /// Runs while nothing can be written.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn patiently<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(READ_TIME)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        room: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, room)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.patiently(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
