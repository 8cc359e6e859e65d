//! Stand-ins until `plies-archive` has them.
#![allow(missing_docs)]

use std::collections::BTreeSet;

use plies_archive::tar::EntryPath;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub size_bytes: u64,
    pub inodes: u64,
    pub content_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirIndex {
    pub implied: BTreeSet<EntryPath>,
}
