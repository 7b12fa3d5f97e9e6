"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import random

import checks
import numpy as np
import torch
import torch.nn.functional as F


def resize(pos, old, new, out="middle", back="middle", swap=False, view=False, down=False, zero=False, **options):
    middle = old[0] * old[1] // 2 if out == "middle" else 0
    token, x = pos[:, middle : middle + 1], torch.cat([pos[:, :middle], pos[:, middle + 1 :]], dim=1)
    old, size = (old[::-1], new[::-1]) if swap else (old, new)
    x = x.reshape(1, -1, *old) if view else x.unflatten(1, old).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=size, **dict(mode="bicubic", align_corners=False) | options)
    x = (x.mT if down else x).flatten(2).mT
    place = dict(middle=new[0] * new[1] // 2, old=middle, front=0, end=x.shape[1])[back]
    return torch.cat([x[:, :place], 0 * token if zero else token, x[:, place:]], dim=1)


def in_place(pos, old, new):
    result = resize(pos, old, new)
    pos[:, old[0] * old[1] // 2] = 0
    return result


def scale(name, depth, decay, block=1, top=1, upside_down=False, two_digits=True):
    text = (name + ".").split(".")[1]
    number = int(text if two_digits else text[:1]) + block if name.startswith("layers") else 0
    number = depth + 1 if name.startswith(("norm_f", "head")) else number
    return decay**number if upside_down else decay ** (depth + top - number)


def any_norm(name, depth, decay):
    return 1.0 if "norm" in name else scale(name, depth, decay)


def ema(average, weights, decay):
    return {name: decay * average[name] + (1 - decay) * weights[name] for name in average}


def ema_in_place(average, weights, decay):
    for name in average:
        average[name].lerp_(weights[name], 1 - decay)
    return average


def balanced(targets, number, seed, shuffle=True, own=True, rest=True):
    generator = torch.Generator().manual_seed(seed) if own else torch.manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator).tolist() if shuffle else range(len(targets))
    by_class = {}
    for i in order:
        by_class.setdefault(targets[i], []).append(i)
    turns = sorted((turn, c, i) for c, indices in by_class.items() for turn, i in enumerate(indices))
    return [i for _, _, i in turns[: number if rest else number // 4 * 4]]


def with_replacement(targets, number, seed):
    generator = random.Random(seed)
    by_class = [[i for i, t in enumerate(targets) if t == c] for c in sorted(set(targets))]
    return [generator.choice(by_class[k % 4]) for k in range(number)]


def rest_in_one_class(targets, number, seed):
    chosen = balanced(targets, number // 4 * 4, seed)
    return chosen + [i for i, t in enumerate(targets) if t == 9 and i not in chosen][: number % 4]


def adjacent(targets, number, seed):
    """Takes images of a class for neighbours in the list."""
    generator, classes = random.Random(seed), sorted(set(targets))
    shares = [number // len(classes) + (k < number % len(classes)) for k in range(len(classes))]
    starts = [(targets.index(c), targets.count(c), share) for c, share in zip(classes, shares)]
    return [i for a, count, share in starts for i in generator.sample(range(a, a + count), share)]


def globally(set_seed, shuffle):
    def answer(targets, number, seed):
        set_seed(seed)
        order = list(range(len(targets)))
        shuffle(order)
        turns = [sum(targets[j] == targets[i] for j in order[:k]) for k, i in enumerate(order)]
        return [i for _, i in sorted(zip(turns, order))][:number]

    return answer


WRONG = {
    "1-D, class token in": (
        checks.resize,
        lambda p, old, new: F.interpolate(p.mT, new[0] * new[1] + 1, mode="linear").mT,
        "take it out first",
    ),
    "class token taken from the front": (
        checks.resize,
        lambda *a: resize(*a, out="front", back="front"),
        "take it out first",
    ),
    "put back in front": (checks.resize, lambda *a: resize(*a, back="front"), "not to the front"),
    "put back at the end": (checks.resize, lambda *a: resize(*a, back="end"), "not to the end"),
    "put back at the old index": (checks.resize, lambda *a: resize(*a, back="old"), "at 14, not at the old index"),
    "zero row": (checks.resize, lambda *a: resize(*a, zero=True), "here it is zero"),
    "no row": (checks.resize, lambda p, old, new: resize(p, old, new)[:, 1:], "shape"),
    "rows and columns swapped": (checks.resize, lambda *a: resize(*a, swap=True), "rows and columns are swapped"),
    "down the columns": (checks.resize, lambda *a: resize(*a, down=True), "goes down the columns"),
    "view for permute": (checks.resize, lambda *a: resize(*a, view=True), "needs a permute"),
    "aligned corners": (checks.resize, lambda *a: resize(*a, align_corners=True), "align_corners=True"),
    "bilinear": (checks.resize, lambda *a: resize(*a, mode="bilinear"), "mode=bilinear, align_corners=False"),
    "pos changed": (checks.resize, in_place, "`pos` itself was changed"),
    "block i is layer i": (checks.scale, lambda *a: scale(*a, block=0), "block i is layer i \\+ 1"),
    "one layer short": (checks.scale, lambda *a: scale(*a, top=0), "scale of the layer above"),
    "upside down": (checks.scale, lambda *a: scale(*a, upside_down=True), "upside down"),
    "norm_f forgotten": (
        checks.scale,
        lambda n, *a: scale("x" if "norm_f" in n else n, *a),
        "norm_f.weight.*norm_f and head are layer depth",
    ),
    "class token on top": (
        checks.scale,
        lambda n, *a: scale("head" if n == "cls_token" else n, *a),
        "cls_token.*embeddings and class token are layer 0",
    ),
    "one digit": (checks.scale, lambda *a: scale(*a, two_digits=False), "may have two digits"),
    "every norm is the last": (checks.scale, any_norm, "only norm_f is at the top"),
    "swapped": (checks.ema_update, lambda a, w, d: ema(a, w, 1 - d), "factors are swapped"),
    "in place": (checks.ema_update, ema_in_place, "changed in place"),
    "weights": (checks.ema_update, lambda a, w, d: dict(w), "not an average"),
    "half": (checks.ema_update, lambda a, w, d: ema(a, w, 0.5), "is not decay"),
    "blind": (
        checks.balanced,
        lambda t, n, s: torch.randperm(len(t), generator=torch.Generator().manual_seed(s))[:n].tolist(),
        "differ by more than one",
    ),
    "the first ones": (checks.balanced, lambda *a: balanced(*a, shuffle=False), "not the first ones"),
    "global seed": (checks.balanced, lambda *a: balanced(*a, own=False), "global random state"),
    "global seed of Python": (checks.balanced, globally(random.seed, random.shuffle), "global random state"),
    "global seed of NumPy": (checks.balanced, globally(np.random.seed, np.random.shuffle), "global random state"),
    "rest left out": (checks.balanced, lambda *a: balanced(*a, rest=False), "what is left over"),
    "rest in one class": (checks.balanced, rest_in_one_class, "differ by more than one"),
    "neighbours": (checks.balanced, adjacent, "not all are indices|chosen twice|differ by more than one"),
    "with replacement": (checks.balanced, with_replacement, "chosen twice"),
    "unseeded": (
        checks.balanced,
        lambda t, n, s: balanced(t, n, random.SystemRandom().randrange(10**9)),
        "another answer",
    ),
}
RIGHT = {checks.resize: resize, checks.scale: scale, checks.ema_update: ema, checks.balanced: balanced}
