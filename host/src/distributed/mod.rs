//! Several processes that train one model: same parameters, each its share of every batch.
//!
//! ```text
//! environment   which of how many processes this one is                          variables of torchrun and SLURM
//! group         meeting, agreement, sums and broadcasts                          PyTorch's c10d: TCPStore, Gloo, NCCL
//! lookout       who has failed or is silent, and the end of everyone else        beats in the store
//! gradients     sums of gradients during backward; shards of them                c10d
//! launch        `moeut-host launch`: the processes of one machine, without Python
//! ```
//! Nothing here knows a model. The training loop sees a [`Group`], of one process most often.

pub mod environment;
pub mod gradients;
pub mod group;
pub mod launch;
mod lookout;

pub use environment::World;
pub use gradients::{Gradients, Piece, elements};
pub use group::Group;
