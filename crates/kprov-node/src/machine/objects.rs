//! This machine's Machine object and the cluster's Releases, read and written with kubelet's identity.
//!
//! Both kinds come with the operator, and so do the rights to them: that they are not there yet is nothing to complain of.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use kprov_types::MachineName;
use kprov_types::api::{GROUP, MachineSpec, MachineStatus, ReleaseSpec, ReleaseStatus, VERSION};
use kube::api::{ApiResource, GroupVersionKind, Object};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::report::Report;
use crate::api::{self, ApiError, Identity};

/// How long to wait before asking again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How long a client is used until it is made anew with the certificate that is on disk then.
const CLIENT_LIFE: Duration = Duration::from_hours(1);
/// Changes of the status are collected for so long.
const COLLECT: Duration = Duration::from_millis(50);
/// How long one request may take.
const LIMIT: Duration = Duration::from_secs(10);

type MachineObject = Object<MachineSpec, MachineStatus>;
type ReleaseObject = Object<ReleaseSpec, ReleaseStatus>;

/// Why an object cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ObjectError {
    /// No client.
    #[error(transparent)]
    Client(#[from] ApiError),
    /// The API.
    #[error("the Release `{name}` cannot be read")]
    Read {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// No answer.
    #[error("the API does not answer for the Release `{0}`")]
    TimedOut(String),
}

fn resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, kind), plural)
}

fn machines(client: Client) -> Api<MachineObject> {
    Api::all_with(client, &resource("Machine", "machines"))
}

fn releases(client: Client) -> Api<ReleaseObject> {
    Api::all_with(client, &resource("Release", "releases"))
}

/// A Release by its name, if there is one.
pub(super) async fn release(name: &str) -> Result<Option<ReleaseSpec>, ObjectError> {
    let releases = releases(api::client(Identity::Kubelet).await?);
    match tokio::time::timeout(LIMIT, releases.get_opt(name)).await {
        Ok(Ok(found)) => Ok(found.map(|object| object.spec)),
        Ok(Err(source)) => Err(ObjectError::Read {
            name: name.to_owned(),
            source: Box::new(source),
        }),
        Err(_) => Err(ObjectError::TimedOut(name.to_owned())),
    }
}

/// What the API has of this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Its orders.
    pub spec: Arc<MachineSpec>,
    /// What it has told.
    pub status: Option<Arc<MachineStatus>>,
}

/// Keeps `into` as the API has this machine's object, for as long as the process runs; while the API is away what is known
/// stays.
pub(super) async fn watch_machine(name: MachineName, into: watch::Sender<Option<Seen>>) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    follow(machines, config, |event| {
        let seen = match event {
            watcher::Event::Apply(object) | watcher::Event::InitApply(object) if object.name_any() == name.as_str() => {
                Some(Seen {
                    spec: Arc::new(object.spec),
                    status: object.status.map(Arc::new),
                })
            }
            watcher::Event::Delete(_) => None,
            _ => return,
        };
        into.send_if_modified(|known| {
            let changed = *known != seen;
            *known = seen;
            changed
        });
    })
    .await;
}

/// Keeps `into` as the API has the Releases' specs, for as long as the process runs; `None` until they were listed once.
pub(super) async fn watch_releases(into: watch::Sender<Option<Vec<ReleaseSpec>>>) {
    let mut all = std::collections::BTreeMap::new();
    let mut listing = std::collections::BTreeMap::new();
    follow(releases, watcher::Config::default(), |event| {
        match event {
            watcher::Event::Init => {
                listing.clear();
                return;
            }
            watcher::Event::InitApply(object) => {
                listing.insert(object.name_any(), object.spec);
                return;
            }
            watcher::Event::InitDone => all = std::mem::take(&mut listing),
            watcher::Event::Apply(object) => drop(all.insert(object.name_any(), object.spec)),
            watcher::Event::Delete(object) => drop(all.remove(&object.name_any())),
        }
        into.send_replace(Some(all.values().cloned().collect()));
    })
    .await;
}

/// Watches for as long as the process runs, with a new client now and then, and after each failure.
async fn follow<K>(api: fn(Client) -> Api<K>, config: watcher::Config, mut each: impl FnMut(watcher::Event<K>))
where
    K: kube::Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let mut pause = PAUSE.0;
    let mut told = String::new();
    loop {
        match api::client(Identity::Kubelet).await {
            Ok(client) => {
                let until = Instant::now() + CLIENT_LIFE;
                let mut stream = std::pin::pin!(watcher(api(client), config.clone()));
                loop {
                    match tokio::time::timeout_at(until, stream.try_next()).await {
                        Ok(Ok(Some(event))) => {
                            pause = PAUSE.0;
                            each(event);
                        }
                        Ok(Err(error)) => {
                            let text = crate::chain(&error);
                            if is_early(&error) || is_expired(&error) {
                                tracing::debug!(error = text, "watching orders");
                            } else if told != text {
                                tracing::info!(error = text, "watching orders");
                                told = text;
                            }
                            break;
                        }
                        Ok(Ok(None)) | Err(_) => break,
                    }
                }
            }
            Err(error) => tracing::debug!(error = crate::chain(&error), "orders cannot be watched yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// The watch lasted longer than the API server remembers: it begins anew.
fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchError(status) if status.code == 410)
}

/// The kind, or the right to it, is not there yet.
fn is_early(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(source)
    | watcher::Error::WatchStartFailed(source)
    | watcher::Error::WatchFailed(source)) = error
    else {
        return false;
    };
    matches!(source, kube::Error::Api(status) if status.is_not_found() || status.is_forbidden())
}

/// Writes the status to this machine's object whenever it is another than what is there, for as long as the process runs. `seen`
/// is the object as [`watch_machine`] keeps it: without it, there is nothing to write to.
pub(super) async fn write_status(name: MachineName, mut seen: watch::Receiver<Option<Seen>>, report: Report) {
    report.completed().await;
    let mut status = report.watch();
    let mut client: Option<(Instant, Client)> = None;
    let mut pause = PAUSE.0;
    let mut written: Option<MachineStatus> = None;
    loop {
        let now = status.borrow_and_update().clone();
        let there = seen.borrow_and_update().clone();
        // What was written may come back later than the next change.
        let differs = there.is_some_and(|there| {
            there.status.as_deref() != Some(&now) && (written.as_ref() != Some(&now) || there.status.is_none())
        });
        if differs {
            let fresh = client.take().filter(|(made, _)| made.elapsed() < CLIENT_LIFE);
            let result = match fresh {
                Some((made, known)) => Ok((made, known)),
                None => api::client(Identity::Kubelet).await.map(|new| (Instant::now(), new)),
            };
            match result {
                Ok((made, known)) => match write(&known, &name, &now).await {
                    Ok(()) => {
                        (written, pause) = (Some(now), PAUSE.0);
                        client = Some((made, known));
                    }
                    Err(error) => {
                        tracing::debug!(error, "the machine's status cannot be written yet");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(PAUSE.1);
                        continue;
                    }
                },
                Err(error) => {
                    tracing::debug!(error = crate::chain(&error), "no client for the machine's status");
                    tokio::time::sleep(pause).await;
                    continue;
                }
            }
        }
        let changed = tokio::select! {
            changed = seen.changed() => changed,
            changed = status.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        tokio::time::sleep(COLLECT).await;
    }
}

/// Replaces the whole status: there is no other writer.
async fn write(client: &Client, name: &MachineName, status: &MachineStatus) -> Result<(), String> {
    let patch = json!([{ "op": "add", "path": "/status", "value": status }]);
    let request = http::Request::patch(format!("/apis/{GROUP}/{VERSION}/machines/{name}/status"))
        .header(http::header::CONTENT_TYPE, "application/json-patch+json")
        .body(patch.to_string().into_bytes())
        .map_err(|e| e.to_string())?;
    match tokio::time::timeout(LIMIT, client.request::<serde_json::Value>(request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(crate::chain(&error)),
        Err(_) => Err("no answer in time".into()),
    }
}
