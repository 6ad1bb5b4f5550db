//! What Debian has for us: packages to install, packages to unpack without installing, and sources.
//!
//! Sources and unpacked packages come from the machine's own apt sources, through lists of our own in the cache, so that
//! nothing about the machine's apt changes and no service is started by installing etcd or containerd.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use crate::run::{output, run};

/// Installs those of the packages that are missing.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix_is_root()? {
        bail!(
            "these packages are missing and only root can install them: {}",
            missing.join(" ")
        );
    }
    if Command::new("apt-get")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        bail!(
            "this is no Debian; install what these packages have, then try again: {}",
            missing.join(" ")
        );
    }
    run(Command::new("apt-get").args(["update", "-q"]))?;
    run(Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "-q", "-y", "--no-install-recommends"])
        .args(&missing))
}

fn nix_is_root() -> Result<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim() == "0")
}

fn installed(package: &str) -> bool {
    output(Command::new("dpkg-query").args(["-W", "-f", "${Status}", package])).is_ok_and(|s| s.ends_with(" installed"))
}

/// apt with package lists and sources of its own below `dir`; `source` asks for source packages.
pub(crate) struct Apt {
    dir: Utf8PathBuf,
}

impl Apt {
    /// Copies the machine's own sources and updates the lists.
    pub(crate) fn new(dir: Utf8PathBuf) -> Result<Self> {
        for sub in ["parts", "lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(dir.join(sub)).with_context(|| format!("can't make `{dir}/{sub}`"))?;
        }
        let mut found = false;
        for path in machine_sources()? {
            let text = std::fs::read_to_string(&path).with_context(|| format!("can't read `{path}`"))?;
            let name = path.file_name().unwrap_or("sources.list");
            let with_sources = if name.ends_with(".sources") {
                deb822_sources(&text)
            } else {
                one_line_sources(&text)
            };
            if !with_sources.trim().is_empty() {
                std::fs::write(dir.join("parts").join(name), with_sources)?;
                found = true;
            }
        }
        if !found {
            bail!("no apt sources found in /etc/apt");
        }
        let apt = Self { dir };
        run(apt.command("apt-get").args(["update", "-q"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let dir = &self.dir;
        let mut command = Command::new(program);
        for option in [
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={dir}/parts"),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// The package that another one depends on, by how its name begins.
    pub(crate) fn dependency(&self, package: &str, begins: &str) -> Result<String> {
        let text = output(self.command("apt-cache").args(["depends", package]))?;
        let depends = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        depends
            .map(str::to_owned)
            .find(|name| name.starts_with(begins))
            .with_context(|| format!("`{package}` depends on no `{begins}...`"))
    }

    /// Downloads packages and unpacks them below `root`, without installing them.
    pub(crate) fn unpack(&self, packages: &[&str], root: &Utf8Path) -> Result<()> {
        let debs = self.dir.join("debs");
        std::fs::create_dir_all(&debs)?;
        std::fs::create_dir_all(root)?;
        run(self
            .command("apt-get")
            .current_dir(&debs)
            .args(["download", "-q"])
            .args(packages))?;
        for entry in debs.read_dir_utf8()? {
            let path = entry?.into_path();
            let name = path.file_name().unwrap_or_default();
            if packages.iter().any(|p| name.starts_with(&format!("{p}_"))) {
                run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(root))?;
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Downloads and unpacks a source package into `dir/<package>`.
    pub(crate) fn source(&self, package: &str, dir: &Utf8Path) -> Result<Utf8PathBuf> {
        std::fs::create_dir_all(dir)?;
        run(self
            .command("apt-get")
            .current_dir(dir)
            .args(["source", "-q", "--download-only", package]))?;
        let dsc = dir
            .read_dir_utf8()?
            .filter_map(Result::ok)
            .map(camino::Utf8DirEntry::into_path)
            .find(|p| p.extension() == Some("dsc"))
            .with_context(|| format!("apt-get downloaded no source of `{package}`"))?;
        let out = dir.join(package);
        if out.exists() {
            std::fs::remove_dir_all(&out)?;
        }
        // apt-get has checked the files against the signed lists; dpkg-source would need the uploader's key.
        run(Command::new("dpkg-source")
            .current_dir(dir)
            .args(["--no-check", "-x"])
            .arg(&dsc)
            .arg(&out))?;
        Ok(out)
    }
}

fn machine_sources() -> Result<Vec<Utf8PathBuf>> {
    let mut files = Vec::new();
    let main = Utf8PathBuf::from("/etc/apt/sources.list");
    if main.exists() {
        files.push(main);
    }
    if let Ok(entries) = Utf8Path::new("/etc/apt/sources.list.d").read_dir_utf8() {
        for entry in entries {
            let path = entry?.into_path();
            if matches!(path.extension(), Some("list" | "sources")) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// deb822 stanzas with source packages beside binary ones.
fn deb822_sources(text: &str) -> String {
    text.lines()
        .map(|line| {
            let types = line.strip_prefix("Types:").map(str::trim);
            if types == Some("deb") {
                "Types: deb deb-src\n".to_owned()
            } else {
                format!("{line}\n")
            }
        })
        .collect()
}

/// One-line entries with a `deb-src` line beside each `deb` line.
fn one_line_sources(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("deb ") {
            out.extend(["deb ", rest, "\ndeb-src ", rest, "\n"]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_come_beside_binaries() {
        assert_eq!(
            one_line_sources("# x\ndeb http://a b c\ndeb-src http://a b c\n"),
            "deb http://a b c\ndeb-src http://a b c\n"
        );
        assert_eq!(deb822_sources("Types: deb\nURIs: x\n"), "Types: deb deb-src\nURIs: x\n");
        assert_eq!(deb822_sources("Types: deb deb-src\n"), "Types: deb deb-src\n");
    }
}
