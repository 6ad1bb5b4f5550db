//! The proxy: one call in, one call to moto, and what has to be put right on the way.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::faults::{self, Effect, Faults};
use super::rules::{self, Tokens};
use super::xml::Element;
use crate::record::Record;

type Chooser = Box<dyn Fn(&str) -> Option<String> + Send>;

/// Load balancers' DNS names as answers have them. Clones share their state.
#[derive(Clone, Default)]
pub struct DnsNames(Arc<Mutex<Option<Chooser>>>);

/// Whether instances' public addresses read as their private ones. Clones share their state.
#[derive(Clone, Debug, Default)]
pub(super) struct PublicIsPrivate(Arc<AtomicBool>);

impl PublicIsPrivate {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Rewrites the answer to a call about instances.
    fn rewrite(reply: &mut Element) {
        reply.each(&mut |element| {
            let Some(private) = element.child_text("privateIpAddress").map(ToOwned::to_owned) else {
                return;
            };
            for child in element.children.iter_mut().filter(|c| c.name() == "ipAddress") {
                child.text.clone_from(&private);
            }
        });
    }
}

impl fmt::Debug for DnsNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DnsNames")
    }
}

impl DnsNames {
    /// From now on `choose` gives the `DNSName` of a load balancer by its name; `None` leaves it as it is.
    pub fn choose(&self, choose: impl Fn(&str) -> Option<String> + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(choose));
    }

    fn rewrite(&self, reply: &mut Element) {
        let chooser = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(choose) = chooser.as_ref() else { return };
        reply.each(&mut |element| {
            let Some(name) = element.child_text("LoadBalancerName").and_then(choose) else {
                return;
            };
            for child in element.children.iter_mut().filter(|c| c.name() == "DNSName") {
                child.text.clone_from(&name);
            }
        });
    }

    fn any(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// The connection is to break without a reply.
#[derive(Debug)]
struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the connection breaks here")
    }
}

impl std::error::Error for Broken {}

/// One call of a Query API.
pub(super) struct Call {
    pub(super) action: String,
    /// The form, in order.
    pub(super) form: Vec<(String, String)>,
    headers: HeaderMap,
}

impl Call {
    /// A field of the form.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.form.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Whether it only looks.
    pub(super) fn reads(&self) -> bool {
        faults::is_read(&self.action)
    }

    /// All fields whose names begin so, such as `Targets.member.`.
    pub(super) fn fields<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a (String, String)> + 'a {
        self.form.iter().filter(move |(n, _)| n.starts_with(prefix))
    }
}

/// What moto answered.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: String,
}

impl Reply {
    /// An error as EC2 answers it.
    pub(super) fn error(status: u16, code: &str, message: &str) -> Self {
        let error = Element::node(
            "Error",
            vec![Element::leaf("Code", code), Element::leaf("Message", message)],
        );
        let errors = Element::node("Errors", vec![error]);
        let body = Element::node("Response", vec![errors, Element::leaf("RequestID", "kprov")]).document();
        Self {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST),
            body,
        }
    }

    /// An error as the load balancers' API answers it.
    pub(super) fn balancer_error(status: u16, code: &str, message: &str) -> Self {
        let error = Element::node(
            "Error",
            vec![
                Element::leaf("Type", "Sender"),
                Element::leaf("Code", code),
                Element::leaf("Message", message),
            ],
        );
        let body = Element::node("ErrorResponse", vec![error, Element::leaf("RequestId", "kprov")]).document();
        Self {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST),
            body,
        }
    }
}

/// The proxy's state.
pub(super) struct Proxy {
    port: u16,
    record: Record,
    pub(super) faults: Faults,
    names: DnsNames,
    addresses: PublicIsPrivate,
    pub(super) tokens: tokio::sync::Mutex<Tokens>,
    /// Held while something is changed.
    pub(super) changes: tokio::sync::Mutex<()>,
}

impl Proxy {
    pub(super) fn new(port: u16, record: Record, faults: Faults, names: DnsNames, addresses: PublicIsPrivate) -> Self {
        Self {
            port,
            record,
            faults,
            names,
            addresses,
            tokens: tokio::sync::Mutex::default(),
            changes: tokio::sync::Mutex::default(),
        }
    }

    /// Serves until it's stopped.
    pub(super) async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let proxy = Arc::new(self);
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let (proxy, stop) = (Arc::clone(&proxy), stop.clone());
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let proxy = Arc::clone(&proxy);
                    async move { proxy.answer(request).await }
                });
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                // A connection that breaks is what was asked for, or the client's business.
                tokio::select! {
                    () = stop.cancelled() => {}
                    _ = connection => {}
                }
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Broken> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        let form = parse_form(&text);
        let call = Call {
            action: form
                .iter()
                .find(|(n, _)| n == "Action")
                .map_or_else(|| format!("{} {}", head.method, head.uri.path()), |(_, v)| v.clone()),
            form,
            headers: head.headers,
        };
        self.record.count(&call.action);
        let effect = self.faults.decide(&call.action, &text);
        match &effect {
            Some(Effect::LoseRequest) => return Err(Broken),
            Some(Effect::Refuse { status, code, message }) => {
                let balancers = call.field("Version") != Some("2016-11-15");
                let reply = if balancers {
                    Reply::balancer_error(*status, code, message)
                } else {
                    Reply::error(*status, code, message)
                };
                return Ok(response(reply));
            }
            Some(Effect::Delay(time)) => tokio::time::sleep(*time).await,
            Some(Effect::LoseReply | Effect::Jitter { .. }) | None => {}
        }
        let reply = match rules::carry_out(self, call).await {
            Ok(reply) => reply,
            Err(error) => {
                tracing::warn!("moto can't be asked: {error:#}");
                return Err(Broken);
            }
        };
        if effect == Some(Effect::LoseReply) {
            return Err(Broken);
        }
        Ok(response(reply))
    }

    /// Sends a call to moto as it is, and changes in the reply what switches ask for.
    pub(super) async fn forward(&self, call: &Call) -> Result<Reply> {
        let mut form = call.form.clone();
        if let Some(size) = self.faults.page()
            && let Some((_, value)) = form.iter_mut().find(|(n, _)| n == "MaxResults" || n == "PageSize")
        {
            *value = size.to_string();
        }
        // moto starts as few as it may.
        if call.action == "RunInstances"
            && let Some(most) = call.field("MaxCount")
            && let Some((_, least)) = form.iter_mut().find(|(n, _)| n == "MinCount")
        {
            most.clone_into(least);
        }
        let mut reply = self.send(&call.headers, &form).await?;
        let stuck = self.faults.stuck();
        let hiding = call.action.starts_with("Describe") && self.faults.any_hidden();
        let naming = call.action.ends_with("LoadBalancer") || call.action.ends_with("LoadBalancers");
        let pending = call.action == "DescribeInstances" && !stuck.is_empty();
        let public = self.addresses.0.load(Ordering::Relaxed)
            && matches!(call.action.as_str(), "RunInstances" | "DescribeInstances");
        if reply.status.is_success()
            && (public || hiding || pending || (naming && self.names.any()))
            && let Some(mut root) = Element::parse(&reply.body)
        {
            if hiding {
                rules::hide(&call.action, &mut root, &self.faults);
            }
            if pending {
                rules::keep_pending(&mut root, &stuck);
            }
            self.names.rewrite(&mut root);
            if public {
                PublicIsPrivate::rewrite(&mut root);
            }
            reply.body = root.document();
        }
        Ok(reply)
    }

    /// Asks moto something of our own, in the name of whoever made `call`.
    pub(super) async fn ask(&self, call: &Call, action: &str, fields: &[(&str, &str)]) -> Result<Element> {
        let balancers = action.contains("LoadBalancer") || action.contains("Target") || action.contains("Listener");
        let (service, version) = if balancers {
            ("elasticloadbalancing", "2015-12-01")
        } else {
            ("ec2", "2016-11-15")
        };
        let mut headers = call.headers.clone();
        if let Some(value) = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()) {
            let other = value
                .replace("/elasticloadbalancing/", &format!("/{service}/"))
                .replace("/ec2/", &format!("/{service}/"));
            headers.insert(AUTHORIZATION, other.parse()?);
        }
        let mut form = vec![
            ("Action".to_owned(), action.to_owned()),
            ("Version".to_owned(), version.to_owned()),
        ];
        form.extend(fields.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())));
        let reply = self.send(&headers, &form).await?;
        Element::parse(&reply.body).context("moto's answer is no XML")
    }

    async fn send(&self, headers: &HeaderMap, form: &[(String, String)]) -> Result<Reply> {
        post(self.port, headers, form).await
    }
}

/// Sends a form to a port of loopback.
pub(super) async fn post(port: u16, headers: &HeaderMap, form: &[(String, String)]) -> Result<Reply> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut request = Request::post("/").body(Full::new(Bytes::from(encode_form(form))))?;
    *request.headers_mut() = headers.clone();
    for name in [CONTENT_LENGTH, TRANSFER_ENCODING, HOST] {
        request.headers_mut().remove(name);
    }
    request.headers_mut().insert(HOST, format!("127.0.0.1:{port}").parse()?);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok(Reply {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

fn response(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(reply.body)));
    *response.status_mut() = reply.status;
    let xml = http::HeaderValue::from_static("text/xml;charset=UTF-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, xml);
    response
}

/// The fields of an `application/x-www-form-urlencoded` body.
fn parse_form(text: &str) -> Vec<(String, String)> {
    let decode = |s: &str| {
        let mut bytes = Vec::with_capacity(s.len());
        let mut rest = s.as_bytes();
        while let [first, tail @ ..] = rest {
            let hex = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
            match (first, tail) {
                (b'%', [a, b, ..]) if hex(&[*a, *b]).is_some() => {
                    bytes.extend(hex(&[*a, *b]));
                    rest = &tail[2..];
                }
                (b'+', _) => {
                    bytes.push(b' ');
                    rest = tail;
                }
                (other, _) => {
                    bytes.push(*other);
                    rest = tail;
                }
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    text.split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn encode_form(form: &[(String, String)]) -> String {
    let encode = |s: &str| -> String {
        s.bytes()
            .map(|b| match b {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
                other => format!("%{other:02X}"),
            })
            .collect()
    };
    let pairs: Vec<String> = form
        .iter()
        .map(|(n, v)| format!("{}={}", encode(n), encode(v)))
        .collect();
    pairs.join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_round_trip() {
        let form = vec![
            ("Action".to_owned(), "RunInstances".to_owned()),
            ("UserData".to_owned(), "IyEvYmlu+/=".to_owned()),
            ("Name".to_owned(), "a b&c=ü%".to_owned()),
            ("Empty".to_owned(), String::new()),
        ];
        assert_eq!(parse_form(&encode_form(&form)), form);
        assert_eq!(
            parse_form("a=1+2&b"),
            [("a".into(), "1 2".into()), ("b".into(), String::new())]
        );
    }
}
