"""Run a study, one line of results per run, and make tables from those lines.

    python notebooks/study.py default            # the README's table: pretrained, from scratch, pixels; five seeds
    python notebooks/study.py default --table    # the table again, from notebooks/results/default.jsonl alone
    python notebooks/study.py tune --seeds 100 101    # learning rates, on held-out training images
    python notebooks/study.py fashion --seeds 0 1 2 --data FOLDER    # where Fashion-MNIST is, or is to be put

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

from armamba import ORDERS

HELD, PIXELS, FEATURES, TWICE = ("--holdout", 300), ("--probe", "pixels"), ("--probe", "features"), ("--max-steps", 300)

# Fashion-MNIST: 10,000 images with labels, or some of them, and 60,000 without; 2,000 others to choose rates
FASHION, FASHION_HELD = ("--preset", "fashion-mnist"), ("--labels", 1000, "--max-steps", 300, "--holdout", 2000)
BUDGETS = {100: 150, 1000: 300, 10000: 500}  # labels: finetuning steps
FASHION_TOTAL = 450  # more steps of finetuning in the time of the pretraining
MASKED = {0.25: 56, 0.5: 42}  # visible share: epochs in the time of 28 of ARM's


def rates(sides: dict, *values: str) -> dict:
    """The same number of learning rates for each side, on held-out training images."""
    return {
        f"{side}, base lr {x}": (pre, (*flags, "--base-lr", x)) for side, (pre, flags) in sides.items() for x in values
    }


def masked(visible: float, *more) -> tuple:
    return ("--visible", visible, "--epochs", MASKED[visible], *more)


# study: {row: (flags of train.py, or None to start from random weights; flags of finetune.py)}. Rows are compared with
# the first one, or with the first of those that share what stands before a colon.
STUDIES = {
    "tune": rates({"pretrained": ((), HELD), "from scratch": (None, HELD)}, "2e-2", "4e-2", "8e-2", "1.6e-1"),
    "default": {
        "pretrained": ((), ()),
        "from scratch, same finetuning": (None, ()),
        "nearest neighbours on pixels": (None, PIXELS),
        "logistic regression on pixels": (None, PIXELS),
        "from scratch, the time of both stages": (None, ("--max-steps", 915)),  # 1260 * 0.085 s / 0.14 s + 150
        "twice the finetuning: pretrained": ((), TWICE),
        "twice the finetuning: from scratch": (None, TWICE),
    },
    "fashion-tune": rates(
        {name: (pre, (*FASHION, *FASHION_HELD)) for name, pre in (("pretrained", FASHION), ("from scratch", None))},
        *("1e-2", "2e-2", "4e-2"),
    ),
    "fashion": {
        f"{n} labels: {name}": (flags, (*FASHION, "--labels", n, "--max-steps", steps + more))
        for n, steps in BUDGETS.items()
        for name, flags, more in (
            ("pretrained", FASHION, 0),
            ("from scratch, same finetuning", None, 0),
            ("from scratch, the time of both stages", None, FASHION_TOTAL),
        )
    },
    "frozen": {
        f"{kind}: {name}": (flags, features)
        for kind in ("nearest neighbours", "linear classifier")
        for name, flags, features in (
            ("pretrained", (), FEATURES),
            ("random", None, FEATURES),
            ("pixels", None, PIXELS),
        )
    },
    "unit": {
        "clusters of 2x2 patches, pixels normalised": ((), ()),
        "clusters of 1x1": (("--cluster-size", 1), ()),
        "clusters of 3x3": (("--cluster-size", 3), ()),
        "pixels not normalised": (("--no-norm-pix",), ()),
        "decoder of one block": (("--decoder-depth", 1), ()),
        "decoder half as wide": (("--decoder-dim", 32), ()),
    },
    "order": {order: ((() if order == "row" else ("--order", order)), ()) for order in ORDERS},
    "directions": {
        "pretrained: four directions, copied": ((), ()),
        "pretrained: four directions, three of them fresh": ((), ("--fresh-directions",)),
        "pretrained: one direction": ((), ("--directions", 1)),
        "from scratch: four directions": (None, ()),
        "from scratch: one direction": (None, ("--directions", 1)),
    },
    "masked-tune": {
        f"{name}, base lr {lr}": ((*flags, "--base-lr", lr), HELD)
        for name, flags, values in (
            ("autoregressive", (), ("1.2e-2", "2.4e-2", "4.8e-2", "9.6e-2")),
            ("masked, a quarter visible", masked(0.25), ("2.4e-2", "4.8e-2")),
            ("masked, half visible", masked(0.5), ("2.4e-2", "4.8e-2")),
        )
        for lr in values
    },
    "size": {
        f"{kind} {size}: {start}": (None, flags) if start == "from scratch" else (flags, ())
        for kind, size, flags in (
            ("width", 32, ("--d-model", 32)),
            ("width", 64, ()),
            ("width", 128, ("--d-model", 128)),
            ("depth", 2, ("--depth", 2)),
            ("depth", 8, ("--depth", 8)),
        )
        for start in ("pretrained", "from scratch")
    },
}


def script(name: str, folder: Path, *flags) -> dict:
    """Run train.py or finetune.py in a folder to its end, or what is left of it; returns its results."""
    if not (folder / "results.json").exists():
        command = [sys.executable, str(ROOT / name), *map(str, flags), "--output-dir", str(folder), "--resume"]
        subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((folder / "results.json").read_text())


def slug(*words) -> str:
    return "-".join(str(word).strip("-") for word in words)


def run(study: str, row: str, seed: int, *data) -> dict:
    """One run of a study; returns its results. Rows with the same flags, of any study, share their runs."""
    pretraining, finetuning = STUDIES[study][row]
    flags = ["--no-compare", "--seed", seed, *data]
    if pretraining is None:
        flags += ["--from-scratch"]
    else:
        folder = RUNS / slug("pretrain", *pretraining, seed)
        name = "notebooks/masked.py" if "--visible" in pretraining else "train.py"
        before = script(name, folder, *pretraining, "--seed", seed, *data)
        flags += ["--checkpoint", folder / "last.pt"]
    start = ("scratch",) if pretraining is None else ("pretrained", *pretraining)
    results = script("finetune.py", RUNS / slug("finetune", *start, *finetuning, seed), *flags, *finetuning)
    kept = () if pretraining is None else ("loss", "seconds", "peak_memory_mib")
    return results | (dict(pretraining={key: before[key] for key in kept}) if kept else {})


def read(study: str) -> list[dict]:
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def score(line: dict) -> float:
    """Top-1 in percent, of a classifier or of what a probe has put in its place."""
    results = line["results"]
    return results["top1"] if "top1" in results else results["knn" if "neighbours" in line["row"] else "linear"]


def interval(values: list[float]) -> str:
    """Mean and half width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def reference(rows, row: str) -> str:
    """The row that a row is compared with: the first, or the first that shares what stands before the colon."""
    return next(other for other in rows if other.partition(":")[0] == row.partition(":")[0] or ":" not in row)


def table(study: str) -> str:
    """Markdown: top-1, and by how much the row that it is compared with is ahead, paired by seed."""
    scores: dict[str, dict[int, float]] = {}
    for line in read(study):
        scores.setdefault(line["row"], {})[line["seed"]] = score(line)
    lines = [f"| {study} | top-1 (%) | first row is ahead by | seeds |", "|---|---|---|---|"]
    rows = [row for row in STUDIES[study] if row in scores]
    for row in rows:
        first = scores[reference(rows, row)]
        pairs = [first[seed] - top1 for seed, top1 in scores[row].items() if seed in first]
        ahead = interval(pairs) if pairs and first is not scores[row] else ""
        lines.append(f"| {row} | {interval(list(scores[row].values()))} | {ahead} | {len(scores[row])} |")
    return "\n".join(lines)


def sampling_error(study: str) -> str:
    """What the choice of test images alone leaves open, in the row where it is largest."""
    shares = [(score(line) / 100, line["results"]["images"]) for line in read(study)]
    half, n = max((1.96 * 100 * math.sqrt(p * (1 - p) / n), n) for p, n in shares)
    return f"Other test images in the place of these {n} would move a number by up to ± {half:.1f} points (95 %)."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--data", help="folder of the dataset, for the scripts")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    data = ("--data", Path(options.data).absolute()) if options.data else ()
    for row in [] if options.table else STUDIES[options.study]:
        for seed in options.seeds:
            if not any((line["row"], line["seed"]) == (row, seed) for line in read(options.study)):
                results = run(options.study, row, seed, *data)
                with open(RESULTS / f"{options.study}.jsonl", "a") as file:
                    line = dict(study=options.study, row=row, seed=seed, results=results)
                    file.write(json.dumps(line, default=str) + "\n")
    print(f"{table(options.study)}\n\n{sampling_error(options.study)}" if read(options.study) else "no runs yet")
