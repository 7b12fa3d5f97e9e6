"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import math

import checks
import torch


def patchify(images, p, order=(0, 2, 4, 3, 5, 1)):
    (b, c, height, width) = images.shape
    x = images.reshape(b, c, height // p, p, width // p, p)  # (b, c, rows, p, columns, p)
    return x.permute(order).reshape(b, height * width // p**2, p * p * c)


def cluster_index(rows, columns, s, order=(0, 2, 1, 3)):
    return torch.arange(rows * columns).view(rows // s, s, columns // s, s).permute(order).flatten()


def positions(d, rows, columns, base=10000.0, denominator=4, pieces=("sin c", "cos c", "sin r", "cos r")):
    w = base ** (-torch.arange(d // 4) / (d // denominator))
    where = {
        "r": torch.arange(rows).repeat_interleave(columns)[:, None] * w,
        "c": torch.arange(columns).repeat(rows)[:, None] * w,
    }
    return torch.cat([getattr(where[x], f)() for f, x in (piece.split() for piece in pieces)], dim=1)


def alternating(d, rows, columns):
    half = [x.unflatten(1, (2, -1)).mT.flatten(1) for x in positions(d, rows, columns).chunk(2, dim=1)]
    return torch.cat(half, dim=1)


WRONG = {
    "no permute": (checks.patches, lambda x, p: x.reshape(len(x), -1, p * p * x.shape[1]), "mixes pixels of different"),
    "columns first": (checks.patches, lambda x, p: patchify(x, p, (0, 4, 2, 3, 5, 1)), "patches go down the columns"),
    "colour slowest": (checks.patches, lambda x, p: patchify(x, p, (0, 2, 4, 1, 3, 5)), "colour, row, column"),
    "pixels transposed": (checks.patches, lambda x, p: patchify(x, p, (0, 2, 4, 5, 3, 1)), "column, row, colour"),
    "patch and pixel axes swapped": (checks.patches, lambda x, p: patchify(x, p, (0, 3, 5, 2, 4, 1)), "mixes pixels"),
    "channels not moved": (checks.patches, lambda x, p: patchify(x, p).unflatten(2, (-1, x.shape[1])), "shape"),
    "three colours": (
        checks.patches,
        lambda x, p: patchify(x.reshape(len(x), 3, -1, x.shape[3]), p),
        "not for 1 colour and p = 3: shape",
    ),
    "patches of 2": (checks.patches, lambda x, p: patchify(x, 2), "not for 1 colour and p = 3: shape"),
    "raster order": (checks.cluster_index, lambda r, c, s: torch.arange(r * c), "this is raster order"),
    "inverse": (checks.cluster_index, lambda *a: cluster_index(*a).argsort(), "this is the inverse"),
    "clusters down": (checks.cluster_index, lambda *a: cluster_index(*a, (2, 0, 1, 3)), "clusters go down the columns"),
    "patches down": (checks.cluster_index, lambda *a: cluster_index(*a, (0, 2, 3, 1)), "inside a cluster patches go"),
    "strips": (checks.cluster_index, lambda *a: cluster_index(*a, (2, 3, 0, 1)), "not a square"),
    "strided": (checks.cluster_index, lambda *a: cluster_index(*a, (1, 3, 0, 2)), "not a square"),
    "floats": (checks.cluster_index, lambda *a: cluster_index(*a).float(), "must be integers"),
    "row first": (
        checks.positions,
        lambda *a: positions(*a, pieces=("sin r", "cos r", "sin c", "cos c")),
        "row and column are swapped",
    ),
    "cosine first": (
        checks.positions,
        lambda *a: positions(*a, pieces=("cos c", "sin c", "cos r", "sin r")),
        "cosines come first",
    ),
    "alternating": (checks.positions, alternating, "sine and cosine alternate"),
    "all sines first": (
        checks.positions,
        lambda *a: positions(*a, pieces=("sin c", "sin r", "cos c", "cos r")),
        "the right numbers in a wrong order",
    ),
    "frequencies over d/2": (checks.positions, lambda *a: positions(*a, denominator=2), "the frequencies are"),
    "frequencies turned": (checks.positions, lambda *a: positions(*a, base=1e-4), "the frequencies are"),
    "degrees": (checks.positions, lambda d, r, c: positions(d, r, c, 10000.0) * math.pi, "must hold"),
}

RIGHT = {checks.patches: patchify, checks.cluster_index: cluster_index, checks.positions: positions}
