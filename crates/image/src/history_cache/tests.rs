use std::cell::RefCell;
use std::collections::BTreeMap;

use super::*;

/// Images in memory.
#[derive(Default)]
struct Memory {
    images: RefCell<BTreeMap<ImageId, CacheImage>>,
    unreadable: RefCell<Vec<ImageId>>,
}

impl Images for Memory {
    fn image(&self, id: &ImageId) -> Result<Option<CacheImage>, ImageError> {
        if self.unreadable.borrow().contains(id) {
            return Ok(None);
        }
        Ok(self.images.borrow().get(id).cloned())
    }

    fn children(&self, parent: Option<&ImageId>) -> Result<Vec<ImageId>, ImageError> {
        let images = self.images.borrow();
        Ok(images.iter().filter(|(_, image)| image.parent.as_ref() == parent).map(|(id, _)| *id).collect())
    }
}

fn host() -> Platform {
    Platform { os: "linux".into(), architecture: "amd64".into(), variant: None }
}

fn diff(n: u8) -> DiffId {
    DiffId::from_bytes([n; 32])
}

fn cmd(words: &[&str]) -> Value {
    json!({"Cmd": words})
}

/// A layer made at a time by some words.
fn made(words: &str, created: u32) -> Value {
    json!({"created": format!("2020-01-{created:02}T00:00:00Z"), "created_by": words})
}

fn empty(words: &str) -> Value {
    json!({"created": "2020-01-01T00:00:00Z", "created_by": words, "empty_layer": true})
}

fn config(history: &[Value], layers: &[u8], more: Value) -> ImageConfig {
    let diff_ids: Vec<DiffId> = layers.iter().map(|n| diff(*n)).collect();
    let mut config = json!({
        "architecture": "amd64", "os": "linux", "history": history,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    ImageConfig::parse(config.to_string().as_bytes()).unwrap()
}

impl Memory {
    fn add(&self, parent: Option<ImageId>, built_here: bool, config: ImageConfig) -> ImageId {
        let id = config.id();
        self.images.borrow_mut().insert(id, CacheImage { config, parent, built_here });
        id
    }

    fn built(&self, parent: Option<ImageId>, container: Value, created: u32) -> ImageId {
        let created = format!("2020-01-{created:02}T00:00:00Z");
        let more = json!({"container_config": container, "created": created, "comment": self.images.borrow().len()});
        self.add(parent, true, config(&[], &[], more))
    }

    fn cache(&self, sources: &[ImageId]) -> HistoryCache<'_, Self> {
        let names: Vec<String> = sources.iter().map(ToString::to_string).collect();
        let resolve = |name: &str| {
            let id: ImageId = name.parse().map_err(|_| "no name")?;
            self.images.borrow().get(&id).cloned().map(|image| (id, image)).ok_or("not here")
        };
        HistoryCache::new(self, &names, resolve, |name, error| panic!("{name}: {error}"), "plies")
    }
}

fn ask(cache: &mut HistoryCache<'_, Memory>, parent: Option<ImageId>, config: &Value) -> Option<Hit> {
    cache.get(parent, &Step { config, platform: &host(), key: None }).unwrap()
}

fn local(memory: &Memory, parent: Option<ImageId>, config: &Value) -> Option<ImageId> {
    match ask(&mut memory.cache(&[]), parent, config) {
        Some(Hit::Image { image, from: None, set_parent: None }) => Some(image),
        None => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn d01_candidates_are_the_children_of_the_parent_or_all_without_one() {
    let memory = Memory::default();
    let base = memory.built(None, cmd(&["base"]), 1);
    let other = memory.built(None, cmd(&["other"]), 1);
    let child = memory.built(Some(base), cmd(&["step"]), 1);
    assert_eq!(local(&memory, Some(base), &cmd(&["step"])), Some(child));
    assert_eq!(local(&memory, Some(other), &cmd(&["step"])), None);
    assert_eq!(local(&memory, None, &cmd(&["step"])), None);
    assert_eq!(local(&memory, None, &cmd(&["base"])), Some(base));
}

#[test]
fn d02_a_candidate_that_cannot_be_read_is_an_error() {
    let memory = Memory::default();
    let base = memory.built(None, cmd(&["base"]), 1);
    let child = memory.built(Some(base), cmd(&["step"]), 1);
    memory.unreadable.borrow_mut().push(child);
    let step = cmd(&["step"]);
    let error = memory.cache(&[]).get(Some(base), &Step { config: &step, platform: &host(), key: None }).unwrap_err();
    assert_eq!(error.to_string(), format!("unable to find image {child}"));
}

#[test]
fn d03_the_newest_of_several_wins_and_of_equals_the_first() {
    let memory = Memory::default();
    let base = memory.built(None, cmd(&["base"]), 1);
    let made: Vec<ImageId> = [3, 9, 9, 1].map(|day| memory.built(Some(base), cmd(&["step"]), day)).to_vec();
    let first = made[1].min(made[2]);
    assert_eq!(local(&memory, Some(base), &cmd(&["step"])), Some(first));
}

#[test]
fn d04_sources_keep_their_order_and_one_that_is_not_here_is_a_warning() {
    let memory = Memory::default();
    let one = memory.add(None, false, config(&[made("a", 1)], &[1], json!({})));
    let two = memory.add(None, false, config(&[made("a", 2)], &[2], json!({})));
    let mut warned = Vec::new();
    let names = [ImageId::from_bytes([9; 32]), two, one].map(|id| id.to_string());
    let resolve = |name: &str| {
        let id: ImageId = name.parse().unwrap();
        memory.images.borrow().get(&id).cloned().map(|image| (id, image)).ok_or("not here")
    };
    let mut cache = HistoryCache::new(&memory, &names, resolve, |name, _| warned.push(name.to_owned()), "plies");
    let Some(Hit::Image { image, .. }) = ask(&mut cache, None, &cmd(&["a"])) else { panic!("a miss") };
    assert_eq!(image, two);
    assert_eq!(warned, names[..1]);
}

#[test]
fn d05_no_match_is_no_error() {
    let memory = Memory::default();
    assert_eq!(local(&memory, None, &cmd(&["a"])), None);
    let source = memory.add(None, false, config(&[made("a", 1)], &[1], json!({})));
    assert_eq!(ask(&mut memory.cache(&[source]), None, &cmd(&["b"])), None);
}

#[test]
fn d06_with_sources_a_local_hit_counts_only_below_one_of_them() {
    let memory = Memory::default();
    let base = memory.built(None, cmd(&["base"]), 1);
    let hit = memory.built(Some(base), cmd(&["step"]), 1);
    let descendant = memory.built(Some(hit), cmd(&["more"]), 1);
    let unrelated = memory.built(None, cmd(&["unrelated"]), 1);
    let is_hit = |sources: &[ImageId]| ask(&mut memory.cache(sources), Some(base), &cmd(&["step"])).is_some();
    assert!(is_hit(&[descendant]) && is_hit(&[unrelated, descendant]));
    assert!(!is_hit(&[unrelated]));
    assert!(!is_hit(&[hit]), "a source is not its own ancestor");
    memory.images.borrow_mut().get_mut(&descendant).unwrap().parent = Some(ImageId::from_bytes([9; 32]));
    assert!(!is_hit(&[descendant]), "a broken chain of parents counts as no");
    memory.images.borrow_mut().get_mut(&descendant).unwrap().parent = Some(unrelated);
    memory.images.borrow_mut().get_mut(&unrelated).unwrap().parent = Some(descendant);
    assert!(!is_hit(&[descendant]), "a circle ends");
}

#[test]
fn d07_a_parent_that_is_not_here_is_an_error() {
    let memory = Memory::default();
    let missing = ImageId::from_bytes([9; 32]);
    let config = cmd(&["a"]);
    let error = memory.cache(&[]).get(Some(missing), &Step { config: &config, platform: &host(), key: None });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
}

/// A source with two layers and an empty entry between them, on a base with one layer.
fn sourced() -> (Memory, ImageId, ImageId) {
    let memory = Memory::default();
    let history = [made("base", 1), made("one", 2), empty("env"), made("two", 3), empty("cmd")];
    let base = memory.add(None, false, config(&history[..1], &[1], json!({})));
    let more = json!({"author": "me", "os.version": "5", "os.features": ["x"], "created": "2020-02-02T00:00:00Z"});
    let source = memory.add(None, false, config(&history, &[1, 2, 3], more));
    (memory, base, source)
}

#[test]
fn d08_sources_are_tried_in_order_and_need_parent_and_step() {
    let (memory, base, source) = sourced();
    let stranger = memory.add(None, false, config(&[made("strange", 1), made("one", 2)], &[8, 9], json!({})));
    let other_step = memory.add(None, false, config(&[made("base", 1), made("other", 2)], &[1, 7], json!({})));
    let mut cache = memory.cache(&[stranger, other_step, source]);
    let Some(Hit::Restore { from, .. }) = ask(&mut cache, Some(base), &cmd(&["one"])) else { panic!("a miss") };
    assert_eq!(from, (source.to_string(), 1));
}

#[test]
fn d09_the_last_entry_is_the_source_itself() {
    let memory = Memory::default();
    let base = memory.add(None, false, config(&[made("base", 1)], &[1], json!({})));
    let source = memory.add(None, false, config(&[made("base", 1), made("one", 2)], &[1, 2], json!({})));
    let from = Some((source.to_string(), 1));
    let hit = ask(&mut memory.cache(&[source]), Some(base), &cmd(&["one"]));
    assert_eq!(hit, Some(Hit::Image { image: source, from, set_parent: Some(base) }));
    let alone = memory.add(None, false, config(&[made("one", 2)], &[2], json!({})));
    let from = Some((alone.to_string(), 0));
    let hit = ask(&mut memory.cache(&[alone]), None, &cmd(&["one"]));
    assert_eq!(hit, Some(Hit::Image { image: alone, from, set_parent: None }));
}

/// Asks, and takes what is restored into the image store.
fn restore_into(memory: &Memory, cache: &mut HistoryCache<'_, Memory>, parent: ImageId, step: &Value) -> ImageId {
    let Some(Hit::Restore { config, parent: set, .. }) = ask(cache, Some(parent), step) else { panic!("a miss") };
    assert_eq!(set, Some(parent));
    memory.add(Some(parent), true, ImageConfig::parse(&config).unwrap())
}

#[test]
fn d10_after_an_intermediate_hit_only_that_source_answers() {
    let (memory, base, source) = sourced();
    let twin =
        config(&[made("base", 1), made("one", 2), empty("env"), made("other", 3), empty("cmd")], &[1, 2, 4], json!({}));
    let twin = memory.add(None, false, twin);
    let mut cache = memory.cache(&[source, twin]);
    let one = restore_into(&memory, &mut cache, base, &cmd(&["one"]));
    let env = restore_into(&memory, &mut cache, one, &cmd(&["env"]));
    assert_eq!(ask(&mut cache, Some(env), &cmd(&["other"])), None, "no jumping to the twin");
    let two = restore_into(&memory, &mut cache, env, &cmd(&["two"]));
    let Some(Hit::Image { image, .. }) = ask(&mut cache, Some(two), &cmd(&["cmd"])) else { panic!("a miss") };
    assert_eq!(image, source);
    // Asked first, the twin goes that way to its end.
    let mut cache = memory.cache(&[twin, source]);
    let one = restore_into(&memory, &mut cache, base, &cmd(&["one"]));
    let env = restore_into(&memory, &mut cache, one, &cmd(&["env"]));
    assert_eq!(ask(&mut cache, Some(env), &cmd(&["two"])), None);
}

#[test]
fn d11_what_is_restored_takes_from_parent_source_and_step_what_each_knows() {
    let (memory, base, source) = sourced();
    let asked = json!({"Cmd": ["one"], "Env": ["A=b"]});
    let Some(Hit::Restore { config, .. }) = ask(&mut memory.cache(&[source]), Some(base), &asked) else {
        panic!("a miss")
    };
    let json: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(json["history"], json!([made("base", 1), made("one", 2)]));
    assert_eq!(json["rootfs"]["diff_ids"], json!([diff(1), diff(2)]));
    assert_eq!(json["config"], asked);
    assert_eq!(
        (&json["author"], &json["os.version"], &json["os.features"]),
        (&json!("me"), &json!("5"), &json!(["x"]))
    );
    assert_eq!((&json["created"], &json["docker_version"]), (&json!("2020-01-02T00:00:00Z"), &json!("plies")));
    assert!(json.get("container_config").is_none());
    let id = memory.add(Some(base), true, ImageConfig::parse(&config).unwrap());
    assert_eq!(local(&memory, Some(base), &asked), None, "and so no local hit");
    // An entry without a layer adds none.
    let Some(Hit::Restore { config, .. }) = ask(&mut memory.cache(&[source]), Some(id), &cmd(&["env"])) else {
        panic!("a miss")
    };
    let json: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(json["rootfs"]["diff_ids"], json!([diff(1), diff(2)]));
}

#[test]
fn d12_no_history_is_no_source_and_no_parent_fits_all() {
    let layers = [diff(1)];
    assert!(!is_valid_parent(&[], &[], &[], &layers));
    assert!(!is_valid_parent(&[made("a", 1)], &[], &[], &layers));
    assert!(is_valid_parent(&[], &[], &[made("a", 1)], &layers));
    assert!(!is_valid_parent(&[], &[diff(2)], &[made("a", 1)], &layers));
}

#[test]
fn d13_the_parents_history_is_a_shorter_exact_beginning() {
    let all = [made("a", 1), empty("b"), made("c", 2)];
    let layers = [diff(1), diff(2)];
    assert!(is_valid_parent(&all[..2], &layers[..1], &all, &layers));
    assert!(!is_valid_parent(&all, &layers, &all, &layers), "not all of it");
    for (field, value) in [
        ("created", json!("x")),
        ("created_by", json!("x")),
        ("author", json!("x")),
        ("comment", json!("x")),
        ("empty_layer", json!(true)),
    ] {
        let mut other = made("a", 1);
        other[field] = value;
        assert!(!is_valid_parent(&[other], &layers[..1], &all, &layers), "{field}");
    }
}

#[test]
fn d14_the_parents_layers_are_the_beginning_and_may_be_all() {
    let all = [made("a", 1), empty("b"), empty("c")];
    assert!(is_valid_parent(&all[..1], &[diff(1)], &all, &[diff(1)]), "empty steps at the end add no layer");
    assert!(!is_valid_parent(&all[..1], &[diff(2)], &all, &[diff(1)]));
    assert!(!is_valid_parent(&all[..1], &[diff(1), diff(2)], &all, &[diff(1)]));
    let memory = Memory::default();
    let base = memory.add(None, false, config(&all[..1], &[1], json!({})));
    let source = memory.add(None, false, config(&all, &[1], json!({})));
    let mut cache = memory.cache(&[source]);
    let b = restore_into(&memory, &mut cache, base, &cmd(&["b"]));
    assert!(matches!(ask(&mut cache, Some(b), &cmd(&["c"])), Some(Hit::Image { image, .. }) if image == source));
}

#[test]
fn d15_the_layer_of_an_entry_is_counted_without_empty_ones_and_checked() {
    let image = config(&[made("a", 1), empty("b"), made("c", 2)], &[1, 2], json!({}));
    let found: Vec<_> = (0..4).map(|index| layer_of_entry(&image, index)).collect();
    assert_eq!(found, [Some(Some(diff(1))), Some(None), Some(Some(diff(2))), None]);
    // A history that promises more layers than there are does not even parse.
    let more = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "history": [made("a", 1)]});
    assert!(ImageConfig::parse(more.to_string().as_bytes()).is_err());
}

#[test]
fn d16_a_command_is_compared_word_by_word() {
    let fits = |words: &[&str], created_by: &str| {
        is_valid_entry(&made(created_by, 1), &Step { config: &cmd(words), platform: &host(), key: None })
    };
    assert!(fits(&["a", "b"], "a b") && fits(&["/bin/sh", "-c", "echo  x"], "/bin/sh -c echo  x") && fits(&[], ""));
    assert!(!fits(&["a", "b"], "a c") && !fits(&["a"], ""));
    assert!(!fits(&["a b"], "a b"), "c01: one word is not two");
    assert!(!fits(&["/bin/sh", "-c", "echo", "x"], "/bin/sh -c echo x"), "nor a script one with arguments");
    assert!(!fits(&["/bin/sh -c", "echo x"], "/bin/sh -c echo x"));
    assert!(!fits(&["a", ""], "a "));
    assert!(!is_valid_entry(&made("a", 1), &Step { config: &json!({"Cmd": "a"}), platform: &host(), key: None }));
}

#[test]
fn a_base_is_known_by_what_its_history_says_without_our_field() {
    let all = [made("a", 1), made("b", 2)];
    let mut keyed = all[0].clone();
    keyed[KEY_FIELD] = json!("k");
    assert!(is_valid_parent(std::slice::from_ref(&keyed), &[diff(1)], &all, &[diff(1), diff(2)]));
    assert!(is_valid_parent(&all[..1], &[diff(1)], &[keyed.clone(), all[1].clone()], &[diff(1), diff(2)]));
    keyed["author"] = json!("somebody");
    assert!(!is_valid_parent(&[keyed], &[diff(1)], &all, &[diff(1), diff(2)]));
}

#[test]
fn d16_a_key_decides_where_there_is_one() {
    let mut entry = made("a", 1);
    entry[KEY_FIELD] = json!("k1");
    let fits = |key| is_valid_entry(&entry, &Step { config: &cmd(&["a"]), platform: &host(), key });
    assert!(fits(Some("k1")));
    assert!(!fits(Some("k2")) && !fits(None), "the same words are not the same step");
}

#[test]
fn d17_local_hits_need_an_image_built_here() {
    let memory = Memory::default();
    let base = memory.built(None, cmd(&["base"]), 1);
    let child = memory.built(Some(base), cmd(&["step"]), 1);
    memory.images.borrow_mut().get_mut(&child).unwrap().built_here = false;
    assert_eq!(local(&memory, Some(base), &cmd(&["step"])), None);
}

#[test]
fn d17_configs_are_compared_part_by_part() {
    let full = json!({
        "Cmd": ["a"], "Env": ["A=b"], "Labels": {"l": "1"}, "Hostname": "h", "Image": "i",
        "Healthcheck": {"Test": ["CMD", "x"]}, "OnBuild": ["RUN y"], "Volumes": {"/v": {}},
    });
    assert!(is_same_config(&full, &full));
    for (key, value) in [
        ("Cmd", json!(["a", "b"])),
        ("Healthcheck", json!({"Test": ["CMD", "z"]})),
        ("Healthcheck", Value::Null),
        ("OnBuild", json!([])),
        ("Labels", json!({"l": "2"})),
        ("Volumes", json!({})),
        ("User", json!("u")),
        ("Unheard-of", json!("x")),
    ] {
        let mut other = full.clone();
        other[key] = value;
        assert!(!is_same_config(&full, &other), "{key}");
    }
    assert!(!is_same_config(&cmd(&["a b"]), &cmd(&["a", "b"])));
    let mut container = full.clone();
    (container["Hostname"], container["Image"], container["User"]) = (json!("other"), json!("other"), json!(""));
    assert!(is_same_config(&full, &container));
    assert!(!is_same_config(&Value::Null, &Value::Null), "no config is like no other");
    let memory = Memory::default();
    let base = memory.built(None, Value::Null, 1);
    assert_eq!(local(&memory, None, &Value::Null), None, "{base}");
}

#[test]
fn d17_another_platform_is_another_image() {
    let memory = Memory::default();
    let arm = json!({"architecture": "arm64", "container_config": {"Cmd": ["step"]}});
    memory.add(None, true, config(&[], &[], arm));
    assert_eq!(local(&memory, None, &cmd(&["step"])), None);
    let source = memory.add(None, false, config(&[made("a", 1)], &[1], json!({"architecture": "arm64"})));
    assert_eq!(ask(&mut memory.cache(&[source]), None, &cmd(&["a"])), None);
    // A variant counts where both name one (a stricter rule made every arm build miss, moby#49947).
    let v8 = memory.add(None, false, config(&[made("v", 1)], &[1], json!({"variant": "v8"})));
    assert!(ask(&mut memory.cache(&[v8]), None, &cmd(&["v"])).is_some());
}
