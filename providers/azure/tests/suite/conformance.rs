//! The suite that every provider passes, and what a whole cluster looks like.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use kprov_emulators::azure::{Fault, Options, Power, Rate, What};
use kprov_provider::Provider as _;
use kprov_provider::conformance::{self, Setup, Trouble, World};
use kprov_types::machine::{DataVolume, FirstBoot, MachineState, NetworkSpec};
use kprov_types::{ClusterName, MachineName};

use crate::cloud::Cloud;

struct Portal<'a>(&'a Cloud);

impl Portal<'_> {
    fn id(&self, machine: &MachineName) -> String {
        let mut machines = self.0.arm.virtual_machines().into_iter();
        machines.find(|m| m.name == machine.as_str()).unwrap().id
    }
}

#[async_trait]
impl World for Portal<'_> {
    async fn power_off(&self, _: &ClusterName, machine: &MachineName) {
        assert!(self.0.arm.set_power(&self.id(machine), Power::Stopped));
    }

    async fn delete(&self, _: &ClusterName, machine: &MachineName) {
        assert!(self.0.arm.delete_by_hand(&self.id(machine)));
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    async fn trouble(&self, trouble: &Trouble) -> bool {
        let arm = &self.0.arm;
        arm.clear_faults();
        arm.configure(|o| {
            o.list_lag = Duration::ZERO;
            o.rate = None;
        });
        match trouble {
            Trouble::Over => {
                // What would never come to run is removed, as a person would.
                for machine in arm.virtual_machines().iter().filter(|m| m.provisioning == "Creating") {
                    arm.delete_by_hand(&machine.id);
                }
            }
            Trouble::LostReplies => {
                for nth in (0..40).step_by(2) {
                    arm.fault(Fault::on("PUT *", What::LoseReply).after(nth));
                    arm.fault(Fault::on("DELETE *", What::LoseReply).after(nth));
                }
            }
            Trouble::Throttling => arm.configure(|o| {
                o.rate = Some(Rate {
                    burst: 12.0,
                    per_second: 400.0,
                });
            }),
            // Every listing's second page is lost, for a while.
            Trouble::CutListings => arm.fault(Fault::on("LIST *", What::LoseReply).after(1).times(3)),
            Trouble::LateListings => arm.configure(|o| o.list_lag = Duration::from_millis(40)),
            Trouble::NeverRunning(machine) => {
                arm.fault(Fault::on("PUT virtualMachines", What::NeverEnds).named(machine.as_str()));
            }
        }
        true
    }
}

fn setup() -> Setup {
    let network = |cidr: Option<&str>| NetworkSpec {
        cidr: cidr.map(|c| c.parse().unwrap()),
        api_port: 6443,
    };
    Setup {
        cluster: ClusterName::new("conform").unwrap(),
        neighbour: ClusterName::new("conform-beside").unwrap(),
        networks: [network(None), network(Some("10.44.0.0/20"))],
        first_boot: FirstBoot("#!/bin/sh\nexec true\n".into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passes() {
    let cloud = Cloud::start(Options {
        settle: Duration::from_millis(10),
        page: 2,
        ..Options::default()
    })
    .await;
    let mut config = cloud.config(|_| {});
    // For the machine that never comes to run.
    config.operation_limit = Duration::from_millis(400);
    let provider = kprov_provider_azure::AzureProvider::open(config).unwrap();
    conformance::all(&provider, &Portal(&cloud), &setup()).await.unwrap();
    assert_eq!(provider.name(), "azure");
    assert_eq!(cloud.resources(), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_in_a_group_that_is_given_and_without_public_addresses() {
    let cloud = Cloud::fast().await;
    // A group that somebody else has something in.
    let theirs = cloud.arm.endpoint();
    let client = reqwest::Client::new();
    let group = format!(
        "{theirs}/subscriptions/{}/resourceGroups/shared?api-version=2021-04-01",
        cloud.arm.subscription()
    );
    let made = client
        .put(group)
        .bearer_auth(cloud.arm.token())
        .json(&serde_json::json!({"location": "westeurope", "tags": {"owner": "somebody"}}))
        .send()
        .await
        .unwrap();
    assert!(made.status().is_success(), "{made:?}");
    let before = cloud.resources();
    let config = cloud.config(|s| {
        s.resource_group = Some("shared".into());
        s.private = true;
    });
    let mut config = config;
    config.operation_limit = Duration::from_millis(400);
    let provider = kprov_provider_azure::AzureProvider::open(config).unwrap();
    conformance::all(&provider, &Portal(&cloud), &setup()).await.unwrap();
    assert_eq!(cloud.resources(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_and_three_in_three_zones() {
    let cloud = Cloud::start(Options::default()).await;
    let observed = cloud.up(3, 3).await.unwrap();
    assert!(observed.machines.iter().all(|m| m.state == MachineState::Running));
    let mut zones: BTreeMap<_, usize> = BTreeMap::new();
    for machine in &observed.machines {
        *zones.entry(machine.zone.clone().unwrap()).or_default() += 1;
        // People reach the setup of control-plane machines; workers have no address outside.
        assert_eq!(
            machine.external_address.is_some(),
            machine.name.as_str().contains("-cp-")
        );
    }
    assert_eq!(zones.into_values().collect::<Vec<_>>(), [2, 2, 2]);
    assert_eq!(observed.disks.len(), 3);
    let DataVolume::Device(devices) = &observed.disks[0].volume else {
        panic!("{observed:?}")
    };
    assert_eq!(devices[0], "/dev/disk/azure/data/by-lun/0");
    for vm in cloud.arm.virtual_machines() {
        assert_eq!(vm.custom_data.as_deref(), Some(b"#!/bin/sh\nexec true\n".as_slice()));
        assert_eq!(vm.data_disks.len(), usize::from(vm.name.contains("-cp-")), "{vm:?}");
    }
    let balancers = cloud.arm.load_balancers();
    assert_eq!(balancers.len(), 1);
    assert_eq!(balancers[0].rules.len(), 1);
    assert_eq!(balancers[0].rules[0].backends.len(), 3, "{balancers:?}");
    let network = observed.network.unwrap();
    assert!(network.complete);
    assert_eq!(network.endpoint.port, 6443);

    cloud.down().await.unwrap();
    assert_eq!(cloud.provider().leftovers(&cloud.cluster).await.unwrap(), []);
    assert_eq!(cloud.resources(), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_replaced_gets_its_data_disk_in_its_zone() {
    let cloud = Cloud::fast().await;
    let before = cloud.up(3, 0).await.unwrap();
    let victim = before.machines.iter().find(|m| m.name.as_str() == "demo-cp-1").unwrap();
    assert!(cloud.arm.delete_by_hand(&victim.id));
    let after = cloud.up(3, 0).await.unwrap();
    assert_eq!(after.disks, before.disks);
    let replaced = after.machines.iter().find(|m| m.name == victim.name).unwrap();
    assert_eq!(replaced.zone, victim.zone);
    let vm = cloud
        .arm
        .virtual_machines()
        .into_iter()
        .find(|m| m.name == "demo-cp-1")
        .unwrap();
    assert_eq!(vm.data_disks[0].name, "demo-cp-1-data");
    assert_eq!(vm.data_disks[0].lun, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_others_moved_into_stays() {
    let cloud = Cloud::fast().await;
    cloud.up(1, 0).await.unwrap();
    let url = format!(
        "{}/subscriptions/{}/resourceGroups/kprov-demo/providers/Microsoft.Compute/disks/theirs?api-version=2024-03-02",
        cloud.arm.endpoint(),
        cloud.arm.subscription()
    );
    let body = serde_json::json!({"location": "westeurope", "sku": {"name": "Premium_LRS"},
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 4}});
    let made = reqwest::Client::new()
        .put(url)
        .bearer_auth(cloud.arm.token())
        .json(&body)
        .send()
        .await
        .unwrap();
    assert!(made.status().is_success(), "{made:?}");
    cloud.down().await.unwrap();
    let left: BTreeSet<String> = ["kprov-demo", "kprov-demo/providers/Microsoft.Compute/disks/theirs"]
        .map(str::to_owned)
        .into();
    assert_eq!(cloud.resources(), left);
    // It isn't kprov's any more, and says so.
    let provider = cloud.provider();
    assert_eq!(provider.leftovers(&cloud.cluster).await.unwrap(), []);
    assert_eq!(provider.clusters().await.unwrap(), []);
    let error = crate::cloud::provider_error(cloud.up(1, 0).await.unwrap_err());
    assert!(
        error
            .to_string()
            .contains("`kprov-demo` exists already and is not of cluster `demo`"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn narrowing_who_may_come_in_changes_one_rule() {
    let cloud = Cloud::fast().await;
    cloud.up(1, 0).await.unwrap();
    cloud.arm.record.reset();
    let config = cloud.config(|s| s.access = vec!["192.0.2.0/24".parse().unwrap()]);
    let provider = kprov_provider_azure::AzureProvider::open(config).unwrap();
    let goal = kprov_provision::Goal::Present(crate::cloud::wanted(&cloud.cluster, 1, 0));
    cloud.reach(&provider, &goal).await.unwrap();
    let calls = cloud.arm.record.calls();
    let puts: Vec<_> = calls.iter().filter(|(name, _)| name.starts_with("PUT")).collect();
    assert_eq!(puts, [(&"PUT networkSecurityGroups".to_owned(), &1)], "{calls:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_a_console() {
    let cloud = Cloud::fast().await;
    let observed = cloud.up(1, 0).await.unwrap();
    let machine = &observed.machines[0].name;
    cloud.arm.set_console(machine.as_str(), "kernel panic");
    let text = cloud.provider().console(&cloud.cluster, machine).await.unwrap();
    assert_eq!(text.as_deref(), Some("kernel panic"));
    let nobody = MachineName::new("demo-cp-9").unwrap();
    assert_eq!(cloud.provider().console(&cloud.cluster, &nobody).await.unwrap(), None);
}
