//! The build cache: records and the keys that find them.
