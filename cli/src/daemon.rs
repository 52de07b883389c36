//! The client of dom0d's control API: HTTP/1.1 over a Unix socket.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use understudy_api::{Command, Failure, Hold, Notice, Noticed};

use crate::failed::Failed;

/// Longest wait for an answer. dom0d's own limit is shorter.
const ANSWER_LIMIT: Duration = Duration::from_secs(40);

/// Longest wait for dom0d to take a notice: a toolstack waits for the hook that sends it.
const NOTICE_LIMIT: Duration = Duration::from_secs(1);

/// Longest answer in bytes. A page of 1,000 conversations has about 1 MiB.
const ANSWER_BYTES: usize = 64 << 20;

/// Longest event in bytes.
const EVENT_BYTES: usize = 1 << 20;

/// dom0d, behind its control socket.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Asks a question.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failed> {
        self.exchange(ANSWER_LIMIT, Method::GET, path, Bytes::new()).await
    }

    /// Sends a command. The answer is of the type that [`Command`] names for it.
    pub(crate) async fn command<T: DeserializeOwned>(
        &self,
        service: &str,
        command: &Command,
    ) -> Result<T, Failed> {
        let path = format!("/v1/services/{}/{}", percent_encoded(service), command.verb());
        self.post(ANSWER_LIMIT, &path, command).await
    }

    /// Sends a notice.
    pub(crate) async fn notify(&self, notice: &Notice) -> Result<Noticed, Failed> {
        self.post(NOTICE_LIMIT, "/v1/notify", notice).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        limit: Duration,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failed> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(&error.to_string()))?;
        self.exchange(limit, Method::POST, path, body.into()).await
    }

    /// Begins to read events.
    pub(crate) async fn events(&self, query: &str) -> Result<Events<'_>, Failed> {
        self.lines(Method::GET, &format!("/v1/events{query}"), Bytes::new()).await
    }

    /// Sends a command that lasts as long as its answer is read.
    pub(crate) async fn hold(&self, service: &str, hold: &Hold) -> Result<Events<'_>, Failed> {
        let path = format!("/v1/services/{}/hold", percent_encoded(service));
        let body = serde_json::to_vec(hold).map_err(|error| self.broken(&error.to_string()))?;
        self.lines(Method::POST, &path, body.into()).await
    }

    async fn lines(&self, method: Method, path: &str, body: Bytes) -> Result<Events<'_>, Failed> {
        let answer = self.send(method, path, body).await?;
        if answer.status() != StatusCode::OK {
            return Err(self.failure(answer).await);
        }
        Ok(Events { daemon: self, body: answer.into_body(), pending: Vec::new() })
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        limit: Duration,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, Failed> {
        let exchange = async {
            let answer = self.send(method, path, body).await?;
            if answer.status() != StatusCode::OK {
                return Err(self.failure(answer).await);
            }
            let body = self.body(answer).await?;
            serde_json::from_slice(&body).map_err(|error| self.broken(&error.to_string()))
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(Failed::Unreachable(format!(
                "dom0d does not answer on {} (waited {} s); see its log, and restart it if it hangs",
                self.socket.display(),
                limit.as_secs()
            )))
        })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Failed> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error.to_string()))?;
        // Its errors reach the request.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "dom0d")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(&error.to_string()))?;
        sender.send_request(request).await.map_err(|error| self.broken(&error.to_string()))
    }

    async fn body(&self, answer: Response<Incoming>) -> Result<Bytes, Failed> {
        let body = Limited::new(answer.into_body(), ANSWER_BYTES);
        match body.collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) => Err(self.broken(&error.to_string())),
        }
    }

    /// Why dom0d did not carry out a request.
    async fn failure(&self, answer: Response<Incoming>) -> Failed {
        let status = answer.status();
        match self.body(answer).await {
            Ok(body) => match serde_json::from_slice::<Failure>(&body) {
                Ok(failure) => Failed::Refused(failure.error),
                Err(_) => self.broken(&format!("status {status}")),
            },
            Err(failed) => failed,
        }
    }

    fn unreachable(&self, error: &io::Error) -> Failed {
        let socket = self.socket.display();
        let message = match error.kind() {
            io::ErrorKind::NotFound => format!(
                "dom0d is not running: there is no {socket}. Start it with `systemctl start dom0d`, and see `journalctl -u dom0d` if it ends. If it runs with another `control_socket`, name that with --socket"
            ),
            io::ErrorKind::ConnectionRefused => format!(
                "dom0d is not running: nobody listens on {socket}, which an earlier dom0d left behind. Start it with `systemctl start dom0d`, and see `journalctl -u dom0d` if it ends"
            ),
            io::ErrorKind::PermissionDenied => {
                format!("no permission to use {socket}: only root may use it. Run this as root")
            }
            _ => format!("can't connect to {socket}: {error}. Is it dom0d's `control_socket`?"),
        };
        Failed::Unreachable(message)
    }

    fn broken(&self, error: &str) -> Failed {
        Failed::Unreachable(format!(
            "no usable answer on {} ({error}): either dom0d stopped meanwhile, or something else listens there. See dom0d's log, and try again",
            self.socket.display()
        ))
    }
}

/// An answer that comes line by line, such as events.
pub(crate) struct Events<'a> {
    daemon: &'a Daemon,
    body: Incoming,
    pending: Vec<u8>,
}

impl Events<'_> {
    /// The next line of JSON; `None` once dom0d has ended the answer.
    pub(crate) async fn next(&mut self) -> Result<Option<String>, Failed> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let rest = self.pending.split_off(end + 1);
                let line = std::mem::replace(&mut self.pending, rest);
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            if self.pending.len() > EVENT_BYTES {
                return Err(self.daemon.broken("an event without end"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(self.daemon.broken(&error.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        self.pending.extend_from_slice(&bytes);
                    }
                }
            }
        }
    }
}

/// A text as one segment of a path or one value of a query (RFC 3986 §2.3).
pub(crate) fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_t_leave_their_path_segment() {
        assert_eq!(percent_encoded("a-b_c.d~1"), "a-b_c.d~1");
        assert_eq!(percent_encoded("../x?y é"), "..%2Fx%3Fy%20%C3%A9");
    }
}
