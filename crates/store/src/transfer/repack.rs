//! Layers are kept in another form: as their tars, or as directories again.

use crate::catalogue::Rows as _;
use crate::catalogue::schema::{LAYERS, LayerKind, LayerRow, META, META_REPACKING};
use crate::layers::{LayerError, layer_dir};
use crate::progress::{Outcome, Task};
use crate::recover::settle;
use crate::{LayerId, packed};

use super::{Transfer, TransferError};

impl Transfer<'_> {
    /// The layers that this store's driver would keep in another form if they came now: those that came as tars and stand
    /// by themselves.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn to_repack(&self) -> Result<Vec<LayerId>, TransferError> {
        let store = self.store();
        let mut found = Vec::new();
        for (id, row) in store.read(|rows| rows.all(&LAYERS))? {
            let came = row.kind == LayerKind::Full && row.diff_id.is_some() && row.chain_id.is_none();
            if came && packed::is_packed(&layer_dir(store, id)).map_err(LayerError::from)? != store.inner.driver.packs()
            {
                found.push(id);
            }
        }
        Ok(found)
    }

    /// Keeps a layer in the form that this store's driver gives to layers, made from a blob of it or from itself. Says
    /// whether that could be done: what no index can hold stays a directory, and what nothing gives back stays as it is.
    ///
    /// Nothing may be mounted that shows the layer: its files go. A crash leaves one form or the other, and a row for it
    /// that the next opening puts right (`settle`).
    ///
    /// # Errors
    /// [`TransferError`]; then the layer is as it was.
    pub fn repack(&self, layer: LayerId) -> Result<bool, TransferError> {
        let store = self.store();
        if !self.lease.hold_if_present(layer)? {
            return Ok(false);
        }
        let row: Option<LayerRow> = store.read(|rows| rows.get(&LAYERS, &layer))?;
        let Some((before, diff_id)) = row.and_then(|row| row.diff_id.map(|diff_id| (row, diff_id))) else {
            return Ok(false);
        };
        let task = Task::start(self.progress, &format!("repack layer {diff_id}"), None);
        let Some(stage) = self.restage(layer, diff_id)? else { return Ok(false) };
        if stage.is_packed().map_err(LayerError::from)? != store.inner.driver.packs() {
            return Ok(false);
        }
        // A row that knows of a recording is right for a packed layer too, which has no use for one; one that does not
        // know of it could not give the tar of a directory back.
        let early = LayerRow { tar_split: before.tar_split || stage.has_tar_split(), ..before.clone() };
        store.write(|tx| {
            tx.put(&META, &META_REPACKING.to_owned(), &u64::from_be_bytes(*layer.as_bytes()))?;
            tx.replace_layer(layer, &early)
        })?;
        let aside = store.inner.paths.stage.join(LayerId::from_bytes(store.inner.fresh_id()?).to_string());
        let replaced = stage.replace(store, layer, &before, &aside).map_err(LayerError::from);
        settle(store).map_err(LayerError::from)?;
        replaced?;
        store.inner.discard_dir(&aside);
        task.end(Outcome::Done);
        Ok(true)
    }
}
