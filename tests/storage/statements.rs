//! Every statement that an engine runs, read from its source: so no list of them can fall behind.
//!
//! A statement is a text that is handed to `sqlx::query…`, or one that begins with a verb of SQL,
//! such as a constant. `concat!` and the macros of columns are resolved. A text that ends with a
//! blank is the beginning of one that a `QueryBuilder` puts together: those are run by the suite.

use std::collections::HashMap;
use std::path::Path;

use crate::support::database::Engine;

const VERBS: [&str; 11] = [
    "select",
    "insert",
    "update",
    "delete",
    "with",
    "begin",
    "commit",
    "rollback",
    "savepoint",
    "release",
    "pragma",
];

/// A statement of an engine.
#[derive(Debug)]
pub(crate) struct Statement {
    /// File and function, such as `events::find_by_id`.
    pub(crate) name: String,
    pub(crate) sql: String,
}

/// All statements of `engine`, in the order of the source.
pub(crate) fn of(engine: Engine) -> Vec<Statement> {
    let folder = match engine {
        Engine::Sqlite => "src/storage/sqlite",
        Engine::Postgres => "src/storage/postgres",
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let sources: Vec<(String, Vec<Token>)> = files
        .iter()
        .map(|path| {
            let file = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (file, tokens(&std::fs::read_to_string(path).unwrap()))
        })
        .collect();
    let mut macros = HashMap::new();
    for (_, source) in &sources {
        collect_macros(source, &mut macros);
    }
    let mut found = Vec::new();
    for (file, source) in &sources {
        let mut reader = Reader {
            file,
            source,
            macros: &macros,
            next: 0,
        };
        reader.read(&mut found);
    }
    found
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Sign(char),
}

fn tokens(source: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = source.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '/' if rest.peek() == Some(&'/') => {
                rest.by_ref().find(|c| *c == '\n');
            }
            '"' => tokens.push(Token::Text(text(&mut rest))),
            '\'' => {
                // A character, which may be a quotation mark, or a lifetime.
                let mut ahead = rest.clone();
                let escaped = ahead.next() == Some('\\');
                if escaped {
                    ahead.next();
                }
                if ahead.next() == Some('\'') {
                    rest = ahead;
                }
            }
            c if c.is_alphanumeric() || c == '_' => {
                let mut word = String::from(c);
                while let Some(c) = rest.next_if(|c| c.is_alphanumeric() || *c == '_') {
                    word.push(c);
                }
                tokens.push(Token::Word(word));
            }
            c if c.is_whitespace() => {}
            c => tokens.push(Token::Sign(c)),
        }
    }
    tokens
}

/// The value of a text whose opening mark has been read.
fn text(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> String {
    let mut text = String::new();
    while let Some(c) = rest.next() {
        match c {
            '"' => return text,
            '\\' => match rest.next().unwrap() {
                '\n' => while rest.next_if(|c| c.is_whitespace()).is_some() {},
                c => text.push(c),
            },
            c => text.push(c),
        }
    }
    panic!("a text has no end: {text}");
}

/// The macros that stand for one text, by name.
fn collect_macros(source: &[Token], macros: &mut HashMap<String, String>) {
    for (index, window) in source.windows(3).enumerate() {
        if let [Token::Word(rules), Token::Sign('!'), Token::Word(name)] = window
            && rules == "macro_rules"
        {
            let text = source[index..].iter().find_map(|token| match token {
                Token::Text(text) => Some(text.clone()),
                _ => None,
            });
            macros.insert(name.clone(), text.unwrap());
        }
    }
}

struct Reader<'a> {
    file: &'a str,
    source: &'a [Token],
    macros: &'a HashMap<String, String>,
    next: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self) -> Option<&'a Token> {
        self.next += 1;
        self.source.get(self.next - 1)
    }

    fn read(&mut self, found: &mut Vec<Statement>) {
        let mut function = String::new();
        let mut is_query = false;
        while let Some(token) = self.take().cloned() {
            let begins_query = match &token {
                Token::Word(word) if word == "macro_rules" => {
                    self.skip_body();
                    false
                }
                Token::Word(word) if word == "tests" => return,
                Token::Word(word) if word == "fn" => {
                    if let Some(Token::Word(name)) = self.take() {
                        function.clone_from(name);
                    }
                    false
                }
                Token::Word(word) if word.starts_with("query") => true,
                // Between the function and its text.
                Token::Sign('(') => is_query,
                Token::Word(word) if word == "concat" => {
                    let sql = self.concatenated();
                    self.add(&function, sql, is_query, found);
                    false
                }
                Token::Text(sql) => {
                    self.add(&function, sql.clone(), is_query, found);
                    false
                }
                _ => false,
            };
            is_query = begins_query;
        }
    }

    fn add(&self, function: &str, sql: String, is_query: bool, found: &mut Vec<Statement>) {
        let begins = VERBS.contains(&sql.split_whitespace().next().unwrap_or_default());
        // More than one word, or the only word of a query.
        let is_statement = is_query || (begins && sql.trim().contains(char::is_whitespace));
        if is_statement && !sql.ends_with(' ') {
            let name = format!("{}::{function}", self.file);
            found.push(Statement { name, sql });
        }
    }

    /// The value of a `concat!` whose name has been read.
    fn concatenated(&mut self) -> String {
        let mut sql = String::new();
        let mut depth = 0;
        while let Some(token) = self.take() {
            match token {
                Token::Sign('(') => depth += 1,
                Token::Sign(')') => {
                    depth -= 1;
                    if depth == 0 {
                        break;
                    }
                }
                Token::Text(text) => sql.push_str(text),
                Token::Word(name) => sql.push_str(
                    (self.macros.get(name))
                        .unwrap_or_else(|| panic!("{}: no macro {name}", self.file)),
                ),
                Token::Sign(_) => {}
            }
        }
        sql
    }

    fn skip_body(&mut self) {
        let mut depth = 0;
        while let Some(token) = self.take() {
            match token {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => {
                    depth -= 1;
                    if depth == 0 {
                        return;
                    }
                }
                _ => {}
            }
        }
    }
}
