//! What a step may do, whoever runs it: docker's defaults (moby `profiles/seccomp/default_linux.go`,
//! `oci/defaults_linux.go`, `oci/caps/defaults.go`).

/// The capabilities of a step, by name and number (include/uapi/linux/capability.h).
pub(super) const CAPABILITIES: [(&str, u32); 14] = [
    ("CAP_CHOWN", 0),
    ("CAP_DAC_OVERRIDE", 1),
    ("CAP_FOWNER", 3),
    ("CAP_FSETID", 4),
    ("CAP_KILL", 5),
    ("CAP_SETGID", 6),
    ("CAP_SETUID", 7),
    ("CAP_SETPCAP", 8),
    ("CAP_NET_BIND_SERVICE", 10),
    ("CAP_NET_RAW", 13),
    ("CAP_SYS_CHROOT", 18),
    ("CAP_MKNOD", 27),
    ("CAP_AUDIT_WRITE", 29),
    ("CAP_SETFCAP", 31),
];

/// All capabilities by their numbers (the same header, Linux 6.1).
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The names of what this process may: all that a step with `--security=insecure` can be given.
pub(super) fn own_capabilities() -> Vec<&'static str> {
    let own = rustix::thread::capabilities(None).map_or(0, |own| own.permitted.bits());
    ALL_CAPABILITIES.iter().enumerate().filter(|(number, _)| own >> number & 1 == 1).map(|(_, name)| *name).collect()
}

/// The devices that BuildKit adds for `--security=insecure` (`util/entitlements/security`), below `/dev`.
const INSECURE_DEVICES: [&str; 14] = [
    "kmsg",
    "cuse",
    "fuse",
    "kvm",
    "net/tun",
    "loop-control",
    "loop0",
    "loop1",
    "loop2",
    "loop3",
    "loop4",
    "loop5",
    "loop6",
    "loop7",
];

/// A device of this machine.
pub(super) struct HostDevice {
    /// Below `/dev`.
    pub(super) name: &'static str,
    pub(super) is_block: bool,
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// Those of [`INSECURE_DEVICES`] that this machine has.
pub(super) fn insecure_devices() -> Vec<HostDevice> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let device = |name: &&'static str| {
        let found = std::fs::symlink_metadata(format!("/dev/{name}")).ok()?;
        let (kind, number) = (found.file_type(), found.rdev());
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let is_block = kind.is_block_device();
        (is_block || kind.is_char_device()).then_some(HostDevice { name, is_block, major, minor })
    };
    INSECURE_DEVICES.iter().filter_map(device).collect()
}

/// What a step can't see.
pub(super) const MASKED_PATHS: [&str; 13] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/kernel/debug",
];

/// What a step can only read.
pub(super) const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The mode bits that a step's processes start without.
pub(super) const UMASK: u32 = 0o022;

/// How many bytes `/dev` and `/dev/shm` may hold each: docker's 64 MiB.
pub(super) const DEV_SIZE: &str = "65536k";

/// The search path of a step whose environment has none.
pub(super) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
