//! What an instance is told at its first boot: its host name, then the caller's script. Pure.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use base64::Engine as _;
use kprov_provider::{ProviderError, first_boot};

use crate::series::Series;

/// The most that user data may have, before it is encoded ("Run commands at launch with user data").
const LIMIT: usize = 16 * 1024;

/// Where a data volume is found under the same name whatever its id: made by a rule for udev.
pub(crate) const ALIAS: &str = "/dev/kprov-data";

/// How an instance finds its index in the call that made it; the metadata service wants a token first (`IMDSv2`).
const INDEX: &str = r#"kprov_index() {
    imds=http://169.254.169.254/latest
    if command -v curl >/dev/null 2>&1; then
        token=$(curl -fsS -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$imds/api/token") &&
            curl -fsS -m 5 -H "X-aws-ec2-metadata-token: $token" "$imds/meta-data/ami-launch-index"
    else
        python3 -c 'import sys
from urllib.request import Request, urlopen
imds = sys.argv[1]
ask = Request(imds + "/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "300"})
token = urlopen(ask, timeout=5).read().decode()
ask = Request(imds + "/meta-data/ami-launch-index", headers={"X-aws-ec2-metadata-token": token})
print(urlopen(ask, timeout=5).read().decode())' "$imds"
    fi
}
until index=$(kprov_index) && [ -n "$index" ]; do
    echo "kprov: the instance metadata service does not answer, trying again" >&2
    sleep 1
done
"#;

/// Sets the host name, now and for later boots.
const HOST_NAME: &str = r#"if [ "$(cat /proc/sys/kernel/hostname)" != "$name" ]; then
    hostname "$name" 2>/dev/null || echo "$name" >/proc/sys/kernel/hostname || true
fi
echo "$name" >/etc/hostname
if [ -d /etc/cloud/cloud.cfg.d ]; then
    printf 'preserve_hostname: true\nmanage_etc_hosts: false\n' >/etc/cloud/cloud.cfg.d/99-kprov.cfg
fi
"#;

/// What an instance needs to know beside its name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// The data volume of a machine that has one.
    pub(crate) volume: Option<String>,
    /// Addresses for a name that the machine can't use as DNS has it.
    pub(crate) hosts: Vec<(Ipv4Addr, String)>,
    /// Whether the image is configured by Ignition.
    pub(crate) ignition: bool,
}

/// User data for all instances of a series, as the API takes it.
pub(crate) fn compose(series: &Series, script: &str, facts: &Facts) -> Result<String, ProviderError> {
    let text = with_name(series, script, facts)?;
    let data = if facts.ignition {
        first_boot::ignition(&text)
    } else {
        text
    };
    if data.len() > LIMIT {
        return Err(ProviderError::never(format!(
            "first-boot data of `{series}` has {} bytes, and EC2 takes {LIMIT}",
            data.len()
        ))
        .hint("fewer or shorter release URLs make it smaller"));
    }
    Ok(base64::engine::general_purpose::STANDARD.encode(data))
}

fn with_name(series: &Series, script: &str, facts: &Facts) -> Result<String, ProviderError> {
    let (shebang, rest) = script.split_once('\n').unwrap_or((script, ""));
    let interpreter = shebang.strip_prefix("#!").map(str::trim);
    if !interpreter.is_some_and(|i| i == "/bin/sh" || i == "/bin/bash") {
        return Err(ProviderError::never(format!(
            "first-boot data of `{series}` is no shell script, which AWS machines need"
        )));
    }
    let mut text = format!("{shebang}\n# The machine's host name.\n");
    if series.count() > 1 {
        text.push_str(INDEX);
    }
    let _ = writeln!(text, "{}", series.shell());
    text.push_str(HOST_NAME);
    for (address, name) in &facts.hosts {
        let line = format!("{address} {name}");
        let _ = writeln!(text, "grep -qxF '{line}' /etc/hosts || echo '{line}' >>/etc/hosts");
    }
    if let Some(volume) = &facts.volume {
        let serial = volume.replace('-', "");
        let alias = ALIAS.trim_start_matches("/dev/");
        let _ = write!(
            text,
            "if command -v udevadm >/dev/null 2>&1; then\n    \
             mkdir -p /etc/udev/rules.d\n    \
             echo 'SUBSYSTEM==\"block\", ENV{{DEVTYPE}}==\"disk\", ENV{{ID_SERIAL}}==\"*{serial}*\", SYMLINK+=\"{alias}\"' \
             >/etc/udev/rules.d/99-kprov-data.rules\n    \
             udevadm control --reload && udevadm trigger --subsystem-match=block || true\n\
             fi\n"
        );
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(data: &str) -> String {
        String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).unwrap()).unwrap()
    }

    fn is_shell(text: &str) -> bool {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        std::process::Command::new("sh")
            .arg("-n")
            .arg(file.path())
            .status()
            .unwrap()
            .success()
    }

    #[test]
    fn the_name_is_set_before_the_script_runs() {
        let facts = Facts {
            volume: Some("vol-01".into()),
            hosts: vec![([10, 32, 0, 4].into(), "lb.example.com".into())],
            ignition: false,
        };
        for (series, asks) in [("demo-cp-0", false), ("demo-worker-0..6..3", true)] {
            let series: Series = series.parse().unwrap();
            let text = decode(&compose(&series, "#!/bin/sh\nset -eu\nrun\n", &facts).unwrap());
            assert!(text.starts_with("#!/bin/sh\n") && text.ends_with("set -eu\nrun\n"));
            assert_eq!(text.contains("ami-launch-index"), asks);
            assert!(text.contains("echo '10.32.0.4 lb.example.com' >>/etc/hosts"), "{text}");
            assert!(
                text.contains(r#"ENV{ID_SERIAL}=="*vol01*", SYMLINK+="kprov-data""#),
                "{text}"
            );
            assert!(is_shell(&text));
        }
    }

    #[test]
    fn ignition_has_the_same_script() {
        let series: Series = "demo-cp-0".parse().unwrap();
        let ignition = Facts {
            ignition: true,
            ..Facts::default()
        };
        let text = decode(&compose(&series, "#!/bin/sh\nrun\n", &ignition).unwrap());
        assert!(text.starts_with('{') && text.contains("3.3.0"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let series: Series = "demo-cp-0".parse().unwrap();
        let long = format!("#!/bin/sh\n{}", "x".repeat(LIMIT));
        assert!(
            compose(&series, &long, &Facts::default())
                .unwrap_err()
                .message
                .contains("16384")
        );
        assert!(compose(&series, "#!/usr/bin/python3\n", &Facts::default()).is_err());
    }
}
