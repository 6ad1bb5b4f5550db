//! Ways between releases.

use super::*;
use crate::testing::{known, release, version};

fn releases(texts: &[&str]) -> Vec<KnownRelease> {
    texts.iter().map(|text| known(text)).collect()
}

fn to(from: &str, to: &str, known: &[KnownRelease]) -> Result<Vec<String>, PathError> {
    let current = release(from);
    let path = path(&current, &version(to), known)?;
    Ok(path.into_iter().map(ToString::to_string).collect())
}

#[test]
fn ways() {
    let known = releases(&["1.34.9", "1.34.11", "1.35.2", "1.35.10", "1.36.3", "1.36.4", "1.37.0"]);
    for (from, target, expected) in [
        ("1.34.9", "1.34.9", vec![]),
        ("1.34.9", "1.34.11", vec!["1.34.11"]),
        ("1.34.11", "1.34.9", vec!["1.34.9"]),
        ("1.34.9", "1.35.2", vec!["1.35.2"]),
        // The highest patch of a minor on the way, by number and not by letter; no patch of the first minor.
        ("1.34.9", "1.36.3", vec!["1.35.10", "1.36.3"]),
        ("1.34.9", "1.37.0", vec!["1.35.10", "1.36.4", "1.37.0"]),
    ] {
        assert_eq!(to(from, target, &known).unwrap(), expected, "{from} -> {target}");
    }
}

#[test]
fn versions_are_read_as_people_write_them() {
    assert_eq!(parse("v1.36.3").unwrap(), version("1.36.3"));
    assert_eq!(parse(" 1.36.3\n").unwrap(), version("1.36.3"));
    // Newer than anything known is not for this module to refuse.
    assert_eq!(parse("1.99.0").unwrap(), version("1.99.0"));
    for bad in ["", "1.36", "latest", "1.36.x", "1.36.3 please"] {
        assert_eq!(parse(bad), Err(PathError::Malformed { text: bad.to_owned() }));
    }
    let refusal = Refusal::from(parse("1.19.16").unwrap_err());
    assert_eq!(refusal.reason(), "UnsupportedVersion");
    assert_eq!(
        refusal.to_string(),
        "1.19.16 is not supported; the oldest minor that is, is 1.20"
    );
}

#[test]
fn refusals() {
    let mut known = releases(&["1.34.9", "1.35.6", "1.37.1"]);
    known[1].verified = Err("its signature is of no known key".to_owned());
    for (target, reason, words) in [
        (
            "1.33.9",
            "Downgrade",
            "1.33.9 is a minor behind 1.34.9: Kubernetes can't go back a minor",
        ),
        ("1.34.10", "NoRelease", "the cluster knows no release 1.34.10"),
        (
            "1.35.6",
            "UnverifiedRelease",
            "the release 1.35.6 is not verified: its signature is of no known key",
        ),
        ("1.36.0", "NoRelease", "the cluster knows no release 1.36.0"),
        ("2.0.0", "NoWay", "2.0.0 is of another major version than 1.34.9"),
    ] {
        let refusal = Refusal::from(to("1.34.9", target, &known).unwrap_err());
        assert_eq!((refusal.reason(), refusal.to_string().as_str()), (reason, words));
    }
}

#[test]
fn a_minor_that_is_missing_is_named() {
    let refusal = Refusal::from(to("1.34.9", "1.37.1", &releases(&["1.34.9", "1.35.6", "1.37.1"])).unwrap_err());
    assert_eq!(
        refusal.to_string(),
        "the cluster knows no release of 1.36, which is on the way to 1.37.1: minors can't be skipped"
    );
}

#[test]
fn an_unverified_release_on_the_way_is_passed_over_where_another_is_good() {
    let mut known = releases(&["1.34.9", "1.35.5", "1.35.6", "1.36.3"]);
    known[2].verified = Err("no signature".to_owned());
    assert_eq!(to("1.34.9", "1.36.3", &known).unwrap(), ["1.35.5", "1.36.3"]);
    known[1].verified = Err("no signature".to_owned());
    let error = to("1.34.9", "1.36.3", &known).unwrap_err();
    assert_eq!(error.to_string(), "the release 1.35.6 is not verified: no signature");
}

#[test]
fn minimum_from_is_obeyed() {
    let mut known = releases(&["1.34.5", "1.34.9", "1.35.2", "1.35.6", "1.36.3"]);
    // From 1.34.5, 1.35.6 is reached by a patch first. 1.36.3 is reached without it, in as many hops as there are minors.
    known[3].minimum_from = Some(version("1.34.8"));
    assert_eq!(to("1.34.5", "1.35.6", &known).unwrap(), ["1.34.9", "1.35.6"]);
    assert_eq!(to("1.34.5", "1.36.3", &known).unwrap(), ["1.35.2", "1.36.3"]);
    assert_eq!(to("1.34.9", "1.36.3", &known).unwrap(), ["1.35.6", "1.36.3"]);
    // A release that leads nowhere is not taken where another of its minor leads on.
    known[3].minimum_from = Some(version("1.34.10"));
    assert_eq!(to("1.34.5", "1.36.3", &known).unwrap(), ["1.35.2", "1.36.3"]);
    known[2].minimum_from = Some(version("1.34.20"));
    let refusal = Refusal::from(to("1.34.5", "1.36.3", &known).unwrap_err());
    assert_eq!(refusal.reason(), "NoWay");
    assert_eq!(
        refusal.to_string(),
        "1.35.2 may be reached only from 1.34.20 on, and no known release leads there from 1.34.5"
    );
    // It never allows what is not allowed without it.
    known[4].minimum_from = Some(version("1.34.0"));
    assert!(to("1.34.5", "1.36.3", &known).is_err());
}

#[test]
fn many_releases_that_lead_nowhere_end_soon() {
    let mut known: Vec<KnownRelease> = (20..60)
        .flat_map(|minor| (0..10).map(move |patch| known(&format!("1.{minor}.{patch}"))))
        .collect();
    for known in &mut known {
        known.minimum_from = Some(version("1.99.0"));
    }
    assert!(matches!(
        to("1.20.0", "1.59.9", &known),
        Err(PathError::MinimumFrom { .. })
    ));
}

#[test]
fn of_two_releases_of_a_version_the_verified_one_is_taken() {
    let mut known = releases(&["1.34.9", "1.35.6", "1.35.6"]);
    known[1].release.digest = kprov_types::Digest::from_bytes([255; 32]);
    known[1].verified = Err("no signature".to_owned());
    let current = release("1.34.9");
    assert_eq!(path(&current, &version("1.35.6"), &known).unwrap(), [&known[2].release]);
    known[1].verified = Ok(());
    assert_eq!(path(&current, &version("1.35.6"), &known).unwrap(), [&known[1].release]);
}
