//! Makes a PDF small: the objects of its structure go into compressed object streams (ISO 32000-1,
//! 7.5.7), which PDF 1.5 and later know, and its table of objects into a cross-reference stream.
//!
//! krilla writes each object plainly, and the tags of an event are a dozen of objects that differ in
//! a few digits. Packed, they are an eighth of that.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;

/// Objects in a stream. A reader unpacks a whole one for any of its objects.
const TOGETHER: usize = 400;

/// Where an object is, for the table.
#[derive(Clone, Copy)]
enum Place {
    Free,
    At(usize),
    In { stream: usize, index: usize },
}

/// The same document, smaller. None where it is not written as expected: then it stays as it is.
pub(super) fn pack(pdf: &[u8]) -> Option<Vec<u8>> {
    let (offsets, trailer) = table(pdf)?;
    let mut out = Vec::with_capacity(pdf.len() / 2);
    out.extend_from_slice(&pdf[..*offsets.iter().flatten().min()?]);
    let mut places = vec![Place::Free; offsets.len()];
    let mut plain: Vec<(usize, &[u8])> = Vec::new();
    let mut order: Vec<usize> = (0..offsets.len())
        .filter(|id| offsets[*id].is_some())
        .collect();
    order.sort_by_key(|id| offsets[*id]);
    let end = find_last(pdf, b"xref")?;
    for (index, id) in order.iter().enumerate() {
        let start = offsets[*id]?;
        let next = order
            .get(index + 1)
            .and_then(|next| offsets[*next])
            .unwrap_or(end);
        let object = pdf.get(start..next)?;
        let begin = format!("{id} 0 obj\n");
        let inner = object.strip_prefix(begin.as_bytes())?;
        let close = find_last(inner, b"endobj")?;
        let inner = inner.get(..close)?;
        if inner.trim_ascii_end().ends_with(b"endstream") {
            places[*id] = Place::At(out.len());
            out.extend_from_slice(object.trim_ascii_end());
            out.push(b'\n');
        } else {
            plain.push((*id, inner.trim_ascii()));
        }
    }
    let mut next_id = offsets.len();
    for some in plain.chunks(TOGETHER) {
        let (mut head, mut body) = (String::new(), Vec::new());
        for (index, (id, object)) in some.iter().enumerate() {
            head.push_str(&format!("{id} {} ", body.len()));
            body.extend_from_slice(object);
            body.push(b'\n');
            places[*id] = Place::In {
                stream: next_id,
                index,
            };
        }
        let content = compressed(&[head.as_bytes(), &body])?;
        places.push(Place::At(out.len()));
        let begin = format!(
            "{next_id} 0 obj\n<<\n/Type /ObjStm\n/N {}\n/First {}\n/Filter /FlateDecode\n/Length {}\n>>\nstream\n",
            some.len(),
            head.len(),
            content.len()
        );
        out.extend_from_slice(begin.as_bytes());
        out.extend_from_slice(&content);
        out.extend_from_slice(b"\nendstream\nendobj\n");
        next_id += 1;
    }
    let start = out.len();
    places.push(Place::At(start));
    // Each row as its difference from the one above (PNG's "up"), which is mostly the same.
    let mut rows = Vec::with_capacity(places.len() * 8);
    let mut above = [0_u8; 7];
    for place in &places {
        let (kind, first, second) = match place {
            Place::Free => (0_u8, 0, 65_535),
            Place::At(offset) => (1, *offset, 0),
            Place::In { stream, index } => (2, *stream, *index),
        };
        let mut row = [kind, 0, 0, 0, 0, 0, 0];
        row[1..5].copy_from_slice(&u32::try_from(first).ok()?.to_be_bytes());
        row[5..].copy_from_slice(&u16::try_from(second).ok()?.to_be_bytes());
        rows.push(2);
        rows.extend(
            row.iter()
                .zip(above)
                .map(|(byte, above)| byte.wrapping_sub(above)),
        );
        above = row;
    }
    let content = compressed(&[&rows])?;
    let begin = format!(
        "{next_id} 0 obj\n<<\n/Type /XRef\n/W [1 4 2]\n/DecodeParms << /Predictor 12 /Columns 7 >>\n/Size {}\n{}\n/Filter /FlateDecode\n/Length {}\n>>\nstream\n",
        places.len(),
        trailer,
        content.len()
    );
    out.extend_from_slice(begin.as_bytes());
    out.extend_from_slice(&content);
    out.extend_from_slice(format!("\nendstream\nendobj\nstartxref\n{start}\n%%EOF").as_bytes());
    Some(out)
}

/// Where each object begins, and what the trailer says beside their number.
fn table(pdf: &[u8]) -> Option<(Vec<Option<usize>>, String)> {
    let start = find_last(pdf, b"startxref")?;
    let offset = std::str::from_utf8(pdf.get(start + 9..)?).ok()?;
    let offset: usize = offset.split_whitespace().next()?.parse().ok()?;
    let text = std::str::from_utf8(pdf.get(offset..start)?);
    // The identifiers in the trailer need not be text.
    let lossy;
    let text = if let Ok(text) = text {
        text
    } else {
        lossy = String::from_utf8_lossy(pdf.get(offset..start)?);
        if lossy.contains(char::REPLACEMENT_CHARACTER) {
            return None;
        }
        &lossy
    };
    let mut lines = text.strip_prefix("xref")?.trim_start().lines();
    let count: usize = lines.next()?.strip_prefix("0 ")?.trim().parse().ok()?;
    let mut offsets = Vec::with_capacity(count);
    for _ in 0..count {
        let mut parts = lines.next()?.split_whitespace();
        let (offset, _generation, kind) = (parts.next()?, parts.next()?, parts.next()?);
        offsets.push((kind == "n").then_some(offset.parse().ok()?));
    }
    let rest: String = lines.map(|line| format!("{line}\n")).collect();
    let trailer = rest.trim().strip_prefix("trailer")?.trim();
    let trailer = trailer.strip_prefix("<<")?.strip_suffix(">>")?;
    // The size is another one then.
    let (before, rest) = trailer.split_once("/Size")?;
    let after = rest
        .trim_start()
        .trim_start_matches(|digit: char| digit.is_ascii_digit());
    Some((offsets, format!("{before}{after}")))
}

fn find_last(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .rposition(|window| window == pattern)
}

fn compressed(parts: &[&[u8]]) -> Option<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    for part in parts {
        encoder.write_all(part).ok()?;
    }
    encoder.finish().ok()
}
