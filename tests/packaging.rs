//! The systemd unit, judged by systemd's own tools, as an operator would before installing it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// The unit in a directory of its own, so that nothing beside it is read. `verify` looks for the
/// binary, which is not installed here: it is given one that every machine has.
fn unit() -> (TempDir, PathBuf) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/timelined.service");
    let text = fs::read_to_string(source).expect("the unit is in the repository");
    let installed = "ExecStart=/usr/bin/timelined run\n";
    assert!(
        text.contains(installed),
        "the unit starts another binary:\n{text}"
    );

    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("timelined.service");
    fs::write(
        &path,
        text.replace(installed, "ExecStart=/usr/bin/true run\n"),
    )
    .expect("the unit's copy is written");
    (dir, path)
}

fn systemd_analyze(arguments: &[&str], unit: &Path) -> Output {
    let output = Command::new("systemd-analyze")
        .args(arguments)
        .arg(unit)
        // Colours and a pager would be asked for by the developer's own settings.
        .envs([("SYSTEMD_COLORS", "0"), ("SYSTEMD_PAGER", "")])
        .output();
    match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => panic!(
            "systemd-analyze is not installed: run `make test`, which installs what the tests need"
        ),
        output => output.expect("systemd-analyze runs"),
    }
}

/// What it printed, for the message of a failing test.
fn printed(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|stream| String::from_utf8_lossy(stream))
        .concat()
}

#[test]
fn systemd_finds_nothing_to_say_about_the_unit() {
    let (_dir, unit) = unit();
    let output = systemd_analyze(&["verify"], &unit);
    assert_eq!(printed(&output), "");
    assert!(output.status.success(), "{}", output.status);
}

#[test]
fn the_exposure_of_the_unit_is_at_most_one_point_two() {
    let (_dir, unit) = unit();
    let output = systemd_analyze(
        &["security", "--offline=true", "--no-pager", "--threshold=12"],
        &unit,
    );
    assert!(
        output.status.success(),
        "{}\n{}",
        output.status,
        printed(&output)
    );
    // The tool also succeeds where it has judged nothing.
    assert!(
        printed(&output).contains("Overall exposure level"),
        "{}",
        printed(&output)
    );
}
