//! Pages as lists of what is on them, kept until a volume's last page is known: only then can each
//! say "n of m". What is kept is a few bytes a glyph.

use super::text::{Colour, Line};

pub(super) const WIDTH: f32 = 595.0;
pub(super) const HEIGHT: f32 = 842.0;
pub(super) const LEFT: f32 = 56.0;
pub(super) const RIGHT: f32 = WIDTH - 56.0;
const TOP: f32 = 60.0;
const BOTTOM: f32 = HEIGHT - 66.0;

/// A place in the structure of a document.
pub(super) type NodeId = usize;

/// What a part of the document is, for whoever listens to it.
#[derive(Debug, Clone)]
pub(super) enum Role {
    Document,
    Section,
    Heading(u16, String),
    Paragraph,
    List,
    Item,
    Body,
    Table,
    Row,
    HeaderCell,
    Cell,
    Figure(String),
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) role: Role,
    pub(super) children: Vec<NodeId>,
}

/// Marks that tell categories and priorities apart without colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Disc,
    Ring,
    Square,
    Frame,
    Diamond,
    Hollow,
    Up,
    Down,
    Cross,
    Bar,
    Star,
}

/// Something on a page. Without a node it is decoration, such as a rule or a page number.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) node: Option<NodeId>,
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) what: Thing,
}

#[derive(Debug)]
pub(super) enum Thing {
    Text(Line),
    Box {
        width: f32,
        height: f32,
        colour: Colour,
    },
    Mark {
        shape: Shape,
        size: f32,
        colour: Colour,
    },
}

/// An entry of the outline.
#[derive(Debug, Clone)]
pub(super) struct Stop {
    pub(super) month: String,
    pub(super) day: String,
    pub(super) page: usize,
    pub(super) y: f32,
}

/// Fills pages from top to bottom.
pub(super) struct Flow {
    pub(super) pages: Vec<Vec<Placed>>,
    pub(super) nodes: Vec<Node>,
    pub(super) stops: Vec<Stop>,
    pub(super) y: f32,
    /// Stands again at the top of each page that follows.
    pub(super) repeated: Option<Line>,
}

impl Flow {
    pub(super) fn new() -> Self {
        Self {
            pages: vec![Vec::new()],
            nodes: vec![Node {
                role: Role::Document,
                children: Vec::new(),
            }],
            stops: Vec::new(),
            y: TOP,
            repeated: None,
        }
    }

    pub(super) fn node(&mut self, parent: NodeId, role: Role) -> NodeId {
        let id = self.nodes.len();
        self.nodes.push(Node {
            role,
            children: Vec::new(),
        });
        self.nodes[parent].children.push(id);
        id
    }

    /// Goes to the next page unless there is so much space.
    pub(super) fn need(&mut self, height: f32) {
        if self.y + height > BOTTOM {
            self.turn();
        }
    }

    fn turn(&mut self) {
        self.pages.push(Vec::new());
        self.y = TOP;
        if let Some(line) = self.repeated.clone() {
            let height = line.height;
            self.put(None, LEFT, self.y, Thing::Text(line));
            self.rule(self.y + height + 3.0);
            self.y += height + 14.0;
        }
    }

    /// A hairline across the page.
    pub(super) fn rule(&mut self, y: f32) {
        let what = Thing::Box {
            width: RIGHT - LEFT,
            height: 0.5,
            colour: [0xd9, 0xde, 0xe4],
        };
        self.put(None, LEFT, y, what);
    }

    pub(super) fn put(&mut self, node: Option<NodeId>, x: f32, y: f32, what: Thing) {
        let page = self.pages.last_mut().expect("there is a first page");
        page.push(Placed { node, x, y, what });
    }

    /// Lines one under the other, over as many pages as they take.
    pub(super) fn lines(&mut self, node: Option<NodeId>, x: f32, lines: Vec<Line>) {
        for line in lines {
            self.need(line.height);
            let height = line.height;
            self.put(node, x, self.y, Thing::Text(line));
            self.y += height;
        }
    }

    /// Two columns of lines, side by side.
    pub(super) fn row(&mut self, left: (NodeId, f32, Vec<Line>), right: (NodeId, f32, Vec<Line>)) {
        let (mut first, mut second) = (left.2.into_iter(), right.2.into_iter());
        loop {
            let (a, b) = (first.next(), second.next());
            let height = [&a, &b].into_iter().flatten().map(|line| line.height);
            let height = height.fold(0.0, f32::max);
            if a.is_none() && b.is_none() {
                break;
            }
            self.need(height);
            let y = self.y;
            if let Some(line) = a {
                self.put(Some(left.0), left.1, y, Thing::Text(line));
            }
            if let Some(line) = b {
                self.put(Some(right.0), right.1, y, Thing::Text(line));
            }
            self.y += height;
        }
    }

    pub(super) fn page(&self) -> usize {
        self.pages.len() - 1
    }
}
