//! Documents as their readers meet them: through poppler's programs.

use std::path::Path;
use std::process::Command;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::domain::{
    AgentId, Audience, Category, ContactId, ExportId, NewContactEvent, Priority, Source, Subject,
    TenantId, event_types,
};
use crate::storage::{ExportRequest, ExportState};

fn contact() -> ContactId {
    "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap()
}

fn start() -> DateTime<Utc> {
    "2026-03-02T09:00:00Z".parse().unwrap()
}

fn export(change: impl FnOnce(&mut ExportRequest)) -> Export {
    let mut request = ExportRequest {
        contact_id: contact(),
        format: "pdf".to_owned(),
        audience: Audience::Agent,
        since: None,
        until: None,
        categories: Vec::new(),
        timezone: chrono_tz::Europe::Lisbon,
        redact: Vec::new(),
        to: Vec::new(),
        attach: true,
    };
    change(&mut request);
    Export {
        id: "0190b5f0-7c1e-7d3a-8f00-0000000000ee"
            .parse::<ExportId>()
            .unwrap(),
        tenant_id: TenantId::new("acme").unwrap(),
        request,
        requested_by: Subject::new("ana@example.com").unwrap(),
        created_at: start() + TimeDelta::days(60),
        through_seq: 9,
        state: ExportState::Running,
        attempt: 1,
        started_at: None,
        rendered_at: None,
        finished_at: None,
        expires_at: None,
        total_rows: None,
        rows: 0,
        bytes: None,
        sha256: None,
        file_name: None,
        error: None,
        downloads: 0,
        last_download_at: None,
        deliveries: Vec::new(),
        links: Vec::new(),
        actions: Vec::new(),
    }
}

/// The `index`th event, three hours after the one before.
fn event(index: u32, category: Category, title: &str) -> NewContactEvent {
    let at = start() + TimeDelta::minutes(187) * i32::try_from(index).unwrap();
    NewContactEvent::new(contact(), event_types::NOTE_ADDED, category, Source::Agent)
        .title(title)
        .occurred_at(at)
}

fn recorded(event: NewContactEvent) -> ContactEvent {
    let tenant = TenantId::new("acme").unwrap();
    event
        .record(&tenant, start() + TimeDelta::days(9_000))
        .unwrap()
}

/// A written export and where it is.
struct Written {
    home: tempfile::TempDir,
    name: String,
    taken: u64,
    notes: Notes,
}

impl Written {
    fn of(export: &Export, paper: &Paper, events: &[ContactEvent]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let file = PartFile::create(home.path(), "made", Uuid::nil()).unwrap();
        let total = events.len() as u64;
        let mut writer = Box::new(PdfFile::begin(export, total, paper, file).unwrap());
        let mut taken = 0;
        for page in events.chunks(200) {
            taken += writer.page(page).unwrap();
        }
        let Finished { written, notes } = writer.finish().unwrap();
        Self {
            home,
            name: written.name,
            taken,
            notes,
        }
    }

    fn path(&self) -> std::path::PathBuf {
        self.home.path().join(&self.name)
    }

    fn text(&self) -> String {
        text_of(&self.path())
    }
}

fn run(program: &str, arguments: &[&str], file: &Path) -> String {
    let mut command = Command::new(program);
    command.args(arguments).arg(file);
    if program == "pdftotext" {
        command.arg("-");
    }
    let output = command
        .output()
        .expect("tests/support/install.sh installs poppler-utils");
    let errors = String::from_utf8_lossy(&output.stderr);
    // Which ISO 32000-1, 14.7.1, says is a boolean.
    let errors = errors.replace("Syntax Error: Suspects object is wrong type (boolean)", "");
    let errors = errors.trim();
    assert!(
        output.status.success() && errors.is_empty(),
        "{program}: {errors}"
    );
    String::from_utf8(output.stdout).unwrap()
}

fn text_of(file: &Path) -> String {
    run("pdftotext", &["-layout"], file)
}

fn typical(count: u32) -> Vec<ContactEvent> {
    (0..count)
        .map(|index| {
            let category = Category::ALL[(index % 11) as usize];
            let agent: AgentId = "0190b5f0-7c1e-7d3a-8f00-0000000000a9".parse().unwrap();
            let event = event(
                index,
                category,
                &format!("Called about order {index}, offer sent"),
            )
            .description("Wants the new offer by Friday; the old one was too dear.")
            .payload(json!({ "order": index, "amount": "1 250,00" }))
            .triggered_by(agent);
            recorded(event)
        })
        .collect()
}

/// Where somebody wants to look at the pages: `PDF_KEEP=directory`.
fn kept(written: &Written, name: &str) {
    if let Some(directory) = std::env::var_os("PDF_KEEP") {
        std::fs::copy(written.path(), Path::new(&directory).join(name)).unwrap();
    }
}

#[test]
fn a_document_has_cover_chart_days_and_page_numbers() {
    let mut events = typical(60);
    let urgent = event(61, Category::Note, "Must be called back").priority(Priority::Urgent);
    events.push(recorded(urgent));
    let written = Written::of(&export(|_| {}), &Paper::default(), &events);
    kept(&written, "typical.pdf");
    assert_eq!((written.name.as_str(), written.taken), ("made.pdf", 61));
    assert_eq!(written.notes, Notes::default());
    let text = written.text();
    for part in [
        "Contact timeline",
        "Europe/Lisbon",
        "ana@example.com",
        "Activity",
        "Custom field",
        "Monday, 2 March 2026",
        "continued",
        "Page 1 of",
        "Called about order 0, offer sent",
        "Called about order 59, offer sent",
        "Urgent",
        "amount",
        "1 250,00",
        "by 0190b5f0-7c1e-7d3a-8f00-0000000000a9",
    ] {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
    let bytes = std::fs::read(written.path()).unwrap();
    for claim in ["pdfuaid:part>1<", "pdfaid:part>2<", "pdfaid:conformance>A<"] {
        let is_there = bytes
            .windows(claim.len())
            .any(|part| part == claim.as_bytes());
        assert!(is_there, "{claim} is missing");
    }
    let info = run("pdfinfo", &[], &written.path());
    for part in [
        "Tagged:          yes",
        "Title:           Contact timeline 0190b5f0",
    ] {
        assert!(info.contains(part), "{part:?} is missing in {info}");
    }
}

#[test]
fn any_script_is_legible_and_what_no_font_has_is_told() {
    let titles = [
        "Ligação: não está, voltar às 15h",
        "Звонок клиенту",
        "Κλήση πελάτη",
        "مكالمة مع العميل حول الطلب",
        "שיחה עם הלקוח",
        "ग्राहक को कॉल",
        "<b>not bold</b> {{x}} \\textbf{y}",
        "Party 🎉 done",
    ];
    let mut events: Vec<ContactEvent> = titles
        .iter()
        .zip(0..)
        .map(|(title, index)| recorded(event(index, Category::Note, title)))
        .collect();
    events.push(recorded(event(20, Category::Tag, &"\u{5e9}".repeat(500))));
    events.push(recorded(event(21, Category::Tag, &"W".repeat(500))));
    events.push(recorded(event(
        22,
        Category::Tag,
        "rare: \u{10fffd}\u{10fffd}",
    )));
    let written = Written::of(&export(|_| {}), &Paper::default(), &events);
    kept(&written, "scripts.pdf");
    let text = written.text();
    for part in [&titles[..3], &titles[5..7]].concat() {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
    assert!(text.contains("2 characters could not be shown"), "{text}");
    assert!(text.contains("U+10FFFD ×2"), "{text}");
    assert_eq!(written.notes.missing_glyphs, 2);
    assert_eq!(
        text.matches('W').count(),
        501,
        "all of a long word, and one Wants"
    );
}

#[test]
fn a_payload_of_64_kib_is_written_whole() {
    let long = "z".repeat(60_000);
    let payload = json!({ "long": long, "inner": { "deep": [1, 2] } });
    let events = [recorded(
        event(0, Category::System, "large").payload(payload),
    )];
    let written = Written::of(&export(|_| {}), &Paper::default(), &events);
    kept(&written, "large.pdf");
    let text = written.text();
    assert_eq!(
        text.matches('z').count(),
        60_001,
        "all of it, and the zone's"
    );
    assert!(
        text.contains("inner.deep") && text.contains("[1,2]"),
        "{text}"
    );
}

#[test]
fn what_a_client_may_not_see_and_what_is_redacted_is_left_out() {
    let of = export(|request| {
        request.audience = Audience::Client;
        request.redact = vec!["title".to_owned(), "payload".to_owned()];
    });
    let written = Written::of(&of, &Paper::default(), &typical(3));
    let text = written.text();
    assert!(
        text.contains("[redacted]") && text.contains("title, payload"),
        "{text}"
    );
    for part in ["Called", "1 250,00", "0000000000a9"] {
        assert!(!text.contains(part), "{part:?} is in {text}");
    }
}

#[test]
fn an_empty_timeline_is_a_page_that_says_so_in_the_language_above_the_footer() {
    let paper = Paper {
        locale: Locale::Portuguese,
        footer: "Casa Azul, Lda.".to_owned(),
        ..Paper::default()
    };
    let written = Written::of(&export(|_| {}), &paper, &[]);
    let text = written.text();
    assert!(text.contains("Não há eventos neste período."), "{text}");
    assert!(text.contains("Página 1 de 1"), "{text}");
    assert!(text.contains("Casa Azul, Lda."), "{text}");
}

#[test]
fn long_timelines_come_in_volumes_with_a_manifest_that_says_what_is_left_out() {
    let paper = Paper {
        max_events: 5_100,
        ..Paper::default()
    };
    let events: Vec<ContactEvent> = (0..5_300)
        .map(|index| recorded(event(index, Category::Note, &format!("number {index}."))))
        .collect();
    let written = Written::of(&export(|_| {}), &paper, &events);
    assert_eq!((written.name.as_str(), written.taken), ("made.zip", 5_100));
    assert_eq!(written.notes.left_out, 200);
    let mut zip = zip::ZipArchive::new(std::fs::File::open(written.path()).unwrap()).unwrap();
    let read = |zip: &mut zip::ZipArchive<std::fs::File>, name: &str| {
        let mut content = Vec::new();
        std::io::copy(&mut zip.by_name(name).unwrap(), &mut content).unwrap();
        content
    };
    let manifest: Value = serde_json::from_slice(&read(&mut zip, "manifest.json")).unwrap();
    assert_eq!(manifest["events"], 5_100);
    assert_eq!(manifest["left_out"], 200);
    let volumes = manifest["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), 2);
    let mut texts = Vec::new();
    for volume in volumes {
        let name = volume["file"].as_str().unwrap();
        let pdf = read(&mut zip, name);
        let hash: String = Sha256::digest(&pdf)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(volume["sha256"], hash);
        let path = written.home.path().join(name);
        std::fs::write(&path, pdf).unwrap();
        texts.push(text_of(&path));
    }
    let left_out = "This document holds the first 5,100 of 5,300 events.";
    assert!(texts[0].contains(left_out), "{}", &texts[0][..1_500]);
    assert!(texts[1].contains("Volume 2") && texts[1].contains("5,001–5,100"));
    let all = texts.concat();
    for index in 0..5_100 {
        assert!(
            all.contains(&format!("number {index}.")),
            "{index} is missing"
        );
    }
}

#[test]
fn a_tagged_event_with_all_it_can_have_takes_less_than_half_a_kilobyte() {
    let count = 2_000;
    let written = Written::of(&export(|_| {}), &Paper::default(), &typical(count));
    kept(&written, "many.pdf");
    let bytes = std::fs::metadata(written.path()).unwrap().len();
    assert!(
        bytes / u64::from(count) < 500,
        "{} bytes an event",
        bytes / u64::from(count)
    );
}
