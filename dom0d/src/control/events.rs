//! `/v1/events`: what happened, and with `follow` what happens.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::SystemTime;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use understudy_api::time;

use super::error::ApiError;
use super::history::History;
use super::{Control, FOLLOWERS};

/// Events sent to a reader in one piece.
const EVENTS_AT_ONCE: usize = 256;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Since {
    #[serde(default)]
    follow: bool,
    since: Option<String>,
}

pub(super) async fn events(
    State(control): State<Control>,
    query: Result<Query<Since>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(Since { follow, since }) = query.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let history = control.history;
    let place = match since {
        None => history.oldest(),
        Some(text) => {
            let unix_us = time::since(&text, SystemTime::now())
                .map_err(|error| ApiError::bad_request(format!("`since`: {error}")))?;
            history.since(unix_us)
        }
    };
    let permit = match follow {
        false => None,
        true => Some(control.followers.try_acquire_owned().map_err(|_| {
            ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too_many_followers",
                format!("{FOLLOWERS} clients follow the events already: end one of them"),
            )
        })?),
    };
    let reader = Reader { history, place, follow: permit };
    let pieces = futures_util::stream::unfold(reader, Reader::next);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(pieces)).into_response())
}

/// Where a reader of events is.
struct Reader {
    history: Arc<History>,
    place: u64,
    /// It waits for what will happen; held so that followers are counted.
    follow: Option<OwnedSemaphorePermit>,
}

impl Reader {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        loop {
            let (lines, place) = self.history.read(self.place, EVENTS_AT_ONCE);
            self.place = place;
            if !lines.is_empty() {
                return Some((Ok(Bytes::from(lines.concat())), self));
            }
            self.follow.as_ref()?;
            self.history.wait(self.place).await;
        }
    }
}
