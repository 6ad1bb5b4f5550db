//! The virtual address in network namespaces: three machines and a client outside on a bridge, with real packets. Each machine
//! runs a front with a TLS backend in place of its API server, and the election.
//!
//! This test starts itself again in each namespace: [`machine`] is what runs there.

#![cfg(test)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kprov_bootstrap::pki;
use kprov_front::{Front, FrontConfig, Listener};
use kprov_node::vip;
use kprov_types::node::{Bundle, ControlPlaneSettings, Member, NodeNetwork};
use kprov_types::release::API_VERSION;
use kprov_types::{Digest, MachineName, Release, ports};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

const MACHINES: u8 = 3;
const VIRTUAL: Ipv4Addr = Ipv4Addr::new(10, 91, 7, 100);
const ENVIRONMENT: &str = "KPROV_TEST_VIP_MACHINE";
const DIRECTORY: &str = "KPROV_TEST_VIP_DIRECTORY";

fn own(machine: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 91, 7, machine + 1)
}

fn name(machine: u8) -> MachineName {
    MachineName::new(format!("vip-cp-{machine}")).unwrap()
}

/// Equal on all machines; certificates play no part in it.
fn bundle(secret: &str) -> Bundle {
    let members = (0..MACHINES).map(|machine| Member {
        name: name(machine),
        address: own(machine).into(),
    });
    let digest = Digest::from_hex(&"0".repeat(64)).unwrap();
    let version: kprov_types::KubernetesVersion = "1.36.0".parse().unwrap();
    let mut secrets = pki::generate_secrets(&"vip".parse().unwrap(), jiff::Timestamp::now()).unwrap();
    secrets.ca.key = secret.into();
    Bundle {
        settings: ControlPlaneSettings {
            cluster: "vip".parse().unwrap(),
            kubernetes: version.clone(),
            release: Release {
                api_version: API_VERSION.into(),
                kind: "Release".into(),
                kubernetes: version,
                images: [].into(),
                host_files: Vec::new(),
                minimum_from: None,
                advisories: Vec::new(),
                programs: [].into(),
            },
            release_digest: digest,
            endpoint: kprov_types::machine::Endpoint {
                host: VIRTUAL.to_string(),
                port: ports::API,
            },
            network: NodeNetwork {
                pods: "10.244.0.0/16".parse().unwrap(),
                services: "10.96.0.0/16".parse().unwrap(),
                dns_domain: "cluster.local".into(),
            },
            members: members.collect(),
            etcd_exists: false,
        },
        secrets,
    }
}

/// What runs in each namespace. Its stdin takes commands, one on a line; its end ends it.
#[test]
fn machine() {
    let Ok(machine) = std::env::var(ENVIRONMENT) else {
        return;
    };
    let machine: u8 = machine.parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(run_machine(machine));
}

async fn run_machine(machine: u8) {
    kprov_node::https::use_ring();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["kubernetes".into()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["kubernetes".into()])
        .unwrap()
        .signed_by(&leaf_key, &Issuer::from_params(&params, &key))
        .unwrap();
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(leaf_key.serialize_der()).unwrap(),
        )
        .unwrap();
    let ready = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let backend = ports::revision_address(ports::STANDBY_REVISION);
    let listener = tokio::net::TcpListener::bind((backend, ports::API)).await.unwrap();
    tokio::spawn(serve(listener, tls, machine, ready.clone()));

    let listeners = [own(machine), VIRTUAL].map(|address| Listener::machine(address.into()));
    let front = Front::start(FrontConfig::control_plane(listeners.to_vec(), ca.pem())).unwrap();
    let settings = vip::Settings {
        address: VIRTUAL,
        own: own(machine),
        name: name(machine),
        directory: std::env::var(DIRECTORY).unwrap().into(),
    };
    let bundle = watch::Sender::new(Some(Arc::new(bundle("secret"))));
    let nodes = watch::Sender::new(Arc::default());
    let address = vip::Handle::start(settings, front.watch(), bundle.subscribe(), nodes.subscribe());
    let (told, mut commands) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if told.send(line).is_err() {
                return;
            }
        }
    });
    while let Some(command) = commands.recv().await {
        match command.as_str() {
            "unready" => ready.store(false, std::sync::atomic::Ordering::SeqCst),
            "ready" => ready.store(true, std::sync::atomic::Ordering::SeqCst),
            "release" => address.release().await,
            "bridge" => {
                // As when kprov-node is replaced: nobody runs the election for some seconds.
                address.bridge().await;
            }
            other => panic!("{other}"),
        }
        println!("done {command}");
    }
    address.release().await;
}

/// An API server as far as health checks can tell; what else it is asked it answers with the machine's number.
async fn serve(
    listener: tokio::net::TcpListener,
    tls: rustls::ServerConfig,
    machine: u8,
    ready: Arc<std::sync::atomic::AtomicBool>,
) {
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            // The client outside sends one byte and no TLS.
            let mut first = [0];
            if stream.peek(&mut first).await.is_ok() && first == *b"?" {
                let mut stream = stream;
                let _ = stream.write_all(machine.to_string().as_bytes()).await;
                let _ = stream.shutdown().await;
                let _ = stream.read(&mut first).await;
                return;
            }
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            let mut stream = tokio::io::BufReader::new(stream);
            let mut line = String::new();
            while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
                if line == "\r\n" {
                    let status = if ready.load(std::sync::atomic::Ordering::SeqCst) {
                        200
                    } else {
                        500
                    };
                    let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: 2\r\n\r\nok");
                    if stream.write_all(answer.as_bytes()).await.is_err() || stream.flush().await.is_err() {
                        return;
                    }
                }
                line.clear();
            }
        });
    }
}

/// Namespaces on a bridge, gone when dropped.
struct Room {
    tag: String,
    directory: tempfile::TempDir,
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(
        done.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// Namespaces of tests that were killed.
fn remove_stale() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let id = name.strip_prefix("kv").and_then(|rest| rest.split('-').next());
        let process = id.and_then(|id| id.parse::<u32>().ok());
        if process.is_some_and(|id| !std::path::Path::new(&format!("/proc/{id}")).exists()) {
            ip(&format!("netns del {name}"));
        }
    }
}

impl Room {
    /// Machines 0 to 2, and the client as number 9, behind a bridge in a namespace of its own.
    fn new() -> Self {
        remove_stale();
        let room = Self {
            tag: format!("kv{}", std::process::id()),
            directory: tempfile::tempdir().unwrap(),
        };
        let hub = room.namespace("hub");
        ip(&format!("netns add {hub}"));
        ip(&format!("-n {hub} link add br0 type bridge"));
        ip(&format!("-n {hub} link set br0 up"));
        for place in (0..MACHINES).chain([9]) {
            let namespace = room.namespace(&place.to_string());
            ip(&format!("netns add {namespace}"));
            ip(&format!(
                "-n {hub} link add p{place} type veth peer name eth0 netns {namespace}"
            ));
            ip(&format!("-n {hub} link set p{place} master br0 up"));
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} addr add {}/24 dev eth0", own(place)));
            ip(&format!("-n {namespace} link set eth0 up"));
        }
        room
    }

    fn namespace(&self, what: &str) -> String {
        format!("{}-{what}", self.tag)
    }

    /// As pulling the cable at the switch: the machine's own interface stays as it is.
    fn link(&self, machine: u8, state: &str) {
        ip(&format!("-n {} link set p{machine} {state}", self.namespace("hub")));
    }

    fn start(&self, machine: u8) -> Machine {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.namespace(&machine.to_string())])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "machine", "--nocapture"])
            .env(ENVIRONMENT, machine.to_string())
            .env(DIRECTORY, self.directory.path().join(machine.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Machine {
            child,
            stdin: Some(stdin),
            stdout,
        }
    }

    /// Which machines have the address on their interface.
    fn holders(&self) -> Vec<u8> {
        let has = |machine: &u8| {
            let out = Command::new("ip")
                .args([
                    "-n",
                    &self.namespace(&machine.to_string()),
                    "addr",
                    "show",
                    "dev",
                    "eth0",
                ])
                .output()
                .unwrap();
            String::from_utf8_lossy(&out.stdout).contains(&VIRTUAL.to_string())
        };
        (0..MACHINES).filter(has).collect()
    }

    /// The one that has it, once there is one.
    fn holder(&self) -> u8 {
        let start = Instant::now();
        loop {
            if let [one] = self.holders()[..] {
                return one;
            }
            assert!(start.elapsed() < Duration::from_secs(15), "{:?}", self.holders());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for what in ["hub", "0", "1", "2", "9"] {
            // A namespace that was never made is no loss.
            let _ = Command::new("ip")
                .args(["netns", "del", &self.namespace(what)])
                .output();
        }
    }
}

struct Machine {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Machine {
    fn tell(&mut self, command: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{command}").unwrap();
        let mut line = String::new();
        while self.stdout.read_line(&mut line).unwrap() > 0 {
            if line.contains(&format!("done {command}")) {
                return;
            }
            line.clear();
        }
        panic!("the machine has ended");
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It ends by itself when its stdin does.
        drop(self.stdin.take());
        self.kill();
    }
}

/// A client outside: a new connection every 20 ms with 200 ms to be answered, each with who answered and when.
fn probe(
    room: &Room,
    until: &Arc<std::sync::atomic::AtomicBool>,
) -> std::thread::JoinHandle<Vec<(Instant, Option<u8>)>> {
    let namespace = format!("/run/netns/{}", room.namespace("9"));
    let until = until.clone();
    std::thread::spawn(move || {
        let file = std::fs::File::open(namespace).unwrap();
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let mut seen = Vec::new();
        while !until.load(std::sync::atomic::Ordering::SeqCst) {
            let limit = Duration::from_millis(200);
            let answer = std::net::TcpStream::connect_timeout(&SocketAddr::from((VIRTUAL, ports::API)), limit)
                .and_then(|mut stream| {
                    stream.set_read_timeout(Some(limit))?;
                    stream.write_all(b"?")?;
                    let mut digit = [0];
                    std::io::Read::read_exact(&mut stream, &mut digit)?;
                    Ok(digit[0] - b'0')
                })
                .ok();
            seen.push((Instant::now(), answer));
            std::thread::sleep(Duration::from_millis(20));
        }
        seen
    })
}

/// The longest time between two answers.
fn longest_gap(seen: &[(Instant, Option<u8>)]) -> Duration {
    let answers: Vec<_> = seen
        .iter()
        .filter(|(_, who)| who.is_some())
        .map(|(at, _)| *at)
        .collect();
    answers
        .windows(2)
        .map(|pair| pair[1] - pair[0])
        .max()
        .unwrap_or_default()
}

#[test]
fn the_address_moves_within_three_seconds() {
    let room = Room::new();
    let mut machines: Vec<_> = (0..MACHINES).map(|machine| room.start(machine)).collect();
    let mut holder = room.holder();
    for (what, limit) in [
        ("link cut", 3000),
        ("killed", 3000),
        ("API not ready", 3000),
        ("stopped", 1000),
        ("replaced", 1000),
    ] {
        let stop = Arc::default();
        let prober = probe(&room, &stop);
        std::thread::sleep(Duration::from_millis(1500));
        let held_before = holder;
        match what {
            "link cut" => room.link(holder, "down"),
            "killed" => machines[usize::from(holder)].kill(),
            "API not ready" => machines[usize::from(holder)].tell("unready"),
            "stopped" => machines[usize::from(holder)].tell("release"),
            _ => machines[usize::from(holder)].tell("bridge"),
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(4500) {
            let holders = room.holders();
            if what == "link cut" {
                // What is cut off drops it by itself, before another one may have it.
                assert!(holders.len() <= 1, "{what}: {holders:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        let seen = prober.join().unwrap();
        let gap = longest_gap(&seen);
        holder = room.holder();
        println!(
            "{what}: {held_before} -> {holder}, without an answer for {} ms",
            gap.as_millis()
        );
        assert!(gap < Duration::from_millis(limit), "{what}: {gap:?}");
        assert_eq!(holder == held_before, what == "replaced", "{what}");
        assert_eq!(seen.last().unwrap().1, Some(holder), "{what}");
        // As it was before; what has it keeps it.
        let before = usize::from(held_before);
        match what {
            "link cut" => room.link(held_before, "up"),
            "API not ready" => machines[before].tell("ready"),
            "killed" | "stopped" | "replaced" => {
                machines[before].kill();
                machines[before] = room.start(held_before);
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(3500));
        assert_eq!(room.holders(), [holder], "{what}: it stays");
    }
}
