//! Damaged TorchScript files, through the real loader: they run or are refused, and never end the process. libtorch may end
//! it, so the files are made and loaded in children of this test, which say how far they have come.

mod common;
mod damage;

use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use tsquant::jit::Module;
use tsquant::sites;
use zip::CompressionMethod;

use common::TEST_MODELS;
use damage::{Random, damaged, zip};

/// What the children are asked to do: `KIND FIRST END`.
const TASK: &str = "TSQUANT_TEST_DAMAGED_MODELS";
/// The name of the test that does it.
const CHILD: &str = "loads_what_it_is_asked_to";
/// After this long without a word a child hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is done to a file.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// The file as a whole: what disks, networks and interrupted copies do.
    File,
    /// One part of the archive, with a checksum that fits: what only somebody does who wants to.
    Part,
}

/// A model, and one damaged copy of it.
fn copy_of_a_model(kind: Kind, number: usize) -> Vec<u8> {
    let model = TEST_MODELS[number % TEST_MODELS.len()];
    let bytes = fs_err::read(model.path()).unwrap();
    let mut random = Random(number as u64);
    match kind {
        Kind::File if random.below(4) == 0 => bytes[..random.below(bytes.len())].to_vec(),
        Kind::File => damaged(&bytes, &mut random),
        Kind::Part => with_a_damaged_part(&bytes, &mut random),
    }
}

fn with_a_damaged_part(archive: &[u8], random: &mut Random) -> Vec<u8> {
    let mut entries = unpacked(archive);
    // The pickles and the code more often than the many tensors.
    let is_structure = |name: &str| name.ends_with(".pkl") || name.ends_with(".py");
    let structure: Vec<usize> = (0..entries.len()).filter(|&index| is_structure(&entries[index].0)).collect();
    let chosen = match random.below(5) {
        0 => random.below(entries.len()),
        _ => structure[random.below(structure.len())],
    };
    entries[chosen].1 = damaged(&entries[chosen].1, random);
    packed(&entries)
}

fn packed(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<(&str, &[u8])> = entries.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    zip(&entries, CompressionMethod::Stored)
}

/// The parts of an archive.
fn unpacked(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(archive)).unwrap();
    let mut entries: Vec<(String, Vec<u8>)> = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        entries.push((entry.name().unwrap().into_owned(), bytes));
    }
    entries
}

/// What `tsquant inspect` does with a file; true where it is refused.
fn is_refused(path: &Path) -> bool {
    let inspected = Module::load(path).and_then(|module| {
        module.tensors()?;
        module.op_counts()?;
        let clean = module.clean(None)?;
        let _ = sites::find(clean.listing());
        Ok(())
    });
    let Err(error) = inspected else { return false };
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "expected one line: {line:?}");
    true
}

/// The child: nothing to do unless its parent asks.
#[test]
fn loads_what_it_is_asked_to() {
    let Ok(task) = std::env::var(TASK) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    let kind = if words[0] == "File" { Kind::File } else { Kind::Part };
    let (first, end): (usize, usize) = (words[1].parse().unwrap(), words[2].parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    for number in first..end {
        println!("\n@begin {number}");
        std::io::stdout().flush().unwrap();
        fs_err::write(&path, copy_of_a_model(kind, number)).unwrap();
        println!("\n@end {}", is_refused(&path));
    }
}

/// How a number of copies fared.
#[derive(Debug, Default)]
struct Fate {
    tried: usize,
    refused: usize,
    /// The copies that ended the process, and how.
    fatal: Vec<String>,
}

impl Fate {
    /// Has children load the copies, a new one after each that did not survive.
    fn of(kind: Kind, mut numbers: Range<usize>) -> Self {
        let mut fate = Self::default();
        while !numbers.is_empty() {
            let last = fate.follow_child(kind, &numbers);
            numbers.start = last + 1;
        }
        fate
    }

    /// The number of the last copy that the child came to.
    fn follow_child(&mut self, kind: Kind, numbers: &Range<usize>) -> usize {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", CHILD, "--nocapture", "--test-threads=1"])
            .env(TASK, format!("{kind:?} {} {}", numbers.start, numbers.end))
            .env("OMP_NUM_THREADS", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, told) = mpsc::channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        let mut errors = child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = errors.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let mut last = numbers.start;
        let mut hangs = false;
        loop {
            match told.recv_timeout(PATIENCE) {
                Ok(line) => match line.split_once(' ') {
                    Some(("@begin", number)) => {
                        last = number.parse().unwrap();
                        self.tried += 1;
                    }
                    Some(("@end", refused)) => self.refused += usize::from(refused == "true"),
                    _ => {}
                },
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    hangs = true;
                    child.kill().unwrap();
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = child.wait().unwrap();
        reader.join().unwrap();
        let errors = errors.join().unwrap();
        if hangs || !status.success() {
            let model = TEST_MODELS[last % TEST_MODELS.len()].name;
            let said: String =
                errors.lines().filter(|line| !line.trim().is_empty()).take(3).collect::<Vec<_>>().join(" / ");
            let how = if hangs { "hangs".to_owned() } else { status.to_string() };
            self.fatal.push(format!("{kind:?} {last} of {model}: {how}: {said}"));
        }
        last
    }
}

#[test]
fn damaged_files_are_refused_or_run() {
    let fate = Fate::of(Kind::File, 0..1500);
    println!("{} damaged files, {} refused", fate.tried, fate.refused);
    assert!(fate.fatal.is_empty(), "{}", fate.fatal.join("\n"));
    assert!(fate.tried == 1500 && fate.refused > fate.tried / 2, "{fate:?}");
}

#[test]
fn damaged_parts_with_fitting_checksums_are_refused_or_run() {
    let fate = Fate::of(Kind::Part, 0..600);
    println!("{} damaged parts, {} refused", fate.tried, fate.refused);
    assert!(fate.fatal.is_empty(), "{}", fate.fatal.join("\n"));
    assert!(fate.tried == 600 && fate.refused > fate.tried / 3, "{fate:?}");
}

#[test]
fn archives_made_to_exhaust_or_deceive_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    let refusal = |bytes: &[u8]| {
        fs_err::write(&path, bytes).unwrap();
        Module::load(&path).err().expect("a refusal").to_string()
    };
    let zeros = vec![0; 64 << 20];
    let parts: [(&str, &[u8]); 3] = [("m/constants.pkl", b"."), ("m/code/m.py", b""), ("m/data/0", &zeros)];
    let line = refusal(&zip(&parts, CompressionMethod::Deflated));
    assert!(line.contains("unpacks to far more than TorchScript does"), "{line}");
    // Two entries of one name: whoever checks one may load the other.
    let parts: [(&str, &[u8]); 3] = [("m/constants.pkl", b"."), ("m/code/m.py", b"1"), ("m/code/n.py", b"2")];
    let mut twice = zip(&parts, CompressionMethod::Stored);
    while let Some(at) = twice.windows(11).position(|window| window == b"m/code/n.py") {
        twice[at + 7] = b'm';
    }
    let line = refusal(&twice);
    assert!(line.contains("a zip archive that holds one name twice"), "{line}");
}

#[test]
fn tensors_that_reach_out_of_their_bytes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    let mut refused = 0;
    for model in TEST_MODELS {
        let entries = unpacked(&fs_err::read(model.path()).unwrap());
        let tensors = |name: &str| name.contains("/data/") || name.contains("/constants/");
        for index in (0..entries.len()).filter(|&index| tensors(&entries[index].0)) {
            let mut fewer = entries.clone();
            let length = fewer[index].1.len();
            fewer[index].1.truncate(length.saturating_sub(1));
            if length == 0 {
                continue;
            }
            fs_err::write(&path, packed(&fewer)).unwrap();
            let line = Module::load(&path).err().map(|error| error.to_string());
            let line = line.unwrap_or_else(|| panic!("{} of {} is not refused", fewer[index].0, model.name));
            assert!(line.contains("expected tensors inside their bytes, found one of shape"), "{line}");
            refused += 1;
        }
    }
    assert!(refused > 100, "{refused}");
}
