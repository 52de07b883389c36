//! One question after the other over one connection, each timed: the round trip as a client sees it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use super::clock::now_ns;
use super::redis::script::{Model, Script};

/// Size of the `PING` request in bytes, as it crosses the wire.
pub(crate) const PING_BYTES: usize = 64;

/// A connection that asks and times.
#[derive(Debug)]
pub(crate) struct PingPong {
    stream: TcpStream,
    script: Script,
    model: Model,
    prefix: String,
}

impl PingPong {
    pub(crate) fn connect(target: SocketAddr, prefix: &str) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))
            .with_context(|| format!("cannot connect to Redis at {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self { stream, script: Script::new(7), model: Model::default(), prefix: prefix.to_owned() })
    }

    /// Times `rounds` round trips of a 64-byte `PING` into `histogram`, in nanoseconds.
    pub(crate) fn pings(&mut self, rounds: usize, histogram: &mut Histogram<u64>) -> Result<()> {
        // "*2\r\n$4\r\nPING\r\n$NN\r\n" and the final "\r\n" take 21 bytes.
        let text = "p".repeat(PING_BYTES - 21);
        let request = format!("*2\r\n$4\r\nPING\r\n${}\r\n{text}\r\n", text.len());
        let answer = format!("${}\r\n{text}\r\n", text.len());
        ensure!(request.len() == PING_BYTES, "the PING has {} bytes", request.len());
        for _ in 0..rounds {
            self.round(request.as_bytes(), answer.as_bytes(), histogram)?;
        }
        Ok(())
    }

    /// Times `rounds` transactions (insert, change, delete) into `histogram`, in nanoseconds.
    pub(crate) fn transactions(&mut self, rounds: usize, histogram: &mut Histogram<u64>) -> Result<()> {
        for _ in 0..rounds {
            let op = self.script.next();
            let (mut request, mut answer) = (Vec::new(), Vec::new());
            op.encode(&self.prefix, &mut request);
            self.model.apply(&op, &mut answer);
            self.round(&request, &answer, histogram)?;
        }
        Ok(())
    }

    fn round(&mut self, request: &[u8], answer: &[u8], times: &mut Histogram<u64>) -> Result<()> {
        let mut got = vec![0; answer.len()];
        let asked = now_ns();
        self.stream.write_all(request)?;
        self.stream.read_exact(&mut got)?;
        times.saturating_record(now_ns() - asked);
        ensure!(
            got == answer,
            "wrong answer: expected \"{}\", got \"{}\"",
            answer.escape_ascii(),
            got.escape_ascii()
        );
        Ok(())
    }
}

/// A histogram for round trips: 100 ns to 100 s, three digits.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(100, 100_000_000_000, 3)?)
}
