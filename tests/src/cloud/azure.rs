//! The ARM server's machines, made real.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnet::Ipv4Net;
use kprov_emulators::azure::{self, Arm, Fault, Options, Power, VirtualMachine, What};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::scenario::{Cloud, Everything};
use super::{Balancer, Emulator, HealthCheck, Instance, Listener, Picture, Probe, Room, Volume};

/// The location that tests use.
const LOCATION: &str = "westeurope";
/// How long every operation of the server takes.
const SETTLE: Duration = Duration::from_millis(300);

/// An Azure on this host: the ARM server, and a room with its machines.
pub struct Azure {
    /// The machines.
    pub room: Room,
    /// The server.
    pub arm: Arc<Arm>,
    private: bool,
    // The server's, until all else has gone.
    _runtime: Runtime,
}

impl Azure {
    /// Starts it all. `range` is the virtual network's; `name` the room's; `private` whether clusters get no public addresses.
    pub fn start(name: &str, range: Ipv4Net, private: bool) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let options = Options {
            settle: SETTLE,
            public_is_private: true,
            ..Options::default()
        };
        let arm = Arc::new(runtime.block_on(Arm::start(options))?);
        let watch = Watch {
            arm: arm.clone(),
            sizes: BTreeMap::new(),
        };
        let room = Room::open(name, range, watch)?;
        // The first address that doesn't belong to a machine is the load balancer's.
        let front = room.balancer_address();
        arm.configure(|options| options.public_addresses = vec![front]);
        Ok(Self {
            room,
            arm,
            private,
            _runtime: runtime,
        })
    }
}

impl Cloud for Azure {
    fn provider(&self) -> &'static str {
        "azure"
    }

    fn room(&self) -> &Room {
        &self.room
    }

    fn settings(&self) -> Value {
        json!({
            "subscription": self.arm.subscription(), "location": LOCATION, "endpointUrl": self.arm.endpoint(),
            "private": self.private,
        })
    }

    fn zones(&self) -> Vec<String> {
        ["1", "2", "3"].map(str::to_owned).to_vec()
    }

    fn environment(&self) -> Vec<(String, String)> {
        self.arm
            .identity_variables()
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec()
    }

    fn everything(&self) -> Result<Everything> {
        let mut all = Everything::new();
        for id in self.arm.resources() {
            let mut parts = id.rsplit('/');
            let name = parts.next().unwrap_or_default().to_owned();
            all.entry(parts.next().unwrap_or_default().to_owned())
                .or_default()
                .insert(name);
        }
        Ok(all)
    }

    fn calls(&self) -> BTreeMap<String, u64> {
        self.arm.record.calls()
    }

    fn forget_calls(&self) {
        self.arm.record.reset();
    }

    fn instance(&self, machine: &str) -> Result<String> {
        let machines = self.arm.virtual_machines();
        machines
            .into_iter()
            .find(|m| m.name == machine)
            .map(|m| room_id(&m))
            .with_context(|| format!("no machine is called `{machine}`"))
    }

    fn delete_by_hand(&self, machine: &str) -> Result<()> {
        ensure!(self.arm.delete_by_hand(machine), "no machine is called `{machine}`");
        Ok(())
    }

    fn hold_after(&self, calls: u64) {
        self.hold_none();
        self.arm.fault(Fault::on("*", What::HangBefore).after(calls).always());
    }

    fn hold_none(&self) {
        self.arm.clear_faults();
    }
}

/// The server as a room looks at it.
struct Watch {
    arm: Arc<Arm>,
    /// How large disks are that were attached once.
    sizes: BTreeMap<String, u64>,
}

impl Emulator for Watch {
    fn look(&mut self) -> Result<Picture> {
        let machines = self.arm.virtual_machines();
        let there = self.arm.disks();
        let mut attached = BTreeMap::new();
        for machine in &machines {
            for disk in &machine.data_disks {
                self.sizes.insert(disk.unique_id.clone(), disk.size_gib.unsigned_abs());
                let place = format!("/dev/disk/azure/scsi1/lun{}", disk.lun);
                attached.insert(disk.unique_id.clone(), (room_id(machine), vec![place]));
            }
        }
        self.sizes.retain(|disk, _| there.contains(disk));
        Ok(Picture {
            instances: machines.into_iter().filter_map(instance).collect(),
            volumes: self
                .sizes
                .iter()
                .map(|(disk, size)| Volume {
                    id: disk.clone(),
                    size_gib: *size,
                    attached: attached.remove(disk),
                })
                .collect(),
            balancers: self.arm.load_balancers().into_iter().map(balancer).collect(),
        })
    }
}

/// What the room calls a machine: its name may be another one's a moment later.
fn room_id(machine: &VirtualMachine) -> String {
    format!("vm-{}", machine.vm_id)
}

/// A machine that runs or has run; one that is only being made has no power yet.
fn instance(machine: VirtualMachine) -> Option<Instance> {
    Some(Instance {
        running: machine.power? == Power::Running,
        address: machine.private_address?,
        id: room_id(&machine),
        hostname: machine.computer_name,
        user_data: machine.custom_data.unwrap_or_default(),
        metadata: BTreeMap::new(),
    })
}

fn balancer(balancer: azure::LoadBalancer) -> Balancer {
    let rules = balancer.rules.into_iter().filter(|rule| rule.protocol == "Tcp");
    let mut address = None;
    let listeners = rules.map(|rule| {
        address = address.or(rule.address);
        Listener {
            port: rule.port,
            targets: rule
                .backends
                .iter()
                .map(|b| SocketAddrV4::new(b.address, rule.backend_port))
                .collect(),
            health: health(rule.probe),
            fails_open: false,
        }
    });
    Balancer {
        id: balancer.id,
        listeners: listeners.collect(),
        address,
    }
}

fn health(probe: Option<azure::Probe>) -> HealthCheck {
    let Some(probe) = probe else {
        // Without a probe all are healthy: one that is refused at once tells the balancer no more than a client.
        return HealthCheck {
            probe: Probe::Tcp,
            port: None,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(5),
            healthy: 1,
            unhealthy: u32::MAX,
        };
    };
    HealthCheck {
        probe: match probe.protocol.as_str() {
            "Tcp" => Probe::Tcp,
            other => Probe::Http {
                tls: other == "Https",
                path: probe.path.unwrap_or_else(|| "/".to_owned()),
            },
        },
        port: Some(probe.port),
        interval: Duration::from_secs(probe.interval),
        timeout: Duration::from_secs(probe.interval),
        healthy: 1,
        unhealthy: u32::try_from(probe.threshold.max(1)).unwrap_or(u32::MAX),
    }
}
