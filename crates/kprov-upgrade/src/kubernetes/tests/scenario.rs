//! A cluster of a control-plane machine and two workers, as a real API tells of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kprov_bootstrap::apply::apply;
use kprov_bootstrap::manifests::{self, self_hosted};
use kprov_types::api::{ApiServerStatus, EtcdStatus, MachineStatus, ReleaseRef, VersionUpdateStatus, release_name};
use kprov_types::machine::Endpoint;
use kprov_types::node::{ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::release::{API_VERSION, ImageComponent, Release, ReleaseImage};
use kprov_types::{ClusterName, Digest, KubernetesVersion, MachineName};
use kube::Client;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::server::{Api, OPERATOR, Server, until};
use crate::cluster::Cluster as _;
use crate::kubernetes::KubeCluster;
use crate::model::Workload;

pub(super) const OWN: &str = "/apis/kprov.io/v1alpha1";
pub(super) const NODE: &str = "/api/v1/nodes";
const SYSTEM: &str = "/api/v1/namespaces/kube-system";
const APPS: &str = "/apis/apps/v1/namespaces/kube-system";
const PATIENCE: Duration = Duration::from_mins(1);

pub(super) fn name(name: &str) -> MachineName {
    MachineName::new(name).unwrap()
}

pub(super) struct Scenario {
    pub(super) server: Arc<Server>,
    pub(super) admin: Api,
    pub(super) operator: Client,
    /// What the cluster was made with, and where it goes.
    pub(super) current: ReleaseRef,
    pub(super) next: ReleaseRef,
}

fn manifest(version: &KubernetesVersion) -> String {
    use ImageComponent::{
        Coredns, Etcd, KprovOperator, KubeApiserver, KubeControllerManager, KubeProxy, KubeScheduler, Pause,
    };
    let all = [
        Coredns,
        Etcd,
        KprovOperator,
        KubeApiserver,
        KubeControllerManager,
        KubeProxy,
        KubeScheduler,
        Pause,
    ];
    let image = |component: ImageComponent| ReleaseImage {
        reference: format!("kprov.local/{}:{}", component.as_str(), version.tag()),
        digest: Digest::from_bytes([3; 32]),
        version: None,
    };
    let release = Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: version.clone(),
        images: all.map(|component| (component, image(component))).into(),
        host_files: Vec::new(),
        minimum_from: None,
        advisories: Vec::new(),
        programs: BTreeMap::new(),
    };
    serde_json::to_string(&release).unwrap()
}

fn reference(version: &KubernetesVersion) -> ReleaseRef {
    ReleaseRef {
        version: version.clone(),
        digest: Digest::from_bytes(Sha256::digest(manifest(version)).into()),
    }
}

fn settings(current: &ReleaseRef) -> ControlPlaneSettings {
    let member = |index: u8| Member {
        name: name(&format!("cp-{index}")),
        address: IpAddr::from([10, 77, 0, 10 + index]),
    };
    ControlPlaneSettings {
        cluster: ClusterName::new("demo").unwrap(),
        kubernetes: current.version.clone(),
        release: serde_json::from_str(&manifest(&current.version)).unwrap(),
        release_digest: current.digest.clone(),
        endpoint: Endpoint {
            host: "10.77.0.1".into(),
            port: 6443,
        },
        network: NodeNetwork {
            pods: "10.244.0.0/16".parse().unwrap(),
            services: "10.96.0.0/16".parse().unwrap(),
            dns_domain: "cluster.local".into(),
        },
        // The second one has not joined yet.
        members: vec![member(0), member(1)],
        etcd_exists: false,
    }
}

impl Scenario {
    pub(super) async fn begin(server: Arc<Server>) -> Result<Self> {
        let admin = Api(server.client(None)?);
        let minor = server.version.minor().minor;
        let scenario = Self {
            operator: server.client(Some(OPERATOR))?,
            current: reference(&server.version),
            next: reference(&format!("1.{}.7", minor + 1).parse()?),
            admin,
            server,
        };
        let mut manifests = self_hosted(&settings(&scenario.current), 2, None)?;
        // From the start: of two pods one would be deleted, and where that has a machine by then it would stay, without a kubelet.
        for manifest in &mut manifests {
            let single = [Workload::ControllerManager, Workload::Scheduler].map(Workload::as_str);
            if single.iter().any(|name| manifest.object["metadata"]["name"] == *name)
                && manifest.object["kind"] == "Deployment"
            {
                manifest.object["spec"]["replicas"] = json!(1);
            }
        }
        apply(&scenario.admin.0, &manifests, Instant::now() + PATIENCE, |_| ()).await?;
        for (index, node) in ["cp-0", "w-0", "w-1"].into_iter().enumerate() {
            scenario.node(node, index).await?;
        }
        Ok(scenario)
    }

    async fn node(&self, name: &str, index: usize) -> Result<()> {
        let mut labels = json!({ "kubernetes.io/hostname": name, "kubernetes.io/os": "linux" });
        if name.starts_with("cp") {
            labels["node-role.kubernetes.io/control-plane"] = json!("");
        }
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": labels } });
        self.admin.post(NODE, &node).await?;
        let info = [
            "machineID",
            "systemUUID",
            "bootID",
            "kernelVersion",
            "osImage",
            "containerRuntimeVersion",
        ];
        let mut info: BTreeMap<&str, String> = info.map(|field| (field, "x".to_owned())).into();
        info.insert("kubeletVersion", self.current.version.tag());
        info.insert("kubeProxyVersion", self.current.version.tag());
        info.insert("operatingSystem", "linux".into());
        info.insert("architecture", "amd64".into());
        let capacity = json!({ "cpu": "8", "memory": "16Gi", "pods": "110" });
        let status = json!({ "status": {
            "nodeInfo": info, "capacity": capacity, "allocatable": capacity,
            "addresses": [{ "type": "InternalIP", "address": format!("10.77.0.{}", 10 + index) }],
            "conditions": [{ "type": "Ready", "status": "True", "reason": "Test", "message": "",
                "lastHeartbeatTime": jiff::Timestamp::now(), "lastTransitionTime": jiff::Timestamp::now() }],
        } });
        self.admin.patch(&format!("{NODE}/{name}/status"), &status).await?;
        // Kubelets take this off.
        self.admin
            .patch(&format!("{NODE}/{name}"), &json!({ "spec": { "taints": null } }))
            .await?;
        Ok(())
    }

    pub(super) async fn update(&self, name: &str, version: &str) -> Result<()> {
        let object = json!({ "apiVersion": "kprov.io/v1alpha1", "kind": "VersionUpdate", "metadata": { "name": name },
            "spec": { "desiredVersion": version } });
        self.admin.post(&format!("{OWN}/versionupdates"), &object).await?;
        Ok(())
    }

    pub(super) async fn want(&self, version: &str) -> Result<()> {
        let change = json!({ "spec": { "desiredVersion": version } });
        self.admin
            .patch(&format!("{OWN}/versionupdates/cluster"), &change)
            .await?;
        Ok(())
    }

    pub(super) async fn status(&self) -> Result<VersionUpdateStatus> {
        let object = self.admin.get(&format!("{OWN}/versionupdates/cluster")).await?;
        Ok(serde_json::from_value(object["status"].clone())?)
    }

    /// Both releases, and one that nobody has signed.
    pub(super) async fn releases(&self) -> Result<()> {
        let unsigned = reference(&"1.99.1".parse()?);
        for (release, insecure) in [(&self.current, true), (&self.next, true), (&unsigned, false)] {
            let version = release.version.to_string();
            let object = json!({ "apiVersion": "kprov.io/v1alpha1", "kind": "Release",
                "metadata": { "name": release_name(&version, &release.digest) },
                "spec": { "version": version, "digest": release.digest, "manifest": manifest(&release.version),
                    "insecure": insecure } });
            self.admin.post(&format!("{OWN}/releases"), &object).await?;
        }
        Ok(())
    }

    /// What a machine's kprov-node would tell.
    pub(super) async fn tell(&self, machine: &str, change: impl FnOnce(&mut MachineStatus)) -> Result<()> {
        let path = format!("{OWN}/machines/{machine}");
        let object = self.admin.get(&path).await?;
        let mut status: MachineStatus = serde_json::from_value(object["status"].clone()).unwrap_or_default();
        change(&mut status);
        self.admin
            .patch(&format!("{path}/status"), &json!({ "status": status }))
            .await?;
        Ok(())
    }

    /// Machines tell what they run, and the API servers' pods are as kubelets would make them.
    pub(super) async fn api_servers_serve(&self, cluster: &KubeCluster) -> Result<()> {
        let etcd = EtcdStatus {
            image: "kprov.local/etcd:v3.5.30".into(),
            healthy: true,
            ..EtcdStatus::default()
        };
        for machine in ["cp-0", "w-0", "w-1"] {
            let server = ApiServerStatus {
                revision: 2,
                ready: true,
                version: self.current.version.tag(),
                since: None,
            };
            let etcd = etcd.clone();
            self.tell(machine, |status| {
                status.running = Some(self.current.clone());
                if machine == "cp-0" {
                    status.api_servers = vec![server];
                    status.etcd = Some(etcd);
                }
            })
            .await?;
        }
        let workloads = [
            Workload::ApiServer,
            Workload::ControllerManager,
            Workload::Scheduler,
            Workload::Proxy,
        ];
        for workload in workloads {
            let (pod, _) = until("a pod", || async {
                Ok(Some(self.pod_of(workload, &self.current).await?))
            })
            .await?;
            self.ready(&pod, true).await?;
        }
        until("an API server that is ready", || async {
            let input = cluster.observe().await?.context("no VersionUpdate")?;
            let seen = &input.observed.workloads[&Workload::ApiServer];
            Ok((seen.settled && seen.wanted == 1 && seen.instances.iter().any(|i| i.ready)).then_some(()))
        })
        .await
    }

    /// A pod of a workload and a release that stays, and the machine it's on.
    pub(super) async fn pod_of(&self, workload: Workload, release: &ReleaseRef) -> Result<(String, String)> {
        let pods = self.pods_of(workload).await?;
        for pod in &pods {
            let of_this = pod["metadata"]["annotations"]["kprov.io/release"] == json!(release.digest)
                && pod["metadata"]["deletionTimestamp"].is_null();
            if let (true, Some(machine), Some(name)) = (
                of_this,
                pod["spec"]["nodeName"].as_str(),
                pod["metadata"]["name"].as_str(),
            ) {
                return Ok((name.to_owned(), machine.to_owned()));
            }
        }
        let seen: Vec<String> = pods
            .iter()
            .map(|pod| format!("{}: {}", pod["metadata"]["name"], pod["status"]))
            .collect();
        bail!("no pod of `{}` of {release} among {seen:?}", workload.as_str())
    }

    async fn pods_of(&self, workload: Workload) -> Result<Vec<Value>> {
        let label = format!("{}%3D{}", manifests::NAME_LABEL, workload.as_str());
        let list = self.admin.get(&format!("{SYSTEM}/pods?labelSelector={label}")).await?;
        list["items"].as_array().cloned().context("no list")
    }

    pub(super) async fn ready(&self, pod: &str, ready: bool) -> Result<()> {
        let status = if ready { "True" } else { "False" };
        let change = json!({ "status": { "phase": "Running", "conditions": [
            { "type": "Ready", "status": status, "lastTransitionTime": jiff::Timestamp::now() }] } });
        self.admin
            .patch(&format!("{SYSTEM}/pods/{pod}/status"), &change)
            .await?;
        Ok(())
    }

    /// What an API server's own process answers when kprov-node of its machine asks for its version.
    pub(super) async fn process_says(&self, pod: &str, machine: &str, version: &str) -> Result<()> {
        let object = self.admin.get(&format!("{SYSTEM}/pods/{pod}")).await?;
        let revision = object["metadata"]["labels"][manifests::REVISION_LABEL].as_str();
        let server = ApiServerStatus {
            revision: revision.context("the pod has no revision")?.parse()?,
            ready: true,
            version: version.to_owned(),
            since: None,
        };
        self.tell(machine, |status| {
            status.api_servers.retain(|other| other.revision != server.revision);
            status.api_servers.push(server);
        })
        .await
    }

    /// What the kubelet does once a pod's containers have ended.
    pub(super) async fn kubelet_removes(&self, pod: &str) -> Result<()> {
        let body = json!({ "gracePeriodSeconds": 0 }).to_string().into_bytes();
        let request = http::Request::delete(format!("{SYSTEM}/pods/{pod}")).header("content-type", "application/json");
        self.admin.0.request::<Value>(request.body(body)?).await?;
        Ok(())
    }

    /// People's pods: one on each worker that nothing holds, and one whose budget lets it not go.
    pub(super) async fn shop(&self) -> Result<()> {
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } });
        self.admin.post("/api/v1/namespaces", &namespace).await?;
        let policy = self.server.features().pod_disruption_budget;
        let budget = json!({ "apiVersion": policy, "kind": "PodDisruptionBudget", "metadata": { "name": "web" },
            "spec": { "minAvailable": 1, "selector": { "matchLabels": { "app": "web" } } } });
        self.admin
            .post(&format!("/apis/{policy}/namespaces/shop/poddisruptionbudgets"), &budget)
            .await?;
        let account = "/api/v1/namespaces/shop/serviceaccounts/default";
        until("a ServiceAccount", || async { Ok(self.admin.get(account).await.ok()) }).await?;
        for (app, node) in [("web", "w-0"), ("free", "w-0"), ("elsewhere", "w-1")] {
            let pod = json!({ "apiVersion": "v1", "kind": "Pod",
                "metadata": { "name": format!("{app}-1"), "labels": { "app": app } },
                "spec": { "nodeName": node, "automountServiceAccountToken": false,
                    "containers": [{ "name": "c", "image": "example.com/c" }] } });
            self.admin.post("/api/v1/namespaces/shop/pods", &pod).await?;
            let status =
                json!({ "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] } });
            self.admin
                .patch(&format!("/api/v1/namespaces/shop/pods/{app}-1/status"), &status)
                .await?;
        }
        let budget = format!("/apis/{policy}/namespaces/shop/poddisruptionbudgets/web");
        until("the budget's own count", || async {
            let seen = self.admin.get(&budget).await?;
            Ok((seen["status"]["currentHealthy"] == 1).then_some(()))
        })
        .await
    }

    fn path(workload: Workload) -> String {
        let kind = match workload {
            Workload::ApiServer | Workload::Proxy => "daemonsets",
            _ => "deployments",
        };
        format!("{APPS}/{kind}/{}", workload.as_str())
    }

    pub(super) async fn object(&self, workload: Workload) -> Result<Value> {
        self.admin.get(&Self::path(workload)).await
    }

    /// Changes a workload as people do: another flag, a variable, more CPU.
    pub(super) async fn edit(&self, workload: Workload) -> Result<Value> {
        let mut object = self.object(workload).await?;
        let container = &mut object["spec"]["template"]["spec"]["containers"][0];
        container["command"]
            .as_array_mut()
            .context("no command")?
            .push(json!("--v=4"));
        if container["env"].is_null() {
            container["env"] = json!([]);
        }
        container["env"]
            .as_array_mut()
            .context("no list")?
            .push(json!({ "name": "GOGC", "value": "50" }));
        container["resources"]["requests"]["cpu"] = json!("333m");
        let containers = object["spec"]["template"]["spec"]["containers"].clone();
        let change = json!({ "spec": { "template": { "spec": { "containers": containers } } } });
        self.admin.patch(&Self::path(workload), &change).await
    }

    /// The controller has seen the template, and has written down what it was.
    pub(super) async fn settled(&self, workload: Workload) -> Result<()> {
        until("the controller", || async {
            let object = self.object(workload).await?;
            Ok((object["status"]["observedGeneration"] == object["metadata"]["generation"]).then_some(()))
        })
        .await
    }

    /// Pods of a release become ready, those of others end, and the watches have told of it.
    pub(super) async fn all_of(&self, cluster: &KubeCluster, release: &ReleaseRef) -> Result<()> {
        until("pods of one release alone", || async {
            for workload in [Workload::ApiServer, Workload::ControllerManager] {
                if let Ok((new, _)) = self.pod_of(workload, release).await {
                    self.ready(&new, true).await?;
                }
                for pod in self.pods_of(workload).await? {
                    let name = pod["metadata"]["name"].as_str().context("no name")?;
                    let old = pod["metadata"]["annotations"]["kprov.io/release"] != json!(release.digest);
                    if !pod["metadata"]["deletionTimestamp"].is_null() || old && workload == Workload::ApiServer {
                        self.kubelet_removes(name).await?;
                    }
                }
            }
            Ok((cluster.lowest_minor() == Some(release.version.minor())).then_some(()))
        })
        .await
    }
}
