//! What documents say, by language: one file each in `words/`, so that another language is one more.

use std::collections::HashMap;

use chrono::{Datelike, NaiveDate};
use serde::Deserialize;

use crate::domain::{Audience, Category, Locale, Priority};

/// The words of one language; each field is named as in its file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Words {
    pub(super) language: String,
    pub(super) title: String,
    pub(super) contact: String,
    pub(super) period: String,
    pub(super) from_beginning: String,
    pub(super) to: String,
    pub(super) time_zone: String,
    pub(super) asked_by: String,
    pub(super) asked_at: String,
    audience: String,
    pub(super) only: String,
    pub(super) redacted_fields: String,
    pub(super) events: String,
    pub(super) volume: String,
    pub(super) of: String,
    pub(super) page: String,
    pub(super) activity: String,
    pub(super) activity_alt: String,
    pub(super) continued: String,
    pub(super) nothing: String,
    pub(super) redacted: String,
    pub(super) by: String,
    priority_low: String,
    priority_normal: String,
    priority_high: String,
    priority_urgent: String,
    left_out: String,
    missing: String,
    audience_client: String,
    audience_agent: String,
    audience_audit: String,
    date: String,
    short_date: String,
    months: [String; 12],
    weekdays: [String; 7],
    thousands: String,
    categories: HashMap<String, String>,
}

impl Words {
    pub(super) fn of(locale: Locale) -> Self {
        let text = match locale {
            Locale::English => include_str!("words/en.toml"),
            Locale::Portuguese => include_str!("words/pt.toml"),
        };
        toml::from_str(text).expect("a test reads every language")
    }

    pub(super) fn category(&self, category: Category) -> &str {
        let name = category.as_str();
        self.categories.get(name).map_or(name, String::as_str)
    }

    pub(super) fn priority(&self, priority: Priority) -> &str {
        match priority {
            Priority::Low => &self.priority_low,
            Priority::Normal => &self.priority_normal,
            Priority::High => &self.priority_high,
            Priority::Urgent => &self.priority_urgent,
        }
    }

    /// The label and the reader.
    pub(super) fn audience(&self, audience: Audience) -> (&str, &str) {
        let reader = match audience {
            Audience::Client => &self.audience_client,
            Audience::Agent => &self.audience_agent,
            Audience::Audit => &self.audience_audit,
        };
        (&self.audience, reader)
    }

    pub(super) fn date(&self, day: NaiveDate) -> String {
        self.dated(&self.date, day)
    }

    pub(super) fn short_date(&self, day: NaiveDate) -> String {
        self.dated(&self.short_date, day)
    }

    fn dated(&self, pattern: &str, day: NaiveDate) -> String {
        let weekday = &self.weekdays[day.weekday().num_days_from_monday() as usize];
        pattern
            .replace("{weekday}", weekday)
            .replace("{day}", &day.day().to_string())
            .replace("{month}", self.month_name(day))
            .replace("{year}", &day.year().to_string())
    }

    pub(super) fn month_name(&self, day: NaiveDate) -> &str {
        &self.months[day.month0() as usize]
    }

    pub(super) fn number(&self, number: u64) -> String {
        let digits = number.to_string();
        let mut grouped = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                grouped.push_str(&self.thousands);
            }
            grouped.push(digit);
        }
        grouped
    }

    pub(super) fn left_out(&self, held: u64, total: u64) -> String {
        self.left_out
            .replace("{held}", &self.number(held))
            .replace("{total}", &self.number(total))
            .replace("{left}", &self.number(total - held))
    }

    pub(super) fn missing(&self, count: u64) -> String {
        self.missing.replace("{count}", &self.number(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_language_says_everything() {
        for locale in Locale::ALL {
            let words = Words::of(*locale);
            assert_eq!(words.language, locale.as_str());
            for category in Category::ALL {
                assert!(
                    words.categories.contains_key(category.as_str()),
                    "{locale}: {category}"
                );
            }
        }
    }

    #[test]
    fn dates_and_numbers_read_as_in_the_language() {
        let day = NaiveDate::from_ymd_opt(2026, 3, 29).unwrap();
        let (en, pt) = (Words::of(Locale::English), Words::of(Locale::Portuguese));
        assert_eq!(en.date(day), "Sunday, 29 March 2026");
        assert_eq!(pt.date(day), "domingo, 29 de março de 2026");
        assert_eq!(
            (en.number(1_234_567), pt.number(1_000)),
            ("1,234,567".to_owned(), "1.000".to_owned())
        );
    }
}
