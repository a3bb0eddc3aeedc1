"""The rewards that are CLIPs: small random models in the files' true layout, scored twice.

The second time by a transformer written out here, on weights that no library has touched.
"""
import functools
import gzip
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import open_clip
import pytest
import regex
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
import rewards as scorer

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


# ---- small random models -------------------------------------------------------------------------

@functools.cache
def weights(seed: int, embed: int) -> dict:
    """One random CLIP under names of its own; every value is exact in float16."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.15, mean=0.0):
        return (mean + std * torch.randn(*shape, generator=g)).half().float()

    def norm():
        return normal(D, std=0.2, mean=1.0), normal(D, std=0.1)

    def tower():
        return [dict(ln1=norm(), ln2=norm(), qkv=(normal(3 * D, D, std=0.2), normal(3 * D)),
                     out=(normal(D, D), normal(D)), up=(normal(MLP, D), normal(MLP)),
                     down=(normal(D, MLP), normal(D))) for _ in range(LAYERS)]

    return dict(patch=normal(D, 3, PATCH, PATCH, std=0.03), cls=normal(D),
                places=normal((SIDE // PATCH) ** 2 + 1, D), before=norm(), vision=tower(),
                after=norm(), project=normal(embed, D), words=normal(VOCABULARY, D, std=0.2),
                positions=normal(TOKENS, D), text=tower(), final=norm(),
                project_text=normal(embed, D))


def named(prefix: str, pair: tuple) -> dict:
    return {f"{prefix}.weight": pair[0], f"{prefix}.bias": pair[1]}


def hub_names(w: dict, scale: float) -> dict:
    """The tensors as CLIPModel's checkpoints on the hub call them, position_ids included."""
    found = {"logit_scale": torch.tensor(scale).log(), "visual_projection.weight": w["project"],
             "text_projection.weight": w["project_text"],
             "text_model.embeddings.token_embedding.weight": w["words"],
             "text_model.embeddings.position_embedding.weight": w["positions"],
             "text_model.embeddings.position_ids": torch.arange(TOKENS)[None],
             "vision_model.embeddings.class_embedding": w["cls"],
             "vision_model.embeddings.patch_embedding.weight": w["patch"],
             "vision_model.embeddings.position_embedding.weight": w["places"],
             "vision_model.embeddings.position_ids": torch.arange(len(w["places"]))[None],
             **named("vision_model.pre_layrnorm", w["before"]),
             **named("vision_model.post_layernorm", w["after"]),
             **named("text_model.final_layer_norm", w["final"])}
    for side in ("vision", "text"):
        for i, layer in enumerate(w[side]):
            at = f"{side}_model.encoder.layers.{i}"
            for j, name in enumerate("qkv"):
                found |= named(f"{at}.self_attn.{name}_proj",
                               tuple(a[j * D:(j + 1) * D] for a in layer["qkv"]))
            for name, key in (("self_attn.out_proj", "out"), ("layer_norm1", "ln1"),
                              ("layer_norm2", "ln2"), ("mlp.fc1", "up"), ("mlp.fc2", "down")):
                found |= named(f"{at}.{name}", layer[key])
    return {key: value.clone() for key, value in found.items()}


def open_names(w: dict, scale: float) -> dict:
    """The same as open_clip calls them."""
    found = {"logit_scale": torch.tensor(scale).log(), "positional_embedding": w["positions"],
             "text_projection": w["project_text"].T, "token_embedding.weight": w["words"],
             "visual.class_embedding": w["cls"], "visual.conv1.weight": w["patch"],
             "visual.positional_embedding": w["places"], "visual.proj": w["project"].T,
             **named("visual.ln_pre", w["before"]), **named("visual.ln_post", w["after"]),
             **named("ln_final", w["final"])}
    for side, prefix in (("vision", "visual."), ("text", "")):
        for i, layer in enumerate(w[side]):
            at = f"{prefix}transformer.resblocks.{i}"
            found |= {f"{at}.attn.in_proj_weight": layer["qkv"][0],
                      f"{at}.attn.in_proj_bias": layer["qkv"][1]}
            for name, key in (("attn.out_proj", "out"), ("ln_1", "ln1"), ("ln_2", "ln2"),
                              ("mlp.c_fc", "up"), ("mlp.c_proj", "down")):
                found |= named(f"{at}.{name}", layer[key])
    return {key: value.contiguous().clone() for key, value in found.items()}


def head_names() -> dict:
    """The five layers of aesthetic's head."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for i, (a, b) in zip((0, 2, 4, 6, 7), ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        found[f"layers.{i}.weight"] = torch.randn(b, a, generator=g) * (1.5 / a) ** 0.5
        found[f"layers.{i}.bias"] = torch.randn(b, generator=g) * 0.1
    return found


def configuration(activation: str, embed: int, width: int = D, layers: int = LAYERS,
                  heads: int = HEADS, mlp: int = MLP, patch: int = PATCH, text: tuple = ()) -> dict:
    """config.json of a CLIPModel as the hub has it: an eos_token_id of 2, which nothing is."""
    t_width, t_layers, t_heads = text or (width, layers, heads)
    return dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=embed,
        text_config=dict(model_type="clip_text_model", hidden_size=t_width, hidden_act=activation,
                         intermediate_size=4 * t_width, num_hidden_layers=t_layers,
                         num_attention_heads=t_heads, vocab_size=VOCABULARY, layer_norm_eps=1e-5,
                         max_position_embeddings=TOKENS, projection_dim=embed, bos_token_id=0,
                         eos_token_id=2, pad_token_id=1),
        vision_config=dict(model_type="clip_vision_model", hidden_size=width, hidden_act=activation,
                           intermediate_size=mlp, num_hidden_layers=layers, layer_norm_eps=1e-5,
                           num_attention_heads=heads, image_size=SIDE, patch_size=patch,
                           projection_dim=embed))


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
    for file in (scorer.HPSv2.FILE, scorer.HPSv20.FILE):
        torch.save({"epoch": 1, "name": "hps", "state_dict": state}, folder / owner / file)
    head = folder / scorer.Aesthetic.SOURCES[1][0]
    head.mkdir(parents=True)
    torch.save(head_names(), head / scorer.Aesthetic.HEAD)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scorer.HPSv2, "ARCHITECTURE", ARCHITECTURE)


@functools.cache
def load(name: str, models: Path, dtype=torch.float32):
    kind = CLIPS[name]
    return kind(*(models / owner for owner, _ in kind.SOURCES), torch.device("cpu"), dtype)


# ---- the same, written out -----------------------------------------------------------------------

def norm(x, pair):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * pair[0] + pair[1]


def transformer(x, layers, activation: str, causal: bool):
    """x (B, L, D) → (B, L, D): attention and MLP, each on the normalised stream."""
    length = x.shape[1]
    hidden = torch.arange(length)[:, None] < torch.arange(length) if causal else torch.tensor(False)
    for layer in layers:
        q, k, v = (norm(x, layer["ln1"]) @ layer["qkv"][0].T + layer["qkv"][1]).unflatten(
            -1, (3, HEADS, D // HEADS)).unbind(2)                                # (B, L, H, D/H)
        similar = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(D // HEADS)
        share = similar.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhlm,bmhd->blhd", share, v).flatten(2)
        x = x + mixed @ layer["out"][0].T + layer["out"][1]
        up = norm(x, layer["ln2"]) @ layer["up"][0].T + layer["up"][1]
        up = (up * torch.sigmoid(1.702 * up) if activation == "quick_gelu"
              else up * (1 + torch.erf(up / 2 ** 0.5)) / 2)
        x = x + up @ layer["down"][0].T + layer["down"][1]
    return x


def see(w, pixels, activation):
    """uint8 (B, 3, 224, 224) → unit vectors (B, E)."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double()
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double()
    x = ((pixels.permute(0, 2, 3, 1).double() / 255 - mean) / std).float()       # (B, n, n, 3)
    n = SIDE // PATCH
    x = x.unflatten(1, (n, PATCH)).unflatten(3, (n, PATCH))                     # (B, n, P, n, P, 3)
    x = torch.einsum("bipjqc,dcpq->bijd", x, w["patch"]).flatten(1, 2)
    x = torch.cat([w["cls"].expand(len(x), 1, D), x], 1) + w["places"]
    x = transformer(norm(x, w["before"]), w["vision"], activation, causal=False)[:, 0]
    e = norm(x, w["after"]) @ w["project"].T
    return e / e.pow(2).sum(-1, keepdim=True).sqrt()


def read(w, prompts, activation):
    """Prompts → unit vectors (B, E), each prompt on its own and without padding."""
    found = []
    for prompt in prompts:
        tokens = tokenise(prompt)
        x = w["words"][torch.tensor(tokens)] + w["positions"][:len(tokens)]
        x = transformer(x[None], w["text"], activation, causal=True)[0, -1]
        e = norm(x, w["final"]) @ w["project_text"].T
        found.append(e / e.pow(2).sum().sqrt())
    return torch.stack(found)


def vocabulary() -> tuple:
    """OpenAI's pairs in the order of their joining, and all tokens, as open_clip carries them."""
    merges = gzip.open(default_bpe()).read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    pairs, letters = [tuple(merge.split()) for merge in merges], list(bytes_to_unicode().values())
    return pairs, [*letters, *(a + "</w>" for a in letters), *map("".join, pairs),
                   "<|startoftext|>", "<|endoftext|>"]


@functools.cache
def ranks() -> tuple:
    """pair → its rank, and token → its number."""
    pairs, tokens = vocabulary()
    return {pair: i for i, pair in enumerate(pairs)}, {token: i for i, token in enumerate(tokens)}


def tokenise(prompt: str) -> list:
    """Byte pairs, joined by rank: start, at most 75 tokens, end."""
    (rank, number), letters, found = ranks(), bytes_to_unicode(), []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
                              prompt.lower()):
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, 1e9))
            if best not in rank:
                break
            joined, i = [], 0
            while i < len(parts):
                two = tuple(parts[i:i + 2]) == best
                joined.append("".join(parts[i:i + 1 + two]))
                i += 1 + two
            parts = joined
        found += [number[part] for part in parts]
    return [49406, *found[:75], 49407]


def score_again(name: str, pixels, prompts) -> torch.Tensor:
    _, seed, activation, embed, scale = SMALL[name]
    w = weights(seed, embed)
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
    modes = ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1", "turned"]
    found = []
    for i, (width, height) in enumerate(shapes):
        mode, image, buffer = modes[i % 8], field(width, height, i), io.BytesIO()
        if mode in ("RGBA", "LA"):                # a hole in the middle, which white shines through
            hole = Image.new("L", image.size, 255)
            hole.paste(0, (width // 4, height // 4, width // 2 + 1, height // 2 + 1))
            image = image.convert(mode[:-1])
            seen = Image.new("RGB", image.size, "white")
            seen.paste(image.convert("RGB"), mask=hole)
            image.putalpha(hole)
            image.save(buffer, "PNG")
        elif mode == "turned":                    # EXIF 6: the camera was turned, turn it back
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(buffer, "PNG", exif=exif)
            seen = image.transpose(Image.Transpose.ROTATE_270)
        else:
            image = image.quantize(16) if mode == "P" else image.convert(mode)
            image.save(buffer, "TIFF" if mode == "CMYK" else "JPEG" if i == 8 else "PNG")
            seen = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
        found.append((buffer.getvalue(), seen))
    return found


PICTURES = encoded()


def pixels_of(image: Image.Image, n: int) -> torch.Tensor:
    """uint8 (3, n, n) by torchvision."""
    image = CenterCrop(n)(Resize(n, InterpolationMode.BICUBIC)(image))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- scores --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CLIPS)
def test_a_score_equals_the_transformer_written_out(name, models):
    scorer_ = load(name, models)
    pixels = torch.stack([scorer.views(data, [("crop", 224)])["crop", 224] for data, _ in PICTURES])
    with torch.no_grad():
        found = scorer_.judge(scorer_.see(pixels), PROMPTS)
    expected = score_again(name, torch.stack([pixels_of(seen, 224) for _, seen in PICTURES]),
                           PROMPTS)
    assert found.shape == (16,) and found.dtype == torch.float32
    assert expected.std() > 0.02                        # or equality would say little
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


def test_a_score_does_not_depend_on_its_neighbours_in_the_batch(models):
    pixels = torch.stack([pixels_of(seen, 224) for _, seen in PICTURES])
    for name in CLIPS:
        network = load(name, models)
        with torch.no_grad():
            together = network.judge(network.see(pixels), PROMPTS)
            alone = torch.cat([network.judge(network.see(pixels[i:i + 1]), [PROMPTS[i]])
                               for i in (3, 4)])
        assert (together[3:5] - alone).abs().max() < 1e-5


def test_both_tokenizers_cut_prompts_alike(models):
    hub = load("pick", models).tokenizer(PROMPTS, padding="max_length", truncation=True,
                                         max_length=77)["input_ids"]
    open_ = load("hpsv2", models).tokenizer(PROMPTS).tolist()
    for prompt, one, other in zip(PROMPTS, hub, open_):
        expected = tokenise(prompt)
        assert one == expected + [49407] * (77 - len(expected)), prompt
        assert other == expected + [0] * (77 - len(expected)), prompt


def test_the_head_of_aesthetic_is_the_five_layers_as_one(models):
    head, e = head_names(), torch.randn(50, 768, generator=torch.Generator().manual_seed(0))
    network = load("aesthetic", models)
    expected = e.double()
    for i in (0, 2, 4, 6, 7):
        expected = expected @ head[f"layers.{i}.weight"].double().T + head[f"layers.{i}.bias"]
    assert (network.judge(e, [""] * 50) - expected[:, 0]).abs().max() < 1e-5


# ---- files that are not what they should be ------------------------------------------------------

def damage(name: str, models: Path, folder: Path, change) -> Path:
    """A copy of the models in which `change` was made to the tensors of one."""
    for owner in {owner for owner, _ in CLIPS[name].SOURCES}:
        (folder / owner).mkdir(parents=True, exist_ok=True)
        for file in (models / owner).iterdir():
            os.symlink(file, folder / owner / file.name)
    owner = CLIPS[name].SOURCES[0][0]
    file = folder / owner / (scorer.HPSv2.FILE if name == "hpsv2" else "model.safetensors")
    content = torch.load(file) if name == "hpsv2" else load_file(file)
    change(content["state_dict"] if name == "hpsv2" else content)
    file.unlink()
    if name == "hpsv2":
        torch.save(content, file)
    else:
        save_file(content, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen"])
def test_a_checkpoint_with_another_tensor_is_refused_by_name(name, fault, models, tmp_path):
    key = "visual.ln_post.bias" if name == "hpsv2" else "vision_model.post_layernorm.bias"
    key = "visual.extra.weight" if fault == "unknown" else key

    def change(tensors):
        if fault == "missing":
            del tensors[key]
        else:
            tensors[key] = torch.zeros(D + 1)

    with pytest.raises(ValueError) as error:
        load(name, damage(name, models, tmp_path, change))
    assert key in str(error.value) and CLIPS[name].SOURCES[0][0] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen"])
def test_a_head_of_other_layers_is_refused_by_name(fault, models, tmp_path):
    tensors = head_names()
    key = "layers.5.weight" if fault == "unknown" else "layers.6.weight"
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(16, 65)
    torch.save(tensors, tmp_path / scorer.Aesthetic.HEAD)
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as error:
        scorer.Aesthetic(models / SMALL["aesthetic"][0], tmp_path, "cpu", torch.float32)
    assert scorer.Aesthetic.HEAD in str(error.value)


@pytest.mark.parametrize("name", CLIPS)
def test_half_a_file_is_refused_in_one_sentence(name, models, tmp_path):
    folder = damage(name, models, tmp_path, lambda tensors: None)
    file = folder / CLIPS[name].SOURCES[0][0]
    file = file / (scorer.HPSv2.FILE if name == "hpsv2" else "model.safetensors")
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    with pytest.raises(ValueError, match="fetch it again") as error:
        load(name, folder)
    assert file.parent.name in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_checkpoint_that_holds_no_weights_is_refused(tmp_path):
    for content in ({"epoch": 1}, {"state_dict": [1, 2]}, [torch.zeros(3)], torch.zeros(3)):
        torch.save(content, tmp_path / scorer.HPSv2.FILE)
        with pytest.raises(ValueError, match=scorer.HPSv2.FILE):
            scorer.HPSv2(tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("lost", [["vocab.json", "merges.txt", "tokenizer.json"],
                                  ["vocab.json", "tokenizer.json"],
                                  ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_without_its_tokenizer_is_refused(lost, models, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(models / scorer.PickScore.SOURCES[1][0], tokenizer)
    for file in lost:
        (tokenizer / file).unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        scorer.PickScore(models / SMALL["pick"][0], tokenizer, "cpu", torch.float32)


def test_aesthetic_refuses_a_clip_with_another_activation(models, tmp_path):
    folder = damage("aesthetic", models, tmp_path, lambda tensors: None)
    config = folder / SMALL["aesthetic"][0] / "config.json"
    config.unlink()
    config.write_text(json.dumps(configuration("gelu", 768)))
    with pytest.raises(ValueError, match="quick_gelu"):
        load("aesthetic", folder)


# ---- the true architectures, without their weights -----------------------------------------------

HUGE = dict(activation="gelu", embed=1024, width=1280, layers=32, heads=16, mlp=5120, patch=14,
            text=(1024, 24, 16))
LARGE = dict(activation="quick_gelu", embed=768, width=1024, layers=24, heads=16, mlp=4096,
             patch=14, text=(768, 12, 12))


@functools.cache
def on_meta(name: str):
    """A full-size network without memory, and its two towers as functions of tensors."""
    with torch.device("meta"):
        if name == "hpsv2":
            model = open_clip.CLIP(**FULL).eval()
            return model, model.encode_image, model.encode_text
        config = configuration(**(HUGE if name in ("pick", "sci") else LARGE))
        model = CLIPModel(CLIPConfig(**config)).eval()
    return (model, lambda x: model.get_image_features(x).pooler_output,
            lambda x: model.get_text_features(input_ids=x).pooler_output)


FULL = scorer.HPSv2.ARCHITECTURE                        # before `small` replaces it


def parameters(embed, width, layers, patch, text, **_) -> int:
    """Of a CLIP, on paper: each layer has 12 D² + 13 D, of which 4 D² + 4 D are attention's."""
    places, (t_width, t_layers, _) = (SIDE // patch) ** 2 + 1, text
    vision = (3 * patch ** 2 * width + width + places * width + 4 * width
              + layers * (12 * width ** 2 + 13 * width) + width * embed)
    words = ((VOCABULARY + TOKENS) * t_width + t_layers * (12 * t_width ** 2 + 13 * t_width)
             + 2 * t_width + t_width * embed)
    return vision + words + 1


@pytest.mark.parametrize("name", CLIPS)
def test_the_true_networks_have_the_published_number_of_parameters(name):
    shape, published = (HUGE, 986.1) if name in ("pick", "sci", "hpsv2") else (LARGE, 427.6)
    count = sum(p.numel() for p in on_meta(name)[0].parameters())
    assert count == parameters(**shape) and round(count / 1e6, 1) == published
    kept = count - (parameters(**shape) - vision_parameters(**shape) if name == "aesthetic" else 0)
    assert CLIPS[name].MEMORY == pytest.approx(2 * kept / 1e9, abs=0.05)         # GB in bfloat16


def vision_parameters(embed, width, layers, patch, text, **_) -> int:
    """Of the picture's tower alone."""
    nothing = (0, 0, 0)
    return parameters(embed, width, layers, patch, nothing) - 1


@pytest.mark.parametrize("name", ["pick", "hpsv2", "clip_openai"])
def test_the_stated_work_is_what_torch_counts(name):
    _, look, read_ = on_meta(name)
    for stated, tower, x in zip(
            CLIPS[name].GFLOP, (look, read_),
            (torch.zeros(1, 3, SIDE, SIDE, device="meta"),
             torch.ones(1, TOKENS, dtype=torch.long, device="meta"))):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            tower(x)
        assert counter.get_total_flops() / 1e9 == pytest.approx(stated, rel=0.05)
    assert scorer.SciScore.GFLOP == scorer.PickScore.GFLOP                       # the same network
    assert scorer.Aesthetic.GFLOP == (scorer.OpenAIClip.GFLOP[0], 0)             # it reads nothing


def test_hpsv2_is_open_clips_vit_h_14_with_its_epsilon_activation_and_size():
    model, known = on_meta("hpsv2")[0], open_clip.get_model_config("ViT-H-14")
    assert {key: known[key] for key in FULL} == FULL and known.keys() == FULL.keys()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * (32 + 24) + 3 and {m.eps for m in norms} == {1e-5}
    gelus = [m for m in model.modules() if type(m).__name__.endswith("GELU")]
    assert len(gelus) == 32 + 24 and {type(m) for m in gelus} == {torch.nn.GELU}
    assert {m.approximate for m in gelus} == {"none"}
    assert model.visual.image_size == (224, 224) and model.visual.grid_size == (16, 16)
    assert model.visual.transformer.resblocks[0].attn.num_heads == 16
    assert model.context_length == 77 and model.vocab_size == 49408
    assert scorer.HPSv2.VIEW == ("crop", 224)


@pytest.mark.parametrize("name", [name for name in CLIPS if name != "hpsv2"])
def test_the_networks_of_transformers_keep_epsilon_activation_and_size(name):
    model = on_meta(name)[0]
    activation = "GELUActivation" if name in ("pick", "sci") else "QuickGELUActivation"
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {m.eps for m in norms} == {1e-5}
    assert {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__} == {activation}
    assert CLIPS[name].VIEW == ("crop", model.config.vision_config.image_size)


# ---- views ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [224, 512])
def test_a_crop_is_torchvisions_to_the_last_bit(n):
    for data, seen in PICTURES:
        assert torch.equal(scorer.views(data, [("crop", n)])["crop", n], pixels_of(seen, n))


def test_a_normalised_crop_is_open_clips():
    transform = open_clip.image_transform(224, is_train=False)
    for data, seen in PICTURES:
        pixels = scorer.views(data, [("crop", 224)])["crop", 224]
        assert torch.equal(scorer.normalised(pixels[None], torch.float32)[0], transform(seen))


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
        found = scorer.views(data, [("pad", 336)])["pad", 336]
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_several_views_of_a_picture_are_those_it_has_alone():
    wanted = [("crop", 224), ("crop", 512), ("pad", 336)]
    for data, _ in PICTURES:
        together = scorer.views(data, wanted)
        assert list(together) == wanted
        for view in wanted:
            assert together[view].is_contiguous() and together[view].dtype == torch.uint8
            assert torch.equal(together[view], scorer.views(data, [view])[view])


@pytest.mark.parametrize("view", [("crop", 512), ("pad", 336)])
def test_a_thread_of_pixels_is_refused_before_it_takes_gigabytes(view):
    buffer = io.BytesIO()
    Image.new("L", (40_000, 1)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="40000 x 1"):
        scorer.views(buffer.getvalue(), [view])
