"""tests/gpu.py at toy size: no check fails, and one that fails or hangs costs its own line."""
import json
import subprocess
import sys

import gpu
import pytest
from conftest import ROOT

import rewards


def lines(*flags) -> list[dict]:
    """What it prints."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu.py", "--toy", *flags],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_check_ends_without_an_error(tmp_path):
    found = lines("--out", tmp_path / "gpu.json")
    assert list(dict.fromkeys(line["check"] for line in found)) == gpu.plan()
    assert not [line for line in found if "error" in line]
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    one = {line["check"]: line for line in found}
    assert one["resume"]["resumed"] == one["resume"]["anew"] == 0          # on a CPU bit for bit
    ratios = {line["preset"]: line["ratio"] for line in found if line["check"] == "precision"}
    assert ratios == pytest.approx(dict(shapes=1, paper=1), abs=0.05)
    assert all(0 < line["of_peak"] < 1.5 for line in found if line["check"].startswith("speed"))
    assert [line["reward"] for line in found if line["check"] == "networks"] == [
        name for name in rewards.PAPER if name != "vqa"]


def test_a_check_that_fails_or_hangs_costs_its_own_line():
    assert [line["check"] for line in lines("--only", "machine")] == ["machine"]
    assert "KeyError: 'nobody'" in gpu.lines_of("nobody", True, 60)[-1]["error"]
    assert "not done" in gpu.lines_of("resume", True, 0.5)[-1]["error"]
