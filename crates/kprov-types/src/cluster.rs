//! What a person asks for: the cluster file, as written ([`ClusterFile`]) and as checked ([`ClusterSpec`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::infrastructure::{AwsSettings, AzureSettings, BaremetalSettings};
use crate::machine::Role;
use crate::names::{ClusterName, MachineName};
use crate::release::API_VERSION;
use crate::version::KubernetesVersion;

/// A cluster file as written. Everything but the name has a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(title = "kprov cluster file")]
pub struct ClusterFile {
    /// `kprov.io/v1alpha1`.
    pub api_version: String,
    /// `Cluster`.
    pub kind: String,
    /// Name of the cluster.
    pub metadata: Metadata,
    /// What the cluster should be.
    #[serde(default)]
    pub spec: FileSpec,
}

/// The `metadata` of a cluster file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// The cluster's name: a DNS label of at most 40 characters.
    pub name: ClusterName,
}

/// The `spec` of a cluster file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct FileSpec {
    /// Where the machines are.
    pub provider: Provider,
    /// Failure domains to spread machines over, in the provider's terms; all that the region has where left out.
    pub zones: Vec<String>,
    /// The machines' image, in the provider's terms; its default (Debian 12) where left out.
    pub image: Option<String>,
    /// Which Kubernetes.
    pub kubernetes: Kubernetes,
    /// The control-plane machines.
    pub control_plane: ControlPlane,
    /// The worker machines.
    pub workers: Workers,
    /// Address ranges and names.
    pub network: NetworkSettings,
    /// What only AWS has.
    pub aws: AwsSettings,
    /// What only Azure has.
    pub azure: AzureSettings,
    /// What only bare metal has.
    pub baremetal: BaremetalSettings,
}

/// The providers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// Machines as namespaces on this host.
    #[default]
    Local,
    /// Amazon EC2.
    Aws,
    /// Microsoft Azure.
    Azure,
    /// Hosts that are there already, named by an inventory file.
    Baremetal,
}

impl Provider {
    /// All of them.
    pub const ALL: &[Self] = &[Self::Local, Self::Aws, Self::Azure, Self::Baremetal];

    /// The name as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Aws => "aws",
            Self::Azure => "azure",
            Self::Baremetal => "baremetal",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no provider.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no provider `{0}`; there are `local`, `aws`, `azure` and `baremetal`")]
pub struct ProviderNameError(String);

impl FromStr for Provider {
    type Err = ProviderNameError;
    fn from_str(s: &str) -> Result<Self, ProviderNameError> {
        Self::ALL
            .iter()
            .copied()
            .find(|p| p.as_str() == s)
            .ok_or_else(|| ProviderNameError(s.to_owned()))
    }
}

/// The `kubernetes` part of a cluster file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Kubernetes {
    /// The version to start with, such as `1.36.3`; the release's own where left out. Later changes are `kprov upgrade`'s.
    pub version: Option<KubernetesVersion>,
    /// The release payload: a directory made by `kprov release create`, relative to the cluster file.
    pub release: Option<String>,
    /// Where machines fetch that payload from, tried in this order: what `kprov release serve` offers, or the same files on
    /// any HTTP server that machines reach. Where left out, `up` offers it itself, if machines can reach it.
    pub release_urls: Vec<String>,
}

/// The `controlPlane` part of a cluster file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ControlPlane {
    /// How many machines: 1, 3 or 5.
    pub count: u32,
    /// Size of the data disk for etcd, in GiB.
    pub etcd_disk_gib: u32,
    /// Whether ordinary pods may run on control-plane machines; by default only in a cluster without workers.
    pub schedulable: Option<bool>,
    /// The machines' size, in the provider's terms, such as `m7i.large` or `Standard_D2s_v5`.
    pub size: Option<String>,
}

impl Default for ControlPlane {
    fn default() -> Self {
        Self {
            count: 1,
            etcd_disk_gib: 8,
            schedulable: None,
            size: None,
        }
    }
}

/// The `workers` part of a cluster file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Workers {
    /// How many machines.
    pub count: u32,
    /// The machines' size, in the provider's terms.
    pub size: Option<String>,
}

/// The `network` part of a cluster file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// The machines' address range, `/16` to `/28`; a free one is chosen where left out.
    #[schemars(with = "Option<String>")]
    pub machines: Option<Ipv4Net>,
    /// The pods' address range; each machine gets a `/24` of it.
    #[schemars(with = "String")]
    pub pods: Ipv4Net,
    /// The Services' address range.
    #[schemars(with = "String")]
    pub services: Ipv4Net,
    /// The cluster's DNS domain.
    pub dns_domain: String,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        let net = |a: [u8; 4], prefix| Ipv4Net::new_assert(Ipv4Addr::from(a), prefix);
        Self {
            machines: None,
            pods: net([10, 244, 0, 0], 16),
            services: net([10, 96, 0, 0], 16),
            dns_domain: "cluster.local".into(),
        }
    }
}

/// A cluster as wanted, checked. Made only by [`ClusterFile::validate`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClusterSpec {
    /// Its name.
    pub name: ClusterName,
    /// Where its machines are.
    pub provider: Provider,
    /// The Kubernetes version asked for.
    pub version: Option<KubernetesVersion>,
    /// Where machines fetch their release from; empty where `up` offers it itself.
    pub release_urls: Vec<String>,
    /// Its machines. Of a provider whose machines are there already, empty until [`ClusterSpec::with_hosts`].
    pub machines: Vec<PlannedMachine>,
    /// Failure domains to spread machines over; empty for all.
    pub zones: Vec<String>,
    /// Size of each data disk, in GiB.
    pub etcd_disk_gib: u32,
    /// Whether ordinary pods may run on control-plane machines.
    pub schedulable_control_plane: bool,
    /// What was asked for with `schedulable`.
    schedulable: Option<bool>,
    /// Address ranges and names.
    pub network: NetworkSettings,
    /// What only AWS has.
    pub aws: AwsSettings,
    /// What only Azure has.
    pub azure: AzureSettings,
    /// What only bare metal has.
    pub baremetal: BaremetalSettings,
}

/// A machine that a cluster should have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedMachine {
    /// Its name.
    pub name: MachineName,
    /// Its role.
    pub role: Role,
    /// Its failure domain, where it's known beforehand.
    pub zone: Option<String>,
    /// Its size, in the provider's terms; the provider's default where left out.
    pub size: Option<String>,
    /// Its image, in the provider's terms; the provider's default where left out.
    pub image: Option<String>,
    /// Its address inside the cluster, where that is laid down and not the machine's to tell.
    pub address: Option<Ipv4Addr>,
    /// The address it's reached by from outside, where that is known beforehand.
    pub reached: Option<Ipv4Addr>,
    /// Labels of its Node.
    pub labels: BTreeMap<String, String>,
}

/// The pods' range of one machine, as a prefix length.
pub const POD_RANGE_PREFIX: u8 = 24;

/// Why a cluster file was refused. `path` is the place in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{path}`: {message}")]
pub struct SpecError {
    /// The field, such as `spec.controlPlane.count`.
    pub path: &'static str,
    /// What is wrong with it and what is allowed.
    pub message: String,
}

fn refuse<T>(path: &'static str, message: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError {
        path,
        message: message.into(),
    })
}

impl ClusterFile {
    /// A file that asks for a cluster of this name with everything at its default.
    pub fn named(name: ClusterName) -> Self {
        Self {
            api_version: API_VERSION.into(),
            kind: "Cluster".into(),
            metadata: Metadata { name },
            spec: FileSpec::default(),
        }
    }

    /// Checks what the types alone cannot.
    pub fn validate(&self) -> Result<ClusterSpec, SpecError> {
        let Self {
            api_version,
            kind,
            metadata,
            spec,
        } = self;
        let FileSpec {
            provider,
            zones,
            image,
            kubernetes,
            control_plane,
            workers,
            network,
            aws,
            azure,
            baremetal,
        } = spec;
        if api_version != API_VERSION {
            return refuse(
                "apiVersion",
                format!("`{api_version}` is not known; expected `{API_VERSION}`"),
            );
        }
        if kind != "Cluster" {
            return refuse("kind", format!("`{kind}` is not known; expected `Cluster`"));
        }
        if !matches!(control_plane.count, 1 | 3 | 5) {
            return refuse(
                "spec.controlPlane.count",
                format!(
                    "{} control-plane machines make no good etcd quorum; use 1, 3 or 5",
                    control_plane.count
                ),
            );
        }
        if workers.count > 5000 {
            return refuse(
                "spec.workers.count",
                format!("{} is more than Kubernetes supports (5000)", workers.count),
            );
        }
        if control_plane.etcd_disk_gib == 0 {
            return refuse("spec.controlPlane.etcdDiskGib", "must be at least 1");
        }
        check_network(network, control_plane.count + workers.count)?;
        let group = |role: Role, short: &str, count: u32, size: &Option<String>| {
            (0..count)
                .map(|i| format!("{}-{short}-{i}", metadata.name))
                .filter_map(|name| MachineName::new(name).ok())
                .map(|name| PlannedMachine {
                    name,
                    role,
                    zone: None,
                    size: size.clone(),
                    image: image.clone(),
                    address: None,
                    reached: None,
                    labels: BTreeMap::new(),
                })
                .collect::<Vec<_>>()
        };
        let mut machines = Vec::new();
        if *provider != Provider::Baremetal {
            machines = group(Role::ControlPlane, "cp", control_plane.count, &control_plane.size);
            machines.extend(group(Role::Worker, "worker", workers.count, &workers.size));
        }
        Ok(ClusterSpec {
            name: metadata.name.clone(),
            provider: *provider,
            version: kubernetes.version.clone(),
            release_urls: kubernetes.release_urls.clone(),
            machines,
            zones: zones.clone(),
            etcd_disk_gib: control_plane.etcd_disk_gib,
            schedulable_control_plane: control_plane.schedulable.unwrap_or(workers.count == 0),
            schedulable: control_plane.schedulable,
            network: network.clone(),
            aws: aws.clone(),
            azure: azure.clone(),
            baremetal: baremetal.clone(),
        })
    }
}

fn check_network(network: &NetworkSettings, machines: u32) -> Result<(), SpecError> {
    let NetworkSettings {
        machines: machine_range,
        pods,
        services,
        dns_domain,
    } = network;
    for (path, range) in [("spec.network.pods", pods), ("spec.network.services", services)] {
        if range.trunc() != *range {
            return refuse(
                path,
                format!("`{range}` has host bits set; did you mean `{}`?", range.trunc()),
            );
        }
    }
    if !(8..=22).contains(&pods.prefix_len()) {
        return refuse("spec.network.pods", format!("`{pods}` must be between a /8 and a /22"));
    }
    let ranges = 1_u32 << (POD_RANGE_PREFIX - pods.prefix_len());
    if machines > ranges {
        return refuse(
            "spec.network.pods",
            format!("`{pods}` has {ranges} ranges of a /{POD_RANGE_PREFIX}, but there are {machines} machines"),
        );
    }
    if !(12..=24).contains(&services.prefix_len()) {
        return refuse(
            "spec.network.services",
            format!("`{services}` must be between a /12 and a /24"),
        );
    }
    if overlap(*pods, *services) {
        return refuse(
            "spec.network.services",
            format!("`{services}` overlaps the pods' range `{pods}`"),
        );
    }
    if let Some(range) = machine_range {
        if range.trunc() != *range {
            return refuse(
                "spec.network.machines",
                format!("`{range}` has host bits set; did you mean `{}`?", range.trunc()),
            );
        }
        if !(16..=28).contains(&range.prefix_len()) {
            return refuse(
                "spec.network.machines",
                format!("`{range}` must be between a /16 and a /28"),
            );
        }
        // The network's and the broadcast address, and one for the host or gateway.
        let room = (1_u32 << (32 - range.prefix_len())) - 3;
        if machines > room {
            return refuse(
                "spec.network.machines",
                format!("`{range}` has room for {room} machines, but there are {machines}"),
            );
        }
        for (other, what) in [(pods, "pods'"), (services, "Services'")] {
            if overlap(*range, *other) {
                return refuse(
                    "spec.network.machines",
                    format!("`{range}` overlaps the {what} range `{other}`"),
                );
            }
        }
        let loopback = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
        if overlap(*range, loopback) {
            return refuse("spec.network.machines", format!("`{range}` is loopback"));
        }
    }
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if !dns_domain.split('.').all(label) {
        return refuse("spec.network.dnsDomain", format!("`{dns_domain}` is not a DNS domain"));
    }
    Ok(())
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

impl ClusterSpec {
    /// The same with the machines that an inventory names, instead of counts. `schedulable` is whether the inventory wants
    /// ordinary pods on control-plane machines; what the cluster file says goes before that.
    pub fn with_hosts(mut self, hosts: Vec<PlannedMachine>, schedulable: bool) -> Result<Self, SpecError> {
        let control_plane = hosts.iter().filter(|h| h.role == Role::ControlPlane).count();
        if !matches!(control_plane, 1 | 3 | 5) {
            return refuse(
                "spec.baremetal.inventory",
                format!("it names {control_plane} control-plane hosts, which make no good etcd quorum; use 1, 3 or 5"),
            );
        }
        check_network(&self.network, u32::try_from(hosts.len()).unwrap_or(u32::MAX))?;
        let without_workers = hosts.len() == control_plane;
        self.schedulable_control_plane = self.schedulable.unwrap_or(schedulable || without_workers);
        self.machines = hosts;
        Ok(self)
    }

    /// The names of its control-plane machines.
    pub fn control_plane(&self) -> impl Iterator<Item = &MachineName> {
        self.machines
            .iter()
            .filter(|m| m.role == Role::ControlPlane)
            .map(|m| &m.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> ClusterFile {
        ClusterFile::named(ClusterName::new("demo").unwrap())
    }

    #[test]
    fn defaults_are_valid() {
        let spec = file().validate().unwrap();
        assert!(spec.schedulable_control_plane);
        let names: Vec<_> = spec.machines.iter().map(|m| m.name.to_string()).collect();
        assert_eq!(names, ["demo-cp-0"]);
    }

    #[test]
    fn longest_name_still_names_machines() {
        let mut f = ClusterFile::named(ClusterName::new("a".repeat(ClusterName::LIMIT)).unwrap());
        f.spec.workers.count = 255;
        assert_eq!(f.validate().unwrap().machines.len(), 256);
    }

    #[test]
    fn refuses_with_the_path() {
        type Edit = fn(&mut ClusterFile);
        let cases: &[(&str, Edit)] = &[
            ("apiVersion", |f| f.api_version = "v1".into()),
            ("kind", |f| f.kind = "Custer".into()),
            ("spec.controlPlane.count", |f| f.spec.control_plane.count = 2),
            ("spec.workers.count", |f| f.spec.workers.count = 5001),
            ("spec.network.pods", |f| f.spec.workers.count = 300),
            ("spec.network.pods", |f| {
                f.spec.network.pods = "10.244.1.0/16".parse().unwrap();
            }),
            ("spec.network.services", |f| {
                f.spec.network.services = "10.244.0.0/16".parse().unwrap();
            }),
            ("spec.network.machines", |f| {
                f.spec.network.machines = Some("10.96.1.0/24".parse().unwrap());
            }),
            ("spec.network.machines", |f| {
                f.spec.network.machines = Some("192.168.7.0/30".parse().unwrap());
            }),
            ("spec.network.dnsDomain", |f| f.spec.network.dns_domain = "a..b".into()),
        ];
        for (path, edit) in cases {
            let mut f = file();
            edit(&mut f);
            assert_eq!(f.validate().unwrap_err().path, *path);
        }
    }
}
