//! Rules about what goes wrong on the way: they hold where a [`World`] can make the trouble, and are passed over elsewhere.

use kprov_types::machine::{Leftover, MachineState, Observed};

use super::{Outcome, Setup, Trial, Trouble, Violation, World};
use crate::Provider;

/// How often a machine that never runs is looked at.
const LOOKS: usize = 5;

pub(super) async fn all(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    lost_replies_make_nothing_twice(provider, world, setup).await?;
    late_listings_make_nothing_twice(provider, world, setup).await?;
    throttling_passes(provider, world, setup).await?;
    cut_listings_are_no_short_lists(provider, world, setup).await?;
    pending_machines_are_waited_for(provider, world, setup).await
}

/// Replies that are lost after the effect: trying again finds what was made, and makes no second one.
pub async fn lost_replies_make_nothing_twice(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    nothing_twice(
        "lost_replies_make_nothing_twice",
        &Trouble::LostReplies,
        provider,
        world,
        setup,
    )
    .await
}

/// Listings that lag behind: what they miss is not made again.
pub async fn late_listings_make_nothing_twice(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    nothing_twice(
        "late_listings_make_nothing_twice",
        &Trouble::LateListings,
        provider,
        world,
        setup,
    )
    .await
}

/// Being throttled is no failure: it passes, and everything is there and removed in the end.
pub async fn throttling_passes(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    nothing_twice("throttling_passes", &Trouble::Throttling, provider, world, setup).await
}

/// A listing that breaks off is an error, never a short list.
pub async fn cut_listings_are_no_short_lists(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "cut_listings_are_no_short_lists",
        provider,
        world,
        setup,
    };
    trial
        .cleanly(async {
            let whole = trial.make(&setup.cluster, 0).await?;
            if !world.trouble(&Trouble::CutListings).await {
                return Ok(());
            }
            let seen = provider.observe(&setup.cluster).await;
            world.trouble(&Trouble::Over).await;
            let short = |o: &Observed| {
                o.machines.len() < whole.machines.len() || o.disks.len() < whole.disks.len() || o.network.is_none()
            };
            trial.check(!seen.as_ref().is_ok_and(short), || format!("a short list: {seen:?}"))?;
            trial.same("the list after that", &trial.observe(&setup.cluster).await?, &whole)
        })
        .await
}

/// A machine that never comes to run is shown as pending; the others run, and no second one is made.
pub async fn pending_machines_are_waited_for(provider: &dyn Provider, world: &dyn World, setup: &Setup) -> Outcome {
    let trial = Trial {
        rule: "pending_machines_are_waited_for",
        provider,
        world,
        setup,
    };
    let (name, _) = trial.machines(&setup.cluster)?.remove(1);
    if !world.trouble(&Trouble::NeverRunning(name.clone())).await {
        return Ok(());
    }
    trial
        .cleanly(async {
            let made = trial.ensure(&setup.cluster, 0).await?;
            for _ in 0..LOOKS {
                let observed = trial.observe(&setup.cluster).await?;
                let state = observed.machines.iter().find(|m| m.name == name).map(|m| &m.state);
                trial.same("the machine", &state, &Some(&MachineState::Pending))?;
                trial.same("how many there are", &observed.machines.len(), &made.len())?;
                trial.ensure(&setup.cluster, 0).await?;
                world.pause().await;
            }
            world.trouble(&Trouble::Over).await;
            trial.make(&setup.cluster, 0).await.map(drop)
        })
        .await
}

/// Makes and removes a cluster without and with trouble: the same kinds of things are there, each as often.
async fn nothing_twice(
    rule: &'static str,
    trouble: &Trouble,
    provider: &dyn Provider,
    world: &dyn World,
    setup: &Setup,
) -> Outcome {
    let trial = Trial {
        rule,
        provider,
        world,
        setup,
    };
    let with = trial
        .cleanly_with(async {
            if !world.trouble(trouble).await {
                return Ok(None);
            }
            let made = trial.make(&setup.cluster, 0).await;
            world.trouble(&Trouble::Over).await;
            made?;
            let left = trial.ok("listing leftovers", provider.leftovers(&setup.cluster).await)?;
            // Removing is troubled too.
            world.trouble(trouble).await;
            let removed = trial.remove(&setup.cluster).await;
            world.trouble(&Trouble::Over).await;
            removed?;
            trial.nothing_left(&setup.cluster).await?;
            Ok(Some(kinds(left)))
        })
        .await?;
    let Some(with) = with else { return Ok(()) };
    let without = trial
        .cleanly_with(async {
            trial.make(&setup.cluster, 0).await?;
            let left = trial.ok("listing leftovers", provider.leftovers(&setup.cluster).await)?;
            Ok::<_, Violation>(kinds(left))
        })
        .await?;
    trial.same("what was made", &with, &without)
}

fn kinds(left: Vec<Leftover>) -> Vec<String> {
    let mut kinds: Vec<String> = left.into_iter().map(|l| l.kind).collect();
    kinds.sort_unstable();
    kinds
}
