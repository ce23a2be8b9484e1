//! Overrides as typed.
