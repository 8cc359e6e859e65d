//! The image store: images by their config digest, and the names that point at them.
