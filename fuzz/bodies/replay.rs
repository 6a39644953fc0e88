//! Runs a target's body over its committed corpus.

use std::path::Path;

/// Panics where a target would, and when there is no corpus.
pub(crate) fn replay(target: &str, run: impl Fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir).expect("the corpus").map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 10, "{} has {} files", dir.display(), files.len());
    for file in files {
        println!("{}", file.display());
        run(&std::fs::read(file).unwrap());
    }
}
