"""The grids of study.py: what each study runs.

A study is {row: (flags of train.py, or None to start from random weights; flags of finetune.py)}. Its rows are compared
with the first one, or with the first of those that share what stands before a colon. Studies ending in `tune` choose
rates for the others, on held-out training images. EVIDENCE lists the comparisons that answer a question.
"""

from armamba import ORDERS

HELD = "--holdout 300"
# Fashion-MNIST: 10,000 images with labels, or some of them, and 60,000 without; 2,000 others to choose rates
FASHION = "--preset fashion-mnist"
FASHION_HELD = f"{FASHION} --labels 1000 --max-steps 300 --holdout 2000"
BUDGETS = {100: 150, 1000: 300, 10000: 500}  # labels: finetuning steps; the pretraining takes the time of 450 more
# masked.py, in about the time of 28 of ARM's epochs
QUARTER, HALF = "--visible 0.25 --epochs 56", "--visible 0.5 --epochs 42"

EARLIER = "--betas 0.9 0.999 --warmup-epochs 5"  # the recipe before the present one; `size` still has it
# labels and finetuning steps: the default run has 100 and 150
LENGTHS = {f"30 labels, {steps} steps": f"--labels 30 --max-steps {steps}" for steps in (150, 300, 600)}
LENGTHS |= {"100 labels, 150 steps": "", "100 labels, 300 steps": "--max-steps 300"}
LENGTHS |= {"100 labels, 600 steps": "--max-steps 600"}
LONGER = "100 labels, 150 steps", "100 labels, 600 steps", "30 labels, 600 steps"  # also after longer pretraining
# size: flags of the model, and the rates that `size-tune` found best for finetuning it and for training it from scratch
SIZES = {
    "width 32": ("--d-model 32", "1.6e-1", "8e-2"),
    "width 64": ("", "8e-2", "4e-2"),
    "width 128": ("--d-model 128", "8e-2", "4e-2"),
    "depth 2": ("--depth 2", "8e-2", "8e-2"),
    "depth 8": ("--depth 8", "1.6e-1", "4e-2"),
}


def rates(*values: str, **sides: tuple) -> dict:
    """The same number of learning rates for both sides, on held-out training images."""
    rows = {name.replace("_", " "): flags for name, flags in sides.items()}
    return {f"{name}, base lr {x}": (pre, f"{ft} --base-lr {x}") for name, (pre, ft) in rows.items() for x in values}


def sides(kind: str, model: str, finetuning: str) -> dict:
    """The two sides of a comparison: a pretrained model, and the same from scratch."""
    return {f"{kind}pretrained": (model, finetuning), f"{kind}from scratch": (None, f"{model} {finetuning}".strip())}


def both(kind: str, model: str, *lrs: str) -> dict:
    """The two sides with the earlier recipe, each at a learning rate of its own."""
    rows = sides(f"{kind}: ", model, EARLIER)
    return {row: (pre, f"{flags} --base-lr {lr}") for (row, (pre, flags)), lr in zip(rows.items(), lrs, strict=True)}


STUDIES = {
    "tune": rates("4e-2", "8e-2", "1.6e-1", "3.2e-1", **sides("present recipe, ", "", HELD))
    | rates("4e-2", "8e-2", **sides("short warm-up, ", "", f"{HELD} --warmup-epochs 5"))
    | rates("2e-2", "4e-2", "8e-2", "1.6e-1", **sides("earlier recipe, ", "", f"{HELD} {EARLIER}")),
    "default": {
        "pretrained": ("", ""),
        "from scratch, same finetuning": (None, ""),
        "nearest neighbours on pixels": (None, "--probe pixels"),
        "logistic regression on pixels": (None, "--probe pixels"),
        "from scratch, the time of both stages": (None, "--max-steps 915"),  # 1260 * 0.085 s / 0.14 s + 150
        "twice the finetuning: pretrained": ("", "--max-steps 300"),
        "twice the finetuning: from scratch": (None, "--max-steps 300"),
        "earlier recipe: pretrained": ("", f"{EARLIER} --base-lr 8e-2"),
        "earlier recipe: from scratch": (None, f"{EARLIER} --base-lr 4e-2"),
    },
    "fashion-tune": rates(
        "1e-2", "2e-2", "4e-2", pretrained=(FASHION, FASHION_HELD), from_scratch=(None, FASHION_HELD)
    ),
    "fashion": {
        f"{n} labels: {name}": (pre, f"{FASHION} --labels {n} --max-steps {steps + more}")
        for n, steps in BUDGETS.items()
        for name, pre, more in (
            ("pretrained", FASHION, 0),
            ("from scratch, same finetuning", None, 0),
            ("from scratch, the time of both stages", None, 450),
        )
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
    "unit": {
        "clusters of 2x2 patches, pixels normalised": ("", ""),
        "clusters of 1x1": ("--cluster-size 1", ""),
        "clusters of 3x3": ("--cluster-size 3", ""),
        "pixels not normalised": ("--no-norm-pix", ""),
        "decoder of one block": ("--decoder-depth 1", ""),
        "decoder half as wide": ("--decoder-dim 32", ""),
    }
    | {f"patches of 3 pixels: clusters of {s}x{s}": (f"--patch-size 3 --cluster-size {s}", "") for s in (2, 4)}
    | {
        f"earlier recipe: clusters of {s}x{s}": (pre, f"{EARLIER} --base-lr 8e-2")
        for s, pre in ((2, ""), (1, "--cluster-size 1"))
    },
    "order": {order: (f"--order {order}" if order != "row" else "", "") for order in ORDERS},
    "directions-tune": rates("4e-2", "8e-2", "1.6e-1", **sides("one direction, ", "", f"{HELD} --directions 1")),
    "directions": {
        "pretrained: four directions, copied": ("", ""),
        "pretrained: four directions, three of them fresh": ("", "--fresh-directions"),
        "pretrained: one direction": ("", "--directions 1"),
        "from scratch: four directions": (None, ""),
        "from scratch: one direction": (None, "--directions 1"),
    },
    "masked-tune": {  # four settings each
        f"{name}, base lr {x}": (f"{pre} --base-lr {x}".strip(), HELD)
        for name, pre, values in (
            ("autoregressive", "", ("1.2e-2", "2.4e-2", "4.8e-2", "9.6e-2")),
            ("masked, a quarter visible", QUARTER, ("1.2e-2", "2.4e-2", "4.8e-2")),
            ("masked, half visible", HALF, ("4.8e-2",)),
        )
        for x in values
    },
    "masked": {
        "autoregressive": ("", ""),
        "masked, equal time": (f"{QUARTER} --base-lr 2.4e-2", ""),
        "masked, equal epochs": ("--visible 0.25 --base-lr 2.4e-2", ""),
        "from scratch": (None, ""),
    },
    "size-tune": rates(
        *("2e-2", "4e-2", "8e-2", "1.6e-1"),
        **{
            side: flags
            for size, (model, *_) in SIZES.items()
            for side, flags in sides(f"{size}, ", model, f"{HELD} {EARLIER}").items()
            if model
        },
    ),
    "size": {row: flags for size, (model, *lr) in SIZES.items() for row, flags in both(size, model, *lr).items()},
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
PRETRAINED, SCRATCH, LONG = "pretrained", "from scratch, same finetuning", "from scratch, the time of both stages"
FOUR = "four directions, copied"
EVIDENCE = (
    ("Ahead at equal finetuning?", "default", PRETRAINED, SCRATCH),
    (
        "With twice the finetuning?",
        "default",
        f"twice the finetuning: {PRETRAINED}",
        "twice the finetuning: from scratch",
    ),
    ("With another recipe?", "default", f"earlier recipe: {PRETRAINED}", "earlier recipe: from scratch"),
    ("Ahead at equal total time?", "default", PRETRAINED, LONG),
    *(
        (question, "fashion", f"{n} labels: {PRETRAINED}", f"{n} labels: {row}")
        for question, row in (("On other images?", SCRATCH), ("On other images, at equal total time?", LONG))
        for n in BUDGETS
    ),
    ("With fewer labels?", "length", *(f"30 labels, 150 steps: {row}" for row in (PRETRAINED, "from scratch"))),
    *(("Only a head start?", "length", f"{kind}: {PRETRAINED}", f"{kind}: from scratch") for kind in LONGER[1:]),
    (
        "Does longer pretraining help?",
        "length",
        f"{LONGER[0]}: {PRETRAINED}",
        f"{LONGER[0]}: {PRETRAINED} a quarter as long",
    ),
    *(
        ("Does longer pretraining help?", "length", f"{kind}: {PRETRAINED} four times as long", f"{kind}: {row}")
        for kind in LONGER
        for row in (PRETRAINED, "from scratch")
    ),
    *(
        ("Frozen features?", "frozen", f"{kind}: {PRETRAINED}", f"{kind}: {row}")
        for kind, row in (
            ("linear classifier", "random"),
            ("nearest neighbours", "random"),
            ("nearest neighbours", "pixels"),
        )
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
        }.items()
        for row, question in questions.items()
    ),
    ("Cluster or patch?", "unit", *(f"earlier recipe: clusters of {s}x{s}" for s in (2, 1))),
    ("Larger clusters?", "unit", *(f"patches of 3 pixels: clusters of {s}x{s}" for s in (2, 4))),
    ("Four directions?", "directions", f"pretrained: {FOUR}", "pretrained: one direction"),
    ("Four directions?", "directions", "from scratch: four directions", "from scratch: one direction"),
    ("Ahead with one direction?", "directions", "pretrained: one direction", "from scratch: one direction"),
    ("Ahead with one direction?", "directions", "pretrained: one direction", "from scratch: four directions"),
    (
        "Copies or fresh starts?",
        "directions",
        f"pretrained: {FOUR}",
        "pretrained: four directions, three of them fresh",
    ),
    *(("Do larger models need it more?", "size", f"{x}: {PRETRAINED}", f"{x}: from scratch") for x in SIZES),
)
