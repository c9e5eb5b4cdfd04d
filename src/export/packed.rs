//! A file that may be compressed on its way to the disk.

use std::io::{self, Write as _};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::file::{PartFile, Written};
use super::{FileKind, Packing};

/// The fastest of the usual levels: a timeline repeats itself so much that the others gain little.
const ZSTD_LEVEL: i32 = 1;

/// Where the text of a format goes.
pub(super) enum Packed {
    Plain(PartFile),
    Gzip(GzEncoder<PartFile>),
    Zstd(zstd::Encoder<'static, PartFile>),
}

impl Packed {
    pub(super) fn begin(file: PartFile, packing: Packing) -> io::Result<Self> {
        Ok(match packing {
            Packing::None => Self::Plain(file),
            Packing::Gzip => Self::Gzip(GzEncoder::new(file, Compression::default())),
            Packing::Zstd => {
                let mut encoder = zstd::Encoder::new(file, ZSTD_LEVEL)?;
                // A reader notices a file that was damaged.
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
        })
    }

    pub(super) fn append(&mut self, content: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.append(content),
            Self::Gzip(encoder) => encoder.write_all(content),
            Self::Zstd(encoder) => encoder.write_all(content),
        }
    }

    /// Writes what is held back, and gives the file its name.
    pub(super) fn finish(self, kind: FileKind) -> io::Result<Written> {
        let file = match self {
            Self::Plain(file) => file,
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Zstd(encoder) => encoder.finish()?,
        };
        file.finish(kind.extension())
    }
}
