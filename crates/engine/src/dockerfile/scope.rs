//! Which variables an instruction sees.

use std::collections::{BTreeMap, BTreeSet};

use plies_oci::Platform;

use super::words::{Expansion, Lexer, Variables, WordError};
use super::{ArgDeclaration, Dockerfile, DockerfileError};

/// Arguments that `RUN` sees without an `ARG`, and that no cache key and no history contains.
const PROXY_ARGS: [&str; 10] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// What was given for a build: `--build-arg`, platforms, target; and what the Dockerfile's global `ARG`s make of it.
#[derive(Debug, Clone)]
pub struct BuildArgs {
    given: BTreeMap<String, String>,
    global: BTreeMap<String, String>,
    /// `global` as it were if nothing was given.
    defaults: BTreeMap<String, String>,
    /// The names of the global `ARG`s, and the predefined ones.
    declared: BTreeSet<String>,
}

impl BuildArgs {
    /// `given` are the `--build-arg`s; `target` is the stage asked for by name.
    ///
    /// # Errors
    /// A global `ARG` whose default can't be expanded.
    pub fn new(
        dockerfile: &Dockerfile,
        given: BTreeMap<String, String>,
        build: &Platform,
        target: &Platform,
        target_stage: Option<&str>,
    ) -> Result<Self, DockerfileError> {
        let mut predefined = BTreeMap::new();
        for (prefix, platform) in [("BUILD", build), ("TARGET", target)] {
            predefined.insert(format!("{prefix}PLATFORM"), platform.to_string());
            predefined.insert(format!("{prefix}OS"), platform.os.clone());
            predefined.insert(format!("{prefix}ARCH"), platform.architecture.clone());
            predefined.insert(format!("{prefix}VARIANT"), platform.variant.clone().unwrap_or_default());
        }
        predefined.insert("TARGETSTAGE".to_owned(), target_stage.unwrap_or("default").to_owned());
        let declared = dockerfile.global_args.iter().flat_map(|instruction| &instruction.args).map(|arg| &arg.name);
        let declared = declared.chain(predefined.keys()).cloned().collect();
        let global = Self::global(dockerfile, &given, predefined.clone())?;
        // Only for a warning, and what fails without build arguments can't be told about like that.
        let defaults = Self::global(dockerfile, &BTreeMap::new(), predefined).unwrap_or_else(|_| global.clone());
        Ok(Self { given, global, defaults, declared })
    }

    /// The variables before the first `FROM`.
    fn global(
        dockerfile: &Dockerfile,
        given: &BTreeMap<String, String>,
        predefined: BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, String>, DockerfileError> {
        let mut global = predefined;
        // The predefined ones can be overridden like any.
        for (name, value) in &mut global {
            if let Some(given) = given.get(name) {
                value.clone_from(given);
            }
        }
        let lexer = Lexer::new(dockerfile.escape);
        for instruction in &dockerfile.global_args {
            for arg in &instruction.args {
                let value = match (given.get(&arg.name), &arg.default) {
                    (Some(given), _) => given.clone(),
                    (None, Some(default)) => {
                        lexer
                            .expand(default, &global)
                            .map_err(|e| dockerfile.error(instruction.location, default, e.why))?
                            .text
                    }
                    (None, None) => continue,
                };
                global.insert(arg.name.clone(), value);
            }
        }
        Ok(global)
    }

    /// What `FROM` would see without any build argument.
    pub(crate) fn defaults(&self) -> &dyn Variables {
        &self.defaults
    }

    /// The names that `FROM` may use.
    pub(crate) fn declared(&self) -> impl Iterator<Item = &str> {
        self.declared.iter().map(String::as_str)
    }

    /// Whether `FROM` may use `name`, which may be unset all the same.
    pub(crate) fn is_declared(&self, name: &str) -> bool {
        self.declared.contains(name)
    }

    /// What a `--build-arg` says.
    pub(crate) fn given(&self, name: &str) -> Option<&str> {
        self.given.get(name).map(String::as_str)
    }

    /// What `FROM` sees: the global `ARG`s and the predefined ones.
    pub fn for_from(&self) -> &dyn Variables {
        &self.global
    }

    /// The `--build-arg`s that no `ARG` of the given names took, in order: worth a warning.
    pub fn unused<'a>(&'a self, dockerfile: &Dockerfile) -> Vec<&'a str> {
        use super::InstructionKind;
        let global = dockerfile.global_args.iter().flat_map(|instruction| &instruction.args);
        let in_stages = dockerfile.stages.iter().flat_map(|stage| &stage.instructions).filter_map(|i| match &i.kind {
            InstructionKind::Arg(args) => Some(args),
            _ => None,
        });
        let declared: std::collections::BTreeSet<&str> =
            global.chain(in_stages.flatten()).map(|arg| arg.name.as_str()).collect();
        // They mean something without being declared.
        let predefined =
            |name: &str| PROXY_ARGS.contains(&name) || name.starts_with("BUILDKIT_") || name == "SOURCE_DATE_EPOCH";
        self.given.keys().map(String::as_str).filter(|name| !declared.contains(name) && !predefined(name)).collect()
    }

    /// The proxy settings for `RUN`: there without an `ARG`, and to be left out of cache keys and history.
    pub fn proxies(&self) -> impl Iterator<Item = (&str, &str)> {
        PROXY_ARGS.iter().filter_map(|name| Some((*name, self.given.get(*name)?.as_str())))
    }
}

/// The variables of one stage as it goes along: its environment and the arguments declared so far. Whichever of `ENV`
/// and `ARG` came last counts. A stage on top of another starts with [`Scope::for_child`].
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// In order of first appearance, as an image's configuration lists them.
    variables: Vec<Variable>,
    /// What `ARG` declared, in order, whether it has a value or not.
    declared: Vec<String>,
}

#[derive(Debug, Clone)]
struct Variable {
    name: String,
    /// What words and `RUN` see.
    value: String,
    /// What the image's configuration says: `None` for an `ARG`.
    env: Option<String>,
    /// The value comes from an `ARG`.
    is_arg: bool,
}

impl Scope {
    /// Starts from an image's environment (`NAME=value` each).
    pub fn new(env: &[String]) -> Self {
        let mut scope = Self::default();
        for line in env {
            let (name, value) = line.split_once('=').unwrap_or((line, ""));
            scope.set_env(name, value);
        }
        scope
    }

    /// `ENV name=value`, already expanded.
    pub fn set_env(&mut self, name: &str, value: &str) {
        let variable = self.variable(name);
        value.clone_into(&mut variable.value);
        variable.env = Some(value.to_owned());
        variable.is_arg = false;
    }

    /// `ARG`: declares one name with what was given for it, its default, or the global value; without any of these the
    /// name stays unset. Tells what its value came from, if it has one.
    ///
    /// # Errors
    /// A default that can't be expanded.
    pub fn declare(
        &mut self,
        arg: &ArgDeclaration,
        args: &BuildArgs,
        lexer: &Lexer,
    ) -> Result<Option<Expansion>, WordError> {
        if !self.declares(&arg.name) {
            self.declared.push(arg.name.clone());
        }
        let expansion = match (args.given.get(&arg.name), &arg.default, args.global.get(&arg.name)) {
            (Some(given), _, _) => Expansion { text: given.clone(), ..Expansion::default() },
            (None, Some(default), _) => lexer.expand(default, self)?,
            (None, None, Some(global)) => Expansion { text: global.clone(), ..Expansion::default() },
            (None, None, None) => return Ok(None),
        };
        let variable = self.variable(&arg.name);
        variable.value.clone_from(&expansion.text);
        variable.is_arg = true;
        Ok(Some(expansion))
    }

    /// Whether an `ARG` declares `name`, whether it has a value or not.
    pub(crate) fn declares(&self, name: &str) -> bool {
        self.declared.iter().any(|declared| declared == name)
    }

    /// The environment for the image's configuration: `ENV` only.
    pub fn env(&self) -> Vec<String> {
        self.variables.iter().filter_map(|v| Some(format!("{}={}", v.name, v.env.as_ref()?))).collect()
    }

    /// The environment for `RUN`: `ENV` and declared `ARG`s.
    pub fn run_env(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|variable| (variable.name.as_str(), variable.value.as_str()))
    }

    /// All that is declared, as `BuildKit` tells it in front of a command (`RUN |1 NAME=value …`): with the values that
    /// the command sees, and none for what is not set.
    pub fn declared(&self) -> impl Iterator<Item = (&str, &str)> {
        self.declared.iter().map(|name| (name.as_str(), self.lookup(name).unwrap_or_default()))
    }

    /// The declared arguments that have a value, and one of their own.
    pub fn args(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().filter(|v| v.is_arg).map(|v| (v.name.as_str(), v.value.as_str()))
    }

    /// What a stage `FROM` this one starts with: everything, as in `BuildKit`, where the image's environment goes before
    /// the arguments.
    #[must_use]
    pub fn for_child(&self) -> Self {
        let mut child = self.clone();
        for variable in &mut child.variables {
            if let Some(env) = &variable.env {
                variable.value.clone_from(env);
            }
        }
        child
    }

    fn variable(&mut self, name: &str) -> &mut Variable {
        let at = self.variables.iter().position(|variable| variable.name == name).unwrap_or_else(|| {
            let new = Variable { name: name.to_owned(), value: String::new(), env: None, is_arg: false };
            self.variables.push(new);
            self.variables.len() - 1
        });
        &mut self.variables[at]
    }
}

impl Variables for Scope {
    fn lookup(&self, name: &str) -> Option<&str> {
        self.variables.iter().find(|variable| variable.name == name).map(|variable| variable.value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dockerfile::{InstructionKind, parse};

    fn platform(architecture: &str) -> Platform {
        Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    fn given(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// Runs the ARG and ENV of the only stage.
    fn scope(text: &str, pairs: &[(&str, &str)]) -> (Scope, BuildArgs) {
        let file = parse("Dockerfile", text.as_bytes()).unwrap();
        let args = BuildArgs::new(&file, given(pairs), &platform("amd64"), &platform("arm64"), None).unwrap();
        let lexer = Lexer::new('\\');
        let mut scope = Scope::new(&["PATH=/bin".to_owned()]);
        for instruction in &file.stages[0].instructions {
            match &instruction.kind {
                InstructionKind::Arg(declared) => {
                    for arg in declared {
                        scope.declare(arg, &args, &lexer).unwrap();
                    }
                }
                InstructionKind::Env(pairs) => {
                    for pair in pairs {
                        let value = lexer.expand(&pair.value, &scope).unwrap().text;
                        scope.set_env(&pair.name, &value);
                    }
                }
                _ => {}
            }
        }
        (scope, args)
    }

    #[test]
    fn global_args_reach_from_and_stages_only_when_redeclared() {
        let text = "ARG TAG=1\nARG IMAGE=base:${TAG}\nFROM ${IMAGE}\nRUN true\n";
        let (stage, args) = scope(text, &[]);
        assert_eq!(args.for_from().lookup("IMAGE"), Some("base:1"));
        assert_eq!(stage.lookup("TAG"), None);
        let (stage, _) = scope("ARG TAG=1\nFROM x\nARG TAG\n", &[]);
        assert_eq!(stage.lookup("TAG"), Some("1"));
        let (stage, _) = scope("ARG TAG=1\nFROM x\nARG TAG=own\n", &[]);
        assert_eq!(stage.lookup("TAG"), Some("own"));
        let (stage, args) = scope("ARG TAG=1\nFROM x\nARG TAG=own\n", &[("TAG", "given")]);
        assert_eq!(stage.lookup("TAG"), Some("given"));
        assert_eq!(args.for_from().lookup("TAG"), Some("given"));
    }

    #[test]
    fn args_reach_run_but_not_the_image() {
        let (stage, _) = scope("FROM x\nARG A=1\nENV B=${A}2\nARG C\n", &[]);
        assert_eq!(stage.env(), ["PATH=/bin", "B=12"]);
        assert_eq!(stage.run_env().collect::<Vec<_>>(), [("PATH", "/bin"), ("A", "1"), ("B", "12")]);
        assert_eq!(stage.args().collect::<Vec<_>>(), [("A", "1")]);
        assert_eq!(stage.lookup("C"), None);
    }

    #[test]
    fn later_of_env_and_arg_counts_and_the_image_keeps_its_env() {
        let (stage, _) = scope("FROM x\nARG V=arg\nENV V=env\n", &[]);
        assert_eq!(stage.lookup("V"), Some("env"));
        let (stage, _) = scope("FROM x\nENV V=env\nARG V=arg\n", &[]);
        assert_eq!(stage.lookup("V"), Some("arg"));
        assert_eq!(stage.env(), ["PATH=/bin", "V=env"]);
    }

    #[test]
    fn platform_args_are_predefined_and_overridable() {
        let (stage, args) =
            scope("FROM x\nARG TARGETARCH\nARG TARGETPLATFORM\nARG BUILDARCH\n", &[("BUILDARCH", "mips")]);
        assert_eq!(stage.lookup("TARGETARCH"), Some("arm64"));
        assert_eq!(stage.lookup("TARGETPLATFORM"), Some("linux/arm64"));
        assert_eq!(stage.lookup("BUILDARCH"), Some("mips"));
        assert_eq!(args.for_from().lookup("BUILDPLATFORM"), Some("linux/amd64"));
    }

    #[test]
    fn proxies_need_no_declaration_and_unused_args_are_told() {
        let text = "FROM x\nARG USED\n";
        let (_, args) = scope(text, &[("http_proxy", "p"), ("USED", "1"), ("TYPO", "1")]);
        assert_eq!(args.proxies().collect::<Vec<_>>(), [("http_proxy", "p")]);
        assert_eq!(args.unused(&parse("D", text.as_bytes()).unwrap()), ["TYPO"]);
    }
}
