//! What goes wrong is named, with a hint and the right exit code, and leaves nothing behind.

use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use kprov_e2e::{Cluster, Payload, Traces, payloads};

/// One mistake: it must end with this code and say all of these.
fn refused(out: &Output, code: i32, says: &[&str]) -> Result<()> {
    let text = String::from_utf8_lossy(&out.stderr);
    ensure!(
        out.status.code() == Some(code),
        "exit code {:?} instead of {code}:\n{text}",
        out.status.code()
    );
    for part in says {
        ensure!(text.contains(part), "`{part}` is not in:\n{text}");
    }
    Ok(())
}

fn payload() -> Result<Payload> {
    Ok(payloads()?.remove(0))
}

/// A payload like another, made of links to its files, so that single ones can be replaced.
fn copy(payload: &Payload, to: &std::path::Path) -> Result<Payload> {
    let status = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(&payload.dir)
        .arg(to.join("payload"))
        .status()?;
    ensure!(status.success(), "cp failed");
    let dir = camino::Utf8PathBuf::from_path_buf(to.join("payload"))
        .ok()
        .context("not UTF-8")?;
    Ok(Payload { dir, ..payload.clone() })
}

#[test]
fn payloads_that_are_not_right() -> Result<()> {
    let before = Traces::list();
    let payload = payload()?;
    let cluster = Cluster::new("e2e-bad")?;
    let up = |args: &[&str]| {
        cluster
            .kprov(&["up", "--name", "e2e-bad", "--no-progress"])
            .args(args)
            .output()
    };

    refused(&up(&[])?, 1, &["no release payload named", "hint:", "--release"])?;
    refused(&up(&["--release", "/nonexistent"])?, 1, &["/nonexistent", "hint:"])?;
    refused(
        &up(&["--release", payload.dir.as_str()])?,
        1,
        &["not trusted", "hint:", "--insecure-release"],
    )?;

    let temp = tempfile::tempdir()?;
    let altered = copy(&payload, temp.path())?;
    let image = altered.image("kube-scheduler")?;
    let digest = image.rsplit("sha256:").next().context("no digest")?;
    let blob = altered.dir.join("blobs/sha256").join(digest);
    let mut bytes = std::fs::read(&blob)?;
    bytes[0] ^= 1;
    std::fs::remove_file(&blob)?;
    std::fs::write(&blob, bytes)?;
    let out = cluster
        .kprov(&["up", "--name", "e2e-bad", "--no-progress"])
        .args(altered.options())
        .output()?;
    refused(&out, 1, &["kube-scheduler", digest])?;
    // Digests are checked even where signatures are not.
    refused(
        &up(&["--release", altered.dir.as_str(), "--insecure-release"])?,
        1,
        &["kube-scheduler", digest],
    )?;

    let mut other = payload.options();
    other.extend(["--kubernetes".into(), "1.99.1".into()]);
    let out = cluster
        .kprov(&["up", "--name", "e2e-bad", "--no-progress"])
        .args(other)
        .output()?;
    refused(&out, 1, &["1.99.1", &payload.version, "hint:"])?;
    refused(&up(&["--kubernetes", "latest"])?, 2, &["latest", "MAJOR.MINOR.PATCH"])?;
    ensure!(
        !cluster.home().join("clusters").exists(),
        "something was kept of a cluster that never was"
    );
    Traces::nothing_left(&before)
}

#[test]
fn cluster_files_that_are_not_right() -> Result<()> {
    let cluster = Cluster::new("e2e-file")?;
    let temp = tempfile::tempdir()?;
    let path = temp.path().join("cluster.yaml");
    let head = "apiVersion: kprov.io/v1alpha1\nkind: Cluster\nmetadata:\n  name: demo\n";
    let spec = format!("{head}spec:\n");
    let cases: &[(String, &[&str])] = &[
        (format!("{spec}  workers:\n    cout: 2\n"), &["cluster.yaml:7:", "cout"]),
        (format!("{spec}  controlPlane:\n    count: two\n"), &["cluster.yaml:7:"]),
        (
            format!("{spec}  controlPlane:\n    count: 2\n"),
            &["spec.controlPlane.count", "1, 3 or 5"],
        ),
        (format!("{spec}  provider: gcp\n"), &["cluster.yaml:6:", "gcp"]),
        ("kind: [\n".into(), &["cluster.yaml:"]),
        (head.replace("demo", "Demo"), &["cluster.yaml:4:", "Demo"]),
        (head.replace("v1alpha1", "v9"), &["apiVersion", "kprov.io/v1alpha1"]),
    ];
    for (text, says) in cases {
        std::fs::write(&path, text)?;
        let out = cluster
            .kprov(&["up", "--no-progress", "-f", &path.to_string_lossy()])
            .output()?;
        refused(&out, 1, says).with_context(|| text.clone())?;
    }
    refused(
        &cluster.kprov(&["up", "-f", "/nonexistent.yaml"]).output()?,
        1,
        &["/nonexistent.yaml"],
    )?;
    refused(
        &cluster.kprov(&["up"]).output()?,
        1,
        &["no release payload named", "--release DIR"],
    )?;
    refused(&cluster.kprov(&["status"]).output()?, 1, &["no cluster is known here"])?;
    refused(
        &cluster.kprov(&["down", "--name", "nobody", "--yes"]).output()?,
        1,
        &["there is no cluster `nobody`"],
    )?;
    Ok(())
}

#[test]
fn what_the_host_has_not_got() -> Result<()> {
    let before = Traces::list();
    let payload = payload()?;
    let cluster = Cluster::new("e2e-host")?;
    let up = |args: &[&str]| {
        cluster
            .kprov(&["up", "--name", "e2e-host", "--no-progress"])
            .args(args)
            .args(payload.options())
            .output()
    };

    // A range that the host uses already: loopback has any address we like.
    let ip = |verb: &str| {
        Command::new("ip")
            .args(["addr", verb, "10.88.7.1/24", "dev", "lo"])
            .status()
    };
    ensure!(ip("add")?.success(), "the address could not be added");
    let out = up(&["--network", "10.88.7.0/24"]);
    ensure!(ip("del")?.success(), "the address could not be removed");
    refused(&out?, 1, &["10.88.7.0/24", "in use", "hint:"])?;

    // The first address of the range is the endpoint's.
    let range = "10.88.8.0/24";
    let taken = listen_where_nobody_is_yet("10.88.8.1:6443".parse()?)?;
    refused(&up(&["--network", range])?, 1, &["6443", "hint:"])?;
    drop(taken);

    // No root: the program is put where anybody may run it.
    let temp = tempfile::tempdir_in("/tmp")?;
    let all =
        |path: &std::path::Path| std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755));
    all(temp.path())?;
    let program = temp.path().join("kprov");
    let ours = cluster.kprov(&[]);
    std::fs::copy(ours.get_program(), &program)?;
    let readable = copy(&payload, temp.path())?;
    let key = temp.path().join("key.pub");
    std::fs::copy(payload.key.as_ref().context("no key")?, &key)?;
    all(&key)?;
    let out = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args([
            "up",
            "--name",
            "e2e-host",
            "--no-progress",
            "--release",
            readable.dir.as_str(),
            "--release-key",
        ])
        .arg(&key)
        .args(["--home", "/tmp/kprov-e2e-nobody"])
        .output()?;
    refused(&out, 1, &["root"])?;
    ensure!(
        !std::path::Path::new("/tmp/kprov-e2e-nobody").exists(),
        "a home was left behind"
    );

    // A full disk: kprov's state on a small file system, in a mount namespace of its own.
    let script = format!(
        "mkdir -p /var/lib/kprov && mount -t tmpfs -o size=16k,nr_inodes=6 tmpfs /var/lib/kprov && exec {} up --name e2e-host --no-progress {}",
        ours.get_program().to_string_lossy(),
        payload.options().join(" ")
    );
    let made = !std::path::Path::new("/var/lib/kprov").exists();
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .env("KPROV_HOME", cluster.home())
        .output()?;
    if made {
        std::fs::remove_dir("/var/lib/kprov")?;
    }
    refused(&out, 1, &["hint:", "space"])?;

    Traces::nothing_left(&before)
}

/// A listener at an address that the host has not got yet (`IP_FREEBIND`, ip(7)).
fn listen_where_nobody_is_yet(address: std::net::SocketAddr) -> Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_freebind_v4(true)?;
    socket.bind(&address.into())?;
    socket.listen(1)?;
    Ok(socket)
}

#[test]
fn a_machine_that_never_boots_and_a_taken_name() -> Result<()> {
    let before = Traces::list();
    let payload = payload()?;
    {
        let cluster = Cluster::new("e2e-dead")?;
        let mut up = cluster.up_command(&payload, 1, 0);
        // A kprov-node that ends at once: the machine starts, and never reports in.
        let out = up.args(["--timeout", "8"]).env("KPROV_NODE", "/bin/false").output()?;
        refused(
            &out,
            1,
            &["e2e-dead", "was not ready within 8 s", "e2e-dead-cp-0", "hint:"],
        )?;

        // The same name from another home.
        let other = tempfile::tempdir()?;
        let mut up = cluster.up_command(&payload, 1, 0);
        let out = up.env("KPROV_HOME", other.path()).output()?;
        refused(&out, 1, &["there is a cluster `e2e-dead`", "hint:"])?;
        ensure!(!other.path().join("clusters").exists(), "something was kept of it");

        // What can't be changed by `up` is refused before anything is.
        let mut up = cluster.up_command(&payload, 3, 0);
        refused(&up.output()?, 1, &["control-plane machines", "hint:"])?;
        cluster.down()?;
    }
    Traces::nothing_left(&before)
}

/// Ctrl-C ends `up` at once and says how to go on.
#[test]
fn an_interrupt_says_how_to_go_on() -> Result<()> {
    let payload = payload()?;
    let cluster = Cluster::new("e2e-int")?;
    let mut up = cluster.up_command(&payload, 1, 0);
    let child = up
        .env("KPROV_NODE", "/bin/false")
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    ensure!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()?
            .success()
    );
    let out = child.wait_with_output()?;
    refused(&out, 1, &["interrupted", "run the same command again"])?;
    cluster.down()
}
