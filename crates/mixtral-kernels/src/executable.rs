//! What a device runs for a rank: a schedule and the kernels that it launches, read from an engine.

use std::path::PathBuf;

use mixtral_engine::{EngineDir, EngineError, Program};
use mixtral_model::Rank;

use crate::compile::Code;
use crate::{Family, ImagesError, KernelImages, Schedule, ScheduleError};

/// A schedule and its kernels, all compiled to the same kind of code.
#[derive(Clone, Debug, PartialEq)]
pub struct Executable {
    /// What is launched.
    pub schedule: Schedule,
    /// The kernels.
    pub images: KernelImages,
}

/// An engine that a GPU cannot run as it is.
#[derive(Debug, thiserror::Error)]
pub enum ExecutableError {
    /// The engine cannot be read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Its kernels cannot be read.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// An engine of a version that stored no schedules.
    #[error(
        "{dir} has kernels for {code}, but does not say how they are launched: mixtral {version} built it, and stored no schedule; build its kernels again with `mixtral build --from-engine {dir}`, or run it with --backend cpu"
    )]
    NoSchedule {
        /// The engine.
        dir: PathBuf,
        /// The kernels.
        code: Code,
        /// The version that built it.
        version: String,
    },
    /// A schedule that this version cannot carry out.
    #[error(
        "{dir} cannot run on a GPU with this version of mixtral: {source}; build its kernels again with `mixtral build --from-engine {dir}`, or run it with --backend cpu"
    )]
    Schedule {
        /// The engine.
        dir: PathBuf,
        /// What is wrong with it.
        source: ScheduleError,
    },
}

impl Family {
    /// The name of the image that holds a family's schedule.
    #[must_use]
    pub fn schedule_name(self) -> &'static str {
        match self {
            Family::Portable => "schedule.portable",
            Family::Hopper => "schedule.hopper",
        }
    }
}

impl Executable {
    /// Reads the schedule and kernels that an engine holds for `code`, and checks them against the rank's whole
    /// program.
    ///
    /// # Errors
    /// An engine that is damaged, or whose schedule this version cannot carry out.
    pub fn read(engine: &EngineDir, rank: Rank, program: &Program, code: Code) -> Result<Self, ExecutableError> {
        let dir = || engine.dir().to_owned();
        let name = code.family().schedule_name();
        if !engine.images(rank)?.contains(&name) {
            return Err(ExecutableError::NoSchedule {
                dir: dir(),
                code,
                version: engine.config().tool_version.clone(),
            });
        }
        let text = engine.image(rank, name)?;
        let schedule = Schedule::parse(&String::from_utf8_lossy(&text), program);
        let schedule = schedule.map_err(|source| ExecutableError::Schedule { dir: dir(), source })?;
        let images = KernelImages::from_bytes(code, &engine.image(rank, &code.image_name())?)?;
        Ok(Executable { schedule, images })
    }
}
