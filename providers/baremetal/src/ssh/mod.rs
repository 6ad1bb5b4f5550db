//! Hosts by SSH: Debian's own `ssh`, so that known hosts, agents, keys, jump hosts and a person's configuration work as
//! they do by hand. All that is done by it is one small script ([`SCRIPT`]), each of whose steps can be run again.

mod arguments;
mod classify;

use std::process::Stdio;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use camino::{Utf8Path, Utf8PathBuf};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWriteExt as _};
use tokio::process::Command;

use crate::error::{HostError, Trouble};
use crate::inventory::{Host, Ssh};

/// What runs on hosts.
pub(crate) const SCRIPT: &str = include_str!("remote.sh");
/// Becomes root where it isn't, then runs the script that is its `$0`.
const AS_ROOT: &str =
    r#"if [ "$(id -u)" = 0 ]; then exec /bin/sh -c "$0" "$@"; else exec sudo -n /bin/sh -c "$0" "$@"; fi"#;
/// The same without `sudo`.
const AS_IS: &str = r#"if [ "$(id -u)" = 0 ]; then exec /bin/sh -c "$0" "$@"; else echo KPROV-NOT-ROOT; exit 41; fi"#;
/// How often a connection that was turned away is tried.
const TRIES: usize = 6;
/// How long one step may take.
const STEP_LIMIT: Duration = Duration::from_mins(10);

/// What a step is given on its standard input.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a> {
    Nothing,
    Text(&'a str),
    File(&'a Utf8Path),
}

/// Connections to hosts, kept open between steps.
#[derive(Debug)]
pub(crate) struct Connections {
    directory: TempDir,
}

impl Connections {
    /// None yet.
    pub(crate) fn new() -> std::io::Result<Self> {
        let builder = || {
            let mut builder = tempfile::Builder::new();
            builder.prefix("kprov-ssh-");
            builder
        };
        let mut directory = builder().tempdir()?;
        // A socket's path is limited to some 100 bytes (unix(7)), of which `ssh` itself takes 60.
        if directory.path().as_os_str().len() > 40 {
            directory = builder().tempdir_in("/tmp")?;
        }
        Ok(Self { directory })
    }

    fn path(&self) -> &Utf8Path {
        Utf8Path::from_path(self.directory.path()).unwrap_or(Utf8Path::new("/nonexistent"))
    }

    /// Runs a step of the script on a host, as root, and returns what it printed.
    pub(crate) async fn run(
        &self,
        host: &Host,
        step: &str,
        arguments: &[&str],
        input: Input<'_>,
    ) -> Result<Reply, HostError> {
        let failed = |trouble| HostError {
            host: host.name.clone(),
            trouble,
        };
        let ssh = host.ssh.as_ref().ok_or_else(|| failed(Trouble::NoSsh))?;
        let pinned = self.pin(host, ssh).map_err(|e| failed(local(step, &e)))?;
        let mut words = vec!["/bin/sh".to_owned(), "-c".into()];
        words.push(quote(if ssh.sudo { AS_ROOT } else { AS_IS }));
        words.extend([quote(SCRIPT), "kprov".into(), step.to_owned()]);
        words.extend(arguments.iter().map(|argument| quote(argument)));
        let places = arguments::Places {
            control: self.path(),
            pinned: pinned.as_deref(),
        };
        let mut all = arguments::arguments(ssh, places);
        all.push(words.join(" "));

        let mut delays = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(300))
            .with_max_delay(Duration::from_secs(5))
            .with_max_times(TRIES)
            .with_jitter()
            .build();
        let mut cut_off = false;
        loop {
            let output = tokio::time::timeout(STEP_LIMIT, once(&all, input)).await;
            let output = output
                .map_err(|_| Trouble::Unreachable(format!("`{step}` did not end within {} s", STEP_LIMIT.as_secs())))
                .and_then(|output| output.map_err(|e| local(step, &e)))
                .map_err(failed)?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            if output.status.code() != Some(classify::SSH_FAILED) {
                let stdout = String::from_utf8_lossy(&output.stdout);
                return Reply::parse(step, output.status.code(), &stdout, &stderr).map_err(failed);
            }
            let trouble = classify::connection(ssh, &stderr);
            match (&trouble, delays.next()) {
                (Trouble::Busy(message), Some(delay)) => {
                    tracing::debug!(host = %host.name, message, "turned away, trying again");
                    tokio::time::sleep(delay).await;
                }
                // The connection that was kept open has died, say because the host booted; each step can be run again.
                (Trouble::Unreachable(_), _) if !cut_off && !classify::never_connected(&stderr) => cut_off = true,
                _ => return Err(failed(trouble)),
            }
        }
    }

    /// The `known_hosts` file of a pinned key.
    fn pin(&self, host: &Host, ssh: &Ssh) -> std::io::Result<Option<Utf8PathBuf>> {
        let Some(key) = &ssh.host_key else { return Ok(None) };
        let path = self.path().join(format!("known-{}", host.name));
        std::fs::write(&path, arguments::pinned_line(key))?;
        Ok(Some(path))
    }
}

impl Drop for Connections {
    /// Ends the connections, which would stay for a minute.
    fn drop(&mut self) {
        for entry in self.path().read_dir_utf8().into_iter().flatten().flatten() {
            if entry.file_name().starts_with("known-") {
                continue;
            }
            let _ = std::process::Command::new("ssh")
                .args([
                    "-O",
                    "exit",
                    "-o",
                    &format!("ControlPath={}", entry.path()),
                    "--",
                    "any",
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Something on this machine, not on the host.
fn local(step: &str, error: &std::io::Error) -> Trouble {
    let message = if error.kind() == std::io::ErrorKind::NotFound {
        format!("there is no `ssh` on this machine, or a file is missing: {error}")
    } else {
        error.to_string()
    };
    Trouble::Failed {
        step: step.to_owned(),
        message,
    }
}

async fn once(arguments: &[String], input: Input<'_>) -> std::io::Result<std::process::Output> {
    let mut child = Command::new("ssh")
        .args(arguments)
        .stdin(match input {
            Input::Nothing => Stdio::null(),
            Input::Text(_) | Input::File(_) => Stdio::piped(),
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdin = child.stdin.take();
    let feed = async {
        let Some(mut stdin) = stdin else { return };
        // A host that ends before it has read everything says why on stderr.
        let _ = match input {
            Input::Nothing => Ok(()),
            Input::Text(text) => stdin.write_all(text.as_bytes()).await,
            Input::File(path) => match tokio::fs::File::open(path).await {
                Ok(mut file) => copy(&mut file, &mut stdin).await,
                Err(e) => Err(e),
            },
        };
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    output
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut tokio::process::ChildStdin) -> std::io::Result<()> {
    tokio::io::copy(from, to).await?;
    to.shutdown().await
}

/// A word for a shell.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What a step printed: `name=value` lines between two marks, so that a login message is not mistaken for an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply(Vec<(String, String)>);

impl Reply {
    fn parse(step: &str, code: Option<i32>, stdout: &str, stderr: &str) -> Result<Self, Trouble> {
        let failed = |message: String| Trouble::Failed {
            step: step.to_owned(),
            message,
        };
        if stdout.lines().any(|line| line == "KPROV-NOT-ROOT") {
            return Err(Trouble::NotRoot);
        }
        let mut lines = stdout.lines().skip_while(|line| *line != "KPROV-BEGIN").skip(1);
        let mut values = Vec::new();
        let mut any = false;
        for line in lines.by_ref() {
            any = true;
            if line == "KPROV-END" {
                if code == Some(0) {
                    return Ok(Self(values));
                }
                break;
            }
            if let Some(why) = line.strip_prefix("KPROV-FAIL ") {
                return Err(refusal(why).unwrap_or_else(|| failed(why.to_owned())));
            }
            match line.split_once('=') {
                Some((name, value)) => values.push((name.to_owned(), value.to_owned())),
                None => return Err(failed(format!("the host answered `{line}`, which is not understood"))),
            }
        }
        if any && code == Some(0) {
            return Err(failed("the host's answer ended too early".into()));
        }
        Err(classify::remote(step, code, stderr))
    }

    /// A value; empty where it was not told.
    pub(crate) fn get(&self, name: &str) -> &str {
        let found = self.0.iter().find(|(n, _)| n == name);
        found.map_or("", |(_, value)| value.as_str())
    }

    /// All values of a name.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Refusals that the script tells apart: `KPROV-FAIL disk DEVICE|used or free|WHAT`.
fn refusal(why: &str) -> Option<Trouble> {
    let mut parts = why.strip_prefix("disk ")?.splitn(3, '|');
    Some(Trouble::DiskNotEmpty {
        device: parts.next()?.to_owned(),
        in_use: parts.next()? == "used",
        found: parts.next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_only_whole() {
        let parse = |text: &str| Reply::parse("facts", Some(0), text, "");
        let reply = parse("Welcome!\nKPROV-BEGIN\na=1\nb=x=y\na=2\nKPROV-END\n").unwrap();
        assert_eq!((reply.get("a"), reply.get("b"), reply.get("c")), ("1", "x=y", ""));
        assert_eq!(reply.all("a").collect::<Vec<_>>(), ["1", "2"]);
        assert!(
            parse("KPROV-BEGIN\na=1\n")
                .unwrap_err()
                .to_string()
                .contains("too early")
        );
        assert!(
            parse("KPROV-BEGIN\nwhat\nKPROV-END\n")
                .unwrap_err()
                .to_string()
                .contains("not understood")
        );
        assert!(parse("").unwrap_err().to_string().contains("said nothing"));
        assert_eq!(parse("KPROV-NOT-ROOT\n").unwrap_err(), Trouble::NotRoot);
        assert_eq!(
            parse("KPROV-BEGIN\nKPROV-FAIL disk /dev/sdb|free|ext4 `a|b`\n").unwrap_err(),
            Trouble::DiskNotEmpty {
                device: "/dev/sdb".into(),
                found: "ext4 `a|b`".into(),
                in_use: false
            }
        );
    }

    #[test]
    fn the_script_is_shell() {
        let output = std::process::Command::new("sh")
            .args(["-n", "-c", SCRIPT])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
