//! One health check: `GET /readyz` over HTTPS, on a connection that is kept between checks.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::health::{Outcome, TIMEOUT};
use crate::socket;

/// A failing `/readyz` lists its checks; more than this is not read.
const BODY_LIMIT: usize = 64 * 1024;

/// Checks one backend.
pub(crate) struct Checker {
    address: SocketAddr,
    server_name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    kept: Option<SendRequest<Empty<Bytes>>>,
}

impl Checker {
    pub(crate) fn new(address: SocketAddr, server_name: ServerName<'static>, tls: Arc<ClientConfig>) -> Self {
        Self {
            address,
            server_name,
            tls,
            kept: None,
        }
    }

    /// Checks once. With `fresh`, on a new connection in any case: a kept one says nothing about whether new ones are
    /// accepted.
    pub(crate) async fn check(&mut self, fresh: bool) -> Outcome {
        if fresh {
            self.kept = None;
        }
        let Ok(outcome) = timeout(TIMEOUT, self.check_on_any()).await else {
            self.kept = None;
            return Outcome::TimedOut;
        };
        outcome.unwrap_or_else(|error| broken(&error))
    }

    /// A kept connection can only say yes. It may have been closed since by a server that restarted, or, where the backend
    /// is another front, lead to an API server that shuts down while new connections go to its successor: then only a fresh
    /// one tells.
    async fn check_on_any(&mut self) -> io::Result<Outcome> {
        if let Some(kept) = self.kept.take()
            && let Ok(Outcome::Ready) = self.request(kept).await
        {
            return Ok(Outcome::Ready);
        }
        self.kept = None;
        let stream = match socket::connect(self.address).await {
            Ok(stream) => stream,
            Err(error) => return Ok(unconnected(&error)),
        };
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let stream = connector.connect(self.server_name.clone(), stream).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // Ends when the sender is dropped; its errors come back through the sender too.
        tokio::spawn(connection);
        self.request(sender).await
    }

    async fn request(&mut self, mut sender: SendRequest<Empty<Bytes>>) -> io::Result<Outcome> {
        let request = Request::get("/readyz")
            .header(HOST, self.server_name.to_str().as_ref())
            .body(Empty::new())
            .map_err(io::Error::other)?;
        sender.ready().await.map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status();
        let body = match Limited::new(response.into_body(), BODY_LIMIT).collect().await {
            Ok(body) => {
                self.kept = Some(sender);
                body.to_bytes()
            }
            Err(_) => Bytes::new(),
        };
        Ok(Outcome::of_answer(status.as_u16(), &body))
    }
}

/// What it means that there is no connection.
fn unconnected(error: &io::Error) -> Outcome {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Outcome::Refused,
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            Outcome::Unreachable
        }
        _ => broken(error),
    }
}

/// What it means that a connection has failed.
fn broken(error: &io::Error) -> Outcome {
    if socket::is_exhaustion(error) {
        Outcome::Inconclusive
    } else {
        Outcome::Broken
    }
}
