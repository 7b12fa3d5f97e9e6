"""Checks of the notebooks' exercises. Each compares an answer with an independent computation, in loops and fp64 where
that helps, never with the armamba function that the solution calls; each assertion names the likely mistake.

In a notebook: `checks.recurrence(my_recurrence)` prints "passed", or "not implemented yet" for an untouched stub, or
raises an AssertionError that says what to look at.
"""

import functools
import math

import torch


def check(function):
    """Make a function of assertions an exercise's check. A stub raises NotImplementedError, so that Run-All works."""

    @functools.wraps(function)
    def run(*answer) -> None:
        try:
            function(*answer)
        except NotImplementedError:
            print(f"{function.__name__}: not implemented yet")
        else:
            print(f"{function.__name__}: passed")

    return run


# --- 01 patches and clusters ------------------------------------------------------------------------------------------


@check
def patches(my_patchify) -> None:
    """Against loops over patches and pixels, on an image that is not square and has every value once."""
    images, p = torch.arange(144.0).view(2, 3, 4, 6), 2
    mine, expected = my_patchify(images.clone(), p), torch.empty(2, 6, p, p, 3)  # (b, l, row, column, colour)
    for token, (top, left) in enumerate((top, left) for top in (0, 2) for left in (0, 2, 4)):
        for row in range(p):
            for column in range(p):
                expected[:, token, row, column] = images[:, :, top + row, left + column]
    assert mine.shape == (2, 6, 12), f"shape {tuple(mine.shape)}: 2 images of 3x4x6 give (2, 6, 12) with p = 2"

    def holds(x):  # the same values in every patch, in whatever order
        return mine.sort(-1)[0].equal(x.flatten(2).sort(-1)[0])

    by_columns = expected.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    assert not holds(by_columns), "patches go down the columns: after the first comes the one to its right"
    hint = "(rows, p, columns, p) needs a permute before the last reshape"
    assert holds(expected), f"a patch mixes pixels of different places: {hint}"
    colour_slowest = expected.permute(0, 1, 4, 2, 3).flatten(2)
    assert not mine.equal(colour_slowest), "a patch is in the order (colour, row, column): colour must be the fastest"
    column_first = expected.transpose(2, 3).flatten(2)
    assert not mine.equal(column_first), "a patch is in the order (column, row, colour): its rows come first"
    assert mine.equal(expected.flatten(2)), "the right pixels in a wrong order: a patch is (row, column, colour)"


@check
def cluster_index(my_cluster_index) -> None:
    """Against four loops, on grids that are not square, with clusters that are not as many as they are wide."""
    for rows, columns, s in ((4, 6, 2), (12, 12, 4), (6, 15, 3)):
        case, mine = f"{rows}x{columns} patches, s = {s}", my_cluster_index(rows, columns, s)
        assert mine.shape == (rows * columns,), f"{case}: shape {tuple(mine.shape)}, ({rows * columns},) is due"
        assert not mine.is_floating_point(), f"dtype {mine.dtype}: these numbers index, so they must be integers"
        places = []
        for top in range(0, rows, s):
            for left in range(0, columns, s):
                places += [(top + i) * columns + left + j for i in range(s) for j in range(s)]
        expected, mine = torch.tensor(places), mine.long()
        missing = sorted(set(places) - set(mine.tolist()))
        assert not missing, f"{case}: patches {missing[:3]} are never read, each must occur once"
        assert not mine.equal(torch.arange(rows * columns)), f"{case}: this is raster order, nothing was regrouped"
        inverse = "entry i is the patch read at step i, not the step at which patch i is read"
        assert not mine.equal(expected.argsort()), f"{case}: this is the inverse: {inverse}"
        clusters = mine.view(-1, s * s)  # (clusters, patches)
        down = expected.view(rows // s, columns // s, s * s).transpose(0, 1).reshape(-1, s * s)
        assert not clusters.sort(1)[0].equal(down), f"{case}: clusters go down the columns, they are in raster order"
        square = set(clusters[0].tolist()) == set(places[: s * s])
        assert square, f"{case}: the first {s * s} patches read are {clusters[0].tolist()}, not a square of {s}x{s}"
        across = expected.view(-1, s, s).transpose(1, 2).flatten()
        assert not mine.equal(across), f"{case}: inside a cluster patches go down the columns, they are in raster order"
        assert mine.equal(expected), f"{case}: the first square is right, the others are not"


@check
def positions(my_positions) -> None:
    """Against loops over patches and frequencies with Python's own sine and cosine."""
    for d, rows, columns in ((8, 3, 3), (16, 3, 5)):
        mine, m, table = my_positions(d, rows, columns), d // 4, []
        assert mine.shape == (rows * columns, d), f"shape {tuple(mine.shape)}, ({rows * columns}, {d}) is due"
        for r in range(rows):
            for c in range(columns):
                angles = [[x * 10000 ** (-i / m) for i in range(m)] for x in (c, r)]
                table.append([f(angle) for half in angles for f in (math.sin, math.cos) for angle in half])
        expected = torch.tensor(table, dtype=torch.float64)
        near = functools.partial(torch.allclose, mine.double().cpu(), atol=1e-4)
        sin_c, cos_c, sin_r, cos_r = expected.chunk(4, dim=1)
        swapped = torch.cat([sin_r, cos_r, sin_c, cos_c], 1)
        assert not near(swapped), "row and column are swapped: the first half of the channels encodes the column"
        paired = torch.cat([torch.stack([sin_c, cos_c], 2).flatten(1), torch.stack([sin_r, cos_r], 2).flatten(1)], 1)
        assert not near(paired), "sine and cosine alternate: each half is all sines, then all cosines"
        cosine_first = torch.cat([cos_c, sin_c, cos_r, sin_r], 1)
        assert not near(cosine_first), "the cosines come first: each half is [sin | cos]"
        starts = torch.allclose(mine[:, 0].double().cpu(), expected[:, 0], atol=1e-4)
        frequencies = f"w_i = 10000^(-i/m) with m = d/4, so for d = {d} w_1 is {10000 ** (-1 / m):.4g}"
        assert near(expected) or not starts, f"channel 0 is right, others are not: the frequencies are {frequencies}"
        assert near(expected), "patch r * columns + c must hold sin(c w), cos(c w), sin(r w), cos(r w)"


# --- 03 vision mamba --------------------------------------------------------------------------------------------------


@check
def causal_convolution(my_causal_convolution) -> None:
    """Against a loop over tokens, channels and weights in fp64; also one weight, and more weights than tokens."""
    generator, b, d = torch.Generator().manual_seed(3), 2, 3
    for l, k in ((7, 4), (5, 3), (4, 1), (2, 4)):
        case = f"l = {l}, k = {k}"
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((b, l, d), (d, k), (d,)))
        mine = my_causal_convolution(x.clone(), weight.clone(), bias.clone())
        assert mine.shape == x.shape, f"{case}: shape {tuple(mine.shape)}, {(b, l, d)} is due: as many tokens as before"

        def convolved(weight, late=0, x=x, l=l, k=k):
            y = torch.zeros(b, l, d, dtype=torch.float64)
            for t in range(l):
                for c in range(d):
                    for j in range(k):
                        s = t - late - k + 1 + j
                        y[:, t, c] += weight[c, j].double() * x[:, s, c].double() if 0 <= s < l else 0
            return y

        expected, near = convolved(weight) + bias, functools.partial(torch.allclose, mine.double().cpu(), atol=1e-4)
        changed = x.clone()
        changed[:, -1, 0] += 1
        difference = (my_causal_convolution(changed, weight, bias) - mine).abs().amax(0)  # (l, d)
        future = f"{case}: the last token changes earlier outputs: pad in front only, output t may not read t+1"
        assert difference[:-1].max() < 1e-4 if l > 1 else True, future
        assert difference[:, 1:].max() < 1e-4, f"{case}: channel 0 changes other channels: each is convolved by itself"
        late = f"{case}: output t does not read token t: k zeros in front are one too many, k-1 are due"
        assert not near(convolved(weight, late=1) + bias), late
        assert not near(convolved(weight)), f"{case}: the bias is missing"
        assert not near(torch.nn.functional.silu(expected)), f"{case}: leave the SiLU out, here it is only the convolution"
        flipped = f"{case}: the weights are in reverse: the last one, j = k-1, meets the current token"
        assert k == 1 or not near(convolved(weight.flip(1)) + bias), flipped
        assert near(expected), f"{case}: y[t] must be bias + sum over j of weight[:, j] * x[t-k+1+j], x zero before 0"


@check
def merge_directions(my_merge_directions) -> None:
    """One direction at a time, against loops over the grid; on grids that are not square and on lines."""
    generator, d = torch.Generator().manual_seed(4), 2
    for rows, columns in ((2, 3), (4, 2), (3, 3), (1, 4)):
        case, l = f"{rows}x{columns} patches", rows * columns
        by_rows = [(r, c) for r in range(rows) for c in range(columns)]
        by_columns = [(r, c) for c in range(columns) for r in range(rows)]
        read = by_rows, by_rows[::-1], by_columns, by_columns[::-1]  # which patch at each time
        mine = my_merge_directions(torch.ones(1, l, 4, d), rows, columns)
        assert mine.shape == (1, l, d), f"{case}: shape {tuple(mine.shape)}, {(1, l, d)} is due"
        assert not torch.allclose(mine, torch.full_like(mine, 4)), "the four directions are summed: divide by 4"
        for i, name in enumerate(("rows", "rows backwards", "columns", "columns backwards")):
            y = torch.zeros(2, l, 4, d)
            y[:, :, i] = torch.randn(2, l, d, generator=generator)
            mine, where = 4 * my_merge_directions(y.clone(), rows, columns), f"{case}, direction {i} ({name})"

            def put_back(order, y=y, i=i, by_rows=by_rows):
                out = torch.zeros_like(y[:, :, 0])
                for t, place in enumerate(order):
                    out[:, by_rows.index(place)] = y[:, t, i]
                return out

            near, expected = functools.partial(torch.allclose, mine, atol=1e-5), put_back(read[i])
            wrong_grid = [divmod(r * rows + c, columns) for c in range(rows) for r in range(columns)]
            mistakes = {
                "it was read backwards: flip it along the tokens": put_back(read[i - 1]) if i in (1, 3) else None,
                "it was read by columns: transpose it back to rows": put_back(read[i - 2]) if i > 1 else None,
                "neither flipped nor transposed back": put_back(by_rows) if i == 3 else None,
                "a sequence by columns is a grid of (columns, rows): unflatten it so before transposing": None,
            }
            if i > 1 and sorted(wrong_grid) == by_rows:
                inverse = [y[:, l - 1 - t if i == 3 else t, i] for t in range(l)]
                grid = torch.stack(inverse, 1).view(2, rows, columns, d).transpose(1, 2).reshape(2, l, d)
                mistakes["a sequence by columns is a grid of (columns, rows): unflatten it so before transposing"] = grid
            for mistake, result in mistakes.items():
                assert result is None or near(expected) or not near(result), f"{where}: {mistake}"
            assert near(expected), f"{where}: its outputs are not at the patches that it read"


@check
def pool_halves(my_pool_halves) -> None:
    """Against sums in fp64; the class token in the middle, off it, first and last."""
    generator = torch.Generator().manual_seed(5)
    for l, cls in ((9, 4), (16, 7), (6, 1), (5, 0), (5, 4)):
        case, x = f"{l} tokens, class token {cls}", torch.randn(2, l, 3, generator=generator)
        mine = my_pool_halves(x.clone(), cls)
        assert mine.shape == (2, 3), f"{case}: shape {tuple(mine.shape)}, (2, 3) is due"
        parts = [[x[:, t].double() for t in part] for part in (range(cls), range(cls + 1, l))]
        means = [sum(part) / len(part) for part in parts if part]
        assert not mine.isnan().any(), f"{case}: the mean of an empty side is NaN: leave it out"
        near = functools.partial(torch.allclose, mine.double().cpu(), atol=1e-5)
        patches = sum(parts[0] + parts[1]) / (l - 1)
        expected = sum(means) / len(means)
        assert near(expected) or not near(x[:, cls].double()), f"{case}: this is the class token, not the patches"
        assert near(expected) or not near(x.double().mean(1)), f"{case}: the class token is in the mean: leave it out"
        weigh = f"{case}: every patch weighs the same: the two sides must, whatever their lengths"
        assert near(expected) or not near(patches), weigh
        half = f"{case}: one side is empty: return the other's mean, not half of it"
        assert near(expected) or not near(sum(means) / 2), half
        after = sum(x[:, t].double() for t in range(cls, l)) / (l - cls)
        shifted = f"{case}: the class token counts as one of the second side: that begins at cls_index + 1"
        assert near(expected) or not near(sum([*means[: cls > 0], after]) / ((cls > 0) + 1)), shifted
        assert near(expected), f"{case}: this is not the average of the mean before and the mean after"


@check
def mixer_parameters(my_mixer_parameters) -> None:
    """Against the sizes of all the matrices, written out; also a width that 16 does not divide."""
    for d, n, k, g in ((768, 16, 4, 1), (768, 16, 4, 4), (64, 8, 3, 4), (40, 16, 4, 2)):
        case, r = f"d = {d}, n = {n}, k = {k}, g = {g}", math.ceil(d / 16)
        shared = {"in_proj": (d, 2 * d), "out_proj": (d, d)}
        own = {"conv1d": (d, k), "its bias": (d,), "x_proj": (d, r + 2 * n), "dt_proj": (r, d), "its bias too": (d,)}
        own |= {"A_log": (d, n), "D": (d,)}
        own = {name: math.prod(shape) for name, shape in own.items()}
        base, each = sum(math.prod(shape) for shape in shared.values()), sum(own.values())
        mine, expected = my_mixer_parameters(d, n, k, g), base + g * each
        assert isinstance(mine, int), f"a number of parameters is an int, this is a {type(mine).__name__}"
        mistakes = {
            "in_proj and out_proj are counted once per direction: they are shared": g * (base + each),
            "every direction has its own convolution, x_proj, dt_proj, A_log and D: multiply them by g": base + each,
            "A_log is missing, n per channel and direction": expected - g * own["A_log"],
            "d per direction are missing: the bias of conv1d or of dt_proj, or D": expected - g * d,
            "two of the three vectors per direction are missing: the biases of conv1d and dt_proj, and D": expected
            - 2 * g * d,
            "B and C need n outputs of x_proj each": expected - g * d * n,
            "in_proj makes two things, x and z: 2 d outputs": expected - d * d,
            "r is d/16 rounded up, here it was rounded down": expected - g * 2 * d * (r - d // 16) if d % 16 else None,
            "the convolution is depthwise: k weights per channel, not k d": expected + g * (d * d * k - d * k),
        }
        for mistake, value in mistakes.items():
            assert mine != value or value == expected, f"{case}: {mistake}"
        assert mine == expected, f"{case}: {mine:,} instead of {expected:,}, {mine - expected:+,}"
