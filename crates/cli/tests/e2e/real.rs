//! Builds as people run them every day: packages of a distribution, a compiler, Python with pip, Node with npm.
//!
//! The only tests that fetch anything from outside: from the mirror, the package index and the registry that this
//! machine is configured for.

use std::{env, ffi::OsString, fmt::Write as _, fs, path::Path, process::Command};

use plies_testkit::{args, ply::Ply, tools};

use crate::common::{Built, Context, Step, store};

/// Stages that need nothing of each other: they are built at the same time.
const DOCKERFILE: &str = r#"FROM scratch AS base
ADD base.tar /
ENV DEBIAN_FRONTEND=noninteractive
COPY apt/sources.list /etc/apt/sources.list
COPY apt/machine.conf /etc/apt/apt.conf.d/99machine
RUN apt-get -q update

FROM base AS compiled
RUN apt-get -q -y install --no-install-recommends gcc libc6-dev && apt-get clean
COPY hello.h hello.c /src/
RUN gcc -O2 -static -o /hello /src/hello.c

FROM scratch AS hello
COPY --from=compiled /hello /hello
ENTRYPOINT ["/hello"]

FROM base AS python
RUN apt-get -q -y install --no-install-recommends python3 python3-pip && apt-get clean
WORKDIR /app
COPY python/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=settings --mount=type=secret,id=authorities \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    . /run/secrets/settings && export PIP_CERT=/run/secrets/authorities && \
    pip install --break-system-packages --disable-pip-version-check --root-user-action ignore -r requirements.txt && \
    echo once >> /root/.cache/pip/times && echo "installed $(wc -l < /root/.cache/pip/times) times with this cache"
COPY python/app.py ./
CMD ["python3", "/app/app.py"]

FROM base AS node
RUN apt-get -q -y install --no-install-recommends nodejs npm && apt-get clean
WORKDIR /app
COPY node/package.json ./
RUN --mount=type=cache,target=/root/.npm --mount=type=secret,id=settings --mount=type=secret,id=authorities \
    --mount=type=secret,id=npm,target=/root/.npmrc \
    . /run/secrets/settings && export NODE_EXTRA_CA_CERTS=/run/secrets/authorities && \
    npm install --no-audit --no-fund --no-update-notifier
COPY node/app.js ./
CMD ["node", "/app/app.js"]

FROM scratch AS all
COPY --from=hello / /hello/
COPY --from=python /app /python/
COPY --from=node /app /node/
"#;

/// Where Debian keeps the certificates of all authorities that the machine trusts.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Debian's own archives among this machine's package sources, as lines of a sources.list; and the mirror and suite of
/// the first, which the base is made from.
fn sources() -> (String, String, String) {
    let format = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)";
    let listed = tools::run(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]));
    let mut lines = String::new();
    let mut first = None;
    for line in listed.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let ["Debian", mirror, suite, component] = fields[..] else { continue };
        first.get_or_insert_with(|| (mirror.to_owned(), suite.to_owned()));
        writeln!(lines, "deb {mirror} {suite} {component}").unwrap();
    }
    let (mirror, suite) = first.expect("apt knows no archive of Debian: apt-get update");
    (lines, mirror, suite)
}

/// A minimal Debian, as a tar.
fn debootstrap(ply: &Ply, tar: &Path, mirror: &str, suite: &str) {
    let root = ply.scratch().join("base");
    tools::run(
        Command::new("debootstrap")
            .args(["--variant=minbase", "--include=ca-certificates", suite])
            .arg(&root)
            .arg(mirror),
    );
    tools::run(
        Command::new("tar")
            .args(["--numeric-owner", "--xattrs", "--exclude=./dev/*", "--exclude=./var/cache/apt/*", "-C"])
            .arg(&root)
            .arg("-cf")
            .arg(tar)
            .arg("."),
    );
    fs::remove_dir_all(root).unwrap();
}

/// What this machine's user has set for pip, npm and proxies, as a file for a shell to read.
fn settings() -> String {
    let names = [
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_TRUSTED_HOST",
        "NPM_CONFIG_REGISTRY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    ];
    let set = names.into_iter().filter_map(|name| Some((name, env::var(name).ok()?)));
    set.map(|(name, value)| format!("export {name}='{}'\n", value.replace('\'', r"'\''"))).collect()
}

/// The options with which the machine's settings reach the steps that need them, and no layer.
fn secrets(ply: &Ply) -> Vec<OsString> {
    let home = env::var("HOME").unwrap_or_default();
    let empty = ply.scratch().file("empty", "");
    let machine_s = |path: String| if Path::new(&path).exists() { path.into() } else { empty.clone() };
    let settings = ply.scratch().file("settings", settings());
    let files = [
        ("settings", settings),
        ("authorities", AUTHORITIES.into()),
        ("pip", machine_s("/etc/pip.conf".to_owned())),
        ("npm", machine_s(format!("{home}/.npmrc"))),
    ];
    let option =
        |(id, path): (&str, std::path::PathBuf)| args!["--secret", format!("id={id},src={}", path.display())].to_vec();
    files.into_iter().flat_map(option).collect()
}

/// The instructions that were carried out, without the number of the stage.
fn ran(built: &Built) -> Vec<String> {
    let steps = built.instructions().into_iter().filter(|(_, step)| *step == Step::Ran);
    let short = |name: String| {
        let instruction = name.split_once("] ").map_or(name.as_str(), |(_, rest)| rest).to_owned();
        instruction.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
    };
    let mut ran: Vec<String> = steps.map(|(name, _)| short(name)).collect();
    ran.sort();
    ran
}

#[test]
fn compilers_pip_and_npm_work_and_only_what_depends_on_a_change_runs_again() {
    if !tools::have(&["debootstrap", "apt-get"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, DOCKERFILE);
    let (lines, mirror, suite) = sources();
    context.file("apt/sources.list", lines);
    // Proxies, and how old an index may be: what a mirror needs, wherever the package files come from.
    context.file("apt/machine.conf", tools::run(Command::new("apt-config").args(["dump", "Acquire"])));
    context.file("hello.h", "#define WHOM \"the compiler\"\n");
    context.file(
        "hello.c",
        "#include <stdio.h>\n#include \"hello.h\"\nint main(void) { puts(\"hello from \" WHOM); return 0; }\n",
    );
    context.file("python/requirements.txt", "toolz==0.12.1\n");
    context.file("python/app.py", "import toolz\nprint('hello from toolz', toolz.__version__)\n");
    context.file("node/package.json", r#"{"name": "app", "version": "1.0.0", "dependencies": {"ms": "2.1.3"}}"#);
    context.file("node/app.js", "console.log('hello from ms', require('ms')(60000));\n");
    debootstrap(&ply, &context.dir.join("base.tar"), &mirror, &suite);

    let secrets = secrets(&ply);
    let build = |target: &str, more: &[OsString]| {
        let name = format!("localhost/{target}");
        context.build(&[args!["--target", target, "-t", name], more, &secrets].concat())
    };
    let first = build("all", &[]);
    assert!(first.instructions().iter().all(|(_, step)| *step == Step::Ran), "{}", first.ran);
    let says = |target: &str, expected: &str| {
        build(target, &[]).assert_all_cached();
        let ran = ply.ok(args!["run", format!("localhost/{target}")]);
        assert_eq!(ran.stdout, expected, "{ran}");
    };
    says("hello", "hello from the compiler\n");
    says("python", "hello from toolz 0.12.1\n");
    says("node", "hello from ms 1m\n");

    // One file at a time: what stands on it, and nothing else.
    context.file("hello.h", "#define WHOM \"another header\"\n");
    let built = build("all", &[]);
    assert_eq!(
        ran(&built),
        [
            "COPY --from=compiled /hello",
            "COPY --from=hello /",
            "COPY --from=node /app",
            "COPY --from=python /app",
            "COPY hello.h hello.c",
            "RUN gcc -O2"
        ],
        "{}",
        built.ran
    );
    says("hello", "hello from another header\n");

    context.file("python/app.py", "import toolz\nprint('changed', toolz.__version__)\n");
    let built = build("python", &[]);
    assert_eq!(ran(&built), ["COPY python/app.py ./"], "{}", built.ran);
    assert_eq!(built.instructions().len(), 9, "{}", built.ran);
    says("python", "changed 0.12.1\n");

    context.file("node/app.js", "console.log('changed', require('ms')(1000));\n");
    let built = build("node", &[]);
    assert_eq!(ran(&built), ["COPY node/app.js ./"], "{}", built.ran);
    says("node", "changed 1s\n");

    // A comment in the requirements: pip runs again, and its cache is the one of the first time. (Whether pip takes a
    // package from there is the index's business, which says how long it may be kept.)
    context.file("python/requirements.txt", "# pinned\ntoolz==0.12.1\n");
    let built = build("python", &[]);
    assert_eq!(
        ran(&built),
        [
            "COPY python/app.py ./",
            "COPY python/requirements.txt ./",
            "RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=settings"
        ],
        "{}",
        built.ran
    );
    assert!(built.ran.stderr.contains("installed 2 times with this cache"), "{}", built.ran);
    says("python", "changed 0.12.1\n");

    // What steps were given in secret is in no layer.
    let mounted = ply.mount("localhost/node");
    for path in ["root/.npmrc", "run/secrets/settings", "root/.npm"] {
        let left = fs::metadata(mounted.path().join(path));
        let is_empty = left.as_ref().is_ok_and(|meta| meta.is_file() && meta.len() == 0)
            || fs::read_dir(mounted.path().join(path)).is_ok_and(|mut dir| dir.next().is_none());
        assert!(left.is_err() || is_empty, "/{path} is in the image");
    }
}
