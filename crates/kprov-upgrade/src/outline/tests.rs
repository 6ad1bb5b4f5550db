//! Outlines, word by word.

use super::*;
use crate::testing::cluster;

fn text(input: &Input) -> String {
    use std::fmt::Write as _;
    let outline = outline(input).unwrap();
    let mut text = String::new();
    for hop in &outline.hops {
        writeln!(text, "{} -> {}", hop.from, hop.to).unwrap();
        for step in &hop.steps {
            writeln!(text, "  {:<36} {}", step.id, step.message).unwrap();
        }
    }
    for waiting in &outline.waiting {
        writeln!(text, "  waiting for {waiting}").unwrap();
    }
    writeln!(text, "{:?}", outline.ends).unwrap();
    text
}

#[test]
fn two_minors_of_three_and_two() {
    let mut input = cluster("1.34.9", &["1.35.2", "1.35.6", "1.36.3"], 3, 2);
    input.wanted.desired = "1.36.3".to_owned();
    insta::assert_snapshot!(text(&input));
}

#[test]
fn before_daemon_sets_surge() {
    let mut input = cluster("1.20.2", &["1.21.14"], 2, 1);
    input.wanted.desired = "1.21.14".to_owned();
    insta::assert_snapshot!(text(&input));
}
