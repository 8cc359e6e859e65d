//! Asking something that runs to stop.

use std::io;
use std::sync::{Arc, PoisonError};

use plies_oci::ErrorKind;

use crate::sync::{Mutex, MutexGuard};

/// The request was cancelled by its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Canceled;

impl Canceled {
    /// Always [`ErrorKind::Canceled`].
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Canceled
    }
}

/// Whether the cause of an error, however deep, is that the caller asked to stop.
pub fn canceled_inside(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<Canceled>() || inner.is_some_and(|inner| inner.is::<Canceled>()) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A request to stop, shared by whoever may ask and whatever is to stop. Clones are the same request.
#[derive(Debug, Clone, Default)]
pub struct Cancel {
    inner: Arc<Mutex<CancelState>>,
}

#[derive(Default)]
struct CancelState {
    canceled: bool,
    next: u64,
    actions: Vec<(u64, Box<dyn Fn() + Send>)>,
}

impl std::fmt::Debug for CancelState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelState").field("canceled", &self.canceled).finish_non_exhaustive()
    }
}

impl Cancel {
    /// A request that nobody has made yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks to stop: what runs is killed, what starts later doesn't. Safe to repeat; not for use in a signal handler.
    pub fn cancel(&self) {
        let mut state = self.lock();
        state.canceled = true;
        for (_, action) in &state.actions {
            action();
        }
    }

    /// Whether anybody has asked.
    pub fn is_canceled(&self) -> bool {
        self.lock().canceled
    }

    /// For loops over bytes: an error with [`Canceled`] inside once somebody has asked.
    ///
    /// # Errors
    /// That error only.
    pub fn check(&self) -> io::Result<()> {
        if self.is_canceled() { Err(io::Error::other(Canceled)) } else { Ok(()) }
    }

    /// Has `action` called on a cancel (now, if that was earlier) for as long as the guard lives. Actions are quick and
    /// can't fail: they send a signal or wake a thread.
    pub fn on_cancel(&self, action: impl Fn() + Send + 'static) -> CancelGuard {
        let mut state = self.lock();
        if state.canceled {
            action();
        }
        let id = state.next;
        state.next += 1;
        state.actions.push((id, Box::new(action)));
        CancelGuard { cancel: self.clone(), id }
    }

    /// Nothing can panic while holding the lock that leaves the state wrong.
    fn lock(&self) -> MutexGuard<'_, CancelState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps an action registered; see [`Cancel::on_cancel`].
#[derive(Debug)]
#[must_use = "the action is forgotten when this is dropped"]
pub struct CancelGuard {
    cancel: Cancel,
    id: u64,
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.cancel.lock().actions.retain(|(id, _)| *id != self.id);
    }
}
