//! The content of a document: the cover with the chart, then day by day what happened.

use chrono::{DateTime, NaiveDate, Timelike, Utc};
use serde_json::Value;

use super::chart::{self, Moments};
use super::flow::{Flow, HEIGHT, LEFT, NodeId, Placed, RIGHT, Role, Shape, Stop, Thing};
use super::text::{Colour, Setter, Style};
use crate::domain::{ContactEvent, Priority};
use crate::export::csv::Column;
use crate::export::words::Words;
use crate::storage::Export;

const INK: Colour = [0x1c, 0x22, 0x2b];
const SOFT: Colour = [0x5b, 0x65, 0x73];
const TIME: f32 = LEFT;
const MARK: f32 = LEFT + 62.0;
const TEXT: f32 = LEFT + 78.0;
const VALUES: f32 = TEXT + 118.0;

/// What is said of a volume beside its events.
pub(super) struct Volume {
    /// From 1; None, where the document is the only one.
    pub(super) number: Option<u64>,
    /// How many events came before it.
    pub(super) before: u64,
    /// How many there are of how many, where not all fit.
    pub(super) left_out: Option<(u64, u64)>,
}

/// A volume that is being filled.
pub(super) struct Timeline {
    pub(super) flow: Flow,
    pub(super) events: u64,
    cover: NodeId,
    list: NodeId,
    day: Option<(NaiveDate, NodeId)>,
    moments: Moments,
}

/// What is the same for all volumes of an export.
pub(super) struct Manner<'a> {
    pub(super) export: &'a Export,
    pub(super) words: &'a Words,
    pub(super) accent: Colour,
    pub(super) footer: &'a str,
    pub(super) redacted: &'a [Column],
}

fn style(size: f32, colour: Colour) -> Style {
    Style {
        size,
        is_bold: false,
        colour,
    }
}

fn bold(size: f32, colour: Colour) -> Style {
    Style {
        size,
        is_bold: true,
        colour,
    }
}

impl Timeline {
    pub(super) fn new() -> Self {
        let mut flow = Flow::new();
        let cover = flow.node(0, Role::Section);
        let list = flow.node(0, Role::Section);
        Self {
            flow,
            events: 0,
            cover,
            list,
            day: None,
            moments: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, setter: &mut Setter, manner: &Manner<'_>, event: &ContactEvent) {
        let words = manner.words;
        let local = event
            .occurred_at
            .with_timezone(&manner.export.request.timezone);
        let list = self.list_of(setter, manner, local.date_naive());
        self.events += 1;
        self.moments.push((event.occurred_at, event.category));
        let flow = &mut self.flow;
        flow.need(46.0);
        let item = flow.node(list, Role::Item);
        let body = flow.node(item, Role::Body);
        let paragraph = flow.node(body, Role::Paragraph);
        let top = flow.y;
        let clock = format!(
            "{:02}:{:02}:{:02}",
            local.hour(),
            local.minute(),
            local.second()
        );
        let clock = setter.line(&clock, style(9.0, SOFT));
        let (shape, colour) = chart::look(event.category);
        let mark = Thing::Mark {
            shape,
            size: 8.0,
            colour,
        };
        flow.put(None, MARK, top + 7.0, mark);
        flow.put(Some(paragraph), TIME, top + 0.5, Thing::Text(clock));
        priority(flow, setter, words, event.priority, paragraph, top + 14.5);
        let is_hidden = |column| manner.redacted.contains(&column);
        let title = match &event.title {
            _ if is_hidden(Column::Title) => words.redacted.clone(),
            Some(title) if !title.trim().is_empty() => title.clone(),
            _ => event.event_type.as_str().replace(['_', '.'], " "),
        };
        let lines = setter.set(&title, bold(10.0, INK), RIGHT - TEXT);
        flow.lines(Some(paragraph), TEXT, lines);
        let mut facts = vec![
            words.category(event.category).to_owned(),
            event.event_type.to_string(),
        ];
        let source = match &event.integration_source {
            Some(_) if is_hidden(Column::IntegrationSource) => words.redacted.clone(),
            Some(product) => product.clone(),
            None => event.source.to_string(),
        };
        facts.push(source);
        let audience = manner.export.request.audience;
        if let Some(agent) = event
            .triggered_by
            .filter(|_| Column::TriggeredBy.is_for(audience))
        {
            let agent = if is_hidden(Column::TriggeredBy) {
                words.redacted.clone()
            } else {
                agent.to_string()
            };
            facts.push(format!("{} {agent}", words.by));
        }
        let lines = setter.set(&facts.join("  ·  "), style(8.0, SOFT), RIGHT - TEXT);
        flow.lines(Some(paragraph), TEXT, lines);
        if let Some(text) = event.description.as_deref().filter(|text| !text.is_empty()) {
            let text = if is_hidden(Column::Description) {
                &words.redacted
            } else {
                text
            };
            flow.y += 2.5;
            let paragraph = flow.node(body, Role::Paragraph);
            let lines = setter.set(text, style(9.0, [0x33, 0x3c, 0x49]), RIGHT - TEXT);
            flow.lines(Some(paragraph), TEXT, lines);
        }
        if is_hidden(Column::Payload) {
            flow.y += 2.5;
            let paragraph = flow.node(body, Role::Paragraph);
            let lines = setter.set(&words.redacted, style(8.5, SOFT), RIGHT - TEXT);
            flow.lines(Some(paragraph), TEXT, lines);
        } else {
            let payload = serde_json::from_str(event.payload.as_str()).unwrap_or(Value::Null);
            table(flow, setter, body, &payload);
        }
        flow.y += 11.0;
    }

    /// The list of a day's events; a heading, where the day begins.
    fn list_of(&mut self, setter: &mut Setter, manner: &Manner<'_>, day: NaiveDate) -> NodeId {
        if let Some((_, list)) = self.day.filter(|(of, _)| *of == day) {
            return list;
        }
        let (flow, words) = (&mut self.flow, manner.words);
        flow.repeated = None;
        let name = words.date(day);
        let heading = setter.line(&name, bold(12.5, manner.accent));
        flow.need(heading.height + 80.0);
        if flow.y > 70.0 {
            flow.y += 10.0;
        }
        let section = flow.node(self.list, Role::Section);
        let node = flow.node(section, Role::Heading(2, name.clone()));
        let height = heading.height;
        flow.stops.push(Stop {
            month: format!("{} {}", capital(words.month_name(day)), day.format("%Y")),
            day: name.clone(),
            page: flow.page(),
            y: flow.y - 8.0,
        });
        flow.put(Some(node), LEFT, flow.y, Thing::Text(heading));
        flow.rule(flow.y + height + 3.0);
        flow.y += height + 14.0;
        let again = format!("{name}  ·  {}", words.continued);
        flow.repeated = Some(setter.line(&again, style(9.5, SOFT)));
        let list = flow.node(section, Role::List);
        self.day = Some((day, list));
        list
    }

    /// All is there: the cover goes in front, and each page gets its foot.
    pub(super) fn close(
        mut self,
        setter: &mut Setter,
        manner: &Manner<'_>,
        volume: &Volume,
    ) -> Flow {
        self.flow.repeated = None;
        if self.events > 0 {
            self.report_missing(setter, manner.words);
        }
        let pages = std::mem::replace(&mut self.flow.pages, vec![Vec::new()]);
        self.flow.y = 60.0;
        self.cover(setter, manner, volume);
        if self.events == 0 {
            let node = self.flow.node(self.list, Role::Paragraph);
            let lines = setter.set(&manner.words.nothing, style(11.0, INK), RIGHT - LEFT);
            self.flow.lines(Some(node), LEFT, lines);
            self.report_missing(setter, manner.words);
        } else {
            let covers = self.flow.pages.len();
            for stop in &mut self.flow.stops {
                stop.page += covers;
            }
            self.flow.pages.extend(pages);
        }
        feet(&mut self.flow, setter, manner, volume);
        self.flow
    }

    fn cover(&mut self, setter: &mut Setter, manner: &Manner<'_>, volume: &Volume) {
        let words = manner.words;
        let flow = &mut self.flow;
        let band = Thing::Box {
            width: 44.0,
            height: 4.0,
            colour: manner.accent,
        };
        flow.put(None, LEFT, 64.0, band);
        flow.y = 78.0;
        let heading = flow.node(self.cover, Role::Heading(1, words.title.clone()));
        let lines = setter.set(&words.title, bold(26.0, INK), RIGHT - LEFT);
        flow.lines(Some(heading), LEFT, lines);
        if let Some(number) = volume.number {
            let paragraph = flow.node(self.cover, Role::Paragraph);
            let text = format!(
                "{} {number}  ·  {} {}–{}",
                words.volume,
                words.events.to_lowercase(),
                words.number(volume.before + 1),
                words.number(volume.before + self.events)
            );
            let lines = setter.set(&text, style(12.0, SOFT), RIGHT - LEFT);
            flow.lines(Some(paragraph), LEFT, lines);
        }
        flow.y += 16.0;
        let table = flow.node(self.cover, Role::Table);
        for (name, value) in facts(manner, self.events) {
            let row = flow.node(table, Role::Row);
            let (head, cell) = (flow.node(row, Role::HeaderCell), flow.node(row, Role::Cell));
            let name = setter.set(&name, style(9.5, SOFT), 112.0);
            let value = setter.set(&value, style(9.5, INK), RIGHT - LEFT - 124.0);
            flow.row((head, LEFT, name), (cell, LEFT + 124.0, value));
            flow.y += 4.0;
        }
        if let Some((held, total)) = volume.left_out {
            flow.y += 8.0;
            let node = flow.node(self.cover, Role::Paragraph);
            let lines = setter.set(&words.left_out(held, total), bold(10.0, INK), RIGHT - LEFT);
            flow.lines(Some(node), LEFT, lines);
        }
        flow.y += 22.0;
        if self.events > 0 {
            flow.need(chart::height(&self.moments) + 30.0);
            let heading = flow.node(self.cover, Role::Heading(2, words.activity.clone()));
            let lines = setter.set(&words.activity, bold(12.5, manner.accent), RIGHT - LEFT);
            flow.lines(Some(heading), LEFT, lines);
            flow.rule(flow.y + 3.0);
            flow.y += 12.0;
            let zone = manner.export.request.timezone;
            chart::draw(flow, setter, words, zone, &self.moments, self.cover);
        }
    }

    fn report_missing(&mut self, setter: &mut Setter, words: &Words) {
        let missing = &setter.fonts.missing;
        if missing.is_empty() {
            return;
        }
        let count = missing.values().sum();
        let codes: Vec<String> = missing
            .iter()
            .map(|(character, count)| format!("U+{:04X} ×{count}", u32::from(*character)))
            .collect();
        let text = format!("{} {}", words.missing(count), codes.join(", "));
        self.flow.need(40.0);
        self.flow.y += 8.0;
        self.flow.rule(self.flow.y);
        self.flow.y += 8.0;
        let node = self.flow.node(self.list, Role::Paragraph);
        let lines = setter.set(&text, style(8.5, SOFT), RIGHT - LEFT);
        self.flow.lines(Some(node), LEFT, lines);
    }
}

/// Said by a shape and a word; what is normal needs no mark.
fn priority(
    flow: &mut Flow,
    setter: &mut Setter,
    words: &Words,
    priority: Priority,
    node: NodeId,
    y: f32,
) {
    let (shape, colour) = match priority {
        Priority::Normal => return,
        Priority::Low => (Shape::Down, [0x6b, 0x76, 0x85]),
        Priority::High => (Shape::Up, [0xa3, 0x5a, 0x00]),
        Priority::Urgent => (Shape::Diamond, [0xb0, 0x1e, 0x2e]),
    };
    let word = setter.line(words.priority(priority), bold(7.5, colour));
    let middle = y + word.height / 2.0;
    let mark = Thing::Mark {
        shape,
        size: 5.5,
        colour,
    };
    flow.put(None, TIME + 3.0, middle, mark);
    flow.put(Some(node), TIME + 9.5, y, Thing::Text(word));
}

/// A payload's fields, one a row; what lies deeper has its path as its name.
fn table(flow: &mut Flow, setter: &mut Setter, body: NodeId, payload: &Value) {
    let mut fields = Vec::new();
    flatten("", payload, &mut fields);
    if fields.is_empty() {
        return;
    }
    flow.y += 4.0;
    let table = flow.node(body, Role::Table);
    for (name, value) in fields {
        let row = flow.node(table, Role::Row);
        let (head, cell) = (flow.node(row, Role::HeaderCell), flow.node(row, Role::Cell));
        let name = setter.set(&name, style(8.0, SOFT), VALUES - TEXT - 10.0);
        let value = setter.set(&value, style(8.5, INK), RIGHT - VALUES);
        flow.row((head, TEXT, name), (cell, VALUES, value));
    }
}

fn flatten(path: &str, value: &Value, fields: &mut Vec<(String, String)>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                match value {
                    Value::Object(inner) if !inner.is_empty() => flatten(&path, value, fields),
                    Value::String(text) => fields.push((path, text.clone())),
                    other => fields.push((path, other.to_string())),
                }
            }
        }
        Value::Null => {}
        other => fields.push((path.to_owned(), other.to_string())),
    }
}

fn facts(manner: &Manner<'_>, events: u64) -> Vec<(String, String)> {
    let (words, export) = (manner.words, manner.export);
    let request = &export.request;
    let time = |at: DateTime<Utc>| {
        let at = at.with_timezone(&request.timezone);
        format!(
            "{} {}",
            words.short_date(at.date_naive()),
            at.format("%H:%M")
        )
    };
    let since = request
        .since
        .map_or_else(|| words.from_beginning.clone(), time);
    let until = time(request.until.unwrap_or(export.created_at));
    let (audience, reader) = words.audience(request.audience);
    let mut facts = vec![
        (words.contact.clone(), request.contact_id.to_string()),
        (
            words.period.clone(),
            format!("{since} {} {until}", words.to),
        ),
        (words.time_zone.clone(), request.timezone.name().to_owned()),
        (words.asked_by.clone(), export.requested_by.to_string()),
        (words.asked_at.clone(), time(export.created_at)),
        (audience.to_owned(), reader.to_owned()),
    ];
    if !request.categories.is_empty() {
        let names: Vec<_> = request
            .categories
            .iter()
            .map(|of| words.category(*of))
            .collect();
        facts.push((words.only.clone(), names.join(", ")));
    }
    if !request.redact.is_empty() {
        facts.push((words.redacted_fields.clone(), request.redact.join(", ")));
    }
    facts.push((words.events.clone(), words.number(events)));
    facts
}

/// The page's number, and whose timeline it is.
fn feet(flow: &mut Flow, setter: &mut Setter, manner: &Manner<'_>, volume: &Volume) {
    let words = manner.words;
    let pages = flow.pages.len();
    let mut left = vec![
        words.title.clone(),
        manner.export.request.contact_id.to_string(),
    ];
    if let Some(number) = volume.number {
        left.push(format!("{} {number}", words.volume));
    }
    if !manner.footer.is_empty() {
        left.push(manner.footer.to_owned());
    }
    let left = setter.line(&left.join("  ·  "), style(7.5, SOFT));
    let y = HEIGHT - 44.0;
    for (index, page) in flow.pages.iter_mut().enumerate() {
        let text = format!("{} {} {} {pages}", words.page, index + 1, words.of);
        let right = setter.line(&text, style(7.5, SOFT));
        let x = RIGHT - right.width;
        for (x, line) in [(LEFT, left.clone()), (x, right)] {
            page.push(Placed {
                node: None,
                x,
                y,
                what: Thing::Text(line),
            });
        }
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}
