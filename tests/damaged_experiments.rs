//! Damaged and hostile YAML, from the file to the plan: a plan or one line that says where it goes wrong, in little time,
//! never a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use tempfile::TempDir;
use tsquant::config::{Error, Experiment, Plan};

/// What no text of at most a mebibyte may take, on a busy machine and without optimization.
const LONGEST: Duration = Duration::from_secs(10);

/// Experiments as files, one for each thread, whose relative paths start at the repository.
struct Files {
    folder: TempDir,
    /// The plan that most damage leaves as it was: in a comment.
    known: Mutex<Option<Plan>>,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), known: Mutex::new(None) }
    }

    fn resolve(&self, yaml: &[u8], settings: &[String]) -> Result<Plan, Error> {
        let file = self.folder.path().join(format!("e{}.yaml", rayon::current_thread_index().unwrap_or(0)));
        fs_err::write(&file, yaml).unwrap();
        Experiment::read(&file)?.overlay(settings)?.resolve(Path::new(env!("CARGO_MANIFEST_DIR")))
    }

    /// A plan is new unless it equals the last one.
    fn is_known(&self, plan: &Plan) -> bool {
        let mut known = self.known.lock().unwrap();
        let is_known = known.as_ref() == Some(plan);
        if !is_known {
            *known = Some(plan.clone());
        }
        is_known
    }

    /// The error's one line, or nothing for a plan, which has to come back from its own YAML.
    fn survives(&self, yaml: &[u8], settings: &[String]) -> Option<String> {
        let start = Instant::now();
        let resolved = catch_unwind(AssertUnwindSafe(|| self.resolve(yaml, settings)));
        let shown = || format!("{settings:?} on {:?}", String::from_utf8_lossy(&yaml[..yaml.len().min(4000)]));
        let resolved = resolved.unwrap_or_else(|_| panic!("a panic for {}", shown()));
        assert!(start.elapsed() < LONGEST, "{:?} for {}", start.elapsed(), shown());
        match resolved {
            Ok(plan) if self.is_known(&plan) => None,
            Ok(plan) => {
                let written = plan.to_yaml().unwrap();
                let again = self.resolve(written.as_bytes(), &[]);
                assert!(again.as_ref() == Ok(&plan), "{again:?} for {}", shown());
                None
            }
            Err(error) => {
                let line = error.to_string();
                assert!(line.contains(".yaml") || line.starts_with("--set "), "{line} for {}", shown());
                assert!(!line.chars().any(char::is_control) && line.len() < 6000, "{line:?} for {}", shown());
                Some(line)
            }
        }
    }
}

fn shipped_experiments() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let paths = fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.map(|path| (path.clone(), fs_err::read(path).unwrap()));
    let is_sweep = |text: &[u8]| text.windows(7).any(|part| part == b"\nsweep:");
    let mut files: Vec<_> = files.filter(|(_, text)| !is_sweep(text)).collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

/// Every copy of `bytes` that differs at the byte `at`, and the text up to there.
fn damaged_at(bytes: &[u8], at: usize) -> impl Iterator<Item = Vec<u8>> {
    let (before, after) = (&bytes[..at], &bytes[at + 1..]);
    let byte = bytes[at];
    let flipped = (0..8).map(move |bit| byte ^ (1 << bit));
    let odd = *b"\0\xff\"':\n\t{&#";
    let replaced = flipped.chain(odd).map(move |byte| [before, &[byte], after].concat());
    let others = [[before, after].concat(), [before, &[byte, byte], after].concat(), before.to_vec()];
    replaced.chain(others)
}

#[test]
fn every_damaged_byte_of_the_shipped_experiments_is_survived() {
    let files = Files::new();
    let (tried, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for (path, bytes) in shipped_experiments() {
        assert_eq!(files.survives(&bytes, &[]), None, "{}", path.display());
        (0..bytes.len()).into_par_iter().for_each(|at| {
            for damaged in damaged_at(&bytes, at) {
                let is_refused = files.survives(&damaged, &[]).is_some();
                tried.fetch_add(1, Ordering::Relaxed);
                refused.fetch_add(usize::from(is_refused), Ordering::Relaxed);
            }
        });
    }
    let (tried, refused) = (tried.into_inner(), refused.into_inner());
    println!("{tried} damaged experiments, {refused} refused");
    // Most of a file is comments; a third of the rest is keys.
    assert!(refused > tried / 20, "{refused} of {tried}");
}

#[test]
fn every_damaged_byte_of_a_sweep_is_survived() {
    const SWEEPS: [&str; 2] = [
        "{grid: {quantization.weights.bits: [8, 4], overrides: [null, [{ops: add, activations: float}]]}, emit: all}",
        "{runs: {\"a b\": {quantization.weights: {bits: 3}}, c: null}, rank_by: sqnr}",
    ];
    let files = Files::new();
    let (_, yaml) = &shipped_experiments()[0];
    let refused = AtomicUsize::new(0);
    for sweep in SWEEPS {
        let resolve = |sweep: &str| {
            let file = files.folder.path().join(format!("s{}.yaml", rayon::current_thread_index().unwrap_or(0)));
            fs_err::write(&file, yaml).unwrap();
            let settings = [format!("sweep={sweep}")];
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            Experiment::read(&file).and_then(|it| it.overlay(&settings)?.resolve_sweep(root))
        };
        assert!(resolve(sweep).unwrap().combinations.len() > 1);
        (0..sweep.len()).into_par_iter().for_each(|at| {
            for damaged in damaged_at(sweep.as_bytes(), at).filter_map(|bytes| String::from_utf8(bytes).ok()) {
                match catch_unwind(AssertUnwindSafe(|| resolve(&damaged))).unwrap_or_else(|_| panic!("{damaged}")) {
                    // Its settings are those of the command that makes a row.
                    Ok(found) => assert!(!found.combinations.is_empty(), "{damaged}"),
                    Err(error) => {
                        assert!(!error.to_string().chars().any(char::is_control), "{damaged}");
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
    }
    assert!(refused.into_inner() > 100);
}

#[test]
fn every_damaged_byte_of_a_setting_is_survived() {
    const SETTINGS: [&str; 5] = [
        "quantization.weights={bits: 4, grid: power_of_two, granularity: per_tensor}",
        "calibration.inputs={\"a b\": x, c: {const: -1.5e3}}",
        "evaluation={labels: labels, metrics: [top1, 'sqnr'], transform: {mean: [0.1], std: [.5]}}",
        "quantization.l_p_value=0x10",
        "output.dir=\"runs/\\u00e9 \\n\"",
    ];
    let files = Files::new();
    let (_, yaml) = &shipped_experiments()[0];
    let tried = AtomicUsize::new(0);
    for setting in SETTINGS {
        (0..setting.len()).into_par_iter().for_each(|at| {
            // An argument of the command line reaches the experiment as UTF-8 or not at all.
            for damaged in damaged_at(setting.as_bytes(), at).filter_map(|bytes| String::from_utf8(bytes).ok()) {
                files.survives(yaml, &[damaged]);
                tried.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    println!("{} damaged settings", tried.into_inner());
}

#[test]
fn other_line_ends_and_a_byte_order_mark_change_nothing() {
    let files = Files::new();
    for (path, bytes) in shipped_experiments() {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let plan = files.resolve(&bytes, &[]).unwrap();
        for same in [text.replace('\n', "\r\n"), format!("\u{feff}{text}"), format!("---\n{text}...\n")] {
            assert_eq!(files.resolve(same.as_bytes(), &[]).as_ref(), Ok(&plan), "{}", path.display());
        }
    }
}

/// Texts made to exhaust or confuse a parser.
fn hostile() -> Vec<(&'static str, Vec<u8>)> {
    const MUCH: usize = 1 << 20;
    let filled = |pattern: &str, length: usize| pattern.repeat(length / pattern.len());
    let laughs = |sign: &str| {
        let levels =
            (1..12).map(|level| format!("a{level}: &a{level} [{}]\n", filled(&format!("*a{},", level - 1), 50)));
        format!("a0: &a0 [{}]\n{}x: {sign}a11\n", filled("lol,", 50), levels.collect::<String>())
    };
    let keys = |count: usize| (0..count).map(|index| format!("k{index}: 1\n")).collect::<String>();
    let texts = [
        ("aliases of aliases", laughs("*")),
        ("aliases as merge keys", laughs("\n  <<: *")),
        ("an alias in itself", "a: &a [*a]\n".to_owned()),
        (
            "one large anchor many times",
            format!("a: &a [{}]\nb: [{}]\n", filled("x,", 20_000), filled("*a,", MUCH / 2)),
        ),
        ("many anchors", (0..60_000).map(|index| format!("- &a{index} x\n")).collect()),
        ("open lists", filled("[", MUCH)),
        ("open maps", filled("{a: ", MUCH)),
        ("nested sequences", filled("- ", MUCH)),
        ("nested keys", filled("? ", MUCH)),
        ("nested maps by indentation", (0..1400).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect()),
        ("closed lists", format!("{}{}", filled("[", MUCH / 2), filled("]", MUCH / 2))),
        ("only ends", filled("]}", MUCH)),
        ("a long key", format!("{}: 1\n", filled("k", MUCH - 100))),
        ("a long quoted key", format!("\"{}\": 1\n", filled("\\u00e9", MUCH - 100))),
        ("a long value", format!("model: {}\n", filled("v", MUCH - 100))),
        ("a long value in quotes", format!("model: '{}'\n", filled("''", MUCH - 100))),
        ("a long setting that is missing", format!("model: {{path: {}}}\n", filled("p/", MUCH - 100))),
        ("a long number", format!("seed: {}\n", filled("9", MUCH - 100))),
        ("a long hexadecimal number", format!("seed: 0x{}\n", filled("f", MUCH - 100))),
        ("a long fraction", format!("seed: 0.{}1e999999999999\n", filled("0", MUCH - 100))),
        ("a long exponent", format!("seed: 1e{}\n", filled("9", MUCH - 100))),
        ("many keys", keys(80_000)),
        ("the same key many times", filled("model: 1\n", MUCH)),
        ("many documents", filled("---\na\n", MUCH)),
        ("many comments", filled("#\n", MUCH)),
        ("blank lines", filled("\n", MUCH)),
        ("tabs", filled("\t", MUCH)),
        ("tabs as indentation", "model:\n\tpath: x\n".to_owned()),
        ("a block scalar without end", format!("model: |9-\n{}", filled("         x\n", MUCH - 100))),
        ("folded lines", format!("model: >\n{}", filled(" x\n\n", MUCH - 100))),
        ("a directive", "%YAML 9.9\n%TAG ! tag:x,2000:\n---\nmodel: 1\n".to_owned()),
        ("many directives", filled("%FOO bar\n", MUCH)),
        ("a tag of Python", "model: !!python/object/apply:os.system ['true']\n".to_owned()),
        ("a binary tag", "model: !!binary aGVsbG8=\n".to_owned()),
        ("keys that are no text", "? [a, b]\n: 1\n? {c: d}\n: 2\n~: 3\n1.5: 4\n".to_owned()),
        ("escapes", "model: \"\\x00\\uD800\\U0010FFFF\\q\"\n".to_owned()),
        ("signs of direction", "model: {path: \"\u{202e}gnp.\u{2066}\"}\n".to_owned()),
        ("control characters", "model: {path: \"\u{7}\u{1b}[31m\"}\n".to_owned()),
        ("too much", filled("# no\n", MUCH + 6)),
    ];
    let bytes: [(&str, Vec<u8>); 5] = [
        ("nothing", Vec::new()),
        ("UTF-16", "\u{feff}model: 1\n".encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("a lone continuation byte", b"model: \x80\n".to_vec()),
        ("an overlong slash", b"model: {path: \"\xc0\xaf\"}\n".to_vec()),
        ("zeros", vec![0; 1 << 16]),
    ];
    texts.into_iter().map(|(name, text)| (name, text.into_bytes())).chain(bytes).collect()
}

#[test]
fn texts_made_to_exhaust_the_parser_are_refused() {
    let files = Files::new();
    hostile().into_par_iter().for_each(|(name, text)| {
        let line = files.survives(&text, &[]);
        assert!(line.is_some(), "{name}");
    });
    // The same as settings, as far as they are text and an argument may be as long.
    let (_, yaml) = &shipped_experiments()[0];
    hostile().into_par_iter().for_each(|(name, text)| {
        if let Ok(text) = String::from_utf8(text)
            && name != "nothing"
        {
            let settings = ["calibration.transform", "no.such.key"].map(|key| vec![format!("{key}={text}")]);
            for setting in settings {
                files.survives(yaml, &setting);
            }
            files.survives(yaml, &[text]);
        }
    });
    let deep = format!("{}=1", "a.".repeat(100_000));
    assert!(files.survives(yaml, &[deep]).is_some());
}
