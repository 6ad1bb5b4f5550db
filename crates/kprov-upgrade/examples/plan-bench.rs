//! How long planning and checking take for many machines: `cargo run --release -p kprov-upgrade --example plan-bench [NODES]`.
//!
//! Prints the median of each kind of pass in milliseconds. The aim is under 20 ms for planner and checker together at 5,000
//! nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use kprov_types::api::{MaxUnavailable, ReleaseRef, UpdatePolicy};
use kprov_types::{Digest, MachineName, Role};
use kprov_upgrade::check::check_plan;
use kprov_upgrade::effects;
use kprov_upgrade::model::{
    EtcdSeen, Input, Instance, KnownRelease, MachineSeen, Observed, Part, StandbySeen, Wanted, Workload, WorkloadSeen,
};
use kprov_upgrade::outline::outline;
use kprov_upgrade::plan::{State, Waiting, plan};

fn release(version: &str, byte: u8) -> anyhow::Result<ReleaseRef> {
    Ok(ReleaseRef {
        version: version.parse()?,
        digest: Digest::from_bytes([byte; 32]),
    })
}

fn known(release: &ReleaseRef) -> KnownRelease {
    let images = Workload::ALL
        .iter()
        .map(|&w| (Part::Workload(w), format!("{}:{release}", w.as_str())));
    KnownRelease {
        release: release.clone(),
        verified: Ok(()),
        minimum_from: None,
        images: images.chain([(Part::Etcd, "etcd:3.5".to_owned())]).collect(),
    }
}

fn machine(of: &ReleaseRef, role: Role, now: Timestamp) -> MachineSeen {
    let control_plane = role == Role::ControlPlane;
    MachineSeen {
        role,
        pool: role.as_str().to_owned(),
        ready: true,
        ready_since: now,
        cordoned: false,
        cordoned_by_us: None,
        kubelet: of.version.clone(),
        running: Some(of.clone()),
        ordered: None,
        order_seen: true,
        failure: None,
        stage_ordered: BTreeSet::new(),
        staged: BTreeMap::new(),
        etcd: control_plane.then(|| EtcdSeen {
            image: "etcd:3.5".to_owned(),
            ordered: None,
            healthy: true,
            message: String::new(),
        }),
        standby: control_plane.then(|| StandbySeen {
            release: Some(of.clone()),
            ordered: Some(of.clone()),
            serve_ordered: false,
            api_ready: false,
        }),
        snapshots: BTreeSet::new(),
        snapshot_ordered: None,
        drain: None,
    }
}

fn cluster(nodes: usize) -> anyhow::Result<Input> {
    let now: Timestamp = "2026-04-12T09:15:00Z".parse()?;
    let (from, to) = (release("1.35.6", 1)?, release("1.36.3", 2)?);
    let mut machines = BTreeMap::new();
    for i in 0..nodes {
        let role = if i < 3 { Role::ControlPlane } else { Role::Worker };
        machines.insert(MachineName::new(format!("node-{i}"))?, machine(&from, role, now));
    }
    let workloads = Workload::ALL.iter().map(|&workload| {
        let on = machines
            .iter()
            .filter(|(_, m)| workload == Workload::Proxy || m.role == Role::ControlPlane);
        let pods = on.map(|(name, _)| Instance {
            name: format!("{}-{name}", workload.as_str()),
            machine: Some(name.clone()),
            release: from.clone(),
            revision: 1,
            created: now,
            ready: true,
            ready_since: now,
            leaving: false,
            trouble: None,
        });
        let instances: Vec<Instance> = pods.collect();
        let seen = WorkloadSeen {
            template: from.clone(),
            image: format!("{}:{from}", workload.as_str()),
            previous: None,
            revision: 1,
            rolled: None,
            wanted: instances.len(),
            settled: true,
            automatic: true,
            instances,
        };
        (workload, seen)
    });
    Ok(Input {
        wanted: Wanted {
            desired: to.version.to_string(),
            paused: false,
            policy: UpdatePolicy {
                max_unavailable: MaxUnavailable::Percent(10),
                ..UpdatePolicy::default()
            },
            force: BTreeSet::new(),
            attempt: 0,
        },
        observed: Observed {
            current: from.clone(),
            hop_started: None,
            failure: None,
            releases: vec![known(&from), known(&to)],
            workloads: workloads.collect(),
            machines,
            findings: Some(Vec::new()),
        },
        now,
    })
}

#[expect(clippy::print_stdout, reason = "its output is what it is for")]
fn main() -> anyhow::Result<()> {
    let nodes = std::env::args()
        .nth(1)
        .map_or(Ok(5_000), |text| text.parse())
        .context("NODES is no number")?;
    let mut input = cluster(nodes)?;
    let (mut passes, mut longest) = (0, (Duration::ZERO, String::new()));
    let mut times = Vec::new();
    loop {
        // The best of three: other processes are not what is measured.
        let measured = (0..3).map(|_| {
            let begun = Instant::now();
            let plan = plan(&input);
            let planned = begun.elapsed();
            let violations = check_plan(&input, &plan);
            (begun.elapsed(), planned, plan, violations)
        });
        let (all, planned, plan, violations) = measured.min_by_key(|measured| measured.0).context("measured thrice")?;
        anyhow::ensure!(violations.is_empty(), "{violations:?}");
        times.push((all, planned));
        let first = plan.steps.first().map(|step| step.id.clone()).unwrap_or_default();
        if all > longest.0 {
            longest = (all, first);
        }
        passes += 1;
        if plan.state == State::Idle {
            break;
        }
        for step in &plan.steps {
            effects::apply(&mut input.observed, &step.action, input.now);
        }
        let soak = plan
            .waiting
            .iter()
            .any(|waiting| matches!(waiting, Waiting::Soak { .. }));
        input.now += jiff::SignedDuration::from_secs(if soak { 10 } else { 1 });
    }
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let (all, planned) = times[times.len() / 2];
    println!("{nodes} nodes, {passes} passes");
    println!(
        "plan and check, median  {:7.2} ms (plan {:.2} ms)",
        ms(all),
        ms(planned)
    );
    println!("plan and check, longest {:7.2} ms, before {}", ms(longest.0), longest.1);
    let begun = Instant::now();
    let lines: usize = outline(&cluster(nodes)?)?.hops.iter().map(|hop| hop.steps.len()).sum();
    println!("outline of {lines} lines  {:7.2} ms", ms(begun.elapsed()));
    Ok(())
}
