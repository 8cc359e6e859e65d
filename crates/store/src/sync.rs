//! Locks and threads, from one place for this crate: those of the standard library, or those of a scheduler that tries in
//! which orders threads can get on. With the second the crate is compiled once more, for tests (`crates/shuttled`).
//!
//! Only for what threads do with each other. What a test would not see, since nobody waits behind it, is taken from
//! `std` as everywhere: a number that is counted up, a value that is made once.

#[cfg(shuttle)]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, atomic, mpsc},
    thread,
};
#[cfg(not(shuttle))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, atomic, mpsc},
    thread,
};
