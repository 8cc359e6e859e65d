use super::*;
use crate::dockerfile::Invocation;

fn parsed(text: &str) -> Dockerfile {
    parse("Dockerfile", text.as_bytes()).unwrap_or_else(|error| panic!("{error}"))
}

/// The only instruction after `FROM x`.
fn one(text: &str) -> InstructionKind {
    let file = parsed(&format!("FROM x\n{text}\n"));
    let [instruction] = file.stages[0].instructions.as_slice() else { panic!("{:?}", file.stages[0].instructions) };
    instruction.kind.clone()
}

fn error(text: &str) -> String {
    parse("Dockerfile", text.as_bytes()).unwrap_err().to_string()
}

fn run(text: &str) -> Run {
    let InstructionKind::Run(run) = one(text) else { panic!("{text}") };
    run
}

fn shell(text: &str) -> CommandLine {
    CommandLine::Shell(text.to_owned())
}

fn exec(words: &[&str]) -> CommandLine {
    CommandLine::Exec(words.iter().map(|word| (*word).to_owned()).collect())
}

fn invocation(text: &str) -> Invocation {
    run(text).invocation(&["/bin/sh".to_owned(), "-c".to_owned()])
}

fn pair(name: &str, value: &str) -> Pair {
    Pair { name: name.to_owned(), value: value.to_owned() }
}

#[test]
fn stages_and_global_args_with_their_lines() {
    let file = parsed(
        "# syntax=docker/dockerfile:1\n\nARG A=1 B\nFROM --platform=$BUILDPLATFORM img:$A as Build\n\nRUN one \\\n  # comment\n\n  two\n\
         from build\nCOPY --from=Build a b\nCOPY --from=0 a b\nCOPY --from=alpine:3 a b\n",
    );
    assert_eq!(file.syntax.as_deref(), Some("docker/dockerfile:1"));
    assert_eq!(file.global_args[0].args.len(), 2);
    assert_eq!(file.global_args[0].location, Location { first_line: 3, last_line: 3 });
    let build = &file.stages[0];
    assert_eq!((build.base.as_str(), build.name.as_deref()), ("img:$A", Some("build")));
    assert_eq!(build.platform.as_deref(), Some("$BUILDPLATFORM"));
    assert_eq!(build.instructions[0].location, Location { first_line: 6, last_line: 9 });
    assert_eq!(build.instructions[0].text, "RUN one   two");
    let from: Vec<&CopyFrom> = file.stages[1]
        .instructions
        .iter()
        .map(|instruction| match &instruction.kind {
            InstructionKind::Copy(copy) => &copy.from,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(from, [&CopyFrom::Stage(0), &CopyFrom::Stage(0), &CopyFrom::Image("alpine:3".to_owned())]);
    assert_eq!(file.stage_named("BUILD", 2), Some(0));
    assert_eq!(file.stage_like("biuld", 1), Some("build"));
    assert_eq!(file.stage_like("alpine", 1), None);
    assert_eq!(file.target(None).unwrap(), 1);
    assert_eq!(file.target(Some("build")).unwrap(), 0);
    assert_eq!(file.target(Some("1")).unwrap(), 1);
    assert_eq!(
        file.target(Some("biuld")).unwrap_err().to_string(),
        "Dockerfile: no stage \"biuld\" to build (did you mean build?)"
    );
}

#[test]
fn commands_are_json_or_else_shell() {
    assert_eq!(run("RUN make && make install").command, shell("make && make install"));
    assert_eq!(run(r#"RUN ["a", "b c"]"#).command, exec(&["a", "b c"]));
    // Slips in the JSON make it a shell's, as with docker.
    assert_eq!(run("RUN ['a', 'b']").command, shell("['a', 'b']"));
    assert_eq!(run(r#"RUN ["a", "b""#).command, shell(r#"["a", "b""#));
    assert_eq!(run("RUN [ -f x ] && y").command, shell("[ -f x ] && y"));
    assert_eq!(run(r#"RUN ["a"] && b"#).command, shell(r#"["a"] && b"#));
    assert_eq!(run("RUN [\"a\", \\\n \"b\"]").command, exec(&["a", "b"]));
    assert_eq!(one("CMD"), InstructionKind::Cmd(exec(&[])));
    assert_eq!(one("CMD []"), InstructionKind::Cmd(exec(&[])));
    assert_eq!(one("ENTRYPOINT exec top -b"), InstructionKind::Entrypoint(shell("exec top -b")));
    assert_eq!(one(r#"SHELL ["/bin/bash", "-c"]"#), InstructionKind::Shell(vec!["/bin/bash".into(), "-c".into()]));
}

#[test]
fn run_flags_and_what_they_name() {
    let file = parsed(
        "FROM x AS one\nRUN --mount=type=cache,target=/c,from=Two --mount=from=img:1,target=/i --network=none --security=insecure make\n\
         FROM y AS two\nCOPY --from=0 a b\n",
    );
    let InstructionKind::Run(run) = &file.stages[0].instructions[0].kind else { panic!() };
    let from: Vec<_> = run.mounts.iter().map(|mount| mount.from.clone().unwrap()).collect();
    // Stages that come later count too.
    assert_eq!(from, [CopyFrom::Stage(1), CopyFrom::Image("img:1".to_owned())]);
    assert_eq!((run.network, run.security), (RunNetwork::None, RunSecurity::Insecure));
    let plain = super::tests::run("RUN make");
    assert_eq!((plain.mounts.len(), plain.network, plain.security), (0, RunNetwork::Default, RunSecurity::Sandbox));
}

#[test]
fn heredocs_become_scripts_shell_text_or_stay() {
    let script = invocation("RUN <<EOF\necho a\necho b\nEOF");
    assert_eq!(script.argv, ["/bin/sh", "-c", "echo a\necho b\n"]);
    let script = invocation("RUN <<-EOF\n\techo a\n\tEOF");
    assert_eq!(script.argv, ["/bin/sh", "-c", "echo a\n"]);
    let script = invocation("RUN <<EOF\n#!/usr/bin/env python3\nprint(1)\nEOF");
    assert_eq!(script.argv, ["/dev/pipes/EOF"]);
    assert_eq!(script.script, Some(("EOF".into(), "#!/usr/bin/env python3\nprint(1)\n".into())));
    // What stands before or after makes it the shell's own; the next line is an instruction again.
    let script = invocation("RUN cat <<EOF > /etc/motd\nFROM here\nEOF");
    assert_eq!(script.argv[2], "cat <<EOF > /etc/motd\nFROM here\nEOF");
    let script = invocation("RUN cat <<A <<'B C' && echo done\na\nA\nb\nB C");
    assert_eq!(script.argv[2], "cat <<A <<'B C' && echo done\na\nAb\nB C".replace("\nAb", "\nA\nb"));
    // No here-documents at all.
    assert!(run("RUN echo $((1<<2)) \"<<EOF\"").heredocs.is_empty());
    assert!(run(r#"RUN ["cat", "<<EOF"]"#).heredocs.is_empty());
    assert!(run("RUN cat <<< word").heredocs.is_empty());
}

#[test]
fn copy_takes_flags_paths_json_and_heredocs() {
    let InstructionKind::Copy(copy) =
        one("COPY --chown=1:2 --chmod=u+x --link --exclude=*.o --exclude=b a/ b*.c /dest/")
    else {
        panic!()
    };
    assert_eq!((copy.chown.as_deref(), copy.chmod.as_deref(), copy.link), (Some("1:2"), Some("u+x"), true));
    assert_eq!(copy.excludes, ["*.o", "b"]);
    assert_eq!(copy.sources, [CopySource::Path("a/".into()), CopySource::Path("b*.c".into())]);
    assert_eq!(copy.dest, "/dest/");
    let InstructionKind::Copy(copy) = one(r#"COPY ["a b", "c d/"]"#) else { panic!() };
    assert_eq!((copy.sources, copy.dest), (vec![CopySource::Path("a b".into())], "c d/".to_owned()));
    let InstructionKind::Copy(copy) = one("COPY <<one <<\"two\" three /d/\nx=$X\none\ny\ntwo") else { panic!() };
    let [CopySource::Heredoc(one), CopySource::Heredoc(two), CopySource::Path(_)] = copy.sources.as_slice() else {
        panic!()
    };
    assert_eq!((one.name.as_str(), one.content.as_str(), one.expand), ("one", "x=$X\n", true));
    assert_eq!((two.name.as_str(), two.content.as_str(), two.expand), ("two", "y\n", false));
    let InstructionKind::Add(add) = super::tests::one("ADD --checksum=sha256:00 --unpack=false https://x/y.tar /")
    else {
        panic!()
    };
    assert_eq!((add.unpack, add.checksum.as_deref()), (Some(false), Some("sha256:00")));
}

#[test]
fn pairs_and_words() {
    assert_eq!(
        one("ENV A=1 B=\"2 3\" C=4\\ 5 D="),
        InstructionKind::Env(vec![pair("A", "1"), pair("B", "\"2 3\""), pair("C", "4\\ 5"), pair("D", "")])
    );
    assert_eq!(one("ENV NAME some value  here"), InstructionKind::Env(vec![pair("NAME", "some value  here")]));
    assert_eq!(
        one("LABEL a.b=\"c=d\" 'e f'=g"),
        InstructionKind::Label(vec![pair("a.b", "\"c=d\""), pair("'e f'", "g")])
    );
    assert_eq!(one("EXPOSE 80 53/udp $P"), InstructionKind::Expose(vec!["80".into(), "53/udp".into(), "$P".into()]));
    assert_eq!(one("VOLUME /a /b"), InstructionKind::Volume(vec!["/a".into(), "/b".into()]));
    assert_eq!(one("VOLUME [\"/a b\"]"), InstructionKind::Volume(vec!["/a b".into()]));
    assert_eq!(one("WORKDIR /with blank"), InstructionKind::Workdir("/with blank".into()));
    assert_eq!(one("USER app:staff"), InstructionKind::User("app:staff".into()));
    assert_eq!(one("STOPSIGNAL SIGKILL"), InstructionKind::StopSignal("SIGKILL".into()));
    assert_eq!(one("MAINTAINER A B <a@b>"), InstructionKind::Maintainer("A B <a@b>".into()));
    assert_eq!(one("ONBUILD RUN make"), InstructionKind::Onbuild("RUN make".into()));
    assert_eq!(one("ONBUILD COPY <<EOF /x\nhi\nEOF"), InstructionKind::Onbuild("COPY <<EOF /x\nhi\nEOF".into()));
}

#[test]
fn healthchecks() {
    assert_eq!(one("HEALTHCHECK NONE"), InstructionKind::Healthcheck(Healthcheck::None));
    let InstructionKind::Healthcheck(check) =
        one("HEALTHCHECK --interval=1m30s --timeout=1.5s --retries=3 CMD curl -f x")
    else {
        panic!()
    };
    let expected = Healthcheck::Command {
        command: shell("curl -f x"),
        interval_nanos: 90_000_000_000,
        timeout_nanos: 1_500_000_000,
        start_period_nanos: 0,
        start_interval_nanos: 0,
        retries: 3,
    };
    assert_eq!(check, expected);
    assert_eq!(go_duration_nanos("1h2m3s4ms5us6ns"), Some(3_723_004_005_006));
    for bad in ["", "1", "s", "-1s", "1x", ".s", "99999999999h"] {
        assert_eq!(go_duration_nanos(bad), None, "{bad}");
    }
}

#[test]
fn escape_directive_changes_continuations_and_escapes() {
    let file = parsed("# escape=`\nFROM x\nRUN dir C:\\ `\n  /b\nENV A=b` c\n");
    assert_eq!(file.escape, '`');
    assert_eq!(file.stages[0].instructions[0].text, "RUN dir C:\\   /b");
    assert_eq!(file.stages[0].instructions[1].kind, InstructionKind::Env(vec![pair("A", "b` c")]));
    // A comment before it ends the directives.
    assert_eq!(parsed("# hello\n# escape=`\nFROM x\n").escape, '\\');
    assert_eq!(
        error("# escape=x\nFROM y\n"),
        "Dockerfile:1: invalid escape character \"x\": expected ` or \\\n  # escape=x\n           ^"
    );
    assert!(error("# syntax=a\n# syntax=b\nFROM y\n").starts_with("Dockerfile:2: only one syntax directive"));
}

#[test]
fn continuations_as_in_buildkit() {
    assert_eq!(run("RUN a \\\n\n\n# c\n  b \\ \n  c").command, shell("a   b   c"));
    assert_eq!(run("RUN a \\\\\nRUN b".split_once('\n').unwrap().0).command, shell("a \\\\"));
    assert_eq!(run("RUN a\\").command, shell("a"));
    assert_eq!(run("  run a").command, shell("a"));
    assert_eq!(run("RUN a\r").command, shell("a"));
    assert_eq!(parsed("\u{feff}FROM x").stages[0].base, "x");
    // Comments in other encodings are no concern of ours.
    assert!(parse("D", b"# caf\xe9\nFROM x\n").is_ok());
    assert!(parse("D", b"FROM x\nENV A=caf\xe9\n").unwrap_err().to_string().starts_with("D:2: the line is not UTF-8"));
}

#[test]
fn errors_name_line_word_and_remedy() {
    let table = [
        (
            "FROM x\n\nRUNN make\n",
            "Dockerfile:3: unknown instruction \"RUNN\" (did you mean RUN?)\n  RUNN make\n  ^^^^",
        ),
        ("FROM x\nFROBNICATE\n", "Dockerfile:2: unknown instruction \"FROBNICATE\"\n  FROBNICATE\n  ^^^^^^^^^^"),
        ("RUN x\n", "Dockerfile:1: RUN before the first FROM: only ARG can stand there\n  RUN x\n  ^^^"),
        (
            "FROM x\nCOPY a\n",
            "Dockerfile:2: COPY requires at least two arguments: the destination is missing\n  COPY a\n       ^",
        ),
        (
            "FROM x\nCOPY --form=y a b\n",
            "Dockerfile:2: unknown flag --form (did you mean --from?)\n  COPY --form=y a b\n       ^^^^^^",
        ),
        (
            "FROM x\nFROM y\nCOPY --from=2 a b\n",
            "Dockerfile:3: no stage 2: there are 0 to 1\n  COPY --from=2 a b\n              ^",
        ),
        (
            "FROM x AS me\nCOPY --from=Me a b\n",
            "Dockerfile:2: the stage Me can't take files from itself\n  COPY --from=Me a b\n              ^^",
        ),
        (
            "FROM x\nRUN --mount=type=cache,target=/x \\\n  --mount=type=tmpfs,size=x make\n",
            "Dockerfile:3: size requires a size like 64m or 1.5g, not \"x\"\n  --mount=type=tmpfs,size=x make\n                     ^^^^",
        ),
        // The line that the mistake is on, not the one on which the instruction begins.
        (
            "FROM x\nCOPY \\\n  --chmd=1 \\\n  a b\n",
            "Dockerfile:3: unknown flag --chmd (did you mean --chmod?)\n  --chmd=1 \\\n  ^^^^^^",
        ),
        (
            "FROM x\nRUN <<EOF\necho\n",
            "Dockerfile:2: the here-document \"EOF\" has no end: a line with only EOF is expected\n  RUN <<EOF\n      ^^",
        ),
        (
            "FROM x as 1st\n",
            "Dockerfile:1: invalid name for a stage \"1st\": a letter is expected, then letters, digits, '-', '_' and '.'\n  FROM x as 1st\n            ^^^",
        ),
    ];
    for (text, expected) in table {
        assert_eq!(error(text), expected);
    }
    for (text, begins) in [
        ("", "Dockerfile: the file has no instructions"),
        ("# only\n\n# comments\n", "Dockerfile: the file has no instructions"),
        ("ARG A\n", "Dockerfile: the file has no FROM"),
        ("FROM\n", "Dockerfile:1: FROM requires an image"),
        ("FROM a b\n", "Dockerfile:1: FROM requires either one argument or three"),
        ("FROM a like b\n", "Dockerfile:1: FROM requires either one argument or three"),
        ("FROM x\nRUN\n", "Dockerfile:2: RUN requires at least one argument"),
        ("FROM x\nRUN [1]\n", "Dockerfile:2: a JSON array here can only hold strings"),
        ("FROM x\nSHELL bash -c\n", "Dockerfile:2: SHELL requires a JSON array"),
        ("FROM x\nENV A\n", "Dockerfile:2: ENV requires a value"),
        ("FROM x\nENV A=1 B\n", "Dockerfile:2: \"B\" has no '='"),
        ("FROM x\nENV =1\n", "Dockerfile:2: a name is expected before '='"),
        ("FROM x\nARG\n", "Dockerfile:2: ARG requires at least one argument"),
        ("FROM x\nUSER\n", "Dockerfile:2: USER requires exactly one argument"),
        ("FROM x\nEXPOSE\n", "Dockerfile:2: EXPOSE requires at least one argument"),
        ("FROM x\nVOLUME [\"\"]\n", "Dockerfile:2: a VOLUME can't be an empty string"),
        ("FROM x\nONBUILD\n", "Dockerfile:2: ONBUILD requires at least one argument"),
        ("FROM x\nONBUILD ONBUILD RUN x\n", "Dockerfile:2: ONBUILD can't be"),
        ("FROM x\nONBUILD FROM y\n", "Dockerfile:2: FROM can't be"),
        ("FROM x\nONBUILD RUNN y\n", "Dockerfile:2: unknown instruction \"RUNN\""),
        ("FROM x\nHEALTHCHECK\n", "Dockerfile:2: HEALTHCHECK requires at least one argument"),
        ("FROM x\nHEALTHCHECK CMD\n", "Dockerfile:2: HEALTHCHECK CMD requires a command"),
        ("FROM x\nHEALTHCHECK NONE x\n", "Dockerfile:2: HEALTHCHECK NONE takes no arguments"),
        ("FROM x\nHEALTHCHECK --interval=soon CMD x\n", "Dockerfile:2: --interval requires a duration"),
        ("FROM x\nHEALTHCHECK --interval=1ns CMD x\n", "Dockerfile:2: --interval can't be less than 1ms"),
        ("FROM x\nENV --x A=1\n", "Dockerfile:2: unknown flag --x: ENV has no flags"),
        ("FROM x\nCOPY --chown a b\n", "Dockerfile:2: --chown requires a value"),
        ("FROM x\nCOPY --chown=1 --chown=2 a b\n", "Dockerfile:2: --chown is given more than once"),
        ("FROM x\nCOPY --link=maybe a b\n", "Dockerfile:2: --link requires true or false"),
        ("FROM x\nCOPY --from=$X a b\n", "Dockerfile:2: variables are not expanded in from"),
        ("FROM x\nCOPY a <<EOF\nEOF\n", "Dockerfile:2: the destination of COPY can't be a here-document"),
        ("FROM x\nRUN --network=nope x\n", "Dockerfile:2: --network is default, none or host, not \"nope\""),
        ("FROM x\nRUN --security=none x\n", "Dockerfile:2: --security is sandbox or insecure, not \"none\""),
        ("FROM x\nRUN --device=x y\n", "Dockerfile:2: RUN --device is not supported yet"),
        ("FROM x\nRUN --mout=x y\n", "Dockerfile:2: unknown flag --mout (did you mean --mount?)"),
    ] {
        assert!(error(text).starts_with(begins), "{text:?}: {}", error(text));
    }
}

#[test]
fn f06_a_huge_file_is_refused() {
    let huge = vec![b'#'; lines::FILE_BYTES_MAX + 1];
    assert!(parse("D", &huge).is_err());
}
