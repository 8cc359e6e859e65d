//! The filters of BuildKit and containerd, and what Plies adds to them.
//!
//! ```text
//! filter   = selector { "," selector }            all must match
//! selector = field [ operator value ]             a field alone: it is there
//! field    = name { "." name }                    name: letters, digits, "_"; or quoted
//! operator = "==" | "!=" | "~="                   "~=": a regular expression that matches somewhere
//!          | ">=" | "<=" | ">" | "<"              of size only
//! value    = up to a comma or a blank, or quoted
//! quoted   = "…" with \\ \" \n \t \r, and after "~=" also /…/ and |…|, where only the quote itself is escaped
//! ```
//!
//! Several filters: one must match. No filter, and an empty one, match everything.
//!
//! | field | value |
//! |---|---|
//! | `id`, `description`, `type` | as they are |
//! | `parents` | their IDs, joined by ";" |
//! | `mutable`, `immutable`, `inuse`, `shared`, `private`, `pinned` | there (and empty) if it is so |
//! | `size` | bytes; compared as a number: `size>=10MB`, `size<1.5GiB` |
//! | `until` | `until=24h`: neither used nor made in that time; `90s`, `15m`, `48h`, `7d`, `1h30m` |
//!
//! Any other field is not there, which is no error: `!=` then holds, and nothing else does but a regular expression that
//! matches nothing at all.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::time::Duration;

use plies_store::Stamp;
use regex::Regex;

use crate::CacheError;

/// Bytes of a filter; a longer one is a mistake. Regular expressions have a limit of their own, of what they compile to.
const FILTER_BYTES_MAX: usize = 64 << 10;

/// What a filter looks at.
pub trait FilterRow {
    /// The value of a field: `None` if it is not there.
    fn field(&self, name: &str) -> Option<Cow<'_, str>>;

    /// Its bytes, for `size`.
    fn size_bytes(&self) -> u64;

    /// When it was last used, or made if it never was, for `until`; `None` if nobody knows, which counts as long ago.
    fn last_touched(&self) -> Option<Stamp>;
}

/// Parsed filters.
#[derive(Debug)]
pub struct Filters {
    /// One must match; none are none.
    any: Vec<Vec<Selector>>,
}

#[derive(Debug)]
enum Selector {
    Present(String),
    Equal(String, String),
    NotEqual(String, String),
    Matches(String, Box<Regex>),
    Size(Compare, u64),
    Until(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compare {
    Equal,
    NotEqual,
    AtLeast,
    AtMost,
    More,
    Less,
}

impl Filters {
    /// Parses filters of a request that is called `what` in messages.
    ///
    /// # Errors
    /// [`CacheError::Filter`] with the place of the first mistake.
    pub fn parse<T: AsRef<str>>(what: &'static str, filters: &[T]) -> Result<Self, CacheError> {
        let parse = |filter: &T| {
            let filter = filter.as_ref();
            parse(filter).map_err(|Bad { at, why }| CacheError::Filter { what, filter: filter.to_owned(), at, why })
        };
        Ok(Self { any: filters.iter().map(parse).collect::<Result<_, _>>()? })
    }

    /// Whether there is nothing to match.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty()
    }

    /// Whether a row matches, as of `now`.
    pub fn matches(&self, row: &impl FilterRow, now: Stamp) -> bool {
        self.any.is_empty() || self.any.iter().any(|all| all.iter().all(|selector| selector.matches(row, now)))
    }
}

impl Selector {
    fn matches(&self, row: &impl FilterRow, now: Stamp) -> bool {
        match self {
            Self::Present(name) => row.field(name).is_some(),
            Self::Equal(name, value) => row.field(name).is_some_and(|has| has == value.as_str()),
            Self::NotEqual(name, value) => row.field(name).is_none_or(|has| has != value.as_str()),
            Self::Matches(name, pattern) => pattern.is_match(&row.field(name).unwrap_or_default()),
            Self::Size(compare, bytes) => compare.holds(row.size_bytes().cmp(bytes)),
            Self::Until(age) => row.last_touched().is_none_or(|touched| now.since(touched) >= *age),
        }
    }
}

impl Compare {
    fn holds(self, order: Ordering) -> bool {
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::AtLeast => order.is_ge(),
            Self::AtMost => order.is_le(),
            Self::More => order.is_gt(),
            Self::Less => order.is_lt(),
        }
    }
}

struct Bad {
    at: usize,
    why: String,
}

fn bad<T>(at: usize, why: impl Into<String>) -> Result<T, Bad> {
    Err(Bad { at, why: why.into() })
}

fn parse(text: &str) -> Result<Vec<Selector>, Bad> {
    if text.len() > FILTER_BYTES_MAX {
        return bad(0, format!("{} bytes are more than {FILTER_BYTES_MAX}", text.len()));
    }
    let mut reader = Reader { text, at: 0 };
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(selectors);
    }
    loop {
        selectors.push(reader.selector()?);
        reader.blanks();
        match reader.peek() {
            None => return Ok(selectors),
            Some(',') => reader.skip(','),
            Some(_) => return bad(reader.at, "expected a comma or the end"),
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    /// In bytes, always between two characters.
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn skip(&mut self, c: char) {
        self.at += c.len_utf8();
    }

    fn blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let taken = &rest[..rest.find(|c| !fits(c)).unwrap_or(rest.len())];
        self.at += taken.len();
        taken
    }

    fn selector(&mut self) -> Result<Selector, Bad> {
        self.blanks();
        let began = self.at;
        let mut name = self.name()?;
        while self.peek() == Some('.') {
            self.skip('.');
            name = format!("{name}.{}", self.name()?);
        }
        self.blanks();
        if matches!(self.peek(), None | Some(',')) {
            return match name.as_str() {
                "size" | "until" => bad(self.at, format!("{name} needs a value")),
                _ => Ok(Selector::Present(name)),
            };
        }
        let operator_at = self.at;
        let operator = self.take_while(|c| "=!~<>".contains(c));
        self.blanks();
        let value_at = self.at;
        let value = self.value(operator == "~=")?;
        match (name.as_str(), operator) {
            ("until", "=" | "==") => match parse_duration(&value) {
                Some(age) => Ok(Selector::Until(age)),
                None => bad(value_at, format!("{value:?} is no time (use 90s, 15m, 48h, 7d)")),
            },
            ("until", _) => bad(operator_at, "until takes \"=\""),
            ("size", _) => {
                let compare = match operator {
                    "=" | "==" => Compare::Equal,
                    "!=" => Compare::NotEqual,
                    ">=" => Compare::AtLeast,
                    "<=" => Compare::AtMost,
                    ">" => Compare::More,
                    "<" => Compare::Less,
                    _ => return bad(operator_at, "size takes \">=\", \"<=\", \">\", \"<\", \"==\" or \"!=\""),
                };
                match parse_bytes(&value) {
                    Some(bytes) => Ok(Selector::Size(compare, bytes)),
                    None => bad(value_at, format!("{value:?} is no size (use 10MB, 1.5GiB)")),
                }
            }
            (_, "==") => Ok(Selector::Equal(name, value)),
            (_, "!=") => Ok(Selector::NotEqual(name, value)),
            (_, "~=") => match Regex::new(&value) {
                Ok(pattern) => Ok(Selector::Matches(name, Box::new(pattern))),
                Err(error) => bad(value_at, format!("no regular expression: {error}")),
            },
            (_, "") => bad(began.max(operator_at), "expected an operator (\"==\", \"!=\" or \"~=\")"),
            (_, other) => bad(operator_at, format!("operator {other:?} is none of \"==\", \"!=\" and \"~=\"")),
        }
    }

    fn name(&mut self) -> Result<String, Bad> {
        let at = self.at;
        if self.peek() == Some('"') {
            return self.quoted('"');
        }
        match self.take_while(|c| c == '_' || c.is_alphanumeric()) {
            "" => bad(at, "expected a field"),
            name => Ok(name.to_owned()),
        }
    }

    fn value(&mut self, is_pattern: bool) -> Result<String, Bad> {
        let at = self.at;
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(quote @ ('/' | '|')) if is_pattern => self.quoted(quote),
            _ => match self.take_while(|c| c != ',' && !c.is_whitespace()) {
                "" => bad(at, "expected a value"),
                value => Ok(value.to_owned()),
            },
        }
    }

    /// In slashes and bars a pattern keeps its own escapes.
    fn quoted(&mut self, quote: char) -> Result<String, Bad> {
        let began = self.at;
        self.skip(quote);
        let mut value = String::new();
        let mut chars = self.rest().char_indices();
        let base = self.at;
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.at = base + at + c.len_utf8();
                    return Ok(value);
                }
                '\\' => match chars.next() {
                    Some((_, c)) if c == quote => value.push(c),
                    Some((_, c)) if quote != '"' => value.extend(['\\', c]),
                    Some((_, '\\')) => value.push('\\'),
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, 't')) => value.push('\t'),
                    Some((_, 'r')) => value.push('\r'),
                    Some((_, c)) => return bad(base + at, format!("\\{c} stands for nothing")),
                    None => break,
                },
                c => value.push(c),
            }
        }
        bad(began, format!("the quote {quote} is not closed"))
    }
}

/// A decimal number as whole thousandths, and what follows it.
fn thousandths(text: &str) -> Option<(u128, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, mut rest) = text.split_at(end);
    // What 64 bits cannot hold has 21 digits or is refused by the caller: nothing here overflows.
    let mut value = whole.parse::<u128>().ok().filter(|_| whole.len() <= 20)? * 1000;
    if let Some(after) = rest.strip_prefix('.') {
        let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let digits = &after[..end];
        if digits.is_empty() || digits.len() > 3 {
            return None;
        }
        value += format!("{digits:0<3}").parse::<u128>().ok()?;
        rest = &after[end..];
    }
    Some((value, rest))
}

/// Reads a size: `10MB`, `1.5GiB`, `4096`; decimal units count in thousands, `KiB` and the like in 1,024.
pub fn parse_bytes(text: &str) -> Option<u64> {
    const UNITS: [(&str, u128); 12] = [
        ("", 1),
        ("b", 1),
        ("k", 1000),
        ("kb", 1000),
        ("m", 1_000_000),
        ("mb", 1_000_000),
        ("g", 1_000_000_000),
        ("gb", 1_000_000_000),
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
    ];
    let (value, unit) = thousandths(text)?;
    let unit = unit.to_ascii_lowercase();
    let factor = match unit.as_str() {
        "t" | "tb" => 1_000_000_000_000,
        unit => UNITS.iter().find(|(name, _)| *name == unit)?.1,
    };
    u64::try_from(value * factor / 1000).ok()
}

/// Reads a duration: `24h`, `1h30m`, `7d`, `500ms`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut micros: u128 = 0;
    loop {
        let (value, after) = thousandths(rest)?;
        let end = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let unit = match &after[..end] {
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            "w" => 7 * 86_400_000_000,
            _ => return None,
        };
        micros = micros.checked_add(value * unit / 1000)?;
        rest = &after[end..];
        if rest.is_empty() {
            return u64::try_from(micros).ok().map(Duration::from_micros);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Row;

    const NOW: Stamp = Stamp::from_micros(100 * 3_600_000_000);

    /// 10 MB, last used 24 hours before [`NOW`].
    impl FilterRow for Row {
        fn field(&self, name: &str) -> Option<Cow<'_, str>> {
            Some(match name {
                "id" => "abc123".into(),
                "parents" => "p1;p2".into(),
                "description" => "RUN make, \"all\"".into(),
                "type" => "exec.cachemount".into(),
                "mutable" | "private" | "a.b" => "".into(),
                _ => return None,
            })
        }

        fn size_bytes(&self) -> u64 {
            10_000_000
        }

        fn last_touched(&self) -> Option<Stamp> {
            Some(Stamp::from_micros(76 * 3_600_000_000))
        }
    }

    fn matches(filters: &[&str]) -> bool {
        Filters::parse("prune", filters).unwrap().matches(&Row, NOW)
    }

    #[test]
    fn a80_filters_match_as_buildkits_do() {
        for (filter, expected) in [
            ("", true),
            ("id==abc123", true),
            (" id == abc123 ", true),
            ("id==abc", false),
            ("id!=abc", true),
            ("id!=abc123", false),
            ("id~=^abc", true),
            ("id~=c1", true),
            ("id~=^c1", false),
            ("id~=/[a-c]{3}\\d+/", true),
            ("id~=|^abc|", true),
            ("parents~=p2", true),
            ("parents==p1;p2", true),
            ("type==exec.cachemount", true),
            ("\"type\"==\"exec.cachemount\"", true),
            ("description==\"RUN make, \\\"all\\\"\"", true),
            ("description~=/make, \"a/", true),
            ("description~=\"mak\\\\w\"", true),
            // Flags are there or not; their value is empty.
            ("mutable", true),
            ("mutable==\"\"", true),
            ("mutable==true", false),
            ("mutable!=true", true),
            ("immutable", false),
            ("shared", false),
            ("private", true),
            // Nobody knows these: not there, and that is all.
            ("nonsense", false),
            ("nonsense==x", false),
            ("nonsense!=x", true),
            ("nonsense~=x", false),
            ("nonsense~=\"\"", true),
            ("a.b", true),
            ("a.c", false),
            // A comma: both.
            ("mutable,private", true),
            ("mutable , private,id~=abc", true),
            ("mutable,shared", false),
            // Plies' own.
            ("until=24h", true),
            ("until==1440m", true),
            ("until=24h0.001s", false),
            ("until=1d", true),
            ("until=1w", false),
            ("until=1h30m", true),
            ("size>=10MB", true),
            ("size>10MB", false),
            ("size<=10mb", true),
            ("size<10MiB", true),
            ("size==10000000", true),
            ("size!=10000kB", false),
            ("size>=0.01GB", true),
            ("size<1TB", true),
            ("pinned", false),
        ] {
            assert_eq!(matches(&[filter]), expected, "{filter}");
        }
        assert!(matches(&[]));
        // Several: one is enough.
        assert!(matches(&["shared", "mutable"]));
        assert!(!matches(&["shared", "immutable"]));
        // BuildKit's first default rule names three types in one string, which never matches anything.
        assert!(!matches(&["type==source.local,type==exec.cachemount"]));
        assert!(matches(&["type==source.local", "type==exec.cachemount"]));
    }

    #[test]
    fn a54_a71_what_is_no_filter_is_refused_with_its_place() {
        for (filter, at, why) in [
            ("==x", 0, "expected a field"),
            (",", 0, "expected a field"),
            ("id==a,", 6, "expected a field"),
            ("id.==x", 3, "expected a field"),
            ("id=x", 2, "operator \"=\" is none"),
            ("id===x", 2, "operator \"===\" is none"),
            ("id>x", 2, "operator \">\" is none"),
            ("id x", 3, "expected an operator"),
            ("id==", 4, "expected a value"),
            ("id==a b", 6, "expected a comma or the end"),
            ("id==\"a", 4, "the quote \" is not closed"),
            ("id==\"a\\", 4, "the quote \" is not closed"),
            ("id==\"a\\q\"", 6, "\\q stands for nothing"),
            ("id~=/a", 4, "the quote / is not closed"),
            ("id~=(", 4, "no regular expression"),
            ("id~=a{999}{999}{999}", 4, "no regular expression"),
            ("type==x,ïd~=[", 13, "no regular expression"),
            ("until", 5, "until needs a value"),
            ("until=yesterday", 6, "is no time"),
            ("until=24", 6, "is no time"),
            ("until=99999999999999999999w", 6, "is no time"),
            ("until>=24h", 5, "until takes"),
            ("size>=x", 6, "is no size"),
            ("size>=10XB", 6, "is no size"),
            ("size>=99999999999999999999TB", 6, "is no size"),
            ("size>=1.GB", 6, "is no size"),
            ("size~=1", 4, "size takes"),
        ] {
            match Filters::parse("prune", &["id==ok", filter]) {
                Err(CacheError::Filter { what: "prune", filter: given, at: place, why: said }) => {
                    assert_eq!((given.as_str(), place), (filter, at), "{said}");
                    assert!(said.contains(why), "{filter}: {said}");
                }
                other => panic!("{filter}: {other:?}"),
            }
        }
        let error = Filters::parse("diskusage", &["ïd=x"]).unwrap_err();
        let words = error.to_string();
        assert!(words.starts_with("failed to parse diskusage filters \"ïd=x\": at character 3: operator"), "{words}");
        assert!(Filters::parse("prune", &["x".repeat(FILTER_BYTES_MAX + 1)]).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in any::<String>(), more in "[a-z=!~<>\"/|\\\\,. 0-9]{0,20}") {
            for filter in [&text, &more] {
                if let Ok(filters) = Filters::parse("prune", &[filter]) {
                    filters.matches(&Row, NOW);
                }
            }
        }

        #[test]
        fn what_is_quoted_comes_back(value in any::<String>()) {
            let quoted: String = value.chars().flat_map(|c| match c {
                '"' | '\\' => vec!['\\', c],
                _ => vec![c],
            }).collect();
            let filters = Filters::parse("prune", &[format!("id==\"{quoted}\"")]).expect("it is quoted");
            prop_assert!(matches!(&filters.any[0][0], Selector::Equal(_, has) if *has == value));
        }
    }
}
