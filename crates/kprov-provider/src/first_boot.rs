//! First-boot data in the form that an image understands. Pure.
//!
//! [`kprov_types::machine::FirstBoot`] is a shell script, which cloud-init runs as it stands. Images without cloud-init
//! (Flatcar, Fedora `CoreOS`) are configured by Ignition, once, before they boot.

use base64::Engine as _;
use serde_json::json;

/// Where Ignition puts the script: a directory that is writable on images whose `/usr` is not.
pub const SCRIPT_PATH: &str = "/opt/kprov/first-boot.sh";

/// An Ignition configuration that runs `script` at every boot, as root, once the network is there (Ignition's specification
/// 3.3.0).
pub fn ignition(script: &str) -> String {
    let source = format!(
        "data:;base64,{}",
        base64::engine::general_purpose::STANDARD.encode(script)
    );
    let unit = format!(
        "[Unit]\n\
         Description=kprov: first boot\n\
         Wants=network-online.target\n\
         After=network-online.target\n\n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         ExecStart=/bin/sh {SCRIPT_PATH}\n\
         Restart=on-failure\n\
         RestartSec=5\n\n\
         [Install]\n\
         WantedBy=multi-user.target\n"
    );
    json!({
        "ignition": { "version": "3.3.0" },
        "storage": {
            "files": [{
                "path": SCRIPT_PATH,
                // 0700: it may identify the machine.
                "mode": 0o700,
                "overwrite": true,
                "contents": { "source": source },
            }],
        },
        "systemd": {
            "units": [{ "name": "kprov-first-boot.service", "enabled": true, "contents": unit }],
        },
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_script_is_carried_as_it_is() {
        let script = "#!/bin/sh\necho 'ü \"%\\' >/tmp/x\n";
        let config: serde_json::Value = serde_json::from_str(&ignition(script)).unwrap();
        let file = &config["storage"]["files"][0];
        assert_eq!(file["path"], SCRIPT_PATH);
        let data = file["contents"]["source"].as_str().unwrap();
        let data = data.strip_prefix("data:;base64,").unwrap();
        let bytes = base64::engine::general_purpose::STANDARD.decode(data).unwrap();
        assert_eq!(bytes, script.as_bytes());
    }

    /// Debian's `ignition` has the validator; the suite installs it.
    #[test]
    fn ignition_itself_takes_it() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, ignition("#!/bin/sh\ntrue\n").as_bytes()).unwrap();
        let output = Command::new("ignition-validate").arg(file.path()).output();
        let output = match output {
            Ok(output) => output,
            Err(error) if std::env::var_os("KPROV_TEST_MOTO").is_none() => {
                eprintln!("skipped: ignition-validate can't be run ({error}); `cargo xtask test` installs it");
                return;
            }
            Err(error) => panic!("ignition-validate can't be run: {error}"),
        };
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
