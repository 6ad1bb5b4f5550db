//! Where Service `kubernetes` leads: the fronts of the control-plane machines.
//!
//! API servers don't keep the addresses themselves (`--endpoint-reconciler-type=none`): one that stops would take its machine's
//! address away, though the front there goes on serving. `kprov up` makes the objects; from then on kprov's operator keeps
//! them.

use std::net::IpAddr;

use kprov_types::ports;
use serde_json::{Value, json};

use super::{Context, Manifest, create, enforce};
use crate::versions::Features;

/// The name of the API's Service, Endpoints and EndpointSlice.
pub const API_SERVICE: &str = "kubernetes";
/// Their namespace.
pub const API_SERVICE_NAMESPACE: &str = "default";

/// The Endpoints of Service `kubernetes`: as API servers would write them, and so not mirrored into a second EndpointSlice.
pub fn api_endpoints(addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "name": API_SERVICE, "namespace": API_SERVICE_NAMESPACE,
            "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" } },
        "subsets": [{ "addresses": addresses, "ports": [{ "name": "https", "port": ports::API, "protocol": "TCP" }] }],
    })
}

/// The EndpointSlice beside it. All addresses are of the first one's family, as Service `kubernetes` is.
pub fn api_endpoint_slice(addresses: &[IpAddr], features: &Features) -> Value {
    let v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|ip| json!({ "addresses": [ip], "conditions": { "ready": true } }))
        .collect();
    json!({
        "apiVersion": features.endpoint_slice,
        "kind": "EndpointSlice",
        "metadata": { "name": API_SERVICE, "namespace": API_SERVICE_NAMESPACE,
            "labels": { "kubernetes.io/service-name": API_SERVICE } },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "endpoints": endpoints,
        "ports": [{ "name": "https", "port": ports::API, "protocol": "TCP" }],
    })
}

impl Context<'_> {
    /// Both, with every control-plane machine. Where there is no operator, each `up` sees to them.
    pub(super) fn api_endpoints(&self) -> [Manifest; 2] {
        let addresses: Vec<IpAddr> = self.settings.members.iter().map(|m| m.address).collect();
        let apply = if self.has_operator() { create } else { enforce };
        [
            apply(api_endpoints(&addresses)),
            apply(api_endpoint_slice(&addresses, &self.features)),
        ]
    }
}
