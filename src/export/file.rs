//! The file of an export while it is written: `<name>.part`, hashed on the way, and whole or not
//! there at all. Everything here blocks: for `spawn_blocking`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const SUFFIX: &str = ".part";

/// A file being written. Dropped unfinished, it is removed.
#[derive(Debug)]
pub(super) struct PartFile {
    file: File,
    /// None once it has its final name.
    part: Option<PathBuf>,
    directory: PathBuf,
    name: String,
    hash: Sha256,
    bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) bytes: u64,
    /// In hexadecimal.
    pub(super) sha256: String,
}

impl PartFile {
    /// Begins `name` in `directory`, which is made 0700 if need be; in place of an earlier attempt.
    pub(super) fn create(directory: &Path, name: &str) -> io::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let part = directory.join(format!("{name}{SUFFIX}"));
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
            name: name.to_owned(),
            hash: Sha256::new(),
            bytes: 0,
        })
    }

    pub(super) fn append(&mut self, content: &[u8]) -> io::Result<()> {
        self.file.write_all(content)?;
        self.hash.update(content);
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Gives it its name, durably: the content reaches the disk before the name does.
    pub(super) fn finish(mut self) -> io::Result<Written> {
        self.file.sync_all()?;
        if let Some(part) = &self.part {
            fs::rename(part, self.directory.join(&self.name))?;
        }
        self.part = None;
        File::open(&self.directory)?.sync_all()?;
        let hash = std::mem::take(&mut self.hash).finalize();
        Ok(Written {
            bytes: self.bytes,
            sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if let Some(part) = &self.part
            && let Err(error) = remove(part)
        {
            tracing::warn!(%error, "an unfinished export stays in the export directory until the next start");
        }
    }
}

/// Removes what a crash left unfinished. Answers how many there were.
pub(super) fn sweep(directory: &Path) -> io::Result<u64> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(SUFFIX) {
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
        let mut file = PartFile::create(&directory, "a.csv").unwrap();
        file.append(b"ab").unwrap();
        file.append(b"c").unwrap();
        let written = file.finish().unwrap();
        assert_eq!(written.bytes, 3);
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
        drop(PartFile::create(home.path(), "a.csv").unwrap());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
        fs::write(home.path().join("b.csv.part"), "left").unwrap();
        fs::write(home.path().join("c.csv"), "whole").unwrap();
        assert_eq!(sweep(home.path()).unwrap(), 1);
        assert!(home.path().join("c.csv").exists());
        assert_eq!(sweep(&home.path().join("nowhere")).unwrap(), 0);
    }
}
