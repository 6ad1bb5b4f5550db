//! The suite that every provider passes, on hosts reached by SSH.

use std::time::Duration;

use async_trait::async_trait;
use kprov_emulators::hosts::Hosts;
use kprov_provider::conformance::{self, Setup, World};
use kprov_provider_baremetal::{BaremetalConfig, BaremetalProvider};
use kprov_types::machine::{FirstBoot, NetworkSpec};
use kprov_types::{ClusterName, MachineName};

use crate::room::{entry, inventory, possible, program};

struct Rack<'a>(&'a Hosts);

#[async_trait]
impl World for Rack<'_> {
    /// A power cut, and the power back: hosts boot by themselves, and nothing on them starts kprov-node without systemd.
    async fn power_off(&self, _: &ClusterName, machine: &MachineName) {
        self.0.power_off(machine.as_str()).unwrap();
        let again = || async { self.0.start(&[(machine.as_str(), "")]).await };
        let mut tries = 0;
        while let Err(error) = again().await {
            tries += 1;
            assert!(tries < 50, "{error:#}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A host that was installed anew; its data disk is another one's business.
    async fn delete(&self, _: &ClusterName, machine: &MachineName) {
        let script = "read -r pid _ </run/kprov-node.pid; kill -KILL \"$pid\"; rm -rf /run/kprov-node.pid /etc/kprov/machine.json /etc/kprov/before";
        self.0.inside(machine.as_str(), script).unwrap();
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes() {
    if !possible() {
        return;
    }
    let hosts = Hosts::open(&program(), "bmconform", "10.99.61.0/24").await.unwrap();
    let names = ["alpha-cp-0", "alpha-worker-0", "alpha-2-cp-0", "alpha-2-worker-0"];
    hosts.start(&names.map(|name| (name, ""))).await.unwrap();
    let entries = names.map(|name| {
        entry(
            name,
            if name.contains("-cp-") {
                "control-plane"
            } else {
                "worker"
            },
        )
    });
    let config = BaremetalConfig::new(inventory(&hosts, &entries).await);
    let provider = BaremetalProvider::new(config).unwrap();
    let setup = Setup {
        cluster: ClusterName::new("alpha").unwrap(),
        neighbour: ClusterName::new("alpha-2").unwrap(),
        // One with the range that the hosts have, and one that is named.
        networks: [
            NetworkSpec {
                cidr: None,
                api_port: 6443,
            },
            NetworkSpec {
                cidr: Some("10.99.61.0/24".parse().unwrap()),
                api_port: 6443,
            },
        ],
        first_boot: FirstBoot("#!/bin/sh\nexec sleep 3600\n".into()),
    };
    conformance::all(&provider, &Rack(&hosts), &setup).await.unwrap();
    for name in names {
        let left = hosts
            .inside(
                name,
                "ls -d /etc/kprov/* /run/kprov* /var/log/kprov* /var/lib/kprov/* 2>/dev/null || true",
            )
            .unwrap();
        assert_eq!(left, "", "`{name}` is not as it was found");
    }
}
