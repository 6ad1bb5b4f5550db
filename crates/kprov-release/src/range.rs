//! The `Range` header for one range of bytes (RFC 9110 section 14.2).

/// What a client asked for of a body with a known length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Requested {
    /// All of it. Also what is sent where the header is malformed or asks for several ranges, as the RFC allows.
    Whole,
    /// From the first to the last byte, both included.
    Part {
        /// The first byte.
        first: u64,
        /// The last byte.
        last: u64,
    },
    /// Nothing that exists.
    Unsatisfiable,
}

/// Reads the header's value for a body of `length` bytes.
pub(crate) fn parse(value: &str, length: u64) -> Requested {
    let Some((unit, range)) = value.split_once('=') else {
        return Requested::Whole;
    };
    let Some((first, last)) = range.trim().split_once('-') else {
        return Requested::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Requested::Whole;
    }
    // Digits only: `str::parse` would take a sign as well. A number too large for `u64` is past any end.
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (first, last) {
        ("", suffix) => match number(suffix) {
            None => Requested::Whole,
            Some(0) => Requested::Unsatisfiable,
            Some(_) if length == 0 => Requested::Unsatisfiable,
            Some(n) => Requested::Part {
                first: length.saturating_sub(n),
                last: length - 1,
            },
        },
        (first, last) => {
            let last = if last.is_empty() { Some(u64::MAX) } else { number(last) };
            match (number(first), last) {
                (Some(first), Some(last)) if first <= last && first < length => Requested::Part {
                    first,
                    last: last.min(length - 1),
                },
                (Some(first), Some(last)) if first <= last => Requested::Unsatisfiable,
                _ => Requested::Whole,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_rfc_says() {
        let part = |first, last| Requested::Part { first, last };
        for (value, length, wanted) in [
            ("bytes=0-499", 1000, part(0, 499)),
            ("bytes=500-999", 1000, part(500, 999)),
            ("bytes=500-", 1000, part(500, 999)),
            ("bytes=-500", 1000, part(500, 999)),
            ("bytes=-5000", 1000, part(0, 999)),
            ("BYTES=0-0", 1000, part(0, 0)),
            ("bytes=999-5000", 1000, part(999, 999)),
            ("bytes=0-99999999999999999999999", 1000, part(0, 999)),
            ("bytes=1000-", 1000, Requested::Unsatisfiable),
            ("bytes=99999999999999999999999-", 1000, Requested::Unsatisfiable),
            ("bytes=-0", 1000, Requested::Unsatisfiable),
            ("bytes=0-", 0, Requested::Unsatisfiable),
            ("bytes=-1", 0, Requested::Unsatisfiable),
            ("bytes=5-4", 1000, Requested::Whole),
            ("bytes=0-1,5-6", 1000, Requested::Whole),
            ("bytes=+1-2", 1000, Requested::Whole),
            ("bytes=a-b", 1000, Requested::Whole),
            ("bytes=-", 1000, Requested::Whole),
            ("bytes", 1000, Requested::Whole),
            ("lines=1-2", 1000, Requested::Whole),
            ("", 1000, Requested::Whole),
        ] {
            assert_eq!(parse(value, length), wanted, "{value} of {length}");
        }
    }
}
