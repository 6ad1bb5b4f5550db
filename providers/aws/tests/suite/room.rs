//! A moto server, providers on it, and the executor that works with them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use kprov_emulators::aws::Moto;
use kprov_provider::{Provider, ProviderError};
use kprov_provider_aws::{AwsConfig, AwsProvider};
use kprov_provision::{Action, DriveError, Goal, Pace, Progress, Waiting, Wanted};
use kprov_types::infrastructure::AwsSettings;
use kprov_types::machine::{DiskSpec, FirstBoot, MachineSpec, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName, Role};
use tokio::sync::Notify;

/// How long `up` or `down` may take here.
const LIMIT: Duration = Duration::from_secs(100);

/// The region of all tests. moto has three zones in it.
pub(crate) const REGION: &str = "eu-central-1";

/// The program `moto_server`, or why the test can't run.
pub(crate) fn server() -> Option<PathBuf> {
    let server = std::env::var_os("KPROV_TEST_MOTO").map(PathBuf::from);
    if server.is_none() {
        eprintln!("skipped: KPROV_TEST_MOTO names no moto_server; `cargo xtask test` makes one");
    }
    server
}

/// Whether what takes minutes is run too.
pub(crate) fn full() -> bool {
    std::env::var("KPROV_TEST_FULL").is_ok_and(|v| v == "1")
}

/// A moto server of this test's own.
pub(crate) async fn moto() -> Option<Moto> {
    Some(Moto::start(&server()?).await.unwrap())
}

pub(crate) fn credentials() -> SharedCredentialsProvider {
    SharedCredentialsProvider::new(Credentials::new("kprov", "secret", None, None, "test"))
}

/// Settings of a provider on this server.
pub(crate) fn settings(moto: &Moto) -> AwsSettings {
    AwsSettings {
        region: Some(REGION.into()),
        endpoint_url: Some(moto.endpoint().into()),
        ..AwsSettings::default()
    }
}

/// A new provider, as a new process would open it.
pub(crate) async fn provider(moto: &Moto) -> AwsProvider {
    with(settings(moto), &[]).await
}

pub(crate) async fn with(settings: AwsSettings, zones: &[&str]) -> AwsProvider {
    let zones = zones.iter().map(ToString::to_string).collect();
    AwsProvider::open_with(AwsConfig { settings, zones }, Some(credentials()))
        .await
        .unwrap()
}

pub(crate) fn cluster(name: &str) -> ClusterName {
    ClusterName::new(name).unwrap()
}

/// What `kprov up` asks for: workers are told the same.
pub(crate) fn wanted(cluster: &ClusterName, control_plane: u32, workers: u32) -> Wanted {
    let machine = |role: Role, name: String| MachineSpec {
        name: MachineName::new(name.clone()).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot(match role {
            Role::ControlPlane => format!("#!/bin/sh\necho {name}\n"),
            Role::Worker => "#!/bin/sh\necho worker\n".into(),
        }),
        data_disk: role == Role::ControlPlane,
    };
    let mut machines: Vec<MachineSpec> = (0..control_plane)
        .map(|i| machine(Role::ControlPlane, format!("{cluster}-cp-{i}")))
        .collect();
    let disks = machines
        .iter()
        .map(|m| DiskSpec {
            machine: m.name.clone(),
            size_gib: 8,
        })
        .collect();
    machines.extend((0..workers).map(|i| machine(Role::Worker, format!("{cluster}-worker-{i}"))));
    Wanted {
        network: NetworkSpec {
            cidr: None,
            api_port: 6443,
        },
        disks,
        machines,
    }
}

/// Works towards a goal as `kprov up` and `kprov down` do, only without patience between two looks.
pub(crate) async fn drive(provider: &dyn Provider, cluster: &ClusterName, goal: &Goal) -> Result<Observed, DriveError> {
    let hurried = Hurried::default();
    kprov_provision::drive(provider, cluster, goal, LIMIT, &hurried, &hurried).await
}

/// The same, but whoever works is gone as soon as anything fails. `None` where that happened.
pub(crate) async fn drive_until_killed(
    provider: &dyn Provider,
    cluster: &ClusterName,
    goal: &Goal,
) -> Option<Result<Observed, DriveError>> {
    let hurried = Hurried::default();
    tokio::select! {
        biased;
        () = hurried.failed.notified() => None,
        result = kprov_provision::drive(provider, cluster, goal, LIMIT, &hurried, &hurried) => Some(result),
    }
}

/// A clock that hardly waits.
struct Hurried {
    start: Instant,
    failed: Notify,
}

impl Default for Hurried {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            failed: Notify::new(),
        }
    }
}

impl Pace for Hurried {
    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'_, ()> {
        tokio::time::sleep(duration.min(Duration::from_millis(20))).boxed()
    }
}

impl Progress for Hurried {
    fn action(&self, action: &Action) {
        trace(&action.to_string());
    }
    fn waiting(&self, waiting: &[Waiting]) {
        trace(&format!("waiting for {waiting:?}"));
    }
    fn retrying(&self, error: &ProviderError, _: Duration) {
        trace(&format!("{error} ({:?})", error.advice));
        if error.advice == kprov_provider::Advice::LookFirst || error.message.contains("can't be reached") {
            self.failed.notify_one();
        }
    }
}

/// Shown with `KPROV_TEST_TRACE` set.
fn trace(text: &str) {
    if std::env::var_os("KPROV_TEST_TRACE").is_some() {
        eprintln!("{text}");
    }
}
