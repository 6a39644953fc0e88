//! Ranks as threads: every collective with one to four ranks, and what happens when they disagree or leave.

use std::thread;

use r1_backend::{Backend, CommError, Communicator, HostSlice, HostSliceMut, Tensor};
use r1_comm::Local;
use r1_core::DType;
use r1_reference::Reference;

/// Runs `rank` on a thread for each rank; gives their results in rank order.
fn ranks<T: Send>(world_size: usize, rank: impl Fn(&Reference, Local) -> T + Sync) -> Vec<T> {
    // Two elements of room, so that staging must grow.
    let locals = Local::group(world_size, 2);
    thread::scope(|scope| {
        let threads: Vec<_> =
            locals.into_iter().map(|local| scope.spawn(|| rank(&Reference::new(), local))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn floats(backend: &Reference, shape: &[usize], dtype: DType, values: &[f32]) -> Tensor<Reference> {
    let tensor = backend.alloc(shape, dtype).unwrap();
    backend.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn ids(backend: &Reference, values: &[u32]) -> Tensor<Reference> {
    let tensor = backend.alloc(&[values.len()], DType::U32).unwrap();
    backend.upload(HostSlice::U32(values), &tensor);
    tensor
}

fn read(backend: &Reference, tensor: &Tensor<Reference>) -> Vec<f32> {
    let mut values = vec![0.0; tensor.num_elements()];
    backend.download(tensor, HostSliceMut::F32(&mut values)).unwrap();
    values
}

fn read_ids(backend: &Reference, tensor: &Tensor<Reference>) -> Vec<u32> {
    let mut values = vec![0; tensor.num_elements()];
    backend.download(tensor, HostSliceMut::U32(&mut values)).unwrap();
    values
}

fn check(local: &Local) -> Result<(), CommError> {
    Communicator::<Reference>::check(local)
}

fn rank_of(local: &Local) -> usize {
    Communicator::<Reference>::rank(local)
}

/// Values whose sum depends on the order of summation.
fn value(rank: usize, round: usize, i: usize) -> f32 {
    let noise = (rank * 7919 + round * 104_729 + i * 1_299_709) % 1000;
    (noise as f32 - 500.0) * 10f32.powi((rank as i32 - 1) * 4)
}

#[test]
fn all_reduce_sums_in_rank_order_on_every_rank() {
    const ROUNDS: usize = 50;
    for world_size in 1..=4 {
        for dtype in [DType::F32, DType::BF16] {
            let results = ranks(world_size, |backend, local| {
                let rank = rank_of(&local);
                (0..ROUNDS)
                    .map(|round| {
                        // Sizes differ from round to round, so that stale staging would show.
                        let values: Vec<f32> = (0..5 + round % 3).map(|i| value(rank, round, i)).collect();
                        let x = floats(backend, &[values.len()], dtype, &values);
                        local.all_reduce(backend, &x);
                        read(backend, &x)
                    })
                    .inspect(|_| check(&local).unwrap())
                    .collect::<Vec<_>>()
            });
            let single = Reference::new();
            for round in 0..ROUNDS {
                let len = 5 + round % 3;
                let mut sum = vec![0.0; len];
                for rank in 0..world_size {
                    let values: Vec<f32> = (0..len).map(|i| value(rank, round, i)).collect();
                    let rounded = read(&single, &floats(&single, &[len], dtype, &values));
                    sum.iter_mut().zip(rounded).for_each(|(sum, x)| *sum += x);
                }
                let want = read(&single, &floats(&single, &[len], dtype, &sum));
                for (rank, result) in results.iter().enumerate() {
                    assert_eq!(result[round], want, "rank {rank} of {world_size}, round {round}, {dtype}");
                }
            }
        }
    }
}

#[test]
fn views_with_gaps_are_reduced_alone() {
    let results = ranks(2, |backend, local| {
        let whole = floats(backend, &[2, 4], DType::F32, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        local.all_reduce(backend, &whole.narrow(1, 1..3));
        check(&local).unwrap();
        read(backend, &whole)
    });
    assert_eq!(results, vec![[1.0, 4.0, 6.0, 4.0, 5.0, 12.0, 14.0, 8.0]; 2]);
}

#[test]
fn all_gather_is_in_rank_order() {
    for world_size in 1..=4 {
        let results = ranks(world_size, |backend, local| {
            let rank = rank_of(&local) as u32;
            let x = floats(backend, &[1, 2], DType::BF16, &[rank as f32, rank as f32 + 0.5]);
            let out = backend.alloc(&[world_size, 2], DType::BF16).unwrap();
            local.all_gather(backend, &x, &out);
            let tokens = ids(backend, &[rank, u32::MAX - rank]);
            let all_tokens = backend.alloc(&[2 * world_size], DType::U32).unwrap();
            local.all_gather(backend, &tokens, &all_tokens);
            check(&local).unwrap();
            (read(backend, &out), read_ids(backend, &all_tokens))
        });
        let values: Vec<f32> = (0..world_size).flat_map(|r| [r as f32, r as f32 + 0.5]).collect();
        let tokens: Vec<u32> = (0..world_size as u32).flat_map(|r| [r, u32::MAX - r]).collect();
        assert_eq!(results, vec![(values, tokens); world_size]);
    }
}

#[test]
fn all_gather_last_puts_columns_together() {
    for world_size in 1..=4 {
        for (rows, n) in [(1, 3), (4, 1), (3, 5)] {
            let id = |rank: usize, row: usize, i: usize| (100 * rank + 10 * row + i) as u32;
            let results = ranks(world_size, |backend, local| {
                let rank = rank_of(&local);
                let part: Vec<u32> = (0..rows * n).map(|at| id(rank, at / n, at % n)).collect();
                // Both lie in wider tensors, as a step's rows of a workspace do.
                let wide = backend.alloc(&[rows + 2, n + 3], DType::F32).unwrap();
                let x = wide.rows(1..rows + 1).narrow(1, 2..n + 2);
                let values: Vec<f32> = part.iter().map(|&id| id as f32 + 0.5).collect();
                backend.upload(HostSlice::F32(&values), &x);
                let whole = backend.alloc(&[rows, world_size * n + 1], DType::F32).unwrap();
                let out = whole.narrow(1, 0..world_size * n);
                local.all_gather_last(backend, &x, &out);
                let all = backend.alloc(&[rows, world_size * n], DType::U32).unwrap();
                local.all_gather_last(backend, &ids(backend, &part).reshape(&[rows, n]), &all);
                check(&local).unwrap();
                (read(backend, &out), read_ids(backend, &all))
            });
            let want: Vec<u32> = (0..rows)
                .flat_map(|row| (0..world_size * n).map(move |at| id(at / n, row, at % n)))
                .collect();
            let floats: Vec<f32> = want.iter().map(|&id| id as f32 + 0.5).collect();
            assert_eq!(results, vec![(floats, want); world_size], "{world_size} ranks, [{rows}, {n}]");
        }
    }
}

#[test]
#[should_panic(expected = "all_gather_last: out has shape [2, 5] F32 and x [2, 3] F32, with 2 ranks")]
fn all_gather_last_checks_shapes() {
    let backend = Reference::new();
    let (x, out) = (floats(&backend, &[2, 3], DType::F32, &[0.0; 6]), backend.alloc(&[2, 5], DType::F32));
    Local::group(2, 0)[0].all_gather_last(&backend, &x, &out.unwrap());
}

#[test]
fn reduce_scatter_gives_each_rank_its_part() {
    for world_size in 1..=4 {
        let results = ranks(world_size, |backend, local| {
            let rank = rank_of(&local);
            let values: Vec<f32> = (0..2 * world_size).map(|i| (i * (rank + 1)) as f32).collect();
            let x = floats(backend, &[world_size, 2], DType::F32, &values);
            let out = backend.alloc(&[1, 2], DType::F32).unwrap();
            local.reduce_scatter(backend, &x, &out);
            check(&local).unwrap();
            read(backend, &out)
        });
        let factor = (1..=world_size).sum::<usize>();
        for (rank, result) in results.into_iter().enumerate() {
            assert_eq!(result, [(2 * rank * factor) as f32, ((2 * rank + 1) * factor) as f32]);
        }
    }
}

#[test]
fn all_to_all_transposes() {
    for world_size in 1..=4 {
        let results = ranks(world_size, |backend, local| {
            let rank = rank_of(&local);
            let values: Vec<f32> = (0..world_size).map(|to| (10 * rank + to) as f32).collect();
            let x = floats(backend, &[world_size], DType::F32, &values);
            let out = backend.alloc(&[world_size], DType::F32).unwrap();
            local.all_to_all(backend, &x, &out);
            check(&local).unwrap();
            read(backend, &out)
        });
        for (rank, result) in results.into_iter().enumerate() {
            let want: Vec<f32> = (0..world_size).map(|from| (10 * from + rank) as f32).collect();
            assert_eq!(result, want);
        }
    }
}

#[test]
fn broadcast_replaces_with_the_roots() {
    for world_size in 1..=4 {
        for root in 0..world_size {
            let results = ranks(world_size, |backend, local| {
                let rank = rank_of(&local) as u32;
                let x = ids(backend, &[rank, 100 + rank]);
                local.broadcast(backend, &x, root);
                check(&local).unwrap();
                read_ids(backend, &x)
            });
            assert_eq!(results, vec![[root as u32, 100 + root as u32]; world_size]);
        }
    }
}

#[test]
fn messages_arrive_in_order() {
    let results = ranks(3, |backend, local| {
        // A ring: each rank sends three messages to the next and receives three from the one before.
        let rank = rank_of(&local);
        let mut received = Vec::new();
        for round in 0..3 {
            let x = floats(backend, &[2], DType::F32, &[rank as f32, round as f32]);
            local.send(backend, &x, (rank + 1) % 3);
            let y = backend.alloc(&[2], DType::F32).unwrap();
            local.recv(backend, &y, (rank + 2) % 3);
            received.extend(read(backend, &y));
        }
        check(&local).unwrap();
        received
    });
    for (rank, received) in results.into_iter().enumerate() {
        let from = ((rank + 2) % 3) as f32;
        assert_eq!(received, [from, 0.0, from, 1.0, from, 2.0]);
    }
}

#[test]
fn one_rank_sums_in_place() {
    ranks(1, |backend, local| {
        let x = floats(backend, &[2], DType::F32, &[0.1, f32::NAN]);
        local.all_reduce(backend, &x);
        local.broadcast(backend, &x, 0);
        local.all_gather(backend, &x, &x);
        check(&local).unwrap();
        assert_eq!(read(backend, &x)[0], 0.1);
    });
}

#[test]
fn ranks_that_disagree_are_told() {
    let results = ranks(3, |backend, local| {
        let x = floats(backend, &[2], DType::F32, &[1.0, 2.0]);
        match rank_of(&local) {
            1 => local.broadcast(backend, &x, 0),
            _ => local.all_reduce(backend, &x),
        }
        let first = check(&local);
        assert_eq!(read(backend, &x), [1.0, 2.0], "a failed collective changes nothing");
        // The group goes on.
        local.all_reduce(backend, &x);
        check(&local).unwrap();
        assert_eq!(read(backend, &x), [3.0, 6.0]);
        first
    });
    let mismatch = |op, rank, found| CommError::Mismatch { op, rank, found, found_elements: 2, elements: 2 };
    assert_eq!(results[0], Err(mismatch("all_reduce", 1, "broadcast")));
    assert_eq!(results[1], Err(mismatch("broadcast", 0, "all_reduce")));
    assert_eq!(results[2], Err(mismatch("all_reduce", 1, "broadcast")));
}

#[test]
fn sizes_that_differ_are_told() {
    let results = ranks(2, |backend, local| {
        let x = backend.alloc(&[1 + rank_of(&local)], DType::F32).unwrap();
        local.all_reduce(backend, &x);
        let sum = check(&local);
        match rank_of(&local) {
            0 => local.send(backend, &x, 1),
            _ => local.recv(backend, &x, 0),
        }
        (sum, check(&local))
    });
    let mismatch = |op, rank, found, found_elements, elements| {
        Err(CommError::Mismatch { op, rank, found, found_elements, elements })
    };
    assert_eq!(results[0], (mismatch("all_reduce", 1, "all_reduce", 2, 1), Ok(())));
    let recv = mismatch("recv", 0, "send", 1, 2);
    assert_eq!(results[1], (mismatch("all_reduce", 0, "all_reduce", 1, 2), recv));
}

#[test]
fn a_rank_that_leaves_frees_those_that_wait() {
    let results = ranks(3, |backend, local| {
        let x = floats(backend, &[1], DType::F32, &[1.0]);
        if rank_of(&local) == 2 {
            return (Ok(()), Ok(()));
        }
        local.all_reduce(backend, &x);
        let sum = check(&local);
        local.recv(backend, &x, 2);
        (sum, check(&local))
    });
    for result in &results[..2] {
        let gone = |op| Err(CommError::PeerGone { op, rank: 2 });
        assert_eq!(*result, (gone("all_reduce"), gone("recv")));
    }
}

#[test]
fn a_rank_that_panics_frees_those_that_wait() {
    let mut locals = Local::group(2, 16).into_iter();
    let (waiting, panicking) = (locals.next().unwrap(), locals.next().unwrap());
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let _local = panicking;
            panic!("this rank's step failed");
        });
        let backend = Reference::new();
        let x = floats(&backend, &[1], DType::F32, &[1.0]);
        waiting.all_reduce(&backend, &x);
        assert_eq!(check(&waiting), Err(CommError::PeerGone { op: "all_reduce", rank: 1 }));
        assert!(thread.join().is_err());
    });
}

/// A rank that waits for a slow one parks: it takes next to no time of a core.
#[cfg(target_os = "linux")]
#[test]
fn waiting_takes_no_core() {
    use std::time::Duration;

    const WAIT: Duration = Duration::from_millis(400);
    // Nanoseconds that this thread has run.
    let on_core = || {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        stat.split(' ').next()?.parse::<u64>().ok().map(Duration::from_nanos)
    };
    let results = ranks(2, |backend, local| {
        let x = floats(backend, &[1], DType::F32, &[1.0]);
        if rank_of(&local) == 1 {
            thread::sleep(WAIT);
        }
        let before = on_core();
        local.all_reduce(backend, &x);
        check(&local).unwrap();
        on_core().zip(before).map(|(after, before)| after.saturating_sub(before))
    });
    // Where the system does not keep these statistics there is nothing to compare.
    if let Some(waited) = results[0] {
        assert!(waited < WAIT / 4, "waiting {WAIT:?} took {waited:?} of a core");
    }
}

#[test]
fn a_rank_that_is_done_does_not_undo_the_last_sum() {
    for _ in 0..200 {
        let results = ranks(2, |backend, local| {
            let x = floats(backend, &[1], DType::F32, &[1.0]);
            local.all_reduce(backend, &x);
            check(&local).map(|()| read(backend, &x))
        });
        assert_eq!(results, [Ok(vec![2.0]), Ok(vec![2.0])]);
    }
}
