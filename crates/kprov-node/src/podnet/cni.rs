//! The CNI configuration that containerd finds.

use std::io;
use std::path::Path;

use ipnet::Ipv4Net;
use serde_json::json;

/// What CNI plugins are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// The range that pods on this machine get their addresses from.
    pub pod_cidr: Ipv4Net,
    /// Pods' MTU in bytes.
    pub mtu: u32,
}

/// Where plugins keep the addresses they gave. Not kept over a restart of the machine, as pods aren't.
const LEASES: &str = "/run/cni/kprov";

impl CniConfig {
    /// The configuration list, as a file's content (CNI specification 1.0.0). The loopback interface is containerd's own
    /// doing.
    pub fn conflist(&self) -> String {
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "kprov",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": true,
                    // A machine that registers anew may get another range; its bridge has to follow.
                    "forceAddress": true,
                    "hairpinMode": true,
                    "mtu": self.mtu,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": LEASES,
                        "ranges": [[{ "subnet": self.pod_cidr.to_string() }]],
                        "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        format!("{config:#}\n")
    }

    /// Writes the configuration, where it differs, in one step: containerd watches the directory and would read half of it.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let content = self.conflist();
        if std::fs::read(path).is_ok_and(|now| now == content.as_bytes()) {
            return Ok(());
        }
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        // Not an extension that containerd would load.
        let new = path.with_extension("tmp");
        std::fs::write(&new, content)?;
        std::fs::rename(&new, path)
    }
}
