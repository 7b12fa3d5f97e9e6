"""What the JPEG pipelines of both stages deliver: `python tests/bench_train.py --loader`.

The images are like ImageNet's, 500 x 375 pixels and about 110 kB, cut from scikit-learn's two photographs. They come
from a warm file cache: no disk is measured. A core is one process with one thread.
"""

import math
import statistics
import tempfile
from itertools import product
from pathlib import Path

import bench_scan  # first: it sets what must be set before torch is imported, and the path to armamba

# isort: split
import torch
from PIL import Image
from torch.utils.data import DataLoader

import finetune
import train

ROUNDS = 6


def write_photographs(folder: Path, n: int) -> float:
    """Returns their mean size in kB."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images  # 640 x 427
    for i in range(n):
        photo, top, left = Image.fromarray(photos[i % 2]), 11 * i % 52, 37 * i % 140
        photo = photo.crop((left, top, left + 500, top + 375))
        photo.save(folder / f"{i}.jpg", quality=(96, 99)[i % 2])  # the second one is largely out of focus
    return sum(path.stat().st_size for path in folder.iterdir()) / n / 1000


def pipeline(stage: str, root: str, batch: int):
    """The stage's own data and order of images, with the ImageNet recipe, batch after batch without end."""
    flags = ["--preset", "imagenet-base", "--data", root, "--batch-size", str(batch)]
    if stage == "pretrain":
        args = train.pretraining_arguments(flags)
        steps = train.random_crop(args) + train.to_tensor("RGB")
    else:
        args = finetune.finetuning_arguments([*flags, "--from-scratch"])[0]
        steps = finetune.augmentation(args, "RGB")
    data = train.Seeded(train.load_images(args, train=True), steps, args.seed)
    return data, train.TrainingBatches(len(data), args, 0)


def cores(rate: float, per_core: float) -> int:
    """How many feed a GPU that takes `rate` images/s."""
    return math.ceil(rate / per_core)


def loader(stages: list[str], workers: int, rates: list[float], n: int = 256, batch: int = 32) -> list[dict]:
    """Images/s from one core, with the cores that each of `rates` needs, and from worker processes."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        kilobytes = write_photographs(Path(root), n)
        for stage, processes in product(stages, (0, workers)):
            data, batches = pipeline(stage, root, batch)
            options = dict(num_workers=processes, worker_init_fn=train.ignore_signals)  # as in train.fit
            stream, each = iter(DataLoader(data, batch_sampler=batches, **options)), 4 * max(1, processes)
            ms = [bench_scan.timed(lambda s=stream, m=each: [next(s) for _ in range(m)]) for _ in range(ROUNDS)]
            getattr(stream, "_shutdown_workers", int)()
            ms = ms[1:]  # the first round starts the workers
            rate, least, most = (1000 * each * batch / f(ms) for f in (statistics.median, max, min))
            row = dict(stage=stage, workers=processes, kilobytes=kilobytes, images_per_s=rate, min=least, max=most)
            rows.append(row | ({} if processes else {f"cores_for_{x:g}": cores(x, rate) for x in rates}))
    torch.set_num_threads(threads)
    return rows
