//! `ADD` from elsewhere: a git server and a web server on loopback.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use plies_testkit::{args, eventually, sha256_hex, tools};

use crate::common::{Context, store, tree_of};

fn git(dir: &Path, args: &[&str]) -> String {
    let settings = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"];
    tools::run(Command::new("git").args(settings).args(args).current_dir(dir).env("GIT_CONFIG_NOSYSTEM", "1"))
}

/// `git daemon` on a port of its own.
struct Daemon(Child, u16);

impl Daemon {
    fn of(base: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut daemon = Command::new("git");
        daemon.args(["daemon", "--export-all", "--reuseaddr", "--listen=127.0.0.1"]).arg(format!("--port={port}"));
        daemon.arg(format!("--base-path={}", base.display())).stdout(Stdio::null()).stderr(Stdio::null());
        let daemon = Self(daemon.spawn().unwrap(), port);
        assert!(eventually(|| TcpStream::connect(("127.0.0.1", port)).is_ok()), "git daemon does not listen");
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Git starts the daemon as a program of its own, which ends when asked to, not when its parent is killed.
        drop(Command::new("pkill").args(["-TERM", "-P", &self.0.id().to_string()]).status());
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn git_repositories_are_added_at_a_ref_and_a_directory() {
    let Some(ply) = store() else { return };
    if !tools::have(&["git", "pkill"]) {
        return;
    }
    let base = ply.scratch().dir("served");
    let repo = base.join("repo.git");
    fs::create_dir(&repo).unwrap();
    git(&repo, &["init", "-q"]);
    fs::create_dir_all(repo.join("sub/deep")).unwrap();
    fs::write(repo.join("sub/deep/f"), "one").unwrap();
    fs::write(repo.join("run"), "#!/bin/sh\n").unwrap();
    tools::run(Command::new("chmod").arg("755").arg(repo.join("run")));
    git(&repo, &["add", "."]);
    git(&repo, &["commit", "-qm", "one"]);
    git(&repo, &["tag", "-a", "-m", "first", "v1"]);
    let first = git(&repo, &["rev-parse", "HEAD"]).trim().to_owned();
    fs::write(repo.join("sub/deep/f"), "two").unwrap();
    git(&repo, &["commit", "-qam", "two"]);
    let daemon = Daemon::of(&base);
    let url = format!("git://127.0.0.1:{}/repo.git", daemon.1);

    let text = format!(
        "FROM scratch\nADD {url} /head\nADD {url}#v1:sub /sub/\nADD {url}#{first} /commit\nADD --keep-git-dir=true {url} /kept\n"
    );
    let context = Context::new(&ply, &text);
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    let digest = |name: &str| tree.get(name).sha256.clone().unwrap();
    assert_eq!(digest("head/sub/deep/f"), sha256_hex(b"two"));
    assert_eq!(digest("sub/deep/f"), sha256_hex(b"one"), "a tag and a directory");
    assert_eq!(digest("commit/sub/deep/f"), sha256_hex(b"one"));
    assert_eq!((tree.get("head/run").mode, tree.get("head/sub/deep/f").mode), (0o755, 0o644));
    assert!(tree.find("head/.git").is_none() && tree.find("kept/.git/HEAD").is_some());
    let again = context.build(&[]);
    again.assert_all_cached();

    // A new commit is another source.
    fs::write(repo.join("sub/deep/f"), "three").unwrap();
    git(&repo, &["commit", "-qam", "three"]);
    let context = Context::new(&ply, &format!("FROM scratch\nADD {url} /head\n"));
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    assert_eq!(tree.get("head/sub/deep/f").sha256.as_deref(), Some(&*sha256_hex(b"three")));

    for (source, says) in [
        (format!("{url}#nowhere"), "has no branch, tag or other ref \"nowhere\""),
        (format!("{url}#v1:nowhere"), "\"nowhere\" not found"),
        (format!("git://127.0.0.1:{}/none.git", daemon.1), "git ls-remote"),
        (format!("--checksum=0000000 {url}"), "--checksum expects 0000000"),
    ] {
        context.file("Dockerfile", format!("FROM scratch\nADD {source} /x\n"));
        let ran = context.build_fails(&[]);
        assert!(ran.stderr.contains(says) && ran.stderr.contains("Dockerfile:2"), "{source}: {ran}");
    }
    context.file("Dockerfile", format!("FROM scratch\nADD --checksum={first} {url}#v1 /x\n"));
    context.build(&[]);
    // Without git in the path.
    let mut command = ply.command(&context.args(args!["--no-cache"]));
    let ran = plies_testkit::ply::Ran::of(command.env("PATH", ply.scratch().dir("empty")));
    assert!(ran.stderr.contains("run git for") && ran.stderr.contains("is it installed?"), "{ran}");
}

#[test]
fn f04_submodules_come_from_where_they_are_served_and_from_nowhere_else() {
    let Some(ply) = store() else { return };
    if !tools::have(&["git", "pkill"]) {
        return;
    }
    let base = ply.scratch().dir("served");
    let made = |name: &str| {
        let repo = base.join(name);
        fs::create_dir(&repo).unwrap();
        git(&repo, &["init", "-q"]);
        fs::write(repo.join("file"), name).unwrap();
        git(&repo, &["add", "."]);
        git(&repo, &["commit", "-qm", "one"]);
        repo
    };
    let (part, whole) = (made("part.git"), made("whole.git"));
    let commit = git(&part, &["rev-parse", "HEAD"]).trim().to_owned();
    git(&whole, &["update-index", "--add", "--cacheinfo", &format!("160000,{commit},part")]);
    let daemon = Daemon::of(&base);
    let served = format!("git://127.0.0.1:{}", daemon.1);
    let context = Context::new(&ply, &format!("FROM scratch\nADD {served}/whole.git /\n"));
    let names = |url: &str| {
        fs::write(whole.join(".gitmodules"), format!("[submodule \"part\"]\n\tpath = part\n\turl = {url}\n")).unwrap();
        git(&whole, &["add", ".gitmodules"]);
        git(&whole, &["commit", "-qm", "names"]);
    };
    names(&format!("{served}/part.git"));
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    assert_eq!(tree.get("part/file").sha256.as_deref(), Some(&*sha256_hex(b"part.git")));

    // CVE-2022-39253: a repository of this machine; CVE-2017-1000117, CVE-2018-17456: addresses that are options.
    let ran = ply.scratch().join("ran");
    let touch = format!("touch {}", ran.display());
    for url in [
        format!("file://{}", part.display()),
        part.display().to_string(),
        format!("ext::sh -c \"{touch}\""),
        format!("\"-u{touch}\""),
        format!("\"ssh://-oProxyCommand={touch}/x\""),
    ] {
        names(&url);
        let refused = context.build_fails(&[]);
        assert!(refused.stderr.contains("git submodule update of"), "{url}: {refused}");
        assert!(!ran.exists(), "{url}");
    }
}

/// The status of each answer.
type Answers = Arc<Mutex<Vec<u16>>>;

/// Serves one file, whose bytes can be changed, until the test ends.
fn serve(bytes: Arc<Mutex<Vec<u8>>>, answers: Answers) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut asked = Vec::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap() <= 2 {
                    break;
                }
                asked.push(line);
            }
            // Somebody who only looked whether we are there.
            if asked.is_empty() {
                continue;
            }
            let bytes = bytes.lock().unwrap().clone();
            let etag = format!("\"{}\"", sha256_hex(&bytes));
            let head = if asked.iter().any(|line| line.contains(&etag)) {
                "HTTP/1.0 304 Not Modified\r\n\r\n".to_owned()
            } else if asked[0].contains("/missing") {
                "HTTP/1.0 404 Not Found\r\n\r\n".to_owned()
            } else {
                format!("HTTP/1.0 200 OK\r\nETag: {etag}\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\r\n")
            };
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            answers.lock().unwrap().push(status);
            let body = if head.contains("200") { bytes.as_slice() } else { &[] };
            drop(stream.write_all(&[head.as_bytes(), body].concat()));
        }
    });
    format!("http://{address}")
}

#[test]
fn downloads_are_asked_for_again_and_kept_while_they_are_the_same() {
    let Some(ply) = store() else { return };
    let bytes = Arc::new(Mutex::new(b"first".to_vec()));
    let statuses = Answers::default();
    let url = serve(Arc::clone(&bytes), Arc::clone(&statuses));
    let build = |text: &str| {
        Context::new(&ply, text).build(&[]);
        tree_of(&ply, "built:latest")
    };
    let fails = |text: &str| Context::new(&ply, text).build_fails(&[]);
    let answers = || std::mem::take(&mut *statuses.lock().unwrap());
    let text = format!("FROM scratch\nADD {url}/dir/name%20x.txt?q=1 /into/\nADD --chmod=644 --chown=5:6 {url}/f /f\n");
    let tree = build(&text);
    let file = tree.get("into/name x.txt");
    assert_eq!((file.mode, file.uid, file.mtime.0), (0o600, 0, 1_445_412_480));
    assert_eq!((tree.get("f").mode, tree.get("f").uid, tree.get("f").gid), (0o644, 5, 6));
    assert_eq!(answers(), [200, 200]);
    // The server says that nothing changed, so nothing comes.
    build(&text);
    assert_eq!(answers(), [304, 304]);
    *bytes.lock().unwrap() = b"second".to_vec();
    let tree = build(&text);
    assert_eq!(tree.get("f").sha256.as_deref(), Some(&*sha256_hex(b"second")));
    assert_eq!(answers(), [200, 200]);
    // What has the right digest needs no asking.
    let sum = sha256_hex(b"second");
    build(&format!("FROM scratch\nADD --checksum=sha256:{sum} {url}/f /f\n"));
    assert!(answers().is_empty());
    let wrong = sha256_hex(b"other");
    let ran = fails(&format!("FROM scratch\nADD --checksum=sha256:{wrong} {url}/new /f\n"));
    assert!(ran.stderr.contains(&wrong) && ran.stderr.contains(&sum), "{ran}");
    assert_eq!(answers(), [200]);
    let ran = fails(&format!("FROM scratch\nADD {url}/missing /f\n"));
    assert!(ran.stderr.contains("Dockerfile:2") && ran.stderr.contains("/missing"), "{ran}");
    assert_eq!(answers(), [404]);

    // A download is unpacked when that is asked for.
    let archive = plies_testkit::tar::archive(&[plies_testkit::tar::Member::file("inside", "i")]);
    *bytes.lock().unwrap() = archive;
    let tree = build(&format!("FROM scratch\nADD {url}/a.tar /kept/\nADD --unpack {url}/a.tar /un/\n"));
    assert!(tree.find("kept/a.tar").is_some() && tree.find("un/inside").is_some());
}

#[test]
fn a_download_from_where_nobody_is_says_so() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "FROM scratch\nADD https://example.invalid/f /\n");
    let ran = context.build_fails(&[]);
    assert!(ran.stderr.contains("Dockerfile:2") && ran.stderr.contains("https://example.invalid/f"), "{ran}");
}

#[test]
fn remote_sources_that_make_no_sense_are_told_at_their_line() {
    let Some(ply) = store() else { return };
    let context = Context::new(&ply, "");
    for (line, says) in [
        ("COPY https://x.invalid/f /", "use ADD for"),
        ("COPY git@x.invalid:a/b.git /", "use ADD for"),
        ("ADD --checksum=sha256:00 https://x.invalid/f /", "is no digest"),
        ("ADD --checksum=sha256:00 Dockerfile /", "--checksum is for downloads"),
        ("ADD --checksum=sha256:00 https://x.invalid/f Dockerfile /", "--checksum is for one source alone"),
        ("ADD git://x.invalid/a.git?what=1 /", "means nothing"),
    ] {
        context.file("Dockerfile", format!("FROM scratch\n{line}\n"));
        let ran = context.build_fails(&[]);
        assert!(ran.stderr.contains("Dockerfile:2: ") && ran.stderr.contains(says), "{line}: {ran}");
    }
}
