//! Where `save` writes, and what it leaves of what was there.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use plies_testkit::{
    args,
    image::{Image, Packing, blobs_of, untar},
    ply::Ply,
    tar::Member,
    tools,
};
use serde_json::Value;

use crate::common::{interrupted, load, store};

fn small(tag: &str, content: &str) -> Image {
    Image::new(tag).layer(&[Member::file("f", content)], Packing::Gzip)
}

fn partials(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(partials(&path));
        } else if path.to_string_lossy().ends_with(".partial") {
            found.push(path);
        }
    }
    found
}

fn names(layout: &Path) -> Vec<String> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let name = |entry: &Value| entry["annotations"]["io.containerd.image.name"].as_str().unwrap_or("-").to_owned();
    index["manifests"].as_array().unwrap().iter().map(name).collect()
}

fn loaded(image: &Image) -> Option<Ply> {
    let ply = store()?;
    load(&ply, image);
    Some(ply)
}

#[test]
fn a_fifo_is_written_to_and_stays() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    let (fifo, out) = (ply.scratch().join("fifo"), ply.scratch().join("out.tar"));
    tools::run(Command::new("mkfifo").arg(&fifo));
    let mut reader =
        Command::new("timeout").args(["60", "cat"]).arg(&fifo).stdout(fs::File::create(&out).unwrap()).spawn().unwrap();
    ply.ok(args!["save", "-o", fifo, image.tag()]);
    reader.wait().unwrap();
    assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
    assert!(blobs_of(&untar(&out, &ply.scratch().join("out"))) == image.blobs());
}

#[test]
fn an_interrupt_ends_the_wait_for_a_reader() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    let fifo = ply.scratch().join("fifo");
    tools::run(Command::new("mkfifo").arg(&fifo));
    let command = ply.command(args!["save", "-o", fifo, image.tag()]);
    let ended = interrupted(command);
    assert_eq!(ended.status.code(), Some(1), "{}", String::from_utf8_lossy(&ended.stderr));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("cancel"));
}

#[test]
fn a_device_and_standard_output_by_name_are_written_to() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    // A node of our own: a failure would otherwise take the machine's.
    let null = ply.scratch().join("null");
    tools::run(Command::new("mknod").arg(&null).args(["c", "1", "3"]));
    ply.ok(args!["save", "-o", null, image.tag()]);
    assert!(fs::symlink_metadata(&null).unwrap().file_type().is_char_device());
    let out = ply.scratch().join("out.tar");
    let mut save = ply.command(args!["save", "-o", "/dev/stdout", image.tag()]);
    assert!(save.stdout(fs::File::create(&out).unwrap()).status().unwrap().success());
    assert!(blobs_of(&untar(&out, &ply.scratch().join("out"))) == image.blobs());
}

#[test]
fn a_link_is_written_through() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    let dir = ply.scratch().dir("elsewhere");
    for there in [false, true] {
        let (target, link) = (dir.join(format!("{there}.tar")), ply.scratch().join(format!("{there}")));
        if there {
            fs::write(&target, "old").unwrap();
            fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        }
        symlink(format!("elsewhere/{there}.tar"), &link).unwrap();
        ply.ok(args!["save", "-o", link, image.tag()]);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(blobs_of(&untar(&target, &ply.scratch().join(format!("{there}.d")))) == image.blobs());
        if there {
            assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600, "as private as it was");
        }
    }
}

#[test]
fn a_failed_save_leaves_the_old_file_and_nothing_else() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    let dir = ply.scratch().dir("out");
    let out = dir.join("a.tar");
    fs::write(&out, "old").unwrap();
    // Somebody's own file, under the name that partial files once had.
    fs::write(dir.join("a.tar.partial"), "mine").unwrap();
    let blob = ply.root().join("content/blobs/sha256").join(image.layer_digest(0));
    let sound = fs::read(&blob).unwrap();
    fs::remove_file(&blob).unwrap();
    ply.fails(1, args!["save", "-o", out, image.tag()]);
    assert_eq!(fs::read(&out).unwrap(), b"old");
    let layout = ply.scratch().join("layout");
    ply.fails(1, args!["save", "--format", "oci-dir", "-o", layout, image.tag()]);
    assert_eq!(partials(&layout), Vec::<PathBuf>::new());
    assert!(!layout.join("index.json").exists());
    fs::write(&blob, sound).unwrap();
    ply.ok(args!["save", "-o", out, image.tag()]);
    assert_eq!(fs::read(dir.join("a.tar.partial")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn a_full_disk_leaves_no_partial_blob_in_a_layout() {
    let noise: Vec<u8> = (0..4_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let image = Image::new("localhost/big:1").layer(&[Member::file("noise", noise)], Packing::Plain);
    let Some(ply) = loaded(&image) else { return };
    let dir = ply.scratch().dir("small-disk");
    tools::run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&dir));
    let oci = ply.run(args!["save", "--format", "oci-dir", "-o", dir.join("layout"), image.tag()]);
    let tar = ply.run(args!["save", "-o", dir.join("a.tar"), image.tag()]);
    let left = (partials(&dir), dir.join("a.tar").exists());
    tools::run(Command::new("umount").arg(&dir));
    assert!(oci.status.code() == Some(1) && tar.status.code() == Some(1), "{oci} {tar}");
    assert_eq!(left, (vec![], false));
}

#[test]
fn saving_a_name_again_into_a_layout_replaces_its_image_only() {
    let Some(ply) = loaded(&small("localhost/app:1", "one")) else { return };
    load(&ply, &small("localhost/other:1", "other"));
    let layout = ply.scratch().join("layout");
    let save = |image: &str| ply.ok(args!["save", "--format", "oci-dir", "-o", layout, image]);
    save("localhost/app:1");
    save("localhost/other:1");
    // As another tool would have written it: one annotation only.
    let path = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    index["manifests"][0]["annotations"].as_object_mut().unwrap().remove("org.opencontainers.image.ref.name");
    fs::write(&path, serde_json::to_vec(&index).unwrap()).unwrap();
    let newer = small("localhost/app:1", "two");
    load(&ply, &newer);
    save("localhost/app:1");
    assert_eq!(names(&layout), ["localhost/other:1", "localhost/app:1"]);
    // Nameless images do not take each other's place.
    let ids: Vec<String> = ["a", "b"]
        .map(|content| {
            let image = small("localhost/nameless:1", content);
            load(&ply, &image);
            image.id()
        })
        .to_vec();
    let nameless = ply.scratch().join("nameless");
    for id in &ids {
        ply.ok(args!["save", "--format", "oci-dir", "-o", nameless, id]);
    }
    assert_eq!(names(&nameless), ["-", "-"]);
}

#[test]
fn a_cut_off_blob_of_a_layout_is_written_again() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    let layout = ply.scratch().join("layout");
    let blob = layout.join("blobs/sha256").join(image.layer_digest(0));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, "cut").unwrap();
    ply.ok(args!["save", "--format", "oci-dir", "-o", layout, image.tag()]);
    assert!(blobs_of(&layout) == image.blobs());
}

#[test]
fn an_image_named_twice_is_saved_once() {
    let image = small("localhost/small:1", "x");
    let Some(ply) = loaded(&image) else { return };
    let layout = ply.scratch().join("layout");
    ply.ok(args!["save", "--format", "oci-dir", "-o", layout, image.tag(), image.tag(), image.id()]);
    assert_eq!(names(&layout), ["localhost/small:1"]);
}

#[test]
fn a_docker_archive_of_one_image_under_two_manifests_has_each_file_once() {
    let members = [Member::file("f", "the same")];
    let Some(ply) = loaded(&Image::new("localhost/gz:1").layer(&members, Packing::Gzip)) else { return };
    load(&ply, &Image::new("localhost/zst:1").layer(&members, Packing::Zstd));
    let out = ply.scratch().join("out.tar");
    ply.ok(args!["save", "--format", "docker", "-o", out, "localhost/gz:1", "localhost/zst:1"]);
    let listed = tools::run(Command::new("tar").arg("-tf").arg(&out));
    let mut files: Vec<&str> = listed.lines().collect();
    files.sort_unstable();
    let count = files.len();
    files.dedup();
    assert_eq!(files.len(), count, "{listed}");
    let dir = untar(&out, &ply.scratch().join("out"));
    let list: Value = serde_json::from_slice(&fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(list[0]["RepoTags"], serde_json::json!(["localhost/gz:1", "localhost/zst:1"]));
}

#[test]
fn j16_a_blob_that_was_changed_on_disk_is_not_saved_and_told_with_what_to_do() {
    for packing in [Packing::Gzip, Packing::Plain] {
        let image = Image::new("localhost/small:1").layer(&[Member::file("f", vec![b'f'; 5000])], packing);
        // Where layers are kept as tars, docker's archives are made of those.
        let Some(ply) = store().map(|ply| ply.with_driver("overlay")) else { return };
        load(&ply, &image);
        let id = image.id();
        let config = id.strip_prefix("sha256:").unwrap();
        let (layer, manifest) = (image.layer_digest(0), image.manifest_digest());
        for hex in [&*layer, config, &*manifest] {
            let blob = ply.root().join("content/blobs/sha256").join(hex);
            let sound = fs::read(&blob).unwrap();
            let mut flipped = sound.clone();
            flipped[sound.len() / 2] ^= 0x20;
            let other = if hex == layer { config } else { &layer };
            let swapped = fs::read(ply.root().join("content/blobs/sha256").join(other)).unwrap();
            let damages: [(&[u8], &[&str]); 3] = [
                (&flipped, &["oci", "oci-dir", "docker"]),
                (&sound[..sound.len() - 1], &["oci"]),
                (&swapped, &["oci"]),
            ];
            for (damaged, formats) in damages {
                fs::write(&blob, damaged).unwrap();
                for format in formats {
                    let out = ply.scratch().join("out");
                    let ran = ply.fails(1, args!["save", "--format", format, "-o", out, image.tag()]);
                    for text in [hex, "ply rmi", "load"] {
                        assert!(ran.stderr.contains(text), "{packing:?} {format}: does not say {text}: {ran}");
                    }
                    if *format == "oci-dir" && out.exists() {
                        assert!(!out.join("index.json").exists(), "{packing:?}: an index without its blobs");
                        assert!(!out.join("blobs/sha256").join(hex).exists(), "{packing:?}: the blob went out");
                        assert_eq!(partials(&out), Vec::<PathBuf>::new());
                        fs::remove_dir_all(&out).unwrap();
                    }
                    assert!(!out.exists(), "{packing:?} {format}");
                    assert_eq!(partials(ply.scratch().path()), Vec::<PathBuf>::new(), "{packing:?} {format}");
                }
            }
            // What it says to do helps.
            ply.ok(args!["rmi", image.tag()]);
            load(&ply, &image);
            ply.ok(args!["save", "-o", ply.scratch().join("whole.tar"), image.tag()]);
            assert!(fs::read(&blob).unwrap() == sound);
        }
    }
}

#[test]
fn j16_a_layer_kept_as_its_tar_goes_out_as_that_and_never_changed() {
    let image = Image::new("localhost/small:1").layer(&[Member::file("f", vec![b'f'; 5000])], Packing::Gzip);
    let Some(ply) = loaded(&image) else { return };
    if ply.json(args!["info"])["driver"] != "erofs" {
        return;
    }
    let out = ply.scratch().join("out");
    let save =
        [OsString::from("save"), "--format".into(), "docker".into(), "-o".into(), (&out).into(), image.tag().into()];
    // The blob is not needed for it.
    let blob = ply.root().join("content/blobs/sha256").join(image.layer_digest(0));
    let sound = fs::read(&blob).unwrap();
    fs::write(&blob, "nothing of the kind").unwrap();
    ply.ok(&save);
    fs::write(&blob, sound).unwrap();
    let there = store().unwrap();
    there.ok(args!["load", "-i", out]);
    assert_eq!(there.json(args!["inspect", image.tag()])["id"], image.id());
    fs::remove_file(&out).unwrap();

    let layers: Vec<_> = fs::read_dir(ply.root().join("layers")).unwrap().map(|layer| layer.unwrap().path()).collect();
    let [layer] = layers.as_slice() else { panic!("{layers:?}") };
    let tar = layer.join("layer.tar");
    let mut bytes = fs::read(&tar).unwrap();
    bytes[600] ^= 1;
    fs::set_permissions(&tar, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&tar, bytes).unwrap();
    let ran = ply.fails(1, &save);
    assert!(ran.stderr.contains("was changed on disk"), "{ran}");
    assert!(!out.exists());
    assert_eq!(partials(ply.scratch().path()), Vec::<PathBuf>::new());
}
