//! Files in memory without reading them: the one place with `unsafe`. Knows no format.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use r1_backend::HostBytes;

/// A file mapped read-only.
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps a regular file (symbolic links are followed, as the Hugging Face cache needs).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Before opening: opening a named pipe would wait for a writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the mapping is private to this value, read-only, and lives as long as every slice of it. That
        // nobody truncates or rewrites a checkpoint while it is served is a condition of use, as with every program
        // that maps weights: a file cut short under the mapping raises SIGBUS, rewritten bytes change the weights.
        let map = unsafe { Mmap::map(&file)? };
        // Weights are read whole and often: file systems that keep large folios then read and map them in huge pages. Others
        // refuse the advice, and nothing changes.
        #[cfg(target_os = "linux")]
        let _refused = map.advise(memmap2::Advice::HugePage);
        Ok(Self(map))
    }
}

impl HostBytes for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads the pages of `range` and maps them, where the system does that when told to (Linux from 5.14 on).
    fn will_read(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            let start = range.start / page_size() * page_size();
            let end = range.end.min(self.0.len());
            if start < end {
                // SAFETY: `start..end` lies inside the mapping, and `start` is a multiple of the page size. The call reads pages and
                // changes no content. One that is refused, or fails as reading would, leaves the pages to their first reader.
                unsafe {
                    let at = self.0.as_ptr().add(start).cast_mut().cast();
                    libc::madvise(at, end - start, libc::MADV_POPULATE_READ);
                }
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Releases the whole pages inside `range`; a later read faults them in again from the file.
    fn discard(&self, range: Range<usize>) {
        let page = page_size();
        let start = range.start.next_multiple_of(page);
        let end = range.end.min(self.0.len()) / page * page;
        if start >= end {
            return;
        }
        // SAFETY: `start..end` lies inside the mapping, which starts on a page, and both are multiples of the page
        // size. On a read-only file mapping MADV_DONTNEED loses no data: the next access reads the file again, so
        // slices that are alive keep their contents.
        let status = unsafe {
            let at = self.0.as_ptr().add(start).cast_mut().cast();
            libc::madvise(at, end - start, libc::MADV_DONTNEED)
        };
        // Advice that is not taken costs memory and nothing else; aligned arguments inside a mapping are not refused.
        debug_assert_eq!(status, 0, "madvise: {}", io::Error::last_os_error());
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system and has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|s| s.is_power_of_two()).expect("the page size is a power of two")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_bytes_read_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        let bytes: Vec<u8> = (0..5 * page_size() + 17).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Mapping::open(&path).unwrap();
        assert_eq!(map.bytes(), bytes);
        for range in [0..bytes.len(), 1..2, 0..0, 100..2 * page_size(), page_size()..usize::MAX] {
            map.discard(range);
            assert_eq!(map.bytes(), bytes);
        }
    }

    #[test]
    fn what_will_be_read_reads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        let bytes: Vec<u8> = (0..9 * page_size() + 17).map(|i| (i % 253) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Mapping::open(&path).unwrap();
        for range in [0..bytes.len(), 1..2, 0..0, 100..2 * page_size(), page_size()..usize::MAX] {
            map.discard(0..bytes.len());
            map.will_read(range);
            assert_eq!(map.bytes(), bytes);
        }
    }

    /// Counts pages of the mapping in memory, as the kernel reports them.
    #[cfg(target_os = "linux")]
    #[test]
    fn discard_releases_whole_pages_inside_the_range_only() {
        let resident = |map: &Mapping| -> usize {
            let at = map.bytes().as_ptr() as usize;
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut lines = smaps.lines().skip_while(|l| !l.starts_with(&format!("{at:x}-")));
            let rss = lines.find_map(|l| l.strip_prefix("Rss:")).expect("the mapping is listed");
            rss.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() * 1024
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        std::fs::write(&path, vec![1; 64 * page_size()]).unwrap();
        let map = Mapping::open(&path).unwrap();
        assert_eq!(map.bytes().iter().map(|&b| b as usize).sum::<usize>(), 64 * page_size());
        assert_eq!(resident(&map), 64 * page_size());
        map.discard(1..63 * page_size() + 1);
        assert_eq!(
            resident(&map),
            2 * page_size(),
            "the first and the last page are shared with other tensors"
        );
    }

    #[test]
    fn only_regular_files_are_mapped() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Mapping::open(dir.path()).is_err());
        assert!(Mapping::open(&dir.path().join("absent")).is_err());
        std::fs::write(dir.path().join("file"), b"abc").unwrap();
        std::os::unix::fs::symlink(dir.path().join("file"), dir.path().join("link")).unwrap();
        assert_eq!(Mapping::open(&dir.path().join("link")).unwrap().bytes(), b"abc");
    }
}
