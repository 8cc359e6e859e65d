//! For tests only: builders of archives and images, tree comparison, tools of the field as oracles.
