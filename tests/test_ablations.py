"""docs/ablations: each fork is short, applies to this code, trains, and paints on request."""
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

import shapes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """60 pictures of the embedded world, without scores: each fork makes its own of a copy."""
    folder = tmp_path_factory.mktemp("drawn")
    shapes.write_world(folder, 60, seed=0, size=16)
    return folder


@pytest.mark.parametrize("patch", sorted((ROOT / "docs" / "ablations").glob("*.patch")),
                         ids=lambda path: path.stem)
def test_a_fork_applies_trains_and_paints(patch, drawn, tmp_path):
    assert 10 <= len(patch.read_text(encoding="utf-8").splitlines()) <= 120
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(drawn, tmp_path / "world")
    extra = {"guidance_weights": ["--guidance", "alignment=2", "contrast=0.5"],
             "own_reward": ["--targets", "all=1", "texture=0.25"],
             "raw_scores": ["--targets", "all=1", "contrast=-1.5"]}.get(patch.stem, [])
    for command in (["git", "init", "-q"], ["git", "apply", patch],
                    [sys.executable, "train.py", *TINY, "--data", "world", "--out", "run",
                     "--steps", "20"],
                    [sys.executable, "sample.py", "--checkpoint", "run", "--prompt", "a red circle",
                     "--targets", "all=1", "--steps", "2", *extra]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert (tmp_path / "out.png").exists()
