//! A cluster under test: removed when dropped, whatever happened.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;

use crate::payload::Payload;

/// A cluster's name with a home of its own for kprov.
pub struct Cluster {
    /// Its name.
    pub name: String,
    home: tempfile::TempDir,
    bin: Utf8PathBuf,
    environment: Vec<(String, String)>,
}

impl Cluster {
    /// Nothing is made yet.
    pub fn new(name: &str) -> Result<Self> {
        let cluster = Self::with_environment(name, Vec::new())?;
        // What a test that was killed left behind would only confuse this one.
        let _ = cluster.kprov(&["down", "--name", name, "--yes"]).output();
        Ok(cluster)
    }

    /// Nothing is made yet; what an earlier test left, on whichever provider, is not removed. `kprov` gets these variables.
    pub fn with_environment(name: &str, environment: Vec<(String, String)>) -> Result<Self> {
        let bin = std::env::var("KPROV_BIN").context("KPROV_BIN is not set: run the tests by `cargo xtask test`")?;
        Ok(Self {
            name: name.to_owned(),
            home: tempfile::tempdir()?,
            bin: bin.into(),
            environment,
        })
    }

    /// kprov's home for this cluster.
    pub fn home(&self) -> &Utf8Path {
        Utf8Path::from_path(self.home.path()).unwrap_or(Utf8Path::new("/nonexistent"))
    }

    /// A `kprov` command with this cluster's home.
    pub fn kprov(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("kprov"));
        command
            .args(args)
            .env("KPROV_HOME", self.home.path())
            .env_remove("KPROV_RELEASE")
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// `kprov up` of this size.
    pub fn up_command(&self, payload: &Payload, control_plane: u32, workers: u32) -> Command {
        let mut command = self.kprov(&["up", "--provider", "local", "--name", &self.name]);
        command
            .args([
                "--control-plane",
                &control_plane.to_string(),
                "--workers",
                &workers.to_string(),
            ])
            .args(payload.options());
        command
    }

    /// Runs `kprov up` to its end; on failure everything it printed is in the error.
    pub fn up(&self, payload: &Payload, control_plane: u32, workers: u32) -> Result<()> {
        finished(&self.up_command(payload, control_plane, workers).output()?)
    }

    /// `kprov upgrade` to a version, with these payloads at hand.
    pub fn upgrade_command(&self, payloads: &[Payload], to: &str) -> Command {
        let mut command = self.kprov(&["upgrade", "--name", &self.name, "--to", to, "--yes"]);
        for payload in payloads {
            command.args(payload.options());
        }
        command
    }

    /// Runs `kprov down` to its end.
    pub fn down(&self) -> Result<()> {
        finished(&self.kprov(&["down", "--name", &self.name, "--yes"]).output()?)
    }

    /// The kubeconfig's path.
    pub fn kubeconfig(&self) -> Utf8PathBuf {
        self.home().join("clusters").join(&self.name).join("kubeconfig")
    }

    /// A kubectl for the cluster.
    pub fn kubectl(&self, payload: &Payload) -> Result<Kubectl> {
        let carried = kubectl_of(payload)?;
        Ok(Kubectl {
            program: carried,
            kubeconfig: self.kubeconfig(),
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.home().join("clusters").exists() {
            return;
        }
        if std::env::var_os("KPROV_TEST_KEEP").is_some() {
            eprintln!("kept: cluster {} with KPROV_HOME={}", self.name, self.home().as_str());
            self.home.disable_cleanup(true);
            return;
        }
        if let Err(error) = self.down() {
            eprintln!("cluster {} could not be removed: {error:#}", self.name);
        }
    }
}

/// The payload's own kubectl, else the one beside the test binaries, else the one in PATH.
fn kubectl_of(payload: &Payload) -> Result<Utf8PathBuf> {
    let release: Value = serde_json::from_slice(&std::fs::read(payload.dir.join("release.json"))?)?;
    let carried = release["hostFiles"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|f| f["name"] == "kubectl");
    if let Some(hex) = carried
        .and_then(|f| f["digest"].as_str())
        .and_then(|d| d.strip_prefix("sha256:"))
    {
        let path = std::env::temp_dir().join(format!("kprov-test-kubectl-{}", &hex[..16]));
        let path = Utf8PathBuf::from_path_buf(path)
            .ok()
            .context("the temporary directory is not UTF-8")?;
        if !path.exists() {
            let new = Utf8PathBuf::from(format!("{path}.{}", std::process::id()));
            std::fs::copy(payload.dir.join("blobs/sha256").join(hex), &new)?;
            std::os::unix::fs::chown(&new, None, None)?;
            std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            std::fs::rename(&new, &path)?;
        }
        return Ok(path);
    }
    let beside = std::env::var("KPROV_TEST_BINARIES").map(|d| Utf8PathBuf::from(d).join("kubectl"));
    Ok(beside.ok().filter(|p| p.exists()).unwrap_or_else(|| "kubectl".into()))
}

/// Runs kubectl against one cluster.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: Utf8PathBuf,
    kubeconfig: Utf8PathBuf,
}

impl Kubectl {
    /// A kubectl command.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Its stdout; a failure has what it printed.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let out = self
            .command(args)
            .output()
            .with_context(|| format!("can't run `{}`", self.program))?;
        finished(&out).with_context(|| format!("kubectl {}", args.join(" ")))?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// A resource or list as JSON.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let mut all = vec!["get", "-o", "json"];
        all.extend_from_slice(args);
        Ok(serde_json::from_str(&self.run(&all)?)?)
    }

    /// Applies objects.
    pub fn apply(&self, objects: &Value) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        std::io::Write::write_all(&mut file, objects.to_string().as_bytes())?;
        let path = file.path().to_string_lossy().into_owned();
        self.run(&["apply", "-f", &path]).map(|_| ())
    }

    /// Waits until a pod is ready.
    pub fn ready(&self, pod: &str) -> Result<()> {
        self.run(&["wait", "--for=condition=Ready", "--timeout=120s", pod])
            .map(|_| ())
            .or_else(|error| {
                let described = self.run(&["describe", pod]).unwrap_or_default();
                bail!("{error:#}\n{described}")
            })
    }

    /// Repeats until it succeeds.
    pub fn eventually(&self, limit: Duration, args: &[&str]) -> Result<String> {
        crate::wait_for(&format!("kubectl {}", args.join(" ")), limit, || self.run(args))
    }
}

/// Success, or an error with everything that was printed.
pub(crate) fn finished(out: &Output) -> Result<()> {
    if out.status.success() {
        return Ok(());
    }
    bail!(
        "{}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}
