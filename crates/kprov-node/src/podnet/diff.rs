//! What has to be done to get from the routes and the tunnel that are there to those that should be. Pure.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::desired::{Desired, Mac, Route, Tunnel};

/// Of kprov's own making, what is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Routes with kprov's protocol number; `None` for one that is none of ours in form, such as over another device.
    pub routes: BTreeMap<Ipv4Net, Option<Route>>,
    /// The tunnel device.
    pub tunnel: Option<ObservedTunnel>,
}

/// The tunnel device as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedTunnel {
    /// Whether it is a VXLAN device that is up, with kprov's network identifier and port, not learning, and exactly one
    /// address.
    pub sound: bool,
    /// The rest of it. Entries that are not permanent are left out.
    pub tunnel: Tunnel,
}

/// One change. Each is made in full or not at all, and can be made again without harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Remove the tunnel device; the kernel removes routes over it and its entries with it.
    RemoveTunnel,
    /// Make the tunnel device, with its address, and set it up. Its entries follow.
    CreateTunnel(Tunnel),
    /// Add or replace a neighbour inside the tunnel.
    SetNeighbour(Ipv4Addr, Mac),
    /// Remove a neighbour inside the tunnel.
    RemoveNeighbour(Ipv4Addr),
    /// Add or replace the machine behind a hardware address.
    SetForwarding(Mac, Ipv4Addr),
    /// Remove the machine behind a hardware address.
    RemoveForwarding(Mac, Ipv4Addr),
    /// Add a route. One that somebody else made for the same range is an error and stays.
    AddRoute(Ipv4Net, Route),
    /// Replace a route of kprov's.
    ReplaceRoute(Ipv4Net, Route),
    /// Remove a route of kprov's.
    RemoveRoute(Ipv4Net),
}

/// The changes that lead from `observed` to `desired`, in the order to make them; none where they agree.
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = Vec::new();
    // Where the device itself differs it is made anew; what the kernel removes with it counts as gone.
    let kept = match (&desired.tunnel, &observed.tunnel) {
        (Some(wanted), Some(there)) if there.sound && same_device(wanted, &there.tunnel) => Some(&there.tunnel),
        _ => None,
    };
    if kept.is_none() {
        if observed.tunnel.is_some() {
            actions.push(Action::RemoveTunnel);
        }
        if let Some(wanted) = &desired.tunnel {
            actions.push(Action::CreateTunnel(wanted.clone()));
        }
    }
    let there = |range: &Ipv4Net| match observed.routes.get(range) {
        Some(Some(Route::Tunnel(_))) if kept.is_none() => None,
        other => other,
    };

    if let Some(wanted) = &desired.tunnel {
        for (mac, machine) in &wanted.forwarding {
            let now = kept.and_then(|kept| kept.forwarding.get(mac));
            if now != Some(machine) {
                actions.extend(now.map(|old| Action::RemoveForwarding(*mac, *old)));
                actions.push(Action::SetForwarding(*mac, *machine));
            }
        }
        for (address, mac) in &wanted.neighbours {
            if kept.and_then(|kept| kept.neighbours.get(address)) != Some(mac) {
                actions.push(Action::SetNeighbour(*address, *mac));
            }
        }
    }
    for (range, route) in &desired.routes {
        match there(range) {
            None => actions.push(Action::AddRoute(*range, *route)),
            Some(now) if now.as_ref() != Some(route) => actions.push(Action::ReplaceRoute(*range, *route)),
            Some(_) => {}
        }
    }
    for range in observed.routes.keys() {
        if !desired.routes.contains_key(range) && there(range).is_some() {
            actions.push(Action::RemoveRoute(*range));
        }
    }
    if let (Some(wanted), Some(kept)) = (&desired.tunnel, kept) {
        let stale = kept
            .neighbours
            .keys()
            .filter(|address| !wanted.neighbours.contains_key(address));
        actions.extend(stale.map(|address| Action::RemoveNeighbour(*address)));
        let stale = kept
            .forwarding
            .iter()
            .filter(|(mac, _)| !wanted.forwarding.contains_key(mac));
        actions.extend(stale.map(|(mac, machine)| Action::RemoveForwarding(*mac, *machine)));
    }
    actions
}

/// Equal but for the entries.
fn same_device(a: &Tunnel, b: &Tunnel) -> bool {
    let Tunnel {
        local,
        mac,
        address,
        mtu,
        neighbours: _,
        forwarding: _,
    } = a;
    (local, mac, address, mtu) == (&b.local, &b.mac, &b.address, &b.mtu)
}
