//! Which address ranges and ports are free. Pure: what is used comes in as data.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::link::{Link, Route};

/// The state of a listening socket in `/proc/net/tcp` (`TCP_LISTEN`).
const LISTEN: &str = "0A";

/// A range that is used, and what uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) range: Ipv4Net,
    pub(crate) by: String,
}

/// The ranges this host's interfaces and routes use, but for those of `own`, the interface the range is for.
pub(crate) fn used_by_host(links: &[Link], routes: &[Route], own: &str) -> Vec<Used> {
    let addresses = links.iter().filter(|l| l.name != own).flat_map(|link| {
        link.addresses().map(|a| Used {
            range: a.trunc(),
            by: format!("the interface `{}` ({a})", link.name),
        })
    });
    let routes = routes
        .iter()
        .filter(|r| r.dev.as_deref() != Some(own))
        .filter_map(|route| {
            let through = route
                .dev
                .as_ref()
                .map(|dev| format!(" through `{dev}`"))
                .unwrap_or_default();
            Some(Used {
                range: route.range()?,
                by: format!("the route `{}`{through}", route.dst),
            })
        });
    addresses.chain(routes).collect()
}

/// What uses the range or a part of it.
pub(crate) fn conflict(range: Ipv4Net, used: &[Used]) -> Option<&Used> {
    used.iter()
        .find(|u| u.range.contains(&range.network()) || range.contains(&u.range.network()))
}

/// The first /24 that nothing uses, of 10.89.0.0/16 and then of 172.30.0.0/16.
pub(crate) fn choose(used: &[Used]) -> Option<Ipv4Net> {
    [[10, 89], [172, 30]]
        .into_iter()
        .flat_map(|[a, b]| (0..=255).filter_map(move |c| Ipv4Net::new([a, b, c, 0].into(), 24).ok()))
        .find(|range| conflict(*range, used).is_none())
}

/// Who listens such that `address:port` cannot be bound, from the text of `/proc/net/tcp` or `/proc/net/tcp6`
/// (`proc_net(5)`): a socket on that very address, or one on all addresses.
pub(crate) fn listener(table: &str, address: Ipv4Addr, port: u16) -> Option<String> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1)?;
        if fields.nth(1)? != LISTEN {
            return None;
        }
        let (host, its_port) = local.split_once(':')?;
        if u16::from_str_radix(its_port, 16).ok()? != port {
            return None;
        }
        if host.bytes().all(|b| b == b'0') {
            let all = if host.len() == 8 { "0.0.0.0" } else { "[::]" };
            return Some(format!("{all}:{port}"));
        }
        // An IPv4 address stands at the end, in the byte order of a little-endian machine.
        let mapped = host.len() == 8 || host.starts_with("0000000000000000FFFF0000");
        let word = u32::from_str_radix(host.get(host.len().checked_sub(8)?..)?, 16).ok()?;
        let its_address = Ipv4Addr::from(if cfg!(target_endian = "little") {
            word.swap_bytes()
        } else {
            word
        });
        (mapped && its_address == address).then(|| format!("{address}:{port}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn used(text: &str) -> Used {
        Used {
            range: net(text),
            by: text.into(),
        }
    }

    #[test]
    fn chooses_the_first_free_range() {
        assert_eq!(choose(&[]), Some(net("10.89.0.0/24")));
        assert_eq!(
            choose(&[used("10.89.0.128/25"), used("10.89.1.7/32")]),
            Some(net("10.89.2.0/24"))
        );
        assert_eq!(choose(&[used("10.0.0.0/8")]), Some(net("172.30.0.0/24")));
        assert_eq!(choose(&[used("10.0.0.0/8"), used("172.16.0.0/12")]), None);
    }

    #[test]
    fn a_range_conflicts_with_what_is_in_it_and_around_it() {
        for (taken, hit) in [("10.89.0.4/32", true), ("10.0.0.0/8", true), ("10.89.1.0/24", false)] {
            assert_eq!(conflict(net("10.89.0.0/24"), &[used(taken)]).is_some(), hit, "{taken}");
        }
    }

    #[test]
    fn own_interface_is_no_conflict() {
        let links: Vec<Link> = serde_json::from_str(
            r#"[{"ifname":"eth0","addr_info":[{"local":"192.0.2.2","prefixlen":24}]},
                {"ifname":"kp-1","addr_info":[{"local":"10.89.0.1","prefixlen":24}]}]"#,
        )
        .unwrap();
        let routes: Vec<Route> = serde_json::from_str(
            r#"[{"dst":"default","gateway":"192.0.2.1","dev":"eth0"},{"dst":"10.89.0.0/24","dev":"kp-1"},
                {"dst":"10.50.0.0/16","dev":"vpn0"}]"#,
        )
        .unwrap();
        let by: Vec<_> = used_by_host(&links, &routes, "kp-1")
            .into_iter()
            .map(|u| u.by)
            .collect();
        assert_eq!(
            by,
            [
                "the interface `eth0` (192.0.2.2/24)",
                "the route `10.50.0.0/16` through `vpn0`"
            ]
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn finds_who_listens() {
        let address = Ipv4Addr::new(10, 89, 0, 1);
        let table = |local: &str, state: &str| format!("sl local rem st\n 0: {local} 00000000:0000 {state} 0\n");
        let cases = [
            ("0100590A:192B", "0A", Some("10.89.0.1:6443")),
            ("00000000:192B", "0A", Some("0.0.0.0:6443")),
            ("00000000000000000000000000000000:192B", "0A", Some("[::]:6443")),
            ("0000000000000000FFFF00000100590A:192B", "0A", Some("10.89.0.1:6443")),
            ("0200590A:192B", "0A", None),
            ("00000000000000000000000001000000:192B", "0A", None),
            ("0100590A:192C", "0A", None),
            ("0100590A:192B", "01", None),
        ];
        for (local, state, expected) in cases {
            assert_eq!(
                listener(&table(local, state), address, 6443).as_deref(),
                expected,
                "{local} {state}"
            );
        }
    }
}
