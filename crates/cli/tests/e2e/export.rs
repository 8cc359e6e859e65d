//! What becomes of a build's result: archives, registries, files, and what an image says of itself.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use plies_testkit::{
    args,
    image::{Image, Packing, architecture, untar},
    ply::Ply,
    registry::DockerRegistry,
    tar::Member,
    tools::{self, containers},
};
use serde_json::{Value, json};

use crate::common::{Built, Context, State, busybox, files, load, store, tree_of};

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// An OCI layout, read.
struct Layout {
    dir: PathBuf,
    index: Value,
    manifest: Value,
    /// The manifest's digest.
    digest: String,
}

impl Layout {
    fn read(dir: &Path) -> Self {
        let index: Value = serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        let mut layout = Self { dir: dir.to_owned(), index, manifest: Value::Null, digest };
        layout.manifest = layout.json(&layout.digest);
        layout
    }

    fn blob(&self, digest: &str) -> Vec<u8> {
        fs::read(self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))).unwrap()
    }

    fn json(&self, digest: &str) -> Value {
        serde_json::from_slice(&self.blob(digest)).unwrap()
    }

    fn config(&self) -> Value {
        self.json(self.manifest["config"]["digest"].as_str().unwrap())
    }

    fn media_types(&self) -> Vec<&str> {
        self.layers().map(|layer| layer["mediaType"].as_str().unwrap()).collect()
    }

    fn layers(&self) -> impl Iterator<Item = &Value> {
        self.manifest["layers"].as_array().unwrap().iter()
    }

    fn layer_bytes(&self) -> u64 {
        self.layers().map(|layer| layer["size"].as_u64().unwrap()).sum()
    }
}

/// Builds into a layout with these keys and reads it.
#[track_caller]
fn exported(context: &Context<'_>, keys: &str, more: &[std::ffi::OsString]) -> Layout {
    let dir = context.ply.scratch().join("exported");
    drop(fs::remove_dir_all(&dir));
    let keys = if keys.is_empty() { String::new() } else { format!(",{keys}") };
    context.build(&[args!["-o", format!("type=oci,tar=false,dest={}{keys}", dir.display())], more].concat());
    Layout::read(&dir)
}

/// What `ply save` writes of an image.
#[track_caller]
fn saved(ply: &Ply, image: &str) -> Layout {
    let dir = ply.scratch().join("saved");
    drop(fs::remove_dir_all(&dir));
    ply.ok(args!["save", "--format", "oci-dir", "-o", dir, image]);
    Layout::read(&dir)
}

/// A base whose one layer is a gzip of somebody else's, and a file to put on it.
fn on_a_base(ply: &Ply) -> Context<'_> {
    load(ply, &Image::new("localhost/base:1").layer(&[Member::file("base", "base".repeat(999))], Packing::Gzip));
    let context = Context::new(ply, "FROM localhost/base:1\nCOPY f /f\n");
    context.file("f", "text ".repeat(9999));
    context
}

#[test]
fn layers_are_packed_as_asked_for_and_what_came_packed_stays_unless_forced() {
    let Some(ply) = store() else { return };
    let context = on_a_base(&ply);
    let default = exported(&context, "", &[]);
    assert_eq!(default.media_types(), [GZIP, GZIP]);
    for (keys, expected) in [
        ("compression=zstd", [GZIP, ZSTD]),
        ("compression=uncompressed", [GZIP, PLAIN]),
        ("compression=zstd,force-compression=true", [ZSTD, ZSTD]),
        ("compression=uncompressed,force-compression=true", [PLAIN, PLAIN]),
        ("compression=gzip,force-compression=true", [GZIP, GZIP]),
    ] {
        let layout = exported(&context, keys, &[]);
        assert_eq!(layout.media_types(), expected, "{keys}");
        assert_eq!(layout.config(), default.config(), "{keys}");
        assert_eq!(saved(&ply, "built:latest").digest, layout.digest, "{keys}: the store has the same");
        if tools::have(&["skopeo"]) {
            let from = format!("oci:{}", layout.dir.display());
            let to = format!("dir:{}", ply.scratch().join("skopeo").display());
            tools::run(containers("skopeo", &ply.scratch().join("state")).args(["copy", "-q", &from, &to]));
        }
    }
    let (fast, best) = (exported(&context, "compression-level=1", &[]), exported(&context, "compression-level=9", &[]));
    assert!(fast.layer_bytes() > best.layer_bytes(), "{} {}", fast.layer_bytes(), best.layer_bytes());
    // Whatever else was made of the layers since, the default is what it was.
    assert_eq!(exported(&context, "", &[]).digest, default.digest);
    // A layer that was packed before is not packed again.
    let built = context.build(args!["-o", "type=image,compression=zstd"]);
    assert!(!built.ran.stderr.contains("compress layer"), "{}", built.ran);
}

#[test]
fn an_image_of_dockers_media_types_is_the_same_image() {
    let Some(ply) = store() else { return };
    let context = on_a_base(&ply);
    let ours = exported(&context, "", &[]);
    let dockers = exported(&context, "oci-mediatypes=false", &[]);
    assert_eq!(dockers.manifest["mediaType"], "application/vnd.docker.distribution.manifest.v2+json");
    assert_eq!(dockers.manifest["config"]["mediaType"], "application/vnd.docker.container.image.v1+json");
    assert_eq!(dockers.media_types(), ["application/vnd.docker.image.rootfs.diff.tar.gzip"; 2]);
    assert_eq!(dockers.manifest["config"]["digest"], ours.manifest["config"]["digest"]);
}

#[test]
fn annotations_are_kept_shown_saved_and_gone_when_nobody_asks_for_them() {
    let Some(ply) = store() else { return };
    let context = on_a_base(&ply);
    let more = args![
        "--annotation",
        "org.opencontainers.image.source=here, and there",
        "--annotation",
        "manifest,manifest-descriptor:both=\u{1b}[1mé"
    ];
    let layout = exported(&context, "annotation.a.b=1,annotation-manifest-descriptor.only=entry", more);
    let manifest = json!({"a.b": "1", "both": "\u{1b}[1mé", "org.opencontainers.image.source": "here, and there"});
    assert_eq!(layout.manifest["annotations"], manifest);
    let entry = &layout.index["manifests"][0]["annotations"];
    assert_eq!((&entry["only"], &entry["both"]), (&json!("entry"), &json!("\u{1b}[1mé")));
    assert_eq!(entry["io.containerd.image.name"], "docker.io/library/built:latest");
    // The store has the same manifest.
    assert_eq!(ply.json(args!["inspect", "built:latest"])["annotations"], manifest);
    assert_eq!(saved(&ply, "built:latest").digest, layout.digest);
    ply.ok(args!["tag", "built:latest", "localhost/other:1"]);
    assert_eq!(ply.json(args!["inspect", "localhost/other:1"])["annotations"], manifest);
    // The same image built without them has none, and the other name keeps its own.
    context.build(args!["--label", "unrelated=0"]);
    context.build(&[]);
    assert_eq!(ply.json(args!["inspect", "built:latest"])["annotations"], json!({}));
    assert_eq!(saved(&ply, "built:latest").manifest["annotations"], Value::Null);
    assert_eq!(ply.json(args!["inspect", "localhost/other:1"])["annotations"], manifest);
    let inspected = ply.json(args!["inspect", "built:latest"]);
    assert_eq!(inspected["manifests"].as_array().unwrap().len(), 2, "{inspected}");
}

#[test]
fn a_build_is_pushed_as_it_was_asked_for() {
    let Some(ply) = store() else { return };
    if !tools::have(&["docker-registry"]) {
        return;
    }
    let registry = DockerRegistry::start(&ply.scratch().join("registry"), None);
    let context = on_a_base(&ply);
    let (one, two) = (format!("{}/team/one:1", registry.host()), format!("{}/team/two:1", registry.host()));
    let output = format!("type=image,\"name={one},{two}\",push=true,compression=zstd,annotation.k=v");
    let meta = ply.scratch().join("meta.json");
    let ran = ply.ok(&[args!["build", "-o", output, "--metadata-file", meta], args![context.dir]].concat());
    let meta: Value = serde_json::from_slice(&fs::read(meta).unwrap()).unwrap();
    let digest = meta["containerimage.digest"].as_str().unwrap();
    assert!(ran.stdout.contains(&format!("team/one:1: digest: {digest}")), "{ran}");
    let fresh = store().unwrap();
    for name in [&one, &two] {
        assert_eq!(fresh.json(args!["pull", name])["manifest"], digest);
        assert_eq!(fresh.json(args!["inspect", name])["annotations"]["k"], "v");
        assert_eq!(saved(&fresh, name).media_types(), [GZIP, ZSTD]);
    }
    let three = format!("{}/team/three:1", registry.host());
    ply.ok(&[args!["build", "-o", "type=registry", "-t", three], args![context.dir]].concat());
    assert_eq!(fresh.json(args!["pull", three])["id"], ply.json(args!["inspect", three])["id"]);
    // What can't be pushed is not named.
    drop(registry);
    // Nobody listens there.
    let four = "127.0.0.1:1/four:1";
    ply.fails(1, &[args!["build", "-o", "type=registry", "-t", four], args![context.dir]].concat());
    ply.fails(1, args!["inspect", four]);
}

/// Sets all times in a directory, itself included.
fn set_times(dir: &Path, time: SystemTime) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            set_times(&path, time);
        } else {
            fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        }
    }
    fs::File::open(dir).unwrap().set_modified(time).unwrap();
}

#[test]
fn the_same_build_elsewhere_and_later_is_the_same_image() {
    const EPOCH: u64 = 1_600_000_000;
    let dockerfile = "FROM busybox AS tools\nRUN mkdir /t && echo tool > /t/tool && ln -s tool /t/link\n\
        FROM busybox\nLABEL a=b\nARG X=1\nWORKDIR /w\nCOPY --chmod=600 f d /w/\nCOPY --link d /linked\n\
        RUN echo $X > x; rm /w/f; date > /dev/null; mkfifo p\nCOPY --from=tools /t /t\nCMD [\"true\"]\n";
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    // Of the first two, files are younger than the epoch; the last has one that is older and stays so.
    let build = |seconds: u64, old: Option<u64>, keys: &str| {
        let ply = store().filter(busybox)?;
        let context = Context::new(&ply, dockerfile);
        context.file("f", "f");
        context.file("d/one", "1");
        context.file("d/sub/two", "2");
        set_times(&context.dir, at(seconds));
        if let Some(old) = old {
            let file = fs::File::options().write(true).open(context.dir.join("d/one")).unwrap();
            file.set_modified(at(old)).unwrap();
        }
        let epoch = args!["--build-arg", format!("SOURCE_DATE_EPOCH={EPOCH}")];
        let layout = exported(&context, keys, epoch);
        assert_eq!(saved(&ply, "built:latest").digest, layout.digest, "the store has the same");
        let config = layout.config();
        assert_eq!(config["created"], "2020-09-13T12:26:40Z");
        let added = config["history"].as_array().unwrap().iter().skip(1);
        added.for_each(|line| assert_eq!(line["created"], "2020-09-13T12:26:40Z", "{line}"));
        let again = Built::of(ply.ok(&context.args(&[epoch, args!["-o", format!("type=image,{keys}")]].concat())));
        assert_eq!(saved(&ply, "built:latest").digest, layout.digest);
        assert!(!again.ran.stderr.contains("receive layer"), "rebuilt once: {}", again.ran);
        let tree = tree_of(&ply, "built:latest");
        let base = saved(&ply, "busybox:latest").manifest["layers"][0].clone();
        assert_eq!(layout.manifest["layers"][0], base, "the base's layer is not touched");
        let mtimes: Vec<(String, i64)> = ["t/tool", "w/x", "w/one", "linked/sub/two", "w"]
            .iter()
            .map(|name| ((*name).to_owned(), tree.get(name).mtime.0))
            .collect();
        Some((layout.digest, mtimes))
    };
    let rewrite = "rewrite-timestamp=true";
    let Some((first, mtimes)) = build(1_700_000_000, None, rewrite) else { return };
    let epoch = i64::try_from(EPOCH).unwrap();
    assert!(mtimes.iter().all(|(_, mtime)| *mtime == epoch), "{mtimes:?}");
    let (second, _) = build(1_650_000_000, None, rewrite).unwrap();
    assert_eq!(first, second);
    let (third, mtimes) = build(1_650_000_000, Some(1_500_000_000), rewrite).unwrap();
    assert_ne!(first, third);
    assert_eq!(mtimes[2], ("w/one".to_owned(), 1_500_000_000), "older times stay");
}

#[test]
fn times_are_rewritten_only_where_there_is_a_time() {
    let Some(ply) = store() else { return };
    let context = on_a_base(&ply);
    let before = State::of(&ply);
    let failed = context.build_fails(args!["-o", "type=image,rewrite-timestamp=true"]);
    assert!(failed.stderr.contains("SOURCE_DATE_EPOCH"), "{failed}");
    before.assert_same(&State::of(&ply), "a build without a time");
    // Nothing is later than the distant future: the layers stay as they are.
    let far = args!["--build-arg", "SOURCE_DATE_EPOCH=9999999999"];
    let plain = exported(&context, "", far);
    assert_eq!(exported(&context, "rewrite-timestamp=true", far).digest, plain.digest);
}

#[test]
fn an_export_that_fails_names_nothing_and_leaves_nothing() {
    let Some(ply) = store() else { return };
    // Bytes that no compressor makes fewer.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let noise: Vec<u8> = (0..4_000_000).map(|_| next()).collect();
    let context = Context::new(&ply, "FROM scratch\nCOPY noise /noise\n");
    context.file("noise", noise);
    // The step and its packed layer are in the cache from now on, so that only the export can change something.
    let packed = format!("type=oci,dest={}", ply.scratch().join("packed.tar").display());
    context.build(args!["-o", packed, "-o", "type=image,name=localhost/first:1"]);
    // That the step was used once more is right, so uses are not compared.
    let state = || (ply.json(args!["images"]), files(&ply.root()));
    let before = state();
    let small = ply.scratch().dir("small-disk");
    tools::run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&small));
    fs::write(small.join("old"), "old").unwrap();
    let file = ply.scratch().file("file", "");
    for (kind, dest) in [
        ("oci", small.join("a")),
        ("docker", small.join("a")),
        ("tar", small.join("a")),
        ("tar", small.join("old")),
        ("local", small.join("dir")),
        ("oci", file.join("below")),
        ("tar", file.join("below")),
        ("local", file.join("below")),
        ("local", file.clone()),
        ("oci,tar=false", file.clone()),
        ("tar", ply.scratch().join("no/such/dir/a")),
        ("oci", PathBuf::from("/proc/none")),
        ("tar", PathBuf::from("/dev/full")),
    ] {
        let failed = context.build_fails(args!["-o", format!("type={kind},dest={}", dest.display())]);
        let what = format!("{kind} to {}", dest.display());
        assert_eq!(failed.stderr.lines().filter(|line| line.starts_with("ply: ")).count(), 1, "{what}: {failed}");
        assert_eq!(state(), before, "{what}");
        let left: Vec<_> = fs::read_dir(&small).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["old"], "{what}");
        assert_eq!(fs::read(small.join("old")).unwrap(), b"old", "{what}");
    }
    tools::run(Command::new("umount").arg(&small));
    // One that succeeds before one that fails stays, and names nothing.
    let out = ply.scratch().join("good.tar");
    let good = format!("type=tar,dest={}", out.display());
    context.build_fails(args!["-o", good, "-o", format!("type=oci,dest={}", file.join("below").display())]);
    assert!(out.exists());
    assert_eq!(state(), before, "the second of two");
}

#[test]
fn several_outputs_are_written_and_what_cannot_be_is_refused_before() {
    let Some(ply) = store() else { return };
    let context = on_a_base(&ply);
    let out = |name: &str| ply.scratch().join(name);
    let to = |kind: &str, name: &str| format!("type={kind},dest={}", out(name).display());
    context.build(args![
        "-o",
        to("oci", "a.tar"),
        "-o",
        to("oci,compression=zstd,tar=false,annotation.only=here", "layout"),
        "-o",
        to("docker", "d.tar"),
        "-o",
        to("local", "new/dir"),
        "-o",
        to("tar", "t.tar")
    ]);
    let first = Layout::read(&untar(&out("a.tar"), &out("a")));
    assert_eq!((first.media_types(), &first.manifest["annotations"]), (vec![GZIP, GZIP], &Value::Null));
    assert_eq!(saved(&ply, "built:latest").digest, first.digest, "the store has the first archive's image");
    let second = Layout::read(&out("layout"));
    assert_eq!((second.media_types(), &second.manifest["annotations"]["only"]), (vec![GZIP, ZSTD], &json!("here")));
    assert_eq!(fs::read(out("new/dir/f")).unwrap().len(), 5 * 9999);
    assert_eq!(fs::metadata(out("new/dir")).unwrap().permissions().mode() & 0o777, 0o755);
    assert!(out("d.tar").exists() && out("t.tar").exists());
    let nothing = store().unwrap();
    let elsewhere = on_a_base(&nothing);
    let before = nothing.json(args!["images"]);
    let ran = nothing.ok(&[args!["build", "-o", "type=cacheonly"], args![elsewhere.dir]].concat());
    assert!(ran.stdout.starts_with("0 of 1 steps cached"), "{ran}");
    assert_eq!(nothing.json(args!["images"]), before);
    elsewhere.build(&[]).assert_all_cached();
    for bad in [
        args!["-o", "type=image,dest=x"],
        args!["-o", "type=oci,compression=estargz"],
        args!["-o", to("tar", "x"), "-o", to("oci", "x")],
        args!["-o", "-", "-o", "type=oci,dest=-"],
        args!["-o", "type=cacheonly", "--iidfile", "x"],
        args!["-o", "type=docker,dest=x", "--annotation", "manifest-descriptor:k=v"],
    ] {
        let failed = ply.fails(2, &context.args(bad));
        assert!(!out("x").exists(), "{failed}");
    }
}

/// What a history says besides when.
fn said(history: &Value) -> Vec<(String, String, bool)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line = |line: &Value| (text(&line["created_by"]), text(&line["comment"]), line["empty_layer"] == true);
    history.as_array().unwrap().iter().map(line).collect()
}

#[test]
fn a_history_is_what_buildkit_makes_of_the_same_dockerfile() {
    if architecture() != "amd64" {
        eprintln!("skipped: the program in the images of BuildKit is for amd64");
        return;
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/buildkit");
    for name in ["chain", "merge"] {
        let Some(ply) = store() else { return };
        let archive = fixtures.join(format!("{name}.oci.tar"));
        ply.ok(args!["load", "-i", archive, "--tag", "localhost/theirs:1"]);
        let theirs = Layout::read(&untar(&archive, &ply.scratch().join("theirs"))).config();
        let context = Context::new(&ply, &fs::read_to_string(fixtures.join(name).join("Dockerfile")).unwrap());
        for file in ["src/a", "src/b"] {
            context.file(file, fs::read(fixtures.join(name).join(file)).unwrap());
        }
        let mounted = ply.mount("localhost/theirs:1");
        let copied = context.file("t", fs::read(mounted.path().join("bin/t")).unwrap());
        drop(mounted);
        fs::set_permissions(copied, fs::Permissions::from_mode(0o755)).unwrap();
        let secret = ply.scratch().file("secret", "s");
        let ours = exported(&context, "", args!["--secret", format!("id=s,src={}", secret.display())]).config();
        assert_eq!(said(&ours["history"]), said(&theirs["history"]), "{name}");
        for key in ["Env", "Cmd", "Entrypoint", "WorkingDir", "ArgsEscaped", "Labels", "User"] {
            assert_eq!(ours["config"][key], theirs["config"][key], "{name}: {key}");
        }
    }
}

#[test]
fn a_history_tells_each_instruction_as_buildkit_does() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    // Each instruction with the line that BuildKit leaves of it (`dockerfile2llb/convert.go`), and whether it makes a layer.
    let lines: &[(&str, Option<(&str, bool)>)] = &[
        ("ARG UNSET", Some(("ARG UNSET", false))),
        ("ARG A=1 B=\"x y\"", Some(("ARG A=given B=x y", false))),
        ("ENV E=$A F=\"two words\"", Some(("ENV E=given F=two words", false))),
        ("ENV legacy form  of it", Some(("ENV legacy=form  of it", false))),
        ("LABEL l.$A=\"b c\" m='$A'", Some(("LABEL l.given=b c m=$A", false))),
        ("WORKDIR /w", Some(("WORKDIR /w", true))),
        ("WORKDIR sub/../rel", Some(("WORKDIR /w/rel", true))),
        ("RUN echo  \"$A\" > a", Some(("RUN |3 UNSET= A=given B=x y /bin/sh -c echo  \"$A\" > a # buildkit", true))),
        (
            "RUN [\"/bin/sh\", \"-c\", \"echo b > b\"]",
            Some(("RUN |3 UNSET= A=given B=x y /bin/sh -c echo b > b # buildkit", true)),
        ),
        (
            "RUN <<EOF\necho one > one\necho two\nEOF",
            Some(("RUN |3 UNSET= A=given B=x y /bin/sh -c echo one > one\necho two\n # buildkit", true)),
        ),
        ("COPY --chown=1:2 --chmod=640 f g $E/", Some(("COPY --chown=1:2 --chmod=640 f g given/ # buildkit", true))),
        ("COPY --link --from=other --exclude=x /o .", Some(("COPY /o . # buildkit", true))),
        ("COPY --parents d/e /p/", Some(("COPY --parents d/e /p/ # buildkit", true))),
        ("COPY <<one <<two /h/\n1\none\n2\ntwo", Some(("COPY <<one <<two /h/ # buildkit", true))),
        ("ADD --chmod=600 f /added", Some(("ADD --chmod=600 f /added # buildkit", true))),
        ("USER $A", Some(("USER given", false))),
        ("EXPOSE 80 53/udp 90-91", Some(("EXPOSE [80/tcp 53/udp 90/tcp 91/tcp]", false))),
        ("VOLUME /v1 /v2", Some(("VOLUME [/v1 /v2]", false))),
        ("STOPSIGNAL SIGINT", Some(("STOPSIGNAL SIGINT", false))),
        (
            "HEALTHCHECK --interval=5m --timeout=1.5s --retries=3 CMD curl -f x || exit 1",
            Some((
                "HEALTHCHECK {Test:[CMD-SHELL curl -f x || exit 1] Interval:5m0s Timeout:1.5s StartPeriod:0s \
                 StartInterval:0s Retries:3}",
                false,
            )),
        ),
        ("ONBUILD RUN true", None),
        ("MAINTAINER me <me@x>", Some(("MAINTAINER me <me@x>", false))),
        ("ENTRYPOINT [\"/e\", \"a \\\"b\\\"\"]", Some((r#"ENTRYPOINT ["/e" "a \"b\""]"#, false))),
        ("CMD echo \"$A\"", Some((r#"CMD ["/bin/sh" "-c" "echo \"$A\""]"#, false))),
        ("SHELL [\"/bin/sh\", \"-ec\"]", Some(("SHELL [/bin/sh -ec]", false))),
        ("CMD x", Some((r#"CMD ["/bin/sh" "-ec" "x"]"#, false))),
    ];
    let text: Vec<&str> = lines.iter().map(|(line, _)| *line).collect();
    let context = Context::new(
        &ply,
        &format!("FROM busybox AS other\nRUN echo o > /o\nFROM busybox AS last\n{}\n", text.join("\n")),
    );
    ["f", "g", "d/e"].iter().for_each(|name| drop(context.file(name, name)));
    context.build(args!["--build-arg", "A=given", "--target", "last"]);
    let config = saved(&ply, "built:latest").config();
    let expected: Vec<(String, String, bool)> = lines
        .iter()
        .filter_map(|(_, line)| {
            line.map(|(text, layer)| (text.to_owned(), "buildkit.dockerfile.v0".to_owned(), !layer))
        })
        .collect();
    let ours = said(&config["history"]);
    assert_eq!(ours[ours.len() - expected.len()..], expected);
    let history = config["history"].as_array().unwrap();
    let own = &history[history.len() - expected.len()..];
    assert_eq!(own[0]["created"], own[5]["created"], "before the first layer it is that layer's time");
}
