//! What harnesses ask for: machines at addresses of their choice, devices, power cuts.

use std::fs;
use std::process::Command;

use camino::Utf8Path;
use kprov_provider::Provider;
use kprov_types::Role;
use kprov_types::machine::{DiskSpec, MachineState};

use crate::room::{ROOM, machine, room, until};

/// A machine gets the address that is asked for, keeps it and what it wrote over a power cut, and sees a device that is attached.
#[tokio::test]
async fn a_machine_at_an_address() {
    let Some(room) = room(&["at"], 60) else { return };
    let cluster = room.cluster();
    let provider = &room.provider;
    provider.ensure_network(cluster, &room.network()).await.unwrap();
    let spec = machine(
        cluster,
        "worker-0",
        Role::Worker,
        &format!("exec {ROOM} answer 0.0.0.0:9000 here"),
    );
    let disk = DiskSpec {
        machine: spec.name.clone(),
        size_gib: 1,
    };
    provider.ensure_disks(cluster, &[disk]).await.unwrap();
    let address = "10.99.60.77".parse().unwrap();
    for bad in ["10.99.60.1", "10.99.60.0", "10.99.60.255", "10.98.0.5"] {
        let refused = provider
            .ensure_machines_at(cluster, &[(spec.clone(), bad.parse().unwrap())])
            .await;
        assert!(refused.unwrap_err().message.contains("no address left"), "{bad}");
    }
    let made = provider
        .ensure_machines_at(cluster, &[(spec.clone(), address)])
        .await
        .unwrap();
    assert_eq!(made[0].address, Some(address.into()));
    room.inside(cluster, &spec.name, "echo kept >/root/kept");

    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(16 << 20).unwrap();
    let losetup = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(disk.path())
        .output()
        .unwrap();
    let device = String::from_utf8(losetup.stdout).unwrap().trim().to_owned();
    let inside = Utf8Path::new("/dev/disk/by-id/one");
    let attached = provider
        .attach_device(cluster, &spec.name, Utf8Path::new(&device), inside)
        .await;
    let again = provider
        .attach_device(cluster, &spec.name, Utf8Path::new(&device), inside)
        .await;
    let size = room.inside(cluster, &spec.name, "blockdev --getsize64 /dev/disk/by-id/one");
    let elsewhere = provider
        .attach_device(cluster, &spec.name, Utf8Path::new(&device), "/etc/one".into())
        .await;
    assert!(
        Command::new("losetup")
            .args(["--detach", &device])
            .status()
            .unwrap()
            .success()
    );
    attached.unwrap();
    again.unwrap();
    assert_eq!(size, (16 << 20).to_string());
    assert!(elsewhere.unwrap_err().message.contains("not below `/dev`"));

    let first = provider.first_process(cluster, &spec.name).await.unwrap();
    provider.stop_machine(cluster, &spec.name).await.unwrap();
    provider.stop_machine(cluster, &spec.name).await.unwrap();
    let observed = provider.observe(cluster).await.unwrap();
    assert_eq!(observed.machines[0].state, MachineState::Stopped);
    let made = provider
        .ensure_machines_at(cluster, &[(spec.clone(), address)])
        .await
        .unwrap();
    assert_eq!(
        (made[0].address, &made[0].state),
        (Some(address.into()), &MachineState::Running)
    );
    assert_ne!(provider.first_process(cluster, &spec.name).await.unwrap(), first);
    assert_eq!(
        room.inside(cluster, &spec.name, "cat /root/kept; test -e /dev/disk || echo gone"),
        "kept\ngone"
    );

    // The host answers at a second address of the network.
    provider
        .add_host_address(cluster, "10.99.60.200".parse().unwrap())
        .await
        .unwrap();
    let mut server = Command::new(ROOM)
        .args(["answer", "10.99.60.200:9001", "host"])
        .spawn()
        .unwrap();
    let answer = until("the host answers", || {
        let text = room.inside(
            cluster,
            &spec.name,
            &format!("{ROOM} ask 10.99.60.200:9001 2>/dev/null || true"),
        );
        (!text.is_empty()).then_some(text)
    });
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(answer, "host");
    room.down(cluster).await;
    assert!(fs::metadata(room.state_dir.join(cluster.as_str())).is_err());
}
