//! The control plane's pods: host network, files on disk, no ServiceAccount token, no container ports (which would keep two
//! revisions from sharing a machine).

use kprov_types::ports::{self, revision_address};
use kprov_types::release::ImageComponent;
use serde_json::{Value, json};

use super::{Context, ManifestError, Pod};
use crate::versions::EtcdFeatures;
use crate::{component_flags, paths};

/// A directory or file of the machine that a container sees at the same path, read-only unless told otherwise.
struct Mount {
    name: &'static str,
    host_path: String,
    path: String,
    kind: &'static str,
    read_only: bool,
}

impl Mount {
    fn directory(name: &'static str, path: impl Into<String>) -> Self {
        let path = path.into();
        Self {
            name,
            host_path: path.clone(),
            path,
            kind: "Directory",
            read_only: true,
        }
    }

    fn file(name: &'static str, path: &str) -> Self {
        Self {
            kind: "File",
            ..Self::directory(name, path)
        }
    }

    fn writable(name: &'static str, host_path: &str, path: &str) -> Self {
        Self {
            host_path: host_path.into(),
            kind: "DirectoryOrCreate",
            read_only: false,
            ..Self::directory(name, path)
        }
    }
}

/// What differs between the control plane's containers.
struct Container {
    component: ImageComponent,
    flags: Vec<String>,
    mounts: Vec<Mount>,
    probes: Probes,
    cpu: &'static str,
    memory: &'static str,
    priority_class: &'static str,
    grace_seconds: u32,
    capabilities: &'static [&'static str],
}

/// The handlers of a container's probes and how often it's asked whether it's ready.
struct Probes {
    startup: Value,
    liveness: Value,
    readiness: Value,
    readiness_seconds: u32,
}

fn https(revision: u16, port: u16, path: &str) -> Value {
    // Only this revision's process has the address.
    let host = revision_address(revision).to_string();
    json!({ "httpGet": { "host": host, "port": port, "path": path, "scheme": "HTTPS" } })
}

fn probe(handler: &Value, period: u32, timeout: u32, failures: u32) -> Value {
    let mut probe = handler.clone();
    probe["periodSeconds"] = json!(period);
    probe["timeoutSeconds"] = json!(timeout);
    probe["failureThreshold"] = json!(failures);
    probe
}

impl Context<'_> {
    fn pod(&self, container: Container) -> Result<Pod, ManifestError> {
        let Container {
            component,
            flags,
            mounts,
            probes,
            cpu,
            memory,
            priority_class,
            grace_seconds,
            capabilities,
        } = container;
        let name = component.as_str();
        let mut command = vec![format!("/usr/local/bin/{name}")];
        command.extend(flags);
        let volumes: Vec<Value> = mounts
            .iter()
            .map(|m| json!({ "name": m.name, "hostPath": { "path": m.host_path, "type": m.kind } }))
            .collect();
        let volume_mounts: Vec<Value> = mounts
            .iter()
            .map(|m| json!({ "name": m.name, "mountPath": m.path, "readOnly": m.read_only }))
            .collect();
        let mut capability_rules = json!({ "drop": ["ALL"] });
        if !capabilities.is_empty() {
            capability_rules["add"] = json!(capabilities);
        }
        let spec = json!({
            "hostNetwork": true,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "priorityClassName": priority_class,
            "terminationGracePeriodSeconds": grace_seconds,
            "tolerations": [{ "operator": "Exists" }],
            "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": name,
                "image": self.image(component)?,
                "imagePullPolicy": "IfNotPresent",
                "command": command,
                "resources": { "requests": { "cpu": cpu, "memory": memory } },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": capability_rules,
                    "readOnlyRootFilesystem": true,
                },
                "startupProbe": probe(&probes.startup, 1, 5, 240),
                "livenessProbe": probe(&probes.liveness, 10, 15, 8),
                "readinessProbe": probe(&probes.readiness, probes.readiness_seconds, 5, 3),
                "volumeMounts": volume_mounts,
            }],
            "volumes": volumes,
        });
        Ok(Pod { component, spec })
    }

    /// An API server. `advertise` is an address, or a reference to an environment variable.
    pub(super) fn apiserver_pod(&self, revision: u16, advertise: &str) -> Result<Pod, ManifestError> {
        // Alive even when etcd isn't: a restart would not help, and would lose the watch cache.
        let alive = https(revision, ports::API, "/livez?exclude=etcd");
        self.pod(Container {
            component: ImageComponent::KubeApiserver,
            flags: component_flags::apiserver(self.settings, &self.features, revision, advertise),
            mounts: vec![
                Mount::directory("pki", paths::PKI),
                Mount::directory("config", paths::CONFIG),
                Mount::writable("audit", paths::AUDIT_LOG_DIR, paths::AUDIT_LOG_DIR),
            ],
            probes: Probes {
                startup: alive.clone(),
                liveness: alive,
                readiness: https(revision, ports::API, "/readyz"),
                readiness_seconds: 1,
            },
            cpu: "100m",
            memory: "256Mi",
            priority_class: "system-node-critical",
            grace_seconds: component_flags::apiserver_grace_seconds(&self.features),
            // The official image's program carries this file capability, and can't be run where it's out of reach.
            capabilities: &["NET_BIND_SERVICE"],
        })
    }

    /// A controller-manager.
    pub(super) fn controller_manager_pod(&self, revision: u16) -> Result<Pod, ManifestError> {
        let flags = component_flags::controller_manager(self.settings, &self.features, revision);
        self.leader_elected(
            ImageComponent::KubeControllerManager,
            flags,
            vec![
                Mount::directory("pki", paths::PKI),
                Mount::file("kubeconfig", paths::CONTROLLER_MANAGER_KUBECONFIG),
            ],
            &https(revision, ports::CONTROLLER_MANAGER, "/healthz"),
        )
    }

    /// A scheduler. It sees no certificate but its own.
    pub(super) fn scheduler_pod(&self, revision: u16) -> Result<Pod, ManifestError> {
        let flags = component_flags::scheduler(&self.features, revision);
        self.leader_elected(
            ImageComponent::KubeScheduler,
            flags,
            vec![
                Mount::directory("pki", paths::pki("scheduler")),
                Mount::file("kubeconfig", paths::SCHEDULER_KUBECONFIG),
            ],
            &https(revision, ports::SCHEDULER, "/healthz"),
        )
    }

    fn leader_elected(
        &self,
        component: ImageComponent,
        flags: Vec<String>,
        mounts: Vec<Mount>,
        healthy: &Value,
    ) -> Result<Pod, ManifestError> {
        self.pod(Container {
            component,
            flags,
            mounts,
            probes: Probes {
                startup: healthy.clone(),
                liveness: healthy.clone(),
                readiness: healthy.clone(),
                readiness_seconds: 2,
            },
            cpu: "50m",
            memory: "64Mi",
            priority_class: "system-cluster-critical",
            grace_seconds: 10,
            capabilities: &[],
        })
    }

    /// An etcd member.
    pub(super) fn etcd_pod(
        &self,
        features: EtcdFeatures,
        flags: &[String],
        data_dir: &str,
    ) -> Result<Pod, ManifestError> {
        let port = ports::ETCD_METRICS;
        let health = |path: &str| json!({ "httpGet": { "host": "127.0.0.1", "port": port, "path": path } });
        // A member without quorum must not be restarted, which older lines' health answer can't tell from dead.
        let alive = if features.serializable_health {
            health("/health?serializable=true")
        } else {
            json!({ "tcpSocket": { "host": "127.0.0.1", "port": port } })
        };
        self.pod(Container {
            component: ImageComponent::Etcd,
            flags: flags.to_vec(),
            mounts: vec![
                Mount::directory("pki", paths::ETCD_PKI),
                Mount::writable("data", data_dir, component_flags::ETCD_DATA),
            ],
            probes: Probes {
                startup: alive.clone(),
                liveness: alive,
                readiness: health("/health"),
                readiness_seconds: 5,
            },
            cpu: "100m",
            memory: "100Mi",
            priority_class: "system-node-critical",
            grace_seconds: 30,
            capabilities: &[],
        })
    }
}
