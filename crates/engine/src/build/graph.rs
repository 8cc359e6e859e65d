//! A Dockerfile as a graph of operations.
//!
//! Lowering goes through the stages that the target needs, in order. Instructions that change files become vertices,
//! each standing on earlier ones; instructions that only change the config change the config. What comes out no longer
//! knows about Dockerfiles: the solver sees operations and inputs, nothing else.

use std::fmt;

use plies_image::history_cache::history_of;
use plies_oci::{BlobDigest, DiffId, ImageConfig, Platform, PlatformError, Reference, Sha256Hasher};

use super::Entitlement;
use super::cache_from::Told;
use super::config::{Config, DEFAULT_PATH, HistoryEntry};
use super::remote::{Download, GitSource, Remote};
use super::values::{absolute, exposed, has_drive, healthcheck, healthcheck_text, is_signal, plain, quoted};
use crate::dockerfile::words::{Expansion, Lexer, Variables as _};
use crate::dockerfile::{
    self, Add, BuildArgs, CommandLine, Copy, CopyFrom, CopySource, Dockerfile, DockerfileError, Ignore, Instruction,
    InstructionKind, Invocation, Location, Mount, MountKind, Rule, Run, RunNetwork, RunSecurity, Scope, Stage, Warning,
};

/// A vertex of a [`Graph`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct VertexId(pub(super) usize);

impl fmt::Debug for VertexId {
    /// Without its number, which means nothing outside of its graph: what it stands for has a digest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VertexId")
    }
}

/// Where an operation takes files from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FilesFrom {
    Context,
    Vertex(VertexId),
}

/// A process to run.
#[derive(Debug, Clone)]
pub(crate) struct RunOp {
    pub(crate) invocation: Invocation,
    /// What the process sees, in order; part of the key.
    pub(crate) env: Vec<(String, String)>,
    /// What it sees too, but what must not change the result: proxies.
    pub(crate) unkeyed_env: Vec<(String, String)>,
    pub(crate) working_dir: String,
    /// As in the config: empty means root.
    pub(crate) user: String,
    pub(crate) mounts: Vec<MountOp>,
    pub(crate) network: RunNetwork,
    pub(crate) security: RunSecurity,
}

/// What a process sees beside its tree.
#[derive(Debug, Clone)]
pub(crate) struct MountOp {
    pub(crate) kind: MountKind,
    /// Where a bind mount's files come from, and what a cache begins with.
    pub(crate) from: Option<FilesFrom>,
    /// Absolute; `None` for a secret that is only a variable.
    pub(crate) target: Option<String>,
}

/// Files to put into a tree.
#[derive(Debug, Clone)]
pub(crate) struct CopyOp {
    /// From one tree after the other.
    pub(crate) parts: Vec<CopyPart>,
    /// Absolute; a slash at the end means a directory.
    pub(crate) dest: String,
    pub(crate) chown: Option<String>,
    pub(crate) chmod: Option<String>,
    pub(crate) excludes: Vec<String>,
    /// It stands on nothing, to be laid over whatever there is.
    pub(crate) link: bool,
    /// What it will be laid over, if another builder would have put it right onto that, and its results may be here.
    pub(crate) under: Option<VertexId>,
}

/// Files from one tree.
#[derive(Debug, Clone)]
pub(crate) struct CopyPart {
    pub(crate) from: FilesFrom,
    /// Paths or patterns below the source's root.
    pub(crate) paths: Vec<String>,
    /// Files that stand in the Dockerfile: name and bytes.
    pub(crate) inline: Vec<(String, Vec<u8>)>,
    /// The directories above a path come along.
    pub(crate) parents: bool,
    /// ADD: archives are unpacked.
    pub(crate) unpack: bool,
}

impl CopyPart {
    fn of(from: FilesFrom) -> Self {
        Self { from, paths: vec![], inline: vec![], parents: false, unpack: false }
    }
}

/// What a vertex does. Operations on files have a base: the tree that they change.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// The empty tree.
    Scratch,
    /// The tree of an image that is here.
    Image { diff_ids: Vec<DiffId>, name: String },
    /// The result of a process.
    Run { base: VertexId, run: RunOp },
    /// The base with files added.
    Copy { base: VertexId, copy: CopyOp },
    /// The base with a directory that is there; one that has to be made belongs to the user.
    Directory { base: VertexId, path: String, user: String },
    /// One file from the network, alone in a tree.
    Download(Download),
    /// A tree out of a git repository.
    Git(GitSource),
    /// The stack of `base` with the stack of `over` on top: no file is touched.
    Merge { base: VertexId, over: VertexId },
}

impl Op {
    /// The vertices whose results it needs.
    pub(crate) fn inputs(&self) -> Vec<VertexId> {
        let vertex = |from: FilesFrom| match from {
            FilesFrom::Vertex(vertex) => Some(vertex),
            FilesFrom::Context => None,
        };
        match self {
            Self::Scratch | Self::Image { .. } | Self::Download(_) | Self::Git(_) => vec![],
            Self::Run { base, run } => {
                [*base].into_iter().chain(run.mounts.iter().filter_map(|mount| mount.from.and_then(vertex))).collect()
            }
            Self::Copy { base, copy } => {
                let parts = copy.parts.iter().filter_map(|part| vertex(part.from));
                [*base].into_iter().chain(copy.under).chain(parts).collect()
            }
            Self::Directory { base, .. } => vec![*base],
            Self::Merge { base, over } => vec![*base, *over],
        }
    }
}

/// An operation with what people call it.
#[derive(Debug, Clone)]
pub(crate) struct Vertex {
    pub(crate) op: Op,
    /// `[build 2/5] RUN make`; empty for what is not worth a line.
    pub(crate) name: String,
    pub(crate) location: Location,
    /// It is done, whatever is cached.
    pub(crate) no_cache: bool,
    /// Digest of the operation and of all that it stands on, before any file is looked at.
    pub(crate) digest: BlobDigest,
    /// The instruction that it stands for, if the text of a history tells all of what it takes in.
    line: Option<LineId>,
}

/// An instruction among those that led to where a stage is.
#[derive(Debug, Clone, Copy)]
struct LineId(usize);

#[derive(Debug)]
struct Line {
    /// `None` for the image that the first stage starts from.
    before: Option<LineId>,
    told: Told,
}

/// Operations, inputs before their users.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    vertices: Vec<Vertex>,
    /// All instructions, each with the one before it: stages that start from one stage share its lines.
    lines: Vec<Line>,
    /// What is added now is done, whatever is cached.
    no_cache: bool,
}

impl Graph {
    fn add(&mut self, op: Op, name: String, location: Location) -> VertexId {
        let mut sum = Sha256Hasher::default();
        sum.update(format!("{op:?}").as_bytes());
        self.digests_of_inputs(&op).iter().for_each(|input| sum.update(input.as_bytes()));
        let digest = BlobDigest::from_bytes(sum.finish());
        self.vertices.push(Vertex { op, name, location, no_cache: self.no_cache, digest, line: None });
        VertexId(self.vertices.len() - 1)
    }

    /// The digests of the vertices that an operation needs, in the order of [`Op::inputs`].
    pub(crate) fn digests_of_inputs(&self, op: &Op) -> Vec<BlobDigest> {
        op.inputs().into_iter().map(|input| self.vertex(input).digest).collect()
    }

    fn tell(&mut self, before: Option<LineId>, told: Told) -> LineId {
        self.lines.push(Line { before, told });
        LineId(self.lines.len() - 1)
    }

    /// What a history says up to this step, oldest first, beginning with its base image; empty for a step that no text
    /// tells all of.
    pub(crate) fn story(&self, vertex: &Vertex) -> Vec<&Told> {
        let before = |line: &&Line| line.before.map(|before| &self.lines[before.0]);
        let last = vertex.line.map(|line| &self.lines[line.0]);
        let mut story: Vec<&Told> = std::iter::successors(last, before).map(|line| &line.told).collect();
        story.reverse();
        story
    }

    /// How many vertices there are.
    pub(crate) fn len(&self) -> usize {
        self.vertices.len()
    }

    /// One of them.
    pub(crate) fn vertex(&self, id: VertexId) -> &Vertex {
        &self.vertices[id.0]
    }

    /// All vertices in an order in which inputs come first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (VertexId, &Vertex)> {
        self.vertices.iter().enumerate().map(|(index, vertex)| (VertexId(index), vertex))
    }
}

/// A line of the result's history: what was done, and the vertex whose layers it stands for.
#[derive(Debug, Clone)]
pub(crate) struct PlannedHistory {
    pub(crate) created_by: String,
    pub(crate) vertex: Option<VertexId>,
}

/// What a build comes down to.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) graph: Graph,
    pub(crate) target: VertexId,
    pub(crate) config: Config,
    pub(crate) history: Vec<PlannedHistory>,
    /// `created` of the base image: what the result says if it adds nothing.
    pub(crate) base_created: Option<String>,
    /// What the file may not mean, not yet filtered ([`Dockerfile::wanted`]).
    pub(crate) warnings: Vec<Warning>,
    /// What the caller may not mean.
    pub(crate) notes: Vec<String>,
}

/// An image that a stage starts from.
#[derive(Debug, Clone)]
pub(crate) struct BaseImage {
    pub(crate) config: ImageConfig,
    /// For descriptions.
    pub(crate) name: String,
}

/// Finds images by name, for a platform; the error is a sentence for the line that names the image.
pub(crate) type FindImage<'a> = &'a mut dyn FnMut(&str, &Platform) -> Result<BaseImage, String>;

/// What an earlier stage left for those that build on it or copy from it.
#[derive(Clone)]
struct Lowered {
    vertex: VertexId,
    config: Config,
    scope: Scope,
    history: Vec<PlannedHistory>,
    line: LineId,
    base_created: Option<String>,
    /// A `WORKDIR` was there, so that the next one doesn't stand on the base image's.
    workdir_set: bool,
}

/// What is to be lowered.
#[derive(Debug)]
pub(crate) struct Lower<'a> {
    pub(crate) dockerfile: &'a Dockerfile,
    pub(crate) args: &'a BuildArgs,
    /// The last stage if it is not this.
    pub(crate) target: Option<&'a str>,
    pub(crate) labels: &'a [(String, String)],
    pub(crate) platform: &'a Platform,
    /// What of the context is not there.
    pub(crate) ignore: &'a Ignore,
    /// Stages whose steps are done whatever is cached, by name or number.
    pub(crate) no_cache_stages: &'a [String],
    /// Also the stages that the target does not need: for a check.
    pub(crate) all_stages: bool,
    /// What commands may ask for.
    pub(crate) allow: &'a [Entitlement],
    /// There are results of another builder, which may stand on something else than ours would.
    pub(crate) has_imports: bool,
}

/// Lowers a Dockerfile up to a stage.
///
/// # Errors
/// [`DockerfileError`] with the line whose expansion, stage or image is wrong.
pub(crate) fn lower(what: &Lower<'_>, find_image: FindImage<'_>) -> Result<Plan, DockerfileError> {
    let Lower { dockerfile, args, target, labels, platform, ignore, no_cache_stages, all_stages, allow, has_imports } =
        *what;
    let target_stage = dockerfile.target(target)?;
    let mut warnings = Vec::new();
    for stage in &dockerfile.stages {
        check_from(dockerfile, args, stage, &mut warnings);
    }
    let lexer = Lexer::new(dockerfile.escape);
    let bases = dockerfile
        .stages
        .iter()
        .map(|stage| {
            let expanded = lexer.expand(&stage.base, args.for_from());
            let base = expanded.map_err(|e| dockerfile.error(stage.location, &stage.base, e.why))?.text;
            match base.trim() {
                "" => Err(dockerfile.error(stage.location, &stage.base, "FROM names nothing once it is expanded")),
                _ => Ok(base),
            }
        })
        .collect::<Result<Vec<String>, _>>()?;
    let mut needed = needed_stages(dockerfile, &bases, target_stage)?;
    if all_stages {
        needed = (0..dockerfile.stages.len()).collect();
    }
    let mut lowering = Lowering {
        dockerfile,
        args,
        lexer,
        bases,
        platform,
        ignore,
        no_cache_stages,
        allow,
        has_imports,
        find_image,
        graph: Graph::default(),
        stages: vec![None; dockerfile.stages.len()],
        warnings,
    };
    for index in needed {
        lowering.ensure(index)?;
    }
    let mut result = lowering.stages[target_stage].take().expect("because the target is needed by itself");
    for (key, value) in labels {
        result.config.set_label(key, value);
    }
    let unused = args.unused(dockerfile);
    let unused = unused.iter().map(|name| format!("build argument {name} is not used by any ARG"));
    // The built-in frontend is docker's own language; another frontend's file may mean something else.
    let is_dockers = |syntax: &str| {
        let image = syntax.split_whitespace().next().unwrap_or_default().parse::<Reference>();
        image.is_ok_and(|image| ["docker/dockerfile", "docker/dockerfile-upstream"].contains(&image.repository()))
    };
    let other = dockerfile.syntax.iter().filter(|syntax| !is_dockers(syntax));
    let other = other.map(|syntax| format!("syntax {syntax:?} is not fetched, the file is read as a plain Dockerfile"));
    let notes = unused.chain(other).collect();
    Ok(Plan {
        graph: lowering.graph,
        warnings: lowering.warnings,
        notes,
        target: result.vertex,
        config: result.config,
        history: result.history,
        base_created: result.base_created,
    })
}

/// Warns of what a `FROM` may not mean.
fn check_from(dockerfile: &Dockerfile, args: &BuildArgs, stage: &Stage, warnings: &mut Vec<Warning>) {
    let (at, lexer) = (stage.location, Lexer::new(dockerfile.escape));
    let mut warn = |focus: &str, rule, message| warnings.push(dockerfile.warning(at, focus, rule, message));
    for word in [Some(&stage.base), stage.platform.as_ref()].into_iter().flatten() {
        // What can't be expanded is an error soon.
        let Ok(expanded) = lexer.expand(word, args.for_from()) else { continue };
        for name in expanded.unset.iter().filter(|name| !args.is_declared(name)) {
            let hint = dockerfile::suggest(name, args.declared());
            let hint = hint.map(|known| format!(" (did you mean {known}?)")).unwrap_or_default();
            let message = format!("no ARG before the first FROM declares {name}{hint}");
            warn(name, Rule::UndefinedArgInFrom, message);
        }
    }
    if let Some(platform) = &stage.platform
        && let Ok(expanded) = lexer.expand(platform, args.for_from())
        && expanded.unset.is_empty()
    {
        let text = expanded.text;
        let mut parts = text.split('/');
        let is_in_name = |part: &str| stage.name.as_deref().is_some_and(|name| name.contains(part));
        if expanded.used.is_empty() && !parts.any(|part| !part.is_empty() && is_in_name(part)) {
            let message =
                format!("the platform {text} is the same for every build: use a build argument, or --platform");
            warn(platform, Rule::FromPlatformFlagConstDisallowed, message);
        }
        let target = args.for_from().lookup("TARGETPLATFORM");
        if expanded.used.iter().eq(["TARGETPLATFORM"]) && target == Some(text.as_str()) {
            let message = format!("{platform} is the default");
            warn(platform, Rule::RedundantTargetPlatform, message);
        }
    }
    // As if no build argument was given.
    if let Ok(expanded) = lexer.expand(&stage.base, args.defaults())
        && expanded.text.parse::<Reference>().is_err()
    {
        let message = format!("with the defaults of its ARGs, {} is no image's name", stage.base);
        warn(&stage.base, Rule::InvalidDefaultArgInFrom, message);
    }
}

/// The stages that `target` stands on or takes files from, each after those that it needs itself.
///
/// # Errors
/// A stage that needs itself, by way of others; also among stages that `target` doesn't need.
fn needed_stages(dockerfile: &Dockerfile, bases: &[String], target: usize) -> Result<Vec<usize>, DockerfileError> {
    let needs: Vec<Vec<(usize, Location)>> = dockerfile
        .stages
        .iter()
        .enumerate()
        .map(|(index, stage)| {
            let base = dockerfile.stage_named(&bases[index], index).map(|base| (base, stage.location));
            let taken = stage
                .instructions
                .iter()
                .flat_map(|instruction| instruction.kind.stages().map(|from| (from, instruction.location)));
            base.into_iter().chain(taken).collect()
        })
        .collect();
    let mut order = Vec::new();
    let mut needed_count = 0;
    let name = |stage: usize| stage_name(&dockerfile.stages[stage], stage);
    let (mut seen, mut done) = (vec![false; needs.len()], vec![false; needs.len()]);
    // The target first, so that what it needs is known when it is done; the others only for their cycles.
    for start in [target].into_iter().chain(0..needs.len()) {
        // The way from `start`, with the number of the need to look at next: depth first, on a stack of our own.
        let mut way: Vec<(usize, usize)> = Vec::new();
        if !seen[start] {
            seen[start] = true;
            way.push((start, 0));
        }
        while let Some((stage, next)) = way.last_mut() {
            let stage = *stage;
            let Some(&(needed, at)) = needs[stage].get(*next) else {
                order.push(stage);
                done[stage] = true;
                way.pop();
                continue;
            };
            *next += 1;
            if seen[needed] && !done[needed] {
                let from = way.iter().position(|(stage, _)| *stage == needed).unwrap_or_default();
                let circle: Vec<String> =
                    way[from..].iter().map(|(stage, _)| name(*stage)).chain([name(needed)]).collect();
                let message = format!("stages need each other in a circle: {}", circle.join(" needs "));
                return Err(dockerfile.error(at, &name(needed), message));
            }
            if needed > stage {
                let (needed, stage) = (name(needed), name(stage));
                let message = format!("the stage {needed} stands below: it must come before {stage}, which needs it");
                return Err(dockerfile.error(at, &needed, message));
            }
            if !seen[needed] {
                seen[needed] = true;
                way.push((needed, 0));
            }
        }
        if start == target && needed_count == 0 {
            needed_count = order.len();
        }
    }
    order.truncate(needed_count);
    Ok(order)
}

struct Lowering<'a> {
    dockerfile: &'a Dockerfile,
    args: &'a BuildArgs,
    lexer: Lexer,
    /// What each stage starts from, expanded.
    bases: Vec<String>,
    platform: &'a Platform,
    ignore: &'a Ignore,
    no_cache_stages: &'a [String],
    allow: &'a [Entitlement],
    has_imports: bool,
    find_image: FindImage<'a>,
    graph: Graph,
    stages: Vec<Option<Lowered>>,
    warnings: Vec<Warning>,
}

/// A stage while its instructions are gone through.
struct Current {
    lowered: Lowered,
    /// `[name 3/7] `
    label: String,
    /// Where this stage set CMD, which ENTRYPOINT then keeps.
    cmd: Option<Location>,
    /// Where it set ENTRYPOINT.
    entrypoint: Option<Location>,
    /// Where it set HEALTHCHECK.
    healthcheck: Option<Location>,
}

impl<'a> Lowering<'a> {
    /// Lowers a stage if it was not lowered yet.
    fn ensure(&mut self, index: usize) -> Result<(), DockerfileError> {
        if self.stages[index].is_none() {
            let name = stage_name(&self.dockerfile.stages[index], index);
            let is_it = |given: &String| given.eq_ignore_ascii_case(&name) || given.parse() == Ok(index);
            let no_cache = self.no_cache_stages.iter().any(is_it);
            let outer = std::mem::replace(&mut self.graph.no_cache, no_cache);
            self.stages[index] = Some(self.stage(index)?);
            self.graph.no_cache = outer;
        }
        Ok(())
    }

    fn stage(&mut self, index: usize) -> Result<Lowered, DockerfileError> {
        let dockerfile = self.dockerfile;
        let stage = &dockerfile.stages[index];
        let mut lowered = self.base(index)?;
        let triggers = lowered.config.take_onbuild();
        let triggers = triggers.iter().map(|trigger| {
            let parsed = dockerfile.trigger(trigger, stage.location, index);
            parsed.map_err(|why| {
                let message = format!("the base's ONBUILD {trigger:?}: {why}");
                dockerfile.error(stage.location, &stage.base, message)
            })
        });
        let triggers = triggers.collect::<Result<Vec<Instruction>, _>>()?;
        let instructions = || triggers.iter().chain(&stage.instructions);
        let steps_count = 1 + instructions().filter(|i| makes_a_step(&i.kind)).count();
        let name = stage_name(stage, index);
        let label = format!("[{name} 1/{steps_count}] ");
        let mut current = Current { lowered, label, cmd: None, entrypoint: None, healthcheck: None };
        let mut number = 1;
        for (nth, instruction) in instructions().enumerate() {
            if makes_a_step(&instruction.kind) {
                number += 1;
                let onbuild = if nth < triggers.len() { "ONBUILD " } else { "" };
                current.label = format!("[{name} {number}/{steps_count}] {onbuild}");
            }
            self.instruction(&mut current, instruction)?;
        }
        let mut lowered = current.lowered;
        lowered.config.set_env(lowered.scope.env());
        Ok(lowered)
    }

    fn warn(&mut self, at: Location, focus: &str, rule: Rule, message: impl Into<String>) {
        self.warnings.push(self.dockerfile.warning(at, focus, rule, message));
    }

    fn base(&mut self, index: usize) -> Result<Lowered, DockerfileError> {
        let stage = &self.dockerfile.stages[index];
        let name = self.bases[index].clone();
        let platform = self.platform_of(stage)?;
        if name.eq_ignore_ascii_case("scratch") {
            let config = Config::scratch(&platform);
            return Ok(Lowered {
                vertex: self.graph.add(Op::Scratch, String::new(), stage.location),
                scope: Scope::new(&config.env()),
                config,
                history: vec![],
                line: self.graph.tell(None, Told::Base(vec![])),
                base_created: None,
                workdir_set: false,
            });
        }
        if let Some(earlier) = self.dockerfile.stage_named(&name, index) {
            let mut lowered = self.stages[earlier].clone().expect("because needed stages are lowered in order");
            lowered.scope = lowered.scope.for_child();
            return Ok(lowered);
        }
        let image = self.image(&name, &platform, stage.location)?;
        let (found, wanted) = (image.config.platform(), &platform);
        if (&found.os, &found.architecture) != (&wanted.os, &wanted.architecture) {
            let message = format!("the image {name} is made for {found}, this stage is for {wanted}");
            self.warn(stage.location, &stage.base, Rule::InvalidBaseImagePlatform, message);
        }
        let config = Config::from_image(&image.config);
        let mut scope = Scope::new(&config.env());
        // Commands are looked for somewhere in any case, so the image says where.
        if scope.lookup("PATH").is_none() {
            scope.set_env("PATH", DEFAULT_PATH);
        }
        Ok(Lowered {
            vertex: self.image_vertex(&image, format!("[{}] FROM {name}", stage_name(stage, index)), stage.location),
            scope,
            config,
            history: vec![],
            line: self.graph.tell(None, Told::Base(history_of(&image.config))),
            base_created: image.config.document().value().created().clone(),
            workdir_set: false,
        })
    }

    /// What a stage is for: the build's platform, unless it says otherwise.
    fn platform_of(&self, stage: &Stage) -> Result<Platform, DockerfileError> {
        let Some(platform) = &stage.platform else { return Ok(self.platform.clone()) };
        let expanded = self.lexer.expand(platform, self.args.for_from());
        let wanted = expanded.map_err(|e| self.dockerfile.error(stage.location, platform, e.why))?.text;
        if wanted.is_empty() {
            return Ok(self.platform.clone());
        }
        wanted
            .parse()
            .map_err(|error: PlatformError| self.dockerfile.error(stage.location, platform, error.to_string()))
    }

    fn image(&mut self, name: &str, platform: &Platform, at: Location) -> Result<BaseImage, DockerfileError> {
        (self.find_image)(name, platform).map_err(|why| {
            let stage = self.dockerfile.stage_like(name, self.dockerfile.stages.len());
            let hint = stage.map(|stage| format!("; or is the stage {stage} meant?")).unwrap_or_default();
            self.dockerfile.error(at, name, format!("{why}{hint}"))
        })
    }

    fn image_vertex(&mut self, image: &BaseImage, name: String, at: Location) -> VertexId {
        let op = Op::Image { diff_ids: image.config.diff_ids().to_vec(), name: image.name.clone() };
        self.graph.add(op, name, at)
    }

    fn expand(&mut self, current: &Current, at: Location, word: &str) -> Result<String, DockerfileError> {
        self.expand_in(&current.lowered.scope, at, word)
    }

    fn expand_in(&mut self, scope: &Scope, at: Location, word: &str) -> Result<String, DockerfileError> {
        let expanded = self.lexer.expand(word, scope).map_err(|e| self.dockerfile.error(at, word, e.why))?;
        self.warn_of_unset(scope, at, &expanded);
        Ok(expanded.text)
    }

    fn warn_of_unset(&mut self, scope: &Scope, at: Location, expanded: &Expansion) {
        let is_name = |name: &&String| name.starts_with(|c: char| c == '_' || c.is_alphabetic());
        for name in expanded.unset.iter().filter(|name| !scope.declares(name)).filter(is_name) {
            let hint = dockerfile::suggest(name, scope.run_env().map(|(name, _)| name));
            let hint = hint.map(|known| format!(" (did you mean ${known}?)")).unwrap_or_default();
            self.warn(at, name, Rule::UndefinedVar, format!("nothing sets ${name}{hint}"));
        }
    }

    fn expand_all(
        &mut self,
        current: &Current,
        at: Location,
        words: &[String],
    ) -> Result<Vec<String>, DockerfileError> {
        words.iter().map(|word| self.expand(current, at, word)).collect()
    }

    fn expand_option(
        &mut self,
        current: &Current,
        at: Location,
        word: &Option<String>,
    ) -> Result<Option<String>, DockerfileError> {
        word.as_ref().map(|word| self.expand(current, at, word)).transpose()
    }

    /// Of these instructions a stage's last one counts.
    fn once(&mut self, before: &mut Option<Location>, at: Location, name: &str) {
        if let Some(before) = before.replace(at) {
            let message = format!("the stage has another {name} below, and only that one counts");
            self.warn(before, name, Rule::MultipleInstructionsDisallowed, message);
        }
    }

    /// A command in shell form that a container runs needs a shell to pass signals on.
    fn recommend_json(&mut self, current: &Current, at: Location, command: &CommandLine, name: &str) {
        if matches!(command, CommandLine::Shell(_)) && !current.lowered.config.has_shell() {
            let message = format!("write {name} as a JSON array: a shell in between may keep signals from the command");
            self.warn(at, name, Rule::JSONArgsRecommended, message);
        }
    }

    fn warn_of_secret(&mut self, at: Location, instruction: &str, name: &str) {
        if dockerfile::names_a_secret(name) {
            let message = format!("what {instruction} {name} holds stays in the image: use RUN --mount=type=secret");
            self.warn(at, name, Rule::SecretsUsedInArgOrEnv, message);
        }
    }

    /// A plain path that the ignore file hides is not found later; a pattern then matches nothing without a word.
    fn warn_of_ignored(&mut self, at: Location, path: &str) {
        if self.ignore.is_empty() || self.ignore.may_show_again() {
            return;
        }
        let clean = absolute("/", path);
        if self.ignore.hides(clean.trim_start_matches('/').as_bytes()) {
            let message = format!("the ignore file hides {path}");
            self.warn(at, path, Rule::CopyIgnoredFile, message);
        }
    }

    fn instruction(&mut self, current: &mut Current, instruction: &Instruction) -> Result<(), DockerfileError> {
        let at = instruction.location;
        let created_by;
        let mut told = Told::Named(instruction.text.split(' ').next().unwrap_or_default().to_owned());
        let before = current.lowered.vertex;
        // The step that the entry stands for: its key, and what it made.
        let mut step = None;
        match &instruction.kind {
            InstructionKind::Run(run) => (created_by, told) = self.run(current, instruction, run)?,
            InstructionKind::Copy(copy) => {
                let (vertex, text) = self.copy(current, instruction, copy)?;
                (step, created_by, told) = (Some(vertex), text, Told::Files);
            }
            InstructionKind::Add(add) => {
                let (vertex, text) = self.add(current, instruction, add)?;
                (step, created_by, told) = (Some(vertex), text, Told::Files);
            }
            InstructionKind::Workdir(path) => {
                let path = self.expand(current, at, path)?;
                self.refuse_drive(at, &path)?;
                if !path.starts_with('/') && !current.lowered.workdir_set {
                    let message = format!("WORKDIR {path} is relative to whatever the base image's is");
                    self.warn(at, &path, Rule::WorkdirRelativePath, message);
                }
                current.lowered.workdir_set = true;
                let path = absolute(current.lowered.config.working_dir(), &path);
                self.admit(at, &path)?;
                current.lowered.config.set_working_dir(&path);
                created_by = format!("WORKDIR {path}");
                told = Told::Says(vec![created_by.clone()]);
                let name = format!("{}{created_by}", current.label);
                let user = current.lowered.config.user().to_owned();
                let op = Op::Directory { base: current.lowered.vertex, path, user };
                current.lowered.vertex = self.graph.add(op, name, at);
            }
            InstructionKind::Env(pairs) => {
                // All values see the environment before the instruction.
                let before = current.lowered.scope.clone();
                let mut env = Vec::new();
                for pair in pairs {
                    let name = self.expand_in(&before, at, &pair.name)?;
                    let value = self.expand_in(&before, at, &pair.value)?;
                    self.warn_of_secret(at, "ENV", &name);
                    current.lowered.scope.set_env(&name, &value);
                    env.push(format!("{name}={value}"));
                }
                created_by = format!("ENV {}", env.join(" "));
                told = Told::Env { env, written: instruction.text.clone() };
            }
            InstructionKind::Arg(declared) => {
                let mut said = vec!["ARG".to_owned()];
                for arg in declared {
                    self.warn_of_secret(at, "ARG", &arg.name);
                    let before = current.lowered.scope.clone();
                    let value = current.lowered.scope.declare(arg, self.args, &self.lexer);
                    let expanded =
                        value.map_err(|e| self.dockerfile.error(at, arg.default.as_deref().unwrap_or(""), e.why))?;
                    let Some(expanded) = expanded else {
                        said.push(arg.name.clone());
                        continue;
                    };
                    self.warn_of_unset(&before, at, &expanded);
                    said.push(format!("{}={}", arg.name, expanded.text));
                }
                created_by = said.join(" ");
            }
            InstructionKind::Label(pairs) => {
                let mut said = "LABEL".to_owned();
                for pair in pairs {
                    let key = self.expand(current, at, &pair.name)?;
                    let value = self.expand(current, at, &pair.value)?;
                    current.lowered.config.set_label(&key, &value);
                    said.push_str(&format!(" {key}={value}"));
                }
                created_by = said;
            }
            InstructionKind::User(user) => {
                let user = self.expand(current, at, user)?;
                current.lowered.config.set_user(&user);
                created_by = format!("USER {user}");
                told = Told::Says(vec![created_by.clone()]);
            }
            InstructionKind::Expose(ports) => {
                let mut said = Vec::new();
                for ports in ports {
                    let split = self.lexer.split(ports, &current.lowered.scope);
                    for port in split.map_err(|e| self.dockerfile.error(at, ports, e.why))? {
                        let exposed = exposed(&port).map_err(|why| self.dockerfile.error(at, &port, why))?;
                        exposed.ports.iter().for_each(|port| current.lowered.config.expose(port));
                        for (rule, message) in exposed.warnings {
                            self.warn(at, &port, rule, message);
                        }
                        said.extend(exposed.ports);
                    }
                }
                created_by = format!("EXPOSE {}", plain(&said));
            }
            InstructionKind::Volume(paths) => {
                let paths = self.expand_all(current, at, paths)?;
                paths.iter().for_each(|path| current.lowered.config.add_volume(path));
                created_by = format!("VOLUME {}", plain(&paths));
            }
            InstructionKind::StopSignal(signal) => {
                let signal = self.expand(current, at, signal)?;
                if !is_signal(&signal) {
                    let message = format!("unknown signal {signal:?}: expected a name like SIGTERM, or a number");
                    return Err(self.dockerfile.error(at, &signal, message));
                }
                current.lowered.config.set_stop_signal(&signal);
                created_by = format!("STOPSIGNAL {signal}");
            }
            InstructionKind::Entrypoint(command) => {
                self.once(&mut current.entrypoint, at, "ENTRYPOINT");
                self.recommend_json(current, at, command, "ENTRYPOINT");
                let argv = self.argv(current, command);
                current.lowered.config.set_entrypoint(&argv, current.cmd.is_some());
                created_by = format!("ENTRYPOINT {}", quoted(&argv));
            }
            InstructionKind::Cmd(command) => {
                self.once(&mut current.cmd, at, "CMD");
                self.recommend_json(current, at, command, "CMD");
                let argv = self.argv(current, command);
                current.lowered.config.set_cmd(&argv);
                created_by = format!("CMD {}", quoted(&argv));
            }
            InstructionKind::Shell(shell) => {
                current.lowered.config.set_shell(shell);
                created_by = format!("SHELL {}", plain(shell));
                told = Told::Says(vec![created_by.clone(), instruction.text.clone()]);
            }
            InstructionKind::Healthcheck(check) => {
                self.once(&mut current.healthcheck, at, "HEALTHCHECK");
                let check = healthcheck(check);
                created_by = healthcheck_text(&check);
                current.lowered.config.set_healthcheck(check);
            }
            InstructionKind::Maintainer(name) => {
                current.lowered.config.set_author(name);
                created_by = format!("MAINTAINER {name}");
            }
            // As BuildKit, without a line in the history.
            InstructionKind::Onbuild(trigger) => {
                current.lowered.config.add_onbuild(trigger);
                return Ok(());
            }
        }
        let made = current.lowered.vertex;
        let vertex = (made != before).then_some(step.unwrap_or(made));
        let line = self.graph.tell(Some(current.lowered.line), told);
        current.lowered.line = line;
        if let Some(VertexId(at)) = vertex {
            let vertex = &mut self.graph.vertices[at];
            vertex.line = vertex.op.is_told_by_text().then_some(line);
        }
        current.lowered.history.push(PlannedHistory { created_by, vertex });
        Ok(())
    }

    fn argv(&self, current: &Current, command: &CommandLine) -> Vec<String> {
        command.argv(&current.lowered.config.shell())
    }

    /// What our history says of it, and what others' do.
    fn run(
        &mut self,
        current: &mut Current,
        instruction: &Instruction,
        run: &Run,
    ) -> Result<(String, Told), DockerfileError> {
        let needed = [
            (run.security == RunSecurity::Insecure, "--security=insecure", Entitlement::SecurityInsecure),
            (run.network == RunNetwork::Host, "--network=host", Entitlement::NetworkHost),
        ];
        for (is_asked_for, flag, needed) in needed {
            if is_asked_for && !self.allow.contains(&needed) {
                let message = format!("{flag} is not allowed: build with --allow {}", needed.name());
                return Err(self.dockerfile.error(instruction.location, flag, message));
            }
        }
        let mounts = self.mounts(current, instruction.location, run)?;
        let lowered = &mut current.lowered;
        let pairs = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let invocation = run.invocation(&lowered.config.shell());
        let args: Vec<String> = lowered.scope.args().map(|(name, value)| format!("{name}={value}")).collect();
        let declared: Vec<String> = lowered.scope.declared().map(|(name, value)| format!("{name}={value}")).collect();
        let count = (!declared.is_empty()).then(|| format!("|{}", declared.len()));
        let words: Vec<&str> = count.iter().chain(&declared).chain(&invocation.argv).map(String::as_str).collect();
        let created_by = format!("RUN {} # buildkit", words.join(" "));
        let told = Told::Run { args, words: invocation.argv.clone() };
        let op = RunOp {
            invocation,
            env: lowered.scope.run_env().map(pairs).collect(),
            unkeyed_env: self.args.proxies().map(pairs).collect(),
            working_dir: lowered.config.working_dir().to_owned(),
            user: lowered.config.user().to_owned(),
            mounts,
            network: run.network,
            security: run.security,
        };
        let name = format!("{}{}", current.label, instruction.text);
        lowered.vertex = self.graph.add(Op::Run { base: lowered.vertex, run: op }, name, instruction.location);
        Ok((created_by, told))
    }

    fn mounts(&mut self, current: &Current, at: Location, run: &Run) -> Result<Vec<MountOp>, DockerfileError> {
        let mut mounts = Vec::new();
        for mount in &run.mounts {
            let scope = &current.lowered.scope;
            let mut expansions = Vec::new();
            let resolved = mount.resolve(&mut |value| {
                let expanded = self.lexer.expand(value, scope)?;
                let text = expanded.text.clone();
                expansions.push(expanded);
                Ok(text)
            });
            let Mount { kind, target } = resolved.map_err(|error| self.dockerfile.mount_error(at, &error))?;
            for expanded in &expansions {
                self.warn_of_unset(scope, at, expanded);
            }
            let from = match (&mount.from, &kind) {
                (Some(from), _) => Some(self.files_from(from, at)?),
                (None, MountKind::Bind { .. }) => Some(FilesFrom::Context),
                (None, _) => None,
            };
            let target = match (target, &kind) {
                (Some(target), _) => Some(absolute(current.lowered.config.working_dir(), &target)),
                // As in BuildKit.
                (None, MountKind::Ssh { .. }) => Some(format!("/run/buildkit/ssh_agent.{}", mounts.len())),
                (None, _) => None,
            };
            if target.as_deref() == Some("/") {
                let message = "the root file system cannot be mounted over: give a target below it";
                return Err(self.dockerfile.error(at, &mount.text, message));
            }
            mounts.push(MountOp { kind, from, target });
        }
        Ok(mounts)
    }

    fn files_from(&mut self, from: &CopyFrom, at: Location) -> Result<FilesFrom, DockerfileError> {
        Ok(match from {
            CopyFrom::Context => FilesFrom::Context,
            CopyFrom::Stage(stage) => {
                self.ensure(*stage)?;
                let lowered = self.stages[*stage].as_ref().expect("because it was just lowered");
                FilesFrom::Vertex(lowered.vertex)
            }
            CopyFrom::Image(name) if name == "scratch" => {
                FilesFrom::Vertex(self.graph.add(Op::Scratch, String::new(), at))
            }
            CopyFrom::Image(name) => {
                let image = self.image(name, self.platform, at)?;
                FilesFrom::Vertex(self.image_vertex(&image, format!("FROM {name}"), at))
            }
        })
    }

    fn copy(
        &mut self,
        current: &mut Current,
        instruction: &Instruction,
        copy: &Copy,
    ) -> Result<(VertexId, String), DockerfileError> {
        let at = instruction.location;
        let from = self.files_from(&copy.from, at)?;
        let (paths, inline) = self.sources(current, at, &copy.sources)?;
        for path in &paths {
            if let Ok(Some(_)) = Remote::parse(path) {
                let message = format!("COPY takes files of the context or a stage: use ADD for {path}");
                return Err(self.dockerfile.error(at, path, message));
            }
            if from == FilesFrom::Context {
                self.warn_of_ignored(at, path);
            }
        }
        let sources = told_sources(&paths, &inline);
        let (dest, told_dest) = self.destination(current, at, &copy.dest)?;
        let op = CopyOp {
            parts: vec![CopyPart { paths, inline, parents: copy.parents, ..CopyPart::of(from) }],
            dest,
            chown: self.expand_option(current, at, &copy.chown)?,
            chmod: self.expand_option(current, at, &copy.chmod)?,
            excludes: self.expand_all(current, at, &copy.excludes)?,
            link: copy.link,
            under: None,
        };
        let verb = if copy.parents { "COPY --parents" } else { "COPY" };
        let text = told_copy(verb, &op, &sources, &told_dest);
        Ok((self.place(current, instruction, op), text))
    }

    fn add(
        &mut self,
        current: &mut Current,
        instruction: &Instruction,
        add: &Add,
    ) -> Result<(VertexId, String), DockerfileError> {
        let at = instruction.location;
        let (paths, inline) = self.sources(current, at, &add.sources)?;
        let checksum = self.expand_option(current, at, &add.checksum)?;
        if let Some(checksum) = &checksum
            && paths.len() + inline.len() > 1
        {
            return Err(self.dockerfile.error(at, checksum, "--checksum is for one source alone"));
        }
        let sources = told_sources(&paths, &inline);
        let local = CopyPart { unpack: add.unpack.unwrap_or(true), ..CopyPart::of(FilesFrom::Context) };
        let mut parts: Vec<CopyPart> = Vec::new();
        for path in paths {
            match Remote::parse(&path).map_err(|why| self.dockerfile.error(at, &path, why))? {
                None if checksum.is_some() => {
                    let message = "--checksum is for downloads and git repositories: what is in the context is known";
                    return Err(self.dockerfile.error(at, "--checksum", message));
                }
                None => {
                    self.warn_of_ignored(at, &path);
                    match parts.last_mut().filter(|part| part.from == FilesFrom::Context) {
                        Some(part) => part.paths.push(path),
                        None => parts.push(CopyPart { paths: vec![path], ..local.clone() }),
                    }
                }
                Some(Remote::Download(mut download)) => {
                    if let Some(checksum) = &checksum
                        && checksum.parse::<BlobDigest>().is_err()
                    {
                        let message =
                            format!("{checksum:?} is no digest: sha256: and 64 hexadecimal digits are expected");
                        return Err(self.dockerfile.error(at, checksum, message));
                    }
                    download.checksum.clone_from(&checksum);
                    let name = download.name.clone();
                    let vertex = self.graph.add(Op::Download(download), format!("download {path}"), at);
                    let unpack = add.unpack.unwrap_or(false);
                    let path = escaped(&name);
                    parts.push(CopyPart { paths: vec![path], unpack, ..CopyPart::of(FilesFrom::Vertex(vertex)) });
                }
                Some(Remote::Git(mut git)) => {
                    git.keep_git_dir |= add.keep_git_dir.unwrap_or(false);
                    git.checksum = checksum.clone().or(git.checksum);
                    let vertex = self.graph.add(Op::Git(git), format!("git {path}"), at);
                    parts.push(CopyPart { paths: vec!["/".into()], ..CopyPart::of(FilesFrom::Vertex(vertex)) });
                }
            }
        }
        if !inline.is_empty() {
            parts.push(CopyPart { inline, ..local });
        }
        let (dest, told_dest) = self.destination(current, at, &add.dest)?;
        let op = CopyOp {
            parts,
            dest,
            chown: self.expand_option(current, at, &add.chown)?,
            chmod: self.expand_option(current, at, &add.chmod)?,
            excludes: self.expand_all(current, at, &add.excludes)?,
            link: add.link,
            under: None,
        };
        let text = told_copy("ADD", &op, &sources, &told_dest);
        Ok((self.place(current, instruction, op), text))
    }

    /// Adds a copy: onto the tree so far, or with `--link` onto nothing, to be laid over the tree as a stack. The copy
    /// itself, whatever it is laid over.
    fn place(&mut self, current: &mut Current, instruction: &Instruction, mut copy: CopyOp) -> VertexId {
        let (at, name) = (instruction.location, format!("{}{}", current.label, instruction.text));
        let base = current.lowered.vertex;
        if copy.link {
            // BuildKit links no copy that changes modes.
            copy.under = (self.has_imports && copy.chmod.is_some()).then_some(base);
            let scratch = self.graph.add(Op::Scratch, String::new(), at);
            let over = self.graph.add(Op::Copy { base: scratch, copy }, name, at);
            current.lowered.vertex = self.graph.add(Op::Merge { base, over }, String::new(), at);
            return over;
        }
        current.lowered.vertex = self.graph.add(Op::Copy { base, copy }, name, at);
        current.lowered.vertex
    }

    /// Where files go: absolute, and with the slash at the end that asks for a directory; and as it is written, expanded.
    fn destination(
        &mut self,
        current: &Current,
        at: Location,
        dest: &str,
    ) -> Result<(String, String), DockerfileError> {
        let dest = self.expand(current, at, dest)?;
        self.refuse_drive(at, &dest)?;
        let mut path = absolute(current.lowered.config.working_dir(), &dest);
        self.admit(at, &path)?;
        let directory = dest.ends_with('/') || dest == "." || dest.ends_with("/.");
        if directory && !path.ends_with('/') {
            path.push('/');
        }
        Ok((path, dest))
    }

    /// Refuses a path of Windows.
    fn refuse_drive(&self, at: Location, path: &str) -> Result<(), DockerfileError> {
        match has_drive(path) {
            true => Err(self.dockerfile.error(at, path, format!("{path:?} is a path of Windows, the image is Linux"))),
            false => Ok(()),
        }
    }

    /// Refuses a path that no layer can hold.
    fn admit(&self, at: Location, path: &str) -> Result<(), DockerfileError> {
        match path.split('/').find(|name| name.starts_with(".wh.")) {
            Some(name) => {
                let why = format!("{path:?}: names that begin with .wh. are kept for what layers take away");
                Err(self.dockerfile.error(at, name, why))
            }
            None => Ok(()),
        }
    }

    #[allow(clippy::type_complexity, reason = "two lists that are taken apart at once")]
    fn sources(
        &mut self,
        current: &Current,
        at: Location,
        sources: &[CopySource],
    ) -> Result<(Vec<String>, Vec<(String, Vec<u8>)>), DockerfileError> {
        let (mut paths, mut inline) = (Vec::new(), Vec::new());
        for source in sources {
            match source {
                CopySource::Path(path) => paths.push(self.expand(current, at, path)?),
                CopySource::Heredoc(heredoc) => {
                    let text = heredoc.text();
                    let text = if heredoc.expand {
                        let expanded = Lexer::for_heredoc().expand(&text, &current.lowered.scope);
                        let expanded = expanded.map_err(|e| self.dockerfile.error(at, &heredoc.name, e.why))?;
                        self.warn_of_unset(&current.lowered.scope, at, &expanded);
                        expanded.text
                    } else {
                        text
                    };
                    inline.push((heredoc.name.clone(), text.into_bytes()));
                }
            }
        }
        Ok((paths, inline))
    }
}

/// The sources of a copy as a history has them.
fn told_sources(paths: &[String], inline: &[(String, Vec<u8>)]) -> String {
    let inline = inline.iter().map(|(name, _)| format!(" <<{name}"));
    paths.iter().map(|path| format!(" {path}")).chain(inline).collect()
}

/// What a history says of a copy: of its flags only those that say what the files are like, as in BuildKit.
fn told_copy(verb: &str, copy: &CopyOp, sources: &str, dest: &str) -> String {
    let flag = |name: &str, value: &Option<String>| match value.as_deref() {
        None | Some("") => String::new(),
        Some(value) => format!(" --{name}={value}"),
    };
    let flags = flag("chown", &copy.chown) + &flag("chmod", &copy.chmod);
    format!("{verb}{flags}{sources} {dest} # buildkit")
}

/// A name as a pattern that matches nothing else.
pub(crate) fn escaped(name: &str) -> String {
    let special = |c| matches!(c, '*' | '?' | '[' | '\\');
    name.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

fn makes_a_step(kind: &InstructionKind) -> bool {
    use InstructionKind::{Add, Copy, Run, Workdir};
    matches!(kind, Run(_) | Copy(_) | Add(_) | Workdir(_))
}

fn stage_name(stage: &Stage, index: usize) -> String {
    stage.name.clone().unwrap_or_else(|| format!("stage-{index}"))
}

/// Gives planned history the times and marks that are known once the graph is solved. `made` says for a vertex when its
/// layers were made, and nothing if it made none; `key` what its entry carries so that others can tell the step again.
pub(crate) fn history(
    planned: &[PlannedHistory],
    base_created: Option<&str>,
    made: impl Fn(VertexId) -> Option<String>,
    key: impl Fn(VertexId) -> String,
) -> (Vec<HistoryEntry>, Option<String>) {
    // An instruction without a layer happened when the layer before it did, or else the first layer that the build adds:
    // as BuildKit has it, and a rebuild from the cache then gives the same bytes.
    let first = planned.iter().find_map(|line| line.vertex.and_then(&made));
    let mut created = first.or_else(|| base_created.map(str::to_owned));
    let mut entries = Vec::new();
    for line in planned {
        let layer = line.vertex.and_then(&made);
        let empty_layer = layer.is_none();
        created = layer.or(created);
        let key = line.vertex.map(&key);
        let (created, created_by) = (created.clone(), line.created_by.clone());
        entries.push(HistoryEntry { created, created_by, key, empty_layer });
    }
    (entries, created)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_takes_its_times_from_layers() {
        let line = |text: &str, vertex| PlannedHistory { created_by: text.into(), vertex };
        let planned =
            [line("ENV", None), line("RUN", Some(VertexId(1))), line("CMD", None), line("RUN 2", Some(VertexId(2)))];
        let made = |vertex| (vertex == VertexId(1)).then(|| "t1".to_owned());
        let (entries, created) = history(&planned, Some("t0"), made, |vertex| format!("key {}", vertex.0));
        let seen: Vec<_> = entries.iter().map(|e| (e.created.as_deref().unwrap(), e.empty_layer)).collect();
        assert_eq!(seen, [("t1", true), ("t1", false), ("t1", true), ("t1", true)]);
        let keys: Vec<_> = entries.iter().map(|e| e.key.as_deref()).collect();
        assert_eq!(keys, [None, Some("key 1"), None, Some("key 2")]);
        assert_eq!(created.as_deref(), Some("t1"));
        let (entries, created) = history(&planned[..1], Some("t0"), |_| None, |_| String::new());
        assert_eq!((entries[0].created.as_deref(), created.as_deref()), (Some("t0"), Some("t0")), "of the base");
    }
}
