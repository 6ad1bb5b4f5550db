//! What runs a cluster's control plane: static pods on its machines, and the self-hosted objects. All pure.
//!
//! Objects are plain JSON values, so that no Rust type's version limits which Kubernetes they fit; the one table of
//! [`crate::versions`] does.

mod addons;
mod crds;
mod endpoints;
mod operator;
mod operator_rights;
mod pods;
mod rbac;
mod security_policy;
mod workloads;

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use kprov_types::Minor;
use kprov_types::api::{KUBERNETES_ANNOTATION, RELEASE_ANNOTATION};
use kprov_types::node::{ControlPlaneSettings, JoinToken, Member};
use kprov_types::ports::{ETCD_PEER, STANDBY_REVISION};
use kprov_types::release::ImageComponent;
use serde_json::{Map, Value, json};

use crate::component_flags;
use crate::versions::{EtcdFeatures, Features, Unsupported};

pub use crds::{MACHINES, RELEASES, Resource, VERSION_UPDATES, crds};
pub use endpoints::{API_SERVICE, API_SERVICE_NAMESPACE, api_endpoint_slice, api_endpoints};
pub use operator::{OPERATOR, release_keys};
pub use operator_rights::machine_access;

/// The namespace everything runs in.
pub const NAMESPACE: &str = "kube-system";
/// Label: the component's name.
pub const NAME_LABEL: &str = "app.kubernetes.io/name";
/// Label: which revision, and so which [address](kprov_types::ports::revision_address), a control-plane pod has.
pub const REVISION_LABEL: &str = "kprov.io/revision";
/// Label: [`STANDBY`] or [`SELF_HOSTED`].
pub const PLANE_LABEL: &str = "kprov.io/plane";
/// Value of [`PLANE_LABEL`] on static pods.
pub const STANDBY: &str = "standby";
/// Value of [`PLANE_LABEL`] on pods of the self-hosted objects.
pub const SELF_HOSTED: &str = "self-hosted";
/// The label that makes a node a control-plane node. Kubelets may not set it; kprov-node does.
pub const CONTROL_PLANE_LABEL: &str = "node-role.kubernetes.io/control-plane";
/// The ConfigMap in [`NAMESPACE`] with the cluster's settings.
pub const SETTINGS_CONFIG_MAP: &str = "kprov-config";
/// Its key with the [`ControlPlaneSettings`] as JSON.
pub const SETTINGS_KEY: &str = "settings.json";
/// The group that join tokens authenticate as.
pub const JOIN_GROUP: &str = "system:bootstrappers:kprov:join-token";

/// Why manifests can't be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The version is too old.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The release lacks an image that every cluster needs.
    #[error("the release has no image `{}`", .0.as_str())]
    MissingImage(ImageComponent),
}

/// An object, and who owns it after it was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The object.
    pub object: Value,
    /// How it's applied.
    pub policy: Policy,
}

/// How an object is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Every time, so that it's as `kprov up` wants it.
    Enforce,
    /// Only where it's missing: upgrades, or people, own it from then on. A second `up` must not roll it back.
    Create,
}

/// A bootstrap token that lets machines join until it expires.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinGrant {
    /// The token.
    pub token: JoinToken,
    /// When it stops to work.
    pub expires: Timestamp,
}

/// How a machine's etcd member starts. It matters at its first start only; afterwards etcd goes by its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdStart {
    /// The members of the cluster it starts in, itself included.
    pub initial_cluster: Vec<Member>,
    /// Whether that cluster is there already.
    pub state: EtcdClusterState,
    /// Where the machine keeps the data: an absolute path of a directory with mode 0700.
    pub data_dir: String,
}

/// Whether an etcd cluster is made or joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EtcdClusterState {
    /// It's made: all its members start with the same list.
    New,
    /// It's there, and knows of the new member.
    Existing,
}

/// The standby control plane of a machine: static pods of kube-apiserver, controller-manager and scheduler, each with its
/// file name. They're the self-hosted pods but for their revision and for what static pods can't have. `settings` may be of
/// any release, see [`ControlPlaneSettings::with_release`].
pub fn standby_pods(settings: &ControlPlaneSettings, machine: &Member) -> Result<Vec<(String, Value)>, ManifestError> {
    let context = Context::new(settings)?;
    let advertise = machine.address.to_string();
    let pods = [
        context.apiserver_pod(STANDBY_REVISION, &advertise)?,
        context.controller_manager_pod(STANDBY_REVISION)?,
        context.scheduler_pod(STANDBY_REVISION)?,
    ];
    Ok(pods
        .into_iter()
        .map(|pod| {
            let labels = labels(pod.component, STANDBY, STANDBY_REVISION);
            static_pod(&pod, context.pod_metadata(&labels))
        })
        .collect())
}

/// The static pod of a machine's etcd member, with its file name.
pub fn etcd_pod(
    settings: &ControlPlaneSettings,
    machine: &Member,
    start: &EtcdStart,
) -> Result<(String, Value), ManifestError> {
    let context = Context::new(settings)?;
    let image = settings
        .release
        .image(ImageComponent::Etcd)
        .ok_or(ManifestError::MissingImage(ImageComponent::Etcd))?;
    let features = EtcdFeatures::of(image.version.as_deref());
    let cluster: Vec<String> = start
        .initial_cluster
        .iter()
        .map(|m| format!("{}=https://{}:{ETCD_PEER}", m.name, url_host(m.address)))
        .collect();
    let state = match start.state {
        EtcdClusterState::New => "new",
        EtcdClusterState::Existing => "existing",
    };
    let flags = component_flags::etcd(
        features,
        machine.name.as_str(),
        &url_host(machine.address),
        &cluster,
        state,
        settings.cluster.as_str(),
    );
    let pod = context.etcd_pod(features, &flags, &start.data_dir)?;
    let mut labels = component_labels(ImageComponent::Etcd);
    labels.insert(PLANE_LABEL.into(), json!("static"));
    // Not of a release: a member is started again only where its image changes.
    Ok(static_pod(&pod, json!({ "labels": labels })))
}

/// The objects of the self-hosted control plane, in the order in which they're applied: rights first, then what runs.
///
/// `revision` is the one that objects which are missing start with. Of a cluster that runs already, nothing that upgrades own
/// is touched (see [`Policy`]). Apply them as [`crate::pki::setup_admin`], since they bind everyone else.
pub fn self_hosted(
    settings: &ControlPlaneSettings,
    revision: u16,
    join: Option<&JoinGrant>,
) -> Result<Vec<Manifest>, ManifestError> {
    let context = Context::new(settings)?;
    let mut objects = rbac::objects(settings, &context.features);
    if context.features.pod_security.is_none() {
        objects.extend(security_policy::objects());
    }
    objects.extend(join.map(join_secret));
    let mut manifests: Vec<Manifest> = objects.into_iter().map(enforce).collect();
    manifests.push(create(settings_config_map(settings)));
    manifests.extend(context.control_plane(revision)?);
    manifests.extend(context.kube_proxy()?);
    manifests.extend(context.coredns());
    manifests.extend(context.api_endpoints());
    manifests.extend(context.operator());
    Ok(manifests)
}

/// What runs the pods of one component of the release that `settings` name: a DaemonSet or a Deployment. `None` where no object
/// of the API runs it (etcd, the pause container), and where the release lacks what a release may lack (CoreDNS, kprov's
/// operator).
///
/// `revision` matters to the control plane only; each change of its pod templates takes a fresh one. `running` is the lowest
/// minor among the API servers that will read the object: where it knows no surge of DaemonSets, API servers are replaced only
/// by whoever deletes their pods.
pub fn workload(
    settings: &ControlPlaneSettings,
    component: ImageComponent,
    revision: u16,
    running: Minor,
) -> Result<Option<Value>, ManifestError> {
    let surge = Features::of(running)?.daemon_set_surge;
    Context::new(settings)?.workload(component, revision, surge)
}

fn enforce(object: Value) -> Manifest {
    Manifest {
        object,
        policy: Policy::Enforce,
    }
}

fn create(object: Value) -> Manifest {
    Manifest {
        object,
        policy: Policy::Create,
    }
}

/// What all rendering starts from.
struct Context<'a> {
    settings: &'a ControlPlaneSettings,
    features: Features,
}

impl<'a> Context<'a> {
    fn new(settings: &'a ControlPlaneSettings) -> Result<Self, ManifestError> {
        Ok(Self {
            settings,
            features: Features::of(settings.kubernetes.minor())?,
        })
    }

    /// The metadata of a pod that is rendered from the release.
    fn pod_metadata(&self, labels: &Map<String, Value>) -> Value {
        let annotations = json!({
            RELEASE_ANNOTATION: self.settings.release_digest,
            KUBERNETES_ANNOTATION: self.settings.kubernetes,
        });
        json!({ "labels": labels, "annotations": annotations })
    }

    fn image(&self, component: ImageComponent) -> Result<String, ManifestError> {
        let image = self
            .settings
            .release
            .image(component)
            .ok_or(ManifestError::MissingImage(component))?;
        Ok(image.pinned())
    }
}

/// A pod before it's known what runs it.
struct Pod {
    component: ImageComponent,
    spec: Value,
}

fn static_pod(pod: &Pod, mut metadata: Value) -> (String, Value) {
    let name = pod.component.as_str();
    metadata["name"] = json!(name);
    metadata["namespace"] = json!(NAMESPACE);
    let mut spec = pod.spec.clone();
    // No admission plugin resolves the class of a static pod.
    spec["priority"] = json!(match spec["priorityClassName"].as_str() {
        Some("system-node-critical") => 2_000_001_000,
        _ => 2_000_000_000,
    });
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": spec,
    });
    (format!("{name}.yaml"), manifest)
}

fn component_labels(component: ImageComponent) -> Map<String, Value> {
    Map::from_iter([
        (NAME_LABEL.to_owned(), json!(component.as_str())),
        ("app.kubernetes.io/managed-by".to_owned(), json!("kprov")),
    ])
}

fn labels(component: ImageComponent, plane: &str, revision: u16) -> Map<String, Value> {
    let mut labels = component_labels(component);
    labels.insert(PLANE_LABEL.into(), json!(plane));
    labels.insert(REVISION_LABEL.into(), json!(revision.to_string()));
    labels
}

fn url_host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

fn join_secret(grant: &JoinGrant) -> Value {
    let JoinGrant {
        token: JoinToken { id, secret },
        expires,
    } = grant;
    let text = |value: &str| json!(STANDARD.encode(value));
    let expiration = expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": { "name": format!("bootstrap-token-{id}"), "namespace": NAMESPACE },
        "type": "bootstrap.kubernetes.io/token",
        "data": {
            "token-id": text(id),
            "token-secret": text(secret),
            "expiration": text(&expiration),
            "usage-bootstrap-authentication": text("true"),
            "auth-extra-groups": text(JOIN_GROUP),
        },
    })
}

fn settings_config_map(settings: &ControlPlaneSettings) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": SETTINGS_CONFIG_MAP, "namespace": NAMESPACE },
        "data": { SETTINGS_KEY: json!(settings).to_string() },
    })
}
