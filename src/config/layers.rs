//! The layers under a configuration: built-in jobs, the file, the environment; merged by `config`.
//!
//! The file is read here and not by `config::File`, which keeps no positions, so that every message can name line and
//! column. `config` tells values apart by their origin: each layer marks its own.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use config::{Config as Merged, Environment, Map, Source as Layer, Value, ValueKind};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Request;
use super::error::{ConfigError, ConfigErrors, Place, Problem};

/// How `config` marks what came from the environment.
pub(super) const ENVIRONMENT: &str = "the environment";

const LOCAL_FILE: &str = "config/timelined.toml";
pub(super) const SYSTEM_FILE: &str = "/etc/timelined/timelined.toml";

/// Variables with this prefix belong to the tests of the project.
const TEST_PREFIX: &str = "TIMELINED_TEST_";

/// Which file a configuration was read from. Displays as an operator would name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The one that was asked for with `--config`.
    Explicit(PathBuf),
    /// `config/timelined.toml` in the working directory.
    Local(PathBuf),
    /// `/etc/timelined/timelined.toml`.
    System(PathBuf),
    /// No file at all.
    BuiltIn,
}

impl Source {
    /// The file, when there is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Explicit(path) | Self::Local(path) | Self::System(path) => Some(path),
            Self::BuiltIn => None,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path() {
            Some(path) => path.display().fmt(f),
            None => write!(
                f,
                "built-in defaults (there is neither {LOCAL_FILE} nor {SYSTEM_FILE})"
            ),
        }
    }
}

/// The file that a request means, and its text.
pub(super) fn choose(
    request: &Request,
    system_file: &Path,
) -> Result<(Source, Option<String>), ConfigErrors> {
    let read = |path: &Path| std::fs::read(request.working_directory.join(path));
    let unreadable = |path: &Path, error: std::io::Error| {
        one_error(
            Place::Nowhere,
            path.display().to_string(),
            Problem::new(format!("cannot be read: {error}")),
        )
    };
    let (source, bytes) = if let Some(path) = &request.explicit_file {
        let bytes = read(path).map_err(|error| unreadable(path, error))?;
        (Source::Explicit(path.clone()), bytes)
    } else {
        let candidates = [
            Source::Local(LOCAL_FILE.into()),
            Source::System(system_file.to_owned()),
        ];
        let mut found = None;
        for source in candidates {
            let path = source.path().expect("both candidates are files");
            match read(path) {
                Ok(bytes) => {
                    found = Some((source, bytes));
                    break;
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                // A file that is there but closed to us is not passed over: its operator means it.
                Err(error) => return Err(unreadable(path, error)),
            }
        }
        match found {
            Some(found) => found,
            None => return Ok((Source::BuiltIn, None)),
        }
    };
    match String::from_utf8(bytes) {
        Ok(text) => Ok((source, Some(text))),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            let lossy = String::from_utf8_lossy(error.as_bytes()).into_owned();
            let (line, column) = line_and_column(&lossy, valid);
            let file = source.to_string();
            Err(one_error(
                Place::File { file, line, column },
                "TOML",
                Problem::new("is not UTF-8"),
            ))
        }
    }
}

fn one_error(place: Place, key: impl Into<String>, problem: Problem) -> ConfigErrors {
    ConfigErrors::new(vec![ConfigError::new(place, key, problem)]).expect("one error is not none")
}

/// Where a key stands and where its value does: lines and columns from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) key: (usize, usize),
    pub(super) value: (usize, usize),
}

/// One TOML text as a layer: its values, and where they stand by dotted path (`jobs[0].retry.first`).
#[derive(Debug, Clone, Default)]
pub(super) struct FileLayer {
    values: Map<String, Value>,
    pub(super) spots: HashMap<String, Spot>,
    /// Keys of the top level that cannot be any of ours, and that `config` would take for a path.
    pub(super) quoted: Vec<String>,
}

impl FileLayer {
    /// Parses `text`; `shown` is the file's name in errors.
    ///
    /// A key that is there twice is an error which does not hide others, so the layer comes with it.
    pub(super) fn parse(shown: &str, text: &str) -> (Option<Self>, Vec<ConfigError>) {
        let (root, faults) = DeTable::parse_recoverable(text);
        let root = root.into_inner();
        let mut errors = Vec::new();
        let mut usable = true;
        for fault in faults {
            let span = fault.span().unwrap_or(text.len()..text.len());
            let (line, column) = line_and_column(text, span.start);
            let place = Place::File {
                file: shown.to_owned(),
                line,
                column,
            };
            // The parser's own Display quotes the line, in which a secret may stand; its message does not.
            if fault.message() == "duplicate key" {
                let (path, is_header) = path_of_duplicate(text, &root, span);
                usable &= !is_header;
                errors.push(ConfigError::new(
                    place,
                    path,
                    Problem::new("is there twice; keep one"),
                ));
            } else {
                usable = false;
                errors.push(ConfigError::new(
                    place,
                    "TOML",
                    Problem::new(fault.message()),
                ));
            }
        }
        if !usable {
            return (None, errors);
        }
        let mut layer = Self::default();
        layer.locate(text, "", &root);
        for (key, value) in &root {
            let name = key.get_ref();
            if name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
            {
                layer
                    .values
                    .insert(name.to_string(), value_of(value.get_ref()));
            } else {
                layer.quoted.push(name.to_string());
            }
        }
        (Some(layer), errors)
    }

    fn locate(&mut self, text: &str, prefix: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = match prefix {
                "" => key.get_ref().to_string(),
                _ => format!("{prefix}.{}", key.get_ref()),
            };
            self.locate_value(text, path, key.span().start, value);
        }
    }

    fn locate_value(&mut self, text: &str, path: String, key: usize, value: &Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => self.locate(text, &path, table),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.locate_value(text, format!("{path}[{index}]"), item.span().start, item);
                }
            }
            _ => {}
        }
        let spot = Spot {
            key: line_and_column(text, key),
            value: line_and_column(text, value.span().start),
        };
        self.spots.insert(path, spot);
    }
}

impl Layer for FileLayer {
    fn clone_into_box(&self) -> Box<dyn Layer + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.values.clone())
    }
}

/// The value as `config` holds it. Without an origin: only the environment's layer sets one.
fn value_of(value: &DeValue<'_>) -> Value {
    let kind = match value {
        DeValue::String(text) => ValueKind::String(text.to_string()),
        // A number that fits no type is kept as the largest, for a rule to call it too large.
        DeValue::Integer(number) => {
            let number = i128::from_str_radix(number.as_str(), number.radix());
            ValueKind::I128(number.unwrap_or(i128::MAX))
        }
        DeValue::Float(number) => {
            ValueKind::Float(number.as_str().parse().unwrap_or(f64::INFINITY))
        }
        DeValue::Boolean(flag) => ValueKind::Boolean(*flag),
        DeValue::Datetime(time) => ValueKind::String(time.to_string()),
        DeValue::Array(items) => {
            ValueKind::Array(items.iter().map(|item| value_of(item.get_ref())).collect())
        }
        DeValue::Table(table) => {
            let pairs = table.iter();
            ValueKind::Table(
                pairs
                    .map(|(k, v)| (k.get_ref().to_string(), value_of(v.get_ref())))
                    .collect(),
            )
        }
    };
    Value::new(None, kind)
}

/// Lays the environment over the file over the built-in jobs.
pub(super) fn merge(
    built_in: FileLayer,
    file: FileLayer,
    variables: HashMap<String, String>,
) -> Result<Map<String, Value>, ConfigErrors> {
    let environment = Environment::with_prefix("TIMELINED")
        .separator("__")
        // It would turn the password 0123 into 123.
        .try_parsing(false)
        .source(Some(variables));
    Merged::builder()
        .add_source(built_in)
        .add_source(file)
        .add_source(environment)
        .build()
        .and_then(|merged| merged.collect())
        .map_err(|error| {
            one_error(
                Place::Nowhere,
                "configuration",
                Problem::new(error.to_string()),
            )
        })
}

/// The variables that may set a key, by name, and the names that look like ours but cannot.
pub(super) fn sort_variables(
    environment: &BTreeMap<String, String>,
) -> (HashMap<String, String>, Vec<String>) {
    let mut ours = HashMap::new();
    let mut strays = Vec::new();
    for (name, value) in environment {
        let upper = name.to_uppercase();
        if !upper.starts_with("TIMELINED") || upper.starts_with(TEST_PREFIX) {
            continue;
        }
        if is_well_formed(name) {
            ours.insert(name.clone(), value.clone());
        } else {
            strays.push(name.clone());
        }
    }
    (ours, strays)
}

/// Whether `name` is `TIMELINED__SECTION__KEY`. `config` would take lower case too, and would pass over the rest in silence.
fn is_well_formed(name: &str) -> bool {
    let Some(path) = name.strip_prefix("TIMELINED__") else {
        return false;
    };
    path.split("__").all(|part| {
        let characters = part
            .chars()
            .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
        characters && !part.is_empty() && !part.starts_with('_') && !part.ends_with('_')
    })
}

/// Line and column, from 1, of a byte of `text`; the column in characters.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(offset)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}

/// The dotted path of a key that is there twice, and whether it is that of a table's header.
///
/// The parser does not say in which table it was, so the headers above are looked through.
fn path_of_duplicate(
    text: &str,
    root: &DeTable<'_>,
    span: std::ops::Range<usize>,
) -> (String, bool) {
    let line_end = text[span.end..]
        .find('\n')
        .map_or(text.len(), |end| span.end + end);
    let mut table = String::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut is_header = false;
    for line in text[..line_end].lines() {
        let line = line.trim_start();
        is_header = line.starts_with('[');
        if let Some(name) = line
            .strip_prefix("[[")
            .and_then(|rest| rest.split(']').next())
        {
            let count = counts.entry(name.trim()).or_default();
            table = in_list(root, name.trim(), *count);
            *count += 1;
        } else if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.split(']').next())
        {
            name.trim().clone_into(&mut table);
        }
    }
    let key = &text[span];
    match (is_header, table.is_empty()) {
        (true, _) => (table, true),
        (false, true) => (key.to_owned(), false),
        (false, false) => (format!("{table}.{key}"), false),
    }
}

/// How an element of a list of tables is shown: by its name, else by its place.
fn in_list(root: &DeTable<'_>, list: &str, index: usize) -> String {
    let named = root.get(list).and_then(|list| {
        list.get_ref()
            .get(index)?
            .get_ref()
            .get("name")?
            .get_ref()
            .as_str()
    });
    match named {
        Some(name) => format!("{list}.{name}"),
        None => format!("{list}[{index}]"),
    }
}
