//! Jobs: when they run, how they end, and what is left when the daemon stops.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, and its tasks end with its runtime"
)]

mod support;

/// Makes of each case one test per engine.
macro_rules! on_both_engines {
    ($(async fn $name:ident($db:ident) $body:block)+) => {
        $(async fn $name($db: &crate::support::database::Database) $body)+

        mod sqlite {
            use crate::support::database::{Engine, run};
            $(#[test]
            fn $name() {
                run(Engine::Sqlite, super::$name);
            })+
        }

        mod postgres {
            use crate::support::database::{Engine, run};
            $(#[test]
            fn $name() {
                run(Engine::Postgres, super::$name);
            })+
        }
    };
}

#[path = "jobs/daemon.rs"]
mod daemon;
#[path = "jobs/runner.rs"]
mod runner;
