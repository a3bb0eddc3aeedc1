"""evaluate.py flops: the cost of a picture, in both ways of counting."""
import pytest
from conftest import run, sentences


def table(*arguments) -> dict:
    """The printed rows: label → (FLOP, MAC, MAC of linear layers), in 10^9."""
    code, out, _ = run("evaluate.py", "flops", *arguments)
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith(("one", "a picture", "the same"))]
    return {line[:36].strip(): [float(n.replace(",", "")) for n in line[36:].split()]
            for line in rows} | {"head": out.splitlines()[0]}


def test_the_paper_preset_costs_what_the_paper_says():
    """4.16 T multiply-adds of linear layers in 50 steps of one branch: at 60 text tokens."""
    found = table("paper", "--tokens", 60)
    assert "360,411,664 parameters, 7 rewards" in found["head"]
    assert found["a picture, 50 steps, one branch"][2] == pytest.approx(4160, abs=5)
    assert found["one forward pass"][2] == pytest.approx(83.2, abs=0.05)


def test_the_release_counts_two_operations_a_multiply_add_and_77_tokens():
    found = table("paper")
    assert 2 * found["one forward pass"][2] == pytest.approx(167.6, abs=0.1)
    assert found["one forward pass"][0] == pytest.approx(2 * found["one forward pass"][1], rel=1e-3)
    one, guided = found["one forward pass"][0], found["the same, guided"][0]
    assert guided == pytest.approx(100 * one, rel=1e-3)


def test_a_checkpoint_has_its_own_sizes_and_steps(checkpoint):
    found = table(checkpoint, "--tokens", 8)
    assert any(label.startswith("a picture, 16 steps") for label in found)
    code, _, err = run("evaluate.py", "flops", "nowhere")
    assert code == 2 and "nowhere/config.json does not exist" in sentences(err)[0]
