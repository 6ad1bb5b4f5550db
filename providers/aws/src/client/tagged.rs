//! What carries kprov's tag.

use std::collections::BTreeSet;

use aws_sdk_ec2::types as ec2;
use kprov_types::ClusterName;

use super::{Called, Client, PAGE, filter};
use crate::error::failed;
use crate::translate::CLUSTER;

impl Client {
    /// The clusters that have something here. The first that each has and the last that goes is its VPC, and in a given one the group
    /// of its machines; tags alone outlive what they were on.
    pub(crate) async fn clusters(&self) -> Called<BTreeSet<String>> {
        let having = || filter("tag-key", CLUSTER);
        let vpcs = self.ec2.describe_vpcs().filters(having()).max_results(PAGE);
        let vpcs = vpcs.into_paginator().items().send().collect::<Result<Vec<_>, _>>();
        let groups = self.ec2.describe_security_groups().filters(having()).max_results(PAGE);
        let groups = groups.into_paginator().items().send().collect::<Result<Vec<_>, _>>();
        let vpcs = vpcs.await.map_err(failed("DescribeVpcs", "list VPCs"))?;
        let groups = groups
            .await
            .map_err(failed("DescribeSecurityGroups", "list security groups"))?;
        let tags = vpcs.iter().flat_map(ec2::Vpc::tags);
        Ok(tags
            .chain(groups.iter().flat_map(ec2::SecurityGroup::tags))
            .filter(|tag| tag.key() == Some(CLUSTER))
            .filter_map(|tag| tag.value().map(str::to_owned))
            .collect())
    }

    /// Everything of EC2 that carries the cluster's tag, also what is gone for a while: what kind, and which.
    pub(crate) async fn tagged(&self, cluster: &ClusterName) -> Called<Vec<(String, String)>> {
        let call = self
            .ec2
            .describe_tags()
            .filters(filter("key", CLUSTER))
            .filters(filter("value", cluster.as_str()))
            .max_results(PAGE);
        let tags: Vec<ec2::TagDescription> = call
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeTags", "list what carries the tag"))?;
        Ok(tags
            .iter()
            .map(|tag| {
                let kind = tag.resource_type().map(|kind| kind.as_str().to_owned());
                (
                    kind.unwrap_or_default(),
                    tag.resource_id().unwrap_or_default().to_owned(),
                )
            })
            .collect())
    }
}
