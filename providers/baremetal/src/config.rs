//! How the provider is set up.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use camino::Utf8PathBuf;
use kprov_provider::ProviderError;
use kprov_types::MachineName;

use crate::inventory::{Host, Inventory};

/// How many hosts are worked on at once if nothing else is said.
pub const PARALLEL: usize = 20;

/// How the provider is set up.
#[derive(Clone, Debug)]
pub struct BaremetalConfig {
    /// The hosts of the cluster.
    pub inventory: Inventory,
    /// Hosts that were in the inventory and are set up still, as far as known.
    pub former: Vec<Host>,
    /// The API's address or DNS name, which leads to the control-plane hosts already.
    pub endpoint: Option<String>,
    /// An address of the API that the control-plane hosts announce themselves.
    pub virtual_address: Option<Ipv4Addr>,
    /// How many hosts are worked on at once.
    pub parallel: usize,
    /// kprov-node, to be copied to hosts; they fetch it themselves where there is none here.
    pub node_binary: Option<Utf8PathBuf>,
    /// Hosts whose data disk may be wiped.
    pub wipe: BTreeSet<MachineName>,
}

impl BaremetalConfig {
    /// A configuration with everything but the hosts at its default.
    pub fn new(inventory: Inventory) -> Self {
        Self {
            inventory,
            former: Vec::new(),
            endpoint: None,
            virtual_address: None,
            parallel: PARALLEL,
            node_binary: None,
            wipe: BTreeSet::new(),
        }
    }

    /// Checks what can be checked without touching anything.
    pub(crate) fn validate(mut self) -> Result<Self, ProviderError> {
        if self.endpoint.is_some() && self.virtual_address.is_some() {
            return Err(
                ProviderError::never("`spec.baremetal` has both `endpoint` and `virtualAddress`").hint(
                    "give `endpoint` where something leads to the control-plane hosts already, or `virtualAddress`",
                ),
            );
        }
        if let Some(address) = self.virtual_address
            && let Some(host) = self.hosts().find(|host| host.address == Some(address))
        {
            return Err(ProviderError::never(format!(
                "the virtual address `{address}` is the own address of host `{}`",
                host.name
            ))
            .hint("give an address of the hosts' network that nobody has"));
        }
        if let Some(unknown) = self
            .wipe
            .iter()
            .find(|name| self.inventory.host(name.as_str()).is_none())
        {
            return Err(ProviderError::never(format!(
                "`--wipe` names the host `{unknown}`, which is not in the inventory"
            ))
            .hint("check its name"));
        }
        self.parallel = self.parallel.max(1);
        let known: BTreeSet<_> = self.inventory.hosts.iter().map(|h| h.name.clone()).collect();
        self.former.retain(|host| !known.contains(&host.name));
        Ok(self)
    }

    /// All hosts, those that are to leave included.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.inventory.hosts.iter().chain(&self.former)
    }
}
