//! How values look to people: sizes, ages, ids, tables.

use std::fmt::Write as _;

use unicode_width::UnicodeWidthStr as _;

/// Hex digits that are shown of an id; docker and git users expect 12.
const SHORT_ID_DIGITS: usize = 12;

/// A size in docker's way: powers of 1000, three significant digits, `1.23MB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}{}", UNITS[unit])
}

/// How long ago, in one unit, as docker says it.
pub(crate) fn age(seconds: u64) -> String {
    const STEPS: [(u64, &str); 6] = [
        (365 * 86_400, "years"),
        (30 * 86_400, "months"),
        (7 * 86_400, "weeks"),
        (86_400, "days"),
        (3_600, "hours"),
        (60, "minutes"),
    ];
    // A unit is used from two of it on: "36 hours ago" says more than "1 day ago".
    match STEPS.iter().find(|(length, _)| seconds >= 2 * length) {
        Some((length, unit)) => format!("{} {unit} ago", seconds / length),
        None if seconds >= 60 => "a minute ago".into(),
        None => format!("{seconds} seconds ago"),
    }
}

/// The head of a hex id.
pub(crate) fn short_id(hex: &str) -> &str {
    let hex = hex.strip_prefix("sha256:").unwrap_or(hex);
    &hex[..hex.len().min(SHORT_ID_DIGITS)]
}

/// Text from outside, safe to print: control characters (which could steer a terminal) are escaped, other
/// characters stay.
pub(crate) fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // U+202A to U+202E and U+2066 to U+2069 reorder what stands around them on a terminal.
        if (c.is_control() && c != '\t')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
        {
            let _ = write!(out, "{}", c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

/// As [`safe`], but line ends stay: for messages of ours that quote what they complain about.
pub(crate) fn multiline(text: &str) -> String {
    text.split('\n').map(safe).collect::<Vec<_>>().join("\n")
}

/// Cuts text to `width` characters, saying so with an ellipsis.
pub(crate) fn ellipsis(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// A column of a table.
pub(crate) enum Column {
    /// Text.
    Left(&'static str),
    /// Numbers and sizes.
    Right(&'static str),
}

/// Prints rows under headings, columns parted by blanks only, as docker and git do: easy to read, easy to cut.
pub(crate) fn table(columns: &[Column], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let head = columns.iter().map(|column| match column {
        Column::Left(name) | Column::Right(name) => (*name).to_owned(),
    });
    let measured = |row: Vec<String>| -> Vec<(String, usize)> {
        let cell = |text: &String| {
            let text = safe(text);
            let width = text.width();
            (text, width)
        };
        row.iter().map(cell).collect()
    };
    let rows: Vec<_> = std::iter::once(head.collect()).chain(rows).map(measured).collect();
    let width_of = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.1).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width_of).collect();
    let mut out = String::new();
    for row in &rows {
        let start = out.len();
        for (((text, width), column), widest) in row.iter().zip(columns).zip(&widths) {
            let blanks = widest - width;
            let (before, after) = if matches!(column, Column::Right(_)) { (blanks, 0) } else { (0, blanks) };
            let gap = if out.len() == start { 0 } else { 2 };
            out.extend(std::iter::repeat_n(' ', gap + before));
            out.push_str(text);
            out.extend(std::iter::repeat_n(' ', after));
        }
        out.truncate(start + out[start..].trim_end().len());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1.00kB"),
            (1234, "1.23kB"),
            (99_950, "100kB"),
            (12_345_678, "12.3MB"),
            (999_600_000, "1.00GB"),
            (u64::MAX, "18.4EB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn ages_use_one_unit() {
        for (seconds, text) in [
            (0, "0 seconds ago"),
            (61, "a minute ago"),
            (120, "2 minutes ago"),
            (3 * 3600, "3 hours ago"),
            (47 * 3600, "47 hours ago"),
            (48 * 3600, "2 days ago"),
            (800 * 86_400, "2 years ago"),
        ] {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn p17_text_from_outside_cannot_steer_the_terminal() {
        assert_eq!(safe("a\u{1b}[31mb\n\u{202e}ü"), "a\\u{1b}[31mb\\u{a}\\u{202e}ü");
    }

    #[test]
    fn tables_align() {
        let text = table(&[Column::Left("NAME"), Column::Right("SIZE")], [vec!["a".into(), "1B".into()]]);
        assert_eq!(text, "NAME  SIZE\na       1B\n");
        let columns = [Column::Right("N"), Column::Left("NAME"), Column::Left("END")];
        let rows = [["100", "", ""], ["1", "字字字", "x"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&columns, rows), "  N  NAME    END\n100\n  1  字字字  x\n");
    }
}
