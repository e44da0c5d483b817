//! Each operation against arithmetic.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use moeut_c10d::{Group, Reduction};
use tch::{Device, Kind, Tensor};

use crate::support::{PATIENCE, as_threads, counting, numbers};

/// Whole numbers below 256 are exact in all of them, bfloat16 included.
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64];

/// Rank `r` has `[r·10, r·10 + 1, …]`.
fn tensor_of(rank: usize, n: i64, kind: Kind) -> Tensor {
    counting(i64::try_from(rank).unwrap() * 10, n, kind)
}

fn expected(n_ranks: usize, n: i64, op: Reduction) -> Vec<f64> {
    let of = |rank: usize, place: i64| (rank * 10) as f64 + place as f64;
    let ranks = |place| (0..n_ranks).map(move |rank| of(rank, place));
    (0..n)
        .map(|place| match op {
            Reduction::Sum => ranks(place).sum(),
            Reduction::Max => ranks(place).fold(f64::MIN, f64::max),
            Reduction::Min => ranks(place).fold(f64::MAX, f64::min),
        })
        .collect()
}

#[test]
fn all_reduce_sums_and_takes_extremes_of_uneven_tensors() {
    const SIZES: [i64; 4] = [1, 7, 30, 2];
    for n_ranks in [1, 2, 4] {
        as_threads(n_ranks, PATIENCE, |rank, group| {
            for kind in KINDS {
                for op in [Reduction::Sum, Reduction::Max, Reduction::Min] {
                    let tensors = SIZES.map(|n| tensor_of(rank, n, kind));
                    let all: Vec<&Tensor> = tensors.iter().collect();
                    group.all_reduce(&all, op).unwrap().wait().unwrap();
                    group.all_reduce(&[], op).unwrap_err();
                    let alone = tensor_of(rank, 13, kind);
                    group.all_reduce(&[&alone], op).unwrap().wait().unwrap();

                    for (tensor, n) in tensors.iter().zip(SIZES).chain([(&alone, 13)]) {
                        assert_eq!(numbers(tensor), expected(n_ranks, n, op), "{kind:?} {op:?}");
                    }
                }
            }
        });
    }
}

#[test]
fn a_large_tensor_arrives_whole() {
    const N: i64 = 3_000_001;
    as_threads(4, PATIENCE, |_, group| {
        let tensor = Tensor::ones([N], (Kind::Float, Device::Cpu));
        group
            .all_reduce(&[&tensor], Reduction::Sum)
            .unwrap()
            .wait()
            .unwrap();
        assert!(bool::try_from(tensor.eq(4.0).all()).unwrap());
    });
}

#[test]
fn broadcast_copies_from_any_root() {
    for n_ranks in [1, 2, 4] {
        as_threads(n_ranks, PATIENCE, |rank, group| {
            for kind in KINDS {
                for root in 0..n_ranks {
                    let (long, short) = (tensor_of(rank, 11, kind), tensor_of(rank, 1, kind));
                    let work = group.broadcast(&[&long, &short], root).unwrap();
                    work.wait().unwrap();
                    assert_eq!(numbers(&long), numbers(&tensor_of(root, 11, kind)));
                    assert_eq!(numbers(&short), numbers(&tensor_of(root, 1, kind)));
                }
            }
        });
    }
}

#[test]
fn all_gather_lines_the_ranks_up() {
    for n_ranks in [1, 2, 4] {
        as_threads(n_ranks, PATIENCE, |rank, group| {
            for kind in KINDS {
                let from = tensor_of(rank, 5, kind);
                let into = Tensor::zeros([from.size()[0] * ranks(n_ranks)], (kind, Device::Cpu));
                group.all_gather(&into, &from).unwrap().wait().unwrap();
                let parts: Vec<f64> = (0..n_ranks)
                    .flat_map(|rank| numbers(&tensor_of(rank, 5, kind)))
                    .collect();
                assert_eq!(numbers(&into), parts, "{kind:?}");
            }
        });
    }
}

#[test]
fn reduce_scatter_gives_each_rank_its_part_of_the_sum() {
    const PART: i64 = 3;
    for n_ranks in [1, 2, 4] {
        as_threads(n_ranks, PATIENCE, |rank, group| {
            for kind in KINDS {
                let from = tensor_of(rank, PART * ranks(n_ranks), kind);
                let given = numbers(&from);
                let into = Tensor::zeros([PART], (kind, Device::Cpu));
                group.reduce_scatter(&into, &from).unwrap().wait().unwrap();
                let sum = expected(n_ranks, PART * ranks(n_ranks), Reduction::Sum);
                let part = usize::try_from(PART).unwrap();
                assert_eq!(numbers(&into), sum[rank * part..][..part], "{kind:?}");
                assert_eq!(numbers(&from), given, "the input stays");
            }
        });
    }
}

fn ranks(n_ranks: usize) -> i64 {
    i64::try_from(n_ranks).unwrap()
}

#[test]
fn nobody_passes_a_barrier_alone() {
    let n_here = AtomicUsize::new(0);
    as_threads(4, PATIENCE, |_, group| {
        for round in 1..=20 {
            n_here.fetch_add(1, Ordering::SeqCst);
            group.barrier().unwrap();
            assert!(n_here.load(Ordering::SeqCst) >= 4 * round);
            group.barrier().unwrap();
        }
    });
}

/// The last messages of a rank that leaves must reach the others, however late they read them.
#[test]
fn leaving_after_the_last_operation_disturbs_nobody() {
    for _ in 0..10 {
        as_threads(4, PATIENCE, |_, group| {
            let tensor = Tensor::ones([1000], (Kind::Float, Device::Cpu));
            group
                .all_reduce(&[&tensor], Reduction::Sum)
                .unwrap()
                .wait()
                .unwrap();
            assert_eq!(numbers(&tensor), [4.0; 1000]);
        });
    }
}

#[test]
fn work_tells_when_it_is_done() {
    as_threads(2, PATIENCE, |_, group| {
        let part = Tensor::ones([4], (Kind::Float, Device::Cpu));
        let whole = Tensor::ones([8], (Kind::Float, Device::Cpu));
        let works = [
            group.all_reduce(&[&part], Reduction::Sum),
            group.broadcast(&[&part], 0),
            group.all_gather(&whole, &part),
            group.reduce_scatter(&part, &whole),
        ];
        for work in works {
            let work = work.unwrap();
            while !work.is_done() {
                thread::yield_now();
            }
            work.wait().unwrap();
        }
    });
}

#[test]
fn parameters_travel_like_other_tensors() {
    as_threads(2, PATIENCE, |rank, group| {
        let param =
            Tensor::full([3], rank as f64, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let other = param.copy().detach().set_requires_grad(true);
        group.broadcast(&[&param], 1).unwrap().wait().unwrap();
        assert_eq!(numbers(&param), [1.0; 3]);
        group
            .all_reduce(&[&param, &other], Reduction::Sum)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(
            (numbers(&param), numbers(&other)),
            (vec![2.0; 3], vec![1.0; 3])
        );
    });
}

#[test]
fn threads_of_one_rank_may_start_operations_at_once() {
    as_threads(2, PATIENCE, |_, group| {
        let add_up = |group: &Group| {
            for _ in 0..50 {
                let tensor = Tensor::ones([16], (Kind::Float, Device::Cpu));
                group
                    .all_reduce(&[&tensor], Reduction::Sum)
                    .unwrap()
                    .wait()
                    .unwrap();
                assert_eq!(numbers(&tensor), [2.0; 16]);
            }
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| add_up(&group));
            }
        });
    });
}

#[test]
fn unfit_tensors_are_refused_before_they_travel() {
    as_threads(2, PATIENCE, |_, group| {
        let float = Tensor::ones([4], (Kind::Float, Device::Cpu));
        let double = Tensor::ones([8], (Kind::Double, Device::Cpu));
        let matrix = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
        let sum = |tensors: &[&Tensor]| group.all_reduce(tensors, Reduction::Sum).unwrap_err();
        assert_eq!(sum(&[]).to_string(), "there is no tensor to send");
        assert_eq!(
            sum(&[&Tensor::new()]).to_string(),
            "an undefined tensor cannot travel"
        );
        assert_eq!(
            sum(&[&float, &double]).to_string(),
            "Float and Double do not travel together"
        );
        assert_eq!(
            sum(&[&matrix.tr()]).to_string(),
            "a tensor of [3, 2] with strides [1, 3] is not contiguous"
        );
        assert_eq!(
            group.all_gather(&double, &float).unwrap_err().to_string(),
            "Double and Float do not mix"
        );
        assert_eq!(
            group
                .reduce_scatter(&float, &float)
                .unwrap_err()
                .to_string(),
            "4 elements are not 2 times 4"
        );
        assert_eq!(
            group.all_gather(&matrix, &float).unwrap_err().to_string(),
            "flat tensors are needed, not [2, 3] and [4]"
        );
        group.broadcast(&[&float], 2).unwrap_err();

        // None of this has put the ranks out of step.
        group
            .all_reduce(&[&float], Reduction::Sum)
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(numbers(&float), [2.0; 4]);
        group.check().unwrap();
    });
}
