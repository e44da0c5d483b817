//! `moeut`: Transformers with mixture-of-experts layers, shared or not: MoEUT, its pre- and post-layernorm ablations and
//! the σ-MoE comparison. The layers are in `moeut-nn`; this crate holds arguments, block and stack.

mod args;
mod block;
mod config;
mod model;

use moeut_torch::LIBTORCH_VERSION;

moeut_plugin_api::export_plugin!(libtorch = LIBTORCH_VERSION);
moeut_plugin_api::register_model!(model::Moeut);
