//! How a cluster's network is laid out: ranges, subnets, rules, and whether all of it is there. Pure.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::Ipv4Net;
use kprov_types::ports;

use crate::config::Settings;
use crate::model::{NatState, Net, Part, Rule, Source, Subnet};

/// The smallest subnet that AWS makes ("Subnet CIDR blocks").
const SMALLEST: u8 = 28;

/// A subnet that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewSubnet {
    pub(crate) zone: String,
    pub(crate) range: Ipv4Net,
    pub(crate) part: Part,
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// The first of 10.32.0.0/16 to 10.63.0.0/16 that no VPC of the region has. VPCs may share ranges; those that do can't be
/// connected later.
pub(crate) fn choose_range(used: &[Ipv4Net]) -> Option<Ipv4Net> {
    (32..64)
        .filter_map(|b| Ipv4Net::new([10, b, 0, 0].into(), 16).ok())
        .find(|range| !used.iter().any(|u| overlap(*u, *range)))
}

/// A free range in a VPC: a /20 if there is one, else what there is down to a /24.
pub(crate) fn choose_inside(vpc: Ipv4Net, used: &[Ipv4Net]) -> Option<Ipv4Net> {
    (20..=24)
        .filter_map(|prefix| vpc.subnets(prefix.max(vpc.prefix_len())).ok())
        .flatten()
        .find(|range| !used.iter().any(|u| overlap(*u, *range)))
}

/// The subnets that are missing: one for machines in each zone, and in a private cluster one for its NAT gateway.
/// Where the range has no room for all zones, the first ones have to do.
pub(crate) fn missing_subnets(range: Ipv4Net, zones: &[String], private: bool, there: &[Subnet]) -> Vec<NewSubnet> {
    let wanted = zones.len() + usize::from(private);
    let bits = wanted.next_power_of_two().trailing_zeros();
    let prefix = u8::try_from(bits)
        .map_or(SMALLEST, |bits| range.prefix_len().saturating_add(bits))
        .clamp(range.prefix_len(), SMALLEST.max(range.prefix_len()));
    let mut free: Vec<Ipv4Net> = range
        .subnets(prefix)
        .into_iter()
        .flatten()
        .filter(|r| !there.iter().any(|s| overlap(s.cidr, *r)))
        .collect();
    let mut missing = Vec::new();
    if private
        && !there.iter().any(|s| s.part == Part::Nat)
        && let Some(zone) = zones.first()
        // The last one, and of it only what a gateway needs.
        && let Some(range) = free.pop()
    {
        let small = range
            .subnets(SMALLEST.max(range.prefix_len()))
            .ok()
            .and_then(|mut s| s.next());
        missing.push(NewSubnet {
            zone: zone.clone(),
            range: small.unwrap_or(range),
            part: Part::Nat,
        });
    }
    let without = zones
        .iter()
        .filter(|z| !there.iter().any(|s| s.part == Part::Machines && s.zone == **z));
    missing.extend(without.zip(free).map(|(zone, range)| NewSubnet {
        zone: zone.clone(),
        range,
        part: Part::Machines,
    }));
    missing
}

/// The rules that each group should have: the least that the cluster needs. `groups` are the groups' ids.
pub(crate) fn rules(
    settings: &Settings,
    groups: &BTreeMap<Part, String>,
    range: Ipv4Net,
    port: u16,
) -> BTreeMap<Part, BTreeSet<Rule>> {
    let from_outside = |tcp: u16| {
        settings.access.iter().map(move |net| Rule {
            tcp: Some(tcp),
            from: Source::Range(*net),
        })
    };
    let group = |part: Part, tcp: Option<u16>| {
        groups.get(&part).map(|id| Rule {
            tcp,
            from: Source::Group(id.clone()),
        })
    };
    let mut machines: BTreeSet<Rule> = from_outside(ports::NODE_SETUP).collect();
    machines.extend(group(Part::Machines, None));
    machines.extend(group(Part::Api, Some(ports::API)));
    let mut api: BTreeSet<Rule> = from_outside(port).collect();
    // Machines begin at the load balancer. An internal one sees their own addresses.
    api.insert(Rule {
        tcp: Some(port),
        from: Source::Range(range),
    });
    if api.iter().any(|r| r.from == Source::Range(Ipv4Net::default())) {
        api.retain(|r| r.from == Source::Range(Ipv4Net::default()));
    }
    [(Part::Machines, machines), (Part::Api, api)].into()
}

/// Whether everything is there and as it should be.
pub(crate) fn complete(net: &Net, settings: &Settings, port: u16) -> bool {
    let (Some(_), Some(range)) = (&net.vpc, net.range()) else {
        return false;
    };
    let ids: BTreeMap<Part, String> = net.groups.iter().map(|(p, g)| (*p, g.id.clone())).collect();
    let rules_right = rules(settings, &ids, range, port)
        .iter()
        .all(|(part, rules)| net.groups.get(part).is_some_and(|g| g.rules == *rules && !g.foreign));
    let subnets = net.machine_subnets();
    let zones_there = settings.zones.iter().all(|z| subnets.contains_key(z.as_str()));
    let routed = |part: Part, via: &dyn Fn(&str) -> bool| {
        net.tables.get(&part).is_some_and(|table| {
            table.default.as_deref().is_some_and(via)
                && net
                    .subnets
                    .iter()
                    .filter(|s| s.part == part)
                    .all(|s| table.subnets.contains(&s.id))
        })
    };
    let through_internet = |id: &str| id.starts_with("igw-");
    let routes_right = if settings.private {
        let working: BTreeSet<&str> = net
            .nats
            .iter()
            .filter(|n| n.state == NatState::Available)
            .map(|n| n.id.as_str())
            .collect();
        routed(Part::Machines, &|id| working.contains(id)) && routed(Part::Nat, &through_internet)
    } else {
        routed(Part::Machines, &through_internet)
    };
    let endpoint = net
        .balancer
        .as_ref()
        .is_some_and(|b| b.ours && b.failed.is_none() && b.listener == Some(port))
        && net.target_group.as_ref().is_some_and(|t| t.ours);
    rules_right && !subnets.is_empty() && zones_there && routes_right && endpoint && net.surplus.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AwsConfig;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn zones(n: usize) -> Vec<String> {
        ["a", "b", "c", "d", "e", "f"][..n]
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn ranges_are_free() {
        assert_eq!(choose_range(&[]), Some(net("10.32.0.0/16")));
        assert_eq!(choose_range(&[net("10.0.0.0/8")]), None);
        assert_eq!(
            choose_range(&[net("10.32.9.0/24"), net("172.31.0.0/16")]),
            Some(net("10.33.0.0/16"))
        );
        assert_eq!(
            choose_inside(net("172.31.0.0/16"), &[net("172.31.0.0/20"), net("172.31.32.0/20")]),
            Some(net("172.31.16.0/20"))
        );
        assert_eq!(choose_inside(net("10.0.0.0/24"), &[net("10.0.0.0/28")]), None);
    }

    #[test]
    fn a_subnet_for_each_zone() {
        let made = missing_subnets(net("10.32.0.0/16"), &zones(3), false, &[]);
        let shown: Vec<String> = made
            .iter()
            .map(|s| format!("{} {} {}", s.zone, s.range, s.part))
            .collect();
        assert_eq!(
            shown,
            [
                "a 10.32.0.0/18 machines",
                "b 10.32.64.0/18 machines",
                "c 10.32.128.0/18 machines"
            ]
        );
        let private = missing_subnets(net("10.32.0.0/24"), &zones(3), true, &[]);
        assert_eq!(private[0].range, net("10.32.0.192/28"));
        assert_eq!((private.len(), private[0].part), (4, Part::Nat));
        // What is there stays where it is.
        let there = Subnet {
            id: "subnet-1".into(),
            vpc: "vpc-1".into(),
            zone: "b".into(),
            cidr: net("10.32.0.0/18"),
            part: Part::Machines,
        };
        let rest = missing_subnets(net("10.32.0.0/16"), &zones(3), false, &[there]);
        assert_eq!(rest.iter().map(|s| s.zone.as_str()).collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!(rest[0].range, net("10.32.64.0/18"));
    }

    #[test]
    fn a_small_range_has_fewer_subnets() {
        let made = missing_subnets(net("10.32.0.0/27"), &zones(6), false, &[]);
        assert_eq!(
            made.iter().map(|s| s.range).collect::<Vec<_>>(),
            [net("10.32.0.0/28"), net("10.32.0.16/28")]
        );
    }

    #[test]
    fn rules_are_the_least() {
        let groups: BTreeMap<Part, String> = [(Part::Machines, "sg-m".into()), (Part::Api, "sg-a".into())].into();
        let mut config = AwsConfig::default();
        config.settings.access = vec![net("192.0.2.0/24")];
        let settings = config.validate().unwrap();
        let rules = rules(&settings, &groups, net("10.32.0.0/16"), 6443);
        let shown = |part: Part| -> Vec<String> {
            rules[&part]
                .iter()
                .map(|r| {
                    let from = match &r.from {
                        Source::Range(net) => net.to_string(),
                        Source::Group(id) => id.clone(),
                    };
                    format!("{} {from}", r.tcp.map_or("all".to_owned(), |p| p.to_string()))
                })
                .collect()
        };
        assert_eq!(shown(Part::Machines), ["all sg-m", "6443 sg-a", "10201 192.0.2.0/24"]);
        assert_eq!(shown(Part::Api), ["6443 10.32.0.0/16", "6443 192.0.2.0/24"]);
    }
}
