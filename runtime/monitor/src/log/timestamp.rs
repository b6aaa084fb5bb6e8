//! Timestamps of log records: RFC 3339, UTC, always nine digits of fraction.

use std::time::{SystemTime, UNIX_EPOCH};

/// Length of a timestamp, in bytes.
pub const LENGTH: usize = 30;

const TEMPLATE: &[u8; LENGTH] = b"0000-00-00T00:00:00.000000000Z";

/// The time as `2024-05-06T07:08:09.000000001Z`; years past 9999 are written modulo 10000.
#[must_use]
pub fn format(time: SystemTime) -> [u8; LENGTH] {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = date(since.as_secs() / 86_400);
    let second = since.as_secs() % 86_400;
    let mut text = *TEMPLATE;
    digits(&mut text, 0..4, year % 10_000);
    digits(&mut text, 5..7, month);
    digits(&mut text, 8..10, day);
    digits(&mut text, 11..13, second / 3600);
    digits(&mut text, 14..16, second / 60 % 60);
    digits(&mut text, 17..19, second % 60);
    digits(&mut text, 20..29, since.subsec_nanos().into());
    text
}

fn digits(text: &mut [u8; LENGTH], place: std::ops::Range<usize>, mut value: u64) {
    for digit in text.get_mut(place).unwrap_or_default().iter_mut().rev() {
        *digit = b'0' + u8::try_from(value % 10).unwrap_or(0);
        value /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar: the
/// year is taken to begin in March, so that the leap day is its last.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let era = days / 146_097; // of 400 years
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153; // 0 is March
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_moments_are_written_as_rfc_3339() {
        // Reference: `date -u -d @N +%FT%T`.
        for (seconds, nanoseconds, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_827_696, 7, "2000-02-29T12:34:56.000000007Z"),
            (1_714_979_289, 123_456_789, "2024-05-06T07:08:09.123456789Z"),
            (4_107_542_399, 999_999_999, "2100-02-28T23:59:59.999999999Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
        ] {
            let moment = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
            assert_eq!(std::str::from_utf8(&format(moment)).unwrap(), text);
        }
    }
}
