//! What a value of a key may be: its type, its bounds, and the words that tell an operator.
//!
//! A [`Rule`] is a value and not a type's trait, since bounds belong to keys: two keys that hold a duration seldom allow
//! the same ones. `config` would turn `"256"` into 256 and `1` into true; here a file means what it says, and only
//! the environment, which knows nothing but text, is turned into numbers, flags and lists, and that by the rule.

use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use config::{Value, ValueKind};

use super::error::{Problem, nearest};

/// A value as it was written, before a rule made something of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw {
    Text(String),
    Integer(i128),
    Float(f64),
    Flag(bool),
    List(Vec<Raw>),
    Table,
}

/// How a raw value becomes a `T`.
pub(super) struct Rule<T> {
    /// What is allowed, in words that follow "what is wrong; ".
    allowed: String,
    /// What the text of an environment variable stands for.
    of_variable: fn(&str) -> Raw,
    read: Reader<T>,
}

type Reader<T> = Box<dyn Fn(&Raw) -> Result<T, Problem>>;

impl<T: 'static> Rule<T> {
    /// Makes a `T` of a value of the file, or of a default.
    pub(super) fn read(&self, raw: &Raw) -> Result<T, Problem> {
        (self.read)(raw).map_err(|problem| problem.allowed(&self.allowed))
    }

    /// Something wrong, with what this rule allows.
    pub(super) fn problem(&self, wrong: &str) -> Problem {
        Problem::new(wrong).allowed(&self.allowed)
    }

    /// The raw value that the text of an environment variable stands for.
    pub(super) fn of_variable(&self, text: &str) -> Raw {
        (self.of_variable)(text)
    }

    /// The same rule, followed by a further step.
    pub(super) fn then<U: 'static>(
        self,
        step: impl Fn(T) -> Result<U, Problem> + 'static,
    ) -> Rule<U> {
        Rule {
            allowed: self.allowed,
            of_variable: self.of_variable,
            read: Box::new(move |raw| step((self.read)(raw)?)),
        }
    }
}

/// Text of which `parse` makes a `T`.
pub(super) fn text<T: 'static>(
    allowed: impl Into<String>,
    parse: impl Fn(&str) -> Result<T, Problem> + 'static,
) -> Rule<T> {
    Rule {
        allowed: allowed.into(),
        of_variable: |text| Raw::Text(text.to_owned()),
        read: Box::new(move |raw| match raw {
            Raw::Text(text) => parse(text),
            other => Err(Problem::new(format!(
                "{other} is {}, not text in quotes",
                other.kind()
            ))),
        }),
    }
}

/// Text that is not empty.
pub(super) fn words(allowed: impl Into<String>) -> Rule<String> {
    text(allowed, |text| match text.trim() {
        "" => Err(Problem::new("is empty")),
        _ => Ok(text.to_owned()),
    })
}

/// Text of which its own type makes a value.
pub(super) fn parsed<T>(allowed: impl Into<String>) -> Rule<T>
where
    T: FromStr<Err: Display> + 'static,
{
    text(allowed, |text| {
        text.parse()
            .map_err(|error: T::Err| Problem::new(format!("{text:?} is not valid ({error})")))
    })
}

/// One of a few names.
pub(super) fn choice<T: Clone + Sync>(choices: &'static [(&'static str, T)]) -> Rule<T> {
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    text(one_of(&names), move |text| {
        let found = choices.iter().find(|(name, _)| *name == text);
        found
            .map(|(_, value)| value.clone())
            .ok_or_else(|| unknown_name(text, &names))
    })
}

/// One of a few names, each of which its own type parses.
pub(super) fn named<T: FromStr + 'static>(names: &'static [&'static str]) -> Rule<T> {
    text(one_of(names), move |text| {
        // Whatever is wrong with it, the names are the answer.
        let known = names.contains(&text);
        text.parse()
            .ok()
            .filter(|_| known)
            .ok_or_else(|| unknown_name(text, names))
    })
}

/// A whole number within bounds.
pub(super) fn number<T>(bounds: RangeInclusive<T>) -> Rule<T>
where
    T: TryFrom<i128> + Into<i128> + Copy + Display + 'static,
{
    let (least, most) = (*bounds.start(), *bounds.end());
    Rule {
        allowed: format!("a whole number from {least} to {most}"),
        of_variable: |text| {
            text.parse()
                .map_or_else(|_not_a_number| Raw::Text(text.to_owned()), Raw::Integer)
        },
        read: Box::new(move |raw| match raw {
            Raw::Integer(number) if *number < least.into() => {
                Err(Problem::new(format!("{number} is too small")))
            }
            Raw::Integer(number) => T::try_from(*number)
                .ok()
                .filter(|_| *number <= most.into())
                .ok_or_else(|| Problem::new(format!("{number} is too large"))),
            other => Err(Problem::new(format!(
                "{other} is {}, not a whole number",
                other.kind()
            ))),
        }),
    }
}

/// `true` or `false`.
pub(super) fn flag() -> Rule<bool> {
    Rule {
        allowed: "true or false, without quotes".to_owned(),
        of_variable: |text| {
            text.parse()
                .map_or_else(|_not_a_flag| Raw::Text(text.to_owned()), Raw::Flag)
        },
        read: Box::new(|raw| match raw {
            Raw::Flag(flag) => Ok(*flag),
            other => Err(Problem::new(format!("{other} is {}", other.kind()))),
        }),
    }
}

/// A list of values that follow one rule; from the environment, separated by commas.
pub(super) fn list<T: 'static>(item: Rule<T>) -> Rule<Vec<T>> {
    Rule {
        allowed: format!("a list, each item {}", item.allowed),
        of_variable: |text| {
            let items = text
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty());
            Raw::List(items.map(|item| Raw::Text(item.to_owned())).collect())
        },
        read: Box::new(move |raw| match raw {
            Raw::List(items) => items.iter().map(|raw| (item.read)(raw)).collect(),
            other => Err(Problem::new(format!(
                "{other} is {}, not a list in brackets",
                other.kind()
            ))),
        }),
    }
}

/// A duration within bounds, such as `"90s"` or `"7d"`.
pub(super) fn duration(bounds: RangeInclusive<Duration>) -> Rule<Duration> {
    let allowed = format!(
        "a duration from {} to {}, such as \"90s\" or \"1h 30m\"",
        short(*bounds.start()),
        short(*bounds.end())
    );
    let read = move |raw: &Raw| {
        let text = match raw {
            Raw::Text(text) => text.trim(),
            Raw::Integer(number) => return Err(without_unit(&number.to_string())),
            other => {
                return Err(Problem::new(format!(
                    "{other} is {}, not text in quotes",
                    other.kind()
                )));
            }
        };
        if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
            return Err(without_unit(text));
        }
        let duration = humantime::parse_duration(text)
            .map_err(|error| Problem::new(format!("{text:?} is not a duration ({error})")))?;
        if duration < *bounds.start() {
            Err(Problem::new(format!("{text:?} is too short")))
        } else if duration > *bounds.end() {
            Err(Problem::new(format!("{text:?} is too long")))
        } else {
            Ok(duration)
        }
    };
    Rule {
        allowed,
        of_variable: |text| Raw::Text(text.to_owned()),
        read: Box::new(read),
    }
}

/// A number of bytes up to `most`, such as `"7MiB"`.
pub(super) fn size(most: u64) -> Rule<u64> {
    Rule {
        allowed: format!(
            "a size up to {}MiB in B, KiB, MiB, GiB, KB, MB or GB, such as \"7MiB\"",
            most >> 20
        ),
        of_variable: |text| Raw::Text(text.to_owned()),
        read: Box::new(move |raw| {
            let text = match raw {
                Raw::Text(text) => text.trim(),
                Raw::Integer(number) => {
                    return Err(Problem::new(format!("{number} has no unit"))
                        .suggest(Some(format!("{number}B"))));
                }
                other => {
                    return Err(Problem::new(format!(
                        "{other} is {}, not text in quotes",
                        other.kind()
                    )));
                }
            };
            let bytes = bytes_of(text)?;
            if bytes > most {
                return Err(Problem::new(format!("{text:?} is too large")));
            }
            Ok(bytes)
        }),
    }
}

fn bytes_of(text: &str) -> Result<u64, Problem> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let not_a_size = || Problem::new(format!("{text:?} is not a size"));
    if number.is_empty() {
        return Err(not_a_size());
    }
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "" => {
            return Err(
                Problem::new(format!("{text:?} has no unit")).suggest(Some(format!("{number}B")))
            );
        }
        _ => return Err(not_a_size()),
    };
    // All digits, so it can only be too large.
    let number: Option<u64> = number.parse().ok();
    number
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| Problem::new(format!("{text:?} is too large")))
}

/// A duration in its largest whole unit, as an operator would write it.
pub(super) fn short(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "m"),
        (1_000, "s"),
    ]
    .into_iter()
    .find(|(unit, _)| milliseconds > 0 && milliseconds.is_multiple_of(*unit))
    .map_or_else(
        || {
            if milliseconds == 0 {
                "0s".to_owned()
            } else {
                format!("{milliseconds}ms")
            }
        },
        |(unit, name)| format!("{}{name}", milliseconds / unit),
    )
}

fn without_unit(number: &str) -> Problem {
    Problem::new(format!("{number} has no unit")).suggest(Some(format!("{number}s")))
}

fn unknown_name(text: &str, names: &[&str]) -> Problem {
    Problem::new(format!("{text:?} is unknown")).suggest(nearest(text, names.iter().copied()))
}

fn one_of(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    match quoted.split_last() {
        Some((only, [])) => format!("only {only}"),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

impl Raw {
    pub(super) fn of(value: &Value) -> Self {
        match &value.kind {
            ValueKind::Nil => Self::Text(String::new()),
            ValueKind::Boolean(flag) => Self::Flag(*flag),
            ValueKind::I64(number) => Self::Integer((*number).into()),
            ValueKind::I128(number) => Self::Integer(*number),
            ValueKind::U64(number) => Self::Integer((*number).into()),
            ValueKind::U128(number) => Self::Integer(i128::try_from(*number).unwrap_or(i128::MAX)),
            ValueKind::Float(number) => Self::Float(*number),
            ValueKind::String(text) => Self::Text(text.clone()),
            ValueKind::Array(items) => Self::List(items.iter().map(Self::of).collect()),
            ValueKind::Table(_) => Self::Table,
        }
    }

    /// The kind of value, in an operator's words.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::Flag(_) => "a flag",
            Self::List(_) => "a list",
            Self::Table => "a table",
        }
    }
}

impl Display for Raw {
    /// As TOML writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{}", toml::Value::from(text.as_str())),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::List(items) => {
                let items: Vec<String> = items.iter().map(ToString::to_string).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Self::Table => f.write_str("{ … }"),
        }
    }
}

impl From<&str> for Raw {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<bool> for Raw {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<u16> for Raw {
    fn from(number: u16) -> Self {
        Self::Integer(number.into())
    }
}

impl<const N: usize> From<[Raw; N]> for Raw {
    fn from(items: [Raw; N]) -> Self {
        Self::List(items.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said<T: 'static>(rule: &Rule<T>, raw: impl Into<Raw>) -> String {
        rule.read(&raw.into()).err().unwrap().to_string()
    }

    #[test]
    fn a_duration_needs_a_unit_and_bounds() {
        let rule = duration(Duration::from_secs(1)..=Duration::from_mins(10));
        assert_eq!(rule.read(&"90s".into()), Ok(Duration::from_secs(90)));
        assert_eq!(rule.read(&"10m".into()), Ok(Duration::from_mins(10)));
        let allowed = r#"a duration from 1s to 10m, such as "90s" or "1h 30m""#;
        for (given, wrong) in [
            (
                Raw::from("30"),
                format!(r#"30 has no unit; {allowed}; did you mean "30s"?"#),
            ),
            (
                Raw::Integer(30),
                format!(r#"30 has no unit; {allowed}; did you mean "30s"?"#),
            ),
            (
                Raw::from("999ms"),
                format!(r#""999ms" is too short; {allowed}"#),
            ),
            (Raw::from("11m"), format!(r#""11m" is too long; {allowed}"#)),
            (
                Raw::from(""),
                format!(r#""" is not a duration (value was empty); {allowed}"#),
            ),
            (
                Raw::from(true),
                format!("true is a flag, not text in quotes; {allowed}"),
            ),
        ] {
            assert_eq!(said(&rule, given), wrong);
        }
    }

    #[test]
    fn sizes_know_both_families_of_units() {
        let rule = size(1 << 30);
        for (text, bytes) in [
            ("7MiB", 7 << 20),
            ("7 MB", 7_000_000),
            ("0B", 0),
            ("1gib", 1 << 30),
        ] {
            assert_eq!(rule.read(&text.into()), Ok(bytes));
        }
        let allowed = r#"a size up to 1024MiB in B, KiB, MiB, GiB, KB, MB or GB, such as "7MiB""#;
        assert_eq!(
            said(&rule, "7"),
            format!(r#""7" has no unit; {allowed}; did you mean "7B"?"#)
        );
        assert_eq!(
            said(&rule, Raw::Integer(7)),
            format!(r#"7 has no unit; {allowed}; did you mean "7B"?"#)
        );
        assert_eq!(
            said(&rule, "2GiB"),
            format!(r#""2GiB" is too large; {allowed}"#)
        );
        assert_eq!(
            said(&rule, "99999999999999999999B"),
            format!(r#""99999999999999999999B" is too large; {allowed}"#)
        );
        assert_eq!(
            said(&rule, "MiB"),
            format!(r#""MiB" is not a size; {allowed}"#)
        );
    }

    #[test]
    fn the_environment_is_turned_into_what_the_rule_wants_and_nothing_else() {
        assert_eq!(number(1_u32..=10).of_variable("7"), Raw::Integer(7));
        assert_eq!(flag().of_variable("false"), Raw::Flag(false));
        assert_eq!(words("text").of_variable("0123"), Raw::from("0123"));
        assert_eq!(
            list(words("text")).of_variable("a, b,"),
            [Raw::from("a"), Raw::from("b")].into()
        );
        assert_eq!(list(words("text")).of_variable(""), [].into());
    }

    #[test]
    fn numbers_of_any_size_are_compared_not_truncated() {
        let rule = number(1_u16..=10_000);
        assert_eq!(rule.read(&Raw::Integer(10_000)), Ok(10_000));
        assert_eq!(
            said(&rule, Raw::Integer(65_537)),
            "65537 is too large; a whole number from 1 to 10000"
        );
        assert_eq!(
            said(&rule, Raw::Integer(-1)),
            "-1 is too small; a whole number from 1 to 10000"
        );
        assert_eq!(
            said(&rule, "7"),
            r#""7" is text, not a whole number; a whole number from 1 to 10000"#
        );
    }

    #[test]
    fn durations_are_shown_in_their_largest_whole_unit() {
        for (seconds, shown) in [
            (0, "0s"),
            (1, "1s"),
            (90, "90s"),
            (120, "2m"),
            (7_200, "2h"),
            (604_800, "7d"),
        ] {
            assert_eq!(short(Duration::from_secs(seconds)), shown);
        }
        assert_eq!(short(Duration::from_millis(1_500)), "1500ms");
    }
}
