//! A first-boot script for machines that read Ignition. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

/// The Ignition configuration (spec 3.3) of a machine that runs a script at every boot, as cloud-init machines do.
pub(crate) fn wrap(script: &str) -> String {
    let unit = "[Unit]\nDescription=kprov's first boot\nWants=network-online.target\nAfter=network-online.target\n\
        [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/opt/kprov/first-boot\n\
        [Install]\nWantedBy=multi-user.target\n";
    let source = format!("data:;base64,{}", STANDARD.encode(script));
    json!({
        "ignition": {"version": "3.3.0"},
        "storage": {"files": [{"path": "/opt/kprov/first-boot", "mode": 0o700, "contents": {"source": source}}]},
        "systemd": {"units": [{"name": "kprov-first-boot.service", "enabled": true, "contents": unit}]},
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_the_script() {
        let value: serde_json::Value = serde_json::from_str(&wrap("#!/bin/sh\ntrue\n")).unwrap();
        let source = value["storage"]["files"][0]["contents"]["source"].as_str().unwrap();
        let script = STANDARD.decode(source.strip_prefix("data:;base64,").unwrap()).unwrap();
        assert_eq!(script, b"#!/bin/sh\ntrue\n");
        assert_eq!(value["storage"]["files"][0]["mode"], 448);
    }
}
