//! What a machine room needs to know: machines with their addresses, disks and first-boot data, load balancers with what they
//! lead to, and what changes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::store::{Resource, Store, child, text};

/// Whether a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// It runs.
    Running,
    /// Stopped from inside or by `powerOff`; still paid for.
    Stopped,
    /// Stopped by `deallocate`.
    Deallocated,
}

impl Power {
    /// As in `PowerState/...`.
    pub(super) const fn code(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Deallocated => "deallocated",
        }
    }
}

/// Something that a machine room has to follow.
#[derive(Clone, Debug)]
pub enum Event {
    /// A machine has been made, and runs.
    Created(Box<VirtualMachine>),
    /// A machine was started or stopped.
    Power {
        /// The machine's id.
        id: String,
        /// What it is now.
        power: Power,
    },
    /// A machine is gone.
    Deleted {
        /// Its id.
        id: String,
        /// Its name.
        name: String,
    },
    /// A disk is gone, and what was on it.
    DiskDeleted {
        /// Its id.
        id: String,
        /// Its name.
        name: String,
    },
}

/// A machine.
#[derive(Clone, Debug)]
pub struct VirtualMachine {
    /// Its resource id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its `vmId`: another machine of the same name has another one.
    pub vm_id: String,
    /// Its resource group.
    pub group: String,
    /// Its host name.
    pub computer_name: String,
    /// The location.
    pub location: String,
    /// The zone, where it's in one.
    pub zone: Option<String>,
    /// Its size.
    pub size: String,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// Its `provisioningState`.
    pub provisioning: String,
    /// Whether it runs; `None` while it's being made, or where that failed.
    pub power: Option<Power>,
    /// The primary interface's primary address.
    pub private_address: Option<Ipv4Addr>,
    /// The public address of the same, where it has one.
    pub public_address: Option<Ipv4Addr>,
    /// The subnet's address range.
    pub subnet: Option<String>,
    /// Custom data, decoded.
    pub custom_data: Option<Vec<u8>>,
    /// `publisher:offer:sku:version`, or an image's id.
    pub image: String,
    /// The user made at first boot.
    pub admin: Option<String>,
    /// Disks attached besides the system disk.
    pub data_disks: Vec<DataDisk>,
}

/// A disk attached to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDisk {
    /// Its logical unit number: the machine sees `/dev/disk/azure/scsi1/lun<n>`.
    pub lun: i64,
    /// The disk's resource id.
    pub id: String,
    /// The disk's name.
    pub name: String,
    /// Its `uniqueId`: another disk of the same name has another one.
    pub unique_id: String,
    /// Its size.
    pub size_gib: i64,
}

/// A load balancer.
#[derive(Clone, Debug)]
pub struct LoadBalancer {
    /// Its resource id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// One rule of a load balancer: where it listens, and where that leads.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// The frontend's address, public or private.
    pub address: Option<Ipv4Addr>,
    /// Whether that's a public address.
    pub public: bool,
    /// The port there.
    pub port: u16,
    /// `Tcp`, `Udp` or `All`.
    pub protocol: String,
    /// The port of the machines.
    pub backend_port: u16,
    /// The machines behind it.
    pub backends: Vec<Backend>,
    /// How it's found out which of them are healthy.
    pub probe: Option<Probe>,
}

/// A member of a backend pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its private address.
    pub address: Ipv4Addr,
    /// The id of the machine that has it, where one does.
    pub machine: Option<String>,
}

/// A health probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// `Tcp`, `Http` or `Https`.
    pub protocol: String,
    /// The port asked.
    pub port: u16,
    /// The path asked, by HTTP and HTTPS.
    pub path: Option<String>,
    /// Seconds between two questions.
    pub interval: u64,
    /// How many wrong answers in a row take a machine out.
    pub threshold: u64,
}

impl Store {
    pub(super) fn virtual_machine(&self, id: &str) -> Option<VirtualMachine> {
        let vm = self.get(id)?;
        let body = Value::Object(vm.body.clone());
        let at = |pointer: &str| text(&body, pointer).map(str::to_owned);
        let interface = primary(
            body.pointer("/properties/networkProfile/networkInterfaces"),
            "/properties/primary",
        )
        .and_then(|n| self.get(text(n, "/id")?));
        let configuration =
            interface.and_then(|n| primary(n.properties().get("ipConfigurations"), "/properties/primary"));
        let subnet = configuration.and_then(|c| {
            let id = text(c, "/properties/subnet/id")?;
            let network = self.owner(id)?;
            let subnet = child(network.properties(), "subnets", id.rsplit('/').next()?)?;
            text(subnet, "/properties/addressPrefix").map(str::to_owned)
        });
        let private_address = configuration.and_then(|c| text(c, "/properties/privateIPAddress")?.parse().ok());
        let public_address =
            configuration.and_then(|c| self.public_address(text(c, "/properties/publicIPAddress/id")?));
        let image = at("/properties/storageProfile/imageReference/id").unwrap_or_else(|| {
            ["publisher", "offer", "sku", "version"]
                .map(|p| at(&format!("/properties/storageProfile/imageReference/{p}")).unwrap_or_default())
                .join(":")
        });
        let data_disks = body
            .pointer("/properties/storageProfile/dataDisks")
            .and_then(Value::as_array);
        Some(VirtualMachine {
            id: vm.id.clone(),
            name: vm.name.clone(),
            vm_id: at("/properties/vmId").unwrap_or_default(),
            group: vm.group.clone(),
            computer_name: at("/properties/osProfile/computerName").unwrap_or_else(|| vm.name.clone()),
            location: vm.location().to_owned(),
            zone: vm.zone().map(str::to_owned),
            size: at("/properties/hardwareProfile/vmSize").unwrap_or_default(),
            tags: strings(vm.body.get("tags")),
            provisioning: vm.state.as_str().to_owned(),
            power: vm.power,
            private_address,
            public_address,
            subnet,
            custom_data: at("/properties/osProfile/customData").and_then(|d| STANDARD.decode(d).ok()),
            image,
            admin: at("/properties/osProfile/adminUsername"),
            data_disks: data_disks
                .into_iter()
                .flatten()
                .filter_map(|d| self.data_disk(d))
                .collect(),
        })
    }

    fn data_disk(&self, attached: &Value) -> Option<DataDisk> {
        let disk = self.get(text(attached, "/managedDisk/id")?)?;
        Some(DataDisk {
            lun: attached.get("lun")?.as_i64()?,
            id: disk.id.clone(),
            name: disk.name.clone(),
            unique_id: disk.unique_id(),
            size_gib: disk.properties().get("diskSizeGB").and_then(Value::as_i64).unwrap_or(0),
        })
    }

    /// The address that a public address stands for.
    pub(super) fn public_address(&self, id: &str) -> Option<Ipv4Addr> {
        let resource = self.get(id)?;
        if let Some(given) = self.given.get(&resource.name.to_ascii_lowercase()) {
            return Some(*given);
        }
        if self.options.public_is_private
            && let Some(address) = self.private_behind(id)
        {
            return Some(address);
        }
        resource.properties().get("ipAddress")?.as_str()?.parse().ok()
    }

    /// The private address of the interface that has this public address.
    fn private_behind(&self, id: &str) -> Option<Ipv4Addr> {
        self.of_kind("networkInterfaces")
            .flat_map(|n| {
                n.properties()
                    .get("ipConfigurations")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
            })
            .find(|c| text(c, "/properties/publicIPAddress/id").is_some_and(|i| i.eq_ignore_ascii_case(id)))
            .and_then(|c| text(c, "/properties/privateIPAddress")?.parse().ok())
    }

    pub(super) fn load_balancer(&self, balancer: &Resource) -> LoadBalancer {
        let properties = balancer.properties();
        let rules = properties.get("loadBalancingRules").and_then(Value::as_array);
        LoadBalancer {
            id: balancer.id.clone(),
            name: balancer.name.clone(),
            rules: rules
                .into_iter()
                .flatten()
                .filter_map(|r| self.rule(properties, r))
                .collect(),
        }
    }

    fn rule(&self, properties: &Map<String, Value>, rule: &Value) -> Option<Rule> {
        let frontend = named(
            properties,
            "frontendIPConfigurations",
            text(rule, "/properties/frontendIPConfiguration/id")?,
        )?;
        let public = text(frontend, "/properties/publicIPAddress/id");
        let address = match public {
            Some(id) => self.public_address(id),
            None => text(frontend, "/properties/privateIPAddress").and_then(|a| a.parse().ok()),
        };
        let pools = rule
            .pointer("/properties/backendAddressPools")
            .and_then(Value::as_array);
        let pools = pools
            .into_iter()
            .flatten()
            .chain(rule.pointer("/properties/backendAddressPool"));
        let pools: Vec<&str> = pools.filter_map(|p| text(p, "/id")).collect();
        let probe = text(rule, "/properties/probe/id").and_then(|id| named(properties, "probes", id));
        let port = |pointer: &str| u16::try_from(rule.pointer(pointer)?.as_u64()?).ok();
        Some(Rule {
            name: text(rule, "/name")?.to_owned(),
            address,
            public: public.is_some(),
            port: port("/properties/frontendPort")?,
            protocol: text(rule, "/properties/protocol")?.to_owned(),
            backend_port: port("/properties/backendPort")?,
            backends: self.backends(&pools),
            probe: probe.and_then(probe_of),
        })
    }

    fn backends(&self, pools: &[&str]) -> Vec<Backend> {
        let uses = self.uses();
        let mut backends = Vec::new();
        for interface in self.of_kind("networkInterfaces") {
            let machine = uses.of(&interface.id).first().cloned();
            let configurations = interface.properties().get("ipConfigurations").and_then(Value::as_array);
            for configuration in configurations.into_iter().flatten() {
                let member = configuration
                    .pointer("/properties/loadBalancerBackendAddressPools")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                    .filter_map(|p| text(p, "/id"))
                    .any(|p| pools.iter().any(|pool| pool.eq_ignore_ascii_case(p)));
                if let Some(address) = text(configuration, "/properties/privateIPAddress").and_then(|a| a.parse().ok())
                    && member
                {
                    backends.push(Backend {
                        address,
                        machine: machine.clone(),
                    });
                }
            }
        }
        backends
    }
}

fn probe_of(probe: &Value) -> Option<Probe> {
    let number = |name: &str| probe.pointer(&format!("/properties/{name}")).and_then(Value::as_u64);
    Some(Probe {
        protocol: text(probe, "/properties/protocol")?.to_owned(),
        port: u16::try_from(number("port")?).ok()?,
        path: text(probe, "/properties/requestPath").map(str::to_owned),
        interval: number("intervalInSeconds").unwrap_or(15),
        threshold: number("probeThreshold")
            .or_else(|| number("numberOfProbes"))
            .unwrap_or(1),
    })
}

/// The member of a list of a load balancer that an id names.
fn named<'a>(properties: &'a Map<String, Value>, list: &str, id: &str) -> Option<&'a Value> {
    child(properties, list, id.rsplit('/').next()?)
}

/// The member of a list that is marked as primary, or else the first.
pub(super) fn primary<'a>(list: Option<&'a Value>, mark: &str) -> Option<&'a Value> {
    let list = list?.as_array()?;
    list.iter()
        .find(|item| item.pointer(mark) == Some(&Value::Bool(true)))
        .or_else(|| list.first())
}

/// Tags as a map.
pub(super) fn strings(value: Option<&Value>) -> BTreeMap<String, String> {
    let tags = value.and_then(Value::as_object);
    tags.into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
        .collect()
}
