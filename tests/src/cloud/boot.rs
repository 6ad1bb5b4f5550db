//! What a machine does at boot in the stead of a cloud's image.

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use camino::Utf8PathBuf;

use super::Instance;

const SCRIPT: &str = include_str!("boot.sh");

/// The directory with cloud-init and what it needs, unpacked; `cargo xtask test` makes it.
pub(super) fn cloud_init() -> Result<Utf8PathBuf> {
    let dir = std::env::var("KPROV_TEST_CLOUD_INIT")
        .context("KPROV_TEST_CLOUD_INIT is not set: run the tests by `cargo xtask test`")?;
    let dir = Utf8PathBuf::from(dir);
    ensure!(
        dir.join("usr/bin/cloud-init").exists(),
        "there is no cloud-init in `{dir}`"
    );
    Ok(dir)
}

/// The machine's first-boot script: an image with cloud-init, and a seed with the instance's data.
pub(super) fn script(instance: &Instance, cloud_init: &Utf8PathBuf) -> String {
    let data = base64::engine::general_purpose::STANDARD.encode(&instance.user_data);
    SCRIPT
        .replace("@CLOUD_INIT@", cloud_init.as_str())
        .replace("@INSTANCE@", &instance.id)
        .replace("@HOSTNAME@", &instance.hostname)
        .replace("@METADATA@", &serde_json::json!(instance.metadata).to_string())
        .replace("@USER_DATA@", &data)
}
