//! How long the threads of libtorch's CPU operations spin while they wait for each other.
//!
//! GNU's OpenMP lets them look 300,000 times, for milliseconds, before they sleep. Where another program wants a core,
//! the thread that all wait for is often not the one that runs, and each of the thousands of operations of a step takes
//! as long as it takes the scheduler to notice. [`SPINS`] is long enough to bridge the gap between two operations.
//!
//! The library reads its variables when it is loaded, before `main`: so the program starts itself once more with the
//! variable set. Whoever set one of [`OWN`] is left alone.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The variable and its value.
const SPINS: (&str, &str) = ("GOMP_SPINCOUNT", "10000");
/// What says how threads wait.
const OWN: [&str; 2] = [SPINS.0, "OMP_WAIT_POLICY"];
/// Commands that compute; others are not worth a second start.
const COMMANDS: [&str; 3] = ["generate", "eval", "bench"];

/// Becomes the same program with [`SPINS`], if what is asked for computes. Comes back otherwise, and if it cannot.
pub(crate) fn shorten(argv: &[String]) {
    if !computes(argv) || OWN.iter().any(|name| env::var_os(name).is_some()) {
        return;
    }
    let Ok(program) = env::current_exe() else {
        return;
    };
    let mut command = Command::new(program);
    command.args(argv).env(SPINS.0, SPINS.1);
    if let Some(name) = env::args_os().next() {
        command.arg0(name);
    }
    // It returns only if there is no other program, and then threads spin for longer.
    let _not_started = command.exec();
}

fn computes(argv: &[String]) -> bool {
    let first = argv.first().map_or("", String::as_str);
    let trains = first.starts_with('-') && argv.len() > 1;
    trains || COMMANDS.contains(&first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_computes_starts_twice() {
        let computes = |line: &str| {
            let argv: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            computes(&argv)
        };
        for line in [
            "-task moeut_c4 -name a",
            "bench moe",
            "eval -name a",
            "generate -name a",
        ] {
            assert!(computes(line), "{line}");
        }
        for line in [
            "",
            "--help",
            "--version",
            "plugins list",
            "doctor",
            "launch -n 2 -task a",
        ] {
            assert!(!computes(line), "{line}");
        }
    }
}
