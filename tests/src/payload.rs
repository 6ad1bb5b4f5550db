//! The release payloads under test.

use anyhow::{Context as _, Result, bail};
use camino::Utf8PathBuf;

/// One payload.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Its directory.
    pub dir: Utf8PathBuf,
    /// The public key of its signature; `None`: taken as it is.
    pub key: Option<Utf8PathBuf>,
    /// The Kubernetes version it says it is.
    pub version: String,
}

impl Payload {
    /// The options that make `kprov` take it.
    pub fn options(&self) -> Vec<String> {
        let mut options = vec!["--release".to_owned(), self.dir.to_string()];
        match &self.key {
            Some(key) => options.extend(["--release-key".to_owned(), key.to_string()]),
            None => options.push("--insecure-release".to_owned()),
        }
        options
    }

    /// The minor version's number.
    pub fn minor(&self) -> u32 {
        self.version
            .split('.')
            .nth(1)
            .and_then(|m| m.parse().ok())
            .unwrap_or_default()
    }

    /// An image of the payload, as pods refer to it.
    pub fn image(&self, component: &str) -> Result<String> {
        let release: serde_json::Value = serde_json::from_slice(&std::fs::read(self.dir.join("release.json"))?)?;
        let image = &release["images"][component];
        let part = |key: &str| {
            image[key]
                .as_str()
                .with_context(|| format!("the release has no image of {component}"))
        };
        Ok(format!("{}@{}", part("reference")?, part("digest")?))
    }
}

impl Payload {
    /// From `dir=key`; the key may be missing.
    fn parse(entry: &str) -> Result<Self> {
        let (dir, key) = entry.split_once('=').unwrap_or((entry, ""));
        let dir = Utf8PathBuf::from(dir);
        let text = std::fs::read(dir.join("release.json")).with_context(|| format!("`{dir}` is no payload"))?;
        let release: serde_json::Value = serde_json::from_slice(&text)?;
        let version = release["kubernetes"]
            .as_str()
            .context("release.json names no version")?
            .to_owned();
        Ok(Self {
            dir,
            key: (!key.is_empty()).then(|| key.into()),
            version,
        })
    }
}

/// The chains of payloads to upgrade along, oldest version first, that `KPROV_TEST_UPGRADES` names: `:` between chains, `,`
/// between payloads.
pub fn upgrades() -> Result<Vec<Vec<Payload>>> {
    let list = std::env::var("KPROV_TEST_UPGRADES")
        .context("KPROV_TEST_UPGRADES is not set: run the tests by `cargo xtask test`")?;
    let chains: Vec<Vec<Payload>> = list
        .split(':')
        .filter(|chain| !chain.is_empty())
        .map(|chain| chain.split(',').map(Payload::parse).collect())
        .collect::<Result<_>>()?;
    if chains.iter().any(|chain| chain.len() < 2) || chains.is_empty() {
        bail!("KPROV_TEST_UPGRADES names no chain of two versions");
    }
    Ok(chains)
}

/// A payload with something wrong in it.
#[derive(Debug, Clone)]
pub struct Broken {
    /// What: `apiserver`, `scheduler`, `kubelet` or `digest`.
    pub kind: String,
    /// The payload.
    pub payload: Payload,
}

/// The broken payloads that `KPROV_TEST_BROKEN` names: `kind=dir=key`, `:` between.
pub fn broken() -> Result<Vec<Broken>> {
    let list = std::env::var("KPROV_TEST_BROKEN")
        .context("KPROV_TEST_BROKEN is not set: run the tests by `cargo xtask test`")?;
    let entries = list.split(':').filter(|entry| !entry.is_empty());
    entries
        .map(|entry| {
            let (kind, rest) = entry
                .split_once('=')
                .context("KPROV_TEST_BROKEN: `kind=dir=key` is expected")?;
            Ok(Broken {
                kind: kind.to_owned(),
                payload: Payload::parse(rest)?,
            })
        })
        .collect()
}

/// All payloads that `KPROV_TEST_PAYLOADS` names. None at all is an error: a test that ran nothing must not pass.
pub fn payloads() -> Result<Vec<Payload>> {
    let list = std::env::var("KPROV_TEST_PAYLOADS")
        .context("KPROV_TEST_PAYLOADS is not set: run the tests by `cargo xtask test`")?;
    let mut payloads = Vec::new();
    for entry in list.split(':').filter(|e| !e.is_empty()) {
        payloads.push(Payload::parse(entry)?);
    }
    if payloads.is_empty() {
        bail!("KPROV_TEST_PAYLOADS names no payload");
    }
    eprintln!(
        "Kubernetes versions under test: {}",
        payloads
            .iter()
            .map(|p| p.version.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    );
    Ok(payloads)
}
