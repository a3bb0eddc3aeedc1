"""rewards.py with networks small enough for a test: random weights in the files' true layout.

    python tests/small.py --write MODELS                                # writes them
    python tests/small.py DATA --rewards all --models MODELS ...        # is rewards.py, on them
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import rewards


def write_all(folder: Path) -> None:
    """FOLDER/OWNER/NAME/files of all eight networks, some 40 MB."""
    import test_jina
    import test_networks
    import test_vqa
    test_networks.write_models(folder)
    for network, writers in ((rewards.JinaCLIP, (test_jina.write_model,)),
                             (rewards.ImageReward, (test_vqa.write_reward, test_vqa.write_bert)),
                             (rewards.CLIPFlanT5, (test_vqa.write_flan, test_vqa.write_tower))):
        for (source, _), write in zip(network.SOURCES, writers):
            (folder / source).mkdir(parents=True)
            write(folder / source)
    flan, _, tokenizer = (folder / source for source, _ in rewards.CLIPFlanT5.SOURCES)
    tokenizer.mkdir(parents=True)
    for file in flan.glob("tokenizer*.json"):
        file.rename(tokenizer / file.name)


def shrink() -> None:
    """The sizes that stand in rewards.py and in no file."""
    rewards.HPSv2.ARCHITECTURE = dict(
        embed_dim=24, vision_cfg=dict(image_size=224, patch_size=32, layers=2, width=32,
                                      head_width=8),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=4, layers=2))
    rewards.ImageReward.VISION = rewards.ImageReward.VISION | dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    rewards.ImageReward.TEXT = rewards.ImageReward.TEXT | dict(
        vocab_size=200, hidden_size=24, encoder_hidden_size=32, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=40)
    rewards.JinaCLIP.TEXT = rewards.JinaCLIP.TEXT | dict(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96)


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        sys.exit(write_all(Path(sys.argv[2])))
    shrink()
    try:
        rewards.main()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
