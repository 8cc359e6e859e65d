//! The corpus in `tests/dockerfiles`: each directory is a build context with a Dockerfile and what comes of it.
//!
//! `expect.json` beside the Dockerfile says:
//!
//! ```text
//! how      how the rest was obtained
//! args     more arguments of the build
//! tree     what the image has that its base has not, or has otherwise: "kind mode uid:gid content"
//! gone     what the base has and the image has not
//! config   the image's config, as far as it differs from what FROM brings
//! fails    instead of the last three: it fails, and says this
//! to_come  why Plies may still refuse it as not supported yet; once it doesn't, the rest must hold
//! buildah  true: buildah gives the same, or fails as well; else "why" it can't and what it does instead:
//!          "fails": what it says, or "gives": its tree, gone and config where they are otherwise (null: not there)
//! ```
//!
//! buildah builds every file in the test run, so that a note on it is as true as an agreement. With `PLY_BLESS_BUILDAH`
//! set, what it does is written down.
//!
//! `prepare.sh`, if it is there, is run in a copy of the directory: for what git doesn't keep. With `PLY_BLESS` set, what
//! came out is written down instead of compared, for a person to read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use plies_testkit::{
    args,
    ply::Ply,
    sha256_hex,
    tools::{self, containers},
    tree::{Node, Tree},
};
use serde_json::{Map, Value, json};

use crate::common::{busybox, store};

/// Content up to this length is written down, longer by its digest.
const CONTENT_BYTES_MAX: usize = 200;

/// One directory of the corpus.
struct Case {
    name: String,
    dir: PathBuf,
    expect: Map<String, Value>,
}

impl Case {
    fn all() -> Vec<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dockerfiles");
        let dirs = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
        let mut cases: Vec<_> = dirs.map(Self::read).collect();
        cases.sort_by(|a, b| a.name.cmp(&b.name));
        cases
    }

    fn read(dir: PathBuf) -> Self {
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let expect = fs::read(dir.join("expect.json")).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expect = serde_json::from_slice(&expect).unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { name, dir, expect }
    }

    /// A copy of the context, prepared.
    fn context(&self, ply: &Ply) -> PathBuf {
        let context = ply.scratch().join(format!("context-{}", self.name));
        tools::run(Command::new("cp").args(["-a", "--no-preserve=ownership"]).arg(&self.dir).arg(&context));
        fs::remove_file(context.join("expect.json")).unwrap();
        // Whatever the umask of who checked this out.
        tools::run(Command::new("chmod").args(["-R", "u=rwX,go=rX"]).arg(&context));
        let prepare = context.join("prepare.sh");
        if prepare.exists() {
            tools::run(Command::new("sh").arg("-e").arg(&prepare).current_dir(&context));
            fs::remove_file(prepare).unwrap();
        }
        context
    }

    fn args(&self) -> Vec<String> {
        let args = self.expect.get("args").and_then(Value::as_array);
        args.into_iter().flatten().map(|arg| arg.as_str().unwrap().to_owned()).collect()
    }
}

/// A node as the corpus writes it.
fn shown(root: &Path, name: &str, node: &Node) -> String {
    let content = match node.kind {
        "file" => {
            let bytes = fs::read(root.join(name)).unwrap();
            match String::from_utf8(bytes) {
                Ok(text) if text.len() <= CONTENT_BYTES_MAX => format!(" {text}"),
                Ok(text) => format!(" sha256:{}", sha256_hex(text.as_bytes())),
                Err(error) => format!(" sha256:{}", sha256_hex(error.as_bytes())),
            }
        }
        "symlink" => format!(" -> {}", fs::read_link(root.join(name)).unwrap().display()),
        _ => String::new(),
    };
    format!("{} {:o} {}:{}{content}", node.kind, node.mode, node.uid, node.gid)
}

/// What one tree has that the other has not, or has otherwise; and what only the other has. Times don't count, nor do
/// the places that every tool mounts something on.
fn beyond(base: &BTreeMap<String, String>, tree: &BTreeMap<String, String>) -> (Value, Value) {
    let more: BTreeMap<_, _> = tree.iter().filter(|(name, shown)| base.get(*name) != Some(shown)).collect();
    let gone: BTreeSet<_> = base.keys().filter(|name| !tree.contains_key(*name)).collect();
    // An image that doesn't stand on the base never had any of it.
    let stands_on_base = tree.contains_key(ONLY_IN_BASE);
    (json!(more), if stands_on_base { json!(gone) } else { json!([]) })
}

/// Something of the base that no file of the corpus takes away or copies.
const ONLY_IN_BASE: &str = "bin/busybox";

/// Where tools mount what every step has: there or not, it says nothing about the Dockerfile.
const MOUNTED_ON: [&str; 9] =
    ["dev", "proc", "sys", "run", "etc/hosts", "etc/resolv.conf", "etc/hostname", "run/.containerenv", "run/secrets"];

fn picture(root: &Path) -> BTreeMap<String, String> {
    let tree = Tree::of(root).without_root();
    let names: Vec<String> = tree.names().filter(|name| !MOUNTED_ON.contains(name)).map(str::to_owned).collect();
    names.into_iter().map(|name| (name.clone(), shown(root, &name, tree.get(&name)))).collect()
}

/// The parts of a config that Dockerfiles make.
fn config(run: &Value) -> Value {
    let mut config = Map::new();
    for key in [
        "Env",
        "Cmd",
        "Entrypoint",
        "User",
        "WorkingDir",
        "Labels",
        "ExposedPorts",
        "Volumes",
        "StopSignal",
        "Shell",
        "Healthcheck",
        "OnBuild",
    ] {
        let value = &run[key];
        let is_empty = value.is_null()
            || value == ""
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(Map::is_empty)
            // Every image has these.
            || (key == "WorkingDir" && value == "/");
        if !is_empty {
            config.insert(key.to_owned(), value.clone());
        }
    }
    // Where commands are looked for is every image's too.
    if let Some(Value::Array(env)) = config.get_mut("Env") {
        env.retain(|line| line != "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        if env.is_empty() {
            config.remove("Env");
        }
    }
    Value::Object(config)
}

/// With the author, whom a config names elsewhere.
fn with_author(mut config: Value, image: &Value) -> Value {
    if let Some(author) = image["author"].as_str().filter(|author| !author.is_empty()) {
        config["Author"] = author.into();
    }
    config
}

fn config_of(ply: &Ply, image: &str) -> Value {
    let inspected = ply.json(args!["inspect", image]);
    with_author(config(&inspected["config"]["config"]), &inspected["config"])
}

#[test]
fn every_file_of_the_corpus_gives_what_it_should() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let base = picture(ply.mount("busybox:latest").path());
    let bless = std::env::var_os("PLY_BLESS").is_some();
    let mut wrong = Vec::new();
    let cases = Case::all();
    assert!(cases.len() >= 60, "{} files", cases.len());
    for case in &cases {
        let context = case.context(&ply);
        let image = format!("localhost/{}:latest", case.name);
        let more = case.args();
        let more: Vec<_> = more.iter().map(std::ffi::OsString::from).collect();
        let built = ply.run(&[args!["build", "--progress", "plain", "-t", image], &more, args![context]].concat());
        if let Some(fails) = case.expect.get("fails") {
            if built.status.code() != Some(1) || !built.stderr.contains(fails.as_str().unwrap()) {
                wrong.push(format!("{}: should fail with {fails}: {built}", case.name));
            }
            continue;
        }
        if case.expect.contains_key("to_come") && built.stderr.contains("is not supported yet") {
            continue;
        }
        if !built.status.success() {
            wrong.push(format!("{}: {built}", case.name));
            continue;
        }
        let (tree, gone) = {
            let mounted = ply.mount(&image);
            beyond(&base, &picture(mounted.path()))
        };
        let mut seen = case.expect.clone();
        seen.insert("tree".to_owned(), tree);
        seen.insert("config".to_owned(), config_of(&ply, &image));
        seen.insert("gone".to_owned(), gone);
        if bless {
            let text = serde_json::to_string_pretty(&seen).unwrap() + "\n";
            fs::write(case.dir.join("expect.json"), text).unwrap();
            continue;
        }
        for (key, value) in &seen {
            if case.expect.get(key) != Some(value) {
                let expected = case.expect.get(key).unwrap_or(&Value::Null);
                wrong.push(format!("{}: {key}: expected\n{expected:#}\nand it is\n{value:#}", case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// The version of buildah that the notes on what it does otherwise were written down from: Debian 12's.
const BUILDAH_VERSION: &str = "1.28.";

/// What buildah makes of a file, as the corpus writes it; or what it says when it makes nothing.
fn by_buildah(
    ply: &Ply,
    state: &Path,
    base: &BTreeMap<String, String>,
    case: &Case,
) -> Result<Map<String, Value>, String> {
    let context = case.context(ply);
    let image = format!("localhost/{}:latest", case.name);
    let buildah = || containers("buildah", state);
    let mut build = buildah();
    build.args(["build", "--isolation", "chroot", "--pull-never", "--layers=false", "--format", "docker"]);
    build
        .args(["--quiet", "--tag", &image])
        .args(case.args())
        .arg("--file")
        .arg(context.join("Dockerfile"))
        .arg(&context)
        // Files of here-documents and caches lie below the directory that it is called in.
        .current_dir(ply.scratch().path());
    let built = tools::output_of(&mut build);
    if !built.status.success() {
        return Err(String::from_utf8_lossy(&built.stderr).into_owned());
    }
    // A container of buildah's would run what ONBUILD says.
    let podman = |what: &str| tools::run(containers("podman", state).args(["image", what, &image]));
    let root = podman("mount");
    let (tree, gone) = beyond(base, &picture(Path::new(root.trim())));
    podman("unmount");
    let inspected = tools::run(buildah().args(["inspect", "--type", "image", &image]));
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    let mut config = with_author(config(&inspected["Docker"]["config"]), &inspected["Docker"]);
    // buildah says by whom an image was made.
    if let Some(labels) = config.get_mut("Labels").and_then(Value::as_object_mut) {
        labels.remove("io.buildah.version");
        if labels.is_empty() {
            config.as_object_mut().unwrap().remove("Labels");
        }
    }
    Ok([("tree", tree), ("gone", gone), ("config", config)]
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .collect())
}

/// What is otherwise, key by key: `null` for what is not there.
fn otherwise(expected: &Value, seen: &Value) -> Option<Value> {
    match (expected, seen) {
        (Value::Object(expected), Value::Object(seen)) => {
            let keys: BTreeSet<&String> = expected.keys().chain(seen.keys()).collect();
            let of = |map: &Map<String, Value>, key: &String| map.get(key).cloned().unwrap_or_default();
            let differs = |key: &&String| of(expected, key) != of(seen, key);
            let all: Map<String, Value> =
                keys.into_iter().filter(differs).map(|key| (key.clone(), of(seen, key))).collect();
            (!all.is_empty()).then_some(Value::Object(all))
        }
        _ => (expected != seen).then(|| seen.clone()),
    }
}

/// How what buildah did is told in `expect.json`, without the reason.
fn told(case: &Case, made: &Result<Map<String, Value>, String>) -> Value {
    match made {
        Err(_) if case.expect.contains_key("fails") => true.into(),
        Err(says) => json!({ "fails": says.lines().last().unwrap_or_default() }),
        Ok(_) if case.expect.contains_key("fails") => json!({ "gives": "an image" }),
        Ok(seen) => {
            let of = |(key, value): (&String, &Value)| Some((key.clone(), otherwise(&case.expect[key], value)?));
            let gives: Map<String, Value> = seen.iter().filter_map(of).collect();
            if gives.is_empty() { true.into() } else { json!({ "gives": gives }) }
        }
    }
}

/// Every file whose number leaves `rest` when divided by [`SHARES`], built by buildah.
fn agrees_with_buildah(rest: usize) {
    if !tools::have(&["buildah", "podman"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let is_known = tools::run(Command::new("buildah").arg("--version")).contains(BUILDAH_VERSION);
    let bless = std::env::var_os("PLY_BLESS_BUILDAH").is_some();
    let base = picture(ply.mount("busybox:latest").path());
    let state = ply.scratch().join("state");
    let archive = ply.scratch().join("busybox.tar");
    ply.ok(args!["save", "-o", archive, "busybox:latest"]);
    let pull = format!("oci-archive:{}", archive.display());
    let id = tools::run(containers("buildah", &state).args(["pull", "--quiet", &pull]));
    let name = ["docker.io/library/busybox:latest", "localhost/busybox:latest"];
    tools::run(containers("buildah", &state).args(["tag", id.trim()]).args(name));
    let mut wrong = Vec::new();
    let mut same_count = 0;
    for case in Case::all().iter().skip(rest).step_by(SHARES) {
        let mut expected = case.expect["buildah"].clone();
        // What another version does otherwise, nobody has written down.
        if expected != true && !is_known {
            continue;
        }
        let made = by_buildah(&ply, &state, &base, case);
        let seen = told(case, &made);
        same_count += usize::from(seen == true);
        if bless {
            let mut all = case.expect.clone();
            let mut seen = seen;
            if let Some(seen) = seen.as_object_mut() {
                seen.insert("why".to_owned(), expected.get("why").unwrap_or(&expected).clone());
            }
            all.insert("buildah".to_owned(), seen);
            fs::write(case.dir.join("expect.json"), serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
            continue;
        }
        let why = expected.as_object_mut().and_then(|noted| noted.remove("why"));
        let has_reason = expected == true || why.is_some_and(|why| why.as_str().is_some_and(|why| !why.is_empty()));
        let is_same = match (&made, &expected["fails"]) {
            (Err(says), Value::String(noted)) => says.contains(noted),
            _ => seen == expected,
        };
        if !is_same || !has_reason {
            let says = made.err().unwrap_or_default();
            wrong.push(format!("{}: of buildah is noted\n{expected:#}\nand it does\n{seen:#}\n{says}", case.name));
        }
    }
    assert!(bless || same_count >= SAME_MIN, "buildah agrees on {same_count} files");
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// Into how many tests buildah's work is divided: each file takes it seconds.
const SHARES: usize = 4;

/// On how many files of each share buildah agrees, at least.
const SAME_MIN: usize = 10;

#[test]
fn buildah_makes_the_same_or_what_is_noted_1() {
    agrees_with_buildah(0);
}

#[test]
fn buildah_makes_the_same_or_what_is_noted_2() {
    agrees_with_buildah(1);
}

#[test]
fn buildah_makes_the_same_or_what_is_noted_3() {
    agrees_with_buildah(2);
}

#[test]
fn buildah_makes_the_same_or_what_is_noted_4() {
    agrees_with_buildah(3);
}
