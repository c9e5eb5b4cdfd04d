//! What is said about a wrong configuration, word for word: operators read it, and nothing else tells them.

use super::{ED25519, KEY, Setup};

#[test]
fn all_errors_come_at_once_in_the_order_of_the_file() {
    let said = Setup::file(
        "\
[http]
listn = \"127.0.0.1:1\"
shutdown_timeout = 20

[realtime]
window = 0

[lgo]
level = \"debug\"

[[jobs]]
name = \"a\"
kind = \"purge_expired\"
cron = \"30 3 * * *\"
",
    )
    .variable("TIMELINED_HTTP__LISTEN", "127.0.0.1:2")
    .variable("TIMELINED__REALTIME__ACK_TIMEOUT", "30")
    .said();
    assert_eq!(
        said,
        "\
config/timelined.toml:2:1: http.listn: unknown key; http takes allowed_origins, listen, ops_listen, public_url, shutdown_timeout; did you mean \"listen\"?
config/timelined.toml:3:20: http.shutdown_timeout: 20 has no unit; a duration from 0s to 10m, such as \"90s\" or \"1h 30m\"; did you mean \"20s\"?
config/timelined.toml:6:10: realtime.window: 0 is too small; a whole number from 1 to 10000
config/timelined.toml:8:2: lgo: unknown key; the file takes alerts, auth, database, export, history, http, jobs, log, mail, realtime, retention, state_directory; did you mean \"log\"?
config/timelined.toml:14:8: jobs.a.cron: \"30 3 * * *\" has five fields; six are needed, seconds first; did you mean \"0 30 3 * * *\"?
TIMELINED_HTTP__LISTEN: unknown variable; a name is TIMELINED__SECTION__KEY, in capitals, with two underscores before each part; did you mean \"TIMELINED__HTTP__LISTEN\"?
TIMELINED__REALTIME__ACK_TIMEOUT: 30 has no unit; a duration from 1s to 10m, such as \"90s\" or \"1h 30m\"; did you mean \"30s\"?"
    );
}

/// Asserts what is said of each file, less the name of the file.
fn assert_said(cases: &[(&str, &str)]) {
    let mut wrong = Vec::new();
    for (text, expected) in cases {
        let said = Setup::file(text)
            .said()
            .replace("config/timelined.toml:", "");
        if said != *expected {
            wrong.push(format!("{text}\n  expected {expected}\n  said     {said}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n\n"));
}

/// A wrong value for each key, and what is said.
const WRONG_VALUES: &[(&str, &str)] = &[
    (
        "state_directory = 1",
        "1:19: state_directory: 1 is a number, not text in quotes; a path; relative ones begin in the state directory",
    ),
    (
        "state_directory = \"\"",
        "1:19: state_directory: is empty; a path; relative ones begin in the state directory",
    ),
    (
        "database = 1",
        "1:12: database: is a section, not a value; write its keys under a line [database]",
    ),
    (
        "database.url = \"mysql://u:pw@h/d\"",
        "1:16: database.url: is of another engine; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"",
    ),
    (
        "database.url = \"postgress://u:pw@h/d\"",
        "1:16: database.url: is of another engine; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"; did you mean \"postgres://…\"?",
    ),
    (
        "database.url = \"timelined.db\"",
        "1:16: database.url: is not a URL; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"",
    ),
    (
        "database.url = \"sqlite://\"",
        "1:16: database.url: names no file; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"",
    ),
    (
        "database.url = \"sqlite://:memory:\"",
        "1:16: database.url: names no file; what is kept in memory is lost at each restart; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"",
    ),
    (
        "database.url = \"sqlite://a.db?mode=ro\"",
        "1:16: database.url: has options after a question mark; they are keys of [database] here; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"",
    ),
    (
        "database.migrate = \"yes\"",
        "1:20: database.migrate: \"yes\" is text; true or false, without quotes",
    ),
    (
        "database.synchronous = \"ful\"",
        "1:24: database.synchronous: \"ful\" is unknown; \"full\" or \"normal\"; did you mean \"full\"?",
    ),
    (
        "http.listen = \"localhost:80\"",
        "1:15: http.listen: \"localhost:80\" is not an address; an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"; did you mean \"127.0.0.1:80\"?",
    ),
    (
        "http.listen = \"0.0.0.0\"",
        "1:15: http.listen: \"0.0.0.0\" is not an address; an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"; did you mean \"0.0.0.0:8080\"?",
    ),
    (
        "http.listen = 8080",
        "1:15: http.listen: 8080 is a number, not text in quotes; an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"",
    ),
    (
        "http.ops_listen = \"off\"",
        "1:19: http.ops_listen: \"off\" is not an address; an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\", or \"\" for none",
    ),
    (
        "http.ops_listen = \"127.0.0.1:8080\"",
        "1:19: http.ops_listen: 127.0.0.1:8080 is that of http.listen too",
    ),
    (
        "http.public_url = \"crm.example.com\"",
        "1:19: http.public_url: \"crm.example.com\" is not such a URL; an http or https URL without a slash at its end, such as \"https://crm.example.com\"",
    ),
    (
        "http.public_url = \"https://crm.example.com/\"",
        "1:19: http.public_url: \"https://crm.example.com/\" ends with a slash; an http or https URL without a slash at its end, such as \"https://crm.example.com\"; did you mean \"https://crm.example.com\"?",
    ),
    (
        "http.allowed_origins = \"https://a.example\"",
        "1:24: http.allowed_origins: \"https://a.example\" is text, not a list in brackets; a list, each item a site such as \"https://crm.example.com\", without a path",
    ),
    (
        "http.allowed_origins = [\"https://a.example/\"]",
        "1:24: http.allowed_origins: \"https://a.example/\" has a path; a list, each item a site such as \"https://crm.example.com\", without a path; did you mean \"https://a.example\"?",
    ),
    (
        "http.allowed_origins = [\"*\"]",
        "1:24: http.allowed_origins: \"*\" is not a site; a list, each item a site such as \"https://crm.example.com\", without a path",
    ),
    (
        "http.shutdown_timeout = \"11m\"",
        "1:25: http.shutdown_timeout: \"11m\" is too long; a duration from 0s to 10m, such as \"90s\" or \"1h 30m\"",
    ),
    (
        "auth.algorithm = \"HS512\"",
        "1:18: auth.algorithm: \"HS512\" is unknown; \"HS256\", \"EdDSA\", \"RS256\" or \"ES256\"",
    ),
    (
        "auth.algorithm = \"hs256\"",
        "1:18: auth.algorithm: \"hs256\" is unknown; \"HS256\", \"EdDSA\", \"RS256\" or \"ES256\"; did you mean \"HS256\"?",
    ),
    (
        "auth.issuer = \"\"",
        "1:15: auth.issuer: is empty; the iss of the tokens, as text in quotes",
    ),
    (
        "mail.directory = \"\"",
        "1:18: mail.directory: is empty; a path; relative ones begin in the state directory",
    ),
    (
        "mail.from = \"nobody\"",
        "1:13: mail.from: \"nobody\" is not valid (Invalid input); an address such as \"CRM <crm@example.com>\"",
    ),
    (
        "mail.max_attachment = 7340032",
        "1:23: mail.max_attachment: 7340032 has no unit; a size up to 1024MiB in B, KiB, MiB, GiB, KB, MB or GB, such as \"7MiB\"; did you mean \"7340032B\"?",
    ),
    (
        "mail.uncertain = \"giveup\"",
        "1:18: mail.uncertain: \"giveup\" is unknown; \"retry\" or \"give_up\"; did you mean \"give_up\"?",
    ),
    (
        "mail.smtp = \"smtp.example.com\"",
        "1:13: mail.smtp: is a section, not a value; write its keys under a line [mail.smtp]",
    ),
    (
        "mail.smtp = {}",
        "1:13: mail.smtp.host: is missing; the name of the server",
    ),
    (
        "mail.smtp = { host = \"h\", port = 0 }",
        "1:34: mail.smtp.port: 0 is too small; a whole number from 1 to 65535",
    ),
    (
        "mail.smtp = { host = \"h\", port = 65536 }",
        "1:34: mail.smtp.port: 65536 is too large; a whole number from 1 to 65535",
    ),
    (
        "mail.smtp = { host = \"h\", tls = \"ssl\" }",
        "1:33: mail.smtp.tls: \"ssl\" is unknown; \"starttls\", \"tls\" or \"none\"",
    ),
    (
        "mail.smtp = { host = \"h\", user = \"u\" }",
        "1:34: mail.smtp.user: is set without a password; set both, or none",
    ),
    (
        "mail.smtp = { host = \"h\", password = \"p\" }",
        "1:38: mail.smtp.password: is set without a user; set both, or none",
    ),
    (
        "mail.smtp = { host = \"h\", timeout = \"0s\" }",
        "1:37: mail.smtp.timeout: \"0s\" is too short; a duration from 1s to 10m, such as \"90s\" or \"1h 30m\"",
    ),
    (
        "mail.smtp = { host = \"h\", ca = true }",
        "1:32: mail.smtp.ca: true is a flag, not text in quotes; a path; relative ones begin in the state directory",
    ),
    (
        "mail = { directory = \"d\", smtp = { host = \"h\" } }",
        "1:22: mail.directory: is set beside mail.smtp; set one of the two",
    ),
    (
        "realtime.window = 10001",
        "1:19: realtime.window: 10001 is too large; a whole number from 1 to 10000",
    ),
    (
        "realtime.window = \"256\"",
        "1:19: realtime.window: \"256\" is text, not a whole number; a whole number from 1 to 10000",
    ),
    (
        "realtime.window = 2.5",
        "1:19: realtime.window: 2.5 is a number, not a whole number; a whole number from 1 to 10000",
    ),
    (
        "realtime.window = 99999999999999999999999999999999999999999",
        "1:19: realtime.window: 170141183460469231731687303715884105727 is too large; a whole number from 1 to 10000",
    ),
    (
        "realtime.ack_timeout = \"500ms\"",
        "1:24: realtime.ack_timeout: \"500ms\" is too short; a duration from 1s to 10m, such as \"90s\" or \"1h 30m\"",
    ),
    (
        "export.directory = []",
        "1:20: export.directory: [] is a list, not text in quotes; a path; relative ones begin in the state directory",
    ),
    (
        "export.branding.colour = \"blue\"",
        "1:26: export.branding.colour: \"blue\" is not a colour; a colour such as \"#1f4e79\"",
    ),
    (
        "export.locale = \"de\"",
        "1:17: export.locale: \"de\" is unknown; \"en\" or \"pt\"",
    ),
    (
        "export.keep = \"7 dogs\"",
        "1:15: export.keep: \"7 dogs\" is not a duration (unknown time unit \"dogs\", supported units: ns, us/µs, ms, sec, min, hours, days, weeks, months, years (and few variations)); a duration from 1s to 3650d, such as \"90s\" or \"1h 30m\"",
    ),
    (
        "history.keep = \"5m\"",
        "1:16: history.keep: \"5m\" is too short; a duration from 1h to 3650d, such as \"90s\" or \"1h 30m\"",
    ),
    (
        "alerts.to = \"ops@example.com\"",
        "1:13: alerts.to: \"ops@example.com\" is text, not a list in brackets; a list, each item an address such as \"ops@example.com\"",
    ),
    (
        "alerts.to = [\"ops\"]",
        "1:13: alerts.to: \"ops\" is not valid (Missing domain or user); a list, each item an address such as \"ops@example.com\"",
    ),
    (
        "alerts.to = [\"Ops <ops@example.com>\"]",
        "1:13: alerts.to: \"Ops <ops@example.com>\" is not valid (Invalid email user); a list, each item an address such as \"ops@example.com\"; did you mean \"ops@example.com\"?",
    ),
    (
        "alerts.after = 0",
        "1:16: alerts.after: 0 is too small; a whole number from 1 to 1000",
    ),
    (
        "alerts.too = []",
        "1:8: alerts.too: unknown key; alerts takes after, to; did you mean \"to\"?",
    ),
    (
        "log.format = \"jsn\"",
        "1:14: log.format: \"jsn\" is unknown; \"auto\", \"text\" or \"json\"; did you mean \"json\"?",
    ),
    (
        "log.level = \"inof\"",
        "1:13: log.level: \"inof\" is not a level; off, error, warn, info, debug, trace, or directives such as \"info,sqlx=warn\"; did you mean \"info\"?",
    ),
    (
        "log.level = \"info,sqlx=loud\"",
        "1:13: log.level: \"info,sqlx=loud\" is not valid (error parsing level filter: expected one of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\", or a number 0-5); off, error, warn, info, debug, trace, or directives such as \"info,sqlx=warn\"",
    ),
    (
        "log.level = \"\"",
        "1:13: log.level: is empty; off, error, warn, info, debug, trace, or directives such as \"info,sqlx=warn\"",
    ),
];

#[test]
fn wrong_values_in_the_file_are_told_with_what_is_allowed() {
    assert_said(WRONG_VALUES);
}

#[test]
fn wrong_jobs_are_told_by_their_names() {
    let job = |rest: &str| {
        format!("[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\nevery = \"1h\"\n{rest}")
    };
    let cases = [
        ("jobs = 1".to_owned(), "1:8: jobs: is not a list of tables; write each under a line [[jobs]]"),
        ("jobs = [1]".to_owned(), "1:9: jobs[0]: is not a table; write each under a line [[jobs]]"),
        ("[jobs]\nname = \"j\"".to_owned(), "1:1: jobs: is not a list of tables; write each under a line [[jobs]]"),
        (
            "[[jobs]]\nkind = \"purge_expired\"\nevery = \"1h\"".to_owned(),
            "1:1: jobs[0].name: is missing; 1 to 64 of a-z, 0-9 and -",
        ),
        (
            "[[jobs]]\nname = \"Nightly Purge\"\nkind = \"purge_expired\"\nevery = \"1h\"".to_owned(),
            "2:8: jobs.Nightly Purge.name: \"Nightly Purge\" is not a name of a job; 1 to 64 of a-z, 0-9 and -; did you mean \"nightly-purge\"?",
        ),
        (
            format!("{}\n{}", job(""), job("")),
            "7:8: jobs.j.name: \"j\" is the name of another job",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge\"\nevery = \"1h\"\nolder_than = \"1d\"".to_owned(),
            "3:8: jobs.j.kind: \"purge\" is unknown; \"realtime_delivery\", \"purge_expired\" or \"timeline_export\"",
        ),
        (
            "[[jobs]]\nname = \"j\"\nevery = \"1h\"".to_owned(),
            "1:1: jobs.j.kind: is missing; \"realtime_delivery\", \"purge_expired\" or \"timeline_export\"",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"".to_owned(),
            "1:1: jobs.j.every: is missing, and cron too; every = \"1s\" or cron = \"0 30 3 * * *\"",
        ),
        (job("cron = \"0 0 3 * * *\""), "5:8: jobs.j.cron: is set beside every; set one of the two"),
        (job("timezone = \"UTC\""), "5:12: jobs.j.timezone: belongs to cron; leave it out: every is the same in all zones"),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\nevery = \"50ms\"".to_owned(),
            "4:9: jobs.j.every: \"50ms\" is too short; a duration from 100ms to 366d, such as \"90s\" or \"1h 30m\"",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\nevery = \"1s 1us\"".to_owned(),
            "4:9: jobs.j.every: 1s 1us is not in whole milliseconds; a duration from 100ms to 366d, such as \"90s\" or \"1h 30m\"",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\ncron = \"0 99 * * * *\"".to_owned(),
            "4:8: jobs.j.cron: \"0 99 * * * *\" is not a cron expression (minute \"99\"); minute takes 0-59 with * , - /",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\ncron = \"0 0 3 * * *\"\ntimezone = \"Europe/Lisboa\"".to_owned(),
            "5:12: jobs.j.timezone: \"Europe/Lisboa\" is unknown; a zone of the IANA database, such as \"Europe/Lisbon\"; did you mean \"Europe/Lisbon\"?",
        ),
        (job("enabled = 1"), "5:11: jobs.j.enabled: 1 is a number; true or false, without quotes"),
        (job("timeout = \"0s\""), "5:11: jobs.j.timeout: \"0s\" is too short; a duration from 100ms to 7d, such as \"90s\" or \"1h 30m\""),
        (job("overlap = \"que\""), "5:11: jobs.j.overlap: \"que\" is unknown; \"skip\" or \"queue\""),
        (
            job("expect_within = \"1h\""),
            "5:17: jobs.j.expect_within: 1h is not longer than 1h, which can pass between two of its times; a duration that is longer; did you mean \"2h\"?",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\ncron = \"0 0 3 * * *\"\nexpect_within = \"10s\"".to_owned(),
            "5:17: jobs.j.expect_within: 10s is not longer than 1d, which can pass between two of its times; a duration that is longer; did you mean \"2d\"?",
        ),
        (job("expect_within = 7200"), "5:17: jobs.j.expect_within: 7200 has no unit; a duration from 1s to 732d, such as \"90s\" or \"1h 30m\"; did you mean \"7200s\"?"),
        (job("retry = 5"), "5:9: jobs.j.retry: is a section, not a value; write its keys under a line [jobs.j.retry]"),
        (job("retry = { attempts = 0 }"), "5:22: jobs.j.retry.attempts: 0 is too small; a whole number from 1 to 100"),
        (job("retry = { first = \"10m\" }"), "5:9: jobs.j.retry.max: 5m is less than first, 10m; at least as long as first"),
        (job("retry = { frist = \"1s\" }"), "5:11: jobs.j.retry.frist: unknown key; jobs.j.retry takes attempts, first, max; did you mean \"first\"?"),
        (job("older_than = 7"), "5:14: jobs.j.older_than: 7 has no unit; a duration from 0s to 36500d, such as \"90s\" or \"1h 30m\"; did you mean \"7s\"?"),
        (job("max_rate = -1"), "5:12: jobs.j.max_rate: -1 is too small; a whole number from 0 to 1000000"),
        (job("dry_run = \"no\""), "5:11: jobs.j.dry_run: \"no\" is text; true or false, without quotes"),
        (
            job("batch = 5"),
            "5:1: jobs.j.batch: unknown key; jobs.j takes catch_up, catch_up_within, cron, dry_run, enabled, every, expect_within, kind, max_rate, name, older_than, overlap, retry, timeout, timezone",
        ),
        (
            "[[jobs]]\nname = \"j\"\nkind = \"realtime_delivery\"\nevery = \"1s\"\nbatch = 0".to_owned(),
            "5:9: jobs.j.batch: 0 is too small; a whole number from 1 to 10000",
        ),
        (
            "[[jobs]]\nname = \"a\"\nkind = \"realtime_delivery\"\nevery = \"1s\"\n[[jobs]]\nname = \"b\"\nkind = \"realtime_delivery\"\nevery = \"1s\"".to_owned(),
            "7:8: jobs.b.kind: \"a\" is an enabled realtime_delivery job already; at most one is; a second would deliver nothing more",
        ),
    ];
    let cases: Vec<(&str, &str)> = cases
        .iter()
        .map(|(text, said)| (text.as_str(), *said))
        .collect();
    assert_said(&cases);
}

#[test]
fn wrong_exports_are_told_by_their_names() {
    let export = |rest: &str| {
        format!("[[jobs]]\nname = \"x\"\nkind = \"timeline_export\"\nevery = \"7d\"\n{rest}")
    };
    let all = "tenant = \"t\"\ncontacts = [\"0198c0de-0000-7000-8000-000000000001\"]\nto = [\"a@b.example\"]\n";
    let cases = [
        (
            export(""),
            "1:1: jobs.x.contacts: is missing, and select too; contacts = [\"…\"] or select = { active_since = \"7d\" }\n\
             1:1: jobs.x.tenant: is missing; the id of a tenant, 1 to 255 characters\n\
             1:1: jobs.x.to: is missing; a list, each item an address such as \"ops@example.com\"",
        ),
        (
            export(&format!("{all}select = {{ active_since = \"7d\" }}")),
            "8:10: jobs.x.select: is set beside contacts; set one of the two",
        ),
        (
            export(&format!("{all}audience = \"agents\"")),
            "8:12: jobs.x.audience: \"agents\" is unknown; \"client\", \"agent\" or \"audit\"; did you mean \"agent\"?",
        ),
        (
            export(&format!("{all}format = \"json\"")),
            "8:10: jobs.x.format: \"json\" is unknown; \"csv\", \"csv.gz\", \"csv.zst\", \"pdf\", \"jsonl\", \"jsonl.gz\", \"jsonl.zst\" or \"xlsx\"; did you mean \"jsonl\"?",
        ),
        (
            format!(
                "{}[mail]\nallowed_domains = [\"b.test\", \"u:b.example\"]",
                export(all)
            ),
            "7:6: jobs.x.to: \"a@b.example\" is not at a domain that t may have mail sent to; those of mail.allowed_domains",
        ),
        (
            export(&format!("{all}period = \"0s\"")),
            "8:10: jobs.x.period: \"0s\" is too short; a duration from 1s to 36500d, such as \"90s\" or \"1h 30m\"",
        ),
        (
            export(
                "tenant = \"\"\nselect = { active_since = \"7d\", category = \"taag\" }\nto = []",
            ),
            "5:10: jobs.x.tenant: \"\" is not valid (must be 1 to 255 characters, is 0); the id of a tenant, 1 to 255 characters\n\
             6:44: jobs.x.select.category: \"taag\" is unknown; \"general\", \"status\", \"pipeline\", \"assignment\", \"tag\", \"note\", \"session\", \"custom_field\", \"system\", \"notification\" or \"tracking\"; did you mean \"tag\"?\n\
             7:6: jobs.x.to: is empty; a list, each item an address such as \"ops@example.com\"",
        ),
        (
            export("tenant = \"t\"\ncontacts = [\"7\"]\nto = [\"nobody\"]"),
            "6:12: jobs.x.contacts: \"7\" is not valid (\"7\" is not a UUID such as 0190b5f0-7c1e-7d3a-8f00-000000000001); a list, each item the UUID of a contact\n\
             7:6: jobs.x.to: \"nobody\" is not valid (Missing domain or user); a list, each item an address such as \"ops@example.com\"",
        ),
    ];
    let cases: Vec<(&str, &str)> = cases
        .iter()
        .map(|(text, said)| (text.as_str(), *said))
        .collect();
    assert_said(&cases);
}

#[test]
fn keys_that_are_unknown_doubled_or_broken_are_told_with_their_place() {
    assert_said(&[
        (
            "windw = 1",
            "1:1: windw: unknown key; the file takes alerts, auth, database, export, history, http, jobs, log, mail, realtime, retention, state_directory",
        ),
        (
            "listen = \"127.0.0.1:1\"",
            "1:1: listen: unknown key; the file takes alerts, auth, database, export, history, http, jobs, log, mail, realtime, retention, state_directory; did you mean \"http.listen\"?",
        ),
        (
            "\"http.listen\" = \"127.0.0.1:1\"",
            "1:1: http.listen: unknown key",
        ),
        (
            "[http]\n\"listen.x\" = 1",
            "2:1: http.listen.x: unknown key; http takes allowed_origins, listen, ops_listen, public_url, shutdown_timeout; did you mean \"listen\"?",
        ),
        (
            "[http]\nLISTEN = \"127.0.0.1:1\"",
            "2:1: http.LISTEN: unknown key; http takes allowed_origins, listen, ops_listen, public_url, shutdown_timeout; did you mean \"listen\"?",
        ),
        (
            "[mail.smpt]\nhost = \"h\"",
            "1:7: mail.smpt: unknown key; mail takes allowed_domains, directory, from, max_attachment, smtp, uncertain; did you mean \"smtp\"?",
        ),
        (
            "[mail.smtp]\nhost = \"h\"\nhots = \"h\"",
            "3:1: mail.smtp.hots: unknown key; mail.smtp takes ca, host, password, port, timeout, tls, user; did you mean \"host\"?",
        ),
        (
            "[realtime]\nwindow = 1\nwindow = 2\nack_timeout = 1",
            "3:1: realtime.window: is there twice; keep one\n\
             4:15: realtime.ack_timeout: 1 has no unit; a duration from 1s to 10m, such as \"90s\" or \"1h 30m\"; did you mean \"1s\"?",
        ),
        (
            "[http]\n[log]\n[http]\nlisten = 1",
            "3:2: http: is there twice; keep one",
        ),
        (
            "[[jobs]]\nname = \"a\"\nkind = \"purge_expired\"\nevery = \"1h\"\n[[jobs]]\nname = \"b\"\nkind = \"purge_expired\"\nevery = \"1h\"\nevery = \"2h\"",
            "9:1: jobs.b.every: is there twice; keep one",
        ),
        (
            "state_directory = \"a\"\nstate_directory = \"b\"",
            "2:1: state_directory: is there twice; keep one",
        ),
        (
            "[http]\nlisten = 127.0.0.1:80",
            "2:15: TOML: invalid float, expected nothing",
        ),
        (
            "[http\nlisten = \"x\"",
            "1:6: TOML: unclosed table, expected `]`",
        ),
        (
            "# é\nx = \"é",
            "2:7: TOML: invalid basic string, expected `\"`",
        ),
        (
            "[http]\n  # é\n  listen = [ \"ééé\", 5 ]",
            "3:12: http.listen: [\"ééé\", 5] is a list, not text in quotes; an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"",
        ),
    ]);
}

#[test]
fn keys_of_access_must_fit_each_other() {
    let long = "at least 32 bytes";
    let cases = [
        (
            "[auth]\nhs256_key = \"hunter2\"".to_owned(),
            format!("2:13: auth.hs256_key: is 7 bytes long; {long}"),
        ),
        (
            "[database]\nurl = \"postgres://u:pw@h/d\"".to_owned(),
            format!("2:7: auth.hs256_key: is missing; daemons that share a PostgreSQL must share a key; {long}"),
        ),
        (
            "[http]\nlisten = \"0.0.0.0:80\"".to_owned(),
            "2:10: auth.hs256_key: is missing, while 0.0.0.0:80 can be reached from outside; set a key of at least 32 bytes, or listen on 127.0.0.1".to_owned(),
        ),
        (
            format!("[http]\nlisten = \"0.0.0.0:80\"\n[auth]\nhs256_key = {KEY:?}"),
            String::new(),
        ),
        (
            "[auth]\nalgorithm = \"ES256\"".to_owned(),
            "2:13: auth.public_key: is missing; ES256 needs one; { file = \"…\" } with a public key in PEM".to_owned(),
        ),
        (
            format!("[auth]\npublic_key = \"{ED25519}\""),
            "2:14: auth.public_key: is of no use to HS256; set auth.algorithm to \"EdDSA\", \"RS256\" or \"ES256\", or leave it out".to_owned(),
        ),
        (
            format!("[auth]\nalgorithm = \"EdDSA\"\npublic_key = \"{ED25519}\"\nhs256_key = {KEY:?}"),
            "4:13: auth.hs256_key: is of no use to EdDSA; set auth.algorithm to \"HS256\", or leave it out".to_owned(),
        ),
    ];
    let cases: Vec<(&str, &str)> = cases
        .iter()
        .map(|(text, said)| (text.as_str(), said.as_str()))
        .collect();
    assert_said(&cases);
}

#[test]
fn wrong_secrets_are_told_without_their_text() {
    let forms = "text in quotes, { credential = \"…\" }, { file = \"…\" } or { env = \"…\" }";
    let sources = "{ credential = \"…\" }, { file = \"…\" } or { env = \"…\" }";
    let smtp = |password: &str| {
        format!("mail.smtp = {{ host = \"h\", user = \"u\", password = {password} }}")
    };
    let cases = [
        (smtp("12345"), format!("1:50: mail.smtp.password: is a number; {forms}")),
        (smtp("\"\""), format!("1:50: mail.smtp.password: is empty; {forms}")),
        (smtp("[\"s3cret\"]"), format!("1:50: mail.smtp.password: is a list; {forms}")),
        (smtp("{}"), format!("1:50: mail.smtp.password: does not name one source; {sources}")),
        (
            smtp("{ file = \"a\", env = \"B\" }"),
            format!("1:50: mail.smtp.password: does not name one source; {sources}"),
        ),
        (
            smtp("{ path = \"a\" }"),
            "1:52: mail.smtp.password.path: unknown key; mail.smtp.password takes credential, env, file".to_owned(),
        ),
        (smtp("{ env = \"NOT_SET\" }"), "1:58: mail.smtp.password.env: the environment has no NOT_SET".to_owned()),
        (
            smtp("{ file = \"not-there\" }"),
            "1:59: mail.smtp.password.file: DIR/data/not-there cannot be read (No such file or directory (os error 2))".to_owned(),
        ),
        (
            smtp("{ credential = \"c\" }"),
            "1:65: mail.smtp.password.credential: there are no credentials, since $CREDENTIALS_DIRECTORY is not set; run by systemd with LoadCredential=".to_owned(),
        ),
        (
            smtp("{ credential = \"../c\" }"),
            "1:65: mail.smtp.password.credential: \"../c\" is not the name of a credential".to_owned(),
        ),
        (
            "database.url = { env = \"NOT_SET\" }".to_owned(),
            "1:24: database.url.env: the environment has no NOT_SET".to_owned(),
        ),
        (
            "database.url = \"postgres://u:p/w:x@h:y/d\"".to_owned(),
            "1:16: database.url: is not a PostgreSQL URL; write @ / : and ? within a password as %40 %2F %3A %3F; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"".to_owned(),
        ),
    ];
    let cases: Vec<(&str, &str)> = cases
        .iter()
        .map(|(text, said)| (text.as_str(), said.as_str()))
        .collect();
    assert_said(&cases);

    let empty = Setup::file("auth.hs256_key = { file = \"key\" }").with("data/key", "\n");
    assert_eq!(
        empty.said(),
        "config/timelined.toml:1:27: auth.hs256_key.file: leads to an empty secret"
    );
    let by_secret =
        Setup::file("database.url = { env = \"DB\" }").variable("DB", "mysql://u:s3cret@h/d");
    assert_eq!(
        by_secret.said(),
        "config/timelined.toml:1:16: database.url: is of another engine; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\""
    );
}

#[test]
fn wrong_variables_are_told_by_their_names() {
    let form =
        "a name is TIMELINED__SECTION__KEY, in capitals, with two underscores before each part";
    let unknown = |meant: &str| format!("unknown variable; {form}; did you mean \"{meant}\"?");
    let cases = [
        ("TIMELINED_HTTP__LISTEN", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED__HTTP_LISTEN", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED_HTTP_LISTEN", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED__HTTP___LISTEN", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("timelined__http__listen", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED__Http__Listen", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED__HTTP__LISTN", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED__HTTP__LISTEN__X", "x", unknown("TIMELINED__HTTP__LISTEN")),
        ("TIMELINED__MAIL__SMTP__PASWORD", "x", unknown("TIMELINED__MAIL__SMTP__PASSWORD")),
        ("TIMELINED_STATE_DIRECTORY", "x", unknown("TIMELINED__STATE_DIRECTORY")),
        ("TIMELINED", "x", format!("unknown variable; {form}")),
        ("TIMELINED__NOTHING__LIKE_IT", "x", format!("unknown variable; {form}")),
        ("TIMELINED__JOBS__0__CRON", "x", "jobs cannot be set by variables; write [[jobs]] in the file".to_owned()),
        ("TIMELINED__RETENTION__0__MAX_AGE", "1d", "retention cannot be set by variables; write [[retention]] in the file".to_owned()),
        ("TIMELINED__HTTP", "x", "is a section, not a value; set its keys, each by a variable TIMELINED__HTTP__…".to_owned()),
        ("TIMELINED__REALTIME__WINDOW", "many", "\"many\" is text, not a whole number; a whole number from 1 to 10000".to_owned()),
        ("TIMELINED__REALTIME__WINDOW", "0", "0 is too small; a whole number from 1 to 10000".to_owned()),
        ("TIMELINED__DATABASE__MIGRATE", "yes", "\"yes\" is text; true or false, without quotes".to_owned()),
        ("TIMELINED__DATABASE__URL", "oracle://u:s3cret@h", "is of another engine; \"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"".to_owned()),
        ("TIMELINED__AUTH__HS256_KEY", "s3cret", "is 6 bytes long; at least 32 bytes".to_owned()),
        ("TIMELINED__HTTP__LISTEN", "0.0.0.0:80", "auth.hs256_key: is missing, while 0.0.0.0:80 can be reached from outside; set a key of at least 32 bytes, or listen on 127.0.0.1".to_owned()),
    ];
    for (name, value, expected) in cases {
        let said = Setup::new().variable(name, value).said();
        let said = said
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or(&said);
        assert_eq!(said, format!("{name}: {expected}"));
        assert!(!said.contains("s3cret"));
    }
}

#[test]
fn wrong_retention_rules_are_told_word_for_word() {
    let period = "a duration from 0s to 36500d, such as \"90s\" or \"1h 30m\"";
    let rule = |lines: &str| format!("[[retention]]\n{lines}\n");
    let cases = [
        (rule("older_than = 30"), format!("2:14: retention[0].older_than: 30 has no unit; {period}; did you mean \"30s\"?")),
        (rule("older_than = \"999999d\""), format!("2:14: retention[0].older_than: \"999999d\" is too long; {period}")),
        (rule("max_age = \"0s\""), "2:11: retention[0].max_age: \"0s\" is too short; a duration from 1s to 36500d, such as \"90s\" or \"1h 30m\"".to_owned()),
        (rule("max_age = \"1d\"\ncategory = \"tracing\""), "3:12: retention[0].category: \"tracing\" is unknown; \"general\", \"status\", \"pipeline\", \"assignment\", \"tag\", \"note\", \"session\", \"custom_field\", \"system\", \"notification\" or \"tracking\"; did you mean \"tracking\"?".to_owned()),
        (rule("max_age = \"1d\"\nevent_type = \"Note Added\""), "3:14: retention[0].event_type: \"Note Added\" is not a type of an event; 1 to 64 of a-z, 0-9, _ and ., beginning with a letter; did you mean \"note_added\"?".to_owned()),
        (rule("max_age = \"1d\"\ntenant = \"\""), "3:10: retention[0].tenant: \"\" is not valid (must be 1 to 255 characters, is 0); the id of a tenant, 1 to 255 characters".to_owned()),
        (rule("max_age = \"1d\"\ncatgory = \"note\""), "3:1: retention[0].catgory: unknown key; retention[0] takes category, event_type, max_age, older_than, tenant; did you mean \"category\"?".to_owned()),
        (rule("tenant = \"acme\""), "1:1: retention[0]: says no period; older_than for events with an expiry, max_age for those without one, or both".to_owned()),
        (format!("{}{}", rule("max_age = \"1d\"\ntenant = \"acme\""), rule("older_than = \"1d\"\ntenant = \"acme\"")),
         "4:1: retention[1]: selects what retention[0] selects; one rule for each tenant, category and event_type: join the two".to_owned()),
        ("[retention]\nmax_age = \"1d\"".to_owned(), "1:1: retention: is not a list of tables; write each under a line [[retention]]".to_owned()),
    ];
    let cases: Vec<(&str, &str)> = (cases.iter())
        .map(|(text, said)| (text.as_str(), said.as_str()))
        .collect();
    assert_said(&cases);
}
