//! What leaves no trace, and what nobody else may reach: secrets, descriptors, the store itself.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use plies_testkit::image::{Image, Packing};
use plies_testkit::registry::DockerRegistry;
use plies_testkit::tar::Member;
use plies_testkit::{args, eventually, ply::Ply, random_hex, tools};

use crate::build::executors;
use crate::common::{Context, busybox, everything, load, store, tree_of};

/// Something secret, and every form that it could be kept in.
struct Canary {
    bytes: Vec<u8>,
    needles: Vec<Vec<u8>>,
}

impl Canary {
    /// 32 random bytes.
    fn bytes() -> Self {
        let hex = random_hex();
        let byte = |two: &[u8]| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap();
        // What looks for them takes a line for a pattern.
        let bytes = hex.as_bytes().chunks(2).map(byte).map(|byte| if matches!(byte, 0 | b'\n') { 1 } else { byte });
        Self::of(bytes.collect())
    }

    /// A text of as much chance.
    fn text() -> Self {
        Self::of(random_hex().into_bytes())
    }

    fn of(bytes: Vec<u8>) -> Self {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        let mut needles = vec![bytes.clone()];
        let each = |format: &dyn Fn(&u8) -> String| bytes.iter().map(format).collect::<String>().into_bytes();
        needles.extend([each(&|byte| format!("{byte:02x}")), each(&|byte| format!("{byte:02X}"))]);
        let url = |byte: &u8| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(*byte).to_string(),
            byte => format!("%{byte:02X}"),
        };
        needles.extend([each(&url), each(&|byte| url(byte).to_lowercase())]);
        // Base64 of a text that it stands in, at any place: all but what its neighbours have a part in.
        for skip in 0..3 {
            for extra in [b"+/", b"-_"] {
                let alphabet = [DIGITS, extra].concat();
                let whole = bytes[skip..].chunks_exact(3);
                let digits = whole.flat_map(|three| {
                    let number = three.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
                    (0..4).map(move |place| number >> (18 - 6 * place) & 63)
                });
                needles.push(digits.map(|digit| alphabet[digit]).collect());
            }
        }
        needles.sort();
        needles.dedup();
        Self { bytes, needles }
    }

    fn as_text(&self) -> &str {
        str::from_utf8(&self.bytes).unwrap()
    }

    /// Fails if any form of it is in what was said.
    #[track_caller]
    fn assert_not_said(&self, what: &str, said: &[u8]) {
        let found = self.needles.iter().any(|needle| said.windows(needle.len()).any(|window| window == needle));
        assert!(!found, "{what}: {}", String::from_utf8_lossy(said));
    }

    /// Fails if any form of it is in a file below `dir`, whatever is mounted there; with `on_disk` only if it is on the
    /// file system of `dir` itself.
    #[track_caller]
    fn assert_not_below(&self, what: &str, dir: &Path, on_disk: bool) {
        let patterns = tempfile::NamedTempFile::new().unwrap();
        fs::write(patterns.path(), self.needles.join(&b'\n')).unwrap();
        // With grep: a look of our own at every byte takes minutes in a debug build.
        let mut find = Command::new("find");
        find.arg(dir)
            .args(if on_disk { &["-xdev"][..] } else { &[] })
            .args(["-type", "f", "-exec", "grep", "-laF", "-f"]);
        let found = find.arg(patterns.path()).args(["{}", "+"]).env("LC_ALL", "C").output().unwrap();
        assert!(found.stderr.is_empty(), "{found:?}");
        assert!(found.stdout.is_empty(), "{what}: {}", String::from_utf8_lossy(&found.stdout));
    }
}

/// Fails if any form of these is in a file of the store, or in a blob that is unpacked.
#[track_caller]
fn assert_no_trace(ply: &Ply, canaries: &[&Canary], what: &str, on_disk: bool) {
    let plain = ply.scratch().dir("plain");
    let blobs = fs::read_dir(ply.root().join("content/blobs/sha256")).into_iter().flatten();
    for (number, blob) in blobs.enumerate() {
        let bytes = fs::read(blob.unwrap().path()).unwrap();
        let unpacked = match bytes[..4] {
            [0x1f, 0x8b, ..] => plies_testkit::image::unpack(Packing::Gzip, &bytes),
            [0x28, 0xb5, 0x2f, 0xfd] => plies_testkit::image::unpack(Packing::Zstd, &bytes),
            _ => continue,
        };
        fs::write(plain.join(number.to_string()), unpacked).unwrap();
    }
    for canary in canaries {
        canary.assert_not_below(what, &ply.root(), on_disk);
        canary.assert_not_below(what, &plain, on_disk);
    }
    fs::remove_dir_all(plain).unwrap();
}

/// A process that another one started, or that one itself.
struct Process {
    id: u32,
    name: String,
    environment: Vec<u8>,
    /// It sees other mounts: it is the step's, or about to be.
    is_inside: bool,
}

/// A process and all that came of it.
fn processes_of(first: u32) -> Vec<Process> {
    let stat = |id: u32| fs::read_to_string(format!("/proc/{id}/stat")).ok();
    // Behind the name, which may hold anything: the state, and the parent's number (proc(5)).
    let parent = |id: u32| stat(id)?.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok();
    let ids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_of = |id: u32| std::iter::successors(Some(id), |id| parent(*id)).any(|id| id == first);
    let mounts = |id: &str| fs::read_link(format!("/proc/{id}/ns/mnt")).ok();
    let ours = mounts("self").unwrap();
    let process = |id: u32| {
        Some(Process {
            id,
            name: fs::read_to_string(format!("/proc/{id}/comm")).ok()?.trim().to_owned(),
            environment: fs::read(format!("/proc/{id}/environ")).ok()?,
            is_inside: mounts(&id.to_string())? != ours,
        })
    };
    ids.filter(|id| is_of(*id)).filter_map(process).collect()
}

#[test]
fn no_byte_of_a_secret_is_kept_anywhere() {
    if !tools::have(&["docker-registry", "htpasswd", "ssh-agent", "ssh-add", "ssh-keygen"]) {
        return;
    }
    for executor in executors() {
        let Some(ply) = store().filter(busybox) else { return };
        let (file, variable, password, proxy, surroundings) =
            (Canary::bytes(), Canary::text(), Canary::text(), Canary::text(), Canary::text());
        let key_path = ply.scratch().dir("keys").join("key");
        tools::run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key_path));
        let key = fs::read_to_string(&key_path).unwrap();
        let key = Canary::of(key.lines().nth(2).unwrap().as_bytes().to_vec());
        let all = [&file, &variable, &password, &proxy, &surroundings, &key];

        let registry = DockerRegistry::start(&ply.scratch().join("registry"), Some(("user", password.as_text())));
        let credentials = format!("user:{}", password.as_text());
        let credentials = plies_testkit::base64(credentials.as_bytes());
        let auth = format!(r#"{{"auths":{{"{}":{{"auth":"{credentials}"}}}}}}"#, registry.host());
        let auth = ply.scratch().file("auth/config.json", auth);
        let secret = ply.scratch().file("secret", &file.bytes);

        let run = |arguments: &[std::ffi::OsString]| {
            let mut command = ply.command(arguments);
            command.env("REGISTRY_AUTH_FILE", &auth).env("SECRET_VARIABLE", variable.as_text());
            command.env("SURROUNDINGS", surroundings.as_text());
            command
        };
        let step = "--mount=type=secret,id=file --mount=type=secret,id=v,env=TOKEN --mount=type=ssh";
        let context = Context::new(
            &ply,
            &format!(
                "FROM busybox\nRUN {step} test -n \"$TOKEN\" && test -s /run/secrets/file && test -S \"$SSH_AUTH_SOCK\" && \
                 test -n \"$http_proxy\"\nRUN {step} touch /begun; echo waits; sleep 600\n"
            ),
        );
        let name = format!("{}/app:1", registry.host());
        let given = args![
            "--executor",
            executor,
            "--explain",
            "--secret",
            format!("id=file,src={}", secret.display()),
            "--secret",
            "id=v,env=SECRET_VARIABLE",
            "--ssh",
            format!("default={}", key_path.display()),
            "--build-arg",
            format!("http_proxy=http://user:{}@127.0.0.1:1", proxy.as_text())
        ];
        // As far as the end of the first step.
        fs::write(
            context.dir.join("First"),
            fs::read_to_string(context.dir.join("Dockerfile")).unwrap().lines().take(2).collect::<Vec<_>>().join("\n"),
        )
        .unwrap();
        let first = args!["-f", context.dir.join("First"), "-t", name];
        for arguments in
            [context.args(&[given, first].concat()), args!["push", name].to_vec(), args!["pull", name].to_vec()]
        {
            let ran = run(&arguments).output().unwrap();
            let said = [ran.stdout, ran.stderr].concat();
            assert!(ran.status.success(), "{executor}: {}", String::from_utf8_lossy(&said));
            all.iter().for_each(|canary| canary.assert_not_said(&executor, &said));
            assert_no_trace(&ply, &all, &format!("{executor}: after {}", arguments[0].display()), false);
        }
        // Killed in the middle of a step that has them all.
        let mut child = run(&context.args(given)).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let begun = || {
            let found = Command::new("find").arg(ply.root()).args(["-name", "begun"]).output().unwrap();
            !found.stdout.is_empty()
        };
        assert!(eventually(begun), "{executor}: the step does not begin");
        let processes = processes_of(child.id());
        assert!(processes.iter().any(|process| process.is_inside), "{executor}: there is no step");
        for Process { id, name, environment, is_inside } in processes {
            let what = format!("{executor}: the environment of {name}");
            [&file, &password, &key].iter().for_each(|canary| canary.assert_not_said(&what, &environment));
            // What they are given is the user's own, as with every program that somebody starts.
            let is_users = id == child.id() || name == "ssh-agent" || name == "cat";
            if !is_users {
                surroundings.assert_not_said(&what, &environment);
            }
            if !is_inside && !is_users {
                [&variable, &proxy].iter().for_each(|canary| canary.assert_not_said(&what, &environment));
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What the step was shown lies in memory until somebody opens the store.
        assert_no_trace(&ply, &all, &format!("{executor}: after a kill"), true);
        for arguments in [args!["du"], args!["prune", "-a", "-f"], args!["rmi", name], args!["gc"]] {
            ply.ok(arguments);
            assert_no_trace(&ply, &all, &format!("{executor}: after {}", arguments[0].display()), false);
        }
    }
}

#[test]
fn no_descriptor_reaches_a_program_that_is_started() {
    let Some(ply) = store().filter(|_| tools::have(&["docker-registry", "htpasswd"])) else { return };
    // Programs that say what they were given. The shell itself reads its script from a descriptor of its own.
    let programs = ply.scratch().dir("programs");
    for name in ["git", "docker-credential-spy"] {
        let listing = ply.scratch().join(format!("{name}.list"));
        let script = format!("#!/bin/sh\nfind /proc/$$/fd -fprintf {} '%f %l\\n'\nexit 1\n", listing.display());
        let path = programs.join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    ply.scratch().file("docker/config.json", r#"{"credsStore":"spy"}"#);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([programs.clone()].into_iter().chain(std::env::split_paths(&path))).unwrap();
    let run = |arguments: &[std::ffi::OsString]| {
        let mut command = ply.command(arguments);
        command.env("PATH", &path).env("DOCKER_CONFIG", ply.scratch().join("docker"));
        drop(command.output().unwrap());
    };
    let context = Context::new(&ply, "FROM scratch\nADD git://127.0.0.1:1/a.git /a\n");
    run(&context.args(&[]));
    let registry = DockerRegistry::start(&ply.scratch().join("registry"), Some(("user", "password")));
    run(args!["pull", format!("{}/app:1", registry.host())]);
    // What runs the tests may hand something down.
    let ours = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let ours: Vec<_> = ours.map(|target| target.to_string_lossy().into_owned()).collect();
    for name in ["git", "docker-credential-spy"] {
        let listing = fs::read_to_string(ply.scratch().join(format!("{name}.list"))).unwrap_or_default();
        let open: Vec<_> = listing.lines().filter_map(|line| line.split_once(' ')).collect();
        assert!(open.len() > 3, "{name} was not started: {listing}");
        let odd: Vec<_> = open
            .iter()
            .filter(|(number, target)| {
                let is_standard = matches!(*number, "fd" | "0" | "1" | "2");
                !is_standard && Path::new(target) != programs.join(name) && !ours.contains(&target.to_string())
            })
            .collect();
        assert!(odd.is_empty(), "{name} was given {odd:?}");
    }
}

#[test]
fn m12_nobody_else_enters_the_store_whatever_the_umask() {
    let image = |ply: &Ply| everything("localhost/all:1", Packing::Gzip).write_oci_tar(&ply.scratch().join("all.tar"));
    let mut trees = Vec::new();
    for (umask, driver) in
        ["000", "022", "077"].into_iter().flat_map(|umask| ["auto", "overlay"].map(|driver| (umask, driver)))
    {
        let Some(ply) = store() else { return };
        let ply = ply.with_driver(driver);
        if umask == "022" {
            // Somebody made it beforehand, as one makes a directory.
            fs::create_dir(ply.root()).unwrap();
            fs::set_permissions(ply.root(), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let archive = image(&ply);
        let ply_command = ply.command(args!["load", "-i", archive]);
        let mut command = Command::new("sh");
        command.args(["-c", "umask \"$0\"; exec \"$@\"", umask]).arg(ply_command.get_program());
        command.args(ply_command.get_args()).env_clear().env("HOME", ply.scratch().path());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("PLY_DRIVER", driver);
        tools::run(&mut command);
        load(&ply, &Image::new("localhost/one:1").layer(&[Member::file("f", "")], Packing::Plain));
        for entry in fs::read_dir(ply.root()).unwrap() {
            let (path, meta) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
            let wanted = if meta.is_dir() { 0o700 } else { 0o600 };
            // A directory with that mode keeps all that is in it to itself.
            assert_eq!(meta.mode() & 0o777 & !wanted, 0, "umask {umask}: {} is {:o}", path.display(), meta.mode());
        }
        let catalog = || {
            let files = fs::read_dir(ply.root().join("catalog")).unwrap();
            files.map(|file| file.map(|file| (file.path(), file.metadata().unwrap().mode() & 0o777)).unwrap())
        };
        assert!(catalog().all(|(_, mode)| mode == 0o600), "umask {umask}: {:?}", catalog().collect::<Vec<_>>());
        // As versions before left them.
        catalog().for_each(|(path, _)| fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap());
        ply.ok(args!["images"]);
        assert!(catalog().all(|(_, mode)| mode == 0o600), "umask {umask}: {:?}", catalog().collect::<Vec<_>>());
        // CVE-2021-41091: a setuid program of a layer, or the tar that it is in, for everybody who can come to it.
        let wanted = ["(", "-perm", "-4000", "-o", "-name", "layer.tar", ")", "-type", "f"];
        let found = tools::run(Command::new("find").arg(ply.root()).args(wanted));
        let program = found.lines().next().expect("because a layer has one");
        fs::set_permissions(ply.scratch().path(), fs::Permissions::from_mode(0o711)).unwrap();
        let mut other = Command::new("setpriv");
        other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "cat", program]);
        assert!(!other.output().unwrap().status.success(), "umask {umask}: {program} is open to everybody");
        trees.push((format!("{umask}, {driver}"), tree_of(&ply, "localhost/all:1")));
    }
    for (umask, tree) in &trees[1..] {
        tree.assert_same(&trees[0].1, &format!("umask {umask}, and 000"));
    }
}
