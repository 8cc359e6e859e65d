//! Builds a Dockerfile: what each instruction makes, with every way to run a step.

use std::{fs, os::unix::fs::PermissionsExt as _, os::unix::fs::symlink};

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::Ply,
    tar::{self, Member},
    tools,
    tree::Tree,
};
use serde_json::{Value, json};

use crate::common::{Built, Context, Step, busybox, load, store, tree_of};

/// Everything that can run a step here. All of them where `CI` is set.
pub(crate) fn executors() -> Vec<String> {
    let runtimes = ["crun", "runc"].into_iter().filter(|name| tools::have(&[name]));
    let paths = runtimes.map(|name| tools::find(name).expect("because it is there").to_string_lossy().into_owned());
    paths.chain(["builtin".to_owned()]).collect()
}

/// A store with a base image, where this machine allows.
#[track_caller]
fn store_with_base() -> Option<Ply> {
    let ply = store()?;
    busybox(&ply).then_some(ply)
}

#[track_caller]
fn text(tree: &Tree, name: &str, content: &str) {
    let expected = plies_testkit::sha256_hex(content.as_bytes());
    assert_eq!(tree.get(name).sha256.as_deref(), Some(&*expected), "/{name} is not {content:?}");
}

fn config_of(ply: &Ply, image: &str) -> Value {
    let out = ply.scratch().join("config-of");
    ply.ok(args!["save", "--format", "oci-dir", "-o", out, image]);
    let read = |digest: &Value| -> Value {
        let hex = digest.as_str().unwrap().trim_start_matches("sha256:");
        serde_json::from_slice(&fs::read(out.join("blobs/sha256").join(hex)).unwrap()).unwrap()
    };
    let index: Value = serde_json::from_slice(&fs::read(out.join("index.json")).unwrap()).unwrap();
    let manifest = read(&index["manifests"][0]["digest"]);
    let config = read(&manifest["config"]["digest"]);
    fs::remove_dir_all(out).unwrap();
    config
}

#[test]
fn every_executor_makes_the_same_tree_and_the_second_build_is_all_hits() {
    let dockerfile = "FROM busybox\n\
         ARG WHO=world\n\
         ENV GREETING=\"hello ${WHO}\"\n\
         WORKDIR /w\n\
         RUN echo \"$GREETING\" > shell; pwd > where; id > id; umask > umask\n\
         RUN [\"/bin/sh\", \"-c\", \"echo exec $0 > exec\", \"$GREETING\"]\n\
         USER app\n\
         RUN id > /tmp/app; echo $HOME > /tmp/home; touch /tmp/mine\n\
         USER 12:34\n\
         RUN id -u > /tmp/numbers; id -g >> /tmp/numbers\n\
         USER root\n\
         RUN mkdir -p d/e && ln -s e d/link && mkfifo d/pipe && mknod d/null c 1 3 && chown 5:6 d/e && rm -r /usr\n\
         RUN hostname > /dev/null; test -c /dev/null; test -d /proc/self; test -d /sys/kernel; echo tty > /dev/stderr\n";
    let mut first: Option<Tree> = None;
    for executor in executors() {
        let Some(ply) = store_with_base() else { return };
        let context = Context::new(&ply, dockerfile);
        let built = context.build(args!["--executor", executor]);
        assert!(built.instructions().iter().all(|(_, step)| *step == Step::Ran), "{executor}: {}", built.ran);
        let tree = tree_of(&ply, "built:latest").map(|_, node| {
            node.mtime = (0, 0);
            // Files of the lower layer that were moved up lose the names they shared below.
            node.links = 0;
        });
        text(&tree, "w/shell", "hello world\n");
        text(&tree, "w/where", "/w\n");
        // The exec form expands nothing: the shell it starts does, and sees the environment.
        text(&tree, "w/exec", "exec $GREETING\n");
        text(&tree, "w/umask", "0022\n");
        text(&tree, "tmp/numbers", "12\n34\n");
        assert_eq!((tree.get("tmp/mine").uid, tree.get("tmp/mine").gid), (1000, 1000), "{executor}");
        assert_eq!((tree.get("w/d/e").uid, tree.get("w/d/null").device), (5, Some((1, 3))), "{executor}");
        assert!(tree.find("usr").is_none());
        context.build(args!["--executor", executor]).assert_all_cached();
        match &first {
            Some(first) => first.assert_same(&tree, &executor),
            None => first = Some(tree),
        }
    }
}

#[test]
fn nothing_of_the_executor_stays_in_the_image() {
    for executor in executors() {
        let Some(ply) = store_with_base() else { return };
        let before = tree_of(&ply, "busybox:latest");
        Context::new(&ply, "FROM busybox\nRUN true\nRUN cat /etc/resolv.conf /etc/hosts >/dev/null 2>&1 || true\n")
            .build(args!["--executor", executor]);
        let after = tree_of(&ply, "built:latest");
        let calm = |tree: Tree| {
            tree.map(|name, node| {
                // Mount points must exist; making one touches the directory it is in.
                if ["", "etc", "dev", "proc", "sys"].contains(&name) {
                    node.mtime = (0, 0);
                }
            })
        };
        let diff = calm(before).diff(&calm(after));
        assert!(diff.is_empty(), "{executor}: steps that do nothing changed:\n{diff}");
    }
}

#[test]
fn stages_take_from_each_other_and_what_no_one_needs_is_not_built() {
    let Some(ply) = store_with_base() else { return };
    let context = Context::new(
        &ply,
        "FROM busybox AS one\nRUN mkdir /out && echo one > /out/one && ln /out/one /out/twin && chmod 600 /out/one\n\
         FROM busybox AS unneeded\nRUN echo never; exit 1\n\
         FROM one AS two\nRUN echo two > /out/two\n\
         FROM scratch\nCOPY --from=two /out /all\nCOPY --from=0 /out/one /first\nCOPY --from=busybox /etc/passwd /\n",
    );
    let built = context.build(&[]);
    assert!(!built.ran.stderr.contains("never"), "{}", built.ran);
    let tree = tree_of(&ply, "built:latest");
    assert_eq!(
        tree.names().filter(|name| !name.is_empty()).collect::<Vec<_>>(),
        ["all", "all/one", "all/twin", "all/two", "first", "passwd"]
    );
    assert_eq!(tree.get("all/one").mode, 0o600);
    context.build(&[]).assert_all_cached();

    context.build(args!["--target", "one"]);
    let tree = tree_of(&ply, "built:latest");
    assert!(tree.find("out/one").is_some() && tree.find("out/two").is_none());
}

#[test]
fn copy_keeps_modes_times_and_links_and_sets_owners() {
    let Some(ply) = store() else { return };
    let context = Context::new(
        &ply,
        "FROM scratch\nCOPY plain /plain\nCOPY --chown=7:8 dir /owned/\nCOPY --chmod=640 plain /moded\nCOPY link /link\n\
         WORKDIR /deep/er\nCOPY plain dir/sub/two ./\nCOPY dir /renamed\nCOPY *.md /globbed/\nCOPY [\"with space\", \"/to here\"]\n",
    );
    let plain = context.file("plain", "plain");
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o751)).unwrap();
    tools::run(std::process::Command::new("touch").args(["-d", "@1400000000.5"]).arg(&plain));
    context.file("dir/one", "1");
    context.file("dir/sub/two", "2");
    context.file("a.md", "a");
    context.file("b.md", "b");
    context.file("with space", "s");
    symlink("plain", context.dir.join("link")).unwrap();
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    let node = tree.get("plain");
    assert_eq!((node.mode, node.uid, node.gid), (0o751, 0, 0));
    assert_eq!(node.mtime.0, 1_400_000_000, "COPY keeps the time of a file");
    for name in ["owned/one", "owned/sub", "owned/sub/two"] {
        assert_eq!((tree.get(name).uid, tree.get(name).gid), (7, 8), "{name}");
    }
    assert_eq!(tree.get("moded").mode, 0o640);
    assert_eq!(tree.get("link").kind, "file", "a source that is a link is followed");
    for name in ["deep/er/plain", "deep/er/two", "renamed/sub/two", "globbed/a.md", "globbed/b.md", "to here"] {
        assert_eq!(tree.get(name).kind, "file", "{name}");
    }
}

#[test]
fn copy_does_not_follow_links_out_of_the_context_or_the_image() {
    let Some(ply) = store() else { return };
    let victim = ply.scratch().file("victim/secret", "secret");
    load(
        &ply,
        &Image::new("localhost/linked:1").layer(
            &[Member::symlink("out", victim.parent().unwrap().to_str().unwrap()), Member::dir("in")],
            Packing::Plain,
        ),
    );
    let context = Context::new(&ply, "FROM localhost/linked:1\nCOPY f /out/f\n");
    context.file("f", "f");
    context.build(&[]);
    assert_eq!(fs::read_dir(victim.parent().unwrap()).unwrap().count(), 1, "a file went out of the image");

    symlink(&victim, context.dir.join("leak")).unwrap();
    context.file("Dockerfile", "FROM scratch\nCOPY leak /leak\n");
    let ran = ply.run(&context.args(&[]));
    let leaked =
        ran.status.success() && tree_of(&ply, "built:latest").find("leak").is_some_and(|node| node.size_bytes == 6);
    assert!(!leaked, "a file of the host came into the image:\n{ran}");
}

#[test]
fn add_unpacks_archives_and_copies_everything_else() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "FROM scratch\nADD a.tar.gz b.tar /x/\nADD plain.gz /y/\nCOPY b.tar /z/\n");
    let inner = tar::archive(&[Member::dir("d").mode(0o711), Member::file("d/f", "f").owner(3, 4).mode(0o4755)]);
    context.file("a.tar.gz", Packing::Gzip.pack(&inner));
    context.file(
        "b.tar",
        tar::archive(&[Member::file("g", "g"), Member::symlink("out", "/etc"), Member::file("out/h", "h")]),
    );
    context.file("plain.gz", Packing::Gzip.pack(b"no archive"));
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    let f = tree.get("x/d/f");
    assert_eq!((f.mode, f.uid, f.gid, tree.get("x/d").mode), (0o4755, 3, 4, 0o711));
    assert_eq!(tree.get("x/g").kind, "file");
    assert!(tree.find("y/plain.gz").is_some() && tree.find("z/b.tar").is_some());
}

#[test]
fn dockerignore_leaves_out_what_it_names() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "FROM scratch\nCOPY . /all/\n");
    context
        .file(".dockerignore", "# comment\n*.log\n!keep.log\n**/secret\n/top\ndeep/*/x\nDockerfile\n.dockerignore\n");
    for name in
        ["a.log", "keep.log", "sub/b.log", "sub/secret", "secret", "top", "sub/top", "deep/1/x", "deep/1/2/x", "f"]
    {
        context.file(name, name);
    }
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    let files: Vec<_> = tree.names().filter(|name| tree.get(name).kind == "file").collect();
    assert_eq!(files, ["all/deep/1/2/x", "all/f", "all/keep.log", "all/sub/b.log", "all/sub/top"]);
}

#[test]
fn a_dockerfile_elsewhere_has_its_ignore_file_beside_it() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "");
    context.file(".dockerignore", "common\n");
    context.file("common", "");
    context.file("own", "");
    let dockerfile = ply.scratch().file("elsewhere/My.Dockerfile", "FROM scratch\nCOPY . /\n");
    let taken = || {
        context.build(args!["-f", dockerfile]);
        let tree = tree_of(&ply, "built:latest");
        ["common", "own"].map(|name| tree.find(name).is_some())
    };
    assert_eq!(taken(), [false, true], "the context's, for want of another");
    ply.scratch().file("elsewhere/My.Dockerfile.dockerignore", "own\n");
    assert_eq!(taken(), [true, false]);
}

#[test]
fn instructions_that_only_configure_are_in_the_config() {
    let Some(ply) = store() else { return };
    let context = Context::new(
        &ply,
        "FROM scratch\n\
         ENV A=1 B=\"two words\" C=$A\n\
         LABEL one=1 \"two words\"='2'\n\
         EXPOSE 80 53/udp\n\
         VOLUME /data [\"/more\"]\n\
         USER 1:2\n\
         WORKDIR /w\n\
         WORKDIR rel\n\
         STOPSIGNAL SIGINT\n\
         ENTRYPOINT [\"/entry\", \"a b\"]\n\
         CMD echo \"$A\"\n"
            .replace("VOLUME /data [\"/more\"]", "VOLUME [\"/data\", \"/more\"]")
            .as_str(),
    );
    context.build(args!["--label", "three=3", "-t", "second:name"]);
    let config = config_of(&ply, "second:name");
    let run = &config["config"];
    // All of one ENV sees what was before it.
    assert_eq!(
        run["Env"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|env| !env.as_str().unwrap().starts_with("PATH="))
            .collect::<Vec<_>>(),
        [&json!("A=1"), &json!("B=two words"), &json!("C=")]
    );
    assert_eq!(run["Labels"], json!({ "one": "1", "two words": "2", "three": "3" }));
    assert_eq!(run["ExposedPorts"], json!({ "80/tcp": {}, "53/udp": {} }));
    assert_eq!(run["Volumes"], json!({ "/data": {}, "/more": {} }));
    assert_eq!(
        (&run["User"], &run["WorkingDir"], &run["StopSignal"]),
        (&json!("1:2"), &json!("/w/rel"), &json!("SIGINT"))
    );
    assert_eq!(run["Entrypoint"], json!(["/entry", "a b"]));
    assert_eq!(run["Cmd"], json!(["/bin/sh", "-c", "echo \"$A\""]));
    assert_eq!(config["os"], "linux");
    let layers = config["rootfs"]["diff_ids"].as_array().unwrap().len();
    let history = config["history"].as_array().unwrap();
    let filled = history.iter().filter(|step| step["empty_layer"] != json!(true)).count();
    assert_eq!(filled, layers, "a history step for every layer: {history:#?}");
    assert!(history.len() >= 10, "every instruction is in the history: {history:#?}");
}

#[test]
fn arguments_reach_what_they_should_and_no_further() {
    let Some(ply) = store_with_base() else { return };
    let context = Context::new(
        &ply,
        "ARG BASE=no-such-base\nARG GLOBAL=global\nFROM ${BASE}\n\
         ARG GLOBAL\nARG LOCAL=default\nARG UNSET\n\
         RUN echo \"$GLOBAL $LOCAL ${UNSET:-unset}\" > /first\n\
         ENV LOCAL=env\nRUN echo \"$LOCAL\" > /second\n\
         FROM ${BASE}\nRUN echo \"${LOCAL:-none} ${GLOBAL:-none}\" > /third\nCOPY --from=0 /first /second /\n",
    );
    context.build(args!["--build-arg", "BASE=busybox", "--build-arg", "LOCAL=given"]);
    let tree = tree_of(&ply, "built:latest");
    text(&tree, "first", "global given unset\n");
    text(&tree, "second", "env\n");
    text(&tree, "third", "none none\n");
    let config = config_of(&ply, "built:latest")["config"].to_string();
    assert!(!config.contains("given"), "a build argument is no part of the image: {config}");
}

#[test]
fn a_base_gives_its_configuration_to_what_is_built_on_it() {
    let Some(ply) = store() else { return };
    load(
        &ply,
        &Image::new("localhost/base:1")
            .layer(&[Member::file("f", "")], Packing::Plain)
            .config("Env", json!(["PATH=/own", "A=base"]))
            .config("WorkingDir", json!("/from-base"))
            .config("Labels", json!({ "kept": "yes" })),
    );
    Context::new(&ply, "FROM localhost/base:1\nENV B=$A\nENTRYPOINT [\"/x\"]\n").build(&[]);
    let config = config_of(&ply, "built:latest");
    assert_eq!(config["config"]["Env"], json!(["PATH=/own", "A=base", "B=base"]));
    assert_eq!(config["config"]["WorkingDir"], "/from-base");
    assert_eq!(config["config"]["Labels"]["kept"], "yes");
    assert!(config["config"]["Cmd"].is_null(), "a new ENTRYPOINT drops the base's CMD");
    assert_eq!(config["history"][0]["created_by"], "layer 0", "the base's history comes first");
}

#[test]
fn an_image_built_on_a_base_keeps_the_base_blobs() {
    let Some(ply) = store() else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::file("f", vec![1; 9999])], Packing::Gzip);
    load(&ply, &base);
    let context = Context::new(&ply, "FROM localhost/base:1\nCOPY g /g\n");
    context.file("g", "g");
    context.build(&[]);
    let out = ply.scratch().join("out");
    ply.ok(args!["save", "--format", "oci-dir", "-o", out, "built:latest"]);
    assert!(plies_testkit::image::blobs_of(&out).contains_key(&base.layer_digest(0)));
}

#[test]
fn run_runs_a_command_in_an_image_and_passes_its_code_on() {
    for executor in executors() {
        let Some(ply) = store_with_base() else { return };
        Context::new(
            &ply,
            "FROM busybox\nENV A=1\nWORKDIR /w\nENTRYPOINT [\"/bin/sh\", \"-c\"]\nCMD [\"echo $A; pwd\"]\n",
        )
        .build(&[]);
        let ran = ply.ok(args!["run", "--executor", executor, "built"]);
        assert_eq!(ran.stdout, "1\n/w\n", "{executor}");
        let before = tree_of(&ply, "busybox");
        let ran = ply.run(args!["run", "--executor", executor, "busybox", "--", "sh", "-c", "echo gone > /f; exit 7"]);
        assert_eq!(ran.status.code(), Some(7), "{executor}: {ran}");
        tree_of(&ply, "busybox").assert_same(&before, "what a run writes is thrown away");
    }
}

#[test]
fn built_images_are_named_listed_inspected_and_removed() {
    let Some(ply) = store_with_base() else { return };
    let iid = ply.scratch().join("iid");
    Context::new(&ply, "FROM busybox\nRUN echo x > /x\n").build(args!["-t", "other:2", "--iidfile", iid]);
    let id = fs::read_to_string(iid).unwrap();
    let hex = id.trim().trim_start_matches("sha256:");
    assert_eq!(hex.len(), 64, "{id:?}");
    for name in ["built:latest", "built", "other:2", hex, &hex[..12]] {
        assert!(ply.ok(args!["inspect", name]).stdout.contains(hex), "{name}");
    }
    let table = ply.ok(args!["images"]).stdout;
    for text in ["built", "other", "busybox", &hex[..12]] {
        assert!(table.contains(text), "{text} is not in:\n{table}");
    }
    assert!(ply.ok(args!["history", "built"]).stdout.contains("echo x"));
    ply.ok(args!["tree"]);
    ply.ok(args!["tree", "built"]);
    ply.ok(args!["info"]);
    ply.ok(args!["rmi", "built", "other:2"]);
    ply.fails(1, args!["inspect", hex]);
    tree_of(&ply, "busybox");
}

#[test]
fn the_quick_start_builds_and_is_all_hits_the_second_time() {
    let Some(ply) = store() else { return };
    let Some(busybox) = tools::have(&["busybox"]).then(|| tools::find("busybox")).flatten() else { return };
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/quickstart");
    let context = ply.scratch().join("quickstart");
    tools::run(std::process::Command::new("cp").arg("-r").arg(examples).arg(&context));
    fs::copy(busybox, context.join("base/busybox")).unwrap();
    ply.ok(args!["build", "-t", "busybox:latest", context.join("base")]);
    let build = || Built::of(ply.ok(args!["build", "--progress", "plain", "-t", "greeter:latest", context]));
    assert!(build().instructions().iter().all(|(_, step)| *step == Step::Ran));
    build().assert_all_cached();
    let tree = tree_of(&ply, "greeter:latest");
    assert_eq!((tree.get("srv/index.html").uid, tree.get("bin/serve").mode), (1000, 0o755));
    assert!(tree.find("work").is_none(), "the first stage stays out of the image");
    let ran = ply.ok(args!["run", "greeter", "--", "sh", "-c", "id -u; cat index.html"]);
    assert!(ran.stdout.starts_with("1000\n<h1>Plies</h1>\n<p>blob</p>\n"), "{ran}");
}

#[test]
fn b15_a_step_that_floods_its_log_is_clipped_and_runs_to_its_end() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let context = Context::new(&ply, "FROM busybox\nRUN printf x; yes | head -c 20000000; echo done > /done\n");
    let built = context.build(&[]);
    assert!(built.ran.stderr.contains("OUTPUT_BYTES_MAX"), "says that it was clipped");
    // 2 MiB: `xy`, a newline, then `y` and a newline each, the last without.
    let shown = built.ran.stderr.lines().filter(|line| line.ends_with(" y")).count();
    assert_eq!(shown, ((2 << 20) - 3) / 2 + 1);
    assert!(tree_of(&ply, "built").find("done").is_some());
}

#[test]
fn a_layer_too_many_is_told_at_its_line() {
    let Some(ply) = store() else { return };
    // One layer a thousand times: so many are allowed, whatever is in them.
    let mut image = Image::new("localhost/deep:1");
    for _ in 0..1000 {
        image = image.layer(&[Member::file("f", "")], Packing::Plain);
    }
    load(&ply, &image);
    let context = Context::new(&ply, "FROM localhost/deep:1\nLABEL a=b\nCOPY Dockerfile /one\nLABEL c=d\n");
    let ran = context.build_fails(&[]);
    for text in ["Dockerfile:3", "1001 layers", "limits.layers", "1000"] {
        assert!(ran.stderr.contains(text), "does not say {text}: {ran}");
    }
    assert_eq!(ply.json(args!["images"]).as_array().unwrap().len(), 1);
    context.file("Dockerfile", "FROM localhost/deep:1\nLABEL a=b\n");
    context.build(&[]);
    assert_eq!(ply.json(args!["inspect", "built"])["layers_count"], 1000);
}

/// A base with accounts and a tree to write to, and nothing that runs.
fn accounts(ply: &Ply) {
    let members = [
        Member::dir("etc"),
        Member::file("etc/passwd", "root:x:0:0::/root:/bin/sh\nsvc:x:7:70::/:/bin/sh\nother:x:8:80::/:/bin/sh\n"),
        Member::file("etc/group", "root:x:0:\nsvc:x:70:\nstaff:x:50:svc\n"),
        Member::dir("srv"),
        Member::dir("run"),
        Member::dir("var"),
        Member::symlink("var/run", "/run"),
    ];
    load(ply, &Image::new("localhost/accounts:1").layer(&members, Packing::Plain));
}

#[test]
fn directories_that_workdir_makes_belong_to_the_user() {
    let Some(ply) = store() else { return };
    accounts(&ply);
    let build = |users: &str| {
        let built = Context::new(&ply, &format!("FROM localhost/accounts:1\n{users}WORKDIR /srv/a/b\n")).build(&[]);
        let tree = tree_of(&ply, "built:latest");
        let owners = ["srv", "srv/a", "srv/a/b"].map(|name| (tree.get(name).uid, tree.get(name).gid));
        assert!(["srv", "srv/a", "srv/a/b"].iter().all(|name| tree.get(name).mode == 0o755), "{users}");
        (built.step("WORKDIR"), owners)
    };
    // What is there already keeps its owner.
    let made_by = |owner| [(0, 0), owner, owner];
    assert_eq!(build("USER svc\n"), (Step::Ran, made_by((7, 70))));
    assert_eq!(build("USER svc\n"), (Step::Cached, made_by((7, 70))));
    assert_eq!(build("USER svc:staff\n"), (Step::Ran, made_by((7, 50))));
    assert_eq!(build("USER 12:34\n"), (Step::Ran, made_by((12, 34))));
    assert_eq!(build("USER svc\nUSER root\n"), (Step::Ran, made_by((0, 0))));
    assert_eq!(build(""), (Step::Ran, made_by((0, 0))));
    assert_eq!(build("USER svc\n"), (Step::Cached, made_by((7, 70))));
}

#[test]
fn chown_by_name_brings_the_primary_group_and_by_number_the_group_of_that_number() {
    let Some(ply) = store() else { return };
    accounts(&ply);
    let context = Context::new(
        &ply,
        "FROM localhost/accounts:1\nCOPY --chown=svc Dockerfile /name/f\nCOPY --chown=5 Dockerfile /number/f\n\
         COPY --chown=7 Dockerfile /known/f\nCOPY --chown=svc:staff Dockerfile /both/f\n\
         COPY --chown=svc:5 Dockerfile /mixed/f\nADD --chown=svc a.tar Dockerfile /added/x/\n",
    );
    context.file("a.tar", tar::archive(&[Member::file("g", "")]));
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    for (dir, owner) in [("name", (7, 70)), ("number", (5, 5)), ("known", (7, 7)), ("both", (7, 50)), ("mixed", (7, 5))]
    {
        for name in [dir.to_owned(), format!("{dir}/f")] {
            assert_eq!((tree.get(&name).uid, tree.get(&name).gid), owner, "{name}");
        }
    }
    for name in ["added", "added/x", "added/x/Dockerfile"] {
        assert_eq!((tree.get(name).uid, tree.get(name).gid), (7, 70), "{name}");
    }
}

#[test]
fn copy_link_below_a_link_of_the_base_says_so() {
    let Some(ply) = store() else { return };
    accounts(&ply);
    let context = Context::new(&ply, "FROM localhost/accounts:1\nCOPY --link Dockerfile /var/run/f\n");
    let ran = context.build_fails(&[]);
    let told = ran.stderr.lines().find(|line| line.starts_with("ply: ")).unwrap();
    for text in ["Dockerfile:2", "/var/run ", "use it without --link"] {
        assert!(told.contains(text), "does not say {text}: {ran}");
    }
    // What it says to do helps.
    context.file("Dockerfile", "FROM localhost/accounts:1\nCOPY Dockerfile /var/run/f\n");
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    assert_eq!((tree.get("run/f").kind, tree.get("var/run").kind), ("file", "symlink"));
}

#[test]
fn a_long_command_that_fails_is_quoted_in_part() {
    let Some(ply) = store_with_base() else { return };
    // Two bytes a character: what is cut is characters.
    let long = format!("exit 3 # {}", "é".repeat(5000));
    let ran = Context::new(&ply, &format!("FROM busybox\nRUN {long}\n")).build_fails(&[]);
    let told = ran.stderr.lines().find(|line| line.starts_with("ply: ")).unwrap();
    let quoted = told.split('"').nth(1).unwrap();
    let command = format!("/bin/sh -c {long}");
    let shown = quoted.strip_suffix('…').unwrap();
    assert!(command.starts_with(shown) && shown.chars().count() == 200, "{} in {told}", shown.chars().count());
    assert!(told.contains("Dockerfile:2") && told.contains("exit code 3"), "{told}");
    let longest =
        ran.stderr.lines().skip_while(|line| !line.starts_with("ply: ")).map(|line| line.chars().count()).max();
    assert!(longest.unwrap() < 400, "{longest:?}");
    // A short one is quoted whole.
    let ran = Context::new(&ply, "FROM busybox\nRUN exit 4\n").build_fails(&[]);
    assert!(ran.stderr.contains("process \"/bin/sh -c exit 4\" did"), "{ran}");
}

#[test]
fn the_syntax_of_another_frontend_is_warned_of() {
    let Some(ply) = store() else { return };
    let build = |syntax: &str| {
        let context = Context::new(&ply, &format!("# syntax={syntax}\nFROM scratch\nCOPY Dockerfile /\n"));
        context.build(&[]).ran.stderr
    };
    for other in ["example.com/frontend:1", "someone/docker/dockerfile:1", "not/docker/dockerfile2", "Nonsense!"] {
        let stderr = build(other);
        let warned =
            stderr.lines().find(|line| line.contains("warning: ")).unwrap_or_else(|| panic!("{other}: {stderr}"));
        assert!(warned.contains(other), "{stderr}");
    }
    for dockers in [
        "docker/dockerfile:1",
        "docker/dockerfile",
        "docker.io/docker/dockerfile:1.7-labs",
        "docker/dockerfile-upstream:master",
        "mirror.example.com:5000/docker/dockerfile:1",
    ] {
        let stderr = build(dockers);
        assert!(!stderr.contains("warning"), "{dockers}: {stderr}");
    }
}
