//! The image store: images by their config, parents, names.

#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use common::{Open, Rig, diff_id, tar};
use plies_image::{
    Found, ImageError, LayerRef, ManifestRow, NewImage, Removed, Taken, add_name, children, create, find, get, list,
    names_of, prune_dangling, put, remove, set_name, set_parent,
};
use plies_oci::{BlobDigest, DiffId, ErrorKind, ImageConfig, ImageId, Reference};
use plies_store::{CatalogueError, Expected, Table};
use serde_json::json;

fn raw(layers: &[DiffId], note: &str) -> Vec<u8> {
    let history: Vec<_> = layers.iter().map(|_| json!({"created_by": note})).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "2020-01-02T03:04:05Z", "author": note,
        "rootfs": {"type": "layers", "diff_ids": layers}, "history": history,
    });
    config.to_string().into_bytes()
}

/// An image without layers.
fn bare(open: &Open, note: &str) -> ImageId {
    create(open.store(), &raw(&[], note), false, &open.lease).unwrap()
}

fn name(text: &str) -> Reference {
    text.parse().unwrap()
}

fn tag(open: &Open, text: &str, image: ImageId) {
    open.store().write(|tx| set_name(tx, &name(text), image, None)).unwrap();
}

fn found(open: &Open, wanted: &str) -> Result<Found, ImageError> {
    open.store().read(|rows| find(rows, wanted))
}

fn rm(open: &Open, wanted: &str) -> Result<Vec<Removed>, ImageError> {
    open.store().write(|tx| remove(tx, wanted))
}

#[test]
fn an_image_is_the_digest_of_its_raw_config_and_holds_its_layers() {
    if !plies_testkit::tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let top = open.chain(&[tar(1), tar(2)]);
    let raw = raw(&[diff_id(&tar(1)), diff_id(&tar(2))], "made");
    let id = create(open.store(), &raw, true, &open.lease).unwrap();
    assert_eq!(id.as_bytes(), BlobDigest::of(&raw).as_bytes());
    assert_eq!(create(open.store(), &raw, false, &open.lease).unwrap(), id, "again is the same");
    let row = open.store().read(|rows| get(rows, &id)).unwrap().unwrap();
    assert_eq!((row.chain, row.built_here, row.config_bytes), (Some(top.chain_id()), true, raw.len() as u64));
    let listed = row.listed.unwrap();
    assert_eq!((listed.created.as_deref(), listed.layers_count), (Some("2020-01-02T03:04:05Z"), 2));
    assert_eq!(listed.platform, "linux/amd64");
    let users = open.layers.users(top.chain_id()).unwrap();
    assert_eq!(users.holders, [(format!("image:{id}"), 1)]);
    assert!(open.layers.release(top).unwrap().is_empty());
    open.collect();
    assert_eq!(open.store().content().read(BlobDigest::of(&raw)).unwrap(), raw);
    assert_eq!(rm(&open, &id.to_string()).unwrap(), [Removed::Image(id)]);
    open.collect();
    assert_eq!((open.counts(), open.layers.list().unwrap().len()), ((0, 0), 0));
}

#[test]
fn j11_a_config_that_names_other_layers_than_there_are_creates_nothing() {
    if !plies_testkit::tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let one = open.register(&tar(1), None).unwrap();
    let there = diff_id(&tar(1));
    let history = |entries: usize, diff_ids: &[DiffId]| {
        let history: Vec<_> = (0..entries).map(|n| json!({"created_by": n.to_string()})).collect();
        let config = json!({"architecture": "amd64", "os": "linux", "history": history,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        config.to_string().into_bytes()
    };
    let many: Vec<DiffId> = (0..200).map(|_| there).collect();
    for (what, raw, kind) in [
        ("200 layers for 3 entries", history(3, &many), ErrorKind::InvalidInput),
        ("3 entries for 1 layer", history(3, &[there]), ErrorKind::InvalidInput),
        ("a layer that is not here", history(1, &[diff_id(&tar(9))]), ErrorKind::InvalidInput),
        ("in another order", history(2, &[diff_id(&tar(2)), there]), ErrorKind::InvalidInput),
        ("no config", b"{}".to_vec(), ErrorKind::InvalidInput),
        // How many there may be is asked where a config comes in: what is stored stays readable when a limit is lowered.
        ("more layers than there are", history(0, &vec![there; 1001]), ErrorKind::InvalidInput),
        ("a key twice", b"{\"os\":\"linux\",\"os\":\"x\"}".to_vec(), ErrorKind::InvalidInput),
        ("long and empty", vec![b' '; (8 << 20) + 1], ErrorKind::InvalidInput),
    ] {
        let error = create(open.store(), &raw, true, &open.lease).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(!error.to_string().is_empty());
    }
    let error = create(open.store(), &history(3, &many), true, &open.lease).unwrap_err();
    assert!(error.to_string().contains("names 200 layers, but comes with 1"), "{error}");
    open.collect();
    assert_eq!((open.counts(), open.store().read(list).unwrap().len()), ((1, 0), 0));
    assert_eq!(open.layers.users(one.chain_id()).unwrap().holders.len(), 0);
}

#[test]
fn j10_layers_that_are_not_those_of_the_config_are_refused() {
    if !plies_testkit::tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let refs: Vec<LayerRef> = [1, 2].map(|n| open.register(&tar(n), None).unwrap()).into();
    let layers: Vec<_> = refs
        .iter()
        .map(|layer| plies_image::ChainLayer {
            diff_id: layer.info().diff_id,
            layer: layer.info().layer,
            content_bytes: 9,
        })
        .collect();
    let raw = raw(&[layers[0].diff_id, layers[1].diff_id], "x");
    let mut ingest = open.store().content().ingest_unnamed().unwrap();
    std::io::Write::write_all(&mut ingest, &raw).unwrap();
    ingest.commit(Expected::anything(), &open.lease).unwrap();
    let config = ImageConfig::parse(&raw).unwrap();
    let swapped = [layers[1], layers[0]];
    for wrong in [&layers[..1], &swapped[..], &[]] {
        let new = NewImage {
            config: &config,
            manifests: vec![],
            snapshot: None,
            layers: Some(wrong),
            size_bytes: 0,
            built_here: false,
        };
        let error = open.store().write(|tx| put(tx, &new)).unwrap_err();
        assert!(matches!(error, ImageError::Layers { .. }), "{error}");
    }
    assert!(open.store().read(list).unwrap().is_empty());
}

#[test]
fn images_are_found_by_name_by_id_and_by_the_beginning_of_an_id() {
    let open = Rig::new().open();
    let ids: Vec<ImageId> = (0..40).map(|n| bare(&open, &n.to_string())).collect();
    tag(&open, "busybox", ids[0]);
    for wanted in ["busybox", "busybox:latest", "docker.io/library/busybox", "index.docker.io/busybox"] {
        assert_eq!(found(&open, wanted).unwrap().id, ids[0], "{wanted}");
    }
    for id in &ids {
        let hex = id.hex();
        for wanted in [hex.as_str(), &hex[..12], &id.to_string(), &format!("sha256:{}", &hex[..20])] {
            assert_eq!(found(&open, wanted).unwrap().id, *id, "{wanted}");
        }
        // Of 40 ids some begin with the same two digits: then both fit, else one does.
        let same = ids.iter().filter(|other| other.hex()[..2] == hex[..2]).count();
        match found(&open, &hex[..2]) {
            Ok(only) => assert_eq!((same, only.id), (1, *id)),
            Err(ImageError::Ambiguous { count, .. }) => assert_eq!(count, same),
            Err(other) => panic!("{other}"),
        }
    }
    for wanted in ["", "0", "sha256:", "nothing", "UPPER", "../x"] {
        assert_eq!(found(&open, wanted).unwrap_err().kind(), ErrorKind::NotFound, "{wanted:?}");
    }
}

#[test]
fn j14_a_name_that_is_taken_moves_only_where_that_is_asked_for_and_a_digest_never() {
    let open = Rig::new().open();
    let (one, two) = (bare(&open, "1"), bare(&open, "2"));
    let add = |text: &str, image, taken| open.store().write(|tx| add_name(tx, &name(text), image, None, taken));
    add("a:1", one, Taken::Refuse).unwrap();
    add("a:1", one, Taken::Refuse).unwrap();
    let error = add("a:1", two, Taken::Refuse).unwrap_err();
    assert!(matches!(&error, ImageError::NameTaken { name, image } if name == "a:1" && *image == one), "{error}");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(found(&open, "a:1").unwrap().id, one, "nothing was changed");
    add("a:1", two, Taken::Move).unwrap();
    assert_eq!(found(&open, "a:1").unwrap().id, two);
    let pinned = format!("a@sha256:{}", "0a".repeat(32));
    add(&pinned, one, Taken::Refuse).unwrap();
    assert_eq!(add(&pinned, two, Taken::Move).unwrap_err().kind(), ErrorKind::AlreadyExists);
    let nobody = ImageId::from_bytes([7; 32]);
    assert_eq!(add("b", nobody, Taken::Move).unwrap_err().kind(), ErrorKind::NotFound);
    assert!("sha256:x".parse::<Reference>().is_err() && "a:b@sha1:00".parse::<Reference>().is_err());
}

#[test]
fn an_image_is_found_by_the_digest_of_the_manifest_that_its_name_came_with() {
    let open = Rig::new().open();
    let image = bare(&open, "1");
    let mut ingest = open.store().content().ingest_unnamed().unwrap();
    std::io::Write::write_all(&mut ingest, b"manifest").unwrap();
    let digest = ingest.commit(Expected::anything(), &open.lease).unwrap();
    let row = ManifestRow { digest, size_bytes: 8, media_type: "m".into() };
    open.store().write(|tx| plies_image::add_manifest(tx, image, &row)).unwrap();
    open.store().write(|tx| set_name(tx, &name("a:1"), image, Some(digest))).unwrap();
    for wanted in [format!("a@{digest}"), format!("a:1@{digest}")] {
        assert_eq!(found(&open, &wanted).unwrap().manifest, Some(digest), "{wanted}");
    }
    for wanted in [format!("b@{digest}"), format!("a:2@{digest}"), format!("a@sha256:{}", "0a".repeat(32))] {
        assert_eq!(found(&open, &wanted).unwrap_err().kind(), ErrorKind::NotFound, "{wanted}");
    }
    // Naming it again without saying how it was loaded forgets nothing.
    tag(&open, "a:1", image);
    assert_eq!(found(&open, "a:1").unwrap().manifest, Some(digest));
}

#[test]
fn parents_know_their_children_and_never_go_in_circles() {
    let open = Rig::new().open();
    let ids: Vec<ImageId> = (0..3).map(|n| bare(&open, &n.to_string())).collect();
    let link = |child: usize, parent: Option<usize>| {
        open.store().write(|tx| set_parent(tx, ids[child], parent.map(|parent| ids[parent])))
    };
    link(1, Some(0)).unwrap();
    link(2, Some(1)).unwrap();
    let of = |n: usize| open.store().read(|rows| children(rows, &ids[n])).unwrap();
    assert_eq!((of(0), of(1), of(2)), (vec![ids[1]], vec![ids[2]], vec![]));
    for parent in [0, 1, 2] {
        let error = link(0, Some(parent)).unwrap_err();
        assert!(matches!(error, ImageError::Circle { .. }), "{error}");
    }
    link(2, Some(0)).unwrap();
    assert_eq!((of(0).len(), of(1).len()), (2, 0), "another parent is no second one");
    link(2, None).unwrap();
    assert_eq!(of(0), [ids[1]]);
    let nobody = ImageId::from_bytes([7; 32]);
    let result = open.store().write(|tx| set_parent(tx, ids[0], Some(nobody)));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn an_image_that_others_were_built_on_is_not_deleted_and_the_error_names_them() {
    let open = Rig::new().open();
    let (parent, child) = (bare(&open, "parent"), bare(&open, "child"));
    open.store().write(|tx| set_parent(tx, child, Some(parent))).unwrap();
    let error = rm(&open, &parent.to_string()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains(&child.hex()[..12]), "{error}");
    // By its name it only loses that, as in Docker.
    tag(&open, "parent", parent);
    assert_eq!(rm(&open, "parent").unwrap(), [Removed::Name("docker.io/library/parent:latest".to_owned())]);
    assert!(found(&open, &parent.to_string()).is_ok());
    rm(&open, &child.to_string()).unwrap();
    assert_eq!(rm(&open, &parent.to_string()).unwrap(), [Removed::Image(parent)]);
}

#[test]
fn an_image_goes_with_its_last_name_and_by_its_id_only_with_one() {
    let open = Rig::new().open();
    let image = bare(&open, "1");
    tag(&open, "a", image);
    tag(&open, "b", image);
    assert_eq!(open.store().read(|rows| names_of(rows, &image)).unwrap().len(), 2);
    assert!(matches!(rm(&open, &image.to_string()), Err(ImageError::ManyNames { .. })));
    assert_eq!(rm(&open, "a").unwrap().len(), 1);
    assert_eq!(rm(&open, "a").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(rm(&open, &image.to_string()).unwrap().len(), 2);
}

#[test]
fn pruning_takes_images_without_names_and_children_and_then_their_parents() {
    let open = Rig::new().open();
    let ids: Vec<ImageId> = (0..5).map(|n| bare(&open, &n.to_string())).collect();
    // 0 <- 1 <- 2, and 3 <- 4 which has a name.
    for (child, parent) in [(1, 0), (2, 1), (4, 3)] {
        open.store().write(|tx| set_parent(tx, ids[child], Some(ids[parent]))).unwrap();
    }
    tag(&open, "kept", ids[4]);
    let removed = open.store().write(prune_dangling).unwrap();
    assert_eq!(removed, [2, 1, 0].map(|n| Removed::Image(ids[n])));
    let left: Vec<ImageId> = open.store().read(list).unwrap().into_iter().map(|image| image.id).collect();
    assert!(left.len() == 2 && left.contains(&ids[3]) && left.contains(&ids[4]));
    assert!(open.store().write(prune_dangling).unwrap().is_empty());
}

#[test]
fn a_list_of_many_images_and_names_is_whole() {
    let open = Rig::new().open();
    let ids: Vec<ImageId> = (0..300).map(|n| bare(&open, &n.to_string())).collect();
    open.store()
        .write(|tx| {
            for (n, id) in ids.iter().enumerate() {
                for tag in 0..n % 3 {
                    set_name(tx, &name(&format!("image-{n}:{tag}")), *id, None)?;
                }
            }
            Ok::<_, ImageError>(())
        })
        .unwrap();
    let listed = open.store().read(list).unwrap();
    assert_eq!(listed.len(), 300);
    for image in listed {
        let n = ids.iter().position(|id| *id == image.id).unwrap();
        let expected: Vec<String> = (0..n % 3).map(|tag| format!("docker.io/library/image-{n}:{tag}")).collect();
        assert_eq!(image.names, expected);
    }
}

#[test]
fn a_row_of_a_later_version_is_refused_not_guessed() {
    const IMAGES: Table<ImageId, Later> = Table::new("image.images");
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Later(u8);
    impl plies_store::Row for Later {
        const VERSION: u8 = 200;
    }
    let open = Rig::new().open();
    open.store().write(|tx| tx.put(&IMAGES, &ImageId::from_bytes([1; 32]), &Later(1)).map(drop)).unwrap();
    let error = open.store().read(list).unwrap_err();
    assert!(matches!(error, CatalogueError::RowTooNew { found: 200, .. }), "{error}");
}
