//! What plugins may ask of this host.

use crate::args::HostConfig;
use crate::distributed::Group;
use crate::kernels::self_test;
use crate::log::{Level, Terminal};
use crate::plugins::{Component, Registry};
use crate::signals::Signals;
use moeut_plugin_api::abi::client::{HostServices, KernelClient};
use moeut_plugin_api::{DType, Device, HostInfo, LogLevel, PluginError, Reduction, TensorHandle};
use moeut_torch::IntoTensor;
use std::sync::{Arc, Weak};

/// The host's services for one run.
pub struct Services {
    registry: Weak<Registry>,
    terminal: Arc<Terminal>,
    info: HostInfo,
    signals: Arc<Signals>,
    group: Group,
    this: Weak<Self>,
}

impl Services {
    /// Services of a process alone, with the arguments of a run.
    pub fn new(
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
        config: &HostConfig,
        signals: &Arc<Signals>,
    ) -> Arc<Self> {
        Self::in_group(registry, terminal, config, signals, &Group::single())
    }

    /// Services of one of the processes that train together.
    pub fn in_group(
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
        config: &HostConfig,
        signals: &Arc<Signals>,
        group: &Group,
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
                n_ranks: group.n_ranks(),
            },
            signals: Arc::clone(signals),
            group: group.clone(),
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
        self.signals.asked().is_some()
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
        let open = |component: &Component<'_>| {
            let name = &component.info.name;
            component.client().new_kernel(name, &services)
        };
        if name != "auto" {
            return open(&registry.find_kernel(name, device, dtype)?);
        }
        let mut refusals = Vec::new();
        for component in registry.kernels(device, dtype)? {
            let tested = open(&component).and_then(|kernel| {
                self_test::check(&kernel, device, dtype)?;
                Ok(kernel)
            });
            match tested {
                Ok(kernel) => return Ok(kernel),
                Err(PluginError { what, why, .. }) => {
                    let refusal = format!(
                        "kernel `{}` is left out: {what} ({why})",
                        component.info.name
                    );
                    self.terminal.message(Level::Warning, &refusal);
                    refusals.push(refusal);
                }
            }
        }
        Err(PluginError::new(format!("no kernel works for {dtype} on {device}"))
            .why(refusals.join("; "))
            .fix("put another kernel plugin into a plugin folder; `moeut-host plugins list` shows them"))
    }

    fn all_reduce(&self, tensor: TensorHandle, reduction: Reduction) -> Result<(), PluginError> {
        let tensor = tensor.into_tensor();
        match reduction {
            Reduction::Sum => self.group.sum(&[&tensor]),
            Reduction::Max => self.group.max(&[&tensor]),
        }
    }
}
