//! Statistics of shards, and of scores in shards, as those of the whole. It refuses what are no shards of one calibration.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use super::scores::NamedScores;
use super::statistics::{Kept, KeptScores};
use crate::dataset::Shard;
use crate::hessian::Scores;
use crate::pipeline::Error;

/// Missing shards that are named; more are counted only.
const NAMED: usize = 10;

impl Kept {
    /// The statistics of the whole from those of all shards, in any order.
    ///
    /// # Errors
    /// Where a shard is missing, is there twice, or is of something else.
    pub(in crate::pipeline) fn merged(mut parts: Vec<Self>, path: PathBuf) -> Result<Self, Error> {
        // Shards of scores are of one calibration that was merged before.
        let by_scores = parts.iter().any(|part| part.scores.as_ref().is_some_and(|kept| kept.shard != Shard::WHOLE));
        let shard = |part: &Self| match &part.scores {
            Some(kept) if by_scores => kept.shard,
            _ => part.shard,
        };
        parts.sort_by_key(|part| shard(part).number());
        let Some(first) = parts.first() else { return Err(Error::NothingToMerge) };
        let count = shard(first).count();
        for (number, part) in parts.iter().enumerate() {
            part.refuse_unlike(first, by_scores)?;
            let own = shard(part);
            if own.count() != count {
                return Err(Error::ShardsOfOther {
                    paths: [first.path.clone(), part.path.clone()],
                    shards: [shard(first), own],
                });
            }
            if number > 0 && parts.get(number - 1).is_some_and(|before| shard(before) == own) {
                let paths = [parts[number - 1].path.clone(), part.path.clone()];
                return Err(Error::ShardTwice { paths, shard: own });
            }
        }
        let found: BTreeSet<usize> = parts.iter().map(|part| shard(part).number()).collect();
        let mut missing = (0..count).filter(|number| !found.contains(number));
        let named: Vec<String> = missing.by_ref().take(NAMED).map(|number| format!("{number}/{count}")).collect();
        if !named.is_empty() {
            let rest = missing.count();
            let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            return Err(Error::ShardsMissing { missing: named.join(", ") + &rest });
        }
        if by_scores { Self::merged_scores(parts, path) } else { Self::merged_statistics(parts, path) }
    }

    /// An error where the parts cannot be parts of one calibration, or of its scores.
    fn refuse_unlike(&self, first: &Self, by_scores: bool) -> Result<(), Error> {
        let unlike =
            |what: &str| Err(Error::Unlike { paths: [first.path.clone(), self.path.clone()], what: what.to_owned() });
        let names =
            |of: &Self| of.sites.iter().map(|(name, anchors)| (name.clone(), anchors.len())).collect::<Vec<_>>();
        if let Some((what, [a, b])) = first.key.difference(&self.key) {
            return unlike(&format!("{what} ({a} and {b})"));
        }
        if self.rows != first.rows || self.seen != first.seen {
            return unlike("rows");
        }
        if names(self) != names(first) {
            return unlike("sites, as the experiments leave other values float");
        }
        let layers = |of: &Self| of.inputs.iter().map(|sum| sum.layer.clone()).collect::<Vec<_>>();
        if layers(self) != layers(first) {
            return unlike("layers");
        }
        let requests = |of: &Self| of.scores.as_ref().map(|kept| (kept.request.clone(), kept.named.names.clone()));
        if by_scores && (self.shard != Shard::WHOLE || requests(self) != requests(first)) {
            return unlike("Hessian scores");
        }
        let is_equal = self.sites == first.sites && self.inputs == first.inputs;
        if by_scores && !is_equal { unlike("statistics") } else { Ok(()) }
    }

    fn merged_statistics(parts: Vec<Self>, path: PathBuf) -> Result<Self, Error> {
        let mut parts = parts.into_iter();
        let Some(mut whole) = parts.next() else { return Err(Error::NothingToMerge) };
        for part in parts {
            for ((_, own), (_, other)) in whole.sites.iter_mut().zip(&part.sites) {
                own.iter_mut().zip(other).for_each(|(own, other)| own.merge(other));
            }
            for (own, other) in whole.inputs.iter_mut().zip(&part.inputs) {
                let merged = own.merge(other);
                let reason = || format!("the sums of {} have another shape than in other shards", own.layer);
                merged.ok_or_else(|| part.damaged(reason()))?;
            }
            whole.threads = whole.threads.max(part.threads);
        }
        Ok(Self { path, shard: Shard::WHOLE, ..whole })
    }

    fn merged_scores(parts: Vec<Self>, path: PathBuf) -> Result<Self, Error> {
        let mut scores = Vec::new();
        let mut whole: Option<Self> = None;
        for mut part in parts {
            if let Some(kept) = part.scores.take() {
                scores.push(kept);
            }
            whole.get_or_insert(part);
        }
        let Some(whole) = whole else { return Err(Error::NothingToMerge) };
        let first = scores.first().map(|kept| (kept.request.clone(), kept.named.names.clone()));
        let Some((request, names)) = first else { return Err(Error::NothingToMerge) };
        let batch_rows = request.get("batch_size").and_then(Value::as_u64).and_then(|rows| usize::try_from(rows).ok());
        let parts = scores.into_iter().map(|kept| kept.named.scores).collect();
        let scores = Scores::merged(parts, batch_rows.unwrap_or(1))?;
        let kept = KeptScores { request, shard: Shard::WHOLE, named: NamedScores { names, scores } };
        Ok(Self { path, scores: Some(kept), ..whole })
    }
}
