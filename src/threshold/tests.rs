//! How good the chosen thresholds are: against brute force, within stated bounds, on data of many kinds.

mod data;
mod hmse;
mod kl;
mod off_diagonal;
mod quality;
