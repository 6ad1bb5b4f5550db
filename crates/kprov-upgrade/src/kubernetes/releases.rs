//! Whether a Release object is what it says: bytes, content and signature. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use kprov_release::{PublicKey, TrustedKeys};
use kprov_types::api::{RELEASE_KEYS_CONFIG_MAP, ReleaseRef, ReleaseSpec, ReleaseStatus};
use kprov_types::release::{API_VERSION, ImageComponent};
use kprov_types::{Digest, KubernetesVersion, Release};
use sha2::{Digest as _, Sha256};

use super::cache::Facts;
use super::facts::ReleaseFacts;
use crate::model::{KnownRelease, Part, Workload};

/// A Release object after it was looked at.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Checked {
    /// Which release it's for, as far as it says so.
    pub(super) release: Option<ReleaseRef>,
    /// When the object was made.
    pub(super) created: Timestamp,
    /// The manifest, where it's the one that the object names, and by which right it's trusted; else why not.
    pub(super) manifest: Result<(Release, String), String>,
}

impl Checked {
    /// What the object's status should say.
    pub(super) fn status(&self) -> ReleaseStatus {
        match &self.manifest {
            Ok((_, by)) => ReleaseStatus {
                verified: true,
                message: by.clone(),
            },
            Err(why) => ReleaseStatus {
                verified: false,
                message: why.clone(),
            },
        }
    }

    /// What a planner knows of it; nothing where it does not say which release it's for.
    pub(super) fn known(&self) -> Option<KnownRelease> {
        let release = self.release.clone()?;
        Some(match &self.manifest {
            Ok((manifest, _)) => known_release(release, manifest),
            Err(why) => KnownRelease {
                release,
                verified: Err(why.clone()),
                minimum_from: None,
                images: BTreeMap::new(),
            },
        })
    }
}

/// The releases that a planner is given. Of several of one version that nothing is of yet it's given the one that is meant:
/// of `desired`, that of digest `meant`; else the one that was made last, among those that are verified. A digest that is known
/// to be of another version was meant for that one, and stayed when another was asked for: it says nothing then.
pub(super) fn choose<'a>(
    checked: impl Iterator<Item = &'a Checked>,
    in_use: &BTreeSet<ReleaseRef>,
    desired: &str,
    meant: Option<&Digest>,
) -> Vec<KnownRelease> {
    let checked: Vec<&Checked> = checked.collect();
    let mut chosen = Vec::new();
    let mut fresh: BTreeMap<KubernetesVersion, (bool, Timestamp, KnownRelease)> = BTreeMap::new();
    let desired: Option<KubernetesVersion> = desired.trim().parse().ok();
    let of_another = |digest: &&Digest| {
        let known = checked.iter().filter_map(|c| c.known()).map(|k| k.release);
        known
            .into_iter()
            .any(|r| r.digest == **digest && Some(&r.version) != desired.as_ref())
    };
    let meant = meant.filter(|digest| !of_another(digest));
    for checked in checked.iter().copied() {
        let Some(known) = checked.known() else { continue };
        if in_use.contains(&known.release) {
            chosen.push(known);
            continue;
        }
        let version = known.release.version.clone();
        if desired.as_ref() == Some(&version) && meant.is_some_and(|digest| *digest != known.release.digest) {
            continue;
        }
        let (verified, created) = (known.verified.is_ok(), checked.created);
        let better = fresh
            .get(&version)
            .is_none_or(|(v, c, other)| (*v, *c, &other.release) < (verified, created, &known.release));
        if better {
            fresh.insert(version, (verified, created, known));
        }
    }
    chosen.extend(fresh.into_values().map(|(_, _, known)| known));
    chosen
}

/// The component whose image a workload runs.
pub(super) const fn component(workload: Workload) -> ImageComponent {
    match workload {
        Workload::ApiServer => ImageComponent::KubeApiserver,
        Workload::ControllerManager => ImageComponent::KubeControllerManager,
        Workload::Scheduler => ImageComponent::KubeScheduler,
        Workload::Proxy => ImageComponent::KubeProxy,
        Workload::Dns => ImageComponent::Coredns,
        Workload::Operator => ImageComponent::KprovOperator,
    }
}

/// What a planner knows of a release whose manifest somebody vouches for: of a payload at hand, say, that the cluster will be
/// given.
pub fn known_release(release: ReleaseRef, manifest: &Release) -> KnownRelease {
    KnownRelease {
        release,
        verified: Ok(()),
        minimum_from: manifest.minimum_from.clone(),
        images: images(manifest),
    }
}

fn images(manifest: &Release) -> BTreeMap<Part, String> {
    let workloads = Workload::ALL.map(|w| (Part::Workload(w), component(w)));
    workloads
        .into_iter()
        .chain([(Part::Etcd, ImageComponent::Etcd)])
        .filter_map(|(part, component)| Some((part, manifest.image(component)?.pinned())))
        .collect()
}

/// The keys in the cluster's ConfigMap. What is no key there is told, and trusts nothing.
pub(super) fn trusted(data: &BTreeMap<String, String>) -> TrustedKeys {
    let mut keys = TrustedKeys::default();
    for (name, pem) in data {
        if let Some(key) = PublicKey::from_pem(pem) {
            keys.add(key);
        } else {
            tracing::warn!(
                entry = name,
                "an entry of ConfigMap `{RELEASE_KEYS_CONFIG_MAP}` is no public key"
            );
        }
    }
    keys
}

/// Looks at one Release.
pub(super) fn check(facts: &ReleaseFacts, keys: &TrustedKeys) -> Checked {
    let spec = match &facts.spec {
        Ok(spec) => spec,
        Err(why) => {
            return Checked {
                release: None,
                created: facts.created,
                manifest: Err(format!("its spec can't be read: {why}")),
            };
        }
    };
    let version = spec.version.parse().ok();
    let release = version.map(|version| ReleaseRef {
        version,
        digest: spec.digest.clone(),
    });
    let manifest = match &release {
        None => Err(format!("`{}` is no Kubernetes version", spec.version)),
        Some(release) => verify(spec, release, keys),
    };
    Checked {
        release,
        created: facts.created,
        manifest,
    }
}

fn verify(spec: &ReleaseSpec, release: &ReleaseRef, keys: &TrustedKeys) -> Result<(Release, String), String> {
    let bytes = spec.manifest.as_bytes();
    let digest = Digest::from_bytes(Sha256::digest(bytes).into());
    if digest != spec.digest {
        return Err(format!("its manifest has digest {digest}, not the one it's named by"));
    }
    let by = if spec.insecure {
        "by whoever made the object; no signature was asked for".to_owned()
    } else {
        let Some(signature) = &spec.signature else {
            return Err("it is not signed".to_owned());
        };
        if keys.is_empty() {
            return Err(format!(
                "ConfigMap `{RELEASE_KEYS_CONFIG_MAP}` in kube-system has no key to check it with"
            ));
        }
        let key = keys.check(bytes, signature).map_err(|error| error.to_string())?;
        format!("signed by `{key}`")
    };
    // Only what is trusted is read.
    let manifest: Release =
        serde_json::from_slice(bytes).map_err(|error| format!("its manifest can't be read: {error}"))?;
    if manifest.api_version != API_VERSION || manifest.kind != "Release" {
        return Err(format!(
            "its manifest is a `{}` of `{}`, not a Release of `{API_VERSION}`",
            manifest.kind, manifest.api_version
        ));
    }
    if manifest.kubernetes != release.version {
        return Err(format!(
            "its manifest is of {}, the object says {}",
            manifest.kubernetes, release.version
        ));
    }
    Ok((manifest, by))
}

/// What was found of each Release, as long as neither it nor the keys change: manifests are large.
#[derive(Debug, Default)]
pub(super) struct Checks {
    keys: Option<BTreeMap<String, String>>,
    found: BTreeMap<String, (ReleaseFacts, Arc<Checked>)>,
}

impl Checks {
    /// All Releases, by object name.
    pub(super) fn of(&mut self, facts: &Facts) -> BTreeMap<String, Arc<Checked>> {
        let keys = facts.keys.get(RELEASE_KEYS_CONFIG_MAP).cloned();
        if keys != self.keys {
            self.found.clear();
            self.keys = keys;
        }
        let trusted = trusted(self.keys.as_ref().unwrap_or(&BTreeMap::new()));
        self.found.retain(|name, (seen, _)| {
            let now = facts.releases.get(name);
            now == Some(seen)
        });
        for (name, release) in facts.releases.iter() {
            if !self.found.contains_key(name) {
                let checked = Arc::new(check(release, &trusted));
                self.found.insert(name.to_owned(), (release.clone(), checked));
            }
        }
        let all = self.found.iter();
        all.map(|(name, (_, checked))| (name.clone(), Arc::clone(checked)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use kprov_release::SigningKey;
    use kprov_types::release::ReleaseImage;

    use super::*;

    fn manifest() -> Release {
        let image = ReleaseImage {
            reference: "kprov.local/etcd:v3.5.30".into(),
            digest: Digest::from_bytes([1; 32]),
            version: None,
        };
        Release {
            api_version: API_VERSION.into(),
            kind: "Release".into(),
            kubernetes: "1.36.3".parse().unwrap(),
            images: BTreeMap::from([(ImageComponent::Etcd, image)]),
            host_files: Vec::new(),
            minimum_from: Some("1.35.0".parse().unwrap()),
            advisories: Vec::new(),
            programs: BTreeMap::new(),
        }
    }

    fn spec(manifest: &str) -> ReleaseSpec {
        ReleaseSpec {
            version: "1.36.3".into(),
            digest: Digest::from_bytes(Sha256::digest(manifest).into()),
            manifest: manifest.into(),
            signature: None,
            insecure: true,
            urls: Vec::new(),
        }
    }

    fn checked(spec: ReleaseSpec, keys: &TrustedKeys) -> Checked {
        let facts = ReleaseFacts {
            spec: Ok(Arc::new(spec)),
            created: Timestamp::UNIX_EPOCH,
            status: None,
        };
        check(&facts, keys)
    }

    #[test]
    fn each_thing_that_is_wrong_is_told() {
        let text = serde_json::to_string(&manifest()).unwrap();
        let none = TrustedKeys::default();
        let good = checked(spec(&text), &none);
        assert!(good.status().verified);
        let known = good.known().unwrap();
        assert_eq!(known.minimum_from, Some("1.35.0".parse().unwrap()));
        assert!(known.images[&Part::Etcd].starts_with("kprov.local/etcd:v3.5.30@sha256:"));

        let other = |change: fn(&mut ReleaseSpec)| {
            let mut spec = spec(&text);
            change(&mut spec);
            checked(spec, &none).status()
        };
        for (status, told) in [
            (other(|s| s.manifest.push(' ')), "has digest"),
            (
                other(|s| s.version = "1.36.4".into()),
                "is of 1.36.3, the object says 1.36.4",
            ),
            (
                other(|s| s.version = "latest".into()),
                "`latest` is no Kubernetes version",
            ),
            (other(|s| s.insecure = false), "not signed"),
            (checked(spec("{}"), &none).status(), "can't be read"),
        ] {
            assert!(!status.verified);
            assert!(status.message.contains(told), "{}", status.message);
        }
        let unreadable = ReleaseFacts {
            spec: Err("missing field `digest`".into()),
            created: Timestamp::UNIX_EPOCH,
            status: None,
        };
        let unreadable = check(&unreadable, &none);
        assert_eq!(unreadable.known(), None);
        assert!(unreadable.status().message.contains("missing field"));
    }

    #[test]
    fn signatures_count_by_the_clusters_own_keys() {
        let text = serde_json::to_string(&manifest()).unwrap();
        let (ours, theirs) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
        let keys = |pem: String| {
            trusted(&BTreeMap::from([
                ("a".to_owned(), pem),
                ("b".to_owned(), "no key".to_owned()),
            ]))
        };
        let signed = ReleaseSpec {
            insecure: false,
            signature: Some(sign(&ours, &text)),
            ..spec(&text)
        };
        let good = checked(signed.clone(), &keys(ours.public().to_pem()));
        assert!(good.status().message.starts_with("signed by `"), "{good:?}");
        let unknown = checked(signed.clone(), &keys(theirs.public().to_pem()));
        assert!(unknown.status().message.contains("not trusted"), "{unknown:?}");
        let keyless = checked(signed, &trusted(&BTreeMap::new()));
        assert!(keyless.status().message.contains("no key"), "{keyless:?}");
    }

    #[test]
    fn of_several_of_a_version_one_is_meant() {
        let at = |created: i64, url: &str, insecure: bool| {
            let mut manifest = manifest();
            manifest.advisories.push(url.into());
            let mut spec = spec(&serde_json::to_string(&manifest).unwrap());
            spec.insecure = insecure;
            let facts = ReleaseFacts {
                spec: Ok(Arc::new(spec)),
                created: Timestamp::from_second(created).unwrap(),
                status: None,
            };
            check(&facts, &TrustedKeys::default())
        };
        let all = [at(3, "a", true), at(5, "b", true), at(1, "c", true), at(9, "d", false)];
        let release = |i: usize| all[i].release.clone().unwrap();
        let chosen = |in_use: &[usize], meant: Option<usize>| -> Vec<ReleaseRef> {
            let in_use = in_use.iter().map(|i| release(*i)).collect();
            let meant = meant.map(|i| release(i).digest);
            let chosen = choose(all.iter(), &in_use, "v1.36.3", meant.as_ref());
            chosen.into_iter().map(|known| known.release).collect()
        };
        assert_eq!(chosen(&[], None), [release(1)], "the last one that is verified");
        assert_eq!(chosen(&[], Some(2)), [release(2)]);
        assert_eq!(
            chosen(&[], Some(3)),
            [release(3)],
            "what is asked for, even if it can't be had"
        );
        assert_eq!(chosen(&[0], None), [release(0), release(1)], "what runs stays known");
        // The digest of what was asked for before: another version's says nothing of this one, an unknown one does.
        let meant_before = |digest: &Digest| choose(all.iter(), &BTreeSet::new(), "1.37.0", Some(digest)).len();
        assert_eq!(meant_before(&release(2).digest), 1);
        let of_desired = |digest: &Digest| choose(all.iter(), &BTreeSet::new(), "1.36.3", Some(digest)).len();
        assert_eq!(of_desired(&Digest::from_bytes([7; 32])), 0);
    }

    /// A signature file as `kprov release create` writes it.
    fn sign(key: &SigningKey, text: &str) -> String {
        key.sign(text.as_bytes())
    }
}
