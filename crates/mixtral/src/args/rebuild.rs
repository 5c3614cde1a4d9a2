//! `mixtral build --from-engine DIR`: which other flags may be given with it, and what they become.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ArgMatches;
use clap::parser::ValueSource;
use mixtral_kernels::Arch;

use super::build::{BuildArgs, check_plugin};
use super::{Usage, usage};

/// Flags of `build` that may be given with `--from-engine`: they choose kernels, or say what is printed. All that other
/// flags could say is fixed by the engine.
const BESIDE: &[&str] = &[
    "from_engine",
    "arch",
    "gemm_plugin",
    "moe_plugin",
    "gpt_attention_plugin",
    "workers",
    "explain",
    "graph",
    "verbose",
    "quiet",
    "log_level",
];

/// The validated options.
#[derive(Debug)]
pub struct RebuildOptions {
    /// The engine.
    pub engine: PathBuf,
    /// The architectures to build for. If there are none, those that the engine was built for.
    pub archs: Vec<Arch>,
    /// Plugin flags that were given, by the names that an engine records them under.
    pub plugins: BTreeMap<String, String>,
    /// Ranks and kernels built at a time, if the user gave a number.
    pub workers: Option<usize>,
    /// Whether to print the program.
    pub explain: bool,
    /// Where to draw the program.
    pub graph: Option<PathBuf>,
}

/// The error for a command line with `--from-engine` and with flags that would make another engine; `None` if there are
/// no such flags.
pub fn contradiction(matches: &ArgMatches) -> Option<String> {
    let build = matches.subcommand_matches("build")?;
    let given = |id: &str| build.value_source(id) == Some(ValueSource::CommandLine);
    if !given("from_engine") {
        return None;
    }
    let other =
        build.ids().map(clap::Id::as_str).find(|id| !BESIDE.contains(id) && given(id) && !is_group(build, id))?;
    Some(format!(
        "--from-engine builds an engine again as it is, in its own directory: model, weights, layout and limits are the engine's, so --{} cannot stand beside it. Leave it out, or build from the checkpoint",
        other.replace('_', "-")
    ))
}

/// Whether an id names a group of flags. Clap lists groups together with the flags.
fn is_group(matches: &ArgMatches, id: &str) -> bool {
    matches.try_get_raw(id).is_err()
}

impl BuildArgs {
    /// The options of `--from-engine`, if it was given.
    pub fn rebuild(&self) -> Result<Option<RebuildOptions>, Usage> {
        let Some(engine) = self.from_engine.clone() else { return Ok(None) };
        let mut plugins = BTreeMap::new();
        for (flag, value) in self.plugins() {
            let Some(value) = value else { continue };
            if check_plugin(flag, value)?.is_some() {
                usage!(
                    "--{} {value} beside --from-engine: the engine keeps its data type; expected auto or disable",
                    flag.replace('_', "-")
                );
            }
            plugins.insert(flag.to_owned(), value.clone());
        }
        Ok(Some(RebuildOptions {
            engine,
            archs: self.arch.clone(),
            plugins,
            workers: self.workers,
            explain: self.explain,
            graph: self.graph.clone(),
        }))
    }
}
