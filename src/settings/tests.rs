//! Overrides on sites.
