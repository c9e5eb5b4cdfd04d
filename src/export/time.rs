//! Times as text. An export writes four or five of them a row, which by chrono's formatter would take
//! longer than all the rest.

use chrono::{
    DateTime, Datelike as _, NaiveDateTime, Offset as _, TimeDelta, TimeZone as _, Timelike as _,
    Utc,
};
use chrono_tz::Tz;

/// Appends a time in UTC as every time is written in JSON.
pub(super) fn push_utc(out: &mut Vec<u8>, at: DateTime<Utc>) {
    push(out, at.naive_utc());
    out.push(b'Z');
}

/// Appends a time in `zone` with its offset, RFC 3339.
pub(super) fn push_local(out: &mut Vec<u8>, at: DateTime<Utc>, zone: Tz) {
    let (local, minutes) = local(at, zone);
    push(out, local);
    out.push(if minutes < 0 { b'-' } else { b'+' });
    let minutes = minutes.unsigned_abs();
    push_number(out, minutes / 60, 2);
    out.push(b':');
    push_number(out, minutes % 60, 2);
}

/// The time that clocks in `zone` show, and their distance from UTC in minutes.
///
/// Before there were time zones, clocks went by the sun, and zones have offsets such as -0:36:45, which
/// RFC 3339 cannot write. The seconds are left out of both, so that the instant stays the same.
pub(super) fn local(at: DateTime<Utc>, zone: Tz) -> (NaiveDateTime, i32) {
    let naive = at.naive_utc();
    let minutes = zone
        .offset_from_utc_datetime(&naive)
        .fix()
        .local_minus_utc()
        / 60;
    let local = naive.checked_add_signed(TimeDelta::minutes(i64::from(minutes)));
    // The ends of what chrono can represent are no times of events.
    local.map_or((naive, 0), |local| (local, minutes))
}

fn push(out: &mut Vec<u8>, at: NaiveDateTime) {
    match u32::try_from(at.year()) {
        Ok(year @ 0..=9999) => push_number(out, year, 4),
        // Other programs' rows may hold them; chrono reads this back.
        _ => out.extend_from_slice(format!("{:+05}", at.year()).as_bytes()),
    }
    for (before, number) in [
        (b'-', at.month()),
        (b'-', at.day()),
        (b'T', at.hour()),
        (b':', at.minute()),
        (b':', at.second()),
    ] {
        out.push(before);
        push_number(out, number, 2);
    }
    out.push(b'.');
    // Beyond a whole second chrono counts a leap second; neither engine keeps one.
    push_number(out, (at.nanosecond() / 1000).min(999_999), 6);
}

/// Appends the last `digits` digits of `number`.
fn push_number(out: &mut Vec<u8>, mut number: u32, digits: usize) {
    let begin = out.len();
    out.resize(begin + digits, b'0');
    for place in out[begin..].iter_mut().rev() {
        *place += u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
}

#[cfg(test)]
mod tests {
    use chrono::SecondsFormat;

    use super::*;
    use crate::domain::format_time;

    fn instants() -> Vec<DateTime<Utc>> {
        [
            "0001-01-01T00:00:00Z",
            "1883-05-06T07:08:09.000001Z",
            "1912-01-01T00:36:44.999999Z",
            "1969-12-31T23:59:59.999999Z",
            "2026-03-29T00:59:59.5Z",
            "2026-03-29T01:00:00Z",
            "2026-10-25T00:30:00Z",
            "9999-12-31T23:59:59.999999Z",
        ]
        .map(|text| text.parse().unwrap())
        .to_vec()
    }

    #[test]
    fn a_time_in_utc_is_written_as_everywhere() {
        for at in instants() {
            let mut text = Vec::new();
            push_utc(&mut text, at);
            assert_eq!(String::from_utf8(text).unwrap(), format_time(at));
        }
    }

    #[test]
    fn a_local_time_is_what_chrono_writes_and_reads_back_to_the_instant() {
        for zone in [
            chrono_tz::UTC,
            chrono_tz::Europe::Lisbon,
            chrono_tz::Asia::Kathmandu,
            chrono_tz::America::St_Johns,
        ] {
            for at in instants() {
                let mut text = Vec::new();
                push_local(&mut text, at, zone);
                let text = String::from_utf8(text).unwrap();
                let read = DateTime::parse_from_rfc3339(&text);
                if at.year() < 9999 && at.year() > 1 {
                    assert_eq!(read.unwrap(), at, "{text}");
                }
                let local = at.with_timezone(&zone);
                if local.offset().fix().local_minus_utc() % 60 == 0 {
                    assert_eq!(text, local.to_rfc3339_opts(SecondsFormat::Micros, false));
                }
            }
        }
    }
}
