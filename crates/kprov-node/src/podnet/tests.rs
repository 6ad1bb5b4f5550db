//! The pure parts by tables and properties; the rest in network namespaces that end with the threads that hold them.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use kprov_types::MachineName;
use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;
use tokio::sync::watch;

use super::run::sync;
use super::*;

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn pods() -> Ipv4Net {
    net("10.244.0.0/16")
}

fn node(name: &str, address: &str, range: Option<&str>) -> NodeView {
    NodeView {
        name: MachineName::new(name).unwrap(),
        internal_ip: ip(address),
        pod_cidr: range.map(net),
    }
}

fn uplink() -> Uplink {
    Uplink {
        index: 2,
        mtu: 1500,
        subnets: vec![net("10.0.1.0/24")],
    }
}

fn me() -> NodeView {
    node("me", "10.0.1.1", Some("10.244.0.0/24"))
}

#[test]
fn one_subnet_needs_no_tunnel() {
    let nodes = [
        me(),
        node("a", "10.0.1.2", Some("10.244.1.0/24")),
        node("b", "10.0.1.3", None),
    ];
    let wanted = desired(&me(), &nodes, &uplink(), pods());
    assert_eq!(
        wanted.routes,
        [(net("10.244.1.0/24"), Route::Direct(ip("10.0.1.2")))].into()
    );
    assert_eq!(wanted.tunnel, None);
    assert_eq!(
        wanted.cni,
        Some(CniConfig {
            pod_cidr: net("10.244.0.0/24"),
            mtu: 1500
        })
    );
    assert_eq!(
        wanted.masquerade.machines,
        [ip("10.0.1.1"), ip("10.0.1.2"), ip("10.0.1.3")].into()
    );
}

#[test]
fn another_subnet_needs_one() {
    let nodes = [
        me(),
        node("a", "10.0.1.2", Some("10.244.1.0/24")),
        node("far", "10.0.2.2", Some("10.244.2.0/24")),
    ];
    let wanted = desired(&me(), &nodes, &uplink(), pods());
    let gateway = ip("10.244.2.0");
    let far = Mac([0x0e, 0x6b, 10, 0, 2, 2]);
    assert_eq!(wanted.routes[&net("10.244.1.0/24")], Route::Direct(ip("10.0.1.2")));
    assert_eq!(wanted.routes[&net("10.244.2.0/24")], Route::Tunnel(gateway));
    let tunnel = Tunnel {
        local: ip("10.0.1.1"),
        mac: Mac([0x0e, 0x6b, 10, 0, 1, 1]),
        address: ip("10.244.0.0"),
        mtu: 1450,
        neighbours: [(gateway, far)].into(),
        forwarding: [(far, ip("10.0.2.2"))].into(),
    };
    assert_eq!(wanted.tunnel, Some(tunnel));
    assert_eq!(wanted.cni.unwrap().mtu, 1450);
    assert_eq!(
        wanted.masquerade.machines,
        [ip("10.0.1.1"), ip("10.0.1.2")].into(),
        "the far one sees this machine"
    );
    // The other end agrees on how this machine is reached.
    let there = Uplink {
        subnets: vec![net("10.0.2.0/24")],
        ..uplink()
    };
    let other = desired(&nodes[2], &nodes, &there, pods()).tunnel.unwrap();
    assert_eq!(other.mac, far);
    assert_eq!(other.neighbours[&ip("10.244.0.0")], Mac([0x0e, 0x6b, 10, 0, 1, 1]));
}

#[test]
fn without_a_range_of_its_own_a_machine_has_no_tunnel_and_no_pods() {
    let me = node("me", "10.0.1.1", None);
    let nodes = [
        node("a", "10.0.1.2", Some("10.244.1.0/24")),
        node("far", "10.0.2.2", Some("10.244.2.0/24")),
    ];
    let wanted = desired(&me, &nodes, &uplink(), pods());
    assert_eq!(
        wanted.routes.keys().copied().collect::<Vec<_>>(),
        [net("10.244.1.0/24")]
    );
    assert_eq!((wanted.tunnel, wanted.cni), (None, None));
}

#[test]
fn wrong_ranges_draw_no_traffic() {
    for range in [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "192.168.0.0/24",
        "10.244.0.0/16",
        "10.244.0.128/25",
        "10.244.0.0/24",
    ] {
        let nodes = [
            me(),
            node("evil", "10.0.1.66", Some(range)),
            node("far", "10.0.9.66", Some(range)),
        ];
        let wanted = desired(&me(), &nodes, &uplink(), pods());
        assert!(
            wanted.routes.is_empty() && wanted.tunnel.is_none(),
            "{range}: {wanted:?}"
        );
    }
    let twice = [
        node("b", "10.0.1.3", Some("10.244.1.0/24")),
        node("a", "10.0.1.2", Some("10.244.1.0/24")),
    ];
    let wanted = desired(&me(), &twice, &uplink(), pods());
    assert_eq!(
        wanted.routes,
        [(net("10.244.1.0/24"), Route::Direct(ip("10.0.1.2")))].into()
    );
}

#[test]
fn a_conflist_as_containerd_reads_it() {
    let config = CniConfig {
        pod_cidr: net("10.244.3.0/24"),
        mtu: 1450,
    };
    let read: serde_json::Value = serde_json::from_str(&config.conflist()).unwrap();
    assert_eq!(read["plugins"][0]["type"], "bridge");
    assert_eq!(read["plugins"][0]["mtu"], 1450);
    assert_eq!(read["plugins"][0]["ipam"]["ranges"][0][0]["subnet"], "10.244.3.0/24");
    assert_eq!(read["plugins"][1]["capabilities"]["portMappings"], true);

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net.d/10-kprov.conflist");
    config.write(&path).unwrap();
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    config.write(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().modified().unwrap(),
        written,
        "an equal file is left alone"
    );
    CniConfig { mtu: 1500, ..config }.write(&path).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().contains("1500"));
    assert_eq!(
        std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
        1,
        "nothing else is left there"
    );
}

/// The kernel, as far as actions go; refuses what it would refuse.
fn apply(observed: &mut Observed, action: &Action) {
    match action {
        Action::RemoveTunnel => {
            assert!(observed.tunnel.take().is_some());
            observed
                .routes
                .retain(|_, route| !matches!(route, Some(Route::Tunnel(_))));
        }
        Action::CreateTunnel(tunnel) => {
            assert!(observed.tunnel.is_none());
            let bare = Tunnel {
                neighbours: BTreeMap::new(),
                forwarding: BTreeMap::new(),
                ..tunnel.clone()
            };
            observed.tunnel = Some(ObservedTunnel {
                sound: true,
                tunnel: bare,
            });
        }
        Action::SetNeighbour(address, mac) => drop(entries(observed).neighbours.insert(*address, *mac)),
        Action::RemoveNeighbour(address) => assert!(entries(observed).neighbours.remove(address).is_some()),
        Action::SetForwarding(mac, machine) => drop(entries(observed).forwarding.insert(*mac, *machine)),
        Action::RemoveForwarding(mac, machine) => assert_eq!(entries(observed).forwarding.remove(mac), Some(*machine)),
        Action::AddRoute(range, route) => {
            check_gateway(observed, *route);
            assert_eq!(observed.routes.insert(*range, Some(*route)), None);
        }
        Action::ReplaceRoute(range, route) => {
            check_gateway(observed, *route);
            assert!(observed.routes.insert(*range, Some(*route)).is_some());
        }
        Action::RemoveRoute(range) => assert!(observed.routes.remove(range).is_some()),
    }
}

fn entries(observed: &mut Observed) -> &mut Tunnel {
    &mut observed.tunnel.as_mut().unwrap().tunnel
}

fn check_gateway(observed: &mut Observed, route: Route) {
    if let Route::Tunnel(gateway) = route {
        let tunnel = entries(observed);
        assert!(
            tunnel.forwarding.contains_key(&tunnel.neighbours[&gateway]),
            "packets would be lost"
        );
    }
}

prop_compose! {
    fn some_desired()(
        others in prop::collection::vec((1_u8..6, 0_u8..4, prop::option::of(1_u8..8)), 0..6),
        has_range: bool,
        mtu in prop::sample::select(vec![1500_u32, 9000]),
    ) -> Desired {
        let me = node("me", "10.0.1.1", has_range.then_some("10.244.0.0/24"));
        let nodes: Vec<_> = others
            .iter()
            .enumerate()
            .map(|(i, (subnet, host, range))| NodeView {
                name: MachineName::new(format!("n{i}")).unwrap(),
                internal_ip: Ipv4Addr::new(10, 0, *subnet, 10 + host),
                pod_cidr: range.map(|r| Ipv4Net::new(Ipv4Addr::new(10, 244, r, 0), 24).unwrap()),
            })
            .collect();
        desired(&me, &nodes, &Uplink { mtu, ..uplink() }, pods())
    }
}

fn settle(wanted: &Desired, observed: &mut Observed) {
    for action in diff(wanted, observed) {
        apply(observed, &action);
    }
}

proptest! {
    #[test]
    fn one_round_converges_from_anything(
        before in some_desired(),
        wanted in some_desired(),
        sound: bool,
        strange in prop::collection::btree_set(0_u8..9, 0..3),
        lost in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
    ) {
        let mut observed = Observed::default();
        settle(&before, &mut observed);
        // What others may have done since.
        for range in strange {
            observed.routes.insert(Ipv4Net::new(Ipv4Addr::new(10, 244, range, 0), 24).unwrap(), None);
        }
        for index in lost {
            if !observed.routes.is_empty() {
                let range = *index.get(&observed.routes.keys().copied().collect::<Vec<_>>());
                observed.routes.remove(&range);
            }
            if let Some(there) = &mut observed.tunnel {
                there.sound = sound;
                there.tunnel.neighbours.pop_first();
                if let Some(mut entry) = there.tunnel.forwarding.first_entry() {
                    *entry.get_mut() = Ipv4Addr::new(192, 0, 2, 1);
                }
            }
        }
        settle(&wanted, &mut observed);
        prop_assert_eq!(diff(&wanted, &observed), []);
        let routes: BTreeMap<_, _> = wanted.routes.iter().map(|(range, route)| (*range, Some(*route))).collect();
        prop_assert_eq!(&observed.routes, &routes);
        prop_assert_eq!(observed.tunnel.map(|there| there.tunnel), wanted.tunnel);
    }
}

/// A thread in a network namespace of its own, which ends with it, however that comes.
struct Namespace {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
    thread: nix::unistd::Pid,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (started, start) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            started.send(nix::unistd::gettid()).unwrap();
            for job in inbox {
                job();
            }
        });
        let namespace = Self {
            jobs,
            thread: start.recv().unwrap(),
        };
        namespace.sh("ip link set lo up");
        namespace
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(done.send(job())))).unwrap();
        result.recv().expect("the job panicked")
    }

    fn sh(&self, script: &str) -> String {
        let script = script.to_owned();
        self.run(move || {
            let output = Command::new("sh").args(["-euc", &script]).output().unwrap();
            assert!(
                output.status.success(),
                "`{script}`: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        })
    }

    fn sync(&self, settings: &PodNetworkSettings, me: &NodeView, nodes: &[NodeView]) -> PodNetworkStatus {
        let (settings, me, nodes) = (settings.clone(), me.clone(), nodes.to_vec());
        self.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime
                .block_on(sync(&settings, &me, &nodes))
                .map_err(|error| crate::chain(&error))
                .unwrap()
        })
    }
}

/// A machine with one pod, as kubelet and CNI plugins would have made it.
struct Machine {
    namespace: Namespace,
    pod: Namespace,
    pod_address: Ipv4Addr,
    view: NodeView,
    settings: PodNetworkSettings,
}

const PATIENCE: Duration = Duration::from_secs(5);
/// Enough for many full packets each way.
const BLOCK: usize = 400_000;

/// Connects from `from` to `address` in `to`, sends a block there and back, and tells whom the other end saw.
fn reach(from: &Namespace, to: &Namespace, address: Ipv4Addr) -> std::io::Result<IpAddr> {
    let listener = to.run(move || TcpListener::bind((address, 0)))?;
    let target = SocketAddr::from((address, listener.local_addr()?.port()));
    listener.set_nonblocking(true)?;
    let server = std::thread::spawn(move || -> std::io::Result<IpAddr> {
        let begun = Instant::now();
        let (mut stream, peer) = loop {
            match listener.accept() {
                Ok(accepted) => break accepted,
                Err(_) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(error),
            }
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut block = vec![0; BLOCK];
        stream.read_exact(&mut block)?;
        stream.write_all(&block)?;
        Ok(peer.ip())
    });
    from.run(move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let block = vec![7; BLOCK];
        stream.write_all(&block)?;
        let mut answer = vec![0; BLOCK];
        stream.read_exact(&mut answer)?;
        assert_eq!(block, answer);
        Ok(())
    })?;
    server.join().unwrap()
}

/// `a` and `b` on one subnet, `c` behind a router that knows nothing of pods.
fn cluster(directory: &std::path::Path) -> (Namespace, Vec<Machine>) {
    let router = Namespace::new();
    router.sh(
        "ip link add br0 type bridge && ip addr add 10.71.1.1/24 dev br0 && ip link set br0 up
        echo 1 > /proc/sys/net/ipv4/ip_forward
        ip route add blackhole 10.244.0.0/16",
    );
    let machines = [("a", "10.71.1.11", 1), ("b", "10.71.1.12", 2), ("c", "10.71.2.13", 3)];
    let machines = machines.map(|(name, address, range)| {
        let (namespace, pod) = (Namespace::new(), Namespace::new());
        router.sh(&format!(
            "ip link add to-{name} type veth peer name eth0 netns {}",
            namespace.thread
        ));
        let gateway = if name == "c" {
            router.sh("ip addr add 10.71.2.1/24 dev to-c");
            "10.71.2.1"
        } else {
            router.sh(&format!("ip link set to-{name} master br0"));
            "10.71.1.1"
        };
        router.sh(&format!("ip link set to-{name} up"));
        let pods_gateway = format!("10.244.{range}.1");
        namespace.sh(&format!(
            "ip addr add {address}/24 dev eth0 && ip link set eth0 up && ip route add default via {gateway}
             ip link add cni0 type bridge && ip addr add {pods_gateway}/24 dev cni0 && ip link set cni0 up
             ip link add veth0 type veth peer name eth0 netns {} && ip link set veth0 master cni0 up
             iptables -w -P FORWARD DROP",
            pod.thread
        ));
        let pod_address = Ipv4Addr::new(10, 244, range, 5);
        pod.sh(&format!(
            "ip addr add {pod_address}/24 dev eth0 && ip link set eth0 up && ip route add default via {pods_gateway}"
        ));
        let view = node(name, address, Some(&format!("10.244.{range}.0/24")));
        let settings = PodNetworkSettings {
            cni_config: directory.join(format!("{name}.conflist")),
            ..PodNetworkSettings::new(view.name.clone(), pods())
        };
        Machine {
            namespace,
            pod,
            pod_address,
            view,
            settings,
        }
    });
    (router, machines.into())
}

#[test]
fn pods_reach_each_other_directly_and_through_the_tunnel() {
    let directory = tempfile::tempdir().unwrap();
    let (router, machines) = cluster(directory.path());
    let [a, b, c] = machines.as_slice() else {
        panic!("three machines")
    };
    let views: Vec<_> = machines.iter().map(|machine| machine.view.clone()).collect();
    assert!(reach(&a.pod, &b.pod, b.pod_address).is_err(), "nothing is set up yet");

    // A route somebody else made, and one that was kprov's and is stale.
    a.namespace.sh("ip route add 10.99.0.0/16 via 10.71.1.1 proto static
        ip route add 10.244.9.0/24 via 10.71.1.12 proto 76");
    for machine in &machines {
        let status = machine.namespace.sync(&machine.settings, &machine.view, &views);
        assert!(status.ready, "{status:?}");
    }
    let own_routes = a.namespace.sh("ip route show proto 76");
    assert!(
        own_routes.contains("10.244.2.0/24 via 10.71.1.12 dev eth0"),
        "{own_routes}"
    );
    assert!(
        own_routes.contains("10.244.3.0/24 via 10.244.3.0 dev kprov.vxlan onlink"),
        "{own_routes}"
    );
    assert_eq!(own_routes.lines().count(), 2, "the stale one is gone: {own_routes}");
    assert!(
        a.namespace.sh("ip route").contains("10.99.0.0/16"),
        "what others made stays"
    );
    let conflist = std::fs::read_to_string(&a.settings.cni_config).unwrap();
    assert!(
        conflist.contains("10.244.1.0/24") && conflist.contains("1450"),
        "{conflist}"
    );

    // Pods, each seen by its own address; packets larger than the tunnel carries come through too.
    for from in &machines {
        for to in &machines {
            let seen = reach(&from.pod, &to.pod, to.pod_address);
            let seen = seen.unwrap_or_else(|error| panic!("{} to {}: {error}", from.view.name, to.view.name));
            assert_eq!(seen, from.pod_address, "{} to {}", from.view.name, to.view.name);
        }
    }
    // Machines themselves to pods, and pods to machines: a near one sees the pod, a far one the pod's machine.
    for to in [b, c] {
        reach(&a.namespace, &to.pod, to.pod_address).unwrap();
    }
    assert_eq!(reach(&a.pod, &b.namespace, b.view.internal_ip).unwrap(), a.pod_address);
    assert_eq!(
        reach(&a.pod, &c.namespace, c.view.internal_ip).unwrap(),
        a.view.internal_ip
    );
    // The world outside sees the machine.
    assert_eq!(reach(&a.pod, &router, ip("10.71.1.1")).unwrap(), a.view.internal_ip);
    assert_eq!(reach(&c.pod, &router, ip("10.71.1.1")).unwrap(), c.view.internal_ip);

    // Again: nothing changes, and rules aren't doubled.
    let rules = |machine: &Machine| machine.namespace.sh("iptables-save | grep -v '^[#:]' | sort");
    let before = (
        a.namespace.sh("ip route; ip neigh show nud permanent; bridge fdb"),
        rules(a),
    );
    a.namespace.sync(&a.settings, &a.view, &views);
    assert_eq!(
        (
            a.namespace.sh("ip route; ip neigh show nud permanent; bridge fdb"),
            rules(a)
        ),
        before
    );
    assert_eq!(before.1.matches("-j KPROV-MASQ").count(), 1, "{}", before.1);

    // Damage is repaired.
    a.namespace
        .sh("ip route del 10.244.2.0/24 && ip link del kprov.vxlan && iptables -w -t nat -F");
    a.namespace.sync(&a.settings, &a.view, &views);
    assert_eq!(reach(&a.pod, &c.pod, c.pod_address).unwrap(), a.pod_address);
    assert_eq!(reach(&a.pod, &b.pod, b.pod_address).unwrap(), a.pod_address);

    // c leaves: its route and the tunnel with it.
    a.namespace.sync(&a.settings, &a.view, &views[..2]);
    assert!(!a.namespace.sh("ip route").contains("10.244.3.0"));
    assert!(!a.namespace.sh("ip link").contains(TUNNEL_NAME));
    assert!(reach(&a.pod, &c.pod, c.pod_address).is_err());
    assert_eq!(reach(&a.pod, &b.pod, b.pod_address).unwrap(), a.pod_address);
}

#[test]
fn it_follows_the_nodes_and_tells_how_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let (_router, machines) = cluster(directory.path());
    let views: Vec<_> = machines.iter().map(|machine| machine.view.clone()).collect();
    let settings = machines[0].settings.clone();
    let cni_config = settings.cni_config.clone();
    machines[0].namespace.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (nodes, list) = watch::channel(vec![]);
            let (report, mut status) = watch::channel(PodNetworkStatus::default());
            let task = tokio::spawn(run(settings, list, report));
            let mut until = async |what: &str, wanted: &dyn Fn(&PodNetworkStatus) -> bool| {
                let waiting = tokio::time::timeout(PATIENCE, status.wait_for(|now| wanted(now))).await;
                assert!(waiting.is_ok(), "waited for {what} in vain");
            };
            until("its Node", &|s| !s.ready && s.message.is_some()).await;
            nodes.send_replace(vec![NodeView {
                pod_cidr: None,
                ..views[0].clone()
            }]);
            until("its range", &|s| {
                !s.ready && s.message.as_ref().is_some_and(|m| m.contains("range"))
            })
            .await;
            assert!(!cni_config.exists());
            nodes.send_replace(views[..1].to_vec());
            until("ready", &|s| s.ready && s.direct == 0).await;
            assert!(cni_config.exists());
            nodes.send_replace(views.clone());
            until("all machines", &|s| s.ready && s.direct == 1 && s.tunnelled == 1).await;
            // A machine whose address isn't here cannot be served, and says so; then it can.
            let homeless = NodeView {
                internal_ip: ip("192.0.2.7"),
                ..views[0].clone()
            };
            nodes.send_replace(vec![homeless]);
            until("an error", &|s| {
                !s.ready && s.message.as_ref().is_some_and(|m| m.contains("192.0.2.7"))
            })
            .await;
            nodes.send_replace(views[..2].to_vec());
            until("ready again", &|s| s.ready && s.direct == 1 && s.tunnelled == 0).await;
            drop(nodes);
            tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
        });
    });
}

#[test]
fn this_host_has_what_pods_need() {
    // These tests themselves need all of it.
    assert_eq!(missing_network_features(), Vec::<String>::new());
}
