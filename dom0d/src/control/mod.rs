//! The control server: HTTP/1.1 with JSON on a Unix socket, for the CLI and for whoever watches.
//!
//! It knows nothing by itself: each request becomes a command to the data path, whose answer is put
//! into the API's words. Events are kept here, see [`history`].

mod connection;
mod error;
mod history;
mod metrics;
mod socket;
mod view;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use understudy_api::{
    Attach, DEFAULT_COPY_LIMIT_MS, DEFAULT_DRAIN_TIMEOUT_MS, Done, Failover, MAX_COPY_LIMIT_MS,
    MAX_DRAIN_TIMEOUT_MS, Notice, Noticed, OnDomain, Services, Status, Switchover, time,
};

use self::error::ApiError;
use self::history::{HISTORY_KEPT, History};
pub(crate) use self::socket::ControlSocket;
use crate::command::{Command, Hold, HoldState, Reply, Statement};
use crate::discovery::Relist;
use crate::message::Commands;
use crate::report::Events;

/// Longest request body. The longest honest one names two domains.
const BODY_LIMIT: usize = 16 << 10;

/// How long a request's body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(2);

/// Followers of events at a time.
const FOLLOWERS: usize = 32;

/// Events sent to a reader in one piece.
const EVENTS_AT_ONCE: usize = 256;

/// How often a hold is looked at for whoever asked for it, and how often it is told of one that has not changed.
const HOLD_LOOK: Duration = Duration::from_millis(20);
const HOLD_TOLD: Duration = Duration::from_secs(1);

/// Conversations in an answer that did not say how many.
const DEFAULT_CONVERSATIONS: usize = 100;

/// The data path answers between two packets; the hypervisor, in a pause or resume, is slower.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// For `/livez`: a data path that takes longer does not serve its clients either.
const LIVE_LIMIT: Duration = Duration::from_secs(2);

/// Serves the control API until the returned future is dropped. Events sent from now on are kept.
pub(crate) fn serve(
    socket: ControlSocket,
    commands: Commands,
    relist: Relist,
    events: &Events,
) -> impl Future<Output = ()> + Send + use<> {
    let history = History::new(HISTORY_KEPT);
    let received = events.subscribe();
    async move {
        let ControlSocket { listener, file } = socket;
        let app = router(commands, relist, Arc::clone(&history));
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
    commands: Commands,
    relist: Relist,
    history: Arc<History>,
    followers: Arc<Semaphore>,
}

fn router(commands: Commands, relist: Relist, history: Arc<History>) -> Router {
    let control = Control { commands, relist, history, followers: Arc::new(Semaphore::new(FOLLOWERS)) };
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", get(services))
        .route("/v1/services/{service}/conversations", get(conversations))
        .route("/v1/services/{service}/attach", post(attach))
        .route("/v1/services/{service}/hold", post(hold))
        .route("/v1/services/{service}/detach", post(detach))
        .route("/v1/services/{service}/switchover", post(switchover))
        .route("/v1/services/{service}/failover", post(failover))
        .route("/v1/services/{service}/pause", post(pause))
        .route("/v1/services/{service}/resume", post(resume))
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
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, ApiError> {
        match tokio::time::timeout(limit, self.commands.ask(command)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(ApiError::new(
                StatusCode::GATEWAY_TIMEOUT,
                "no_answer",
                format!(
                    "dom0d's data path did not answer within {} s: whether the order was carried out is not known; see `understudy status`, dom0d's log, and restart dom0d if it stays so",
                    limit.as_secs()
                ),
            )),
        }
    }

    async fn status(&self, limit: Duration) -> Result<Status, ApiError> {
        let report = self.ask(limit, |reply| Command::Status { reply }).await?;
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
    let service = service_of(path)?;
    let Query(Page { skip, limit }) = query.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let command = |reply| Command::Conversations {
        service: service.clone(),
        skip,
        limit: limit.unwrap_or(DEFAULT_CONVERSATIONS),
        reply,
    };
    let page = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(view::conversations(service, skip, page)))
}

// ---- orders ---------------------------------------------------------------------------------------

async fn attach(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(order): Order<Attach>,
) -> Result<Json<understudy_api::Attached>, ApiError> {
    let service = service_of(path)?;
    let statement = statement(&order)?;
    let domain = order.domain;
    tracing::info!(service, domain, ?statement, "operator: attach");
    let command = |reply| Command::Attach { service, domain, statement, reply };
    let answer = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(view::attached(answer)))
}

fn statement(order: &Attach) -> Result<Option<Statement>, ApiError> {
    if let Some(hold) = order.copied {
        return match (order.assume_identical, order.drain, order.drain_timeout_ms) {
            (false, false, None) => Ok(Some(Statement::Copied { hold })),
            _ => Err(ApiError::bad_request("`copied` says all that there is to say of the domain's state")),
        };
    }
    match (order.assume_identical, order.drain, order.drain_timeout_ms) {
        (true, true, _) => Err(ApiError::bad_request(
            "`assume_identical` and `drain` exclude each other: the first says that the domain's state equals the OVM's now, the second that it will once open conversations have ended",
        )),
        (_, false, Some(_)) => Err(ApiError::bad_request("`drain_timeout_ms` means nothing without `drain`")),
        (_, _, Some(timeout)) if timeout > MAX_DRAIN_TIMEOUT_MS => Err(ApiError::bad_request(format!(
            "`drain_timeout_ms` is {timeout}: new clients wait that long; at most {MAX_DRAIN_TIMEOUT_MS}"
        ))),
        (true, false, None) => Ok(Some(Statement::Identical)),
        (false, true, timeout) => Ok(Some(Statement::IdenticalAfterDrain {
            timeout: Duration::from_millis(timeout.unwrap_or(DEFAULT_DRAIN_TIMEOUT_MS)),
        })),
        (false, false, None) => Ok(None),
    }
}

/// Holds clients for as long as the answer is read.
async fn hold(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(order): Order<understudy_api::Hold>,
) -> Result<Response, ApiError> {
    let service = service_of(path)?;
    let within = |what, given: Option<u64>, default, most| match given.unwrap_or(default) {
        ms if ms > most => {
            Err(ApiError::bad_request(format!("`{what}` is {ms}: clients wait that long; at most {most}")))
        }
        ms => Ok(Duration::from_millis(ms)),
    };
    let drain = order.drain_timeout_ms;
    let drain = within("drain_timeout_ms", drain, DEFAULT_DRAIN_TIMEOUT_MS, MAX_DRAIN_TIMEOUT_MS)?;
    let limit = within("limit_ms", order.limit_ms, DEFAULT_COPY_LIMIT_MS, MAX_COPY_LIMIT_MS)?;
    let domain = order.domain;
    tracing::info!(service, domain, "operator: hold clients for a copy");
    let of = service.clone();
    let command = |reply| Command::Hold { service: of, domain, drain, limit, reply };
    let hold = control.ask(ANSWER_LIMIT, command).await?;
    let holder = Holder { commands: control.commands, service, hold, told: None };
    let lines = futures_util::stream::unfold(Some(holder), Holder::next);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Who asked for a hold: when it is gone, so is the hold.
struct Holder {
    commands: Commands,
    service: String,
    hold: Hold,
    /// What it was told last, and when.
    told: Option<(HoldState, tokio::time::Instant)>,
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.commands.tell(Command::Release { service: self.service.clone(), hold: self.hold.hold });
    }
}

impl Holder {
    async fn next(holder: Option<Self>) -> Option<(Result<Bytes, Infallible>, Option<Self>)> {
        let mut holder = holder?;
        loop {
            let (service, hold) = (holder.service.clone(), holder.hold.hold);
            let state = holder.commands.ask(|reply| Command::Holding { service, hold, reply }).await.ok()?;
            let is_news =
                holder.told.as_ref().is_none_or(|(told, at)| *told != state || at.elapsed() >= HOLD_TOLD);
            if is_news {
                let line = view::holding(&holder.hold, &state);
                let is_over = matches!(state, HoldState::Over(_));
                holder.told = Some((state, tokio::time::Instant::now()));
                return Some((Ok(line), (!is_over).then_some(holder)));
            }
            tokio::time::sleep(HOLD_LOOK).await;
        }
    }
}

async fn detach(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(OnDomain { domain }): Order<OnDomain>,
) -> Result<Json<Done>, ApiError> {
    let service = service_of(path)?;
    tracing::info!(service, domain, "operator: detach");
    let command = |reply| Command::Detach { service, domain, reply };
    let domain = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(Done { domain: view::domain(&domain) }))
}

async fn switchover(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(Switchover { to }): Order<Switchover>,
) -> Result<Json<understudy_api::Promoted>, ApiError> {
    let service = service_of(path)?;
    tracing::info!(service, to, "operator: switchover");
    let command = |reply| Command::Switchover { service, to, reply };
    let answer = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(view::promoted(answer)))
}

async fn failover(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(Failover { to, force }): Order<Failover>,
) -> Result<Json<understudy_api::Promoted>, ApiError> {
    let service = service_of(path)?;
    tracing::info!(service, to, force, "operator: failover");
    let command = |reply| Command::Failover { service, to, force, reply };
    let answer = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(view::promoted(answer)))
}

async fn pause(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(OnDomain { domain }): Order<OnDomain>,
) -> Result<Json<Done>, ApiError> {
    let service = service_of(path)?;
    tracing::info!(service, domain, "operator: pause");
    let command = |reply| Command::Pause { service, domain, reply };
    let domain = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(Done { domain: view::domain(&domain) }))
}

async fn resume(
    State(control): State<Control>,
    path: Result<Path<String>, PathRejection>,
    Order(OnDomain { domain }): Order<OnDomain>,
) -> Result<Json<Done>, ApiError> {
    let service = service_of(path)?;
    tracing::info!(service, domain, "operator: resume");
    let command = |reply| Command::Resume { service, domain, reply };
    let domain = control.ask(ANSWER_LIMIT, command).await?;
    Ok(Json(Done { domain: view::domain(&domain) }))
}

// ---- hints ----------------------------------------------------------------------------------------

/// Answers before anything is done: whoever tells is a toolstack's hook, and any number may tell at a time.
async fn notify(State(control): State<Control>, Order(notice): Order<Notice>) -> Json<Noticed> {
    tracing::debug!(?notice, "told to look at xenstore");
    control.relist.ask();
    Json(Noticed {})
}

// ---- events ---------------------------------------------------------------------------------------

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Since {
    #[serde(default)]
    follow: bool,
    since: Option<String>,
}

async fn events(
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

// ---- what requests are made of --------------------------------------------------------------------

/// A request's JSON body, whatever content type it claims; none at all stands for `{}`.
struct Order<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Order<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        // The layer's limit bites on what has arrived; what is announced need not be waited for.
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
        if announced.is_some_and(|length: u64| length > BODY_LIMIT as u64) {
            return Err(body_too_large());
        }
        let body = Bytes::from_request(request, state);
        let body = tokio::time::timeout(BODY_TIME, body)
            .await
            .map_err(|_| {
                let message = format!("the request's body did not arrive within {} s", BODY_TIME.as_secs());
                ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
            })?
            .map_err(|error| match error.status() {
                StatusCode::PAYLOAD_TOO_LARGE => body_too_large(),
                _ => ApiError::bad_request(error.body_text()),
            })?;
        let body = if body.is_empty() { b"{}" } else { &body[..] };
        serde_json::from_slice(body)
            .map(Self)
            .map_err(|error| ApiError::bad_request(format!("the request's body: {error}")))
    }
}

fn body_too_large() -> ApiError {
    let message = format!("the request's body is longer than {BODY_LIMIT} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

fn service_of(path: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    path.map(|Path(service)| service).map_err(|error| ApiError::bad_request(error.body_text()))
}

async fn no_such_path(request: Request) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no_such_path",
        format!("{} is no path of dom0d's control API; start at /v1/status", request.uri().path()),
    )
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "wrong_method",
        format!(
            "{} can't be used on {}: questions are GET, orders are POST",
            request.method(),
            request.uri().path()
        ),
    )
}

#[cfg(test)]
mod tests;
