//! Security rules, load balancing rules and probes, told from the request alone.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::{Map, Value};

use super::network::{items, name_of};
use super::refusal::Refusal;
use super::store::text;

/// Security rules: priorities, ports, prefixes.
pub(super) fn prepare_security_group(body: &Map<String, Value>) -> Result<(), Refusal> {
    let mut seen: Vec<(i64, String, &str)> = Vec::new();
    for rule in items(body, "securityRules") {
        let name = name_of(rule);
        let properties = &rule["properties"];
        let priority = properties["priority"].as_i64().unwrap_or_default();
        if !(100..=4096).contains(&priority) {
            return Err(Refusal::new(
                400,
                "SecurityRuleInvalidPriority",
                format!("Security rule {name} has invalid priority {priority}. Priority must be between 100 and 4096."),
            ));
        }
        for (what, one, many) in [
            ("source port", "sourcePortRange", "sourcePortRanges"),
            ("destination port", "destinationPortRange", "destinationPortRanges"),
            ("source address", "sourceAddressPrefix", "sourceAddressPrefixes"),
            (
                "destination address",
                "destinationAddressPrefix",
                "destinationAddressPrefixes",
            ),
        ] {
            let many = properties.get(many).and_then(Value::as_array);
            let all: Vec<&str> = text(properties, &format!("/{one}"))
                .into_iter()
                .chain(many.into_iter().flatten().filter_map(Value::as_str))
                .collect();
            let good = !all.is_empty()
                && all
                    .iter()
                    .all(|v| if what.ends_with("port") { ports(v) } else { prefix(v) });
            if !good {
                let code = if what.ends_with("port") {
                    "SecurityRuleInvalidPortRange"
                } else {
                    "SecurityRuleInvalidAddressPrefix"
                };
                return Err(Refusal::new(
                    400,
                    code,
                    format!("Security rule {name} has an invalid {what}: '{}'.", all.join(",")),
                ));
            }
        }
        let direction = text(properties, "/direction").unwrap_or_default().to_ascii_lowercase();
        if let Some((.., other)) = seen.iter().find(|(p, d, _)| *p == priority && *d == direction) {
            return Err(Refusal::new(
                400,
                "SecurityRuleConflict",
                format!(
                    "Security rule {name} conflicts with rule {other}. Rules cannot have the same Priority and Direction."
                ),
            ));
        }
        seen.push((priority, direction, name));
    }
    Ok(())
}

fn ports(text: &str) -> bool {
    let port = |p: &str| p.parse::<u16>().ok();
    text == "*"
        || match text.split_once('-') {
            None => port(text).is_some(),
            Some((low, high)) => matches!((port(low), port(high)), (Some(l), Some(h)) if l <= h),
        }
}

fn prefix(text: &str) -> bool {
    const TAGS: [&str; 4] = ["*", "Internet", "VirtualNetwork", "AzureLoadBalancer"];
    TAGS.iter().any(|t| t.eq_ignore_ascii_case(text))
        || text.parse::<Ipv4Addr>().is_ok()
        || text.parse::<Ipv4Net>().is_ok_and(|n| n.trunc() == n)
}

/// A load balancer's probes and rules.
pub(super) fn check_rules(id: &str, body: &Map<String, Value>) -> Result<(), Refusal> {
    for probe in items(body, "probes") {
        let tcp = text(probe, "/properties/protocol").is_some_and(|p| p.eq_ignore_ascii_case("Tcp"));
        if tcp == text(probe, "/properties/requestPath").is_some() {
            return Err(Refusal::new(
                400,
                "InvalidProbeRequestPath",
                format!(
                    "Probe {id}/probes/{} has to have a request path with protocol Http or Https, and none with Tcp.",
                    name_of(probe)
                ),
            ));
        }
    }
    let mut seen: Vec<(String, String, i64, &str)> = Vec::new();
    for rule in items(body, "loadBalancingRules") {
        let name = name_of(rule);
        let at = |p: &str| text(rule, p).unwrap_or_default().to_ascii_lowercase();
        let port = rule["properties"]["frontendPort"].as_i64().unwrap_or_default();
        if rule["properties"].get("backendPort").is_none() {
            return Err(
                Refusal::new(400, "InvalidRequestFormat", "Cannot parse the request.").detail(
                    "MissingJsonProperty",
                    format!("Load balancing rule {id}/loadBalancingRules/{name} has no backendPort."),
                ),
            );
        }
        let key = (
            at("/properties/frontendIPConfiguration/id"),
            at("/properties/protocol"),
            port,
            name,
        );
        if let Some((.., other)) = seen.iter().find(|o| (&o.0, &o.1, o.2) == (&key.0, &key.1, key.2)) {
            return Err(Refusal::new(
                400,
                "RulesUseSameFrontendPortProtocolAndIPConfig",
                format!(
                    "Load balancing rules {other} and {name} with the same FrontendIPConfiguration use the same protocol and port {port}."
                ),
            ));
        }
        seen.push(key);
    }
    Ok(())
}
