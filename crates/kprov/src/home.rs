//! What kprov keeps of each cluster on the machine it's run from: secrets, the file that was asked for, the kubeconfig.
//!
//! Not a state file of the infrastructure: machines, networks and disks are always found again at the provider. What is
//! here can't be found anywhere else (private keys), or is a convenience (kubeconfig).

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::cluster::ClusterFile;
use kprov_types::node::{ClusterSecrets, JoinToken, KeyPairPem, SetupIdentity};
use kprov_types::{ClusterName, Digest, KubernetesVersion};
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::commands::baremetal::KeptInventory;
use crate::failure::{OrHint as _, UserError};

/// kprov's home directory.
#[derive(Debug, Clone)]
pub(crate) struct Home(Utf8PathBuf);

/// What was asked for, as kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// The cluster file, flags included.
    pub file: ClusterFile,
    /// The version the cluster was started with.
    pub kubernetes: KubernetesVersion,
    /// The payload it was started from.
    pub release: Utf8PathBuf,
    /// The digest of that payload's `release.json`.
    pub release_digest: Digest,
    /// Whether an `up` has come to its end.
    #[serde(default)]
    pub complete: bool,
    /// The hosts, where an inventory names them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory: Option<KeptInventory>,
}

/// Everything secret, as kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Secrets {
    /// The cluster's own secrets.
    pub cluster: ClusterSecrets,
    /// The token that machines join with; its Secret in the cluster lives for a few hours after each `up`.
    pub join_token: JoinToken,
    /// The client certificate that machines' setup endpoints trust.
    pub setup_client: KeyPairPem,
    /// Each control-plane machine's identity for its setup endpoint, by machine name.
    pub setup: std::collections::BTreeMap<String, SetupIdentity>,
}

impl Home {
    /// The directory given, else `~/.kprov`.
    pub(crate) fn open(given: Option<&Utf8Path>) -> Result<Self> {
        if let Some(dir) = given {
            return Ok(Self(
                camino::absolute_utf8(dir).with_context(|| format!("can't make `{dir}` absolute"))?,
            ));
        }
        let home = std::env::home_dir().and_then(|p| Utf8PathBuf::from_path_buf(p).ok());
        match home {
            Some(home) if !home.as_str().is_empty() => Ok(Self(home.join(".kprov"))),
            _ => Err(UserError::new("can't tell your home directory")
                .hint("set HOME, or give `--home DIR`")
                .into()),
        }
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Utf8Path {
        &self.0
    }

    /// Where public keys lie that are trusted, and one's own signing key.
    pub(crate) fn keys(&self) -> Utf8PathBuf {
        self.0.join("keys")
    }

    /// The clusters that something is kept of, sorted.
    pub(crate) fn clusters(&self) -> Result<Vec<ClusterName>> {
        let dir = self.0.join("clusters");
        let entries = match dir.read_dir_utf8() {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("can't list `{dir}`")),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("can't list `{dir}`"))?;
            if let Ok(name) = ClusterName::new(entry.file_name())
                && entry.path().join("cluster.json").exists()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// One cluster's part.
    pub(crate) fn cluster(&self, name: &ClusterName) -> ClusterHome {
        ClusterHome {
            dir: self.0.join("clusters").join(name.as_str()),
            name: name.clone(),
        }
    }

    /// The cluster meant: the one named, or the only one there is.
    pub(crate) fn pick(&self, name: Option<&ClusterName>) -> Result<ClusterHome> {
        if let Some(name) = name {
            return Ok(self.cluster(name));
        }
        let mut names = self.clusters()?;
        match (names.pop(), names.len()) {
            (Some(only), 0) => Ok(self.cluster(&only)),
            (None, _) => Err(UserError::new("no cluster is known here")
                .hint("make one with `kprov up --name NAME`")
                .into()),
            (Some(last), _) => {
                names.push(last);
                let all = names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
                Err(UserError::new(format!("more than one cluster is known here: {all}"))
                    .hint("say which one with `--name NAME`")
                    .into())
            }
        }
    }
}

/// What is kept of one cluster.
#[derive(Debug, Clone)]
pub(crate) struct ClusterHome {
    dir: Utf8PathBuf,
    /// The cluster.
    pub name: ClusterName,
}

/// Held while a command changes a cluster; released when dropped or when the process ends in any way.
#[derive(Debug)]
pub(crate) struct ClusterLock(#[expect(dead_code, reason = "held for its Drop")] Flock<fs::File>);

impl ClusterHome {
    /// The directory.
    pub(crate) fn dir(&self) -> &Utf8Path {
        &self.dir
    }

    /// The kubeconfig's path.
    pub(crate) fn kubeconfig(&self) -> Utf8PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Takes the cluster's lock, or says who else is at work.
    pub(crate) fn lock(&self) -> Result<ClusterLock> {
        self.make_dir()?;
        let path = self.dir.join("lock");
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("can't open `{path}`"))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map(ClusterLock)
            .map_err(|(_, errno)| {
                if errno == nix::errno::Errno::EWOULDBLOCK {
                    UserError::new(format!("another kprov is at work on cluster `{}`", self.name))
                        .hint("wait until it has ended, or end it, and try again")
                        .into()
                } else {
                    anyhow::Error::from(errno).context(format!("can't lock `{path}`"))
                }
            })
    }

    /// What was asked for, if anything is kept.
    pub(crate) fn record(&self) -> Result<Option<Record>> {
        self.read("cluster.json")
    }

    /// The secrets, if any are kept.
    pub(crate) fn secrets(&self) -> Result<Option<Secrets>> {
        self.read("secrets.json")
    }

    /// Keeps what was asked for.
    pub(crate) fn keep_record(&self, record: &Record) -> Result<()> {
        self.write("cluster.json", &serde_json::to_vec_pretty(record)?)
    }

    /// Keeps the secrets, readable by their owner alone.
    pub(crate) fn keep_secrets(&self, secrets: &Secrets) -> Result<()> {
        self.write("secrets.json", &serde_json::to_vec_pretty(secrets)?)
    }

    /// Writes the kubeconfig if it isn't there already, byte for byte.
    pub(crate) fn keep_kubeconfig(&self, text: &str) -> Result<()> {
        self.write("kubeconfig", text.as_bytes())
    }

    /// Forgets everything about the cluster.
    pub(crate) fn forget(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("can't remove `{}`", self.dir))
            }
            _ => {
                // The parents go too when nothing else is in them, so that `down` leaves nothing behind.
                if let Some(clusters) = self.dir.parent() {
                    let _ = fs::remove_dir(clusters);
                    if let Some(home) = clusters.parent() {
                        let _ = fs::remove_dir(home);
                    }
                }
                Ok(())
            }
        }
    }

    fn make_dir(&self) -> Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .or_hint(
                format!("can't make `{}`", self.dir),
                "this is where the cluster's secrets are kept; give another place with `--home DIR`",
            )
    }

    fn read<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>> {
        let path = self.dir.join(file);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).or_hint(
                format!("`{path}` is damaged"),
                "put it back from a backup, or remove the cluster by `kprov down`",
            ),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("can't read `{path}`")),
        }
    }

    fn write(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.make_dir()?;
        let path = self.dir.join(file);
        if fs::read(&path).is_ok_and(|old| old == bytes) {
            return Ok(());
        }
        write_private(&path, bytes)
    }
}

/// Replaces a file in one step; readable by its owner alone.
pub(crate) fn write_private(path: &Utf8Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let dir = path
            .parent()
            .filter(|d| !d.as_str().is_empty())
            .unwrap_or(Utf8Path::new("."));
        let mut temporary = tempfile::NamedTempFile::new_in(dir)?;
        temporary.write_all(bytes)?;
        temporary.as_file().sync_all()?;
        temporary.persist(path)?;
        Ok(())
    };
    write().or_hint(
        format!("can't write `{path}`"),
        "check that there is space on the disk and that you may write there",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(Utf8Path::from_path(dir.path())).unwrap();
        (dir, home)
    }

    #[test]
    fn picks_the_only_cluster_and_asks_otherwise() {
        let (_dir, home) = home();
        assert!(home.pick(None).is_err());
        for name in ["b", "a"] {
            let cluster = home.cluster(&ClusterName::new(name).unwrap());
            cluster.write("cluster.json", b"{}").unwrap();
            if name == "b" {
                assert_eq!(home.pick(None).unwrap().name.as_str(), "b");
            }
        }
        let message = home.pick(None).unwrap_err().to_string();
        assert_eq!(message, "more than one cluster is known here: `a`, `b`");
        home.cluster(&ClusterName::new("a").unwrap()).forget().unwrap();
        assert_eq!(home.pick(None).unwrap().name.as_str(), "b");
    }

    #[test]
    fn one_at_a_time() {
        let (_dir, home) = home();
        let cluster = home.cluster(&ClusterName::new("a").unwrap());
        let held = cluster.lock().unwrap();
        assert!(cluster.lock().unwrap_err().to_string().contains("another kprov"));
        drop(held);
        cluster.lock().unwrap();
    }

    #[test]
    fn files_are_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_dir, home) = home();
        let cluster = home.cluster(&ClusterName::new("a").unwrap());
        cluster.keep_kubeconfig("x").unwrap();
        assert_eq!(
            fs::metadata(cluster.kubeconfig()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::metadata(cluster.dir()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
