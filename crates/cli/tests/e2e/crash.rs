//! SIGKILL at any moment leaves a store that opens, with nothing half visible and nothing leaked.
//!
//! Each test kills the same command again and again on the same store, so what one kill leaves behind
//! and `gc` misses is found by the next comparison. `PLIES_KILL_POINTS` says how many moments are tried
//! for each kind of system call (a handful by default; a thousand tries every one).

use std::{
    ffi::OsString,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use plies_testkit::{
    args, eventually,
    image::{Image, Packing},
    kill::{self, Failed, KillPoint, Outcome},
    ply::Ply,
    tar::Member,
    tools,
    tree::Tree,
};
use serde_json::Value;

use crate::common::{Context, Shape, busybox, everything, load, store, tree_of};
use crate::script::CLOSING_SYNCS;

pub(crate) fn points_per_call() -> u32 {
    std::env::var("PLIES_KILL_POINTS").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// The moments to kill this command at. It runs once to its end to find them.
fn points(ply: &Ply, command: &Command) -> Vec<KillPoint> {
    let counts = kill::count(command, &ply.scratch().join("strace.log"));
    let points = kill::spread(&counts, points_per_call());
    assert!(points.len() > 10, "too few moments to die at: {counts:?}");
    points
}

/// What a store shows after a kill must be what it showed before the command or what it would have
/// shown after it.
struct Sides {
    before: Value,
    after: Value,
}

impl Sides {
    /// Opens the store as the next command would. Returns whether the killed command had come to pass.
    #[track_caller]
    fn came_to_pass(&self, ply: &Ply, point: &dyn std::fmt::Display) -> bool {
        let images = names(ply);
        ply.json(args!["du"]);
        ply.ok(args!["gc"]);
        assert_eq!(names(ply), images, "gc after {point} changed what is listed");
        let unfinished = Shape::of(ply).unfinished;
        assert_eq!(unfinished, Vec::<PathBuf>::new(), "left after {point} and gc");
        assert!(images == self.before || images == self.after, "half visible after {point}: {images:#}");
        images == self.after && images != self.before
    }
}

/// The names that images have, without what the clock says about them, and what the form costs that layers are kept in: where
/// trying EROFS fails, they become directories.
fn names(ply: &Ply) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(strip),
            Value::Object(fields) => {
                let told = ["created", "used", "age", "size_bytes"];
                fields.retain(|key, _| !told.iter().any(|told| key.contains(told)));
                fields.values_mut().for_each(strip);
            }
            _ => {}
        }
    }
    let mut images = ply.json(args!["images"]);
    strip(&mut images);
    images
}

/// Kills `command` at every point; `undo` brings the store back where the command did its work.
fn kill_everywhere(ply: &Ply, command: &[OsString], sides: &Sides, undo: impl Fn(), check_undone: impl Fn(&KillPoint)) {
    let points = points(ply, &ply.command(command));
    undo();
    let (mut killed, mut passed) = (0, 0);
    for point in &points {
        match kill::kill_at(&ply.command(command), point) {
            Outcome::Killed => killed += 1,
            Outcome::Finished(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "not killed at {point}, but failed: {said}");
            }
        }
        if sides.came_to_pass(ply, point) {
            passed += 1;
            undo();
        }
        check_undone(point);
    }
    eprintln!("{killed} kills at {} moments, {passed} of them after the work was done", points.len());
    assert!(killed * 2 > points.len(), "most moments were never reached: {killed} of {}", points.len());
}

/// A store with an image, and the archive of another one that has everything. `None`: it cannot be interrupted here.
fn with_an_image_to_load() -> Option<(Ply, Image, PathBuf)> {
    if !tools::have(&["strace"]) {
        return None;
    }
    let ply = store()?;
    load(&ply, &Image::new("localhost/before:1").layer(&[Member::file("f", "shared")], Packing::Gzip));
    ply.ok(args!["gc"]);
    let image = everything("localhost/everything:1", Packing::Gzip);
    let archive = image.write_oci_tar(&ply.scratch().join("in.tar"));
    Some((ply, image, archive))
}

fn undo_load(ply: &Ply, image: &Image) {
    ply.ok(args!["rmi", image.tag()]);
    ply.ok(args!["gc"]);
}

#[test]
fn load_killed_anywhere_is_all_or_nothing_and_leaks_nothing() {
    let Some((ply, image, archive)) = with_an_image_to_load() else { return };
    let command = args!["load", "-i", archive];

    let (before, shape) = (names(&ply), Shape::of(&ply));
    ply.ok(command);
    let sides = Sides { before, after: names(&ply) };
    let tree = tree_of(&ply, image.tag());
    let undo = || undo_load(&ply, &image);
    undo();
    kill_everywhere(&ply, command, &sides, undo, |point| {
        assert_eq!(Shape::of(&ply), shape, "after a kill at {point} and gc");
    });
    ply.ok(command);
    tree_of(&ply, image.tag()).assert_same(&tree, "loaded after all kills");
}

#[test]
fn a_load_in_which_any_call_fails_is_all_or_nothing_and_a_failed_sync_is_no_success() {
    let Some((ply, image, archive)) = with_an_image_to_load() else { return };
    let command = args!["load", "-i", archive];
    let before = names(&ply);
    let points = points(&ply, &ply.command(command));
    let sides = Sides { before, after: names(&ply) };
    let tree = tree_of(&ply, image.tag());
    let undo = || undo_load(&ply, &image);
    undo();
    let mut failed = 0;
    for (point, errno) in points.iter().zip(["EIO", "ENOSPC", "EMFILE", "EDQUOT"].iter().cycle()) {
        let context = format!("{point} with {errno}");
        let Failed { output, later_count } = kill::fail_at(&ply.command(command), point, errno);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("panicked") && output.status.code().is_some(), "{context}: {said}");
        let is_sync = match &*point.call {
            "fdatasync" => later_count >= CLOSING_SYNCS,
            call => ["fsync", "syncfs"].contains(&call),
        };
        let came = sides.came_to_pass(&ply, &context);
        if output.status.success() {
            assert!(came, "{context}: a success that left nothing");
            assert!(!is_sync, "{context}: a success without a sync");
        } else {
            failed += 1;
            assert!(!said.trim().is_empty(), "{context}: says nothing");
        }
        let checked = ply.run(args!["fsck"]);
        assert!(checked.status.success(), "{context}: {said}{checked}");
        if came {
            tree_of(&ply, image.tag()).assert_same(&tree, &context);
            undo();
        }
    }
    eprintln!("{failed} of {} loads failed", points.len());
    assert!(failed * 2 > points.len(), "most calls were never reached: {failed} of {}", points.len());
}

#[test]
fn a_killed_load_that_came_to_pass_is_whole() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let image = everything("localhost/everything:1", Packing::Plain);
    let archive = image.write_oci_tar(&ply.scratch().join("in.tar"));
    let command = args!["load", "-i", archive];
    let counts = kill::count(&ply.command(command), &ply.scratch().join("strace.log"));
    let tree = tree_of(&ply, image.tag());
    ply.ok(args!["rmi", image.tag()]);
    ply.ok(args!["gc"]);
    // What makes things durable comes last; each of these moments may be just before or just after.
    for call in ["fsync", "fdatasync", "syncfs", "rename", "renameat", "renameat2"] {
        for nth in 1..=counts.get(call).copied().unwrap_or(0) {
            let point = KillPoint { call: call.to_owned(), nth };
            kill::kill_at(&ply.command(command), &point);
            if names(&ply).to_string().contains("localhost/everything") {
                tree_of(&ply, image.tag()).assert_same(&tree, &format!("visible after a kill at {point}"));
                ply.ok(args!["rmi", image.tag()]);
            }
        }
    }
}

#[test]
fn load_from_a_pipe_killed_at_any_byte_leaks_nothing() {
    let Some(ply) = store() else { return };
    ply.ok(args!["images"]);
    let shape = Shape::of(&ply);
    let noise: Vec<u8> = (0..600_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let image = everything("localhost/everything:1", Packing::Gzip)
        .layer(&[Member::file("noise", &noise)], Packing::Gzip)
        .layer(&[Member::file("noise", &noise)], Packing::Plain);
    let bytes = fs::read(image.write_oci_tar(&ply.scratch().join("in.tar"))).unwrap();
    for eighth in 1..=8 {
        let mut child = ply.command(args!["load"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // All but the end, so that it cannot be done yet.
        let part = &bytes[..(bytes.len() - 512) * eighth / 8];
        child.stdin.take().unwrap().write_all(part).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        ply.json(args!["images"]);
        ply.ok(args!["gc"]);
        if names(&ply).to_string().contains("localhost/everything") {
            ply.ok(args!["rmi", image.tag()]);
            ply.ok(args!["gc"]);
        }
        assert_eq!(Shape::of(&ply), shape, "killed after {} of {} bytes", part.len(), bytes.len());
    }
}

#[test]
fn rmi_killed_anywhere_is_all_or_nothing() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let kept = everything("localhost/kept:1", Packing::Gzip);
    load(&ply, &kept);
    let image = kept.clone().named("localhost/going:1").layer(&[Member::file("own", "own")], Packing::Gzip);
    let archive = image.write_oci_tar(&ply.scratch().join("in.tar"));
    ply.ok(args!["gc"]);
    let (after, shape) = (names(&ply), Shape::of(&ply));
    let tree = tree_of(&ply, kept.tag());
    let reload = || {
        if !names(&ply).to_string().contains(image.tag().trim_end_matches(":1")) {
            ply.ok(args!["load", "-i", archive]);
        }
    };
    reload();
    let sides = Sides { before: names(&ply), after };
    kill_everywhere(&ply, args!["rmi", image.tag()], &sides, reload, |_| ());
    ply.ok(args!["rmi", image.tag()]);
    ply.ok(args!["gc"]);
    assert_eq!(Shape::of(&ply), shape);
    tree_of(&ply, kept.tag()).assert_same(&tree, "the image that was kept");
}

#[test]
fn gc_killed_anywhere_is_finished_by_the_next() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let kept = everything("localhost/kept:1", Packing::Gzip);
    load(&ply, &kept);
    ply.ok(args!["gc"]);
    let (names_before, shape) = (names(&ply), Shape::of(&ply));
    let tree = tree_of(&ply, kept.tag());
    let going =
        kept.clone().named("localhost/going:1").layer(&[Member::dir("d"), Member::file("d/own", "own")], Packing::Gzip);
    let archive = going.write_oci_tar(&ply.scratch().join("in.tar"));
    let make_garbage = || {
        ply.ok(args!["load", "-i", archive]);
        // The name goes first: what it held is garbage when the first of its files is to be removed.
        let point = KillPoint { call: "unlinkat".to_owned(), nth: 1 };
        kill::kill_at(&ply.command(args!["rmi", going.tag()]), &point);
    };
    make_garbage();
    for point in points(&ply, &ply.command(args!["gc"])) {
        make_garbage();
        kill::kill_at(&ply.command(args!["gc"]), &point);
        ply.ok(args!["gc"]);
        assert_eq!(names(&ply), names_before, "after a kill at {point}");
        assert_eq!(Shape::of(&ply), shape, "after a kill at {point}");
    }
    tree_of(&ply, kept.tag()).assert_same(&tree, "the image that was kept");
}

#[test]
fn a_second_kill_while_recovering_from_the_first_is_survived() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    ply.ok(args!["images"]);
    let shape = Shape::of(&ply);
    let archive = everything("localhost/everything:1", Packing::Gzip).write_oci_tar(&ply.scratch().join("in.tar"));
    let first =
        || kill::kill_at(&ply.command(args!["load", "-i", archive]), &KillPoint { call: "syncfs".to_owned(), nth: 1 });
    first();
    for point in points(&ply, &ply.command(args!["images"])) {
        first();
        kill::kill_at(&ply.command(args!["images"]), &point);
        ply.ok(args!["gc"]);
        assert_eq!(Shape::of(&ply), shape, "after a kill at {point}");
    }
}

/// A build whose steps only copy: no other process is in it that could die first.
fn copying<'a>(ply: &'a Ply) -> Context<'a> {
    load(ply, &everything("localhost/base:1", Packing::Gzip));
    let context = Context::new(
        ply,
        "FROM localhost/base:1 AS one\nWORKDIR /w\nCOPY a /w/a\nCOPY b /etc/config\n\
         FROM localhost/base:1\nCOPY --from=one /w /from\nADD c /c\n",
    );
    for name in ["a", "b", "c"] {
        context.file(name, name.repeat(10_000));
    }
    context
}

/// Removes every record of the build cache.
fn forget_builds(ply: &Ply) {
    let records = ply.json(args!["ref", "ls"]);
    let ids: Vec<OsString> =
        records.as_array().unwrap().iter().map(|record| record["id"].as_str().unwrap().into()).collect();
    if !ids.is_empty() {
        ply.ok(&[args!["ref", "rm"], &ids].concat());
    }
    ply.ok(args!["gc"]);
}

#[test]
fn build_killed_anywhere_names_nothing_half_made_and_builds_again() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    ply.ok(args!["gc"]);
    let (before, shape) = (names(&ply), Shape::of(&ply));
    let command = context.args(&[]);
    ply.ok(&command);
    let tree = tree_of(&ply, "built:latest");
    let undo = || {
        if names(&ply) != before {
            ply.ok(args!["rmi", "built:latest"]);
        }
        forget_builds(&ply);
        assert_eq!(Shape::of(&ply), shape, "after all records are gone");
    };
    undo();
    let points = points(&ply, &ply.command(&command));
    let mut killed = 0;
    for point in &points {
        undo();
        killed += usize::from(matches!(kill::kill_at(&ply.command(&command), point), Outcome::Killed));
        ply.json(args!["du"]);
        ply.ok(args!["gc"]);
        assert_eq!(Shape::of(&ply).unfinished, Vec::<PathBuf>::new(), "left after {point} and gc");
        // Each build has times of its own.
        let timeless = |tree: &Tree| tree.clone().map(|_, node| node.mtime = (0, 0));
        if names(&ply) != before {
            let visible = timeless(&tree_of(&ply, "built:latest"));
            visible.assert_same(&timeless(&tree), &format!("visible after a kill at {point}"));
        }
        // What the killed build left in the cache must not spoil the next one.
        ply.ok(&command);
        let again = timeless(&tree_of(&ply, "built:latest"));
        again.assert_same(&timeless(&tree), &format!("built after a kill at {point}"));
    }
    undo();
    assert!(killed * 2 > points.len(), "most moments were never reached: {killed} of {}", points.len());
}

/// A build that runs until it is killed: its step says that it has begun and waits for nobody.
fn stuck(ply: &Ply, executor: &str, unique: &str) -> Child {
    let context = Context::new(
        ply,
        &format!("FROM busybox\nRUN echo kept > /x\nRUN mkfifo /{unique} && echo has-begun && cat /{unique}\n"),
    );
    let command = context.args(args!["--executor", executor]);
    let mut child = ply.command(&command).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let begun = lines.by_ref().map(Result::unwrap).find(|line| line.ends_with(" has-begun"));
    if begun.is_none() {
        panic!("the build ended before its step began: {}", child.wait().unwrap());
    }
    // The pipe stays open: a build that dies of a closed one would spoil the test.
    std::mem::forget(lines);
    child
}

/// The processes that have this text among their arguments.
fn processes(text: &str) -> Vec<String> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "))
        .filter(|line| line.starts_with(&format!("cat /{text}")))
        .collect()
}

#[test]
fn a_build_killed_while_a_step_runs_leaves_no_process_mount_or_upper() {
    for executor in crate::build::executors() {
        let Some(ply) = store() else { return };
        if !busybox(&ply) {
            return;
        }
        let unique = format!("pipe-{}-{}", std::process::id(), executor.len());
        let images = names(&ply);
        let mut child = stuck(&ply, &executor, &unique);
        child.kill().unwrap();
        child.wait().unwrap();
        ply.ok(args!["gc"]);
        assert!(eventually(|| processes(&unique).is_empty()), "{executor}: still runs: {:?}", processes(&unique));
        assert_eq!(Shape::of(&ply).unfinished, Vec::<PathBuf>::new(), "{executor}");
        assert_eq!(names(&ply), images, "{executor}");
    }
}

#[test]
fn an_interrupted_build_cleans_up_by_itself() {
    use rustix::process::Signal;
    for (executor, signal) in crate::build::executors()
        .iter()
        .flat_map(|one| [Signal::INT, Signal::TERM, Signal::HUP].map(|signal| (one, signal)))
    {
        let Some(ply) = store() else { return };
        if !busybox(&ply) {
            return;
        }
        let unique = format!("pipe-{}-{}-{}", std::process::id(), executor.len(), signal.as_raw());
        let mut child = stuck(&ply, executor, &unique);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).unwrap();
        let status = child.wait().unwrap();
        let what = format!("{executor}, {signal:?}");
        // By itself, with an exit code: not by the signal.
        assert_eq!(status.code(), Some(1), "{what}: {status}");
        assert!(eventually(|| processes(&unique).is_empty()), "{what}: still runs: {:?}", processes(&unique));
        assert_eq!(Shape::of(&ply).unfinished, Vec::<PathBuf>::new(), "{what}: without gc");
    }
}

#[test]
fn under_nohup_the_end_of_the_terminal_is_no_interrupt() {
    use rustix::process::Signal;
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/small:1").layer(&[Member::file("f", "x")], Packing::Gzip));
    let fifo = ply.scratch().join("fifo");
    tools::run(Command::new("mkfifo").arg(&fifo));
    for ignored in [false, true] {
        // It waits for somebody to read, for as long as it is let.
        let save = ply.command(args!["save", "-o", fifo, "localhost/small:1"]);
        let mut command = Command::new("sh");
        command.args(["-c", if ignored { "trap '' HUP; exec \"$@\"" } else { "exec \"$@\"" }, "sh"]);
        command.arg(save.get_program()).args(save.get_args()).stdin(Stdio::null());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let has = |mask: &str, signal: Signal| {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
            let mask = status.lines().find_map(|line| line.strip_prefix(mask)).unwrap();
            u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << (signal.as_raw() - 1) != 0
        };
        assert!(eventually(|| has("SigCgt:", Signal::TERM)));
        assert_eq!((has("SigIgn:", Signal::HUP), has("SigCgt:", Signal::HUP)), (ignored, !ignored));
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
    }
}
