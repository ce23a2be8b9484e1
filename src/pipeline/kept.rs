//! What runs leave on disk for later ones: Hessian scores beside a report, and the statistics of a calibration. Both are
//! safetensors under the names of the report, with a description in the metadata; what they belong to is told by hashes.

mod merge;
pub(super) mod scores;
pub(super) mod statistics;
mod tensors;
