"""Run a named grid of train/finetune configurations, one line of results per run, and make tables from those lines.

    python notebooks/study.py tune            # learning rates of both sides, on held-out training images
    python notebooks/study.py default         # the README's table: pretrained, from scratch, pixels; five seeds
    python notebooks/study.py default --table # the table again, from notebooks/results/default.jsonl alone

A run that has its line is skipped, so a study that was killed goes on where it stopped. Checkpoints go to runs/study/.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import finetune  # noqa: E402  (sets OMP_WAIT_POLICY)
import train  # noqa: E402

SEEDS = (0, 1, 2, 3, 4)
LABELS = (30, 100)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided Student t by number of seeds


def pretrain(seed: int) -> tuple[Path, float]:
    """The checkpoint of the default pretraining run with this seed, and the seconds it took."""
    folder = Path("runs/study") / f"pretrain-{seed}"
    if not (folder / "results.json").exists():
        train.main(["--seed", str(seed), "--output-dir", str(folder), "--resume"])
    return folder / "last.pt", json.loads((folder / "results.json").read_text())["seconds"]


def classify(name: str, seed: int, *flags) -> dict:
    folder = Path("runs/study") / f"{name}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    flags = [*map(str, flags), "--no-compare", "--seed", str(seed), "--output-dir", str(folder)]
    return finetune.main(flags)


def pixels(name: str, seed: int, labels: int) -> dict:
    """Raw pixels: five placements of each labelled image; test images as finetune.py has them, C on held-out ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    args, _ = finetune.finetuning_arguments(["--from-scratch", "--labels", str(labels), "--seed", str(seed)])
    images, test = train.load_images(args, train=True), train.load_images(args, train=False)
    chosen, held = finetune.pick(images.targets, labels, seed, holdout=300)
    steps = train.random_crop(args) + train.to_tensor("L")

    def arrays(data, draws):
        pairs = [data[draw] for draw in draws]
        return torch.stack([image.flatten() for image, _ in pairs]).numpy(), [label for _, label in pairs]

    placed = train.Seeded(images, steps, seed, chosen)
    fitted = arrays(placed, [(epoch, i) for epoch in range(5) for i in range(labels)])
    models = [KNeighborsClassifier(1)]
    if name == "logistic regression":
        models = [LogisticRegression(C=C, max_iter=3000) for C in (0.001, 0.01, 0.1, 1.0)]
    tuning = arrays(train.Seeded(images, steps, 0, held), range(300))
    best = max(models, key=lambda model: model.fit(*fitted).score(*tuning))
    return dict(top1=100 * best.score(*arrays(train.Seeded(test, steps, 0), range(len(test)))), images=len(test))


def runs(study: str, seeds: list[int]):
    """The runs of a study, most informative first: (name, labels, seed, function that returns finetune.py's flags)."""
    if study == "tune":  # the same effort for both sides, a seed that the study does not use, 300 held-out images
        flags = ("--holdout", 300)
        for lr in ("1e-2", "2e-2", "4e-2", "8e-2"):
            yield f"scratch {lr}", 30, 100, lambda lr=lr: ("--from-scratch", *flags, "--base-lr", lr)
        for lr, decay in (("2e-2", "0.8"), ("4e-2", "0.8"), ("8e-2", "0.8"), ("4e-2", "0.65")):
            start = lambda: ("--checkpoint", pretrain(100)[0])  # noqa: E731
            yield (
                f"pretrained {lr} {decay}",
                30,
                100,
                lambda lr=lr, d=decay, s=start: (*s(), *flags, "--base-lr", lr, "--layer-decay", d),
            )
    elif study == "default":
        for labels in LABELS:
            for seed in seeds:
                yield "pretrained", labels, seed, lambda s=seed: ("--checkpoint", pretrain(s)[0])
                yield "scratch, same finetuning", labels, seed, lambda: ("--from-scratch",)
                yield "1-nearest neighbour", labels, seed, None
                yield "logistic regression", labels, seed, None
                yield "scratch, total time", labels, seed, lambda s=seed, n=labels: longer(s, n)
    else:
        raise ValueError(f"study {study!r} is unknown: choose tune or default")


def longer(seed: int, labels: int) -> tuple:
    """From scratch for as many steps as fit into the time of pretraining and finetuning together."""
    lines = [r for r in read("default") if (r["seed"], r["labels"]) == (seed, labels)]
    finetuning, scratch = (
        next(r for r in lines if r["name"] == name) for name in ("pretrained", "scratch, same finetuning")
    )
    total = pretrain(seed)[1] + finetuning["metrics"]["seconds"]
    steps = scratch["config"]["max_steps"] * total / scratch["metrics"]["seconds"]
    return "--from-scratch", "--max-steps", round(steps)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def read(study: str) -> list[dict]:
    path = HERE / "results" / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(study: str, seeds: list[int]) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    machine = f"{cpu_name()}, {os.cpu_count()} cores"
    versions = dict(torch=torch.__version__, python=platform.python_version())
    for name, labels, seed, flags in runs(study, seeds):
        if any((r["name"], r["labels"], r["seed"]) == (name, labels, seed) for r in read(study)):
            continue
        results = classify(study, seed, *flags(), "--labels", labels) if flags else pixels(name, seed, labels)
        line = dict(study=study, name=name, labels=labels, seed=seed, date=time.strftime("%Y-%m-%d"))
        line |= dict(metrics={k: v for k, v in results.items() if k != "args"}, config=results.get("args", {}))
        line |= dict(machine=machine, versions=versions)
        with open(HERE / "results" / f"{study}.jsonl", "a") as file:
            file.write(json.dumps(line, default=str) + "\n")


def interval(values: list[float]) -> str:
    """Mean and half width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def table(study: str) -> str:
    """Markdown: top-1 by name and number of labels, and the paired difference to `pretrained`."""
    lines = read(study)
    scores = {(r["name"], r["labels"], r["seed"]): r["metrics"]["top1"] for r in lines}
    names, labels = list(dict.fromkeys(r["name"] for r in lines)), sorted({r["labels"] for r in lines})
    rows = [["top-1 (%)", *(f"{n} labels" for n in labels), *(f"difference, {n}" for n in labels)]]
    for name in names:
        row, differences = [name], []
        for n in labels:
            seeds = sorted(seed for m, k, seed in scores if (m, k) == (name, n))
            row.append(interval([scores[name, n, s] for s in seeds]) if seeds else "")
            pairs = [scores["pretrained", n, s] - scores[name, n, s] for s in seeds if ("pretrained", n, s) in scores]
            differences.append(interval(pairs) if pairs and name != "pretrained" else "")
        rows.append(row + differences)
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("study", choices=("tune", "default"))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="so that several processes can share the work"
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if not options.table:
        run(options.study, options.seeds)
    print(table(options.study))
