//! `ply`: the command line of Plies.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 only when the whole job is done,
//! 1 for a failed job, 2 for wrong usage (and for `ply run` the command's own).

mod args;
mod commands;
mod format;
mod progress;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    // A build step of the built-in executor is this program again, under another first argument.
    if let Some(code) = plies_engine::exec::init_main_if_asked() {
        return code;
    }
    let args = args::Ply::parse();
    let verbose = args.global.verbose;
    match commands::run(args) {
        Ok(code) => code,
        Err(error) => {
            report(&error, verbose);
            ExitCode::FAILURE
        }
    }
}

/// One line with the whole chain of causes, or a line each with `-v`.
fn report(error: &anyhow::Error, verbose: bool) {
    if verbose {
        eprintln!("ply: {}", format::multiline(&error.to_string()));
        for cause in error.chain().skip(1) {
            eprintln!("  because: {}", format::multiline(&cause.to_string()));
        }
    } else {
        let chain: Vec<String> = error.chain().map(|cause| format::multiline(&cause.to_string())).collect();
        eprintln!("ply: {}", chain.join(": "));
    }
}
