//! Runs every target on every file of its corpus.

use kontor_fuzz::TARGETS;
use std::{fs, path::Path};

#[test]
fn every_corpus_replays() {
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut files = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            eprintln!("{}", path.display());
            target(&bytes);
            // What a fuzzer would try first: every prefix, and every byte changed.
            for cut in 0..bytes.len().min(600) {
                target(&bytes[..cut]);
                let mut changed = bytes.clone();
                changed[cut] ^= 0xff;
                target(&changed);
            }
            files += 1;
        }
        assert!(files > 0, "{} is empty", folder.display());
    }
}
