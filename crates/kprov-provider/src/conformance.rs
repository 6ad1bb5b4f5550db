//! The suite that every provider passes: what the trait promises, tried on the real thing.
//!
//! Each rule is a function that makes what it needs, disturbs it by a [`World`], and says in a [`Violation`] what was not
//! as promised. [`all`] runs them one after the other and removes everything in between, even when a rule is broken.

use std::fmt;

use async_trait::async_trait;
use kprov_types::machine::{DiskSpec, FirstBoot, Machine, MachineSpec, MachineState, NetworkSpec, Observed};
use kprov_types::{ClusterName, MachineName, Role};

use crate::{Advice, Provider, ProviderError};

mod faults;

pub use faults::{
    cut_listings_are_no_short_lists, late_listings_make_nothing_twice, lost_replies_make_nothing_twice,
    pending_machines_are_waited_for, throttling_passes,
};

/// How often a provider is asked again for what takes its time; [`World::pause`] lies in between.
const PATIENCE: usize = 600;

/// What happens to machines without the provider's doing, and the time in between.
#[async_trait]
pub trait World: Send + Sync {
    /// Lets a machine lose its power: it exists still, and does not run.
    async fn power_off(&self, cluster: &ClusterName, machine: &MachineName);

    /// Deletes a machine behind the provider's back, as a person would in a cloud's console.
    async fn delete(&self, cluster: &ClusterName, machine: &MachineName);

    /// Lets some time pass before the provider is asked again.
    async fn pause(&self);

    /// Makes trouble for the calls to come, or ends it; `false` where this world can't make such trouble.
    async fn trouble(&self, _trouble: &Trouble) -> bool {
        false
    }
}

/// What can go wrong between a provider and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing, from now on.
    Over,
    /// Every other change takes effect, and its reply is lost.
    LostReplies,
    /// Many calls are refused because there were too many.
    Throttling,
    /// Listings break off in the middle.
    CutListings,
    /// What was made is missing from the next listings.
    LateListings,
    /// A machine is made and never runs.
    NeverRunning(MachineName),
}

/// What the suite works with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The cluster that rules are tried on; nothing of it may exist before.
    pub cluster: ClusterName,
    /// Another one beside it, with a name that begins the same.
    pub neighbour: ClusterName,
    /// The network both ask for, in this order.
    pub networks: [NetworkSpec; 2],
    /// What machines run at first boot.
    pub first_boot: FirstBoot,
}

/// A promise of the trait that was not kept.
#[derive(Debug)]
pub struct Violation {
    /// The rule, by its function's name.
    pub rule: &'static str,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the rule `{}` is broken: {}", self.rule, self.seen)
    }
}

impl std::error::Error for Violation {}

/// A rule at work: the provider, the world, and how to complain.
struct Trial<'a> {
    rule: &'static str,
    provider: &'a dyn Provider,
    world: &'a dyn World,
    setup: &'a Setup,
}

type Outcome = Result<(), Violation>;

/// Runs all rules. The first broken one ends it, after everything was removed.
pub async fn all(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    nothing_is_empty(provider, world, setup).await?;
    ensuring_again_changes_nothing(provider, world, setup).await?;
    stopped_machines_are_started(provider, world, setup).await?;
    deleted_machines_are_put_back(provider, world, setup).await?;
    removing_twice_is_success(provider, world, setup).await?;
    neighbours_are_left_alone(provider, world, setup).await?;
    faults::all(provider, world, setup).await
}

/// Nothing is an empty listing, not an error; and removing it is success.
pub async fn nothing_is_empty(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "nothing_is_empty",
        provider,
        world,
        setup,
    };
    let cluster = &setup.cluster;
    trial.same(
        "observing nothing",
        &trial.observe(cluster).await?,
        &Observed::default(),
    )?;
    trial.remove(cluster).await?;
    trial.same(
        "observing nothing",
        &trial.observe(cluster).await?,
        &Observed::default(),
    )?;
    let clusters = trial.ok("listing clusters", provider.clusters().await)?;
    trial.check(!clusters.contains(cluster), || {
        format!("`{cluster}` is listed, and nothing of it exists")
    })
}

/// A second ensure changes nothing, finds the same things again, and keeps the first-boot data that a machine began with.
pub async fn ensuring_again_changes_nothing(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "ensuring_again_changes_nothing",
        provider,
        world,
        setup,
    };
    trial
        .cleanly(async {
            let before = trial.make(&setup.cluster, 0).await?;
            let after = trial.make(&setup.cluster, 0).await?;
            trial.same("a second ensure", &after, &before)?;
            let network = before.network.as_ref();
            trial.check(network.is_some_and(|n| n.complete), || {
                format!("the network is not complete: {network:?}")
            })?;
            let inside = |m: &Machine| {
                m.address.is_some_and(|a| {
                    network.is_none_or(|n| {
                        n.cidr.contains(&match a {
                            std::net::IpAddr::V4(v4) => v4,
                            std::net::IpAddr::V6(_) => return false,
                        })
                    })
                })
            };
            trial.check(before.machines.iter().all(inside), || {
                format!("addresses lie outside: {:?}", before.machines)
            })?;
            // A network whose range the provider chose keeps it, and one that is named must be that one.
            let named = NetworkSpec {
                cidr: network.map(|n| n.cidr),
                ..setup.networks[0].clone()
            };
            let again = trial.ok(
                "naming the range",
                provider.ensure_network(&setup.cluster, &named).await,
            )?;
            trial.same("naming the range that it has", &Some(again), &before.network)?;
            let clusters = trial.ok("listing clusters", provider.clusters().await)?;
            trial.check(clusters.contains(&setup.cluster), || {
                format!("the cluster is not listed: {clusters:?}")
            })
        })
        .await
}

/// A machine that lost its power is seen as stopped, and started by the next ensure: itself, not another one.
pub async fn stopped_machines_are_started(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "stopped_machines_are_started",
        provider,
        world,
        setup,
    };
    trial
        .cleanly(async {
            let before = trial.make(&setup.cluster, 0).await?;
            let (name, _) = trial.machines(&setup.cluster)?.remove(0);
            world.power_off(&setup.cluster, &name).await;
            let stopped = |o: &Observed| {
                o.machines
                    .iter()
                    .all(|m| (m.state == MachineState::Stopped) == (m.name == name))
                    && o.machines.len() == before.machines.len()
            };
            trial
                .until("the machine is seen as stopped", &setup.cluster, stopped)
                .await?;
            let after = trial.make(&setup.cluster, 0).await?;
            // Clouds give a machine another public address each time it starts.
            let inside = |mut o: Observed| {
                for machine in &mut o.machines {
                    machine.external_address = None;
                }
                o
            };
            trial.same("starting it again", &inside(after), &inside(before))
        })
        .await
}

/// A machine deleted by hand is missing from the listing, and made anew by the next ensure, with its old data disk.
pub async fn deleted_machines_are_put_back(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "deleted_machines_are_put_back",
        provider,
        world,
        setup,
    };
    trial
        .cleanly(async {
            let before = trial.make(&setup.cluster, 0).await?;
            let (name, _) = trial.machines(&setup.cluster)?.remove(0);
            world.delete(&setup.cluster, &name).await;
            let gone = |o: &Observed| o.machines.iter().all(|m| m.name != name);
            let without = trial.until("the machine is gone", &setup.cluster, gone).await?;
            trial.same("the disks without it", &without.disks, &before.disks)?;
            let after = trial.make(&setup.cluster, 0).await?;
            let names = |o: &Observed| o.machines.iter().map(|m| (m.name.clone(), m.role)).collect::<Vec<_>>();
            trial.same("the machines", &names(&after), &names(&before))?;
            trial.same("the disks", &after.disks, &before.disks)?;
            trial.same("the network", &after.network, &before.network)
        })
        .await
}

/// Removing is success also for what is gone already; disks outlive machines; in the end nothing is left.
pub async fn removing_twice_is_success(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "removing_twice_is_success",
        provider,
        world,
        setup,
    };
    trial
        .cleanly(async {
            let before = trial.make(&setup.cluster, 0).await?;
            let leftovers = trial.ok("listing leftovers", provider.leftovers(&setup.cluster).await)?;
            trial.check(!leftovers.is_empty(), || "a running cluster shows no leftovers".into())?;
            let names: Vec<MachineName> = before.machines.iter().map(|m| m.name.clone()).collect();
            for _ in 0..2 {
                trial.ok(
                    "removing machines",
                    provider.remove_machines(&setup.cluster, &names).await,
                )?;
                let rest = trial
                    .until("no machine is left", &setup.cluster, |o: &Observed| {
                        o.machines.is_empty()
                    })
                    .await?;
                trial.same("the disks without machines", &rest.disks, &before.disks)?;
                trial.same("the network without machines", &rest.network, &before.network)?;
            }
            for _ in 0..2 {
                trial.remove(&setup.cluster).await?;
                trial.same(
                    "observing nothing",
                    &trial.observe(&setup.cluster).await?,
                    &Observed::default(),
                )?;
                trial.nothing_left(&setup.cluster).await?;
            }
            Ok(())
        })
        .await
}

/// Two clusters side by side: whatever happens to one leaves the other as it is.
pub async fn neighbours_are_left_alone(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "neighbours_are_left_alone",
        provider,
        world,
        setup,
    };
    trial
        .cleanly(async {
            let neighbour = trial.make(&setup.neighbour, 1).await?;
            let own = trial.make(&setup.cluster, 0).await?;
            trial.same(
                "the neighbour after making",
                &trial.observe(&setup.neighbour).await?,
                &neighbour,
            )?;
            let range = |o: &Observed| o.network.as_ref().map(|n| n.cidr);
            trial.check(range(&own) != range(&neighbour), || {
                format!("both have the range {:?}", range(&own))
            })?;
            trial.remove(&setup.cluster).await?;
            trial.nothing_left(&setup.cluster).await?;
            trial.same(
                "the neighbour after removing",
                &trial.observe(&setup.neighbour).await?,
                &neighbour,
            )
        })
        .await
}

impl Trial<'_> {
    fn violated(&self, seen: impl Into<String>) -> Violation {
        Violation {
            rule: self.rule,
            seen: seen.into(),
        }
    }

    fn check(&self, holds: bool, seen: impl FnOnce() -> String) -> Outcome {
        if holds { Ok(()) } else { Err(self.violated(seen())) }
    }

    fn same<T: PartialEq + fmt::Debug>(&self, what: &str, seen: &T, expected: &T) -> Outcome {
        self.check(seen == expected, || format!("{what}: {seen:?} instead of {expected:?}"))
    }

    fn ok<T>(&self, what: &str, result: Result<T, ProviderError>) -> Result<T, Violation> {
        result.map_err(|e| {
            let cause = e.source.as_ref().map(|s| format!(": {s}")).unwrap_or_default();
            self.violated(format!("{what} failed: {e}{cause}"))
        })
    }

    async fn observe(&self, cluster: &ClusterName) -> Result<Observed, Violation> {
        let mut observed = self.settle("observing", || self.provider.observe(cluster)).await?;
        observed.machines.sort_by(|a, b| a.name.cmp(&b.name));
        observed.disks.sort_by(|a, b| a.machine.cmp(&b.machine));
        Ok(observed)
    }

    /// Observes until something is so.
    async fn until(
        &self,
        what: &str,
        cluster: &ClusterName,
        is_so: impl Fn(&Observed) -> bool,
    ) -> Result<Observed, Violation> {
        for _ in 0..PATIENCE {
            let observed = self.observe(cluster).await?;
            if is_so(&observed) {
                return Ok(observed);
            }
            self.world.pause().await;
        }
        Err(self.violated(format!(
            "never came to be: {what}; last seen: {:?}",
            self.observe(cluster).await?
        )))
    }

    /// One control-plane machine with a data disk, and one worker without.
    fn machines(&self, cluster: &ClusterName) -> Result<Vec<(MachineName, Role)>, Violation> {
        [("cp-0", Role::ControlPlane), ("worker-0", Role::Worker)]
            .into_iter()
            .map(|(suffix, role)| {
                let name = MachineName::new(format!("{cluster}-{suffix}")).map_err(|e| self.violated(e.to_string()))?;
                Ok((name, role))
            })
            .collect()
    }

    /// Does something as whoever calls a provider does: again while its errors say that this may help, after a look.
    async fn settle<T, F: Future<Output = Result<T, ProviderError>>>(
        &self,
        what: &str,
        call: impl Fn() -> F,
    ) -> Result<T, Violation> {
        for _ in 0..PATIENCE {
            match call().await {
                Err(error) if error.advice != Advice::Never => self.world.pause().await,
                result => return self.ok(what, result),
            }
        }
        Err(self.violated(format!("{what} never came to an end")))
    }

    /// The specifications of the small cluster.
    fn specs(&self, cluster: &ClusterName) -> Result<(Vec<DiskSpec>, Vec<MachineSpec>), Violation> {
        let machines = self.machines(cluster)?;
        let disks = machines
            .iter()
            .filter(|(_, role)| *role == Role::ControlPlane)
            .map(|(name, _)| DiskSpec {
                machine: name.clone(),
                size_gib: 1,
            })
            .collect();
        let wanted = machines
            .into_iter()
            .map(|(name, role)| MachineSpec {
                name,
                role,
                zone: None,
                size: None,
                image: None,
                first_boot: self.setup.first_boot.clone(),
                data_disk: role == Role::ControlPlane,
            })
            .collect();
        Ok((disks, wanted))
    }

    /// Ensures network, disks and machines of a small cluster, and returns the latter.
    async fn ensure(&self, cluster: &ClusterName, network: usize) -> Result<Vec<Machine>, Violation> {
        let provider = self.provider;
        let (disks, wanted) = self.specs(cluster)?;
        self.settle("ensuring the network", || {
            provider.ensure_network(cluster, &self.setup.networks[network])
        })
        .await?;
        self.settle("ensuring disks", || provider.ensure_disks(cluster, &disks))
            .await?;
        let made = self
            .settle("ensuring machines", || provider.ensure_machines(cluster, &wanted))
            .await?;
        self.check(made.len() == wanted.len(), || {
            format!("ensuring {} machines gave {made:?}", wanted.len())
        })?;
        Ok(made)
    }

    /// Ensures a small cluster, and waits until it runs. A machine that is seen as stopped is ensured again.
    async fn make(&self, cluster: &ClusterName, network: usize) -> Result<Observed, Violation> {
        self.ensure(cluster, network).await?;
        let machines = self.machines(cluster)?;
        let (disks, wanted) = self.specs(cluster)?;
        for _ in 0..PATIENCE {
            let observed = self.observe(cluster).await?;
            let same = observed
                .machines
                .iter()
                .map(|m| (&m.name, m.role))
                .eq(machines.iter().map(|(name, role)| (name, *role)))
                && observed
                    .disks
                    .iter()
                    .map(|d| &d.machine)
                    .eq(disks.iter().map(|d| &d.machine));
            let run = |m: &Machine| m.state == MachineState::Running && m.address.is_some();
            if same && observed.machines.iter().all(run) {
                return Ok(observed);
            }
            if observed.machines.iter().any(|m| m.state == MachineState::Stopped) {
                self.settle("ensuring machines again", || {
                    self.provider.ensure_machines(cluster, &wanted)
                })
                .await?;
            }
            self.world.pause().await;
        }
        Err(self.violated(format!(
            "the machines never came to run; last seen: {:?}",
            self.observe(cluster).await?
        )))
    }

    /// Removes everything of a cluster, in the order in which one thing needs the other.
    async fn remove(&self, cluster: &ClusterName) -> Outcome {
        let provider = self.provider;
        let observed = self.observe(cluster).await?;
        let mut names: Vec<MachineName> = self.machines(cluster)?.into_iter().map(|(name, _)| name).collect();
        names.extend(observed.machines.into_iter().map(|m| m.name));
        names.sort_unstable();
        names.dedup();
        self.settle("removing machines", || provider.remove_machines(cluster, &names))
            .await?;
        self.until("no machine is left", cluster, |o: &Observed| o.machines.is_empty())
            .await?;
        self.settle("removing disks", || provider.remove_disks(cluster, &names))
            .await?;
        self.settle("removing the network", || provider.remove_network(cluster))
            .await
    }

    async fn nothing_left(&self, cluster: &ClusterName) -> Outcome {
        let leftovers = self.ok("listing leftovers", self.provider.leftovers(cluster).await)?;
        self.check(leftovers.is_empty(), || format!("left over: {leftovers:?}"))
    }

    /// Runs the body of a rule, and removes both clusters whatever came of it.
    async fn cleanly(&self, body: impl Future<Output = Outcome>) -> Outcome {
        self.cleanly_with(body).await
    }

    /// The same, for a body that gives something.
    async fn cleanly_with<T>(&self, body: impl Future<Output = Result<T, Violation>>) -> Result<T, Violation> {
        let outcome = body.await;
        self.world.trouble(&Trouble::Over).await;
        let removed = self.remove(&self.setup.cluster).await;
        let removed_too = self.remove(&self.setup.neighbour).await;
        let outcome = outcome?;
        removed?;
        removed_too?;
        Ok(outcome)
    }
}
