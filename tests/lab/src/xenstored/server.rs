//! The Unix socket: two threads per connection, one reads requests, one writes answers and events.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use super::session::Sessions;
use super::wire::{Errno, HEADER_LEN, Header, PAYLOAD_MAX};

/// Most connections at a time; a further one is closed at once.
const CONNECTIONS_MAX: usize = 256;
/// Most bytes that wait for a client that does not read; more ends its connection.
const OUTBOX_MAX: usize = 4 << 20;

/// A running xenstored. Contents survive [`Xenstored::stop`] and [`Xenstored::start`].
#[derive(Debug)]
pub(crate) struct Xenstored {
    socket: PathBuf,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    sessions: Mutex<Sessions>,
    streams: Mutex<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    stopping: bool,
    next: u64,
    open: BTreeMap<u64, UnixStream>,
}

/// What waits to be written to one client.
#[derive(Debug)]
pub(super) struct Outbox {
    stream: UnixStream,
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<Vec<u8>>,
    bytes: usize,
    closed: bool,
}

impl Outbox {
    fn new(stream: UnixStream) -> Outbox {
        Outbox { stream, state: Mutex::default(), changed: Condvar::new() }
    }

    pub(super) fn push(&self, message: Vec<u8>) {
        let mut waiting = lock(&self.state);
        if waiting.bytes + message.len() > OUTBOX_MAX {
            waiting.closed = true;
            // The writer may be blocked on this client, and the reader is: this ends both.
            let _ = self.stream.shutdown(Shutdown::Both);
        } else if !waiting.closed {
            waiting.bytes += message.len();
            waiting.messages.push_back(message);
        }
        self.changed.notify_one();
    }

    fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_one();
    }

    /// The next message, or none once closed.
    fn wait(&self) -> Option<Vec<u8>> {
        let mut waiting = lock(&self.state);
        loop {
            if waiting.closed {
                return None;
            }
            if let Some(message) = waiting.messages.pop_front() {
                waiting.bytes -= message.len();
                return Some(message);
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Xenstored {
    /// An empty store that answers on `socket`.
    pub(crate) fn new(socket: &Path) -> Result<Xenstored> {
        let shared = Arc::new(Shared {
            sessions: Mutex::new(Sessions::new()),
            streams: Mutex::new(Streams::default()),
        });
        let mut xenstored = Xenstored { socket: socket.to_owned(), shared, acceptor: None };
        xenstored.start()?;
        Ok(xenstored)
    }

    /// Listens (again) on the socket.
    pub(crate) fn start(&mut self) -> Result<()> {
        if self.acceptor.is_some() {
            return Ok(());
        }
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context(format!("removing {}", self.socket.display()));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket)
            .with_context(|| format!("xenstored: listening on {}", self.socket.display()))?;
        lock(&self.shared.streams).stopping = false;
        let shared = Arc::clone(&self.shared);
        let accept = move || accept(&listener, &shared);
        self.acceptor = Some(spawn("xenstored", accept).context("xenstored: starting its thread")?);
        Ok(())
    }

    /// Stops listening and closes every connection.
    pub(crate) fn stop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        {
            let mut streams = lock(&self.shared.streams);
            streams.stopping = true;
            for stream in streams.open.values() {
                // Fails only for one that is closed already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        // The acceptor sees `stopping` when it wakes, which this connection makes it do.
        if UnixStream::connect(&self.socket).is_ok() {
            let _ = acceptor.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    /// Writes as the toolstack does.
    pub(crate) fn write(&self, path: &str, value: &str) -> Result<()> {
        lock(&self.shared.sessions).write(path, value).map_err(|error| named(error, "writing", path))
    }

    /// Removes a node and what is below it, if it is there.
    pub(crate) fn remove(&self, path: &str) -> Result<()> {
        lock(&self.shared.sessions).remove(path).map_err(|error| named(error, "removing", path))
    }

    /// Fires `@introduceDomain`.
    pub(crate) fn introduce(&self, domid: u32) {
        lock(&self.shared.sessions).introduce(domid);
    }

    /// Fires `@releaseDomain` for a domain that has shut down but still exists.
    pub(crate) fn announce_shutdown(&self) {
        lock(&self.shared.sessions).announce_shutdown();
    }

    /// Fires `@releaseDomain` and forgets the domain.
    pub(crate) fn release(&self, domid: u32) {
        lock(&self.shared.sessions).release(domid);
    }
}

impl Drop for Xenstored {
    fn drop(&mut self) {
        self.stop();
    }
}

fn named(error: Errno, what: &str, path: &str) -> anyhow::Error {
    anyhow!("xenstored: {what} {path}: {error:?}")
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        let mut streams = lock(&shared.streams);
        if streams.stopping {
            return;
        }
        // An error of accept concerns one connection that went away again.
        let Ok(stream) = stream else { continue };
        if streams.open.len() >= CONNECTIONS_MAX {
            continue;
        }
        let Ok(copy) = stream.try_clone() else {
            continue;
        };
        let id = streams.next;
        streams.next += 1;
        streams.open.insert(id, copy);
        drop(streams);
        let connection = Arc::clone(shared);
        if spawn("xs-client", move || serve(id, &stream, &connection)).is_err() {
            lock(&shared.streams).open.remove(&id);
        }
    }
}

fn serve(id: u64, stream: &UnixStream, shared: &Arc<Shared>) {
    if let Ok(copy) = stream.try_clone() {
        let outbox = Arc::new(Outbox::new(copy));
        lock(&shared.sessions).connect(id, Arc::clone(&outbox));
        let writing = Arc::clone(&outbox);
        if let Ok(writer) = spawn("xs-writer", move || write_out(&writing)) {
            // It returns when the client leaves, breaks the protocol, or the server stops.
            let _ = read_requests(id, stream, shared);
            outbox.close();
            let _ = stream.shutdown(Shutdown::Both);
            let _ = writer.join();
        }
        lock(&shared.sessions).disconnect(id);
    }
    lock(&shared.streams).open.remove(&id);
}

fn read_requests(id: u64, mut stream: &UnixStream, shared: &Shared) -> std::io::Result<()> {
    let mut payload = Vec::with_capacity(PAYLOAD_MAX);
    loop {
        let mut bytes = [0; HEADER_LEN];
        stream.read_exact(&mut bytes)?;
        let header = Header::parse(bytes);
        let len = header.len as usize;
        if len > PAYLOAD_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        payload.resize(len, 0);
        stream.read_exact(&mut payload)?;
        lock(&shared.sessions).handle(id, header, &payload);
    }
}

fn write_out(outbox: &Outbox) {
    while let Some(message) = outbox.wait() {
        if (&outbox.stream).write_all(&message).is_err() {
            break;
        }
    }
    outbox.close();
    // Wakes the reader, which ends the session.
    let _ = outbox.stream.shutdown(Shutdown::Both);
}

fn spawn<F>(name: &str, work: F) -> std::io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete before anything that could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
impl Xenstored {
    /// How many clients are connected.
    pub(super) fn connected(&self) -> usize {
        lock(&self.shared.sessions).connected()
    }
}
