//! Names of machines that are made by one call.
//!
//! `RunInstances` gives all instances of a call the same tags and the same user data. What differs is the launch index,
//! which both the API and the instance itself tell. So a tag names a *series*, and an instance's name is the one at its
//! index: `demo-worker-2..11..3` is `demo-worker-2`, `-5`, `-8` and `-11`.

use std::fmt;
use std::str::FromStr;

use kprov_types::MachineName;

/// The most machines that one call makes.
pub(crate) const MOST: u32 = 100;

/// Names with one prefix and numbers in even steps; or a single name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Series {
    prefix: String,
    /// None for a name that does not end in a number.
    numbers: Option<Numbers>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Numbers {
    first: u32,
    step: u32,
    count: u32,
}

impl Series {
    /// A name by itself.
    pub(crate) fn single(name: &MachineName) -> Self {
        let (prefix, number) = split(name.as_str());
        Self {
            prefix: prefix.to_owned(),
            numbers: number.map(|first| Numbers {
                first,
                step: 1,
                count: 1,
            }),
        }
    }

    /// How many names it has.
    pub(crate) fn count(&self) -> u32 {
        self.numbers.map_or(1, |n| n.count)
    }

    /// The name at a launch index.
    pub(crate) fn name(&self, index: u32) -> Option<MachineName> {
        let text = match self.numbers {
            None if index == 0 => self.prefix.clone(),
            Some(n) if index < n.count => {
                let number = n.step.checked_mul(index).and_then(|i| i.checked_add(n.first))?;
                format!("{}{number}", self.prefix)
            }
            _ => return None,
        };
        MachineName::new(text).ok()
    }

    /// All its names.
    pub(crate) fn names(&self) -> Vec<MachineName> {
        (0..self.count()).filter_map(|i| self.name(i)).collect()
    }

    /// Shell that sets `name` from the launch index in `index`; the index is not used where there is but one name.
    pub(crate) fn shell(&self) -> String {
        match self.numbers {
            Some(Numbers { first, step, count }) if count > 1 => {
                format!("name=\"{}$(({first} + index * {step}))\"", self.prefix)
            }
            _ => format!("name=\"{self}\""),
        }
    }

    /// The fewest series, found greedily, that have all these names and no other; none longer than [`MOST`].
    pub(crate) fn of(names: &[MachineName]) -> Vec<Self> {
        let mut sorted: Vec<(&str, Option<u32>)> = names.iter().map(|n| split(n.as_str())).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut found: Vec<Self> = Vec::new();
        for (prefix, number) in sorted {
            let Some(number) = number else {
                found.push(Self {
                    prefix: prefix.to_owned(),
                    numbers: None,
                });
                continue;
            };
            if let Some(Self {
                prefix: last,
                numbers: Some(n),
            }) = found.last_mut()
                && last == prefix
                && n.count < MOST
                && (n.count == 1 || n.first + n.step * n.count == number)
            {
                if n.count == 1 {
                    n.step = number - n.first;
                }
                n.count += 1;
                continue;
            }
            found.push(Self {
                prefix: prefix.to_owned(),
                numbers: Some(Numbers {
                    first: number,
                    step: 1,
                    count: 1,
                }),
            });
        }
        found
    }
}

/// A name's number at its end, if it has one that is written without zeros in front.
fn split(name: &str) -> (&str, Option<u32>) {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (prefix, number) = name.split_at(name.len() - digits);
    match number.parse::<u32>() {
        Ok(n) if n.to_string() == number && n < 1_000_000 => (prefix, Some(n)),
        _ => (name, None),
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.numbers {
            None => f.write_str(&self.prefix),
            Some(Numbers { first, count: 1, .. }) => write!(f, "{}{first}", self.prefix),
            Some(Numbers { first, step, count }) => {
                write!(f, "{}{first}..{}..{step}", self.prefix, first + step * (count - 1))
            }
        }
    }
}

/// A tag that names no series.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotASeries;

impl FromStr for Series {
    type Err = NotASeries;

    fn from_str(text: &str) -> Result<Self, NotASeries> {
        let mut parts = text.split("..");
        let name = parts.next().unwrap_or_default();
        let single = Self::single(&MachineName::new(name).map_err(|_| NotASeries)?);
        let (Some(last), Some(step)) = (parts.next(), parts.next()) else {
            return if text == name { Ok(single) } else { Err(NotASeries) };
        };
        let (last, step): (u32, u32) = (
            last.parse().map_err(|_| NotASeries)?,
            step.parse().map_err(|_| NotASeries)?,
        );
        let first = single.numbers.ok_or(NotASeries)?.first;
        if parts.next().is_some() || step == 0 || last <= first || (last - first) % step != 0 {
            return Err(NotASeries);
        }
        Ok(Self {
            numbers: Some(Numbers {
                first,
                step,
                count: (last - first) / step + 1,
            }),
            ..single
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn names(all: &[&str]) -> Vec<MachineName> {
        all.iter().map(|n| MachineName::new(*n).unwrap()).collect()
    }

    fn texts(all: &[&str]) -> Vec<String> {
        Series::of(&names(all)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn series_are_found() {
        assert_eq!(texts(&["a-1", "a-4", "a-7", "a-8"]), ["a-1..7..3", "a-8"]);
        assert_eq!(texts(&["b", "a-0", "a-01"]), ["a-0", "a-01", "b"]);
        assert_eq!(texts(&["a-0", "a-1", "b-0"]), ["a-0..1..1", "b-0"]);
        let many: Vec<MachineName> = (0..250).map(|i| MachineName::new(format!("w-{i}")).unwrap()).collect();
        assert_eq!(
            Series::of(&many).iter().map(Series::count).collect::<Vec<_>>(),
            [100, 100, 50]
        );
    }

    #[test]
    fn names_by_index() {
        let series: Series = "demo-worker-2..11..3".parse().unwrap();
        assert_eq!(
            series.names(),
            names(&["demo-worker-2", "demo-worker-5", "demo-worker-8", "demo-worker-11"])
        );
        assert_eq!(series.name(4), None);
        for bad in [
            "",
            "a..3..1",
            "a-1..0..1",
            "a-1..2",
            "a-1..4..2",
            "a-1..4..0",
            "a-1..4..1..1",
            "A",
        ] {
            assert_eq!(bad.parse::<Series>(), Err(NotASeries), "{bad}");
        }
    }

    #[test]
    fn the_shell_gets_the_same_name() {
        for text in ["demo-cp-0", "lonely", "demo-worker-2..11..3", "x10..12..1"] {
            let series: Series = text.parse().unwrap();
            for (index, name) in series.names().iter().enumerate() {
                let script = format!("index={index}\n{}\necho $name", series.shell());
                let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
                assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), name.as_str());
            }
        }
    }

    proptest! {
        #[test]
        fn series_have_the_names_and_no_other(numbers in prop::collection::btree_set(0_u32..400, 0..120)) {
            let all: Vec<MachineName> = numbers.iter().map(|n| MachineName::new(format!("w-{n}")).unwrap()).collect();
            let found = Series::of(&all);
            let mut back: Vec<MachineName> = found.iter().flat_map(Series::names).collect();
            prop_assert_eq!(back.len(), all.len());
            back.sort();
            let expected: BTreeSet<MachineName> = all.into_iter().collect();
            prop_assert_eq!(back.into_iter().collect::<BTreeSet<_>>(), expected);
            for series in found {
                prop_assert_eq!(series.to_string().parse::<Series>(), Ok(series));
            }
        }
    }
}
