//! Reads the committed corpora once more. Fuzzing found each of their inputs because it reaches code that no other
//! input reaches.

use std::fs;
use std::path::Path;

use fuzz::READERS;

#[test]
fn no_reader_panics_on_its_corpus() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut folders: Vec<_> = fs::read_dir(&corpora).unwrap().map(|e| e.unwrap().file_name()).collect();
    folders.sort();
    let mut names: Vec<_> = READERS.iter().map(|reader| reader.name).collect();
    names.sort_unstable();
    assert_eq!(folders, names, "a corpus a reader");
    for reader in READERS {
        let mut inputs = 0;
        for entry in fs::read_dir(corpora.join(reader.name)).unwrap() {
            let path = entry.unwrap().path();
            // If the test fails, its output is shown, and the last line is the file that made it fail.
            println!("{}", path.display());
            (reader.read)(&fs::read(path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{} has an empty corpus", reader.name);
    }
}
