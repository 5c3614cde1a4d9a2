//! Another build of `mixtral`, as far as engines can tell: one whose embedding kernel takes other parameters. A table's first row and
//! its rows are no parameters there, which a model on one rank does without, and the output comes before the table. (Commit 6ae7410
//! was such a build for `decode_paged`: engines from before it passed one parameter too many.)

use mixtral_kernels::{Schedule, Sources, Work};

const HEADER: &str = "embed/embed.cuh";

/// What is replaced in the header, and by what.
const CHANGES: [(&str, &str); 3] = [
    (
        "const i32* token_ids, const W* table, i32 vocab_start, i32 num_rows, T* out) {",
        "const i32* token_ids, T* out, const W* table) {",
    ),
    ("token_ids[token] - vocab_start;", "token_ids[token];"),
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
            launch.args.swap(2, 3);
            changed += 1;
        }
    }
    assert!(changed > 0, "no embedding is launched");
    schedule
}
