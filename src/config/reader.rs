//! Reads sections out of the merged layers.
//!
//! A section's code says `section.take("window", 256, &number(1..=10_000))` and gets a value in any case: after an
//! error the default, so that one look tells all errors. Because the code that reads is the only list of keys,
//! defaults and types, none of them can be forgotten in a second place.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use config::{Map, Value, ValueKind};

use super::error::{Place, Problem, variable_of};
use super::layers::ENVIRONMENT;
use super::notes::{KeyPath, Origin, Reading, Unknown};
use super::rules::{Raw, Rule, words};
use super::secret::Secret;

const SECRET_SOURCES: &str = "{ credential = \"…\" }, { file = \"…\" } or { env = \"…\" }";

/// One table of the configuration, while it is read.
pub(super) struct Section<'a> {
    path: KeyPath,
    values: Map<String, Value>,
    given: BTreeSet<String>,
    known: Vec<&'static str>,
    reading: &'a mut Reading,
}

/// A value that somebody gave.
struct Given {
    raw: Raw,
    place: Place,
    origin: Origin,
}

/// What became of looking for a key.
enum Found<T> {
    Value(T),
    /// There was one, and its error has been noted.
    Refused,
    Absent,
}

/// Reads the whole configuration, beginning with its top level.
pub(super) fn read_root<R>(
    values: Map<String, Value>,
    reading: &mut Reading,
    read: impl FnOnce(&mut Section<'_>) -> R,
) -> R {
    Section::run(KeyPath::default(), values, reading, read)
}

impl Section<'_> {
    fn run<R>(
        path: KeyPath,
        values: Map<String, Value>,
        reading: &mut Reading,
        read: impl FnOnce(&mut Section<'_>) -> R,
    ) -> R {
        let mut section = Section {
            path,
            given: values.keys().cloned().collect(),
            values,
            known: Vec::new(),
            reading,
        };
        let result = read(&mut section);
        section.finish();
        result
    }

    /// The value of `key`, else its default.
    pub(super) fn take<T: 'static>(
        &mut self,
        key: &'static str,
        default: impl Into<Raw>,
        rule: &Rule<T>,
    ) -> T {
        self.take_shown(key, default, rule, Raw::to_string)
    }

    /// As [`Section::take`]; `show` says what `config show` may know of it.
    pub(super) fn take_shown<T: 'static>(
        &mut self,
        key: &'static str,
        default: impl Into<Raw>,
        rule: &Rule<T>,
        show: impl Fn(&Raw) -> String,
    ) -> T {
        let default = default.into();
        let value = match self.find(key, rule, &show) {
            Found::Value(value) => Some(value),
            Found::Refused => None,
            Found::Absent => {
                let path = self.path.join(key);
                self.reading.note(&path, show(&default), Origin::Default);
                None
            }
        };
        value.unwrap_or_else(|| {
            let value = rule.read(&default);
            value
                .map_err(|problem| problem.to_string())
                .expect("a built-in default follows its own rule")
        })
    }

    /// The value of `key`, which has no default.
    pub(super) fn take_optional<T: 'static>(
        &mut self,
        key: &'static str,
        rule: &Rule<T>,
    ) -> Option<T> {
        match self.find(key, rule, Raw::to_string) {
            Found::Value(value) => Some(value),
            Found::Refused => None,
            Found::Absent => {
                let path = self.path.join(key);
                self.reading.note(&path, "(unset)", Origin::Default);
                None
            }
        }
    }

    /// The value of `key`, without which the section makes no sense. `None` is an error that has been noted.
    pub(super) fn take_required<T: 'static>(
        &mut self,
        key: &'static str,
        rule: &Rule<T>,
    ) -> Option<T> {
        match self.find(key, rule, Raw::to_string) {
            Found::Value(value) => Some(value),
            Found::Refused => None,
            Found::Absent => {
                self.fail(key, rule.problem("is missing"));
                None
            }
        }
    }

    /// The value of `key` when it was given; nothing is noted otherwise.
    pub(super) fn take_given<T: 'static>(
        &mut self,
        key: &'static str,
        rule: &Rule<T>,
    ) -> Option<T> {
        match self.find(key, rule, Raw::to_string) {
            Found::Value(value) => Some(value),
            Found::Refused | Found::Absent => None,
        }
    }

    /// A secret: a text, or a table that says where it is kept.
    pub(super) fn secret(&mut self, key: &'static str) -> Option<Secret> {
        if self.is_table(key) || !self.is_given(key) {
            self.learn(key);
            let found = self.optional_section(key, Section::read_secret).flatten();
            if !self.is_given(key) {
                let path = self.path.join(key);
                self.reading.note(&path, "(unset)", Origin::Default);
            }
            return found;
        }
        self.learn_secret(key);
        let given = self.look(key, |text| Raw::from(text))?;
        let path = self.path.join(key);
        self.reading.note(&path, "***", given.origin);
        match given.raw {
            Raw::Text(text) if !text.is_empty() => Some(Secret::new(text)),
            Raw::Text(_) => {
                let problem = Problem::new("is empty").allowed(secret_forms());
                self.reading.fail(given.place, path.shown, problem);
                None
            }
            // Its kind, never itself: a password of digits without quotes is a password.
            other => {
                let problem = Problem::new(format!("is {}", other.kind())).allowed(secret_forms());
                self.reading.fail(given.place, path.shown, problem);
                None
            }
        }
    }

    /// Makes known that the value of `key`, which is no secret now, may be one.
    pub(super) fn learn_secret(&mut self, key: &'static str) {
        self.absent_section(key, Section::read_secret);
    }

    fn read_secret(section: &mut Section<'_>) -> Option<Secret> {
        let name = || words("a name");
        let credential = section.take_given("credential", &name());
        let file = section.take_given("file", &words("a path"));
        let variable = section.take_given("env", &name());
        let (key, read) = match (credential, file, variable) {
            (Some(name), None, None) => ("credential", section.read_credential(&name)),
            (None, Some(path), None) => ("file", read_secret_file(&section.reading.resolve(&path))),
            (None, None, Some(name)) => {
                let value = section.reading.environment.get(&name).cloned();
                (
                    "env",
                    value.ok_or_else(|| format!("the environment has no {name}")),
                )
            }
            (None, None, None) if !section.given.is_empty() => return None,
            _ => {
                section
                    .fail_whole(Problem::new("does not name one source").allowed(SECRET_SOURCES));
                return None;
            }
        };
        match read {
            Ok(text) if text.is_empty() => {
                section.fail(key, Problem::new("leads to an empty secret"));
                None
            }
            Ok(text) => Some(Secret::new(text)),
            Err(wrong) => {
                section.fail(key, Problem::new(wrong));
                None
            }
        }
    }

    fn read_credential(&self, name: &str) -> Result<String, String> {
        // systemd's own rule: a credential is a plain file name.
        if name.contains('/') || name == "." || name == ".." {
            return Err(format!("{name:?} is not the name of a credential"));
        }
        match self.reading.environment.get("CREDENTIALS_DIRECTORY") {
            Some(directory) => read_secret_file(&Path::new(directory).join(name)),
            None => Err(
                "there are no credentials, since $CREDENTIALS_DIRECTORY is not set; run by systemd with LoadCredential="
                    .to_owned(),
            ),
        }
    }

    /// A path of which relative ones begin in the state directory.
    pub(super) fn path(&mut self, key: &'static str, default: &str) -> PathBuf {
        let path = self.take(
            key,
            default,
            &words("a path; relative ones begin in the state directory"),
        );
        self.reading.resolve(&path)
    }

    /// As [`Section::path`], without a default.
    pub(super) fn optional_path(&mut self, key: &'static str) -> Option<PathBuf> {
        let path = self.take_optional(
            key,
            &words("a path; relative ones begin in the state directory"),
        );
        path.map(|path| self.reading.resolve(&path))
    }

    /// Makes `path` absolute, as those in the file are.
    pub(super) fn resolve(&self, path: &str) -> PathBuf {
        self.reading.resolve(path)
    }

    /// Relative paths begin here from now on.
    pub(super) fn set_base(&mut self, base: PathBuf) {
        self.reading.base = base;
    }

    /// A variable of the environment that is not one of ours, such as systemd's.
    pub(super) fn foreign_variable(&self, name: &str) -> Option<&str> {
        let value = self.reading.environment.get(name)?;
        (!value.is_empty()).then_some(value.as_str())
    }

    /// Says in `config show` that `key` comes from a variable that is not one of ours.
    pub(super) fn note_foreign(&mut self, key: &'static str, value: &str, variable: &str) {
        self.learn(key);
        let path = self.path.join(key);
        self.reading.note(
            &path,
            Raw::from(value).to_string(),
            Origin::Variable(variable.to_owned()),
        );
    }

    /// A table within this one; when absent, all its defaults.
    pub(super) fn section<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'_>) -> R,
    ) -> R {
        let values = self.table(key).unwrap_or_default();
        Section::run(self.path.join(key), values, self.reading, read)
    }

    /// A table that may be absent as a whole.
    pub(super) fn optional_section<R>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'_>) -> R,
    ) -> Option<R> {
        let Some(values) = self.table(key) else {
            self.absent_section(key, read);
            return None;
        };
        let path = self.path.join(key);
        Some(Section::run(path, values, self.reading, read))
    }

    /// Reads a table that is not there, for its keys to be known.
    fn absent_section<R>(&mut self, key: &'static str, read: impl FnOnce(&mut Section<'_>) -> R) {
        let was_muted = std::mem::replace(&mut self.reading.muted, true);
        Section::run(self.path.join(key), Map::new(), self.reading, read);
        self.reading.muted = was_muted;
    }

    /// The tables of a list, such as `[[jobs]]`.
    pub(super) fn each<R>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'_>) -> R,
    ) -> Vec<R> {
        self.know(key);
        let header = format!("write each under a line [[{key}]]");
        let list = match self.values.remove(key).map(|value| value.kind) {
            None => return Vec::new(),
            Some(ValueKind::Array(list)) => list,
            Some(_) => {
                self.fail(key, Problem::new("is not a list of tables").allowed(header));
                return Vec::new();
            }
        };
        let path = self.path.join(key);
        let mut results = Vec::new();
        for (index, item) in list.into_iter().enumerate() {
            let place = format!("{}[{index}]", path.place);
            let ValueKind::Table(values) = item.kind else {
                let at = self.reading.place(&place).unwrap_or(Place::Nowhere);
                self.reading.fail(
                    at,
                    place,
                    Problem::new("is not a table").allowed(header.clone()),
                );
                continue;
            };
            let shown = match values.get("name").map(|name| &name.kind) {
                Some(ValueKind::String(name)) if !name.is_empty() => {
                    format!("{}.{name}", path.shown)
                }
                _ => format!("{}[{index}]", path.shown),
            };
            results.push(Section::run(
                KeyPath { place, shown },
                values,
                self.reading,
                &mut read,
            ));
        }
        results
    }

    /// Whether somebody gave `key` a value, right or wrong.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.given.contains(key)
    }

    /// Whether the value of `key` is a table.
    pub(super) fn is_table(&self, key: &str) -> bool {
        matches!(
            self.values.get(key).map(|value| &value.kind),
            Some(ValueKind::Table(_))
        )
    }

    /// A key that has a meaning, though not beside what else is set.
    pub(super) fn learn(&mut self, key: &'static str) {
        self.know(key);
        let path = self.path.join(key);
        self.reading.known.insert(path.place);
    }

    /// Leaves the rest of this table alone: an error has made it unclear which keys it has.
    pub(super) fn skip_rest(&mut self) {
        self.values.clear();
    }

    /// Something is wrong with the value of `key`, or with its absence.
    pub(super) fn fail(&mut self, key: &str, problem: Problem) {
        let path = self.path.join(key);
        let place = self
            .reading
            .place(&path.place)
            .or_else(|| self.reading.spot(&self.path.place, |spot| spot.value))
            .unwrap_or(Place::Nowhere);
        self.reading.fail(place, path.shown, problem);
    }

    /// Something is wrong with this table.
    pub(super) fn fail_whole(&mut self, problem: Problem) {
        let place = self.reading.spot(&self.path.place, |spot| spot.value);
        let shown = self.path.shown.clone();
        self.reading
            .fail(place.unwrap_or(Place::Nowhere), shown, problem);
    }

    /// `key` of this table is wrong or missing because of what stands at `path`, which is where it is reported.
    pub(super) fn fail_because_of(&mut self, path: &str, key: &str, problem: Problem) {
        let own = self.path.join(key);
        let place = self
            .reading
            .place(path)
            .or_else(|| self.reading.place(&own.place))
            .unwrap_or(Place::Nowhere);
        self.reading.fail(place, own.shown, problem);
    }

    fn find<T: 'static>(
        &mut self,
        key: &'static str,
        rule: &Rule<T>,
        show: impl Fn(&Raw) -> String,
    ) -> Found<T> {
        self.learn(key);
        let Some(given) = self.look(key, |text| rule.of_variable(text)) else {
            return Found::Absent;
        };
        let path = self.path.join(key);
        self.reading.note(&path, show(&given.raw), given.origin);
        match rule.read(&given.raw) {
            Ok(value) => Found::Value(value),
            Err(problem) => {
                self.reading.fail(given.place, path.shown, problem);
                Found::Refused
            }
        }
    }

    /// Takes the value of `key` out of the table.
    fn look(&mut self, key: &str, of_variable: impl Fn(&str) -> Raw) -> Option<Given> {
        let path = self.path.join(key);
        let value = self.values.remove(key)?;
        if value.origin() == Some(ENVIRONMENT) {
            let variable = variable_of(&path.place);
            self.reading.used.insert(variable.clone());
            let raw = match Raw::of(&value) {
                Raw::Text(text) => of_variable(&text),
                other => other,
            };
            return Some(Given {
                raw,
                place: Place::Variable(variable.clone()),
                origin: Origin::Variable(variable),
            });
        }
        let raw = Raw::of(&value);
        if let Some(spot) = self.reading.spots.get(&path.place) {
            let (line, column) = spot.value;
            let file = self.reading.file.clone();
            return Some(Given {
                raw,
                origin: Origin::File {
                    file: file.clone(),
                    line,
                },
                place: Place::File { file, line, column },
            });
        }
        // A table in the place of a value, made by variables with a part too many: these are reported for themselves.
        if raw == Raw::Table {
            return None;
        }
        Some(Given {
            raw,
            place: Place::Nowhere,
            origin: Origin::Default,
        })
    }

    /// Takes the table at `key` out of this one; `None` when there is none.
    fn table(&mut self, key: &'static str) -> Option<Map<String, Value>> {
        self.know(key);
        let value = self.values.get(key)?;
        if let ValueKind::Table(values) = &value.kind {
            let values = values.clone();
            self.values.remove(key);
            return Some(values);
        }
        let given = self.look(key, |text| Raw::from(text))?;
        let path = self.path.join(key);
        let allowed = match &given.place {
            Place::Variable(name) => format!("set its keys, each by a variable {name}__…"),
            _ => format!("write its keys under a line [{}]", path.shown),
        };
        let problem = Problem::new("is a section, not a value").allowed(allowed);
        self.reading.fail(given.place, path.shown, problem);
        None
    }

    fn know(&mut self, key: &'static str) {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
    }

    fn finish(self) {
        if self.reading.muted {
            return;
        }
        for name in self.values.into_keys() {
            let path = self.path.join(&name);
            // What is not in the file came by variables, which are reported by their names.
            if self.reading.spots.contains_key(&path.place) {
                self.reading.unknown.push(Unknown {
                    path,
                    name,
                    section: self.path.shown.clone(),
                    siblings: self.known.clone(),
                });
            }
        }
    }
}

fn secret_forms() -> String {
    format!("text in quotes, {SECRET_SOURCES}")
}

/// The text of a file that holds a secret, without the line end that editors and `echo` leave.
fn read_secret_file(path: &Path) -> Result<String, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim_end_matches(['\r', '\n']).to_owned()),
        Err(error) => Err(format!("{} cannot be read ({error})", path.display())),
    }
}
