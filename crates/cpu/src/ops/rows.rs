//! Operations that move rows: embedding, gathering, reading the cache.

use std::ops::Range;

use r1_backend::{Batch, LatentCache, Tensor, shape};

use super::Chunks;
use super::latent::{Entries, LatentIn};
use crate::Cpu;
use crate::simd::{Kernel, Simd};
use crate::view::{In, Mat, MatMut, Out};

pub(crate) fn feed_tokens(drawn: &Tensor<Cpu>, from: &Tensor<Cpu>, ids: &Tensor<Cpu>) {
    const OP: &str = "feed_tokens";
    shape::feed_tokens(drawn, from, ids);
    let (drawn, from) = (In::new(OP, "drawn", drawn), In::new(OP, "from", from));
    let mut ids = Out::new(OP, "ids", ids);
    let (drawn, from, ids) = (drawn.u32s(), from.u32s(), ids.mat());
    // SAFETY: a U32 vector, which was checked; this thread alone writes.
    let ids = unsafe { ids.row_mut::<u32>(0) };
    for (id, &row) in ids.iter_mut().zip(from).filter(|(_, row)| **row != u32::MAX) {
        assert!((row as usize) < drawn.len(), "{OP}: row {row} of {}", drawn.len());
        *id = drawn[row as usize];
    }
}

pub(crate) fn embed(cpu: &Cpu, ids: &Tensor<Cpu>, table: &Tensor<Cpu>, first_row: usize, out: &Tensor<Cpu>) {
    shape::embed(ids, table, out);
    let (ids, table) = (In::new("embed", "ids", ids), In::new("embed", "table", table));
    let mut out = Out::new("embed", "out", out);
    let (ids, table, out) = (ids.u32s(), table.mat(), out.mat());
    let row_of = |t: usize| (ids[t] as usize).checked_sub(first_row).filter(|&row| row < table.rows);
    copy(cpu, table, out, &row_of);
}

pub(crate) fn gather_rows(cpu: &Cpu, x: &Tensor<Cpu>, rows: &Tensor<Cpu>, out: &Tensor<Cpu>) {
    shape::gather_rows(x, rows, out);
    let (x, rows) = (In::new("gather_rows", "x", x), In::new("gather_rows", "rows", rows));
    let mut out = Out::new("gather_rows", "out", out);
    let (x, rows) = (x.mat(), rows.u32s());
    let row_of = |i: usize| {
        assert!((rows[i] as usize) < x.rows, "gather_rows: row {} of {}", rows[i], x.rows);
        Some(rows[i] as usize)
    };
    copy(cpu, x, out.mat(), &row_of);
}

/// `out[i] = src[row_of(i)]`, zeros where there is none.
fn copy(cpu: &Cpu, src: Mat<'_>, out: MatMut<'_>, row_of: &(dyn Fn(usize) -> Option<usize> + Sync)) {
    let mut engine = cpu.engine();
    let chunks = Chunks::rows(out.rows, out.cols, cpu.threads);
    engine.pool.run(chunks.count(), &|task, scratch| {
        let buf = scratch.floats.get(out.cols);
        for i in chunks.range(task) {
            cpu.isa.run(CopyRow { src: row_of(i).map(|row| (src, row)), out, i, buf });
        }
    });
}

struct CopyRow<'a> {
    src: Option<(Mat<'a>, usize)>,
    out: MatMut<'a>,
    i: usize,
    buf: &'a mut [f32],
}

impl Kernel for CopyRow<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.src {
            Some((src, row)) => src.read(s, row, 0, self.buf),
            None => self.buf.fill(0.0),
        }
        // SAFETY: row `i` belongs to this task.
        unsafe { self.out.write(s, self.i, 0, self.buf) };
    }
}

/// Where the tokens of one sequence lie in the paged cache.
#[derive(Clone, Copy)]
pub(crate) struct Pages<'a> {
    pub(crate) cache: Entries<'a>,
    pub(crate) table: &'a [u32],
    /// The operation, for messages.
    pub(crate) op: &'static str,
}

impl Pages<'_> {
    /// Block and offset of token `j`.
    fn place(&self, j: usize) -> (usize, usize) {
        let (num_blocks, block_size) = (self.cache.num_blocks(), self.cache.block_size());
        let (entry, offset) = (j / block_size, j % block_size);
        assert!(
            entry < self.table.len(),
            "{}: token {j} past a block table of {}",
            self.op,
            self.table.len()
        );
        let block = self.table[entry] as usize;
        assert!(block < num_blocks, "{}: block {block} of {num_blocks}", self.op);
        (block, offset)
    }

    /// Reads the cached entry of token `j`.
    #[inline(always)]
    pub(crate) fn read<S: Simd>(&self, s: S, j: usize, dst: &mut [f32]) {
        let (block, offset) = self.place(j);
        self.cache.read(s, block, offset, dst);
    }

    /// The entries of tokens `begin..begin + n` of a cache that is not FP8: in place where one block has them all, else copied
    /// into `room`.
    #[inline(always)]
    pub(crate) fn rows<'a>(&'a self, begin: usize, n: usize, room: MatMut<'a>) -> Mat<'a> {
        let (block, offset) = self.place(begin);
        if offset + n <= self.cache.block_size() {
            return self.cache.rows(block, offset, n);
        }
        for j in 0..n {
            let (block, offset) = self.place(begin + j);
            // SAFETY: the room is the caller's own.
            unsafe { room.copy(j, 0, self.cache.rows(block, offset, 1), 0) };
        }
        room.readable().slice(0..n)
    }
}

pub(crate) fn gather_latent(
    cpu: &Cpu,
    cache: &LatentCache<Cpu>,
    batch: &Batch<Cpu>,
    seqs: &Range<usize>,
    out: &Tensor<Cpu>,
) {
    const OP: &str = "gather_latent";
    shape::gather_latent(cache, batch, seqs, out);
    let cache = LatentIn::new(OP, cache);
    let start = In::new(OP, "batch.context_start", &batch.context_start);
    let len = In::new(OP, "batch.context_len", &batch.context_len);
    let table = In::new(OP, "batch.block_table", &batch.block_table);
    let mut out = Out::new(OP, "out", out);
    let (start, len, out) = (start.u32s(), len.u32s(), out.mat());
    let mut engine = cpu.engine();
    for seq in seqs.clone() {
        let pages = Pages { cache: cache.entries(), table: table.u32_row(seq), op: OP };
        let first = (start[seq] - start[seqs.start]) as usize;
        let tokens = len[seq] as usize;
        assert!(
            first + tokens <= out.rows,
            "{OP}: sequence {seq} ends at row {} of {}",
            first + tokens,
            out.rows
        );
        let chunks = Chunks::rows(tokens, out.cols, cpu.threads);
        engine.pool.run(chunks.count(), &|task, scratch| {
            let buf = scratch.floats.get(out.cols);
            cpu.isa.run(GatherRows { pages, tokens: chunks.range(task), first, out, buf });
        });
    }
}

struct GatherRows<'a> {
    pages: Pages<'a>,
    tokens: Range<usize>,
    first: usize,
    out: MatMut<'a>,
    buf: &'a mut [f32],
}

impl Kernel for GatherRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for j in self.tokens {
            self.pages.read(s, j, self.buf);
            // SAFETY: the task has these tokens alone, and sequences follow each other.
            unsafe { self.out.write(s, self.first + j, 0, self.buf) };
        }
    }
}
