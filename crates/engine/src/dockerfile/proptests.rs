//! Any text at all: the parser answers, and what it understood it understands again.

use std::collections::BTreeMap;

use plies_oci::Platform;
use proptest::prelude::*;

use super::words::Lexer;
use super::{BuildArgs, Dockerfile, Ignore, InstructionKind, parse};

/// Pieces that files are made of, so that random files reach beyond the first line.
fn piece() -> impl Strategy<Value = String> {
    let pieces = [
        "FROM x\n",
        "from y AS z\n",
        "FROM --platform=$P scratch",
        "RUN ",
        "COPY ",
        "ADD ",
        "ENV ",
        "ARG ",
        "LABEL ",
        "ONBUILD ",
        "HEALTHCHECK ",
        "SHELL ",
        "EXPOSE ",
        "VOLUME ",
        "USER ",
        "WORKDIR ",
        "CMD ",
        "ENTRYPOINT ",
        "STOPSIGNAL ",
        "MAINTAINER ",
        "--from=",
        "--mount=type=cache,target=/x",
        "--mount=",
        "--chmod=u+x ",
        "--link ",
        "--exclude=*.o ",
        "--interval=1s ",
        "<<EOF",
        "<<-'EOF' ",
        "EOF\n",
        "\tEOF\n",
        "<< ",
        "3<<A",
        "\n",
        "\\\n",
        " \\ \n",
        "`\n",
        "\r\n",
        "# comment\n",
        "#\n",
        "# escape=`\n",
        "# syntax=a\n",
        "# check=skip=all\n",
        "[\"a\", \"b\"]",
        "[\"a\"",
        "[1]",
        "a=b ",
        "a ",
        "$A",
        "${A",
        "${A:-b}",
        "${A##*/}",
        "${A//x/y}",
        "'",
        "\"",
        "\\",
        "/",
        "=",
        ",",
        "é",
        "\u{feff}",
        "\0",
        "NONE",
        "CMD x",
    ];
    prop_oneof![9 => proptest::sample::select(pieces.to_vec()).prop_map(str::to_owned), 1 => ".{0,8}"]
}

fn file() -> impl Strategy<Value = String> {
    (any::<bool>(), proptest::collection::vec(piece(), 0..40)).prop_map(|(begun, pieces)| {
        let start = if begun { "FROM base AS first\n" } else { "" };
        format!("{start}{}", pieces.concat())
    })
}

/// Files that parse, of lines in any order, some going on in the next.
fn valid_file() -> impl Strategy<Value = String> {
    let lines = [
        "FROM x AS a",
        "from --platform=$P y",
        "RUN make  &&  make \"install  it\"",
        "RUN [\"a\", \"b c\"]",
        "run [ -f x ]",
        "RUN --mount=type=cache,target=/c --network=none x",
        "COPY --from=img:1 --chmod=u+x a 'b c' /d/",
        "COPY [\"a b\", \"/\"]",
        "ADD --checksum=sha256:0 --unpack http://x/y .",
        "ENV A=1 B=\"2 3\" C=4\\ 5",
        "ENV A b  c",
        "ARG A B=c",
        "LABEL 'a b'=c",
        "EXPOSE 80 $P",
        "VOLUME /a [b]",
        "VOLUME [\"/a\"]",
        "USER a:b",
        "WORKDIR /a b",
        "CMD",
        "CMD []",
        "CMD x $y",
        "SHELL [\"a\"]",
        "ENTRYPOINT [\"a\"]",
        "STOPSIGNAL 9",
        "MAINTAINER a <b>",
        "HEALTHCHECK NONE",
        "HEALTHCHECK --interval=1s CMD x 'y",
        "ONBUILD RUN x",
        "# comment",
        "",
        "COPY --parents --exclude=a --exclude=b c d",
        "ENV A=${B:-${C}} D='$E'",
    ];
    let line = (proptest::sample::select(lines.to_vec()), 0..8usize, any::<bool>());
    proptest::collection::vec(line, 0..20).prop_map(|lines| {
        let mut text = "FROM first AS a\n".to_owned();
        for (line, at, breaks) in lines {
            // A blank that is not quoted may also be the end of a line.
            let blanks: Vec<usize> = line.match_indices(' ').map(|(at, _)| at).collect();
            match blanks.get(at).filter(|_| breaks && !line.starts_with('#') && !line.contains(['[', '"', '\\'])) {
                Some(at) => text += &format!("{} \\\n# between\n\n{}\n", &line[..*at], &line[*at..]),
                None => text += &format!("{line}\n"),
            }
        }
        text
    })
}

/// The file as one line an instruction; none if it holds here-documents, whose text stands elsewhere.
fn printed(file: &Dockerfile) -> Option<String> {
    let mut text = format!("# escape={}\n", file.escape);
    for stage in &file.stages {
        text += &format!("{}\n", stage.text);
        for instruction in &stage.instructions {
            let holds_heredocs = match &instruction.kind {
                InstructionKind::Run(run) => !run.heredocs.is_empty(),
                InstructionKind::Onbuild(text) => text.contains("<<"),
                _ => instruction.text.contains("<<"),
            };
            // A line that ends so would go on in the next one.
            if holds_heredocs || instruction.text.ends_with(file.escape) {
                return None;
            }
            text += &format!("{}\n", instruction.text);
        }
    }
    Some(text)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Err(error) = parse("Dockerfile", &bytes) {
            prop_assert!(!error.to_string().is_empty());
        }
        drop(Ignore::parse(".dockerignore", &bytes));
    }

    #[test]
    fn lines_that_are_right_are_right_together(text in valid_file()) {
        let parsed = parse("Dockerfile", text.as_bytes());
        prop_assert!(parsed.is_ok(), "{}\n{}", text, parsed.unwrap_err());
    }

    #[test]
    fn what_is_parsed_parses_again_as_the_same(text in prop_oneof![file(), valid_file()]) {
        let Ok(first) = parse("Dockerfile", text.as_bytes()) else { return Ok(()) };
        for warning in first.wanted(vec![], None) {
            prop_assert!(warning.line() > 0 && !warning.to_string().is_empty());
        }
        let Some(again) = printed(&first) else { return Ok(()) };
        let second = parse("Dockerfile", again.as_bytes()).map_err(|e| TestCaseError::fail(format!("{again}\n{e}")))?;
        prop_assert_eq!(second.stages.len(), first.stages.len());
        for (a, b) in first.stages.iter().zip(&second.stages) {
            prop_assert_eq!((&a.base, &a.name, &a.platform), (&b.base, &b.name, &b.platform));
            let kinds = |stage: &super::Stage| stage.instructions.iter().map(|i| i.kind.clone()).collect::<Vec<_>>();
            prop_assert_eq!(kinds(a), kinds(b), "{}", again);
        }
    }

    #[test]
    fn any_word_expands_or_is_refused(word in "[$(){}a-zA:?#%/*'\"\\\\ +=-]{0,40}", value in ".{0,10}") {
        let variables: BTreeMap<String, String> = [("A".to_owned(), value)].into();
        drop(Lexer::new('\\').expand(&word, &variables));
        drop(Lexer::new('`').split(&word, &variables));
        drop(Lexer::for_heredoc().expand(&word, &variables));
        // Without anything special a word stays what it is.
        if !word.contains(['$', '\'', '"', '\\']) {
            prop_assert_eq!(Lexer::new('\\').expand(&word, &variables).unwrap().text, word);
        }
    }

    #[test]
    fn global_args_expand_or_are_refused(text in file(), given in "[A-Z]{1,2}") {
        let Ok(file) = parse("Dockerfile", text.as_bytes()) else { return Ok(()) };
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        let given = [(given, "x".to_owned())].into();
        drop(BuildArgs::new(&file, given, &platform, &platform, None));
    }
}
