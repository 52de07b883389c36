//! A request's JSON body, within its limits of length and time.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// Longest request body. The longest honest one names two domains.
pub(super) const BODY_LIMIT: usize = 16 << 10;

/// How long a request's body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(2);

/// A request's JSON body, whatever content type it claims; none at all stands for `{}`.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = bytes(request, state).await?;
        let parsed = serde_json::from_slice(&body);
        parsed.map(Self).map_err(|error| ApiError::bad_request(format!("the request's body: {error}")))
    }
}

/// The text of a request's body; `{}` if it has none.
pub(super) async fn bytes<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, ApiError> {
    // The layer's limit bites on what has arrived; what is announced need not be waited for.
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > BODY_LIMIT as u64) {
        return Err(body_too_large());
    }
    let body = tokio::time::timeout(BODY_TIME, Bytes::from_request(request, state))
        .await
        .map_err(|_| {
            let message = format!("the request's body did not arrive within {} s", BODY_TIME.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
        })?
        .map_err(|error| match error.status() {
            StatusCode::PAYLOAD_TOO_LARGE => body_too_large(),
            _ => ApiError::bad_request(error.body_text()),
        })?;
    Ok(if body.is_empty() { Bytes::from_static(b"{}") } else { body })
}

fn body_too_large() -> ApiError {
    let message = format!("the request's body is longer than {BODY_LIMIT} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}
