"""Pretrain a vision Mamba by predicting the next cluster of patches; and all that finetune.py shares with it.

    python train.py                                           # handwritten digits, minutes on a laptop
    python train.py --preset cifar10                          # or fashion-mnist; downloaded on first use
    python train.py --preset imagenet-base --data IMAGENET    # the paper's recipe; IMAGENET holds train/ and val/
    torchrun --nproc-per-node 8 train.py --preset imagenet-base --data IMAGENET
    python train.py --data FOLDER --image-size 96 --patch-size 8    # any folder of images, labelled or not
    python train.py --output-dir runs/mine --resume           # go on after a stop, to the very same weights

A preset is a set of defaults, any flag overrides it, and the resolved configuration is printed and kept in every
checkpoint. What is random (weights, crops, order) is drawn from the seed and from what it is for (epoch, image, step),
never from how the run got there: so a resumed run, or one with more workers, sees the same. Mixup and stochastic depth
are drawn for each forward pass: as many processes, or as many accumulated passes, give the same.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads that spin stall a shared machine

import argparse
import errno
import itertools
import json
import math
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from urllib.error import URLError

import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

if os.name != "nt":  # Windows has neither
    import fcntl
    import resource

from armamba import ARM, ORDERS, VARIANTS, ARMConfig, from_clusters, patchify, scan_backend, unpatchify

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # as torchrun tells
RANK = int(os.environ.get("RANK", 0)) if PROCESSES > 1 else 0

# --- Presets and arguments --------------------------------------------------------------------------------------------

# The paper's recipe; 40 epochs of warm-up are those of the released commands, the paper says 5 (--warmup-epochs 5)
IMAGENET = dict(image_size=192, patch_size=16, cluster_size=4, min_crop=0.2, flip=True, epochs=1600, warmup_epochs=40)
IMAGENET |= dict(variant="base", effective_batch=2048, base_lr=1.5e-4)
SMALL = dict(image_size=32, patch_size=4, cluster_size=2, min_crop=0.4, flip=True, epochs=20, warmup_epochs=2)
WORKERS = 0 if os.name == "nt" else min(8, os.cpu_count() or 1)
SMALL |= dict(variant="micro", effective_batch=64, base_lr=1.2e-2, threads=1, num_workers=min(1, WORKERS))
PRESETS = {
    "digits": SMALL | dict(image_size=24, flip=False, epochs=28, warmup_epochs=1, effective_batch=32, base_lr=4.8e-2),
    "fashion-mnist": SMALL | dict(epochs=1, warmup_epochs=0.1),
    "cifar10": SMALL,
    "folder": SMALL | dict(image_size=64, patch_size=8, min_crop=0.2, num_workers=WORKERS),
    "imagenet-base": IMAGENET,
    "imagenet-large": IMAGENET | dict(variant="large", effective_batch=1024),
    # huge's recipe is not published: large's values, with the paper's batch and epochs
    "imagenet-huge": IMAGENET | dict(variant="huge", effective_batch=512, epochs=800),
}
SIZES = ("d_model", "depth", "d_state", "d_conv", "patch_size", "cluster_size")
SWITCH = argparse.BooleanOptionalAction
LIMITS = {  # what a flag's number may be
    "accum batch_size effective_batch epochs max_steps threads": (1, math.inf),
    "seed": (0, 2**63 - 1),
    "base_lr min_lr weight_decay clip_grad mixup cutmix num_workers save_every": (0, math.inf),
    "smoothing erasing ema": (0, 1),
    "min_crop eval_crop layer_decay": (0.001, 1),
}


def common_parser(description: str) -> argparse.ArgumentParser:
    """With the flags that pretraining and finetuning share."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="defaults for a task; digits if none is given")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="folder of images (with train/ and val/, or not), or where to download to; default data/")
    add("--image-size", type=int, nargs="+", metavar="N", help="pixels: one number, or height and width")
    add("--min-crop", type=float, help="smallest share of an image's area that a random crop keeps")
    add("--flip", action=SWITCH, help="mirror half of the images")
    add("--num-workers", type=int, default=WORKERS, help="data loading processes; default: up to 8, 1 for small images")
    add = parser.add_argument_group("model", "ARMConfig in armamba.py says what each size is").add_argument
    add("--variant", choices=tuple(VARIANTS), help="sizes that neither a preset nor a flag sets")
    for name in SIZES:
        add(f"--{name.replace('_', '-')}", type=int)
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=int)
    add("--max-steps", type=int, help="run this many optimiser steps instead, the whole schedule squeezed into them")
    add("--effective-batch", type=int, help="images per optimiser step, all processes together")
    add("--batch-size", type=int, help="images per process and forward pass; default: what --effective-batch asks for")
    add("--accum", type=int, default=1, help="forward passes per optimiser step")
    add("--base-lr", type=float, help="peak learning rate per 256 images of the effective batch")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end")
    add("--warmup-epochs", type=float)
    add("--weight-decay", type=float, default=0.05)
    add("--betas", type=float, nargs=2, default=(0.9, 0.95), metavar="B", help="of AdamW")
    add("--clip-grad", type=float, default=0.0, help="largest global gradient norm, 0 for none")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, help="default: a new folder under runs/")
    add("--resume", action="store_true", help="go on from the checkpoint in --output-dir, if there is one")
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these that is there")
    add("--threads", type=int, help="CPU threads of PyTorch; small models run best on one")
    add("--precision", choices=("bf16", "fp32", "fp64"), help="default: bf16 autocast on CUDA, fp32 elsewhere")
    add("--compile", action=SWITCH, default=False, help="torch.compile the model")
    add("--grad-checkpoint", action=SWITCH, default=False, help="recompute blocks in the backward pass, for memory")
    add("--save-every", type=float, default=10.0, metavar="MINUTES", help="what a crash can cost")
    return parser


def parse(parser: argparse.ArgumentParser, presets: dict, argv, **inherited) -> argparse.Namespace:
    """Resolve arguments: defaults, then the preset, then what is inherited, then flags."""
    given, _ = parser.parse_known_args(argv)
    preset = given.preset or inherited.get("preset") or ("folder" if given.data else "digits")
    if given.data and (preset == "digits" or preset != given.preset and preset in ("fashion-mnist", "cifar10")):
        raise ValueError(f"--data {given.data}, but the preset is {preset}: add --preset folder for images of your own")
    for name in ("flip", "min_crop", "eval_crop", "eval_resize") if preset == "digits" else ():
        if getattr(given, name, None) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: digits are placed at random, not cropped: leave it out")
    images = (given.batch_size or 0) * given.accum * PROCESSES
    if images and given.effective_batch and images != given.effective_batch:
        shares = f"--batch-size {given.batch_size} x {given.accum} accumulated x {PROCESSES} processes"
        raise ValueError(f"{shares} are {images}, not --effective-batch {given.effective_batch}: leave one out")
    defaults = presets[preset] | inherited | dict(preset=preset)
    if unknown := defaults.keys() - vars(given).keys():
        raise ValueError(f"preset {preset!r} sets unknown options: {', '.join(sorted(unknown))}")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    sizes = [args.image_size] if isinstance(args.image_size, int) else args.image_size
    args.image_size = (*sizes, *sizes) if len(sizes) == 1 else tuple(sizes)  # height and width
    args.betas = tuple(args.betas)  # as the default is
    for name, (low, high) in ((name, limits) for names, limits in LIMITS.items() for name in names.split()):
        if (value := getattr(args, name, None)) is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be from {low} to {high}: change it")
    if not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(f"--warmup-epochs {args.warmup_epochs} must be from 0 to below --epochs {args.epochs}: set it")
    return args


def model_config(args: argparse.Namespace, mode: str, **others) -> ARMConfig:
    """The variant's shapes with what flags say; channels follow the data."""
    given = {k: v for k, v in vars(args).items() if k in ARMConfig.__dataclass_fields__ and v is not None}
    return replace(VARIANTS[args.variant], **dict(taps=None, channels=len(mode), order_seed=args.seed) | given | others)


def pretraining_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("objective").add_argument
    add("--order", choices=ORDERS, default="row", help="in which the clusters are read and predicted")
    add("--order-seed", type=int, help="of the random order; default: --seed")
    add("--norm-pix", action=SWITCH, default=True, help="normalise the pixels of each target")
    add("--decoder-dim", type=int)
    add("--decoder-depth", type=int)
    add("--taps", type=int, nargs="+", help="encoder blocks that the decoder reads; default: evenly, the later half")
    parser.set_defaults(clip_grad=3.0)
    return parse(parser, PRESETS, argv)


# --- Data -------------------------------------------------------------------------------------------------------------

PIXELS = {"RGB": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), "L": ([0.449], [0.226])}  # mean, standard deviation
BICUBIC = v2.InterpolationMode.BICUBIC


class Digits(list):
    """scikit-learn's 1,797 real handwritten digits, 8x8 pixels; every fifth of each class is kept for testing."""

    classes = [str(i) for i in range(10)]

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits

        digits, seen = load_digits(), [0] * 10
        for image, target in zip(digits.images, digits.target.tolist()):
            seen[target] += 1
            if train == (seen[target] % 5 > 0):
                self.append((Image.fromarray((image * 255 / 16).round().astype("uint8")), target))
        self.targets = [target for _, target in self]


class Folder(datasets.ImageFolder):
    """Images below a folder. Its subfolders are the classes, numbers in numeric order; if it has images beside them, or
    no subfolders, all are one class."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        entries = [entry for entry in os.scandir(directory) if entry.name[0] != "."]
        loose = any(e.name.lower().endswith(datasets.folder.IMG_EXTENSIONS) and e.is_file() for e in entries)
        folders = [entry.name for entry in entries if entry.is_dir() and not loose]
        classes = sorted(folders, key=int if all(map(str.isdecimal, folders)) else None) or ["."]
        return classes, {name: i for i, name in enumerate(classes)}


def load_images(args: argparse.Namespace, train: bool) -> Dataset:
    """The dataset of PIL images and labels, with `classes`, `targets` and `mode`, which is "L" if up to
    a hundred images, evenly spaced, are all grey, else "RGB"."""
    root = Path(args.data or "data")
    if args.preset == "digits":
        data = Digits(train)
    elif args.preset in ("fashion-mnist", "cifar10") and not (args.data and (root / "train").is_dir()):  # not exported
        kind = datasets.CIFAR10 if args.preset == "cifar10" else datasets.FashionMNIST
        for turn in (True, False):  # the first process of each machine downloads, then the others read
            if turn == (os.environ.get("LOCAL_RANK", "0") == "0"):
                try:
                    data = kind(root, train=train, download=turn)
                except (RuntimeError, URLError) as error:
                    reason = str(error).partition("\n")[0]
                    raise ValueError(f"{reason} Is there a network? Or give --data a folder that has it") from None
            sum_over_processes(0).item()  # reading it waits for all, also on GPUs
    else:
        part = root / ("train" if train else "val")
        part = root if (train or getattr(args, "eval", False)) and not part.is_dir() else part
        if not args.data or not part.is_dir():
            raise ValueError(f"no folder of images at {part}: give --data a folder, with train/ and val/ to evaluate")
        if part.resolve() in (out := (args.output_dir or Path("runs")).resolve(), *out.parents):
            raise ValueError(f"{out} lies in {part}, whose images it would join: give an --output-dir elsewhere")
        try:
            data = Folder(part, loader=Image.open if args.preset.startswith("imagenet") else open_upright)
        except FileNotFoundError as error:
            raise ValueError(f"{part}: {error}") from None
    modes = set()
    for i in range(0, len(data), -(-len(data) // 100)):
        with suppress(Exception):  # broken images are dealt with when they are used
            modes.add(data[i][0].mode)
    data.mode = "L" if modes and modes <= {"1", "L", "LA", "I", "I;16", "I;16B"} else "RGB"
    return data


def open_upright(path: str) -> Image.Image:
    """As its EXIF says that it was held; ImageNet's protocol does not look at that."""
    image = Image.open(path)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def plain(image: Image.Image, mode: str) -> Image.Image:
    """Any kind of image as 8-bit "L" or "RGB": 16 bits are scaled down, what is transparent shows white."""
    if max(image.size) > 100 * min(image.size):  # resized for evaluation, it would fill the memory
        raise ValueError(f"{image.width}x{image.height} pixels, a line and no image: remove it")
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits at most
        raise ValueError("32-bit pixels, whose range is not known: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def random_crop(args: argparse.Namespace) -> list:
    """The augmentation that both stages share: a random resized crop and a flip; digits are placed freely instead."""
    if args.preset == "digits":  # turned by up to 14 degrees, moved by up to a fifth of the side, half to 3/4 as large
        place = v2.RandomAffine(14.3, (0.2, 0.2), (0.5, 0.75), interpolation=v2.InterpolationMode.BILINEAR)
        return [v2.Resize(args.image_size, BICUBIC), place]
    shape = args.image_size[1] / args.image_size[0]
    crop = v2.RandomResizedCrop(args.image_size, (args.min_crop, 1.0), (shape * 3 / 4, shape * 4 / 3), BICUBIC)
    return [crop, v2.RandomHorizontalFlip()] if args.flip else [crop]


def to_tensor(mode: str) -> list:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*PIXELS[mode])]


def seed_from(*key: int | str) -> int:
    """A seed for one purpose, such as ("augment", seed, epoch, image)."""
    return zlib.crc32(" ".join(map(str, key)).encode())


class Seeded(Dataset):
    """Some of the images, augmented; item (epoch, i) draws from (seed, epoch, image), whoever loads it and when.

    An image that cannot be read is named and counted. In training the next one takes its place, and more than 5 % of
    them are an error; for evaluation, `exact`, it comes as label -1, to be left out.
    """

    def __init__(self, data: Dataset, transform: list, seed: int, indices: list[int] | None = None, exact=False):
        self.data, self.transform, self.seed, self.exact = data, v2.Compose(transform), seed, exact
        self.indices = range(len(data)) if indices is None else indices
        self.names = [path for path, _ in getattr(data, "samples", [])] or range(len(data))
        self.broken = torch.zeros(len(data), dtype=torch.bool).share_memory_()  # one for all data loading processes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: tuple[int, int] | int) -> tuple[torch.Tensor, int]:
        epoch, i = draw if isinstance(draw, tuple) else (0, draw)
        while (item := self.read(self.indices[i])) is None:
            if self.exact:
                return self.transform(Image.new(self.data.mode, (8, 8))), -1
            i = (i + 1) % len(self)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from("augment", self.seed, epoch, self.indices[i]))
            return self.transform(item[0]), item[1]

    def read(self, index: int) -> tuple[Image.Image, int] | None:
        """An image and its label; None if it is broken."""
        try:
            image, label = self.data[index]
            return plain(image, self.data.mode), label
        except Exception as error:  # whatever a decoder may raise, but not what memory or storage do
            number = getattr(error, "errno", None)
            if isinstance(error, MemoryError) or number not in (None, errno.ENOENT, errno.EACCES):
                raise
            if not os.path.exists(root := getattr(self.data, "root", ".")):
                raise ValueError(f"the data folder {root} has vanished: bring it back, and --resume") from None
            if not self.broken[index]:
                self.broken[index] = True
                line = f"broken image {self.names[index]}: {error}"
                print(line.encode("ascii", "backslashreplace").decode(), flush=True)  # on any console
            broken = [str(self.names[i]) for i in self.broken.nonzero().flatten().tolist()]
            if not self.exact and len(broken) > max(1, 0.05 * len(self)):
                many = f"{len(broken)} of {len(self)} images are broken, more than 5 %"
                raise ValueError(f"{many}; repair or remove {', '.join(broken)}") from None


class TrainingBatches:
    """Batch sampler without end: from optimiser step `start` on, this process's share of every forward pass.

    Epoch e visits the images in an order drawn from (seed, e); an incomplete last batch is dropped. The images of an
    optimiser step do not depend on how many processes and forward passes share it.
    """

    def __init__(self, n: int, args: argparse.Namespace, start: int):
        self.n, self.size, self.accum, self.seed, self.start = n, args.batch_size, args.accum, args.seed, start
        self.effective = self.size * self.accum * PROCESSES
        self.per_epoch = n // self.effective  # optimiser steps
        if self.per_epoch == 0:
            many = f"{n} images do not fill one effective batch of {self.effective}"
            raise ValueError(f"{many}: lower --batch-size, --accum or --effective-batch")

    def __iter__(self):
        for epoch in itertools.count(self.start // self.per_epoch):
            generator = torch.Generator().manual_seed(seed_from("order", self.seed, epoch))
            order = torch.randperm(self.n, generator=generator)[: self.per_epoch * self.effective]
            steps = order.view(self.per_epoch, self.accum, PROCESSES, self.size)[:, :, RANK]
            for batch in steps[max(0, self.start - epoch * self.per_epoch) :].flatten(0, 1).tolist():
                yield [(epoch, index) for index in batch]


# --- Processes and devices --------------------------------------------------------------------------------------------


def say(*words) -> None:
    if RANK == 0:
        with suppress(OSError):  # who reads it may have gone
            print(*words, flush=True)


def sum_over_processes(value) -> torch.Tensor:
    """Of a number, a list or a tensor, in fp64."""
    on_gpu = PROCESSES > 1 and dist.get_backend() == "nccl"
    total = torch.as_tensor(value, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    if PROCESSES > 1:
        dist.all_reduce(total)
    return total


def set_up(args: argparse.Namespace) -> torch.device:
    """Choose device and precision, and join the other processes if torchrun started several."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    args.device = args.device or best
    if args.device not in (best, "cpu"):
        raise ValueError(f"--device {args.device} is not there: leave it out to take the best that is")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    torch.set_default_dtype(torch.float64 if args.precision == "fp64" else torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if PROCESSES > 1 and not dist.is_initialized():
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    shares = args.accum * PROCESSES
    args.batch_size = args.batch_size or args.effective_batch // shares
    if args.batch_size < 1:
        raise ValueError(f"--effective-batch {args.effective_batch} does not fill {shares} forward passes: raise it")
    return torch.device(args.device)


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext()


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_script(main) -> None:
    """Run a script's main(); a user's mistake is one line, not a traceback."""
    with suppress(AttributeError):  # there may be no console
        sys.stdout.reconfigure(errors="backslashreplace")  # names in any alphabet, on any console
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        *_, last = (str(error).strip() or repr(error)).splitlines()  # a data loading process sends its traceback before
        sys.exit(f"error: {last.removeprefix('ValueError: ')}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: lower --batch-size (--accum keeps the effective batch), --grad-checkpoint")
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {reason} Is memory short? Lower --num-workers, and go on with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --- The run's folder -------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint, ours or a released one, without running code that it may carry. Only ours has a "config"."""
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):  # torch.load does not look
            raise RuntimeError(f"the checksum of {part} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True) | {}  # an error if it is no dict
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint at {path}") from None
    except Exception as error:  # whatever reading something else may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]  # torch advises trust
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wants[1]}" if wants else reason
        raise ValueError(f"{path} is damaged, or no checkpoint that can be trusted: {reason}") from None
    if not isinstance(checkpoint.get("config"), dict) or not {"stage", "args"} <= checkpoint["config"].keys():
        checkpoint.pop("config", None)  # another project's, of any form
    return checkpoint


def newest_checkpoint(folder: Path) -> tuple[dict, Path | None]:
    """The newest checkpoint of a run that can be read, and its path; damaged ones are named."""
    for path in filter(Path.exists, (folder / "last.pt", folder / "previous.pt")):
        try:
            if "config" in (state := load_checkpoint(path)):
                return state, path
            say(f"{path} is of another project")
        except ValueError as error:
            say(error)
    return {}, None


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def ignore_signals(worker: int) -> None:
    """For data loading processes: the main one decides, and a worker that dies would take it along."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ending(stream):
    """End a DataLoader's processes, also after an error: Python would wait for them, as they ignore its signal."""
    try:
        yield
    finally:
        getattr(stream, "_shutdown_workers", int)()


class Run:
    """A folder with log.jsonl, last.pt, previous.pt and, at the end, results.json and pictures."""

    def __init__(self, args: argparse.Namespace, stage: str):
        if args.resume and args.output_dir is None:
            raise ValueError("--resume needs --output-dir, the folder of the run to go on with")
        self.folder = args.output_dir or Path("runs", f"{stage}-{args.preset}-{datetime.now():%Y%m%d-%H%M%S-%f}")
        self.home = self.folder  # of a comparison's second run, that of the first
        self.last, self.previous = self.folder / "last.pt", self.folder / "previous.pt"
        self.temporary, self.saved_at = self.folder / "last.pt.tmp", time.monotonic()
        self.stage, self.device, self.signal, self.broken = stage, args.device, None, 0
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "log.jsonl", "a+", newline="\n")
            try:  # a lock that ends with this process, and that data loading processes do not inherit
                os.name == "nt" or fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"another live run writes to {self.folder}: give another --output-dir") from None
            except OSError as error:
                say(f"no lock on {self.folder} ({error}): do not start a second run in it")
            self.temporary.touch()  # an error if checkpoints cannot be written here
            self.temporary.unlink()
        found = [path for path in (self.last, self.previous) if path.exists()]
        if stage in ("eval", "probe") and (found or (self.folder / "results.json").exists()):
            raise ValueError(f"{self.folder} holds a run or results: give another --output-dir")
        if found and not args.resume:
            raise ValueError(f"{self.folder} holds a run: add --resume to go on, or give another --output-dir")
        self.state, self.good = newest_checkpoint(self.folder)
        if found and not self.good:
            raise ValueError(f"{self.folder} has no checkpoint that can be read: repair or remove {found[0]}")
        if self.state and (was := self.state["config"]["stage"]) != stage:
            raise ValueError(f"{self.folder} holds a {was} run, and this is a {stage} run: give another --output-dir")
        if args.resume and not found:
            say(f"nothing to resume in {self.folder}: starting afresh")
        self.step = self.state.get("step", 0)
        if sum_over_processes(self.step) != self.step * PROCESSES:
            raise ValueError(f"processes found different checkpoints: put {self.folder} where all machines see it")
        if RANK == 0:  # keep the steps of the checkpoint; later ones, or half a line, will be written again
            self.file.seek(0)
            kept = itertools.takewhile(lambda x: x[-2:] == "}\n" and json.loads(x)["step"] <= self.step, self.file)
            self.file.truncate(sum(map(len, kept)))

    def begin(self, config: dict, parts: dict) -> float:
        """Load the state of the parts, which belong into a checkpoint, if there is one; returns the seconds so far."""
        self.config, self.parts = config, parts
        size = sum(x.nbytes for x in parts["model"].parameters()) * (len(parts) + 1)  # AdamW keeps two numbers for each
        need = (3 - self.last.exists() - self.previous.exists()) * size  # the last, the one before, and a new one
        if RANK == 0 and (free := shutil.disk_usage(self.folder).free) < need:
            sizes = f"{need / 2**20:.0f} MiB for checkpoints, and {free / 2**20:.0f} are free"
            raise ValueError(f"{self.folder} needs {sizes}: make room, or give another --output-dir")
        if not self.state:
            return 0.0
        data = ("effective_batch", "mode", "classes", "images")  # which may move, but not change
        mine, theirs = (c["args"] | {key: c.get(key) for key in data} for c in (config, self.state["config"]))
        free = "output_dir checkpoint resume data compare batch_size accum save_every".split()
        free += "device num_workers threads compile grad_checkpoint".split()
        pairs = {key: (theirs.get(key), mine.get(key)) for key in mine | theirs if key not in free}
        if differ := [f"{key} was {was}, is {value}" for key, (was, value) in pairs.items() if was != value]:
            raise ValueError(f"--resume with other settings ({'; '.join(differ)}): repeat the run's own flags")
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        seconds, self.state = self.state["seconds"], {}  # it is large
        return seconds

    def log(self, record: dict) -> None:
        if RANK == 0:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def on_signal(self, number: int, frame) -> None:
        """Ask for a checkpoint and an end after the current step; Ctrl-C twice ends at once."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def due(self, minutes: float) -> bool:
        """Whether to save now, because the time has come or a signal did; all processes agree."""
        return sum_over_processes(self.signal is not None or time.monotonic() - self.saved_at > 60 * minutes) > 0

    def save(self, step: int, seconds: float) -> None:
        """Write beside, flush, then rename: whenever the power goes, a whole checkpoint is there."""
        if RANK == 0:
            # rng: for those who go on with code of their own; here every step seeds it anew
            state = dict(step=step, seconds=seconds, config=self.config, rng=torch.get_rng_state())
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            try:
                with open(self.temporary, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:
                self.temporary.unlink(missing_ok=True)
                while not getattr(error, "errno", None) and error.__context__:  # torch's own words hide the disk's
                    error = error.__context__
                reason = str(error).splitlines()[0]
                raise OSError(f"cannot save step {step} ({reason}); older checkpoints are intact") from None
            os.fsync(self.file.fileno())
            if self.good == self.last:  # and not damaged
                os.replace(self.last, self.previous)
            os.replace(self.temporary, self.last)
            self.good = self.last
        self.saved_at = time.monotonic()
        if sum_over_processes(self.signal is not None) > 0:
            say(f"stopped by a signal, and saved; go on with the same flags, --output-dir {self.home} and --resume")
            sys.exit(0)

    def write_results(self, results: dict) -> dict:
        """With what they were measured on, and the most memory of this process (on the GPU, if that is used)."""
        info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.processor() or platform.machine()
        machine, unit = f"{name}, {os.cpu_count()} cores", 2**20 if sys.platform == "darwin" else 2**10
        peak = None if os.name == "nt" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
        if self.device == "cuda":
            machine, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() // 2**20
        results |= dict(stage=self.stage, machine=machine, date=time.strftime("%Y-%m-%d"), peak_memory_mib=peak)
        results |= dict(torch=torch.__version__, python=platform.python_version())
        if RANK == 0:
            temporary = self.folder / "results.json.tmp"
            temporary.write_text(json.dumps(results, indent=1, default=str) + "\n")
            os.replace(temporary, self.folder / "results.json")
        return results


# --- Optimiser, schedule and the loop, of both stages -----------------------------------------------------------------


def parameter_groups(model: torch.nn.Module, weight_decay: float, scale=lambda name: 1.0) -> list[dict]:
    """Groups for AdamW, one for each pair of weight decay and learning-rate scale; `scale` takes a parameter's name.

    Decay is for matrices and convolutions: not for A_log, which it would pull so that every A goes to -1, nor for D,
    tokens, positions, norms and biases. (The released code goes by the number of dimensions and decays A_log.)
    """
    groups = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith(("bias", "A_log", ".D", "_token", "pos_embed"))
        groups.setdefault((weight_decay if decays else 0.0, scale(name)), []).append(parameter)
    return [dict(params=params, weight_decay=decay, lr_scale=scale) for (decay, scale), params in groups.items()]


def learning_rate(epoch: float, epochs: float, warmup: float, peak: float, minimum: float) -> float:
    """Linear warm-up from 0, then half a cosine down to the minimum; times in epochs, fractions included."""
    if epoch < warmup:
        return peak * epoch / warmup
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


def fit(args, run: Run, model, loss_of, data: Seeded, optimizer, config: dict, ema=None) -> float:
    """Train to the end of the schedule or to a signal; returns the seconds it took, parts before a resume included.

    loss_of(net, images, labels) is the stage's loss; `net` is the model, compiled and wrapped as asked for.
    """
    batches, device = TrainingBatches(len(data), args, run.step), next(model.parameters()).device
    steps, peak = args.max_steps or args.epochs * batches.per_epoch, args.base_lr * batches.effective / 256
    config |= dict(effective_batch=batches.effective, stage=run.stage, images=len(data))
    config |= dict(args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    parts = dict(model=model, optimizer=optimizer) | (dict(model_ema=ema.module) if ema else {})
    before, began = run.begin(config, parts), time.monotonic()
    say("configuration:", *(f"{key}={value}" for key, value in sorted((config["args"] | config["model"]).items())))
    scan = "{} ({})".format(*scan_backend(args.device, model.config.d_state, torch.get_default_dtype()))
    say(f"{count(model):,} parameters, {args.device}, {args.precision}, torch {torch.__version__}, scan: {scan}")
    shares = f"{args.batch_size} x {args.accum} accumulated x {PROCESSES} processes"
    source = getattr(data.data, "root", args.preset)
    say(f"{len(data):,} images, {config['mode']}, of {source}; effective batch {batches.effective} = {shares}")
    say(f"{steps:,} steps, {batches.per_epoch:,} per epoch; peak learning rate {peak:.3g}; to {run.folder}")

    net = torch.compile(model) if args.compile else model
    net = torch.nn.parallel.DistributedDataParallel(net) if PROCESSES > 1 else net
    options = dict(num_workers=args.num_workers, worker_init_fn=ignore_signals, pin_memory=args.device == "cuda")
    bar = dict(unit="images", unit_scale=batches.effective, disable=RANK > 0)
    progress = tqdm(range(run.step, steps), initial=run.step, total=steps, **bar)
    with ExitStack() as stack:
        for number in SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, run.on_signal))
        stream = iter(DataLoader(data, batch_sampler=batches, **options))
        stack.enter_context(ending(stream))
        for step in progress:
            epoch = args.epochs * step / steps
            lr = learning_rate(epoch, args.epochs, args.warmup_epochs, peak, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss = 0.0
            for micro in range(args.accum):
                # what is random depends on the place in the effective batch, not on how processes share it
                torch.manual_seed(seed_from("step", args.seed, step, micro * PROCESSES + RANK))
                images, labels = (x.to(device, non_blocking=True) for x in next(stream))
                net.require_backward_grad_sync = micro == args.accum - 1  # processes exchange gradients once per step
                with autocast(args):
                    part = loss_of(net, images.to(torch.get_default_dtype()), labels) / args.accum
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf).item()
            loss = sum_over_processes(loss.item()).item() / PROCESSES  # a number first: MPS has no fp64
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"step {step + 1}: loss {loss}, norm {norm}, lr {lr:.3g}; lower --base-lr")
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(model)

            progress.set_postfix(step=step + 1, loss=f"{loss:.4f}", lr=f"{lr:.1e}", refresh=False)
            seconds = before + time.monotonic() - began
            run.log(dict(step=step + 1, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, seconds=round(seconds, 2)))
            if step + 1 == steps or run.due(args.save_every):
                run.save(step + 1, seconds)
    broken = sum_over_processes(data.broken) > 0  # an image can be found so by several
    run.step, run.broken = steps, int(broken.sum())
    return before + time.monotonic() - began


# --- Pretraining ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prediction_figure(arm: ARM, images: torch.Tensor, mode: str):
    """What is seen, true and predicted, for images (b, c, height, width) as the network sees them; one row each.

    With norm_pix the network predicts a patch up to its brightness and contrast. To show pixels these two are taken
    from the true patch, and the figure says so; without norm_pix nothing is borrowed.
    """
    import matplotlib.pyplot as plt

    config, size, n = arm.config, arm.config.cluster_size**2, len(images)
    tokens, prediction = arm.arrange(patchify(images, config.patch_size)), arm.predict(images)  # cluster after cluster
    seen, clusters = tokens.clone(), [1 + (i + 1) * (config.n_clusters - 1) // (n + 1) for i in range(n)]
    for row, k in zip(seen, clusters):  # one example a row, early to late
        row[k * size :] = 0  # grey, the mean colour
    columns = {"image": tokens, f"seen for {', '.join(str(k + 1) for k in clusters)}": seen}
    columns |= {"target": arm.target(images), "prediction": prediction}
    note = "Each cluster but the first is predicted from the true ones before it."
    if config.norm_pix:
        true = tokens[:, size:]
        columns["prediction, pixels"] = prediction * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, True)
        note += " Target and prediction are normalised; pixels borrow each true patch's mean and deviation."

    mean, deviation = (torch.tensor(x, device=images.device)[:, None, None] for x in PIXELS[mode])
    figure, axes = plt.subplots(1, len(columns), figsize=(1.8 * len(columns), 1.8 * n + 0.5), layout="constrained")
    for axis, (title, x) in zip(axes, columns.items()):
        x = torch.cat([torch.zeros_like(tokens[:, x.shape[1] :]), x], 1)  # the first cluster is not predicted: grey
        x = from_clusters(x, config.grid, config.cluster_size, arm.order)
        x = unpatchify(x, config.patch_size, config.image_size) * deviation + mean  # (b, c, height, width)
        axis.imshow(make_grid(x.clamp(0, 1), nrow=1, pad_value=1).permute(1, 2, 0).cpu().numpy())
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.supxlabel(note, fontsize=8)
    return figure


def main(argv: list[str] | None = None, objective=ARM, **options) -> dict:
    """Pretrain; returns what is also written to results.json. objective: ARM, or a variant of it, with its options."""
    args = pretraining_arguments(argv)
    vars(args).update(options, objective=objective.__name__)
    if args.preset == "imagenet-huge":
        say("note: the recipe for huge is not published; these are large's values")
    device, images = set_up(args), load_images(args, train=True)
    shape = model_config(args, images.mode)
    torch.manual_seed(seed_from("weights", args.seed))
    arm = objective(shape, **options).to(device)
    arm.encoder.grad_checkpoint = args.grad_checkpoint
    optimizer = torch.optim.AdamW(parameter_groups(arm, args.weight_decay), betas=args.betas, fused=True)
    data = Seeded(images, random_crop(args) + to_tensor(images.mode), args.seed)
    run, config = Run(args, "pretrain"), dict(model=asdict(shape), mode=images.mode, classes=images.classes)
    seconds = fit(args, run, arm, lambda net, x, _: net(x), data, optimizer, config)

    if RANK > 0:
        return {}
    import matplotlib.pyplot as plt

    run.file.seek(0)  # not opened anew: closing any handle would give up the lock
    records = [json.loads(line) for line in run.file] or [dict(step=run.step, loss=math.nan)]  # if the log is gone
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="0.2", linewidth=1)
    axes.set(xlabel="optimiser step", ylabel="training loss (mean squared error)")
    figure.savefig(run.folder / "loss.png", dpi=120)
    shown = torch.stack([data[len(data) * i // 4][0] for i in range(4)]).to(device, torch.get_default_dtype())
    if type(arm) is ARM:
        prediction_figure(arm.eval(), shown, images.mode).savefig(run.folder / "predictions.png", dpi=120)
    plt.close("all")
    results = dict(loss=records[-1]["loss"], seconds=round(seconds, 1), parameters=count(arm), broken=run.broken)
    results = run.write_results(results | dict(args=vars(args)))
    say(f"done in {seconds:.0f} s: loss {results['loss']:.4f}; look at the pictures in {run.folder}")
    unlabelled = args.data and len(images.classes) == 1
    where = " --data FOLDER    # with labels: train/ and val/, and in each a subfolder per class" if unlabelled else ""
    say(f"next: python finetune.py --checkpoint {shlex.quote(str(run.last))}{where}")
    return results


if __name__ == "__main__":
    run_script(main)
