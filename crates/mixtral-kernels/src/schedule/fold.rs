//! Folds layers that are alike: writes a run of works once, with how often it repeats and by how much indices grow each
//! time.

use serde::{Deserialize, Serialize};

use crate::{Arg, Work};

/// How works repeat the works before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Repeat {
    /// How many works repeat: the last ones before this record.
    pub(super) works: usize,
    /// How often they repeat.
    pub(super) times: usize,
    /// What each repetition adds to an operation's index,
    pub(super) ops: usize,
    /// to a buffer's,
    pub(super) buffers: usize,
    /// to a weight's,
    pub(super) weights: usize,
    /// to a layer's,
    pub(super) layers: usize,
    /// and to the collectives before it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) collectives: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// Works, and how they repeat, if they do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    pub(super) works: &'a [Work],
    pub(super) repeat: Option<Repeat>,
}

/// The most works of a layer.
const MAX_PERIOD: usize = 64;

/// Cuts works into runs.
pub(super) fn fold(works: &[Work]) -> Vec<Run<'_>> {
    let (mut runs, mut rest, mut plain) = (Vec::new(), works, 0);
    while plain < rest.len() {
        let repeats = (1..=MAX_PERIOD).filter_map(|period| repeat(&rest[plain..], period));
        // Takes the repeat that saves the most lines. If several save as many, takes the shortest.
        let saves = |repeat: &Repeat| repeat.works * repeat.times;
        let best = repeats.reduce(|best, other| if saves(&other) > saves(&best) { other } else { best });
        let Some(best) = best else {
            plain += 1;
            continue;
        };
        if plain > 0 {
            runs.push(Run { works: &rest[..plain], repeat: None });
        }
        runs.push(Run { works: &rest[plain..plain + best.works], repeat: Some(best) });
        rest = &rest[plain + best.works * (1 + best.times)..];
        plain = 0;
    }
    if !rest.is_empty() {
        runs.push(Run { works: rest, repeat: None });
    }
    runs
}

/// How the first `period` works repeat right behind themselves, if they do.
fn repeat(works: &[Work], period: usize) -> Option<Repeat> {
    let first = works.get(..period)?;
    let second = works.get(period..2 * period)?;
    let mut found = Repeat {
        works: period,
        times: 0,
        ops: second[0].op().checked_sub(first[0].op())?,
        buffers: 0,
        weights: 0,
        layers: 0,
        collectives: 0,
    };
    let pairs = || first.iter().zip(second).flat_map(|(a, b)| a.args().into_iter().zip(b.args()));
    let grown = |of: fn(&Arg) -> Option<usize>| {
        let differences = pairs().filter_map(|(a, b)| of(b)?.checked_sub(of(a)?));
        differences.max().unwrap_or(0)
    };
    found.buffers = grown(|arg| if let Arg::Buffer(index) = arg { Some(*index) } else { None });
    found.weights = grown(|arg| if let Arg::Weight { index, .. } = arg { Some(*index) } else { None });
    found.layers = grown(layer);
    found.collectives = grown(|arg| if let Arg::Ordinal(before) = arg { Some(*before) } else { None });
    let blocks = works[period..].chunks_exact(period).enumerate();
    found.times = blocks
        .take_while(|(i, block)| (0..period).all(|w| found.again(&first[w], i + 1).as_ref() == Some(&block[w])))
        .count();
    (found.times > 0).then_some(found)
}

fn layer(arg: &Arg) -> Option<usize> {
    match arg {
        Arg::Keys(layer)
        | Arg::Values(layer)
        | Arg::ExpertCounts(layer)
        | Arg::KeyScale { layer, .. }
        | Arg::ValueScale(layer) => Some(*layer),
        _ => None,
    }
}

impl Repeat {
    /// The work in its `time`-th repetition; `None` if an index grows too large.
    pub(super) fn again(&self, work: &Work, time: usize) -> Option<Work> {
        let grown = |index: usize, by: usize| index.checked_add(by.checked_mul(time)?);
        let mut work = work.clone();
        work.set_op(grown(work.op(), self.ops)?);
        for arg in work.args_mut() {
            match arg {
                Arg::Buffer(index) => *index = grown(*index, self.buffers)?,
                Arg::Weight { index, .. } => *index = grown(*index, self.weights)?,
                Arg::Keys(layer)
                | Arg::Values(layer)
                | Arg::ExpertCounts(layer)
                | Arg::KeyScale { layer, .. }
                | Arg::ValueScale(layer) => *layer = grown(*layer, self.layers)?,
                Arg::Ordinal(before) => *before = grown(*before, self.collectives)?,
                _ => {}
            }
        }
        Some(work)
    }
}
