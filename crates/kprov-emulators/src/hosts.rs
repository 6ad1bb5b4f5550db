//! Bare-metal hosts for tests: machines of the local provider that run nothing but a real `sshd` (Debian's
//! openssh-server), each with a host key of its own.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use kprov_provider::Provider;
use kprov_provider_local::{LocalConfig, LocalProvider};
use kprov_types::machine::{FirstBoot, MachineSpec, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};

/// How long a host may take to answer.
const START_LIMIT: Duration = Duration::from_secs(30);

/// What a host does when it boots: `@SETUP@` is the test's own, `@KEY@` the key that is let in. Where the local provider keeps this
/// script is a directory of kprov's, which no host has that kprov was not on yet.
const BOOT: &str = r"#!/bin/sh
set -eu
umask 022
rm -rf /run/kprov
mkdir -p /run/sshd /etc/ssh/own
[ -f /etc/ssh/own/host ] || ssh-keygen -q -t ed25519 -N '' -C '' -f /etc/ssh/own/host
echo '@KEY@' >/etc/ssh/own/authorized_keys
@SETUP@
exec /usr/sbin/sshd -D -e -f /dev/null -o HostKey=/etc/ssh/own/host -o AuthorizedKeysFile=/etc/ssh/own/authorized_keys \
    -o StrictModes=no -o UsePAM=no -o PermitRootLogin=yes -o PasswordAuthentication=no -o LogLevel=VERBOSE \
    -o UseDNS=no -o MaxStartups=100:30:200 -o 'Subsystem=sftp internal-sftp'
";

/// Lets a user `admin` in, who may become root.
pub const ADMIN: &str = "id admin >/dev/null 2>&1 || { useradd -m -s /bin/sh admin; usermod -p '*' admin; }
echo 'admin ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/admin; chmod 440 /etc/sudoers.d/admin";
/// Lets a user `admin` in, who may not.
pub const MERE_USER: &str = "id admin >/dev/null 2>&1 || { useradd -m -s /bin/sh admin; usermod -p '*' admin; }
rm -f /etc/sudoers.d/admin";

/// Hosts on a network of their own; all gone when dropped.
pub struct Hosts {
    provider: LocalProvider,
    cluster: ClusterName,
    state: Utf8PathBuf,
    network: NetworkSpec,
    files: tempfile::TempDir,
    key: String,
}

impl Hosts {
    /// No hosts yet. `program` offers `machine-room` (`kprov`, or the local provider's own `machine-room`); `name` tells these
    /// hosts from those of other tests; `range` is theirs alone. What a killed test of this name left behind is removed.
    pub async fn open(program: &Utf8Path, name: &str, range: &str) -> Result<Self> {
        let state = Utf8PathBuf::from(format!("/var/lib/kprov/hosts-{name}"));
        let provider = LocalProvider::new(LocalConfig {
            state_dir: state.clone(),
            ..LocalConfig::new(program)
        })?;
        let files = tempfile::tempdir()?;
        let hosts = Self {
            provider,
            cluster: ClusterName::new(name)?,
            state,
            network: NetworkSpec {
                cidr: Some(range.parse()?),
                api_port: 6443,
            },
            key: new_key(&files.path().join("id"))?,
            files,
        };
        hosts.remove_all().await?;
        hosts.provider.ensure_network(&hosts.cluster, &hosts.network).await?;
        Ok(hosts)
    }

    /// Starts hosts: each with its name, and what it does at boot before `sshd`. Those that exist and were stopped boot again,
    /// as they were. Returns when all of them answer.
    pub async fn start(&self, hosts: &[(&str, &str)]) -> Result<()> {
        let mut specs = Vec::new();
        for (name, setup) in hosts {
            specs.push(MachineSpec {
                name: MachineName::new(*name)?,
                role: Role::Worker,
                zone: None,
                size: None,
                image: None,
                first_boot: FirstBoot(BOOT.replace("@SETUP@", setup).replace("@KEY@", &self.key)),
                data_disk: false,
            });
        }
        self.provider.ensure_machines(&self.cluster, &specs).await?;
        let deadline = Instant::now() + START_LIMIT;
        for (name, _) in hosts {
            let address = self.address(name).await?;
            while std::net::TcpStream::connect((address.as_str(), 22)).is_err() {
                if Instant::now() > deadline {
                    bail!(
                        "host `{name}` never answered; it printed: {}",
                        self.printed(name).await?
                    );
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// A host's address.
    pub async fn address(&self, name: &str) -> Result<String> {
        let observed = self.provider.observe(&self.cluster).await?;
        let found = observed.machines.iter().find(|m| m.name.as_str() == name);
        let address = found
            .and_then(|m| m.address)
            .with_context(|| format!("no host `{name}`"))?;
        Ok(address.to_string())
    }

    /// A host's public key, without its name.
    pub fn host_key(&self, name: &str) -> Result<String> {
        let text = self.inside(name, "cat /etc/ssh/own/host.pub")?;
        Ok(text.trim().to_owned())
    }

    /// The private key that all hosts let in.
    pub fn key(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.files.path().join("id")).unwrap_or_default()
    }

    /// A directory for a test's files, gone with the hosts.
    pub fn files(&self) -> &Utf8Path {
        Utf8Path::from_path(self.files.path()).unwrap_or(Utf8Path::new("/nonexistent"))
    }

    /// Another key, which nobody lets in.
    pub fn foreign_key(&self) -> Result<Utf8PathBuf> {
        let path = self.files.path().join("foreign");
        if !path.exists() {
            new_key(&path)?;
        }
        Ok(Utf8PathBuf::from_path_buf(path).unwrap_or_default())
    }

    /// Cuts a host's power.
    pub fn power_off(&self, name: &str) -> Result<()> {
        let status = Command::new("kill").args(["-KILL", &self.pid(name)?]).status()?;
        ensure!(status.success(), "host `{name}` can't be killed");
        Ok(())
    }

    /// Pulls a host's network cable, or puts it back. The host keeps running.
    pub fn cable(&self, name: &str, connected: bool) -> Result<()> {
        let output = Command::new("ip").args(["-j", "link", "show"]).output()?;
        let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let alias = format!("kprov:{}/{name}", self.cluster);
        let link = links
            .as_array()
            .into_iter()
            .flatten()
            .find(|link| link["ifalias"] == alias.as_str())
            .and_then(|link| link["ifname"].as_str())
            .with_context(|| format!("host `{name}` has no link"))?;
        let status = Command::new("ip")
            .args(["link", "set", link, if connected { "up" } else { "down" }])
            .status()?;
        ensure!(status.success(), "the link `{link}` can't be changed");
        Ok(())
    }

    /// Runs a script inside a host, past its `sshd`.
    pub fn inside(&self, name: &str, script: &str) -> Result<String> {
        let output = Command::new("nsenter")
            .args(["--target", &self.pid(name)?, "--all", "/bin/sh", "-ec", script])
            .output()?;
        ensure!(
            output.status.success(),
            "`{script}` on `{name}`: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What a host has printed, `sshd`'s log included.
    pub async fn printed(&self, name: &str) -> Result<String> {
        let name = MachineName::new(name)?;
        Ok(self.provider.console(&self.cluster, &name).await?.unwrap_or_default())
    }

    /// How many SSH connections a host has let in since it was made.
    pub async fn logins(&self, name: &str) -> Result<usize> {
        let printed = self.printed(name).await?;
        Ok(printed
            .lines()
            .filter(|line| line.contains("Accepted publickey for"))
            .count())
    }

    fn pid(&self, name: &str) -> Result<String> {
        let path = self
            .state
            .join(self.cluster.as_str())
            .join("machines")
            .join(name)
            .join("init.json");
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        Ok(record["pid"].as_i64().context("a host without a process")?.to_string())
    }

    /// Removes all hosts and their network.
    pub async fn remove_all(&self) -> Result<()> {
        let observed = self.provider.observe(&self.cluster).await?;
        let names: Vec<MachineName> = observed.machines.into_iter().map(|m| m.name).collect();
        self.provider.remove_machines(&self.cluster, &names).await?;
        self.provider.remove_network(&self.cluster).await?;
        Ok(())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let removed = std::thread::scope(|scope| {
            let work = scope.spawn(|| -> Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(self.remove_all())
            });
            work.join()
        });
        if !matches!(removed, Ok(Ok(()))) {
            tracing::error!(cluster = %self.cluster, "test hosts could not be removed");
        }
    }
}

/// A file as an empty disk that a host can be lent; detached when dropped.
pub struct Disk {
    /// Its path, here as on the host. Its partitions appear as `losetup --partscan` makes them.
    pub device: String,
    _file: tempfile::NamedTempFile,
}

impl Disk {
    /// A disk of so many MiB.
    pub fn new(mib: u64) -> Result<Self> {
        let file = tempfile::NamedTempFile::new_in("/var/tmp")?;
        file.as_file().set_len(mib << 20)?;
        let output = Command::new("losetup")
            .args(["-f", "--show", "--partscan"])
            .arg(file.path())
            .output()?;
        ensure!(
            output.status.success(),
            "no loop device: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let device = String::from_utf8(output.stdout)?.trim().to_owned();
        Ok(Self { device, _file: file })
    }

    /// Shows it to a host, until that boots again.
    pub fn lend(&self, hosts: &Hosts, host: &str) -> Result<()> {
        let number = self.device.trim_start_matches("/dev/loop");
        hosts.inside(host, &format!("[ -b {0} ] || mknod {0} b 7 {number}", self.device))?;
        Ok(())
    }

    /// The path of its first partition, there or not.
    pub fn partition(&self) -> String {
        format!("{}p1", self.device)
    }

    /// What `blkid` finds on it, such as its `TYPE` or `LABEL`.
    pub fn holds(&self, what: &str) -> Result<String> {
        let output = Command::new("blkid")
            .args(["-p", "-o", "value", "-s", what, &self.device])
            .output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

/// Makes a key pair and returns its public half.
fn new_key(path: &std::path::Path) -> Result<String> {
    let status = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .status()
        .context("can't run `ssh-keygen`")?;
    ensure!(status.success(), "`ssh-keygen` failed");
    Ok(std::fs::read_to_string(path.with_extension("pub"))?.trim().to_owned())
}
