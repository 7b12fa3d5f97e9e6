"""ARM, autoregressive pretraining of Mamba for images, in one file that needs nothing but PyTorch.

The claim: Mamba reads a sequence in one direction, so it can be pretrained the way language models are, by
predicting what comes next, with no mask and no second pass. For images the unit that works is not the pixel or
the patch but the *cluster*, a square of neighbouring patches: from all clusters so far, predict the next one.

Sources, cited below as [ARM 3.2] and so on:
    [ARM]    Ren et al., "Autoregressive Pretraining with Mamba in Vision", ICLR 2025, arXiv 2406.07537
    [Mamba]  Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752
    [MAE]    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377

Letters in shape comments; sizes are lower case, the matrices of the state space model upper case:
    b   images in the batch             l   tokens in the sequence
    d   channels (d_model = d_inner)    n   state size per channel, `d_state`
    g   scan directions, or groups      p   patch side in pixels, `patch_size`
    s   cluster side in patches         c   colours, `channels`
    A B C D   the state space model's matrices; `A_log` stores log(-A)
    u h y z   input, state, output and gate of the scan; `delta` its step size (dt_ in inherited names)

Read from top to bottom: every part uses only those above it. Not here: data, optimiser and loops (train.py,
finetune.py), text, video, complex states, generation with a cached state, a mixer wider than the model (expand = 1).
"""

import argparse
import functools
import importlib
import logging
import math
import re
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.library import custom_op
from torch.utils.checkpoint import checkpoint

try:  # comes along with PyTorch for NVIDIA GPUs on Linux
    import triton
    import triton.language as tl
except Exception:  # it is not there, or broken
    triton, tl = None, argparse.Namespace(constexpr=None)

ORDERS = ("row", "row-reversed", "column", "random")
BACKENDS = ("auto", "ref", "torch", "triton", "kernel")  # of the selective scan
log = logging.getLogger("armamba")


def _require(ok: bool, message: str) -> None:
    """User mistakes are ValueErrors that name the value, the rule and the fix; internal invariants are asserts."""
    if not ok:
        raise ValueError(message)


# --- Configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ARMConfig:
    """Everything that decides the shape of a model and its objective. The defaults are the paper's base model."""

    image_size: int | tuple[int, int] = 192  # pixels, one number or (height, width); patch_size must divide it
    channels: int = 3  # colours of the image
    patch_size: int = 16  # pixels per side of a patch, the token of the encoder
    cluster_size: int = 4  # patches per side of a cluster, the unit that is predicted [ARM 3.2]
    d_model: int = 768  # width of the encoder
    depth: int = 12  # number of its blocks
    d_state: int = 16  # state size per channel
    d_conv: int = 4  # length of the short causal convolution [Mamba 3.4]
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 4  # number of its blocks
    # the encoder blocks, counted from 1, whose outputs the decoder reads: as many as decoder blocks, the last always
    # `depth`; None: evenly spaced from depth/2 to depth
    taps: tuple[int, ...] | None = None
    order: str = "row"  # of the clusters: "row" (raster), "row-reversed", "column", or "random", fixed by order_seed
    order_seed: int = 0
    norm_pix: bool = True  # predict each patch minus its mean and over its standard deviation [MAE 3]

    grid = property(lambda self: tuple(side // self.patch_size for side in self.image_size))  # rows, columns of patches
    n_clusters = property(lambda self: math.prod(side // self.cluster_size for side in self.grid))
    dt_rank = property(lambda self: math.ceil(self.d_model / 16))
    decoder_heads = property(lambda self: max(1, self.decoder_dim // 64))

    def __post_init__(self):
        size = self.image_size if isinstance(self.image_size, tuple | list) else (self.image_size,) * 2
        _require(len(size) == 2, f"image_size {size} must be one number or (height, width)")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int and f.name != "order_seed"}
        for name, value in {"image_size": size[0], "image_size (width)": size[1], **numbers}.items():
            _require(type(value) is int and value > 0, f"{name} {value!r} must be a positive integer")
        p, depth, blocks, heads = self.patch_size, self.depth, self.decoder_depth, self.decoder_heads
        _require(size[0] % p == size[1] % p == 0, f"image_size {size} is not divisible by patch_size {p}: change one")
        for name in ("d_model", "decoder_dim"):
            _require(numbers[name] % 4 == 0, f"{name} {numbers[name]} must be divisible by 4, for its positions")
        _require(self.decoder_dim % heads == 0, f"decoder_dim {self.decoder_dim} is not divisible by its {heads} heads")
        fits = type(self.order_seed) is int and abs(self.order_seed) < 2**63
        _require(fits, f"order_seed {self.order_seed!r} must be an integer of 64 bits")
        _require(type(self.norm_pix) is bool, f"norm_pix {self.norm_pix!r} must be True or False")
        _require(self.order in ORDERS, f"order {self.order!r} is unknown: choose one of {', '.join(ORDERS)}")
        _require(blocks <= depth, f"decoder_depth {blocks} taps as many of only {depth} encoder blocks: lower it")
        first = min(depth // 2, depth - blocks + 1)
        spaced = [first + i * (depth - first) // (blocks - 1) for i in range(blocks - 1)] + [depth]
        taps = spaced if self.taps is None else self.taps
        rising = isinstance(taps, tuple | list) and {type(tap) for tap in taps} == {int} and [*taps] == sorted({*taps})
        rule = f"{blocks} (decoder_depth) blocks rising from 1 to {depth}; taps=None spaces them"
        _require(rising and len(taps) == blocks and taps[0] >= 1 and taps[-1] == depth, f"taps {taps} must be {rule}")
        vars(self).update(image_size=tuple(size), taps=tuple(taps))  # past the guard of a frozen dataclass


VARIANTS = {
    "micro": ARMConfig(d_model=64, depth=4, decoder_dim=64, decoder_depth=2),  # for a laptop, not from the paper
    "tiny": ARMConfig(d_model=192, decoder_dim=192),  # the usual widths of small ViTs, not from the paper either
    "small": ARMConfig(d_model=384, decoder_dim=256),
    "base": ARMConfig(),
    "large": ARMConfig(d_model=1024, depth=24),
    "huge": ARMConfig(d_model=1536, depth=24),
}


# --- Patches, clusters, positions -------------------------------------------------------------------------------------


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (b, c, height, width) into patches (b, l, p*p*c), both in raster order; pixels as (row, column, c)."""
    _require(images.ndim == 4, f"images are {tuple(images.shape)}: they must be (b, c, height, width)")
    _require(patch_size > 0, f"patch_size {patch_size} must be positive")
    (b, c, height, width), p = images.shape, patch_size
    _require(height % p == width % p == 0, f"image size {(height, width)} is not divisible by patch_size {p}")
    x = images.reshape(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, image_size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (b, l, p*p*c) -> (b, c, height, width)."""
    _require(patches.ndim == 3, f"patches are {tuple(patches.shape)}: they must be (b, l, pixels)")
    (b, l, pixels), p, (height, width) = patches.shape, patch_size, image_size
    fits = p > 0 and height % p == width % p == 0 and l * p * p == height * width and pixels % p**2 == 0
    _require(fits, f"{l} patches of {pixels} values do not make {height}x{width} pixels with patch_size {p}")
    x = patches.reshape(b, height // p, width // p, p, p, pixels // p**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, pixels // p**2, height, width)


def cluster_order(config: ARMConfig) -> Tensor | None:
    """The clusters' raster numbers in the order in which they are read; None for raster order itself."""
    rows, columns = (side // config.cluster_size for side in config.grid)
    if config.order == "random":
        return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(config.order_seed))
    raster = torch.arange(rows * columns)
    orders = {"row": None, "row-reversed": raster.flip(0), "column": raster.view(rows, columns).t().flatten()}
    return orders[config.order]


def to_clusters(x: Tensor, grid: tuple[int, int], cluster_size: int, order: Tensor | None = None) -> Tensor:
    """Regroup tokens (b, l, d) from raster order to cluster after cluster, raster order inside each [ARM 3.2].

    Args: grid, rows and columns of tokens, l = rows * columns; cluster_size, tokens per side of a cluster; order, the
    clusters to take, in turn, by raster number, or None for raster order.
    """
    _require(x.ndim == 3, f"tokens are {tuple(x.shape)}: they must be (b, l, d)")
    (b, l, d), (rows, columns), s = x.shape, grid, cluster_size
    fits = s > 0 and rows % s == columns % s == 0
    _require(fits, f"{rows}x{columns} patches do not divide into clusters of {s}x{s}: change one of the sizes")
    _require(l == rows * columns, f"{l} tokens do not fill the grid of {rows}x{columns} patches")
    x = x.reshape(b, rows // s, s, columns // s, s, d).transpose(2, 3)  # (b, rows / s, columns / s, s, s, d)
    x = x.flatten(3, 4).flatten(1, 2)  # (b, n_clusters, s*s, d)
    return (x if order is None else x[:, order]).flatten(1, 2)


def from_clusters(x: Tensor, grid: tuple[int, int], cluster_size: int, order: Tensor | None = None) -> Tensor:
    """Inverse of `to_clusters`, with the same arguments."""
    raster = torch.arange(x.shape[1], device=x.device)[None, :, None]  # (1, l, 1)
    return x[:, to_clusters(raster, grid, cluster_size, order).flatten().argsort()]


def sincos_positions(d: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, (1, l, d) in raster order, as in [MAE].

    The first half of the channels encodes the column, the second half the row. Each half is [sin | cos] of the
    coordinate times the frequencies 10000^(-i / (d/4)), i = 0 .. d/4 - 1.
    """
    _require(d % 4 == 0, f"{d} channels must be divisible by 4")
    rows, columns = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid)).unbind(1)  # (l,)
    frequencies = 10000.0 ** (-torch.arange(d // 4, dtype=torch.float64) / (d // 4))
    angles = [torch.outer(x, frequencies) for x in (columns, rows)]  # (l, d/4) each
    embedding = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return embedding[None].to(torch.get_default_dtype())


def resize_positions(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding (1, l, d) from one grid to another, bicubic, corners not aligned."""
    if old == new:
        return pos
    x = pos.unflatten(1, old).permute(0, 3, 1, 2)  # (1, d, rows, columns)
    x = F.interpolate(x, size=new, mode="bicubic", align_corners=False, antialias=False)
    return x.permute(0, 2, 3, 1).flatten(1, 2)


# --- Selective scan ---------------------------------------------------------------------------------------------------


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """The selective scan as a loop over time: the one to read first, and the oracle that the tests trust.

    Each channel keeps a state h of n numbers. How fast it decays and how it is written and read all depend on the
    input, which is what "selective" means [Mamba 3.2]:

        delta_t <- softplus(delta_t + delta_bias)                (if delta_bias is given; if delta_softplus)
        h_t      = exp(delta_t A) h_{t-1} + delta_t B_t u_t      h_0 = 0
        y_t      = C_t . h_t + D u_t                             (then y_t * silu(z_t), if there is a gate z)

    Args, Returns, Raises: as `selective_scan`.
    """
    B, C, dtype = _check_scan(u, delta, A, B, C, D, z, delta_bias)
    delta = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))  # (b, d, n, l): groups share theirs

    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=dtype, device=u.device), []
    # `unbind`, not u[:, :, t]: the gradient of each such index is a zero-filled copy of the whole sequence
    for u_t, delta_t, B_t, C_t in zip(u.unbind(2), delta.unbind(2), B.unbind(3), C.unbind(3)):
        decay = torch.exp(delta_t[..., None] * A)  # (b, d, n)
        h = decay * h + (delta_t * u_t)[..., None] * B_t  # (b, d, n)
        ys.append((h * C_t).sum(-1))  # (b, d)
    y = torch.stack(ys, dim=2)  # (b, d, l)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z.to(dtype))
    return (y.to(u.dtype), h.detach()) if return_last_state else y.to(u.dtype)


def _check_scan(u, delta, A, B, C, D, z, delta_bias) -> tuple[Tensor, Tensor, torch.dtype]:
    """The same rules on every backend (the kernel misses d % g). Returns B, C (b, g, n, l) and the state's dtype."""
    _require(u.ndim == 3 and u.shape[2] > 0, f"u has shape {tuple(u.shape)}: it must be (b, d, l) with l >= 1")
    _require(A.ndim == 2, f"A has shape {tuple(A.shape)}: it must be (d, n)")
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    (b, d, l), n, g = u.shape, A.shape[1], B.shape[1] if B.ndim == 4 else 1
    _require(g > 0 and d % g == 0, f"{d} channels do not divide into {g} groups: d % g must be 0")
    names, tensors = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"), (u, delta, A, B, C, D, z, delta_bias)
    shapes = (b, d, l), (b, d, l), (d, n), (b, g, n, l), (b, g, n, l), (d,), (b, d, l), (d,)
    for name, shape, x in zip(names, shapes, tensors):
        if x is not None:
            _require(x.shape == shape, f"{name} has shape {tuple(x.shape)}: to fit u {(b, d, l)}, make it {shape}")
            _require(x.is_floating_point(), f"{name} has dtype {x.dtype}: it must be real floating point")
            _require(x.device == u.device, f"{name} is on {x.device}, u on {u.device}: move it there")
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (u, delta, A, B, C)), torch.float32)
    return B, C, dtype  # the state is fp32 or wider


# The fast scan. Time comes first and channels last, in views (l, b, g, n, k) with k = d / g channels per group, and the
# sequence is processed in chunks whose (b, g, n, k) states fit the cache. What can be done for a whole chunk is one
# operation (exp2; C @ h as a row vector times a matrix); the recurrence itself is two in-place operations per step. The
# backward pass keeps one state per chunk and recomputes the others: the (b, d, l, n) tensor of all states, n times the
# size of the input, never exists. exp2(x log2(e)) stands for exp(x) because it is faster on CPUs.

# Scalar code, such as the log1p inside F.softplus, is many times slower while the upper halves of the AVX registers
# are marked as used, as they are after importing torch on an AVX-512 machine; a vectorised atanh happens to clear them.
torch.atanh(torch.zeros(1 << 18))


def _chunk_length(u: Tensor, n: int) -> int:
    b, d, l = u.shape
    states, most = (800_000, 32) if u.device.type == "cpu" else (64_000_000, 256)  # the optimum is flat
    return min(max(states // max(1, b * d * n), 4), most, l)


def _time_first(x: Tensor, g: int) -> Tensor:
    """(b, d, l) -> (l, b, g, 1, k), or (b, g, n, l) -> (l, b, g, 1, n). A view of what is (b, l, ...) in memory."""
    x = x.movedim(-1, 0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.unflatten(2, (g, 1, -1)) if x.ndim == 3 else x.unsqueeze(3)


def _scan_layout(u, delta, A, B, C, D, bias):
    """A scan's arguments time first, B and C in the state's dtype, which is A's; also A log2(e), for use with exp2."""
    g = B.shape[1]
    u, delta, B, C = (_time_first(x, g) for x in (u, delta, B, C))  # (l, b, g, 1, k | k | n | n)
    B, C = (x.contiguous().to(A.dtype) for x in (B, C))
    A = A.unflatten(0, (g, -1)).mT.contiguous()  # (g, n, k)
    D, bias = (x.unflatten(0, (g, 1, -1)) for x in (D, bias))  # (g, 1, k)
    return u, delta, A, A * math.log2(math.e), B, C, D, bias


# The same for GPUs, in Triton. A program walks through one image with the states of a few channels in registers. It
# keeps the state before every _STEPS steps; going back it recomputes the others, in two halves. Sums over images and
# channels are left to PyTorch, in a fixed order, so that results repeat to the bit. In memory sequences are (b, l, d)
# or (b, l, g, n), states (b, n, d). The grid is (blocks of K of the k = d / g channels, b, g); A comes times log2(e).
_STATES, _STEPS, _jit = 512, 8, triton.jit if triton else lambda function: function


@_jit
def _triton_load(A, D, bias, k, n: tl.constexpr, K: tl.constexpr):
    """A (n, K), D and bias of this program's channels; where the channels and their states are, and which exist."""
    i, j, d = tl.arange(0, n)[:, None], tl.program_id(0) * K + tl.arange(0, K), tl.num_programs(2) * k
    channel, there = tl.program_id(2) * k + j, j < k
    state, all_there = i * d + channel[None, :], (0 * i + j[None, :]) < k
    A, D = tl.load(A + state, all_there, 0.0), tl.load(D + channel, there, 0.0)
    bias = tl.load(bias + channel, there, 0.0)
    return A, D, bias, tl.program_id(1) * d + channel, there, tl.program_id(1).to(tl.int64) * n * d + state, all_there


@_jit
def _triton_step(u, delta, B, C, bias, t, l, k, softplus: tl.constexpr, n: tl.constexpr, K: tl.constexpr):
    """Of step t: where its channels and states are, and which exist; u, delta + bias, the step size, B and C, or 0."""
    i, j = tl.arange(0, n), tl.program_id(0) * K + tl.arange(0, K)
    token = (tl.program_id(1).to(tl.int64) * l + t) * tl.num_programs(2) + tl.program_id(2)
    at, row, inside, rows = token * k + j, token * n + i, (j < k) & (0 * j + t < l), 0 * i + t < l
    u_t, raw = tl.load(u + at, inside, 0.0).to(tl.float32), tl.load(delta + at, inside, 0.0).to(tl.float32) + bias
    delta_t = raw
    if softplus:  # log(1 + e), for small e by its series
        e = tl.exp(raw)
        series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e / 5))))
        delta_t = tl.where(raw > 20, raw, tl.where(e < 0.03, series, tl.log(1 + e)))
    B_t, C_t = tl.load(B + row, rows, 0.0).to(tl.float32), tl.load(C + row, rows, 0.0).to(tl.float32)
    return at, row, inside, rows, u_t, raw, tl.where(inside, delta_t, 0.0), B_t[:, None], C_t[:, None]


@_jit
def _triton_walk(h, u, delta, A, B, C, bias, t, l, k, softplus: tl.constexpr, n: tl.constexpr, K: tl.constexpr):
    """The state after step t, from the one before; then as _triton_step."""
    at, row, inside, rows, u_t, raw, delta_t, B_t, C_t = _triton_step(u, delta, B, C, bias, t, l, k, softplus, n, K)
    return tl.exp2(delta_t[None, :] * A) * h + (delta_t * u_t)[None, :] * B_t, at, inside, u_t, C_t


# fmt: off
@_jit
def _triton_forward(u, delta, A, B, C, D, bias, y, last, entries, l, k, softplus: tl.constexpr, save: tl.constexpr,
                    n: tl.constexpr, K: tl.constexpr, steps: tl.constexpr):
    A, D, bias, channel, there, state, all_there = _triton_load(A, D, bias, k, n, K)
    h, images = tl.zeros((n, K), tl.float32), tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * k * n
    for start in range(0, l, steps):
        if save:
            tl.store(entries + start // steps * images + state, h, all_there)
        for s in tl.static_range(steps):
            h, at, inside, u_t, C_t = _triton_walk(h, u, delta, A, B, C, bias, start + s, l, k, softplus, n, K)
            tl.store(y + at, tl.sum(h * C_t, 0) + D * u_t, inside)
    tl.store(last + state, h, all_there)


@_jit
def _triton_backward(grad, entries, u, delta, A, B, C, D, bias, du, ddelta, dA, dB, dC, dD, dbias, l, k,
                     softplus: tl.constexpr, n: tl.constexpr, K: tl.constexpr, half: tl.constexpr):
    A, D, bias, channel, there, state, all_there = _triton_load(A, D, bias, k, n, K)
    carry, sum_A, sum_D = tl.zeros((n, K), tl.float32), tl.zeros((n, K), tl.float32), tl.zeros((K,), tl.float32)
    sum_bias, images = tl.zeros((K,), tl.float32), tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * n
    for start in range((l - 1) // half * half, -1, -half):
        h = tl.load(entries + start // (2 * half) * images * k + state, all_there, 0.0)
        if start // half % 2 == 1:
            for s in tl.static_range(half):
                h, _, _, _, _ = _triton_walk(h, u, delta, A, B, C, bias, start - half + s, l, k, softplus, n, K)
        hs = (h,)
        for s in tl.static_range(half - 1):
            h, _, _, _, _ = _triton_walk(h, u, delta, A, B, C, bias, start + s, l, k, softplus, n, K)
            hs = hs + (h,)
        for s in tl.static_range(half - 1, -1, -1):
            at, row, inside, rows, u_t, raw, delta_t, B_t, C_t = _triton_step(
                u, delta, B, C, bias, start + s, l, k, softplus, n, K)
            grad_t, x_t = tl.load(grad + at, inside, 0.0).to(tl.float32), (delta_t * u_t)[None, :]
            decay, G = tl.exp2(delta_t[None, :] * A), C_t * grad_t[None, :] + carry
            before = decay * hs[s]
            W, carry = before * G, decay * G
            row += tl.program_id(0) * images * l  # each block of channels has its own part of dB and dC
            tl.store(dB + row, tl.sum(G * x_t, 1), rows)
            tl.store(dC + row, tl.sum((before + x_t * B_t) * grad_t[None, :], 1), rows)
            dx = tl.sum(G * B_t, 0)
            tl.store(du + at, dx * delta_t + D * grad_t, inside)
            dx = tl.sum(W * A, 0) * 0.6931471805599453 + dx * u_t  # of the step size; log(2) for A's log2(e)
            dx = dx * tl.sigmoid(raw) if softplus else dx
            tl.store(ddelta + at, dx, inside)
            sum_A += W * delta_t[None, :]
            sum_D += grad_t * u_t
            sum_bias += tl.where(inside, dx, 0.0)
    tl.store(dA + state, sum_A, all_there)
    tl.store(dD + channel, sum_D, there)
    tl.store(dbias + channel, sum_bias, there)
# fmt: on


def _scan_outputs(u, A, B, backend, save):
    """Memory for y, (b, d, l), a view of (b, l, d), and for the states before each chunk if `save`."""
    (b, d, l), (g, n) = u.shape, B.shape[1:3]
    chunks = -(-l // (_STEPS if backend == "triton" else _chunk_length(u, n))) if save else 0
    return u.new_empty(b, l, d).mT, A.new_empty(chunks, b, g, n, d // g)


def _triton_setup(u, delta, A, B, C):
    """Inputs as they are to be in memory; the grid; l, k and, by name, n and K."""
    (b, d, l), (g, n), K = u.shape, B.shape[1:3], _STATES // A.shape[1]
    u, delta, B, C = (x.movedim(-1, 1).contiguous() for x in (u, delta, B, C))
    A = (A.mT * math.log2(math.e)).contiguous()  # (n, d)
    return (u, delta, A, B, C), (triton.cdiv(d // g, K), b, g), (l, d // g), dict(n=n, K=K, num_warps=1)


def _triton_scan(u, delta, A, B, C, D, bias, softplus, save):
    inputs, grid, sizes, more = _triton_setup(u, delta, A, B, C)
    (y, entries), h = _scan_outputs(u, A, B, "triton", save), A.new_empty(len(u), *inputs[2].shape)
    with torch.cuda.device_of(u):  # there may be several
        _triton_forward[grid](*inputs, D, bias, y, h, entries, *sizes, softplus, save, **more, steps=_STEPS)
    return y, h.mT.contiguous(), entries


def _triton_scan_backward(grad, entries, u, delta, A, B, C, D, bias, softplus):
    inputs, grid, sizes, more = _triton_setup(u, delta, A, B, C)
    du, ddelta, (dB, dC) = *map(torch.empty_like, inputs[:2]), A.new_empty(2, grid[0], *inputs[3].shape)
    dA, dD, dbias = (A.new_empty(len(u), *x.shape) for x in (inputs[2], D, bias))
    outputs = du, ddelta, dA, dB, dC, dD, dbias
    grad = grad.mT.contiguous()
    with torch.cuda.device_of(u):
        _triton_backward[grid](grad, entries, *inputs, D, bias, *outputs, *sizes, softplus, **more, half=_STEPS // 2)
    dB, dC = (dx.sum(0).to(x.dtype).movedim(1, -1) for dx, x in ((dB, B), (dC, C)))
    return [du.mT, ddelta.mT, dA.sum(0).mT.contiguous(), dB, dC, dD.sum(0), dbias.sum(0)]


# Registered operators, so that torch.compile sees one node and not a loop. "kernel" is mamba-ssm's; only its extension
# module is used, since importing the mamba_ssm package brings in unrelated models and what they depend on.
_ARGS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor bias, bool softplus, str backend"


@custom_op("armamba::fast_scan", mutates_args=(), schema=f"({_ARGS}, bool save) -> (Tensor, Tensor, Tensor)")
def _scan(u, delta, A, B, C, D, bias, softplus, backend, save):
    """Returns y (b, d, l); h_l (b, d, n); what the backward pass needs, here the state before each chunk if `save`."""
    if backend == "kernel":
        y, x = importlib.import_module("selective_scan_cuda").fwd(u, delta, A, B, C, D, None, bias, softplus)  # no gate
        return y, x[:, :, -1, 1::2].contiguous(), x  # x: (b, d, chunks of 2,048 steps, 2n)
    if backend == "triton":
        return _triton_scan(u, delta, A, B, C, D, bias, softplus, save)
    y, entries = _scan_outputs(u, A, B, backend, save)
    (b, d, _), (g, n), steps = u.shape, B.shape[1:3], _chunk_length(u, A.shape[1])
    with torch.autocast(u.device.type, enabled=False):
        u, delta, A, A_log2e, B, C, D, bias = _scan_layout(u, delta, A, B, C, D, bias)
        buffer, h = A.new_empty(steps, b, g, n, d // g), A.new_zeros(b, g, n, d // g)
        sequences = u, delta, B, C, _time_first(y, g)
        for i, (u_i, delta_i, B_i, C_i, y_i) in enumerate(zip(*(x.split(steps) for x in sequences))):
            h = entries[i].copy_(h) if save else h.clone()  # out of the buffer, which is about to be overwritten
            u_i, delta_i = u_i.to(A.dtype), delta_i + bias
            delta_i = F.softplus(delta_i) if softplus else delta_i
            h_i = torch.mul(delta_i, A_log2e, out=buffer[: len(u_i)]).exp2_()  # decays; the loop makes them states
            for h_t, x_t, B_t in zip(h_i.unbind(), (delta_i * u_i).unbind(), B_i.mT.unbind()):
                h = h_t.mul_(h).addcmul_(x_t, B_t)
            torch.addcmul(C_i @ h_i, D, u_i, out=y_i)
    return y, h.mT.reshape(b, d, n).contiguous(), entries


@custom_op("armamba::fast_scan_backward", mutates_args=(), schema=f"(Tensor grad, Tensor saved, {_ARGS}) -> Tensor[]")
def _scan_backward(grad, saved, u, delta, A, B, C, D, bias, softplus, backend):
    """Gradients of u, delta, A, B, C, D and bias. From the last step to the first, with G_t = dL/dh_t:

    G_t = C_t dL/dy_t + exp(delta_{t+1} A) G_{t+1}
    W_t = dL/d(delta_t A) = exp(delta_t A) G_t h_{t-1}      dL/d(delta_t u_t) = B_t . G_t
    """
    if backend == "triton":
        return _triton_scan_backward(grad, saved, u, delta, A, B, C, D, bias, softplus)
    if backend == "kernel":
        # no gate, so neither the output nor a place for its gradient
        inputs = u, delta, A, B, C, D, None, bias, grad, saved, None, None, softplus, False
        return list(importlib.import_module("selective_scan_cuda").bwd(*inputs)[:7])
    (b, d, _), (g, n), steps = u.shape, B.shape[1:3], _chunk_length(u, A.shape[1])
    du, ddelta, dB, dC = (x.new_empty(x.movedim(-1, 1).shape).movedim(1, -1) for x in (u, delta, B, C))
    with torch.autocast(u.device.type, enabled=False):
        u, delta, A, A_log2e, B, C, D, bias = _scan_layout(u, delta, A, B, C, D, bias)
        dA, carry = (A.new_zeros(b, g, n, d // g) for _ in range(2))  # carry: exp(delta_{t+1} A) G_{t+1}
        dD, dbias = torch.zeros_like(D), torch.zeros_like(D)
        buffers = [A.new_empty(m, b, g, n, d // g) for m in (steps, steps, steps + 1)]
        decays, Gs, hs = (x.unbind() for x in buffers)
        sequences = u, delta, B, C, *(_time_first(x, g) for x in (grad, du, ddelta, dB, dC))
        for chunk in reversed(list(zip(saved, *(x.split(steps) for x in sequences), strict=True))):
            entry, u_i, delta_i, B_i, C_i, grad_i, du_i, ddelta_i, dB_i, dC_i = chunk
            u_i, grad_i, raw_i = u_i.to(A.dtype), grad_i.to(A.dtype), delta_i + bias
            delta_i = F.softplus(raw_i) if softplus else raw_i
            x_i, m = delta_i * u_i, len(u_i)
            decay, G, h = buffers[0][:m], buffers[1][:m], buffers[2][: m + 1]  # h_0 is the state before the chunk
            torch.mul(delta_i, A_log2e, out=decay).exp2_()
            hs[0].copy_(entry)
            for t, (x_t, B_t) in enumerate(zip(x_i.unbind(), B_i.mT.unbind())):
                torch.mul(decays[t], hs[t], out=hs[t + 1]).addcmul_(x_t, B_t)
            for t, grad_t, C_t in zip(reversed(range(m)), reversed(grad_i.unbind()), reversed(C_i.mT.unbind())):
                torch.addcmul(carry, grad_t, C_t, out=Gs[t])
                carry = decays[t].mul_(Gs[t])
            carry = carry.clone()  # W overwrites it
            W = decay.mul_(h[:m])  # `decay` holds exp(delta A) G by now
            for W_t, delta_t in zip(W.unbind(), delta_i.unbind()):
                dA.addcmul_(W_t, delta_t)
            dx = B_i @ G  # (m, b, g, 1, k)
            dB_i.copy_(x_i @ G.mT)
            dC_i.copy_(grad_i @ h[1:].mT)
            dD += (grad_i * u_i).sum((0, 1))
            torch.addcmul(delta_i * dx, D, grad_i, out=du_i)
            dx = W.mul_(A).sum(-2, keepdim=True).addcmul_(u_i, dx)  # of delta, softplus included
            dx = dx.mul_(raw_i.sigmoid()) if softplus else dx
            dbias += dx.sum((0, 1))
            ddelta_i.copy_(dx)
    return [du, ddelta, dA.sum(0).mT.reshape(d, n).contiguous(), dB, dC, dD.flatten(), dbias.flatten()]


@_scan.register_fake  # shapes and layouts of the outputs, for torch.compile
def _(u, delta, A, B, C, D, bias, softplus, backend, save):
    (b, d, l), n = u.shape, A.shape[1]
    y, saved = _scan_outputs(u, A, B, backend, save)
    if backend == "kernel":
        y, saved = torch.empty_like(u), A.new_empty(b, d, -(-l // 2048), 2 * n)
    return y, A.new_empty(b, d, n), saved


@_scan_backward.register_fake
def _(grad, saved, u, delta, A, B, C, D, bias, softplus, backend):
    if backend == "kernel":
        return [torch.empty_like(x) for x in (u, delta, A, B, C, D, bias)]
    du, ddelta, dB, dC = (x.new_empty(x.movedim(-1, 1).shape).movedim(1, -1) for x in (u, delta, B, C))
    return [du, ddelta, torch.empty_like(A), dB, dC, torch.empty_like(D), torch.empty_like(bias)]


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)  # none come for h_l and the states
    ctx.save_for_backward(output[2], *tensors)


def _scan_grad(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    grad = grad.contiguous() if ctx.backend == "kernel" else grad  # out here, where torch.compile can fuse it
    return *_scan_backward(grad, *ctx.saved_tensors, ctx.softplus, ctx.backend), None, None, None


_scan.register_autograd(_scan_grad, setup_context=_scan_setup)


@functools.cache
def _probe(device_type: str, among: tuple[str, ...]) -> tuple[str, str]:
    limits = "at most 32 bits, and n a power of two up to 64 (triton) or n up to 256 (kernel)"
    needs = f"the kernels take {limits}" if device_type == "cuda" else "the kernels run on CUDA GPUs only"
    reasons = [] if among else [needs]
    for name in among:
        try:  # some builds import, and fail only when called: so, a tiny real call, there and back
            shapes = (1, 2, 9), (2, 4), (1, 1, 4, 9), (2,)
            u, A, B, D = (torch.ones(*shape, device="cuda").float() for shape in shapes)
            inputs, results = (u, u, -A, B, B, D, D, True), []
            for backend in (name, "torch"):  # without autograd, which checkpointing would interfere with
                y, _, saved = _scan(*inputs, backend, True)
                results.append([y, *_scan_backward(torch.ones_like(y), saved, *inputs, backend)])
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
            reasons.append(f"{name} works and gives the right numbers")
            break
        except Exception as error:  # whatever a foreign extension may raise
            reasons.append(f"no {name} ({type(error).__name__}: {error})".splitlines()[0])
    else:
        name = "torch"
    level = logging.WARNING if among and name == "torch" else logging.INFO
    log.log(level, "selective scan on %s: backend %r, %s", device_type, name, "; ".join(reasons))
    return name, "; ".join(reasons)


def _probed(*case) -> tuple[str, str]:
    return _probe(*case)


_probed._dynamo_marked_constant = True  # as assume_constant_result does, which would import torch.compile's compiler


def scan_backend(device_type: str, n: int = 16, dtype=torch.float32, backend: str = "auto") -> tuple[str, str]:
    """What `selective_scan` uses on "cuda", "cpu", ... for states (d, n) of this type, and why: the backend asked for,
    or for "auto" the first of triton and kernel, if it can do this and works; else "torch"."""
    able = dict(triton=n in (1, 2, 4, 8, 16, 32, 64), kernel=n <= 256)
    among = tuple([name for name, fits in able.items() if fits and backend in ("auto", name)])
    return _probed(device_type, among if device_type == "cuda" and dtype == torch.float32 else ())


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, backend="auto"
):
    """The formula of `selective_scan_ref` [Mamba 3.2], fast. Stands in for mamba-ssm's `selective_scan_fn`.

    Args:
        u, delta: input and step sizes, (b, d, l). Transposed views of (b, l, d) tensors are fine; "kernel" copies them.
        A: (d, n), negative: decay rates per unit of delta.
        B, C: how the state is written and read, (b, n, l), or (b, g, n, l) if channel i reads group i // (d / g).
        D, delta_bias: (d,) or None. z: gate (b, d, l) or None. delta_softplus: see the formula.
        return_last_state: also return h_l, (b, d, n); no gradient passes through it, as in the kernel.
        backend: "ref" the loop, "torch" the fast scan; for GPUs "triton", ours, and "kernel", mamba-ssm's, which take
            CUDA tensors of at most 32 bits with n a power of two up to 64, or n <= 256. "auto": triton, kernel or
            torch, the first that works and can do this call; ref for forward-mode derivatives. Tensors may be fp64,
            fp32, bf16 or fp16, also mixed; the state is fp32 or wider, under autocast too.

    Returns: y (b, d, l) in u's dtype, or (y, h_l). First derivatives in reverse mode; backend "ref" has the others too.
    Raises: ValueError on shapes, types or devices that do not fit; RuntimeError if a GPU backend cannot be had.
    """
    _require(backend in BACKENDS, f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    tensors = [x for x in (u, delta, A, B, C, D, z, delta_bias) if x is not None]
    dual = any(unpack_dual(x).tangent is not None for x in tensors)  # which the operators would drop in silence
    if backend == "ref" or backend == "auto" and dual:
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    _require(not dual, f"backend {backend!r} has no forward-mode derivatives: take 'ref' or 'auto'")
    B, C, dtype = _check_scan(u, delta, A, B, C, D, z, delta_bias)
    name, why = ("torch", "") if backend == "torch" else scan_backend(u.device.type, A.shape[1], dtype, backend)
    if backend not in ("auto", name):
        raise RuntimeError(f"backend={backend!r} cannot be used: {why}. backend='auto' takes what there is")

    D, bias = (A.new_zeros(len(A)) if x is None else x for x in (D, delta_bias))
    A, D, bias = (x.to(dtype).contiguous() for x in (A, D, bias))  # the operators take the state's dtype from A
    y_dtype = u.dtype
    if name == "kernel":
        widest = functools.reduce(torch.promote_types, (x.dtype for x in (u, delta, B, C)))
        u, delta, B, C = (x.to(widest).contiguous() for x in (u, delta, B, C))
    inputs = u, delta, A, B, C, D, bias
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, h, _ = _scan(*inputs, delta_softplus, name, save)
    y = (y if z is None else y * F.silu(z)).to(y_dtype)
    return (y, h.detach()) if return_last_state else y


# --- Mixer and block --------------------------------------------------------------------------------------------------


@functools.cache
def _conv_kernel():
    """The causal-conv1d package's function, or None if it is not there or does not work."""
    try:
        conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
        conv(torch.zeros(1, 8, 4, device="cuda"), torch.zeros(8, 4, device="cuda"), activation="silu")
        return conv
    except Exception:  # whatever a foreign extension may raise
        return None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(bias + sum_j weight_j x_{t-k+1+j}), each channel by itself, zeros before the start [Mamba 3.4].

    Args: x (b, l, d); weight (d, 1, k); bias (d,). Returns: (b, l, d) in x's dtype.
    """
    l, k = x.shape[1], weight.shape[2]
    fits = x.is_cuda and 2 <= k <= 4 and x.shape[2] % 8 == 0 and x.dtype != torch.float64
    if fits and not torch.compiler.is_compiling() and _conv_kernel():  # the compiler fuses what is below
        return _conv_kernel()(x.mT, weight[:, 0].to(x.dtype), bias.to(x.dtype), activation="silu").mT
    # k shifted multiply-adds: on a CPU faster than F.conv1d, and no transposition
    padded, y = F.pad(x, (0, 0, k - 1, 0)).to(weight.dtype), bias
    for j in range(k):
        y = torch.addcmul(y, padded[:, j : j + l], weight[:, 0, j])
    return F.silu(y).to(x.dtype)


def transpose_grid(x: Tensor, grid: tuple[int, int], cls_index: int | None) -> Tensor:
    """Tokens (b, l, ...) from row-major to column-major order; a class token keeps its place in the sequence."""
    if cls_index is None:
        return x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    before, cls, after = x.tensor_split((cls_index, cls_index + 1), dim=1)
    return _insert(transpose_grid(torch.cat([before, after], dim=1), grid, None), cls, cls_index)


def _insert(x: Tensor, token: Tensor, index: int) -> Tensor:
    """Put a token (b, 1, ...) into a sequence (b, l, ...) before position `index`."""
    return torch.cat([x[:, :index], token, x[:, index:]], dim=1)


def to_directions(x: Tensor, grid: tuple[int, int], cls_index: int | None) -> Tensor:
    """(b, l, d) -> (b, l, 4, d): the tokens by rows, rows reversed, columns, columns reversed [ARM 3.3]."""
    columns = transpose_grid(x, grid, cls_index)
    return torch.stack([x, x.flip(1), columns, columns.flip(1)], dim=2)


def from_directions(y: Tensor, grid: tuple[int, int], cls_index: int | None) -> Tensor:
    """(b, l, 4, d) -> (b, l, d): each direction put back in row-major order, then the mean of the four."""
    rows, rows_reversed, columns, columns_reversed = y.unbind(2)
    columns = transpose_grid(columns + columns_reversed.flip(1), grid[::-1], cls_index)
    return (rows + rows_reversed.flip(1) + columns) / 4


def linear(in_features: int, out_features: int) -> nn.Linear:
    """nn.Linear with a bias that starts at zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.bias)
    return layer


class Mixer(nn.Module):
    """Mamba's token mixer with 1 or 4 scan directions, all in one scan call [Mamba 3.4], [ARM 3.3].

    x, z = in_proj(x); in each direction x = silu(conv(x)); dt, B, C = x_proj(x); delta = softplus(dt_proj(dt));
    y = scan(x, delta, A, B, C) + D x; then out_proj(mean over directions of y * silu(z)).

    in_proj, z and out_proj are shared; conv1d, x_proj, dt_proj, A and D belong to a direction each: their parameters
    hold one direction after the other along the first axis.
    """

    def __init__(self, config: ARMConfig, directions: int):
        super().__init__()
        d, n, g, r = config.d_model, config.d_state, directions, config.dt_rank
        self.directions, self.split = directions, (r, n, n)
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(g * d, g * d, config.d_conv, groups=g * d)  # holds the weights, see causal_conv
        self.x_proj = nn.Linear(d, g * (r + 2 * n), bias=False)
        self.dt_proj = nn.Linear(r, g * d)
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(g * d, 1))  # (g*d, n)
        self.D = nn.Parameter(torch.ones(g * d))
        self.out_proj = nn.Linear(d, d, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.depth)
            # with the bias softplus^-1(delta), steps start log-uniform in [0.001, 0.1]; the released code starts three
            # of its four directions at 0.69 when it trains from scratch
            delta = torch.empty(g * d).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, cls_index: int | None = None) -> Tensor:
        """(b, l, d) -> (b, l, d). Four directions need the grid of tokens, and the place of a class token if any."""
        d, g = x.shape[2], self.directions
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d) each
        x = to_directions(x, grid, cls_index) if g == 4 else x[:, :, None]  # (b, l, g, d)
        x = causal_conv(x.flatten(2), self.conv1d.weight, self.conv1d.bias)  # (b, l, g*d)
        x_proj, dt_proj = (layer.weight.unflatten(0, (g, -1)) for layer in (self.x_proj, self.dt_proj))  # (g, out, in)
        x_dbc = torch.einsum("blgi,goi->blgo", x.unflatten(2, (g, d)), x_proj)
        dt, B, C = x_dbc.split(self.split, dim=-1)  # (b, l, g, dt_rank | n | n)
        delta = torch.einsum("blgi,goi->blgo", dt, dt_proj).flatten(2).mT  # (b, g*d, l)
        A, B, C = -torch.exp(self.A_log), B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1)  # (g*d, n), (b, g, n, l) twice
        y = selective_scan(x.mT, delta, A, B, C, D=self.D, delta_bias=self.dt_proj.bias, delta_softplus=True)
        y = y.mT.unflatten(2, (g, d))  # (b, l, g, d)
        y = from_directions(y, grid, cls_index) if g == 4 else y[:, :, 0]  # (b, l, d)
        return self.out_proj(y * F.silu(z))  # a token's gate is the same in every direction, so it can follow the mean


class SwiGLU(nn.Module):
    """w3(silu(w1(x)) * w2(x)), with 8/3 of the width inside."""

    def __init__(self, d: int):
        super().__init__()
        hidden = d * 4 * 2 // 3
        self.w1, self.w2, self.w3 = linear(d, hidden), linear(d, hidden), linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """x + mixer(LN(x)), then x + SwiGLU(LN(x)); (b, l, d) -> (b, l, d).

    Stochastic depth in training: a branch is dropped for whole samples at rate `drop_path`, and scaled up otherwise.
    """

    def __init__(self, config: ARMConfig, directions: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(config.d_model), Mixer(config, directions)
        self.norm2, self.mlp = nn.LayerNorm(config.d_model), SwiGLU(config.d_model)
        self.drop_path = drop_path

    def _drop(self, x: Tensor) -> Tensor:
        # dropout1d drops whole channels of what it takes for (channels, length)
        return F.dropout1d(x.flatten(1), self.drop_path, self.training).view_as(x)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, cls_index: int | None = None) -> Tensor:
        x = x + self._drop(self.mixer(self.norm1(x), grid, cls_index))
        return x + self._drop(self.mlp(self.norm2(x)))


# --- The encoder of both stages ---------------------------------------------------------------------------------------

DIRECTIONAL = re.compile(r"mixer\.(conv1d|x_proj|dt_proj|A(?=_log)|D)")  # parameters that belong to a direction each


class VisionMamba(nn.Module):
    """Patches, positions, blocks: a classifier, or with num_classes=None the bare backbone that ARM pretrains.

    The classifier adds a class token (in the middle of four directions; last with one, where it has seen everything),
    learned positions, a final norm and a head [ARM 3.3]. The backbone has fixed sine-cosine positions instead.

    Args:
        config: the shapes; its decoder and clusters are not used here, so any grid of patches will do.
        num_classes: outputs of the head, or None. directions: 1 or 4 scans per block.
        pool: "mean", of the mean before and the mean after the class token, or "cls", the class token.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
    """

    def __init__(self, config: ARMConfig, num_classes: int | None = 1000, directions=4, pool="mean", drop_path=0.0):
        super().__init__()
        _require(type(directions) is int and directions in (1, 4), f"directions {directions!r} must be 1 or 4")
        _require(pool in ("mean", "cls"), f"pool {pool!r} must be 'mean' or 'cls'")
        fits = num_classes is None or type(num_classes) is int and num_classes > 0
        _require(fits, f"num_classes {num_classes} must be a positive integer, or None")
        _require(num_classes is not None or pool == "mean", "pool 'cls' needs a class token: give num_classes")
        _require(0 <= drop_path < 1, f"drop_path {drop_path} must be in [0, 1)")
        self.config, self.num_classes, self.directions, self.pool = config, num_classes, directions, pool
        self.grad_checkpoint = False  # set to True to recompute each block in the backward pass
        d, p, l = config.d_model, config.patch_size, math.prod(config.grid)

        self.patch_embed = nn.Conv2d(config.channels, d, p, stride=p)
        rates = (drop_path * i / max(1, config.depth - 1) for i in range(config.depth))
        self.layers = nn.ModuleList(Block(config, directions, rate) for rate in rates)
        nn.init.normal_(self.patch_embed.weight, std=(config.channels * p * p) ** -0.5)  # LeCun
        nn.init.zeros_(self.patch_embed.bias)
        if num_classes is None:
            self.cls_index = None
            self.register_buffer("pos_embed", sincos_positions(d, config.grid))  # (1, l, d)
        else:
            self.cls_index = l // 2 if directions == 4 else l
            self.cls_token = nn.Parameter(torch.empty(1, 1, d).normal_(std=0.02))
            self.pos_embed = nn.Parameter(torch.empty(1, l + 1, d).normal_(std=0.02))
            self.norm_f, self.head = nn.LayerNorm(d), linear(d, num_classes)
            nn.init.normal_(self.head.weight, std=0.02)

    def check(self, images: Tensor) -> None:
        """A ValueError if these are not images for this model: shape, type."""
        shape, ours = tuple(images.shape), (self.config.channels, *self.config.image_size)
        _require(shape[1:] == ours, f"images are {shape}, this model takes {('b', *ours)}: resize or build it anew")
        dtype, device = self.patch_embed.weight.dtype, images.device.type
        fits = images.dtype == dtype or images.is_floating_point() and torch.is_autocast_enabled(device)
        _require(fits, f"images have dtype {images.dtype}: convert to {dtype}, the model's, and normalise them")

    def embed(self, images: Tensor) -> Tensor:
        """Images (b, c, height, width) -> tokens with positions, in raster order, class token included, (b, l, d)."""
        self.check(images)
        x = self.patch_embed(images).flatten(2).mT  # (b, l, d)
        if self.cls_index is not None:
            x = _insert(x, self.cls_token.expand(x.shape[0], -1, -1), self.cls_index)  # (b, l + 1, d)
        return x + self.pos_embed

    def run_layers(self, x: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """Pass tokens (b, l, d) through all blocks; returns the outputs of the blocks in `taps`, counted from 1."""
        outputs, recompute = [], self.grad_checkpoint and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers, start=1):
            inputs = x, self.config.grid, self.cls_index
            x = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
            if i in taps:
                outputs.append(x)
        return outputs

    def features(self, images: Tensor) -> Tensor:
        """(b, c, height, width) -> (b, d_model): the pooled output, after the final norm if there is one."""
        x = self.run_layers(self.embed(images), taps=(self.config.depth,))[0]  # (b, l, d)
        if self.cls_index is None:
            return x.mean(dim=1)
        x = self.norm_f(x)
        if self.pool == "cls":
            return x[:, self.cls_index]
        halves = x[:, : self.cls_index], x[:, self.cls_index + 1 :]  # weigh equally, whatever their lengths
        return torch.stack([half.mean(dim=1) for half in halves if half.shape[1] > 0]).mean(dim=0)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, height, width) -> logits (b, num_classes), or the features if there is no head."""
        features = self.features(images)
        return features if self.num_classes is None else self.head(features)

    @classmethod
    def from_arm(cls, arm: "ARM", num_classes: int | None, image_size=None, directions=4, pool="mean", drop_path=0.0):
        """A classifier that starts from a pretrained model, for any image size [ARM 3.3].

        The pretrained direction is copied to every direction. The fixed positions, interpolated to the new grid,
        become learned, with a zero row for the class token. Class token, final norm and head start fresh (head 2e-5).
        """
        _require(isinstance(arm, ARM), f"from_arm takes an ARM, not a {type(arm).__name__}")
        config = arm.config if image_size is None else replace(arm.config, image_size=image_size)
        model = cls(config, num_classes, directions, pool, drop_path)
        if num_classes is not None:
            nn.init.normal_(model.head.weight, std=2e-5)
        return model._load_resized(arm.encoder)

    def resized(self, image_size: int | tuple[int, int], drop_path: float | None = None) -> "VisionMamba":
        """The same model for another image size, its positions interpolated; drop_path: a new rate, or None."""
        config = replace(self.config, image_size=image_size)
        drop_path = self.layers[-1].drop_path if drop_path is None else drop_path
        model = VisionMamba(config, self.num_classes, self.directions, self.pool, drop_path)
        model.grad_checkpoint = self.grad_checkpoint
        return model._load_resized(self).train(self.training)

    def _load_resized(self, source: "VisionMamba") -> "VisionMamba":
        """Take over the weights of `source`: if it has one direction, for every direction; positions interpolated."""
        state, copies = source.state_dict(), self.directions // source.directions
        _require(copies > 0, f"{source.directions} scan directions do not become {self.directions}: give directions=4")
        state = {k: torch.cat([v] * copies) if DIRECTIONAL.search(k) else v for k, v in state.items()}
        pos, i = state["pos_embed"], source.cls_index  # (1, l, d)
        cls = torch.zeros_like(pos[:, :1]) if i is None else pos[:, i : i + 1]
        patches = pos[:, [j for j in range(pos.shape[1]) if j != i]]
        pos = resize_positions(patches, source.config.grid, self.config.grid)
        state["pos_embed"] = self.pos_embed if self.cls_index is None else _insert(pos, cls, self.cls_index)
        self.to(pos).load_state_dict({**self.state_dict(), **state})  # first device and type of the source
        return self


# --- ARM: predict the next cluster ------------------------------------------------------------------------------------


class DecoderBlock(nn.Module):
    """Cross-attention from queries to the encoder's output, then an MLP; the queries do not see each other [ARM 3.2].

    q = q + proj(attention(query(LN(q)), key(LN'(kv)), value(LN'(kv)))), then q = q + fc2(gelu(fc1(LN''(q))))
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.proj = linear(d, d), linear(d, 2 * d), linear(d, d)
        self.fc1, self.fc2 = linear(d, 4 * d), linear(4 * d, d)
        for layer in (self.q, self.kv, self.proj, self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """q, kv (b, l, d); mask (l, l), True where a query (row) may look at kv (column) -> (b, l, d)."""
        k, v = self.kv(self.norm_kv(kv)).chunk(2, dim=-1)  # (b, l, d) each
        heads = [x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (self.q(self.norm_q(q)), k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask)  # (b, heads, l, d / heads)
        q = q + self.proj(out.transpose(1, 2).flatten(2))
        return q + self.fc2(F.gelu(self.fc1(self.norm_mlp(q))))


class ARM(nn.Module):
    """Autoregressive pretraining: from clusters 1..k, predict the pixels of cluster k+1 [ARM 3.2].

    The encoder reads all clusters but the last. Its output at a token knows only what came before, and has to serve a
    whole cluster that it has not seen; the decoder turns "all clusters so far" plus "where to look" (one query per
    patch of clusters 2, 3, ...) into pixels. The patches of a cluster are predicted at once, not one from another.
    Each decoder block reads its own linear mix (`enc2dec`) of all taps. Afterwards the decoder is thrown away.

        loss = mean over predicted patches and their pixels of (prediction - target)^2

    Raises: ValueError if the config's grid does not divide into at least two clusters.
    """

    def __init__(self, config: ARMConfig):
        super().__init__()
        self.config, s, d, dec = config, config.cluster_size, config.d_model, config.decoder_dim
        self.register_buffer("dec_pos_embed", sincos_positions(dec, config.grid))  # (1, l, dec), raster order
        to_clusters(self.dec_pos_embed, config.grid, s)  # raises if the grid does not divide into clusters
        _require(config.n_clusters >= 2, f"one cluster of {s}x{s} patches fills the image: lower cluster or patch size")
        values = config.patch_size**2 * config.channels
        _require(not config.norm_pix or values > 1, "norm_pix needs patches of more than one value: enlarge patch_size")
        self.encoder = VisionMamba(config, num_classes=None, directions=1)
        self.tap_norms = nn.ModuleList(nn.LayerNorm(d) for _ in config.taps)
        self.enc2dec = linear(len(config.taps) * d, config.decoder_depth * dec)
        self.ar_token = nn.Parameter(torch.empty(1, 1, dec).normal_(std=0.02))
        self.decoder = nn.ModuleList(DecoderBlock(dec, config.decoder_heads) for _ in range(config.decoder_depth))
        self.ar_norm = nn.LayerNorm(dec)
        self.ar_pred = linear(dec, values)
        self.register_buffer("order", cluster_order(config), persistent=False)
        # the cluster of each encoder token; query i asks for a patch of the cluster that follows cluster[i]
        cluster = torch.arange(config.n_clusters - 1).repeat_interleave(s * s)
        self.register_buffer("mask", cluster[:, None] >= cluster[None, :], persistent=False)  # (l, l)

    def arrange(self, x: Tensor) -> Tensor:
        """Tokens (b, l, d) of a whole image from raster order to the order in which clusters are read."""
        return to_clusters(x, self.config.grid, self.config.cluster_size, self.order)

    def encode(self, images: Tensor) -> list[Tensor]:
        """(b, c, height, width) -> the tapped outputs, each (b, l, d_model); l: all clusters but the last."""
        x = self.arrange(self.encoder.embed(images))[:, : len(self.mask)]
        return self.encoder.run_layers(x, self.config.taps)

    def context(self, images: Tensor) -> Tensor:
        """What the decoder reads, (b, l, decoder_dim, decoder_depth); the last index is the decoder block's."""
        taps = [norm(x) for norm, x in zip(self.tap_norms, self.encode(images))]
        return self.enc2dec(torch.cat(taps, dim=-1)).unflatten(-1, (self.config.decoder_dim, self.config.decoder_depth))

    def predict(self, images: Tensor) -> Tensor:
        """(b, c, height, width) -> (b, l, p*p*c): clusters 2, 3, ... in prediction order, each from those before.

        l = (n_clusters - 1) * cluster_size^2; pixels in (row, column, channel) order, normalised as in `target`.
        """
        queries = self.arrange(self.ar_token + self.dec_pos_embed)[:, -len(self.mask) :]  # (1, l, dec)
        x = queries.expand(images.shape[0], -1, -1)
        for block, context in zip(self.decoder, self.context(images).unbind(-1)):  # (b, l, dec) each
            x = block(x, context, self.mask)
        return self.ar_pred(self.ar_norm(x))

    def target(self, images: Tensor) -> Tensor:
        """What `predict` should return, (b, l, p*p*c): patches, with norm_pix minus their mean, over their std."""
        self.encoder.check(images)
        x = self.arrange(patchify(images, self.config.patch_size))[:, -len(self.mask) :]
        if self.config.norm_pix:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()  # unbiased variance
        return x

    def loss_per_token(self, images: Tensor) -> Tensor:
        """Mean squared error of each predicted patch, (b, l)."""
        prediction, target = self.predict(images), self.target(images)
        return (prediction.to(target.dtype) - target).square().mean(dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, height, width) -> the loss, a scalar."""
        return self.loss_per_token(images).mean()


# --- Released checkpoints ---------------------------------------------------------------------------------------------

_RENAMES = {  # names here -> names in the released files, applied one after the other
    r"^encoder\.": "",
    r"^patch_embed\.": "patch_embed.proj.",
    r"^decoder\.(\d+)\.(q|kv|proj)\.": r"dec_block.\1.attn2.\2.",
    r"^decoder\.(\d+)\.(fc\d)\.": r"dec_block.\1.mlp.\2.",
    r"^decoder\.(\d+)\.norm_q\.": r"dec_block.\1.norm2_1.",
    r"^decoder\.(\d+)\.norm_kv\.": r"dec_block.\1.norm2_2.",
    r"^decoder\.(\d+)\.norm_mlp\.": r"dec_block.\1.norm2.",
    r"^tap_norms\.(\d+)\.": lambda match: f"norm_{int(match[1]) + 1}.",
}


def official_names(name: str, directions: int) -> list[str]:
    """The names of a parameter of ours in the released files: one, or one per direction if each has its own."""
    suffixes = ["", "_b", "_c", "_c_b"][: directions if DIRECTIONAL.search(name) else 1]  # in to_directions' order
    for pattern, new in _RENAMES.items():
        name = re.sub(pattern, new, name)
    return [DIRECTIONAL.sub(rf"\g<0>{suffix}", name) for suffix in suffixes]


def to_official(model: "ARM | VisionMamba") -> dict[str, Tensor]:
    """A model's weights under the names of the released files, as new tensors; the inverse of `load_official`."""
    _require(isinstance(model, ARM | VisionMamba), f"a {type(model).__name__} is neither ARM nor VisionMamba")
    arm, config = isinstance(model, ARM), model.config
    encoder = model.encoder if arm else model
    told = not arm or config.order == "row" and config.norm_pix and config.taps == replace(config, taps=None).taps
    others = f"order {config.order!r}, norm_pix {config.norm_pix}, taps {config.taps}"
    _require(told, f"{others}: released files know 'row', True and default taps only")
    fits = arm or encoder.directions == 4 and encoder.num_classes is not None
    _require(fits, f"{encoder.directions} directions, {encoder.num_classes} classes: released files have 4 and a head")
    state = {}
    for name, value in model.state_dict().items():
        names = official_names(name, encoder.directions)
        state |= {official: piece.clone() for official, piece in zip(names, value.chunk(len(names)))}
    if arm:
        state["mask"] = torch.zeros(model.mask.shape).masked_fill(~model.mask.cpu(), -math.inf)
    return state


def load_official(checkpoint, *, pool="mean", image_size=None, grid=None, weights="model") -> "ARM | VisionMamba":
    """Build a model from a released checkpoint: an ARM from a pretraining file, a classifier from a finetuning file.

    Depth, widths, cluster size and a square grid are read off the weights. Files are opened weights-only: the one
    class that they may hold besides tensors is argparse.Namespace.

    Args:
        checkpoint: a path, a checkpoint {"model": ..., maybe "model_ema": ...}, or a bare state dict.
        pool: of a classifier; the weights do not tell. weights: "model" or "model_ema".
        image_size: the size to build for, if not the checkpoint's; positions are interpolated (an ARM's, made anew).
        grid: rows and columns of the checkpoint's patches, if they are not a square.

    Raises: ValueError that lists missing, unexpected and misshapen keys, or names what else is wrong.
    """
    _require(pool in ("mean", "cls"), f"pool {pool!r} must be 'mean' or 'cls'")
    if not isinstance(checkpoint, dict):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever reading something else may raise
            reason = str(error).partition(". ")[0]  # torch goes on to advise trust
            raise ValueError(f"not a checkpoint that can be read and trusted: {reason}") from error
    _require(isinstance(checkpoint, dict), f"not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    found = [key for key in ("model", "model_ema") if checkpoint.get(key) is not None]
    there = ", ".join(found) or "bare weights"
    _require(weights in (found or ["model"]), f"weights {weights!r} are not in this checkpoint: it has {there}")
    if found:
        log.warning("load_official: using the weights %r (the checkpoint has: %s)", weights, there)
        checkpoint = checkpoint[weights]
    named = isinstance(checkpoint, dict) and all(isinstance(value, Tensor) for value in checkpoint.values())
    _require(named and all(isinstance(key, str) for key in checkpoint), "not a checkpoint: weights are named tensors")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in checkpoint.items()}
    arm = "ar_token" in state and "head.weight" not in state
    if not arm:  # a classifier's file may carry the decoder along
        state = {k: v for k, v in state.items() if not re.match(r"mask$|dec_|ar_|enc2dec|norm_\d", k)}
    read = {"patch_embed.proj.weight": 4, "pos_embed": 3, "layers.0.mixer.A_log": 2, "layers.0.mixer.conv1d.weight": 3}
    read |= {"mask": 2, "ar_token": 3} if arm else {"head.weight": 2}  # what the shapes below are read off
    problems = [f"missing {key}" for key in read if key not in state]
    problems += [f"{k} has shape {tuple(state[k].shape)}" for k, n in read.items() if k in state and state[k].ndim != n]
    _require(not problems, "not a released checkpoint: " + "; ".join(problems))
    d, channels, p, _ = state["patch_embed.proj.weight"].shape
    l = state["pos_embed"].shape[1] - (0 if arm else 1)
    grid = (math.isqrt(l),) * 2 if grid is None else grid
    fits = isinstance(grid, tuple | list) and [type(x) for x in grid] == [int, int] and math.prod(grid) == l
    _require(fits, f"a grid of {grid} does not hold {l} positions: give grid=(rows, columns)")
    if arm:  # whose positions are fixed, and tell
        own = torch.allclose(state["pos_embed"].float().cpu(), sincos_positions(d, grid).float(), atol=1e-2)
        _require(own, f"the positions in this checkpoint are not those of a grid of {tuple(grid)}: give grid=its own")
    depth, decoder_depth = (len({k.split(".")[1] for k in state if k.startswith(x)}) for x in ("layers.", "dec_block."))
    sizes = dict(image_size=(grid[0] * p, grid[1] * p), channels=channels, patch_size=p, d_model=d, depth=depth)
    sizes |= dict(d_state=state["layers.0.mixer.A_log"].shape[1], d_conv=state["layers.0.mixer.conv1d.weight"].shape[2])
    if arm:
        cluster_size = math.isqrt(int((state["mask"][:1] == 0).sum()))  # the first query sees one cluster
        sizes |= dict(cluster_size=cluster_size, decoder_dim=state["ar_token"].shape[2])
    config = ARMConfig(**sizes, decoder_depth=decoder_depth or 1)  # which a classifier has no use for
    model = ARM(config) if arm else VisionMamba(config, len(state["head.weight"]), directions=4, pool=pool)

    expected = to_official(model)
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    shapes = {key: (tuple(state[key].shape), tuple(expected[key].shape)) for key in expected.keys() & state}
    problems += [f"{key} has shape {theirs}, not {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]
    _require(not problems, "the weights do not fit a released model: " + "; ".join(sorted(problems)))
    names = {name: official_names(name, directions=1 if arm else 4) for name in model.state_dict()}
    model.load_state_dict({name: torch.cat([state[key].float() for key in keys]) for name, keys in names.items()})
    if arm and image_size is not None:
        resized = ARM(replace(config, image_size=image_size))
        resized.load_state_dict(dict(model.named_parameters()), strict=False)  # all but its positions, made anew
        return resized
    return model if image_size is None else model.resized(image_size)
