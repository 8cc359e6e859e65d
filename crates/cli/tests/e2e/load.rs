//! `load` and `save`: what goes in comes out, byte for byte.

use std::{
    fs,
    process::{Command, Stdio},
};

use plies_testkit::{
    args,
    image::{self, Image, Packing, blobs_of, untar, write_archive},
    ply::Ran,
    tar::Member,
};
use serde_json::{Value, json};

use crate::common::{Shape, State, everything, load, store, tree_of};

fn three_layers(tag: &str) -> Image {
    Image::new(tag)
        .layer(&[Member::dir("a"), Member::file("a/one", "1")], Packing::Plain)
        .layer(&[Member::file("a/two", vec![b'2'; 200_000])], Packing::Gzip)
        .layer(&[Member::whiteout("a/one"), Member::file("three", "3")], Packing::Zstd)
        .config("Labels", json!({ "order": "kept", "a": "b" }))
}

#[test]
fn oci_archive_and_directory_come_out_byte_for_byte() {
    for packing in Packing::ALL {
        let Some(ply) = store() else { return };
        let image = everything("localhost/everything:1", packing);
        let scratch = ply.scratch();
        let from_tar = image.write_oci_tar(&scratch.join("in.tar"));
        let from_dir = image.write_oci_dir(&scratch.join("in"));
        for input in [from_tar, from_dir] {
            ply.ok(args!["load", "-i", input]);
            let (tar, dir) = (scratch.join("out.tar"), scratch.join("out"));
            ply.ok(args!["save", "-o", tar, image.tag()]);
            ply.ok(args!["save", "--format", "oci-dir", "-o", dir, image.tag()]);
            assert!(blobs_of(&dir) == image.blobs(), "{packing:?}: directory from {}", input.display());
            assert!(blobs_of(&untar(&tar, &scratch.join("untar"))) == image.blobs(), "{packing:?}: tar");
            for path in [dir, scratch.join("untar")] {
                fs::remove_dir_all(path).unwrap();
            }
            ply.ok(args!["rmi", image.tag()]);
        }
    }
}

/// Nobody reads a blob after it was unpacked, so it does not push anything out of memory; what it became is likely to be read.
#[test]
fn large_blobs_leave_the_page_cache_and_their_layers_stay() {
    let Some(ply) = store() else { return };
    let kind = Command::new("stat").args(["-f", "-c", "%T"]).arg(ply.scratch().path()).output().unwrap();
    if kind.stdout == b"tmpfs\n" {
        eprintln!("SKIPPED: files are in memory here anyway");
        return;
    }
    let image = Image::new("localhost/large:1").layer(&[Member::file("large", vec![b'x'; 24 << 20])], Packing::Plain);
    ply.ok(args!["load", "-i", image.write_oci_tar(&ply.scratch().join("in.tar"))]);
    let cached_bytes = |dir: &str| -> u64 {
        let files = format!("find {dir} -type f -size +20M -exec fincore --bytes --noheadings --output RES {{}} +");
        let said = Command::new("sh").args(["-c", &files]).current_dir(ply.root()).output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        said.trim().parse().unwrap()
    };
    assert!(cached_bytes("content/blobs") < 8 << 20);
    assert!(cached_bytes("layers") > 20 << 20);
}

#[test]
fn docker_archive_keeps_config_and_layers_byte_for_byte() {
    for packing in Packing::ALL {
        let Some(ply) = store() else { return };
        let image = everything("localhost/everything:1", packing);
        let scratch = ply.scratch();
        ply.ok(args!["load", "-i", image.write_docker_archive(&scratch.join("in.tar"))]);
        let out = scratch.join("out.tar");
        ply.ok(args!["save", "--format", "docker", "-o", out, image.tag()]);
        let files = untar(&out, &scratch.join("out"));
        let manifest: Value = serde_json::from_slice(&fs::read(files.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest[0]["RepoTags"], json!([image.tag()]));
        let config = fs::read(files.join(manifest[0]["Config"].as_str().unwrap())).unwrap();
        assert_eq!(format!("sha256:{}", plies_testkit::sha256_hex(&config)), image.id(), "{packing:?}: config");
        let config: Value = serde_json::from_slice(&config).unwrap();
        for (layer, diff_id) in
            manifest[0]["Layers"].as_array().unwrap().iter().zip(config["rootfs"]["diff_ids"].as_array().unwrap())
        {
            // docker reads packed layers too, but what is written here is plain: its digest is the diff ID.
            let bytes = fs::read(files.join(layer.as_str().unwrap())).unwrap();
            assert_eq!(&json!(format!("sha256:{}", plies_testkit::sha256_hex(&bytes))), diff_id, "{packing:?}");
        }
    }
}

#[test]
fn docker_archive_saved_as_oci_keeps_the_packed_layers() {
    for packing in Packing::ALL {
        let Some(ply) = store() else { return };
        let image = three_layers("localhost/three:1").layer(&[Member::file("top", "x")], packing);
        let scratch = ply.scratch();
        ply.ok(args!["load", "-i", image.write_docker_archive(&scratch.join("in.tar"))]);
        ply.ok(args!["save", "--format", "oci-dir", "-o", scratch.join("out"), image.tag()]);
        let blobs = blobs_of(&scratch.join("out"));
        for n in 0..4 {
            assert!(blobs.contains_key(&image.layer_digest(n)), "{packing:?}: layer {n} is another blob");
        }
        assert!(blobs.contains_key(image.id().strip_prefix("sha256:").unwrap()), "{packing:?}: the config is another");
    }
}

#[test]
fn stdin_and_stdout_do_as_files_do() {
    let Some(ply) = store() else { return };
    let image = three_layers("localhost/three:1");
    let path = image.write_oci_tar(&ply.scratch().join("in.tar"));
    let stdin = fs::File::open(path).unwrap();
    let ran = Ran::of(ply.command(args!["load"]).stdin(stdin));
    assert!(ran.status.success(), "{ran}");
    let out = ply.scratch().join("out.tar");
    let stdout = fs::File::create(&out).unwrap();
    let status = ply.command(args!["save", image.tag()]).stdout(Stdio::from(stdout)).status().unwrap();
    assert!(status.success());
    assert!(blobs_of(&untar(&out, &ply.scratch().join("out"))) == image.blobs());
}

#[test]
fn save_is_the_same_every_time() {
    let Some(ply) = store() else { return };
    load(&ply, &three_layers("localhost/three:1"));
    for format in ["oci", "docker"] {
        let paths = ["one", "two"].map(|name| ply.scratch().join(name));
        for path in &paths {
            ply.ok(args!["save", "--format", format, "-o", path, "localhost/three:1"]);
        }
        assert!(fs::read(&paths[0]).unwrap() == fs::read(&paths[1]).unwrap(), "{format}");
    }
}

#[test]
fn loading_again_changes_nothing() {
    let Some(ply) = store() else { return };
    let image = everything("localhost/everything:1", Packing::Gzip);
    load(&ply, &image);
    let before = State::of(&ply);
    load(&ply, &image);
    before.assert_same(&State::of(&ply), "loaded twice");
}

#[test]
fn a_layer_packed_in_two_ways_is_kept_once() {
    let Some(ply) = store() else { return };
    let members = [Member::dir("d"), Member::file("d/f", vec![1; 50_000])];
    load(&ply, &Image::new("localhost/gz:1").layer(&members, Packing::Gzip));
    let layers = Shape::of(&ply).layers;
    load(&ply, &Image::new("localhost/zst:1").layer(&members, Packing::Zstd));
    assert_eq!(Shape::of(&ply).layers, layers, "one diff ID, one layer");
    tree_of(&ply, "localhost/gz:1").assert_same(&tree_of(&ply, "localhost/zst:1"), "the same members");
    for tag in ["localhost/gz:1", "localhost/zst:1"] {
        let out = ply.scratch().join("out");
        ply.ok(args!["save", "--format", "oci-dir", "-o", out, tag]);
        fs::remove_dir_all(out).unwrap();
    }
}

#[test]
fn two_images_of_one_docker_archive_are_both_loaded() {
    let Some(ply) = store() else { return };
    let (one, two) =
        (three_layers("localhost/one:1"), Image::new("localhost/two:2").layer(&[Member::dir("x")], Packing::Plain));
    let mut files = one.docker_files();
    let manifests: Vec<Value> = [&one, &two]
        .iter()
        .map(|image| {
            let files = image.docker_files();
            let (_, bytes) = files.iter().find(|(name, _)| name == "manifest.json").unwrap();
            serde_json::from_slice::<Value>(bytes).unwrap()[0].clone()
        })
        .collect();
    files.extend(two.docker_files());
    files.retain(|(name, _)| name != "manifest.json");
    files.push(("manifest.json".to_owned(), serde_json::to_vec(&manifests).unwrap()));
    ply.ok(args!["load", "-i", write_archive(&ply.scratch().join("both.tar"), &files)]);
    assert!(tree_of(&ply, "localhost/one:1").find("three").is_some());
    assert!(tree_of(&ply, "localhost/two:2").find("x").is_some());
}

#[test]
fn an_index_of_platforms_gives_the_one_of_this_machine() {
    let Some(ply) = store() else { return };
    let ours = Image::new("localhost/many:1").layer(&[Member::file("ours", "")], Packing::Plain);
    let other = Image::new("localhost/many:1").layer(&[Member::file("other", "")], Packing::Plain);
    let mut files = ours.oci_files();
    files.extend(other.oci_files().into_iter().filter(|(name, _)| name.starts_with("blobs/")));
    let entry = |image: &Image, architecture: &str| {
        let hex = image.manifest_digest();
        json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{hex}"),
                "size": image.blobs()[&hex].len(), "platform": { "os": "linux", "architecture": architecture } })
    };
    let index =
        serde_json::to_vec(&json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&other, "s390x"), entry(&ours, image::architecture())] }))
        .unwrap();
    let hex = plies_testkit::sha256_hex(&index);
    let top = json!({ "schemaVersion": 2, "manifests": [{ "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": format!("sha256:{hex}"), "size": index.len(),
        "annotations": { "io.containerd.image.name": "localhost/many:1", "org.opencontainers.image.ref.name": "1" } }] });
    files.retain(|(name, _)| name != "index.json");
    files.push((format!("blobs/sha256/{hex}"), index));
    files.push(("index.json".to_owned(), serde_json::to_vec(&top).unwrap()));
    ply.ok(args!["load", "-i", write_archive(&ply.scratch().join("many.tar"), &files)]);
    let tree = tree_of(&ply, "localhost/many:1");
    assert!(tree.find("ours").is_some() && tree.find("other").is_none());
}

#[test]
fn tag_names_a_nameless_image() {
    let Some(ply) = store() else { return };
    let image = three_layers("localhost/three:1");
    let mut files = image.oci_files();
    for (name, bytes) in &mut files {
        if name == "index.json" {
            let mut index: Value = serde_json::from_slice(bytes).unwrap();
            index["manifests"][0].as_object_mut().unwrap().remove("annotations");
            *bytes = serde_json::to_vec(&index).unwrap();
        }
    }
    let path = write_archive(&ply.scratch().join("nameless.tar"), &files);
    ply.ok(args!["load", "--tag", "given:7", "-i", path]);
    assert!(tree_of(&ply, "given:7").find("three").is_some());
}

#[test]
fn rmi_and_gc_take_back_everything_that_load_brought() {
    let Some(ply) = store() else { return };
    ply.ok(args!["images"]);
    let before = Shape::of(&ply);
    load(&ply, &everything("localhost/everything:1", Packing::Gzip));
    ply.ok(args!["tag", "localhost/everything:1", "second:name"]);
    ply.ok(args!["rmi", "localhost/everything:1"]);
    assert!(tree_of(&ply, "second:name").find("etc/config").is_some(), "one name is left, and so is the image");
    ply.ok(args!["rmi", "second:name"]);
    ply.ok(args!["gc"]);
    assert_eq!(Shape::of(&ply), before);
}

#[test]
fn shared_layers_stay_when_one_of_two_images_goes() {
    let Some(ply) = store() else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::file("base", "b")], Packing::Gzip);
    let child = base.clone().named("child:1").layer(&[Member::file("child", "c")], Packing::Gzip);
    load(&ply, &base);
    load(&ply, &child);
    ply.ok(args!["rmi", "localhost/base:1"]);
    ply.ok(args!["gc"]);
    let tree = tree_of(&ply, "child:1");
    assert!(tree.find("base").is_some() && tree.find("child").is_some());
}

#[test]
fn no_image_stands_on_a_layer_whose_directory_is_gone() {
    let Some(ply) = store() else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::file("base", "b")], Packing::Gzip);
    load(&ply, &base);
    let layers: Vec<_> = fs::read_dir(ply.root().join("layers")).unwrap().map(|entry| entry.unwrap().path()).collect();
    for layer in layers.iter().filter(|path| !path.ends_with("stage")) {
        fs::remove_dir_all(layer).unwrap();
    }
    for image in [base.clone().named("localhost/again:1"), base.layer(&[Member::file("top", "t")], Packing::Gzip)] {
        let ran = ply.fails(1, args!["load", "-i", image.write_oci_tar(&ply.scratch().join("in.tar"))]);
        assert!(ran.stderr.contains("layer") && ran.stderr.contains("missing"), "{ran}");
        assert_eq!(ply.json(args!["images"]).as_array().unwrap().len(), 1, "no other image");
        assert_eq!(ply.json(args!["images"])[0]["names"], json!(["localhost/base:1"]), "and no other name");
    }
}
