//! Makes tables and figures: finds their runs, leaves out what is not whole, and writes what changed.

use crate::files;
use crate::form;
use crate::model::Catalog;
use crate::product::{Made, Product};
use crate::products::ALL;
use crate::roster::Roster;
use crate::run::{self, Reason, Run};
use crate::stamp::{Inputs, Stamp};
use crate::words::{Words, misuse};
use moeut_host::args::nearest;
use moeut_host::error::HostError;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Flags of the commands that need runs.
pub(crate) const FLAGS: [&str; 4] = ["out", "save_dir", "runs", "plugin_dir"];
/// Where runs are looked for: trained here, checkpoints of others, taken from Weights & Biases.
pub(crate) const PLACES: &str = "save,paper/moe_universal/checkpoints,paper/wandb";

/// Makes what is named, or all. Returns 1 if something has not a single run.
///
/// # Errors
/// If a name is unknown, or a file cannot be written.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    let products = named(&words.names)?;
    let mut workshop = Workshop::new(words, Roster::open(words.get("runs").map(Path::new))?)?;
    workshop.make_all(&products)
}

/// The products of these names.
fn named(names: &[String]) -> Result<Vec<&'static Product>, HostError> {
    if names == ["all"] {
        return Ok(ALL.iter().collect());
    }
    let find = |name: &String| {
        let found = ALL.iter().find(|product| product.name == name);
        found.ok_or_else(|| {
            let near = nearest(name, ALL.iter().map(|product| product.name));
            let near = near.first().map(|near| format!(", `{near}` perhaps"));
            misuse(format!(
                "there is no table or figure `{name}`{}",
                near.unwrap_or_default()
            ))
        })
    };
    names.iter().map(find).collect()
}

/// Runs, as far as they have been read, and where things go.
pub(crate) struct Workshop {
    out: PathBuf,
    places: Vec<PathBuf>,
    roster: Roster,
    plugin_dirs: Vec<String>,
    /// Opened for the first run.
    catalog: OnceCell<Catalog>,
    runs: BTreeMap<String, Result<Run, Reason>>,
}

impl Workshop {
    /// With the flags of the command line.
    ///
    /// # Errors
    /// If the list of runs is about products that do not exist.
    pub(crate) fn new(words: &Words, roster: Roster) -> Result<Self, HostError> {
        let known: Vec<&str> = ALL.iter().map(|product| product.name).collect();
        if let Some(name) = roster.strangers(&known).first() {
            return Err(misuse(format!(
                "there is no table or figure `{name}`, for which the list names runs"
            )));
        }
        Ok(Self {
            out: words.path("out", "paper_out"),
            places: words
                .list("save_dir", PLACES)
                .into_iter()
                .map(PathBuf::from)
                .collect(),
            roster,
            plugin_dirs: words.list("plugin_dir", ""),
            catalog: OnceCell::new(),
            runs: BTreeMap::new(),
        })
    }

    /// Makes products; returns 1 if one of them has not a single run.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(crate) fn make_all(&mut self, products: &[&Product]) -> Result<u8, HostError> {
        let mut n_missing = 0;
        for product in products {
            if !self.make(product)? {
                n_missing += 1;
            }
        }
        Ok(u8::from(n_missing > 0))
    }

    /// Makes a product unless it is as it would be made now. Whether there is one.
    fn make(&mut self, product: &Product) -> Result<bool, HostError> {
        let names = self.roster.of(product.name).to_vec();
        let mut inputs = Vec::new();
        for name in &names {
            let folder = folder(&self.places, name);
            inputs.extend(run::sources(&folder));
            inputs.extend((product.sources)(&folder));
        }
        let inputs = Inputs::look(inputs);
        if let Some(stamp) = Stamp::current(&self.out, product.name, &inputs) {
            complain(product.name, &stamp.left_out);
            say(&format!("{}: nothing has changed", product.name));
            return Ok(!stamp.outputs.is_empty());
        }
        for name in &names {
            self.read(name)?;
        }
        let (mut whole, mut left_out) = (Vec::new(), Vec::new());
        for name in &names {
            match &self.runs[name] {
                Ok(run) => whole.push(run),
                Err(reason) => left_out.push((name.clone(), reason.clone())),
            }
        }
        let mut made = (product.make)(&whole);
        left_out.append(&mut made.left_out);
        complain(product.name, &left_out);
        if made.is_empty() {
            say(&format!(
                "{}: not made, for it has not a single run",
                product.name
            ));
        }
        let outputs = self.write(&made)?;
        for name in &outputs {
            say(&format!(
                "{}: {}",
                product.name,
                self.out.join(name).display()
            ));
        }
        let is_made = !outputs.is_empty();
        let stamp = Stamp {
            inputs,
            outputs,
            left_out,
        };
        stamp.write(&self.out, product.name)?;
        Ok(is_made)
    }

    /// Reads a run if it has not been read.
    fn read(&mut self, name: &str) -> Result<(), HostError> {
        if self.runs.contains_key(name) {
            return Ok(());
        }
        if self.catalog.get().is_none() {
            // Setting it cannot fail: there was none.
            let _ = self.catalog.set(Catalog::open(&self.plugin_dirs)?);
        }
        if let Some(catalog) = self.catalog.get() {
            let run = Run::read(&folder(&self.places, name), catalog);
            self.runs.insert(name.to_owned(), run);
        }
        Ok(())
    }

    /// Writes all files of a product; returns their names.
    fn write(&self, made: &Made) -> Result<Vec<String>, HostError> {
        let mut names = Vec::new();
        let mut write = |name: String, bytes: &[u8]| {
            let path = self.out.join(&name);
            names.push(name);
            files::write(&path, bytes)
        };
        for figure in &made.figures {
            let name = &figure.name;
            let svg = figure.plot.to_svg("");
            let unreadable = |error| unreadable(name, &error);
            let pdf = form::pdf(&svg).map_err(unreadable)?;
            write(format!("{name}.pdf"), &pdf)?;
            let svg = form::outlined(&svg).map_err(unreadable)?;
            write(format!("{name}.svg"), svg.as_bytes())?;
            write(format!("{name}.png"), &figure.plot.to_png(""))?;
            write(format!("{name}.csv"), figure.data.csv().as_bytes())?;
        }
        for (name, table) in &made.tables {
            write(format!("{name}.tex"), table.latex().as_bytes())?;
            write(format!("{name}.md"), table.markdown().as_bytes())?;
            write(format!("{name}.csv"), table.csv().as_bytes())?;
        }
        Ok(names)
    }
}

/// The folder of a run: the first place that has it, or where it would be.
pub(crate) fn folder(places: &[PathBuf], name: &str) -> PathBuf {
    let mut folders = places.iter().map(|place| place.join(name));
    let first = folders.clone().next().unwrap_or_default();
    folders.find(|folder| folder.is_dir()).unwrap_or(first)
}

fn unreadable(name: &str, error: &form::Unreadable) -> HostError {
    HostError::new(
        format!("the figure `{name}` cannot be drawn"),
        error.why(),
        "report this with the command that you typed",
    )
}

fn complain(product: &str, left_out: &[(String, Reason)]) {
    for (run, reason) in left_out {
        say(&format!("{product}: `{run}` is left out: {reason}"));
    }
}

/// A line for the user.
#[expect(clippy::print_stderr, reason = "what happens goes to the terminal")]
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}
