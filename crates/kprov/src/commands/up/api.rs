//! Through the API: apply the self-hosted objects, and wait until they have taken over.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ConfigMap;
use kprov_bootstrap::manifests::{
    JoinGrant, Manifest, NAMESPACE, Policy, SETTINGS_CONFIG_MAP, SETTINGS_KEY, self_hosted,
};
use kprov_bootstrap::pivot::{self, Expectation, PivotState, Waiting};
use kprov_bootstrap::{apply, pki};
use kprov_types::api::{GROUP, VERSION, VERSION_UPDATE};
use kprov_types::machine::{MachineState, Observed};
use kprov_types::node::ControlPlaneSettings;
use kprov_types::release::ImageComponent;
use kprov_types::{MachineName, Role, ports};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Prepared, machines, prepare};
use crate::commands::upgrade::upload;
use crate::commands::{Context as Kprov, client_from};
use crate::home::Secrets;
use crate::progress::Reporter;

/// How long a join token works after each `up`.
const JOIN_LIFE: SignedDuration = SignedDuration::from_hours(6);
/// Later than any `up` lasts: its own time-out ends it first, with a better message.
const NEVER: Duration = Duration::from_hours(24);
/// How often it's asked whether the API answers yet.
const ASK: Duration = Duration::from_millis(200);

/// Hands out bundles, applies the self-hosted objects as soon as there is an API, and waits until they serve.
pub(super) async fn self_host(
    context: &Kprov,
    prepared: &Prepared,
    secrets: &Secrets,
    settings: &ControlPlaneSettings,
    observed: &Observed,
) -> Result<()> {
    let (ready, watched) = watch::channel(BTreeSet::new());
    let setting_up = machines::set_up(&context.reporter, prepared, secrets, settings, observed, watched);
    let taking_over = take_over(&context.reporter, prepared, secrets, settings, observed, &ready);
    tokio::try_join!(setting_up, taking_over).map(drop)
}

async fn take_over(
    reporter: &Reporter,
    prepared: &Prepared,
    secrets: &Secrets,
    settings: &ControlPlaneSettings,
    observed: &Observed,
    ready: &watch::Sender<BTreeSet<MachineName>>,
) -> Result<()> {
    let now = Timestamp::now();
    let setup = pki::setup_admin(&secrets.cluster, now)?;
    let config = prepare::kubeconfig(&settings.cluster, &secrets.cluster.ca, &setup, &settings.endpoint.url());
    let client = client_from(&config).await?;

    reporter.step("", "wait for the API");
    while !answers(&client).await {
        tokio::time::sleep(ASK).await;
    }

    reporter.step("", "apply the self-hosted control plane");
    let join = JoinGrant {
        token: secrets.join_token.clone(),
        expires: now.checked_add(JOIN_LIFE)?,
    };
    // A cluster that has been upgraded since is what it has become, not what this host remembers.
    let settings = &live(&client, settings).await?;
    let mut manifests = self_hosted(settings, ports::FIRST_REVISION, Some(&join))?;
    let upgradable = settings.release.image(ImageComponent::KprovOperator).is_some();
    if upgradable {
        manifests.extend(upgrade_objects(prepared)?);
    } else {
        reporter.note("warning: the payload has no `kprov-operator`, so `kprov upgrade` will not work on this cluster");
    }
    apply::apply(&client, &manifests, Instant::now() + NEVER, |progress| match progress {
        apply::Progress::Done(object, outcome) => tracing::info!("{object}: {outcome:?}"),
        apply::Progress::Retrying(object, failure) => {
            reporter.message("", &format!("{object}: {failure}; trying again"));
        }
    })
    .await?;
    if upgradable {
        upload::trust(&client, &prepared.at_hand)
            .await
            .context("the key that the payload is signed by can't be written down")?;
    }

    reporter.step("", "wait until the self-hosted control plane has taken over");
    let workers = prepared
        .spec
        .machines
        .iter()
        .filter(|m| m.role == Role::Worker)
        .map(|m| m.name.clone())
        // A host that could not be set up is reported otherwise, and not waited for.
        .filter(|name| {
            observed
                .machines
                .iter()
                .any(|m| m.name == *name && m.state == MachineState::Running)
        })
        .collect();
    let expected = Expectation {
        started: prepared.started(now),
        ..Expectation::new(settings, workers)
    };
    pivot::wait(&client, &expected, Instant::now() + NEVER, |progress| match progress {
        pivot::Progress::State(state) => show(reporter, &expected, state, ready),
        pivot::Progress::Unobservable(error) => tracing::info!("{error}"),
    })
    .await
    .context("the control plane did not become self-hosted")
}

/// The settings with the release that the cluster runs now.
async fn live(client: &Client, settings: &ControlPlaneSettings) -> Result<ControlPlaneSettings> {
    let maps = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
    let map = maps
        .get_opt(SETTINGS_CONFIG_MAP)
        .await
        .context("the cluster's settings can't be read")?;
    let Some(text) = map.and_then(|map| map.data?.remove(SETTINGS_KEY)) else {
        return Ok(settings.clone());
    };
    let live: ControlPlaneSettings = serde_json::from_str(&text)
        .with_context(|| format!("the ConfigMap `{NAMESPACE}/{SETTINGS_CONFIG_MAP}` is damaged"))?;
    Ok(ControlPlaneSettings {
        kubernetes: live.kubernetes,
        release: live.release,
        release_digest: live.release_digest,
        ..settings.clone()
    })
}

/// What the operator starts from: the release that the cluster begins with, and the wish to run it. People own both from then
/// on.
fn upgrade_objects(prepared: &Prepared) -> Result<[Manifest; 2]> {
    let release = serde_json::to_value(upload::release_object(&prepared.at_hand)?)?;
    let update = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "VersionUpdate",
        "metadata": { "name": VERSION_UPDATE },
        "spec": { "desiredVersion": prepared.payload.release().kubernetes },
    });
    Ok([release, update].map(|object| Manifest {
        object,
        policy: Policy::Create,
    }))
}

/// Whether an API server answers with everything it needs in place.
async fn answers(client: &Client) -> bool {
    let request = http::Request::get("/readyz").body(Vec::new());
    match request {
        Ok(request) => tokio::time::timeout(Duration::from_secs(5), client.request_text(request))
            .await
            .is_ok_and(|r| r.is_ok()),
        Err(_) => false,
    }
}

fn show(reporter: &Reporter, expected: &Expectation, state: &PivotState, ready: &watch::Sender<BTreeSet<MachineName>>) {
    // A control-plane machine that nothing is waited for has been set up, by this run or an earlier one.
    let waited: BTreeSet<&MachineName> = state.waiting.iter().filter_map(machine).collect();
    ready.send_replace(
        expected
            .control_plane
            .iter()
            .filter(|m| !waited.contains(m))
            .cloned()
            .collect(),
    );
    // Control-plane machines tell of themselves; of workers the API does.
    for worker in &expected.workers {
        match state.waiting.iter().find(|w| machine(w) == Some(worker)) {
            Some(Waiting::Node(_)) => reporter.step(worker.as_str(), "booting"),
            Some(_) => reporter.step(worker.as_str(), "joining"),
            None => reporter.done(worker.as_str()),
        }
    }
    let mut words: Vec<String> = state.waiting.iter().take(4).map(ToString::to_string).collect();
    if state.waiting.len() > words.len() {
        words.push(format!("{} more", state.waiting.len() - words.len()));
    }
    if !words.is_empty() {
        reporter.message("", &words.join(", "));
    }
}

fn machine(waiting: &Waiting) -> Option<&MachineName> {
    match waiting {
        Waiting::Node(machine)
        | Waiting::Label(machine)
        | Waiting::ApiServer(machine)
        | Waiting::StaticPods(machine)
        | Waiting::Standby { machine, .. }
        | Waiting::Restart(machine)
        | Waiting::KubeProxy(machine)
        | Waiting::NotReady { machine, .. }
        | Waiting::Kubelet(machine) => Some(machine),
        Waiting::Deployment { .. } | Waiting::DaemonSet { .. } => None,
    }
}
