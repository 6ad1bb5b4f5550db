//! How requests get to Azure: connections that are kept, no faster than the [`Gate`] lets them, and replies with all that they say.
//!
//! `azure_core` 0.21's own transport opens a connection for each request, and its errors keep neither `Retry-After` nor the
//! details of the error document. Here an unsuccessful reply is carried as it is, inside of the error.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use azure_core::error::ErrorKind;
use azure_core::headers::{HeaderName, HeaderValue, Headers};
use azure_core::{Body, HttpClient, Request, Response, StatusCode};
use serde_json::Value;

use crate::credentials::NoToken;
use crate::error::Failure;
use crate::gate::Gate;
use crate::reply::Reply;

/// How long a reply may take; ARM answers at once, and works later.
const REPLY_LIMIT: Duration = Duration::from_mins(1);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The transport of all requests.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    client: reqwest::Client,
    gate: Arc<Gate>,
}

/// An answer that is an error, inside of the SDK's.
#[derive(Debug, thiserror::Error)]
#[error("HTTP {}", .0.status)]
struct Unsuccessful(Reply);

/// No answer.
#[derive(Debug, thiserror::Error)]
#[error("{}", if *.sent { "no answer came" } else { "no connection could be made" })]
struct NoAnswer {
    sent: bool,
    #[source]
    source: reqwest::Error,
}

impl Transport {
    pub(crate) fn new() -> Result<Self, reqwest::Error> {
        // Without it, a client that speaks TLS can't be made; another part of the process may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("kprov/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_LIMIT)
            .timeout(REPLY_LIMIT)
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self {
            client,
            gate: Arc::new(Gate::new()),
        })
    }

    /// The text at a URL that carries its own right to be read, such as a log's.
    pub(crate) async fn text(&self, url: &str) -> Result<String, reqwest::Error> {
        self.client.get(url).send().await?.error_for_status()?.text().await
    }

    async fn exchange(&self, request: &Request) -> azure_core::Result<Reply> {
        let body = match request.body() {
            Body::Bytes(bytes) => bytes.clone(),
            Body::SeekableStream(_) => {
                return Err(azure_core::Error::message(
                    ErrorKind::Other,
                    "bodies are never streams here",
                ));
            }
        };
        let method = reqwest::Method::from_bytes(request.method().as_ref().as_bytes())
            .map_err(|e| azure_core::Error::new(ErrorKind::Other, e))?;
        let mut builder = self.client.request(method, request.url().clone()).body(body);
        for (name, value) in request.headers().iter() {
            builder = builder.header(name.as_str(), value.as_str());
        }
        let lost = |source: reqwest::Error| {
            let sent = !(source.is_connect() || source.is_builder());
            azure_core::Error::new(ErrorKind::Io, NoAnswer { sent, source })
        };
        let pass = self.gate.enter().await;
        let pass = pass.map_err(|e| azure_core::Error::new(ErrorKind::Other, e))?;
        let response = builder.send().await.map_err(lost)?;
        let status = response.status().as_u16();
        let headers = response.headers().iter();
        let headers: BTreeMap<String, String> = headers
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned())))
            .collect();
        let bytes = response.bytes().await.map_err(lost)?;
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        tracing::debug!(status, method = request.method().as_ref(), url = %request.url(), "azure");
        let reply = Reply { status, headers, body };
        pass.answered(&reply);
        Ok(reply)
    }
}

#[async_trait]
impl HttpClient for Transport {
    async fn execute_request(&self, request: &Request) -> azure_core::Result<Response> {
        let reply = self.exchange(request).await?;
        let status = StatusCode::try_from(reply.status).ok().filter(|_| reply.is_success());
        let Some(status) = status else {
            return Err(azure_core::Error::new(ErrorKind::Other, Unsuccessful(reply)));
        };
        let headers: HashMap<HeaderName, HeaderValue> = reply
            .headers
            .into_iter()
            .map(|(name, value)| (HeaderName::from(name), HeaderValue::from(value)))
            .collect();
        let body = match reply.body {
            Value::Null => Vec::new(),
            body => serde_json::to_vec(&body)?,
        };
        let body = futures::stream::once(futures::future::ready(Ok(body.into())));
        Ok(Response::new(status, Headers::from(headers), Box::pin(body)))
    }
}

/// The reply, whatever its status, from what the SDK makes of it.
pub(crate) async fn reply(sent: azure_core::Result<Response>) -> Result<Reply, Failure> {
    let response = match sent {
        Ok(response) => response,
        Err(error) => return unsuccessful(error),
    };
    let (status, headers, body) = response.deconstruct();
    let bytes = body.collect().await.map_err(|e| Failure::Lost(e.into()))?;
    let headers = headers.iter();
    Ok(Reply {
        status: status.into(),
        headers: headers
            .map(|(n, v)| (n.as_str().to_owned(), v.as_str().to_owned()))
            .collect(),
        body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    })
}

fn unsuccessful(error: azure_core::Error) -> Result<Reply, Failure> {
    let error = match error.into_downcast::<Unsuccessful>() {
        Ok(Unsuccessful(reply)) => return Ok(reply),
        Err(error) => error,
    };
    let error = match error.into_downcast::<NoAnswer>() {
        Ok(gone) if gone.sent => return Err(Failure::Lost(gone.into())),
        Ok(gone) => return Err(Failure::Unsent(gone.into())),
        Err(error) => error,
    };
    Err(match error.into_downcast::<NoToken>() {
        Ok(none) => Failure::NoCredential(none.into()),
        Err(error) => Failure::Unsent(error.into()),
    })
}
