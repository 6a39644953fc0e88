//! Checks of memory: allocation, import, and traffic with the host.

use r1_core::DType;

use super::random::seeded;
use super::rounding::{e4m3, to_bytes};
use super::settle;
use super::slab::{LAYOUTS, Slab, host_tensor};
use crate::{Backend, BackendError, HostSlice, HostSliceMut, Tensor};

/// Element types that hold fractions.
const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F8E4M3];

/// A tensor, or `None` where the backend says that it has none of this type.
fn alloc<B: Backend>(backend: &B, shape: &[usize], dtype: DType) -> Option<Tensor<B>> {
    match backend.alloc(shape, dtype) {
        Ok(tensor) => Some(tensor),
        Err(BackendError::UnsupportedDType { .. }) if matches!(dtype, DType::F16 | DType::F8E4M3) => None,
        Err(error) => panic!("alloc {shape:?} {dtype}: {error}"),
    }
}

fn download<B: Backend>(backend: &B, tensor: &Tensor<B>) -> Vec<f32> {
    let mut values = vec![f32::NAN; tensor.num_elements()];
    backend.download(tensor, HostSliceMut::F32(&mut values)).expect("download");
    values
}

/// [`Backend::alloc`] gives zeros.
pub fn alloc_is_zeroed<B: Backend>(backend: &B) {
    for dtype in FLOATS {
        if let Some(tensor) = alloc(backend, &[3, 2, 7], dtype) {
            assert_eq!(tensor.shape(), [3, 2, 7]);
            assert_eq!(tensor.dtype(), dtype);
            assert_eq!(download(backend, &tensor), [0.0; 42], "alloc {dtype}");
        }
    }
    let tensor = backend.alloc(&[5], DType::U32).expect("alloc");
    let mut ids = [7; 5];
    backend.download(&tensor, HostSliceMut::U32(&mut ids)).expect("download");
    assert_eq!(ids, [0; 5], "alloc U32");
}

/// [`Backend::alloc`] of what no machine has is an error that says how much was asked for, and the backend lives on.
pub fn alloc_refuses<B: Backend>(backend: &B) {
    for (shape, requested) in [(&[1 << 25, 1 << 25][..], 1 << 52), (&[usize::MAX, 2], usize::MAX)] {
        match backend.alloc(shape, DType::F32) {
            Err(BackendError::OutOfMemory { requested_bytes, .. }) => assert_eq!(requested_bytes, requested),
            Err(error) => panic!("alloc {shape:?}: {error}"),
            Ok(_) => panic!("alloc {shape:?}: the backend says it has {requested} bytes"),
        }
    }
    let tensor = backend.alloc(&[2], DType::F32).expect("alloc");
    assert_eq!(download(backend, &tensor), [0.0; 2]);
}

/// [`Backend::upload`] rounds to nearest even and saturates E4M3, [`Backend::download`] widens exactly.
pub fn upload_rounds<B: Backend>(backend: &B) {
    // What is written, and what BF16, F16 and E4M3 must make of it.
    let nan = f32::NAN;
    let inf = f32::INFINITY;
    let cases: [(f32, [f32; 3]); 15] = [
        (-0.0, [-0.0, -0.0, -0.0]),
        (1.0, [1.0, 1.0, 1.0]),
        // Half way between two BF16: the even one, below and above.
        (1.0 + 1.0 / 256.0, [1.0, 1.0 + 1.0 / 256.0, 1.0]),
        (1.0 + 3.0 / 256.0, [1.015625, 1.0 + 3.0 / 256.0, 1.0]),
        // Half way between two E4M3.
        (17.0, [17.0, 17.0, 16.0]),
        (19.0, [19.0, 19.0, 20.0]),
        (-17.5, [-17.5, -17.5, -18.0]),
        // The subnormals of E4M3: its least, a tie down to nothing, a tie up.
        (0.001953125, [0.001953125, 0.001953125, 0.001953125]),
        (0.0009765625, [0.0009765625, 0.0009765625, 0.0]),
        (0.0029296875, [0.0029296875, 0.0029296875, 0.00390625]),
        (448.0, [448.0, 448.0, 448.0]),
        (-60000.0, [-59904.0, -60000.0, -448.0]),
        (inf, [inf, inf, 448.0]),
        (f32::MAX, [inf, inf, 448.0]),
        (nan, [nan, nan, nan]),
    ];
    let written: Vec<f32> = cases.iter().map(|(value, _)| *value).collect();
    let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    for (index, dtype) in FLOATS.into_iter().enumerate() {
        let Some(tensor) = alloc(backend, &[cases.len()], dtype) else { continue };
        backend.upload(HostSlice::F32(&written), &tensor);
        let read = download(backend, &tensor);
        for ((value, rounded), read) in cases.iter().zip(&read) {
            let want = if index == 0 { value } else { &rounded[index - 1] };
            assert!(same(read, want), "upload {value} to {dtype}: {read}, expected {want}");
        }
        settle(backend, "upload");
    }
}

/// [`Backend::upload`] and [`Backend::download`] of views with gaps touch the view alone.
pub fn traffic_honours_views<B: Backend>(backend: &B) {
    for dtype in backend.capabilities().activation_dtypes {
        for layout in LAYOUTS {
            let slab = Slab::poison(backend, &[3, 2, 5], dtype, layout);
            let values: Vec<f32> = (0..30).map(|i| i as f32).collect();
            backend.upload(HostSlice::F32(&values), &slab.view);
            assert_eq!(download(backend, &slab.view), values, "upload, then download {layout:?}");
            assert_eq!(slab.read(backend), (0..30).map(f64::from).collect::<Vec<_>>(), "upload {layout:?}");
        }
    }
    let ids = Slab::ids(backend, &[2, 3], &[1; 6]);
    backend.upload(HostSlice::U32(&[10, 11, 12]), &ids.view.rows(1..2));
    assert_eq!(ids.read_ids(backend), [1, 1, 1, 10, 11, 12]);
    // Columns of a table whose rows lie further apart, as a step's block table does.
    let table = Slab::ids(backend, &[3, 7], &[5; 21]);
    backend.upload(HostSlice::U32(&[1, 2, 3, 4]), &table.view.rows(0..2).narrow(1, 0..2));
    let expected = [[1, 2, 5, 5, 5, 5, 5], [3, 4, 5, 5, 5, 5, 5], [5; 7]];
    assert_eq!(table.read_ids(backend), expected.concat(), "upload of columns");
    let mut row = [0; 3];
    backend.download(&ids.view.rows(1..2), HostSliceMut::U32(&mut row)).expect("download");
    assert_eq!(row, [10, 11, 12]);
}

/// [`Backend::read_back`] gives what a step wrote, once its ticket was waited for, whatever other tensors were written since.
pub fn read_back<B: Backend>(backend: &B) {
    seeded("read_back", |random| {
        let drawn: Vec<u32> = (0..7).map(|_| random.next() as u32).collect();
        let (read, other) = (Slab::ids(backend, &[7], &[1; 7]), Slab::ids(backend, &[7], &[2; 7]));
        let (from, source) =
            (Slab::ids(backend, &[7], &[0, 1, 2, 3, 4, 5, 6]), Slab::ids(backend, &[7], &drawn));
        backend.feed_tokens(&source.view, &from.view, &read.view);
        backend.flush().wait().expect("the step runs");
        backend.feed_tokens(&source.view, &from.view, &other.view);
        let mut host = [0; 7];
        backend.read_back(&read.view, HostSliceMut::U32(&mut host)).expect("read_back");
        assert_eq!(host, drawn[..], "read_back");
        settle(backend, "feed_tokens");
        for dtype in backend.capabilities().activation_dtypes {
            let slab = Slab::normal(backend, random, &[3, 5], dtype, LAYOUTS[1], 1.0);
            backend.flush().wait().expect("the step runs");
            let mut host = [f32::NAN; 15];
            backend.read_back(&slab.view, HostSliceMut::F32(&mut host)).expect("read_back");
            assert_eq!(host.map(f64::from), slab.host[..], "read_back {dtype}");
        }
    });
}

/// [`Backend::import`] of every type, from bytes at odd addresses too, and of every E4M3 code.
pub fn import<B: Backend>(backend: &B) {
    seeded("import", |random| {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for misalignment in [0, 1, 6] {
                let shape = [5, 7];
                let values: Vec<f64> =
                    random.normals(35, 1.0).iter().map(|v| super::rounding::round_to(dtype, *v)).collect();
                let host = host_tensor(&to_bytes(dtype, &values), &shape, dtype, misalignment);
                let tensor = backend.import(&host).expect("import");
                assert_eq!((tensor.shape(), tensor.dtype()), (&shape[..], dtype));
                let read: Vec<f64> = download(backend, &tensor).into_iter().map(f64::from).collect();
                assert_eq!(read, values, "import {dtype}, {misalignment} bytes past an even address");
            }
        }
        let codes: Vec<u8> = (0..=255).collect();
        let tensor = backend.import(&host_tensor(&codes, &[256], DType::F8E4M3, 3)).expect("import");
        for (code, value) in (0..=255).zip(download(backend, &tensor)) {
            let want = e4m3(code);
            assert!(
                f64::from(value) == want || value.is_nan() && want.is_nan(),
                "import: E4M3 code {code:#04x} reads {value}, expected {want}"
            );
        }
        let ids: Vec<u8> = [0, 1, u32::MAX].iter().flat_map(|id: &u32| id.to_le_bytes()).collect();
        let tensor = backend.import(&host_tensor(&ids, &[3], DType::U32, 2)).expect("import");
        let mut read = [0; 3];
        backend.download(&tensor, HostSliceMut::U32(&mut read)).expect("download");
        assert_eq!(read, [0, 1, u32::MAX], "import U32");
    });
}
