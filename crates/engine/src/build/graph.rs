//! A Dockerfile as a graph of operations.
//!
//! Lowering goes through the stages that the target needs, in order. Instructions that change files become vertices,
//! each standing on earlier ones; instructions that only change the config change the config. What comes out no longer
//! knows about Dockerfiles: the solver sees operations and inputs, nothing else.

use plies_oci::{DiffId, ImageConfig, Platform, Reference};
use serde_json::json;

use super::config::{Config, HistoryEntry};
use crate::dockerfile::words::{Lexer, Variables};
use crate::dockerfile::{
    Add, BuildArgs, CommandLine, Copy, CopyFrom, CopySource, Dockerfile, DockerfileError, Healthcheck, Instruction,
    InstructionKind, Invocation, Location, Run, RunNetwork, RunSecurity, Scope, Stage,
};

/// A vertex of a [`Graph`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct VertexId(usize);

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
}

/// Files to put into a tree.
#[derive(Debug, Clone)]
pub(crate) struct CopyOp {
    pub(crate) from: FilesFrom,
    /// Paths or patterns below the source's root.
    pub(crate) paths: Vec<String>,
    /// Files that stand in the Dockerfile: name and bytes.
    pub(crate) inline: Vec<(String, Vec<u8>)>,
    /// Absolute; a slash at the end means a directory.
    pub(crate) dest: String,
    pub(crate) chown: Option<String>,
    pub(crate) chmod: Option<String>,
    pub(crate) excludes: Vec<String>,
    /// ADD: archives are unpacked.
    pub(crate) unpack: bool,
    /// It stands on nothing, to be laid over whatever there is.
    pub(crate) link: bool,
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
    /// The stack of `base` with the stack of `over` on top: no file is touched.
    Merge { base: VertexId, over: VertexId },
}

/// An operation with what people call it.
#[derive(Debug, Clone)]
pub(crate) struct Vertex {
    pub(crate) op: Op,
    /// `[build 2/5] RUN make`; empty for what is not worth a line.
    pub(crate) name: String,
    pub(crate) location: Location,
}

/// Operations, inputs before their users.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    vertices: Vec<Vertex>,
}

impl Graph {
    fn add(&mut self, op: Op, name: String, location: Location) -> VertexId {
        self.vertices.push(Vertex { op, name, location });
        VertexId(self.vertices.len() - 1)
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
    pub(crate) warnings: Vec<String>,
}

/// An image that a stage starts from.
#[derive(Debug, Clone)]
pub(crate) struct BaseImage {
    pub(crate) config: ImageConfig,
    /// For descriptions.
    pub(crate) name: String,
}

/// Finds images by name; the error is a sentence for the line that names the image.
pub(crate) type FindImage<'a> = &'a mut dyn FnMut(&str) -> Result<BaseImage, String>;

/// What an earlier stage left for those that build on it or copy from it.
#[derive(Clone)]
struct Lowered {
    vertex: VertexId,
    config: Config,
    scope: Scope,
    history: Vec<PlannedHistory>,
    base_created: Option<String>,
}

/// Lowers `dockerfile` up to the stage `target`.
///
/// # Errors
/// [`DockerfileError`] with the line whose expansion, stage or image is wrong.
pub(crate) fn lower(
    dockerfile: &Dockerfile,
    args: &BuildArgs,
    target: Option<&str>,
    labels: &[(String, String)],
    platform: &Platform,
    find_image: FindImage<'_>,
) -> Result<Plan, DockerfileError> {
    let target_stage = dockerfile.target(target)?;
    let lexer = Lexer::new(dockerfile.escape);
    let bases = dockerfile
        .stages
        .iter()
        .map(|stage| {
            let expanded = lexer.expand(&stage.base, args.for_from());
            expanded.map(|e| e.text).map_err(|e| dockerfile.error(stage.location, &stage.base, e.why))
        })
        .collect::<Result<Vec<String>, _>>()?;
    let needed = needed_stages(dockerfile, &bases, target_stage)?;
    let mut lowering = Lowering {
        dockerfile,
        args,
        lexer,
        bases,
        platform,
        find_image,
        graph: Graph::default(),
        stages: vec![None; dockerfile.stages.len()],
    };
    for index in needed {
        let lowered = lowering.stage(index)?;
        lowering.stages[index] = Some(lowered);
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
    let warnings = unused.chain(other).collect();
    Ok(Plan {
        graph: lowering.graph,
        target: result.vertex,
        config: result.config,
        history: result.history,
        base_created: result.base_created,
        warnings,
    })
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
                let name = |stage: usize| stage_name(&dockerfile.stages[stage], stage);
                let circle: Vec<String> =
                    way[from..].iter().map(|(stage, _)| name(*stage)).chain([name(needed)]).collect();
                let message = format!("stages need each other in a circle: {}", circle.join(" needs "));
                return Err(dockerfile.error(at, &name(needed), message));
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
    find_image: FindImage<'a>,
    graph: Graph,
    stages: Vec<Option<Lowered>>,
}

/// A stage while its instructions are gone through.
struct Current {
    lowered: Lowered,
    /// `[name 3/7] `
    label: String,
    /// Whether this stage set CMD, so that ENTRYPOINT keeps it.
    own_cmd: bool,
}

impl<'a> Lowering<'a> {
    fn stage(&mut self, index: usize) -> Result<Lowered, DockerfileError> {
        let stage = &self.dockerfile.stages[index];
        let steps_count = 1 + stage.instructions.iter().filter(|i| makes_a_step(&i.kind)).count();
        let name = stage.name.clone().unwrap_or_else(|| format!("stage-{index}"));
        let mut current =
            Current { lowered: self.base(index)?, label: format!("[{name} 1/{steps_count}] "), own_cmd: false };
        let mut number = 1;
        for instruction in &stage.instructions {
            if makes_a_step(&instruction.kind) {
                number += 1;
                current.label = format!("[{name} {number}/{steps_count}] ");
            }
            self.instruction(&mut current, instruction)?;
        }
        let mut lowered = current.lowered;
        lowered.config.set_env(lowered.scope.env());
        Ok(lowered)
    }

    fn base(&mut self, index: usize) -> Result<Lowered, DockerfileError> {
        let stage = &self.dockerfile.stages[index];
        let name = self.bases[index].clone();
        if let Some(platform) = &stage.platform {
            self.check_platform(stage, platform)?;
        }
        if name.eq_ignore_ascii_case("scratch") {
            let config = Config::scratch(self.platform);
            return Ok(Lowered {
                vertex: self.graph.add(Op::Scratch, String::new(), stage.location),
                scope: Scope::new(&config.env()),
                config,
                history: vec![],
                base_created: None,
            });
        }
        if let Some(earlier) = self.dockerfile.stage_named(&name, index) {
            let mut lowered = self.stages[earlier].clone().expect("because needed stages are lowered in order");
            lowered.scope = lowered.scope.for_child();
            return Ok(lowered);
        }
        let image = self.image(&name, stage.location)?;
        let config = Config::from_image(&image.config);
        Ok(Lowered {
            vertex: self.image_vertex(&image, format!("[{}] FROM {name}", stage_name(stage, index)), stage.location),
            scope: Scope::new(&config.env()),
            config,
            history: vec![],
            base_created: image.config.document().value().created().clone(),
        })
    }

    fn check_platform(&self, stage: &Stage, platform: &str) -> Result<(), DockerfileError> {
        let expanded = self.lexer.expand(platform, self.args.for_from());
        let wanted = expanded.map_err(|e| self.dockerfile.error(stage.location, platform, e.why))?.text;
        let ours = self.platform.to_string();
        if wanted.is_empty() || wanted == ours || ours.strip_prefix("linux/") == Some(&wanted) {
            return Ok(());
        }
        let message = format!("platform {wanted} cannot be built here: this is {ours}");
        Err(self.dockerfile.error(stage.location, platform, message))
    }

    fn image(&mut self, name: &str, at: Location) -> Result<BaseImage, DockerfileError> {
        (self.find_image)(name).map_err(|why| self.dockerfile.error(at, name, why))
    }

    fn image_vertex(&mut self, image: &BaseImage, name: String, at: Location) -> VertexId {
        let op = Op::Image { diff_ids: image.config.diff_ids().to_vec(), name: image.name.clone() };
        self.graph.add(op, name, at)
    }

    fn expand(&self, current: &Current, at: Location, word: &str) -> Result<String, DockerfileError> {
        self.expand_in(&current.lowered.scope, at, word)
    }

    fn expand_in(&self, scope: &dyn Variables, at: Location, word: &str) -> Result<String, DockerfileError> {
        Ok(self.lexer.expand(word, scope).map_err(|e| self.dockerfile.error(at, word, e.why))?.text)
    }

    fn expand_all(&self, current: &Current, at: Location, words: &[String]) -> Result<Vec<String>, DockerfileError> {
        words.iter().map(|word| self.expand(current, at, word)).collect()
    }

    fn expand_option(
        &self,
        current: &Current,
        at: Location,
        word: &Option<String>,
    ) -> Result<Option<String>, DockerfileError> {
        word.as_ref().map(|word| self.expand(current, at, word)).transpose()
    }

    fn instruction(&mut self, current: &mut Current, instruction: &Instruction) -> Result<(), DockerfileError> {
        let at = instruction.location;
        let mut created_by = instruction.text.clone();
        let before = current.lowered.vertex;
        match &instruction.kind {
            InstructionKind::Run(run) => created_by = self.run(current, instruction, run)?,
            InstructionKind::Copy(copy) => {
                self.copy(current, instruction, copy)?;
                created_by += " # buildkit";
            }
            InstructionKind::Add(add) => {
                self.add(current, instruction, add)?;
                created_by += " # buildkit";
            }
            InstructionKind::Workdir(path) => {
                let path = self.expand(current, at, path)?;
                let path = absolute(current.lowered.config.working_dir(), &path);
                self.admit(at, &path)?;
                current.lowered.config.set_working_dir(&path);
                created_by = format!("WORKDIR {path}");
                let name = format!("{}{created_by}", current.label);
                let user = current.lowered.config.user().to_owned();
                let op = Op::Directory { base: current.lowered.vertex, path, user };
                current.lowered.vertex = self.graph.add(op, name, at);
            }
            InstructionKind::Env(pairs) => {
                // All values see the environment before the instruction.
                let before = current.lowered.scope.clone();
                for pair in pairs {
                    let name = self.expand_in(&before, at, &pair.name)?;
                    let value = self.expand_in(&before, at, &pair.value)?;
                    current.lowered.scope.set_env(&name, &value);
                }
            }
            InstructionKind::Arg(declared) => {
                for arg in declared {
                    let value = current.lowered.scope.declare(arg, self.args, &self.lexer);
                    value.map_err(|e| self.dockerfile.error(at, arg.default.as_deref().unwrap_or(""), e.why))?;
                }
            }
            InstructionKind::Label(pairs) => {
                for pair in pairs {
                    let key = self.expand(current, at, &pair.name)?;
                    let value = self.expand(current, at, &pair.value)?;
                    current.lowered.config.set_label(&key, &value);
                }
            }
            InstructionKind::User(user) => {
                let user = self.expand(current, at, user)?;
                current.lowered.config.set_user(&user);
            }
            InstructionKind::Expose(ports) => {
                for ports in ports {
                    let split = self.lexer.split(ports, &current.lowered.scope);
                    for port in split.map_err(|e| self.dockerfile.error(at, ports, e.why))? {
                        for port in exposed(&port).map_err(|why| self.dockerfile.error(at, &port, why))? {
                            current.lowered.config.expose(&port);
                        }
                    }
                }
            }
            InstructionKind::Volume(paths) => {
                for path in self.expand_all(current, at, paths)? {
                    current.lowered.config.add_volume(&path);
                }
            }
            InstructionKind::StopSignal(signal) => {
                let signal = self.expand(current, at, signal)?;
                current.lowered.config.set_stop_signal(&signal);
            }
            InstructionKind::Entrypoint(command) => {
                let argv = self.argv(current, command);
                current.lowered.config.set_entrypoint(&argv, current.own_cmd);
            }
            InstructionKind::Cmd(command) => {
                let argv = self.argv(current, command);
                current.lowered.config.set_cmd(&argv);
                current.own_cmd = true;
            }
            InstructionKind::Shell(shell) => current.lowered.config.set_shell(shell),
            InstructionKind::Healthcheck(check) => {
                current.lowered.config.set_healthcheck(healthcheck(check, &current.lowered.config.shell()));
            }
            InstructionKind::Maintainer(name) => current.lowered.config.set_author(name),
            InstructionKind::Onbuild(_) => {
                return Err(self.dockerfile.error(at, "ONBUILD", "ONBUILD is not supported yet"));
            }
        }
        let made = current.lowered.vertex;
        let vertex = (made != before).then_some(made);
        current.lowered.history.push(PlannedHistory { created_by, vertex });
        Ok(())
    }

    fn argv(&self, current: &Current, command: &CommandLine) -> Vec<String> {
        command.argv(&current.lowered.config.shell())
    }

    fn run(&mut self, current: &mut Current, instruction: &Instruction, run: &Run) -> Result<String, DockerfileError> {
        let refuse = |focus: &str| {
            let message = format!("RUN {focus} is not supported yet");
            Err(self.dockerfile.error(instruction.location, focus, message))
        };
        if !run.mounts.is_empty() {
            return refuse("--mount");
        }
        // What every step has here anyway is no promise broken.
        if run.network == RunNetwork::None {
            return refuse("--network=none");
        }
        if run.security == RunSecurity::Insecure {
            return refuse("--security=insecure");
        }
        let lowered = &mut current.lowered;
        let pairs = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let invocation = run.invocation(&lowered.config.shell());
        let args: Vec<String> = lowered.scope.args().map(|(name, value)| format!("{name}={value}")).collect();
        let prefix = if args.is_empty() { String::new() } else { format!("|{} {} ", args.len(), args.join(" ")) };
        let created_by = format!("RUN {prefix}{} # buildkit", invocation.argv.join(" "));
        let op = RunOp {
            invocation,
            env: lowered.scope.run_env().map(pairs).collect(),
            unkeyed_env: self.args.proxies().map(pairs).collect(),
            working_dir: lowered.config.working_dir().to_owned(),
            user: lowered.config.user().to_owned(),
        };
        let name = format!("{}{}", current.label, instruction.text);
        lowered.vertex = self.graph.add(Op::Run { base: lowered.vertex, run: op }, name, instruction.location);
        Ok(created_by)
    }

    fn copy(&mut self, current: &mut Current, instruction: &Instruction, copy: &Copy) -> Result<(), DockerfileError> {
        let at = instruction.location;
        let from = match &copy.from {
            CopyFrom::Context => FilesFrom::Context,
            CopyFrom::Stage(stage) => {
                let lowered = self.stages[*stage].as_ref().expect("because needed stages are lowered in order");
                FilesFrom::Vertex(lowered.vertex)
            }
            CopyFrom::Image(name) => {
                let image = self.image(name, at)?;
                FilesFrom::Vertex(self.image_vertex(&image, format!("FROM {name}"), at))
            }
        };
        let (paths, inline) = self.sources(current, at, &copy.sources)?;
        let op = CopyOp {
            from,
            paths,
            inline,
            dest: self.destination(current, at, &copy.dest)?,
            chown: self.expand_option(current, at, &copy.chown)?,
            chmod: self.expand_option(current, at, &copy.chmod)?,
            excludes: self.expand_all(current, at, &copy.excludes)?,
            unpack: false,
            link: copy.link,
        };
        self.place(current, instruction, op);
        Ok(())
    }

    fn add(&mut self, current: &mut Current, instruction: &Instruction, add: &Add) -> Result<(), DockerfileError> {
        let at = instruction.location;
        let (paths, inline) = self.sources(current, at, &add.sources)?;
        let remote = |path: &&String| ["http://", "https://", "git@", "ssh://"].iter().any(|p| path.starts_with(p));
        if let Some(remote) = paths.iter().find(remote) {
            return Err(self.dockerfile.error(at, remote, "ADD of remote sources is not supported yet"));
        }
        let op = CopyOp {
            from: FilesFrom::Context,
            paths,
            inline,
            dest: self.destination(current, at, &add.dest)?,
            chown: self.expand_option(current, at, &add.chown)?,
            chmod: self.expand_option(current, at, &add.chmod)?,
            excludes: self.expand_all(current, at, &add.excludes)?,
            unpack: add.unpack.unwrap_or(true),
            link: add.link,
        };
        self.place(current, instruction, op);
        Ok(())
    }

    /// Adds a copy: onto the tree so far, or with `--link` onto nothing, to be laid over the tree as a stack.
    fn place(&mut self, current: &mut Current, instruction: &Instruction, copy: CopyOp) {
        let (at, name) = (instruction.location, format!("{}{}", current.label, instruction.text));
        let base = current.lowered.vertex;
        current.lowered.vertex = if copy.link {
            let scratch = self.graph.add(Op::Scratch, String::new(), at);
            let over = self.graph.add(Op::Copy { base: scratch, copy }, name, at);
            self.graph.add(Op::Merge { base, over }, String::new(), at)
        } else {
            self.graph.add(Op::Copy { base, copy }, name, at)
        };
    }

    /// Where files go: absolute, and with the slash at the end that asks for a directory.
    fn destination(&self, current: &Current, at: Location, dest: &str) -> Result<String, DockerfileError> {
        let dest = self.expand(current, at, dest)?;
        let mut path = absolute(current.lowered.config.working_dir(), &dest);
        self.admit(at, &path)?;
        let directory = dest.ends_with('/') || dest == "." || dest.ends_with("/.");
        if directory && !path.ends_with('/') {
            path.push('/');
        }
        Ok(path)
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
        &self,
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
                        expanded.map_err(|e| self.dockerfile.error(at, &heredoc.name, e.why))?.text
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

fn makes_a_step(kind: &InstructionKind) -> bool {
    use InstructionKind::{Add, Copy, Run, Workdir};
    matches!(kind, Run(_) | Copy(_) | Add(_) | Workdir(_))
}

fn stage_name(stage: &Stage, index: usize) -> String {
    stage.name.clone().unwrap_or_else(|| format!("stage-{index}"))
}

/// `path` from the working directory, without `.` and `..`; always absolute.
fn absolute(working_dir: &str, path: &str) -> String {
    let joined = if path.starts_with('/') { path.to_owned() } else { format!("{working_dir}/{path}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// `8080`, `53/udp`, `7000-7002/tcp` as the config lists them.
fn exposed(text: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("{text:?} is not a port, expected PORT[-PORT][/tcp|/udp|/sctp]");
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(wrong());
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(wrong());
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

fn healthcheck(check: &Healthcheck, shell: &[String]) -> serde_json::Value {
    let Healthcheck::Command {
        command,
        interval_nanos,
        timeout_nanos,
        start_period_nanos,
        start_interval_nanos,
        retries,
    } = check
    else {
        return json!({"Test": ["NONE"]});
    };
    let test: Vec<String> = match command {
        CommandLine::Exec(words) => ["CMD".to_owned()].into_iter().chain(words.iter().cloned()).collect(),
        // With a SHELL of its own the command must name it; CMD-SHELL always means /bin/sh.
        CommandLine::Shell(text) if shell == crate::dockerfile::DEFAULT_SHELL => vec!["CMD-SHELL".into(), text.clone()],
        shell_form => ["CMD".to_owned()].into_iter().chain(shell_form.argv(shell)).collect(),
    };
    let mut value = json!({"Test": test});
    for (key, number) in [
        ("Interval", *interval_nanos),
        ("Timeout", *timeout_nanos),
        ("StartPeriod", *start_period_nanos),
        ("StartInterval", *start_interval_nanos),
        ("Retries", u64::from(*retries)),
    ] {
        if number != 0 {
            value[key] = number.into();
        }
    }
    value
}

/// Gives planned history the times and marks that are known once the graph is solved. `made` says for a vertex when its
/// layers were made, and nothing if it made none; `key` what its entry carries so that others can tell the step again.
pub(crate) fn history(
    planned: &[PlannedHistory],
    base_created: Option<&str>,
    made: impl Fn(VertexId) -> Option<String>,
    key: impl Fn(VertexId) -> String,
) -> (Vec<HistoryEntry>, Option<String>) {
    // An instruction without a layer happened when the layer before it did: a rebuild from the cache then gives the
    // same bytes.
    let mut created = base_created.map(str::to_owned);
    let mut entries = Vec::new();
    for line in planned {
        let layer = line.vertex.and_then(&made);
        let empty_layer = layer.is_none();
        created = layer.or(created);
        let comment = line.vertex.map(&key);
        let (created, created_by) = (created.clone(), line.created_by.clone());
        entries.push(HistoryEntry { created, created_by, comment, empty_layer });
    }
    (entries, created)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_clean() {
        for (dir, path, expected) in [
            ("/", "a", "/a"),
            ("/w", "../../x", "/x"),
            ("/w", "/a/./b//c", "/a/b/c"),
            ("/w", ".", "/w"),
            ("/", "..", "/"),
        ] {
            assert_eq!(absolute(dir, path), expected, "{dir} {path}");
        }
    }

    #[test]
    fn ports_are_listed_one_by_one() {
        assert_eq!(exposed("80").unwrap(), ["80/tcp"]);
        assert_eq!(exposed("7000-7002/UDP").unwrap(), ["7000/udp", "7001/udp", "7002/udp"]);
        for bad in ["", "x", "80/http", "65536", "9-8", "1-2-3"] {
            assert!(exposed(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn history_takes_its_times_from_layers() {
        let line = |text: &str, vertex| PlannedHistory { created_by: text.into(), vertex };
        let planned =
            [line("ENV", None), line("RUN", Some(VertexId(1))), line("CMD", None), line("RUN 2", Some(VertexId(2)))];
        let made = |vertex| (vertex == VertexId(1)).then(|| "t1".to_owned());
        let (entries, created) = history(&planned, Some("t0"), made, |vertex| format!("key {}", vertex.0));
        let seen: Vec<_> = entries.iter().map(|e| (e.created.as_deref().unwrap(), e.empty_layer)).collect();
        assert_eq!(seen, [("t0", true), ("t1", false), ("t1", true), ("t1", true)]);
        let keys: Vec<_> = entries.iter().map(|e| e.comment.as_deref()).collect();
        assert_eq!(keys, [None, Some("key 1"), None, Some("key 2")]);
        assert_eq!(created.as_deref(), Some("t1"));
    }
}
