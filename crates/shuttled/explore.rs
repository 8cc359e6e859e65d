//! Runs a test in many of the orders in which its threads can get on.
//!
//! Threads, locks and atomic numbers of the store and the cache are shuttle's here: at each of them the scheduler decides who
//! goes on, and nobody else runs meanwhile. So a run is a list of decisions, drawn from a seed, and comes back with it. Half of
//! the runs draw each decision for itself; the others follow a priority that changes at a few places, which finds what needs
//! one thread to be very late (PCT: Burckhardt et al., ASPLOS 2010).

use std::path::Path;
use std::sync::Once;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

/// Each thread's stack, of which only what is used is ever there: the database alone needs some hundred KiB in a debug build.
const STACK_BYTES: usize = 4 << 20;

/// At how many places the order of priorities changes: most known races need no more than three.
const CHANGES: usize = 3;

/// Runs `body` so many times, in another order each time; in the long version twenty times as often.
pub(crate) fn explore(name: &str, usual: usize, body: impl Fn() + Send + Sync + 'static) {
    static IN_MEMORY: Once = Once::new();
    IN_MEMORY.call_once(|| {
        // Each run has a store of its own, and what a disk does to it is not what is tried.
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            tempfile::env::override_temp_dir(memory).expect("because nobody else says where");
        }
    });
    let (seed, rounds) = (plies_testkit::seed(), plies_testkit::rounds(usual));
    let config = || {
        let mut config = Config::new();
        config.stack_size = STACK_BYTES;
        // Atomic numbers are sequentially consistent here: what weaker orders allow is for ThreadSanitizer.
        config.silence_warnings = true;
        config
    };
    let body = std::sync::Arc::new(body);
    let again = std::sync::Arc::clone(&body);
    Runner::new(RandomScheduler::new_from_seed(seed, rounds / 2), config()).run(move || body());
    Runner::new(PctScheduler::new_from_seed(seed, CHANGES, rounds - rounds / 2), config()).run(move || again());
    println!("{name}: {rounds} orders of threads; 0 failures");
}
