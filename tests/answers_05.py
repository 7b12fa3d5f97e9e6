"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import math

import checks
import torch


def rate_at(step, per_epoch, epochs, warmup, peak, low, start=None, least=None):
    e, start = step / per_epoch, warmup if start is None else start
    if e < warmup:
        return peak * e / warmup
    least = low if least is None else least
    return least + (peak - least) * (1 + math.cos(math.pi * (e - start) / (epochs - start))) / 2


def in_steps(step, per_epoch, epochs, warmup, peak, low):
    return peak * step / warmup if step < warmup else rate_at(step, per_epoch, epochs, warmup, peak, low)


def decays(name, shape):
    return len(shape) > 1 and not name.endswith(("A_log", "_token", "pos_embed"))


def accumulate(model, loss_of, batch, parts, divide=True, zero="before", loss="mean", late=False, step=0.0, by=1):
    if zero == "before":
        model.zero_grad()
    if zero == "in place":
        for parameter in model.parameters():
            parameter.grad.zero_()
    losses = []
    for piece in batch.chunk(parts):
        if zero == "inside":
            model.zero_grad()
        losses.append(loss_of(model, piece) / (parts if divide else 1) / by)
        if not late:
            losses[-1].backward()
    if late:
        sum(losses).backward()
    with torch.no_grad():
        model.weight -= step * model.weight.grad
    values = [x.item() for x in losses]
    return dict(mean=sum(values), last=values[-1], sum=parts * sum(values), tensor=sum(losses).detach())[loss]


def complete(predict, tokens, given, size, shift=1, feed=True, clone=True, first=None):
    result, source = tokens.clone() if clone else tokens, tokens.clone()
    for k in range(given if first is None else first, tokens.shape[1] // size):
        prediction = predict(result if feed else source)
        result[:, k * size : (k + 1) * size] = prediction[:, (k - shift) * size : (k + 1 - shift) * size]
    return result


def blank_future(predict, tokens, given, size):
    result = tokens.clone()
    result[:, given * size :] = 0
    result[:, given * size :] = predict(result)[:, (given - 1) * size :]
    return result


WRONG = {
    "cosine from 0": (checks.rate_at, lambda *a: rate_at(*a, start=0), "measured from step 0"),
    "warm-up in steps": (checks.rate_at, in_steps, "this one is in steps"),
    "no minimum": (checks.rate_at, lambda *a: rate_at(*a, least=0.0), "the minimum is missing"),
    "counts from 1": (checks.rate_at, lambda s, n, *a: rate_at(s + 1, n, *a), "counts from 1"),
    "whole epochs": (checks.rate_at, lambda s, n, *a: rate_at(s // n * n, n, *a), "once per epoch"),
    "no warm-up": (checks.rate_at, lambda s, n, e, w, *a: rate_at(s, n, e, 0, *a), "there is no warm-up"),
    "minimum on top": (
        checks.rate_at,
        lambda s, n, e, w, p, low: rate_at(s, n, e, w, p, 0.0) + (low if s / n >= w else 0),
        "on top of the peak",
    ),
    "decay of A_log": (
        checks.decays,
        lambda n, s: len(s) > 1 and not n.endswith(("_token", "pos_embed")),
        "A_log decays",
    ),
    "by dimensions alone": (checks.decays, lambda n, s: len(s) > 1, "A_log decays"),
    "decay of tokens": (checks.decays, lambda n, s: len(s) > 1 and "A_log" not in n, "token decays"),
    "by the name weight": (checks.decays, lambda n, s: n.endswith("weight"), r"norm1.weight decays: it is a scale"),
    "no convolutions": (checks.decays, lambda n, s: decays(n, s) and len(s) == 2, r"conv1d.weight does not decay"),
    "every embed": (checks.decays, lambda n, s: decays(n, s) and "embed" not in n, r"patch_embed.weight does not"),
    "not divided": (checks.accumulate, lambda *a: accumulate(*a, divide=False), "3 times too large"),
    "not zeroed": (checks.accumulate, lambda *a: accumulate(*a, zero="never"), "still in there"),
    "zeroed inside": (checks.accumulate, lambda *a: accumulate(*a, zero="inside"), "only the last piece's gradient"),
    "one backward": (checks.accumulate, lambda *a: accumulate(*a, late=True), "keeps the activations of all"),
    "last loss": (checks.accumulate, lambda *a: accumulate(*a, loss="last"), "the loss is the last piece's"),
    "summed loss": (checks.accumulate, lambda *a: accumulate(*a, loss="sum"), "the sum over pieces"),
    "zeroed in place": (checks.accumulate, lambda *a: accumulate(*a, zero="in place"), "a first step .grad is None"),
    "stepped": (checks.accumulate, lambda *a: accumulate(*a, step=0.1), "the weights were changed"),
    "by images": (checks.accumulate, lambda m, f, x, n: accumulate(m, f, x, n, by=len(x) / n), "a number of images"),
    "by all images": (
        checks.accumulate,
        lambda m, f, x, n: accumulate(m, f, x, n, divide=False, by=len(x) / n),
        "a number of images",
    ),
    "tensor": (checks.accumulate, lambda *a: accumulate(*a, loss="tensor"), "is to be a float"),
    "whole batch": (checks.accumulate, lambda m, f, x, parts: accumulate(m, f, x, 1), r"pieces of \[12\]"),
    "from the truth": (checks.complete, lambda *a: complete(*a, feed=False), "from the true ones"),
    "one call": (checks.complete, blank_future, "come from one call"),
    "shifted": (checks.complete, lambda *a: complete(*a, shift=0), r"rows from \(k-1\)\*size"),
    "in place": (checks.complete, lambda *a: complete(*a, clone=False), "work on a clone"),
    "all but one": (checks.complete, lambda *a: complete(*a, first=1), "a given cluster was changed"),
    "one too late": (
        checks.complete,
        lambda p, t, g, s: complete(p, t, g, s, first=g + 1),
        "the first wrong prediction is of cluster 1;",
    ),
    "one too few": (
        checks.complete,
        lambda p, t, g, s: torch.cat([complete(p, t, g, s)[:, :-s], t[:, -s:]], 1),
        "the first wrong prediction is of cluster 4;",
    ),
    "nothing": (checks.complete, lambda p, t, g, s: t.clone(), "nothing was predicted"),
}
RIGHT = {checks.rate_at: rate_at, checks.decays: decays, checks.accumulate: accumulate, checks.complete: complete}
