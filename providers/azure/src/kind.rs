//! The kinds of resource, what kprov calls its own, and the tags by which it finds them again.

use kprov_types::{ClusterName, MachineName};

use crate::error::Doing;

/// The cluster that something belongs to. Azure's tag names can't contain `/`.
pub(crate) const CLUSTER_TAG: &str = "kprov-cluster";
/// The machine that something belongs to.
pub(crate) const MACHINE_TAG: &str = "kprov-machine";
/// The role of that machine.
pub(crate) const ROLE_TAG: &str = "kprov-role";
/// The range of the cluster's network, once it has been chosen.
pub(crate) const RANGE_TAG: &str = "kprov-range";

/// The kinds of resource that a cluster consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Machine,
    Nic,
    PublicIp,
    LoadBalancer,
    VirtualNetwork,
    NatGateway,
    SecurityGroup,
    Disk,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 8] = [
        Self::Machine,
        Self::Disk,
        Self::Nic,
        Self::LoadBalancer,
        Self::VirtualNetwork,
        Self::NatGateway,
        Self::SecurityGroup,
        Self::PublicIp,
    ];

    /// The type as it stands in paths, and the api-version that it's asked for in.
    pub(crate) const fn path(self) -> (&'static str, &'static str) {
        const NETWORK: &str = "2024-03-01";
        match self {
            Self::Machine => ("Microsoft.Compute/virtualMachines", "2024-07-01"),
            Self::Disk => ("Microsoft.Compute/disks", "2024-03-02"),
            Self::Nic => ("Microsoft.Network/networkInterfaces", NETWORK),
            Self::PublicIp => ("Microsoft.Network/publicIPAddresses", NETWORK),
            Self::LoadBalancer => ("Microsoft.Network/loadBalancers", NETWORK),
            Self::VirtualNetwork => ("Microsoft.Network/virtualNetworks", NETWORK),
            Self::NatGateway => ("Microsoft.Network/natGateways", NETWORK),
            Self::SecurityGroup => ("Microsoft.Network/networkSecurityGroups", NETWORK),
        }
    }

    /// In words.
    pub(crate) const fn noun(self) -> &'static str {
        match self {
            Self::Machine => "virtual machine",
            Self::Disk => "managed disk",
            Self::Nic => "network interface",
            Self::PublicIp => "public IP address",
            Self::LoadBalancer => "load balancer",
            Self::VirtualNetwork => "virtual network",
            Self::NatGateway => "NAT gateway",
            Self::SecurityGroup => "network security group",
        }
    }

    /// What is being done when all of them are listed.
    pub(crate) fn listing(self) -> Doing {
        Doing::read("the list of", self.path().0)
    }

    /// The resource id of one of this kind in the group with that id.
    pub(crate) fn id(self, group_id: &str, name: &str) -> String {
        let (path, _) = self.path();
        format!("{group_id}/providers/{path}/{name}")
    }
}

/// What a cluster's resources are called: derived from its name, so that making one twice makes one.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// The cluster.
    pub(crate) cluster: ClusterName,
    /// Its resource group.
    pub(crate) group: String,
    /// The resource id of that.
    pub(crate) group_id: String,
}

impl Names {
    /// The resource id of one of these.
    pub(crate) fn id(&self, kind: Kind, name: &str) -> String {
        kind.id(&self.group_id, name)
    }

    pub(crate) fn virtual_network(&self) -> String {
        self.cluster.to_string()
    }

    pub(crate) fn subnet_id(&self) -> String {
        format!(
            "{}/subnets/{SUBNET}",
            self.id(Kind::VirtualNetwork, &self.virtual_network())
        )
    }

    pub(crate) fn security_group(&self) -> String {
        self.cluster.to_string()
    }

    /// The load balancer, and its public address.
    pub(crate) fn api(&self) -> String {
        format!("{}-api", self.cluster)
    }

    /// The NAT gateway, and its public address.
    pub(crate) fn nat(&self) -> String {
        format!("{}-nat", self.cluster)
    }

    /// A part of the load balancer.
    pub(crate) fn api_part_id(&self, parts: &str, name: &str) -> String {
        format!("{}/{parts}/{name}", self.id(Kind::LoadBalancer, &self.api()))
    }

    /// The load balancer's pool of control-plane machines.
    pub(crate) fn pool_id(&self) -> String {
        self.api_part_id("backendAddressPools", POOL)
    }
}

/// The one subnet of the virtual network.
pub(crate) const SUBNET: &str = "machines";
/// The load balancer's pool.
pub(crate) const POOL: &str = "control-plane";

/// The data disk of a machine.
pub(crate) fn data_disk(machine: &MachineName) -> String {
    format!("{machine}-data")
}

/// The system disk of a machine.
pub(crate) fn system_disk(machine: &MachineName) -> String {
    format!("{machine}-os")
}
