"""Pictures a second of rewards.views beside a plain webdataset pipeline, on JPEGs in one tar.

    pip install webdataset && python tests/throughput.py [pictures] [rounds]

Not collected by pytest. Both decode and cut as the reward models want it, and hand over batches.
"""
import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import webdataset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

import rewards
from data import Pictures

torch.set_num_threads(1)
THREE = [("crop", 224), ("crop", 512), ("pad", 336)]


def write(path: Path, n: int) -> None:
    """n smooth random JPEGs of about 512 x 640 pixels with fine noise, and their captions."""
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            rng = np.random.default_rng(i)
            w, h = int(512 + rng.integers(-40, 41)), int(640 + rng.integers(-40, 41))
            w, h = (h, w) if i % 2 else (w, h)
            total = np.zeros((h, w, 3), np.float32)
            for cells, share in ((6, 0.6), (40, 0.25), (160, 0.15)):
                rough = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
                total += share * np.asarray(rough.resize((w, h), Image.Resampling.BICUBIC))
            total += rng.normal(0, 3, (h, w, 1))
            buffer = io.BytesIO()
            Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
            for name, content in ((f"{i:06d}.jpg", buffer.getvalue()),
                                  (f"{i:06d}.txt", b"a field of colours")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class Ours(torch.utils.data.Dataset):
    """Rows of a tar as dicts of views."""

    def __init__(self, path: Path, wanted: list):
        self.pictures, self.wanted = Pictures(str(path), 224, memory_gb=0), wanted

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.pictures.cut(i, lambda data: rewards.views(data, self.wanted))


def square(image):
    """A picture in the middle of a square."""
    side = max(image.size)
    found = Image.new("RGB", (side, side), rewards.PAD)
    found.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return found


def ours(path: Path, wanted: list, workers: int):
    """Batches of our path."""
    return torch.utils.data.DataLoader(Ours(path, wanted), batch_size=32, num_workers=workers)


def plain(path: Path, wanted: list, workers: int):
    """Batches of webdataset and torchvision."""
    def bicubic(n):
        return Resize(n, InterpolationMode.BICUBIC)
    cuts = [Compose([bicubic(n), CenterCrop(n), PILToTensor()] if kind == "crop" else
                    [square, bicubic((n, n)), PILToTensor()]) for kind, n in wanted]
    data = (webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
            .decode("pil").to_tuple("jpg", "txt")
            .map_tuple(lambda image: [cut(image.convert("RGB")) for cut in cuts], lambda x: x))
    return torch.utils.data.DataLoader(data, batch_size=32, num_workers=workers)


def rate(loader, n: int) -> float:
    """Pictures a second of one pass."""
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0][0])
    assert seen == n, (seen, n)
    return n / (time.perf_counter() - start)


def main(n: int = 1500, rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "all", Path(folder) / "parts"
        whole.mkdir()
        write(whole / "0.tar", n)
        size = (whole / "0.tar").stat().st_size / n / 1e3
        # webdataset shares tars among workers, so it gets one tar for each of the two
        parts.mkdir()
        with tarfile.open(whole / "0.tar") as tar:
            outs = [tarfile.open(parts / f"{k}.tar", "w") for k in range(2)]
            for member in tar:
                outs[int(member.name[:6]) * 2 // n].addfile(member, tar.extractfile(member))
            for out in outs:
                out.close()
        urls = str(parts / "{0..1}.tar")
        best = {}
        for _ in range(rounds):
            for label, wanted in (("crop 224", THREE[:1]), ("three views", THREE)):
                for workers in (0, 2):
                    for code, loader in (("ours", ours(whole, wanted, workers)),
                                         ("webdataset", plain(urls, wanted, workers))):
                        key = label, workers, code
                        best[key] = max(best.get(key, 0), rate(loader, n))
        print(f"{n} JPEGs of {size:.0f} kB, best of {rounds}, pictures/s")
        print(f"{'views':12} workers    ours  webdataset  ratio")
        for label in ("crop 224", "three views"):
            for workers in (0, 2):
                a, b = (best[label, workers, code] for code in ("ours", "webdataset"))
                print(f"{label:12} {workers:7} {a:7.0f} {b:11.0f} {a / b:6.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
