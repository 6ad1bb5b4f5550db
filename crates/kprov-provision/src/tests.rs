//! The plan converges on a model provider, whatever fails on the way, and never touches what isn't asked for.

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use kprov_provider::{Provider, ProviderError};
use kprov_types::machine::{
    DataVolume, Disk, DiskSpec, Endpoint, FirstBoot, Leftover, Machine, MachineSpec, MachineState, Network,
    NetworkSpec, Observed,
};
use kprov_types::{ClusterName, MachineName, Role};
use proptest::prelude::*;

use super::{Action, DriveError, Goal, Pace, PlanError, Progress, Waiting, Wanted, drive, plan};

/// A provider in memory. Machines take one look to run. `faults` says of each changing call in turn what goes wrong.
struct Model {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    observed: Observed,
    faults: Vec<Fault>,
    calls: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// Refused before anything happened.
    Throttled,
    /// It took effect, but the reply was lost.
    LostReply,
}

impl Model {
    fn new(faults: Vec<Fault>) -> Self {
        Self {
            state: Mutex::new(State {
                faults,
                ..State::default()
            }),
        }
    }

    fn change(&self, call: &'static str, effect: impl FnOnce(&mut Observed)) -> Result<(), ProviderError> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(call);
        let fault = state.faults.pop().unwrap_or(Fault::None);
        if matches!(fault, Fault::Throttled) {
            return Err(ProviderError::retry_after("throttled", Duration::from_secs(1)));
        }
        effect(&mut state.observed);
        match fault {
            Fault::LostReply => Err(ProviderError::look_first("no reply")),
            Fault::None | Fault::Throttled => Ok(()),
        }
    }
}

#[async_trait]
impl Provider for Model {
    fn name(&self) -> &'static str {
        "model"
    }
    async fn clusters(&self) -> Result<Vec<ClusterName>, ProviderError> {
        Ok(Vec::new())
    }
    async fn observe(&self, _: &ClusterName) -> Result<Observed, ProviderError> {
        let mut state = self.state.lock().unwrap();
        let seen = state.observed.clone();
        state.observed.machines.retain(|m| m.state != MachineState::Terminating);
        for machine in &mut state.observed.machines {
            machine.state = MachineState::Running;
            machine.address = Some([10, 0, 0, 9].into());
        }
        Ok(seen)
    }
    async fn ensure_network(&self, _: &ClusterName, want: &NetworkSpec) -> Result<Network, ProviderError> {
        let network = Network {
            cidr: want.cidr.unwrap_or("10.0.0.0/24".parse().unwrap()),
            endpoint: Endpoint {
                host: "10.0.0.1".into(),
                port: want.api_port,
            },
            host_address: None,
            complete: true,
        };
        self.change("network", |o| o.network = Some(network.clone()))?;
        Ok(network)
    }
    async fn remove_network(&self, _: &ClusterName) -> Result<(), ProviderError> {
        self.change("-network", |o| {
            assert!(
                o.machines.is_empty() && o.disks.is_empty(),
                "the network went before what is in it"
            );
            o.network = None;
        })
    }
    async fn ensure_disks(&self, _: &ClusterName, want: &[DiskSpec]) -> Result<Vec<Disk>, ProviderError> {
        self.change("disks", |o| {
            for DiskSpec { machine, .. } in want {
                assert!(
                    !o.disks.iter().any(|d| d.machine == *machine),
                    "a second disk for `{machine}`"
                );
                o.disks.push(Disk {
                    machine: machine.clone(),
                    id: "d".into(),
                    size_gib: None,
                    volume: DataVolume::Directory("/data".into()),
                });
            }
        })?;
        Ok(Vec::new())
    }
    async fn remove_disks(&self, _: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        self.change("-disks", |o| {
            assert!(o.machines.is_empty(), "a disk went before its machine");
            o.disks.retain(|d| !machines.contains(&d.machine));
        })
    }
    async fn ensure_machines(&self, _: &ClusterName, want: &[MachineSpec]) -> Result<Vec<Machine>, ProviderError> {
        self.change("machines", |o| {
            assert!(o.network.is_some(), "a machine came before its network");
            for spec in want {
                assert!(
                    !o.machines.iter().any(|m| m.name == spec.name),
                    "a second machine `{}`",
                    spec.name
                );
                assert!(
                    !spec.data_disk || o.disks.iter().any(|d| d.machine == spec.name),
                    "a machine came before its disk"
                );
                o.machines.push(Machine {
                    name: spec.name.clone(),
                    role: spec.role,
                    id: "m".into(),
                    address: None,
                    external_address: None,
                    zone: None,
                    state: MachineState::Pending,
                });
            }
        })?;
        Ok(Vec::new())
    }
    async fn remove_machines(&self, _: &ClusterName, machines: &[MachineName]) -> Result<(), ProviderError> {
        self.change("-machines", |o| {
            for machine in o.machines.iter_mut().filter(|m| machines.contains(&m.name)) {
                machine.state = MachineState::Terminating;
            }
        })
    }
    async fn leftovers(&self, _: &ClusterName) -> Result<Vec<Leftover>, ProviderError> {
        Ok(Vec::new())
    }
    async fn console(&self, _: &ClusterName, _: &MachineName) -> Result<Option<String>, ProviderError> {
        Ok(None)
    }
}

/// Time passes only by sleeping.
#[derive(Default)]
struct Still(Mutex<Duration>);

impl Pace for Still {
    fn elapsed(&self) -> Duration {
        *self.0.lock().unwrap()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'_, ()> {
        *self.0.lock().unwrap() += duration;
        futures::future::ready(()).boxed()
    }
}

impl Progress for Still {
    fn action(&self, _: &Action) {}
    fn waiting(&self, _: &[Waiting]) {}
    fn retrying(&self, _: &ProviderError, _: Duration) {}
}

fn machine(name: &str) -> MachineName {
    MachineName::new(name).unwrap()
}

fn wanted(control_plane: usize, workers: usize) -> Wanted {
    let spec = |name: String, role| MachineSpec {
        name: machine(&name),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot(String::new()),
        data_disk: role == Role::ControlPlane,
    };
    let mut machines: Vec<_> = (0..control_plane)
        .map(|i| spec(format!("cp-{i}"), Role::ControlPlane))
        .collect();
    let disks = machines
        .iter()
        .map(|m| DiskSpec {
            machine: m.name.clone(),
            size_gib: 8,
        })
        .collect();
    machines.extend((0..workers).map(|i| spec(format!("w-{i}"), Role::Worker)));
    Wanted {
        network: NetworkSpec {
            cidr: None,
            api_port: 6443,
        },
        disks,
        machines,
    }
}

fn go(model: &Model, goal: &Goal) -> Result<Observed, DriveError> {
    let cluster = ClusterName::new("c").unwrap();
    let pace = Still::default();
    drive(model, &cluster, goal, Duration::from_mins(10), &pace, &pace)
        .now_or_never()
        .expect("nothing in the model ever waits")
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let fault = prop_oneof![Just(Fault::None), Just(Fault::Throttled), Just(Fault::LostReply)];
    proptest::collection::vec(fault, 0..7)
}

proptest! {
    #[test]
    fn converges_up_and_down(control_plane in 1_usize..4, workers in 0_usize..4, up in faults(), down in faults()) {
        let model = Model::new(up);
        let goal = Goal::Present(wanted(control_plane, workers));
        let observed = go(&model, &goal).unwrap();
        prop_assert_eq!(observed.machines.len(), control_plane + workers);
        prop_assert!(plan(&goal, &observed).unwrap().is_done());
        let calls = model.state.lock().unwrap().calls.len();
        go(&model, &goal).unwrap();
        prop_assert_eq!(model.state.lock().unwrap().calls.len(), calls, "a second run called something");

        model.state.lock().unwrap().faults = down;
        let observed = go(&model, &Goal::Nothing).unwrap();
        prop_assert_eq!(observed, Observed::default());
    }

    #[test]
    fn growing_adds_only_what_is_missing(first in 1_usize..3, more in 0_usize..4) {
        let model = Model::new(Vec::new());
        go(&model, &Goal::Present(wanted(first, 0))).unwrap();
        // The model refuses a second machine of one name.
        let observed = go(&model, &Goal::Present(wanted(first, more))).unwrap();
        prop_assert_eq!(observed.machines.len(), first + more);
        let fewer = plan(&Goal::Present(wanted(first, 0)), &observed).unwrap();
        prop_assert_eq!(fewer.surplus.len(), more);
        prop_assert!(fewer.actions.is_empty(), "surplus machines are left alone");
    }
}

#[test]
fn gives_up_after_some_tries() {
    let model = Model::new(vec![Fault::Throttled; 50]);
    let error = go(&model, &Goal::Present(wanted(1, 0))).unwrap_err();
    assert!(matches!(error, DriveError::Provider(_)), "{error}");
    assert_eq!(model.state.lock().unwrap().calls.len(), 8);
}

#[test]
fn a_failed_machine_and_another_range_are_errors() {
    let model = Model::new(Vec::new());
    let mut observed = go(&model, &Goal::Present(wanted(1, 0))).unwrap();
    let mut other = wanted(1, 0);
    other.network.cidr = Some("10.9.0.0/24".parse().unwrap());
    assert!(matches!(
        plan(&Goal::Present(other), &observed),
        Err(PlanError::OtherNetwork { .. })
    ));
    observed.machines[0].state = MachineState::Failed("no such image".into());
    let error = plan(&Goal::Present(wanted(1, 0)), &observed).unwrap_err();
    assert_eq!(error.to_string(), "machine `cp-0` has failed: no such image");
}
