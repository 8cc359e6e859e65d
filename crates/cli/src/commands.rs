//! What each command does: asks the engine, and shows the answer.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap::error::ErrorKind;
use jiff::Timestamp;
use plies_engine::build::{BuildRequest, Entitlement, RunOptions};
use plies_engine::dockerfile::Warning;
use plies_engine::exec::Cancel;
use plies_engine::{
    ContainerdOptions, Containers, DriverKind, Engine, EngineOptions, GcMode, ImportOptions, ImportOutcome,
    ImportSource, ImportedItem, Input, Migrate, Migrated, Output, PolicyRow, PruneOptions, PullPolicy, PullRequest,
    RemovedImage, Repacked, RunRequest, SaveFormat, SpaceTotals, TreeNode, WhyNode,
};
use serde::Serialize;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::args::{self, Command, Global, Ply, Ref};
use crate::config::{self, Space};
use crate::format::{self, Column};
use crate::layers;
use crate::output;
use crate::progress::Style;

/// The default state directory of root.
const SYSTEM_ROOT: &str = "/var/lib/plies";

/// When what is built was made, for whoever wants the same bytes again.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// Characters of a history line that are shown in a table.
const CREATED_BY_WIDTH: usize = 60;

/// Runs one command.
pub(crate) fn run(args: Ply) -> anyhow::Result<ExitCode> {
    let Ply { global, command } = args;
    match command {
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Ply::command(), "ply", &mut io::stdout());
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man { dir } => {
            clap_mangen::generate_to(Ply::command(), &dir).with_context(|| format!("write {}", dir.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    check(&command)?;
    // Until the store is ours an interrupt simply ends the wait; opening survives it.
    let removes =
        matches!(command, Command::Prune(_) | Command::Gc { .. } | Command::Rmi { .. } | Command::Ref(Ref::Rm { .. }));
    let engine = match command {
        Command::Migrate { dry_run } => return run_migrate(&global, dry_run),
        Command::Fsck(fsck) => return crate::fsck::run(&global, &fsck),
        _ => open(&global, removes)?,
    };
    if let Some(migrated) = engine.migrated() {
        eprintln!("ply: {}", told_of(migrated));
    }
    let cancel = cancel_on_signals()?;
    let code = with_engine(&engine, &global, command, &cancel)?;
    engine.close()?;
    Ok(code)
}

/// Refuses what cannot work as it was asked for, before the store is opened or made.
fn check(command: &Command) -> Result<(), clap::Error> {
    let wrong = |kind, text: &str| Err(Ply::command().error(kind, text));
    let given = |path: &Option<PathBuf>| path.as_ref().is_some_and(|path| path.as_os_str() != "-");
    match command {
        Command::Save(save) if !given(&save.output) => match save.format {
            args::SaveFormat::OciDir => {
                wrong(ErrorKind::MissingRequiredArgument, "a directory must be named: give -o DIR")
            }
            _ if io::stdout().is_terminal() => {
                wrong(ErrorKind::MissingRequiredArgument, "an archive is not for a terminal: give -o FILE, or redirect")
            }
            _ => Ok(()),
        },
        Command::Build(build) => match output::outputs(&build.output, &build.annotation, !build.tag.is_empty()) {
            Err(error) => wrong(ErrorKind::ArgumentConflict, &error),
            Ok(outputs) if outputs.iter().any(output::to_stdout) && io::stdout().is_terminal() => {
                let text = "an archive is not for a terminal: give dest=FILE, or redirect";
                wrong(ErrorKind::MissingRequiredArgument, text)
            }
            Ok(outputs) if outputs.is_empty() && (build.iidfile.is_some() || !build.tag.is_empty()) => {
                wrong(ErrorKind::ArgumentConflict, "type=cacheonly makes no image to name")
            }
            Ok(_) => Ok(()),
        },
        Command::Layer(args::Layer::Export { output, .. }) if !given(output) && io::stdout().is_terminal() => {
            wrong(ErrorKind::MissingRequiredArgument, "a tar is not for a terminal: give -o FILE, or redirect")
        }
        Command::Layer(args::Layer::Register { file, .. }) if file.as_os_str() == "-" && io::stdin().is_terminal() => {
            wrong(ErrorKind::MissingRequiredArgument, "a tar is expected on standard input: give a file, or redirect")
        }
        Command::Layer(args::Layer::Rw(args::Rw::Create { uid_map, gid_map, .. })) => {
            match layers::id_maps(uid_map.clone(), gid_map.clone()) {
                Ok(_) => Ok(()),
                Err(error) => wrong(ErrorKind::ValueValidation, &error.to_string()),
            }
        }
        Command::Load(load) if !given(&load.input) && io::stdin().is_terminal() => wrong(
            ErrorKind::MissingRequiredArgument,
            "an archive is expected on standard input: give -i PATH, or redirect",
        ),
        _ => Ok(()),
    }
}

fn with_engine(engine: &Engine, global: &Global, command: Command, cancel: &Cancel) -> anyhow::Result<ExitCode> {
    let json = global.json;
    let style = if global.quiet { Style::Quiet } else { Style::Auto };
    match command {
        Command::Build(build) => return run_build(engine, global, *build, cancel),
        Command::Load(load) => {
            let input = match load.input {
                Some(path) if path.as_os_str() != "-" => Input::Path(path),
                _ => Input::Stdin,
            };
            let loaded = engine.load(&input, load.tag.as_deref(), &*style.renderer(), cancel)?;
            if json {
                return print_json(&loaded);
            }
            for image in loaded {
                for moved in &image.moved {
                    let (name, from) = (format::safe(&moved.name), moved.from.hex());
                    eprintln!("ply: {name} was the name of image {} until now", format::short_id(&from));
                }
                match image.names.as_slice() {
                    [] => say(&format!("Loaded image ID: {}", image.id))?,
                    names => names.iter().try_for_each(|name| say(&format!("Loaded image: {}", format::safe(name))))?,
                }
            }
        }
        Command::Pull(pull) => return run_pull(engine, json, style, pull, cancel),
        Command::Push { image, names } => {
            let pushed = engine.push(&image, &names, &*style.renderer(), cancel)?;
            if json {
                return print_json(&pushed);
            }
            for one in pushed {
                say(&format!("{}: digest: {} size: {}", format::safe(&one.name), one.digest, one.size_bytes))?;
            }
        }
        Command::Save(save) => {
            let format = engine_format(save.format);
            let output = match save.output {
                Some(path) if path.as_os_str() != "-" => Output::Path(path),
                _ => Output::Stdout,
            };
            engine.save(&save.images, format, &output, &*style.renderer(), cancel)?;
            // On standard output there is the archive.
            if let (true, Output::Path(path)) = (json, output) {
                return print_json(&json!({"output": path, "images": save.images}));
            }
        }
        Command::Images => return images(engine, json, global.quiet),
        Command::Inspect { image } => return print_json(&engine.inspect(&image)?),
        Command::History { image } => history(engine, &image, json)?,
        Command::Tag { source, target } => {
            let id = engine.tag(&source, &target)?;
            if json {
                return print_json(&json!({"id": id, "name": target}));
            }
        }
        Command::Rmi { images, dangling } => {
            let removed = if dangling { engine.remove_dangling_images()? } else { engine.remove_images(&images)? };
            let rows = removed.iter().map(|one| match one {
                RemovedImage::Name(name) => ("name", plies_engine::familiar(name)),
                RemovedImage::Image(id) => ("image", id.to_string()),
            });
            if json {
                print_removed(rows)?;
            } else {
                for (kind, id) in rows {
                    say(&format!("{}: {id}", if kind == "name" { "Untagged" } else { "Deleted" }))?;
                }
            }
            collect(engine);
        }
        Command::Layer(layer) => return layers::run(engine, layer, json, style, cancel),
        Command::Run(run) => {
            let request = RunRequest {
                image: run.image,
                platform: run.platform,
                pull: match run.pull {
                    args::RunPull::Always => PullPolicy::Always,
                    args::RunPull::Missing => PullPolicy::Missing,
                    args::RunPull::Never => PullPolicy::Never,
                },
                command: run.command,
                executor: run.executor.executor,
                search_path: search_path(),
                terminal: io::stdin().is_terminal() && io::stdout().is_terminal(),
            };
            let code = engine.run(&request, &*style.renderer(), cancel)?;
            return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
        }
        Command::Mount { target, dir, rw } => {
            let dir = absolute(&dir)?;
            engine.mount(&target, &dir, rw)?;
            if json {
                return print_json(&json!({"target": target, "dir": dir}));
            }
        }
        Command::Umount { dir } => {
            let dir = absolute(&dir)?;
            engine.umount(&dir)?;
            if json {
                print_json(&json!({"dir": dir}))?;
            }
            collect(engine);
        }
        Command::Ref(Ref::Ls) => return records(engine, json),
        Command::Ref(Ref::Inspect { id }) => return print_json(&engine.record(&id)?),
        Command::Ref(Ref::New { parent, description }) => {
            return print_id(json, &engine.new_record(parent.as_deref(), &description)?.to_string());
        }
        Command::Ref(Ref::Commit { id }) => return print_id(json, &engine.commit_record(&id)?.to_string()),
        Command::Ref(Ref::Get { id }) => return print_id(json, &engine.get_record(&id, cancel)?.to_string()),
        Command::Ref(Ref::Merge { ids }) => match engine.merge_records(&ids)? {
            Some(id) => return print_id(json, &id.to_string()),
            None => anyhow::bail!("all of these are empty: there is nothing to merge"),
        },
        Command::Ref(Ref::Diff { lower, upper }) => {
            return print_id(json, &engine.diff_records(&lower, &upper, cancel)?.to_string());
        }
        Command::Ref(Ref::Pin { id }) => return print_id(json, &engine.pin_record(&id, true)?.to_string()),
        Command::Ref(Ref::Unpin { id }) => return print_id(json, &engine.pin_record(&id, false)?.to_string()),
        Command::Ref(Ref::Export { id, output }) => engine.export_record(&id, &output, cancel)?,
        Command::Ref(Ref::Rm { ids }) => {
            let removed = engine.remove_records(&ids)?;
            if json {
                print_removed(removed.iter().map(|id| ("record", id.to_string())))?;
            } else {
                removed.iter().try_for_each(|id| say(&id.to_string()))?;
            }
            collect(engine);
        }
        Command::Du { filter } => return usage(engine, global, &filter),
        Command::Why { target } => {
            let node = engine.why(&target)?;
            if json {
                return print_json(&node);
            }
            let mut text = String::new();
            draw_why(&node, "", "", &mut text);
            print(&text)?;
        }
        Command::Tree { target } => {
            let nodes = engine.tree(target.as_deref())?;
            let damaged = nodes.iter().map(TreeNode::damaged_count).sum();
            if json {
                print_json(&nodes)?;
                return Ok(damaged_code(damaged));
            }
            let mut text = String::new();
            nodes.iter().for_each(|node| draw(node, "", "", &mut text));
            print(&text)?;
            return Ok(damaged_code(damaged));
        }
        Command::Prune(prune) => return run_prune(engine, json, prune, cancel),
        Command::Import(from) => return run_import(engine, json, style, &from, cancel),
        Command::Gc { dry_run, full, compact } => {
            let report = engine.gc(match (dry_run, full) {
                (true, _) => GcMode::DryRun,
                (false, true) => GcMode::Full,
                (false, false) => GcMode::Run,
            })?;
            if compact {
                engine.compact_at_close();
            }
            if json {
                return print_json(&report);
            }
            let verb = if dry_run { "Would remove" } else { "Removed" };
            for gone in &report.removed {
                say(&format!("{verb} {} {}  {}", gone.kind, gone.id, format::size(gone.size_bytes)))?;
            }
            if let Some(count) = report.repaired_count.filter(|count| *count > 0) {
                say(&format!("Put right: {count} counts"))?;
            }
            say(&format!("Total: {}", format::size(report.total_bytes)))?;
        }
        Command::Info => {
            let info = engine.info()?;
            if json {
                return print_json(&info);
            }
            for (key, value) in info.lines().into_iter().chain([("disk", format::size(info.total_bytes))]) {
                say(&format!("{:<22}{}", format!("{key}:"), format::safe(&value)))?;
            }
            for (at, rule) in (1..).zip(&info.policy) {
                say(&format!("{:<22}{}", format!("gc rule {at}:"), format::safe(&policy(rule))))?;
            }
        }
        Command::Fsck(_) | Command::Migrate { .. } | Command::Completions { .. } | Command::Man { .. } => {
            unreachable!("because they ran before")
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_pull(engine: &Engine, json: bool, style: Style, pull: args::Pull, cancel: &Cancel) -> anyhow::Result<ExitCode> {
    let request = PullRequest { name: pull.image, platform: pull.platform, lazy: pull.lazy, ..PullRequest::default() };
    let pulled = engine.pull(&request, &*style.renderer(), cancel)?;
    if json {
        return print_json(&pulled);
    }
    let name = format::safe(&pulled.name);
    if let Some(from) = pulled.moved_from {
        eprintln!("ply: {name} was the name of image {} until now", format::short_id(&from.hex()));
    }
    say(&format!("{}: {name}", if pulled.up_to_date { "Image is up to date" } else { "Pulled image" }))?;
    say(&format!("Digest: {}", pulled.digest))?;
    Ok(ExitCode::SUCCESS)
}

/// Exit code 1 if anything could not be read.
fn run_import(
    engine: &Engine,
    json: bool,
    style: Style,
    import: &args::Import,
    cancel: &Cancel,
) -> anyhow::Result<ExitCode> {
    let containers = |images: &args::ImportImages| match images.containers {
        true => Containers::Take,
        false => Containers::List,
    };
    let (from, source) = match import {
        args::Import::Buildkit(from) => (from, ImportSource::Buildkit),
        args::Import::Docker(images) => (&images.from, ImportSource::Docker(containers(images))),
        args::Import::ContainersStorage(images) => (&images.from, ImportSource::ContainersStorage(containers(images))),
        args::Import::Containerd(args::ImportContainerd { images, namespaces }) => {
            let options = ContainerdOptions { namespaces: namespaces.clone(), containers: containers(images) };
            (&images.from, ImportSource::Containerd(options))
        }
    };
    let options = ImportOptions { dry_run: from.dry_run, copy: from.copy, verify: from.verify };
    let progress = style.renderer();
    let report = engine.import(&source, &from.path, options, &*progress, cancel)?;
    if let count @ 1.. = report.files_not_linked_count {
        eprintln!(
            "ply: warning: files that were copied and take space of their own: {count}. No hard link leads to them: they may not be \
             linked (lsattr), or a mount lies between (findmnt -T {})",
            format::safe(&from.path.display().to_string())
        );
    }
    let failed = report.count(ImportOutcome::Failed);
    let code = if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    for item in report.items.iter().filter(|item| item.outcome == ImportOutcome::Failed) {
        let why = item.why.as_deref().unwrap_or_default();
        eprintln!("ply: {} {} was left out: {}", item.kind, format::safe(&item.name), format::safe(why));
    }
    if json {
        print_json(&report)?;
        return Ok(code);
    }
    let is_cache = source == ImportSource::Buildkit;
    let name = if is_cache { "RECORD" } else { "NAME" };
    let columns = [Column::Left(name), Column::Right("SIZE"), Column::Left("FATE"), Column::Left("DESCRIPTION")];
    let took = if report.dry_run { "would come" } else { "taken" };
    let name_of = |item: &ImportedItem| {
        let digits = item.name.strip_prefix("sha256:").unwrap_or(&item.name);
        let is_digest = digits.len() == 64 && digits.bytes().all(|c| c.is_ascii_hexdigit());
        let short = if is_digest { &digits[..12] } else { &*item.name };
        match item.kind {
            "record" => format::safe(item.name.get(..12).unwrap_or(&item.name)),
            kind => format!("{kind} {}", format::safe(short)),
        }
    };
    let rows = report.items.iter().map(|item| {
        let fate = match item.outcome {
            ImportOutcome::Taken => took,
            ImportOutcome::Here => "is here",
            ImportOutcome::Left => "left",
            ImportOutcome::Failed => "failed",
        };
        let fate = item.why.as_ref().map_or_else(|| fate.to_owned(), |why| format!("{fate}: {why}"));
        vec![
            name_of(item),
            format::size(item.size_bytes),
            format::safe(&fate),
            format::safe(&format::ellipsis(&item.description, CREATED_BY_WIDTH)),
        ]
    });
    print(&format::table(&columns, rows))?;
    let verb = if report.dry_run { "Would take" } else { "Took" };
    let count = |outcome| report.count(outcome);
    let taken = |kind| {
        let taken = |item: &&ImportedItem| item.kind == kind && item.outcome == ImportOutcome::Taken;
        report.items.iter().filter(taken).count()
    };
    let layers = format!("{} layers ({})", report.layers_count, format::size(report.layer_bytes));
    let what = match is_cache {
        true => format!(
            "{} records with {layers}, {} blobs ({}) and {} results of steps",
            count(ImportOutcome::Taken),
            report.blobs_count,
            format::size(report.blob_bytes),
            report.keys_count,
        ),
        false => {
            let (images, names, containers) = (taken("image"), taken("name"), taken("container"));
            let blobs = match report.blobs_count {
                0 => String::new(),
                count => format!(" and {count} blobs ({})", format::size(report.blob_bytes)),
            };
            format!("{images} images, {names} names and {containers} containers with {layers}{blobs}")
        }
    };
    let (here, left) = (count(ImportOutcome::Here), count(ImportOutcome::Left));
    say(&format!("{verb} {what}; {here} were here, {left} left, {failed} failed"))?;
    Ok(code)
}

fn run_prune(engine: &Engine, json: bool, prune: args::Prune, cancel: &Cancel) -> anyhow::Result<ExitCode> {
    let disk_bytes = engine.disk_bytes()?;
    let bytes = |space: Option<Space>| space.map_or(0, |space| space.of(disk_bytes));
    let rule = PruneOptions {
        all: prune.all,
        filters: prune.filter,
        keep_duration: prune.keep_duration.unwrap_or_default(),
        reserved_space_bytes: bytes(prune.reserved_space),
        max_used_space_bytes: bytes(prune.max_used_space),
        min_free_space_bytes: bytes(prune.min_free_space),
    };
    // A script that asks for it means it; a person may have mistyped.
    if !prune.dry_run && !prune.force && io::stdin().is_terminal() {
        eprint!("This removes records of the build cache that nothing uses. Go on? [y/N] ");
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).context("read the answer")?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let done = engine.prune(&rule, prune.dry_run, cancel)?;
    if json {
        return print_json(&done);
    }
    let columns = [
        Column::Left("ID"),
        Column::Right("SIZE"),
        Column::Right(if prune.dry_run { "SCORE" } else { "" }),
        Column::Left("FATE"),
        Column::Left("DESCRIPTION"),
    ];
    let gone = if prune.dry_run { "would go" } else { "removed" };
    let rows = done.records.iter().map(|record| {
        vec![
            format::short_id(&record.id).to_owned(),
            format::size(record.size_bytes),
            record.score.map_or_else(String::new, |score| format!("{score:.2}")),
            record.stays.map_or_else(|| gone.to_owned(), |why| format!("stays: {why}")),
            format::safe(&record.description),
        ]
    });
    print(&format::table(&columns, rows))?;
    let verb = if prune.dry_run { "Would free" } else { "Freed" };
    say(&format!("{verb} {} of {} records", format::size(done.freed_bytes), done.removed_count))?;
    Ok(ExitCode::SUCCESS)
}

/// A rule of the policy, in a line.
fn policy(rule: &PolicyRow) -> String {
    let size = |name: &str, bytes: u64| (bytes != 0).then(|| format!("{name} {}", format::size(bytes)));
    let parts = [
        Some(if rule.all { "all records" } else { "records" }.to_owned()),
        (!rule.filters.is_empty()).then(|| format!("matching {}", rule.filters.join(" or "))),
        (rule.keep_duration_seconds != 0).then(|| format!("unused for {} h", rule.keep_duration_seconds / 3600)),
        size("reserved", rule.reserved_space_bytes),
        size("at most", rule.max_used_space_bytes),
        size("free", rule.min_free_space_bytes),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn run_build(engine: &Engine, global: &Global, build: args::Build, cancel: &Cancel) -> anyhow::Result<ExitCode> {
    // As docker: a label without a value has an empty one.
    let label = |text: &String| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        (key.to_owned(), value.to_owned())
    };
    let mut build_args = Vec::new();
    for arg in &build.build_arg {
        match arg.split_once('=') {
            Some((key, value)) => build_args.push((key.to_owned(), value.to_owned())),
            // As docker: a bare name passes on what the environment says, and nothing if it says nothing.
            None => build_args.extend(std::env::var(arg).ok().map(|value| (arg.clone(), value))),
        }
    }
    // As buildx: what reproducible builds go by reaches them without being passed on by hand.
    if !build_args.iter().any(|(key, _)| key == EPOCH) {
        build_args.extend(std::env::var(EPOCH).ok().map(|value| (EPOCH.to_owned(), value)));
    }
    let mut allow = build.allow;
    // As buildx: who gives all commands the host's network does not mind those that ask for it.
    if build.network == args::RunNetwork::Host {
        allow.push(Entitlement::NetworkHost);
    }
    let outputs = output::outputs(&build.output, &build.annotation, !build.tag.is_empty());
    let outputs = outputs.map_err(anyhow::Error::msg)?;
    let to_stdout = outputs.iter().any(output::to_stdout);
    let request = BuildRequest {
        outputs,
        context: build.context,
        dockerfile: build.file,
        target: build.target,
        names: build.tag,
        build_args,
        labels: build.label.iter().map(label).collect(),
        no_cache: build.no_cache,
        platform: build.platform,
        pull: build.pull,
        no_cache_stages: build.no_cache_filter,
        cache_from: build.cache_from,
        explain: build.explain,
        executor: build.executor.executor,
        search_path: search_path(),
        run: RunOptions {
            no_network: build.network == args::RunNetwork::None,
            add_hosts: build.add_host,
            limits: build.ulimit,
            shm_size_bytes: build.shm_size,
        },
        secrets: build.secret,
        ssh: build.ssh,
        allow,
    };
    if build.check {
        return show_warnings(&engine.check(&request)?, global);
    }
    let style = if global.quiet { Style::Quiet } else { build.progress };
    let built = engine.build(&request, &*style.renderer(), cancel)?;
    if let (Some(file), Some(id)) = (&build.iidfile, &built.id) {
        std::fs::write(file, id.to_string()).with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(file) = &build.metadata_file {
        let mut metadata = json!({"image.name": built.names.join(",")});
        if let Some(id) = built.id {
            metadata["containerimage.config.digest"] = id.to_string().into();
            // As docker's image store, which has no manifests either.
            let digest = built.manifest.map_or_else(|| id.to_string(), |digest| digest.to_string());
            metadata["containerimage.digest"] = digest.into();
        }
        std::fs::write(file, format!("{metadata:#}\n")).with_context(|| format!("write {}", file.display()))?;
    }
    // What goes there is the archive.
    if to_stdout {
        return Ok(ExitCode::SUCCESS);
    }
    if global.json {
        return print_json(&built);
    }
    let steps = format!("{} of {} steps cached", built.cached_count, built.steps_count);
    match built.id {
        Some(id) if global.quiet => say(&id.to_string())?,
        Some(id) => say(&format!("{id} ({steps})"))?,
        None if global.quiet => {}
        None => say(&steps)?,
    }
    for pushed in built.pushed.iter().filter(|_| !global.quiet) {
        say(&format!("{}: digest: {} size: {}", format::safe(&pushed.name), pushed.digest, pushed.size_bytes))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn engine_format(format: args::SaveFormat) -> SaveFormat {
    match format {
        args::SaveFormat::Oci => SaveFormat::Oci,
        args::SaveFormat::OciDir => SaveFormat::OciDirectory,
        args::SaveFormat::Docker => SaveFormat::Docker,
    }
}

/// What `ply build --check` prints. A file with warnings is no error, but scripts want to know.
fn show_warnings(warnings: &[Warning], global: &Global) -> anyhow::Result<ExitCode> {
    if global.json {
        print_json(&warnings)?;
    } else {
        let safe = |text: String| text.lines().map(|line| format!("{}\n", format::safe(line))).collect::<String>();
        let text: Vec<String> = warnings.iter().map(|warning| safe(warning.to_string())).collect();
        let count = match warnings.len() {
            0 => "no warnings".to_owned(),
            1 => "1 warning".to_owned(),
            count => format!("{count} warnings"),
        };
        say(&format!("{}{count}", text.concat()))?;
    }
    Ok(if warnings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn images(engine: &Engine, json: bool, quiet: bool) -> anyhow::Result<ExitCode> {
    let images = engine.images()?;
    let damaged = images.iter().filter(|image| image.error.is_some()).count();
    if json {
        print_json(&images)?;
        return Ok(damaged_code(damaged));
    }
    if quiet {
        let lines = images.iter().map(|image| format!("{}\n", format::short_id(&image.id.hex())));
        print(&lines.collect::<String>())?;
        return Ok(damaged_code(damaged));
    }
    let columns = [
        Column::Left("REPOSITORY"),
        Column::Left("TAG"),
        Column::Left("IMAGE ID"),
        Column::Left("CREATED"),
        Column::Right("SIZE"),
    ];
    let rows = images.iter().flat_map(|image| {
        let names = if image.names.is_empty() { vec![None] } else { image.names.iter().map(Some).collect() };
        names.into_iter().map(|name| {
            // The last colon parts name and tag, since a tag holds none.
            let (repository, tag) = name.and_then(|name| name.rsplit_once(':')).unwrap_or(("<none>", "<none>"));
            vec![
                repository.to_owned(),
                tag.to_owned(),
                format::short_id(&image.id.hex()).to_owned(),
                if image.error.is_some() { "damaged".to_owned() } else { ago(image.created.as_deref()) },
                format::size(image.size_bytes),
            ]
        })
    });
    print(&format::table(&columns, rows))?;
    Ok(damaged_code(damaged))
}

fn history(engine: &Engine, image: &str, json: bool) -> anyhow::Result<()> {
    let lines = engine.history(image)?;
    if json {
        return print_json(&lines).map(drop);
    }
    let columns = [Column::Left("CREATED"), Column::Left("CREATED BY"), Column::Left("DIFF ID"), Column::Right("SIZE")];
    let rows = lines.iter().map(|line| {
        vec![
            ago(line.created.as_deref()),
            format::ellipsis(&line.created_by, CREATED_BY_WIDTH),
            line.diff_id.map_or_else(String::new, |id| format::short_id(&id.hex()).to_owned()),
            format::size(line.size_bytes),
        ]
    });
    print(&format::table(&columns, rows))
}

fn records(engine: &Engine, json: bool) -> anyhow::Result<ExitCode> {
    let records = engine.records()?;
    let damaged = records.iter().filter(|record| record.error.is_some()).count();
    if json {
        print_json(&records)?;
        return Ok(damaged_code(damaged));
    }
    let columns = [
        Column::Left("ID"),
        Column::Left("STATE"),
        Column::Left("LAST USED"),
        Column::Right("USES"),
        Column::Right("SIZE"),
        Column::Left("DESCRIPTION"),
    ];
    let rows = records.iter().map(|record| {
        vec![
            format::short_id(&record.id).to_owned(),
            record.state.to_owned(),
            ago(record.last_used.as_deref().or(Some(&record.created))),
            record.usage_count.to_string(),
            format::size(record.size_bytes),
            described(&record.description, record.error.as_deref()),
        ]
    });
    print(&format::table(&columns, rows))?;
    Ok(damaged_code(damaged))
}

fn usage(engine: &Engine, global: &Global, filters: &[String]) -> anyhow::Result<ExitCode> {
    if !global.json && !global.verbose && filters.is_empty() {
        print_totals(&engine.usage_totals()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let usage = engine.usage(filters)?;
    let damaged = usage.rows.iter().filter(|row| row.error.is_some()).count();
    if global.json {
        print_json(&usage)?;
        return Ok(damaged_code(damaged));
    }
    let columns = [
        Column::Left("RECORD"),
        Column::Left("TYPE"),
        Column::Left("STATE"),
        Column::Right("SIZE"),
        Column::Right("UNIQUE"),
        Column::Right("SHARED"),
        Column::Left("CREATED"),
        Column::Left("LAST USED"),
        Column::Right("USES"),
        Column::Left("PARENTS"),
        Column::Left("DESCRIPTION"),
    ];
    let rows = usage.records.iter().map(|record| {
        let flags = [
            (record.in_use, "in use"),
            (record.mutable, "mutable"),
            (record.shared, "in an image"),
            (record.pinned, "pinned"),
        ];
        let state: Vec<_> = flags.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect();
        let parents: Vec<_> = record.parents.iter().map(|id| format::short_id(id)).collect();
        vec![
            format::short_id(&record.id).to_owned(),
            record.record_type.to_owned(),
            if state.is_empty() { "idle".to_owned() } else { state.join(", ") },
            format::size(record.size_bytes),
            format::size(record.unique_bytes),
            format::size(record.shared_bytes),
            ago(record.created.as_deref()),
            record.last_used.as_deref().map_or_else(|| "never".to_owned(), |used| ago(Some(used))),
            record.usage_count.to_string(),
            format::ellipsis(&parents.join(" "), 26),
            described(&record.description, record.error.as_deref()),
        ]
    });
    print(&format::table(&columns, rows))?;
    let totals = &usage.record_totals;
    say(&format!(
        "{} records: {} (unique {}, shared {}); in use {}, idle {}\n",
        totals.count,
        format::size(totals.total_bytes),
        format::size(totals.unique_bytes),
        format::size(totals.shared_bytes),
        format::size(totals.in_use_bytes),
        format::size(totals.total_bytes - totals.in_use_bytes),
    ))?;
    if !filters.is_empty() {
        return Ok(damaged_code(damaged));
    }
    let columns = [Column::Left("KIND"), Column::Left("ID"), Column::Right("SIZE"), Column::Left("DESCRIPTION")];
    let rows = usage.rows.iter().map(|row| {
        vec![
            row.kind.to_owned(),
            format::ellipsis(&row.id, 24),
            format::size(row.size_bytes),
            described(&row.description, row.error.as_deref()),
        ]
    });
    print(&format::table(&columns, rows))?;
    say("")?;
    print_totals(&usage.everything)?;
    Ok(damaged_code(damaged))
}

fn print_totals(totals: &SpaceTotals) -> anyhow::Result<()> {
    let columns = [Column::Left("KIND"), Column::Right("COUNT"), Column::Right("SIZE")];
    let rows = totals.totals.iter().map(|(kind, size_bytes)| {
        let count = totals.counts.get(kind).map_or_else(String::new, u64::to_string);
        vec![(*kind).to_owned(), count, format::size(*size_bytes)]
    });
    let total = vec!["total".to_owned(), String::new(), format::size(totals.total_bytes)];
    print(&format::table(&columns, rows.chain([total])))
}

fn draw_why(node: &WhyNode, first: &str, rest: &str, out: &mut String) {
    let id = if node.id.is_empty() { String::new() } else { format!(" {}", node.id) };
    let label = if node.label.is_empty() { String::new() } else { format!(" {}", node.label) };
    out.push_str(&format!("{first}{}\n", format::safe(&format!("{}{id}{label}", node.kind))));
    let notes = node.root.iter().chain(&node.note).map(|note| (Some(note), None));
    let lines: Vec<_> = notes.chain(node.by.iter().map(|by| (None, Some(by)))).collect();
    for (at, (note, by)) in lines.iter().enumerate() {
        let (branch, stem) = if at + 1 == lines.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        match (note, by) {
            (_, Some(by)) => draw_why(by, &format!("{rest}{branch}"), &format!("{rest}{stem}"), out),
            (Some(note), None) => out.push_str(&format!("{rest}{branch}{}\n", format::safe(note))),
            (None, None) => {}
        }
    }
}

/// What a row is about, or what is wrong with it.
fn described(description: &str, error: Option<&str>) -> String {
    error.map_or_else(|| format::ellipsis(description, CREATED_BY_WIDTH), |error| format!("damaged: {error}"))
}

/// A list is shown whole whatever is damaged in it, and then has not done its whole job.
fn damaged_code(count: usize) -> ExitCode {
    match count {
        0 => return ExitCode::SUCCESS,
        1 => eprintln!("ply: 1 of these is damaged"),
        _ => eprintln!("ply: {count} of these are damaged"),
    }
    ExitCode::FAILURE
}

/// Frees the space of what was removed. That has happened and was told: space that stays taken is no failure of it.
pub(crate) fn collect(engine: &Engine) {
    if let Err(error) = engine.gc(GcMode::Run) {
        eprintln!(
            "ply: warning: space is not freed yet (ply gc): {}",
            format::safe(&format!("{:#}", anyhow::Error::new(error)))
        );
    }
}

pub(crate) fn print_id(json: bool, id: &str) -> anyhow::Result<ExitCode> {
    if json {
        return print_json(&json!({"id": id}));
    }
    say(id)?;
    Ok(ExitCode::SUCCESS)
}

fn print_removed(rows: impl Iterator<Item = (&'static str, String)>) -> anyhow::Result<ExitCode> {
    let rows: Vec<_> = rows.map(|(kind, id)| json!({"kind": kind, "id": id})).collect();
    print_json(&json!({"removed": rows}))
}

fn draw(node: &TreeNode, first: &str, rest: &str, out: &mut String) {
    let size = node.size_bytes.map_or_else(String::new, |bytes| format!("  {}", format::size(bytes)));
    let error = node.error.as_ref().map_or_else(String::new, |error| format!("  damaged: {}", format::safe(error)));
    out.push_str(&format!("{first}{}{size}{error}\n", format::safe(&node.label)));
    for (at, child) in node.children.iter().enumerate() {
        let (branch, stem) = if at + 1 == node.children.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        draw(child, &format!("{rest}{branch}"), &format!("{rest}{stem}"), out);
    }
}

fn open(global: &Global, use_reserve: bool) -> anyhow::Result<Engine> {
    let (root, options) = place(global, use_reserve)?;
    Ok(Engine::open(&root, options)?)
}

/// Where the store is, and how it is opened.
pub(crate) fn place(global: &Global, use_reserve: bool) -> anyhow::Result<(PathBuf, EngineOptions)> {
    let root = absolute(&match &global.root {
        Some(root) => root.clone(),
        None if rustix::process::geteuid().is_root() => PathBuf::from(SYSTEM_ROOT),
        None => user_root()?,
    })?;
    let disk_bytes = plies_engine::disk_bytes(&root)
        .with_context(|| format!("look how large the file system of {} is", root.display()))?;
    let config::Settings { driver, registry, policy, limits } = config::load(global.config.as_deref(), disk_bytes)?;
    let options = EngineOptions {
        driver: match global.driver.or(driver).unwrap_or_default() {
            args::Driver::Auto => DriverKind::Auto,
            args::Driver::Overlay => DriverKind::Overlay,
            args::Driver::Native => DriverKind::Native,
            args::Driver::Erofs => DriverKind::Erofs,
        },
        use_reserve,
        wait: !global.no_wait,
        on_wait: Box::new(|holder| eprintln!("ply: waiting for {holder}")),
        registry,
        policy,
        limits,
        command: std::env::args().take(2).collect::<Vec<_>>().join(" "),
        migrate: Migrate::default(),
        progress: Arc::new(plies_engine::progress::Silent),
        warn: Arc::new(|error| {
            let chain = std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string);
            eprintln!("ply: warning: {}", format::safe(&chain.collect::<Vec<_>>().join(": ")));
        }),
    };
    Ok((root, options))
}

/// Asked for by name, so it takes as long as it takes.
fn run_migrate(global: &Global, dry_run: bool) -> anyhow::Result<ExitCode> {
    let (root, options) = place(global, false)?;
    let plan = Engine::migration_plan(&root, options)?;
    let repack = global.driver.is_some_and(|driver| driver != args::Driver::Auto);
    if plan.steps.is_empty() && repack {
        return run_repack(global, dry_run);
    }
    if global.json && (dry_run || plan.steps.is_empty()) {
        return print_json(&plan);
    }
    if plan.steps.is_empty() {
        say(&format!("The store has schema {} already, nothing to do", plan.to))?;
        return Ok(ExitCode::SUCCESS);
    }
    if dry_run {
        for (from, step) in (plan.from..).zip(&plan.steps) {
            say(&format!("Would migrate from schema {from} to {}: {step}", from + 1))?;
        }
        say(&format!("Would keep the old catalogue: {} more", format::size(plan.catalogue_bytes)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let style = if global.quiet { Style::Quiet } else { Style::Auto };
    let (_, options) = place(global, false)?;
    let options = EngineOptions { migrate: Migrate::Always, progress: style.renderer().into(), ..options };
    let engine = Engine::open(&root, options)?;
    match engine.migrated() {
        // What standard output says is said of the layers.
        Some(migrated) if repack => eprintln!("ply: {}", told_of(migrated)),
        Some(migrated) if global.json => drop(print_json(migrated)?),
        Some(migrated) => say(&told_of(migrated))?,
        None => {}
    }
    engine.close()?;
    if repack { run_repack(global, false) } else { Ok(ExitCode::SUCCESS) }
}

/// Layers of a store of this schema are kept as the driver that was named keeps them.
fn run_repack(global: &Global, dry_run: bool) -> anyhow::Result<ExitCode> {
    let style = if global.quiet { Style::Quiet } else { Style::Auto };
    let engine = open(global, false)?;
    let cancel = cancel_on_signals()?;
    let repacked = engine.repack(dry_run, &*style.renderer(), &cancel)?;
    engine.close()?;
    if global.json {
        return print_json(&repacked);
    }
    let Repacked { changed_count, kept_count } = repacked;
    say(&match (dry_run, changed_count, kept_count) {
        (_, 0, 0) => "All layers are kept so already, nothing to do".to_owned(),
        (true, ..) => format!("Would keep {changed_count} layers in another form"),
        (false, _, 0) => format!("Keeps {changed_count} layers in another form"),
        (false, ..) => format!("Keeps {changed_count} layers in another form; {kept_count} stay as they are"),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn told_of(Migrated { from, to, kept }: &Migrated) -> String {
    let kept = kept.display().to_string();
    format!("the store was migrated from schema {from} to {to}; its old catalogue is kept as {}", format::safe(&kept))
}

/// The XDG base directory specification's place for data.
fn user_root() -> anyhow::Result<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share"));
    let data = data.or_else(home).context("no home directory is known: give --root DIR or set PLY_ROOT")?;
    Ok(data.join("plies"))
}

pub(crate) fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("resolve {}", path.display()))
}

/// Where programs are looked for.
pub(crate) fn search_path() -> Vec<PathBuf> {
    std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).filter(|dir| !dir.as_os_str().as_bytes().is_empty()).collect())
        .unwrap_or_default()
}

/// The first SIGINT, SIGTERM or SIGHUP (its terminal is gone) asks to stop, so that nothing is left half-made; a second
/// one kills.
pub(crate) fn cancel_on_signals() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new();
    // Under nohup(1) the end of the terminal is no reason to stop.
    let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
    let taken = hangup.into_iter().chain([SIGINT, SIGTERM]);
    let mut signals = signal_hook::iterator::Signals::new(taken).context("take over signals")?;
    let asked = cancel.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for (count, signal) in signals.forever().enumerate() {
                if count == 0 {
                    asked.cancel();
                } else {
                    drop(signal_hook::low_level::emulate_default_handler(signal));
                }
            }
        })
        .context("start a thread for signals")?;
    Ok(cancel)
}

/// Whether this process was started with a signal ignored (`SigIgn` in proc_pid_status(5)).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}

/// How long ago an RFC 3339 time was; empty when there is none.
pub(crate) fn ago(created: Option<&str>) -> String {
    let Some(created) = created.and_then(|text| text.parse::<Timestamp>().ok()) else { return "N/A".into() };
    let seconds = Timestamp::now().as_second().saturating_sub(created.as_second());
    format::age(u64::try_from(seconds).unwrap_or(0))
}

pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<ExitCode> {
    say(&serde_json::to_string_pretty(value)?)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn say(line: &str) -> anyhow::Result<()> {
    print(&format!("{line}\n"))
}

/// Writes to standard output. A reader that has seen enough (`ply images | head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("write to standard output"),
    }
}
