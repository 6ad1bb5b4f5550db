//! What a cluster file says for one provider alone, as written. Each provider checks its own part.

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `aws` part of a cluster file. What is left out is taken as every AWS tool takes it: from the environment, the
/// profile, or the instance's role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct AwsSettings {
    /// The region, such as `eu-central-1`.
    pub region: Option<String>,
    /// The profile in the shared configuration files.
    pub profile: Option<String>,
    /// Another endpoint for every API, for an emulator or a private cloud.
    pub endpoint_url: Option<String>,
    /// An existing VPC to put the cluster into; one is made where left out.
    pub vpc: Option<String>,
    /// Machines get no public addresses: they reach the internet through a NAT gateway, the load balancer is internal, and
    /// `kprov up` has to run where it reaches them.
    pub private: bool,
    /// Who may reach the API and, during `up`, the machines' setup endpoints; everyone where left out.
    #[schemars(with = "Vec<String>")]
    pub access: Vec<Ipv4Net>,
    /// Size of each machine's root disk, in GiB; 30 where left out.
    pub root_disk_gib: Option<u32>,
    /// Instances can't be terminated until this is off again.
    pub termination_protection: bool,
    /// The instance profile of all machines, by name or ARN.
    pub instance_profile: Option<String>,
}

/// The `azure` part of a cluster file. What is left out is taken as every Azure tool takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct AzureSettings {
    /// The subscription's id; `AZURE_SUBSCRIPTION_ID` where left out.
    pub subscription: Option<String>,
    /// The location, such as `westeurope`.
    pub location: Option<String>,
    /// The cloud: `public` (the default), `usgovernment` or `china`.
    pub cloud: Option<String>,
    /// Another endpoint for Azure Resource Manager, for an emulator or a private cloud.
    pub endpoint_url: Option<String>,
    /// An existing resource group to put the cluster into; `kprov-<cluster>` is made where left out.
    pub resource_group: Option<String>,
    /// Machines and load balancer get no public addresses; `kprov up` has to run where it reaches them.
    pub private: bool,
    /// Who may reach the API and, during `up`, the machines' setup endpoints; everyone where left out.
    #[schemars(with = "Vec<String>")]
    pub access: Vec<Ipv4Net>,
    /// Size of each machine's system disk, in GiB; 30 where left out.
    pub root_disk_gib: Option<u32>,
    /// The resource id of a user-assigned managed identity for all machines.
    pub identity: Option<String>,
    /// An SSH public key for the user `kprov`; Azure wants one for every Linux machine, and one that nobody has the private
    /// half of is made where left out.
    pub ssh_public_key: Option<String>,
}

/// The `baremetal` part of a cluster file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct BaremetalSettings {
    /// The inventory file, relative to the cluster file: kprov's own, or an Ansible inventory (YAML or INI).
    pub inventory: Option<String>,
    /// The API's address or DNS name; it has to lead to the control-plane hosts already.
    pub endpoint: Option<String>,
    /// An address for the API that one healthy control-plane host at a time announces by itself.
    pub virtual_address: Option<std::net::Ipv4Addr>,
    /// How many hosts are worked on at once; 20 where left out.
    pub parallel: Option<u32>,
}
