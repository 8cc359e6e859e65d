//! What a kill leaves of the cache. Half-done states of a single record are built by hand in `refs.rs` (a28, a29, a33);
//! here the test binary runs itself as a child that works without end, kills it at many points, and judges what it finds.
//!
//! The list of crash points (behaviours, 1.5) in our terms: a record, its files' hold and its indexes are one transaction,
//! so that there is no moment between lease and row, row and flag, snapshot and link, mark and removal. What can be half
//! done is a directory that no row names, and a row that was never synced.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use common::Op::File;
use common::{Cache, Rig, assert_idle, assert_sound, tree, tree_after, tree_of_mutable, write};
use plies_cache::{ImmutableRef, RecordId, RecordOptions, State};
use plies_store::{GcMode, Resource, SnapshotError};
use plies_testkit::kill::{self, KillPoint, Outcome};
use plies_testkit::{scratch::Scratch, tools};

const ROOT: &str = "PLIES_TEST_CACHE_ROOT";
/// What the child does: one of the names below.
const WHAT: &str = "PLIES_TEST_CACHE_WHAT";

fn by() -> RecordOptions {
    RecordOptions::by("crash")
}

fn retained() -> RecordOptions {
    RecordOptions { retain: Some(true), ..by() }
}

fn say(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    // The parent may be gone already.
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn open_at(root: &Path) -> (Rig, Cache) {
    let rig = Rig::at(root);
    let cache = rig.open();
    (rig, cache)
}

fn child(test: &str, root: &Path, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ROOT, root).env(WHAT, what);
    command
}

/// The child that goes on for ever. Does nothing unless the parent started it.
#[test]
fn crash_child() {
    let Ok(root) = std::env::var(ROOT) else { return };
    let (_rig, cache) = open_at(root.as_ref());
    say(format_args!("begin"));
    let mut kept: Vec<ImmutableRef> = Vec::new();
    for n in 0.. {
        let parent = kept.last().cloned();
        // One that is retained: a cache mount.
        let work = cache.create(None, &retained()).unwrap();
        say(format_args!("mutable {}", work.id()));
        write(&work, &[File("mount", "m")]);
        if n % 2 == 0 {
            let made = work.commit().unwrap();
            say(format_args!("pair {}", made.id()));
            if n % 4 == 0 {
                made.finalize().unwrap();
                say(format_args!("mount {}", made.id()));
            }
        } else {
            drop(work);
            say(format_args!("released {n}"));
        }
        // A step.
        let work = cache.create(parent.as_ref(), &by()).unwrap();
        write(&work, &[File("step", "s")]);
        say(format_args!("written {n}"));
        let made = work.commit().unwrap();
        say(format_args!("committed {n}"));
        made.finalize().unwrap();
        cache.set_value(made.id(), "n", &n.to_string(), Some("steps")).unwrap();
        say(format_args!("step {}", made.id()));
        if let Some(parent) = &parent {
            let merge = cache.merged(&[&made, parent]);
            say(format_args!("step {}", merge.id()));
            tree(&merge);
            let diff = cache.diffed(parent, &made);
            say(format_args!("diff {}", diff.id()));
            let ids = [merge.id()];
            drop((merge, diff));
            say(format_args!("removing {}", ids[0]));
            cache.remove(&ids).unwrap();
            say(format_args!("removed {}", ids[0]));
        }
        kept.push(made);
        if kept.len() == 4 {
            kept.clear();
            say(format_args!("collecting {n}"));
            cache.store.gc(GcMode::Run).unwrap();
        }
    }
}

/// What the child said that there is, and what that shows.
#[derive(Default)]
struct Acknowledged {
    records: BTreeMap<String, &'static str>,
    removed: Vec<String>,
}

impl Acknowledged {
    fn hear(&mut self, line: &str) {
        let Some((word, rest)) = line.split_once(' ') else { return };
        let kind = match word {
            "mutable" => "mutable",
            "pair" | "mount" => "mount",
            "step" => "step",
            "diff" => "diff",
            "removing" => {
                self.records.remove(rest);
                return;
            }
            "removed" => return self.removed.push(rest.to_owned()),
            _ => return,
        };
        self.records.insert(rest.to_owned(), kind);
    }
}

fn run_and_kill(root: &Path, after_lines: usize) -> Acknowledged {
    let mut child = child("crash_child", root, "").stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
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

fn judge(root: &Path, said: &Acknowledged, context: &str) {
    let (rig, cache) = open_at(root);
    // No lease without its process, no row without its files, no unfinished tree, before anything is collected.
    assert_idle(&cache);
    assert_sound(&cache);
    cache.store.gc(GcMode::Run).unwrap();
    assert_sound(&cache);
    for (id, kind) in &said.records {
        let found = cache.find(id);
        if *kind == "mutable" {
            // It may have been finalized since; if it is there, it can be written to.
            let Ok(id) = found else { continue };
            let row = cache.must(id);
            let State::Mutable { committed_as, .. } = row.state else { panic!("{context}: {row:?}") };
            if committed_as.is_none() {
                tree_of_mutable(&cache.get_mutable(id, &by()).unwrap());
            }
            continue;
        }
        let id = found.unwrap_or_else(|error| panic!("{context}: {kind} {id}: {error}"));
        let held = cache.get(id, &by()).unwrap_or_else(|error| panic!("{context}: {kind} {id}: {error}"));
        let expected = match *kind {
            "mount" => tree_after(&[File("mount", "m")]),
            _ => tree_after(&[File("step", "s")]),
        };
        assert_eq!(tree(&held), expected, "{context}: {kind} {id}");
    }
    for id in &said.removed {
        assert!(cache.find(id).unwrap_err().is_not_found(), "{context}: {id}");
    }
    // Every record that there is can be had, acknowledged or not.
    for id in cache.ids() {
        match cache.get(id, &by()) {
            Ok(held) => drop(tree(&held)),
            Err(error) => assert!(cache.row(id).is_none(), "{context}: {id}: {error:?}"),
        }
    }
    assert_sound(&cache);
    rig.assert_no_warnings();
    cache.close();
}

#[test]
fn killed_anywhere_the_cache_opens_with_all_that_was_acknowledged() {
    let rig = Rig::new();
    for round in 0..30 {
        let lines = round * 7 % 47;
        let said = run_and_kill(&rig.root(), lines);
        judge(&rig.root(), &said, &format!("round {round}, killed after {lines} lines"));
    }
}

/// The child that does one thing to a retained record, to be killed at each of its system calls.
#[test]
fn one_step_child() {
    let (Ok(root), Ok(what)) = (std::env::var(ROOT), std::env::var(WHAT)) else { return };
    let (_rig, cache) = open_at(root.as_ref());
    let mutable = cache.ids().into_iter().find(|id| cache.must(*id).is_mutable()).unwrap();
    match what.as_str() {
        "commit" => drop(cache.get(mutable, &by()).unwrap()),
        "finalize" => cache.get(mutable, &by()).unwrap().finalize().unwrap(),
        "undo" => drop(cache.get_mutable(mutable, &by()).unwrap()),
        "remove" => cache.remove(&[mutable]).unwrap(),
        "seal" => drop(cache.get_mutable(mutable, &by()).unwrap().seal(&[], None).unwrap()),
        other => panic!("{other}"),
    }
    cache.close();
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

/// Kills one operation on a retained record at its system calls; each time, the record is as before or as after.
fn killed_within(what: &str, committed_before: bool, judge: impl Fn(&Cache, RecordId, &str)) {
    if !tools::have(&["strace", "cp"]) {
        return;
    }
    let scratch = Scratch::new();
    let before = scratch.join("before");
    let id = {
        let (_rig, cache) = open_at(&before);
        let work = cache.create(None, &retained()).unwrap();
        write(&work, &[File("f", "text")]);
        let id = work.id();
        if committed_before {
            drop(work.commit().unwrap());
        } else {
            drop(work);
        }
        cache.close();
        id
    };
    let root = scratch.join("store");
    copy(&before, &root);
    let counts = kill::count(&child("one_step_child", &root, what), &scratch.join("log"));
    let mut killed = 0;
    let points: Vec<KillPoint> = kill::spread(&counts, 3);
    for point in points {
        copy(&before, &root);
        let outcome = kill::kill_at(&child("one_step_child", &root, what), &point);
        killed += usize::from(matches!(outcome, Outcome::Killed));
        let context = format!("{what} killed at {point}");
        let (_rig, cache) = open_at(&root);
        assert_idle(&cache);
        assert_sound(&cache);
        judge(&cache, id, &context);
        assert_sound(&cache);
        cache.store.gc(GcMode::Run).unwrap();
        let layers: Vec<_> = fs::read_dir(root.join("layers"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "stage")
            .collect();
        assert!(layers.len() <= 1, "{context}: {layers:?}");
        assert_sound(&cache);
        cache.close();
    }
    assert!(killed > 10, "{what}: {killed}");
}

fn shows_the_file(cache: &Cache, held: &ImmutableRef, context: &str) {
    assert_eq!(tree(held), tree_after(&[File("f", "text")]), "{context}");
    assert!(cache.row(held.id()).is_some());
}

#[test]
fn crash_point_after_a_lazy_commit_or_before_it() {
    killed_within("commit", false, |cache, id, context| {
        // The mutable is there whatever happened, and leads to the one immutable.
        let held = cache.get(id, &by()).unwrap();
        shows_the_file(cache, &held, context);
    });
}

#[test]
fn crash_point_within_finalize() {
    killed_within("finalize", true, |cache, id, context| {
        let others: Vec<RecordId> = cache.ids().into_iter().filter(|other| *other != id).collect();
        let [immutable] = others[..] else { panic!("{context}: {others:?}") };
        match cache.must(immutable).state {
            // Before: a pair. After: by itself. Never a pair with half of it gone.
            State::Shared { mutable, .. } => assert_eq!(mutable, id, "{context}"),
            State::Sealed { layer: Some(_) } => assert!(cache.row(id).is_none(), "{context}"),
            other => panic!("{context}: {other:?}"),
        }
        shows_the_file(cache, &cache.get(immutable, &by()).unwrap(), context);
    });
}

#[test]
fn crash_point_within_the_undoing_of_a_commit() {
    killed_within("undo", true, |cache, id, context| {
        let held = cache.get_mutable(id, &by()).unwrap();
        assert_eq!(cache.ids().len(), 1);
        assert_eq!(tree_of_mutable(&held), tree_after(&[File("f", "text")]), "{context}");
    });
}

#[test]
fn crash_point_within_the_removal_of_a_pair() {
    killed_within("remove", true, |cache, _, context| {
        // Both or neither.
        assert!(matches!(cache.ids().len(), 0 | 2), "{context}: {:?}", cache.ids());
    });
}

#[test]
fn crash_point_within_seal() {
    killed_within("seal", false, |cache, id, context| {
        let ids: Vec<RecordId> = cache.ids().into_iter().collect();
        assert_eq!(ids.len(), 1, "{context}");
        assert!(ids[0] == id || cache.row(id).is_none(), "{context}");
        shows_the_file(cache, &cache.get(ids[0], &by()).unwrap(), context);
    });
}

#[test]
fn files_that_no_row_names_go_at_the_next_start() {
    // After the directory was made, before its record: the lease held it, and ended with the process.
    let rig = Rig::new();
    let cache = rig.open();
    let lease = cache.store.lease(plies_store::LeaseOptions::process("died")).unwrap();
    let options = plies_store::ActiveOptions { volatile: false };
    let active = cache.store.snapshots().prepare(None, &lease, options).unwrap();
    std::mem::forget(lease);
    let Cache { manager, accessor, store } = cache;
    drop((manager, accessor));
    let root = store.root().to_owned();
    // As it is on disk now: nobody closed it.
    let copied = Rig::new();
    copy(&root, &copied.root());
    let cache = copied.open();
    assert_idle(&cache);
    cache.store.gc(GcMode::Run).unwrap();
    assert!(matches!(cache.store.snapshots().active(active), Err(SnapshotError::NotFound { .. })));
    assert_eq!(fs::read_dir(copied.root().join("active")).unwrap().count(), 0);
    assert_sound(&cache);
}

#[test]
fn an_unfinished_pair_of_a_dead_process_is_gone_with_its_holds() {
    let rig = Rig::new();
    let cache = rig.open();
    let base = cache.finalized(None, &[File("base", "")]);
    let work = cache.create(Some(&base), &by()).unwrap();
    let pair = cache.create(Some(&base), &by()).unwrap().commit().unwrap();
    let ids = [work.id(), pair.id()];
    // A durable write, so that their rows are on disk.
    cache.pin(base.id(), true).unwrap();
    let copied = Rig::new();
    copy(&rig.root(), &copied.root());
    {
        let cache = copied.open();
        for id in ids {
            assert!(cache.get(id, &by()).unwrap_err().is_not_found());
            assert!(common::holds_of(&cache, id).is_empty());
        }
        assert_eq!(cache.ids().len(), 1);
        assert_sound(&cache);
        cache.store.gc(GcMode::Run).unwrap();
        assert_eq!(fs::read_dir(copied.root().join("active")).unwrap().count(), 0);
        // The base lost its children, and can be removed.
        cache.remove(&[base.id()]).unwrap();
        assert!(
            cache
                .store
                .gc(GcMode::Run)
                .unwrap()
                .collected
                .iter()
                .any(|gone| matches!(gone.resource, Resource::Layer(_)))
        );
        assert_sound(&cache);
    }
    drop((work, pair, base));
}
