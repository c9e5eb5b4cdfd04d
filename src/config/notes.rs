//! What is noted while a configuration is read: errors, origins, known keys, and variables that were of use.
//!
//! `config show`, the suggestions, and the check that no key or variable was overlooked all come from here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use super::error::{ConfigError, Place, Problem, nearest, variable_of};
use super::layers::Spot;

const VARIABLE_FORM: &str =
    "a name is TIMELINED__SECTION__KEY, in capitals, with two underscores before each part";

/// The lists of tables, which no variables can set: how these would begin, and the key.
pub(super) const LISTS: [(&str, &str); 2] = [
    ("TIMELINED__JOBS", "jobs"),
    ("TIMELINED__RETENTION", "retention"),
];

/// One line of `config show`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The dotted path, such as `http.listen` or `jobs.nightly-purge.cron`.
    pub key: String,
    /// The value as TOML writes it; `***` for a secret, `(unset)` for what has no default.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The built-in default.
    Default,
    /// A line of the file.
    File {
        /// The file as it was named.
        file: String,
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { file, line } => write!(f, "{file}:{line}"),
            Self::Variable(name) => f.write_str(name),
        }
    }
}

/// What is noted while a configuration is read.
pub(super) struct Reading {
    /// The file's name in messages.
    pub(super) file: String,
    pub(super) spots: HashMap<String, Spot>,
    pub(super) environment: BTreeMap<String, String>,
    /// Where relative paths begin.
    pub(super) base: PathBuf,
    /// While an absent section is read for its keys alone, nothing but these is noted.
    pub(super) muted: bool,
    /// Variables of which the value was taken.
    pub(super) used: BTreeSet<String>,
    /// Dotted paths of all keys that hold a value.
    pub(super) known: BTreeSet<String>,
    pub(super) unknown: Vec<Unknown>,
    errors: Vec<ConfigError>,
    entries: Vec<Entry>,
}

/// A key of the file that nobody took.
pub(super) struct Unknown {
    pub(super) path: KeyPath,
    pub(super) name: String,
    pub(super) section: String,
    pub(super) siblings: Vec<&'static str>,
}

/// The dotted path of a key, twice.
#[derive(Debug, Clone, Default)]
pub(super) struct KeyPath {
    /// `jobs[2].cron`: where it stands in the file.
    pub(super) place: String,
    /// `jobs.nightly-purge.cron`: as it is shown.
    pub(super) shown: String,
}

impl Reading {
    /// `base` is where relative paths begin until the state directory is known.
    pub(super) fn new(
        file: String,
        spots: HashMap<String, Spot>,
        environment: BTreeMap<String, String>,
        base: &Path,
    ) -> Self {
        Self {
            file,
            spots,
            environment,
            base: base.to_owned(),
            muted: false,
            used: BTreeSet::new(),
            known: BTreeSet::new(),
            unknown: Vec::new(),
            errors: Vec::new(),
            entries: Vec::new(),
        }
    }

    /// A key of the top level that `config` must not see.
    pub(super) fn refuse_quoted(&mut self, names: Vec<String>) {
        for name in names {
            self.unknown.push(Unknown {
                path: KeyPath::default().join(&name),
                name,
                section: String::new(),
                siblings: Vec::new(),
            });
        }
    }

    /// Ends the reading: whatever nobody took is an error.
    ///
    /// `ours` are the variables that were merged, `strays` those whose names no key can have.
    pub(super) fn finish<'v>(
        mut self,
        ours: impl Iterator<Item = &'v str>,
        strays: &'v [String],
    ) -> (Vec<Entry>, Vec<ConfigError>) {
        for unknown in std::mem::take(&mut self.unknown) {
            let error = self.unknown_key(&unknown);
            self.errors.push(error);
        }
        let variables: Vec<String> = self
            .known
            .iter()
            .filter(|path| !path.contains('['))
            .map(|path| variable_of(path))
            .collect();
        let unused = ours.filter(|name| !self.used.contains(*name));
        for name in unused.chain(strays.iter().map(String::as_str)) {
            let problem = if variables.iter().any(|known| known == name) {
                Problem::new("has no effect beside another variable for the same key")
                    .allowed("set one of them")
            } else if let Some((_, list)) = LISTS
                .iter()
                .find(|(prefix, _)| name.to_uppercase().starts_with(&format!("{prefix}__")))
            {
                Problem::new(format!("{list} cannot be set by variables"))
                    .allowed(format!("write [[{list}]] in the file"))
            } else {
                Problem::new("unknown variable")
                    .allowed(VARIABLE_FORM)
                    .suggest(nearest_variable(name, &variables))
            };
            // An empty key: there is none that this variable could name.
            self.errors.push(ConfigError::new(
                Place::Variable(name.to_owned()),
                "",
                problem,
            ));
        }
        (self.entries, self.errors)
    }

    fn unknown_key(&self, unknown: &Unknown) -> ConfigError {
        let Unknown {
            path,
            name,
            section,
            siblings,
        } = unknown;
        let elsewhere = || {
            let mut homes = self.known.iter().filter(|known| !known.contains('['));
            homes
                .find(|known| known.rsplit('.').next() == Some(name))
                .cloned()
        };
        let suggestion = nearest(name, siblings.iter().copied()).or_else(elsewhere);
        let mut names = siblings.clone();
        names.sort_unstable();
        let allowed = match (section.as_str(), names.is_empty()) {
            (_, true) => String::new(),
            ("", _) => format!("the file takes {}", names.join(", ")),
            (section, _) => format!("{section} takes {}", names.join(", ")),
        };
        let problem = Problem::new("unknown key")
            .allowed(allowed)
            .suggest(suggestion);
        let place = self
            .spot(&path.place, |spot| spot.key)
            .unwrap_or(Place::Nowhere);
        ConfigError::new(place, path.shown.clone(), problem)
    }

    /// The place in the file of what stands at `path`.
    pub(super) fn spot(
        &self,
        path: &str,
        part: impl FnOnce(&Spot) -> (usize, usize),
    ) -> Option<Place> {
        self.spots
            .get(path)
            .map(part)
            .map(|(line, column)| Place::File {
                file: self.file.clone(),
                line,
                column,
            })
    }

    /// Where the value at `path` was given.
    pub(super) fn place(&self, path: &str) -> Option<Place> {
        let variable = variable_of(path);
        if self.used.contains(&variable) {
            return Some(Place::Variable(variable));
        }
        self.spot(path, |spot| spot.value)
    }

    pub(super) fn fail(&mut self, place: Place, key: impl Into<String>, problem: Problem) {
        if !self.muted {
            self.errors.push(ConfigError::new(place, key, problem));
        }
    }

    pub(super) fn note(&mut self, path: &KeyPath, value: impl Into<String>, origin: Origin) {
        if !self.muted {
            self.entries.push(Entry {
                key: path.shown.clone(),
                value: value.into(),
                origin,
            });
        }
    }

    pub(super) fn resolve(&self, path: &str) -> PathBuf {
        // Collecting the components drops `./`, which would be shown for ever after.
        self.base
            .join(path)
            .components()
            .filter(|part| *part != Component::CurDir)
            .collect()
    }
}

impl KeyPath {
    pub(super) fn join(&self, key: &str) -> Self {
        let join = |path: &str| match path {
            "" => key.to_owned(),
            _ => format!("{path}.{key}"),
        };
        Self {
            place: join(&self.place),
            shown: join(&self.shown),
        }
    }
}

/// The variable that was probably meant; underscores too few or too many are the common mistake.
fn nearest_variable(name: &str, known: &[String]) -> Option<String> {
    let plain = |name: &str| name.to_uppercase().replace(['_', '-', '.'], "");
    let wanted = plain(name);
    let same = known.iter().find(|known| plain(known) == wanted);
    same.cloned().or_else(|| {
        let rest = |name: &str| plain(name).replacen("TIMELINED", "", 1);
        let wanted = rest(name);
        let plains: Vec<String> = known.iter().map(|known| rest(known)).collect();
        let near = nearest(&wanted, plains.iter().map(String::as_str))?;
        known.iter().find(|known| rest(known) == near).cloned()
    })
}
