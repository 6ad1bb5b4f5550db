//! What is read out of the API's answers.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{Expression, Selector, Status};
use serde_json::json;

use super::super::ApiRequest;
use super::admission::{Verdict, verdict};
use super::apis::written_through;
use super::budgets::disjoint;
use super::metrics::{merge, scan};

const METRICS: &str = r#"apiserver_longrunning_requests{component="apiserver",group="policy",resource="poddisruptionbudgets",scope="cluster",subresource="",verb="WATCH",version="v1beta1"} 2
# HELP apiserver_request_total [STABLE] Counter of apiserver requests
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",component="apiserver",dry_run="",group="policy",resource="poddisruptionbudgets",scope="cluster",subresource="",verb="LIST",version="v1beta1"} 3
apiserver_request_total{code="201",component="apiserver",dry_run="",group="policy",resource="poddisruptionbudgets",scope="resource",subresource="",verb="POST",version="v1beta1"} 1
apiserver_request_total{code="200",component="apiserver",dry_run="",group="policy",resource="poddisruptionbudgets",scope="resource",subresource="status",verb="PUT",version="v1beta1"} 7
apiserver_request_total{code="200",component="apiserver",dry_run="",group="policy",resource="podsecuritypolicies",scope="cluster",subresource="",verb="LIST",version="v1beta1"} 0
apiserver_request_total{code="200",component="apiserver",dry_run="",group="apps",resource="deployments",scope="cluster",subresource="",verb="LIST",version="v1"} 9
apiserver_request_total{code="200",component="apiserver",dry_run="",group="autoscaling",resource="horizontalpodautoscalers",scope="cluster",subresource="",verb="LIST",version="v2beta2"} 9
apiserver_requested_deprecated_apis{group="batch",removed_release="1.25",resource="cronjobs",subresource="",version="v1beta1"} 1
apiserver_requested_deprecated_apis{group="",removed_release="",resource="componentstatuses",subresource="",version="v1"} 1
apiserver_requested_deprecated_apis{group="od\"d\\",removed_release="1.24",resource="x",subresource="",version="v1"} 1
apiserver_requested_deprecated_apis{group="broken
apiserver_response_sizes_bucket{group="policy",le="1000"} 5
"#;

fn verbs(verbs: &[&str]) -> std::collections::BTreeSet<String> {
    verbs.iter().map(|verb| (*verb).to_owned()).collect()
}

#[tokio::test]
async fn reads_metrics() {
    let found = scan(METRICS.as_bytes(), 20, 25).await.unwrap();
    let request = |group: &str, version: &str, resource: &str, removed, told: &[&str]| ApiRequest {
        group: group.into(),
        version: version.into(),
        resource: resource.into(),
        removed,
        verbs: verbs(told),
    };
    let expected = [
        request("batch", "v1beta1", "cronjobs", 25, &[]),
        request("od\"d\\", "v1", "x", 24, &[]),
        request(
            "policy",
            "v1beta1",
            "poddisruptionbudgets",
            25,
            &["LIST", "POST", "WATCH"],
        ),
        request("policy", "v1beta1", "poddisruptionbudgets/status", 25, &["PUT"]),
    ];
    assert_eq!(found, expected);
    assert_eq!(scan(METRICS.as_bytes(), 20, 23).await.unwrap(), []);
    assert_eq!(scan(METRICS.as_bytes(), 24, 26).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_line_without_end_takes_no_memory() {
    let line = format!("apiserver_request_total{{{}\n{METRICS}", "x".repeat(1 << 20));
    assert_eq!(scan(line.as_bytes(), 20, 25).await.unwrap().len(), 4);
}

#[test]
fn adds_up_what_several_api_servers_counted() {
    let one = |told: &[&str]| {
        vec![ApiRequest {
            group: "g".into(),
            version: "v".into(),
            resource: "r".into(),
            removed: 25,
            verbs: verbs(told),
        }]
    };
    assert_eq!(
        merge(vec![one(&["LIST"]), one(&["POST"]), Vec::new()]),
        one(&["LIST", "POST"])
    );
}

#[test]
fn tells_what_an_object_was_written_through() {
    let through = |metadata: serde_json::Value| {
        let metadata: ObjectMeta = serde_json::from_value(metadata).unwrap();
        written_through(&metadata).into_iter().collect::<Vec<_>>()
    };
    let entry = |manager: &str, version: &str, day: u8, subresource: &str| {
        json!({ "manager": manager, "operation": "Update", "apiVersion": version, "subresource": subresource,
            "time": format!("2026-01-{day:02}T00:00:00Z") })
    };
    assert_eq!(through(json!({})), [""; 0]);
    assert_eq!(
        through(json!({ "managedFields": [
            entry("helm", "batch/v1beta1", 1, ""), entry("helm", "batch/v1", 2, ""),
            entry("flux", "batch/v1", 1, ""), entry("flux", "batch/v1beta1", 2, ""),
            entry("kube-controller-manager", "batch/v2alpha1", 3, ""), entry("kprov", "batch/v3", 3, ""),
            entry("someone", "batch/v4", 3, "status"),
        ] })),
        ["batch/v1", "batch/v1beta1"]
    );
    // The manifest that `kubectl apply` was given last says it better than its entries.
    let manifest = r#"{"apiVersion":"batch/v1","kind":"CronJob"}"#;
    assert_eq!(
        through(json!({
            "annotations": { "kubectl.kubernetes.io/last-applied-configuration": manifest },
            "managedFields": [entry("kubectl-client-side-apply", "batch/v1beta1", 1, "")],
        })),
        ["batch/v1"]
    );
    assert_eq!(
        through(json!({
            "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "no JSON" },
            "managedFields": [entry("kubectl-client-side-apply", "batch/v1beta1", 1, "")],
        })),
        ["batch/v1beta1"]
    );
}

#[test]
fn tells_selectors_apart() {
    let equal = |key: &str, value: &str| Expression::Equal(key.into(), value.into());
    let selector = |expressions: Vec<Expression>| Selector::from_iter(expressions);
    let web = selector(vec![equal("app", "web"), equal("tier", "front")]);
    assert!(disjoint(&web, &selector(vec![equal("app", "db")])));
    assert!(!disjoint(&web, &selector(vec![equal("app", "web")])));
    assert!(!disjoint(&web, &selector(vec![equal("zone", "a")])));
    assert!(!disjoint(&web, &Selector::default()));
}

#[test]
fn tells_admission_from_other_refusals() {
    let status = |code: u16, message: &str| Status::failure(message, "").with_code(code);
    let cases = [
        (
            403,
            r#"admission webhook "a.b" denied the request: no"#,
            Verdict::Refused,
        ),
        (
            500,
            r#"Internal error occurred: failed calling webhook "a.b": no endpoints"#,
            Verdict::Refused,
        ),
        (
            422,
            "daemonsets.apps \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request",
            Verdict::Refused,
        ),
        (
            400,
            r#"admission webhook "a.b" does not support dry run"#,
            Verdict::Nothing,
        ),
        (404, r#"daemonsets.apps "kube-proxy" not found"#, Verdict::Nothing),
        (
            403,
            r#"daemonsets.apps "x" is forbidden: User "u" cannot patch resource"#,
            Verdict::Broke,
        ),
        (
            503,
            "the server is currently unable to handle the request",
            Verdict::Broke,
        ),
    ];
    for (code, message, expected) in cases {
        assert_eq!(verdict(&status(code, message)), expected, "{message}");
    }
}
