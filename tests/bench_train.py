"""What training costs: time, memory and FLOP/s of a step; what a JPEG loader delivers; hours for ImageNet.

    python tests/bench_train.py --quick                                # both stages of a micro model on a CPU, seconds
    python tests/bench_train.py --backends triton kernel torch --compile --split --profile --json base.json
    python tests/bench_train.py --stage pretrain --batch-size 256 512  # the aim: 4,000 images/s
    python tests/bench_train.py --variant huge --batch-size 32 64 --grad-checkpoint
    python tests/bench_train.py --loader --rate 4000                   # a minute or two
    python tests/bench_train.py --cost 300 base.json                   # the README's table, seconds

It takes (warmup + steps + 1) times the sum of the rows' step times, and minutes more for each --compile. A step is
train.fit's, of what train.py and finetune.py hand to it with the ImageNet recipe: mixup, autocast, loss, backward,
gradient norm, fused AdamW, EMA; no loader, schedule, log; random images on the device. Times are of steps in turns, so
that what else the machine does hits all rows alike. Rows: each scan backend as it is, then with one change: compiled;
blocks recomputed in the backward pass; one scan call per direction ("split"). A row that fails names the error in place
of the loss. x_first compares images/s. Memory is a step's peak: torch.cuda's, weights and optimiser included; on a CPU
without what stays between steps. FLOP are counted from shapes, a multiply-add as two: matrix products, attention as if
dense, patch embedding, the scan by the formula below; no other elementwise operation, nothing recomputed. --profile:
the fastest row's operators by time of their own. --loader: see bench_loader.py. --cost: "measured" is one GPU's rate,
hours follow from it; eight GPUs are assumed to be eight times as fast as one.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path
from unittest.mock import MagicMock, patch

import bench_scan  # first: it sets what must be set before torch is imported, and the path to armamba

# isort: split
import torch
from bench_loader import loader
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import armamba
import finetune
import train

SCRIPTS, IMAGES = {"pretrain": train, "finetune": finetune}, 1_281_167  # in ImageNet's training set


def prepared(stage: str, variant: str, *flags) -> tuple:
    """What the script hands to train.fit with the ImageNet recipe, data aside: args, model, loss, optimiser, EMA."""
    preset = f"imagenet-{variant}" if f"imagenet-{variant}" in train.PRESETS else "imagenet-base"
    flags = ["--preset", preset, "--variant", variant, *map(str, flags)]
    if stage == "finetune":  # --from-scratch would switch layer decay off
        flags += ["--from-scratch", "--layer-decay", str(finetune.PRESETS[preset]["layer_decay"])]
    data = MagicMock(mode="RGB", classes=[str(i) for i in range(1000)])
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.object(train, "load_images", lambda args, train: data),
        patch.object(train, "Seeded"),
        patch.object(finetune, "pick", lambda *_: (range(IMAGES), [])),
        patch.object(train, "fit", side_effect=InterruptedError) as fit,
        contextlib.suppress(InterruptedError),
    ):
        SCRIPTS[stage].main([*flags, "--output-dir", folder])
    args, _, model, loss_of, _, optimizer, _, ema = (*fit.call_args.args, None)[:8]
    return args, model, loss_of, optimizer, ema


# Multiply-adds of the scan per element of (b, d, l, n), exp aside. Forward: delta A; decay h; + (delta u) B; + C h.
# Backward: carry + C dy; decay G; decay G h; the sums into dA, dB, dC, d(delta u), ddelta; not the states once more.
for operator, multiply_adds, first in (
    (torch.ops.armamba.fast_scan, 4, 0),
    (torch.ops.armamba.fast_scan_backward, 8, 2),
):

    @register_flop_formula(operator)
    def scan_flops(*shapes, k=multiply_adds, u=first, **_) -> int:
        return 2 * k * math.prod(shapes[u]) * shapes[u + 2][1]  # u (b, d, l), delta, A (d, n)


@functools.cache
def flops(variant: str, stage: str) -> int:
    """Of one image, forward and backward."""
    meta, flags = torch.device("meta"), ["--batch-size", 1, "--device", "cpu"]
    flags += ["--mixup", 0, "--cutmix", 0] if stage == "finetune" else []
    with meta, patch.object(train, "set_up", lambda args: meta), patch("torch.optim.AdamW"):
        args, model, loss_of, *_ = prepared(stage, variant, *flags)
        batch = torch.empty(1, 3, *args.image_size), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, *batch).backward()
    return counter.get_total_flops()


def split(scan, *x, D, delta_bias, **flags):
    """One scan call per direction."""
    return bench_scan.one_call_per_group(lambda *x: scan(*x[:6], delta_bias=x[6], **flags), *x, D, delta_bias)


def measure(stage: str, args) -> tuple[list[dict], list[dict]]:
    """A row for each way to run the step, and the fastest one's profile if asked for."""
    size, device, gflop = max(args.batch_size), args.device, flops(args.variant, stage) / 1e9
    flags = ["--device", device, "--precision", args.dtype, "--batch-size", size, "--threads", args.threads]
    recipe, model, loss_of, optimizer, ema = prepared(stage, args.variant, *flags)
    gc.collect()  # the stage before
    images, labels = torch.randn(size, 3, *recipe.image_size).to(device), torch.randint(1000, (size,)).to(device)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5  # takes the same time as any other
    scans = {backend: functools.partial(armamba.selective_scan, backend=backend) for backend in args.backends}
    compiled, last = torch.compile(model) if args.compile else None, 3 if stage == "finetune" else 2  # one direction
    changes = ["", *(x for x in ("compile", "grad_checkpoint", "split")[:last] if getattr(args, x))]

    def step(row: dict) -> float:
        b, scan, change = row["batch"], scans[row["scan"]], row["change"]
        scan = functools.partial(split, scan) if change == "split" else scan
        getattr(model, "encoder", model).grad_checkpoint = change == "grad_checkpoint"
        with patch.object(armamba, "selective_scan", scan):  # around the backward pass too, for recomputed blocks
            with train.autocast(recipe):
                loss = loss_of(compiled if change == "compile" else model, images[:b], labels[:b])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf).item()
        value = loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update_parameters(model)
        return value

    ways = product(args.batch_size, args.backends, changes)
    rows = [dict(variant=args.variant, stage=stage, batch=b, scan=scan, change=change) for b, scan, change in ways]
    for row in rows:
        try:
            row["loss"] = [step(row) for _ in range(max(1, args.warmup))][-1]
            peak = bench_scan.peak_memory(functools.partial(step, row), device)
            row["memory_gib"] = (torch.cuda.max_memory_allocated() if device == "cuda" else peak) / 2**30
        except Exception as error:  # out of memory, say; the other rows go on
            optimizer.zero_grad()
            row |= dict(loss=type(error).__name__, error=f"{error}".partition("\n")[0])
        print(*row.values(), sep=", ", file=sys.stderr, flush=True)
    runs = [(row, []) for row in rows if "memory_gib" in row]
    for _, (row, ms) in product(range(args.steps), runs):  # in turns
        ms.append(bench_scan.timed(functools.partial(step, row), device))
    for row, ms in runs:
        rate = row["images_per_s"] = 1000 * row["batch"] / statistics.median(ms)
        row |= dict(x_first=rate / runs[0][0]["images_per_s"], ms=statistics.median(ms), min=min(ms), max=max(ms))
        row |= dict(gflop_per_image=gflop, tflop_per_s=rate * gflop / 1000)
    fastest = max((row for row, _ in runs), key=lambda row: row["x_first"]) if args.profile and runs else None
    return rows, operators(functools.partial(step, fastest), device) if fastest else []


def operators(step, device: str) -> list[dict]:
    """The operators with the most time of their own, without other operators that they call; means of three steps."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as record:
        wall = bench_scan.timed(lambda: [step() for _ in range(3)], device)
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"  # microseconds
    found = [e for e in record.key_averages() if e.device_type.name == "CPU"]  # operators, not kernels
    found = sorted(((getattr(e, own) / 1000, e.count, e.key) for e in found), reverse=True)[:15]
    found.append((wall - sum(ms for ms, *_ in found), 0, "all else, waiting included"))
    return [dict(operator=key, calls=n / 3, ms=ms / 3, share=ms / wall) for ms, n, key in found]


def cost(args) -> list[dict]:
    """Hours for ImageNet, from rates in results where there are some, else from FLOP and a sustained FLOP/s."""
    sustained = [1e12 * float(x) for x in args.cost if not Path(x).is_file()] or [300e12]
    reports, rows = [json.loads(Path(x).read_text()) for x in args.cost if Path(x).is_file()], []
    if not all(report["environment"]["gpu"] for report in reports):
        raise ValueError("--cost takes results of GPUs, and one of these files is from a CPU: leave it out")
    steps = sorted((x["images_per_s"], x["variant"], x["stage"]) for y in reports for x in y["steps"] if "ms" in x)
    measured = {tuple(key): (rate, "measured") for rate, *key in steps}  # the fastest comes last and stays
    for key in product(("base", "large", "huge"), args.stage):
        epochs, per_image = SCRIPTS[key[1]].PRESETS[f"imagenet-{key[0]}"]["epochs"], flops(*key)
        rate, word = measured.get(key, (sustained[0] / per_image, "estimated"))
        hours, row = epochs * IMAGES / rate / 3600, {"size": key[0], "stage": key[1], "epochs": epochs}
        row |= {"GFLOP per image": per_image / 1e9, "images/s, 1 GPU": f"{rate:.0f} ({word})"}
        rows.append(row | {"hours, 1 GPU": f"{hours:.0f} (estimated)", "hours, 8 GPUs": f"{hours / 8:.1f} (estimated)"})
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--variant", choices=armamba.VARIANTS, default="base")
    add("--stage", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", dest="dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU")
    add("--batch-size", type=int, nargs="+", help="default: 128 on a GPU, 8 on a CPU")
    add("--backends", nargs="+", choices=armamba.BACKENDS, default=["auto"], help="of the scan")
    for name in ("compile", "grad-checkpoint", "split", "profile", "loader", "quick"):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=False)
    for name, default in dict(steps=20, warmup=3, threads=torch.get_num_threads(), workers=2).items():
        add(f"--{name}", type=int, default=default)
    add("--rate", type=float, nargs="+", default=[4000.0], help="images/s of a GPU that the loader is to feed")
    add("--cost", nargs="*", metavar="X", help="only print hours: TFLOP/s (300), and results of GPUs if there are any")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    if args.quick:
        args.variant, args.steps, args.warmup, args.batch_size = "micro", 2, 1, args.batch_size or [2]
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.batch_size = args.batch_size or [128 if args.device == "cuda" else 8]
    torch.set_num_threads(args.threads)
    report = {"environment": bench_scan.environment(args) | {"scan": armamba.scan_backend(args.device)}}
    if args.cost is not None:
        report["cost"] = cost(args)
    elif args.loader:
        report["loader"] = loader(args.stage, args.workers, args.rate, *((8, 4) if args.quick else ()))
    else:
        results = {stage: measure(stage, args) for stage in args.stage}
        report["steps"] = [row for rows, _ in results.values() for row in rows]
        report |= {f"profile of {stage}": found for stage, (_, found) in results.items() if found}
    print(json.dumps(report["environment"], indent=1))
    for name, rows in list(report.items())[1:]:
        head = list(max(rows, key=len))
        lines = [head, ["---"] * len(head), *([row.get(x, "") for x in head] for row in rows)]
        lines = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in line] for line in lines]
        print(f"\n**{name}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    train.run_script(main)
