//! `dense`: Transformers with rotary positions and no experts: the baselines, with layers of their own or shared (naive
//! Universal Transformers). The layers are in `moeut-nn`; this crate holds block and variants.

mod block;
mod model;

use moeut_torch::LIBTORCH_VERSION;

moeut_plugin_api::export_plugin!(libtorch = LIBTORCH_VERSION);
moeut_plugin_api::register_model!(model::Dense);
