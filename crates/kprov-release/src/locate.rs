//! Finding the programs that a release consists of.

use std::fs;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::release::ImageComponent;

use crate::create::{CreateError, CreateOptions, Missing};
use crate::output::OutputError;
use crate::program;

/// Where programs are in a directory that was named: as they are, and as the official server archive has them.
const SUBDIRECTORIES: &[&str] = &["", "bin", "server/bin", "kubernetes/server/bin"];
/// Where CNI plugins are in such a directory.
const CNI_SUBDIRECTORIES: &[&str] = &["", "cni", "cni/bin"];
/// One program for all of Kubernetes, which acts as the one it is called by the name of.
const HYPERKUBE: &str = "hyperkube";

/// What becomes of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It runs from an image.
    Image(ImageComponent),
    /// It runs on the machine, under this name.
    HostFile(&'static str),
}

/// What a missing program means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// It is Kubernetes: it must be in the directories, where its version can be held against the others'.
    Kubernetes,
    /// No cluster starts without it; the host's does, which this Debian package brings.
    Required(&'static str),
    /// Used where it is found, on the host too.
    Optional,
    /// Used where it is found in the directories.
    OptionalThere,
    /// It is kprov's own: in the directories, or where kprov itself is.
    Kprov,
}

/// One program a release may consist of.
struct Wanted {
    name: &'static str,
    becomes: Use,
    need: Need,
    cni: bool,
}

impl Wanted {
    fn missing(&self, places: Vec<Utf8PathBuf>, package: Option<&'static str>) -> Missing {
        let name = self.name;
        Missing { name, places, package }
    }
}

const fn image(component: ImageComponent, need: Need) -> Wanted {
    Wanted {
        name: component.as_str(),
        becomes: Use::Image(component),
        need,
        cni: false,
    }
}

const fn host(name: &'static str, need: Need) -> Wanted {
    Wanted {
        name,
        becomes: Use::HostFile(name),
        need,
        cni: false,
    }
}

const fn cni(name: &'static str, path: &'static str, need: Need) -> Wanted {
    Wanted {
        name,
        becomes: Use::HostFile(path),
        need,
        cni: true,
    }
}

const PLUGINS: Need = Need::Required("containernetworking-plugins");

const WANTED: &[Wanted] = &[
    image(ImageComponent::KubeApiserver, Need::Kubernetes),
    image(ImageComponent::KubeControllerManager, Need::Kubernetes),
    image(ImageComponent::KubeScheduler, Need::Kubernetes),
    image(ImageComponent::KubeProxy, Need::Kubernetes),
    host("kubelet", Need::Kubernetes),
    // The host's would be of any version.
    host("kubectl", Need::OptionalThere),
    image(ImageComponent::Etcd, Need::Required("etcd-server")),
    image(ImageComponent::Coredns, Need::Optional),
    // A host has none; where a directory has none, the one that kprov carries is used.
    image(ImageComponent::Pause, Need::OptionalThere),
    host("containerd", Need::Required("containerd")),
    host("containerd-shim-runc-v2", Need::Required("containerd")),
    host("ctr", Need::Optional),
    host("runc", Need::Required("runc")),
    cni("bridge", "cni/bridge", PLUGINS),
    cni("host-local", "cni/host-local", PLUGINS),
    cni("loopback", "cni/loopback", PLUGINS),
    cni("portmap", "cni/portmap", Need::Optional),
    host("kprov-node", Need::Kprov),
    image(ImageComponent::KprovOperator, Need::Kprov),
];

/// A program that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The name it is called by.
    pub(crate) name: &'static str,
    /// What becomes of it.
    pub(crate) becomes: Use,
    /// Where it is.
    pub(crate) path: Utf8PathBuf,
    /// Whether it is part of Kubernetes itself, and so of the release's version.
    pub(crate) kubernetes: bool,
}

/// Finds every program in `options.from`, and where else each may come from. All that is missing is one error.
pub(crate) fn locate(options: &CreateOptions) -> Result<Vec<Found>, CreateError> {
    let CreateOptions {
        from, host_fallback, ..
    } = options;
    for dir in from {
        fs::read_dir(dir).map_err(|source| OutputError::Read {
            path: dir.clone(),
            source,
        })?;
    }
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for wanted in WANTED.iter().filter(|w| w.need != Need::Kprov) {
        let mut places = directories(from, wanted.cni);
        if *host_fallback && matches!(wanted.need, Need::Required(_) | Need::Optional) {
            places.extend(host_places(wanted.cni));
        }
        match (find(wanted, &places), wanted.need) {
            (Some(program), _) => found.push(program),
            (None, Need::Optional | Need::OptionalThere) => {}
            (None, Need::Required(package)) => missing.push(wanted.missing(places, Some(package))),
            (None, Need::Kubernetes | Need::Kprov) => missing.push(wanted.missing(places, None)),
        }
    }
    if !missing.is_empty() {
        let host_fallback = *host_fallback;
        return Err(CreateError::Missing { missing, host_fallback });
    }
    found.extend(kprov(options)?);
    Ok(found)
}

/// Finds kprov's own programs; none where the release is to be without.
pub(crate) fn kprov(options: &CreateOptions) -> Result<Vec<Found>, CreateError> {
    let CreateOptions {
        from,
        kprov_programs,
        without_kprov,
        ..
    } = options;
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for wanted in WANTED.iter().filter(|w| w.need == Need::Kprov && !without_kprov) {
        let mut places = directories(from, wanted.cni);
        places.extend(kprov_programs.clone());
        match find(wanted, &places) {
            Some(program) => found.push(program),
            None => missing.push(wanted.missing(places, None)),
        }
    }
    if missing.is_empty() {
        Ok(found)
    } else {
        Err(CreateError::NoKprov { missing })
    }
}

fn find(wanted: &Wanted, places: &[Utf8PathBuf]) -> Option<Found> {
    let Wanted {
        name, becomes, need, ..
    } = *wanted;
    let kubernetes = need == Need::Kubernetes;
    let names: &[&str] = if kubernetes { &[name, HYPERKUBE] } else { &[name] };
    let path = names
        .iter()
        .find_map(|n| places.iter().map(|d| d.join(n)).find(|p| p.is_file()))?;
    Some(Found {
        name,
        becomes,
        path,
        kubernetes,
    })
}

fn directories(from: &[Utf8PathBuf], cni: bool) -> Vec<Utf8PathBuf> {
    let below = if cni { CNI_SUBDIRECTORIES } else { SUBDIRECTORIES };
    let join = |dir: &Utf8Path, sub: &&str| if sub.is_empty() { dir.to_owned() } else { dir.join(sub) };
    from.iter()
        .flat_map(|dir| below.iter().map(move |sub| join(dir, sub)))
        .collect()
}

fn host_places(cni: bool) -> Vec<Utf8PathBuf> {
    if cni {
        program::HOST_CNI_DIRECTORIES
            .iter()
            .copied()
            .map(Utf8PathBuf::from)
            .collect()
    } else {
        program::host_directories()
    }
}

/// A file tree for an image in one of the directories: `rootfs/<component>`.
pub(crate) fn rootfs(from: &[Utf8PathBuf], component: ImageComponent) -> Option<Utf8PathBuf> {
    from.iter()
        .map(|d| d.join("rootfs").join(component.as_str()))
        .find(|d| d.is_dir())
}
