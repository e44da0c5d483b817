//! `cargo xtask faults`: lets a run be killed, starved of disk and damaged, and looks whether anything is lost.
//!
//! Through the real program with the staged plugins. After each fault the run is started again, and must end with the
//! metrics and tensors of a run that nothing happened to, bit for bit; or the program must refuse with what, why, fix
//! and exit code 2 and leave all checkpoints alone. The seed fixes which faults there are and when; what the machine
//! does meanwhile it does not fix.

mod inflict;
mod process;
mod random;
mod record;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    cargo::{self, Profile},
    failure::Failure,
};
use process::{Process, Site, checkpoints, copy, is_saving};
use random::Random;
use record::Record;

/// Faults of each kind.
struct Plan {
    kills: u64,
    aimed_kills: u64,
    terminations: u64,
    limits: u64,
    full_disks: u64,
    blocked: u64,
    damages: u64,
    swaps: u64,
    pairs: u64,
}

const FULL: Plan = Plan {
    kills: 60,
    aimed_kills: 25,
    terminations: 15,
    limits: 8,
    full_disks: 3,
    blocked: 6,
    damages: 18,
    swaps: 5,
    pairs: 4,
};

const SHORT: Plan = Plan {
    kills: 6,
    aimed_kills: 3,
    terminations: 2,
    limits: 2,
    full_disks: 1,
    blocked: 2,
    damages: 3,
    swaps: 1,
    pairs: 2,
};

const _: () = assert!(FULL.kills + 2 * FULL.aimed_kills >= 100);

/// The uninterrupted run.
const STRAIGHT: &str = "straight";

/// Something that can happen: does it once, and returns how many faults that were.
type Fault = fn(&mut Campaign) -> Result<u64, String>;

/// Runs the campaign.
pub(crate) fn faults(repo: &Path, args: &[String]) -> Result<(), Failure> {
    let (plan, seed) = parse(args)?;
    let host = cargo::build(repo, Profile::Release, &[])?;
    let folder = host.ancestors().nth(2).unwrap_or(repo).join("faults");
    let start = Instant::now();
    let mut campaign = Campaign::start(Site { host, folder }, seed)
        .map_err(|why| broken("the uninterrupted run fails", why))?;
    println!(
        "{:<44} {:>5} {:>9} {:>5}",
        "fault", "tries", "survived", "lost"
    );
    let table: [(&str, u64, Fault); 13] = [
        (
            "kill -9 at a random moment",
            plan.kills,
            Campaign::random_kills,
        ),
        (
            "kill -9 during a save",
            plan.aimed_kills,
            Campaign::kills_during_saves,
        ),
        (
            "kill -9 during validation",
            plan.aimed_kills,
            Campaign::kills_during_validation,
        ),
        (
            "SIGTERM at a random moment",
            plan.terminations,
            Campaign::termination,
        ),
        (
            "disk full for a while (limit on file sizes)",
            plan.limits,
            Campaign::short_limit,
        ),
        (
            "disk full until the end (limit on file sizes)",
            plan.limits,
            Campaign::lasting_limit,
        ),
        (
            "disk full (small tmpfs)",
            plan.full_disks,
            Campaign::full_disk,
        ),
        (
            "save folder cannot be written for a while",
            plan.blocked,
            Campaign::short_block,
        ),
        (
            "save folder cannot be written until the end",
            plan.blocked,
            Campaign::lasting_block,
        ),
        (
            "file cut short, bit flipped, or missing",
            plan.damages,
            Campaign::damage,
        ),
        (
            "files of two checkpoints swapped",
            plan.swaps,
            Campaign::swap,
        ),
        (
            "every checkpoint damaged, or of another model",
            1,
            Campaign::nothing_usable,
        ),
        ("two processes with one -name", plan.pairs, Campaign::pair),
    ];
    let mut n_lost = 0;
    for (name, wanted, fault) in table {
        n_lost += campaign.repeat(name, wanted, fault);
    }
    println!("{:.0} s, seed {seed}", start.elapsed().as_secs_f64());
    if n_lost == 0 {
        return Ok(());
    }
    Err(broken(
        &format!("{n_lost} faults were not survived"),
        "see above; the runs are as the faults left them".to_owned(),
    ))
}

fn broken(what: &str, why: String) -> Failure {
    Failure::new(
        what,
        why,
        "look into `target/faults/save` and `target/faults/logs`",
    )
}

fn parse(args: &[String]) -> Result<(Plan, u64), Failure> {
    let (mut plan, mut seed) = (FULL, 1);
    let mut rest = args.iter().map(String::as_str);
    while let Some(arg) = rest.next() {
        match (arg, arg == "--seed") {
            ("--short", _) => plan = SHORT,
            (_, true) if let Some(Ok(number)) = rest.next().map(str::parse) => seed = number,
            _ => {
                return Err(Failure::new(
                    "invalid arguments of `faults`",
                    format!("got {args:?}, there are `--short` and `--seed <number>`"),
                    "`cargo xtask faults --short`",
                ));
            }
        }
    }
    Ok((plan, seed))
}

/// Where it happens, and what every run is compared with.
struct Campaign {
    site: Site,
    random: Random,
    straight: Record,
    /// Time of an uninterrupted run.
    wall: Duration,
    n_runs: u64,
}

impl Campaign {
    fn start(site: Site, seed: u64) -> Result<Self, String> {
        for below in ["save", "logs"] {
            match fs::remove_dir_all(site.folder.join(below)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(format!("`{below}` cannot be removed: {error}"));
                }
                _ => {}
            }
        }
        // The first run of all makes tokenizer and tokens, which takes longer than it trains.
        site.finish("first", &["-stop_after", "1"])?.succeeded()?;
        let start = Instant::now();
        site.finish(STRAIGHT, &[])?.succeeded()?;
        let wall = start.elapsed();
        let straight = Record::read(&site.run(STRAIGHT))?;
        Ok(Self {
            site,
            random: Random(seed),
            straight,
            wall,
            n_runs: 0,
        })
    }

    /// Repeats a fault until there were `wanted`, and prints its row; returns how many were lost.
    fn repeat(&mut self, name: &str, wanted: u64, fault: Fault) -> u64 {
        let (mut n_tries, mut n_lost) = (0, 0);
        let mut reports = Vec::new();
        // A run may end before anything happens to it.
        for _ in 0..3 * wanted {
            if n_tries >= wanted {
                break;
            }
            match fault(self) {
                Ok(n_faults) => n_tries += n_faults,
                Err(report) => {
                    n_tries += 1;
                    n_lost += 1;
                    reports.push(format!("run `{}`: {report}", self.name()));
                }
            }
        }
        println!(
            "{name:<44} {n_tries:>5} {:>9} {n_lost:>5}",
            n_tries - n_lost
        );
        if n_tries < wanted {
            println!(
                "    only {n_tries} of {wanted}: not possible here, or the runs ended too early"
            );
        }
        for report in reports {
            println!("    {report}");
        }
        n_lost
    }

    /// The name of the run that is being tried.
    fn name(&self) -> String {
        format!("run-{}", self.n_runs)
    }

    /// A run that nothing has happened to yet.
    fn fresh(&mut self) -> Result<(String, Process), String> {
        self.n_runs += 1;
        let name = self.name();
        let process = self.site.start(&name, &[])?;
        Ok((name, process))
    }

    /// A finished run, as a copy.
    fn finished(&mut self) -> Result<(String, PathBuf), String> {
        self.n_runs += 1;
        let name = self.name();
        let folder = self.site.run(&name);
        copy(&self.site.run(STRAIGHT), &folder)
            .map_err(|error| format!("a run cannot be copied: {error}"))?;
        Ok((name, folder))
    }

    fn moment(&mut self) -> Duration {
        self.wall.mul_f64(self.random.fraction())
    }

    /// Starts the run again and lets it end; it must go on from the newest checkpoint there is, and end like the
    /// uninterrupted one.
    fn resume(&self, name: &str) -> Result<(), String> {
        let newest = checkpoints(&self.site.run(name)).first().copied();
        self.resume_from(name, newest)
    }

    fn resume_from(&self, name: &str, step: Option<u64>) -> Result<(), String> {
        let ending = self.site.finish(name, &[])?;
        ending.succeeded()?;
        ending.went_on(step)?;
        self.end_is_equal(name)
    }

    fn end_is_equal(&self, name: &str) -> Result<(), String> {
        let run = self.site.run(name);
        Record::read(&run)?.compare(&self.straight)?;
        if is_saving(&run) {
            return Err("unfinished folders are left".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_a_size_and_a_seed() {
        let parse = |text: &str| {
            let args: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            parse(&args).map(|(plan, seed)| (plan.kills, seed)).ok()
        };
        assert_eq!(parse(""), Some((FULL.kills, 1)));
        assert_eq!(parse("--short --seed 7"), Some((SHORT.kills, 7)));
        assert_eq!(parse("--seed"), None);
        assert_eq!(parse("--seed x"), None);
        assert_eq!(parse("--long"), None);
    }
}
