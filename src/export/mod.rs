//! stub
use crate::{domain::*, mail::Mailer, storage::*};
use std::sync::Arc;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Csv,
}
impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("csv")
    }
}
impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(t: &str) -> Result<Self, String> {
        if t == "csv" {
            Ok(Self::Csv)
        } else {
            Err("csv".into())
        }
    }
}
impl Format {
    pub fn media_type(self) -> &'static str {
        "text/csv"
    }
}
impl From<crate::config::ExportFormat> for Format {
    fn from(_: crate::config::ExportFormat) -> Self {
        Self::Csv
    }
}
pub const REDACTABLE: &[&str] = &["title"];
pub fn message_ids(id: ExportId, n: usize) -> Vec<String> {
    (0..n).map(|i| format!("{id}.{i}@timelined")).collect()
}
pub struct ExportSettings {
    pub directory: std::path::PathBuf,
    pub keep: std::time::Duration,
    pub public_url: String,
    pub worker: uuid::Uuid,
}
pub struct Exporter;
impl Exporter {
    pub fn new(
        _: Arc<dyn ExportStore>,
        _: Mailer,
        _: Arc<dyn Clock>,
        _: ExportSettings,
        _: Arc<Notify>,
    ) -> Self {
        Self
    }
    pub async fn run(self, stop: CancellationToken, _a: CancellationToken) {
        stop.cancelled().await
    }
}
