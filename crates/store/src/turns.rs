//! What several requests of this process may want at once: the first does it, the others wait and find the result.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::{Cancel, Canceled};

/// Who is at what, by a key.
#[derive(Debug)]
pub struct Turns<K>(Arc<(Mutex<BTreeSet<K>>, Condvar)>);

/// The right to do what some keys stand for; ends when dropped.
#[derive(Debug)]
#[must_use = "others begin when this is dropped"]
pub struct Turn<K: Ord> {
    turns: Turns<K>,
    keys: BTreeSet<K>,
}

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K> Turns<K> {
    fn busy(&self) -> MutexGuard<'_, BTreeSet<K>> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Ord + Clone + Send + 'static> Turns<K> {
    /// Waits until nobody is at any of these, and takes them all at once: whoever waits holds none, so no two wait for
    /// each other. A turn is not taken by who has one already.
    ///
    /// # Errors
    /// [`Canceled`], if the caller does not want to wait any more.
    pub fn take(&self, keys: impl IntoIterator<Item = K>, cancel: &Cancel) -> Result<Turn<K>, Canceled> {
        let keys: BTreeSet<K> = keys.into_iter().collect();
        // A word of its own: the cancel's lock, under which this is called, must not be taken under ours.
        let (stopped, shared) = (Arc::<AtomicBool>::default(), Arc::clone(&self.0));
        let stop = Arc::clone(&stopped);
        let _wakes = cancel.on_cancel(move || {
            stop.store(true, Ordering::Release);
            // So that it can't come between the look and the wait.
            drop(shared.0.lock());
            shared.1.notify_all();
        });
        let mut busy = self.busy();
        while keys.iter().any(|key| busy.contains(key)) {
            if stopped.load(Ordering::Acquire) {
                return Err(Canceled);
            }
            busy = self.0.1.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        busy.extend(keys.iter().cloned());
        drop(busy);
        Ok(Turn { turns: Self(Arc::clone(&self.0)), keys })
    }
}

impl<K: Ord> Drop for Turn<K> {
    fn drop(&mut self) {
        let mut busy = self.turns.busy();
        busy.retain(|key| !self.keys.contains(key));
        drop(busy);
        self.turns.0.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_are_waited_for_and_a_cancel_ends_the_wait() {
        let (turns, cancel) = (Turns::default(), Cancel::new());
        let held = turns.take([1, 2], &cancel).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| turns.take([2, 3], &cancel).map(drop));
            // Of what somebody waits for nothing is taken.
            drop(turns.take([3], &cancel).unwrap());
            cancel.cancel();
            assert_eq!(waits.join().unwrap(), Err(Canceled));
            let goes_on = scope.spawn(|| turns.take([2, 3], &Cancel::new()).map(drop));
            drop(held);
            assert_eq!(goes_on.join().unwrap(), Ok(()));
        });
    }
}
