//! The flags of the control plane's programs, as a CIS Kubernetes benchmark would have them, whatever the version.

use kprov_types::node::ControlPlaneSettings;
use kprov_types::{cluster::POD_RANGE_PREFIX, ports};

use crate::paths;
use crate::versions::{EtcdFeatures, Features};

/// TLS 1.2 suites with forward secrecy and authenticated encryption. TLS 1.3 has no other kind.
pub(crate) const CIPHER_SUITES: &[&str] = &[
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// How long an API server that was told to stop keeps serving, not ready: longer than the fronts' health checks take.
const SHUTDOWN_DELAY_SECONDS: u32 = 3;
/// How long it then takes at most to end watches, spread over the time so that not all clients list again at once.
const WATCH_GRACE_SECONDS: u32 = 5;

/// When the kubelet kills an API server that was told to stop: after all that, and time for requests that run. One that can't
/// end watches by itself would wait for them until it's killed, so it gets no more than its requests need.
pub(crate) fn apiserver_grace_seconds(features: &Features) -> u32 {
    if features.shutdown_watch_grace {
        SHUTDOWN_DELAY_SECONDS + WATCH_GRACE_SECONDS + 15
    } else {
        SHUTDOWN_DELAY_SECONDS + 5
    }
}

fn tls() -> [String; 2] {
    [
        "--tls-min-version=VersionTLS12".into(),
        format!("--tls-cipher-suites={}", CIPHER_SUITES.join(",")),
    ]
}

/// kube-apiserver's. `advertise` is the machine's address, or a reference to an environment variable.
///
/// Each API server talks to its own machine's etcd member and no other: then its readiness says what can be said of the
/// machine, and the fronts move clients to another machine while a member is down. (A list of all members would change
/// with each machine added, and each change is a rollout.)
pub(crate) fn apiserver(
    settings: &ControlPlaneSettings,
    features: &Features,
    revision: u16,
    advertise: &str,
) -> Vec<String> {
    let network = &settings.network;
    let minor = settings.kubernetes.minor();
    let pki = paths::pki;
    let mut flags = vec![
        format!("--bind-address={}", ports::revision_address(revision)),
        format!("--secure-port={}", ports::API),
        format!("--advertise-address={advertise}"),
        // One that stops would take its machine's address out of Service `kubernetes`, though the front goes on there.
        // kprov's operator keeps the addresses.
        "--endpoint-reconciler-type=none".into(),
        "--allow-privileged=true".into(),
        "--authorization-mode=Node,RBAC".into(),
        format!("--client-ca-file={}", paths::CA),
        "--enable-bootstrap-token-auth=true".into(),
        format!("--etcd-servers=https://127.0.0.1:{}", ports::ETCD_CLIENT),
        format!("--etcd-cafile={}", pki("etcd/ca.crt")),
        format!("--etcd-certfile={}", pki("apiserver-etcd-client.crt")),
        format!("--etcd-keyfile={}", pki("apiserver-etcd-client.key")),
        format!("--encryption-provider-config={}", paths::ENCRYPTION),
        format!("--kubelet-certificate-authority={}", paths::CA),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet-client.key")),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy-client.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy-client.key")),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        format!(
            "--service-account-issuer=https://kubernetes.default.svc.{}",
            network.dns_domain
        ),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        "--service-account-lookup=true".into(),
        "--service-account-extend-token-expiration=false".into(),
        format!("--service-cluster-ip-range={}", network.services),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        "--profiling=false".into(),
        format!("--audit-policy-file={}", paths::AUDIT_POLICY),
        format!("--audit-log-path={}/audit.log", paths::AUDIT_LOG_DIR),
        "--audit-log-maxage=30".into(),
        "--audit-log-maxbackup=10".into(),
        "--audit-log-maxsize=100".into(),
        format!("--shutdown-delay-duration={SHUTDOWN_DELAY_SECONDS}s"),
    ];
    flags.extend(tls());
    let mut plugins = vec!["NodeRestriction"];
    if features.pod_security.is_some() {
        flags.push(format!("--admission-control-config-file={}", paths::admission(minor)));
    } else {
        plugins.push("PodSecurityPolicy");
    }
    flags.push(format!("--enable-admission-plugins={}", plugins.join(",")));
    flags.push(if features.authentication_config.is_some() {
        format!("--authentication-config={}", paths::authentication(minor))
    } else {
        // RBAC leaves anonymous requests the health endpoints only.
        "--anonymous-auth=true".into()
    });
    if features.insecure_ports {
        flags.push("--insecure-port=0".into());
    }
    if features.shutdown_retry_after {
        flags.push("--shutdown-send-retry-after=true".into());
    }
    if features.shutdown_watch_grace {
        flags.push(format!(
            "--shutdown-watch-termination-grace-period={WATCH_GRACE_SECONDS}s"
        ));
    }
    if settings.members.len() > 1 {
        // Now and then a client is told to connect again, so that connections spread over machines.
        flags.push("--goaway-chance=0.001".into());
    }
    flags
}

fn leader_and_serving(kubeconfig: &str, port: u16, revision: u16, features: &Features) -> Vec<String> {
    let mut flags = vec![
        format!("--bind-address={}", ports::revision_address(revision)),
        format!("--secure-port={port}"),
        format!("--kubeconfig={kubeconfig}"),
        format!("--authentication-kubeconfig={kubeconfig}"),
        format!("--authorization-kubeconfig={kubeconfig}"),
        "--leader-elect=true".into(),
        "--profiling=false".into(),
    ];
    flags.extend(tls());
    if features.insecure_ports {
        flags.push("--port=0".into());
    }
    flags
}

/// kube-controller-manager's.
pub(crate) fn controller_manager(settings: &ControlPlaneSettings, features: &Features, revision: u16) -> Vec<String> {
    let network = &settings.network;
    let pki = paths::pki;
    let mut flags = leader_and_serving(
        paths::CONTROLLER_MANAGER_KUBECONFIG,
        ports::CONTROLLER_MANAGER,
        revision,
        features,
    );
    flags.extend([
        "--allocate-node-cidrs=true".into(),
        format!("--cluster-cidr={}", network.pods),
        format!("--node-cidr-mask-size={POD_RANGE_PREFIX}"),
        format!("--service-cluster-ip-range={}", network.services),
        format!("--cluster-name={}", settings.cluster),
        format!("--client-ca-file={}", paths::CA),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        format!("--cluster-signing-cert-file={}", paths::CA),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        format!("--root-ca-file={}", paths::CA),
        format!("--service-account-private-key-file={}", pki("sa.key")),
        "--use-service-account-credentials=true".into(),
        // Removes join tokens that have expired. (The bootstrap signer would sign a public `cluster-info`; there is none.)
        "--controllers=*,tokencleaner".into(),
        "--terminated-pod-gc-threshold=1000".into(),
    ]);
    flags
}

/// kube-scheduler's.
pub(crate) fn scheduler(features: &Features, revision: u16) -> Vec<String> {
    leader_and_serving(paths::SCHEDULER_KUBECONFIG, ports::SCHEDULER, revision, features)
}

/// etcd's, for the member on a machine. `cluster` lists members as `name=peer URL`.
pub(crate) fn etcd(
    features: EtcdFeatures,
    name: &str,
    host: &str,
    cluster: &[String],
    cluster_state: &str,
    token: &str,
) -> Vec<String> {
    let pki = |file: &str| format!("{}/{file}", paths::ETCD_PKI);
    let (client, peer) = (ports::ETCD_CLIENT, ports::ETCD_PEER);
    let mut flags = vec![
        format!("--name={name}"),
        format!("--data-dir={ETCD_DATA}"),
        format!("--listen-client-urls=https://127.0.0.1:{client},https://{host}:{client}"),
        format!("--advertise-client-urls=https://{host}:{client}"),
        format!("--listen-peer-urls=https://{host}:{peer}"),
        format!("--initial-advertise-peer-urls=https://{host}:{peer}"),
        format!("--initial-cluster={}", cluster.join(",")),
        format!("--initial-cluster-state={cluster_state}"),
        format!("--initial-cluster-token={token}"),
        format!("--listen-metrics-urls=http://127.0.0.1:{}", ports::ETCD_METRICS),
        "--client-cert-auth=true".into(),
        format!("--trusted-ca-file={}", pki("ca.crt")),
        format!("--cert-file={}", pki("server.crt")),
        format!("--key-file={}", pki("server.key")),
        "--peer-client-cert-auth=true".into(),
        format!("--peer-trusted-ca-file={}", pki("ca.crt")),
        format!("--peer-cert-file={}", pki("peer.crt")),
        format!("--peer-key-file={}", pki("peer.key")),
        format!("--cipher-suites={}", CIPHER_SUITES.join(",")),
        "--snapshot-count=10000".into(),
        features.initial_corrupt_check.into(),
    ];
    if features.logger_flag {
        flags.push("--logger=zap".into());
    }
    flags
}

/// Where etcd's container sees its data.
pub(crate) const ETCD_DATA: &str = "/var/lib/etcd";
