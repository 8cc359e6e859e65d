//! Why a step was not found in the cache: what it took in, written down with its record, beside what an earlier one did.

use std::collections::{BTreeMap, BTreeSet};

use plies_cache::{Accessor, CacheError, CacheKey, KeyBuilder, RecordId};
use plies_oci::Sha256Hasher;

use crate::context::ListedFile;

/// The key of the value that holds a step's inputs.
const INPUTS: &str = "build.inputs";

/// Earlier records of a step that are looked at.
const RECORDS_MAX: usize = 64;

/// Changed inputs that are named.
const NAMED_MAX: usize = 8;

/// Files that are kept by name for one selection: some ten KiB of names and digests.
const FILES_MAX: usize = 512;

/// Hexadecimal digits that are kept of an input's digest: enough to see that it changed.
const DIGITS: usize = 16;

/// What a step takes in: name for people, and digest.
#[derive(Debug, Default)]
pub(super) struct Inputs(BTreeMap<String, String>);

impl Inputs {
    /// With what every step has.
    pub(super) fn on(base: &CacheKey) -> Self {
        Self::default().digest("the tree that it stands on", base)
    }

    /// Adds an input by its value.
    pub(super) fn value(self, name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        let key = KeyBuilder::new("input", 1).bytes(value.as_ref()).finish();
        self.digest(name, &key)
    }

    /// Adds an input that has a digest already.
    pub(super) fn digest(mut self, name: impl Into<String>, digest: &CacheKey) -> Self {
        self.0.insert(name.into(), digest.to_string()[..DIGITS].to_owned());
        self
    }

    /// Adds the files of a selection, `named` by those who chose it, out of the context or another tree: each as an input
    /// of its own, or if they are too many, the directories that hold them.
    pub(super) fn files(mut self, from: &str, named: &str, content: &[u8], files: &[ListedFile]) -> Self {
        if files.is_empty() {
            return self.value(format!("{named} of {from}"), content);
        }
        for (path, digest) in folded(files, FILES_MAX) {
            let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            self.0.insert(format!("{path} of {from}"), digits);
        }
        self
    }

    /// Writes them down with the record that they gave.
    pub(super) fn keep(&self, cache: &Accessor, id: RecordId, step: &str) -> Result<(), CacheError> {
        let Some(index) = index(step) else { return Ok(()) };
        let text = serde_json::to_string(&self.0).expect("because text is always JSON");
        cache.set_value_lazily(id, INPUTS, &text, &index)
    }

    /// What differs from the nearest earlier record of the same place in a stage: the one with the fewest differences,
    /// of several the newest. `None` if there is no earlier one.
    pub(super) fn changed(&self, cache: &Accessor, step: &str) -> Result<Option<String>, CacheError> {
        let Some(index) = index(step) else { return Ok(None) };
        let mut nearest = None;
        for id in cache.search(&index)?.into_iter().take(RECORDS_MAX) {
            let Some(text) = cache.value(id, INPUTS)? else { continue };
            let Ok(before) = serde_json::from_str(&text) else { continue };
            let Ok(row) = cache.row(id) else { continue };
            let changed = self.differences(&before);
            let rank = (changed.len(), std::cmp::Reverse(row.created_at));
            if nearest.as_ref().is_none_or(|(best, _, _)| rank < *best) {
                nearest = Some((rank, id, changed));
            }
        }
        Ok(nearest.map(|(_, id, changed)| match changed.as_slice() {
            [] => format!("record {id} took in the same, but its result is gone or stands on another tree"),
            changed => {
                let more = changed.len().saturating_sub(NAMED_MAX);
                let more = if more == 0 { String::new() } else { format!(" and {more} more") };
                let named = &changed[..changed.len().min(NAMED_MAX)];
                format!("since record {id} this changed: {}{more}", named.join(", "))
            }
        }))
    }

    fn differences(&self, before: &BTreeMap<String, String>) -> Vec<String> {
        let names: BTreeSet<&String> = self.0.keys().chain(before.keys()).collect();
        let told = |name: &String| match (before.get(name), self.0.get(name)) {
            (None, Some(_)) => Some(format!("{name} (new)")),
            (Some(_), None) => Some(format!("{name} (gone)")),
            (before, now) => (before != now).then(|| name.clone()),
        };
        names.into_iter().filter_map(told).collect()
    }
}

/// At most about so many names for files: their own, or with a slash at the end those of the directories above them, as
/// deep as can be.
fn folded(files: &[ListedFile], names_max: usize) -> BTreeMap<String, [u8; 8]> {
    let parts = |file: &ListedFile| -> Vec<String> {
        let parts = file.path.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
        parts.map(|part| part.escape_ascii().to_string()).collect()
    };
    let deepest = files.iter().map(|file| parts(file).len()).max().unwrap_or(0);
    let mut depth = deepest;
    loop {
        let mut sums: BTreeMap<String, (usize, Sha256Hasher, [u8; 8])> = BTreeMap::new();
        for file in files {
            let parts = parts(file);
            let cut = parts.len() > depth;
            let name = parts[..parts.len().min(depth)].join("/") + if cut { "/" } else { "" };
            let (count, sum, _) = sums.entry(name).or_insert_with(|| (0, Sha256Hasher::default(), file.digest));
            *count += 1;
            sum.update(&file.path);
            sum.update(&file.digest);
        }
        if sums.len() <= names_max || depth <= 1 {
            let digest = |(count, sum, alone): (usize, Sha256Hasher, [u8; 8])| match count {
                1 => alone,
                _ => *sum.finish().first_chunk().expect("because a digest has 32 bytes"),
            };
            return sums.into_iter().map(|(name, sums)| (name, digest(sums))).collect();
        }
        depth -= 1;
    }
}

/// What the records of one place in a stage are found by: `[build 2/5] RUN make` is step 2 of `build` also if steps are
/// added below it.
fn index(step: &str) -> Option<String> {
    let (place, _) = step.strip_prefix('[')?.split_once('/')?;
    Some(format!("build.step:{place}"))
}

#[cfg(test)]
mod tests {
    use plies_oci::BlobDigest;

    use super::*;

    #[test]
    fn many_files_are_folded_into_their_directories() {
        let file = |path: &str| ListedFile {
            path: path.into(),
            digest: BlobDigest::of(path.as_bytes()).as_bytes()[..8].try_into().unwrap(),
        };
        let mut files: Vec<_> = ["a/b/c", "a/b/d", "a/e", "f", "g/h/i"].map(file).into();
        let names = |files: &[ListedFile], max| folded(files, max).into_keys().collect::<Vec<_>>();
        assert_eq!(names(&files, 5), ["a/b/c", "a/b/d", "a/e", "f", "g/h/i"]);
        assert_eq!(names(&files, 4), ["a/b/", "a/e", "f", "g/h/"]);
        assert_eq!(names(&files, 3), ["a/", "f", "g/"]);
        let before = folded(&files, 4);
        files[1].digest = [0; 8];
        let now = folded(&files, 4);
        let changed: Vec<_> =
            now.iter().filter(|(name, digest)| before[*name] != **digest).map(|(name, _)| name.as_str()).collect();
        assert_eq!(changed, ["a/b/"]);
    }

    #[test]
    fn differences_are_named() {
        let base = KeyBuilder::new("x", 1).finish();
        let before = Inputs::on(&base).value("a", "1").value("b", "2").value("c", "3").0;
        let now = Inputs::on(&base).value("a", "1").value("b", "x").value("d", "4");
        assert_eq!(now.differences(&before), ["b", "c (gone)", "d (new)"]);
        assert_eq!(index("[build 2/5] RUN make [a/b]").as_deref(), Some("build.step:build 2"));
        assert_eq!(index("download x"), None);
    }
}
