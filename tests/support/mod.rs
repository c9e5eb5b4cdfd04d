//! What the test binaries share: databases of both engines and builders of events.
#![allow(dead_code, reason = "each test binary uses its own part of it")]
#![allow(
    unreachable_pub,
    reason = "a module of a test binary has no other readers than the binary"
)]

/// Makes of each case one test per engine, each on a fresh database: `sqlite::a_case` and
/// `postgres::a_case`.
#[allow(unused_macros, reason = "some test binaries know one engine only")]
macro_rules! on_both_engines {
    ($($(#[$doc:meta])* async fn $name:ident($db:ident) $body:block)+) => {
        $($(#[$doc])* async fn $name($db: &$crate::support::database::Database) $body)+

        mod sqlite {
            $(#[test]
            fn $name() {
                use $crate::support::database::{Engine, run};
                run(Engine::Sqlite, super::$name);
            })+
        }

        mod postgres {
            $(#[test]
            fn $name() {
                use $crate::support::database::{Engine, run};
                run(Engine::Postgres, super::$name);
            })+
        }
    };
}

pub mod builders;
pub mod daemon;
pub mod database;
pub mod smtp;
pub mod socket;
