//! Python's `strftime`, for templates that write the date. Knows nothing of the clock.

use crate::python::push;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `strftime` in UTC and English. `%-d` drops the leading zero, as glibc does.
pub(crate) fn strftime(format: &str, unix_s: i64) -> Result<String, String> {
    let days = unix_s.div_euclid(86400);
    let second_of_day = unix_s.rem_euclid(86400);
    let (year, month, day) = civil_from_days(days);
    let day_of_year = days - days_from_civil(year, 1, 1) + 1;
    let hour = second_of_day / 3600;
    let hour12 = (hour + 11) % 12 + 1;
    let weekday = WEEKDAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let mut number = |value: i64, width: usize| {
            let width = if padded { width } else { 0 };
            push(&mut out, format_args!("{value:0width$}"));
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(second_of_day / 60 % 60, 2),
            Some('S') => number(second_of_day % 60, 2),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => push(&mut out, format_args!("{year:04}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&strftime("%H:%M:%S", unix_s)?),
            Some('Z') => out.push_str("UTC"),
            Some('%') => out.push('%'),
            other => return Err(format!("strftime_now: directive {other:?} is not supported")),
        }
    }
    Ok(out)
}

/// Days since 1970-01-01 of a date of the Gregorian calendar, counted in years that begin in March.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let year_of_era = y.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let day = days + 719_468;
    let era = day.div_euclid(146_097);
    let day_of_era = day.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = (shifted + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected by Python: `datetime.fromtimestamp(t, timezone.utc).strftime(f)`.
    #[test]
    fn strftime_agrees_with_python() {
        let all = "%Y %y %m %-d %d %j %H %I %M %S %B %b %A %a %p %F %T %%";
        for (t, expected) in [
            (0, "1970 70 01 1 01 001 00 12 00 00 January Jan Thursday Thu AM 1970-01-01 00:00:00 %"),
            (
                951_826_554,
                "2000 00 02 29 29 060 12 12 15 54 February Feb Tuesday Tue PM 2000-02-29 12:15:54 %",
            ),
            (
                1_735_689_599,
                "2024 24 12 31 31 366 23 11 59 59 December Dec Tuesday Tue PM 2024-12-31 23:59:59 %",
            ),
            (-1, "1969 69 12 31 31 365 23 11 59 59 December Dec Wednesday Wed PM 1969-12-31 23:59:59 %"),
        ] {
            assert_eq!(strftime(all, t).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).unwrap_err().contains("'Q'"));
    }

    #[test]
    fn dates_round_trip() {
        for days in (-200_000..200_000).step_by(97) {
            let (y, m, d) = civil_from_days(days);
            assert_eq!(days_from_civil(y, m, d), days);
        }
    }
}
