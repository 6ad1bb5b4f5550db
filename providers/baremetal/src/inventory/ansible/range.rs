//! Host ranges of Ansible inventories: `node[1:3]`, `node[01:20:2].rack[a:c]`.

/// The most hosts that one pattern may stand for.
const LIMIT: usize = 5000;

/// All names that a pattern stands for, in order. The error says what is wrong with it.
pub(super) fn expand(pattern: &str) -> Result<Vec<String>, String> {
    let Some(open) = pattern.find('[') else {
        return if pattern.contains(']') {
            Err(format!("`{pattern}` has a `]` without a `[`"))
        } else {
            Ok(vec![pattern.to_owned()])
        };
    };
    let (head, rest) = pattern.split_at(open);
    let (range, tail) = rest
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
        .ok_or_else(|| format!("`{pattern}` has a `[` without a `]`"))?;
    let middles = items(range).map_err(|why| format!("`[{range}]` in `{pattern}` {why}"))?;
    let tails = expand(tail)?;
    if middles.len().saturating_mul(tails.len()) > LIMIT {
        return Err(format!("`{pattern}` stands for more than {LIMIT} hosts"));
    }
    Ok(middles
        .iter()
        .flat_map(|middle| tails.iter().map(move |tail| format!("{head}{middle}{tail}")))
        .collect())
}

fn items(range: &str) -> Result<Vec<String>, String> {
    let parts: Vec<&str> = range.split(':').collect();
    let (first, last, step) = match parts.as_slice() {
        [first, last] => (*first, *last, 1),
        [first, last, step] => {
            let step = step.parse().ok().filter(|step| *step > 0);
            (
                *first,
                *last,
                step.ok_or_else(|| "has a step that is no positive number".to_owned())?,
            )
        }
        _ => return Err("is no range: write `[first:last]`".into()),
    };
    // Ansible takes a range without a beginning to begin with 0.
    let first = if first.is_empty() { "0" } else { first };
    if let (Ok(from), Ok(to)) = (first.parse::<usize>(), last.parse::<usize>()) {
        if from > to {
            return Err("ends before it begins".into());
        }
        if (to - from) / step >= LIMIT {
            return Err(format!("stands for more than {LIMIT} hosts"));
        }
        // `[01:20]` keeps the width of its beginning.
        let width = if first.starts_with('0') { first.len() } else { 0 };
        if width > 1 && last.len() != first.len() {
            return Err("begins and ends with numbers of different width".into());
        }
        return Ok((from..=to).step_by(step).map(|n| format!("{n:0width$}")).collect());
    }
    match (first.as_bytes(), last.as_bytes()) {
        ([from], [to]) if from.is_ascii_alphabetic() && to.is_ascii_alphabetic() => {
            if from > to {
                return Err("ends before it begins".into());
            }
            Ok((*from..=*to)
                .filter(u8::is_ascii_alphabetic)
                .step_by(step)
                .map(|c| char::from(c).to_string())
                .collect())
        }
        _ => Err("is neither a range of numbers nor one of letters".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_expanded_as_ansible_does() {
        let cases: &[(&str, &[&str])] = &[
            ("node1", &["node1"]),
            ("node[1:3]", &["node1", "node2", "node3"]),
            ("node[08:10]", &["node08", "node09", "node10"]),
            ("node[1:6:2]", &["node1", "node3", "node5"]),
            ("db-[a:c].example", &["db-a.example", "db-b.example", "db-c.example"]),
            ("r[1:2]n[a:b]", &["r1na", "r1nb", "r2na", "r2nb"]),
            ("n[:2]", &["n0", "n1", "n2"]),
        ];
        for (pattern, expected) in cases {
            assert_eq!(expand(pattern).unwrap(), *expected, "{pattern}");
        }
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for (pattern, word) in [
            ("node[1:3", "without a `]`"),
            ("node1]", "without a `[`"),
            ("node[3:1]", "ends before"),
            ("node[1]", "no range"),
            ("node[a:9]", "neither"),
            ("node[01:100]", "width"),
            ("node[1:9:0]", "step"),
            ("node[1:99999999]", "more than"),
            ("n[1:99]n[1:99]", "more than"),
        ] {
            let why = expand(pattern).unwrap_err();
            assert!(why.contains(word), "{pattern}: {why}");
        }
    }

    proptest! {
        #[test]
        fn a_range_of_numbers_has_each_once_in_order(from in 0_usize..500, count in 1_usize..200, width in 1_usize..4) {
            let to = from + count - 1;
            let wide = |n: usize| format!("{n:0width$}");
            prop_assume!(width == 1 || wide(from).len() == wide(to).len());
            let names = expand(&format!("n[{}:{}]x", wide(from), wide(to))).unwrap();
            let first = wide(from);
            let width = if first.starts_with('0') { first.len() } else { 0 };
            let expected: Vec<String> = (from..=to).map(|n| format!("n{n:0width$}x")).collect();
            prop_assert_eq!(names, expected);
        }

        #[test]
        fn anything_is_expanded_or_refused(pattern in ".{0,40}") {
            if let Ok(names) = expand(&pattern) {
                prop_assert!(!names.is_empty() && names.len() <= LIMIT);
            }
        }
    }
}
