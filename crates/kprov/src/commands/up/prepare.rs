//! What `up` checks and makes before there is any machine.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use camino::Utf8PathBuf;
use jiff::{SignedDuration, Timestamp};
use kprov_bootstrap::pki::{self, Authority, Credentials, Kubeconfig};
use kprov_bootstrap::versions;
use kprov_provider::Provider;
use kprov_provision::Wanted;
use kprov_release::Payload;
use kprov_types::cluster::{ClusterFile, ClusterSpec, PlannedMachine, Provider as ProviderName};
use kprov_types::machine::{DiskSpec, FirstBoot, MachineSpec, MachineState, Network, NetworkSpec, Observed};
use kprov_types::node::{ControlPlaneSettings, KeyPairPem, Member, NodeNetwork};
use kprov_types::{MachineName, Role, ports};

use super::super::baremetal::{self, KeptInventory};
use super::super::upgrade::payloads::{self, AtHand};
use super::super::{Context, power, providers};
use crate::cli::UpArgs;
use crate::config;
use crate::failure::UserError;
use crate::home::{ClusterHome, Record, Secrets};

/// Everything that is known before the first change.
pub(crate) struct Prepared {
    /// The file with flags on top.
    pub file: ClusterFile,
    /// The same, checked.
    pub spec: ClusterSpec,
    /// The payload, verified.
    pub payload: Payload,
    /// The same, with whose word it is taken on.
    pub at_hand: AtHand,
    /// Where the machines are made.
    pub provider: Box<dyn Provider>,
    /// Where the cluster's secrets are.
    pub home: ClusterHome,
    /// Whether an earlier `up` got as far as keeping something.
    pub known: bool,
    /// Whether an earlier `up` came to its end.
    pub complete: bool,
    /// The machines that ran before this `up`.
    pub running: Vec<MachineName>,
    /// The hosts, where an inventory names them.
    pub inventory: Option<KeptInventory>,
}

impl Prepared {
    /// The machines that this `up` starts, and since when what the API tells of them is new. The seconds allow for clocks
    /// that differ.
    pub(crate) fn started(&self, now: Timestamp) -> BTreeMap<MachineName, Timestamp> {
        let since = now.saturating_sub(SignedDuration::from_secs(5)).unwrap_or(now);
        let names = self.spec.machines.iter().map(|m| &m.name);
        names
            .filter(|name| !self.running.contains(name))
            .map(|name| (name.clone(), since))
            .collect()
    }

    /// What is kept of it.
    pub(crate) fn record(&self, complete: bool) -> Record {
        Record {
            file: self.file.clone(),
            kubernetes: self.payload.release().kubernetes.clone(),
            release: camino::absolute_utf8(self.payload.root()).unwrap_or_else(|_| self.payload.root().to_owned()),
            release_digest: self.payload.digest(),
            complete: complete || self.complete,
            inventory: self.inventory.clone(),
        }
    }
}

/// Checks the request, the payload, and that the two and what is there already go together. Changes nothing.
pub(super) async fn prepare(context: &Context, args: &UpArgs) -> Result<Prepared> {
    let UpArgs {
        cluster: args,
        trust,
        wipe,
        ..
    } = args;
    let wanted = config::load(args, |name| {
        let record = context.home.cluster(name).record().ok().flatten()?;
        Some((record.file, Some(record.release)))
    })?;
    let config::Wanted { file, spec, release } = wanted;
    let home = context.home.cluster(&spec.name);
    let record = home.record()?;
    let (provider, spec, inventory) = if spec.provider == ProviderName::Baremetal {
        let opened = baremetal::open(spec, record.as_ref(), wipe)?;
        power::wake(&context.reporter, &opened.kept.inventory.hosts).await;
        (opened.provider, opened.spec, Some(opened.kept))
    } else {
        let (provider, spec) = providers::open_for(context, spec).await?;
        (provider, spec, None)
    };

    context.reporter.step("", "verify the release payload");
    let path = release
        .or_else(|| record.as_ref().map(|r| r.release.clone()))
        .ok_or_else(|| {
            UserError::new("no release payload named")
                .hint("give one with `--release DIR`; `kprov release create` makes one from Kubernetes binaries")
        })?;
    let at_hand = payloads::verify(context, trust, &path).await?;
    let payload = at_hand.payload.clone();
    let version = &payload.release().kubernetes;
    if let Some(record) = &record {
        check_unchanged(record, &spec, &payload)?;
    }
    if let Some(asked) = spec.version.as_ref().filter(|asked| *asked != version) {
        return Err(
            UserError::new(format!("the payload `{path}` is Kubernetes {version}, not {asked}"))
                .hint(format!(
                    "give a payload of {asked} with `--release`, or leave `--kubernetes` out"
                ))
                .into(),
        );
    }
    match versions::support(version.minor()) {
        Ok(versions::Support::Known) => {}
        Ok(versions::Support::NewerThanKnown) => context.reporter.note(&format!(
            "warning: Kubernetes {} is newer than this kprov knows; going on with what {} needs",
            version.minor(),
            versions::NEWEST
        )),
        Err(error) => {
            return Err(anyhow::Error::from(error).context(
                UserError::new(format!("Kubernetes {version} can't be used")).hint("choose a newer version"),
            ));
        }
    }

    context.reporter.step("", "look what is there");
    let observed = provider.observe(&spec.name).await?;
    let secrets = home.secrets()?;
    // A host that can't be asked is not known to be one of the cluster's.
    let there = || {
        observed
            .machines
            .iter()
            .filter(|m| !matches!(m.state, MachineState::Unknown(_)))
    };
    if let (Some(now), Some(before)) = (&inventory, record.as_ref().and_then(|r| r.inventory.as_ref()))
        && there().next().is_some()
    {
        baremetal::check_control_plane(&spec.name, before, now)?;
    }
    if secrets.is_none() && there().next().is_some() {
        return Err(UserError::new(format!(
            "there is a cluster `{}` on provider `{}` already, and its secrets are not in `{}`",
            spec.name,
            provider.name(),
            home.dir()
        ))
        .hint("choose another name, or give the home directory it was made with (`--home`)")
        .into());
    }
    Ok(Prepared {
        known: record.is_some() || secrets.is_some(),
        complete: record.is_some_and(|r| r.complete),
        running: observed
            .machines
            .iter()
            .filter(|m| m.state == MachineState::Running)
            .map(|m| m.name.clone())
            .collect(),
        file,
        spec,
        payload,
        at_hand,
        provider,
        home,
        inventory,
    })
}

/// Refuses what `up` can't change of a cluster that exists.
fn check_unchanged(record: &Record, spec: &ClusterSpec, payload: &Payload) -> Result<()> {
    let before = record
        .file
        .validate()
        .context("what is kept of the cluster is not valid any more")?;
    let refuse = |what: &str, old: String, new: String| -> Result<()> {
        Err(UserError::new(format!(
            "cluster `{}` has {what} {old}; it can't be changed to {new} by `up`",
            spec.name
        ))
        .hint("leave it as it is, or make a cluster of another name")
        .into())
    };
    if before.provider != spec.provider {
        return refuse("provider", before.provider.to_string(), spec.provider.to_string());
    }
    let version = &payload.release().kubernetes;
    let asked = spec.version.as_ref().unwrap_or(version);
    if record.kubernetes != *asked || record.kubernetes != *version {
        let other = if record.kubernetes == *asked { version } else { asked };
        return Err(UserError::new(format!(
            "cluster `{}` was started with Kubernetes {}; `up` does not change versions, so {other} can't be used",
            spec.name, record.kubernetes
        ))
        .hint(format!(
            "`kprov upgrade --to {other}` changes the version; run `up` with the payload of {}",
            record.kubernetes
        ))
        .into());
    }
    if record.release_digest != payload.digest() {
        return Err(UserError::new(format!(
            "cluster `{}` was started from another payload of Kubernetes {version} (`{}`)",
            spec.name, record.release
        ))
        .hint("run `up` with that payload")
        .into());
    }
    // What an inventory names is not part of the file that is kept; it's held against the machines themselves.
    if before.provider != ProviderName::Baremetal && before.control_plane().count() != spec.control_plane().count() {
        return refuse(
            "control-plane machines:",
            before.control_plane().count().to_string(),
            spec.control_plane().count().to_string(),
        );
    }
    let (a, b) = (&before.network, &spec.network);
    if (a.pods, a.services, &a.dns_domain) != (b.pods, b.services, &b.dns_domain) {
        return refuse(
            "ranges and domain",
            format!("{} {} {}", a.pods, a.services, a.dns_domain),
            format!("{} {} {}", b.pods, b.services, b.dns_domain),
        );
    }
    Ok(())
}

/// The things at the provider that a cluster consists of; first-boot data is still empty.
pub(crate) fn wanted(spec: &ClusterSpec) -> Wanted {
    let machines: Vec<MachineSpec> = spec
        .machines
        .iter()
        .cloned()
        .map(|planned| {
            let PlannedMachine {
                name,
                role,
                zone,
                size,
                image,
                address: _,
                reached: _,
                labels: _,
            } = planned;
            MachineSpec {
                name,
                role,
                zone,
                size,
                image,
                first_boot: FirstBoot(String::new()),
                data_disk: role == Role::ControlPlane,
            }
        })
        .collect();
    Wanted {
        network: NetworkSpec {
            cidr: spec.network.machines,
            api_port: ports::API,
        },
        disks: machines
            .iter()
            .filter(|m| m.data_disk)
            .map(|m| DiskSpec {
                machine: m.name.clone(),
                size_gib: spec.etcd_disk_gib,
            })
            .collect(),
        machines,
    }
}

/// The cluster's secrets: those that are kept, else new ones, kept before anything uses them.
pub(super) fn ensure_secrets(prepared: &Prepared) -> Result<Secrets> {
    let Prepared { spec, home, .. } = prepared;
    let now = Timestamp::now();
    let kept = home.secrets()?;
    let mut secrets = match kept.clone() {
        Some(secrets) => secrets,
        None => Secrets {
            cluster: pki::generate_secrets(&spec.name, now)?,
            join_token: pki::generate_join_token()?,
            setup_client: pki::setup_client(now)?.pair,
            setup: BTreeMap::new(),
        },
    };
    let fingerprint = pki::fingerprint(&secrets.setup_client.certificate)?;
    for name in spec.control_plane() {
        if !secrets.setup.contains_key(name.as_str()) {
            secrets
                .setup
                .insert(name.to_string(), pki::setup_identity(name, &fingerprint, now)?);
        }
    }
    if kept.as_ref() != Some(&secrets) {
        home.keep_secrets(&secrets)?;
    }
    Ok(secrets)
}

/// The administrator's kubeconfig: kept as it is while its certificate has time left.
pub(super) fn ensure_kubeconfig(
    home: &ClusterHome,
    spec: &ClusterSpec,
    secrets: &Secrets,
    network: &Network,
) -> Result<()> {
    let now = Timestamp::now();
    let path = home.kubeconfig();
    if let Ok(text) = std::fs::read_to_string(&path)
        && text.contains(&network.endpoint.url())
        && client_certificate(&text).is_some_and(|pem| !pki::needs_renewal(&pem, now))
    {
        return Ok(());
    }
    let admin = pki::admin(&secrets.cluster, now)?;
    let text = kubeconfig(&spec.name, &secrets.cluster.ca, &admin, &network.endpoint.url());
    home.keep_kubeconfig(&baremetal::with_contexts(&text, spec)?)
}

/// A kubeconfig whose cluster, user and context have the cluster's name.
pub(super) fn kubeconfig(
    cluster: &kprov_types::ClusterName,
    ca: &KeyPairPem,
    client: &KeyPairPem,
    server: &str,
) -> String {
    Kubeconfig {
        cluster: cluster.as_str(),
        user: &format!("{cluster}-admin"),
        server,
        authority: Authority::Inline(&ca.certificate),
        credentials: Credentials::Inline(client),
    }
    .render()
}

fn client_certificate(kubeconfig: &str) -> Option<String> {
    use base64::Engine as _;
    let value: serde_json::Value = serde_saphyr::from_str(kubeconfig).ok()?;
    let data = value["users"][0]["user"]["client-certificate-data"].as_str()?;
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).ok()?).ok()
}

/// How the control plane is set up. Equal for each run of `up`, as machines keep the first one they get.
pub(super) fn settings(prepared: &Prepared, observed: &Observed, network: &Network) -> Result<ControlPlaneSettings> {
    let Prepared { spec, payload, .. } = prepared;
    let mut members = Vec::new();
    for name in spec.control_plane() {
        let machine = observed.machines.iter().find(|m| m.name == *name);
        let address = machine
            .and_then(|m| m.address)
            .with_context(|| format!("machine `{name}` has no address"))?;
        members.push(Member {
            name: name.clone(),
            address,
        });
    }
    members.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(ControlPlaneSettings {
        cluster: spec.name.clone(),
        kubernetes: payload.release().kubernetes.clone(),
        release: payload.release().clone(),
        endpoint: network.endpoint.clone(),
        network: node_network(spec),
        members,
        release_digest: payload.digest(),
        etcd_exists: prepared.complete,
    })
}

/// The address ranges as machines need them.
pub(super) fn node_network(spec: &ClusterSpec) -> NodeNetwork {
    NodeNetwork {
        pods: spec.network.pods,
        services: spec.network.services,
        dns_domain: spec.network.dns_domain.clone(),
    }
}

/// kprov-node beside this program, or where `KPROV_NODE` says.
pub(crate) fn node_binary() -> Result<Utf8PathBuf> {
    let path = match std::env::var("KPROV_NODE") {
        Ok(path) if !path.is_empty() => Utf8PathBuf::from(path),
        _ => {
            let exe = std::env::current_exe().context("can't tell where kprov itself is")?;
            Utf8PathBuf::from_path_buf(exe.with_file_name("kprov-node"))
                .map_err(|p| UserError::new(format!("the path `{}` is not UTF-8", p.display())))?
        }
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(UserError::new(format!("there is no `{path}`, which machines run"))
        .hint("put `kprov-node` beside `kprov`, or set KPROV_NODE to its path")
        .into())
}
