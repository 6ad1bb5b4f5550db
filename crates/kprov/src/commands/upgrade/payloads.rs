//! The payloads at hand for an upgrade: those that were named, and those that lie where one would look.

use anyhow::Result;
use camino::{Utf8Path, Utf8PathBuf};
use kprov_release::Payload;
use kprov_types::api::ReleaseRef;

use super::super::Context;
use super::super::access::Access;
use super::super::release;
use crate::cli::TrustArgs;
use crate::failure::UserError;

/// A payload on this host.
pub(in crate::commands) struct AtHand {
    /// The payload.
    pub payload: Payload,
    /// The key it is signed by, its id and PEM; `None` until it is verified, or where nothing trusted signed it.
    pub signer: Option<(String, String)>,
    /// It is taken although nothing trusted signed it.
    pub insecure: bool,
}

impl AtHand {
    /// Which release it is.
    pub(in crate::commands) fn release(&self) -> ReleaseRef {
        ReleaseRef {
            version: self.payload.release().kubernetes.clone(),
            digest: self.payload.digest(),
        }
    }
}

/// Opens all payloads at hand; nothing is verified yet. One that was named has to be one; of others, what can't be read is
/// passed over.
pub(super) fn find(context: &Context, access: &Access, named: &[Utf8PathBuf]) -> Result<Vec<Payload>> {
    let mut found = Vec::new();
    for dir in named {
        if dir.join("release.json").exists() {
            found.push(release::open(dir)?);
            continue;
        }
        let below = below(dir);
        if below.is_empty() {
            return Err(UserError::new(format!("there is no release payload in `{dir}`"))
                .hint("name a directory made by `kprov release create`, or one with such directories in it")
                .into());
        }
        found.extend(below);
    }
    found.extend(below(&context.home.path().join("releases")));
    let record = access.home.as_ref().and_then(|home| home.record().ok().flatten());
    if let Some(parent) = record.as_ref().and_then(|record| record.release.parent()) {
        found.extend(below(parent));
    }
    // The first of equal ones wins.
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|payload| seen.insert(payload.digest()));
    Ok(found)
}

fn below(dir: &Utf8Path) -> Vec<Payload> {
    let Ok(entries) = dir.read_dir_utf8() else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.flatten().map(camino::Utf8DirEntry::into_path).collect();
    paths.sort();
    paths.iter().filter_map(|path| Payload::open(path).ok()).collect()
}

/// Verifies a payload's signature and every digest.
pub(in crate::commands) async fn verify(context: &Context, trust: &TrustArgs, path: &Utf8Path) -> Result<AtHand> {
    let release::Trusted {
        payload,
        signature,
        signer,
    } = release::verified(context, path, trust).await?;
    if signer.is_none() {
        context
            .reporter
            .note(&format!("warning: the payload `{path}` is {signature}"));
    }
    Ok(AtHand {
        payload,
        insecure: signer.is_none(),
        signer,
    })
}
