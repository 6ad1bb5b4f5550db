//! Each finding, present and absent, by name.

mod machines;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kprov_types::api::{
    ApiServerStatus, CertificateExpiry, EtcdStatus, MachineStatus, ProgramStatus, ReleaseRef, StagedStatus,
};
use kprov_types::machine::Endpoint;
use kprov_types::node::{ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::release::{
    API_VERSION, Arch, FileSource, HostFile, ImageComponent, ProgramFacts, Release, ReleaseImage,
};
use kprov_types::{ClusterName, Digest, Role};

use super::super::{
    ApiRequest, BudgetOverlap, BudgetSeen, Budgets, Hop, NodeSeen, PodSeen, ProgramSeen, RefusedWrite, StoredObjects,
    WebhookKind, WebhookSeen,
};
use super::*;

fn name(text: &str) -> MachineName {
    MachineName::new(text).unwrap()
}

fn reference(version: &str) -> ReleaseRef {
    let bytes: Vec<u8> = version.bytes().chain(std::iter::repeat(0)).take(32).collect();
    ReleaseRef {
        version: version.parse().unwrap(),
        digest: Digest::from_bytes(bytes.try_into().unwrap()),
    }
}

/// A release whose programs know flags `stays` and gates `Stays`, `AllBeta`, and everything kprov sets is unknown to them.
fn manifest(version: &str) -> Release {
    let image = |component: ImageComponent| ReleaseImage {
        reference: format!("kprov.local/{}:v{version}", component.as_str()),
        digest: Digest::from_bytes([1; 32]),
        version: None,
    };
    let components = [
        ImageComponent::KubeApiserver,
        ImageComponent::KubeControllerManager,
        ImageComponent::KubeScheduler,
        ImageComponent::KubeProxy,
    ];
    let facts = ProgramFacts {
        flags: vec!["feature-gates".into(), "stays".into()],
        feature_gates: vec!["AllBeta".into(), "Stays".into()],
    };
    Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: version.parse().unwrap(),
        images: components.into_iter().map(|c| (c, image(c))).collect(),
        host_files: vec![HostFile {
            name: "kubelet".into(),
            arch: Arch::Amd64,
            digest: Digest::from_bytes([2; 32]),
            size: 200 << 20,
            source: FileSource::Carried,
            version: None,
        }],
        minimum_from: None,
        advisories: Vec::new(),
        programs: components
            .into_iter()
            .map(|c| (c.as_str().to_owned(), facts.clone()))
            .collect(),
    }
}

fn hop(version: &str) -> Hop {
    Hop {
        release: reference(version),
        manifest: manifest(version),
    }
}

fn settings(version: &str) -> ControlPlaneSettings {
    ControlPlaneSettings {
        cluster: ClusterName::new("demo").unwrap(),
        kubernetes: version.parse().unwrap(),
        release: manifest(version),
        release_digest: reference(version).digest,
        endpoint: Endpoint {
            host: "10.77.0.1".into(),
            port: 6443,
        },
        network: NodeNetwork {
            pods: "10.244.0.0/16".parse().unwrap(),
            services: "10.96.0.0/16".parse().unwrap(),
            dns_domain: "cluster.local".into(),
        },
        members: vec![Member {
            name: name("cp-0"),
            address: IpAddr::from([10, 77, 0, 10]),
        }],
        etcd_exists: true,
    }
}

/// A machine where all is well.
fn machine(role: Role, version: &str) -> MachineStatus {
    let control_plane = role == Role::ControlPlane;
    MachineStatus {
        role: Some(role),
        kprov_node: Some(ProgramStatus {
            version: "0.1.0".into(),
            digest: Digest::from_bytes([3; 32]),
        }),
        running: Some(reference(version)),
        etcd: control_plane.then(|| EtcdStatus {
            healthy: true,
            members: 1,
            database_mib: 100,
            ..EtcdStatus::default()
        }),
        api_servers: if control_plane {
            vec![ApiServerStatus {
                revision: 2,
                ready: true,
                version: version.into(),
                since: None,
            }]
        } else {
            Vec::new()
        },
        disk_free_mib: Some(100 << 10),
        certificate_expires: Some(CertificateExpiry {
            path: "/etc/kubernetes/pki/apiserver.crt".into(),
            time: "2027-05-01T00:00:00Z".parse().unwrap(),
        }),
        ..MachineStatus::default()
    }
}

fn node(role: Role, version: &str) -> NodeSeen {
    NodeSeen {
        role,
        ready: true,
        closed: false,
        kubelet: Some(version.parse().unwrap()),
    }
}

/// One control-plane machine, two workers, all well, and a way over `hops`.
fn inputs(current: &str, hops: &[&str]) -> Inputs {
    let roles = [
        ("cp-0", Role::ControlPlane),
        ("w-0", Role::Worker),
        ("w-1", Role::Worker),
    ];
    Inputs {
        current: reference(current),
        hops: hops.iter().map(|version| hop(version)).collect(),
        machines: roles
            .iter()
            .map(|(n, role)| (name(n), machine(*role, current)))
            .collect(),
        nodes: roles.iter().map(|(n, role)| (name(n), node(*role, current))).collect(),
        now: "2026-05-01T12:00:00Z".parse().unwrap(),
    }
}

fn facts(current: &str) -> Facts {
    Facts {
        programs: Ok(Vec::new()),
        settings: Ok(Box::new(settings(current))),
        requests: Ok(Vec::new()),
        stored: Ok(Vec::new()),
        budgets: Ok(Budgets::default()),
        webhooks: Ok(Vec::new()),
        refused: Ok(Vec::new()),
    }
}

/// The names of findings, those that block with a `!`.
fn names(findings: &[Finding]) -> Vec<String> {
    for finding in findings {
        assert!(!finding.message.is_empty() && !finding.hint.is_empty(), "{finding:?}");
    }
    let unique: BTreeSet<_> = findings.iter().map(|finding| &finding.name).collect();
    assert_eq!(unique.len(), findings.len(), "{findings:#?}");
    findings
        .iter()
        .map(|f| format!("{}{}", f.name, if f.blocks { "!" } else { "" }))
        .collect()
}

/// What is found after a change of a cluster where all is well, on the way from 1.34.9 to 1.36.3.
fn found(change: impl FnOnce(&mut Facts, &mut Inputs)) -> Vec<String> {
    names(&findings(change))
}

fn findings(change: impl FnOnce(&mut Facts, &mut Inputs)) -> Vec<Finding> {
    let (mut facts, mut inputs) = (facts("1.34.9"), inputs("1.34.9", &["1.35.6", "1.36.3"]));
    change(&mut facts, &mut inputs);
    let findings = judge(&facts, &inputs);
    assert_eq!(findings, judge(&facts, &inputs));
    findings
}

fn cp(inputs: &mut Inputs) -> &mut MachineStatus {
    inputs.machines.get_mut(&name("cp-0")).unwrap()
}

const NOTHING: [&str; 0] = [];

#[test]
fn nothing_stands_against_a_cluster_that_is_well() {
    assert_eq!(found(|_, _| ()), NOTHING);
}

#[test]
fn what_could_not_be_checked_is_told_and_blocks_nothing() {
    let why = || Unchecked("it took longer than 60 s".into());
    let all = found(|facts, _| {
        *facts = Facts {
            programs: Err(why()),
            settings: Err(why()),
            requests: Err(why()),
            stored: Err(why()),
            budgets: Err(why()),
            webhooks: Err(why()),
            refused: Err(why()),
        };
    });
    assert_eq!(
        all,
        [
            "unchecked/flags",
            "unchecked/requested-apis",
            "unchecked/stored-apis",
            "unchecked/pod-disruption-budgets",
            "unchecked/webhooks",
            "unchecked/admission",
        ]
    );
    assert_eq!(found(|facts, _| facts.settings = Err(why())), ["unchecked/flags"]);
}

#[test]
fn newer_versions_than_known_are_told() {
    let found = found(|_, inputs| inputs.hops.push(hop("1.38.0")));
    assert_eq!(found, ["unknown-version/1.38.0"]);
}

fn program(flags: &[&str]) -> ProgramSeen {
    ProgramSeen {
        name: "kube-apiserver".into(),
        version: Some("1.34.9".parse().unwrap()),
        flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
    }
}

#[test]
fn flags_and_gates_that_go() {
    let with = |flags: &[&str]| {
        found(|facts, _| {
            // Today's version still lists them.
            let mut settings = settings("1.34.9");
            let today = settings.release.programs.get_mut("kube-apiserver").unwrap();
            today.flags.push("goes".into());
            today.feature_gates.push("Goes".into());
            facts.settings = Ok(Box::new(settings));
            facts.programs = Ok(vec![program(flags)]);
        })
    };
    assert_eq!(
        with(&[
            "--secure-port=6443",
            "--stays=1",
            "--feature-gates=Stays=true,kube:AllBeta=false"
        ]),
        NOTHING
    );
    assert_eq!(with(&["--goes=1"]), ["removed-flag/kube-apiserver/goes!"]);
    assert_eq!(
        with(&["--feature-gates=Stays=true,kube:Goes=true"]),
        ["removed-feature-gate/kube-apiserver/Goes!"]
    );
    // Hidden today already: it may be taken or not.
    assert_eq!(with(&["--hidden=1"]), ["removed-flag/kube-apiserver/hidden"]);
    // What kprov sets is its own business, whatever the program lists, and whatever people have made of it.
    assert_eq!(
        with(&["--allow-privileged=true", "--etcd-servers=https://elsewhere:2379"]),
        NOTHING
    );
}

/// What is found of an API server's flags on the way from 1.23 to 1.25.
fn found_in_old(flags: &[&str]) -> Vec<String> {
    let mut facts = facts("1.23.1");
    facts.programs = Ok(vec![ProgramSeen {
        version: None,
        ..program(flags)
    }]);
    names(&judge(&facts, &inputs("1.23.1", &["1.24.1", "1.25.1"])))
}

#[test]
fn flags_that_kprov_stops_setting() {
    assert_eq!(found_in_old(&["--insecure-port=0", "--anonymous-auth=true"]), NOTHING);
    // People's value is carried over, to where there is no such flag.
    assert_eq!(
        found_in_old(&["--insecure-port=8080"]),
        ["removed-flag/kube-apiserver/insecure-port"]
    );
}

#[test]
fn admission_plugins_that_go() {
    assert_eq!(found_in_old(&["--enable-admission-plugins=NodeRestriction"]), NOTHING);
    assert_eq!(
        found_in_old(&["--enable-admission-plugins=NodeRestriction,PodSecurityPolicy,SecurityContextDeny"]),
        ["removed-admission-plugin/kube-apiserver/enable-admission-plugins/PodSecurityPolicy!"]
    );
    let disabled = found_in_old(&["--disable-admission-plugins=PodSecurityPolicy"]);
    assert!(
        disabled
            .contains(&"removed-admission-plugin/kube-apiserver/disable-admission-plugins/PodSecurityPolicy!".into()),
        "{disabled:?}"
    );
    // kprov's own, which it takes out in time.
    let mut old = facts("1.20.2");
    let own = "--enable-admission-plugins=NodeRestriction,PodSecurityPolicy";
    old.programs = Ok(vec![ProgramSeen {
        version: None,
        ..program(&[own])
    }]);
    let way = inputs("1.20.2", &["1.21.1", "1.22.1", "1.23.1", "1.24.1", "1.25.1"]);
    assert_eq!(names(&judge(&old, &way)), NOTHING);
}

#[test]
fn releases_that_do_not_tell_their_flags() {
    let forget = |flags: &[&str]| {
        found(|facts, inputs| {
            facts.programs = Ok(vec![program(flags)]);
            inputs.hops[1].manifest.programs.clear();
        })
    };
    assert_eq!(
        forget(&["--bind-address=127.64.0.9", "--allow-privileged=true"]),
        NOTHING
    );
    assert_eq!(forget(&["--stays=1"]), ["unchecked/flags/kube-apiserver"]);
}

fn request(group: &str, version: &str, resource: &str, removed: u64, verbs: &[&str]) -> ApiRequest {
    ApiRequest {
        group: group.into(),
        version: version.into(),
        resource: resource.into(),
        removed,
        verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
    }
}

#[test]
fn requests_for_apis_that_go() {
    let asked = |group: &str, version: &str, resource: &str, removed, verbs: &[&str]| {
        let mut facts = facts("1.20.2");
        facts.requests = Ok(vec![request(group, version, resource, removed, verbs)]);
        names(&judge(
            &facts,
            &inputs("1.20.2", &["1.21.1", "1.22.1", "1.23.1", "1.24.1", "1.25.1"]),
        ))
    };
    assert_eq!(
        asked("rbac.authorization.k8s.io", "v1beta1", "roles", 22, &["LIST"]),
        ["requested-api/rbac.authorization.k8s.io/v1beta1/roles!"]
    );
    let cases: [(&str, &[&str], bool); 8] = [
        // Controllers and kprov itself.
        ("poddisruptionbudgets", &["LIST", "WATCH", "APPLY"], false),
        ("poddisruptionbudgets/status", &["PUT"], false),
        // People.
        ("poddisruptionbudgets", &["LIST", "WATCH", "POST"], true),
        ("poddisruptionbudgets", &["PATCH"], true),
        // It could not be told who.
        ("poddisruptionbudgets", &[], true),
        ("podsecuritypolicies", &["LIST", "WATCH"], false),
        ("podsecuritypolicies", &["DELETE"], true),
        ("unheard", &["LIST"], true),
    ];
    for (resource, verbs, told) in cases {
        let found = asked("policy", "v1beta1", resource, 25, verbs);
        let expected = if told {
            vec![format!("requested-api/policy/v1beta1/{resource}!")]
        } else {
            Vec::new()
        };
        assert_eq!(found, expected, "{resource} {verbs:?}");
    }
    assert_eq!(
        asked("discovery.k8s.io", "v1beta1", "endpointslices", 25, &["POST", "PUT"]),
        NOTHING
    );
    assert_eq!(asked("batch", "v1beta1", "cronjobs/status", 25, &["PUT"]), NOTHING);
    assert_eq!(
        asked("batch", "v1beta1", "cronjobs", 25, &["GET", "PUT"]),
        ["requested-api/batch/v1beta1/cronjobs!"]
    );
    // Beyond the way.
    assert_eq!(
        asked("autoscaling", "v2beta2", "horizontalpodautoscalers", 26, &["POST"]),
        NOTHING
    );
}

#[test]
fn objects_of_apis_that_go() {
    let stored = |api_version: &str, resource: &str| StoredObjects {
        api_version: api_version.into(),
        resource: resource.into(),
        count: 12,
        examples: ["a", "b", "c", "d", "e", "f"].map(str::to_owned).into(),
    };
    let mut facts = facts("1.24.1");
    facts.stored = Ok(vec![
        stored("batch/v1beta1", "cronjobs"),
        stored("policy/v1beta1", "podsecuritypolicies"),
    ]);
    let found = judge(&facts, &inputs("1.24.1", &["1.25.1"]));
    assert_eq!(
        names(&found),
        [
            "stored-api/batch/v1beta1/cronjobs",
            "removed-api/policy/v1beta1/podsecuritypolicies!"
        ]
    );
    assert!(
        found[0].message.starts_with("12 objects") && found[0].message.ends_with("a, b, c, d, e and 7 more"),
        "{found:?}"
    );
    assert!(found[0].hint.contains("`batch/v1` (there since 1.21)"), "{found:?}");
    assert!(
        found[1].hint.contains("pod-security.kubernetes.io/enforce"),
        "{found:?}"
    );
}

fn budget(desired: i64, expected: i64, machine: &str) -> BudgetSeen {
    BudgetSeen {
        name: "shop/web".into(),
        healthy: 2,
        desired,
        expected,
        pods: vec![PodSeen {
            name: "web-1".into(),
            machine: name(machine),
        }],
        more: false,
    }
}

#[test]
fn budgets_that_hold_drains_up() {
    let with = |budget: BudgetSeen, change: fn(&mut Inputs)| {
        found(|facts, inputs| {
            facts.budgets = Ok(Budgets {
                closed: vec![budget],
                overlaps: Vec::new(),
            });
            change(inputs);
        })
    };
    let blocked = ["pod-disruption-budget/shop/web!"];
    assert_eq!(with(budget(2, 2, "w-0"), |_| ()), blocked);
    // It would allow one if all were healthy.
    assert_eq!(with(budget(2, 3, "w-0"), |_| ()), ["pod-disruption-budget/shop/web"]);
    // Its controller has not come to it, or can't.
    assert_eq!(with(budget(0, 0, "w-0"), |_| ()), ["pod-disruption-budget/shop/web"]);
    // The machine is updated already.
    let updated =
        |inputs: &mut Inputs| inputs.machines.get_mut(&name("w-0")).unwrap().running = Some(reference("1.36.3"));
    assert_eq!(with(budget(2, 2, "w-0"), updated), NOTHING);
    // Nobody else could take the pod, so it stays while its machine is updated.
    let alone = |inputs: &mut Inputs| inputs.nodes.retain(|node, _| *node == name("w-0"));
    assert_eq!(with(budget(2, 2, "w-0"), alone), NOTHING);
    let all_closed = |inputs: &mut Inputs| inputs.nodes.values_mut().for_each(|node| node.closed = true);
    assert_eq!(with(budget(2, 2, "w-0"), all_closed), NOTHING);
}

#[test]
fn pods_with_two_budgets() {
    let overlap = |machine: &str| BudgetOverlap {
        namespace: "shop".into(),
        budgets: ["a".into(), "b".into()],
        pod: PodSeen {
            name: "web-1".into(),
            machine: name(machine),
        },
    };
    let with = |machine: &str| {
        found(|facts, _| {
            facts.budgets = Ok(Budgets {
                closed: Vec::new(),
                overlaps: vec![overlap(machine)],
            });
        })
    };
    assert_eq!(with("w-0"), ["overlapping-budgets/shop/a/b!"]);
    assert_eq!(with("elsewhere"), NOTHING);
}

#[test]
fn webhooks_and_admission() {
    let with = |backends: &[(&str, usize)]| {
        let backends: BTreeMap<String, usize> = backends
            .iter()
            .map(|(node, count)| ((*node).to_owned(), *count))
            .collect();
        found(|facts, _| {
            facts.webhooks = Ok(vec![WebhookSeen {
                kind: WebhookKind::Validating,
                configuration: "policy".into(),
                name: "check.example.com".into(),
                intercepts: vec!["pods in kube-system".into()],
                service: "policy/webhook".into(),
                backends,
            }]);
        })
    };
    let told = ["webhook/validating/policy/check.example.com"];
    assert_eq!(with(&[]), told);
    assert_eq!(with(&[("w-0", 2)]), told);
    assert_eq!(with(&[("w-0", 1), ("w-1", 1)]), NOTHING);
    let refused = found(|facts, _| {
        facts.refused = Ok(vec![RefusedWrite {
            object: "DaemonSet kube-system/kube-apiserver".into(),
            message: "no".into(),
        }]);
    });
    assert_eq!(refused, ["admission/DaemonSet/kube-system/kube-apiserver!"]);
}
