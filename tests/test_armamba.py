"""armamba.py from top to bottom, except for the selective scan, which has test_scan.py to itself.

Wherever possible the expectation is computed a second time, in loops, from the paper's description. The last section
compares with numbers that the authors' computation gives.
"""

import argparse
import itertools
import math
import os
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import armamba
from armamba import ARM, ORDERS, VARIANTS, ARMConfig, Block, Mixer, VisionMamba, load_official, to_official

# 4x6 patches in 2x3 clusters, and no two sizes alike where that is possible
TINY = ARMConfig(
    image_size=(16, 24), patch_size=4, cluster_size=2, d_model=20, depth=3, d_state=5, decoder_dim=8, decoder_depth=2
)
DIRECTIONAL = "conv1d", "x_proj", "dt_proj", "A_log", "D"  # the parts of a mixer that every direction has for itself


def random_images(config: ARMConfig, b: int = 2) -> torch.Tensor:
    return torch.randn(b, config.channels, *config.image_size)


def assert_close(ours, theirs, tolerance: float = 1e-5):
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"largest error {error:.1e} of the largest value, allowed {tolerance:.0e}"


def without(x: torch.Tensor, i: int) -> torch.Tensor:
    """Tokens (b, l, d) without token i."""
    return torch.cat([x[:, :i], x[:, i + 1 :]], dim=1)


def assert_same_state(a: nn.Module, b: nn.Module):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": (192, 200)}, r"image_size \(192, 200\) is not divisible by patch_size 16"),
        ({"image_size": (192, 192, 192)}, r"image_size \(192, 192, 192\) must be one number or \(height, width\)"),
        ({"image_size": (192, 192.0)}, r"image_size \(width\) 192.0 must be a positive integer"),
        ({"image_size": 192.0}, "image_size.* 192.0 must be"),
        ({"patch_size": 16.0}, "patch_size 16.0 must be a positive integer"),
        ({"cluster_size": -1}, "cluster_size -1 must be a positive integer"),
        ({"depth": True}, "depth True must be a positive integer"),
        ({"d_model": 770}, "d_model 770 must be divisible by 4"),
        ({"decoder_dim": 66}, "decoder_dim 66 must be divisible by 4"),
        ({"decoder_dim": 200}, "decoder_dim 200 is not divisible by its 3 heads"),
        ({"order": "diagonal"}, "order 'diagonal' is unknown: choose one of row, row-reversed, column, random"),
        ({"order_seed": 1.5}, "order_seed 1.5 must be an integer"),
        ({"order_seed": 2**70}, "order_seed 1180591620717411303424 must be an integer of 64 bits"),
        ({"norm_pix": "false"}, "norm_pix 'false' must be True or False"),
        ({"decoder_depth": 13}, "decoder_depth 13 taps as many of only 12 encoder blocks"),
        ({"taps": (6, 8, 12)}, r"taps \(6, 8, 12\) must be 4 .decoder_depth. blocks"),
        ({"taps": (6, 8, 10, 11)}, "taps .* rising from 1 to 12"),
        *[({"taps": taps}, "taps .* rising from 1 to 12") for taps in (12, (), "abcd", (6.0, 8.0, 10.0, 12.0))],
        *[({"taps": taps}, "taps .* rising from 1") for taps in [(6, 10, 8, 12), (8, 8, 10, 12), (0, 8, 10, 12)]],
    ],
)
def test_config_errors_name_value_and_rule(wrong, message):
    with pytest.raises(ValueError, match=message):
        ARMConfig(**wrong)


def test_config_defaults():
    base = ARMConfig()
    assert base == VARIANTS["base"] and base.image_size == (192, 192) and base.grid == (12, 12)
    assert base.n_clusters == 9 and base.dt_rank == 48 and base.decoder_heads == 8
    assert base.taps == (6, 8, 10, 12) and VARIANTS["large"].taps == VARIANTS["huge"].taps == (12, 16, 20, 24)
    assert (TINY.grid, TINY.n_clusters, TINY.dt_rank, TINY.decoder_heads) == ((4, 6), 6, 2, 1)
    assert ARMConfig(taps=[1, 2, 3, 12]).taps == (1, 2, 3, 12)


def test_default_taps_are_distinct_and_end_at_the_last_block():
    for depth in range(1, 13):
        for blocks in range(1, depth + 1):
            taps = ARMConfig(depth=depth, decoder_depth=blocks).taps
            assert len(set(taps)) == blocks and taps[0] >= 1 and taps[-1] == depth


@pytest.mark.parametrize(
    "size, classifier, pretraining",
    [("base", 85_031_656, 99_243_008), ("large", 297_035_720, 303_721_696), ("huge", 662_682_088, 659_128_064)],
)
def test_parameter_counts(size, classifier, pretraining):
    with torch.device("meta"):
        models = VisionMamba(replace(VARIANTS[size], image_size=224), num_classes=1000), ARM(VARIANTS[size])
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [classifier, pretraining]


# ----------------------------------------------------------------------------------------------------------------------
# Patches, clusters, positions


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_patchify(size):
    images, columns = torch.randn(2, 3, *size), size[1] // 4
    patches = armamba.patchify(images, 4)
    assert patches.shape == (2, size[0] * size[1] // 16, 48)
    for i, row, column, c in itertools.product(range(patches.shape[1]), range(4), range(4), range(3)):
        pixel = images[:, c, i // columns * 4 + row, i % columns * 4 + column]
        assert torch.equal(patches[:, i, (row * 4 + column) * 3 + c], pixel)
    assert torch.equal(armamba.unpatchify(patches, 4, size), images)


def test_a_model_may_get_no_images_and_be_exported_for_any_number():
    for model in (ARM(TINY).eval(), VisionMamba(TINY, 5).eval()):
        images = torch.randn(4, TINY.channels, *TINY.image_size)
        assert len((model.predict if isinstance(model, ARM) else model)(images[:0])) == 0
        assert len(armamba.patchify(images[:0], 4)) == 0
        with torch.no_grad():
            any_number = {0: torch.export.Dim("b", min=2, max=1 << 20)}  # torch 2.6 needs to know the largest
            program = torch.export.export(model, (images[:2],), dynamic_shapes=(any_number,))
            torch.testing.assert_close(program.module()(images), model(images))


def tokens_by_cluster(config: ARMConfig) -> list[int]:
    """The raster numbers of all tokens in the order in which they are read."""
    (rows, columns), s = config.grid, config.cluster_size
    clusters = [(i, j) for i in range(rows // s) for j in range(columns // s)]
    if config.order == "row-reversed":
        clusters = clusters[::-1]
    if config.order == "column":
        clusters = [(i, j) for j in range(columns // s) for i in range(rows // s)]
    if config.order == "random":
        clusters = [clusters[i] for i in armamba.cluster_order(config)]
    return [(i * s + y) * columns + j * s + x for i, j in clusters for y in range(s) for x in range(s)]


@pytest.mark.parametrize("image_size", [(16, 24), (24, 8), 24])
@pytest.mark.parametrize("order", ORDERS)
def test_clusters(order, image_size):
    config = replace(TINY, order=order, image_size=image_size)
    x, args = torch.randn(2, math.prod(config.grid), 3), (config.grid, 2, armamba.cluster_order(config))
    clusters = armamba.to_clusters(x, *args)
    assert sorted(tokens_by_cluster(config)) == list(range(x.shape[1]))
    assert torch.equal(clusters, x[:, tokens_by_cluster(config)])
    assert torch.equal(armamba.from_clusters(clusters, *args), x)


def test_random_order_depends_on_its_seed_alone():
    config = replace(TINY, image_size=64, order="random", order_seed=7)  # 64 clusters
    order = armamba.cluster_order(config)
    state = torch.manual_seed(123).get_state()
    assert torch.equal(armamba.cluster_order(config), order) and torch.equal(ARM(config).order, order)
    torch.set_rng_state(state)
    armamba.cluster_order(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(armamba.cluster_order(replace(config, order_seed=8)), order)


def test_patch_and_cluster_errors():
    with pytest.raises(ValueError, match=r"image size \(8, 10\) is not divisible by patch_size 4"):
        armamba.patchify(torch.zeros(1, 3, 8, 10), 4)
    for function, shape, rest, message in (
        (armamba.patchify, (3, 8, 8), [4], r"images are \(3, 8, 8\): they must be \(b, c, height, width\)"),
        (armamba.patchify, (1, 3, 8, 8), [0], "patch_size 0 must be positive"),
        (armamba.patchify, (1, 3, 8, 8), [-4], "patch_size -4 must be positive"),
        (armamba.unpatchify, (4, 48), [4, (8, 8)], r"patches are \(4, 48\): they must be \(b, l, pixels\)"),
        (armamba.unpatchify, (1, 4, 48), [0, (8, 8)], "with patch_size 0"),
        (armamba.to_clusters, (24, 3), [(4, 6), 2], r"tokens are \(24, 3\): they must be \(b, l, d\)"),
        (armamba.to_clusters, (1, 24, 3), [(4, 6), 0], "4x6 patches do not divide into clusters of 0x0"),
    ):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape), *rest)
    with pytest.raises(ValueError, match="4 patches of 48 values do not make 8x12 pixels with patch_size 4"):
        armamba.unpatchify(torch.zeros(1, 4, 48), 4, (8, 12))
    for regroup in (armamba.to_clusters, armamba.from_clusters):
        with pytest.raises(ValueError, match="4x6 patches do not divide into clusters of 4x4"):
            regroup(torch.zeros(1, 24, 2), (4, 6), 4)
        with pytest.raises(ValueError, match="23 tokens do not fill the grid of 4x6 patches"):
            regroup(torch.zeros(1, 23, 2), (4, 6), 2)


@pytest.mark.parametrize("grid", [(2, 5), (3, 3)])
def test_sincos_positions(grid):
    rows, columns, d = *grid, 16
    expected = torch.zeros(1, rows * columns, d)
    for row, column, i in itertools.product(range(rows), range(columns), range(d // 4)):
        frequency = 10000 ** (-i / (d / 4))
        for half, x in enumerate((column * frequency, row * frequency)):
            expected[0, row * columns + column, half * d // 2 + i] = math.sin(x)
            expected[0, row * columns + column, half * d // 2 + d // 4 + i] = math.cos(x)
    assert_close(armamba.sincos_positions(d, grid), expected, 1e-6)


def interpolated(pos: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    image = pos.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)


@pytest.mark.parametrize("old, new", [((12, 12), (24, 24)), ((14, 14), (7, 9)), ((4, 6), (4, 6))])
def test_resize_positions(old, new):
    pos = torch.randn(1, old[0] * old[1], 8)
    assert_close(armamba.resize_positions(pos, old, new), interpolated(pos, old, new), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Mixer and block


def direction_orders(grid: tuple[int, int], cls_index: int | None) -> list[list[int]]:
    """For each direction the places, in the row-major sequence, of the tokens in the order in which it reads them."""
    patches = [i for i in range(grid[0] * grid[1] + (cls_index is not None)) if i != cls_index]
    columns = [patches[i * grid[1] + j] for j in range(grid[1]) for i in range(grid[0])]
    if cls_index is not None:
        patches.insert(cls_index, cls_index)
        columns.insert(cls_index, cls_index)
    return [patches, patches[::-1], columns, columns[::-1]]


GRIDS = pytest.mark.parametrize(
    "grid, cls_index", [((3, 5), None), ((3, 5), 7), ((4, 2), 4), ((3, 3), 4), ((1, 1), 0), ((2, 4), None)]
)


@GRIDS
def test_directions(grid, cls_index):
    orders = torch.tensor(direction_orders(grid, cls_index))
    x, y = torch.randn(2, orders.shape[1], 3), torch.randn(2, orders.shape[1], 4, 3)
    read = armamba.to_directions(x, grid, cls_index)
    assert torch.equal(read, torch.stack([x[:, order] for order in orders], dim=2))
    assert_close(armamba.from_directions(read, grid, cls_index), x, 1e-6)
    put_back = [y[:, order.argsort(), k] for k, order in enumerate(orders)]
    assert_close(armamba.from_directions(y, grid, cls_index), sum(put_back) / 4, 1e-6)


@GRIDS
def test_four_directions_are_the_mean_of_four_mixers(grid, cls_index):
    four, one = Mixer(TINY, 4).double(), Mixer(TINY, 1).double()
    for parameter in four.parameters():
        nn.init.normal_(parameter, std=0.5)
    orders = torch.tensor(direction_orders(grid, cls_index))
    x, outputs = torch.randn(2, orders.shape[1], TINY.d_model, dtype=torch.float64), []
    for k, order in enumerate(orders):
        state = four.state_dict()
        one.load_state_dict({n: v.chunk(4)[k] if n.split(".")[0] in DIRECTIONAL else v for n, v in state.items()})
        outputs.append(one(x[:, order])[:, order.argsort()])
    assert_close(four(x, grid, cls_index), sum(outputs) / 4, 1e-12)


@pytest.mark.parametrize("l, k", [(9, 4), (2, 4), (5, 1), (1, 2)])
def test_causal_conv(l, k):
    x, weight, bias = torch.randn(2, l, 6), torch.randn(6, 1, k), torch.randn(6)
    expected = F.silu(F.conv1d(F.pad(x.mT, (k - 1, 0)), weight, bias, groups=6)).mT
    assert_close(armamba.causal_conv(x, weight, bias), expected, 1e-6)
    assert armamba.causal_conv(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_one_direction_is_causal():
    block, x, t = Block(TINY, 1).double(), torch.randn(1, 9, TINY.d_model, dtype=torch.float64), 4
    changed = x.clone()
    changed[:, t] = torch.randn(TINY.d_model)  # (not x + 1, which LayerNorm would undo)
    difference = (block(changed) - block(x)).abs().amax(dim=(0, 2))
    assert (difference[:t] < 1e-12).all() and (difference[t:] > 1e-6).all()


def test_drop_path():
    block, x = Block(TINY, 1, drop_path=0.2), torch.zeros(4000, 2, TINY.d_model)
    block.mixer.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 1))
    block.mlp.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 10))
    y = block(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))  # whole samples
    for value, share in {0: 0.04, 1: 0.16, 10: 0.16, 11: 0.64}.items():  # 0.2 and 0.8, independently
        found = torch.isclose(y[:, 0, 0], torch.tensor(value / 0.8)).float().mean().item()
        assert abs(found - share) < 0.03, f"{value}: {found} of the samples, not {share}"
    assert torch.equal(block.eval()(x), torch.full_like(x, 11))


def test_drop_path_rates_grow_linearly():
    rates = [layer.drop_path for layer in VisionMamba(replace(TINY, depth=5, taps=None), 7, drop_path=0.3).layers]
    assert rates == pytest.approx(torch.linspace(0, 0.3, 5).tolist())
    assert VisionMamba(replace(TINY, depth=1, decoder_depth=1, taps=None), 7, drop_path=0.3).layers[0].drop_path == 0


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation of both models

INIT = replace(TINY, image_size=64, patch_size=8, d_model=256, depth=2, taps=None, decoder_dim=192)


def assert_uniform(x, low: float, high: float):
    x = (x - low) / (high - low)
    assert -1e-4 <= x.min() < 0.05 and 0.95 < x.max() <= 1 + 1e-4
    assert abs(x.mean() - 0.5) < 2 / x.numel() ** 0.5 and abs(x.std() * 12**0.5 - 1) < 3 / x.numel() ** 0.5


def assert_normal(x, std: float):
    n = x.numel()
    assert x.abs().max() > 2 * std and abs(x.mean()) < 4 * std / n**0.5 and abs(x.std() / std - 1) < 3 / n**0.5


@pytest.mark.parametrize("which", ["arm", "classifier", "one direction", "from_arm"])
def test_initialisation(which):
    make = {
        "arm": lambda: ARM(INIT),
        "classifier": lambda: VisionMamba(INIT, 50),
        "one direction": lambda: VisionMamba(INIT, 50, directions=1),
        "from_arm": lambda: VisionMamba.from_arm(ARM(INIT), 50),
    }
    model, d, dec, hidden = make[which](), INIT.d_model, INIT.decoder_dim, INIT.d_model * 8 // 3
    bounds = {"in_proj": d, "x_proj": d, "out_proj": d * INIT.depth, "conv1d": 4, "dt_proj": INIT.dt_rank}
    bounds |= {"w1": d, "w2": d, "w3": hidden, "enc2dec": len(INIT.taps) * d, "ar_pred": dec}
    bounds = {name: fan_in**-0.5 for name, fan_in in bounds.items()}
    bounds |= {name: (6 / fans) ** 0.5 for name, fans in {"q": 2 * dec, "kv": 3 * dec, "proj": 2 * dec}.items()}
    bounds |= {name: (6 / (5 * dec)) ** 0.5 for name in ("fc1", "fc2")}
    stds = {"ar_token": 0.02, "cls_token": 0.02, "pos_embed": 0.02, "head": 2e-5 if which == "from_arm" else 0.02}
    stds["patch_embed"] = (3 * 8 * 8) ** -0.5

    for name, parameter in model.named_parameters():
        *_, part, kind = name.rsplit(".", 2) if name.endswith((".weight", ".bias")) else (name.split(".")[-1], "weight")
        for x in parameter.data.chunk(getattr(model, "directions", 1) if part in DIRECTIONAL else 1):
            if part == "A_log":
                assert torch.allclose(x.exp(), torch.arange(1.0, TINY.d_state + 1).expand_as(x))
            elif part == "D":
                assert (x == 1).all()
            elif part == "dt_proj" and kind == "bias":
                assert_uniform(F.softplus(x).log(), math.log(1e-3), math.log(1e-1))
            elif "norm" in name:
                assert (x == (kind == "weight")).all(), name
            elif kind == "bias" and part != "conv1d":
                assert (x == 0).all(), name
            elif part in bounds:
                assert_uniform(x, -bounds[part], bounds[part])
            elif not (part == "pos_embed" and which == "from_arm"):
                assert_normal(x, stds[part])
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == (4 + 2 + 3 * 2 + 1 if which == "arm" else 5) and all(norm.eps == 1e-5 for norm in norms)


# ----------------------------------------------------------------------------------------------------------------------
# VisionMamba

LAYOUTS = pytest.mark.parametrize(
    "grid, directions", [((4, 6), 4), ((3, 5), 4), ((1, 1), 4), ((1, 2), 4), ((3, 5), 1), ((1, 1), 1)]
)


@LAYOUTS
def test_embed(grid, directions):
    config = replace(TINY, image_size=(4 * grid[0], 4 * grid[1]))
    model, images, l = VisionMamba(config, 7, directions), random_images(config), math.prod(grid)
    index = l // 2 if directions == 4 else l
    nn.init.normal_(model.patch_embed.bias)
    weight = model.patch_embed.weight.permute(2, 3, 1, 0).reshape(48, -1)  # (p*p*c, d)
    patches = armamba.patchify(images, 4) @ weight + model.patch_embed.bias
    x = model.embed(images) - model.pos_embed
    assert model.cls_index == index and model.pos_embed.shape == (1, l + 1, TINY.d_model)
    assert_close(x[:, index], model.cls_token[:, 0].expand(2, -1), 1e-4)
    assert_close(without(x, index), patches)


@LAYOUTS
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pooling(grid, directions, pool):
    config = replace(TINY, image_size=(4 * grid[0], 4 * grid[1]))
    model, images, seen = VisionMamba(config, 7, directions, pool), random_images(config), []
    model.norm_f.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features, logits = model.features(images), model(images)
    x, i = seen[0], model.cls_index
    if pool == "cls":
        expected = x[:, i]
    else:
        halves = [x[:, part].mean(1) for part in (slice(i), slice(i + 1, None)) if x[:, part].numel()]
        expected = sum(halves) / len(halves)
    assert_close(features, expected, 1e-6)
    assert logits.shape == (2, 7) and torch.equal(logits, model.head(features))


@pytest.mark.parametrize("directions", [1, 4])
def test_backbone_without_classes(directions):
    config = replace(TINY, image_size=(12, 20))
    model, images = VisionMamba(config, None, directions), random_images(config)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"patch_embed", "layers"}
    assert torch.equal(model.pos_embed, armamba.sincos_positions(TINY.d_model, (3, 5)))
    x = model.embed(images)
    for layer in model.layers:
        x = layer(x, (3, 5), None)
    assert x.shape == (2, 15, TINY.d_model)
    assert_close(model(images), x.mean(dim=1), 1e-6)


def test_vision_mamba_errors():
    model, good = VisionMamba(TINY, 7), random_images(TINY)
    for images in (good[..., :-1], good.mT, good[:, :1], good[0]):
        with pytest.raises(ValueError, match=r"images are .* this model takes \('b', 3, 16, 24\)"):
            model(images)
    with pytest.raises(ValueError, match="images have dtype torch.uint8: convert to torch.float32"):
        model(good.to(torch.uint8))
    arm = ARM(TINY)
    for wrong, message in {
        good[:, :1]: "images are .* this model takes",
        good[0]: "images are .* this model takes",
        good.byte(): "images have dtype torch.uint8",
    }.items():
        with pytest.raises(ValueError, match=message):
            arm.target(wrong)
    with pytest.raises(ValueError, match="image_size 0 must be a positive integer"):
        VisionMamba.from_arm(arm, 7, image_size=0)
    with pytest.raises(ValueError, match="from_arm takes an ARM, not a VisionMamba"):
        VisionMamba.from_arm(model, 7)
    with pytest.raises(ValueError, match="a Linear is neither ARM nor VisionMamba"):
        to_official(nn.Linear(1, 1))
    for wrong in (
        {"directions": 2},
        {"directions": True},
        {"directions": 4.0},
        {"pool": "max"},
        {"num_classes": 0},
        {"num_classes": 3.0},
        {"drop_path": 1.0},
        {"drop_path": -0.1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VisionMamba(TINY, **{"num_classes": 7, **wrong})
    with pytest.raises(ValueError, match="pool 'cls' needs a class token"):
        VisionMamba(TINY, None, pool="cls")
    with pytest.raises(ValueError, match="4 scan directions do not become 1: give directions=4"):
        VisionMamba(TINY, 7, directions=1)._load_resized(VisionMamba(TINY, 7))


@pytest.mark.parametrize("directions, image_size", [(4, (20, 28)), (4, None), (1, (20, 28))])
def test_from_arm(directions, image_size):
    arm = ARM(TINY)
    for parameter in arm.parameters():
        nn.init.normal_(parameter)
    model = VisionMamba.from_arm(arm, 7, image_size, directions, pool="cls", drop_path=0.2)
    assert model.config.image_size == (image_size or TINY.image_size)
    assert (model.directions, model.pool, model.num_classes, model.layers[-1].drop_path) == (directions, "cls", 7, 0.2)
    state = model.state_dict()
    for name, value in arm.encoder.named_parameters():
        shared = not name.startswith("layers") or name.split(".")[3] not in DIRECTIONAL
        for piece in [state[name]] if shared else state[name].chunk(directions):
            assert torch.equal(piece, value), name
    grid, i = model.config.grid, model.cls_index
    expected = interpolated(armamba.sincos_positions(TINY.d_model, TINY.grid), TINY.grid, grid)
    assert isinstance(model.pos_embed, nn.Parameter) and (model.pos_embed[0, i] == 0).all()
    assert_close(without(model.pos_embed, i), expected, 1e-6)


def test_from_arm_as_backbone():
    arm, images = ARM(TINY), random_images(TINY)
    assert torch.equal(VisionMamba.from_arm(arm, None, directions=1)(images), arm.encoder(images))
    positions = VisionMamba.from_arm(arm, None, (8, 12)).pos_embed  # fixed ones need no interpolation
    assert torch.equal(positions, armamba.sincos_positions(TINY.d_model, (2, 3)))


@pytest.mark.parametrize("directions", [1, 4])
def test_resized(directions):
    model = VisionMamba(TINY, 7, directions, pool="cls", drop_path=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_same_state(model.resized(TINY.image_size), model)
    other = model.resized((12, 20))
    assert other(random_images(other.config)).shape == (2, 7)
    assert [x.drop_path for x in other.layers] == [x.drop_path for x in model.layers] and other.pool == "cls"
    assert model.resized(8, drop_path=0.4).layers[-1].drop_path == 0.4
    old, new = model.pos_embed, other.pos_embed
    i, j = model.cls_index, other.cls_index
    assert torch.equal(new[:, j], old[:, i])
    assert_close(without(new, j), interpolated(without(old, i), TINY.grid, (3, 5)), 1e-6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert name == "pos_embed" or torch.equal(value, other.state_dict()[name])
    nn.init.normal_(model.double().pos_embed)
    assert_same_state(model.resized(TINY.image_size), model)  # to fp64's precision


def test_grad_checkpoint_recomputes_blocks_and_keeps_gradients():
    model, images, calls, results = VisionMamba(TINY, 7, drop_path=0.5), random_images(TINY), [], []
    model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        model.grad_checkpoint = recompute
        torch.manual_seed(5)  # the same samples are dropped, also when blocks run again
        model.zero_grad()
        model(images).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ----------------------------------------------------------------------------------------------------------------------
# ARM


@pytest.mark.parametrize("image_size", [(16, 24), (24, 16), 16])
@pytest.mark.parametrize("order", ORDERS)
def test_no_cluster_sees_itself_or_a_later_one(order, image_size):
    config = replace(TINY, order=order, image_size=image_size)
    arm, image, k, s2 = ARM(config).double(), random_images(config, 1), config.n_clusters, config.cluster_size**2
    tokens = torch.tensor(tokens_by_cluster(config)).view(k, s2)
    images = image.double().repeat(k + 1, 1, 1, 1)
    for i, cluster in enumerate(tokens):  # image i differs from the last one in cluster i
        for row, column in zip((cluster // config.grid[1] * 4).tolist(), (cluster % config.grid[1] * 4).tolist()):
            images[i, :, row : row + 4, column : column + 4] += torch.randn(3, 4, 4)
    predictions = arm.predict(images).unflatten(1, (k - 1, s2))  # of clusters 1, 2, ..., counted from 0
    difference = (predictions[:-1] - predictions[-1]).abs().amax(dim=(2, 3))  # (changed cluster, predicted cluster - 1)
    for changed, predicted in itertools.product(range(k), range(1, k)):
        seen = difference[changed, predicted - 1] > 1e-6
        assert seen if changed < predicted else difference[changed, predicted - 1] < 1e-12, (changed, predicted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_target(order, channels):
    config, p = replace(TINY, order=order, channels=channels), TINY.patch_size
    images, tokens = random_images(config), tokens_by_cluster(config)[config.cluster_size**2 :]
    for constant, scale in ((0, 1.0), (0, 0.0), (1, 1e-3)):  # patches with much, no and little contrast
        images[constant, :, -p:, -p:] = 3 + scale * images[constant, :, -p:, -p:]
    plain, normalised = (ARM(replace(config, norm_pix=on)).target(images) for on in (False, True))
    for b, (i, token) in itertools.product(range(2), enumerate(tokens)):
        row, column = (p * x for x in divmod(token, config.grid[1]))
        patch = images[b, :, row : row + p, column : column + p].permute(1, 2, 0).reshape(-1)
        assert torch.equal(plain[b, i], patch)
        patch = patch - patch.sum() / len(patch)
        variance = patch.square().sum() / (len(patch) - 1)
        assert torch.allclose(normalised[b, i], patch / (variance + 1e-6) ** 0.5, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_data_flow(order):
    """What enters the encoder and each decoder block, and what comes out at the end."""
    config = replace(TINY, order=order, taps=(2, 3))
    arm, images, seen = ARM(config), random_images(config), {}
    for norm in arm.tap_norms:
        nn.init.normal_(norm.weight)
    for name, module in {"encoder": arm.encoder.layers[0], 0: arm.decoder[0], 1: arm.decoder[1]}.items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs}))
    prediction, tokens = arm.predict(images), tokens_by_cluster(config)

    assert_close(seen["encoder"][0], arm.encoder.embed(images)[:, tokens[:-4]], 1e-6)
    x, taps = seen["encoder"][0], []
    for layer in arm.encoder.layers:
        x = layer(x)
        taps.append(x)
    for ours, expected in zip(arm.encode(images), taps[1:], strict=True):
        assert_close(ours, expected)
    context = arm.enc2dec(torch.cat([arm.tap_norms[0](taps[1]), arm.tap_norms[1](taps[2])], dim=-1))
    assert_close(arm.context(images), context.view(2, 20, 8, 2))
    for i in range(2):
        assert_close(seen[i][1], context.view(2, 20, 8, 2)[..., i])
    queries = (arm.ar_token + armamba.sincos_positions(8, config.grid))[:, tokens[4:]]
    assert_close(seen[0][0], queries.expand(2, -1, -1), 1e-6)
    x = arm.decoder[1](arm.decoder[0](*seen[0]), *seen[1][1:])
    assert prediction.shape == (2, 20, 48)
    assert_close(prediction, arm.ar_pred(arm.ar_norm(x)))


def test_loss():
    arm, images = ARM(TINY), random_images(TINY)
    loss = (arm.predict(images) - arm.target(images)).square().mean(-1)
    assert arm.loss_per_token(images).shape == (2, 20) and arm(images).shape == ()
    assert_close(arm.loss_per_token(images), loss)
    assert_close(arm(images), loss.mean())
    with torch.autocast("cpu", torch.bfloat16):
        encoded, low_precision = arm.encode(images), arm(images)
    assert {x.dtype for x in (*encoded, low_precision)} == {torch.float32}  # residual stream and loss
    assert_close(low_precision, loss.mean(), 0.02)


def test_decoder_block():
    """Two heads, an arbitrary mask, one query at a time: queries do not see each other."""
    block, q, kv = armamba.DecoderBlock(8, heads=2), torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    mask = torch.rand(5, 6) < 0.5
    mask[:, 0] = True
    keys, values = block.kv(block.norm_kv(kv)).split(8, dim=-1)
    for i in range(5):
        x, query, out = q[:, i], block.q(block.norm_q(q[:, i])), []
        for head in (slice(0, 4), slice(4, 8)):
            k, v = keys[:, mask[i], head], values[:, mask[i], head]
            weights = torch.einsum("bd,bld->bl", query[:, head] / 2, k).softmax(-1)  # 2 = sqrt(4)
            out.append(torch.einsum("bl,bld->bd", weights, v))
        x = x + block.proj(torch.cat(out, dim=-1))
        x = x + block.fc2(F.gelu(block.fc1(block.norm_mlp(x)), approximate="none"))
        assert_close(block(q, kv, mask)[:, i], x)


def test_arm_needs_two_whole_clusters():
    with pytest.raises(ValueError, match="4x6 patches do not divide into clusters of 3x3"):
        ARM(replace(TINY, cluster_size=3))
    with pytest.raises(ValueError, match="one cluster of 4x4 patches fills the image"):
        ARM(replace(TINY, image_size=16, cluster_size=4))


@pytest.mark.parametrize("channels", [1, 3])
def test_overfits_one_batch(channels):
    config = replace(TINY, channels=channels, d_model=32, decoder_dim=32)
    arm, images = ARM(config), random_images(config)
    optimizer, losses = torch.optim.Adam(arm.parameters(), lr=3e-3), []
    for _ in range(100):
        loss = arm(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and losses[-1] < 0.25, (losses[0], losses[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Released checkpoints

DATA = Path(__file__).parent / "data"
BOUND = {"cpu": 1e-5, "cuda": 1e-4}  # the GPU's kernels round otherwise


@pytest.fixture
def released(request):
    """Loads a file with weights in the released form, and what the authors' computation makes of them."""

    def load(name: str) -> dict:
        folder = DATA if name.startswith("tiny") else request.getfixturevalue("shared_data") / "official"
        content = torch.load(folder / f"{name}.pt", weights_only=True)
        if name.startswith("tiny"):
            size = 192.0 if name == "tiny_pretrain" else 224.0
            b, c, y, x = torch.meshgrid(*map(torch.arange, (2.0, 3.0, size, size)), indexing="ij")
            content["outputs"]["image"] = torch.sin(0.1 * y * (b + 1) + 0.07 * x * (c + 1) + c)
        return content

    return load


def on(device: str, state):
    """Nested tensors on another device."""
    if isinstance(state, dict):
        return {name: on(device, value) for name, value in state.items()}
    return state.to(device) if isinstance(state, torch.Tensor) else state


def assert_same_gradients(model: nn.Module, norms: dict):
    ours, directions = {}, model.encoder.directions if isinstance(model, ARM) else model.directions
    for name, parameter in model.named_parameters():
        names = armamba.official_names(name, directions)
        ours |= dict(zip(names, (x.norm().item() for x in parameter.grad.chunk(len(names)))))
    assert ours == pytest.approx({name: float(norm) for name, norm in norms.items()}, rel=1e-3, abs=0)


@pytest.mark.parametrize("name", ["tiny_pretrain", "pretrain_depth12", "pretrain_depth24"])
def test_released_pretraining(released, name, device):
    reference = on(device, released(name))
    model, outputs = load_official(reference["model"]).to(device), reference["outputs"]
    bound = BOUND[device]
    loss = model.loss_per_token(outputs["image"])
    loss.mean().backward()
    assert_close(loss, outputs["loss_per_token"], bound)
    assert_close(loss.mean(), outputs["loss"], bound)
    assert_same_gradients(model, reference["grad_norms"])
    prediction = model.predict(outputs["image"])
    if name == "tiny_pretrain":
        assert_close(prediction[:, 0], outputs["pred_first_patch"], bound)
    else:
        assert_close(prediction, outputs["pred"], bound)
        assert_close(model.context(outputs["image"]), outputs["latent"], bound)
    fresh = ARM(model.config).to(device)  # makes its own positions and mask
    assert_close(fresh.encoder.pos_embed, reference["model"]["pos_embed"].float(), 1e-3)
    assert_close(fresh.dec_pos_embed, reference["model"]["dec_pos_embed"].float(), 1e-3)
    assert torch.equal(to_official(fresh)["mask"].to(device), reference["model"]["mask"].float())


@pytest.mark.parametrize("name", ["tiny_classifier", "finetune_pool", "finetune_cls"])
def test_released_classifier(released, name, device):
    reference, pool = on(device, released(name)), "cls" if "cls" in name else "mean"
    model, outputs = load_official(reference["model"], pool=pool).to(device), reference["outputs"]
    bound = BOUND[device]
    features = model.features(outputs["image"])
    loss = F.cross_entropy(model.head(features), torch.tensor([1, 3], device=device))
    loss.backward()
    assert_close(features, outputs["features"], bound)
    assert_close(model.head(features), outputs["logits"], bound)
    assert_close(loss, outputs["loss"], bound)
    assert_same_gradients(model, reference["grad_norms"])


def test_released_conversion(released):
    reference, arm = released("convert_224"), load_official(released("pretrain_depth12")["model"])
    model = VisionMamba.from_arm(arm, len(reference["not_converted"]["head.bias"]), image_size=224)
    assert_close(model.pos_embed, reference["pos_embed"])
    model.load_state_dict({**model.state_dict(), **reference["not_converted"]})
    assert_close(model(reference["outputs"]["image"]), reference["outputs"]["logits"])


SQUARE = replace(TINY, image_size=16, channels=2, d_conv=3)
MODELS = {"arm": lambda: ARM(SQUARE), "classifier": lambda: VisionMamba(SQUARE, 7)}
BOTH = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@BOTH
def test_official_round_trip(make):
    model = make()
    official = to_official(model)
    ours = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    assert not ours & {value.untyped_storage().data_ptr() for value in official.values()}  # copies, safe to change
    loaded = load_official(official)
    assert_same_state(loaded, model)
    assert type(loaded) is type(model) and loaded.config.image_size == (16, 16)
    assert_same_state(load_official({"module." + name: value for name, value in official.items()}), model)
    half = load_official({name: value.half() for name, value in official.items()})
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    assert_same_state(half, model.half().float())


@BOTH
def test_released_file_form(make, tmp_path, caplog):
    raw, ema = make(), make()
    args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), output_dir="x", nested=argparse.Namespace(a=[1]))
    content = {"model": to_official(raw), "model_ema": to_official(ema), "epoch": 3, "scaler": {}, "args": args}
    content["optimizer"] = torch.optim.AdamW(raw.parameters()).state_dict()
    torch.save(content, tmp_path / "checkpoint.pth")
    assert_same_state(load_official(tmp_path / "checkpoint.pth"), raw)
    assert "using the weights 'model' (the checkpoint has: model, model_ema)" in caplog.text
    assert_same_state(load_official(str(tmp_path / "checkpoint.pth"), weights="model_ema"), ema)
    assert "using the weights 'model_ema'" in caplog.text
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    compiled = {f"_orig_mod.module.{name}": value for name, value in to_official(raw).items()}  # and run by many
    assert_same_state(load_official(compiled), raw)
    with pytest.raises(ValueError, match="weights 'model_ema' are not in this checkpoint: it has bare weights"):
        load_official(compiled, weights="model_ema")
    with pytest.raises(ValueError, match="weights 'model_ema' are not in this checkpoint: it has model"):
        load_official({"model": to_official(raw), "model_ema": None}, weights="model_ema")
    with pytest.raises(ValueError, match="weights 'ema' are not in this checkpoint: it has bare weights"):
        load_official(to_official(raw), weights="ema")
    for wrong in ({"model": 3}, {"model": [raw]}, {0: torch.zeros(1)}, {"head.weight": 3}):
        with pytest.raises(ValueError, match="not a checkpoint: weights are named tensors"):
            load_official(wrong)
    for content in (b"text", b"", b"PK\x03\x04"):
        (tmp_path / "checkpoint.pth").write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint that can be read and trusted"):
            load_official(tmp_path / "checkpoint.pth")
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="pool 'max' must be 'mean' or 'cls'"):
        load_official(to_official(raw), pool="max")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo > '{self.path}'",)


def test_files_with_other_classes_are_refused(tmp_path):
    trap = tmp_path / "executed"
    for args in (Payload(trap), argparse.Namespace(hook=Payload(trap)), types.SimpleNamespace(lr=1)):
        torch.save({"model": to_official(MODELS["arm"]()), "args": args}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match="not a checkpoint that can be read and trusted"):
            load_official(tmp_path / "file.pth")
    assert not trap.exists()


@BOTH
def test_every_key_that_does_not_fit_is_named(make):
    state = to_official(make())
    for key in ("layers.1.norm1.bias", "layers.2.mixer.D"):
        del state[key]
    state |= {"head.scale": torch.ones(1), "layers.0.mlp.w1.bias": torch.ones(7)}
    with pytest.raises(ValueError) as error:
        load_official(state)
    message = str(error.value)
    assert "missing layers.1.norm1.bias" in message and "missing layers.2.mixer.D" in message
    assert "unexpected head.scale" in message and "layers.0.mlp.w1.bias has shape (7,), not (53,)" in message
    for key in {"pos_embed", "mask" if "mask" in state else "head.weight"}:  # these tell the shapes of others
        with pytest.raises(ValueError, match=f"missing {key}"):
            load_official({name: value for name, value in state.items() if name != key})


def test_load_classifier_for_another_image_size(released):
    state = released("tiny_classifier")["model"]
    model, old = load_official(state, pool="cls", image_size=384), state["pos_embed"].float()
    assert (load_official(state).pool, model.pool, model.config.image_size) == ("mean", "cls", (384, 384))
    assert torch.equal(model.pos_embed[:, 288], old[:, 98])
    assert_close(without(model.pos_embed, 288), interpolated(without(old, 98), (14, 14), (24, 24)))
    assert model(random_images(model.config, 1)).shape == (1, 10)


@pytest.mark.parametrize("image_size", [256, (64, 192)])
def test_load_arm_for_another_image_size(released, image_size):
    state = released("tiny_pretrain")["model"]
    model, plain = load_official(state, image_size=image_size), load_official(state)
    assert model.config == replace(plain.config, image_size=image_size)
    assert model(random_images(model.config, 1)).isfinite()
    assert_close(model.dec_pos_embed, armamba.sincos_positions(64, model.config.grid), 1e-6)
    assert_close(model.encoder.pos_embed, armamba.sincos_positions(16, model.config.grid), 1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("make", [ARM, lambda config: VisionMamba(config, 7)], ids=MODELS)
def test_load_from_a_grid_that_is_not_square(make):
    model = make(TINY)
    for grid, message in {None: r"\(4, 4\)", 4: "4", (3, 7): r"\(3, 7\)", ("4", "6"): r"\('4', '6'\)"}.items():
        with pytest.raises(ValueError, match=f"a grid of {message} does not hold 24 positions: give grid="):
            load_official(to_official(model), grid=grid)
    loaded, images = load_official(to_official(model), grid=TINY.grid), random_images(TINY)
    assert_same_state(loaded, model)
    assert torch.equal(loaded(images), model(images))


def test_a_mask_of_nothing_is_named():
    state = to_official(MODELS["arm"]()) | {"mask": torch.zeros(0, 0)}
    with pytest.raises(ValueError, match="cluster_size 0 must be a positive integer"):
        load_official(state)


def test_positions_need_four_equal_parts():
    with pytest.raises(ValueError, match="6 channels must be divisible by 4"):
        armamba.sincos_positions(6, (2, 2))


def test_a_grid_is_not_taken_for_a_square_one():
    """Of 4 x 16 patches the number alone does not tell; an ARM's fixed positions do."""
    config = replace(TINY, image_size=(4 * TINY.patch_size, 16 * TINY.patch_size))
    state = to_official(ARM(config))
    with pytest.raises(ValueError, match=r"not those of a grid of \(8, 8\): give grid="):
        load_official(state)
    assert load_official(state, grid=[4, 16]).config.image_size == config.image_size


@pytest.mark.parametrize("left_out", ["ar_token", "nothing"])
def test_classifier_that_carries_decoder_weights(left_out):
    model, arm = MODELS["classifier"](), to_official(MODELS["arm"]())
    carried = {name: value for name, value in (arm | to_official(model)).items() if name != left_out}
    assert "mask" in carried and "norm_1.weight" in carried and "dec_block.0.attn2.q.weight" in carried
    assert_same_state(load_official(carried), model)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ARM(replace(SQUARE, order="column")), "order 'column'"),
        (lambda: ARM(replace(SQUARE, norm_pix=False)), "norm_pix False"),
        (lambda: ARM(replace(SQUARE, taps=(2, 3))), r"taps \(2, 3\)"),
        (lambda: VisionMamba(SQUARE, 7, directions=1), "1 directions"),
        (lambda: VisionMamba(SQUARE, None), "None classes"),
    ],
)
def test_what_released_files_cannot_say(make, message):
    with pytest.raises(ValueError, match=message):
        to_official(make())
