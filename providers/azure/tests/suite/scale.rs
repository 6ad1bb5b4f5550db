//! How many calls there are for how many machines.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kprov_emulators::azure::Options;

use crate::cloud::Cloud;

fn total(calls: &BTreeMap<String, u64>, of: &str) -> u64 {
    calls
        .iter()
        .filter(|(name, _)| name.starts_with(of))
        .map(|(_, n)| n)
        .sum()
}

/// Operations end before they're asked for, and lists have Azure's pages.
async fn cloud(settle: Duration) -> Cloud {
    Cloud::start(Options {
        settle,
        page: 1000,
        retry_after: 1,
        ..Options::default()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_up_with_nothing_to_do_lists_each_kind_once() {
    for workers in [0, 30] {
        let cloud = cloud(Duration::ZERO).await;
        cloud.up(1, workers).await.unwrap();
        cloud.arm.record.reset();
        cloud.up(1, workers).await.unwrap();
        let calls = cloud.arm.record.calls();
        // Eight kinds, the group, and the machines' run-time states.
        assert_eq!(cloud.arm.record.total(), 10, "{calls:?}");
        assert_eq!(total(&calls, "GET"), 10, "{calls:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_two_for_a_worker() {
    let cloud = cloud(Duration::ZERO).await;
    cloud.up(1, 10).await.unwrap();
    let calls = cloud.arm.record.calls();
    assert_eq!(calls["PUT virtualMachines"], 11);
    assert_eq!(calls["PUT networkInterfaces"], 11);
    assert_eq!(calls["GET skus"], 1);
    cloud.arm.record.reset();
    cloud.down().await.unwrap();
    let calls = cloud.arm.record.calls();
    // Interfaces and system disks go with their machines.
    assert_eq!(calls["DELETE virtualMachines"], 11);
    assert_eq!(calls.get("DELETE networkInterfaces"), None, "{calls:?}");
}

/// `cargo xtask bench azure`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn bench() {
    println!(
        "| machines | calls of `up` | of it writes | `up` | calls with nothing to do | `up` again | calls of `down` | `down` |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for machines in [1_usize, 10, 100] {
        let control_plane = if machines < 3 { 1 } else { 3 };
        // Each operation takes two seconds, and asks for a second between two questions.
        let cloud = cloud(Duration::from_secs(2)).await;
        let measure = async |up: bool| {
            cloud.arm.record.reset();
            let started = Instant::now();
            let done = if up {
                cloud.up(control_plane, machines - control_plane).await
            } else {
                cloud.down().await
            };
            done.unwrap();
            let calls = cloud.arm.record.calls();
            let all: u64 = calls.values().sum();
            (all, all - total(&calls, "GET"), started.elapsed().as_secs_f64())
        };
        let (calls, writes, up) = measure(true).await;
        let (again, _, nothing) = measure(true).await;
        let (removing, _, down) = measure(false).await;
        println!(
            "| {machines} | {calls} | {writes} | {up:.2} s | {again} | {nothing:.3} s | {removing} | {down:.2} s |"
        );
    }
}
