//! A PostgreSQL session over the frontend/backend protocol 3.0, simple queries, trust authentication.

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::http::hex;

/// Largest message accepted; a longer one means that the stream is out of step.
const MESSAGE_LIMIT: usize = 16 << 20;

/// One session; it never reconnects.
#[derive(Debug)]
pub(crate) struct Session {
    stream: BufReader<TcpStream>,
}

/// Rows of text values.
pub(crate) type Rows = Vec<Vec<Option<String>>>;

impl Session {
    /// Connects as role `postgres` to database `postgres` and waits until queries are taken.
    pub(crate) fn connect(target: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))
            .with_context(|| format!("cannot connect to PostgreSQL at {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut session = Self { stream: BufReader::with_capacity(64 << 10, stream) };
        let mut body = 196_608_i32.to_be_bytes().to_vec();
        body.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
        let mut message = (body.len() as i32 + 4).to_be_bytes().to_vec();
        message.extend_from_slice(&body);
        session.stream.get_mut().write_all(&message)?;
        loop {
            let (kind, body) = session.message()?;
            match kind {
                b'R' => ensure!(
                    body == [0, 0, 0, 0],
                    "PostgreSQL wants a password: the lab uses trust authentication"
                ),
                b'Z' => return Ok(session),
                b'E' => bail!("PostgreSQL refused the session: {}", error_text(&body)),
                _ => {}
            }
        }
    }

    /// Runs a query (or several, separated by `;`) and returns all rows.
    pub(crate) fn query(&mut self, sql: &str) -> Result<Rows> {
        self.send(sql)?;
        self.rows().with_context(|| format!("in answer to {sql}"))
    }

    /// Sends a query without waiting.
    pub(crate) fn send(&mut self, sql: &str) -> Result<()> {
        let mut message = vec![b'Q'];
        message.extend_from_slice(&(sql.len() as i32 + 5).to_be_bytes());
        message.extend_from_slice(sql.as_bytes());
        message.push(0);
        Ok(self.stream.get_mut().write_all(&message)?)
    }

    /// The rows of the query sent last.
    pub(crate) fn rows(&mut self) -> Result<Rows> {
        let mut rows = Rows::new();
        let mut error = None;
        loop {
            let (kind, body) = self.message()?;
            match kind {
                b'D' => rows.push(row(&body)?),
                b'E' => error = Some(error_text(&body)),
                b'Z' => match error {
                    None => return Ok(rows),
                    Some(text) => bail!("PostgreSQL: {text}"),
                },
                _ => {}
            }
        }
    }

    /// Sends no more, as `shutdown(SHUT_WR)`: the connection is half closed from now on.
    pub(crate) fn half_close(&self) -> Result<()> {
        Ok(self.stream.get_ref().shutdown(Shutdown::Write)?)
    }

    /// Reads messages to the end of the query sent last, then to the server's FIN. Returns the
    /// number of rows and SHA-256 over all messages in between; `seen` is told each row.
    pub(crate) fn drain_to_close(&mut self, mut seen: impl FnMut(u64)) -> Result<(u64, String)> {
        let mut sha = Sha256::new();
        let mut rows = 0;
        loop {
            let (kind, body) = self.message().with_context(|| format!("after {rows} rows"))?;
            ensure!(kind != b'E', "PostgreSQL: {}", error_text(&body));
            sha.update([kind]);
            sha.update(&body);
            match kind {
                b'D' => {
                    rows += 1;
                    seen(rows);
                }
                b'Z' => break,
                _ => {}
            }
        }
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "{} bytes after the end", rest.len());
        Ok((rows, hex(sha)))
    }

    fn message(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head).context("PostgreSQL did not go on")?;
        let [kind, a, b, c, d] = head;
        let length = i32::from_be_bytes([a, b, c, d]);
        let length = usize::try_from(length - 4).context("a message of negative length")?;
        ensure!(length <= MESSAGE_LIMIT, "a message of {length} bytes: the stream is out of step");
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok((kind, body))
    }
}

fn row(body: &[u8]) -> Result<Vec<Option<String>>> {
    let (count, mut rest) = body.split_at_checked(2).context("a short row")?;
    let count = u16::from_be_bytes([count[0], count[1]]);
    let mut values = Vec::new();
    for _ in 0..count {
        let (length, tail) = rest.split_at_checked(4).context("a short row")?;
        let length = i32::from_be_bytes([length[0], length[1], length[2], length[3]]);
        match usize::try_from(length) {
            Err(_) => {
                values.push(None);
                rest = tail;
            }
            Ok(length) => {
                let (value, tail) = tail.split_at_checked(length).context("a short row")?;
                values.push(Some(String::from_utf8_lossy(value).into_owned()));
                rest = tail;
            }
        }
    }
    Ok(values)
}

fn error_text(body: &[u8]) -> String {
    body.split(|b| *b == 0)
        .filter(|field| matches!(field.first(), Some(b'S' | b'C' | b'M')))
        .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
