//! Rules about packages: which other packages they may use, and what every manifest must say.

use super::{CRATES, Problem, RESTRICTED};
use crate::workspace::Package;

/// Checks one package. `manifest` is the text of its `Cargo.toml`.
pub(super) fn check(package: &Package, manifest: &str) -> Vec<Problem> {
    let mut messages = Vec::new();
    match row(&package.name) {
        Some(allowed) => {
            let unwanted = |d: &&String| row(d).is_some() && !allowed.contains(&d.as_str());
            for dependency in package.dependencies.iter().filter(unwanted) {
                messages.push(format!(
                    "`{}` may not be built of `{dependency}`; of the workspace it may use {}",
                    package.name,
                    if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") }
                ));
            }
        }
        None => messages.push(format!("`{}` has no row in the crate table of xtask/src/tidy/mod.rs", package.name)),
    }
    for (dependency, users) in RESTRICTED {
        if package.dependencies.iter().any(|d| d == dependency) && !users.contains(&package.name.as_str()) {
            messages.push(format!("`{dependency}` is for {} alone", users.join(" and ")));
        }
    }
    if package.folder != package.name && package.folder != format!("crates/{}", package.name) {
        messages.push(format!("the folder of `{}` is not named as the package", package.name));
    }
    if package.description.as_deref().is_none_or(|d| d.trim().is_empty()) {
        messages.push("no description: say in a sentence what the package is".to_owned());
    }
    if !takes_workspace_lints(manifest) {
        messages.push("no `[lints]` with `workspace = true`".to_owned());
    }
    for feature in &package.features {
        messages.push(format!("feature `{feature}`: there is one feature set"));
    }
    let file = format!("{}/Cargo.toml", package.folder);
    messages.into_iter().map(|message| Problem::new(&file, None, message)).collect()
}

fn row(package: &str) -> Option<&'static [&'static str]> {
    CRATES.iter().find(|(name, _)| *name == package).map(|(_, allowed)| *allowed)
}

fn takes_workspace_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    lines.by_ref().take_while(|line| !line.starts_with('[')).any(|line| line == "workspace = true")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "[package]\nname = \"a\"\n\n[lints]\nworkspace = true\n";

    fn package(name: &str, dependencies: &[&str]) -> Package {
        Package {
            name: name.to_owned(),
            folder: format!("crates/{name}"),
            description: Some("A crate.".to_owned()),
            features: Vec::new(),
            dependencies: dependencies.iter().map(|&d| d.to_owned()).collect(),
        }
    }

    fn messages(package: &Package, manifest: &str) -> Vec<String> {
        check(package, manifest).into_iter().map(|p| p.message).collect()
    }

    #[test]
    fn a_package_within_the_rules_has_no_problem() {
        let built_of = &["mixtral-model", "mixtral-checkpoint", "serde"];
        assert_eq!(check(&package("mixtral-convert", built_of), MANIFEST), []);
        assert_eq!(check(&package("mixtral", &["anyhow", "mixtral-cpu"]), MANIFEST), []);
    }

    #[test]
    fn every_row_refuses_every_other_package() {
        for (name, allowed) in CRATES {
            for (other, _) in CRATES {
                let refused = !messages(&package(name, &[other]), MANIFEST).iter().all(|m| !m.contains("built of"));
                assert_eq!(refused, !allowed.contains(other), "{name} built of {other}");
            }
        }
    }

    #[test]
    fn what_is_for_tests_is_in_no_build() {
        assert!(CRATES.iter().all(|(_, allowed)| !allowed.contains(&"mixtral-testkit")));
        assert_eq!(
            messages(&package("mixtral-cpu", &["mixtral-testkit"]), MANIFEST),
            ["`mixtral-cpu` may not be built of `mixtral-testkit`; of the workspace it may use mixtral-model, \
              mixtral-engine"]
        );
    }

    #[test]
    fn a_package_outside_the_table_is_a_problem() {
        assert_eq!(
            messages(&package("mixtral-new", &[]), MANIFEST),
            ["`mixtral-new` has no row in the crate table of xtask/src/tidy/mod.rs"]
        );
    }

    #[test]
    fn libraries_have_no_anyhow() {
        let found = messages(&package("mixtral-model", &["anyhow"]), MANIFEST);
        assert_eq!(found, ["`anyhow` is for mixtral and fuzz and xtask alone"]);
    }

    #[test]
    fn manifests_say_what_all_say() {
        let mut bare = package("mixtral-model", &[]);
        bare.description = None;
        bare.folder = "crates/model".to_owned();
        bare.features = vec!["cuda".to_owned()];
        assert_eq!(
            messages(&bare, "[package]\nname = \"a\"\n\n[lints]\n\n[dependencies]\nworkspace = true\n"),
            [
                "the folder of `mixtral-model` is not named as the package",
                "no description: say in a sentence what the package is",
                "no `[lints]` with `workspace = true`",
                "feature `cuda`: there is one feature set",
            ]
        );
    }
}
