//! The contract over a vendor whose stream does nothing until somebody waits: what is too early or too late shows.

use super::*;

type Command = Box<dyn FnOnce() + Send>;

/// A stream's commands, and those that each event stands behind.
#[derive(Default)]
struct Lazy {
    streams: Vec<Vec<Command>>,
    /// Of each event: its stream and how many commands were enqueued there by then.
    events: Vec<(usize, usize)>,
    /// Of each stream: commands that have run.
    ran: Vec<usize>,
    /// Commands of captured graphs.
    is_capturing: bool,
    graphs: Vec<usize>,
    failure: Option<&'static str>,
    pinned: usize,
    launches: Vec<(usize, u32)>,
}

#[derive(Default)]
struct Fake(Mutex<Lazy>);

impl Fake {
    fn state(&self) -> MutexGuard<'_, Lazy> {
        lock(&self.0)
    }

    #[allow(clippy::unnecessary_wraps)] // as what it stands in for
    fn enqueue(&self, stream: Handle, command: impl FnOnce() + Send + 'static) -> Result<(), DriverError> {
        self.state().streams[stream.0.addr() - 1].push(Box::new(command));
        Ok(())
    }

    /// Runs a stream's commands up to a number of them.
    fn run(&self, stream: usize, upto: usize) -> Result<(), DriverError> {
        let mut state = self.state();
        let due = upto.saturating_sub(state.ran[stream]).min(state.streams[stream].len());
        state.ran[stream] += due;
        let commands: Vec<_> = state.streams[stream].drain(..due).collect();
        for command in commands {
            command();
        }
        match state.failure {
            Some(why) => Err(DriverError::Call { call: "fake", why: why.into() }),
            None => Ok(()),
        }
    }
}

fn handle(number: usize) -> Handle {
    Handle(std::ptr::without_provenance_mut(number + 1))
}

fn copy_rows(from: *const u8, from_pitch: usize, to: *mut u8, to_pitch: usize, rows: Rows) {
    for row in 0..rows.num_rows {
        // SAFETY: rows of memory that the test keeps.
        unsafe {
            std::ptr::copy_nonoverlapping(
                from.add(row * from_pitch),
                to.add(row * to_pitch),
                rows.width_bytes,
            );
        };
    }
}

impl Api for Fake {
    const BLOCKING_VARIABLE: &'static str = "FAKE_BLOCKING";

    fn enter(&self) -> Result<(), DriverError> {
        Ok(())
    }
    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError> {
        self.reserve_pinned(size_bytes).map(|at| DevicePtr(at as u64))
    }
    fn release(&self, at: DevicePtr) {
        // SAFETY: as `release_pinned`.
        unsafe { self.release_pinned(at.0 as *mut u8) };
    }
    fn reserve_pinned(&self, size_bytes: usize) -> Result<*mut u8, DriverError> {
        self.state().pinned += 1;
        // SAFETY: a size above zero.
        Ok(unsafe { libc::malloc(size_bytes) }.cast())
    }
    unsafe fn release_pinned(&self, at: *mut u8) {
        self.state().pinned -= 1;
        // SAFETY: from `reserve_pinned`.
        unsafe { libc::free(at.cast()) };
    }
    fn stream(&self) -> Result<Handle, DriverError> {
        let mut state = self.state();
        state.streams.push(Vec::new());
        state.ran.push(0);
        Ok(handle(state.streams.len() - 1))
    }
    fn release_stream(&self, _: Handle) {}
    fn synchronize(&self, stream: Handle) -> Result<(), DriverError> {
        self.run(stream.0.addr() - 1, usize::MAX)
    }
    unsafe fn copy_in(&self, from: *const u8, to: Rows, stream: Handle) -> Result<(), DriverError> {
        let from = from.addr();
        self.enqueue(stream, move || {
            copy_rows(from as *const u8, to.width_bytes, to.at.0 as *mut u8, to.pitch_bytes, to);
        })
    }
    unsafe fn copy_out(&self, from: Rows, to: *mut u8, stream: Handle) -> Result<(), DriverError> {
        let to = to.addr();
        self.enqueue(stream, move || {
            copy_rows(from.at.0 as *const u8, from.pitch_bytes, to as *mut u8, from.width_bytes, from);
        })
    }
    fn copy(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        size_bytes: usize,
        stream: Handle,
    ) -> Result<(), DriverError> {
        let rows = Rows::dense(to, size_bytes);
        self.enqueue(stream, move || copy_rows(from.0 as *const u8, 0, to.0 as *mut u8, 0, rows))
    }
    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: memory that the test keeps.
        self.enqueue(stream, move || unsafe { std::ptr::write_bytes(at.0 as *mut u8, byte, size_bytes) })
    }
    unsafe fn launch(
        &self,
        function: Handle,
        threads: u32,
        _: &Launch<'_>,
        _: Handle,
    ) -> Result<(), DriverError> {
        self.state().launches.push((function.0.addr() - 1, threads));
        Ok(())
    }
    fn event(&self) -> Result<Handle, DriverError> {
        let mut state = self.state();
        state.events.push((0, 0));
        Ok(handle(state.events.len() - 1))
    }
    fn release_event(&self, _: Handle) {}
    fn record(&self, event: Handle, stream: Handle) -> Result<(), DriverError> {
        let mut state = self.state();
        let stream = stream.0.addr() - 1;
        state.events[event.0.addr() - 1] = (stream, state.ran[stream] + state.streams[stream].len());
        Ok(())
    }
    fn wait(&self, event: Handle) -> Result<(), DriverError> {
        let (stream, upto) = self.state().events[event.0.addr() - 1];
        self.run(stream, upto)
    }
    fn begin_capture(&self, _: Handle) -> Result<(), DriverError> {
        self.state().is_capturing = true;
        Ok(())
    }
    fn end_capture(&self, _: Handle) -> Result<Handle, DriverError> {
        let mut state = self.state();
        state.is_capturing = false;
        state.graphs.push(0);
        Ok(handle(state.graphs.len() - 1))
    }
    fn replay(&self, graph: Handle, _: Handle) -> Result<(), DriverError> {
        self.state().graphs[graph.0.addr() - 1] += 1;
        Ok(())
    }
    fn release_graph(&self, _: Handle) {}
}

fn info() -> DeviceInfo {
    DeviceInfo {
        driver: "fake",
        name: "fake".into(),
        arch: "fake".into(),
        num_multiprocessors: 1,
        warp_size: 32,
        max_shared_bytes: 1024,
        total_bytes: 80 << 30,
        free_bytes: 79 << 30,
        fp8: false,
        fnuz: false,
    }
}

fn device() -> Device<Fake> {
    let table = crate::kernels::emulated();
    let functions = table.iter().enumerate().map(|(i, kernel)| (kernel.name, handle(i))).collect();
    Device::new(Fake::default(), info(), functions, &table).expect("a device")
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn what_is_written_may_change_at_once_however_large_it_is() {
    let device = device();
    // Twice around the ring, in pieces that do not divide it.
    let len = 2 * WRITE_BYTES + 12_345;
    let at = device.reserve(len).expect("memory");
    let mut src = bytes(len);
    let want = src.clone();
    for (i, chunk) in src.chunks_mut(7_654_321).enumerate() {
        let to = Rows::dense(at.offset(i * 7_654_321), chunk.len());
        device.write(chunk, to).expect("written");
        chunk.fill(0);
    }
    let mut found = vec![0; len];
    device.read(Rows::dense(at, len), &mut found, ReadOrder::AfterAll).expect("read");
    assert!(found == want);
}

#[test]
fn rows_with_gaps_arrive_and_leave_the_gaps_alone() {
    let device = device();
    // Rows of which many fit a piece, and rows that are longer than one.
    for (num_rows, width_bytes, pitch_bytes) in
        [(100, 30, 64), (3, READ_BYTES + 5, READ_BYTES + 256), (1, 7, 9)]
    {
        let at = device.reserve(num_rows * pitch_bytes).expect("memory");
        device.fill(at, num_rows * pitch_bytes, 0xee).expect("filled");
        let rows = Rows { at, num_rows, width_bytes, pitch_bytes };
        let src = bytes(num_rows * width_bytes);
        device.write(&src, rows).expect("written");
        let mut found = vec![0; src.len()];
        device.read(rows, &mut found, ReadOrder::AfterAll).expect("read");
        assert!(found == src, "{num_rows} rows");
        let mut all = vec![0; num_rows * pitch_bytes];
        device.read(Rows::dense(at, all.len()), &mut all, ReadOrder::AfterAll).expect("read");
        let gaps = all.chunks(pitch_bytes).flat_map(|row| &row[width_bytes..]);
        assert!(gaps.into_iter().all(|&byte| byte == 0xee), "{num_rows} rows");
    }
}

#[test]
fn pieces_cover_all_rows_once() {
    for (num_rows, width_bytes, pitch_bytes, most) in
        [(5, 10, 16, 25), (4, 100, 128, 30), (7, 8, 8, 20), (0, 8, 9, 4), (3, 0, 9, 4)]
    {
        let rows = Rows { at: DevicePtr(1000), num_rows, width_bytes, pitch_bytes };
        let mut covered = vec![0; num_rows * width_bytes];
        for (range, piece) in pieces(rows, most) {
            assert!(range.len() <= most && range.len() == piece.size_bytes());
            for (i, covered) in covered[range.clone()].iter_mut().enumerate() {
                *covered += 1;
                let dense = range.start + i;
                let want = 1000 + dense / width_bytes * pitch_bytes + dense % width_bytes;
                let found =
                    piece.at.0 as usize + i / piece.width_bytes * piece.pitch_bytes + i % piece.width_bytes;
                assert_eq!(found, want, "{rows:?}");
            }
        }
        assert!(covered.iter().all(|&times| times == 1), "{rows:?}");
    }
}

#[test]
fn a_read_at_once_overtakes_and_one_after_all_waits() {
    let device = device();
    let at = device.reserve(4).expect("memory");
    device.fill(at, 4, 1).expect("filled");
    device.mark().expect("a mark").wait().expect("no failure");
    device.fill(at, 4, 2).expect("filled");
    let mut found = [0; 4];
    device.read(Rows::dense(at, 4), &mut found, ReadOrder::AtOnce).expect("read");
    assert_eq!(found, [1; 4]);
    device.read(Rows::dense(at, 4), &mut found, ReadOrder::AfterAll).expect("read");
    assert_eq!(found, [2; 4]);
}

#[test]
fn marks_use_their_events_again_and_tell_failures_each_time() {
    let device = device();
    let events = || device.shared.api.state().events.len();
    let before = events();
    for _ in 0..3 {
        device.mark().expect("a mark").wait().expect("no failure");
    }
    assert_eq!(events(), before + 1);
    device.shared.api.state().failure = Some("an illegal address");
    for _ in 0..2 {
        let error = device.mark().expect("a mark").wait().expect_err("the device has failed").to_string();
        assert!(error.contains("an illegal address") && error.contains("FAKE_BLOCKING=1"), "{error}");
    }
}

#[test]
fn a_capture_takes_no_traffic_with_the_host_and_replays() {
    let device = device();
    let at = device.reserve(4).expect("memory");
    assert!(device.end_capture().is_err());
    device.begin_capture().expect("a capture");
    assert!(device.begin_capture().is_err());
    assert!(device.write(&[0; 4], Rows::dense(at, 4)).is_err());
    assert!(device.read(Rows::dense(at, 4), &mut [0; 4], ReadOrder::AtOnce).is_err());
    assert!(device.mark().is_err());
    let graph = device.end_capture().expect("a graph");
    device.replay(&graph).expect("enqueued");
    device.replay(&graph).expect("enqueued");
    assert_eq!(device.shared.api.state().graphs, [2]);
    device.write(&[0; 4], Rows::dense(at, 4)).expect("traffic again");
}

#[test]
fn launches_find_their_function_and_wrong_ones_are_refused() {
    let device = device();
    let table = crate::kernels::emulated();
    let (index, kernel) =
        table.iter().enumerate().find(|(_, kernel)| kernel.name == "add").expect("a kernel");
    let args = vec![MaybeUninit::new(0); kernel.args_bytes];
    let launch = Launch { kernel: "add", grid: [1, 1, 1], warps: 2, shared_bytes: 0, args: &args };
    device.launch(&launch).expect("launched");
    assert_eq!(device.shared.api.state().launches, [(index, 64)]);
    let refused = |launch: Launch<'_>| device.launch(&launch).expect_err("refused").to_string();
    assert!(refused(Launch { kernel: "nothing", ..launch }).contains("kernel nothing"));
    assert!(refused(Launch { warps: kernel.max_warps + 1, ..launch }).contains("kernel add"));
    let error = refused(Launch { shared_bytes: 1025, ..launch });
    assert!(error.contains("1025") && error.contains("1024"), "{error}");
}

#[test]
fn memory_is_given_back() {
    let device = device();
    device.reserve(100).expect("memory");
    let shared = device.shared.clone();
    assert_eq!(shared.api.state().pinned, 4);
    drop(device);
    assert_eq!(shared.api.state().pinned, 0);
}

#[test]
fn a_gigabyte_of_what_is_free_is_never_taken() {
    let info = info();
    assert_eq!(usable_bytes(&info, 0.5), Ok(40 << 30));
    assert_eq!(usable_bytes(&info, 1.0), Ok(78 << 30));
    let full = DeviceInfo { free_bytes: 1 << 30, ..info.clone() };
    assert!(matches!(usable_bytes(&full, 0.9), Err(DriverError::OutOfMemory { .. })));
    for fraction in [0.0, -1.0, 1.1, f64::NAN] {
        assert!(matches!(usable_bytes(&info, fraction), Err(DriverError::Unusable { .. })), "{fraction}");
    }
}
