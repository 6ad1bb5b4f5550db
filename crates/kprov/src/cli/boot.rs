//! `kprov boot`: hosts without an operating system.

use std::net::Ipv4Addr;

use camino::Utf8PathBuf;
use clap::{Args, Subcommand};
use ipnet::Ipv4Net;
use kprov_types::MachineName;

/// Commands of `kprov boot`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum BootCommand {
    /// Offer hosts of an inventory what they need to boot over the network: DHCP, TFTP and HTTP, until interrupted.
    ///
    /// A host is known by the hardware address in its `bmc.mac`; nobody else is answered. It runs from memory, or has an
    /// image written to the disk that `--install` names; then it runs its first-boot data.
    Serve(Box<BootServeArgs>),
    /// Make the kernel and initrd that `serve` offers, from a Linux kernel and a static busybox.
    Image(BootImageArgs),
}

/// Arguments of `boot serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BootServeArgs {
    /// The inventory file.
    #[arg(long, value_name = "FILE")]
    pub inventory: Utf8PathBuf,
    /// The interface that hosts boot over. Its network has to be trusted, as with every network boot.
    #[arg(long, value_name = "NAME")]
    pub interface: String,
    /// This machine's address there, with the network's prefix; the interface's first one where left out.
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    pub address: Option<Ipv4Net>,
    /// `proxy` adds to what another DHCP server says; `FIRST-LAST` gives out addresses of this range.
    #[arg(long, value_name = "HOW", default_value = "proxy")]
    pub dhcp: String,
    /// The gateway that hosts are told, with `--dhcp FIRST-LAST`.
    #[arg(long, value_name = "ADDRESS")]
    pub gateway: Option<Ipv4Addr>,
    /// The port of HTTP.
    #[arg(long, value_name = "PORT", default_value_t = kprov_provider_baremetal::boot::PORT)]
    pub port: u16,
    /// The kernel, as `kprov boot image` makes it.
    #[arg(long, value_name = "FILE")]
    pub kernel: Utf8PathBuf,
    /// The initrd, as `kprov boot image` makes it.
    #[arg(long, value_name = "FILE")]
    pub initrd: Utf8PathBuf,
    /// The raw disk image for hosts that are installed, with cloud-init in it.
    #[arg(long, value_name = "FILE")]
    pub image: Option<Utf8PathBuf>,
    /// Write the image to this disk of this host. Refused by the host if the disk holds anything.
    #[arg(long, value_name = "HOST=DISK", requires = "image")]
    pub install: Vec<String>,
    /// Write the image to this host's disk whatever it holds.
    #[arg(long, value_name = "HOST")]
    pub wipe: Vec<MachineName>,
    /// Hosts' first-boot data: a file for each host, with its name.
    #[arg(long, value_name = "DIR")]
    pub first_boot: Option<Utf8PathBuf>,
    /// Public keys that may log in as the user `kprov` on hosts that are installed, for `kprov up` by SSH afterwards; for hosts
    /// without a file in `--first-boot`.
    #[arg(long, value_name = "FILE", requires = "image")]
    pub authorized_keys: Option<Utf8PathBuf>,
    /// The kernel's console, such as `ttyS0,115200`.
    #[arg(long, value_name = "CONSOLE")]
    pub console: Option<String>,
    /// Have each host with a BMC boot from the network now: what runs there is switched off.
    #[arg(long)]
    pub power_on: bool,
    /// With `--power-on`, boot each host from iPXE on a virtual CD, for network cards that can't boot by themselves. The BMC
    /// fetches it from this machine, and what comes after it comes over the network as ever.
    #[arg(long, requires = "power_on")]
    pub virtual_media: bool,
    /// End once every host runs from memory, is installed, or has said why it can't be.
    #[arg(long)]
    pub until_booted: bool,
}

/// Arguments of `boot image`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BootImageArgs {
    /// The kernel, such as `/boot/vmlinuz-6.1.0-13-amd64`.
    #[arg(long, value_name = "FILE")]
    pub kernel: Utf8PathBuf,
    /// Its modules, such as `/lib/modules/6.1.0-13-amd64`.
    #[arg(long, value_name = "DIR")]
    pub modules: Utf8PathBuf,
    /// A static busybox.
    #[arg(long, value_name = "FILE", default_value = "/bin/busybox")]
    pub busybox: Utf8PathBuf,
    /// Put everything below this directory into the initrd too: firmware, or libraries that programs need.
    #[arg(long, value_name = "DIR")]
    pub add: Vec<Utf8PathBuf>,
    /// Where `kernel` and `initrd` are written.
    #[arg(short, long, value_name = "DIR")]
    pub out: Utf8PathBuf,
}
