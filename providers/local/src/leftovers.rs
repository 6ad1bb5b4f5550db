//! What is still there of a cluster, found without its records: how `down` proves its work.

use std::collections::BTreeSet;
use std::fs;

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::ClusterName;
use kprov_types::machine::Leftover;

use crate::cgroup::{self, Group};
use crate::error::LocalError;
use crate::state::ClusterDir;
use crate::{link, nat, network, process};

/// Everything on this host that carries the cluster's tag: processes, mounts, interfaces, control groups, firewall rules,
/// files.
///
/// A namespace lives only in its processes and mounts, so that none is left where none of these are.
pub(crate) fn list(dir: &ClusterDir) -> Result<Vec<Leftover>, LocalError> {
    let mut all = processes(dir)?;
    all.extend(mounts(&dir.path)?);
    for found in link::links()?.iter().filter(|l| network::is_of(l, &dir.cluster)) {
        all.push(leftover(
            "interface",
            &found.name,
            Some(found.alias.clone()).filter(|a| !a.is_empty()),
        ));
    }
    let group = Group::cluster(&dir.cluster)?;
    all.extend(
        group
            .directories()?
            .iter()
            .map(|path| leftover("cgroup", path.as_str(), None)),
    );
    all.extend(
        nat::rules(&dir.cluster)?
            .iter()
            .map(|rule| leftover("firewall rule", &rule.to_string(), None)),
    );
    all.extend(files(&dir.path)?);
    Ok(all)
}

fn leftover(kind: &str, name: &str, why: Option<String>) -> Leftover {
    Leftover {
        kind: kind.into(),
        name: name.into(),
        why,
    }
}

/// Processes in the cluster's control groups, and those that were started for one of its directories.
fn processes(dir: &ClusterDir) -> Result<Vec<Leftover>, LocalError> {
    let own = std::process::id().cast_signed();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").map_err(LocalError::io("list", "/proc"))? {
        let entry = entry.map_err(LocalError::io("list", "/proc"))?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        // One that has ended meanwhile is no leftover.
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let its = is_of(&read("cgroup"), &read("cmdline"), &dir.cluster, &dir.path);
        if its && pid != own && !process::has_ended(pid) {
            found.insert((pid, String::from_utf8_lossy(&read("comm")).trim().to_owned()));
        }
    }
    Ok(found
        .into_iter()
        .map(|(pid, comm)| leftover("process", &pid.to_string(), Some(comm)))
        .collect())
}

fn is_of(groups: &[u8], command: &[u8], cluster: &ClusterName, dir: &Utf8Path) -> bool {
    let groups = String::from_utf8_lossy(groups);
    let mut words = command.split(|b| *b == 0);
    let of_room = words.any(|w| w == b"machine-room")
        && words.any(|w| std::str::from_utf8(w).is_ok_and(|w| Utf8Path::new(w).starts_with(dir)));
    of_room || groups.lines().any(|line| cgroup::line_is_of(line, cluster))
}

/// Mounts of this namespace that lie in the cluster's directory.
fn mounts(dir: &Utf8Path) -> Result<Vec<Leftover>, LocalError> {
    let path = "/proc/thread-self/mountinfo";
    let text = fs::read_to_string(path).map_err(LocalError::io("read", path))?;
    let points = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|p| Utf8Path::new(p).starts_with(dir));
    Ok(points.map(|point| leftover("mount", point, None)).collect())
}

/// The cluster's directory and what is in it, two levels deep: enough to see what it is.
fn files(dir: &Utf8Path) -> Result<Vec<Leftover>, LocalError> {
    let mut all = Vec::new();
    let mut waiting: Vec<(Utf8PathBuf, u8)> = vec![(dir.to_owned(), 0)];
    while let Some((path, depth)) = waiting.pop() {
        match path.symlink_metadata() {
            Ok(there) if there.is_dir() && depth < 2 => {
                for entry in path.read_dir_utf8().map_err(LocalError::io("list", &path))? {
                    waiting.push((entry.map_err(LocalError::io("list", &path))?.into_path(), depth + 1));
                }
            }
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(LocalError::io("look at", path)(e)),
        }
        all.push(leftover("file", path.as_str(), None));
    }
    all.sort_unstable();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_group_or_its_directory() {
        let demo = ClusterName::new("demo").unwrap();
        let dir = Utf8Path::new("/var/lib/kprov/local/demo");
        let cases: [(&str, &str, bool); 5] = [
            ("4:memory:/kprov/demo/demo-cp-0\n", "/bin/sh", true),
            (
                "0::/\n",
                "kprov\0machine-room\0init\0launch\0/var/lib/kprov/local/demo/machines/a\0",
                true,
            ),
            ("0::/\n", "less\0/var/lib/kprov/local/demo/balancer.log\0", false),
            (
                "0::/\n",
                "kprov\0machine-room\0init\0launch\0/var/lib/kprov/local/demo-2/machines/a\0",
                false,
            ),
            ("0::/kprov/demo-2\n", "/bin/sh", false),
        ];
        for (groups, command, expected) in cases {
            assert_eq!(
                is_of(groups.as_bytes(), command.as_bytes(), &demo, dir),
                expected,
                "{groups} {command}"
            );
        }
    }
}
