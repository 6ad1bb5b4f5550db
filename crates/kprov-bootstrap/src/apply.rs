//! Applies manifests by server-side apply, as the field manager [`FIELD_MANAGER`].
//!
//! Two policies, because a cluster outlives the `kprov up` that made it. Objects with [`Policy::Enforce`] (rights, budgets,
//! the join token) are applied with force each time, so `up` repairs them. Objects with [`Policy::Create`] (whatever
//! carries a version, an image or a revision, and what people edit) are applied only where they're missing: an upgrade has
//! rolled them since, and applying what `up` knows would roll the control plane back.
//!
//! Applying again what's there already changes nothing; the API server then keeps the object's resource version.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use kube::api::{Api, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::core::ApiResource;
use kube::discovery::{ApiCapabilities, Scope, pinned_kind};
use kube::{Client, ResourceExt as _};
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout};

use crate::manifests::{Manifest, Policy};

/// The field manager of everything kprov applies.
pub const FIELD_MANAGER: &str = "kprov";

/// One try may take this long; the API server's own limit is a minute.
const TRY: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// An object's kind and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectName {
    /// Its API version.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
    /// Its namespace, unless the cluster has one of them.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

impl ObjectName {
    fn of(object: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let metadata = &object["metadata"];
        Some(Self {
            api_version: text(&object["apiVersion"])?,
            kind: text(&object["kind"])?,
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"])?,
        })
    }

    fn kind(&self) -> GroupVersionKind {
        let (group, version) = self.api_version.split_once('/').unwrap_or(("", &self.api_version));
        GroupVersionKind::gvk(group, version, &self.kind)
    }
}

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was missing.
    Created,
    /// It was different.
    Changed,
    /// It was as wanted.
    Unchanged,
    /// It was there, and isn't `up`'s to change.
    Kept,
}

/// What [`apply`] tells while it works.
#[derive(Debug)]
pub enum Progress<'a> {
    /// An object is done.
    Done(&'a ObjectName, Outcome),
    /// A try failed in a way that may pass; it's tried again.
    Retrying(&'a ObjectName, &'a ApplyFailure),
}

/// Why one try failed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyFailure {
    /// The API server, or the way there, says so.
    #[error("the API server did not take it")]
    Api(#[source] kube::Error),
    /// No answer came.
    #[error("the API server gave no answer within {} s", TRY.as_secs())]
    NoAnswer,
}

/// Why applying stopped.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A manifest without kind or name.
    #[error("a manifest has no kind or no name")]
    Nameless,
    /// The API server refuses an object for good.
    #[error("could not apply `{object}`")]
    Refused {
        /// The object.
        object: ObjectName,
        /// Why.
        #[source]
        source: Box<ApplyFailure>,
    },
    /// The deadline passed while tries failed.
    #[error("could not apply `{object}` in time")]
    Deadline {
        /// The object.
        object: ObjectName,
        /// Why the last try failed.
        #[source]
        source: Box<ApplyFailure>,
    },
}

/// Applies manifests one after the other, in order. Failures that may pass are tried again until `deadline`: an API server
/// that has just started, or is being replaced, must not fail `kprov up`. Returns each object with its outcome.
pub async fn apply(
    client: &Client,
    manifests: &[Manifest],
    deadline: Instant,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Vec<(ObjectName, Outcome)>, ApplyError> {
    let mut applier = Applier {
        client,
        kinds: HashMap::new(),
    };
    let mut done = Vec::with_capacity(manifests.len());
    for manifest in manifests {
        let name = ObjectName::of(&manifest.object).ok_or(ApplyError::Nameless)?;
        let outcome = applier
            .apply_with_retries(&name, manifest, deadline, &mut progress)
            .await?;
        progress(Progress::Done(&name, outcome));
        done.push((name, outcome));
    }
    Ok(done)
}

struct Applier<'a> {
    client: &'a Client,
    /// What discovery has told, once a kind.
    kinds: HashMap<GroupVersionKind, (ApiResource, ApiCapabilities)>,
}

impl Applier<'_> {
    async fn apply_with_retries(
        &mut self,
        name: &ObjectName,
        manifest: &Manifest,
        deadline: Instant,
        progress: &mut impl FnMut(Progress<'_>),
    ) -> Result<Outcome, ApplyError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let failure = match timeout(TRY, self.apply_once(name, manifest)).await {
                Ok(Ok(outcome)) => return Ok(outcome),
                Ok(Err(error)) => ApplyFailure::Api(error),
                Err(_) => ApplyFailure::NoAnswer,
            };
            if !failure.may_pass() {
                return Err(ApplyError::Refused {
                    object: name.clone(),
                    source: Box::new(failure),
                });
            }
            let next = Instant::now() + pause;
            if next > deadline {
                return Err(ApplyError::Deadline {
                    object: name.clone(),
                    source: Box::new(failure),
                });
            }
            progress(Progress::Retrying(name, &failure));
            sleep_until(next).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn apply_once(&mut self, name: &ObjectName, manifest: &Manifest) -> Result<Outcome, kube::Error> {
        let api = self.api(name).await?;
        let before = api
            .get_metadata_opt(&name.name)
            .await?
            .and_then(|object| object.resource_version());
        if before.is_some() && manifest.policy == Policy::Create {
            return Ok(Outcome::Kept);
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let after = api
            .patch(&name.name, &params, &Patch::Apply(&manifest.object))
            .await?
            .resource_version();
        Ok(match before {
            None => Outcome::Created,
            before if before == after => Outcome::Unchanged,
            Some(_) => Outcome::Changed,
        })
    }

    async fn api(&mut self, name: &ObjectName) -> Result<Api<DynamicObject>, kube::Error> {
        let kind = name.kind();
        if !self.kinds.contains_key(&kind) {
            let found = pinned_kind(self.client, &kind).await?;
            self.kinds.insert(kind.clone(), found);
        }
        let (resource, capabilities) = &self.kinds[&kind];
        Ok(match (&capabilities.scope, &name.namespace) {
            (Scope::Namespaced, Some(namespace)) => Api::namespaced_with(self.client.clone(), namespace, resource),
            (Scope::Namespaced, None) => Api::default_namespaced_with(self.client.clone(), resource),
            (Scope::Cluster, _) => Api::all_with(self.client.clone(), resource),
        })
    }
}

impl ApplyFailure {
    /// Whether trying again can help.
    fn may_pass(&self) -> bool {
        let Self::Api(error) = self else { return true };
        match error {
            kube::Error::Api(status) => match status.code {
                // Not found: a namespace or a kind that a starting API server does not serve yet.
                404 | 408 | 409 | 429 | 500.. => true,
                // Admission plugins whose caches are not filled yet answer so.
                403 => status.message.contains("not yet ready"),
                _ => false,
            },
            kube::Error::Service(_)
            | kube::Error::HyperError(_)
            | kube::Error::ReadEvents(_)
            | kube::Error::Discovery(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use serde_json::json;

    use super::*;

    #[test]
    fn names_objects() {
        let object = json!({ "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": { "name": "kube-proxy", "namespace": "kube-system" } });
        let name = ObjectName::of(&object).unwrap();
        assert_eq!(name.to_string(), "DaemonSet kube-system/kube-proxy");
        assert_eq!(name.kind(), GroupVersionKind::gvk("apps", "v1", "DaemonSet"));
        let core = ObjectName {
            api_version: "v1".into(),
            ..name
        };
        assert_eq!(core.kind().group, "");
        assert!(ObjectName::of(&json!({ "kind": "Secret" })).is_none());
    }

    #[test]
    fn tells_what_may_pass() {
        let api = |code: u16, message: &str| {
            ApplyFailure::Api(kube::Error::Api(Box::new(Status::failure(message, "").with_code(code))))
        };
        for passing in [404, 409, 429, 500, 503] {
            assert!(api(passing, "").may_pass(), "{passing}");
        }
        for lasting in [400, 401, 422] {
            assert!(!api(lasting, "").may_pass(), "{lasting}");
        }
        assert!(!api(403, "users may not").may_pass());
        assert!(api(403, "pods is forbidden: not yet ready to handle request").may_pass());
        assert!(ApplyFailure::NoAnswer.may_pass());
    }
}
