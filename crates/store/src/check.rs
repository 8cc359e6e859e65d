//! Whether the store keeps its invariants: every row has its bytes, every byte its row, every name
//! leads somewhere, every sum is right.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::ops::ControlFlow;
use std::str::FromStr;

use plies_oci::{BlobDigest, ErrorKind, Sha256Hasher};

use crate::catalogue::schema::{
    ACTIVES, BLOBS, EDGES, HOLDS, Kind, LAYERS, LAYERS_BY_CHAIN, LAYERS_BY_DIFF, LEASE_HOLDS, LEASES, LayerKind,
    SNAPSHOTS, SQUASHES, TOTALS, TRASH, TotalRow, exists,
};
use crate::catalogue::{CatalogueError, Rows as _};
use crate::error::{At as _, FileError};
use crate::layers::{LayerError, Sidecar, layer_dir, open_root, read_index};
use crate::refs::{self, Differences};
use crate::{ActiveId, BlobError, LayerId, Resource, Store, tree};

/// How deep to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckOptions {
    /// Also read and hash every blob, and walk every layer to count it again.
    pub read_data: bool,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// A row whose bytes are missing or not what they should be.
    Damaged {
        /// Which.
        resource: Resource,
        /// In which way.
        what: String,
    },
    /// Bytes without a row: harmless, but taking space.
    Unlisted {
        /// Where, below the root.
        path: String,
    },
    /// A row that names something that is not there.
    Dangling {
        /// The table and what names it.
        by: String,
        /// What is named.
        names: Resource,
    },
    /// Two tables that do not say the same.
    Inconsistent {
        /// What.
        what: String,
    },
    /// A resource is counted as held more or less often than it is. If less, a collection may take
    /// what is still held; a full one counts again.
    WrongRefs {
        /// Of what.
        resource: Resource,
        /// As kept.
        kept: u64,
        /// As counted.
        counted: u64,
    },
    /// A sum that is not the sum of its rows.
    WrongTotal {
        /// Of what.
        of: &'static str,
        /// As kept: count, bytes, inodes.
        kept: (u64, u64, u64),
        /// As counted.
        counted: (u64, u64, u64),
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged { resource, what } => write!(f, "{resource} is damaged: {what}"),
            Self::Unlisted { path } => write!(f, "{path} has no row"),
            Self::Dangling { by, names } => write!(f, "{by} names {names}, which is not there"),
            Self::Inconsistent { what } => f.write_str(what),
            Self::WrongRefs { resource, kept, counted } => {
                write!(f, "{resource} is kept as held {kept} times, counted as {counted} times")
            }
            Self::WrongTotal { of, kept, counted } => {
                write!(f, "total of {of} is kept as {kept:?}, counted as {counted:?}")
            }
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Everything that is wrong; empty for a healthy store.
    pub problems: Vec<Problem>,
    /// Rows looked at.
    pub checked_count: u64,
}

/// Why a check could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Rows that could not be read.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Blobs.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

impl CheckError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
            Self::Blob(error) => error.kind(),
        }
    }
}

pub(crate) fn check(store: &Store, options: CheckOptions) -> Result<CheckReport, CheckError> {
    let mut checker = Checker { store, options, report: CheckReport::default(), totals: BTreeMap::new() };
    checker.blobs()?;
    checker.layers()?;
    checker.actives()?;
    checker.names()?;
    checker.refs()?;
    checker.totals()?;
    Ok(checker.report)
}

struct Checker<'a> {
    store: &'a Store,
    options: CheckOptions,
    report: CheckReport,
    totals: BTreeMap<Kind, TotalRow>,
}

impl Checker<'_> {
    fn damaged(&mut self, resource: impl Into<Resource>, what: impl Into<String>) {
        self.report.problems.push(Problem::Damaged { resource: resource.into(), what: what.into() });
    }

    fn count(&mut self, kind: Kind, row: TotalRow) {
        self.report.checked_count += 1;
        self.totals.entry(kind).or_default().add(row);
    }

    /// Names in a directory of the store that `listed` does not know.
    fn unlisted(&mut self, dir: &str, listed: impl Fn(&str) -> bool) -> Result<(), CheckError> {
        let path = self.store.inner.root.join(dir);
        for entry in fs::read_dir(&path).at("read directory", &path)? {
            let name = entry.at("read directory", &path)?.file_name();
            if !name.to_str().is_some_and(&listed) {
                self.report.problems.push(Problem::Unlisted { path: format!("{dir}/{}", name.display()) });
            }
        }
        Ok(())
    }

    fn blobs(&mut self) -> Result<(), CheckError> {
        let rows = self.store.read(|tx| tx.all(&BLOBS))?;
        let mut listed: HashSet<BlobDigest> = HashSet::new();
        for (digest, row) in rows {
            listed.insert(digest);
            self.count(Kind::Blobs, row.total());
            match self.store.content().open(digest) {
                Err(error @ BlobError::Damaged { .. }) => self.damaged(digest, error.to_string()),
                Err(error) => return Err(error.into()),
                Ok(mut blob) => {
                    if self.options.read_data {
                        let mut hasher = Sha256Hasher::default();
                        let mut buffer = vec![0; 256 << 10];
                        loop {
                            match blob.read(&mut buffer).at("read", digest.hex())? {
                                0 => break,
                                n => hasher.update(&buffer[..n]),
                            }
                        }
                        let actual = BlobDigest::from_bytes(hasher.finish());
                        if actual != digest {
                            self.damaged(digest, format!("its bytes hash to {actual}"));
                        }
                    }
                }
            }
        }
        let trash = self.trash()?;
        self.unlisted("content/blobs/sha256", |name| {
            BlobDigest::from_hex(name).is_ok_and(|digest| listed.contains(&digest) || trash.contains(&digest.into()))
        })
    }

    fn trash(&mut self) -> Result<HashSet<Resource>, CheckError> {
        Ok(self.store.read(|tx| tx.all(&TRASH))?.into_iter().map(|(resource, _)| resource).collect())
    }

    fn layers(&mut self) -> Result<(), CheckError> {
        let rows = self.store.read(|tx| tx.all(&LAYERS))?;
        let mut listed: HashSet<LayerId> = HashSet::new();
        for (id, row) in rows {
            listed.insert(id);
            self.count(Kind::Layers, row.total());
            self.totals.entry(Kind::Sidecars).or_default().add(row.sidecars());
            match open_root(self.store, id) {
                Err(error @ LayerError::Damaged { .. }) => {
                    self.damaged(id, error.to_string());
                    continue;
                }
                Err(LayerError::File(error)) => return Err(error.into()),
                Err(error) => {
                    self.damaged(id, error.to_string());
                    continue;
                }
                Ok(root) => {
                    if self.options.read_data {
                        let counted = tree::measure(root).at("measure", layer_dir(self.store, id))?;
                        if counted != row.usage.into() {
                            let kept: plies_archive::Usage = row.usage.into();
                            self.damaged(id, format!("its usage is {counted:?}, kept as {kept:?}"));
                        }
                    }
                }
            }
            if let Err(error) = read_index(self.store, id) {
                self.damaged(id, error.to_string());
            }
            // The sidecar may already know a diff ID that a crash kept from the row.
            match Sidecar::read(&layer_dir(self.store, id))? {
                Some(sidecar) if row.diff_id.is_none() || sidecar.row == row => {}
                Some(_) => self.damaged(id, "its sidecar says otherwise"),
                None => self.damaged(id, "its sidecar is missing or damaged"),
            }
            if row.tar_split && !matches!(self.store.layers().tar_split(id), Ok(Some(_))) {
                self.damaged(id, "its tar-split is missing");
            }
            let indexed = self.store.read(|tx| {
                Ok::<_, CatalogueError>(match (row.kind, row.chain_id, row.diff_id) {
                    (LayerKind::Squash(list), ..) => tx.get(&SQUASHES, &list)? == Some(id),
                    (_, Some(chain_id), _) => tx.contains(&LAYERS_BY_CHAIN, &(chain_id, id))?,
                    (_, None, Some(diff_id)) => tx.contains(&LAYERS_BY_DIFF, &(diff_id, id))?,
                    (_, None, None) => true,
                })
            })?;
            if !indexed {
                self.report.problems.push(Problem::Inconsistent { what: format!("layer {id} is not in its index") });
            }
        }
        let trash = self.trash()?;
        self.unlisted("layers", |name| {
            name == "stage"
                || LayerId::from_str(name).is_ok_and(|id| listed.contains(&id) || trash.contains(&id.into()))
        })?;
        let mut indexes = Vec::new();
        self.store.read(|tx| {
            tx.scan(&LAYERS_BY_DIFF, |(diff_id, id), ()| {
                indexes.push((format!("diff id {diff_id}"), id));
                ControlFlow::Continue(())
            })?;
            tx.scan(&LAYERS_BY_CHAIN, |(chain_id, id), ()| {
                indexes.push((format!("chain id {chain_id}"), id));
                ControlFlow::Continue(())
            })?;
            tx.scan(&SQUASHES, |list, id| {
                indexes.push((format!("squash of {list}"), id));
                ControlFlow::Continue(())
            })
        })?;
        for (by, id) in indexes {
            if !listed.contains(&id) {
                self.report.problems.push(Problem::Dangling { by, names: id.into() });
            }
        }
        Ok(())
    }

    fn actives(&mut self) -> Result<(), CheckError> {
        let rows = self.store.read(|tx| tx.all(&ACTIVES))?;
        let mut listed: HashSet<ActiveId> = HashSet::new();
        for (id, row) in rows {
            listed.insert(id);
            self.count(Kind::Actives, row.total());
            // That of a volatile one is made when it is needed, and goes with its process.
            let gone = row.sealed.is_some() || row.volatile;
            let tree = self.store.inner.paths.active.join(id.to_string()).join("fs");
            match fs::symlink_metadata(&tree) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if !gone {
                        self.damaged(id, "its upper directory is missing");
                    }
                }
                Err(error) => return Err(FileError::new("stat", tree, error).into()),
            }
        }
        let trash = self.trash()?;
        self.unlisted("active", |name| {
            ActiveId::from_str(name).is_ok_and(|id| listed.contains(&id) || trash.contains(&id.into()))
        })
    }

    /// Everything that names a resource names one that is there.
    fn names(&mut self) -> Result<(), CheckError> {
        let mut named: Vec<(String, Resource)> = Vec::new();
        let mut inconsistent = Vec::new();
        self.store.read(|tx| {
            tx.scan(&LEASE_HOLDS, |(lease, held), ()| {
                named.push((format!("lease {lease}"), held));
                ControlFlow::Continue(())
            })?;
            tx.scan(&HOLDS, |(owner, held), ()| {
                named.push((format!("owner {owner}"), held));
                ControlFlow::Continue(())
            })?;
            tx.scan(&EDGES, |(from, to), ()| {
                named.push((format!("edge from {from}"), to));
                named.push((format!("edge to {to}"), from));
                ControlFlow::Continue(())
            })?;
            for (lease, ()) in tx.all(&LEASE_HOLDS)?.into_iter().map(|((lease, _), ())| (lease, ())) {
                if !tx.contains(&LEASES, &lease)? {
                    inconsistent.push(format!("lease {lease} holds something but does not exist"));
                }
            }
            for (id, row) in tx.all(&SNAPSHOTS)? {
                self.report.checked_count += 1;
                for layer in row.layers.iter().chain(&row.fixup) {
                    named.push((format!("snapshot {id}"), (*layer).into()));
                    if !tx.contains(&EDGES, &(id.into(), (*layer).into()))? {
                        inconsistent.push(format!("snapshot {id} does not keep layer {layer}"));
                    }
                }
            }
            named.retain(|(_, names)| !exists(tx, *names).unwrap_or(false));
            Ok::<_, CatalogueError>(())
        })?;
        self.report.problems.extend(named.into_iter().map(|(by, names)| Problem::Dangling { by, names }));
        self.report.problems.extend(inconsistent.into_iter().map(|what| Problem::Inconsistent { what }));
        Ok(())
    }

    /// What holds each resource is counted right.
    fn refs(&mut self) -> Result<(), CheckError> {
        let Differences { refs, loose } = self.store.read(refs::differences)?;
        let wrong = refs.into_iter().map(|(resource, (kept, counted))| Problem::WrongRefs { resource, kept, counted });
        self.report.problems.extend(wrong);
        self.report.problems.extend(loose.into_iter().map(|(resource, held_by_none)| Problem::Inconsistent {
            what: match held_by_none {
                true => format!("{resource} is held by nothing, but not listed for collection"),
                false => format!("{resource} is listed for collection, but is held or not there"),
            },
        }));
        Ok(())
    }

    fn totals(&mut self) -> Result<(), CheckError> {
        for (_, size_bytes) in self.store.read(|tx| tx.all(&TRASH))? {
            self.count(Kind::Trash, TotalRow::one(size_bytes, 0));
        }
        for kind in Kind::ALL {
            let of = match kind {
                Kind::Blobs => "blobs",
                Kind::Layers => "layers",
                Kind::Actives => "actives",
                Kind::Trash => "trash",
                Kind::Sidecars => "sidecars",
            };
            let kept = self.store.read(|tx| tx.get(&TOTALS, &kind))?.unwrap_or_default();
            let counted = self.totals.get(&kind).copied().unwrap_or_default();
            if kept != counted {
                let parts = |total: TotalRow| (total.count, total.size_bytes, total.inodes);
                self.report.problems.push(Problem::WrongTotal { of, kept: parts(kept), counted: parts(counted) });
            }
        }
        Ok(())
    }
}
