//! Text to lines of glyphs: shaping, direction and line breaks by parley.

use std::borrow::Cow;
use std::sync::Arc;

use parley::layout::{Alignment, AlignmentOptions};
use parley::style::{FontFamily, FontWeight, LineHeight, OverflowWrap, StyleProperty};
use parley::{Layout, LayoutContext};

use super::fonts::Fonts;

/// Red, green, blue.
pub(super) type Colour = [u8; 3];

/// What stands for a character that no font has.
const REPLACEMENT: char = '\u{fffd}';

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Style {
    pub(super) size: f32,
    pub(super) is_bold: bool,
    pub(super) colour: Colour,
}

/// A line, ready to be drawn.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) height: f32,
    /// Below the top.
    pub(super) baseline: f32,
    pub(super) width: f32,
    pub(super) runs: Vec<Run>,
}

/// Glyphs of one font.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) font: usize,
    pub(super) size: f32,
    pub(super) colour: Colour,
    /// From the line's left.
    pub(super) x: f32,
    pub(super) text: Arc<str>,
    pub(super) glyphs: Vec<Glyph>,
}

/// In parts of the font's size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Glyph {
    pub(super) id: u32,
    pub(super) advance: f32,
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) start: u32,
    pub(super) end: u32,
}

/// Sets text with the fonts of a render.
pub(super) struct Setter {
    pub(super) fonts: Fonts,
    context: LayoutContext<()>,
    layout: Layout<()>,
}

impl Setter {
    pub(super) fn new(fonts: Fonts) -> Self {
        Self {
            fonts,
            context: LayoutContext::new(),
            layout: Layout::new(),
        }
    }

    /// The lines of `text`, each paragraph in its own direction, and each at most `width` wide: a word
    /// that is wider is broken anywhere.
    pub(super) fn set(&mut self, text: &str, style: Style, width: f32) -> Vec<Line> {
        let text = text.replace("\r\n", "\n");
        text.split(['\n', '\r', '\u{2028}', '\u{2029}', '\u{85}'])
            .flat_map(|paragraph| self.paragraph(paragraph, style, width))
            .collect()
    }

    /// One line, however wide.
    pub(super) fn line(&mut self, text: &str, style: Style) -> Line {
        let text: String = text
            .chars()
            .map(|c| if c == '\n' { ' ' } else { c })
            .collect();
        let mut lines = self.paragraph(&text, style, 10_000.0);
        let mut line = lines.swap_remove(0);
        // Set from the left, whatever its direction.
        let left = line.runs.iter().map(|run| run.x).fold(f32::MAX, f32::min);
        for run in &mut line.runs {
            run.x -= left;
        }
        line
    }

    fn paragraph(&mut self, text: &str, style: Style, width: f32) -> Vec<Line> {
        let mut text: String = text.chars().map(shown).collect();
        self.build(&text, style, width);
        while let Some(missing) = self.unset(&text) {
            let mut found = false;
            for character in &missing {
                found |= self.fonts.look_for(*character);
            }
            if !found {
                for character in text.chars().filter(|c| missing.contains(c)) {
                    *self.fonts.missing.entry(character).or_default() += 1;
                }
                text = text
                    .chars()
                    .map(|c| if missing.contains(&c) { REPLACEMENT } else { c })
                    .collect();
            }
            self.build(&text, style, width);
            if missing == [REPLACEMENT] {
                break;
            }
        }
        self.lines(&text, style)
    }

    fn build(&mut self, text: &str, style: Style, width: f32) {
        let families = self.fonts.families();
        let mut builder = self
            .context
            .ranged_builder(&mut self.fonts.context, text, 1.0, false);
        builder.push_default(StyleProperty::FontFamily(FontFamily::List(Cow::Owned(
            families,
        ))));
        builder.push_default(StyleProperty::FontSize(style.size));
        builder.push_default(StyleProperty::LineHeight(LineHeight::FontSizeRelative(1.4)));
        builder.push_default(StyleProperty::OverflowWrap(OverflowWrap::Anywhere));
        if style.is_bold {
            builder.push_default(StyleProperty::FontWeight(FontWeight::BOLD));
        }
        builder.build_into(&mut self.layout, text);
        self.layout.break_all_lines(Some(width));
        self.layout
            .align(Alignment::Start, AlignmentOptions::default());
    }

    /// The characters without a glyph.
    fn unset(&self, text: &str) -> Option<Vec<char>> {
        let mut missing: Vec<char> = Vec::new();
        for line in self.layout.lines() {
            for cluster in line.runs().flat_map(|run| run.clusters()) {
                if cluster.glyphs().all(|glyph| glyph.id != 0) {
                    continue;
                }
                for character in text[cluster.text_range()].chars() {
                    if !character.is_whitespace() && !missing.contains(&character) {
                        missing.push(character);
                    }
                }
            }
        }
        (!missing.is_empty()).then_some(missing)
    }

    fn lines(&mut self, text: &str, style: Style) -> Vec<Line> {
        let text: Arc<str> = Arc::from(text);
        let mut lines = Vec::new();
        for line in self.layout.lines() {
            let metrics = line.metrics();
            let mut x = metrics.offset;
            let mut runs = Vec::new();
            for run in line.runs() {
                let size = run.font_size();
                let left = x;
                let mut glyphs: Vec<Glyph> = Vec::with_capacity(run.len());
                for cluster in run.visual_clusters() {
                    let range = cluster.text_range();
                    let (start, end) = (offset(range.start), offset(range.end));
                    if cluster.is_ligature_continuation() {
                        if let Some(glyph) = glyphs.last_mut() {
                            glyph.start = glyph.start.min(start);
                            glyph.end = glyph.end.max(end);
                        }
                        continue;
                    }
                    for glyph in cluster.glyphs() {
                        x += glyph.advance;
                        // A blank without a glyph only moves the pen.
                        glyphs.push(Glyph {
                            id: glyph.id,
                            advance: glyph.advance / size,
                            x: glyph.x / size,
                            y: glyph.y / size,
                            start,
                            end,
                        });
                    }
                }
                while glyphs.last().is_some_and(|glyph| glyph.id == 0) {
                    glyphs.pop();
                }
                if glyphs.is_empty() {
                    continue;
                }
                let Some(font) = self.fonts.number(run.font()) else {
                    continue;
                };
                runs.push(Run {
                    font,
                    size,
                    colour: style.colour,
                    x: left,
                    text: text.clone(),
                    glyphs,
                });
            }
            lines.push(Line {
                // In halves: places with many digits make a document larger, and no page nicer.
                height: halves(metrics.line_height),
                baseline: halves(metrics.baseline - metrics.block_min_coord),
                width: metrics.advance,
                runs,
            });
        }
        lines
    }
}

/// A control character would neither be seen nor be legible.
fn shown(character: char) -> char {
    match character {
        '\t' | '\u{b}' | '\u{c}' => ' ',
        control if control.is_control() => REPLACEMENT,
        other => other,
    }
}

fn offset(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn halves(length: f32) -> f32 {
    (length * 2.0).round() / 2.0
}
