//! Do the papers tell of what there is? Fails when one links to a file or heading, or names a story, an option or a key
//! that does not exist, and when a key has no description.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Papers whose links are followed, and, of all but the last two, whose words are checked.
const PAPERS: [&str; 11] = [
    "README.md",
    "ARCHITECTURE.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/GLOSSARY.md",
    "docs/LIMITS.md",
    "docs/OPERATING.md",
    "xl-hooks/README.md",
    "vm-images/README.md",
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// A paper, taken apart.
struct Paper {
    name: &'static str,
    /// Paragraphs outside of fences.
    prose: Vec<String>,
    /// Lines inside fences, each with the fence's language.
    fenced: Vec<(String, String)>,
}

impl Paper {
    fn read(name: &'static str) -> Self {
        let text = fs::read_to_string(top().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (mut prose, mut fenced, mut fence) = (vec![String::new()], Vec::new(), None);
        for line in text.lines() {
            match (line.trim_start().strip_prefix("```"), &fence) {
                (Some(language), None) => fence = Some(language.to_owned()),
                (Some(_), Some(_)) => fence = None,
                (None, Some(language)) => fenced.push((language.clone(), line.to_owned())),
                (None, None) if line.trim().is_empty() => prose.push(String::new()),
                (None, None) => {
                    let paragraph = prose.last_mut().unwrap();
                    paragraph.push_str(line.trim());
                    paragraph.push(' ');
                }
            }
        }
        assert!(fence.is_none(), "{name}: a fence has no end");
        Self { name, prose, fenced }
    }

    fn all() -> Vec<Self> {
        PAPERS.map(Self::read).into()
    }

    fn with_words() -> Vec<Self> {
        PAPERS[..PAPERS.len() - 2].iter().copied().map(Self::read).collect()
    }

    /// What stands between backticks.
    fn code(&self) -> impl Iterator<Item = &str> {
        self.prose.iter().flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2))
    }

    /// Lines and words that a reader may type.
    fn commands(&self) -> impl Iterator<Item = &str> {
        let typed = self.fenced.iter().filter(|(language, _)| language == "sh" || language == "console");
        typed.map(|(_, line)| line.trim_start_matches("$ ")).chain(self.code())
    }
}

/// Targets of `[text](target)`.
fn links(paragraph: &str) -> impl Iterator<Item = &str> {
    paragraph.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
}

/// Anchors of a paper's headings, as forges make them.
fn anchors(path: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap();
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |line: &str| -> String {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

fn none(mistakes: &[String]) {
    assert!(mistakes.is_empty(), "\n{}", mistakes.join("\n"));
}

#[test]
fn links_lead_somewhere() {
    let mut mistakes = Vec::new();
    for paper in Paper::all() {
        let at = top().join(paper.name);
        for target in paper.prose.iter().flat_map(|paragraph| links(paragraph)) {
            if target.contains("://") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { at.clone() } else { at.parent().unwrap().join(file) };
            if !path.exists() || !(anchor.is_empty() || anchors(&path).contains(anchor)) {
                mistakes.push(format!("{}: nothing is at {target}", paper.name));
            }
        }
    }
    none(&mistakes);
}

/// Builds the programs whose options the papers name, as the lab and CI build them.
fn build() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        for packages in [&["dom0d", "understudy"][..], &["simulator"]] {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.current_dir(top()).args(["build", "--quiet"]);
            cargo.args(packages.iter().flat_map(|package| ["--package", package]));
            if !cfg!(debug_assertions) {
                cargo.arg("--release");
            }
            assert!(cargo.status().unwrap().success(), "{packages:?} can't be built");
        }
    });
}

/// What a program of ours prints.
fn said(program: &str, words: &[&str]) -> Option<String> {
    build();
    let path = Path::new(env!("CARGO_BIN_EXE_lab")).with_file_name(program);
    let output = Command::new(path).args(words).output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// A program's verbs, and the options of each; those of the program itself stand under "".
struct Program {
    name: &'static str,
    verbs: BTreeMap<String, BTreeSet<String>>,
}

impl Program {
    fn ask(name: &'static str) -> Self {
        let mut verbs = BTreeMap::new();
        let mut unread = vec![Vec::new()];
        while let Some(path) = unread.pop() {
            let words: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
            let help = said(name, &words).unwrap_or_else(|| panic!("{name} {words:?} failed"));
            let is_option = |word: &&str| word.starts_with("--") && word.len() > 2;
            let parts = help.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
            verbs.insert(path.join(" "), parts.filter(is_option).map(str::to_owned).collect());
            let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
            for line in commands.take_while(|line| line.starts_with(' ')) {
                // Descriptions that go on stand further in.
                let verb = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '));
                if let Some(verb) =
                    verb.and_then(|rest| rest.split(' ').next()).filter(|verb| *verb != "help")
                {
                    unread.push([path.as_slice(), &[verb.to_owned()]].concat());
                }
            }
        }
        Self { name, verbs }
    }

    /// What is wrong with these words behind the program's name.
    fn mistake(&self, words: &[&str]) -> Option<String> {
        let mut verb = String::new();
        for &word in words.iter().take_while(|word| **word != "--") {
            let further = if verb.is_empty() { word.to_owned() } else { format!("{verb} {word}") };
            let option = word.trim_matches(['[', ']', ',', '.']).split('=').next().unwrap_or_default();
            if self.verbs.contains_key(&further) {
                verb = further;
            } else if option.starts_with("--") && !self.verbs[&verb].contains(option) {
                return Some(format!("{} {verb} has no {option}", self.name));
            } else if verb.is_empty() && self.verbs.len() > 1 && !word.starts_with('-') {
                return Some(format!("{} has no verb {word}", self.name));
            }
        }
        None
    }
}

#[test]
fn commands_can_be_typed() {
    let [understudy, dom0d, lab, simulator] = ["understudy", "dom0d", "lab", "simulator"].map(Program::ask);
    let known: BTreeSet<&String> = [&understudy, &dom0d, &lab, &simulator]
        .iter()
        .flat_map(|program| program.verbs.values().flatten())
        .collect();
    let mut mistakes = Vec::new();
    for paper in Paper::with_words() {
        for line in paper.commands() {
            let line = line.split(" #").next().unwrap_or_default();
            for command in line.split(['|', ';', '&']) {
                let words: Vec<&str> = command.split_whitespace().collect();
                let mistake = match words.as_slice() {
                    // A word as such, not a command.
                    ["understudy" | "dom0d"] => None,
                    ["understudy", rest @ ..] => understudy.mistake(rest),
                    ["dom0d", rest @ ..] => dom0d.mistake(rest),
                    ["cargo", "lab", rest @ ..] => lab.mistake(rest),
                    ["cargo", "run", "--release", "-p", "simulator", "--", rest @ ..] => {
                        simulator.mistake(rest)
                    }
                    [option] if option.starts_with("--") && option.len() > 2 => {
                        let is_known = known.iter().any(|known| known == option);
                        (!is_known).then(|| format!("nobody knows {option}"))
                    }
                    _ => None,
                };
                mistakes.extend(mistake.map(|mistake| format!("{}: {mistake}: {command}", paper.name)));
            }
        }
    }
    none(&mistakes);
}

#[test]
fn stories_exist() {
    let list = |words: &[&str]| said("lab", words).unwrap();
    let names = list(&["test", "--list"]) + &list(&["xen", "test", "--list"]);
    let groups: BTreeSet<&str> = names.lines().filter_map(|name| name.split('/').next()).collect();
    assert!(groups.contains("failover"), "{names}");
    let mut mistakes = Vec::new();
    for paper in Paper::with_words() {
        let words = paper.commands().flat_map(str::split_whitespace);
        let stories =
            words.filter(|word| word.split_once('/').is_some_and(|(group, _)| groups.contains(group)));
        for story in stories {
            let part = story.trim_end_matches('…');
            if !names.lines().any(|name| name.contains(part)) {
                mistakes.push(format!("{}: there is no story {story}", paper.name));
            }
        }
    }
    none(&mistakes);
}

/// Keys of the configuration: the example has all.
fn keys() -> BTreeSet<String> {
    let example = fs::read_to_string(top().join("dom0d/dom0d.example.toml")).unwrap();
    let lines = example.lines().map(|line| line.trim_start_matches("# "));
    lines.filter_map(|line| key_of(line).map(str::to_owned)).chain(["addresses".to_owned()]).collect()
}

/// The key that a line of TOML sets.
fn key_of(line: &str) -> Option<&str> {
    let (key, _) = line.split_once('=')?;
    let key = key.trim();
    let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    is_key.then_some(key)
}

#[test]
fn keys_exist_and_are_described() {
    let keys = keys();
    let mut mistakes = Vec::new();
    for paper in Paper::with_words() {
        let toml =
            paper.fenced.iter().filter(|(language, _)| language == "toml").map(|(_, line)| line.as_str());
        let assigned = paper.code().filter(|code| code.contains(" = ") || code.contains(" ="));
        for key in toml.chain(assigned).filter_map(key_of).filter(|key| !keys.contains(*key)) {
            // Tables of a [[service]].
            if !["limits", "timing"].contains(&key) {
                mistakes.push(format!("{}: there is no key {key}", paper.name));
            }
        }
        let timed = paper.code().filter(|code| code.ends_with("_ms") && !keys.contains(*code));
        mistakes.extend(timed.map(|key| format!("{}: there is no key {key}", paper.name)));
    }
    let operating = Paper::read("docs/OPERATING.md");
    let described: BTreeSet<&str> = operating.code().collect();
    let missing = keys.iter().filter(|key| !described.contains(key.as_str()));
    mistakes.extend(missing.map(|key| format!("docs/OPERATING.md does not describe {key}")));
    none(&mistakes);
}
