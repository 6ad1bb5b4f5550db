//! What the operator answers for itself: `/healthz`, `/readyz` and `/metrics`, over plain HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// The longest that the loop may take for one turn. Preflight alone may take two minutes.
pub const LONGEST_TURN: Duration = Duration::from_mins(5);

/// How the operator is.
#[derive(Clone, Debug)]
pub struct Health(Arc<watch::Sender<Signs>>);

#[derive(Clone, Copy, Debug)]
struct Signs {
    turn: Instant,
    ready: bool,
}

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Signs {
            turn: Instant::now(),
            ready: false,
        })))
    }
}

impl Health {
    /// The loop begins another turn.
    pub fn turn(&self) {
        self.0.send_modify(|signs| signs.turn = Instant::now());
    }

    /// The operator has read the cluster, and so can lead.
    pub fn ready(&self) {
        self.0.send_modify(|signs| signs.ready = true);
    }

    /// Whether the loop goes round.
    pub fn is_alive(&self) -> bool {
        self.0.borrow().turn.elapsed() < LONGEST_TURN
    }

    /// Whether it can do its work as soon as it leads.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().ready
    }
}

/// The answers.
pub fn router(health: Health, metrics: Arc<Metrics>) -> Router {
    let alive = health.clone();
    Router::new()
        .route(
            "/healthz",
            get(async move || answer(alive.is_alive(), "the loop stands still")),
        )
        .route(
            "/readyz",
            get(async move || answer(health.is_ready(), "the API has not been read yet")),
        )
        .route("/metrics", get(render))
        .with_state(metrics)
}

fn answer(good: bool, why: &'static str) -> (StatusCode, &'static str) {
    if good {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, why)
    }
}

async fn render(State(metrics): State<Arc<Metrics>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], metrics.render()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_stands_still_is_told() {
        let health = Health::default();
        assert!(health.is_alive() && !health.is_ready());
        health.ready();
        tokio::time::advance(LONGEST_TURN).await;
        assert!(!health.is_alive() && health.is_ready());
        health.turn();
        assert!(health.is_alive());
    }
}
