//! `timelined events import`: events from JSON lines, such as an export wrote.
//!
//! Lines are saved in batches, each a transaction of its own, so an import that was cut short is
//! simply repeated: what is there already is told, and stays as it is. A line that cannot be taken
//! stops none of the others.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use clap::Args;
use flate2::bufread::MultiGzDecoder;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::{Done, Failure, Global, clock, print, say};
use crate::domain::{ContactEvent, Subject, TenantId, read_portable};
use crate::storage::{Imported, Storage};

/// Events of a transaction: enough that its fsync hardly counts, and few enough that a daemon beside
/// does not wait long on SQLite, which has one writer.
const BATCH: usize = 1000;
/// And bytes of their lines, so that large ones do not gather in memory.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// The longest line. An event has at most some 300 KB, however its texts are escaped.
const LONGEST: usize = 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct Options {
    /// JSON lines, as `timelined export --format jsonl` writes them, plain or packed by gzip or
    /// Zstandard; - reads standard input.
    file: PathBuf,
    /// The tenant of the events.
    #[arg(long)]
    tenant: TenantId,
}

/// What became of the lines.
#[derive(Debug, Default, Serialize)]
struct Counts {
    lines: u64,
    created: u64,
    existing: u64,
    conflicts: u64,
    refused: u64,
}

pub(super) async fn run(global: &Global, options: &Options, storage: &Storage) -> Done {
    let by = Subject::new("import").expect("a short text");
    let path = options.file.clone();
    let opened = spawn_blocking(move || Lines::open(&path)).await;
    let (mut lines, progress) = opened.context("opening the file panicked")??;
    let mut counts = Counts::default();
    loop {
        let (tenant, now) = (options.tenant.clone(), clock().now());
        let reading = spawn_blocking(move || {
            let batch = lines.batch(&tenant, now);
            (lines, batch)
        });
        let batch;
        (lines, batch) = reading.await.context("reading a line panicked")?;
        let batch = batch.with_context(|| {
            let behind = lines.number;
            format!("cannot read what follows line {behind}; what precedes it may have been saved")
        })?;
        for (line, reason) in &batch.refused {
            progress.suspend(|| say(&format!("line {line}: {reason}")));
        }
        counts.refused += batch.refused.len() as u64;
        let (numbers, events): (Vec<u64>, Vec<ContactEvent>) = batch.events.into_iter().unzip();
        if let (Some(first), Some(last)) = (numbers.first(), numbers.last()) {
            let saving = storage.events.import(&options.tenant, events, &by).await;
            let imported =
                saving.with_context(|| format!("cannot save the lines {first} to {last}"))?;
            for (line, imported) in numbers.iter().zip(imported) {
                match imported {
                    Imported::Created => counts.created += 1,
                    Imported::Existing => counts.existing += 1,
                    Imported::Conflict { fields } => {
                        counts.conflicts += 1;
                        progress.suspend(|| say(&format!("line {line}: {}", conflict(&fields))));
                    }
                }
            }
        }
        counts.lines = lines.taken;
        progress.set_message(format!("{} events", counts.created + counts.existing));
        if batch.is_last {
            break;
        }
    }
    progress.finish_and_clear();
    finish(global, &counts)
}

fn conflict(fields: &[&str]) -> String {
    if fields.is_empty() {
        return "there is another event with this id, which cannot be read".to_owned();
    }
    let fields = fields.join(", ");
    format!("there is another event with this id, with another {fields}; it stays as it is")
}

fn finish(global: &Global, counts: &Counts) -> Done {
    print(global, counts, || {
        let Counts {
            lines,
            created,
            existing,
            conflicts,
            refused,
        } = counts;
        format!(
            "{lines} lines: {created} created, {existing} existing, {conflicts} in conflict, {refused} refused"
        )
    })?;
    match counts.conflicts + counts.refused {
        0 => Ok(()),
        lost => Err(Failure::Other(anyhow::anyhow!(
            "{lost} lines were not imported"
        ))),
    }
}

/// The lines of a file.
struct Lines {
    source: Box<dyn BufRead + Send>,
    line: Vec<u8>,
    /// The number of the last line that was read.
    number: u64,
    /// The lines so far that are not blank.
    taken: u64,
}

/// Some lines, read.
struct Batch {
    events: Vec<(u64, ContactEvent)>,
    refused: Vec<(u64, String)>,
    is_last: bool,
}

impl Lines {
    /// Opens the file, whatever it is packed by, and a bar that follows how much of it is read.
    fn open(path: &Path) -> Result<(Self, ProgressBar), Failure> {
        let (input, progress): (Box<dyn Read + Send>, _) = if path == OsStr::new("-") {
            let progress = bar(None);
            (Box::new(progress.wrap_read(io::stdin())), progress)
        } else {
            let shown = path.display();
            let file = File::open(path).map_err(|error| match error.kind() {
                ErrorKind::NotFound => Failure::NotFound(format!("there is no file {shown}")),
                _ => Failure::from(
                    anyhow::Error::from(error).context(format!("cannot open {shown}")),
                ),
            })?;
            let progress = bar(Some(file.metadata()?.len()));
            (Box::new(progress.wrap_read(file)), progress)
        };
        let source = unpacked(input).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = Self {
            source,
            line: Vec::new(),
            number: 0,
            taken: 0,
        };
        Ok((lines, progress))
    }

    fn batch(&mut self, tenant: &TenantId, now: DateTime<Utc>) -> io::Result<Batch> {
        let mut batch = Batch {
            events: Vec::with_capacity(BATCH),
            refused: Vec::new(),
            is_last: false,
        };
        let mut bytes = 0;
        while batch.events.len() < BATCH && batch.refused.len() < BATCH && bytes < BATCH_BYTES {
            if !self.next()? {
                batch.is_last = true;
                break;
            }
            bytes += self.line.len();
            match self.event(tenant, now) {
                Ok(Some(event)) => batch.events.push((self.number, event)),
                Ok(None) => continue,
                Err(reason) => batch.refused.push((self.number, reason)),
            }
            self.taken += 1;
        }
        Ok(batch)
    }

    /// Reads the next line, or no more of it than is needed to see that it is too long. False at the
    /// end.
    fn next(&mut self) -> io::Result<bool> {
        self.line.clear();
        let most = LONGEST as u64 + 1;
        let read = (&mut self.source)
            .take(most)
            .read_until(b'\n', &mut self.line)?;
        if read == 0 {
            return Ok(false);
        }
        self.number += 1;
        if self.line.len() > LONGEST {
            let mut is_over = self.line.ends_with(b"\n");
            let mut rest = Vec::new();
            while !is_over {
                rest.clear();
                let read = (&mut self.source).take(most).read_until(b'\n', &mut rest)?;
                is_over = read == 0 || rest.ends_with(b"\n");
            }
        }
        Ok(true)
    }

    /// The event of the line that was read; none where it is blank.
    fn event(&self, tenant: &TenantId, now: DateTime<Utc>) -> Result<Option<ContactEvent>, String> {
        if self.line.len() > LONGEST {
            return Err(format!("is longer than {LONGEST} bytes, which no event is"));
        }
        let line = match self.line.strip_prefix(b"\xef\xbb\xbf") {
            Some(line) if self.number == 1 => line,
            _ => &self.line,
        };
        let line = std::str::from_utf8(line).map_err(|error| format!("is not UTF-8: {error}"))?;
        if line.trim().is_empty() {
            return Ok(None);
        }
        let event = read_portable(line, tenant, now).map_err(|invalid| invalid.to_string())?;
        Ok(Some(event))
    }
}

/// What the input holds, by its first bytes: gzip (RFC 1952), Zstandard (RFC 8878) or plain text.
fn unpacked(mut input: Box<dyn Read + Send>) -> io::Result<Box<dyn BufRead + Send>> {
    let mut head = Vec::with_capacity(4);
    (&mut input).take(4).read_to_end(&mut head)?;
    let packing = <[u8; 4]>::try_from(&head[..]).ok();
    let input = BufReader::with_capacity(64 * 1024, Cursor::new(head).chain(input));
    Ok(match packing {
        Some([0x1f, 0x8b, ..]) => Box::new(BufReader::new(MultiGzDecoder::new(input))),
        Some([0x28, 0xb5, 0x2f, 0xfd]) => {
            Box::new(BufReader::new(zstd::Decoder::with_buffer(input)?))
        }
        _ => Box::new(input),
    })
}

/// A bar on a terminal, nothing elsewhere. How long a pipe is nobody knows.
fn bar(bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (
            ProgressBar::new(bytes),
            "[{bar:40}] {bytes} of {total_bytes}, {eta} left: {msg}",
        ),
        None => (ProgressBar::no_length(), "{bytes} in {elapsed}: {msg}"),
    };
    let style = ProgressStyle::with_template(template).expect("the template is well formed");
    bar.with_style(style.progress_chars("=> "))
}
