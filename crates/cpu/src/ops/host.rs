//! Traffic with the host: here, conversion of element types.

use r1_backend::{HostSlice, HostSliceMut, Tensor};
use r1_core::DType;

use crate::Cpu;
use crate::simd::{Kernel, Simd};
use crate::view::{Cube, CubeMut, In, Out};

pub(crate) fn upload(cpu: &Cpu, src: HostSlice<'_>, dst: &Tensor<Cpu>) {
    let (len, kind) = match src {
        HostSlice::F32(values) => (values.len(), "floats"),
        HostSlice::U32(values) => (values.len(), "u32s"),
    };
    check("upload", "dst", dst, len, kind);
    let mut out = Out::new("upload", "dst", dst);
    match src {
        HostSlice::F32(src) => cpu.isa.run(Upload { src, dst: out.cube() }),
        HostSlice::U32(src) => {
            let dst = out.cube();
            for (i, row) in src.chunks(dst.shape[2].max(1)).enumerate() {
                let mat = dst.outer(i / dst.shape[1]);
                // SAFETY: U32 was checked; this thread alone writes.
                unsafe { mat.row_mut::<u32>(i % dst.shape[1]) }.copy_from_slice(row);
            }
        }
    }
}

pub(crate) fn download(cpu: &Cpu, src: &Tensor<Cpu>, dst: HostSliceMut<'_>) {
    let (len, kind) = match &dst {
        HostSliceMut::F32(values) => (values.len(), "floats"),
        HostSliceMut::U32(values) => (values.len(), "u32s"),
    };
    check("download", "src", src, len, kind);
    let input = In::new("download", "src", src);
    match dst {
        HostSliceMut::F32(dst) => cpu.isa.run(Download { src: input.cube(), dst }),
        HostSliceMut::U32(dst) => {
            let src = input.cube();
            for (i, row) in dst.chunks_mut(src.shape[2].max(1)).enumerate() {
                row.copy_from_slice(src.outer(i / src.shape[1]).u32_row(i % src.shape[1]));
            }
        }
    }
}

fn check(op: &str, arg: &str, tensor: &Tensor<Cpu>, len: usize, kind: &str) {
    let fits = (kind == "u32s") == (tensor.dtype() == DType::U32);
    assert!(fits, "{op}: {kind} for {arg} of dtype {}", tensor.dtype());
    assert!(len == tensor.num_elements(), "{op}: {len} {kind} for {arg} of shape {:?}", tensor.shape());
}

struct Upload<'a> {
    src: &'a [f32],
    dst: CubeMut<'a>,
}

impl Kernel for Upload<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [_, rows, cols] = self.dst.shape;
        for (i, row) in self.src.chunks(cols.max(1)).enumerate() {
            // SAFETY: this thread alone writes.
            unsafe { self.dst.outer(i / rows).write(s, i % rows, 0, row) };
        }
    }
}

struct Download<'a> {
    src: Cube<'a>,
    dst: &'a mut [f32],
}

impl Kernel for Download<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [_, rows, cols] = self.src.shape;
        for (i, row) in self.dst.chunks_mut(cols.max(1)).enumerate() {
            self.src.outer(i / rows).read(s, i % rows, 0, row);
        }
    }
}
