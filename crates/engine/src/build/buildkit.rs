//! What BuildKit's solver calls a step, so that the results of an imported cache are found.
//!
//! BuildKit knows a result by keys, and by the steps that lead from the keys of a step's inputs to it ([`Link`]). A step's
//! digest is that of its definition as JSON; a copy's source is known by the digest of its content. Both are made here from
//! the Dockerfile as BuildKit makes them, and looked up among the links that `ply import buildkit` brought.
//!
//! That can only fail one way: what is written down differently by some version of BuildKit has another digest, is not
//! found, and is done again. A digest that is found says everything that BuildKit itself goes by: arguments, variables,
//! directory, user, mounts, and the bytes that are copied. What is not lowered here in just BuildKit's way has no digest:
//! other owners, several sources, here-documents, bind mounts.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use plies_cache::{CacheKey, ImmutableRef, Link, Parents, RecordOptions, State};
use plies_import::buildkit::key;
use plies_oci::{BlobDigest, ChainId, Platform};
use serde::Serialize;

use super::RunOptions;
use super::config::DEFAULT_PATH;
use super::graph::{CopyOp, MountOp, RunOp};
use super::solve::{SolveError, Solved, Solver};
use crate::context::{Selection, Tree};
use crate::dockerfile::{MountKind, Permissions, RunNetwork, Sharing};

/// No input, in BuildKit's definitions.
const NONE: i64 = -1;

/// `timestamp` and `mode` of a copy that leaves them as they are.
const AS_IT_IS: i64 = -1;

/// What BuildKit knows a step by.
pub(super) struct Asked {
    /// Digests of its definition, as different versions have written it.
    digests: Vec<BlobDigest>,
    /// The number of the input that the step's tree stands on, if it stands on one.
    base: Option<u32>,
    /// The number of the input that files are taken from, and the key of their content.
    content: Option<(u32, CacheKey)>,
}

#[derive(Serialize)]
struct Exec<'a> {
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(rename = "Exec")]
    exec: ExecOp<'a>,
    #[serde(rename = "OS")]
    os: &'a str,
    #[serde(rename = "Arch")]
    arch: &'a str,
}

#[derive(Serialize)]
struct ExecOp<'a> {
    meta: Meta<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<ExecMount<'a>>,
    /// 1 is the host's, 2 none.
    #[serde(skip_serializing_if = "is_zero")]
    network: i64,
}

#[derive(Serialize)]
struct Meta<'a> {
    args: &'a [String],
    env: Vec<String>,
    cwd: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    user: &'a str,
    /// Since 0.10 (2022).
    #[serde(rename = "removeMountStubsRecursive", skip_serializing_if = "is_false")]
    remove_stubs: bool,
}

#[derive(Serialize, Default)]
#[serde(rename_all = "camelCase")]
struct ExecMount<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    input: i64,
    dest: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    output: i64,
    /// 1 is a secret, 3 a cache, 4 memory.
    #[serde(skip_serializing_if = "is_zero")]
    mount_type: i64,
    #[serde(rename = "TmpfsOpt", skip_serializing_if = "Option::is_none")]
    tmpfs: Option<Tmpfs>,
    #[serde(rename = "cacheOpt", skip_serializing_if = "Option::is_none")]
    cache: Option<Cache>,
    #[serde(rename = "secretOpt", skip_serializing_if = "Option::is_none")]
    secret: Option<Secret<'a>>,
}

#[derive(Serialize)]
struct Tmpfs {
    #[serde(skip_serializing_if = "is_zero")]
    size: i64,
}

#[derive(Serialize)]
struct Cache {
    #[serde(rename = "ID")]
    id: String,
    #[serde(skip_serializing_if = "is_zero")]
    sharing: i64,
}

#[derive(Serialize)]
struct Secret<'a> {
    #[serde(rename = "ID")]
    id: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    uid: i64,
    #[serde(skip_serializing_if = "is_zero")]
    gid: i64,
    mode: u32,
    #[serde(skip_serializing_if = "is_false")]
    optional: bool,
}

#[derive(Serialize)]
struct FileOp {
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(rename = "Actions")]
    actions: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    indexes: Vec<[i64; 3]>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CopyAction<'a> {
    src: &'a str,
    dest: &'a str,
    mode: i64,
    follow_symlink: bool,
    dir_copy_contents: bool,
    #[serde(skip_serializing_if = "is_false")]
    attempt_unpack_docker_compatibility: bool,
    create_dest_path: bool,
    allow_wildcard: bool,
    allow_empty_wildcard: bool,
    timestamp: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MkdirAction<'a> {
    path: &'a str,
    mode: i64,
    make_parents: bool,
    timestamp: i64,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// JSON as Go's library writes it: safe to stand in a page of HTML.
fn go_json(value: &impl Serialize) -> String {
    let json = serde_json::to_string(value).expect("because text and numbers are always JSON");
    let escape = |c: char| match c {
        '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    json.chars().map(escape).collect()
}

fn digest(value: &impl Serialize) -> BlobDigest {
    BlobDigest::of(go_json(value).as_bytes())
}

/// The digests of a file operation with one action: versions differ in whether they say which input is which. Those of
/// the usual ones never do.
fn file_digests(action: &impl Serialize, indexes: [i64; 3]) -> Vec<BlobDigest> {
    let with =
        |indexes| digest(&FileOp { kind: "buildkit.file.v0", actions: vec![BASE64.encode(go_json(action))], indexes });
    let is_usual = indexes[0] == 0;
    [vec![], vec![indexes]].into_iter().take(if is_usual { 1 } else { 2 }).map(with).collect()
}

/// The key of a digest that stands for itself, at one of its outputs; of content that is none.
fn root_key(digest: &str, output: i64) -> CacheKey {
    key(&BlobDigest::of(format!("{digest}@{output}").as_bytes()).to_string())
}

impl Asked {
    /// By what BuildKit knows a process; `None` for what is not lowered in its way.
    pub(super) fn of_run(run: &RunOp, options: &RunOptions) -> Option<Self> {
        if run.invocation.script.is_some() || *options != RunOptions::default() {
            return None;
        }
        let mut env: Vec<String> = run.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !run.env.iter().any(|(name, _)| name == "PATH") {
            env.insert(0, format!("PATH={DEFAULT_PATH}"));
        }
        let platform = Platform::host();
        let of = |remove_stubs: bool| {
            let meta = Meta {
                args: &run.invocation.argv,
                env: env.clone(),
                cwd: &run.working_dir,
                user: &run.user,
                remove_stubs,
            };
            let network = match run.network {
                RunNetwork::Default => 0,
                RunNetwork::Host => 1,
                RunNetwork::None => 2,
            };
            let exec = ExecOp { meta, mounts: mounts_of(&run.mounts)?, network };
            let (os, arch) = (platform.os.as_str(), platform.architecture.as_str());
            Some(digest(&Exec { kind: "buildkit.exec.v0", exec, os, arch }))
        };
        Some(Self { digests: vec![of(true)?, of(false)?], base: Some(0), content: None })
    }

    /// By what BuildKit knows a directory that is made.
    pub(super) fn of_directory(path: &str, user: &str) -> Option<Self> {
        let action = MkdirAction { path, mode: 0o755, make_parents: true, timestamp: AS_IT_IS };
        let digests = file_digests(&action, [0, NONE, 0]);
        ["", "root", "0"].contains(&user).then_some(Self { digests, base: Some(0), content: None })
    }

    /// By what BuildKit knows a copy of one source, onto nothing or onto a tree.
    pub(super) fn of_copy(
        copy: &CopyOp,
        on_nothing: bool,
        source: (&Tree, &Selection),
    ) -> Result<Option<Self>, SolveError> {
        let [part] = copy.parts.as_slice() else { return Ok(None) };
        let [path] = part.paths.as_slice() else { return Ok(None) };
        let is_plain = part.inline.is_empty() && !part.parents && copy.excludes.is_empty() && copy.chown.is_none();
        let has_pattern = path.contains(['*', '?', '[', '\\']);
        let mode = match copy.chmod.as_deref() {
            None => Some(AS_IT_IS),
            Some(mode) => i64::from_str_radix(mode, 8).ok(),
        };
        let (Some(mode), true, false) = (mode, is_plain, has_pattern) else { return Ok(None) };
        let Some(content) = source.0.content_digest(source.1)? else { return Ok(None) };
        let mut components = path.split('/').filter(|part| !part.is_empty() && *part != ".");
        let action = CopyAction {
            src: components.next_back().unwrap_or("/"),
            dest: &copy.dest,
            mode,
            follow_symlink: true,
            dir_copy_contents: true,
            attempt_unpack_docker_compatibility: part.unpack,
            create_dest_path: true,
            allow_wildcard: true,
            allow_empty_wildcard: true,
            timestamp: AS_IT_IS,
        };
        let digests = file_digests(&action, if on_nothing { [NONE, 0, 0] } else { [0, 1, 0] });
        // One digest for each source that is taken; here there is one.
        let content = root_key(&BlobDigest::of(content.to_string().as_bytes()).to_string(), NONE);
        let (base, input) = if on_nothing { (None, 0) } else { (Some(0), 1) };
        Ok(Some(Self { digests, base, content: Some((input, content)) }))
    }
}

/// The mounts of a process; none if there is nothing but its own tree, and `None` if one is not lowered in BuildKit's way.
fn mounts_of(mounts: &[MountOp]) -> Option<Vec<ExecMount<'_>>> {
    if mounts.is_empty() {
        return Some(Vec::new());
    }
    let mut all = vec![ExecMount { dest: "/", ..ExecMount::default() }];
    let mut secrets = Vec::new();
    for mount in mounts {
        let dest = mount.target.as_deref()?;
        let alone = ExecMount { input: NONE, dest, output: NONE, ..ExecMount::default() };
        match &mount.kind {
            MountKind::Cache { id, sharing, source, read_only: false, permissions }
                if mount.from.is_none() && source.is_empty() && *permissions == Permissions::default() =>
            {
                let sharing = match sharing {
                    Sharing::Shared => 0,
                    Sharing::Private => 1,
                    Sharing::Locked => 2,
                };
                all.push(ExecMount { mount_type: 3, cache: Some(Cache { id: format!("/{id}"), sharing }), ..alone });
            }
            MountKind::Tmpfs { size_bytes, read_only: false } => {
                let size = i64::try_from(size_bytes.unwrap_or(0)).ok()?;
                all.push(ExecMount { mount_type: 4, tmpfs: Some(Tmpfs { size }), ..alone });
            }
            MountKind::Secret { id, env: None, required, permissions } => {
                let (uid, gid) = (permissions.uid.unwrap_or(0).into(), permissions.gid.unwrap_or(0).into());
                let mode = permissions.mode.unwrap_or(0o400);
                let secret = Some(Secret { id, uid, gid, mode, optional: !required });
                secrets.push(ExecMount { output: 0, mount_type: 1, secret, ..alone });
            }
            _ => return None,
        }
    }
    all.sort_by_key(|mount| mount.dest);
    all.extend(secrets);
    Some(all)
}

impl Solver<'_> {
    /// The record that an imported cache has for a step on this base.
    pub(super) fn imported(&self, base: &Solved, asked: &Asked) -> Result<Option<ImmutableRef>, SolveError> {
        let below = base.tree.as_ref().map_or(Parents::None, |tree| Parents::Layer(tree.id()));
        let mut base_keys = match &base.tree {
            Some(tree) => self.cache.keys_of(tree.id())?,
            None => Vec::new(),
        };
        if base.layers.is_empty()
            && let Some(chain) = ChainId::of(&base.base_diff_ids)
        {
            // BuildKit knows an image by its layers, too.
            let source = BlobDigest::of(format!("buildkit.source.v0:{chain}").as_bytes());
            base_keys.push(root_key(&source.to_string(), 0));
        }
        // Of a process BuildKit says since 0.9 that it looks at all of its tree.
        let selectors = [String::new(), BlobDigest::of(b"/").to_string()];
        for digest in &asked.digests {
            let link =
                |input: u32, selector: &String| Link { digest: *digest, input, output: 0, selector: selector.clone() };
            let mut found: Option<BTreeSet<CacheKey>> = None;
            if let Some(input) = asked.base {
                let mut leads = BTreeSet::new();
                for key in &base_keys {
                    for selector in &selectors {
                        leads.extend(self.cache.links(key, &link(input, selector))?);
                    }
                }
                found = Some(leads);
            }
            if let Some((input, key)) = &asked.content {
                let leads: BTreeSet<_> = self.cache.links(key, &link(*input, &selectors[0]))?.into_iter().collect();
                found = Some(found.map_or_else(|| leads.clone(), |found| &found & &leads));
            }
            for key in found.into_iter().flatten() {
                if let Some(tree) = self.result_on(&below, &key)? {
                    return Ok(Some(tree));
                }
            }
        }
        Ok(None)
    }

    /// The same for a copy with `--link` and `--chmod`, which BuildKit makes on the tree `under` it: its layer, on nothing.
    /// It holds where it was found, and no further: its directories look as `under` had them.
    pub(super) fn imported_under(&self, under: &Solved, asked: &Asked) -> Result<Option<ImmutableRef>, SolveError> {
        let Some(tree) = self.imported(under, asked)? else { return Ok(None) };
        let State::Sealed { layer: Some(layer) } = tree.row()?.state else { return Ok(None) };
        let Some(diff_id) = self.engine.store().layers().info(layer)?.diff_id else { return Ok(None) };
        Ok(self.cache.get_by_diff_id(diff_id, None, &RecordOptions::by("build"))?)
    }
}
