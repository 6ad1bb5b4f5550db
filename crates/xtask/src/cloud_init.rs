//! Debian's cloud-init, unpacked: what end-to-end tests put into machines that stand in for a cloud's instances. It's not
//! installed on this host, whose next boot it would take part in.

use anyhow::Result;
use camino::Utf8PathBuf;

use crate::cache;
use crate::debian::{self, Apt};

/// cloud-init, and the packages of Python's that it needs.
const PACKAGES: &[&str] = &[
    "cloud-init",
    "python3-attr",
    "python3-certifi",
    "python3-chardet",
    "python3-charset-normalizer",
    "python3-configobj",
    "python3-idna",
    "python3-jinja2",
    "python3-json-pointer",
    "python3-jsonpatch",
    "python3-jsonschema",
    "python3-markupsafe",
    "python3-netifaces",
    "python3-oauthlib",
    "python3-pyrsistent",
    "python3-requests",
    "python3-serial",
    "python3-six",
    "python3-urllib3",
    "python3-yaml",
];
/// What runs it, and what rooms make volumes with.
const HOST_PACKAGES: &[&str] = &["e2fsprogs", "mount", "python3", "util-linux"];

/// The directory with all of it.
pub(crate) fn unpacked() -> Result<Utf8PathBuf> {
    debian::install(HOST_PACKAGES)?;
    let root = cache::dir()?.join("debian-cloud-init");
    let done = root.join(".done");
    if !done.exists() {
        Apt::new(cache::dir()?.join("apt"))?.unpack(PACKAGES, &root)?;
        std::fs::write(&done, "")?;
    }
    Ok(root)
}
