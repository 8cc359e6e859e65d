//! How a build goes about its steps, and what it says and writes of them.

use std::fs;

use plies_testkit::{args, ply::Ply, tree::Tree};
use serde_json::{Value, json};

use crate::common::{Context, Step, busybox, interrupted, store, tree_of};

fn store_with_base() -> Option<Ply> {
    store().filter(busybox)
}

#[track_caller]
fn text(tree: &Tree, name: &str, content: &str) {
    let expected = plies_testkit::sha256_hex(content.as_bytes());
    assert_eq!(tree.get(name).sha256.as_deref(), Some(&*expected), "/{name} is not {content:?}");
}

#[test]
fn branches_that_need_nothing_of_each_other_run_at_the_same_time() {
    let Some(ply) = store_with_base() else { return };
    // Each waits for the other; one after the other, the first would give up.
    let meet = |own: &str, other: &str| {
        format!(
            "RUN --mount=type=cache,target=/c touch /c/{own} && n=0 && \\\n\
             until test -e /c/{other}; do n=$((n+1)); test $n -lt 600 || exit 1; sleep 0.1; done; echo {own} > /{own}\n"
        )
    };
    let dockerfile = format!(
        "FROM busybox AS one\n{}FROM busybox AS two\n{}FROM busybox\nCOPY --from=one /one /\nCOPY --from=two /two /\n",
        meet("one", "two"),
        meet("two", "one")
    );
    let context = Context::new(&ply, &dockerfile);
    let built = context.build(args![]);
    assert_eq!(built.instructions().len(), 4, "{}", built.ran);
    let tree = tree_of(&ply, "built:latest");
    text(&tree, "one", "one\n");
    text(&tree, "two", "two\n");
    context.build(args![]).assert_all_cached();
}

#[test]
fn a_cache_that_is_locked_is_used_by_one_step_at_a_time() {
    let Some(ply) = store_with_base() else { return };
    let step = |sharing: &str| {
        format!(
            "RUN --mount=type=cache,id=l,sharing={sharing},target=/c \\\n\
             if test -e /c/busy; then echo busy; else echo alone; fi > /out; touch /c/busy; sleep 0.4; rm -f /c/busy\n"
        )
    };
    let dockerfile = |sharing: &str| {
        let names = ["a", "b", "c"];
        let stages = names.map(|name| format!("FROM busybox AS {name}\nENV N={name}\n{}", step(sharing)));
        let copies = names.map(|name| format!("COPY --from={name} /out /{name}\n"));
        format!("{}FROM busybox\n{}", stages.concat(), copies.concat())
    };
    for sharing in ["locked", "private"] {
        let context = Context::new(&ply, &dockerfile(sharing));
        context.build(args!["--no-cache"]);
        let tree = tree_of(&ply, "built:latest");
        ["a", "b", "c"].iter().for_each(|name| text(&tree, name, "alone\n"));
    }
}

#[test]
fn equal_steps_are_done_once() {
    let Some(ply) = store_with_base() else { return };
    let stage = |name: &str| {
        format!("FROM busybox AS {name}\nRUN --mount=type=cache,target=/c sleep 0.2; echo x >> /c/n; cp /c/n /n\n")
    };
    let dockerfile =
        format!("{}{}FROM busybox\nCOPY --from=one /n /one\nCOPY --from=two /n /two\n", stage("one"), stage("two"));
    let context = Context::new(&ply, &dockerfile);
    for (more, count) in [(args![], 1), (args!["--no-cache"], 2)] {
        context.build(more);
        let tree = tree_of(&ply, "built:latest");
        text(&tree, "one", &"x\n".repeat(count));
        text(&tree, "two", &"x\n".repeat(count));
    }
}

#[test]
fn the_step_that_fails_is_named_and_the_others_are_canceled() {
    let Some(ply) = store_with_base() else { return };
    let dockerfile = "FROM busybox AS slow\n\
        RUN --mount=type=cache,target=/c touch /c/up && sleep 1000\n\
        FROM busybox AS bad\n\
        RUN --mount=type=cache,target=/c until test -e /c/up; do sleep 0.1; done; echo said; exit 7\n\
        FROM busybox\n\
        COPY --from=slow /c /slow\n\
        COPY --from=bad /c /bad\n";
    let context = Context::new(&ply, dockerfile);
    let failed = context.build_fails(args![]);
    assert!(failed.stderr.contains("Dockerfile:4") && failed.stderr.contains("exit code 7"), "{failed}");
    assert!(failed.stderr.contains(" CANCELED\n") && failed.stderr.contains(" ERROR "), "{failed}");
    assert!(!failed.stderr.contains("Dockerfile:2"), "{failed}");
    let ended = interrupted(ply.command(&context.args(args!["--target", "slow"])));
    assert!(!ended.status.success());
}

#[test]
fn stages_can_be_left_out_of_the_cache() {
    let Some(ply) = store_with_base() else { return };
    let dockerfile = "FROM busybox AS a\nRUN echo a > /a\nFROM busybox AS b\nRUN echo b > /b\n\
        FROM busybox\nCOPY --from=a /a /\nCOPY --from=b /b /\nRUN true\n";
    let context = Context::new(&ply, dockerfile);
    context.build(args![]);
    let built = context.build(args!["--no-cache-filter", "B"]);
    assert_eq!((built.step("echo a"), built.step("echo b")), (Step::Cached, Step::Ran));
    assert_eq!(built.step("RUN true"), Step::Cached, "the same content is the same key");
    let built = context.build(args!["--no-cache-filter", "0,1"]);
    assert_eq!((built.step("echo a"), built.step("echo b")), (Step::Ran, Step::Ran));
}

#[test]
fn what_was_built_is_written_where_it_was_asked_for() {
    let Some(ply) = store_with_base() else { return };
    let context = Context::new(&ply, "FROM scratch\nCOPY --chmod=640 --chown=5:6 f /d/f\nCOPY f /g\n");
    context.file("f", "f");
    let out = |name: &str| ply.scratch().path().join(name);
    let to = |kind: &str, name: &str| format!("type={kind},dest={}", out(name).display());
    context.build(args!["-o", to("local", "dir"), "--metadata-file", out("meta.json"), "--iidfile", out("iid")]);
    let tree = Tree::of(&out("dir"));
    assert_eq!((tree.get("d/f").mode, tree.get("d/f").uid, tree.get("d/f").gid), (0o640, 5, 6));
    text(&tree, "g", "f");
    let meta: Value = serde_json::from_slice(&fs::read(out("meta.json")).unwrap()).unwrap();
    assert_eq!(meta["containerimage.config.digest"], fs::read_to_string(out("iid")).unwrap().as_str());
    assert_eq!(meta["image.name"], "built:latest");

    context.build(args!["-o", to("tar", "tree.tar")]);
    fs::create_dir(out("unpacked")).unwrap();
    let unpack =
        std::process::Command::new("tar").arg("-xpf").arg(out("tree.tar")).arg("-C").arg(out("unpacked")).status();
    assert!(unpack.unwrap().success());
    text(&Tree::of(&out("unpacked")), "d/f", "f");
    assert!(!out("tree.tar.partial").exists());

    for (kind, name) in [("oci", "oci.tar"), ("docker", "docker.tar"), ("oci,tar=false", "layout")] {
        context.build(args!["-o", to(kind, name)]);
        ply.ok(args!["rmi", "built:latest"]);
        let loaded = ply.ok(args!["load", "-i", out(name)]);
        assert!(loaded.stdout.contains("built:latest"), "{loaded}");
    }
    let piped = ply.ok(&[args!["build", "-q", "-o", "-"], args![context.dir]].concat());
    assert!(piped.stdout.contains("ustar") || piped.stdout.contains("d/f"), "a tar is on standard output");
    for bad in ["type=s3", "type=local", "type=oci,push=true", "type=docker,tar=false", "dest=x"] {
        ply.fails(2, &context.args(args!["-o", bad]));
    }
}

#[test]
fn progress_as_json_has_buildkits_names() {
    let Some(ply) = store_with_base() else { return };
    let context = Context::new(&ply, "FROM busybox\nRUN echo out\n");
    let args = [args!["build", "--progress", "rawjson"], args![context.dir]].concat();
    let read = |text: &str| -> Vec<Value> { text.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    let lines = read(&ply.ok(&args).stderr);
    let vertexes: Vec<&Value> = lines.iter().filter_map(|line| line["vertexes"].get(0)).collect();
    let step = |done: bool| {
        let is_it = |vertex: &&&Value| {
            vertex["name"].as_str().unwrap().ends_with("RUN echo out") && vertex.get("completed").is_some() == done
        };
        *vertexes.iter().find(is_it).unwrap()
    };
    assert_eq!(step(false)["digest"], step(true)["digest"]);
    assert!(step(true)["digest"].as_str().unwrap().starts_with("sha256:"));
    assert!(step(true).get("cached").is_none());
    let log = lines.iter().find_map(|line| line["logs"].get(0)).unwrap();
    assert_eq!((log["vertex"].clone(), log["data"].as_str()), (step(true)["digest"].clone(), Some("b3V0Cg==")));
    assert_eq!(log["stream"], 1);
    let again = read(&ply.ok(&args).stderr);
    let digest_in = |lines: &[Value], end: &str| {
        let mut vertexes = lines.iter().filter_map(|line| line["vertexes"].get(0));
        let found = vertexes.rfind(|vertex| vertex["name"].as_str().unwrap().ends_with(end)).unwrap();
        (found["digest"].as_str().unwrap().to_owned(), found["inputs"].clone(), found["error"].clone())
    };
    // The same file is the same graph, and of another only what stands on the change is.
    let (digest, inputs, error) = digest_in(&again, "RUN echo out");
    let (base, none, _) = digest_in(&again, "FROM busybox");
    assert_eq!((digest.as_str(), &inputs), (step(true)["digest"].as_str().unwrap(), &json!([base])));
    assert!(none.is_null() && error.is_null());
    context.file("Dockerfile", "FROM busybox\nRUN echo out\nRUN echo err >&2; exit 3\n");
    let failed =
        read(&ply.fails(1, &args).stderr.lines().filter(|line| line.starts_with('{')).collect::<Vec<_>>().join("\n"));
    assert_eq!(digest_in(&failed, "RUN echo out").0, digest);
    let (other, inputs, error) = digest_in(&failed, "exit 3");
    assert_eq!((other != digest, inputs), (true, json!([digest])));
    assert!(error.as_str().unwrap().contains("exit code 3"), "{error}");
    let log = failed.iter().filter_map(|line| line["logs"].get(0)).find(|log| log["vertex"] == other).unwrap();
    assert_eq!((log["stream"].clone(), log["data"].as_str()), (json!(2), Some("ZXJyCg==")));
    assert!(again.iter().any(|line| line["vertexes"][0]["cached"] == true), "{again:?}");
}

#[test]
fn the_time_that_an_image_tells_can_be_given() {
    let Some(ply) = store_with_base() else { return };
    let context = Context::new(&ply, "FROM busybox\nENV A=b\nRUN echo x > /x\nCMD [\"true\"]\n");
    let new_lines = |created: &str| {
        let history = ply.json(args!["history", "built:latest"]);
        history.as_array().unwrap().iter().filter(|line| line["created"] == created).count()
    };
    context.build(args!["--build-arg", "SOURCE_DATE_EPOCH=86400"]);
    assert_eq!(ply.json(args!["inspect", "built:latest"])["config"]["created"], "1970-01-02T00:00:00Z");
    assert_eq!(new_lines("1970-01-02T00:00:00Z"), 3);
    let mut command = ply.command(&context.args(args![]));
    assert!(command.env("SOURCE_DATE_EPOCH", "0").output().unwrap().status.success());
    assert_eq!(new_lines("1970-01-01T00:00:00Z"), 3);
    for bad in ["soon", "1.5", "99999999999999"] {
        let failed = context.build_fails(args!["--build-arg", format!("SOURCE_DATE_EPOCH={bad}")]);
        assert!(failed.stderr.contains("SOURCE_DATE_EPOCH") && failed.stderr.contains(bad), "{failed}");
    }
}

#[test]
fn the_error_of_a_command_has_its_last_words() {
    let Some(ply) = store_with_base() else { return };
    let context = Context::new(&ply, "FROM busybox\nRUN seq 100; printf '\\033[1mbold\\n' >&2; exit 3\n");
    let failed = ply.fails(1, &[args!["build", "-q"], args![context.dir]].concat());
    assert!(failed.stderr.contains("exit code 3; its last words"), "{failed}");
    assert!(failed.stderr.contains("\n  100\n") && !failed.stderr.contains("\n  90\n"), "{failed}");
    assert!(failed.stderr.contains("bold") && !failed.stderr.contains('\u{1b}'), "{failed}");
}

#[test]
fn a_step_that_is_not_cached_says_what_changed() {
    let Some(ply) = store_with_base() else { return };
    let dockerfile = "FROM busybox\nARG N=1\nCOPY a b /d/\nRUN --mount=target=/src,source=c true\nRUN echo $N\n";
    let context = Context::new(&ply, dockerfile);
    ["a", "b", "c"].iter().for_each(|name| drop(context.file(name, name)));
    context.build(args![]);
    let explained = |more: &[std::ffi::OsString]| {
        let built = context.build(&[args!["--explain"], more].concat());
        let lines = built.ran.stderr.lines().filter_map(|line| line.split_once(" this changed: "));
        lines.map(|(_, changed)| changed.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(explained(args![]), Vec::<String>::new());
    let variable = "variable N";
    assert_eq!(explained(args!["--build-arg", "N=2"]), [variable, &format!("the tree that it stands on, {variable}")]);
    context.file("c", "changed");
    assert_eq!(explained(args![]), ["what is mounted", "the tree that it stands on"]);
    context.file("a", "changed");
    let changed = explained(args![]);
    assert_eq!(changed[0], "a of the context");
    assert_eq!(changed[1..], ["the tree that it stands on", "the tree that it stands on"]);

    context.file("Dockerfile", "FROM busybox\nCOPY dir /d/\n");
    ["dir/one", "dir/sub/two", "dir/sub/three"].iter().for_each(|name| drop(context.file(name, name)));
    context.build(args![]);
    context.file("dir/sub/two", "changed");
    context.file("dir/sub/four", "new");
    std::fs::remove_file(context.dir.join("dir/one")).unwrap();
    assert_eq!(
        explained(args![]),
        ["dir/one of the context (gone), dir/sub/four of the context (new), dir/sub/two of the context"]
    );
}
