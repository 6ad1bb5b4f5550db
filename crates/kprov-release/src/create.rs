//! Making a payload from directories of programs.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::KubernetesVersion;
use kprov_types::release::{
    API_VERSION, Arch, FileSource, HostFile, ImageComponent, ProgramFacts, Release, ReleaseImage,
};

use crate::elf::Elf;
use crate::keys::SigningKey;
use crate::layout::{self, LayoutWriter};
use crate::locate::{self, Found, Use};
use crate::output::{self, OutputError};
use crate::payload::{PAYLOAD_REGISTRY, Payload};
use crate::rootfs::Rootfs;
use crate::{facts, parallel, program, userland};

/// The pause program for the architecture kprov was built for, from `pause/pause.c`.
const PAUSE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));
/// Its version: the image's tag.
const PAUSE_VERSION: &str = "1";

/// The tag of a program that does not say its version. The digest fixes what runs.
const UNKNOWN_VERSION: &str = "unknown";

/// What a payload is made from.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Directories of programs, earlier ones first.
    pub from: Vec<Utf8PathBuf>,
    /// The version that the Kubernetes programs must be of.
    pub version: KubernetesVersion,
    /// The payload's directory: absent, empty, or the same payload.
    pub out: Utf8PathBuf,
    /// The architecture that the programs must be for.
    pub arch: Arch,
    /// Whether etcd, containerd, runc, CNI plugins and iptables may come from this host where `from` lacks them.
    pub host_fallback: bool,
    /// The key to sign with; the payload is unsigned without.
    pub signing_key: Option<SigningKey>,
    /// See [`Release::minimum_from`].
    pub minimum_from: Option<KubernetesVersion>,
    /// See [`Release::advisories`].
    pub advisories: Vec<String>,
    /// Where `kprov-node` and `kprov-operator` are, if not in `from`: beside the running `kprov`.
    pub kprov_programs: Option<Utf8PathBuf>,
    /// Leaves those two out. Such a payload runs a cluster, but does not bring a cluster's kprov up to date.
    pub without_kprov: bool,
    /// Payloads whose blobs are linked (`link(2)`) where this one has the same, instead of being written again.
    pub reuse: Vec<Utf8PathBuf>,
}

/// A program that was found nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub name: &'static str,
    /// The directories it was looked for in.
    pub places: Vec<Utf8PathBuf>,
    /// The Debian package that has it, where one does.
    pub package: Option<&'static str>,
}

/// Why a payload could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Programs are missing.
    #[error("not found: {}", missing_text(.missing))]
    Missing {
        /// All of them.
        missing: Vec<Missing>,
        /// Whether the host was searched too.
        host_fallback: bool,
    },
    /// kube-proxy's image needs iptables, and there is none.
    #[error("no `iptables` for the image of `kube-proxy`: {}", missing_text(.missing))]
    NoIptables {
        /// What is missing.
        missing: Vec<Missing>,
        /// Whether the host was searched too.
        host_fallback: bool,
    },
    /// kprov's own programs are missing.
    #[error("not found: {}", missing_text(.missing))]
    NoKprov {
        /// Both, or one.
        missing: Vec<Missing>,
    },
    /// A file is not a program.
    #[error("`{path}` is not a 64-bit ELF program")]
    NotElf {
        /// The file.
        path: Utf8PathBuf,
    },
    /// A program is for another architecture.
    #[error("`{path}` is for {found}, but the release is for {}", .wanted.as_str())]
    WrongArch {
        /// The file.
        path: Utf8PathBuf,
        /// What it is for.
        found: String,
        /// What it should be for.
        wanted: Arch,
    },
    /// A program is of another version.
    #[error("`{path}` is version {found}, but the release is {wanted}")]
    WrongVersion {
        /// The file.
        path: Utf8PathBuf,
        /// What it says it is.
        found: String,
        /// What it should be.
        wanted: KubernetesVersion,
    },
    /// A program of another architecture, which cannot be run here, does not bear the release's version anywhere.
    #[error("`{path}` nowhere contains `{}`; it is of another version", .wanted.tag())]
    NoVersionInside {
        /// The file.
        path: Utf8PathBuf,
        /// What it should be.
        wanted: KubernetesVersion,
    },
    /// A program does not say its version.
    #[error("`{path}` does not say its version; it printed `{printed}`")]
    NoVersion {
        /// The file.
        path: Utf8PathBuf,
        /// What it printed.
        printed: String,
    },
    /// A program could not be run.
    #[error("cannot run `{path}`")]
    Run {
        /// The file.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Shared libraries are missing.
    #[error("`{path}` cannot be loaded on this host: {complaint}")]
    MissingLibraries {
        /// The program.
        path: Utf8PathBuf,
        /// What the loader says.
        complaint: String,
    },
    /// A dynamic program of another architecture: its libraries cannot be found here.
    #[error("`{path}` is dynamically linked, and its libraries for {} are not on this host", .arch.as_str())]
    DynamicForeign {
        /// The program.
        path: Utf8PathBuf,
        /// The release's architecture.
        arch: Arch,
    },
    /// kprov has no pause program for the release's architecture.
    #[error("no `pause` program for {}", .arch.as_str())]
    NoPause {
        /// The release's architecture.
        arch: Arch,
    },
    /// The payload could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

fn missing_text(missing: &[Missing]) -> String {
    let one = |m: &Missing| {
        let places: Vec<_> = m.places.iter().map(|p| format!("`{p}`")).collect();
        let places = if places.is_empty() {
            "no directory".to_owned()
        } else {
            places.join(", ")
        };
        format!("`{}` (looked in {places})", m.name)
    };
    missing.iter().map(one).collect::<Vec<_>>().join("; ")
}

impl CreateError {
    /// What the person may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { missing, host_fallback } | Self::NoIptables { missing, host_fallback } => {
                let mut packages: Vec<_> = missing.iter().filter_map(|m| m.package).collect();
                packages.dedup();
                let named: Vec<_> = packages.iter().map(|p| format!("`{p}`")).collect();
                Some(match (packages.is_empty(), host_fallback) {
                    (true, _) => {
                        "name a directory that has them, such as an unpacked `kubernetes-server` archive".into()
                    }
                    (false, true) => format!(
                        "install Debian's {}, or name a directory that has them",
                        named.join(", ")
                    ),
                    (false, false) => format!(
                        "name a directory that has them, or let this host's be used (Debian's {})",
                        named.join(", ")
                    ),
                })
            }
            Self::NoKprov { .. } => Some(
                "put them beside `kprov`, or leave them out by `--without-kprov`: no upgrade to such a payload renews kprov itself"
                    .into(),
            ),
            Self::WrongVersion { found, .. } => Some(format!(
                "make the release as version `{found}`, or name other directories"
            )),
            Self::Output(error) => error.hint(),
            Self::DynamicForeign { .. } => Some("use a statically linked build".into()),
            Self::NoPause { .. } => Some("put a statically linked `pause` into one of the directories".into()),
            Self::MissingLibraries { .. } => Some("install them, or use a statically linked build".into()),
            _ => None,
        }
    }
}

/// Makes a payload: an OCI layout with the images and host files as blobs, `release.json`, and its signature.
///
/// Equal input gives equal bytes. The directory appears whole or not at all; one that has the same payload already is
/// left alone. Blocks for some seconds.
pub fn create(options: &CreateOptions) -> Result<Payload, CreateError> {
    output::check_place(&options.out)?;
    let programs = parallel::try_map(&locate::locate(options)?, |found| inspect(found, options))?;
    let new = output::NewDirectory::beside(&options.out)?;
    let Carried { images, host_files } = write(options, &programs, new.path(), true)?;
    let facts = programs
        .into_iter()
        .filter_map(|p| Some((p.found.name.to_owned(), p.facts?)));
    let release = Release {
        api_version: API_VERSION.into(),
        kind: "Release".into(),
        kubernetes: options.version.clone(),
        images,
        host_files,
        minimum_from: options.minimum_from.clone(),
        advisories: options.advisories.clone(),
        programs: facts.collect(),
    };
    output::write_release(new.path(), &release, options.signing_key.as_ref())?;
    Ok(new.become_payload(&options.out)?)
}

/// What a payload carries.
#[derive(Default)]
pub(crate) struct Carried {
    pub(crate) images: BTreeMap<ImageComponent, ReleaseImage>,
    pub(crate) host_files: Vec<HostFile>,
}

/// Writes kprov's own programs alone, for a payload that refers to other places for all else.
pub(crate) fn carry_kprov(options: &CreateOptions, root: &Utf8Path) -> Result<Carried, CreateError> {
    let found = locate::kprov(options)?;
    if found.is_empty() {
        return Ok(Carried::default());
    }
    let programs = parallel::try_map(&found, |found| inspect(found, options))?;
    write(options, &programs, root, false)
}

/// A program that was looked at.
struct Program {
    found: Found,
    version: Option<String>,
    facts: Option<ProgramFacts>,
}

/// Checks a program against what the release should be, and learns its own version and what it can be told.
fn inspect(found: &Found, options: &CreateOptions) -> Result<Program, CreateError> {
    let version = version(found, options)?;
    let asked = facts::ASKED.contains(&found.name) && Arch::current() == Some(options.arch);
    Ok(Program {
        version,
        facts: if asked {
            facts::ask(&found.path, found.name)
        } else {
            None
        },
        found: found.clone(),
    })
}

/// A program's own version, where it says one.
fn version(found: &Found, options: &CreateOptions) -> Result<Option<String>, CreateError> {
    let path = &found.path;
    check_elf(path, options.arch)?;
    let runs_here = Arch::current() == Some(options.arch);
    if !runs_here {
        let bytes = fs::read(path).map_err(|source| OutputError::Read {
            path: path.clone(),
            source,
        })?;
        let tag = options.version.tag();
        if found.kubernetes && !bytes.windows(tag.len()).any(|w| w == tag.as_bytes()) {
            return Err(CreateError::NoVersionInside {
                path: path.clone(),
                wanted: options.version.clone(),
            });
        }
        return Ok(found.kubernetes.then(|| options.version.to_string()));
    }
    // CNI plugins print none, and pause would not end.
    let says_version = !matches!(found.becomes, Use::HostFile(name) if name.starts_with("cni/"))
        && found.becomes != Use::Image(ImageComponent::Pause)
        && found.name != "kubectl";
    if !says_version {
        return Ok(None);
    }
    let (_, printed) =
        program::output(path, found.name, &["--version"], program::LIMIT).map_err(|source| CreateError::Run {
            path: path.clone(),
            source,
        })?;
    let version = program::version_in(&printed);
    if !found.kubernetes {
        return Ok(version.map(str::to_owned));
    }
    match version {
        None => {
            let printed = printed.lines().next().unwrap_or_default().to_owned();
            Err(CreateError::NoVersion {
                path: path.clone(),
                printed,
            })
        }
        Some(text) if text.parse().ok().as_ref() == Some(&options.version) => Ok(Some(text.to_owned())),
        Some(text) => Err(CreateError::WrongVersion {
            path: path.clone(),
            found: text.to_owned(),
            wanted: options.version.clone(),
        }),
    }
}

/// Checks that a file is a program for `arch`.
pub(crate) fn check_elf(path: &Utf8Path, arch: Arch) -> Result<Elf, CreateError> {
    let elf = Elf::read(path)
        .map_err(|source| OutputError::Read {
            path: path.to_owned(),
            source,
        })?
        .ok_or_else(|| CreateError::NotElf { path: path.to_owned() })?;
    if elf.is_for(arch) {
        Ok(elf)
    } else {
        Err(CreateError::WrongArch {
            path: path.to_owned(),
            found: elf.machine_name(),
            wanted: arch,
        })
    }
}

/// Puts a program into a tree, and where it is dynamic the loader and libraries it needs.
pub(crate) fn add_program(tree: &mut Rootfs, at: &Utf8Path, path: &Utf8Path, arch: Arch) -> Result<(), CreateError> {
    tree.file(at, path, 0o755);
    let Some(loader) = check_elf(path, arch)?.interpreter else {
        return Ok(());
    };
    if Arch::current() != Some(arch) {
        // The tree may have them, as one for kube-proxy does.
        let there = tree.contains(&loader);
        return if there {
            Ok(())
        } else {
            Err(CreateError::DynamicForeign {
                path: path.to_owned(),
                arch,
            })
        };
    }
    let failed = |source| CreateError::Run {
        path: path.to_owned(),
        source,
    };
    match program::libraries(&loader, path).map_err(failed)? {
        Ok(libraries) => add_libraries(tree, &libraries),
        Err(complaint) => {
            return Err(CreateError::MissingLibraries {
                path: path.to_owned(),
                complaint,
            });
        }
    }
    Ok(())
}

/// Puts libraries where the loader finds them on the host.
pub(crate) fn add_libraries(tree: &mut Rootfs, libraries: &[Utf8PathBuf]) {
    for library in libraries {
        if !tree.contains(library) {
            tree.file(library, library, 0o755);
        }
    }
}

/// Something that was written.
enum Written {
    HostFile(HostFile),
    Image(ImageComponent, ReleaseImage, Box<layout::Image>),
}

/// Writes images and host files; with `pause`, that image too where no program is it.
fn write(options: &CreateOptions, programs: &[Program], root: &Utf8Path, pause: bool) -> Result<Carried, CreateError> {
    let layout = LayoutWriter::new(root, options.arch, &options.reuse)?;
    let mut written = parallel::try_map(programs, |program| write_program(options, program, &layout))?;
    let is_pause = |p: &Program| p.found.becomes == Use::Image(ImageComponent::Pause);
    if pause && !programs.iter().any(is_pause) {
        written.push(write_pause(options, &layout)?);
    }
    let mut carried = Carried::default();
    let mut index = Vec::new();
    for written in written {
        match written {
            Written::HostFile(file) => carried.host_files.push(file),
            Written::Image(component, image, entry) => {
                carried.images.insert(component, image);
                index.push(*entry);
            }
        }
    }
    layout.finish(index)?;
    carried.host_files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(carried)
}

fn write_program(options: &CreateOptions, program: &Program, layout: &LayoutWriter) -> Result<Written, CreateError> {
    let Program { found, version, .. } = program;
    match found.becomes {
        Use::HostFile(name) => {
            let blob = layout.file(&found.path)?;
            Ok(Written::HostFile(HostFile {
                name: name.to_owned(),
                arch: options.arch,
                digest: blob.digest,
                size: blob.size,
                source: FileSource::Carried,
                version: version.clone(),
            }))
        }
        Use::Image(component) => {
            let tree = image_tree(component, &found.path, options)?;
            let tag = match (found.kubernetes, version) {
                (true, _) => tag(&options.version.tag()),
                (false, Some(version)) => tag(version),
                (false, None) => UNKNOWN_VERSION.to_owned(),
            };
            write_image(layout, component, &tag, version.clone(), &tree)
        }
    }
}

fn write_pause(options: &CreateOptions, layout: &LayoutWriter) -> Result<Written, CreateError> {
    if Arch::current() != Some(options.arch) {
        return Err(CreateError::NoPause { arch: options.arch });
    }
    let mut tree = Rootfs::default();
    let component = ImageComponent::Pause;
    tree.bytes(entrypoint(component).as_str().into(), PAUSE.to_vec(), 0o755);
    write_image(layout, component, PAUSE_VERSION, Some(PAUSE_VERSION.to_owned()), &tree)
}

fn write_image(
    layout: &LayoutWriter,
    component: ImageComponent,
    tag: &str,
    version: Option<String>,
    tree: &Rootfs,
) -> Result<Written, CreateError> {
    let reference = format!("{PAYLOAD_REGISTRY}/{}:{tag}", component.as_str());
    let written = layout.image(&reference, tree, &entrypoint(component))?;
    let digest = written.digest.clone();
    tracing::debug!(%reference, %digest, "image written");
    let image = ReleaseImage {
        reference,
        digest,
        version,
    };
    Ok(Written::Image(component, image, Box::new(written)))
}

/// Where a component's program is in its image: where the official images have it.
fn entrypoint(component: ImageComponent) -> String {
    match component {
        ImageComponent::Coredns | ImageComponent::Pause => format!("/{}", component.as_str()),
        _ => format!("/usr/local/bin/{}", component.as_str()),
    }
}

fn image_tree(component: ImageComponent, path: &Utf8Path, options: &CreateOptions) -> Result<Rootfs, CreateError> {
    let mut tree = match component {
        ImageComponent::Pause => Rootfs::default(),
        ImageComponent::KubeProxy => userland::kube_proxy(&options.from, options.host_fallback, options.arch)?,
        _ => Rootfs::minimal(),
    };
    add_program(&mut tree, entrypoint(component).as_str().into(), path, options.arch)?;
    if component == ImageComponent::Etcd {
        for name in ["etcdctl", "etcdutl"] {
            let beside = path.with_file_name(name);
            if beside.is_file() {
                add_program(
                    &mut tree,
                    &Utf8Path::new("/usr/local/bin").join(name),
                    &beside,
                    options.arch,
                )?;
            }
        }
    }
    Ok(tree)
}

/// A version as an image's tag, which may hold letters, digits, `_`, `.` and `-` only (OCI distribution specification 1.1,
/// "Pulling manifests"). Build metadata becomes `_x`, as in the tags of Kubernetes' own images.
pub(crate) fn tag(version: &str) -> String {
    version
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') {
                c
            } else {
                '_'
            }
        })
        .collect()
}
