//! What a machine is: its namespaces, its root, its first process, its life.

use std::fs;
use std::time::{Duration, Instant};

use kprov_provider::{Advice, Provider};
use kprov_types::Role;
use kprov_types::machine::MachineState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::room::{ROOM, machine, room, traces, until};

/// Three machines find each other, and are what `lib.rs` says they are.
#[tokio::test]
async fn three_machines_are_machines() {
    let Some(room) = room(&["three"], 20) else { return };
    let cluster = room.cluster();
    let secret = room.state_dir.parent().unwrap().join("secret");
    fs::write(&secret, "of the host").unwrap();
    // The machine answers with its own name; the API port is the first machine's, behind the balancer.
    let script = format!("{ROOM} answer 0.0.0.0:9000 $(hostname) & exec {ROOM} answer 0.0.0.0:6443 api-$(hostname)");
    let specs = [
        machine(cluster, "cp-0", Role::ControlPlane, &script),
        machine(cluster, "worker-0", Role::Worker, &script),
        machine(cluster, "worker-1", Role::Worker, &script),
    ];
    room.provider.ensure_network(cluster, &room.network()).await.unwrap();
    let made = room.up(cluster, &room.network(), &specs).await;
    assert!(made.iter().all(|m| m.state == MachineState::Running), "{made:?}");
    let names: Vec<_> = made.iter().map(|m| m.name.clone()).collect();
    let address = |i: usize| made[i].address.unwrap();

    for (i, name) in names.iter().enumerate() {
        let inside = |script: &str| room.inside(cluster, name, script);
        assert_eq!(inside("hostname; cat /etc/hostname"), format!("{name}\n{name}"));
        assert!(inside("cat /etc/hosts").contains(&format!("{} {name}", address(i))));
        let peer = (i + 1) % names.len();
        let ask = format!("{ROOM} ask {}:9000", address(peer));
        let answer = until("machines reach each other", || {
            let text = room.inside(cluster, name, &format!("{ask} 2>/dev/null || true"));
            (!text.is_empty()).then_some(text)
        });
        assert_eq!(answer, names[peer].as_str());
        // Its own network: a loopback and one interface, with a way to the host.
        assert_eq!(inside("ls /sys/class/net"), "eth0\nlo");
        assert!(inside("ip route show default").contains(&room.range.replace("0/24", "1")));
        assert_eq!(inside("cat /proc/sys/net/ipv4/ip_forward"), "1");
        // Its own processes: init, and what the script began.
        assert_eq!(inside("cut -d' ' -f1 /proc/1/stat"), "1");
        assert!(!inside("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").contains("nextest"));
        // Its own control groups, seen from their root, and writable.
        assert!(
            inside("cat /proc/1/cgroup")
                .lines()
                .all(|l| l.ends_with(":/") || l.ends_with(":/init"))
        );
        inside("for d in $(awk '$3 ~ /^cgroup/ {print $2}' /proc/mounts); do mkdir $d/try && rmdir $d/try; done");
        // What kubelet and containerd need.
        inside("dd if=/dev/kmsg of=/dev/null bs=8k count=1 2>/dev/null; test -r /dev/kmsg");
        inside("mkdir /tmp/a /tmp/b && mount --bind /tmp/a /tmp/b && umount /tmp/b");
        assert!(inside("grep ' / / ' /proc/1/mountinfo").contains(" shared:"));
        inside("tty=$(script -qc tty /dev/null) && case $tty in /dev/pts/*) ;; *) exit 1;; esac");
        inside("test -p /dev/stdin || test -c /dev/null; echo x >/dev/null; head -c 8 /dev/urandom | wc -c");
        for real in ["containerd", "kubelet", "kprov"] {
            let kind = inside(&format!("stat -f -c %T /var/lib/{real}"));
            assert_ne!(kind, "overlayfs", "/var/lib/{real}");
        }
        // Nothing of the host's that is none of its business.
        assert_eq!(inside(&format!("ls -A {}", room.state_dir)), "");
        assert_eq!(inside(&format!("ls -A {}", room.hidden)), "");
        assert_eq!(
            inside("ls -A /etc/kubernetes /etc/kprov /etc/cni /etc/containerd | grep -v :$ || true"),
            ""
        );
        assert_eq!(inside("ls -A /tmp"), "a\nb");
        // What it writes is its own.
        inside(&format!(
            "echo changed >{secret}; echo new >/etc/kprov/new; echo data >/mnt/data/file"
        ));
        assert_eq!(fs::read_to_string(&secret).unwrap(), "of the host");
        let disk = room.state_dir.join(cluster.as_str()).join("disks").join(name.as_str());
        assert_eq!(fs::read_to_string(disk.join("file")).unwrap(), "data\n");
    }
    let ids: Vec<String> = names
        .iter()
        .map(|n| room.inside(cluster, n, "cat /etc/machine-id"))
        .collect();
    assert!(
        ids.iter()
            .all(|id| id.len() == 32 && ids.iter().filter(|other| *other == id).count() == 1),
        "{ids:?}"
    );

    // The endpoint leads to the control-plane machine.
    let observed = room.provider.observe(cluster).await.unwrap();
    let endpoint = observed.network.unwrap().endpoint;
    let answer = until("the endpoint answers", || {
        let address = format!("{}:{}", endpoint.host, endpoint.port);
        let output = std::process::Command::new(ROOM)
            .args(["ask", &address])
            .output()
            .unwrap();
        Some(String::from_utf8(output.stdout).unwrap().trim().to_owned()).filter(|t| !t.is_empty())
    });
    assert_eq!(answer, format!("api-{}", names[0]));

    // The host sees none of their mounts, and after `down` nothing else either.
    let words = [cluster.to_string(), room.range.replace("0/24", "")];
    assert!(
        traces(&words).iter().any(|t| t.starts_with("interface: ")),
        "the search finds nothing at all"
    );
    assert!(!traces(&words).iter().any(|t| t.starts_with("mount: ")));
    let namespaces: Vec<String> = names
        .iter()
        .map(|n| fs::read_link(format!("/proc/{}/ns/net", room.pid(cluster, n))).unwrap())
        .map(|p| p.display().to_string())
        .collect();
    room.down(cluster).await;
    until("no trace is left", || traces(&words).is_empty().then_some(()));
    assert_eq!(room.provider.leftovers(cluster).await.unwrap(), []);
    assert!(!room.state_dir.exists());
    for entry in fs::read_dir("/proc").unwrap() {
        if let Ok(link) = fs::read_link(entry.unwrap().path().join("ns/net")) {
            assert!(!namespaces.contains(&link.display().to_string()));
        }
    }
}

/// A machine starts in well under a second, five of them in little more.
#[tokio::test]
async fn starts_quickly() {
    let Some(room) = room(&["quick"], 21) else { return };
    let cluster = room.cluster();
    let specs: Vec<_> = (0..5)
        .map(|i| machine(cluster, &format!("worker-{i}"), Role::Worker, "exec sleep 3600"))
        .collect();
    room.up(cluster, &room.network(), &[]).await;
    let begin = Instant::now();
    room.up(cluster, &room.network(), &specs).await;
    // Generous, as other tests run beside this one; alone it's a fifth of it.
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    eprintln!("five machines in {:?}", begin.elapsed());
}

/// The script runs at each boot and again when it ends; the log keeps what it prints; a killed machine keeps its files.
#[tokio::test]
async fn the_script_runs_again() {
    let Some(room) = room(&["again"], 22) else { return };
    let cluster = room.cluster();
    let script = "echo run >>/etc/runs; echo \"run $(wc -l </etc/runs) of $0\"; \
                  test $(wc -l </etc/runs) = 1 && exit 3; exec sleep 3600";
    let specs = [machine(cluster, "worker-0", Role::Worker, script)];
    let made = room.up(cluster, &room.network(), &specs).await;
    let name = &made[0].name;
    let text = room.console_with(cluster, name, "run 2 of").await;
    assert!(text.contains("run 1 of /run/kprov/first-boot\n"), "{text}");
    assert!(
        text.contains("the first-boot script ended with exit code 3; it runs again in 1 s\n"),
        "{text}"
    );

    let old = room.pid(cluster, name);
    kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
    let mut seen = made.clone();
    for _ in 0..200 {
        seen = room.provider.observe(cluster).await.unwrap().machines;
        if seen[0].state == MachineState::Stopped {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(seen[0].state, MachineState::Stopped);
    let again = room.up(cluster, &room.network(), &specs).await;
    assert_eq!(again, made);
    assert_ne!(room.pid(cluster, name), old);
    room.console_with(cluster, name, "run 3 of").await;
}

/// Told to end, a machine lets its programs end first, then takes the rest along. Orphans are taken in.
#[tokio::test]
async fn ends_in_order() {
    let Some(room) = room(&["ends"], 23) else { return };
    let cluster = room.cluster();
    let script = "trap 'echo told; sleep 0.2; echo done; exit 0' TERM; \
                  cp /bin/sleep /bin/orphan; (orphan 0.1 & exec sleep 0.05) & (trap '' TERM; echo deaf; exec sleep 3601) & while :; do sleep 0.05; done";
    let specs = [machine(cluster, "worker-0", Role::Worker, script)];
    let name = room.up(cluster, &room.network(), &specs).await.remove(0).name;
    let pid = room.pid(cluster, &name);
    room.console_with(cluster, &name, "deaf\n").await;
    // The orphan has ended, and nobody is left who ought to have taken it in.
    until("the orphan is taken in", || {
        let stats = room.inside(cluster, &name, "cat /proc/[0-9]*/stat 2>/dev/null || true");
        (!stats.contains("orphan")).then_some(())
    });
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let text = room.console_with(cluster, &name, "done\n").await;
    assert!(text.contains("deaf\nkprov: ending\ntold\ndone\n"), "{text}");
    // The one that does not listen is waited for, for 20 s: until it is told in a way that it can't but hear.
    assert!(!text.contains("kprov: ended"), "{text}");
    let deaf = traces(&[cluster.to_string()])
        .into_iter()
        .find(|t| t.contains("sleep 3601"))
        .unwrap();
    let deaf = deaf.split(['/', ' ']).find_map(|w| w.parse().ok()).unwrap();
    kill(Pid::from_raw(deaf), Signal::SIGKILL).unwrap();
    let text = room.console_with(cluster, &name, "kprov: ended").await;
    assert!(text.ends_with("kprov: ended\n"), "{text}");
}

/// What can't be is refused by name, and nothing of it is left.
#[tokio::test]
async fn refuses_what_cannot_be() {
    let Some(room) = room(&["refuse"], 24) else { return };
    let (cluster, provider) = (room.cluster(), &room.provider);
    let good = machine(cluster, "worker-0", Role::Worker, "exec sleep 3600");
    let ensure = async |spec: &kprov_types::machine::MachineSpec| {
        provider
            .ensure_machines(cluster, std::slice::from_ref(spec))
            .await
            .unwrap_err()
    };

    let error = ensure(&good).await;
    assert_eq!(error.to_string(), format!("cluster `{cluster}` has no network"));
    assert!(!room.state_dir.exists(), "a refused call leaves a directory");

    provider.ensure_network(cluster, &room.network()).await.unwrap();
    assert_eq!(
        ensure(&good).await.to_string(),
        format!("machine `{}` has no data disk", good.name)
    );
    let mut sized = good.clone();
    sized.size = Some("huge".into());
    assert!(ensure(&sized).await.to_string().contains("size `huge`"));
    let mut no_script = machine(cluster, "worker-1", Role::Worker, "");
    no_script.data_disk = false;
    no_script.first_boot.0 = "#cloud-config\n".into();
    assert!(
        ensure(&no_script)
            .await
            .to_string()
            .contains("does not start with `#!`")
    );
    let mut no_program = no_script.clone();
    no_program.first_boot.0 = "#!/no/such/program\n".into();
    let error = ensure(&no_program).await;
    assert!(
        error.to_string().contains("cannot run the first-boot script"),
        "{error}"
    );
    assert_eq!(error.advice, Advice::Never);
    provider
        .remove_machines(cluster, &[no_program.name.clone()])
        .await
        .unwrap();

    let made = room.up(cluster, &room.network(), std::slice::from_ref(&good)).await;
    let mut other_role = good.clone();
    other_role.role = Role::ControlPlane;
    assert!(
        ensure(&other_role)
            .await
            .to_string()
            .contains("with the role `worker`, not `control-plane`")
    );
    let error = provider.remove_network(cluster).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cluster `{cluster}` still has the machine `{}`", good.name)
    );
    let error = provider
        .remove_disks(cluster, std::slice::from_ref(&good.name))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("is in use"), "{error}");
    // All of this left the one that is as it should be.
    assert_eq!(provider.observe(cluster).await.unwrap().machines, made);
}

/// A full disk is said to be one, and leaves no half of a machine.
#[tokio::test]
async fn a_full_disk_is_said_to_be_one() {
    let Some(room) = room(&["full"], 25) else { return };
    // The whole state on a file system of 256 KiB, in a mount namespace of this thread's own.
    std::thread::spawn({
        let (provider, state_dir) = (room.provider.clone(), room.state_dir.clone());
        let (cluster, network) = (room.cluster().clone(), room.network());
        move || {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            fs::create_dir_all(&state_dir).unwrap();
            let options = Some("size=256k");
            mount(
                Some("tmpfs"),
                state_dir.as_std_path(),
                Some("tmpfs"),
                MsFlags::empty(),
                options,
            )
            .unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                provider.ensure_network(&cluster, &network).await.unwrap();
                let mut spec = machine(&cluster, "worker-0", Role::Worker, &"# much\n".repeat(100_000));
                spec.data_disk = false;
                let error = provider.ensure_machines(&cluster, &[spec]).await.unwrap_err();
                assert!(error.to_string().starts_with("cannot write `"), "{error}");
                assert!(error.hint.unwrap().contains("full"));
                assert_eq!(provider.observe(&cluster).await.unwrap().machines, []);
                let machines = state_dir.join(cluster.as_str()).join("machines");
                assert_eq!(fs::read_dir(machines).unwrap().count(), 0);
                provider.remove_network(&cluster).await.unwrap();
            });
        }
    })
    .join()
    .unwrap();
}
