//! A plain blocking Redis session, for single questions: setting up, checking, telling two apart.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::script::command;

/// A Redis answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
    Array(Option<Vec<Answer>>),
}

impl Answer {
    /// The text of a bulk or status answer.
    pub(crate) fn text(&self) -> Option<String> {
        match self {
            Answer::Bulk(Some(bytes)) => Some(String::from_utf8_lossy(bytes).into_owned()),
            Answer::Status(text) => Some(text.clone()),
            _ => None,
        }
    }
}

/// One connection; it never reconnects.
#[derive(Debug)]
pub(crate) struct Session {
    stream: BufReader<TcpStream>,
}

impl Session {
    pub(crate) fn connect(target: SocketAddr) -> Result<Self> {
        Self::connect_for(target, Duration::from_secs(10))
    }

    /// The same, to a server that may take only so long for an answer.
    pub(crate) fn connect_for(target: SocketAddr, patience: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))
            .with_context(|| format!("cannot connect to Redis at {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// The address of this end, as the daemon names the conversation.
    pub(crate) fn local(&self) -> Result<SocketAddr> {
        Ok(self.stream.get_ref().local_addr()?)
    }

    /// Sends one command and waits for its answer.
    pub(crate) fn ask(&mut self, words: &[&str]) -> Result<Answer> {
        self.send(words)?;
        self.answer().with_context(|| format!("no answer to {}", words.join(" ")))
    }

    /// Sends one command without waiting.
    pub(crate) fn send(&mut self, words: &[&str]) -> Result<()> {
        let mut out = Vec::new();
        command(&mut out, words);
        self.send_bytes(&out)
    }

    /// Sends commands that are encoded already.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.get_mut().write_all(bytes).context("cannot send to Redis")
    }

    /// The next answer.
    pub(crate) fn answer(&mut self) -> Result<Answer> {
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).context("an empty answer line")?;
        Ok(match kind {
            "+" => Answer::Status(rest.to_owned()),
            "-" => Answer::Error(rest.to_owned()),
            ":" => Answer::Integer(rest.parse()?),
            "$" => match usize::try_from(rest.parse::<i64>()?) {
                Err(_) => Answer::Bulk(None),
                Ok(length) => {
                    let mut bytes = vec![0; length + 2];
                    self.stream.read_exact(&mut bytes)?;
                    bytes.truncate(length);
                    Answer::Bulk(Some(bytes))
                }
            },
            "*" => match usize::try_from(rest.parse::<i64>()?) {
                Err(_) => Answer::Array(None),
                Ok(length) => {
                    let items = (0..length).map(|_| self.answer()).collect::<Result<_>>()?;
                    Answer::Array(Some(items))
                }
            },
            _ => bail!("not a Redis answer: {line:?}"),
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("Redis closed the connection");
        }
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}
