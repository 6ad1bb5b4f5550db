//! The room that makes emulators' instances real, with a scripted emulator: what the tests of clouds stand on.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kprov_e2e::cloud::{Balancer, Emulator, HealthCheck, Instance, Listener, Picture, Probe, Room, Volume};
use kprov_e2e::{Traces, wait_for};

/// What the test says is there.
#[derive(Clone, Default)]
struct Script(Arc<Mutex<Picture>>);

impl Script {
    fn set(&self, change: impl FnOnce(&mut Picture)) {
        if let Ok(mut picture) = self.0.lock() {
            change(&mut picture);
        }
    }
}

impl Emulator for Script {
    fn look(&mut self) -> Result<Picture> {
        Ok(self.0.lock().ok().context("the test has failed")?.clone())
    }
}

/// Formats its disk when it's empty, mounts it, and says its own name and what is on the disk to whoever connects; `/healthy`
/// decides what it answers health checks with. As a cloud's user data: a script that ends, and leaves a service.
const USER_DATA: &str = r"#!/bin/sh
set -eu
cat >/usr/local/bin/service.py <<'PY'
import http.server, os, socketserver, subprocess, threading, time
disk = '/dev/disk/by-id/nvme-disk'
while not os.path.exists(disk):
    time.sleep(0.1)
if subprocess.run(['blkid', '-p', disk], stdout=subprocess.DEVNULL).returncode == 2:
    subprocess.run(['mkfs.ext4', '-q', '-L', 'room-data', disk], check=True)
os.makedirs('/mnt/disk', exist_ok=True)
subprocess.run(['mount', disk, '/mnt/disk'], check=True)
with open('/mnt/disk/boots', 'a') as f:
    f.write(open('/var/lib/cloud/data/instance-id').read().strip() + ' ')

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists('/healthy') else 503)
        self.end_headers()

class Answer(socketserver.BaseRequestHandler):
    def handle(self):
        text = subprocess.check_output(['hostname'], text=True).strip() + ': ' + open('/mnt/disk/boots').read()
        self.request.sendall(text.encode())

socketserver.TCPServer.allow_reuse_address = True
threading.Thread(target=http.server.HTTPServer(('', 8081), Health).serve_forever).start()
socketserver.ThreadingTCPServer(('', 8080), Answer).serve_forever()
PY
echo run >>/var/log/user-data-runs
touch /healthy
cat >/etc/systemd/system/answer.service <<'UNIT'
[Service]
ExecStart=/usr/bin/python3 /usr/local/bin/service.py
Restart=always
UNIT
systemctl daemon-reload
systemctl enable --now answer.service
";

fn instance(id: &str, address: Ipv4Addr) -> Instance {
    Instance {
        id: id.to_owned(),
        hostname: format!("ip-{}", address.to_string().replace('.', "-")),
        address,
        running: true,
        user_data: USER_DATA.as_bytes().to_vec(),
        metadata: BTreeMap::from([("ami-launch-index".to_owned(), "7".to_owned())]),
    }
}

fn volume(id: &str, instance: &str) -> Volume {
    Volume {
        id: id.to_owned(),
        size_gib: 4,
        attached: Some((instance.to_owned(), vec!["/dev/disk/by-id/nvme-disk".to_owned()])),
    }
}

fn balancer(targets: &[Ipv4Addr]) -> Balancer {
    Balancer {
        id: "front".to_owned(),
        address: None,
        listeners: vec![Listener {
            port: 8080,
            targets: targets.iter().map(|a| SocketAddrV4::new(*a, 8080)).collect(),
            health: HealthCheck {
                probe: Probe::Http {
                    tls: false,
                    path: "/".to_owned(),
                },
                port: Some(8081),
                interval: Duration::from_millis(500),
                timeout: Duration::from_secs(2),
                healthy: 2,
                unhealthy: 2,
            },
            fails_open: false,
        }],
    }
}

fn ask(address: Ipv4Addr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, 8080)), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(!text.is_empty(), "the connection was closed");
    Ok(text)
}

/// Instances run their user data at their addresses, volumes keep what is on them, load balancers follow health checks,
/// and all of it goes.
#[test]
fn instances_are_machines() -> Result<()> {
    let before = Traces::list();
    {
        let script = Script::default();
        let (a, b) = (Ipv4Addr::new(10, 86, 1, 10), Ipv4Addr::new(10, 86, 2, 10));
        let start = Instant::now();
        let room = Room::open("room-script", "10.86.0.0/16".parse()?, script.clone())?;
        eprintln!("room open after {:.1} s", start.elapsed().as_secs_f64());
        script.set(|p| {
            p.instances = vec![instance("i-0a", a), instance("i-0b", b)];
            p.volumes = vec![volume("vol-0a", "i-0a"), volume("vol-0b", "i-0b")];
            p.balancers = vec![balancer(&[a, b])];
        });
        let answer = |at: Ipv4Addr, id: &str| {
            wait_for("an answer", Duration::from_secs(30), || ask(at)).with_context(|| room.console(id))
        };
        ensure!(answer(a, "i-0a")? == "ip-10-86-1-10: i-0a ", "{}", answer(a, "i-0a")?);
        ensure!(answer(b, "i-0b")? == "ip-10-86-2-10: i-0b ", "{}", answer(b, "i-0b")?);
        eprintln!("user data run after {:.1} s", start.elapsed().as_secs_f64());

        balances(&room, a)?;
        let asks = "url=http://169.254.169.254/latest; token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' $url/api/token); \
                    curl -sf -H \"X-aws-ec2-metadata-token: $token\" $url/meta-data/ami-launch-index; ! curl -sf $url/meta-data/ami-launch-index";
        ensure!(room.inside("i-0a", asks)? == "7");

        // Off and on again: the service comes back by itself, the user data is not run a second time.
        script.set(|p| p.instances[0].running = false);
        wait_for("silence", Duration::from_secs(10), || {
            ensure!(ask(a).is_err(), "it still answers");
            Ok(())
        })?;
        script.set(|p| p.instances[0].running = true);
        ensure!(
            answer(a, "i-0a")? == "ip-10-86-1-10: i-0a i-0a ",
            "{}",
            answer(a, "i-0a")?
        );
        ensure!(room.inside("i-0a", "cat /var/log/user-data-runs")? == "run");
        ensure!(room.inside("i-0a", "test -b /dev/disk/by-label/room-data && echo yes")? == "yes");

        // Another instance in the place of the first, with its volume.
        script.set(|p| {
            p.instances[0] = instance("i-0c", a);
            p.volumes[0] = volume("vol-0a", "i-0c");
        });
        let replaced = wait_for("the new one's answer", Duration::from_secs(30), || {
            let text = ask(a)?;
            ensure!(text.ends_with("i-0c "), "{text}");
            Ok(text)
        })
        .with_context(|| room.console("i-0c"))?;
        ensure!(replaced == "ip-10-86-1-10: i-0a i-0a i-0c ", "{replaced}");

        script.set(|p| *p = Picture::default());
        room.wait("nothing", Duration::from_secs(20), |p| p.instances.is_empty())?;
        ensure!(room.problems().is_empty(), "{:?}", room.problems());
    }
    Traces::nothing_left(&before)?;
    ensure!(loop_devices()? == 0, "loop devices are left");
    Ok(())
}

/// Connections go to healthy targets alone, whichever those are.
fn balances(room: &Room, a: Ipv4Addr) -> Result<()> {
    let front = room.balancer_address();
    let seen = |limit| {
        let mut all: Vec<String> = (0..limit)
            .filter_map(|_| ask(front).ok())
            .filter_map(|t| t.split(':').next().map(str::to_owned))
            .collect();
        all.sort();
        all.dedup();
        all
    };
    let both = ["ip-10-86-1-10", "ip-10-86-2-10"];
    let expect = |names: &[&str]| {
        wait_for("the balancer", Duration::from_secs(15), || {
            ensure!(seen(10) == names, "{:?} answered, not {names:?}", seen(10));
            Ok(())
        })
    };
    expect(&both)?;
    room.inside("i-0b", "rm /healthy")?;
    expect(&both[..1])?;
    room.inside("i-0a", "rm /healthy")?;
    expect(&[])?;
    ensure!(ask(a).is_ok(), "health checks are the balancer's affair alone");
    room.inside("i-0a", "touch /healthy")?;
    room.inside("i-0b", "touch /healthy")?;
    expect(&both)
}

/// Loop devices whose file a room of this test's made.
fn loop_devices() -> Result<usize> {
    let out = Command::new("losetup")
        .args(["--list", "--noheadings", "-O", "BACK-FILE"])
        .output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text
        .lines()
        .filter(|l| l.contains("/room-script/") || l.contains("/room-killed/"))
        .count())
}

const HELD: &str = "KPROV_TEST_HELD_ROOM";

/// A room of its own, held until this process is killed; part of the test below.
#[test]
fn held() -> Result<()> {
    if std::env::var_os(HELD).is_none() {
        return Ok(());
    }
    let script = Script::default();
    let at = Ipv4Addr::new(10, 85, 0, 10);
    let room = Room::open("room-killed", "10.85.0.0/24".parse()?, script.clone())?;
    script.set(|p| {
        p.instances = vec![instance("i-0a", at)];
        p.volumes = vec![volume("vol-0a", "i-0a")];
    });
    room.wait("nothing more", Duration::from_mins(10), |_| false).map(drop)
}

/// What a killed test leaves behind is removed without it.
#[test]
fn a_killed_room_is_cleared() -> Result<()> {
    let before = Traces::list();
    let mut child = Command::new(std::env::current_exe()?)
        .args(["held", "--exact", "--nocapture"])
        .env(HELD, "1")
        .stdout(Stdio::null())
        .spawn()?;
    let answer = wait_for("an answer", Duration::from_secs(30), || {
        ask(Ipv4Addr::new(10, 85, 0, 10))
    });
    child.kill()?;
    child.wait()?;
    ensure!(answer? == "ip-10-85-0-10: i-0a ");
    wait_for("no loop device", Duration::from_secs(20), || {
        ensure!(loop_devices()? == 0, "a loop device is left");
        Ok(())
    })?;
    Traces::nothing_left(&before)
}
