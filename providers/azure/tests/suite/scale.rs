//! How many calls there are for how many machines.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kprov_emulators::azure::{Options, Rate};
use kprov_provider::Provider as _;

use crate::cloud::{Cloud, wanted};

fn reads(calls: &BTreeMap<String, u64>) -> u64 {
    let read = |name: &str| ["GET ", "LIST "].iter().any(|verb| name.starts_with(verb));
    calls.iter().filter(|(name, _)| read(name)).map(|(_, n)| n).sum()
}

/// Lists have pages as long as Azure's.
async fn cloud(settle: Duration, retry_after: u32) -> Cloud {
    Cloud::start(Options {
        settle,
        page: 1000,
        retry_after,
        ..Options::default()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_up_with_nothing_to_do_lists_each_kind_once() {
    for workers in [0, 30] {
        let cloud = cloud(Duration::ZERO, 0).await;
        cloud.up(1, workers).await.unwrap();
        cloud.arm.record.reset();
        cloud.up(1, workers).await.unwrap();
        let calls = cloud.arm.record.calls();
        // Eight kinds, the group, and the machines' run-time states.
        assert_eq!(cloud.arm.record.total(), 10, "{calls:?}");
        assert_eq!(reads(&calls), 10, "{calls:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_two_for_a_worker() {
    let cloud = cloud(Duration::ZERO, 0).await;
    cloud.up(1, 10).await.unwrap();
    let calls = cloud.arm.record.calls();
    assert_eq!(calls["PUT virtualMachines"], 11);
    assert_eq!(calls["PUT networkInterfaces"], 11);
    assert_eq!(calls["LIST skus"], 1);
    cloud.arm.record.reset();
    cloud.down().await.unwrap();
    let calls = cloud.arm.record.calls();
    // Interfaces and system disks go with their machines.
    assert_eq!(calls["DELETE virtualMachines"], 11);
    assert_eq!(calls.get("DELETE networkInterfaces"), None, "{calls:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_would_take_is_about_what_it_takes() {
    let cloud = cloud(Duration::ZERO, 0).await;
    let want = wanted(&cloud.cluster, 3, 3);
    let provider = cloud.provider();
    let estimate = provider.estimate(&cloud.cluster, Some(&want.network), &want.disks, &want.machines);
    let estimate = estimate.await.unwrap().unwrap();
    cloud.arm.record.reset();
    cloud.up(3, 3).await.unwrap();
    let taken = cloud.arm.record.total();
    assert!(
        estimate.calls.abs_diff(taken) <= taken / 4,
        "{} instead of {taken}",
        estimate.calls
    );
    assert_eq!(
        estimate.things,
        [
            "resource group `kprov-demo` in `westeurope`",
            "network security group `demo`",
            "public IP address `demo-nat`",
            "NAT gateway `demo-nat`",
            "virtual network `demo` with a free range",
            "public IP address `demo-api`",
            "load balancer `demo-api` for port 6443 from outside",
            "managed disk `demo-cp-0-data` of 8 GiB",
            "managed disk `demo-cp-1-data` of 8 GiB",
            "managed disk `demo-cp-2-data` of 8 GiB",
            "3 virtual machines `Standard_D2s_v5` of `debian-12` (control-plane), each with network interface and public IP address",
            "3 virtual machines `Standard_D2s_v5` of `debian-12` (worker), each with network interface",
        ]
    );
}

/// `cargo xtask bench azure`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn bench() {
    println!(
        "| machines | calls of `up` | of it writes | `up` | calls with nothing to do | `up` again | calls of `down` | `down` |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    // What Azure lets one subscription read in one location; fewer writes than that, which are not counted apart here.
    let azures = Rate {
        burst: 250.0,
        per_second: 25.0,
    };
    for (machines, rate) in [(1_usize, None), (10, None), (100, None), (100, Some(azures))] {
        let control_plane = if machines < 3 { 1 } else { 3 };
        // Each operation takes two seconds, and asks for a second between two questions.
        let cloud = cloud(Duration::from_secs(2), 1).await;
        cloud.arm.configure(|o| o.rate = rate);
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
            (all, all - reads(&calls), started.elapsed().as_secs_f64())
        };
        let (calls, writes, up) = measure(true).await;
        let (again, _, nothing) = measure(true).await;
        let (removing, _, down) = measure(false).await;
        let throttled = if rate.is_some() { ", throttled" } else { "" };
        println!(
            "| {machines}{throttled} | {calls} | {writes} | {up:.2} s | {again} | {nothing:.3} s | {removing} | {down:.2} s |"
        );
    }
}
