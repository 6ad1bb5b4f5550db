//! Hosts without an operating system: what they boot from over the network.
//!
//! [`Server`] offers DHCP and TFTP (dnsmasq, as a child) and HTTP on one interface, to the hosts of an inventory and nobody
//! else. A host's firmware fetches iPXE, iPXE a kernel with an initrd of ours ([`initrd`]), and that either writes an image to
//! the disk that was named and leaves first-boot data in it, or runs the host from memory; either way what starts then is the
//! host's first-boot data, as with every provider.
//!
//! The network it serves has to be one that is trusted, as with every network boot: what hosts fetch is not encrypted. It never writes to a
//! disk that holds something unless told so for that host.

mod cd;
mod dnsmasq;
mod http;
pub mod initrd;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use camino::{Utf8Path, Utf8PathBuf};
use ipnet::Ipv4Net;
use kprov_types::MachineName;
use kprov_types::machine::FirstBoot;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use dnsmasq::Dhcp;

/// Where hosts fetch what they boot from.
pub const PORT: u16 = 10204;
/// iPXE on a CD, for hosts whose network card can't boot by itself.
pub const CD: &str = "ipxe.iso";

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    fn join(self, between: &str) -> String {
        self.0.map(|byte| format!("{byte:02x}")).join(between)
    }

    /// With hyphens, as it stands in URLs.
    pub fn hyphens(self) -> String {
        self.join("-")
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.join(":"))
    }
}

/// A text that is no hardware address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no hardware address; write it as `52:54:00:12:34:56`")]
pub struct MacError(String);

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError(text.to_owned());
        let parts: Vec<&str> = text.split([':', '-']).collect();
        let parts: [&str; 6] = parts.try_into().map_err(|_| error())?;
        let mut bytes = [0; 6];
        for (byte, part) in bytes.iter_mut().zip(parts) {
            let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(error)?;
        }
        Ok(Self(bytes))
    }
}

/// What becomes of a host that boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The image is written to its disk, and it boots from that.
    Install,
    /// It runs from memory, as long as it has power.
    Memory,
}

/// A host that may boot here.
#[derive(Clone, Debug)]
pub struct BootHost {
    /// Its name.
    pub name: MachineName,
    /// The hardware address of the interface that it boots from.
    pub mac: Mac,
    /// Its address, where the inventory has one.
    pub address: Option<Ipv4Addr>,
    /// What becomes of it.
    pub mode: Mode,
    /// The disk that the image is written to: `/dev/sda`, or a stable path with the serial number in it.
    pub disk: Option<String>,
    /// Whether that disk may hold something.
    pub wipe: bool,
    /// What it runs first; a host that has none yet waits for it.
    pub first_boot: Option<FirstBoot>,
}

impl BootHost {
    /// A host that runs from memory and waits for its first-boot data.
    pub fn new(name: MachineName, mac: Mac) -> Self {
        Self {
            name,
            mac,
            address: None,
            mode: Mode::Memory,
            disk: None,
            wipe: false,
            first_boot: None,
        }
    }
}

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// The interface that hosts boot over.
    pub interface: String,
    /// This machine's address on it, with the network's prefix.
    pub address: Ipv4Net,
    /// How hosts get their addresses.
    pub dhcp: Dhcp,
    /// The gateway that hosts are told, where this server gives them addresses.
    pub gateway: Option<Ipv4Addr>,
    /// The port of HTTP.
    pub port: u16,
    /// The kernel.
    pub kernel: Utf8PathBuf,
    /// The initrd, made by [`initrd::build`], or one that understands the same arguments and reports the same.
    pub initrd: Utf8PathBuf,
    /// A raw disk image, for hosts that are installed.
    pub image: Option<Utf8PathBuf>,
    /// The kernel's console, such as `ttyS0`; its own choice where left out.
    pub console: Option<String>,
    /// The hosts.
    pub hosts: Vec<BootHost>,
}

/// What a host did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It fetches what it boots from.
    Boots,
    /// It says how far it is.
    Reports(String),
    /// It fetches its first-boot data.
    FirstBoot,
    /// It runs from memory, or is installed, and needs the server no more; in its words.
    Done(String),
    /// It can't go on; in its words.
    Failed(String),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boots => f.write_str("boots from the network"),
            Self::Reports(words) | Self::Done(words) => f.write_str(words),
            Self::FirstBoot => f.write_str("fetches its first-boot data"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

/// Why hosts cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file.
    #[error("`{path}` cannot be read")]
    File {
        /// Which.
        path: Utf8PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The port is taken, or the address isn't here.
    #[error("can't listen on `{address}`")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// It is not installed.
    #[error("dnsmasq can't be run")]
    NoDnsmasq {
        /// Why.
        source: std::io::Error,
    },
    /// It ended at once.
    #[error("dnsmasq ended: {said}")]
    Dnsmasq {
        /// Its last words.
        said: String,
    },
    /// No place for what is served.
    #[error("no temporary directory can be made")]
    Directory(#[source] std::io::Error),
    /// A host is to be installed and there's no image, or no disk named.
    #[error("host `{host}` can't be installed: {why}")]
    Host {
        /// Which.
        host: MachineName,
        /// Why.
        why: &'static str,
    },
    /// Two hosts have one hardware address.
    #[error("`{0}` and `{1}` have the same hardware address")]
    Twice(MachineName, MachineName),
}

impl BootError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::File { .. } => "`kprov boot image` makes kernel and initrd",
            Self::Listen { .. } => {
                "give the interface that has this machine's address in the hosts' network, and a free `--port`"
            }
            Self::NoDnsmasq { .. } => "install it (Debian: `apt-get install dnsmasq-base`)",
            Self::Dnsmasq { said } if said.contains("ermission denied") || said.contains("not permitted") => {
                "run this as root: DHCP and TFTP have ports that only root may listen on"
            }
            Self::Dnsmasq { .. } => "another DHCP server may run on this machine",
            Self::Directory(_) => "check that there is space in the temporary directory",
            Self::Host { .. } => "give `--image`, and the disk in the inventory's `disk.path`; or run it from memory",
            Self::Twice(..) => "each host's `bmc.mac` must be its own",
        }
    }
}

struct Shared {
    url: String,
    files: http::Files,
    console: Option<String>,
    hosts: Mutex<Vec<BootHost>>,
    installed: Mutex<BTreeSet<Mac>>,
    events: mpsc::UnboundedSender<(MachineName, Event)>,
    directory: Utf8PathBuf,
}

impl Shared {
    fn hosts(&self) -> MutexGuard<'_, Vec<BootHost>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, host: &MachineName, event: Event) {
        // Nobody listens: then nobody has to know.
        let _ = self.events.send((host.clone(), event));
    }

    fn installed(&self, mac: Mac) {
        self.installed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(mac);
    }

    fn is_installed(&self, mac: Mac) -> bool {
        self.installed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&mac)
    }
}

/// A running boot server. Dropping it ends it.
pub struct Server {
    shared: Arc<Shared>,
    http: JoinHandle<()>,
    _dnsmasq: Child,
    _directory: tempfile::TempDir,
    events: mpsc::UnboundedReceiver<(MachineName, Event)>,
    missing: Vec<&'static str>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.http.abort();
    }
}

impl Server {
    /// Starts to serve.
    pub async fn start(config: BootConfig) -> Result<Self, BootError> {
        check(&config)?;
        for path in [&config.kernel, &config.initrd] {
            readable(path)?;
        }
        let image = match config.image {
            Some(path) => {
                let digest = tokio::task::spawn_blocking({
                    let path = path.clone();
                    move || digest(&path)
                });
                let digest = digest
                    .await
                    .unwrap_or_else(|_| Err(std::io::ErrorKind::Interrupted.into()));
                let digest = digest.map_err(|source| BootError::File {
                    path: path.clone(),
                    source,
                })?;
                Some((path, digest))
            }
            None => None,
        };
        let directory = tempfile::Builder::new()
            .prefix("kprov-boot-")
            .tempdir()
            .map_err(BootError::Directory)?;
        let path = Utf8Path::from_path(directory.path())
            .ok_or_else(|| BootError::Directory(std::io::ErrorKind::InvalidFilename.into()))?
            .to_owned();
        let missing = dnsmasq::offer_programs(&path).map_err(BootError::Directory)?;
        let listen = SocketAddr::from((config.address.addr(), config.port));
        let listener = TcpListener::bind(listen).await.map_err(|source| BootError::Listen {
            address: listen,
            source,
        })?;
        let url = format!("http://{listen}");
        let dnsmasq = dnsmasq::start(&dnsmasq::Settings {
            interface: &config.interface,
            network: config.address.trunc(),
            dhcp: config.dhcp,
            gateway: config.gateway,
            hosts: &config.hosts,
            http: &url,
            directory: &path,
        })
        .await?;
        let (told, events) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            url,
            files: http::Files {
                kernel: config.kernel,
                initrd: config.initrd,
                image,
            },
            console: config.console,
            hosts: Mutex::new(config.hosts),
            installed: Mutex::default(),
            events: told,
            directory: path,
        });
        Ok(Self {
            http: tokio::spawn(http::serve(listener, shared.clone())),
            shared,
            _dnsmasq: dnsmasq,
            _directory: directory,
            events,
            missing,
        })
    }

    /// The URL that hosts fetch from.
    pub fn url(&self) -> &str {
        &self.shared.url
    }

    /// The URL of iPXE's CD.
    pub fn cd_url(&self) -> String {
        format!("{}/{CD}", self.shared.url)
    }

    /// iPXE's programs that this machine does not have: firmware that brings no iPXE of its own cannot boot without.
    pub fn missing_programs(&self) -> &[&'static str] {
        &self.missing
    }

    /// Gives a host its first-boot data, for which it may wait already.
    pub fn set_first_boot(&self, host: &MachineName, data: FirstBoot) {
        if let Some(host) = self.shared.hosts().iter_mut().find(|h| h.name == *host) {
            host.first_boot = Some(data);
        }
    }

    /// The next thing that a host does.
    pub async fn next_event(&mut self) -> Option<(MachineName, Event)> {
        self.events.recv().await
    }
}

fn check(config: &BootConfig) -> Result<(), BootError> {
    for (i, host) in config.hosts.iter().enumerate() {
        if let Some(other) = config.hosts.iter().take(i).find(|other| other.mac == host.mac) {
            return Err(BootError::Twice(other.name.clone(), host.name.clone()));
        }
        if host.mode == Mode::Install {
            let refuse = |why| BootError::Host {
                host: host.name.clone(),
                why,
            };
            if config.image.is_none() {
                return Err(refuse("there is no image"));
            }
            let disk = host.disk.as_deref().ok_or_else(|| refuse("no disk is named"))?;
            if !disk.starts_with("/dev/") || disk.chars().any(char::is_whitespace) {
                return Err(refuse("its disk is no path below `/dev`"));
            }
        }
    }
    Ok(())
}

fn readable(path: &Utf8Path) -> Result<(), BootError> {
    std::fs::File::open(path).map(drop).map_err(|source| BootError::File {
        path: path.to_owned(),
        source,
    })
}

fn digest(path: &Utf8Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
    Ok(hex::encode(hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, last: u8) -> BootHost {
        BootHost::new(name.parse().unwrap(), Mac([2, 0, 0, 0, 0, last]))
    }

    #[test]
    fn hardware_addresses() {
        let mac: Mac = "52:54:00:AB:cd:01".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
        assert_eq!(mac.hyphens().parse(), Ok(mac));
        for wrong in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:1",
            "52:54:00:ab:cd:+1",
            "52:54:00:ab:cd:01:02",
        ] {
            assert_eq!(wrong.parse::<Mac>(), Err(MacError(wrong.into())));
        }
    }

    #[test]
    fn scripts_say_what_becomes_of_a_host() {
        let memory = http::ipxe_script("http://s", &host("a", 1), Some("ttyS0"));
        assert!(memory.starts_with("#!ipxe\n"));
        assert!(memory.contains("kprov.mode=memory") && memory.contains("kprov.mac=02-00-00-00-00-01"));
        assert!(memory.contains(" console=ttyS0\n"));
        let install = BootHost {
            mode: Mode::Install,
            disk: Some("/dev/disk/by-id/nvme-X".into()),
            ..host("b", 2)
        };
        let script = http::ipxe_script("http://s", &install, None);
        assert!(
            script.contains("kprov.mode=install kprov.disk=/dev/disk/by-id/nvme-X kprov.wipe=no"),
            "{script}"
        );
    }

    #[test]
    fn what_cannot_be_installed_is_refused_before_anything_is_served() {
        let config = |hosts| BootConfig {
            interface: "br0".into(),
            address: "10.0.0.1/24".parse().unwrap(),
            dhcp: Dhcp::Proxy,
            gateway: None,
            port: PORT,
            kernel: "k".into(),
            initrd: "i".into(),
            image: Some("image".into()),
            console: None,
            hosts,
        };
        let install = |disk: Option<&str>| BootHost {
            mode: Mode::Install,
            disk: disk.map(Into::into),
            ..host("b", 2)
        };
        assert!(check(&config(vec![host("a", 1), install(Some("/dev/sda"))])).is_ok());
        assert!(matches!(
            check(&config(vec![host("a", 1), host("b", 1)])),
            Err(BootError::Twice(..))
        ));
        for disk in [None, Some("sda"), Some("/dev/sda kprov.wipe=yes")] {
            assert!(
                matches!(check(&config(vec![install(disk)])), Err(BootError::Host { .. })),
                "{disk:?}"
            );
        }
        let mut without = config(vec![install(Some("/dev/sda"))]);
        without.image = None;
        assert!(check(&without).is_err());
    }
}
