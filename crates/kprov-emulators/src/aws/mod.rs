//! EC2 and its load balancers: a recording proxy in front of a `moto` server.
//!
//! [`Moto::start`] starts both; they end with the value. What passes through the proxy is counted by name, may fail on
//! request ([`Faults`]), and is held to what the real API refuses and moto lets pass: client tokens, things that are in use,
//! the size of user data, volumes and zones, a VPC's second internet gateway, a port's second listener. One change is carried
//! out after the other. [`Moto::direct`] is moto itself, for a test that looks without being counted.

mod faults;
mod proxy;
mod rules;
mod table;
mod xml;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::record::Record;

pub use faults::{Effect, Fault, Faults};
pub use proxy::DnsNames;
pub use table::{Instance, LoadBalancer, Table, TargetGroup, Volume};

/// Who Debian's images belong to.
pub const DEBIAN: &str = "136693071363";
/// Who Flatcar's images belong to.
pub const FLATCAR: &str = "075585003325";
/// The Debian 12 image that is found by its name; an older one is there beside it.
pub const DEBIAN_IMAGE: &str = "ami-0de12000000000002";
/// The Flatcar image that is found by its name.
pub const FLATCAR_IMAGE: &str = "ami-0f1a7ca0000000002";

/// How long moto may take to start, on a busy machine.
const START: Duration = Duration::from_mins(1);

/// A `moto` server and the proxy in front of it.
#[derive(Debug)]
pub struct Moto {
    endpoint: String,
    direct: String,
    port: u16,
    record: Record,
    faults: Faults,
    names: DnsNames,
    addresses: proxy::PublicIsPrivate,
    _server: Child,
    _images: tempfile::TempDir,
    _stop: DropGuard,
}

impl Moto {
    /// Starts `server` (the program `moto_server`), with images of its own alone, and the proxy. Both are killed when the value
    /// is dropped, or this process ends.
    pub async fn start(server: &Path) -> Result<Self> {
        let images = tempfile::tempdir()?;
        let path = images.path().join("images.json");
        std::fs::write(&path, serde_json::to_vec(&self::images())?)?;
        // A port that is free now; whoever takes it in between makes the server end, and that is seen.
        let port = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
        let mut server = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(server)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .env("MOTO_AMIS_PATH", &path)
            .env("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
            .env("MOTO_ENABLE_AMI_VALIDATION", "1")
            .env("MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("can't run `{}`", server.display()))?;
        let up = async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                if let Some(status) = server.try_wait()? {
                    bail!("the moto server ended with {status}");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        };
        tokio::time::timeout(START, up)
            .await
            .context("the moto server did not start in time")??;

        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let (record, faults, names) = (Record::default(), Faults::default(), DnsNames::default());
        let addresses = proxy::PublicIsPrivate::default();
        let stop = CancellationToken::new();
        let proxy = proxy::Proxy::new(port, record.clone(), faults.clone(), names.clone(), addresses.clone());
        tokio::spawn(proxy.serve(listener, stop.clone()));
        Ok(Self {
            endpoint,
            direct: format!("http://127.0.0.1:{port}"),
            port,
            record,
            faults,
            names,
            addresses,
            _server: server,
            _images: images,
            _stop: stop.drop_guard(),
        })
    }

    /// The URL of every API, through the proxy. Any credentials and any region do.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// moto's own URL: what goes there is not counted, and nothing is put right.
    pub fn direct(&self) -> &str {
        &self.direct
    }

    /// A look at what moto has in a region; not counted.
    pub fn table(&self, region: &str) -> Table {
        Table::new(self.port, region)
    }

    /// The calls that came through the proxy.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What is to go wrong.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// From now on the public address of each instance reads as its private one: what a machine room without translation needs.
    pub fn public_is_private(&self) {
        self.addresses.set();
    }

    /// Load balancers' DNS names, which a test can have changed in answers.
    pub fn dns_names(&self) -> &DnsNames {
        &self.names
    }
}

/// The images that there are: two of Debian 12 (one for arm64 too) and of Flatcar.
fn images() -> serde_json::Value {
    let image = |id: &str, owner: &str, name: &str, architecture: &str, date: &str, root: &str| {
        json!({
            "ami_id": id, "owner_id": owner, "name": name, "architecture": architecture, "creation_date": date,
            "root_device_name": root, "root_device_type": "ebs", "state": "available", "public": true, "image_location": "x",
            "sriov": "simple", "description": name, "image_type": "machine", "platform": null, "virtualization_type": "hvm",
            "hypervisor": "xen",
        })
    };
    json!([
        image(
            "ami-0de12000000000001",
            DEBIAN,
            "debian-12-amd64-20260115-1993",
            "x86_64",
            "2026-01-15T10:00:00.000Z",
            "/dev/xvda"
        ),
        image(
            DEBIAN_IMAGE,
            DEBIAN,
            "debian-12-amd64-20260901-2222",
            "x86_64",
            "2026-09-01T10:00:00.000Z",
            "/dev/xvda"
        ),
        image(
            "ami-0de12000000000003",
            DEBIAN,
            "debian-12-arm64-20260901-2222",
            "arm64",
            "2026-09-01T10:00:00.000Z",
            "/dev/xvda"
        ),
        image(
            "ami-0f1a7ca0000000001",
            FLATCAR,
            "Flatcar-stable-4081.2.0-hvm",
            "x86_64",
            "2026-01-10T10:00:00.000Z",
            "/dev/xvda"
        ),
        image(
            FLATCAR_IMAGE,
            FLATCAR,
            "Flatcar-stable-4230.2.1-hvm",
            "x86_64",
            "2026-08-10T10:00:00.000Z",
            "/dev/xvda"
        ),
        image(
            "ami-0000000000000badd",
            "999999999999",
            "debian-12-amd64-29990101-1",
            "x86_64",
            "2026-10-01T10:00:00.000Z",
            "/dev/xvda"
        ),
    ])
}
