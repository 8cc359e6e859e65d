//! `ply build --check`, and the same warnings during a build.

use plies_testkit::{args, ply::Ply};
use serde_json::{Value, json};

use crate::common::{Context, store};

/// Line and rule of what `--check` says.
#[track_caller]
fn checked(ply: &Ply, dockerfile: &str, more: &[std::ffi::OsString]) -> Vec<(u64, String)> {
    let context = Context::new(ply, dockerfile);
    let ran = ply.run(&[args!["build", "--check", "--json"], more, args![context.dir]].concat());
    let warnings: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran}"));
    let warnings = warnings.as_array().unwrap();
    assert_eq!(ran.status.code(), Some(i32::from(!warnings.is_empty())), "{ran}");
    warnings.iter().map(|w| (w["line"].as_u64().unwrap(), w["rule"].as_str().unwrap().to_owned())).collect()
}

#[test]
fn every_rule_has_a_file_that_goes_against_it_and_one_that_does_not() {
    let Some(ply) = store() else { return };
    // What goes against it, at which line, and the same without.
    let table = [
        ("StageNameCasing", "FROM scratch AS Base\n", 1, "FROM scratch AS base\n"),
        ("FromAsCasing", "FROM scratch as base\n", 1, "from scratch as base\n"),
        ("NoEmptyContinuation", "FROM scratch\nENV A=1 \\\n\n  B=2\n", 3, "FROM scratch\nENV A=1 \\\n  B=2\n"),
        ("ConsistentInstructionCasing", "FROM scratch\nenv A=1\nENV B=1\n", 2, "from scratch\nenv A=1\n"),
        ("DuplicateStageName", "FROM scratch AS a\nFROM scratch AS a\n", 2, "FROM scratch AS a\nFROM scratch AS b\n"),
        ("ReservedStageName", "FROM scratch AS context\n", 1, "FROM scratch AS contexts\n"),
        ("JSONArgsRecommended", "FROM scratch\nCMD run me\n", 2, "FROM scratch\nSHELL [\"sh\"]\nCMD run me\n"),
        ("JSONArgsRecommended", "FROM scratch\nENTRYPOINT run me\n", 2, "FROM scratch\nENTRYPOINT [\"run\"]\n"),
        ("MaintainerDeprecated", "FROM scratch\nMAINTAINER me\n", 2, "FROM scratch\nLABEL authors=me\n"),
        ("UndefinedArgInFrom", "ARG NAME\nFROM scratch${NANE}\n", 2, "ARG NAME=\nFROM scratch${NAME}\n"),
        ("WorkdirRelativePath", "FROM scratch\nWORKDIR w\nWORKDIR x\n", 2, "FROM scratch\nWORKDIR /w\nWORKDIR x\n"),
        ("UndefinedVar", "FROM scratch\nENV A=$B\n", 2, "FROM scratch\nARG B\nENV A=$B\nENV C=$A$PATH\n"),
        ("UndefinedVar", "FROM scratch\nCOPY <<a /\n$X\na\n", 3, "FROM scratch\nCOPY <<'a' /\n$X\na\n"),
        (
            "MultipleInstructionsDisallowed",
            "FROM scratch\nCMD [\"a\"]\nCMD [\"b\"]\n",
            2,
            "FROM scratch AS a\nCMD [\"a\"]\nFROM a\nCMD [\"b\"]\n",
        ),
        ("LegacyKeyValueFormat", "FROM scratch\nENV A b\n", 2, "FROM scratch\nENV A=b\n"),
        ("LegacyKeyValueFormat", "FROM scratch\nLABEL A b\n", 2, "FROM scratch\nLABEL A=b\n"),
        (
            "RedundantTargetPlatform",
            "FROM --platform=$TARGETPLATFORM scratch\n",
            1,
            "FROM --platform=$BUILDPLATFORM scratch\n",
        ),
        ("SecretsUsedInArgOrEnv", "FROM scratch\nENV API_TOKEN=x\n", 2, "FROM scratch\nENV TOKENS=x\n"),
        ("SecretsUsedInArgOrEnv", "FROM scratch\nARG password\n", 2, "FROM scratch\nARG PASSWORD_FILE\n"),
        ("InvalidDefaultArgInFrom", "ARG TAG\nFROM image:${TAG}\n", 2, "ARG TAG=1\nFROM image:${TAG}\n"),
        (
            "FromPlatformFlagConstDisallowed",
            "FROM --platform=HOST scratch\n",
            1,
            "FROM --platform=HOST scratch AS linux-x\n",
        ),
        ("CopyIgnoredFile", "FROM scratch\nCOPY ignored /\n", 2, "FROM scratch\nCOPY present /\n"),
        (
            "CopyIgnoredFile",
            "FROM scratch\nADD ignored/x /\n",
            2,
            "FROM scratch AS a\nFROM scratch\nCOPY --from=a ignored /\n",
        ),
        ("ExposeProtoCasing", "FROM scratch\nEXPOSE 80/TCP\n", 2, "FROM scratch\nEXPOSE 80/tcp\n"),
        ("ExposeInvalidFormat", "FROM scratch\nEXPOSE 81:80\n", 2, "FROM scratch\nEXPOSE 80\n"),
    ];
    let host = format!("linux/{}", plies_testkit::image::architecture());
    for (rule, bad, line, good) in table {
        ply.scratch().file("context/.dockerignore", "ignored\n");
        let (bad, good) = (bad.replace("HOST", &host), good.replace("HOST", &host));
        // A build argument makes sense of what has no default.
        let more = if rule == "InvalidDefaultArgInFrom" { args!["--build-arg", "TAG=2"] } else { &[] };
        assert_eq!(checked(&ply, &bad, more), [(line, rule.to_owned())], "{bad}");
        assert_eq!(checked(&ply, &good, more), [], "{good}");
        let skipped = format!("# check=skip={rule}\n{bad}");
        assert_eq!(checked(&ply, &skipped, more), [], "{skipped}");
    }
}

#[test]
fn warnings_show_during_a_build_and_can_fail_it() {
    let Some(ply) = store() else { return };
    let text = "FROM scratch\nMAINTAINER me\nCOPY Dockerfile /\n";
    let context = Context::new(&ply, text);
    let stderr = context.build(&[]).ran.stderr;
    assert!(stderr.contains("warning: MaintainerDeprecated: ") && stderr.contains("(Dockerfile:2)"), "{stderr}");
    // The build argument goes before the file.
    let quiet = context.build(args!["--build-arg", "BUILDKIT_DOCKERFILE_CHECK=skip=all"]).ran.stderr;
    assert!(!quiet.contains("warning"), "{quiet}");
    ply.ok(args!["rmi", "built"]);
    let failed = context.build_fails(args!["--build-arg", "BUILDKIT_DOCKERFILE_CHECK=error=true"]);
    assert!(failed.stderr.contains("Dockerfile:2: MaintainerDeprecated"), "{failed}");
    assert_eq!(ply.json(args!["images"]), json!([]), "nothing is tagged");
    let bad = context.build_fails(args!["--build-arg", "BUILDKIT_DOCKERFILE_CHECK=what"]);
    assert!(bad.stderr.contains("unknown check option \"what\""), "{bad}");
}

#[test]
fn a_check_builds_nothing_and_shows_lines() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "FROM not.here/base:1\nRUN no such command\nENV KEY=x\n");
    let ran = ply.run(args!["build", "--check", context.dir]);
    assert_eq!(ran.status.code(), Some(1), "{ran}");
    assert_eq!(
        ran.stdout,
        "Dockerfile:3: SecretsUsedInArgOrEnv: what ENV KEY holds stays in the image: use RUN --mount=type=secret\n  \
         ENV KEY=x\n      ^^^\n1 warning\n"
    );
    context.file("Dockerfile", "FROM not.here/base:1\n");
    assert_eq!(ply.ok(args!["build", "--check", context.dir]).stdout, "no warnings\n");
    // What would stop a build stops a check.
    context.file("Dockerfile", "FROM scratch\nEXPOSE nowhere\n");
    let ran = ply.fails(1, args!["build", "--check", context.dir]);
    assert!(ran.stderr.contains("Dockerfile:2: \"nowhere\" is not a port"), "{ran}");
}
