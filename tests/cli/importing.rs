//! `timelined events import`: from a file, from a pipe, packed, twice, and with lines that are no events.

use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use timelined::domain::{ContactEvent, Delivery};

use crate::support::builders::{Record as _, acme, event, id, minutes, t0};
use crate::support::daemon::{Settings, service};
use crate::support::database::Database;
use crate::{CONTACT, Ran, bounded, on, run};

/// As an export writes them.
fn lines(events: &[ContactEvent]) -> String {
    let line = |event| serde_json::to_string(event).unwrap() + "\n";
    events.iter().map(line).collect()
}

/// Notes with these numbers.
fn notes(numbers: std::ops::RangeInclusive<u64>) -> Vec<ContactEvent> {
    let note = |number| {
        event()
            .id(id(number))
            .title(format!("note {number}"))
            .recorded()
    };
    numbers.map(note).collect()
}

/// Imports what stands in a file of its own.
fn import(settings: &Settings, content: impl AsRef<[u8]>, more: &[&str]) -> Ran {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), content).unwrap();
    let path = file.path().to_str().unwrap();
    let mut arguments = vec!["events", "import", path, "--tenant", "acme"];
    arguments.extend(more);
    run(settings, &arguments)
}

async fn stored(db: &Database, number: u64) -> ContactEvent {
    db.events
        .find_by_id(&acme(), id(number))
        .await
        .unwrap()
        .unwrap()
}

on_both_engines! {
    async fn what_is_imported_twice_is_there_once(db) {
        let settings = on(db).await;
        let events = notes(1..=2500);
        let content = lines(&events);
        let first = import(&settings, &content, &[]).done();
        assert_eq!(first, "2500 lines: 2500 created, 0 existing, 0 in conflict, 0 refused\n");
        // What was cut short is repeated from its beginning.
        let more = content + &lines(&notes(2501..=2502));
        let again = import(&settings, more, &["--json"]).json();
        let counts = serde_json::json!({ "lines": 2502, "created": 2, "existing": 2500, "conflicts": 0, "refused": 0 });
        assert_eq!(again, counts);
        assert_eq!(db.count("contact_events").await, 2502);
        assert_eq!(stored(db, 1234).await, events[1233]);
    }

    async fn a_packed_file_and_a_pipe_are_read_too(db) {
        let settings = on(db).await;
        let packed = zstd::encode_all(lines(&notes(1..=1)).as_bytes(), 0).unwrap();
        import(&settings, packed, &[]).done();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(lines(&notes(2..=2)).as_bytes()).unwrap();
        import(&settings, encoder.finish().unwrap(), &[]).done();
        let mut command = settings.command(&["events", "import", "-", "--tenant", "acme"]);
        command = { let mut bounded = bounded(&command); bounded.stdin(Stdio::piped()).stdout(Stdio::piped()); bounded };
        let mut child = command.spawn().unwrap();
        let text = format!("\u{feff}\r\n{}\r\n\n{}", lines(&notes(3..=3)).trim_end(), lines(&notes(4..=4)).trim_end());
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, b"2 lines: 2 created, 0 existing, 0 in conflict, 0 refused\n");
        assert_eq!(db.count("contact_events").await, 4);
    }

    async fn a_bad_line_is_told_with_its_number_and_stops_no_other(db) {
        let settings = on(db).await;
        db.given(&acme(), [event().id(id(3)).title("another").description("text").recorded()]).await;
        let mut text = lines(&notes(1..=1)).into_bytes();
        text.extend(b"{\"id\": 1}\n\xff\n");
        text.extend(" ".repeat(3 * 1024 * 1024).bytes().chain(*b"\n"));
        text.extend(lines(&notes(3..=4)).bytes());
        let ran = import(&settings, text, &[]);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert_eq!(ran.out, "6 lines: 2 created, 0 existing, 1 in conflict, 3 refused\n");
        let said: Vec<&str> = ran.err.lines().filter(|line| !line.starts_with('{')).collect();
        assert_eq!(said, [
            "line 2: /id: must be a text; /contact_id: is required; /event_type: is required; \
             /category: is required; /source: is required",
            "line 3: is not UTF-8: invalid utf-8 sequence of 1 bytes from index 0",
            "line 4: is longer than 1048576 bytes, which no event is",
            "line 5: there is another event with this id, with another title, description; it stays as it is",
            "timelined: 4 lines were not imported",
        ]);
        assert_eq!(stored(db, 3).await.title.as_deref(), Some("another"));
        assert_eq!(stored(db, 4).await, notes(4..=4)[0]);
    }

    async fn what_may_change_makes_no_other_event_and_stays_as_it_is(db) {
        let settings = on(db).await;
        let mut events = notes(1..=1);
        db.given(&acme(), events.clone()).await;
        events[0].visibility.client = true;
        events[0].read_at = Some(t0());
        let counts = import(&settings, lines(&events), &["--json"]).json();
        assert_eq!((&counts["existing"], &counts["created"]), (&1.into(), &0.into()));
        assert_eq!(stored(db, 1).await, notes(1..=1)[0]);
        assert_eq!(db.count("event_reads").await, 0);
    }

    async fn what_was_delivered_and_read_stays_so_and_the_rest_waits(db) {
        let settings = on(db).await;
        let realtime = |number: u64| event().id(id(number)).realtime();
        let at = |count| t0() + minutes(count);
        let mut events = vec![
            realtime(1).recorded(),
            realtime(2).visible_to_client(true).recorded(),
            realtime(3).visible_to_agent(false).recorded(),
            realtime(4).recorded(),
            event().id(id(5)).recorded(),
            realtime(6).expires_at(at(5)).recorded(),
        ];
        for event in &mut events[..3] {
            event.delivery = Delivery::Delivered { at: at(1) };
        }
        events[4].read_at = Some(at(2));
        import(&settings, lines(&events), &[]).done();
        for (number, event) in (1..).zip(&events) {
            assert_eq!(stored(db, number).await, *event);
        }
        let waiting = db.texts("select cast(event_id as text) from event_outbox order by 1").await;
        assert_eq!(waiting, [Some(id(4).to_string()), Some(id(6).to_string())]);
        let audiences = db.texts("select audience from event_deliveries where recorded_by = 'import' order by event_id").await;
        assert_eq!(audiences, ["agent", "client", "agent"].map(|audience| Some(audience.to_owned())));
        assert_eq!(db.count("event_reads where reader = 'import'").await, 1);
        // The one that has expired is pushed to nobody.
        let expired = db.events.expire_undelivered(at(6), 10).await.unwrap();
        assert_eq!(expired, 1);
    }

    async fn a_daemon_beside_an_import_goes_on_recording(db) {
        let settings = on(db).await;
        let daemon = settings.start();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), lines(&notes(1..=10_000))).unwrap();
        let path = file.path().to_str().unwrap();
        let mut command = settings.command(&["events", "import", path, "--tenant", "acme"]);
        let import = std::thread::spawn(move || command.stdout(Stdio::null()).status());
        let token = service("acme");
        let body = serde_json::json!({ "event_type": "note_added", "category": "note", "source": "agent" });
        let mut recorded = 0;
        while !import.is_finished() {
            let path = format!("/api/v1/contacts/{CONTACT}/events");
            let (status, answer) = daemon.post(&path, &token, &body).await;
            assert_eq!(status, 201, "{answer}");
            recorded += 1;
        }
        assert!(import.join().unwrap().unwrap().success());
        assert_eq!(db.count("contact_events").await, 10_000 + recorded);
    }

    async fn an_import_is_for_one_tenant_and_needs_a_file(db) {
        let settings = on(db).await;
        let text = lines(&notes(1..=1)).replace("\"acme\"", "\"globex\"");
        let ran = import(&settings, text, &[]);
        assert_eq!(ran.code, 1);
        assert!(ran.err.contains("line 1: /tenant_id: is another tenant's; the import is for acme"), "{ran:?}");
        run(&settings, &["events", "import", "/nowhere/at-all", "--tenant", "acme"])
            .failed(3, "timelined: there is no file /nowhere/at-all");
        let torn = &zstd::encode_all(lines(&notes(1..=9)).as_bytes(), 0).unwrap()[..200];
        import(&settings, torn, &[]).failed_saying(1, "cannot read what follows line ");
        run(&settings, &["events", "import", "-"]).failed_saying(2, "--tenant");
    }
}
