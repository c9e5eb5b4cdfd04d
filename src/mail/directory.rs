//! Mail into a directory: each letter a file `<local part of the Message-ID>.eml`, which any mail
//! program opens. What a fresh installation does, so that nothing leaves the house by accident.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Outcome, SealedLetter};

/// A directory of letters.
#[derive(Debug, Clone)]
pub struct Outbox {
    directory: PathBuf,
}

impl Outbox {
    /// Letters into `directory`, which the first one makes, 0700.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Writes the letter; one with the same `Message-ID` is replaced.
    pub(super) async fn put(&self, letter: &SealedLetter) -> Outcome {
        let (directory, letter) = (self.directory.clone(), letter.clone());
        let written = tokio::task::spawn_blocking(move || write(&directory, &letter)).await;
        match written {
            Ok(Ok(())) => Outcome::Sent,
            Ok(Err(error)) => Outcome::Deferred(format!(
                "cannot write into {}: {error}",
                self.directory.display()
            )),
            Err(error) => Outcome::Deferred(format!("writing the letter ended early: {error}")),
        }
    }
}

/// Whole or not at all, also when the power goes: the rename comes after the fsync.
fn write(directory: &Path, letter: &SealedLetter) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let (local, _domain) = letter
        .message_id
        .split_once('@')
        .expect("a sealed letter has a valid Message-ID");
    let draft = directory.join(format!(".{local}.eml.part"));
    // What a crash left may have another mode.
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(&letter.content)?;
    file.sync_all()?;
    fs::rename(&draft, directory.join(format!("{local}.eml")))?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn the_same_message_id_replaces_the_file_which_only_its_owner_reads() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("outbox");
        let outbox = Outbox::new(directory.clone());
        for content in [&b"first"[..], b"second"] {
            let letter = SealedLetter {
                message_id: "0190.1@crm".to_owned(),
                envelope: lettre::address::Envelope::new(None, vec!["a@b".parse().unwrap()])
                    .unwrap(),
                content: content.to_vec(),
            };
            assert_eq!(outbox.put(&letter).await, Outcome::Sent);
        }
        let files: Vec<_> = fs::read_dir(&directory).unwrap().collect();
        assert_eq!(files.len(), 1);
        let path = directory.join("0190.1.eml");
        assert_eq!(fs::read(&path).unwrap(), b"second");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&directory)), (0o600, 0o700));
    }
}
