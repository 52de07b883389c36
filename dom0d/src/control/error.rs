//! The answer to a refused or failed request: a status, a stable code, and what to do.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use understudy_api::{Failure, Refusal};
use understudy_protocol::OperatorError;

use crate::command::CommandError;

/// An answer other than success.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, code, message }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }
}

impl From<CommandError> for ApiError {
    fn from(error: CommandError) -> Self {
        let status = match &error {
            CommandError::UnknownService { .. } | CommandError::UnknownDomain { .. } => StatusCode::NOT_FOUND,
            CommandError::Invalid(_) | CommandError::NoStatement { .. } => StatusCode::BAD_REQUEST,
            CommandError::Unusable { .. } | CommandError::Refused { .. } => StatusCode::CONFLICT,
            CommandError::Hypervisor { .. } => StatusCode::BAD_GATEWAY,
            CommandError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        let remedy = match &error {
            CommandError::Refused { error, .. } => remedy(error),
            _ => "",
        };
        Self::new(status, error.code(), format!("{error}{remedy}"))
    }
}

/// What to do about a refusal of the engine, where its own words don't say.
fn remedy(error: &OperatorError) -> &'static str {
    match error {
        OperatorError::UnknownServer => "; `understudy status` shows who is",
        OperatorError::AlreadyAttached => "; detach it first if its state was set anew",
        OperatorError::QueueFull(_) => "; detach another one first",
        OperatorError::DrainUnderWay => "; wait for its end (`understudy events --follow`)",
        OperatorError::IsOvm => "; to take it out, move the service first (`understudy switchover`)",
        OperatorError::NothingLeft => "; attach another server first (`understudy attach`)",
        OperatorError::NotPromotable => {
            "; `understudy status` says why. `understudy failover --force` promotes a server all the same and resets what can't go on there"
        }
        _ => "",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = Refusal { code: self.code.to_owned(), message: self.message };
        (self.status, Json(Failure { error })).into_response()
    }
}
