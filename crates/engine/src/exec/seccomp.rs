//! The system calls that a step is refused, as a kernel filter and as an OCI runtime's configuration.
//!
//! Docker lists what is allowed; we list what docker would refuse with its default capabilities, and refuse whatever is
//! newer than this list as unknown (`ENOSYS`, so that programs fall back). Processes of the other word size and the x32
//! numbers of x86-64, which would slip by a list of numbers, are judged by their own numbers or refused.
//!
//! Written out here rather than with a filter compiler: the crates there are kill 32-bit processes, and know nothing of
//! x32.

/// Where a system call's number differs: x86-64, i386, arm64 (asm/unistd_64.h, asm/unistd_32.h, asm-generic/unistd.h).
type Numbers = [Option<u32>; 3];

const fn n(number: u32) -> Option<u32> {
    Some(number)
}

/// Refused with `EPERM`.
pub(super) const DENIED: [(&str, Numbers); 76] = [
    ("_sysctl", [n(156), n(149), None]),
    ("acct", [n(163), n(51), n(89)]),
    ("add_key", [n(248), n(286), n(217)]),
    ("afs_syscall", [n(183), n(137), None]),
    ("bdflush", [None, n(134), None]),
    ("bpf", [n(321), n(357), n(280)]),
    ("clock_settime", [n(227), n(264), n(112)]),
    ("clock_settime64", [None, n(404), None]),
    ("create_module", [n(174), n(127), None]),
    ("delete_module", [n(176), n(129), n(106)]),
    ("fanotify_init", [n(300), n(338), n(262)]),
    ("finit_module", [n(313), n(350), n(273)]),
    ("fsconfig", [n(431), n(431), n(431)]),
    ("fsmount", [n(432), n(432), n(432)]),
    ("fsopen", [n(430), n(430), n(430)]),
    ("fspick", [n(433), n(433), n(433)]),
    ("get_kernel_syms", [n(177), n(130), None]),
    ("get_mempolicy", [n(239), n(275), n(236)]),
    ("getpmsg", [n(181), n(188), None]),
    ("init_module", [n(175), n(128), n(105)]),
    ("io_uring_enter", [n(426), n(426), n(426)]),
    ("io_uring_register", [n(427), n(427), n(427)]),
    ("io_uring_setup", [n(425), n(425), n(425)]),
    ("ioperm", [n(173), n(101), None]),
    ("iopl", [n(172), n(110), None]),
    ("kcmp", [n(312), n(349), n(272)]),
    ("kexec_file_load", [n(320), None, n(294)]),
    ("kexec_load", [n(246), n(283), n(104)]),
    ("keyctl", [n(250), n(288), n(219)]),
    ("listmount", [n(458), n(458), n(458)]),
    ("lookup_dcookie", [n(212), n(253), n(18)]),
    ("lsm_set_self_attr", [n(460), n(460), n(460)]),
    ("mbind", [n(237), n(274), n(235)]),
    ("migrate_pages", [n(256), n(294), n(238)]),
    ("mount", [n(165), n(21), n(40)]),
    ("mount_setattr", [n(442), n(442), n(442)]),
    ("move_mount", [n(429), n(429), n(429)]),
    ("move_pages", [n(279), n(317), n(239)]),
    ("nfsservctl", [n(180), n(169), n(42)]),
    ("open_by_handle_at", [n(304), n(342), n(265)]),
    ("open_tree", [n(428), n(428), n(428)]),
    ("open_tree_attr", [n(467), n(467), n(467)]),
    ("perf_event_open", [n(298), n(336), n(241)]),
    ("pidfd_getfd", [n(438), n(438), n(438)]),
    ("pivot_root", [n(155), n(217), n(41)]),
    ("process_madvise", [n(440), n(440), n(440)]),
    ("putpmsg", [n(182), n(189), None]),
    ("query_module", [n(178), n(167), None]),
    ("quotactl", [n(179), n(131), n(60)]),
    ("quotactl_fd", [n(443), n(443), n(443)]),
    ("reboot", [n(169), n(88), n(142)]),
    ("request_key", [n(249), n(287), n(218)]),
    ("security", [n(185), None, None]),
    ("set_mempolicy", [n(238), n(276), n(237)]),
    ("set_mempolicy_home_node", [n(450), n(450), n(450)]),
    ("setdomainname", [n(171), n(121), n(162)]),
    ("sethostname", [n(170), n(74), n(161)]),
    ("setns", [n(308), n(346), n(268)]),
    ("settimeofday", [n(164), n(79), n(170)]),
    ("statmount", [n(457), n(457), n(457)]),
    ("stime", [None, n(25), None]),
    ("swapoff", [n(168), n(115), n(225)]),
    ("swapon", [n(167), n(87), n(224)]),
    ("sysfs", [n(139), n(135), None]),
    ("syslog", [n(103), n(103), n(116)]),
    ("tuxcall", [n(184), None, None]),
    ("umount", [None, n(22), None]),
    ("umount2", [n(166), n(52), n(39)]),
    ("unshare", [n(272), n(310), n(97)]),
    ("uselib", [n(134), n(86), None]),
    ("userfaultfd", [n(323), n(374), n(282)]),
    ("ustat", [n(136), n(62), None]),
    ("vhangup", [n(153), n(111), n(58)]),
    ("vm86", [None, n(166), None]),
    ("vm86old", [None, n(113), None]),
    ("vserver", [n(236), n(273), None]),
];

/// `clone` with any of these makes a namespace: `CLONE_NEW*` without `CLONE_NEWTIME`, which `clone` can't.
pub(super) const CLONE_NAMESPACES: u32 = 0x7e02_0000;
/// Types into or redraws a terminal that isn't the step's own: `TIOCSTI`, `TIOCLINUX`.
pub(super) const TERMINAL_IOCTLS: [u32; 2] = [0x5412, 0x541c];
/// Sockets to the host of a virtual machine.
pub(super) const AF_VSOCK: u32 = 40;
/// What `personality` may ask for: Linux, Linux with 32-bit `uname`, each without address randomisation, and what it is.
pub(super) const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

const CLONE: Numbers = [n(56), n(120), n(220)];
/// Its flags are in memory, where no filter can look: `ENOSYS` has programs use `clone`.
const CLONE3: u32 = 435;
const IOCTL: Numbers = [n(16), n(54), n(29)];
const SOCKET: Numbers = [n(41), n(359), n(198)];
const PERSONALITY: Numbers = [n(135), n(136), n(92)];

/// The last system call that the lists above know of: `file_setattr`, Linux 6.17. Since 424 all architectures number
/// alike.
const LAST_KNOWN: u32 = 469;
/// The bit of x32's numbers.
const X32: u32 = 0x4000_0000;

/// One instruction of classic BPF, as the kernel takes it (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    k: u32,
}

/// BPF_LD | BPF_W | BPF_ABS
const LOAD: u16 = 0x20;
/// BPF_JMP | BPF_JEQ | BPF_K
const JUMP_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGT | BPF_K
const JUMP_GREATER: u16 = 0x25;
/// BPF_JMP | BPF_JSET | BPF_K
const JUMP_ANY_BIT: u16 = 0x45;
/// BPF_JMP | BPF_JA
const JUMP: u16 = 0x05;
/// BPF_RET | BPF_K
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`; arguments are 64 bits, of which the low half counts here.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: [u32; 2] = [16, 24];

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0000 | 1;
const ENOSYS: u32 = 0x0005_0000 | 38;

/// `AUDIT_ARCH_*` (include/uapi/linux/audit.h), by the column of [`Numbers`].
const ARCHES: [u32; 3] = [0xc000_003e, 0x4000_0003, 0xc000_00b7];

fn load(offset: u32) -> Instruction {
    Instruction { code: LOAD, jump_true: 0, jump_false: 0, k: offset }
}

fn ret(value: u32) -> Instruction {
    Instruction { code: RETURN, jump_true: 0, jump_false: 0, k: value }
}

/// Goes on with the next instruction if the test holds, else skips one.
fn unless_skip(code: u16, k: u32) -> Instruction {
    Instruction { code, jump_true: 0, jump_false: 1, k }
}

/// The filter.
pub(super) fn filter() -> Vec<Instruction> {
    let mut program = vec![load(ARCH)];
    for (column, arch) in ARCHES.into_iter().enumerate() {
        let rules = rules(column);
        program.push(Instruction { code: JUMP_EQUAL, jump_true: 1, jump_false: 0, k: arch });
        let over = u32::try_from(rules.len()).expect("the rules are a few hundred");
        program.push(Instruction { code: JUMP, jump_true: 0, jump_false: 0, k: over });
        program.extend(rules);
    }
    // 32-bit ARM, or a machine we never heard of: nothing that could be judged.
    program.push(ret(ENOSYS));
    program
}

fn rules(column: usize) -> Vec<Instruction> {
    let mut rules = vec![load(NR)];
    // x32 and all that is newer than this list.
    const { assert!(X32 > LAST_KNOWN) };
    rules.extend([unless_skip(JUMP_GREATER, LAST_KNOWN), ret(ENOSYS)]);
    rules.extend([unless_skip(JUMP_EQUAL, CLONE3), ret(ENOSYS)]);
    for number in DENIED.iter().filter_map(|(_, numbers)| numbers[column]) {
        rules.extend([unless_skip(JUMP_EQUAL, number), ret(EPERM)]);
    }
    // A rule on an argument ends the program: the number is no longer loaded.
    let mut on_argument = |numbers: Numbers, argument: usize, tests: &[(u16, u32)], hit: u32, miss: u32| {
        let Some(number) = numbers[column] else { return };
        let skip = u8::try_from(2 * tests.len() + 2).expect("there are few tests");
        rules.push(Instruction { code: JUMP_EQUAL, jump_true: 0, jump_false: skip, k: number });
        rules.push(load(ARGS[argument]));
        for (code, k) in tests {
            rules.extend([unless_skip(*code, *k), ret(hit)]);
        }
        rules.push(ret(miss));
    };
    on_argument(CLONE, 0, &[(JUMP_ANY_BIT, CLONE_NAMESPACES)], EPERM, ALLOW);
    on_argument(IOCTL, 1, &TERMINAL_IOCTLS.map(|request| (JUMP_EQUAL, request)), EPERM, ALLOW);
    on_argument(SOCKET, 0, &[(JUMP_EQUAL, AF_VSOCK)], EPERM, ALLOW);
    on_argument(PERSONALITY, 0, &PERSONALITIES.map(|wanted| (JUMP_EQUAL, wanted)), ALLOW, EPERM);
    rules.push(ret(ALLOW));
    rules
}

/// The same for an OCI runtime. Runtimes have their own answer to what is newer than they are.
pub(super) fn oci_profile() -> serde_json::Value {
    use serde_json::json;
    let architectures: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &[],
    };
    let names: Vec<&str> = DENIED.iter().map(|(name, _)| *name).collect();
    let denied = |names: &[&str], args: serde_json::Value| {
        json!({
            "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": args,
        })
    };
    let mut syscalls = vec![
        denied(&names, json!([])),
        denied(&["socket"], json!([{ "index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_EQ" }])),
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }),
    ];
    // Runtimes can compare under a mask but not ask for any bit of it: one rule for each.
    for bit in (0..32).map(|shift| 1u32 << shift).filter(|bit| CLONE_NAMESPACES & bit != 0) {
        let arg = json!([{ "index": 0, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ" }]);
        syscalls.push(denied(&["clone"], arg));
    }
    for request in TERMINAL_IOCTLS {
        syscalls.push(denied(&["ioctl"], json!([{ "index": 1, "value": request, "op": "SCMP_CMP_EQ" }])));
    }
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": syscalls })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn verdict(arch: u32, number: u32, args: [u32; 2]) -> u32 {
        let program = filter();
        let (mut at, mut a) = (0, 0);
        loop {
            let Instruction { code, jump_true, jump_false, k } = program[at];
            at += 1;
            let mut jump = |test: bool| at += usize::from(if test { jump_true } else { jump_false });
            match code {
                LOAD if k == NR => a = number,
                LOAD if k == ARCH => a = arch,
                LOAD => a = args[ARGS.iter().position(|offset| *offset == k).unwrap()],
                JUMP_EQUAL => jump(a == k),
                JUMP_GREATER => jump(a > k),
                JUMP_ANY_BIT => jump(a & k != 0),
                JUMP => at += k as usize,
                RETURN => return k,
                _ => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn every_denied_call_is_denied_on_every_architecture() {
        for (column, arch) in ARCHES.into_iter().enumerate() {
            for (name, numbers) in DENIED {
                if let Some(number) = numbers[column] {
                    assert_eq!(verdict(arch, number, [0, 0]), EPERM, "{name} on {arch:#x}");
                }
            }
        }
    }

    #[test]
    fn ordinary_calls_are_allowed() {
        // read write open execve exit wait4 kill chroot ptrace setuid on each.
        for number in [0, 1, 2, 59, 60, 61, 62, 161, 101, 105] {
            assert_eq!(verdict(ARCHES[0], number, [0, 0]), ALLOW, "{number}");
        }
        for number in [1, 3, 4, 11, 61, 26, 203] {
            assert_eq!(verdict(ARCHES[1], number, [0, 0]), ALLOW, "{number}");
        }
        for number in [63, 64, 221, 93, 51, 117, 146] {
            assert_eq!(verdict(ARCHES[2], number, [0, 0]), ALLOW, "{number}");
        }
    }

    #[test]
    fn arguments_decide_where_they_must() {
        for (column, arch) in ARCHES.into_iter().enumerate() {
            let clone = CLONE[column].unwrap();
            assert_eq!(verdict(arch, clone, [0x0120_0011, 0]), ALLOW, "fork");
            assert_eq!(verdict(arch, clone, [0x1000_0011, 0]), EPERM, "CLONE_NEWUSER");
            assert_eq!(verdict(arch, clone, [0x0002_0011, 0]), EPERM, "CLONE_NEWNS");
            assert_eq!(verdict(arch, CLONE3, [0, 0]), ENOSYS);
            let ioctl = IOCTL[column].unwrap();
            assert_eq!(verdict(arch, ioctl, [0, 0x5412]), EPERM, "TIOCSTI");
            assert_eq!(verdict(arch, ioctl, [0, 0x5401]), ALLOW, "TCGETS");
            assert_eq!(verdict(arch, SOCKET[column].unwrap(), [40, 0]), EPERM, "vsock");
            assert_eq!(verdict(arch, SOCKET[column].unwrap(), [1, 0]), ALLOW, "unix");
            assert_eq!(verdict(arch, PERSONALITY[column].unwrap(), [0xffff_ffff, 0]), ALLOW);
            assert_eq!(verdict(arch, PERSONALITY[column].unwrap(), [0x0400_0000, 0]), EPERM);
        }
    }

    #[test]
    fn numbers_that_slip_by_a_list_are_unknown() {
        assert_eq!(verdict(ARCHES[0], X32 | 165, [0, 0]), ENOSYS, "x32 mount");
        assert_eq!(verdict(ARCHES[0], 470, [0, 0]), ENOSYS, "newer than the list");
        assert_eq!(verdict(0x4000_0028, 21, [0, 0]), ENOSYS, "32-bit ARM");
    }

    #[test]
    fn names_are_sorted_and_unique() {
        assert!(DENIED.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
