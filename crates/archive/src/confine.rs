//! A thread that can reach nothing but one tree.
//!
//! Names from archives are opened so that nothing leads out of the tree ([`mod@crate::apply`]); this is the second wall, for
//! the day when the first has a hole: Landlock (Documentation/userspace-api/landlock.rst), where the kernel has it. Files that
//! are open already stay usable.

use std::os::fd::BorrowedFd;
use std::panic::resume_unwind;
use std::thread;

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible as _, PathBeneath, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError,
};

/// The first version that lets a thread link and rename between directories of its tree (Linux 5.19).
const OLDEST: ABI = ABI::V2;

/// The newest whose rights are about files only (Linux 6.10): those that the kernel does not know are left out.
const NEWEST: ABI = ABI::V5;

/// Does `work` in a thread that can open, make and remove nothing outside of the tree at `root`, if the kernel can see to
/// that. Nothing in the tree is executed.
pub(crate) fn confined<T: Send>(root: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // A kernel without it, or without room for one more ruleset, is no reason not to unpack.
            let _ = confine(root);
            work()
        });
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Confines this thread for good.
fn confine(root: BorrowedFd<'_>) -> Result<(), RulesetError> {
    let inside: BitFlags<AccessFs> = AccessFs::from_all(NEWEST) & !BitFlags::from(AccessFs::Execute);
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(OLDEST))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(root, inside))?
        .restrict_self()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{ErrorKind, Read as _};
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_confined_thread_reaches_its_tree_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("d")).unwrap();
        fs::write(dir.path().join("outside"), "outside").unwrap();
        let mut open = File::open(dir.path().join("outside")).unwrap();
        let root = File::open(&tree).unwrap();
        let has_it = thread::scope(|scope| scope.spawn(|| confine(root.as_fd()).is_ok()).join().unwrap());
        if !has_it {
            eprintln!("SKIPPED: this kernel has no Landlock");
            return;
        }
        confined(root.as_fd(), || {
            // What an archive may do in its tree.
            fs::write(tree.join("d/f"), "1").unwrap();
            fs::hard_link(tree.join("d/f"), tree.join("g")).unwrap();
            fs::rename(tree.join("g"), tree.join("d/h")).unwrap();
            std::os::unix::fs::symlink("../outside", tree.join("l")).unwrap();
            fs::read_dir(tree.join("d")).unwrap();
            fs::remove_file(tree.join("d/h")).unwrap();
            // And what not, by any name.
            for outside in [dir.path().join("outside"), tree.join("l"), tree.join("../outside"), "/etc/passwd".into()] {
                assert_eq!(fs::read(&outside).unwrap_err().kind(), ErrorKind::PermissionDenied, "{outside:?}");
                assert_eq!(fs::write(&outside, "x").unwrap_err().kind(), ErrorKind::PermissionDenied, "{outside:?}");
            }
            fs::write(dir.path().join("new"), "").unwrap_err();
            fs::create_dir(dir.path().join("new")).unwrap_err();
            fs::remove_file(dir.path().join("outside")).unwrap_err();
            fs::hard_link(dir.path().join("outside"), tree.join("taken")).unwrap_err();
            // What was open is.
            let mut text = String::new();
            open.read_to_string(&mut text).unwrap();
            assert_eq!(text, "outside");
        });
        // The thread that asked is as free as it was.
        assert_eq!(fs::read_to_string(dir.path().join("outside")).unwrap(), "outside");
    }
}
