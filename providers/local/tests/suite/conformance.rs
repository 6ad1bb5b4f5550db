//! The suite that every provider passes, on machines of this host.

use std::time::Duration;

use async_trait::async_trait;
use kprov_provider::Provider;
use kprov_provider::conformance::{self, Setup, World};
use kprov_types::machine::{FirstBoot, NetworkSpec};
use kprov_types::{ClusterName, MachineName};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::room::{Room, room, until};

struct Host<'a>(&'a Room);

#[async_trait]
impl World for Host<'_> {
    async fn power_off(&self, cluster: &ClusterName, machine: &MachineName) {
        kill(Pid::from_raw(self.0.pid(cluster, machine)), Signal::SIGKILL).unwrap();
    }

    async fn delete(&self, cluster: &ClusterName, machine: &MachineName) {
        self.power_off(cluster, machine).await;
        let dir = self.0.machine_dir(cluster, machine);
        tokio::task::spawn_blocking(move || until("it can be deleted", || std::fs::remove_dir_all(&dir).ok()))
            .await
            .unwrap();
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn passes() {
    let Some(room) = room(&["conform", "conform-beside"], 10) else {
        return;
    };
    let setup = Setup {
        cluster: room.clusters[0].clone(),
        neighbour: room.clusters[1].clone(),
        // One with a range of the provider's choice, and one that names it.
        networks: [
            NetworkSpec {
                cidr: None,
                api_port: 6443,
            },
            room.network(),
        ],
        first_boot: FirstBoot("#!/bin/sh\nexec sleep 3600\n".into()),
    };
    conformance::all(&room.provider, &Host(&room), &setup).await.unwrap();
    assert_eq!(room.provider.name(), "local");
}
