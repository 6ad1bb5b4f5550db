//! What the real API does and moto does not. Each rule names the answer that AWS documents for it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use base64::Engine as _;

use super::faults::Faults;
use super::proxy::{Call, Proxy, Reply};
use super::xml::Element;

/// The most that user data may have, before it is encoded.
const USER_DATA: usize = 16 * 1024;

/// Calls that were made with a client token, by action and token.
pub(super) type Tokens = BTreeMap<(String, String), Used>;

/// What a token was used for.
pub(super) struct Used {
    form: Vec<(String, String)>,
    body: String,
    instances: Vec<String>,
}

/// What listing shows which things: the listing, and the element with a thing's id in it.
const LISTINGS: &[(&str, &str)] = &[
    ("DescribeVpcs", "vpcId"),
    ("DescribeSubnets", "subnetId"),
    ("DescribeSecurityGroups", "groupId"),
    ("DescribeInternetGateways", "internetGatewayId"),
    ("DescribeRouteTables", "routeTableId"),
    ("DescribeNatGateways", "natGatewayId"),
    ("DescribeAddresses", "allocationId"),
    ("DescribeVolumes", "volumeId"),
    ("DescribeInstances", "instanceId"),
    ("DescribeLoadBalancers", "LoadBalancerArn"),
    ("DescribeTargetGroups", "TargetGroupArn"),
    ("DescribeListeners", "ListenerArn"),
];

/// What calls make, and the element of their reply that has its id.
const MADE: &[(&str, &str)] = &[
    ("CreateVpc", "vpcId"),
    ("CreateSubnet", "subnetId"),
    ("CreateSecurityGroup", "groupId"),
    ("CreateInternetGateway", "internetGatewayId"),
    ("CreateRouteTable", "routeTableId"),
    ("CreateNatGateway", "natGatewayId"),
    ("AllocateAddress", "allocationId"),
    ("CreateVolume", "volumeId"),
    ("RunInstances", "instanceId"),
    ("CreateLoadBalancer", "LoadBalancerArn"),
    ("CreateTargetGroup", "TargetGroupArn"),
    ("CreateListener", "ListenerArn"),
];

/// Carries a call out as AWS would.
pub(super) async fn carry_out(proxy: &Proxy, call: Call) -> Result<Reply> {
    // What stands against a change is looked up first, and must not come about in between.
    let _turn = if call.reads() {
        None
    } else {
        Some(proxy.changes.lock().await)
    };
    if let Some(refused) = refuse(proxy, &call).await? {
        return Ok(refused);
    }
    let token = call
        .field("ClientToken")
        .filter(|t| !t.is_empty())
        .map(ToOwned::to_owned);
    let idempotent = matches!(
        call.action.as_str(),
        "RunInstances" | "CreateVolume" | "CreateNatGateway" | "CreateRouteTable"
    );
    let mut reply = match token.filter(|_| idempotent) {
        Some(token) => once(proxy, &call, token).await?,
        None => proxy.forward(&call).await?,
    };
    if reply.status.as_u16() == 500 {
        reply = match call.action.as_str() {
            "RunInstances" => Reply::error(
                400,
                "InsufficientFreeAddressesInSubnet",
                "There are not enough free addresses in the subnet to satisfy the requested number of instances.",
            ),
            _ => Reply::error(400, "InvalidParameterValue", "moto can't answer this"),
        };
    }
    if reply.status.is_success() && call.action == "DeleteSubnet" {
        disassociate(proxy, &call).await?;
    }
    if reply.status.is_success() && call.action == "DeleteNatGateway" {
        take_interface_away(proxy, &call).await?;
    }
    if reply.status.is_success()
        && let Some((_, element)) = MADE.iter().find(|(action, _)| *action == call.action)
        && let Some(root) = Element::parse(&reply.body)
    {
        proxy.faults.made(root.texts(element));
    }
    Ok(reply)
}

/// A NAT gateway's network interface goes with it, and its address is free again.
async fn take_interface_away(proxy: &Proxy, call: &Call) -> Result<()> {
    let id = call.field("NatGatewayId").unwrap_or_default();
    let gateways = proxy
        .ask(call, "DescribeNatGateways", &[("NatGatewayId.1", id)])
        .await?;
    for association in gateways.texts("associationId") {
        proxy
            .ask(call, "DisassociateAddress", &[("AssociationId", association.as_str())])
            .await?;
    }
    for interface in gateways.texts("networkInterfaceId") {
        proxy
            .ask(
                call,
                "DeleteNetworkInterface",
                &[("NetworkInterfaceId", interface.as_str())],
            )
            .await?;
    }
    Ok(())
}

/// A subnet that is gone uses no route table any more.
async fn disassociate(proxy: &Proxy, call: &Call) -> Result<()> {
    let id = call.field("SubnetId").unwrap_or_default();
    let tables = proxy.ask(call, "DescribeRouteTables", &[]).await?;
    let stale = items(&tables, "associationSet")
        .into_iter()
        .filter(|a| a.child_text("subnetId") == Some(id))
        .filter_map(|a| a.child_text("routeTableAssociationId"));
    for association in stale {
        proxy
            .ask(call, "DisassociateRouteTable", &[("AssociationId", association)])
            .await?;
    }
    Ok(())
}

/// A call with a client token: the same again is answered as before, and does nothing
/// (EC2's "Ensuring idempotency in Amazon EC2 API requests").
async fn once(proxy: &Proxy, call: &Call, token: String) -> Result<Reply> {
    let mut tokens = proxy.tokens.lock().await;
    let key = (call.action.clone(), token);
    if let Some(used) = tokens.get(&key) {
        let Used { form, body, instances } = used;
        for id in instances {
            let seen = proxy.ask(call, "DescribeInstances", &[("InstanceId.1", id)]).await?;
            let state = seen
                .all("instanceState")
                .first()
                .and_then(|s| s.child_text("name").map(ToOwned::to_owned));
            if state.is_none_or(|s| s == "terminated" || s == "shutting-down") {
                return Ok(Reply::error(
                    400,
                    "IdempotentInstanceTerminated",
                    &format!(
                        "The client token you have provided is associated with a resource that is already deleted: {id}"
                    ),
                ));
            }
        }
        if *form != call.form {
            return Ok(Reply::error(
                400,
                "IdempotentParameterMismatch",
                "The request uses the same client token as a previous, but non-identical request.",
            ));
        }
        return Ok(Reply {
            status: http::StatusCode::OK,
            body: body.clone(),
        });
    }
    let reply = proxy.forward(call).await?;
    if reply.status.is_success() {
        let root = Element::parse(&reply.body).unwrap_or_default();
        let used = Used {
            form: call.form.clone(),
            body: reply.body.clone(),
            instances: if call.action == "RunInstances" {
                root.texts("instanceId")
            } else {
                Vec::new()
            },
        };
        tokens.insert(key, used);
    }
    Ok(reply)
}

fn in_use(what: &str, id: &str, by: &str) -> Reply {
    Reply::error(
        400,
        "DependencyViolation",
        &format!("The {what} '{id}' has dependencies and cannot be deleted: {by}"),
    )
}

/// What AWS refuses and moto would do.
async fn refuse(proxy: &Proxy, call: &Call) -> Result<Option<Reply>> {
    let field = |name: &str| call.field(name).unwrap_or_default();
    Ok(match call.action.as_str() {
        "RunInstances" => refuse_instances(proxy, call).await?,
        "AttachVolume" => refuse_attachment(proxy, call).await?,
        "DeleteSubnet" => {
            let id = field("SubnetId");
            holder(proxy, call, id).await?.map(|by| in_use("subnet", id, &by))
        }
        "DeleteSecurityGroup" => {
            let id = field("GroupId");
            let mut by = holder(proxy, call, id).await?;
            if by.is_none() {
                let groups = proxy.ask(call, "DescribeSecurityGroups", &[]).await?;
                by = items(&groups, "securityGroupInfo")
                    .into_iter()
                    .filter(|g| g.child_text("groupId") != Some(id))
                    .find(|g| {
                        g.child("ipPermissions")
                            .is_some_and(|p| p.texts("groupId").iter().any(|t| t == id))
                    })
                    .and_then(|g| g.child_text("groupId"))
                    .map(|other| format!("a rule of {other} names it"));
            }
            by.map(|by| in_use("resource", id, &by))
        }
        "AttachInternetGateway" => {
            let vpc = field("VpcId");
            let inside = [("Filter.1.Name", "attachment.vpc-id"), ("Filter.1.Value.1", vpc)];
            let attached = proxy.ask(call, "DescribeInternetGateways", &inside).await?;
            let mut others = attached.texts("internetGatewayId").into_iter();
            others.any(|id| id != field("InternetGatewayId")).then(|| {
                Reply::error(
                    400,
                    "InvalidParameterValue",
                    &format!("Network {vpc} already has an internet gateway attached"),
                )
            })
        }
        "CreateListener" => {
            let listeners = [("LoadBalancerArn", field("LoadBalancerArn"))];
            let existing = proxy.ask(call, "DescribeListeners", &listeners).await?;
            existing_listener(call, &existing)
        }
        "DetachInternetGateway" => {
            let vpc = field("VpcId");
            public_address(proxy, call, vpc).await?.map(|by| {
                Reply::error(
                    400,
                    "DependencyViolation",
                    &format!("Network {vpc} has some mapped public address(es). Please unmap those public address(es) before detaching the gateway. ({by})"),
                )
            })
        }
        "DeleteVpc" => {
            let id = field("VpcId");
            vpc_holder(proxy, call, id).await?.map(|by| in_use("vpc", id, &by))
        }
        "CreateLoadBalancer" => {
            let existing = proxy
                .ask(call, "DescribeLoadBalancers", &[("Names.member.1", field("Name"))])
                .await?;
            existing_balancer(call, &existing)
        }
        _ => None,
    })
}

async fn refuse_instances(proxy: &Proxy, call: &Call) -> Result<Option<Reply>> {
    if let Some(data) = call.field("UserData") {
        let size = base64::engine::general_purpose::STANDARD
            .decode(data)
            .map_or(usize::MAX, |d| d.len());
        if size > USER_DATA {
            return Ok(Some(Reply::error(
                400,
                "InvalidParameterValue",
                "User data is limited to 16384 bytes",
            )));
        }
    }
    if !proxy.faults.any_full() {
        return Ok(None);
    }
    let subnet = call
        .field("SubnetId")
        .or_else(|| call.field("NetworkInterface.1.SubnetId"))
        .unwrap_or_default();
    let subnets = proxy.ask(call, "DescribeSubnets", &[("SubnetId.1", subnet)]).await?;
    let zone = subnets.texts("availabilityZone").first().cloned().unwrap_or_default();
    let size = call.field("InstanceType").unwrap_or("m1.small");
    Ok(proxy.faults.is_full(&zone).then(|| {
        Reply::error(
            500,
            "InsufficientInstanceCapacity",
            &format!(
                "We currently do not have sufficient {size} capacity in the Availability Zone you requested ({zone})."
            ),
        )
    }))
}

async fn refuse_attachment(proxy: &Proxy, call: &Call) -> Result<Option<Reply>> {
    let (id, machine) = (
        call.field("VolumeId").unwrap_or_default(),
        call.field("InstanceId").unwrap_or_default(),
    );
    let volumes = proxy.ask(call, "DescribeVolumes", &[("VolumeId.1", id)]).await?;
    let instances = proxy
        .ask(call, "DescribeInstances", &[("InstanceId.1", machine)])
        .await?;
    let (Some(volume), Some(instance)) = (
        items(&volumes, "volumeSet").first().copied(),
        items(&instances, "instancesSet").first().copied(),
    ) else {
        // moto has the right error for what isn't there.
        return Ok(None);
    };
    let state = instance
        .child("instanceState")
        .and_then(|s| s.child_text("name"))
        .unwrap_or_default();
    let zone = instance
        .child("placement")
        .and_then(|p| p.child_text("availabilityZone"));
    Ok(if volume.child_text("status") != Some("available") {
        Some(Reply::error(
            400,
            "VolumeInUse",
            &format!("{id} is already attached to an instance"),
        ))
    } else if volume.child_text("availabilityZone") != zone {
        Some(Reply::error(
            400,
            "InvalidVolume.ZoneMismatch",
            &format!("The volume '{id}' is not in the same availability zone as instance '{machine}'"),
        ))
    } else if state != "running" && state != "stopped" {
        Some(Reply::error(
            400,
            "IncorrectState",
            &format!("Instance '{machine}' is not 'running'."),
        ))
    } else {
        None
    })
}

/// The items of a list.
fn items<'a>(root: &'a Element, list: &str) -> Vec<&'a Element> {
    root.all(list).into_iter().flat_map(|l| l.children.iter()).collect()
}

/// The instances that exist.
async fn instances(proxy: &Proxy, call: &Call, vpc: Option<&str>) -> Result<Vec<Element>> {
    let mut next = String::new();
    let mut found = Vec::new();
    loop {
        let mut fields = vec![("MaxResults", "1000")];
        if let Some(vpc) = vpc {
            fields.extend([("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", vpc)]);
        }
        if !next.is_empty() {
            fields.push(("NextToken", &next));
        }
        let page = proxy.ask(call, "DescribeInstances", &fields).await?;
        let living = |i: &&Element| i.child("instanceState").and_then(|s| s.child_text("name")) != Some("terminated");
        found.extend(items(&page, "instancesSet").into_iter().filter(living).cloned());
        match page.child_text("nextToken") {
            Some(token) if !token.is_empty() => token.clone_into(&mut next),
            _ => return Ok(found),
        }
    }
}

/// What has a network interface in a subnet, or with a security group.
async fn holder(proxy: &Proxy, call: &Call, id: &str) -> Result<Option<String>> {
    let uses = |e: &Element| e.texts("subnetId").iter().chain(&e.texts("groupId")).any(|t| t == id);
    if let Some(instance) = instances(proxy, call, None).await?.into_iter().find(uses) {
        return Ok(instance.child_text("instanceId").map(ToOwned::to_owned));
    }
    let balancers = proxy.ask(call, "DescribeLoadBalancers", &[]).await?;
    for balancer in items(&balancers, "LoadBalancers") {
        let groups = balancer
            .child("SecurityGroups")
            .map(|g| g.texts("member"))
            .unwrap_or_default();
        if balancer.texts("SubnetId").iter().chain(&groups).any(|t| t == id) {
            return Ok(balancer.child_text("LoadBalancerName").map(ToOwned::to_owned));
        }
    }
    let gateways = proxy.ask(call, "DescribeNatGateways", &[]).await?;
    Ok(items(&gateways, "natGatewaySet")
        .into_iter()
        .filter(|g| g.child_text("state") != Some("deleted"))
        .find(|g| g.child_text("subnetId") == Some(id))
        .and_then(|g| g.child_text("natGatewayId"))
        .map(ToOwned::to_owned))
}

/// What has a public address in a VPC.
async fn public_address(proxy: &Proxy, call: &Call, vpc: &str) -> Result<Option<String>> {
    let with = |i: &Element| !i.texts("publicIp").is_empty() || i.child_text("ipAddress").is_some();
    if let Some(instance) = instances(proxy, call, Some(vpc)).await?.into_iter().find(with) {
        return Ok(instance.child_text("instanceId").map(ToOwned::to_owned));
    }
    let balancers = proxy.ask(call, "DescribeLoadBalancers", &[]).await?;
    let facing = items(&balancers, "LoadBalancers")
        .into_iter()
        .find(|b| b.child_text("VpcId") == Some(vpc) && b.child_text("Scheme") == Some("internet-facing"));
    if let Some(balancer) = facing {
        return Ok(balancer.child_text("LoadBalancerName").map(ToOwned::to_owned));
    }
    let gateways = proxy.ask(call, "DescribeNatGateways", &[]).await?;
    Ok(items(&gateways, "natGatewaySet")
        .into_iter()
        .find(|g| g.child_text("vpcId") == Some(vpc) && g.child_text("state") != Some("deleted"))
        .and_then(|g| g.child_text("natGatewayId"))
        .map(ToOwned::to_owned))
}

/// What keeps a VPC from being deleted.
async fn vpc_holder(proxy: &Proxy, call: &Call, vpc: &str) -> Result<Option<String>> {
    let gateways = proxy
        .ask(
            call,
            "DescribeInternetGateways",
            &[("Filter.1.Name", "attachment.vpc-id"), ("Filter.1.Value.1", vpc)],
        )
        .await?;
    let mut holders = gateways.texts("internetGatewayId");
    let inside = [("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", vpc)];
    let groups = proxy.ask(call, "DescribeSecurityGroups", &inside).await?;
    holders.extend(
        items(&groups, "securityGroupInfo")
            .into_iter()
            .filter(|g| g.child_text("groupName") != Some("default"))
            .filter_map(|g| g.child_text("groupId").map(ToOwned::to_owned)),
    );
    let tables = proxy.ask(call, "DescribeRouteTables", &inside).await?;
    holders.extend(
        items(&tables, "routeTableSet")
            .into_iter()
            .filter(|t| !t.texts("main").iter().any(|m| m == "true"))
            .filter_map(|t| t.child_text("routeTableId").map(ToOwned::to_owned)),
    );
    Ok(holders.into_iter().next())
}

/// The same listener again is answered with the one that is there; another one on its port is refused.
fn existing_listener(call: &Call, existing: &Element) -> Option<Reply> {
    let port = call.field("Port");
    let listener = items(existing, "Listeners")
        .into_iter()
        .find(|l| l.child_text("Port") == port)?;
    let forwards = listener.texts("TargetGroupArn");
    let same = call
        .fields("DefaultActions.member.")
        .filter(|(name, _)| name.ends_with(".TargetGroupArn"))
        .all(|(_, group)| forwards.contains(group));
    Some(if same {
        let list = Element::node("Listeners", vec![listener.clone()]);
        let result = Element::node("CreateListenerResult", vec![list]);
        Reply {
            status: http::StatusCode::OK,
            body: Element::node("CreateListenerResponse", vec![result]).document(),
        }
    } else {
        Reply::balancer_error(
            400,
            "DuplicateListener",
            "A listener already exists on this port for this load balancer",
        )
    })
}

/// A load balancer's name is taken once: the same again is the one that exists, another one with it is refused.
fn existing_balancer(call: &Call, existing: &Element) -> Option<Reply> {
    let balancer = items(existing, "LoadBalancers").first().copied()?;
    let asked: BTreeSet<&str> = call.fields("Subnets.member.").map(|(_, v)| v.as_str()).collect();
    let found = balancer.texts("SubnetId");
    let found: BTreeSet<&str> = found.iter().map(String::as_str).collect();
    let same = asked == found
        && call
            .field("Scheme")
            .is_none_or(|s| Some(s) == balancer.child_text("Scheme"))
        && call
            .field("Type")
            .is_none_or(|t| Some(t) == balancer.child_text("Type"));
    Some(if same {
        let list = Element::node("LoadBalancers", vec![balancer.clone()]);
        let result = Element::node("CreateLoadBalancerResult", vec![list]);
        let body = Element::node("CreateLoadBalancerResponse", vec![result]).document();
        Reply {
            status: http::StatusCode::OK,
            body,
        }
    } else {
        Reply::balancer_error(
            400,
            "DuplicateLoadBalancerName",
            "A load balancer with the specified name already exists.",
        )
    })
}

/// Leaves out of a listing what was made only just now.
pub(super) fn hide(action: &str, root: &mut Element, faults: &Faults) {
    let Some((_, id)) = LISTINGS.iter().find(|(listing, _)| *listing == action) else {
        return;
    };
    root.each(&mut |element| {
        element.children.retain(|item| {
            let listed = matches!(item.name(), "item" | "member");
            !(listed && item.child_text(id).is_some_and(|id| faults.hides(id)))
        });
    });
}

/// Shows instances of these names as pending.
pub(super) fn keep_pending(root: &mut Element, names: &BTreeSet<String>) {
    root.each(&mut |element| {
        let is_one = element.child("tagSet").is_some_and(|tags| {
            tags.children.iter().any(|t| {
                t.child_text("key") == Some("Name") && t.child_text("value").is_some_and(|v| names.contains(v))
            })
        });
        if !is_one {
            return;
        }
        for state in element.children.iter_mut().filter(|c| c.name() == "instanceState") {
            if state.child_text("name") == Some("running") {
                state.children = vec![Element::leaf("code", "0"), Element::leaf("name", "pending")];
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_leave_out_what_is_hidden() {
        let faults = Faults::default();
        faults.late(1);
        faults.made(["subnet-2".to_owned()]);
        let text = "<R><subnetSet><item><subnetId>subnet-1</subnetId></item><item><subnetId>subnet-2</subnetId></item></subnetSet></R>";
        let mut root = Element::parse(text).unwrap();
        hide("DescribeVpcs", &mut root, &faults);
        assert_eq!(root.texts("subnetId").len(), 2);
        hide("DescribeSubnets", &mut root, &faults);
        assert_eq!(root.texts("subnetId"), ["subnet-1"]);
    }

    #[test]
    fn instances_stay_pending_by_name() {
        let text = "<R><item><instanceState><code>16</code><name>running</name></instanceState>\
                    <tagSet><item><key>Name</key><value>a</value></item></tagSet></item></R>";
        let mut root = Element::parse(text).unwrap();
        keep_pending(&mut root, &["b".to_owned()].into());
        assert!(root.document().contains("running"));
        keep_pending(&mut root, &["a".to_owned()].into());
        assert!(root.document().contains("<code>0</code><name>pending</name>"));
    }
}
