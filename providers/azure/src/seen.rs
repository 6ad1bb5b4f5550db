//! What Azure shows, and what it comes to in the provider's types. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use kprov_types::machine::{DataVolume, Disk, Endpoint, Machine, MachineState, Network};
use kprov_types::{ClusterName, MachineName, Role};
use serde_json::Value;

use crate::kind::{CLUSTER_TAG, Kind, MACHINE_TAG, Names, RANGE_TAG, ROLE_TAG, data_disk};

/// Where a machine finds its data disk: by the links of Azure's udev rules (the new ones, then the old ones), else by the name
/// that the first data disk has where there is a temporary disk.
const DEVICES: [&str; 3] = [
    "/dev/disk/azure/data/by-lun/0",
    "/dev/disk/azure/scsi1/lun0",
    "/dev/sdc",
];

/// A resource as it was read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Seen {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) tags: BTreeMap<String, String>,
    /// Everything.
    pub(crate) raw: Value,
}

impl Seen {
    pub(crate) fn new(kind: Kind, raw: Value) -> Self {
        let text = |name: &str| raw.get(name).and_then(Value::as_str).unwrap_or("").to_owned();
        Self {
            kind,
            name: text("name"),
            id: text("id"),
            tags: tags(&raw),
            raw,
        }
    }

    pub(crate) fn text(&self, pointer: &str) -> Option<&str> {
        self.raw.pointer(pointer)?.as_str().filter(|t| !t.is_empty())
    }

    pub(crate) fn list(&self, pointer: &str) -> &[Value] {
        self.raw
            .pointer(pointer)
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice)
    }

    pub(crate) fn etag(&self) -> Option<&str> {
        self.text("/etag")
    }

    pub(crate) fn zone(&self) -> Option<&str> {
        self.text("/zones/0")
    }

    /// Its `provisioningState`, in lower case.
    pub(crate) fn provisioning(&self) -> String {
        self.text("/properties/provisioningState")
            .unwrap_or("")
            .to_ascii_lowercase()
    }

    pub(crate) fn is_provisioned(&self) -> bool {
        self.provisioning() == "succeeded"
    }

    pub(crate) fn is_of(&self, cluster: &ClusterName) -> bool {
        self.tags.get(CLUSTER_TAG).is_some_and(|c| c == cluster.as_str())
    }

    /// The machine that it belongs to.
    pub(crate) fn machine(&self) -> Option<MachineName> {
        MachineName::new(self.tags.get(MACHINE_TAG)?).ok()
    }

    fn role(&self) -> Role {
        match self.tags.get(ROLE_TAG).map(String::as_str) {
            Some("control-plane") => Role::ControlPlane,
            _ => Role::Worker,
        }
    }

    /// Whether a managed disk is attached to something.
    pub(crate) fn is_attached(&self) -> bool {
        self.text("/managedBy").is_some()
    }

    /// The run-time state of a machine, such as `running`.
    pub(crate) fn power(&self) -> Option<&str> {
        let statuses = self.list("/properties/instanceView/statuses").iter();
        let mut codes = statuses.filter_map(|s| s.get("code")?.as_str());
        codes.find_map(|code| code.strip_prefix("PowerState/"))
    }

    fn address(&self, pointer: &str) -> Option<IpAddr> {
        self.text(pointer)?.parse().ok()
    }

    /// The private address of a network interface.
    pub(crate) fn private_address(&self) -> Option<IpAddr> {
        self.address("/properties/ipConfigurations/0/properties/privateIPAddress")
    }

    /// The address of a public IP address.
    pub(crate) fn public_address(&self) -> Option<IpAddr> {
        self.address("/properties/ipAddress")
    }

    /// The managed disk at LUN 0 of a machine.
    pub(crate) fn attached_disk(&self) -> Option<&str> {
        let disks = self.list("/properties/storageProfile/dataDisks").iter();
        let disk = disks
            .filter(|d| d["lun"] == 0)
            .find_map(|d| d.pointer("/managedDisk/id"));
        disk?.as_str()
    }
}

/// The tags of a resource or a resource group.
pub(crate) fn tags(raw: &Value) -> BTreeMap<String, String> {
    let tags = raw.get("tags").and_then(Value::as_object);
    let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
    tags.into_iter().flatten().filter_map(text).collect()
}

/// What state a machine is in. One whose provisioning failed and that doesn't run counts as stopped: putting it again is what
/// Azure says to do then.
pub(crate) fn state(provisioning: &str, power: Option<&str>) -> MachineState {
    match (provisioning, power) {
        ("deleting", _) => MachineState::Terminating,
        ("creating", _) => MachineState::Pending,
        ("failed" | "canceled", Some("running")) => MachineState::Running,
        ("failed" | "canceled", _) | (_, Some("stopped" | "deallocated")) => MachineState::Stopped,
        (_, Some("starting" | "stopping" | "deallocating")) => MachineState::Pending,
        (_, Some("running")) | ("succeeded", _) => MachineState::Running,
        _ => MachineState::Pending,
    }
}

/// A machine from its parts.
pub(crate) fn machine(vm: &Seen, power: Option<&str>, nic: Option<&Seen>, public: Option<&Seen>) -> Option<Machine> {
    Some(Machine {
        name: vm.machine()?,
        role: vm.role(),
        id: vm.id.clone(),
        address: nic.and_then(Seen::private_address),
        external_address: public.and_then(Seen::public_address),
        zone: vm.zone().map(ToOwned::to_owned),
        state: state(&vm.provisioning(), power),
    })
}

/// A data disk.
pub(crate) fn disk(seen: &Seen) -> Option<Disk> {
    let machine = seen.machine().filter(|m| seen.name == data_disk(m))?;
    if seen.provisioning() == "deleting" {
        return None;
    }
    let size = seen.raw.pointer("/properties/diskSizeGB").and_then(Value::as_u64);
    Some(Disk {
        machine,
        id: seen.id.clone(),
        size_gib: size.and_then(|s| u32::try_from(s).ok()),
        volume: DataVolume::Device(DEVICES.map(ToOwned::to_owned).to_vec()),
    })
}

/// The parts of a network, those of one cluster alone.
#[derive(Debug, Default)]
pub(crate) struct NetworkParts {
    pub(crate) group_tags: BTreeMap<String, String>,
    pub(crate) parts: Vec<Seen>,
}

impl NetworkParts {
    pub(crate) fn find(&self, kind: Kind, name: &str) -> Option<&Seen> {
        // Names of resources are the same whatever their case.
        self.parts
            .iter()
            .find(|s| s.kind == kind && s.name.eq_ignore_ascii_case(name))
    }

    /// The range, from the virtual network, else from what it was to be when the first part was made.
    pub(crate) fn range(&self, names: &Names) -> Option<Ipv4Net> {
        let there = self.find(Kind::VirtualNetwork, &names.virtual_network());
        let there = there.and_then(|n| n.text("/properties/addressSpace/addressPrefixes/0"));
        let tagged = self.parts.iter().find_map(|p| p.tags.get(RANGE_TAG));
        there
            .or(tagged.map(String::as_str))
            .or_else(|| self.group_tags.get(RANGE_TAG).map(String::as_str))
            .and_then(|r| r.parse().ok())
    }

    /// The endpoint, once it has an address.
    pub(crate) fn endpoint(&self, names: &Names) -> Option<Endpoint> {
        let balancer = self.find(Kind::LoadBalancer, &names.api())?;
        let front = "/properties/frontendIPConfigurations/0/properties";
        let inside = balancer.text(&format!("{front}/privateIPAddress"));
        let outside = || self.find(Kind::PublicIp, &names.api())?.text("/properties/ipAddress");
        let port = balancer
            .raw
            .pointer("/properties/loadBalancingRules/0/properties/frontendPort");
        Some(Endpoint {
            host: inside.or_else(outside)?.to_owned(),
            port: port.and_then(Value::as_u64).and_then(|p| u16::try_from(p).ok())?,
        })
    }

    /// The network, if anything of it is there. `is_open` says whether a security group lets in who should come in.
    pub(crate) fn network(
        &self,
        names: &Names,
        private: bool,
        is_open: impl Fn(&Seen, u16) -> bool,
    ) -> Option<Network> {
        if self.parts.is_empty()
            && self
                .group_tags
                .get(CLUSTER_TAG)
                .is_none_or(|c| c != names.cluster.as_str())
        {
            return None;
        }
        let endpoint = self.endpoint(names);
        let there = |kind, name: &str| self.find(kind, name).filter(|s| s.is_provisioned());
        let subnet = there(Kind::VirtualNetwork, &names.virtual_network()).is_some_and(|n| {
            let has = |what: &str| n.text(&format!("/properties/subnets/0/properties/{what}/id")).is_some();
            has("networkSecurityGroup") && has("natGateway")
        });
        let port = endpoint.as_ref().map_or(0, |e| e.port);
        let complete = subnet
            && endpoint.is_some()
            && there(Kind::SecurityGroup, &names.security_group()).is_some_and(|g| is_open(g, port))
            && there(Kind::NatGateway, &names.nat()).is_some()
            && there(Kind::PublicIp, &names.nat()).is_some()
            && there(Kind::LoadBalancer, &names.api()).is_some()
            && (private || there(Kind::PublicIp, &names.api()).is_some());
        Some(Network {
            cidr: self.range(names)?,
            endpoint: endpoint.unwrap_or_else(|| Endpoint {
                host: String::new(),
                port: kprov_types::ports::API,
            }),
            host_address: None,
            complete,
        })
    }
}

/// The first /16 of 10.0.0.0/8 that overlaps none of those used. It keeps out of 10.96.0.0/11 and above, where clusters have their
/// Services and pods.
pub(crate) fn free_range(used: &[Ipv4Net]) -> Option<Ipv4Net> {
    let overlap = |a: &Ipv4Net, b: &Ipv4Net| a.contains(&b.network()) || b.contains(&a.network());
    (0..96)
        .filter_map(|n| Ipv4Net::new([10, n, 0, 0].into(), 16).ok())
        .find(|range| !used.iter().any(|u| overlap(range, u)))
}

/// The ranges of virtual networks.
pub(crate) fn ranges(networks: &[Seen]) -> Vec<Ipv4Net> {
    let prefixes = networks
        .iter()
        .flat_map(|n| n.list("/properties/addressSpace/addressPrefixes"));
    prefixes.filter_map(|p| p.as_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names() -> Names {
        Names {
            cluster: ClusterName::new("demo").unwrap(),
            group: "kprov-demo".into(),
            group_id: "/subscriptions/s/resourceGroups/kprov-demo".into(),
        }
    }

    #[test]
    fn states_of_machines() {
        let cases = [
            ("creating", None, MachineState::Pending),
            ("creating", Some("running"), MachineState::Pending),
            ("succeeded", Some("running"), MachineState::Running),
            ("succeeded", None, MachineState::Running),
            ("updating", Some("running"), MachineState::Running),
            ("updating", None, MachineState::Pending),
            ("succeeded", Some("starting"), MachineState::Pending),
            ("succeeded", Some("stopped"), MachineState::Stopped),
            ("updating", Some("deallocated"), MachineState::Stopped),
            ("deleting", Some("running"), MachineState::Terminating),
            ("failed", Some("running"), MachineState::Running),
            ("failed", Some("stopped"), MachineState::Stopped),
            ("failed", None, MachineState::Stopped),
        ];
        for (provisioning, power, expected) in cases {
            assert_eq!(state(provisioning, power), expected, "{provisioning} {power:?}");
        }
    }

    #[test]
    fn a_machine_is_put_together() {
        let vm = Seen::new(
            Kind::Machine,
            json!({"name": "demo-cp-0", "id": "/x", "zones": ["2"], "tags": {"kprov-cluster": "demo", "kprov-machine": "demo-cp-0",
                "kprov-role": "control-plane"}, "properties": {"provisioningState": "Succeeded", "instanceView": {"statuses": [
                {"code": "ProvisioningState/succeeded"}, {"code": "PowerState/running"}]}}}),
        );
        let nic = Seen::new(
            Kind::Nic,
            json!({"properties": {"ipConfigurations": [{"properties": {"privateIPAddress": "10.0.0.4"}}]}}),
        );
        let public = Seen::new(Kind::PublicIp, json!({"properties": {"ipAddress": "203.0.113.9"}}));
        let machine = machine(&vm, vm.power(), Some(&nic), Some(&public)).unwrap();
        assert_eq!(machine.role, Role::ControlPlane);
        assert_eq!(machine.state, MachineState::Running);
        assert_eq!(machine.zone.as_deref(), Some("2"));
        assert_eq!(machine.address, Some("10.0.0.4".parse().unwrap()));
        assert_eq!(machine.external_address, Some("203.0.113.9".parse().unwrap()));
    }

    #[test]
    fn system_disks_are_no_data_disks() {
        let disk_called = |name: &str| {
            Seen::new(
                Kind::Disk,
                json!({"name": name, "tags": {"kprov-machine": "demo-cp-0"}, "properties": {"diskSizeGB": 8}}),
            )
        };
        assert_eq!(disk(&disk_called("demo-cp-0-data")).unwrap().size_gib, Some(8));
        assert_eq!(disk(&disk_called("demo-cp-0-os")), None);
    }

    #[test]
    fn a_network_is_there_from_its_first_part_on() {
        let mut network = NetworkParts::default();
        let open = |_: &Seen, _: u16| true;
        assert_eq!(network.network(&names(), false, open), None);
        network.group_tags = [
            (CLUSTER_TAG.to_owned(), "demo".to_owned()),
            (RANGE_TAG.to_owned(), "10.3.0.0/16".to_owned()),
        ]
        .into();
        let seen = network.network(&names(), false, open).unwrap();
        assert_eq!(seen.cidr, "10.3.0.0/16".parse().unwrap());
        assert!(!seen.complete);
        // Somebody else's group with nothing of the cluster in it is no network.
        network.group_tags.insert(CLUSTER_TAG.to_owned(), "other".to_owned());
        assert_eq!(network.network(&names(), false, open), None);
    }

    #[test]
    fn free_ranges() {
        let used = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<_>>();
        assert_eq!(free_range(&[]), "10.0.0.0/16".parse().ok());
        assert_eq!(
            free_range(&used(&["10.0.5.0/24", "10.1.0.0/16"])),
            "10.2.0.0/16".parse().ok()
        );
        assert_eq!(free_range(&used(&["10.0.0.0/8"])), None);
    }
}
