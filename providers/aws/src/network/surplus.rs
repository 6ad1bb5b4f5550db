//! What there is too much of, and how it goes.
//!
//! A VPC, an internet gateway and a public address have neither a client token nor a name that AWS gives once: a lost reply, or
//! another `up` of the same cluster at the same time, leads to a second one. Which of them stays follows from what is listed
//! alone, so that everybody who looks keeps the same, and the others go.

use std::collections::BTreeMap;

use kprov_provider::ProviderError;
use kprov_types::ClusterName;

use super::remove::{delete_gateway, delete_groups, delete_nats, done};
use crate::Shared;
use crate::model::{Address, Gateway, Group, Nat, NatState, Net, Part, Subnet, Surplus, Table, Vpc};

/// All that was listed of a cluster's network.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// The region's.
    pub(super) vpcs: Vec<Vpc>,
    pub(super) groups: Vec<Group>,
    pub(super) subnets: Vec<Subnet>,
    pub(super) tables: Vec<Table>,
    pub(super) gateways: Vec<Gateway>,
    pub(super) nats: Vec<Nat>,
    pub(super) addresses: Vec<Address>,
}

impl Listed {
    /// Tells what stays from what goes. `given` is the VPC that the cluster is to be in, where it isn't one of its own; `endpoint`
    /// is the one that its load balancer's targets are in. Pure.
    pub(super) fn sort_out(self, given: Option<&str>, endpoint: Option<&str>) -> Net {
        let (vpc, vpcs) = self.choose_vpc(given, endpoint);
        let goes = |id: &str| vpcs.iter().any(|v| v == id);
        let (groups_gone, groups): (Vec<_>, Vec<_>) = self.groups.into_iter().partition(|g| goes(&g.vpc));
        let (subnets_gone, subnets) = self.subnets.into_iter().partition(|s| goes(&s.vpc));
        let (tables_gone, tables): (Vec<_>, Vec<_>) = self.tables.into_iter().partition(|t| goes(&t.vpc));
        let tables = tables.into_iter().map(|t| (t.part, t)).collect();
        let (gateways_gone, gateways) = surplus_gateways(self.gateways, vpc.as_ref(), goes);
        let (mut nats_gone, nats): (Vec<_>, Vec<_>) = self.nats.into_iter().partition(|n| goes(&n.vpc));
        let (kept, not_needed) = choose_nat(nats, &tables);
        nats_gone.extend(not_needed);
        // One that is being made has its address already, or is about to ask for it.
        let works =
            kept.iter().any(|n| n.state == NatState::Available) && !kept.iter().any(|n| n.state == NatState::Pending);
        let (addresses_gone, addresses) = self.addresses.into_iter().partition(|a| works && !a.in_use);
        Net {
            vpc,
            groups: groups.into_iter().map(|g| (g.part, g)).collect(),
            subnets,
            tables,
            gateways,
            given_gateway: None,
            nats: kept,
            addresses,
            balancer: None,
            target_group: None,
            surplus: Surplus {
                vpcs,
                groups: groups_gone,
                subnets: subnets_gone,
                tables: tables_gone,
                gateways: gateways_gone,
                nats: nats_gone,
                addresses: addresses_gone,
            },
        }
    }

    /// The one that is given; else of those with the cluster's tag the one with its endpoint, or that has things in it, or else
    /// the first.
    fn choose_vpc(&self, given: Option<&str>, endpoint: Option<&str>) -> (Option<Vpc>, Vec<String>) {
        if let Some(given) = given {
            return (self.vpcs.iter().find(|v| v.id == given).cloned(), Vec::new());
        }
        let in_use = |id: &str| {
            self.subnets.iter().any(|s| s.vpc == id)
                || self.groups.iter().any(|g| g.vpc == id)
                || self.gateways.iter().any(|g| g.vpc.as_deref() == Some(id))
        };
        let mut ours: Vec<&Vpc> = self.vpcs.iter().filter(|v| v.ours).collect();
        ours.sort_by_key(|v| (endpoint != Some(v.id.as_str()), !in_use(&v.id), &v.id));
        let mut ours = ours.into_iter();
        (ours.next().cloned(), ours.map(|v| v.id.clone()).collect())
    }
}

/// A VPC has one internet gateway. Where one is attached none other is needed, else the first.
fn surplus_gateways(
    gateways: Vec<Gateway>,
    vpc: Option<&Vpc>,
    goes: impl Fn(&str) -> bool,
) -> (Vec<Gateway>, Vec<Gateway>) {
    let attached = gateways
        .iter()
        .any(|g| vpc.is_some_and(|v| Some(&v.id) == g.vpc.as_ref()));
    let free = gateways
        .iter()
        .filter(|g| g.vpc.is_none())
        .map(|g| &g.id)
        .min()
        .cloned();
    let needed = free.filter(|_| !attached);
    gateways.into_iter().partition(|g| match &g.vpc {
        Some(attached) => goes(attached),
        None => Some(&g.id) != needed.as_ref(),
    })
}

/// The NAT gateway that machines' traffic goes through already stays, or else the first that works, once all are made. One that
/// has failed goes by itself.
fn choose_nat(nats: Vec<Nat>, tables: &BTreeMap<Part, Table>) -> (Vec<Nat>, Vec<Nat>) {
    let routed = tables.get(&Part::Machines).and_then(|t| t.default.as_deref());
    let works = || nats.iter().filter(|n| n.state == NatState::Available).map(|n| &n.id);
    let pending = nats.iter().any(|n| n.state == NatState::Pending);
    let chosen = works()
        .find(|id| Some(id.as_str()) == routed)
        .or_else(|| works().min().filter(|_| !pending))
        .cloned();
    match chosen {
        None => (nats, Vec::new()),
        Some(chosen) => nats
            .into_iter()
            .partition(|n| n.id == chosen || n.state == NatState::Failed),
    }
}

/// Removes it. Gone already is as good: whoever looks does this.
pub(super) async fn drop_it(shared: &Shared, cluster: &ClusterName, surplus: &Surplus) -> Result<(), ProviderError> {
    let client = &shared.client;
    for (_, id) in surplus.things() {
        shared.ledger.removed(cluster, id);
    }
    delete_nats(shared, &surplus.nats).await?;
    for address in &surplus.addresses {
        done(client.release_address(&address.id).await)?;
    }
    delete_groups(shared, &surplus.groups).await?;
    for subnet in &surplus.subnets {
        done(client.delete_subnet(&subnet.id).await)?;
    }
    for table in &surplus.tables {
        done(client.delete_table(&table.id).await)?;
    }
    for gateway in &surplus.gateways {
        delete_gateway(shared, gateway).await?;
    }
    for vpc in &surplus.vpcs {
        done(client.delete_vpc(vpc).await)?;
    }
    Ok(())
}

impl Surplus {
    /// The kind and id of each.
    pub(crate) fn things(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let vpcs = self.vpcs.iter().map(|id| ("vpc", id.as_str()));
        vpcs.chain(self.groups.iter().map(|g| ("security-group", g.id.as_str())))
            .chain(self.subnets.iter().map(|s| ("subnet", s.id.as_str())))
            .chain(self.tables.iter().map(|t| ("route-table", t.id.as_str())))
            .chain(self.gateways.iter().map(|g| ("internet-gateway", g.id.as_str())))
            .chain(self.nats.iter().map(|n| ("natgateway", n.id.as_str())))
            .chain(self.addresses.iter().map(|a| ("elastic-ip", a.id.as_str())))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.things().next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vpc(id: &str, ours: bool) -> Vpc {
        Vpc {
            id: id.into(),
            cidr: "10.32.0.0/16".parse().unwrap(),
            ours,
        }
    }

    fn subnet(vpc: &str) -> Subnet {
        Subnet {
            id: format!("subnet-of-{vpc}"),
            vpc: vpc.into(),
            zone: "a".into(),
            cidr: "10.32.0.0/18".parse().unwrap(),
            part: Part::Machines,
        }
    }

    fn gateway(id: &str, vpc: Option<&str>) -> Gateway {
        Gateway {
            id: id.into(),
            vpc: vpc.map(Into::into),
        }
    }

    fn nat(id: &str, state: NatState) -> Nat {
        Nat {
            id: id.into(),
            vpc: "vpc-1".into(),
            state,
        }
    }

    fn gone(net: &Net) -> Vec<&str> {
        net.surplus.things().map(|(_, id)| id).collect()
    }

    fn three_vpcs() -> Listed {
        Listed {
            vpcs: vec![vpc("vpc-1", true), vpc("vpc-2", true), vpc("vpc-0", false)],
            ..Listed::default()
        }
    }

    #[test]
    fn of_several_vpcs_one_stays() {
        let chosen = |listed: Listed, given, endpoint| {
            let net = listed.sort_out(given, endpoint);
            let gone = gone(&net).into_iter().map(ToOwned::to_owned).collect::<Vec<_>>();
            (net.vpc.map(|v| v.id), gone)
        };
        let of = |id: &str, gone: &[&str]| {
            (
                Some(id.to_owned()),
                gone.iter().map(ToString::to_string).collect::<Vec<_>>(),
            )
        };
        assert_eq!(chosen(Listed::default(), None, None), (None, Vec::new()));
        assert_eq!(chosen(three_vpcs(), None, None), of("vpc-1", &["vpc-2"]));
        assert_eq!(chosen(three_vpcs(), Some("vpc-0"), None), of("vpc-0", &[]));
        // One with something in it, and above all the one with the endpoint.
        let used = |by: Listed| Listed {
            vpcs: three_vpcs().vpcs,
            ..by
        };
        let subnets = used(Listed {
            subnets: vec![subnet("vpc-2")],
            ..Listed::default()
        });
        assert_eq!(chosen(subnets, None, None), of("vpc-2", &["vpc-1"]));
        let attached = || {
            used(Listed {
                gateways: vec![gateway("igw-1", Some("vpc-2"))],
                ..Listed::default()
            })
        };
        assert_eq!(chosen(attached(), None, None), of("vpc-2", &["vpc-1"]));
        assert_eq!(
            chosen(attached(), None, Some("vpc-1")),
            of("vpc-1", &["vpc-2", "igw-1"])
        );
    }

    #[test]
    fn what_is_in_a_surplus_vpc_goes_with_it() {
        let listed = Listed {
            subnets: vec![subnet("vpc-1"), subnet("vpc-2"), subnet("vpc-0")],
            ..three_vpcs()
        };
        let net = listed.sort_out(None, None);
        assert_eq!(gone(&net), ["vpc-2", "subnet-of-vpc-2"]);
        // Where the VPC isn't listed nothing is known.
        let listed = Listed {
            subnets: vec![subnet("vpc-1")],
            gateways: vec![gateway("igw-1", Some("vpc-1"))],
            ..Listed::default()
        };
        assert_eq!(gone(&listed.sort_out(None, None)), [""; 0]);
    }

    #[test]
    fn one_internet_gateway_stays() {
        let of = |gateways: &[Gateway]| {
            let listed = Listed {
                vpcs: vec![vpc("vpc-1", true)],
                gateways: gateways.to_vec(),
                ..Listed::default()
            };
            let net = listed.sort_out(None, None);
            gone(&net).into_iter().map(ToOwned::to_owned).collect::<Vec<_>>()
        };
        let (free, other, attached) = (
            gateway("igw-2", None),
            gateway("igw-1", None),
            gateway("igw-3", Some("vpc-1")),
        );
        assert_eq!(of(std::slice::from_ref(&free)), [""; 0]);
        assert_eq!(of(&[free.clone(), other.clone()]), ["igw-2"]);
        assert_eq!(of(&[free, attached.clone(), other]), ["igw-2", "igw-1"]);
        // Somebody has put it to another use: that is nobody's surplus.
        assert_eq!(of(&[attached, gateway("igw-4", Some("vpc-9"))]), [""; 0]);
    }

    #[test]
    fn one_nat_gateway_stays_once_all_are_made() {
        use NatState::{Available, Deleting, Failed, Pending};
        let of = |nats: &[Nat], routed: Option<&str>| {
            let table = Table {
                id: "rtb-1".into(),
                vpc: "vpc-1".into(),
                part: Part::Machines,
                default: routed.map(Into::into),
                subnets: std::collections::BTreeSet::new(),
            };
            let address = |id: &str, in_use| Address { id: id.into(), in_use };
            let listed = Listed {
                vpcs: vec![vpc("vpc-1", true)],
                tables: vec![table],
                nats: nats.to_vec(),
                addresses: vec![address("eipalloc-1", true), address("eipalloc-2", false)],
                ..Listed::default()
            };
            let net = listed.sort_out(None, None);
            gone(&net).into_iter().map(ToOwned::to_owned).collect::<Vec<_>>()
        };
        let (one, two) = (nat("nat-1", Available), nat("nat-2", Available));
        assert_eq!(of(&[nat("nat-1", Pending), two.clone()], None), [""; 0]);
        assert_eq!(of(&[nat("nat-1", Failed)], None), [""; 0]);
        assert_eq!(of(&[two.clone(), one.clone()], None), ["nat-2", "eipalloc-2"]);
        assert_eq!(of(&[two.clone(), one], Some("nat-2")), ["nat-1", "eipalloc-2"]);
        assert_eq!(
            of(&[nat("nat-1", Deleting), two, nat("nat-3", Failed)], None),
            ["nat-1", "eipalloc-2"]
        );
    }
}
