"""sample.py: seeds, targets, guidance, files, and what is printed about them."""
import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import sample
from rewards import ANALYTIC as REWARDS
from rewards import score_all
from shapes import TASKS

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a circle above a triangle", "", "three triangles"]
S = 16


@pytest.fixture(scope="module")
def checkpoint(checkpoint, tmp_path_factory):
    """A network that listens: random weights for the zeros it started from, loud conditions."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("listening") / "run")
    weights, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, w in sorted(weights.items()):
        if name.endswith("out.weight") and w.ndim == 2:
            torch.nn.init.xavier_uniform_(w, generator=rng)
        if re.search(r"text_in.weight|(read_condition|write).attention.out.weight", name):
            w *= 10
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> sample.Model:
    return sample.load(checkpoint, CPU)


def levels(n: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((n, len(REWARDS)), value)


def made(model, prompts, seeds=None, s_pos=None, s_neg=None, **options) -> torch.Tensor:
    """generate() with defaults: all=1 against all=0, 4 steps."""
    n = len(prompts)
    return sample.generate(model, prompts, levels(n) if s_pos is None else s_pos,
                           levels(n, 0.0) if s_neg is None else s_neg,
                           list(range(n)) if seeds is None else seeds, **dict(steps=4) | options)


def apart(a, b) -> int:
    """The largest difference of two pictures in grey levels."""
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


def command(checkpoint, out, *arguments) -> str:
    """Run sample.py for two steps; what it printed."""
    code, stdout, stderr = run("sample.py", "--checkpoint", checkpoint, "--out", out, "--steps", 2,
                               *arguments)
    assert code == 0, stderr
    return stdout


def settings(path) -> dict:
    """The JSON in a PNG's text chunk."""
    return json.loads(Image.open(path).text["miro"])


def pictures(folder) -> list:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


# ---- seeds ---------------------------------------------------------------------------------------

def test_image_i_depends_on_its_seed_and_not_on_the_batch(model):
    together = made(model, PROMPTS)
    for batch in (1, 2):
        assert apart(made(model, PROMPTS, batch=batch), together) <= 1
    for i, prompt in enumerate(PROMPTS):
        assert apart(made(model, [prompt], [i])[0], together[i]) <= 1
    assert apart(made(model, PROMPTS[:1], [7])[0], together[0]) > 10


def test_the_command_makes_the_same_picture_from_the_same_seed(checkpoint, tmp_path):
    shared = ["--prompt", "a red circle"]
    command(checkpoint, tmp_path / "a", *shared, "--n", 5, "--seed", 10)
    command(checkpoint, tmp_path / "b", *shared, "--n", 5, "--seed", 10, "--batch", 2)
    command(checkpoint, tmp_path / "c", *shared, "--seed", 13)
    five, again, one = (pictures(tmp_path / folder) for folder in "abc")
    assert len(five) == len(again) == 5 and len(one) == 1
    assert apart(five, again) <= 1 and apart(five[3], one[0]) <= 1
    assert [settings(path)["pictures"][0]["seed"] for path in sorted((tmp_path / "a").iterdir())] \
        == [10, 11, 12, 13, 14]


def test_noise_is_that_of_a_cpu_generator_of_the_seed_and_leaves_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    eps = sample.noise([3, 5], (3, 4, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(eps[1], torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)))


# ---- targets -------------------------------------------------------------------------------------

@pytest.mark.parametrize("entries, wanted", [
    ([], [1, 1, 1]),
    (["all=0.5"], [0.5, 0.5, 0.5]),
    (["y=0.25"], [1, 0.25, 1]),
    (["all=0", "z=0.75"], [0, 0, 0.75]),
    (["z=0.75", "all=0"], [0, 0, 0]),                                 # the last word counts
    (["x=0", "x=1"], [1, 1, 1]),
    ({"all": 0.5, "x": 1}, [1, 0.5, 0.5]),
])
def test_targets_are_read_in_order_into_the_columns_of_the_network(entries, wanted):
    assert sample.read_targets(entries, ("x", "y", "z"), 1.0, "--targets") == wanted


@pytest.mark.parametrize("entry", ["x=1.01", "x=-0.1", "x=nan", "x=inf", "x=high", "x=", "x"])
def test_a_level_outside_0_to_1_is_refused_with_its_flag(entry):
    with pytest.raises(ValueError, match="--negative x=.*: a level is a number from 0 .* to 1"):
        sample.read_targets([entry], ("x",), 0.0, "--negative")


def test_an_unknown_reward_is_refused_with_the_list_of_valid_ones():
    with pytest.raises(ValueError, match="--targets beauty=1: .* knows all, x, y"):
        sample.read_targets(["beauty=1"], ("x", "y"), 1.0, "--targets")
    with pytest.raises(ValueError, match="none, it was trained without rewards"):
        sample.read_targets(["x=1"], (), 1.0, "--targets")


def test_what_is_asked_for_is_printed_and_used(checkpoint, model, tmp_path):
    stdout = command(checkpoint, tmp_path / "a", "--prompt", PROMPTS[0], "--targets", "all=1",
                     "colorfulness=0.3", "--negative", "contrast=0.5", "--guidance", 3)
    assert ("targets alignment=1, colorfulness=0.3, contrast=1, sharpness=1, composition=1\n"
            in stdout)
    s_pos, s_neg = levels(1), levels(1, 0.0)
    s_pos[0, 1], s_neg[0, 2] = 0.3, 0.5
    wanted = made(model, PROMPTS[:1], s_pos=s_pos, s_neg=s_neg, guidance=3.0, steps=2)
    assert apart(pictures(tmp_path / "a")[0], wanted[0].permute(1, 2, 0)) == 0
    assert apart(made(model, PROMPTS[:1], guidance=3.0, steps=2), wanted) > 5


def test_a_checkpoint_may_say_what_it_is_asked_for_and_the_flag_overrides_it(checkpoint, tmp_path):
    place = shutil.copytree(checkpoint, tmp_path / "run")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"targets": sample.WORLD_TARGETS}))
    asked = lambda *flags: next(line for line in command(
        place, tmp_path / "out", "--prompt", PROMPTS[0], *flags).splitlines() if "targets" in line)
    assert asked() == ("targets alignment=1, colorfulness=0.75, contrast=0.75, sharpness=0.75, "
                       "composition=0.75")
    assert asked("--targets", "contrast=0.5").startswith("targets alignment=1, colorfulness=0.75, "
                                                         "contrast=0.5, sharpness=0.75")
    assert asked("--targets", "all=1") == ("targets alignment=1, colorfulness=1, contrast=1, "
                                           "sharpness=1, composition=1")
    assert sample.load(sample.SHIPPED, CPU).config["targets"] == sample.WORLD_TARGETS
    assert config["targets"] == []                           # it was trained on a folder of data


def test_half_precision_is_a_flag_and_nearly_the_same_picture(checkpoint, model, tmp_path):
    from data import precision
    fp32 = made(model, PROMPTS[:2])
    model.precision = "bf16"
    try:
        half = made(model, PROMPTS[:2])
    finally:
        model.precision = "auto"
    assert 0 < apart(fp32, half) and (fp32.float() - half.float()).abs().mean() < 4
    for name in ("fp32", "bf16"):
        command(checkpoint, tmp_path / name, "--prompt", PROMPTS[0], "--precision", name)
    assert pictures(tmp_path / "fp32")[0].tobytes() != pictures(tmp_path / "bf16")[0].tobytes()
    assert precision("auto", CPU) == torch.float32 == precision("fp32", torch.device("cuda"))


@pytest.mark.parametrize("real, wanted", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_chip_that_emulates_bf16_has_fp16(monkeypatch, real, wanted):
    from data import precision
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or real)
    assert precision("auto", torch.device("cuda")) == wanted


# ---- guidance ------------------------------------------------------------------------------------

def test_w_0_equals_no_guidance_whatever_the_negatives(model):
    free = made(model, PROMPTS, guidance=0.0)
    for value in (0.3, 1.0):
        assert torch.equal(made(model, PROMPTS, s_neg=levels(5, value), guidance=0.0), free)
    assert torch.equal(made(model, PROMPTS, guidance=0.0, negative_prompt="a triangle"), free)
    assert apart(made(model, PROMPTS, guidance=3.0), free) > 20
    text, mask = model.encoder.encode(PROMPTS)
    x, z, times = sample.noise(range(5), (3, S, S)), None, torch.linspace(1, 0, 5)
    with torch.no_grad():
        for now, after in zip(times[:-1], times[1:]):                 # Euler on v⁺ alone
            v, z, _ = model.net(x, now.expand(5), levels(5), text, mask, z)
            x = x + (after - now) * v
    std, mean = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("std", "mean"))
    by_hand = (x * std + mean).round().clamp(0, 255)
    assert apart(made(model, PROMPTS, guidance=0.0, solver="euler", shift=1.0), by_hand) <= 1


def test_the_negative_prompt_is_the_same_caption_unless_one_is_given(checkpoint, model, tmp_path):
    same = [made(model, [prompt], [0], guidance=5.0, negative_prompt=prompt)
            for prompt in PROMPTS]
    default = [made(model, [prompt], [0], guidance=5.0) for prompt in PROMPTS]
    assert all(map(torch.equal, same, default))
    command(checkpoint, tmp_path / "empty", "--prompt", PROMPTS[1], "--guidance", 5,
            "--negative-prompt", "")
    command(checkpoint, tmp_path / "default", "--prompt", PROMPTS[1], "--guidance", 5)
    empty, default = (pictures(tmp_path / folder)[0] for folder in ("empty", "default"))
    wanted = made(model, PROMPTS[1:2], [0], guidance=5.0, negative_prompt="", steps=2)
    assert apart(empty, wanted[0].permute(1, 2, 0)) == 0 and apart(empty, default) > 20


@pytest.mark.parametrize("flags", [["--guidance", 0], ["--guidance", 2], ["--n", 3, "--batch", 2],
                                   ["--guidance", 2, "--interval", 0.3, 0.7, "--steps", 10],
                                   ["--solver", "euler", "--steps", 3]])
def test_the_printed_evaluations_are_the_calls_of_the_network(
        checkpoint, tmp_path, monkeypatch, flags):
    rows, forward = [], sample.TextRIN.forward
    monkeypatch.setattr(sample.TextRIN, "forward", lambda net, x, *rest:
                        rows.append(len(x)) or forward(net, x, *rest))
    stdout = command(checkpoint, tmp_path / "out.png", "--prompt", PROMPTS[0], *flags)
    found = re.search(r"(\d+) pictures, .*: (\d+) network evaluations", stdout)
    count, passes = map(int, found.groups())
    assert sum(rows) == count * passes + 1                # and one to count its operations


def test_the_printed_cost_is_torchs_count_of_one_forward_times_the_evaluations(
        checkpoint, model, tmp_path):
    text, mask = model.encoder.encode(PROMPTS[:3])
    given = (torch.zeros(3, 3, S, S), torch.ones(3), levels(3), text, mask)
    net = copy.deepcopy(model.net).to("meta")      # some torch count no attention of a CPU's
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*(tensor.to("meta") for tensor in given))
    once, each = sample.flops(model)
    assert counter.get_total_flops() == 3 * (once + each) and once > 0
    stdout = command(checkpoint, tmp_path / "out.png", "--prompt", PROMPTS[0], "--guidance", 1)
    printed = float(re.search(r"and (\S+) TFLOP a picture", stdout)[1])
    assert printed == pytest.approx((4 * each + 2 * once) / 1e12, rel=1e-3)
    for interval, reads in (((0.3, 0.7), 3), ((0, 0), 1)):            # t of the steps: 1, ..., 0.1
        stdout = command(checkpoint, tmp_path / "out.png", "--prompt", PROMPTS[0], "--guidance", 1,
                         "--interval", *interval, "--steps", 10, "--shift", 1)
        printed = float(re.search(r"and (\S+) TFLOP a picture", stdout)[1])
        passes = int(re.search(r": (\d+) network", stdout)[1])
        assert (passes > 10) == (reads == 3)
        assert printed == pytest.approx((passes * each + reads * once) / 1e12, rel=1e-3)


def test_the_checkpoint_carries_guidance_steps_and_solver(checkpoint, model, tmp_path):
    code, stdout, _ = run("sample.py", "--checkpoint", checkpoint, "--prompt", PROMPTS[0],
                          "--out", tmp_path / "out.png")
    own = model.config["sampler"]
    assert f"{own['steps']} {own['solver']} steps, guidance {own['guidance']:g}: " in stdout
    found, steps = settings(tmp_path / "out.png"), []
    assert {key: found[key] for key in own} == own
    assert torch.equal(made(model, PROMPTS[:1], steps=None, progress=lambda: steps.append(1)),
                       made(model, PROMPTS[:1], **own)) and len(steps) == own["steps"]


# ---- what to make --------------------------------------------------------------------------------

def test_a_sweep_has_one_column_a_level_of_the_same_noise(checkpoint, tmp_path):
    flags = ["--prompt", PROMPTS[0], "--sweep", "contrast=0:1:5", "--n", 2, "--targets", "all=0.5"]
    command(checkpoint, tmp_path / "sweep.png", *flags)
    found = settings(tmp_path / "sweep.png")["pictures"]
    column = REWARDS.index("contrast")
    assert [job["s_pos"][column] for job in found] == [0, 0.25, 0.5, 0.75, 1] * 2
    assert [job["seed"] for job in found] == [0] * 5 + [1] * 5
    assert all(value == 0.5 for job in found for i, value in enumerate(job["s_pos"])
               if i != column)
    command(checkpoint, tmp_path / "single.png", "--prompt", PROMPTS[0])
    sheet, single = (Image.open(tmp_path / f"{name}.png") for name in ("sweep", "single"))
    assert sheet.width == 5 * single.width                 # five columns, two rows, one heading
    assert sheet.height == 2 * single.height + 18


def test_prompts_come_one_a_line(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  two blue squares \n")
    command(checkpoint, tmp_path / "out", "--prompts", tmp_path / "prompts.txt", "--n", 2)
    found = [settings(path)["pictures"][0] for path in sorted((tmp_path / "out").iterdir())]
    assert [(job["prompt"], job["seed"]) for job in found] == [
        ("a red circle", 0), ("a red circle", 1), ("two blue squares", 0), ("two blue squares", 1)]


def test_json_lines_may_have_targets_a_negative_and_a_seed_of_their_own(
        checkpoint, model, tmp_path):
    lines = [{"prompt": "a red circle", "targets": {"contrast": 0.2}, "seed": 9},
             {"prompt": "two blue squares", "negative": {"all": 0.4, "contrast": 0}}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command(checkpoint, tmp_path / "out", "--prompts", tmp_path / "jobs.jsonl", "--seed", 3,
            "--targets", "all=0.9", "--guidance", 2)
    first, second = (settings(path)["pictures"][0] for path in sorted((tmp_path / "out").iterdir()))
    assert (first["s_pos"], first["s_neg"]) == ([0.9, 0.9, 0.2, 0.9, 0.9], [0] * 5)
    assert first["seed"] == 9
    assert (second["s_pos"], second["seed"]) == ([0.9] * 5, 3)
    assert second["s_neg"] == [0.4, 0.4, 0, 0.4, 0.4]
    wanted = made(model, ["two blue squares"], [3], levels(1, 0.9), torch.tensor(
        [second["s_neg"]]), guidance=2.0, steps=2)
    assert apart(pictures(tmp_path / "out")[1], wanted[0].permute(1, 2, 0)) <= 1


@pytest.mark.parametrize("by", ["contrast", "alignment"])
def test_best_of_keeps_the_best_of_the_measured_candidates(checkpoint, tmp_path, by):
    shared = ["--prompt", PROMPTS[0]]
    command(checkpoint, tmp_path / "all.png", *shared, "--n", 6)
    command(checkpoint, tmp_path / "best.png", *shared, "--n", 2, "--best-of", 3, "--by", by)
    candidates = settings(tmp_path / "all.png")["pictures"]
    found = settings(tmp_path / "best.png")["pictures"]
    assert len(found) == 2
    for job, three in zip(found, (candidates[:3], candidates[3:])):
        assert job["raw"][by] == max(each["raw"][by] for each in three)       # levels tie at 1
        assert job["seed"] in [each["seed"] for each in three]


# ---- files ---------------------------------------------------------------------------------------

def test_a_png_carries_its_settings_as_json(checkpoint, tmp_path):
    command(checkpoint, tmp_path / "out.png", "--prompt", PROMPTS[1], "--seed", 4, "--guidance",
            0.5, "--negative-prompt", "")
    found = settings(tmp_path / "out.png")
    assert (found["prompt"], found["seed"], found["guidance"], found["steps"]) == (
        PROMPTS[1], 4, 0.5, 2)
    assert found["negative_prompt"] == "" and found["checkpoint"] == str(checkpoint)
    assert [job["s_pos"] for job in found["pictures"]] == [[1.0] * 5]
    assert set(found["pictures"][0]["measured"]) == set(REWARDS)


def test_a_folder_gets_plain_pictures_of_the_networks_size(checkpoint, tmp_path):
    command(checkpoint, tmp_path / "a" / "b", "--prompt", PROMPTS[0], "--n", 3)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "00000.png", "00001.png", "00002.png"]
    assert all(picture.shape == (S, S, 3) for picture in pictures(tmp_path / "a" / "b"))


def test_the_measured_levels_are_those_of_the_written_picture(checkpoint, model, tmp_path):
    command(checkpoint, tmp_path / "out", "--prompt", PROMPTS[2], "--n", 2)
    for path in sorted((tmp_path / "out").iterdir()):
        picture = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
        raw = score_all(REWARDS, picture[None], [PROMPTS[2]]).numpy()
        wanted = dict(zip(REWARDS, model.bins.to_target(raw)[0].tolist()))
        assert settings(path)["pictures"][0]["measured"] == pytest.approx(wanted)


def test_alignment_is_not_measured_where_one_prompt_is_of_no_grammar(model):
    prompts = ["a red circle"] * 200 + ["circle red"]
    for found in sample.measure(model, torch.zeros(201, 3, S, S, dtype=torch.uint8), prompts):
        assert len(found) == 201
        assert all(set(row) == set(REWARDS) - {"alignment"} for row in found)


def test_a_tile_is_its_picture_enlarged_without_smoothing():
    picture = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    tile = np.asarray(sample.tile(picture, ["text"], 3))
    assert np.array_equal(tile[:12, :12], picture.permute(1, 2, 0).repeat_interleave(3, 0)
                          .repeat_interleave(3, 1).numpy())


def test_the_grid_of_training_has_rows_of_prompts_and_columns_of_levels_on_fixed_noise(model):
    sheet, scale = np.asarray(sample.progress_grid(model)), 96 // S
    assert sheet.shape == (18 + 6 * (96 + 4 + 4 + 18), 5 * (96 + 4), 3)
    found = []
    for row, column in ((0, 0), (0, 3), (0, 4), (5, 0), (5, 4)):
        wanted = made(model, [model.config["prompts"][row]], [row], levels(1, column / 4),
                      steps=None)[0].permute(1, 2, 0)
        top, left = 18 + row * 122 + 18, column * 100
        found.append(sheet[top:top + 96:scale, left:left + 96:scale])
        assert apart(found[-1], wanted) <= 1
    assert min(apart(a, b) for a, b in zip(found, found[1:])) > 5


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", ["missing", "unknown", "of another shape"])
def test_a_tensor_that_does_not_fit_is_named(checkpoint, tmp_path, fault):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    name = "blocks.0.read.mlp.up.bias"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        weights[name := "blocks.0.read.extra"] = torch.zeros(3)
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors does not fit") as caught:
        sample.load(folder, CPU)
    assert name in str(caught.value) and ": 1 tensors" in str(caught.value)


def test_a_loaded_checkpoint_has_the_saved_weights_and_rewards_in_evaluation_mode(
        checkpoint, model):
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(w, weights[name]) for name, w in model.net.state_dict().items())
    assert not model.net.training and model.rewards == REWARDS == model.bins.names
