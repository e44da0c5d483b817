//! The model: the shell of all language models around SUT blocks.

use crate::args::ARGS;
use crate::block::Block;
use crate::config::{Config, Layers};
use crate::summary;
use moeut_nn::lm::{ExpertNeeds, LanguageModel};
use moeut_plugin_api::{
    ArgSpec, ForwardInput, ForwardOutput, Host, LogLevel, Model, ModelAbilities, ModelSetup,
    ModelSummary, NamedTensor, Parameter, PluginError,
};

/// A Sparse Universal Transformer.
pub(crate) struct Sut {
    lm: LanguageModel<Block>,
    layers: Layers,
}

impl Model for Sut {
    const NAME: &'static str = "sut";
    const SUMMARY: &'static str =
        "Sparse Universal Transformer (SUT): attention and feed-forward experts, tokens that halt";
    const ARGS: &'static [ArgSpec] = ARGS;
    type Config = Config;

    fn build(config: Config, setup: &ModelSetup, host: &Host) -> Result<Self, PluginError> {
        let (shell, layers) = config.resolve(setup.compat)?;
        for remark in config.remarks(&layers) {
            host.log(LogLevel::Warning, &remark);
        }
        let experts = ExpertNeeds {
            kernel: &config.kernel,
            is_router_rounded: false,
        };
        let block = |params: &_| Ok(Block::new(params, &layers));
        Ok(Self {
            lm: LanguageModel::build(shell, Some(experts), setup, host, block)?,
            layers,
        })
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.lm.parameters()
    }

    fn forward(&mut self, input: ForwardInput) -> Result<ForwardOutput, PluginError> {
        self.lm.forward(input)
    }

    fn graph_safe(&self) -> bool {
        self.lm.graph_safe()
    }

    fn abilities(&self) -> ModelAbilities {
        self.lm.abilities()
    }

    fn memory(&self) -> Vec<NamedTensor> {
        self.lm.memory()
    }

    fn set_memory(&mut self, memory: Vec<NamedTensor>) -> Result<(), PluginError> {
        self.lm.set_memory(memory)
    }

    fn summary(&self, seq_len: u64) -> ModelSummary {
        summary::of(&self.layers, self.lm.order(), seq_len)
    }
}
