//! A host without an operating system: QEMU, whose power a management controller holds, boots over the network from what
//! `kprov boot serve` offers, up to kprov-node reporting in; and has an image written to its disk.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kprov_bootstrap::pki;
use kprov_emulators::bmc::{Boot, Manners, PASSWORD, PowerHook, StandIn, USER};
use kprov_types::machine::{Endpoint, Role};
use kprov_types::node::{NODE_CONFIG_PATH, NodeConfig, NodeNetwork, ReleaseSource, SetupStatus};
use kprov_types::{Digest, MachineName, ports};

const NAME: &str = "vm-1";
const MAC: &str = "52:54:00:6b:70:01";
const SERVER: [u8; 4] = [10, 92, 7, 1];
const HOST: [u8; 4] = [10, 92, 7, 11];
const FILES: u16 = 8099;
/// How long a boot may take: half a minute, when nothing else runs.
const BOOT: Duration = Duration::from_mins(4);

/// A namespace with a bridge and a tap for the machine, gone when dropped.
struct Room(String);

impl Room {
    fn new() -> Result<Self> {
        remove_stale();
        let room = Self(format!("kb{}", std::process::id()));
        let name = &room.0;
        ip(&format!("netns add {name}"))?;
        for command in [
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 up",
            "addr add 10.92.7.1/24 dev br0",
            "tuntap add tap0 mode tap",
            "link set tap0 master br0 up",
        ] {
            ip(&format!("-n {name} {command}"))?;
        }
        Ok(room)
    }

    /// The namespace of another DHCP server, where there is one.
    fn router(&self) -> String {
        format!("{}r", self.0)
    }

    /// A network as it mostly is: somebody else's router gives out addresses, and knows nothing of booting.
    fn with_router(&self) -> Result<Ended> {
        let (name, router) = (&self.0, self.router());
        ip(&format!("netns add {router}"))?;
        ip(&format!(
            "-n {name} link add v0 master br0 up type veth peer name eth0 netns {router}"
        ))?;
        ip(&format!("-n {router} link set eth0 up"))?;
        ip(&format!("-n {router} addr add 10.92.7.2/24 dev eth0"))?;
        let [a, b, c, d] = HOST;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "ip", "netns", "exec", &router, "dnsmasq"])
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--port=0",
                "--user=root",
            ])
            .args(["--no-hosts", "--no-resolv", "--no-ping", "--dhcp-authoritative"])
            .args(["--log-facility=/dev/null", "--pid-file=", "--leasefile-ro"])
            .args([
                "--interface=eth0",
                "--bind-interfaces",
                "--dhcp-range=10.92.7.50,10.92.7.60,1h",
            ])
            .arg(format!("--dhcp-host={MAC},{a}.{b}.{c}.{d}"))
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Ended(child))
    }

    /// This thread, and all that it starts from now on, are in the namespace.
    fn enter(&self) -> Result<()> {
        let file = fs::File::open(format!("/run/netns/{}", self.0))?;
        Ok(nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for name in [self.0.clone(), self.router()] {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// Namespaces of tests that were killed.
fn remove_stale() {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix("kb")
            .and_then(|id| id.trim_end_matches('r').parse::<u32>().ok());
        if process.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists()) {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    run(Command::new("ip").args(arguments.split(' '))).map(drop)
}

fn run(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(
        out.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A child that ends with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a machine starts with when it gets power.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Firmware {
    /// A BIOS, with iPXE in the network card.
    #[default]
    Bios,
    /// OVMF, which boots over the network by itself: there's nothing in the card.
    Uefi,
}

/// The machine: it runs while it has power.
#[derive(Clone, Default)]
struct Vm {
    firmware: Firmware,
    running: Arc<Mutex<Option<Ended>>>,
}

impl Vm {
    fn power(&self, dir: &Path, boot: Option<Boot<'_>>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        *running = None;
        let Some(boot) = boot else { return };
        let path = |below: &str| dir.join(below).display().to_string();
        let cd = match (boot.target, boot.image) {
            // The controller fetches what it shows as a CD.
            ("Cd", Some(url)) => Some(url),
            _ => None,
        };
        if let Some(url) = cd {
            let fetched = Command::new("curl").args(["-fsS", "-o", &path("cd.iso"), url]).status();
            if !fetched.is_ok_and(|status| status.success()) {
                return;
            }
        }
        let mut network = format!("virtio-net-pci,netdev=n0,mac={MAC}");
        if self.firmware == Firmware::Uefi || cd.is_some() {
            network.push_str(",romfile=");
        }
        if boot.target == "Pxe" {
            network.push_str(",bootindex=0");
        }
        // It ends with this test, however that ends.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-accel", "tcg", "-m", "1280", "-display", "none", "-monitor", "none"])
            .args(["-serial", &format!("file:{}", path("console"))])
            .args(["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"])
            .args(["-device", &network])
            .args([
                "-drive",
                &format!("file={},if=none,id=d0,format=raw", path("disk")),
                "-device",
                "virtio-blk-pci,drive=d0,serial=kprovdisk1,bootindex=1",
            ]);
        if cd.is_some() {
            qemu.args([
                "-drive",
                &format!("file={},if=none,id=cd0,media=cdrom,format=raw", path("cd.iso")),
                "-device",
                "ide-cd,drive=cd0,bootindex=0",
            ]);
        }
        if self.firmware == Firmware::Uefi {
            qemu.args(["-bios", "/usr/share/ovmf/OVMF.fd"]);
        }
        *running = qemu.stdin(Stdio::null()).spawn().ok().map(Ended);
    }
}

fn required(variable: &str) -> Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} is not set: run the tests by `cargo xtask test`"))
}

/// What both tests start from: kernel and initrd as `kprov boot image` makes them, and an inventory.
struct Stage {
    dir: tempfile::TempDir,
    kprov: String,
}

impl Stage {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let kprov = format!("{}/kprov", required("KPROV_BIN")?);
        let root = required("KPROV_TEST_BOOT_KERNEL")?;
        let one = |below: &str, begins: &str| -> Result<String> {
            let entries = fs::read_dir(format!("{root}/{below}"))?.filter_map(Result::ok);
            let found = entries
                .filter_map(|e| e.path().into_os_string().into_string().ok())
                .find(|path| path.rsplit('/').next().is_some_and(|name| name.starts_with(begins)));
            found.with_context(|| format!("nothing in {root}/{below}"))
        };
        // The kprov-node under test is built for debugging, and needs the libraries that it was linked with.
        let add = dir.path().join("add");
        let node = format!("{}/kprov-node", required("KPROV_BIN")?);
        for line in run(Command::new("ldd").arg(&node))?.lines() {
            let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else {
                continue;
            };
            let to = add.join(library.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a directory")?)?;
            fs::copy(library, to)?;
        }
        run(Command::new(&kprov)
            .args(["boot", "image", "--kernel", &one("boot", "vmlinuz-")?])
            .args(["--modules", &one("lib/modules", "")?])
            .arg("--add")
            .arg(&add)
            .arg("--out")
            .arg(dir.path().join("boot")))?;
        fs::create_dir(dir.path().join("first-boot"))?;
        Ok(Self { dir, kprov })
    }

    fn disk(&self, content: &[u8]) -> Result<()> {
        let file = fs::File::create(self.path("disk"))?;
        file.set_len(64 << 20)?;
        std::os::unix::fs::FileExt::write_all_at(&file, content, 1 << 20)?;
        Ok(())
    }

    fn path(&self, below: &str) -> std::path::PathBuf {
        self.dir.path().join(below)
    }

    /// An inventory of hosts: their names, last bytes of their addresses, hardware addresses, and controllers.
    fn inventory(&self, hosts: &[(&str, u8, &str, &StandIn)]) -> Result<()> {
        let mut text = "apiVersion: kprov.io/v1alpha1\nkind: Inventory\nhosts:\n".to_owned();
        for (name, last, mac, bmc) in hosts {
            let [a, b, c, _] = HOST;
            write!(
                text,
                "  - name: {name}\n    role: control-plane\n    address: {a}.{b}.{c}.{last}\n    bmc:\n      address: {}\n      \
                 credentials: {{ env: KPROV_TEST_BMC }}\n      mac: \"{mac}\"\n",
                bmc.url()
            )?;
        }
        fs::write(self.path("hosts.yaml"), text)?;
        Ok(())
    }

    fn first_boot(&self, text: &str) -> Result<()> {
        fs::write(self.path("first-boot").join(NAME), text)?;
        Ok(())
    }

    /// `kprov boot serve` that switches the machine on.
    fn serve(&self, more: &[&str]) -> Command {
        let mut command = Command::new(&self.kprov);
        command
            .args(["boot", "serve", "--interface", "br0"])
            .args([
                "--console",
                "ttyS0",
                "--power-on",
                "--until-booted",
                "--progress",
                "plain",
            ])
            .arg("--inventory")
            .arg(self.path("hosts.yaml"))
            .arg("--kernel")
            .arg(self.path("boot/kernel"))
            .arg("--initrd")
            .arg(self.path("boot/initrd"))
            .arg("--first-boot")
            .arg(self.path("first-boot"))
            .args(more)
            .env("KPROV_HOME", self.path("home"))
            .env("KPROV_TEST_BMC", format!("{USER}:{PASSWORD}"))
            .stdin(Stdio::null());
        command
    }

    fn whole_console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("console")).unwrap_or_default()).into_owned()
    }

    /// Its last lines.
    fn console(&self) -> String {
        let text = self.whole_console();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Runs it to its end; tells whether it succeeded, and what it said.
    fn served(&self, more: &[&str]) -> Result<(bool, String)> {
        let log = fs::File::create(self.path("serve.log"))?;
        let mut child = Ended(self.serve(more).stdout(log.try_clone()?).stderr(log).spawn()?);
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.0.try_wait()? {
                break status;
            }
            if start.elapsed() > BOOT {
                bail!(
                    "not booted within {BOOT:?}\n{}\nconsole:\n{}",
                    fs::read_to_string(self.path("serve.log"))?,
                    self.console()
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        Ok((status.success(), fs::read_to_string(self.path("serve.log"))?))
    }
}

async fn controller(stage: &Stage, vm: &Vm) -> Result<StandIn> {
    let (dir, vm) = (stage.dir.path().to_owned(), vm.clone());
    let bmc = StandIn::start(Manners::default(), Box::new(move |boot| vm.power(&dir, boot))).await?;
    stage.inventory(&[(NAME, HOST[3], MAC, &bmc)])?;
    Ok(bmc)
}

/// First-boot data as `kprov up` makes them, for a control-plane machine that waits for its bundle.
fn first_boot(stage: &Stage) -> Result<(String, reqwest::Client)> {
    let now = jiff::Timestamp::now();
    let name: MachineName = NAME.parse()?;
    let secrets = pki::generate_secrets(&"netboot".parse()?, now)?;
    let client = pki::setup_client(now)?;
    let identity = pki::setup_identity(&name, &client.fingerprint, now)?;
    let [a, b, c, d] = SERVER;
    let url = format!("http://{a}.{b}.{c}.{d}:{FILES}");
    let node = stage.path("files/kprov-node");
    fs::create_dir_all(stage.path("files"))?;
    run(Command::new("strip")
        .arg(format!("{}/kprov-node", required("KPROV_BIN")?))
        .arg("-o")
        .arg(&node))?;
    let sum = run(Command::new("sha256sum").arg(&node))?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let config = NodeConfig {
        cluster: "netboot".parse()?,
        machine: Some(name),
        address: None,
        labels: BTreeMap::new(),
        role: Role::ControlPlane,
        endpoint: Endpoint {
            host: format!("{a}.{b}.{c}.{d}"),
            port: ports::API,
        },
        ca: secrets.ca.certificate,
        release: ReleaseSource {
            urls: vec![url.clone()],
            digest: Digest::from_hex(&"0".repeat(64))?,
        },
        join_token: None,
        setup: Some(identity.clone()),
        data: None,
        network: NodeNetwork {
            pods: "10.244.0.0/16".parse()?,
            services: "10.96.0.0/16".parse()?,
            dns_domain: "cluster.local".into(),
        },
        virtual_address: None,
        taint: false,
    };
    let script = include_str!("../../crates/kprov/src/first_boot.sh")
        .replace("@URLS@", &url)
        .replace("@SHA256@", sum)
        .replace("@PATH@", "kprov-node")
        .replace("@CONFIG_PATH@", NODE_CONFIG_PATH)
        .replace("@CONFIG@", &serde_json::to_string(&config)?);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let both = format!("{}{}", client.pair.certificate, client.pair.key);
    let http = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([reqwest::Certificate::from_pem(identity.certificate.as_bytes())?])
        .identity(reqwest::Identity::from_pem(both.as_bytes())?)
        .resolve(NAME, SocketAddr::from((HOST, ports::NODE_SETUP)))
        .timeout(Duration::from_secs(5))
        .build()?;
    Ok((script, http))
}

/// `kprov boot serve` gives out addresses itself.
const DHCP: [&str; 2] = ["--dhcp", "10.92.7.100-10.92.7.110"];

/// Runs in a thread of its own, since that enters a namespace.
fn in_room(test: impl FnOnce(&Room) -> Result<()> + Send + 'static) -> Result<()> {
    let room = Room::new()?;
    let thread = std::thread::spawn({
        let name = room.0.clone();
        move || {
            let room = std::mem::ManuallyDrop::new(Room(name));
            room.enter()?;
            test(&room)
        }
    });
    thread.join().unwrap_or_else(|_| bail!("the test panicked"))
}

#[test]
fn a_host_boots_over_the_network_up_to_kprov_node_reporting_in() -> Result<()> {
    in_room(|_| boots(Firmware::Bios, &DHCP))
}

#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn a_host_with_uefi_boots_over_the_network() -> Result<()> {
    in_room(|_| boots(Firmware::Uefi, &DHCP))
}

/// A network card without firmware: iPXE comes by the controller, on a virtual CD that is out again afterwards.
#[test]
fn a_host_boots_from_a_virtual_cd() -> Result<()> {
    in_room(|_| boots(Firmware::Bios, &[&DHCP[..], &["--virtual-media"]].concat()))
}

#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn a_host_with_uefi_boots_from_a_virtual_cd() -> Result<()> {
    in_room(|_| boots(Firmware::Uefi, &[&DHCP[..], &["--virtual-media"]].concat()))
}

#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn a_host_boots_beside_a_dhcp_server_that_was_there_before() -> Result<()> {
    in_room(|room| {
        let _router = room.with_router()?;
        boots(Firmware::Bios, &[])
    })
}

#[test]
fn a_host_with_uefi_boots_beside_a_dhcp_server_that_was_there_before() -> Result<()> {
    in_room(|room| {
        let _router = room.with_router()?;
        boots(Firmware::Uefi, &[])
    })
}

/// From no power to kprov-node reporting in.
fn boots(firmware: Firmware, dhcp: &[&str]) -> Result<()> {
    let stage = Stage::new()?;
    stage.disk(b"")?;
    let (script, http) = first_boot(&stage)?;
    stage.first_boot(&script)?;
    let [a, b, c, d] = SERVER;
    let _files = Ended(
        Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "busybox",
                "httpd",
                "-f",
                "-p",
                &format!("{a}.{b}.{c}.{d}:{FILES}"),
                "-h",
            ])
            .arg(stage.path("files"))
            .spawn()?,
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let vm = Vm {
        firmware,
        running: Arc::default(),
    };
    let bmc = runtime.block_on(controller(&stage, &vm))?;
    let start = Instant::now();
    let (done, said) = stage.served(dhcp)?;
    ensure!(done, "{said}\nconsole:\n{}", stage.console());
    let booted = start.elapsed();
    let console = stage.whole_console();
    ensure!(
        !console.contains("failed to load"),
        "firmware's first choice:\n{console}"
    );
    ensure!(bmc.is_on() && bmc.boots_from().is_none(), "once only");
    ensure!(bmc.image().is_none(), "the CD is out again");
    let url = format!("https://{NAME}:{}/v1/status", ports::NODE_SETUP);
    let status: SetupStatus = runtime.block_on(async {
        loop {
            let asked = async { http.get(&url).send().await?.error_for_status()?.json().await };
            match asked.await {
                Ok(status) => return Ok(status),
                Err(error) if start.elapsed() > BOOT => {
                    return Err(anyhow::Error::from(error).context(format!("console:\n{}", stage.console())));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
            }
        }
    })?;
    println!(
        "it runs from memory after {:.1} s, kprov-node reports `{:?}` after {:.1} s",
        booted.as_secs_f32(),
        status.step,
        start.elapsed().as_secs_f32()
    );
    vm.power(stage.dir.path(), None);
    Ok(())
}

/// A host that does as told, one whose controller can't have it boot over the network, and one that can't go on.
#[test]
fn no_host_holds_up_another() -> Result<()> {
    in_room(|_| {
        let stage = Stage::new()?;
        stage.first_boot("#!/bin/sh\n")?;
        let [a, b, c, d] = SERVER;
        let asks = move |mac: &'static str, requests: &[&str]| -> PowerHook {
            let url = format!("http://{a}.{b}.{c}.{d}:10204/hosts/{}", mac.replace(':', "-"));
            let script = requests
                .iter()
                .map(|r| format!("curl -fsS {}\n", r.replace("URL", &url)));
            let script: String = script.collect();
            Box::new(move |boot| {
                if boot.is_some() {
                    let _ = Command::new("sh").args(["-ec", &script]).spawn();
                }
            })
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let (well, cannot, stuck) = (MAC, "52:54:00:6b:70:02", "52:54:00:6b:70:03");
        let controllers = runtime.block_on(async {
            let disk_only = Manners {
                targets: vec!["None", "Hdd"],
                ..Manners::default()
            };
            let fetches = asks(
                well,
                &["URL/ipxe", "URL/first-boot", "-d 'running from memory' URL/report"],
            );
            let fails = asks(stuck, &["-d 'failed: its disk is gone' URL/report"]);
            anyhow::Ok([
                StandIn::start(Manners::default(), fetches).await?,
                StandIn::start(disk_only, Box::new(|_| ())).await?,
                StandIn::start(Manners::default(), fails).await?,
            ])
        })?;
        let [first, second, third] = &controllers;
        stage.inventory(&[
            (NAME, 11, well, first),
            ("vm-2", 12, cannot, second),
            ("vm-3", 13, stuck, third),
        ])?;
        let (done, said) = stage.served(&DHCP)?;
        ensure!(!done, "{said}");
        for wanted in [
            "vm-1: running from memory",
            "2 of 3 hosts did not boot as told",
            "host `vm-2` can't be made to boot by its controller: ",
            "host `vm-3` can't go on: its disk is gone (it asks again every 30 s",
        ] {
            ensure!(said.contains(wanted), "`{wanted}` in:\n{said}");
        }
        Ok(())
    })
}

#[test]
fn an_image_is_written_to_an_empty_disk_and_to_no_other() -> Result<()> {
    in_room(|_| {
        let stage = Stage::new()?;
        // The smallest image that first-boot data can be put into.
        fs::create_dir_all(stage.path("root/etc"))?;
        fs::create_dir_all(stage.path("root/usr"))?;
        fs::write(stage.path("root/etc/os-release"), "ID=test\n")?;
        fs::File::create(stage.path("image"))?.set_len(24 << 20)?;
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-d"])
            .arg(stage.path("root"))
            .arg(stage.path("image")))?;
        stage.first_boot("#!/bin/sh\necho first boot of this very host\n")?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let vm = Vm::default();
        let _bmc = runtime.block_on(controller(&stage, &vm))?;
        let image = stage.path("image").display().to_string();
        let [dhcp, range] = DHCP;
        let install = [
            dhcp,
            range,
            "--image",
            &image,
            "--install",
            &format!("{NAME}=/dev/disk/by-id/virtio-kprovdisk1"),
        ];

        stage.disk(b"somebody's data")?;
        let (done, said) = stage.served(&install)?;
        ensure!(
            !done && said.contains("holds something"),
            "{said}\nconsole:\n{}",
            stage.console()
        );
        let mut kept = [0; 15];
        let disk = fs::File::open(stage.path("disk"))?;
        std::os::unix::fs::FileExt::read_exact_at(&disk, &mut kept, 1 << 20)?;
        ensure!(&kept == b"somebody's data");

        vm.power(stage.dir.path(), None);
        stage.disk(b"")?;
        let (done, said) = stage.served(&install)?;
        ensure!(done, "{said}\nconsole:\n{}", stage.console());
        vm.power(stage.dir.path(), None);
        let seed = "/var/lib/cloud/seed/nocloud";
        for (file, wanted) in [
            ("user-data", "of this very host"),
            ("meta-data", "local-hostname: vm-1"),
        ] {
            let text = run(Command::new("debugfs")
                .args(["-R", &format!("cat {seed}/{file}")])
                .arg(stage.path("disk")))?;
            ensure!(text.contains(wanted), "{file}: {text}");
        }
        let mut begins = vec![0; 4096];
        fs::File::open(stage.path("disk"))?.read_exact(&mut begins)?;
        ensure!(begins.iter().any(|byte| *byte != 0));
        Ok(())
    })
}
