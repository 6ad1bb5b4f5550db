//! What the machine tells of itself besides its orders: its API server processes, free space, certificates that expire.

use std::collections::BTreeMap;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use futures::future::join_all;
use jiff::Timestamp;
use kprov_bootstrap::paths as kubernetes;
use kprov_front::health::Standing;
use kprov_front::{Backend, FrontState};
use kprov_types::api::{ApiServerStatus, CertificateExpiry};
use kprov_types::ports;
use tokio::sync::watch;
use x509_parser::pem::Pem;

use super::report::Report;
use crate::api::{self, Identity};
use crate::paths;

/// How often an API server that has not told its version is asked again.
const ASK: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const ASK_LIMIT: Duration = Duration::from_secs(3);
/// How often free space and certificates are looked at.
const LOOK: Duration = Duration::from_secs(30);
/// Free space is told in steps of this many MiB, so that it is not another all the time.
const STEP: u64 = 256;

/// Keeps [`MachineStatus::api_servers`] as this machine's API server processes are, for as long as the front runs. Each is
/// asked at its own address, by the front for its health and here for its version.
pub(super) async fn follow_api_servers(mut front: watch::Receiver<FrontState>, report: Report) {
    // By revision, with when the front saw it change last: another process may have taken its place.
    let mut versions: BTreeMap<u16, (std::time::Instant, String)> = BTreeMap::new();
    let mut times: BTreeMap<u16, (std::time::Instant, Timestamp)> = BTreeMap::new();
    loop {
        let seen = local(&front.borrow_and_update());
        // Told once for each change: a time that is reckoned anew would differ by a little every time.
        times.retain(|revision, (since, _)| seen.get(revision).is_some_and(|(_, now)| now == since));
        for (revision, (_, since)) in &seen {
            times.entry(*revision).or_insert_with(|| (*since, time_of(*since)));
        }
        versions.retain(|revision, (since, _)| seen.get(revision).is_some_and(|(_, now)| now == since));
        let tell = |versions: &BTreeMap<u16, (std::time::Instant, String)>| {
            let one = |(revision, (ready, _)): (&u16, &(bool, std::time::Instant))| ApiServerStatus {
                revision: *revision,
                ready: *ready,
                version: versions.get(revision).map(|(_, v)| v.clone()).unwrap_or_default(),
                since: times.get(revision).map(|(_, time)| *time),
            };
            let now: Vec<_> = seen.iter().map(one).collect();
            report.set(|status| status.api_servers = now);
        };
        tell(&versions);
        let unknown: Vec<_> = seen
            .iter()
            .filter(|(revision, _)| !versions.contains_key(revision))
            .map(|(revision, (_, since))| (*revision, *since))
            .collect();
        let ask = async {
            let asked = join_all(unknown.iter().map(|(revision, _)| version(*revision))).await;
            let told = unknown.iter().zip(asked);
            told.filter_map(|((revision, since), version)| Some((*revision, (*since, version?))))
                .collect::<Vec<_>>()
        };
        let told = tokio::select! {
            told = ask => told,
            changed = front.changed() => if changed.is_err() { return } else { continue },
        };
        let pause = if told.len() < unknown.len() { ASK } else { Duration::MAX };
        if !told.is_empty() {
            versions.extend(told);
            tell(&versions);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = front.changed() => if changed.is_err() { return },
        }
    }
}

/// The time of day, in whole seconds, of an instant that has passed.
fn time_of(instant: std::time::Instant) -> Timestamp {
    let now = Timestamp::now();
    let passed = jiff::SignedDuration::try_from(instant.elapsed()).unwrap_or_default();
    let then = now.saturating_sub(passed).unwrap_or(now);
    Timestamp::from_second(then.as_second()).unwrap_or(now)
}

/// The local revisions: whether each is ready, and since when it is so.
fn local(front: &FrontState) -> BTreeMap<u16, (bool, std::time::Instant)> {
    let one = |(backend, state): (&Backend, &kprov_front::BackendState)| match backend {
        Backend::Local { revision, .. } => Some((*revision, (state.standing == Standing::Up, state.since))),
        Backend::Remote(_) => None,
    };
    front.backends.iter().filter_map(one).collect()
}

/// The version that an API server tells at its own address, without the `v`.
async fn version(revision: u16) -> Option<String> {
    let address = std::net::SocketAddr::from((ports::revision_address(revision), ports::API));
    let ask = async {
        let client = api::client_at(Identity::Kubelet, address).await.ok()?;
        client.apiserver_version().await.ok()
    };
    let answer = tokio::time::timeout(ASK_LIMIT, ask).await.ok()??;
    Some(answer.git_version.trim_start_matches('v').to_owned())
}

/// Keeps free space and the certificate that expires first, for as long as the process runs.
pub(super) async fn look(report: Report) {
    loop {
        let scan = tokio::task::spawn_blocking(|| {
            earliest(&certificate_files(&[
                Utf8Path::new(kubernetes::PKI),
                &Utf8Path::new(kubernetes::KUBELET).join("pki"),
            ]))
        });
        let expires = scan.await.unwrap_or_default();
        let free = free_mib(&[paths::STATE, "/var/lib/containerd"]);
        report.set(|status| {
            status.disk_free_mib = free;
            status.certificate_expires = expires;
        });
        tokio::time::sleep(LOOK).await;
    }
}

/// The least free space of the file systems of these directories.
fn free_mib(directories: &[&str]) -> Option<u64> {
    let free = |directory: &&str| {
        let found = nix::sys::statvfs::statvfs(*directory).ok()?;
        Some(found.blocks_available() * found.fragment_size() / (1 << 20))
    };
    let least = directories.iter().filter_map(free).min()?;
    Some(least / STEP * STEP)
}

/// The files below these directories that hold certificates, links that kubelet keeps to the newest of its own among them.
fn certificate_files(directories: &[&Utf8Path]) -> Vec<Utf8PathBuf> {
    let mut found = Vec::new();
    let mut left: Vec<Utf8PathBuf> = directories.iter().map(|d| (*d).to_owned()).collect();
    while let Some(directory) = left.pop() {
        let Ok(entries) = directory.read_dir_utf8() else {
            continue;
        };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                left.push(path.to_owned());
            } else if path.extension() == Some("crt") || name.ends_with("-current.pem") {
                found.push(path.to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Of all certificates in these files, the one that expires first.
fn earliest(files: &[Utf8PathBuf]) -> Option<CertificateExpiry> {
    let mut all = Vec::new();
    for path in files {
        let Ok(text) = std::fs::read(path) else { continue };
        for pem in Pem::iter_from_buffer(&text)
            .flatten()
            .filter(|pem| pem.label == "CERTIFICATE")
        {
            let Ok(certificate) = pem.parse_x509() else { continue };
            if let Ok(time) = Timestamp::from_second(certificate.validity().not_after.timestamp()) {
                all.push(CertificateExpiry {
                    path: path.to_string(),
                    time,
                });
            }
        }
    }
    all.into_iter().min_by_key(|expiry| expiry.time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_that_expires_first_is_found_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap();
        let certificate = |year| {
            let mut params = rcgen::CertificateParams::new(vec!["x".into()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            let key = rcgen::KeyPair::generate().unwrap();
            let pem = params.self_signed(&key).unwrap().pem();
            format!("{pem}{}", key.serialize_pem())
        };
        std::fs::create_dir_all(root.join("etcd")).unwrap();
        std::fs::write(root.join("ca.crt"), certificate(2040)).unwrap();
        std::fs::write(root.join("etcd/peer.crt"), certificate(2031)).unwrap();
        // One that was rotated away counts no more.
        std::fs::write(root.join("kubelet-client-2020.pem"), certificate(2021)).unwrap();
        std::fs::write(root.join("kubelet-client-current.pem"), certificate(2035)).unwrap();
        std::fs::write(root.join("broken.crt"), "x").unwrap();
        let found = earliest(&certificate_files(&[root])).unwrap();
        assert_eq!(found.path, root.join("etcd/peer.crt").as_str());
        assert_eq!(found.time.to_string(), "2031-01-01T00:00:00Z");
        assert_eq!(earliest(&[]), None);
    }

    #[test]
    fn free_space_is_told_in_steps() {
        assert_eq!(free_mib(&["/proc/nowhere"]), None);
        assert_eq!(free_mib(&["/"]).unwrap() % STEP, 0);
    }
}
