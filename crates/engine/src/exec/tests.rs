//! One suite over every executor that this machine has. As root only: namespaces and mounts are the point.

use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use super::*;

/// A tree with a shell in it.
fn rootfs() -> Option<tempfile::TempDir> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).is_file());
    let Some(busybox) = busybox else {
        eprintln!("SKIPPED: no static busybox (Debian: busybox-static)");
        return None;
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: not root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for sub in ["bin", "etc", "tmp", "work dir"] {
        std::fs::create_dir(dir.path().join(sub)).unwrap();
    }
    std::fs::copy(busybox, dir.path().join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "ls", "id", "mount", "umount", "sleep", "kill", "true", "env", "pwd", "readlink", "hostname",
        "touch", "grep", "mknod", "unshare", "chroot", "stat", "wc", "setsid", "test", "echo", "awk", "date", "su",
    ] {
        std::os::unix::fs::symlink("busybox", dir.path().join("bin").join(applet)).unwrap();
    }
    Some(dir)
}

/// Every executor on this machine, each with a state directory of its own.
fn executors() -> Vec<(Box<dyn Executor>, tempfile::TempDir)> {
    let path: Vec<PathBuf> = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"].map(PathBuf::from).into();
    let mut choices = vec![ExecutorChoice::Builtin];
    for name in RUNTIMES {
        match path.iter().map(|dir| dir.join(name)).find(|path| runtime::is_program(path)) {
            Some(path) => choices.push(ExecutorChoice::Runtime(path)),
            None => eprintln!("SKIPPED: no {name}"),
        }
    }
    choices
        .iter()
        .map(|choice| {
            let state = tempfile::tempdir().unwrap();
            (pick(choice, state.path(), &path).unwrap(), state)
        })
        .collect()
}

struct Ran {
    result: Result<ExitStatus, ExecError>,
    out: String,
    err: String,
}

impl Ran {
    fn code(&self) -> i32 {
        self.result.as_ref().unwrap_or_else(|error| panic!("{error:?}: {}", self.err)).code()
    }
}

fn run(executor: &dyn Executor, step: &Step) -> Ran {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let result = executor.run(step, &mut out, &mut err, &Cancel::new());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { result, out: text(out), err: text(err) }
}

fn sh(root: &Path, script: &str) -> Step {
    let mut step = Step::new(root, ["/bin/sh", "-c", script]);
    step.env.push(("PATH".into(), "/bin".into()));
    step
}

/// Runs `test` for each executor, saying which.
fn each(test: impl Fn(&dyn Executor, &Path)) {
    for (executor, _state) in executors() {
        let Some(root) = rootfs() else { return };
        eprintln!("with {}", executor.name());
        test(&*executor, root.path());
    }
}

/// Runs a script and gives its output, which it must end well for.
fn output(executor: &dyn Executor, root: &Path, script: &str) -> String {
    let ran = run(executor, &sh(root, script));
    assert_eq!(ran.code(), 0, "{script}: {}{}", ran.out, ran.err);
    ran.out
}

#[test]
fn privileged_output_and_exit_codes_come_through() {
    each(|executor, root| {
        let ran = run(executor, &sh(root, "echo out; echo err >&2; exit 7"));
        assert_eq!((ran.code(), ran.out.as_str(), ran.err.as_str()), (7, "out\n", "err\n"));
        assert_eq!(run(executor, &sh(root, "exit 0")).code(), 0);
        if executor.name() == "builtin" {
            // Under a runtime the step is pid 1 itself, which can't be killed from inside.
            assert_eq!(run(executor, &sh(root, "kill -9 $$; sleep 5")).code(), 137);
            assert_eq!(run(executor, &sh(root, "kill -TERM $$; sleep 5")).code(), 143);
        }
        assert_eq!(run(executor, &Step::new(root, ["no-such-command"])).code(), 127);
        assert_eq!(run(executor, &Step::new(root, ["/no/such/command"])).code(), 127);
        std::fs::write(root.join("bin/data"), "text").unwrap();
        assert_eq!(run(executor, &Step::new(root, ["/bin/data"])).code(), 126);
        assert_eq!(run(executor, &Step::new(root, ["/etc"])).code(), 126);
        std::fs::write(root.join("bin/script"), "#!/no/interpreter\n").unwrap();
        std::fs::set_permissions(root.join("bin/script"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let missing_interpreter = run(executor, &Step::new(root, ["/bin/script"])).code();
        // Runtimes find out when it is too late to tell it from a failing step, and end with 1, as under docker.
        assert_eq!(missing_interpreter, if executor.name() == "builtin" { 127 } else { 1 });
    });
}

#[test]
fn privileged_environment_directory_and_host_name_are_as_asked() {
    each(|executor, root| {
        let mut step = Step::new(root, ["env"]);
        step.env = vec![("PATH".into(), "/nowhere:/bin".into()), ("A".into(), "b c\n=d".into())];
        step.hostname = "stage".into();
        let ran = run(executor, &step);
        assert_eq!(ran.code(), 0, "{}", ran.err);
        assert!(ran.out.contains("A=b c\n=d\n"), "{}", ran.out);
        assert!(!ran.out.contains("CARGO"), "{}", ran.out);
        step.args = ["sh", "-c", "pwd; hostname; umask; echo $HOME"].map(Into::into).into();
        step.cwd = "/work dir".into();
        std::fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        assert_eq!(run(executor, &step).out, "/work dir\nstage\n0022\n/root\n");
        step.env.push(("HOME".into(), "/a".into()));
        step.env.push(("HOME".into(), "/b".into()));
        assert_eq!(run(executor, &step).out, "/work dir\nstage\n0022\n/b\n");
    });
}

#[test]
fn privileged_user_and_groups_are_as_asked() {
    each(|executor, root| {
        let mut step = sh(root, "id -u; id -g; id -G; grep Cap /proc/self/status; touch /etc/x");
        step.user = User { uid: 1234, gid: 2345, groups: vec![3456, 4567] };
        let ran = run(executor, &step);
        assert!(ran.out.starts_with("1234\n2345\n2345 3456 4567\n"), "{}", ran.out);
        assert!(ran.out.contains("CapEff:\t0000000000000000"), "{}", ran.out);
        assert_ne!(ran.code(), 0, "a user can't write to root's directory");
    });
}

#[test]
fn privileged_no_signal_is_held_back_or_ignored() {
    each(|executor, root| {
        let ran = run(executor, &Step::new(root, ["/bin/grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]));
        let sets: Vec<u64> = ran
            .out
            .lines()
            .map(|line| u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap())
            .collect();
        // Real-time signals may be ignored by whoever started the tests.
        assert_eq!(sets.iter().map(|set| set & 0x7fff_ffff).collect::<Vec<_>>(), [0, 0], "{}", ran.out);
    });
}

#[test]
fn privileged_capabilities_are_dockers() {
    each(|executor, root| {
        let status = output(executor, root, "grep -E 'Cap|NoNew' /proc/self/status");
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert!(status.contains(&format!("{set}:\t00000000a80425fb\n")), "{status}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000000000\n")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t0\n"), "{status}");
        assert!(output(executor, root, "grep Seccomp: /proc/self/status").contains("2"), "a filter is there");
    });
}

#[test]
fn privileged_an_insecure_step_has_all_that_we_have() {
    let own = rustix::thread::capabilities(None).unwrap().permitted.bits();
    each(|executor, root| {
        for user in [User::root(), User { uid: 1000, gid: 1000, groups: vec![] }] {
            let mut step = sh(root, "grep -E 'Cap|Seccomp:' /proc/self/status; cat /proc/self/mountinfo");
            (step.insecure, step.user) = (true, user.clone());
            let ran = run(executor, &step);
            assert_eq!(ran.code(), 0, "{}", ran.err);
            let sets = if user == User::root() { &["CapPrm", "CapEff", "CapBnd"][..] } else { &["CapPrm", "CapEff"] };
            for set in sets {
                assert!(ran.out.contains(&format!("{set}:\t{own:016x}\n")), "{set} {own:x}: {}", ran.out);
            }
            assert!(ran.out.contains("Seccomp:\t0\n"), "{}", ran.out);
            let points: Vec<&str> = ran.out.lines().filter_map(|line| line.split(' ').nth(4)).collect();
            let hidden: Vec<_> =
                points.iter().filter(|at| at.starts_with("/proc/") || at.starts_with("/sys/")).collect();
            assert!(hidden.is_empty(), "{hidden:?}");
        }
        let mut step = sh(
            root,
            "mount -t tmpfs none /tmp && touch /tmp/x && grep ' /sys ' /proc/self/mountinfo && ls /dev /dev/net",
        );
        step.insecure = true;
        let ran = run(executor, &step);
        assert!(ran.out.contains(" /sys rw,"), "{}{}", ran.out, ran.err);
        for device in sandbox::insecure_devices() {
            let name = device.name.rsplit('/').next().unwrap();
            assert!(ran.out.lines().any(|line| line == name), "/dev/{} is not there: {}", device.name, ran.out);
        }
    });
}

#[test]
fn f10_privileged_no_descriptor_leaks_into_a_step() {
    // One that a careless caller left open for all children.
    let leak = rustix::fs::open("/etc", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    each(|executor, root| {
        let step = Step::new(root, ["/bin/ls", "/proc/self/fd"]);
        let ran = run(executor, &step);
        // 3 is the directory that ls reads.
        assert_eq!(ran.out, "0\n1\n2\n3\n", "{}", ran.err);
    });
    drop(leak);
}

#[test]
fn privileged_a_step_sees_its_own_processes_only() {
    each(|executor, root| {
        let count = output(executor, root, "ls -d /proc/[0-9]* | wc -l");
        assert!(count.trim().parse::<u32>().unwrap() <= 5, "{count}");
        let own = output(executor, root, "echo $$");
        assert!(own.trim().parse::<u32>().unwrap() <= 2, "{own}");
        assert_ne!(run(executor, &sh(root, "kill -9 1; exit 3")).code(), 0);
    });
}

#[test]
fn f10_privileged_the_helper_is_out_of_reach() {
    each(|executor, root| {
        if executor.name() != "builtin" {
            return;
        }
        for script in ["readlink /proc/1/exe", "cat /proc/1/environ", "readlink /proc/1/fd/0", "ls /proc/1/root/"] {
            assert_ne!(run(executor, &sh(root, script)).code(), 0, "{script}");
        }
        // CVE-2019-5736: a command that is a link to the process's own program runs a sealed copy, if at all.
        std::os::unix::fs::symlink("/proc/self/exe", root.join("bin/self")).unwrap();
        let ran = run(executor, &Step::new(root, ["/bin/self"]));
        assert_ne!(ran.result.map(|status| status.code()).unwrap_or(1), 0);
    });
}

#[test]
fn privileged_mounting_and_new_namespaces_are_refused() {
    each(|executor, root| {
        for script in [
            "mount -t tmpfs x /tmp",
            "umount /proc",
            "unshare -m true",
            "unshare -U true",
            "mount -o remount,rw /proc/sys",
            "echo 1 > /proc/sys/kernel/panic",
            "echo x > /sys/kernel/uevent_helper",
            "hostname other",
        ] {
            let ran = run(executor, &sh(root, script));
            assert_ne!(ran.code(), 0, "{script} went through: {}{}", ran.out, ran.err);
        }
        assert_eq!(output(executor, root, "cat /proc/keys /proc/timer_list 2>/dev/null; ls /sys/firmware"), "");
        // What docker allows stays allowed.
        output(executor, root, "chroot / /bin/true && mknod /tmp/null c 1 3");
    });
}

#[test]
fn privileged_dev_is_a_small_one_of_its_own() {
    each(|executor, root| {
        output(executor, root, "echo x > /dev/null && test -c /dev/zero && test -c /dev/urandom && test -d /dev/shm");
        output(executor, root, "test -e /dev/ptmx && test -d /dev/pts && test -e /dev/stdin && test -L /dev/fd");
        output(executor, root, "touch /dev/shm/x && test ! -e /dev/vda && test ! -e /dev/kmsg && test ! -e /dev/mem");
        assert_ne!(run(executor, &sh(root, "echo x > /dev/tty")).code(), 0, "no terminal to write to");
    });
}

#[test]
fn f02_privileged_mounts_appear_and_leave_no_trace() {
    each(|executor, root| {
        let host = tempfile::tempdir().unwrap();
        std::fs::write(host.path().join("file"), "hello").unwrap();
        let mut step = sh(
            root,
            "cat /etc/resolv.conf > /dev/null && cat /mnt/ro/file && echo new > /mnt/rw/out && touch /scratch/x \
             && cat /dev/pipes/file && ! echo x > /mnt/ro/file && ! echo x > /etc/resolv.conf && ls -d /proc /sys",
        );
        step.mounts = StepMount::host_network_files();
        let bind = |target: &str, access| StepMount {
            target: target.into(),
            source: MountSource::Bind { path: host.path().to_owned(), access },
        };
        step.mounts.push(bind("/mnt/ro", Access::ReadOnly));
        step.mounts.push(bind("/mnt/rw", Access::ReadWrite));
        step.mounts.push(bind("/dev/pipes", Access::ReadOnly));
        step.mounts.push(StepMount {
            target: "/scratch".into(),
            source: MountSource::Tmpfs { size_bytes: Some(1 << 20), access: Access::ReadWrite },
        });
        let ran = run(executor, &step);
        assert_eq!(ran.code(), 0, "{}{}", ran.out, ran.err);
        assert!(ran.out.starts_with("hellohello"), "{}", ran.out);
        assert_eq!(std::fs::read_to_string(host.path().join("out")).unwrap(), "new\n");
        let mut names: Vec<_> =
            std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["bin", "etc", "tmp", "work dir"]);
        assert_eq!(std::fs::read_dir(root.join("etc")).unwrap().count(), 0);
    });
}

#[test]
fn privileged_a_linked_mount_target_is_followed_inside_the_root() {
    each(|executor, root| {
        std::os::unix::fs::symlink("/run/resolv/stub.conf", root.join("etc/resolv.conf")).unwrap();
        let host = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(host.path(), "nameserver 192.0.2.1").unwrap();
        let mut step = sh(root, "cat /run/resolv/stub.conf");
        let source = MountSource::Bind { path: host.path().to_owned(), access: Access::ReadOnly };
        step.mounts = vec![StepMount { target: "/etc/resolv.conf".into(), source }];
        assert_eq!(run(executor, &step).out, "nameserver 192.0.2.1");
        assert!(!root.join("run").exists());
        assert!(!Path::new("/run/resolv").exists());
    });
}

#[test]
fn j12_privileged_a_working_directory_outside_the_root_is_refused() {
    each(|executor, root| {
        if executor.name() != "builtin" {
            return;
        }
        for cwd in ["/proc/self/fd/3", "/proc/self/cwd", "/no/such/directory", "/bin/sh"] {
            let mut step = sh(root, "pwd");
            step.cwd = cwd.into();
            assert!(run(executor, &step).result.is_err(), "{cwd}");
        }
    });
}

#[test]
fn privileged_what_a_step_leaves_running_is_killed() {
    each(|executor, root| {
        // The output stays open in the background process: if that lived on, this would hang.
        let ran = run(executor, &sh(root, "sleep 1000 & setsid sleep 1000 & (sleep 1000 &) ; echo done"));
        assert_eq!((ran.code(), ran.out.as_str()), (0, "done\n"));
    });
}

#[test]
fn privileged_orphans_are_reaped() {
    each(|executor, root| {
        if executor.name() != "builtin" {
            return;
        }
        let script = "for i in 1 2 3 4 5; do (true &); done; \
                      for i in 1 2 3 4 5 6 7 8 9; do cat /proc/[0-9]*/stat 2>/dev/null | grep -q ' Z ' || exit 0; sleep 0.1; done; \
                      exit 1";
        output(executor, root, script);
    });
}

/// Tells when the first byte came.
struct Tell(mpsc::Sender<()>);

impl Write for Tell {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn privileged_cancel_kills_everything() {
    each(|executor, root| {
        let cancel = Cancel::new();
        let (started, wait) = mpsc::channel();
        let step = sh(root, "trap '' TERM INT HUP; echo up; sleep 1000 & while true; do sleep 1000; done");
        std::thread::scope(|scope| {
            let running = scope.spawn(|| executor.run(&step, &mut Tell(started), &mut std::io::sink(), &cancel));
            wait.recv().unwrap();
            cancel.cancel();
            assert!(matches!(running.join().unwrap(), Err(ExecError::Canceled)));
        });
        // Before it began, too.
        let late = executor.run(&step, &mut std::io::sink(), &mut std::io::sink(), &cancel);
        assert!(matches!(late, Err(ExecError::Canceled)));
        assert!(!root.join("proc").exists());
    });
}

#[test]
fn privileged_cancel_at_any_moment_leaves_nothing_running() {
    for (executor, state) in executors() {
        let Some(root) = rootfs() else { return };
        eprintln!("with {}", executor.name());
        let step = sh(root.path(), "trap '' TERM INT HUP; while true; do sleep 1000; done");
        // The threads decide how far it gets.
        for _ in 0..8 {
            let cancel = Cancel::new();
            std::thread::scope(|scope| {
                let running = scope.spawn(|| executor.run(&step, &mut std::io::sink(), &mut std::io::sink(), &cancel));
                scope.spawn(|| cancel.cancel());
                assert!(matches!(running.join().unwrap(), Err(ExecError::Canceled)));
            });
        }
        for sub in ["state", "bundles"] {
            let left = std::fs::read_dir(state.path().join("runtime").join(sub)).into_iter().flatten().count();
            assert_eq!(left, 0, "{sub}");
        }
        let mine = root.path().to_str().unwrap().to_owned();
        assert!(!std::fs::read_to_string("/proc/self/mounts").unwrap().contains(&mine));
    }
}

struct Refuse;

impl Write for Refuse {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn privileged_a_sink_that_fails_ends_the_step() {
    each(|executor, root| {
        let step = sh(root, "while true; do echo y; done");
        let result = executor.run(&step, &mut Refuse, &mut std::io::sink(), &Cancel::new());
        assert!(matches!(result, Err(ExecError::Output { .. })), "{result:?}");
    });
}

#[test]
fn privileged_large_output_on_both_streams_does_not_block() {
    each(|executor, root| {
        let ran = run(
            executor,
            &sh(
                root,
                "awk 'BEGIN { for (i = 0; i < 40000; i++) { print \"0123456789\"; print \"0123456789\" > \"/dev/stderr\" } }'",
            ),
        );
        assert_eq!((ran.code(), ran.out.len(), ran.err.len()), (0, 440_000, 440_000));
    });
}

#[test]
fn privileged_steps_run_side_by_side() {
    each(|executor, _| {
        std::thread::scope(|scope| {
            for number in 0..4 {
                scope.spawn(move || {
                    let root = rootfs().unwrap();
                    let code = run(executor, &sh(root.path(), &format!("exit {number}"))).code();
                    assert_eq!(code, number);
                });
            }
        });
    });
}

#[test]
fn privileged_leftovers_of_a_dead_process_are_ended_and_those_of_ours_are_not() {
    let Some(root) = rootfs() else { return };
    let path: Vec<PathBuf> = ["/usr/sbin", "/usr/bin"].map(PathBuf::from).into();
    for name in RUNTIMES {
        let Some(program) = path.iter().map(|dir| dir.join(name)).find(|path| runtime::is_program(path)) else {
            eprintln!("SKIPPED: no {name}");
            continue;
        };
        let state = tempfile::tempdir().unwrap();
        let choice = ExecutorChoice::Runtime(program);
        let executor = pick(&choice, state.path(), &path).unwrap();
        let (started, wait) = mpsc::channel();
        let step = sh(root.path(), "echo up; exec sleep 1000");
        std::thread::scope(|scope| {
            let running = scope.spawn(|| executor.run(&step, &mut Tell(started), &mut std::io::sink(), &Cancel::new()));
            wait.recv().unwrap();
            // Another request of this process is at work there.
            let other = pick(&choice, state.path(), &path).unwrap();
            assert_eq!(run(&*other, &sh(root.path(), "exit 3")).code(), 3);
            assert!(!running.is_finished());
            // The next owner of the state directory finds the container.
            end_leftovers(state.path());
            assert!(!running.join().unwrap().is_ok_and(|status| status.success()));
        });
        assert_eq!(std::fs::read_dir(state.path().join("runtime/state")).unwrap().count(), 0);
    }
}

#[test]
fn steps_that_make_no_sense_are_refused() {
    let executor = Builtin::new();
    let bad = |change: &dyn Fn(&mut Step)| {
        let mut step = Step::new("/", ["true"]);
        change(&mut step);
        run(&executor, &step).result.unwrap_err()
    };
    assert!(matches!(bad(&|step| step.args.clear()), ExecError::InvalidStep { .. }));
    assert!(matches!(bad(&|step| step.cwd = "relative".into()), ExecError::InvalidStep { .. }));
    assert!(matches!(bad(&|step| step.args.push("a\0b".into())), ExecError::InvalidStep { .. }));
    assert!(matches!(bad(&|step| step.env.push(("A=B".into(), "".into()))), ExecError::InvalidStep { .. }));
}

#[test]
fn auto_takes_the_built_in_executor_where_there_is_no_runtime() {
    let state = tempfile::tempdir().unwrap();
    let executor = pick(&ExecutorChoice::Auto, state.path(), &[state.path().to_owned()]).unwrap();
    assert_eq!(executor.name(), "builtin");
    let missing = ExecutorChoice::Runtime("/no/such/runtime".into());
    assert!(matches!(pick(&missing, state.path(), &[]), Err(ExecError::NoRuntime { .. })));
}

#[test]
fn privileged_a_step_without_a_network_has_loopback_alone() {
    each(|executor, root| {
        let mut step = sh(root, "grep -c : /proc/net/dev; grep -c lo: /proc/net/dev; cat /proc/net/if_inet6 | wc -l");
        step.network = Network::None;
        let ran = run(executor, &step);
        // One interface; with its address if the kernel has IPv6, so it is up.
        let lines: Vec<&str> = ran.out.lines().collect();
        assert_eq!(lines[..2], ["1", "1"], "{}{}", ran.out, ran.err);
        let ipv6 = Path::new("/proc/net/if_inet6").exists();
        assert_eq!(lines[2].trim(), if ipv6 { "1" } else { "0" }, "{}{}", ran.out, ran.err);
    });
}

#[test]
fn privileged_limits_and_tmpfs_are_as_asked() {
    each(|executor, root| {
        let script = "ulimit -Sn; ulimit -Hn; ulimit -Hc; touch /ro/x 2>/dev/null || echo ro; touch /rw/x && echo rw";
        let mut step = sh(root, script);
        step.limits = ["nofile=100:200", "core=-1"].map(|text| ResourceLimit::parse(text).unwrap()).into();
        let tmpfs = |access| MountSource::Tmpfs { size_bytes: None, access };
        step.mounts.push(StepMount { target: "/ro".into(), source: tmpfs(Access::ReadOnly) });
        step.mounts.push(StepMount { target: "/rw".into(), source: tmpfs(Access::ReadWrite) });
        let ran = run(executor, &step);
        assert_eq!(ran.out, "100\n200\nunlimited\nro\nrw\n", "{}", ran.err);
    });
}

#[test]
fn limits_are_read_as_docker_reads_them() {
    let limit = |text| ResourceLimit::parse(text).map(|limit| (limit.name(), limit.soft, limit.hard));
    assert_eq!(limit("nofile=1:2"), Ok(("nofile", Some(1), Some(2))));
    assert_eq!(limit("core=-1"), Ok(("core", None, None)));
    assert_eq!(limit("stack=5"), Ok(("stack", Some(5), Some(5))));
    for bad in ["nofile", "files=1", "nofile=2:1", "nofile=-1:1", "nofile=x", "nofile=1:2:3", "nofile="] {
        assert!(limit(bad).is_err(), "{bad}");
    }
}

#[test]
fn privileged_what_a_runtime_writes_down_of_a_secret_is_on_no_disk() {
    for (executor, state) in executors() {
        let Some(root) = rootfs() else { return };
        let (started, wait) = mpsc::channel();
        let cancel = Cancel::new();
        let mut step = sh(root.path(), "echo up; exec sleep 1000");
        step.env.push(("TOKEN".into(), "hidden-from-disks".into()));
        step.secret = true;
        std::thread::scope(|scope| {
            let running = scope.spawn(|| executor.run(&step, &mut Tell(started), &mut std::io::sink(), &cancel));
            wait.recv().unwrap();
            let device = |path: &Path| std::os::unix::fs::MetadataExt::dev(&path.symlink_metadata().unwrap());
            let mut todo = vec![state.path().to_owned()];
            while let Some(dir) = todo.pop() {
                for entry in std::fs::read_dir(dir).unwrap().flatten() {
                    // Another device: the tmpfs.
                    if device(&entry.path()) != device(state.path()) {
                        continue;
                    }
                    if entry.path().is_dir() {
                        todo.push(entry.path());
                    } else if let Ok(bytes) = std::fs::read(entry.path()) {
                        let text = String::from_utf8_lossy(&bytes);
                        assert!(!text.contains("hidden-from-disks"), "{}", entry.path().display());
                    }
                }
            }
            cancel.cancel();
            assert!(matches!(running.join().unwrap(), Err(ExecError::Canceled)));
        });
        let left = std::fs::read_dir(state.path().join("memory")).map_or(0, |entries| entries.count());
        assert_eq!(left, 0, "{}", executor.name());
    }
}
