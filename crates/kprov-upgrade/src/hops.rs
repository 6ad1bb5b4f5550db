//! The way from one release to a version: a chain of releases, each at most a minor after the one before. Pure.

use std::cmp::Reverse;

use kprov_types::api::ReleaseRef;
use kprov_types::{KubernetesVersion, Minor};

use crate::model::KnownRelease;
use crate::plan::Refusal;

/// The oldest minor that kprov runs. Newer minors than known are no error here: whoever has a person to warn does.
pub const OLDEST: Minor = Minor::v1(20);

/// Why there is no way to a version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The text is no version.
    #[error("`{text}` is not a Kubernetes version; expected MAJOR.MINOR.PATCH such as `1.36.3`")]
    Malformed {
        /// The text.
        text: String,
    },
    /// The version is older than kprov runs.
    #[error("{version} is not supported; the oldest minor that is, is {OLDEST}")]
    Unsupported {
        /// The version.
        version: KubernetesVersion,
    },
    /// The version is of an earlier minor than the cluster.
    #[error("{version} is a minor behind {from}: Kubernetes can't go back a minor")]
    Downgrade {
        /// The version asked for.
        version: KubernetesVersion,
        /// What the cluster runs.
        from: KubernetesVersion,
    },
    /// No release of the version is known.
    #[error("the cluster knows no release {version}")]
    NoRelease {
        /// The version.
        version: KubernetesVersion,
    },
    /// No release of a minor on the way is known.
    #[error("the cluster knows no release of {minor}, which is on the way to {version}: minors can't be skipped")]
    NoMinor {
        /// The minor.
        minor: Minor,
        /// The version asked for.
        version: KubernetesVersion,
    },
    /// A release on the way is not verified.
    #[error("the release {version} is not verified: {why}")]
    Unverified {
        /// Its version.
        version: KubernetesVersion,
        /// Why not.
        why: String,
    },
    /// A release may be reached only from a version that the way does not pass.
    #[error("{version} may be reached only from {minimum} on, and no known release leads there from {from}")]
    MinimumFrom {
        /// The release's version.
        version: KubernetesVersion,
        /// The lowest version it may be reached from.
        minimum: KubernetesVersion,
        /// What the cluster runs.
        from: KubernetesVersion,
    },
    /// The version is of another major.
    #[error("{version} is of another major version than {from}")]
    OtherMajor {
        /// The version asked for.
        version: KubernetesVersion,
        /// What the cluster runs.
        from: KubernetesVersion,
    },
}

impl From<PathError> for Refusal {
    fn from(error: PathError) -> Self {
        let words = error.to_string();
        match error {
            PathError::Malformed { .. } => Self::Malformed(words),
            PathError::Unsupported { .. } => Self::Unsupported(words),
            PathError::Downgrade { .. } => Self::Downgrade(words),
            PathError::NoRelease { .. } | PathError::NoMinor { .. } => Self::NoRelease(words),
            PathError::Unverified { .. } => Self::Unverified(words),
            PathError::MinimumFrom { .. } | PathError::OtherMajor { .. } => Self::NoWay(words),
        }
    }
}

/// Reads a version as people write it.
///
/// # Errors
///
/// [`PathError::Malformed`] and [`PathError::Unsupported`].
pub fn parse(text: &str) -> Result<KubernetesVersion, PathError> {
    let version: KubernetesVersion = text
        .trim()
        .parse()
        .map_err(|_| PathError::Malformed { text: text.to_owned() })?;
    if version.minor() < OLDEST {
        return Err(PathError::Unsupported { version });
    }
    Ok(version)
}

/// The releases to go through from `current` to `version`, the last one being of that version; empty where the cluster is
/// there already.
///
/// Each is of the same minor as the one before it, or of the next. Of all ways the one with the fewest hops is taken, by the
/// highest patch of each minor; a second patch of a minor only where a release's `minimumFrom` leaves no other. Where several releases of one
/// version are known, `current` comes first, then verified ones, by digest.
///
/// # Errors
///
/// Why there is no way; see [`PathError`].
pub fn path<'a>(
    current: &'a ReleaseRef,
    version: &KubernetesVersion,
    known: &'a [KnownRelease],
) -> Result<Vec<&'a ReleaseRef>, PathError> {
    if *version == current.version {
        return Ok(Vec::new());
    }
    let (from, to) = (current.version.minor(), version.minor());
    if to.major != from.major {
        return Err(PathError::OtherMajor {
            version: version.clone(),
            from: current.version.clone(),
        });
    }
    if to < from {
        return Err(PathError::Downgrade {
            version: version.clone(),
            from: current.version.clone(),
        });
    }
    let target = known
        .iter()
        .filter(|k| k.release.version == *version)
        .min_by_key(|k| (k.verified.is_err(), Reverse(&k.release.digest)))
        .ok_or_else(|| PathError::NoRelease {
            version: version.clone(),
        })?;
    verified(target)?;
    // A minor without any release says more than "no way".
    for minor in (from.minor + 1..to.minor).map(|minor| Minor { major: to.major, minor }) {
        let mut of_minor = known.iter().filter(|k| k.release.version.minor() == minor).peekable();
        if of_minor.peek().is_none() {
            return Err(PathError::NoMinor {
                minor,
                version: version.clone(),
            });
        }
        if let Some(last) = of_minor.clone().max_by_key(|k| &k.release.version)
            && of_minor.all(|k| k.verified.is_err())
        {
            verified(last)?;
        }
    }
    shortest(current, target, known).ok_or_else(|| {
        let blamed = in_the_way(current, target, known);
        PathError::MinimumFrom {
            version: blamed.release.version.clone(),
            minimum: blamed
                .minimum_from
                .clone()
                .unwrap_or_else(|| blamed.release.version.clone()),
            from: current.version.clone(),
        }
    })
}

fn verified(known: &KnownRelease) -> Result<(), PathError> {
    known.verified.clone().map_err(|why| PathError::Unverified {
        version: known.release.version.clone(),
        why,
    })
}

/// Whether a cluster of `from` may take `to` in one hop.
fn one_hop(from: &KubernetesVersion, to: &KnownRelease) -> bool {
    let (a, b) = (from.minor(), to.release.version.minor());
    a.major == b.major
        && (a.minor == b.minor || a.minor + 1 == b.minor)
        && to.minimum_from.as_ref().is_none_or(|minimum| from >= minimum)
}

/// The way with the fewest hops; of equal ones, that which changes the minor last, by the highest releases.
fn shortest<'a>(
    current: &'a ReleaseRef,
    target: &'a KnownRelease,
    known: &'a [KnownRelease],
) -> Option<Vec<&'a ReleaseRef>> {
    // A patch may also be gone back to, in one hop.
    if one_hop(&current.version, target) {
        return Some(vec![&target.release]);
    }
    let mut stops: Vec<&KnownRelease> = known.iter().filter(|k| is_between(current, target, k)).collect();
    stops.sort_by_key(|k| &k.release);
    stops.push(target);
    // How each stop is reached best: after how many hops, and from which stop. Versions only rise on the way.
    let mut best: Vec<Option<(usize, Option<usize>)>> = Vec::with_capacity(stops.len());
    for (at, stop) in stops.iter().enumerate() {
        let minor = stop.release.version.minor();
        let direct = one_hop(&current.version, stop).then_some((1, None));
        let over = (0..at)
            .rev()
            .filter(|&before| one_hop(&stops[before].release.version, stop));
        let over = over.filter_map(|before| best[before].map(|(hops, _)| (hops + 1, Some(before))));
        let within_minor =
            |over: Option<usize>| over.is_some_and(|before| stops[before].release.version.minor() == minor);
        best.push(
            direct
                .into_iter()
                .chain(over)
                .min_by_key(|(hops, over)| (*hops, within_minor(*over))),
        );
    }
    let mut at = Some(stops.len() - 1);
    let mut way = Vec::new();
    while let Some(stop) = at {
        way.push(&stops[stop].release);
        (_, at) = best[stop]?;
    }
    way.reverse();
    Some(way)
}

fn is_between(current: &ReleaseRef, target: &KnownRelease, known: &KnownRelease) -> bool {
    let version = &known.release.version;
    known.verified.is_ok() && *version > current.version && *version < target.release.version
}

/// The release whose `minimumFrom` is in the way: the earliest that can't be reached and has one.
fn in_the_way<'a>(current: &'a ReleaseRef, target: &'a KnownRelease, known: &'a [KnownRelease]) -> &'a KnownRelease {
    let unreached = |k: &&KnownRelease| k.minimum_from.is_some() && shortest(current, k, known).is_none();
    let between = known
        .iter()
        .filter(|k| is_between(current, target, k))
        .filter(unreached);
    between.min_by_key(|k| &k.release).unwrap_or(target)
}

#[cfg(test)]
mod tests;
