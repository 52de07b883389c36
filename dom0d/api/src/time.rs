//! How points in time and durations are written in the API and on the command line.

use std::time::{Duration, SystemTime};

/// RFC 3339 in UTC with microseconds, of microseconds since the Unix epoch.
pub fn rfc3339(unix_us: u64) -> String {
    // The formatter knows years up to 9999; what lies beyond is a broken clock, shown as its end.
    const END_US: u64 = 253_402_300_799_999_999;
    let time = SystemTime::UNIX_EPOCH + Duration::from_micros(unix_us.min(END_US));
    humantime::format_rfc3339_micros(time).to_string()
}

/// Reads a point in time: RFC 3339 in UTC (`2026-11-23T10:00:00Z`), or an age (`90s`, `5m`, `1h 30m`)
/// that is taken off `now`. The result is in microseconds since the Unix epoch.
pub fn since(text: &str, now: SystemTime) -> Result<u64, String> {
    let time = match humantime::parse_duration(text) {
        Ok(age) => now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH),
        Err(_) => humantime::parse_rfc3339_weak(text).map_err(|_| {
            format!("{text:?} is neither an age such as 5m or 90s nor a time such as 2026-11-23T10:00:00Z")
        })?,
    };
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX))
}

/// Reads a duration such as `500ms`, `30s` or `2m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| format!("{text:?} is no duration such as 500ms, 30s or 2m"))
}

/// Writes a duration in its two largest units, such as `2h 5m`.
pub fn brief(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{}s", seconds),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc_with_microseconds() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(1_795_430_967_000_042), "2026-11-23T10:49:27.000042Z");
        assert_eq!(rfc3339(u64::MAX), "9999-12-31T23:59:59.999999Z");
    }

    #[test]
    fn since_takes_an_age_or_a_time() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        assert_eq!(since("90s", now), Ok(910_000_000));
        assert_eq!(since("0s", now), Ok(1_000_000_000));
        assert_eq!(since("9999days", now), Ok(0));
        assert_eq!(since("1970-01-01T00:00:01.5Z", now), Ok(1_500_000));
        assert!(since("1969-01-01T00:00:00Z", now).is_err());
        assert!(since("yesterday", now).is_err());
        assert!(since("", now).is_err());
    }

    #[test]
    fn durations_are_brief() {
        let brief_of = |seconds| brief(Duration::from_secs(seconds));
        assert_eq!(brief_of(7), "7s");
        assert_eq!(brief_of(67), "1m 7s");
        assert_eq!(brief_of(7_500), "2h 5m");
        assert_eq!(brief_of(180_000), "2d 2h");
    }
}
