"""Turn a pretrained vision Mamba into a classifier, train one from scratch, or evaluate one.

    python finetune.py                                        # newest pretraining run, then the same from scratch
    python finetune.py --checkpoint runs/X/last.pt --labels 60
    python finetune.py --from-scratch --preset digits
    python finetune.py --preset imagenet-base --data IMAGENET --checkpoint runs/X/last.pt
    python finetune.py --eval --checkpoint arm_base.pth --preset imagenet-base --data IMAGENET   # a released file

One scan direction becomes four (digits keep the one), the fixed positions become learned, and class token, final norm
and head start fresh. Datasets, schedule, checkpoints and the set-up of processes come from train.py.
"""

import train  # first, since it sets OMP_WAIT_POLICY before torch is imported

import argparse
import contextlib
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from armamba import ARM, DIRECTIONAL, ARMConfig, VisionMamba, load_official

IMAGENET = dict(image_size=224, epochs=100, warmup_epochs=5, effective_batch=1024, base_lr=5e-4, min_lr=1e-6)
IMAGENET |= dict(layer_decay=0.65, drop_path=0.1, ema=0.99992, randaugment=True, erasing=0.25, mixup=0.8, cutmix=1.0)
IMAGENET |= dict(min_crop=0.08, eval_crop=0.875)
LARGE = IMAGENET | dict(layer_decay=0.75, drop_path=0.3)  # also huge's, which is not published
DIGITS = dict(labels=100, epochs=50, warmup_epochs=25, base_lr=8e-2, layer_decay=0.8, betas=(0.9, 0.95), compare=True)
DIGITS |= dict(directions=1)  # half the time of the paper's four, and scores vary less from seed to seed
FASHION = dict(epochs=20, warmup_epochs=2, base_lr=2e-2, layer_decay=0.8)
SMALL = dict(epochs=20, warmup_epochs=2, base_lr=1.6e-2, layer_decay=0.75, drop_path=0.1, mixup=0.8, cutmix=1.0)
RECIPES = zip(train.PRESETS, (DIGITS, FASHION, SMALL, SMALL, IMAGENET, LARGE, LARGE), strict=True)
PRESETS = {name: train.PRESETS[name] | recipe for name, recipe in RECIPES}
# What differs when training from scratch: no layer-wise decay, since there is nothing below to protect. (Digits: on
# held-out images the same rate and warm-up, half of the steps, are best on both sides, notebooks/study.py tune.)
SCRATCH = dict(layer_decay=1.0)
SHAPE = ("variant", *train.SIZES)  # what a checkpoint has settled


def finetuning_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Arguments and checkpoint; what flags leave open (preset, data, sizes) is taken from the checkpoint."""
    parser = train.common_parser(__doc__.split("\n")[0])
    group = parser.add_argument_group("what to start from")
    either, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    either("--checkpoint", type=Path, help="ours or a released one; default: the newest finished pretraining run")
    either("--from-scratch", action="store_true", help="start from random weights, with a recipe of its own")
    add("--compare", action=train.SWITCH, default=False, help="then also train one from scratch")
    add("--weights", choices=("model", "model_ema"), default="model", help="which of a finetuned checkpoint's to take")
    add("--directions", type=int, choices=(1, 4), default=4)
    add("--fresh-directions", action="store_true", help="of a pretrained model: start the other three at random")
    add("--pool", choices=("mean", "cls"), default="mean")
    group = parser.add_argument_group("labels and evaluation")
    either, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    add("--labels", type=int, help="train on so many labelled images, balanced over classes; default all")
    add("--holdout", type=int, help="evaluate on so many other training images instead of the test set, for tuning")
    either("--eval", action="store_true", help="evaluate the checkpoint, a finetuned one, and do no training")
    add("--class-list", type=Path, help="folder names of all the checkpoint's classes in label order, for --eval")
    either("--probe", choices=("features", "pixels"), help="no training: neighbours and a linear model on these")
    add("--eval-crop", type=float, default=1.0, help="centre crop as a share of the short side, to 224 pixels")
    add("--eval-resize", choices=("keep", "squash"), default="keep", help="squash: as the released evaluation does")
    add = parser.add_argument_group("finetuning recipe").add_argument
    add("--layer-decay", type=float, default=1.0, help="factor of the learning rate from one block to the one below")
    add("--drop-path", type=float, default=0.0)
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--mixup", type=float, default=0.0, help="with --cutmix: alpha; each batch gets one or the other")
    add("--cutmix", type=float, default=0.0)
    add("--randaugment", action=train.SWITCH, default=False)
    add("--erasing", type=float, default=0.0, help="probability of random erasing")
    add("--ema", type=float, default=0.0, help="decay per step of an average of the weights, 0 for none")
    parser.set_defaults(betas=(0.9, 0.999))

    given, _ = parser.parse_known_args(argv)
    if given.from_scratch and (given.eval or given.fresh_directions or given.weights != "model"):
        raise ValueError("--eval, --fresh-directions, --weights need a --checkpoint, not --from-scratch: leave one out")
    if given.eval and given.labels or given.probe and (given.class_list or given.holdout):
        raise ValueError("--eval uses no --labels, and --probe neither --class-list nor --holdout: leave one out")
    if given.from_scratch:
        return train.parse(parser, PRESETS, argv, **SCRATCH), None
    begun = {}
    if given.resume and given.output_dir and not given.checkpoint:
        begun = train.newest_checkpoint(given.output_dir)[0]
    path = given.checkpoint or begun and begun["config"]["args"].get("checkpoint")
    path = Path(path or newest_finished(("finetune", "scratch") if given.eval else ("pretrain",)))
    checkpoint = train.load_checkpoint(path)
    if settled := [f"--{name.replace('_', '-')}" for name in SHAPE if getattr(given, name) is not None]:
        raise ValueError(f"{', '.join(settled)}: {path} has settled that; leave it out, or train --from-scratch")
    config = checkpoint.get("config", {})
    if not config and not given.preset:
        raise ValueError(f"{path} is a released file: say how it was trained, with --preset imagenet-base for one")
    args, usual = config.get("args", {}), {}
    if config.get("stage") == "pretrain":  # only what its flags said: finetuning has other values in its preset
        usual = vars(train.pretraining_arguments(["--preset", args["preset"]])) | dict(preset=None)
    names = ("preset", "data", "image_size", "flip", "directions", "pool", *SHAPE)
    inherited = {k: args[k] for k in names if k in args and (k in SHAPE or args[k] != usual.get(k))}
    if given.eval:  # --holdout depends on the seed
        inherited |= {k: args[k] for k in ("seed", "eval_crop", "eval_resize") if k in args}
    if given.preset not in (None, args.get("preset")):
        inherited.pop("data", None)  # it is another's
    return train.parse(parser, PRESETS, argv, checkpoint=path, **inherited), checkpoint


def newest_finished(stages: tuple[str, ...]) -> Path:
    """The checkpoint of the newest run of these stages under runs/ that has written its results."""
    found = []
    for path in Path("runs").glob("*/results.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # it may be of something else
            found += [path] if json.loads(path.read_text())["stage"] in stages else []
    if not found:
        script = "train.py" if "pretrain" in stages else "finetune.py"
        raise ValueError(f"no finished {stages[0]} run under runs/: run {script} first, or give --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime).with_name("last.pt")


def build_model(args: argparse.Namespace, checkpoint: dict | None, mode: str, classes: list[str]) -> VisionMamba:
    """The classifier to train or evaluate: from scratch, from a pretrained model, or a finetuned one."""
    shape = dict(directions=args.directions, pool=args.pool)
    if checkpoint is None:
        config = train.model_config(args, mode, decoder_depth=1)  # there is no decoder
        return VisionMamba(config, len(classes), drop_path=args.drop_path, **shape)
    train.say(f"starting from {args.checkpoint}")
    config = checkpoint.get("config", {})
    if "model" not in config:
        model = load_official(checkpoint, pool=args.pool, weights=args.weights)
    else:
        sizes, pretrained = ARMConfig(**config["model"]), config["stage"] == "pretrain"
        model = ARM(sizes) if pretrained else VisionMamba(sizes, len(config["classes"]), **config["classifier"])
        if args.weights not in checkpoint:
            raise ValueError(f"{args.checkpoint} has no {args.weights}: leave --weights out")
        model.load_state_dict(checkpoint[args.weights])
    if args.fresh_directions and not (isinstance(model, ARM) and args.directions == 4):
        found = f"--directions {args.directions} and {args.checkpoint}"
        raise ValueError(f"--fresh-directions with {found}: they need --directions 4 and a pretrained model, give both")
    if isinstance(model, ARM):
        if args.eval:
            raise ValueError(f"{args.checkpoint} is a pretrained model without a head: finetune it before --eval")
        model = VisionMamba.from_arm(model, len(classes), args.image_size, drop_path=args.drop_path, **shape)
        fresh = VisionMamba(model.config, len(classes), **shape).state_dict() if args.fresh_directions else {}
        for name in filter(DIRECTIONAL.search, fresh):  # one direction follows the other along the first axis
            first = len(fresh[name]) // args.directions
            model.state_dict()[name][first:] = fresh[name][first:]
        return model
    if dict(directions=model.directions, pool=model.pool) != shape:
        raise ValueError(f"{args.checkpoint} has {model.directions} directions and pool {model.pool}: leave these out")
    if model.num_classes != len(classes) and not args.probe:
        fix = "give --class-list its folder names in label order" if args.eval else "start from a pretrained one"
        raise ValueError(f"{len(classes)} class names for the {model.num_classes} classes of {args.checkpoint}: {fix}")
    return model.resized(args.image_size, args.drop_path)


def known_classes(args: argparse.Namespace, checkpoint: dict | None, classes: list[str]) -> list[str]:
    """Names of what the model's logits stand for: a list, what a finetuned checkpoint says, or the data's folders."""
    config = (checkpoint or {}).get("config", {})
    own = config["classes"] if "classifier" in config else None
    if not args.class_list:
        return own or classes
    try:
        named = list(filter(None, map(str.strip, args.class_list.read_text("utf-8-sig").splitlines())))
    except UnicodeDecodeError:
        raise ValueError(f"{args.class_list} is no UTF-8 text: save it as such") from None
    if not named:
        raise ValueError(f"{args.class_list} names no class: write one a line")
    if len(set(named)) < len(named) or own and set(own) == set(named) and own != named:
        raise ValueError(f"{args.class_list} names a class twice, or not in the order of {own}: correct it")
    return named


def logit_columns(known: list[str], classes: list[str]) -> list[int]:
    """The logits of the data's classes: by name, or by label where folders are numbers, as in ImageNet-V2."""
    if set(classes) <= set(known):
        return [known.index(name) for name in classes]
    columns = [int(name) for name in classes if name.isdecimal() and int(name) < len(known)]
    if len(set(columns)) == len(classes) and not any(name.isdecimal() for name in known):
        return columns
    new = ", ".join(sorted(set(classes) - set(known)))
    raise ValueError(f"the model does not know the classes {new}: remove them, or name all of its in --class-list")


def pick(targets: list[int], number: int | None, seed: int, holdout: int | None) -> tuple[list[int], list[int]]:
    """Indices of images drawn from the seed: labelled ones, as many of each class, and held-out ones, in proportion."""
    generator = torch.Generator().manual_seed(train.seed_from("labels", seed))
    by_class: dict[int, list[int]] = {}
    for i in torch.randperm(len(targets), generator=generator).tolist():
        by_class.setdefault(int(targets[i]), []).append(i)
    shares = sorted((turn / len(x), c, turn, i) for c, x in by_class.items() for turn, i in enumerate(x))
    rest = len(shares) - (holdout or 0)
    if not 0 <= rest <= len(shares) or number is not None and number < 1:
        raise ValueError(f"--labels {number}, --holdout {holdout}: choose from the {len(shares)} training images")
    held = [i for *_, i in shares[rest:]]  # the last share of each class
    labelled = sorted((turn, c, i) for _, c, turn, i in shares[:rest])  # one of each class, then a second of each, ...
    labelled = [i for *_, i in labelled][:number]
    if number and len(labelled) < number:
        raise ValueError(f"--labels {number}, but there are only {len(labelled)} training images beside the held-out")
    return labelled, held


def augmentation(args: argparse.Namespace, mode: str) -> list:
    """Crop, flip, RandAugment, to tensor, normalise, erase."""
    steps = train.random_crop(args)
    if args.randaugment:  # 11 bins, so that magnitude 9 is 0.9 of full strength; the default 31 would make it 0.3
        fill = (124, 116, 104) if mode == "RGB" else (114,)
        steps.append(v2.RandAugment(2, magnitude=9, num_magnitude_bins=11, interpolation=train.BICUBIC, fill=fill))
    erase = v2.RandomErasing(args.erasing, (0.02, 1 / 3), (0.3, 10 / 3), value="random")
    return steps + train.to_tensor(mode) + ([erase] if args.erasing else [])


def evaluation_transform(args: argparse.Namespace, mode: str) -> list:
    """Resize so that the crop is `eval_crop` of it (nothing is cut off above 224 px), then the centre crop."""
    if args.preset == "digits":
        return train.random_crop(args) + train.to_tensor(mode)  # placed as in training; where, the seed fixes
    ratio = 1.0 if max(args.image_size) > 224 else args.eval_crop
    size = [round(side / ratio) for side in args.image_size]
    if args.eval_resize == "squash" or size[0] == size[1]:
        resize = v2.Resize(size if args.eval_resize == "squash" else size[0], train.BICUBIC)
    else:  # as small as covers the crop
        resize = functools.partial(ImageOps.cover, size=size[::-1], method=Image.Resampling.BICUBIC)
    return [resize, v2.CenterCrop(args.image_size), *train.to_tensor(mode)]


@torch.no_grad()
def outputs(net, data: train.Seeded, draws, args: argparse.Namespace, device: torch.device):
    """Batches of net(images) and labels, of those draws of the data that can be read."""
    workers = dict(num_workers=args.num_workers, worker_init_fn=train.ignore_signals)
    stream = iter(DataLoader(data, args.batch_size, sampler=draws, **workers))
    with train.ending(stream):
        for x, y in stream:
            with train.autocast(args):
                x = net(x.to(device, torch.get_default_dtype())).float().cpu()
            yield x[y >= 0], y[y >= 0]  # broken images have no label


def evaluate(model, data: train.Seeded, args: argparse.Namespace, device: torch.device, columns=slice(None)) -> dict:
    """Top-1 and top-5 in percent, among the logits in `columns`. Each process takes its share of the images."""
    counts = torch.zeros(3, dtype=torch.float64)
    for logits, labels in outputs(model.eval(), data, range(train.RANK, len(data), train.PROCESSES), args, device):
        logits = logits[:, columns]
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts += torch.tensor([hits[:, 0].sum(), hits.sum(), len(labels)])
    top1, top5, n = train.sum_over_processes(counts).tolist()
    if n == 0:
        raise ValueError("no test image can be read: look at --data")
    return dict(top1=100 * top1 / n, top5=100 * top5 / n, images=int(n))


def probe(features, labelled: train.Seeded, held: train.Seeded, test: train.Seeded, args, device) -> dict:
    """Top-1 in percent of scikit-learn's classifiers on features(images); their settings are chosen on `held`.

    Digits, placed at random, are shown to the classifiers in five places each, and tested in one.
    """
    from sklearn import base, linear_model, neighbors, pipeline, preprocessing

    places, sets = 5 if args.preset == "digits" else 1, []
    for data, epochs in ((labelled, places), (held, 1), (test, 1)):
        draws = [(epoch, i) for epoch in range(epochs) for i in range(len(data))]
        sets.append([torch.cat(x).numpy() for x in zip(*outputs(features, data, draws, args, device))])
    seen, held, test = sets
    ks = [k for k in (1, 5, 20) if k <= len(seen[0])]
    knn = [neighbors.KNeighborsClassifier(k, metric=metric) for k in ks for metric in ("l2", "cosine")]
    linear = [linear_model.LogisticRegression(C=10.0**i, max_iter=3000) for i in range(-5, 2)]
    scalers = "passthrough", preprocessing.StandardScaler()
    results = dict(images=len(test[0]), labels=len(labelled))
    for name, models in dict(knn=knn, linear=linear).items():
        ways = [pipeline.make_pipeline(scaler, model) for model in models for scaler in scalers]
        fitted = [base.clone(way).fit(*seen) for way in ways]
        results[name] = 100 * max(fitted, key=lambda model: model.score(*held)).score(*test)
    return results


def layer_scale(depth: int, decay: float):
    """Learning-rate scale by parameter name: 1 for norm and head, times `decay` for each block further down."""

    def scale(name: str) -> float:
        if name.startswith("layers."):
            return decay ** (depth - int(name.split(".")[1]))
        return decay ** (depth + 1) if name.startswith(("patch_embed", "pos_embed", "cls_token")) else 1.0

    return scale


def train_one(args: argparse.Namespace, run: train.Run, model: VisionMamba, data: train.Seeded, classes: list[str]):
    """Train a classifier; returns the seconds it took, and the average of its weights if the recipe has one."""
    groups = train.parameter_groups(model, args.weight_decay, layer_scale(model.config.depth, args.layer_decay))
    optimizer, ema = torch.optim.AdamW(groups, betas=args.betas, fused=True), None
    if args.ema:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        ema.n_averaged.fill_(1)  # average from the first step on; by default that step would only copy
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=len(classes))] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=len(classes))] if args.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else v2.Identity()

    def loss_of(net, x, y):
        x, y = mix(x, y)
        y = y.to(x.dtype) if y.is_floating_point() else y  # if it was mixed
        return cross_entropy(net(x).to(x.dtype), y, label_smoothing=args.smoothing)  # never in bf16, as images are not

    config = dict(model=asdict(model.config), mode=data.data.mode, classes=classes)
    config |= dict(classifier=dict(directions=model.directions, pool=model.pool))
    return train.fit(args, run, model.train(), loss_of, data, optimizer, config, ema), ema


def run_one(args: argparse.Namespace, checkpoint: dict | None, mode_of_first: str | None = None) -> dict:
    """Train (unless --eval or --probe) and evaluate one classifier. The second run of a comparison lies in a folder of
    the first and takes its colours, not the data's."""
    device = train.set_up(args)
    images = train.load_images(args, train=not args.eval or bool(args.holdout))
    test = images if args.eval or args.holdout else train.load_images(args, train=False)
    classes, known = test.classes, known_classes(args, checkpoint, test.classes)
    if not args.eval and not images.classes == classes == (classes if args.probe else known):
        sets = {"to train on": images.classes, "to test on": classes, "of the checkpoint or list": known}
        names = ", ".join(f"{len(x)} {where} ({str(x):.60})" for where, x in sets.items())
        raise ValueError(f"classes differ, {names}: make them the same, a folder each in train/ and val/")
    if len(known) < 2:
        raise ValueError(f"a single class, {known}: --data needs a folder for each class, and no images beside them")
    columns = logit_columns(known, classes) if not args.probe else None
    torch.manual_seed(train.seed_from("weights", args.seed))
    model = build_model(args, checkpoint, mode_of_first or images.mode, known).to(device)
    model.grad_checkpoint = args.grad_checkpoint
    if images.mode == "RGB" and model.config.channels == 1:
        train.say("note: the model takes grey images, so colours are dropped")
    mode = images.mode = test.mode = "RGB" if model.config.channels == 3 else "L"  # an RGB model takes grey as RGB
    holdout = max(1, len(images) // 5) if args.probe else args.holdout
    labelled, held = pick(images.targets, None if args.eval else args.labels, args.seed, holdout)
    stage = "eval" if args.eval else "probe" if args.probe else "scratch" if args.from_scratch else "finetune"
    run, steps = train.Run(args, stage), evaluation_transform(args, mode)
    args.output_dir = run.folder  # the second run of a comparison goes below it, and on from it
    run.home = run.folder.parent if mode_of_first else run.folder
    tested = train.Seeded(test, steps, seed=0, indices=held if args.holdout else None, exact=True)

    results, seconds, ema = dict(mode=mode), 0.0, None
    if args.probe:
        labelled, held = (train.Seeded(images, steps, args.seed, part, exact=True) for part in (labelled, held))
        features = model.eval().features if args.probe == "features" else torch.nn.Flatten()
        results |= probe(features, labelled, held, tested, args, device)
    elif not args.eval:
        args.batch_size = max(1, min(args.batch_size, len(labelled) // (args.accum * train.PROCESSES)))
        data = train.Seeded(images, augmentation(args, mode), args.seed, labelled)
        seconds, ema = train_one(args, run, model, data, classes)
        results |= dict(labels=len(labelled), steps=run.step, broken=run.broken)
    if not args.probe:
        results |= evaluate(model, tested, args, device, columns) | dict(seconds=round(seconds, 1))
    if ema:
        results["ema"] = evaluate(ema.module, tested, args, device, columns)
    skipped = results["skipped"] = len(tested) - results["images"]
    if skipped and args.preset.startswith("imagenet"):
        raise ValueError(f"{skipped} of {len(tested)} test images are broken: repair them, a result needs them all")
    results |= dict(parameters=train.count(model), model=asdict(model.config), args=vars(args))
    results = run.write_results(results)
    scores = dict(top1="top-1 (%)", top5="top-5 (%)", knn="nearest neighbours (%)", linear="linear classifier (%)")
    names = [name for name in scores if name in results]
    start = "from scratch" if args.from_scratch else f"from {args.checkpoint}"
    rows = [["", *(scores[name] for name in names), "images", "skipped"], ["---"] * (len(names) + 3)]
    for title, found in {start: results, "averaged weights": results.get("ema")}.items():
        rows += [[title, *(f"{found[name]:.1f}" for name in names), found["images"], skipped]] if found else []
    train.say("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    train.say(f"see {run.folder}/results.json")
    return results


def main(argv: list[str] | None = None) -> dict:
    """Finetune or evaluate; returns what is also written to results.json, with --compare both runs' as one."""
    argv = sys.argv[1:] if argv is None else argv
    args, checkpoint = finetuning_arguments(argv)
    results = run_one(args, checkpoint)
    if args.compare and not (args.from_scratch or args.eval or args.probe):
        flags = {word.partition("=")[0] for word in argv}  # those override the recipe from scratch too
        recipe = {k: v for k, v in SCRATCH.items() if f"--{k.replace('_', '-')}" not in flags}
        sizes = {name: results["model"][name] for name in train.SIZES}  # the checkpoint's
        scratch = argparse.Namespace(**vars(args) | recipe | sizes | dict(from_scratch=True, checkpoint=None))
        scratch.output_dir = args.output_dir / "from-scratch"
        results["scratch"] = run_one(scratch, None, results["mode"])
        gain = f"{results['top1'] - results['scratch']['top1']:+.1f} points"
        train.say(f"pretraining: {gain} over the same training from scratch, {results['labels']} labels, one seed")
    return results


if __name__ == "__main__":
    train.run_script(main)
