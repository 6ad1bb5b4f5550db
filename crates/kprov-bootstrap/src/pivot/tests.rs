use super::*;

fn machine(name: &str) -> MachineName {
    MachineName::new(name).unwrap()
}

fn expectation() -> Expectation {
    Expectation {
        control_plane: vec![machine("cp-0"), machine("cp-1")],
        workers: vec![machine("w-0")],
        coredns: true,
        operator: true,
        started: BTreeMap::new(),
    }
}

fn pod(component: &str, node: &str, mirror: bool, revision: Option<u16>) -> PodSeen {
    PodSeen {
        component: component.into(),
        node: Some(node.into()),
        mirror,
        ready: true,
        revision,
        started: Some(Timestamp::from_second(1000).unwrap()),
    }
}

fn finished() -> Observation {
    let node = |name: &str, control_plane| NodeSeen {
        name: name.into(),
        ready: Ok(()),
        control_plane,
        kubelet_answers: true,
    };
    let mut pods = Vec::new();
    for name in ["cp-0", "cp-1"] {
        pods.push(pod("etcd", name, true, None));
        pods.push(pod("kube-apiserver", name, false, Some(2)));
    }
    pods.extend(["cp-0", "cp-1", "w-0"].map(|name| pod("kube-proxy", name, false, None)));
    let deployment = |name: &str| DeploymentSeen {
        name: name.into(),
        wanted: 2,
        available: 2,
    };
    let daemon_set = |name: &str, ready| DaemonSetSeen {
        name: name.into(),
        ready,
    };
    Observation {
        nodes: vec![node("cp-0", true), node("cp-1", true), node("w-0", false)],
        pods,
        deployments: vec![
            deployment("kube-controller-manager"),
            deployment("kube-scheduler"),
            deployment("coredns"),
            deployment("kprov-operator"),
        ],
        daemon_sets: vec![daemon_set("kube-apiserver", 2), daemon_set("kube-proxy", 3)],
    }
}

fn waiting(edit: impl FnOnce(&mut Observation)) -> Vec<Waiting> {
    let mut seen = finished();
    edit(&mut seen);
    judge(&expectation(), &seen).waiting
}

#[test]
fn nothing_missing_is_done() {
    assert_eq!(waiting(|_| ()), []);
    // A later revision, after upgrades, is as good; and what nobody expects doesn't matter.
    assert_eq!(
        waiting(|o| o.pods.iter_mut().for_each(|p| p.revision = p.revision.map(|_| 9))),
        []
    );
    assert_eq!(waiting(|o| o.pods.push(pod("kube-proxy", "stranger", true, None))), []);
}

#[test]
fn an_empty_cluster_waits_for_everything() {
    let all = judge(&expectation(), &Observation::default()).waiting;
    for name in ["cp-0", "cp-1", "w-0"] {
        assert!(all.contains(&Waiting::Node(machine(name))));
        assert!(all.contains(&Waiting::KubeProxy(machine(name))));
    }
    assert!(all.contains(&Waiting::ApiServer(machine("cp-1"))));
    assert!(all.contains(&Waiting::StaticPods(machine("cp-1"))));
    assert!(all.contains(&Waiting::Deployment {
        name: "kube-scheduler",
        available: 0,
        wanted: 1
    }));
}

#[test]
fn each_missing_thing_has_its_reason() {
    assert_eq!(
        waiting(|o| o.nodes[0].control_plane = false),
        [Waiting::Label(machine("cp-0"))]
    );
    assert_eq!(
        waiting(|o| o.nodes[2].kubelet_answers = false),
        [Waiting::Kubelet(machine("w-0"))]
    );
    assert_eq!(
        waiting(|o| o.nodes[1].ready = Err("cni plugin not initialized".into())),
        [Waiting::NotReady {
            machine: machine("cp-1"),
            why: "cni plugin not initialized".into()
        }]
    );
    assert_eq!(
        waiting(|o| o.deployments[0].available = 1),
        [Waiting::Deployment {
            name: "kube-controller-manager",
            available: 1,
            wanted: 2
        }]
    );
    assert_eq!(
        waiting(|o| drop(o.pods.remove(0))),
        [Waiting::StaticPods(machine("cp-0"))]
    );
}

#[test]
fn only_a_ready_self_hosted_revision_counts_as_api_server() {
    let want = [Waiting::ApiServer(machine("cp-0"))];
    let apiserver = |o: &mut Observation, edit: fn(&mut PodSeen)| {
        edit(o.pods.iter_mut().find(|p| p.component == "kube-apiserver").unwrap());
    };
    assert_eq!(waiting(|o| apiserver(o, |p| p.ready = false)), want);
    assert_eq!(waiting(|o| apiserver(o, |p| p.revision = Some(1))), want);
    assert_eq!(waiting(|o| apiserver(o, |p| p.revision = None)), want);
    // The standby's own pod answering is not the pivot.
    let mirrored = waiting(|o| apiserver(o, |p| p.mirror = true));
    assert_eq!(mirrored[..1], want);
    assert_eq!(
        mirrored[1..],
        [Waiting::Standby {
            machine: machine("cp-0"),
            component: "kube-apiserver".into()
        }]
    );
}

#[test]
fn the_standby_must_be_gone_from_every_machine() {
    let left = waiting(|o| o.pods.push(pod("kube-scheduler", "cp-1", true, Some(1))));
    assert_eq!(
        left,
        [Waiting::Standby {
            machine: machine("cp-1"),
            component: "kube-scheduler".into()
        }]
    );
    assert_eq!(left[0].to_string(), "the temporary kube-scheduler on `cp-1` to go");
}

#[test]
fn a_controller_manager_must_lead() {
    let uncounted = waiting(|o| o.daemon_sets[1].ready = 2);
    assert_eq!(
        uncounted,
        [Waiting::DaemonSet {
            name: "kube-proxy",
            ready: 2,
            wanted: 3
        }]
    );
    assert_eq!(waiting(|o| o.daemon_sets.clear()).len(), 2);
    // Of a pod that isn't ready the pod itself tells, and nobody else.
    let kube_proxy = |o: &mut Observation| {
        o.pods.pop();
        o.daemon_sets[1].ready = 2;
    };
    assert_eq!(waiting(kube_proxy), [Waiting::KubeProxy(machine("w-0"))]);
    // More than are expected: machines that nobody expects have it as well.
    assert_eq!(waiting(|o| o.daemon_sets[1].ready = 4), []);
}

#[test]
fn what_is_told_from_before_a_restart_does_not_count() {
    let at = |second| Timestamp::from_second(second).unwrap();
    let mut expected = expectation();
    expected.started.insert(machine("w-0"), at(900));
    assert!(judge(&expected, &finished()).is_done());
    expected.started.insert(machine("w-0"), at(1001));
    let state = judge(&expected, &finished());
    assert_eq!(state.waiting, [Waiting::Restart(machine("w-0"))]);
}
