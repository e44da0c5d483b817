//! A host that runs while the test looks at its files and sends it signals.

use crate::sandbox::{Outcome, Sandbox, wait_until};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A started host, whose output goes to files. It is killed when the test fails.
pub struct Running<'a> {
    sandbox: &'a Sandbox,
    child: Child,
    output: [PathBuf; 2],
}

impl Sandbox {
    /// Starts the host with `variables` in its environment, and does not wait.
    pub fn start(&self, args: &[&str], variables: &[(&str, &str)]) -> Running<'_> {
        let output = ["stdout", "stderr"].map(|name| self.work().join(name));
        let [stdout, stderr] = output
            .each_ref()
            .map(|path| File::create(path).expect("the sandbox can be written"));
        let mut command = self.command(args);
        command.envs(variables.iter().copied());
        let child = command.stdout(stdout).stderr(stderr).spawn();
        Running {
            sandbox: self,
            child: child.expect("the host starts"),
            output,
        }
    }

    /// As [`start`](Self::start), with the test at the other end of its output.
    pub fn start_into(&self, args: &[&str], stdout: Stdio, stderr: Stdio) -> Running<'_> {
        let child = self.command(args).stdout(stdout).stderr(stderr).spawn();
        Running {
            sandbox: self,
            child: child.expect("the host starts"),
            output: ["stdout", "stderr"].map(|name| self.work().join(name)),
        }
    }
}

impl Running<'_> {
    /// What it has said so far on stderr.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.output[1]).unwrap_or_default()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("a child can be asked")
            .is_some()
    }

    /// Sends a signal, named without `SIG`. By the shell, which has `kill` where no package brings it.
    pub fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.child.id());
        let status = Command::new("sh").args(["-c", &command]).status();
        assert!(status.expect("a shell starts").success(), "SIG{name}");
    }

    /// Waits until it has ended.
    pub fn wait(mut self) -> Outcome {
        wait_until("the host to end", || self.has_ended());
        let status = self.child.wait().expect("a child can be waited for");
        let [stdout, stderr] = self.output.each_ref().map(|path| {
            self.sandbox
                .normalize(&fs::read_to_string(path).unwrap_or_default())
        });
        Outcome {
            code: status.code(),
            stdout,
            stderr,
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
