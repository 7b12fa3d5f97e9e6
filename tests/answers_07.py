"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import math
import statistics

import checks
from scipy import stats


def interval(
    ours, theirs, q=0.975, normal=False, freedom=1, spread=1, root=0.5, factor=1.0, sign=1, shared=True, place=False
):
    seeds = [seed for seed in ours if seed in theirs or not shared]
    d = [ours[seed] - theirs[seed] for seed in seeds]
    d = [a - b for a, b in zip(ours.values(), theirs.values())] if place else d
    n, mean = len(d), sum(d) / len(d)
    s = math.sqrt(sum((x - mean) ** 2 for x in d) / (n - spread))
    t = stats.norm.ppf(q) if normal else stats.t.ppf(q, n - freedom)
    return sign * mean, factor * t * s / n**root


def one_error(ours, theirs):
    d = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return statistics.mean(d), statistics.stdev(d) / math.sqrt(len(d))


def unpaired(ours, theirs, freedom=2, quantile=None):
    seeds = ours.keys() & theirs.keys()
    a, b = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    n, error = len(a), math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))
    t = quantile or stats.t.ppf(0.975, 2 * n - 2 if freedom == 2 else n - 1)
    return statistics.mean(a) - statistics.mean(b), t * error


def all_seeds(ours, theirs):
    _, half = interval(ours, theirs)
    return statistics.mean(ours.values()) - statistics.mean(theirs.values()), half


def error(accuracy, images):
    p = accuracy / 100
    return 100 * math.sqrt(p * (1 - p) / images)


def choose(settings, by="held-out", rule=statistics.mean, report="test", how=statistics.mean):
    best = max(settings, key=lambda name: rule(settings[name][by].values()))
    return best, how(settings[best][report].values())


def two_choices(settings):
    return choose(settings)[0], choose(settings, by="test")[1]


def either(**options):
    return lambda ours, theirs: interval(ours, theirs, **options)


WRONG = {
    "unpaired": (checks.paired_interval, unpaired, "unpaired"),
    "unpaired, n - 1": (checks.paired_interval, lambda a, b: unpaired(a, b, freedom=1), "unpaired"),
    "unpaired, normal": (checks.paired_interval, lambda a, b: unpaired(a, b, quantile=1.96), "unpaired"),
    "n for n - 1": (checks.paired_interval, either(spread=0), "the variance is over n - 1"),
    "normal quantile": (checks.paired_interval, either(normal=True), "the normal quantile"),
    "no root of n": (checks.paired_interval, either(root=0), r"no sqrt\(n\)"),
    "over n": (checks.paired_interval, either(root=1), r"divided by n, not by sqrt\(n\)"),
    "one standard error": (checks.paired_interval, one_error, "one standard error"),
    "whole width": (checks.paired_interval, either(factor=2), "the whole width"),
    "one-sided": (checks.paired_interval, either(q=0.95), "one-sided"),
    "n degrees of freedom": (checks.paired_interval, either(freedom=0), "n - 1 degrees of freedom"),
    "sign": (checks.paired_interval, either(sign=-1), "the sign"),
    "absolute": (
        checks.paired_interval,
        lambda a, b: interval(dict.fromkeys(a, 0) | {s: abs(a[s] - b[s]) for s in a.keys() & b}, dict.fromkeys(b, 0)),
        "absolute differences",
    ),
    "paired by place": (checks.paired_interval, either(place=True), "paired by place"),
    "a seed too many": (checks.paired_interval, either(shared=False), "in one dict only"),
    "all seeds' means": (checks.paired_interval, all_seeds, "a seed that only one side has"),
    "percent as p": (checks.accuracy_error, lambda a, n: (a * (1 - a) / n) ** 0.5, "root of a negative number"),
    "fraction": (checks.accuracy_error, lambda a, n: error(a, n) / 100, "points are due"),
    "variance": (checks.accuracy_error, lambda a, n: error(a, n) ** 2, "the variance: its root"),
    "variance of a fraction": (checks.accuracy_error, lambda a, n: (error(a, n) / 100) ** 2, "of a fraction: its root"),
    "percent twice": (checks.accuracy_error, lambda a, n: 100 * error(a, n), "100 times too large"),
    "one answer": (checks.accuracy_error, lambda a, n: error(a, 1), "the spread of one answer"),
    "95 %": (checks.accuracy_error, lambda a, n: 1.96 * error(a, n), "the half width"),
    "at worst": (checks.accuracy_error, lambda a, n: error(50, n), "the error at 50 %"),
    "by test score": (checks.choose, lambda s: choose(s, by="test"), "chosen by the mean test score"),
    "by best test run": (checks.choose, lambda s: choose(s, by="test", rule=max), "best single test score"),
    "by best run": (checks.choose, lambda s: choose(s, rule=max), "best single held-out run"),
    "by median": (checks.choose, lambda s: choose(s, rule=statistics.median), "chosen by the median"),
    "by sum": (checks.choose, lambda s: choose(s, rule=sum), "chosen by the sum"),
    "by the lowest score": (checks.choose, lambda s: choose(s, rule=min), "chosen by the lowest score"),
    "the lowest mean": (
        checks.choose,
        lambda s: choose(s, rule=lambda x: -statistics.mean(x)),
        "this has the lowest mean",
    ),
    "on shared seeds": (
        checks.choose,
        lambda s: choose({n: dict(x, **{"held-out": {0: x["held-out"][0]}}) for n, x in s.items()}),
        "compared on seeds that all have",
    ),
    "mean of seeds": (
        checks.choose,
        lambda s: choose({n: {k: dict(zip(x, x)) for k, x in parts.items()} for n, parts in s.items()}),
        "a mean of the seeds themselves",
    ),
    "tested on held-out seeds": (
        checks.choose,
        lambda s: (choose(s)[0], statistics.mean(s["right"]["test"][seed] for seed in s["right"]["held-out"])),
        "no seed 3: held-out and test runs",
    ),
    "on seeds of both": (
        checks.choose,
        lambda s: (
            choose(s)[0],
            statistics.mean(y for x, y in s["right"]["test"].items() if x in s["right"]["held-out"]),
        ),
        "only the seeds of the held-out runs",
    ),
    "reports held-out": (checks.choose, lambda s: choose(s, report="held-out"), "the held-out mean was returned"),
    "reports the best": (checks.choose, lambda s: choose(s, how=max), "the best test run was returned"),
    "reports another's": (checks.choose, two_choices, "of another setting"),
}
RIGHT = {checks.paired_interval: interval, checks.accuracy_error: error, checks.choose: choose}
