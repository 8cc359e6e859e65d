//! What a power cut leaves of a store: a child works on a file system whose disk is being watched, says what it has done,
//! and waits. Then the power is cut at every flush and every write, with nothing and with something of the unflushed
//! lost, and each time the store is opened again: all that had been said is there, nothing else is in the way, and a
//! check finds nothing wrong.
//!
//! `PLIES_POWER_STEPS`, `PLIES_POWER_CUTS` (0: all that there are) and `PLIES_POWER_SEED` make it another, and `PLIES_CHAOS`
//! (`just chaos`) a long one.

// Clippy's allowance for tests stops at their helpers, and all of this is a test.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use plies_cache::PruneOptions;
use plies_engine::build::{BuildOutput, BuildRequest};
use plies_engine::exec::Cancel;
use plies_engine::progress::Silent;
use plies_engine::{Engine, EngineOptions, FsckDepth, FsckRequest, GcMode, Input};
use plies_testkit::image::{Image, Packing};
use plies_testkit::power::{Cut, Disk, FileSystem, draw, possible};
use plies_testkit::scratch::Scratch;
use plies_testkit::tar::Member;

const ROOT: &str = "PLIES_TEST_POWER_ROOT";
const GROUND: &str = "PLIES_TEST_POWER_GROUND";
const SEED: &str = "PLIES_POWER_SEED";
const STEPS: &str = "PLIES_POWER_STEPS";
const CUTS: &str = "PLIES_POWER_CUTS";

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

/// Some of what can be tried in every run of the tests, and far more of it in a long one.
fn sample(name: &str, few: u64, many: u64) -> u64 {
    number(name, if std::env::var_os("PLIES_CHAOS").is_some() { many } else { few })
}

fn open(root: &Path) -> Engine {
    let options = EngineOptions { warn: Arc::new(|error| panic!("{error}")), ..EngineOptions::default() };
    Engine::open(root, options).unwrap()
}

/// Archives of images that share layers, and contexts to build from.
fn prepare(ground: &Scratch) {
    let file = |name: String, len: usize| Member::file(&name, name.repeat(len));
    for n in 0..6 {
        let image = Image::new(&format!("image{n}:1"))
            .layer(&[file(format!("base{}", n % 2), 500), Member::dir("dir")], Packing::Gzip)
            .layer(&[file(format!("dir/own{n}"), 2000), Member::symlink("link", "dir")], Packing::ALL[n % 3]);
        image.write_oci_tar(&ground.join(format!("image{n}.tar")));
    }
    for n in 0..5 {
        ground.file(format!("context{n}/file"), format!("{n}").repeat(3000));
        let second = format!("FROM scratch\nCOPY file /file\nCOPY file /again{}\n", n % 2);
        ground.file(format!("context{n}/Dockerfile"), second);
    }
}

/// One line of what the child says.
fn say(line: std::fmt::Arguments<'_>) {
    println!("\npower {line}");
    drop(std::io::stdout().flush());
}

/// Works until it has made all its steps. Does nothing unless the parent started it.
#[test]
fn power_child() {
    let (Ok(root), Ok(ground)) = (std::env::var(ROOT), std::env::var(GROUND)) else { return };
    let ground = Path::new(&ground);
    let mut random = number(SEED, 1);
    let mut engine = open(root.as_ref());
    let mut names: Vec<String> = Vec::new();
    let mut records: Vec<String> = Vec::new();
    let cancel = Cancel::new();
    let mut go = String::new();
    for step in 0..number(STEPS, 1) {
        let choice = draw(&mut random);
        let of = |count: usize| (choice >> 32) as usize % count.max(1);
        match choice % 12 {
            0 | 1 => {
                let n = of(6);
                let name = format!("docker.io/library/image{n}:1");
                say(format_args!("touch {name}"));
                let loaded = engine.load(&Input::Path(ground.join(format!("image{n}.tar"))), None, &Silent, &cancel);
                say(format_args!("is {name} {}", loaded.unwrap()[0].id));
                names.push(name);
            }
            2 | 3 => {
                let name = format!("docker.io/library/built{}:1", of(4));
                say(format_args!("touch {name}"));
                let request = BuildRequest {
                    outputs: vec![BuildOutput::default()],
                    context: ground.join(format!("context{}", of(5))),
                    names: vec![name.clone()],
                    ..BuildRequest::default()
                };
                let built = engine.build(&request, &Silent, &cancel).unwrap();
                say(format_args!("is {name} {}", built.id.unwrap()));
                names.push(name);
            }
            4 if !names.is_empty() => {
                let (source, target) = (&names[of(names.len())], format!("docker.io/library/tag{}:1", of(3)));
                say(format_args!("touch {target}"));
                let id = engine.tag(source, &target).unwrap();
                say(format_args!("is {target} {id}"));
                names.push(target);
            }
            5 if names.len() > 2 => {
                let name = names[of(names.len())].clone();
                say(format_args!("touch {name}"));
                engine.remove_images(std::slice::from_ref(&name)).unwrap();
                say(format_args!("gone {name}"));
                names.retain(|other| *other != name);
            }
            6 | 7 if !names.is_empty() => {
                let made = engine.new_record(Some(&names[of(names.len())]), "power").unwrap();
                let id = engine.commit_record(&made.to_string()).unwrap();
                say(format_args!("is {id} record"));
                if of(3) == 0 {
                    engine.pin_record(&id.to_string(), true).unwrap();
                    say(format_args!("is {id} pinned"));
                }
                records.push(id.to_string());
            }
            8 if records.len() > 1 => {
                let two = [records[of(records.len())].clone(), records[0].clone()];
                if let Some(id) = engine.merge_records(&two).unwrap() {
                    say(format_args!("is {id} record"));
                    records.push(id.to_string());
                }
            }
            9 if records.len() > 1 => {
                let id = engine.diff_records(&records[0], &records[of(records.len())], &cancel);
                // From a tree to itself there is nothing.
                if let Ok(id) = id {
                    say(format_args!("is {id} record"));
                    records.push(id.to_string());
                }
            }
            10 => {
                say(format_args!("prune all"));
                let rule =
                    PruneOptions { all: true, max_used_space_bytes: 1 + of(20_000) as u64, ..PruneOptions::default() };
                engine.prune(&rule, false, &cancel).unwrap();
                let there: BTreeSet<String> = engine.records().unwrap().iter().map(|row| row.id.clone()).collect();
                records.retain(|id| there.contains(id));
                for id in &there {
                    say(format_args!("is {id} record"));
                }
            }
            _ => {
                engine.gc(if of(2) == 0 { GcMode::Run } else { GcMode::Full }).unwrap();
                engine.close().unwrap();
                engine = open(root.as_ref());
            }
        }
        records.sort();
        records.dedup();
        names.sort();
        names.dedup();
        say(format_args!("done {step}"));
        // The parent looks how much has been written before anything else is.
        go.clear();
        std::io::stdin().read_line(&mut go).unwrap();
    }
    engine.close().unwrap();
}

/// What is known after a step, and how long the log was when it was said.
#[derive(Debug, Clone, Default)]
struct Known {
    logged: usize,
    /// What a name means, or that a record is there; `None`: that there is none.
    things: BTreeMap<String, Option<String>>,
    /// What the next step may have changed when it is interrupted.
    touched: BTreeSet<String>,
    /// It may have removed any record that is not pinned.
    prunes: bool,
}

impl Known {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["is", thing, what] => drop(self.things.insert(thing.to_owned(), Some(what.to_owned()))),
            ["gone", thing] => drop(self.things.insert(thing.to_owned(), None)),
            // Those that are left are told.
            ["prune", _] => self.things.retain(|_, what| what.as_deref() != Some("record")),
            _ => {}
        }
    }
}

/// Runs the child on a disk; what it knew after each step.
fn work(disk: &mut Disk, ground: &Scratch, steps: u64, seed: u64) -> Vec<Known> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "power_child", "--nocapture", "--test-threads=1"])
        .envs([(ROOT, disk.root().join("store").as_os_str()), (GROUND, ground.path().as_os_str())])
        .envs([(STEPS, steps.to_string()), (SEED, seed.to_string())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut all = vec![Known::default()];
    let mut next = Known::default();
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap) {
        let Some(line) = line.strip_prefix("power ") else { continue };
        let before = all.last_mut().unwrap();
        match line.split_once(' ').unwrap() {
            ("touch", name) => drop(before.touched.insert(name.to_owned())),
            ("done", _) => {
                next.logged = disk.logged();
                all.push(next.clone());
                input.write_all(b"go\n").unwrap();
            }
            (word, _) => {
                before.prunes |= word == "prune";
                next.hear(line);
            }
        }
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(all.len() as u64, steps + 1);
    all
}

/// Opens the store that is left and compares it with what was known.
fn judge(root: &Path, known: &Known, depth: FsckDepth, context: &str) {
    if known.things.is_empty() && !root.exists() {
        return;
    }
    let began = Instant::now();
    let engine = open(root);
    assert!(began.elapsed().as_secs() < 60, "{context}: opened after {:?}", began.elapsed());
    let report = engine.fsck(&FsckRequest { depth, ..FsckRequest::default() }, &Silent, &Cancel::new()).unwrap();
    assert!(report.left.is_empty(), "{context}: {:#?}", report.left);
    for (thing, what) in known.things.iter().filter(|(thing, _)| !known.touched.contains(*thing)) {
        match what.as_deref() {
            Some("record") if known.prunes => {}
            Some("record" | "pinned") => {
                let id = engine.get_record(thing, &Cancel::new());
                assert_eq!(id.unwrap_or_else(|error| panic!("{context}: {thing}: {error}")).to_string(), *thing);
            }
            Some(id) => {
                let found = engine.inspect(thing).unwrap_or_else(|error| panic!("{context}: {thing}: {error}"));
                assert_eq!(found.summary.id.to_string(), *id, "{context}: {thing}");
            }
            None => drop(engine.inspect(thing).expect_err(context)),
        }
    }
    engine.close().unwrap();
}

fn cut_everywhere(file_system: FileSystem) {
    if !possible() {
        return;
    }
    let (steps, some, seed) = (sample(STEPS, 25, 2000), sample(CUTS, 60, 2500), number(SEED, 1));
    let scratch = Scratch::new();
    prepare(&scratch);
    let mut disk = Disk::new(&scratch, "disk", file_system);
    let known = work(&mut disk, &scratch, steps, seed);
    let recording = disk.end();
    let mut random = seed;
    // Spread over all of them.
    let all = recording.cuts(8);
    let cuts: BTreeSet<Cut> = match some {
        0 => all.into_iter().collect(),
        some => (0..some).map(|_| all[(draw(&mut random) % all.len() as u64) as usize].clone()).collect(),
    };
    let (mut number, mut again) = (0, 0);
    recording.cut_at(&cuts, |cut, left, image| {
        let known = known.iter().rfind(|known| known.logged <= cut.logged).unwrap();
        let context = format!("{file_system:?}, seed {seed}, {cut:?}");
        number += 1;
        let depth = if number % 8 == 0 { FsckDepth::Data(100) } else { FsckDepth::Graph };
        // And the power goes again while it recovers.
        if number % 16 == 1 {
            let disk = Disk::from_image(&scratch, "again", file_system, image);
            judge(&disk.root().join("store"), known, FsckDepth::Graph, &context);
            let recovery = disk.end();
            let all = recovery.cuts(2);
            let cuts = (0..4).map(|_| all[(draw(&mut random) % all.len() as u64) as usize].clone()).collect();
            recovery.cut_at(&cuts, |second, left, _| {
                again += 1;
                judge(&left.join("store"), known, FsckDepth::Graph, &format!("{context}, then {second:?}"));
            });
            fs::remove_dir_all(scratch.join("again")).unwrap();
        }
        judge(&left.join("store"), known, depth, &context);
    });
    println!(
        "power cuts on {file_system:?}: {number} cuts and {again} second ones in {} writes of {steps} steps, {SEED}={seed}; \
         0 failures",
        recording.logged()
    );
}

#[test]
fn privileged_power_cuts_on_ext4_lose_nothing_that_was_said() {
    cut_everywhere(FileSystem::Ext4);
}

#[test]
fn privileged_power_cuts_on_ext4_that_does_not_order_data_lose_nothing_that_was_said() {
    cut_everywhere(FileSystem::Ext4Writeback);
}

#[test]
fn privileged_power_cuts_on_btrfs_lose_nothing_that_was_said() {
    cut_everywhere(FileSystem::Btrfs);
}
