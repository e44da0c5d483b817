//! The TensorBoard server of a run: a program of its own that shows the run's event files as long as the run goes on.
//!
//! A thread starts it, says where it is once it answers, and ends it. Should the host be killed, the system ends the
//! server: it asked for that before it became TensorBoard, see [`become_child`].

use crate::error::HostError;
use crate::log::{Level, Terminal};
use rustix::process::{Pid, Signal, getppid, kill_process_group, set_parent_process_death_signal};
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The word with which the host starts itself to become the server.
pub const WITH_PARENT: &str = "__with-parent";

/// The first port that is tried, as in the reference, and how many.
const FIRST_PORT: u16 = 7000;
const N_PORTS: u16 = 100;
/// How often a server that starts is looked at; it takes seconds.
const LOOK: Duration = Duration::from_millis(100);
/// How long a server may take to end when asked.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is shown, and to whom.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Folder of the event files.
    pub events: PathBuf,
    /// File for what the server says.
    pub output: PathBuf,
    /// Whether other machines may look, too.
    pub binds_all: bool,
}

/// A server that ends with this value.
#[derive(Debug)]
pub struct Server {
    /// Closed to stop the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts TensorBoard and returns at once; its address is a message on the terminal. Where it is not installed, or
    /// cannot be started, the message says what to do, and the run goes on without it.
    pub fn start(settings: ServerSettings, terminal: &Arc<Terminal>) -> Option<Self> {
        let Some(program) = find_program() else {
            let text = format!(
                "TensorBoard is not installed: `pip install tensorboard`, then `tensorboard --logdir {}`",
                settings.events.display()
            );
            terminal.message(Level::Info, &text);
            return None;
        };
        let (stop, stopped) = channel();
        let on_thread = Arc::clone(terminal);
        let thread = std::thread::Builder::new().name("tensorboard".to_owned());
        let thread = thread.spawn(move || {
            if let Err(why) = serve(&program, &settings, &stopped, &on_thread) {
                warn(&on_thread, &why);
            }
        });
        match thread {
            Ok(thread) => Some(Self {
                stop: Some(stop),
                thread: Some(thread),
            }),
            Err(error) => {
                warn(terminal, &error.to_string());
                None
            }
        }
    }
}

fn warn(terminal: &Terminal, why: &str) {
    terminal.message(Level::Warning, &format!("TensorBoard does not run: {why}"));
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed, and there is nothing to clean up.
            let _ = thread.join();
        }
    }
}

/// On the search path, or where `pip install --user` puts it, which often is not on it.
fn find_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/bin"));
    let is_program = |file: &PathBuf| {
        fs::metadata(file)
            .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path)
        .chain(home)
        .map(|folder| folder.join("tensorboard"))
        .find(is_program)
}

/// Tries one port after the other, and keeps the server until the run ends. The error is for the user.
fn serve(
    program: &Path,
    settings: &ServerSettings,
    stopped: &Receiver<()>,
    terminal: &Terminal,
) -> Result<(), String> {
    for port in FIRST_PORT..FIRST_PORT + N_PORTS {
        if !is_free(port, settings.binds_all) {
            continue;
        }
        let mut child = Ending(spawn(program, settings, port).map_err(|error| error.to_string())?);
        loop {
            if let Some(url) = find_url(&settings.output, port) {
                terminal.message(Level::Info, &format!("TensorBoard: {url}"));
                // Nothing is ever sent; an error is the end of the run.
                let _ = stopped.recv();
                return Ok(());
            }
            match child.0.try_wait() {
                Ok(None) => {}
                // Another run may have been quicker to take the port.
                Ok(Some(_)) if !is_free(port, settings.binds_all) => break,
                Ok(Some(status)) => {
                    let output = settings.output.display();
                    return Err(format!("it ended with {status}; see `{output}`"));
                }
                Err(error) => return Err(error.to_string()),
            }
            if stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected) {
                return Ok(());
            }
        }
    }
    let last = FIRST_PORT + N_PORTS - 1;
    Err(format!("ports {FIRST_PORT} to {last} are taken"))
}

fn address(binds_all: bool) -> Ipv4Addr {
    if binds_all {
        Ipv4Addr::UNSPECIFIED
    } else {
        Ipv4Addr::LOCALHOST
    }
}

fn is_free(port: u16, binds_all: bool) -> bool {
    TcpListener::bind((address(binds_all), port)).is_ok()
}

/// Starts the host as [`WITH_PARENT`], in a process group of its own, so that Ctrl-C in the terminal does not reach it.
fn spawn(program: &Path, settings: &ServerSettings, port: u16) -> std::io::Result<Child> {
    let output = File::create(&settings.output)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([WITH_PARENT, &std::process::id().to_string()])
        .arg(program)
        .args(["--port", &port.to_string()])
        .arg("--logdir")
        .arg(&settings.events);
    if settings.binds_all {
        command.arg("--bind_all");
    } else {
        command.args(["--host", &Ipv4Addr::LOCALHOST.to_string()]);
    }
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()
}

/// The address that the server prints once it answers: `http://127.0.0.1:7000/`.
fn find_url(output: &Path, port: u16) -> Option<String> {
    let text = fs::read_to_string(output).ok()?;
    let end = format!(":{port}/");
    let mut words = text.split_whitespace();
    let url = words.find(|word| word.starts_with("http") && word.ends_with(&end))?;
    Some(url.to_owned())
}

/// A child that does not outlive this value.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let group = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        let Some(group) = group else { return };
        // Not after the child was waited for: its number may be another's by then.
        if !matches!(self.0.try_wait(), Ok(None)) {
            return;
        }
        // It may have ended in between; then there is nobody to ask.
        let _ = kill_process_group(group, Signal::TERM);
        let asked = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) {
            if asked.elapsed() > PATIENCE {
                let _ = kill_process_group(group, Signal::KILL);
                let _ = self.0.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// `__with-parent <process> <program> <argument>…`: becomes the program, to which the system sends SIGTERM when the
/// thread that started it ends, however that comes about.
///
/// # Errors
/// If there is no such program. Otherwise this returns only if the parent has ended already.
pub fn become_child(args: &[String]) -> Result<(), HostError> {
    let refuse = |why: String| {
        HostError::new(
            format!("`{WITH_PARENT}` cannot start a program"),
            why,
            "leave it to the host, which starts its helpers with it",
        )
    };
    let [parent, program, args @ ..] = args else {
        return Err(refuse("a process and a program are missing".to_owned()));
    };
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| refuse(error.to_string()))?;
    // A parent that ended before the call above leaves another one.
    let is_parent = |pid: Pid| pid.as_raw_nonzero().to_string() == *parent;
    if !getppid().is_some_and(is_parent) {
        return Ok(());
    }
    let error = Command::new(program).args(args).exec();
    Err(refuse(format!("`{program}`: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_what_the_server_says() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("output");
        assert_eq!(find_url(&output, 7000), None);
        fs::write(&output, "Serving on localhost\n").unwrap();
        assert_eq!(find_url(&output, 7000), None);
        fs::write(
            &output,
            "see https://example.org/\nTensorBoard 2.21.0 at http://127.0.0.1:7001/ (Press CTRL+C to quit)\n",
        )
        .unwrap();
        assert_eq!(
            find_url(&output, 7001).as_deref(),
            Some("http://127.0.0.1:7001/")
        );
        assert_eq!(find_url(&output, 7000), None);
    }

    #[test]
    fn a_taken_port_is_not_free() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(!is_free(port, false) && !is_free(port, true));
    }

    #[test]
    fn a_child_that_ignores_a_request_is_killed() {
        let command = Command::new("sh")
            .args(["-c", "trap '' TERM; echo; while :; do sleep 0.05; done"])
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn();
        let mut child = command.unwrap();
        // Its first line says that the signal is ignored from now on.
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        drop(Ending(child));
        assert!(rustix::process::test_kill_process(pid).is_err());
    }

    #[test]
    fn nothing_to_become_is_an_error() {
        assert!(become_child(&["1".to_owned()]).is_err());
    }
}
