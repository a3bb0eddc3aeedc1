"""evaluate.py flops: the cost of a picture, in both ways of counting."""
import pytest
from conftest import run


def table(*arguments) -> dict:
    """The printed rows: label → (FLOP, MAC, MAC of linear layers), in 10^9; "head": the first."""
    head, *lines = run("evaluate.py", "flops", *arguments)[1].splitlines()
    rows = [line.rsplit(maxsplit=3) for line in lines[1:]]
    return {label: [float(n.replace(",", "")) for n in numbers] for label, *numbers in rows} \
        | {"head": head}


def test_the_paper_preset_costs_what_the_paper_says():
    """4.16 T multiply-adds of linear layers in 50 steps of one branch: at 60 text tokens. The
    release counts two operations a multiply-add, and 77 tokens."""
    found = table("paper", "--tokens", 60)
    assert "360,411,664 parameters, 7 rewards" in found["head"]
    assert found["a picture, 50 steps, one branch"][2] == pytest.approx(4160, abs=5)
    assert found["one forward pass"][2] == pytest.approx(83.2, abs=0.05)
    found = table("paper")
    flop, mac, linear = found["one forward pass"]
    assert 2 * linear == pytest.approx(167.6, abs=0.1) and flop == pytest.approx(2 * mac, rel=1e-3)
    assert found["the same, guided"][0] == pytest.approx(100 * flop, rel=1e-3)


def test_a_checkpoint_has_its_own_sizes_and_steps(checkpoint):
    assert "a picture, 8 steps, one branch" in table(checkpoint, "--tokens", 8)
