//! Why a step was not found in the cache: what it took in, written down with its record, beside what an earlier one did.

use std::collections::{BTreeMap, BTreeSet};

use plies_cache::{Accessor, CacheError, CacheKey, KeyBuilder, RecordId};

/// The key of the value that holds a step's inputs.
const INPUTS: &str = "build.inputs";

/// Earlier records of a step that are looked at.
const RECORDS_MAX: usize = 64;

/// Changed inputs that are named.
const NAMED_MAX: usize = 8;

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

/// What the records of one place in a stage are found by: `[build 2/5] RUN make` is step 2 of `build` also if steps are
/// added below it.
fn index(step: &str) -> Option<String> {
    let (place, _) = step.strip_prefix('[')?.split_once('/')?;
    Some(format!("build.step:{place}"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
