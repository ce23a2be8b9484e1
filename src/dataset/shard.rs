//! A part of the batches of a data set, so that several processes share the work.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One of several parts of equal size, give or take one batch, numbered from 0; written as `3/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    number: usize,
    count: usize,
}

/// A text that names no shard.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected NUMBER/COUNT with NUMBER from 0 to COUNT - 1, such as 3/16, found `{found}`")]
pub struct ShardError {
    found: String,
}

/// More shards than there are would be a slip.
const MOST: usize = 1 << 20;

impl Shard {
    /// All batches.
    pub const WHOLE: Self = Self { number: 0, count: 1 };

    /// Its number, from 0.
    #[must_use]
    pub fn number(self) -> usize {
        self.number
    }

    /// How many shards there are.
    #[must_use]
    pub fn count(self) -> usize {
        self.count
    }

    /// Which of so many batches are its own: neighbours, so that a file is read forwards.
    #[must_use]
    pub fn of(self, batches: usize) -> Range<usize> {
        let at = |number: usize| (batches as u128 * number as u128 / self.count as u128) as usize;
        at(self.number)..at(self.number + 1)
    }
}

impl FromStr for Shard {
    type Err = ShardError;

    fn from_str(text: &str) -> Result<Self, ShardError> {
        let shard = text.split_once('/').and_then(|(number, count)| {
            let shard = Self { number: number.trim().parse().ok()?, count: count.trim().parse().ok()? };
            (shard.number < shard.count && shard.count <= MOST).then_some(shard)
        });
        shard.ok_or_else(|| ShardError { found: text.to_owned() })
    }
}

impl TryFrom<String> for Shard {
    type Error = ShardError;

    fn try_from(text: String) -> Result<Self, ShardError> {
        text.parse()
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for text in ["0/1", "3/16", "15/16"] {
            assert_eq!(text.parse::<Shard>().unwrap().to_string(), text);
        }
        assert_eq!("0/1".parse(), Ok(Shard::WHOLE));
        for text in ["", "3", "16/16", "-1/2", "1/0", "a/b", "1/2/3", "99999999999999999999/2", "0/2000000"] {
            let error = text.parse::<Shard>().unwrap_err().to_string();
            assert!(error.ends_with(&format!("found `{text}`")), "{error}");
        }
    }

    #[test]
    fn every_batch_is_of_one_shard() {
        for (batches, count) in [(0, 3), (1, 1), (10, 3), (16, 16), (5, 16), (1000, 7)] {
            let shards: Vec<_> = (0..count).map(|number| Shard { number, count }.of(batches)).collect();
            assert_eq!((shards[0].start, shards[count - 1].end), (0, batches));
            assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start));
            let lengths = || shards.iter().map(ExactSizeIterator::len);
            assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        }
    }
}
