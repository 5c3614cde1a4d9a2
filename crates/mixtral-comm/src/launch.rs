//! Finds out from the launcher's environment variables whether this process is alone or one rank of many.

use std::fmt::{self, Display};

/// How the ranks of this job are started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// All ranks are threads of this process: there is no launcher, or it started a single process.
    Threads,
    /// A launcher started one process for each rank, and this is one of them.
    Process(Process),
}

/// One process of a launched job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// This process's rank.
    pub rank: usize,
    /// Number of processes, at least 2.
    pub world_size: usize,
    /// This process's place among those of its host, if the launcher tells.
    pub local_rank: Option<usize>,
    /// How many processes are on this host, if the launcher tells.
    pub local_size: Option<usize>,
    /// Where these values come from.
    pub source: Source,
    /// A name that distinguishes this job from the user's other jobs on this host. Without one, the parent process's id
    /// is used.
    pub job: Option<String>,
    /// Where the ranks meet.
    pub meeting: Meeting,
}

/// Where the ranks of a job meet.
#[derive(Clone, PartialEq, Eq)]
pub enum Meeting {
    /// All ranks are on this host. Rank 0 publishes a port and a secret in a file that only its user can read.
    File,
    /// The ranks are on several hosts. Rank 0 listens at `MASTER_ADDR:MASTER_PORT`.
    Address {
        /// `MASTER_ADDR`: a name or address of rank 0's host.
        host: String,
        /// `MASTER_PORT`.
        port: u16,
        /// `MIXTRAL_SECRET`: a text that every rank knows and no stranger does.
        secret: String,
    },
}

impl fmt::Debug for Meeting {
    /// Prints everything but the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => write!(f, "File"),
            Self::Address { host, port, .. } => write!(f, "Address({host}:{port})"),
        }
    }
}

/// The launchers that are known, in the order in which their variables are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Open MPI's `OMPI_COMM_WORLD_*`.
    OpenMpi,
    /// `PMI_RANK` or `PMIX_RANK`, and `PMI_SIZE`: MPICH and launchers derived from it.
    Pmi,
    /// `RANK` and `WORLD_SIZE`, set by torchrun or by hand.
    Rank,
    /// `SLURM_*`, inside a step of several tasks.
    Slurm,
}

impl Source {
    /// Its name, for messages.
    fn name(self) -> &'static str {
        match self {
            Self::OpenMpi => "Open MPI",
            Self::Pmi => "PMI",
            Self::Rank => "RANK and WORLD_SIZE",
            Self::Slurm => "Slurm",
        }
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An environment from which a process cannot tell whether it is alone or one of many.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Only one variable of a pair is set.
    #[error(
        "{set} is set but {missing} is not; set both (every rank its own), or neither to run all ranks in one process"
    )]
    HalfSet {
        /// The one that is set.
        set: &'static str,
        /// The one that is not.
        missing: &'static str,
    },
    /// A variable that should be a number.
    #[error("{name} is {value:?}, which is not {expected}")]
    NotANumber {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A rank that is not below the world's size.
    #[error("{rank_name} is {rank}, but {size_name} is {size}; ranks go from 0 to {size_name} - 1")]
    RankOutOfRange {
        /// The rank's variable.
        rank_name: &'static str,
        /// Its value.
        rank: usize,
        /// The size's variable.
        size_name: &'static str,
        /// Its value.
        size: usize,
    },
    /// More processes than a job may have.
    #[error("{name} is {size}; more than {MAX_WORLD_SIZE} ranks are not supported")]
    TooManyRanks {
        /// The size's variable.
        name: &'static str,
        /// Its value.
        size: usize,
    },
    /// The ranks are on several hosts and have no address to meet at.
    #[error(
        "{source_name} started {world_size} ranks on several hosts ({local_size} on this one), and {missing} is not set. \
         Set on every rank: MASTER_ADDR to an address of rank 0's host, MASTER_PORT to a free port there, and \
         MIXTRAL_SECRET to the same secret text (mpirun: -x MASTER_ADDR=… -x MASTER_PORT=29500 -x MIXTRAL_SECRET=…)"
    )]
    NoMeeting {
        /// The launcher.
        source_name: &'static str,
        /// All ranks.
        world_size: usize,
        /// "1", or "unknown".
        local_size: String,
        /// The variable.
        missing: &'static str,
    },
}

/// The most ranks of a job.
pub const MAX_WORLD_SIZE: usize = 4096;

/// The environment as a function, so that tests can replace it.
type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Launch {
    /// Reads the launcher's variables from the environment. It looks for those of Open MPI first, then PMI, then RANK
    /// and WORLD_SIZE, then Slurm. Slurm's count only inside a step of several tasks, because in an allocation they are
    /// also set for a single process. Empty variables count as unset. A world of one rank is [`Launch::Threads`].
    ///
    /// On one host, ranks need no help to meet. Ranks count as being on several hosts if the launcher tells that fewer
    /// ranks are on this host than there are. If it does not tell, they do so if `MASTER_ADDR` names anything but the
    /// loopback. On several hosts `MASTER_ADDR`, `MASTER_PORT` and `MIXTRAL_SECRET` are required.
    pub fn detect(env: &dyn Fn(&str) -> Option<String>) -> Result<Self, LaunchError> {
        let env: Env<'_> = &|name| env(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        for ask in [open_mpi, pmi, rank_and_world_size, slurm] {
            if let Some(found) = ask(env)? {
                return found.launch(env);
            }
        }
        Ok(Self::Threads)
    }
}

/// What one launcher's variables say.
struct Found {
    source: Source,
    rank_name: &'static str,
    rank: usize,
    size_name: &'static str,
    size: usize,
    local_rank: Option<usize>,
    local_size: Option<usize>,
    job: Option<String>,
}

impl Found {
    fn launch(self, env: Env<'_>) -> Result<Launch, LaunchError> {
        let Self { source, rank_name, rank, size_name, size, local_rank, local_size, job } = self;
        if size == 0 || rank >= size {
            return Err(LaunchError::RankOutOfRange { rank_name, rank, size_name, size });
        }
        if size > MAX_WORLD_SIZE {
            return Err(LaunchError::TooManyRanks { name: size_name, size });
        }
        if size == 1 {
            return Ok(Launch::Threads);
        }
        let meeting = meeting(env, source, size, local_size)?;
        let job = job.or_else(|| env("MASTER_PORT").map(|port| format!("port-{port}")));
        Ok(Launch::Process(Process { rank, world_size: size, local_rank, local_size, source, job, meeting }))
    }
}

fn open_mpi(env: Env<'_>) -> Result<Option<Found>, LaunchError> {
    let found = pair(env, Source::OpenMpi, &["OMPI_COMM_WORLD_RANK"], "OMPI_COMM_WORLD_SIZE")?;
    let Some(found) = found else { return Ok(None) };
    Ok(Some(Found {
        local_rank: number(env, "OMPI_COMM_WORLD_LOCAL_RANK")?,
        local_size: number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")?,
        job: first(env, &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"]),
        ..found
    }))
}

fn pmi(env: Env<'_>) -> Result<Option<Found>, LaunchError> {
    // PMIx sets a rank without a size. Its rank then does not count, and another launcher's variables tell both.
    let names: &[&'static str] = if env("PMI_SIZE").is_some() { &["PMI_RANK", "PMIX_RANK"] } else { &["PMI_RANK"] };
    let Some(found) = pair(env, Source::Pmi, names, "PMI_SIZE")? else { return Ok(None) };
    Ok(Some(Found {
        local_rank: number(env, "MPI_LOCALRANKID")?,
        local_size: number(env, "MPI_LOCALNRANKS")?,
        job: first(env, &["PMIX_NAMESPACE", "PMI_JOBID"]).or_else(|| slurm_job(env)),
        ..found
    }))
}

fn rank_and_world_size(env: Env<'_>) -> Result<Option<Found>, LaunchError> {
    let Some(found) = pair(env, Source::Rank, &["RANK"], "WORLD_SIZE")? else { return Ok(None) };
    let local_rank = number(env, "LOCAL_RANK")?;
    Ok(Some(Found { local_rank, local_size: number(env, "LOCAL_WORLD_SIZE")?, ..found }))
}

fn slurm(env: Env<'_>) -> Result<Option<Found>, LaunchError> {
    if number(env, "SLURM_STEP_NUM_TASKS")?.unwrap_or(1) <= 1 {
        return Ok(None);
    }
    let Some(found) = pair(env, Source::Slurm, &["SLURM_PROCID"], "SLURM_STEP_NUM_TASKS")? else { return Ok(None) };
    let local_size = match (env("SLURM_STEP_TASKS_PER_NODE"), number(env, "SLURM_NODEID")?) {
        (Some(value), Some(node)) => Some(tasks_on_node(&value, node).ok_or(LaunchError::NotANumber {
            name: "SLURM_STEP_TASKS_PER_NODE",
            value,
            expected: "a list of numbers of tasks, such as 4(x2),3, that reaches to SLURM_NODEID",
        })?),
        _ => None,
    };
    Ok(Some(Found { local_rank: number(env, "SLURM_LOCALID")?, local_size, job: slurm_job(env), ..found }))
}

fn slurm_job(env: Env<'_>) -> Option<String> {
    let step = env("SLURM_STEP_ID").unwrap_or_default();
    env("SLURM_JOB_ID").map(|job| format!("slurm-{job}.{step}"))
}

/// The tasks on a node, from Slurm's run-length list of tasks per node: "4(x2),3" is 4, 4, 3.
fn tasks_on_node(list: &str, node: usize) -> Option<usize> {
    let mut nodes = 0usize;
    for part in list.split(',') {
        let (tasks, repeats) = match part.split_once("(x") {
            Some((tasks, repeats)) => (tasks, repeats.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        nodes = nodes.checked_add(repeats)?;
        if node < nodes {
            return tasks.parse().ok();
        }
    }
    None
}

fn first(env: Env<'_>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| env(name))
}

fn number(env: Env<'_>, name: &'static str) -> Result<Option<usize>, LaunchError> {
    let Some(value) = env(name) else { return Ok(None) };
    match value.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(LaunchError::NotANumber { name, value, expected: "a number of ranks or a rank" }),
    }
}

/// A rank (from the first of its names that is set) and a world's size. Both are set, or neither.
fn pair(
    env: Env<'_>,
    source: Source,
    rank_names: &[&'static str],
    size_name: &'static str,
) -> Result<Option<Found>, LaunchError> {
    let rank_name = rank_names.iter().copied().find(|name| env(name).is_some()).unwrap_or(rank_names[0]);
    match (number(env, rank_name)?, number(env, size_name)?) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(LaunchError::HalfSet { set: rank_name, missing: size_name }),
        (None, Some(_)) => Err(LaunchError::HalfSet { set: size_name, missing: rank_name }),
        (Some(rank), Some(size)) => {
            Ok(Some(Found { source, rank_name, rank, size_name, size, local_rank: None, local_size: None, job: None }))
        }
    }
}

fn meeting(env: Env<'_>, source: Source, size: usize, local_size: Option<usize>) -> Result<Meeting, LaunchError> {
    let address = env("MASTER_ADDR");
    let one_host = match local_size {
        Some(local) => local >= size,
        None => address.as_deref().is_none_or(is_loopback),
    };
    if one_host {
        return Ok(Meeting::File);
    }
    let missing = |missing| LaunchError::NoMeeting {
        source_name: source.name(),
        world_size: size,
        local_size: local_size.map_or("unknown".to_owned(), |local| local.to_string()),
        missing,
    };
    let host = address.ok_or_else(|| missing("MASTER_ADDR"))?;
    let port = env("MASTER_PORT").ok_or_else(|| missing("MASTER_PORT"))?;
    let Some(port) = port.parse().ok().filter(|port| *port != 0) else {
        return Err(LaunchError::NotANumber { name: "MASTER_PORT", value: port, expected: "a port from 1 to 65535" });
    };
    let secret = env("MIXTRAL_SECRET").ok_or_else(|| missing("MIXTRAL_SECRET"))?;
    Ok(Meeting::Address { host, port, secret })
}

fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(set: &[(&str, &str)]) -> Result<Launch, LaunchError> {
        Launch::detect(&|name| set.iter().find(|(set, _)| *set == name).map(|(_, value)| (*value).to_owned()))
    }

    fn process(set: &[(&str, &str)]) -> Process {
        match detect(set) {
            Ok(Launch::Process(process)) => process,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_a_launcher_or_in_a_world_of_one_ranks_are_threads() {
        assert_eq!(detect(&[]), Ok(Launch::Threads));
        assert_eq!(detect(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(Launch::Threads));
        assert_eq!(detect(&[("RANK", ""), ("WORLD_SIZE", "")]), Ok(Launch::Threads));
        assert_eq!(detect(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]), Ok(Launch::Threads));
        // An allocation without a step, and a step of one task.
        assert_eq!(detect(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), Ok(Launch::Threads));
        assert_eq!(detect(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]), Ok(Launch::Threads));
        // PMIx's rank without a size does not count.
        assert_eq!(detect(&[("PMIX_RANK", "0")]), Ok(Launch::Threads));
    }

    #[test]
    fn launchers_are_asked_in_order() {
        let all = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "prterun-7@1"),
            ("PMI_RANK", "2"),
            ("PMI_SIZE", "3"),
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "3"),
            ("SLURM_PROCID", "4"),
            ("SLURM_STEP_NUM_TASKS", "5"),
            ("SLURM_STEP_TASKS_PER_NODE", "5"),
            ("SLURM_NODEID", "0"),
            ("SLURM_LOCALID", "4"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_ID", "2"),
        ];
        let expected = [
            (Source::OpenMpi, 1, 2, Some(1), Some(2), Some("prterun-7@1")),
            (Source::Pmi, 2, 3, None, None, Some("prterun-7@1")),
            (Source::Rank, 3, 4, Some(3), None, None),
            (Source::Slurm, 4, 5, Some(4), Some(5), Some("slurm-77.2")),
        ];
        let starts = [0, 4, 7, 10];
        for ((source, rank, world_size, local_rank, local_size, job), start) in expected.into_iter().zip(starts) {
            let found = process(&all[start..]);
            assert_eq!(found.source, source);
            assert_eq!((found.rank, found.world_size), (rank, world_size));
            assert_eq!((found.local_rank, found.local_size), (local_rank, local_size));
            assert_eq!(found.job.as_deref(), job);
            assert_eq!(found.meeting, Meeting::File);
        }
    }

    #[test]
    fn half_set_and_senseless_variables_are_named() {
        let message = |set: &[(&str, &str)]| detect(set).unwrap_err().to_string();
        assert_eq!(
            message(&[("RANK", "1")]),
            "RANK is set but WORLD_SIZE is not; set both (every rank its own), or neither to run all ranks in one process"
        );
        assert!(
            message(&[("OMPI_COMM_WORLD_SIZE", "2")])
                .starts_with("OMPI_COMM_WORLD_SIZE is set but OMPI_COMM_WORLD_RANK")
        );
        assert!(message(&[("PMI_SIZE", "2")]).starts_with("PMI_SIZE is set but PMI_RANK is not"));
        assert_eq!(
            message(&[("RANK", "one"), ("WORLD_SIZE", "2")]),
            "RANK is \"one\", which is not a number of ranks or a rank"
        );
        assert_eq!(
            message(&[("RANK", "2"), ("WORLD_SIZE", "2")]),
            "RANK is 2, but WORLD_SIZE is 2; ranks go from 0 to WORLD_SIZE - 1"
        );
        assert!(message(&[("RANK", "0"), ("WORLD_SIZE", "-1")]).contains("WORLD_SIZE is \"-1\""));
        assert!(message(&[("RANK", "0"), ("WORLD_SIZE", "0")]).contains("WORLD_SIZE is 0"));
        assert!(message(&[("RANK", "0"), ("WORLD_SIZE", "5000")]).contains("more than 4096"));
    }

    #[test]
    fn several_hosts_need_an_address_a_port_and_a_secret() {
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let message = detect(&mpi).unwrap_err().to_string();
        assert_eq!(
            message,
            "Open MPI started 4 ranks on several hosts (2 on this one), and MASTER_ADDR is not set. Set on every rank: \
             MASTER_ADDR to an address of rank 0's host, MASTER_PORT to a free port there, and MIXTRAL_SECRET to the same \
             secret text (mpirun: -x MASTER_ADDR=… -x MASTER_PORT=29500 -x MIXTRAL_SECRET=…)"
        );
        let with = |more: &[(&'static str, &'static str)]| [&mpi, more].concat();
        let missing = |more: &[(&'static str, &'static str)]| match detect(&with(more)) {
            Err(LaunchError::NoMeeting { missing, .. }) => missing,
            other => panic!("{other:?}"),
        };
        assert_eq!(missing(&[("MASTER_ADDR", "10.0.0.1")]), "MASTER_PORT");
        assert_eq!(missing(&[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")]), "MIXTRAL_SECRET");
        let all = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), ("MIXTRAL_SECRET", "hush")];
        let found = process(&with(&all));
        assert_eq!(
            found.meeting,
            Meeting::Address { host: "10.0.0.1".to_owned(), port: 29500, secret: "hush".to_owned() }
        );
        assert!(!format!("{found:?}").contains("hush"));
        let port = detect(&with(&[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "0"), ("MIXTRAL_SECRET", "hush")]));
        assert_eq!(port.unwrap_err().to_string(), "MASTER_PORT is \"0\", which is not a port from 1 to 65535");
    }

    #[test]
    fn a_master_address_decides_where_the_launcher_is_silent() {
        let by_hand = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "29500"), ("MIXTRAL_SECRET", "hush")];
        let meeting = |more: &[(&'static str, &'static str)]| process(&[&by_hand, more].concat()).meeting;
        assert_eq!(meeting(&[]), Meeting::File);
        assert_eq!(meeting(&[("MASTER_ADDR", "localhost")]), Meeting::File);
        assert_eq!(meeting(&[("MASTER_ADDR", "127.0.0.1")]), Meeting::File);
        assert_eq!(meeting(&[("MASTER_ADDR", "node1"), ("LOCAL_WORLD_SIZE", "2")]), Meeting::File);
        assert!(matches!(meeting(&[("MASTER_ADDR", "node1")]), Meeting::Address { .. }));
        assert!(matches!(meeting(&[("MASTER_ADDR", "127.0.0.1"), ("LOCAL_WORLD_SIZE", "1")]), Meeting::Address { .. }));
        assert_eq!(process(&by_hand).job.as_deref(), Some("port-29500"));
    }

    #[test]
    fn slurms_tasks_per_node() {
        let tasks: Vec<_> = (0..4).map(|node| tasks_on_node("4(x2),3", node)).collect();
        assert_eq!(tasks, [Some(4), Some(4), Some(3), None]);
        for bad in ["", "x", "4(x", "4(x2", "4(xx),1", "(x2)"] {
            assert_eq!(tasks_on_node(bad, 0), None, "{bad}");
        }
        assert_eq!(tasks_on_node("1(x18446744073709551615),1", 18_446_744_073_709_551_615), None);
    }
}
