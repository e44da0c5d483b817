//! The command line: from `argv` to typed values that remember where they came from.
//!
//! Two phases, because plugins bring their own arguments: [`peek`] finds what is needed to load the plugins, then
//! [`parse`] reads everything against the union of all tables ([`Owner`]s). The grammar is the reference's, whose
//! flags are long names behind one dash and always take a value; hence it is written here rather than configured
//! into a parser of another tradition. Loading plugins, reading `args.json` and printing are done elsewhere.

mod arguments;
mod error;
mod help;
mod host;
mod host_table;
mod owner;
mod parse;
mod peek;
mod profiles;
mod show;
mod suggest;
mod table;
mod token;

pub use arguments::{Arguments, Source};
pub use error::ArgsError;
pub use help::help_text;
pub use host::{
    AdamConfig, GpuChoice, HostConfig, LogSink, NanPolicy, NonFiniteConfig, OptimizerConfig,
    OptimizerKind, ReportConfig, SampleConfig, ScheduleConfig, ScheduleKind, Speedtest,
};
pub use host_table::host_args;
pub use owner::{Owner, Role};
pub use parse::parse;
pub use peek::{asks_for_help, peek};
pub use show::render_resolved;
pub use suggest::nearest;
pub(crate) use token::{Token, tokens};
