//! Requests to the API: each is bounded in time, and each write happens only while this operator leads.

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use kprov_bootstrap::apply::FIELD_MANAGER;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::ApiResource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::Effect;
use super::cache::{Cache, Kind};
use super::resources::Slim;
use crate::cluster::ClusterError;

/// One request may take this long. API servers that are being replaced answer within a second or not at all.
const TRY: Duration = Duration::from_secs(10);

/// How often a change is tried while others write the same object.
const TRIES: usize = 3;

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no such object.
    Missing,
    /// The object is another than the one that was looked at.
    Conflict,
    /// A PodDisruptionBudget is in the way, or the API server has too much to do; in its words.
    TooMany(String),
    /// Anything else.
    Other(ClusterError),
}

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Self {
        Self::Other(error)
    }
}

impl From<Failure> for ClusterError {
    fn from(failure: Failure) -> Self {
        let refused = |why: &str| Self::Refused { why: why.to_owned() };
        match failure {
            Failure::Missing => refused("there is no such object"),
            Failure::Conflict => refused("the object has changed meanwhile"),
            Failure::TooMany(why) => Self::Refused { why },
            Failure::Other(error) => error,
        }
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match status.code {
                404 => Self::Missing,
                409 => Self::Conflict,
                429 => Self::TooMany(status.message),
                400..500 => Self::Other(ClusterError::Refused { why: status.message }),
                _ => Self::Other(ClusterError::Lost(Box::new(kube::Error::Api(status)))),
            },
            other => Self::Other(ClusterError::Lost(Box::new(other))),
        }
    }
}

/// No answer came in time.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {} s", TRY.as_secs())]
struct NoAnswer;

/// A missing object is no failure.
pub(super) fn optional<T>(result: Result<T, Failure>) -> Result<Option<T>, ClusterError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Failure::Missing) => Ok(None),
        Err(failure) => Err(failure.into()),
    }
}

/// Whether the operator leads still.
pub(super) type Permit = Arc<dyn Fn() -> bool + Send + Sync>;

/// The way to the API.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) client: Client,
    permit: Permit,
    cache: Arc<Cache>,
}

impl Access {
    pub(super) fn new(client: Client, permit: Permit, cache: Arc<Cache>) -> Self {
        Self { client, permit, cache }
    }

    /// Whether anything may be written now.
    pub(super) fn may_write(&self) -> bool {
        (self.permit)()
    }

    /// Makes a request that changes nothing.
    pub(super) async fn read<T>(&self, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
        bounded(request).await
    }

    /// Makes a request that changes something, if this operator leads.
    pub(super) async fn write<T>(&self, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
        if !self.may_write() {
            return Err(ClusterError::NotLeading.into());
        }
        bounded(request).await
    }

    /// Makes a change again where the object it's about has changed meanwhile. After some tries the cluster counts as another
    /// than was expected, and where the object is gone at once.
    pub(super) async fn again<F: Future<Output = Result<Effect, Failure>>>(
        &self,
        change: impl Fn() -> F,
    ) -> Result<Effect, ClusterError> {
        for _ in 0..TRIES {
            match change().await {
                Ok(effect) => return Ok(effect),
                Err(Failure::Conflict) => {}
                Err(Failure::Missing) => break,
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(Effect::Stale)
    }

    /// An object as it is now, with all its fields.
    pub(super) async fn get<S, T, F>(
        &self,
        kind: &Kind<S, T, F>,
        name: &str,
    ) -> Result<Option<DynamicObject>, ClusterError> {
        let api: Api<DynamicObject> = kind.api(&self.client);
        optional(self.read(api.get(name)).await)
    }

    /// Makes of an object as it was read (`before`) what `after` has, unless it has changed since. Fields that neither has are
    /// left alone. Nothing is sent where nothing differs.
    pub(super) async fn change<S, T, F>(
        &self,
        kind: &Kind<S, T, F>,
        before: &DynamicObject,
        after: &Value,
        part: Part,
    ) -> Result<(), Failure>
    where
        S: Clone + Debug + Default + DeserializeOwned,
        T: Clone + Debug + Default + DeserializeOwned,
        F: PartialEq,
    {
        let old = serde_json::to_value(before).unwrap_or_default();
        let Some(mut patch) = merge_patch(&old, after) else {
            return Ok(());
        };
        let (Some(name), Some(version)) = (&before.metadata.name, &before.metadata.resource_version) else {
            return Err(Failure::Missing);
        };
        patch["metadata"]["resourceVersion"] = json!(version);
        let params = written_by_us();
        let api: Api<Slim<S, T>> = kind.api(&self.client);
        let patch = Patch::Merge(&patch);
        let written = match part {
            Part::Object => self.write(api.patch(name, &params, &patch)).await?,
            Part::Status => self.write(api.patch_status(name, &params, &patch)).await?,
        };
        self.cache.wrote(kind, &written);
        Ok(())
    }
}

impl Access {
    /// Writes an object's status, whatever it was: it has no other writer.
    pub(super) async fn set_status<S, T, F>(
        &self,
        kind: &Kind<S, T, F>,
        name: &str,
        status: &impl Serialize,
    ) -> Result<(), ClusterError>
    where
        S: Clone + Debug + Default + DeserializeOwned,
        T: Clone + Debug + Default + DeserializeOwned,
        F: PartialEq,
    {
        let api: Api<Slim<S, T>> = kind.api(&self.client);
        let patch = Patch::Merge(json!({ "status": status }));
        let written = optional(self.write(api.patch_status(name, &written_by_us(), &patch)).await)?;
        if let Some(written) = written {
            self.cache.wrote(kind, &written);
        }
        Ok(())
    }

    /// Makes an object as given, whoever else has a say in it (server-side apply).
    pub(super) async fn apply(&self, resource: &ApiResource, object: &Value) -> Result<(), ClusterError> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (name, namespace) = (
            text(&object["metadata"]["name"]),
            text(&object["metadata"]["namespace"]),
        );
        let api: Api<DynamicObject> = if namespace.is_empty() {
            Api::all_with(self.client.clone(), resource)
        } else {
            Api::namespaced_with(self.client.clone(), &namespace, resource)
        };
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.write(api.patch(&name, &params, &Patch::Apply(object))).await?;
        Ok(())
    }
}

fn written_by_us() -> PatchParams {
    PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// What of an object is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All but its status.
    Object,
    /// Its status.
    Status,
}

async fn bounded<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, Failure> {
    match timeout(TRY, request).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ClusterError::Lost(Box::new(NoAnswer)).into()),
    }
}

/// The JSON merge patch (RFC 7386) that makes `after` of `before`; `None` where they are equal. A field of `after` that is
/// null counts as missing, as it does to the API.
pub(super) fn merge_patch(before: &Value, after: &Value) -> Option<Value> {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let mut patch = Map::new();
            for (key, old) in before {
                if after.get(key).is_none_or(Value::is_null) && !old.is_null() {
                    patch.insert(key.clone(), Value::Null);
                }
            }
            for (key, new) in after {
                if new.is_null() {
                    continue;
                }
                match before.get(key) {
                    Some(old) => {
                        if let Some(change) = merge_patch(old, new) {
                            patch.insert(key.clone(), change);
                        }
                    }
                    None => {
                        patch.insert(key.clone(), new.clone());
                    }
                }
            }
            (!patch.is_empty()).then_some(Value::Object(patch))
        }
        (before, after) => (before != after).then(|| after.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7386, section 2.
    fn apply(target: &mut Value, patch: &Value) {
        let Value::Object(patch) = patch else {
            *target = patch.clone();
            return;
        };
        if !target.is_object() {
            *target = json!({});
        }
        for (key, value) in patch {
            if value.is_null() {
                target.as_object_mut().unwrap().remove(key);
            } else {
                apply(&mut target[key], value);
            }
        }
    }

    #[test]
    fn patches_make_one_of_the_other() {
        let values = [
            json!({}),
            json!({ "a": 1 }),
            json!({ "a": { "b": [1, 2], "c": "x" } }),
            json!({ "a": { "b": [1], "d": { "e": 2 } }, "f": true }),
            json!({ "a": [{ "name": "x" }] }),
        ];
        for before in &values {
            for after in &values {
                let patch = merge_patch(before, after);
                assert_eq!(patch.is_none(), before == after, "{before} {after}");
                let mut made = before.clone();
                apply(&mut made, &patch.unwrap_or_else(|| json!({})));
                assert_eq!(&made, after, "{before}");
            }
        }
        assert_eq!(merge_patch(&json!({}), &json!({ "a": null })), None);
        assert_eq!(merge_patch(&json!({ "a": null }), &json!({})), None);
    }

    #[test]
    fn answers_are_told_apart() {
        let api = |code: u16| {
            let status = kube::core::Status::failure("words", "").with_code(code);
            Failure::from(kube::Error::Api(Box::new(status)))
        };
        assert!(matches!(api(404), Failure::Missing));
        assert!(matches!(api(409), Failure::Conflict));
        assert!(matches!(api(429), Failure::TooMany(why) if why == "words"));
        assert!(matches!(api(403), Failure::Other(ClusterError::Refused { why }) if why == "words"));
        assert!(matches!(api(503), Failure::Other(ClusterError::Lost(_))));
    }
}
