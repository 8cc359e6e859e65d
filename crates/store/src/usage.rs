//! Disk usage: sums of rows.

/// A kind of thing that takes space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsageKind {
    /// Published blobs.
    Blobs,
    /// Published layers.
    Layers,
    /// Upper directories, as last measured.
    Actives,
    /// Writes not yet visible.
    Ingests,
    /// What was collected and is about to be unlinked.
    Trash,
    /// The database file.
    Catalogue,
}

/// What all things of one kind cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsageRow {
    /// Of which kind.
    pub kind: UsageKind,
    /// How many there are.
    pub count: u64,
    /// Their bytes.
    pub size_bytes: u64,
    /// Their inodes.
    pub inodes: u64,
}
