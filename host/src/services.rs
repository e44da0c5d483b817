//! What plugins may ask of this host.

use crate::args::HostConfig;
use crate::log::{Level, Terminal};
use crate::plugins::Registry;
use crate::signals::Signals;
use moeut_plugin_api::abi::client::{HostServices, KernelClient};
use moeut_plugin_api::{DType, Device, HostInfo, LogLevel, PluginError};
use std::sync::{Arc, Weak};

/// The host's services for one run.
pub struct Services {
    registry: Weak<Registry>,
    terminal: Arc<Terminal>,
    info: HostInfo,
    signals: Arc<Signals>,
    this: Weak<Self>,
}

impl Services {
    /// Services with the arguments of a run.
    pub fn new(
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
        config: &HostConfig,
        signals: &Arc<Signals>,
    ) -> Arc<Self> {
        let n_threads = config
            .threads
            .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
            .unwrap_or(1);
        Arc::new_cyclic(|this| Self {
            registry: Arc::downgrade(registry),
            terminal: Arc::clone(terminal),
            info: HostInfo {
                cache_dir: config.cache_dir.clone(),
                n_threads,
                compat: config.compat,
            },
            signals: Arc::clone(signals),
            this: Weak::clone(this),
        })
    }
}

impl HostServices for Services {
    fn info(&self) -> HostInfo {
        self.info.clone()
    }

    fn log(&self, level: LogLevel, text: &str) {
        let level = match level {
            LogLevel::Debug => Level::Debug,
            LogLevel::Info => Level::Info,
            LogLevel::Warning => Level::Warning,
        };
        self.terminal.message(level, text);
    }

    fn progress(&self, label: &str, done: u64, total: u64) {
        self.terminal.work(label, done, total);
    }

    fn is_cancelled(&self) -> bool {
        self.signals.is_ending()
    }

    fn kernel(
        &self,
        name: &str,
        device: Device,
        dtype: DType,
    ) -> Result<KernelClient, PluginError> {
        let gone = || PluginError::new("the host is shutting down");
        let registry = self.registry.upgrade().ok_or_else(gone)?;
        let services: Arc<dyn HostServices> = self.this.upgrade().ok_or_else(gone)?;
        let component = registry.find_kernel(name, device, dtype)?;
        component
            .client()
            .new_kernel(&component.info.name, &services)
    }
}
