//! What plugins may ask of this host.

use crate::args::HostConfig;
use crate::distributed::Group;
use crate::kernels::self_test;
use crate::log::{Level, Terminal};
use crate::plugins::{Component, Registry};
use crate::signals::Signals;
use moeut_plugin_api::abi::client::{HostServices, KernelClient, PluginClient};
use moeut_plugin_api::kernel::FusedCall;
use moeut_plugin_api::{
    Capabilities, DType, Device, HostInfo, LogLevel, PluginError, Reduction, TensorHandle,
};
use moeut_torch::IntoTensor;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The host's services for one run.
pub struct Services {
    registry: Weak<Registry>,
    terminal: Arc<Terminal>,
    info: HostInfo,
    signals: Arc<Signals>,
    group: Group,
    /// The kernels of models, by what they compute with; the last one for each.
    given: Mutex<HashMap<(Device, DType), Given>>,
    this: Weak<Self>,
}

/// A kernel that a model got.
#[derive(Clone)]
struct Given {
    plugin: PluginClient,
    name: String,
    capabilities: Capabilities,
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
            given: Mutex::default(),
            this: Weak::clone(this),
        })
    }

    /// The kernel that the model got for this device and element type, once more, if it provides `call`: what a user
    /// chose for the model serves the host, too. A model without a kernel leaves the host without one.
    ///
    /// # Errors
    /// If it cannot be made again.
    pub fn kernel_of_model(
        &self,
        call: FusedCall,
        device: Device,
        dtype: DType,
    ) -> Result<Option<KernelClient>, PluginError> {
        let given = {
            let all = self.given.lock().unwrap_or_else(PoisonError::into_inner);
            all.get(&(device, dtype)).cloned()
        };
        let provides = |given: &Given| given.capabilities.provides(call, None, device, dtype);
        given
            .filter(provides)
            .map(|given| given.plugin.new_kernel(&given.name, &self.shared()?))
            .transpose()
    }

    fn shared(&self) -> Result<Arc<dyn HostServices>, PluginError> {
        self.this
            .upgrade()
            .map_or_else(|| Err(gone()), |this| Ok(this as _))
    }

    /// Makes a kernel that passes `test`, and remembers it.
    fn give(
        &self,
        component: &Component<'_>,
        (device, dtype): (Device, DType),
        test: impl FnOnce(&KernelClient) -> Result<(), PluginError>,
    ) -> Result<KernelClient, PluginError> {
        let given = Given {
            plugin: component.client(),
            name: component.info.name.clone(),
            capabilities: component.info.capabilities.clone().unwrap_or_default(),
        };
        let kernel = given.plugin.new_kernel(&given.name, &self.shared()?)?;
        test(&kernel)?;
        let mut all = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert((device, dtype), given);
        Ok(kernel)
    }
}

fn gone() -> PluginError {
    PluginError::new("the host is shutting down")
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
        let registry = self.registry.upgrade().ok_or_else(gone)?;
        let place = (device, dtype);
        if name != "auto" {
            let component = registry.find_kernel(name, device, dtype)?;
            return self.give(&component, place, |_| Ok(()));
        }
        let test = |kernel: &KernelClient| self_test::check(kernel, device, dtype);
        let mut refusals = Vec::new();
        for component in registry.kernels(device, dtype)? {
            match self.give(&component, place, test) {
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
