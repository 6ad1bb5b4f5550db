//! Findings about machines, and skew.

use super::*;

#[test]
fn skew() {
    let kubelet = |version: &'static str| {
        found(move |_, inputs| inputs.nodes.get_mut(&name("w-0")).unwrap().kubelet = Some(version.parse().unwrap()))
    };
    assert_eq!(kubelet("1.35.0"), ["skew/kubelet/w-0!"]);
    assert_eq!(kubelet("1.34.1"), NOTHING);
    assert_eq!(kubelet("1.31.0"), ["skew/kubelets-behind"]);
    assert_eq!(kubelet("1.30.0"), ["skew/kubelet/w-0!"]);
    let servers = |versions: &'static [&'static str]| {
        found(move |facts, inputs| {
            facts.programs = Ok(vec![ProgramSeen {
                name: "kube-scheduler".into(),
                ..program(&[])
            }]);
            cp(inputs).api_servers = versions
                .iter()
                .map(|version| ApiServerStatus {
                    revision: 2,
                    ready: true,
                    version: (*version).into(),
                    since: None,
                })
                .collect();
        })
    };
    assert_eq!(servers(&["v1.34.9"]), NOTHING);
    assert_eq!(servers(&[]), NOTHING);
    assert_eq!(
        servers(&["v1.34.9", "v1.35.6"]),
        ["skew/kube-apiserver", "skew/kubelets-behind"]
    );
    assert_eq!(
        servers(&["v1.34.9", "v1.36.3"]),
        ["skew/kube-apiserver!", "skew/kubelets-behind", "skew/kube-scheduler!"]
    );
    assert_eq!(
        servers(&["v1.33.0"]),
        [
            "skew/kubelet/cp-0!",
            "skew/kubelet/w-0!",
            "skew/kubelet/w-1!",
            "skew/kube-scheduler!"
        ]
    );
}

#[test]
fn old_kubelets_may_be_two_behind_before_1_28() {
    let judge = |kubelet: &str| {
        let mut inputs = inputs("1.27.1", &["1.28.1"]);
        inputs.nodes.get_mut(&name("w-0")).unwrap().kubelet = Some(kubelet.parse().unwrap());
        names(&judge(&facts("1.27.1"), &inputs))
    };
    assert_eq!(judge("1.25.1"), ["skew/kubelets-behind"]);
    assert_eq!(judge("1.24.1"), ["skew/kubelet/w-0!"]);
}

#[test]
fn etcd() {
    let etcd = |change: fn(&mut EtcdStatus)| found(move |_, inputs| change(cp(inputs).etcd.as_mut().unwrap()));
    assert_eq!(found(|_, inputs| cp(inputs).etcd = None), ["etcd/cp-0!"]);
    assert_eq!(etcd(|etcd| etcd.healthy = false), ["etcd/cp-0!"]);
    assert_eq!(etcd(|etcd| etcd.alarms = vec!["NOSPACE".into()]), ["etcd/cp-0!"]);
    assert_eq!(etcd(|etcd| etcd.members = 2), ["etcd/members!"]);
    assert_eq!(etcd(|etcd| etcd.database_mib = 1550), NOTHING);
    assert_eq!(etcd(|etcd| etcd.database_mib = 1600), ["etcd-size/cp-0"]);
    assert_eq!(etcd(|etcd| etcd.database_mib = 1900), ["etcd-size/cp-0!"]);
    // What nobody knows of etcd is dangerous.
    assert_eq!(
        found(|_, inputs| drop(inputs.machines.remove(&name("cp-0")))),
        ["machine-silent/cp-0!", "etcd/cp-0!"]
    );
}

#[test]
fn disks() {
    let free = |machine: &'static str, mib: u64| {
        found(move |_, inputs| inputs.machines.get_mut(&name(machine)).unwrap().disk_free_mib = Some(mib))
    };
    // 200 MiB of programs, and images, of two releases.
    assert_eq!(free("cp-0", 2447), ["disk/cp-0!"]);
    assert_eq!(free("cp-0", 2448), NOTHING);
    assert_eq!(free("w-0", 711), ["disk/w-0!"]);
    assert_eq!(free("w-0", 712), NOTHING);
    let staged = found(|_, inputs| {
        let status = cp(inputs);
        status.disk_free_mib = Some(1224);
        status.staged = vec![StagedStatus {
            release: reference("1.35.6"),
            ready: true,
            message: String::new(),
            bad: false,
        }];
    });
    assert_eq!(staged, NOTHING);
    let unknown = findings(|_, inputs| {
        inputs.hops.truncate(1);
        inputs.hops[0].manifest.host_files.clear();
        cp(inputs).disk_free_mib = Some(2047);
    });
    assert_eq!(names(&unknown), ["disk/cp-0!"]);
    assert!(
        unknown[0].message.contains("2047 MiB") && unknown[0].message.contains("2048 MiB"),
        "{unknown:?}"
    );
    assert_eq!(found(|_, inputs| cp(inputs).disk_free_mib = None), NOTHING);
}

#[test]
fn certificates() {
    let expires = |time: &'static str| {
        found(move |_, inputs| cp(inputs).certificate_expires.as_mut().unwrap().time = time.parse().unwrap())
    };
    assert_eq!(expires("2026-06-01T00:00:00Z"), NOTHING);
    assert_eq!(expires("2026-05-30T00:00:00Z"), ["certificate/cp-0"]);
    assert_eq!(expires("2026-05-02T00:00:00Z"), ["certificate/cp-0!"]);
    assert_eq!(expires("2026-04-30T00:00:00Z"), ["certificate/cp-0!"]);
}

#[test]
fn nodes_that_are_not_ready() {
    let not_ready =
        |machine: &'static str| found(move |_, inputs| inputs.nodes.get_mut(&name(machine)).unwrap().ready = false);
    assert_eq!(not_ready("cp-0"), ["node-not-ready/cp-0!"]);
    assert_eq!(not_ready("w-0"), ["node-not-ready/w-0"]);
}

#[test]
fn machines_that_tell_nothing() {
    assert_eq!(
        found(|_, inputs| drop(inputs.machines.remove(&name("w-0")))),
        ["machine-silent/w-0!"]
    );
    let empty = found(|_, inputs| drop(inputs.machines.insert(name("w-0"), MachineStatus::default())));
    assert_eq!(empty, ["machine-silent/w-0!"]);
    // A Machine without a Node is nobody's.
    assert_eq!(
        found(|_, inputs| drop(inputs.machines.insert(name("gone"), MachineStatus::default()))),
        NOTHING
    );
}

#[test]
fn of_many_machines_the_last_are_told_as_one() {
    let many = findings(|_, inputs| {
        for index in 0..1000 {
            let machine_name = name(&format!("x-{index:04}"));
            inputs
                .machines
                .insert(machine_name.clone(), machine(Role::Worker, "1.34.9"));
            let node = NodeSeen {
                ready: false,
                ..node(Role::Worker, "1.34.9")
            };
            inputs.nodes.insert(machine_name, node);
        }
        inputs.nodes.get_mut(&name("cp-0")).unwrap().ready = false;
    });
    assert_eq!(many.len(), MOST);
    assert_eq!(many[0].name, "node-not-ready/cp-0");
    assert!(many[0].blocks);
    let last = many.last().unwrap();
    assert_eq!((last.name.as_str(), last.blocks), ("node-not-ready/others", false));
    assert!(last.message.starts_with("982 machines more: x-0018, "), "{last:?}");
}
