"""binning.py: what a level means, whatever the scores look like, and what a bins.json may hold."""
import numpy as np
import pytest
from conftest import run

import binning
import rewards
import shapes
from binning import Bins, bin_dataset, fingerprint, fit, load
from data import Data, UserError, write_json

RNG = np.random.default_rng


def column(values, bins=64) -> tuple:
    """Bins of one reward and the bin of each of its values."""
    values = np.asarray(values, np.float64)
    fitted = fit(values[:, None], ("a",), bins)
    return fitted, fitted.place(0, values)


@pytest.mark.parametrize("draw", ["standard_cauchy", "standard_normal", "lognormal"])
def test_bins_are_equally_populated_on_a_heavy_tailed_score(draw):
    _, placed = column(getattr(RNG(0), draw)(size=6400) ** 5)
    assert np.bincount(placed).tolist() == [100] * 64


def test_levels_are_ranks_free_of_the_scale_of_the_reward():
    values = RNG(1).standard_normal(1000)
    assert np.array_equal(column(values)[1], column(1e6 * values - 3)[1])
    assert np.array_equal(column(values[:960])[1], column(np.exp(values[:960]))[1])  # 15 a bin
    values = RNG(2).permutation(640) / 640.0
    assert np.array_equal(column(values)[1], np.floor(values * 64))


@pytest.mark.parametrize("bins", [2, 3, 8, 64, 256])
@pytest.mark.parametrize("seed", range(6))
def test_levels_never_decrease_and_the_ends_take_the_end_bins(bins, seed):
    rng = RNG(seed)
    values = np.round(rng.standard_cauchy(rng.integers(2, 300)), int(rng.integers(0, 3)))
    values = np.append(values, values.max() + 1)                  # at least two different values
    _, placed = column(values, bins)
    order = np.argsort(values, kind="stable")
    assert (np.diff(placed[order]) >= 0).all()
    assert (placed[values == values.min()] == 0).all()
    assert (placed[values == values.max()] == bins - 1).all()


def test_a_tie_divides_the_bins_it_covers_as_it_divides_the_others():
    # 1 covers the bins 2..6 of 0..9; two of the other five lie below: 2 + round(4 * 2/5) = 4
    _, placed = column([0.0] * 2 + [1.0] * 5 + [2.0] * 3, bins=10)
    assert placed.tolist() == [0] * 2 + [4] * 5 + [9] * 3
    _, placed = column(np.repeat([0.0, 0.5, 1.0], 300), bins=65)
    assert [set(placed[i:i + 300]) for i in (0, 300, 600)] == [{0}, {32}, {64}]
    _, placed = column([0.0] + [0.5] * 9998 + [1.0])
    assert placed[0] == 0 and placed[-1] == 63 and set(placed[1:-1]) <= {31, 32}


def test_a_constant_reward_has_target_one():
    fitted, placed = column([3.0] * 50)
    assert set(placed) == {63}
    assert fitted.to_target([[2.9], [3.0], [3.1]]).tolist() == [[0], [1], [1]]


@pytest.mark.parametrize("n", [1, 2, 5, 63])
def test_fewer_values_than_bins_spread_from_the_first_bin_to_the_last(n):
    _, placed = column(RNG(n).permutation(n))
    assert len(set(placed)) == n and placed.max() == 63 and (n == 1 or placed.min() == 0)


def test_what_has_no_score_has_no_level_and_is_never_fitted():
    raw = RNG(4).standard_normal((100, 2)).astype(np.float32)
    fitted = fit(raw, ("a", "b"))
    whole, raw[::3, 1] = fitted.to_target(raw), np.nan
    s = fitted.to_target(raw)
    assert np.array_equal(np.isnan(s), np.isnan(raw))
    assert np.array_equal(s[~np.isnan(raw)], whole[~np.isnan(raw)])
    with pytest.raises(AssertionError, match="b is nan"):
        fit(raw, ("a", "b"))


def test_columns_do_not_mix_and_scores_beyond_the_fitted_range_clamp_to_the_end_bins():
    raw = np.stack([1000 + RNG(5).standard_normal(500), RNG(6).lognormal(size=500)], 1)
    raw = raw.astype(np.float32)
    fitted = fit(raw, ("a", "b"))
    assert fitted.std == pytest.approx(raw.astype(np.float64).std(0), rel=1e-12)
    s = fitted.to_target(raw.reshape(5, 100, 2))
    assert s.shape == (5, 100, 2) and s.dtype == np.float32
    assert fitted.to_target([[-1e9, 1e9], [np.inf, -np.inf]]).tolist() == [[0, 1], [1, 0]]
    for r in range(2):
        alone = fit(raw[:, [r]], ("a",)).to_target(raw[:, [r]])
        assert np.array_equal(alone, s.reshape(-1, 2)[:, [r]])
        assert np.array_equal(fitted.select(fitted.names[r:r + 1]).to_target(raw[:, [r]]), alone)


def test_damaged_bins_end_in_one_sentence_that_names_the_file(tmp_path):
    config = {"names": ["a", "b"], "edges": [[1.0, 2.0], [3.0, 4.0]], "low": [0.0, 0.0],
              "high": [9.0, 9.0], "std": [1.0, 1.0], "digest": ""}
    write_json(tmp_path / "bins.json", Bins.from_config(config).to_config())
    assert load(tmp_path / "bins.json").to_config() == config
    content = (tmp_path / "bins.json").read_text()
    for damaged in (content.replace("2.0", "2.5"), content.replace("names", "name"), content[:-9]):
        (tmp_path / "bins.json").write_text(damaged)
        with pytest.raises(UserError, match=f"^{tmp_path}/bins.json cannot be read [^\n]*$"):
            load(tmp_path / "bins.json")


NAMES = ("alignment", "contrast")


@pytest.fixture
def scored(tmp_path) -> tuple:
    """Two shards with 15 and 10 pairs, some without a score, and those that have all."""
    shapes.write_world(tmp_path, 25, 0, size=16, shard=15)
    assert binning.scored_names(tmp_path) == ()
    raw = RNG(7).standard_normal((25, 2)).astype(np.float32)
    raw[[3, 17], 0] = raw[[3, 20], 1] = np.nan
    score(tmp_path, raw)
    return tmp_path, raw[~np.isnan(raw).any(1)]


def score(folder, raw: np.ndarray, names=NAMES) -> None:
    """The score files of a folder with shards of 15 and 10 pairs."""
    for shard, part in zip(Data(folder).shards, (raw[:15], raw[15:])):
        columns = dict(zip(names, np.ascontiguousarray(part.T)))
        versions = {name: shapes.version(name) if name in NAMES else "1" for name in names}
        rewards.write_scores(shard, columns, versions, dict.fromkeys(names, {}))


def test_names_come_in_the_order_of_columns_and_only_those_that_all_files_have(scored):
    folder, one = scored[0], {"contrast": np.zeros(10, np.float32)}
    score(folder, np.zeros((25, 4), np.float32), ("of_a_fork", "contrast", "vqa", "alignment"))
    assert binning.scored_names(folder) == ("vqa", "alignment", "contrast")
    last = Data(folder).shards[1]
    rewards.write_scores(last, one, {"contrast": shapes.version("contrast")}, {"contrast": {}})
    assert binning.scored_names(folder) == ("contrast",)
    with pytest.raises(UserError, match=r"00001.scores.safetensors lacks .*\(alignment\)"):
        fingerprint(folder, NAMES)
    rewards.scores_path(last).unlink()
    assert "vqa" in binning.scored_names(folder)                     # scoring was interrupted
    with pytest.raises(UserError, match="00001.scores.safetensors lacks scores"):
        bin_dataset(folder, 4)


def test_the_fingerprint_changes_with_a_score_and_with_the_names_and_with_nothing_else(scored):
    folder, raw = scored[0], np.zeros((25, 2), np.float32)
    before = fingerprint(folder, NAMES)
    assert before not in (fingerprint(folder, NAMES[::-1]), fingerprint(folder, NAMES[:1]))
    score(folder, raw)
    zeros = fingerprint(folder, NAMES)
    score(folder, np.column_stack([raw, raw + 1]), (*NAMES, "vqa", "of_a_fork"))
    assert before != zeros == fingerprint(folder, list(NAMES)) and len(zeros) == 16
    raw[20, 0] = 1e-30
    score(folder, raw)
    assert fingerprint(folder, NAMES) not in (before, zeros)


def test_bins_are_fitted_once_and_anew_where_scores_names_or_their_number_changed(scored):
    folder, raw = scored[0], RNG(8).standard_normal((25, 2)).astype(np.float32)
    own = binning.fitted(folder, 4)
    assert own.names == NAMES and load(folder / "bins.json").to_config() == own.to_config()
    before = (folder / "bins.json").stat().st_mtime_ns
    assert binning.fitted(folder, 4).to_config() == own.to_config()
    assert binning.fitted(folder, 3).to_config() == load(folder / "bins-3.json").to_config()
    assert (folder / "bins.json").stat().st_mtime_ns == before
    score(folder, raw)
    whole = fit(raw, NAMES, 4, fingerprint(folder, NAMES)).to_config()
    assert binning.fitted(folder, 4).to_config() == whole
    score(folder, raw[:, 1:], ("contrast",))                     # one that was fitted is gone
    assert binning.fitted(folder, 4).names == ("contrast",)
    score(folder, raw)                                           # and is back
    assert binning.fitted(folder, 4).to_config() == whole


def test_the_command_writes_bins_and_says_how_full_they_are(scored):
    folder, raw = scored                                  # 22 of 25 pairs have all scores
    code, printed, _ = run("binning.py", folder, "--bins", 4)
    bins = load(folder / "bins.json")
    assert code == 0 and bins.names == NAMES and bins.digest == fingerprint(folder, NAMES)
    assert bins.to_config() == fit(raw, NAMES, 4, bins.digest).to_config()
    assert "the bins of 22 scored pairs" in printed and not list(folder.glob(".*.tmp"))
    assert "22.73 to 27.27 % in a bin, 0 of 4 empty\ncontrast " in printed            # 5, 6 of 22
