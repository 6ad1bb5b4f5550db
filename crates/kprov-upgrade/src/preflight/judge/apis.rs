//! API versions that go, and who depends on them.

use super::super::removals::{Own, REMOVALS, Removal, api_version};
use super::super::{ApiRequest, Inputs, StoredObjects};
use super::{Findings, counted, some_of};

/// Requests that only Kubernetes' own programs make tell nothing: they come with the version.
pub(super) fn requests(requests: &[ApiRequest], inputs: &Inputs, findings: &mut Findings) {
    for request in requests {
        let (resource, subresource) = request.resource.split_once('/').unwrap_or((&request.resource, ""));
        let row = REMOVALS
            .iter()
            .find(|r| (r.group, r.version, r.resource) == (&*request.group, &*request.version, resource));
        if row.is_some_and(|row| is_own(row, subresource, request)) {
            continue;
        }
        let api = api_version(&request.group, &request.version);
        let verbs = if request.verbs.is_empty() {
            String::new()
        } else {
            format!(
                " ({})",
                request.verbs.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
            )
        };
        let Some(hop) = inputs
            .hops
            .iter()
            .find(|hop| hop.release.version.minor().minor >= request.removed)
        else {
            continue;
        };
        findings.block(
            format!("requested-api/{api}/{}", request.resource),
            format!(
                "clients ask for `{}` of `{api}`{verbs}, which 1.{} does not have any more; the way leads over {}",
                request.resource, request.removed, hop.release
            ),
            format!(
                "move these clients to {}; the audit log names them. API servers count since they started, so override this \
                 once nothing asks for it any more",
                replacement(row)
            ),
        );
    }
}

fn is_own(row: &Removal, subresource: &str, request: &ApiRequest) -> bool {
    let only =
        |verbs: &[&str]| !request.verbs.is_empty() && request.verbs.iter().all(|verb| verbs.contains(&verb.as_str()));
    match row.own {
        Own::Nothing => false,
        Own::All => true,
        // Namespaces that are deleted take everything in them along.
        Own::Reads => only(&["LIST", "WATCH", "DELETECOLLECTION"]),
        // Controllers write the status, and read what they write.
        Own::Controller => subresource == "status" || only(&["LIST", "WATCH", "GET", "DELETECOLLECTION"]),
        // kprov applies its own.
        Own::ControllerAndKprov => {
            subresource == "status" || only(&["LIST", "WATCH", "GET", "DELETECOLLECTION", "APPLY"])
        }
    }
}

fn replacement(row: Option<&Removal>) -> String {
    match row.map(|row| row.replacement) {
        Some(Some(((group, version), since))) => format!("`{}` (there since 1.{since})", api_version(group, version)),
        Some(None) => "what takes its place (the kind goes altogether)".into(),
        None => "a version that stays".into(),
    }
}

/// Objects last written through a version that goes are there in another one; but whoever writes them that way again fails.
/// Where the kind goes altogether, so does what its objects do.
pub(super) fn stored(stored: &[StoredObjects], inputs: &Inputs, findings: &mut Findings) {
    for seen in stored {
        let StoredObjects {
            api_version,
            resource,
            count,
            examples,
        } = seen;
        let row = REMOVALS
            .iter()
            .find(|row| row.api_version() == *api_version && row.resource == resource);
        let Some(row) = row else { continue };
        let Some(hop) = inputs
            .hops
            .iter()
            .find(|hop| hop.release.version.minor().minor >= row.removed)
        else {
            continue;
        };
        let names = some_of(*count, examples.iter().map(String::as_str));
        let objects = counted(*count, "object");
        match row.replacement {
            Some(_) => findings.warn(
                format!("stored-api/{api_version}/{resource}"),
                format!(
                    "{objects} of `{resource}` last written as `{api_version}`, which {} does not have any more: {names}",
                    hop.release
                ),
                format!(
                    "change the manifests to {} and apply them again; the objects themselves stay",
                    replacement(Some(row))
                ),
            ),
            None => findings.block(
                format!("removed-api/{api_version}/{resource}"),
                format!("{objects} of `{resource}`, a kind that {} does not have any more: {names}", hop.release),
                if resource == "podsecuritypolicies" {
                    "set Pod Security admission's labels on the namespaces instead \
                     (`pod-security.kubernetes.io/enforce`), then delete these policies"
                } else {
                    "delete them, or override this: nobody will be able to read them"
                },
            ),
        }
    }
}
