//! Who holds which record right now. Memory holds nothing else of a record: a store with a million of them opens at
//! once.
//!
//! The one lock here is a leaf, held for a few instructions. A record is *held* by any number of immutable refs or by
//! one mutable ref, or it is *condemned*: somebody is removing it, and to everybody else it is gone. That order makes
//! get and removal exclude each other without a lock across the catalogue: a get holds first and reads the row then; a
//! removal condemns first, which fails if anybody holds, and removes the row then.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::sync::PoisonError;

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::{Holder, RecordId};

/// Records and their holders.
#[derive(Debug, Default)]
pub(crate) struct Live {
    entries: Mutex<HashMap<RecordId, Entry>>,
    next_ticket: AtomicU64,
}

#[derive(Debug, Default)]
struct Entry {
    holders: Vec<(Ticket, Holder)>,
    /// Its one holder may write.
    exclusive: bool,
    condemned: bool,
    /// Its row was read, and nothing below it must be fetched: another get needs no look at the catalogue.
    ready: bool,
    /// It shares the files of this mutable record, and both go when nobody holds it any more.
    goes_with: Option<RecordId>,
    /// It has files of its own by now: whoever read an older row does not pair it again.
    kept: bool,
}

/// What the end of a hold means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Others hold it still, or it stays as cache.
    Stays,
    /// It is condemned, with its partner: whoever let go removes them.
    Goes(Option<RecordId>),
}

/// Names one hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// Why a record cannot be held or condemned.
#[derive(Debug)]
pub(crate) enum Refused {
    Condemned,
    Locked(Holder),
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, HashMap<RecordId, Entry>> {
        // Nothing panics while holding it that leaves an entry half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ticket(&self) -> Ticket {
        Ticket(self.next_ticket.fetch_add(1, Ordering::Relaxed))
    }

    /// Holds a record for reading; says whether it is known to be ready.
    pub(crate) fn hold(&self, id: RecordId, holder: &Holder) -> Result<(Ticket, bool), Refused> {
        let mut entries = self.lock();
        let entry = entries.entry(id).or_default();
        if entry.condemned {
            return Err(Refused::Condemned);
        }
        if entry.exclusive {
            return Err(Refused::Locked(entry.holders[0].1.clone()));
        }
        let ticket = self.ticket();
        entry.holders.push((ticket, holder.clone()));
        Ok((ticket, entry.ready))
    }

    /// Holds a record for writing: it must not be held at all.
    pub(crate) fn hold_alone(&self, id: RecordId, holder: &Holder) -> Result<Ticket, Refused> {
        let mut entries = self.lock();
        let entry = entries.entry(id).or_default();
        if entry.condemned {
            return Err(Refused::Condemned);
        }
        if let Some((_, has)) = entry.holders.first() {
            return Err(Refused::Locked(has.clone()));
        }
        let ticket = self.ticket();
        entry.holders.push((ticket, holder.clone()));
        entry.exclusive = true;
        Ok(ticket)
    }

    /// A further hold of what is held already.
    pub(crate) fn hold_again(&self, id: RecordId, holder: &Holder) -> Ticket {
        let ticket = self.ticket();
        self.lock().entry(id).or_default().holders.push((ticket, holder.clone()));
        ticket
    }

    /// Notes that a get may skip the catalogue from now on.
    pub(crate) fn set_ready(&self, id: RecordId) {
        if let Some(entry) = self.lock().get_mut(&id) {
            entry.ready = true;
        }
    }

    /// Whether somebody holds it and a get may skip the catalogue.
    pub(crate) fn is_ready(&self, id: RecordId) -> bool {
        self.lock().get(&id).is_some_and(|entry| entry.ready && !entry.condemned)
    }

    /// Ends a hold. When it was the last one, and `remove` or the record goes with another, it is condemned in the same
    /// step.
    pub(crate) fn let_go(&self, id: RecordId, ticket: Ticket, remove: bool) -> Ended {
        let mut entries = self.lock();
        let MapEntry::Occupied(mut entry) = entries.entry(id) else { return Ended::Stays };
        // It was condemned as somebody's partner while a get looked at it: whoever removes it absolves it.
        if entry.get().condemned {
            return Ended::Stays;
        }
        let holders = &mut entry.get_mut().holders;
        // Recent refs go first, mostly.
        if let Some(at) = holders.iter().rposition(|(held, _)| *held == ticket) {
            holders.swap_remove(at);
        }
        if !holders.is_empty() {
            return Ended::Stays;
        }
        let partner = entry.get().goes_with;
        if !remove && partner.is_none() {
            entry.remove();
            return Ended::Stays;
        }
        let condemned = || Entry { condemned: true, ..Entry::default() };
        *entry.get_mut() = condemned();
        // Nobody uses the partner: whoever wants to write to it must condemn this record first, and whoever wants to
        // read it must hold this one. Those who are just looking find out.
        if let Some(partner) = partner {
            entries.insert(partner, condemned());
        }
        Ended::Goes(partner)
    }

    /// Has a held record go with `partner` when nobody holds it any more, unless it was said to be kept.
    pub(crate) fn pair(&self, id: RecordId, partner: RecordId) {
        if let Some(entry) = self.lock().get_mut(&id)
            && !entry.kept
        {
            entry.goes_with = Some(partner);
        }
    }

    /// Has a held record stay when nobody holds it any more, unless it is paired again.
    pub(crate) fn unpair(&self, id: RecordId) {
        if let Some(entry) = self.lock().get_mut(&id) {
            entry.goes_with = None;
        }
    }

    /// Has a held record stay for good when nobody holds it any more.
    pub(crate) fn keep(&self, id: RecordId) {
        if let Some(entry) = self.lock().get_mut(&id) {
            entry.goes_with = None;
            entry.kept = true;
        }
    }

    /// Condemns a record that nobody holds.
    pub(crate) fn condemn(&self, id: RecordId) -> Result<(), Refused> {
        let mut entries = self.lock();
        match entries.entry(id) {
            MapEntry::Vacant(entry) => {
                entry.insert(Entry { condemned: true, ..Entry::default() });
                Ok(())
            }
            MapEntry::Occupied(entry) if entry.get().condemned => Err(Refused::Condemned),
            MapEntry::Occupied(entry) => Err(Refused::Locked(
                entry.get().holders.first().expect("because an entry is held or condemned").1.clone(),
            )),
        }
    }

    /// The removal is done, or was not.
    pub(crate) fn absolve(&self, id: RecordId) {
        let mut entries = self.lock();
        if entries.get(&id).is_some_and(|entry| entry.condemned) {
            entries.remove(&id);
        }
    }

    /// How many hold it.
    pub(crate) fn holders(&self, id: RecordId) -> usize {
        self.lock().get(&id).map_or(0, |entry| entry.holders.len())
    }

    /// Everything that is held, with its holders, for whoever looks for leaks.
    pub(crate) fn all(&self) -> Vec<(RecordId, Vec<Holder>)> {
        let entries = self.lock();
        let holders = |entry: &Entry| entry.holders.iter().map(|(_, holder)| holder.clone()).collect::<Vec<_>>();
        entries.iter().map(|(id, entry)| (*id, holders(entry))).filter(|(_, held)| !held.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::Location;

    use super::*;
    use crate::RecordOptions;

    fn holder() -> Holder {
        Holder::of(&RecordOptions::by("test"), Location::caller())
    }

    const ID: RecordId = RecordId::from_bytes([1; 16]);
    const PARTNER: RecordId = RecordId::from_bytes([2; 16]);

    #[test]
    fn what_was_kept_is_not_paired_by_whoever_read_an_older_row() {
        let live = Live::default();
        let (finalizes, _) = live.hold(ID, &holder()).unwrap();
        live.pair(ID, PARTNER);
        let (looks, _) = live.hold(ID, &holder()).unwrap();
        live.keep(ID);
        live.pair(ID, PARTNER);
        assert_eq!(live.let_go(ID, finalizes, false), Ended::Stays);
        assert_eq!(live.let_go(ID, looks, false), Ended::Stays);
        assert!(live.all().is_empty());
    }

    #[test]
    fn a_partner_that_somebody_looks_at_stays_condemned_until_it_is_absolved() {
        let live = Live::default();
        let (last, _) = live.hold(ID, &holder()).unwrap();
        live.pair(ID, PARTNER);
        let (looks, _) = live.hold(PARTNER, &holder()).unwrap();
        assert_eq!(live.let_go(ID, last, false), Ended::Goes(Some(PARTNER)));
        assert_eq!(live.let_go(PARTNER, looks, false), Ended::Stays);
        assert!(matches!(live.hold(PARTNER, &holder()), Err(Refused::Condemned)));
        live.absolve(PARTNER);
        assert!(live.hold(PARTNER, &holder()).is_ok());
    }
}
