//! What the pod network needs of the host: settings it makes, and features it can only report as missing.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkBridge, LinkVeth, LinkVxlan};

/// Kernel settings: file, value, and whether it may be missing.
const SETTINGS: &[(&str, &str, bool)] = &[
    ("/proc/sys/net/ipv4/ip_forward", "1", false),
    // Packets between pods on one bridge have to pass kube-proxy's rules too, or Services answer from the wrong address.
    ("/proc/sys/net/bridge/bridge-nf-call-iptables", "1", true),
];

/// Makes kernel settings. An error names the file.
pub(super) fn ensure_settings() -> Result<(), (&'static str, io::Error)> {
    for (file, value, optional) in SETTINGS {
        match std::fs::read_to_string(file) {
            Ok(now) if now.trim() == *value => {}
            Err(error) if *optional && error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err((file, error)),
            Ok(_) => std::fs::write(file, value).map_err(|error| (*file, error))?,
        }
    }
    Ok(())
}

/// What this host's kernel lacks for pods and their network, each in words. Tried out in a network namespace that is gone
/// afterwards; the kernel loads modules by itself where they are installed. Needs root.
pub fn missing_network_features() -> Vec<String> {
    let tried = std::thread::spawn(|| {
        let mut missing = Vec::new();
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            return vec![format!("network namespaces cannot be made: {error}")];
        }
        missing.extend(missing_devices().unwrap_or_else(|error| vec![format!("netlink is not usable: {error}")]));
        missing.extend(missing_filter());
        missing
    });
    let mut missing = tried
        .join()
        .unwrap_or_else(|_| vec!["network features could not be tried out".into()]);
    load_module("overlay");
    if !std::fs::read_to_string("/proc/filesystems")
        .is_ok_and(|all| all.lines().any(|line| line.ends_with("\toverlay")))
    {
        missing.push("the kernel has no overlay file system (module `overlay`), which containers' images need".into());
    }
    load_module("br_netfilter");
    if !Path::new("/proc/sys/net/bridge").exists() {
        missing.push(
            "the kernel has no bridge filtering (module `br_netfilter`): a pod may not reach a Service that leads to a pod \
             on the same machine"
                .into(),
        );
    }
    missing
}

/// Not needed where a feature is built in, and not possible where modules are somebody else's: what counts is looked at
/// afterwards.
fn load_module(name: &str) {
    let _ = Command::new("modprobe")
        .arg(name)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

fn missing_devices() -> io::Result<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let mut missing = Vec::new();
        let tries = [
            ("bridge devices", "bridge", LinkBridge::new("try-bridge").build()),
            ("veth devices", "veth", LinkVeth::new("try-veth0", "try-veth1").build()),
            (
                "VXLAN devices",
                "vxlan",
                LinkVxlan::new("try-vxlan", 1).port(4789).build(),
            ),
        ];
        for (what, module, message) in tries {
            if let Err(error) = handle.link().add(message).execute().await {
                missing.push(format!("the kernel has no {what} (module `{module}`): {error}"));
            }
        }
        connection.abort();
        Ok(missing)
    })
}

fn missing_filter() -> Option<String> {
    let works = |program: &str, arguments: &[&str]| {
        let ran = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output();
        match ran {
            Ok(output) if output.status.success() => Some(Ok(())),
            Ok(output) => Some(Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            Err(_) => None,
        }
    };
    let rule = [
        "-w",
        "-t",
        "nat",
        "-A",
        "POSTROUTING",
        "-m",
        "comment",
        "--comment",
        "try",
        "-j",
        "MASQUERADE",
        "--random-fully",
    ];
    match works("iptables", &rule).or_else(|| works("nft", &["list", "tables"])) {
        Some(Ok(())) => None,
        Some(Err(message)) => Some(format!("packet filter rules cannot be made: {message}")),
        None => Some("there is neither `iptables` nor `nft`, which masquerading and Services need".into()),
    }
}
