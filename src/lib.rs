//! `timelined` keeps the activity timeline of every contact of a CRM.
pub mod access;
pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod domain;
pub mod export;
pub mod jobs;
pub mod lifecycle;
pub mod live;
pub mod mail;
pub mod storage;
pub mod telemetry;
pub mod timeline;
