/// What a caller can do about an error. Every error enum of the workspace answers `kind()`.
///
/// The front ends map kinds, never texts, to exit codes and wire codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The named thing is not there.
    NotFound,
    /// The named thing is there already and may not be replaced.
    AlreadyExists,
    /// The caller's input is wrong; the same call can never succeed.
    InvalidInput,
    /// The state does not allow the operation now.
    FailedPrecondition,
    /// Somebody else holds it; trying again later may succeed.
    Busy,
    /// A named limit was hit.
    Limit,
    /// Something outside (a file system, a tool, a peer) did not do its part.
    Unavailable,
    /// The caller asked to stop.
    Canceled,
    /// Bytes are not what they are said to be. Never retried into success.
    DataLoss,
    /// A defect of ours.
    Internal,
}
