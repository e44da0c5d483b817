//! Layers that the model plugins share, one concept per file.
//!
//! A layer computes. It does not log, read arguments or know its index in the stack; what there is to report is
//! returned. Shape letters used throughout:
//! `B` batch, `T` `seq_len`, `N = B·T` tokens, `D` `d_model`, `H` `n_heads`, `d` `d_head`, `E` feed-forward experts,
//! `K` experts per token, `S` `d_expert`, `A` attention experts per head, `k` attention experts per head and token,
//! `V` `vocab_size`.
//!
//! Wrong shapes are defects of the caller, so layers use tch's panicking operations, which the plugin boundary turns
//! into errors. Only a kernel, which is foreign code, returns errors.

pub mod activation;
pub mod attention;
pub mod attention_maps;
pub mod balance;
pub mod charts;
pub mod context;
pub mod cost;
pub mod embedding;
pub mod init;
pub mod linear;
pub mod lm;
pub mod lm_head;
pub mod moe;
pub mod moe_stats;
pub mod norm;
pub mod padding;
pub mod params;
pub mod past;
pub mod rope;
pub mod router;
pub mod routing;
pub mod sharing;
pub mod stream;
pub mod switchhead;
pub mod switchhead_stats;
pub mod tally;
pub mod testing;
pub mod usage;

pub use activation::Activation;
pub use attention::DenseAttention;
pub use attention_maps::AttentionMaps;
pub use balance::{Balance, BalanceConfig, BalanceMode};
pub use context::{Context, Reading};
pub use cost::{Cost, Sequence};
pub use embedding::Embedding;
pub use init::Init;
pub use linear::Linear;
pub use lm_head::LmHead;
pub use moe::{MoeConfig, SigmaMoe};
pub use norm::{LayerNorm, Norm};
pub use params::Params;
pub use past::LayerPast;
pub use rope::{Rope, RopeConfig};
pub use router::RouterDtype;
pub use routing::{Routing, Scoring};
pub use sharing::Sharing;
pub use stream::Stream;
pub use switchhead::{Side, SwitchHead, SwitchHeadConfig};
pub use tally::Tally;
