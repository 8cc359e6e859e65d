//! Requests composed of the other parts: load, save, run, build.
