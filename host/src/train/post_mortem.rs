//! What can still be found out about a run that ended with an error.

use super::run::Run;
use super::{TrainError, memory, non_finite};

/// The error as the user should see it: with sizes and flags if memory is used up, with the tensors that are not finite
/// if the loss is not.
pub fn explain(error: TrainError, run: &mut Run) -> TrainError {
    let error = memory::explain(error, run);
    non_finite::explain(error, run)
}
