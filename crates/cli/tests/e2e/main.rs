//! The binary as a user meets it, judged by what other tools see.
//!
//! One test program with modules, since linking is what small test programs cost most.

// Clippy's allowance for tests stops at their helpers, and all of this is a test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod add;
mod bad_input;
mod build;
mod cache;
mod check;
mod common;
mod crash;
mod dockerfiles;
mod export;
mod fsck;
mod guard;
mod import;
mod import_containerd;
mod import_containers_storage;
mod import_docker;
mod imported;
mod layers;
mod load;
mod lock;
mod migrate;
mod mounts;
mod oracle;
mod real;
mod refs;
mod registry;
mod save;
mod script;
mod solve;
mod traps;
mod trust;
mod upkeep;
mod usage;
