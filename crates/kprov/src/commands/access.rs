//! Which cluster's API a command talks to: one that is known here, or whatever a kubeconfig names.

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::Context;
use crate::cli::AccessArgs;
use crate::failure::{OrHint as _, UserError};
use crate::home::ClusterHome;

/// A cluster whose API is to be used.
pub(super) struct Access {
    /// A client of its API.
    pub client: kube::Client,
    /// What is kept of it here, if anything is.
    pub home: Option<ClusterHome>,
    /// Its name, for people.
    pub name: String,
}

impl Access {
    /// By `--name`, by `--kubeconfig` or `--context`, or (as kubectl's plugin) by the kubeconfig kubectl uses.
    pub(super) async fn open(context: &Context, args: &AccessArgs) -> Result<Self> {
        let AccessArgs {
            name,
            kubeconfig,
            context: kube_context,
        } = args;
        let by_kubeconfig =
            kubeconfig.is_some() || kube_context.is_some() || (crate::is_kubectl_plugin() && name.is_none());
        if !by_kubeconfig {
            let home = context.home.pick(name.as_ref())?;
            let path = home.kubeconfig();
            if !path.exists() {
                return Err(
                    UserError::new(format!("there is no kubeconfig of cluster `{}` in `{}`", home.name, home.dir()))
                        .hint("`kprov list` shows the clusters that are known here; or name a kubeconfig with `--kubeconfig FILE`")
                        .into(),
                );
            }
            return Ok(Self {
                client: super::client(&path).await?,
                name: home.name.to_string(),
                home: Some(home),
            });
        }
        let hint = "check the file and the context's name; `kubectl config get-contexts` lists them";
        let config = match kubeconfig {
            Some(path) => Kubeconfig::read_from(path).or_hint(format!("can't use the kubeconfig `{path}`"), hint)?,
            None => Kubeconfig::read().or_hint("can't use your kubeconfig", hint)?,
        };
        let options = KubeConfigOptions {
            context: kube_context.clone(),
            ..KubeConfigOptions::default()
        };
        let chosen = kube_context.clone().or_else(|| config.current_context.clone());
        let mut config = kube::Config::from_custom_kubeconfig(config, &options)
            .await
            .or_hint("can't use your kubeconfig", hint)?;
        config.connect_timeout = Some(std::time::Duration::from_secs(5));
        Ok(Self {
            client: kube::Client::try_from(config).context("the kubeconfig can't be used")?,
            home: None,
            name: chosen.unwrap_or_else(|| "current".into()),
        })
    }
}
