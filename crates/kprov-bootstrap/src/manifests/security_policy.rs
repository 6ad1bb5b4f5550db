//! PodSecurityPolicy, for versions before Pod Security admission: the same `baseline` outside kube-system (the Pod Security
//! Standards page gives both forms).

use serde_json::{Value, json};

use super::NAMESPACE;
use super::rbac::{cluster_role, cluster_role_binding, group, role_binding};

const PRIVILEGED: &str = "kprov:privileged-pods";
const BASELINE: &str = "kprov:baseline-pods";

pub(super) fn objects() -> Vec<Value> {
    let any = json!({ "rule": "RunAsAny" });
    let policy = |name: &str, own: Value| {
        let mut spec = json!({
            "runAsUser": any, "seLinux": any, "supplementalGroups": any, "fsGroup": any,
            "allowPrivilegeEscalation": true,
        });
        if let (Some(spec), Value::Object(own)) = (spec.as_object_mut(), own) {
            spec.extend(own);
        }
        json!({
            "apiVersion": "policy/v1beta1",
            "kind": "PodSecurityPolicy",
            // Without the annotation no pod may name a seccomp profile.
            "metadata": {
                "name": name.replace(':', "-"),
                "annotations": { "seccomp.security.alpha.kubernetes.io/allowedProfileNames": "*" },
            },
            "spec": spec,
        })
    };
    let usage = |name: &str| {
        cluster_role(
            name,
            &json!([{ "apiGroups": ["policy"], "resources": ["podsecuritypolicies"], "verbs": ["use"],
                "resourceNames": [name.replace(':', "-")] }]),
        )
    };
    vec![
        policy(
            PRIVILEGED,
            json!({
                "privileged": true, "allowedCapabilities": ["*"], "volumes": ["*"],
                "hostNetwork": true, "hostPID": true, "hostIPC": true, "hostPorts": [{ "min": 0, "max": 65535 }],
            }),
        ),
        policy(
            BASELINE,
            json!({
                "allowedCapabilities": [
                    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
                    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
                ],
                "volumes": [
                    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "nfs", "persistentVolumeClaim",
                    "projected", "secret",
                ],
            }),
        ),
        usage(PRIVILEGED),
        usage(BASELINE),
        cluster_role_binding(BASELINE, BASELINE, &[group("system:authenticated")]),
        // Pods of kube-system's own controllers, and kubelets' mirrors of static pods.
        role_binding(
            PRIVILEGED,
            ("ClusterRole", PRIVILEGED),
            &[
                group(&format!("system:serviceaccounts:{NAMESPACE}")),
                group("system:nodes"),
            ],
        ),
    ]
}
