//! Operators with something wrong planted into them: the simulation finds it, and makes it short.

use kprov_sim::script::{Fault, Happening};
use kprov_sim::{Plant, Script, Shrunk, run_planted, shrink};
use kprov_types::api::MaxUnavailable;

/// The first seed that finds it, made short.
fn find(plant: Plant, kind: &str) -> Shrunk {
    let script = (0..500).map(Script::of).find(|script| {
        run_planted(script, plant)
            .violation
            .is_some_and(|violation| violation.kind == kind)
    });
    let script = script.expect("a seed that finds it");
    let shrunk = shrink(&script, plant).expect("it fails");
    assert_eq!(shrunk.violation.kind, kind);
    for index in 0..shrunk.script.faults.len() {
        let mut shorter = shrunk.script.clone();
        shorter.faults.remove(index);
        let kind = run_planted(&shorter, plant).violation.map(|violation| violation.kind);
        assert_ne!(kind, Some(shrunk.violation.kind), "fault {index} is not needed");
    }
    shrunk
}

/// An operator that doesn't read `spec.paused` needs one thing to be found: a pause.
#[test]
fn an_operator_that_does_not_pause() {
    let shrunk = find(|input| input.wanted.paused = false, "pause");
    let faults = &shrunk.script.faults;
    assert!(
        matches!(
            faults.as_slice(),
            [Fault::At {
                what: Happening::Pause { .. },
                ..
            }]
        ),
        "{}",
        shrunk.explain()
    );
    let text = shrunk.explain();
    assert!(text.contains("Pause"), "{text}");
    // What it prints is all that is needed to see it again.
    let json = text.split('\'').nth(1).expect("the script");
    let again: Script = serde_json::from_str(json).expect("a script");
    assert_eq!(again, shrunk.script);
    let violation = run_planted(&again, |input| input.wanted.paused = false).violation;
    assert_eq!(violation, Some(shrunk.violation));
}

/// One that takes more machines out of service than it may needs nothing to go wrong.
#[test]
fn an_operator_that_takes_too_many_machines() {
    let shrunk = find(
        |input| input.wanted.policy.max_unavailable = MaxUnavailable::Count(3),
        "budget",
    );
    assert!(shrunk.script.faults.is_empty(), "{}", shrunk.explain());
    assert_eq!(shrunk.script.cluster.apps, 0);
}

/// One that takes every release for verified.
#[test]
fn an_operator_that_verifies_nothing() {
    let plant: Plant = |input| {
        for release in &mut input.observed.releases {
            release.verified = Ok(());
        }
    };
    let shrunk = find(plant, "unverified");
    assert!(shrunk.script.faults.is_empty(), "{}", shrunk.explain());
}

/// One that believes that every pod is ready changes what still serves.
#[test]
fn an_operator_that_believes_every_pod_to_be_ready() {
    let plant: Plant = |input| {
        for workload in input.observed.workloads.values_mut() {
            workload.instances.retain(|pod| pod.release == workload.template);
            workload.instances.iter_mut().for_each(|pod| pod.ready = true);
        }
    };
    let script = (0..500)
        .map(Script::of)
        .find(|script| run_planted(script, plant).violation.is_some());
    assert!(script.is_some());
}
