//! A reply of Azure Resource Manager, whatever its status.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde_json::Value;

/// How long to wait when throttled without being told.
pub(crate) const THROTTLED: Duration = Duration::from_secs(15);

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

    /// How long to wait where this was one request too many.
    pub(crate) fn throttled(&self) -> Option<Duration> {
        (self.status == 429).then(|| self.retry_after().unwrap_or(THROTTLED))
    }

    /// How many requests are left of the limit that is nearest to its end (`x-ms-ratelimit-remaining-subscription-reads: 11987`,
    /// `x-ms-ratelimit-remaining-resource: Microsoft.Compute/PutVM3Min;12,...`).
    pub(crate) fn calls_left(&self) -> Option<usize> {
        let limits = self.headers.range("x-ms-ratelimit-remaining-".to_owned()..);
        let limits = limits.take_while(|(name, _)| name.starts_with("x-ms-ratelimit-remaining-"));
        let counts = limits.flat_map(|(_, value)| value.split(','));
        counts
            .filter_map(|limit| limit.rsplit(';').next()?.trim().parse::<i64>().ok())
            .map(|left| usize::try_from(left).unwrap_or(0))
            .min()
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
        assert_eq!(reply.calls_left(), Some(0));
        let mut reply = with("x-ms-ratelimit-remaining-subscription-reads", "11987");
        assert_eq!(reply.calls_left(), Some(11_987));
        reply
            .headers
            .insert("x-ms-ratelimit-remaining-resource".into(), "a/b;7, a/c;-1".into());
        assert_eq!(reply.calls_left(), Some(0));
        assert_eq!(with("x-ms-request-id", "3").calls_left(), None);
    }

    #[test]
    fn tells_throttled_from_other_refusals() {
        let mut reply = with("retry-after", "3");
        assert_eq!(reply.throttled(), None);
        reply.status = 429;
        assert_eq!(reply.throttled(), Some(Duration::from_secs(3)));
        reply.headers.clear();
        assert_eq!(reply.throttled(), Some(THROTTLED));
    }
}
