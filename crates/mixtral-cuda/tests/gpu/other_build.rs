//! Stands for another build of `mixtral`, whose embedding kernel takes other parameters. It has no parameters for the
//! table's first row and number of rows, since a model on one rank does without them, and its output comes before the
//! table. (Commit 6ae7410 made such a change to `decode_paged`: engines from before it passed one parameter too many.)

use mixtral_kernels::{Schedule, Sources, Work};

const HEADER: &str = "embed/embed.cuh";

/// Texts of the header, each with the text that replaces it.
const CHANGES: [(&str, &str); 3] = [
    ("const W* table, i32 vocab_start,\n          i32 num_rows, T* out) {", "T* out, const W* table) {"),
    ("id - vocab_start;", "id;"),
    ("row >= 0 && row < num_rows;", "row >= 0;"),
];

/// Its kernels.
pub(crate) fn sources() -> Sources {
    let sources = Sources::embedded();
    let headers = sources.reached(HEADER).expect("it is embedded");
    let (_, text) = headers.into_iter().find(|(name, _)| *name == HEADER).expect("a header reaches itself");
    let changed = CHANGES.iter().fold(text.to_owned(), |text, (from, to)| {
        assert_eq!(text.matches(from).count(), 1, "`{from}` is in {HEADER} once");
        text.replace(from, to)
    });
    sources.with(HEADER, changed.leak())
}

/// A schedule as that build would lower it.
pub(crate) fn lowered(mut schedule: Schedule) -> Schedule {
    let mut changed = 0;
    for work in schedule.regimes.iter_mut().flat_map(|(_, works)| works) {
        if let Work::Launch(launch) = work
            && launch.kernel.symbol.starts_with("embed::embed<")
        {
            launch.args.retain(|named| !matches!(&*named.name, "vocab_start" | "num_rows"));
            launch.args.swap(3, 4);
            changed += 1;
        }
    }
    assert!(changed > 0, "no embedding is launched");
    schedule
}
