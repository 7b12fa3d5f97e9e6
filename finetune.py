"""Turn a pretrained vision Mamba into a classifier, train one from scratch, or evaluate one.

    python finetune.py                                        # newest pretraining run, then the same from scratch
    python finetune.py --checkpoint runs/X/last.pt --labels 60
    python finetune.py --from-scratch --preset digits
    python finetune.py --preset imagenet-base --data IMAGENET --checkpoint runs/X/last.pt
    python finetune.py --eval --checkpoint arm_base.pth --preset imagenet-base --data IMAGENET   # a released file

One scan direction becomes four, the fixed positions become learned, and class token, final norm and head start fresh.
Datasets, schedule, checkpoints and the set-up of processes come from train.py.
"""

import train  # first, since it sets OMP_WAIT_POLICY before torch is imported

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from armamba import ARM, DIRECTIONAL, ARMConfig, VisionMamba, load_official

# `scratch` holds what differs when training from scratch: no layer-wise decay, since there is nothing below to protect;
# for digits also a rate of its own. Both of digits' rates were chosen on held-out images (notebooks/study.py tune).
IMAGENET = dict(image_size=224, epochs=100, warmup_epochs=5, effective_batch=1024, base_lr=5e-4, min_lr=1e-6)
IMAGENET |= dict(layer_decay=0.65, drop_path=0.1, ema=0.99992, randaugment=True, erasing=0.25, mixup=0.8, cutmix=1.0)
IMAGENET |= dict(min_crop=0.08, eval_crop=0.875, scratch=dict(layer_decay=1.0))
DIGITS = dict(labels=100, epochs=50, warmup_epochs=5, effective_batch=32, base_lr=8e-2, layer_decay=0.8)
DIGITS |= dict(compare=True, scratch=dict(layer_decay=1.0, base_lr=4e-2))
FASHION = dict(epochs=20, warmup_epochs=2, effective_batch=64, base_lr=2e-2, layer_decay=0.8)
FASHION |= dict(scratch=dict(layer_decay=1.0, base_lr=2e-2))
SMALL = dict(epochs=20, warmup_epochs=2, effective_batch=64, base_lr=4e-3, drop_path=0.1, layer_decay=0.75, mixup=0.8)
SMALL |= dict(cutmix=1.0, scratch=dict(layer_decay=1.0))
LARGE = IMAGENET | dict(layer_decay=0.75, drop_path=0.3)  # also huge's, which is not published
PRESETS = zip(train.PRESETS.items(), (DIGITS, FASHION, SMALL, SMALL, IMAGENET, LARGE, LARGE), strict=True)
PRESETS = {name: pretraining | preset for (name, pretraining), preset in PRESETS}

BICUBIC = v2.InterpolationMode.BICUBIC
SHAPE = ("variant", "d_model", "depth", "d_state", "patch_size", "cluster_size")  # what a checkpoint has settled


def finetuning_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Arguments and checkpoint; what flags leave open (preset, data, sizes) is taken from the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    train.add_common_arguments(parser)
    group = parser.add_argument_group("what to start from")
    either, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    either("--checkpoint", type=Path, help="ours or a released one; default: the newest finished pretraining run")
    either("--from-scratch", action="store_true", help="start from random weights, with a recipe of its own")
    add("--compare", action=argparse.BooleanOptionalAction, default=False, help="then also train one from scratch")
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
    add("--eval-crop", type=float, default=1.0, help="centre crop as a share of the resized short side")
    add("--eval-resize", choices=("keep", "squash"), default="keep", help="squash: as the released evaluation does")
    add = parser.add_argument_group("finetuning recipe").add_argument
    add("--layer-decay", type=float, default=1.0, help="factor of the learning rate from one block to the one below")
    add("--drop-path", type=float, default=0.0)
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--mixup", type=float, default=0.0, help="with --cutmix: alpha; each batch gets one or the other")
    add("--cutmix", type=float, default=0.0)
    add("--randaugment", action=argparse.BooleanOptionalAction, default=False)
    add("--erasing", type=float, default=0.0, help="probability of random erasing")
    add("--ema", type=float, default=0.0, help="decay per step of an average of the weights, 0 for none")
    parser.set_defaults(betas=(0.9, 0.999))

    loaded = {}

    def inherit(chosen: argparse.Namespace) -> dict:
        if chosen.from_scratch:
            if chosen.eval:
                raise ValueError("--eval --from-scratch would evaluate random weights: give a --checkpoint")
            return PRESETS[chosen.preset or ("folder" if chosen.data else "digits")]["scratch"]
        path = chosen.checkpoint or newest_finished("finetune" if chosen.eval else "pretrain")
        loaded.update(train.load_checkpoint(path))
        if given := [f"--{name.replace('_', '-')}" for name in SHAPE if getattr(chosen, name) is not None]:
            raise ValueError(f"{', '.join(given)}: {path} has settled that; leave it out, or train --from-scratch")
        config = loaded.get("config", {})
        if not config and not chosen.preset:
            raise ValueError(f"{path} is a released file: say how it was trained, with --preset imagenet-base for one")
        args = config.get("args", {})
        usual = train.PRESETS.get(args.get("preset"), {}) if config.get("stage") == "pretrain" else {}
        usual = usual | dict(image_size=train.pair(usual["image_size"])) if usual else {}
        names = ("preset", "data", "image_size", "flip", "directions", "pool", *SHAPE)
        return dict(checkpoint=path) | {k: args[k] for k in names if k in args and args[k] != usual.get(k)}

    presets = {name: {k: v for k, v in preset.items() if k != "scratch"} for name, preset in PRESETS.items()}
    return train.parse(parser, presets, argv, inherit), loaded or None


def newest_finished(stage: str) -> Path:
    """The checkpoint of the newest run under runs/ that has written its results."""
    found = sorted(Path("runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    found = [path.with_name("last.pt") for path in found if json.loads(path.read_text()).get("stage") == stage]
    if not found:
        raise ValueError(f"no finished {stage} run under runs/: run train.py first, or give --checkpoint")
    return found[-1]


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
    elif config["stage"] == "pretrain":
        model = ARM(ARMConfig(**config["model"]))
        model.load_state_dict(checkpoint["model"])
    else:
        model = VisionMamba(ARMConfig(**config["model"]), len(config["classes"]), **config["classifier"])
        model.load_state_dict(checkpoint[args.weights])
    if isinstance(model, ARM):
        if args.eval:
            raise ValueError(f"{args.checkpoint} is a pretrained model without a head: finetune it before --eval")
        model = VisionMamba.from_arm(model, len(classes), args.image_size, drop_path=args.drop_path, **shape)
        if args.fresh_directions:  # one direction follows the other along the first axis
            fresh = VisionMamba(model.config, len(classes), **shape).state_dict()
            for name, value in model.state_dict().items():
                if DIRECTIONAL.search(name):
                    first = len(value) // args.directions
                    value[first:] = fresh[name][first:]
        return model
    if args.fresh_directions:
        raise ValueError(f"--fresh-directions: {args.checkpoint} is no pretrained model, leave it out")
    if dict(directions=model.directions, pool=model.pool) != shape:
        raise ValueError(f"{args.checkpoint} has {model.directions} directions and pool {model.pool}: leave these out")
    if model.num_classes != len(classes) and not args.probe:
        wanted = f"a file of its {model.num_classes} folder names in label order"
        raise ValueError(f"{len(classes)} class names for {args.checkpoint}: give --class-list {wanted}")
    return model.resized(args.image_size, args.drop_path)


def known_classes(args: argparse.Namespace, checkpoint: dict | None, classes: list[str]) -> list[str]:
    """Names of what the model's logits stand for: a list, what a finetuned checkpoint says, or the data's folders."""
    if args.class_list:
        return [name.strip() for name in args.class_list.read_text().splitlines() if name.strip()]
    config = (checkpoint or {}).get("config", {})
    return config["classes"] if config.get("stage", "pretrain") != "pretrain" else classes


def logit_columns(known: list[str], classes: list[str]) -> list[int]:
    """The logits of the data's classes: by name, or by label where folders are numbers, as in ImageNet-V2."""
    if set(classes) <= set(known):
        return [known.index(name) for name in classes]
    if all(name.isdecimal() and int(name) < len(known) for name in classes):
        return [int(name) for name in classes]
    new = ", ".join(sorted(set(classes) - set(known)))
    raise ValueError(f"the model does not know the classes {new}: remove them, or name all of its in --class-list")


def pick(targets: list[int], number: int | None, seed: int, holdout: int | None) -> tuple[list[int], list[int]]:
    """Indices of labelled and of held-out images, both balanced over classes and drawn from the seed."""
    generator = torch.Generator().manual_seed(train.seed_from("labels", seed))
    by_class: dict[int, list[int]] = {}
    for i in torch.randperm(len(targets), generator=generator).tolist():
        by_class.setdefault(int(targets[i]), []).append(i)
    order = sorted((turn, c, i) for c, indices in by_class.items() for turn, i in enumerate(indices))
    indices = [i for _, _, i in order]  # one of each class, then a second of each, ...
    held = indices[len(indices) - holdout :] if holdout else []
    labelled = indices[: len(indices) - len(held)][:number]
    if number and len(labelled) < number:
        raise ValueError(f"--labels {number}, but there are only {len(labelled)} training images beside the held-out")
    return labelled, held


def augmentation(args: argparse.Namespace, mode: str) -> list:
    """Crop, flip, RandAugment, to tensor, normalise, erase."""
    steps = train.random_crop(args)
    if args.randaugment:  # 11 bins, so that magnitude 9 is 0.9 of full strength; the default 31 would make it 0.3
        fill = (124, 116, 104) if mode == "RGB" else (114,)
        steps.append(v2.RandAugment(2, magnitude=9, num_magnitude_bins=11, interpolation=BICUBIC, fill=fill))
    erase = v2.RandomErasing(args.erasing, (0.02, 1 / 3), (0.3, 10 / 3), value="random")
    return steps + train.to_tensor(mode) + ([erase] if args.erasing else [])


def evaluation_transform(args: argparse.Namespace, mode: str) -> list:
    """Resize so that the crop is `eval_crop` of it (nothing is cut off above 224 px), then the centre crop."""
    if train.dataset_name(args) == "digits":
        return train.random_crop(args) + train.to_tensor(mode)  # placed as in training; where, the seed fixes
    ratio = 1.0 if max(args.image_size) > 224 else args.eval_crop
    squash = v2.Resize([round(side / ratio) for side in args.image_size], BICUBIC)
    resize = squash if args.eval_resize == "squash" else v2.Resize(round(max(args.image_size) / ratio), BICUBIC)
    return [resize, v2.CenterCrop(args.image_size), *train.to_tensor(mode)]


@torch.no_grad()
def evaluate(
    model: VisionMamba, data: train.Seeded, args: argparse.Namespace, device: torch.device, columns=slice(None)
) -> dict:
    """Top-1 and top-5 in percent, among the logits in `columns`.

    Each process takes its share; every image counts exactly once, but for broken ones: they are `skipped`.
    """
    share = Subset(data, range(train.rank(), len(data), train.world_size()))
    loader = DataLoader(share, args.batch_size, num_workers=train.workers_for(args))
    top1 = top5 = n = 0
    model.eval()
    for images, labels in loader:
        with train.autocast(args):
            logits = model(images.to(device, torch.get_default_dtype()))[:, columns].float().cpu()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        top1, top5, n = top1 + ranked[:, 0].sum().item(), top5 + ranked.sum().item(), n + (labels >= 0).sum().item()
    top1, top5, n = (train.sum_over_processes(x) for x in (top1, top5, n))
    return dict(top1=100 * top1 / n, top5=100 * top5 / n) | counted(args, len(data), int(n))


def counted(args: argparse.Namespace, all_images: int, images: int) -> dict:
    """How many test images were used and skipped; ImageNet's numbers need all of them."""
    skipped = all_images - images
    if skipped and args.preset.startswith("imagenet"):
        raise ValueError(f"{skipped} of {all_images} test images are broken: repair them, a result needs them all")
    return dict(images=images, skipped=skipped)


def probe(features, labelled: train.Seeded, held: train.Seeded, test: train.Seeded, args, device) -> dict:
    """Top-1 in percent of scikit-learn's classifiers on features(images); their settings are chosen on `held`.

    Digits, placed at random, are shown to the classifiers in five places each, and tested in one.
    """
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def arrays(data, epochs=1):
        draws = [(epoch, i) for epoch in range(epochs) for i in range(len(data))]
        loader = DataLoader(data, args.batch_size, sampler=draws, num_workers=train.workers_for(args))
        with torch.no_grad(), train.autocast(args):
            pairs = [(features(x.to(device, torch.get_default_dtype())).float().cpu(), y) for x, y in loader]
        x, y = (torch.cat(parts).numpy() for parts in zip(*pairs))
        return x[y >= 0], y[y >= 0]  # broken images have no label

    n, places = len(test), 5 if train.dataset_name(args) == "digits" else 1
    fitted, held, test = arrays(labelled, places), arrays(held), arrays(test)
    knn = [KNeighborsClassifier(k, metric=x) for k in (1, 5, 20) if k <= len(fitted[0]) for x in ("l2", "cosine")]
    linear = [LogisticRegression(C=10.0**i, max_iter=3000) for i in range(-5, 2)]
    results = {}
    for name, models in dict(knn=knn, linear=linear).items():
        models = [make_pipeline(*x, clone(m)).fit(*fitted) for m in models for x in ((), (StandardScaler(),))]
        results[name] = 100 * max(models, key=lambda model: model.score(*held)).score(*test)
    return results | counted(args, n, len(test[0])) | dict(labels=len(labelled))


def layer_scale(depth: int, decay: float):
    """Learning-rate scale by parameter name: 1 for norm and head, times `decay` for each block further down."""

    def scale(name: str) -> float:
        if name.startswith(("patch_embed", "pos_embed", "cls_token")):
            number = 0
        else:
            number = int(name.split(".")[1]) + 1 if name.startswith("layers.") else depth + 1
        return decay ** (depth + 1 - number)

    return scale


def train_one(args: argparse.Namespace, run: train.Run, model: VisionMamba, data: train.Seeded, classes: list[str]):
    """Train a classifier; returns the seconds it took, and the average of its weights if the recipe has one."""
    ema = None
    groups = train.parameter_groups(model, args.weight_decay, layer_scale(model.config.depth, args.layer_decay))
    optimizer = torch.optim.AdamW(groups, betas=args.betas, eps=1e-8, fused=True)
    if args.ema:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        ema.n_averaged.fill_(1)  # average from the first step on; by default that step would only copy
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=len(classes))] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=len(classes))] if args.cutmix else []
    mix = v2.RandomChoice(mixes) if mixes else lambda x, y: (x, y)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing)

    def loss_of(net, x, y):
        x, y = mix(x, y)
        logits = net(x).to(x.dtype)  # of the images, which autocast leaves in fp32
        return criterion(logits, y.to(x.dtype) if y.is_floating_point() else y)

    config = dict(model=asdict(model.config), mode=data.data.mode, classes=classes)
    config |= dict(classifier=dict(directions=model.directions, pool=model.pool))
    return train.fit(args, run, model.train(), loss_of, data, optimizer, config, ema), ema


def run_one(args: argparse.Namespace, checkpoint: dict | None) -> dict:
    """Train (unless --eval or --probe) and evaluate one classifier."""
    device = train.set_up(args)
    images = train.load_images(args, train=True) if args.holdout or not args.eval else None
    test = images if args.holdout else train.load_images(args, train=False)
    classes, known = test.classes, known_classes(args, checkpoint, test.classes)
    if not args.eval and not images.classes == classes == (classes if args.probe else known):
        names = f"{images.classes} to train on, {classes} to test on, {known} in the checkpoint or list"
        raise ValueError(f"classes differ, {names}: make them the same")
    columns = logit_columns(known, classes) if not args.probe else None
    torch.manual_seed(train.seed_from("weights", args.seed))
    model = build_model(args, checkpoint, (images or test).mode, known).to(device)
    model.grad_checkpoint = args.grad_checkpoint
    mode = test.mode = "RGB" if model.config.channels == 3 else "L"  # grey images are made RGB for an RGB model
    labelled = held = []
    if images:
        images.mode = mode
        if args.probe and args.holdout:
            raise ValueError("--probe holds images out by itself, to choose its settings: leave --holdout out")
        holdout = len(images) // 5 if args.probe else args.holdout
        labelled, held = pick(images.targets, args.labels, args.seed, holdout)
    stage = "eval" if args.eval else "probe" if args.probe else "scratch" if args.from_scratch else "finetune"
    run, steps = train.Run(args, stage), evaluation_transform(args, mode)
    tested = train.Seeded(test, steps, seed=0, indices=held if args.holdout else None, exact=True)

    results = {}
    if args.probe:
        labelled, held = (train.Seeded(images, steps, args.seed, part, exact=True) for part in (labelled, held))
        features = model.eval().features if args.probe == "features" else torch.nn.Flatten()
        results = probe(features, labelled, held, tested, args, device)
    else:
        seconds, ema = 0.0, None
        if not args.eval:
            args.batch_size = min(args.batch_size, len(labelled))
            data = train.Seeded(images, augmentation(args, mode), args.seed, labelled)
            seconds, ema = train_one(args, run, model, data, classes)
            results = dict(labels=len(labelled), steps=run.step, broken=run.broken)
        results |= evaluate(model, tested, args, device, columns) | dict(seconds=round(seconds, 1))
        if ema:
            results["ema"] = evaluate(ema.module, tested, args, device, columns)
    start = "from scratch" if args.from_scratch else f"from {args.checkpoint}"
    scores = dict(top1="top-1", top5="top-5", knn="nearest neighbours", linear="linear classifier")
    for title, found in ((start, results), ("averaged weights", results.get("ema", {}))):
        said = ", ".join(f"{word} {found[name]:.1f} %" for name, word in scores.items() if name in found)
        if said:
            train.say(f"{title}: {said} of {found['images']} images ({found['skipped']} skipped)")
    train.say(f"see {run.folder}/results.json")
    return run.write_results(results | dict(parameters=train.count(model), args=vars(args)))


def main(argv: list[str] | None = None) -> dict:
    """Finetune or evaluate; returns what is also written to results.json."""
    argv = sys.argv[1:] if argv is None else argv
    args, checkpoint = finetuning_arguments(argv)
    results = run_one(args, checkpoint)
    if args.compare and not (args.from_scratch or args.eval or args.probe):
        flags = {word.partition("=")[0] for word in argv}  # those override the recipe from scratch too
        recipe = {k: v for k, v in PRESETS[args.preset]["scratch"].items() if f"--{k.replace('_', '-')}" not in flags}
        scratch = argparse.Namespace(**vars(args) | recipe | dict(from_scratch=True, checkpoint=None))
        scratch.output_dir = args.output_dir and args.output_dir / "from-scratch"
        results["scratch"] = run_one(scratch, None)
        gain = results["top1"] - results["scratch"]["top1"]
        setting = f"the same training from scratch, {results['labels']} labels, one seed"
        train.say(f"pretraining: {gain:+.1f} points over {setting}")
    return results


if __name__ == "__main__":
    train.run_script(main)
