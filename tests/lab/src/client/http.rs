//! Large transfers over HTTP/1.1 in one connection, with SHA-256 of what was sent and what came.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::clock::now_ns;
use super::place::{Place, join};
use super::random::Random;

/// Longest silence that a transfer survives.
const SILENCE: Duration = Duration::from_secs(30);
const CHUNK: usize = 64 << 10;

/// What a transfer did.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// SHA-256 of the bytes as the client read or wrote them, in hexadecimal.
    pub(crate) sha256: String,
    pub(crate) bytes: u64,
    /// First to last byte of the body.
    pub(crate) took: Duration,
    /// Longest time between two reads (or writes) and when it began, CLOCK_MONOTONIC.
    pub(crate) longest_gap: (Duration, u64),
}

/// A transfer under way.
#[derive(Debug)]
pub(crate) struct Running {
    handle: JoinHandle<Result<Transfer>>,
    progress: Arc<AtomicU64>,
    /// Why it failed, if it did.
    failure: Arc<OnceLock<String>>,
}

impl Running {
    /// Bytes of the body read or written so far.
    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Blocks until the body has come that far.
    pub(crate) fn wait_progress(&self, bytes: u64, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.progress() < bytes {
            ensure!(
                !self.handle.is_finished(),
                "the transfer ended after {} bytes, before it came to {bytes}: {}",
                self.progress(),
                self.failure.get().map_or("it had no more", String::as_str)
            );
            ensure!(
                Instant::now() < deadline,
                "the transfer came to {} bytes in {limit:?}, not to {bytes}",
                self.progress()
            );
            sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Waits for its end.
    pub(crate) fn finish(self) -> Result<Transfer> {
        join(self.handle)
    }
}

/// Starts `GET path` over a connection of its own.
pub(crate) fn download(place: &Place, target: SocketAddr, path: &str) -> Result<Running> {
    let path = path.to_owned();
    start(place, move |progress| get(&mut connect(target)?, &path, progress))
}

/// Starts `GET path` on a connection that is open already.
pub(crate) fn download_on(place: &Place, mut stream: TcpStream, path: &str) -> Result<Running> {
    let path = path.to_owned();
    start(place, move |progress| get(&mut stream, &path, progress))
}

/// Starts `PUT path` of `bytes` pseudo-random bytes over a connection of its own.
pub(crate) fn upload(
    place: &Place,
    target: SocketAddr,
    path: &str,
    bytes: u64,
    seed: u64,
) -> Result<Running> {
    let path = path.to_owned();
    start(place, move |progress| put(&mut connect(target)?, &path, bytes, seed, progress))
}

/// Starts `PUT path` on a connection that is open already.
pub(crate) fn upload_on(
    place: &Place,
    mut stream: TcpStream,
    path: &str,
    bytes: u64,
    seed: u64,
) -> Result<Running> {
    let path = path.to_owned();
    start(place, move |progress| put(&mut stream, &path, bytes, seed, progress))
}

fn start<F>(place: &Place, work: F) -> Result<Running>
where
    F: FnOnce(&AtomicU64) -> Result<Transfer> + Send + 'static,
{
    let progress = Arc::new(AtomicU64::new(0));
    let shared = progress.clone();
    let failure = Arc::new(OnceLock::new());
    let told = failure.clone();
    let handle =
        place.spawn("http", move || work(&shared).inspect_err(|error| _ = told.set(format!("{error:#}"))))?;
    Ok(Running { handle, progress, failure })
}

/// Opens a connection with this module's limits.
pub(crate) fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))
        .with_context(|| format!("cannot connect to HTTP at {target}"))?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

fn get(stream: &mut TcpStream, path: &str, progress: &AtomicU64) -> Result<Transfer> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let head = Head::read(&mut reader)?;
    ensure!(head.status == 200, "GET {path} was answered with {}", head.status);

    let mut gaps = Gaps::begin();
    let mut sha = Sha256::new();
    let mut left = head.length.context("the answer has no Content-Length")?;
    let bytes = left;
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = reader
            .read(&mut buffer[..want])
            .with_context(|| format!("after {} of {bytes} bytes", bytes - left))?;
        ensure!(n > 0, "the server closed after {} of {bytes} bytes", bytes - left);
        gaps.note();
        sha.update(&buffer[..n]);
        left -= n as u64;
        progress.store(bytes - left, Ordering::Relaxed);
    }
    Ok(gaps.conclude(sha, bytes))
}

fn put(stream: &mut TcpStream, path: &str, bytes: u64, seed: u64, progress: &AtomicU64) -> Result<Transfer> {
    write!(stream, "PUT {path} HTTP/1.1\r\nHost: lab\r\nContent-Length: {bytes}\r\n\r\n")?;
    let mut random = Random::new(seed);
    let mut gaps = Gaps::begin();
    let mut sha = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < bytes {
        let n = buffer.len().min(usize::try_from(bytes - sent).unwrap_or(usize::MAX));
        random.fill(&mut buffer[..n]);
        sha.update(&buffer[..n]);
        stream.write_all(&buffer[..n]).with_context(|| format!("after {sent} of {bytes} bytes"))?;
        gaps.note();
        sent += n as u64;
        progress.store(sent, Ordering::Relaxed);
    }
    let head = Head::read(&mut BufReader::new(&mut *stream)).context("no answer to the upload")?;
    gaps.note();
    ensure!(matches!(head.status, 201 | 204), "PUT {path} was answered with {}", head.status);
    Ok(gaps.conclude(sha, bytes))
}

/// SHA-256 of the first `bytes` bytes that an upload with this seed sends.
pub(crate) fn upload_sha256(bytes: u64, seed: u64) -> String {
    let mut random = Random::new(seed);
    let mut sha = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let n = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        random.fill(&mut buffer[..n]);
        sha.update(&buffer[..n]);
        left -= n as u64;
    }
    hex(sha)
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn file_sha256(path: &std::path::Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(sha)),
            n => sha.update(&buffer[..n]),
        }
    }
}

pub(crate) fn hex(sha: Sha256) -> String {
    sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// One small request on a connection that stays open; true if it is answered with 200.
pub(crate) fn head(stream: &mut TcpStream, path: &str) -> Result<()> {
    write!(stream, "HEAD {path} HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    let head = Head::read(&mut BufReader::new(stream))?;
    ensure!(head.status == 200, "HEAD {path} was answered with {}", head.status);
    Ok(())
}

struct Head {
    status: u16,
    length: Option<u64>,
}

impl Head {
    fn read(reader: &mut impl BufRead) -> Result<Self> {
        let mut status = None;
        let mut length = None;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                bail!("the server closed the connection instead of answering");
            }
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            match status {
                None => {
                    let code = line.split(' ').nth(1).context("no status code")?;
                    status = Some(code.parse()?);
                }
                Some(_) => {
                    if let Some((name, value)) = line.split_once(':')
                        && name.eq_ignore_ascii_case("content-length")
                    {
                        length = Some(value.trim().parse()?);
                    }
                }
            }
        }
        Ok(Self { status: status.context("no status line")?, length })
    }
}

struct Gaps {
    begun_ns: u64,
    last_ns: u64,
    longest_ns: u64,
    longest_at: u64,
}

impl Gaps {
    fn begin() -> Self {
        let now = now_ns();
        Self { begun_ns: now, last_ns: now, longest_ns: 0, longest_at: now }
    }

    fn note(&mut self) {
        let now = now_ns();
        if now - self.last_ns > self.longest_ns {
            self.longest_ns = now - self.last_ns;
            self.longest_at = self.last_ns;
        }
        self.last_ns = now;
    }

    fn conclude(self, sha: Sha256, bytes: u64) -> Transfer {
        Transfer {
            sha256: hex(sha),
            bytes,
            took: Duration::from_nanos(self.last_ns - self.begun_ns),
            longest_gap: (Duration::from_nanos(self.longest_ns), self.longest_at),
        }
    }
}
