//! CUDA graphs: what a thread queues on a device, captured once and then launched as one piece.
//!
//! A launch costs the CPU some microseconds per kernel; a graph costs it about ten in all. What is captured is fixed:
//! the same kernels on the same memory, with the numbers that the host had at the time.

#![expect(
    unsafe_code,
    reason = "calls into the C++ shim, and owns what it makes"
)]

use std::ptr::{self, NonNull};

use tch::{Device, TchError};

use crate::convert::device_code;
use crate::ffi::{self, RawGraph, check};

/// A captured piece of work, and the memory that it works on.
///
/// The memory is a pool of the graph's own. Tensors that were made while it was captured lie there: whoever holds them
/// reads what the last [`Graph::replay`] left, and memory of those that were dropped is used by the graph for others.
#[derive(Debug)]
pub struct Graph(NonNull<RawGraph>);

impl Graph {
    /// Runs `body` and captures what it queues on `device`, of which nothing is done before [`Graph::replay`]. A backward
    /// pass in it is captured, too, if the forward pass was. Work that was queued before is waited for, and memory that
    /// libtorch holds for later is given back, so that there is room for the pool.
    ///
    /// The graph shares the pool of `neighbor`. Then both may only be replayed in the order in which they were captured,
    /// and tensors of one that are held while the other is captured stay whole.
    ///
    /// `body` must not wait for the device, nor copy from memory that is not pinned, nor read a tensor's numbers; memory
    /// of tensors that it takes from outside must stay where it is.
    ///
    /// # Errors
    /// What `body` says; else, if it did what it must not, or `device` is not a CUDA device that libtorch sees. After a
    /// capture that failed libtorch draws no random numbers on the device any more.
    pub fn capture<T, E: From<TchError>>(
        device: Device,
        neighbor: Option<&Self>,
        body: impl FnOnce() -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        let capture = Capture::begin(device, neighbor)?;
        let made = body()?;
        Ok((capture.end()?, made))
    }

    /// Queues the captured work once more on this thread's stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn replay(&self) -> Result<(), TchError> {
        // SAFETY: made by `moeut_graph_begin` and alive.
        unsafe { check(ffi::moeut_graph_replay(self.0.as_ptr())) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `moeut_graph_begin`, freed once.
        unsafe { ffi::moeut_graph_free(self.0.as_ptr()) }
    }
}

/// A graph that is being captured; dropped, the capture ends without one.
struct Capture(Option<Graph>);

impl Capture {
    fn begin(device: Device, neighbor: Option<&Graph>) -> Result<Self, TchError> {
        let code = device_code(device)?;
        let neighbor = neighbor.map_or(ptr::null(), |graph| graph.0.as_ptr().cast_const());
        let mut graph = ptr::null_mut();
        // SAFETY: the shim checks the device and writes the graph; a neighbor is alive.
        unsafe { check(ffi::moeut_graph_begin(code, neighbor, &raw mut graph)) }?;
        let graph = NonNull::new(graph)
            .ok_or_else(|| TchError::Torch("the shim returned no graph".to_owned()))?;
        Ok(Self(Some(Graph(graph))))
    }

    fn end(mut self) -> Result<Graph, TchError> {
        let graph = self.0.take();
        let graph = graph.ok_or_else(|| TchError::Torch("the capture has ended".to_owned()))?;
        // SAFETY: begun and not ended, as it was still here.
        unsafe { check(ffi::moeut_graph_end(graph.0.as_ptr())) }?;
        Ok(graph)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Some(graph) = &self.0 {
            // SAFETY: begun and not ended, as it is still here. What failed has been said.
            let _ = unsafe { check(ffi::moeut_graph_end(graph.0.as_ptr())) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda;
    use tch::{Kind, Tensor};

    #[test]
    fn what_is_no_cuda_device_has_no_graphs() {
        for device in [Device::Cpu, Device::Mps, Device::Cuda(100)] {
            let captured = Graph::capture(device, None, || Ok::<_, TchError>(()));
            assert!(captured.is_err(), "{device:?}");
        }
    }

    /// On machines with a GPU: forward and backward passes of new inputs, by replays of two graphs that share a pool,
    /// the second of which adds to the gradient of the first; and after a capture that fails there are further passes.
    #[test]
    fn replays_compute_what_was_captured() {
        if !matches!(cuda::load(), Ok(true)) {
            return;
        }
        let options = (Kind::Float, Device::Cuda(0));
        let x = Tensor::zeros([4, 3], options);
        let weight = Tensor::ones([3, 2], options).set_requires_grad(true);
        let pass = || -> Result<Tensor, TchError> {
            let loss = x.f_mm(&weight)?.f_square()?.f_sum(Kind::Float)?;
            loss.f_backward()?;
            Ok(loss.detach())
        };
        // Libraries are loaded and workspaces made outside of captures.
        assert!(pass().unwrap().double_value(&[]).abs() < 1e-9);
        let grad_of = |x: &Tensor| x.tr().mm(&x.mm(&weight.detach())) * 2.0;

        crate::optim::clear_grads(&[&weight]).unwrap();
        let (first, loss) = Graph::capture(Device::Cuda(0), None, pass).unwrap();
        let grad = weight.grad();
        let (second, other_loss) = Graph::capture(Device::Cuda(0), Some(&first), pass).unwrap();
        for round in 0..3 {
            let places = Tensor::arange(12, options).reshape([4, 3]);
            let batches = [0.3, 0.7].map(|step| (&places * step + round).sin());
            for (graph, batch, loss) in [
                (&first, &batches[0], &loss),
                (&second, &batches[1], &other_loss),
            ] {
                x.shallow_clone().copy_(batch);
                graph.replay().unwrap();
                let expected = batch.mm(&weight.detach()).square().sum(Kind::Float);
                assert!(loss.allclose(&expected, 1e-5, 1e-5, false));
            }
            let expected = grad_of(&batches[0]) + grad_of(&batches[1]);
            assert!(grad.allclose(&expected, 1e-4, 1e-4, false));
        }
        let failed = Graph::capture(Device::Cuda(0), None, || {
            x.f_sum(Kind::Float)?.f_double_value(&[])
        });
        assert!(failed.is_err(), "numbers were read while capturing");
        let loss = pass().unwrap().double_value(&[]);
        assert!(loss.is_finite(), "work after a capture that failed");
    }
}
