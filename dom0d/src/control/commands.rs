//! `POST /v1/services/{service}/{verb}`: operators' commands, and the hold, which lasts for as long as its answer is read.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request as HttpRequest, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use understudy_api::{
    Answer, Command, DEFAULT_COPY_LIMIT_MS, DEFAULT_DRAIN_TIMEOUT_MS, HoldState, MAX_COPY_LIMIT_MS,
    MAX_DRAIN_TIMEOUT_MS,
};

use super::body::{Body, bytes};
use super::error::ApiError;
use super::{ANSWER_LIMIT, Control, in_path, no_such_path, view};
use crate::command::{Hold, Request};
use crate::message::Requests;

/// How often a hold is looked at for whoever asked for it, and how often it is told of one that has not changed.
const HOLD_LOOK: Duration = Duration::from_millis(20);
const HOLD_TOLD: Duration = Duration::from_secs(1);

/// Has a command carried out.
pub(super) async fn command(
    State(control): State<Control>,
    path: Result<Path<(String, String)>, PathRejection>,
    request: HttpRequest,
) -> Result<Json<Answer>, ApiError> {
    let (service, verb) = in_path(path)?;
    let uri = request.uri().clone();
    let body = bytes(request, &control).await?;
    let Some(parsed) = Command::parse(&verb, &body) else { return Err(no_such_path(uri).await) };
    let command = parsed.map_err(|error| ApiError::bad_request(format!("the request's body: {error}")))?;
    tracing::info!(service, ?command, "an operator commands");
    let request = |reply| Request::Command { service, command, reply };
    Ok(Json(control.ask(ANSWER_LIMIT, request).await?))
}

/// Holds clients for as long as the answer is read.
pub(super) async fn hold(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Body(asked): Body<understudy_api::Hold>,
) -> Result<Response, ApiError> {
    let service = in_path(path)?;
    let within = |what, given: Option<u64>, default, most| match given.unwrap_or(default) {
        ms if ms > most => {
            Err(ApiError::bad_request(format!("`{what}` is {ms}: clients wait that long; at most {most}")))
        }
        ms => Ok(Duration::from_millis(ms)),
    };
    let drain = asked.drain_timeout_ms;
    let drain = within("drain_timeout_ms", drain, DEFAULT_DRAIN_TIMEOUT_MS, MAX_DRAIN_TIMEOUT_MS)?;
    let limit = within("limit_ms", asked.limit_ms, DEFAULT_COPY_LIMIT_MS, MAX_COPY_LIMIT_MS)?;
    let domain = asked.domain;
    tracing::info!(service, domain, "operator: hold clients for a copy");
    let of = service.clone();
    let request = |reply| Request::Hold { service: of, domain, drain, limit, reply };
    let hold = control.ask(ANSWER_LIMIT, request).await?;
    let holder = Holder { requests: control.requests, service, hold, told: None };
    let lines = futures_util::stream::unfold(Some(holder), Holder::next);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], axum::body::Body::from_stream(lines))
        .into_response())
}

/// Who asked for a hold: when it is gone, so is the hold.
struct Holder {
    requests: Requests,
    service: String,
    hold: Hold,
    /// What it was told last, and when.
    told: Option<(HoldState, tokio::time::Instant)>,
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.requests.tell(Request::Release { service: self.service.clone(), hold: self.hold.hold });
    }
}

impl Holder {
    async fn next(holder: Option<Self>) -> Option<(Result<Bytes, Infallible>, Option<Self>)> {
        let mut holder = holder?;
        loop {
            let (service, hold) = (holder.service.clone(), holder.hold.hold);
            let state = holder.requests.ask(|reply| Request::Holding { service, hold, reply }).await.ok()?;
            let is_news =
                holder.told.as_ref().is_none_or(|(told, at)| *told != state || at.elapsed() >= HOLD_TOLD);
            if is_news {
                let line = view::holding(&holder.hold, &state);
                let is_over = matches!(state, HoldState::Over { .. });
                holder.told = Some((state, tokio::time::Instant::now()));
                return Some((Ok(line), (!is_over).then_some(holder)));
            }
            tokio::time::sleep(HOLD_LOOK).await;
        }
    }
}
