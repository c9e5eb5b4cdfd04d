//! The book of erasures: one JSON object a line in a file of its own, which no restore of the database
//! takes back. It names contacts and no content.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::{ContactId, ErasureId, ExportId, Subject, TenantId, format_time, parse_time};
use crate::storage::{Erasure, ErasureState};

/// The file's name in the state directory.
const FILE: &str = "erasures.jsonl";

/// The erasures that a file has; shared by its clones.
#[derive(Debug, Clone)]
pub struct Book(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    erasures: Mutex<HashMap<ErasureId, Erasure>>,
}

/// A line.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    id: Uuid,
    tenant_id: String,
    contact_id: Uuid,
    requested_by: String,
    requested_at: String,
    up_to: String,
    finished_at: String,
    events: u64,
    #[serde(default)]
    exports: Vec<Uuid>,
}

/// A line that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {number}: {reason}")]
pub struct BadLine {
    /// Counted from one.
    pub number: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl Book {
    /// Reads the book in a state directory; none there is an empty one. Answers the lines that cannot
    /// be read too; that of a write which a crash cut short is none: what it was to say comes again.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn open(state_directory: &Path) -> io::Result<(Self, Vec<BadLine>)> {
        let path = state_directory.join(FILE);
        let (mut erasures, mut bad) = (HashMap::new(), Vec::new());
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            file => {
                let mut reader = BufReader::new(file?);
                for number in 1.. {
                    let mut line = Vec::new();
                    if reader.read_until(b'\n', &mut line)? == 0 {
                        break;
                    }
                    let is_whole = line.ends_with(b"\n");
                    if line.trim_ascii().is_empty() {
                        continue;
                    }
                    match parse(&line) {
                        Ok(erasure) => drop(erasures.insert(erasure.id, erasure)),
                        Err(_) if !is_whole => {}
                        Err(reason) => bad.push(BadLine { number, reason }),
                    }
                }
            }
        }
        let erasures = Mutex::new(erasures);
        Ok((Self(Arc::new(Inner { path, erasures })), bad))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether it has this erasure.
    #[must_use]
    pub fn has(&self, id: ErasureId) -> bool {
        self.erasures_there().contains_key(&id)
    }

    /// All it has, oldest first.
    #[must_use]
    pub fn erasures(&self) -> Vec<Erasure> {
        let mut all: Vec<Erasure> = self.erasures_there().values().cloned().collect();
        all.sort_by_key(|erasure| (erasure.finished_at, erasure.id));
        all
    }

    fn erasures_there(&self) -> std::sync::MutexGuard<'_, HashMap<ErasureId, Erasure>> {
        self.0
            .erasures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down erasures that it does not have, durable when this returns. Blocks.
    pub(super) fn append(&self, erasures: &[Erasure]) -> io::Result<()> {
        let mut there = self.erasures_there();
        let mut lines = String::new();
        let fresh: Vec<&Erasure> = erasures
            .iter()
            .filter(|erasure| !there.contains_key(&erasure.id))
            .collect();
        for erasure in &fresh {
            lines.push_str(&line(erasure)?);
            lines.push('\n');
        }
        if lines.is_empty() {
            return Ok(());
        }
        let is_new = !fs::exists(&self.0.path)?;
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.0.path)?;
        if !ends_a_line(&mut file)? {
            lines.insert(0, '\n');
        }
        file.write_all(lines.as_bytes())?;
        file.sync_all()?;
        if is_new && let Some(directory) = self.0.path.parent() {
            File::open(directory)?.sync_all()?;
        }
        for erasure in fresh {
            there.insert(erasure.id, erasure.clone());
        }
        Ok(())
    }
}

/// Whether the file is empty or its last line is whole.
fn ends_a_line(file: &mut File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

fn line(erasure: &Erasure) -> io::Result<String> {
    let line = Line {
        id: erasure.id.uuid(),
        tenant_id: erasure.tenant_id.as_str().to_owned(),
        contact_id: erasure.contact_id.uuid(),
        requested_by: erasure.requested_by.as_str().to_owned(),
        requested_at: format_time(erasure.requested_at),
        up_to: format_time(erasure.up_to),
        finished_at: format_time(erasure.finished_at.unwrap_or(erasure.requested_at)),
        events: erasure.events,
        exports: erasure.exports.iter().map(|id| id.uuid()).collect(),
    };
    Ok(serde_json::to_string(&line)?)
}

fn parse(line: &[u8]) -> Result<Erasure, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let id = |error: crate::domain::IdError| error.to_string();
    let time = |text: &str| parse_time(text).ok_or_else(|| format!("{text:?} is not a time"));
    let exports = line.exports.into_iter().map(ExportId::new);
    Ok(Erasure {
        id: ErasureId::new(line.id).map_err(id)?,
        tenant_id: TenantId::new(&line.tenant_id).map_err(id)?,
        contact_id: ContactId::new(line.contact_id).map_err(id)?,
        requested_by: Subject::new(&line.requested_by).map_err(id)?,
        requested_at: time(&line.requested_at)?,
        up_to: time(&line.up_to)?,
        state: ErasureState::Done,
        events: line.events,
        exports: exports.collect::<Result<_, _>>().map_err(id)?,
        finished_at: Some(time(&line.finished_at)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn erasure(number: u128) -> Erasure {
        let at = parse_time("2026-03-01T12:00:00.000001Z").unwrap();
        Erasure {
            id: ErasureId::new(Uuid::from_u128(number)).unwrap(),
            tenant_id: TenantId::new("acme\n\"").unwrap(),
            contact_id: ContactId::new(Uuid::from_u128(7)).unwrap(),
            requested_by: Subject::new("dpo").unwrap(),
            requested_at: at,
            up_to: at,
            state: ErasureState::Done,
            events: 3,
            exports: vec![ExportId::new(Uuid::from_u128(8)).unwrap()],
            finished_at: Some(at + chrono::TimeDelta::microseconds(i64::try_from(number).unwrap())),
        }
    }

    #[test]
    fn what_was_written_is_read_again_and_only_its_owner_reads_it() {
        let home = tempfile::tempdir().unwrap();
        let (book, bad) = Book::open(home.path()).unwrap();
        assert_eq!((book.erasures(), bad), (vec![], vec![]));
        book.append(&[erasure(2), erasure(1)]).unwrap();
        book.append(&[erasure(1)]).unwrap();
        let (again, bad) = Book::open(home.path()).unwrap();
        assert_eq!(bad, []);
        assert_eq!(again.erasures(), [erasure(1), erasure(2)]);
        assert_eq!(fs::read_to_string(book.path()).unwrap().lines().count(), 2);
        let mode = fs::metadata(book.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_line_cut_short_costs_nothing_and_a_damaged_one_is_told() {
        let home = tempfile::tempdir().unwrap();
        let (book, _) = Book::open(home.path()).unwrap();
        book.append(&[erasure(1)]).unwrap();
        let whole = fs::read_to_string(book.path()).unwrap();
        fs::write(book.path(), format!("{whole}nonsense\n{}", &whole[..40])).unwrap();
        let (book, bad) = Book::open(home.path()).unwrap();
        assert_eq!(bad.iter().map(|bad| bad.number).collect::<Vec<_>>(), [2]);
        book.append(&[erasure(2)]).unwrap();
        let (book, bad) = Book::open(home.path()).unwrap();
        assert_eq!(book.erasures(), [erasure(1), erasure(2)]);
        // Now it is a line among others.
        assert_eq!(bad.iter().map(|bad| bad.number).collect::<Vec<_>>(), [2, 3]);
    }
}
