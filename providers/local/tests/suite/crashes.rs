//! `kill -9` of the caller, at any moment: the next one finishes what it began, or removes it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kprov_provider::Provider;
use kprov_types::Role;
use kprov_types::machine::MachineState;

use crate::room::{ROOM, Room, machine, room, traces, until};

const SCRIPT: &str = "exec sleep 3600";

/// Begins `up` in a process of its own, with a file open that its children must not inherit.
fn begin(room: &Room) -> Child {
    let script = room.state_dir.parent().unwrap().join("first-boot");
    fs::write(&script, format!("#!/bin/sh\n{SCRIPT}\n")).unwrap();
    let arguments = [
        "up",
        room.state_dir.as_str(),
        room.cluster().as_str(),
        &room.range,
        script.as_str(),
    ];
    Command::new(ROOM)
        .args(arguments)
        .process_group(0)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn up_is_finished_or_removed_after_any_crash() {
    let Some(room) = room(&["crash"], 40) else { return };
    let cluster = room.cluster();
    let specs = [
        machine(cluster, "cp-0", Role::ControlPlane, SCRIPT),
        machine(cluster, "worker-0", Role::Worker, SCRIPT),
    ];
    let words = [cluster.to_string()];
    let mut cut_short = 0;
    for round in 0_u64..16 {
        let mut child = begin(&room);
        // From before anything was done to after everything was.
        std::thread::sleep(Duration::from_millis(round * 20));
        let ended = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        cut_short += usize::from(!ended && room.state_dir.exists());
        if round % 2 == 0 {
            let made = room.up(cluster, &room.network(), &specs).await;
            assert!(
                made.iter().all(|m| m.state == MachineState::Running),
                "round {round}: {made:?}"
            );
            assert!(
                room.provider.observe(cluster).await.unwrap().network.unwrap().complete,
                "round {round}"
            );
            // Each of them once: one init, one interface.
            for m in &made {
                let inits = traces(&words)
                    .into_iter()
                    .filter(|t| t.contains(" pid1 ") && t.contains(m.name.as_str()));
                assert_eq!(inits.count(), 1, "round {round}");
            }
            let interfaces = traces(&words).into_iter().filter(|t| t.contains("alias")).count();
            assert_eq!(interfaces, 1 + made.len(), "round {round}");
        }
        room.down(cluster).await;
        assert_eq!(room.provider.leftovers(cluster).await.unwrap(), [], "round {round}");
        until("no trace is left", || traces(&words).is_empty().then_some(()));
        assert!(!room.state_dir.exists(), "round {round}");
    }
    assert!(
        cut_short >= 3,
        "only {cut_short} rounds were cut short: the test shows nothing"
    );
}

/// Machines outlive the call that made them, its process group and its session, and hold nothing of it.
#[tokio::test]
async fn machines_are_detached() {
    let Some(room) = room(&["detach"], 41) else { return };
    let mut child = begin(&room);
    let group = child.id();
    assert!(child.wait().unwrap().success());
    let observed = room.provider.observe(room.cluster()).await.unwrap();
    let balancer = fs::read(room.state_dir.join(room.cluster().as_str()).join("balancer.json")).unwrap();
    let balancer: serde_json::Value = serde_json::from_slice(&balancer).unwrap();
    let mut pids: Vec<i64> = observed
        .machines
        .iter()
        .map(|m| i64::from(room.pid(room.cluster(), &m.name)))
        .collect();
    assert_eq!(pids.len(), 2);
    pids.push(balancer["pid"].as_i64().unwrap());
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let (its_group, session, terminal) = (fields[2], fields[3], fields[4]);
        assert_ne!(its_group, group.to_string());
        assert_eq!((session, terminal), (its_group, "0"), "{stat}");
        assert_eq!(session, pid.to_string());
        assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));
        // Its own files, and none of ours: no terminal, no pipe that a test runner waits for, no lock.
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            let entry = entry.unwrap();
            let target = fs::read_link(entry.path()).unwrap_or_default().display().to_string();
            let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
            assert!(
                number > 2 || target == "/dev/null" || target.ends_with("balancer.log"),
                "{number} -> {target}"
            );
            assert!(
                !target.ends_with("/lock") && !target.contains("/dev/pts"),
                "{number} -> {target}"
            );
        }
    }
}

/// Without the privileges it takes, that is said, and nothing is touched.
#[test]
fn says_that_it_takes_root() {
    let Some(room) = room(&["nobody"], 42) else { return };
    let parent = room.state_dir.parent().unwrap();
    let (exe, script) = (parent.join("machine-room"), parent.join("first-boot"));
    fs::copy(ROOM, &exe).unwrap();
    fs::write(&script, format!("#!/bin/sh\n{SCRIPT}\n")).unwrap();
    fs::set_permissions(parent, fs::Permissions::from_mode(0o777)).unwrap();
    let arguments = [
        "up",
        room.state_dir.as_str(),
        room.cluster().as_str(),
        &room.range,
        script.as_str(),
    ];
    let output = Command::new(exe)
        .args(arguments)
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(
        said.contains("need the capability `CAP_NET_ADMIN`, which this process lacks"),
        "{said}"
    );
    assert!(!room.state_dir.exists());
}
