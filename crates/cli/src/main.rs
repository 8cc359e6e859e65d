//! `ply`: the command line of Plies.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 only when the whole job is done,
//! 1 for a failed job, 2 for wrong usage (and for `ply run` the command's own).

mod args;
mod commands;
mod config;
mod format;
mod fsck;
mod layers;
mod output;
mod progress;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;

/// The catalogue's work takes a quarter to a third less time with it than with the C library's (DECISIONS 130).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The exit code for wrong usage, clap's own.
const WRONG_USAGE: u8 = 2;

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
            if let Some(usage) = error.downcast_ref::<clap::Error>() {
                // To a standard error that is closed there is nothing to say.
                drop(usage.print());
                return ExitCode::from(WRONG_USAGE);
            }
            report(&error, verbose);
            ExitCode::FAILURE
        }
    }
}

/// What to do where the system said no to somebody who is not root; layers keep owners, devices and privileged
/// attributes, which takes root.
fn advice(error: &anyhow::Error) -> Option<&'static str> {
    let denied = error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied)
    });
    let advice = "ply keeps owners and devices of layers and needs root for that: run it as root";
    (denied && !rustix::process::geteuid().is_root()).then_some(advice)
}

/// One line with the whole chain of causes, or a line each with `-v`.
fn report(error: &anyhow::Error, verbose: bool) {
    let mut text = String::new();
    if verbose {
        text += &format!("ply: {}\n", format::multiline(&error.to_string()));
        for cause in error.chain().skip(1) {
            text += &format!("  because: {}\n", format::multiline(&cause.to_string()));
        }
    } else {
        let chain: Vec<String> = error.chain().map(|cause| format::multiline(&cause.to_string())).collect();
        text += &format!("ply: {}\n", joined(&chain));
    }
    if let Some(advice) = advice(error) {
        text += &format!("  ({advice})\n");
    }
    // Where that cannot be written nobody is told, and the exit code has to do.
    drop(io::stderr().write_all(text.as_bytes()));
}

/// A chain of causes as one line. What messages quote below their first line (a Dockerfile's line with a caret) comes
/// after it, so that no cause stands behind a caret.
fn joined(chain: &[String]) -> String {
    let parts: Vec<(&str, &str)> = chain.iter().map(|text| text.split_once('\n').unwrap_or((text, ""))).collect();
    let heads: Vec<&str> = parts.iter().map(|(head, _)| head.trim_end_matches(':')).collect();
    let quotes = parts.iter().map(|(_, quote)| quote.trim_end()).filter(|quote| !quote.is_empty());
    std::iter::once(heads.join(": ").as_str()).chain(quotes).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_come_before_what_is_quoted() {
        for (chain, text) in [
            (vec!["one"], "one"),
            (vec!["one", "two", "three"], "one: two: three"),
            (
                vec!["D:4: RUN\n 4 | RUN false\n     ^^^", "exit code 1"],
                "D:4: RUN: exit code 1\n 4 | RUN false\n     ^^^",
            ),
            (vec!["build", "D:4: bad\n 4 | x", "why"], "build: D:4: bad: why\n 4 | x"),
        ] {
            let chain: Vec<String> = chain.into_iter().map(str::to_owned).collect();
            assert_eq!(joined(&chain), text);
        }
    }
}
