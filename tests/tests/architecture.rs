//! ARCHITECTURE.md's table of crates and arrows is what cargo says.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

type Arrows = BTreeMap<String, BTreeSet<String>>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// The packages in `crates/` as cargo describes them.
fn packages() -> Vec<serde_json::Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let ours = |package: &&serde_json::Value| {
        let manifest = package["manifest_path"].as_str().expect("a path");
        Path::new(manifest).starts_with(root().join("crates"))
    };
    packages.iter().filter(ours).cloned().collect()
}

/// Crates in `crates/` and the ones each depends on, dev-dependencies aside.
fn from_cargo() -> Arrows {
    let short = |name: &str| name.strip_prefix("r1-").map(str::to_owned);
    let entry = |package: &serde_json::Value| {
        let name = short(package["name"].as_str().expect("a name")).expect("packages are named r1-<folder>");
        let needs = package["dependencies"].as_array().expect("dependencies").iter();
        let needs = needs.filter(|need| need["kind"].is_null());
        (name, needs.filter_map(|need| short(need["name"].as_str().expect("a name"))).collect())
    };
    packages().iter().map(entry).collect()
}

/// The rows `| `crate` | sentence | knows | …` of the table under "## Crates".
fn from_page() -> Arrows {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let section =
        page.split("\n## ").find(|section| section.starts_with("Crates")).expect("a section Crates");
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let name = cells[0].strip_prefix('`')?.strip_suffix('`')?.to_owned();
        let needs = cells[2].split(',').map(|need| need.trim().trim_matches('`')).filter(|need| *need != "–");
        Some((name, needs.map(str::to_owned).collect()))
    };
    section.lines().filter(|line| line.starts_with("| `")).filter_map(row).collect()
}

#[test]
fn the_page_lists_the_crates_and_their_arrows() {
    assert_eq!(from_page(), from_cargo());
}

/// Every crate knows only those below it in the page's table.
#[test]
fn arrows_point_down() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let order: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let place =
        |name: &str| order.iter().position(|listed| *listed == name).unwrap_or_else(|| panic!("{name}"));
    for (name, needs) in from_cargo() {
        for need in needs {
            assert!(place(&need) > place(&name), "{name} stands below {need}, which it uses");
        }
    }
}

/// Only `server` and `cli` know HTTP, only the oracle knows candle, and so on.
#[test]
fn outside_crates_stay_where_they_belong() {
    for (dependency, allowed) in [
        ("axum", &["server"][..]),
        ("tower", &["server"]),
        ("tower-http", &["server"]),
        ("ureq", &["cli"]),
        ("clap", &["cli"]),
        ("tokenizers", &["text"]),
        ("llguidance", &["text"]),
        ("tokio-rustls", &["server"]),
        ("minijinja", &["text"]),
        ("candle-core", &["reference"]),
        ("candle-nn", &["reference"]),
        ("memmap2", &["weights"]),
        ("safetensors", &[]),
    ] {
        for package in packages() {
            let name = package["name"].as_str().expect("a name").trim_start_matches("r1-").to_owned();
            let mut needs = package["dependencies"].as_array().expect("dependencies").iter();
            let uses = needs.any(|need| need["kind"].is_null() && need["name"] == dependency);
            assert!(!uses || allowed.contains(&name.as_str()), "{name} uses {dependency}");
        }
    }
}

/// Only `server::convert` turns OpenAI's types into the engine's; `routes` hands a handle through and lists models.
#[test]
fn openai_and_engine_types_meet_in_one_place() {
    let sources = root().join("crates/server/src");
    let mut both = BTreeSet::new();
    visit(&sources, &mut |path, text| {
        if text.contains("r1_engine::") && text.contains("crate::types::") {
            both.insert(path.strip_prefix(&sources).expect("a source").display().to_string());
        }
    });
    let allowed = ["convert/mod.rs", "convert/sampling.rs", "routes.rs"].map(String::from);
    assert_eq!(both, BTreeSet::from(allowed));
}

/// Nothing but the wiring is switched by features.
#[test]
fn code_is_written_once() {
    visit(&root().join("crates"), &mut |path, text| {
        let switched = ["cfg(feature", "cfg!(feature"].iter().any(|switch| text.contains(switch));
        let allowed =
            ["cli", "gpu", "comm"].iter().any(|name| path.starts_with(root().join("crates").join(name)));
        assert!(!switched || allowed, "{} is switched by a feature", path.display());
    });
}

/// Unsafe code is forbidden in every crate that does not need it.
#[test]
fn unsafe_code_is_where_it_must_be() {
    for name in from_cargo().keys() {
        let source = root().join("crates").join(name).join("src");
        let entry = if source.join("lib.rs").exists() { "lib.rs" } else { "main.rs" };
        let text = fs::read_to_string(source.join(entry)).expect("a crate has an entry");
        let forbids = text.contains("#![forbid(unsafe_code)]");
        assert_eq!(forbids, !["cpu", "gpu", "weights"].contains(&name.as_str()), "{name}/{entry}");
    }
}

/// Every source file says what it is for.
#[test]
fn every_file_opens_with_its_purpose() {
    for folder in ["crates", "tests/src", "tests/tests", "benches/src", "benches/benches"] {
        visit(&root().join(folder), &mut |path, text| {
            assert!(text.starts_with("//! "), "{} does not open with //!", path.display());
        });
    }
}

/// Shows every Rust file below `folder`.
fn visit(folder: &Path, look: &mut dyn FnMut(&Path, &str)) {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            visit(&entry, look);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            look(&entry, &fs::read_to_string(&entry).expect("text"));
        }
    }
}
