//! tsquant: post-training quantization of TorchScript models.

pub mod jit;
pub mod names;
pub mod sites;
