//! The HTTP side: reads a request, lets go wrong what a test wants to go wrong, answers as ARM does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::faults::{Faults, What};
use super::handle::Call;
use super::operations::Twist;
use super::refusal::Refusal;
use super::route::{Route, route};
use super::store::{Store, guid};
use super::token::{Tokens, expired, wrong_tenant};
use crate::record::Record;

/// How often operations are looked at when nobody asks.
const TICK: Duration = Duration::from_millis(20);

/// An answer.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Option<Bytes>,
}

impl Reply {
    pub(super) fn with(status: u16, body: &Value) -> Self {
        Self {
            status,
            headers: vec![("Content-Type".to_owned(), "application/json; charset=utf-8".to_owned())],
            body: Some(Bytes::from(body.to_string())),
        }
    }

    pub(super) fn empty(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: None,
        }
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn headers(mut self, headers: Vec<(String, String)>) -> Self {
        self.headers.extend(headers);
        self
    }
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        let mut reply = Self::with(refusal.status, &json!({"error": refusal.error()}));
        if let Some(seconds) = refusal.retry_after {
            reply = reply.header("Retry-After", &seconds.to_string());
        }
        if refusal.status == 401 {
            reply = reply.header(
                "WWW-Authenticate",
                &format!("Bearer authorization_uri=\"https://login.windows.net/\", error=\"invalid_token\", error_description=\"{}\"", refusal.code),
            );
        }
        reply
    }
}

/// A request with a body, as it came.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The call's name: `PUT virtualMachines`.
    pub call: String,
    /// The path.
    pub path: String,
    /// The api-version.
    pub api_version: Option<String>,
    /// The body.
    pub body: Value,
}

/// Requests that may still be made, refilled over time.
#[derive(Debug)]
pub(super) struct Bucket {
    left: f64,
    at: Instant,
}

/// A role that is missing: an action, and the scope below which it is.
#[derive(Clone, Debug)]
pub(super) struct Denied {
    pub(super) action: String,
    pub(super) scope: String,
}

/// What the server's tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    tokens: Mutex<Tokens>,
    bodies: Mutex<Vec<Recorded>>,
    denied: Mutex<Vec<Denied>>,
    bucket: Mutex<Bucket>,
    requests: AtomicUsize,
    pub(super) hanging: AtomicUsize,
    record: Record,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(store: Store, tokens: Tokens, record: Record) -> Self {
        let left = store.options.rate.map_or(0.0, |r| r.burst);
        Self {
            store: Mutex::new(store),
            faults: Mutex::default(),
            tokens: Mutex::new(tokens),
            bodies: Mutex::default(),
            denied: Mutex::default(),
            bucket: Mutex::new(Bucket {
                left,
                at: Instant::now(),
            }),
            requests: AtomicUsize::new(0),
            hanging: AtomicUsize::new(0),
            record,
        }
    }

    /// The store, with all operations ended whose time has come.
    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        let mut store = locked(&self.store);
        store.advance();
        store
    }

    pub(super) fn faults(&self) -> MutexGuard<'_, Faults> {
        locked(&self.faults)
    }

    pub(super) fn tokens(&self) -> MutexGuard<'_, Tokens> {
        locked(&self.tokens)
    }

    pub(super) fn bodies(&self) -> MutexGuard<'_, Vec<Recorded>> {
        locked(&self.bodies)
    }

    pub(super) fn denied(&self) -> MutexGuard<'_, Vec<Denied>> {
        locked(&self.denied)
    }

    fn permitted(&self, action: &str, scope: &str) -> Result<(), Refusal> {
        let denied = self.denied();
        let hit = denied.iter().find(|d| {
            d.action.eq_ignore_ascii_case(action)
                && scope.to_ascii_lowercase().starts_with(&d.scope.to_ascii_lowercase())
        });
        hit.map_or(Ok(()), |_| Err(forbidden(action, scope)))
    }

    /// How many requests the bucket has, where there is a limit.
    fn left(&self) -> Option<usize> {
        locked(&self.store).options.rate?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole requests, never less than none"
        )]
        Some(locked(&self.bucket).left.max(0.0) as usize)
    }

    /// Takes one request from the bucket, or says how many seconds to wait.
    fn throttled(&self) -> Option<u32> {
        let rate = locked(&self.store).options.rate?;
        let mut bucket = locked(&self.bucket);
        let now = Instant::now();
        let gained = now.duration_since(bucket.at).as_secs_f64() * rate.per_second;
        bucket.at = now;
        bucket.left = (bucket.left + gained).min(rate.burst);
        if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            return None;
        }
        let wait = ((1.0 - bucket.left) / rate.per_second).ceil();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a wait in whole seconds, at least one"
        )]
        Some((wait as u32).max(1))
    }
}

fn forbidden(action: &str, scope: &str) -> Refusal {
    Refusal::new(
        403,
        "AuthorizationFailed",
        format!(
            "The client 'emulated' with object id '{}' does not have authorization to perform action '{action}' over scope \
             '{scope}' or the scope is invalid. If access was recently granted, please refresh your credentials.",
            guid(3)
        ),
    )
}

fn too_many(seconds: u32) -> Refusal {
    Refusal::new(
        429,
        "TooManyRequests",
        format!(
            "The request is being throttled as the limit has been reached for operation type. Please try again after '{seconds}' \
             seconds."
        ),
    )
    .retry_after(seconds)
}

/// Accepts connections until it's dropped.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut ticks = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(connection(stream, Arc::clone(&shared)));
                }
            }
            _ = ticks.tick() => {
                drop(shared.store());
                while connections.try_join_next().is_some() {}
            }
        }
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { respond(&shared, request).await }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended");
    }
}

/// Ends the connection without an answer.
#[derive(Debug)]
struct Lost;

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the answer is lost on purpose")
    }
}

impl std::error::Error for Lost {}

impl From<Infallible> for Lost {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

async fn respond(shared: &Shared, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Lost> {
    let (parts, body) = request.into_parts();
    let Ok(body) = body.collect().await else {
        return Err(Lost);
    };
    let body = body.to_bytes();
    let query = parameters(parts.uri.query().unwrap_or_default());
    let (route, subscription) = route(parts.uri.path(), query.get("monitor").is_some_and(|m| m == "true"));
    let name = route.name(&parts.method);
    shared.record.count(&name);
    let call = Call {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        route,
        query,
        headers: parts.headers,
        body: serde_json::from_slice(&body).ok(),
    };
    if let Some(body) = &call.body
        && matches!(call.method, Method::PUT | Method::PATCH)
    {
        shared.bodies().push(Recorded {
            call: name.clone(),
            path: call.path.clone(),
            api_version: call.parameter("api-version").map(str::to_owned),
            body: body.clone(),
        });
    }
    if let Some(reply) = without_token(shared, &call, &body) {
        return Ok(finished(shared, &call, &name, reply));
    }
    let whats = shared.faults().take(&name, call.route.subject());
    if let Some(what) = before(shared, &call, &whats)? {
        let reply = match what {
            Refused::With(refusal) => Reply::from(refusal),
            Refused::Never => return forever(shared).await,
        };
        return Ok(finished(shared, &call, &name, reply));
    }
    let reply = answered(shared, &call, subscription.as_deref(), &whats).unwrap_or_else(Reply::from);
    for what in &whats {
        match what {
            What::LoseReply => return Err(Lost),
            What::HangAfter => return forever(shared).await,
            _ => {}
        }
    }
    Ok(finished(shared, &call, &name, reply))
}

enum Refused {
    With(Refusal),
    Never,
}

/// What goes wrong before anything is done.
fn before(shared: &Shared, call: &Call, whats: &[What]) -> Result<Option<Refused>, Lost> {
    for what in whats {
        let refusal = match what {
            What::Throttle(seconds) => too_many(*seconds),
            What::Refuse(refusal) => refusal.clone(),
            What::Forbidden => forbidden(&call.route.action(&call.method), &call.path),
            What::ExpiredToken => expired(Timestamp::now()),
            What::WrongTenant => {
                let tenant = shared.store().options.tenant.clone();
                wrong_tenant(&guid(9), &tenant)
            }
            What::LoseRequest => return Err(Lost),
            What::HangBefore => return Ok(Some(Refused::Never)),
            What::LoseReply | What::HangAfter | What::NeverEnds | What::Fail(_) | What::Unlisted(_) => continue,
        };
        return Ok(Some(Refused::With(refusal)));
    }
    Ok(None)
}

fn answered(shared: &Shared, call: &Call, subscription: Option<&str>, whats: &[What]) -> Result<Reply, Refusal> {
    shared.tokens().check(call.header("authorization"))?;
    if let Some(seconds) = shared.throttled() {
        return Err(too_many(seconds));
    }
    let own = shared.store().options.subscription.clone();
    if let Some(subscription) = subscription
        && !subscription.eq_ignore_ascii_case(&own)
    {
        return Err(no_subscription(subscription));
    }
    shared.permitted(&call.route.action(&call.method), &call.path)?;
    check_join(shared, call)?;
    let mut twist = Twist::default();
    for what in whats {
        match what {
            What::NeverEnds => twist.never_ends = true,
            What::Fail(refusal) => twist.failure = Some(refusal.clone()),
            What::Unlisted(time) => twist.hidden = Some(*time),
            _ => {}
        }
    }
    shared.store().answer(call, &twist)
}

/// Whoever refers to a subnet, a security group or a pool needs a permission there as well.
fn check_join(shared: &Shared, call: &Call) -> Result<(), Refusal> {
    let Some(body) = call.body.as_ref().and_then(Value::as_object) else {
        return Ok(());
    };
    for (_, of) in super::store::references(&call.path, body) {
        let action = format!(
            "{}/{}/join/action",
            of.split('/').nth(6).unwrap_or_default(),
            super::strict::type_of(&of)
        );
        if shared.permitted(&action, &of).is_err() {
            return Err(Refusal::new(
                403,
                "LinkedAuthorizationFailed",
                format!(
                    "The client 'emulated' with object id '{}' has permission to perform action '{}' on scope '{}'; however, it does \
                     not have permission to perform action(s) '{action}' on the linked scope(s) '{of}' (respectively) or the linked \
                     scope(s) are invalid.",
                    guid(3),
                    call.route.action(&call.method),
                    call.path
                ),
            ));
        }
    }
    Ok(())
}

fn no_subscription(subscription: &str) -> Refusal {
    let parts: Vec<usize> = subscription.split('-').map(str::len).collect();
    let guid = parts == [8, 4, 4, 4, 12] && subscription.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    if guid {
        return Refusal::new(
            404,
            "SubscriptionNotFound",
            format!("The subscription '{subscription}' could not be found."),
        );
    }
    Refusal::new(
        400,
        "InvalidSubscriptionId",
        format!("The provided subscription identifier '{subscription}' is malformed or invalid."),
    )
}

/// What is answered without a bearer token.
fn without_token(shared: &Shared, call: &Call, body: &Bytes) -> Option<Reply> {
    match &call.route {
        Route::Token(tenant) => {
            let form = parameters(std::str::from_utf8(body).unwrap_or_default());
            Some(shared.tokens().oauth(tenant, &call.method, &form))
        }
        Route::ManagedIdentity => Some(shared.tokens().managed_identity(call.header("x-identity-header"))),
        Route::Console(machine) => {
            let store = shared.store();
            let found = store
                .of_kind("virtualMachines")
                .find(|m| m.properties().get("vmId").and_then(Value::as_str) == Some(machine));
            let text = found.and_then(|m| store.consoles.get(&m.id.to_ascii_lowercase()));
            Some(match text {
                Some(text) => Reply {
                    status: 200,
                    headers: vec![("Content-Type".to_owned(), "text/plain".to_owned())],
                    body: Some(Bytes::from(text.clone())),
                },
                None => Reply::with(
                    404,
                    &json!({"error": {"code": "BlobNotFound", "message": "The specified blob does not exist."}}),
                ),
            })
        }
        _ => None,
    }
}

async fn forever(shared: &Shared) -> Result<Response<Full<Bytes>>, Lost> {
    struct Waiting<'a>(&'a AtomicUsize);
    impl Drop for Waiting<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    shared.hanging.fetch_add(1, Ordering::SeqCst);
    let _waiting = Waiting(&shared.hanging);
    std::future::pending().await
}

fn finished(shared: &Shared, call: &Call, name: &str, reply: Reply) -> Response<Full<Bytes>> {
    let number = shared.requests.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(name, path = call.path, status = reply.status, "answered");
    let mut response = Response::new(Full::new(reply.body.unwrap_or_default()));
    *response.status_mut() =
        http::StatusCode::from_u16(reply.status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let kind = match call.method {
        Method::GET | Method::HEAD => "reads",
        Method::DELETE => "deletes",
        _ => "writes",
    };
    let left = match shared.left() {
        _ if reply.status == 429 => 0,
        Some(left) => left,
        None => 11_999_usize.saturating_sub(number % 11_999),
    };
    set(
        response.headers_mut(),
        &format!("x-ms-ratelimit-remaining-subscription-{kind}"),
        &left.to_string(),
    );
    set(response.headers_mut(), "x-ms-request-id", &guid(number as u64));
    set(
        response.headers_mut(),
        "x-ms-correlation-request-id",
        &guid(number as u64),
    );
    for (name, value) in reply.headers {
        set(response.headers_mut(), &name, &value);
    }
    response
}

fn set(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (
        http::HeaderName::from_bytes(name.as_bytes()),
        http::HeaderValue::from_str(value),
    ) {
        headers.insert(name, value);
    }
}

/// The parameters of a query or a form; names in lower case.
fn parameters(text: &str) -> BTreeMap<String, String> {
    text.split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (unescaped(name).to_ascii_lowercase(), unescaped(value))
        })
        .collect()
}

fn unescaped(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let byte = bytes[index];
        let hex = bytes
            .get(index + 1..index + 3)
            .and_then(|h| std::str::from_utf8(h).ok());
        match (byte, hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(decoded)) => {
                out.push(decoded);
                index += 3;
                continue;
            }
            (b'+', _) => out.push(b' '),
            _ => out.push(byte),
        }
        index += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Text as it can stand in a query.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~$".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
