//! `RUN --mount`, `--network` and `--security`.
//!
//! A `--mount` is a line of comma-separated values, of which all but `from` may hold variables. So it is kept as fields
//! while parsing, and [`RunMount::resolve`] makes a [`Mount`] of it once the variables are known; what holds none is
//! tried at once, so that its mistakes show before anything is built.

use super::error::suggest;
use super::words::WordError;
use super::{CopyFrom, DockerfileError};

/// Where secrets are put that name no target (Dockerfile reference, "RUN --mount=type=secret").
const SECRETS_DIR: &str = "/run/secrets";

/// The id of a `type=ssh` mount that names none (Dockerfile reference, "RUN --mount=type=ssh").
const SSH_ID: &str = "default";

/// Every key there is, for suggestions.
const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "src",
    "target",
    "dst",
    "destination",
    "readonly",
    "ro",
    "readwrite",
    "rw",
    "required",
    "size",
    "id",
    "sharing",
    "mode",
    "uid",
    "gid",
    "env",
];

/// One `--mount` as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunMount {
    /// The flag's value, for messages.
    pub text: String,
    /// `from`: a stage or an image, already told apart. `None` is the build context for a bind mount, and an empty
    /// directory for a cache.
    pub from: Option<CopyFrom>,
    /// The other fields, in order; a field without `=` has no value.
    fields: Vec<(String, Option<String>)>,
}

/// A `--mount` with its values expanded and its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// What is mounted.
    pub kind: MountKind,
    /// Where, as written: relative to the working directory, which is also what an empty one means. `None` only for
    /// secrets that are a variable, and for sockets, whose place is then the executor's choice.
    pub target: Option<String>,
}

/// What a [`Mount`] brings into a step.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MountKind {
    /// Files of [`RunMount::from`], or of the context. What a step writes there is thrown away.
    Bind {
        /// Which file or directory of it; empty is all.
        source: String,
        /// Default true.
        read_only: bool,
    },
    /// A directory that outlives the step.
    Cache {
        /// What the caches of two steps must have in common to be one. Default: the target, cleaned.
        id: String,
        /// Who may use it at a time. Default shared.
        sharing: Sharing,
        /// Which directory of [`RunMount::from`] a new cache begins with; empty is all.
        source: String,
        /// Default false.
        read_only: bool,
        /// Of a new cache's directory. Default: those of what it begins with, or 0755 and root.
        permissions: Permissions,
    },
    /// An empty directory in memory.
    Tmpfs {
        /// Its limit; `None` is the kernel's own.
        size_bytes: Option<u64>,
        /// Default false.
        read_only: bool,
    },
    /// A secret of the build, as a file at the target, a variable, or both.
    Secret {
        /// Which. Default: the last component of the target.
        id: String,
        /// The variable that it is in.
        env: Option<String>,
        /// Whether its absence is an error. Default false.
        required: bool,
        /// Of the file. Default: 0400 and root.
        permissions: Permissions,
    },
    /// The socket of an SSH agent.
    Ssh {
        /// Which of those that the build was given. Default `default`.
        id: String,
        /// Whether its absence is an error. Default false.
        required: bool,
        /// Of the socket. Default: 0600 and root.
        permissions: Permissions,
    },
}

/// Mode and owner, as far as they are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Permissions {
    /// `mode`, octal as `chmod` takes it.
    pub mode: Option<u32>,
    /// `uid`
    pub uid: Option<u32>,
    /// `gid`
    pub gid: Option<u32>,
}

/// How steps that run at once use one cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// All at once.
    #[default]
    Shared,
    /// Each its own: a new one where it is taken.
    Private,
    /// One after the other.
    Locked,
}

/// `RUN --network`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunNetwork {
    /// Whatever steps have.
    #[default]
    Default,
    /// Loopback only.
    None,
    /// The host's.
    Host,
}

/// `RUN --security`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunSecurity {
    /// As a container.
    #[default]
    Sandbox,
    /// With every capability: only if whoever builds allows it.
    Insecure,
}

/// Why a `--mount` means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct MountError {
    /// The part that is wrong, as written.
    pub focus: String,
    /// What is wrong with it, and what is expected.
    pub why: String,
}

fn wrong<T>(focus: impl Into<String>, why: impl Into<String>) -> Result<T, MountError> {
    Err(MountError { focus: focus.into(), why: why.into() })
}

/// What `type` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

impl Type {
    const NAMES: [(&'static str, Self); 5] = [
        ("bind", Self::Bind),
        ("cache", Self::Cache),
        ("tmpfs", Self::Tmpfs),
        ("secret", Self::Secret),
        ("ssh", Self::Ssh),
    ];

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

impl RunMount {
    /// Parses the flag's value. `from` is told apart later, when all stages are known.
    pub(super) fn parse(text: &str) -> Result<Self, MountError> {
        let mut mount = Self { text: text.to_owned(), from: None, fields: Vec::new() };
        for field in csv_fields(text).map_err(|why| MountError { focus: text.to_owned(), why })? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_ascii_lowercase(), Some(value.to_owned())),
                None => (field.to_ascii_lowercase(), None),
            };
            match (key.as_str(), value) {
                ("from", Some(value)) => {
                    // Which stages a step needs is decided before anything is expanded.
                    if value.contains('$') {
                        return wrong(value, FROM_IS_FIXED);
                    }
                    mount.from = (!value.is_empty()).then_some(CopyFrom::Image(value));
                }
                (_, value) => mount.fields.push((key, value)),
            }
        }
        if !text.contains('$') {
            mount.resolve(&mut |value| Ok(value.to_owned()))?;
        }
        Ok(mount)
    }

    /// Expands the values and fills in the defaults.
    ///
    /// # Errors
    /// [`MountError`]: an unknown key or type, a value that its key does not take, a key that its type does not take.
    pub fn resolve(&self, expand: &mut dyn FnMut(&str) -> Result<String, WordError>) -> Result<Mount, MountError> {
        let mut fields = Vec::new();
        for (key, value) in &self.fields {
            let value = match value {
                Some(value) => Some(expand(value).map_err(|e| MountError { focus: value.clone(), why: e.why })?),
                None => None,
            };
            fields.push((key.as_str(), value));
        }
        let mut kind = Type::Bind;
        for (_, value) in fields.iter().filter(|(key, _)| *key == "type") {
            let Some(value) = value else { return wrong("type", "type requires a value: type=cache") };
            let lower = value.to_ascii_lowercase();
            let Some((_, found)) = Type::NAMES.iter().find(|(name, _)| *name == lower) else {
                let hint = match suggest(&lower, Type::NAMES.map(|(name, _)| name)) {
                    Some(known) => format!(" (did you mean {known}?)"),
                    None => " (there are bind, cache, tmpfs, secret and ssh)".to_owned(),
                };
                return wrong(value, format!("unknown mount type {value:?}{hint}"));
            };
            kind = *found;
        }
        let mut given = Given::default();
        for (key, value) in fields {
            given.take(kind, key, value)?;
        }
        given.finish(kind, self)
    }
}

/// The message for variables where stages are named.
pub(super) const FROM_IS_FIXED: &str =
    "variables are not expanded in from: name a stage with FROM … AS, and use its name";

/// The fields of one mount.
#[derive(Default)]
struct Given {
    source: String,
    target: String,
    id: String,
    env: Option<String>,
    read_only: Option<bool>,
    required: bool,
    size_bytes: Option<u64>,
    sharing: Option<Sharing>,
    permissions: Permissions,
}

impl Given {
    fn take(&mut self, kind: Type, key: &str, value: Option<String>) -> Result<(), MountError> {
        let only = |kinds: &[Type]| match kinds.contains(&kind) {
            true => Ok(()),
            false => {
                let kinds: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
                wrong(key, format!("{key} is for mounts of type {} only, not {}", kinds.join(" and "), kind.name()))
            }
        };
        let flag = |value: Option<&str>| match value {
            None => Ok(true),
            // As Go's strconv.ParseBool.
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
            Some(other) => wrong(key, format!("{key} requires true or false, not {other:?}")),
        };
        let number = |value: &str, radix| match u32::from_str_radix(value, radix) {
            Ok(number) if !value.starts_with('+') => Ok(number),
            _ if radix == 8 => wrong(key, format!("{key} requires an octal number like 0755, not {value:?}")),
            _ => wrong(key, format!("{key} requires a number, not {value:?}")),
        };
        match key {
            "readonly" | "ro" => {
                self.read_only = Some(flag(value.as_deref())?);
                return Ok(());
            }
            "readwrite" | "rw" => {
                self.read_only = Some(!flag(value.as_deref())?);
                return Ok(());
            }
            "required" => {
                only(&[Type::Secret, Type::Ssh])?;
                self.required = flag(value.as_deref())?;
                return Ok(());
            }
            _ => {}
        }
        if !KEYS.contains(&key) {
            let hint = suggest(key, KEYS);
            let hint = hint.map(|known| format!(" (did you mean {known}?)")).unwrap_or_default();
            return wrong(key, format!("unknown key {key:?} in --mount{hint}"));
        }
        let Some(value) = value else { return wrong(key, format!("{key} requires a value: {key}=…")) };
        match key {
            "source" | "src" => self.source = value,
            "target" | "dst" | "destination" => self.target = value,
            "id" => self.id = value,
            "env" => {
                only(&[Type::Secret])?;
                self.env = Some(value);
            }
            "size" => {
                only(&[Type::Tmpfs])?;
                let Some(bytes) = ram_bytes(&value) else {
                    return wrong(key, format!("size requires a size like 64m or 1.5g, not {value:?}"));
                };
                self.size_bytes = (bytes > 0).then_some(bytes);
            }
            "sharing" => {
                only(&[Type::Cache])?;
                self.sharing = Some(match value.to_ascii_lowercase().as_str() {
                    "shared" => Sharing::Shared,
                    "private" => Sharing::Private,
                    "locked" => Sharing::Locked,
                    _ => return wrong(key, format!("sharing is shared, private or locked, not {value:?}")),
                });
            }
            "mode" | "uid" | "gid" => {
                only(&[Type::Cache, Type::Secret, Type::Ssh])?;
                match key {
                    "mode" => self.permissions.mode = Some(number(&value, 8)?),
                    "uid" => self.permissions.uid = Some(number(&value, 10)?),
                    _ => self.permissions.gid = Some(number(&value, 10)?),
                }
            }
            // `type`, which is known by now.
            _ => {}
        }
        Ok(())
    }

    fn finish(self, kind: Type, mount: &RunMount) -> Result<Mount, MountError> {
        let Self { source, target, id, env, read_only, required, size_bytes, sharing, permissions } = self;
        if mount.from.is_some() && !matches!(kind, Type::Bind | Type::Cache) {
            return wrong(
                "from",
                format!("a {} mount takes nothing from anywhere: from is for bind and cache", kind.name()),
            );
        }
        let (kind, target) = match kind {
            Type::Bind => (MountKind::Bind { source, read_only: read_only.unwrap_or(true) }, Some(target)),
            Type::Cache => {
                let id = if id.is_empty() { clean(&target) } else { id };
                let (sharing, read_only) = (sharing.unwrap_or_default(), read_only.unwrap_or(false));
                (MountKind::Cache { id, sharing, source, read_only, permissions }, Some(target))
            }
            Type::Tmpfs => (MountKind::Tmpfs { size_bytes, read_only: read_only.unwrap_or(false) }, Some(target)),
            Type::Secret => {
                if !source.is_empty() && !id.is_empty() {
                    return wrong(&mount.text, "source and id of a secret mean the same: give one of them");
                }
                // As in BuildKit, where `source` is the older word for `id`.
                let id = [source, id, last_component(&target).to_owned()].into_iter().find(|id| !id.is_empty());
                let Some(id) = id else {
                    return wrong(&mount.text, "a secret mount requires an id or a target: --mount=type=secret,id=…");
                };
                let target = match (target.is_empty(), &env) {
                    (false, _) => Some(target),
                    (true, Some(_)) => None,
                    (true, None) => Some(format!("{SECRETS_DIR}/{}", last_component(&id))),
                };
                (MountKind::Secret { id, env, required, permissions }, target)
            }
            Type::Ssh => {
                let id = if id.is_empty() { SSH_ID.to_owned() } else { id };
                (MountKind::Ssh { id, required, permissions }, Some(target).filter(|target| !target.is_empty()))
            }
        };
        Ok(Mount { kind, target })
    }
}

impl RunNetwork {
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "default" => Self::Default,
            "none" => Self::None,
            "host" => Self::Host,
            _ => return None,
        })
    }
}

impl RunSecurity {
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "sandbox" => Self::Sandbox,
            "insecure" => Self::Insecure,
            _ => return None,
        })
    }
}

impl super::Dockerfile {
    /// The error of a mount, at the line that it stands on.
    pub fn mount_error(&self, at: super::Location, error: &MountError) -> DockerfileError {
        self.error(at, &error.focus, error.why.clone())
    }
}

/// One line of comma-separated values: a field in double quotes may hold commas, and `""` for a quote.
fn csv_fields(line: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut field = String::new();
            let mut tail = quoted;
            loop {
                let Some((text, after)) = tail.split_once('"') else {
                    return Err("a double quote (\") in --mount is not closed".to_owned());
                };
                field.push_str(text);
                match after.strip_prefix('"') {
                    Some(more) => {
                        field.push('"');
                        tail = more;
                    }
                    None => {
                        tail = after;
                        break;
                    }
                }
            }
            fields.push(field);
            match tail.strip_prefix(',') {
                Some(next) => rest = next,
                None if tail.is_empty() => return Ok(fields),
                None => return Err("a comma is expected behind a quoted field of --mount".to_owned()),
            }
        } else {
            let (field, next) = rest.split_once(',').map_or((rest, None), |(field, next)| (field, Some(next)));
            if field.contains('"') {
                return Err("a double quote (\") in --mount can only stand around a whole field".to_owned());
            }
            fields.push(field.to_owned());
            match next {
                Some(next) => rest = next,
                None => return Ok(fields),
            }
        }
    }
}

/// A size as docker's `--shm-size` takes it: a number, perhaps with a fraction, and a unit of 1,024 bytes or a power of
/// that (docker/go-units, `RAMInBytes`). `None` for anything else.
pub fn ram_bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
    let power = match unit {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * 1024f64.powi(power);
    // Above this, whole bytes are no longer exact; no memory is that large.
    (bytes < 2f64.powi(53)).then_some(bytes as u64)
}

/// Go's `path.Clean`.
fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(last) if *last != ".." => drop(parts.pop()),
                _ if rooted => {}
                _ => parts.push(part),
            },
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

fn last_component(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Mount {
        let mount = RunMount::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        mount.resolve(&mut |value| Ok(value.replace("$V", "v"))).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn at(target: &str) -> Option<String> {
        Some(target.to_owned())
    }

    #[test]
    fn mounts_have_the_defaults_of_the_reference() {
        let none = Permissions::default();
        let bind = |source: &str, read_only| MountKind::Bind { source: source.into(), read_only };
        assert_eq!(mount("target=/t"), Mount { kind: bind("", true), target: at("/t") });
        assert_eq!(mount("type=bind,src=a,dst=t,rw"), Mount { kind: bind("a", false), target: at("t") });
        assert_eq!(mount("source=a,destination=t,ro=false").kind, bind("a", false));
        assert_eq!(mount("source=a,dst=t,readwrite=false").kind, bind("a", true));
        let cache = |id: &str, sharing, permissions| MountKind::Cache {
            id: id.into(),
            sharing,
            source: String::new(),
            read_only: false,
            permissions,
        };
        assert_eq!(mount("TYPE=Cache,target=/a/../b/").kind, cache("/b", Sharing::Shared, none));
        let permissions = Permissions { mode: Some(0o700), uid: Some(1), gid: Some(2) };
        assert_eq!(
            mount("type=cache,id=x-$V,target=/t,sharing=Locked,mode=0700,uid=1,gid=2").kind,
            cache("x-v", Sharing::Locked, permissions)
        );
        assert_eq!(mount("type=cache,target=t,sharing=private").kind, cache("t", Sharing::Private, none));
        let tmpfs = |size_bytes| MountKind::Tmpfs { size_bytes, read_only: false };
        assert_eq!(mount("type=tmpfs,target=/t,size=1.5m").kind, tmpfs(Some(3 << 19)));
        assert_eq!(mount("type=tmpfs,target=/t").kind, tmpfs(None));
        let secret = |id: &str, env: Option<&str>, required| MountKind::Secret {
            id: id.into(),
            env: env.map(str::to_owned),
            required,
            permissions: none,
        };
        assert_eq!(mount("type=secret,id=s"), Mount { kind: secret("s", None, false), target: at("/run/secrets/s") });
        assert_eq!(mount("type=secret,id=a/b").target, at("/run/secrets/b"));
        assert_eq!(mount("type=secret,dst=/x/y").kind, secret("y", None, false));
        assert_eq!(
            mount("type=secret,id=s,env=E,required"),
            Mount { kind: secret("s", Some("E"), true), target: None }
        );
        assert_eq!(mount("required=true,type=secret,src=s,env=E,target=/f").target, at("/f"));
        let ssh = |id: &str| MountKind::Ssh { id: id.into(), required: false, permissions: none };
        assert_eq!(mount("type=ssh"), Mount { kind: ssh("default"), target: None });
        assert_eq!(mount("type=ssh,id=k,target=/s"), Mount { kind: ssh("k"), target: at("/s") });
        assert_eq!(mount("type=secret,\"id=a,b\"").kind, secret("a,b", None, false));
    }

    #[test]
    fn mistakes_in_mounts_are_told() {
        for (text, why) in [
            ("type=chache,target=/t", "unknown mount type \"chache\" (did you mean cache?)"),
            ("target=/t,sorce=a", "unknown key \"sorce\" in --mount (did you mean source?)"),
            ("target=/t,bind-propagation=rshared", "unknown key"),
            ("target", "target requires a value"),
            ("type", "type requires a value"),
            ("target=/t,ro=maybe", "ro requires true or false, not \"maybe\""),
            ("target=/t,required", "required is for mounts of type secret and ssh only, not bind"),
            ("target=/t,size=1", "size is for mounts of type tmpfs only"),
            ("type=tmpfs,target=/t,size=big", "size requires a size"),
            ("target=/t,sharing=locked", "sharing is for mounts of type cache only"),
            ("type=cache,target=/t,sharing=mine", "sharing is shared, private or locked"),
            ("target=/t,mode=755", "mode is for mounts of type cache and secret and ssh only"),
            ("type=cache,target=/t,mode=9", "mode requires an octal number"),
            ("type=cache,target=/t,uid=me", "uid requires a number"),
            ("type=cache,target=/t,env=E", "env is for mounts of type secret only"),
            ("type=secret", "a secret mount requires an id or a target"),
            ("type=secret,id=a,src=b", "source and id of a secret mean the same"),
            ("type=secret,id=a,from=x", "a secret mount takes nothing from anywhere"),
            ("type=bind,from=$X,target=/t", "variables are not expanded in from"),
            ("type=secret,\"id=a", "a double quote (\") in --mount is not closed"),
            ("type=secret,id=\"a\"", "a double quote (\") in --mount can only stand"),
        ] {
            let error = RunMount::parse(text).unwrap_err();
            assert!(error.to_string().starts_with(why), "{text}: {error}");
            assert!(text.contains(&error.focus), "{text}: {}", error.focus);
        }
        // What holds variables is tried when they are known.
        let late = RunMount::parse("type=$T,target=/t").unwrap();
        assert!(late.resolve(&mut |value| Ok(value.replace("$T", "none"))).is_err());
        assert!(late.resolve(&mut |value| Ok(value.replace("$T", "tmpfs"))).is_ok());
    }

    #[test]
    fn sizes_of_memory() {
        for (text, bytes) in
            [("0", Some(0)), ("64", Some(64)), ("1k", Some(1024)), ("2MiB", Some(2 << 20)), ("1.5 gb", Some(3 << 29))]
        {
            assert_eq!(ram_bytes(text), bytes, "{text}");
        }
        for bad in ["", "m", "1x", "-1", ".5m", "1e3", "9999999p", "1..2"] {
            assert_eq!(ram_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn cleaned_as_go_cleans() {
        for (path, expected) in
            [("", "."), ("/", "/"), ("/..", "/"), ("a/../..", ".."), ("/a//b/.", "/a/b"), ("./x", "x")]
        {
            assert_eq!(clean(path), expected, "{path}");
        }
    }
}
