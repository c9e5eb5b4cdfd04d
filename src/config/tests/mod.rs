//! What a configuration becomes; what is said about a wrong one is in `messages`.

mod messages;

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use chrono::TimeDelta;
use chrono_tz::Tz;
use tempfile::TempDir;

use super::*;
use crate::domain::Locale;
use crate::jobs::retry::RetryPolicy;
use crate::jobs::schedule::Schedule;

/// 32 bytes.
const KEY: &str = "0123456789abcdef0123456789abcdef";
const ED25519: &str = "-----BEGIN PUBLIC KEY-----\\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\\n-----END PUBLIC KEY-----\\n";

/// A working directory, and the environment of a process in it.
struct Setup {
    directory: TempDir,
    environment: Vec<(String, String)>,
}

impl Setup {
    fn new() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
            environment: Vec::new(),
        }
    }

    /// With `text` as its `config/timelined.toml`.
    fn file(text: &str) -> Self {
        Self::new().with("config/timelined.toml", text)
    }

    fn with(self, path: &str, text: &str) -> Self {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn request(&self) -> Request {
        Request {
            explicit_file: None,
            environment: self.environment.clone(),
            working_directory: self.directory.path().to_owned(),
        }
    }

    fn load(&self) -> Result<Loaded, ConfigErrors> {
        load_with(
            &self.request(),
            &self.directory.path().join("etc/timelined.toml"),
        )
    }

    fn loaded(&self) -> Loaded {
        self.load().unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn said(&self) -> String {
        let errors = self.load().err().map(|errors| errors.to_string());
        let directory = self.directory.path().display().to_string();
        errors.unwrap_or_default().replace(&directory, "DIR")
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }
}

fn shown<'a>(loaded: &'a Loaded, key: &str) -> (&'a str, String) {
    let entry = loaded.entries.iter().find(|entry| entry.key == key);
    let entry = entry.unwrap_or_else(|| panic!("no entry for {key}"));
    (&entry.value, entry.origin.to_string())
}

#[test]
fn without_a_file_the_defaults_stand() {
    let setup = Setup::new();
    let Loaded { config, file, .. } = setup.loaded();
    assert_eq!(file, Source::BuiltIn);
    assert_eq!(
        file.to_string(),
        "built-in defaults (there is neither config/timelined.toml nor /etc/timelined/timelined.toml)"
    );
    assert_eq!(
        config,
        Config {
            state_directory: setup.path("data"),
            database: Database {
                url: DatabaseUrl::Sqlite(setup.path("data/timelined.db")),
                migrate: true,
                synchronous: Synchronous::Full,
            },
            http: Http {
                listen: "127.0.0.1:8080".parse().unwrap(),
                ops_listen: Some("127.0.0.1:8081".parse().unwrap()),
                public_url: None,
                allowed_origins: Vec::new(),
                shutdown_timeout: Duration::from_secs(20),
            },
            auth: Auth {
                verifier: Verifier::Hs256(None),
                issuer: None,
            },
            mail: Mail {
                transport: Transport::Directory(setup.path("data/outbox")),
                from: "timelined <timelined@localhost>".parse().unwrap(),
                max_attachment: 7 * 1024 * 1024,
                uncertain: Uncertain::Retry,
                allowed_domains: AllowedDomains::default(),
            },
            realtime: Realtime {
                window: 256,
                ack_timeout: Duration::from_secs(30),
            },
            export: Export {
                directory: setup.path("data/exports"),
                keep: Duration::from_hours(7 * 24),
                fonts: Vec::new(),
                locale: Locale::English,
                pdf_max_events: 25_000,
                branding: Branding {
                    colour: [0x1f, 0x4e, 0x79],
                    footer: String::new(),
                },
            },
            history: History {
                keep: Duration::from_hours(30 * 24),
            },
            alerts: Alerts {
                to: Vec::new(),
                after: 3,
                expect_within: BTreeMap::new(),
            },
            log: Log {
                format: LogFormat::Auto,
                level: "info".to_owned(),
            },
            jobs: vec![
                JobDefinition {
                    name: "realtime-delivery".to_owned(),
                    schedule: Schedule::every(Duration::from_secs(1)).unwrap(),
                    enabled: true,
                    timeout: Duration::from_secs(30),
                    overlap: Overlap::Skip,
                    catch_up: CatchUp::Skip,
                    catch_up_within: Duration::from_hours(12),
                    retry: RetryPolicy::default(),
                    kind: JobKind::RealtimeDelivery { batch: 100 },
                },
                JobDefinition {
                    name: "purge-expired".to_owned(),
                    schedule: Schedule::cron("0 30 3 * * *", Tz::UTC).unwrap(),
                    enabled: true,
                    timeout: Duration::from_hours(1),
                    overlap: Overlap::Skip,
                    catch_up: CatchUp::Once,
                    catch_up_within: Duration::from_hours(12),
                    retry: RetryPolicy::default(),
                    kind: JobKind::PurgeExpired {
                        older_than: Duration::from_hours(7 * 24),
                        max_rate: 0,
                        dry_run: false,
                    },
                },
            ],
            retention: vec![],
        }
    );
}

#[test]
fn links_begin_with_the_address_that_was_bound_unless_a_public_url_is_set() {
    let bound = "127.0.0.1:41234".parse().unwrap();
    let http = Setup::file("http.listen = \"127.0.0.1:0\"")
        .loaded()
        .config
        .http;
    assert_eq!(http.link_base(bound), "http://127.0.0.1:41234");
    let http = Setup::file("http.public_url = \"https://crm.example.com/t\"")
        .loaded()
        .config
        .http;
    assert_eq!(http.link_base(bound), "https://crm.example.com/t");
}

/// Uncomments the lines that `wanted` picks, given their text behind the `#`.
fn uncommented(text: &str, wanted: impl Fn(&str) -> bool) -> String {
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if wanted(rest) => rest.trim_start(),
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn is_assignment(text: &str) -> bool {
    let key = text.split(" = ").next().filter(|key| *key != text);
    key.is_some_and(|key| {
        !key.is_empty()
            && key
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    })
}

/// `# key = value`
fn is_default(rest: &str) -> bool {
    rest.strip_prefix(' ').is_some_and(is_assignment)
}

/// `#   key = value`, `#   [section]`
fn is_example(rest: &str) -> bool {
    rest.strip_prefix("   ")
        .is_some_and(|rest| rest.starts_with('[') || is_assignment(rest))
}

#[test]
fn the_shipped_file_shows_the_defaults_of_the_code() {
    let text = include_str!("../../../config/timelined.toml");
    let setup = Setup::new();
    let built_in = setup.loaded();

    let setup = setup.with("config/timelined.toml", text);
    assert_eq!(setup.loaded().config, built_in.config, "as shipped");

    let setup = setup.with("config/timelined.toml", &uncommented(text, is_default));
    let spelled_out = setup.loaded();
    assert_eq!(
        spelled_out.config, built_in.config,
        "with each default uncommented"
    );
    let values = |loaded: &Loaded| -> BTreeSet<(String, String)> {
        let entries = loaded.entries.iter();
        entries
            .map(|entry| (entry.key.clone(), entry.value.clone()))
            .collect()
    };
    assert_eq!(values(&spelled_out), values(&built_in));
    for entry in &spelled_out.entries {
        let is_said = entry.origin != Origin::Default || entry.value == "(unset)";
        assert!(
            is_said,
            "config/timelined.toml says nothing of {}",
            entry.key
        );
    }
}

#[test]
fn the_shipped_file_shows_every_key() {
    let text = include_str!("../../../config/timelined.toml");
    let full = uncommented(text, |rest| is_default(rest) || is_example(rest));
    // What excludes each other is shown side by side; one of each goes.
    let one_of_each = full
        .replace("public_key = ", "#")
        .replace("directory = \"outbox\"", "");
    let setup = Setup::file(&one_of_each)
        .with("hs256-key", KEY)
        .with("smtp-password", "pw");
    let credentials = setup.directory.path().display().to_string();
    let loaded = setup
        .variable("CREDENTIALS_DIRECTORY", &credentials)
        .loaded();
    for entry in &loaded.entries {
        let excluded = ["auth.public_key", "mail.directory"].contains(&entry.key.as_str());
        assert!(
            excluded || entry.origin != Origin::Default,
            "config/timelined.toml does not show {}",
            entry.key
        );
    }
    for key in [
        "contacts = ",
        "public_key = ",
        "issuer = ",
        "hs256_key = ",
        "directory = ",
    ] {
        assert!(text.contains(key), "{key}");
    }
    assert_eq!(loaded.config.jobs.len(), 3);
}

#[test]
fn the_example_is_a_valid_configuration() {
    let setup = Setup::file(include_str!("../../../config/example.toml"))
        .with("hs256-key", &format!("{KEY}\n"))
        .with("smtp-password", "0123\n")
        .with(
            "database-url",
            "postgres://timelined:pw@db.example.com/timelined?sslmode=verify-full\n",
        );
    let credentials = setup.directory.path().display().to_string();
    let config = setup
        .variable("CREDENTIALS_DIRECTORY", &credentials)
        .loaded()
        .config;

    let DatabaseUrl::Postgres(url) = &config.database.url else {
        panic!("{:?}", config.database);
    };
    assert_eq!(
        url.expose_secret(),
        "postgres://timelined:pw@db.example.com/timelined?sslmode=verify-full"
    );
    assert_eq!(
        config.auth.verifier,
        Verifier::Hs256(Some(Secret::new(KEY)))
    );
    let Transport::Smtp(smtp) = &config.mail.transport else {
        panic!("{:?}", config.mail);
    };
    assert_eq!(
        (smtp.port, smtp.tls, smtp.timeout),
        (587, SmtpTls::StartTls, Duration::from_mins(1))
    );
    assert_eq!(
        smtp.login.as_ref().unwrap().password.expose_secret(),
        "0123"
    );
    let JobKind::TimelineExport(export) = &config.jobs[2].kind else {
        panic!("{:?}", config.jobs[2]);
    };
    assert_eq!(
        export.selection,
        Selection::Active {
            since: Duration::from_hours(7 * 24),
            category: Some("pipeline".parse().unwrap()),
        }
    );
    assert_eq!(export.to.len(), 2);
    assert_eq!(
        config
            .jobs
            .iter()
            .map(|job| job.kind.name())
            .collect::<Vec<_>>(),
        ["realtime_delivery", "purge_expired", "timeline_export"]
    );
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
    let loaded = Setup::file("[realtime]\nwindow = 10\nack_timeout = \"5s\"\n")
        .variable("TIMELINED__REALTIME__WINDOW", "20")
        .variable(
            "TIMELINED__HTTP__ALLOWED_ORIGINS",
            "https://a.example, https://b.example",
        )
        .variable("TIMELINED__HTTP__OPS_LISTEN", "")
        .variable("TIMELINED__DATABASE__MIGRATE", "false")
        .loaded();
    assert_eq!(
        loaded.config.realtime,
        Realtime {
            window: 20,
            ack_timeout: Duration::from_secs(5)
        }
    );
    assert_eq!(
        loaded.config.http.allowed_origins,
        ["https://a.example", "https://b.example"]
    );
    assert_eq!(loaded.config.http.ops_listen, None);
    assert!(!loaded.config.database.migrate);
    assert_eq!(
        shown(&loaded, "realtime.window"),
        ("20", "TIMELINED__REALTIME__WINDOW".to_owned())
    );
    assert_eq!(
        shown(&loaded, "realtime.ack_timeout"),
        ("\"5s\"", "config/timelined.toml:3".to_owned())
    );
    assert_eq!(
        shown(&loaded, "http.listen"),
        ("\"127.0.0.1:8080\"", "default".to_owned())
    );
    assert_eq!(
        shown(&loaded, "auth.issuer"),
        ("(unset)", "default".to_owned())
    );
    assert_eq!(
        shown(&loaded, "http.allowed_origins"),
        (
            r#"["https://a.example", "https://b.example"]"#,
            "TIMELINED__HTTP__ALLOWED_ORIGINS".to_owned()
        )
    );
}

#[test]
fn text_stays_text_whatever_it_looks_like() {
    let loaded = Setup::new()
        .variable("TIMELINED__MAIL__SMTP__HOST", "1e3")
        .variable("TIMELINED__MAIL__SMTP__USER", "true")
        .variable("TIMELINED__MAIL__SMTP__PASSWORD", "0123")
        .variable("TIMELINED__AUTH__ISSUER", "007")
        .loaded();
    let Transport::Smtp(smtp) = loaded.config.mail.transport else {
        panic!("no server");
    };
    let login = smtp.login.unwrap();
    assert_eq!((smtp.host.as_str(), login.user.as_str()), ("1e3", "true"));
    assert_eq!(login.password.expose_secret(), "0123");
    assert_eq!(loaded.config.auth.issuer.as_deref(), Some("007"));
}

#[test]
fn the_state_directory_is_the_key_then_systemds_then_data() {
    let by_key = Setup::file("state_directory = \"./state\"")
        .variable("STATE_DIRECTORY", "/var/lib/timelined");
    assert_eq!(by_key.loaded().config.state_directory, by_key.path("state"));

    let by_systemd = Setup::new().variable("STATE_DIRECTORY", "/var/lib/timelined:/var/lib/other");
    let loaded = by_systemd.loaded();
    assert_eq!(
        loaded.config.state_directory,
        Path::new("/var/lib/timelined")
    );
    assert_eq!(
        loaded.config.database.url,
        DatabaseUrl::Sqlite("/var/lib/timelined/timelined.db".into())
    );
    assert_eq!(
        shown(&loaded, "state_directory"),
        ("\"/var/lib/timelined\"", "STATE_DIRECTORY".to_owned())
    );

    let by_nothing = Setup::new().variable("STATE_DIRECTORY", "");
    assert_eq!(
        by_nothing.loaded().config.state_directory,
        by_nothing.path("data")
    );
}

#[test]
fn paths_begin_in_the_state_directory_unless_they_are_absolute() {
    let setup = Setup::file(
        "state_directory = \"s\"\ndatabase.url = \"sqlite:///srv/t.db\"\nmail.directory = \"/srv/mail\"\nexport.directory = \"./x/y\"",
    );
    let config = setup.loaded().config;
    assert_eq!(config.database.url, DatabaseUrl::Sqlite("/srv/t.db".into()));
    assert_eq!(
        config.mail.transport,
        Transport::Directory("/srv/mail".into())
    );
    assert_eq!(config.export.directory, setup.path("s/x/y"));
}

#[test]
fn the_explicit_file_comes_first_then_the_local_then_the_systems() {
    let window = |window: u16| format!("realtime.window = {window}");
    let mut setup = Setup::new().with("etc/timelined.toml", &window(3));
    let loaded = setup.loaded();
    assert_eq!(loaded.config.realtime.window, 3);
    assert_eq!(
        loaded.file,
        Source::System(setup.path("etc/timelined.toml"))
    );

    setup = setup
        .with("config/timelined.toml", &window(2))
        .with("my.toml", &window(1));
    let loaded = setup.loaded();
    assert_eq!(loaded.config.realtime.window, 2);
    assert_eq!(loaded.file.to_string(), "config/timelined.toml");

    let mut request = setup.request();
    request.explicit_file = Some("my.toml".into());
    let loaded = load(&request).unwrap();
    assert_eq!(loaded.config.realtime.window, 1);
    assert_eq!(loaded.file, Source::Explicit("my.toml".into()));

    request.explicit_file = Some("not-there.toml".into());
    assert_eq!(
        load(&request).unwrap_err().to_string(),
        "not-there.toml: cannot be read: No such file or directory (os error 2)"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_not_passed_over() {
    let setup = Setup::new().with("config/timelined.toml/oops", "");
    assert_eq!(
        setup.said(),
        "config/timelined.toml: cannot be read: Is a directory (os error 21)"
    );
    let setup = Setup::new();
    fs::create_dir(setup.path("config")).unwrap();
    fs::write(setup.path("config/timelined.toml"), b"[http]\n# caf\xe9\n").unwrap();
    assert_eq!(
        setup.said(),
        "config/timelined.toml:2:6: TOML: is not UTF-8"
    );
}

#[test]
fn an_empty_list_of_jobs_is_none_at_all() {
    assert_eq!(Setup::file("jobs = []").loaded().config.jobs, []);
    assert_eq!(Setup::file("[http]").loaded().config.jobs.len(), 2);
}

#[test]
fn secrets_come_from_files_credentials_and_variables_without_their_line_end() {
    for (value, name) in [
        ("{ credential = \"key\" }", "auth.hs256_key.credential"),
        ("{ file = \"key\" }", "auth.hs256_key.file"),
        ("{ env = \"MY_KEY\" }", "auth.hs256_key.env"),
        (&format!("{KEY:?}"), "auth.hs256_key"),
    ] {
        let setup = Setup::file(&format!(
            "state_directory = \".\"\nauth.hs256_key = {value}"
        ))
        .with("key", &format!("{KEY}\r\n"))
        .variable("MY_KEY", KEY);
        let credentials = setup.directory.path().display().to_string();
        let loaded = setup
            .variable("CREDENTIALS_DIRECTORY", &credentials)
            .loaded();
        assert_eq!(
            loaded.config.auth.verifier,
            Verifier::Hs256(Some(Secret::new(KEY))),
            "{value}"
        );
        assert_eq!(shown(&loaded, name).1, "config/timelined.toml:2");
        assert!(!format!("{loaded:?}").contains(KEY), "{value}");
    }
    let by_variable = Setup::file("auth.hs256_key = { file = \"not-there\" }")
        .variable("TIMELINED__AUTH__HS256_KEY", KEY)
        .loaded();
    assert_eq!(
        by_variable.config.auth.verifier,
        Verifier::Hs256(Some(Secret::new(KEY)))
    );
    assert_eq!(
        shown(&by_variable, "auth.hs256_key"),
        ("***", "TIMELINED__AUTH__HS256_KEY".to_owned())
    );
    let file_by_variable = Setup::new()
        .with("data/key", KEY)
        .variable("TIMELINED__AUTH__HS256_KEY__FILE", "key")
        .loaded();
    assert_eq!(
        file_by_variable.config.auth.verifier,
        Verifier::Hs256(Some(Secret::new(KEY)))
    );
}

#[test]
fn the_database_url_is_shown_without_its_password() {
    let loaded = Setup::file("database.url = \"postgres://crm:hunter2@db/crm\"")
        .variable("TIMELINED__AUTH__HS256_KEY", KEY)
        .loaded();
    assert_eq!(
        shown(&loaded, "database.url").0,
        "\"postgres://crm:***@db/crm\""
    );
    assert!(!format!("{loaded:?}").contains("hunter2"));
}

#[test]
fn a_public_key_is_checked_to_be_one_of_the_algorithm() {
    let loaded = Setup::file(&format!(
        "[auth]\nalgorithm = \"EdDSA\"\npublic_key = \"{ED25519}\""
    ))
    .loaded();
    let Verifier::PublicKey { algorithm, pem } = loaded.config.auth.verifier else {
        panic!("not a public key");
    };
    assert_eq!(algorithm, PublicKeyAlgorithm::EdDsa);
    assert!(pem.starts_with("-----BEGIN PUBLIC KEY-----\n"));
    assert_eq!(
        Setup::file(&format!(
            "[auth]\nalgorithm = \"RS256\"\npublic_key = \"{ED25519}\""
        ))
        .said(),
        "config/timelined.toml:3:14: auth.public_key: is not a public key of RS256; PEM that begins with -----BEGIN PUBLIC KEY-----"
    );
}

#[test]
fn jobs_take_all_their_keys() {
    let config = Setup::file(
        r#"
        [[jobs]]
        name = "p"
        kind = "purge_expired"
        cron = "0 0 2 * * *"
        timezone = "Europe/Lisbon"
        enabled = false
        timeout = "2h"
        overlap = "queue"
        retry = { attempts = 1, first = "10ms", max = "10ms" }
        expect_within = "26h"
        older_than = "0s"
        max_rate = 500
        dry_run = true

        [[jobs]]
        name = "e"
        kind = "timeline_export"
        every = "7d"
        tenant = "acme"
        contacts = ["0198c0de-0000-7000-8000-000000000001"]
        to = ["a@example.com"]
        audience = "audit"
        attach = false
        period = "1d"
        "#,
    )
    .loaded()
    .config;
    let [purge, export] = &config.jobs[..] else {
        panic!("{:?}", config.jobs);
    };
    assert_eq!(
        purge.schedule,
        Schedule::cron("0 0 2 * * *", Tz::Europe__Lisbon).unwrap()
    );
    assert_eq!((purge.enabled, purge.overlap), (false, Overlap::Queue));
    assert_eq!(
        config.alerts.expect_within,
        BTreeMap::from([("p".to_owned(), Duration::from_hours(26))])
    );
    assert_eq!(
        (purge.retry.attempts.get(), purge.retry.first),
        (1, Duration::from_millis(10))
    );
    assert_eq!(
        purge.kind,
        JobKind::PurgeExpired {
            older_than: Duration::ZERO,
            max_rate: 500,
            dry_run: true
        }
    );
    let JobKind::TimelineExport(job) = &export.kind else {
        panic!("{export:?}");
    };
    assert_eq!(export.timeout, Duration::from_hours(1));
    assert_eq!(job.audience, crate::domain::Audience::Audit);
    assert_eq!((job.attach, job.period), (false, Duration::from_hours(24)));
    assert!(matches!(&job.selection, Selection::Contacts(contacts) if contacts.len() == 1));
}

#[test]
fn retention_rules_take_all_their_keys() {
    let config = Setup::file(
        r#"
        [[retention]]
        older_than = "0s"

        [[retention]]
        tenant = "acme"
        category = "note"
        event_type = "note_added"
        older_than = "30d"
        max_age = "90d"
        "#,
    )
    .loaded()
    .config;
    let [all, notes] = &config.retention[..] else {
        panic!("{:?}", config.retention);
    };
    assert_eq!(all.to_string(), "everything");
    assert_eq!(
        (all.older_than, all.max_age),
        (Some(TimeDelta::zero()), None)
    );
    assert_eq!(
        notes.to_string(),
        "tenant=acme category=note event_type=note_added"
    );
    assert_eq!(
        (notes.older_than, notes.max_age),
        (Some(TimeDelta::days(30)), Some(TimeDelta::days(90)))
    );
}

#[test]
fn alerts_go_to_whom_the_file_or_a_variable_names() {
    let setup = Setup::file("[alerts]\nto = [\"ops@example.com\"]\nafter = 1\n");
    let alerts = setup.loaded().config.alerts;
    assert_eq!(alerts.to, ["ops@example.com".parse().unwrap()]);
    assert_eq!(alerts.after, 1);
    let setup = setup
        .variable("TIMELINED__ALERTS__TO", "a@example.com, b@example.com")
        .variable("TIMELINED__ALERTS__AFTER", "5");
    let loaded = setup.loaded();
    assert_eq!(loaded.config.alerts.to.len(), 2);
    assert_eq!(shown(&loaded, "alerts.after").0, "5");
}

#[test]
fn what_is_expected_of_a_job_may_be_as_rare_as_its_longest_pause() {
    let job = |schedule: &str, within: &str| {
        let text = format!(
            "[[jobs]]\nname = \"j\"\nkind = \"purge_expired\"\n{schedule}\nexpect_within = \"{within}\"\n"
        );
        Setup::file(&text).load().is_ok()
    };
    for (schedule, longest) in [
        ("every = \"1h\"", 3_600),
        ("cron = \"0 0 3 * * *\"", 24 * 3_600),
        // The night in which the clocks go back.
        (
            "cron = \"0 30 3 * * *\"\ntimezone = \"Europe/Lisbon\"",
            25 * 3_600,
        ),
        // From Friday to Monday.
        ("cron = \"0 0 9 * * MON-FRI\"", 72 * 3_600),
    ] {
        assert!(!job(schedule, &format!("{longest}s")), "{schedule}");
        assert!(job(schedule, &format!("{}s", longest + 1)), "{schedule}");
    }
}

#[test]
fn variables_that_are_not_ours_are_left_alone() {
    let setup = Setup::new()
        .variable("TIMELINED_TEST_POSTGRES", "x")
        .variable("HTTP__LISTEN", "x")
        .variable("XTIMELINED__HTTP__LISTEN", "x");
    assert!(setup.load().is_ok());
}

#[test]
fn a_variable_leaves_the_rest_of_its_section_to_the_file() {
    let loaded = Setup::file("[mail.smtp]\nhost = \"h\"\nport = 2525\n")
        .variable("TIMELINED__MAIL__SMTP__HOST", "other")
        .loaded();
    let Transport::Smtp(smtp) = loaded.config.mail.transport else {
        panic!("no server");
    };
    assert_eq!((smtp.host.as_str(), smtp.port), ("other", 2525));
}

#[test]
fn two_variables_for_one_secret_are_an_error() {
    let said = Setup::new()
        .with("data/key", KEY)
        .variable("TIMELINED__AUTH__HS256_KEY", KEY)
        .variable("TIMELINED__AUTH__HS256_KEY__FILE", "key")
        .said();
    assert!(
        said.ends_with("has no effect beside another variable for the same key; set one of them"),
        "{said}"
    );
}
