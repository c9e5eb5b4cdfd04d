//! Dependencies point down, as the map in `src/lib.rs` draws them.

use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom to the top; those of one line may use each other.
const LAYERS: &[&[&str]] = &[
    &["domain"],
    &["storage"],
    &["jobs", "live", "export", "mail", "timeline", "erasure"],
    &["api"],
    &["daemon"],
    &["lifecycle"],
    &["cli"],
];
/// They stand beside the layers: every layer but the domain may use them.
const BESIDE: &[&str] = &["access", "config", "telemetry"];
/// What those use of the layers above the domain: plain values.
const VALUES: &[(&str, &str)] = &[
    ("config", "crate::jobs::retry::"),
    ("config", "crate::jobs::schedule::"),
    ("telemetry", "crate::storage::{Run, RunState}"),
];
/// Crates that the domain does without.
const NOT_IN_DOMAIN: &[&str] = &["tokio", "sqlx", "axum"];

/// Why `module` may not use what `line` names, if so.
fn fault(module: &str, used: &str, line: &str) -> Option<String> {
    let rank = |name| LAYERS.iter().position(|layer| layer.contains(&name));
    let is_value = VALUES
        .iter()
        .any(|(user, value)| *user == module && line.contains(value));
    let is_right = used == module
        || is_value
        || match (rank(module), rank(used)) {
            (Some(0), _) => false,
            (Some(module), Some(used)) => used <= module,
            // What stands beside uses only what stands beside, and the domain.
            (None, Some(used)) => used == 0,
            (_, None) => BESIDE.contains(&used),
        };
    (!is_right).then(|| format!("{module} may not use {used}"))
}

/// The first name of each path that begins in this crate: `crate::name` and `crate::{name, …}`.
fn used(line: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let mut names = Vec::new();
    for (_, rest) in line
        .match_indices("crate::")
        .map(|(at, found)| line.split_at(at + found.len()))
    {
        let list = rest
            .strip_prefix('{')
            .and_then(|rest| rest.split('}').next());
        for path in list.map_or(vec![rest], |list| list.split(',').collect()) {
            let path = path.trim_start();
            names.push(path.split(|c| !is_name(c)).next().unwrap_or(path));
        }
    }
    names
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("src can be read") {
        let path = entry.expect("src can be read").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn dependencies_point_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut faults = Vec::new();
    let mut seen = 0;
    for file in files {
        let relative = file.strip_prefix(&src).expect("it is below src");
        let first = relative.iter().next().expect("it has a name");
        let module = Path::new(first)
            .file_stem()
            .and_then(|stem| stem.to_str())
            .expect("names are text");
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let text = fs::read_to_string(&file).expect("sources are text");
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or(line);
            let mut said: Vec<String> = used(code)
                .iter()
                .filter_map(|used| fault(module, used, code))
                .collect();
            seen += used(code).len();
            if module == "domain" {
                let foreign = NOT_IN_DOMAIN
                    .iter()
                    .filter(|name| code.contains(&format!("{name}::")));
                said.extend(foreign.map(|name| format!("domain may not use {name}")));
            }
            faults.extend(
                said.iter()
                    .map(|said| format!("src/{}:{}: {said}", relative.display(), number + 1)),
            );
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
    assert!(
        seen > 100,
        "the sources use each other by other paths than crate::"
    );
}

#[test]
fn what_points_up_is_found() {
    assert_eq!(used("use crate::api::{self, Parts};"), ["api"]);
    assert_eq!(used("use crate::{api, domain::Clock};"), ["api", "domain"]);
    assert_eq!(used("    crate::telemetry::chain(error)"), ["telemetry"]);
    for (module, used, is_wrong) in [
        ("storage", "api", true),
        ("domain", "config", true),
        ("domain", "storage", true),
        ("export", "api", true),
        ("telemetry", "jobs", true),
        ("mail", "daemon", true),
        ("live", "storage", false),
        ("jobs", "export", false),
        ("export", "config", false),
        ("cli", "daemon", false),
    ] {
        assert_eq!(
            fault(module, used, "").is_some(),
            is_wrong,
            "{module} uses {used}"
        );
    }
}
