//! The promise of the plugin folder: a copied and renamed task is a new task, with no edit elsewhere.

use moeut_e2e::{Sandbox, build_crate, read, steps_seen, tiny};

#[test]
fn a_copied_and_renamed_task_builds_and_trains() {
    let library = build_crate("poetry", "plugins/tasks/moeut-c4", |text| {
        text.replace("moeut_c4", "poetry")
            .replace("moeut-c4", "poetry")
            .replace("MoeutC4", "Poetry")
            .replace("c4_transformer", "verses")
    });
    let sandbox = Sandbox::new();
    sandbox.drop_in("mine", "poetry.so", &read(&library));
    for (name, task) in [("by_name", "poetry"), ("by_alias", "verses")] {
        let args = tiny(
            name,
            &["-plugin_dir", "mine", "-task", task, "-stop_after", "3"],
        );
        sandbox.run(&args.as_strs()).ok();
        assert_eq!(steps_seen(&sandbox.run_folder(name)), 3);
    }
}
