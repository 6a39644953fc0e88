//! Collectives between emulated devices: every operation against plain sums, also inside a captured step, and a rank that
//! leaves.

use std::sync::Arc;
use std::thread;

use r1_backend::{Backend, CommError, Communicator, HostSlice, HostSliceMut, Tensor};
use r1_core::DType;
use r1_gpu::{Gpu, Ranks};

/// Runs every rank's part on a thread of its own.
fn ranks(world_size: usize, part: impl Fn(&Gpu, Ranks) + Sync) {
    let devices: Vec<_> =
        (0..world_size).map(|_| Arc::new(Gpu::emulated(1, 128 << 20).expect("an emulated device"))).collect();
    let group = Gpu::group(&devices, 1 << 10).expect("a group");
    let part = &part;
    thread::scope(|scope| {
        for (gpu, end) in devices.iter().zip(group) {
            scope.spawn(move || part(gpu, end));
        }
    });
}

fn floats(gpu: &Gpu, shape: &[usize], dtype: DType, values: &[f32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, dtype).expect("room");
    gpu.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn read(gpu: &Gpu, x: &Tensor<Gpu>) -> Vec<f32> {
    let mut values = vec![0.0; x.num_elements()];
    gpu.download(x, HostSliceMut::F32(&mut values)).expect("a result");
    values
}

/// Rank `r`'s value `i`: whole numbers that BF16 holds.
fn value(rank: usize, i: usize) -> f32 {
    (rank * 16 + i) as f32
}

#[test]
fn collectives_give_what_plain_loops_give() {
    for world in [1, 2, 3] {
        for dtype in [DType::F32, DType::BF16] {
            ranks(world, |gpu, end| {
                let rank = end.rank();
                let mine = |n: usize| (0..n).map(|i| value(rank, i)).collect::<Vec<_>>();
                let sums = |n: usize| -> Vec<f32> {
                    (0..n).map(|i| (0..world).map(|r| value(r, i)).sum()).collect()
                };

                let x = floats(gpu, &[6], dtype, &mine(6));
                end.all_reduce(gpu, &x);
                assert_eq!(read(gpu, &x), sums(6), "all_reduce of {world}");

                let x = floats(gpu, &[4], dtype, &mine(4));
                let out = floats(gpu, &[4 * world], dtype, &vec![0.0; 4 * world]);
                end.all_gather(gpu, &x, &out);
                let want: Vec<f32> = (0..world).flat_map(|r| (0..4).map(move |i| value(r, i))).collect();
                assert_eq!(read(gpu, &out), want, "all_gather");

                let x = floats(gpu, &[3, 2], dtype, &mine(6));
                let out = floats(gpu, &[3, 2 * world], dtype, &vec![0.0; 6 * world]);
                end.all_gather_last(gpu, &x, &out);
                let row = |l: usize| (0..world).flat_map(move |r| (0..2).map(move |i| value(r, l * 2 + i)));
                assert_eq!(read(gpu, &out), (0..3).flat_map(row).collect::<Vec<_>>(), "all_gather_last");

                let x = floats(gpu, &[2 * world], dtype, &mine(2 * world));
                let out = floats(gpu, &[2], dtype, &[0.0; 2]);
                end.reduce_scatter(gpu, &x, &out);
                assert_eq!(read(gpu, &out), sums(2 * world)[rank * 2..][..2], "reduce_scatter");

                let out = floats(gpu, &[2 * world], dtype, &vec![0.0; 2 * world]);
                end.all_to_all(gpu, &x, &out);
                let want: Vec<f32> =
                    (0..world).flat_map(|r| (0..2).map(move |i| value(r, rank * 2 + i))).collect();
                assert_eq!(read(gpu, &out), want, "all_to_all");

                let x = floats(gpu, &[5], dtype, &mine(5));
                end.broadcast(gpu, &x, world - 1);
                assert_eq!(
                    read(gpu, &x),
                    (0..5).map(|i| value(world - 1, i)).collect::<Vec<_>>(),
                    "broadcast"
                );

                if world > 1 && rank < 2 {
                    let x = floats(gpu, &[5], dtype, &mine(5));
                    if rank == 0 {
                        end.send(gpu, &x, 1);
                    } else {
                        end.recv(gpu, &x, 0);
                    }
                    assert_eq!(read(gpu, &x), (0..5).map(|i| value(0, i)).collect::<Vec<_>>(), "send, recv");
                }
                end.check().expect("no failure");
            });
        }
    }
}

#[test]
fn a_captured_collective_runs_at_each_replay() {
    ranks(2, |gpu, end| {
        let x = floats(gpu, &[4], DType::F32, &[1.0; 4]);
        let graph = gpu.capture(&mut || end.all_reduce(gpu, &x)).expect("captured").expect("a graph");
        assert_eq!(read(gpu, &x), [1.0; 4], "a captured collective has not run");
        for replay in 1..=3 {
            gpu.replay(&graph);
            assert_eq!(read(gpu, &x), [f32::from(1u8 << replay); 4]);
        }
        end.check().expect("no failure");
    });
}

#[test]
fn a_rank_that_leaves_frees_the_others() {
    ranks(3, |gpu, end| {
        if end.rank() == 1 {
            return;
        }
        let x = floats(gpu, &[4], DType::F32, &[1.0; 4]);
        end.all_reduce(gpu, &x);
        gpu.flush().wait().expect("the device itself has not failed");
        let failure = end.check().expect_err("rank 1 has left");
        assert_eq!(failure, CommError::PeerGone { op: "all_reduce", rank: 1 });
        assert_eq!(read(gpu, &x), [1.0; 4]);
    });
}
