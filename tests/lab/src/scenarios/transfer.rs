//! The large HTTP transfers and half-closed sessions that several stories share: how they are begun,
//! and what must be true of them at their end.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::client::http::{self, Running, Transfer};
use crate::client::place::{Place, join};
use crate::client::postgres;
use crate::host::{Domain, Service};
use crate::stage::{Stage, own_address};

/// The file that every domain's HTTP server offers.
pub(super) const LARGE: &str = "/large.bin";
/// Seed of uploaded contents.
const SEED: u64 = 4_711;
/// A stalled transfer is reported as such.
pub(super) const PROGRESS: Duration = Duration::from_secs(60);

/// SHA-256 of the large file, read from a domain directly.
pub(super) fn large_sha256(domain: &Domain) -> Result<String> {
    let (place, address) = own_address(domain, Service::Http)?;
    Ok(http::download(&place, address, LARGE)?.finish()?.sha256)
}

/// A large transfer with some idle connections beside it.
pub(super) struct Large {
    running: Running,
    idle: Vec<TcpStream>,
    direction: Direction,
    bytes: u64,
    source_sha256: String,
}

/// Which way the large body goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Download,
    Upload,
}

const UPLOADED: &str = "body.bin";

impl Large {
    /// Begins a transfer of the size of the large file over a connection of its own.
    pub(super) fn begin(stage: &Stage, direction: Direction, ipv6: bool) -> Result<Self> {
        let target = stage.psc_of_family(Service::Http, ipv6)?;
        let stream = stage.client().run(move || http::connect(target))?;
        Self::begin_on(stage, direction, stream)
    }

    /// Begins it on a connection that is open already.
    pub(super) fn begin_on(stage: &Stage, direction: Direction, stream: TcpStream) -> Result<Self> {
        let bytes = stage.lab.config().large_file_bytes;
        let idle = idle_connections(&stage.client(), stream.peer_addr()?)?;
        let (running, source_sha256) = match direction {
            Direction::Download => {
                let sha256 = large_sha256(&stage.ovm(Service::Http)?)?;
                (http::download_on(&stage.client(), stream, LARGE)?, sha256)
            }
            Direction::Upload => {
                let sha256 = http::upload_sha256(bytes, SEED);
                let path = format!("/upload/{UPLOADED}");
                let place = stage.client();
                (http::upload_on(&place, stream, &path, bytes, SEED)?, sha256)
            }
        };
        Ok(Self { running, idle, direction, bytes, source_sha256 })
    }

    /// Blocks until this part of the body (0.0 to 1.0) has been read or written by the client.
    pub(super) fn wait_part(&self, part: f64) -> Result<()> {
        let bytes = (self.bytes as f64 * part) as u64;
        self.running.wait_progress(bytes, PROGRESS)
    }

    /// The whole body arrived as it was sent, in this one connection, and the idle connections live.
    pub(super) fn expect_whole(mut self, stage: &Stage) -> Result<Transfer> {
        let transfer = self.running.finish()?;
        ensure!(transfer.bytes == self.bytes, "{} of {} bytes came", transfer.bytes, self.bytes);
        let arrived = match self.direction {
            Direction::Download => transfer.sha256.clone(),
            Direction::Upload => {
                let ovm = stage.ovm(Service::Http)?;
                http::file_sha256(&ovm.uploaded(UPLOADED))?
            }
        };
        ensure!(
            arrived == self.source_sha256,
            "SHA-256 of what arrived is {arrived}, of the source {}",
            self.source_sha256
        );
        for stream in &mut self.idle {
            http::head(stream, LARGE)?;
        }
        println!(
            "  {:?} of {} bytes in {:.2} s, longest gap {} ms, SHA-256 equal",
            self.direction,
            transfer.bytes,
            transfer.took.as_secs_f64(),
            transfer.longest_gap.0.as_millis()
        );
        Ok(transfer)
    }
}

/// Evidence of kind (e) needs several conversations; these have all asked once and then stay silent.
fn idle_connections(place: &Place, target: SocketAddr) -> Result<Vec<TcpStream>> {
    place.run(move || {
        (0..3)
            .map(|_| {
                let mut stream = http::connect(target)?;
                http::head(&mut stream, LARGE)?;
                Ok(stream)
            })
            .collect()
    })
}

/// Rows of the half-closed session's answer, and the query that gives them.
const ROWS: u64 = 1_000_000;
const QUERY: &str = "SELECT i, md5(i::text) FROM generate_series(1, 1000000) AS i";

/// A PostgreSQL session that sent its query and then its FIN, and reads a long answer.
pub(super) struct HalfClosed {
    handle: JoinHandle<Result<(u64, String)>>,
    rows: Arc<AtomicU64>,
    idle: Vec<postgres::Session>,
}

impl HalfClosed {
    pub(super) fn begin(stage: &Stage) -> Result<Self> {
        let target = stage.psc(Service::Postgresql)?;
        let idle = stage.client().run(move || {
            (0..3)
                .map(|_| {
                    let mut session = postgres::Session::connect(target)?;
                    session.query("SELECT 1")?;
                    Ok(session)
                })
                .collect::<Result<Vec<_>>>()
        })?;
        let rows = Arc::new(AtomicU64::new(0));
        let counter = rows.clone();
        let handle = stage.client().spawn("half-closed", move || read_half_closed(target, &counter))?;
        Ok(Self { handle, rows, idle })
    }

    /// Blocks until this part of the answer (0.0 to 1.0) has been read.
    pub(super) fn wait_part(&self, part: f64) -> Result<()> {
        let (wanted, deadline) = ((ROWS as f64 * part) as u64, Instant::now() + PROGRESS);
        while self.rows.load(Ordering::Relaxed) < wanted {
            ensure!(
                !self.handle.is_finished() && Instant::now() < deadline,
                "the answer came to {} of {ROWS} rows only",
                self.rows.load(Ordering::Relaxed)
            );
            sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// The answer came whole and ended by the server's FIN; it is what the OVM answers when asked
    /// directly; the idle sessions live.
    pub(super) fn expect_whole(mut self, stage: &Stage) -> Result<()> {
        let (rows, sha256) = join(self.handle)?;
        ensure!(rows == ROWS, "{rows} of {ROWS} rows came");
        let (place, address) = own_address(&stage.ovm(Service::Postgresql)?, Service::Postgresql)?;
        let (_, direct) = place.run(move || read_half_closed(address, &AtomicU64::new(0)))?;
        ensure!(sha256 == direct, "SHA-256 of the answer is {sha256}, asked directly {direct}");
        for session in &mut self.idle {
            let rows = session.query("SELECT 40 + 2")?;
            ensure!(rows == [[Some("42".to_owned())]], "an idle session answered {rows:?}");
        }
        println!("  {rows} rows over a half-closed connection, SHA-256 equal");
        Ok(())
    }
}

pub(super) fn read_half_closed(target: SocketAddr, counter: &AtomicU64) -> Result<(u64, String)> {
    let mut session = postgres::Session::connect(target)?;
    session.send(QUERY)?;
    session.half_close()?;
    session.drain_to_close(|rows| counter.store(rows, Ordering::Relaxed))
}
