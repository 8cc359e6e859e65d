//! What a kill leaves: the test binary runs itself as a child that writes without end, kills it at
//! many points, and judges the store that it finds.
//!
//! The child says a line before and after everything it does; the parent kills it right after one
//! of them, so it dies inside the next step or the one just begun. A process that dies loses nothing
//! that the kernel has; what a power failure loses is not tested here.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use common::Item::{Dir, File};
use common::{Rig, assert_healthy, owner, path_of, process_lease, stage_layer};
use plies_oci::{BlobDigest, DiffId};
use plies_store::{
    ActiveOptions, Attach, Expected, GcMode, IngestRef, OpenOptions, Resource, SnapshotError, Store, WaitPolicy,
    held_by,
};

const ROOT: &str = "PLIES_TEST_CRASH_ROOT";
const SEED: &str = "PLIES_TEST_CRASH_SEED";

fn options(command: &str) -> OpenOptions {
    let mut options = OpenOptions::new(std::sync::Arc::new(std::time::SystemTime::now));
    options.command = command.into();
    options
}

fn say(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    // The parent may be gone already.
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn text(n: u64) -> Vec<u8> {
    format!("blob {n} ").repeat(2000).into_bytes()
}

/// The child. Does nothing unless the parent started it.
#[test]
fn crash_child() {
    let Ok(root) = std::env::var(ROOT) else { return };
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let store = Store::open(root.as_ref(), options("crash child"), WaitPolicy::Fail).unwrap();
    let mounts = rustix::process::geteuid().is_root();
    say(format_args!("begin"));
    for n in seed.. {
        let lease = process_lease(&store);

        let digest = {
            let mut ingest = store.content().ingest(IngestRef::new(format!("ref {}", n % 7))).unwrap();
            ingest.restart().unwrap();
            ingest.write_all(&text(n)).unwrap();
            say(format_args!("committing {n}"));
            ingest.commit(Expected::anything(), &lease).unwrap()
        };
        store.write(|tx| tx.hold(&owner(n), digest)).unwrap();
        say(format_args!("holds {n} {}", digest.hex()));

        let batch: Vec<_> = (0..3)
            .map(|at| {
                let mut ingest = store.content().ingest_unnamed().unwrap();
                ingest.write_all(&text(n * 10 + at)).unwrap();
                (ingest, Expected::anything())
            })
            .collect();
        store.content().commit_all(batch, &lease).unwrap();
        say(format_args!("batch {n}"));

        let mut id = [0; 32];
        id[..8].copy_from_slice(&n.to_be_bytes());
        let stages = vec![
            stage_layer(
                &store,
                &[Dir("", 0o755), Dir("tmp", 0o1777), File("a/b/c", "x")],
                Some(DiffId::from_bytes(id)),
            ),
            stage_layer(&store, &[File("tmp/y", "y")], None),
        ];
        say(format_args!("publishing {n}"));
        let layers = store.layers().publish(&lease, stages).unwrap();
        let snapshot = store.snapshots().ensure(&layers, &lease).unwrap();
        store.write(|tx| tx.hold(&owner(n), snapshot)).unwrap();
        say(format_args!("snapshot {n} {snapshot}"));

        if mounts {
            let volatile = n % 2 == 0;
            let active = store.snapshots().prepare(Some(snapshot), &lease, ActiveOptions { volatile }).unwrap();
            if !volatile {
                store.write(|tx| tx.hold(&owner(n), active)).unwrap();
                say(format_args!("active {n} {active}"));
            }
            let mounted = store.snapshots().mount_active(active, Attach::InStore).unwrap();
            say(format_args!("mounted {n}"));
            fs::write(path_of(&mounted.root()).join("written"), "w").unwrap();
            mounted.unmount().unwrap();
            say(format_args!("sealing {n}"));
            store.snapshots().seal(active, &lease).unwrap();
            say(format_args!("sealed {n}"));
        }

        lease.release().unwrap();
        if n % 2 == 1 {
            say(format_args!("drops {}", n - 1));
            store.write(|tx| tx.unhold_all(&owner(n - 1))).unwrap();
            say(format_args!("collecting {n}"));
            store.gc(GcMode::Run).unwrap();
        }
    }
}

/// What the child said it holds, by owner; whatever it may just have been dropping is not in it.
#[derive(Default)]
struct Acknowledged {
    held: BTreeMap<u64, BTreeSet<String>>,
    sealing: bool,
}

impl Acknowledged {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = || words[1].parse::<u64>().unwrap();
        match words[0] {
            "holds" | "snapshot" | "active" => drop(self.held.entry(number()).or_default().insert(words[2].to_owned())),
            "drops" => drop(self.held.remove(&number())),
            "sealing" => self.sealing = true,
            _ => {}
        }
    }
}

fn run_and_kill(root: &std::path::Path, seed: u64, after_lines: usize) -> Acknowledged {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash_child", "--nocapture", "--test-threads=1"])
        .env(ROOT, root)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut said = Acknowledged::default();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    // The test harness has its own lines first.
    assert!(lines.by_ref().any(|line| line.ends_with("begin")), "the child did not begin");
    for _ in 0..after_lines {
        said.hear(&lines.next().expect("the child goes on until it is killed"));
    }
    child.kill().unwrap();
    // What it got to say before it died counts as well.
    for line in lines {
        said.hear(&line);
    }
    child.wait().unwrap();
    said
}

fn judge(root: &std::path::Path, said: &Acknowledged, context: &str) {
    let store = Store::open(root, options("judge"), WaitPolicy::Fail).unwrap();
    // I1, I4, I5, I8: whole, resolved, nothing left over, counted right, before any collection.
    assert_healthy(&store);
    assert!(store.leases().unwrap().is_empty(), "{context}");
    for dir in ["layers/stage", "mounts", "run"] {
        assert_eq!(fs::read_dir(store.root().join(dir)).unwrap().count(), 0, "{context}: {dir}");
    }
    // I2: what it said is there.
    for (n, names) in &said.held {
        let held: Vec<Resource> = store.read(|tx| held_by(tx, &owner(n))).unwrap();
        let held: BTreeSet<String> = held
            .iter()
            .map(|resource| match resource {
                Resource::Blob(digest) => digest.hex(),
                other => other.to_string().rsplit(' ').next().unwrap().to_owned(),
            })
            .collect();
        assert!(names.is_subset(&held), "{context}: {n} held {names:?}, has {held:?}");
    }
    // I6, I7: a collection takes nothing of that, and leaves no bytes without a row.
    store.gc(GcMode::Run).unwrap();
    assert_healthy(&store);
    for (n, names) in &said.held {
        for resource in store.read(|tx| held_by(tx, &owner(n))).unwrap() {
            match resource {
                Resource::Blob(digest) => assert_eq!(digest, BlobDigest::of(&text(*n)), "{context}"),
                Resource::Snapshot(id) => {
                    let info = store.snapshots().info(id).unwrap();
                    assert!(info.fixup.is_some() && info.layers.len() == 2, "{context}");
                }
                // I3: whole, or sealed.
                Resource::Active(id) => match store.snapshots().upper(id) {
                    Ok(_) | Err(SnapshotError::Sealed { .. }) => {}
                    Err(error) => panic!("{context}: {error} of {names:?}"),
                },
                Resource::Layer(_) => unreachable!("the child holds none"),
            }
        }
    }
    assert!(store.gc(GcMode::Run).unwrap().collected.is_empty(), "{context}: a second collection found more");
}

#[test]
fn killed_anywhere_the_store_opens_with_all_that_was_acknowledged() {
    let rig = Rig::new();
    let mut sealed_once = false;
    for round in 0..40u64 {
        // About ten lines to a turn of the child: every place in it, over and over on one store.
        let lines = (round * 3 % 37) as usize;
        let seed = round * 100;
        let said = run_and_kill(&rig.root(), seed, lines);
        sealed_once |= said.sealing;
        judge(&rig.root(), &said, &format!("round {round}, killed after {lines} lines"));
        // What this round held is let go, so that the store does not grow over the rounds.
        let store = Store::open(&rig.root(), options("tidy"), WaitPolicy::Fail).unwrap();
        store.write(|tx| (seed..seed + 100).try_for_each(|n| tx.unhold_all(&owner(n)).map(drop))).unwrap();
        store.gc(GcMode::Run).unwrap();
        assert_healthy(&store);
    }
    assert!(sealed_once || !rustix::process::geteuid().is_root());
}

#[test]
fn i11_a_kill_during_recovery_is_recovered_from() {
    let rig = Rig::new();
    for round in 0..6u64 {
        run_and_kill(&rig.root(), round * 100, 25);
        // Killed as soon as it has opened, and (most likely) while it opens.
        for _ in 0..3 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "crash_child", "--nocapture"])
                .env(ROOT, rig.root())
                .env(SEED, "100000")
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            lines.next();
            child.kill().unwrap();
            child.wait().unwrap();
        }
        judge(&rig.root(), &Acknowledged::default(), &format!("round {round}"));
    }
}

#[test]
fn a_crash_between_rows_and_bytes_is_completed_at_open() {
    // Hand-built: the rows are gone, the bytes are not, the trash says so.
    const TRASH: plies_store::Table<Resource, u64> = plies_store::Table::new("trash");
    let rig = Rig::new();
    let (blob, file) = {
        let store = rig.open();
        let lease = process_lease(&store);
        let kept = common::put_blob(&store, b"kept", &lease);
        store.write(|tx| tx.hold(&owner("k"), kept)).unwrap();
        let digest = BlobDigest::of(b"doomed");
        let file = rig.root().join("content/blobs/sha256").join(digest.hex());
        fs::write(&file, b"doomed").unwrap();
        // One that is to go, and one that lives again.
        store.write(|tx| tx.put(&TRASH, &digest.into(), &6).map(drop)).unwrap();
        store.write(|tx| tx.put(&TRASH, &kept.into(), &4).map(drop)).unwrap();
        (kept, file)
    };
    let store = rig.open();
    assert!(!file.exists());
    assert!(store.content().open(blob).is_ok());
    assert!(store.read(|tx| plies_store::Rows::all(tx, &TRASH)).unwrap().is_empty());
    assert_healthy(&store);
}

#[test]
fn r09_a_second_process_waits_and_is_told_for_whom() {
    let rig = Rig::new();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash_child", "--nocapture"])
        .env(ROOT, rig.root())
        .env(SEED, "0")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("begin")));
    let reader = std::thread::spawn(move || lines.for_each(drop));
    let pid = child.id();
    let mut told = None;
    let store = Store::open(
        &rig.root(),
        options("second"),
        WaitPolicy::Wait(&mut |holder| {
            told = Some(holder.clone());
            child.kill().unwrap();
        }),
    )
    .unwrap();
    let holder = told.unwrap();
    assert_eq!((holder.pid, holder.command.as_str()), (Some(pid), "crash child"));
    assert_healthy(&store);
    child.wait().unwrap();
    reader.join().unwrap();
}
