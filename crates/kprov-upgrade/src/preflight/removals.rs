//! API versions that Kubernetes has taken away, or says that it will, from 1.22 to 1.37.
//!
//! Sources: the "Deprecated API Migration Guide" of Kubernetes' documentation, and the `APILifecycleRemoved` methods of
//! `k8s.io/api` (1.20 to 1.36), which API servers go by. Alpha versions, which nobody is promised, are left out.

/// A resource of an API version that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The group.
    pub group: &'static str,
    /// The version.
    pub version: &'static str,
    /// The resource.
    pub resource: &'static str,
    /// The minor of Kubernetes 1 that doesn't have it any more.
    pub removed: u64,
    /// What takes its place, as group and version, and the minor that brought that; `None`: the kind goes altogether.
    pub replacement: Option<((&'static str, &'static str), u64)>,
    /// Another version of it that was there all along.
    pub always: Option<&'static str>,
    /// Objects of it are kept, and written by people.
    pub kept: bool,
    /// What Kubernetes' own programs ask for, which tells nothing of others.
    pub own: Own,
}

/// What Kubernetes' own programs do with a resource, in versions where kprov runs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// Nothing.
    Nothing,
    /// They list and watch it: garbage collection and quota do so with every resource that has no other version.
    Reads,
    /// A controller reads it, and writes the status.
    Controller,
    /// The same, and kprov applies its own objects.
    ControllerAndKprov,
    /// They do everything with it.
    All,
}

impl Removal {
    /// Group and version as an object has them.
    pub fn api_version(&self) -> String {
        api_version(self.group, self.version)
    }

    /// Group and version to list its objects by, at a minor. Only where there is no other it is what goes, since preflight's own
    /// requests count as well.
    pub fn listed_by(&self, minor: u64) -> (&'static str, &'static str) {
        match (self.replacement, self.always) {
            (Some((replacement, since)), _) if since <= minor => replacement,
            (_, Some(version)) => (self.group, version),
            _ => (self.group, self.version),
        }
    }
}

/// `group/version`, or the version alone for the core group.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    }
}

/// The resources that go on the way from one minor to another: those removed after `from`, up to `to`.
pub fn between(from: u64, to: u64) -> impl Iterator<Item = &'static Removal> {
    REMOVALS.iter().filter(move |r| (from + 1..=to).contains(&r.removed))
}

const ADMISSION: &str = "admissionregistration.k8s.io";
const AUTHENTICATION: &str = "authentication.k8s.io";
const AUTHORIZATION: &str = "authorization.k8s.io";
const FLOWCONTROL: &str = "flowcontrol.apiserver.k8s.io";
const NETWORKING: &str = "networking.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
const STORAGE: &str = "storage.k8s.io";

/// A row: objects that people keep, and that nobody else asks for.
const fn row(
    removed: u64,
    api: (&'static str, &'static str),
    resource: &'static str,
    to: (&'static str, u64),
) -> Removal {
    Removal {
        group: api.0,
        version: api.1,
        resource,
        removed,
        replacement: Some(((api.0, to.0), to.1)),
        always: None,
        kept: true,
        own: Own::Nothing,
    }
}

impl Removal {
    /// Its objects are made by programs, or are none at all.
    const fn not_kept(mut self) -> Self {
        self.kept = false;
        self
    }

    const fn own(mut self, own: Own) -> Self {
        self.own = own;
        self
    }

    const fn moved_to(mut self, group: &'static str) -> Self {
        if let Some(((_, version), since)) = self.replacement {
            self.replacement = Some(((group, version), since));
        }
        self
    }

    const fn always(mut self, version: &'static str) -> Self {
        self.always = Some(version);
        self
    }

    const fn gone(mut self) -> Self {
        self.replacement = None;
        self
    }
}

/// The table, in order of minors.
pub const REMOVALS: &[Removal] = &[
    row(22, (ADMISSION, "v1beta1"), "mutatingwebhookconfigurations", ("v1", 16)),
    row(
        22,
        (ADMISSION, "v1beta1"),
        "validatingwebhookconfigurations",
        ("v1", 16),
    ),
    row(
        22,
        ("apiextensions.k8s.io", "v1beta1"),
        "customresourcedefinitions",
        ("v1", 16),
    ),
    row(22, ("apiregistration.k8s.io", "v1beta1"), "apiservices", ("v1", 10)),
    row(22, (AUTHENTICATION, "v1beta1"), "tokenreviews", ("v1", 6)).not_kept(),
    row(22, (AUTHORIZATION, "v1beta1"), "localsubjectaccessreviews", ("v1", 6)).not_kept(),
    row(22, (AUTHORIZATION, "v1beta1"), "selfsubjectaccessreviews", ("v1", 6)).not_kept(),
    row(22, (AUTHORIZATION, "v1beta1"), "selfsubjectrulesreviews", ("v1", 8)).not_kept(),
    row(22, (AUTHORIZATION, "v1beta1"), "subjectaccessreviews", ("v1", 6)).not_kept(),
    row(
        22,
        ("certificates.k8s.io", "v1beta1"),
        "certificatesigningrequests",
        ("v1", 19),
    )
    .not_kept(),
    row(22, ("coordination.k8s.io", "v1beta1"), "leases", ("v1", 14)).not_kept(),
    // The only resource of its group, so garbage collection watches it by this name as well.
    row(22, ("extensions", "v1beta1"), "ingresses", ("v1", 19))
        .moved_to(NETWORKING)
        .own(Own::Reads),
    row(22, (NETWORKING, "v1beta1"), "ingresses", ("v1", 19)),
    row(22, (NETWORKING, "v1beta1"), "ingressclasses", ("v1", 19)),
    row(22, (RBAC, "v1beta1"), "clusterroles", ("v1", 8)),
    row(22, (RBAC, "v1beta1"), "clusterrolebindings", ("v1", 8)),
    row(22, (RBAC, "v1beta1"), "roles", ("v1", 8)),
    row(22, (RBAC, "v1beta1"), "rolebindings", ("v1", 8)),
    row(22, ("scheduling.k8s.io", "v1beta1"), "priorityclasses", ("v1", 14)),
    row(22, (STORAGE, "v1beta1"), "csidrivers", ("v1", 18)),
    row(22, (STORAGE, "v1beta1"), "csinodes", ("v1", 17)).not_kept(),
    row(22, (STORAGE, "v1beta1"), "storageclasses", ("v1", 6)),
    row(22, (STORAGE, "v1beta1"), "volumeattachments", ("v1", 13)).not_kept(),
    row(25, ("autoscaling", "v2beta1"), "horizontalpodautoscalers", ("v2", 23)).always("v1"),
    row(25, ("batch", "v1beta1"), "cronjobs", ("v1", 21)).own(Own::Controller),
    row(25, ("discovery.k8s.io", "v1beta1"), "endpointslices", ("v1", 21))
        .not_kept()
        .own(Own::All),
    row(25, ("events.k8s.io", "v1beta1"), "events", ("v1", 19)).not_kept(),
    row(25, ("node.k8s.io", "v1beta1"), "runtimeclasses", ("v1", 20)).own(Own::Reads),
    row(25, ("policy", "v1beta1"), "poddisruptionbudgets", ("v1", 21)).own(Own::ControllerAndKprov),
    row(25, ("policy", "v1beta1"), "podsecuritypolicies", ("", 0))
        .gone()
        .own(Own::ControllerAndKprov),
    row(26, ("autoscaling", "v2beta2"), "horizontalpodautoscalers", ("v2", 23)).always("v1"),
    row(26, (FLOWCONTROL, "v1beta1"), "flowschemas", ("v1beta2", 23)).own(Own::All),
    row(
        26,
        (FLOWCONTROL, "v1beta1"),
        "prioritylevelconfigurations",
        ("v1beta2", 23),
    )
    .own(Own::All),
    row(27, (STORAGE, "v1beta1"), "csistoragecapacities", ("v1", 24))
        .not_kept()
        .own(Own::Reads),
    row(29, (FLOWCONTROL, "v1beta2"), "flowschemas", ("v1beta3", 26)).own(Own::All),
    row(
        29,
        (FLOWCONTROL, "v1beta2"),
        "prioritylevelconfigurations",
        ("v1beta3", 26),
    )
    .own(Own::All),
    row(32, (FLOWCONTROL, "v1beta3"), "flowschemas", ("v1", 29)).own(Own::All),
    row(32, (FLOWCONTROL, "v1beta3"), "prioritylevelconfigurations", ("v1", 29)).own(Own::All),
    row(33, (AUTHENTICATION, "v1beta1"), "selfsubjectreviews", ("v1", 28)).not_kept(),
    row(34, (ADMISSION, "v1beta1"), "validatingadmissionpolicies", ("v1", 30)).own(Own::Reads),
    row(
        34,
        (ADMISSION, "v1beta1"),
        "validatingadmissionpolicybindings",
        ("v1", 30),
    )
    .own(Own::Reads),
    row(37, (NETWORKING, "v1beta1"), "ipaddresses", ("v1", 33))
        .not_kept()
        .own(Own::All),
    row(37, (NETWORKING, "v1beta1"), "servicecidrs", ("v1", 33)).own(Own::All),
    row(37, (STORAGE, "v1beta1"), "volumeattributesclasses", ("v1", 34)).own(Own::Reads),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn table_is_in_order_and_without_doubles() {
        assert!(REMOVALS.is_sorted_by_key(|r| r.removed));
        let names: BTreeSet<_> = REMOVALS.iter().map(|r| (r.group, r.version, r.resource)).collect();
        assert_eq!(names.len(), REMOVALS.len());
        for removal in REMOVALS {
            assert!((22..=37).contains(&removal.removed), "{removal:?}");
            assert!(
                removal.replacement.is_none_or(|(_, since)| since <= removal.removed),
                "{removal:?}"
            );
        }
    }

    #[test]
    fn between_takes_the_end_and_not_the_start() {
        let names = |from, to| between(from, to).map(|r| r.resource).collect::<Vec<_>>();
        assert!(names(25, 25).is_empty());
        assert!(names(22, 24).is_empty());
        assert_eq!(names(26, 27), ["csistoragecapacities"]);
        assert_eq!(names(26, 33).len(), 6);
        assert!(names(24, 25).contains(&"podsecuritypolicies"));
        assert_eq!(names(34, 36), [""; 0]);
    }

    #[test]
    fn what_preflight_asks_for_itself_is_no_finding() {
        for removal in REMOVALS
            .iter()
            .filter(|removal| removal.kept && removal.own == Own::Nothing)
        {
            for minor in 20..removal.removed {
                assert_ne!(
                    removal.listed_by(minor),
                    (removal.group, removal.version),
                    "{removal:?} at {minor}"
                );
            }
        }
    }

    #[test]
    fn lists_by_what_is_served() {
        let find = |version: &str, resource: &str| {
            *REMOVALS
                .iter()
                .find(|r| r.version == version && r.resource == resource)
                .unwrap()
        };
        let jobs = find("v1beta1", "cronjobs");
        assert_eq!(jobs.listed_by(20), ("batch", "v1beta1"));
        assert_eq!(jobs.listed_by(21), ("batch", "v1"));
        let ingresses = REMOVALS.iter().find(|r| r.group == "extensions").unwrap();
        assert_eq!(ingresses.listed_by(20), ("networking.k8s.io", "v1"));
        assert_eq!(ingresses.api_version(), "extensions/v1beta1");
        assert_eq!(
            find("v1beta1", "podsecuritypolicies").listed_by(24),
            ("policy", "v1beta1")
        );
        assert_eq!(
            find("v1beta3", "flowschemas").listed_by(28),
            ("flowcontrol.apiserver.k8s.io", "v1beta3")
        );
    }
}
