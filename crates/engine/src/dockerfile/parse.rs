//! Logical lines as instructions.

use std::collections::{BTreeMap, HashMap};

use super::check::{CheckOptions, Found, Rule};
use super::error::{DockerfileError, Location, suggest};
use super::lines::{self, LogicalLine};
use super::{
    Add, ArgDeclaration, CommandLine, Copy, CopyFrom, CopySource, Dockerfile, GlobalArg, Healthcheck, Heredoc,
    Instruction, InstructionKind, MountError, Pair, Run, RunMount, RunNetwork, RunSecurity, Stage, mount,
};

const INSTRUCTIONS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// How many instructions a file may have: a bound on memory, a hundred times what generated files have.
const INSTRUCTIONS_MAX: usize = 100_000;

/// Parses a Dockerfile. `file` is its name for messages.
///
/// # Errors
/// The first mistake, with its line.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Dockerfile, DockerfileError> {
    let lines = lines::split(file, bytes, holds_heredocs)?;
    let mut dockerfile = Dockerfile {
        file: file.to_owned(),
        lines: lines.physical,
        escape: lines.escape,
        syntax: lines.syntax,
        check: lines.check,
        check_above: BTreeMap::new(),
        found: Vec::new(),
        global_args: Vec::new(),
        stages: Vec::new(),
    };
    if lines.logical.len() > INSTRUCTIONS_MAX {
        let message =
            format!("{} instructions are more than a file may have ({INSTRUCTIONS_MAX})", lines.logical.len());
        return Err(dockerfile.error(Location::default(), "", message));
    }
    for line in lines.logical {
        let at = line.location;
        let mut parser = Parser { escape: dockerfile.escape, found: Vec::new() };
        let parsed = parser.parse(&line);
        let found = parser.found.into_iter();
        let found: Vec<_> =
            found.map(|found| dockerfile.warning(at, &found.focus, found.rule, found.message)).collect();
        dockerfile.found.extend(found);
        if let Some(empty) = line.empty_line {
            let empty = Location { first_line: empty, last_line: empty };
            let message = "an empty line stands inside an instruction: one day it will end it";
            let warning = dockerfile.warning(empty, "", Rule::NoEmptyContinuation, message).about(at);
            dockerfile.found.push(warning);
        }
        // Of several, the first counts.
        let above = line.comments.iter().find_map(|comment| comment.strip_prefix("check=")).map(CheckOptions::parse);
        if let Some(Ok(options)) = above {
            dockerfile.check_above.insert(at.first_line, options);
        }
        match parsed.map_err(|mistake| dockerfile.error(at, &mistake.focus, mistake.message))? {
            Parsed::From(stage) => dockerfile.stages.push(stage),
            Parsed::Instruction(InstructionKind::Arg(args)) if dockerfile.stages.is_empty() => {
                dockerfile.global_args.push(GlobalArg { location: at, args });
            }
            Parsed::Instruction(kind) => match dockerfile.stages.last_mut() {
                Some(stage) => {
                    stage.instructions.push(Instruction { location: at, text: line.text.trim().to_owned(), kind })
                }
                None => {
                    let word = first_word(&line.text);
                    let message =
                        format!("{} before the first FROM: only ARG can stand there", word.to_ascii_uppercase());
                    return Err(dockerfile.error(at, word, message));
                }
            },
        }
    }
    if dockerfile.stages.is_empty() {
        return Err(dockerfile.error(Location::default(), "", "the file has no FROM: a stage is expected"));
    }
    let mut stages = std::mem::take(&mut dockerfile.stages);
    let names = StageNames::of(&stages);
    for (own, stage) in stages.iter_mut().enumerate() {
        for Instruction { location, kind, .. } in &mut stage.instructions {
            names.resolve(own, kind).map_err(|mistake| dockerfile.error(*location, &mistake.focus, mistake.message))?;
        }
    }
    dockerfile.stages = stages;
    let found = dockerfile.check_stages();
    dockerfile.found.extend(found);
    Ok(dockerfile)
}

impl Dockerfile {
    /// Parses an instruction that a base image left for the builds on top of it, as one of the stage `own` at its `FROM`.
    ///
    /// # Errors
    /// A sentence.
    pub fn trigger(&self, text: &str, from: Location, own: usize) -> Result<Instruction, String> {
        let lines = lines::split("ONBUILD", text.as_bytes(), holds_heredocs).map_err(|e| e.message().to_owned())?;
        let [line] = lines.logical.as_slice() else { return Err("it is not one instruction".to_owned()) };
        let parsed = Parser { escape: lines.escape, found: Vec::new() }.parse(line);
        let mut kind = match parsed.map_err(|mistake| mistake.message)? {
            Parsed::Instruction(kind) => kind,
            Parsed::From(_) => return Err("FROM can't be the instruction of an ONBUILD".to_owned()),
        };
        let before = &self.stages[..own];
        StageNames::of(before).resolve(own, &mut kind).map_err(|mistake| mistake.message)?;
        Ok(Instruction { location: from, text: line.text.trim().to_owned(), kind })
    }
}

/// The stages that `--from` can name: those that come later too.
struct StageNames {
    /// Names in lower case, of equal ones the last.
    numbers: HashMap<String, usize>,
    count: usize,
}

impl StageNames {
    fn of(stages: &[Stage]) -> Self {
        let named = stages.iter().enumerate().filter_map(|(number, stage)| Some((stage.name.clone()?, number)));
        Self { numbers: named.collect(), count: stages.len() }
    }

    /// Tells the stages and the images in an instruction's `from` apart.
    fn resolve(&self, own: usize, kind: &mut InstructionKind) -> Result<(), Mistake> {
        match kind {
            InstructionKind::Copy(copy) => self.resolve_one(own, &mut copy.from),
            InstructionKind::Run(run) => run
                .mounts
                .iter_mut()
                .filter_map(|mount| mount.from.as_mut())
                .try_for_each(|from| self.resolve_one(own, from)),
            _ => Ok(()),
        }
    }

    fn resolve_one(&self, own: usize, from: &mut CopyFrom) -> Result<(), Mistake> {
        let CopyFrom::Image(name) = &*from else { return Ok(()) };
        let number = match self.numbers.get(&name.to_ascii_lowercase()) {
            Some(number) => *number,
            None if name.bytes().all(|byte| byte.is_ascii_digit()) => match name.parse::<usize>() {
                Ok(number) if number < self.count => number,
                _ if self.count == 0 => {
                    return mistake(name, format!("no stage {name}: there is none before this one"));
                }
                _ => return mistake(name, format!("no stage {name}: there are 0 to {}", self.count - 1)),
            },
            // Whether an image of that name exists is found out later: see [`Dockerfile::stage_like`].
            None => return Ok(()),
        };
        if number == own {
            return mistake(name, format!("the stage {name} can't take files from itself"));
        }
        *from = CopyFrom::Stage(number);
        Ok(())
    }
}

/// What is wrong, and which part of the line to point at.
struct Mistake {
    focus: String,
    message: String,
}

fn mistake<T>(focus: impl Into<String>, message: impl Into<String>) -> Result<T, Mistake> {
    Err(Mistake { focus: focus.into(), message: message.into() })
}

enum Parsed {
    From(Stage),
    Instruction(InstructionKind),
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or("")
}

/// Blanks that separate words: what `BuildKit` splits at.
fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\x0b' | '\x0c' | '\r')
}

/// `RUN`, `COPY` and `ADD` (also behind `ONBUILD`) hold here-documents, unless they are JSON.
fn holds_heredocs(text: &str, escape: char) -> bool {
    let text = text.trim();
    let (command, rest) = text.split_once(is_blank).unwrap_or((text, ""));
    match command.to_ascii_uppercase().as_str() {
        "ONBUILD" => !first_word(rest).eq_ignore_ascii_case("ONBUILD") && holds_heredocs(rest, escape),
        "RUN" | "COPY" | "ADD" => {
            let (_, rest) = flags(rest, escape);
            !matches!(json(rest), Json::Strings(_))
        }
        _ => false,
    }
}

/// The parser of one instruction.
struct Parser {
    escape: char,
    /// What is worth a warning.
    found: Vec<Found>,
}

impl Parser {
    fn warn(&mut self, rule: Rule, focus: &str, message: impl Into<String>) {
        self.found.push(Found { rule, focus: focus.to_owned(), message: message.into() });
    }

    /// A comment above something with names begins with one of them, or describes something else.
    fn check_description<'n>(&mut self, line: &LogicalLine, names: impl IntoIterator<Item = &'n str>) {
        let Some(described) = line.comments.last().and_then(|comment| comment.split(' ').next()) else { return };
        let mut names = names.into_iter().peekable();
        let Some(first) = names.peek().copied() else { return };
        if !names.any(|name| name == described) {
            let message = format!("a comment here describes {first}: write `# {first} …`, or leave a `#` line between");
            self.warn(Rule::InvalidDefinitionDescription, first, message);
        }
    }

    fn parse(&mut self, line: &LogicalLine) -> Result<Parsed, Mistake> {
        let text = line.text.trim();
        let (word, rest) = text.split_once(is_blank).unwrap_or((text, ""));
        let command = word.to_ascii_uppercase();
        let (flags, rest) = flags(rest, self.escape);
        let flags = Flags { command: &command, given: flags };
        let rest = rest.trim();
        let kind = match command.as_str() {
            "FROM" => return self.from(line, rest, flags).map(Parsed::From),
            "ONBUILD" => {
                flags.none()?;
                let text = onbuild_text(rest, &line.heredocs);
                self.onbuild(line, rest)?;
                InstructionKind::Onbuild(text)
            }
            "RUN" => {
                let (mounts, network, security) = run_flags(flags)?;
                if rest.is_empty() {
                    return mistake(word, "RUN requires at least one argument: a command");
                }
                let (command, heredocs) = (command_line(rest)?, line.heredocs.clone());
                InstructionKind::Run(Run { command, heredocs, mounts, network, security })
            }
            "COPY" => InstructionKind::Copy(self.copy(rest, flags, line)?),
            "ADD" => InstructionKind::Add(add(rest, flags, line)?),
            "ENV" => {
                flags.none()?;
                InstructionKind::Env(self.pairs("ENV", rest)?)
            }
            "LABEL" => {
                flags.none()?;
                InstructionKind::Label(self.pairs("LABEL", rest)?)
            }
            "ARG" => {
                flags.none()?;
                let args = self.args(rest)?;
                self.check_description(line, args.iter().map(|arg| arg.name.as_str()));
                InstructionKind::Arg(args)
            }
            "WORKDIR" | "USER" | "STOPSIGNAL" | "MAINTAINER" => {
                flags.none()?;
                if rest.is_empty() {
                    return mistake(word, format!("{command} requires exactly one argument"));
                }
                let value = rest.to_owned();
                match command.as_str() {
                    "WORKDIR" => InstructionKind::Workdir(value),
                    "USER" => InstructionKind::User(value),
                    "STOPSIGNAL" => InstructionKind::StopSignal(value),
                    _ => {
                        let message = "MAINTAINER is deprecated: use LABEL org.opencontainers.image.authors=…";
                        self.warn(Rule::MaintainerDeprecated, word, message);
                        InstructionKind::Maintainer(value)
                    }
                }
            }
            "EXPOSE" => {
                flags.none()?;
                if rest.is_empty() {
                    return mistake(word, "EXPOSE requires at least one argument: a port like 80 or 53/udp");
                }
                InstructionKind::Expose(blank_words(rest))
            }
            "VOLUME" => {
                flags.none()?;
                let volumes = list(rest)?;
                if volumes.is_empty() {
                    return mistake(word, "VOLUME requires at least one argument: a path");
                }
                if volumes.iter().any(|volume| volume.trim().is_empty()) {
                    return mistake(rest, "a VOLUME can't be an empty string");
                }
                InstructionKind::Volume(volumes.iter().map(|volume| volume.trim().to_owned()).collect())
            }
            "ENTRYPOINT" | "CMD" => {
                flags.none()?;
                let line = if rest.is_empty() { CommandLine::Exec(Vec::new()) } else { command_line(rest)? };
                if command == "CMD" { InstructionKind::Cmd(line) } else { InstructionKind::Entrypoint(line) }
            }
            "SHELL" => {
                flags.none()?;
                match json(rest) {
                    Json::Strings(words) if !words.is_empty() => InstructionKind::Shell(words),
                    Json::Strings(_) => return mistake(rest, "SHELL requires at least one word"),
                    _ => return mistake(rest, "SHELL requires a JSON array of strings, like [\"/bin/sh\", \"-c\"]"),
                }
            }
            "HEALTHCHECK" => InstructionKind::Healthcheck(healthcheck(rest, flags)?),
            _ => {
                let hint = match suggest(&command, INSTRUCTIONS) {
                    Some(known) => format!(" (did you mean {known}?)"),
                    None => String::new(),
                };
                return mistake(word, format!("unknown instruction {word:?}{hint}"));
            }
        };
        Ok(Parsed::Instruction(kind))
    }

    fn from(&mut self, line: &LogicalLine, rest: &str, mut flags: Flags<'_>) -> Result<Stage, Mistake> {
        let platform = flags.text("platform")?;
        flags.done()?;
        let words = blank_words(rest);
        let (base, name) = match words.as_slice() {
            [base] if !base.is_empty() => (base, None),
            [base, r#as, name] if r#as.eq_ignore_ascii_case("as") => (base, Some(name)),
            [] => return mistake("", "FROM requires an image, a stage or scratch"),
            [_, word, ..] => {
                return mistake(word, "FROM requires either one argument or three: FROM image, or FROM image AS name");
            }
            _ => return mistake("", "FROM requires an image, a stage or scratch"),
        };
        if let Some(name) = name {
            let mut chars = name.chars();
            let good = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
                && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
            if !good {
                let message = format!(
                    "invalid name for a stage {name:?}: a letter is expected, then letters, digits, '-', '_' and '.'"
                );
                return mistake(name, message);
            }
            if name.chars().any(|c| c.is_ascii_uppercase()) {
                self.warn(Rule::StageNameCasing, name, format!("the stage name {name} is not lower case"));
            }
            let (from, r#as) = (first_word(&line.text), &words[1]);
            let is_lower = |word: &str| !word.contains(|c: char| c.is_ascii_uppercase());
            let is_upper = |word: &str| !word.contains(|c: char| c.is_ascii_lowercase());
            // A FROM of both cases is the business of another rule.
            if (is_lower(from) || is_upper(from)) && is_lower(from) != is_lower(r#as) {
                self.warn(Rule::FromAsCasing, r#as, format!("{from} and {as} are not in the same case", as = r#as));
            }
            self.check_description(line, [name.to_ascii_lowercase().as_str()]);
        }
        Ok(Stage {
            location: line.location,
            text: line.text.trim().to_owned(),
            base: base.clone(),
            name: name.map(|name| name.to_ascii_lowercase()),
            platform,
            instructions: Vec::new(),
        })
    }

    /// Finds mistakes in what will run in other builds now, where its author sees them.
    fn onbuild(&mut self, line: &LogicalLine, rest: &str) -> Result<(), Mistake> {
        let trigger = first_word(rest).to_ascii_uppercase();
        match trigger.as_str() {
            "" => return mistake("ONBUILD", "ONBUILD requires at least one argument: an instruction"),
            "ONBUILD" => return mistake(first_word(rest), "ONBUILD can't be the instruction of an ONBUILD"),
            "FROM" | "MAINTAINER" => {
                return mistake(first_word(rest), format!("{trigger} can't be the instruction of an ONBUILD"));
            }
            _ => {}
        }
        let (text, heredocs) = (rest.to_owned(), line.heredocs.clone());
        let inner = LogicalLine { location: line.location, text, heredocs, comments: vec![], empty_line: None };
        self.parse(&inner).map(|_| ())
    }

    fn copy(&self, rest: &str, mut flags: Flags<'_>, line: &LogicalLine) -> Result<Copy, Mistake> {
        let from = flags.text("from")?;
        let chown = flags.text("chown")?;
        let chmod = flags.text("chmod")?;
        let link = flags.boolean("link")?.unwrap_or(false);
        let excludes = flags.texts("exclude")?;
        let parents = flags.boolean("parents")?.unwrap_or(false);
        flags.done()?;
        let (sources, dest) = sources_and_dest("COPY", rest, &line.heredocs)?;
        let from = match from {
            None => CopyFrom::Context,
            Some(from) if from.is_empty() => return mistake("--from", "--from requires a stage or an image"),
            Some(from) if from.contains('$') => return mistake(from, mount::FROM_IS_FIXED),
            Some(from) => CopyFrom::Image(from),
        };
        if from != CopyFrom::Context
            && let Some(CopySource::Heredoc(doc)) = sources.iter().find(|s| matches!(s, CopySource::Heredoc(_)))
        {
            return mistake(&doc.name, "a here-document can't be copied --from another stage");
        }
        Ok(Copy { from, sources, dest, chown, chmod, link, parents, excludes })
    }

    /// `name=value …`, or the old `name value`.
    fn pairs(&mut self, command: &str, rest: &str) -> Result<Vec<Pair>, Mistake> {
        let words = quoted_words(rest, self.escape);
        let Some(first) = words.first() else {
            return mistake(command, format!("{command} requires at least one argument: name=value"));
        };
        if !first.contains('=') {
            let Some((name, value)) = rest.split_once(is_blank) else {
                return mistake(rest, format!("{command} requires a value: {command} {rest}=value"));
            };
            let message = format!("write {command} {name}=…: the form without '=' is old, and takes the whole line");
            self.warn(Rule::LegacyKeyValueFormat, name, message);
            return Ok(vec![Pair { name: name.to_owned(), value: value.trim_start_matches(is_blank).to_owned() }]);
        }
        let pair = |word: &String| match word.split_once('=') {
            None => {
                mistake(word, format!("{word:?} has no '=': name=value is expected (a value with blanks needs quotes)"))
            }
            Some(("", _)) => mistake(word, format!("a name is expected before '=' in {command}")),
            Some((name, value)) => Ok(Pair { name: name.to_owned(), value: value.to_owned() }),
        };
        words.iter().map(pair).collect()
    }

    fn args(&self, rest: &str) -> Result<Vec<ArgDeclaration>, Mistake> {
        let words = quoted_words(rest, self.escape);
        if words.is_empty() {
            return mistake("ARG", "ARG requires at least one argument: name or name=default");
        }
        let declaration = |word: &String| match word.split_once('=') {
            Some(("", _)) => mistake(word, "a name is expected before '=' in ARG"),
            Some((name, value)) => Ok(ArgDeclaration { name: name.to_owned(), default: Some(value.to_owned()) }),
            None => Ok(ArgDeclaration { name: word.clone(), default: None }),
        };
        words.iter().map(declaration).collect()
    }
}

/// The instruction as an image's configuration keeps it.
fn onbuild_text(rest: &str, heredocs: &[Heredoc]) -> String {
    let bodies = heredocs.iter().flat_map(|doc| ["\n", &doc.content, &doc.name]);
    [rest].into_iter().chain(bodies).collect()
}

fn run_flags(mut flags: Flags<'_>) -> Result<(Vec<RunMount>, RunNetwork, RunSecurity), Mistake> {
    let mounts = flags.texts("mount")?;
    let mounts = mounts.iter().map(|text| RunMount::parse(text)).collect::<Result<_, MountError>>();
    let mounts = mounts.map_err(|error| Mistake { focus: error.focus, message: error.why })?;
    let network = match flags.text("network")? {
        None => RunNetwork::default(),
        Some(text) => match RunNetwork::parse(&text) {
            Some(network) => network,
            None => return mistake(&text, format!("--network is default, none or host, not {text:?}")),
        },
    };
    let security = match flags.text("security")? {
        None => RunSecurity::default(),
        Some(text) => match RunSecurity::parse(&text) {
            Some(security) => security,
            None => return mistake(&text, format!("--security is sandbox or insecure, not {text:?}")),
        },
    };
    if !flags.take("device").is_empty() {
        return mistake("--device", "RUN --device is not supported yet");
    }
    flags.done()?;
    Ok((mounts, network, security))
}

fn add(rest: &str, mut flags: Flags<'_>, line: &LogicalLine) -> Result<Add, Mistake> {
    let chown = flags.text("chown")?;
    let chmod = flags.text("chmod")?;
    let link = flags.boolean("link")?.unwrap_or(false);
    let excludes = flags.texts("exclude")?;
    let unpack = flags.boolean("unpack")?;
    let checksum = flags.text("checksum")?;
    let keep_git_dir = flags.boolean("keep-git-dir")?;
    flags.done()?;
    let (sources, dest) = sources_and_dest("ADD", rest, &line.heredocs)?;
    Ok(Add { sources, dest, chown, chmod, link, excludes, unpack, checksum, keep_git_dir })
}

fn sources_and_dest(command: &str, rest: &str, heredocs: &[Heredoc]) -> Result<(Vec<CopySource>, String), Mistake> {
    let mut words = list(rest)?;
    let dest = match words.len() {
        0 => return mistake(command, format!("{command} requires at least two arguments: sources and a destination")),
        1 => return mistake(rest, format!("{command} requires at least two arguments: the destination is missing")),
        _ => words.pop().expect("there are at least two"),
    };
    if lines::heredoc(&dest).is_some() {
        return mistake(&dest, format!("the destination of {command} can't be a here-document"));
    }
    if dest.is_empty() {
        return mistake(rest, format!("the destination of {command} is empty"));
    }
    let source = |word: String| match lines::heredoc(&word) {
        // In JSON a here-document's word is a path like any: there is no document behind it.
        Some(head) => match heredocs.iter().rev().find(|doc| doc.name == head.name) {
            Some(doc) => CopySource::Heredoc(doc.clone()),
            None => CopySource::Path(word),
        },
        None => CopySource::Path(word),
    };
    Ok((words.into_iter().map(source).collect(), dest))
}

fn healthcheck(rest: &str, mut flags: Flags<'_>) -> Result<Healthcheck, Mistake> {
    let (word, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let rest = rest.trim();
    match word.to_ascii_uppercase().as_str() {
        "" => mistake("HEALTHCHECK", "HEALTHCHECK requires at least one argument: NONE or CMD command"),
        "NONE" => {
            flags.none()?;
            if !rest.is_empty() {
                return mistake(rest, "HEALTHCHECK NONE takes no arguments");
            }
            Ok(Healthcheck::None)
        }
        "CMD" => {
            let interval_nanos = flags.nanos("interval")?;
            let timeout_nanos = flags.nanos("timeout")?;
            let start_period_nanos = flags.nanos("start-period")?;
            let start_interval_nanos = flags.nanos("start-interval")?;
            let retries = match flags.text("retries")? {
                None => 0,
                Some(text) => match text.parse::<u32>() {
                    Ok(retries) if i32::try_from(retries).is_ok() => retries,
                    _ => return mistake(text, "--retries requires a number, 0 or more"),
                },
            };
            flags.done()?;
            let command = command_line(rest)?;
            if matches!(&command, CommandLine::Shell(text) if text.is_empty())
                || matches!(&command, CommandLine::Exec(words) if words.is_empty())
            {
                return mistake(word, "HEALTHCHECK CMD requires a command");
            }
            Ok(Healthcheck::Command {
                command,
                interval_nanos,
                timeout_nanos,
                start_period_nanos,
                start_interval_nanos,
                retries,
            })
        }
        _ => mistake(word, format!("unknown kind {word:?} of HEALTHCHECK: NONE or CMD is expected")),
    }
}

/// The flags of one instruction; each is taken once.
struct Flags<'a> {
    command: &'a str,
    given: Vec<String>,
}

fn flag_name(flag: &str) -> &str {
    let flag = flag.strip_prefix("--").unwrap_or(flag);
    flag.split_once('=').map_or(flag, |(name, _)| name)
}

impl Flags<'_> {
    /// Takes all values given for `name`; `None` for a flag without `=`.
    fn take(&mut self, name: &str) -> Vec<Option<String>> {
        let (taken, rest) = std::mem::take(&mut self.given).into_iter().partition(|flag| flag_name(flag) == name);
        self.given = rest;
        Vec::into_iter(taken).map(|flag: String| flag.split_once('=').map(|(_, value)| value.to_owned())).collect()
    }

    fn texts(&mut self, name: &str) -> Result<Vec<String>, Mistake> {
        let missing =
            || Mistake { focus: format!("--{name}"), message: format!("--{name} requires a value: --{name}=…") };
        self.take(name).into_iter().map(|value| value.ok_or_else(missing)).collect()
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, Mistake> {
        let mut values = self.texts(name)?;
        match values.len() {
            0 | 1 => Ok(values.pop()),
            _ => mistake(format!("--{name}"), format!("--{name} is given more than once")),
        }
    }

    fn boolean(&mut self, name: &str) -> Result<Option<bool>, Mistake> {
        let mut values = self.take(name);
        if values.len() > 1 {
            return mistake(format!("--{name}"), format!("--{name} is given more than once"));
        }
        match values.pop() {
            None => Ok(None),
            Some(None) => Ok(Some(true)),
            Some(Some(value)) => match value.to_ascii_lowercase().as_str() {
                "true" => Ok(Some(true)),
                "false" => Ok(Some(false)),
                _ => mistake(format!("--{name}"), format!("--{name} requires true or false, not {value:?}")),
            },
        }
    }

    fn nanos(&mut self, name: &str) -> Result<u64, Mistake> {
        let Some(text) = self.text(name)? else { return Ok(0) };
        match go_duration_nanos(&text) {
            Some(nanos) if nanos == 0 || nanos >= 1_000_000 => Ok(nanos),
            Some(_) => mistake(text, format!("--{name} can't be less than 1ms")),
            None => mistake(text, format!("--{name} requires a duration like 30s, 1m30s or 500ms")),
        }
    }

    /// Whatever is left is a mistake.
    fn done(&self) -> Result<(), Mistake> {
        let known: &[&str] = match self.command {
            "FROM" => &["platform"],
            "RUN" => &["mount", "network", "security"],
            "COPY" => &["from", "chown", "chmod", "link", "exclude", "parents"],
            "ADD" => &["chown", "chmod", "link", "exclude", "unpack", "checksum", "keep-git-dir"],
            "HEALTHCHECK" => &["interval", "timeout", "start-period", "start-interval", "retries"],
            _ => &[],
        };
        self.given.first().map_or(Ok(()), |flag| self.unknown(flag, known))
    }

    fn none(&self) -> Result<(), Mistake> {
        self.done()
    }

    fn unknown(&self, flag: &str, known: &[&str]) -> Result<(), Mistake> {
        let name = flag_name(flag);
        let hint = match suggest(name, known.iter().copied()) {
            Some(known) => format!(" (did you mean --{known}?)"),
            None if known.is_empty() => format!(": {} has no flags", self.command),
            None => format!(" ({} knows --{})", self.command, known.join(", --")),
        };
        mistake(format!("--{name}"), format!("unknown flag --{name}{hint}"))
    }
}

/// Takes the `--flags` off the front. Quotes and escapes are undone in them, as in `BuildKit`; a lone `--` ends them.
fn flags(text: &str, escape: char) -> (Vec<String>, &str) {
    let mut flags = Vec::new();
    let mut rest = text.trim_start();
    while rest.starts_with("--") {
        let mut flag = String::new();
        let mut quote = None;
        let mut chars = rest.char_indices();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            if quote.is_none() && c.is_whitespace() {
                end = at;
                break;
            }
            match (c, quote) {
                (c, Some(open)) if c == open => quote = None,
                ('\'' | '"', None) => quote = Some(c),
                (c, _) if c == escape => flag.extend(chars.next().map(|(_, c)| c)),
                (c, _) => flag.push(c),
            }
        }
        rest = rest[end..].trim_start();
        if flag == "--" {
            break;
        }
        flags.push(flag);
    }
    (flags, rest)
}

/// What an argument is as JSON.
enum Json {
    /// An array of strings.
    Strings(Vec<String>),
    /// An array, but not of strings: always a mistake.
    OtherArray,
    /// Not JSON: text for the shell, or words.
    No,
}

fn json(rest: &str) -> Json {
    let rest = rest.trim_start();
    if !rest.starts_with('[') {
        return Json::No;
    }
    match serde_json::from_str::<Vec<serde_json::Value>>(rest) {
        Err(_) => Json::No,
        Ok(values) => {
            let string = |value| if let serde_json::Value::String(text) = value { Some(text) } else { None };
            values.into_iter().map(string).collect::<Option<Vec<_>>>().map_or(Json::OtherArray, Json::Strings)
        }
    }
}

fn strings_only<T>(rest: &str) -> Result<T, Mistake> {
    mistake(rest, "a JSON array here can only hold strings")
}

/// Exec form if it is JSON, shell form otherwise: a slip in the JSON makes it a shell's text, as docker does.
fn command_line(rest: &str) -> Result<CommandLine, Mistake> {
    match json(rest) {
        Json::Strings(words) => Ok(CommandLine::Exec(words)),
        Json::OtherArray => strings_only(rest),
        Json::No => Ok(CommandLine::Shell(rest.to_owned())),
    }
}

/// JSON, or words between blanks.
fn list(rest: &str) -> Result<Vec<String>, Mistake> {
    match json(rest) {
        Json::Strings(words) => Ok(words),
        Json::OtherArray => strings_only(rest),
        Json::No => Ok(blank_words(rest)),
    }
}

fn blank_words(rest: &str) -> Vec<String> {
    rest.split(is_blank).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Words between blanks, where quotes and escapes hold words together; both stay, for the expansion to undo.
fn quoted_words(rest: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    // A quoted nothing is a word too; its quotes are in `word`.
    let mut quote = None;
    let mut chars = rest.chars().peekable();
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            continue;
        }
        if c == escape && quote != Some('\'') {
            // An escape character at the very end is dropped.
            if let Some(escaped) = chars.next() {
                word.push(c);
                word.push(escaped);
            }
            continue;
        }
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '\'' || c == '"' => quote = Some(c),
            _ => {}
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Go's durations: `1h30m`, `1.5s`, `500ms`; only positive ones mean anything here.
fn go_duration_nanos(text: &str) -> Option<u64> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let whole_len = digits(rest);
        let (whole, mut after) = rest.split_at(whole_len);
        let mut fraction = "";
        if let Some(point) = after.strip_prefix('.') {
            let (digits, tail) = point.split_at(digits(point));
            (fraction, after) = (digits, tail);
        }
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let units = [
            ("ns", 1),
            ("us", 1_000),
            ("µs", 1_000),
            ("μs", 1_000),
            ("ms", 1_000_000),
            ("s", 1_000_000_000u128),
            ("m", 60_000_000_000),
            ("h", 3_600_000_000_000),
        ];
        let unit_len = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (_, scale) = units.iter().find(|(unit, _)| *unit == &after[..unit_len])?;
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total = total.checked_add(whole.checked_mul(*scale)?)?;
        // Beyond nanoseconds nothing is kept.
        let fraction = &fraction[..fraction.len().min(18)];
        if !fraction.is_empty() {
            total += fraction.parse::<u128>().ok()? * scale / 10u128.pow(u32::try_from(fraction.len()).ok()?);
        }
        rest = &after[unit_len..];
    }
    i64::try_from(total).ok().and_then(|nanos| u64::try_from(nanos).ok())
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
