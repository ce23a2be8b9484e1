//! tsquant: post-training quantization of TorchScript models. TorchScript in, TorchScript out, no Python at run time.
//!
//! A run goes one way: a [`config::Plan`] names a model and data; [`jit`] loads and cleans the model; [`sites`] says what is
//! quantized, [`settings`] how; [`observe`] collects [`statistics`] while the data runs; [`threshold`] chooses one [`quantizer`] per site;
//! [`correct`] takes out what that does to biases; [`emit`] writes the quantized model; [`evaluate`] compares it with the float one; [`report`] tells. [`pipeline`] holds
//! that order. ARCHITECTURE.md is the map.

pub mod budget;
pub mod cli;
pub mod config;
pub mod correct;
pub mod dataset;
pub mod emit;
pub mod evaluate;
pub mod feed;
pub mod hessian;
pub mod jit;
pub mod lower;
pub mod names;
pub mod observe;
pub mod on_device;
pub mod pipeline;
pub mod quantizer;
pub mod random;
pub mod report;
pub mod settings;
pub mod simulate;
pub mod sites;
pub mod speed;
pub mod statistics;
pub mod threshold;
