//! Checks that a plugin's author runs in `#[test]`s of the plugin crate.

use crate::args::{ArgDef, ArgSpec, Profile, configuration};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};

/// Checks an argument table against its configuration struct and its profiles.
///
/// Every default and every profile value must parse, every name must be there once, no name may be both a leaf and a
/// node (`a.b` and `a.b.c`), and the table must fill `Config` exactly.
///
/// # Panics
/// With the name of the offending argument.
pub fn check_args<Config: DeserializeOwned>(specs: &[ArgSpec], profiles: &[Profile]) {
    let defs: Vec<ArgDef> = specs.iter().map(ArgDef::from).collect();
    let names: BTreeSet<&str> = defs.iter().map(|def| def.name.as_str()).collect();
    assert_eq!(
        names.len(),
        defs.len(),
        "an argument is there twice: {names:?}"
    );
    for def in &defs {
        if let Err(error) = def.parse(&def.default) {
            panic!("default of `{}`: {error}", def.name);
        }
        let node = format!("{}.", def.name);
        assert!(
            !names.iter().any(|name| name.starts_with(&node)),
            "`{}` is both an argument and a prefix of others",
            def.name
        );
    }
    for profile in profiles {
        for (name, raw) in profile.args {
            if let Some(def) = defs.iter().find(|def| def.name == *name)
                && let Err(error) = def.parse(raw)
            {
                panic!("profile `{}`, argument `{name}`: {error}", profile.name);
            }
        }
    }
    match configuration(&defs, &BTreeMap::new()) {
        Ok(config) => {
            if let Err(error) = serde_json::from_value::<Config>(config) {
                panic!("the argument table does not fill the configuration: {error}");
            }
        }
        Err(error) => panic!("{error}"),
    }
}

/// What `specs` make of flags as a user types them; the rest are defaults.
///
/// # Panics
/// If a flag is unknown or its value malformed.
pub fn config<C: DeserializeOwned>(specs: &[ArgSpec], flags: &[(&str, &str)]) -> C {
    let defs: Vec<ArgDef> = specs.iter().map(ArgDef::from).collect();
    let parse = |&(flag, raw): &(&str, &str)| {
        let def = defs.iter().find(|def| def.name == flag);
        match def.map(|def| def.parse(raw)) {
            Some(Ok(value)) => (flag.to_owned(), value),
            other => panic!("`{flag}` {raw}: {other:?}"),
        }
    };
    let config = configuration(&defs, &flags.iter().map(parse).collect());
    let config = config.unwrap_or_else(|error| panic!("{error}"));
    C::deserialize(config).unwrap_or_else(|error| panic!("{error}"))
}
