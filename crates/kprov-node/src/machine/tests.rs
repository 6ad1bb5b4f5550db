use std::collections::BTreeSet;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use kprov_types::api::{MachineSpec, ReleaseRef, RunOrder, StandbyOrder};
use kprov_types::{Digest, Role};

use super::decide::*;
use super::disk::{Disk, Trial, directory_name};
use crate::nodes::{NodeFacts, Nodes, OwnNode};

fn release(version: &str, digit: char) -> ReleaseRef {
    ReleaseRef {
        version: version.parse().unwrap(),
        digest: Digest::from_hex(&digit.to_string().repeat(64)).unwrap(),
    }
}

fn old() -> ReleaseRef {
    release("1.35.6", 'a')
}

pub(super) fn new() -> ReleaseRef {
    release("1.36.3", 'b')
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

pub(super) fn trial() -> Trial {
    Trial {
        from: old(),
        from_directory: "1.35.6".into(),
        program: "/usr/local/bin/kprov-node".into(),
        to: new(),
        order: 7,
        since: at(100),
        timeout_seconds: 60,
        starts: 1,
    }
}

fn run_order() -> RunOrder {
    RunOrder {
        release: new(),
        since: at(100),
        timeout_seconds: 60,
    }
}

#[test]
fn orders_only_grow() {
    assert_eq!(admit(3, 2), Admission::Take);
    assert_eq!(admit(3, 3), Admission::Taken);
    assert_eq!(admit(2, 3), Admission::Refuse);
}

#[test]
fn all_that_orders_name_is_needed_once() {
    let spec = MachineSpec {
        stage: vec![old(), new()],
        run: Some(run_order()),
        etcd: Some(release("1.34.0", 'c')),
        standby: Some(StandbyOrder {
            release: old(),
            serve: false,
        }),
        ..MachineSpec::default()
    };
    assert_eq!(needed(&spec), BTreeSet::from([old(), new(), release("1.34.0", 'c')]));
    assert_eq!(needed(&MachineSpec::default()), BTreeSet::new());
}

#[test]
fn a_release_is_run_when_all_is_ready_for_it() {
    let (old, order) = (old(), run_order());
    let failed = trial().failed("x".into(), Vec::new(), at(200));
    let seen = RunSeen {
        ordered: Some(&order),
        running: Some(&old),
        trial: false,
        failed: None,
        set_up: true,
        staged: true,
        etcd_busy: false,
    };
    let waits = |seen: RunSeen<'_>| matches!(decide_run(&seen), RunStep::Wait(_));
    assert_eq!(decide_run(&seen), RunStep::Switch);
    assert_eq!(decide_run(&RunSeen { ordered: None, ..seen }), RunStep::Done);
    let running = Some(&order.release);
    assert_eq!(decide_run(&RunSeen { running, ..seen }), RunStep::Done);
    assert!(waits(RunSeen { trial: true, ..seen }));
    assert!(waits(RunSeen { set_up: false, ..seen }));
    assert!(waits(RunSeen { staged: false, ..seen }));
    assert!(waits(RunSeen {
        etcd_busy: true,
        ..seen
    }));
    // What has failed is not tried again for the same order, but it is for another.
    let failed = Some(&failed);
    assert_eq!(decide_run(&RunSeen { failed, ..seen }), RunStep::Failed);
    let again = RunOrder {
        since: at(101),
        ..order.clone()
    };
    let ordered = Some(&again);
    assert_eq!(
        decide_run(&RunSeen {
            ordered,
            failed,
            ..seen
        }),
        RunStep::Switch
    );
}

type Edit = fn(&mut OwnNode);

#[test]
fn what_has_proven_itself_reports_ready_since_it_was_started_with_its_own_version() {
    let good = OwnNode {
        ready: true,
        message: String::new(),
        heartbeat: Some(at(100)),
        kubelet: "v1.36.3".into(),
    };
    // The start was within the second that the heartbeat tells of.
    let since = Timestamp::from_millisecond(100_900).unwrap();
    let prove = |node: Option<&OwnNode>| proven(&new().version, node, since);
    assert_eq!(prove(Some(&good)), Ok(()));
    let built = OwnNode {
        kubelet: "v1.36.3+build".into(),
        ..good.clone()
    };
    assert_eq!(prove(Some(&built)), Ok(()));
    let cases: &[(&str, Edit)] = &[
        ("not reported since", |n| n.heartbeat = Some(at(99))),
        ("not reported since", |n| n.heartbeat = None),
        ("`v1.35.6`", |n| n.kubelet = "v1.35.6".into()),
        ("`v1.36.30`", |n| n.kubelet = "v1.36.30".into()),
        ("no network", |n| (n.ready, n.message) = (false, "no network".into())),
    ];
    for (word, edit) in cases {
        let mut node = good.clone();
        edit(&mut node);
        let why = prove(Some(&node)).unwrap_err();
        assert!(why.contains(word), "{why}");
    }
    assert!(prove(None).unwrap_err().contains("cannot be seen"));
}

#[test]
fn stores_are_asked_in_an_order_of_each_machines_own() {
    let node = |last: u8, control_plane| {
        let facts = NodeFacts {
            addresses: vec![[10, 0, 0, last].into()],
            control_plane,
            ..NodeFacts::default()
        };
        (format!("n{last}"), facts)
    };
    let nodes: Nodes = [node(1, true), node(2, true), node(3, true), node(9, false)].into();
    let own = stores("n2", Role::ControlPlane, [10, 0, 0, 2].into(), &nodes);
    assert_eq!(own[0], "http://10.0.0.2:10202");
    assert_eq!(BTreeSet::from_iter(&own).len(), 3);
    let first = |name: &str| stores(name, Role::Worker, [10, 0, 0, 9].into(), &nodes)[0].clone();
    let firsts: BTreeSet<_> = ["w0", "w1", "w2", "w3"].map(first).into();
    assert_eq!(firsts.len(), 3, "all stores get their share");
    assert_eq!(
        stores("w", Role::Worker, [10, 0, 0, 9].into(), &Nodes::new()),
        Vec::<String>::new()
    );
}

#[test]
fn each_source_is_asked_once() {
    let urls = |all: &[&str]| all.iter().map(|u| (*u).to_owned()).collect::<Vec<_>>();
    let all = sources(
        &urls(&["http://a"]),
        &urls(&["http://b/", "http://a"]),
        &urls(&["http://b"]),
    );
    assert_eq!(all, ["http://a", "http://b"]);
}

/// A machine's disk, with releases that bring a kprov-node each.
struct Machine {
    disk: Disk,
    root: Utf8PathBuf,
    _dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap().to_owned();
        let machine = Self {
            disk: Disk::below(&root),
            root,
            _dir: dir,
        };
        for name in ["1.35.6".to_owned(), directory_name(&new())] {
            std::fs::create_dir_all(machine.program(&name).parent().unwrap()).unwrap();
            std::fs::write(machine.program(&name), &name).unwrap();
        }
        machine.disk.set_current("1.35.6").unwrap();
        machine
    }

    fn program(&self, name: &str) -> Utf8PathBuf {
        self.root.join("releases").join(name).join("bin/kprov-node")
    }

    fn trial(&self) -> Trial {
        Trial {
            program: self.program("1.35.6"),
            ..trial()
        }
    }

    /// What a start comes to: the program that runs, the release's directory, and whether it is still being tried.
    fn start(&self) -> (Option<Utf8PathBuf>, String, bool) {
        let program = self.disk.begin(at(500)).unwrap();
        let current = self.disk.current().unwrap().unwrap();
        (program, current, self.disk.trial().unwrap().is_some())
    }

    fn runs_old(&self) -> (Option<Utf8PathBuf>, String, bool) {
        (Some(self.program("1.35.6")), "1.35.6".into(), false)
    }

    fn tries_new(&self) -> (Option<Utf8PathBuf>, String, bool) {
        let name = directory_name(&new());
        (Some(self.program(&name)), name, true)
    }
}

#[test]
fn a_switch_that_is_cut_off_goes_on() {
    for steps in 0..=2 {
        let machine = Machine::new();
        let trial = machine.trial();
        if steps >= 1 {
            machine.disk.set_trial(&trial).unwrap();
        }
        if steps >= 2 {
            machine.disk.switch(&trial).unwrap();
        }
        let expected = if steps == 0 {
            machine.runs_old()
        } else {
            machine.tries_new()
        };
        assert_eq!(machine.start(), expected, "after {steps} steps");
        assert_eq!(machine.disk.failed().unwrap(), None);
    }
}

#[test]
fn going_back_that_is_cut_off_goes_on() {
    for steps in 1..=3 {
        let machine = Machine::new();
        let trial = machine.trial();
        machine.disk.set_trial(&trial).unwrap();
        machine.disk.switch(&trial).unwrap();
        let failed = trial.failed("kubelet did not start".into(), vec!["line".into()], at(300));
        machine.disk.set_failed(&failed).unwrap();
        if steps >= 2 {
            machine.disk.set_current(&trial.from_directory).unwrap();
        }
        if steps >= 3 {
            machine.disk.end_trial().unwrap();
        }
        assert_eq!(machine.start(), machine.runs_old(), "after {steps} steps");
        assert_eq!(machine.start(), machine.runs_old(), "and again");
        assert_eq!(machine.disk.failed().unwrap(), Some(failed));
    }
}

#[test]
fn a_release_that_is_started_too_often_is_given_up() {
    let machine = Machine::new();
    let trial = machine.trial();
    machine.disk.set_trial(&trial).unwrap();
    machine.disk.switch(&trial).unwrap();
    // The switch itself was the first start.
    for start in 2..=MAX_STARTS {
        assert_eq!(machine.start(), machine.tries_new());
        assert_eq!(machine.disk.trial().unwrap().unwrap().starts, start);
    }
    assert_eq!(machine.start(), machine.runs_old());
    let failed = machine.disk.failed().unwrap().unwrap();
    assert!(failed.failure.message.contains("3 times"), "{}", failed.failure.message);
    assert_eq!(
        (failed.failure.release, failed.failure.order, failed.since),
        (new(), 7, at(100))
    );
}

#[test]
fn what_failed_once_may_be_tried_for_a_later_order() {
    let machine = Machine::new();
    let first = machine.trial();
    machine
        .disk
        .set_failed(&first.failed("x".into(), Vec::new(), at(300)))
        .unwrap();
    let second = Trial {
        order: 9,
        since: at(400),
        ..first
    };
    machine.disk.set_trial(&second).unwrap();
    assert_eq!(machine.start(), machine.tries_new());
    machine.disk.end_trial().unwrap();
    let (program, current, trying) = machine.start();
    assert_eq!(
        (program, trying),
        (Some(machine.program(&directory_name(&new()))), false)
    );
    assert_eq!(current, directory_name(&new()));
}

#[test]
fn a_machine_that_has_no_release_yet_runs_what_was_started() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::below(Utf8Path::from_path(dir.path()).unwrap());
    assert_eq!(disk.begin(at(1)).unwrap(), None);
    // A release without a kprov-node of its own.
    disk.set_current("1.35.6").unwrap();
    assert_eq!(disk.begin(at(1)).unwrap(), None);
    assert_eq!(disk.order().unwrap(), 0);
    disk.set_order(4).unwrap();
    assert_eq!(disk.order().unwrap(), 4);
}
