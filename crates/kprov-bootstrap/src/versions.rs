//! What each Kubernetes minor adds and removes among the flags, gates, API versions and configuration kinds that kprov
//! uses: one table, folded into [`Features`]. No other module compares versions.
//!
//! Sources: the CHANGELOG of each minor, and the programs' own `--help`, which the tests read where binaries are there.

use kprov_types::Minor;

/// The oldest minor that is supported.
pub const OLDEST: Minor = Minor::v1(20);
/// The newest minor this build knows.
pub const NEWEST: Minor = Minor::v1(37);

/// What a Kubernetes minor can do and wants, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "a table row: each is one independent fact about a minor"
)]
pub struct Features {
    /// API version of `PodDisruptionBudget`.
    pub pod_disruption_budget: &'static str,
    /// API version of `Eviction`, the body of `pods/eviction`.
    pub eviction: &'static str,
    /// API version of `EndpointSlice`.
    pub endpoint_slice: &'static str,
    /// CustomResourceDefinitions may carry rules in CEL (`x-kubernetes-validations`). An older API server refuses the field.
    pub validation_rules: bool,
    /// API version of Pod Security admission's configuration; without it, `PodSecurityPolicy` does the job.
    pub pod_security: Option<&'static str>,
    /// API version of an `AuthenticationConfiguration` that limits anonymous requests by path; without it, RBAC does.
    pub authentication_config: Option<&'static str>,
    /// A DaemonSet may start the new pod beside the old one (`maxSurge`).
    pub daemon_set_surge: bool,
    /// kube-apiserver has `--insecure-port`, and controller-manager and scheduler have `--port`, to be set to 0.
    pub insecure_ports: bool,
    /// kube-apiserver has `--shutdown-send-retry-after`.
    pub shutdown_retry_after: bool,
    /// kube-apiserver has `--shutdown-watch-termination-grace-period`.
    pub shutdown_watch_grace: bool,
    /// kubelet must be told `--container-runtime=remote`.
    pub kubelet_runtime_flag: bool,
    /// `KubeletConfiguration.containerRuntimeEndpoint` exists; else it's a flag.
    pub kubelet_endpoint_in_config: bool,
    /// `KubeletConfiguration.registerWithTaints` exists; else it's a flag.
    pub kubelet_taints_in_config: bool,
    /// kubelet has `--pod-infra-container-image`.
    pub kubelet_pause_flag: bool,
    /// `KubeletConfiguration.seccompDefault` exists and works without a feature gate.
    pub kubelet_seccomp_default: bool,
    /// `KubeletConfiguration.failCgroupV1` exists.
    pub kubelet_fail_cgroup_v1: bool,
}

/// Kubernetes 1.20, where the table starts.
const BASE: Features = Features {
    pod_disruption_budget: "policy/v1beta1",
    eviction: "policy/v1beta1",
    endpoint_slice: "discovery.k8s.io/v1beta1",
    validation_rules: false,
    pod_security: None,
    authentication_config: None,
    daemon_set_surge: false,
    insecure_ports: true,
    shutdown_retry_after: false,
    shutdown_watch_grace: false,
    kubelet_runtime_flag: true,
    kubelet_endpoint_in_config: false,
    kubelet_taints_in_config: false,
    kubelet_pause_flag: true,
    kubelet_seccomp_default: false,
    kubelet_fail_cgroup_v1: false,
};

/// One change, and the minor (of major 1) that brought it.
type Change = (u64, fn(&mut Features));

/// The table, in order of minors. Minors without a row change nothing that is used here.
const CHANGES: &[Change] = &[
    // policy/v1beta1 goes in 1.25.
    (21, |f| f.pod_disruption_budget = "policy/v1"),
    // discovery.k8s.io/v1beta1 goes in 1.25.
    (21, |f| f.endpoint_slice = "discovery.k8s.io/v1"),
    (22, |f| f.eviction = "policy/v1"),
    // KEP-1591: beta and on by default.
    (22, |f| f.daemon_set_surge = true),
    (22, |f| f.shutdown_retry_after = true),
    // KEP-2579: beta and on by default. PodSecurityPolicy is there until 1.24.
    (23, |f| {
        f.pod_security = Some("pod-security.admission.config.k8s.io/v1beta1");
    }),
    (23, |f| f.kubelet_taints_in_config = true),
    // The flags themselves are gone.
    (24, |f| f.insecure_ports = false),
    // dockershim is gone, `remote` is all there is; the flag goes in 1.27.
    (24, |f| f.kubelet_runtime_flag = false),
    // v1beta1 of it stays for a while.
    (25, |f| f.pod_security = Some("pod-security.admission.config.k8s.io/v1")),
    // KEP-2876: beta and on by default.
    (25, |f| f.validation_rules = true),
    // KEP-2413: beta and on by default.
    (25, |f| f.kubelet_seccomp_default = true),
    (27, |f| f.kubelet_endpoint_in_config = true),
    (27, |f| f.shutdown_watch_grace = true),
    // KEP-4569. The default turns to `true` in 1.35.
    (31, |f| f.kubelet_fail_cgroup_v1 = true),
    // KEP-4633: `anonymous.conditions` is beta and on by default (alpha, and off, in 1.31).
    (32, |f| {
        f.authentication_config = Some("apiserver.config.k8s.io/v1beta1");
    }),
    (34, |f| f.authentication_config = Some("apiserver.config.k8s.io/v1")),
    (35, |f| f.kubelet_pause_flag = false),
];

/// A minor that kprov can't run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Kubernetes {minor} is not supported; the oldest that is, is {OLDEST}")]
pub struct Unsupported {
    /// The minor asked for.
    pub minor: Minor,
}

/// How well a minor is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It's in the table.
    Known,
    /// It came after this build, which treats it as [`NEWEST`]. Whoever starts a cluster with it should warn.
    NewerThanKnown,
}

/// Whether a minor is supported.
pub fn support(minor: Minor) -> Result<Support, Unsupported> {
    if minor < OLDEST {
        Err(Unsupported { minor })
    } else if minor > NEWEST {
        Ok(Support::NewerThanKnown)
    } else {
        Ok(Support::Known)
    }
}

impl Features {
    /// The features of a minor; of [`NEWEST`] for newer ones.
    pub fn of(minor: Minor) -> Result<Self, Unsupported> {
        support(minor)?;
        let mut features = BASE;
        // Table rows are of major 1. A later major is newer than known.
        let upto = if minor > NEWEST { NEWEST.minor } else { minor.minor };
        for (_, change) in CHANGES.iter().take_while(|(since, _)| *since <= upto) {
            change(&mut features);
        }
        Ok(features)
    }
}

/// What an etcd release line can do and wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EtcdFeatures {
    /// The flag that compares members' data when etcd starts.
    pub initial_corrupt_check: &'static str,
    /// The log is structured only when asked for (`--logger=zap`).
    pub logger_flag: bool,
    /// `/health?serializable=true` answers without a quorum: fit for liveness.
    pub serializable_health: bool,
}

impl EtcdFeatures {
    /// The features of an etcd version as it prints it (`3.5.30`); of 3.4's, which newer lines accept until 3.6, where
    /// it isn't known.
    pub fn of(version: Option<&str>) -> Self {
        let mut numbers = version
            .unwrap_or_default()
            .trim_start_matches('v')
            .split('.')
            .map(|n| n.parse().unwrap_or(0));
        let line = (numbers.next().unwrap_or(0_u32), numbers.next().unwrap_or(0_u32));
        Self {
            // 3.6 turned experimental flags into feature gates.
            initial_corrupt_check: if line >= (3, 6) {
                "--feature-gates=InitialCorruptCheck=true"
            } else {
                "--experimental-initial-corrupt-check=true"
            },
            logger_flag: line < (3, 5),
            serializable_health: line >= (3, 5),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_order() {
        assert!(CHANGES.is_sorted_by_key(|(since, _)| *since));
        assert!(
            CHANGES
                .iter()
                .all(|(since, _)| (OLDEST.minor..=NEWEST.minor).contains(since))
        );
    }

    #[test]
    fn refuses_older_and_tells_newer() {
        assert_eq!(support(Minor::v1(19)), Err(Unsupported { minor: Minor::v1(19) }));
        assert_eq!(support(Minor { major: 0, minor: 40 }).unwrap_err().minor.major, 0);
        assert_eq!(support(Minor::v1(20)), Ok(Support::Known));
        assert_eq!(support(Minor::v1(37)), Ok(Support::Known));
        for newer in [Minor::v1(38), Minor { major: 2, minor: 0 }] {
            assert_eq!(support(newer), Ok(Support::NewerThanKnown));
            assert_eq!(Features::of(newer), Features::of(NEWEST));
        }
    }

    #[test]
    fn each_minor() {
        let of = |minor| Features::of(Minor::v1(minor)).unwrap();
        for minor in 20..=37 {
            let f = of(minor);
            assert_eq!(f.pod_security.is_some(), minor >= 23, "{minor}");
            assert_eq!(f.authentication_config.is_some(), minor >= 32, "{minor}");
            assert_eq!(f.daemon_set_surge, minor >= 22, "{minor}");
            assert_eq!(f.insecure_ports, minor <= 23, "{minor}");
            assert_eq!(f.kubelet_runtime_flag, minor <= 23, "{minor}");
            assert_eq!(f.kubelet_endpoint_in_config, minor >= 27, "{minor}");
            assert_eq!(f.kubelet_pause_flag, minor <= 34, "{minor}");
            assert_eq!(f.kubelet_fail_cgroup_v1, minor >= 31, "{minor}");
            assert_eq!(f.endpoint_slice == "discovery.k8s.io/v1", minor >= 21, "{minor}");
            assert_eq!(f.eviction == "policy/v1", minor >= 22, "{minor}");
            assert_eq!(f.validation_rules, minor >= 25, "{minor}");
        }
        assert_eq!(of(20).pod_disruption_budget, "policy/v1beta1");
        assert_eq!(
            of(24).pod_security,
            Some("pod-security.admission.config.k8s.io/v1beta1")
        );
        assert_eq!(of(33).authentication_config, Some("apiserver.config.k8s.io/v1beta1"));
        assert_eq!(of(34).authentication_config, Some("apiserver.config.k8s.io/v1"));
    }

    #[test]
    fn etcd_lines() {
        assert!(EtcdFeatures::of(Some("3.4.23")).logger_flag);
        assert_eq!(EtcdFeatures::of(None), EtcdFeatures::of(Some("3.4.23")));
        assert!(EtcdFeatures::of(Some("v3.5.30")).serializable_health);
        assert!(
            EtcdFeatures::of(Some("3.5.30"))
                .initial_corrupt_check
                .starts_with("--experimental")
        );
        assert!(
            EtcdFeatures::of(Some("3.6.1"))
                .initial_corrupt_check
                .starts_with("--feature-gates")
        );
        assert!(!EtcdFeatures::of(Some("3.10.0")).logger_flag);
    }
}
