//! Running the programs that a payload is made of, to learn their versions and libraries.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a program may take to print its version.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// Where programs are looked for on the host, after `PATH`; ordinary users' `PATH` lacks the `sbin` ones.
const HOST_DIRECTORIES: &[&str] = &[
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Where Debian, and most others, put CNI plugins.
pub(crate) const HOST_CNI_DIRECTORIES: &[&str] = &["/usr/lib/cni", "/opt/cni/bin"];

/// The directories in which the host's programs are looked for.
pub(crate) fn host_directories() -> Vec<Utf8PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut all: Vec<Utf8PathBuf> = Vec::new();
    for dir in path
        .split(':')
        .filter(|d| d.starts_with('/'))
        .chain(HOST_DIRECTORIES.iter().copied())
    {
        if !all.iter().any(|d| d == dir) {
            all.push(dir.into());
        }
    }
    all
}

/// A program of the host by name.
pub(crate) fn on_host(name: &str) -> Option<Utf8PathBuf> {
    host_directories()
        .into_iter()
        .map(|d| d.join(name))
        .find(|p| p.is_file())
}

/// Runs a program with a bare environment and returns what it printed on either stream; an error where it does not end
/// within `limit`.
///
/// `name` is what it is called by, which some programs dispatch on.
pub(crate) fn output(program: &Utf8Path, name: &str, args: &[&str], limit: Duration) -> io::Result<(bool, String)> {
    // A file rather than a pipe: a child that the program leaves behind cannot keep us waiting.
    let mut out = tempfile::tempfile()?;
    let mut child = Command::new(program)
        .arg0(name)
        .args(args)
        .env_clear()
        .env(
            "PATH",
            host_directories()
                .iter()
                .map(|d| d.as_str())
                .collect::<Vec<_>>()
                .join(":"),
        )
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out.try_clone()?)
        .process_group(0)
        .spawn()?;
    let group = i32::try_from(child.id()).map(Pid::from_raw).map_err(io::Error::other)?;
    let (sender, ended) = mpsc::channel();
    let waiter = thread::spawn(move || sender.send(child.wait()));
    let Ok(status) = ended.recv_timeout(limit) else {
        // The group and not the child alone, so that nothing it started stays behind.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = waiter.join();
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("still runs after {limit:?}"),
        ));
    };
    let status = status?;
    Ok((status.success(), contents(&mut out)?))
}

fn contents(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(1024 * 1024).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first version in what a program printed: three numbers with dots, and what follows up to white space.
///
/// `Kubernetes v1.36.3`, `etcd Version: 3.4.23`, `CoreDNS-1.11.3`, `runc version 1.1.5+ds1`.
pub(crate) fn version_in(text: &str) -> Option<&str> {
    text.split(|c: char| c.is_whitespace() || matches!(c, ',' | '"'))
        .find_map(|word| {
            let starts = word.char_indices().filter(|(i, c)| {
                let before = word[..*i].strip_suffix('v').unwrap_or(&word[..*i]).chars().next_back();
                c.is_ascii_digit() && !before.is_some_and(|b| b.is_ascii_alphanumeric() || b == '.')
            });
            starts.map(|(i, _)| &word[i..]).find(|rest| {
                let mut numbers = rest.splitn(3, '.');
                let whole = |n: Option<&str>| n.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
                whole(numbers.next())
                    && whole(numbers.next())
                    && numbers
                        .next()
                        .is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
            })
        })
}

/// The shared libraries, and the loader, that a dynamic program or a library would be run with here: what `ldd(1)` prints,
/// asked of the loader itself, which takes a tenth of the time. Where one is missing, what the loader says of it.
pub(crate) fn libraries(loader: &Utf8Path, file: &Utf8Path) -> io::Result<Result<Vec<Utf8PathBuf>, String>> {
    let (good, text) = output(loader, loader.as_str(), &["--list", file.as_str()], LIMIT)?;
    Ok(if good {
        Ok(listed(&text))
    } else {
        Err(complaint(&text).to_owned())
    })
}

/// The paths in the loader's list: `libc.so.6 => /lib/libc.so.6 (0x7f..)` and `/lib64/ld-linux-x86-64.so.2 (0x7f..)`.
fn listed(text: &str) -> Vec<Utf8PathBuf> {
    let paths = text.lines().filter_map(|line| {
        let (_, target) = line.trim().split_once(" => ").unwrap_or(("", line.trim()));
        let (path, _address) = target.split_once(" (0x")?;
        path.starts_with('/').then(|| path.into())
    });
    paths.collect()
}

/// The part of `x: error while loading shared libraries: libfoo.so.2: cannot open shared object file: ...` after the second
/// colon.
fn complaint(text: &str) -> &str {
    let line = text.lines().next().unwrap_or_default();
    line.split_once("shared libraries: ").map_or(line, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_programs_print_them() {
        for (text, version) in [
            ("Kubernetes v1.36.3", Some("1.36.3")),
            (
                "etcd Version: 3.4.23\nGit SHA: Not provided\nGo Version: go1.19.8",
                Some("3.4.23"),
            ),
            ("CoreDNS-1.11.3\nlinux/amd64, go1.22.5, a6338e9", Some("1.11.3")),
            ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1", Some("1.1.5+ds1")),
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20",
                Some("1.6.20~ds1"),
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b",
                Some("2.1.4"),
            ),
            ("ctr github.com/containerd/containerd v1.7.0-rc.1", Some("1.7.0-rc.1")),
            ("iptables v1.8.9 (nf_tables)", Some("1.8.9")),
            ("CNI bridge plugin version unknown", None),
            ("go1.19.8", None),
            ("1.2", None),
            ("", None),
        ] {
            assert_eq!(version_in(text), version, "{text}");
        }
    }

    #[test]
    fn what_the_loader_lists() {
        let text = "\tlinux-vdso.so.1 (0x00007fde0e1ab000)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007fde0dfb8000)\n\
                    \t/lib64/ld-linux.so.2 (0x00007fde0e1ad000)\n";
        assert_eq!(listed(text), ["/lib/x/libc.so.6", "/lib64/ld-linux.so.2"]);
        assert_eq!(listed("\tstatically linked\n"), Vec::<Utf8PathBuf>::new());
        assert_eq!(
            complaint("./m: error while loading shared libraries: libx.so: not there\n"),
            "libx.so: not there"
        );
        assert_eq!(complaint("Killed"), "Killed");
    }

    #[test]
    fn runs_and_ends_programs() {
        let sh = on_host("sh").unwrap();
        let (good, text) = output(&sh, "sh", &["-c", "echo out; echo err >&2; exit 3"], LIMIT).unwrap();
        assert!(!good);
        assert_eq!(text, "out\nerr\n");
        assert_eq!(
            output("/nowhere/at/all".into(), "x", &[], LIMIT).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );

        // The child of the shell is ended as well.
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; wait", pid_file.display());
        let late = output(&sh, "sh", &["-c", &script], Duration::from_millis(300)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let ended = || state().is_empty() || state().contains(") Z ");
        assert!(
            (0..100).any(|_| ended() || {
                thread::sleep(Duration::from_millis(10));
                false
            }),
            "{}",
            state()
        );
    }
}
