//! What `docker build --check` warns of: files that build, but perhaps not what was meant.
//!
//! The rules and their names are `BuildKit`'s, so that a `# check=skip=…` line means the same here. Some are found while
//! parsing, the others by whoever expands the file; [`Dockerfile::wanted`] leaves out what the file does not want to
//! hear.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::{Dockerfile, DockerfileError, Instruction, Location, Stage};

/// A rule that a file may go against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[non_exhaustive]
pub enum Rule {
    /// The name of a stage is not lower case.
    StageNameCasing,
    /// `FROM x as y`, `from x AS y`.
    FromAsCasing,
    /// An empty line inside an instruction.
    NoEmptyContinuation,
    /// Instructions in upper and in lower case.
    ConsistentInstructionCasing,
    /// Two stages of one name.
    DuplicateStageName,
    /// A stage called `scratch` or `context`.
    ReservedStageName,
    /// A shell stands between the container's init and the command, and keeps signals from it.
    JSONArgsRecommended,
    /// `MAINTAINER`.
    MaintainerDeprecated,
    /// `FROM` uses a variable that no `ARG` declares.
    UndefinedArgInFrom,
    /// A relative `WORKDIR` on top of whatever the base image has.
    WorkdirRelativePath,
    /// A variable that nothing sets.
    UndefinedVar,
    /// Two `CMD`s, `ENTRYPOINT`s or `HEALTHCHECK`s in one stage.
    MultipleInstructionsDisallowed,
    /// `ENV name value`.
    LegacyKeyValueFormat,
    /// The base image is made for another platform.
    InvalidBaseImagePlatform,
    /// `FROM --platform=$TARGETPLATFORM`, which is the default.
    RedundantTargetPlatform,
    /// A secret in `ARG` or `ENV`, which stay in the image.
    SecretsUsedInArgOrEnv,
    /// Without build arguments, `FROM` names no image.
    InvalidDefaultArgInFrom,
    /// `FROM --platform` names one platform for all builds.
    FromPlatformFlagConstDisallowed,
    /// `COPY` names something that the ignore file hides.
    CopyIgnoredFile,
    /// A description that describes something else. Experimental.
    InvalidDefinitionDescription,
    /// `EXPOSE 80/TCP`.
    ExposeProtoCasing,
    /// `EXPOSE 8080:80`.
    ExposeInvalidFormat,
}

impl Rule {
    /// Rules that are checked only where they are asked for.
    fn is_experimental(self) -> bool {
        self == Self::InvalidDefinitionDescription
    }
}

/// The name that `# check=` lines use.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One thing that goes against a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    rule: Rule,
    /// The instruction that it is about, whose comments may say that nobody wants to hear it.
    location: Location,
    told: DockerfileError,
}

impl Warning {
    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The Dockerfile's name.
    pub fn file(&self) -> &str {
        self.told.file()
    }

    /// The line, from 1.
    pub fn line(&self) -> u32 {
        self.told.line()
    }

    /// The same, told about a part of the instruction at `at`.
    #[must_use]
    pub(super) fn about(self, at: Location) -> Self {
        Self { location: at, ..self }
    }

    /// What is the matter, without the place.
    pub fn message(&self) -> &str {
        self.told.message()
    }
}

/// The place, the rule, what is the matter, and the line with a caret.
impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.told.fmt_with(f, &format!("{}: ", self.rule))
    }
}

impl Serialize for Warning {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let mut fields = serializer.serialize_struct("Warning", 4)?;
        fields.serialize_field("rule", &self.rule)?;
        fields.serialize_field("message", self.message())?;
        fields.serialize_field("file", self.file())?;
        fields.serialize_field("line", &self.line())?;
        fields.end()
    }
}

/// What a `# check=` line asks for: `skip=Rule,…` or `skip=all`, `experimental=…`, `error=true`, with `;` between.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckOptions {
    skip: Rules,
    experimental: Rules,
    /// A warning fails the build.
    pub error: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rules {
    All,
    /// By name: a rule that we don't know is none that we could find.
    Named(BTreeSet<String>),
}

impl Default for Rules {
    fn default() -> Self {
        Self::Named(BTreeSet::new())
    }
}

impl Rules {
    fn parse(text: &str) -> Self {
        match text.trim() {
            "all" => Self::All,
            names => Self::Named(names.split(',').map(|name| name.trim().to_owned()).collect()),
        }
    }

    fn hold(&self, rule: Rule) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.contains(&rule.to_string()),
        }
    }
}

impl CheckOptions {
    /// Parses the value of the line.
    ///
    /// # Errors
    /// A sentence, for an option that there is not or a value that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        // What stands behind a blank is a comment, as for `syntax`.
        let text = text.split(' ').next().unwrap_or_default();
        let mut options = Self::default();
        for option in text.split(';').filter(|option| !option.is_empty()) {
            match option.split_once('=').map(|(key, value)| (key.trim(), value)) {
                Some(("skip", value)) => options.skip = Rules::parse(value),
                Some(("experimental", value)) => options.experimental = Rules::parse(value),
                Some(("error", value)) => {
                    options.error = match value.trim().to_ascii_lowercase().as_str() {
                        "true" | "1" | "t" => true,
                        "false" | "0" | "f" => false,
                        _ => return Err(format!("error in a check directive is true or false, not {value:?}")),
                    }
                }
                _ => {
                    return Err(format!("unknown check option {option:?}: expected skip=…, experimental=… or error=…"));
                }
            }
        }
        Ok(options)
    }

    fn wants(&self, rule: Rule) -> bool {
        if rule.is_experimental() { self.experimental.hold(rule) } else { !self.skip.hold(rule) }
    }
}

/// A warning before its file is known: the rule, what to point at, and the message.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) rule: Rule,
    pub(super) focus: String,
    pub(super) message: String,
}

impl Dockerfile {
    /// A warning about the instruction at `at`; `focus` is the part of it to point at.
    pub fn warning(&self, at: Location, focus: &str, rule: Rule, message: impl Into<String>) -> Warning {
        Warning { rule, location: at, told: self.error(at, focus, message) }
    }

    /// What was found while parsing, and the warnings `more` of whoever expanded the file, in the order of their lines:
    /// those that `options` and the comments above an instruction don't skip, each once. `options` are the file's own
    /// unless somebody overrides them.
    #[must_use]
    pub fn wanted(&self, more: Vec<Warning>, options: Option<&CheckOptions>) -> Vec<Warning> {
        let options = options.unwrap_or(&self.check);
        let skipped = |warning: &Warning| {
            let own = self.check_above.get(&warning.location.first_line);
            own.is_some_and(|own| !warning.rule.is_experimental() && own.skip.hold(warning.rule))
        };
        let asked = |warning: &Warning| {
            let own = self.check_above.get(&warning.location.first_line);
            options.wants(warning.rule) || own.is_some_and(|own| own.experimental.hold(warning.rule))
        };
        let all = self.found.iter().cloned().chain(more);
        let mut wanted: Vec<Warning> = all.filter(|warning| asked(warning) && !skipped(warning)).collect();
        wanted.sort_by_key(|warning| (warning.line(), warning.rule));
        wanted.dedup();
        wanted
    }

    /// What only shows in all stages together.
    pub(super) fn check_stages(&self) -> Vec<Warning> {
        let mut found = Vec::new();
        let mut names: BTreeSet<&str> = BTreeSet::new();
        for stage in &self.stages {
            let Some(name) = stage.name.as_deref() else { continue };
            if ["scratch", "context"].contains(&name) {
                let message = format!("{name} means something else in FROM and --from: give the stage another name");
                found.push(self.warning(stage.location, name, Rule::ReservedStageName, message));
            }
            if !names.insert(name) {
                let message = format!("there is a stage {name} already: only the last one can be named");
                found.push(self.warning(stage.location, name, Rule::DuplicateStageName, message));
            }
        }
        let words = || {
            self.stages.iter().flat_map(|Stage { location, text, instructions, .. }| {
                let inside = instructions.iter().map(|Instruction { location, text, .. }| (*location, text.as_str()));
                std::iter::once((*location, text.as_str())).chain(inside)
            })
        };
        let words = || words().map(|(at, text)| (at, text.split_whitespace().next().unwrap_or_default()));
        let count = |is: fn(&char) -> bool| words().filter(|(_, word)| word.chars().all(|c| is(&c))).count();
        let (expected, is_right): (&str, fn(&char) -> bool) =
            match count(char::is_ascii_lowercase) > count(char::is_ascii_uppercase) {
                true => ("lower", char::is_ascii_lowercase),
                false => ("upper", char::is_ascii_uppercase),
            };
        for (at, word) in words().filter(|(_, word)| !word.chars().all(|c| is_right(&c))) {
            let message = format!("most instructions are written in {expected} case, {word} is not");
            found.push(self.warning(at, word, Rule::ConsistentInstructionCasing, message));
        }
        found
    }
}

/// Whether a variable's name says that it holds a secret, as `BuildKit` decides.
pub fn names_a_secret(name: &str) -> bool {
    const SECRETS: [&str; 10] =
        ["apikey", "auth", "credential", "credentials", "key", "password", "pword", "passwd", "secret", "token"];
    const HARMLESS: [&str; 3] = ["public", "file", "version"];
    let has = |words: &[&str]| name.split('_').any(|word| words.iter().any(|known| word.eq_ignore_ascii_case(known)));
    has(&SECRETS) && !has(&HARMLESS)
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    /// Line and rule of each warning that parsing gives.
    fn rules(text: &str) -> Vec<(u32, String)> {
        let file = parse("Dockerfile", text.as_bytes()).unwrap();
        file.wanted(vec![], None).iter().map(|warning| (warning.line(), warning.rule().to_string())).collect()
    }

    fn expected(expected: &[(u32, &str)]) -> Vec<(u32, String)> {
        expected.iter().map(|(line, rule)| (*line, (*rule).to_owned())).collect()
    }

    #[test]
    fn parsing_finds_what_needs_no_expansion() {
        let text = "FROM a AS Base\nFROM b as two\nfrom c as two\nFROM d AS scratch\nRUN x \\\n\n  y\nENV A b\nLABEL c d\n\
                    MAINTAINER me\nRun z\n";
        let found = [
            (1, "StageNameCasing"),
            (2, "FromAsCasing"),
            (3, "ConsistentInstructionCasing"),
            (3, "DuplicateStageName"),
            (4, "ReservedStageName"),
            (6, "NoEmptyContinuation"),
            (8, "LegacyKeyValueFormat"),
            (9, "LegacyKeyValueFormat"),
            (10, "MaintainerDeprecated"),
            (11, "ConsistentInstructionCasing"),
        ];
        let mut seen = rules(text);
        seen.sort();
        assert_eq!(seen, expected(&found));
        // A clean file.
        assert_eq!(rules("# syntax=docker/dockerfile:1\nFROM a AS base\nENV A=b\nFROM base\n"), []);
    }

    #[test]
    fn files_and_comments_say_what_they_skip() {
        let body = "FROM a AS Base\nMAINTAINER me\n";
        assert_eq!(rules(&format!("# check=skip=all\n{body}")), []);
        let some = rules(&format!("# check=skip=StageNameCasing,Unknown comment\n{body}"));
        assert_eq!(some, expected(&[(3, "MaintainerDeprecated")]));
        assert_eq!(
            rules("# check=skip=JSONArgsRecommended;error=true\nFROM a AS Base\n"),
            expected(&[(2, "StageNameCasing")])
        );
        let above = "FROM a AS Base\n# check=skip=MaintainerDeprecated\nMAINTAINER me\nMAINTAINER you\n";
        assert_eq!(rules(above), expected(&[(1, "StageNameCasing"), (4, "MaintainerDeprecated")]));
        let error = |text: &str| parse("D", text.as_bytes()).unwrap_err().to_string();
        assert!(error("# check=skipp=x\nFROM a\n").starts_with("D:1: unknown check option \"skipp=x\""));
        assert!(error("# check=error=maybe\nFROM a\n").starts_with("D:1: error in a check directive"));
        assert!(parse("D", b"# check=error=true\nFROM a\n").unwrap().check.error);
    }

    #[test]
    fn descriptions_are_checked_where_that_is_asked_for() {
        let text = "# base is where it begins\nFROM a AS base\n# else\nARG version\n# version of it\nARG version\n";
        assert_eq!(rules(text), []);
        let asked = rules(&format!("# check=experimental=all\n{text}"));
        assert_eq!(asked, expected(&[(5, "InvalidDefinitionDescription")]));
    }

    #[test]
    fn warnings_show_their_line() {
        let file = parse("Dockerfile", b"FROM a AS Base\n").unwrap();
        let text = file.wanted(vec![], None)[0].to_string();
        assert_eq!(
            text,
            "Dockerfile:1: StageNameCasing: the stage name Base is not lower case\n  FROM a AS Base\n            ^^^^"
        );
    }

    #[test]
    fn names_of_secrets() {
        for name in ["API_KEY", "password", "GITHUB_TOKEN", "my_secret_x", "AUTH"] {
            assert!(names_a_secret(name), "{name}");
        }
        for name in ["KEYBOARD", "PUBLIC_KEY", "PASSWORD_FILE", "TOKEN_VERSION", "SECRETS", "monkey"] {
            assert!(!names_a_secret(name), "{name}");
        }
    }
}
