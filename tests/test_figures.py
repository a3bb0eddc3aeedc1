"""docs/figures.py: what the tutorial shows is drawn, and what it names is there."""
import re
import subprocess
import sys

import numpy as np
from conftest import ROOT
from PIL import Image

import binning
import evaluate
import flow
import model
import sample
import shapes
import train

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"\]\(figures/(\w+)\.(png|gif)\)", TUTORIAL)
MODULES = dict(binning=binning, evaluate=evaluate, flow=flow, shapes=shapes, train=train,
               TextRIN=model.TextRIN, Bins=binning.Bins, sample=sample)


def draw(out, *flags) -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "figures.py", "--out", out, *flags],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_tutorial_shows_twelve_figures_which_are_in_the_repository():
    assert len(SHOWN) == len(set(SHOWN)) == 12
    for name, kind in SHOWN:
        with Image.open(ROOT / "docs" / "figures" / f"{name}.{kind}") as image:
            assert min(image.size) > 150 and getattr(image, "n_frames", 1) >= 17 * (kind == "gif")


def test_every_function_that_the_tutorial_names_exists():
    named = [span.split(".") for span in re.findall(r"`(\w+\.\w+)`", TUTORIAL) if ".py" not in span]
    assert len(named) >= 10
    assert all(hasattr(MODULES[module], name) for module, name in named), named


def test_figures_are_drawn_as_they_are_shown(tmp_path):
    names = ("data", "path", "network", "token", "guidance", "sampling")
    draw(tmp_path, "--only", *names)
    assert {file.stem for file in tmp_path.iterdir()} == set(names)
    for file in tmp_path.iterdir():
        with Image.open(file) as now, Image.open(ROOT / "docs" / "figures" / file.name) as shown:
            assert now.size == shown.size
            # Coarsely: another matplotlib sets fonts and margins a little otherwise.
            now, shown = (np.asarray(image.convert("L").reduce(16), int) for image in (now, shown))
            assert abs(now - shown).mean() < 4 < shown.std(), file.name


def test_a_run_that_kept_its_checkpoints_is_drawn_as_it_learns(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        (run / f"step-{step:06d}").mkdir(parents=True)
        for file in sample.SHIPPED.iterdir():
            (run / f"step-{step:06d}" / file.name).symlink_to(file)
    draw(tmp_path / "out", "--only", "--run", run, "--hacked", sample.SHIPPED)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"training.gif", "hacked.png"}
    with Image.open(tmp_path / "out" / "training.gif") as image:
        assert image.size[0] == 640 and image.n_frames == 3
