//! Tables for the terminal.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// A table with these column names; columns from the second on are right-aligned if `numbers`.
pub(super) fn table(header: &[&str], numbers: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    if numbers {
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// `1.4 MB`.
pub(super) fn bytes(count: u64) -> String {
    #[allow(clippy::cast_precision_loss)]
    let count_f = count as f64;
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", count_f / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count_f / 1e6),
        _ => format!("{:.2} GB", count_f / 1e9),
    }
}

/// `[32, 3, 3, 3]`.
pub(super) fn shape(shape: &[i64]) -> String {
    format!("{shape:?}")
}

/// `1 layer`, `3 layers`.
pub(super) fn count(number: usize, thing: &str) -> String {
    match (number, thing) {
        (1, _) => format!("1 {thing}"),
        (_, "op or value") => format!("{number} ops and values"),
        _ => format!("{number} {thing}s"),
    }
}

/// Text of a stranger's file as a terminal may show it: control characters escaped.
pub(super) fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("a\u{1b}[2Jé\u{9b}\n"), "a\\u{1b}[2Jé\\u{9b}\\n");
    }
}
