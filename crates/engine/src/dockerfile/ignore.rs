//! `.dockerignore`: which files of a context are not there.
//!
//! Each line is a pattern; what matches is hidden, `!` shows again ([`plies_cache::contenthash::patterns`]).

use std::io;

use plies_cache::contenthash::patterns::Patterns;

/// How many lines an ignore file may have and how long it may be, in bytes: bounds on our work for each file.
const PATTERNS_MAX: usize = 100_000;
/// See [`PATTERNS_MAX`].
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Why an ignore file can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IgnoreError {
    /// A line is no pattern.
    #[error("{file}:{line}: invalid pattern {pattern:?}: {why}")]
    Pattern {
        /// The ignore file's name.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What it says.
        pattern: String,
        /// What is wrong.
        why: &'static str,
    },
    /// There are too many patterns.
    #[error("{file}: more than {PATTERNS_MAX} patterns")]
    TooMany {
        /// The ignore file's name.
        file: String,
    },
    /// It can't be read.
    #[error("reading {file}")]
    Read {
        /// The ignore file's name.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl IgnoreError {
    /// What a caller can do about it.
    pub fn kind(&self) -> plies_oci::ErrorKind {
        match self {
            Self::Pattern { .. } | Self::Read { .. } => plies_oci::ErrorKind::InvalidInput,
            Self::TooMany { .. } => plies_oci::ErrorKind::Limit,
        }
    }
}

/// The patterns of an ignore file.
#[derive(Debug, Clone, Default)]
pub struct Ignore(Patterns);

impl Ignore {
    /// Parses an ignore file; `file` is its name for messages.
    ///
    /// # Errors
    /// [`IgnoreError::Pattern`] with the line, [`IgnoreError::TooMany`].
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, IgnoreError> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut ignore = Self::default();
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            // Comments begin in the first column, before blanks are trimmed.
            if line.starts_with(b"#") {
                continue;
            }
            let line = line.trim_ascii();
            if !line.is_empty() {
                ignore.0.add(line).map_err(|why| IgnoreError::Pattern {
                    file: file.to_owned(),
                    line: index + 1,
                    pattern: String::from_utf8_lossy(line).into_owned(),
                    why: why.0,
                })?;
            }
            if ignore.0.len() > PATTERNS_MAX {
                return Err(IgnoreError::TooMany { file: file.to_owned() });
            }
        }
        Ok(ignore)
    }

    /// Patterns from elsewhere: `COPY --exclude`.
    ///
    /// # Errors
    /// As [`Ignore::parse`]; the line is the pattern's number.
    pub fn from_patterns<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, IgnoreError> {
        let mut ignore = Self::default();
        for (index, pattern) in patterns.into_iter().enumerate() {
            ignore.0.add(pattern.trim().as_bytes()).map_err(|why| IgnoreError::Pattern {
                file: "--exclude".to_owned(),
                line: index + 1,
                pattern: pattern.to_owned(),
                why: why.0,
            })?;
        }
        Ok(ignore)
    }

    /// The ignore file of a context: `<dockerfile>.dockerignore` beside the Dockerfile if there is one, else the
    /// context's `.dockerignore`; without either nothing is hidden. `dockerfile` is the directory that the Dockerfile is
    /// in, which may be the context or lie elsewhere, and its name there.
    ///
    /// # Errors
    /// [`IgnoreError::Read`] for anything but a regular file of a sane size inside the directory.
    pub fn of_context(
        context: &crate::context::Tree,
        dockerfile: Option<(&crate::context::Tree, &str)>,
    ) -> Result<Self, IgnoreError> {
        let own = dockerfile.map(|(dir, name)| (dir, format!("{name}.dockerignore")));
        let common = (context, ".dockerignore".to_owned());
        for (dir, file) in own.into_iter().chain([common]) {
            match dir.read_file(file.as_bytes(), FILE_BYTES_MAX) {
                Ok(bytes) => return Self::parse(&file, &bytes),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(IgnoreError::Read { file, source }),
            }
        }
        Ok(Self::default())
    }

    /// Whether there is any rule.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a hidden directory must be walked because something below it may be shown again.
    pub fn may_show_again(&self) -> bool {
        self.0.has_negation()
    }

    /// The patterns of what is hidden.
    pub fn patterns(&self) -> &Patterns {
        &self.0
    }

    /// Whether `path` is hidden, directories above it considered.
    pub fn hides(&self, path: &[u8]) -> bool {
        self.0.verdict_on_path(path).matches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(patterns: &str, path: &str) -> bool {
        Ignore::parse(".dockerignore", patterns.as_bytes()).unwrap().hides(path.as_bytes())
    }

    #[test]
    fn patterns_match_as_in_moby() {
        // From the behaviour of moby's patternmatcher: pattern, path, hidden.
        let table = [
            ("**", "file", true),
            ("**/", "dir/file", true),
            ("**", "/", true),
            ("**/**", "dir/file", true),
            ("dir/**", "dir/file", true),
            ("dir/**", "dir/dir2/file/", true),
            ("**/dir", "dir", true),
            ("**/dir", "dir/file", true),
            ("**/dir2/*", "dir/dir2/file", true),
            ("**/dir2/**", "dir/dir2/dir2/file", true),
            ("**file", "file", true),
            ("**file", "dir/file", true),
            ("**/file", "dir/dir/file", true),
            ("**/file*", "dir/dir/file.txt", true),
            ("**/file*txt", "dir/dir/file.txt", true),
            ("**/file*.txt*", "dir/dir/file.txt", true),
            ("**/**/*.txt", "dir/dir/file.txt", true),
            ("**/**/*.txt2", "dir/dir/file.txt", false),
            ("**/*.txt", "file.txt", true),
            ("a**/*.txt", "a/file.txt", true),
            ("a**/*.txt", "a/dir/dir/file.txt", true),
            ("a/*.txt", "a/dir/file.txt", false),
            ("a/*.txt", "a/file.txt", true),
            ("a[b-d]e", "ae", false),
            ("a[b-d]e", "ace", true),
            ("a[b-d]e", "aae", false),
            ("a[^b-d]e", "aze", true),
            (".*", ".foo", true),
            (".*", "foo", false),
            ("abc.def", "abcdef", false),
            ("abc.def", "abcZdef", false),
            ("abc?def", "abcZdef", true),
            ("abc?def", "abcdef", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("**/foo/bar", "foo/bar", true),
            ("**/foo/bar", "dir/dir2/foo/bar", true),
            ("abc/**", "abc", false),
            ("abc/**", "abc/def", true),
            ("**/.foo", ".foo", true),
            ("**/.foo", "bar.foo", false),
            ("a(b)c/def", "a(b)c/def", true),
            ("a(b)c/def", "a(b)c/xyz", false),
            ("a.|)$(}+{bc", "a.|)$(}+{bc", true),
            (
                "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl",
                "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl",
                true,
            ),
            ("dist/*.whl", "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", true),
            ("/node_modules", "node_modules/x", true),
            ("node_modules/", "node_modules/x", true),
            ("node_modules", "a/node_modules", false),
            ("./a/../b", "b", true),
            ("  spaced  ", "spaced", true),
            ("# comment", "# comment", false),
            (" # no comment", "# no comment", true),
        ];
        for (pattern, path, expected) in table {
            let path = path.trim_end_matches('/');
            assert_eq!(hidden(pattern, path), expected, "{pattern:?} on {path:?}");
        }
    }

    #[test]
    fn last_matching_line_counts() {
        assert!(!hidden("**\n!util/docker/web", "util/docker/web"));
        assert!(!hidden("**\n!util/docker/web", "util/docker/web/foo"));
        assert!(hidden("**\n!util/docker/web\nutil/docker/web/foo", "util/docker/web/foo"));
        assert!(hidden("**\n!util/docker/web", "util/docker"));
        assert!(!hidden("*.md\n!README.md", "README.md"));
        assert!(hidden("!README.md\n*.md", "README.md"));
        assert!(!hidden("dir\n!dir/keep", "dir/keep/deep"));
        assert!(hidden("dir\n!dir/keep", "dir/other"));
        assert!(!hidden("*\n! /src", "src/a"));
    }

    #[test]
    fn the_root_is_never_hidden_and_bad_patterns_name_their_line() {
        assert!(!hidden(".\n/\n./", "a"));
        let error = Ignore::parse(".dockerignore", b"ok\n[a-\n").unwrap_err();
        assert!(error.to_string().starts_with(".dockerignore:2: invalid pattern \"[a-\""), "{error}");
        assert!(Ignore::parse("f", b"!").is_err());
    }

    #[test]
    fn byte_order_mark_and_line_ends_of_windows_are_no_part_of_patterns() {
        assert!(hidden("\u{feff}a\r\nb\r\n", "a"));
        assert!(hidden("\u{feff}a\r\nb\r\n", "b"));
    }
}
