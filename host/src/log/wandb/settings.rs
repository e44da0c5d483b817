//! What W&B is told: arguments before `WANDB_*` variables before W&B's settings files before `~/.netrc`.

use std::path::{Path, PathBuf};

/// Where runs go if nobody says: the reference's project, and W&B's own server.
const PROJECT: &str = "lm";
const BASE_URL: &str = "https://api.wandb.ai";

/// Everything that decides where a run goes and what it is called.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Settings {
    pub(super) mode: Mode,
    pub(super) base_url: String,
    pub(super) api_key: String,
    pub(super) entity: String,
    pub(super) project: String,
    /// Set by `wandb agent` or a user; one is drawn otherwise.
    pub(super) run_id: String,
    /// The name that the dashboard shows.
    pub(super) display_name: String,
    pub(super) sweep_id: String,
    pub(super) group: String,
    pub(super) job_type: String,
    pub(super) notes: String,
    pub(super) tags: Vec<String>,
    /// Warnings only.
    pub(super) is_silent: bool,
    /// `WANDB_RESUME` says that the server has the run already.
    pub(super) resumes: bool,
    /// Folder for the folder `wandb`.
    pub(super) dir: Option<PathBuf>,
    /// Between two uploads, in seconds; W&B's choice if absent.
    pub(super) upload_interval: Option<f64>,
}

/// Whether runs are uploaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Mode {
    /// As they go on.
    #[default]
    Online,
    /// By the user, with `wandb sync`.
    Offline,
    /// There is no run at all.
    Disabled,
}

/// What surrounds the program; a test has one of its own.
pub(super) struct Surroundings<'a> {
    pub(super) variable: &'a dyn Fn(&str) -> Option<String>,
    pub(super) read: &'a dyn Fn(&Path) -> Option<String>,
}

impl Surroundings<'_> {
    /// A variable that is there and not empty.
    fn get(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    fn home(&self) -> PathBuf {
        PathBuf::from(self.get("HOME").unwrap_or_default())
    }

    /// A setting of the files that `wandb login` and `wandb init` write; the working folder's wins.
    fn stored(&self, key: &str) -> Option<String> {
        let config = match self.get("WANDB_CONFIG_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => self.home().join(".config/wandb"),
        };
        let dir = PathBuf::from(self.get("WANDB_DIR").unwrap_or_default());
        [dir.join("wandb"), config]
            .iter()
            .filter_map(|dir| (self.read)(&dir.join("settings")))
            .find_map(|text| {
                let lines = text.lines().filter_map(|line| line.split_once('='));
                let mut values = lines.filter(|(name, _)| name.trim() == key);
                values.next().map(|(_, value)| value.trim().to_owned())
            })
            .filter(|value| !value.is_empty())
    }

    /// The key of a machine in `~/.netrc`, or the file that `NETRC` names.
    fn netrc_key(&self, base_url: &str) -> Option<String> {
        let machine = base_url.split("://").nth(1)?.split('/').next()?;
        let files = match self.get("NETRC") {
            Some(path) => vec![PathBuf::from(path)],
            None => vec![self.home().join(".netrc"), self.home().join("_netrc")],
        };
        files
            .iter()
            .filter_map(|path| (self.read)(path))
            .find_map(|text| password(&text, machine))
    }
}

/// The password of a machine in the words of a netrc file; `default` stands for every other machine.
fn password(netrc: &str, machine: &str) -> Option<String> {
    let is_comment = |line: &&str| line.trim_start().starts_with('#');
    let mut words = netrc
        .lines()
        .filter(|line| !is_comment(line))
        .flat_map(str::split_whitespace);
    let (mut is_wanted, mut is_default, mut fallback) = (false, false, None);
    while let Some(word) = words.next() {
        match word {
            "machine" => {
                is_wanted = words.next()? == machine;
                is_default = false;
            }
            "default" => (is_wanted, is_default) = (false, true),
            "password" => {
                let value = words.next()?.to_owned();
                if is_wanted {
                    return Some(value);
                }
                if is_default {
                    fallback = Some(value);
                }
            }
            "login" | "account" => {
                words.next();
            }
            _ => {}
        }
    }
    fallback
}

impl Settings {
    /// Reads what surrounds the program. `project` and `name` are arguments, if they were given.
    pub(super) fn new(
        surroundings: &Surroundings<'_>,
        project: Option<&str>,
        name: Option<&str>,
    ) -> Self {
        let text = |name: &str| surroundings.get(name).unwrap_or_default();
        let or_stored = |name: &str, key: &str| {
            let stored = || surroundings.stored(key);
            surroundings.get(name).or_else(stored)
        };
        let base_url = or_stored("WANDB_BASE_URL", "base_url").unwrap_or(BASE_URL.to_owned());
        let base_url = base_url.trim_end_matches('/').to_owned();
        let api_key = surroundings.get("WANDB_API_KEY");
        let api_key = api_key.or_else(|| surroundings.netrc_key(&base_url));
        let is_set = |name| matches!(text(name).to_ascii_lowercase().as_str(), "true" | "1");
        let mode = match or_stored("WANDB_MODE", "mode").as_deref() {
            _ if is_set("WANDB_DISABLED") => Mode::Disabled,
            Some("offline" | "dryrun") => Mode::Offline,
            Some("disabled") => Mode::Disabled,
            _ => Mode::Online,
        };
        let is_agent = is_agent(surroundings);
        let given_name = name.filter(|_| !is_agent).map(str::to_owned);
        let tags = text("WANDB_TAGS");
        Self {
            mode,
            base_url,
            api_key: api_key.unwrap_or_default(),
            entity: or_stored("WANDB_ENTITY", "entity").unwrap_or_default(),
            project: project
                .map(str::to_owned)
                .or_else(|| or_stored("WANDB_PROJECT", "project"))
                .unwrap_or(PROJECT.to_owned()),
            run_id: text("WANDB_RUN_ID"),
            display_name: given_name.unwrap_or_else(|| text("WANDB_NAME")),
            sweep_id: text("WANDB_SWEEP_ID"),
            group: text("WANDB_RUN_GROUP"),
            job_type: text("WANDB_JOB_TYPE"),
            notes: text("WANDB_NOTES"),
            tags: tags
                .split(',')
                .map(|tag| tag.trim().to_owned())
                .filter(|tag| !tag.is_empty())
                .collect(),
            is_silent: is_set("WANDB_SILENT"),
            resumes: matches!(text("WANDB_RESUME").as_str(), "allow" | "must" | "auto"),
            dir: surroundings.get("WANDB_DIR").map(PathBuf::from),
            upload_interval: text("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL").parse().ok(),
        }
    }
}

/// Whether `wandb agent` started the program.
fn is_agent(surroundings: &Surroundings<'_>) -> bool {
    let is_set = |name| surroundings.get(name).is_some();
    is_set("WANDB_SWEEP_ID") && is_set("WANDB_RUN_ID")
}

/// The `-name` of a run that was given `name` or none; nothing if there is nothing to add.
///
/// An agent's runs are told apart by the id that it gives them, whatever they are called: a sweep's `name` is that of all
/// its runs, and a run that is started again has its old id.
pub(super) fn run_name(
    surroundings: &Surroundings<'_>,
    name: Option<&str>,
    restores: bool,
) -> Option<String> {
    let id = surroundings.get("WANDB_RUN_ID");
    if is_agent(surroundings) {
        let id = id?;
        return Some(name.map_or(id.clone(), |name| format!("{name}-{id}")));
    }
    if name.is_some() || restores {
        return None;
    }
    let name = id.or_else(|| surroundings.get("WANDB_NAME"));
    name.map(|name| name.replace('/', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings_of(
        variables: &[(&str, &str)],
        files: &[(&str, &str)],
        project: Option<&str>,
        name: Option<&str>,
    ) -> Settings {
        surrounded(variables, files, |surroundings| {
            Settings::new(surroundings, project, name)
        })
    }

    fn surrounded<T>(
        variables: &[(&str, &str)],
        files: &[(&str, &str)],
        ask: impl Fn(&Surroundings<'_>) -> T,
    ) -> T {
        let find = |all: &[(&str, &str)], wanted: &str| {
            let found = all.iter().find(|(name, _)| *name == wanted);
            found.map(|(_, value)| (*value).to_owned())
        };
        ask(&Surroundings {
            variable: &|name| find(variables, name),
            read: &|path| find(files, path.to_str().unwrap()),
        })
    }

    const HOME: (&str, &str) = ("HOME", "/home/me");

    #[test]
    fn without_anything_the_project_is_the_references() {
        let settings = settings_of(&[HOME], &[], None, Some("first"));
        assert_eq!(settings.project, "lm");
        assert_eq!(settings.base_url, "https://api.wandb.ai");
        assert_eq!(settings.api_key, "");
        assert_eq!(settings.display_name, "first");
        assert_eq!(settings.mode, Mode::Online);
        assert_eq!(settings.dir, None);
    }

    #[test]
    fn an_argument_is_before_a_variable_before_a_file() {
        let stored = [(
            "/home/me/.config/wandb/settings",
            "[default]\nproject = stored\nbase_url = https://wandb.example/\n",
        )];
        let variable = ("WANDB_PROJECT", "variable");
        let project =
            |variables: &[_], argument| settings_of(variables, &stored, argument, None).project;
        assert_eq!(project(&[HOME], None), "stored");
        assert_eq!(project(&[HOME, variable], None), "variable");
        assert_eq!(project(&[HOME, variable], Some("argument")), "argument");
        let settings = settings_of(&[HOME], &stored, None, None);
        assert_eq!(settings.base_url, "https://wandb.example");
    }

    #[test]
    fn the_key_is_that_of_the_server() {
        let netrc = "# machine api.wandb.ai password wrong\nmachine api.wandb.ai\n  login user\n  password right\n\
                     machine other.example login user password other\n";
        let files = [("/home/me/.netrc", netrc)];
        let key = |variables: &[_]| settings_of(variables, &files, None, None).api_key;
        assert_eq!(key(&[HOME]), "right");
        assert_eq!(
            key(&[HOME, ("WANDB_BASE_URL", "https://other.example")]),
            "other"
        );
        assert_eq!(
            key(&[HOME, ("WANDB_BASE_URL", "https://unknown.example")]),
            ""
        );
        assert_eq!(key(&[HOME, ("WANDB_API_KEY", "mine")]), "mine");
        assert_eq!(
            password("default login me password any", "x"),
            Some("any".to_owned())
        );
    }

    #[test]
    fn modes_have_the_names_of_wandb() {
        for (name, mode) in [
            ("online", Mode::Online),
            ("offline", Mode::Offline),
            ("dryrun", Mode::Offline),
            ("disabled", Mode::Disabled),
        ] {
            assert_eq!(
                settings_of(&[("WANDB_MODE", name)], &[], None, None).mode,
                mode
            );
        }
        let disabled = settings_of(&[("WANDB_DISABLED", "True")], &[], None, None);
        assert_eq!(disabled.mode, Mode::Disabled);
        let files = [("wandb/settings", "[default]\nmode = offline\n")];
        assert_eq!(settings_of(&[], &files, None, None).mode, Mode::Offline);
    }

    #[test]
    fn a_run_of_an_agent_has_a_folder_of_its_own() {
        let agent = [("WANDB_SWEEP_ID", "s"), ("WANDB_RUN_ID", "x1")];
        let name =
            |variables: &[_], name| surrounded(variables, &[], |it| run_name(it, name, false));
        assert_eq!(name(&agent, None).as_deref(), Some("x1"));
        assert_eq!(name(&agent, Some("sut")).as_deref(), Some("sut-x1"));
        assert_eq!(name(&agent[1..], Some("a")), None);
        assert_eq!(name(&[("WANDB_NAME", "a/b")], None).as_deref(), Some("a-b"));
        assert_eq!(name(&[], None), None);
        let restored = |variables: &[_]| surrounded(variables, &[], |it| run_name(it, None, true));
        assert_eq!(restored(&[("WANDB_NAME", "a")]), None);
        assert_eq!(restored(&agent).as_deref(), Some("x1"));
        let settings = settings_of(&agent, &[], None, Some("sut-x1"));
        assert_eq!(settings.display_name, "", "the dashboard finds a name");
    }
}
