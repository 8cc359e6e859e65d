//! Patterns for paths: Go's `filepath.Match`, and the same with `**` as `.dockerignore` has it.

/// Why a pattern means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadPattern(pub &'static str);

/// The longest pattern in bytes: matching costs its length for each character of a path, whose own limit is the same.
const PATTERN_BYTES_MAX: usize = 4096;

/// A parsed pattern.
#[derive(Debug, Clone)]
pub struct Pattern(Kind);

#[derive(Debug, Clone)]
enum Kind {
    /// These bytes.
    Exact(Vec<u8>),
    /// `dir/**`: anything that begins so.
    Prefix(Vec<u8>),
    /// `**name`: anything that ends so; `**/name` matches `name` too.
    Suffix(Vec<u8>),
    /// Whatever needs a look at each character.
    Pieces(Vec<Piece>),
}

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Char(u32),
    /// `?`
    Any,
    /// `*`
    Star,
    /// `[a-z]`
    Class {
        negated: bool,
        ranges: Vec<(u32, u32)>,
    },
    /// `**` before something else: nothing, or any number of directories.
    Directories,
    /// `**` at the end.
    Rest,
}

const SLASH: u32 = b'/' as u32;

impl Pattern {
    /// Go's `filepath.Match`.
    ///
    /// # Errors
    /// [`BadPattern`].
    pub fn new(pattern: &[u8]) -> Result<Self, BadPattern> {
        Self::parse(pattern, false)
    }

    /// The same, and `**` matches any number of directories, as in moby's `patternmatcher`.
    ///
    /// # Errors
    /// [`BadPattern`].
    pub fn with_double_star(pattern: &[u8]) -> Result<Self, BadPattern> {
        Self::parse(pattern, true)
    }

    fn parse(pattern: &[u8], double_star: bool) -> Result<Self, BadPattern> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return Err(BadPattern("longer than 4096 bytes"));
        }
        let chars = decode(pattern);
        let at = |index: usize| chars.get(index).and_then(|c| char::from_u32(*c));
        let mut pieces = Vec::new();
        let mut index = 0;
        while index < chars.len() {
            match at(index) {
                Some('*') if double_star && at(index + 1) == Some('*') => {
                    index += 2;
                    if at(index) == Some('/') {
                        index += 1;
                    }
                    pieces.push(if index >= chars.len() { Piece::Rest } else { Piece::Directories });
                }
                Some('*') => {
                    index += 1;
                    pieces.push(Piece::Star);
                }
                Some('?') => {
                    index += 1;
                    pieces.push(Piece::Any);
                }
                Some('\\') => {
                    let escaped = chars.get(index + 1).ok_or(BadPattern("nothing follows the last '\\'"))?;
                    pieces.push(Piece::Char(*escaped));
                    index += 2;
                }
                Some('[') => {
                    let (class, next) = parse_class(&chars, index + 1)?;
                    pieces.push(class);
                    index = next;
                }
                _ => {
                    pieces.push(Piece::Char(chars[index]));
                    index += 1;
                }
            }
        }
        // The common patterns need no look at each character. An escape leaves the plain forms to `Pieces`.
        let literal = |pieces: &[Piece]| pieces.iter().all(|piece| matches!(piece, Piece::Char(_)));
        let kind = match pieces.as_slice() {
            _ if pattern.contains(&b'\\') => Kind::Pieces(pieces),
            all if literal(all) => Kind::Exact(pattern.to_vec()),
            [init @ .., Piece::Rest] if literal(init) && pattern.ends_with(b"**") => {
                Kind::Prefix(pattern[..pattern.len() - 2].to_vec())
            }
            [Piece::Directories, rest @ ..] if literal(rest) => Kind::Suffix(pattern[2..].to_vec()),
            _ => Kind::Pieces(pieces),
        };
        Ok(Self(kind))
    }

    /// Whether the whole of `path` matches.
    pub fn matches(&self, path: &[u8]) -> bool {
        match &self.0 {
            Kind::Exact(text) => path == text,
            Kind::Prefix(text) => path.starts_with(text),
            Kind::Suffix(text) => path.ends_with(text) || text.strip_prefix(b"/") == Some(path),
            Kind::Pieces(pieces) => matches(pieces, &decode(path)),
        }
    }

    /// Whether it may match something below `dir`, the empty path being the root. May say yes in vain.
    pub(super) fn may_match_below(&self, dir: &[u8]) -> bool {
        match &self.0 {
            Kind::Exact(text) => dir.is_empty() || text.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/")),
            Kind::Prefix(_) | Kind::Suffix(_) | Kind::Pieces(_) => true,
        }
    }
}

/// Whether a component is more than a name: what Go's `containsWildcards` says.
pub fn has_wildcards(text: &[u8]) -> bool {
    let mut escaped = false;
    text.iter().any(|byte| {
        let special = !escaped && matches!(byte, b'*' | b'?' | b'[');
        escaped = !escaped && *byte == b'\\';
        special
    })
}

/// A name without its escapes.
pub fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => out.extend(bytes.next()),
            byte => out.push(*byte),
        }
    }
    out
}

/// What follows a `[`, and where that ends.
fn parse_class(chars: &[u32], mut index: usize) -> Result<(Piece, usize), BadPattern> {
    const UNCLOSED: BadPattern = BadPattern("a '[' is not closed");
    let negated = chars.get(index) == Some(&u32::from(b'^'));
    index += usize::from(negated);
    let mut ranges = Vec::new();
    let one = |index: &mut usize| -> Result<u32, BadPattern> {
        let mut c = *chars.get(*index).ok_or(UNCLOSED)?;
        if c == u32::from(b'-') || c == u32::from(b']') {
            return Err(BadPattern("'-' and ']' need a '\\' before them in a class"));
        }
        if c == u32::from(b'\\') {
            *index += 1;
            c = *chars.get(*index).ok_or(UNCLOSED)?;
        }
        *index += 1;
        Ok(c)
    };
    loop {
        if chars.get(index) == Some(&u32::from(b']')) && !ranges.is_empty() {
            return Ok((Piece::Class { negated, ranges }, index + 1));
        }
        let low = one(&mut index)?;
        let mut high = low;
        if chars.get(index) == Some(&u32::from(b'-')) {
            index += 1;
            high = one(&mut index)?;
        }
        ranges.push((low, high));
    }
}

/// Characters; a byte that is no UTF-8 counts as one that equals only itself.
fn decode(bytes: &[u8]) -> Vec<u32> {
    let mut out = Vec::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.extend(chunk.valid().chars().map(u32::from));
        out.extend(chunk.invalid().iter().map(|byte| 0x11_0000 + u32::from(*byte)));
    }
    out
}

/// Which places of the text are reached after each piece: no backtracking, so no pattern is slow.
fn matches(pieces: &[Piece], text: &[u32]) -> bool {
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    for piece in pieces {
        let mut next = vec![false; text.len() + 1];
        // For `Directories`: anything so far.
        let mut open = false;
        for at in 0..=text.len() {
            let last = at.checked_sub(1).map(|before| text[before]);
            let step = |test: &dyn Fn(u32) -> bool| last.is_some_and(|c| reached[at - 1] && test(c));
            next[at] = match piece {
                Piece::Char(c) => step(&|last| last == *c),
                Piece::Any => step(&|last| last != SLASH),
                Piece::Class { negated, ranges } => {
                    step(&|last| ranges.iter().any(|(low, high)| (*low..=*high).contains(&last)) != *negated)
                }
                Piece::Star => reached[at] || (last.is_some_and(|c| c != SLASH) && next[at - 1]),
                Piece::Rest => reached[at] || (at > 0 && next[at - 1]),
                Piece::Directories => {
                    let hit = reached[at] || (open && last == Some(SLASH));
                    open |= reached[at];
                    hit
                }
            };
        }
        reached = next;
    }
    reached[text.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_as_gos_filepath_match() {
        // The cases of Go's own test that are not about Windows.
        let table = [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "a", true),
            ("a*", "abc", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a*/b", "a/c/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxe/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^b-d]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("a???b", "a☺b", false),
            ("a[^a][^a][^a]b", "a☺b", false),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("[\\]a]", "]", true),
            ("[\\-]", "-", true),
            ("[x\\-]", "x", true),
            ("[x\\-]", "z", false),
            ("[\\-x]", "-", true),
            ("*x", "xxx", true),
        ];
        for (pattern, path, expected) in table {
            assert_eq!(
                Pattern::new(pattern.as_bytes()).unwrap().matches(path.as_bytes()),
                expected,
                "{pattern} on {path}"
            );
        }
        for bad in ["[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "[", "[^", "[^bc", "a[", "[\\", "a\\"] {
            assert!(Pattern::new(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hostile_pattern_is_not_slow() {
        let pattern = Pattern::new("*a".repeat(2000).as_bytes()).unwrap();
        assert!(!pattern.matches(&[b'a'; 255]));
    }

    #[test]
    fn bytes_that_are_no_text_match_themselves_only() {
        assert!(Pattern::new(b"\xff?").unwrap().matches(b"\xff\xfe"));
        assert!(!Pattern::new(b"\xff*x").unwrap().matches(b"\xfex"));
    }
}
