//! `mixtral build --from-engine DIR`: which flags may stand beside it, and what they become.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ArgMatches;
use clap::parser::ValueSource;
use mixtral_kernels::Arch;

use super::build::{BuildArgs, check_plugin};
use super::{Usage, usage};

/// Flags of `build` that choose kernels or say what was built; all others are the engine's own.
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

/// Validated.
#[derive(Debug)]
pub struct RebuildOptions {
    /// The engine.
    pub engine: PathBuf,
    /// Architectures, if they are not to be those that the engine was built for.
    pub archs: Vec<Arch>,
    /// Plugin flags that were given, by the names that an engine records them under.
    pub plugins: BTreeMap<String, String>,
    /// Ranks and kernels built at a time, if that was asked for.
    pub workers: Option<usize>,
    /// Whether to print the program.
    pub explain: bool,
    /// Where to draw it.
    pub graph: Option<PathBuf>,
}

/// Why a command line with `--from-engine` cannot be followed: it has flags that would make another engine.
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

/// Whether an id names a group of flags, which clap lists beside them.
fn is_group(matches: &ArgMatches, id: &str) -> bool {
    matches.try_get_raw(id).is_err()
}

impl BuildArgs {
    /// What `--from-engine` asks for, if it was given.
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
