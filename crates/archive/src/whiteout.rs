//! Names that mean "nothing here".
//!
//! A layer says that something below it is gone with an empty file: `.wh.<name>` for one name,
//! `.wh..wh..opq` for all that a directory held (image-spec `layer.md`). Names that begin with
//! `.wh..wh.` otherwise are AUFS's own and mean nothing to anybody else.

use crate::tar::EntryPath;

const PREFIX: &[u8] = b".wh.";
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a layer takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark<'a> {
    /// This name of the directory that the mark stands in.
    Whiteout(&'a [u8]),
    /// All that lower layers have in the directory that the mark stands in.
    Opaque,
}

impl Mark<'_> {
    /// The name of the file that carries the mark.
    pub fn file_name(&self) -> Vec<u8> {
        match self {
            Self::Whiteout(name) => [PREFIX, name].concat(),
            Self::Opaque => OPAQUE.to_vec(),
        }
    }
}

/// What the name of an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning<'a> {
    /// An entry like any other.
    Plain,
    /// A mark.
    Mark(Mark<'a>),
    /// Something of AUFS's, to be passed over.
    Ignored,
}

/// A name that begins as a mark and is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("whiteout of an impossible name, or something inside a whiteout")]
pub struct BadMark;

/// Says what the path of an entry means.
///
/// # Errors
/// [`BadMark`] for a whiteout of nothing, `.` or `..`, and for a path through a whiteout.
pub fn meaning(path: &EntryPath) -> Result<Meaning<'_>, BadMark> {
    let mut parts = path.components();
    let Some(last) = parts.next_back() else { return Ok(Meaning::Plain) };
    let mut inside_mark = false;
    for part in parts.filter(|part| part.starts_with(PREFIX)) {
        if part.starts_with(AUFS) && part != OPAQUE {
            return Ok(Meaning::Ignored);
        }
        inside_mark = true;
    }
    if inside_mark {
        return Err(BadMark);
    }
    match last.strip_prefix(PREFIX) {
        None => Ok(Meaning::Plain),
        // `.wh...` and `.wh..` would reach the parent or the directory itself.
        Some(b"" | b"." | b"..") => Err(BadMark),
        Some(_) if last == OPAQUE => Ok(Meaning::Mark(Mark::Opaque)),
        Some(_) if last.starts_with(AUFS) => Ok(Meaning::Ignored),
        Some(name) => Ok(Meaning::Mark(Mark::Whiteout(name))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(raw: &str) -> Result<&'static str, BadMark> {
        let path = EntryPath::clean(raw.as_bytes()).unwrap();
        let said = match meaning(&path)? {
            Meaning::Plain => "plain".to_owned(),
            Meaning::Ignored => "ignored".to_owned(),
            Meaning::Mark(Mark::Opaque) => "opaque".to_owned(),
            Meaning::Mark(Mark::Whiteout(name)) => format!("no {}", name.escape_ascii()),
        };
        Ok(said.leak())
    }

    #[test]
    fn w01_w02_w03_w04_w12_names() {
        for (raw, said) in [
            ("", "plain"),
            ("a", "plain"),
            (".wha", "plain"),
            ("a.wh.b", "plain"),
            (".wh.a", "no a"),
            ("d/.wh.a", "no a"),
            ("d/.wh. ", "no  "),
            ("d/.wh....", "no ..."),
            ("d/.wh..a", "no .a"),
            (".wh..wh..opq", "opaque"),
            ("d/.wh..wh..opq", "opaque"),
            (".wh..wh.aufs", "ignored"),
            (".wh..wh.plnk", "ignored"),
            (".wh..wh.plnk/99.88", "ignored"),
            (".wh..wh.orph/x/.wh.y", "ignored"),
            ("d/.wh..wh..tmp", "ignored"),
        ] {
            assert_eq!(of(raw), Ok(said), "{raw}");
        }
        for raw in [".wh...", "e/.wh...", "e/.wh..", "e/.wh.", ".wh.", ".wh.d/x", "a/.wh.d/x/y", ".wh..wh..opq/x"] {
            assert_eq!(of(raw), Err(BadMark), "{raw}");
        }
    }

    #[test]
    fn marks_read_back_as_written() {
        for mark in [Mark::Opaque, Mark::Whiteout(b"a"), Mark::Whiteout(b"\xff\n")] {
            let path = EntryPath::root().join(b"d").join(&mark.file_name());
            assert_eq!(meaning(&path), Ok(Meaning::Mark(mark)));
        }
    }
}
