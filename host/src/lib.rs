//! moeut-host: trains language models whose tasks, datasets, models and kernels are plugins.
//!
//! Reading order is the data flow: [`cli`] → [`args`] → [`plugins`] → [`plan`] → [`train`] → [`log`], [`checkpoint`].

pub mod args;
pub mod bench;
pub mod checkpoint;
pub mod checkpoint_cli;
pub mod cli;
pub mod distributed;
pub mod doctor;
pub mod error;
pub mod eval;
pub mod eval_cli;
pub mod generate;
pub mod gpu;
pub mod growth;
pub mod job;
pub mod kernels;
pub mod log;
pub mod model_show;
pub mod plan;
pub mod plugins;
pub mod plugins_cli;
pub mod profile;
pub mod report;
pub mod run_folder;
pub mod services;
pub mod signals;
mod spinning;
pub mod startup_log;
pub mod sweep;
pub mod sweep_cli;
pub mod train;
pub mod trained;
pub mod watchdog;
pub mod whole_file;
mod words;
