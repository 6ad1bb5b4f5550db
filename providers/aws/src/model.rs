//! What there is at AWS, as far as kprov cares: plain data, made from the SDK's types by `translate`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use kprov_types::{MachineName, Role};

/// What a subnet, route table or security group is for: the value of the tag `kprov.io/part`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The machines.
    Machines,
    /// The load balancer of the API.
    Api,
    /// The NAT gateway of a private cluster.
    Nat,
}

impl Part {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Machines => "machines",
            Self::Api => "api",
            Self::Nat => "nat",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        [Self::Machines, Self::Api, Self::Nat]
            .into_iter()
            .find(|p| p.as_str() == text)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vpc {
    pub(crate) id: String,
    pub(crate) cidr: Ipv4Net,
    /// Whether it carries the cluster's tag.
    pub(crate) ours: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subnet {
    pub(crate) id: String,
    pub(crate) vpc: String,
    pub(crate) zone: String,
    pub(crate) cidr: Ipv4Net,
    pub(crate) part: Part,
}

/// Whom a rule lets in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    Range(Ipv4Net),
    Group(String),
}

/// One ingress rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rule {
    /// A TCP port; everything where left out.
    pub(crate) tcp: Option<u16>,
    pub(crate) from: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) id: String,
    pub(crate) vpc: String,
    pub(crate) part: Part,
    pub(crate) rules: BTreeSet<Rule>,
    /// Rules that kprov never makes.
    pub(crate) foreign: bool,
    /// The cluster's address range, kept with the group of its machines.
    pub(crate) range: Option<Ipv4Net>,
    /// How often things of the cluster were removed: part of client tokens.
    pub(crate) generation: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) id: String,
    pub(crate) vpc: String,
    pub(crate) part: Part,
    /// The gateway that everything else goes through.
    pub(crate) default: Option<String>,
    /// Subnets that use it.
    pub(crate) subnets: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gateway {
    pub(crate) id: String,
    pub(crate) vpc: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nat {
    pub(crate) id: String,
    pub(crate) vpc: String,
    pub(crate) state: NatState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NatState {
    Pending,
    Available,
    Deleting,
    Failed,
}

/// A public address that was allocated for the NAT gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) id: String,
    pub(crate) in_use: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Balancer {
    pub(crate) arn: String,
    pub(crate) dns: String,
    pub(crate) ours: bool,
    /// `Some` where it will never work.
    pub(crate) failed: Option<String>,
    /// The port its listener forwards.
    pub(crate) listener: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TargetGroup {
    pub(crate) arn: String,
    pub(crate) vpc: Option<String>,
    pub(crate) ours: bool,
    pub(crate) targets: BTreeSet<IpAddr>,
}

/// An instance, by the state that EC2 tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) id: String,
    pub(crate) name: MachineName,
    pub(crate) role: Role,
    pub(crate) state: InstanceState,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) public: Option<Ipv4Addr>,
    pub(crate) zone: Option<String>,
    /// Why EC2 ended it, where nobody asked for that.
    pub(crate) ended: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum InstanceState {
    Running,
    Pending,
    Stopping,
    Stopped,
    ShuttingDown,
    Terminated,
}

/// A data volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) id: String,
    pub(crate) machine: MachineName,
    pub(crate) size: Option<u32>,
    pub(crate) zone: String,
    pub(crate) attachment: Option<Attachment>,
    /// Whether it was attached to a machine at any time.
    pub(crate) used: bool,
    /// The address of the machine it was attached to first.
    pub(crate) address: Option<Ipv4Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) instance: String,
    /// Neither on its way there nor from there.
    pub(crate) settled: bool,
}

/// What instances of a size need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InstanceKind {
    /// `x86_64` or `arm64`.
    pub(crate) architecture: String,
}

/// What instances are started from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) id: String,
    pub(crate) root_device: String,
    /// The least that its root disk may have, in GiB.
    pub(crate) root_gib: i32,
    /// Whether it is configured by Ignition rather than by cloud-init.
    pub(crate) ignition: bool,
}

/// All of a cluster's network, and what belongs to its endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Net {
    pub(crate) vpc: Option<Vpc>,
    pub(crate) groups: BTreeMap<Part, Group>,
    pub(crate) subnets: Vec<Subnet>,
    pub(crate) tables: BTreeMap<Part, Table>,
    /// Gateways that carry the cluster's tag.
    pub(crate) gateways: Vec<Gateway>,
    /// The internet gateway of an existing VPC, which is not the cluster's.
    pub(crate) given_gateway: Option<String>,
    pub(crate) nats: Vec<Nat>,
    pub(crate) addresses: Vec<Address>,
    pub(crate) balancer: Option<Balancer>,
    pub(crate) target_group: Option<TargetGroup>,
    pub(crate) surplus: Surplus,
}

/// What was made twice: it goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surplus {
    pub(crate) vpcs: Vec<String>,
    pub(crate) groups: Vec<Group>,
    pub(crate) subnets: Vec<Subnet>,
    pub(crate) tables: Vec<Table>,
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) nats: Vec<Nat>,
    pub(crate) addresses: Vec<Address>,
}

impl Net {
    /// Whether there is anything that the cluster made.
    pub(crate) fn is_empty(&self) -> bool {
        self.vpc.as_ref().is_none_or(|v| !v.ours)
            && self.surplus.is_empty()
            && self.groups.is_empty()
            && self.subnets.is_empty()
            && self.tables.is_empty()
            && self.gateways.is_empty()
            && self.nats.is_empty()
            && self.addresses.is_empty()
            && self.balancer.as_ref().is_none_or(|b| !b.ours)
            && self.target_group.as_ref().is_none_or(|t| !t.ours)
    }

    /// The subnets that machines go into, by zone.
    pub(crate) fn machine_subnets(&self) -> BTreeMap<&str, &Subnet> {
        self.subnets
            .iter()
            .filter(|s| s.part == Part::Machines)
            .map(|s| (s.zone.as_str(), s))
            .collect()
    }

    /// The cluster's address range.
    pub(crate) fn range(&self) -> Option<Ipv4Net> {
        let kept = self.groups.get(&Part::Machines).and_then(|g| g.range);
        kept.or_else(|| self.vpc.as_ref().filter(|v| v.ours).map(|v| v.cidr))
    }
}
