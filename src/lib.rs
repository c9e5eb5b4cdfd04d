//! `timelined` keeps the activity timeline of every contact of a CRM: it records contact events,
//! delivers the realtime ones to whoever is watching, forgets what has expired, and mails timelines.
//!
//! # The layers
//!
//! Dependencies point down: [`domain`] ← [`storage`] ← [`jobs`], [`live`], [`export`], [`mail`],
//! [`timeline`], [`erasure`] ← [`api`] ← [`daemon`] ← [`lifecycle`] ← [`cli`]. [`config`], [`access`] and
//! [`telemetry`] stand beside them: every layer but the domain may use them, and of the layers they
//! use plain values alone (schedules, retry policies, a run). [`timeline`] and [`erasure`] hold the
//! use cases that HTTP, jobs and the command line share. `tests/layers.rs` holds the code to this map.
//!
//! # Four walks
//!
//! 1. **Create.** [`api`] parses JSON into a [`domain::NewContactEvent`]; its `record` makes it valid
//!    or answers every fault; [`timeline::Timeline::create`] saves it, durable when it returns, and
//!    only then wakes the pump. Truth first, then haste.
//! 2. **Deliver.** Woken by a commit or by the second, [`live::Pump`] reads the outbox's tail and
//!    hands what is watched here to the [`live::Hub`]; each [`live::Session`] sends it;
//!    acknowledgements come back to the [`live::Acknowledger`] and end as set-wise writes.
//! 3. **Purge.** A claimed run of [`jobs::Purge`] asks [`domain::Retention::sweeps`] what is due of
//!    each tenant, deletes in batches whose size follows their time, passes over what a hold keeps, and
//!    leaves its counts in the run's row, and per tenant and rule in the ledger of deletions.
//! 4. **Export.** HTTP, the command line and schedules only add a row; [`export::Exporter`] claims
//!    it, streams the timeline by keyset into a file, and mails that with [`mail::Mailer`].

pub mod access;
pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod domain;
pub mod erasure;
pub mod export;
pub mod jobs;
pub mod lifecycle;
pub mod live;
pub mod mail;
pub mod storage;
pub mod telemetry;
pub mod timeline;
