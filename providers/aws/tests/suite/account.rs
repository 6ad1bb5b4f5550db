//! Everything in the account, asked of moto itself: uncounted, and without the provider's help.

use std::collections::BTreeSet;

use aws_credential_types::Credentials;
use aws_sdk_ec2::config::{BehaviorVersion, Region};
use aws_sdk_ec2::types::{Filter, InstanceStateName, Reservation, Tag};
use kprov_emulators::aws::Moto;
use kprov_types::{ClusterName, MachineName};

use crate::room::REGION;

/// EC2 and its load balancers, asked directly.
pub(crate) struct Account {
    pub(crate) ec2: aws_sdk_ec2::Client,
    elb: aws_sdk_elasticloadbalancingv2::Client,
}

/// A thing and its kind.
pub(crate) type Thing = (&'static str, String);

fn text(id: Option<&str>) -> String {
    id.unwrap_or_default().to_owned()
}

impl Account {
    pub(crate) fn new(moto: &Moto) -> Self {
        let keys = Credentials::new("kprov", "secret", None, None, "test");
        let ec2 = aws_sdk_ec2::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(REGION))
            .endpoint_url(moto.direct())
            .credentials_provider(keys.clone())
            .build();
        let elb = aws_sdk_elasticloadbalancingv2::Config::builder()
            .behavior_version(aws_sdk_elasticloadbalancingv2::config::BehaviorVersion::latest())
            .region(aws_sdk_elasticloadbalancingv2::config::Region::new(REGION))
            .endpoint_url(moto.direct())
            .credentials_provider(keys)
            .build();
        Self {
            ec2: aws_sdk_ec2::Client::from_conf(ec2),
            elb: aws_sdk_elasticloadbalancingv2::Client::from_conf(elb),
        }
    }

    /// Every describe call there is for what the provider makes.
    pub(crate) async fn everything(&self) -> BTreeSet<Thing> {
        let ec2 = &self.ec2;
        let mut all: BTreeSet<Thing> = BTreeSet::new();
        let vpcs = ec2.describe_vpcs().send().await.unwrap();
        all.extend(vpcs.vpcs().iter().map(|v| ("vpc", text(v.vpc_id()))));
        let subnets = ec2.describe_subnets().send().await.unwrap();
        all.extend(subnets.subnets().iter().map(|s| ("subnet", text(s.subnet_id()))));
        let groups = ec2.describe_security_groups().send().await.unwrap();
        all.extend(groups.security_groups().iter().map(|g| ("group", text(g.group_id()))));
        let tables = ec2.describe_route_tables().send().await.unwrap();
        all.extend(
            tables
                .route_tables()
                .iter()
                .map(|t| ("table", text(t.route_table_id()))),
        );
        let gateways = ec2.describe_internet_gateways().send().await.unwrap();
        all.extend(
            gateways
                .internet_gateways()
                .iter()
                .map(|g| ("gateway", text(g.internet_gateway_id()))),
        );
        let nats = ec2.describe_nat_gateways().send().await.unwrap();
        all.extend(
            nats.nat_gateways()
                .iter()
                .filter(|n| n.state() != Some(&aws_sdk_ec2::types::NatGatewayState::Deleted))
                .map(|n| ("nat", text(n.nat_gateway_id()))),
        );
        let addresses = ec2.describe_addresses().send().await.unwrap();
        all.extend(
            addresses
                .addresses()
                .iter()
                .map(|a| ("address", text(a.allocation_id()))),
        );
        let interfaces = ec2.describe_network_interfaces().send().await.unwrap();
        all.extend(
            interfaces
                .network_interfaces()
                .iter()
                .map(|i| ("interface", text(i.network_interface_id()))),
        );
        let volumes: Vec<_> = ec2
            .describe_volumes()
            .max_results(500)
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .unwrap();
        all.extend(volumes.iter().map(|v| ("volume", text(v.volume_id()))));
        all.extend(
            self.instances()
                .await
                .into_iter()
                .map(|i| ("instance", text(i.instance_id()))),
        );
        let balancers = self.elb.describe_load_balancers().send().await.unwrap();
        for balancer in balancers.load_balancers() {
            let arn = text(balancer.load_balancer_arn());
            let listeners = self
                .elb
                .describe_listeners()
                .load_balancer_arn(&arn)
                .send()
                .await
                .unwrap();
            all.extend(
                listeners
                    .listeners()
                    .iter()
                    .map(|l| ("listener", text(l.listener_arn()))),
            );
            all.insert(("balancer", arn));
        }
        let groups = self.elb.describe_target_groups().send().await.unwrap();
        all.extend(
            groups
                .target_groups()
                .iter()
                .map(|g| ("target group", text(g.target_group_arn()))),
        );
        all
    }

    /// How many things of a kind there are.
    pub(crate) async fn count(&self, kind: &str) -> usize {
        self.everything().await.iter().filter(|(k, _)| *k == kind).count()
    }

    /// The instances that exist.
    pub(crate) async fn instances(&self) -> Vec<aws_sdk_ec2::types::Instance> {
        let reservations: Vec<_> = self
            .ec2
            .describe_instances()
            .max_results(500)
            .into_paginator()
            .items()
            .send()
            .collect::<Result<Vec<_>, _>>()
            .await
            .unwrap();
        reservations
            .into_iter()
            .flat_map(|r| r.instances.unwrap_or_default())
            .filter(|i| i.state().and_then(|s| s.name()) != Some(&InstanceStateName::Terminated))
            .collect()
    }

    /// The instance of a machine that was made by itself.
    pub(crate) async fn instance_of(&self, cluster: &ClusterName, machine: &MachineName) -> String {
        let filter = |name: &str, value: &str| Filter::builder().name(name).values(value).build();
        let reply = self
            .ec2
            .describe_instances()
            .filters(filter("tag:kprov.io/cluster", cluster.as_str()))
            .filters(filter("tag:kprov.io/machine", machine.as_str()))
            .filters(filter("instance-state-name", "running"))
            .send()
            .await
            .unwrap();
        let mut ids = reply.reservations().iter().flat_map(Reservation::instances);
        text(ids.next().expect("no such instance runs").instance_id())
    }

    pub(crate) async fn stop(&self, instance: &str) {
        self.ec2.stop_instances().instance_ids(instance).send().await.unwrap();
    }

    pub(crate) async fn terminate(&self, instance: &str) {
        self.ec2
            .terminate_instances()
            .instance_ids(instance)
            .send()
            .await
            .unwrap();
    }

    /// The value of a tag.
    pub(crate) fn tag<'a>(tags: &'a [Tag], key: &str) -> Option<&'a str> {
        tags.iter().find(|t| t.key() == Some(key)).and_then(Tag::value)
    }
}
