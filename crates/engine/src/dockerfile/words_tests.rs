use super::*;

fn variables() -> BTreeMap<String, String> {
    [("PWD", "/home"), ("SHELL", "bash"), ("KOREAN", "한국어"), ("NULL", "")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

/// `None`: an error.
fn expand(word: &str) -> Option<String> {
    Lexer::new('\\').expand(word, &variables()).ok().map(|expansion| expansion.text)
}

#[test]
fn words_expand_as_in_buildkit() {
    let table: &[(&str, Option<&str>)] = &[
        ("hello", Some("hello")),
        ("he'll'o", Some("hello")),
        ("he'llo", None),
        (r"he\'llo", Some("he'llo")),
        (r"he\\'llo", None),
        (r"abc\tdef", Some("abctdef")),
        (r#""abc\tdef""#, Some(r"abc\tdef")),
        (r#""abc\\tdef""#, Some(r"abc\tdef")),
        (r"'abc\tdef'", Some(r"abc\tdef")),
        (r"hello\", Some("hello")),
        (r"hello\\", Some(r"hello\")),
        (r#""hello"#, None),
        (r#""hello\""#, None),
        (r#""hel'lo""#, Some("hel'lo")),
        ("'hello", None),
        (r"'hello\'", Some(r"hello\")),
        (r"'hello\\there'", Some(r"hello\\there")),
        (r#""''""#, Some("''")),
        ("$.", Some("$.")),
        ("he$1x", Some("hex")),
        ("he$.x", Some("he$.x")),
        ("he$pwd.", Some("he.")),
        ("he$PWD", Some("he/home")),
        (r"he\$PWD", Some("he$PWD")),
        (r"he\\$PWD", Some(r"he\/home")),
        (r#""he\$PWD""#, Some("he$PWD")),
        (r#""he\\$PWD""#, Some(r"he\/home")),
        (r"\${}aaa", Some("${}aaa")),
        ("${}", None),
        ("he${}xx", None),
        ("he${hi}xx", Some("hexx")),
        ("he${PWD}", Some("he/home")),
        ("he${.}", None),
        ("he${XXX:-000}xx", Some("he000xx")),
        ("he${PWD:-000}xx", Some("he/homexx")),
        ("he${XXX:-$PWD}xx", Some("he/homexx")),
        ("he${XXX:-${PWD:-yyy}}xx", Some("he/homexx")),
        ("he${XXX:-${YYY:-yyy}}xx", Some("heyyyxx")),
        ("he${XXX:YYY}", None),
        ("he${XXX?}", None),
        ("he${XXX:?}", None),
        ("he${PWD?}", Some("he/home")),
        ("he${PWD:?}", Some("he/home")),
        ("he${NULL?}", Some("he")),
        ("he${NULL:?}", None),
        ("he${XXX:+${PWD}}xx", Some("hexx")),
        ("he${PWD:+${SHELL}}xx", Some("hebashxx")),
        ("he${PWD:+000}xx", Some("he000xx")),
        ("${NULL-a}|${NULL:-a}|${NULL+a}|${NULL:+a}|${XXX-a}|${XXX+a}", Some("|a|a||a|")),
        ("'he${XX}'", Some("he${XX}")),
        (r#""he${PWD}""#, Some("he/home")),
        (r#""he'$PWD'""#, Some("he'/home'")),
        ("'$PWD'", Some("$PWD")),
        (r"'\$PWD'", Some(r"\$PWD")),
        ("he${PWD", None),
        ("he${PWD:=000}xx", None),
        ("he${PWD:+${PWD}:}xx", Some("he/home:xx")),
        (r"he${XXX:-\$PWD:}xx", Some("he$PWD:xx")),
        (r"he${XXX:-\${PWD}z}xx", Some("he${PWDz}xx")),
        ("안'녕'하세요", Some("안녕하세요")),
        ("안녕$KOREAN", Some("안녕한국어")),
        ("${{aaa}", None),
        ("${aaa}}", Some("}")),
        ("${aaa:-bbb}}", Some("bbb}")),
        ("${aaa:-bbb ${foo}", None),
        ("${aaa:-bbb {foo}", Some("bbb {foo")),
        ("${:-bbb}", None),
        ("$1", Some("")),
        ("${1:-bbb}", Some("bbb")),
        ("$999aaa", Some("aaa")),
        ("${001:+bbb}aaa", Some("aaa")),
        ("$@@@", Some("@@")),
        ("${@:-bbb}aaa", Some("bbbaaa")),
        ("$$", Some("")),
        ("${!:-bbb}", Some("bbb")),
        ("${#}", Some("")),
        ("a<<b", Some("a<<b")),
    ];
    for (word, expected) in table {
        assert_eq!(expand(word).as_deref(), *expected, "{word}");
    }
}

#[test]
fn patterns_cut_and_replace_as_in_buildkit() {
    // Value of FOO, word, result. NEEDLE and REPLACEMENT as below.
    let table: &[(&str, &str, Option<&str>)] = &[
        (r"()[]{}^$.*?|\x", r"${FOO#()[]{\}^$.\*\?|\\}", Some("x")),
        ("xx**", r"${FOO%%\**}", Some("xx")),
        ("xxyy", "${FOO#*x*y}", Some("y")),
        ("xxyy", "${FOO#*}", Some("xxyy")),
        ("xxyy", "${FOO##*}", Some("")),
        ("xxyy", "${FOO#$X}", Some("xyy")),
        ("xxyy", "${FOO#}", Some("xxyy")),
        ("xxyy", "${FOO##*x}", Some("yy")),
        ("xxyy", "${FOO##}", Some("xxyy")),
        ("???y", r"${FOO#?\?}", Some("?y")),
        ("xxyy", "${ABC:-.}${FOO%x}${ABC:-.}", Some(".xxyy.")),
        ("a***yy*", r"${FOO%%\**\*}", Some("a")),
        ("xxyy", "${FOO%}", Some("xxyy")),
        ("v1.2.3", "${FOO#v}", Some("1.2.3")),
        ("v1.2.3", "${FOO%.*}", Some("v1.2")),
        ("v1.2.3", "${FOO%%.*}", Some("v1")),
        ("v1.2.3", "${FOO%?}", Some("v1.2.")),
        ("", "${FOO:#}", None),
        ("", "${FOO:%%}", None),
        ("x", r"${FOO#\a}", None),
        ("/foo*/*/*.txt", r"${FOO/\*\//.} - ${FOO//\*\//.}", Some("/foo.*/*.txt - /foo..*.txt")),
        ("/tmp/tmp/bar.txt", "${FOO/$TMP/} - ${FOO//$TMP/}", Some("/tmp/bar.txt - /bar.txt")),
        ("/a/foo/b/c.txt", "${FOO/$ANY/$SLASH} - ${FOO//$ANY/$SLASH}", Some("/foo/b/c.txt - /foo/c.txt")),
        ("http://google.de", "${FOO/$HTTP/$HTTPS}", Some("https://google.de")),
        ("/tmp/foo.txt", r"${FOO//\//\/}", Some(r"\/tmp\/foo.txt")),
        ("xxyy", "${FOO/$NONE/ww}", Some("wwxxyy")),
        ("xxyy", "${FOO//ww}", None),
        ("xxyy", "${FOO//}", None),
        ("xxyy", "${FOO///}", Some("xxyy")),
        ("abcabc", "${FOO//b*/_}", Some("a_")),
        ("", "${FOO=a}", None),
    ];
    for (value, word, expected) in table {
        let variables: BTreeMap<String, String> = [
            ("FOO", *value),
            ("X", "x"),
            ("TMP", "/tmp"),
            ("ANY", "/?/"),
            ("SLASH", "/"),
            ("HTTP", "http://"),
            ("HTTPS", "https://"),
            ("NONE", ""),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let result = Lexer::new('\\').expand(word, &variables).ok().map(|expansion| expansion.text);
        assert_eq!(result.as_deref(), *expected, "{word} with {value}");
    }
}

#[test]
fn words_split_as_in_buildkit() {
    let mut variables: BTreeMap<String, String> =
        [("hi", "hi"), ("space", "abc  def"), ("leading", "  ab c"), ("trailing", "ab c   ")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
    let table: &[(&str, Option<&[&str]>)] = &[
        ("hello", Some(&["hello"])),
        ("hello${hi}bye", Some(&["hellohibye"])),
        ("hello${space}bye", Some(&["helloabc", "defbye"])),
        (r#"hello"${space}"bye"#, Some(&["helloabc  defbye"])),
        (r#"hello "${space}"bye"#, Some(&["hello", "abc  defbye"])),
        ("hello${leading}def", Some(&["hello", "ab", "cdef"])),
        (r#"hello"${leading}" def"#, Some(&["hello  ab c", "def"])),
        ("hello${leading}", Some(&["hello", "ab", "c"])),
        ("hello${trailing}d", Some(&["helloab", "c", "d"])),
        (r#"hel"lo${trailing}""#, Some(&["helloab c   "])),
        (r#"hello" there  ""#, Some(&["hello there  "])),
        ("hello there", Some(&["hello", "there"])),
        (r"hello\ there", Some(&["hello there"])),
        (r#"hello" there"#, None),
        (r#"hello\" there"#, Some(&["hello\"", "there"])),
        (r#"hello"\\there""#, Some(&[r"hello\there"])),
        (r#"hello"\there""#, Some(&[r"hello\there"])),
        (r"hello'\\there'", Some(&[r"hello\\there"])),
        ("hello'$there'", Some(&["hello$there"])),
        ("", Some(&[])),
        ("   ", Some(&[])),
    ];
    for (text, expected) in table {
        let words = Lexer::new('\\').split(text, &variables).ok();
        assert_eq!(words, expected.map(|words| words.iter().map(|w| (*w).to_owned()).collect()), "{text}");
    }
    // Where BuildKit would forget "80".
    variables.clear();
    assert_eq!(Lexer::new('\\').split("80${X:-80}/tcp 1", &variables).unwrap(), ["8080/tcp", "1"]);
}

#[test]
fn the_escape_character_is_the_files() {
    let lexer = Lexer::new('`');
    let expand = |word: &str| lexer.expand(word, &variables()).unwrap().text;
    assert_eq!(expand(r"C:\dir\$PWD"), r"C:\dir\/home");
    assert_eq!(expand("`$PWD"), "$PWD");
    assert_eq!(expand(r#""`$PWD \n""#), r"$PWD \n");
}

#[test]
fn used_and_unset_variables_are_told() {
    let expansion = Lexer::new('\\').expand("$PWD ${A:-$SHELL} ${NULL+$B} '$C'", &variables()).unwrap();
    assert_eq!(expansion.text, "/home bash  $C");
    assert_eq!(expansion.used.into_iter().collect::<Vec<_>>(), ["NULL", "PWD", "SHELL"]);
    assert_eq!(expansion.unset.into_iter().collect::<Vec<_>>(), ["A", "B"]);
}

#[test]
fn errors_say_what_is_missing() {
    let error = |word: &str| Lexer::new('\\').expand(word, &variables()).unwrap_err().why;
    assert_eq!(error("${VERSION:?set it with --build-arg}"), "VERSION: set it with --build-arg");
    assert_eq!(error("${VERSION?}"), "VERSION is not allowed to be unset");
    assert_eq!(error("${NULL:?}"), "NULL is not allowed to be empty");
    assert_eq!(error("${PWD=x}"), "unsupported modifier \"=\" after ${PWD");
    assert!(error("\"a").contains("double quote"));
    assert!(error("${A").contains("brace"));
}

#[test]
fn heredoc_text_keeps_its_quotes() {
    let lexer = Lexer::for_heredoc();
    assert_eq!(
        lexer.expand("a=\"$PWD\" 'it' \\$PWD it's\n", &variables()).unwrap().text,
        "a=\"/home\" 'it' $PWD it's\n"
    );
}

#[test]
fn f06_nesting_is_limited() {
    let word = format!("{}x{}", "${A:-".repeat(10_000), "}".repeat(10_000));
    assert!(Lexer::new('\\').expand(&word, &variables()).is_err());
    let word = format!("{}x{}", "${A:-".repeat(60), "}".repeat(60));
    assert_eq!(expand(&word).unwrap(), "x");
}
