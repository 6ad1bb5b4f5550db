//! All that is asked of Azure Resource Manager, and all use of the SDK but for its models.
//!
//! Requests go through `azure_core`'s pipeline with [`Transport`] at its end. Their paths and api-versions are those of
//! `azure_mgmt_compute` and `azure_mgmt_network` 0.21, whose models are the bodies. Their own request builders are not used: they
//! follow operations wrongly, can't say `If-None-Match` of a network resource, nor which identity a machine has.

use std::sync::Arc;
use std::time::Duration;

use azure_core::auth::Secret;
use azure_core::headers::AUTHORIZATION;
use azure_core::{ClientOptions, Context, Pipeline, Request, RetryOptions, TransportOptions, Url};
use kprov_provider::ProviderError;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::config::AzureConfig;
use crate::credentials::Tokens;
use crate::error::{ArmError, Cause, Doing, Failure};
use crate::gate;
use crate::kind::Kind;
use crate::poller::{Method, Poll, Poller};
use crate::reply::Reply;
use crate::seen::Seen;
use crate::transport::{self, Transport};

/// The api-version of resource groups and of lists over all types.
const RESOURCES_API: &str = "2021-04-01";
/// The api-version of sizes.
const SIZES_API: &str = "2021-07-01";
/// How long a request goes on being tried while Azure says that there are too many; then whoever asked is told.
const PATIENCE: Duration = Duration::from_mins(2);
/// The longest listing that is believed, in pages.
const PAGES: usize = 1000;

/// What has to be so for a PUT to take effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// There is nothing of this name.
    Absent,
    /// It's still the one that was read.
    Unchanged(String),
    /// Nothing.
    Any,
}

/// Azure Resource Manager, for one subscription.
#[derive(Debug)]
pub(crate) struct Client {
    pipeline: Pipeline,
    transport: Transport,
    tokens: Arc<Tokens>,
    endpoint: Url,
    subscription: String,
    limit: Duration,
}

impl Client {
    pub(crate) fn new(config: &AzureConfig) -> Result<Self, Cause> {
        let transport = Transport::new()?;
        let options =
            ClientOptions::new(TransportOptions::new(Arc::new(transport.clone()))).retry(RetryOptions::none());
        Ok(Self {
            pipeline: Pipeline::new(
                option_env!("CARGO_PKG_NAME"),
                option_env!("CARGO_PKG_VERSION"),
                options,
                Vec::new(),
                Vec::new(),
            ),
            transport,
            tokens: Arc::new(Tokens::new(config)),
            endpoint: Url::parse(&config.endpoint)?,
            subscription: config.subscription.clone(),
            limit: config.operation_limit,
        })
    }

    fn id(&self, group: &str, kind: Kind, name: &str) -> String {
        kind.id(&self.group_id(group), name)
    }

    /// The resource id of a resource group.
    pub(crate) fn group_id(&self, group: &str) -> String {
        format!("/subscriptions/{}/resourceGroups/{group}", self.subscription)
    }

    fn url(&self, path: &str, api: &str, query: &[(&str, &str)]) -> Url {
        let mut url = self.endpoint.clone();
        url.set_path(path);
        url.query_pairs_mut()
            .append_pair("api-version", api)
            .extend_pairs(query);
        url
    }

    /// Sends once, or a second time where the token isn't good any more.
    async fn send(
        &self,
        method: azure_core::Method,
        url: Url,
        condition: &Condition,
        body: Option<&Value>,
    ) -> Result<Reply, Failure> {
        // Whoever answers gets the token: nobody but the resource manager does.
        if url.origin() != self.endpoint.origin() {
            let elsewhere = format!(
                "the answer leads to `{}`, which is not Azure Resource Manager",
                url.origin().ascii_serialization()
            );
            return Err(Failure::Unreadable(elsewhere.into()));
        }
        let mut request = Request::new(url, method);
        request.insert_header("accept", "application/json");
        match condition {
            Condition::Absent => request.insert_header("if-none-match", "*"),
            Condition::Unchanged(etag) => request.insert_header("if-match", etag.clone()),
            Condition::Any => {}
        }
        match body {
            Some(body) => {
                request.insert_header("content-type", "application/json");
                request.set_body(body.to_string());
            }
            None if method == azure_core::Method::Post => request.insert_header("content-length", "0"),
            None => {}
        }
        let token = self.tokens.token().await.map_err(Failure::NoCredential)?;
        let reply = self.exchange(&mut request, &token).await?;
        if !(is_outdated(&reply) && self.tokens.refused(&token).await) {
            return Ok(reply);
        }
        let token = self.tokens.token().await.map_err(Failure::NoCredential)?;
        self.exchange(&mut request, &token).await
    }

    async fn exchange(&self, request: &mut Request, token: &Secret) -> Result<Reply, Failure> {
        request.insert_header(AUTHORIZATION, format!("Bearer {}", token.secret()));
        transport::reply(self.pipeline.send(&Context::default(), request).await).await
    }

    /// Sends until it isn't one request too many: the transport holds all of them back as long as Azure asks to.
    async fn ask(
        &self,
        method: azure_core::Method,
        url: Url,
        condition: &Condition,
        body: Option<&Value>,
    ) -> Result<Reply, Failure> {
        let first = Instant::now();
        loop {
            let reply = self.send(method, url.clone(), condition, body).await?;
            if !gate::is_worth_waiting(&reply, first, PATIENCE) {
                return Ok(reply);
            }
        }
    }

    async fn get(&self, url: Url) -> Result<Value, Failure> {
        let reply = self.ask(azure_core::Method::Get, url, &Condition::Any, None).await?;
        if reply.is_success() {
            Ok(reply.body)
        } else {
            Err(Failure::refused(&reply))
        }
    }

    /// Sends a change and follows it to its end.
    async fn change(
        &self,
        method: Method,
        url: Url,
        condition: &Condition,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let verb = match method {
            Method::Put => azure_core::Method::Put,
            Method::Post => azure_core::Method::Post,
            Method::Delete => azure_core::Method::Delete,
        };
        let first = self.ask(verb, url.clone(), condition, body).await?;
        let started = Instant::now();
        match first.status {
            200..=299 => {}
            404 if method == Method::Delete => return Ok(Value::Null),
            _ => return Err(Failure::refused(&first)),
        }
        let (mut poller, mut poll) = Poller::begin(method, url.as_str(), first, self.limit);
        loop {
            match poll {
                Poll::Done(value) => return Ok(value),
                Poll::Failed(failure) => return Err(failure),
                Poll::Again { url, after } => {
                    tokio::time::sleep(after).await;
                    let url = Url::parse(&url).map_err(|e| Failure::Unreadable(e.into()))?;
                    let reply = match self.send(azure_core::Method::Get, url, &Condition::Any, None).await {
                        Ok(reply) => Some(reply),
                        Err(Failure::Lost(_) | Failure::Unsent(_)) => None,
                        Err(failure) => return Err(failure),
                    };
                    poll = poller.next(reply, started.elapsed());
                }
            }
        }
    }

    /// All pages of a listing.
    async fn pages(&self, first: Url) -> Result<Vec<Value>, Failure> {
        let mut all = Vec::new();
        let mut next = Some(first);
        for _ in 0..PAGES {
            let Some(url) = next else {
                return Ok(all);
            };
            let mut page = self.get(url).await?;
            match page.get_mut("value").map(Value::take) {
                Some(Value::Array(items)) => all.extend(items),
                // A page without items is no listing, and a partial listing is an error.
                _ => return Err(Failure::Unreadable("a page of the listing has no `value`".into())),
            }
            next = match page.get("nextLink").and_then(Value::as_str).filter(|l| !l.is_empty()) {
                Some(link) => Some(Url::parse(link).map_err(|e| Failure::Unreadable(e.into()))?),
                None => None,
            };
        }
        Err(Failure::Unreadable(
            format!("the listing has more than {PAGES} pages").into(),
        ))
    }

    /// All of one kind in a group; nothing where the group isn't there.
    pub(crate) async fn list(&self, group: &str, kind: Kind) -> Result<Vec<Seen>, ProviderError> {
        let (path, api) = kind.path();
        let url = self.url(&format!("{}/providers/{path}", self.group_id(group)), api, &[]);
        match self.pages(url).await {
            Ok(items) => Ok(items.into_iter().map(|v| Seen::new(kind, v)).collect()),
            Err(failure) if failure.is_not_found() && !is_subscription(&failure) => Ok(Vec::new()),
            Err(failure) => Err(kind.listing().failed(failure)),
        }
    }

    /// All of one kind in the subscription.
    pub(crate) async fn list_everywhere(&self, kind: Kind, query: &[(&str, &str)]) -> Result<Vec<Seen>, Failure> {
        let (path, api) = kind.path();
        let url = self.url(
            &format!("/subscriptions/{}/providers/{path}", self.subscription),
            api,
            query,
        );
        let items = self.pages(url).await?;
        Ok(items.into_iter().map(|v| Seen::new(kind, v)).collect())
    }

    /// One machine with its run-time state; `None` where it isn't there.
    pub(crate) async fn machine_state(&self, group: &str, name: &str) -> Result<Option<Seen>, ProviderError> {
        let (_, api) = Kind::Machine.path();
        let url = self.url(
            &self.id(group, Kind::Machine, name),
            api,
            &[("$expand", "instanceView")],
        );
        match self.get(url).await {
            Ok(value) => Ok(Some(Seen::new(Kind::Machine, value))),
            Err(failure) if failure.is_not_found() => Ok(None),
            Err(failure) => Err(Doing::read(Kind::Machine.noun(), name).failed(failure)),
        }
    }

    /// The sizes of machines in a location.
    pub(crate) async fn sizes(&self, location: &str) -> Result<Vec<Value>, ProviderError> {
        let filter = format!("location eq '{location}'");
        let path = format!("/subscriptions/{}/providers/Microsoft.Compute/skus", self.subscription);
        let url = self.url(&path, SIZES_API, &[("$filter", &filter)]);
        let doing = Doing::read("sizes of machines in", location);
        self.pages(url).await.map_err(|f| doing.failed(f))
    }

    /// What carries a tag with this value, of any kind and in any group. Groups themselves are not among them, and Azure doesn't show
    /// their tags here.
    pub(crate) async fn tagged(&self, tag: &str, value: &str) -> Result<Vec<Value>, ProviderError> {
        let filter = format!("tagName eq '{tag}' and tagValue eq '{value}'");
        let path = format!("/subscriptions/{}/resources", self.subscription);
        let url = self.url(&path, RESOURCES_API, &[("$filter", &filter)]);
        let doing = Doing::read("resources of the subscription", &self.subscription);
        self.pages(url).await.map_err(|f| doing.failed(f))
    }

    /// Resource groups that carry a tag.
    pub(crate) async fn tagged_groups(&self, tag: &str) -> Result<Vec<Value>, ProviderError> {
        let filter = format!("tagName eq '{tag}'");
        let path = format!("/subscriptions/{}/resourcegroups", self.subscription);
        let url = self.url(&path, RESOURCES_API, &[("$filter", &filter)]);
        let doing = Doing::read("resource groups of the subscription", &self.subscription);
        self.pages(url).await.map_err(|f| doing.failed(f))
    }

    /// A resource group; `None` where it isn't there.
    pub(crate) async fn group(&self, group: &str) -> Result<Option<Value>, ProviderError> {
        match self.get(self.url(&self.group_id(group), RESOURCES_API, &[])).await {
            Ok(value) => Ok(Some(value)),
            Err(failure) if failure.is_not_found() && !is_subscription(&failure) => Ok(None),
            Err(failure) => Err(Doing::read("resource group", group).failed(failure)),
        }
    }

    /// Everything in a resource group, whoever made it.
    pub(crate) async fn group_contents(&self, group: &str) -> Result<Vec<Value>, ProviderError> {
        let url = self.url(&format!("{}/resources", self.group_id(group)), RESOURCES_API, &[]);
        match self.pages(url).await {
            Err(failure) if failure.is_not_found() => Ok(Vec::new()),
            other => other.map_err(|f| Doing::read("resource group", group).failed(f)),
        }
    }

    /// Makes a resource group.
    pub(crate) async fn put_group(&self, group: &str, location: &str, tags: &Value) -> Result<(), ProviderError> {
        let url = self.url(&self.group_id(group), RESOURCES_API, &[]);
        let body = json!({"location": location, "tags": tags});
        let doing = Doing {
            location: Some(location.to_owned()),
            ..Doing::new("make", "resource group", group)
        };
        let made = self.change(Method::Put, url, &Condition::Any, Some(&body)).await;
        made.map(drop).map_err(|f| doing.failed(f))
    }

    /// Replaces a resource group's tags.
    pub(crate) async fn tag_group(&self, group: &str, tags: &Value) -> Result<(), ProviderError> {
        let url = self.url(&self.group_id(group), RESOURCES_API, &[]);
        let doing = Doing::new("tag", "resource group", group);
        let body = json!({"tags": tags});
        let reply = self
            .ask(azure_core::Method::Patch, url, &Condition::Any, Some(&body))
            .await;
        match reply {
            Ok(reply) if reply.is_success() => Ok(()),
            Ok(reply) => Err(doing.failed(Failure::refused(&reply))),
            Err(failure) => Err(doing.failed(failure)),
        }
    }

    /// Removes a resource group and everything in it.
    pub(crate) async fn delete_group(&self, group: &str) -> Result<(), ProviderError> {
        let url = self.url(&self.group_id(group), RESOURCES_API, &[]);
        let doing = Doing::new("remove", "resource group", group);
        let gone = self.change(Method::Delete, url, &Condition::Any, None).await;
        gone.map(drop).map_err(|f| doing.failed(f))
    }

    /// Makes or changes something; returns it as it is then.
    pub(crate) async fn put(
        &self,
        group: &str,
        kind: Kind,
        name: &str,
        condition: &Condition,
        body: &Value,
    ) -> Result<Seen, Failure> {
        let (_, api) = kind.path();
        let url = self.url(&self.id(group, kind, name), api, &[]);
        let value = self.change(Method::Put, url, condition, Some(body)).await?;
        Ok(Seen::new(kind, value))
    }

    /// Removes something; gone already is success.
    pub(crate) async fn delete(&self, group: &str, kind: Kind, name: &str) -> Result<(), ProviderError> {
        let (_, api) = kind.path();
        let url = self.url(&self.id(group, kind, name), api, &[]);
        let gone = self.change(Method::Delete, url, &Condition::Any, None).await;
        gone.map(drop)
            .map_err(|f| Doing::new("remove", kind.noun(), name).failed(f))
    }

    /// Starts a machine that is stopped.
    pub(crate) async fn start(&self, group: &str, name: &str) -> Result<(), Failure> {
        let (_, api) = Kind::Machine.path();
        let url = self.url(&format!("{}/start", self.id(group, Kind::Machine, name)), api, &[]);
        self.change(Method::Post, url, &Condition::Any, None).await.map(drop)
    }

    /// What a machine has written to its serial console, where Azure keeps it.
    pub(crate) async fn console(&self, group: &str, name: &str) -> Result<Option<String>, ProviderError> {
        let (_, api) = Kind::Machine.path();
        let path = format!("{}/retrieveBootDiagnosticsData", self.id(group, Kind::Machine, name));
        let doing = Doing::read("the console of virtual machine", name);
        let found = self
            .change(Method::Post, self.url(&path, api, &[]), &Condition::Any, None)
            .await;
        let found = match found {
            Ok(value) => value,
            // Not there, or nothing written yet.
            Err(Failure::Refused { status: 404 | 409, .. }) => return Ok(None),
            Err(failure) => return Err(doing.failed(failure)),
        };
        let Some(log) = found.get("serialConsoleLogBlobUri").and_then(Value::as_str) else {
            return Ok(None);
        };
        match self.transport.text(log).await {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.status().is_some_and(|s| s.as_u16() == 404) => Ok(None),
            // The URL is a right to read; an error would show it.
            Err(error) => Err(doing.failed(Failure::Lost(error.without_url().into()))),
        }
    }
}

/// A 401 that another token may help against: this one has expired, or was withdrawn.
fn is_outdated(reply: &Reply) -> bool {
    let code = ["ExpiredAuthenticationToken", "InvalidAuthenticationToken"];
    reply.status == 401 && ArmError::of(&reply.body).is_some_and(|e| code.contains(&e.code.as_str()))
}

/// A 404 that is the subscription's, not the thing's.
fn is_subscription(failure: &Failure) -> bool {
    matches!(failure, Failure::Refused { error, .. } if matches!(error.code.as_str(), "SubscriptionNotFound" | "InvalidSubscriptionId"))
}

#[cfg(test)]
mod spector;
