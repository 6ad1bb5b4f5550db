use kprov_types::Role;
use kprov_types::machine::FirstBoot;

use super::*;
use crate::model::Subnet;

fn net(zones: &[&str]) -> Net {
    let subnet = |(i, zone): (usize, &&str)| Subnet {
        id: format!("subnet-{i}"),
        vpc: "vpc-1".into(),
        zone: (*zone).into(),
        cidr: "10.32.0.0/18".parse().unwrap(),
        part: Part::Machines,
    };
    Net {
        subnets: zones.iter().enumerate().map(subnet).collect(),
        ..Net::default()
    }
}

fn spec(name: &str, role: Role, first_boot: &str) -> MachineSpec {
    MachineSpec {
        name: MachineName::new(name).unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot(first_boot.into()),
        data_disk: role == Role::ControlPlane,
    }
}

fn volume(machine: &str, zone: &str, used: bool) -> Volume {
    Volume {
        id: format!("vol-{machine}"),
        machine: MachineName::new(machine).unwrap(),
        size: Some(8),
        zone: zone.into(),
        attachment: None,
        used,
        address: None,
    }
}

fn shown(launches: &[Launch]) -> Vec<String> {
    launches
        .iter()
        .map(|l| format!("{} {}", l.series, l.zones.join(",")))
        .collect()
}

fn planned(net: &Net, volumes: &[Volume], specs: &[MachineSpec]) -> Vec<String> {
    let missing: Vec<&MachineSpec> = specs.iter().collect();
    shown(&plan(net, volumes, &[], &missing).unwrap())
}

#[test]
fn workers_are_made_together_and_control_planes_follow_their_volumes() {
    let mut specs = vec![
        spec("d-cp-0", Role::ControlPlane, "0"),
        spec("d-cp-1", Role::ControlPlane, "1"),
    ];
    specs.extend((0..7).map(|i| spec(&format!("d-worker-{i}"), Role::Worker, "same")));
    let volumes = [volume("d-cp-0", "b", true), volume("d-cp-1", "a", false)];
    assert_eq!(
        planned(&net(&["a", "b", "c"]), &volumes, &specs),
        [
            "d-cp-0 b",
            "d-cp-1 a,b,c",
            "d-worker-0..6..3 a,b,c",
            "d-worker-1..4..3 b,a,c",
            "d-worker-2..5..3 c,a,b",
        ]
    );
}

#[test]
fn a_thousand_machines_are_ten_calls_and_a_few() {
    let specs: Vec<MachineSpec> = (0..1000)
        .map(|i| spec(&format!("d-worker-{i}"), Role::Worker, "same"))
        .collect();
    assert_eq!(planned(&net(&["a", "b", "c"]), &[], &specs).len(), 12);
    assert_eq!(planned(&net(&["a"]), &[], &specs).len(), 10);
}

#[test]
fn machines_told_different_things_are_made_apart() {
    let specs = [
        spec("d-worker-0", Role::Worker, "x"),
        spec("d-worker-1", Role::Worker, "y"),
    ];
    assert_eq!(planned(&net(&["a"]), &[], &specs), ["d-worker-0 a", "d-worker-1 a"]);
}

#[test]
fn a_zone_that_was_asked_for_is_the_only_one() {
    let mut one = spec("d-worker-0", Role::Worker, "x");
    one.zone = Some("b".into());
    assert_eq!(
        planned(&net(&["a", "b"]), &[], std::slice::from_ref(&one)),
        ["d-worker-0 b"]
    );
    one.zone = Some("q".into());
    let error = plan(&net(&["a", "b"]), &[], &[], &[&one]).unwrap_err();
    assert!(error.message.contains("`q`"), "{error}");
}
