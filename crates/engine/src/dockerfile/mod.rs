//! Dockerfiles: what is written in them, as typed instructions.
//!
//! ```text
//! mod.rs    the instructions and the stages they make
//! check.rs  what is worth a warning
//! lines.rs  the file as logical lines: directives, continuations, comments, here-documents
//! parse.rs  one logical line as an instruction
//! words.rs  variables, quotes and escapes
//! mount.rs  RUN --mount, --network, --security
//! scope.rs  which variables an instruction sees: ARG, ENV, predefined arguments
//! ignore.rs .dockerignore
//! error.rs  messages with file, line and caret
//! ```
//!
//! The grammar is `BuildKit`'s, quirks included, because files are written against it. Nothing is expanded while
//! parsing: values keep their `$` and their quotes, and whoever builds expands them with [`words`] in a [`Scope`] as it
//! goes along. What this release can't do yet (`RUN --device`) is an error with its line, never ignored.

mod check;
mod error;
mod ignore;
mod lines;
mod mount;
mod parse;
#[cfg(test)]
mod proptests;
mod scope;
pub mod words;

pub use check::{CheckOptions, Rule, Warning, names_a_secret};
pub(crate) use error::suggest;
pub use error::{DockerfileError, Location};
pub use ignore::{Ignore, IgnoreError};
pub use mount::{Mount, MountError, MountKind, Permissions, RunMount, RunNetwork, RunSecurity, Sharing, ram_bytes};
pub use parse::parse;
pub use scope::{BuildArgs, Scope};

use std::collections::BTreeMap;

/// A parsed Dockerfile.
#[derive(Debug, Clone)]
pub struct Dockerfile {
    file: String,
    lines: Vec<String>,
    /// The character that escapes and continues lines: `\`, or `` ` `` if the file says so.
    pub escape: char,
    /// What a `# syntax=` line asks for. Kept to be told about, never fetched.
    pub syntax: Option<String>,
    /// What a `# check=` line asks for.
    pub check: CheckOptions,
    /// What `check=` in the comments above an instruction asks for, by the instruction's first line.
    check_above: BTreeMap<u32, CheckOptions>,
    /// What was found while parsing.
    found: Vec<Warning>,
    /// The `ARG`s before the first `FROM`.
    pub global_args: Vec<GlobalArg>,
    /// The stages, in order; at least one.
    pub stages: Vec<Stage>,
}

impl Dockerfile {
    /// An error about one of this file's instructions that was found later, while building, or about the whole file if
    /// `at` is nowhere. `focus` is the part of the instruction to point at.
    pub fn error(&self, at: Location, focus: &str, message: impl Into<String>) -> DockerfileError {
        if at.first_line == 0 {
            return DockerfileError::new(&self.file, 0, "", "", message.into());
        }
        // The part to point at may stand on a continuation line.
        let lines = at.first_line..=at.last_line.max(at.first_line);
        let text = |line: u32| self.lines.get(line as usize - 1).map_or("", String::as_str);
        let line = if focus.is_empty() { None } else { lines.clone().find(|line| text(*line).contains(focus)) };
        let line = line.unwrap_or(*lines.start());
        DockerfileError::new(&self.file, line, text(line), focus, message.into())
    }

    /// The number of the last stage named `name` before the stage `before`. Names don't care about case.
    pub fn stage_named(&self, name: &str, before: usize) -> Option<usize> {
        let named = |stage: &Stage| stage.name.as_deref().is_some_and(|n| n.eq_ignore_ascii_case(name));
        self.stages.iter().take(before).rposition(named)
    }

    /// The name of a stage before the stage `before` that `name` was perhaps meant to be: for the message when there is
    /// no image of that name either.
    pub fn stage_like(&self, name: &str, before: usize) -> Option<&str> {
        error::suggest(name, self.stages.iter().take(before).filter_map(|stage| stage.name.as_deref()))
    }

    /// The stage to build: the named or numbered one, or the last.
    ///
    /// # Errors
    /// An error about the whole file, which names the stages there are.
    pub fn target(&self, target: Option<&str>) -> Result<usize, DockerfileError> {
        let Some(target) = target else { return Ok(self.stages.len() - 1) };
        let numbered = || target.parse().ok().filter(|number| *number < self.stages.len());
        self.stage_named(target, self.stages.len()).or_else(numbered).ok_or_else(|| {
            let names: Vec<&str> = self.stages.iter().filter_map(|stage| stage.name.as_deref()).collect();
            let hint = match error::suggest(target, names.iter().copied()) {
                Some(name) => format!(" (did you mean {name}?)"),
                None if names.is_empty() => " (no stage has a name)".to_owned(),
                None => format!(" (there are: {})", names.join(", ")),
            };
            DockerfileError::new(&self.file, 0, "", "", format!("no stage {target:?} to build{hint}"))
        })
    }
}

/// An `ARG` before the first `FROM`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalArg {
    /// Where.
    pub location: Location,
    /// What it declares.
    pub args: Vec<ArgDeclaration>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Where its `FROM` is.
    pub location: Location,
    /// The `FROM` as written, for messages and history.
    pub text: String,
    /// What it starts from: an image, an earlier stage's name, or `scratch`; unexpanded.
    pub base: String,
    /// The name after `AS`, in lower case.
    pub name: Option<String>,
    /// The `--platform` flag, unexpanded.
    pub platform: Option<String>,
    /// What follows, in order.
    pub instructions: Vec<Instruction>,
}

/// One instruction of a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// Where it is.
    pub location: Location,
    /// The logical line as written, continuations joined, for progress output and history.
    pub text: String,
    /// What it does.
    pub kind: InstructionKind,
}

/// What an instruction does. Values are as written unless said otherwise: expand them with [`words`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InstructionKind {
    /// `RUN`
    Run(Run),
    /// `COPY`
    Copy(Copy),
    /// `ADD`
    Add(Add),
    /// `ENV`: expand values (names too) by word.
    Env(Vec<Pair>),
    /// `ARG`
    Arg(Vec<ArgDeclaration>),
    /// `LABEL`: expand values and names by word.
    Label(Vec<Pair>),
    /// `WORKDIR`: expand by word.
    Workdir(String),
    /// `USER`: expand by word.
    User(String),
    /// `EXPOSE`: expand each with word splitting.
    Expose(Vec<String>),
    /// `VOLUME`: expand each by word.
    Volume(Vec<String>),
    /// `STOPSIGNAL`: expand by word.
    StopSignal(String),
    /// `ENTRYPOINT`: not expanded.
    Entrypoint(CommandLine),
    /// `CMD`: not expanded.
    Cmd(CommandLine),
    /// `SHELL`: not expanded.
    Shell(Vec<String>),
    /// `HEALTHCHECK`: not expanded.
    Healthcheck(Healthcheck),
    /// `ONBUILD`: the instruction for builds on top, parsed to find mistakes now, and as text for the image.
    Onbuild(String),
    /// `MAINTAINER`, deprecated.
    Maintainer(String),
}

impl InstructionKind {
    /// The stages that it takes files from.
    pub fn stages(&self) -> impl Iterator<Item = usize> {
        let mounts = if let Self::Run(run) = self { run.mounts.as_slice() } else { &[] };
        let copy = if let Self::Copy(copy) = self { Some(&copy.from) } else { None };
        let from = copy.into_iter().chain(mounts.iter().filter_map(|mount| mount.from.as_ref()));
        from.filter_map(|from| if let CopyFrom::Stage(stage) = from { Some(*stage) } else { None })
    }
}

/// A name and a value of `ENV` or `LABEL`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The name, as written.
    pub name: String,
    /// The value, as written, quotes and all.
    pub value: String,
}

/// One name that `ARG` declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgDeclaration {
    /// The name.
    pub name: String,
    /// The default, as written; `None` when there is none.
    pub default: Option<String>,
}

/// A command in shell form or exec form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandLine {
    /// Text for the shell.
    Shell(String),
    /// The words themselves.
    Exec(Vec<String>),
}

impl CommandLine {
    /// What is executed, given the stage's `SHELL`.
    pub fn argv(&self, shell: &[String]) -> Vec<String> {
        match self {
            Self::Exec(words) => words.clone(),
            Self::Shell(text) => shell.iter().cloned().chain([text.clone()]).collect(),
        }
    }
}

/// The shell of an image that names none.
pub const DEFAULT_SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// A here-document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// The word that ends it; for `COPY` also the file's name.
    pub name: String,
    /// The text between, as written.
    pub content: String,
    /// Whether variables in it are expanded: false when the word is quoted. For `COPY` and `ADD` only; in `RUN` that is
    /// the shell's business.
    pub expand: bool,
    /// Whether leading tabs are taken away (`<<-`).
    pub strip_tabs: bool,
}

impl Heredoc {
    /// The text without leading tabs if `<<-` asks for that.
    pub fn text(&self) -> String {
        if !self.strip_tabs {
            return self.content.clone();
        }
        self.content.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// `RUN`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The command, without here-documents.
    pub command: CommandLine,
    /// The here-documents of a shell form.
    pub heredocs: Vec<Heredoc>,
    /// `--mount`, in order.
    pub mounts: Vec<RunMount>,
    /// `--network`
    pub network: RunNetwork,
    /// `--security`
    pub security: RunSecurity,
}

/// Where a `#!` here-document is put for its step, as `BuildKit` does. A directory for the caller to mount read-only.
pub const SCRIPT_DIR: &str = "/dev/pipes";

/// What a [`Run`] comes down to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// The words to execute.
    pub argv: Vec<String>,
    /// A script that must be there while they run: name and bytes of an executable file (mode 0755) in [`SCRIPT_DIR`].
    pub script: Option<(String, String)>,
}

impl Run {
    /// What is executed, given the stage's `SHELL`. One here-document and nothing else is a script: executed itself if
    /// it begins with `#!`, else given to the shell as its text. Any other here-documents are put back into the text,
    /// for the shell to understand.
    pub fn invocation(&self, shell: &[String]) -> Invocation {
        let CommandLine::Shell(text) = &self.command else {
            return Invocation { argv: self.command.argv(shell), script: None };
        };
        let with_shell = |text: String| CommandLine::Shell(text).argv(shell);
        match self.heredocs.as_slice() {
            [] => Invocation { argv: with_shell(text.clone()), script: None },
            [only, ..] if lines::heredoc(text).is_some() => {
                let body = only.text();
                if only.content.starts_with("#!") {
                    let argv = vec![format!("{SCRIPT_DIR}/{}", only.name)];
                    Invocation { argv, script: Some((only.name.clone(), body)) }
                } else {
                    Invocation { argv: with_shell(body), script: None }
                }
            }
            several => {
                let bodies = several.iter().flat_map(|doc| ["\n", &doc.content, &doc.name]);
                Invocation { argv: with_shell([text.as_str()].into_iter().chain(bodies).collect()), script: None }
            }
        }
    }
}

/// `COPY`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Where the sources are taken from.
    pub from: CopyFrom,
    /// The sources, expanded by word; at least one path or file.
    pub sources: Vec<CopySource>,
    /// Where they go, expanded by word. A trailing slash means a directory.
    pub dest: String,
    /// `--chown`, expanded by word.
    pub chown: Option<String>,
    /// `--chmod`, expanded by word.
    pub chmod: Option<String>,
    /// `--link`
    pub link: bool,
    /// `--parents`: the directories above a source come along.
    pub parents: bool,
    /// `--exclude`, expanded by word: patterns as in .dockerignore.
    pub excludes: Vec<String>,
}

/// What `COPY` takes its sources from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyFrom {
    /// The build context.
    Context,
    /// The tree of another stage, earlier or later.
    Stage(usize),
    /// An image, or a mistake: the name is no stage's. If there is no such image, [`Dockerfile::stage_like`] may
    /// know what was meant.
    Image(String),
}

/// One source of `COPY` or `ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopySource {
    /// A path or pattern; for `ADD` also a URL.
    Path(String),
    /// A file that stands in the Dockerfile itself.
    Heredoc(Heredoc),
}

/// `ADD`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Add {
    /// The sources, expanded by word; at least one.
    pub sources: Vec<CopySource>,
    /// Where they go, expanded by word.
    pub dest: String,
    /// `--chown`, expanded by word.
    pub chown: Option<String>,
    /// `--chmod`, expanded by word.
    pub chmod: Option<String>,
    /// `--link`
    pub link: bool,
    /// `--exclude`, expanded by word.
    pub excludes: Vec<String>,
    /// `--unpack`; `None`: local archives are unpacked, downloads are not.
    pub unpack: Option<bool>,
    /// `--checksum`, expanded by word.
    pub checksum: Option<String>,
    /// `--keep-git-dir`
    pub keep_git_dir: Option<bool>,
}

/// `HEALTHCHECK`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Healthcheck {
    /// None, and not the base image's either.
    None,
    /// A command to run now and then.
    Command {
        /// The command: exec form is `CMD`, shell form is `CMD-SHELL` in the image's configuration.
        command: CommandLine,
        /// Nanoseconds between checks; 0 inherits.
        interval_nanos: u64,
        /// Nanoseconds a check may take; 0 inherits.
        timeout_nanos: u64,
        /// Nanoseconds at the start during which failures don't count; 0 inherits.
        start_period_nanos: u64,
        /// Nanoseconds between checks during that time; 0 inherits.
        start_interval_nanos: u64,
        /// How many failures in a row make a container unhealthy; 0 inherits.
        retries: u32,
    },
}
