//! Requests to a controller: classified, and repeated where that can do no harm.

use std::time::Duration;

use reqwest::header::{ETAG, IF_MATCH};
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::time::Instant;

use super::access::Login;
use super::error::BmcError;
use super::model::explanation;

/// How long to wait before asking again what was not answered.
const AGAIN: Duration = Duration::from_secs(1);
/// Answers are some kilobytes; what sends more is no controller.
const LIMIT: usize = 4 << 20;

/// A controller's HTTP side.
#[derive(Clone, Debug)]
pub(super) struct Http {
    pub(super) client: reqwest::Client,
    /// Without a slash at its end.
    pub(super) base: String,
    pub(super) login: Login,
    /// How long a controller may give no answer before it's an error.
    pub(super) patience: Duration,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) value: Value,
    pub(super) etag: Option<String>,
}

impl Http {
    /// Reads a resource, for as long as patience lasts.
    pub(super) async fn get(&self, path: &str) -> Result<Answer, BmcError> {
        let start = Instant::now();
        loop {
            let result = self
                .send(Method::GET, path, None, None, &format!("read `{path}`"))
                .await;
            match result {
                Err(error) if error.is_passing() && start.elapsed() + AGAIN < self.patience => {
                    tracing::debug!(bmc = self.base, path, %error, "asking again");
                    tokio::time::sleep(AGAIN).await;
                }
                Err(BmcError::Silent { bmc, source, .. }) => {
                    return Err(BmcError::Silent {
                        bmc,
                        tried: start.elapsed(),
                        source,
                    });
                }
                other => return other,
            }
        }
    }

    /// Changes something, once: the caller looks what became of it.
    pub(super) async fn change(
        &self,
        method: Method,
        path: &str,
        body: &Value,
        etag: Option<&str>,
        what: &str,
    ) -> Result<(), BmcError> {
        self.send(method, path, Some(body), etag, what).await.map(drop)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        etag: Option<&str>,
        what: &str,
    ) -> Result<Answer, BmcError> {
        let bmc = || self.base.clone();
        let reading = method == Method::GET;
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.base))
            .basic_auth(&self.login.user, Some(&self.login.password))
            .header("OData-Version", "4.0")
            .header("Accept", "application/json");
        if let Some(body) = body {
            request = request.json(body);
        }
        if let Some(etag) = etag {
            request = request.header(IF_MATCH, etag);
        }
        let silent = |source: reqwest::Error| BmcError::Silent {
            bmc: bmc(),
            tried: Duration::ZERO,
            // A URL has no secret in it here, and an error would name it twice.
            source: source.without_url().into(),
        };
        let reply = match request.send().await {
            Ok(reply) => reply,
            Err(error) if is_certificate(&error) => {
                return Err(BmcError::Tls {
                    bmc: bmc(),
                    why: "its certificate is not one that is trusted".into(),
                });
            }
            Err(error) => return Err(silent(error)),
        };
        let status = reply.status();
        let etag = reply
            .headers()
            .get(ETAG)
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned);
        let bytes = reply.bytes().await.map_err(silent)?;
        let text = String::from_utf8_lossy(bytes.get(..LIMIT.min(bytes.len())).unwrap_or_default());
        match status {
            StatusCode::UNAUTHORIZED => Err(BmcError::Unauthorized { bmc: bmc() }),
            StatusCode::FORBIDDEN => Err(BmcError::Forbidden {
                bmc: bmc(),
                what: what.to_owned(),
            }),
            status if !status.is_success() => Err(BmcError::Refused {
                bmc: bmc(),
                what: what.to_owned(),
                status: status.as_u16(),
                why: explanation(&text),
            }),
            _ if !reading => Ok(Answer {
                value: Value::Null,
                etag,
            }),
            _ => {
                let value = serde_json::from_str(&text).map_err(|e| BmcError::NotRedfish {
                    bmc: bmc(),
                    path: path.to_owned(),
                    why: format!("the answer is not JSON ({e})"),
                })?;
                Ok(Answer { value, etag })
            }
        }
    }
}

/// Whether a connection failed for its certificate.
fn is_certificate(error: &reqwest::Error) -> bool {
    let mut next = std::error::Error::source(error);
    while let Some(source) = next {
        if let Some(rustls::Error::InvalidCertificate(_)) = source.downcast_ref::<rustls::Error>() {
            return true;
        }
        // What an I/O error holds is not its source, but its source's source is.
        let held = source
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        next = match held {
            Some(held) => Some(held),
            None => source.source(),
        };
    }
    false
}
