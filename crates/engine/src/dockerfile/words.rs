//! Variables, quotes and escapes in the values of instructions.
//!
//! A small shell's word: `$V` and `${V}`; `${V:-w}` `${V-w}` `${V:+w}` `${V+w}` `${V:?e}` `${V?e}`; `${V#p}` `${V##p}`
//! `${V%p}` `${V%%p}`; `${V/p/r}` `${V//p/r}`; single quotes keep everything, double quotes all but `$` and escapes; the
//! escape character is the Dockerfile's. It follows `BuildKit`'s lexer case by case (its test tables are below), except
//! where that drops text: a nested `${…}` there forgets the word it stands in when splitting.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasher;

/// Where the values of variables come from.
pub trait Variables {
    /// The value of `name`; `None` when it isn't set.
    fn lookup(&self, name: &str) -> Option<&str>;
}

impl Variables for BTreeMap<String, String> {
    fn lookup(&self, name: &str) -> Option<&str> {
        self.get(name).map(String::as_str)
    }
}

impl<S: BuildHasher> Variables for HashMap<String, String, S> {
    fn lookup(&self, name: &str) -> Option<&str> {
        self.get(name).map(String::as_str)
    }
}

/// No variable is set.
#[derive(Debug, Clone, Copy)]
pub struct NoVariables;

impl Variables for NoVariables {
    fn lookup(&self, _: &str) -> Option<&str> {
        None
    }
}

/// What became of a word.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expansion {
    /// The word with everything replaced and quotes gone.
    pub text: String,
    /// The variables it asked for that are set.
    pub used: BTreeSet<String>,
    /// The variables it asked for that are not.
    pub unset: BTreeSet<String>,
}

/// Why a word can't be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("can't expand {word:?}: {why}")]
pub struct WordError {
    /// The whole word.
    pub word: String,
    /// What is wrong with it.
    pub why: String,
}

/// How deep `${a:-${b:-…}}` may nest, counted in braces: a limit on our own stack, far beyond anything written by hand.
const NESTING_MAX: usize = 64;

/// Expands words.
#[derive(Debug, Clone)]
pub struct Lexer {
    escape: char,
    /// Quotes stay in the result.
    keep_quotes: bool,
    /// Escape characters stay in the result.
    keep_escapes: bool,
    /// Quotes are characters like others.
    ignore_quotes: bool,
    /// References to variables that are not set stay in the result.
    keep_unset: bool,
}

impl Lexer {
    /// A lexer for a Dockerfile's values; `escape` is [`super::Dockerfile::escape`].
    pub fn new(escape: char) -> Self {
        Self { escape, keep_quotes: false, keep_escapes: false, ignore_quotes: false, keep_unset: false }
    }

    /// A lexer for the text of a `COPY` here-document: quotes mean nothing there, and `\` always escapes.
    pub fn for_heredoc() -> Self {
        Self { ignore_quotes: true, ..Self::new('\\') }
    }

    /// For finding the words that begin here-documents: quotes and unset variables stay, escapes too if asked.
    pub(super) fn raw(keep_escapes: bool, keep_quotes: bool) -> Self {
        Self { keep_escapes, keep_quotes, keep_unset: true, ..Self::new('\\') }
    }

    /// Expands `word` as one word: blanks stay.
    ///
    /// # Errors
    /// A quote or brace without its end, an unknown `${…}` form, or `${V?e}` with `V` unset.
    pub fn expand(&self, word: &str, variables: &dyn Variables) -> Result<Expansion, WordError> {
        Ok(self.process(word, variables)?.0)
    }

    /// Expands `text` and splits the result at blanks that are neither quoted nor escaped, also those that come out of
    /// unquoted variables.
    ///
    /// # Errors
    /// As [`Lexer::expand`].
    pub fn split(&self, text: &str, variables: &dyn Variables) -> Result<Vec<String>, WordError> {
        Ok(self.process(text, variables)?.1)
    }

    fn process(&self, word: &str, variables: &dyn Variables) -> Result<(Expansion, Vec<String>), WordError> {
        let mut run = Run {
            options: self,
            keep_escapes: self.keep_escapes,
            chars: word.chars().collect(),
            at: 0,
            depth: 0,
            variables,
            out: Expansion::default(),
        };
        let (text, words) =
            run.until(None, self.keep_escapes).map_err(|why| WordError { word: word.to_owned(), why })?;
        Ok((Expansion { text, ..run.out }, words))
    }
}

/// One pass over one text.
struct Run<'a> {
    options: &'a Lexer,
    keep_escapes: bool,
    chars: Vec<char>,
    at: usize,
    depth: usize,
    variables: &'a dyn Variables,
    out: Expansion,
}

/// The words of a text as they grow.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: String,
}

impl Words {
    fn plain(&mut self, c: char) {
        if c.is_whitespace() { self.end() } else { self.current.push(c) }
    }

    fn end(&mut self) {
        if !self.current.is_empty() {
            self.done.push(std::mem::take(&mut self.current));
        }
    }
}

impl Run<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    /// Everything up to `stop`, or up to the end.
    fn until(&mut self, stop: Option<char>, keep_escapes: bool) -> Result<(String, Vec<String>), String> {
        let outer = std::mem::replace(&mut self.keep_escapes, keep_escapes);
        let result = self.until_inner(stop);
        self.keep_escapes = outer;
        result
    }

    fn until_inner(&mut self, stop: Option<char>) -> Result<(String, Vec<String>), String> {
        let mut text = String::new();
        let mut words = Words::default();
        while let Some(c) = self.peek() {
            if Some(c) == stop {
                self.at += 1;
                words.end();
                return Ok((text, words.done));
            }
            match c {
                '$' => {
                    let value = self.dollar()?;
                    value.chars().for_each(|c| words.plain(c));
                    text.push_str(&value);
                }
                '\'' | '"' if !self.options.ignore_quotes => {
                    let quoted = if c == '"' { self.double_quoted()? } else { self.single_quoted()? };
                    words.current.push_str(&quoted);
                    text.push_str(&quoted);
                }
                // The blanks in `<< EOF` don't end a word.
                '<' => {
                    let start = self.at;
                    self.at += 1;
                    if self.peek() == Some('<') {
                        self.at += 1;
                        while matches!(self.peek(), Some(' ' | '\t' | '\r')) {
                            self.at += 1;
                        }
                    }
                    let taken: String = self.chars[start..self.at].iter().collect();
                    words.current.push_str(&taken);
                    text.push_str(&taken);
                }
                _ if c == self.options.escape => {
                    self.at += 1;
                    if self.keep_escapes {
                        words.current.push(c);
                        text.push(c);
                    }
                    // An escape character at the very end is dropped.
                    let Some(escaped) = self.next() else { break };
                    words.current.push(escaped);
                    text.push(escaped);
                }
                _ => {
                    self.at += 1;
                    words.plain(c);
                    text.push(c);
                }
            }
        }
        if let Some(stop) = stop {
            return Err(format!("the end came before {stop:?}"));
        }
        words.end();
        Ok((text, words.done))
    }

    fn single_quoted(&mut self) -> Result<String, String> {
        let start = self.at;
        self.at += 1;
        while let Some(c) = self.next() {
            if c == '\'' {
                let keep = usize::from(!self.options.keep_quotes);
                return Ok(self.chars[start + keep..self.at - keep].iter().collect());
            }
        }
        Err("a single quote (') is not closed".to_owned())
    }

    fn double_quoted(&mut self) -> Result<String, String> {
        let mut text = String::new();
        self.at += 1;
        if self.options.keep_quotes {
            text.push('"');
        }
        loop {
            match self.peek() {
                None => return Err("a double quote (\") is not closed".to_owned()),
                Some('"') => {
                    self.at += 1;
                    if self.options.keep_quotes {
                        text.push('"');
                    }
                    return Ok(text);
                }
                Some('$') => text.push_str(&self.dollar()?),
                Some(mut c) => {
                    self.at += 1;
                    if c == self.options.escape {
                        if self.keep_escapes {
                            text.push(c);
                        }
                        match self.peek() {
                            None => continue,
                            // Only these can be escaped; before others the escape character is one like any.
                            Some(next) if next == '"' || next == '$' || next == self.options.escape => {
                                self.at += 1;
                                c = next;
                            }
                            Some(_) => {}
                        }
                    }
                    text.push(c);
                }
            }
        }
    }

    fn dollar(&mut self) -> Result<String, String> {
        self.at += 1;
        if self.peek() != Some('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.value(&name) {
                None if self.options.keep_unset => format!("${name}"),
                value => value.unwrap_or_default(),
            });
        }
        self.at += 1;
        self.depth += 1;
        if self.depth > NESTING_MAX {
            return Err(format!("more than {NESTING_MAX} substitutions inside one another"));
        }
        let result = self.braces();
        self.depth -= 1;
        result
    }

    /// What follows `${`.
    fn braces(&mut self) -> Result<String, String> {
        match self.peek() {
            None => return Err("a brace ({) is not closed".to_owned()),
            Some('{' | '}' | ':') => return Err("bad substitution: a name is expected after ${".to_owned()),
            Some(_) => {}
        }
        let name = self.name();
        let mut operator = self.next();
        let mut shown = operator.map(String::from).unwrap_or_default();
        let empty_is_unset = operator == Some(':');
        if empty_is_unset {
            operator = self.next();
            shown.extend(operator);
        }
        match operator {
            Some('}') if !empty_is_unset => Ok(match self.value(&name) {
                None if self.options.keep_unset => format!("${{{name}}}"),
                value => value.unwrap_or_default(),
            }),
            Some(operator @ ('-' | '+' | '?')) => {
                let word = self.closed(false)?;
                let value = self.value(&name);
                if value.is_none() && self.options.keep_unset {
                    return Ok(format!("${{{name}{shown}{word}}}"));
                }
                let present = value.as_ref().is_some_and(|value| !(empty_is_unset && value.is_empty()));
                match (operator, present) {
                    ('-' | '?', true) => Ok(value.unwrap_or_default()),
                    ('+', true) | ('-', false) => Ok(word),
                    ('+', false) => Ok(String::new()),
                    _ if !word.is_empty() => Err(format!("{name}: {word}")),
                    _ if value.is_some() => Err(format!("{name} is not allowed to be empty")),
                    _ => Err(format!("{name} is not allowed to be unset")),
                }
            }
            Some(side @ ('#' | '%')) if !empty_is_unset => {
                let word = self.closed(true)?;
                let Some(value) = self.value(&name) else {
                    return Ok(if self.options.keep_unset {
                        format!("${{{name}{shown}{word}}}")
                    } else {
                        String::new()
                    });
                };
                let longest = word.starts_with(side);
                let pattern = Pattern::parse(if longest { &word[1..] } else { &word })?;
                Ok(if side == '#' { pattern.trim_start(&value, longest) } else { pattern.trim_end(&value, longest) })
            }
            Some('/') if !empty_is_unset => {
                let all = self.peek() == Some('/');
                self.at += usize::from(all);
                let pattern = match self.until(Some('/'), true) {
                    Ok((pattern, _)) => pattern,
                    Err(_) if self.peek().is_none() => return Err("a second slash is expected in ${…/…/…}".to_owned()),
                    Err(why) => return Err(why),
                };
                let replacement = self.closed(true)?;
                let Some(value) = self.value(&name) else {
                    let kept = || format!("${{{name}/{pattern}/{replacement}}}");
                    return Ok(if self.options.keep_unset { kept() } else { String::new() });
                };
                Ok(Pattern::parse(&pattern)?.replace(&value, &replacement, all))
            }
            None => Err("a brace ({) is not closed".to_owned()),
            Some(_) => Err(format!("unsupported modifier {shown:?} after ${{{name}")),
        }
    }

    /// The rest of a `${…}`, and its end.
    fn closed(&mut self, keep_escapes: bool) -> Result<String, String> {
        match self.until(Some('}'), keep_escapes) {
            Ok((text, _)) => Ok(text),
            Err(_) if self.peek().is_none() => Err("a brace ({) is not closed".to_owned()),
            Err(why) => Err(why),
        }
    }

    /// A name, a number, or one of the shell's special parameters (which are never set here).
    fn name(&mut self) -> String {
        let start = self.at;
        match self.peek() {
            Some(c) if c.is_numeric() => {
                while self.peek().is_some_and(char::is_numeric) {
                    self.at += 1;
                }
            }
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => self.at += 1,
            _ => {
                while self.peek().is_some_and(|c| c.is_alphanumeric() || c == '_') {
                    self.at += 1;
                }
            }
        }
        self.chars[start..self.at].iter().collect()
    }

    fn value(&mut self, name: &str) -> Option<String> {
        let value = self.variables.lookup(name);
        let seen = if value.is_some() { &mut self.out.used } else { &mut self.out.unset };
        seen.insert(name.to_owned());
        value.map(str::to_owned)
    }
}

/// A shell pattern without brackets, as `${V#p}` takes them.
struct Pattern(Vec<Piece>);

#[derive(Clone, Copy, PartialEq)]
enum Piece {
    /// `*`: any characters of one line.
    Star,
    /// `?`: one character, not a line's end.
    Any,
    Char(char),
}

impl Pattern {
    fn parse(pattern: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut chars = pattern.chars().peekable();
        while let Some(c) = chars.next() {
            pieces.push(match c {
                '*' => Piece::Star,
                '?' => Piece::Any,
                '\\' => match chars.next() {
                    // `}` and `/` are escaped for the substitution around the pattern.
                    Some(c @ ('*' | '?' | '\\' | '}' | '/')) => Piece::Char(c),
                    Some(c) => return Err(format!("invalid escape '\\{c}' in the pattern {pattern:?}")),
                    None => return Err(format!("the pattern {pattern:?} ends with an escape character")),
                },
                c => Piece::Char(c),
            });
        }
        Ok(Self(pieces))
    }

    /// Where a match that begins at the start of `text` can end: the nearest or the farthest place.
    fn end(&self, text: &[char], longest: bool) -> Option<usize> {
        // The places reached after each piece; linear in pattern times text, whatever the pattern.
        let mut reached = vec![false; text.len() + 1];
        reached[0] = true;
        for piece in &self.0 {
            let mut next = vec![false; text.len() + 1];
            for at in 0..=text.len() {
                match piece {
                    Piece::Star => next[at] = reached[at] || (at > 0 && next[at - 1] && text[at - 1] != '\n'),
                    Piece::Any => next[at] = at > 0 && reached[at - 1] && text[at - 1] != '\n',
                    Piece::Char(c) => next[at] = at > 0 && reached[at - 1] && text[at - 1] == *c,
                }
            }
            reached = next;
        }
        if longest { reached.iter().rposition(|hit| *hit) } else { reached.iter().position(|hit| *hit) }
    }

    fn trim_start(&self, value: &str, longest: bool) -> String {
        let chars: Vec<char> = value.chars().collect();
        chars[self.end(&chars, longest).unwrap_or(0)..].iter().collect()
    }

    /// The same from the other end.
    fn trim_end(&self, value: &str, longest: bool) -> String {
        let reversed = Self(self.0.iter().rev().copied().collect());
        let chars: Vec<char> = value.chars().rev().collect();
        chars[reversed.end(&chars, longest).unwrap_or(0)..].iter().rev().collect()
    }

    fn replace(&self, value: &str, replacement: &str, all: bool) -> String {
        let chars: Vec<char> = value.chars().collect();
        let mut out = String::new();
        let mut at = 0;
        let mut last_end = None;
        while at <= chars.len() {
            let found = self.end(&chars[at..], true).map(|length| at + length);
            match found {
                // An empty match right behind another match is none.
                Some(end) if end > at || last_end != Some(at) => {
                    out.push_str(replacement);
                    last_end = Some(end);
                    if !all {
                        out.extend(&chars[end..]);
                        return out;
                    }
                    if end == at {
                        out.extend(chars.get(at));
                        at += 1;
                    } else {
                        at = end;
                    }
                }
                _ => {
                    out.extend(chars.get(at));
                    at += 1;
                }
            }
        }
        out
    }
}

#[cfg(test)]
#[path = "words_tests.rs"]
mod tests;
