//! From the schema of an older version to this one's.
//!
//! A migration is a function over all rows, in [`STEPS`] under the schema that it starts from. They run on a copy of
//! the database, one transaction each; then the old file gets another name and the copy its own. So the old catalogue
//! is there until the new one is complete, and afterwards too, for whoever has to go back. A kill at any moment leaves
//! the old store, or the new one; what is left of the copy goes with the next open.
//!
//! ```text
//! catalog/plies.redb                the catalogue
//! catalog/plies.redb.migrating      a copy on its way
//! catalog/plies.redb.schema-<n>     as it was before; kept until somebody removes it
//! ```
//!
//! Rows have versions of their own, which are upgraded as they are read ([`crate::Row::upgrade`]): a schema changes
//! when a table comes that older versions would not keep in step, or files that they would not know.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::catalogue::schema::{META, META_PACKS, META_SCHEMA, SCHEMA};
use crate::catalogue::{Catalogue, CatalogueError, Rows as _, Tx, Urgency};
use crate::error::{At as _, FileError};
use crate::lock::StoreLock;
use crate::open::{OpenError, OpenOptions, Paths, create_private, open_catalogue, sync_dir};
use crate::progress::{Outcome, Task, Watched};
use crate::recover::entries;
use crate::{Cancel, Stamp, WaitPolicy};

/// What the name of a catalogue that is kept goes on with, before its schema.
const KEPT: &str = "schema-";

/// One schema to the next.
struct Step {
    /// The schema it starts from; it ends at the next.
    from: u64,
    /// What it does, for people.
    what: &'static str,
    run: fn(&mut Tx<'_>) -> Result<(), CatalogueError>,
}

/// All there are, in order and without a gap.
const STEPS: [Step; 2] = [
    Step { from: 1, what: "count what holds each blob, layer, snapshot and upper", run: |tx| tx.recount().map(drop) },
    Step {
        from: 2,
        what: "let layers be kept as their tars",
        // What is there stays as it is, and so does what comes: that was the default then.
        run: |tx| tx.put(&META, &META_PACKS.to_owned(), &0).map(drop),
    },
];

fn steps_from(schema: u64) -> impl Iterator<Item = &'static Step> {
    STEPS.iter().filter(move |step| step.from >= schema)
}

/// What a crate above this one does to its tables in the step from this schema to the next, in the step's transaction.
pub type MigrateAbove = fn(u64, &mut Tx<'_>) -> Result<(), CatalogueError>;

/// Which catalogues an opening may migrate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migrate {
    /// Those of at most so many bytes; of larger ones it says so and fails.
    UpTo(u64),
    /// However long it takes: somebody asked for it.
    Always,
}

impl Migrate {
    /// What takes little time; see [`Migrate::default`].
    ///
    /// Measured: the step from schema 1 takes 3 s for a million records, whose catalogue has 1 GiB. A quarter of that is
    /// no surprise at the start of a command.
    pub const QUICK_BYTES: u64 = 256 << 20;

    fn takes(self, catalogue_bytes: u64) -> bool {
        match self {
            Self::UpTo(bytes) => catalogue_bytes <= bytes,
            Self::Always => true,
        }
    }
}

impl Default for Migrate {
    fn default() -> Self {
        Self::UpTo(Self::QUICK_BYTES)
    }
}

/// A migration that was done when a store was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Migrated {
    /// The schema it had.
    pub from: u64,
    /// The schema it has.
    pub to: u64,
    /// Where the old catalogue is kept.
    pub kept: PathBuf,
}

/// What a migration would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MigrationPlan {
    /// The store's schema.
    pub from: u64,
    /// This version's.
    pub to: u64,
    /// What would be done, in order; nothing if both are the same.
    pub steps: Vec<&'static str>,
    /// Bytes of the catalogue, which would be there twice afterwards.
    pub catalogue_bytes: u64,
}

impl MigrationPlan {
    fn new(from: u64, paths: &Paths) -> Result<Self, OpenError> {
        if from > SCHEMA {
            return Err(OpenError::TooNew { found: from, supported: SCHEMA });
        }
        let first = STEPS.first().map_or(SCHEMA, |step| step.from);
        if from < first {
            return Err(OpenError::TooOld { found: from });
        }
        let database = paths.database();
        let catalogue_bytes = fs::metadata(&database).at("stat", &database)?.len();
        let steps = steps_from(from).map(|step| step.what).collect();
        Ok(Self { from, to: SCHEMA, steps, catalogue_bytes })
    }
}

/// What opening the store at `root` would migrate. Takes the lock, changes nothing.
///
/// # Errors
/// [`OpenError`], as [`crate::Store::open`] has them.
pub fn migration_plan(root: &Path, options: &OpenOptions, wait: WaitPolicy<'_>) -> Result<MigrationPlan, OpenError> {
    let root = std::path::absolute(root).at("resolve", root)?;
    let paths = Paths::below(&root);
    if !paths.catalog.try_exists().at("stat", &paths.catalog)? {
        return Err(OpenError::Missing { root });
    }
    let _lock = StoreLock::take(&paths.catalog.join("lock"), &options.command, wait)?;
    let options = OpenOptions { create: false, ..options.clone() };
    MigrationPlan::new(schema(&open_catalogue(&root, &paths, &options)?, &paths)?, &paths)
}

fn schema(catalogue: &Catalogue, paths: &Paths) -> Result<u64, OpenError> {
    let missing =
        || CatalogueError::Damaged { table: META.name(), key: META_SCHEMA.to_owned(), what: "no schema version" };
    let read = catalogue.read(|tx| tx.get(&META, &META_SCHEMA.to_owned()));
    read.and_then(|found| found.ok_or_else(missing)).map_err(|error| match error {
        // Nothing in it can be understood without.
        error @ CatalogueError::Damaged { .. } => OpenError::Corrupt { path: paths.database(), source: error.into() },
        error => error.into(),
    })
}

/// The catalogue in this version's schema, whatever it was in, and what was done about that.
pub(crate) fn open_migrated(
    root: &Path,
    paths: &Paths,
    options: &OpenOptions,
) -> Result<(Catalogue, Option<Migrated>), OpenError> {
    let catalogue = open_catalogue(root, paths, options)?;
    let copy = beside(&paths.database(), "migrating");
    remove_if_there(&copy)?;
    let from = schema(&catalogue, paths)?;
    if from == SCHEMA {
        return Ok((catalogue, None));
    }
    // Closed: nothing may be written to what is copied.
    drop(catalogue);
    let plan = MigrationPlan::new(from, paths)?;
    if !options.migrate.takes(plan.catalogue_bytes) {
        let MigrationPlan { from: found, to: supported, catalogue_bytes, .. } = plan;
        return Err(OpenError::NotMigrated { found, supported, catalogue_bytes });
    }
    let migrated = migrate(&paths.database(), &copy, &plan, options).inspect_err(|_| {
        // The next open would remove it too; but a file system that is full wants it back now.
        drop(fs::remove_file(&copy));
    });
    let kept = migrated?;
    Ok((open_catalogue(root, paths, options)?, Some(Migrated { from, to: SCHEMA, kept })))
}

fn migrate(database: &Path, copy: &Path, plan: &MigrationPlan, options: &OpenOptions) -> Result<PathBuf, OpenError> {
    let progress = &*options.progress;
    let task = Task::start(progress, "copy the catalogue", Some(plan.catalogue_bytes));
    copy_file(database, copy, &task)?;
    task.end(Outcome::Done);
    let failed = |error: redb::DatabaseError| CatalogueError::database("migrate")(error.into());
    let catalogue = Catalogue::open(copy, options.cache_bytes).map_err(failed)?;
    for step in steps_from(plan.from) {
        let task = Task::start(progress, &format!("schema {} to {}: {}", step.from, step.from + 1, step.what), None);
        catalogue.write(Urgency::Durable, &|| Stamp::from((options.clock)()), |tx| {
            (step.run)(tx)?;
            options.migrate_above.iter().try_for_each(|above| above(step.from, tx))?;
            tx.put(&META, &META_SCHEMA.to_owned(), &(step.from + 1))
        })?;
        task.end(Outcome::Done);
    }
    drop(catalogue);
    File::open(copy).and_then(|file| file.sync_all()).at("sync", copy)?;

    // From here on there are two whole catalogues, and one name decides.
    let kept = beside(database, &format!("{KEPT}{}", plan.from));
    remove_if_there(&kept)?;
    fs::hard_link(database, &kept).at("link", &kept)?;
    let dir = database.parent().expect("because the catalogue lies in a directory of the store");
    sync_dir(dir)?;
    fs::rename(copy, database).at("rename", copy)?;
    sync_dir(dir)?;
    Ok(kept)
}

fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// The catalogues of older schemas that were kept beside this one.
pub(crate) fn kept_catalogues(paths: &Paths) -> Result<Vec<PathBuf>, FileError> {
    let prefix = beside(&paths.database(), KEPT).into_os_string().into_encoded_bytes();
    let is_kept = |path: &PathBuf| path.as_os_str().as_encoded_bytes().starts_with(&prefix);
    Ok(entries(&paths.catalog)?.into_iter().filter(is_kept).collect())
}

fn remove_if_there(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", path, error)),
        _ => Ok(()),
    }
}

/// A copy that shares its blocks where the file system can do that.
fn copy_file(from: &Path, to: &Path, task: &Task<'_>) -> Result<(), FileError> {
    let mut source = File::open(from).at("open", from)?;
    let copy = create_private(to).at("create", to)?;
    if rustix::fs::ioctl_ficlone(&copy, &source).is_err() {
        let mut copy = Watched { inner: copy, task: Some(task), cancel: &Cancel::new() };
        io::copy(&mut source, &mut copy).at("copy", from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use plies_oci::BlobDigest;

    use std::sync::Arc;
    use std::time::SystemTime;

    use super::*;
    use crate::catalogue::schema::{BLOBS, BlobRow, EDGES, HOLDS, LEASE_HOLDS, LEASES, LOOSE, LeaseRow, REFS};
    use crate::refs::{Differences, count_of, differences};
    use crate::{GcMode, LeaseId, Owner, Resource, Store};

    fn options() -> OpenOptions {
        OpenOptions::new(Arc::new(|| SystemTime::UNIX_EPOCH))
    }

    #[test]
    fn a_store_of_schema_1_is_counted_when_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        Store::open(&root, options(), WaitPolicy::Fail).unwrap().close().unwrap();

        // As the first version wrote them: no counts.
        let digest = |n: u8| BlobDigest::of(&[n]);
        let resource = |n: u8| Resource::from(digest(n));
        let lease = LeaseId::from_bytes([1; 8]);
        let old = Catalogue::open(&Paths::below(&root).database(), OpenOptions::CACHE_BYTES).unwrap();
        let written: Result<(), CatalogueError> = old.write(Urgency::Durable, &Stamp::default, |tx| {
            for n in 0..4 {
                tx.put(&BLOBS, &digest(n), &BlobRow { size_bytes: 1, created: Stamp::default() })?;
            }
            tx.put(&HOLDS, &(Owner::new("test", 0), resource(0)), &())?;
            tx.put(&EDGES, &(resource(0), resource(1)), &())?;
            let expires = Some(Stamp::from_micros(1));
            tx.put(&LEASES, &lease, &LeaseRow { created: Stamp::default(), expires, label: String::new() })?;
            tx.put(&LEASE_HOLDS, &(lease, resource(1)), &())?;
            tx.put(&LEASE_HOLDS, &(lease, resource(2)), &())?;
            tx.put(&META, &META_SCHEMA.to_owned(), &1).map(drop)
        });
        written.unwrap();
        let uncounted: Result<_, CatalogueError> = old.read(|tx| Ok((tx.all(&REFS)?, tx.all(&LOOSE)?)));
        assert_eq!(uncounted.unwrap(), (Vec::new(), Vec::new()));
        drop(old);

        let plan = migration_plan(&root, &options(), WaitPolicy::Fail).unwrap();
        assert_eq!((plan.from, plan.to, plan.steps.len()), (1, SCHEMA, 2));
        let careful = OpenOptions { migrate: Migrate::UpTo(0), ..options() };
        let refused = Store::open(&root, careful, WaitPolicy::Fail).unwrap_err();
        assert!(matches!(refused, OpenError::NotMigrated { found: 1, supported: SCHEMA, .. }), "{refused}");
        assert!(refused.to_string().contains("`ply migrate`"), "{refused}");

        for first in [true, false] {
            let store = Store::open(&root, options(), WaitPolicy::Fail).unwrap();
            assert_eq!(store.migrated().is_some(), first);
            store
                .read(|tx| {
                    assert_eq!(tx.get(&META, &META_SCHEMA.to_owned())?, Some(SCHEMA));
                    for (n, count) in [1, 2, 1, 0].into_iter().enumerate() {
                        assert_eq!(count_of(tx, resource(n as u8))?, count, "{n}");
                    }
                    assert_eq!(tx.all(&LOOSE)?, [(resource(3), ())]);
                    assert_eq!(differences(tx)?, Differences::default());
                    Ok::<_, CatalogueError>(())
                })
                .unwrap();
        }
        let store = Store::open(&root, options(), WaitPolicy::Fail).unwrap();
        let collected = store.gc(GcMode::Run).unwrap().collected;
        assert_eq!(collected.iter().map(|one| one.resource).collect::<Vec<_>>(), [resource(3)]);
    }
}
