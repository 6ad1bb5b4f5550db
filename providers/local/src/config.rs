//! How the provider is set up.

use camino::Utf8PathBuf;

use crate::error::LocalError;

/// Where the state of machines is kept if nothing else is said.
pub const STATE_DIR: &str = "/var/lib/kprov/local";

/// How the local provider is set up.
#[derive(Clone, Debug)]
pub struct LocalConfig {
    /// Where machines and their disks are kept; [`STATE_DIR`] by default. On an ordinary file system, as it holds the
    /// writable layer of overlays.
    pub state_dir: Utf8PathBuf,
    /// The program that offers the hidden subcommands `machine-room init` (see [`crate::machine_init`]) and
    /// `machine-room balancer --listen ADDRESS:PORT --state DIR`.
    pub room_exe: Utf8PathBuf,
    /// Directories of this host that machines must not see, such as those that hold secrets. The state directory is
    /// always hidden.
    pub hide: Vec<Utf8PathBuf>,
}

impl LocalConfig {
    /// A configuration with the default state directory.
    pub fn new(room_exe: impl Into<Utf8PathBuf>) -> Self {
        Self {
            state_dir: STATE_DIR.into(),
            room_exe: room_exe.into(),
            hide: Vec::new(),
        }
    }

    /// Checks what can be checked without touching anything.
    pub(crate) fn validate(mut self) -> Result<Self, LocalError> {
        let refuse = |why| {
            Err(LocalError::StateDir {
                path: self.state_dir.to_string(),
                why,
            })
        };
        if !self.state_dir.is_absolute() {
            return refuse("is not an absolute path");
        }
        // These separate the options of an overlay mount, and escaping them differs between kernel versions.
        if self.state_dir.as_str().contains([',', ':', '\\', ' ', '\n']) {
            return refuse("has a comma, colon, backslash or space in its name");
        }
        self.hide.push(self.state_dir.clone());
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_unusable_state_directories() {
        assert!(LocalConfig::new("/usr/bin/kprov").validate().is_ok());
        for bad in ["relative", "/a,b", "/a:b", "/a b"] {
            let config = LocalConfig {
                state_dir: bad.into(),
                ..LocalConfig::new("/usr/bin/kprov")
            };
            assert!(matches!(config.validate(), Err(LocalError::StateDir { .. })), "{bad}");
        }
    }

    #[test]
    fn always_hides_the_state() {
        let config = LocalConfig::new("/usr/bin/kprov").validate().unwrap();
        assert_eq!(config.hide, [STATE_DIR]);
    }
}
