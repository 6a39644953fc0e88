//! Rows of a linear weight as F32, one at a time. Knows the stored formats.

use r1_backend::HostTensor;
use r1_core::DType;

use crate::f8::f8e4m3_to_f32;
use crate::linear::{HostLinear, widen_to_f32};

/// A weight's rows.
pub(super) struct Rows<'a> {
    data: &'a HostTensor,
    fp8: Option<Fp8>,
}

struct Fp8 {
    values: [f32; 256],
    scales: Vec<f32>,
    scale_columns: usize,
    block: [usize; 2],
    offset: [usize; 2],
}

impl<'a> Rows<'a> {
    pub(super) fn new(host: &'a HostLinear) -> Self {
        match host {
            HostLinear::Dense(data) => Self { data, fp8: None },
            HostLinear::Fp8Block { data, scales, block, offset } => {
                let fp8 = Fp8 {
                    values: std::array::from_fn(|code| f8e4m3_to_f32(code as u8)),
                    scales: widen_to_f32(scales),
                    scale_columns: scales.shape()[1],
                    block: *block,
                    offset: *offset,
                };
                Self { data, fp8: Some(fp8) }
            }
        }
    }

    /// N.
    pub(super) fn len(&self) -> usize {
        self.data.shape()[0]
    }

    /// K.
    pub(super) fn cols(&self) -> usize {
        self.data.shape()[1]
    }

    /// Columns from `start` on of row `row`, scales applied.
    pub(super) fn widen(&self, row: usize, start: usize, out: &mut [f32]) {
        let size = self.data.dtype().size_bytes();
        let from = (row * self.cols() + start) * size;
        let bytes = &self.data.bytes()[from..from + out.len() * size];
        if let Some(fp8) = &self.fp8 {
            return fp8.widen(row, start, bytes, out);
        }
        match self.data.dtype() {
            DType::BF16 => {
                let pairs = bytes.as_chunks().0.iter().zip(out);
                pairs.for_each(|(&b, out)| *out = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
            }
            DType::F16 => {
                let pairs = bytes.as_chunks().0.iter().zip(out);
                pairs.for_each(|(&b, out)| *out = half::f16::from_le_bytes(b).to_f32());
            }
            DType::F32 => {
                let quads = bytes.as_chunks().0.iter().zip(out);
                quads.for_each(|(&b, out)| *out = f32::from_le_bytes(b));
            }
            dtype => panic!("a linear of {dtype} without scales"),
        }
    }
}

impl Fp8 {
    fn widen(&self, row: usize, start: usize, codes: &[u8], out: &mut [f32]) {
        let scales = &self.scales[(self.offset[0] + row) / self.block[0] * self.scale_columns..];
        let mut done = 0;
        while done < out.len() {
            let column = self.offset[1] + start + done;
            let scale = scales[column / self.block[1]];
            let end = out.len().min(done + self.block[1] - column % self.block[1]);
            for (out, &code) in out[done..end].iter_mut().zip(&codes[done..end]) {
                *out = self.values[usize::from(code)] * scale;
            }
            done = end;
        }
    }
}
