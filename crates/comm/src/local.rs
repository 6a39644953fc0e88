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
        to.floats.clear();
        to.ids.resize(elements, 0);
        backend.download(x, HostSliceMut::U32(&mut to.ids))?;
    } else {
        to.ids.clear();
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
    // The other kind of values is not there.
    let is_there = ranks.iter().all(|rank| !values(&read(rank)).is_empty());
    out.resize(if is_there { rows * width } else { 0 }, T::default());
    for (r, rank) in ranks.iter().enumerate() {
        let rank = read(rank);
        for (row, part) in values(&rank).chunks_exact(n.max(1)).enumerate() {
            out[row * width + r * n..][..n].copy_from_slice(part);
        }
    }
}

/// Elements `range` of every rank's values, one rank after the other.
fn concatenate(ranks: &[RwLock<Staging>], range: Range<usize>, out: &mut Staging) {
    out.floats.clear();
    out.ids.clear();
    for rank in ranks {
        let rank = read(rank);
        out.floats.extend_from_slice(rank.floats.get(range.clone()).unwrap_or_default());
        out.ids.extend_from_slice(rank.ids.get(range.clone()).unwrap_or_default());
    }
}

/// What ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// See [`Communicator::all_reduce`].
    AllReduce,
    /// See [`Communicator::all_gather`].
    AllGather,
    /// See [`Communicator::all_gather_last`].
    AllGatherLast {
        /// L.
        rows: usize,
    },
    /// See [`Communicator::reduce_scatter`].
    ReduceScatter,
    /// See [`Communicator::all_to_all`].
    AllToAll,
    /// See [`Communicator::broadcast`].
    Broadcast {
        /// Whose values.
        root: usize,
    },
    /// See [`Communicator::send`].
    Send {
        /// The other rank.
        to: usize,
    },
    /// See [`Communicator::recv`].
    Recv {
        /// The other rank.
        from: usize,
    },
}

impl Collective {
    /// As the operation is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::AllGatherLast { .. } => "all_gather_last",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Broadcast { .. } => "broadcast",
            Self::Send { .. } => "send",
            Self::Recv { .. } => "recv",
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

    /// The first failure since the last call.
    pub fn failure(&self) -> Result<(), CommError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
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

    /// One collective, or one half of a pair's: `lay_out` puts this rank's `elements` values into the staging, floats widened to
    /// F32 or ids; `take` is given what this rank receives, where it receives something. For devices that exchange in the
    /// order of their own work; [`Communicator`] is this with `download` and `upload`.
    ///
    /// # Panics
    /// When a root or a peer is no other rank, or when elements do not divide among the ranks.
    pub fn exchange(
        &self,
        what: Collective,
        elements: usize,
        lay_out: impl FnOnce(&mut Staging) -> Result<(), CommError>,
        take: impl FnOnce(&Staging) -> Result<(), CommError>,
    ) {
        let (op, world_size) = (what.name(), self.group.world_size());
        let mut call = Call { op, elements, root: 0 };
        let result = match what {
            Collective::Send { to } => {
                self.assert_peer(op, to);
                self.group.send(self.rank, to, elements, lay_out)
            }
            Collective::Recv { from } => {
                self.assert_peer(op, from);
                self.group.recv(from, self.rank, elements, take)
            }
            Collective::Broadcast { root } => {
                assert!(root < world_size, "broadcast: root {root} of {world_size}");
                call.root = root;
                let lay_out =
                    |staging: &mut Staging| if self.rank == root { lay_out(staging) } else { Ok(()) };
                self.group.collective(self.rank, call, lay_out, |ranks| {
                    if self.rank == root { Ok(()) } else { take(&read(&ranks[root])) }
                })
            }
            Collective::AllReduce
            | Collective::AllGather
            | Collective::AllGatherLast { .. }
            | Collective::ReduceScatter
            | Collective::AllToAll => {
                let part = elements / world_size;
                if matches!(what, Collective::ReduceScatter | Collective::AllToAll) {
                    assert!(
                        elements.is_multiple_of(world_size),
                        "{op}: {elements} elements for {world_size} ranks"
                    );
                }
                let mine = self.rank * part..(self.rank + 1) * part;
                self.group.collective(self.rank, call, lay_out, |ranks| {
                    let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
                    match what {
                        Collective::AllReduce => sum_in_rank_order(ranks, 0..elements, &mut result.floats),
                        Collective::ReduceScatter => sum_in_rank_order(ranks, mine, &mut result.floats),
                        Collective::AllToAll => concatenate(ranks, mine, &mut result),
                        Collective::AllGatherLast { rows } => {
                            let size = [rows, elements / rows.max(1)];
                            let Staging { floats, ids } = &mut *result;
                            interleave(ranks, size, |staging| &staging.floats, floats);
                            interleave(ranks, size, |staging| &staging.ids, ids);
                        }
                        _ => concatenate(ranks, 0..elements, &mut result),
                    }
                    take(&result)
                })
            }
        };
        self.record(result);
    }

    /// Takes no further part: whoever waits for this rank stops waiting, as when it is dropped.
    pub fn leave(&self) {
        self.group.leave(self.rank);
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

impl Local {
    /// [`exchange`](Local::exchange) of tensors.
    fn of_tensors<B: Backend>(&self, backend: &B, what: Collective, x: &Tensor<B>, out: &Tensor<B>) {
        self.exchange(
            what,
            x.num_elements(),
            |staging| download(backend, x, staging),
            |staging| {
                upload(backend, staging, out);
                Ok(())
            },
        );
    }
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
        if !self.alone() {
            self.of_tensors(backend, Collective::AllReduce, x, x);
        }
    }

    fn all_gather(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_parts("all_gather", x, out, self.group.world_size());
        if self.alone() {
            return self.copy(backend, x, out);
        }
        self.of_tensors(backend, Collective::AllGather, x, out);
    }

    fn all_gather_last(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_columns("all_gather_last", x, out, self.group.world_size());
        if self.alone() {
            return self.copy(backend, x, out);
        }
        self.of_tensors(backend, Collective::AllGatherLast { rows: x.dim(0) }, x, out);
    }

    fn reduce_scatter(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_floats("reduce_scatter", x);
        assert_parts("reduce_scatter", out, x, self.group.world_size());
        if self.alone() {
            return self.copy(backend, x, out);
        }
        self.of_tensors(backend, Collective::ReduceScatter, x, out);
    }

    fn all_to_all(&self, backend: &B, x: &Tensor<B>, out: &Tensor<B>) {
        assert_parts("all_to_all", x, out, 1);
        if self.alone() {
            return self.copy(backend, x, out);
        }
        self.of_tensors(backend, Collective::AllToAll, x, out);
    }

    fn broadcast(&self, backend: &B, x: &Tensor<B>, root: usize) {
        let world_size = self.group.world_size();
        assert!(root < world_size, "broadcast: root {root} of {world_size}");
        if !self.alone() {
            self.of_tensors(backend, Collective::Broadcast { root }, x, x);
        }
    }

    fn send(&self, backend: &B, x: &Tensor<B>, to: usize) {
        self.of_tensors(backend, Collective::Send { to }, x, x);
    }

    fn recv(&self, backend: &B, x: &Tensor<B>, from: usize) {
        self.of_tensors(backend, Collective::Recv { from }, x, x);
    }

    fn check(&self) -> Result<(), CommError> {
        self.failure()
    }
}
