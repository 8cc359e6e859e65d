//! Space, full disks, broken stores, and what is printed about hostile names.

use std::{ffi::OsString, fs, path::Path, process::Command};

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::{Ply, Ran},
    scratch::{FileSystem, Scratch},
    tar::Member,
    tools,
    tree::Tree,
};
use serde_json::json;

use crate::common::{Context, Shape, State, busybox, everything, load, store, tree_of};

/// What du(1) says of a directory, without the database, which grows and shrinks by pages as it likes.
fn disk_bytes(root: &Path) -> u64 {
    let mut du = Command::new("du");
    du.args(["-x", "-s", "--block-size=1", "--exclude=plies.redb"]).arg(root);
    let output = tools::output_of(&mut du);
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

fn number(value: &serde_json::Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

#[test]
fn du_adds_up_and_is_what_the_disk_says() {
    let Some(ply) = store() else { return };
    load(&ply, &everything("localhost/everything:1", Packing::Gzip));
    let noise: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    load(&ply, &Image::new("localhost/noise:1").layer(&[Member::file("noise", noise)], Packing::Gzip));
    let context = Context::new(&ply, "FROM localhost/noise:1\nCOPY f /f\n");
    context.file("f", vec![1; 500_000]);
    context.build(&[]);
    // Uppers: of a record, and of a mount that is still there.
    let record = ply.ok(args!["ref", "new"]).stdout.trim().to_owned();
    fs::write(ply.mount_with(&record, args!["--rw"]).path().join("f"), vec![1; 300_000]).unwrap();
    let mounted = ply.mount_with("localhost/noise:1", args!["--rw"]);
    fs::write(mounted.path().join("g"), vec![1; 70_000]).unwrap();
    // What was not finished, and what somebody has put there.
    let ingest = ply.root().join("content/ingest").join("0a".repeat(32));
    fs::create_dir(&ingest).unwrap();
    fs::write(ingest.join("ref"), "half").unwrap();
    fs::write(ingest.join("data"), vec![1; 40_000]).unwrap();
    fs::create_dir(ply.root().join("layers/stranger")).unwrap();
    fs::write(ply.root().join("layers/stranger/f"), vec![1; 90_000]).unwrap();

    let usage = ply.json(args!["du"]);
    let totals = usage["totals"].as_object().unwrap();
    let total = number(&usage["total_bytes"]);
    assert_eq!(totals.values().map(number).sum::<u64>(), total, "{usage:#}");
    for (kind, rows) in
        [("layers", "layer"), ("blobs", "blob"), ("actives", "active"), ("ingests", "ingest"), ("orphans", "orphan")]
    {
        let listed = usage["rows"].as_array().unwrap().iter().filter(|row| row["kind"] == rows);
        assert_eq!(listed.map(|row| number(&row["size_bytes"])).sum::<u64>(), number(&totals[kind]), "{usage:#}");
        assert!(number(&totals[kind]) > 0, "{kind}: {usage:#}");
    }
    let records = usage["records"].as_array().unwrap();
    let charged = records.iter().map(|record| number(&record["charged_bytes"])).sum::<u64>();
    assert_eq!(charged, number(&usage["record_totals"]["total_bytes"]), "{usage:#}");
    let parts = ["unique_bytes", "shared_bytes"].map(|part| number(&usage["record_totals"][part]));
    assert_eq!(parts.iter().sum::<u64>(), charged, "{usage:#}");

    // Blobs and ingests are counted by their lengths, all else by its blocks.
    let by_length = number(&usage["counts"]["blobs"]) + number(&usage["counts"]["ingests"]);
    let (said, disk) = (total - number(&totals["catalogue"]), disk_bytes(&ply.root()));
    let apart = disk.abs_diff(said);
    assert!(apart <= by_length * 4096, "ply du says {said}, du(1) {disk}, {apart} apart: {usage:#}");

    // The short form says the same.
    let short = ply.ok(args!["du"]).stdout;
    assert_eq!(short.lines().count(), totals.len() + 2, "{short}");
    let filtered = ply.json(args!["du", "--filter", "mutable"]);
    assert_eq!((filtered["records"].as_array().unwrap().len(), &filtered["rows"]), (1, &json!([])), "{filtered:#}");
    assert_eq!(filtered["records"][0]["id"], json!(record));
    ply.fails(1, args!["du", "--filter", "a==\"b"]);
}

#[test]
fn the_policy_holds_whenever_bytes_are_added() {
    let Some(ply) = store() else { return };
    let capped = |size: &str| {
        let text = format!("[[gc.policy]]\nall = true\nmax-used-space = \"{size}\"\n");
        ply.scratch().file("gc.toml", text).into_os_string()
    };
    let with = |size: &str, more: &[OsString]| [args!["--config", capped(size)], more].concat();
    let records = || {
        let records = ply.json(args!["ref", "ls"]);
        records.as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let context = Context::new(&ply, "FROM scratch\nCOPY f /f\n");
    let build = |seed: u32| {
        context.file("f", noise(3_000_000, seed));
        ply.ok(&with("4MB", &context.args(&[])));
        // What an image has as well is the image's.
        ply.ok(args!["rmi", "built"]);
        records()
    };
    let first = build(1);
    assert_eq!((first.len(), build(1)), (1, first.clone()), "the cap is kept, and what was built is there");
    let second = build(2);
    assert!(second.len() == 1 && second != first, "{first:?} made room for {second:?}");
    let info = ply.ok(&with("4MB", args!["info"])).stdout;
    assert!(info.contains("gc rule 1:") && info.contains("all records, at most 4"), "{info}");

    // Two steps of one image are in use at once: then there is nothing that could go.
    context.file("g", noise(3_000_000, 3));
    context.file("Dockerfile", "FROM scratch\nCOPY f /f\nCOPY g /g\n");
    let ran = ply.fails(1, &with("4MB", &context.args(&[])));
    assert!(ran.stderr.contains("max-used-space") && ran.stderr.contains("COPY g /g"), "{ran}");
    assert_eq!(ply.json(args!["images"]), json!([]));
    assert_eq!(records(), second, "what the failed build had made is over the cap");
    ply.ok(&with("8MB", &context.args(&[])));
    ply.ok(args!["rmi", "built"]);
    assert_eq!(records().len(), 2);

    // A load adds bytes, too.
    let path = Image::new("localhost/small:1").layer(&[Member::file("f", "x")], Packing::Gzip);
    let path = path.write_oci_tar(&ply.scratch().join("small.tar"));
    ply.ok(&with("8MB", args!["load", "-i", path]));
    assert_eq!(records().len(), 2, "there is room for all");
    ply.ok(&with("4MB", args!["load", "-i", path]));
    assert_eq!(records(), second);

    // So do the user's own records: what is written through a mount counts once it is over, what is computed at once.
    let dir = ply.scratch().dir("mounted");
    let own = ply.ok(args!["ref", "new"]).stdout.trim().to_owned();
    ply.ok(args!["mount", "--rw", own, dir]);
    std::fs::write(dir.join("f"), noise(3_000_000, 4)).unwrap();
    ply.ok(args!["ref", "pin", own]);
    ply.ok(&with("4MB", args!["umount", dir]));
    assert_eq!(records(), std::slice::from_ref(&own), "{second:?} made room");
    ply.ok(args!["ref", "unpin", own]);
    ply.ok(&with("1MB", args!["ref", "commit", own]));
    assert_eq!(records(), [""; 0]);
    let off = ply.scratch().file("off.toml", "[gc]\nenabled = false\n");
    ply.ok(args!["--config", off, "load", "-i", path]);
    ply.fails(1, args!["--config", ply.scratch().file("bad.toml", "[gc]\nmax-used-space = \"4 apples\"\n"), "info"]);
    assert_eq!(ply.json(args!["gc", "--full"])["repaired_count"], 0);
    ply.fails(2, args!["gc", "--full", "--dry-run"]);
}

#[test]
fn why_leads_up_to_the_roots() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/small:1").layer(&[Member::file("f", "small")], Packing::Gzip));
    let context = Context::new(&ply, "FROM localhost/small:1\nCOPY f /g\n");
    context.file("f", "f");
    context.build(&[]);
    let usage = ply.json(args!["du"]);
    let of_kind = |kind: &str| {
        let rows = usage["rows"].as_array().unwrap().iter().filter(|row| row["kind"] == kind);
        rows.map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    for id in of_kind("layer").iter().chain(&of_kind("blob")) {
        let why = ply.json(args!["why", id]);
        assert_eq!((&why["id"], &why["kept"]), (&json!(id), &json!(true)), "{why:#}");
        assert!(why.to_string().contains("until ply rmi"), "{why:#}");
    }
    let text = ply.ok(args!["why", "localhost/small:1"]).stdout;
    assert!(text.contains("named localhost/small:1, until ply rmi"), "{text}");

    // A record is there until it is pruned, unless it is pinned; one that stands on it keeps it as well.
    let records = ply.json(args!["ref", "ls"]);
    let stands = records.as_array().unwrap().iter().find(|row| !row["parents"].as_array().unwrap().is_empty()).unwrap();
    let (child, parent) = (stands["id"].as_str().unwrap(), stands["parents"][0].as_str().unwrap());
    ply.ok(args!["ref", "pin", child]);
    let why = ply.json(args!["why", parent]);
    assert_eq!(why["root"], "a record of the build cache, until a prune takes it", "{why:#}");
    assert_eq!(why["by"][0]["id"], json!(child), "{why:#}");
    assert_eq!(why["by"][0]["root"], "pinned, until ply ref unpin", "{why:#}");

    // With the image gone, the record alone keeps what it needs; with both gone there is nothing to ask about.
    ply.ok(args!["rmi", "built", "localhost/small:1"]);
    let layer = ply.json(args!["ref", "inspect", child])["layer"].as_str().unwrap().to_owned();
    let why = ply.json(args!["why", layer]);
    assert!(!why.to_string().contains("rmi") && why["by"][0]["id"] == json!(child), "{why:#}");
    ply.ok(args!["ref", "rm", child]);
    let ran = ply.fails(1, args!["why", layer]);
    assert!(ran.stderr.contains(&layer), "{ran}");
    let ran = ply.fails(1, args!["why", "nothing"]);
    assert!(ran.stderr.contains("nothing"), "{ran}");
}

#[test]
fn gc_compacts_the_catalogue_when_asked() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/small:1").layer(&[Member::file("f", "small")], Packing::Gzip));
    let before = State::of(&ply);
    let size = || fs::metadata(ply.root().join("catalog/plies.redb")).unwrap().len();
    let size_before = size();
    ply.ok(args!["gc", "--compact"]);
    assert!(size() < size_before, "{} bytes, then {}", size_before, size());
    before.assert_same(&State::of(&ply), "after a compaction");
    ply.fails(2, args!["gc", "--compact", "--dry-run"]);
}

#[test]
fn a_full_disk_fails_the_load_and_the_store_goes_on() {
    let Some(ply) = store() else { return };
    let root = ply.scratch().dir("root");
    tools::run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=12m", "tmpfs"]).arg(&root));
    load(&ply, &Image::new("localhost/small:1").layer(&[Member::file("f", "small")], Packing::Gzip));
    let before = State::of(&ply);
    let noise: Vec<u8> = (0..16_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let big = Image::new("localhost/big:1").layer(&[Member::file("noise", noise)], Packing::Plain);
    let ran = ply.fails(1, args!["load", "-i", big.write_oci_tar(&ply.scratch().join("big.tar"))]);
    assert!(ran.stderr.to_lowercase().contains("no space left"), "{ran}");
    ply.ok(args!["gc"]);
    before.assert_same(&State::of(&ply), "after a full disk and gc");
    assert!(tree_of(&ply, "localhost/small:1").find("f").is_some());
    ply.ok(args!["rmi", "localhost/small:1"]);
}

/// Makes a file system of `mib` MiB with so many inodes where the store will be.
fn small_disk(ply: &Ply, mib: u64, inodes: u64) {
    let (disk, root) = (ply.scratch().file("disk", ""), ply.scratch().dir("root"));
    fs::File::options().write(true).open(&disk).unwrap().set_len(mib << 20).unwrap();
    let mut mkfs = Command::new("mkfs.ext4");
    tools::run(mkfs.args(["-q", "-m", "0", "-N", &inodes.to_string()]).arg(&disk));
    tools::run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&root));
}

fn noise(len: u32, seed: u32) -> Vec<u8> {
    (0..len).map(|n| ((n ^ seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn removing_works_without_a_byte_or_an_inode_free() {
    if !tools::have(&["mkfs.ext4"]) {
        return;
    }
    for full_of in ["bytes", "inodes"] {
        let Some(ply) = store() else { return };
        small_disk(&ply, 256, 2000);
        let root = ply.root();
        load(&ply, &Image::new("localhost/kept:1").layer(&[Member::file("f", "kept")], Packing::Gzip));
        load(&ply, &Image::new("localhost/big:1").layer(&[Member::file("f", noise(9_000_000, 7))], Packing::Plain));
        let context = Context::new(&ply, "FROM localhost/kept:1\nCOPY f /g\n");
        context.file("f", noise(5_000_000, 9));
        context.build(&[]);
        ply.ok(args!["rmi", "built"]);
        let ballast = root.join("ballast");
        fs::create_dir(&ballast).unwrap();
        if full_of == "bytes" {
            // To the last block: what a large write leaves, small ones take.
            for (name, len) in [("a", 1 << 20), ("b", 4096), ("c", 1)] {
                let mut file = fs::File::create(ballast.join(name)).unwrap();
                let chunk = vec![1; len];
                while std::io::Write::write_all(&mut file, &chunk).is_ok() {}
            }
        } else {
            let mut n = 0;
            while fs::File::create(ballast.join(n.to_string())).is_ok() {
                n += 1;
            }
        }
        let free = || {
            let stat = rustix::fs::statvfs(&root).unwrap();
            stat.f_bavail * stat.f_frsize
        };
        assert!(full_of == "inodes" || free() < 8192, "{} bytes are free", free());
        let before = free();
        ply.ok(args!["prune", "--all", "--force"]);
        assert!(free() >= before + 5_000_000, "{full_of}: {before} bytes were free, {} are", free());
        ply.ok(args!["rmi", "localhost/big:1"]);
        ply.ok(args!["gc"]);
        assert!(free() >= before + 20_000_000, "{full_of}: {before} bytes were free, {} are", free());
        fs::remove_dir_all(&ballast).unwrap();
        // There is plenty again, and so there is a reserve.
        assert!(tree_of(&ply, "localhost/kept:1").find("f").is_some());
        assert!(root.join("catalog/reserve").exists());
    }
}

#[test]
fn every_driver_shows_and_gives_back_the_same_and_leaves_nothing() {
    let image = everything("localhost/everything:1", Packing::Gzip);
    let mut first: Option<(Tree, Vec<u8>)> = None;
    for driver in ["auto", "erofs", "overlay", "native"] {
        let Some(ply) = store() else { return };
        if driver == "erofs" && !ply.has_erofs() {
            continue;
        }
        fs::remove_dir_all(ply.root()).ok();
        let ply = ply.with_driver(driver);
        load(&ply, &image);
        let saved = ply.scratch().join("saved.tar");
        ply.ok(args!["save", "-o", saved, image.tag()]);
        let this = (tree_of(&ply, image.tag()), fs::read(saved).unwrap());
        if let Some(first) = &first {
            this.0.assert_same(&first.0, driver);
            assert!(this.1 == first.1, "{driver}: saved bytes differ");
        }
        first.get_or_insert(this);
        let context = Context::new(&ply, &format!("FROM {}\nCOPY f /new/f\n", image.tag()));
        context.file("f", "f");
        context.build(&[]);
        assert!(tree_of(&ply, "built").find("new/f").is_some(), "{driver}");
        ply.ok(args!["fsck", "--read-data"]);
        ply.ok(args!["rmi", image.tag(), "built"]);
        ply.ok(args!["prune", "--all", "--force"]);
        ply.ok(args!["gc"]);
        assert_eq!(
            fs::read_dir(ply.root().join("layers")).unwrap().count(),
            1,
            "{driver}: only the directory of stages"
        );
    }
}

#[test]
fn a_store_keeps_the_driver_that_it_was_made_with() {
    let Some(ply) = store() else { return };
    if !ply.has_erofs() {
        return;
    }
    let driver = |global: &[OsString]| {
        let info = ply.json(&[global, args!["info"]].concat());
        info["driver"].as_str().unwrap().split(' ').next().unwrap().to_owned()
    };
    let config = ply.scratch().file("config.toml", "driver = \"native\"\n");
    for (made_with, then) in [("auto", "erofs"), ("erofs", "erofs"), ("overlay", "overlay"), ("native", "overlay")] {
        fs::remove_dir_all(ply.root()).unwrap();
        assert_eq!(driver(args!["--driver", made_with]).as_str(), if made_with == "auto" { then } else { made_with });
        assert_eq!(driver(args!["--driver", "auto"]), then, "made with {made_with}");
        // The flag goes before the environment, and that before the file.
        assert_eq!(driver(args!["--driver", "overlay", "--config", config]), "overlay");
        let mut command = ply.command(args!["--config", config, "info", "--json"]);
        let by_file = Ran::of(command.env_remove("PLY_DRIVER")).stdout;
        assert!(by_file.contains("\"driver\": \"native"), "{by_file}");
        let by_environment = Ran::of(command.env("PLY_DRIVER", "overlay")).stdout;
        assert!(by_environment.contains("\"driver\": \"overlay"), "{by_environment}");
        assert_eq!(driver(args!["--driver", "auto"]), then, "what is asked for once is not kept");
    }
    for to in ["erofs", "overlay"] {
        ply.ok(args!["--driver", to, "migrate"]);
        assert_eq!(driver(args!["--driver", "auto"]), to, "asked for by ply migrate, it is");
    }
    let unknown = ply.scratch().file("unknown.toml", "driver = \"zfs\"\n");
    let ran = ply.fails(1, args!["--config", unknown, "images"]);
    assert!(ran.stderr.contains("unknown.toml") && ran.stderr.contains("zfs"), "{ran}");
}

#[test]
fn without_the_right_to_mount_erofs_a_new_store_says_that_it_does_without() {
    let Some(ply) = store() else { return };
    if !ply.has_erofs() {
        return;
    }
    let made_with = ply.scratch().join("made-with");
    let inside = |root: &Path, args: &[OsString]| {
        let ply = ply.command(args);
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount"]).arg(ply.get_program()).args(ply.get_args());
        command.arg("--root").arg(root).env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", "/root");
        let ran = Ran::of(&mut command);
        assert!(ran.status.success(), "{ran}");
        ran
    };
    let image = everything("localhost/everything:1", Packing::Gzip);
    let archive = image.write_oci_tar(&ply.scratch().join("in.tar"));
    let fresh = ply.scratch().join("fresh");
    let said = inside(&fresh, args!["info"]);
    assert!(said.stderr.contains("erofs does not work here: this new store"), "{said}");
    assert!(said.stdout.contains("overlay (") && said.stdout.contains("not usable: "), "{said}");
    assert_eq!(inside(&fresh, args!["info"]).stderr, "", "once");
    // Without the right to mount, all is copies: that is said, too.
    let copies = ply.scratch().join("copies");
    let mut command = Command::new("unshare");
    let info = ply.command(args!["--driver", "auto", "info", "--root", copies]);
    command.args(["--user", "--map-root-user"]).arg(info.get_program()).args(info.get_args());
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", "/root");
    let said = Ran::of(&mut command);
    assert!(said.stderr.contains("overlay mounts do not work here: trees of this new store are copies"), "{said}");
    assert!(said.stdout.contains("native (copies)") && said.stdout.contains("not usable: "), "{said}");
    assert_eq!(Ran::of(&mut command).stderr, "", "once");
    // A store that was made with it goes on, and says what it cannot do when layers come in.
    ply.ok(args!["load", "-i", archive, "--driver", "erofs", "--root", made_with]);
    let said = inside(&made_with, args!["images"]);
    assert!(said.stderr.is_empty() && said.stdout.contains("localhost/everything"), "{said}");
    let more = Image::new("localhost/more:1").layer(&[Member::file("more", "")], Packing::Gzip);
    let said = inside(&made_with, args!["load", "-i", more.write_oci_tar(&ply.scratch().join("more.tar"))]);
    assert!(said.stderr.contains("erofs does not work here: what is kept as tars cannot be mounted"), "{said}");
    ply.ok(args!["fsck", "--read-data", "--root", made_with]);
}

#[test]
fn a_store_takes_another_driver_and_shows_and_gives_back_the_same() {
    let Some(ply) = store() else { return };
    let erofs = |more: &[OsString]| [args!["--driver", "erofs"], more].concat();
    if !ply.has_erofs() {
        return;
    }
    let image = everything("localhost/everything:1", Packing::Gzip);
    let archive = image.write_oci_tar(&ply.scratch().join("in.tar"));
    ply.ok(args!["--driver", "overlay", "load", "-i", archive]);
    let shown = tree_of(&ply, image.tag());
    let packed = || {
        let layers = fs::read_dir(ply.root().join("layers")).unwrap().map(|entry| entry.unwrap().path());
        layers.filter(|dir| dir.join("layer.tar").exists()).count()
    };
    let save = |name: &str| {
        let to = ply.scratch().join(name);
        ply.ok(args!["save", "-o", to, image.tag()]);
        fs::read(to).unwrap()
    };
    let saved = save("before.tar");
    let would = ply.ok(&erofs(args!["migrate", "--dry-run"])).stdout;
    assert!(would.starts_with("Would keep "), "{would}");
    let at = ply.mount(image.tag());
    let busy = ply.fails(1, &erofs(args!["migrate"]));
    assert!(busy.stderr.contains("is mounted"), "{busy}");
    drop(at);
    assert_eq!(packed(), 0, "nothing was done");

    let told = ply.json(&erofs(args!["migrate"]));
    let changed = usize::try_from(told["changed_count"].as_u64().unwrap()).unwrap();
    assert!(changed > 0, "{told}");
    assert_eq!(packed(), changed);
    for (driver, still_packed) in [("erofs", changed), ("overlay", 0)] {
        assert_eq!(ply.json(args!["--driver", driver, "migrate"])["kept_count"], 0, "{driver}");
        assert_eq!(packed(), still_packed, "{driver}");
        tree_of(&ply, image.tag()).assert_same(&shown, driver);
        assert!(save("after.tar") == saved, "{driver}");
        ply.ok(args!["fsck", "--read-data"]);
    }

    // What comes in is kept so from the start.
    let Some(fresh) = store() else { return };
    let archive = image.write_oci_tar(&fresh.scratch().join("in.tar"));
    fresh.ok(args!["--driver", "erofs", "load", "-i", archive]);
    tree_of(&fresh, image.tag()).assert_same(&shown, "loaded with erofs");
    fresh.ok(args!["fsck", "--read-data"]);
    fresh.ok(args!["rmi", image.tag()]);
    fresh.ok(args!["gc"]);
    assert_eq!(fs::read_dir(fresh.root().join("layers")).unwrap().count(), 1, "only the directory of stages");
}

#[test]
fn a_store_works_wherever_it_lies_and_is_moved_while_it_is_mounted() {
    let image = everything("localhost/everything:1", Packing::Gzip);
    let Some(ply) = store() else { return };
    load(&ply, &image);
    let shown = tree_of(&ply, image.tag());
    for place in ["ext4", "btrfs", "tmpfs", "overlay"] {
        let Some(ply) = store().map(|ply| ply.with_driver("auto")) else { return };
        let scratch = ply.scratch();
        let mounted = match place {
            "ext4" => scratch.mount("fs", FileSystem::Ext4),
            "btrfs" => scratch.mount("fs", FileSystem::Btrfs),
            "tmpfs" => scratch.mount("fs", FileSystem::Tmpfs),
            _ => {
                let [below, upper, work, at] = ["below", "upper", "work", "fs"].map(|name| scratch.dir(name));
                let dirs =
                    format!("lowerdir={},upperdir={},workdir={}", below.display(), upper.display(), work.display());
                tools::run(Command::new("mount").args(["-t", "overlay", "-o", &dirs, "overlay"]).arg(&at));
                Some(at)
            }
        };
        let Some(dir) = mounted else { continue };
        let (root, moved) = (dir.join("root"), dir.join("moved"));
        // One that was asked for is refused where it cannot keep whiteouts; `auto` says what it does without, once.
        let has_overlay = place != "overlay";
        let refused = ply.run(args!["info", "--driver", "overlay", "--root", dir.join("asked")]);
        assert_eq!(refused.status.success(), has_overlay, "{place}: {refused}");
        assert_eq!(refused.stderr.contains("lies on an overlayfs"), !has_overlay, "{place}: {refused}");
        assert_eq!(dir.join("asked").exists(), has_overlay, "{place}: a store that could not be used");
        let archive = image.write_oci_tar(&scratch.join("in.tar"));
        let loaded = ply.ok(args!["load", "-i", archive, "--root", root]);
        let info = ply.json(args!["info", "--root", root]);
        let packs = info["driver"].as_str().unwrap().starts_with("erofs");
        eprintln!("{place}: {info:#}");
        // Where too much is stacked for it, a new store says that it does without.
        assert_eq!(info["erofs_unusable"].is_null(), packs, "{place}");
        assert_eq!(loaded.stderr.contains("erofs does not work here"), !packs, "{place}: {loaded}");
        assert_eq!(info["overlay_unusable"].is_null(), has_overlay, "{place}");
        assert_eq!(loaded.stderr.contains("overlay mounts do not work here"), !has_overlay, "{place}: {loaded}");
        assert_eq!(ply.ok(args!["info", "--root", root]).stderr, "", "{place}");
        let at = scratch.dir("at");
        ply.ok(args!["mount", image.tag(), at, "--root", root]);
        Tree::of(&at).assert_same(&shown, place);
        fs::rename(&root, &moved).unwrap();
        Tree::of(&at).assert_same(&shown, &format!("{place}, moved"));
        let unpacked = if has_overlay { "overlay" } else { "native" };
        let busy = ply.run(args!["migrate", "--driver", unpacked, "--root", moved]);
        assert_eq!(busy.status.success(), !packs, "{place}: {busy}");
        assert_eq!(busy.stderr.contains("is mounted"), packs, "{place}: {busy}");
        ply.ok(args!["rmi", image.tag(), "--root", moved]);
        Tree::of(&at).assert_same(&shown, &format!("{place}, removed"));
        ply.ok(args!["umount", at, "--root", moved]);
        ply.ok(args!["gc", "--root", moved]);
        assert_eq!(fs::read_dir(moved.join("layers")).unwrap().count(), 1, "{place}: only the directory of stages");
        ply.ok(args!["fsck", "--read-data", "--root", moved]);
    }
}

#[test]
fn a_broken_catalogue_is_told_and_never_begun_anew() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/kept:1").layer(&[Member::file("f", "kept")], Packing::Gzip));
    let path = ply.root().join("catalog/plies.redb");
    let sound = fs::read(&path).unwrap();
    for (what, broken) in [
        ("zeroes", vec![0; sound.len()]),
        ("text", b"this is no database".repeat(1000)),
        ("cut", sound[..sound.len() / 2].to_vec()),
        ("empty", Vec::new()),
    ] {
        fs::write(&path, &broken).unwrap();
        let ran = ply.fails(1, args!["images"]);
        assert!(ran.stderr.contains("plies.redb") || ran.stderr.contains("catalog"), "{what}: {ran}");
    }
    fs::write(&path, sound).unwrap();
    assert!(tree_of(&ply, "localhost/kept:1").find("f").is_some());
}

#[test]
fn a_root_that_cannot_be_is_named() {
    let Some(ply) = store() else { return };
    ply.scratch().file("root", "a file where the store should be");
    let ran = ply.fails(1, args!["images"]);
    assert!(ran.stderr.contains("/root"), "{ran}");
}

#[test]
fn nothing_that_a_stranger_wrote_reaches_the_terminal_raw() {
    let Some(ply) = store() else { return };
    let hostile = "\u{1b}]0;owned\u{7}\u{202e}";
    load(
        &ply,
        &Image::new("localhost/hostile:1")
            .layer(&[Member::file(format!("f{hostile}"), "")], Packing::Plain)
            .config("Labels", json!({ "l": hostile }))
            .history(hostile),
    );
    let context = Context::new(&ply, &format!("FROM localhost/hostile:1\nCOPY nothing{hostile} /\n"));
    for ran in [
        ply.ok(args!["images"]),
        ply.ok(args!["history", "localhost/hostile:1"]),
        ply.ok(args!["tree"]),
        ply.ok(args!["du", "-v"]),
        ply.ok(args!["why", "localhost/hostile:1"]),
        context.build_fails(&[]),
    ] {
        let printed = ran.stdout + &ran.stderr;
        assert!(!printed.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{printed:?}");
    }
    // JSON is for programs: it escapes what steers a terminal, and keeps the rest.
    let inspected = ply.ok(args!["inspect", "localhost/hostile:1"]).stdout;
    assert!(!inspected.contains(['\u{1b}', '\u{7}']), "{inspected:?}");
}

#[test]
fn every_listing_is_one_json_document_when_asked() {
    let Some(ply) = store() else { return };
    load(&ply, &everything("localhost/everything:1", Packing::Gzip));
    let context = Context::new(&ply, "FROM localhost/everything:1\nCOPY f /f\n");
    context.file("f", "f");
    ply.json(&context.args(&[]));
    let name = "localhost/everything:1";
    for command in [
        args!["images"],
        args!["inspect", name],
        args!["history", name],
        args!["ref", "ls"],
        args!["du"],
        args!["tree"],
        args!["tree", name],
        args!["why", name],
        args!["gc", "--dry-run"],
        args!["gc"],
        args!["info"],
        args![
            "load",
            "-i",
            everything("localhost/again:1", Packing::Plain).write_oci_tar(&ply.scratch().join("again.tar"))
        ],
    ] {
        ply.json(command);
    }
}

#[test]
fn gc_says_beforehand_what_it_will_do() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let context = Context::new(&ply, "FROM busybox\nRUN echo x > /x\n");
    context.build(&[]);
    let before = Shape::of(&ply);
    ply.ok(args!["gc", "--dry-run"]);
    assert_eq!(Shape::of(&ply), before, "a dry run changes nothing");
    ply.ok(args!["gc"]);
    context.build(&[]).assert_all_cached();
}

#[test]
fn a_record_made_by_hand_is_written_committed_mounted_and_removed() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/base:1").layer(&[Member::dir("d"), Member::file("d/f", "f")], Packing::Gzip));
    let shape = Shape::of(&ply);
    let id = ply.ok(args!["ref", "new", "--parent", "localhost/base:1"]).stdout.trim().to_owned();
    {
        let mounted = ply.mount_with(&id, args!["--rw"]);
        fs::write(mounted.path().join("d/new"), "new").unwrap();
        fs::remove_file(mounted.path().join("d/f")).unwrap();
    }
    {
        let mounted = ply.mount_with(&id, args!["--rw"]);
        assert!(mounted.path().join("d/new").exists(), "what was written stays until it is committed");
    }
    let committed = ply.ok(args!["ref", "commit", id]).stdout.trim().to_owned();
    let tree = tree_of(&ply, &committed);
    assert!(tree.find("d/new").is_some() && tree.find("d/f").is_none());
    ply.ok(args!["ref", "inspect", committed]);
    ply.ok(args!["ref", "rm", committed]);
    if ply.run(args!["ref", "inspect", id]).status.success() {
        ply.ok(args!["ref", "rm", id]);
    }
    ply.ok(args!["gc"]);
    assert_eq!(Shape::of(&ply), shape, "everything of the record is gone");
}

#[test]
fn what_is_mounted_is_not_collected() {
    let Some(ply) = store() else { return };
    load(&ply, &everything("localhost/everything:1", Packing::Gzip));
    let mounted = ply.mount("localhost/everything:1");
    let before = Tree::of(mounted.path());
    let ran = ply.run(args!["rmi", "localhost/everything:1"]);
    ply.ok(args!["gc"]);
    Tree::of(mounted.path()).assert_same(&before, &format!("mounted while its image was removed ({ran})"));
    drop(mounted);
    ply.ok(args!["gc"]);
    assert_eq!(Shape::of(&ply).unfinished, Vec::<std::path::PathBuf>::new());
}

#[test]
fn completions_and_man_pages_need_no_store() {
    let scratch = Scratch::new();
    let ply = Ply::new(env!("CARGO_BIN_EXE_ply"));
    assert!(ply.ok(args!["completions", "bash"]).stdout.contains("ply"));
    let man = scratch.dir("man");
    ply.ok(args!["man", man]);
    assert!(man.join("ply.1").exists());
    assert!(!ply.root().exists());
}
