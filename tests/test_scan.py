"""The selective scan against a loop in fp64 that is written here: outputs, last state and every gradient.

On a CPU the kernel's plumbing runs on a stand-in for its extension module that makes the same checks. The kernel itself
is run by `pytest -m gpu tests/test_scan.py`; ARMAMBA_REQUIRE_KERNEL=1 makes a missing kernel fail instead of skip.
"""

import functools
import os
import random
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from bench_scan import peak_memory
from conftest import ROOT, have

import armamba
from armamba import VARIANTS, ARMConfig, Mixer, VisionMamba, selective_scan

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BOUND = 2e-6  # fp32 against fp64, relative to the largest value; measured: at most 1e-6
scan = functools.partial(selective_scan, delta_softplus=True)
tl = armamba.tl  # where Triton looks for it
torch_and_ref = pytest.mark.parametrize("backend", ["torch", "ref"])


# ----------------------------------------------------------------------------------------------------------------------
# The oracle, inputs, comparison


def loop_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The definition, one step after another, in the inputs' dtype; shares nothing with armamba.py. Returns y, h_l."""
    d, l = u.shape[1:]
    B, C = (x if x.ndim == 4 else x.unsqueeze(1) for x in (B, C))  # (b, g, n, l)
    group = torch.arange(d, device=u.device) // (d // B.shape[1])
    delta = delta if delta_bias is None else delta + delta_bias.view(1, d, 1)
    delta = torch.logaddexp(delta, torch.zeros_like(delta)) if delta_softplus else delta
    h, y = torch.zeros_like(delta[:, :, :1] * A), []  # (b, d, n)
    for t in range(l):
        decay = torch.exp(torch.einsum("bd,dn->bdn", delta[:, :, t], A))
        write = torch.einsum("bd,bd,bdn->bdn", delta[:, :, t], u[:, :, t], B[:, group, :, t])
        h = decay * h + write
        y.append(torch.einsum("bdn,bdn->bd", C[:, group, :, t], h))
    y = torch.stack(y, dim=2)
    y = y if D is None else y + D.view(1, d, 1) * u
    return (y if z is None else y * z / (1 + torch.exp(-z))), h


def make(b=2, d=8, l=7, n=4, g=None, softplus=True, layout="view", dtype=FP32, seed=0, device="cpu", leave_out=()):
    """Arguments of a scan; delta, after the softplus if any, is at most 10 and mostly small.

    g None: B and C are (b, n, l). layout "view": as in a model, transposed from (b, l, d); "contiguous": (b, d, l) in
    memory; "sliced": every second step of a longer sequence. The numbers are the same in all.
    """
    rng = torch.Generator().manual_seed(seed)

    def sequence(*shape, random=torch.randn):
        x = random(shape, generator=rng, dtype=FP64).to(device, dtype)
        sliced = x.repeat_interleave(2, dim=-1)[..., ::2]
        return {"view": x.movedim(-1, 1).contiguous().movedim(1, -1), "contiguous": x, "sliced": sliced}[layout]

    raw, groups = sequence(b, d, l, random=torch.rand), [] if g is None else [g]
    x = {"u": sequence(b, d, l), "delta": raw * 22 - 12 if softplus else 10 * raw**4}
    x["A"] = -torch.rand(d, n, generator=rng) * torch.arange(1, n + 1)
    x |= {k: sequence(b, *groups, n, l) for k in "BC"}
    x |= {"D": torch.randn(d, generator=rng), "z": sequence(b, d, l), "delta_bias": torch.rand(d, generator=rng) / 10}
    x |= {k: x[k].to(device, torch.promote_types(dtype, FP32)) for k in ("A", "D", "delta_bias")}
    return {k: v for k, v in x.items() if k not in leave_out}


def run(scan, x, dtype=None, **options):
    """Output and all gradients by name; dL/dy is random, the same for every scan, and rounded to `dtype` or y's."""
    x = {k: v.detach().requires_grad_() for k, v in x.items()}
    y = scan(**x, **options)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, dtype or y.dtype)
    return {"y": y} | dict(zip(x, torch.autograd.grad(y, list(x.values()), dy.to(y.dtype))))


def oracle(x, softplus=True):
    return run(loop_scan, {k: v.double() for k, v in x.items()}, x["u"].dtype, delta_softplus=softplus)


def last_state(x, softplus=True):
    return loop_scan(**{k: v.double() for k, v in x.items()}, delta_softplus=softplus)[1]


def error(got, want) -> float:
    """The largest difference over the largest value; NaN counts as infinite."""
    assert got.shape == want.shape
    want = want.double()
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf).item()


def check(got, want, bound=BOUND, note=""):
    errors = {k: error(got[k], want[k]) for k in want}
    worst = max(errors, key=errors.get)
    print(f"{note}: largest error {errors[worst]:.1e}, of {worst}")  # pytest -s shows it
    assert got.keys() == want.keys() and errors[worst] <= bound, f"{note}: {worst}: {errors} (bound {bound})"


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("g", [None, 1, 4])
@pytest.mark.parametrize("l", [1, 2, 31, 32, 33, 128, 145, 197, 577])
def test_loop(l, g, softplus):
    x = make(l=l, g=g, softplus=softplus, seed=l)
    want = oracle(x, softplus)
    for layout in ("view", "contiguous"):
        x = make(l=l, g=g, softplus=softplus, seed=l, layout=layout)
        for backend in ("torch", "ref"):
            got = run(selective_scan, x, delta_softplus=softplus, backend=backend)
            check(got, want, note=f"{backend}, {layout}")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8])
def test_chunk_borders(steps, monkeypatch):
    monkeypatch.setattr(armamba, "_chunk_length", lambda u, n: steps)
    x = make(g=2)
    got = run(scan, x, backend="torch")
    check(got, oracle(x))
    y, h = scan(**x, return_last_state=True, backend="torch")  # without gradients no states are kept
    assert torch.equal(y, got["y"]) and error(h, last_state(x)) <= BOUND


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed, monkeypatch):
    rng = random.Random(seed)
    b, g, k, l, n, steps = (rng.randint(1, most) for most in (3, 4, 5, 40, 9, 12))
    absent = [name for name in ("D", "z", "delta_bias") if rng.random() < 0.5]
    softplus, layout = rng.random() < 0.5, rng.choice(["view", "contiguous", "sliced"])
    monkeypatch.setattr(armamba, "_chunk_length", lambda u, n: steps)
    x = make(b, g * k, l, n, g if g > 1 else rng.choice([1, None]), softplus, layout, FP32, seed, leave_out=absent)
    want = oracle(x, softplus)
    for backend in ("torch", "ref"):
        check(run(selective_scan, x, delta_softplus=softplus, backend=backend), want, note=backend)


@torch_and_ref
@pytest.mark.parametrize("softplus", [True, False])
def test_gradcheck(backend, softplus, monkeypatch):
    monkeypatch.setattr(armamba, "_chunk_length", lambda u, n: 2)
    x = make(b=2, d=4, l=5, n=2, g=2, softplus=softplus, dtype=FP64)
    x["delta"] = x["delta"] / 4  # finite differences need a function that is not too steep
    function = functools.partial(selective_scan, delta_softplus=softplus, backend=backend)
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in x.values()])  # also without dL/dy


@torch_and_ref
def test_empty_batch(backend):
    got = run(scan, make(b=0), backend=backend)
    assert got["y"].shape == (0, 8, 7) and not any(v.any() for v in got.values())


@torch_and_ref
def test_closed_forms(backend):
    l = 50
    one, t = torch.ones(1, 1, l, dtype=FP64), torch.arange(1, l + 1, dtype=FP64)
    A, delta, B, C, u = -0.7, 0.3, 1.5, 2.0, -1.1  # all constant: a geometric series
    ratio = torch.tensor(delta * A, dtype=FP64).exp()
    y = selective_scan(u * one, delta * one, torch.tensor([[A]], dtype=FP64), B * one, C * one, backend=backend)
    torch.testing.assert_close(y[0, 0], C * delta * B * u * (1 - ratio**t) / (1 - ratio))

    x = make(l=l, g=2, softplus=False, dtype=FP64, leave_out=("D", "z", "delta_bias"))
    B, C = (x[k].repeat_interleave(4, dim=1) for k in "BC")  # (b, d, n, l)
    write = (x["delta"] * x["u"])[:, :, None] * B
    forever = selective_scan(**x | {"A": torch.full((8, 4), -1e-15, dtype=FP64)}, backend=backend)  # a running sum
    torch.testing.assert_close(forever, (C * write.cumsum(-1)).sum(2))
    forget = x | {"A": torch.full((8, 4), -1e20, dtype=FP64)}  # no memory of the step before, and no NaN
    at_once = run(selective_scan, forget, backend=backend)
    torch.testing.assert_close(at_once["y"], (C * write).sum(2))
    assert all(v.isfinite().all() for v in at_once.values())


@torch_and_ref
def test_last_state(backend):
    x = make(l=37, g=4)
    plain = run(scan, x, backend=backend)
    both = functools.partial(scan, return_last_state=True, backend=backend)
    check(run(both, x), plain, bound=0)  # asking for the state changes neither the output nor the gradients
    y, h = both(**{k: v.detach().requires_grad_() for k, v in x.items()})
    assert y.requires_grad and not h.requires_grad and h.dtype == FP32
    assert error(h, last_state(x)) <= BOUND


@torch_and_ref
def test_gradients_of_any_layout_and_of_some_inputs(backend):
    x = make(l=37, g=2)
    x = {k: v.requires_grad_(k in ("u", "A")) for k, v in x.items()}
    grads = []
    for dy in (torch.ones(()).expand(2, 8, 37), torch.ones(2, 37, 8).mT, torch.ones(2, 8, 37)):
        y = scan(**x, backend=backend)
        grads.append(torch.autograd.grad(y, (x["u"], x["A"]), dy))
    torch.testing.assert_close(grads[0], grads[2], rtol=0, atol=0)
    torch.testing.assert_close(grads[1], grads[2], rtol=0, atol=0)


@torch_and_ref
def test_inputs_are_left_alone(backend):
    x = make(g=2)
    copies = {k: v.clone() for k, v in x.items()}
    run(scan, x, backend=backend)
    scan(**x, backend=backend)  # without gradients
    for k, v in x.items():
        assert torch.equal(v, copies[k]) and v._version == 0, k


# ----------------------------------------------------------------------------------------------------------------------
# Types


@torch_and_ref
@pytest.mark.parametrize("other", [FP64, FP32, BF16, FP16, None])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
def test_dtypes(dtype, other, backend):
    """One type for all of u, delta, B, C, z; or another one for half of them."""
    x = make(l=37, g=2, dtype=dtype)
    x |= {k: x[k].to(other or dtype) for k in ("delta", "C")}
    got = run(scan, x, backend=backend)
    assert got["y"].dtype == dtype and all(got[k].dtype == x[k].dtype for k in x)
    h = selective_scan(**x, return_last_state=True, backend=backend)[1]
    assert h.dtype == (FP64 if FP64 in (dtype, other) else FP32)
    wider = x | dict(delta_bias=x["delta_bias"].double())  # does not decide
    assert selective_scan(**wider, return_last_state=True, backend=backend)[1].dtype == h.dtype
    coarsest = max(torch.finfo(v.dtype).eps for v in x.values())
    bound = 3 * coarsest if coarsest > 1e-6 else BOUND if coarsest > 1e-10 else 1e-13
    check(got, oracle(x), bound)


@torch_and_ref
def test_state_is_fp32_under_autocast(backend):
    """4,000 bf16 steps: equal to the fp32 scan of the same numbers, which a bf16 state would miss by far."""
    x = make(b=1, d=4, l=4000, n=2, dtype=BF16, leave_out=("z",))
    x["A"] = x["A"] / 100
    want = scan(**{k: v.float() for k, v in x.items()}, backend="ref")
    with torch.autocast("cpu", BF16):
        y = scan(**x, backend=backend)
    torch.testing.assert_close(y, want.to(BF16), rtol=2**-7, atol=1e-4)  # one bf16 step where rounding is a close call


@torch_and_ref
def test_autocast_changes_nothing(backend):
    x = make(l=37, g=2)
    want = run(scan, x, backend=backend)
    with torch.autocast("cpu", BF16):  # forward and backward
        got = run(scan, x, backend=backend)
    assert got["y"].dtype == FP32
    check(got, want, bound=0)


# ----------------------------------------------------------------------------------------------------------------------
# Memory, operators, torch.compile


def test_states_are_saved_only_for_a_backward_pass(monkeypatch):
    saved, operator = [], armamba._scan
    monkeypatch.setattr(armamba, "_scan", lambda *args: (out := operator(*args), saved.append(out[2]))[0])
    monkeypatch.setattr(armamba, "_chunk_length", lambda u, n: 2)
    x = make(l=7)
    selective_scan(**x, backend="torch")
    needed = x | {"A": x["A"].requires_grad_()}
    selective_scan(**needed, backend="torch")
    with torch.no_grad():
        selective_scan(**needed, backend="torch")
    assert [len(states) for states in saved] == [0, 4, 0]


@pytest.mark.parametrize("layout, forward, both", [("view", 1.5, 6.5), ("contiguous", 2.5, 7.5)])
def test_memory(layout, forward, both):
    x = make(b=8, d=768, l=128, n=16, layout=layout, leave_out=("z",))  # S1 of bench_scan
    size = sum(v.nbytes for v in x.values())
    calls = (lambda: scan(**x, backend="torch")), (lambda: run(scan, x, backend="torch"))
    measured = [peak_memory(call) / size for call in calls]
    print(f"{layout}: memory beside the inputs, over that of the inputs: {measured}")
    assert measured[0] <= forward and measured[1] <= both


@pytest.mark.parametrize("backend", ["torch", "kernel", "triton"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("g", [1, 2])
def test_registered_operators(g, dtype, backend, pretend_kernel, request):
    layout, checks = "contiguous" if backend == "kernel" else "view", dict()
    if backend == "triton":
        request.getfixturevalue("interpreter")
        checks = dict(test_utils=("test_schema", "test_faketensor"))  # the others take too long in an interpreter
    x = make(l=7, g=g, dtype=dtype, layout=layout, leave_out=("z",))
    x = [v.to(FP32) if k in ("A", "D", "delta_bias") else v for k, v in x.items()]
    y, _, saved = armamba._scan(*x, True, backend, True)
    torch.library.opcheck(armamba._scan_backward, (torch.ones_like(y), saved, *x, True, backend), **checks)
    x = [v.requires_grad_() for v in x]
    torch.library.opcheck(armamba._scan, (*x, True, backend, True), **checks)


def test_forward_mode_derivatives_are_right_or_refused():
    x = make(dtype=FP64)
    dots = tuple(torch.randn_like(v) for v in x.values())

    def tangent(scan):
        return torch.func.jvp(lambda *values: scan(**dict(zip(x, values))), tuple(x.values()), dots)[1]

    want = tangent(lambda **x: loop_scan(**x, delta_softplus=True)[0])
    torch.testing.assert_close(tangent(scan), want)
    with pytest.raises(ValueError, match="backend 'torch' has no forward-mode derivatives: take 'ref' or 'auto'"):
        tangent(functools.partial(scan, backend="torch"))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("g", [None, 2])
def test_compile(g):
    x, ours = make(l=37, g=g), functools.partial(scan, backend="torch")
    check(run(torch.compile(ours, fullgraph=True), x), run(ours, x), bound=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

ONES = {k: torch.ones(2, 8, 5) for k in ("u", "delta", "z")} | {k: torch.ones(2, 2, 3, 5) for k in "BC"}
ONES |= {"A": torch.ones(8, 3), "D": torch.ones(8), "delta_bias": torch.ones(8)}
WRONG_SHAPES = {
    "u": [(2, 8), (2, 8, 0), (2, 4, 8, 5)],
    "delta": [(2, 8, 4), (1, 8, 5), (2, 5, 8), (8, 5)],
    "A": [(8,), (7, 3), (8, 4), (1, 8, 3)],
    "B": [(2, 3, 4), (2, 2, 4, 5), (2, 2, 3, 4), (1, 2, 3, 5), (2, 2, 5, 3), (2, 3, 3, 5), (2, 4, 3, 5), (8, 3)],
    "C": [(2, 3, 4), (2, 2, 4, 5), (2, 2, 3, 4), (1, 2, 3, 5), (2, 2, 5, 3), (2, 3, 3, 5), (2, 4, 3, 5), (8, 3)],
    "D": [(7,), (1,), (8, 1), ()],
    "z": [(2, 8, 4), (8, 5), (2, 5, 8)],
    "delta_bias": [(7,), (1,), (8, 1), ()],
}


@pytest.mark.parametrize("backend", armamba.BACKENDS)
@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_arguments(name, backend):
    selective_scan(**ONES, backend="ref")  # these fit
    for shape in WRONG_SHAPES[name]:
        with pytest.raises(ValueError, match="has shape|d % g"):
            selective_scan(**ONES | {name: torch.ones(shape)}, backend=backend)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"{name} has dtype {dtype}"):
            selective_scan(**ONES | {name: ONES[name].to(dtype)}, backend=backend)
    with pytest.raises(ValueError, match="is on"):
        selective_scan(**ONES | {name: ONES[name].to("meta")}, backend=backend)


@pytest.mark.parametrize("backend", armamba.BACKENDS)
def test_wrong_groups_and_backends(backend):
    for B, C in (((2, 3, 3, 5), (2, 3, 3, 5)), ((2, 16, 3, 5), (2, 16, 3, 5))):
        with pytest.raises(ValueError, match="d % g"):
            selective_scan(**ONES | {"B": torch.ones(B), "C": torch.ones(C)}, backend=backend)
    with pytest.raises(ValueError, match="C has shape"):
        selective_scan(**ONES | {"C": torch.ones(2, 3, 5)}, backend=backend)  # one group, B has two
    with pytest.raises(ValueError, match=f"{backend}!"):
        selective_scan(**ONES, backend=backend + "!")


def test_no_kernel_is_a_clear_error():
    """On the CPU there is none, with or without a GPU beside it."""
    with pytest.raises(RuntimeError, match="backend='kernel' cannot be used: .*kernels run on"):
        selective_scan(**ONES, backend="kernel")
    assert torch.equal(selective_scan(**ONES), selective_scan(**ONES, backend="torch"))


# ----------------------------------------------------------------------------------------------------------------------
# The kernel's plumbing, on a stand-in


def _kernel_checks(u, delta, A, B, C, D, z, delta_bias, *more):
    """What the extension checks before it computes (selective_scan.cpp; there, TORCH_CHECKs)."""
    (b, d, l), (n, g) = u.shape, (A.shape[1], B.shape[1])
    assert u.dtype in (FP32, BF16, FP16) and {x.dtype for x in (delta, B, C, *more)} == {u.dtype}
    assert {x.dtype for x in (A, D, delta_bias)} == {FP32} and z is None and n <= 256
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C, D, delta_bias, *more))
    assert [x.shape for x in (delta, A, *more)] == [u.shape, (d, n), *(u.shape for _ in more)]
    assert B.shape == C.shape == (b, g, n, l) and D.shape == delta_bias.shape == (d,)


def _kernel_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _kernel_checks(u, delta, A, B, C, D, z, delta_bias)
    y, h = loop_scan(*(x.double() for x in (u, delta, A, B, C, D)), None, delta_bias.double(), delta_softplus)
    x = torch.full((*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1]), 777.0)  # the rest is its own affair
    x[:, :, -1, 1::2] = h
    return [torch.empty_like(delta).copy_(y), x]


def _kernel_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    _kernel_checks(u, delta, A, B, C, D, z, delta_bias, dout)
    assert x.shape == (*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
    assert x.dtype == FP32 and x.is_contiguous() and (out, dz, recompute_out_z) == (None, None, False)
    tensors = u, delta, A, B, C, D, delta_bias

    def gradients():  # in a thread of its own: within an operator, autograd is switched off
        u, delta, A, B, C, D, bias = leaves = [x.detach().double().requires_grad_() for x in tensors]
        y = loop_scan(u, delta, A, B, C, D, None, bias, delta_softplus)[0]
        return torch.autograd.grad(y, leaves, dout.double())

    with ThreadPoolExecutor(1) as pool:
        return [torch.empty_like(x).copy_(grad) for x, grad in zip(tensors, pool.submit(gradients).result())]


@pytest.fixture
def pretend_kernel(monkeypatch):
    """armamba finds the kernel's extension module, which works on the CPU."""
    module = types.ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = _kernel_fwd, _kernel_bwd
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)
    return module


@pytest.fixture
def pretend_gpu(monkeypatch, pretend_kernel):
    """And takes CPU tensors for CUDA tensors, with the probe of the kernel made on the CPU."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    probe = pretend_kernel.probe = armamba.scan_backend
    monkeypatch.setattr(armamba, "scan_backend", lambda device_type, *what: probe("cuda", *what))
    monkeypatch.setattr(armamba, "_conv_kernel", lambda: None)
    monkeypatch.setattr(armamba, "_triton_scan", mock.Mock(side_effect=ImportError("no Triton")))
    armamba._probe.cache_clear()
    yield pretend_kernel
    armamba._probe.cache_clear()


@pytest.mark.parametrize("dtype, bound", [(FP32, BOUND), (BF16, 2**-7), (FP16, 2**-10)])
@pytest.mark.parametrize("g", [None, 4])
@pytest.mark.parametrize("backend, l", [("kernel", 37), ("auto", 37), ("kernel", 65)])
def test_kernel_plumbing(backend, l, g, dtype, bound, pretend_gpu):
    x = make(l=l, g=g, dtype=dtype)
    want = oracle(x)
    for autocast in (False, True):
        with torch.autocast("cpu", BF16, enabled=autocast):
            got = run(scan, x, backend=backend)
            y, h = scan(**x, return_last_state=True, backend=backend)
        assert got["y"].dtype == dtype and all(got[k].dtype == x[k].dtype for k in x)
        check(got, want, bound)
        assert error(h, last_state(x)) <= BOUND
        assert torch.equal(y, got["y"]) and not h.requires_grad


def test_kernel_casts_mixed_types(pretend_gpu):
    """The kernel wants u, delta, B, C of one type, and A, D, delta_bias in fp32."""
    x = make(l=37, g=2, dtype=BF16)
    x |= {"delta": make(l=37, g=2)["delta"], "A": x["A"].to(BF16), "D": x["D"].to(FP16), "z": x["z"].to(FP16)}
    got = run(scan, x, backend="kernel")
    assert all(got[k].dtype == x[k].dtype for k in x) and got["y"].dtype == BF16
    check(got, oracle(x), bound=2**-7)
    h = scan(**x, return_last_state=True, backend="kernel")[1]
    assert error(h, last_state(x)) <= BOUND  # the one type is the widest
    for l in (37, 65):
        alone = make(l=l, softplus=False, dtype=BF16, leave_out=("D", "z", "delta_bias"))
        check(run(selective_scan, alone, backend="kernel"), oracle(alone, softplus=False), bound=2**-7)


def test_kernel_runs_the_mixer(pretend_gpu, monkeypatch):
    torch.manual_seed(0)
    x, mixer = torch.randn(2, 17, 64, requires_grad=True), Mixer(VARIANTS["micro"], directions=4)
    leaves, results = [x, *mixer.parameters()], []
    for backend in ("kernel", "torch"):
        monkeypatch.setattr(armamba, "scan_backend", lambda *_, name=backend: (name, "as told"))
        y = mixer(x, (4, 4), 8)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for kernel, ours in zip(*results):
        assert error(kernel, ours) < 1e-5


def test_auto_avoids_what_the_kernel_cannot_do(pretend_gpu):
    assert scan(**make()).isfinite().all()  # the probe passes
    pretend_gpu.fwd = lambda *_: pytest.fail("the kernel was called")
    for x in (make(dtype=FP64), make(n=257), make() | {"A": make(dtype=FP64)["A"]}):
        y, want = (scan(**x, backend=backend) for backend in ("auto", "torch"))
        assert torch.equal(y, want)
        with pytest.raises(RuntimeError, match="at most 32 bits, and .* n up to 256"):
            selective_scan(**x, backend="kernel")


@pytest.mark.parametrize("fault", ["raises", "wrong numbers", "missing"])
def test_faulty_kernel_is_found_once_and_said(fault, pretend_gpu, monkeypatch, caplog):
    calls = []

    def fwd(*args):
        calls.append(args)
        if fault == "raises":
            raise NotImplementedError("built without CUDA\nand more")
        return [1.01 * out for out in _kernel_fwd(*args)]

    pretend_gpu.fwd, x = fwd, make()
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    with caplog.at_level("INFO", "armamba"):
        for _ in range(3):
            y, want = (scan(**x, backend=backend) for backend in ("auto", "torch"))
            assert torch.equal(y, want)
    assert len(calls) == (fault != "missing")
    reason = {"raises": "NotImplementedError: built without CUDA", "missing": "ModuleNotFoundError"}
    reason = reason.get(fault, "AssertionError")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and reason in caplog.text
    assert armamba.scan_backend("cuda")[0] == "torch" and reason in armamba.scan_backend("cuda")[1]
    with pytest.raises(RuntimeError, match=reason):
        selective_scan(**x, backend="kernel")


def test_a_scan_that_works_one_way_only_is_not_taken(pretend_gpu, monkeypatch):
    """As with the Triton of PyTorch 2.6, which cannot compile the way back."""
    monkeypatch.setattr(armamba, "_triton_scan", lambda *args: armamba._scan(*args[:-1], "torch", args[-1]))
    for way_back, name in ((mock.Mock(side_effect=AttributeError("no tuples")), "kernel"), (None, "triton")):
        way_back = way_back or (lambda *args: armamba._scan_backward(*args, "torch"))
        monkeypatch.setattr(armamba, "_triton_scan_backward", way_back)
        armamba._probe.cache_clear()
        assert pretend_gpu.probe("cuda")[0] == name


def test_the_first_scan_may_be_in_a_checkpointed_block(pretend_gpu, caplog):
    """Asked about backends there, a probe with gradients of its own would meet the checkpoint's hooks."""
    model = VisionMamba(ARMConfig(image_size=16, patch_size=4, d_model=16, depth=2, decoder_depth=1, d_state=4), 5)
    model.grad_checkpoint = True
    with caplog.at_level("INFO", "armamba"):
        model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert "backend 'kernel'" in caplog.text and len(caplog.records) == 1


def test_what_is_used_is_said_once(caplog, pretend_gpu):
    with caplog.at_level("INFO", "armamba"):
        assert [pretend_gpu.probe(kind)[0] for kind in ("cuda", "cpu", "cuda", "cpu")] == ["kernel", "torch"] * 2
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "cuda: backend 'kernel'" in caplog.text and "cpu: backend 'torch'" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# The scan in Triton, on a CPU by Triton's interpreter (conftest.py asks for it)


def count(out, l):
    for i in range(0, l):
        tl.store(out + i, i)


@pytest.fixture
def interpreter(monkeypatch):
    if armamba.triton is None or "TRITON_INTERPRET" not in os.environ:
        pytest.skip("no Triton that interprets")
    out = torch.zeros(3, dtype=torch.int32)
    try:  # Triton 3.6 stumbles over loops with NumPy 2.4
        armamba.triton.jit(count)[(1,)](out, 3)
    except Exception as error:
        pytest.skip(f"Triton's interpreter does not work here: {error}")
    assert out.tolist() == [0, 1, 2]
    monkeypatch.setattr(armamba, "scan_backend", lambda *_: ("triton", "as told"))


@pytest.mark.parametrize(
    "l, d, g, n, dtype, bound",
    [
        (13, 80, 2, 16, FP32, BOUND),
        (1, 8, None, 4, FP32, BOUND),
        (6, 9, 3, 64, FP32, BOUND),
        (2, 6, 2, 1, FP32, BOUND),
        (9, 40, 1, 16, FP16, 2**-10),
        (9, 40, 1, 16, BF16, 2**-6),  # which the interpreter cuts off
    ],
)
def test_triton(l, d, g, n, dtype, bound, interpreter):
    for softplus in (True, False):
        x = make(l=l, d=d, g=g, n=n, dtype=dtype, softplus=softplus)
        got = run(selective_scan, x, delta_softplus=softplus, backend="triton")
        assert got["y"].dtype == dtype and all(got[k].dtype == x[k].dtype for k in x)
        check(got, oracle(x, softplus=softplus), bound)
    y, h = selective_scan(**x, return_last_state=True, backend="triton")
    assert torch.equal(y, got["y"]) and error(h, last_state(x, softplus=False)) <= BOUND


def test_triton_step_sizes(interpreter):
    """softplus, small and large, each to fp32's precision: with B = C = u = 1 the first y is the step size."""
    delta, one = torch.linspace(-15, 25, 40)[None, :, None], torch.ones(1, 40, 1)
    y = scan(one, delta, -one[0], one[:, :1], one[:, :1], backend="triton")
    torch.testing.assert_close(y.double(), torch.nn.functional.softplus(delta.double()), rtol=3e-6, atol=0)


def test_triton_with_no_images(interpreter):
    got = run(scan, make(b=0), backend="triton")
    assert got["y"].shape == (0, 8, 7) and got["A"].abs().max() == 0


def test_without_triton():
    """As on a Mac or on Windows."""
    code = "import sys; sys.modules['triton'] = None; import armamba, torch; print(armamba.triton)"
    code += "; x = torch.ones(1, 2, 3); print(armamba.selective_scan(x, x, -x[0, :, :1], x[:, :1], x[:, :1]).sum() > 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "tensor(True)"]


def test_triton_takes_no_other_state_sizes_and_types():
    for n, dtype in ((3, FP32), (128, FP32), (16, FP64)):
        name, why = armamba.scan_backend("cuda", n, dtype, "triton")
        assert name == "torch" and "at most 32 bits, and n a power of two up to 64" in why


# ----------------------------------------------------------------------------------------------------------------------
# The mixer


@pytest.mark.parametrize("directions, grid", [(1, None), (4, (3, 4))])
def test_mixer_makes_one_scan_call(directions, grid, monkeypatch):
    spies = {name: mock.Mock(wraps=getattr(armamba, name)) for name in ("selective_scan", "causal_conv")}
    for name, spy in spies.items():
        monkeypatch.setattr(armamba, name, spy)
    Mixer(VARIANTS["micro"], directions)(torch.randn(2, 12, 64), grid).sum().backward()
    ((u, delta, A, B, C), _), ((x, *_), _) = spies["selective_scan"].call_args, spies["causal_conv"].call_args
    assert [spy.call_count for spy in spies.values()] == [1, 1]
    assert u.shape == delta.shape == (2, directions * 64, 12) and x.shape == (2, 12, directions * 64)
    assert A.shape == (directions * 64, 16) and B.shape == C.shape == (2, directions, 16, 12)
    assert u.mT.is_contiguous() and delta.mT.is_contiguous()  # the views that cost nothing


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU. Bounds: outputs as in the kernel's own tests, gradients (atomic additions) relative to the largest

gpu = pytest.mark.gpu
KERNEL = {FP32: ({"rtol": 6e-4, "atol": 2e-3}, 3e-5), BF16: ({"rtol": 3e-2, "atol": 5e-2}, 2e-2)}


@pytest.fixture(params=["triton", "kernel"])
def kernel(request, cuda):
    name, why = armamba.scan_backend("cuda", backend=request.param)
    have(name == request.param, why)
    return request.param


@gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("g", [None, 1, 4])
@pytest.mark.parametrize("l", [1, 128, 145, 197, 577, 2049])
def test_gpu_kernel(l, g, dtype, kernel):
    x = make(b=2, d=64, l=l, n=16, g=g, dtype=dtype, device="cuda", seed=l)
    got, want = run(scan, x, backend=kernel), oracle(x)
    both, bound = KERNEL[dtype]
    torch.testing.assert_close(got["y"].double(), want["y"], **both)
    if kernel == "triton":
        again = run(scan, x, backend=kernel)
        assert all(torch.equal(got[k], again[k]) for k in got)  # to the bit
    if l == 1:  # no state before the only step, so that A has no effect; the kernel's rounding remains
        assert want.pop("A").abs().max() == 0 and got.pop("A").abs().max() < 1e-3
    check(got, want, bound, f"{kernel}, {dtype}, l {l}, g {g}")
    h = scan(**x, return_last_state=True, backend=kernel)[1]
    assert error(h, last_state(x)) <= bound


@gpu
def test_gpu_kernel_under_autocast_and_compile(kernel):
    x, ours = make(b=2, d=64, l=145, n=16, g=4, device="cuda"), functools.partial(scan, backend=kernel)
    want = oracle(x)
    with torch.autocast("cuda", BF16):
        check(run(ours, x), want, KERNEL[FP32][1], f"{kernel} under autocast")
    check(run(torch.compile(ours, fullgraph=True), x), want, KERNEL[FP32][1], f"{kernel}, compiled")


@gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gpu_torch_scan(dtype, cuda):
    x = make(b=2, d=64, l=577, n=16, g=4, dtype=dtype)
    want = run(scan, x, backend="torch")
    got = run(scan, {k: v.cuda() for k, v in x.items()}, backend="torch")
    bound = 1e-5 if dtype == FP32 else 2**-7
    check({k: v.cpu() for k, v in got.items()}, want, bound, "CUDA against CPU")


@gpu
@pytest.mark.parametrize("dtype, bound", [(FP32, 1e-4), (BF16, 5e-2)])
def test_gpu_mixer_with_causal_conv1d(dtype, bound, cuda, monkeypatch):
    have(armamba._conv_kernel() is not None, "no causal-conv1d")
    torch.manual_seed(0)
    mixer, x = Mixer(VARIANTS["micro"], 4).cuda(), torch.randn(2, 197, 64, device="cuda", requires_grad=True)
    leaves, results = [x, *mixer.parameters()], []
    monkeypatch.setattr(armamba, "scan_backend", lambda *_: ("torch", "to compare convolutions only"))
    for conv in (armamba._conv_kernel(), None):
        monkeypatch.setattr(armamba, "_conv_kernel", lambda conv=conv: conv)
        with torch.autocast("cuda", BF16, enabled=dtype == BF16):
            y = mixer(x, (14, 14), 98)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    errors = [error(ours, theirs) for ours, theirs in zip(*results)]
    print(f"causal-conv1d, {dtype}: largest error {max(errors):.1e}")
    assert max(errors) <= bound


@gpu
@pytest.mark.parametrize("directions", [1, 4])
def test_gpu_model_with_kernel(directions, kernel, monkeypatch):
    torch.manual_seed(0)
    model = VisionMamba(ARMConfig(d_model=64, depth=4, image_size=224), 10, directions).cuda()
    images, logits = torch.randn(2, 3, 224, 224, device="cuda"), []
    for name in (kernel, "torch"):
        monkeypatch.setattr(armamba, "scan_backend", lambda *_, name=name: (name, "as told"))
        with torch.no_grad():
            logits.append(model(images))
    print(f"model, {directions} directions: largest error {error(*logits):.1e}")
    assert error(*logits) <= 1e-3
