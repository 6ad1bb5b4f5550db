//! Where things are: the workspace, and the cache directory outside it.

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};

/// The workspace's root directory. Cargo names it at run time: a program built by another checkout that shares the target directory
/// would know only that one's.
pub(crate) fn workspace() -> Utf8PathBuf {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    let here = Utf8PathBuf::from(here);
    here.parent()
        .and_then(Utf8Path::parent)
        .map_or_else(|| here.clone(), Utf8Path::to_owned)
}

/// `$XDG_CACHE_HOME/kprov`, else `~/.cache/kprov`; made if missing.
pub(crate) fn dir() -> Result<Utf8PathBuf> {
    let base = match std::env::var("XDG_CACHE_HOME") {
        Ok(dir) if !dir.is_empty() => Utf8PathBuf::from(dir),
        _ => std::env::home_dir()
            .and_then(|h| Utf8PathBuf::from_path_buf(h).ok())
            .context("can't tell your home directory; set HOME")?
            .join(".cache"),
    };
    let dir = base.join("kprov");
    std::fs::create_dir_all(&dir).with_context(|| format!("can't make `{dir}`"))?;
    Ok(dir)
}

/// Cargo's target directory: the caller's own choice, else one in the cache, so that clean clones share a build.
pub(crate) fn target() -> Result<Utf8PathBuf> {
    match std::env::var("CARGO_TARGET_DIR") {
        Ok(dir) if !dir.is_empty() => Ok(camino::absolute_utf8(dir)?),
        _ => Ok(dir()?.join("target")),
    }
}
