//! Images out of a worker's content: what BuildKit can build on without a registry, builds here can.
//!
//! BuildKit gives images no names. It keeps the documents of those that it pulled beside the layers that came of them, and
//! says where they are from in two places: a layer's record names the image that it was pulled for, tag and digest
//! (`cache.imageRefs`, in version 2), and a label of each blob names its repositories. What has
//! neither (the manifests of exports that went nowhere) cannot be asked for, and stays.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use plies_oci::{BlobDigest, DocumentLimits, ImageId, MediaType, Reference};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Worker;
use crate::containerd::{Found, NamespaceReading, Reading, Target};
use crate::images::{self, Containers, Name, Read, read_bytes};
use crate::{Import, ImportError, ImportReport, Outcome};

/// As much of a manifest or an index as tells which it is: neither has to say so itself (image-spec).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
}

/// An image's ID and the digest of its manifest, or what becomes of what it was asked for by.
type Added = Result<(ImageId, BlobDigest), (Outcome, String)>;

/// Takes over the images of a worker whose records came over.
pub(super) fn take(import: &Import<'_>, worker: &Worker, report: &mut ImportReport) -> Result<(), ImportError> {
    let fresh = ImportReport { dry_run: report.dry_run, ..ImportReport::default() };
    let mut reading = Reading::new(worker.dir.join("content/blobs/sha256"), import.documents, fresh);
    let mut targets: BTreeMap<BlobDigest, Added> = BTreeMap::new();
    for (reference, digest) in names(worker, import.documents) {
        let target = targets.entry(digest).or_insert_with(|| add(&mut reading, worker, digest));
        match target {
            Ok((image, manifest)) => {
                let (image, manifest) = (*image, Some(*manifest));
                let name = Name { manifest, ..Name::of(reference.clone(), image) };
                reading.source.names.push((reference.familiar(), Ok(name)));
            }
            Err((outcome, why)) => {
                images::tell(report, "name", reference.familiar(), *outcome, None, 0, Some(why.clone()));
            }
        }
    }
    if reading.source.names.is_empty() {
        return Ok(());
    }
    let taken = images::take(import, &reading.source, Containers::List, reading.report)?;
    // Most of their layers are records', and were told as such.
    let is_news = |item: &crate::ImportedItem| item.kind != "layer" || item.outcome == Outcome::Failed;
    report.items.extend(taken.items.into_iter().filter(is_news));
    if !report.dry_run {
        report.layers_count += taken.layers_count;
        report.layer_bytes += taken.layer_bytes;
        report.blobs_count += taken.blobs_count;
        report.blob_bytes += taken.blob_bytes;
    }
    Ok(())
}

/// What the worker's records and blobs say that images are called, and the digests that this stands for.
fn names(worker: &Worker, limits: &DocumentLimits) -> Vec<(Reference, BlobDigest)> {
    let mut tags: BTreeMap<String, (Reference, BlobDigest)> = BTreeMap::new();
    let mut pinned: BTreeSet<(String, BlobDigest)> = BTreeSet::new();
    let mut rows: Vec<_> = worker.rows.values().filter(|row| !row.deleted && !row.image_refs.is_empty()).collect();
    // A tag stood for other images over time: the last one counts.
    rows.sort_by_key(|row| Reverse(row.created_at));
    for text in rows.into_iter().flat_map(|row| &row.image_refs) {
        let Ok(reference) = text.parse::<Reference>() else { continue };
        let Some(digest) = reference.digest() else { continue };
        let repository = format!("{}/{}", reference.registry(), reference.repository());
        if let Some(Ok(tagged)) = reference.tag().map(|tag| format!("{repository}:{tag}").parse::<Reference>()) {
            tags.entry(tagged.to_string()).or_insert((tagged, digest));
        }
        pinned.insert((repository, digest));
    }
    for (digest, blob) in worker.namespace.blobs.iter().filter(|(_, blob)| blob.diff_id.is_none()) {
        pinned.extend(blob.repositories.iter().map(|repository| (repository.clone(), *digest)));
    }
    let pinned = pinned.into_iter().filter(|(_, digest)| {
        // The label is on configs, too, and on what was attached to an image.
        let is_asked_for = tags.values().any(|(_, asked)| asked == digest);
        is_asked_for || document(worker, *digest, limits).is_ok_and(|found| found.is_some())
    });
    let pinned: Vec<_> = pinned
        .filter_map(|(repository, digest)| Some((format!("{repository}@{digest}").parse().ok()?, digest)))
        .collect();
    tags.into_values().chain(pinned).collect()
}

/// The media type of a manifest or an index; `None` if the blob is neither, or not there.
fn document(worker: &Worker, digest: BlobDigest, limits: &DocumentLimits) -> Read<Option<MediaType>> {
    let path = worker.blob_path(digest);
    if !path.is_file() {
        return Ok(None);
    }
    let raw = read_bytes(&path, limits.manifest_bytes)?;
    let Ok(document) = serde_json::from_slice::<Document>(&raw) else { return Ok(None) };
    Ok(match document {
        Document { manifests: None, layers: None, .. } => None,
        Document { media_type: Some(own), .. } => Some(MediaType::from(own.as_str())),
        Document { manifests: Some(_), .. } => Some(MediaType::ImageIndex),
        Document { .. } => Some(MediaType::ImageManifest),
    })
}

/// Adds the image that a digest stands for on this machine, if all of it is there.
fn add(reading: &mut Reading<'_>, worker: &Worker, digest: BlobDigest) -> Added {
    let failed = |why: String| (Outcome::Failed, why);
    let left = |why: &str| (Outcome::Left, why.to_owned());
    let media_type = document(worker, digest, reading.limits).map_err(failed)?;
    let media_type = media_type.ok_or_else(|| left("BuildKit does not keep its manifest"))?;
    let mut namespace = NamespaceReading::new(super::NAMESPACE, &worker.namespace);
    let target = Target { digest, media_type: media_type.to_string() };
    let manifest = match reading.resolve(&target, &mut namespace, 0).map_err(failed)? {
        Found::Image(manifest) => manifest,
        Found::Left(why) => return Err((Outcome::Left, why)),
    };
    let needed = manifest.layers().iter().chain([manifest.config()]);
    if needed.into_iter().any(|needed| !worker.blob_path(needed.digest).is_file()) {
        return Err(left("BuildKit never fetched all of it"));
    }
    reading.add_image(*manifest, &mut namespace).map_err(failed)
}
