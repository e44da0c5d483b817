//! What a checkpoint brings back into a run: its state, tensors, and what each process had of its own.

use super::run::{Named, RNG_CPU, RNG_CUDA};
use super::state::TrainState;
use crate::checkpoint::Loaded;
use crate::distributed::Group;
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Device, Tensor};

/// The state of the run that left a checkpoint.
///
/// # Errors
/// If it is of another form.
pub(super) fn state(loaded: &Loaded) -> Result<TrainState, PluginError> {
    serde_json::from_value(loaded.snapshot.state.clone()).map_err(|error| {
        PluginError::new(format!(
            "the state in `{}` cannot be used",
            loaded.path.display()
        ))
        .why(error.to_string())
        .fix("restore another checkpoint")
    })
}

/// Copies a checkpoint's tensors into the run's.
///
/// # Errors
/// If one is missing or has another shape.
pub(crate) fn load_tensors(
    what: &str,
    into: &[(String, Tensor)],
    from: &[(String, Tensor)],
) -> Result<(), PluginError> {
    let _no_grad = tch::no_grad_guard();
    let stored: BTreeMap<&str, &Tensor> = from
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mismatch = |why: String| {
        PluginError::new(format!("the checkpoint does not fit the {what}"))
            .why(why)
            .fix("use the arguments that the checkpoint was made with; they are in its `args.json`")
    };
    for (name, tensor) in into {
        let Some(source) = stored.get(name.as_str()) else {
            return Err(mismatch(format!("it has no `{name}`")));
        };
        if source.size() != tensor.size() {
            return Err(mismatch(format!(
                "`{name}` is {:?}, and {:?} is needed",
                source.size(),
                tensor.size()
            )));
        }
        tensor
            .shallow_clone()
            .f_copy_(source)
            .or_plugin_error("a tensor cannot be restored")?;
    }
    Ok(())
}

/// A larger model's checkpoint holds all that this one needs, and more.
///
/// # Errors
/// If this is one.
pub(super) fn check_nothing_left(parameters: &Named, stored: &Named) -> Result<(), PluginError> {
    let known: BTreeSet<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
    let left: Vec<&str> = stored
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| !known.contains(name))
        .collect();
    let Some(first) = left.first() else {
        return Ok(());
    };
    Err(PluginError::new("the checkpoint does not fit the model")
        .why(format!(
            "{} of its tensors are not in the model, `{first}` for one",
            left.len()
        ))
        .fix("use the arguments that the checkpoint was made with; they are in its `args.json`"))
}

/// Random generators. A checkpoint made on another kind of device has no state for this one's, which stays as seeded.
///
/// # Errors
/// If libtorch refuses a state.
pub(super) fn rng(stored: &[(String, Tensor)], device: Device) -> Result<(), PluginError> {
    for (wanted, place) in [(RNG_CPU, Device::Cpu), (RNG_CUDA, device)] {
        if let Some((_, state)) = stored.iter().find(|(name, _)| name == wanted) {
            moeut_torch::rng::set_state(place, &state.to_device(Device::Cpu))
                .or_plugin_error("the random generator cannot be restored")?;
        }
    }
    Ok(())
}

/// The name of a process' own tensor among a checkpoint's optimizer tensors. The first process' are as if it were alone.
pub(super) fn name_of_rank(rank: usize, name: &str) -> String {
    if rank == 0 {
        name.to_owned()
    } else {
        format!("rank{rank}/{name}")
    }
}

/// Of a checkpoint's tensors, which the first process has, those that belong to this process, under the names that they
/// have where it is alone. A process that the checkpoint does not know has none.
///
/// # Errors
/// If another process has ended.
pub(super) fn of_this_rank(
    group: &Group,
    stored: &[(String, Tensor)],
) -> Result<Named, PluginError> {
    let stored = stored.iter().filter(|(name, _)| is_of_rank(name));
    let stored: Named = stored
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect();
    let first = group.gather("restored", &stored)?.swap_remove(0);
    Ok(own_of(first, group.rank()))
}

/// Whether a checkpoint's tensor belongs to one of several processes.
fn is_of_rank(name: &str) -> bool {
    ["rank", "rng/", "memory/"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Of all processes' tensors those of one, under the names that they have where it is alone.
fn own_of(all: Named, rank: usize) -> Named {
    let prefix = format!("rank{rank}/");
    let own = |(name, tensor): (String, Tensor)| {
        let name = if rank == 0 {
            (!name.starts_with("rank")).then_some(name)
        } else {
            name.strip_prefix(&prefix).map(str::to_owned)
        };
        Some((name?, tensor))
    };
    all.into_iter().filter_map(own).collect()
}

/// The step of the checkpoint that a run goes on from, if it is one of its own.
pub(super) fn last_saved(restored: Option<Loaded>, checkpoint_dir: &Path) -> Option<u64> {
    let own = restored.filter(|loaded| is_below(&loaded.path, checkpoint_dir));
    own.map(|loaded| loaded.snapshot.step)
}

/// Whether a checkpoint is one of this run's own.
pub(super) fn is_below(checkpoint: &Path, folder: &Path) -> bool {
    let parent = checkpoint.canonicalize().ok();
    let parent = parent.as_deref().and_then(Path::parent);
    parent.is_some() && parent == folder.canonicalize().ok().as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_gets_its_own_and_a_new_one_nothing() {
        let all = || -> Named {
            let names = ["rng/cpu", "memory/0", "rank1/rng/cpu", "rank12/rng/cpu"];
            names
                .map(|name| (name.to_owned(), Tensor::from(1.0)))
                .into()
        };
        let names = |rank| -> Vec<String> {
            let own = own_of(all(), rank).into_iter();
            own.map(|(name, _)| name).collect()
        };
        assert_eq!(names(0), ["rng/cpu", "memory/0"]);
        assert_eq!(names(1), ["rng/cpu"]);
        assert_eq!(names(2), [""; 0]);
        assert_eq!(name_of_rank(12, "rng/cpu"), "rank12/rng/cpu");
        assert!(all().iter().all(|(name, _)| is_of_rank(name)));
        assert!(!is_of_rank("exp_avg/rank"));
    }
}
