//! From the SDK's types to our own, and the other way. Pure.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use aws_sdk_ec2::types as ec2;
use aws_sdk_elasticloadbalancingv2::types as elb;
use kprov_types::machine::{DataVolume, Disk, Machine, MachineState};
use kprov_types::{ClusterName, MachineName, Role};
use sha2::Digest as _;

use crate::model::{
    Address, Attachment, Balancer, Gateway, Group, Image, Instance, InstanceKind, InstanceState, Nat, NatState, Part,
    Rule, Source, Subnet, Table, TargetGroup, Volume, Vpc,
};
use crate::series::Series;

/// The cluster that a thing belongs to.
pub(crate) const CLUSTER: &str = "kprov.io/cluster";
/// A machine's name, or the series of an instance.
pub(crate) const MACHINE: &str = "kprov.io/machine";
/// A machine's role.
pub(crate) const ROLE: &str = "kprov.io/role";
/// What a part of the network is for.
pub(crate) const PART: &str = "kprov.io/part";
/// The cluster's address range.
pub(crate) const RANGE: &str = "kprov.io/range";
/// How often things of the cluster were removed.
pub(crate) const GENERATION: &str = "kprov.io/generation";
/// On a data volume that was attached at some time: the address of the machine that had it. Another machine in that one's place
/// gets the same, as an etcd member's peers and certificates know it by its address.
pub(crate) const USED: &str = "kprov.io/used";
/// What the console shows.
pub(crate) const NAME: &str = "Name";

/// Where data volumes are attached. Instances on Nitro show them under a name of their own.
pub(crate) const DEVICE: &str = "/dev/sdf";

/// All addresses.
pub(crate) const EVERYWHERE: &str = "0.0.0.0/0";

/// The value of a tag.
pub(crate) fn tag<'a>(tags: &'a [ec2::Tag], key: &str) -> Option<&'a str> {
    tags.iter().find(|t| t.key() == Some(key)).and_then(ec2::Tag::value)
}

fn owned(text: Option<&str>) -> Option<String> {
    text.map(ToOwned::to_owned)
}

pub(crate) fn vpc(vpc: &ec2::Vpc, cluster: &ClusterName) -> Option<Vpc> {
    Some(Vpc {
        id: owned(vpc.vpc_id())?,
        cidr: vpc.cidr_block()?.parse().ok()?,
        ours: tag(vpc.tags(), CLUSTER) == Some(cluster.as_str()),
    })
}

pub(crate) fn subnet(subnet: &ec2::Subnet) -> Option<Subnet> {
    Some(Subnet {
        id: owned(subnet.subnet_id())?,
        vpc: owned(subnet.vpc_id())?,
        zone: owned(subnet.availability_zone())?,
        cidr: subnet.cidr_block()?.parse().ok()?,
        part: Part::parse(tag(subnet.tags(), PART)?)?,
    })
}

pub(crate) fn group(group: &ec2::SecurityGroup) -> Option<Group> {
    let mut foreign = false;
    let mut rules = BTreeSet::new();
    for permission in group.ip_permissions() {
        let tcp = match (permission.ip_protocol(), permission.from_port(), permission.to_port()) {
            (Some("-1"), ..) => None,
            (Some("tcp"), Some(from), Some(to)) if from == to => u16::try_from(from).ok(),
            _ => {
                foreign = true;
                continue;
            }
        };
        foreign |= !permission.ipv6_ranges().is_empty() || !permission.prefix_list_ids().is_empty();
        let ranges = permission.ip_ranges().iter().filter_map(|r| r.cidr_ip()?.parse().ok());
        rules.extend(ranges.map(|range| Rule {
            tcp,
            from: Source::Range(range),
        }));
        let groups = permission
            .user_id_group_pairs()
            .iter()
            .filter_map(|p| owned(p.group_id()));
        rules.extend(groups.map(|group| Rule {
            tcp,
            from: Source::Group(group),
        }));
    }
    Some(Group {
        id: owned(group.group_id())?,
        vpc: owned(group.vpc_id())?,
        part: Part::parse(tag(group.tags(), PART)?)?,
        rules,
        foreign,
        range: tag(group.tags(), RANGE).and_then(|r| r.parse().ok()),
        generation: tag(group.tags(), GENERATION).and_then(|g| g.parse().ok()).unwrap_or(0),
    })
}

/// A rule as EC2 takes it.
pub(crate) fn permission(rule: &Rule) -> ec2::IpPermission {
    let builder = ec2::IpPermission::builder();
    let builder = match rule.tcp {
        Some(port) => builder
            .ip_protocol("tcp")
            .from_port(i32::from(port))
            .to_port(i32::from(port)),
        None => builder.ip_protocol("-1"),
    };
    match &rule.from {
        Source::Range(range) => builder.ip_ranges(ec2::IpRange::builder().cidr_ip(range.to_string()).build()),
        Source::Group(id) => builder.user_id_group_pairs(ec2::UserIdGroupPair::builder().group_id(id).build()),
    }
    .build()
}

pub(crate) fn table(table: &ec2::RouteTable) -> Option<Table> {
    let default = table
        .routes()
        .iter()
        .find(|r| r.destination_cidr_block() == Some(EVERYWHERE) && r.state() != Some(&ec2::RouteState::Blackhole));
    Some(Table {
        id: owned(table.route_table_id())?,
        vpc: owned(table.vpc_id())?,
        part: Part::parse(tag(table.tags(), PART)?)?,
        default: default.and_then(|r| owned(r.nat_gateway_id().or(r.gateway_id()))),
        subnets: table
            .associations()
            .iter()
            .filter_map(|a| owned(a.subnet_id()))
            .collect(),
    })
}

pub(crate) fn gateway(gateway: &ec2::InternetGateway) -> Option<Gateway> {
    Some(Gateway {
        id: owned(gateway.internet_gateway_id())?,
        vpc: gateway.attachments().iter().find_map(|a| owned(a.vpc_id())),
    })
}

/// `None` also for one that is gone, which stays listed for an hour.
pub(crate) fn nat(nat: &ec2::NatGateway) -> Option<Nat> {
    let state = match nat.state()? {
        ec2::NatGatewayState::Pending => NatState::Pending,
        ec2::NatGatewayState::Available => NatState::Available,
        ec2::NatGatewayState::Deleting => NatState::Deleting,
        ec2::NatGatewayState::Failed => NatState::Failed,
        _ => return None,
    };
    Some(Nat {
        id: owned(nat.nat_gateway_id())?,
        vpc: owned(nat.vpc_id())?,
        state,
    })
}

pub(crate) fn address(address: &ec2::Address) -> Option<Address> {
    Some(Address {
        id: owned(address.allocation_id())?,
        in_use: address.association_id().is_some(),
    })
}

pub(crate) fn balancer(balancer: &elb::LoadBalancer) -> Option<Balancer> {
    let state = balancer.state();
    let failed = state
        .filter(|s| s.code() == Some(&elb::LoadBalancerStateEnum::Failed))
        .map(|s| s.reason().unwrap_or("no reason given").to_owned());
    Some(Balancer {
        arn: owned(balancer.load_balancer_arn())?,
        dns: owned(balancer.dns_name())?,
        ours: false,
        failed,
        listener: None,
    })
}

pub(crate) fn target_group(group: &elb::TargetGroup) -> Option<TargetGroup> {
    Some(TargetGroup {
        arn: owned(group.target_group_arn())?,
        vpc: owned(group.vpc_id()),
        ours: false,
        targets: BTreeSet::new(),
    })
}

/// An instance with the cluster's tags; `None` for one whose tags name no machine.
pub(crate) fn instance(instance: &ec2::Instance) -> Option<Instance> {
    let state = match instance.state()?.name()? {
        ec2::InstanceStateName::Pending => InstanceState::Pending,
        ec2::InstanceStateName::Running => InstanceState::Running,
        ec2::InstanceStateName::Stopping => InstanceState::Stopping,
        ec2::InstanceStateName::Stopped => InstanceState::Stopped,
        ec2::InstanceStateName::ShuttingDown => InstanceState::ShuttingDown,
        _ => InstanceState::Terminated,
    };
    let index = u32::try_from(instance.ami_launch_index().unwrap_or(0)).ok()?;
    let series: Series = tag(instance.tags(), MACHINE)?.parse().ok()?;
    let address = |text: Option<&str>| text.and_then(|t| t.parse::<Ipv4Addr>().ok());
    Some(Instance {
        id: owned(instance.instance_id())?,
        name: series.name(index)?,
        role: role(tag(instance.tags(), ROLE)?)?,
        state,
        address: address(instance.private_ip_address()),
        public: address(instance.public_ip_address()),
        zone: instance.placement().and_then(|p| owned(p.availability_zone())),
        ended: instance
            .state_reason()
            .filter(|_| state == InstanceState::Terminated)
            .filter(|r| r.code() != Some("Client.UserInitiatedShutdown"))
            .and_then(|r| owned(r.message())),
    })
}

fn role(text: &str) -> Option<Role> {
    [Role::ControlPlane, Role::Worker]
        .into_iter()
        .find(|r| r.as_str() == text)
}

/// A data volume; `None` for root disks, and for what is gone.
pub(crate) fn volume(volume: &ec2::Volume) -> Option<Volume> {
    if matches!(
        volume.state()?,
        ec2::VolumeState::Deleting | ec2::VolumeState::Deleted | ec2::VolumeState::Error
    ) {
        return None;
    }
    let attachment = volume
        .attachments()
        .iter()
        .find(|a| a.state() != Some(&ec2::VolumeAttachmentState::Detached))
        .and_then(|a| {
            Some(Attachment {
                instance: owned(a.instance_id())?,
                settled: a.state() == Some(&ec2::VolumeAttachmentState::Attached),
            })
        });
    Some(Volume {
        id: owned(volume.volume_id())?,
        machine: MachineName::new(tag(volume.tags(), MACHINE)?).ok()?,
        size: volume.size().and_then(|s| u32::try_from(s).ok()),
        zone: owned(volume.availability_zone())?,
        used: attachment.is_some() || tag(volume.tags(), USED).is_some(),
        address: tag(volume.tags(), USED).and_then(|a| a.parse().ok()),
        attachment,
    })
}

/// A disk as the trait has it. By their id where the instance runs on Nitro; else under the name asked for, or the kernel's
/// for it ("Device names for volumes on Amazon EC2 instances").
pub(crate) fn disk(volume: &Volume) -> Disk {
    let serial = volume.id.replace('-', "");
    Disk {
        machine: volume.machine.clone(),
        id: volume.id.clone(),
        size_gib: volume.size,
        volume: DataVolume::Device(vec![
            format!("/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{serial}"),
            "/dev/xvdf".to_owned(),
            DEVICE.to_owned(),
            crate::user_data::ALIAS.to_owned(),
        ]),
    }
}

/// A machine as the trait has it. `needs` tells whether something of a running one is missing that an ensure mends.
pub(crate) fn machine(instance: &Instance, private: bool, needs: bool, pending: bool) -> Option<Machine> {
    let state = match instance.state {
        InstanceState::Running if needs => MachineState::Stopped,
        InstanceState::Running if pending => MachineState::Pending,
        InstanceState::Running => MachineState::Running,
        // It can be started once it has stopped.
        InstanceState::Pending | InstanceState::Stopping => MachineState::Pending,
        InstanceState::Stopped => MachineState::Stopped,
        InstanceState::ShuttingDown => MachineState::Terminating,
        InstanceState::Terminated => return None,
    };
    Some(Machine {
        name: instance.name.clone(),
        role: instance.role,
        id: instance.id.clone(),
        address: instance.address.map(Into::into),
        external_address: instance.public.filter(|_| !private).map(Into::into),
        zone: instance.zone.clone(),
        state,
    })
}

pub(crate) fn kind(kind: &ec2::InstanceTypeInfo) -> Option<(String, InstanceKind)> {
    let name = kind.instance_type()?.as_str().to_owned();
    let architectures = kind.processor_info().map(ec2::ProcessorInfo::supported_architectures);
    let arm = architectures.is_some_and(|a| a.contains(&ec2::ArchitectureType::Arm64));
    let architecture = if arm { "arm64" } else { "x86_64" };
    Some((
        name,
        InstanceKind {
            architecture: architecture.to_owned(),
        },
    ))
}

pub(crate) fn image(image: &ec2::Image) -> Option<Image> {
    let name = image.name().unwrap_or_default();
    let root_device = owned(image.root_device_name())?;
    let root_gib = image
        .block_device_mappings()
        .iter()
        .find(|m| m.device_name() == Some(root_device.as_str()))
        .and_then(|m| m.ebs()?.volume_size())
        .unwrap_or(0);
    Some(Image {
        id: owned(image.image_id())?,
        root_device,
        root_gib,
        ignition: ["flatcar", "fedora-coreos"]
            .iter()
            .any(|n| name.to_lowercase().starts_with(n)),
    })
}

/// A name for the load balancer and its target group, which may have 32 characters: letters, digits and `-`.
pub(crate) fn balancer_name(cluster: &ClusterName) -> String {
    let name = format!("kprov-{cluster}");
    if name.len() <= 32 {
        return name;
    }
    let digest = hex::encode(sha2::Sha256::digest(cluster.as_str()));
    format!("{}-{}", name[..23].trim_end_matches('-'), &digest[..8])
}

/// A client token (at most 64 characters): the same for the same thing of the same life of a cluster.
pub(crate) fn token(life: &str, generation: u32, thing: &str) -> String {
    let digest = sha2::Sha256::digest(format!("{life}\n{generation}\n{thing}"));
    format!("kprov-{}", &hex::encode(digest)[..48])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(pairs: &[(&str, &str)]) -> Vec<ec2::Tag> {
        pairs
            .iter()
            .map(|(k, v)| ec2::Tag::builder().key(*k).value(*v).build())
            .collect()
    }

    fn an_instance(state: ec2::InstanceStateName, series: &str, index: i32) -> ec2::Instance {
        ec2::Instance::builder()
            .instance_id("i-1")
            .state(ec2::InstanceState::builder().name(state).build())
            .ami_launch_index(index)
            .private_ip_address("10.32.0.4")
            .public_ip_address("192.0.2.1")
            .placement(ec2::Placement::builder().availability_zone("eu-central-1a").build())
            .set_tags(Some(tags(&[(MACHINE, series), (ROLE, "worker"), (CLUSTER, "demo")])))
            .build()
    }

    #[test]
    fn machines_by_tag_and_index() {
        let found = instance(&an_instance(ec2::InstanceStateName::Running, "demo-worker-1..7..3", 2)).unwrap();
        assert_eq!(found.name.as_str(), "demo-worker-7");
        assert_eq!(
            instance(&an_instance(ec2::InstanceStateName::Running, "demo-worker-1..7..3", 3)),
            None
        );
        assert_eq!(
            instance(&an_instance(ec2::InstanceStateName::Running, "Web Server", 0)),
            None
        );
        let shown = machine(&found, false, false, false).unwrap();
        assert_eq!(shown.external_address, Some("192.0.2.1".parse().unwrap()));
        assert_eq!(machine(&found, true, false, false).unwrap().external_address, None);
    }

    #[test]
    fn states() {
        use ec2::InstanceStateName as Name;
        let cases = [
            (Name::Pending, false, Some(MachineState::Pending)),
            (Name::Running, false, Some(MachineState::Running)),
            (Name::Running, true, Some(MachineState::Stopped)),
            (Name::Stopping, false, Some(MachineState::Pending)),
            (Name::Stopped, false, Some(MachineState::Stopped)),
            (Name::ShuttingDown, true, Some(MachineState::Terminating)),
            (Name::Terminated, false, None),
        ];
        for (state, needs, expected) in cases {
            let found = instance(&an_instance(state.clone(), "demo-worker-0", 0)).unwrap();
            assert_eq!(
                machine(&found, false, needs, false).map(|m| m.state),
                expected,
                "{state:?}"
            );
        }
    }

    #[test]
    fn instances_that_aws_ended_say_why() {
        let with = |code: &str| {
            let reason = ec2::StateReason::builder().code(code).message("because").build();
            let state = ec2::InstanceState::builder()
                .name(ec2::InstanceStateName::Terminated)
                .build();
            let mut ended = an_instance(ec2::InstanceStateName::Running, "demo-worker-0", 0);
            ended.state = Some(state);
            ended.state_reason = Some(reason);
            instance(&ended).unwrap().ended
        };
        assert_eq!(with("Client.VolumeLimitExceeded"), Some("because".into()));
        assert_eq!(with("Client.UserInitiatedShutdown"), None);
    }

    #[test]
    fn rules_round_trip() {
        let rules: BTreeSet<Rule> = [
            Rule {
                tcp: Some(6443),
                from: Source::Range("192.0.2.0/24".parse().unwrap()),
            },
            Rule {
                tcp: None,
                from: Source::Group("sg-1".into()),
            },
        ]
        .into();
        let back = group(
            &ec2::SecurityGroup::builder()
                .group_id("sg-1")
                .vpc_id("vpc-1")
                .set_ip_permissions(Some(rules.iter().map(permission).collect()))
                .set_tags(Some(tags(&[
                    (PART, "machines"),
                    (RANGE, "10.32.0.0/16"),
                    (GENERATION, "2"),
                ])))
                .build(),
        )
        .unwrap();
        assert_eq!(back.rules, rules);
        assert_eq!((back.foreign, back.generation), (false, 2));
        assert_eq!(back.range, Some("10.32.0.0/16".parse().unwrap()));
    }

    #[test]
    fn disks_are_found_by_serial_number() {
        let volume = volume(
            &ec2::Volume::builder()
                .volume_id("vol-0123456789abcdef0")
                .availability_zone("eu-central-1a")
                .size(8)
                .state(ec2::VolumeState::Available)
                .set_tags(Some(tags(&[(MACHINE, "demo-cp-0")])))
                .build(),
        )
        .unwrap();
        let DataVolume::Device(paths) = disk(&volume).volume else {
            panic!("not a device")
        };
        assert_eq!(
            paths[0],
            "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0"
        );
    }

    #[test]
    fn names_and_tokens_fit() {
        let long = ClusterName::new("a".repeat(40)).unwrap();
        let other = ClusterName::new(format!("{}b", "a".repeat(39))).unwrap();
        assert_eq!(balancer_name(&ClusterName::new("demo").unwrap()), "kprov-demo");
        assert!(balancer_name(&long).len() <= 32);
        assert_ne!(balancer_name(&long), balancer_name(&other));
        assert!(token("sg-1", 0, "demo-cp-0").len() <= 64);
        assert_ne!(token("sg-1", 0, "a"), token("sg-1", 1, "a"));
    }
}
