"""Quantile bins: raw reward scores <-> levels s in [0, 1], which is how the network sees a reward.

Paper, "Bins": each score is replaced by its quantile bin (B = 64), so that levels are equally
populated: a rank, free of the reward's scale. s = bin / (B-1), and 1 is the best bin.

    bins = fit(raw, names)        # raw (N, R): N scored pairs of picture and caption, R rewards
    s = bins.to_target(raw)       # (..., R) in [0, 1]; beyond the fitted range: the end bins
    raw = bins.to_raw(s)          # (..., R): about the s-quantile of the fitted scores

`python binning.py DATA` fits the scores of DATA, writes DATA/bins.json and DATA/bins.png, and
prints how full the bins are.
"""
import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Bins:
    """What `fit` learnt. Column r of every array of scores or levels belongs to names[r]."""
    names: tuple
    edges: np.ndarray      # (R, B-1) float64, interior quantile edges, each row ascends
    low: np.ndarray        # (R,) float64, the smallest fitted score
    high: np.ndarray       # (R,) float64, the largest
    counts: np.ndarray     # (R, B) int64, fitted scores in each bin
    source: str = ""       # fingerprint of the fitted scores

    def place(self, raw) -> np.ndarray:
        """Scores (..., R) in their own units → bins (..., R) int64. ValueError: not finite.

        Not in the paper: ties. A value that many samples share covers the bins left..right, and a
        bare comparison would put all of them at one end of this span. Here it takes the place that
        divides the span as it divides the other bins, so the smallest value is bin 0 and the
        largest is bin B-1, however many samples have it.
        """
        raw, last = finite(raw, self.names), self.edges.shape[1]
        bins = np.empty(raw.shape, np.int64)
        for r, (edges, low, high) in enumerate(zip(self.edges, self.low, self.high)):
            value = raw[..., r]
            left = np.searchsorted(edges, value, side="left")       # how many edges < value
            right = np.searchsorted(edges, value, side="right")     # how many edges <= value
            others = left + last - right                            # bins it does not cover
            # A value on every edge leaves no other bin to divide: the ends decide. A constant is
            # both ends and counts as the best, so that the target 1 asks for what the data has.
            alone = np.where(value >= high, 1.0, np.where(value <= low, 0.0, 0.5))
            below = np.where(others > 0, left / np.maximum(others, 1), alone)
            bins[..., r] = left + np.rint((right - left) * below).astype(np.int64)
        return bins

    def to_target(self, raw) -> np.ndarray:
        """Scores (..., R) → levels s (..., R) float32 in [0, 1]. ValueError: not finite."""
        return (self.place(raw) / self.edges.shape[1]).astype(np.float32)

    def to_raw(self, s) -> np.ndarray:
        """Levels s (..., R) → scores (..., R) float64: low at 0, edge k at k / B, high at 1, and
        linear in between: there it is the s-quantile but for what the bins leave out.

        Level k / (B-1) lies inside bin k, so to_target(to_raw(s)) is s where scores are not tied.
        """
        s, share = finite(s, self.names), np.linspace(0, 1, self.edges.shape[1] + 2)
        quantiles = np.column_stack([self.low, self.edges, self.high])           # (R, B+1)
        return np.stack([np.interp(s[..., r], share, q) for r, q in enumerate(quantiles)], -1)

    def select(self, names) -> "Bins":
        """The bins of some of the rewards, in the order given."""
        r = [self.names.index(name) for name in names]
        return Bins(tuple(names), self.edges[r], self.low[r], self.high[r], self.counts[r],
                    self.source)

    def to_config(self) -> dict:
        """Plain lists and strings, for bins.json and for a checkpoint's config.json."""
        config = asdict(self) | {"names": list(self.names)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in config.items()}

    @staticmethod
    def from_config(config: dict) -> "Bins":
        """The inverse of to_config. ValueError: a part is missing, misshapen or out of order."""
        missing = [f.name for f in fields(Bins) if f.name not in config]
        if missing:
            raise ValueError(f"the bins lack {', '.join(missing)}")
        names = config["names"]
        if (not isinstance(names, list) or not names or len({*map(str, names)}) < len(names)
                or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"the bins need a list of distinct reward names, not {names!r}")
        try:
            parts = [np.array(config[part]) for part in ("edges", "low", "high", "counts")]
        except ValueError as error:                  # what numpy raises on rows of unequal length
            raise ValueError("the rows of the bins differ in length") from error
        R, B = len(names), parts[3].size // len(names)
        shapes = [part.shape for part in parts]
        kinds = [part.dtype.kind for part in parts]                  # i: integers, f: floats
        if shapes != [(R, B - 1), (R,), (R,), (R, B)] or kinds[3] != "i" or {*kinds} - {*"if"}:
            raise ValueError(f"{R} rewards need numbers: edges (R, B-1), low and high (R,), counts "
                             f"(R, B), not the shapes {shapes}")
        edges, low, high = (part.astype(np.float64) for part in parts[:3])
        for name, knots in zip(names, np.column_stack([low, edges, high])):
            if not np.isfinite(knots).all() or (np.diff(knots) < 0).any():
                raise ValueError(f"low, edges and high of {name!r} must be finite and ascend")
        return Bins(tuple(names), edges, low, high, parts[3].astype(np.int64),
                    str(config["source"]))


def finite(values, names: tuple) -> np.ndarray:
    """Values (..., R) as float64. ValueError if one is not finite: NaN would sort as the best."""
    values = np.asarray(values, np.float64)
    assert values.ndim and values.shape[-1] == len(names), f"{values.shape} for {len(names)} names"
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{names[bad[0, -1]]} is {values[tuple(bad[0])]} at {bad[0].tolist()}: "
                         "every score and every level must be finite")
    return values


def fingerprint(raw: np.ndarray, names: tuple) -> str:
    """16 hex digits of these scores (N, R), by which bins of another data set are recognised."""
    content = json.dumps(list(names)).encode() + np.ascontiguousarray(raw, "<f8").tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def fit(raw, names: tuple, bins: int = 64, source: str = "") -> Bins:
    """Quantile edges of ALL values of raw (N, R), ties as often as they occur; 64 as in the paper.

    (The release takes the quantiles of the unique values: its bins are not equally populated.)
    Warns of a constant reward. ValueError: no row, a value that is not finite, less than two bins.
    """
    raw = finite(raw, names)
    if not len(raw) or bins < 2:
        raise ValueError(f"{bins} bins of {len(raw)} scores: two bins and one score are needed")
    edges = np.quantile(raw, np.arange(1, bins) / bins, axis=0).T                # (R, B-1)
    unfilled = Bins(tuple(names), edges, raw.min(0), raw.max(0), np.zeros(0), source)
    counts = np.stack([np.bincount(b, minlength=bins) for b in unfilled.place(raw).T])
    for r in np.flatnonzero(unfilled.low == unfilled.high):
        print(f"warning: every score of {names[r]} is {raw[0, r]:g}: its level is always 1",
              file=sys.stderr)
    return replace(unfilled, counts=counts)


def save(bins: Bins, path) -> None:
    """Write JSON, whole or not at all: after a kill the file is the old one or the new one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        json.dump(bins.to_config(), file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path) -> Bins:
    """Read what `save` wrote. FileNotFoundError or ValueError: one sentence that names the file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: write it with python binning.py DATA")
    try:
        config = json.loads(Path(path).read_bytes())
        return Bins.from_config(config if isinstance(config, dict) else {})
    except ValueError as error:                      # json.JSONDecodeError is a ValueError
        raise ValueError(f"{path}: {error}; write it again with python binning.py DATA") from error


def occupancy(bins: Bins, raw: np.ndarray) -> str:
    """A line a reward of the fitted raw (N, R): its range, the share of the scores in its bins
    (ideal: 1 / B), its ties."""
    lines = [f"{'reward':14}{'low':>9}{'median':>9}{'high':>9}   % in a bin:{'min':>7}"
             f"{'median':>8}{'max':>7}{'empty bins':>12}{'equal edges':>13}"]
    median = np.median(raw, 0)                                                   # (R,)
    for r, name in enumerate(bins.names):
        share = 100 * bins.counts[r] / bins.counts[r].sum()                      # (B,)
        lines.append(f"{name:14}{bins.low[r]:9.4g}{median[r]:9.4g}{bins.high[r]:9.4g}{'':14}"
                     f"{share.min():7.2f}{np.median(share):8.2f}{share.max():7.2f}"
                     f"{(share == 0).sum():12}{(np.diff(bins.edges[r]) == 0).sum():13}")
    return "\n".join(lines)


def draw(bins: Bins, raw: np.ndarray, path: Path) -> None:
    """A row a reward: the histogram of its raw (N, R) scores cut in eighths, and its bins."""
    from matplotlib.figure import Figure       # here: training and sampling never draw histograms
    (R, B), eighths = bins.counts.shape, np.arange(1, 8) / 8
    figure = Figure(figsize=(10, 2 * R), layout="constrained")
    cuts = np.quantile(raw, eighths, axis=0)                                     # (7, R)
    for r, (left, right) in enumerate(figure.subplots(R, 2, squeeze=False)):
        low, high = bins.low[r], bins.high[r]   # nearly the same: 100 bars do not fit in between
        span = None if high - low > 1e-9 * max(abs(low), abs(high)) else (low - 0.5, high + 0.5)
        left.stairs(*np.histogram(raw[:, r], 100, span), fill=True)
        left.vlines(cuts[:, r], 0, 1, "black", linewidth=0.5, transform=left.get_xaxis_transform())
        left.set(xlabel=f"{bins.names[r]} (lines: eighths of the data)", ylabel="scores")
        right.stairs(bins.counts[r], (np.arange(B + 1) - 0.5) / (B - 1), fill=True)
        right.axhline(len(raw) / B, color="black", linewidth=0.5)
        right.set(xlabel="level s (line: equally populated)", ylabel="scores")
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png")    # a Figure without pyplot draws with Agg: no display
    os.replace(temporary, path)


def bin_dataset(pictures, names: tuple, bins: int = 64) -> Bins:
    """Fit the scores of a data.Pictures; write bins.json and bins.png beside its first shard.

    ValueError or FileNotFoundError of rewards.read_scores: scores are missing or not finite.
    """
    from rewards import read_scores            # here: the functions above need numpy alone
    rows, raws = read_scores(pictures, names)
    if not rows:
        raise ValueError(f"{pictures.path} has no scored sample: see python rewards.py "
                         f"{pictures.path}")
    raw = np.concatenate(raws)                 # (N, R): a picture with two captions counts twice
    fitted, folder = fit(raw, names, bins, fingerprint(raw, names)), pictures.shards[0].folder
    draw(fitted, raw, folder / "bins.png")
    save(fitted, folder / "bins.json")
    print(f"{len(raw)} scores of {len(rows)} samples; {len(pictures) - len(rows)} without scores")
    print(occupancy(fitted, raw), f"wrote {folder / 'bins.json'} and bins.png", sep="\n")
    return fitted


def main() -> None:
    """The command line: fit bins to a scored folder, print and draw them."""
    parser = argparse.ArgumentParser(description="fit quantile bins to the scores of rewards.py")
    parser.add_argument("data", help="folder of tars, tar, brace range, glob or picture folder")
    parser.add_argument("--rewards", default="all", help="all that are scored, or a,b,c")
    parser.add_argument("--bins", type=int, default=5,
                        help="levels of a reward (the release, with 16 M pictures: 64)")
    parser.add_argument("--size", type=int, default=24, help="side in pixels that was scored")
    args = parser.parse_args()
    if args.size < 3:
        raise ValueError(f"--size {args.size}: it is at least 3")
    from data import Pictures
    from rewards import scored_names
    pictures = Pictures(args.data, args.size)
    names = scored_names(pictures) if args.rewards == "all" else tuple(args.rewards.split(","))
    bin_dataset(pictures, names, args.bins)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:            # a user's mistake: one sentence, no traceback
        print(error, file=sys.stderr)
        sys.exit(2)
