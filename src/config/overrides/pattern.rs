//! What an entry selects by: patterns of layer names, where `*` stops at a dot and `**` does not, and names of ops.
//!
//! Crates for globs are made for paths: there `**` has to be a whole part of a path.

use std::fmt;

use super::super::error::shortened;

/// A pattern of layer names. `*` stands for any text without a dot, `**` for any text, anything else for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPattern {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Sign(char),
    WithoutDot,
    Any,
}

impl LayerPattern {
    /// Reads a pattern; every text is one.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut parts = Vec::new();
        for sign in text.chars() {
            match (sign, parts.last()) {
                ('*', Some(Part::WithoutDot | Part::Any)) => {
                    parts.pop();
                    parts.push(Part::Any);
                }
                ('*', _) => parts.push(Part::WithoutDot),
                (sign, _) => parts.push(Part::Sign(sign)),
            }
        }
        Self { text: text.to_owned(), parts }
    }

    /// As typed.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the whole of `name` fits.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        // reached[i]: what was read so far fits the first i parts.
        let mut reached = vec![false; self.parts.len() + 1];
        reached[0] = true;
        self.skip_stars(&mut reached);
        for sign in name.chars() {
            let mut next = vec![false; reached.len()];
            for (index, part) in self.parts.iter().enumerate().filter(|(index, _)| reached[*index]) {
                match part {
                    Part::Sign(expected) => next[index + 1] |= *expected == sign,
                    Part::WithoutDot => next[index] |= sign != '.',
                    Part::Any => next[index] = true,
                }
            }
            self.skip_stars(&mut next);
            reached = next;
        }
        reached.last().copied().unwrap_or_default()
    }

    /// A star may stand for nothing.
    fn skip_stars(&self, reached: &mut [bool]) {
        for (index, part) in self.parts.iter().enumerate() {
            reached[index + 1] |= reached[index] && !matches!(part, Part::Sign(_));
        }
    }
}

impl fmt::Display for LayerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shortened(&self.text))
    }
}

/// The name of a TorchScript op, `aten::conv2d` or short `conv2d`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpName(String);

impl OpName {
    /// Takes any text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// As typed.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether it names `op`, which is given in full.
    #[must_use]
    pub fn names(&self, op: &str) -> bool {
        op == self.0 || op.strip_prefix("aten::") == Some(&self.0)
    }
}

impl fmt::Display for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shortened(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_star_stops_at_a_dot_and_two_do_not() {
        let cases = [
            ("fc", "fc", true),
            ("fc", "fc2", false),
            ("fc", "head.fc", false),
            ("*", "fc", true),
            ("*", "layer1.0", false),
            ("layer1.*", "layer1.0", true),
            ("layer1.*", "layer1.", true),
            ("layer1.*", "layer1.0.conv1", false),
            ("layer1.*.conv1", "layer1.0.conv1", true),
            ("layer*.conv1", "layer1.0.conv1", false),
            ("layer**conv1", "layer1.0.conv1", true),
            ("**.conv1", "layer1.0.conv1", true),
            ("**.conv1", "conv1", false),
            ("**conv1", "conv1", true),
            ("**", "layer1.0.conv1", true),
            ("**", "", true),
            ("***.c*1", "layer1.0.conv1", true),
            ("*.*.*", "layer1.0.conv1", true),
            ("*.*.*", "layer1.0", false),
            ("shared#2", "shared#2", true),
            ("shared*", "shared#2", true),
            ("conv?", "conv1", false),
            ("conv[1]", "conv1", false),
            ("", "conv1", false),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(LayerPattern::new(pattern).fits(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        assert!(!LayerPattern::new(&"*a**".repeat(200)).fits(&"a.".repeat(150)));
    }

    /// The definition, without care for time.
    fn fits(pattern: &[char], name: &[char]) -> bool {
        match (pattern, name) {
            (['*', '*', rest @ ..], _) => (0..=name.len()).any(|taken| fits(rest, &name[taken..])),
            (['*', rest @ ..], _) => {
                let most = name.iter().position(|&sign| sign == '.').unwrap_or(name.len());
                (0..=most).any(|taken| fits(rest, &name[taken..]))
            }
            ([sign, rest @ ..], [first, others @ ..]) => sign == first && fits(rest, others),
            (_, _) => pattern.is_empty() && name.is_empty(),
        }
    }

    proptest! {
        #[test]
        fn fits_by_definition(pattern in "[ab.*]{0,8}", name in "[ab.]{0,8}") {
            let signs = |text: &str| text.chars().collect::<Vec<char>>();
            prop_assert_eq!(LayerPattern::new(&pattern).fits(&name), fits(&signs(&pattern), &signs(&name)));
        }
    }

    #[test]
    fn ops_go_by_either_name() {
        let op = |text: &str| OpName::new(text.to_owned());
        assert!(op("conv2d").names("aten::conv2d") && op("aten::conv2d").names("aten::conv2d"));
        assert!(!op("conv2d").names("aten::conv1d") && !op("2d").names("aten::conv2d"));
        assert!(!op("conv2d").names("quantized::conv2d") && op("quantized::conv2d").names("quantized::conv2d"));
    }
}
