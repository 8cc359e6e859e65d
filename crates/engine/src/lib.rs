//! Requests composed of the other parts: load, save, run, build.

pub mod context;
pub mod dockerfile;
pub mod exec;
