"""sample.py: checkpoints, seeds, targets, guidance, and the files of the command."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import refused, run, succeed
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from data import UserError, file_digest, pad, precision, read_json, write_json
from shapes import ANALYTIC as REWARDS
from shapes import score_all

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a circle above a triangle", "", "three triangles"]
S = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The shipped checkpoint, with no targets of its own."""
    folder = shutil.copytree(sample.SHIPPED, tmp_path_factory.mktemp("shipped") / "run")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"targets": []})
    return folder


@pytest.fixture(scope="module")
def model(place) -> sample.Model:
    return sample.load(place, CPU)


def made(model, prompts, seeds=None, **options) -> torch.Tensor:
    """pictures() with four steps."""
    return sample.pictures(model, prompts, seeds=seeds, **dict(steps=4) | options)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(3, S, S, generator=torch.Generator().manual_seed(seed))


def apart(a, b) -> int:
    """The largest difference of two pictures in grey levels."""
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


@pytest.fixture
def copy(tmp_path):
    """The shipped checkpoint, to change it."""
    return shutil.copytree(sample.SHIPPED, tmp_path / "run")


def command(place, out, *arguments) -> str:
    """Run sample.py for two steps; what it printed."""
    return succeed("sample.py", "--checkpoint", place, "--out", out, "--steps", 2, *arguments)


def settings(path) -> dict:
    """The JSON in a PNG's text chunk."""
    return json.loads(Image.open(path).text["miro"])


def files(folder) -> torch.Tensor:
    """The pictures of a folder: uint8 (B, 3, H, W)."""
    every = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*/samples/*.png"))]
    return torch.from_numpy(np.stack(every)).permute(0, 3, 1, 2)


# ---- checkpoints ---------------------------------------------------------------------------------

def test_a_loaded_checkpoint_has_the_saved_weights_and_any_spelling_of_a_device(copy):
    weights = load_file(copy / "model.safetensors")
    for device in ("cpu", CPU, None):
        model = sample.load(str(copy), device)
        assert model.device == CPU and model.rewards == REWARDS == model.bins.names
        assert all(torch.equal(w, weights[name]) for name, w in model.net.state_dict().items())
        assert not model.net.training


@pytest.mark.parametrize("keys", [("format",), ("network", "patch"), ("bins", "edges", 0, 0),
                                  ("sampler", "solver"), ("text_encoder",), ("weights",)])
def test_a_config_json_that_was_changed_by_hand_is_one_sentence_that_names_it(copy, keys):
    whole = (copy / "config.json").read_text()
    for thing in (2, "x", [], None, float("nan"), "removed"):
        config = inner = json.loads(whole)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = thing
        if thing == "removed":
            del inner[keys[-1]]
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"^{copy}/config.json cannot be read [^\n]*by hand"):
            sample.load(copy, CPU)
    (copy / "config.json").write_text(json.dumps(json.loads(whole), indent=4))    # says the same
    assert sample.load(copy, CPU).rewards == REWARDS


def test_weights_of_another_run_or_that_are_not_finite_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["out_norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is damaged, or not that of .*config"):
        sample.load(copy, CPU)
    weights["out_norm.weight"][0] = float("nan")
    save_file(weights, copy / "model.safetensors")
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", config | {"weights": file_digest(copy / "model.safetensors")})
    with pytest.raises(UserError, match="model.safetensors has weights that are not finite"):
        sample.load(copy, CPU)


# ---- seeds ---------------------------------------------------------------------------------------

def test_image_i_depends_on_its_seed_and_not_on_the_batch(model):
    together = made(model, PROMPTS)
    for batch in (1, 2):
        assert apart(made(model, PROMPTS, batch=batch), together) <= 1
    for i, prompt in enumerate(PROMPTS):
        assert apart(made(model, prompt, [i])[0], together[i]) <= 1
    assert apart(made(model, PROMPTS[:1], [7])[0], together[0]) > 10
    with pytest.raises(AssertionError, match="1 seeds for 5 prompts"):
        made(model, PROMPTS, [7])


def test_noise_is_that_of_a_cpu_generator_of_the_seed_and_leaves_the_global_one_alone(
        model, monkeypatch):
    monkeypatch.setattr(sample.flow, "sample", lambda net, eps, *rest, **more: eps)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    wanted = (noise(5) * std + mean).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(made(model, PROMPTS[:2], [3, 5])[1], wanted)
    assert torch.equal(before, torch.get_rng_state())


# ---- targets -------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked, wanted", [
    ([], [1, 1, 1]),
    (["all=0.5"], [0.5, 0.5, 0.5]),
    (["all=0", "z=0.75"], [0, 0, 0.75]),
    (["z=0.75", "all=0"], [0, 0, 0]),                                 # the last word counts
    (["x=0", "x=1"], [1, 1, 1]),
    ({"all": 0.5, "x": 1}, [1, 0.5, 0.5]),
])
def test_targets_are_read_in_order_into_the_columns_of_the_network(asked, wanted):
    assert sample.read_targets(asked, ("x", "y", "z"), 1.0, "--targets") == wanted


@pytest.mark.parametrize("entry, said", [
    *((f"x={level}", f"--negative x={level}: a level is a number from 0 .* to 1") for level in (
        "1.01", "-0.1", "nan", "inf", "high", "")), ("x", "--negative x=: a level"),
    ("beauty=1", "--negative beauty=1: no such reward in this checkpoint; it knows all, x")])
def test_a_level_outside_0_to_1_or_an_unknown_reward_is_refused_with_its_flag(entry, said):
    with pytest.raises(UserError, match=said):
        sample.read_targets([entry], ("x",), 0.0, "--negative")


def test_a_notebook_asks_by_dict_by_list_or_by_tensor(model):
    s_pos, s_neg = torch.ones(2, 5), torch.zeros(2, 5)
    s_pos[:, REWARDS.index("contrast")], s_neg[:, REWARDS.index("sharpness")] = 0.3, 0.5
    wanted = made(model, PROMPTS[:2], targets=s_pos, negative=s_neg)
    assert torch.equal(made(model, PROMPTS[:2], targets={"contrast": 0.3},
                            negative={"sharpness": 0.5}), wanted)
    assert torch.equal(made(model, PROMPTS[:2], targets=["all=1", "contrast=0.3"],
                            negative=["all=0", "sharpness=0.5"]), wanted)
    assert apart(made(model, PROMPTS[:2]), wanted) > 5


def test_a_tensor_of_levels_is_checked_and_nan_is_not_asked_for(model):
    for wrong in (torch.ones(5), torch.ones(1, 5), torch.full((2, 5), 1.2), -torch.ones(2, 5)):
        with pytest.raises(AssertionError, match="targets"):
            made(model, PROMPTS[:2], targets=wrong)
    free = made(model, PROMPTS[:2], targets=torch.full((2, 5), float("nan")), guidance=0.0)
    assert apart(free, made(model, PROMPTS[:2], guidance=0.0)) > 5


def test_what_the_command_asks_for_is_what_a_notebook_gets(place, model, tmp_path):
    command(place, tmp_path / "a", "--prompt", PROMPTS[1], "--targets", "all=1",
            "colorfulness=0.3", "--negative", "contrast=0.5", "--guidance", 3, "--seed", 7,
            "--n", 3, "--batch", 2, "--negative-prompt", "")
    wanted = made(model, [PROMPTS[1]] * 3, [7, 8, 9], targets={"colorfulness": 0.3}, batch=2,
                  negative={"contrast": 0.5}, guidance=3.0, negative_prompt="", steps=2)
    assert torch.equal(files(tmp_path / "a"), wanted)


def test_a_checkpoint_may_say_what_it_is_asked_for_and_the_flag_overrides_it(tmp_path):
    shipped = sample.load(sample.SHIPPED, "cpu")
    assert shipped.config["targets"] == sample.WORLD_TARGETS == ["all=0.75", "alignment=1"]
    for flags, wanted in (((), [1, 0.75, 0.75, 0.75, 0.75]),
                          (("--targets", "contrast=0.5"), [1, 0.75, 0.5, 0.75, 0.75]),
                          (("--targets", "all=1"), [1] * 5)):
        command(sample.SHIPPED, tmp_path / "out.png", "--prompt", PROMPTS[0], *flags)
        assert settings(tmp_path / "out.png")["pictures"][0]["s_pos"] == wanted
    assert torch.equal(made(shipped, "a circle"),
                       made(shipped, "a circle", targets={"all": 0.75, "alignment": 1}))


def test_half_precision_is_a_flag_and_nearly_the_same_picture(place, model, tmp_path):
    for name in ("fp32", "bf16"):
        command(place, tmp_path / name, "--prompt", PROMPTS[0], "--precision", name)
    fp32, half = (files(tmp_path / name).float() for name in ("fp32", "bf16"))
    assert 0 < (fp32 - half).abs().mean() < 4


@pytest.mark.parametrize("real, wanted", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_chip_that_emulates_bf16_has_fp32(monkeypatch, real, wanted):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or real)
    assert precision("auto", torch.device("cuda")) == wanted
    assert precision("auto", CPU) == torch.float32 == precision("fp32", torch.device("cuda"))


# ---- guidance ------------------------------------------------------------------------------------

def test_w_0_equals_no_guidance_whatever_the_negatives(model):
    free = made(model, PROMPTS, guidance=0.0)
    for value in (0.3, 1.0):
        assert torch.equal(made(model, PROMPTS, negative={"all": value}, guidance=0.0), free)
    assert torch.equal(made(model, PROMPTS, guidance=0.0, negative_prompt="a triangle"), free)
    assert apart(made(model, PROMPTS, guidance=3.0), free) > 20
    text, mask = pad(model.encoder.states(PROMPTS))
    x, z, times = torch.stack([noise(i) for i in range(5)]), None, torch.linspace(1, 0, 5)
    with torch.no_grad():
        for now, after in zip(times[:-1], times[1:]):                 # Euler on v⁺ alone
            v, z, _ = model.net(x, now.expand(5), torch.ones(5, 5), text, mask, z)
            x = x + (after - now) * v
    std, mean = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("std", "mean"))
    by_hand = (x * std + mean).round().clamp(0, 255)
    assert apart(made(model, PROMPTS, guidance=0.0, solver="euler", shift=1.0), by_hand) <= 1


def test_the_negative_prompt_is_the_same_caption_unless_one_is_given(model):
    same = [made(model, [prompt], [0], guidance=5.0, negative_prompt=prompt) for prompt in PROMPTS]
    default = [made(model, [prompt], [0], guidance=5.0) for prompt in PROMPTS]
    assert all(map(torch.equal, same, default))
    assert apart(made(model, PROMPTS[:1], guidance=5.0, negative_prompt=""), default[0]) > 20


def test_the_checkpoint_carries_guidance_steps_and_solver(place, model, tmp_path):
    code, stdout, _ = run("sample.py", "--checkpoint", place, "--prompt", PROMPTS[0],
                          "--out", tmp_path / "out.png")
    own = model.config["sampler"]
    assert f"{place}, {own}, targets []: 1 pictures in" in stdout
    written, steps = settings(tmp_path / "out.png"), []
    assert {key: written[key] for key in own} == own
    assert torch.equal(made(model, PROMPTS[:1], steps=None, progress=lambda: steps.append(1)),
                       made(model, PROMPTS[:1], **own)) and len(steps) == own["steps"]


# ---- what to make --------------------------------------------------------------------------------

def test_a_sweep_has_one_column_a_level_of_the_same_noise(place, tmp_path):
    flags = ["--prompt", PROMPTS[0], "--sweep", "contrast=0:1:5", "--n", 2, "--targets", "all=0.5"]
    command(place, tmp_path / "sweep.png", *flags)
    jobs = settings(tmp_path / "sweep.png")["pictures"]
    wanted = [[0.5, 0.5, level, 0.5, 0.5] for level in (0, 0.25, 0.5, 0.75, 1)]
    assert REWARDS[2] == "contrast" and [job["s_pos"] for job in jobs] == wanted * 2
    assert [job["seed"] for job in jobs] == [0] * 5 + [1] * 5
    command(place, tmp_path / "single.png", "--prompt", PROMPTS[0])
    sheet, single = (Image.open(tmp_path / f"{name}.png") for name in ("sweep", "single"))
    assert sheet.width == 5 * single.width                 # five columns, two rows, one heading
    assert sheet.height == 2 * single.height + 18


def test_best_of_keeps_the_best_of_the_measured_candidates(place, tmp_path):
    best = ("--n", 2, "--best-of", 3, "--by", "contrast")
    command(place, tmp_path / "all.png", "--prompt", PROMPTS[0], "--n", 6)
    command(place, tmp_path / "best.png", "--prompt", PROMPTS[0], *best)
    candidates = settings(tmp_path / "all.png")["pictures"]
    kept = settings(tmp_path / "best.png")["pictures"]
    assert kept == [max(three, key=lambda each: each["raw"]["contrast"])     # levels tie at 1
                    for three in (candidates[:3], candidates[3:])]


# ---- files ---------------------------------------------------------------------------------------

def test_a_folder_has_genevals_layout_and_goes_on_where_it_was_stopped(place, model, tmp_path):
    out = tmp_path / "a" / "b"
    file = tmp_path / "prompts.txt"
    file.write_text('{"tag": "x", "prompt": "two blue squares"}\n\n a circle ')
    flags = ("--prompts", file, "--n", 3, "--seed", 4, "--targets", "all=0.5")
    command(place, out, *flags)
    wanted = [{"tag": "x", "prompt": "two blue squares"}, {"prompt": "a circle"}]
    assert [json.loads((out / f"0000{k}" / "metadata.jsonl").read_text()) for k in (0, 1)] == wanted
    names = [f"0000{k}/samples/000{i}.png" for k in (0, 1) for i in range(3)]
    texts = [want["prompt"] for want in wanted for _ in range(3)]
    assert [json.loads(line) for line in (out / "metadata.jsonl").open()] == [
        {"file_name": name, "text": text} for name, text in zip(names, texts)]
    pictures = made(model, texts, range(4, 10), targets={"all": 0.5}, steps=2)
    assert torch.equal(files(out), pictures)
    said = json.loads((out / "settings.json").read_text())
    assert (said["seed"], said["s_pos"], said["steps"]) == (4, [0.5] * 5, 2)
    (out / names[2]).unlink()
    old = (out / names[3]).stat().st_mtime_ns
    command(place, out, *flags, "--batch", 2)                          # it was stopped after two
    assert (out / names[3]).stat().st_mtime_ns == old
    assert apart(files(out).permute(0, 2, 3, 1), pictures.permute(0, 2, 3, 1)) <= 1
    for other in (("--seed", 5), ("--n", 2), ("--guidance", 3), ("--negative-prompt", ""),
                  ("--targets", "all=1")):
        said = refused("sample.py", "--checkpoint", place, "--out", out, "--steps", 2, *flags,
                       *other)
        assert "or pictures of other settings: name a new folder" in said
    assert len(files(out)) == 6


def test_a_kill_loses_one_batch(place, tmp_path, child):
    command = ["--checkpoint", place, "--prompt", "a circle", "--n", 6, "--batch", 2, "--steps", 2,
               "--out", tmp_path / "out"]
    process = child("sample.py", command, tmp_path, kill=("replace", 8))
    process.join()
    assert process.exitcode == -9 and len(files(tmp_path / "out")) == 4


def test_the_levels_in_a_figure_are_those_of_its_pictures(place, model, tmp_path):
    command(place, tmp_path / "out.png", "--prompt", PROMPTS[2], "--n", 3, "--seed", 4)
    shown = made(model, [PROMPTS[2]] * 3, [4, 5, 6], steps=2)
    raw = score_all(REWARDS, shown, [PROMPTS[2]] * 3).numpy()
    for job, levels in zip(settings(tmp_path / "out.png")["pictures"],
                           model.bins.to_target(raw).tolist()):
        assert job["measured"] == pytest.approx(dict(zip(REWARDS, levels)))


def test_alignment_is_not_measured_where_one_prompt_is_of_no_grammar(place, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\ncircle red\n")
    command(place, tmp_path / "out.png", "--prompts", tmp_path / "prompts.txt")
    for job in settings(tmp_path / "out.png")["pictures"]:
        assert set(job["measured"]) == set(job["raw"]) == set(REWARDS) - {"alignment"}


def test_a_tile_is_its_picture_enlarged_and_a_long_caption_makes_no_wide_grid():
    picture = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    sheet = np.asarray(sample.grid([[(picture, ["text"])]], 3))
    assert np.array_equal(sheet[:12, :12], picture.permute(1, 2, 0)
                          .repeat_interleave(3, 0).repeat_interleave(3, 1).numpy())
    rows = [[(picture, ["text"])]]
    assert sample.grid(rows, 3, (), ["a circle\n\x1b[31m and " * 1000]).width < 3000


def test_the_grid_of_training_has_rows_of_prompts_and_columns_of_targets_on_fixed_noise(
        model, monkeypatch):
    monkeypatch.setitem(model.config["sampler"], "steps", 4)
    monkeypatch.setitem(model.config, "targets", sample.WORLD_TARGETS)
    sheet, scale = np.asarray(sample.progress_grid(model)), 96 // S
    assert sheet.shape == (31 + 6 * (96 + 4 + 4 + 18), 6 * (96 + 4), 3)    # of two lines: its own
    cut = []
    for row, column in ((0, 0), (0, 3), (0, 4), (5, 0), (5, 4), (5, 5)):
        asked = {"all": column / 4} if column < 5 else sample.WORLD_TARGETS
        wanted = made(model, model.config["prompts"][row], [row], targets=asked)[0]
        top, left = 31 + row * 122 + 18, column * 100
        cut.append(sheet[top:top + 96:scale, left:left + 96:scale])
        assert apart(cut[-1], wanted.permute(1, 2, 0)) <= 1
    assert min(apart(a, b) for a, b in zip(cut, cut[1:])) > 5
