//! The file of an export while it is written: `<export>.<worker>.part`, hashed on the way, and whole or not
//! there at all. Everything here blocks: for `spawn_blocking`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use uuid::Uuid;

const SUFFIX: &str = ".part";

/// A file being written. Dropped unfinished, it is removed.
#[derive(Debug)]
pub(super) struct PartFile {
    file: File,
    /// None once it has its final name.
    part: Option<PathBuf>,
    directory: PathBuf,
    stem: String,
    hash: Sha256,
    bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    /// Its name in the directory.
    pub(super) name: String,
    pub(super) bytes: u64,
    /// In hexadecimal.
    pub(super) sha256: String,
}

impl PartFile {
    /// Begins a file in `directory`, which is made 0700 if need be; in place of an earlier attempt of
    /// this worker. Another that lost its claim may still write the same export: each has a part of
    /// its own. `stem` is the name without its end, which may be known only when all is written.
    pub(super) fn create(directory: &Path, stem: &str, worker: Uuid) -> io::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let part = directory.join(format!("{stem}.{worker}{SUFFIX}"));
        remove(&part)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        Ok(Self {
            file,
            part: Some(part),
            directory: directory.to_owned(),
            stem: stem.to_owned(),
            hash: Sha256::new(),
            bytes: 0,
        })
    }

    /// Where it lies.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn append(&mut self, content: &[u8]) -> io::Result<()> {
        self.file.write_all(content)?;
        self.hash.update(content);
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Gives it its name, which ends in `extension`, durably: the content reaches the disk before the
    /// name does.
    pub(super) fn finish(mut self, extension: &str) -> io::Result<Written> {
        self.file.sync_all()?;
        let name = format!("{}.{extension}", self.stem);
        if let Some(part) = &self.part {
            fs::rename(part, self.directory.join(&name))?;
        }
        self.part = None;
        File::open(&self.directory)?.sync_all()?;
        let hash = std::mem::take(&mut self.hash).finalize();
        Ok(Written {
            name,
            bytes: self.bytes,
            sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}

impl Write for PartFile {
    fn write(&mut self, content: &[u8]) -> io::Result<usize> {
        self.append(content)?;
        Ok(content.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part
            && let Err(error) = remove(part)
        {
            tracing::warn!(%error, "an unfinished export stays in the export directory until it is swept");
        }
    }
}

/// Removes what a crash left unfinished: parts to which nothing was added for longer than
/// `abandoned`. Answers how many there were.
pub(super) fn sweep(directory: &Path, abandoned: Duration) -> io::Result<u64> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().ends_with(SUFFIX) {
            continue;
        }
        let age = match entry.metadata() {
            // It has just been finished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            // One from the future is young.
            metadata => metadata?.modified()?.elapsed().unwrap_or_default(),
        };
        if age > abandoned {
            remove(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Removes a file that may be gone already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_finished_file_is_its_owners_and_bears_the_hash_of_its_content() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("exports");
        let mut file = PartFile::create(&directory, "a", Uuid::nil()).unwrap();
        file.append(b"ab").unwrap();
        file.append(b"c").unwrap();
        let written = file.finish("csv").unwrap();
        assert_eq!((written.name.as_str(), written.bytes), ("a.csv", 3));
        // the test vector of FIPS 180-2
        assert_eq!(
            written.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let path = directory.join("a.csv");
        assert_eq!((mode(&path), mode(&directory)), (0o600, 0o700));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    #[test]
    fn an_unfinished_file_goes_when_it_is_dropped_and_a_left_one_by_the_sweep() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let part = |worker| PartFile::create(home, "a", Uuid::from_u128(worker)).unwrap();
        drop(part(1));
        assert_eq!(fs::read_dir(home).unwrap().count(), 0);
        let minute = Duration::from_mins(1);
        let left = part(2);
        let modified = left.file.metadata().unwrap().modified().unwrap();
        left.file.set_modified(modified - 2 * minute).unwrap();
        let mut written = part(3);
        written.append(b"whole").unwrap();
        assert_eq!(sweep(home, minute).unwrap(), 1);
        // Neither the sweep nor the end of another's attempt takes it away.
        drop(left);
        written.finish("csv").unwrap();
        assert_eq!(fs::read(home.join("a.csv")).unwrap(), b"whole");
        assert_eq!(fs::read_dir(home).unwrap().count(), 1);
        assert_eq!(sweep(&home.join("nowhere"), minute).unwrap(), 0);
    }
}
