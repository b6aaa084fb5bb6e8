//! Timestamps in the form of Go's `RFC3339Nano`, which clients parse.

use rustix::time::{ClockId, clock_gettime};

/// Now, in UTC.
#[must_use]
pub fn now_rfc3339() -> String {
    let now = clock_gettime(ClockId::Realtime);
    format_rfc3339(now.tv_sec, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Seconds and nanoseconds since 1970 as text.
#[must_use]
pub fn format_rfc3339(seconds: i64, nanoseconds: u32) -> String {
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) =
        (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let fraction = format!(".{nanoseconds:09}");
    let fraction = fraction.trim_end_matches('0').trim_end_matches('.');
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Gregorian date of a day number (Howard Hinnant, "chrono-compatible low-level date
/// algorithms"): eras of 400 years, years that begin in March.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_rendered_as_go_does() {
        assert_eq!(format_rfc3339(0, 0), "1970-01-01T00:00:00Z");
        assert_eq!(format_rfc3339(951_782_399, 120_000_000), "2000-02-28T23:59:59.12Z");
        assert_eq!(format_rfc3339(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(format_rfc3339(4_102_444_799, 0), "2099-12-31T23:59:59Z");
    }
}
