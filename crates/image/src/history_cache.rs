//! Which image a build step could have come from: Docker's classic cache.
//!
//! Two questions, both answered from images' configs alone:
//! - **Local**: has a child of the parent image the config that this step would give it?
//! - **By history** (`--cache-from`): does an image that the user named have the parent's history and layers at its
//!   bottom, and this step next? Then its layer is the step's result. Once a step was answered from the middle of one
//!   image's history, only that image answers in this build: two images that agree so far may have been built on
//!   different days, and a result patched together from both never existed.
//!
//! What a history says of a step is text. Docker compares it with the command's words joined by blanks, so `["a b"]` was
//! `["a", "b"]`, and a step that copies other files under the same name was the same step (CVE-2024-24557 began there).
//! Here an entry may carry the step's key ([`Step::key`]), a digest of the step and of all that it takes in; then that
//! decides. Without one, text counts only where it can be read back in one way. Local hits need an image that was built
//! here; images that a user names are trusted for what they say.
//!
//! Pure functions over [`Images`]; nothing is written here.

use plies_oci::{DiffId, DocumentError, ErrorKind, ImageConfig, ImageId, Platform};
use serde_json::{Map, Value, json};

use crate::ImageError;

/// Where a history entry carries its step's key: a field of our own, which others pass over (image-spec, `config.md`,
/// "Properties"), so that what they show is as if docker had written it.
pub const KEY_FIELD: &str = "plies.step";

/// Fields of a run config that a container has for itself: they say nothing about what a step does.
const CONTAINERS_OWN: [&str; 2] = ["Hostname", "Image"];

/// Why the cache could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryCacheError {
    /// An image that another one names is not here.
    #[error("unable to find image {image}")]
    Missing {
        /// Which.
        image: ImageId,
    },
    /// An image could not be read.
    #[error("read image {image}")]
    Image {
        /// Which.
        image: ImageId,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// What was made of an image's config is none.
    #[error("restore an image")]
    Restore(#[from] DocumentError),
}

impl HistoryCacheError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::Image { source, .. } => source.kind(),
            Self::Restore(source) => source.kind(),
        }
    }
}

/// An image as the cache sees it.
#[derive(Debug, Clone)]
pub struct CacheImage {
    /// Its config.
    pub config: ImageConfig,
    /// The image that it was built on.
    pub parent: Option<ImageId>,
    /// It was built here.
    pub built_here: bool,
}

/// Where the cache finds images.
pub trait Images {
    /// An image; `None` if it is not here.
    ///
    /// # Errors
    /// [`ImageError`] if it is here and cannot be read.
    fn image(&self, id: &ImageId) -> Result<Option<CacheImage>, ImageError>;

    /// The images built on `parent`, or those built on none, in a stable order.
    ///
    /// # Errors
    /// [`ImageError`].
    fn children(&self, parent: Option<&ImageId>) -> Result<Vec<ImageId>, ImageError>;
}

/// A step that is looked for.
#[derive(Debug, Clone)]
pub struct Step<'a> {
    /// The run config of the container that would do it (Docker's `container_config`), its command among it.
    pub config: &'a Value,
    /// What it builds for.
    pub platform: &'a Platform,
    /// Digest of the step and of all that it takes in, as text; `None` where nobody computes one.
    pub key: Option<&'a str>,
}

/// What the cache has for a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hit {
    /// An image that is here is the result.
    Image {
        /// Which.
        image: ImageId,
        /// The source that gave it, as it was named, and the place in its history; `None` for a local hit.
        from: Option<(String, usize)>,
        /// The parent that it is to have from now on, if it had none of this build's.
        set_parent: Option<ImageId>,
    },
    /// An image has to be created from this config, on layers that are here with the source.
    Restore {
        /// Its config.
        config: Vec<u8>,
        /// The source that gave it, as it was named, and the place in its history.
        from: (String, usize),
        /// The parent that it is to have.
        parent: Option<ImageId>,
    },
}

/// An image that the user named as a source.
#[derive(Debug, Clone)]
struct Source {
    name: String,
    id: ImageId,
    image: CacheImage,
}

/// The cache of one build.
#[derive(Debug)]
pub struct HistoryCache<'a, I> {
    images: &'a I,
    sources: Vec<Source>,
    /// What this program calls itself in configs that it restores.
    version: &'a str,
}

impl<'a, I: Images> HistoryCache<'a, I> {
    /// A cache over these images. `names` are the sources in the order in which they are asked; one that `resolve` cannot
    /// find is left out, and `warn` is told. Without names only the local cache is asked.
    pub fn new<E: std::fmt::Display>(
        images: &'a I,
        names: &[String],
        mut resolve: impl FnMut(&str) -> Result<(ImageId, CacheImage), E>,
        mut warn: impl FnMut(&str, E),
        version: &'a str,
    ) -> Self {
        let mut sources = Vec::new();
        for name in names {
            match resolve(name) {
                Ok((id, image)) => sources.push(Source { name: name.clone(), id, image }),
                Err(error) => warn(name, error),
            }
        }
        Self { images, sources, version }
    }

    /// Finds the result of `step` on `parent`, or on nothing.
    ///
    /// # Errors
    /// [`HistoryCacheError::Missing`] if the parent is not here, and those of [`Images`].
    pub fn get(&mut self, parent: Option<ImageId>, step: &Step<'_>) -> Result<Option<Hit>, HistoryCacheError> {
        let below = match parent {
            Some(id) => Some((id, self.load(id)?)),
            None => None,
        };
        if let Some(image) = self.local(parent, step)?
            && (self.sources.is_empty() || self.some_source_descends_from(image))
        {
            return Ok(Some(Hit::Image { image, from: None, set_parent: None }));
        }
        let (mut history, mut diff_ids) = (Vec::new(), &[][..]);
        if let Some((_, below)) = &below {
            history = history_of(&below.config);
            diff_ids = below.config.diff_ids();
        }
        let place = history.len();
        let parent_platform = below.as_ref().map(|(_, below)| below.config.platform());
        let fits = |source: &Source| {
            let config = &source.image.config;
            let entries = history_of(config);
            config.platform().serves(step.platform)
                && parent_platform.as_ref().is_none_or(|parent| config.platform().serves(parent))
                && is_valid_parent(&history, diff_ids, &entries, config.diff_ids())
                && entries.get(place).is_some_and(|entry| is_valid_entry(entry, step))
        };
        let Some(at) = self.sources.iter().position(fits) else { return Ok(None) };
        let source = self.sources[at].clone();
        let from = (source.name.clone(), place);
        if place + 1 == history_of(&source.image.config).len() {
            // The source itself: it has the parent that this build knows, from now on.
            return Ok(Some(Hit::Image { image: source.id, from: Some(from), set_parent: parent }));
        }
        let Some(layer) = layer_of_entry(&source.image.config, place) else { return Ok(None) };
        let config = restore(&history, diff_ids, &source.image.config, place, layer, step, self.version);
        ImageConfig::parse(&config)?;
        self.sources = vec![source];
        Ok(Some(Hit::Restore { config, from, parent }))
    }

    fn load(&self, id: ImageId) -> Result<CacheImage, HistoryCacheError> {
        let image = self.images.image(&id).map_err(|source| HistoryCacheError::Image { image: id, source })?;
        image.ok_or(HistoryCacheError::Missing { image: id })
    }

    /// The newest image built here on `parent` whose container had this very config.
    fn local(&self, parent: Option<ImageId>, step: &Step<'_>) -> Result<Option<ImageId>, HistoryCacheError> {
        let listed = self.images.children(parent.as_ref());
        let candidates = listed.map_err(|source| HistoryCacheError::Image {
            image: parent.unwrap_or(ImageId::from_bytes([0; 32])),
            source,
        })?;
        let mut best: Option<(Option<jiff::Timestamp>, ImageId)> = None;
        for id in candidates {
            let image = self.load(id)?;
            if !image.built_here || !image.config.platform().serves(step.platform) {
                continue;
            }
            let json = json_of(&image.config);
            let Some(config) = json.get("container_config") else { continue };
            if !is_same_config(config, step.config) {
                continue;
            }
            let created = json.get("created").and_then(Value::as_str).and_then(|text| text.parse().ok());
            if best.as_ref().is_none_or(|(newest, _)| created > *newest) {
                best = Some((created, id));
            }
        }
        Ok(best.map(|(_, id)| id))
    }

    /// Whether a source was built on this image, at however many removes. Where a parent cannot be read that counts as no.
    fn some_source_descends_from(&self, ancestor: ImageId) -> bool {
        self.sources.iter().any(|source| {
            let mut next = source.image.parent;
            // A circle of parents would never end.
            let mut seen = std::collections::HashSet::new();
            while let Some(id) = next {
                if id == ancestor {
                    return true;
                }
                if !seen.insert(id) {
                    return false;
                }
                next = self.images.image(&id).ok().flatten().and_then(|image| image.parent);
            }
            false
        })
    }
}

fn json_of(config: &ImageConfig) -> Map<String, Value> {
    match serde_json::from_slice(config.document().raw()) {
        Ok(Value::Object(json)) => json,
        _ => unreachable!("because it was parsed as an object before"),
    }
}

/// The entries of an image's history, oldest first.
pub fn history_of(config: &ImageConfig) -> Vec<Value> {
    match json_of(config).remove("history") {
        Some(Value::Array(entries)) => entries,
        _ => vec![],
    }
}

fn is_empty_entry(entry: &Value) -> bool {
    entry["empty_layer"] == true
}

/// Whether an image with this history and these layers may be what `source` was built on. One with neither may be the
/// beginning of any; otherwise its history is a part of the source's, and not all of it, and its layers are the source's
/// first ones: all of them, where the rest of the history made none.
pub fn is_valid_parent(history: &[Value], diff_ids: &[DiffId], source: &[Value], source_diff_ids: &[DiffId]) -> bool {
    if source.is_empty() {
        return false;
    }
    if history.is_empty() && diff_ids.is_empty() {
        return true;
    }
    history.len() < source.len()
        && history.iter().zip(source).all(|(a, b)| say_the_same(a, b))
        && source_diff_ids.starts_with(diff_ids)
}

/// Whether two entries are the same but for our field: who builds on one of our images may not pass on what it does not
/// know.
fn say_the_same(a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return a == b };
    let fields = |entry: &Map<String, Value>| entry.len() - usize::from(entry.contains_key(KEY_FIELD));
    fields(a) == fields(b) && a.iter().all(|(key, value)| key == KEY_FIELD || b.get(key) == Some(value))
}

/// The layer that an entry of an image's history made: `Some(None)` for one that made none. `None`: there is no such
/// entry, or no layer for it.
pub fn layer_of_entry(config: &ImageConfig, index: usize) -> Option<Option<DiffId>> {
    let entries = history_of(config);
    let entry = entries.get(index)?;
    if is_empty_entry(entry) {
        return Some(None);
    }
    let before = entries[..index].iter().filter(|entry| !is_empty_entry(entry)).count();
    config.diff_ids().get(before).map(|diff_id| Some(*diff_id))
}

/// The key that an entry of a history carries.
pub fn key_of_entry(entry: &Value) -> Option<&str> {
    entry[KEY_FIELD].as_str()
}

/// Whether an entry of a history stands for this very step: by its key if it has one, else by the words of its command,
/// joined by blanks, where they can be told apart again.
pub fn is_valid_entry(entry: &Value, step: &Step<'_>) -> bool {
    if let Some(key) = key_of_entry(entry) {
        return step.key == Some(key);
    }
    let words: Option<Vec<&str>> = match &step.config["Cmd"] {
        Value::Array(words) => words.iter().map(Value::as_str).collect(),
        Value::Null => Some(vec![]),
        _ => None,
    };
    words.is_some_and(|words| reads_back(&words) && entry["created_by"].as_str().unwrap_or("") == words.join(" "))
}

/// Whether an entry says that these words were run: joined by blanks, as Docker's classic builder and buildah have them,
/// or between `RUN` and `# buildkit`. Where the step saw build arguments they stand in front: `|1 A=b /bin/sh -c …`.
pub fn is_run_of(entry: &Value, words: &[String]) -> bool {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let text = entry["created_by"].as_str().unwrap_or("");
    let text = text.strip_prefix("RUN ").and_then(|text| text.strip_suffix(" # buildkit")).unwrap_or(text);
    key_of_entry(entry).is_none() && reads_back(&words) && text == words.join(" ")
}

/// The instruction that an entry stands for which runs nothing: behind `#(nop)` in what Docker's classic builder and
/// buildah write, the whole text in what BuildKit writes.
pub fn instruction_of(entry: &Value) -> &str {
    let text = entry["created_by"].as_str().unwrap_or("");
    // One blank or two: Docker joined words of which one ended in a blank.
    text.split_once("#(nop) ").map_or(text, |(_, instruction)| instruction).trim_start()
}

/// Whether words joined by blanks can be read back in one way: a shell's script is the last word, behind an option, and
/// has blanks of its own; no other word has.
fn reads_back(words: &[&str]) -> bool {
    let is_option = |word: &str| word.starts_with(['-', '/']) && word.ends_with('c');
    let blank = |word: &&str| word.is_empty() || word.contains(char::is_whitespace);
    match words {
        [] => true,
        [first @ .., shell_option, script] if is_option(shell_option) && !first.is_empty() => {
            !script.is_empty() && !first.iter().any(blank) && !first.iter().any(|word| is_option(word))
        }
        // A second word after what would be a shell's option reads as the script's second.
        words => !words.iter().any(blank) && !words.iter().skip(1).any(|word| is_option(word)),
    }
}

/// Whether two run configs are the same, part by part: `["a b"]` is not `["a", "b"]`, and a health check or an ONBUILD
/// counts like everything else. A missing part, `null` and an empty one are the same; no config at all is like no other.
pub fn is_same_config(a: &Value, b: &Value) -> bool {
    let (Value::Object(a), Value::Object(b)) = (a, b) else { return false };
    let parts = |config: &Map<String, Value>| -> Map<String, Value> {
        let own = |key: &&String| !CONTAINERS_OWN.contains(&key.as_str());
        config
            .iter()
            .filter(|(key, value)| own(key) && !is_nothing(value))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    };
    parts(a) == parts(b)
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// The config of the image as it was when the entry at `index` of the source's history was its last.
fn restore(
    history: &[Value],
    diff_ids: &[DiffId],
    source: &ImageConfig,
    index: usize,
    layer: Option<DiffId>,
    step: &Step<'_>,
    version: &str,
) -> Vec<u8> {
    let from = json_of(source);
    let entry = history_of(source).swap_remove(index);
    let mut config = Map::new();
    for key in ["architecture", "os", "variant", "os.version", "os.features", "author"] {
        if let Some(value) = from.get(key) {
            config.insert(key.into(), value.clone());
        }
    }
    // Without the container's config, so that the local cache, which compares that, never takes it for a step's result.
    config.insert("config".into(), step.config.clone());
    config.insert("docker_version".into(), version.into());
    if let Some(created) = entry.get("created") {
        config.insert("created".into(), created.clone());
    }
    let diff_ids: Vec<DiffId> = diff_ids.iter().copied().chain(layer).collect();
    config.insert("rootfs".into(), json!({"type": "layers", "diff_ids": diff_ids}));
    config.insert("history".into(), history.iter().cloned().chain([entry]).collect());
    Value::Object(config).to_string().into_bytes()
}

#[cfg(test)]
mod tests;
