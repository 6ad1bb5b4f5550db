//! The operator is killed at every place where it waits, one after the other, in a handful of upgrades: each comes to its end.

use kprov_sim::script::{Defect, Fault, ReleaseShape, Script, Shape};
use kprov_sim::{run, shrink};
use kprov_types::api::UpdatePolicy;

fn release(version: &str, etcd: u32, defect: Option<Defect>) -> ReleaseShape {
    ReleaseShape {
        version: version.to_owned(),
        etcd,
        addons: etcd,
        defect,
        fixed_by: None,
    }
}

fn script(control_plane: usize, workers: usize, releases: Vec<ReleaseShape>, wanted: usize) -> Script {
    Script {
        seed: 1,
        cluster: Shape {
            control_plane,
            workers,
            pools: 1,
            apps: 1,
            grace: 2000,
            policy: UpdatePolicy::default(),
            even: false,
        },
        releases,
        wanted,
        faults: Vec::new(),
    }
}

/// One of `parts` parts of all places.
fn kill_everywhere(script: &Script, part: u64, parts: u64) {
    let calm = run(script);
    assert_eq!(calm.violation, None);
    assert!(calm.polls > 100, "{} polls", calm.polls);
    for poll in (1..=calm.polls).filter(|poll| poll % parts == part) {
        let mut script = script.clone();
        script.faults.push(Fault::Kill { poll });
        let failure = shrink(&script, |_| {}).map(|shrunk| shrunk.explain());
        assert!(
            failure.is_none(),
            "killed after poll {poll}: {}",
            failure.unwrap_or_default()
        );
    }
}

fn one_machine() -> Script {
    script(1, 0, vec![release("1.34.2", 1, None), release("1.35.1", 2, None)], 1)
}

fn two_hops() -> Script {
    let releases = vec![
        release("1.34.2", 1, None),
        release("1.35.1", 1, None),
        release("1.36.0", 2, None),
    ];
    script(3, 2, releases, 2)
}

fn before_surge() -> Script {
    script(1, 1, vec![release("1.20.2", 1, None), release("1.21.4", 2, None)], 1)
}

fn bad(defect: Defect) -> Script {
    let mut bad = release("1.35.1", 2, Some(defect));
    bad.fixed_by = Some(2);
    script(
        1,
        2,
        vec![release("1.34.2", 1, None), bad, release("1.35.2", 2, None)],
        1,
    )
}

#[test]
fn one_machine_upgrades() {
    kill_everywhere(&one_machine(), 0, 1);
}

#[test]
fn two_hops_on_five_machines_even() {
    kill_everywhere(&two_hops(), 0, 2);
}

#[test]
fn two_hops_on_five_machines_odd() {
    kill_everywhere(&two_hops(), 1, 2);
}

#[test]
fn an_upgrade_before_there_is_surge() {
    kill_everywhere(&before_surge(), 0, 1);
}

#[test]
fn an_api_server_that_crashes() {
    kill_everywhere(&bad(Defect::ApiServerCrashes), 0, 1);
}

#[test]
fn a_scheduler_that_never_gets_ready() {
    kill_everywhere(&bad(Defect::SchedulerNeverReady), 0, 1);
}

#[test]
fn a_kubelet_that_never_reports() {
    kill_everywhere(&bad(Defect::KubeletSilent(Some(1))), 0, 1);
}

#[test]
fn an_etcd_that_never_gets_healthy() {
    let mut script = bad(Defect::EtcdNeverHealthy);
    script.cluster.control_plane = 3;
    kill_everywhere(&script, 0, 4);
}

#[test]
fn a_bad_digest() {
    kill_everywhere(&bad(Defect::BadDigest(Some(2))), 0, 1);
}
