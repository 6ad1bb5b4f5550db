//! A reply of Azure Resource Manager, whatever its status.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde_json::Value;

/// Status, headers (by lower-case name) and body.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    /// `null` where there is none, or none that is JSON.
    pub(crate) body: Value,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    pub(crate) const fn is_success(&self) -> bool {
        matches!(self.status, 200..=299)
    }

    /// How long the server asks to wait: `Retry-After` in seconds or as a date, or the same in milliseconds.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        for name in ["retry-after-ms", "x-ms-retry-after-ms"] {
            if let Some(ms) = self.header(name).and_then(|v| v.parse().ok()) {
                return Some(Duration::from_millis(ms));
            }
        }
        let text = self.header("retry-after")?;
        match text.parse() {
            Ok(seconds) => Some(Duration::from_secs(seconds)),
            Err(_) => after_date(text, Timestamp::now()),
        }
    }

    /// The limit that is used up, from `x-ms-ratelimit-remaining-resource` (`Microsoft.Compute/PutVM3Min;0,...`).
    pub(crate) fn exhausted_limit(&self) -> Option<&str> {
        let limits = self.header("x-ms-ratelimit-remaining-resource")?;
        limits.split(',').find_map(|limit| {
            let (name, left) = limit.trim().rsplit_once(';')?;
            (left.trim().parse::<i64>().ok()? <= 0).then_some(name)
        })
    }
}

fn after_date(text: &str, now: Timestamp) -> Option<Duration> {
    // RFC 9110 writes the zone of its dates as `GMT`, which RFC 2822 knows too.
    let date = rfc2822::parse(text).ok()?.timestamp();
    Some(Duration::try_from(date.duration_since(now)).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> Reply {
        Reply {
            headers: [(name.to_owned(), value.to_owned())].into(),
            ..Reply::default()
        }
    }

    #[test]
    fn says_how_long_to_wait() {
        assert_eq!(with("retry-after", "17").retry_after(), Some(Duration::from_secs(17)));
        assert_eq!(
            with("x-ms-retry-after-ms", "250").retry_after(),
            Some(Duration::from_millis(250))
        );
        assert_eq!(with("retry-after", "soon").retry_after(), None);
        assert_eq!(Reply::default().retry_after(), None);
        let now: Timestamp = "2026-11-24T08:00:00Z".parse().unwrap();
        assert_eq!(
            after_date("Tue, 24 Nov 2026 08:00:30 GMT", now),
            Some(Duration::from_secs(30))
        );
        assert_eq!(after_date("Tue, 24 Nov 2026 07:00:00 GMT", now), Some(Duration::ZERO));
    }

    #[test]
    fn names_the_limit_that_is_used_up() {
        let reply = with(
            "x-ms-ratelimit-remaining-resource",
            "Microsoft.Compute/PutVM3Min;12,Microsoft.Compute/PutVM30Min;0",
        );
        assert_eq!(reply.exhausted_limit(), Some("Microsoft.Compute/PutVM30Min"));
        assert_eq!(with("x-ms-ratelimit-remaining-resource", "a;1").exhausted_limit(), None);
    }
}
