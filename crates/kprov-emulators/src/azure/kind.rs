//! The resource types there are: names, api-versions, name rules, and what their bodies hold.

use super::refusal::Refusal;
use super::shapes;
use super::strict::{Dialect, Shape};

/// A type of resource that lives in a resource group.
#[derive(Debug)]
pub(super) struct Kind {
    /// `Microsoft.Network` or `Microsoft.Compute`.
    pub(super) namespace: &'static str,
    /// `virtualNetworks`.
    pub(super) plural: &'static str,
    /// The api-versions it's served under.
    pub(super) versions: &'static [&'static str],
    /// Whose words its refusals are in.
    pub(super) dialect: Dialect,
    /// What a PUT holds.
    pub(super) put: &'static Shape,
    /// What a PATCH holds.
    pub(super) patch: &'static Shape,
    /// The answer's status when a PUT has made something.
    pub(super) created: u16,
    /// How long a name may be.
    pub(super) name_length: usize,
    /// Whether it may be in an availability zone by itself.
    pub(super) zonal: bool,
}

/// The api-versions of resource groups, subscriptions and lists of resources.
pub(super) const RESOURCE_VERSIONS: &[&str] = &["2021-04-01", "2022-09-01", "2024-03-01", "2024-11-01"];
const NETWORK_VERSIONS: &[&str] = &["2024-03-01"];
/// The api-versions of virtual machines, sizes (`skus` has one of its own) and usages.
pub(super) const COMPUTE_VERSIONS: &[&str] = &["2024-07-01"];
const DISK_VERSIONS: &[&str] = &["2024-03-02"];
/// The api-versions of `skus`.
pub(super) const SKU_VERSIONS: &[&str] = &["2021-07-01"];

const fn network(plural: &'static str, put: &'static Shape, zonal: bool) -> Kind {
    Kind {
        namespace: "Microsoft.Network",
        plural,
        versions: NETWORK_VERSIONS,
        dialect: Dialect::Network,
        put,
        patch: &shapes::TAGS,
        created: 201,
        name_length: 80,
        zonal,
    }
}

/// All resource types.
pub(super) static KINDS: [Kind; 8] = [
    network("virtualNetworks", &shapes::VIRTUAL_NETWORK, false),
    network("networkSecurityGroups", &shapes::SECURITY_GROUP, false),
    network("publicIPAddresses", &shapes::PUBLIC_ADDRESS, true),
    network("natGateways", &shapes::NAT_GATEWAY, true),
    network("loadBalancers", &shapes::LOAD_BALANCER, false),
    network("networkInterfaces", &shapes::NETWORK_INTERFACE, false),
    Kind {
        namespace: "Microsoft.Compute",
        plural: "disks",
        versions: DISK_VERSIONS,
        dialect: Dialect::Compute,
        put: &shapes::DISK,
        patch: &shapes::DISK_UPDATE,
        created: 202,
        name_length: 80,
        zonal: true,
    },
    Kind {
        namespace: "Microsoft.Compute",
        plural: "virtualMachines",
        versions: COMPUTE_VERSIONS,
        dialect: Dialect::Compute,
        put: &shapes::VIRTUAL_MACHINE,
        patch: &shapes::TAGS,
        created: 201,
        name_length: 64,
        zonal: true,
    },
];

impl Kind {
    /// The type of this name; case doesn't matter.
    pub(super) fn find(namespace: &str, plural: &str) -> Option<&'static Self> {
        KINDS
            .iter()
            .find(|k| k.namespace.eq_ignore_ascii_case(namespace) && k.plural.eq_ignore_ascii_case(plural))
    }

    /// The type of this name, in whichever namespace.
    pub(super) fn named(plural: &str) -> Option<&'static Self> {
        KINDS.iter().find(|k| k.plural.eq_ignore_ascii_case(plural))
    }

    /// `Microsoft.Network/virtualNetworks`.
    pub(super) fn full(&self) -> String {
        format!("{}/{}", self.namespace, self.plural)
    }

    /// Checks a name as the resource provider does.
    pub(super) fn check_name(&self, name: &str) -> Result<(), Refusal> {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let good = (1..=self.name_length).contains(&name.len())
            && name.chars().all(inner)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        if good {
            return Ok(());
        }
        Err(match self.dialect {
            Dialect::Compute => Refusal::new(
                400,
                "InvalidParameter",
                format!(
                    "The entity name 'name' is invalid according to its validation rule: '{name}' has to be 1 to {} letters, \
                     digits, `_`, `.` or `-`, begin with a letter or digit and not end with `.` or `-`.",
                    self.name_length
                ),
            )
            .target("name"),
            Dialect::Network | Dialect::Resources => Refusal::new(
                400,
                "InvalidResourceName",
                format!(
                    "Resource name {name} is invalid. The name can be up to {} characters long. It must begin with a word \
                     character, and it must end with a word character or with '_'. The name may contain word characters or \
                     '.', '-', '_'.",
                    self.name_length
                ),
            ),
        })
    }
}
