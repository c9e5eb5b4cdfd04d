//! Activity over time: a row of bars for each category, so that no colour has to be told from another.

use chrono::{DateTime, Utc};

use super::flow::{Flow, LEFT, NodeId, RIGHT, Role, Shape, Thing};
use super::text::{Colour, Setter, Style};
use crate::domain::Category;
use crate::export::words::Words;

const BINS: usize = 48;
const ROW: f32 = 19.0;
const BARS: f32 = LEFT + 128.0;
const COUNTS: f32 = RIGHT - 44.0;

/// How a category is marked everywhere.
pub(super) fn look(category: Category) -> (Shape, Colour) {
    match category {
        Category::General => (Shape::Disc, [0x5b, 0x67, 0x78]),
        Category::Status => (Shape::Ring, [0x1f, 0x6f, 0xb5]),
        Category::Pipeline => (Shape::Square, [0x0f, 0x76, 0x6e]),
        Category::Assignment => (Shape::Up, [0x7c, 0x4d, 0xbd]),
        Category::Tag => (Shape::Diamond, [0xa3, 0x5a, 0x00]),
        Category::Note => (Shape::Frame, [0x2b, 0x7a, 0x3d]),
        Category::Session => (Shape::Bar, [0x3b, 0x4c, 0xc0]),
        Category::CustomField => (Shape::Hollow, [0x8a, 0x4b, 0x2a]),
        Category::System => (Shape::Cross, [0x4a, 0x55, 0x68]),
        Category::Notification => (Shape::Down, [0xb8, 0x32, 0x60]),
        Category::Tracking => (Shape::Star, [0x80, 0x6a, 0x00]),
    }
}

/// When things of which category happened, in the order of time.
pub(super) type Moments = Vec<(DateTime<Utc>, Category)>;

/// How high the chart is.
pub(super) fn height(moments: &Moments) -> f32 {
    let rows = Category::ALL
        .iter()
        .filter(|category| has(moments, **category));
    30.0 + f32::from(u8::try_from(rows.count()).unwrap_or(u8::MAX)) * ROW
}

fn has(moments: &Moments, category: Category) -> bool {
    moments.iter().any(|(_, of)| *of == category)
}

/// Draws at `y` on `page`.
pub(super) fn draw(
    flow: &mut Flow,
    setter: &mut Setter,
    words: &Words,
    zone: chrono_tz::Tz,
    moments: &Moments,
    parent: NodeId,
) {
    let (Some((first, _)), Some((last, _))) = (moments.first(), moments.last()) else {
        return;
    };
    let mut bins: Vec<(Category, [u32; BINS])> = Vec::new();
    for category in Category::ALL
        .iter()
        .filter(|category| has(moments, **category))
    {
        bins.push((*category, [0; BINS]));
    }
    let span = (*last - *first).num_seconds().max(1);
    for (at, category) in moments {
        let place = (*at - *first).num_seconds().clamp(0, span);
        let bin = usize::try_from(place * 47 / span).unwrap_or(0);
        if let Some((_, counts)) = bins.iter_mut().find(|(of, _)| of == category) {
            counts[bin.min(BINS - 1)] += 1;
        }
    }
    let counted: Vec<String> = bins
        .iter()
        .map(|(category, counts)| {
            let total: u32 = counts.iter().sum();
            format!(
                "{}: {}",
                words.category(*category),
                words.number(total.into())
            )
        })
        .collect();
    let alt = format!("{}. {}", words.activity_alt, counted.join(", "));
    let figure = Some(flow.node(parent, Role::Figure(alt)));
    let most = bins.iter().flat_map(|(_, counts)| counts).max();
    let most = number(*most.unwrap_or(&1));
    let label = style(8.5, [0x33, 0x3c, 0x49]);
    let wide = (COUNTS - BARS) / 48.0;
    for (category, counts) in &bins {
        let (shape, colour) = look(*category);
        let y = flow.y;
        let middle = y + ROW / 2.0;
        flow.put(
            figure,
            LEFT + 4.0,
            middle,
            Thing::Mark {
                shape,
                size: 7.0,
                colour,
            },
        );
        let name = setter.line(words.category(*category), label);
        flow.put(
            figure,
            LEFT + 16.0,
            middle - name.height / 2.0,
            Thing::Text(name),
        );
        let floor = Thing::Box {
            width: COUNTS - BARS,
            height: 0.4,
            colour: [0xd9, 0xde, 0xe4],
        };
        flow.put(figure, BARS, y + ROW - 3.0, floor);
        let mut x = BARS;
        for count in counts {
            if *count > 0 {
                // The root keeps the few visible beside the many.
                let tall = (number(*count) / most).sqrt() * (ROW - 6.0);
                let bar = Thing::Box {
                    width: wide - 1.4,
                    height: tall.max(1.2),
                    colour,
                };
                flow.put(figure, x + 0.7, y + ROW - 3.0 - tall.max(1.2), bar);
            }
            x += wide;
        }
        let total: u32 = counts.iter().sum();
        let total = setter.line(&words.number(total.into()), label);
        let x = RIGHT - total.width;
        flow.put(figure, x, middle - total.height / 2.0, Thing::Text(total));
        flow.y += ROW;
    }
    let axis = style(7.5, [0x6b, 0x76, 0x85]);
    let day = |at: &DateTime<Utc>| words.short_date(at.with_timezone(&zone).date_naive());
    let (from, to) = (
        setter.line(&day(first), axis),
        setter.line(&day(last), axis),
    );
    let y = flow.y + 1.0;
    let right = COUNTS - to.width;
    let is_one_day = day(first) == day(last);
    flow.put(figure, BARS, y, Thing::Text(from));
    if !is_one_day {
        flow.put(figure, right, y, Thing::Text(to));
    }
    flow.y += 16.0;
}

fn style(size: f32, colour: Colour) -> Style {
    Style {
        size,
        is_bold: false,
        colour,
    }
}

fn number(count: u32) -> f32 {
    f32::from(u16::try_from(count).unwrap_or(u16::MAX))
}
