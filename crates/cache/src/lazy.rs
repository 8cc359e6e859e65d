//! Blobs that are not here yet: who can fetch them, and that each is fetched once.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};

use plies_oci::BlobDigest;
use plies_store::{Cancel, Canceled};

use crate::CacheError;
use crate::record::BlobRow;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, thread};

/// Somebody who can fetch a blob: a registry, another builder, an archive.
pub trait Provider: Send + Sync {
    /// Begins to read the blob from its start. What comes is hashed by the reader: a provider need not be trusted.
    ///
    /// # Errors
    /// The provider's.
    fn open(&self, blob: &BlobRow) -> io::Result<Box<dyn Read + Send>>;

    /// How to read parts of it, for formats that can be mounted before they are whole. Nothing here asks yet.
    fn ranges(&self) -> Option<&dyn RangeProvider> {
        None
    }
}

/// Somebody who can fetch a part of a blob.
pub trait RangeProvider: Send + Sync {
    /// Reads `length` bytes from `offset` on; fewer only at the end of the blob.
    ///
    /// # Errors
    /// The provider's.
    fn read_range(&self, blob: &BlobRow, offset: u64, length: u64) -> io::Result<Vec<u8>>;
}

/// Who can fetch which blob. Refs carry it on to what is made of them.
#[derive(Clone, Default)]
pub struct Providers(Arc<BTreeMap<BlobDigest, Arc<dyn Provider>>>);

impl Providers {
    /// Nobody.
    pub fn none() -> Self {
        Self::default()
    }

    /// One for one blob.
    pub fn one(digest: BlobDigest, provider: Arc<dyn Provider>) -> Self {
        Self(Arc::new(BTreeMap::from([(digest, provider)])))
    }

    /// The provider of a blob.
    pub fn get(&self, digest: BlobDigest) -> Option<&Arc<dyn Provider>> {
        self.0.get(&digest)
    }

    /// Both; where both know a blob, `later` counts.
    #[must_use]
    pub fn and(&self, later: &Self) -> Self {
        match (self.0.is_empty(), later.0.is_empty()) {
            (_, true) => self.clone(),
            (true, _) => later.clone(),
            _ => {
                let mut all = (*self.0).clone();
                all.extend(later.0.iter().map(|(digest, provider)| (*digest, Arc::clone(provider))));
                Self(Arc::new(all))
            }
        }
    }
}

/// Later ones of the same blob count.
impl FromIterator<(BlobDigest, Arc<dyn Provider>)> for Providers {
    fn from_iter<I: IntoIterator<Item = (BlobDigest, Arc<dyn Provider>)>>(providers: I) -> Self {
        Self(Arc::new(providers.into_iter().collect()))
    }
}

impl fmt::Debug for Providers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Work that is under way, by what it is about: whoever asks for the same joins in.
///
/// The work runs on a thread of its own, so that it belongs to nobody: a waiter that is cancelled leaves, and only when
/// the last one has left is the work itself asked to stop.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    flights: Mutex<HashMap<BlobDigest, Arc<Flight>>>,
}

#[derive(Debug, Default)]
struct Flight {
    state: Mutex<FlightState>,
    changed: Condvar,
    cancel: Cancel,
}

#[derive(Debug, Default)]
struct FlightState {
    waiters: usize,
    landed: Option<Result<(), Arc<CacheError>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flights {
    /// Does `work` for `key`, or waits for somebody who does.
    pub(crate) fn join(
        self: &Arc<Self>,
        key: BlobDigest,
        cancel: &Cancel,
        work: impl FnOnce(&Cancel) -> Result<(), CacheError> + Send + 'static,
    ) -> Result<(), CacheError> {
        if cancel.is_canceled() {
            return Err(Canceled.into());
        }
        let flight = {
            let mut flights = lock(&self.flights);
            let flight = match flights.get(&key) {
                Some(flight) => Arc::clone(flight),
                None => {
                    let flight = Arc::new(Flight::default());
                    flights.insert(key, Arc::clone(&flight));
                    let (all, ours) = (Arc::clone(self), Arc::clone(&flight));
                    let fly = move || {
                        // A provider is not ours: if it panics, whoever waits must hear of it.
                        let result = catch_unwind(AssertUnwindSafe(|| work(&ours.cancel)));
                        let result = result.unwrap_or_else(|_| {
                            let source = io::Error::other("whoever did the work panicked");
                            Err(CacheError::Provider { digest: key, source })
                        });
                        let result = result.map_err(Arc::new);
                        all.remove(key, &ours);
                        lock(&ours.state).landed = Some(result);
                        ours.changed.notify_all();
                    };
                    let spawned = thread::Builder::new().name("unlazy".into()).spawn(fly);
                    if let Err(source) = spawned {
                        flights.remove(&key);
                        return Err(CacheError::Provider { digest: key, source });
                    }
                    flight
                }
            };
            lock(&flight.state).waiters += 1;
            flight
        };
        // A word of its own: the cancel's lock, under which this is called, must not be taken under the flight's.
        let (stopped, waker) = (Arc::<AtomicBool>::default(), Arc::clone(&flight));
        let stop = Arc::clone(&stopped);
        let _wake = cancel.on_cancel(move || {
            stop.store(true, Ordering::Release);
            // So that it can't come between the look and the wait.
            drop(lock(&waker.state));
            waker.changed.notify_all();
        });
        let mut state = lock(&flight.state);
        loop {
            if let Some(landed) = &state.landed {
                return landed.clone().map_err(CacheError::Shared);
            }
            if stopped.load(Ordering::Acquire) {
                drop(state);
                // In the order of whoever joins: nobody can, between the last one's leaving and the flight's end.
                let mut flights = lock(&self.flights);
                let mut state = lock(&flight.state);
                state.waiters -= 1;
                if state.waiters == 0 {
                    // Whoever comes from now on begins anew.
                    if flights.get(&key).is_some_and(|there| Arc::ptr_eq(there, &flight)) {
                        flights.remove(&key);
                    }
                    flight.cancel.cancel();
                }
                return Err(Canceled.into());
            }
            state = flight.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn remove(&self, key: BlobDigest, flight: &Arc<Flight>) {
        let mut flights = lock(&self.flights);
        if flights.get(&key).is_some_and(|there| Arc::ptr_eq(there, flight)) {
            flights.remove(&key);
        }
    }
}
