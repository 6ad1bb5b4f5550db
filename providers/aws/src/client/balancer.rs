//! Calls of Elastic Load Balancing.

use std::net::IpAddr;

use aws_sdk_elasticloadbalancingv2::Client as Elb;
use aws_sdk_elasticloadbalancingv2::types as elb;
use kprov_provider::ProviderError;
use kprov_types::ClusterName;

use super::{Called, Client, id};
use crate::error::failed;
use crate::model::{Balancer, TargetGroup};
use crate::translate::{self, CLUSTER, NAME};

/// Seconds between two health checks of a target.
const CHECK_EVERY: i32 = 10;
/// The path that tells whether an API server is ready.
const READY: &str = "/readyz";

fn tags(cluster: &ClusterName) -> Vec<elb::Tag> {
    let tag = |key: &str| elb::Tag::builder().key(key).value(cluster.as_str()).build();
    vec![tag(CLUSTER), tag(NAME)]
}

pub(super) async fn set_targets(client: &Elb, group: &str, add: &[IpAddr], remove: &[IpAddr]) -> Called<()> {
    let targets = |addresses: &[IpAddr]| {
        let target = |a: &IpAddr| elb::TargetDescription::builder().id(a.to_string()).build();
        Some(addresses.iter().map(target).collect())
    };
    if !add.is_empty() {
        let what = failed("RegisterTargets", "add machines to the API's load balancer");
        let call = client.register_targets().target_group_arn(group);
        call.set_targets(targets(add)).send().await.map_err(what)?;
    }
    if !remove.is_empty() {
        let what = failed("DeregisterTargets", "take machines from the API's load balancer");
        let call = client.deregister_targets().target_group_arn(group);
        call.set_targets(targets(remove)).send().await.map_err(what)?;
    }
    Ok(())
}

impl Client {
    /// The load balancer of this name, with its listener and whether it is the cluster's.
    pub(crate) async fn balancer(&self, cluster: &ClusterName) -> Called<Option<Balancer>> {
        let name = translate::balancer_name(cluster);
        let reply = self.elb.describe_load_balancers().names(&name).send().await;
        let reply = match reply.map_err(failed("DescribeLoadBalancers", "list load balancers")) {
            Ok(reply) => reply,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(mut found) = reply.load_balancers().iter().find_map(translate::balancer) else {
            return Ok(None);
        };
        let (ours, listener) = futures::try_join!(self.is_ours(&found.arn, cluster), self.listener(&found.arn))?;
        found.ours = ours;
        found.listener = listener;
        Ok(Some(found))
    }

    /// The port that a load balancer forwards.
    async fn listener(&self, balancer: &str) -> Called<Option<u16>> {
        let pages = self
            .elb
            .describe_listeners()
            .load_balancer_arn(balancer)
            .into_paginator();
        let listeners: Result<Vec<elb::Listener>, _> = pages.items().send().collect().await;
        match listeners.map_err(failed("DescribeListeners", "list listeners")) {
            Ok(listeners) => Ok(listeners
                .iter()
                .find(|l| !l.default_actions().is_empty())
                .and_then(|l| u16::try_from(l.port()?).ok())),
            // Gone in between.
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn is_ours(&self, arn: &str, cluster: &ClusterName) -> Called<bool> {
        let call = self.elb.describe_tags().resource_arns(arn);
        let reply = match call
            .send()
            .await
            .map_err(failed("DescribeTags", format!("read the tags of `{arn}`")))
        {
            Ok(reply) => reply,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut tags = reply.tag_descriptions().iter().flat_map(elb::TagDescription::tags);
        Ok(tags.any(|t| t.key() == Some(CLUSTER) && t.value() == Some(cluster.as_str())))
    }

    /// The target group of this name, with its targets and whether it is the cluster's.
    pub(crate) async fn target_group(&self, cluster: &ClusterName) -> Called<Option<TargetGroup>> {
        let name = translate::balancer_name(cluster);
        let reply = self.elb.describe_target_groups().names(&name).send().await;
        let reply = match reply.map_err(failed("DescribeTargetGroups", "list target groups")) {
            Ok(reply) => reply,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(mut found) = reply.target_groups().iter().find_map(translate::target_group) else {
            return Ok(None);
        };
        let health = async {
            let call = self.elb.describe_target_health().target_group_arn(&found.arn);
            match call
                .send()
                .await
                .map_err(failed("DescribeTargetHealth", "list targets"))
            {
                Ok(reply) => Ok(reply.target_health_descriptions.unwrap_or_default()),
                Err(error) if error.is_not_found() => Ok(Vec::new()),
                Err(error) => Err(error),
            }
        };
        let (ours, health) = futures::try_join!(self.is_ours(&found.arn, cluster), health)?;
        let draining = |h: &&elb::TargetHealthDescription| {
            let state = h.target_health().and_then(elb::TargetHealth::state);
            state == Some(&elb::TargetHealthStateEnum::Draining)
        };
        found.ours = ours;
        found.targets = health
            .iter()
            .filter(|h| !draining(h))
            .filter_map(|h| h.target()?.id()?.parse().ok())
            .collect();
        Ok(Some(found))
    }

    /// Makes a network load balancer. Where one of this name and shape exists, AWS answers with that one.
    pub(crate) async fn create_balancer(
        &self,
        cluster: &ClusterName,
        internal: bool,
        subnets: Vec<String>,
        group: &str,
    ) -> Result<Balancer, ProviderError> {
        let scheme = if internal {
            elb::LoadBalancerSchemeEnum::Internal
        } else {
            elb::LoadBalancerSchemeEnum::InternetFacing
        };
        let reply = self
            .elb
            .create_load_balancer()
            .name(translate::balancer_name(cluster))
            .r#type(elb::LoadBalancerTypeEnum::Network)
            .scheme(scheme)
            .set_subnets(Some(subnets))
            .security_groups(group)
            .set_tags(Some(tags(cluster)))
            .send()
            .await
            .map_err(failed(
                "CreateLoadBalancer",
                format!("make the load balancer of `{cluster}`"),
            ))?;
        let made = reply.load_balancers().first().and_then(translate::balancer);
        made.ok_or_else(|| ProviderError::look_first("the reply to `CreateLoadBalancer` has no load balancer in it"))
    }

    /// Lets each of its addresses reach the targets of all zones: some zones may have none.
    pub(crate) async fn balance_across_zones(&self, balancer: &str) -> Called<()> {
        let what = failed("ModifyLoadBalancerAttributes", "balance across zones");
        let attribute = elb::LoadBalancerAttribute::builder()
            .key("load_balancing.cross_zone.enabled")
            .value("true")
            .build();
        let call = self.elb.modify_load_balancer_attributes().load_balancer_arn(balancer);
        call.attributes(attribute).send().await.map(drop).map_err(what)
    }

    /// Makes a group of targets by address. Unlike instances, these can be reached through the load balancer from among
    /// themselves ("Client IP preservation" in the guide for network load balancers).
    pub(crate) async fn create_target_group(
        &self,
        cluster: &ClusterName,
        vpc: &str,
        port: u16,
    ) -> Result<String, ProviderError> {
        let reply = self
            .elb
            .create_target_group()
            .name(translate::balancer_name(cluster))
            .protocol(elb::ProtocolEnum::Tcp)
            .port(i32::from(port))
            .vpc_id(vpc)
            .target_type(elb::TargetTypeEnum::Ip)
            .health_check_protocol(elb::ProtocolEnum::Https)
            .health_check_path(READY)
            .health_check_interval_seconds(CHECK_EVERY)
            .healthy_threshold_count(2)
            .unhealthy_threshold_count(2)
            .set_tags(Some(tags(cluster)))
            .send()
            .await
            .map_err(failed(
                "CreateTargetGroup",
                format!("make the target group of `{cluster}`"),
            ))?;
        let group = reply.target_groups.unwrap_or_default().pop();
        id("CreateTargetGroup", group.and_then(|g| g.target_group_arn))
    }

    pub(crate) async fn create_listener(&self, balancer: &str, group: &str, port: u16) -> Called<()> {
        let forward = elb::Action::builder()
            .r#type(elb::ActionTypeEnum::Forward)
            .target_group_arn(group)
            .build();
        let call = self
            .elb
            .create_listener()
            .load_balancer_arn(balancer)
            .protocol(elb::ProtocolEnum::Tcp)
            .port(i32::from(port))
            .default_actions(forward);
        let what = failed("CreateListener", format!("let the load balancer listen on {port}"));
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn delete_balancer(&self, balancer: &str) -> Called<()> {
        let what = failed("DeleteLoadBalancer", format!("remove the load balancer `{balancer}`"));
        self.elb
            .delete_load_balancer()
            .load_balancer_arn(balancer)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    pub(crate) async fn delete_target_group(&self, group: &str) -> Called<()> {
        let what = failed("DeleteTargetGroup", format!("remove the target group `{group}`"));
        self.elb
            .delete_target_group()
            .target_group_arn(group)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }
}
