"""rewards.py with networks small enough for a test: random weights in the files' true layout.

    python tests/small.py --write MODELS                                # writes them
    python tests/small.py DATA --rewards all --models MODELS ...        # is rewards.py, on them
"""
import hashlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import rewards
from data import run


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
    """The sizes and the hash that stand in rewards.py and in no file, as the tests have them."""
    import test_jina
    import test_networks
    import test_vqa
    rewards.HPSv2.MODEL = "small"
    rewards.ImageReward.VISION = test_vqa.SmallReward.VISION
    rewards.ImageReward.TEXT = test_vqa.SmallReward.TEXT
    rewards.JinaCLIP.IMAGE = test_jina.SmallJina.IMAGE
    rewards.JinaCLIP.TEXT = test_jina.SmallJina.TEXT
    rewards.Aesthetic.SHA256 = hashlib.sha256(test_networks.head_file()).hexdigest()


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        sys.exit(write_all(Path(sys.argv[2])))
    shrink()
    run(rewards.main)
