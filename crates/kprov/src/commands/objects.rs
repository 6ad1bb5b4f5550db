//! kprov's own objects in a cluster's API, as commands use them.

use anyhow::{Context as _, Result};
use kprov_types::api::{VERSION_UPDATE, VersionUpdateStatus};
use kprov_upgrade::kubernetes::resources;
pub(super) use kprov_upgrade::kubernetes::resources::{Machine, Release as ReleaseObject, VersionUpdate};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::Value;

use super::access::Access;
use crate::failure::UserError;

/// All VersionUpdates.
pub(super) fn version_updates(client: &kube::Client) -> Api<VersionUpdate> {
    Api::all_with(client.clone(), &resources::version_updates())
}

/// All Machines.
pub(super) fn machines(client: &kube::Client) -> Api<Machine> {
    Api::all_with(client.clone(), &resources::machines())
}

/// All Releases.
pub(super) fn releases(client: &kube::Client) -> Api<ReleaseObject> {
    Api::all_with(client.clone(), &resources::releases())
}

/// The cluster's VersionUpdate.
pub(super) async fn version_update(access: &Access) -> Result<VersionUpdate> {
    version_updates(&access.client)
        .get_opt(VERSION_UPDATE)
        .await
        .map_err(|error| unreachable_api(access, error))?
        .ok_or_else(|| {
            UserError::new(format!(
                "cluster `{}` has no VersionUpdate `{VERSION_UPDATE}`",
                access.name
            ))
            .hint("it was not made by this kprov, or somebody deleted it; `kprov up` puts it back")
            .into()
        })
}

/// Changes the spec of the cluster's VersionUpdate (a JSON merge patch of it); returns the object as it is then.
pub(super) async fn patch_spec(access: &Access, spec: Value) -> Result<VersionUpdate> {
    let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
    version_updates(&access.client)
        .patch(VERSION_UPDATE, &PatchParams::default(), &patch)
        .await
        .map_err(|error| unreachable_api(access, error))
}

/// The error for an API that gives no answer, or refuses.
pub(super) fn unreachable_api(access: &Access, error: kube::Error) -> anyhow::Error {
    let refused = matches!(&error, kube::Error::Api(_));
    let error = anyhow::Error::from(error);
    if refused {
        return error.context(UserError::new(format!("the API of cluster `{}` refused", access.name)));
    }
    error.context(
        UserError::new(format!("the API of cluster `{}` gives no answer", access.name))
            .hint("see `kprov status`; after a power cut `kprov up` starts local machines again"),
    )
}

/// The status, empty where the operator has not written one yet.
pub(super) fn status_of(update: &VersionUpdate) -> VersionUpdateStatus {
    update.status.clone().unwrap_or_default()
}

/// Lists all objects of a kind.
pub(super) async fn list<T>(access: &Access, api: Api<T>) -> Result<Vec<T>>
where
    T: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let list = api.list(&kube::api::ListParams::default()).await;
    Ok(list
        .map_err(|error| unreachable_api(access, error))
        .context("kprov's objects can't be listed")?
        .items)
}
