//! `--cache-from`: images that a user names, whose histories may tell of a step.
//!
//! An entry stands for a step if it carries the step's key, which covers the step and all that it takes in, and if the
//! layers below it are those that the step stands on here. Text alone is not enough for a build: what a COPY says is the
//! same whatever it copies. So images help that Plies built, wherever that was; of others `--explain` says so.

use std::sync::{Mutex, PoisonError};

use plies_cache::CacheKey;
use plies_image::history_cache::{history_of, key_of_entry, layer_of_entry};
use plies_oci::{DiffId, ImageConfig, Platform};
use plies_store::Stamp;
use serde_json::Value;

use crate::Engine;
use crate::images::chain;
use crate::progress::{Outcome, Progress, Task};

/// Characters of an instruction that a line of explanation quotes.
const QUOTED_CHARS_MAX: usize = 80;

struct Source {
    name: String,
    config: ImageConfig,
    history: Vec<Value>,
}

/// The sources of one build.
pub(crate) struct CacheFrom {
    sources: Vec<Source>,
    /// The source that answered, from then on the only one: two may agree so far and differ in what they stand on.
    chosen: Mutex<Option<usize>>,
    /// A source was named that carries no keys.
    without_keys: bool,
}

/// A step's result in an image.
pub(crate) struct FromImage {
    /// The layer that it made; `None` for one that made none.
    pub(crate) diff_id: Option<DiffId>,
    /// When it did so.
    pub(crate) created: Option<Stamp>,
    /// Which image, and which entry of its history.
    pub(crate) says: String,
}

impl CacheFrom {
    /// Reads the sources' configs. One that is not here or is for another platform is a warning, and left out.
    pub(crate) fn open(engine: &Engine, names: &[String], platform: &Platform, progress: &dyn Progress) -> Self {
        let mut sources = Vec::new();
        let warn = |why: String| {
            let task = Task::start(progress, &format!("warning: cache from {why}"), None);
            task.end(Outcome::Done);
        };
        for name in names {
            let config = engine.find_image(name).map_err(crate::ImagesError::from);
            match config.and_then(|found| engine.config_of(found.id)) {
                Ok(config) if !config.platform().serves(platform) => {
                    warn(format!("{name}: it is for {}", config.platform()));
                }
                Ok(config) => sources.push(Source { name: name.clone(), history: history_of(&config), config }),
                Err(error) => warn(format!("{name}: {}", chain(&error))),
            }
        }
        let without_keys =
            sources.iter().any(|source| source.history.iter().all(|entry| key_of_entry(entry).is_none()));
        Self { sources, chosen: Mutex::new(None), without_keys }
    }

    /// Finds the result of the step with this key on these layers.
    pub(crate) fn find(&self, below: &[DiffId], key: &CacheKey) -> Option<FromImage> {
        let key = key.to_string();
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, index, diff_id) = self.sources.iter().enumerate().find_map(|(at, source)| {
            if chosen.is_some_and(|chosen| chosen != at) {
                return None;
            }
            let index = (0..source.history.len())
                .find(|index| key_of_entry(&source.history[*index]) == Some(&key) && source.stands_on(*index, below))?;
            Some((at, index, layer_of_entry(&source.config, index)?))
        })?;
        *chosen = Some(at);
        drop(chosen);
        let (source, entry) = (&self.sources[at], &self.sources[at].history[index]);
        let time: Option<jiff::Timestamp> = entry["created"].as_str().and_then(|text| text.parse().ok());
        let created = time.map(|time| Stamp::from(std::time::SystemTime::from(time)));
        let text: String = entry["created_by"].as_str().unwrap_or("").chars().take(QUOTED_CHARS_MAX).collect();
        let says = format!("cached: image {}, history entry {index}: {text}", source.name);
        Some(FromImage { diff_id, created, says })
    }

    /// What else to say of a step that was not found.
    pub(crate) fn and_not_there(&self) -> String {
        match (self.sources.len(), self.without_keys) {
            (0, _) => String::new(),
            (count, false) => format!(", nor in the history of {count} image{}", if count == 1 { "" } else { "s" }),
            (_, true) => ", and a history that Plies has not written does not say what its steps took in".to_owned(),
        }
    }
}

impl Source {
    /// Whether the layers before an entry are these.
    fn stands_on(&self, index: usize, below: &[DiffId]) -> bool {
        let before = self.history[..index].iter().filter(|entry| entry["empty_layer"] != true).count();
        self.config.diff_ids().get(..before) == Some(below)
    }
}
