//! The build cache: records and refs, merge and diff, lazy blobs, content hashes, solver keys, usage and prune.
//!
//! A *record* is a tree that somebody may want again: what it stands on (its parents) and what it adds to that. Whoever
//! uses one holds a *ref*. Records are rows of the store's catalogue; only refs are kept in memory.
//!
//! ```text
//! manager.rs    Manager, and the roles Accessor and Controller: get, create, get_mutable, get_by_blob
//! refs.rs       ImmutableRef, MutableRef: commit, finalize, mount, release
//! compose.rs    merge and diff; extract: a record's tree as a snapshot
//! lazy.rs       who fetches blobs that are not here; once each
//! blobs.rs      a record's layers as blobs, in the compression that is asked for
//! contenthash/  digests of what is at a path of a tree            checksum.rs  the same, kept with a record
//! usage.rs      disk usage       prune.rs  what goes, and why     filter.rs  BuildKit's filters
//! solver.rs     results and links of steps' keys                  key.rs     how keys are added up
//! metadata.rs   what others keep with a record                    uses.rs    last uses, gathered
//! record.rs     the rows, and all that changes together           live.rs    who holds what
//! adopt.rs      records and keys that another program made
//! ```
//!
//! # Invariants
//! - A row, its indexes, its children's links and its holds in the store change in one transaction.
//! - A record whose ref anybody holds is not removed, nor one that another record stands on.
//! - What a mutable record holds of one session is gone with it, unless it is retained or was finalized.
//! - No lock rule waits: what is locked is an error at once, which names the holder.

mod adopt;
mod blobs;
mod check;
mod checksum;
mod compose;
pub mod contenthash;
mod error;
mod filter;
mod id;
mod key;
mod lazy;
mod live;
mod manager;
mod metadata;
mod prune;
mod record;
mod refs;
mod solver;
mod sync;
mod usage;
mod uses;

pub use adopt::Adopted;
pub use blobs::{CREATED_AT, LayerFormat, REMOTES_MAX, Remote, RemoteOptions, StoreProvider};
pub use check::check;
pub use error::{CacheError, Holder};
pub use filter::{FilterRow, Filters, parse_bytes, parse_duration};
pub use id::RecordId;
pub use key::{CacheKey, KeyBuilder};
pub use lazy::{Provider, Providers, RangeProvider};
pub use manager::{Accessor, Controller, Manager, ManagerOptions, RecordOptions, UNCOMPRESSED};
pub use metadata::{Changes, LAYER_TYPE, Value};
pub use prune::{Cap, Fate, Judged, PruneOptions, PruneReport, PrunedRecord, Reason, SharedChecker, effective_keep};
pub use record::{BlobRow, Parents, RecordRow, RecordType, State, UseRow, migrate};
pub use refs::{ImmutableRef, MutableRef};
pub use solver::Link;
pub use usage::{RecordUsage, Usage, UsageOptions, UsageTotals};
