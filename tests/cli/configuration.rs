//! Exit code 78, and `timelined config`.

use crate::support::daemon::Settings;
use crate::{Ran, ran, run};

/// What a command says about a configuration, without the directory of the test.
fn said_about(text: &str) -> Ran {
    let settings = Settings::new().config(text);
    let directory = settings.state().parent().unwrap().display().to_string();
    let mut ran = run(&settings, &["config", "check"]);
    ran.err = ran.err.replace(&format!("{directory}/"), "");
    ran
}

#[test]
fn an_unknown_key_is_refused_with_its_place_and_the_right_name() {
    said_about("[http]\n  listn = \"127.0.0.1:1\"\n").failed(
        78,
        "timelined.toml:2:3: http.listn: unknown key; http takes allowed_origins, listen, ops_listen, public_url, shutdown_timeout; did you mean \"listen\"?",
    );
}

#[test]
fn a_variable_with_one_underscore_too_few_is_refused_with_the_right_name() {
    let settings = Settings::new().env("TIMELINED_HTTP__LISTEN", "127.0.0.1:1");
    run(&settings, &["config", "check"]).failed(
        78,
        "TIMELINED_HTTP__LISTEN: unknown variable; a name is TIMELINED__SECTION__KEY, in capitals, with two underscores before each part; did you mean \"TIMELINED__HTTP__LISTEN\"?",
    );
}

#[test]
fn a_cron_line_of_five_fields_is_refused_with_the_six_that_are_meant() {
    said_about("[[jobs]]\nname = \"p\"\nkind = \"purge_expired\"\ncron = \"30 3 * * *\"\n").failed(
        78,
        "timelined.toml:4:8: jobs.p.cron: \"30 3 * * *\" has five fields; six are needed, seconds first; did you mean \"0 30 3 * * *\"?",
    );
}

#[test]
fn a_mail_server_that_cannot_be_used_is_an_error_of_the_configuration() {
    for (smtp, said) in [
        (
            "host = \"relay.example.com\"\ntls = \"none\"\nuser = \"u\"\npassword = \"hunter2\"\n",
            "timelined: mail.smtp: a password is not sent to \"relay.example.com\" in clear; set tls = \"starttls\" or \"tls\", or use a relay on this host",
        ),
        (
            "host = \"relay.example.com\"\nca = \"/nonexistent.pem\"\n",
            "timelined: mail.smtp.ca: cannot read /nonexistent.pem: No such file or directory (os error 2)",
        ),
        (
            "host = \"a b\"\n",
            "timelined.toml:2:8: mail.smtp.host: \"a b\" is not a host name; the name of the server",
        ),
    ] {
        let text = format!("[mail.smtp]\n{smtp}");
        said_about(&text).failed(78, said);
        let ran = run(&Settings::new().config(&text), &["run"]);
        assert_eq!(ran.code, 78, "{ran:?}");
        assert!(!ran.err.contains("hunter2"), "{ran:?}");
    }
}

#[test]
fn a_password_in_the_public_url_is_refused_and_not_shown() {
    let ran = said_about("[http]\npublic_url = \"https://crm:hunter2@example.com/\"\n");
    ran.failed_saying(
        78,
        "timelined.toml:2:14: http.public_url: has a user or a password in it",
    );
    assert!(!ran.err.contains("hunter2"), "{ran:?}");
}

#[test]
fn all_errors_come_at_once() {
    let settings = Settings::new()
        .config("[http]\nlistn = \"x\"\nshutdown_timeout = 20\n[log]\nlevel = \"inof\"\n")
        .env("TIMELINED_LOG__FORMAT", "json");
    let ran = run(&settings, &["run"]);
    let keys: Vec<&str> = ran
        .err
        .lines()
        .map(|line| {
            let line = line.rsplit_once('/').map_or(line, |(_, rest)| rest);
            line.split(": ").next().unwrap()
        })
        .collect();
    assert_eq!(ran.code, 78, "{ran:?}");
    assert_eq!(
        keys,
        [
            "timelined.toml:2:1",
            "timelined.toml:3:20",
            "timelined.toml:5:9",
            "TIMELINED_LOG__FORMAT",
        ],
        "{ran:?}"
    );
}

#[test]
fn every_command_refuses_a_wrong_configuration_before_it_does_anything() {
    let contact = crate::CONTACT;
    let settings = Settings::new().config("lisen = 1\n");
    for arguments in [
        &["run"][..],
        &[],
        &["migrate"],
        &["token", "--role", "operator"],
        &["config", "show"],
        &["jobs", "list"],
        &["events", "list", contact, "--tenant", "acme"],
        &["events", "watch", contact, "--tenant", "acme"],
        &["purge"],
        &["export", contact, "--tenant", "acme", "--output", "-"],
    ] {
        run(&settings, arguments).failed_saying(78, "timelined.toml:1:1: lisen: unknown key");
    }
    assert!(!settings.state().exists());
}

#[test]
fn a_configuration_that_is_named_must_be_there() {
    let settings = Settings::new();
    run(&settings, &["--config", "none.toml", "config", "check"]).failed(
        78,
        "none.toml: cannot be read: No such file or directory (os error 2)",
    );
}

#[test]
fn the_check_says_what_it_has_read() {
    let settings = Settings::new().config("");
    let said = run(&settings, &["config", "check"]).done();
    let first = said.lines().next().unwrap();
    assert!(first.ends_with("timelined.toml: no errors"), "{said}");
    let json = run(&settings, &["config", "check", "--json"]).json();
    assert_eq!(json["valid"], true);
}

#[test]
fn the_file_of_the_working_directory_is_taken_and_the_one_in_etc_only_without_it() {
    let settings = Settings::new();
    let home = settings.state().parent().unwrap().to_owned();
    let said = run(&settings, &["config", "check"]).done();
    assert!(!said.starts_with("config/timelined.toml"), "{said}");
    std::fs::create_dir(home.join("config")).unwrap();
    std::fs::write(home.join("config/timelined.toml"), "[log]\n").unwrap();
    let said = run(&settings, &["config", "check"]).done();
    assert!(
        said.starts_with("config/timelined.toml: no errors\n"),
        "{said}"
    );
}

#[test]
fn the_check_tells_the_next_five_times_of_each_job_and_what_its_schedule_means() {
    let settings = Settings::new().config(
        "[[jobs]]\nname = \"poll\"\nkind = \"realtime_delivery\"\nevery = \"250ms\"\n\
         [[jobs]]\nname = \"nightly\"\nkind = \"purge_expired\"\ncron = \"0 30 3 * * *\"\ntimezone = \"Asia/Kolkata\"\n\
         [[jobs]]\nname = \"off\"\nkind = \"purge_expired\"\ncron = \"0 0 12 * * *\"\nenabled = false\n",
    );
    let said = run(&settings, &["config", "check"]).done();
    let blocks: Vec<Vec<&str>> = said
        .split("\n\n")
        .map(|block| block.lines().collect())
        .collect();
    let [_, poll, nightly, off] = &blocks[..] else {
        panic!("{said}");
    };
    assert_eq!(poll[0], "poll: every 250ms");
    assert_eq!(poll.len(), 6, "{said}");
    // In UTC there is no second way to write it.
    assert!(poll[1..].iter().all(|line| line.ends_with('Z')), "{said}");
    assert_eq!(
        nightly[0],
        "nightly: At 03:30, in Asia/Kolkata (0 30 3 * * *)"
    );
    assert_eq!(nightly.len(), 6, "{said}");
    for line in &nightly[1..] {
        let (local, utc) = line.trim().split_once("  ").unwrap();
        assert!(local.ends_with("T03:30:00+05:30"), "{said}");
        assert!(utc.ends_with("T22:00:00Z"), "{said}");
    }
    assert_eq!(
        off[..],
        [
            "off: At 12:00, in UTC (0 0 12 * * *)",
            "  disabled: it runs only when asked to"
        ]
    );

    let json = run(&settings, &["config", "check", "--json"]).json();
    let jobs = json["jobs"].as_array().unwrap();
    assert_eq!(jobs[1]["words"], "At 03:30");
    assert_eq!(jobs[1]["timezone"], "Asia/Kolkata");
    let next = jobs[1]["next"].as_array().unwrap();
    let times: Vec<_> = next
        .iter()
        .map(|time| {
            let read = |key: &str| {
                chrono::DateTime::parse_from_rfc3339(time[key].as_str().unwrap()).unwrap()
            };
            assert_eq!(read("local"), read("utc"));
            read("utc")
        })
        .collect();
    assert_eq!(times.len(), 5);
    assert!(
        times
            .windows(2)
            .all(|pair| pair[1] - pair[0] == chrono::TimeDelta::days(1)),
        "{times:?}"
    );
    assert_eq!(jobs[2]["next"], serde_json::json!([]));
}

#[test]
fn each_value_is_shown_with_its_origin_and_no_secret_ever() {
    let settings = Settings::new()
        .config("[http]\nlisten = \"127.0.0.1:1\"\n[mail.smtp]\nhost = \"mx\"\nuser = \"crm\"\npassword = { file = \"../pw\" }\n")
        .env("TIMELINED__LOG__LEVEL", "debug")
        .env(
            "TIMELINED__DATABASE__URL",
            "postgres://crm:s3cret-url@db/crm",
        )
        .env("TIMELINED__AUTH__HS256_KEY", "s3cret-key 0123456789abcdef012345");
    std::fs::create_dir(settings.state()).unwrap();
    std::fs::write(settings.state().with_file_name("pw"), "s3cret-file\n").unwrap();
    let mut command = settings.command(&["config", "show"]);
    // This one is set for every test; here the file shall speak.
    command.env_remove("TIMELINED__HTTP__LISTEN");
    let ran = ran(&command);
    let talk = ran.err.clone();
    let shown = ran.done();
    let line = |key: &str| {
        let found = shown.lines().find(|line| line.starts_with(key));
        found.unwrap_or_else(|| panic!("{key} is not shown:\n{shown}"))
    };
    assert!(line("http.listen = \"127.0.0.1:1\"").contains("timelined.toml:2"));
    assert!(line("log.level = \"debug\"").ends_with("# TIMELINED__LOG__LEVEL"));
    assert!(line("database.migrate = true").ends_with("# default"));
    assert!(line("database.url").contains("postgres://crm:***@db/crm"));
    assert!(line("auth.hs256_key = ***").ends_with("# TIMELINED__AUTH__HS256_KEY"));
    // The reference is no secret, what it leads to is.
    assert!(line("mail.smtp.password.file = \"../pw\"").contains("timelined.toml:6"));
    let json = run(&settings, &["--json", "config", "show"]);
    for text in [&shown, &talk, &json.out, &json.err] {
        assert!(!text.contains("s3cret"), "{text}");
    }
    assert_eq!(json.json()["log.level"]["origin"], "TIMELINED__LOG__LEVEL");
}

#[test]
fn postgresql_without_a_configured_key_is_refused() {
    let settings = Settings::new().env(
        "TIMELINED__DATABASE__URL",
        "postgres://crm:s3cret@127.0.0.1:1/crm",
    );
    for arguments in [&["run"][..], &["token", "--role", "operator"]] {
        let mut command = settings.command(arguments);
        command.env_remove("TIMELINED__AUTH__HS256_KEY");
        ran(&command).failed(
            78,
            "TIMELINED__DATABASE__URL: auth.hs256_key: is missing; daemons that share a PostgreSQL must share a key; at least 32 bytes",
        );
    }
}
