//! Which API versions clients ask for, as API servers count it.

use std::collections::{BTreeMap, BTreeSet};

use futures::AsyncBufRead;
use futures::io::{AsyncBufReadExt as _, AsyncReadExt as _};
use kube::Client;

use super::super::ApiRequest;
use super::super::removals::REMOVALS;
use super::GatherError;

/// Says that a client asked for a deprecated API; since 1.19 (KEP-1693).
const DEPRECATED: &str = "apiserver_requested_deprecated_apis";
/// Counts requests. Tells the verbs, and of versions that are not deprecated yet but will be gone at the end of the way.
const TOTAL: &str = "apiserver_request_total";
/// Counts what is under way, watches above all: these are not among the requests before they end.
const UNDER_WAY: &str = "apiserver_longrunning_requests";
/// No line that is looked for is longer.
const LONGEST_LINE: u64 = 16 << 10;

/// The API versions that clients have asked an API server for since it started, of those that go after minor `from`, up to
/// minor `to`.
pub(super) async fn requests(client: &Client, from: u64, to: u64) -> Result<Vec<ApiRequest>, GatherError> {
    let request = http::Request::get("/metrics")
        .body(Vec::new())
        .map_err(kube::Error::HttpError)?;
    scan(client.request_stream(request).await?, from, to).await
}

/// Reads line by line: a busy API server's metrics are tens of megabytes.
pub(super) async fn scan(stream: impl AsyncBufRead, from: u64, to: u64) -> Result<Vec<ApiRequest>, GatherError> {
    let mut stream = std::pin::pin!(stream);
    let mut scan = Scan {
        from,
        to,
        seen: BTreeMap::new(),
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        if stream.as_mut().take(LONGEST_LINE).read_until(b'\n', &mut line).await? == 0 {
            return Ok(scan.finish());
        }
        if let Ok(text) = std::str::from_utf8(&line) {
            scan.line(text);
        }
    }
}

/// What several API servers counted.
pub(super) fn merge(each: Vec<Vec<ApiRequest>>) -> Vec<ApiRequest> {
    let mut merged: BTreeMap<(String, String, String), ApiRequest> = BTreeMap::new();
    for request in each.into_iter().flatten() {
        let key = (request.group.clone(), request.version.clone(), request.resource.clone());
        match merged.get_mut(&key) {
            Some(seen) => seen.verbs.extend(request.verbs),
            None => {
                merged.insert(key, request);
            }
        }
    }
    merged.into_values().collect()
}

struct Scan {
    from: u64,
    to: u64,
    /// By group, version and resource with subresource: the minor that it goes in, and the verbs.
    seen: BTreeMap<(String, String, String), (u64, BTreeSet<String>)>,
}

impl Scan {
    fn line(&mut self, line: &str) {
        let Some((metric, rest)) = line.split_once('{') else {
            return;
        };
        if ![DEPRECATED, TOTAL, UNDER_WAY].contains(&metric) {
            return;
        }
        let Some((labels, value)) = labels(rest) else { return };
        if value.trim().parse::<f64>().is_ok_and(|count| count == 0.0) {
            return;
        }
        let label = |name: &str| {
            labels
                .iter()
                .find(|(key, _)| key == name)
                .map_or("", |(_, value)| value.as_str())
        };
        let (group, version, resource) = (label("group"), label("version"), label("resource"));
        let removed = if metric == DEPRECATED {
            // Empty for what is deprecated and stays.
            label("removed_release")
                .split_once('.')
                .and_then(|(_, minor)| minor.parse().ok())
        } else {
            let row = REMOVALS
                .iter()
                .find(|r| (r.group, r.version, r.resource) == (group, version, resource));
            row.map(|row| row.removed)
        };
        let Some(removed) = removed.filter(|minor| (self.from + 1..=self.to).contains(minor)) else {
            return;
        };
        let full = match label("subresource") {
            "" => resource.to_owned(),
            subresource => format!("{resource}/{subresource}"),
        };
        let (_, verbs) = self
            .seen
            .entry((group.to_owned(), version.to_owned(), full))
            .or_insert_with(|| (removed, BTreeSet::new()));
        if metric != DEPRECATED {
            verbs.insert(label("verb").to_owned());
        }
    }

    fn finish(self) -> Vec<ApiRequest> {
        let request = |((group, version, resource), (removed, verbs))| ApiRequest {
            group,
            version,
            resource,
            removed,
            verbs,
        };
        self.seen.into_iter().map(request).collect()
    }
}

/// The labels of a sample after its opening brace, and what follows them (Prometheus' text format).
fn labels(mut rest: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(value) = rest.strip_prefix('}') {
            return Some((labels, value));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = quoted.char_indices();
        loop {
            match chars.next()? {
                (at, '"') => {
                    rest = &quoted[at + 1..];
                    break;
                }
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        }
        labels.push((name.to_owned(), value));
    }
}
