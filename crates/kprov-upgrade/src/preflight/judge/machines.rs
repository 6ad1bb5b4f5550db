//! What machines tell of themselves: readiness, etcd, disks, certificates.

use jiff::{SignedDuration, Timestamp};
use kprov_types::api::{EtcdStatus, Finding, MachineStatus};
use kprov_types::release::{Arch, ImageComponent};
use kprov_types::{MachineName, Role};

use super::super::{Hop, Inputs, NodeSeen};
use super::{Findings, some};

/// etcd's default for `--quota-backend-bytes` (its documentation, "System limits"), which kprov leaves as it is.
const ETCD_QUOTA_MIB: u64 = 2048;
/// Shares of the quota, in percent, to warn and to stop at.
const ETCD_FULL: (u64, u64) = (75, 90);
/// What a control-plane machine needs for the images of a release, in MiB, as blobs and unpacked. Manifests don't tell their
/// sizes; Kubernetes' own images take about two thirds of it.
const IMAGES_MIB: u64 = 1024;
/// The same for other machines: kube-proxy, CoreDNS and the pause container.
const WORKER_IMAGES_MIB: u64 = 512;
/// What the programs for a machine take where a manifest has no sizes, in MiB.
const PROGRAMS_MIB: u64 = 1024;
/// Certificates that expire within this are told, ...
const CERTIFICATE_WARNING: SignedDuration = SignedDuration::from_hours(30 * 24);
/// ... and within this they stop an upgrade.
const CERTIFICATE_BLOCK: SignedDuration = SignedDuration::from_hours(24);

pub(super) fn judge(inputs: &Inputs, findings: &mut Findings) {
    let mut each = |family: &str, check: &dyn Fn(&Seen<'_>) -> Option<Finding>| {
        let seen = inputs.nodes.iter().map(|(name, node)| Seen {
            name,
            node,
            status: inputs.machines.get(name),
        });
        let found = seen.filter_map(|seen| Some((seen.name.clone(), check(&seen)?)));
        findings.family(family, found.collect());
    };
    each("node-not-ready", &|seen| not_ready(seen.name, seen.node));
    each("machine-silent", &|seen| silent(seen.name, seen.status));
    each("disk", &|seen| {
        disk(seen.name, seen.node.role, seen.status?, &inputs.hops)
    });
    each("certificate", &|seen| certificate(seen.name, seen.status?, inputs.now));
    each("etcd", &|seen| etcd(seen.name, seen.node.role, seen.status));
    each("etcd-size", &|seen| etcd_size(seen.name, seen.status?.etcd.as_ref()?));
    quorum(inputs, findings);
    etcd_versions(inputs, findings);
}

/// The minor of a version as etcd or an image's tag has it: `3.5.30`, `v3.5.30-0`, `3.4.23+dfsg`.
fn etcd_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    let number = |part: &str| part.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok();
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

/// The version of a release's etcd: as it said when the payload was made, else by its image's tag.
fn etcd_of(hop: &Hop) -> Option<&str> {
    let image = hop.manifest.image(ImageComponent::Etcd)?;
    let tag = || image.reference.rsplit_once(':').map(|(_, tag)| tag);
    image
        .version
        .as_deref()
        .filter(|v| etcd_minor(v).is_some())
        .or_else(tag)
}

/// etcd goes up one minor at a time, and never down (its documentation, "Upgrading etcd clusters and applications").
fn etcd_versions(inputs: &Inputs, findings: &mut Findings) {
    let members = inputs.machines.values().filter_map(|status| status.etcd.as_ref());
    let mut known: Vec<(u32, u32)> = members.filter_map(|etcd| etcd_minor(&etcd.version)).collect();
    known.sort_unstable();
    // All members have to be able to take the step: the oldest counts for how far, the newest for not going down.
    let (Some(&oldest), Some(&newest)) = (known.first(), known.last()) else {
        return;
    };
    let (mut from, mut highest) = (oldest, newest);
    for hop in &inputs.hops {
        let Some(version) = etcd_of(hop) else { continue };
        let Some(to) = etcd_minor(version) else { continue };
        let release = &hop.release.version;
        if to < highest {
            findings.block(
                format!("etcd-version/{release}"),
                format!(
                    "{release} comes with etcd {version}, and {}.{} runs: etcd can't go down a minor",
                    highest.0, highest.1
                ),
                format!(
                    "make the payload of {release} again with etcd {}.{} or newer",
                    highest.0, highest.1
                ),
            );
            return;
        }
        if to.0 != from.0 || to.1 > from.1 + 1 {
            findings.block(
                format!("etcd-version/{release}"),
                format!("{release} comes with etcd {version}, and {}.{} runs before it: etcd takes one minor at a time", from.0, from.1),
                format!("put etcd {}.{} into a payload on the way: `kprov release create --from DIR`, with that etcd in DIR", from.0, from.1 + 1),
            );
            return;
        }
        (from, highest) = (to, to);
    }
}

/// A machine, from both sides.
struct Seen<'a> {
    name: &'a MachineName,
    node: &'a NodeSeen,
    status: Option<&'a MachineStatus>,
}

fn not_ready(name: &MachineName, node: &NodeSeen) -> Option<Finding> {
    let (blocks, effect, hint) = match node.role {
        Role::ControlPlane => (
            true,
            "the control plane is replaced machine by machine and needs all of them",
            "look why",
        ),
        Role::Worker => (
            false,
            "it counts as unavailable, and can't be updated",
            "look why, or take it out of the cluster",
        ),
    };
    (!node.ready).then(|| {
        Findings::one(
            blocks,
            format!("node-not-ready/{name}"),
            format!("Node `{name}` is not Ready: {effect}"),
            format!("{hint}: `kubectl describe node {name}`"),
        )
    })
}

fn silent(name: &MachineName, status: Option<&MachineStatus>) -> Option<Finding> {
    let reports = status.is_some_and(|status| status.kprov_node.is_some());
    (!reports).then(|| {
        Findings::one(
            true,
            format!("machine-silent/{name}"),
            format!("kprov-node on `{name}` tells nothing of itself, so nothing can be updated there"),
            "look whether it runs, and what it says (`journalctl -u kprov-node`); a machine that kprov did not set up has to go",
        )
    })
}

/// Releases of two hops are on a machine at once at most: the one that is made, and the one before, to go back to.
fn disk(name: &MachineName, role: Role, status: &MachineStatus, hops: &[Hop]) -> Option<Finding> {
    let free = status.disk_free_mib?;
    let needs: Vec<u64> = hops
        .iter()
        .map(|hop| {
            let there = status
                .staged
                .iter()
                .any(|staged| staged.ready && staged.release.digest == hop.release.digest);
            if there { 0 } else { needed_mib(hop, role) }
        })
        .collect();
    let need = match role {
        // An intermediate hop concerns a worker only where its kubelet would fall too far behind.
        Role::Worker => needs.iter().max().copied(),
        Role::ControlPlane => needs
            .windows(2)
            .map(|pair| pair.iter().sum())
            .chain(needs.first().copied())
            .max(),
    }?;
    (free < need).then(|| {
        Findings::one(
            true,
            format!("disk/{name}"),
            format!("`{name}` has {free} MiB free for images and releases, and needs about {need} MiB"),
            "remove images and logs that nobody needs, or enlarge the disk",
        )
    })
}

fn needed_mib(hop: &Hop, role: Role) -> u64 {
    let size = |arch| hop.manifest.host_files_for(arch).map(|file| file.size).sum::<u64>();
    // A machine doesn't tell its architecture here; the programs of one are about as large as those of the other.
    let programs = [Arch::Amd64, Arch::Arm64]
        .map(size)
        .into_iter()
        .max()
        .unwrap_or(0)
        .div_ceil(1 << 20);
    let programs = if programs == 0 { PROGRAMS_MIB } else { programs };
    let images = match role {
        Role::ControlPlane => IMAGES_MIB,
        Role::Worker => WORKER_IMAGES_MIB,
    };
    programs + images
}

fn certificate(name: &MachineName, status: &MachineStatus, now: Timestamp) -> Option<Finding> {
    let certificate = status.certificate_expires.as_ref()?;
    let left = certificate.time.duration_since(now);
    let path = &certificate.path;
    let when = certificate.time.strftime("%Y-%m-%d %H:%M UTC");
    let message = if left.is_negative() || left.is_zero() {
        format!("the certificate `{path}` on `{name}` has expired ({when})")
    } else if left < CERTIFICATE_WARNING {
        format!("the certificate `{path}` on `{name}` expires on {when}")
    } else {
        return None;
    };
    Some(Findings::one(
        left < CERTIFICATE_BLOCK,
        format!("certificate/{name}"),
        message,
        "restart kprov-node on the machine, which renews what it has issued; look why it did not do so by itself",
    ))
}

fn etcd(name: &MachineName, role: Role, status: Option<&MachineStatus>) -> Option<Finding> {
    if role != Role::ControlPlane {
        return None;
    }
    let (message, hint) = match status.and_then(|status| status.etcd.as_ref()) {
        None => (
            format!("the machine `{name}` tells nothing of its etcd member"),
            "look whether kprov-node and etcd run there; without all members healthy an upgrade would risk the quorum"
                .to_owned(),
        ),
        Some(etcd) if !etcd.alarms.is_empty() => (
            format!("etcd on `{name}` has raised {}", etcd.alarms.join(", ")),
            if etcd.alarms.iter().any(|alarm| alarm == "NOSPACE") {
                "compact and defragment it, then disarm the alarm (etcd's documentation, \"Maintenance\")".to_owned()
            } else {
                "replace the member's data from the others before anything else".to_owned()
            },
        ),
        Some(etcd) if !etcd.healthy => (
            format!("the etcd member on `{name}` is not healthy: {}", etcd.message),
            format!(
                "look at its log: `kubectl logs -n kube-system {}-{name}`",
                ImageComponent::Etcd.as_str()
            ),
        ),
        Some(_) => return None,
    };
    Some(Findings::one(true, format!("etcd/{name}"), message, hint))
}

fn etcd_size(name: &MachineName, etcd: &EtcdStatus) -> Option<Finding> {
    let percent = etcd.database_mib * 100 / ETCD_QUOTA_MIB;
    let (warn, block) = ETCD_FULL;
    (percent > warn).then(|| {
        Findings::one(
            percent > block,
            format!("etcd-size/{name}"),
            format!("etcd's database on `{name}` has {} MiB of {ETCD_QUOTA_MIB} MiB; when it is full, nothing can be written", etcd.database_mib),
            "remove what fills it, then compact and defragment it (etcd's documentation, \"Maintenance\")",
        )
    })
}

/// Members that etcd lists, and machines that tell of one.
fn quorum(inputs: &Inputs, findings: &mut Findings) {
    let told: Vec<(&MachineName, &EtcdStatus)> = inputs
        .machines
        .iter()
        .filter(|(name, _)| inputs.nodes.contains_key(*name))
        .filter_map(|(name, status)| Some((name, status.etcd.as_ref()?)))
        .collect();
    let listed = told
        .iter()
        .filter_map(|(_, etcd)| usize::try_from(etcd.members).ok())
        .max()
        .unwrap_or(0);
    if listed > told.len() {
        findings.block(
            "etcd/members".into(),
            format!(
                "etcd lists {listed} members, and {} tell of theirs: {}",
                told.len(),
                some(told.iter().map(|(name, _)| name.as_str()))
            ),
            "bring the missing machine back, or remove its member (`etcdctl member remove`)",
        );
    }
}
