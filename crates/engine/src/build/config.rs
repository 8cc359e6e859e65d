//! The config that a stage's instructions add up to.

use plies_image::history_cache::KEY_FIELD;
use serde_json::{Map, Value, json};

/// PATH of an image that sets none, as docker has it.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What BuildKit's Dockerfile frontend leaves as a comment in every line (`dockerfile2llb`, `historyComment`): tools tell
/// by it what the text is like.
const HISTORY_COMMENT: &str = "buildkit.dockerfile.v0";

/// One line of an image's history.
#[derive(Debug, Clone)]
pub(crate) struct HistoryEntry {
    /// RFC 3339.
    pub(crate) created: Option<String>,
    pub(crate) created_by: String,
    /// The key of the step that it stands for.
    pub(crate) key: Option<String>,
    pub(crate) empty_layer: bool,
}

/// An image config in the making: the base image's, changed by instructions.
///
/// It stays JSON, so that fields of the base that we don't know survive. Keys come out sorted: equal configs are
/// equal bytes, and so equal image IDs.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    json: Map<String, Value>,
}

impl Config {
    /// The config of `FROM scratch`.
    pub(crate) fn scratch(platform: &plies_oci::Platform) -> Self {
        let mut json = Map::new();
        json.insert("architecture".into(), platform.architecture.clone().into());
        json.insert("os".into(), platform.os.clone().into());
        if let Some(variant) = &platform.variant {
            json.insert("variant".into(), variant.clone().into());
        }
        json.insert("config".into(), json!({"Env": [format!("PATH={DEFAULT_PATH}")], "WorkingDir": "/"}));
        Self { json }
    }

    /// The config of `FROM image`.
    pub(crate) fn from_image(config: &plies_oci::ImageConfig) -> Self {
        let json: Value = serde_json::from_slice(config.document().raw()).expect("because it was parsed before");
        let Value::Object(mut json) = json else { unreachable!("because it was parsed as an object before") };
        // What a container of the old builder was made from; it would describe the wrong image.
        for stale in ["container", "container_config", "id", "parent", "docker_version"] {
            json.remove(stale);
        }
        Self { json }
    }

    fn run(&self) -> Option<&Map<String, Value>> {
        self.json.get("config").and_then(Value::as_object)
    }

    fn run_mut(&mut self) -> &mut Map<String, Value> {
        let config = self.json.entry("config").or_insert_with(|| json!({}));
        if !config.is_object() {
            *config = json!({});
        }
        config.as_object_mut().expect("because it was just made one")
    }

    fn strings(&self, key: &str) -> Vec<String> {
        let list = self.run().and_then(|run| run.get(key)).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn string(&self, key: &str) -> Option<&str> {
        self.run().and_then(|run| run.get(key)).and_then(Value::as_str).filter(|text| !text.is_empty())
    }

    /// The environment, in order, `NAME=value` each.
    pub(crate) fn env(&self) -> Vec<String> {
        self.strings("Env")
    }

    pub(crate) fn set_env(&mut self, env: Vec<String>) {
        if !env.is_empty() {
            self.run_mut().insert("Env".into(), env.into());
        }
    }

    /// Where commands run; always absolute.
    pub(crate) fn working_dir(&self) -> &str {
        self.string("WorkingDir").unwrap_or("/")
    }

    pub(crate) fn set_working_dir(&mut self, dir: &str) {
        self.run_mut().insert("WorkingDir".into(), dir.into());
    }

    /// Who commands run as; empty means root.
    pub(crate) fn user(&self) -> &str {
        self.string("User").unwrap_or("")
    }

    pub(crate) fn set_user(&mut self, user: &str) {
        self.run_mut().insert("User".into(), user.into());
    }

    pub(crate) fn set_stop_signal(&mut self, signal: &str) {
        self.run_mut().insert("StopSignal".into(), signal.into());
    }

    /// The command of the shell form.
    pub(crate) fn shell(&self) -> Vec<String> {
        let shell = self.strings("Shell");
        if shell.is_empty() { vec!["/bin/sh".into(), "-c".into()] } else { shell }
    }

    /// Whether it names a shell.
    pub(crate) fn has_shell(&self) -> bool {
        !self.strings("Shell").is_empty()
    }

    pub(crate) fn set_shell(&mut self, shell: &[String]) {
        self.run_mut().insert("Shell".into(), json!(shell));
    }

    pub(crate) fn entrypoint(&self) -> Vec<String> {
        self.strings("Entrypoint")
    }

    pub(crate) fn cmd(&self) -> Vec<String> {
        self.strings("Cmd")
    }

    pub(crate) fn set_cmd(&mut self, cmd: &[String]) {
        self.run_mut().insert("Cmd".into(), json!(cmd));
        // Of use on Windows only; docker's builder says so everywhere.
        self.run_mut().insert("ArgsEscaped".into(), true.into());
    }

    /// Sets the entry point. A CMD that came from the base image was meant for the base's entry point, so it goes
    /// unless this stage set it; so docker does it.
    pub(crate) fn set_entrypoint(&mut self, entrypoint: &[String], keep_cmd: bool) {
        self.run_mut().insert("Entrypoint".into(), json!(entrypoint));
        if !keep_cmd {
            self.run_mut().remove("Cmd");
        }
    }

    pub(crate) fn set_healthcheck(&mut self, healthcheck: Value) {
        self.run_mut().insert("Healthcheck".into(), healthcheck);
    }

    pub(crate) fn set_label(&mut self, key: &str, value: &str) {
        self.insert_into("Labels", key, value.into());
    }

    pub(crate) fn add_volume(&mut self, path: &str) {
        self.insert_into("Volumes", path, json!({}));
    }

    pub(crate) fn expose(&mut self, port: &str) {
        self.insert_into("ExposedPorts", port, json!({}));
    }

    fn insert_into(&mut self, map: &str, key: &str, value: Value) {
        let entry = self.run_mut().entry(map).or_insert_with(|| json!({}));
        if !entry.is_object() {
            *entry = json!({});
        }
        entry.as_object_mut().expect("because it was just made one").insert(key.into(), value);
    }

    /// Adds an instruction for builds on top of this image.
    pub(crate) fn add_onbuild(&mut self, trigger: &str) {
        let mut triggers = self.strings("OnBuild");
        triggers.push(trigger.to_owned());
        self.run_mut().insert("OnBuild".into(), json!(triggers));
    }

    /// The instructions that the base left for this build, which then are done with.
    pub(crate) fn take_onbuild(&mut self) -> Vec<String> {
        let triggers = self.strings("OnBuild");
        if !triggers.is_empty() {
            self.run_mut().remove("OnBuild");
        }
        triggers
    }

    pub(crate) fn set_author(&mut self, author: &str) {
        self.json.insert("author".into(), author.into());
    }

    /// The history that came with the base image.
    pub(crate) fn history(&self) -> Vec<Value> {
        self.json.get("history").and_then(Value::as_array).cloned().unwrap_or_default()
    }

    /// The bytes of the finished config.
    pub(crate) fn finish(
        mut self,
        created: Option<&str>,
        diff_ids: &[plies_oci::DiffId],
        new: &[HistoryEntry],
    ) -> Vec<u8> {
        let mut history = self.history();
        // A base image may have layers that its history does not speak of. Readers pair the two in order, so ours must
        // not be taken for theirs.
        let filled = |line: &&Value| line["empty_layer"] != true;
        let new_layers = new.iter().filter(|line| !line.empty_layer).count();
        let told = history.iter().filter(filled).count() + new_layers;
        history.extend((told..diff_ids.len()).map(|_| json!({})));
        history.extend(new.iter().map(|entry| {
            let mut line = json!({"created_by": entry.created_by, "comment": HISTORY_COMMENT});
            if let Some(created) = &entry.created {
                line["created"] = created.as_str().into();
            }
            if let Some(key) = &entry.key {
                line[KEY_FIELD] = key.as_str().into();
            }
            if entry.empty_layer {
                line["empty_layer"] = true.into();
            }
            line
        }));
        self.json.insert("history".into(), history.into());
        if let Some(created) = created {
            self.json.insert("created".into(), created.into());
        }
        self.json.insert("rootfs".into(), json!({"type": "layers", "diff_ids": diff_ids}));
        Value::Object(self.json).to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plies_oci::{ImageConfig, Platform};

    fn scratch() -> Config {
        Config::scratch(&Platform { os: "linux".into(), architecture: "amd64".into(), variant: None })
    }

    #[test]
    fn fields_of_the_base_that_we_do_not_know_survive() {
        let base = br#"{"architecture":"amd64","os":"linux","moby.buildkit.x":1,"config":{"Odd":[1],"Cmd":["a"]},
            "rootfs":{"type":"layers","diff_ids":[]},"history":[{"created_by":"base","empty_layer":true}]}"#;
        let mut config = Config::from_image(&ImageConfig::parse(base).unwrap());
        config.set_env(vec!["A=3".into(), "B=2".into()]);
        let entry = HistoryEntry { created: None, created_by: "ENV".into(), key: None, empty_layer: true };
        let bytes = config.finish(None, &[], &[entry]);
        let json: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["moby.buildkit.x"], 1);
        assert_eq!(json["config"], json!({"Odd": [1], "Cmd": ["a"], "Env": ["A=3", "B=2"]}));
        assert_eq!(json["history"].as_array().unwrap().len(), 2);
        ImageConfig::parse(&bytes).unwrap();
    }

    #[test]
    fn history_pairs_with_layers_even_where_the_base_tells_none() {
        let diff = |byte| plies_oci::DiffId::from_bytes([byte; 32]);
        let entry = HistoryEntry { created: None, created_by: "COPY".into(), key: None, empty_layer: false };
        let bytes = scratch().finish(None, &[diff(1), diff(2), diff(3)], &[entry]);
        let json: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["history"], json!([{}, {}, {"created_by": "COPY", "comment": HISTORY_COMMENT}]));
    }

    #[test]
    fn an_entrypoint_drops_the_command_of_the_base_only() {
        let mut config = scratch();
        config.set_cmd(&["base".into()]);
        config.set_entrypoint(&["e".into()], false);
        assert_eq!(config.cmd(), Vec::<String>::new());
        config.set_cmd(&["own".into()]);
        config.set_entrypoint(&["f".into()], true);
        assert_eq!((config.entrypoint(), config.cmd()), (vec!["f".to_owned()], vec!["own".to_owned()]));
    }

    #[test]
    fn equal_instructions_give_equal_bytes() {
        let build = |labels: [&str; 3]| {
            let mut config = scratch();
            labels.iter().for_each(|label| config.set_label(label, "v"));
            config.finish(Some("2020-01-01T00:00:00Z"), &[], &[])
        };
        assert_eq!(build(["a", "b", "c"]), build(["c", "a", "b"]));
    }
}
