//! What the mail of an export says.

use chrono::{DateTime, SecondsFormat, Utc};

use super::FileKind;
use crate::mail::{AttachedFile, Letter, escaped};
use crate::storage::Export;
use lettre::message::Mailbox;

/// Where the reader finds the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placement {
    /// In the mail.
    Attached(Vec<u8>),
    /// On the daemon, for this reason.
    Linked(Reason),
}

/// Why a file is not in the mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// Whoever asked for it wanted a link.
    Asked,
    /// It is larger than `mail.max_attachment`, in bytes.
    Larger(u64),
    /// The mail server did not take it.
    Refused,
}

/// What the letter needs beside the export.
pub(super) struct Stationery<'a> {
    pub(super) from: &'a Mailbox,
    /// Where the file is, for a letter without it.
    pub(super) link: &'a str,
    pub(super) date: DateTime<Utc>,
}

/// The letter to `to`.
pub(super) fn compose(
    export: &Export,
    to: &str,
    message_id: &str,
    placement: Placement,
    paper: &Stationery<'_>,
) -> Letter {
    let contact = export.request.contact_id;
    let kind = FileKind::of(export.file_name.as_deref().unwrap_or_default());
    let name = format!("timeline-{contact}.{}", kind.extension());
    let lines = facts(export, &name);
    let (opening, link, attachment) = match placement {
        Placement::Attached(content) => {
            let file = AttachedFile {
                name,
                media_type: kind.media_type(),
                content,
            };
            (
                format!("The timeline of contact {contact} is attached."),
                None,
                Some(file),
            )
        }
        Placement::Linked(reason) => {
            let opening = format!(
                "The timeline of contact {contact} is ready. {}",
                explanation(reason, export.bytes.unwrap_or(0))
            );
            (opening, Some(paper.link.to_owned()), None)
        }
    };
    let until = export.expires_at.map(|at| local(export, at));
    Letter {
        message_id: message_id.to_owned(),
        from: paper.from.clone(),
        to: to.to_owned(),
        date: paper.date,
        subject: format!("Timeline of contact {contact}: {}", events(export.rows)),
        text: as_text(&opening, link.as_deref(), until.as_deref(), &lines),
        html: as_html(&opening, link.as_deref(), until.as_deref(), &lines),
        attachment,
    }
}

fn explanation(reason: Reason, bytes: u64) -> String {
    match reason {
        Reason::Asked => "The file is not attached, as was asked for.".to_owned(),
        Reason::Larger(limit) => format!(
            "The file is not attached: it has {} bytes, and a mail may carry {} bytes.",
            grouped(bytes),
            grouped(limit)
        ),
        Reason::Refused => format!(
            "The file is not attached: the mail server does not take its {} bytes.",
            grouped(bytes)
        ),
    }
}

/// What every mail states, as label and value.
fn facts(export: &Export, name: &str) -> Vec<(&'static str, String)> {
    let request = &export.request;
    let since = request
        .since
        .map_or_else(|| "the beginning".to_owned(), |since| local(export, since));
    // What was recorded after the export was asked for is not in it.
    let until = local(export, request.until.unwrap_or(export.created_at));
    let mut facts = vec![
        ("Events", grouped(export.rows)),
        ("Period", format!("from {since} to {until}")),
        ("Time zone", request.timezone.name().to_owned()),
        ("As seen by", request.audience.to_string()),
    ];
    if !request.categories.is_empty() {
        let names: Vec<_> = request.categories.iter().map(|c| c.as_str()).collect();
        facts.push(("Only", names.join(", ")));
    }
    if !request.redact.is_empty() {
        facts.push(("Redacted", request.redact.join(", ")));
    }
    facts.push(("File", name.to_owned()));
    facts.push((
        "Size",
        format!("{} bytes", grouped(export.bytes.unwrap_or(0))),
    ));
    facts.push(("SHA-256", export.sha256.clone().unwrap_or_default()));
    facts
}

fn as_text(
    opening: &str,
    link: Option<&str>,
    until: Option<&str>,
    facts: &[(&'static str, String)],
) -> String {
    let mut text = format!("{opening}\n\n");
    if let Some(link) = link {
        let until = until
            .map(|until| format!(" until {until}"))
            .unwrap_or_default();
        text.push_str(&format!("It can be fetched{until}:\n{link}\n\n"));
    }
    for (label, value) in facts {
        text.push_str(&format!("{label}: {value}\n"));
    }
    text
}

fn as_html(
    opening: &str,
    link: Option<&str>,
    until: Option<&str>,
    facts: &[(&'static str, String)],
) -> String {
    // No colours: they are the reader's, by day and by night.
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <meta name=\"color-scheme\" content=\"light dark\"></head>\n\
         <body style=\"font-family: sans-serif; line-height: 1.5; max-width: 40em\">\n<p>{}</p>\n",
        escaped(opening)
    );
    if let Some(link) = link {
        let until = until
            .map(|until| format!(" until {}", escaped(until)))
            .unwrap_or_default();
        let link = escaped(link);
        html.push_str(&format!(
            "<p>It can be fetched{until}:<br><a href=\"{link}\">{link}</a></p>\n"
        ));
    }
    html.push_str("<table style=\"border-collapse: collapse\">\n");
    for (label, value) in facts {
        let value = escaped(value);
        html.push_str(&format!(
            "<tr><th scope=\"row\" align=\"left\" valign=\"top\" style=\"padding-right: 1em; white-space: nowrap\">{label}</th>\
             <td style=\"word-break: break-word\">{value}</td></tr>\n"
        ));
    }
    html.push_str("</table>\n</body></html>\n");
    html
}

fn local(export: &Export, at: DateTime<Utc>) -> String {
    at.with_timezone(&export.request.timezone)
        .to_rfc3339_opts(SecondsFormat::Secs, false)
}

fn events(count: u64) -> String {
    let noun = if count == 1 { "event" } else { "events" };
    format!("{} {noun}", grouped(count))
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Audience, Category, ExportId, Subject, TenantId};
    use crate::storage::{ExportRequest, ExportState};

    fn export() -> Export {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        Export {
            id: "0190b5f0-7c1e-7d3a-8f00-0000000000ee"
                .parse::<ExportId>()
                .unwrap(),
            tenant_id: TenantId::new("acme").unwrap(),
            request: ExportRequest {
                contact_id: "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap(),
                format: "csv".to_owned(),
                audience: Audience::Client,
                since: Some(at(1_772_000_000)),
                until: None,
                categories: vec![Category::Note, Category::Tag],
                timezone: chrono_tz::Europe::Lisbon,
                redact: vec!["payload".to_owned()],
                to: vec!["ana@example.com".to_owned()],
                attach: true,
            },
            requested_by: Subject::new("crm").unwrap(),
            created_at: at(1_775_000_000),
            through_seq: 9,
            state: ExportState::Running,
            attempt: 1,
            started_at: None,
            rendered_at: Some(at(1_775_000_001)),
            finished_at: None,
            expires_at: Some(at(1_775_604_801)),
            total_rows: Some(1234),
            rows: 1234,
            bytes: Some(9_876_543),
            sha256: Some("ba7816bf".to_owned()),
            file_name: Some("0190b5f0.csv".to_owned()),
            error: None,
            downloads: 0,
            last_download_at: None,
            deliveries: Vec::new(),
            links: Vec::new(),
            actions: Vec::new(),
        }
    }

    fn written(placement: Placement) -> String {
        let from = "CRM <crm@example.com>".parse().unwrap();
        let paper = Stationery {
            from: &from,
            link: "https://crm.example.com/d/AAAAAAAAAAAAAAAAAAAAAA",
            date: DateTime::from_timestamp(1_775_000_002, 0).unwrap(),
        };
        let letter = compose(&export(), "ana@example.com", "a.0@crm", placement, &paper);
        format!("{}\n\n{}\n{}", letter.subject, letter.text, letter.html)
    }

    #[test]
    fn a_letter_with_the_file_states_rows_period_zone_size_and_hash() {
        insta::assert_snapshot!(written(Placement::Attached(b"id\r\n".to_vec())));
    }

    #[test]
    fn a_letter_without_the_file_says_why_and_where_it_is() {
        insta::assert_snapshot!(written(Placement::Linked(Reason::Larger(7_340_032))));
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(events(1), "1 event");
    }
}
