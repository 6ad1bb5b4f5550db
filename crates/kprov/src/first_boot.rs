//! First-boot data: a shell script that puts kprov-node and its configuration onto a machine and starts it.
//!
//! It serves as cloud-init user data as it stands, and can run again at every boot: a machine that was set up keeps its
//! configuration.

use kprov_types::Digest;
use kprov_types::machine::FirstBoot;
use kprov_types::node::{NODE_CONFIG_PATH, NodeConfig};

const SCRIPT: &str = include_str!("first_boot.sh");

/// The script for one machine. `binary` is the digest of kprov-node, and its path below each of the release's URLs.
pub(crate) fn script(config: &NodeConfig, binary: &(Digest, String)) -> Result<FirstBoot, serde_json::Error> {
    let (digest, path) = binary;
    let json = serde_json::to_string(config)?;
    Ok(FirstBoot(
        SCRIPT
            .replace("@URLS@", &config.release.urls.join(" "))
            .replace("@SHA256@", digest.hex())
            .replace("@PATH@", path)
            .replace("@CONFIG_PATH@", NODE_CONFIG_PATH)
            .replace("@CONFIG@", &json),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kprov_types::ClusterName;
    use kprov_types::machine::{Endpoint, Role};
    use kprov_types::node::{JoinToken, NodeNetwork, ReleaseSource};

    #[test]
    fn the_script_is_shell_and_fits_user_data() {
        let config = NodeConfig {
            cluster: ClusterName::new("demo").unwrap(),
            machine: None,
            role: Role::Worker,
            address: None,
            labels: std::collections::BTreeMap::new(),
            endpoint: Endpoint {
                host: "10.0.0.1".into(),
                port: 6443,
            },
            ca: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into(),
            release: ReleaseSource {
                urls: vec!["http://10.0.0.1:10202".into()],
                digest: Digest::from_hex(&"0".repeat(64)).unwrap(),
            },
            join_token: Some(JoinToken {
                id: "abcdef".into(),
                secret: "0123456789abcdef".into(),
            }),
            setup: None,
            data: None,
            network: NodeNetwork {
                pods: "10.244.0.0/16".parse().unwrap(),
                services: "10.96.0.0/16".parse().unwrap(),
                dns_domain: "cluster.local".into(),
            },
            virtual_address: None,
            taint: false,
        };
        let FirstBoot(text) = script(&config, &(Digest::from_hex(&"1".repeat(64)).unwrap(), "blobs/x".into())).unwrap();
        assert!(text.starts_with("#!/bin/sh\n"));
        assert!(!text.contains('@'), "{text}");
        // EC2's limit for user data is 16 KiB.
        assert!(text.len() < 16 * 1024);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        assert!(
            std::process::Command::new("sh")
                .arg("-n")
                .arg(file.path())
                .status()
                .unwrap()
                .success()
        );
    }
}
