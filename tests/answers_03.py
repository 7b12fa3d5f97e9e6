"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import checks
import torch
import torch.nn.functional as F


def causal_convolution(x, weight, bias, front=None):
    l, k = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, k - 1 if front is None else front(k), k))
    return bias + sum(weight[:, j] * padded[:, j : j + l] for j in range(k))


def dense_convolution(x, weight, bias):
    """All channels into each, as a convolution without groups would."""
    return causal_convolution(x.sum(-1, keepdim=True).expand_as(x), weight, bias)


def merge_directions(y, rows, columns, flip=(1, 3), transpose=(2, 3), grid=None, scale=4):
    total = 0
    for i, x in enumerate(y.unbind(2)):
        x = x.flip(1) if i in flip else x
        x = x.unflatten(1, grid or (columns, rows)).transpose(1, 2).flatten(1, 2) if i in transpose else x
        total = total + x
    return total / scale


def pool_halves(x, cls_index, skip=1):
    halves = x[:, :cls_index], x[:, cls_index + skip :]
    means = [half.mean(dim=1) for half in halves if half.shape[1] > 0]
    return sum(means) / len(means)


def patches_mean(x, cls):
    return torch.cat([x[:, :cls], x[:, cls + 1 :]], 1).mean(1)


def half_of_one_side(x, cls):
    return (x[:, :cls].sum(1) / max(1, cls) + x[:, cls + 1 :].sum(1) / max(1, x.shape[1] - cls - 1)) / 2


def mixer_parameters(d, n, k, g, r=None, vectors=3, shared=1, states=1, kernel=1):
    r = -(-d // 16) if r is None else r(d)
    direction = d * k * kernel + d * (r + 2 * n) + r * d + states * d * n + vectors * d
    return 3 * d * d * shared + g * direction


WRONG = {
    "symmetric padding": (
        checks.causal_convolution,
        lambda *a: causal_convolution(*a, front=lambda k: k // 2),
        "the last token changes earlier outputs",
    ),
    "no current token": (checks.causal_convolution, lambda *a: causal_convolution(*a, front=lambda k: k), "k zeros in"),
    "flipped weights": (
        checks.causal_convolution,
        lambda x, weight, bias: causal_convolution(x, weight.flip(1), bias),
        "the weights are in reverse",
    ),
    "no bias": (checks.causal_convolution, lambda x, w, bias: causal_convolution(x, w, 0 * bias), "bias is missing"),
    "dense": (checks.causal_convolution, dense_convolution, "channel 0 changes other channels"),
    "with SiLU": (checks.causal_convolution, lambda *a: F.silu(causal_convolution(*a)), "SiLU too much"),
    "not cut": (
        checks.causal_convolution,
        lambda x, w, bias: F.conv1d(x.mT, w[:, None], bias, padding=w.shape[1] - 1, groups=x.shape[2]).mT,
        "as many tokens as before",
    ),
    "summed": (checks.merge_directions, lambda *a: merge_directions(*a, scale=1), "divide by 4"),
    "rows not flipped": (checks.merge_directions, lambda *a: merge_directions(*a, flip=(3,)), r"direction 1 .*flip it"),
    "columns not flipped": (checks.merge_directions, lambda *a: merge_directions(*a, flip=(1,)), r"direction 3 .*flip"),
    "columns not transposed": (
        checks.merge_directions,
        lambda *a: merge_directions(*a, transpose=()),
        r"direction 2 .*transpose it back",
    ),
    "only flipped": (
        checks.merge_directions,
        lambda *a: merge_directions(*a, transpose=(2,)),
        r"direction 3 .*transpose",
    ),
    "transposed on the wrong grid": (
        checks.merge_directions,
        lambda y, rows, columns: merge_directions(y, rows, columns, grid=(rows, columns)),
        r"2x3 patches, direction 2 .*a grid of \(columns, rows\)",
    ),
    "mean of all": (checks.pool_halves, lambda x, cls: x.mean(1), "class token is in the mean"),
    "mean of patches": (checks.pool_halves, patches_mean, "every patch weighs the same"),
    "class token": (checks.pool_halves, lambda x, cls: x[:, cls], "this is the class token"),
    "class token in a half": (checks.pool_halves, lambda *a: pool_halves(*a, skip=0), "begins at cls_index"),
    "empty side": (
        checks.pool_halves,
        lambda x, cls: (x[:, :cls].mean(1) + x[:, cls + 1 :].mean(1)) / 2,
        "the mean of an empty side is NaN",
    ),
    "half of one side": (checks.pool_halves, half_of_one_side, "one side is empty"),
    "rank rounded down": (
        checks.mixer_parameters,
        lambda *a: mixer_parameters(*a, r=lambda d: d // 16),
        "rounded down",
    ),
    "one bias forgotten": (checks.mixer_parameters, lambda *a: mixer_parameters(*a, vectors=2), "d per direction"),
    "both biases forgotten": (checks.mixer_parameters, lambda *a: mixer_parameters(*a, vectors=1), "2 d per direction"),
    "no A": (checks.mixer_parameters, lambda *a: mixer_parameters(*a, states=0), "A_log is missing"),
    "nothing shared": (
        checks.mixer_parameters,
        lambda d, n, k, g: mixer_parameters(d, n, k, g, shared=g),
        "in_proj and out_proj are counted once per direction",
    ),
    "all shared": (checks.mixer_parameters, lambda d, n, k, g: mixer_parameters(d, n, k, 1), "multiply them by g"),
    "dense kernel": (
        checks.mixer_parameters,
        lambda d, n, k, g: mixer_parameters(d, n, k, g, kernel=d),
        "the convolution is depthwise",
    ),
    "a float": (checks.mixer_parameters, lambda *a: mixer_parameters(*a, r=lambda d: d / 16), "is an int"),
}

RIGHT = {
    checks.causal_convolution: causal_convolution,
    checks.merge_directions: merge_directions,
    checks.pool_halves: pool_halves,
    checks.mixer_parameters: mixer_parameters,
}
