//! `ply fsck`.

use std::process::ExitCode;

use plies_engine::{Engine, FsckDepth, FsckFinding, FsckReport, FsckRequest};

use crate::args::{Fsck, Global};
use crate::commands::{cancel_on_signals, place, print_json, say};
use crate::format;
use crate::progress::Style;

/// It could not look, or not repair.
const FAILED: u8 = 2;

pub(crate) fn run(global: &Global, fsck: &Fsck) -> anyhow::Result<ExitCode> {
    // A damaged page makes the database panic, which is caught and told as damage.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|at| at.file().contains("/redb-")) {
            tell(panic);
        }
    }));
    match check(global, fsck) {
        Ok(code) => Ok(code),
        Err(error) => {
            crate::report(&error, global.verbose);
            Ok(ExitCode::from(FAILED))
        }
    }
}

fn check(global: &Global, fsck: &Fsck) -> anyhow::Result<ExitCode> {
    let style = if global.quiet { Style::Quiet } else { Style::Auto };
    let progress = style.renderer();
    let (root, mut options) = place(global, false)?;
    let (mut rebuilt, mut early) = (None, None);
    if fsck.rebuild {
        let cancel = early.insert(cancel_on_signals()?);
        rebuilt = Some(Engine::rebuild(&root, &mut options, &*progress, cancel)?);
        (_, options) = place(global, false)?;
    } else {
        // To look for damage where there is nothing would make a store.
        anyhow::ensure!(root.join("catalog").is_dir(), "no store at {}", root.display());
    }
    let engine = Engine::open(&root, options)?;
    // Until the store is ours an interrupt simply ends the wait.
    let cancel = early.map_or_else(cancel_on_signals, Ok)?;
    if fsck.empty_lost {
        let bytes = engine.empty_lost()?;
        engine.close()?;
        say(&format!("Removed {} from lost/", format::size(bytes)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let depth = match (fsck.quick, fsck.read_data) {
        (true, _) => FsckDepth::Quick,
        (false, Some(percent)) => FsckDepth::Data(percent),
        (false, None) => FsckDepth::Graph,
    };
    let request = FsckRequest { depth, repair: fsck.repair && !fsck.dry_run, rebuilt };
    let report = engine.fsck(&request, &*progress, &cancel)?;
    engine.close()?;
    let code = ExitCode::from(u8::from(!report.left.is_empty()));
    if global.json {
        print_json(&report)?;
        return Ok(code);
    }
    show(&report, &request, fsck.repair)?;
    Ok(code)
}

fn show(report: &FsckReport, request: &FsckRequest, wanted_repair: bool) -> anyhow::Result<()> {
    let line = |finding: &FsckFinding, then: &str| {
        let (subject, what) = (format::safe(&finding.subject), format::safe(&finding.what));
        say(&format!("{}: {subject} {what}{then}", finding.code))
    };
    for finding in &report.findings {
        let then = match finding.done {
            Some(done) => format!(" -- {done}"),
            None if wanted_repair => format!(" -- would {}", would(finding.remedy)),
            None => String::new(),
        };
        line(finding, &then)?;
    }
    if let Some(rebuilt) = &report.rebuilt {
        say(&format!(
            "Rebuilt: {} rows could be read, {} layers and {} blobs were found, of which {} images without names and {} \
             records were made",
            rebuilt.salvaged_rows_count,
            rebuilt.layers_count,
            rebuilt.blobs_count,
            rebuilt.images_count,
            rebuilt.records_count
        ))?;
    }
    if let Some((from, count)) = report.parts_read {
        say(&format!(
            "Read {count}% of blobs and layers: parts {from} and on of 100; the next run goes on from there"
        ))?;
    }
    if let Some(lost) = &report.lost {
        say(&format!("What was taken away is in {lost} below the root; `ply fsck --empty-lost` removes it"))?;
    }
    let repaired = request.repair || request.rebuilt.is_some();
    if repaired {
        for finding in &report.left {
            line(finding, " -- left")?;
        }
    }
    match (report.left.len(), repaired) {
        (0, _) if report.findings.is_empty() => say(&format!("No damage found in {} rows", report.rows_count)),
        (0, _) => say(&format!("All {} problems were dealt with", report.findings.len())),
        (left, true) => say(&format!("{left} problems are left")),
        (left, false) => say(&format!("{left} problems: see what `ply fsck --repair --dry-run` would do")),
    }
}

fn would(remedy: &str) -> &str {
    match remedy {
        "permissions" | "sidecar" | "layout" | "rewrite" => "rewrite it",
        "restore" | "restack" => "restore it, or drop what needs it",
        "quarantine" => "set it aside",
        "drop" => "drop it",
        other => other,
    }
}
