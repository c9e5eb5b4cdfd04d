//! The migrations, embedded in the binary. They only move forward, and the two folders have the
//! same file names (a test compares them with this list).

use std::borrow::Cow;

use sqlx::SqlSafeStr;
use sqlx::migrate::{Migrate, Migration, MigrationType, Migrator};

use super::{StorageError, StorageResult};

macro_rules! migrations {
    ($engine:literal) => {
        &[
            (
                1,
                "events",
                include_str!(concat!("../../migrations/", $engine, "/0001_events.sql")),
            ),
            (
                2,
                "jobs",
                include_str!(concat!("../../migrations/", $engine, "/0002_jobs.sql")),
            ),
            (
                3,
                "exports",
                include_str!(concat!("../../migrations/", $engine, "/0003_exports.sql")),
            ),
            (
                4,
                "leases",
                include_str!(concat!("../../migrations/", $engine, "/0004_leases.sql")),
            ),
            (
                5,
                "retention",
                include_str!(concat!("../../migrations/", $engine, "/0005_retention.sql")),
            ),
            (
                6,
                "alerts",
                include_str!(concat!("../../migrations/", $engine, "/0006_alerts.sql")),
            ),
            (
                7,
                "erasures",
                include_str!(concat!("../../migrations/", $engine, "/0007_erasures.sql")),
            ),
            (
                8,
                "links",
                include_str!(concat!("../../migrations/", $engine, "/0008_links.sql")),
            ),
        ]
    };
}

type Embedded = &'static [(i64, &'static str, &'static str)];

pub(super) const SQLITE: Embedded = migrations!("sqlite");
pub(super) const POSTGRES: Embedded = migrations!("postgres");

pub(super) fn migrator(embedded: Embedded) -> Migrator {
    let migrations = embedded
        .iter()
        .map(|&(version, name, sql)| {
            let sql = sql.into_sql_str();
            Migration::new(
                version,
                Cow::Borrowed(name),
                MigrationType::Simple,
                sql,
                false,
            )
        })
        .collect();
    Migrator {
        migrations: Cow::Owned(migrations),
        ..Migrator::DEFAULT
    }
}

/// Compares what was applied with what this binary brings.
pub(super) async fn check<C: Migrate>(connection: &mut C, embedded: Embedded) -> StorageResult<()> {
    let wrong = |text: String| Err(StorageError::Migration(text));
    let applied = match connection.list_applied_migrations("_sqlx_migrations").await {
        Ok(applied) => applied,
        // The table of migrations does not exist: nothing was ever applied.
        Err(_missing) => return wrong("it is empty; run `timelined migrate`".to_owned()),
    };
    for &(version, name, _) in embedded {
        if !applied.iter().any(|migration| migration.version == version) {
            return wrong(format!(
                "migration {version} ({name}) is missing; run `timelined migrate`"
            ));
        }
    }
    match applied
        .iter()
        .find(|a| !embedded.iter().any(|&(version, ..)| version == a.version))
    {
        Some(newer) => wrong(format!(
            "migration {} is newer than this binary; install the newer one",
            newer.version
        )),
        None => Ok(()),
    }
}

impl From<sqlx::migrate::MigrateError> for StorageError {
    fn from(error: sqlx::migrate::MigrateError) -> Self {
        use sqlx::migrate::MigrateError;
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                let error = Self::from(error);
                match error {
                    Self::Database(source) => Self::Migration(source.to_string()),
                    other => other,
                }
            }
            MigrateError::VersionMissing(version) => Self::Migration(format!(
                "migration {version} is newer than this binary; install the newer one"
            )),
            other => Self::Migration(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_folders_hold_exactly_the_embedded_migrations() {
        for (folder, embedded) in [("sqlite", SQLITE), ("postgres", POSTGRES)] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("migrations")
                .join(folder);
            let mut files: Vec<_> = std::fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            files.sort();
            let names: Vec<_> = embedded
                .iter()
                .map(|(version, name, _)| format!("{version:04}_{name}.sql"))
                .collect();
            assert_eq!(files, names, "{folder}");
        }
    }
}
