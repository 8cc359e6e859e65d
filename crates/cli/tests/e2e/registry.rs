//! Images to and from registries: Debian's own, with skopeo as the judge, and one that does wrong.

use std::{fs, net::TcpListener, path::Path, process::Command};

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::Ply,
    registry::{DockerRegistry, Fault, FaultyRegistry, TokenAuth},
    scratch::Scratch,
    tar::Member,
    tools::{self, containers},
};
use serde_json::{Value, json};

use crate::common::{Context, Shape, State, busybox, everything, interrupted, load, store, tree_of};

/// Bytes that no part of repeats and that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn docker_registry(ply: &Ply, user: Option<(&str, &str)>) -> Option<DockerRegistry> {
    let programs: &[&str] = if user.is_some() { &["docker-registry", "htpasswd"] } else { &["docker-registry"] };
    tools::have(programs).then(|| DockerRegistry::start(&ply.scratch().join("registry"), user))
}

/// The digest of what a registry has under a name, as skopeo sees it.
fn digest_at(name: &str, state: &Path) -> String {
    let from = format!("docker://{name}");
    let raw = tools::run(containers("skopeo", state).args(["inspect", "--raw", "--tls-verify=false", &from]));
    format!("sha256:{}", plies_testkit::sha256_hex(raw.as_bytes()))
}

fn one_layer(tag: &str, bytes: Vec<u8>, packing: Packing) -> Image {
    Image::new(tag).layer(&[Member::file("data", bytes)], packing)
}

/// Requests for blobs of layers, that is for all but the config.
fn layer_requests(registry: &FaultyRegistry, image: &Image) -> Vec<String> {
    let config = image.id();
    let lines = registry.seen().into_iter().map(|seen| seen.line());
    lines.filter(|line| line.contains("GET") && line.contains("/blobs/") && !line.contains(&config)).collect()
}

#[test]
fn what_ply_pushes_skopeo_pulls_and_the_other_way() {
    if !tools::have(&["skopeo"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let Some(registry) = docker_registry(&ply, None) else { return };
    let state = ply.scratch().join("state");
    for (n, packing) in Packing::ALL.into_iter().enumerate() {
        let name = format!("{}/team/ours:{n}", registry.host());
        let image = everything(&name, packing);
        load(&ply, &image);
        let expected = tree_of(&ply, &name);
        let digest = format!("sha256:{}", image.manifest_digest());
        let pushed = ply.ok(args!["push", name]);
        assert!(pushed.stdout.contains(&format!("digest: {digest}")), "{pushed}");
        assert_eq!(digest_at(&name, &state), digest);

        // By skopeo out of the registry, into it under another name, and back.
        let layout = ply.scratch().join(format!("oci-{n}"));
        let (from, there) = (format!("docker://{name}"), format!("oci:{}:x", layout.display()));
        tools::run(containers("skopeo", &state).args(["copy", "--src-tls-verify=false", &from, &there]));
        let theirs = format!("{}/team/theirs:{n}", registry.host());
        let to = format!("docker://{theirs}");
        tools::run(containers("skopeo", &state).args(["copy", "--dest-tls-verify=false", &there, &to]));
        let fresh = store().unwrap();
        let pulled = fresh.json(args!["pull", theirs]);
        // It packs plain layers on the way; packed ones it leaves as they are.
        let digest = if packing == Packing::Plain { digest_at(&theirs, &state) } else { digest };
        assert_eq!((pulled["digest"].as_str().unwrap(), pulled["manifest"].as_str().unwrap()), (&*digest, &*digest));
        assert_eq!(pulled["id"].as_str().unwrap(), image.id());
        tree_of(&fresh, &theirs).assert_same(&expected, "pulled from the registry");
        assert_eq!(fresh.json(args!["pull", theirs])["up_to_date"], json!(true));
        assert!(Shape::of(&fresh).unfinished.is_empty());
    }
}

#[test]
fn a_registry_with_passwords_wants_one_and_nobody_else_hears_it() {
    const PASSWORD: &str = "canary-of-the-registry";
    let Some(ply) = store() else { return };
    let Some(registry) = docker_registry(&ply, Some(("me", PASSWORD))) else { return };
    let name = format!("{}/private:1", registry.host());
    let image = one_layer(&name, noise(5000), Packing::Gzip);
    load(&ply, &image);
    for command in [args!["push", name], args!["pull", name]] {
        let denied = ply.fails(1, command);
        assert!(
            denied.stderr.contains("denies access to private") && denied.stderr.contains("docker login"),
            "{denied}"
        );
    }
    let login = |password: &str| {
        let text = format!("me:{password}");
        let auth = tools::run(Command::new("base64").arg("-w0").arg(ply.scratch().file("plain", text)));
        let auths = json!({"auths": {registry.host(): {"auth": auth}}});
        ply.scratch().file(".docker/config.json", auths.to_string());
    };
    login("wrong-canary-of-the-registry");
    let denied = ply.fails(1, args!["push", name]);
    assert!(denied.stderr.contains(".docker/config.json") && !denied.stderr.contains("canary"), "{denied}");
    login(PASSWORD);
    let pushed = ply.ok(args!["push", name, "-v"]);
    let pulled = ply.ok(args!["pull", name, "-v"]);
    assert!(!format!("{pushed}{pulled}").contains("canary"));
    fs::remove_file(ply.scratch().join("plain")).unwrap();
    let found = tools::output_of(Command::new("grep").args(["-rl", "canary"]).arg(ply.root()));
    assert!(found.stdout.is_empty(), "{}", String::from_utf8_lossy(&found.stdout));
}

#[test]
fn several_names_are_pushed_and_known_blobs_are_not_sent() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    let image = one_layer("app:1", noise(50_000), Packing::Gzip);
    registry.put("base", "1", &image);
    let base = format!("{}/base:1", registry.host());
    ply.ok(args!["pull", base]);
    registry.seen();
    let names: Vec<String> = ["team/app:1", "team/app:2", "other:1"].map(|n| format!("{}/{n}", registry.host())).into();
    let pushed = ply.json(args!["push", base, names[0], names[1], names[2]]);
    assert_eq!(pushed.as_array().unwrap().len(), 3);
    let seen = registry.seen();
    let mounts = seen.iter().filter(|one| one.target.contains("mount=") && one.target.contains("from=")).count();
    assert_eq!(mounts, 2, "the layer is mounted into both repositories");
    let layer = image.layer_digest(0);
    let sent = seen.iter().filter(|one| one.method == "PUT" && one.target.contains(&layer)).count();
    assert_eq!(sent, 0);
    let order: Vec<bool> = seen
        .iter()
        .filter(|one| one.target.contains("/v2/other/") && one.method == "PUT")
        .map(|one| one.target.contains("/manifests/"))
        .collect();
    assert_eq!(order, [false, true], "the config, and the manifest last");
    for (repository, tag) in [("team/app", "1"), ("team/app", "2"), ("other", "1")] {
        let manifest = registry.manifest(repository, tag).unwrap();
        assert_eq!(plies_testkit::sha256_hex(&manifest), image.manifest_digest(), "{repository}:{tag}");
    }
    let no_name = ply.fails(1, args!["push", image.id()]);
    assert!(no_name.stderr.contains("under which name"), "{no_name}");
}

#[test]
fn wrong_bytes_are_refused_and_leave_nothing() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    let name = format!("{}/app:1", registry.host());
    for packing in [Packing::Gzip, Packing::Plain] {
        let image = one_layer("app:1", noise(300_000), packing).layer(&[Member::file("g", "good")], packing);
        registry.put("app", "1", &image);
        let layer = image.layer_digest(0);
        let before = State::of(&ply);
        for fault in [Fault::WrongByte, Fault::Truncate(100_000), Fault::TooLong] {
            registry.fault(&layer, 1, fault.clone());
            let refused = ply.fails(1, args!["pull", name]);
            assert!(refused.stderr.contains(&layer), "{refused}");
            let words = if matches!(fault, Fault::WrongByte) { "expected sha256:" } else { "its descriptor says" };
            assert!(refused.stderr.contains(words), "{refused}");
            before.assert_same(&State::of(&ply), &format!("{fault:?}"));
            let asked = registry.seen().iter().filter(|one| one.target.contains(&layer)).count();
            assert_eq!(asked, 1, "{fault:?} is not tried again");
        }
        for document in [image.id(), image.manifest_digest()] {
            registry.fault(if document == image.id() { &document } else { "manifests/" }, 1, Fault::WrongByte);
            // A manifest by its tag may be anything that parses.
            ply.fails(1, args!["pull", format!("{}@sha256:{}", name, image.manifest_digest())]);
            registry.heal();
            before.assert_same(&State::of(&ply), "a wrong document");
        }
    }
    ply.ok(args!["pull", name]);
}

#[test]
fn a_pull_goes_on_with_what_came_the_last_time() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    let name = format!("{}/app:1", registry.host());
    let image = one_layer("app:1", noise(1_000_000), Packing::Gzip);
    registry.put("app", "1", &image);
    let layer = image.layer_digest(0);
    registry.fault(&layer, 1, Fault::DropAfter(400_000));
    registry.fault(&layer, 100, Fault::Status(503, vec![("retry-after", "0".into())]));
    let broken = ply.fails(1, args!["pull", name]);
    assert!(broken.stderr.contains("503"), "{broken}");
    assert_eq!(ply.json(args!["images"]), json!([]));
    registry.heal();
    registry.seen();
    ply.ok(args!["pull", name]);
    let seen = registry.seen();
    let range = seen.iter().find(|one| one.target.contains(&layer)).unwrap().header("range").unwrap().to_owned();
    let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    assert!((1..=400_000).contains(&from), "{range}");
    assert_eq!(fs::read(ply.mount(&name).path().join("data")).unwrap(), noise(1_000_000));
    assert!(Shape::of(&ply).unfinished.is_empty());

    // What was kept is not believed: on a disk bytes change.
    ply.ok(args!["rmi", name]);
    registry.fault(&layer, 1, Fault::DropAfter(400_000));
    registry.fault(&layer, 100, Fault::Status(503, vec![("retry-after", "0".into())]));
    ply.fails(1, args!["pull", name]);
    registry.heal();
    let ingest = fs::read_dir(ply.root().join("content/ingest")).unwrap().next().unwrap().unwrap().path().join("data");
    let mut bytes = fs::read(&ingest).unwrap();
    bytes[1000] ^= 1;
    fs::write(&ingest, bytes).unwrap();
    let refused = ply.fails(1, args!["pull", name]);
    assert!(refused.stderr.contains("expected sha256:"), "{refused}");
    ply.ok(args!["pull", name]);
}

#[test]
fn a_layer_that_is_here_is_not_fetched_until_its_blob_is_needed() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    let (gzip, zstd) = (one_layer("a:1", noise(9000), Packing::Gzip), one_layer("b:1", noise(9000), Packing::Zstd));
    let zstd = zstd.config("Labels", json!({"other": "image"}));
    registry.put("a", "1", &gzip);
    registry.put("b", "1", &zstd);
    let (first, second) = (format!("{}/a:1", registry.host()), format!("{}/b:1", registry.host()));
    ply.ok(args!["pull", first]);
    assert_eq!(layer_requests(&registry, &gzip).len(), 1);
    ply.ok(args!["pull", second]);
    assert_eq!(layer_requests(&registry, &zstd), [""; 0]);
    assert_eq!(fs::read(ply.mount(&second).path().join("data")).unwrap(), noise(9000));
    // To the registry that has it nothing is sent, and nothing is fetched for that.
    ply.ok(args!["push", second]);
    assert_eq!(layer_requests(&registry, &zstd), [""; 0]);
    // Its archive has it, byte for byte.
    let layout = ply.scratch().join("layout");
    ply.ok(args!["save", "--format", "oci-dir", "-o", layout, second]);
    assert_eq!(layer_requests(&registry, &zstd).len(), 1);
    assert!(plies_testkit::image::blobs_of(&layout).contains_key(&zstd.layer_digest(0)));
    ply.ok(args!["save", "--format", "oci-dir", "-o", layout, second]);
    assert_eq!(layer_requests(&registry, &zstd), [""; 0], "it was kept");
    let removed = ply.ok(args!["rmi", first, second]);
    assert!(removed.status.success() && Shape::of(&ply).blobs.is_empty(), "{:?}", Shape::of(&ply));
}

/// An index of one image for each platform.
fn put_index(registry: &FaultyRegistry, tag: &str, images: &[(&Image, Value)]) -> String {
    let mut manifests = Vec::new();
    for (n, (image, platform)) in images.iter().enumerate() {
        registry.put("multi", &format!("part-{n}"), image);
        let digest = format!("sha256:{}", image.manifest_digest());
        let size = registry.manifest("multi", &digest).unwrap().len();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        manifests.push(json!({"mediaType": media_type, "digest": digest, "size": size, "platform": platform}));
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}).to_string();
    registry.put_manifest("multi", tag, media_type, index.as_bytes())
}

#[test]
fn stages_stand_on_images_for_their_platforms_and_the_tag_stays_where_it_is() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    let of = |text: &str| one_layer("x:1", text.into(), Packing::Gzip);
    let (host, other) = (of("host"), of("other").made_for("riscv64"));
    let platform = |architecture: &str| json!({"os": "linux", "architecture": architecture});
    let own = plies_testkit::image::architecture();
    put_index(&registry, "1", &[(&other, platform("riscv64")), (&host, platform(own))]);
    let name = format!("{}/multi:1", registry.host());
    let content = |image: &str, file: &str| fs::read_to_string(ply.mount(image).path().join(file)).unwrap();
    let file = "data";
    ply.ok(args!["pull", name]);

    let both =
        format!("FROM --platform=$BUILDPLATFORM {name} AS native\nFROM {name}\nCOPY --from=native /{file} /native\n");
    let context = Context::new(&ply, &both);
    for (asked, made_for, text) in
        [("linux/riscv64", "riscv64", "other"), ("riscv64", "riscv64", "other"), ("linux", own, "host")]
    {
        context.build(args!["--platform", asked]);
        assert_eq!(ply.json(args!["inspect", "built"])["platform"], format!("linux/{made_for}"), "{asked}");
        assert_eq!(content("built", file), text, "{asked}");
        assert_eq!(content("built", "native"), "host", "{asked}");
        assert_eq!(ply.json(args!["inspect", name])["id"], host.id(), "{asked}");
    }
    let built = ply.json(args!["inspect", "built"])["id"].clone();
    context.file("Dockerfile", format!("FROM --platform=linux/riscv64 {name}\nLABEL a=b\n"));
    context.build(&[]);
    assert_eq!(content("built", file), "other");
    let fixed = ply.json(args!["inspect", "built"])["id"].clone();
    assert_ne!(fixed, built);

    // The file says for what, whatever the command line does.
    context.build(args!["--platform", "linux/s390x"]);
    assert_eq!(content("built", file), "other");
}

#[test]
fn an_image_for_another_platform_is_not_taken_for_the_one_that_was_asked_for() {
    let Some(ply) = store() else { return };
    let other = one_layer("localhost:1/other:1", "other".into(), Packing::Gzip).made_for("riscv64");
    load(&ply, &other);
    let context = Context::new(&ply, "FROM localhost:1/other:1\nLABEL a=b\n");
    // Nothing was said about platforms: what is here under the name is meant.
    let built = context.build(&[]);
    assert!(built.ran.stderr.contains("InvalidBaseImagePlatform"), "{}", built.ran);
    assert!(!context.build(args!["--platform", "linux/riscv64"]).ran.stderr.contains("InvalidBaseImagePlatform"));
    let before = ply.json(args!["inspect", "built"])["id"].clone();
    let refused = context.build_fails(args!["--platform", "linux/s390x"]);
    assert!(refused.stderr.contains("Dockerfile:1") && refused.stderr.contains("linux/s390x"), "{refused}");
    assert_eq!(ply.json(args!["inspect", "built"])["id"], before);
    context.file("Dockerfile", "FROM --platform=pdp/11/70/unix scratch\nLABEL a=b\n");
    let nonsense = context.build_fails(&[]);
    assert!(nonsense.stderr.contains("Dockerfile:1") && nonsense.stderr.contains("is not a platform"), "{nonsense}");
    let several = ply.fails(2, args!["build", "--platform", "linux/amd64,linux/arm64", context.dir]);
    assert!(several.stderr.contains("one platform at a time"), "{several}");
}

#[test]
fn run_pulls_an_image_that_is_not_here_unless_it_may_not() {
    let Some(ply) = store() else { return };
    let Some(members) = plies_testkit::image::busybox_members() else { return };
    let registry = FaultyRegistry::start();
    registry.put("box", "1", &Image::new("x:1").layer(&members, Packing::Gzip));
    let name = format!("{}/box:1", registry.host());
    let never = ply.fails(1, args!["run", "--pull", "never", name, "true"]);
    assert!(never.stderr.contains("no image"), "{never}");
    assert_eq!(ply.ok(args!["run", name, "echo", "here"]).stdout, "here\n");
    assert!(!registry.seen().is_empty());
    ply.ok(args!["run", name, "true"]);
    assert!(registry.seen().is_empty(), "it is here");
    ply.ok(args!["run", "--pull", "always", name, "true"]);
    assert!(!registry.seen().is_empty());
}

#[test]
fn the_image_for_the_platform_is_taken_out_of_an_index() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    let of = |text: &str| one_layer("x:1", text.into(), Packing::Gzip);
    let (host, v6, v7) = (of("host"), of("v6"), of("v7"));
    let arm = |variant: &str| json!({"os": "linux", "architecture": "arm", "variant": variant});
    let own = json!({"os": "linux", "architecture": plies_testkit::image::architecture()});
    let digest = put_index(&registry, "1", &[(&v6, arm("v6")), (&v7, arm("v7")), (&host, own)]);
    let name = format!("{}/multi:1", registry.host());
    for (platform, image) in [(None, &host), (Some("linux/arm/v7"), &v7), (Some("linux/arm/v6"), &v6)] {
        let options = platform.map_or(vec![], |platform| vec!["--platform".into(), platform.into()]);
        let pulled = ply.json(&[args!["pull", name], options.as_slice()].concat());
        assert_eq!(pulled["digest"].as_str().unwrap(), digest);
        assert_eq!(pulled["manifest"].as_str().unwrap(), format!("sha256:{}", image.manifest_digest()));
    }
    let none = ply.fails(1, args!["pull", "--platform", "linux/s390x", name]);
    assert!(none.stderr.contains("no image for linux/s390x (there are: linux/arm/v6, linux/arm/v7"), "{none}");
    let alone = format!("{}/multi:part-0", registry.host());
    assert!(
        ply.fails(1, args!["pull", "--platform", "linux/s390x", alone]).stderr.contains("no image for linux/s390x")
    );
    ply.fails(2, args!["pull", "--platform", "windows", name]);

    // An index that holds an index, and so on.
    let mut inner = digest;
    for depth in 0..5 {
        let size = registry.manifest("multi", &inner).unwrap().len();
        let media_type = "application/vnd.oci.image.index.v1+json";
        let entry = json!({"mediaType": media_type, "digest": inner, "size": size});
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": [entry]}).to_string();
        inner = registry.put_manifest("multi", &format!("deep-{depth}"), media_type, index.as_bytes());
    }
    ply.ok(args!["pull", format!("{}/multi:deep-0", registry.host())]);
    let deep = ply.fails(1, args!["pull", format!("{}/multi:deep-4", registry.host())]);
    assert!(deep.stderr.contains("limits.index-depth"), "{deep}");
}

#[test]
fn a_build_pulls_the_images_that_are_not_here() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    registry.put("base", "1", &one_layer("x:1", b"one".to_vec(), Packing::Gzip));
    registry.put("files", "1", &one_layer("x:2", b"files".to_vec(), Packing::Gzip));
    let host = registry.host();
    let context = Context::new(&ply, &format!("FROM {host}/base:1\nCOPY --from={host}/files:1 /data /copied\n"));
    context.build(&[]);
    let shown = |file: &str| fs::read_to_string(ply.mount("built:latest").path().join(file)).unwrap();
    assert_eq!((shown("data"), shown("copied")), ("one".to_owned(), "files".to_owned()));
    assert_eq!(ply.json(args!["images"]).as_array().unwrap().len(), 3, "what was pulled has its name here");

    // What is here is not asked for, until somebody says so.
    registry.seen();
    registry.put("base", "1", &one_layer("x:1", b"two".to_vec(), Packing::Gzip));
    context.build(&[]).assert_all_cached();
    assert!(registry.seen().is_empty());
    context.build(args!["--pull"]);
    assert_eq!(shown("data"), "two");

    context.file("Dockerfile", format!("FROM scratch\nCOPY --from={host}/missing:1 / /\n"));
    let before = State::of(&ply);
    let failed = context.build_fails(&[]);
    assert!(failed.stderr.contains("Dockerfile:2") && failed.stderr.contains("could not be pulled"), "{failed}");
    assert!(failed.stderr.contains("MANIFEST_UNKNOWN"), "{failed}");
    before.assert_same(&State::of(&ply), "a base that does not exist");
    drop(registry);
    ply.ok(args!["rmi", format!("{host}/base:1")]);
    context.file("Dockerfile", format!("FROM {host}/base:1\n"));
    let failed = context.build_fails(&[]);
    assert!(failed.stderr.contains("Dockerfile:1") && failed.stderr.contains("Connection refused"), "{failed}");
}

#[test]
fn layers_of_a_lazy_image_come_when_they_are_needed() {
    let Some(ply) = store() else { return };
    let Some(members) = plies_testkit::image::busybox_members() else { return };
    let registry = FaultyRegistry::start();
    let image = Image::new("x:1").layer(&members, Packing::Gzip).layer(&[Member::file("second", "2")], Packing::Zstd);
    registry.put("base", "1", &image);
    let name = format!("{}/base:1", registry.host());
    ply.ok(args!["info"]);
    let empty = Shape::of(&ply).layers;
    let pulled = ply.json(args!["pull", "--lazy", name]);
    assert_eq!(pulled["id"].as_str().unwrap(), image.id());
    assert_eq!(layer_requests(&registry, &image), [""; 0]);
    assert_eq!(ply.json(args!["images"]).as_array().unwrap().len(), 1);
    assert_eq!(Shape::of(&ply).layers, empty);
    let record = ply.ok(args!["ref", "merge", name]);
    assert_eq!(layer_requests(&registry, &image), [""; 0], "a record needs no files: {record}");

    let context = Context::new(&ply, &format!("FROM {name}\nRUN cat /second > /third\n"));
    context.build(&[]);
    assert_eq!(layer_requests(&registry, &image).len(), 2);
    assert_eq!(fs::read_to_string(ply.mount("built:latest").path().join("third")).unwrap(), "2");
    assert_eq!(fs::read_to_string(ply.mount(&name).path().join("second")).unwrap(), "2");
    assert_eq!(layer_requests(&registry, &image), [""; 0], "they are here");

    // Another way to need them, in another store.
    let by_hand = store().unwrap();
    by_hand.ok(args!["pull", "--lazy", name]);
    let record = by_hand.ok(args!["ref", "merge", name]).stdout.trim().to_owned();
    registry.seen();
    by_hand.ok(args!["ref", "get", record]);
    assert_eq!(layer_requests(&registry, &image).len(), 2);

    let fresh = store().unwrap();
    fresh.ok(args!["pull", "--lazy", name]);
    registry.seen();
    assert_eq!(fresh.ok(args!["run", name, "cat", "/second"]).stdout, "2");
    assert_eq!(layer_requests(&registry, &image).len(), 2);
    fresh.ok(args!["save", "-o", fresh.scratch().join("x.tar"), name]);
    assert_eq!(layer_requests(&registry, &image), [""; 0]);
    assert!(Shape::of(&fresh).unfinished.is_empty());
}

#[test]
fn a_lazy_image_whose_registry_is_gone_says_so_and_stays() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    registry.put("base", "1", &one_layer("x:1", b"x".to_vec(), Packing::Gzip));
    let name = format!("{}/base:1", registry.host());
    ply.ok(args!["pull", "--lazy", name]);
    drop(registry);
    let before = State::of(&ply);
    let failed = ply.fails(1, args!["run", name, "true"]);
    assert!(failed.stderr.contains("Connection refused"), "{failed}");
    before.assert_same(&State::of(&ply), "its registry is gone");
}

#[test]
fn a_token_that_runs_out_in_the_middle_is_renewed() {
    let Some(ply) = store() else { return };
    let registry = FaultyRegistry::start();
    registry.require_token(TokenAuth { authorization: None, identity: None, realm: None, uses: 5 });
    let mut image = Image::new("x:1");
    for n in 0..6 {
        image = image.layer(&[Member::file(format!("f{n}"), noise(1000 + n))], Packing::Gzip);
    }
    registry.put("app", "1", &image);
    let name = format!("{}/app:1", registry.host());
    ply.ok(args!["pull", name]);
    let tokens = registry.seen().iter().filter(|one| one.target.starts_with("/token")).count();
    // One runs out after five requests of eight; then each of three threads may ask for a new one.
    assert!((2..=4).contains(&tokens), "{tokens}");
    ply.ok(args!["push", name, format!("{}/copy:1", registry.host())]);
    assert_eq!(registry.blobs("copy").len(), 7);
}

#[test]
fn an_interrupt_ends_a_pull_that_hangs() {
    let Some(ply) = store() else { return };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    ply.ok(args!["info"]);
    let before = State::of(&ply);
    let output = interrupted(ply.command(args!["pull", format!("{}/x:1", silent.local_addr().unwrap())]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cancelled"), "{output:?}");
    before.assert_same(&State::of(&ply), "interrupted");
}

#[test]
fn hosts_are_configured_in_a_file() {
    let Some(ply) = store() else { return };
    let mirror = FaultyRegistry::start();
    let image = one_layer("x:1", b"x".to_vec(), Packing::Gzip);
    mirror.put("hub/library/tool", "1", &image);
    let config = format!("[registry.\"docker.io\"]\nmirrors = [\"{}/hub\"]\n", mirror.host());
    let config = ply.scratch().file("config.toml", config);
    let pulled = ply.ok(args!["--config", config, "pull", "tool:1"]);
    assert!(pulled.stdout.contains("Pulled image: tool:1"), "{pulled}");
    let outside = ply.fails(1, args!["pull", "tool:2"]);
    assert!(outside.stderr.contains("registry-1.docker.io"), "{outside}");
    let bad = ply.scratch().file("bad.toml", "[registry.\"x\"]\nhtpp = true\n");
    let refused = ply.fails(1, args!["--config", bad, "images"]);
    assert!(refused.stderr.contains("bad.toml") && refused.stderr.contains("htpp"), "{refused}");
}

#[test]
fn h01_r08_a_certificate_is_checked_and_nothing_is_sent_in_plain_instead() {
    if !tools::have(&["docker-registry", "openssl"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let dir = ply.scratch().join("registry");
    let registry = DockerRegistry::start_tls(&dir);
    let name = format!("{}/app:1", registry.host());
    load(&ply, &one_layer(&name, noise(5000), Packing::Gzip));
    let push = |settings: &str| {
        let text = format!("[registry.\"{}\"]\nhttp = false\n{settings}\n", registry.host());
        ply.run(args!["--config", ply.scratch().file("config.toml", text), "push", name])
    };
    let refused = push("");
    assert!(!refused.status.success() && refused.stderr.contains("certificate"), "{refused}");
    // Another one does not help.
    fs::create_dir(ply.scratch().join("other")).unwrap();
    let other = DockerRegistry::start_tls(&ply.scratch().join("other"));
    let refused = push(&format!("ca = [\"{}/other/certificate.pem\"]", ply.scratch().path().display()));
    assert!(!refused.status.success() && refused.stderr.contains("certificate"), "{refused}");
    drop(other);
    for settings in [format!("ca = [\"{}/certificate.pem\"]", dir.display()), "insecure = true".to_owned()] {
        let pushed = push(&settings);
        assert!(pushed.status.success(), "{settings}: {pushed}");
    }
    let config = ply.scratch().join("config.toml");
    let fresh = store().unwrap();
    fresh.ok(args!["--config", config, "pull", name]);
    assert_eq!(fs::read(fresh.mount(&name).path().join("data")).unwrap(), noise(5000));
}

#[test]
fn a_built_image_is_pushed_and_read_by_skopeo() {
    if !tools::have(&["skopeo"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let Some(registry) = docker_registry(&ply, None) else { return };
    if !busybox(&ply) {
        return;
    }
    let context = Context::new(&ply, "FROM busybox\nRUN echo built > /file\n");
    context.build(&[]);
    let name = format!("{}/built:1", registry.host());
    let pushed = ply.json(args!["push", "built:latest", name]);
    let scratch = Scratch::new();
    assert_eq!(pushed[0]["digest"].as_str().unwrap(), digest_at(&name, &scratch.join("state")));
    let fresh = store().unwrap();
    fresh.ok(args!["pull", name]);
    tree_of(&fresh, &name).assert_same(&tree_of(&ply, "built:latest"), "built here, pulled there");
}
