//! What makes a step run again, and what must not.

use std::{fs, os::unix::fs::PermissionsExt as _, os::unix::fs::symlink, path::Path, process::Command};

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::Ply,
    tar::Member,
    tools,
};

use crate::common::{Built, Context, Step, busybox, load, store, tree_of};

const COPYING: &str = "FROM scratch\nCOPY dir /dir\nCOPY other /other\n";

fn copying(ply: &Ply) -> Context<'_> {
    let context = Context::new(ply, COPYING);
    context.file("dir/f", "content");
    context.file("dir/sub/g", "more");
    context.file("other", "other");
    symlink("f", context.dir.join("dir/link")).unwrap();
    context.build(&[]);
    context.build(&[]).assert_all_cached();
    context
}

fn touch(path: &Path) {
    tools::run(Command::new("touch").args(["-d", "@1234567890"]).arg(path));
}

#[test]
fn new_times_alone_change_nothing() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    touch(&context.dir.join("dir/f"));
    touch(&context.dir.join("dir"));
    touch(&context.dir.join("other"));
    context.build(&[]).assert_all_cached();
}

#[test]
fn the_same_content_in_another_place_hits() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    let moved = ply.scratch().join("moved");
    tools::run(Command::new("cp").arg("-r").arg("--no-dereference").arg(&context.dir).arg(&moved));
    Built::of(ply.ok(args!["build", "--progress", "plain", moved])).assert_all_cached();
}

#[test]
fn whatever_copy_would_bring_along_makes_it_run_again() {
    type Change = (&'static str, fn(&Path));
    let changes: [Change; 8] = [
        ("content of the same length", |dir| fs::write(dir.join("dir/f"), "CONTENT").unwrap()),
        ("mode", |dir| fs::set_permissions(dir.join("dir/f"), fs::Permissions::from_mode(0o600)).unwrap()),
        ("mode of a directory", |dir| {
            fs::set_permissions(dir.join("dir/sub"), fs::Permissions::from_mode(0o700)).unwrap()
        }),
        ("a new file", |dir| fs::write(dir.join("dir/new"), "").unwrap()),
        ("a new empty directory", |dir| fs::create_dir(dir.join("dir/empty")).unwrap()),
        ("a file that goes", |dir| fs::remove_file(dir.join("dir/sub/g")).unwrap()),
        ("another name", |dir| fs::rename(dir.join("dir/f"), dir.join("dir/h")).unwrap()),
        ("where a link points", |dir| {
            fs::remove_file(dir.join("dir/link")).unwrap();
            symlink("elsewhere", dir.join("dir/link")).unwrap();
        }),
    ];
    for (what, change) in changes {
        let Some(ply) = store() else { return };
        let context = copying(&ply);
        change(&context.dir);
        let built = context.build(&[]);
        assert_eq!(built.step("COPY dir"), Step::Ran, "{what}\n{}", built.ran);
        assert_eq!(tree_of(&ply, "built").find("dir/f").is_some(), what != "another name");
        context.build(&[]).assert_all_cached();
    }
}

#[test]
fn equal_time_and_size_do_not_hide_new_content() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    let path = context.dir.join("dir/f");
    touch(&path);
    context.build(&[]);
    fs::write(&path, "CONTENT").unwrap();
    touch(&path);
    let built = context.build(&[]);
    assert_eq!(built.step("COPY dir"), Step::Ran, "{}", built.ran);
}

#[test]
fn files_that_no_step_copies_do_not_matter() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    context.file("unrelated", "x");
    context.build(&[]).assert_all_cached();
}

#[test]
fn a_step_that_runs_again_makes_only_those_after_it_run_again() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let lines = ["FROM busybox", "RUN echo 1 > /one", "COPY f /f", "RUN cat /f > /two", "RUN echo 3 > /three"];
    let context = Context::new(&ply, &lines.join("\n"));
    context.file("f", "f");
    context.build(&[]);
    context.build(&[]).assert_all_cached();
    context.file("f", "changed");
    let built = context.build(&[]);
    let steps: Vec<_> = built.instructions().into_iter().map(|(_, step)| step).collect();
    assert_eq!(steps, [Step::Cached, Step::Ran, Step::Ran, Step::Ran], "{}", built.ran);
    // Back to what it was: everything is still there.
    context.file("f", "f");
    context.build(&[]).assert_all_cached();
    context.file("Dockerfile", lines.join("\n").replace("echo 3", "echo 4"));
    let built = context.build(&[]);
    let steps: Vec<_> = built.instructions().into_iter().map(|(_, step)| step).collect();
    assert_eq!(steps, [Step::Cached, Step::Cached, Step::Cached, Step::Ran], "{}", built.ran);
}

#[test]
fn what_a_step_sees_is_part_of_what_it_is() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let before = "FROM busybox\nARG A=1\nENV E=1\nWORKDIR /w\nUSER root\nRUN echo the step > /tmp/x\n";
    let context = Context::new(&ply, before);
    context.build(&[]);
    for (what, text, args) in [
        ("a build argument that is used", before.to_owned(), args!["--build-arg", "A=2"]),
        ("the environment", before.replace("E=1", "E=2"), &[]),
        ("the directory", before.replace("/w", "/v"), &[]),
        ("the user", before.replace("USER root", "USER app"), &[]),
        ("the shell", before.replace("RUN", "SHELL [\"/bin/sh\", \"-ec\"]\nRUN"), &[]),
    ] {
        context.file("Dockerfile", text);
        let built = context.build(args);
        assert_eq!(built.step("echo the step"), Step::Ran, "{what}\n{}", built.ran);
        context.build(args).assert_all_cached();
    }
    // C01: two ways to say it that read the same are two commands.
    context.file("Dockerfile", "FROM busybox\nRUN [\"/bin/sh\", \"-c\", \"echo a b\"]\n");
    context.build(&[]);
    context.file("Dockerfile", "FROM busybox\nRUN [\"/bin/sh\", \"-c\", \"echo a\", \"b\"]\n");
    let built = context.build(&[]);
    assert_eq!(built.instructions()[0].1, Step::Ran, "{}", built.ran);
}

#[test]
fn instructions_that_only_configure_do_not_disturb_files_before_them() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    context.file("Dockerfile", format!("{COPYING}LABEL later=1\nCMD [\"x\"]\n"));
    context.build(&[]).assert_all_cached();
}

#[test]
fn another_base_is_another_build() {
    let Some(ply) = store() else { return };
    let base = |content: &str| Image::new("localhost/base:1").layer(&[Member::file("f", content)], Packing::Plain);
    load(&ply, &base("old"));
    let context = Context::new(&ply, "FROM localhost/base:1\nCOPY g /g\n");
    context.file("g", "g");
    context.build(&[]);
    load(&ply, &base("newer"));
    let built = context.build(&[]);
    assert_eq!(built.step("COPY g"), Step::Ran, "{}", built.ran);
    assert_eq!(tree_of(&ply, "built").get("f").size_bytes, 5);
}

#[test]
fn a_stage_is_judged_by_what_it_holds_not_by_how_it_was_made() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let text = "FROM busybox AS one\nCOPY f /ignored\nRUN echo same > /out\nFROM scratch\nCOPY --from=one /out /out\n";
    let context = Context::new(&ply, text);
    context.file("f", "one");
    context.build(&[]);
    context.file("f", "two");
    let built = context.build(&[]);
    assert_eq!(built.step("RUN echo same"), Step::Ran, "{}", built.ran);
    assert_eq!(built.step("COPY --from=one"), Step::Cached, "{}", built.ran);
}

#[test]
fn no_cache_runs_everything_and_its_results_are_used_next() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    let built = context.build(args!["--no-cache"]);
    assert!(built.instructions().iter().all(|(_, step)| *step == Step::Ran), "{}", built.ran);
    context.build(&[]).assert_all_cached();
}

#[test]
fn a_failed_step_leaves_those_before_it_cached() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let context = Context::new(&ply, "FROM busybox\nRUN echo slow > /slow\nRUN exit 3\n");
    context.build_fails(&[]);
    context.file("Dockerfile", "FROM busybox\nRUN echo slow > /slow\nRUN exit 0\n");
    let built = context.build(&[]);
    assert_eq!((built.step("echo slow"), built.step("exit 0")), (Step::Cached, Step::Ran), "{}", built.ran);
}

#[test]
fn a_cached_build_gives_the_same_image() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    let id = |name: &str| {
        let path = ply.scratch().join(name);
        context.build(args!["--iidfile", path]);
        fs::read_to_string(path).unwrap()
    };
    assert_eq!(id("one"), id("two"));
}

#[test]
fn the_cache_survives_the_image_and_gc_but_not_its_own_removal() {
    let Some(ply) = store() else { return };
    let context = copying(&ply);
    ply.ok(args!["rmi", "built"]);
    ply.ok(args!["gc"]);
    context.build(&[]).assert_all_cached();
}
