"""Run a study, one line of results per run, and make tables from those lines.

    python notebooks/study.py default            # the README's table: pretrained, from scratch, pixels; five seeds
    python notebooks/study.py default --table    # the table again, from notebooks/results/default.jsonl alone
    python notebooks/study.py tune --seeds 100 101 102    # learning rates, on held-out training images

Runs use the two scripts and leave their folders in runs/study/. A run that has its line is skipped and one that was
interrupted is resumed, so a study can be killed at any time, and several processes with different --seeds can share it.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "notebooks" / "results", ROOT / "runs" / "study"
sys.path.insert(0, str(ROOT))

import torch

import finetune
import train  # (first: it sets OMP_WAIT_POLICY)
from armamba import ORDERS

PIXELS = "pixels"
HELD, RATES = ("--holdout", 300), ("2e-2", "4e-2", "8e-2", "1.6e-1")

# study: {row: (flags of train.py, or None to start from random weights; flags of finetune.py)}. The first row is what
# the others are compared with. In `tune` both sides have the same number of runs.
STUDIES = {
    "tune": {f"pretrained, base lr {lr}": ((), (*HELD, "--base-lr", lr)) for lr in RATES}
    | {f"from scratch, base lr {lr}": (None, (*HELD, "--base-lr", lr)) for lr in RATES},
    "default": {
        "pretrained": ((), ()),
        "from scratch, same finetuning": (None, ()),
        "1-nearest neighbour on pixels": PIXELS,
        "logistic regression on pixels": PIXELS,
        "from scratch, the time of both stages": (None, ("--max-steps", 915)),  # 1260 * 0.085 s / 0.14 s + 150
        "pretrained, twice the finetuning": ((), ("--max-steps", 300)),
        "from scratch, twice the finetuning": (None, ("--max-steps", 300)),
    },
    "unit": {
        "clusters of 2x2 patches, pixels normalised": ((), ()),
        "clusters of 1x1": (("--cluster-size", 1), ()),
        "clusters of 3x3": (("--cluster-size", 3), ()),
        "pixels not normalised": (("--no-norm-pix",), ()),
        "decoder of one block": (("--decoder-depth", 1), ()),
        "decoder half as wide": (("--decoder-dim", 32), ()),
    },
    "order": {order: (("--order", order), ()) for order in ORDERS},
    "directions": {
        "pretrained, four directions": ((), ()),
        "pretrained, one direction": ((), ("--directions", 1)),
        "from scratch, four directions": (None, ()),
        "from scratch, one direction": (None, ("--directions", 1)),
    },
}


def script(name: str, folder: Path, *flags) -> dict:
    """Run train.py or finetune.py in a folder to its end, or what is left of it; returns its results."""
    if not (folder / "results.json").exists():
        command = [sys.executable, str(ROOT / name), *map(str, flags), "--output-dir", str(folder), "--resume"]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "results.json").read_text())


def slug(*words) -> str:
    return "-".join(str(word).strip("-").replace(" ", "-").replace(",", "") for word in words)


def run(study: str, row: str, seed: int) -> dict:
    """One run of a study; returns its results."""
    if STUDIES[study][row] is PIXELS:
        return pixels(row, seed)
    pretraining, finetuning = STUDIES[study][row]
    flags = ["--no-compare", "--seed", seed]
    if pretraining is None:
        flags += ["--from-scratch"]
    else:
        folder = RUNS / slug("pretrain", *pretraining, seed)
        script("train.py", folder, *pretraining, "--seed", seed)
        flags += ["--checkpoint", folder / "last.pt"]
    return script("finetune.py", RUNS / slug(study, row, seed), *flags, *finetuning)


def pixels(row: str, seed: int) -> dict:
    """Raw pixels: five placements of each labelled image; test images as finetune.py has them, C on held-out ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    args, _ = finetune.finetuning_arguments(["--from-scratch", "--seed", str(seed)])
    images, test = train.load_images(args, train=True), train.load_images(args, train=False)
    chosen, held = finetune.pick(images.targets, args.labels, seed, holdout=300)
    steps = train.random_crop(args) + train.to_tensor("L")

    def arrays(data, draws):
        pairs = [data[draw] for draw in draws]
        return torch.stack([image.flatten() for image, _ in pairs]).numpy(), [label for _, label in pairs]

    placed = train.Seeded(images, steps, seed, chosen)
    fitted = arrays(placed, [(epoch, i) for epoch in range(5) for i in range(len(chosen))])
    models = [KNeighborsClassifier(1)]
    if "regression" in row:
        models = [LogisticRegression(C=C, max_iter=3000) for C in (0.001, 0.01, 0.1, 1.0)]
    tuning = arrays(train.Seeded(images, steps, 0, held), range(300))
    best = max(models, key=lambda model: model.fit(*fitted).score(*tuning))
    top1 = 100 * best.score(*arrays(train.Seeded(test, steps, 0), range(len(test))))
    return dict(top1=top1, images=len(test), args=vars(args)) | train.circumstances("cpu")


def read(study: str) -> list[dict]:
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: list[float]) -> str:
    """Mean and half width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def table(study: str) -> str:
    """Markdown: top-1, and by how much the first row is ahead, paired by seed."""
    scores: dict[str, dict[int, float]] = {}
    for line in read(study):
        scores.setdefault(line["row"], {})[line["seed"]] = line["results"]["top1"]
    first = next(row for row in STUDIES[study] if row in scores)
    rows = [f"| {study} | top-1 (%) | first row is ahead by | seeds |", "|---|---|---|---|"]
    for row in filter(scores.get, STUDIES[study]):
        pairs = [scores[first][seed] - top1 for seed, top1 in scores[row].items() if seed in scores[first]]
        ahead = interval(pairs) if pairs and row != first else ""
        rows.append(f"| {row} | {interval(list(scores[row].values()))} | {ahead} | {len(scores[row])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for row in [] if options.table else STUDIES[options.study]:
        for seed in options.seeds:
            if not any((line["row"], line["seed"]) == (row, seed) for line in read(options.study)):
                line = dict(study=options.study, row=row, seed=seed, results=run(options.study, row, seed))
                with open(RESULTS / f"{options.study}.jsonl", "a") as file:
                    file.write(json.dumps(line, default=str) + "\n")
    print(table(options.study))
