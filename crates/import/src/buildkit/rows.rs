//! Rows of BuildKit's cache metadata, as they are on disk and as a record.
//!
//! A row is a bucket of keys, each with JSON: `{"value": …, "index": "…"}`. With an index, the row is found by it. Keys
//! that hold no bytes at all were taken back.

use std::collections::BTreeMap;

use plies_bolt::{Bolt, BoltError, Item};
use plies_cache::RecordType;
use plies_oci::{BlobDigest, ChainId, DiffId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A row as it is on disk: JSON by key.
pub(crate) type RawRow = BTreeMap<String, Vec<u8>>;

/// All rows by ID.
pub(crate) type RawRows = BTreeMap<String, RawRow>;

/// What a key holds.
#[derive(Debug, Serialize, Deserialize)]
struct Entry<T> {
    value: T,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    index: String,
}

/// Reads what can be read of a metadata file. What went wrong comes beside it.
pub(crate) fn read(bolt: &Bolt) -> (RawRows, Option<BoltError>) {
    let mut rows = RawRows::new();
    let mut look = || -> Result<(), BoltError> {
        let Some(main) = bolt.root().bucket(&[b"_main"])? else { return Ok(()) };
        main.each(|id, item| {
            let Some(bucket) = item.bucket() else { return Ok(()) };
            let mut row = RawRow::new();
            let read = bucket.each(|key, item| {
                if let Item::Value(value) = item {
                    row.insert(String::from_utf8_lossy(key).into_owned(), value);
                }
                Ok::<_, BoltError>(())
            });
            rows.insert(String::from_utf8_lossy(id).into_owned(), row);
            read
        })
    };
    let failed = look().err();
    (rows, failed)
}

/// A key's value, as it is written.
pub(crate) fn put<T: Serialize>(row: &mut RawRow, key: &str, value: T, index: Option<String>) {
    let entry = Entry { value, index: index.unwrap_or_default() };
    let json = serde_json::to_vec(&entry).expect("because text and numbers are always JSON");
    row.insert(key.to_owned(), json);
}

/// A key's value; `None` if the row has it not.
///
/// # Errors
/// The key, and what is wrong with it.
pub(crate) fn get<T: DeserializeOwned>(row: &RawRow, key: &str) -> Result<Option<T>, String> {
    match row.get(key).map(Vec::as_slice) {
        None | Some([]) => Ok(None),
        // Nothing at all is as good as no key, to Go's library.
        Some(json) => match serde_json::from_slice::<Entry<Option<T>>>(json) {
            Ok(entry) => Ok(entry.value),
            Err(error) => Err(format!("its key {key} cannot be read: {error}")),
        },
    }
}

/// A record as BuildKit keeps it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub(crate) committed: bool,
    pub(crate) deleted: bool,
    pub(crate) parent: Option<String>,
    pub(crate) merge_parents: Vec<String>,
    pub(crate) lower: Option<String>,
    pub(crate) upper: Option<String>,
    /// The mutable record whose files it shares.
    pub(crate) equal_mutable: Option<String>,
    pub(crate) retain: bool,
    pub(crate) description: String,
    pub(crate) record_type: RecordType,
    /// In nanoseconds since 1970.
    pub(crate) created_at: u64,
    /// In nanoseconds since 1970.
    pub(crate) last_used_at: Option<u64>,
    pub(crate) usage_count: u64,
    pub(crate) diff_id: Option<DiffId>,
    pub(crate) chain_id: Option<ChainId>,
    pub(crate) blob_chain_id: Option<BlobDigest>,
    pub(crate) blob: Option<BlobDigest>,
    pub(crate) blob_bytes: u64,
    pub(crate) media_type: String,
    pub(crate) urls: Vec<String>,
    /// The key of its snapshot; its own ID if it is not said.
    pub(crate) snapshot: Option<String>,
    pub(crate) image_refs: Vec<String>,
    /// Bytes on disk, if they were ever counted.
    pub(crate) size_bytes: Option<u64>,
    /// What is under other keys: value and index.
    pub(crate) others: Vec<(String, String, Option<String>)>,
}

/// Keys that [`Row`] has a field for, or that mean nothing outside of BuildKit.
const KNOWN: [&str; 25] = [
    "snapshot.size",
    "snapshot.committed",
    "cache.deleted",
    "cache.parent",
    "cache.mergeParents",
    "cache.lowerDiffParent",
    "cache.upperDiffParent",
    "cache.equalMutable",
    "cache.cachePolicy",
    "cache.description",
    "cache.recordType",
    "cache.createdAt",
    "cache.lastUsedAt",
    "cache.usageCount",
    "cache.diffID",
    "cache.chainID",
    "cache.blobChainID",
    "cache.blob",
    "cache.blobsize",
    "cache.mediatype",
    "cache.layer.urls",
    "cache.snapshot",
    // Whether there is a snapshot tells, which may have come since.
    "cache.blobonly",
    "cache.imageRefs",
    // Of version 1, which the migration takes apart.
    "blobmapping.blob",
];

/// The value of `cache.cachePolicy` that keeps a mutable record.
const RETAIN: i64 = 1;

impl Row {
    /// Reads a row of version 2.
    ///
    /// # Errors
    /// The key that cannot be read, and what is wrong with it.
    pub(crate) fn parse(raw: &RawRow) -> Result<Self, String> {
        let text = |key: &str| get::<String>(raw, key).map(|text| text.filter(|text| !text.is_empty()));
        let record_type = text("cache.recordType")?.and_then(|name| {
            RecordType::NAMES.into_iter().find(|(_, known)| *known == name).map(|(record_type, _)| record_type)
        });
        let number =
            |key: &str| get::<i64>(raw, key).map(|number| number.and_then(|number| u64::try_from(number).ok()));
        let digest = |key: &str| -> Result<Option<String>, String> { text(key) };
        Ok(Self {
            committed: get(raw, "snapshot.committed")?.unwrap_or(false),
            deleted: get(raw, "cache.deleted")?.unwrap_or(false),
            parent: text("cache.parent")?,
            merge_parents: get(raw, "cache.mergeParents")?.unwrap_or_default(),
            lower: text("cache.lowerDiffParent")?,
            upper: text("cache.upperDiffParent")?,
            equal_mutable: text("cache.equalMutable")?,
            retain: get::<i64>(raw, "cache.cachePolicy")? == Some(RETAIN),
            description: text("cache.description")?.unwrap_or_default(),
            record_type: record_type.unwrap_or_default(),
            created_at: number("cache.createdAt")?.unwrap_or(0),
            last_used_at: number("cache.lastUsedAt")?,
            usage_count: number("cache.usageCount")?.unwrap_or(0),
            diff_id: parsed("cache.diffID", digest("cache.diffID")?)?,
            chain_id: parsed("cache.chainID", digest("cache.chainID")?)?,
            blob_chain_id: parsed("cache.blobChainID", digest("cache.blobChainID")?)?,
            blob: parsed("cache.blob", digest("cache.blob")?)?,
            blob_bytes: number("cache.blobsize")?.unwrap_or(0),
            media_type: text("cache.mediatype")?.unwrap_or_default(),
            urls: get(raw, "cache.layer.urls")?.unwrap_or_default(),
            snapshot: text("cache.snapshot")?,
            image_refs: get(raw, "cache.imageRefs")?.unwrap_or_default(),
            size_bytes: number("snapshot.size")?,
            others: others(raw),
        })
    }

    /// The rows that it stands on, each once for every mention.
    pub(crate) fn parents(&self) -> impl Iterator<Item = &String> {
        self.parent.iter().chain(&self.merge_parents).chain(&self.lower).chain(&self.upper)
    }
}

fn parsed<T: std::str::FromStr>(key: &str, text: Option<String>) -> Result<Option<T>, String>
where
    T::Err: std::fmt::Display,
{
    let parse = |text: String| text.parse().map_err(|error| format!("its key {key} is {text:?}: {error}"));
    text.map(parse).transpose()
}

/// What other parts of BuildKit keep with a record. What is no text stays JSON; a text that says nothing (`cache.layerType`
/// of nearly all records) is left out.
fn others(raw: &RawRow) -> Vec<(String, String, Option<String>)> {
    let other = |(key, json): (&String, &Vec<u8>)| {
        let entry: Entry<Box<RawValue>> = serde_json::from_slice(json).ok()?;
        let json = entry.value.get();
        let value = serde_json::from_str(json).unwrap_or_else(|_| json.to_owned());
        (!value.is_empty() || !entry.index.is_empty()).then_some(())?;
        Some((key.clone(), value, (!entry.index.is_empty()).then_some(entry.index)))
    };
    raw.iter().filter(|(key, _)| !KNOWN.contains(&key.as_str())).filter_map(other).collect()
}
