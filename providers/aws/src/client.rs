//! The few calls of the SDKs that are used, each a method: one call (or one listing, with all its pages), its result as our own
//! types, and its error with what the call was for. Nothing here decides anything, waits or tries again.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_ec2::types as ec2;
use aws_smithy_types::retry::RetryConfig;
use aws_smithy_types::timeout::TimeoutConfig;
use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::ClusterName;

use crate::config::Settings;
use crate::error::{CallError, failed};
use crate::model::{Address, Gateway, Group, Nat, Part, Rule, Subnet, Table, Vpc};
use crate::translate::{self, CLUSTER, NAME, PART};

pub(crate) mod balancer;
mod compute;
mod tagged;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long one call may take.
const CALL: Duration = Duration::from_mins(1);
/// The most that EC2's listings give in one page.
const PAGE: i32 = 1000;

type Called<T> = Result<T, CallError>;

/// Clients of EC2 and of its load balancers.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) ec2: aws_sdk_ec2::Client,
    elb: aws_sdk_elasticloadbalancingv2::Client,
    pub(crate) region: String,
}

/// Takes ids out of replies.
pub(crate) fn id(action: &'static str, id: Option<String>) -> Result<String, ProviderError> {
    id.ok_or_else(|| ProviderError::look_first(format!("the reply to `{action}` has no id in it")))
}

/// The cluster's tag, and others.
pub(crate) fn tags(kind: ec2::ResourceType, cluster: &ClusterName, more: &[(&str, &str)]) -> ec2::TagSpecification {
    let tag = |key: &str, value: &str| ec2::Tag::builder().key(key).value(value).build();
    ec2::TagSpecification::builder()
        .resource_type(kind)
        .set_tags(Some(
            std::iter::once(tag(CLUSTER, cluster.as_str()))
                .chain(more.iter().map(|(k, v)| tag(k, v)))
                .collect(),
        ))
        .build()
}

fn filter(name: impl Into<String>, value: impl Into<String>) -> ec2::Filter {
    ec2::Filter::builder().name(name).values(value).build()
}

fn of(cluster: &ClusterName) -> ec2::Filter {
    filter(format!("tag:{CLUSTER}"), cluster.as_str())
}

/// The name of a part of the network.
fn named(cluster: &ClusterName, what: &str) -> String {
    format!("{cluster}-{what}")
}

impl Client {
    /// Opens clients as every AWS tool does: environment, profiles, SSO, the instance's role. The SDK's own retries are off:
    /// one policy outside decides.
    pub(crate) async fn open(
        settings: &Settings,
        credentials: Option<SharedCredentialsProvider>,
    ) -> Result<Self, ProviderError> {
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT)
                    .operation_timeout(CALL)
                    .build(),
            );
        if let Some(region) = &settings.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(profile) = &settings.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(url) = &settings.endpoint_url {
            loader = loader.endpoint_url(url);
        }
        if let Some(credentials) = credentials {
            loader = loader.credentials_provider(credentials);
        }
        let config = loader.load().await;
        let Some(region) = config.region() else {
            return Err(ProviderError::never("no AWS region is named")
                .hint("name one with `--region`, AWS_REGION, the profile, or `spec.aws.region`"));
        };
        Ok(Self {
            region: region.to_string(),
            ec2: aws_sdk_ec2::Client::new(&config),
            elb: aws_sdk_elasticloadbalancingv2::Client::new(&config),
        })
    }

    /// The region's zones that need no opting in.
    pub(crate) async fn zones(&self) -> Called<Vec<String>> {
        let reply = self
            .ec2
            .describe_availability_zones()
            .send()
            .await
            .map_err(failed("DescribeAvailabilityZones", "list the region's zones"))?;
        let ordinary = |z: &&ec2::AvailabilityZone| {
            z.zone_type().is_none_or(|t| t == "availability-zone")
                && z.state().is_none_or(|s| *s == ec2::AvailabilityZoneState::Available)
        };
        let zones = reply.availability_zones().iter().filter(ordinary);
        let mut names: Vec<String> = zones.filter_map(|z| z.zone_name().map(ToOwned::to_owned)).collect();
        names.sort();
        Ok(names)
    }

    /// All VPCs of the region.
    pub(crate) async fn vpcs(&self, cluster: &ClusterName) -> Called<Vec<Vpc>> {
        let pages = self
            .ec2
            .describe_vpcs()
            .max_results(PAGE)
            .into_paginator()
            .items()
            .send();
        let vpcs: Vec<_> = pages
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeVpcs", "list VPCs"))?;
        Ok(vpcs.iter().filter_map(|v| translate::vpc(v, cluster)).collect())
    }

    pub(crate) async fn create_vpc(&self, cluster: &ClusterName, range: Ipv4Net) -> Result<String, ProviderError> {
        let reply = self
            .ec2
            .create_vpc()
            .cidr_block(range.to_string())
            .tag_specifications(tags(ec2::ResourceType::Vpc, cluster, &[(NAME, cluster.as_str())]))
            .send()
            .await
            .map_err(failed("CreateVpc", format!("make the VPC of `{cluster}`")))?;
        id("CreateVpc", reply.vpc.and_then(|v| v.vpc_id))
    }

    pub(crate) async fn delete_vpc(&self, vpc: &str) -> Called<()> {
        let what = failed("DeleteVpc", format!("remove the VPC `{vpc}`"));
        self.ec2.delete_vpc().vpc_id(vpc).send().await.map(drop).map_err(what)
    }

    /// Subnets of the cluster, or all of a VPC's ranges.
    pub(crate) async fn subnets(&self, cluster: &ClusterName) -> Called<Vec<Subnet>> {
        let pages = self.ec2.describe_subnets().filters(of(cluster)).max_results(PAGE);
        let subnets: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeSubnets", "list subnets"))?;
        Ok(subnets.iter().filter_map(translate::subnet).collect())
    }

    /// The ranges of all subnets of a VPC.
    pub(crate) async fn ranges_in(&self, vpc: &str) -> Called<Vec<Ipv4Net>> {
        let pages = self
            .ec2
            .describe_subnets()
            .filters(filter("vpc-id", vpc))
            .max_results(PAGE);
        let subnets: Vec<ec2::Subnet> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeSubnets", format!("list subnets of `{vpc}`")))?;
        Ok(subnets.iter().filter_map(|s| s.cidr_block()?.parse().ok()).collect())
    }

    pub(crate) async fn create_subnet(
        &self,
        cluster: &ClusterName,
        vpc: &str,
        (zone, range, part): (&str, Ipv4Net, Part),
    ) -> Result<String, ProviderError> {
        let name = named(cluster, &format!("{part}-{zone}"));
        let reply = self
            .ec2
            .create_subnet()
            .vpc_id(vpc)
            .availability_zone(zone)
            .cidr_block(range.to_string())
            .tag_specifications(tags(
                ec2::ResourceType::Subnet,
                cluster,
                &[(NAME, &name), (PART, part.as_str())],
            ))
            .send()
            .await
            .map_err(failed(
                "CreateSubnet",
                format!("make the subnet `{name}` with `{range}`"),
            ))?;
        id("CreateSubnet", reply.subnet.and_then(|s| s.subnet_id))
    }

    pub(crate) async fn delete_subnet(&self, subnet: &str) -> Called<()> {
        let what = failed("DeleteSubnet", format!("remove the subnet `{subnet}`"));
        self.ec2
            .delete_subnet()
            .subnet_id(subnet)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    pub(crate) async fn groups(&self, cluster: &ClusterName) -> Called<Vec<Group>> {
        let pages = self
            .ec2
            .describe_security_groups()
            .filters(of(cluster))
            .max_results(PAGE);
        let groups: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeSecurityGroups", "list security groups"))?;
        Ok(groups.iter().filter_map(translate::group).collect())
    }

    pub(crate) async fn create_group(
        &self,
        cluster: &ClusterName,
        vpc: &str,
        part: Part,
        more: &[(&str, &str)],
    ) -> Result<String, ProviderError> {
        let name = named(cluster, part.as_str());
        let mut all = vec![(NAME, name.as_str()), (PART, part.as_str())];
        all.extend_from_slice(more);
        let reply = self
            .ec2
            .create_security_group()
            .group_name(format!("kprov-{name}"))
            .description(format!("kprov: {part} of cluster {cluster}"))
            .vpc_id(vpc)
            .tag_specifications(tags(ec2::ResourceType::SecurityGroup, cluster, &all))
            .send()
            .await
            .map_err(failed(
                "CreateSecurityGroup",
                format!("make the security group `{name}`"),
            ))?;
        id("CreateSecurityGroup", reply.group_id)
    }

    pub(crate) async fn allow(&self, group: &str, rules: &BTreeSet<Rule>) -> Called<()> {
        let what = failed(
            "AuthorizeSecurityGroupIngress",
            format!("add rules to the security group `{group}`"),
        );
        let call = self.ec2.authorize_security_group_ingress().group_id(group);
        let call = call.set_ip_permissions(Some(rules.iter().map(translate::permission).collect()));
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn revoke(&self, group: &str, rules: &BTreeSet<Rule>) -> Called<()> {
        let what = failed(
            "RevokeSecurityGroupIngress",
            format!("take rules from the security group `{group}`"),
        );
        let call = self.ec2.revoke_security_group_ingress().group_id(group);
        let call = call.set_ip_permissions(Some(rules.iter().map(translate::permission).collect()));
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn delete_group(&self, group: &str) -> Called<()> {
        let what = failed("DeleteSecurityGroup", format!("remove the security group `{group}`"));
        self.ec2
            .delete_security_group()
            .group_id(group)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    pub(crate) async fn tables(&self, cluster: &ClusterName) -> Called<Vec<Table>> {
        let pages = self.ec2.describe_route_tables().filters(of(cluster)).max_results(100);
        let tables: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeRouteTables", "list route tables"))?;
        Ok(tables.iter().filter_map(translate::table).collect())
    }

    pub(crate) async fn create_table(
        &self,
        cluster: &ClusterName,
        vpc: &str,
        part: Part,
        token: String,
    ) -> Result<String, ProviderError> {
        let name = named(cluster, part.as_str());
        let reply = self
            .ec2
            .create_route_table()
            .vpc_id(vpc)
            .client_token(token)
            .tag_specifications(tags(
                ec2::ResourceType::RouteTable,
                cluster,
                &[(NAME, &name), (PART, part.as_str())],
            ))
            .send()
            .await
            .map_err(failed("CreateRouteTable", format!("make the route table `{name}`")))?;
        id("CreateRouteTable", reply.route_table.and_then(|t| t.route_table_id))
    }

    /// Sends everything that has no other route through a gateway.
    pub(crate) async fn create_default_route(&self, table: &str, gateway: &str) -> Called<()> {
        let what = failed("CreateRoute", format!("add a route to the table `{table}`"));
        let call = self
            .ec2
            .create_route()
            .route_table_id(table)
            .destination_cidr_block(translate::EVERYWHERE);
        let call = if gateway.starts_with("nat-") {
            call.nat_gateway_id(gateway)
        } else {
            call.gateway_id(gateway)
        };
        call.send().await.map(drop).map_err(what)
    }

    /// Puts another gateway, or none, in place of one.
    pub(crate) async fn replace_default_route(&self, table: &str, gateway: &str) -> Called<()> {
        let what = failed("ReplaceRoute", format!("change a route of the table `{table}`"));
        let call = self
            .ec2
            .replace_route()
            .route_table_id(table)
            .destination_cidr_block(translate::EVERYWHERE);
        let call = if gateway.starts_with("nat-") {
            call.nat_gateway_id(gateway)
        } else {
            call.gateway_id(gateway)
        };
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn associate(&self, table: &str, subnet: &str) -> Called<()> {
        let what = failed("AssociateRouteTable", format!("give the subnet `{subnet}` its routes"));
        let call = self.ec2.associate_route_table().route_table_id(table).subnet_id(subnet);
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn delete_table(&self, table: &str) -> Called<()> {
        let what = failed("DeleteRouteTable", format!("remove the route table `{table}`"));
        self.ec2
            .delete_route_table()
            .route_table_id(table)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    /// Internet gateways that carry the cluster's tag.
    pub(crate) async fn gateways(&self, cluster: &ClusterName) -> Called<Vec<Gateway>> {
        self.gateways_by(of(cluster)).await
    }

    /// The internet gateways of a VPC.
    pub(crate) async fn gateways_of(&self, vpc: &str) -> Called<Vec<Gateway>> {
        self.gateways_by(filter("attachment.vpc-id", vpc)).await
    }

    async fn gateways_by(&self, filter: ec2::Filter) -> Called<Vec<Gateway>> {
        let pages = self.ec2.describe_internet_gateways().filters(filter).max_results(PAGE);
        let gateways: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeInternetGateways", "list internet gateways"))?;
        Ok(gateways.iter().filter_map(translate::gateway).collect())
    }

    pub(crate) async fn create_gateway(&self, cluster: &ClusterName) -> Result<String, ProviderError> {
        let reply = self
            .ec2
            .create_internet_gateway()
            .tag_specifications(tags(
                ec2::ResourceType::InternetGateway,
                cluster,
                &[(NAME, cluster.as_str())],
            ))
            .send()
            .await
            .map_err(failed(
                "CreateInternetGateway",
                format!("make the internet gateway of `{cluster}`"),
            ))?;
        let gateway = reply.internet_gateway.and_then(|g| g.internet_gateway_id);
        id("CreateInternetGateway", gateway)
    }

    pub(crate) async fn attach_gateway(&self, gateway: &str, vpc: &str) -> Called<()> {
        let what = failed(
            "AttachInternetGateway",
            format!("attach the gateway `{gateway}` to `{vpc}`"),
        );
        let call = self
            .ec2
            .attach_internet_gateway()
            .internet_gateway_id(gateway)
            .vpc_id(vpc);
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn detach_gateway(&self, gateway: &str, vpc: &str) -> Called<()> {
        let what = failed(
            "DetachInternetGateway",
            format!("detach the gateway `{gateway}` from `{vpc}`"),
        );
        let call = self
            .ec2
            .detach_internet_gateway()
            .internet_gateway_id(gateway)
            .vpc_id(vpc);
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn delete_gateway(&self, gateway: &str) -> Called<()> {
        let what = failed("DeleteInternetGateway", format!("remove the gateway `{gateway}`"));
        let call = self.ec2.delete_internet_gateway().internet_gateway_id(gateway);
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn nats(&self, cluster: &ClusterName) -> Called<Vec<Nat>> {
        let pages = self.ec2.describe_nat_gateways().filter(of(cluster)).max_results(PAGE);
        let nats: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeNatGateways", "list NAT gateways"))?;
        Ok(nats.iter().filter_map(translate::nat).collect())
    }

    pub(crate) async fn create_nat(
        &self,
        cluster: &ClusterName,
        subnet: &str,
        address: &str,
        token: String,
    ) -> Result<String, ProviderError> {
        let reply = self
            .ec2
            .create_nat_gateway()
            .subnet_id(subnet)
            .allocation_id(address)
            .client_token(token)
            .tag_specifications(tags(
                ec2::ResourceType::Natgateway,
                cluster,
                &[(NAME, cluster.as_str())],
            ))
            .send()
            .await
            .map_err(failed(
                "CreateNatGateway",
                format!("make the NAT gateway of `{cluster}`"),
            ))?;
        id("CreateNatGateway", reply.nat_gateway.and_then(|n| n.nat_gateway_id))
    }

    pub(crate) async fn delete_nat(&self, nat: &str) -> Called<()> {
        let what = failed("DeleteNatGateway", format!("remove the NAT gateway `{nat}`"));
        self.ec2
            .delete_nat_gateway()
            .nat_gateway_id(nat)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    pub(crate) async fn addresses(&self, cluster: &ClusterName) -> Called<Vec<Address>> {
        let call = self.ec2.describe_addresses().filters(of(cluster));
        let reply = call
            .send()
            .await
            .map_err(failed("DescribeAddresses", "list public addresses"))?;
        Ok(reply.addresses().iter().filter_map(translate::address).collect())
    }

    pub(crate) async fn allocate_address(&self, cluster: &ClusterName) -> Result<String, ProviderError> {
        let reply = self
            .ec2
            .allocate_address()
            .domain(ec2::DomainType::Vpc)
            .tag_specifications(tags(ec2::ResourceType::ElasticIp, cluster, &[(NAME, cluster.as_str())]))
            .send()
            .await
            .map_err(failed(
                "AllocateAddress",
                format!("get a public address for `{cluster}`"),
            ))?;
        id("AllocateAddress", reply.allocation_id)
    }

    pub(crate) async fn release_address(&self, address: &str) -> Called<()> {
        let what = failed("ReleaseAddress", format!("give back the public address `{address}`"));
        self.ec2
            .release_address()
            .allocation_id(address)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    pub(crate) async fn tag(&self, resources: &[String], key: &str, value: &str) -> Called<()> {
        let what = failed("CreateTags", format!("tag {}", list(resources)));
        let tag = ec2::Tag::builder().key(key).value(value).build();
        let call = self.ec2.create_tags().set_resources(Some(resources.to_vec()));
        call.tags(tag).send().await.map(drop).map_err(what)
    }

    /// Network interfaces in a VPC that AWS did not make for something of ours: their ids and what they say of themselves.
    pub(crate) async fn interfaces(&self, vpc: &str) -> Called<Vec<(String, String, Option<String>)>> {
        let pages = self
            .ec2
            .describe_network_interfaces()
            .filters(filter("vpc-id", vpc))
            .max_results(PAGE);
        let interfaces: Vec<ec2::NetworkInterface> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeNetworkInterfaces", format!("list what is in `{vpc}`")))?;
        let seen = |i: &ec2::NetworkInterface| {
            let instance = i.attachment().and_then(|a| a.instance_id().map(ToOwned::to_owned));
            let words = i.description().unwrap_or_default().to_owned();
            Some((i.network_interface_id()?.to_owned(), words, instance))
        };
        Ok(interfaces
            .iter()
            .filter(|i| i.requester_managed() != Some(true))
            .filter_map(seen)
            .collect())
    }

    /// The targets of the API's load balancer: added and taken out.
    pub(crate) async fn set_targets(&self, group: &str, add: &[IpAddr], remove: &[IpAddr]) -> Called<()> {
        balancer::set_targets(&self.elb, group, add, remove).await
    }
}

/// Ids for an error: the first few.
fn list(ids: &[String]) -> String {
    let shown: Vec<String> = ids.iter().take(3).map(|i| format!("`{i}`")).collect();
    match ids.len().saturating_sub(3) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
