//! Ranks as threads of one process, which meet in host memory.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use r1_backend::{Backend, CommError, Communicator, HostSlice, HostSliceMut, Tensor};
use r1_core::DType;

use crate::group::{Call, Group, Staging};

/// One rank of a group of threads. Tensors pass through host memory that is allocated once.
///
/// A rank that drops its `Local`, by panicking too, leaves the group: whoever waits for it gets
/// [`CommError::PeerGone`] from [`check`](Communicator::check), as does every later collective. Ranks that call different
/// collectives get [`CommError::Mismatch`]; `send` and `recv` are matched with each other only. After a failure the tensors
/// hold what they held.
pub struct Local {
    rank: usize,
    group: Arc<Group>,
    /// What this rank uploads; kept for its room.
    result: Mutex<Staging>,
    /// The first failure since the last check.
    failure: Mutex<Option<CommError>>,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Local(rank {} of {})", self.rank, self.group.world_size())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.group.leave(self.rank);
    }
}

/// Floats widened to F32, or ids.
fn download<B: Backend>(backend: &B, x: &Tensor<B>, to: &mut Staging) -> Result<(), CommError> {
    let elements = x.num_elements();
    if x.dtype() == DType::U32 {
        to.ids.resize(elements, 0);
        backend.download(x, HostSliceMut::U32(&mut to.ids))?;
    } else {
        to.floats.resize(elements, 0.0);
        backend.download(x, HostSliceMut::F32(&mut to.floats))?;
    }
    Ok(())
}

fn upload<B: Backend>(backend: &B, from: &Staging, x: &Tensor<B>) {
    if x.dtype() == DType::U32 {
        backend.upload(HostSlice::U32(&from.ids), x);
    } else {
        backend.upload(HostSlice::F32(&from.floats), x);
    }
}

fn read(staging: &RwLock<Staging>) -> std::sync::RwLockReadGuard<'_, Staging> {
    staging.read().unwrap_or_else(PoisonError::into_inner)
}

/// Elements `range` of every rank's floats, summed in rank order.
fn sum_in_rank_order(ranks: &[RwLock<Staging>], range: Range<usize>, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(&read(&ranks[0]).floats[range.clone()]);
    for rank in &ranks[1..] {
        out.iter_mut().zip(&read(rank).floats[range.clone()]).for_each(|(sum, x)| *sum += x);
    }
}

/// `out [rows, ranks * n]`: row by row, every rank's `[rows, n]`.
fn interleave<T: Copy + Default>(
    ranks: &[RwLock<Staging>],
    [rows, n]: [usize; 2],
    values: impl Fn(&Staging) -> &Vec<T>,
    out: &mut Vec<T>,
) {
    let width = ranks.len() * n;
    out.resize(rows * width, T::default());
    for (r, rank) in ranks.iter().enumerate() {
        let rank = read(rank);
        for (row, part) in values(&rank).chunks_exact(n.max(1)).enumerate() {
            out[row * width + r * n..][..n].copy_from_slice(part);
        }
    }
}

impl Local {
    /// The ranks of a new group, in order, one for each thread. `max_elements` is the size of the largest tensor that is
    /// summed or gathered; larger ones work, and make the staging grow.
    ///
    /// # Panics
    /// Without ranks.
    pub fn group(world_size: usize, max_elements: usize) -> Vec<Self> {
        assert!(world_size > 0, "a group has at least one rank");
        let staged = if world_size == 1 { 0 } else { max_elements };
        let group = Arc::new(Group::new(world_size, staged));
        let rank = |rank| Self {
            rank,
            group: group.clone(),
            result: Mutex::new(Staging { floats: Vec::with_capacity(staged), ids: Vec::new() }),
            failure: Mutex::new(None),
        };
        (0..world_size).map(rank).collect()
    }

    /// A group of one: every operation is what it is for one rank, and costs nothing.
    pub fn single() -> Self {
        Self::group(1, 0).remove(0)
    }

    fn alone(&self) -> bool {
        self.group.world_size() == 1
    }

    fn record(&self, result: Result<(), CommError>) {
        if let Err(error) = result {
            if matches!(error, CommError::Backend(_)) {
                // The others cannot have what this device did not give.
                self.group.leave(self.rank);
            }
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// A collective that lays out `x` and uploads to `out` what `combine` makes of everyone's.
    fn collective<B: Backend>(
        &self,
        backend: &B,
        call: Call,
        x: &Tensor<B>,
        out: &Tensor<B>,
        combine: impl FnOnce(&[RwLock<Staging>], &mut Staging),
    ) {
        let result = self.group.collective(
            self.rank,
            call,
            |staging| download(backend, x, staging),
            |ranks| {
                let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
                combine(ranks, &mut result);
                upload(backend, &result, out);
                Ok(())
            },
        );
        self.record(result);
    }

    /// `out = x`, which is all that a gathering collective does for one rank.
    fn copy<B: Backend>(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        if x.shares_buffer(out) && x.offset() == out.offset() {
            return;
        }
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let downloaded = download(backend, x, &mut result);
        if downloaded.is_ok() {
            upload(backend, &result, out);
        }
        self.record(downloaded);
    }

    #[track_caller]
    fn assert_peer(&self, op: &str, peer: usize) {
        let world_size = self.group.world_size();
        assert!(
            peer < world_size && peer != self.rank,
            "{op}: rank {peer} of {world_size} from {}",
            self.rank
        );
    }
}

/// Checks that one tensor has `times` the elements of the other.
#[track_caller]
fn assert_parts<B: Backend>(op: &str, part: &Tensor<B>, whole: &Tensor<B>, times: usize) {
    assert!(
        part.num_elements() * times == whole.num_elements() && part.dtype() == whole.dtype(),
        "{op}: out has shape {:?} {} and x {:?} {}, with {times} ranks",
        whole.shape(),
        whole.dtype(),
        part.shape(),
        part.dtype()
    );
}

/// Checks that `whole` `[L, times * n]` has the rows of `part` `[L, n]`; gives `n`.
#[track_caller]
fn assert_columns<B: Backend>(op: &str, part: &Tensor<B>, whole: &Tensor<B>, times: usize) -> usize {
    let fits = match (part.shape(), whole.shape()) {
        (&[rows, n], &[whole_rows, width]) => rows == whole_rows && width == times * n,
        _ => false,
    };
    assert!(
        fits && part.dtype() == whole.dtype(),
        "{op}: out has shape {:?} {} and x {:?} {}, with {times} ranks",
        whole.shape(),
        whole.dtype(),
        part.shape(),
        part.dtype()
    );
    part.dim(1)
}

#[track_caller]
fn assert_floats<B: Backend>(op: &str, x: &Tensor<B>) {
    assert!(x.dtype() != DType::U32, "{op}: x has dtype U32, and only floats are summed");
}

impl<B: Backend> Communicator<B> for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.group.world_size()
    }

    fn all_reduce(&self, backend: &B, x: &Tensor<B>) {
        assert_floats("all_reduce", x);
        if self.alone() {
            return;
        }
        let elements = x.num_elements();
        let call = Call { op: "all_reduce", elements, root: 0 };
        self.collective(backend, call, x, x, |ranks, result| {
            sum_in_rank_order(ranks, 0..elements, &mut result.floats);
        });
    }

    fn all_gather(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_parts("all_gather", x, out, self.group.world_size());
        if self.alone() {
            return self.copy(backend, x, out);
        }
        let call = Call { op: "all_gather", elements: x.num_elements(), root: 0 };
        self.collective(backend, call, x, out, |ranks, result| {
            result.floats.clear();
            result.ids.clear();
            for rank in ranks {
                let rank = read(rank);
                if out.dtype() == DType::U32 {
                    result.ids.extend_from_slice(&rank.ids);
                } else {
                    result.floats.extend_from_slice(&rank.floats);
                }
            }
        });
    }

    fn all_gather_last(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        let n = assert_columns("all_gather_last", x, out, self.group.world_size());
        if self.alone() {
            return self.copy(backend, x, out);
        }
        let call = Call { op: "all_gather_last", elements: x.num_elements(), root: 0 };
        let rows = x.dim(0);
        self.collective(backend, call, x, out, |ranks, result| {
            if out.dtype() == DType::U32 {
                interleave(ranks, [rows, n], |staging| &staging.ids, &mut result.ids);
            } else {
                interleave(ranks, [rows, n], |staging| &staging.floats, &mut result.floats);
            }
        });
    }

    fn reduce_scatter(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_floats("reduce_scatter", x);
        assert_parts("reduce_scatter", out, x, self.group.world_size());
        if self.alone() {
            return self.copy(backend, x, out);
        }
        let call = Call { op: "reduce_scatter", elements: x.num_elements(), root: 0 };
        let part = out.num_elements();
        self.collective(backend, call, x, out, |ranks, result| {
            sum_in_rank_order(ranks, self.rank * part..(self.rank + 1) * part, &mut result.floats);
        });
    }

    fn all_to_all(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_parts("all_to_all", x, out, 1);
        let world_size = self.group.world_size();
        let elements = x.num_elements();
        assert!(
            elements.is_multiple_of(world_size),
            "all_to_all: {elements} elements for {world_size} ranks"
        );
        if self.alone() {
            return self.copy(backend, x, out);
        }
        let call = Call { op: "all_to_all", elements, root: 0 };
        let part = elements / world_size;
        let mine = self.rank * part..(self.rank + 1) * part;
        self.collective(backend, call, x, out, |ranks, result| {
            result.floats.clear();
            result.ids.clear();
            for rank in ranks {
                let rank = read(rank);
                if x.dtype() == DType::U32 {
                    result.ids.extend_from_slice(&rank.ids[mine.clone()]);
                } else {
                    result.floats.extend_from_slice(&rank.floats[mine.clone()]);
                }
            }
        });
    }

    fn broadcast(&self, backend: &B, x: &Tensor<B>, root: usize) {
        let world_size = self.group.world_size();
        assert!(root < world_size, "broadcast: root {root} of {world_size}");
        if self.alone() {
            return;
        }
        let call = Call { op: "broadcast", elements: x.num_elements(), root };
        let result = self.group.collective(
            self.rank,
            call,
            |staging| if self.rank == root { download(backend, x, staging) } else { Ok(()) },
            |ranks| {
                if self.rank != root {
                    upload(backend, &read(&ranks[root]), x);
                }
                Ok(())
            },
        );
        self.record(result);
    }

    fn send(&self, backend: &B, x: &Tensor<B>, to: usize) {
        self.assert_peer("send", to);
        let lay_out = |staging: &mut Staging| download(backend, x, staging);
        self.record(self.group.send(self.rank, to, x.num_elements(), lay_out));
    }

    fn recv(&self, backend: &B, x: &Tensor<B>, from: usize) {
        self.assert_peer("recv", from);
        let take = |staging: &Staging| {
            upload(backend, staging, x);
            Ok(())
        };
        self.record(self.group.recv(from, self.rank, x.num_elements(), take));
    }

    fn check(&self) -> Result<(), CommError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}
