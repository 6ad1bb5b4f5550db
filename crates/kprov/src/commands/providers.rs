//! From what a cluster file says to the provider that it names. The only place that knows providers by name.

use anyhow::{Context as _, Result};
use kprov_provider::Provider;
use kprov_provider_aws::{AwsConfig, AwsProvider};
use kprov_provider_azure::{AzureConfig, AzureProvider, Surroundings};
use kprov_provider_local::{LocalConfig, LocalProvider};
use kprov_types::cluster::{self, ClusterSpec};

use super::{Context, baremetal};
use crate::failure::UserError;
use crate::home::Record;

/// The provider that a cluster asks for, and the cluster with the machines that the provider has for it.
pub(super) async fn open_for(context: &Context, spec: ClusterSpec) -> Result<(Box<dyn Provider>, ClusterSpec)> {
    let provider: Box<dyn Provider> = match spec.provider {
        cluster::Provider::Local => local(context)?,
        cluster::Provider::Aws => Box::new(
            AwsProvider::open(AwsConfig {
                settings: spec.aws.clone(),
                zones: spec.zones.clone(),
            })
            .await?,
        ),
        cluster::Provider::Azure => azure(&spec)?,
        cluster::Provider::Baremetal => {
            let record = context.home.cluster(&spec.name).record()?;
            let opened = baremetal::open(spec, record.as_ref(), &[])?;
            return Ok((opened.provider, opened.spec));
        }
    };
    Ok((provider, spec))
}

/// The provider of a cluster that something is kept of; where nothing is, it can only be on this machine.
pub(super) async fn open_known(context: &Context, record: Option<&Record>) -> Result<Box<dyn Provider>> {
    match record {
        // As kept: the inventory's file may have moved.
        Some(
            record @ Record {
                inventory: Some(kept), ..
            },
        ) => baremetal::open_kept(record, kept),
        Some(record) => Ok(open_for(context, record.file.validate()?).await?.0),
        None => local(context),
    }
}

/// Machines on Azure.
fn azure(spec: &ClusterSpec) -> Result<Box<dyn Provider>> {
    let mut config = AzureConfig::new(&spec.azure, &spec.zones, &Surroundings::of_process())?;
    config.sizes = spec.machines.iter().filter_map(|m| m.size.clone()).collect();
    Ok(Box::new(AzureProvider::open(config)?))
}

/// Machines on this host.
pub(super) fn local(context: &Context) -> Result<Box<dyn Provider>> {
    let exe = std::env::current_exe().context("can't tell where kprov itself is")?;
    let exe = camino::Utf8PathBuf::from_path_buf(exe)
        .map_err(|p| UserError::new(format!("the path of kprov, `{}`, is not UTF-8", p.display())))?;
    let mut config = LocalConfig::new(exe);
    config.hide.push(context.home.path().to_owned());
    Ok(Box::new(LocalProvider::new(config)?))
}
