//! The catalogue by itself on a disk that loses, tears and reorders what was not synced, and whose calls fail.
//!
//! What ext4 and btrfs make of a power cut under a whole store is for `engine/tests/power.rs`. Here the disk is memory, so every sync
//! of thousands of operations can be tried in seconds, by anybody, and the n-th call can fail. After each cut the database is
//! opened again: it must hold what is acknowledged as durable, and beyond that whole operations, in order, without a gap.
//!
//! `PLIES_POWER_SEED` makes it another script, and `PLIES_CHAOS` (`just chaos`) tries every cut and every call.

use std::collections::BTreeMap;
use std::io;

use plies_testkit::power::draw;
use redb::StorageBackend;
use serde::{Deserialize, Serialize};

use super::super::{Row, Rows as _, Table};
use super::*;

/// Operations of the script, and how many there are from an opening to the next closing.
const OPERATIONS: usize = 2_400;
const IN_A_SESSION: usize = 24;

/// So little memory that the database reads while it works, and writes before it commits.
const CACHE_BYTES: usize = 64 << 10;

const NUMBERS: Table<u64, u64> = Table::new("numbers");
const TEXTS: Table<u64, Text> = Table::new("texts");

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Text(String);

impl Row for Text {
    const VERSION: u8 = 1;
}

/// What a disk was told.
#[derive(Debug, Clone)]
enum Told {
    Write {
        offset: usize,
        data: Vec<u8>,
    },
    Resize(usize),
    Sync,
    /// What was not synced by then may be lost although later syncs succeed: the kernel takes it for written.
    FailedSync,
}

/// A call that fails.
#[derive(Debug, Clone, Copy)]
struct Fault {
    nth: usize,
    errno: i32,
    /// Half of what it was to write is written.
    is_short: bool,
}

#[derive(Debug, Default)]
struct Disk {
    /// As the process sees it.
    now: Vec<u8>,
    told: Vec<Told>,
    calls: usize,
    fault: Option<Fault>,
}

impl Disk {
    /// Counts a call, and says how it fails.
    fn call(&mut self) -> Result<(), (io::Error, bool)> {
        self.calls += 1;
        match self.fault {
            Some(fault) if fault.nth == self.calls => Err((io::Error::from_raw_os_error(fault.errno), fault.is_short)),
            _ => Ok(()),
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        if end > self.now.len() {
            self.now.resize(end, 0);
        }
        self.now[offset..end].copy_from_slice(data);
        self.told.push(Told::Write { offset, data: data.to_vec() });
    }
}

#[derive(Debug, Clone, Default)]
struct Backend(Arc<Mutex<Disk>>);

impl Backend {
    fn of(image: Vec<u8>, fault: Option<Fault>) -> Self {
        Self(Arc::new(Mutex::new(Disk { now: image, fault, ..Disk::default() })))
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        let mut disk = lock(&self.0);
        disk.call().map_err(|(error, _)| error)?;
        Ok(disk.now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.call().map_err(|(error, _)| error)?;
        let at = offset as usize;
        let data = disk.now.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.call().map_err(|(error, _)| error)?;
        disk.now.resize(len as usize, 0);
        disk.told.push(Told::Resize(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = lock(&self.0);
        let done = disk.call().map_err(|(error, _)| error);
        disk.told.push(if done.is_ok() { Told::Sync } else { Told::FailedSync });
        done
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = lock(&self.0);
        let done = disk.call();
        let len = match &done {
            Ok(()) => data.len(),
            Err((_, true)) => data.len() / 2,
            Err((_, false)) => 0,
        };
        if len > 0 {
            disk.write(offset as usize, &data[..len]);
        }
        done.map_err(|(error, _)| error)
    }
}

/// What of a disk is safe, and what the power may take.
#[derive(Debug)]
struct Platter<'a> {
    safe: Vec<u8>,
    unsynced: Vec<&'a Told>,
}

impl<'a> Platter<'a> {
    fn new(image: &[u8]) -> Self {
        Self { safe: image.to_vec(), unsynced: Vec::new() }
    }

    fn hear(&mut self, told: &'a Told, random: &mut u64) {
        match told {
            Told::Write { .. } | Told::Resize(_) => self.unsynced.push(told),
            Told::Sync => self.settle(None),
            Told::FailedSync => self.settle(Some(random)),
        }
    }

    fn settle(&mut self, random: Option<&mut u64>) {
        self.safe = self.cut(random);
        self.unsynced.clear();
    }

    /// What is left: all, or of each write that was not synced everything, nothing or a part. Of the changes of the length, which
    /// are in the file system's journal, the first ones; nothing is behind the end.
    fn cut(&self, mut random: Option<&mut u64>) -> Vec<u8> {
        let mut image = self.safe.clone();
        let mut draw_below = |limit: usize| random.as_mut().map(|random| (draw(random) % limit.max(1) as u64) as usize);
        let resizes = self.unsynced.iter().filter(|told| matches!(told, Told::Resize(_))).count();
        let mut resizes = draw_below(resizes + 1).unwrap_or(resizes);
        for told in &self.unsynced {
            match told {
                Told::Resize(len) if resizes > 0 => {
                    resizes -= 1;
                    image.resize(*len, 0);
                }
                Told::Write { offset, data } => {
                    let (from, to) = match draw_below(4) {
                        Some(0) => continue,
                        Some(1) => {
                            let from = draw_below(data.len()).unwrap_or(0);
                            (from, from + draw_below(data.len() - from).unwrap_or(0))
                        }
                        _ => (0, data.len()),
                    };
                    let (start, end) = ((offset + from).min(image.len()), (offset + to).min(image.len()));
                    image[start..end].copy_from_slice(&data[start - offset.min(&start)..][..end - start]);
                }
                _ => {}
            }
        }
        image
    }
}

/// Numbers with their texts.
type Contents = BTreeMap<u64, (u64, usize)>;

#[derive(Debug, Clone)]
struct Operation {
    number: u64,
    /// Keys with the length of their texts; `None`: the row goes.
    rows: Vec<(u64, Option<usize>)>,
    urgency: Urgency,
    fails: bool,
    compacts: bool,
}

impl Operation {
    fn draw(number: u64, random: &mut u64) -> Self {
        let mut below = |limit: u64| draw(random) % limit;
        let many = if below(40) == 0 { 150 } else { 6 };
        let rows = (0..=below(many)).map(|_| (below(200), (below(3) > 0).then(|| below(900) as usize))).collect();
        let urgency = if below(3) == 0 { Urgency::Lazy } else { Urgency::Durable };
        Self { number, rows, urgency, fails: below(12) == 0, compacts: below(80) == 0 }
    }

    fn apply(&self, contents: &Contents) -> Contents {
        let mut contents = contents.clone();
        for (key, len) in &self.rows {
            match len {
                Some(len) => drop(contents.insert(*key, (self.number, *len))),
                None => drop(contents.remove(key)),
            }
        }
        contents
    }

    fn run(&self, catalogue: &Catalogue) -> Result<(), CatalogueError> {
        catalogue.write(self.urgency, &Stamp::default, |tx| {
            for (key, len) in &self.rows {
                if let Some(len) = len {
                    tx.put(&NUMBERS, key, &self.number)?;
                    tx.put(&TEXTS, key, &text(self.number, *len))?;
                } else {
                    tx.remove(&NUMBERS, key)?;
                    tx.remove(&TEXTS, key)?;
                }
            }
            if self.fails { Err(refused()) } else { Ok(()) }
        })
    }
}

fn text(number: u64, len: usize) -> Text {
    let mut random = number ^ len as u64;
    // Nothing that looks like the row next to it.
    Text((0..len).map(|_| char::from(b'a' + (draw(&mut random) % 26) as u8)).collect())
}

fn refused() -> CatalogueError {
    CatalogueError::Damaged { table: "test", key: String::new(), what: "on purpose" }
}

fn open(backend: Backend, quick_repair: bool) -> Result<Catalogue, redb::DatabaseError> {
    // What it asks for its size takes no blocks.
    let path = Path::new("/dev/null");
    let mut catalogue = Catalogue::new(Catalogue::builder(CACHE_BYTES).create_with_backend(backend)?, path)?;
    catalogue.quick_repair_from_bytes = if quick_repair { 0 } else { u64::MAX };
    Ok(catalogue)
}

/// What was known when the disk had been told so much.
#[derive(Debug, Clone, Copy)]
struct Known {
    told: usize,
    /// Which of the states is the oldest that may be found, and which the newest.
    durable: usize,
    newest: usize,
}

/// What was done from an opening to a closing.
struct Session {
    disk: Disk,
    /// What the catalogue held after each operation that was made, and of the last even if it failed.
    states: Vec<Contents>,
    known: Vec<Known>,
    failed: bool,
}

/// Opens an image, makes these operations until one fails for good, and closes.
fn work(image: &[u8], before: &Contents, operations: &[Operation], fault: Option<Fault>, quick: bool) -> Session {
    let backend = Backend::of(image.to_vec(), fault);
    let told = |backend: &Backend| lock(&backend.0).told.len();
    let mut states = vec![before.clone()];
    let mut known = vec![Known { told: 0, durable: 0, newest: 0 }];
    let mut failed = true;
    if let Ok(mut catalogue) = open(backend.clone(), quick) {
        failed = false;
        let mut durable = 0;
        for operation in operations {
            let last = &states[states.len() - 1];
            let next = if operation.fails { last.clone() } else { operation.apply(last) };
            // While it is made it may be found already.
            let newest = states.len();
            states.push(next);
            known.last_mut().unwrap().newest = newest;
            let done = operation.run(&catalogue);
            let (done, is_durable) = match done {
                Err(CatalogueError::Damaged { table: "test", .. }) if operation.fails => (Ok(()), false),
                done => (done, operation.urgency == Urgency::Durable && !operation.fails),
            };
            if done.is_err() {
                // A refusal is for good if the database made it, and then everything is refused. What could not be read
                // may have let one closure fail, which then changed nothing.
                if catalogue.flush().is_err() {
                    failed = true;
                    for urgency in [Urgency::Durable, Urgency::Lazy] {
                        let again = Operation { urgency, fails: false, ..operation.clone() };
                        assert!(again.run(&catalogue).is_err(), "a failed catalogue takes more");
                    }
                    break;
                }
                let last = states[states.len() - 2].clone();
                states[newest] = last;
                durable = newest;
            } else if operation.compacts {
                // Only who closes does it, and goes on to the end whether or not it worked.
                failed = catalogue.compact().is_err();
                if is_durable || catalogue.flush().is_ok() {
                    durable = newest;
                }
            } else if is_durable {
                durable = newest;
            }
            known.push(Known { told: told(&backend), durable, newest });
            if failed {
                break;
            }
        }
        drop(catalogue);
        let last = *known.last().unwrap();
        if fault.is_none() {
            // To close is to write down what waits.
            known.push(Known { told: told(&backend), durable: last.newest, ..last });
        }
    }
    let disk = std::mem::take(&mut *lock(&backend.0));
    Session { disk, states, known, failed }
}

impl Session {
    fn known_at(&self, told: usize) -> Known {
        *self.known.iter().rfind(|known| known.told <= told).unwrap()
    }

    /// Opens what is left and looks what is in it; the disk as it is afterwards.
    fn judge(&self, image: Vec<u8>, known: Known, thorough: bool, context: &dyn std::fmt::Display) -> Disk {
        let backend = Backend::of(image, None);
        if thorough {
            let mut database =
                Catalogue::builder(CACHE_BYTES).create_with_backend(Backend::of(lock(&backend.0).now.clone(), None));
            let whole = database.as_mut().map(redb::Database::check_integrity);
            assert!(matches!(whole, Ok(Ok(_))), "{context}: {whole:?}");
        }
        let catalogue = open(backend.clone(), false).unwrap_or_else(|error| panic!("{context}: {error}"));
        let found = contents(&catalogue).unwrap_or_else(|error| panic!("{context}: {error}"));
        let possible = &self.states[known.durable..=known.newest];
        let is = self.states.iter().rposition(|state| *state == found);
        assert!(possible.contains(&found), "{context}: {known:?}, but it is as after {is:?}");
        if thorough {
            write_one(&catalogue).unwrap_or_else(|error| panic!("{context}: {error}"));
        }
        drop(catalogue);
        std::mem::take(&mut *lock(&backend.0))
    }
}

fn write_one(catalogue: &Catalogue) -> Result<(), CatalogueError> {
    catalogue.write(Urgency::Durable, &Stamp::default, |tx| tx.put(&NUMBERS, &u64::MAX, &0))
}

/// Fails if a number has no text, or another's.
fn contents(catalogue: &Catalogue) -> Result<Contents, CatalogueError> {
    catalogue.read(|rows| {
        let (numbers, texts) = (rows.all(&NUMBERS)?, rows.all(&TEXTS)?);
        assert_eq!(numbers.len(), texts.len());
        let mut contents = Contents::new();
        for ((key, number), (of, found)) in numbers.into_iter().zip(texts) {
            assert_eq!((key, &found), (of, &text(number, found.0.len())));
            contents.insert(key, (number, found.0.len()));
        }
        Ok(contents)
    })
}

/// The script in sessions, each with the image that it begins with; half of them write down which pages are in use.
fn sessions(seed: u64, mut with: impl FnMut(usize, &[u8], &Contents, &[Operation], bool)) {
    let mut random = seed;
    let mut image = Vec::new();
    let mut before = Contents::new();
    let script: Vec<Operation> = (0..OPERATIONS).map(|n| Operation::draw(n as u64, &mut random)).collect();
    // As the store does it: empty, and closed, before it gets its name.
    image = work(&image, &before, &[], None, false).disk.now;
    for (number, operations) in script.chunks(IN_A_SESSION).enumerate() {
        let quick = number % 2 == 0;
        with(number, &image, &before, operations, quick);
        let session = work(&image, &before, operations, None, quick);
        assert!(!session.failed);
        assert!(matches!(session.disk.told.last(), Some(Told::Sync)), "closed without a sync");
        image = session.disk.now;
        before = session.states.last().unwrap().clone();
    }
}

fn seed() -> u64 {
    std::env::var("PLIES_POWER_SEED").map_or(1, |text| text.parse().unwrap())
}

fn is_long() -> bool {
    std::env::var_os("PLIES_CHAOS").is_some()
}

#[test]
fn power_cuts_at_every_sync_leave_whole_operations_and_all_that_are_durable() {
    let (seed, long) = (seed(), is_long());
    let (mut syncs, mut cuts, mut second_cuts) = (0, 0, 0);
    sessions(seed, |number, image, before, operations, quick| {
        let session = work(image, before, operations, None, quick);
        let mut random = seed ^ number as u64;
        let mut platter = Platter::new(image);
        for (at, told) in session.disk.told.iter().enumerate() {
            let known = session.known_at(at);
            let is_sync = matches!(told, Told::Sync);
            syncs += usize::from(is_sync);
            // A kill between two writes loses nothing that was written; before a sync the power may take any of it.
            let subsets = match (is_sync, long) {
                (true, true) => 8,
                (true, false) => 1,
                (false, _) => 0,
            };
            for subset in usize::from(!(long || is_sync && at % 4 == 0))..=subsets {
                cuts += 1;
                let context = format!("PLIES_POWER_SEED={seed}, session {number}, before {at}, subset {subset}");
                let left = platter.cut((subset > 0).then_some(&mut random));
                let recovery = session.judge(left.clone(), known, cuts % 16 == 0, &context);
                // And the power goes again while it recovers.
                if cuts % if long { 16 } else { 128 } == 1 {
                    let mut platter = Platter::new(&left);
                    for (at, told) in recovery.told.iter().enumerate() {
                        second_cuts += 1;
                        let left = platter.cut(Some(&mut random));
                        session.judge(left, known, false, &format_args!("{context}, then before {at}"));
                        platter.hear(told, &mut random);
                    }
                }
            }
            platter.hear(told, &mut random);
        }
    });
    println!(
        "power cuts under the catalogue: {cuts} cuts at {syncs} syncs and {second_cuts} second ones in {OPERATIONS} operations; 0 failures"
    );
}

#[test]
fn any_call_that_fails_acknowledges_nothing_and_takes_nothing_that_was() {
    let (seed, long) = (seed(), is_long());
    let (mut faults, mut refused_count) = (0, 0);
    sessions(seed, |number, image, before, operations, quick| {
        let calls = work(image, before, operations, None, quick).disk.calls;
        let mut random = seed ^ number as u64;
        let some = (0..3).map(|_| 1 + draw(&mut random) as usize % calls);
        let nths: Vec<usize> = match long {
            true => (1..=calls).collect(),
            // The last ones are those of the closing, which differ little from one session to the next.
            false => some.chain(calls - if number % 5 == 0 { 12 } else { 0 }..=calls).collect(),
        };
        for nth in nths {
            faults += 1;
            // EIO, ENOSPC, EDQUOT, EMFILE
            let errno = [5, 28, 122, 24][faults % 4];
            let fault = Fault { nth, errno, is_short: faults % 3 == 0 };
            let session = work(image, before, operations, Some(fault), quick);
            refused_count += usize::from(session.failed);
            let context = format!("PLIES_POWER_SEED={seed}, session {number}, {fault:?}");
            let known = *session.known.last().unwrap();
            session.judge(session.disk.now.clone(), known, faults % 8 == 0, &context);
            let mut platter = Platter::new(image);
            session.disk.told.iter().for_each(|told| platter.hear(told, &mut random));
            session.judge(platter.cut(Some(&mut random)), known, false, &format_args!("{context}, then a power cut"));
        }
    });
    assert!(refused_count * 4 > faults, "most calls that failed were missed by none: {refused_count} of {faults}");
    println!("failing calls under the catalogue: {faults} calls of {OPERATIONS} operations; 0 failures");
}
