//! `kprov boot`: what hosts without an operating system boot from over the network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use camino::Utf8Path;
use ipnet::Ipv4Net;
use kprov_provider_baremetal::boot::{BootConfig, BootError, BootHost, CD, Dhcp, Event, Mac, Mode, Server, initrd};
use kprov_provider_baremetal::inventory::{self, Host};
use kprov_provider_baremetal::redfish::{Bmc, BmcError, BootTarget, Limits, PowerState};
use kprov_types::MachineName;
use kprov_types::machine::FirstBoot;
use tokio::task::JoinSet;

use super::{Context, baremetal};
use crate::cli::{BootCommand, BootImageArgs, BootServeArgs};
use crate::failure::{self, OrHint as _, UserError};
use crate::print;
use crate::progress::Reporter;

pub(super) async fn run(context: &Context, command: BootCommand) -> Result<()> {
    match command {
        BootCommand::Serve(args) => serve(context, *args).await,
        BootCommand::Image(args) => image(&args),
    }
}

fn image(args: &BootImageArgs) -> Result<()> {
    let BootImageArgs {
        kernel,
        modules,
        busybox,
        add,
        out,
    } = args;
    std::fs::create_dir_all(out).or_hint(format!("can't make `{out}`"), "check the path")?;
    std::fs::copy(kernel, out.join("kernel")).or_hint(format!("can't copy `{kernel}`"), "check the path")?;
    let count = initrd::build(modules, busybox, add, &out.join("initrd")).map_err(|error| {
        let hint = error.hint();
        let shown = UserError::new(error.to_string()).hint(hint);
        anyhow::Error::from(error).context(shown)
    })?;
    print::raw(&format!("{out}: kernel and initrd with {count} drivers\n"))
}

fn bmc_failed(host: &MachineName, error: BmcError) -> anyhow::Error {
    let shown = UserError::new(format!("host `{host}` can't be made to boot by its controller")).hint(error.hint());
    anyhow::Error::from(error).context(shown)
}

fn boot_failed(error: BootError) -> anyhow::Error {
    let shown = UserError::new(error.to_string()).hint(error.hint());
    anyhow::Error::from(error).context(shown)
}

async fn serve(context: &Context, args: BootServeArgs) -> Result<()> {
    let found = inventory::load(&inventory::Disk, &args.inventory).map_err(|error| baremetal::explain(&error))?;
    let hosts = boot_hosts(&found.hosts, &args)?;
    let address = match args.address {
        Some(address) => address,
        None => address_of(&args.interface)?,
    };
    let mut server = Server::start(BootConfig {
        interface: args.interface.clone(),
        address,
        dhcp: dhcp(&args.dhcp)?,
        gateway: args.gateway,
        port: args.port,
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        image: args.image.clone(),
        console: args.console.clone(),
        hosts: hosts.clone(),
    })
    .await
    .map_err(boot_failed)?;
    let reporter = &context.reporter;
    let count = match hosts.len() {
        1 => "1 host".to_owned(),
        n => format!("{n} hosts"),
    };
    reporter.step("", &format!("boot {count} from {}", server.url()));
    let cd = programs(&server, args.virtual_media, reporter)?;
    let controllers: BTreeMap<_, _> = found
        .hosts
        .iter()
        .filter(|_| args.power_on)
        .cloned()
        .map(|h| (h.name.clone(), h))
        .collect();
    let mut power = JoinSet::new();
    for host in controllers.values().filter(|host| host.bmc.is_some()).cloned() {
        let from = if cd.is_some() { "a virtual CD" } else { "the network" };
        reporter.step(host.name.as_str(), &format!("switch on, to boot from {from}"));
        let cd = cd.clone();
        power.spawn(async move {
            let done = boot_from_network(&host, cd.as_deref()).await;
            (host.name, done)
        });
    }
    let mut left: BTreeSet<MachineName> = hosts.iter().map(|host| host.name.clone()).collect();
    // No host holds up another: what goes wrong is told at once, and again when all others are done.
    let mut refused: BTreeMap<MachineName, anyhow::Error> = BTreeMap::new();
    let mut stuck: BTreeMap<MachineName, anyhow::Error> = BTreeMap::new();
    while !(args.until_booted
        && power.is_empty()
        && left
            .iter()
            .all(|name| refused.contains_key(name) || stuck.contains_key(name)))
    {
        tokio::select! {
            Some(done) = power.join_next() => {
                let (name, done) = done?;
                if let Err(error) = done {
                    let error = bmc_failed(&name, error);
                    reporter.note(&with_hint(&error));
                    refused.insert(name, error);
                }
            }
            event = server.next_event() => {
                let Some((name, event)) = event else { break };
                reporter.step(name.as_str(), &event.to_string());
                match event {
                    Event::Done(_) => {
                        left.remove(&name);
                        stuck.remove(&name);
                    }
                    // Some controllers would have it boot from the network for ever.
                    Event::Boots => if let Some(host) = controllers.get(&name).cloned() {
                        // Another attempt: switched on by hand, if its controller didn't.
                        refused.remove(&name);
                        stuck.remove(&name);
                        let cd = cd.clone();
                        power.spawn(async move {
                            let done = boot_as_before(&host, cd.as_deref()).await;
                            (host.name, done)
                        });
                    },
                    Event::Failed(why) => {
                        let error = UserError::new(format!("host `{name}` can't go on: {why}"))
                            .hint("it asks again every 30 s; correct what is wrong and run the same command again");
                        stuck.insert(name, error.into());
                    }
                    Event::FirstBoot | Event::Reports(_) => {}
                }
            }
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    refused.extend(stuck);
    summary(&count, refused.into_values().collect())
}

/// Tells which of iPXE's programs are not at hand; the URL of its CD where that is wanted.
fn programs(server: &Server, virtual_media: bool, reporter: &Reporter) -> Result<Option<String>> {
    let (cds, missing): (Vec<&str>, Vec<&str>) = server.missing_programs().iter().partition(|name| **name == CD);
    if virtual_media && !cds.is_empty() {
        return Err(UserError::new(format!("iPXE's `{CD}` is not on this machine"))
            .hint("install it (Debian: `apt-get install ipxe`)")
            .into());
    }
    for program in missing {
        let whose = match program {
            "undionly.kpxe" => "hosts that boot by BIOS",
            "ipxe.efi" => "x86 hosts that boot by UEFI",
            _ => "ARM hosts",
        };
        reporter.note(&format!(
            "warning: iPXE's `{program}` is not on this machine (the package `ipxe` has it, though not everywhere the one for ARM): {whose} can boot only if their firmware has iPXE in it"
        ));
    }
    Ok(virtual_media.then(|| server.cd_url()))
}

/// How it ended: one error as it is, several in one.
fn summary(hosts: &str, mut errors: Vec<anyhow::Error>) -> Result<()> {
    if errors.len() > 1 {
        let each: Vec<String> = errors.iter().map(with_hint).collect();
        let n = errors.len();
        return Err(
            UserError::new(format!("{n} of {hosts} did not boot as told:\n  {}", each.join("\n  ")))
                .hint("correct what is wrong with each and run the same command again")
                .into(),
        );
    }
    errors.pop().map_or(Ok(()), Err)
}

/// On one line.
fn with_hint(error: &anyhow::Error) -> String {
    match failure::hint(error) {
        Some(hint) => format!("{error:#} ({hint})"),
        None => format!("{error:#}"),
    }
}

/// Has a host boot from the network, by way of a CD where one is given, whatever runs there now.
async fn boot_from_network(host: &Host, cd: Option<&str>) -> Result<(), BmcError> {
    let Some(entry) = &host.bmc else { return Ok(()) };
    let bmc = Bmc::open(entry, Limits::default()).await?;
    // Some controllers take a change of the boot order only while there is no power.
    if bmc.power().await? != PowerState::Off {
        bmc.power_off().await?;
    }
    match cd {
        Some(url) => {
            bmc.insert_media(url).await?;
            bmc.boot_once(BootTarget::Cd).await?;
        }
        None => bmc.boot_once(BootTarget::Pxe).await?,
    }
    bmc.power_on().await
}

/// Once iPXE runs, it needs its CD no more.
async fn boot_as_before(host: &Host, cd: Option<&str>) -> Result<(), BmcError> {
    let Some(entry) = &host.bmc else { return Ok(()) };
    let bmc = Bmc::open(entry, Limits::default()).await?;
    if cd.is_some() {
        bmc.eject_media().await?;
    }
    bmc.boot_as_before().await
}

/// The hosts that can boot here, with what becomes of each.
fn boot_hosts(hosts: &[Host], args: &BootServeArgs) -> Result<Vec<BootHost>> {
    let mut disks = BTreeMap::new();
    for text in &args.install {
        let (name, disk) = text.split_once('=').ok_or_else(|| {
            UserError::new(format!("`--install {text}` is not `HOST=DISK`"))
                .hint("such as `--install node-1=/dev/disk/by-id/nvme-...`")
        })?;
        disks.insert(name, disk);
    }
    let keys = match &args.authorized_keys {
        Some(path) => Some(std::fs::read_to_string(path).or_hint(format!("can't read `{path}`"), "check the path")?),
        None => None,
    };
    let mut found = Vec::new();
    for host in hosts {
        let Some(mac) = host.bmc.as_ref().and_then(|bmc| bmc.mac.as_ref()) else {
            continue;
        };
        let mac: Mac = mac
            .parse()
            .map_err(|error| UserError::new(format!("host `{}`: {error}", host.name)).hint("correct its `bmc.mac`"))?;
        let disk = disks.remove(host.name.as_str());
        let given = args.first_boot.as_deref().map(|dir| first_boot(dir, &host.name));
        let first_boot = match (given.transpose()?.flatten(), &keys, disk) {
            (Some(given), _, _) => Some(given),
            (None, Some(keys), Some(_)) => Some(login_for(keys)),
            (None, _, _) => None,
        };
        found.push(BootHost {
            address: host.address,
            mode: if disk.is_some() { Mode::Install } else { Mode::Memory },
            disk: disk.map(str::to_owned),
            wipe: args.wipe.contains(&host.name),
            first_boot,
            ..BootHost::new(host.name.clone(), mac)
        });
    }
    if let Some(name) = disks.keys().next() {
        return Err(
            UserError::new(format!("`--install` names `{name}`, which can't boot here"))
                .hint("give that host a `bmc` with its `mac` in the inventory")
                .into(),
        );
    }
    if found.is_empty() {
        return Err(UserError::new(format!("no host of `{}` can boot here", args.inventory))
            .hint("give hosts a `bmc` with the hardware address (`mac`) of the interface that they boot from")
            .into());
    }
    Ok(found)
}

fn first_boot(dir: &Utf8Path, host: &MachineName) -> Result<Option<FirstBoot>> {
    let path = dir.join(host.as_str());
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(FirstBoot(text))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("can't read `{path}`")),
    }
}

/// cloud-init user data that let these keys in, as a user who may do everything.
fn login_for(keys: &str) -> FirstBoot {
    let keys = keys
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    // JSON is YAML.
    let user = serde_json::json!({
        "users": [{ "name": "kprov", "shell": "/bin/bash", "lock_passwd": true, "sudo": "ALL=(ALL) NOPASSWD:ALL",
                    "ssh_authorized_keys": keys.collect::<Vec<_>>() }],
    });
    FirstBoot(format!("#cloud-config\n{user}\n"))
}

fn dhcp(text: &str) -> Result<Dhcp> {
    if text == "proxy" {
        return Ok(Dhcp::Proxy);
    }
    let range = text.split_once('-').and_then(|(first, last)| {
        let range: (Ipv4Addr, Ipv4Addr) = (first.parse().ok()?, last.parse().ok()?);
        (range.0 <= range.1).then_some(range)
    });
    let (first, last) = range.ok_or_else(|| {
        UserError::new(format!("`--dhcp {text}` is neither `proxy` nor a range"))
            .hint("such as `--dhcp 10.0.0.100-10.0.0.150`")
    })?;
    Ok(Dhcp::Range(first, last))
}

/// The first IPv4 address of an interface.
fn address_of(interface: &str) -> Result<Ipv4Net> {
    let all = nix::ifaddrs::getifaddrs().context("can't list this machine's addresses")?;
    let found = all.filter(|one| one.interface_name == interface).find_map(|one| {
        let address = one.address?.as_sockaddr_in()?.ip();
        let mask = one.netmask?.as_sockaddr_in()?.ip();
        Ipv4Net::with_netmask(address, mask).ok()
    });
    found.ok_or_else(|| {
        UserError::new(format!("the interface `{interface}` has no IPv4 address"))
            .hint("`ip address` lists interfaces; give the one in the hosts' network")
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(dhcp("proxy").unwrap(), Dhcp::Proxy);
        let range = Dhcp::Range([10, 0, 0, 1].into(), [10, 0, 0, 9].into());
        assert_eq!(dhcp("10.0.0.1-10.0.0.9").unwrap(), range);
        for wrong in ["", "10.0.0.1", "10.0.0.9-10.0.0.1", "a-b"] {
            assert!(dhcp(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn logins() {
        let FirstBoot(text) = login_for("# mine\nssh-ed25519 AAAA me@home\n\nssh-rsa BBBB\n");
        let (first, rest) = text.split_once('\n').unwrap();
        assert_eq!(first, "#cloud-config");
        let value: serde_json::Value = serde_saphyr::from_str(rest).unwrap();
        assert_eq!(
            value["users"][0]["ssh_authorized_keys"],
            serde_json::json!(["ssh-ed25519 AAAA me@home", "ssh-rsa BBBB"])
        );
    }

    #[test]
    fn interfaces() {
        assert_eq!(address_of("lo").unwrap().to_string(), "127.0.0.1/8");
        assert!(address_of("no-such-interface").is_err());
    }
}
