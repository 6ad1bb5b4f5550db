//! DHCP and TFTP by Debian's dnsmasq, run as a child with nothing of its own configuration: what it's told is pure.

use std::net::Ipv4Addr;
use std::process::Stdio;

use camino::{Utf8Path, Utf8PathBuf};
use ipnet::Ipv4Net;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::{BootError, BootHost, cd};

/// How hosts get their addresses while they boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dhcp {
    /// From a DHCP server that is there already; this one adds only where to boot from (proxy DHCP, PXE 2.1 section 2.2.3).
    Proxy,
    /// From this one. Each host gets the address that the inventory has, and another one of this range where it has none.
    Range(Ipv4Addr, Ipv4Addr),
}

/// What dnsmasq is told.
pub(super) struct Settings<'a> {
    pub(super) interface: &'a str,
    pub(super) network: Ipv4Net,
    pub(super) dhcp: Dhcp,
    pub(super) gateway: Option<Ipv4Addr>,
    pub(super) hosts: &'a [BootHost],
    /// Without a slash at its end.
    pub(super) http: &'a str,
    /// Leases and the root of TFTP.
    pub(super) directory: &'a Utf8Path,
}

/// Its arguments. It answers the hosts of the inventory and nobody else.
pub(super) fn arguments(settings: &Settings<'_>) -> Vec<String> {
    let Settings {
        interface,
        network,
        dhcp,
        gateway,
        hosts,
        http,
        directory,
    } = settings;
    let mut all: Vec<String> = [
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-hosts",
        "--no-resolv",
        "--no-ping",
        "--log-facility=-",
        "--log-dhcp",
        "--port=0",
        "--user=root",
        "--bind-interfaces",
        "--except-interface=lo",
        "--dhcp-authoritative",
        "--dhcp-ignore=tag:!known",
        "--dhcp-match=set:ipxe,175",
        "--dhcp-match=set:efi,option:client-arch,7",
        "--dhcp-match=set:efi,option:client-arch,9",
        "--dhcp-match=set:arm,option:client-arch,11",
        "--dhcp-vendorclass=set:uefihttp,HTTPClient",
        "--enable-tftp",
    ]
    .map(str::to_owned)
    .to_vec();
    all.push(format!("--interface={interface}"));
    all.push(format!("--pid-file={directory}/dnsmasq.pid"));
    all.push(format!("--dhcp-leasefile={directory}/leases"));
    all.push(format!("--tftp-root={directory}/tftp"));
    match dhcp {
        Dhcp::Proxy => {
            all.push(format!(
                "--dhcp-range={},proxy,{}",
                network.network(),
                network.netmask()
            ));
            for (tag, kind, file) in [
                ("tag:ipxe", "x86PC", format!("{http}/boot.ipxe")),
                ("tag:ipxe", "X86-64_EFI", format!("{http}/boot.ipxe")),
                ("tag:!ipxe", "x86PC", "undionly.kpxe".into()),
                ("tag:!ipxe", "X86-64_EFI", "ipxe.efi".into()),
                ("tag:!ipxe", "ARM64_EFI", "ipxe-arm64.efi".into()),
            ] {
                all.push(format!("--pxe-service={tag},{kind},kprov,{file}"));
            }
        }
        Dhcp::Range(first, last) => {
            all.push(format!("--dhcp-range={first},{last},{},1h", network.netmask()));
            match gateway {
                Some(gateway) => all.push(format!("--dhcp-option=option:router,{gateway}")),
                // Else it would be this machine.
                None => all.push("--dhcp-option=option:router".into()),
            }
        }
    }
    // The last one that matches counts for dnsmasq only by its tags, so that each names all that it excludes.
    all.push(format!("--dhcp-boot=tag:ipxe,{http}/boot.ipxe"));
    all.push(format!("--dhcp-boot=tag:uefihttp,tag:!ipxe,{http}/ipxe.efi"));
    all.push("--dhcp-option-force=tag:uefihttp,60,HTTPClient".into());
    all.push("--dhcp-boot=tag:efi,tag:!ipxe,tag:!uefihttp,ipxe.efi".into());
    all.push("--dhcp-boot=tag:arm,tag:!ipxe,tag:!uefihttp,ipxe-arm64.efi".into());
    all.push("--dhcp-boot=tag:!efi,tag:!arm,tag:!ipxe,tag:!uefihttp,undionly.kpxe".into());
    for host in *hosts {
        let address = match (host.address, dhcp) {
            (Some(address), Dhcp::Range(..)) if network.contains(&address) => format!(",{address}"),
            _ => String::new(),
        };
        all.push(format!("--dhcp-host={}{address},{}", host.mac, host.name));
    }
    all
}

/// Where distributions keep iPXE's programs, and as what they are offered.
const PROGRAMS: &[(&str, &[&str])] = &[
    (
        "undionly.kpxe",
        &["/usr/lib/ipxe/undionly.kpxe", "/usr/share/ipxe/undionly.kpxe"],
    ),
    (
        "ipxe.efi",
        &[
            "/usr/lib/ipxe/ipxe.efi",
            "/usr/share/ipxe/ipxe-x86_64.efi",
            "/boot/ipxe.efi",
        ],
    ),
    (
        "ipxe-arm64.efi",
        &["/usr/lib/ipxe/ipxe-arm64.efi", "/usr/share/ipxe/arm64-efi/ipxe.efi"],
    ),
    (super::CD, &["/usr/lib/ipxe/ipxe.iso", "/usr/share/ipxe/ipxe.iso"]),
];

/// Puts iPXE's programs where TFTP offers them; tells which of them this machine does not have.
pub(super) fn offer_programs(directory: &Utf8Path) -> std::io::Result<Vec<&'static str>> {
    let root = directory.join("tftp");
    std::fs::create_dir_all(&root)?;
    let mut missing = Vec::new();
    for (name, places) in PROGRAMS {
        match places.iter().find(|place| Utf8Path::new(place).exists()) {
            Some(place) => drop(std::fs::copy(place, root.join(name))?),
            None => missing.push(*name),
        }
    }
    let mut uefi = Vec::new();
    for (name, looked_for) in [("ipxe.efi", "BOOTX64.EFI"), ("ipxe-arm64.efi", "BOOTAA64.EFI")] {
        if !missing.contains(&name) {
            uefi.push((looked_for, std::fs::read(root.join(name))?));
        }
    }
    if !missing.contains(&super::CD)
        && !uefi.is_empty()
        && let Some(cd) = cd::with_uefi(std::fs::read(root.join(super::CD))?, &uefi)
    {
        std::fs::write(root.join(super::CD), cd)?;
    }
    Ok(missing)
}

/// The path of one of iPXE's programs, for HTTP.
pub(super) fn program(directory: &Utf8Path, name: &str) -> Option<Utf8PathBuf> {
    let known = PROGRAMS.iter().any(|(known, _)| *known == name);
    let path = directory.join("tftp").join(name);
    (known && path.exists()).then_some(path)
}

/// Starts it, and returns once it answers; its words go to the log. It ends when the child is dropped.
pub(super) async fn start(settings: &Settings<'_>) -> Result<Child, BootError> {
    let mut child = Command::new("dnsmasq")
        .args(arguments(settings))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| BootError::NoDnsmasq { source })?;
    let mut said = String::new();
    if let Some(words) = child.stderr.take() {
        let mut lines = BufReader::new(words).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let ready = line.contains("TFTP") && line.contains("root is");
            said = line;
            if ready {
                tokio::spawn(async move {
                    while let Ok(Some(line)) = lines.next_line().await {
                        tracing::debug!(line, "dnsmasq");
                    }
                });
                return Ok(child);
            }
        }
    }
    // It has closed its side: it ends.
    let _ = child.wait().await;
    Err(BootError::Dnsmasq { said })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(hosts: &[BootHost], dhcp: Dhcp) -> Vec<String> {
        arguments(&Settings {
            interface: "br0",
            network: "10.0.0.0/24".parse().unwrap(),
            dhcp,
            gateway: None,
            hosts,
            http: "http://10.0.0.1:10204",
            directory: "/tmp/x".into(),
        })
    }

    #[test]
    fn only_the_inventory_s_hosts_are_answered() {
        let host = |name: &str, last: Option<u8>| BootHost {
            address: last.map(|last| [10, 0, 0, last].into()),
            ..BootHost::new(name.parse().unwrap(), "52:54:00:00:00:01".parse().unwrap())
        };
        let hosts = [host("a", Some(9)), host("b", None)];
        let all = settings(&hosts, Dhcp::Range([10, 0, 0, 100].into(), [10, 0, 0, 110].into()));
        let has = |wanted: &str| all.iter().any(|a| a == wanted);
        assert!(has("--dhcp-ignore=tag:!known"));
        assert!(has("--dhcp-host=52:54:00:00:00:01,10.0.0.9,a"), "{all:#?}");
        assert!(has("--dhcp-host=52:54:00:00:00:01,b"));
        assert!(has("--dhcp-range=10.0.0.100,10.0.0.110,255.255.255.0,1h"));
        assert!(has("--dhcp-option=option:router"), "never this machine as gateway");
        let proxy = settings(&hosts, Dhcp::Proxy);
        assert!(proxy.iter().any(|a| a == "--dhcp-range=10.0.0.0,proxy,255.255.255.0"));
        assert!(
            !proxy.iter().any(|a| a.contains("10.0.0.9")),
            "addresses are another server's"
        );
    }
}
