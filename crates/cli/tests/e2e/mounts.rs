//! `RUN --mount`, `--network` and what else a build says of how commands are run.

use std::os::unix::net::UnixListener;
use std::process::Command;

use plies_testkit::{args, ply::Ply, scratch::mounts_below, tools, tree::Tree};
use serde_json::Value;

use crate::build::executors;
use crate::common::{Context, Step, busybox, files, interrupted, store, tree_of};

/// A context over a store with a base, for every executor.
fn each(dockerfile: &str, test: impl Fn(&Context<'_>, &str)) {
    for executor in executors() {
        let Some(ply) = store().filter(busybox) else { return };
        let context = Context::new(&ply, dockerfile);
        test(&context, &executor);
        assert_eq!(mounts_below(&ply.root()), Vec::<std::path::PathBuf>::new(), "{executor}");
    }
}

#[track_caller]
fn text(tree: &Tree, name: &str, content: &str) {
    let expected = plies_testkit::sha256_hex(content.as_bytes());
    assert_eq!(tree.get(name).sha256.as_deref(), Some(&*expected), "/{name} is not {content:?}");
}

/// The files of a store, catalogue and all, that hold a text. With grep: a look of our own at every byte takes minutes in
/// a debug build.
fn traces(ply: &Ply, text: &str) -> String {
    let found = Command::new("grep").args(["-rlaF", "--", text]).arg(ply.root()).output().unwrap();
    assert!(matches!(found.status.code(), Some(0 | 1)), "{found:?}");
    String::from_utf8_lossy(&found.stdout).into_owned()
}

/// Records of caches: id and description.
fn caches(ply: &Ply) -> Vec<(String, String)> {
    let rows = ply.json(args!["ref", "ls"]);
    let rows: Vec<Value> =
        rows.as_array().unwrap().iter().filter(|row| row["record_type"] == "exec.cachemount").cloned().collect();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    rows.iter().map(|row| (text(row, "id"), text(row, "description"))).collect()
}

#[test]
fn bound_files_are_seen_and_what_is_written_to_them_is_lost() {
    let dockerfile = "FROM busybox AS tools\n\
        RUN mkdir /t && echo tool > /t/tool && ln -s t /link\n\
        FROM busybox\n\
        RUN --mount=target=/src cat /src/a/one > /one; ls /src | sort > /seen; touch /src/no 2>/dev/null || echo ro > /ro\n\
        RUN --mount=target=/deep/er/src,source=a,rw touch /deep/er/src/new && ls /deep/er/src > /listed\n\
        RUN --mount=from=tools,source=/link,target=/tools --mount=from=tools,target=/all,rw \\\n\
            cat /tools/tool > /tool && echo gone > /all/t/tool && rm /all/bin/ls && touch /all/x\n\
        RUN --mount=from=tools,source=t/tool,target=/file cat /file > /file.copy\n";
    each(dockerfile, |context, executor| {
        context.file("a/one", "1");
        context.file("hidden", "");
        context.file(".dockerignore", "hidden\n");
        context.build(args!["--executor", executor]);
        let tree = tree_of(context.ply, "built:latest");
        text(&tree, "one", "1");
        text(&tree, "seen", "Dockerfile\na\n");
        text(&tree, "ro", "ro\n");
        text(&tree, "listed", "new\none\n");
        text(&tree, "tool", "tool\n");
        text(&tree, "file.copy", "tool\n");
        for gone in ["src", "deep", "tools", "all", "file"] {
            assert!(tree.find(gone).is_none(), "{executor}: /{gone} is a trace of a mount");
        }
        assert!(!context.dir.join("a/new").exists(), "the context was written to");
        context.build(args!["--executor", executor]).assert_all_cached();
        // Only what it shows is in a step's key.
        context.file("b", "");
        let built = context.build(args!["--executor", executor]);
        assert_eq!(built.step("target=/src "), Step::Ran);
        context.file("a/one", "2");
        let built = context.build(args!["--executor", executor]);
        assert_eq!((built.step("target=/src "), built.step("source=a,rw")), (Step::Ran, Step::Ran));
    });
}

#[test]
fn caches_outlive_builds_and_are_listed_and_pruned_by_their_ids() {
    let dockerfile = "FROM busybox AS seed\n\
        RUN mkdir /seed && echo s > /seed/s\n\
        FROM busybox\n\
        ARG N\n\
        RUN --mount=type=cache,id=counter,target=/c,mode=0700,uid=7,gid=8 \\\n\
            echo $N >> /c/n && cat /c/n > /n && stat -c '%a %u %g' /c > /stat\n\
        RUN --mount=type=cache,target=/var/x,from=seed,source=/seed cat /var/x/s > /s && echo $N >> /var/x/s\n";
    each(dockerfile, |context, executor| {
        let build = |n: &str| context.build(args!["--executor", executor, "--build-arg", format!("N={n}")]);
        build("1");
        build("2").step("counter");
        let tree = tree_of(context.ply, "built:latest");
        text(&tree, "n", "1\n2\n");
        text(&tree, "stat", "700 7 8\n");
        text(&tree, "s", "s\n1\n");
        assert!(tree.find("c").is_none() && tree.find("var/x").is_none(), "{executor}");
        // A cache's content is in no key.
        build("2").assert_all_cached();
        let listed = caches(context.ply);
        assert_eq!(listed.len(), 2, "{listed:?}");
        assert!(listed.iter().any(|(_, text)| text.contains("\"counter\"")), "{listed:?}");
        assert!(listed.iter().any(|(_, text)| text.contains("\"/var/x\"")), "{listed:?}");
        assert!(context.ply.ok(args!["du", "-v"]).stdout.contains("counter"));
        context.ply.ok(args!["prune", "--force", "--filter", "type=exec.cachemount"]);
        assert_eq!(caches(context.ply), []);
        build("3");
        text(&tree_of(context.ply, "built:latest"), "n", "3\n");
    });
}

#[test]
fn secrets_reach_their_steps_and_nothing_else() {
    let dockerfile = "FROM busybox\n\
        RUN --mount=type=secret,id=file --mount=type=secret,id=v,env=TOKEN,required \\\n\
            --mount=type=secret,id=file,target=/etc/s,mode=0440,uid=5,gid=6 \\\n\
            sha256sum < /run/secrets/file > /sum && stat -c '%a %u %g' /run/secrets/file /etc/s > /stat && \\\n\
            grep -c ' /run/secrets/file tmpfs ' /proc/mounts > /dev/null; grep ' /run/secrets/file ' /proc/mounts \\\n\
            | cut -d' ' -f3 > /fs; echo \"$TOKEN\" | sha256sum > /env\n\
        RUN env > /environment; ls /run > /run.list 2>/dev/null || true\n";
    each(dockerfile, |context, executor| {
        let secret = "5ecret-of-the-file";
        let path = context.ply.scratch().file("token", secret);
        let more = args![
            "--executor",
            executor,
            "--secret",
            format!("id=file,src={}", path.display()),
            "--secret",
            "id=v,env=PLY_TEST_TOKEN"
        ];
        let mut command = context.ply.command(&context.args(more));
        let ran = command.env("PLY_TEST_TOKEN", "5ecret-of-the-env").output().unwrap();
        let said = [ran.stdout, ran.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(ran.status.success(), "{said}");
        assert!(!said.contains("5ecret"), "{said}");
        let tree = tree_of(context.ply, "built:latest");
        text(&tree, "sum", &format!("{}  -\n", plies_testkit::sha256_hex(secret.as_bytes())));
        text(&tree, "env", &format!("{}  -\n", plies_testkit::sha256_hex(b"5ecret-of-the-env\n")));
        text(&tree, "stat", "400 0 0\n440 5 6\n");
        text(&tree, "fs", "tmpfs\n");
        assert!(tree.find("run/secrets").is_none() && tree.find("etc/s").is_none());
        // Neither in a layer nor in the catalogue, a config or a leftover.
        assert_eq!(traces(context.ply, "5ecret-"), "", "{executor}");
        // Another value is no other step.
        std::fs::write(&path, "changed").unwrap();
        let mut command = context.ply.command(&context.args(more));
        let ran = command.env("PLY_TEST_TOKEN", "other").output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(said.matches(" CACHED").count() >= 2, "{said}");
    });
}

#[test]
fn a_required_secret_or_agent_that_is_missing_is_told_at_its_line() {
    let Some(ply) = store().filter(busybox) else { return };
    for (mount, told) in [
        ("type=secret,id=token,required", "the secret \"token\" was not given: add --secret id=token"),
        ("type=ssh,required=true", "no SSH agent \"default\" was given: add --ssh default"),
        ("source=nowhere,target=/t", "nowhere"),
        ("target=/", "cannot be mounted over"),
    ] {
        let context = Context::new(&ply, &format!("FROM busybox\nRUN --mount={mount} true\n"));
        let failed = context.build_fails(args![]);
        assert!(failed.stderr.contains(told) && failed.stderr.contains("Dockerfile:2"), "{failed}");
    }
    let context = Context::new(&ply, "FROM busybox\nRUN --mount=type=ssh test -z \"$SSH_AUTH_SOCK\"\n");
    context.build(args![]);
    for bad in [["--secret", "src=x"], ["--secret", "id=x,src=/no/such"], ["--ssh", "default=/dev/null"]] {
        ply.fails(2, &context.args(args![bad[0], bad[1]]));
    }
}

#[test]
fn the_socket_of_an_agent_is_there_for_whom_it_is() {
    let dockerfile = "FROM busybox\n\
        USER 1234\n\
        RUN --mount=type=ssh,uid=1234 test -S \"$SSH_AUTH_SOCK\" && echo \"$SSH_AUTH_SOCK\" > /tmp/where \\\n\
            && stat -c '%a %u' $SSH_AUTH_SOCK > /tmp/mode\n\
        RUN --mount=type=ssh,id=other,mode=0666,target=/tmp/agent test -w /tmp/agent && touch /tmp/done\n";
    each(dockerfile, |context, executor| {
        let socket = context.ply.scratch().dir("agent").join("socket");
        let _agent = UnixListener::bind(&socket).unwrap();
        let given = |id: &str| format!("{id}={}", socket.display());
        context.build(args!["--executor", executor, "--ssh", given("default"), "--ssh", given("other")]);
        let tree = tree_of(context.ply, "built:latest");
        text(&tree, "tmp/where", "/run/buildkit/ssh_agent.0\n");
        text(&tree, "tmp/mode", "600 1234\n");
        assert!(tree.find("tmp/done").is_some());
        assert!(tree.find("run/buildkit").is_none() && tree.find("tmp/agent").is_none());
    });
}

#[test]
fn key_files_sign_for_a_step_and_are_kept_nowhere() {
    if !tools::have(&["ssh-agent", "ssh-add", "ssh-keygen"]) {
        return;
    }
    let dockerfile = "FROM busybox\nRUN --mount=type=ssh test -S \"$SSH_AUTH_SOCK\" && touch /done\n";
    each(dockerfile, |context, executor| {
        let dir = context.ply.scratch().dir("keys");
        let keys = ["one", "other"].map(|name| dir.join(name));
        for key in &keys {
            tools::run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(key));
        }
        let given = format!("default={},{}", keys[0].display(), keys[1].display());
        context.build(args!["--executor", executor, "--ssh", given]);
        assert!(tree_of(context.ply, "built:latest").find("done").is_some());
        let text = std::fs::read_to_string(&keys[0]).unwrap();
        let line = text.lines().nth(1).unwrap();
        assert_eq!(traces(context.ply, line), "", "{executor}");
        let no_key = format!("default={}", context.ply.scratch().file("text", "no key").display());
        let failed = context.build_fails(args!["--no-cache", "--executor", executor, "--ssh", no_key]);
        assert!(failed.stderr.contains("no SSH key") && failed.stderr.contains("Dockerfile:2"), "{failed}");
    });
}

#[test]
fn networks_hosts_limits_and_shared_memory_are_as_asked() {
    let dockerfile = "FROM busybox\n\
        RUN wc -l < /proc/net/dev > /default; cat /etc/hosts > /hosts.seen; cat /etc/resolv.conf > /resolv.seen; hostname > /name; ulimit -n > /files\n\
        RUN --network=none wc -l < /proc/net/dev > /none\n\
        RUN --network=host true\n\
        RUN df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2 > /shm\n";
    each(dockerfile, |context, executor| {
        let more = args![
            "--executor",
            executor,
            "--network",
            "none",
            "--add-host",
            "db:10.1.2.3",
            "--add-host",
            "six=[::2]",
            "--ulimit",
            "nofile=77:99",
            "--shm-size",
            "3m",
            "--allow",
            "network.host"
        ];
        context.build(more);
        let tree = tree_of(context.ply, "built:latest");
        // Two lines of heading, and loopback.
        text(&tree, "default", "3\n");
        text(&tree, "none", "3\n");
        text(&tree, "files", "77\n");
        text(&tree, "shm", "3072\n");
        text(&tree, "name", "buildkitsandbox\n");
        let local = "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n";
        text(&tree, "hosts.seen", &format!("{local}10.1.2.3\tdb\n::2\tsix\n"));
        // The host's names are the step's.
        if let Ok(resolv) = std::fs::read_to_string("/etc/resolv.conf") {
            text(&tree, "resolv.seen", &resolv);
        }
        context.build(more).assert_all_cached();
        let again = context.build(&[&more[..8], &more[12..]].concat());
        assert!(again.instructions().iter().all(|(_, step)| *step == Step::Ran), "{}", again.ran);
    });
}

#[test]
fn what_leaves_the_sandbox_is_allowed_by_whoever_builds() {
    let dockerfile = "FROM busybox\n\
        RUN --security=insecure mount -t tmpfs none /mnt 2>&1 && echo mounted > /done\n\
        RUN --network=host true\n";
    each(&dockerfile.replace("/mnt", "/tmp"), |context, executor| {
        let before = files(&context.ply.root());
        let executor = args!["--executor", executor];
        let failed = context.build_fails(executor);
        let told = "--security=insecure is not allowed: build with --allow security.insecure";
        assert!(failed.stderr.contains(told) && failed.stderr.contains("Dockerfile:2"), "{failed}");
        let failed = context.build_fails(&[executor, args!["--allow", "security.insecure"]].concat());
        let told = "--network=host is not allowed: build with --allow network.host";
        assert!(failed.stderr.contains(told) && failed.stderr.contains("Dockerfile:3"), "{failed}");
        assert_eq!(files(&context.ply.root()), before);
        let all = [executor, args!["--allow", "security.insecure,network.host"]].concat();
        context.build(&all);
        text(&tree_of(context.ply, "built:latest"), "done", "mounted\n");
        context.build(&all).assert_all_cached();
        // As buildx: the host's network for all is the host's network for one.
        context.build(&[executor, args!["--allow", "security.insecure", "--network", "host"]].concat());
        // In its sandbox it is another step.
        context.file("Dockerfile", "FROM busybox\nRUN mount -t tmpfs none /tmp 2>&1 && echo mounted > /done\n");
        context.build_fails(&all);
        context.ply.fails(2, &context.args(args!["--allow", "everything"]));
    });
}

#[test]
fn an_interrupt_ends_a_step_with_all_it_started_and_leaves_no_mount() {
    let mark = format!("10{}", std::process::id());
    let dockerfile = format!(
        "FROM busybox\n\
         RUN --mount=type=cache,target=/c --mount=type=secret,id=s --mount=target=/src,rw --mount=from=busybox,target=/b \\\n\
             setsid sleep {mark} & sleep {mark} & sleep {mark}\n"
    );
    each(&dockerfile, |context, executor| {
        let path = context.ply.scratch().file("s", "x");
        let more = args!["--executor", executor, "--secret", format!("id=s,src={}", path.display())];
        let ended = interrupted(context.ply.command(&context.args(more)));
        assert!(!ended.status.success());
        let running = Command::new("sh").args(["-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).output().unwrap();
        let running = String::from_utf8_lossy(&running.stdout).into_owned();
        assert!(!running.contains(&format!("sleep {mark}")), "{executor}: {running}");
        assert_eq!(context.ply.json(args!["images"]).as_array().unwrap().len(), 1, "nothing is half-tagged");
    });
}
