//! What a power cut leaves of a store: a child works on a file system whose disk is being watched, says what it has done,
//! and waits. Then the power is cut at every flush and every write, with nothing and with something of the unflushed
//! lost, and each time the store is opened again: all that had been said is there, nothing else is in the way, and a
//! check finds nothing wrong.
//!
//! What shows that the store's invariants hold after each cut, and where else they are shown:
//!
//! | invariant | here | elsewhere |
//! |---|---|---|
//! | I1 nothing visible is half | a check of the graph after each cut, one of all data after every eighth; then files of records that were written through a mount are read through one | `script.rs` of the CLI |
//! | I2 what is acknowledged is durable | each thing that the child had said is asked for | `batch/power.rs` of the store: rows |
//! | I3 what is not is absent or whole | names that the step touched resolve or do not; the check finds nothing either way | |
//! | I4 references resolve | the check of the graph | |
//! | I5 bytes without rows are found and freed by the next start | the check, which finds none; `du` knows of no orphans | `killed_anywhere_the_store_opens_with_all_that_was_acknowledged` |
//! | I6 rows go before bytes, and again is no harm | after every eighth cut a collection, then the check, then a collection that finds nothing | `gc_killed_anywhere_is_finished_by_the_next` |
//! | I7 nothing that is referenced is collected | after that collection all things are asked for again | |
//! | I8 sums and counts are what a recount gives | the check makes all that is derived again | `killed_anywhere_the_store_opens_with_all_that_was_acknowledged` |
//! | I9 parents make no ring, chain IDs are right | the check of records and of chains | |
//! | I10 every start succeeds, soon, and tells nobody of trouble | the opening: it may not warn | `i10_a_catalogue_with_flipped_bits_is_reported_and_never_panics_at_open` |
//! | I11 a second cut during recovery | every sixteenth is cut again, four times | `i11_a_kill_during_recovery_is_recovered_from` |
//! | I12 a sync that fails is never taken for one that did not | no disk here fails | `any_call_that_fails_acknowledges_nothing_and_takes_nothing_that_was` of the store, `script.rs` |
//! | I13 on a full disk one can read and remove | no disk here is full | `a_full_disk_fails_the_load_and_the_store_goes_on`, `removing_works_without_a_byte_or_an_inode_free` |
//! | I14 no build needs a history of builds | there is none | |
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
use plies_engine::{DriverKind, Engine, EngineOptions, FsckDepth, FsckRequest, GcMode, Input, Output, SaveFormat};
use plies_testkit::image::{Image, Packing};
use plies_testkit::power::{Cut, Disk, FileSystem, draw, possible};
use plies_testkit::scratch::Scratch;
use plies_testkit::tar::{self, Member};
use plies_testkit::tools;

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
    open_with(root, DriverKind::Auto)
}

fn open_with(root: &Path, driver: DriverKind) -> Engine {
    let options = EngineOptions { driver, warn: Arc::new(|error| panic!("{error}")), ..EngineOptions::default() };
    Engine::open(root, options).unwrap()
}

/// A store that the version before this schema made, with its name for it; what that said of it lies beside it.
const OLD_STORE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/tests/stores/schema-1");

/// What a record has in its file `written`.
fn written(number: usize) -> String {
    format!("written {number} ").repeat(500)
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
        ground.file(format!("layer{n}.tar"), tar::archive([&file(format!("registered{n}"), 3000)]));
    }
    // On an image, if it is there: by its layers, without a process.
    for n in 0..6 {
        let dockerfile = format!(
            "FROM image{n}:1 AS base\nWORKDIR /app\nCOPY file /app/file\nFROM scratch\nCOPY --from=base /dir /dir\n\
             ADD file /added\n"
        );
        ground.file(format!("on{n}/Dockerfile"), dockerfile);
        ground.file(format!("on{n}/file"), format!("on{n}").repeat(1000));
    }
    ground.dir("mounted");
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
    let mut pinned: Vec<String> = Vec::new();
    let mut chains: Vec<String> = Vec::new();
    let has_erofs = engine.info().unwrap().erofs_unusable.is_none();
    let cancel = Cancel::new();
    let mut go = String::new();
    for step in 0..number(STEPS, 1) {
        let choice = draw(&mut random);
        let of = |count: usize| (choice >> 32) as usize % count.max(1);
        match choice % 20 {
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
                let made = engine.new_record(Some(&names[of(names.len())]), "power").unwrap().to_string();
                let text = of(100);
                if of(2) == 0 {
                    let at = ground.join("mounted");
                    engine.mount(&made, &at, true).unwrap();
                    fs::write(at.join("written"), written(text)).unwrap();
                    engine.umount(&at).unwrap();
                }
                let id = engine.commit_record(&made).unwrap().to_string();
                say(format_args!("is {id} record"));
                if of(2) == 0 {
                    say(format_args!("wrote {id} {text}"));
                }
                if of(3) == 0 {
                    engine.pin_record(&id, true).unwrap();
                    say(format_args!("is {id} pinned"));
                    pinned.push(id.clone());
                }
                records.push(id);
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
                tell_records(&engine, &mut records, &pinned);
            }
            11 if !names.is_empty() => {
                let name = &names[of(names.len())];
                let format = if of(2) == 0 { SaveFormat::Oci } else { SaveFormat::Docker };
                // What this makes of layers that have no blob yet stays in the store.
                engine
                    .save(std::slice::from_ref(name), format, &Output::Path(ground.join("saved.tar")), &Silent, &cancel)
                    .unwrap();
            }
            12 if !records.is_empty() => {
                engine.export_record(&records[of(records.len())], &ground.join("exported.tar"), &cancel).unwrap();
            }
            13 => {
                let input = Input::Path(ground.join(format!("layer{}.tar", of(5))));
                let parent = chains.get(of(chains.len() + 1));
                let chain =
                    engine.register_layer(&input, parent.map(String::as_str), &Silent, &cancel).unwrap().chain_id;
                say(format_args!("is {chain} chain"));
                chains.push(chain.to_string());
            }
            14 if !chains.is_empty() => {
                let chain = chains.swap_remove(of(chains.len()));
                say(format_args!("touch {chain}"));
                engine.release_layer(&chain).unwrap();
                // It may have been registered twice. Others may count on it, and let go of it when they like.
                if !chains.contains(&chain) {
                    say(format_args!("forget {chain}"));
                }
            }
            15 if !pinned.is_empty() => {
                let id = pinned.swap_remove(of(pinned.len()));
                say(format_args!("is {id} record"));
                engine.pin_record(&id, false).unwrap();
            }
            16 if records.iter().any(|id| !pinned.contains(id)) => {
                let loose: Vec<&String> = records.iter().filter(|id| !pinned.contains(id)).collect();
                say(format_args!("prune one"));
                // What others stand on is refused.
                drop(engine.remove_records(&[loose[of(loose.len())].clone()]));
                tell_records(&engine, &mut records, &pinned);
            }
            17 | 18 if names.iter().any(|name| name.contains("/image")) => {
                let image = names.iter().rfind(|name| name.contains("/image")).unwrap();
                let number = image.trim_end_matches(":1").trim_start_matches("docker.io/library/image");
                let name = format!("docker.io/library/built-on{}:1", of(3));
                say(format_args!("touch {name}"));
                let request = BuildRequest {
                    outputs: vec![BuildOutput::default()],
                    context: ground.join(format!("on{number}")),
                    names: vec![name.clone()],
                    ..BuildRequest::default()
                };
                let built = engine.build(&request, &Silent, &cancel).unwrap();
                say(format_args!("is {name} {}", built.id.unwrap()));
                names.push(name);
            }
            19 if has_erofs => {
                engine.close().unwrap();
                engine = open_with(root.as_ref(), if of(2) == 0 { DriverKind::Erofs } else { DriverKind::Overlay });
                engine.repack(false, &Silent, &cancel).unwrap();
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

/// Says which records are left after some went.
fn tell_records(engine: &Engine, records: &mut Vec<String>, pinned: &[String]) {
    let there: BTreeSet<String> = engine.records().unwrap().iter().map(|row| row.id.clone()).collect();
    records.retain(|id| there.contains(id));
    for id in &there {
        say(format_args!("is {id} {}", if pinned.contains(id) { "pinned" } else { "record" }));
    }
}

/// What is known after a step, and how long the log was when it was said.
#[derive(Debug, Clone, Default)]
struct Known {
    logged: usize,
    /// What a name means, or that a record is there; `None`: that there is none.
    things: BTreeMap<String, Option<String>>,
    /// What a record has in its file.
    texts: BTreeMap<String, usize>,
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
            ["wrote", id, number] => drop(self.texts.insert(id.to_owned(), number.parse().unwrap())),
            ["forget", thing] => drop(self.things.remove(thing)),
            ["gone", thing] => drop(self.things.insert(thing.to_owned(), None)),
            // Those that are left are told.
            ["prune", _] => self.things.retain(|_, what| what.as_deref() != Some("record")),
            _ => {}
        }
    }
}

/// Puts a store of an older version on a disk; what is known of it.
fn put_old_store(disk: &mut Disk) -> Known {
    let told = fs::read(Path::new(OLD_STORE).with_extension("json")).unwrap();
    let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
    let mut unpack = Command::new("tar");
    unpack
        .args(["--xattrs", "--xattrs-include=*", "--zstd", "--transform=s,^root,store,", "-x", "-C"])
        .arg(disk.root());
    tools::run(unpack.arg("-f").arg(Path::new(OLD_STORE).with_extension("tar.zst")));
    rustix::fs::syncfs(fs::File::open(disk.root()).unwrap()).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let images =
        told["images"].as_object().unwrap().iter().map(|(name, image)| (name.clone(), Some(text(&image["id"]))));
    let things = images.chain([(text(&told["chain"]), Some("chain".to_owned()))]).collect();
    Known { logged: disk.logged(), things, ..Known::default() }
}

/// Runs the child on a disk; what it knew after each step.
fn work(disk: &mut Disk, ground: &Scratch, steps: u64, seed: u64, begin: Known) -> Vec<Known> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "power_child", "--nocapture", "--test-threads=1"])
        .envs([(ROOT, disk.root().join("store").as_os_str()), (GROUND, ground.path().as_os_str())])
        .envs([(STEPS, steps.to_string()), (SEED, seed.to_string())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut next = begin.clone();
    let mut all = vec![begin];
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

/// All that was known to be there is, and what was known to be gone is not.
fn compare(engine: &Engine, known: &Known, context: &str) {
    for (thing, what) in known.things.iter().filter(|(thing, _)| !known.touched.contains(*thing)) {
        match what.as_deref() {
            Some("record") if known.prunes => {}
            Some("record" | "pinned") => {
                let id = engine.get_record(thing, &Cancel::new());
                assert_eq!(id.unwrap_or_else(|error| panic!("{context}: {thing}: {error}")).to_string(), *thing);
            }
            Some("chain") => drop(engine.layer(thing).unwrap_or_else(|error| panic!("{context}: {thing}: {error}"))),
            Some(id) => {
                let found = engine.inspect(thing).unwrap_or_else(|error| panic!("{context}: {thing}: {error}"));
                assert_eq!(found.summary.id.to_string(), *id, "{context}: {thing}");
            }
            None => drop(engine.inspect(thing).expect_err(context)),
        }
    }
}

/// What was written into records through a mount is read through one.
fn read_texts(engine: &Engine, known: &Known, at: &Path, context: &str) {
    let sure = |id: &String| match known.things.get(id) {
        Some(Some(what)) => what == "pinned" || what == "record" && !known.prunes,
        _ => false,
    };
    for (id, number) in known.texts.iter().filter(|(id, _)| sure(id)).take(3) {
        engine.mount(id, at, false).unwrap_or_else(|error| panic!("{context}: {id}: {error}"));
        let text = fs::read_to_string(at.join("written"));
        engine.umount(at).unwrap();
        assert_eq!(
            text.unwrap_or_else(|error| panic!("{context}: {id}: {error}")),
            written(*number),
            "{context}: {id}"
        );
    }
}

/// Opens the store that is left and compares it with what was known. `mount_at`: all data is read, and what nothing needs is
/// collected.
fn judge(root: &Path, known: &Known, mount_at: Option<&Path>, context: &str) {
    if known.things.is_empty() && !root.exists() {
        return;
    }
    let began = Instant::now();
    let engine = open(root);
    assert!(began.elapsed().as_secs() < 60, "{context}: opened after {:?}", began.elapsed());
    let check = |depth: FsckDepth| {
        let report = engine.fsck(&FsckRequest { depth, ..FsckRequest::default() }, &Silent, &Cancel::new()).unwrap();
        // What was mounted by hand is forgotten by the next collection, or whoever mounts next.
        let left: Vec<_> = report.left.iter().filter(|finding| finding.code != "mount-gone").collect();
        assert!(left.is_empty(), "{context}: {left:#?}");
        assert_eq!(engine.usage_totals().unwrap().totals["orphans"], 0, "{context}");
    };
    check(if mount_at.is_some() { FsckDepth::Data(100) } else { FsckDepth::Graph });
    compare(&engine, known, context);
    if let Some(at) = mount_at {
        read_texts(&engine, known, at, context);
        engine.gc(GcMode::Run).unwrap();
        check(FsckDepth::Graph);
        compare(&engine, known, context);
        let again = engine.gc(GcMode::Run).unwrap().removed;
        assert!(again.is_empty(), "{context}: a second collection found {again:?}");
    }
    engine.close().unwrap();
}

/// What is on the disk to begin with.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Begin {
    Nothing,
    OldStore,
}

fn cut_everywhere(file_system: FileSystem, begin: Begin) {
    if !possible() {
        return;
    }
    let (steps, some) = match begin {
        Begin::Nothing => (sample(STEPS, 25, 2000), sample(CUTS, 60, 1500)),
        // The first step's opening migrates it.
        Begin::OldStore => (2, sample(CUTS, 20, 500)),
    };
    let seed = number(SEED, 1);
    let scratch = Scratch::new();
    prepare(&scratch);
    let mut disk = Disk::new(&scratch, "disk", file_system);
    let begun = match begin {
        Begin::Nothing => Known::default(),
        Begin::OldStore => put_old_store(&mut disk),
    };
    let from = begun.logged;
    let known = work(&mut disk, &scratch, steps, seed, begun);
    let recording = disk.end();
    let mut random = seed;
    // Spread over all of them.
    let all: Vec<Cut> = recording.cuts(8).into_iter().filter(|cut| cut.logged >= from).collect();
    let cuts: BTreeSet<Cut> = match some {
        0 => all.into_iter().collect(),
        some => (0..some).map(|_| all[(draw(&mut random) % all.len() as u64) as usize].clone()).collect(),
    };
    let (mut number, mut again) = (0, 0);
    recording.cut_at(&cuts, |cut, left, image| {
        let known = known.iter().rfind(|known| known.logged <= cut.logged).unwrap();
        let context = format!("{file_system:?}, seed {seed}, {cut:?}");
        number += 1;
        let mount_at = (number % 8 == 0).then(|| scratch.join("mounted"));
        // And the power goes again while it recovers.
        if number % 16 == 1 {
            let disk = Disk::from_image(&scratch, "again", file_system, image);
            judge(&disk.root().join("store"), known, None, &context);
            let recovery = disk.end();
            let all = recovery.cuts(2);
            let cuts = (0..4).map(|_| all[(draw(&mut random) % all.len() as u64) as usize].clone()).collect();
            recovery.cut_at(&cuts, |second, left, _| {
                again += 1;
                judge(&left.join("store"), known, None, &format!("{context}, then {second:?}"));
            });
            fs::remove_dir_all(scratch.join("again")).unwrap();
        }
        judge(&left.join("store"), known, mount_at.as_deref(), &context);
    });
    let what = match begin {
        Begin::Nothing => "power cuts",
        Begin::OldStore => "power cuts of a migration",
    };
    println!(
        "{what} on {file_system:?}: {number} cuts and {again} second ones in {} writes of {steps} steps, {SEED}={seed}; \
         0 failures",
        recording.logged() - from
    );
}

#[test]
fn privileged_power_cuts_on_ext4_lose_nothing_that_was_said() {
    cut_everywhere(FileSystem::Ext4, Begin::Nothing);
}

#[test]
fn privileged_power_cuts_on_ext4_that_does_not_order_data_lose_nothing_that_was_said() {
    cut_everywhere(FileSystem::Ext4Writeback, Begin::Nothing);
}

#[test]
fn privileged_power_cuts_on_btrfs_lose_nothing_that_was_said() {
    cut_everywhere(FileSystem::Btrfs, Begin::Nothing);
}

#[test]
fn privileged_power_cuts_during_a_migration_leave_the_old_store_or_the_new_one() {
    // Its rows know what its layers cost where it was made, on ext4.
    for file_system in [FileSystem::Ext4, FileSystem::Ext4Writeback] {
        cut_everywhere(file_system, Begin::OldStore);
    }
}
