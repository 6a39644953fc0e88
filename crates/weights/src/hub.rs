//! From what the user typed to a model's folder: a path, or a name in the Hugging Face cache. Downloads nothing.

use std::fmt;
use std::path::{Path, PathBuf};

/// The environment that says where the Hugging Face cache is; a value, so that tests need not set the process's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubEnv {
    /// `HF_HUB_CACHE`: the cache itself.
    pub hf_hub_cache: Option<PathBuf>,
    /// `HF_HOME`: the cache is its `hub`.
    pub hf_home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`: the cache is its `huggingface/hub`.
    pub xdg_cache_home: Option<PathBuf>,
    /// `HOME`: the cache is its `.cache/huggingface/hub`.
    pub home: Option<PathBuf>,
}

impl HubEnv {
    /// Reads the process's environment; empty variables count as unset.
    pub fn from_process() -> Self {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Self {
            hf_hub_cache: var("HF_HUB_CACHE"),
            hf_home: var("HF_HOME"),
            xdg_cache_home: var("XDG_CACHE_HOME"),
            home: var("HOME"),
        }
    }

    /// The cache, by the precedence that huggingface_hub documents.
    fn cache(&self) -> Option<PathBuf> {
        let under = |dir: &Option<PathBuf>, rest: &str| dir.as_ref().map(|d| d.join(rest));
        self.hf_hub_cache
            .clone()
            .or_else(|| under(&self.hf_home, "hub"))
            .or_else(|| under(&self.xdg_cache_home, "huggingface/hub"))
            .or_else(|| under(&self.home, ".cache/huggingface/hub"))
    }
}

/// A model that cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a folder nor a name of the form `org/name`.
    #[error("{arg:?} is neither a folder nor a model's name like deepseek-ai/DeepSeek-R1: {reason}")]
    NotAModel {
        /// What was given.
        arg: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A revision that is no branch, tag or commit.
    #[error("revision {revision:?} is no branch, tag or commit hash: {reason}")]
    BadRevision {
        /// What was given.
        revision: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model is not in the cache.
    #[error(
        "{repo} (revision {revision}) is not on this machine, and downloading is not built yet; \
         get it with `hf download {repo}{}` (or huggingface-cli download). Looked in {}",
        RevisionFlag(revision),
        Places(looked_in)
    )]
    NotDownloaded {
        /// The model's name.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// Where it would have been.
        looked_in: Vec<PathBuf>,
    },
    /// A folder without config.json.
    #[error("{} has no config.json: not a model's folder, or its download is not complete", dir.display())]
    NoConfig {
        /// The folder.
        dir: PathBuf,
    },
    /// The cache contradicts itself.
    #[error("{}: {reason}; delete it and download again", path.display())]
    BrokenCache {
        /// The file in the cache.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

struct RevisionFlag<'a>(&'a str);

impl fmt::Display for RevisionFlag<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == DEFAULT_REVISION { Ok(()) } else { write!(f, " --revision {}", self.0) }
    }
}

struct Places<'a>(&'a [PathBuf]);

impl fmt::Display for Places<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no cache: HF_HUB_CACHE, HF_HOME and HOME are unset");
        }
        for (i, place) in self.0.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { "" } else { ", " }, place.display())?;
        }
        Ok(())
    }
}

const DEFAULT_REVISION: &str = "main";

/// The folder of `model`: the path of a folder, or `org/name` in the cache of downloads.
///
/// `revision` (a branch, tag or commit; `main` when silent) selects the cached snapshot; a folder has none.
/// `download_dir` is looked in before the cache of `env` and has the same layout.
pub fn resolve_model(
    model: &str,
    revision: Option<&str>,
    download_dir: Option<&Path>,
    env: &HubEnv,
) -> Result<PathBuf, HubError> {
    let folder = Path::new(model);
    if folder.is_dir() {
        return with_config(folder.to_owned());
    }
    let not_a_model = |reason: String| HubError::NotAModel { arg: model.to_owned(), reason };
    if folder.exists() {
        return Err(not_a_model("it is a file; give the folder that holds config.json".to_owned()));
    }
    check_repo(model).map_err(not_a_model)?;
    let revision = revision.unwrap_or(DEFAULT_REVISION);
    check_revision(revision)
        .map_err(|reason| HubError::BadRevision { revision: revision.to_owned(), reason })?;

    let folder = format!("models--{}", model.replace('/', "--"));
    let caches = download_dir.map(Path::to_owned).into_iter().chain(env.cache());
    let mut looked_in = Vec::new();
    for repo in caches.map(|cache| cache.join(&folder)) {
        if let Some(snapshot) = snapshot(&repo, revision)? {
            return with_config(snapshot);
        }
        looked_in.push(repo);
    }
    Err(HubError::NotDownloaded { repo: model.to_owned(), revision: revision.to_owned(), looked_in })
}

fn with_config(dir: PathBuf) -> Result<PathBuf, HubError> {
    if dir.join("config.json").is_file() { Ok(dir) } else { Err(HubError::NoConfig { dir }) }
}

/// The snapshot of a revision in a cached repository, if it is there.
fn snapshot(repo: &Path, revision: &str) -> Result<Option<PathBuf>, HubError> {
    let snapshots = repo.join("snapshots");
    let existing = |hash: &str| Some(snapshots.join(hash)).filter(|dir| dir.is_dir());
    let reference = repo.join("refs").join(revision);
    if !reference.is_file() {
        return Ok(if is_commit(revision) { existing(revision) } else { None });
    }
    let broken = |reason: String| HubError::BrokenCache { path: reference.clone(), reason };
    let hash = std::fs::read_to_string(&reference).map_err(|e| broken(e.to_string()))?;
    let hash = hash.trim();
    if !is_commit(hash) {
        return Err(broken("it does not hold a commit hash".to_owned()));
    }
    Ok(existing(hash))
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The hub's rules for names, so that a name cannot lead out of the cache.
fn check_repo(name: &str) -> Result<(), String> {
    let Some((org, repo)) = name.split_once('/') else {
        return Err("no such folder, and no organisation before a slash".to_owned());
    };
    for part in [org, repo] {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if part.is_empty() || !part.chars().all(plain) {
            return Err("no such folder, and names have letters, digits, '-', '_' and '.' around one slash"
                .to_owned());
        }
        if part.contains("..")
            || part.contains("--")
            || part.starts_with(['-', '.'])
            || part.ends_with(['-', '.'])
        {
            return Err(
                "no such folder, and names have no '..' or '--' and no '-' or '.' at an end".to_owned()
            );
        }
    }
    if name.len() > 96 {
        Err("no such folder, and names have at most 96 characters".to_owned())
    } else {
        Ok(())
    }
}

/// A path of plain components below `refs`.
fn check_revision(revision: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    let component =
        |c: &str| !c.is_empty() && !c.starts_with('.') && !c.contains("..") && c.chars().all(plain);
    if revision.len() <= 256 && revision.split('/').all(component) {
        return Ok(());
    }
    Err("it must consist of letters, digits, '-', '_', '.', '+' and single slashes, without '..'".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "0123456789abcdef0123456789abcdef01234567";

    /// A cache with one model at one revision.
    fn cache_with(org_name: &str, revision: &str) -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join(org_name);
        let reference = repo.join("refs").join(revision);
        std::fs::create_dir_all(reference.parent().unwrap()).unwrap();
        std::fs::write(reference, HASH).unwrap();
        std::fs::create_dir_all(repo.join("snapshots").join(HASH)).unwrap();
        std::fs::write(repo.join("snapshots").join(HASH).join("config.json"), "{}").unwrap();
        cache
    }

    fn env(cache: &Path) -> HubEnv {
        HubEnv { hf_hub_cache: Some(cache.to_owned()), ..HubEnv::default() }
    }

    #[test]
    fn folders_come_first_and_need_a_config() {
        let dir = tempfile::tempdir().unwrap();
        let arg = dir.path().to_str().unwrap();
        let resolve = |arg: &str| resolve_model(arg, None, None, &HubEnv::default());
        assert!(matches!(resolve(arg), Err(HubError::NoConfig { .. })));
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(resolve(arg).unwrap(), dir.path());
        let file = dir.path().join("config.json");
        assert!(matches!(resolve(file.to_str().unwrap()), Err(HubError::NotAModel { .. })));
    }

    #[test]
    fn cached_models_are_found_by_branch_and_commit() {
        let cache = cache_with("models--deepseek-ai--DeepSeek-R1", "main");
        let expected = cache.path().join("models--deepseek-ai--DeepSeek-R1/snapshots").join(HASH);
        let resolve = |revision| resolve_model("deepseek-ai/DeepSeek-R1", revision, None, &env(cache.path()));
        assert_eq!(resolve(None).unwrap(), expected);
        assert_eq!(resolve(Some("main")).unwrap(), expected);
        assert_eq!(resolve(Some(HASH)).unwrap(), expected);
        assert!(matches!(resolve(Some("v2")), Err(HubError::NotDownloaded { .. })));
        let other =
            resolve_model("deepseek-ai/DeepSeek-V3", None, None, &env(cache.path())).unwrap_err().to_string();
        for part in
            ["hf download deepseek-ai/DeepSeek-V3", "not built yet", "models--deepseek-ai--DeepSeek-V3"]
        {
            assert!(other.contains(part), "{other}");
        }
    }

    #[test]
    fn revisions_with_slashes_are_nested_refs() {
        let cache = cache_with("models--a--b", "refs/pr/7");
        assert!(resolve_model("a/b", Some("refs/pr/7"), None, &env(cache.path())).is_ok());
        for revision in ["../main", "a/../b", "/etc", "", "a//b", ".hidden", "a b"] {
            let error = resolve_model("a/b", Some(revision), None, &env(cache.path())).unwrap_err();
            assert!(matches!(error, HubError::BadRevision { .. }), "{revision}: {error}");
        }
    }

    #[test]
    fn download_dir_is_looked_in_first_and_both_are_named() {
        let (near, far) = (cache_with("models--a--b", "main"), cache_with("models--a--b", "main"));
        let found = resolve_model("a/b", None, Some(near.path()), &env(far.path())).unwrap();
        assert!(found.starts_with(near.path()));
        let error = resolve_model("a/c", None, Some(near.path()), &env(far.path())).unwrap_err();
        let HubError::NotDownloaded { looked_in, .. } = error else { panic!("{error}") };
        assert_eq!(looked_in, [near.path().join("models--a--c"), far.path().join("models--a--c")]);
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_puts_it() {
        let path = |p: &str| Some(PathBuf::from(p));
        let mut env = HubEnv {
            hf_hub_cache: path("/1"),
            hf_home: path("/2"),
            xdg_cache_home: path("/3"),
            home: path("/4"),
        };
        assert_eq!(env.cache(), path("/1"));
        env.hf_hub_cache = None;
        assert_eq!(env.cache(), path("/2/hub"));
        env.hf_home = None;
        assert_eq!(env.cache(), path("/3/huggingface/hub"));
        env.xdg_cache_home = None;
        assert_eq!(env.cache(), path("/4/.cache/huggingface/hub"));
        env.home = None;
        let error = resolve_model("a/b", None, None, &env).unwrap_err().to_string();
        assert!(error.contains("unset"), "{error}");
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused() {
        for name in [
            "../x", "a/../b", "a/b/c", "a/..", "a/b..c", "a--b/c", "a/b c", "a/", "/b", "tiny", "a/.b",
            "a\\b/c",
        ] {
            let error = resolve_model(name, None, None, &HubEnv::default()).unwrap_err();
            assert!(matches!(error, HubError::NotAModel { .. }), "{name}: {error}");
        }
    }

    #[test]
    fn broken_and_partial_caches_say_so() {
        let cache = cache_with("models--a--b", "main");
        let repo = cache.path().join("models--a--b");
        std::fs::remove_file(repo.join("snapshots").join(HASH).join("config.json")).unwrap();
        assert!(matches!(
            resolve_model("a/b", None, None, &env(cache.path())),
            Err(HubError::NoConfig { .. })
        ));
        std::fs::write(repo.join("refs/main"), "../../../../etc").unwrap();
        assert!(matches!(
            resolve_model("a/b", None, None, &env(cache.path())),
            Err(HubError::BrokenCache { .. })
        ));
    }
}
