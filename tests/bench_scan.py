"""How fast, how large, how exact: implementations of the selective scan in turns, on the same inputs.

    python tests/bench_scan.py --quick                                # a small shape, seconds
    python tests/bench_scan.py --cpp --model --json scan.json         # S1-S4 on one thread: about 15 minutes
    python tests/bench_scan.py --device cuda --dtype bf16 --model

Each computes y from u, delta, A, B, C, D, delta_bias with a softplus, as the mixer asks for it. Times are medians
(min..max) of runs that take turns, so that whatever else the machine does hits all alike. What takes longer than --slow
seconds is run once, under the profiler, and the table says so. Forward is under no_grad. Memory is the peak of what is
allocated beside the inputs, over the inputs: on a CPU from the profiler's record of PyTorch's allocations, which is the
same in every run and sees inside operators; on a GPU from torch.cuda. Error is the largest difference from a loop in
fp64, of y and of every gradient, each over its largest value. Nothing is asserted here, but in tests/test_scan.py.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin on a shared machine
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs each of its starts
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import armamba  # noqa: E402
from armamba import selective_scan, selective_scan_ref  # noqa: E402

SHAPES = {  # images, directions, channels of each, tokens; 16 states per channel
    "Q": (2, 1, 192, 64),
    "S1": (8, 1, 768, 128),  # pretraining of base
    "S2": (64, 1, 192, 64),
    "S3": (4, 4, 768, 197),  # finetuning of base: four directions, 14 x 14 patches and a class token
    "S4": (2, 1, 768, 577),  # 384 pixels
    "G1": (256, 1, 768, 128),  # S1 and S3 with as many images as a large GPU takes
    "G2": (64, 4, 768, 197),
}
N = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("views", "contiguous")  # of (b, l, d) tensors, as in a model; or (b, d, l) in memory
OURS, CPP_LOOP = "armamba, torch", "C++ loop"


# ----------------------------------------------------------------------------------------------------------------------
# Contestants: (u, delta, A, B, C, D, bias) -> y, with u, delta, y (b, g*d, l); A (g*d, n); B, C (b, g, n, l)


def indexing_loop(u, delta, A, B, C, D, bias):
    """The formula as most write it down (and mamba-ssm's selective_scan_ref): all decays first, then x[:, :, t]."""
    delta = F.softplus(delta.float() + bias[:, None])
    B, C = (x.float().repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))  # (b, d, n, l)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    write = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u.float())
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1], dtype=torch.float32), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + write[:, :, t]
        ys.append(torch.einsum("bdn,bdn->bd", h, C[:, :, :, t]))
    return (torch.stack(ys, dim=2) + D[:, None] * u).to(u.dtype)


def associative_scan(u, delta, A, B, C, D, bias):
    """PyTorch's, on (b, l, d, n) tensors of decays and writes, which it turns into all states."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    u, delta, B, C = (x.float() for x in (u.mT, F.softplus(delta.mT + bias), B[:, 0].mT, C[:, 0].mT))
    decay, write = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    h = associative_scan(combine, (decay, write), 1, combine_mode="generic")[1]
    return ((h @ C[..., None])[..., 0] + D * u).mT


def mambapy(u, delta, A, B, C, D, bias):
    """Its block's method around its `pscan`, which uses nothing of the block."""
    from mambapy.mamba import MambaBlock

    u, delta, B, C = (x.float() for x in (u.mT, F.softplus(delta.mT + bias), B[:, 0].mT, C[:, 0].mT))
    return MambaBlock.selective_scan(None, u, delta, A, B, C, D).mT


def transformers(u, delta, A, B, C, D, bias):
    """Its function that the mixer falls back to without kernels, called directly."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(u, delta, A, B[:, 0], C[:, 0], D, delta_bias=bias, delta_softplus=True)


CPP = """
#include <torch/extension.h>
#include <cmath>
torch::Tensor scan(torch::Tensor u_, torch::Tensor delta_, torch::Tensor A_, torch::Tensor B_, torch::Tensor C_) {
  const int64_t b = u_.size(0), l = u_.size(1), d = u_.size(2), n = B_.size(2);  // A (n, d); u, delta (b, l, d)
  auto y_ = torch::zeros_like(u_), h_ = torch::zeros({b, n, d});
  for (int64_t i = 0; i < b * l; ++i) {
    const float *u = u_.data_ptr<float>() + i * d, *delta = delta_.data_ptr<float>() + i * d;
    float* __restrict__ y = y_.data_ptr<float>() + i * d;
    for (int64_t j = 0; j < n; ++j) {
      const float B = B_.data_ptr<float>()[i * n + j], C = C_.data_ptr<float>()[i * n + j];
      const float* A = A_.data_ptr<float>() + j * d;
      float* __restrict__ h = h_.data_ptr<float>() + ((i / l) * n + j) * d;
      for (int64_t k = 0; k < d; ++k) {
        h[k] = expf(delta[k] * A[k]) * h[k] + delta[k] * u[k] * B;
        y[k] += C * h[k];
      }
    }
  }
  return y_;
}
"""


@functools.cache
def _cpp():
    from torch.utils.cpp_extension import load_inline

    flags = ["-O3", "-march=native", "-ffast-math"]
    return load_inline("armamba_bench_scan", CPP, functions=["scan"], extra_cflags=flags, extra_ldflags=["-lmvec"])


def cpp_loop(u, delta, A, B, C, D, bias):
    """Forward only, no autograd: the limit for what calls one PyTorch operator after another."""
    delta, B, C = (x.mT.contiguous() for x in (F.softplus(delta + bias[:, None]), B[:, 0], C[:, 0]))
    return (_cpp().scan(u.mT.contiguous(), delta, A.mT.contiguous(), B, C) + D * u.mT).mT


def one_call_per_group(scan, u, delta, A, B, C, D, bias):
    """For those that know no groups; what a vision Mamba does that calls one scan per direction."""
    g, dims = B.shape[1], (1, 1, 0, 1, 1, 0, 0)
    groups = zip(*(x.chunk(g, dim) for x, dim in zip((u, delta, A, B, C, D, bias), dims)))
    return torch.cat([scan(*group) for group in groups], dim=1)


def contestants(args, g) -> dict:
    def ours(backend):
        return lambda *x: selective_scan(*x[:6], None, x[6], True, backend=backend)

    found = {OURS: ours("torch"), "armamba, ref": ours("ref"), "indexing loop": indexing_loop}
    kernels = [x for x in ("triton", "kernel") if armamba.scan_backend(args.device, backend=x)[0] == x]
    found |= {name: ours(name) for name in kernels}
    single = {"associative_scan, eager": associative_scan}
    single |= {f.__name__: f for f in (mambapy, transformers) if version(f.__name__)}
    if args.cpp:
        single[CPP_LOOP] = cpp_loop
    if g > 1:
        single |= {f"{name}, {g} calls": found[name] for name in (OURS, *kernels)}
    found |= {name: functools.partial(one_call_per_group, scan) for name, scan in single.items()}
    for scan in found.values():  # so that no time below includes an import or a compilation
        forward(scan, *make_inputs((1, g, 8, 4), "views", DTYPES[args.dtype], args.device))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def make_inputs(shape, layout, dtype, device):
    """u, delta, A, B, C, D, bias, and dL/dy. After the softplus, delta is mostly small and at most 10."""
    (b, g, d, l), rng = shape, torch.Generator().manual_seed(0)
    u, delta, dy = (torch.randn(b, l, g * d, generator=rng) for _ in range(3))
    B, C = (torch.randn(b, l, g, N, generator=rng) for _ in range(2))
    sequences = [u.mT, (3 * delta - 4).clamp(max=10).mT, *(x.permute(0, 2, 3, 1) for x in (B, C)), dy.mT]
    if layout == "contiguous":
        sequences = [x.contiguous() for x in sequences]
    u, delta, B, C, dy = (x.to(device, dtype) for x in sequences)
    A = -torch.arange(1.0, N + 1).repeat(g * d, 1) * (0.5 + torch.rand(g * d, 1, generator=rng))
    D, bias = torch.randn(g * d, generator=rng), torch.rand(g * d, generator=rng) / 10
    A, D, bias = (x.to(device) for x in (A, D, bias))
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, bias)], dy


def forward(scan, inputs, dy):
    with torch.no_grad():
        return [scan(*inputs)]


def forward_backward(scan, inputs, dy):
    y = scan(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def timed(function, device="cpu") -> float:
    """Milliseconds."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return 1000 * (time.perf_counter() - start)


def peak_memory(function, device="cpu") -> int:
    """The most bytes that were allocated at once while `function` ran, beside what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    live = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()  # negative when memory is given back
            peak = max(peak, live)
    return peak


def largest_error(got, want) -> float:
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want))


def first_run(function, scan, inputs, dy, want, device) -> tuple[int, float, float]:
    """A warm-up that tells the peak memory (bytes), the time (milliseconds) and the error."""
    results, took = [], []

    def run():
        took.append(timed(lambda: results.extend(function(scan, inputs, dy)), device))

    return peak_memory(run, device), took[0], largest_error(results, want)


def compare(shape_name, layout, args) -> list[dict]:
    """One row per contestant, ours first."""
    shape = SHAPES[shape_name]
    inputs, dy = make_inputs(shape, layout, DTYPES[args.dtype], args.device)
    size = sum(x.nbytes for x in inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    # the loop in fp64; tests/test_scan.py holds it against another one
    want = forward_backward(lambda *x: selective_scan_ref(*x[:6], None, x[6], True), doubles, dy)
    rows, times = [], {}
    for name, scan in contestants(args, shape[1]).items():
        rows.append({"shape": shape_name, "layout": layout, "name": name})
        if name.startswith("triton"):
            forward_backward(scan, inputs, dy)  # it compiles for the shape at hand
        for part, function in (("forward", forward), ("both", forward_backward)):
            if (name, part) == (CPP_LOOP, "both"):
                continue
            memory, took, error = first_run(function, scan, inputs, dy, want, args.device)
            rows[-1] |= {f"{part}_memory": memory / size, f"{part}_error": error}
            slow = took > 1000 * args.slow
            times[name, part] = (scan, function, [took] if slow else [], 0 if slow else args.repeats)
        print(f"  {shape_name}, {layout}: {name} has run once", file=sys.stderr, flush=True)
    for i in range(args.repeats):  # in turns
        for scan, function, took, repeats in times.values():
            if i < repeats:
                took.append(timed(lambda scan=scan, function=function: function(scan, inputs, dy), args.device))
    for row in rows:
        for part in ("forward", "both"):
            took, ours = (times[name, part][2] if (name, part) in times else None for name in (row["name"], OURS))
            if took:
                numbers = {"median": statistics.median(took), "min": min(took), "max": max(took), "runs": len(took)}
                row[part] = numbers | {"over_ours": statistics.median(took) / statistics.median(ours)}
    return rows


def scan_share(directions, args) -> dict:
    """The scan's share of a training step (forward and backward, no optimiser) of a block of the base model."""
    b, l, grid, cls_index = (8, 128, None, None) if directions == 1 else (4, 197, (14, 14), 98)
    block = armamba.Block(armamba.VARIANTS["base"], directions).to(args.device)
    x, dtype = torch.randn(b, l, 768, device=args.device, requires_grad=True), DTYPES[args.dtype]
    operators, inside = (armamba._scan, armamba._scan_backward), []

    def watch(operator):
        def watched(*args_):
            results = []
            inside.append(timed(lambda: results.append(operator(*args_)), args.device))
            return results[0]

        return watched

    def step():
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            y = block(x, grid, cls_index)
        y.float().square().mean().backward()

    shares, steps = [], []
    try:
        armamba._scan, armamba._scan_backward = map(watch, operators)
        for _ in range(args.repeats + 1):  # the first is a warm-up
            inside.clear()
            steps.append(timed(step, args.device))
            shares.append(sum(inside) / steps[-1])
    finally:
        armamba._scan, armamba._scan_backward = operators
    result = {"directions": directions, "tokens": l, "images": b, "step": statistics.median(steps[1:])}
    return result | {"share": statistics.median(shares[1:]), "min": min(shares[1:]), "max": max(shares[1:])}


# ----------------------------------------------------------------------------------------------------------------------
# Report


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def environment(args) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    packages = ("torch", "mambapy", "transformers", "mamba_ssm", "causal_conv1d")
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "cpu": f"{cpu[0]}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
    }


def table(rows) -> str:
    head = "| scan | fwd ms | x ours | fwd+bwd ms | x ours | fwd memory | fwd+bwd memory | error |"
    lines = [head, "|---" * 8 + "|"]
    for row in rows:
        cells = [row["name"]]
        for part in ("forward", "both"):
            x = row.get(part)
            spread = "1 run" if x and x["runs"] == 1 else f"{x['min']:.1f}..{x['max']:.1f}" if x else ""
            cells += [f"{x['median']:.1f} ({spread})", f"{x['over_ours']:.2f}"] if x else ["", ""]
        cells += [f"{row[part]:.1f}" if part in row else "" for part in ("forward_memory", "both_memory")]
        cells.append(f"{max(row['forward_error'], row.get('both_error', 0)):.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows) -> str:
    """One line per contestant: forward and backward in milliseconds, and over ours, for each shape and layout."""
    cases = list(dict.fromkeys((row["shape"], row["layout"]) for row in rows))
    lines = [f"| forward + backward | {' | '.join(f'{shape} {layout}' for shape, layout in cases)} |"]
    lines += ["|---" * (len(cases) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows if "both" in row):
        found = {(row["shape"], row["layout"]): row["both"] for row in rows if row["name"] == name}
        cells = [f"{x['median']:.1f} ms, {x['over_ours']:.3g}x" if (x := found.get(case)) else "" for case in cases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shapes", default="S1,S2,S3,S4", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of the inputs in memory")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow", type=float, default=4, help="seconds; whoever needs more runs only once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, help="also write the results here")
    flags = {"quick": "shape Q, 3 repeats", "cpp": "a C++ loop too", "model": "the scan's share of a training step"}
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=False, help=text)
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.repeats = "Q", 3
    shapes, layouts = args.shapes.split(","), args.layouts.split(",")
    unknown = {*shapes, *layouts} - {*SHAPES, *LAYOUTS}
    if unknown or (args.cpp and (args.device, args.dtype) != ("cpu", "fp32")):
        parser.error(f"unknown: {', '.join(unknown)}" if unknown else "--cpp is for --device cpu and --dtype fp32")
    torch.set_num_threads(args.threads)

    report = {"environment": environment(args), "scans": [], "model": []}
    print(json.dumps(report["environment"], indent=1))
    for name, layout in itertools.product(shapes, layouts):
        rows, (b, g, d, l) = compare(name, layout, args), SHAPES[name]
        report["scans"] += rows
        runs = f"{args.repeats} runs in turns"
        print(f"\n**{name}**: b {b}, g {g} x d {d}, l {l}, n {N}; {layout}; {runs}\n\n{table(rows)}", flush=True)
    line = "base block, {images} images, {tokens} tokens, {directions} directions: step {step:.0f} ms, scan {share:.1%}"
    for directions in (1, 4) if args.model else ():
        report["model"].append(scan_share(directions, args))
        print(f"\n{line} ({{min:.1%}}..{{max:.1%}})".format(**report["model"][-1]), flush=True)
    print("\n" + summary(report["scans"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
