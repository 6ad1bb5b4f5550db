//! The configuration files that API servers read.

use kprov_types::Minor;
use serde_json::{Value, json};

use crate::paths;
use crate::pki::FileToWrite;
use crate::versions::{Features, Unsupported};

/// The files that are the same for every version, each with its path.
pub(crate) fn common(encryption_key: &str) -> [FileToWrite; 2] {
    [
        file(paths::ENCRYPTION.to_owned(), &encryption(encryption_key)),
        file(paths::AUDIT_POLICY.to_owned(), &audit_policy()),
    ]
}

/// The files that API servers of one minor read and those of other minors don't. A machine needs those of each minor whose
/// API servers it may run, before they start.
pub fn config_files(minor: Minor) -> Result<Vec<FileToWrite>, Unsupported> {
    let features = Features::of(minor)?;
    let mut files = Vec::new();
    if let Some(api_version) = features.pod_security {
        files.push(file(paths::admission(minor), &admission(api_version)));
    }
    if let Some(api_version) = features.authentication_config {
        files.push(file(paths::authentication(minor), &authentication(api_version)));
    }
    Ok(files)
}

fn file(path: String, content: &Value) -> FileToWrite {
    FileToWrite {
        path,
        mode: 0o600,
        content: format!("{content:#}\n"),
    }
}

/// Secrets are written by the first provider; `identity` reads what was written before encryption was on.
fn encryption(key: &str) -> Value {
    json!({
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "EncryptionConfiguration",
        "resources": [{
            "resources": ["secrets"],
            "providers": [
                { "secretbox": { "keys": [{ "name": "key1", "secret": key }] } },
                { "identity": {} },
            ],
        }],
    })
}

/// Who did what, without the content of what is secret. The first rule that matches decides.
fn audit_policy() -> Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            // Health checks, and what is renewed all the time.
            { "level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version"] },
            { "level": "None", "resources": [
                { "group": "coordination.k8s.io", "resources": ["leases"] },
                { "group": "", "resources": ["events"] },
                { "group": "events.k8s.io", "resources": ["events"] },
            ] },
            // Every use of these, and never their content.
            { "level": "Metadata", "resources": [
                { "group": "", "resources": ["secrets", "serviceaccounts/token"] },
                { "group": "authentication.k8s.io", "resources": ["tokenreviews"] },
            ] },
            // What components read all the time.
            { "level": "None", "verbs": ["get", "list", "watch"], "userGroups": ["system:nodes"] },
            { "level": "None", "verbs": ["get", "list", "watch"], "users": [
                "system:apiserver", "system:kube-controller-manager", "system:kube-scheduler",
                "system:serviceaccount:kube-system:kube-proxy", "system:serviceaccount:kube-system:coredns",
            ] },
            // What changes what runs, or who may do what.
            { "level": "Request", "verbs": ["create", "update", "patch", "delete", "deletecollection"], "resources": [
                { "group": "", "resources": ["pods", "pods/exec", "pods/attach", "pods/portforward", "pods/proxy",
                    "services/proxy", "nodes/proxy"] },
                { "group": "apps" },
                { "group": "batch" },
                { "group": "rbac.authorization.k8s.io" },
                { "group": "admissionregistration.k8s.io" },
            ] },
            { "level": "Metadata" },
        ],
    })
}

/// Pod Security: `baseline` everywhere but in kube-system, where the control plane and kube-proxy run.
fn admission(api_version: &str) -> Value {
    json!({
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AdmissionConfiguration",
        "plugins": [{
            "name": "PodSecurity",
            "configuration": {
                "apiVersion": api_version,
                "kind": "PodSecurityConfiguration",
                "defaults": {
                    "enforce": "baseline", "enforce-version": "latest",
                    "audit": "baseline", "audit-version": "latest",
                    "warn": "baseline", "warn-version": "latest",
                },
                "exemptions": { "usernames": [], "runtimeClasses": [], "namespaces": ["kube-system"] },
            },
        }],
    })
}

/// Anonymous requests reach the health endpoints and nothing else, whatever RBAC says (KEP-4633).
fn authentication(api_version: &str) -> Value {
    json!({
        "apiVersion": api_version,
        "kind": "AuthenticationConfiguration",
        "anonymous": {
            "enabled": true,
            "conditions": [{ "path": "/livez" }, { "path": "/readyz" }, { "path": "/healthz" }],
        },
    })
}
