"""binning.py: what a level means, whatever the scores look like, and what a bins.json may hold."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import binning
from binning import Bins, fit, fingerprint, load, save

RNG = np.random.default_rng


def column(values, bins=64) -> tuple:
    """Bins of one reward and the bin of each of its values."""
    raw = np.asarray(values, np.float64)[:, None]
    fitted = fit(raw, ("a",), bins)
    return fitted, fitted.place(raw)[:, 0]


@pytest.mark.parametrize("draw", ["standard_cauchy", "standard_normal", "lognormal"])
def test_bins_are_equally_populated_on_a_heavy_tailed_score(draw):
    fitted, _ = column(getattr(RNG(0), draw)(size=6400) ** 5)
    assert fitted.counts.tolist() == [[100] * 64]


def test_levels_are_ranks_free_of_the_scale_of_the_reward():
    values = RNG(1).standard_normal(1000)
    assert np.array_equal(column(values)[1], column(1e6 * values - 3)[1])
    assert np.array_equal(column(values[:960])[1], column(np.exp(values[:960]))[1])  # 15 a bin


def test_a_bin_holds_what_the_definition_of_a_quantile_says():
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


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_score_of_two_values_takes_the_end_bins_whatever_their_shares(share):
    ones = int(1000 * share)
    _, placed = column([0.0] * (1000 - ones) + [1.0] * ones)
    assert set(placed[:1000 - ones]) == {0} and set(placed[1000 - ones:]) == {63}


def test_three_equal_shares_of_ties_lie_at_the_bottom_the_middle_and_the_top():
    _, placed = column(np.repeat([0.0, 0.5, 1.0], 300), bins=65)
    assert [set(placed[i:i + 300]) for i in (0, 300, 600)] == [{0}, {32}, {64}]


def test_a_tie_divides_the_bins_it_covers_as_it_divides_the_others():
    # 1 covers the bins 2..6 of 0..9; two of the other five lie below: 2 + round(4 * 2/5) = 4
    _, placed = column([0.0] * 2 + [1.0] * 5 + [2.0] * 3, bins=10)
    assert placed.tolist() == [0] * 2 + [4] * 5 + [9] * 3


def test_a_dominant_middle_value_stays_between_the_rare_ends():
    _, placed = column([0.0] + [0.5] * 9998 + [1.0])
    assert placed[0] == 0 and placed[-1] == 63 and set(placed[1:-1]) <= {31, 32}


def test_a_constant_reward_has_target_one_and_a_warning(capsys):
    fitted, placed = column([3.0] * 50)
    assert set(placed) == {63} and fitted.to_target([[3.0]]) == 1
    assert "warning: every score of a is 3" in capsys.readouterr().err
    assert fitted.to_target([[2.9], [3.1]]).tolist() == [[0], [1]]


@pytest.mark.parametrize("n", [1, 2, 5, 63])
def test_fewer_values_than_bins_spread_from_the_first_bin_to_the_last(n):
    _, placed = column(RNG(n).permutation(n))
    assert len(set(placed)) == n and placed.max() == 63 and (n == 1 or placed.min() == 0)


def test_scores_beyond_the_fitted_range_clamp_to_the_end_bins():
    fitted, _ = column(RNG(3).standard_normal(1000))
    assert fitted.to_target([[-1e9], [1e9]]).tolist() == [[0], [1]]
    assert fitted.to_raw([[-5.0], [5.0]]).tolist() == [[fitted.low[0]], [fitted.high[0]]]


@pytest.mark.parametrize("bins", [2, 8, 64])
def test_a_level_becomes_a_score_and_the_same_level_again(bins):
    values = RNG(4).standard_cauchy(5000)
    fitted, _ = column(values, bins)
    s = (np.arange(bins) / (bins - 1)).astype(np.float32)[:, None]
    assert np.array_equal(fitted.to_target(fitted.to_raw(s)), s)
    assert fitted.to_raw([[0.5]]) == pytest.approx(np.median(values))


def test_columns_do_not_mix_and_leading_dimensions_are_kept():
    raw = np.stack([RNG(5).standard_normal(500), RNG(6).lognormal(size=500)], 1)
    fitted = fit(raw, ("a", "b"))
    s = fitted.to_target(raw.reshape(5, 100, 2))
    assert s.shape == (5, 100, 2) and s.dtype == np.float32
    for r in range(2):
        alone = fit(raw[:, [r]], ("a",)).to_target(raw[:, [r]])
        assert np.array_equal(alone, s.reshape(-1, 2)[:, [r]])
        some = fitted.select(fitted.names[r:r + 1])
        assert np.array_equal(some.to_target(raw[:, [r]]), alone)
    assert np.array_equal(fitted.to_target(raw[7]), s[0, 7])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_that_names_the_reward_and_the_row(bad):
    raw = np.zeros((10, 2))
    raw[7, 1] = bad
    with pytest.raises(ValueError, match=r"^b is .*(nan|inf) at \[7, 1\]"):
        fit(raw, ("a", "b"))
    with pytest.raises(ValueError, match="must be finite"):
        fit(np.random.rand(10, 2), ("a", "b")).to_target(raw)


def test_a_reward_that_is_constant_but_for_rounding_is_drawn(tmp_path):
    raw = np.where(np.arange(50)[:, None] % 2, 0.3, np.nextafter(0.3, 1))
    binning.draw(fit(raw, ("a",), 4), raw, tmp_path / "bins.png")
    assert (tmp_path / "bins.png").stat().st_size > 1000


def test_no_score_and_less_than_two_bins_are_errors():
    for raw, bins in ((np.zeros((0, 1)), 64), (np.zeros((5, 1)), 1)):
        with pytest.raises(ValueError, match="two bins and one score are needed"):
            fit(raw, ("a",), bins)


def test_saved_bins_load_to_the_last_bit(tmp_path):
    raw = RNG(7).standard_cauchy((1000, 2))
    fitted = fit(raw, ("a", "b"), source=fingerprint(raw, ("a", "b")))
    save(fitted, tmp_path / "bins.json")
    again = load(tmp_path / "bins.json")
    assert again.to_config() == fitted.to_config() and again.names == ("a", "b")
    assert np.array_equal(again.edges, fitted.edges) and again.edges.dtype == np.float64
    assert [path.name for path in tmp_path.iterdir()] == ["bins.json"]


def test_the_fingerprint_changes_with_a_score_and_with_a_name():
    raw = np.zeros((5, 1))
    other = raw.copy()
    other[3] = 1e-300
    assert fingerprint(raw, ("a",)) not in (fingerprint(raw, ("b",)), fingerprint(other, ("a",)))
    assert fingerprint(raw, ("a",)) == fingerprint(raw.copy(), ["a"])


@pytest.mark.parametrize("part, value, said", [
    ("names", ["a", "a"], "distinct reward names"),
    ("names", "ab", "distinct reward names"),
    ("names", [], "distinct reward names"),
    ("edges", [[1.0, 2.0], [3.0, 2.0]], "'b' must be finite and ascend"),
    ("edges", [[1.0, 2.0], [3.0]], "differ in length"),
    ("edges", [[1.0, 2.0], [3.0, "4"]], "need numbers"),
    ("edges", [[1.0, 2.0]], "edges .R, B-1."),
    ("edges", [[1.0, 2.0], [3.0, float("nan")]], "'b' must be finite"),
    ("low", [1.5, 0.0], "'a' must be finite and ascend"),
    ("high", [{}, {}], "need numbers"),
    ("counts", [[1, 2], [3, 4]], "edges .R, B-1."),
    ("counts", [[1, 2, 3], [3, 4, 5.5]], "need numbers"),
    ("source", None, "lack source"),
])
def test_damaged_bins_end_in_one_sentence_that_names_the_file(tmp_path, part, value, said):
    config = {"names": ["a", "b"], "edges": [[1.0, 2.0], [3.0, 4.0]], "low": [0.0, 0.0],
              "high": [9.0, 9.0], "counts": [[1, 1, 1], [1, 1, 1]], "source": ""}
    assert Bins.from_config(config).to_config() == config
    config[part] = value
    if value is None:
        del config[part]
    (tmp_path / "bins.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path / "bins.json")
    assert str(tmp_path / "bins.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b"\x80\x04pickle"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "bins.json").write_bytes(content)
    with pytest.raises(ValueError, match="bins.json"):
        load(tmp_path / "bins.json")
    with pytest.raises(FileNotFoundError, match="python binning.py"):
        load(tmp_path / "none.json")


def test_occupancy_states_range_shares_and_ties():
    raw = np.stack([np.arange(640.0), np.repeat([0.0, 1.0], 320)], 1)
    _, even, tied = binning.occupancy(fit(raw, ("even", "tied")), raw).splitlines()
    assert even.split() == ["even", "0", "319.5", "639", "1.56", "1.56", "1.56", "0", "0"]
    assert tied.split()[4:] == ["0.00", "0.00", "50.00", "62", "60"]   # the median edge is 0.5


def test_the_median_is_that_of_the_scores_with_an_odd_number_of_bins_and_ties_too():
    raw = np.array([[0.0], [0.0], [0.5], [1.0], [1.0], [1.0], [1.0]])
    assert binning.occupancy(fit(raw, ("tied",), 5), raw).splitlines()[1].split()[:4] == [
        "tied", "0", "1", "1"]


def test_the_figure_is_a_picture_and_replaces_the_old_one(tmp_path):
    raw = RNG(8).standard_normal((200, 2))
    binning.draw(fit(raw, ("a", "b")), raw, tmp_path / "bins.png")
    assert (tmp_path / "bins.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["bins.png"]
