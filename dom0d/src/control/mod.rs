//! The control server: HTTP/1.1 with JSON on a Unix socket, for the CLI and for monitoring.
//!
//! It has no state of its own but the events (see [`history`]): it passes each request on to the data path, and translates the
//! answer into the API's types.

mod body;
mod commands;
mod connection;
mod error;
mod events;
mod history;
mod metrics;
mod socket;
mod view;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request as HttpRequest, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::sync::Semaphore;
use understudy_api::{Notice, Noticed, Services, Status};

use self::body::{BODY_LIMIT, Body};
use self::commands::{command, hold};
use self::error::ApiError;
use self::events::events;
use self::history::{HISTORY_KEPT, History};
pub(crate) use self::socket::ControlSocket;
use crate::command::{Reply, Request};
use crate::discovery::Relist;
use crate::message::Requests;
use crate::report::Events;

/// Followers of events at a time.
const FOLLOWERS: usize = 32;

/// Conversations in an answer that did not say how many.
const DEFAULT_CONVERSATIONS: usize = 100;

/// The data path answers between two packets; the hypervisor, in a pause or resume, is slower.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// For `/livez`: a data path that takes longer does not serve its clients either.
const LIVE_LIMIT: Duration = Duration::from_secs(2);

/// Serves the control API until the returned future is dropped. Events sent from now on are kept.
pub(crate) fn serve(
    socket: ControlSocket,
    requests: Requests,
    relist: Relist,
    events: &Events,
) -> impl Future<Output = ()> + Send + use<> {
    let history = History::new(HISTORY_KEPT);
    let received = events.subscribe();
    async move {
        let ControlSocket { listener, file } = socket;
        let app = router(requests, relist, Arc::clone(&history));
        tokio::select! {
            () = connection::accept(listener, app) => {}
            // The daemon drops its end when it stops.
            () = history.record(received) => {}
        };
        drop(file);
    }
}

#[derive(Clone)]
struct Control {
    requests: Requests,
    relist: Relist,
    history: Arc<History>,
    followers: Arc<Semaphore>,
}

fn router(requests: Requests, relist: Relist, history: Arc<History>) -> Router {
    let control = Control { requests, relist, history, followers: Arc::new(Semaphore::new(FOLLOWERS)) };
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", get(services))
        .route("/v1/services/{service}/conversations", get(conversations))
        .route("/v1/services/{service}/hold", post(hold))
        .route("/v1/services/{service}/{verb}", post(command))
        .route("/v1/notify", post(notify))
        .route("/v1/events", get(events))
        .route("/metrics", get(scrape))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(control)
}

impl Control {
    /// Asks the data path, within a limit.
    async fn ask<T>(
        &self,
        limit: Duration,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, ApiError> {
        match tokio::time::timeout(limit, self.requests.ask(request)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(ApiError::new(
                StatusCode::GATEWAY_TIMEOUT,
                "no_answer",
                format!(
                    "dom0d's data path did not answer within {} s: whether the command was carried out is not known; see `understudy status`, dom0d's log, and restart dom0d if it stays so",
                    limit.as_secs()
                ),
            )),
        }
    }

    async fn status(&self, limit: Duration) -> Result<Status, ApiError> {
        let report = self.ask(limit, |reply| Request::Status { reply }).await?;
        Ok(view::status(report))
    }
}

// ---- questions ------------------------------------------------------------------------------------

async fn status(State(control): State<Control>) -> Result<Json<Status>, ApiError> {
    Ok(Json(control.status(ANSWER_LIMIT).await?))
}

async fn services(State(control): State<Control>) -> Result<Json<Services>, ApiError> {
    let services = control.status(ANSWER_LIMIT).await?.services;
    Ok(Json(Services { services }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    #[serde(default)]
    skip: usize,
    limit: Option<usize>,
}

async fn conversations(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<Page>, QueryRejection>,
) -> Result<Json<understudy_api::Conversations>, ApiError> {
    let service = in_path(path)?;
    let Query(Page { skip, limit }) = query.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let request = |reply| Request::Conversations {
        service: service.clone(),
        skip,
        limit: limit.unwrap_or(DEFAULT_CONVERSATIONS),
        reply,
    };
    let page = control.ask(ANSWER_LIMIT, request).await?;
    Ok(Json(view::conversations(service, skip, page)))
}

// ---- hints ----------------------------------------------------------------------------------------

/// Answers before anything is done: whoever tells is a toolstack's hook, and any number may tell at a time.
async fn notify(State(control): State<Control>, Body(notice): Body<Notice>) -> Json<Noticed> {
    tracing::debug!(?notice, "told to look at xenstore");
    control.relist.ask();
    Json(Noticed {})
}

// ---- for monitoring -------------------------------------------------------------------------------

async fn scrape(State(control): State<Control>) -> Result<Response, ApiError> {
    let status = control.status(ANSWER_LIMIT).await?;
    let page = metrics::encode(&status).map_err(|error| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics",
            format!("the metrics can't be written ({error}); this is a bug of dom0d"),
        )
    })?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response())
}

/// Is the data path alive?
async fn livez(State(control): State<Control>) -> Result<&'static str, ApiError> {
    control.status(LIVE_LIMIT).await?;
    Ok("ok\n")
}

/// Does every service serve?
async fn readyz(State(control): State<Control>) -> Result<&'static str, ApiError> {
    let status = control.status(LIVE_LIMIT).await?;
    if status.ready {
        return Ok("ok\n");
    }
    let mut reasons = status.problems;
    for service in status.services.iter().filter(|service| !service.serving) {
        let problems = match service.problems.as_slice() {
            [] => "does not serve; see `understudy status`".to_owned(),
            problems => problems.join("; "),
        };
        reasons.push(format!("service {}: {problems}", service.name));
    }
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reasons.join("\n")))
}

/// What a path names.
fn in_path<T>(path: Result<Path<T>, PathRejection>) -> Result<T, ApiError> {
    path.map(|Path(named)| named).map_err(|error| ApiError::bad_request(error.body_text()))
}

async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no_such_path",
        format!("{} is no path of dom0d's control API; start at /v1/status", uri.path()),
    )
}

async fn wrong_method(request: HttpRequest) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "wrong_method",
        format!(
            "{} can't be used on {}: questions are GET, commands are POST",
            request.method(),
            request.uri().path()
        ),
    )
}

#[cfg(test)]
mod tests;
