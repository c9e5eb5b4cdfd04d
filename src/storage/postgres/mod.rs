//! stub
pub use super::sqlite::SqliteStorage as PgStorage;
