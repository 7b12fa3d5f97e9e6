"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import checks
import torch


def cluster_mask(n, size, later=0):
    cluster = torch.arange(n - 1).repeat_interleave(size)
    return cluster[:, None] + later >= cluster


def triangle(n, size, diagonal=0):
    return torch.ones((n - 1) * size, (n - 1) * size).tril(diagonal).bool()


def leaks_once(n, size):
    mask = cluster_mask(n, size)
    mask[0, -1] = True
    return mask


def normalised_target(x, dims=-1, unbiased=True, root=lambda v: (v + 1e-6).sqrt()):
    return (x - x.mean(dims, keepdim=True)) / root(x.var(dims, unbiased=unbiased, keepdim=True))


def by_colour(x):
    return normalised_target(x.unflatten(2, (-1, 3)), dims=2).flatten(2)


def cluster_losses(prediction, tokens, size, shift=None, error=torch.square, reduce=torch.mean):
    start = size if shift is None else shift
    errors = error(prediction - tokens[:, start : start + prediction.shape[1]])
    return reduce(errors.unflatten(1, (-1, size)), dim=(0, 2, 3))


def mixed_losses(prediction, tokens, size):
    errors = (prediction - tokens[:, size:]).square()
    return errors.unflatten(1, (size, -1)).mean((0, 1, 3))


def dependence(
    predict,
    tokens,
    size,
    change=lambda x: x + torch.randn_like(x),
    length=None,
    channels=None,
    compare=lambda difference: difference.abs(),
    threshold=1e-6,
    restore=True,
):
    before, rows, changed = predict(tokens), [], tokens.clone()
    for start in range(0, tokens.shape[1], size):
        changed = tokens.clone() if restore else changed
        part = changed[:, start : start + (length or size), :channels]
        part.copy_(change(part))
        difference = (predict(changed) - before)[0]
        rows.append(compare(difference.unflatten(0, (-1, size)).flatten(1)).sum(1).abs() > threshold)
    return torch.stack(rows)


def in_place(predict, tokens, size):
    result = dependence(predict, tokens, size)
    tokens[:, :size] += 1
    return result


def by_slope(predict, tokens, size):
    slope = torch.autograd.functional.jacobian(predict, tokens).abs()  # (1, m*size, e, 1, n*size, d)
    slope = slope.sum((0, 2, 3, 5)).unflatten(0, (-1, size)).unflatten(2, (-1, size))  # (m, size, n, size)
    return slope.sum((1, 3)).T > 1e-6


WRONG = {
    "token-causal": (checks.cluster_mask, triangle, "token-causal"),
    "strict": (checks.cluster_mask, lambda *a: cluster_mask(*a, later=-1), "strict"),
    "strict by tokens": (checks.cluster_mask, lambda *a: triangle(*a, -1), "strict"),
    "one cluster too late": (checks.cluster_mask, lambda *a: cluster_mask(*a, later=1), "sees cluster k.1 itself"),
    "no mask": (checks.cluster_mask, lambda *a: triangle(*a, 10_000), "every query sees everything"),
    "transposed": (checks.cluster_mask, lambda *a: cluster_mask(*a).T, "transposed"),
    "True hides": (checks.cluster_mask, lambda *a: ~cluster_mask(*a), "True and False are swapped"),
    "additive": (
        checks.cluster_mask,
        lambda *a: torch.zeros(1).where(cluster_mask(*a), -torch.inf),
        "a boolean is due",
    ),
    "all clusters": (checks.cluster_mask, lambda n, size: cluster_mask(n + 1, size), "n-1 clusters are read"),
    "one pair too many": (checks.cluster_mask, leaks_once, "1 pairs let a query see"),
    "not normalised": (checks.normalised_target, lambda x: x, "these are the plain pixels"),
    "only centred": (checks.normalised_target, lambda x: x - x.mean(-1, keepdim=True), "only the mean is removed"),
    "biased variance": (checks.normalised_target, lambda x: normalised_target(x, unbiased=False), "variance is biased"),
    "per channel": (checks.normalised_target, by_colour, "each colour is normalised by itself"),
    "per image": (checks.normalised_target, lambda x: normalised_target(x, (1, 2)), "those of the whole image"),
    "by variance": (
        checks.normalised_target,
        lambda x: normalised_target(x, root=lambda v: v + 1e-6),
        "by the variance",
    ),
    "epsilon outside": (
        checks.normalised_target,
        lambda x: normalised_target(x, root=lambda v: v.sqrt() + 1e-6),
        "under the root",
    ),
    "no epsilon": (checks.normalised_target, lambda x: normalised_target(x, root=torch.sqrt), "must give 0, not NaN"),
    "not centred": (
        checks.normalised_target,
        lambda x: x / (x.var(-1, keepdim=True) + 1e-6).sqrt(),
        "without removing the mean",
    ),
    "target not shifted": (checks.cluster_losses, lambda *a: cluster_losses(*a, shift=0), "target is not shifted"),
    "shifted by a patch": (checks.cluster_losses, lambda *a: cluster_losses(*a, shift=1), "shifted by one patch"),
    "clusters mixed": (checks.cluster_losses, mixed_losses, "patches of different clusters are mixed"),
    "absolute": (checks.cluster_losses, lambda *a: cluster_losses(*a, error=torch.abs), "absolute errors"),
    "root": (checks.cluster_losses, lambda *a: cluster_losses(*a).sqrt(), "a root too much"),
    "sum": (checks.cluster_losses, lambda *a: cluster_losses(*a, reduce=torch.sum), "a sum where a mean is due"),
    "one number": (checks.cluster_losses, lambda *a: cluster_losses(*a).mean(), "one loss for each"),
    "set to zero": (checks.dependence, lambda *a: dependence(*a, change=torch.zeros_like), "a cluster of zeros"),
    "a constant added": (checks.dependence, lambda *a: dependence(*a, change=lambda x: x + 1), "compares tokens"),
    "one amount for all channels": (
        checks.dependence,
        lambda *a: dependence(*a, change=lambda x: x + torch.randn_like(x[..., :1])),
        "compares channels of a token",
    ),
    "tiny changes": (
        checks.dependence,
        lambda *a: dependence(*a, change=lambda x: x + 1e-4 * torch.randn_like(x)),
        "tiny change is not enough",
    ),
    "first token only": (checks.dependence, lambda *a: dependence(*a, length=1), "changes go unseen"),
    "first channel only": (checks.dependence, lambda *a: dependence(*a, channels=1), "changes go unseen"),
    "sums compared": (checks.dependence, lambda *a: dependence(*a, compare=lambda x: x), "changes that cancel"),
    "never restored": (checks.dependence, lambda *a: dependence(*a, restore=False), "not there: change one cluster"),
    "slope only": (checks.dependence, by_slope, "a gradient or a tiny change is not enough"),
    "no threshold": (checks.dependence, lambda *a: dependence(*a, threshold=0), "above 1e-6"),
    "tokens changed": (checks.dependence, in_place, "work on a clone"),
    "rows and columns": (checks.dependence, lambda *a: dependence(*a).T, "shape"),
}

RIGHT = {
    checks.cluster_mask: cluster_mask,
    checks.dependence: dependence,
    checks.normalised_target: normalised_target,
    checks.cluster_losses: cluster_losses,
}
