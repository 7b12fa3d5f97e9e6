"""What can go wrong in a long run, done on purpose: what the user is told, and that nothing is lost."""

import contextlib
import errno
import functools
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import ROOT, TINY, classify, in_empty_folder, load, log, make_folder, pretrain, same, script  # noqa: F401

import finetune
import train

SMALL = ["--image-size", 16, "--patch-size", 4, "--batch-size", 4]
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks, limits or signals")


def says(main) -> str:
    """The one line with which a script ends when main() fails."""
    with pytest.raises(SystemExit) as end:
        train.run_script(main)
    message = str(end.value)
    assert message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


def break_images(root, part, number) -> list[str]:
    """Make some files of every class unreadable, each in another way; returns their paths."""
    paths = [p for folder in sorted(Path(root, part).iterdir()) for p in sorted(folder.iterdir())[:number]]
    for i, path in enumerate(paths):
        data = path.read_bytes()
        path.write_bytes([b"", b"this is not an image", data[: len(data) // 2]][i % 3])
    return [str(path) for path in paths]


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_once_and_replaced_by_the_next(workers, capfd):
    root = make_folder("photos", per_class=25)
    broken = break_images(root, "train", 1)
    flags = ["--data", root, *SMALL, "--num-workers", workers, "--max-steps", 30]  # each image comes about twice
    results = pretrain(*flags, "--output-dir", "run")
    said = capfd.readouterr().out
    assert results["broken"] == 2 and all(said.count(f"broken image {path}: ") == 1 for path in broken)
    args = train.pretraining_arguments([*map(str, flags)])
    data = train.Seeded(train.load_images(args, True), train.random_crop(args) + train.to_tensor("RGB"), 0)
    assert torch.equal(data[3, 0][0], data[3, 1][0]) and not torch.equal(data[3, 1][0], data[3, 2][0])
    assert data[0, 49][1] == 1 and data[0, 25][1] == 1  # the second class starts with a broken one


def test_a_name_that_the_console_cannot_show_does_no_harm(capfd, monkeypatch):
    root = Path(make_folder("photos", per_class=30))
    Path(root, "train/cat/写真.png").write_text("no image")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    pretrain("--data", root, *SMALL, "--num-workers", 0, "--output-dir", "run")
    sys.stdout.seek(0)
    assert r"broken image photos/train/cat/\u5199\u771f.png" in sys.stdout.read()


def test_an_empty_folder_is_named():
    Path("photos/train/cat").mkdir(parents=True)
    assert "photos/train: Found no valid file for the classes cat" in says(lambda: pretrain("--data", "photos", *SMALL))


def test_a_world_without_torchrun_is_one_line():
    world = os.environ | dict(WORLD_SIZE="2")
    run = subprocess.run([sys.executable, ROOT / "train.py"], env=world, capture_output=True, text=True)
    assert run.returncode == 1 and "RANK expected, but not set" in run.stderr and "Traceback" not in run.stderr


def test_a_folder_may_be_named_like_an_image():
    for name in ("logo.png", "b"):
        Path("photos", name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(Path("photos", name, "1.png"))
    assert train.Folder("photos").classes == ["b", "logo.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_run_with_their_list(workers):
    root = make_folder("photos", per_class=20)
    broken = break_images(root, "train", 2)  # 4 of 40
    flags = ["--data", root, *SMALL, "--num-workers", workers, "--max-steps", 30]
    message = says(lambda: pretrain(*flags, "--output-dir", "run"))
    assert "3 of 40 images are broken, more than 5 %; repair or remove photos/train" in message
    assert sum(path in message for path in broken) == 3


def test_broken_images_are_left_out_of_evaluation_and_an_error_for_imagenet(capfd):
    root = make_folder("photos", per_class=6)
    flags = ["--data", root, *SMALL, "--num-workers", 0]
    whole = classify("--from-scratch", *flags, "--output-dir", "run")
    assert (whole["images"], whole["skipped"]) == (12, 0)
    broken = break_images(root, "val", 1)
    results = classify("--eval", "--checkpoint", "run/last.pt", "--data", root)
    said = capfd.readouterr().out
    assert (results["images"], results["skipped"]) == (10, 2) and all(path in said for path in broken)
    correct = results["top1"] * 10 / 100
    assert correct == pytest.approx(round(correct))
    again = ["--eval", "--checkpoint", "run/last.pt", "--preset", "imagenet-base", "--image-size", 16, "--data", root]
    assert "2 of 12 test images are broken" in says(lambda: classify(*again, "--num-workers", 0))


def test_images_of_every_kind_come_out_right(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 16).round().astype("uint8"), (8, 1))  # dark on the left
    grey, colour = Image.fromarray(ramp), Image.fromarray(np.stack([ramp, ramp // 2, 255 - ramp], 2))
    clear = Image.fromarray(np.stack([0 * ramp, np.where(ramp < 128, 0, 255).astype("uint8")], 2), "LA")
    wide = Image.fromarray(ramp.astype("uint16") * 257)
    cases = {
        "grey.png": (grey, ramp),
        "16-bit.png": (wide, ramp),
        "cmyk.jpg": (colour.convert("CMYK"), np.asarray(colour)),
        "palette.png": (grey.convert("P"), ramp),
        "alpha.png": (colour.convert("RGBA"), np.asarray(colour)),
        "transparent.png": (clear, np.where(ramp < 128, 255, 0)),  # black on the right, nothing on the left
        "bilevel.png": (Image.fromarray(ramp > 127), np.where(ramp > 127, 255, 0)),
    }
    for name, (image, want) in cases.items():
        image.save(tmp_path / name)
        mode = "L" if want.ndim == 2 else "RGB"
        got = np.asarray(train.plain(Image.open(tmp_path / name), mode)).astype(int)
        assert abs(got - want).max() <= (12 if name.endswith("jpg") else 1), name
    big_endian = b"P5 16 8 65535\n" + (ramp.astype(">u2") * 257).tobytes()  # Pillow says "I", 32 bits, of these
    (tmp_path / "only/x").mkdir(parents=True)
    for path in (tmp_path / "16-bit.pgm", tmp_path / "only/x/16-bit.pgm"):
        path.write_bytes(big_endian)
    args = train.pretraining_arguments(["--data", str(tmp_path / "only")])
    assert train.load_images(args, train=True).mode == "L"
    assert abs(np.asarray(train.plain(train.open_upright(tmp_path / "16-bit.pgm"), "L")).astype(int) - ramp).max() <= 1
    with pytest.raises(ValueError, match="2000x1 pixels, a line and no image"):
        train.plain(Image.new("L", (2000, 1)), "L")
    assert train.plain(Image.new("L", (1, 1)), "RGB").size == (1, 1)
    for mode in ("F", "I"):
        with pytest.raises(ValueError, match="32-bit pixels, whose range is not known: convert it"):
            train.plain(Image.new(mode, (8, 8)), "L")


def test_cameras_turn_images_of_a_folder_but_not_of_imagenet(tmp_path):
    folder = tmp_path / "photos/train/a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6  # held so that it has to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    for preset, size in ((), (20, 30)), (("--preset", "imagenet-base"), (30, 20)):
        args = train.pretraining_arguments(["--data", str(tmp_path / "photos"), *preset])
        assert train.load_images(args, train=True)[0][0].size == size


def test_odd_files(shared_data):
    files = sorted((shared_data / "data/odd-images").glob("*.*g"))
    if not files:
        pytest.skip("no odd images in the shared data")
    broken, pixels_of = {"synthetic_empty.jpg", "synthetic_text.jpg", "truncated_jpeg.jpg"}, {}
    for path in files:
        if path.name in broken:
            with pytest.raises(Exception):  # noqa: B017, since decoders differ
                train.plain(train.open_upright(path), "RGB")
        else:
            pixels = pixels_of[path.name] = np.asarray(train.plain(train.open_upright(path), "RGB")).astype(int)
            assert pixels.shape[2] == 3 and pixels.std() > 20, path.name
    hopper, grey = pixels_of["hopper.jpg"], pixels_of["hopper_gray.jpg"]
    assert abs(pixels_of["hopper_orientation_6.jpg"] - hopper).mean() < 10
    assert abs(pixels_of["derived_gray16.png"] - grey).mean() < 2 and abs(grey - hopper).mean() < 40
    corner = pixels_of["pil_sample_cmyk.jpg"][0, 0]  # of a picture with a red corner on black; inverted it is cyan
    assert corner[0] > 200 and corner[1:].max() < 50


def test_a_data_folder_that_vanishes_is_said(monkeypatch):
    root = make_folder("photos", per_class=25)
    original = train.Run.log

    def vanish(run, record):
        original(run, record)
        shutil.rmtree(root, ignore_errors=True)

    monkeypatch.setattr(train.Run, "log", vanish)
    message = says(lambda: pretrain("--data", root, *SMALL, "--num-workers", 1, "--output-dir", "run"))
    assert "the data folder photos/train has vanished: bring it back, and --resume" in message


# ----------------------------------------------------------------------------------------------------------------------
# Processes and memory


@posix
def test_a_data_loading_process_that_dies_is_said(monkeypatch):
    def read(data, index):
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short

    monkeypatch.setattr(train.Seeded, "read", read)
    message = says(lambda: pretrain("--num-workers", 1, "--output-dir", "run"))
    assert "DataLoader worker" in message and "Lower --num-workers, and go on with --resume" in message


@pytest.mark.parametrize(
    "error", [RuntimeError("Error downloading x.gz:\nTried https://..."), urllib.error.URLError("no name")], ids=repr
)
def test_a_download_that_fails_is_said(error, monkeypatch):
    monkeypatch.setattr(train.datasets, "FashionMNIST", mock.Mock(side_effect=error))
    message = says(lambda: pretrain("--preset", "fashion-mnist", "--output-dir", "run"))
    assert str(error).splitlines()[0] in message and "Or give --data a folder that has it" in message


def test_a_reader_that_goes_away_costs_nothing(monkeypatch):
    """As in `train.py | head`: the words are lost, not the results."""
    monkeypatch.setattr("builtins.print", mock.Mock(side_effect=BrokenPipeError))
    pretrain("--output-dir", "run")
    assert classify("--checkpoint", "run/last.pt", "--output-dir", "ft")["images"] == 355
    assert Path("run/results.json").exists() and Path("ft/results.json").exists()


def test_a_name_that_the_console_cannot_show_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    train.run_script(lambda: print("写真"))
    sys.stdout.seek(0)
    assert sys.stdout.read() == "\\u5199\\u771f\n"


def test_signals_are_heeded_before_data_loading_processes_start(monkeypatch):
    """Python loses a Ctrl-C that arrives while it forks."""
    heeds, before = [], signal.getsignal(signal.SIGINT)  # ignored in a shell's background jobs
    monkeypatch.setattr(train, "DataLoader", lambda *_, **__: heeds.append(signal.getsignal(signal.SIGINT)) or [])
    with pytest.raises(StopIteration):  # there is no image
        pretrain("--output-dir", "run")
    assert heeds[0].__name__ == "on_signal" and signal.getsignal(signal.SIGINT) is before


def test_images_are_not_joined_by_the_runs_own_pictures(monkeypatch):
    root = make_folder("photos")
    monkeypatch.chdir(Path(root, "train"))
    assert "lies in ., whose images it would join" in says(lambda: pretrain("--data", ".", *SMALL))


def test_too_little_gpu_memory_is_said():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    assert "lower --batch-size (--accum keeps the effective batch)" in says(main)


def test_an_error_without_words_is_named():
    assert says(mock.Mock(side_effect=TimeoutError())) == "error: TimeoutError()"


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        train.run_script(main)


@posix
def test_two_live_runs_cannot_write_one_folder():
    flags = [*TINY, "--max-steps", "100000", "--output-dir", "run"]
    first = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stderr=subprocess.DEVNULL)
    try:
        while not (Path("run/log.jsonl").exists() and Path("run/log.jsonl").stat().st_size):
            assert first.poll() is None
            time.sleep(0.1)
        with pytest.raises(ValueError, match="another live run writes to run: give another --output-dir"):
            pretrain("--output-dir", "run", "--resume")
    finally:
        first.kill()
        first.wait()
    pretrain("--output-dir", "run", "--resume")  # at once: the lock has died with its process, not with its workers


# ----------------------------------------------------------------------------------------------------------------------
# Disks and files


def test_a_flipped_bit_in_a_checkpoint_is_found(capsys):
    pretrain("--save-every", 0, "--output-dir", "run")
    whole, data = load("run/last.pt"), bytearray(Path("run/last.pt").read_bytes())
    data[len(data) // 2] ^= 1  # inside a weight: such a file loads without complaint
    Path("run/last.pt").write_bytes(data)
    pretrain("--save-every", 0, "--output-dir", "run", "--resume")
    assert "run/last.pt is damaged" in capsys.readouterr().out
    assert same(load("run/last.pt")["model"], whole["model"])


@pytest.mark.parametrize("last", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("enforce fail")])
def test_the_disks_own_words_are_said(last, monkeypatch):
    """Torch's own error may come before the disk's or after it, by how full the disk is."""
    full = OSError(errno.ENOSPC, "No space left on device")
    first = RuntimeError("enforce fail") if isinstance(last, OSError) else full

    def save(*_):
        try:
            raise first
        except Exception:
            raise last  # noqa: B904

    monkeypatch.setattr(torch, "save", save)
    assert f"cannot save step 6 ({full})" in says(lambda: pretrain("--output-dir", "run"))


def test_a_folder_that_takes_no_checkpoint_is_refused_at_the_start(monkeypatch):
    def touch(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", touch)
    assert "Permission denied: 'run/last.pt.tmp'" in says(lambda: pretrain("--output-dir", "run"))
    assert not Path("run/log.jsonl").read_text()


def test_processes_end_after_an_error_in_evaluation(monkeypatch):
    monkeypatch.setattr(train.Seeded, "read", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    data = train.Seeded([0] * 8, train.to_tensor("L"), 0, exact=True)
    args = finetune.finetuning_arguments(["--from-scratch", "--batch-size", "2", "--num-workers", "1"])[0]
    with pytest.raises(OSError, match="Input/output error"):
        list(finetune.outputs(torch.nn.Identity(), data, range(8), args, torch.device("cpu")))
    assert not multiprocessing.active_children()


def test_a_stop_outside_training_is_one_word():
    with pytest.raises(SystemExit, match="^stopped$"):
        train.run_script(mock.Mock(side_effect=KeyboardInterrupt))


@posix
def test_a_full_disk_never_costs_a_checkpoint():
    import resource

    pretrain("--save-every", 0, "--max-steps", 4, "--output-dir", "run")
    kept = Path("run/previous.pt").read_bytes()
    Path("run/last.pt").write_bytes(kept)  # go on from step 3
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limits[1]))
    try:
        flags = ["--save-every", 0, "--max-steps", 4, "--output-dir", "run", "--resume"]
        message = says(lambda: pretrain(*flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot save step 4 ([Errno 27] File too large); older checkpoints are intact" in message
    assert Path("run/last.pt").read_bytes() == kept and not Path("run/last.pt.tmp").exists()


def test_too_little_space_and_bad_folders_are_said_at_the_start(monkeypatch):
    Path("file").write_text("")
    assert "file" in says(lambda: pretrain("--output-dir", "file/run"))
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    message = says(lambda: pretrain("--output-dir", "run"))
    assert "run needs 11 MiB for checkpoints, and 1 are free: make room" in message
    assert log("run") == []


def test_checkpoints_that_cannot_be_read_are_not_overwritten():
    pretrain("--save-every", 0, "--output-dir", "run")
    for name, data in (("last.pt", b""), ("previous.pt", b"no checkpoint")):
        Path("run", name).write_bytes(data)
    lines = log("run")
    message = says(lambda: pretrain("--output-dir", "run", "--resume"))
    assert "run has no checkpoint that can be read: repair or remove run/last.pt" in message and log("run") == lines


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one(monkeypatch):
    pretrain("--save-every", 0, "--output-dir", "run")
    good = Path("run/previous.pt").read_bytes()
    Path("run/last.pt").write_bytes(b"")
    renamed, replace = [], os.replace

    def watch(source, target):
        renamed.append((Path(source).name, Path(target).name))
        assert Path("run/previous.pt").read_bytes() == good  # at any moment at which the power may go
        replace(source, target)

    monkeypatch.setattr(train.os, "replace", watch)
    pretrain("--output-dir", "run", "--resume")
    assert renamed == [("last.pt.tmp", "last.pt"), ("results.json.tmp", "results.json")]


def test_storage_that_fails_is_no_broken_image(monkeypatch):
    def read(images, index):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(train.Digits, "__getitem__", read)
    assert "Input/output error" in says(lambda: pretrain("--num-workers", 0, "--output-dir", "run"))


def test_one_broken_image_of_few_does_not_stop_a_run():
    data = mock.MagicMock(mode="L", root=".", samples=[("a.png", 0), ("b.png", 1)], __len__=lambda self: 2)
    data.__getitem__.side_effect = lambda i: (Image.new("L", (8, 8)), 1) if i else 1 / 0
    assert train.Seeded(data, train.to_tensor("L"), 0)[0, 0][1] == 1
    data.__getitem__.side_effect = ZeroDivisionError
    with pytest.raises(ValueError, match="2 of 2 images are broken, more than 5 %"):
        train.Seeded(data, train.to_tensor("L"), 0)[0, 0]


def test_a_file_that_must_not_be_read_is_a_broken_image():
    data = mock.MagicMock(mode="L", root=".", samples=[("secret.png", 0)], __len__=lambda self: 1)
    data.__getitem__.side_effect = PermissionError(errno.EACCES, "Permission denied")
    assert train.Seeded(data, train.to_tensor("L"), 0, exact=True)[0][1] == -1


# ----------------------------------------------------------------------------------------------------------------------
# Slow


@pytest.mark.slow
@posix
def test_killed_thirty_times_it_ends_the_same(capsys):
    """At random moments, and every second time while a checkpoint is being written."""
    flags = [*TINY, "--max-steps", 120, "--batch-size", 8, "--accum", 2, "--save-every", 0, "--num-workers", 1]
    flags += "--from-scratch --no-compare --directions 4 --ema 0.9 --mixup 0.8 --cutmix 1".split()
    flags += "--drop-path 0.2 --erasing 0.3".split()
    script("finetune.py", *flags, "--output-dir", "whole")
    command = [sys.executable, ROOT / "finetune.py", *flags, "--output-dir", "parts", "--resume"]
    rng, steps, written = np.random.default_rng(0), [], 0
    for i in range(30):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = Path("parts/log.jsonl").read_text() if i else ""
        while process.poll() is None and (
            not Path("parts/log.jsonl").exists() or Path("parts/log.jsonl").read_text() == before
        ):
            time.sleep(0.01)  # until it has got further
        time.sleep(rng.uniform(0, 0.5))
        while i % 2 and process.poll() is None and not Path("parts/last.pt.tmp").exists():
            pass
        assert process.poll() is None, "it was done before it could be killed: more steps"
        process.send_signal(signal.SIGKILL)
        process.wait()
        written += Path("parts/last.pt.tmp").exists()
        steps.append(len(Path("parts/log.jsonl").read_text().splitlines()))
    script("finetune.py", *flags, "--output-dir", "parts", "--resume")
    with capsys.disabled():
        print(f"\n30 kills, {written} of them while a checkpoint was being written, after steps {steps}")
    assert written >= 5 and log("parts") == log("whole")
    for key in ("model", "model_ema", "optimizer"):
        assert same(load("parts/last.pt")[key], load("whole/last.pt")[key]), key
    whole, parts = (json.loads(Path(x, "results.json").read_text()) for x in ("whole", "parts"))
    assert whole["top1"] == parts["top1"] and whole["ema"] == parts["ema"]


def two_processes(*flags, limit="unlimited"):
    """Start train.py on two processes that may write files of at most `limit` KiB."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = f"ulimit -f {limit}; exec {shlex.join(map(str, (*torchrun, ROOT / 'train.py', *flags)))}"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(["bash", "-c", command], env=os.environ | dict(OMP_NUM_THREADS="1"), **options)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process by its environment in /proc")
@pytest.mark.parametrize("dies", [0, 1])
def test_when_one_of_two_processes_is_killed_the_run_ends_and_can_go_on(dies):
    flags = ["--device", "cpu", "--batch-size", 8, "--max-steps", 100, "--save-every", 0]
    two_processes(*flags, "--output-dir", "whole").communicate(timeout=300)
    run = two_processes(*flags, "--output-dir", "parts")
    while not (Path("parts/log.jsonl").exists() and len(Path("parts/log.jsonl").read_text().splitlines()) > 3):
        assert run.poll() is None
        time.sleep(0.02)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = os.readlink(path / "cwd") == os.getcwd()
            if here and f"RANK={dies}" in (path / "environ").read_text().split("\0"):
                os.kill(int(path.name), signal.SIGKILL)
    run.communicate(timeout=90)
    newest = max(load(path)["step"] for path in Path("parts").glob("*.pt"))  # between two renames there is no last.pt
    assert run.returncode != 0 and 3 <= newest < 100
    two_processes(*flags, "--output-dir", "parts", "--resume").communicate(timeout=300)
    assert log("parts") == log("whole") and same(load("parts/last.pt")["model"], load("whole/last.pt")["model"])


@pytest.mark.slow
@posix
def test_when_one_of_two_processes_cannot_save_the_run_ends_with_the_reason():
    """Only the first process writes; the other must not wait for it for ever."""
    pretrain("--output-dir", "small")
    limit = Path("small/last.pt").stat().st_size // 2048
    run = two_processes("--device", "cpu", "--batch-size", 8, "--output-dir", "run", "--save-every", 0, limit=limit)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0 and "cannot save step 1 (" in output and not list(Path("run").glob("*.pt*"))


@pytest.mark.slow
@posix
def test_the_readmes_batch_job_stops_in_time_and_goes_on(tmp_path):
    job = re.search(r"```bash scheduler\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    job = job.replace("--nproc-per-node 8", "--nproc-per-node 2").replace("train.py", str(ROOT / "train.py"))
    job = job.replace("$SECONDS -lt 3600", "$SECONDS -lt 1")
    tiny = " ".join([*TINY, "--batch-size", "4", "--max-steps", "60"])
    assert "--preset imagenet-base --data IMAGENET" in job
    Path("job.sh").write_text(job.replace("--preset imagenet-base --data IMAGENET", tiny))
    stand_ins = dict(srun='exec "$@"', scontrol="[ $1 = requeue ] && echo $2 >> requeued || echo localhost")
    for name, body in stand_ins.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = dict(SLURM_NNODES="1", SLURM_JOB_ID="77", SLURM_JOB_NODELIST="localhost", OMP_NUM_THREADS="1", PATH=path)
    start = functools.partial(subprocess.Popen, ["bash", "job.sh"], env=os.environ | slurm, stderr=subprocess.DEVNULL)
    first = start()
    while not (Path("runs/base/log.jsonl").exists() and len(log("runs/base")) > 3):
        assert first.poll() is None
        time.sleep(0.1)
    subprocess.run(["pkill", "-TERM", "-P", str(first.pid)], check=True)  # as Slurm does: the steps, not the shell
    first.wait(60)
    assert Path("requeued").read_text() == "77\n" and 3 < load("runs/base/last.pt")["step"] < 60
    assert start().wait(120) == 0
    assert load("runs/base/last.pt")["step"] == 60 and Path("requeued").read_text() == "77\n"
    assert [row[0] for row in log("runs/base")] == list(range(1, 61))
