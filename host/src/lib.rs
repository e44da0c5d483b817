//! moeut-host: trains language models whose tasks, datasets, models and kernels are plugins.
//!
//! Reading order is the data flow: [`cli`] → [`args`] → [`plugins`] → [`train`] → [`log`], [`checkpoint`].

pub mod args;
pub mod checkpoint;
pub mod cli;
pub mod doctor;
pub mod error;
pub mod gpu;
pub mod job;
pub mod log;
pub mod plugins;
pub mod run_folder;
pub mod services;
pub mod signals;
pub mod startup_log;
pub mod train;
