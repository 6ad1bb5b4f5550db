//! What moto has, as a test or a machine room looks at it: past the proxy, so that nothing of this is counted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_TYPE};

use super::proxy::{Reply, post};
use super::xml::Element;

/// A look at one region of moto. Clones look at the same.
#[derive(Clone, Debug)]
pub struct Table {
    port: u16,
    region: String,
}

/// An instance that is not terminated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its id.
    pub id: String,
    /// The VPC it's in.
    pub vpc: String,
    /// `pending`, `running`, `stopped`, ...
    pub state: String,
    /// Its private address.
    pub address: Ipv4Addr,
    /// The device name of its root volume.
    pub root_device: String,
    /// Its number among those that were made by the same call.
    pub launch_index: u32,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its id.
    pub id: String,
    /// Its size in GiB.
    pub size_gib: u64,
    /// The instance it's attached to, and the device name there.
    pub attached: Option<(String, String)>,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
}

/// A load balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancer {
    /// Its ARN.
    pub arn: String,
    /// Its name.
    pub name: String,
    /// The VPC it's in.
    pub vpc: String,
    /// Its listeners, each with the target group it forwards to.
    pub listeners: Vec<(u16, TargetGroup)>,
}

/// A target group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetGroup {
    /// Each target's id (an instance's, or an address) and port.
    pub targets: Vec<(String, u16)>,
    /// `TCP`, `HTTP` or `HTTPS`.
    pub check: String,
    /// The port that is checked, where it's another than the target's.
    pub port: Option<u16>,
    /// The path, for HTTP and HTTPS.
    pub path: String,
    /// Seconds between checks.
    pub interval: u64,
    /// Seconds that an answer may take.
    pub timeout: u64,
    /// Answers in a row that make a target healthy.
    pub healthy: u32,
    /// Failures in a row that make it unhealthy.
    pub unhealthy: u32,
}

/// What an account can have, each with its id's element.
const EC2: &[(&str, &str, &str)] = &[
    ("DescribeVpcs", "vpcSet", "vpcId"),
    ("DescribeSubnets", "subnetSet", "subnetId"),
    ("DescribeSecurityGroups", "securityGroupInfo", "groupId"),
    ("DescribeRouteTables", "routeTableSet", "routeTableId"),
    ("DescribeInternetGateways", "internetGatewaySet", "internetGatewayId"),
    ("DescribeNatGateways", "natGatewaySet", "natGatewayId"),
    ("DescribeAddresses", "addressesSet", "allocationId"),
    ("DescribeNetworkInterfaces", "networkInterfaceSet", "networkInterfaceId"),
    ("DescribeVolumes", "volumeSet", "volumeId"),
    ("DescribeLaunchTemplates", "launchTemplates", "launchTemplateId"),
    ("DescribeKeyPairs", "keySet", "keyPairId"),
    ("DescribeVpcEndpoints", "vpcEndpointSet", "vpcEndpointId"),
];
/// States of what is listed for a while after it's gone.
const GONE: &[&str] = &["deleted", "terminated"];

impl Table {
    pub(super) fn new(port: u16, region: &str) -> Self {
        Self {
            port,
            region: region.to_owned(),
        }
    }

    /// Everything that an account can have, by kind: ids. Terminated instances and deleted gateways are not there any more.
    pub async fn everything(&self) -> Result<BTreeMap<String, BTreeSet<String>>> {
        let mut all = BTreeMap::new();
        for (action, set, id) in EC2 {
            let items = self.items("ec2", action, set, &[]).await?;
            let alive = items
                .iter()
                .filter(|i| !i.child_text("state").is_some_and(|s| GONE.contains(&s)));
            let ids = alive.filter_map(|i| Some(i.child_text(id)?.to_owned())).collect();
            all.insert((*action).to_owned(), ids);
        }
        let instances = self.instances().await?.into_iter().map(|i| i.id).collect();
        all.insert("DescribeInstances".to_owned(), instances);
        for (action, arn) in [
            ("DescribeLoadBalancers", "LoadBalancerArn"),
            ("DescribeTargetGroups", "TargetGroupArn"),
        ] {
            let set = action.trim_start_matches("Describe");
            let items = self.items("elasticloadbalancing", action, set, &[]).await?;
            let ids = items
                .iter()
                .filter_map(|i| Some(i.child_text(arn)?.to_owned()))
                .collect();
            all.insert(action.to_owned(), ids);
        }
        Ok(all)
    }

    /// All instances that are not terminated.
    pub async fn instances(&self) -> Result<Vec<Instance>> {
        let reservations = self.items("ec2", "DescribeInstances", "reservationSet", &[]).await?;
        let items = reservations
            .iter()
            .filter_map(|r| r.child("instancesSet"))
            .flat_map(|s| &s.children);
        let mut instances = Vec::new();
        for item in items {
            let text = |name: &str| item.child_text(name).unwrap_or_default().to_owned();
            let state = item
                .child("instanceState")
                .and_then(|s| s.child_text("name"))
                .unwrap_or_default();
            if GONE.contains(&state) {
                continue;
            }
            instances.push(Instance {
                id: text("instanceId"),
                vpc: text("vpcId"),
                state: state.to_owned(),
                address: text("privateIpAddress")
                    .parse()
                    .context("an instance without an address")?,
                root_device: text("rootDeviceName"),
                launch_index: text("amiLaunchIndex").parse().unwrap_or(0),
                tags: tags(item),
            });
        }
        Ok(instances)
    }

    /// An instance's user data, decoded.
    pub async fn user_data(&self, instance: &str) -> Result<Vec<u8>> {
        let fields = [("InstanceId", instance), ("Attribute", "userData")];
        let reply = self.ask("ec2", "DescribeInstanceAttribute", &fields).await?;
        let data = reply
            .child("userData")
            .and_then(|d| d.child_text("value"))
            .unwrap_or_default();
        // Lines of base64 may be wrapped.
        let data: String = data.split_whitespace().collect();
        STANDARD.decode(data).context("user data is not base64")
    }

    /// All volumes.
    pub async fn volumes(&self) -> Result<Vec<Volume>> {
        let items = self.items("ec2", "DescribeVolumes", "volumeSet", &[]).await?;
        let volume = |item: &Element| {
            let attachment = item.child("attachmentSet").and_then(|a| a.children.first());
            let attached = attachment.and_then(|a| {
                Some((
                    a.child_text("instanceId")?.to_owned(),
                    a.child_text("device")?.to_owned(),
                ))
            });
            Some(Volume {
                id: item.child_text("volumeId")?.to_owned(),
                size_gib: item.child_text("size")?.parse().ok()?,
                attached,
                tags: tags(item),
            })
        };
        Ok(items.iter().filter_map(volume).collect())
    }

    /// All load balancers with what they lead to.
    pub async fn load_balancers(&self) -> Result<Vec<LoadBalancer>> {
        const SERVICE: &str = "elasticloadbalancing";
        let mut balancers = Vec::new();
        for item in self
            .items(SERVICE, "DescribeLoadBalancers", "LoadBalancers", &[])
            .await?
        {
            let text = |name: &str| item.child_text(name).unwrap_or_default().to_owned();
            let arn = text("LoadBalancerArn");
            let mut listeners = Vec::new();
            let fields = [("LoadBalancerArn", arn.as_str())];
            for listener in self.items(SERVICE, "DescribeListeners", "Listeners", &fields).await? {
                let port = listener.child_text("Port").and_then(|p| p.parse().ok());
                let group = listener.all("TargetGroupArn").first().map(|e| e.text.clone());
                if let (Some(port), Some(group)) = (port, group) {
                    listeners.push((port, self.target_group(&group).await?));
                }
            }
            balancers.push(LoadBalancer {
                name: text("LoadBalancerName"),
                vpc: text("VpcId"),
                arn,
                listeners,
            });
        }
        Ok(balancers)
    }

    async fn target_group(&self, arn: &str) -> Result<TargetGroup> {
        const SERVICE: &str = "elasticloadbalancing";
        let groups = self
            .items(
                SERVICE,
                "DescribeTargetGroups",
                "TargetGroups",
                &[("TargetGroupArns.member.1", arn)],
            )
            .await?;
        let group = groups.first().with_context(|| format!("no target group `{arn}`"))?;
        let number = |name: &str, default: u32| group.child_text(name).and_then(|t| t.parse().ok()).unwrap_or(default);
        let health = self
            .items(
                SERVICE,
                "DescribeTargetHealth",
                "TargetHealthDescriptions",
                &[("TargetGroupArn", arn)],
            )
            .await?;
        let target = |item: &Element| {
            let target = item.child("Target")?;
            Some((
                target.child_text("Id")?.to_owned(),
                target.child_text("Port")?.parse().ok()?,
            ))
        };
        Ok(TargetGroup {
            targets: health.iter().filter_map(target).collect(),
            check: group.child_text("HealthCheckProtocol").unwrap_or("TCP").to_owned(),
            port: group.child_text("HealthCheckPort").and_then(|p| p.parse().ok()),
            path: group
                .child_text("HealthCheckPath")
                .filter(|p| !p.is_empty())
                .unwrap_or("/")
                .to_owned(),
            interval: number("HealthCheckIntervalSeconds", 30).into(),
            timeout: number("HealthCheckTimeoutSeconds", 10).into(),
            healthy: number("HealthyThresholdCount", 5),
            unhealthy: number("UnhealthyThresholdCount", 2),
        })
    }

    /// Carries out one call, whatever it is: what a person does by hand in the console.
    pub async fn by_hand(&self, action: &str, fields: &[(&str, &str)]) -> Result<()> {
        self.ask("ec2", action, fields).await.map(drop)
    }

    /// The members of a set that a call answers with, all pages of them.
    async fn items(&self, service: &str, action: &str, set: &str, fields: &[(&str, &str)]) -> Result<Vec<Element>> {
        let marker = if service == "ec2" { "NextToken" } else { "Marker" };
        let mut items = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let mut all = fields.to_vec();
            all.extend(next.as_deref().map(|n| (marker, n)));
            let mut reply = self.ask(service, action, &all).await?;
            next = ["nextToken", "NextMarker"]
                .iter()
                .find_map(|n| reply.texts(n).pop())
                .filter(|n| !n.is_empty());
            let found = if reply.child(set).is_some() {
                reply.children.iter_mut().find(|c| c.name() == set)
            } else {
                // The load balancers' API wraps its results once more.
                reply
                    .children
                    .iter_mut()
                    .flat_map(|c| &mut c.children)
                    .find(|c| c.name() == set)
            };
            items.append(
                &mut found
                    .with_context(|| format!("{action}: no {set} in the reply"))?
                    .children,
            );
            if next.is_none() {
                return Ok(items);
            }
        }
    }

    async fn ask(&self, service: &str, action: &str, fields: &[(&str, &str)]) -> Result<Element> {
        let version = if service == "ec2" { "2016-11-15" } else { "2015-12-01" };
        let mut form = vec![
            ("Action".to_owned(), action.to_owned()),
            ("Version".to_owned(), version.to_owned()),
        ];
        form.extend(fields.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())));
        // moto reads the service and the region from here, and checks nothing.
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential=look/20260101/{}/{service}/aws4_request, SignedHeaders=host, Signature=0",
            self.region
        );
        let headers = HeaderMap::from_iter([
            (AUTHORIZATION, authorization.parse()?),
            (CONTENT_TYPE, "application/x-www-form-urlencoded".parse()?),
        ]);
        let Reply { status, body } = post(self.port, &headers, &form).await?;
        ensure!(status.is_success(), "{action}: {status}: {body}");
        Element::parse(&body).with_context(|| format!("{action}: the reply is no XML"))
    }
}

fn tags(item: &Element) -> BTreeMap<String, String> {
    let set = item.child("tagSet").into_iter().flat_map(|s| &s.children);
    set.filter_map(|t| Some((t.child_text("key")?.to_owned(), t.child_text("value")?.to_owned())))
        .collect()
}
