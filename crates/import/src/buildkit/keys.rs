//! What BuildKit's solver remembers: which of its keys gave which record, and which steps lead from key to key.
//!
//! ```text
//! cache.db   _result/<key>/<worker>::<record>     _links/<key>/{"Digest": …, "Input": …, "Selector": …}@<key>
//! ```
//!
//! A key is either made of a digest (`sha256:…`: what a source or the content of files comes to), the same everywhere, or a
//! random name for where links lead. `random:…` are sources of one session: nobody asks for them again.

use std::collections::{HashMap, HashSet};

use plies_bolt::{Bolt, BoltError, Item};
use plies_cache::{CacheKey, KeyBuilder, Link};
use plies_oci::BlobDigest;
use serde::Deserialize;

/// How this store's solver calls a key of BuildKit's.
pub fn key(name: &str) -> CacheKey {
    KeyBuilder::new("buildkit key", 1).bytes(name.as_bytes()).finish()
}

/// A link as BuildKit writes it down.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LinkJson {
    #[serde(default)]
    input: i64,
    #[serde(default)]
    output: i64,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    selector: String,
}

/// What can be read of `cache.db`.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    /// A key, the worker whose record it gave, and that.
    pub(crate) results: Vec<(String, String, String)>,
    pub(crate) links: Vec<(String, Link, String)>,
}

impl Keys {
    /// Reads what can be read. What went wrong comes beside it.
    pub(crate) fn read(bolt: &Bolt) -> (Self, Option<BoltError>) {
        let mut keys = Self::default();
        let failed = keys.results(bolt).and_then(|()| keys.links(bolt)).err();
        (keys, failed)
    }

    fn results(&mut self, bolt: &Bolt) -> Result<(), BoltError> {
        each_of(bolt, b"_result", |key, result| {
            if let Some((worker, record)) = result.split_once("::") {
                self.results.push((key.to_owned(), worker.to_owned(), record.to_owned()));
            }
        })
    }

    fn links(&mut self, bolt: &Bolt) -> Result<(), BoltError> {
        each_of(bolt, b"_links", |from, link| {
            let Some((json, to)) = link.rsplit_once('@') else { return };
            let Ok(LinkJson { input, output, digest, selector }) = serde_json::from_str(json) else { return };
            // A digest that is none was never asked for by one that is.
            let parts = (digest.parse::<BlobDigest>(), u32::try_from(input), u32::try_from(output));
            if let (Ok(digest), Ok(input), Ok(output)) = parts {
                self.links.push((from.to_owned(), Link { digest, input, output, selector }, to.to_owned()));
            }
        })
    }

    /// Drops what leads to none of the records that `has` knows, by worker and record.
    pub(crate) fn retain(&mut self, has: impl Fn(&str, &str) -> bool) {
        self.results.retain(|(key, worker, record)| !is_random(key) && has(worker, record));
        self.links.retain(|(from, _, _)| !is_random(from));
        let mut before: HashMap<&str, Vec<&str>> = HashMap::new();
        for (from, _, to) in &self.links {
            before.entry(to).or_default().push(from);
        }
        let mut alive: HashSet<String> = self.results.iter().map(|(key, ..)| key.clone()).collect();
        let mut pending: Vec<String> = alive.iter().cloned().collect();
        while let Some(key) = pending.pop() {
            for from in before.get(key.as_str()).into_iter().flatten() {
                if alive.insert((*from).to_owned()) {
                    pending.push((*from).to_owned());
                }
            }
        }
        self.links.retain(|(_, _, to)| alive.contains(to));
    }
}

fn is_random(key: &str) -> bool {
    key.starts_with("random:")
}

/// Calls `visit` with all keys of the buckets in a bucket.
fn each_of(bolt: &Bolt, name: &[u8], mut visit: impl FnMut(&str, &str)) -> Result<(), BoltError> {
    let Some(all) = bolt.root().bucket(&[name])? else { return Ok(()) };
    all.each(|outer, item| {
        let (Item::Bucket(inner), Ok(outer)) = (item, std::str::from_utf8(outer)) else { return Ok(()) };
        inner.each(|key, _| {
            if let Ok(key) = std::str::from_utf8(key) {
                visit(outer, key);
            }
            Ok::<_, BoltError>(())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(digest: &[u8]) -> Link {
        Link { digest: BlobDigest::of(digest), input: 0, output: 0, selector: String::new() }
    }

    #[test]
    fn what_leads_to_nothing_that_came_over_stays_behind() {
        let name = |name: &str| name.to_owned();
        let mut keys = Keys {
            results: vec![
                (name("b"), name("w"), name("here")),
                (name("d"), name("w"), name("gone")),
                (name("random:x"), name("w"), name("here")),
                (name("e"), name("other"), name("here")),
            ],
            links: vec![
                (name("sha256:1"), link(b"1"), name("a")),
                (name("a"), link(b"2"), name("b")),
                (name("b"), link(b"3"), name("d")),
                (name("random:x"), link(b"4"), name("b")),
            ],
        };
        keys.retain(|worker, record| worker == "w" && record == "here");
        assert_eq!(keys.results, [(name("b"), name("w"), name("here"))]);
        let left: Vec<_> = keys.links.iter().map(|(from, _, to)| (from.as_str(), to.as_str())).collect();
        assert_eq!(left, [("sha256:1", "a"), ("a", "b")]);
    }
}
