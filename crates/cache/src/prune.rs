//! Prune.

/// Says which records an image store keeps as well: those are shared, and removing them frees nothing.
pub trait SharedChecker: Send + Sync {
    /// Whether a record with these layers (blob digests or diff IDs, bottom first) is somebody else's too.
    ///
    /// # Errors
    /// The checker's own.
    fn exists(
        &self,
        id: crate::RecordId,
        layers: &[plies_oci::DiffId],
    ) -> Result<bool, Box<dyn std::error::Error + Send + Sync>>;
}
