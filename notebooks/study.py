"""Run a study, one line of results per run, and make tables from those lines.

    python notebooks/study.py default [--table]    # five seeds of its runs, and its table; or only that
    python notebooks/study.py evidence             # what all studies answer, in one table
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

from grids import EVIDENCE, STUDIES


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
        results["pretraining"] = {key: before[key] for key in ("loss", "seconds", "peak_memory_mib", "args")}
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


def differences(found: dict[str, dict], row: str, first: str | None = None) -> dict[int, float]:
    """By seed, another row, by default the one that it is compared with, minus this one; `found` as from `scores`."""
    ours, theirs = found.get(first or reference(found, row), {}), found.get(row, {})
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def ahead(pairs: dict[int, float]) -> str:
    """In words: the mean difference, its interval, and whether that holds 0."""
    mean, half = interval(pairs.values()) if pairs else (math.nan, math.nan)
    seen = ", no difference seen" if abs(mean) <= half else ""
    return f"{mean:.1f} ± {half:.1f}{seen}".replace("nan ± nan", "not measured yet").replace(" ± nan", "")


def table(study: str) -> str:
    """Markdown: top-1, and by how much the row that it is compared with is ahead, paired by seed."""
    found = scores(study)
    lines = [f"| {study} | top-1 (%) | first row (of its kind) is ahead by | seeds |", "|---|---|---|---|"]
    for row, by_seed in found.items():
        top1 = "{:.1f} ± {:.1f}".format(*interval(by_seed.values())).replace(" ± nan", "")
        gap = "" if row == reference(found, row) else ahead(differences(found, row))
        lines.append(f"| {row} | {top1} | {gap} | {len(by_seed)} |")
    return "\n".join(lines)


def answers():
    """For each comparison in EVIDENCE: question, study, the two rows in words, and their difference by seed."""
    for question, study, ours, other in EVIDENCE:
        words = f"{ours} against {other.removeprefix(ours.partition(':')[0] + ': ')}"
        yield question, study, words, differences(scores(study), other, ours)


def evidence() -> str:
    """Markdown: every question, and the paired difference that answers it."""
    rows = [f"| {' | '.join(words)} | {ahead(pairs)} | {len(pairs)} |" for *words, pairs in answers()]
    return "\n".join(["| question | study | first against second | ahead by | seeds |", "|---|---|---|---|---|", *rows])


def sampling_error(study: str) -> str:
    """What the choice of test images alone leaves open, in the row where it is largest."""
    shares = [(score(line) / 100, line["results"]["images"]) for line in read(study)]
    half, n = max((1.96 * 100 * math.sqrt(p * (1 - p) / n), n) for p, n in shares)
    return f"Other test images in the place of these {n} would move a number by up to ± {half:.1f} points (95 %)."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("study", choices=(*STUDIES, "evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--data", help="folder of the dataset, for the scripts")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    data = ("--data", Path(options.data).absolute()) if options.data else ()
    for row in [] if options.table else STUDIES.get(options.study, []):
        for seed in options.seeds:
            if not any((line["name"], line["seed"]) == (row, seed) for line in read(options.study)):
                results = run(options.study, row, seed, *data)
                with open(RESULTS / f"{options.study}.jsonl", "a") as file:
                    line = dict(study=options.study, name=row, seed=seed, results=results)
                    file.write(json.dumps(line, default=str) + "\n")
    if options.study == "evidence":
        print(evidence())
    else:
        print(f"{table(options.study)}\n\n{sampling_error(options.study)}" if read(options.study) else "no runs yet")
