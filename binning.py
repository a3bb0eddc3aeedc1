"""Quantile bins: raw reward scores -> levels s in [0, 1], which is how the network sees a reward.

Paper, "Bins": each score is replaced by its quantile bin (B = 64), so that levels are equally
populated: a rank, free of the reward's scale. s = bin / (B-1), and 1 is the best bin.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rewards
from data import Data, Parser, UserError, between, hold, read_json, run, write_json

PARTS = ("edges", "low", "high", "std")


@dataclass(frozen=True)
class Bins:
    """What `fit` learnt. Column r of every array of scores or levels belongs to names[r]."""
    names: tuple
    edges: np.ndarray      # (R, B-1) float64, interior quantile edges, each row ascends
    low: np.ndarray        # (R,) float64, the smallest fitted score
    high: np.ndarray       # (R,) float64, the largest
    std: np.ndarray        # (R,) float64, their standard deviation
    digest: str = ""       # of the fitted scores: fingerprint

    def place(self, r: int, value: np.ndarray) -> np.ndarray:
        """Scores (...) of reward r, float64 → bins (...) int64; NaN: the last. Not in the paper:
        ties. A value that many samples share covers the bins left..right; it takes the place that
        divides these as it divides the others, so the smallest value is bin 0 and the largest is
        bin B-1, however many samples have it."""
        left = np.searchsorted(self.edges[r], value, side="left")      # how many edges < value
        right = np.searchsorted(self.edges[r], value, side="right")    # how many edges <= value
        others = left + self.edges.shape[1] - right                    # bins it does not cover
        # On every edge: the ends decide. A constant is both, and the best, as the target 1 asks.
        alone = np.where(value >= self.high[r], 1.0, np.where(value <= self.low[r], 0.0, 0.5))
        below = np.where(others > 0, left / np.maximum(others, 1), alone)
        return left + np.rint((right - left) * below).astype(np.int64)

    def to_target(self, raw: np.ndarray) -> np.ndarray:
        """Scores (..., R) → levels s (..., R) float32 in [0, 1]; where there is no score: NaN."""
        raw = np.asarray(raw, np.float64)
        assert raw.shape[-1] == len(self.names), (raw.shape, self.names)
        bins = np.stack([self.place(r, raw[..., r]) for r in range(len(self.names))], -1)
        return np.where(np.isnan(raw), np.nan, bins / self.edges.shape[1]).astype(np.float32)

    def select(self, names) -> "Bins":
        """The bins of some of the rewards, in the order given."""
        r = [self.names.index(name) for name in names]
        return Bins(tuple(names), *(getattr(self, part)[r] for part in PARTS), self.digest)

    def to_config(self) -> dict:
        """Plain lists and strings, for bins.json and for a checkpoint's config.json."""
        parts = {part: getattr(self, part).tolist() for part in PARTS}
        return {"names": list(self.names), **parts, "digest": self.digest}

    @staticmethod
    def from_config(config: dict) -> "Bins":
        """The inverse of to_config."""
        parts = (np.array(config[part], np.float64) for part in PARTS)
        return Bins(tuple(config["names"]), *parts, config["digest"])


def fit(raw: np.ndarray, names: tuple, bins: int = 64, digest: str = "") -> Bins:
    """Quantile edges of ALL values of raw (N, R), ties as often as they occur; 64 as in the paper.
    (The release takes those of the unique values: its bins are not equally populated.)"""
    assert len(raw) and raw.shape[1] == len(names) and bins > 1, (raw.shape, names, bins)
    columns = []
    for name, column in zip(names, raw.T):
        score = column.astype(np.float64)                                        # (N,)
        assert np.isfinite(score).all(), f"{name} is {score[~np.isfinite(score)][0]}"
        edges = np.quantile(score, np.arange(1, bins) / bins)                    # (B-1,)
        columns.append((edges, score.min(), score.max(), score.std()))
    return Bins(tuple(names), *map(np.array, zip(*columns)), digest)


# ---- the scores of DATA --------------------------------------------------------------------------

def fitted(folder, bins: int) -> Bins:
    """DATA/bins.json where it has so many bins, else DATA/bins-N.json; fitted anew where it was
    fitted to other scores than those of DATA now."""
    path = Path(folder) / "bins.json"
    for path in (path, path.with_name(f"bins-{bins}.json")):
        known = load(path) if path.exists() else None
        if known is None or known.edges.shape[1] + 1 == bins:
            break
    if known and known.digest == fingerprint(folder, scored_names(folder)):
        return known
    return bin_dataset(folder, bins, path.name)


def bin_dataset(folder, bins: int, file: str = "bins.json") -> Bins:
    """Fit the pairs of DATA that have all scores, write DATA/FILE, print how full the bins
    are. UserError: scores are missing."""
    names, path, shards = scored_names(folder), Path(folder) / file, Data(folder).shards
    if not names:
        raise UserError(f"{folder} has no reward that all of its shards have scores of: run python "
                        f"rewards.py {folder}")
    parts = (rewards.read_scores(shard, names) for shard in shards)              # (P, R) each
    raw = np.concatenate([part[~np.isnan(part).any(1)] for part in parts])       # (N, R)
    if not len(raw):
        raise UserError(f"{folder} has no pair with all of {', '.join(names)}: score it again")
    learnt = fit(raw, names, bins, fingerprint(folder, names))
    for r, name in enumerate(names):
        counts = np.bincount(learnt.place(r, raw[:, r].astype(float)), minlength=bins)     # (B,)
        share = 100 * counts / len(raw)
        print(f"{name:14}{share.min():.2f} to {share.max():.2f} % in a bin, "
              f"{(counts == 0).sum()} of {bins} empty")
    write_json(path, learnt.to_config())
    print(f"wrote {path}: the bins of {len(raw)} scored pairs")
    return learnt


def scored_names(folder) -> tuple:
    """The rewards that all score files of DATA have, in the order of columns."""
    shards = [shard for shard in Data(folder).shards if rewards.scores_path(shard).exists()]
    scorers = [rewards.read_header(shard)["scorers"] for shard in shards]
    return tuple(name for name in rewards.REWARDS
                 if scorers and all(name in versions for versions in scorers))


def fingerprint(folder, names: tuple) -> str:
    """16 hex digits of these scores of DATA, by which bins of others are known: headers alone."""
    digest = hashlib.sha256(json.dumps(list(names)).encode())
    for shard in Data(folder).shards:
        digests = rewards.read_header(shard, names)["digests"]
        digest.update("".join(digests[name] for name in names).encode())
    return digest.hexdigest()[:16]


def load(path) -> Bins:
    """Read a bins.json. UserError: it is not there, or not as it was written."""
    return Bins.from_config(read_json(path))


def main() -> None:
    """Fit bins to the scores of DATA."""
    parser = Parser(description="fit quantile bins to the scores of rewards.py")
    parser.add_argument("data", help="folder that data.py or shapes.py wrote")
    parser.add_argument("--bins", type=between(int, 2, 2 ** 16), default=5,
                        help="levels of a reward (paper: 64)")
    args = parser.parse_args()
    Data(args.data)
    hold(args.data)
    bin_dataset(args.data, args.bins)


if __name__ == "__main__":
    run(main)
