//! Machines and their disks. All that don't depend on each other are made at once; the transport bounds how many requests go.

use std::collections::BTreeMap;

use futures::future::{join_all, try_join4};
use kprov_provider::ProviderError;
use kprov_types::MachineName;
use kprov_types::machine::{Disk, DiskSpec, Machine, MachineSpec, MachineState};

use crate::AzureProvider;
use crate::client::Condition;
use crate::error::Doing;
use crate::kind::{Kind, Names, data_disk, system_disk};
use crate::network::taken;
use crate::seen::{self, Seen};
use crate::sizes::{self, Size, Sizes};
use crate::translate;

/// What is there of machines in a group, the cluster's own and others'.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    machines: Vec<Seen>,
    nics: Vec<Seen>,
    addresses: Vec<Seen>,
    disks: Vec<Seen>,
    /// By the machines' ids in lower case.
    power: BTreeMap<String, String>,
}

fn called<'a>(all: &'a [Seen], name: &str) -> Option<&'a Seen> {
    all.iter().find(|s| s.name.eq_ignore_ascii_case(name))
}

impl Inventory {
    /// From lists of each kind.
    pub(crate) fn new(lists: Vec<Seen>, power: BTreeMap<String, String>) -> Self {
        let mut inventory = Self {
            power,
            ..Self::default()
        };
        for seen in lists {
            match seen.kind {
                Kind::Machine => inventory.machines.push(seen),
                Kind::Nic => inventory.nics.push(seen),
                Kind::PublicIp => inventory.addresses.push(seen),
                Kind::Disk => inventory.disks.push(seen),
                _ => {}
            }
        }
        inventory
    }

    fn power(&self, vm: &Seen) -> Option<&str> {
        self.power.get(&vm.id.to_ascii_lowercase()).map(String::as_str)
    }

    fn machine(&self, vm: &Seen) -> Option<Machine> {
        let (nic, public) = (called(&self.nics, &vm.name), called(&self.addresses, &vm.name));
        seen::machine(vm, self.power(vm), nic, public)
    }

    /// The cluster's machines.
    pub(crate) fn machines(&self, names: &Names) -> Vec<Machine> {
        let own = self.machines.iter().filter(|s| s.is_of(&names.cluster));
        own.filter_map(|vm| self.machine(vm)).collect()
    }

    /// The cluster's data disks.
    pub(crate) fn disks(&self, names: &Names) -> Vec<Disk> {
        let own = self.disks.iter().filter(|s| s.is_of(&names.cluster));
        own.filter_map(seen::disk).collect()
    }
}

impl AzureProvider {
    /// The run-time states of the machines in a group, by id; asked for only where there are any of the cluster.
    ///
    /// A listing of machines doesn't show them; one of the whole subscription does. Who may not read that is asked machine by
    /// machine.
    pub(crate) async fn power(
        &self,
        names: &Names,
        machines: &[Seen],
    ) -> Result<BTreeMap<String, String>, ProviderError> {
        let own: Vec<&Seen> = machines.iter().filter(|s| s.is_of(&names.cluster)).collect();
        if own.is_empty() {
            return Ok(BTreeMap::new());
        }
        let listed = match self
            .client
            .list_everywhere(Kind::Machine, &[("statusOnly", "true")])
            .await
        {
            Ok(all) => all,
            Err(failure) if failure.is_forbidden() => {
                let each = join_all(own.iter().map(|m| self.client.machine_state(&names.group, &m.name))).await;
                let each = each.into_iter().collect::<Result<Vec<_>, _>>()?;
                each.into_iter().flatten().collect()
            }
            Err(failure) => return Err(Doing::read("the states of", Kind::Machine.path().0).failed(failure)),
        };
        let of = |s: &Seen| Some((s.id.to_ascii_lowercase(), s.power()?.to_owned()));
        Ok(listed.iter().filter_map(of).collect())
    }

    async fn inventory(&self, names: &Names) -> Result<Inventory, ProviderError> {
        let list = |kind| self.client.list(&names.group, kind);
        let machines = async {
            let machines = list(Kind::Machine).await?;
            let power = self.power(names, &machines).await?;
            Ok((machines, power))
        };
        let (nics, addresses, disks) = (list(Kind::Nic), list(Kind::PublicIp), list(Kind::Disk));
        let ((machines, power), nics, addresses, disks) = try_join4(machines, nics, addresses, disks).await?;
        Ok(Inventory {
            machines,
            nics,
            addresses,
            disks,
            power,
        })
    }

    pub(crate) async fn make_disks(&self, names: &Names, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError> {
        let there = self.client.list(&names.group, Kind::Disk).await?;
        let zones = if want.iter().all(|w| called(&there, &data_disk(&w.machine)).is_some()) {
            Vec::new()
        } else {
            self.zones().await?
        };
        let made = join_all(want.iter().map(|spec| self.make_disk(names, spec, &zones, &there))).await;
        crate::worst_or(made)
    }

    async fn make_disk(
        &self,
        names: &Names,
        spec: &DiskSpec,
        zones: &[String],
        there: &[Seen],
    ) -> Result<Disk, ProviderError> {
        let name = data_disk(&spec.machine);
        let existing = called(there, &name);
        if let Some(other) = existing.filter(|s| !s.is_of(&names.cluster)) {
            return Err(taken(Kind::Disk.noun(), &other.name, names).hint(ANOTHER_NAME));
        }
        if let Some(disk) = existing.filter(|s| s.is_provisioned()).and_then(seen::disk) {
            return Ok(disk);
        }
        let zone = existing.and_then(Seen::zone).map(ToOwned::to_owned);
        let zone = zone.or_else(|| sizes::zone_of(&spec.machine, zones));
        let body = translate::disk(&self.config, names, &spec.machine, spec.size_gib, zone.as_deref());
        let doing = Doing {
            zone,
            location: Some(self.config.location.clone()),
            ..Doing::new("make", Kind::Disk.noun(), &name)
        };
        let made = self
            .client
            .put(&names.group, Kind::Disk, &name, &Condition::Any, &body)
            .await;
        let made = made.map_err(|f| doing.failed(f))?;
        seen::disk(&made).ok_or_else(|| ProviderError::look_first(format!("managed disk `{name}` isn't there yet")))
    }

    pub(crate) async fn unmake_disks(&self, names: &Names, machines: &[MachineName]) -> Result<(), ProviderError> {
        let there = self.client.list(&names.group, Kind::Disk).await?;
        let own = there.iter().filter(|s| s.is_of(&names.cluster));
        let wanted = own.filter(|s| seen::disk(s).is_some_and(|d| machines.contains(&d.machine)));
        let gone = wanted.map(|s| self.client.delete(&names.group, Kind::Disk, &s.name));
        crate::worst(join_all(gone).await)
    }

    pub(crate) async fn make_machines(
        &self,
        names: &Names,
        want: &[MachineSpec],
    ) -> Result<Vec<Machine>, ProviderError> {
        let there = self.inventory(names).await?;
        // Sizes are a long list: read only when something is made.
        let is_new = |spec: &MachineSpec| called(&there.machines, spec.name.as_str()).is_none();
        let plan = if want.iter().any(is_new) {
            Some((self.sizes().await?, self.zones().await?))
        } else {
            None
        };
        let made = want.iter().map(|spec| async {
            if let Some(vm) = called(&there.machines, spec.name.as_str()) {
                return self.mend_machine(names, spec, vm, &there).await;
            }
            let (sizes, zones) = plan
                .as_ref()
                .ok_or_else(|| ProviderError::look_first(format!("machine `{}` is gone", spec.name)))?;
            self.make_machine(names, spec, sizes, zones, &there).await
        });
        crate::worst_or(join_all(made).await)
    }

    /// A machine that exists: started where it stands still, put again where it failed or has lost its data disk.
    async fn mend_machine(
        &self,
        names: &Names,
        spec: &MachineSpec,
        vm: &Seen,
        there: &Inventory,
    ) -> Result<Machine, ProviderError> {
        let found = there.machine(vm).filter(|_| vm.is_of(&names.cluster));
        let Some(mut machine) = found else {
            return Err(taken(Kind::Machine.noun(), &vm.name, names).hint(ANOTHER_NAME));
        };
        let has_failed = matches!(vm.provisioning().as_str(), "failed" | "canceled");
        let is_settled = matches!(machine.state, MachineState::Running | MachineState::Stopped);
        let lacks_disk = spec.data_disk && vm.attached_disk().is_none();
        if (machine.state == MachineState::Stopped && has_failed) || (is_settled && lacks_disk) {
            let condition = vm.etag().map_or(Condition::Any, |e| Condition::Unchanged(e.to_owned()));
            let body = translate::again(vm, names, spec);
            let put = self
                .client
                .put(&names.group, Kind::Machine, &vm.name, &condition, &body)
                .await;
            put.map_err(|f| {
                self.doing("make", spec, vm.text("/properties/hardwareProfile/vmSize"), vm.zone())
                    .failed(f)
            })?;
        }
        if machine.state == MachineState::Stopped {
            let started = self.client.start(&names.group, &vm.name).await;
            started.map_err(|f| {
                self.doing("start", spec, vm.text("/properties/hardwareProfile/vmSize"), vm.zone())
                    .failed(f)
            })?;
            machine.state = MachineState::Running;
        }
        Ok(machine)
    }

    async fn make_machine(
        &self,
        names: &Names,
        spec: &MachineSpec,
        sizes: &Sizes,
        zones: &[String],
        there: &Inventory,
    ) -> Result<Machine, ProviderError> {
        let name = spec.name.as_str();
        let size = sizes.get(spec.size.as_deref().unwrap_or(sizes::DEFAULT))?;
        let zone = Self::zone(spec, size, sizes, zones, there)?;
        let body = translate::machine(&self.config, names, spec, size, zone.as_deref())?;
        let public = if translate::has_public_ip(&self.config, spec.role) {
            let body = translate::machine_public_ip(&self.config, names, spec, zone.as_deref());
            Some(
                self.make_piece(names, Kind::PublicIp, spec, called(&there.addresses, name), &body)
                    .await?,
            )
        } else {
            None
        };
        let nic = translate::nic(&self.config, names, spec);
        let nic = self
            .make_piece(names, Kind::Nic, spec, called(&there.nics, name), &nic)
            .await?;
        // Left by a machine of this name whose creation was cut short, or that was removed without it.
        let stale =
            called(&there.disks, &system_disk(&spec.name)).filter(|d| d.is_of(&names.cluster) && !d.is_attached());
        if let Some(stale) = stale {
            self.client.delete(&names.group, Kind::Disk, &stale.name).await?;
        }
        let vm = self
            .client
            .put(&names.group, Kind::Machine, name, &Condition::Absent, &body)
            .await;
        let vm = vm.map_err(|f| self.doing("make", spec, Some(&size.name), zone.as_deref()).failed(f))?;
        let made = seen::machine(&vm, None, Some(&nic), public.as_ref());
        made.ok_or_else(|| ProviderError::look_first(format!("virtual machine `{name}` isn't there yet")))
    }

    /// The zone of a new machine: its data disk's, else the one asked for, else its share.
    fn zone(
        spec: &MachineSpec,
        size: &Size,
        sizes: &Sizes,
        zones: &[String],
        there: &Inventory,
    ) -> Result<Option<String>, ProviderError> {
        let disk = called(&there.disks, &data_disk(&spec.name)).filter(|_| spec.data_disk);
        let zone = match disk {
            Some(disk) => disk.zone().map(ToOwned::to_owned),
            None if spec.data_disk => {
                return Err(ProviderError::look_first(format!(
                    "machine `{}` has no data disk yet",
                    spec.name
                )));
            }
            None => spec.zone.clone().or_else(|| sizes::zone_of(&spec.name, zones)),
        };
        if let Some(zone) = &zone {
            sizes.check_zone(size, zone)?;
        }
        Ok(zone)
    }

    /// Makes something that belongs to one machine, unless it's there and well.
    async fn make_piece(
        &self,
        names: &Names,
        kind: Kind,
        spec: &MachineSpec,
        there: Option<&Seen>,
        body: &serde_json::Value,
    ) -> Result<Seen, ProviderError> {
        let name = spec.name.as_str();
        if let Some(there) = there {
            if !there.is_of(&names.cluster) {
                return Err(taken(kind.noun(), name, names).hint(ANOTHER_NAME));
            }
            if there.is_provisioned() {
                return Ok(there.clone());
            }
        }
        let doing = Doing {
            location: Some(self.config.location.clone()),
            ..Doing::new("make", kind.noun(), name)
        };
        let made = self.client.put(&names.group, kind, name, &Condition::Any, body).await;
        made.map_err(|f| doing.failed(f))
    }

    fn doing(&self, verb: &'static str, spec: &MachineSpec, size: Option<&str>, zone: Option<&str>) -> Doing {
        Doing {
            size: size.map(ToOwned::to_owned),
            zone: zone.map(ToOwned::to_owned),
            location: Some(self.config.location.clone()),
            ..Doing::new(verb, Kind::Machine.noun(), spec.name.as_str())
        }
    }

    pub(crate) async fn unmake_machines(&self, names: &Names, machines: &[MachineName]) -> Result<(), ProviderError> {
        let of_these = |s: &&Seen| s.is_of(&names.cluster) && s.machine().is_some_and(|m| machines.contains(&m));
        let there = self.client.list(&names.group, Kind::Machine).await?;
        let gone = there
            .iter()
            .filter(of_these)
            .map(|s| self.client.delete(&names.group, Kind::Machine, &s.name));
        crate::worst(join_all(gone).await)?;
        // A machine takes its interface and its system disk along; those of one that never came to be are left.
        for kinds in [[Kind::Nic, Kind::Disk].as_slice(), &[Kind::PublicIp]] {
            let lists = join_all(kinds.iter().map(|kind| self.client.list(&names.group, *kind))).await;
            let mut left = Vec::new();
            for list in lists {
                left.extend(list?.into_iter().filter(|s| of_these(&s) && seen::disk(s).is_none()));
            }
            let gone = left.iter().map(|s| self.client.delete(&names.group, s.kind, &s.name));
            crate::worst(join_all(gone).await)?;
        }
        Ok(())
    }
}

/// What to do about a name that somebody else has.
const ANOTHER_NAME: &str = "choose another name for the cluster, or another resource group";
