//! moto's instances, made real.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use kprov_emulators::aws::{self, Effect, Fault, LoadBalancer, Moto, Table, TargetGroup};
use kprov_emulators::record::Record;
use serde_json::{Value, json};
use tokio::runtime::{Handle, Runtime};

use super::scenario::{Cloud, Everything, HELD};
use super::{Balancer, Emulator, HealthCheck, Instance, Listener, Picture, Probe, Room, Volume};

/// The region that tests use.
pub const REGION: &str = "eu-central-1";
/// How long what was seen is good where no call has come since.
const CALM: Duration = Duration::from_secs(3);
/// Device names of root disks, whatever moto says that an image's is.
const ROOTS: &[&str] = &["/dev/sda1", "/dev/xvda"];

/// An AWS on this host: moto behind the recording proxy, and a room with its instances.
pub struct Aws {
    /// The machines.
    pub room: Room,
    /// moto and the proxy.
    pub moto: Moto,
    /// What moto has, uncounted.
    pub table: Table,
    private: bool,
    runtime: Runtime,
}

impl Aws {
    /// Starts it all. `range` is the VPC's; `name` the room's; `private` whether clusters get no public addresses.
    pub fn start(name: &str, range: Ipv4Net, private: bool) -> Result<Self> {
        let server = std::env::var("KPROV_TEST_MOTO")
            .context("KPROV_TEST_MOTO is not set: run the tests by `cargo xtask test`")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let moto = runtime.block_on(Moto::start(Path::new(&server)))?;
        let table = moto.table(REGION);
        let watch = Watch {
            table: table.clone(),
            record: moto.record().clone(),
            runtime: runtime.handle().clone(),
            user_data: BTreeMap::new(),
            seen: None,
        };
        let room = Room::open(name, range, watch)?;
        let front = room.balancer_address();
        moto.dns_names().choose(move |_| Some(front.to_string()));
        moto.public_is_private();
        Ok(Self {
            room,
            moto,
            table,
            private,
            runtime,
        })
    }

    /// Looks at moto past the proxy.
    pub fn look<T>(&self, look: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(look)
    }
}

impl Cloud for Aws {
    fn provider(&self) -> &'static str {
        "aws"
    }

    fn room(&self) -> &Room {
        &self.room
    }

    fn settings(&self) -> Value {
        json!({"region": REGION, "endpointUrl": self.moto.endpoint(), "private": self.private})
    }

    fn zones(&self) -> Vec<String> {
        ["a", "b", "c"].iter().map(|zone| format!("{REGION}{zone}")).collect()
    }

    fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_CONFIG_FILE", "/nonexistent"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    fn everything(&self) -> Result<Everything> {
        self.look(self.table.everything())
    }

    fn calls(&self) -> BTreeMap<String, u64> {
        self.moto.record().calls()
    }

    fn forget_calls(&self) {
        self.moto.record().reset();
    }

    fn instance(&self, machine: &str) -> Result<String> {
        let instances = self.look(self.table.instances())?;
        instances
            .into_iter()
            .find(|i| name(i).as_deref() == Some(machine))
            .map(|i| i.id)
            .with_context(|| format!("no instance is called `{machine}`"))
    }

    fn delete_by_hand(&self, machine: &str) -> Result<()> {
        let id = self.instance(machine)?;
        self.look(self.table.by_hand("TerminateInstances", &[("InstanceId.1", &id)]))
    }

    fn hold_after(&self, calls: u64) {
        self.hold_none();
        self.moto.faults().add(Fault::on_all(Effect::Delay(HELD)).after(calls));
    }

    fn hold_none(&self) {
        self.moto.faults().clear();
    }
}

/// A machine's name: the provider tags what one call has made with all names as one series, such as `demo-worker-2..11..3`.
fn name(instance: &aws::Instance) -> Option<String> {
    let series = instance.tags.get("kprov.io/machine")?;
    let mut parts = series.split("..");
    let first = parts.next()?;
    let step = parts.nth(1).and_then(|s| s.parse().ok()).unwrap_or(1);
    let prefix = first.trim_end_matches(|c: char| c.is_ascii_digit());
    match first[prefix.len()..].parse::<u32>() {
        Ok(number) => Some(format!("{prefix}{}", number + step * instance.launch_index)),
        Err(_) => Some(series.clone()),
    }
}

/// moto as a room looks at it.
struct Watch {
    table: Table,
    record: Record,
    runtime: Handle,
    /// What instances were started with, which doesn't change.
    user_data: BTreeMap<String, Vec<u8>>,
    /// What was there, when that was, and how many calls had come.
    seen: Option<(Picture, Instant, u64)>,
}

impl Emulator for Watch {
    /// Each look costs moto a tenth of a second, so that where no call came there are few.
    fn look(&mut self) -> Result<Picture> {
        let calls = self.record.total();
        if let Some((picture, at, then)) = &self.seen
            && *then == calls
            && at.elapsed() < CALM
        {
            return Ok(picture.clone());
        }
        let runtime = self.runtime.clone();
        let at = Instant::now();
        let picture = runtime.block_on(self.picture())?;
        self.seen = Some((picture.clone(), at, calls));
        Ok(picture)
    }
}

impl Watch {
    async fn picture(&mut self) -> Result<Picture> {
        let mut picture = Picture::default();
        let mut roots = BTreeMap::new();
        for found in self.table.instances().await? {
            let user_data = match self.user_data.get(&found.id) {
                Some(data) => data.clone(),
                None => self.table.user_data(&found.id).await?,
            };
            self.user_data.insert(found.id.clone(), user_data.clone());
            roots.insert(found.id.clone(), found.root_device);
            let hostname = format!("ip-{}", found.address.to_string().replace('.', "-"));
            let metadata = [
                ("ami-launch-index", found.launch_index.to_string()),
                ("instance-id", found.id.clone()),
                ("local-ipv4", found.address.to_string()),
                ("local-hostname", hostname.clone()),
            ];
            picture.instances.push(Instance {
                hostname,
                metadata: metadata.map(|(name, value)| (name.to_owned(), value)).into(),
                address: found.address,
                running: matches!(found.state.as_str(), "pending" | "running"),
                id: found.id,
                user_data,
            });
        }
        for found in self.table.volumes().await? {
            let root =
                |(id, device): &(String, String)| ROOTS.contains(&device.as_str()) || roots.get(id) == Some(device);
            if found.attached.as_ref().is_some_and(root) {
                continue;
            }
            // As on machines with NVMe disks: the device is called by its order, and a link by the volume's id leads there.
            let link = format!(
                "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{}",
                found.id.replace('-', "")
            );
            picture.volumes.push(Volume {
                attached: found
                    .attached
                    .map(|(id, _)| (id, vec!["/dev/nvme1n1".to_owned(), link])),
                id: found.id,
                size_gib: found.size_gib,
            });
        }
        for found in self.table.load_balancers().await? {
            picture.balancers.push(balancer(found, &picture.instances));
        }
        Ok(picture)
    }
}

fn balancer(balancer: LoadBalancer, instances: &[Instance]) -> Balancer {
    let LoadBalancer { arn, listeners, .. } = balancer;
    Balancer {
        id: arn,
        address: None,
        listeners: listeners
            .into_iter()
            .map(|(port, group)| listener(port, group, instances))
            .collect(),
    }
}

fn listener(port: u16, group: TargetGroup, instances: &[Instance]) -> Listener {
    let TargetGroup {
        targets,
        check,
        port: check_port,
        path,
        interval,
        timeout,
        healthy,
        unhealthy,
    } = group;
    let address = |id: &str| {
        let instance = instances.iter().find(|i| i.id == id).map(|i| i.address);
        instance.or_else(|| id.parse().ok())
    };
    Listener {
        port,
        targets: targets
            .iter()
            .filter_map(|(id, port)| Some(SocketAddrV4::new(address(id)?, *port)))
            .collect(),
        health: HealthCheck {
            probe: if check == "TCP" {
                Probe::Tcp
            } else {
                Probe::Http {
                    tls: check == "HTTPS",
                    path,
                }
            },
            port: check_port,
            interval: Duration::from_secs(interval),
            timeout: Duration::from_secs(timeout),
            healthy,
            unhealthy,
        },
        fails_open: true,
    }
}
