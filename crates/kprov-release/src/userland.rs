//! The iptables programs that kube-proxy calls, for its image.

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::release::{Arch, ImageComponent};

use crate::create::{self, CreateError, Missing};
use crate::output::OutputError;
use crate::rootfs::Rootfs;
use crate::{locate, program};

/// What kube-proxy cannot do without. One program that acts by the name it is called by, under links.
const IPTABLES: &[&str] = &["iptables", "iptables-save", "iptables-restore"];
/// The same for IPv6.
const IP6TABLES: &[&str] = &["ip6tables", "ip6tables-save", "ip6tables-restore"];
/// What other modes and the removal of stale connections use.
const OTHERS: &[&str] = &["nft", "conntrack", "ipset"];
/// The Debian package of the first two.
const PACKAGE: &str = "iptables";

/// The file tree of kube-proxy's image, but for kube-proxy: from `rootfs/kube-proxy` in one of the directories, else the
/// host's programs.
pub(crate) fn kube_proxy(from: &[Utf8PathBuf], host_fallback: bool, arch: Arch) -> Result<Rootfs, CreateError> {
    if let Some(dir) = locate::rootfs(from, ImageComponent::KubeProxy) {
        let mut tree = Rootfs::default();
        tree.copy(&dir)
            .map_err(|source| OutputError::Read { path: dir, source })?;
        return Ok(tree);
    }
    let mut places: Vec<_> = from
        .iter()
        .map(|d| d.join("rootfs").join(ImageComponent::KubeProxy.as_str()))
        .collect();
    if host_fallback {
        places.extend(program::host_directories());
    }
    let host = |name: &str| if host_fallback { program::on_host(name) } else { None };
    let missing: Vec<_> = IPTABLES
        .iter()
        .filter(|name| host(name).is_none())
        .map(|name| Missing {
            name,
            places: places.clone(),
            package: Some(PACKAGE),
        })
        .collect();
    if !missing.is_empty() {
        return Err(CreateError::NoIptables { missing, host_fallback });
    }
    let mut tree = Rootfs::minimal();
    for name in [IPTABLES, IP6TABLES, OTHERS].concat() {
        let Some(path) = host(name) else { continue };
        let real = canonical(&path)?;
        if !tree.contains(&real) {
            create::add_program(&mut tree, &real, &real, arch)?;
        }
        let link = Utf8Path::new("/usr/sbin").join(name);
        if !tree.contains(&link) {
            tree.link(&link, &real);
        }
    }
    if let Some(iptables) = host(IPTABLES[0]) {
        add_extensions(&mut tree, &canonical(&iptables)?, arch)?;
    }
    Ok(tree)
}

/// Adds the libraries that iptables loads by name for its matches and targets. They are beside `libxtables`.
fn add_extensions(tree: &mut Rootfs, iptables: &Utf8Path, arch: Arch) -> Result<(), CreateError> {
    let Some(loader) = create::check_elf(iptables, arch)?.interpreter else {
        return Ok(());
    };
    let libraries = |path: &Utf8Path| {
        program::libraries(&loader, path).map_err(|source| CreateError::Run {
            path: path.to_owned(),
            source,
        })
    };
    let found = libraries(iptables)?.unwrap_or_default();
    let Some(library) = found
        .iter()
        .find(|l| l.file_name().is_some_and(|n| n.starts_with("libxtables.")))
    else {
        return Ok(());
    };
    let dir = canonical(library)?.with_file_name("xtables");
    let unreadable = |source| OutputError::Read {
        path: dir.clone(),
        source,
    };
    for entry in dir.read_dir_utf8().map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.into_path();
        if path.extension() != Some("so") {
            continue;
        }
        let real = canonical(&path)?;
        // Not every extension's own libraries need be installed; iptables does without those it cannot load.
        if let Ok(needed) = libraries(&real)? {
            tree.file(&real, &real, 0o644);
            create::add_libraries(tree, &needed);
            if real != path {
                tree.link(&path, &real);
            }
        }
    }
    Ok(())
}

fn canonical(path: &Utf8Path) -> Result<Utf8PathBuf, OutputError> {
    path.canonicalize_utf8().map_err(|source| OutputError::Read {
        path: path.to_owned(),
        source,
    })
}
