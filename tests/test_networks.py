"""The rewards that are CLIPs: small random models in the files' true layout, scored twice.

The second time by a transformer written out here, on weights that no library has touched.
"""
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from transformers import CLIPTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
import rewards as scorer
from data import decode, to_rgb
from by_hand import clip_layers, clip_patches, gelu, linear, norm, quick_gelu

CLIPS = {"pick": scorer.PickScore, "sci": scorer.SciScore, "clip_openai": scorer.OpenAIClip,
         "aesthetic": scorer.Aesthetic, "hpsv2": scorer.HPSv2}
# name: owner, seed, activation, width of the embedding, exp(its logit scale)
SMALL = {"pick": ("yuvalkirstain/PickScore_v1", 1, "gelu", 24, 99.5),
         "sci": ("Jialuo21/SciScore", 2, "gelu", 24, 97.0),
         "clip_openai": ("openai/clip-vit-large-patch14", 3, "quick_gelu", 768, 100.0),
         "aesthetic": ("openai/clip-vit-large-patch14", 3, "quick_gelu", 768, 100.0),
         "hpsv2": ("xswu/HPSv2", 4, "gelu", 24, 100.0)}
D, HEADS, LAYERS, MLP, PATCH, SIDE, VOCABULARY, TOKENS = 32, 4, 2, 128, 32, 224, 49408, 77
ARCHITECTURE = dict(embed_dim=24, vision_cfg=dict(image_size=SIDE, patch_size=PATCH, layers=LAYERS,
                                                  width=D, head_width=D // HEADS),
                    text_cfg=dict(context_length=TOKENS, vocab_size=VOCABULARY, width=D,
                                  heads=HEADS, layers=LAYERS))
open_clip.factory._MODEL_CONFIGS["small"] = ARCHITECTURE
MODEL = scorer.HPSv2.MODEL                              # before `small` replaces it


# ---- small random models -------------------------------------------------------------------------

@functools.cache
def weights(seed: int, embed: int) -> dict:
    """One random CLIP under the names of the hub; every value is exact in float16."""
    g, found = torch.Generator().manual_seed(seed), {}

    def add(name: str, *shape: int, std: float = 0.15, mean: float = 0.0) -> None:
        found[name] = (mean + std * torch.randn(*shape, generator=g)).half().float()

    add("vision_model.embeddings.class_embedding", D)
    add("vision_model.embeddings.patch_embedding.weight", D, 3, PATCH, PATCH, std=0.03)
    add("vision_model.embeddings.position_embedding.weight", (SIDE // PATCH) ** 2 + 1, D)
    add("text_model.embeddings.token_embedding.weight", VOCABULARY, D, std=0.2)
    add("text_model.embeddings.position_embedding.weight", TOKENS, D)
    add("visual_projection.weight", embed, D)
    add("text_projection.weight", embed, D)
    layers = [f"{side}_model.encoder.layers.{i}." for side in ("vision", "text")
              for i in range(LAYERS)]
    for at in ["vision_model.pre_layrnorm", "vision_model.post_layernorm",
               "text_model.final_layer_norm", *(f"{layer}layer_norm{i}" for layer in layers
                                                for i in (1, 2))]:
        add(f"{at}.weight", D, std=0.2, mean=1.0)
        add(f"{at}.bias", D, std=0.1)
    shapes = {f"self_attn.{x}_proj": (D, D) for x in ("q", "k", "v", "out")}
    for layer in layers:
        for name, shape in (shapes | {"mlp.fc1": (MLP, D), "mlp.fc2": (D, MLP)}).items():
            add(f"{layer}{name}.weight", *shape)
            add(f"{layer}{name}.bias", shape[0])
    return found


def hub_names(w: dict, scale: float) -> dict:
    """A checkpoint of the hub, position_ids included."""
    return w | {"logit_scale": torch.tensor(scale).log(),
                "text_model.embeddings.position_ids": torch.arange(TOKENS)[None],
                "vision_model.embeddings.position_ids": torch.arange(50)[None]}


def open_names(w: dict, scale: float) -> dict:
    """The same as open_clip calls them."""
    names = {"vision_model.": "visual.", "text_model.": "", "embeddings.class_embedding":
             "class_embedding", "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre",
             "embeddings.position_embedding.weight": "positional_embedding",
             "embeddings.token_embedding": "token_embedding", "post_layernorm": "ln_post",
             "final_layer_norm": "ln_final", "visual_projection.weight": "visual.proj",
             "text_projection.weight": "text_projection", "encoder.layers": "transformer.resblocks",
             "self_attn.out_proj": "attn.out_proj", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.q_proj.": "attn.in_proj_"}
    found = {"logit_scale": torch.tensor(scale).log()}
    for name, x in w.items():
        if "q_proj" in name:
            x = torch.cat([w[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            turned = name in ("visual.proj", "text_projection")
            found[name] = x.T.contiguous() if turned else x
    return found


def head_names() -> dict:
    """The five layers of aesthetic's head."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for i, (a, b) in zip((0, 2, 4, 6, 7), ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        found[f"layers.{i}.weight"] = torch.randn(b, a, generator=g) * (1.5 / a) ** 0.5
        found[f"layers.{i}.bias"] = torch.randn(b, generator=g) * 0.1
    return found


def head_file() -> bytes:
    """The same as a file, always the same bytes."""
    buffer = io.BytesIO()
    torch.save(head_names(), buffer)
    return buffer.getvalue()


def configuration(activation: str, embed: int) -> dict:
    """config.json of a CLIPModel as the hub has it: an eos_token_id of 2, which nothing is."""
    tower = dict(hidden_size=D, hidden_act=activation, intermediate_size=MLP, layer_norm_eps=1e-5,
                 num_hidden_layers=LAYERS, num_attention_heads=HEADS, projection_dim=embed)
    return dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=embed,
        text_config=tower | dict(
            model_type="clip_text_model", vocab_size=VOCABULARY, max_position_embeddings=TOKENS,
            bos_token_id=0, eos_token_id=2, pad_token_id=1),
        vision_config=tower | dict(model_type="clip_vision_model", image_size=SIDE,
                                   patch_size=PATCH))


def write_tokenizer(folder: Path) -> None:
    """OpenAI's byte-pair vocabulary, which open_clip carries, in the files of the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, tokens = vocabulary()
    start, end = tokens[-2:]
    merges, numbers = [" ".join(pair) for pair in pairs], {a: i for i, a in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = dict(bos_token=start, eos_token=end, unk_token=end, pad_token=end)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | dict(
        tokenizer_class="CLIPTokenizer", model_max_length=TOKENS, do_lower_case=True,
        add_prefix_space=False, errors="replace")))
    tokenizer = CLIPTokenizerFast(vocab=numbers, merges=pairs)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_models(folder: Path) -> None:
    """FOLDER/OWNER/NAME/files of the five: random weights, true names, some 30 MB."""
    laion = folder / scorer.PickScore.SOURCES[1][0]
    write_tokenizer(laion)
    for name in ("pick", "sci", "clip_openai"):
        owner, seed, activation, embed, scale = SMALL[name]
        target = folder / owner
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps(configuration(activation, embed)))
        save_file(hub_names(weights(seed, embed), scale), target / "model.safetensors",
                  metadata={"format": "pt"})
        for file in laion.iterdir() if name != "pick" else ():
            shutil.copy(file, target)
    owner, seed, _, embed, scale = SMALL["hpsv2"]
    (folder / owner).mkdir(parents=True)
    state = {key: value.half() for key, value in open_names(weights(seed, embed), scale).items()}
    for kind in (scorer.HPSv2, scorer.HPSv20):
        torch.save({"epoch": 1, "name": "hps", "state_dict": state},
                   folder / owner / kind.SOURCES[0][1][0])
    head = folder / scorer.Aesthetic.SOURCES[1][0]
    head.mkdir(parents=True)
    (head / scorer.Aesthetic.HEAD).write_bytes(head_file())


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scorer.HPSv2, "MODEL", "small")
    monkeypatch.setattr(scorer.Aesthetic, "SHA256", hashlib.sha256(head_file()).hexdigest())


@functools.cache
def load(name: str, models: Path, dtype=torch.float32):
    kind = CLIPS[name]
    return kind([models / owner for owner, _ in kind.SOURCES], torch.device("cpu"), dtype)


# ---- the same, written out -----------------------------------------------------------------------

def see(w, pixels, activation):
    """uint8 (B, 3, 224, 224) → unit vectors (B, E)."""
    x = clip_layers(w, "vision_model", clip_patches(w, pixels), LAYERS, HEADS, activation)[:, 0]
    return normalize(linear(w, "visual_projection", norm(w, "vision_model.post_layernorm", x)))


def read(w, prompts, activation):
    """Prompts → unit vectors (B, E), each prompt on its own and without padding."""
    found, at = [], "text_model.embeddings."
    for prompt in prompts:
        ids = torch.tensor(tokenise(prompt))
        x = w[at + "token_embedding.weight"][ids] + w[at + "position_embedding.weight"][:len(ids)]
        after = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        x = clip_layers(w, "text_model", x[None], LAYERS, HEADS, activation, after)[0, -1]
        found.append(linear(w, "text_projection", norm(w, "text_model.final_layer_norm", x)))
    return normalize(torch.stack(found))


def normalize(e):
    return e / e.square().sum(-1, keepdim=True).sqrt()


def vocabulary() -> tuple:
    """OpenAI's pairs in the order of their joining, and all tokens, as open_clip carries them."""
    merges = gzip.open(default_bpe()).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    pairs, letters = [tuple(merge.split()) for merge in merges], list(bytes_to_unicode().values())
    return pairs, [*letters, *(a + "</w>" for a in letters), *map("".join, pairs),
                   "<|startoftext|>", "<|endoftext|>"]


def tokenise(prompt: str) -> list:
    """Start, at most 75 byte pairs, end, as open_clip cuts them."""
    ids = open_clip.get_tokenizer("ViT-H-14")(prompt)[0].tolist()
    return ids[:ids.index(49407) + 1]


def score_again(name: str, pixels, prompts) -> torch.Tensor:
    _, seed, activation, embed, scale = SMALL[name]
    w = hub_names(weights(seed, embed), scale)
    activation = quick_gelu if activation == "quick_gelu" else gelu
    seen = see(w, pixels, activation)
    if name == "aesthetic":
        head = head_names()
        for i in (0, 2, 4, 6, 7):
            seen = seen @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
        return seen[:, 0]
    cosine = (seen * read(w, prompts, activation)).sum(-1)
    return cosine * scale / 100 if name in ("pick", "sci") else cosine


# ---- sixteen pictures and prompts ----------------------------------------------------------------

PROMPTS = ["", "a cat", "A RED Bus", "two dogs on a beach, 35 mm photograph", "word " * 200,
           "naïve café in München", "東京の夜景", "🦊 and 🐻", "<b>bold</b> <image>",
           'a "quoted" sign', "it's the dog's bone", "1234567890",
           "  many   spaces\n and\tlines ", "a_b-c/d\\e",
           "an astronaut riding a horse on mars", "?!... (((masterpiece)))"]


def field(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random picture of strong colours."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def encoded() -> list:
    """16 encoded pictures and what they show as RGB, one and another as PIL images."""
    shapes = [(224, 224), (640, 512), (512, 640), (225, 224), (333, 517), (97, 61), (61, 97),
              (224, 301), (400, 90), (90, 400), (447, 449), (1, 1), (31, 224), (300, 300),
              (223, 225), (800, 601)]
    found = []
    for i, (width, height) in enumerate(shapes):
        image, buffer, exif = field(width, height, i), io.BytesIO(), Image.Exif()
        if i % 3 == 1:                            # transparent, but for the left half
            seen = Image.new("RGB", image.size, "white")
            seen.paste(image.crop((0, 0, width // 2, height)))
            image.putalpha(Image.new("L", image.size))
            image.paste(seen.crop((0, 0, width // 2, height)))
        elif i % 3 == 2:                          # EXIF 6: the camera was turned, turn it back
            exif[0x0112] = 6
            seen = image.transpose(Image.Transpose.ROTATE_270)
        else:
            seen = image
        image.save(buffer, "PNG", exif=exif)
        found.append((buffer.getvalue(), seen))
    return found


PICTURES = encoded()


def cut(data: bytes, kind: str, n: int) -> torch.Tensor:
    return scorer.cut(to_rgb(decode(data)), kind, n)


def pixels_of(image: Image.Image, n: int) -> torch.Tensor:
    """uint8 (3, n, n) by torchvision."""
    image = CenterCrop(n)(Resize(n, InterpolationMode.BICUBIC)(image))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- scores --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CLIPS)
def test_a_score_equals_the_transformer_written_out(name, models):
    scorer_ = load(name, models)
    pixels = torch.stack([cut(data, "crop", 224) for data, _ in PICTURES])
    with torch.no_grad():
        found = scorer_.judge(scorer_.see(pixels), PROMPTS)
    expected = score_again(name, torch.stack([pixels_of(seen, 224) for _, seen in PICTURES]),
                           PROMPTS)
    assert found.shape == (16,) and found.dtype == torch.float32
    assert expected.std() > 0.01                        # or equality would say little
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", CLIPS)
def test_bfloat16_towers_stay_close_and_constants_stay_exact(name, models):
    pixels = torch.stack([pixels_of(seen, 224) for _, seen in PICTURES])
    half = load(name, models, torch.bfloat16)
    with torch.no_grad():
        found = half.judge(half.see(pixels), PROMPTS)
    expected = score_again(name, pixels, PROMPTS)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.15 * expected.std()
    if name in ("pick", "sci"):                         # 1 % too low if the logarithm were rounded
        assert half.scale == pytest.approx(SMALL[name][4] / 100, rel=1e-6)


# ---- files that are not what they should be ------------------------------------------------------

@pytest.mark.parametrize("name", ["pick", "aesthetic", "hpsv2"])
@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "half"])
def test_a_checkpoint_with_another_tensor_or_half_of_it_is_refused(name, fault, models, tmp_path):
    owners = [owner for owner, _ in CLIPS[name].SOURCES]
    for owner in owners:
        shutil.copytree(models / owner, tmp_path / owner)
    file = tmp_path / owners[0] / (scorer.HPSv2.SOURCES[0][1][0] if name == "hpsv2" else
                                   "model.safetensors")
    tensors = torch.load(file)["state_dict"] if name == "hpsv2" else load_file(file)
    key = "visual.ln_post.bias" if name == "hpsv2" else "vision_model.post_layernorm.bias"
    said = key = "visual.extra.weight" if fault == "unknown" else key
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(D + 1)
    (torch.save if name == "hpsv2" else save_file)(tensors, file)
    if fault == "half":
        file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
        said = "fetch it again"
    with pytest.raises(scorer.UserError) as error:
        load(name, tmp_path)
    assert said in str(error.value) and owners[0] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture
def page(monkeypatch, tmp_path):
    """page(content): from now on the head's page serves this."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def serve(content: bytes) -> None:
        (tmp_path / "page").write_bytes(content)
        monkeypatch.setattr(torch.hub, "urlopen",
                            lambda request: urllib.request.urlopen((tmp_path / "page").as_uri()))

    return serve


@pytest.mark.parametrize("content", [b"<html>", head_file()[:100_000]])
def test_no_other_file_than_the_head_stays_under_its_name(content, page, tmp_path):
    repository, patterns = scorer.Aesthetic.SOURCES[1]
    file = tmp_path / "hub" / repository / scorer.Aesthetic.HEAD

    def fetch():
        return scorer.fetch(repository, patterns, None, "aesthetic needs", 1.7)

    page(content)
    with pytest.raises(scorer.UserError, match="aesthetic needs sac.*invalid hash.*--models"):
        fetch()
    assert not any(file.parent.iterdir())
    page(head_file())
    assert fetch() == file.parent and file.read_bytes() == head_file()
    page(b"not asked again")
    assert fetch() == file.parent


def test_a_head_that_is_given_must_be_the_right_one(models, tmp_path):
    (tmp_path / scorer.Aesthetic.HEAD).write_bytes(head_file()[:100_000])
    with pytest.raises(scorer.UserError, match=f"{re.escape(scorer.Aesthetic.HEAD)} is not"):
        scorer.Aesthetic((models / SMALL["aesthetic"][0], tmp_path), "cpu", torch.float32)


def test_a_folder_without_its_tokenizer_is_refused(models, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(models / scorer.PickScore.SOURCES[1][0], tokenizer)
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tokenizer / file).unlink()
    with pytest.raises(scorer.UserError, match="has no tokenizer of this network"):
        scorer.PickScore((models / SMALL["pick"][0], tokenizer), "cpu", torch.float32)


def test_hpsv2_is_open_clips_vit_h_14_with_exact_gelus():
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(MODEL)).eval()
    gelus = [m for m in model.modules() if type(m).__name__.endswith("GELU")]
    assert {(type(m), m.approximate) for m in gelus} == {(torch.nn.GELU, "none")}
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert model.visual.image_size == (224, 224) and model.visual.grid_size == (16, 16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 986.1


# ---- views ---------------------------------------------------------------------------------------

def test_a_crop_is_torchvisions_and_normalised_open_clips_to_the_last_bit():
    transform = open_clip.image_transform(224, is_train=False)
    for data, seen in PICTURES:
        for n in (224, 512):
            assert torch.equal(cut(data, "crop", n), pixels_of(seen, n))
        pixels = cut(data, "crop", 224)[None]
        assert torch.equal(scorer.normalised(pixels, torch.float32)[0], transform(seen))


def test_a_pad_is_the_picture_in_the_middle_of_a_square_of_the_mean_colour():
    colour = [int(255 * mean) for mean in scorer.MEAN]
    for data, seen in PICTURES:
        pixels = np.array(seen)                                                  # (H, W, 3)
        height, width = pixels.shape[:2]
        side = max(height, width)
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = colour
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top:top + height, left:left + width] = pixels
        expected = Resize((336, 336), InterpolationMode.BICUBIC)(Image.fromarray(canvas))
        found = cut(data, "pad", 336)
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize("view", [("crop", 512), ("pad", 336)])
def test_a_thread_of_pixels_is_refused_before_it_takes_gigabytes(view):
    with pytest.raises(ValueError, match="40000 x 1"):
        scorer.cut(Image.new("RGB", (40_000, 1)), *view)
