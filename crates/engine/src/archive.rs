//! An image archive that a user hands in: a directory or a tar of files, opened once and then read at any place.
//!
//! Layers are taken in by several threads at once, so every file of the archive can be read by position. A tar is
//! indexed in one pass; a tar that can't be read by position (a pipe, a compressed file) is spooled first into an
//! unnamed file below the state directory, where space is planned for and a crash leaves nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plies_archive::Limits;
use plies_archive::compress;
use plies_archive::tar::{EntryKind, EntryPath, Escaped, Reader, TarError};
use plies_oci::{Compression, ErrorKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::exec::Cancel;

/// Links followed from one member of a tar to another. Docker before 1.10 linked equal layers; it never chained them.
const LINKS_FOLLOWED_MAX: usize = 4;

/// Compressions that layers and archives don't use, by their first bytes, so that they can be named.
const UNREADABLE: [(&[u8], &str); 2] = [(b"\xfd7zX", "xz"), (b"BZh", "bzip2")];

/// How long a read waits for bytes before it looks whether it was asked to stop.
const POLL_TIMEOUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Buffer between an archive and its copy.
const SPOOL_BUFFER_BYTES: usize = 256 << 10;

/// Bytes that tell how a file is compressed.
const MAGIC_BYTES: usize = 4;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// A file operation failed.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The outer tar is not one.
    #[error("{} is not a readable archive", path.display())]
    Tar {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: TarError,
    },
    /// It does not begin as a tar does.
    #[error("{} is no archive: it does not begin with the header of a tar", path.display())]
    NotATar {
        /// Which file.
        path: PathBuf,
    },
    /// It is compressed in a way that is not read.
    #[error("{} is compressed with {format}: decompress it first (gzip and zstd are read as they are)", path.display())]
    Compression {
        /// Which file.
        path: PathBuf,
        /// How.
        format: &'static str,
    },
    /// A file that the archive promises is not in it.
    #[error("{}: no file {name} in the archive", path.display())]
    Missing {
        /// Which archive.
        path: PathBuf,
        /// Which file in it.
        name: String,
    },
    /// A file that must be read at once is too large for that.
    #[error("{}: {name} has {actual} bytes, the limit {limit} is {maximum}", path.display())]
    TooLarge {
        /// Which archive.
        path: PathBuf,
        /// Which file in it.
        name: String,
        /// Its length.
        actual: u64,
        /// The limit's value.
        maximum: u64,
        /// The limit's name.
        limit: &'static str,
    },
    /// A name occurs twice; readers disagree on which one counts.
    #[error("{}: {name} occurs twice in the archive", path.display())]
    Twice {
        /// Which archive.
        path: PathBuf,
        /// Which name.
        name: Escaped,
    },
}

impl ArchiveError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Io { .. } => ErrorKind::Unavailable,
            Self::Tar { .. } | Self::Twice { .. } => ErrorKind::InvalidInput,
            Self::Missing { .. } | Self::NotATar { .. } | Self::Compression { .. } => ErrorKind::InvalidInput,
            Self::TooLarge { .. } => ErrorKind::Limit,
        }
    }
}

/// Where an archive comes from.
#[derive(Debug, Clone)]
pub enum Input {
    /// A file or a directory.
    Path(PathBuf),
    /// Standard input.
    Stdin,
}

/// A place inside a tar file.
#[derive(Debug, Clone)]
enum Member {
    Data { offset: u64, size_bytes: u64 },
    Link(EntryPath),
}

#[derive(Debug)]
enum Files {
    Directory(OwnedFd),
    Tar { file: Arc<File>, members: BTreeMap<EntryPath, Member> },
}

/// An opened archive.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    files: Files,
}

impl Archive {
    /// Opens a directory, a tar, or a compressed tar.
    pub(crate) fn open(
        input: &Input,
        spool_dir: &Path,
        limits: &Limits,
        cancel: &Cancel,
    ) -> Result<Self, ArchiveError> {
        let path = match input {
            Input::Path(path) => path.clone(),
            Input::Stdin => PathBuf::from("<standard input>"),
        };
        let io = |op| {
            let path = path.clone();
            move |source: io::Error| ArchiveError::Io { op, path, source }
        };
        let file = match input {
            // A FIFO without a writer would block the open, and with it an interrupt.
            Input::Path(path) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let opened = rustix::fs::open(path, flags, Mode::empty());
                File::from(opened.map_err(|errno| io("open")(errno.into()))?)
            }
            Input::Stdin => File::from(io::stdin().as_fd().try_clone_to_owned().map_err(io("open"))?),
        };
        let metadata = file.metadata().map_err(io("stat"))?;
        if metadata.is_dir() {
            return Ok(Self { path, files: Files::Directory(file.into()) });
        }
        let mut head = [0; MAGIC_BYTES];
        let plain = metadata.is_file() && {
            let length = file.read_at(&mut head, 0).map_err(io("read"))?;
            compress::detect(&head[..length]) == Compression::None
        };
        // An xz or bzip2 file is told from a broken tar.
        let plain = plain && !UNREADABLE.iter().any(|(magic, _)| head.starts_with(magic));
        let file = if plain { file } else { spool(&path, file, spool_dir, limits, cancel)? };
        let members = index(&path, &file, limits)?;
        Ok(Self { path, files: Files::Tar { file: Arc::new(file), members } })
    }

    /// The archive as the user named it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file of the archive; `None` if there is no such file.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Section>, ArchiveError> {
        let Ok(mut wanted) = EntryPath::clean(name.as_bytes()) else { return Ok(None) };
        let io = |op| move |source: io::Error| ArchiveError::Io { op, path: self.path.join(name), source };
        match &self.files {
            Files::Directory(root) => {
                let opened = rustix::fs::openat2(
                    root,
                    wanted.as_bytes(),
                    OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
                    Mode::empty(),
                    ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
                );
                let file = match opened {
                    Ok(fd) => File::from(fd),
                    Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
                    Err(source) => return Err(io("open")(source.into())),
                };
                let metadata = file.metadata().map_err(io("stat"))?;
                if !metadata.is_file() {
                    return Ok(None);
                }
                Ok(Some(Section::new(Arc::new(file), 0, metadata.len())))
            }
            Files::Tar { file, members } => {
                for _ in 0..=LINKS_FOLLOWED_MAX {
                    match members.get(&wanted) {
                        Some(Member::Data { offset, size_bytes }) => {
                            return Ok(Some(Section::new(file.clone(), *offset, *size_bytes)));
                        }
                        Some(Member::Link(target)) => wanted = target.clone(),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }

    /// Opens a file that the archive must have.
    pub(crate) fn section(&self, name: &str) -> Result<Section, ArchiveError> {
        self.find(name)?.ok_or_else(|| ArchiveError::Missing { path: self.path.clone(), name: name.to_owned() })
    }

    /// Reads a small file whole.
    pub(crate) fn read(&self, name: &str, maximum: u64, limit: &'static str) -> Result<Vec<u8>, ArchiveError> {
        let mut section = self.section(name)?;
        if section.size_bytes() > maximum {
            return Err(ArchiveError::TooLarge {
                path: self.path.clone(),
                name: name.to_owned(),
                limit,
                actual: section.size_bytes(),
                maximum,
            });
        }
        let mut bytes = Vec::with_capacity(section.size_bytes() as usize);
        section.read_to_end(&mut bytes).map_err(|source| ArchiveError::Io {
            op: "read",
            path: self.path.join(name),
            source,
        })?;
        Ok(bytes)
    }
}

/// Copies a stream to an unnamed file, decompressing it when it is compressed.
fn spool(path: &Path, file: File, dir: &Path, limits: &Limits, cancel: &Cancel) -> Result<File, ArchiveError> {
    let io = |op, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| ArchiveError::Io { op, path, source }
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let spooled = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR);
    let mut spooled = File::from(spooled.map_err(|errno| io("create a file in", dir)(errno.into()))?);
    let mut source = Patient { file, cancel };
    // A pipe cannot be peeked at: take the magic bytes off and put them back in front.
    let mut head = Vec::new();
    (&mut source).take(MAGIC_BYTES as u64).read_to_end(&mut head).map_err(io("read", path))?;
    let compression = compress::detect(&head);
    for (magic, format) in UNREADABLE {
        if head.starts_with(magic) {
            return Err(ArchiveError::Compression { path: path.to_owned(), format });
        }
    }
    let decoder = compress::Decoder::new(io::Cursor::new(head).chain(source), compression, limits);
    let mut decoder = decoder.map_err(io("read", path))?;
    let mut buffer = vec![0; SPOOL_BUFFER_BYTES];
    // What does not begin as an archive is not worth a copy: it may never end.
    let mut first = Vec::new();
    (&mut decoder).take(512).read_to_end(&mut first).map_err(io("read", path))?;
    if !first.as_array().is_some_and(plies_archive::tar::is_header) {
        return Err(ArchiveError::NotATar { path: path.to_owned() });
    }
    spooled.write_all(&first).map_err(io("write a copy of the archive into", dir))?;
    loop {
        let length = match decoder.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io("read", path)(error)),
        };
        spooled.write_all(&buffer[..length]).map_err(io("write a copy of the archive into", dir))?;
    }
    spooled.rewind().map_err(io("read", dir))?;
    Ok(spooled)
}

/// Reads from what may have nothing to give for long, and stops when asked to.
struct Patient<'a> {
    file: File,
    cancel: &'a Cancel,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.cancel.check()?;
            let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
            match poll(&mut fds, Some(&POLL_TIMEOUT)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.file.read(buffer),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Notes where each file of a tar lies.
fn index(path: &Path, file: &File, limits: &Limits) -> Result<BTreeMap<EntryPath, Member>, ArchiveError> {
    let tar = |source| ArchiveError::Tar { path: path.to_owned(), source };
    let mut members = BTreeMap::new();
    let mut reader = Reader::new(Section::whole(file, path)?, limits);
    while let Some(entry) = reader.next_entry().map_err(tar)? {
        let member = match entry.kind {
            // A sparse file's bytes are not one run; no writer of images makes them.
            EntryKind::File { size_bytes, sparse: None } => Member::Data { offset: reader.position(), size_bytes },
            EntryKind::HardLink { target } => Member::Link(target),
            EntryKind::Symlink { target } => {
                let (parent, _) = entry.path.split().unwrap_or((EntryPath::root(), &[]));
                let beside = [parent.as_bytes(), b"/", &target].concat();
                Member::Link(EntryPath::clean(&beside).map_err(tar)?)
            }
            _ => continue,
        };
        if members.insert(entry.path.clone(), member).is_some() {
            return Err(ArchiveError::Twice { path: path.to_owned(), name: Escaped::of(entry.path.as_bytes()) });
        }
    }
    Ok(members)
}

/// A run of bytes of a shared file, read by position: clones don't disturb each other.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    file: Arc<File>,
    position: u64,
    end: u64,
}

impl Section {
    pub(crate) fn new(file: Arc<File>, offset: u64, size_bytes: u64) -> Self {
        Self { file, position: offset, end: offset.saturating_add(size_bytes) }
    }

    fn whole(file: &File, path: &Path) -> Result<Self, ArchiveError> {
        let io = |op| move |source: io::Error| ArchiveError::Io { op, path: path.to_owned(), source };
        let size = file.metadata().map_err(io("stat"))?.len();
        Ok(Self::new(Arc::new(file.try_clone().map_err(io("open"))?), 0, size))
    }

    /// How its bytes are compressed, by their first few.
    pub(crate) fn compression(&self) -> io::Result<Compression> {
        let mut head = [0; MAGIC_BYTES];
        let length = self.file.read_at(&mut head, self.position)?;
        Ok(compress::detect(&head[..length.min(usize::try_from(self.size_bytes()).unwrap_or(usize::MAX))]))
    }

    /// Bytes that are left to read.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.end - self.position
    }
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.size_bytes()).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..wanted], self.position)?;
        if read == 0 && wanted > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before the archive says"));
        }
        self.position += read as u64;
        Ok(read)
    }
}
