//! The scheduled export: adds one export per contact and wakes the worker that serves the queue.
//!
//! Each begins where the last one of the contact that arrived has ended, so that a run that failed or
//! was missed leaves no gap.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::Notify;

use super::{Ending, Job, JobError, RunContext};
use crate::config::{ExportJob, Selection, WhenEmpty};
use crate::domain::{Clock, ContactId, ExportId, Subject};
use crate::export::{Format, message_ids};
use crate::storage::{ExportRequest, ExportStore, NewExport};

/// Contacts that are selected at a time.
const PAGE: u32 = 500;

/// Adds exports on schedule. Safe to repeat: an export is keyed by its run and contact.
pub struct ScheduleExports {
    /// The job's name, which stands as the requester.
    pub name: String,
    /// What to export.
    pub settings: ExportJob,
    /// The queue.
    pub exports: Arc<dyn ExportStore>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// Wakes the worker.
    pub wake: Arc<Notify>,
}

#[async_trait]
impl Job for ScheduleExports {
    async fn run(&self, context: &RunContext) -> Result<Ending, JobError> {
        let mut ending = Ending::Finished;
        match &self.settings.selection {
            Selection::Contacts(contacts) => {
                for page in contacts.chunks(PAGE as usize) {
                    if context.stop.is_cancelled() {
                        ending = Ending::Unfinished;
                        break;
                    }
                    self.add(context, page).await?;
                }
            }
            Selection::Active { since, category } => {
                let since = context.scheduled_at - delta(*since);
                let mut after = None;
                loop {
                    let tenant = &self.settings.tenant;
                    let page = self
                        .exports
                        .active_contacts(tenant, since, *category, after, PAGE)
                        .await?;
                    self.add(context, &page).await?;
                    after = page.last().copied();
                    if page.len() < PAGE as usize {
                        break;
                    }
                    if context.stop.is_cancelled() {
                        ending = Ending::Unfinished;
                        break;
                    }
                }
            }
        }
        self.wake.notify_one();
        Ok(ending)
    }
}

impl ScheduleExports {
    /// Adds the exports of a page of contacts in one transaction.
    async fn add(&self, context: &RunContext, contacts: &[ContactId]) -> Result<(), JobError> {
        let requested_by = Subject::new(&format!("job {}", self.name))
            .map_err(|error| JobError::Permanent(format!("the job's name: {error}")))?;
        let tenant = &self.settings.tenant;
        let ends = self
            .exports
            .last_ends(tenant, &requested_by, contacts)
            .await?;
        let earliest = context.scheduled_at - delta(self.settings.period);
        let since = |contact: &ContactId| ends.get(contact).copied().unwrap_or(earliest);
        // What has arrived until then is not sent again, by whichever run.
        let (due, sent): (Vec<_>, Vec<_>) = contacts
            .iter()
            .map(|contact| (*contact, since(contact)))
            .partition(|(_, since)| *since < context.scheduled_at);
        context.report.add("repeated", sent.len() as u64);
        let chosen: HashSet<ContactId> = match self.settings.when_empty {
            WhenEmpty::Note => due.iter().map(|(contact, _)| *contact).collect(),
            WhenEmpty::Skip => {
                let audience = self.settings.audience;
                let until = context.scheduled_at;
                let found = self
                    .exports
                    .with_news(tenant, audience, &due, until, self.clock.now());
                found.await?.into_iter().collect()
            }
        };
        let empty = due.len() - chosen.len();
        context.report.add("empty", empty as u64);
        let exports: Vec<_> = due
            .into_iter()
            .filter(|(contact, _)| chosen.contains(contact))
            .map(|(contact, since)| self.export(context, contact, since, &requested_by))
            .collect();
        let there_are = self.exports.create(&exports, context.fence).await?;
        for (export, there_is) in exports.iter().zip(there_are) {
            let is_new = there_is == export.id;
            let name = if is_new { "exports" } else { "repeated" };
            context.report.add(name, 1);
        }
        Ok(())
    }

    fn export(
        &self,
        context: &RunContext,
        contact_id: ContactId,
        since: DateTime<Utc>,
        requested_by: &Subject,
    ) -> NewExport {
        let now = self.clock.now();
        let id = ExportId::generate(now);
        let to: Vec<String> = self.settings.to.iter().map(ToString::to_string).collect();
        NewExport {
            id,
            tenant_id: self.settings.tenant.clone(),
            message_ids: message_ids(id, to.len()),
            request: ExportRequest {
                contact_id,
                format: Format::from(self.settings.format).to_string(),
                audience: self.settings.audience,
                since: Some(since),
                until: Some(context.scheduled_at),
                categories: Vec::new(),
                timezone: chrono_tz::UTC,
                redact: Vec::new(),
                to,
                attach: self.settings.attach,
            },
            requested_by: requested_by.clone(),
            request_key: Some(format!("{}/{contact_id}", context.run)),
            created_at: now,
        }
    }
}

fn delta(duration: std::time::Duration) -> TimeDelta {
    TimeDelta::from_std(duration).unwrap_or(TimeDelta::MAX)
}
