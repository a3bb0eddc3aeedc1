"""The page with sliders: what is in it is what sample.py makes, and the sliders lead to it.

Chromium runs it where it is installed (Debian's package chromium)."""
import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import run, succeed
from PIL import Image

import sample
from data import read_json, write_json
from shapes import ANALYTIC, score_all

CHROMIUM = shutil.which("chromium")


def page(checkpoint, path, *flags) -> tuple[str, dict]:
    """The page of a checkpoint, and what sample.py has put into it."""
    succeed("sample.py", "--checkpoint", checkpoint, "--page", path, "--steps", 2, *flags)
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r"const DATA = (\{.*?\});", text)[1])


def tile(data: dict, sheet: int, k: int) -> np.ndarray:
    """A picture in a sheet of the page: (S, S, 3)."""
    encoded, S = data["sheets"][sheet].partition(",")[2], data["side"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    y, x = S * (k // data["columns"]), S * (k % data["columns"])
    return image[y:y + S, x:x + S]


@pytest.mark.parametrize("flags, levels, points", [
    (["--page-pictures", 1000], 3, 3 ** 5), (["--page-pictures", 300], 3, 1 + 5 * 2 + 10 * 4)])
def test_its_pictures_and_levels_are_those_of_the_settings_that_it_shows(
        checkpoint, tmp_path, flags, levels, points):
    _, data = page(checkpoint, tmp_path / "p.html", "--prompt", "a red circle", *flags)
    assert (len(data["levels"]), len(data["points"])) == (levels, points)
    assert data["weights"] == [0, 1] and len(data["sheets"]) == 4 and data["base"] in data["points"]
    model = sample.load(checkpoint)
    for seed, w, k in ((0, 0, 5), (1, 1, points - 1)):
        s = torch.tensor([[data["levels"][n] for n in data["points"][k]]])
        shown = sample.pictures(model, ["a red circle"], s, seeds=[seed], guidance=w, steps=2)
        sheet = 2 * seed + w
        assert np.abs(tile(data, sheet, k).astype(int)
                      - shown[0].permute(1, 2, 0).numpy()).max() <= 1           # sums of a batch
        [got] = model.bins.to_target(score_all(ANALYTIC, shown, ["a red circle"]))
        assert data["measured"][sheet][k] == pytest.approx([100 * level for level in got], abs=1)


def test_a_caption_cannot_end_the_script(checkpoint, tmp_path):
    text, data = page(checkpoint, tmp_path / "q.html", "--prompt", "a <red> circle</",
                      "--page-pictures", 204)
    assert "<red>" not in text and text.count("</script>") == 1
    assert data["prompts"] == ["a <red> circle</"]


def test_what_cannot_be_a_page_ends_before_a_picture_is_made(checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    silent = shutil.copytree(checkpoint, tmp_path / "silent")
    config = read_json(silent / "config.json")
    write_json(silent / "config.json", config | dict(prompts=[]))
    for flags, said in ((["--page-pictures", 203], "1 prompts and 5 rewards take 204: allow for"),
                        (["--page", tmp_path / "folder"], "is a folder: name a file"),
                        (["--n", 2], "--page takes no --sweep, --best-of, --by or --n"),
                        (["--checkpoint", silent], "silent names no prompts: give --prompt")):
        prompt = [] if silent in flags else ["--prompt", "a red circle"]
        code, out, stderr = run("sample.py", "--checkpoint", checkpoint, "--page",
                                tmp_path / "p.html", *prompt, *flags)
        assert code == 2 and said in stderr and not out, stderr
    assert not (tmp_path / "p.html").exists()


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_sliders_links_and_neighbours_show_the_right_picture_without_an_error(checkpoint, tmp_path):
    text, data = page(checkpoint, tmp_path / "p.html", "--prompt", "a red circle",
                      "--page-pictures", 1000)
    after = """<script>
      const slider = document.querySelectorAll("input")[1];
      slider.value = 2;
      slider.dispatchEvent(new Event("input"));
      document.querySelectorAll(".reward")[3].querySelectorAll("button")[0].click();
      setTimeout(() => { document.body.dataset.pixels = [...document.getElementById("picture")
        .getContext("2d").getImageData(0, 0, DATA.side, DATA.side).data].join(); }, 300);
    </script>"""
    (tmp_path / "p.html").write_text(text + after)
    for width in (390, 1280):
        done = subprocess.run(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom",
             f"file://{tmp_path}/p.html#0.1.1.2.1.0.1.1"], capture_output=True, text=True,
            timeout=120)
        assert "CONSOLE" not in done.stderr
        pixels = np.array(re.search(r'data-pixels="([\d,]+)"', done.stdout)[1].split(","), int)
        shown = pixels.reshape(data["side"], data["side"], 4)[..., :3]
        k = data["points"].index([2, 2, 0, 0, 1])
        assert (shown == tile(data, 3, k)).all() and f'data-k="3.{k}"' in done.stdout
        assert f'data-k="3.{data["points"].index([2, 2, 1, 0, 1])}"' in done.stdout     # neighbour
