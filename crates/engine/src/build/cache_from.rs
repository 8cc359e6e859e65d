//! `--cache-from`: images that a user names, whose histories may tell of a step.
//!
//! **By key.** An entry that Plies wrote carries the step's key, which covers the step and all that it takes in. It stands
//! for the step if the layers below it are those that the step stands on here; of a copy that stands on nothing
//! (`--link`) the key is enough.
//!
//! **By text**, as Docker's classic builder has it, in images that somebody else built: their history begins with that of
//! the base image, and goes on with what the instructions so far say, one entry each. Then a process that ran there is
//! taken for the one that would run here. What a COPY says is the same whatever it copies, so none is ever found that
//! way; one that the build cache has is passed over if its layer is the image's. Texts are read in Docker's, BuildKit's
//! and buildah's forms, and count only where they can be read in one way. A result that was found by text is not
//! remembered by the step's key: it holds for builds that name the image.

use plies_cache::CacheKey;
use plies_image::history_cache::{
    history_of, instruction_of, is_run_of, is_valid_parent, key_of_entry, layer_of_entry,
};
use plies_oci::{DiffId, ImageConfig, Platform};
use plies_store::Stamp;
use serde_json::Value;

use crate::Engine;
use crate::images::chain;
use crate::progress::{Outcome, Progress, Task};

/// Characters of an instruction that a line of explanation quotes.
const QUOTED_CHARS_MAX: usize = 80;

/// What the history of an image says of an instruction, if it was built by the same.
#[derive(Debug)]
pub(crate) enum Told {
    /// All of this, which the base image has.
    Base(Vec<Value>),
    /// That it ran these words, and which build arguments it saw (`A=b`).
    Run { args: Vec<String>, words: Vec<String> },
    /// That it copied something. What, only the layer can tell.
    Files,
    /// One of these texts: it changes what later steps see.
    Says(Vec<String>),
    /// That it set these variables (`A=b`), expanded or as it is written.
    Env { env: Vec<String>, written: String },
    /// That it was such an instruction. Whatever it set, no step sees it.
    Named(String),
}

struct Source {
    name: String,
    config: ImageConfig,
    history: Vec<Value>,
    /// The environment that it ends with.
    env: Vec<String>,
}

/// The sources of one build.
pub(crate) struct CacheFrom {
    sources: Vec<Source>,
    /// A source was named that carries no keys.
    without_keys: bool,
}

/// A step's result in an image.
pub(crate) struct FromImage {
    /// The layer that it made; `None` for one that made none.
    pub(crate) diff_id: Option<DiffId>,
    /// When it did so.
    pub(crate) created: Option<Stamp>,
    /// Found by the step's key, not by what a history says of it.
    pub(crate) by_key: bool,
    /// By its number, the image that steps on top of this one are looked for in; `None` for a step that stands on nothing.
    pub(crate) source: Option<usize>,
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
                Ok(config) => sources.push(Source::new(name, config)),
                Err(error) => warn(format!("{name}: {}", chain(&error))),
            }
        }
        let without_keys =
            sources.iter().any(|source| source.history.iter().all(|entry| key_of_entry(entry).is_none()));
        Self { sources, without_keys }
    }

    /// Finds the result of the step with this key on the layers `below`; on any, if that is `None`. `story` is what a
    /// history says that tells of it, or nothing if no text could. `chosen` is the source that answered for a step below,
    /// from there on the only one: two may agree so far and differ in what they stand on. Steps side by side choose
    /// for themselves, so it does not matter which comes first.
    pub(crate) fn find(
        &self,
        below: Option<&[DiffId]>,
        chosen: Option<usize>,
        key: &CacheKey,
        story: &[&Told],
    ) -> Option<FromImage> {
        let key = key.to_string();
        let answers = |source: &Source| {
            let stands = |index: &usize| below.is_none_or(|below| source.stands_on(*index, below));
            let has_key = |index: &usize| key_of_entry(&source.history[*index]) == Some(&key) && stands(index);
            let by_key = (0..source.history.len()).find(has_key).map(|index| (index, true));
            let (index, by_key) = by_key.or_else(|| Some((source.place_of(story).filter(stands)?, false)))?;
            let diff_id = layer_of_entry(&source.config, index)?;
            // Builders differ in when the directory is made: of one that was not, nothing is known.
            (by_key || diff_id.is_some() || matches!(story.last(), Some(Told::Run { .. })))
                .then_some((index, by_key, diff_id))
        };
        let may = |at: usize| below.is_none() || chosen.is_none_or(|chosen| chosen == at);
        let mut sources = self.sources.iter().enumerate().filter(|(at, _)| may(*at));
        let (at, (index, by_key, diff_id)) = sources.find_map(|(at, source)| Some((at, answers(source)?)))?;
        let (source, entry) = (&self.sources[at], &self.sources[at].history[index]);
        let time: Option<jiff::Timestamp> = entry["created"].as_str().and_then(|text| text.parse().ok());
        let created = time.map(|time| Stamp::from(std::time::SystemTime::from(time)));
        let text: String = entry["created_by"].as_str().unwrap_or("").chars().take(QUOTED_CHARS_MAX).collect();
        let says = format!("cached: image {}, history entry {index}: {text}", source.name);
        Some(FromImage { diff_id, created, by_key, source: below.map(|_| at), says })
    }

    /// What else to say of a step that was not found.
    pub(crate) fn and_not_there(&self, story: &[&Told]) -> String {
        match self.sources.len() {
            0 => String::new(),
            _ if self.without_keys && story.is_empty() => {
                ", and a history that Plies has not written does not say what its steps took in".to_owned()
            }
            count => format!(", nor in the history of {count} image{}", if count == 1 { "" } else { "s" }),
        }
    }
}

impl Source {
    fn new(name: &str, config: ImageConfig) -> Self {
        let run = config.document().value().config().as_ref();
        let env = run.and_then(|run| run.env().clone()).unwrap_or_default();
        Self { name: name.to_owned(), history: history_of(&config), env, config }
    }

    /// Whether the layers before an entry are these.
    fn stands_on(&self, index: usize, below: &[DiffId]) -> bool {
        let before = self.history[..index].iter().filter(|entry| entry["empty_layer"] != true).count();
        self.config.diff_ids().get(..before) == Some(below)
    }

    /// The place of the last entry of a history that tells this story.
    fn place_of(&self, story: &[&Told]) -> Option<usize> {
        let (Told::Base(base), told) = story.split_first()? else { return None };
        let entries = self.history.get(base.len()..base.len() + told.len())?;
        let fits = is_valid_parent(base, &[], &self.history, self.config.diff_ids())
            && told.iter().zip(entries).all(|(told, entry)| told.is_in(entry, &self.env));
        (fits && !told.is_empty()).then_some(base.len() + told.len() - 1)
    }
}

impl Told {
    /// Whether an entry of a history says so; the image's environment in the end is `env`.
    fn is_in(&self, entry: &Value, env: &[String]) -> bool {
        let text = instruction_of(entry);
        match self {
            Self::Base(_) => false,
            Self::Files => true,
            Self::Named(name) => text.split(' ').next() == Some(name),
            Self::Says(texts) => texts.iter().any(|known| known == text),
            Self::Env { env: set, written } => {
                // Without its quotes `A=b C=d` sets two variables or one. One that is in the image was set.
                let clear = set.len() == 1 && !set[0].contains(char::is_whitespace);
                let all_set = || set.iter().all(|variable| env.contains(variable));
                let expanded = format!("ENV {}", set.join(" "));
                (text == expanded && (clear || all_set())) || (text == written && all_set())
            }
            Self::Run { args, words } => {
                let mut sorted = args.clone();
                sorted.sort();
                [args, &sorted].into_iter().any(|args| {
                    let count = (!args.is_empty()).then(|| format!("|{}", args.len()));
                    let all: Vec<String> = count.into_iter().chain(args.iter().cloned()).chain(words.clone()).collect();
                    is_run_of(entry, &all)
                })
            }
        }
    }
}
