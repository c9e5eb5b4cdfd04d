//! The planner against an oracle that shares nothing with it: `tests/support/planner_oracle.py`, which walked through
//! every minute of 2026 and 2027 in every zone whose clocks are shifted in them.
#![allow(clippy::unwrap_used, reason = "a test that panics fails")]

use std::fmt::Write as _;
use std::process::Command;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;
use timelined::jobs::schedule::Schedule;

const TABLE: &str = include_str!("planner/oracle.txt");

/// The zones of a group whose clocks are shifted by half an hour, which the script walks through in some seconds.
const REMADE: [&str; 2] = ["Australia/LHI", "Australia/Lord_Howe"];

/// A line of the table: when a pattern is due in a window.
struct Case<'a> {
    pattern: &'a str,
    start: DateTime<Utc>,
    end: DateTime<Utc>,
    due: Vec<DateTime<Utc>>,
}

impl<'a> Case<'a> {
    fn read(line: &'a str) -> Self {
        let parts: Vec<&str> = line.split(" | ").collect();
        let [pattern, start, numbers] = parts[..] else {
            panic!("no case: {line}");
        };
        let start: DateTime<Utc> = start.parse().unwrap();
        let mut instants = numbers
            .split(' ')
            .map(|seconds| start + TimeDelta::seconds(seconds.parse().unwrap()));
        Self {
            pattern,
            start,
            end: instants.next().unwrap(),
            due: instants.collect(),
        }
    }

    /// The times that the planner names one after another.
    fn planned(&self, schedule: &Schedule) -> Vec<DateTime<Utc>> {
        std::iter::successors(schedule.next_after(self.start), |at| {
            schedule.next_after(*at)
        })
        .take_while(|at| *at <= self.end)
        .collect()
    }
}

/// The cases of each group of zones.
fn groups() -> Vec<(Vec<&'static str>, Vec<Case<'static>>)> {
    let mut groups: Vec<(Vec<_>, Vec<_>)> = Vec::new();
    for line in TABLE.lines().skip(1).filter(|line| !line.starts_with('#')) {
        match line.strip_prefix("zones ") {
            Some(zones) => groups.push((zones.split(' ').collect(), Vec::new())),
            None => groups.last_mut().unwrap().1.push(Case::read(line)),
        }
    }
    groups
}

fn zone(name: &str) -> Tz {
    name.parse().unwrap()
}

fn schedule(case: &Case<'_>, zone: Tz) -> Schedule {
    Schedule::cron(case.pattern, zone).unwrap()
}

#[test]
fn the_table_was_made_with_the_zones_that_the_planner_knows() {
    let release = TABLE.lines().next().unwrap();
    assert_eq!(release, format!("release {}", chrono_tz::IANA_TZDB_VERSION));
}

#[test]
fn around_every_shift_of_two_years_the_planner_names_the_times_of_the_oracle() {
    let mut differences = String::new();
    let (mut zones, mut cases) = (0, 0);
    for (names, group) in groups() {
        zones += names.len();
        for name in names {
            for case in &group {
                cases += 1;
                let planned = case.planned(&schedule(case, zone(name)));
                if planned != case.due {
                    let missing = case.due.iter().filter(|at| !planned.contains(at));
                    let missing: Vec<_> = missing.map(ToString::to_string).collect();
                    let extra = planned.iter().filter(|at| !case.due.contains(at));
                    let extra: Vec<_> = extra.map(ToString::to_string).collect();
                    let pattern = case.pattern;
                    writeln!(
                        differences,
                        "{name}: {pattern}: missing {missing:?}, extra {extra:?}"
                    )
                    .unwrap();
                }
            }
        }
    }
    assert!(differences.is_empty(), "{differences}");
    // That it has read the table at all.
    assert!(zones > 150 && cases > 8_000, "{zones} zones, {cases} cases");
}

#[test]
fn it_makes_no_difference_from_which_instant_the_planner_looks() {
    for (names, group) in groups() {
        for case in &group {
            let schedule = schedule(case, zone(names[0]));
            let expected = |after| case.due.iter().find(|at| **at > after);
            let (before, middle) = (
                TimeDelta::seconds(1),
                case.start + (case.end - case.start) / 2,
            );
            let around_shift = (-16..=16).map(|quarter| middle + TimeDelta::minutes(15 * quarter));
            let around_due = case.due.iter().flat_map(|at| [*at - before, *at]);
            for after in around_shift.chain(around_due) {
                let Some(expected) = expected(after).filter(|_| after >= case.start) else {
                    continue;
                };
                let planned = schedule.next_after(after);
                let (name, pattern) = (names[0], case.pattern);
                assert_eq!(planned, Some(*expected), "{name}: {pattern} after {after}");
            }
        }
    }
}

#[test]
fn the_table_is_what_its_script_prints() {
    let release = TABLE.lines().next().unwrap();
    let there_is = std::fs::read_to_string("/usr/share/zoneinfo/tzdata.zi").unwrap_or_default();
    let there_is = there_is.lines().next().unwrap_or("# version, none");
    if there_is.replace("# version", "release") != release {
        eprintln!("not compared: the table is of {release}, this machine has {there_is:?}");
        return;
    }
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/support/planner_oracle.py"
    );
    let output = Command::new("/usr/bin/python3")
        .arg(script)
        .args(REMADE)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let printed = String::from_utf8(output.stdout).unwrap();

    let header = TABLE.lines().take_while(|line| !line.starts_with("zones "));
    let names = format!("zones {}", REMADE.join(" "));
    let group = TABLE.lines().skip_while(|line| *line != names);
    let group = group
        .enumerate()
        .take_while(|(index, line)| *index == 0 || !line.starts_with("zones "))
        .map(|(_, line)| line);
    let expected: Vec<_> = header.chain(group).collect();
    assert!(expected.len() > 50, "the table has no {names}");
    assert_eq!(printed.lines().collect::<Vec<_>>(), expected);
}
