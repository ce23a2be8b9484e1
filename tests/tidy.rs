//! The layering of ARCHITECTURE.md and the house rules, executed on the sources: who may know whom, where unsafe code and
//! terminal drawing live, how a file begins and how long it may be. Each rule is also shown a small text that breaks it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Modules of plain data: no tensor, no module that knows one.
const PLAIN: &[&str] = &["budget", "config", "settings", "quantizer", "statistics", "threshold", "report"];
/// Modules that know tensors, and so may not be known to plain data.
const WITH_TENSORS: &[&str] =
    &["jit", "dataset", "feed", "observe", "simulate", "hessian", "correct", "emit", "evaluate", "pipeline", "cli"];
/// Crates that plain data may not mention.
const TENSOR_CRATES: &[&str] = &["tch", "cxx", "torch_sys"];
/// The only siblings that these modules may know.
const KNOWS_ONLY: &[(&str, &[&str])] = &[
    ("budget", &["quantizer"]),
    ("quantizer", &[]),
    ("statistics", &["quantizer"]),
    ("threshold", &["statistics", "quantizer"]),
];
const MOST_LINES: usize = 700;

/// A source file: its path from the root of the repository, with `/`, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The top-level module that the file belongs to: `jit` for `src/jit.rs` and for `src/jit/value.rs`.
    fn module(&self) -> &str {
        let inside = self.path.strip_prefix("src/").unwrap_or_default();
        inside.split(['/', '.']).next().unwrap_or_default()
    }

    fn is_under(&self, folder: &str) -> bool {
        self.path.starts_with(folder)
    }

    fn tokens(&self) -> Vec<String> {
        tokens(&self.text)
    }

    /// Whether the module has a file of that name inside.
    fn has_part(&self, name: &str) -> bool {
        is_file(&format!("src/{}/{name}.rs", self.module()))
    }

    /// Siblings that the code names: what follows `crate::` or `tsquant::`, also in braces.
    fn siblings(&self) -> BTreeSet<String> {
        let tokens = self.tokens();
        let mut found = BTreeSet::new();
        for (index, token) in tokens.iter().enumerate() {
            // `pub(crate)` is followed by a bracket, not by `::`.
            if matches!(token.as_str(), "crate" | "tsquant") && tokens.get(index + 1).is_some_and(|next| next == "::") {
                found.extend(heads(&tokens[index + 2..]));
            }
        }
        // In `src/NAME.rs` the root is one `super` away; inside its `mod tests` that is the module itself.
        if self.path.matches('/').count() == 1 {
            let supers = tokens.windows(3).enumerate().filter(|(_, window)| window[0] == "super" && window[1] == "::");
            let names = supers.flat_map(|(index, _)| heads(&tokens[index + 2..]));
            found.extend(names.filter(|name| is_file(&format!("src/{name}.rs")) && !self.has_part(name)));
        }
        found.remove(self.module());
        found
    }
}

fn is_file(path: &str) -> bool {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).is_file()
}

/// The first names of a path or of the paths in a brace.
fn heads(tokens: &[String]) -> Vec<String> {
    if tokens.first().is_none_or(|first| first != "{") {
        return tokens.first().cloned().into_iter().collect();
    }
    let mut depth = 0;
    let mut found = Vec::new();
    for pair in tokens.windows(2) {
        match pair[0].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if depth == 1 && matches!(pair[0].as_str(), "{" | ",") {
            found.push(pair[1].clone());
        }
    }
    found
}

/// Words, `::`, and single signs of the code: comments and strings left out.
fn tokens(text: &str) -> Vec<String> {
    let code = code_of(text);
    let mut found = Vec::<String>::new();
    let mut in_word = false;
    for sign in code.chars() {
        let is_word = sign.is_alphanumeric() || sign == '_';
        match found.last_mut() {
            Some(last) if in_word && is_word => last.push(sign),
            Some(last) if sign == ':' && last == ":" => last.push(sign),
            _ if sign.is_whitespace() => {}
            _ => found.push(sign.to_string()),
        }
        in_word = is_word;
    }
    found
}

/// The text with comments, strings and characters blanked.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = comment(rest).or_else(|| raw_string(rest)).or_else(|| string(rest)).or_else(|| character(rest));
        match skipped {
            Some(length) => {
                code.push(' ');
                rest = &rest[length..];
            }
            // A word as a whole, so that the `r` of `for"…"` is not taken for the start of a raw string.
            None => {
                let is_word = |sign: char| sign.is_alphanumeric() || sign == '_';
                let word = rest.find(|sign| !is_word(sign)).unwrap_or(rest.len()).max(first.len_utf8());
                code.push_str(&rest[..word]);
                rest = &rest[word..];
            }
        }
    }
    code
}

fn comment(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    let inside = text.strip_prefix("/*")?;
    Some(inside.find("*/").map_or(text.len(), |end| end + 4))
}

fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    let inside = after[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&end).map_or(inside.len(), |at| at + end.len());
    Some(text.len() - inside.len() + length)
}

fn string(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('"')?;
    let mut escaped = false;
    let end = inside.find(|sign| {
        let ends = sign == '"' && !escaped;
        escaped = sign == '\\' && !escaped;
        ends
    });
    Some(end.map_or(text.len(), |end| end + 2))
}

/// `'x'` or `'\n'`, not the lifetime `'a`.
fn character(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    if let Some(escape) = inside.strip_prefix('\\') {
        let after = escape.chars().next()?.len_utf8();
        return Some(escape[after..].find('\'')? + after + 3);
    }
    let sign = inside.chars().next()?.len_utf8();
    inside[sign..].starts_with('\'').then_some(sign + 2)
}

fn plain_data_knows_no_tensors(source: &Source) -> Vec<String> {
    let module = source.module();
    if !PLAIN.contains(&module) {
        return Vec::new();
    }
    let crates = source.tokens().into_iter().filter(|token| TENSOR_CRATES.contains(&token.as_str()));
    let siblings = source.siblings();
    // A report repeats what is left float, settings are those of sites; `sites` itself reads the listing of `jit`.
    let siblings = siblings.into_iter().filter(|name| {
        WITH_TENSORS.contains(&name.as_str()) || (name == "sites" && !matches!(module, "report" | "settings"))
    });
    crates.chain(siblings).map(|name| format!("{}: plain data mentions {name}", source.path)).collect()
}

fn lower_layers_know_only_theirs(source: &Source) -> Vec<String> {
    let Some((_, allowed)) = KNOWS_ONLY.iter().find(|(module, _)| *module == source.module()) else {
        return Vec::new();
    };
    let siblings = source.siblings();
    let others = siblings.iter().filter(|name| !allowed.contains(&name.as_str()));
    others.map(|name| format!("{}: {} may not know {name}", source.path, source.module())).collect()
}

fn nothing_but_cli_knows_pipeline(source: &Source) -> Vec<String> {
    known_only_to(source, "pipeline", "cli")
}

fn nothing_but_main_knows_cli(source: &Source) -> Vec<String> {
    known_only_to(source, "cli", "main")
}

fn known_only_to(source: &Source, name: &str, module: &str) -> Vec<String> {
    let breaks = source.is_under("src/") && source.module() != module && source.siblings().contains(name);
    breaks.then(|| format!("{}: only {module} may know {name}", source.path)).into_iter().collect()
}

fn unsafe_lives_in_jit(source: &Source) -> Vec<String> {
    lives_in(source, &["unsafe", "unsafe_code"], "src/jit/")
}

fn drawing_lives_in_cli(source: &Source) -> Vec<String> {
    lives_in(source, &["indicatif", "comfy_table"], "src/cli/")
}

fn lives_in(source: &Source, words: &[&str], folder: &str) -> Vec<String> {
    if source.is_under(folder) {
        return Vec::new();
    }
    let found: BTreeSet<_> = source.tokens().into_iter().filter(|token| words.contains(&token.as_str())).collect();
    found.into_iter().map(|word| format!("{}: `{word}` belongs under {folder}", source.path)).collect()
}

fn opens_with_its_purpose(source: &Source) -> Vec<String> {
    let opens = source.text.starts_with("//!");
    (!opens).then(|| format!("{}: expected `//!` in the first line", source.path)).into_iter().collect()
}

fn is_not_too_long(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    let too_long = lines > MOST_LINES;
    too_long.then(|| format!("{}: {lines} lines, at most {MOST_LINES}", source.path)).into_iter().collect()
}

fn leaves_nothing_undone(source: &Source) -> Vec<String> {
    let tokens = source.tokens();
    let undone = |pair: &&[String]| {
        (matches!(pair[0].as_str(), "todo" | "unimplemented" | "dbg") && pair[1] == "!")
            || (pair[0] == "[" && pair[1] == "ignore")
    };
    tokens.windows(2).filter(undone).map(|pair| format!("{}: {}{}", source.path, pair[0], pair[1])).collect()
}

/// All sources of the library, the binary, the build script and the tests.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = vec![root.join("build.rs")];
    for folder in ["src", "tests"] {
        collect(&root.join(folder), &mut paths);
    }
    let read = |path: PathBuf| {
        let inside = path.strip_prefix(root).expect("a path below the root");
        let parts: Vec<_> = inside.iter().map(|part| part.to_str().expect("a UTF-8 name")).collect();
        Source { path: parts.join("/"), text: std::fs::read_to_string(&path).expect("a readable source") }
    };
    let sources: Vec<_> = paths.into_iter().map(read).collect();
    assert!(sources.iter().any(|source| source.path == "src/lib.rs"), "the sources were not found");
    sources
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

#[track_caller]
fn holds(rule: fn(&Source) -> Vec<String>) {
    let broken: Vec<_> = sources().iter().flat_map(rule).collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[track_caller]
fn breaks(rule: fn(&Source) -> Vec<String>, path: &str, text: &str) {
    let source = Source { path: path.to_owned(), text: text.to_owned() };
    assert!(!rule(&source).is_empty(), "{path} should break the rule:\n{text}");
}

#[track_caller]
fn keeps(rule: fn(&Source) -> Vec<String>, path: &str, text: &str) {
    let source = Source { path: path.to_owned(), text: text.to_owned() };
    assert_eq!(rule(&source), Vec::<String>::new(), "{path} keeps the rule:\n{text}");
}

#[test]
fn plain_data() {
    holds(plain_data_knows_no_tensors);
    breaks(plain_data_knows_no_tensors, "src/config/plan.rs", "use tch::Tensor;");
    breaks(plain_data_knows_no_tensors, "src/statistics.rs", "fn read(x: &cxx::UniquePtr<u8>) {}");
    breaks(plain_data_knows_no_tensors, "src/report/text.rs", "use crate::jit::Output;");
    breaks(plain_data_knows_no_tensors, "src/report.rs", "use crate::{config, evaluate::{self, Evaluation}};");
    breaks(plain_data_knows_no_tensors, "src/threshold.rs", "use super::dataset;");
    breaks(plain_data_knows_no_tensors, "src/config.rs", "use crate::sites::Sites;");
    keeps(plain_data_knows_no_tensors, "src/report.rs", "//! See [`jit`](crate::jit).\nuse crate::sites::LeftFloat;");
    keeps(plain_data_knows_no_tensors, "src/config.rs", "const ADVICE: &str = \"no tch::Tensor here\";");
    keeps(plain_data_knows_no_tensors, "src/observe.rs", "use tch::Tensor; use crate::jit;");
}

#[test]
fn lower_layers() {
    holds(lower_layers_know_only_theirs);
    breaks(lower_layers_know_only_theirs, "src/quantizer/params.rs", "use crate::statistics::MinMax;");
    breaks(lower_layers_know_only_theirs, "src/statistics.rs", "use crate::threshold;");
    breaks(lower_layers_know_only_theirs, "src/threshold/mse.rs", "use crate::{config::Plan, quantizer};");
    keeps(lower_layers_know_only_theirs, "src/threshold.rs", "use crate::{quantizer::{self, Grid}, statistics};");
    breaks(lower_layers_know_only_theirs, "src/statistics.rs", "use super::{quantizer, report};");
    keeps(lower_layers_know_only_theirs, "src/threshold.rs", "mod tests { use super::*; use super::select::f; }");
    keeps(lower_layers_know_only_theirs, "src/threshold/select.rs", "use crate::threshold::Selection;");
    keeps(lower_layers_know_only_theirs, "src/quantizer/threshold.rs", "pub(crate) fn f() {} use super::params;");
}

#[test]
fn pipeline_and_cli_are_on_top() {
    holds(nothing_but_cli_knows_pipeline);
    holds(nothing_but_main_knows_cli);
    breaks(nothing_but_cli_knows_pipeline, "src/emit.rs", "use crate::pipeline::MODEL_FILE;");
    breaks(nothing_but_cli_knows_pipeline, "src/observe.rs", "fn f() { crate::pipeline::quantize(); }");
    breaks(nothing_but_main_knows_cli, "src/pipeline/select.rs", "use crate::{cli::Progress, jit};");
    keeps(nothing_but_cli_knows_pipeline, "src/cli/quantize.rs", "use crate::pipeline;");
    keeps(nothing_but_cli_knows_pipeline, "src/lib.rs", "pub mod pipeline; pub mod cli;");
    keeps(nothing_but_main_knows_cli, "src/main.rs", "fn main() { tsquant::cli::main() }");
}

#[test]
fn unsafe_code_and_drawing_have_their_place() {
    holds(unsafe_lives_in_jit);
    holds(drawing_lives_in_cli);
    breaks(unsafe_lives_in_jit, "src/dataset/npy.rs", "fn f(p: *const u8) -> u8 { unsafe { *p } }");
    breaks(unsafe_lives_in_jit, "src/jit.rs", "#![allow(unsafe_code)]");
    keeps(unsafe_lives_in_jit, "src/jit/tensor.rs", "unsafe { &*pointer }");
    keeps(unsafe_lives_in_jit, "src/dataset/array.rs", "// no unsafe here\nlet word = \"unsafe\";");
    breaks(drawing_lives_in_cli, "src/report/text.rs", "use comfy_table::Table;");
    breaks(drawing_lives_in_cli, "src/observe.rs", "let bar = indicatif::ProgressBar::new(1);");
    keeps(drawing_lives_in_cli, "src/cli/table.rs", "use comfy_table::Table;");
}

#[test]
fn files_say_what_they_are_for_and_stay_short() {
    holds(opens_with_its_purpose);
    holds(is_not_too_long);
    breaks(opens_with_its_purpose, "src/new.rs", "use std::fmt;\n//! Too late.");
    keeps(opens_with_its_purpose, "src/new.rs", "//! What it is for.\n");
    breaks(is_not_too_long, "src/new.rs", &"\n".repeat(MOST_LINES + 1));
    keeps(is_not_too_long, "src/new.rs", &"\n".repeat(MOST_LINES));
}

#[test]
fn nothing_is_left_undone() {
    holds(leaves_nothing_undone);
    breaks(leaves_nothing_undone, "src/new.rs", "fn f() { todo!() }");
    breaks(leaves_nothing_undone, "src/new.rs", "fn f() { unimplemented!(\"later\") }");
    breaks(leaves_nothing_undone, "tests/new.rs", "let x = dbg!(1);");
    breaks(leaves_nothing_undone, "tests/new.rs", "#[test]\n#[ignore = \"slow\"]\nfn f() {}");
    keeps(leaves_nothing_undone, "src/new.rs", "fn ignore() {} // todo!() was here");
}

#[test]
fn code_is_told_from_comments_and_strings() {
    let text = "a /* b \" */ c // d\n\"e \\\" f\" g r#\"h \" i\"# j '\\'' k '\"' l<'m> 'n' for_r\"o\" b\"p\" q";
    assert_eq!(tokens(text).join(" "), "a c g j k l < ' m > for_r b q");
    assert_eq!(tokens("x::y : z").join(" "), "x :: y : z");
}
