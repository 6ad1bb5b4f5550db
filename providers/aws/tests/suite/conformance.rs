//! The suite that every provider passes.

use std::time::Duration;

use async_trait::async_trait;
use kprov_emulators::aws::{Effect, Fault, Moto};
use kprov_provider::conformance::{self, Setup, Trouble, World};
use kprov_types::machine::{FirstBoot, NetworkSpec};
use kprov_types::{ClusterName, MachineName};

use crate::account::Account;
use crate::room;

struct Cloud<'a> {
    moto: &'a Moto,
    account: Account,
}

#[async_trait]
impl World for Cloud<'_> {
    async fn power_off(&self, cluster: &ClusterName, machine: &MachineName) {
        let id = self.account.instance_of(cluster, machine).await;
        self.account.stop(&id).await;
    }

    async fn delete(&self, cluster: &ClusterName, machine: &MachineName) {
        let id = self.account.instance_of(cluster, machine).await;
        self.account.terminate(&id).await;
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    async fn trouble(&self, trouble: &Trouble) -> bool {
        let faults = self.moto.faults();
        match trouble {
            Trouble::Over => faults.clear(),
            Trouble::LostReplies => faults.add(Fault::on_changes(Effect::LoseReply).every(1)),
            Trouble::Throttling => {
                faults.add(Fault::on_all(Effect::throttle()).times(30));
                faults.add(Fault::on_changes(Effect::throttle()).every(2));
            }
            Trouble::CutListings => {
                faults.page_size(5);
                faults.add(Fault::on(
                    "DescribeInstances",
                    Effect::refuse("InternalError", "An internal error."),
                ));
            }
            Trouble::LateListings => faults.late(2),
            Trouble::NeverRunning(name) => faults.never_running(name.as_str()),
        }
        true
    }
}

#[tokio::test]
async fn passes() {
    let Some(moto) = room::moto().await else { return };
    let cloud = Cloud {
        account: Account::new(&moto),
        moto: &moto,
    };
    let before = cloud.account.everything().await;
    let provider = room::provider(&moto).await;
    let setup = Setup {
        cluster: room::cluster("conform"),
        neighbour: room::cluster("conform-beside"),
        networks: [
            NetworkSpec {
                cidr: None,
                api_port: 6443,
            },
            NetworkSpec {
                cidr: Some("10.63.0.0/16".parse().unwrap()),
                api_port: 6443,
            },
        ],
        first_boot: FirstBoot("#!/bin/sh\nexec sleep 3600\n".into()),
    };
    if let Err(violation) = conformance::all(&provider, &cloud, &setup).await {
        panic!("{violation}");
    }
    assert_eq!(cloud.account.everything().await, before);
}
