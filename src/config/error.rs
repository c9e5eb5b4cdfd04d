//! What is wrong with a configuration, told all at once, each line with the place where an operator can mend it.

use std::fmt;

/// All that is wrong with a configuration: at least one error, those of the file first, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

/// One thing that is wrong: where, with which key, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    place: Place,
    key: String,
    problem: Problem,
}

/// Where a value, or the lack of one, was found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// Line and column count from 1; the column in characters, as editors do.
    File {
        line: usize,
        column: usize,
        file: String,
    },
    /// In this environment variable.
    Variable(String),
    /// Nowhere: a built-in default, or the file as a whole.
    Nowhere,
}

/// What is wrong, what is allowed instead, and what was probably meant.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Problem {
    wrong: String,
    allowed: String,
    suggestion: Option<String>,
}

impl ConfigErrors {
    /// `None` when there is nothing to report.
    pub(super) fn new(mut errors: Vec<ConfigError>) -> Option<Self> {
        errors.sort_by(|a, b| a.place.cmp(&b.place).then_with(|| a.key.cmp(&b.key)));
        errors.dedup();
        (!errors.is_empty()).then_some(Self(errors))
    }

    /// The errors, one line each when displayed.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

impl ConfigError {
    pub(super) fn new(place: Place, key: impl Into<String>, problem: Problem) -> Self {
        Self {
            place,
            key: key.into(),
            problem,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            place,
            key,
            problem,
        } = self;
        match place {
            Place::File { file, line, column } => {
                write!(f, "{file}:{line}:{column}: {key}: {problem}")
            }
            // The variable names the key, but where its value is what makes another key necessary.
            Place::Variable(variable) if *variable == variable_of(key) || key.is_empty() => {
                write!(f, "{variable}: {problem}")
            }
            Place::Variable(variable) => write!(f, "{variable}: {key}: {problem}"),
            Place::Nowhere => write!(f, "{key}: {problem}"),
        }
    }
}

impl Problem {
    /// Something wrong, without a word about what would be right.
    pub(super) fn new(wrong: impl Into<String>) -> Self {
        Self {
            wrong: wrong.into(),
            ..Self::default()
        }
    }

    /// Says what is allowed, unless that has been said.
    pub(super) fn allowed(mut self, allowed: impl Into<String>) -> Self {
        if self.allowed.is_empty() {
            self.allowed = allowed.into();
        }
        self
    }

    /// Says what was probably meant, when there is a guess.
    pub(super) fn suggest(mut self, suggestion: Option<String>) -> Self {
        self.suggestion = suggestion;
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.wrong)?;
        if !self.allowed.is_empty() {
            write!(f, "; {}", self.allowed)?;
        }
        if let Some(suggestion) = &self.suggestion {
            write!(f, "; did you mean {suggestion:?}?")?;
        }
        Ok(())
    }
}

/// The environment variable that sets the key at this dotted path.
pub(super) fn variable_of(path: &str) -> String {
    format!("TIMELINED__{}", path.to_uppercase().replace('.', "__"))
}

/// The one of `names` that `word` was probably meant to be; `None` when nothing is near.
pub(super) fn nearest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let word = word.to_lowercase();
    names
        .into_iter()
        .map(|name| {
            let distance = strsim::damerau_levenshtein(&word, &name.to_lowercase());
            // A third of the letters may differ: "listn", "sychronous", but not "a" for "to".
            (distance * 3, name.chars().count().max(3), name)
        })
        .filter(|(tripled, length, _)| tripled <= length)
        .min_by_key(|(tripled, ..)| *tripled)
        .map(|(.., name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_suggested_when_it_is_near() {
        let names = ["listen", "ops_listen", "public_url"];
        assert_eq!(nearest("listn", names).as_deref(), Some("listen"));
        assert_eq!(nearest("LISTEN", names).as_deref(), Some("listen"));
        assert_eq!(nearest("ops-listen", names).as_deref(), Some("ops_listen"));
        assert_eq!(nearest("database", names), None);
    }

    #[test]
    fn errors_come_in_the_order_of_the_file_then_the_environment() {
        let at = |line, column| Place::File {
            file: "f".to_owned(),
            line,
            column,
        };
        let error = |place| ConfigError::new(place, "k", Problem::new("is wrong"));
        let errors = ConfigErrors::new(vec![
            error(Place::Nowhere),
            error(Place::Variable("V".to_owned())),
            error(at(10, 1)),
            error(at(2, 7)),
            error(at(2, 7)),
        ])
        .unwrap();
        assert_eq!(
            errors.to_string(),
            "f:2:7: k: is wrong\nf:10:1: k: is wrong\nV: k: is wrong\nk: is wrong"
        );
    }
}
