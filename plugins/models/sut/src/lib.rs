//! `sut`: the Sparse Universal Transformer, the paper's baseline with experts and shared layers.
//!
//! Differences from `moeut`: a softmax gate with renormalized shares, attention experts that project whole groups of
//! heads, learned relative positions, and halting per token.

mod args;
mod attention;
mod banded;
mod block;
mod config;
mod experts;
mod feed_forward;
mod gate;
mod halting;
mod losses;
mod model;
mod scorer;
#[cfg(test)]
mod testing;

moeut_plugin_api::export_plugin!(libtorch = moeut_torch::LIBTORCH_VERSION);
moeut_plugin_api::register_model!(model::Sut);
