//! The cluster's network on a host where others have theirs.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use kprov_provider::Provider;
use kprov_types::Role;
use kprov_types::machine::NetworkSpec;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::room::{ROOM, machine, room, until};

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A range or a port that is used is refused, by the name of who uses it; and nothing is left of the attempt.
#[tokio::test]
async fn refuses_what_others_use() {
    let Some(room) = room(&["taken", "taken-too"], 30) else {
        return;
    };
    let (first, second) = (&room.clusters[0], &room.clusters[1]);
    let refused = async |network: &NetworkSpec| {
        let error = room.provider.ensure_network(second, network).await.unwrap_err();
        assert_eq!(room.provider.leftovers(second).await.unwrap(), [], "after: {error}");
        assert!(error.hint.is_some(), "{error}");
        error.to_string()
    };
    // This host's loopback and everything on it.
    let loopback = NetworkSpec {
        cidr: Some("127.0.0.0/24".parse().unwrap()),
        api_port: 6443,
    };
    assert!(
        refused(&loopback)
            .await
            .contains("in use by the interface `lo` (127.0.0.1/8)")
    );
    // Another cluster's, which is known even while its bridge is not there.
    room.provider.ensure_network(first, &room.network()).await.unwrap();
    assert_eq!(
        refused(&room.network()).await,
        format!("the address range `{}` is in use by cluster `{first}`", room.range)
    );
    // A port.
    let beside = NetworkSpec {
        cidr: Some("10.99.31.0/24".parse().unwrap()),
        api_port: 6443,
    };
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taken = NetworkSpec {
        api_port: port,
        ..beside.clone()
    };
    let said = refused(&taken).await;
    assert_eq!(
        said,
        format!("port {port} is in use on `10.99.31.1`: a process of this host listens on `0.0.0.0:{port}`")
    );
    drop(listener);
    room.provider.ensure_network(second, &taken).await.unwrap();
    // A network stays what it is.
    let error = room
        .provider
        .ensure_network(second, &beside)
        .await
        .unwrap_err()
        .to_string();
    let has = format!("cluster `{second}` has the network `10.99.31.0/24 port {port}`, not `10.99.31.0/24 port 6443`");
    assert_eq!(error, has);
}

/// What the host lost (a restart, a person with `ip`) is noticed and mended, and the machines stay connected.
#[tokio::test]
async fn is_mended() {
    let Some(room) = room(&["mend"], 32) else { return };
    let cluster = room.cluster();
    let specs = [machine(cluster, "cp-0", Role::ControlPlane, "exec sleep 3600")];
    let made = room.up(cluster, &room.network(), &specs).await;
    let network = room.provider.observe(cluster).await.unwrap().network.unwrap();
    assert!(network.complete);
    let bridge = {
        let output = Command::new("ip")
            .args(["-brief", "address", "show", "to", "10.99.32.1"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout)
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .to_owned()
    };
    let complete = async || room.provider.observe(cluster).await.unwrap().network.unwrap().complete;

    ip(&format!("link set dev {bridge} down"));
    assert!(!complete().await);
    assert_eq!(
        room.provider.ensure_network(cluster, &room.network()).await.unwrap(),
        network
    );

    ip(&format!("link delete dev {bridge}"));
    assert!(!complete().await);
    assert_eq!(
        room.provider.ensure_network(cluster, &room.network()).await.unwrap(),
        network
    );
    // Answers, or refuses: either comes from the other side. The balancer closes at once, as nobody listens behind it.
    room.inside(cluster, &made[0].name, &format!("{ROOM} ask 10.99.32.1:6443"));

    let record = std::fs::read(room.state_dir.join(cluster.as_str()).join("balancer.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    kill(
        Pid::from_raw(i32::try_from(record["pid"].as_i64().unwrap()).unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    for _ in 0..100 {
        if !complete().await {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(!complete().await);
    assert_eq!(
        room.provider.ensure_network(cluster, &room.network()).await.unwrap(),
        network
    );
    until("it listens", || std::net::TcpStream::connect("10.99.32.1:6443").ok());
}

/// An interface of another's that happens to have our name is neither used nor removed.
#[tokio::test]
async fn leaves_foreign_interfaces_alone() {
    let Some(room) = room(&["foreign"], 33) else { return };
    let cluster = room.cluster();
    room.provider.ensure_network(cluster, &room.network()).await.unwrap();
    let output = Command::new("ip")
        .args(["-brief", "address", "show", "to", "10.99.33.1"])
        .output()
        .unwrap();
    let bridge = String::from_utf8(output.stdout)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    room.provider.remove_network(cluster).await.unwrap();

    ip(&format!("link add name {bridge} type bridge"));
    ip(&format!("link set dev {bridge} alias somebody-else"));
    let error = room
        .provider
        .ensure_network(cluster, &room.network())
        .await
        .unwrap_err();
    room.provider.remove_network(cluster).await.unwrap();
    let kept = Command::new("ip")
        .args(["link", "show", "dev", &bridge])
        .status()
        .unwrap()
        .success();
    ip(&format!("link delete dev {bridge}"));
    assert_eq!(
        error.to_string(),
        format!("the interface `{bridge}` is not cluster `{cluster}`'s")
    );
    assert!(kept);
}

/// The way out is opened where the host has one, and closed again with the last cluster; not before.
#[tokio::test]
async fn the_way_out_is_put_back() {
    let Some(room) = room(&["way", "way-too"], 34) else {
        return;
    };
    if Command::new("iptables").arg("--version").output().is_err() {
        eprintln!("SKIPPED: no iptables on this host");
        return;
    }
    let (provider, clusters, network) = (room.provider.clone(), room.clusters.clone(), room.network());
    // A host of its own: its network and its `/run`, which hold nothing yet but a default route.
    let host = std::thread::spawn(move || {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
        let none: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        std::fs::write(FORWARD, "0").unwrap();
        ip("link set dev lo up");
        ip("link add name wan0 type bridge");
        ip("address add 192.0.2.2/24 dev wan0");
        ip("link set dev wan0 up");
        ip("route add default via 192.0.2.1");
        let rules = |cluster: &dyn std::fmt::Display| {
            let saved = Command::new("iptables-save").output().unwrap();
            let tag = format!("--comment \"kprov:{cluster}\"");
            String::from_utf8(saved.stdout).unwrap().matches(&tag).count()
        };
        let forward = || std::fs::read_to_string(FORWARD).unwrap().trim().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let beside = NetworkSpec {
                cidr: Some("10.99.35.0/24".parse().unwrap()),
                ..network.clone()
            };
            for _ in 0..2 {
                provider.ensure_network(&clusters[0], &network).await.unwrap();
                provider.ensure_network(&clusters[1], &beside).await.unwrap();
                assert_eq!((rules(&clusters[0]), rules(&clusters[1])), (3, 3));
                assert_eq!(forward(), "1");
            }
            provider.remove_network(&clusters[0]).await.unwrap();
            assert_eq!((rules(&clusters[0]), rules(&clusters[1])), (0, 3));
            assert_eq!(forward(), "1");
            assert_eq!(provider.leftovers(&clusters[0]).await.unwrap(), []);
            provider.remove_network(&clusters[1]).await.unwrap();
            assert_eq!(rules(&clusters[1]), 0);
            assert_eq!(forward(), "0");
            assert!(!std::path::Path::new("/run/kprov").exists());
        });
    });
    host.join().unwrap();
}

/// Two callers at once end with one cluster; and a cluster known from elsewhere is not taken over.
#[tokio::test]
async fn one_cluster_of_a_name() {
    let Some(room) = room(&["one"], 36) else { return };
    let cluster = room.cluster();
    let specs = [machine(cluster, "cp-0", Role::ControlPlane, "exec sleep 3600")];
    let network = room.network();
    let (first, second) = tokio::join!(room.up(cluster, &network, &specs), room.up(cluster, &network, &specs));
    assert_eq!(first, second);
    let observed = room.provider.observe(cluster).await.unwrap();
    assert_eq!(observed.machines, first);

    let elsewhere = crate::room::provider(&room.state_dir.with_file_name("elsewhere"), &room.hidden);
    let error = elsewhere.ensure_network(cluster, &network).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("a cluster `{cluster}` runs on this host already")),
        "{error}"
    );
    assert_eq!(room.provider.observe(cluster).await.unwrap(), observed);
    assert!(!room.state_dir.with_file_name("elsewhere").exists());
}
