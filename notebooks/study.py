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

HELD = "--holdout 300"
# Fashion-MNIST: 10,000 images with labels, or some of them, and 60,000 without; 2,000 others to choose rates
FASHION = "--preset fashion-mnist"
FASHION_HELD = f"{FASHION} --labels 1000 --max-steps 300 --holdout 2000"
BUDGETS = {100: 150, 1000: 300, 10000: 500}  # labels: finetuning steps; the pretraining takes the time of 450 more
# masked.py, in about the time of 28 of ARM's epochs
QUARTER, HALF = "--visible 0.25 --epochs 56", "--visible 0.5 --epochs 42"


# labels and finetuning steps: the default run has 100 and 150
LENGTHS = {f"30 labels, {steps} steps": f"--labels 30 --max-steps {steps}" for steps in (150, 300, 600)}
LENGTHS |= {"100 labels, 150 steps": "", "100 labels, 300 steps": "--max-steps 300"}
LENGTHS |= {"100 labels, 600 steps": "--max-steps 600"}
# size: flags of the model, rates of finetuning it and of training it from scratch, those that `size-tune` found best
SIZES = {
    "width 32": ("--d-model 32", "--base-lr 1.6e-1", "--base-lr 8e-2"),
    "width 64": ("", "", ""),  # the default run
    "width 128": ("--d-model 128", "", ""),
    "depth 2": ("--depth 2", "", "--base-lr 8e-2"),
    "depth 8": ("--depth 8", "--base-lr 1.6e-1", ""),
}


def rates(*values: str, **sides: tuple) -> dict:
    """The same number of learning rates for both sides, on held-out training images."""
    rows = {name.replace("_", " "): flags for name, flags in sides.items()}
    return {f"{name}, base lr {x}": (pre, f"{ft} --base-lr {x}") for name, (pre, ft) in rows.items() for x in values}


def both(kind: str, model: str, finetuning: str, scratch: str | None = None) -> dict:
    """A kind of run from a pretrained model and from scratch, with flags of the model and of the two finetunings."""
    scratch = finetuning if scratch is None else scratch
    return {f"{kind}: pretrained": (model, finetuning), f"{kind}: from scratch": (None, f"{model} {scratch}".strip())}


# study: {row: (flags of train.py, or None to start from random weights; flags of finetune.py)}. Rows are compared with
# the first one, or with the first of those that share what stands before a colon.
STUDIES = {
    "tune": rates("2e-2", "4e-2", "8e-2", "1.6e-1", pretrained=("", HELD), from_scratch=(None, HELD)),
    "default": {
        "pretrained": ("", ""),
        "from scratch, same finetuning": (None, ""),
        "nearest neighbours on pixels": (None, "--probe pixels"),
        "logistic regression on pixels": (None, "--probe pixels"),
        "from scratch, the time of both stages": (None, "--max-steps 915"),  # 1260 * 0.085 s / 0.14 s + 150
        "twice the finetuning: pretrained": ("", "--max-steps 300"),
        "twice the finetuning: from scratch": (None, "--max-steps 300"),
    },
    "fashion-tune": rates(
        "1e-2", "2e-2", "4e-2", pretrained=(FASHION, FASHION_HELD), from_scratch=(None, FASHION_HELD)
    ),
    "fashion": {
        f"{n} labels: {name}": (pre, f"{FASHION} --labels {n} --max-steps {steps + more}")
        for n, steps in BUDGETS.items()
        for name, pre, more in (
            ("pretrained", FASHION, 0),
            ("from scratch, same finetuning", None, 0),
            ("from scratch, the time of both stages", None, 450),
        )
    },
    "frozen": {
        f"{kind}: {name}": (pre, f"--probe {what}")
        for kind in ("nearest neighbours", "linear classifier")
        for name, pre, what in (
            ("pretrained", "", "features"),
            ("random", None, "features"),
            ("pixels", None, "pixels"),
        )
    },
    "unit": {
        "clusters of 2x2 patches, pixels normalised": ("", ""),
        "clusters of 1x1": ("--cluster-size 1", ""),
        "clusters of 3x3": ("--cluster-size 3", ""),
        "pixels not normalised": ("--no-norm-pix", ""),
        "decoder of one block": ("--decoder-depth 1", ""),
        "decoder half as wide": ("--decoder-dim 32", ""),
    },
    "order": {order: (f"--order {order}" if order != "row" else "", "") for order in ORDERS},
    "directions": {
        "pretrained: four directions, copied": ("", ""),
        "pretrained: four directions, three of them fresh": ("", "--fresh-directions"),
        "pretrained: one direction": ("", "--directions 1"),
        "from scratch: four directions": (None, ""),
        "from scratch: one direction": (None, "--directions 1"),
    },
    "masked-tune": {  # three settings each
        f"{name}, base lr {x}": (f"{pre} --base-lr {x}".strip(), HELD)
        for name, pre, values in (
            ("autoregressive", "", ("2.4e-2", "4.8e-2", "9.6e-2")),
            ("masked, a quarter visible", QUARTER, ("2.4e-2", "4.8e-2")),
            ("masked, half visible", HALF, ("4.8e-2",)),
        )
        for x in values
    },
    "masked": {
        "autoregressive": ("--base-lr 2.4e-2", ""),
        "masked, equal time": (f"{QUARTER} --base-lr 2.4e-2", ""),
        "masked, equal epochs": ("--visible 0.25 --base-lr 2.4e-2", ""),
        "from scratch": (None, ""),
    },
    "size-tune": rates(
        *("2e-2", "4e-2", "8e-2", "1.6e-1"),
        **{
            f"{size}, {side}": (model, HELD) if side == "pretrained" else (None, f"{model} {HELD}")
            for size, (model, *_) in SIZES.items()
            for side in ("pretrained", "from scratch")
            if model
        },
    ),
    "size": {row: flags for size, words in SIZES.items() for row, flags in both(size, *words).items()},
    "length": {row: flags for kind, words in LENGTHS.items() for row, flags in both(kind, "", words).items()}
    | {
        "100 labels, 150 steps: pretrained a quarter as long": ("--epochs 7", ""),
        "100 labels, 150 steps: pretrained four times as long": ("--epochs 112", ""),
        "100 labels, 600 steps: pretrained four times as long": ("--epochs 112", "--max-steps 600"),
    },
}


def script(name: str, folder: Path, *flags) -> dict:
    """Run a script in a folder to its end, or what is left of it; returns its results."""
    if not (folder / "results.json").exists():
        command = [sys.executable, ROOT / name, *flags, "--output-dir", folder, "--resume"]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    return json.loads((folder / "results.json").read_text())


def run(study: str, row: str, seed: int, *data) -> dict:
    """One run of a study; returns its results. Rows with the same flags, of any study, share their runs."""

    def folder(words: str) -> Path:
        return RUNS / "-".join(f"{words} {seed}".replace("--", "").split())

    pretraining, finetuning = STUDIES[study][row]
    common, start, name, results = ["--seed", seed, *data], ["--from-scratch"], "finetune scratch", {}
    if pretraining is not None:
        name, first = f"finetune pretrained {pretraining}", folder(f"pretrain {pretraining}")
        objective = "notebooks/masked.py" if "--visible" in pretraining else "train.py"
        before = script(objective, first, *pretraining.split(), *common)
        results["pretraining"] = {key: before[key] for key in ("loss", "seconds", "peak_memory_mib")}
        start = ["--checkpoint", first / "last.pt"]
    flags = ["--no-compare", *start, *finetuning.split(), *common]
    return script("finetune.py", folder(f"{name} {finetuning}"), *flags) | results


def read(study: str) -> list[dict]:
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def score(line: dict) -> float:
    """Top-1 in percent, of a classifier or of what a probe has put in its place."""
    results = line["results"]
    return results["top1"] if "top1" in results else results["knn" if "neighbours" in line["name"] else "linear"]


def interval(values) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval; of a single value, no half width (nan)."""
    values = list(values)
    if len(values) < 2:
        return values[0], math.nan
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def reference(rows, row: str) -> str:
    """The row that a row is compared with: the first, or the first that shares what stands before the colon."""
    return next(other for other in rows if other.partition(":")[0] == row.partition(":")[0] or ":" not in row)


def scores(study: str) -> dict[str, dict[int, float]]:
    """Top-1 (%) by row and seed, rows in the study's order; rows without runs are left out."""
    lines = read(study)
    found = {row: {line["seed"]: score(line) for line in lines if line["name"] == row} for row in STUDIES[study]}
    return {row: by_seed for row, by_seed in found.items() if by_seed}


def differences(found: dict[str, dict], row: str) -> dict[int, float]:
    """The row that it is compared with minus this one, by seed; `found` as from `scores`."""
    first = found.get(reference(found, row), {})
    return {seed: first[seed] - top1 for seed, top1 in found[row].items() if seed in first}


def table(study: str) -> str:
    """Markdown: top-1, and by how much the row that it is compared with is ahead, paired by seed."""
    found = scores(study)
    lines = [f"| {study} | top-1 (%) | first row is ahead by | seeds |", "|---|---|---|---|"]
    for row, by_seed in found.items():
        pairs = {} if row == reference(found, row) else differences(found, row)
        words = ["{:.1f} ± {:.1f}".format(*interval(x.values())) if x else "" for x in (by_seed, pairs)]
        lines.append(f"| {row} | {words[0]} | {words[1]} | {len(by_seed)} |".replace(" ± nan", ""))
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
            if not any((line["name"], line["seed"]) == (row, seed) for line in read(options.study)):
                results = run(options.study, row, seed, *data)
                with open(RESULTS / f"{options.study}.jsonl", "a") as file:
                    line = dict(study=options.study, name=row, seed=seed, results=results)
                    file.write(json.dumps(line, default=str) + "\n")
    print(f"{table(options.study)}\n\n{sampling_error(options.study)}" if read(options.study) else "no runs yet")
