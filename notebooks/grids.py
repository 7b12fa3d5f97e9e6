"""The grids of study.py: what each study runs.

A study is {row: (flags of train.py, or None to start from random weights; flags of finetune.py)}. Its rows are compared
with the first one, or with the first of those that share what stands before a colon. Studies ending in `tune` choose
rates for the others, on held-out training images. EVIDENCE lists the comparisons that answer a question.
"""

from armamba import ORDERS

PRETRAINED, SCRATCH, LONG = "pretrained", "from scratch, same finetuning", "from scratch, the time of both stages"
HELD = "--holdout 300"
# Fashion-MNIST: 10,000 images with labels, or some of them, and 60,000 without; 2,000 others to choose rates
FASHION = "--preset fashion-mnist"
FASHION_HELD = f"{FASHION} --labels 1000 --max-steps 300 --holdout 2000"
BUDGETS = {100: 150, 1000: 300, 10000: 500}  # labels: finetuning steps; the pretraining takes the time of 450 more
# CIFAR-10, all of it: for a GPU; rates chosen after shorter runs
CIFAR = "--preset cifar10 --effective-batch 256"
CIFAR_LONG = f"{CIFAR} --epochs 10 --warmup-epochs 1"
CIFAR_HELD = f"{CIFAR} --labels 5000 --max-steps 300 --holdout 5000"
CIFAR_BUDGETS = {500: 200, 5000: 400, 50000: 800}  # 10 epochs of pretraining take an H100 the time of 710 more
CIFAR_TUNED = f"{CIFAR} --base-lr 2e-2", f"{CIFAR} --base-lr 5e-3"  # pretrained, from scratch
CIFAR_TENTH = f"{CIFAR_TUNED[0]} --labels 5000 --max-steps 400"
# masked.py, in about the time of 28 of ARM's epochs
QUARTER, HALF = "--visible 0.25 --epochs 56", "--visible 0.5 --epochs 42"

RATES = "4e-2", "8e-2", "1.6e-1", "3.2e-1"  # of finetuning

# what is predicted, by which decoder and in which order: flags of the model, and of the finetuning the rate that
# `tune` (for the default, once pretrained), `unit-tune` or `order-tune` found best
TWICE = "--base-lr 1.6e-1"
UNITS = {
    "clusters of 1x1": ("--cluster-size 1", ""),
    "clusters of 3x3": ("--cluster-size 3", TWICE),
    "pixels not normalised": ("--no-norm-pix", ""),
    "decoder of one block": ("--decoder-depth 1", TWICE),
    "decoder half as wide": ("--decoder-dim 32", ""),
    "patches of 3 pixels: clusters of 2x2": ("--patch-size 3 --cluster-size 2", ""),
    "patches of 3 pixels: clusters of 4x4": ("--patch-size 3 --cluster-size 4", TWICE),
}
OTHER_ORDERS = {order: (f"--order {order}", "" if order == "row-reversed" else TWICE) for order in ORDERS[1:]}

# labels and finetuning steps: the default run has 100 and 150
LENGTHS = {"100 labels, 150 steps": "", "100 labels, 300 steps": "--max-steps 300"}
LENGTHS |= {"100 labels, 600 steps": "--max-steps 600", "30 labels, 150 steps": "--labels 30"}
LONGER = "100 labels, 150 steps", "100 labels, 300 steps"  # also after longer pretraining
# size: flags of the model, and of its two sides: the rates that `size-tune` found best for them, if not the default's
SIZES = {
    "width 32": ("--d-model 32", "--base-lr 1.6e-1", ""),
    "width 64": ("", "", ""),
    "width 128": ("--d-model 128", "", "--base-lr 4e-2"),
    "depth 2": ("--depth 2", "", ""),
    "depth 8": ("--depth 8", "", "--base-lr 4e-2"),
}


def rates(*values: str, **sides: tuple) -> dict:
    """The same number of learning rates for both sides, on held-out training images."""
    rows = {name.replace("_", " "): flags for name, flags in sides.items()}
    return {f"{name}, base lr {x}": (pre, f"{ft} --base-lr {x}") for name, (pre, ft) in rows.items() for x in values}


def sides(kind: str, model: str, finetuning: str) -> dict:
    """The two sides of a comparison: a pretrained model, and the same from scratch."""
    return {f"{kind}pretrained": (model, finetuning), f"{kind}from scratch": (None, f"{model} {finetuning}".strip())}


def by_labels(model: str, own: tuple[str, str], budgets: dict[int, int], long: str, more: int) -> dict:
    """Both sides, each with its own flags of finetuning, with some and with all labels; and from scratch for longer."""
    kinds = (PRETRAINED, model, own[0], 0), (SCRATCH, None, own[1], 0), (long, None, own[1], more)
    return {
        f"{n} labels: {name}": (pre, f"{finetuning} --labels {n} --max-steps {steps + extra}")
        for n, steps in budgets.items()
        for name, pre, finetuning, extra in kinds
    }


STUDIES = {
    "tune": rates(*RATES, **sides("", "", HELD))
    | rates("4e-2", "8e-2", **sides("short warm-up, ", "", f"{HELD} --warmup-epochs 5")),
    "default": {
        "pretrained": ("", ""),
        "from scratch, same finetuning": (None, ""),
        "from scratch, four directions": (None, "--directions 4"),
        "nearest neighbours on pixels": (None, "--probe pixels"),
        "logistic regression on pixels": (None, "--probe pixels"),
        "from scratch, the time of both stages": (None, "--max-steps 1700"),  # 1260 * 0.091 s / 0.073 s + 150
        "twice the finetuning: pretrained": ("", "--max-steps 300"),
        "twice the finetuning: from scratch": (None, "--max-steps 300"),
        "four directions: pretrained": ("", "--directions 4"),
        "four directions: from scratch, same finetuning": (None, "--directions 4"),
        "four directions: from scratch, the time of both stages": (None, "--directions 4 --max-steps 915"),
    },
    "fashion-tune": rates(
        "1e-2", "2e-2", "4e-2", pretrained=(FASHION, FASHION_HELD), from_scratch=(None, FASHION_HELD)
    ),
    "fashion": by_labels(FASHION, (FASHION, FASHION), BUDGETS, LONG, 450),
    "cifar10-tune": rates(
        *("2.5e-3", "5e-3", "1e-2", "2e-2"),
        pretrained=(f"{CIFAR} --epochs 4 --warmup-epochs 0.4", CIFAR_HELD),
        from_scratch=(None, CIFAR_HELD),
    ),
    "cifar10": by_labels(CIFAR_LONG, CIFAR_TUNED, CIFAR_BUDGETS, LONG, 800),
    "cifar10-parts": {  # at the rates of the first
        "four directions, copied": (CIFAR_LONG, CIFAR_TENTH),
        "one direction": (CIFAR_LONG, f"{CIFAR_TENTH} --directions 1"),
        "four directions, three of them fresh": (CIFAR_LONG, f"{CIFAR_TENTH} --fresh-directions"),
        "clusters of 1x1": (f"{CIFAR_LONG} --cluster-size 1", CIFAR_TENTH),
        "clusters of 4x4": (f"{CIFAR_LONG} --cluster-size 4", CIFAR_TENTH),
    },
    "frozen": {
        f"{kind}: {name}": (pre, f"--probe {what}")
        for kind in ("nearest neighbours", "linear classifier")
        for name, pre, what in (
            ("pretrained", "", "features"),
            ("random", None, "features"),
            ("pixels", None, "pixels"),
        )
    },
    "unit-tune": rates(*RATES, **{row: (model, HELD) for row, (model, _) in UNITS.items()}),
    "unit": {"clusters of 2x2 patches, pixels normalised": ("", TWICE)} | UNITS,
    "order-tune": rates(*RATES, **{row: (model, HELD) for row, (model, _) in OTHER_ORDERS.items()}),
    "order": {"row": ("", TWICE)} | OTHER_ORDERS,
    "directions-tune": rates(*RATES, **sides("four directions, ", "", f"{HELD} --directions 4")),
    "directions": {
        "pretrained: one direction": ("", ""),
        "pretrained: four directions, copied": ("", "--directions 4"),
        "pretrained: four directions, three of them fresh": ("", "--directions 4 --fresh-directions"),
        "from scratch: one direction": (None, ""),
        "from scratch: four directions": (None, "--directions 4"),
    },
    "masked-tune": {  # the pretraining's rate, four settings for each side
        f"{name}, base lr {x}": (f"{pre} --base-lr {x}".strip(), HELD)
        for name, pre, values in (
            ("autoregressive", "", ("1.2e-2", "2.4e-2", "4.8e-2", "9.6e-2")),
            ("masked, a quarter visible", QUARTER, ("1.2e-2", "2.4e-2", "4.8e-2")),
            ("masked, half visible", HALF, ("4.8e-2",)),
        )
        for x in values
    },
    "masked-finetuning-tune": rates(*RATES, masked=(f"{QUARTER} --base-lr 2.4e-2", HELD)),
    "masked": {
        "autoregressive": ("", ""),
        "masked, equal time": (f"{QUARTER} --base-lr 2.4e-2", ""),
        "masked, equal epochs": ("--visible 0.25 --base-lr 2.4e-2", ""),
        "from scratch": (None, ""),
    },
    "size-tune": rates(
        *RATES,
        **{
            side: flags
            for size, (model, *_) in SIZES.items()
            for side, flags in sides(f"{size}, ", model, HELD).items()
            if model
        },
    ),
    "size": {
        row: (pre, f"{finetuning} {rate}".strip())
        for size, (model, *own) in SIZES.items()
        for (row, (pre, finetuning)), rate in zip(sides(f"{size}: ", model, "").items(), own, strict=True)
    },
    "length": {row: flags for kind, words in LENGTHS.items() for row, flags in sides(f"{kind}: ", "", words).items()}
    | {
        f"{kind}: pretrained {words}": (pre, LENGTHS[kind])
        for kind, words, pre in (
            ("100 labels, 150 steps", "a quarter as long", "--epochs 7"),
            *((kind, "four times as long", "--epochs 112") for kind in LONGER),
        )
    },
}

# question, study, and the two rows whose difference answers it
FOUR = "four directions: "
EVIDENCE = (
    ("Ahead at equal finetuning?", "default", PRETRAINED, SCRATCH),
    ("Ahead at equal finetuning?", "default", PRETRAINED, "from scratch, four directions"),
    ("Ahead at equal total time?", "default", PRETRAINED, LONG),
    (
        "With twice the finetuning?",
        "default",
        *(f"twice the finetuning: {row}" for row in (PRETRAINED, "from scratch")),
    ),
    *(("With four directions?", "default", FOUR + PRETRAINED, FOUR + row) for row in (SCRATCH, LONG)),
    *(
        (question, "fashion", f"{n} labels: {PRETRAINED}", f"{n} labels: {row}")
        for question, row in (("On other images?", SCRATCH), ("On other images, at equal total time?", LONG))
        for n in BUDGETS
    ),
    *(("On photos?", "cifar10", f"{n} labels: {PRETRAINED}", f"{n} labels: {SCRATCH}") for n in CIFAR_BUDGETS),
    ("With fewer labels?", "length", *(f"30 labels, 150 steps: {row}" for row in (PRETRAINED, "from scratch"))),
    ("Only a head start?", "length", *(f"100 labels, 600 steps: {row}" for row in (PRETRAINED, "from scratch"))),
    *(
        (
            "Does longer pretraining help?",
            "length",
            f"{LONGER[0]}: {PRETRAINED} a quarter as long",
            f"{LONGER[0]}: {row}",
        )
        for row in (PRETRAINED, "from scratch")
    ),
    *(
        ("Does longer pretraining help?", "length", f"{kind}: {PRETRAINED} four times as long", f"{kind}: {row}")
        for kind in LONGER
        for row in (PRETRAINED, "from scratch")
    ),
    *(
        ("Frozen features?", "frozen", f"{kind}: {PRETRAINED}", f"{kind}: {row}")
        for kind in ("linear classifier", "nearest neighbours")
        for row in ("random", "pixels")
    ),
    *(
        (question, study, list(STUDIES[study])[0], row)
        for study, questions in {
            "unit": {
                "clusters of 1x1": "Cluster or patch?",
                "clusters of 3x3": "Larger clusters?",
                "pixels not normalised": "Normalised pixels?",
                "decoder of one block": "A lighter decoder?",
                "decoder half as wide": "A lighter decoder?",
            },
            "order": {row: "Does the order matter?" for row in list(STUDIES["order"])[1:]},
            "masked": {"masked, equal time": "Masked instead?", "masked, equal epochs": "Masked instead?"},
            "cifar10-parts": {
                "one direction": "On photos, four directions?",
                "four directions, three of them fresh": "On photos, copies or fresh starts?",
            },
        }.items()
        for row, question in questions.items()
    ),
    ("Larger clusters?", "unit", *(f"patches of 3 pixels: clusters of {s}x{s}" for s in (2, 4))),
    *(
        ("Four directions?", "directions", f"{side}: one direction", f"{side}: {four}")
        for side, four in (("pretrained", "four directions, copied"), ("from scratch", "four directions"))
    ),
    (
        "Copies or fresh starts?",
        "directions",
        *(f"pretrained: four directions, {start}" for start in ("copied", "three of them fresh")),
    ),
    *(("Do larger models need it more?", "size", f"{x}: {PRETRAINED}", f"{x}: from scratch") for x in SIZES),
)
