//! kprov's own kinds and the operator's rights, on a real API server.

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Node, Secret};
use kprov_bootstrap::manifests::{
    MACHINES, OPERATOR, RELEASES, Resource, VERSION_UPDATES, api_endpoint_slice, api_endpoints, crds, machine_access,
};
use kprov_bootstrap::pki;
use kprov_bootstrap::pki::Credentials;
use kprov_bootstrap::versions::Features;
use kprov_types::Role;
use kprov_types::api::{
    Condition, Failure, HistoryEntry, MachineFailure, MachineSpec, MachineStatus, MaxUnavailable, PoolPolicy,
    ReleaseRef, ReleaseSpec, ReleaseStatus, RunOrder, SnapshotStatus, StandbyOrder, UpdatePolicy, VersionUpdateSpec,
    VersionUpdateStatus, release_name,
};
use kprov_types::release::Digest;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::common::machine;
use crate::control_plane::{ADVERTISED, Plane, forbidden, until};

fn api(client: &Client, resource: Resource) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource.api_resource())
}

fn time() -> Timestamp {
    "2026-05-01T12:00:00.25Z".parse().unwrap()
}

fn release() -> ReleaseRef {
    ReleaseRef {
        version: "1.36.3".parse().unwrap(),
        digest: Digest::from_bytes([9; 32]),
    }
}

fn version_update() -> (VersionUpdateSpec, VersionUpdateStatus) {
    let spec = VersionUpdateSpec {
        desired_version: "1.36.3".into(),
        release: Some(release().digest),
        paused: true,
        policy: UpdatePolicy {
            max_unavailable: MaxUnavailable::Percent(10),
            pools: [
                (
                    "gpu".to_owned(),
                    PoolPolicy {
                        max_unavailable: Some(MaxUnavailable::Count(3)),
                        drain_timeout_seconds: Some(u32::MAX),
                        drain_force: None,
                    },
                ),
                ("default".to_owned(), PoolPolicy::default()),
            ]
            .into(),
            ..UpdatePolicy::default()
        },
        force: vec!["removed-api/policy/v1beta1/podsecuritypolicies".into()],
        attempt: 2,
    };
    let status = VersionUpdateStatus {
        current_version: Some("1.34.9".into()),
        conditions: vec![Condition {
            kind: "Degraded".into(),
            status: "True".into(),
            reason: "ReleaseFailed".into(),
            message: "kube-apiserver did not become ready".into(),
            last_transition_time: time(),
            observed_generation: Some(1),
        }],
        hops: vec![release()],
        hop_started: Some(time()),
        failure: Some(Failure {
            release: release(),
            attempt: 1,
            component: "kube-apiserver".into(),
            instance: "kube-apiserver-x".into(),
            message: "it crashed".into(),
            log: vec!["panic".into()],
            time: time(),
            halted: false,
            reverted: true,
        }),
        history: vec![HistoryEntry {
            from: None,
            release: release(),
            started: time(),
            finished: time(),
            outcome: "Completed".into(),
            message: String::new(),
        }],
        ..VersionUpdateStatus::default()
    };
    (spec, status)
}

fn orders() -> (MachineSpec, MachineStatus) {
    let spec = MachineSpec {
        order: 1 << 40,
        stage: vec![release()],
        run: Some(RunOrder {
            release: release(),
            since: time(),
            timeout_seconds: 300,
        }),
        standby: Some(StandbyOrder {
            release: release(),
            serve: true,
        }),
        ..MachineSpec::default()
    };
    let status = MachineStatus {
        role: Some(Role::ControlPlane),
        running: Some(release()),
        failure: Some(MachineFailure {
            release: release(),
            order: 3,
            message: "kubelet did not report".into(),
            log: Vec::new(),
            time: time(),
        }),
        snapshots: vec![SnapshotStatus {
            name: "before-1.36.3".into(),
            time: time(),
            size: 1 << 40,
            digest: Digest::from_bytes([1; 32]),
        }],
        ..MachineStatus::default()
    };
    (spec, status)
}

/// Writes spec and status, and reads back the same.
async fn round_trip<S, T>(client: &Client, resource: Resource, name: &str, spec: &S, status: &T) -> Result<()>
where
    S: Serialize + DeserializeOwned + PartialEq,
    T: Serialize + DeserializeOwned + PartialEq,
{
    let objects = api(client, resource);
    let mut object = DynamicObject::new(name, &resource.api_resource());
    object.data = json!({ "spec": spec, "status": status });
    let made = until(resource.kind, || async {
        Ok(Some(objects.create(&PostParams::default(), &object).await?))
    })
    .await?;
    ensure!(
        made.data["status"].is_null(),
        "a status was taken with the object: {made:?}"
    );
    let patch = Patch::Merge(json!({ "status": status }));
    objects.patch_status(name, &PatchParams::default(), &patch).await?;
    let read = objects.get(name).await?.data;
    ensure!(serde_json::from_value::<S>(read["spec"].clone())? == *spec, "{read:#}");
    ensure!(
        serde_json::from_value::<T>(read["status"].clone())? == *status,
        "{read:#}"
    );
    Ok(())
}

fn message<T>(result: Result<T, kube::Error>) -> Result<String> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 422 => Ok(status.message.clone()),
        Err(error) => Err(error.into()),
        Ok(_) => Err(anyhow::anyhow!("it was taken")),
    }
}

impl Plane {
    pub(crate) async fn keeps_own_kinds(&self, admin: &Client) -> Result<()> {
        let (spec, status) = version_update();
        round_trip(admin, VERSION_UPDATES, "cluster", &spec, &status).await?;
        let (spec, status) = orders();
        round_trip(admin, MACHINES, "demo-worker-0", &spec, &status).await?;
        let manifest = "x".repeat(200_000);
        let spec = ReleaseSpec {
            version: "1.36.3+debug.1".into(),
            digest: Digest::from_bytes([9; 32]),
            manifest,
            signature: None,
            insecure: true,
            urls: vec!["http://10.0.0.1:10202".into()],
        };
        let status = ReleaseStatus {
            verified: true,
            message: "no signature is asked for".into(),
        };
        let name = release_name(&spec.version, &spec.digest);
        round_trip(admin, RELEASES, &name, &spec, &status).await?;
        let features = Features::of(self.bundle.settings.kubernetes.minor())?;
        if features.validation_rules {
            refuses_what_is_wrong(admin, &name).await.context("validation rules")?;
        }
        Ok(())
    }

    /// A client that is the operator.
    async fn operator(&self) -> Result<Client> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let pair = pki::setup_admin(&self.bundle.secrets, Timestamp::now())?;
        let mut config = self.config(Credentials::Inline(&pair)).await?;
        config.auth_info.impersonate = Some(format!("system:serviceaccount:kube-system:{OPERATOR}"));
        config.auth_info.impersonate_groups = Some(
            [
                "system:serviceaccounts",
                "system:serviceaccounts:kube-system",
                "system:authenticated",
            ]
            .map(str::to_owned)
            .into(),
        );
        Ok(Client::try_from(config)?)
    }

    pub(crate) async fn limits_the_operator(&self, admin: &Client) -> Result<()> {
        let operator = self.operator().await?;
        // What each machine may do is made by the operator, that holds it itself.
        for name in ["demo-cp-0", "demo-worker-0"] {
            for object in machine_access(&machine(name)) {
                apply_object(&operator, &object).await.context("machine access")?;
            }
        }
        let minor = self.bundle.settings.kubernetes.minor();
        for definition in crds(minor)? {
            apply_object(&operator, &definition.object)
                .await
                .context("definitions")?;
        }
        let endpoints: Api<Endpoints> = Api::namespaced(admin.clone(), "default");
        endpoints.delete("kubernetes", &DeleteParams::default()).await?;
        let mut lead_to = api_endpoints(&[ADVERTISED.parse()?]);
        apply_object(&operator, &lead_to)
            .await
            .context("Endpoints that were missing")?;
        let features = Features::of(minor)?;
        apply_object(&operator, &api_endpoint_slice(&[ADVERTISED.parse()?], &features)).await?;
        lead_to["metadata"]["name"] = json!("other");
        forbidden(apply_object(&operator, &lead_to).await)?;
        let leases: Api<Lease> = Api::namespaced(operator.clone(), "kube-system");
        let mut lease = leases.get(OPERATOR).await?;
        lease.spec = serde_json::from_value(json!({ "holderIdentity": "test" }))?;
        let lease = leases.replace(OPERATOR, &PostParams::default(), &lease).await?;
        ensure!(lease.spec.and_then(|s| s.holder_identity).as_deref() == Some("test"));
        forbidden(leases.get("kube-scheduler").await)?;
        let patch = Patch::Merge(json!({ "spec": { "unschedulable": true } }));
        let nodes: Api<Node> = Api::all(operator.clone());
        nodes.patch("demo-worker-0", &PatchParams::default(), &patch).await?;
        nodes
            .patch(
                "demo-worker-0",
                &PatchParams::default(),
                &Patch::Merge(json!({ "spec": { "unschedulable": null } })),
            )
            .await?;
        forbidden(nodes.delete("demo-worker-0", &DeleteParams::default()).await)?;
        let config: Api<ConfigMap> = Api::namespaced(operator.clone(), "kube-system");
        config.get("kprov-config").await?;
        forbidden(config.get("extension-apiserver-authentication").await)?;
        forbidden(
            Api::<Secret>::namespaced(operator.clone(), "kube-system")
                .list(&ListParams::default())
                .await,
        )?;
        let mut binding = machine_access(&machine("demo-worker-0"))[1].clone();
        binding["metadata"]["name"] = json!("too-much");
        binding["roleRef"]["name"] = json!("cluster-admin");
        forbidden(apply_object(&operator, &binding).await).context("the operator gave away what it hasn't got")?;
        self.limits_machines(&operator).await
    }

    /// A machine reads its own object and writes its status, and no other's.
    async fn limits_machines(&self, operator: &Client) -> Result<()> {
        let mut own = DynamicObject::new("demo-cp-0", &MACHINES.api_resource());
        own.data = json!({ "spec": MachineSpec::default() });
        api(operator, MACHINES).create(&PostParams::default(), &own).await?;
        let kubelet = self.client_of(&self.pair("kubelet/client")?).await?;
        let machines = api(&kubelet, MACHINES);
        until("the machine's rights", || async {
            Ok(Some(machines.get("demo-cp-0").await?))
        })
        .await?;
        let only = ListParams::default().fields("metadata.name=demo-cp-0");
        ensure!(machines.list(&only).await?.items.len() == 1);
        forbidden(machines.list(&ListParams::default()).await)?;
        forbidden(machines.get("demo-worker-0").await)?;
        let status = Patch::Merge(json!({ "status": { "observedOrder": 1 } }));
        let params = PatchParams::default();
        machines.patch_status("demo-cp-0", &params, &status).await?;
        forbidden(machines.patch_status("demo-worker-0", &params, &status).await)?;
        forbidden(
            machines
                .patch("demo-cp-0", &params, &Patch::Merge(json!({ "spec": { "order": 9 } })))
                .await,
        )?;
        ensure!(api(&kubelet, RELEASES).list(&ListParams::default()).await?.items.len() == 1);
        forbidden(api(&kubelet, VERSION_UPDATES).list(&ListParams::default()).await)
    }
}

/// Server-side apply by the object's own path.
async fn apply_object(client: &Client, object: &Value) -> Result<(), kube::Error> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", &api_version));
    let plural = if kind.ends_with('s') {
        kind.to_lowercase()
    } else {
        format!("{}s", kind.to_lowercase())
    };
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &kind), &plural);
    let objects: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let params = PatchParams::apply("kprov").force();
    objects
        .patch(&text(&object["metadata"]["name"]), &params, &Patch::Apply(object))
        .await?;
    Ok(())
}

async fn refuses_what_is_wrong(admin: &Client, release: &str) -> Result<()> {
    let updates = api(admin, VERSION_UPDATES);
    let params = PatchParams::default();
    let patch = async |spec: Value| {
        message(
            updates
                .patch("cluster", &params, &Patch::Merge(json!({ "spec": spec })))
                .await,
        )
    };
    for wrong in ["banana", "1.36", "1.36.x", "", "01.36.3", "1.36.3 ", "1.36.3/../x"] {
        let told = patch(json!({ "desiredVersion": wrong })).await.context(wrong)?;
        ensure!(
            told.contains("desiredVersion must be MAJOR.MINOR.PATCH, such as 1.36.3"),
            "{wrong}: {told}"
        );
    }
    for good in ["v1.36.3", "1.37.0-rc.1", "1.36.3+debug.1", "1.36.3"] {
        let spec = json!({ "spec": { "desiredVersion": good } });
        updates
            .patch("cluster", &params, &Patch::Merge(spec))
            .await
            .context(good)?;
    }
    for wrong in [json!(-1), json!("x"), json!("101%"), json!("-3")] {
        for policy in [
            json!({ "maxUnavailable": wrong }),
            json!({ "pools": { "gpu": { "maxUnavailable": wrong } } }),
        ] {
            let told = patch(json!({ "policy": policy })).await?;
            ensure!(told.contains("maxUnavailable must be a number of machines"), "{told}");
        }
    }
    let told = patch(json!({ "release": "sha256:beef" })).await?;
    ensure!(told.contains("release must be a digest"), "{told}");
    let releases = api(admin, RELEASES);
    let told = message(
        releases
            .patch(
                release,
                &params,
                &Patch::Merge(json!({ "spec": { "manifest": "other" } })),
            )
            .await,
    )?;
    ensure!(told.contains("a Release stays what it is"), "{told}");
    let more = json!({ "spec": { "urls": ["http://10.0.0.2:10202"] } });
    releases.patch(release, &params, &Patch::Merge(more)).await?;
    Ok(())
}
