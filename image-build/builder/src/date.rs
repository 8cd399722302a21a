//! Dates without a clock: the forms of a Release file, of CycloneDX and of a release's name.
//!
//! Day numbers by Howard Hinnant's "chrono-compatible low-level date algorithms".

/// Seconds since 1970 of a Release file's `Date`, such as `Sat, 21 Nov 2026 09:15:44 UTC`.
/// `None` when the text is anything else.
pub(crate) fn parse_release(text: &str) -> Option<u64> {
    let mut words = text.split_ascii_whitespace();
    let _weekday = words.next()?.strip_suffix(',')?;
    let day: u64 = words.next()?.parse().ok().filter(|d| (1..=31).contains(d))?;
    let name = words.next()?;
    let month = (1u64..).zip(MONTHS).find(|(_, m)| *m == name)?.0;
    let year: u64 = words.next()?.parse().ok().filter(|y| (1970..=9999).contains(y))?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let zone = matches!(words.next()?, "UTC" | "GMT" | "+0000");
    let whole = zone && words.next().is_none() && clock.next().is_none();
    if !whole || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    Some(day_number(year, month, day) * DAY + hour * 3600 + minute * 60 + second)
}

/// `2026-11-21T09:15:44Z`.
pub(crate) fn iso8601(seconds: u64) -> String {
    let (year, month, day) = civil(seconds / DAY);
    let rest = seconds % DAY;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// `20261121`.
pub(crate) fn compact(seconds: u64) -> String {
    let (year, month, day) = civil(seconds / DAY);
    format!("{year:04}{month:02}{day:02}")
}

/// Seconds of a day.
pub(crate) const DAY: u64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01, where the algorithm's year begins in March.
const EPOCH_DAYS: u64 = 719_468;
/// Days of 400 years.
const ERA_DAYS: u64 = 146_097;
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

fn day_number(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * ERA_DAYS + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH_DAYS
}

fn civil(day_number: u64) -> (u64, u64, u64) {
    let days = day_number + EPOCH_DAYS;
    let (era, day_of_era) = (days / ERA_DAYS, days % ERA_DAYS);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_date_is_read_and_written() {
        let seconds = parse_release("Sat, 21 Nov 2026 09:15:44 UTC").unwrap();
        assert_eq!(seconds, 1_795_252_544);
        assert_eq!(iso8601(seconds), "2026-11-21T09:15:44Z");
        assert_eq!(compact(seconds), "20261121");
    }

    #[test]
    fn leap_days_and_century_ends_are_right() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 UTC", 0),
            ("Tue, 29 Feb 2000 23:59:59 UTC", 951_868_799),
            ("Fri, 31 Dec 2100 00:00:00 GMT", 4_133_894_400),
            ("Thu, 29 Feb 2024 12:00:00 +0000", 1_709_208_000),
        ] {
            assert_eq!(parse_release(text), Some(seconds), "{text}");
        }
        assert_eq!(iso8601(951_868_799), "2000-02-29T23:59:59Z");
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "21 Nov 2026 09:15:44 UTC",
            "Sat, 32 Nov 2026 09:15:44 UTC",
            "Sat, 21 Nov 1969 09:15:44 UTC",
            "Sat, 21 Nov 2026 24:00:00 UTC",
            "Sat, 21 Nov 2026 09:15:44 CET",
            "Sat, 21 Nov 2026 09:15:44 UTC again",
            "Sat, 21 Nov 99999 09:15:44 UTC",
        ] {
            assert_eq!(parse_release(text), None, "{text}");
        }
    }
}
