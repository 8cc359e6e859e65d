//! What single values of instructions mean: paths, ports, signals, checks.

use std::net::IpAddr;

use serde_json::json;

use crate::dockerfile::{CommandLine, Healthcheck, Rule};

/// `path` from the working directory, without `.` and `..`; always absolute.
pub(super) fn absolute(working_dir: &str, path: &str) -> String {
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

/// Whether a path begins with a drive, as on Windows: inside a Linux image it would become a name with a colon.
pub(super) fn has_drive(path: &str) -> bool {
    matches!(path.as_bytes(), [drive, b':', b'\\' | b'/', ..] if drive.is_ascii_alphabetic())
}

/// What an `EXPOSE` word means.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Exposed {
    /// As the config lists them: `53/udp`, one by one.
    pub(super) ports: Vec<String>,
    /// What is worth a warning.
    pub(super) warnings: Vec<(Rule, String)>,
}

/// `8080`, `53/udp`, `7000-7002/tcp`; an address and a port of the host, as `docker run -p` has them, are checked and
/// mean nothing.
pub(super) fn exposed(text: &str) -> Result<Exposed, String> {
    let wrong = || format!("{text:?} is not a port, expected PORT[-PORT][/tcp|/udp|/sctp]");
    let mut exposed = Exposed::default();
    let (host, container) = match text.rsplit_once(':') {
        Some((host, container)) => (Some(host), container),
        None => (None, text),
    };
    let (range, given) = container.split_once('/').unwrap_or((container, ""));
    let protocol = if given.is_empty() { "tcp".to_owned() } else { given.to_ascii_lowercase() };
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return Err(wrong());
    }
    if given != given.to_ascii_lowercase() {
        exposed.warnings.push((Rule::ExposeProtoCasing, format!("the protocol of {text} is not lower case")));
    }
    let port = |text: &str| if text.starts_with('+') { None } else { text.parse::<u16>().ok() };
    let ports = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(port(first)?..=port(last)?).filter(|ports| !ports.is_empty())
    };
    let range = ports(range).ok_or_else(wrong)?;
    if let Some(host) = host {
        let (address, host_port) = host.rsplit_once(':').unwrap_or(("", host));
        let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(address);
        if !bare.is_empty() && bare.parse::<IpAddr>().is_err() {
            return Err(format!("{address:?} in {text:?} is not an address"));
        }
        if !host_port.is_empty() {
            let on_host = ports(host_port).ok_or_else(wrong)?;
            if range.len() > 1 && on_host.len() != range.len() {
                return Err(format!("the two ranges of {text:?} are not of the same length"));
            }
        }
        let message = format!("{text} names an address or a port of the host: EXPOSE is about the image's ports only");
        exposed.warnings.push((Rule::ExposeInvalidFormat, message));
    }
    exposed.ports = range.map(|port| format!("{port}/{protocol}")).collect();
    Ok(exposed)
}

/// Signals of Linux (signal(7)), without `SIG`, and the two old names that others know.
const SIGNALS: [&str; 33] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "IOT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
    "TERM", "STKFLT", "CHLD", "CLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
    "WINCH", "IO", "POLL", "PWR",
];

/// Whether `text` is a signal: a number, or a name with or without `SIG`.
pub(super) fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<i32>() {
        return number != 0;
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    // Numbers of real-time signals go from one end or the other, 30 in all.
    let realtime = |prefix: &str, sign: char| {
        let Some(rest) = name.strip_prefix(prefix) else { return false };
        let steps = rest.strip_prefix(sign).and_then(|steps| steps.parse::<u8>().ok());
        rest.is_empty() || steps.is_some_and(|steps| (1..=15).contains(&steps))
    };
    name == "SYS" || SIGNALS.contains(&name) || realtime("RTMIN", '+') || realtime("RTMAX", '-')
}

/// A `HEALTHCHECK` as the config has it. The shell form is always `CMD-SHELL`: whoever runs the check takes the image's
/// own shell for that.
pub(super) fn healthcheck(check: &Healthcheck) -> serde_json::Value {
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
    let test: Vec<&str> = match command {
        CommandLine::Exec(words) => std::iter::once("CMD").chain(words.iter().map(String::as_str)).collect(),
        CommandLine::Shell(text) => vec!["CMD-SHELL", text],
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

/// A list of words as Go's `%q` prints it, in which BuildKit's history has commands: `["/bin/sh" "-c" "make"]`.
pub(super) fn quoted(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
    format!("[{}]", words.join(" "))
}

/// As Go's `strconv.Quote`.
fn quote(word: &str) -> String {
    let mut text = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            '\x07' => text.push_str("\\a"),
            '\x08' => text.push_str("\\b"),
            '\x0c' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\x0b' => text.push_str("\\v"),
            c if c.is_ascii_control() => text.push_str(&format!("\\x{:02x}", u32::from(c))),
            // No space but the plain one is printed.
            c if c.is_control() || (c.is_whitespace() && c != ' ') => {
                text.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => text.push(c),
        }
    }
    text + "\""
}

/// A list of words as Go's `%v` prints it: `[/data /more]`.
pub(super) fn plain<T: AsRef<str>>(words: &[T]) -> String {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    format!("[{}]", words.join(" "))
}

/// A health check as Go prints the fields of docker's (`%+v`).
pub(super) fn healthcheck_text(check: &serde_json::Value) -> String {
    let test = check["Test"].as_array().into_iter().flatten().filter_map(|word| word.as_str());
    let number = |key: &str| check[key].as_u64().unwrap_or(0);
    let time = |key: &str| duration(number(key));
    format!(
        "HEALTHCHECK {{Test:{} Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
        plain(&test.collect::<Vec<_>>()),
        time("Interval"),
        time("Timeout"),
        time("StartPeriod"),
        time("StartInterval"),
        number("Retries"),
    )
}

/// A time as Go's `Duration` prints itself: `1h0m0.5s`, `100ms`, `0s`.
fn duration(nanos: u64) -> String {
    let fraction = |value: u64, digits: usize| {
        let text = format!("{value:0digits$}");
        let text = text.trim_end_matches('0');
        if text.is_empty() { String::new() } else { format!(".{text}") }
    };
    match nanos {
        0 => "0s".into(),
        1..1_000 => format!("{nanos}ns"),
        1_000..1_000_000 => format!("{}{}µs", nanos / 1_000, fraction(nanos % 1_000, 3)),
        1_000_000..1_000_000_000 => format!("{}{}ms", nanos / 1_000_000, fraction(nanos % 1_000_000, 6)),
        _ => {
            let seconds = nanos / 1_000_000_000;
            let rest = format!("{}{}s", seconds % 60, fraction(nanos % 1_000_000_000, 9));
            match (seconds / 3600, seconds / 60 % 60) {
                (0, 0) => rest,
                (0, minutes) => format!("{minutes}m{rest}"),
                (hours, minutes) => format!("{hours}h{minutes}m{rest}"),
            }
        }
    }
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
        assert!(has_drive("C:\\app") && has_drive("d:/x"));
        assert!(!has_drive("/c:/x") && !has_drive("c:x") && !has_drive("http://x"));
    }

    #[test]
    fn ports_are_listed_one_by_one() {
        let ports = |text: &str| exposed(text).unwrap().ports;
        assert_eq!(ports("80"), ["80/tcp"]);
        assert_eq!(ports("80/"), ["80/tcp"]);
        assert_eq!(ports("7000-7002/UDP"), ["7000/udp", "7001/udp", "7002/udp"]);
        assert_eq!(ports("127.0.0.1:8080:80"), ["80/tcp"]);
        assert_eq!(ports("[::1]:8080:80/sctp"), ["80/sctp"]);
        assert_eq!(ports("8000-8010:80"), ["80/tcp"]);
        for bad in
            ["", "x", "80/http", "65536", "9-8", "1-2-3", "+1", "1:2:3", "localhost:1:2", "1-3:4-5", "x:80", "80:"]
        {
            assert!(exposed(bad).is_err(), "{bad:?}");
        }
        let rules = |text: &str| exposed(text).unwrap().warnings.into_iter().map(|(rule, _)| rule).collect::<Vec<_>>();
        assert_eq!(rules("80/TCP"), [Rule::ExposeProtoCasing]);
        assert_eq!(rules("81:80/Udp"), [Rule::ExposeProtoCasing, Rule::ExposeInvalidFormat]);
        assert_eq!(rules("80/tcp"), []);
    }

    #[test]
    fn signals_by_number_and_name() {
        for good in ["9", "SIGTERM", "term", "SIGRTMIN+3", "RTMAX-14", "RTMIN", "SIGSYS", "1000"] {
            assert!(is_signal(good), "{good}");
        }
        for bad in ["0", "", "SIG", "SIGNOPE", "RTMIN+16", "RTMIN-1", "SIGRTMAX-", "TERM "] {
            assert!(!is_signal(bad), "{bad}");
        }
    }

    #[test]
    fn checks_name_no_shell() {
        let check = |command| Healthcheck::Command {
            command,
            interval_nanos: 5,
            timeout_nanos: 0,
            start_period_nanos: 0,
            start_interval_nanos: 7,
            retries: 2,
        };
        let shell = healthcheck(&check(CommandLine::Shell("a b".into())));
        assert_eq!(shell, json!({"Test": ["CMD-SHELL", "a b"], "Interval": 5, "StartInterval": 7, "Retries": 2}));
        let exec = healthcheck(&check(CommandLine::Exec(vec!["a".into(), "b".into()])));
        assert_eq!(exec["Test"], json!(["CMD", "a", "b"]));
        assert_eq!(healthcheck(&Healthcheck::None), json!({"Test": ["NONE"]}));
    }

    #[test]
    fn words_are_quoted_as_go_does() {
        let words = ["a \"b\" \\", "\n\t\x07\x1b\x7f", "é€\u{a0}\u{85}", ""].map(String::from);
        assert_eq!(quoted(&words), r#"["a \"b\" \\" "\n\t\a\x1b\x7f" "é€\u00a0\u0085" ""]"#);
        assert_eq!(plain(&["/a", "/b c"]), "[/a /b c]");
    }

    #[test]
    fn durations_are_told_as_go_does() {
        for (nanos, text) in [
            (0, "0s"),
            (7, "7ns"),
            (1_500, "1.5µs"),
            (100_000_000, "100ms"),
            (1_000_000_000, "1s"),
            (2_500_000_000, "2.5s"),
            (300_000_000_000, "5m0s"),
            (3_600_500_000_000, "1h0m0.5s"),
        ] {
            assert_eq!(duration(nanos), text);
        }
    }
}
