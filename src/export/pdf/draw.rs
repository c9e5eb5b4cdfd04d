//! Kept pages to a PDF: glyphs, shapes, tags and outline by krilla.
//!
//! Tags are the better part of a tagged file: each is an object of some hundred bytes, and krilla
//! writes objects plainly. [`super::pack`] packs them afterwards.

use std::num::NonZeroU16;

use krilla::color::rgb;
use krilla::configure::{Accessibility, Archival, Configuration, ConfigurationBuilder};
use krilla::destination::XyzDestination;
use krilla::geom::{PathBuilder, Point, Rect};
use krilla::metadata::{DateTime as PdfTime, Metadata};
use krilla::num::NormalizedF32;
use krilla::outline::{Outline, OutlineNode};
use krilla::page::PageSettings;
use krilla::paint::{Fill, FillRule};
use krilla::surface::Surface;
use krilla::tagging::{
    Artifact, ArtifactType, ContentTag, Identifier, ListNumbering, TableHeaderScope, Tag, TagGroup,
    TagKind, TagTree,
};
use krilla::text::{GlyphId, KrillaGlyph};
use krilla::{Document, SerializeSettings};

use super::flow::{Flow, HEIGHT, NodeId, Placed, Role, Shape, Stop, Thing, WIDTH};
use super::fonts::Fonts;
use super::text::{Colour, Line};

/// What a document says of itself.
pub(super) struct About {
    pub(super) title: String,
    pub(super) language: String,
    pub(super) id: String,
    pub(super) created: PdfTime,
}

/// The PDF of the pages: accessible and for archives, where its content allows that.
pub(super) fn draw(flow: &Flow, fonts: &Fonts, about: &About) -> Result<Vec<u8>, String> {
    let ua = ConfigurationBuilder::new().with_accessibility_validator(Accessibility::UA1);
    let both = ua.with_archival_validator(Archival::A2_A).finish();
    let configurations = [both, ua.finish(), ConfigurationBuilder::new().finish()];
    let mut why = String::new();
    for configuration in configurations {
        let configuration = configuration.map_err(|error| format!("{error:?}"))?;
        match with(flow, fonts, about, configuration) {
            Ok(pdf) => return Ok(pdf),
            // Such as a character from a private area: the document comes, without the claim.
            Err(error) => why = error,
        }
    }
    Err(why)
}

fn with(
    flow: &Flow,
    fonts: &Fonts,
    about: &About,
    configuration: Configuration,
) -> Result<Vec<u8>, String> {
    let mut document = Document::new_with(SerializeSettings {
        configuration,
        enable_tagging: true,
        ..SerializeSettings::default()
    });
    let mut marks: Vec<Vec<Identifier>> = vec![Vec::new(); flow.nodes.len()];
    let settings = PageSettings::from_wh(WIDTH, HEIGHT).ok_or("the page has no size")?;
    for placed in &flow.pages {
        let mut page = document.start_page_with(settings.clone());
        let mut surface = page.surface();
        for same in placed.chunk_by(|a, b| a.node == b.node) {
            let tag = match same[0].node {
                Some(_) => ContentTag::Other,
                None => ContentTag::Artifact(Artifact::with_kind(ArtifactType::Layout)),
            };
            let mark = surface.start_tagged(tag);
            if let Some(node) = same[0].node {
                marks[node].push(mark);
            }
            for thing in same {
                place(&mut surface, fonts, thing);
            }
            surface.end_tagged();
        }
        surface.finish();
        page.finish();
    }
    let mut tags = TagTree::new().with_lang(Some(about.language.clone()));
    for child in &flow.nodes[0].children {
        tags.push(group(flow, &mut marks, *child));
    }
    document.set_tag_tree(tags);
    document.set_outline(outline(&flow.stops));
    document.set_metadata(
        Metadata::new()
            .title(about.title.clone())
            .language(about.language.clone())
            .creator("timelined".to_owned())
            .document_id(about.id.clone())
            .creation_date(about.created),
    );
    document.finish().map_err(|error| format!("{error:?}"))
}

fn group(flow: &Flow, marks: &mut [Vec<Identifier>], id: NodeId) -> TagGroup {
    let node = &flow.nodes[id];
    let tag: TagKind = match &node.role {
        Role::Document | Role::Section => Tag::Section.into(),
        Role::Heading(level, title) => {
            let level = NonZeroU16::new(*level).unwrap_or(NonZeroU16::MIN);
            Tag::Hn(level, Some(title.clone())).into()
        }
        Role::Paragraph => Tag::P.into(),
        Role::List => Tag::L(ListNumbering::None).into(),
        Role::Item => Tag::LI.into(),
        Role::Body => Tag::LBody.into(),
        Role::Table => Tag::Table.into(),
        Role::Row => Tag::TR.into(),
        Role::HeaderCell => Tag::TH(TableHeaderScope::Row).into(),
        Role::Cell => Tag::TD.into(),
        Role::Figure(alt) => Tag::Figure(Some(alt.clone())).into(),
    };
    let mut group = TagGroup::new(tag);
    for mark in std::mem::take(&mut marks[id]) {
        group.push(mark);
    }
    for child in &node.children {
        group.push(self::group(flow, marks, *child));
    }
    group
}

fn outline(stops: &[Stop]) -> Outline {
    let mut outline = Outline::new();
    for month in stops.chunk_by(|a, b| a.month == b.month) {
        let to = |stop: &Stop| XyzDestination::new(stop.page, Point::from_xy(0.0, stop.y));
        let mut node = OutlineNode::new(month[0].month.clone(), to(&month[0])).with_open(false);
        for day in month {
            node.push_child(OutlineNode::new(day.day.clone(), to(day)));
        }
        outline.push_child(node);
    }
    outline
}

fn fill(colour: Colour) -> Fill {
    let [red, green, blue] = colour;
    Fill {
        paint: rgb::Color::new(red, green, blue).into(),
        opacity: NormalizedF32::ONE,
        rule: FillRule::EvenOdd,
    }
}

fn place(surface: &mut Surface<'_>, fonts: &Fonts, placed: &Placed) {
    match &placed.what {
        Thing::Text(line) => text(surface, fonts, line, placed.x, placed.y),
        Thing::Box {
            width,
            height,
            colour,
        } => {
            let mut path = PathBuilder::new();
            if let Some(area) = Rect::from_xywh(placed.x, placed.y, *width, *height) {
                path.push_rect(area);
            }
            if let Some(path) = path.finish() {
                surface.set_fill(Some(fill(*colour)));
                surface.draw_path(&path);
            }
        }
        Thing::Mark {
            shape,
            size,
            colour,
        } => mark(surface, *shape, *size, *colour, placed.x, placed.y),
    }
}

fn text(surface: &mut Surface<'_>, fonts: &Fonts, line: &Line, x: f32, y: f32) {
    for run in &line.runs {
        let glyphs: Vec<KrillaGlyph> = run
            .glyphs
            .iter()
            .map(|glyph| {
                let range = glyph.start as usize..glyph.end as usize;
                let id = GlyphId::new(glyph.id);
                KrillaGlyph::new(id, glyph.advance, glyph.x, glyph.y, 0.0, range, None)
            })
            .collect();
        surface.set_fill(Some(fill(run.colour)));
        let start = Point::from_xy(x + run.x, y + line.baseline);
        surface.draw_glyphs(
            start,
            &glyphs,
            fonts.face(run.font),
            &run.text,
            run.size,
            false,
        );
    }
}

/// A shape in the square of `size` whose middle is at `x`, `y`.
fn mark(surface: &mut Surface<'_>, shape: Shape, size: f32, colour: Colour, x: f32, y: f32) {
    let r = size / 2.0;
    let mut path = PathBuilder::new();
    let circle = |path: &mut PathBuilder, r: f32| {
        let k = r * 0.5523;
        path.move_to(x + r, y);
        path.cubic_to(x + r, y + k, x + k, y + r, x, y + r);
        path.cubic_to(x - k, y + r, x - r, y + k, x - r, y);
        path.cubic_to(x - r, y - k, x - k, y - r, x, y - r);
        path.cubic_to(x + k, y - r, x + r, y - k, x + r, y);
        path.close();
    };
    let polygon = |path: &mut PathBuilder, points: &[(f32, f32)]| {
        for (index, (dx, dy)) in points.iter().enumerate() {
            if index == 0 {
                path.move_to(x + dx, y + dy);
            } else {
                path.line_to(x + dx, y + dy);
            }
        }
        path.close();
    };
    let square = |s: f32| [(-s, -s), (s, -s), (s, s), (-s, s)];
    let diamond = |s: f32| [(0.0, -s), (s, 0.0), (0.0, s), (-s, 0.0)];
    match shape {
        Shape::Disc => circle(&mut path, r),
        Shape::Ring => {
            circle(&mut path, r);
            circle(&mut path, r * 0.55);
        }
        Shape::Square => polygon(&mut path, &square(r * 0.88)),
        Shape::Frame => {
            polygon(&mut path, &square(r * 0.88));
            polygon(&mut path, &square(r * 0.45));
        }
        Shape::Diamond => polygon(&mut path, &diamond(r * 1.12)),
        Shape::Hollow => {
            polygon(&mut path, &diamond(r * 1.15));
            polygon(&mut path, &diamond(r * 0.6));
        }
        Shape::Up => polygon(&mut path, &[(0.0, -r), (r, r * 0.8), (-r, r * 0.8)]),
        Shape::Down => polygon(&mut path, &[(0.0, r), (r, -r * 0.8), (-r, -r * 0.8)]),
        Shape::Cross => {
            let t = r * 0.32;
            polygon(
                &mut path,
                &[
                    (-t, -r),
                    (t, -r),
                    (t, -t),
                    (r, -t),
                    (r, t),
                    (t, t),
                    (t, r),
                    (-t, r),
                    (-t, t),
                    (-r, t),
                    (-r, -t),
                    (-t, -t),
                ],
            );
        }
        Shape::Bar => polygon(
            &mut path,
            &[(-r, -r * 0.4), (r, -r * 0.4), (r, r * 0.4), (-r, r * 0.4)],
        ),
        Shape::Star => {
            let points: Vec<(f32, f32)> = (0_u8..10)
                .map(|index| {
                    let angle = f32::from(index) * std::f32::consts::PI / 5.0;
                    let far = if index % 2 == 0 { r * 1.15 } else { r * 0.5 };
                    (far * angle.sin(), -far * angle.cos())
                })
                .collect();
            polygon(&mut path, &points);
        }
    }
    if let Some(path) = path.finish() {
        surface.set_fill(Some(fill(colour)));
        surface.draw_path(&path);
    }
}
