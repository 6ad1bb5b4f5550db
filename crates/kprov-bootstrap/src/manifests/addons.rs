//! kube-proxy on every machine, and CoreDNS where the release has it.

use kprov_types::release::ImageComponent;
use serde_json::{Value, json};

use super::rbac::{cluster_role, cluster_role_binding, service_account};
use super::{
    CONTROL_PLANE_LABEL, Context, Manifest, ManifestError, NAME_LABEL, NAMESPACE, component_labels, create, enforce,
};
use crate::paths;
use crate::pki::{Authority, Credentials, Kubeconfig};

const PROXY: &str = "kube-proxy";
const PROXY_CONFIG_DIR: &str = "/etc/kube-proxy";
const PROXY_HEALTH: u16 = 10256;
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const DNS: &str = "coredns";

pub(super) fn service_account_object(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": NAMESPACE } })
}

pub(super) fn config_map(name: &str, data: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": name, "namespace": NAMESPACE },
        "data": data,
    })
}

impl Context<'_> {
    /// kube-proxy. It reaches the API through its machine's front, since it makes the Services that others reach it through.
    pub(super) fn kube_proxy(&self) -> Result<Vec<Manifest>, ManifestError> {
        let kubeconfig = Kubeconfig {
            cluster: self.settings.cluster.as_str(),
            user: PROXY,
            server: paths::LOCAL_API,
            authority: Authority::File(&format!("{TOKEN_DIR}/ca.crt")),
            credentials: Credentials::TokenFile(&format!("{TOKEN_DIR}/token")),
        };
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "bindAddress": "0.0.0.0",
            "healthzBindAddress": format!("0.0.0.0:{PROXY_HEALTH}"),
            "metricsBindAddress": "127.0.0.1:10249",
            "clientConnection": { "kubeconfig": format!("{PROXY_CONFIG_DIR}/kubeconfig") },
            "clusterCIDR": self.settings.network.pods,
            "mode": "iptables",
            // Zero leaves the machine's own values, which a namespace can't change.
            "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
        });
        let files = json!({ "config.conf": format!("{config:#}\n"), "kubeconfig": kubeconfig.render() });
        Ok(vec![
            enforce(service_account_object(PROXY)),
            enforce(cluster_role_binding(
                "kprov:kube-proxy",
                "system:node-proxier",
                &[service_account(PROXY)],
            )),
            create(config_map(PROXY, &files)),
            create(self.kube_proxy_daemon_set()?),
        ])
    }

    pub(super) fn kube_proxy_daemon_set(&self) -> Result<Value, ManifestError> {
        let labels = component_labels(ImageComponent::KubeProxy);
        let host_path =
            |name: &str, path: &str, kind: &str| json!({ "name": name, "hostPath": { "path": path, "type": kind } });
        let spec = json!({
            "hostNetwork": true,
            "serviceAccountName": PROXY,
            "priorityClassName": "system-node-critical",
            "tolerations": [{ "operator": "Exists" }],
            "containers": [{
                "name": PROXY,
                "image": self.image(ImageComponent::KubeProxy)?,
                "imagePullPolicy": "IfNotPresent",
                "command": [
                    "/usr/local/bin/kube-proxy",
                    format!("--config={PROXY_CONFIG_DIR}/config.conf"),
                    "--hostname-override=$(NODE_NAME)",
                ],
                "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
                "resources": { "requests": { "cpu": "20m", "memory": "32Mi" } },
                // Changes the machine's packet filter and sysctls.
                "securityContext": { "privileged": true },
                "readinessProbe": {
                    "httpGet": { "host": "127.0.0.1", "port": PROXY_HEALTH, "path": "/healthz" },
                    "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3,
                },
                "volumeMounts": [
                    { "name": "config", "mountPath": PROXY_CONFIG_DIR, "readOnly": true },
                    { "name": "xtables-lock", "mountPath": "/run/xtables.lock" },
                    { "name": "modules", "mountPath": "/lib/modules", "readOnly": true },
                ],
            }],
            "volumes": [
                { "name": "config", "configMap": { "name": PROXY } },
                // The same lock as every other program that changes the machine's packet filter.
                host_path("xtables-lock", "/run/xtables.lock", "FileOrCreate"),
                host_path("modules", "/lib/modules", "DirectoryOrCreate"),
            ],
        });
        Ok(json!({
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": { "name": PROXY, "namespace": NAMESPACE, "labels": labels },
            "spec": {
                "selector": { "matchLabels": { NAME_LABEL: PROXY } },
                // Never two on one machine: they'd want the same ports. What a stopped one has set up goes on working, so many
                // machines may be without one for the moment; a share is at least one.
                "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": "10%" } },
                "template": { "metadata": self.pod_metadata(&labels), "spec": spec },
            },
        }))
    }

    /// CoreDNS; nothing where the release has none.
    pub(super) fn coredns(&self) -> Vec<Manifest> {
        let Some(deployment) = self.coredns_deployment() else {
            return Vec::new();
        };
        let network = &self.settings.network;
        let corefile = format!(
            "\
.:53 {{
    errors
    health {{
        lameduck 5s
    }}
    ready
    kubernetes {domain} in-addr.arpa ip6.arpa {{
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
    prometheus :9153
    forward . /etc/resolv.conf {{
        max_concurrent 1000
    }}
    cache 30
    loop
    reload
    loadbalance
}}
",
            domain = network.dns_domain
        );
        let reads = json!([
            { "apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"] },
            { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] },
        ]);
        let selector = coredns_selector();
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            // The names by which other software knows cluster DNS.
            "metadata": { "name": "kube-dns", "namespace": NAMESPACE, "labels": {
                "k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS",
            } },
            "spec": {
                "clusterIP": network.dns_service(),
                "selector": selector,
                "ports": [
                    { "name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53 },
                    { "name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53 },
                    { "name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153 },
                ],
            },
        });
        vec![
            enforce(service_account_object(DNS)),
            enforce(cluster_role("kprov:coredns", &reads)),
            enforce(cluster_role_binding(
                "kprov:coredns",
                "kprov:coredns",
                &[service_account(DNS)],
            )),
            create(config_map(DNS, &json!({ "Corefile": corefile }))),
            create(deployment),
            create(service),
            enforce(self.disruption_budget(DNS, &selector)),
        ]
    }
    pub(super) fn coredns_deployment(&self) -> Option<Value> {
        let image = self.settings.release.image(ImageComponent::Coredns)?.pinned();
        let selector = coredns_selector();
        let mut labels = component_labels(ImageComponent::Coredns);
        labels.insert("k8s-app".into(), json!("kube-dns"));
        let probe = |path: &str, port: u16| json!({ "httpGet": { "path": path, "port": port }, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 5 });
        let spec = json!({
            "serviceAccountName": DNS,
            "priorityClassName": "system-cluster-critical",
            // Not the cluster's DNS, which is itself.
            "dnsPolicy": "Default",
            "nodeSelector": { "kubernetes.io/os": "linux" },
            "tolerations": [
                { "key": "CriticalAddonsOnly", "operator": "Exists" },
                { "key": CONTROL_PLANE_LABEL, "operator": "Exists", "effect": "NoSchedule" },
            ],
            "affinity": { "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 100,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": { "matchLabels": selector },
                },
            }] } },
            "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": DNS,
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": ["/coredns", "-conf", "/etc/coredns/Corefile"],
                "resources": { "requests": { "cpu": "50m", "memory": "64Mi" }, "limits": { "memory": "256Mi" } },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": { "drop": ["ALL"], "add": ["NET_BIND_SERVICE"] },
                    "readOnlyRootFilesystem": true,
                },
                "livenessProbe": probe("/health", 8080),
                "readinessProbe": probe("/ready", 8181),
                "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
            }],
            "volumes": [{ "name": "config", "configMap": { "name": DNS } }],
        });
        Some(json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": DNS, "namespace": NAMESPACE, "labels": labels },
            "spec": {
                "replicas": 2,
                "selector": { "matchLabels": selector },
                "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 1 } },
                "template": { "metadata": self.pod_metadata(&labels), "spec": spec },
            },
        }))
    }
}

fn coredns_selector() -> Value {
    json!({ "k8s-app": "kube-dns" })
}
