//! Lists of patterns that choose files: moby's `patternmatcher`, as `.dockerignore` and `COPY --exclude` use it.
//!
//! Each is a Go `filepath.Match` pattern with `**` for any number of directories; one that matches a directory matches
//! all below it; `!` takes back; the last one that matches counts.

pub use super::glob::BadPattern;
use super::glob::Pattern;

/// Patterns, in order.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    rules: Vec<Rule>,
    has_negation: bool,
}

#[derive(Debug, Clone)]
struct Rule {
    pattern: Pattern,
    /// `!`: what it matches doesn't match after all.
    negates: bool,
}

/// Whether a path matches, and what its children need to know about it.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// Whether the path itself matches.
    pub matches: bool,
    /// Which rules matched it or a directory above it.
    matched: Vec<bool>,
}

impl Patterns {
    /// Adds a pattern, blanks around it trimmed already. A slash at either end means nothing, nor do `.` and `..` where
    /// they can be resolved; the root itself is never matched by name.
    ///
    /// # Errors
    /// [`BadPattern`], for an empty one too.
    pub fn add(&mut self, pattern: &[u8]) -> Result<(), BadPattern> {
        let (negates, text) = match pattern.strip_prefix(b"!") {
            Some(rest) => (true, rest.trim_ascii()),
            None => (false, pattern),
        };
        if text.is_empty() {
            return Err(BadPattern("a pattern is expected after '!'"));
        }
        let cleaned = clean(text);
        if cleaned == b"." || cleaned == b"/" {
            return Ok(());
        }
        let pattern = Pattern::with_double_star(cleaned.strip_prefix(b"/").unwrap_or(&cleaned))?;
        self.has_negation |= negates;
        self.rules.push(Rule { pattern, negates });
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether one of them takes back, so that not all below a directory that matches need match.
    pub fn has_negation(&self) -> bool {
        self.has_negation
    }

    /// The verdict on `path` (relative, `/`-separated), given the one on its directory; the root's is the default one.
    pub fn verdict(&self, path: &[u8], above: &Verdict) -> Verdict {
        let mut matches = false;
        let mut matched = Vec::with_capacity(self.rules.len());
        for (index, rule) in self.rules.iter().enumerate() {
            let above = above.matched.get(index).copied().unwrap_or(false);
            // A rule that would change nothing needn't be looked at.
            let hit = above || (rule.negates == matches && rule.pattern.matches(path));
            matched.push(hit);
            if hit {
                matches = !rule.negates;
            }
        }
        Verdict { matches, matched }
    }

    /// The verdict on `path`, directories above it considered. The empty path is the root, which `*` and `**` match.
    pub fn verdict_on_path(&self, path: &[u8]) -> Verdict {
        let mut verdict = Verdict::default();
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).chain([path.len()]);
        for end in ends {
            verdict = self.verdict(&path[..end], &verdict);
        }
        verdict
    }

    /// Whether something below `dir` may match when `dir` itself does not. May say yes in vain.
    pub fn may_match_below(&self, dir: &[u8]) -> bool {
        self.rules.iter().any(|rule| !rule.negates && rule.pattern.may_match_below(dir))
    }
}

/// Go's `filepath.Clean`.
pub(super) fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.starts_with(b"/");
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| *last != b"..") => {
                parts.pop();
            }
            b".." if rooted => {}
            part => parts.push(part),
        }
    }
    let mut cleaned = if rooted { b"/".to_vec() } else { Vec::new() };
    cleaned.extend(parts.join(&b'/'));
    if cleaned.is_empty() { b".".to_vec() } else { cleaned }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_lie_below_is_not_looked_for() {
        let below = |pattern: &str, dir: &str| {
            let mut patterns = Patterns::default();
            patterns.add(pattern.as_bytes()).unwrap();
            patterns.may_match_below(dir.as_bytes())
        };
        for (pattern, dir, expected) in [
            ("a/b/c", "", true),
            ("a/b/c", "a", true),
            ("a/b/c", "a/b", true),
            ("a/b/c", "a/b/c", false),
            ("a/b/c", "a/bc", false),
            ("a/b/c", "b", false),
            ("ab", "a", false),
            ("a/*", "a", true),
            ("**/x", "a", true),
            ("a/**", "a", true),
            ("!a/b", "a", false),
        ] {
            assert_eq!(below(pattern, dir), expected, "{pattern} below {dir:?}");
        }
    }

    #[test]
    fn the_root_is_matched_by_stars_only() {
        let root = |pattern: &str| {
            let mut patterns = Patterns::default();
            patterns.add(pattern.as_bytes()).unwrap();
            patterns.verdict_on_path(b"").matches
        };
        assert!(root("*") && root("**") && root("**/**"));
        assert!(!root("?") && !root("a") && !root("**/a") && !root("*/a") && !root("."));
    }
}
