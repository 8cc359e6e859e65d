//! What is wrong with a Dockerfile, and where.

use std::fmt;

use plies_oci::ErrorKind;

/// A place in a Dockerfile: lines count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Location {
    /// The line on which the instruction begins.
    pub first_line: u32,
    /// The last line that belongs to it: continuation lines and here-documents included.
    pub last_line: u32,
}

/// One mistake in a Dockerfile, with the line it stands on.
///
/// ```text
/// Dockerfile:7: unknown instruction "RUNN" (did you mean RUN?)
///   RUNN make
///   ^^^^
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerfileError(Box<Inner>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inner {
    file: String,
    line: u32,
    message: String,
    source_line: String,
    /// In characters of `source_line`.
    caret: std::ops::Range<usize>,
    kind: ErrorKind,
}

/// How much of a source line is shown, in characters: one line of a wide terminal.
const SHOWN_CHARS: usize = 160;

impl DockerfileError {
    /// `focus` is the part of the line to point at; all of it when it is not found there.
    pub(super) fn new(file: &str, line: u32, source_line: &str, focus: &str, message: String) -> Self {
        // Tabs become spaces so that the caret stays below its word; other control characters never reach a terminal.
        let clean: String = source_line
            .trim()
            .chars()
            .take(SHOWN_CHARS)
            .map(|c| {
                if c == '\t' {
                    ' '
                } else if c.is_control() {
                    '\u{fffd}'
                } else {
                    c
                }
            })
            .collect();
        let caret = match (!focus.is_empty()).then(|| clean.find(focus)).flatten() {
            Some(at) => {
                let start = clean[..at].chars().count();
                start..start + focus.chars().count()
            }
            None => 0..clean.chars().count(),
        };
        Self(Box::new(Inner {
            file: file.to_owned(),
            line,
            message,
            source_line: clean,
            caret,
            kind: ErrorKind::InvalidInput,
        }))
    }

    /// The name of the file.
    pub fn file(&self) -> &str {
        &self.0.file
    }

    /// The line it is on, from 1; 0 when it is about the whole file.
    pub fn line(&self) -> u32 {
        self.0.line
    }

    /// What is wrong and what is expected, without the place.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What a caller can do about it: `InvalidInput`, edit the file.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for DockerfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_with(f, "")
    }
}

impl DockerfileError {
    /// With something in front of the message.
    pub(super) fn fmt_with(&self, f: &mut fmt::Formatter<'_>, title: &str) -> fmt::Result {
        let Inner { file, line, message, source_line, caret, .. } = &*self.0;
        if *line == 0 {
            return write!(f, "{file}: {title}{message}");
        }
        write!(f, "{file}:{line}: {title}{message}")?;
        if !source_line.is_empty() {
            let (before, width) = (caret.start, caret.len().max(1));
            write!(f, "\n  {source_line}\n  {:before$}{:^<width$}", "", "")?;
        }
        Ok(())
    }
}

impl std::error::Error for DockerfileError {}

/// The one of `known` that `word` was probably meant to be.
pub(crate) fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    known
        .into_iter()
        .map(|known| (distance(&word, &known.to_ascii_lowercase()), known))
        .filter(|(distance, known)| *distance <= 2 && *distance < known.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(64).enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let substitute = corner + usize::from(from != *to);
            corner = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_are_near_words_only() {
        let known = ["RUN", "ENV", "ENTRYPOINT", "COPY"];
        assert_eq!(suggest("RUNN", known), Some("RUN"));
        assert_eq!(suggest("cpoy", known), Some("COPY"));
        assert_eq!(suggest("ENTRYPONT", known), Some("ENTRYPOINT"));
        assert_eq!(suggest("frobnicate", known), None);
        assert_eq!(suggest("x", known), None);
    }

    #[test]
    fn caret_stands_below_the_word() {
        let error = DockerfileError::new("D", 3, "\tRUN --mont=x make", "--mont", "unknown flag".to_owned());
        assert_eq!(error.to_string(), "D:3: unknown flag\n  RUN --mont=x make\n      ^^^^^^");
    }

    #[test]
    fn control_characters_never_reach_a_terminal() {
        let error = DockerfileError::new("D", 1, "\x1b[31mRUN", "", "x".to_owned());
        assert!(!error.to_string().contains('\x1b'));
    }
}
