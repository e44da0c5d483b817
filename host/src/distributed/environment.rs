//! Which of how many processes this one is, as the launcher's variables tell it.
//!
//! | launcher | variables |
//! |---|---|
//! | `torchrun`, `moeut-host launch` | `RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT`; `TORCHELASTIC_USE_AGENT_STORE`, `TORCHELASTIC_RESTART_COUNT` |
//! | SLURM (`srun`) | `SLURM_PROCID SLURM_NPROCS SLURM_LOCALID SLURM_STEP_NODELIST` or `SLURM_JOB_NODELIST`; `SLURM_STEP_GPUS SLURM_JOB_ID`; `MASTER_ADDR`, `MASTER_PORT` win |
//!
//! torchrun's variables win: `srun torchrun …` starts one launcher on each host, and SLURM counts those. Only a step of
//! `srun` counts as SLURM's: the script of a batch job sees its variables, too, and is one process. One process alone is
//! not distributed.
//!
//! Source: reference `framework/helpers/distributed.py`, which looks at SLURM first.

use super::group::HOW_TO_START;
use moeut_plugin_api::PluginError;
use std::fmt;

/// Port of the first process under SLURM, as in the reference; the number of the job's first GPU is added.
const SLURM_PORT: u16 = 12345;
/// Of jobs without GPUs, several of which may share a host: the job's number decides.
const SLURM_CPU_PORTS: std::ops::Range<u16> = 20_000..30_000;

/// Who started the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// `torchrun`, or `moeut-host launch`, which speaks the same language.
    Torchrun,
    /// `srun`.
    Slurm,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torchrun => "torchrun",
            Self::Slurm => "SLURM",
        })
    }
}

/// One of several processes that train together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// Who started it.
    pub launcher: Launcher,
    /// Which one this is, from 0 on.
    pub rank: usize,
    /// How many there are; at least 2.
    pub n_ranks: usize,
    /// Which one on its host.
    pub local_rank: usize,
    /// Where the store is.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The launcher keeps the store; else the first process does.
    pub has_agent_store: bool,
    /// How often the launcher has started all processes again; a store that outlives them has the keys of all.
    pub attempt: u64,
}

impl fmt::Display for World {
    /// The line that the paper's scripts look for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            launcher,
            rank,
            n_ranks,
            local_rank,
            ..
        } = self;
        write!(
            f,
            "Distributed environment: {launcher}. World size: {n_ranks}, rank: {rank}, local rank: {local_rank}"
        )
    }
}

impl World {
    /// What the environment says; nothing if this process is alone. `lookup` reads a variable.
    ///
    /// # Errors
    /// If variables are missing or contradict each other.
    pub fn find(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, PluginError> {
        let variables = Variables(|name: &str| lookup(name).filter(|text| !text.is_empty()));
        let is_given = |name| (variables.0)(name).is_some();
        let world = if is_given("RANK") && is_given("WORLD_SIZE") {
            variables.torchrun()?
        } else if is_given("SLURM_PROCID")
            && (is_given("SLURM_STEP_ID") || is_given("SLURM_STEPID"))
        {
            variables.slurm()?
        } else {
            return Ok(None);
        };
        if world.rank >= world.n_ranks {
            let Self { rank, n_ranks, .. } = world;
            return Err(broken(format!(
                "this is process {rank}, counted from 0, of {n_ranks}"
            )));
        }
        Ok(Some(world).filter(|world| world.n_ranks > 1))
    }
}

struct Variables<F>(F);

impl<F: Fn(&str) -> Option<String>> Variables<F> {
    fn text(&self, name: &str) -> Result<String, PluginError> {
        (self.0)(name).ok_or_else(|| broken(format!("`{name}` is not set")))
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T, PluginError> {
        let text = self.text(name)?;
        let number = text.trim().parse();
        number.map_err(|_| {
            broken(format!(
                "`{name}` is `{text}`, which is no number in its range"
            ))
        })
    }

    fn torchrun(&self) -> Result<World, PluginError> {
        let is_on = |text: String| matches!(text.as_str(), "True" | "true" | "1");
        Ok(World {
            launcher: Launcher::Torchrun,
            rank: self.number("RANK")?,
            n_ranks: self.number("WORLD_SIZE")?,
            local_rank: self.number("LOCAL_RANK")?,
            host: self.text("MASTER_ADDR")?,
            port: self.number("MASTER_PORT")?,
            has_agent_store: (self.0)("TORCHELASTIC_USE_AGENT_STORE").is_some_and(is_on),
            attempt: match (self.0)("TORCHELASTIC_RESTART_COUNT") {
                Some(_) => self.number("TORCHELASTIC_RESTART_COUNT")?,
                None => 0,
            },
        })
    }

    fn slurm(&self) -> Result<World, PluginError> {
        let first_given = |names: [&'static str; 2]| {
            let is_given = |name: &&str| (self.0)(name).is_some();
            names.into_iter().find(is_given).unwrap_or(names[1])
        };
        let nodes = self.text(first_given(["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"]))?;
        let host = match (self.0)("MASTER_ADDR") {
            Some(host) => host,
            None => first_host(&nodes)
                .ok_or_else(|| broken(format!("`{nodes}` is no list of hosts")))?,
        };
        let port = match (self.0)("MASTER_PORT") {
            Some(_) => self.number("MASTER_PORT")?,
            None => self.slurm_port()?,
        };
        Ok(World {
            launcher: Launcher::Slurm,
            rank: self.number("SLURM_PROCID")?,
            n_ranks: self.number(first_given(["SLURM_STEP_NUM_TASKS", "SLURM_NPROCS"]))?,
            local_rank: self.number("SLURM_LOCALID")?,
            host,
            port,
            has_agent_store: false,
            attempt: 0,
        })
    }

    /// The same in all processes of a step, and another one for what shares a host with it.
    fn slurm_port(&self) -> Result<u16, PluginError> {
        if let Some(gpus) = (self.0)("SLURM_STEP_GPUS") {
            // `0,1,3` or `2-5`.
            let numbers = gpus
                .split([',', '-'])
                .filter_map(|gpu| gpu.trim().parse::<u16>().ok());
            return Ok(SLURM_PORT + numbers.min().unwrap_or(0).min(1000));
        }
        let job: u64 = self.number("SLURM_JOB_ID")?;
        let n_ports = u64::from(SLURM_CPU_PORTS.end - SLURM_CPU_PORTS.start);
        Ok(SLURM_CPU_PORTS.start + u16::try_from(job % n_ports).unwrap_or(0))
    }
}

/// The first host of SLURM's short form: `gpu[03-05,9],login` begins with `gpu03`.
fn first_host(list: &str) -> Option<String> {
    // The end of the first name: a comma outside brackets.
    let mut depth = 0_i32;
    let end = list.find(|c| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        c == ',' && depth == 0
    });
    let mut rest = &list[..end.unwrap_or(list.len())];
    let mut host = String::new();
    // A name may have several brackets: `rack[1-2]node[01-16]`.
    while let Some((before, bracket)) = rest.split_once('[') {
        let (inside, behind) = bracket.split_once(']')?;
        host.push_str(before);
        host.push_str(inside.split([',', '-']).next()?);
        rest = behind;
    }
    host.push_str(rest);
    Some(host.trim().to_owned()).filter(|host| !host.is_empty())
}

fn broken(why: String) -> PluginError {
    PluginError::new("the environment of a distributed run is incomplete")
        .why(why)
        .fix(format!(
            "{HOW_TO_START}; for one process alone unset `RANK`, `WORLD_SIZE` and `SLURM_PROCID`"
        ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(variables: &str) -> Result<Option<World>, PluginError> {
        World::find(|wanted| {
            let mut pairs = variables
                .split_whitespace()
                .filter_map(|pair| pair.split_once('='));
            pairs
                .find(|(name, _)| *name == wanted)
                .map(|(_, value)| value.to_owned())
        })
    }

    fn place(variables: &str) -> String {
        match find(variables) {
            Ok(None) => "alone".to_owned(),
            Ok(Some(world)) => format!(
                "{} {}/{} local {} {}:{} agent {} attempt {}",
                world.launcher,
                world.rank,
                world.n_ranks,
                world.local_rank,
                world.host,
                world.port,
                world.has_agent_store,
                world.attempt
            ),
            Err(error) => error.why,
        }
    }

    const TORCHRUN: &str = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500";
    const SLURM: &str = "SLURM_PROCID=5 SLURM_NPROCS=8 SLURM_LOCALID=1 SLURM_JOB_NODELIST=gpu[03-05,9] SLURM_STEP_ID=0 \
         SLURM_JOB_ID=12345678";

    #[test]
    fn each_launcher_has_its_variables() {
        let more = |base: &str, more: &str| place(&format!("{base} {more}"));
        assert_eq!(place(""), "alone");
        assert_eq!(
            place(TORCHRUN),
            "torchrun 3/4 local 1 node0:29500 agent false attempt 0"
        );
        assert_eq!(
            more(
                TORCHRUN,
                "TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RESTART_COUNT=2"
            ),
            "torchrun 3/4 local 1 node0:29500 agent true attempt 2"
        );
        assert_eq!(
            place(SLURM),
            "SLURM 5/8 local 1 gpu03:25678 agent false attempt 0"
        );
        assert_eq!(
            more(SLURM, "SLURM_STEP_GPUS=6,2,4"),
            "SLURM 5/8 local 1 gpu03:12347 agent false attempt 0"
        );
        assert_eq!(
            more(SLURM, "MASTER_ADDR=10.0.0.7 MASTER_PORT=4000"),
            "SLURM 5/8 local 1 10.0.0.7:4000 agent false attempt 0"
        );
        // `srun torchrun`: SLURM counts the launchers.
        assert_eq!(
            more(SLURM, TORCHRUN),
            "torchrun 3/4 local 1 node0:29500 agent false attempt 0"
        );
        // A batch script, and a step of one process.
        assert_eq!(
            place("SLURM_PROCID=0 SLURM_NPROCS=8 SLURM_JOB_NODELIST=a,b"),
            "alone"
        );
        assert_eq!(
            more(
                "SLURM_PROCID=0 SLURM_NPROCS=1 SLURM_LOCALID=0",
                "SLURM_STEPID=3 SLURM_JOB_ID=1 SLURM_JOB_NODELIST=a"
            ),
            "alone"
        );
        assert_eq!(
            place(
                &TORCHRUN
                    .replace("WORLD_SIZE=4", "WORLD_SIZE=1")
                    .replace("RANK=3", "RANK=0")
            ),
            "alone"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(place("RANK=0 WORLD_SIZE=2"), "`LOCAL_RANK` is not set");
        assert_eq!(
            place("RANK=x WORLD_SIZE=2 LOCAL_RANK=0"),
            "`RANK` is `x`, which is no number in its range"
        );
        assert_eq!(
            place(&TORCHRUN.replace("RANK=3", "RANK=4")),
            "this is process 4, counted from 0, of 4"
        );
        assert_eq!(
            place(&SLURM.replace("gpu[03-05,9]", "gpu[03")),
            "`gpu[03` is no list of hosts"
        );
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [
            ("a", "a"),
            ("a,b", "a"),
            ("node[7,9-12]", "node7"),
            ("rack[1-2]node[01-16],x", "rack1node01"),
            ("n[3-4]-ib0,n9", "n3-ib0"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        assert_eq!(first_host(""), None);
    }
}
