//! Runs that are killed, that meet a full disk, that meet each other: a run directory is whole or not there, an earlier one
//! stays or is replaced whole, and nothing else is left.

mod binary;
mod damage;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use binary::{BINARY, Folder, experiment, in_folder, listing, ran, shipped, test_data, test_model};
use damage::Random;

/// The stages as they are told where standard error is no terminal.
const STAGES: [&str; 6] = ["load", "calibrate", "search", "emit", "check", "evaluate"];
const FILES: [&str; 3] = ["experiment.yaml", "quantized.pt", "report.json"];
/// Two runs that write different models.
const FOUR_BITS: &str = "quantization.weights.bits=4";
const EIGHT_BITS: &str = "quantization.weights.bits=8";

/// A folder with an experiment in it.
fn folder() -> Folder {
    let folder = Folder::new();
    folder.write("e.yaml", experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]"));
    folder
}

fn quantize(folder: &Folder, setting: &str) -> Command {
    let mut command = in_folder(folder.path(), BINARY);
    command.args(["quantize", "e.yaml", "--set", setting]);
    command
}

/// The model that a run with this setting writes.
fn model_of(setting: &str) -> Vec<u8> {
    let folder = folder();
    ran(&mut quantize(&folder, setting)).succeeded();
    fs_err::read(folder.path().join("run/quantized.pt")).unwrap()
}

/// The model in the folder's run directory, which is whole if it is there.
fn kept_model(folder: &Folder) -> Option<Vec<u8>> {
    let run = folder.path().join("run");
    if !run.exists() {
        return None;
    }
    assert_eq!(listing(&run), FILES);
    assert!(folder.report("run")["versions"]["tsquant"].is_string());
    assert!(fs_err::read_to_string(run.join("experiment.yaml")).unwrap().ends_with('\n'));
    Some(fs_err::read(run.join("quantized.pt")).unwrap())
}

/// What stands in the folder beside the experiment and the run.
fn leftovers(folder: &Folder) -> BTreeSet<String> {
    let top = fs_err::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    top.filter(|name| name != "run" && name != "e.yaml").collect()
}

fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).output().unwrap();
    // A process that has ended and was not waited for is still there to be signalled.
    assert!(sent.status.success(), "{sent:?}");
}

/// Sends the signal a while after a stage was told; the exit code, or the signal's number below zero.
fn killed(mut command: Command, stage: &str, delay: Duration, signal: &str) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut told = lines.by_ref().map(Result::unwrap);
    assert!(told.any(|line| line.starts_with(stage)), "{stage} was not told");
    std::thread::sleep(delay);
    send(&child, signal);
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    let status = child.wait().unwrap();
    assert!(!rest.iter().any(|line| line.contains("error") || line.contains("panic")), "{stage} {delay:?}: {rest:?}");
    status.code().unwrap_or_else(|| -status.signal().unwrap())
}

#[test]
fn a_killed_run_leaves_a_whole_run_or_none() {
    let (earlier, new) = (model_of(FOUR_BITS), model_of(EIGHT_BITS));
    assert_ne!(earlier, new);
    let mut random = Random(6);
    let mut ended = 0;
    for round in 0..4 {
        for (signal, number) in [("TERM", -15), ("INT", -2), ("HUP", -1), ("KILL", -9)] {
            let folder = folder();
            let had_earlier = round % 2 == 1;
            if had_earlier {
                ran(&mut quantize(&folder, FOUR_BITS)).succeeded();
            }
            let stage = STAGES[random.below(STAGES.len())];
            let delay = Duration::from_micros(random.below(25_000) as u64);
            let code = killed(quantize(&folder, EIGHT_BITS), stage, delay, signal);
            let shown = format!("{signal} {delay:?} after {stage}: {code}");
            assert!(code == number || code == 0, "{shown}");
            ended += usize::from(code == number);
            match kept_model(&folder) {
                Some(model) if model == new => {}
                Some(model) => assert!(code != 0 && had_earlier && model == earlier, "{shown}"),
                None => assert!(code != 0 && !had_earlier, "{shown}"),
            }
            let left = leftovers(&folder);
            if signal == "KILL" {
                assert!(left.len() <= 1 && left.iter().all(|name| name.starts_with(".tsquant.")), "{shown}: {left:?}");
                // The next run clears up.
                ran(&mut quantize(&folder, EIGHT_BITS)).succeeded();
                assert_eq!(kept_model(&folder).as_ref(), Some(&new), "{shown}");
            }
            assert_eq!(leftovers(&folder), BTreeSet::new(), "{shown}");
        }
    }
    println!("{ended} of 16 runs ended by the signal");
    assert!(ended >= 4, "{ended}");
}

#[test]
fn an_interrupted_run_takes_the_parents_that_it_made_with_it() {
    let folder = folder();
    let code = killed(quantize(&folder, "output.dir=a/b/run"), "calibrate", Duration::ZERO, "TERM");
    assert!(code == -15 || code == 0, "{code}");
    let expected = if code == 0 { BTreeSet::from(["a".to_owned()]) } else { BTreeSet::new() };
    assert_eq!(leftovers(&folder), expected);
}

#[test]
fn a_signal_that_is_to_be_ignored_is_ignored() {
    // As in `nohup tsquant …` and in a script's background jobs.
    for signal in ["INT", "HUP", "TERM"] {
        let folder = folder();
        let mut command = in_folder(folder.path(), "sh");
        command.args(["-c", &format!("trap '' {signal}; exec \"$0\" quantize e.yaml"), BINARY]);
        assert_eq!(killed(command, "load", Duration::ZERO, signal), 0, "{signal}");
        assert!(kept_model(&folder).is_some());
    }
}

#[test]
fn runs_at_once_with_one_place_do_not_disturb_each_other() {
    let models = [model_of(FOUR_BITS), model_of(EIGHT_BITS)];
    let folder = folder();
    for _ in 0..3 {
        let spawn = |setting| quantize(&folder, setting).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let children = [FOUR_BITS, EIGHT_BITS, FOUR_BITS].map(spawn);
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        assert!(kept_model(&folder).is_some_and(|model| models.contains(&model)));
        assert_eq!(leftovers(&folder), BTreeSet::new());
    }
}

#[test]
fn a_full_disk_is_one_error_and_leaves_nothing() {
    let folder = folder();
    // A limit for each file in blocks of 512 bytes stands in for a full disk; zero refuses the first byte.
    let limited = |blocks: usize| {
        let mut command = in_folder(folder.path(), "sh");
        let script = format!("ulimit -f {blocks}; exec \"$0\" quantize e.yaml --quiet");
        ran(command.args(["-c", &script, BINARY]))
    };
    for had_earlier in [false, true] {
        let before = listing(folder.path());
        let model = kept_model(&folder);
        for blocks in [0, 1, 4, 8, 16] {
            let line = limited(blocks).refused(1).to_owned();
            assert!(line.contains("quantized.pt: cannot write the emitted model: File too large"), "{line}");
            assert_eq!(listing(folder.path()), before);
            assert_eq!(kept_model(&folder), model);
        }
        if !had_earlier {
            limited(4096).succeeded();
        }
    }
}

#[test]
fn a_disk_that_is_full_once_the_model_is_written_leaves_nothing_either() {
    let folder = folder();
    let mut command = in_folder(&shipped(""), BINARY);
    let dir = format!("output.dir={}", folder.path().join("run").display());
    command.args(["quantize", "configs/mnist_resnet.yaml", "--set", "calibration.samples=16", "--set", &dir]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    // The model is there by now, and 1500 rows are to be run before the report is written.
    assert!(stderr.by_ref().lines().map(Result::unwrap).any(|line| line.starts_with("evaluate")));
    let limit = ["--pid", &child.id().to_string(), "--fsize=100"];
    let limited = Command::new("prlimit").args(limit).output().unwrap();
    assert!(limited.status.success(), "{limited:?}");
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest}");
    assert!(rest.contains("report.json: cannot write the run directory: File too large"), "{rest}");
    assert_eq!(folder.listing(), ["e.yaml"]);
}

#[test]
fn a_read_only_folder_is_refused_before_anything_is_done() {
    let folder = folder();
    let read_only = folder.path().join("kept");
    fs_err::create_dir(&read_only).unwrap();
    fs_err::set_permissions(&read_only, PermissionsExt::from_mode(0o555)).unwrap();
    // No permission holds root back unless it gives up its capabilities.
    let is_root = fs_err::metadata(&read_only).unwrap().uid() == 0;
    let powerless = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", BINARY];
    let program = if is_root { &powerless[..] } else { &[BINARY] };
    for dry in [&["--dry-run"][..], &[]] {
        for dir in ["output.dir=kept/run", "output.dir=kept/a/b/run"] {
            let mut command = in_folder(folder.path(), program[0]);
            command.args(&program[1..]).args(["quantize", "e.yaml", "--quiet", "--set", dir]).args(dry);
            let line = ran(&mut command).refused(1).to_owned();
            assert!(line.contains("/kept") && line.contains("cannot write the run directory: "), "{line}");
            assert!(line.contains("Permission denied"), "{line}");
            assert_eq!(folder.listing(), ["e.yaml", "kept"]);
        }
    }
}

#[test]
fn a_run_is_as_open_to_others_as_the_user_has_it() {
    for (mask, folder_mode, file_mode) in [("002", 0o775, 0o664), ("027", 0o750, 0o640)] {
        let folder = folder();
        let mut command = in_folder(folder.path(), "sh");
        let script = format!("umask {mask}; exec \"$0\" quantize e.yaml --quiet");
        ran(command.args(["-c", &script, BINARY])).succeeded();
        let mode = |path: &str| fs_err::metadata(folder.path().join(path)).unwrap().mode() & 0o7777;
        assert_eq!(mode("run"), folder_mode);
        for file in FILES {
            assert_eq!(mode(&format!("run/{file}")), file_mode, "{file}");
        }
    }
}
