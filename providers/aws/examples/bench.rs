//! Calls and wall time of `up`, of `up` again and of `down`, for numbers of machines, on a moto server: `bench SERVER 1 10 100`.
//! With `ANSIBLE_PLAYBOOK` and `PLAYBOOK` set, Ansible does the same work on the same server for numbers up to
//! `ANSIBLE_MOST`. `cargo xtask bench aws` runs it.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measurement for people to read"
)]

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use kprov_emulators::aws::Moto;
use kprov_provider::{Provider as _, ProviderError};
use kprov_provider_aws::{AwsConfig, AwsProvider};
use kprov_provision::{Action, Goal, Pace, Progress, Waiting, Wanted, drive};
use kprov_types::infrastructure::AwsSettings;
use kprov_types::machine::{DiskSpec, FirstBoot, MachineSpec, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};

const REGION: &str = "eu-central-1";
/// The longest that one run may take.
const LIMIT: Duration = Duration::from_mins(30);

struct Clock(Instant);

impl Pace for Clock {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'_, ()> {
        tokio::time::sleep(duration).boxed()
    }
}

impl Progress for Clock {
    fn action(&self, _: &Action) {}
    fn waiting(&self, _: &[Waiting]) {}
    fn retrying(&self, error: &ProviderError, _: Duration) {
        println!("  again: {error}");
    }
}

/// One control-plane machine of three beside workers, as a cluster of that size has them; one machine is a control plane.
fn wanted(cluster: &ClusterName, machines: u32) -> Wanted {
    let control_plane = if machines < 4 { 1 } else { 3 };
    let machine = |role: Role, name: String| MachineSpec {
        name: MachineName::new(name).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot("#!/bin/sh\ntrue\n".into()),
        data_disk: role == Role::ControlPlane,
    };
    let mut all: Vec<MachineSpec> = (0..control_plane)
        .map(|i| machine(Role::ControlPlane, format!("{cluster}-cp-{i}")))
        .collect();
    let disks = all
        .iter()
        .map(|m| DiskSpec {
            machine: m.name.clone(),
            size_gib: 8,
        })
        .collect();
    all.extend((0..machines - control_plane).map(|i| machine(Role::Worker, format!("{cluster}-worker-{i}"))));
    Wanted {
        network: NetworkSpec {
            cidr: Some("10.40.0.0/16".parse().unwrap()),
            api_port: 6443,
        },
        disks,
        machines: all,
    }
}

async fn open(moto: &Moto) -> AwsProvider {
    let settings = AwsSettings {
        region: Some(REGION.into()),
        endpoint_url: Some(moto.endpoint().into()),
        ..AwsSettings::default()
    };
    let keys = Credentials::new("kprov", "secret", None, None, "bench");
    let config = AwsConfig {
        settings,
        zones: Vec::new(),
    };
    AwsProvider::open_with(config, Some(SharedCredentialsProvider::new(keys)))
        .await
        .unwrap()
}

/// The processor time of this process so far: kprov's own, and the proxy's, which passes bytes on.
fn own_time() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = text.rsplit(')').next().unwrap();
    let ticks = after_name.split_whitespace().skip(11).take(2);
    // Of 10 ms each, as on every Linux (proc_pid_stat(5)).
    ticks.map(|t| t.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

/// Works towards a goal and prints calls and time.
async fn measure(moto: &Moto, what: &str, cluster: &ClusterName, goal: &Goal) {
    moto.record().reset();
    let (start, own) = (Instant::now(), own_time());
    let provider = open(moto).await;
    let clock = Clock(start);
    let seen = drive(&provider, cluster, goal, LIMIT, &clock, &clock).await.unwrap();
    println!(
        "kprov    {what}: {} calls ({} RunInstances), {:.2} s, of it {:.2} s of processor time of its own, {} machines there",
        moto.record().total(),
        moto.record().calls().get("RunInstances").unwrap_or(&0),
        start.elapsed().as_secs_f64(),
        own_time() - own,
        seen.machines.len(),
    );
}

async fn ansible(moto: &Moto, machines: u32) {
    let (Some(program), Some(playbook)) = (std::env::var_os("ANSIBLE_PLAYBOOK"), std::env::var_os("PLAYBOOK")) else {
        return;
    };
    let most = std::env::var("ANSIBLE_MOST")
        .ok()
        .and_then(|m| m.parse().ok())
        .unwrap_or(0);
    if machines > most {
        println!("ansible  {machines}: not run");
        return;
    }
    moto.record().reset();
    let start = Instant::now();
    let run = tokio::process::Command::new(&program)
        .args(["-i", "localhost,", "-c", "local", "-e"])
        .arg(format!("machines={machines} endpoint={}", moto.endpoint()))
        .arg(&playbook)
        .env("AWS_ACCESS_KEY_ID", "kprov")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .env("AWS_DEFAULT_REGION", REGION)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(LIMIT, run).await {
        Ok(output) => {
            let output = output.unwrap();
            println!(
                "ansible  {machines} up: {} calls ({} RunInstances), {:.2} s, {}",
                moto.record().total(),
                moto.record().calls().get("RunInstances").unwrap_or(&0),
                start.elapsed().as_secs_f64(),
                output.status
            );
            if !output.status.success() {
                println!("{}", String::from_utf8_lossy(&output.stdout));
            }
        }
        Err(_) => println!("ansible  {machines} up: not done after {} s", LIMIT.as_secs()),
    }
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let server = args.next().unwrap();
    for machines in args.map(|n| n.parse::<u32>().unwrap()) {
        let moto = Moto::start(Path::new(&server)).await.unwrap();
        let cluster = ClusterName::new("bench").unwrap();
        let goal = Goal::Present(wanted(&cluster, machines));
        measure(&moto, &format!("{machines} up"), &cluster, &goal).await;
        measure(&moto, &format!("{machines} up again"), &cluster, &goal).await;
        measure(&moto, &format!("{machines} down"), &cluster, &Goal::Nothing).await;
        let left = open(&moto).await.leftovers(&cluster).await.unwrap();
        assert!(left.is_empty(), "left over: {left:?}");
        ansible(&moto, machines).await;
    }
}
