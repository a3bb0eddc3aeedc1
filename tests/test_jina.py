"""jina-clip-v2 against its formula written a second time, on a small model in the true layout."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parents[1]))
import rewards
from by_hand import linear, norm, patches
from data import UserError
from rewards import JinaCLIP

CPU, FP32 = torch.device("cpu"), torch.float32
TASKS = ["retrieval.passage", "retrieval.query"]  # the hub's list holds the second alone
D, HEADS, DEPTH, FF, RANK, ALPHA, VOCAB = 64, 2, 2, 96, 4, 6, 200
HIDDEN = int(D * 2.6667)
TEXT = "text_model.transformer.roberta."


class SmallJina(JinaCLIP):
    IMAGE = dict(img_size=512, embed_dim=D, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.6667)
    TEXT = dict(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=DEPTH,
                num_attention_heads=HEADS, intermediate_size=FF)
    TOKENS = 60


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of jinaai/jina-clip-v2, at small sizes."""
    s = {"logit_scale": ()}

    def add(name: str, *shape: int, at: str = "vision_model."):
        s.update({f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]})

    def adapted(name: str, n: int, m: int, a: tuple, b: tuple):
        stem = f"{TEXT}{name}.parametrizations.weight."
        s.update({stem + "original": (n, m), stem + "0.lora_A": (len(TASKS), *a),
                  stem + "0.lora_B": (len(TASKS), *b)})

    s |= {"vision_model.cls_token": (1, 1, D), "vision_model.pos_embed": (1, 36 * 36 + 1, D)}
    add("patch_embed.proj", D, 3, 14, 14)
    add("norm", D)
    for b in (f"blocks.{i}." for i in range(DEPTH)):
        s |= {f"vision_model.{b}attn.{x}_proj.weight": (D, D) for x in "qkv"}
        s |= {f"vision_model.{b}attn.{x}_bias": (D,) for x in "qv"}
        for name, *shape in (("attn.proj", D, D), ("norm1", D), ("attn.inner_attn_ln", D),
                             ("norm2", D), ("mlp.ffn_ln", HIDDEN), ("mlp.w1", HIDDEN, D),
                             ("mlp.w2", HIDDEN, D), ("mlp.w3", D, HIDDEN)):
            add(b + name, *shape)
    for name, n in (("word", VOCAB), ("token_type", 1)):
        adapted(f"embeddings.{name}_embeddings", n, D, (n, RANK), (RANK, D))
    add("emb_ln", D, at=TEXT)
    for b in (f"encoder.layers.{i}." for i in range(DEPTH)):
        for name, n, m in (("mixer.Wqkv", 3 * D, D), ("mixer.out_proj", D, D),
                           ("mlp.fc1", FF, D), ("mlp.fc2", D, FF)):
            adapted(b + name, n, m, (RANK, m), (n, RANK))
            s[f"{TEXT}{b}{name}.bias"] = (n,)
        add(b + "norm1", D, at=TEXT)
        add(b + "norm2", D, at=TEXT)
    return s


def write_model(folder: Path) -> Path:
    """A random model in the hub repository's layout; the tokenizer asks for 77, as the true one."""
    g = torch.Generator().manual_seed(0)
    w = {k: torch.randn(s, generator=g) * (0.2 if len(s) > 1 else 0.1) for k, s in shapes().items()}
    for k in w:
        if k.endswith(("norm.weight", "norm1.weight", "norm2.weight", "_ln.weight")):
            w[k] += 1
    save_file(w, folder / "model.safetensors")
    lora = {"lora_adaptations": TASKS, "lora_alpha": ALPHA, "lora_rank": RANK}
    (folder / "config.json").write_text(json.dumps({
        "text_config": {"default_lora_task": "retrieval.query", "hf_model_config_kwargs": lora}}))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127)),
              "▁a", "▁the", "ü"]
    tok = Tokenizer(models.Unigram([(p, -1.0 - 0.1 * len(p)) for p in pieces], unk_id=3))
    tok.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tok.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tok.enable_truncation(77)
    tok.enable_padding(length=77, pad_id=1, pad_token="<pad>")
    tok.save(str(folder / "tokenizer.json"))
    return folder


PROMPTS = ["", " ", "a", "a cat", "the cat sat on the mat", "<b>bold</b> & <tags>",
           'a "quoted" word', "naïve café — übergroß", "海辺の夕日", "🦊 in a 🌲",
           "a  double   space", "\ttab\nnewline", "!?.,;:", "A" * 40,
           "the quick brown fox jumps over the lazy dog, again and again " * 5, "9999 {1} monk\\"]


def rotate(x, angle, interleaved):
    """x (H, L, E), angle (L, E/2): each pair of numbers is one complex number, turned by angle."""
    pair = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    y = torch.view_as_real(torch.view_as_complex(pair.contiguous()) * torch.exp(1j * angle))
    return y.flatten(-2) if interleaved else torch.cat((y[..., 0], y[..., 1]), -1)


def attend(q, k, v):
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)              # (H, L, E)


def reference_picture(w, pixels):
    w = {k.removeprefix("vision_model."): v for k, v in w.items()}
    pixels = pixels[None, :, :504, :504]                             # 36 patches; 8 pixels fall off
    x = patches(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"])[0]
    x = torch.cat((w["cls_token"][0], x)) + w["pos_embed"][0]        # (1 + 1296, D)
    e = D // HEADS
    freq = 10000.0 ** -(torch.arange(0, e // 2, 2) / (e // 2))       # (E/4,)
    t = torch.arange(36) / 36 * 16                                   # trained on 16 x 16 patches
    row, col = torch.meshgrid(t, t, indexing="ij")
    angle = torch.cat((row.flatten()[:, None] * freq, col.flatten()[:, None] * freq), -1)
    for i in range(DEPTH):
        b = f"blocks.{i}."
        y = norm(w, b + "norm1", x, 1e-6)
        q = heads(linear(w, b + "attn.q_proj", y) + w[b + "attn.q_bias"])
        k = heads(linear(w, b + "attn.k_proj", y))
        v = heads(linear(w, b + "attn.v_proj", y) + w[b + "attn.v_bias"])
        q, k = (torch.cat((z[:, :1], rotate(z[:, 1:], angle, True)), 1) for z in (q, k))
        y = norm(w, b + "attn.inner_attn_ln", attend(q, k, v), 1e-6)
        x = x + linear(w, b + "attn.proj", y)
        y = norm(w, b + "norm2", x, 1e-6)
        y = F.silu(linear(w, b + "mlp.w1", y)) * linear(w, b + "mlp.w2", y)
        x = x + linear(w, b + "mlp.w3", norm(w, b + "mlp.ffn_ln", y, 1e-6))
    return F.normalize(norm(w, "norm", x, 1e-6)[0], dim=0)           # (D,)


def reference_prompt(w, ids):
    """The adapter as a branch of its own beside the weight, one unpadded prompt at a time."""
    w = {k.removeprefix(TEXT): v for k, v in w.items()}
    task, scale = TASKS.index("retrieval.query"), ALPHA / RANK

    def lookup(name, ids):
        p = f"embeddings.{name}_embeddings.parametrizations.weight."
        a, b = w[p + "0.lora_A"][task], w[p + "0.lora_B"][task]
        return w[p + "original"][ids] + scale * a[ids] @ b

    def branch(name, x):
        p = f"{name}.parametrizations.weight."
        a, b = w[p + "0.lora_A"][task], w[p + "0.lora_B"][task]
        return x @ w[p + "original"].T + scale * (x @ a.T) @ b.T + w[name + ".bias"]

    x = lookup("word", ids) + lookup("token_type", torch.zeros_like(ids))
    x = norm(w, "emb_ln", x, 1e-5)                                   # (L, D)
    e = D // HEADS
    angle = torch.arange(len(ids))[:, None] * 20000.0 ** -(torch.arange(0, e, 2) / e)
    for i in range(DEPTH):
        b = f"encoder.layers.{i}."
        q, k, v = map(heads, branch(b + "mixer.Wqkv", x).chunk(3, -1))
        y = attend(rotate(q, angle, False), rotate(k, angle, False), v)
        x = norm(w, b + "norm1", x + branch(b + "mixer.out_proj", y), 1e-5)
        y = branch(b + "mlp.fc2", F.gelu(branch(b + "mlp.fc1", x)))
        x = norm(w, b + "norm2", x + y, 1e-5)
    return F.normalize(x.mean(0), dim=0)                             # (D,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("jina-clip-v2"))


@pytest.fixture(scope="module")
def scorer(folder):
    return SmallJina((folder,), CPU, FP32)


@pytest.fixture(scope="module")
def pictures():
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(16, 3, 9, 9, generator=g) * 255
    return F.interpolate(coarse, (512, 512), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def seen(scorer, pictures):
    return scorer.see(pictures)


def prompt_ids(folder, prompt):
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.no_padding()
    tok.no_truncation()
    ids = tok.encode(prompt).ids
    return torch.tensor(ids if len(ids) <= 60 else ids[:59] + [2])


def test_score_equals_the_formula_with_the_adapter_as_its_own_branch(
        folder, scorer, pictures, seen):
    w = load_file(folder / "model.safetensors")
    image = torch.stack([reference_picture(w, p) for p in pictures])
    text = torch.stack([reference_prompt(w, prompt_ids(folder, p)) for p in PROMPTS])
    score = scorer.judge(seen, PROMPTS)
    assert seen.dtype == score.dtype == FP32 and score.shape == (16,)
    assert len({round(s, 3) for s in score.tolist()}) > 12, "the scores must differ to be a test"
    assert (seen - image).abs().max() < 1e-5
    assert (score - (image * text).sum(-1)).abs().max() < 1e-5


def test_the_length_limit_is_ours_and_not_the_files(scorer, seen):
    long, longer = "cat " * 25, "cat " * 400                        # 60 tokens are the limit
    assert len(scorer.tokenizer.encode(longer).ids) == 60
    assert len(scorer.tokenizer.encode("a").ids) < 60, "the file's padding to 77 must be off"
    assert torch.equal(scorer.judge(seen[:1], [longer]), scorer.judge(seen[:1], [longer + "dog"]))
    assert not torch.equal(scorer.judge(seen[:1], ["cat"]), scorer.judge(seen[:1], [long]))


@pytest.mark.parametrize("name", [
    "vision_model.blocks.1.attn.v_bias", "vision_model.pos_embed", TEXT + "emb_ln.weight",
    TEXT + "encoder.layers.1.mixer.Wqkv.bias",
    TEXT + "embeddings.word_embeddings.parametrizations.weight.0.lora_A"])
@pytest.mark.parametrize("fault", ["missing", "renamed", "misshapen"])
def test_a_faulty_tensor_stops_the_loading_in_one_line(folder, tmp_path, name, fault):
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).symlink_to(folder / file)
    w = load_file(folder / "model.safetensors")
    tensor = w.pop(name)
    if fault == "renamed":
        w["model." + name] = tensor
    if fault == "misshapen":
        w[name] = torch.zeros(*tensor.shape, 2)
    save_file(w, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors does not fit its network ([^\n]*)"):
        SmallJina((tmp_path,), CPU, FP32)


def test_bf16_keeps_the_rotary_tables_exact_and_the_score_close(folder, scorer, pictures, seen):
    low = SmallJina((folder,), CPU, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for m in (low.image, low.text) for p in m.parameters())
    assert torch.equal(low.image.rope.pos_embed, scorer.image.rope.pos_embed)
    assert torch.equal(low.text.rotary_emb.inv_freq, scorer.text.rotary_emb.inv_freq)
    score = low.judge(low.see(pictures[:4]), PROMPTS[3:7])
    assert score.dtype == FP32
    assert (score - scorer.judge(seen[:4], PROMPTS[3:7])).abs().max() < 0.03


def test_the_full_size_model_is_the_published_architecture(folder, monkeypatch, tmp_path):
    """On device meta: what small models do not show."""
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).symlink_to(folder / file)
    monkeypatch.setattr(rewards, "fill", lambda *_: None)
    full = JinaCLIP((tmp_path,), torch.device("meta"), FP32)
    v, t = full.image, full.text.config
    assert v.patch_embed.grid_size == (36, 36) and v.pos_embed.shape == (1, 1297, 1024)
    assert len(v.blocks) == 24 and v.global_pool == "token" and v.num_prefix_tokens == 1
    assert tuple(v.rope.feat_shape) == (36, 36) and tuple(v.rope.ref_feat_shape) == (16, 16)
    assert v.rope.temperature == 10000 and not v.rope.rotate_half and v.norm.eps == 1e-6
    for a, m, b in ((b.attn, b.mlp, b) for b in v.blocks):
        assert a.num_heads == 16 and not a.rotate_half and b.gamma_1 is None and b.gamma_2 is None
        assert a.q_proj.bias is not None and a.k_proj.bias is None and a.v_proj.bias is not None
        assert {n.eps for n in (b.norm1, b.norm2, a.norm, m.norm)} == {1e-6}
        assert isinstance(m.act, torch.nn.SiLU) and m.fc1_g.out_features == 2730
    assert isinstance(v.head, torch.nn.Identity) and isinstance(v.fc_norm, torch.nn.Identity)
    assert t.to_dict().items() >= dict(
        vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096, layer_norm_eps=1e-5, hidden_act="gelu", type_vocab_size=1,
        pad_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}).items()
    assert full.text.pooler is None and full.TOKENS == 512
    count = sum(p.numel() for m in (v, full.text) for p in m.parameters())
    assert count == 862_697_408, count


def test_the_names_above_are_the_published_files_at_full_size(monkeypatch):
    """999 tensors, 865,278,477 numbers: counted from the true file's header (public record)."""
    for name, value in dict(D=1024, DEPTH=24, FF=4096, VOCAB=250002, HIDDEN=2730,
                            TASKS=["retrieval.query"]).items():
        monkeypatch.setitem(globals(), name, value)
    assert len(shapes()) == 999
    assert sum(map(math.prod, shapes().values())) == 865_278_477
