//! The nearest valid name for one that was mistyped.

/// `, did you mean `x`?` for the candidate nearest to `name`, or nothing where none is near.
#[must_use]
pub fn did_you_mean<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    // Names come from files too, and belong on one line.
    let on_one_line =
        |found: &str| found.chars().map(|sign| if sign.is_control() { ' ' } else { sign }).collect::<String>();
    nearest(name, candidates).map(|found| format!(", did you mean `{}`?", on_one_line(found))).unwrap_or_default()
}

/// The candidate nearest to `name`, if one is near enough to be meant.
#[must_use]
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// Jaro-Winkler similarity from which a name is likely a slip of another.
    const NEAR: f64 = 0.75;
    let scored = candidates.into_iter().map(|candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= NEAR).then_some(best.1)
}
