//! Gives a payload to a cluster, through its API alone: the manifest as a Release object, its blobs by the API server's node
//! proxy into the store of one control-plane machine, from which all machines fetch them.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use http::{Method, Request, StatusCode};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kprov_bootstrap::manifests::{CONTROL_PLANE_LABEL, NAMESPACE};
use kprov_release::Payload;
use kprov_types::api::{RELEASE_KEYS_CONFIG_MAP, ReleaseRef, ReleaseSpec, release_name};
use kprov_types::{Digest, ports};
use kube::Client;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::core::ObjectMeta;
use serde_json::json;

use super::super::access::Access;
use super::super::objects::{self, ReleaseObject};
use super::payloads::AtHand;
use crate::failure::UserError;
use crate::progress::Reporter;

/// How long a machine's store is given to hear of a new Release.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(300);

/// Makes the cluster know a payload and have its blobs. What is there already is left alone.
pub(in crate::commands) async fn push(access: &Access, reporter: &Reporter, at_hand: &AtHand) -> Result<ReleaseRef> {
    let payload = &at_hand.payload;
    let release = at_hand.release();
    reporter.step("", &format!("give release {} to the cluster", release.version));
    trust(&access.client, at_hand)
        .await
        .map_err(|error| objects::unreachable_api(access, error))?;
    register(access, at_hand).await?;
    let blobs = kprov_release::upload::blobs_of(payload)
        .with_context(|| format!("the payload `{}` can't be read", payload.root()))?;
    let stores = stores(&access.client).await?;
    let Some(first) = stores.first() else {
        return Err(UserError::new(format!(
            "no control-plane machine of cluster `{}` is Ready",
            access.name
        ))
        .hint("see `kprov status`")
        .into());
    };
    let total: u64 = blobs.iter().map(|(_, size)| size).sum();
    let mut done = 0;
    for (digest, size) in &blobs {
        put(&access.client, first, payload, digest).await?;
        done += size;
        reporter.message("", &format!("{} of {} MiB", done >> 20, total >> 20));
    }
    Ok(release)
}

/// The cluster trusts the key that the caller trusts.
pub(in crate::commands) async fn trust(client: &Client, at_hand: &AtHand) -> Result<(), kube::Error> {
    let Some((id, pem)) = &at_hand.signer else {
        return Ok(());
    };
    let maps = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
    let patch = Patch::Apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": RELEASE_KEYS_CONFIG_MAP },
        "data": { id: pem },
    }));
    // A field manager for each key, so that applying one takes none of the others away.
    let params = PatchParams::apply(&format!("kprov-key-{id}")).force();
    maps.patch(RELEASE_KEYS_CONFIG_MAP, &params, &patch).await.map(drop)
}

async fn register(access: &Access, at_hand: &AtHand) -> Result<()> {
    let object = release_object(at_hand)?;
    let releases = objects::releases(&access.client);
    match releases.create(&PostParams::default(), &object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            // The digest is part of the name, so it is this one. Somebody who vouches for it now may not have then.
            if at_hand.insecure {
                let patch = Patch::Merge(json!({ "spec": { "insecure": true } }));
                releases
                    .patch(&object.name_any(), &PatchParams::default(), &patch)
                    .await
                    .map_err(|error| objects::unreachable_api(access, error))?;
            }
            Ok(())
        }
        Err(error) => Err(objects::unreachable_api(access, error)),
    }
}

/// The object of a payload.
pub(in crate::commands) fn release_object(at_hand: &AtHand) -> Result<ReleaseObject> {
    let release = at_hand.release();
    let spec = ReleaseSpec {
        version: release.version.to_string(),
        digest: release.digest.clone(),
        manifest: String::from_utf8(at_hand.payload.release_bytes().to_vec()).context("`release.json` is not UTF-8")?,
        signature: at_hand.payload.signature()?,
        insecure: at_hand.insecure,
        urls: Vec::new(),
    };
    Ok(ReleaseObject {
        types: Some(kube::core::TypeMeta {
            api_version: format!("{}/{}", kprov_types::api::GROUP, kprov_types::api::VERSION),
            kind: "Release".into(),
        }),
        metadata: ObjectMeta {
            name: Some(release_name(&spec.version, &spec.digest)),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    })
}

/// The control-plane machines whose stores can be reached, Ready ones only.
async fn stores(client: &Client) -> Result<Vec<String>> {
    let params = ListParams::default().labels(CONTROL_PLANE_LABEL);
    let nodes = Api::<Node>::all(client.clone()).list(&params).await?;
    let ready = |node: &Node| {
        let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    };
    let names: BTreeSet<String> = nodes
        .items
        .iter()
        .filter(|n| ready(n))
        .map(kube::ResourceExt::name_any)
        .collect();
    Ok(names.into_iter().collect())
}

fn path(machine: &str, digest: &Digest) -> String {
    format!(
        "/api/v1/nodes/{machine}:{}/proxy/blobs/sha256/{}",
        ports::RELEASE,
        digest.hex()
    )
}

async fn put(client: &Client, machine: &str, payload: &Payload, digest: &Digest) -> Result<()> {
    let path = path(machine, digest);
    let mut bytes: Option<bytes::Bytes> = None;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let why = match offer(client, &path, payload, digest, &mut bytes).await? {
            Offer::Taken => return Ok(()),
            Offer::Refused(why) => bail!("the store of machine `{machine}` does not take blob `{digest}`: {why}"),
            Offer::Later(why) => why,
        };
        if tokio::time::Instant::now() > deadline {
            bail!("the store of machine `{machine}` has not taken blob `{digest}`: {why}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What became of one try to hand a blob over.
enum Offer {
    Taken,
    /// It may be taken later; why not now.
    Later(String),
    Refused(String),
}

async fn offer(
    client: &Client,
    path: &str,
    payload: &Payload,
    digest: &Digest,
    bytes: &mut Option<bytes::Bytes>,
) -> Result<Offer> {
    let head = Request::builder().method(Method::HEAD).uri(path).body(Body::empty())?;
    match client.send(head).await {
        Ok(reply) if reply.status() == StatusCode::OK => return Ok(Offer::Taken),
        Ok(_) => {}
        // A connection that ends while an API server is replaced says nothing of the store.
        Err(error) => return Ok(Offer::Later(error.to_string())),
    }
    let content = if let Some(read) = bytes {
        read.clone()
    } else {
        let file = payload.blob_path(digest);
        let read = tokio::fs::read(&file)
            .await
            .with_context(|| format!("can't read `{file}`"))?;
        bytes.insert(read.into()).clone()
    };
    let request = Request::builder()
        .method(Method::PUT)
        .uri(path)
        .header(http::header::CONTENT_TYPE, "application/octet-stream")
        .body(Body::from(content))?;
    let reply = match client.send(request).await {
        Ok(reply) => reply,
        Err(error) => return Ok(Offer::Later(error.to_string())),
    };
    let status = reply.status();
    if status.is_success() {
        return Ok(Offer::Taken);
    }
    let text = reply.into_body().collect_bytes().await.unwrap_or_default();
    let why = format!("{status} {}", String::from_utf8_lossy(&text).trim());
    // It takes what a Release names, and may not have seen this one yet; or its front end has just started.
    Ok(match status {
        StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::CONFLICT
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE => Offer::Later(why),
        _ => Offer::Refused(why),
    })
}
