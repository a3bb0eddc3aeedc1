"""The release's layout: what miro-t2i 0.1.4 made of tests/release/ (tests/reference.py --write made
both), our code makes, too; and what does not fit stops with its name."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from reference import PICTURES, apart
from safetensors.torch import load_file, save_file

import flow
import sample
from data import UserError
from model import RELEASE_REWARDS, release_name

FOLDER = ROOT / "tests" / "release"
REWARDS = ("clip", "aesthetic", "image_reward", "pick", "hpsv2", "vqa", "sci")


def load(folder=FOLDER, **changes) -> sample.Model:
    encoders = dict(text_encoder=str(FOLDER / "t5"), vae=str(FOLDER / "vae"))
    return sample.load(folder, "cpu", **encoders | changes)


@pytest.fixture(scope="module")
def expected() -> dict:
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> sample.Model:
    return load()


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the release's folder to damage."""
    return Path(shutil.copytree(FOLDER, tmp_path / "there"))


def given(expected: dict, prefix: str = "given") -> dict:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in expected.items()
            if name.startswith(f"{prefix}.")}


# ---- the same numbers ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["first", "next"])
def test_velocity_latents_and_log_variance_are_the_releases(model, expected, name):
    i = given(expected)
    with torch.no_grad():
        v, z, u = model.net(i["x_t"], i["t"], i["s"], i["text"], i["text_mask"],
                            i["z"] if name == "next" else None)
    assert apart(v, expected[f"{name}.v"]) < 1e-5
    assert apart(z, expected[f"{name}.z"]) < 1e-5
    assert apart(u, expected[f"{name}.u"]) < 1e-5


def test_the_loss_and_its_gradients_are_the_releases(expected):
    net, i = load().net.train(), given(expected)
    weighted = flow.loss(net, i["x_0"], i["eps"], i["t"], i["s"], i["text"], i["text_mask"],
                         expected["loss.coin"])[1]
    assert apart(weighted, expected["loss.weighted"]) < 1e-6
    weighted.mean().backward()
    wanted = {name: float(expected[f"gradient.{release_name(net, name)}"])
              for name, _ in net.named_parameters()}
    # Rounding is shared: it is some 1e-10 of the largest gradient, whatever the machine, and those
    # of q and k norms are small. Keys' biases have no gradient at all: no softmax sees them.
    largest = max(wanted.values())
    for name, p in net.named_parameters():
        noise = largest * (1e-7 if name.endswith("k_norm.bias") else 1e-9)
        assert float(p.grad.norm()) == pytest.approx(wanted[name], rel=3e-5, abs=noise), name


def test_fifty_guided_steps_end_where_the_releases_sampler_ends(model, expected):
    i = given(expected, "sampled")
    text_neg, mask_neg = torch.zeros_like(i["text"]), torch.zeros_like(i["text_mask"])
    text_neg[:, :1], mask_neg[:, :1] = i["empty"], True
    two = flow.branches(i["s"], torch.zeros_like(i["s"]), i["text"], i["text_mask"], 7.0, text_neg,
                        mask_neg)
    assert apart(flow.sample(model.net, i["eps"], two, steps=50), expected["sampled"]) < 1e-4


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_a_picture_is_the_pipelines(model, expected, number):
    prompt, targets, seed, steps, w = PICTURES[number]
    [x] = sample.pictures(model, [prompt], targets, seeds=[seed], guidance=w, steps=steps,
                          negative_prompt="")
    wanted = expected[f"picture.{number}"].permute(2, 0, 1).int()                  # (3, H, W)
    assert (x.int() - wanted).abs().max() <= 1


def test_what_is_computed_once_changes_no_result(model, expected):
    i = given(expected)
    asked = (i["s"], i["text"], i["text_mask"])
    with torch.no_grad():
        known = model.net.condition(*asked)
        for z in (None, i["z"]):
            once = model.net(i["x_t"], i["t"], *asked, z, known)
            anew = model.net(i["x_t"], i["t"], *asked, z)
            assert all(torch.equal(a, b) for a, b in zip(once, anew))
        other = model.net.condition(1 - i["s"], *asked[1:])              # and it is what is read
        assert not torch.equal(model.net(i["x_t"], i["t"], *asked, None, other)[0],
                               model.net(i["x_t"], i["t"], *asked)[0])


# ---- the one door --------------------------------------------------------------------------------

def test_the_releases_folder_is_read_with_its_settings(model):
    assert model.rewards == REWARDS
    assert model.config["sampler"] == dict(guidance=7.0, steps=50, solver="euler", shift=1.0)
    scale, bias = torch.tensor([[7.8518, 5.8465, 6.8716, 5.3140],
                                [-0.3480, 0.3754, 0.0419, 2.4331]])
    assert torch.allclose(torch.tensor(model.config["std"]), scale / 0.5)      # z = x_0 std + mean
    assert torch.allclose(torch.tensor(model.config["mean"]), bias)
    assert torch.equal(model.empty, torch.ones(1, 24))


def test_the_releases_reward_names_are_aliases(model):
    for here, there in RELEASE_REWARDS.items():
        one, other = (sample.read_targets([f"{name}=0.25"], model.rewards, 1.0, "--targets")
                      for name in (here, there))
        assert one == other == [0.25 if name == here else 1.0 for name in REWARDS]


def test_a_name_of_the_hub_is_downloaded_with_its_variant(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "miro-only-clip")
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, revision,
                        allow_patterns: calls.append((repository, revision, *allow_patterns))
                        or str(tmp_path))
    files = [f"miro-only-clip/{name}" for name in ("config.json", "model.safetensors",
                                                   "uncond_embedding.npy")]
    for name, pin in (("nicolas-dufour/miro-ablations", None), ("nicolas-dufour/x", "3f2a")):
        asked = name + (f"@{pin}" if pin else "")
        assert load(asked, variant="miro-only-clip").rewards == REWARDS
        assert calls.pop() == (name, pin, *files)

    def missing(repository, revision, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("404: no such\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(UserError, match=r"me/mine: .* does not give it \(404: no such\): [^\n]*$"):
        load("me/mine")


@pytest.mark.parametrize("damage", [b"", np.zeros(23, np.float32).tobytes()])
def test_a_damaged_empty_caption_is_one_sentence(copy, damage):
    (copy / "uncond_embedding.npy").write_bytes(damage)
    with pytest.raises(UserError, match="uncond_embedding.npy has no states of width 24"):
        load(copy)


@pytest.mark.parametrize("change, reason", [
    (lambda w: w.pop("network.text_registers"), "such as registers"),
    (lambda w: w.update({"network.cond_mask": torch.zeros(12) > 0}), "such as network.cond_mask"),
    (lambda w: w.update({"network.data_ln.weight": torch.zeros(3)}), "such as patch_norm.weight"),
    (lambda w: w.pop("postprocessing.scale"), "KeyError: 'postprocessing.scale'")])
def test_a_tensor_that_does_not_fit_stops_with_its_name(copy, change, reason):
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        load(copy)


@pytest.mark.parametrize("part, key, value, reason", [
    ("preconditioning", "do_normalization", "none", "do_normalization is none"),
    ("scheduler", "shift", 2.0, "scheduler.shift is 2.0"),
    ("network", "num_blocks", 3, "does not fit")])
def test_an_architecture_that_is_not_this_one_stops(copy, part, key, value, reason):
    config = json.loads((copy / "config.json").read_text())
    config.setdefault(part, {})[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        load(copy)


def test_a_text_encoder_of_another_width_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")
    config["network"]["label_dim"] = 20
    weights["network.map_text_tokens.weight"] = torch.zeros(32, 20)
    (copy / "uncond_embedding.npy").unlink()
    save_file(weights, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="states of width 24, and this network reads 20"):
        sample.pictures(load(copy), ["a circle"], steps=1)
