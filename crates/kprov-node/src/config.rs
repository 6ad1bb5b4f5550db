//! The machine's first-boot configuration: read, checked, and, once the machine is set up, rid of what was secret in it.

use std::net::Ipv4Addr;

use camino::Utf8Path;
use kprov_types::node::{Bundle, Member, NodeConfig};
use kprov_types::{MachineName, Role};

use crate::files::{self, FileError, failed};
use crate::{host, paths};

/// Why kprov-node cannot run as configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what it should be.
    #[error("`{path}` is not understood")]
    Malformed {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The host's name is no machine name.
    #[error("the host name cannot be this machine's name; set `machine` in the configuration")]
    Name(#[source] kprov_types::names::NameError),
    /// No route leads anywhere.
    #[error("this machine's own address cannot be told: it has neither a default route nor one to `{endpoint}`")]
    NoAddress {
        /// The API endpoint's host.
        endpoint: String,
    },
    /// The bundle on disk is not for this machine.
    #[error("the bundle on disk does not fit this machine: {why}")]
    Bundle {
        /// Why.
        why: String,
    },
}

/// What kprov-node knows of its own machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The first-boot configuration.
    pub config: NodeConfig,
    /// The machine's name.
    pub name: MachineName,
    /// The machine's own address.
    pub address: Ipv4Addr,
}

/// Reads a first-boot configuration.
pub fn read(path: &Utf8Path) -> Result<NodeConfig, ConfigError> {
    let text = std::fs::read(path).map_err(failed("read", path))?;
    serde_json::from_slice(&text).map_err(|source| ConfigError::Malformed {
        path: path.to_string(),
        source,
    })
}

impl Machine {
    /// Finds out name and address where the configuration leaves them open.
    pub fn identify(config: NodeConfig) -> Result<Self, ConfigError> {
        let host_name = || {
            let name = nix::unistd::gethostname().unwrap_or_default();
            MachineName::new(name.to_string_lossy().to_lowercase()).map_err(ConfigError::Name)
        };
        let name = config.machine.clone().map_or_else(host_name, Ok)?;
        let found = config
            .address
            .or_else(|| host::own_address(&config.endpoint, config.virtual_address));
        let address = found.ok_or_else(|| ConfigError::NoAddress {
            endpoint: config.endpoint.host.clone(),
        })?;
        Ok(Self { config, name, address })
    }

    /// Checks that a bundle is for this machine; the error says why not.
    pub fn check_bundle(&self, bundle: &Bundle) -> Result<(), String> {
        let Bundle { settings, secrets } = bundle;
        let config = &self.config;
        if config.role != Role::ControlPlane {
            return Err("this machine is a worker, which takes no bundle".into());
        }
        if settings.cluster != config.cluster {
            return Err(format!(
                "it is for the cluster `{}`, this machine is of `{}`",
                settings.cluster, config.cluster
            ));
        }
        if settings.network != config.network {
            return Err("its address ranges are not the ones this machine was started with".into());
        }
        if secrets.ca.certificate.trim() != config.ca.trim() {
            return Err("its cluster CA is not the one this machine was started with".into());
        }
        if settings.kubernetes != settings.release.kubernetes {
            let (asked, release) = (&settings.kubernetes, &settings.release.kubernetes);
            return Err(format!("it asks for Kubernetes {asked} with a release of {release}"));
        }
        let member = self
            .member(bundle)
            .ok_or_else(|| format!("`{}` is not among its members", self.name))?;
        if member.address != self.address {
            let (theirs, own) = (member.address, self.address);
            return Err(format!(
                "it has `{theirs}` as the address of `{}`, which is `{own}`",
                self.name
            ));
        }
        Ok(())
    }

    /// This machine among the bundle's members.
    pub fn member<'a>(&self, bundle: &'a Bundle) -> Option<&'a Member> {
        bundle.settings.members.iter().find(|m| m.name == self.name)
    }

    /// The bundle that was accepted before, if one was.
    pub fn stored_bundle(&self) -> Result<Option<Bundle>, ConfigError> {
        let Some(json) = files::read_if_there(Utf8Path::new(paths::BUNDLE))? else {
            return Ok(None);
        };
        let bundle = serde_json::from_slice(&json).map_err(|source| ConfigError::Malformed {
            path: paths::BUNDLE.into(),
            source,
        })?;
        self.check_bundle(&bundle).map_err(|why| ConfigError::Bundle { why })?;
        Ok(Some(bundle))
    }
}

/// Takes the setup identity and the join token out of the configuration file: both have done what they were for.
pub fn forget_secrets(path: &Utf8Path) -> Result<(), ConfigError> {
    let mut config = read(path)?;
    if config.setup.take().is_some() | config.join_token.take().is_some() {
        let json = serde_json::to_vec_pretty(&config).map_err(|source| ConfigError::Malformed {
            path: path.to_string(),
            source,
        })?;
        files::write(path, &json, 0o600)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_bundle_must_fit() {
        type Edit = fn(&mut Bundle);
        let machine = testing::machine();
        assert_eq!(machine.check_bundle(&testing::bundle()), Ok(()));
        let cases: &[(&str, Edit)] = &[
            ("cluster `other`", |b| b.settings.cluster = "other".parse().unwrap()),
            ("address ranges", |b| b.settings.network.dns_domain = "x".into()),
            ("CA", |b| b.secrets.ca.certificate = "x".into()),
            ("1.21.0", |b| b.settings.kubernetes = "1.21.0".parse().unwrap()),
            ("not among its members", |b| b.settings.members.clear()),
            ("`10.0.0.9`", |b| b.settings.members[0].address = [10, 0, 0, 9].into()),
        ];
        for (word, edit) in cases {
            let mut bundle = testing::bundle();
            edit(&mut bundle);
            let why = machine.check_bundle(&bundle).unwrap_err();
            assert!(why.contains(word), "{word}: {why}");
        }
        let mut worker = testing::machine();
        worker.config.role = Role::Worker;
        assert!(worker.check_bundle(&testing::bundle()).is_err());
    }

    #[test]
    fn secrets_are_forgotten_and_the_rest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap().join("node.json");
        let config = testing::machine().config;
        assert!(config.setup.is_some() && config.join_token.is_some());
        std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        forget_secrets(&path).unwrap();
        assert_eq!(
            read(&path).unwrap(),
            NodeConfig {
                setup: None,
                join_token: None,
                ..config
            }
        );
    }
}
