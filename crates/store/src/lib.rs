//! The store: content, catalogue, leases, garbage collection, layers, snapshots and mounts.
