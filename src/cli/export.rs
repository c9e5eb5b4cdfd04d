//! `timelined export`: adds an export, serves the queue until it is done, and takes the file.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use clap::{ArgGroup, Args};
use lettre::Address;
use serde_json::json;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Done, Failure, Global, clock, load, open, print, say};
use crate::config::Config;
use crate::daemon::export_settings;
use crate::domain::{Audience, Category, ContactId, ExportId, Subject, TenantId};
use crate::export::{Exporter, Format, REDACTABLE, file_path, message_ids};
use crate::mail::Mailer;
use crate::storage::{DeliveryState, Export, ExportRequest, ExportState, NewExport, Storage};

/// Between two looks at the export.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("destination").required(true).args(["output", "to"]))]
pub(super) struct Options {
    /// The contact.
    contact: ContactId,
    /// The contact's tenant.
    #[arg(long)]
    tenant: TenantId,
    /// The format.
    #[arg(long, default_value = "csv")]
    format: Format,
    /// Where the file goes; - is standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// To whom it is mailed; may be repeated.
    #[arg(long, value_name = "ADDRESS")]
    to: Vec<Address>,
    /// Whose eyes it is for: client, agent or audit.
    #[arg(long, default_value = "client")]
    audience: Audience,
    /// Only what happened at or after this time (RFC 3339).
    #[arg(long)]
    since: Option<DateTime<Utc>>,
    /// Only what happened before this time (RFC 3339).
    #[arg(long)]
    until: Option<DateTime<Utc>>,
    /// Only this category; may be repeated.
    #[arg(long = "category", value_name = "CATEGORY")]
    categories: Vec<Category>,
    /// The time zone of the times, such as Europe/Lisbon.
    #[arg(long, default_value = "UTC")]
    timezone: chrono_tz::Tz,
    /// A field whose content is left out; may be repeated.
    #[arg(long, value_name = "FIELD", value_parser = REDACTABLE)]
    redact: Vec<String>,
    /// Mail where the file is instead of the file.
    #[arg(long)]
    no_attach: bool,
}

pub(super) async fn run(global: &Global, options: &Options) -> Done {
    if options.no_attach && options.to.is_empty() {
        // `requires` of clap says nothing here, since --to is ruled out by --output.
        return Err(Failure::Usage("--no-attach is for --to".to_owned()));
    }
    let config = load(global)?.config;
    let domains = &config.mail.allowed_domains;
    if let Some(address) = options
        .to
        .iter()
        .find(|to| !domains.allow(&options.tenant, to))
    {
        return Err(Failure::Usage(format!(
            "--to {address}: {} is not among mail.allowed_domains for {}",
            address.domain(),
            options.tenant
        )));
    }
    let storage = open(&config).await?;
    let now = clock().now();
    let id = ExportId::generate(now);
    let export = NewExport {
        id,
        tenant_id: options.tenant.clone(),
        request: ExportRequest {
            contact_id: options.contact,
            format: options.format.to_string(),
            audience: options.audience,
            since: options.since,
            until: options.until,
            categories: options.categories.clone(),
            timezone: options.timezone,
            redact: options.redact.clone(),
            to: options.to.iter().map(ToString::to_string).collect(),
            attach: !options.no_attach,
        },
        requested_by: Subject::new("command line").expect("a short text"),
        request_key: None,
        message_ids: message_ids(id, options.to.len()),
        created_at: now,
    };
    storage.exports.create_one(&export).await?;
    let export = Box::pin(serve(&config, &storage, &options.tenant, id)).await?;
    storage.close().await;
    finish(global, options, &config, &export).await
}

/// Serves the queue, beside a daemon or without one, until the export has ended.
async fn serve(
    config: &Config,
    storage: &Storage,
    tenant: &TenantId,
    id: ExportId,
) -> Result<Export, Failure> {
    let mailer = Mailer::new(&config.mail).context("cannot set up mail")?;
    let worker = id.uuid();
    let settings = export_settings(config, config.http.listen, worker)?;
    let exporter = Exporter::new(
        storage.exports.clone(),
        Arc::new(mailer),
        clock(),
        settings,
        Arc::new(Notify::new()),
    );
    let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
    let work = exporter.run(stop.clone(), abort.clone());
    tokio::pin!(work);
    let mut told = false;
    let ended = loop {
        tokio::select! {
            () = &mut work => return Err(Failure::Other(anyhow::anyhow!("the export worker ended"))),
            () = tokio::time::sleep(LOOK) => {}
        }
        let export = storage.exports.find(tenant, id).await?;
        let export = export.ok_or_else(|| Failure::NotFound("the export is gone".to_owned()))?;
        let waits = export
            .deliveries
            .iter()
            .any(|mail| !matches!(mail.state, DeliveryState::Sent | DeliveryState::Dead));
        if let (false, Some(error)) = (
            told,
            export
                .deliveries
                .iter()
                .find_map(|mail| mail.error.as_ref()),
        ) {
            say(&format!("the mail will be tried again: {error}"));
            told = true;
        }
        match export.state {
            ExportState::Queued | ExportState::Running => {}
            ExportState::Done if waits => {}
            _ => break export,
        }
    };
    stop.cancel();
    work.await;
    Ok(ended)
}

async fn finish(global: &Global, options: &Options, config: &Config, export: &Export) -> Done {
    if export.state != ExportState::Done {
        let why = export.error.as_deref().unwrap_or("no reason is known");
        let mails: Vec<&str> = export
            .deliveries
            .iter()
            .filter_map(|mail| mail.error.as_deref())
            .collect();
        let failure = anyhow::anyhow!("the export {}: {why} {}", export.state, mails.join("; "));
        return Err(Failure::Other(failure));
    }
    let sent = export
        .deliveries
        .iter()
        .filter(|mail| mail.state == DeliveryState::Sent)
        .count();
    let body = json!({
        "id": export.id,
        "state": export.state,
        "rows": export.rows,
        "bytes": export.bytes,
        "sha256": export.sha256,
        "sent": sent,
    });
    let Some(output) = &options.output else {
        print(global, &body, || {
            format!("sent {} events to {sent} recipients", export.rows)
        })?;
        return if sent == export.deliveries.len() {
            Ok(())
        } else {
            Err(Failure::Other(anyhow::anyhow!(
                "not every recipient's mail was taken"
            )))
        };
    };
    let name = export
        .file_name
        .as_deref()
        .context("the export has no file")?;
    let file = file_path(&config.export.directory, name).context("the export has no file")?;
    if output.as_os_str() == "-" {
        let mut source = std::fs::File::open(&file)?;
        match std::io::copy(&mut source, &mut std::io::stdout().lock()) {
            // Whoever read has had enough, as `head` does.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            copied => drop(copied?),
        }
        say(&format!("{} events", export.rows));
        return Ok(());
    }
    tokio::fs::copy(&file, output)
        .await
        .with_context(|| format!("cannot write {}", output.display()))?;
    print(global, &body, || {
        format!("{} events in {}", export.rows, output.display())
    })
}
