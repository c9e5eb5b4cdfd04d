//! The fonts of documents: Noto Sans is in the binary; for other scripts a font is read from the
//! disk when a character asks for it, once in a render.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parley::fontique::{Blob, Collection, CollectionOptions};
use parley::style::FontFamilyName;
use parley::{FontContext, FontData};

const BASE: &str = "Noto Sans";
/// Where Debian's fonts-noto-core, -cjk and -color-emoji lie.
const DEBIAN: [&str; 2] = [
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/opentype/noto",
];
/// Fonts in a configured directory that are looked into.
const MOST_FONTS: usize = 64;

/// Which font has the characters of a range. What stands in none is looked for in the configured
/// directories.
const SCRIPTS: &[(u32, u32, &str)] = &[
    (0x0530, 0x058f, "NotoSansArmenian-Regular.ttf"),
    (0x0590, 0x05ff, "NotoSansHebrew-Regular.ttf"),
    (0x0600, 0x06ff, "NotoSansArabic-Regular.ttf"),
    (0x0700, 0x074f, "NotoSansSyriac-Regular.ttf"),
    (0x0750, 0x077f, "NotoSansArabic-Regular.ttf"),
    (0x08a0, 0x08ff, "NotoSansArabic-Regular.ttf"),
    (0x0900, 0x097f, "NotoSansDevanagari-Regular.ttf"),
    (0x0980, 0x09ff, "NotoSansBengali-Regular.ttf"),
    (0x0a00, 0x0a7f, "NotoSansGurmukhi-Regular.ttf"),
    (0x0a80, 0x0aff, "NotoSansGujarati-Regular.ttf"),
    (0x0b00, 0x0b7f, "NotoSansOriya-Regular.ttf"),
    (0x0b80, 0x0bff, "NotoSansTamil-Regular.ttf"),
    (0x0c00, 0x0c7f, "NotoSansTelugu-Regular.ttf"),
    (0x0c80, 0x0cff, "NotoSansKannada-Regular.ttf"),
    (0x0d00, 0x0d7f, "NotoSansMalayalam-Regular.ttf"),
    (0x0d80, 0x0dff, "NotoSansSinhala-Regular.ttf"),
    (0x0e00, 0x0e7f, "NotoSansThai-Regular.ttf"),
    (0x0e80, 0x0eff, "NotoSansLao-Regular.ttf"),
    (0x1000, 0x109f, "NotoSansMyanmar-Regular.ttf"),
    (0x10a0, 0x10ff, "NotoSansGeorgian-Regular.ttf"),
    (0x1100, 0x11ff, "NotoSansCJK-Regular.ttc"),
    (0x1200, 0x139f, "NotoSansEthiopic-Regular.ttf"),
    (0x1780, 0x17ff, "NotoSansKhmer-Regular.ttf"),
    (0x2100, 0x214f, "NotoSansSymbols-Regular.ttf"),
    (0x2190, 0x23ff, "NotoSansMath-Regular.ttf"),
    (0x2190, 0x2bff, "NotoSansSymbols2-Regular.ttf"),
    (0x2190, 0x2bff, "NotoSansSymbols-Regular.ttf"),
    (0x2190, 0x2bff, "NotoColorEmoji.ttf"),
    (0x2e80, 0x9fff, "NotoSansCJK-Regular.ttc"),
    (0xac00, 0xd7af, "NotoSansCJK-Regular.ttc"),
    (0xf900, 0xfaff, "NotoSansCJK-Regular.ttc"),
    (0xfb1d, 0xfb4f, "NotoSansHebrew-Regular.ttf"),
    (0xfb50, 0xfdff, "NotoSansArabic-Regular.ttf"),
    (0xfe70, 0xfeff, "NotoSansArabic-Regular.ttf"),
    (0xff00, 0xffef, "NotoSansCJK-Regular.ttc"),
    (0x1_f000, 0x1_faff, "NotoColorEmoji.ttf"),
    (0x1_f000, 0x1_faff, "NotoSansSymbols2-Regular.ttf"),
    (0x2_0000, 0x3_ffff, "NotoSansCJK-Regular.ttc"),
];

/// The fonts of one render, and the characters that none of them has.
pub(super) struct Fonts {
    pub(super) context: FontContext,
    /// Each in the order in which it is asked.
    families: Vec<String>,
    directories: Vec<PathBuf>,
    tried: HashSet<PathBuf>,
    faces: Vec<krilla::text::Font>,
    /// By the blob's id and the index in it.
    known: BTreeMap<(u64, u32), usize>,
    /// Each with how often it was met.
    pub(super) missing: BTreeMap<char, u64>,
}

impl Fonts {
    /// `directories` are looked into before Debian's.
    pub(super) fn new(directories: &[PathBuf]) -> Self {
        let options = CollectionOptions {
            shared: false,
            system_fonts: false,
        };
        let context = FontContext {
            collection: Collection::new(options),
            ..FontContext::default()
        };
        let mut fonts = Self {
            context,
            families: Vec::new(),
            directories: directories.to_vec(),
            tried: HashSet::new(),
            faces: Vec::new(),
            known: BTreeMap::new(),
            missing: BTreeMap::new(),
        };
        for font in [notosans::REGULAR_TTF, notosans::BOLD_TTF] {
            fonts.register(Blob::new(Arc::new(font)));
        }
        // Under whatever name it registered, the base comes first.
        if fonts.families.is_empty() {
            fonts.families.push(BASE.to_owned());
        }
        fonts
    }

    fn register(&mut self, font: Blob<u8>) {
        for (family, _faces) in self.context.collection.register_fonts(font, None) {
            let name = self.context.collection.family_name(family);
            let Some(name) = name.map(str::to_owned) else {
                continue;
            };
            if !self.families.contains(&name) {
                self.families.push(name);
            }
        }
    }

    /// The families, in the order in which they are asked for a character.
    pub(super) fn families(&self) -> Vec<FontFamilyName<'static>> {
        self.families
            .iter()
            .map(|name| FontFamilyName::Named(Cow::Owned(name.clone())))
            .collect()
    }

    /// Reads the fonts that may have `character`. False where nothing new was found.
    pub(super) fn look_for(&mut self, character: char) -> bool {
        let code = u32::from(character);
        let before = self.families.len();
        let named: Vec<PathBuf> = SCRIPTS
            .iter()
            .filter(|(first, last, _)| (*first..=*last).contains(&code))
            .flat_map(|(_, _, name)| {
                self.places()
                    .map(|place| place.join(name))
                    .collect::<Vec<_>>()
            })
            .collect();
        for path in named {
            self.read(&path);
            // Titles are bold. The collections are large, and their one weight is legible.
            if let Some(bold) = path
                .to_str()
                .and_then(|path| path.strip_suffix("-Regular.ttf"))
            {
                self.read(Path::new(&format!("{bold}-Bold.ttf")));
            }
        }
        if self.families.len() == before {
            for directory in self.directories.clone() {
                for path in fonts_in(&directory) {
                    self.read(&path);
                }
            }
        }
        self.families.len() > before
    }

    fn places(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let configured = self.directories.clone().into_iter();
        configured.chain(DEBIAN.iter().map(PathBuf::from))
    }

    fn read(&mut self, path: &Path) {
        if !self.tried.insert(path.to_owned()) {
            return;
        }
        // One that is not there leaves its characters to the report.
        if let Ok(content) = std::fs::read(path) {
            self.register(Blob::from(content));
        }
    }

    /// The number of a font for [`Fonts::face`].
    pub(super) fn number(&mut self, font: &FontData) -> Option<usize> {
        let key = (font.data.id(), font.index);
        if let Some(number) = self.known.get(&key) {
            return Some(*number);
        }
        let (content, _id) = font.data.clone().into_raw_parts();
        let face = krilla::text::Font::new(content.into(), font.index)?;
        self.faces.push(face);
        let number = self.faces.len() - 1;
        self.known.insert(key, number);
        Some(number)
    }

    pub(super) fn face(&self, number: usize) -> krilla::text::Font {
        self.faces[number].clone()
    }
}

fn fonts_in(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let end = path.extension().and_then(|end| end.to_str());
            matches!(end, Some("ttf" | "otf" | "ttc"))
        })
        .collect();
    paths.sort();
    paths.truncate(MOST_FONTS);
    paths
}
