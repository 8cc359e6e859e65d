//! A Dockerfile as logical lines.

use super::Heredoc;
use super::check::CheckOptions;
use super::error::{DockerfileError, Location};
use super::words::{Lexer, NoVariables};

/// The largest Dockerfile that is read, in bytes. The largest real ones are generated and stay below 1 MiB.
pub(in crate::dockerfile) const FILE_BYTES_MAX: usize = 16 << 20;

/// One instruction with everything that belongs to it.
#[derive(Debug)]
pub(super) struct LogicalLine {
    pub(super) location: Location,
    /// Continuations joined, comments inside them left out.
    pub(super) text: String,
    pub(super) heredocs: Vec<Heredoc>,
    /// What the comments above it say, without `#`.
    pub(super) comments: Vec<String>,
    /// The first empty line among its continuations, from 1.
    pub(super) empty_line: Option<u32>,
}

/// The file cut up.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) logical: Vec<LogicalLine>,
    /// The physical lines, for messages.
    pub(super) physical: Vec<String>,
    pub(super) escape: char,
    pub(super) syntax: Option<String>,
    pub(super) check: CheckOptions,
}

/// Cuts `bytes` into logical lines. `holds_heredocs` says whether `<<` means something in an instruction.
pub(super) fn split(
    file: &str,
    bytes: &[u8],
    holds_heredocs: impl Fn(&str, char) -> bool,
) -> Result<Lines, DockerfileError> {
    let whole = |message: String| DockerfileError::new(file, 0, "", "", message);
    if bytes.len() > FILE_BYTES_MAX {
        return Err(whole(format!("{} bytes are more than a Dockerfile may have ({FILE_BYTES_MAX})", bytes.len())));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut physical = Vec::new();
    for raw in bytes.split_inclusive(|byte| *byte == b'\n') {
        let text = String::from_utf8_lossy(raw).into_owned();
        // Comments may be in any encoding; what has a meaning may not.
        if std::str::from_utf8(raw).is_err() && !is_comment(&text) {
            let message = "the line is not UTF-8".to_owned();
            return Err(DockerfileError::new(file, number(physical.len()), &text, "", message));
        }
        if text.contains('\0') {
            let message = "the line holds a NUL byte".to_owned();
            return Err(DockerfileError::new(file, number(physical.len()), &text, "", message));
        }
        physical.push(text);
    }

    let directives = Directives::read(file, &physical)?;
    let escape = directives.escape;
    let mut logical = Vec::new();
    let mut comments = Vec::new();
    let mut at = 0;
    while at < physical.len() {
        let first = at;
        let line = trim_newline(&physical[at]).trim_start();
        at += 1;
        if let Some(comment) = line.strip_prefix('#') {
            // An empty comment ends what was said before; directives say nothing about an instruction.
            match comment.trim() {
                "" => comments.clear(),
                _ if at <= directives.count => {}
                comment => comments.push(comment.to_owned()),
            }
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let (start, mut continues) = continuation(line, escape);
        let mut text = start.to_owned();
        let mut empty_line = None;
        while continues && at < physical.len() {
            let line = trim_newline(&physical[at]);
            at += 1;
            if is_comment(line) {
                continue;
            }
            if line.trim().is_empty() {
                empty_line = empty_line.or(Some(number(at - 1)));
                continue;
            }
            let (part, more) = continuation(line, escape);
            text.push_str(part);
            continues = more;
        }
        if text.trim().is_empty() {
            continue;
        }

        let mut heredocs = Vec::new();
        if text.contains("<<") && holds_heredocs(&text, escape) {
            for mut doc in heredocs_of(&text) {
                let start = at;
                loop {
                    let Some(line) = physical.get(at) else {
                        let message =
                            format!("the here-document {:?} has no end: a line with only {0} is expected", doc.name);
                        return Err(DockerfileError::new(file, number(first), &physical[first], "<<", message));
                    };
                    at += 1;
                    let line = trim_newline(line);
                    let line = if doc.strip_tabs { line.trim_start_matches('\t') } else { line };
                    if line == doc.name {
                        break;
                    }
                }
                doc.content = physical[start..at - 1].concat();
                heredocs.push(doc);
            }
        }
        let location = Location { first_line: number(first), last_line: number(at - 1) };
        logical.push(LogicalLine { location, text, heredocs, comments: std::mem::take(&mut comments), empty_line });
    }
    if logical.is_empty() {
        return Err(whole("the file has no instructions: at least FROM is expected".to_owned()));
    }
    Ok(Lines { logical, physical, escape, syntax: directives.syntax, check: directives.check })
}

/// The number of the line at `index`.
fn number(index: usize) -> u32 {
    u32::try_from(index + 1).expect("the file's length is limited")
}

fn trim_newline(line: &str) -> &str {
    line.trim_end_matches(['\r', '\n'])
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with('#')
}

/// The line without the escape character that continues it on the next line, and whether there is one. Two of them are
/// an escaped one, and continue nothing.
fn continuation(line: &str, escape: char) -> (&str, bool) {
    let trimmed = line.trim_end_matches([' ', '\t']);
    match trimmed.strip_suffix(escape) {
        Some(rest) if !rest.ends_with(escape) => (rest, true),
        _ => (line, false),
    }
}

struct Directives {
    escape: char,
    syntax: Option<String>,
    check: CheckOptions,
    /// How many lines they are.
    count: usize,
}

impl Directives {
    /// `# name=value` comments at the very top; the first line that is anything else ends them.
    fn read(file: &str, physical: &[String]) -> Result<Self, DockerfileError> {
        let mut found = Self { escape: '\\', syntax: None, check: CheckOptions::default(), count: 0 };
        let mut seen: Vec<String> = Vec::new();
        for (index, line) in physical.iter().enumerate() {
            let Some((name, value)) =
                trim_newline(line).trim_start().strip_prefix('#').and_then(|comment| comment.split_once('='))
            else {
                break;
            };
            let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
            if !matches!(name.as_str(), "syntax" | "escape" | "check") || value.is_empty() {
                break;
            }
            let error = |message| DockerfileError::new(file, number(index), line, value, message);
            if seen.contains(&name) {
                return Err(error(format!("only one {name} directive can be used")));
            }
            match name.as_str() {
                "escape" => {
                    found.escape = match value {
                        "\\" => '\\',
                        "`" => '`',
                        _ => return Err(error(format!("invalid escape character {value:?}: expected ` or \\"))),
                    }
                }
                "syntax" => found.syntax = Some(value.to_owned()),
                _ => found.check = CheckOptions::parse(value).map_err(error)?,
            }
            found.count = index + 1;
            seen.push(name);
        }
        Ok(found)
    }
}

/// The here-documents that a logical line begins, still empty.
fn heredocs_of(text: &str) -> Vec<Heredoc> {
    // A quote that isn't closed is the shell's to complain about.
    let words = Lexer::raw(true, true).split(text, &NoVariables).unwrap_or_default();
    words.iter().filter_map(|word| heredoc(word)).collect()
}

/// A word as the beginning of a here-document: `<<EOF`, `<<-'EOF'`, `3<<EOF`.
pub(super) fn heredoc(word: &str) -> Option<Heredoc> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (strip_tabs, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rest = rest.trim_start();
    if rest.is_empty() || rest.contains('<') {
        return None;
    }
    // With and without quotes: when that differs, some of the word is quoted, and the text is not to be expanded.
    let [name] = <[String; 1]>::try_from(Lexer::raw(false, false).split(rest, &NoVariables).ok()?).ok()?;
    let quotes = |text: &str| text.matches(['\'', '"']).count();
    let raw = Lexer::raw(false, true).split(rest, &NoVariables).ok()?;
    let expand = raw.first().is_some_and(|raw| quotes(raw) == quotes(&name));
    Some(Heredoc { name, content: String::new(), expand, strip_tabs })
}
