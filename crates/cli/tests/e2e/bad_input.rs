//! What cannot be taken is refused in one clear message, and the store stays as it was.

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
};

use plies_testkit::{
    args,
    image::{Image, Packing, write_archive},
    ply::{Ply, Ran},
    sha256_hex,
    tar::{self, Member},
    tools,
};
use serde_json::{Value, json};

use crate::common::{Context, Shape, State, busybox, interrupted, load, store};

/// What a refused input leaves of a store with one image in it.
struct Refusal {
    ply: Ply,
    before: State,
}

impl Refusal {
    #[track_caller]
    fn new() -> Option<Self> {
        let ply = store()?;
        load(&ply, &good("localhost/before:1"));
        let before = State::of(&ply);
        Some(Self { ply, before })
    }

    /// Loads an archive of these files, which must fail with a message that holds each of `says`.
    #[track_caller]
    fn load(&self, what: &str, files: &[(String, Vec<u8>)], says: &[&str]) {
        let path = self.ply.scratch().join("bad.tar");
        write_archive(&path, files);
        self.load_path(what, &path, says);
    }

    #[track_caller]
    fn load_path(&self, what: &str, path: &std::path::Path, says: &[&str]) {
        let ran = self.ply.fails(1, args!["load", "-i", path]);
        assert_clear(what, &ran, says);
        self.before.assert_same(&State::of(&self.ply), what);
        assert_eq!(Shape::of(&self.ply).unfinished, Vec::<std::path::PathBuf>::new(), "{what}");
    }
}

/// One message, of a few lines, that holds each of these texts.
#[track_caller]
fn assert_clear(what: &str, ran: &Ran, says: &[&str]) {
    let errors: Vec<_> = ran.stderr.lines().filter(|line| !line.starts_with('#')).collect();
    assert!((1..=3).contains(&errors.len()), "{what}: one to three lines, not {}:\n{}", errors.len(), ran.stderr);
    for text in says {
        assert!(errors.join("\n").contains(text), "{what}: does not say {text:?}:\n{}", ran.stderr);
    }
}

fn good(tag: &str) -> Image {
    Image::new(tag)
        // Its own in every image: a layer that the store has already is not read again.
        .layer(&[Member::dir("a"), Member::file("a/one", tag.repeat(3_000))], Packing::Gzip)
        .layer(&[Member::file("a/two", tag)], Packing::Plain)
}

/// The files of an OCI layout with one of them changed.
fn with(image: &Image, name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Vec<(String, Vec<u8>)> {
    let mut files = image.oci_files();
    let file = files.iter_mut().find(|(have, _)| have == name).unwrap_or_else(|| panic!("no {name}"));
    file.1 = change(std::mem::take(&mut file.1));
    files
}

fn flip(mut bytes: Vec<u8>) -> Vec<u8> {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x20;
    bytes
}

/// An image whose one layer is this tar, whatever it holds.
fn of_tar(tar: &[u8]) -> Image {
    Image::new("localhost/bad:1").layer_tar(tar, Packing::Plain)
}

#[test]
fn archives_cut_anywhere_are_refused_by_name() {
    let Some(refusal) = Refusal::new() else { return };
    let whole = fs::read(good("localhost/bad:1").write_oci_tar(&refusal.ply.scratch().join("whole.tar"))).unwrap();
    let docker = fs::read(good("localhost/bad:1").write_docker_archive(&refusal.ply.scratch().join("d.tar"))).unwrap();
    for (kind, bytes) in [("oci", whole), ("docker", docker)] {
        // The two blocks at the end may be missing: everything is there without them.
        let end = bytes.len() - 1024;
        for cut in [0, 1, 511, 512, 700, end / 3, end / 2, end - 600, end - 1] {
            let path = refusal.ply.scratch().join("cut.tar");
            fs::write(&path, &bytes[..cut]).unwrap();
            refusal.load_path(&format!("{kind} cut at {cut} of {end}"), &path, &["cut.tar"]);
        }
    }
}

#[test]
fn a_blob_that_is_not_what_its_digest_says_is_refused_by_digest() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let config = image.id().strip_prefix("sha256:").unwrap().to_owned();
    for (what, hex) in [
        ("gzip layer", image.layer_digest(0)),
        ("plain layer", image.layer_digest(1)),
        ("config", config),
        ("manifest", image.manifest_digest()),
    ] {
        let files = with(&image, &format!("blobs/sha256/{hex}"), flip);
        refusal.load(what, &files, &[&hex[..12]]);
    }
}

#[test]
fn a_missing_blob_is_named() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    for hex in [image.layer_digest(0), image.manifest_digest(), image.id()["sha256:".len()..].to_owned()] {
        let mut files = image.oci_files();
        files.retain(|(name, _)| !name.ends_with(&hex));
        refusal.load("a blob is missing", &files, &[&hex[..12]]);
    }
}

/// Changes the manifest and makes the index point to the changed one.
fn with_manifest(image: &Image, change: impl FnOnce(&mut Value)) -> Vec<(String, Vec<u8>)> {
    let old = image.manifest_digest();
    let mut manifest: Value = serde_json::from_slice(&image.blobs()[&old]).unwrap();
    change(&mut manifest);
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let new = sha256_hex(&bytes);
    let mut files = with(image, "index.json", |index| {
        let mut index: Value = serde_json::from_slice(&index).unwrap();
        index["manifests"][0]["digest"] = json!(format!("sha256:{new}"));
        index["manifests"][0]["size"] = json!(bytes.len());
        serde_json::to_vec(&index).unwrap()
    });
    files.retain(|(name, _)| !name.ends_with(&old));
    files.insert(0, (format!("blobs/sha256/{new}"), bytes));
    files
}

#[test]
fn j07_a_wrong_size_is_refused_by_digest() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let layer = image.layer_digest(0);
    for size in [0, 1, 1_000_000, i64::MAX] {
        let files = with_manifest(&image, |manifest| manifest["layers"][0]["size"] = json!(size));
        refusal.load(&format!("a layer said to have {size} bytes"), &files, &[&layer[..12]]);
    }
}

#[test]
fn an_unknown_media_type_is_refused_by_name() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let files =
        with_manifest(&image, |manifest| manifest["layers"][0]["mediaType"] = json!("application/x-unheard-of"));
    refusal.load("layer", &files, &["application/x-unheard-of"]);
    let files = with(&image, "index.json", |index| {
        String::from_utf8(index).unwrap().replace("image.manifest.v1+json", "image.unheard.v9+json").into_bytes()
    });
    refusal.load("manifest", &files, &["unheard.v9"]);
}

#[test]
fn j01_a_document_that_calls_itself_otherwise_than_its_descriptor_is_refused() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let (oci, docker) =
        ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json");
    let files = with(&image, "index.json", |index| String::from_utf8(index).unwrap().replace(oci, docker).into_bytes());
    refusal.load("manifest", &files, &[&image.manifest_digest()[..12], oci, docker]);
    // An index in the index.
    let (oci, docker) =
        ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json");
    let mut files = image.oci_files();
    let inner = files.iter().find(|(name, _)| name == "index.json").unwrap().1.clone();
    let hex = sha256_hex(&inner);
    let outer = json!({ "schemaVersion": 2, "mediaType": oci, "manifests": [
        { "mediaType": docker, "digest": format!("sha256:{hex}"), "size": inner.len() } ] });
    files.retain(|(name, _)| name != "index.json");
    files.push((format!("blobs/sha256/{hex}"), inner));
    files.push(("index.json".to_owned(), serde_json::to_vec(&outer).unwrap()));
    refusal.load("index", &files, &[&hex[..12], oci, docker]);
}

#[test]
fn j03_a_key_that_comes_again_in_another_case_is_refused() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let files = with_manifest(&image, |manifest| manifest["Layers"] = manifest["layers"].clone());
    refusal.load("manifest", &files, &["ayers", "twice"]);
    let files = with(&image, "index.json", |index| {
        let mut index: Value = serde_json::from_slice(&index).unwrap();
        index["Manifests"] = json!([]);
        serde_json::to_vec(&index).unwrap()
    });
    refusal.load("index", &files, &["index.json", "anifests", "twice"]);
    let mut files = image.docker_files();
    let list = files.iter_mut().find(|(name, _)| name == "manifest.json").unwrap();
    let mut json: Value = serde_json::from_slice(&list.1).unwrap();
    json[0]["layers"] = json!([]);
    list.1 = serde_json::to_vec(&json).unwrap();
    refusal.load("docker's manifest", &files, &["manifest.json", "ayers", "twice"]);
}

#[test]
fn j10_a_layer_that_unpacks_to_another_diff_id_is_refused() {
    let Some(refusal) = Refusal::new() else { return };
    let wrong = "0123456789abcdef".repeat(4);
    let tar = tar::archive(&[Member::file("f", "f")]);
    let image = Image::new("localhost/bad:1").layer_raw(
        &format!("sha256:{wrong}"),
        Packing::Gzip.pack(&tar),
        Packing::Gzip.media_type(),
    );
    refusal.load("diff ID", &image.oci_files(), &[&wrong[..12]]);
}

#[test]
fn j08_embedded_data_that_is_something_else_is_refused() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let files = with_manifest(&image, |manifest| manifest["config"]["data"] = json!("e30="));
    refusal.load("a config of its own", &files, &["embeds", &image.id()[..19]]);
}

#[test]
fn j09_nobody_is_asked_for_a_layer_by_its_urls() {
    let Some(refusal) = Refusal::new() else { return };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}/layer", listener.local_addr().unwrap());
    let image = good("localhost/bad:1");
    let hex = image.layer_digest(0);
    let elsewhere = |manifest: &mut Value| manifest["layers"][0]["urls"] = json!([url]);
    let mut files = with_manifest(&image, elsewhere);
    files.retain(|(name, _)| !name.ends_with(&hex));
    refusal.load("a layer that lies elsewhere", &files, &[&hex[..12]]);
    // One that says so and came along is as good as any.
    let path = write_archive(&refusal.ply.scratch().join("here.tar"), &with_manifest(&image, elsewhere));
    refusal.ply.ok(args!["load", "-i", path]);
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "somebody was asked");
}

#[test]
fn j10_layers_in_another_order_than_their_diff_ids_are_refused() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    let files = with_manifest(&image, |manifest| manifest["layers"].as_array_mut().unwrap().reverse());
    refusal.load("swapped", &files, &["diff ID"]);
    let files = with_manifest(&image, |manifest| drop(manifest["layers"].as_array_mut().unwrap().pop()));
    refusal.load("one too few", &files, &["1 layers but 2 diff IDs"]);
}

#[test]
fn j13_labels_and_annotations_of_an_image_hold_and_release_nothing() {
    let Some(ply) = store() else { return };
    let other = good("localhost/other:1");
    load(&ply, &other);
    let reserved = json!({
        "containerd.io/gc.root": "1",
        "containerd.io/gc.expire": "1970-01-01T00:00:00Z",
        "containerd.io/gc.ref.content.0": format!("sha256:{}", other.layer_digest(0)),
        "plies.lease": "permanent",
    });
    let image = Image::new("localhost/labelled:1")
        .config("Labels", reserved.clone())
        .layer(&[Member::file("f", "labelled")], Packing::Gzip);
    let mine = image.layer_digest(0);
    let files = with_manifest(&image, |manifest| manifest["annotations"] = reserved.clone());
    let path = write_archive(&ply.scratch().join("labelled.tar"), &files);
    ply.ok(args!["load", "-i", path]);
    assert_eq!(ply.json(args!["inspect", "localhost/labelled:1"])["config"]["config"]["Labels"], reserved, "kept");
    ply.ok(args!["gc"]);
    assert!(Shape::of(&ply).blobs.contains(&mine), "it has not expired");
    ply.ok(args!["rmi", "localhost/other:1"]);
    ply.ok(args!["gc"]);
    assert!(!Shape::of(&ply).blobs.contains(&other.layer_digest(0)), "a label holds no blob");
    ply.ok(args!["rmi", "localhost/labelled:1"]);
    ply.ok(args!["gc"]);
    assert!(Shape::of(&ply).blobs.is_empty(), "no label is a root");
}

#[test]
fn j15_what_a_layer_holds_is_its_tar_whatever_its_tables_of_contents_say() {
    let Some(ply) = store() else { return };
    let tar = tar::archive(&[Member::file("true", "what the tar says")]);
    // As zstd:chunked and eStargz have theirs: one in a frame that decompressors skip, and annotations about both.
    let table = br#"{"version":1,"entries":[{"type":"reg","name":"lie","size":3}]}"#;
    let skipped = [&b"\x50\x2a\x4d\x18"[..], &u32::try_from(table.len()).unwrap().to_le_bytes(), table].concat();
    let blob = [Packing::Zstd.pack(&tar), skipped].concat();
    let diff_id = format!("sha256:{}", sha256_hex(&tar));
    let image = Image::new("localhost/toc:1").layer_raw(&diff_id, blob, Packing::Zstd.media_type());
    let digest = format!("sha256:{}", sha256_hex(table));
    let files = with_manifest(&image, |manifest| {
        manifest["layers"][0]["annotations"] = json!({
            "io.github.containers.zstd-chunked.manifest-checksum": digest,
            "io.github.containers.zstd-chunked.manifest-position": "0:62:62:1",
            "containerd.io/snapshot/stargz/toc.digest": digest,
            "containerd.io/uncompressed": format!("sha256:{}", "0".repeat(64)),
        });
    });
    let path = write_archive(&ply.scratch().join("toc.tar"), &files);
    ply.ok(args!["load", "-i", path]);
    let tree = crate::common::tree_of(&ply, "localhost/toc:1");
    assert_eq!(tree.names().collect::<Vec<_>>(), ["", "true"]);
    assert_eq!(ply.json(args!["inspect", "localhost/toc:1"])["diff_ids"], json!([diff_id]));
}

#[test]
fn garbage_where_a_layer_should_be_is_refused_by_digest() {
    let Some(refusal) = Refusal::new() else { return };
    let tar = tar::archive(&[Member::file("f", vec![b'f'; 5000])]);
    let diff_id = format!("sha256:{}", sha256_hex(&tar));
    let packed = Packing::Gzip.pack(&tar);
    let zstd = Packing::Zstd.pack(&tar);
    let mut crc = packed.clone();
    let at = crc.len() - 6;
    crc[at] ^= 1;
    for (what, bytes, packing) in [
        ("not gzip at all", b"garbage, and nothing like gzip".to_vec(), Packing::Gzip),
        ("gzip cut short", packed[..packed.len() - 20].to_vec(), Packing::Gzip),
        ("gzip with a wrong checksum", crc, Packing::Gzip),
        ("gzip, then garbage", [packed.clone(), b"tail".to_vec()].concat(), Packing::Gzip),
        ("zstd cut short", zstd[..zstd.len() - 3].to_vec(), Packing::Zstd),
        ("zstd named gzip", zstd, Packing::Gzip),
        ("empty", Vec::new(), Packing::Gzip),
    ] {
        let image = Image::new("localhost/bad:1").layer_raw(&diff_id, bytes, packing.media_type());
        refusal.load(what, &image.oci_files(), &[&image.layer_digest(0)[..12]]);
    }
}

#[test]
fn layers_that_leave_the_root_are_refused_and_nothing_outside_changes() {
    let Some(refusal) = Refusal::new() else { return };
    let victim = refusal.ply.scratch().file("victim/canary", "untouched");
    let out = refusal.ply.scratch().path().to_str().unwrap().trim_start_matches('/').to_owned();
    let up = "../".repeat(12);
    let cases = [
        ("P03 name", vec![Member::file(format!("{up}{out}/victim/pwn"), "x")]),
        ("P03b PAX path", vec![Member::file("x", "x").pax("path", format!("{up}{out}/victim/pwn"))]),
        (
            "P03c GNU long name",
            vec![
                Member::file("././@LongLink", format!("{up}{out}/victim/pwn\0")).type_flag(b'L'),
                Member::file("x", "x"),
            ],
        ),
        ("L01 hard link outside", vec![Member::hard_link("x", format!("{up}{out}/victim/canary"))]),
        ("P07 root as a symlink", vec![Member::symlink("./", "/")]),
        ("W01 whiteout of ..", vec![Member::file(".wh...", "")]),
        ("W02 whiteout of .. below", vec![Member::dir("e"), Member::file("e/.wh...", "")]),
        ("P12 long component", vec![Member::file("x".repeat(300), "")]),
        ("M11 unknown type", vec![Member::file("x", "").type_flag(b'M')]),
    ];
    for (what, members) in cases {
        let image = of_tar(&tar::archive(&members));
        refusal.load(what, &image.oci_files(), &[&image.layer_digest(0)[..12]]);
        assert_eq!(fs::read(&victim).unwrap(), b"untouched", "{what}");
        assert_eq!(fs::read_dir(victim.parent().unwrap()).unwrap().count(), 1, "{what}");
    }
}

#[test]
fn links_out_of_the_root_are_followed_inside_it() {
    let Some(ply) = store() else { return };
    let victim = ply.scratch().file("victim/canary", "untouched");
    let dir = victim.parent().unwrap().to_str().unwrap().to_owned();
    let members = [
        Member::symlink("absolute", &dir),
        Member::file("absolute/pwn", "x"),
        Member::file("absolute/.wh.canary", ""),
        Member::symlink("up", "../../../.."),
        Member::file("up/inside", "x"),
        Member::symlink("s", format!("{dir}/canary")),
        Member::hard_link("h", "s"),
        Member::file("/etc/x", "absolute name"),
        Member::dir("y"),
        Member::file("y/../z", "cleaned name"),
    ];
    load(&ply, &of_tar(&tar::archive(&members)));
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
    let tree = crate::common::tree_of(&ply, "localhost/bad:1");
    for name in ["inside", "etc/x", "z"] {
        assert_eq!(tree.get(name).kind, "file", "{name}");
    }
    assert_eq!(tree.get("h").kind, "symlink");
}

#[test]
fn broken_tar_is_refused_by_the_digest_of_its_layer() {
    let Some(refusal) = Refusal::new() else { return };
    let sound = tar::archive(&[Member::dir("d"), Member::file("d/f", vec![7; 2000])]);
    let mut checksum = sound.clone();
    checksum[150] ^= 1;
    for (what, tar) in [
        ("cut in the header", sound[..700].to_vec()),
        ("cut in the data", sound[..1500].to_vec()),
        ("checksum", checksum),
        (
            "T07 PAX length",
            [Member::file("PaxHeaders/0", "999 path=x\n").type_flag(b'x').bytes(), sound.clone()].concat(),
        ),
        ("T10 negative size", {
            let mut bytes = sound.clone();
            bytes[512 + 124..512 + 136].copy_from_slice(&[0xff; 12]);
            fix_checksum(&mut bytes[512..1024]);
            bytes
        }),
        ("hard link to nothing", tar::archive(&[Member::hard_link("x", "no/such/file")])),
        ("not a tar", vec![b'x'; 5000]),
    ] {
        let image = of_tar(&tar);
        refusal.load(what, &image.oci_files(), &[&image.layer_digest(0)[..12]]);
    }
}

fn fix_checksum(header: &mut [u8]) {
    header[148..156].copy_from_slice(b"        ");
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[test]
fn bombs_hit_a_named_limit() {
    let Some(refusal) = Refusal::new() else { return };
    // 1 GiB of zeros in 1 MiB: far over the ratio, far under what would hurt this machine.
    let diff_id = format!("sha256:{}", "0".repeat(64));
    let mut zeros = zstd_zeros(1 << 30);
    let image =
        Image::new("localhost/bad:1").layer_raw(&diff_id, std::mem::take(&mut zeros), Packing::Zstd.media_type());
    refusal.load("B01", &image.oci_files(), &[&image.layer_digest(0)[..12], "limit"]);
}

/// A tar of one file of zeros, packed; never whole in memory.
fn zstd_zeros(bytes: u64) -> Vec<u8> {
    use std::io::{Read as _, Write as _};
    let mut packer = plies_testkit::image::zstd_writer();
    let member = Member::file("zeros", "").size_field(bytes).bytes();
    packer.write_all(&member).unwrap();
    std::io::copy(&mut std::io::repeat(0).take(bytes + 1024), &mut packer).unwrap();
    packer.finish().unwrap()
}

#[test]
fn documents_that_are_not_json_are_refused_by_name() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    refusal.load("index.json", &with(&image, "index.json", |_| b"{".to_vec()), &["index.json"]);
    refusal.load(
        "oci-layout",
        &with(&image, "oci-layout", |_| br#"{"imageLayoutVersion":"7.0.0"}"#.to_vec()),
        &["7.0.0"],
    );
    let mut files = image.docker_files();
    files.retain(|(name, _)| name != "manifest.json");
    files.push(("manifest.json".to_owned(), b"[{]".to_vec()));
    refusal.load("manifest.json", &files, &["manifest.json"]);
    refusal.load("no image at all", &[("readme".to_owned(), b"hello".to_vec())], &["bad.tar"]);
}

#[test]
fn j14_docker_archives_that_point_outside_are_refused() {
    let Some(refusal) = Refusal::new() else { return };
    let image = good("localhost/bad:1");
    for change in ["../../etc/passwd", "/etc/passwd", "no/such/layer.tar"] {
        let mut files = image.docker_files();
        for (name, bytes) in &mut files {
            if name == "manifest.json" {
                let mut manifest: Value = serde_json::from_slice(bytes).unwrap();
                manifest[0]["Layers"][0] = json!(change);
                *bytes = serde_json::to_vec(&manifest).unwrap();
            }
        }
        refusal.load(change, &files, &[change]);
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let Some(refusal) = Refusal::new() else { return };
    let path = refusal.ply.scratch().join("no-such-file.tar");
    refusal.load_path("missing", &path, &["no-such-file.tar"]);
}

#[test]
fn images_that_are_not_there_are_named() {
    let Some(refusal) = Refusal::new() else { return };
    let dir = refusal.ply.scratch().dir("empty");
    for command in [
        args!["inspect", "no-such:image"],
        args!["history", "no-such:image"],
        args!["tag", "no-such:image", "other:name"],
        args!["rmi", "no-such:image"],
        args!["save", "-o", refusal.ply.scratch().join("out.tar"), "no-such:image"],
        args!["mount", "no-such:image", dir],
        args!["run", "no-such:image"],
    ] {
        let ran = refusal.ply.fails(1, command);
        assert_clear(&format!("{command:?}"), &ran, &["no-such:image"]);
    }
    assert!(!refusal.ply.scratch().join("out.tar").exists(), "a failed save leaves no file");
    refusal.before.assert_same(&State::of(&refusal.ply), "images that are not there");
}

#[test]
fn wrong_usage_exits_with_2() {
    let Some(ply) = store() else { return };
    for command in [args!["no-such-command"], args!["load", "--no-such-option"], args!["tag", "only-one"], args!["rmi"]]
    {
        ply.fails(2, command);
    }
}

#[test]
fn an_error_in_a_dockerfile_is_told_with_file_and_line() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "");
    ply.ok(args!["images"]);
    let before = State::of(&ply);
    for (line, says) in [
        ("FRUM busybox", "FRUM"),
        ("COPY only-one", "COPY"),
        ("COPY --no-such-flag a b", "no-such-flag"),
        ("ENV", "ENV"),
        ("COPY --from=nowhere a b", "nowhere"),
    ] {
        let text = format!("# a comment\nFROM scratch\n\nENV A=1 \\\n    B=2\n\n{line}\nENV C=3\n");
        context.file("Dockerfile", text);
        let ran = context.build_fails(&[]);
        assert_clear(line, &ran, &["Dockerfile", "7", says]);
        before.assert_same(&State::of(&ply), line);
    }
}

#[test]
fn a_missing_source_of_copy_is_told_with_its_line_and_name() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "FROM scratch\nCOPY there /there\nCOPY missing /missing\n");
    context.file("there", "");
    let ran = context.build_fails(&[]);
    assert_clear("COPY", &ran, &["Dockerfile", "3", "missing"]);
    context.file("Dockerfile", "FROM scratch\nCOPY ../../etc/passwd /x\n");
    assert_clear("COPY ..", &context.build_fails(&[]), &["etc/passwd"]);
    assert_eq!(Shape::of(&ply).unfinished, Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_step_that_fails_is_told_with_its_line_and_code_and_names_nothing() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let images = ply.json(args!["images"]);
    let context = Context::new(
        &ply,
        "FROM busybox\nRUN echo before\nRUN echo told; echo on stderr >&2; exit 42\nRUN echo after\n",
    );
    let ran = context.build_fails(&[]);
    assert!(ran.stderr.contains("told") && ran.stderr.contains("on stderr"), "what the step wrote is shown:\n{ran}");
    for text in ["Dockerfile", "3", "42"] {
        assert!(ran.stderr.lines().last().unwrap().contains(text) || ran.stderr.contains(text), "{text}:\n{ran}");
    }
    assert!(!ran.stderr.contains("echo after"), "{ran}");
    assert_eq!(ply.json(args!["images"]), images);
    assert_eq!(Shape::of(&ply).unfinished, Vec::<std::path::PathBuf>::new());
}

#[test]
fn missing_contexts_dockerfiles_stages_and_bases_are_named() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "FROM scratch AS one\nCOPY f /f\n");
    context.file("f", "");
    let ran = ply.fails(1, args!["build", ply.scratch().join("no-such-context")]);
    assert_clear("context", &ran, &["no-such-context"]);
    assert_clear("stage", &context.build_fails(args!["--target", "no-such-stage"]), &["no-such-stage"]);
    assert_clear("file", &context.build_fails(args!["-f", context.dir.join("Nofile")]), &["Nofile"]);
    context.file("Dockerfile", "FROM no-such-base:1\nCOPY f /f\n");
    assert_clear("base", &context.build_fails(&[]), &["no-such-base:1"]);
}

/// Loads from a pipe that gives these bytes over and over, up to `most`. Tells how many were taken.
fn load_from_pipe(ply: &Ply, chunk: &[u8], most: usize) -> (Ran, usize) {
    let mut command = ply.command(args!["load"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut taken = 0;
    while taken < most && stdin.write_all(chunk).is_ok() {
        taken += chunk.len();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (Ran { status: output.status, stdout: text(&output.stdout), stderr: text(&output.stderr) }, taken)
}

#[test]
fn a_stream_that_does_not_begin_as_an_archive_is_not_read_to_its_end() {
    let Some(refusal) = Refusal::new() else { return };
    let most = 64 << 20;
    for (what, byte) in [("zeros", 0), ("text", b'A'), ("bytes", 0xff)] {
        let (ran, taken) = load_from_pipe(&refusal.ply, &[byte; 4096], most);
        assert_eq!(ran.status.code(), Some(1), "{what}: {ran}");
        assert_clear(what, &ran, &["<standard input>", "no archive"]);
        // What a pipe holds and a buffer or two, whatever comes after them.
        assert!(taken < 2 << 20, "{what}: {taken} of {most} bytes were read");
        refusal.before.assert_same(&State::of(&refusal.ply), what);
    }
    // Too short to be one.
    for (what, bytes) in [("nothing", &b""[..]), ("a word", b"word"), ("packed", &Packing::Gzip.pack(b"a word"))] {
        let (ran, _) = load_from_pipe(&refusal.ply, bytes, bytes.len());
        assert_eq!(ran.status.code(), Some(1), "{what}: {ran}");
        assert_clear(what, &ran, &["<standard input>", "no archive"]);
        let path = refusal.ply.scratch().file("short.tar", bytes);
        refusal.load_path(what, &path, &["short.tar"]);
    }
}

#[test]
fn what_is_packed_as_xz_or_bzip2_is_named() {
    let Some(refusal) = Refusal::new() else { return };
    for (format, magic) in [("xz", &b"\xfd7zXZ\0"[..]), ("bzip2", b"BZh9")] {
        let chunk = [magic, &[7; 4000]].concat();
        let path = refusal.ply.scratch().file("packed.tar", &chunk);
        refusal.load_path(format, &path, &["packed.tar", format, "decompress"]);
        let (ran, taken) = load_from_pipe(&refusal.ply, &chunk, 64 << 20);
        assert_eq!(ran.status.code(), Some(1), "{format}: {ran}");
        assert_clear(format, &ran, &["<standard input>", format, "decompress"]);
        assert!(taken < 2 << 20, "{format}: {taken} bytes were read");
    }
}

#[test]
fn an_interrupt_ends_the_wait_for_a_writer() {
    let Some(refusal) = Refusal::new() else { return };
    let fifo = refusal.ply.scratch().join("fifo");
    tools::run(Command::new("mkfifo").arg(&fifo));
    let command = refusal.ply.command(args!["load", "-i", fifo]);
    let ended = interrupted(command);
    assert_eq!(ended.status.code(), Some(1), "{}", String::from_utf8_lossy(&ended.stderr));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("cancel"));
    refusal.before.assert_same(&State::of(&refusal.ply), "an interrupted load");
    // And a FIFO with a writer is read.
    let image = good("localhost/fifo:1");
    let archive = image.write_oci_tar(&refusal.ply.scratch().join("in.tar"));
    let mut writer = Command::new("timeout");
    let copy = format!("cat '{}' > '{}'", archive.display(), fifo.display());
    let mut writer = writer.args(["60", "sh", "-c", &copy]).spawn().unwrap();
    refusal.ply.ok(args!["load", "-i", fifo]);
    assert!(writer.wait().unwrap().success());
    refusal.ply.ok(args!["inspect", image.tag()]);
}

#[test]
fn names_that_layers_keep_for_themselves_are_refused_before_the_copy() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "");
    context.file(".wh.x", "");
    context.file("dir/.wh.y", "");
    context.file("plain", "");
    context.file("a.tar", tar::archive(&[Member::file("f", ""), Member::whiteout("d/x")]));
    ply.ok(args!["images"]);
    let before = State::of(&ply);
    for (line, path) in [
        ("COPY .wh.x /d/", ".wh.x"),
        ("COPY . /d/", ".wh."),
        ("COPY dir /d", "dir/.wh.y"),
        ("COPY --link dir /d", "dir/.wh.y"),
        ("COPY plain /d/.wh.z", "/d/.wh.z"),
        ("COPY plain /.wh.z/d", "/.wh.z/d"),
        ("COPY <<.wh.z /d/\n.wh.z", "d/.wh.z"),
        ("ADD a.tar /d/", "d/.wh.x"),
        ("ADD .wh.x /d/", ".wh.x"),
        ("ADD a.tar /.wh.z/", "/.wh.z"),
        ("WORKDIR /d/.wh.z", "/d/.wh.z"),
    ] {
        context.file("Dockerfile", format!("FROM scratch\n{line}\n"));
        let ran = context.build_fails(&[]);
        let told = ran.stderr.lines().find(|line| line.starts_with("ply: ")).unwrap();
        for text in ["Dockerfile:2", path, "kept for what layers take away"] {
            assert!(told.contains(text), "{line}: does not say {text}: {ran}");
        }
        assert_eq!(ply.json(args!["ref", "ls"]), json!([]), "{line}: a record stays");
        ply.ok(args!["gc"]);
        before.assert_same(&State::of(&ply), line);
    }
}

#[test]
fn limits_of_the_config_file_hold_and_are_named() {
    let Some(refusal) = Refusal::new() else { return };
    let config = refusal.ply.scratch().join("limits.toml");
    let image = Image::new("localhost/bad:1")
        .layer(&[Member::dir("d"), Member::file("d/f", "limits of their own")], Packing::Gzip)
        .layer(&[Member::file("g", "")], Packing::Plain);
    let path = image.write_oci_tar(&refusal.ply.scratch().join("image.tar"));
    for (key, too_low, enough) in [
        ("layers", "1", "2"),
        ("history", "1", "2"),
        ("entries", "1", "1000"),
        ("path-depth", "1", "100"),
        ("file-bytes", "4", "\"1MB\""),
        ("config-bytes", "\"100B\"", "\"1MiB\""),
        ("manifest-bytes", "100", "100000"),
    ] {
        let with = |value: &str| {
            fs::write(&config, format!("[limits]\n{key} = {value}\n")).unwrap();
            args!["--config", config, "load", "-i", path].to_vec()
        };
        let ran = refusal.ply.fails(1, &with(too_low));
        assert_clear(key, &ran, &[&format!("limits.{key}")]);
        refusal.before.assert_same(&State::of(&refusal.ply), key);
        refusal.ply.ok(&with(enough));
        refusal.ply.ok(args!["rmi", "localhost/bad:1"]);
    }
}
