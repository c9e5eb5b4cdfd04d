//! What keeps the daemon, or a command, from starting.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::support::daemon::{Settings, eventually, operator};
use crate::{copy, ran, run};

/// The user nobody, as Debian numbers it.
const NOBODY: u32 = 65534;

#[test]
fn a_port_in_use_is_named_with_the_key_and_the_variable() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap().to_string();
    let settings = Settings::new().env("TIMELINED__HTTP__LISTEN", &at);
    run(&settings, &["run", "--json"]).failed_saying(
        1,
        &format!(
            "timelined: cannot listen on {at}: another program has it; set http.listen or TIMELINED__HTTP__LISTEN to another address"
        ),
    );
    let settings = Settings::new().env("TIMELINED__HTTP__OPS_LISTEN", &at);
    run(&settings, &["run"]).failed_saying(1, "TIMELINED__HTTP__OPS_LISTEN");
}

#[test]
fn a_second_daemon_on_the_same_sqlite_file_says_so_and_ends() {
    let settings = Settings::new();
    let mut daemon = settings.start();
    let second = run(&settings, &["run"]);
    let file = settings.state().join("timelined.db");
    second.failed_saying(
        1,
        &format!("another timelined holds the database {}", file.display()),
    );
    // Commands work beside it.
    run(&settings, &["jobs", "list"]).done();
    assert!(daemon.stop().success());
    // And it frees the file with its end.
    assert!(settings.start().stop().success());
}

/// The command, run by the user nobody, who can reach the binary's copy.
fn as_nobody(settings: &Settings, arguments: &[&str]) -> Command {
    let home = settings.state().parent().unwrap().to_owned();
    let binary = home.join("timelined");
    if !binary.exists() {
        fs::copy(env!("CARGO_BIN_EXE_timelined"), &binary).unwrap();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    copy(&settings.command(arguments), binary.as_os_str(), nobody)
}

/// The state directory, which belongs to nobody.
fn of_nobody(settings: &Settings) -> PathBuf {
    let state = settings.state();
    fs::create_dir(&state).unwrap();
    chown(&state, Some(NOBODY), Some(NOBODY)).unwrap();
    state
}

/// The commands that would leave files of their own in the state directory.
const LEAVING: &[&[&str]] = &[
    &["run"],
    &["migrate"],
    &["jobs", "list"],
    &["purge", "--dry-run"],
    &["events", "list", crate::CONTACT, "--tenant", "acme"],
];

#[test]
fn root_leaves_no_file_in_the_state_of_another_user() {
    let settings = Settings::new();
    let state = of_nobody(&settings);
    let said = format!(
        "timelined: {} belongs to the user with id 65534, not to you (0): run the command as that user",
        state.display()
    );
    for arguments in LEAVING {
        run(&settings, arguments).failed(77, &said);
    }
    for arguments in [
        &["token", "--role", "operator"][..],
        &["events", "watch", crate::CONTACT, "--tenant", "acme"],
    ] {
        // These touch the state only where the key is the daemon's own.
        let mut command = settings.command(arguments);
        command.env_remove("TIMELINED__AUTH__HS256_KEY");
        ran(&command).failed(77, &said);
    }
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
}

#[test]
fn another_user_is_kept_from_the_database_of_root() {
    let settings = Settings::new();
    run(&settings, &["migrate"]).done();
    let state = settings.state();
    for mode in [0o700, 0o755] {
        fs::set_permissions(&state, fs::Permissions::from_mode(mode)).unwrap();
        for arguments in LEAVING {
            ran(&as_nobody(&settings, arguments)).failed(
                77,
                &format!(
                    "timelined: {} belongs to the user with id 0, not to you (65534): run the command as that user",
                    state.display()
                ),
            );
        }
    }
}

#[test]
fn a_database_file_of_another_user_in_an_own_directory_is_left_alone() {
    let settings = Settings::new();
    run(&settings, &["migrate"]).done();
    let file = settings.state().join("timelined.db");
    chown(&file, Some(NOBODY), None).unwrap();
    run(&settings, &["jobs", "list"]).failed_saying(77, &file.display().to_string());
}

#[test]
fn a_user_runs_everything_in_a_state_directory_of_its_own_which_is_private() {
    let settings = Settings::new();
    let state = of_nobody(&settings);
    ran(&as_nobody(&settings, &["migrate"])).done();
    let file = fs::metadata(state.join("timelined.db")).unwrap();
    assert_eq!((file.uid(), file.mode() & 0o777), (NOBODY, 0o600));
}

#[test]
fn a_directory_that_may_not_be_written_is_a_denial_and_named() {
    let settings = Settings::new();
    let state = of_nobody(&settings);
    fs::set_permissions(&state, fs::Permissions::from_mode(0o500)).unwrap();
    for (arguments, file) in [
        (["run"].as_slice(), "timelined.db.lock"),
        (&["jobs", "list"], "timelined.db"),
    ] {
        let ran = ran(&as_nobody(&settings, arguments));
        ran.failed_saying(77, &format!("{}", state.join(file).display()));
        ran.failed_saying(77, "(database.url): Permission denied (os error 13)");
    }
}

/// A small file system that ends with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        let disk = Self(at);
        disk.mount_with(options);
        disk
    }

    fn mount_with(&self, options: &str) {
        let mut command = Command::new("mount");
        command
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&self.0);
        let done = command.status().unwrap();
        assert!(done.success(), "this test mounts a tmpfs, hence needs root");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[test]
fn a_read_only_disk_is_named() {
    let settings = Settings::new();
    let disk = SmallDisk::mount(settings.state(), "size=1m");
    disk.mount_with("remount,ro");
    for arguments in [&["run"][..], &["jobs", "list"]] {
        run(&settings, arguments).failed_saying(1, "Read-only file system (os error 30)");
    }
}

#[test]
fn a_full_disk_is_named_and_heals() {
    let settings = Settings::new();
    let disk = SmallDisk::mount(settings.state(), "size=2m");
    let fill = disk.0.join("fill");
    // It ends with the disk.
    drop(fs::write(&fill, vec![0; 4 << 20]));
    for arguments in [&["run"][..], &["jobs", "list"], &["migrate"]] {
        run(&settings, arguments).failed_saying(1, "the database has no space left");
    }
    fs::remove_file(fill).unwrap();
    run(&settings, &["jobs", "list"]).done();
}

#[test]
fn a_file_that_is_no_database_is_left_as_it_is() {
    let settings = Settings::new();
    let file = settings.state().join("timelined.db");
    let text = "a diary, not a database\n".repeat(100);
    fs::create_dir(settings.state()).unwrap();
    fs::write(&file, &text).unwrap();
    for arguments in LEAVING {
        run(&settings, arguments).failed(
            1,
            &format!(
                "timelined: cannot open the database {} (database.url): the database refused a statement: error returned from database: (code: 26) file is not a database",
                file.display()
            ),
        );
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
}

#[test]
fn a_state_directory_that_cannot_be_made_is_named() {
    let settings = Settings::new();
    fs::write(settings.state(), "a file").unwrap();
    let below = settings.state().join("below");
    let settings = settings.env("TIMELINED__STATE_DIRECTORY", &below.display().to_string());
    for arguments in [&["run"][..], &["jobs", "list"]] {
        run(&settings, arguments).failed_saying(
            1,
            &format!("cannot make the state directory {} (state_directory, or $STATE_DIRECTORY): Not a directory", below.display()),
        );
    }
}

#[test]
fn a_postgresql_that_is_away_is_named_without_the_password() {
    let settings = Settings::new().env(
        "TIMELINED__DATABASE__URL",
        "postgres://crm:s3cret@127.0.0.1:1/crm",
    );
    for arguments in LEAVING {
        run(&settings, arguments).failed(
            1,
            "timelined: cannot use postgres://crm:***@127.0.0.1:1/crm (database.url): the database is not available: error communicating with database: Connection refused (os error 111)",
        );
    }
}

#[tokio::test]
async fn a_hangup_applies_the_jobs_of_the_configuration_or_nothing() {
    let settings = Settings::new().config("");
    let file = settings.state().with_file_name("timelined.toml");
    let job = |name: &str, key: &str| {
        format!("\n[[jobs]]\nname = \"{name}\"\nkind = \"purge_expired\"\n{key}\n")
    };
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let first = job("first", "every = \"1h\"");
    write(&first);
    let mut daemon = settings.start();
    let hang_up = async |says: &str| {
        daemon.signal("HUP");
        let is_logged = async || daemon.log().contains(says);
        eventually(says, Duration::from_secs(30), is_logged).await;
    };
    let names = async || {
        let (_, list) = daemon.get("/api/v1/jobs", &operator()).await;
        let jobs = list["jobs"].as_array().unwrap().clone();
        jobs.iter()
            .map(|job| format!("{} {}", job["name"], job["schedule"]).replace('"', ""))
            .collect::<Vec<_>>()
    };
    let started = names().await;
    hang_up("SIGHUP: the configuration is as it was").await;

    write(&format!(
        "{first}{}",
        job("second", "every = \"1 hour\"\ncorn = 1")
    ));
    hang_up("SIGHUP: nothing was changed: ").await;
    assert_eq!(names().await, started);

    write(&format!(
        "{first}{}\n[history]\nkeep = \"3d\"\n",
        job("second", "every = \"1s\"")
    ));
    hang_up("SIGHUP: nothing was changed: a restart is needed to change [history]").await;
    assert_eq!(names().await, started);

    write(&format!("{first}{}", job("second", "every = \"1s\"")));
    hang_up("SIGHUP: the configuration was applied; jobs: second").await;
    assert_eq!(names().await.len(), started.len() + 1);
    eventually("the new job runs", Duration::from_secs(30), async || {
        let (_, runs) = daemon.get("/api/v1/jobs/second/runs", &operator()).await;
        runs["runs"].as_array().is_some_and(|runs| !runs.is_empty())
    })
    .await;

    let alerts = "\n[alerts]\nto = [\"ops@example.com\"]\n";
    let second = job("second", "every = \"1s\"");
    write(&format!("{alerts}{first}{second}"));
    hang_up("SIGHUP: the configuration was applied; [alerts]\"").await;
    let retention = "\n[[retention]]\ntenant = \"acme\"\nmax_age = \"90d\"\n";
    write(&format!("{alerts}{first}{second}{retention}"));
    hang_up("SIGHUP: the configuration was applied; [[retention]]\"").await;
    let expecting = job("second", "every = \"1s\"\nexpect_within = \"1m\"");
    write(&format!("{first}{expecting}{retention}"));
    hang_up("SIGHUP: the configuration was applied; jobs: second; [alerts]\"").await;

    write(&first);
    daemon.signal("HUP");
    eventually("it is gone", Duration::from_secs(30), async || {
        names().await == started
    })
    .await;
    assert!(daemon.stop().success());
}

#[tokio::test]
async fn a_log_that_cannot_be_written_ends_nothing() {
    let onto_full = ["sh", "-c", r#"exec "$0" "$@" 2>/dev/full"#];
    let mut daemon = Settings::new().wrapped_in(&onto_full).start();
    let runs = "/api/v1/jobs/purge-expired";
    let asked = json!({});
    let (status, run) = daemon
        .post(&format!("{runs}/run"), &operator(), &asked)
        .await;
    assert_eq!(status, 202, "{run}");
    eventually("the run ends", Duration::from_secs(10), async || {
        let (_, page) = daemon.get(&format!("{runs}/runs"), &operator()).await;
        page["runs"][0]["state"] == "succeeded"
    })
    .await;
    assert!(daemon.stop().success());
}
