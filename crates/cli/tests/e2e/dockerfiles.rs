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
//! buildah  true: buildah must give the same; else why it can't
//! ```
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

    fn by_buildah(&self) -> bool {
        self.expect["buildah"] == true
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

/// What buildah makes of a file, as the corpus writes it.
fn by_buildah(ply: &Ply, state: &Path, base: &BTreeMap<String, String>, case: &Case) -> (Value, Value, Value) {
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
        .arg(&context);
    tools::run(&mut build);
    let container = tools::run(buildah().args(["from", "--pull-never", &image]));
    let root = tools::run(buildah().args(["mount", container.trim()]));
    let (tree, gone) = beyond(base, &picture(Path::new(root.trim())));
    let inspected = tools::run(buildah().args(["inspect", "--type", "image", &image]));
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    tools::run(buildah().args(["rm", container.trim()]));
    let mut config = with_author(config(&inspected["Docker"]["config"]), &inspected["Docker"]);
    // buildah says by whom an image was made.
    if let Some(labels) = config.get_mut("Labels").and_then(Value::as_object_mut) {
        labels.remove("io.buildah.version");
        if labels.is_empty() {
            config.as_object_mut().unwrap().remove("Labels");
        }
    }
    (tree, gone, config)
}

/// Every file whose number leaves `rest` when divided by [`SHARES`], built by buildah.
fn agrees_with_buildah(rest: usize) {
    if !tools::have(&["buildah"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let base = picture(ply.mount("busybox:latest").path());
    let state = ply.scratch().join("state");
    let archive = ply.scratch().join("busybox.tar");
    ply.ok(args!["save", "-o", archive, "busybox:latest"]);
    let pull = format!("oci-archive:{}", archive.display());
    let id = tools::run(containers("buildah", &state).args(["pull", "--quiet", &pull]));
    let name = ["docker.io/library/busybox:latest", "localhost/busybox:latest"];
    tools::run(containers("buildah", &state).args(["tag", id.trim()]).args(name));
    let mut wrong = Vec::new();
    let mut count = 0;
    for case in Case::all().iter().filter(|case| case.by_buildah()).skip(rest).step_by(SHARES) {
        count += 1;
        let (tree, gone, config) = by_buildah(&ply, &state, &base, case);
        for (key, value) in [("tree", tree), ("gone", gone), ("config", config)] {
            let expected = &case.expect[key];
            if *expected != value {
                wrong.push(format!("{}: {key}: ply makes\n{expected:#}\nand buildah\n{value:#}", case.name));
            }
        }
    }
    assert!(count >= 10, "buildah built {count} files");
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// Into how many tests buildah's work is divided: each file takes it seconds.
const SHARES: usize = 3;

#[test]
fn buildah_makes_the_same_of_the_first_third() {
    agrees_with_buildah(0);
}

#[test]
fn buildah_makes_the_same_of_the_second_third() {
    agrees_with_buildah(1);
}

#[test]
fn buildah_makes_the_same_of_the_last_third() {
    agrees_with_buildah(2);
}
