//! What is done to runs, each once: `impl Campaign`, a function for each row of the table.
//!
//! A function returns how many faults that were (none if the run ended too early), or what was lost.

use std::{fs, io, path::Path};

use super::{
    Campaign,
    process::{Ending, N_STEPS, Process, call, checkpoints, is_saving},
    record::{is_validating, step_of},
};

/// Kills before a run may end: each new start goes on from the last checkpoint.
const KILLS_PER_RUN: u64 = 5;

/// Files of a checkpoint.
const FILES: [&str; 5] = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "args.json",
    "MANIFEST.json",
];

/// Less than the tensors of a checkpoint need, more than logs do.
const FILE_LIMIT: u64 = 20_000;

impl Campaign {
    pub(super) fn random_kills(&mut self) -> Result<u64, String> {
        let aim = |campaign: &mut Self, process: &mut Process| {
            let moment = campaign.moment();
            process.sleep(moment)
        };
        self.kills(aim, |_| true)
    }

    pub(super) fn kills_during_saves(&mut self) -> Result<u64, String> {
        let aim = |campaign: &mut Self, process: &mut Process| {
            let step = campaign.random.below(0..N_STEPS);
            process.watch(|run| is_saving(run) && step_of(run) >= step)
        };
        self.kills(aim, is_saving)
    }

    pub(super) fn kills_during_validation(&mut self) -> Result<u64, String> {
        self.kills(|_, process| process.watch(is_validating), is_validating)
    }

    /// Kills a run again and again, when `aim` returns that it still runs, and lets it end. Returns how many kills were
    /// hits: what they found says that the moment was the right one.
    fn kills(
        &mut self,
        aim: impl Fn(&mut Self, &mut Process) -> Result<bool, String>,
        is_hit: impl Fn(&Path) -> bool,
    ) -> Result<u64, String> {
        let (name, mut process) = self.fresh()?;
        let run = self.site.run(&name);
        let (mut n_killed, mut n_hits, mut newest) = (0, 0, None);
        while n_killed < KILLS_PER_RUN && aim(self, &mut process)? {
            process.kill()?.went_on(newest)?;
            n_killed += 1;
            n_hits += u64::from(is_hit(&run));
            let now = checkpoints(&run).first().copied();
            if now < newest {
                return Err(format!("the checkpoint of step {newest:?} is gone"));
            }
            newest = now;
            process = self.site.start(&name, &[])?;
        }
        let ending = process.wait()?;
        ending.succeeded()?;
        ending.went_on(newest)?;
        self.end_is_equal(&name)?;
        Ok(n_hits)
    }

    /// A run that saves when it is asked to end exits with 0; one that does not dies of the signal.
    pub(super) fn termination(&mut self) -> Result<u64, String> {
        let (name, mut process) = self.fresh()?;
        let moment = self.moment();
        if !process.sleep(moment)? {
            return Ok(0);
        }
        process.signal("TERM")?;
        let ending = process.wait()?;
        match (ending.code, ending.signal) {
            (Some(0), _) | (_, Some(15)) => self.resume(&name)?,
            _ => ending.succeeded()?,
        }
        Ok(1)
    }

    /// Lets a run come to a step in the first two thirds.
    fn reach_some_step(&mut self, process: &mut Process) -> Result<bool, String> {
        let step = self.random.below(1..N_STEPS * 2 / 3);
        process.watch(|run| step_of(run) >= step)
    }

    pub(super) fn short_limit(&mut self) -> Result<u64, String> {
        let (name, mut process) = self.fresh()?;
        if !self.reach_some_step(&mut process)? {
            return Ok(0);
        }
        process.limit_files(Some(FILE_LIMIT))?;
        let moment = self.moment() / 4;
        let is_running = process.sleep(moment)?;
        if is_running {
            process.limit_files(None)?;
        }
        self.end_of_trouble(&name, process)
    }

    pub(super) fn lasting_limit(&mut self) -> Result<u64, String> {
        let (name, mut process) = self.fresh()?;
        if !self.reach_some_step(&mut process)? {
            return Ok(0);
        }
        process.limit_files(Some(FILE_LIMIT))?;
        let run = self.site.run(&name);
        let before = checkpoints(&run);
        let ending = process.wait()?;
        if is_saving(&run) {
            return Err("unfinished folders are left".to_owned());
        }
        self.refused_to_lose(&name, &before, &ending)
    }

    /// What follows a time without room: the run ends well, or refuses at its end and can be started again.
    fn end_of_trouble(&self, name: &str, process: Process) -> Result<u64, String> {
        let ending = process.wait()?;
        if ending.code == Some(0) {
            self.end_is_equal(name)?;
        } else {
            ending.refused("is not saved")?;
            self.resume(name)?;
        }
        Ok(1)
    }

    /// After a final save that failed: the error is clear, what was saved `before` is there, and all can go on.
    fn refused_to_lose(&self, name: &str, before: &[u64], ending: &Ending) -> Result<u64, String> {
        ending.refused(&format!("the checkpoint of step {N_STEPS} is not saved"))?;
        let after = checkpoints(&self.site.run(name));
        if before.first() > after.first() {
            return Err(format!(
                "of the checkpoints {before:?} only {after:?} are left"
            ));
        }
        self.resume(name)?;
        Ok(1)
    }

    /// A file system that has room for one checkpoint; needs the right to mount one.
    pub(super) fn full_disk(&mut self) -> Result<u64, String> {
        self.n_runs += 1;
        let name = self.name();
        let run = self.site.run(&name);
        let Ok(mount) = SmallDisk::mount(&run) else {
            return Ok(0);
        };
        let ending = self.site.finish(&name, &[])?;
        ending.refused(&format!("the checkpoint of step {N_STEPS} is not saved"))?;
        if checkpoints(&run).is_empty() {
            return Err("not even the first checkpoint is there".to_owned());
        }
        mount.enlarge()?;
        self.resume(&name)?;
        Ok(1)
    }

    /// A file in the folder's place refuses writes for root as well.
    fn block(run: &Path) -> io::Result<()> {
        fs::rename(run.join("checkpoint"), run.join("away"))?;
        fs::write(run.join("checkpoint"), "")
    }

    fn unblock(run: &Path) -> io::Result<()> {
        fs::remove_file(run.join("checkpoint"))?;
        fs::rename(run.join("away"), run.join("checkpoint"))
    }

    /// A run whose folder of checkpoints is away.
    fn blocked(&mut self) -> Result<Option<(String, Process)>, String> {
        let (name, mut process) = self.fresh()?;
        let is_running = process.watch(|run| !checkpoints(run).is_empty())?
            && self.reach_some_step(&mut process)?;
        if !is_running {
            return Ok(None);
        }
        Self::block(&self.site.run(&name)).map_err(|error| error.to_string())?;
        Ok(Some((name, process)))
    }

    pub(super) fn short_block(&mut self) -> Result<u64, String> {
        let Some((name, mut process)) = self.blocked()? else {
            return Ok(0);
        };
        let moment = self.moment() / 4;
        process.sleep(moment)?;
        Self::unblock(&self.site.run(&name)).map_err(|error| error.to_string())?;
        self.end_of_trouble(&name, process)
    }

    pub(super) fn lasting_block(&mut self) -> Result<u64, String> {
        let Some((name, process)) = self.blocked()? else {
            return Ok(0);
        };
        let ending = process.wait()?;
        Self::unblock(&self.site.run(&name)).map_err(|error| error.to_string())?;
        self.refused_to_lose(&name, &[], &ending)
    }

    /// The newest checkpoint is damaged in one file; the one before it is used.
    pub(super) fn damage(&mut self) -> Result<u64, String> {
        let (name, run) = self.finished()?;
        let file = FILES[self.random.index(FILES.len())];
        let steps = checkpoints(&run);
        let path = run.join(format!("checkpoint/model-{}/{file}", steps[0]));
        self.harm(&path)
            .map_err(|error| format!("{file}: {error}"))?;
        self.resume_from(&name, steps.get(1).copied())
            .map_err(|why| format!("{file}: {why}"))?;
        Ok(1)
    }

    /// Cuts a file, flips one of its bits, or removes it.
    fn harm(&mut self, path: &Path) -> io::Result<()> {
        let mut bytes = fs::read(path)?;
        let at = self.random.index(bytes.len());
        match self.random.index(3) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << self.random.index(8),
            _ => return fs::remove_file(path),
        }
        fs::write(path, bytes)
    }

    /// Two checkpoints have one of their files swapped; the one before both is used.
    pub(super) fn swap(&mut self) -> Result<u64, String> {
        let (name, run) = self.finished()?;
        let file = FILES[self.random.index(3)]; // Arguments are equal, and manifests are tried by the unit tests.
        let steps = checkpoints(&run);
        let [newest, older] =
            [0, 1].map(|i| run.join(format!("checkpoint/model-{}/{file}", steps[i])));
        let beside = run.join("beside");
        fs::rename(&newest, &beside)
            .and_then(|()| fs::rename(&older, &newest))
            .and_then(|()| fs::rename(&beside, &older))
            .map_err(|error| error.to_string())?;
        self.resume_from(&name, steps.get(2).copied())
            .map_err(|why| format!("{file}: {why}"))?;
        Ok(1)
    }

    /// No checkpoint can be used: all are damaged, or the newest is of a larger model.
    pub(super) fn nothing_usable(&mut self) -> Result<u64, String> {
        let (name, run) = self.finished()?;
        let steps = checkpoints(&run);
        for step in &steps {
            let path = run.join(format!("checkpoint/model-{step}/model.safetensors"));
            fs::write(path, "").map_err(|error| error.to_string())?;
        }
        self.site
            .finish(&name, &[])?
            .refused("no usable checkpoint in")?;
        if checkpoints(&run) != steps {
            return Err("damaged checkpoints were removed".to_owned());
        }

        let (name, run) = self.finished()?;
        self.site
            .finish(&name, &["-transformer.variant", "moe_universal"])?
            .refused("the checkpoint does not fit the model")?;
        if checkpoints(&run) != steps {
            return Err("checkpoints of another model were removed".to_owned());
        }
        self.resume(&name)?;
        Ok(2)
    }

    /// A second process is refused, also one that was told to start anew, and the first one does not notice. It is
    /// held meanwhile, or it might end too early.
    pub(super) fn pair(&mut self) -> Result<u64, String> {
        let (name, mut process) = self.fresh()?;
        if !process.watch(|run| !checkpoints(run).is_empty())? {
            return Ok(0);
        }
        process.signal("STOP")?;
        let before = checkpoints(&self.site.run(&name));
        for more in [&[][..], &["-reset", "1"]] {
            let ending = self.site.finish(&name, more)?;
            ending.refused("is being trained")?;
            if checkpoints(&self.site.run(&name)) != before {
                return Err(format!(
                    "the second process with {more:?} changed checkpoints"
                ));
            }
        }
        process.signal("CONT")?;
        process.wait()?.succeeded()?;
        self.end_is_equal(&name)?;
        Ok(1)
    }
}

/// A file system in memory that holds one checkpoint and not two; unmounted when dropped, with all that is in it.
struct SmallDisk(String);

impl SmallDisk {
    fn mount(at: &Path) -> Result<Self, String> {
        fs::create_dir_all(at).map_err(|error| error.to_string())?;
        let at = at.display().to_string();
        call("mount", &["-t", "tmpfs", "-o", "size=240k", "none", &at])?;
        Ok(Self(at))
    }

    fn enlarge(&self) -> Result<(), String> {
        call("mount", &["-o", "remount,size=64m", &self.0])
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(why) = call("umount", &[&self.0]) {
            eprintln!("warning: {why}");
        }
    }
}
