"""Checks of the notebooks' exercises. Each compares an answer with an independent computation, in loops and fp64 where
that helps, never with the armamba function that the solution calls; each assertion names the likely mistake.

In a notebook: `checks.recurrence(my_recurrence)` prints "passed", or "not implemented yet" for an untouched stub, or
raises an AssertionError that says what to look at.
"""

import functools
import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F


def _from_numpy(x):
    """NumPy's arrays as tensors and its numbers as Python's, also in tuples, lists and dicts; all else as it is."""
    if type(x) in (tuple, list):
        return type(x)(map(_from_numpy, x))
    if isinstance(x, dict):
        return {key: _from_numpy(value) for key, value in x.items()}
    return torch.tensor(x.copy()) if isinstance(x, np.ndarray) else x.item() if isinstance(x, np.generic) else x


def check(function):
    """Make a function of assertions an exercise's check. A stub raises NotImplementedError, so that Run-All works."""

    @functools.wraps(function)
    def run(answer) -> None:
        def given(*arguments):
            result = answer(*arguments)
            assert result is not None, "the answer is None: does the function end with a return?"
            return _from_numpy(result)

        try:
            function(given)
        except NotImplementedError as error:  # a stub's has no words, PyTorch's own has
            assert not str(error), f"NotImplementedError: {str(error).splitlines()[0]}"
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
    grey, hint = torch.arange(18.0).view(1, 1, 6, 3), "right for 3 colours and p = 2, not for 1 colour and p = 3"
    try:
        mine = my_patchify(grey.clone(), 3)
    except RuntimeError as error:
        raise AssertionError(f"{hint}: {error}") from error
    assert mine.equal(grey.reshape(1, 2, 9)), f"{hint}: is a size written as a number?"


@check
def cluster_index(my_cluster_index) -> None:
    """Against four loops, on grids that are not square, with clusters that are not as many as they are wide."""
    for rows, columns, s in ((4, 6, 2), (12, 12, 4), (6, 15, 3)):
        case, mine = f"{rows}x{columns} patches, s = {s}", torch.as_tensor(my_cluster_index(rows, columns, s))
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
        mine, m, table = torch.as_tensor(my_positions(d, rows, columns)), d // 4, []
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
        sorted_alike = torch.allclose(mine.double().cpu().sort(1)[0], expected.sort(1)[0], atol=1e-4)
        order = "the right numbers in a wrong order: the channels are [sin c | cos c | sin r | cos r]"
        assert near(expected) or not sorted_alike, order
        starts = torch.allclose(mine[:, 0].double().cpu(), expected[:, 0], atol=1e-4)
        frequencies = f"w_i = 10000^(-i/m) with m = d/4, so for d = {d} w_1 is {10000 ** (-1 / m):.4g}"
        assert near(expected) or not starts, f"channel 0 is right, others are not: the frequencies are {frequencies}"
        assert near(expected), "patch r * columns + c must hold sin(c w), cos(c w), sin(r w), cos(r w)"


# --- 02 selective scan ------------------------------------------------------------------------------------------------


def _scan_arguments(b: int, d: int, n: int, l: int) -> list[torch.Tensor]:
    """u, delta (b, d, l), A (d, n), B, C (b, n, l), D (d,) in fp64, with every size different."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [random(b, d, l), random(b, d, l).exp(), -random(d, n).exp(), random(b, n, l), random(b, n, l), random(d)]


def _scan_loop(u, delta, A, B, C, D, state=None, *, exponent="delta A", scale="delta", reads="new", inside=False):
    """The scan, number by number, right or with one mistake, from a state (b, d, n): y and the last state."""
    (b, d, l), n, y, last = u.shape, A.shape[1], torch.zeros_like(u), torch.zeros(len(u), *A.shape, dtype=u.dtype)
    for i, j in itertools.product(range(b), range(d)):
        h = [0.0] * n if state is None else state[i, j].tolist()
        for t, k in itertools.product(range(l), range(n)):
            step, a, old = delta[i, j, t].item(), A[j, k].item(), h[k]
            decay = math.exp({"delta A": step * a, "-delta A": -step * a, "A": a, "none": 0.0}[exponent])
            x = {"delta": step, "none": 1.0, "exact": (decay - 1) / a}[scale] * B[i, k, t].item() * u[i, j, t].item()
            h[k] = decay * (old + x) if inside else decay * old + x
            y[i, j, t] += C[i, k, t].item() * (old if reads == "old" else h[k])
        y[i, j] += D[j] * u[i, j]
        last[i, j] = torch.tensor(h)
    return y, last


_SCAN_MISTAKES = {
    "the state was read before it was updated: y_t reads the new state": dict(reads="old"),
    "the decay is missing: the old state is multiplied by exp(delta A)": dict(exponent="none"),
    "A was taken as positive: the factor is exp(delta A) with A < 0, it must be below 1": dict(exponent="-delta A"),
    "the decay is exp(A): it is exp(delta A)": dict(exponent="A"),
    "the input is decayed too: exp(delta A) multiplies the old state only": dict(inside=True),
    "the input is not multiplied by delta: delta_t B_t u_t is added to the state": dict(scale="none"),
    "the exact input factor of exercise 1: Mamba takes Euler's, delta_t B_t u_t": dict(scale="exact"),
}


@check
def discretise(my_discretise) -> None:
    """Against 1,000 short steps through one long step of h' = A h + B u."""
    delta = torch.tensor([[0.3], [1.7]], dtype=torch.float64)  # (2, 1)
    A, B = torch.tensor([[-0.5, -2.0, -6.0], [3.0, 0.7, -1.5]], dtype=torch.float64)  # (3,) each
    answer = my_discretise(delta, A, B)
    assert len(answer) == 3, f"{len(answer)} results: decay, exact input factor and Euler input factor are asked for"
    h, s, small = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64), delta / 1000
    for _ in range(1000):  # fourth order: the exact solution to 1e-9
        series = 1 + small * A * (1 + small * A / 2 * (1 + small * A / 3 * (1 + small * A / 4)))
        s = series * s + small * B * (1 + small * A / 2 * (1 + small * A / 3 * (1 + small * A / 4)))
        h = series * h
    decay, exact, euler = (x.double().expand(2, 3) for x in answer)

    def near(x, y):
        return torch.allclose(x, y, rtol=1e-5)

    assert not near(decay, 1 / h), "A was taken as positive: the decay is exp(delta A), with A < 0 below 1"
    assert not near(decay, 1 + delta * A), "the decay is 1 + delta A, Euler's: exp(delta A) is the exact one"
    assert near(decay, h), "the decay is wrong: without input h' = A h gives exp(delta A)"
    assert not near(exact, -s), "the exact input factor has the wrong sign: (exp(delta A) - 1) / A is positive"
    assert not near(exact, s * A), "the exact input factor is not divided by A"
    assert not near(exact, delta * B), "the exact input factor is Euler's: (exp(delta A) - 1) / A * B is asked for here"
    assert near(exact, s), "the exact input factor is wrong: (exp(delta A) - 1) / A * B, for u = 1 held over the step"
    assert not near(euler, B.expand(2, 3)), "delta is not multiplied into B: the Euler factor is delta B"
    assert near(euler, delta * B), "the Euler factor is wrong: delta B"


@check
def recurrence(my_recurrence) -> None:
    """Against a loop over batch, channels and states."""
    (b, d, n), generator = (2, 3, 4), torch.Generator().manual_seed(1)
    u, delta, A, B, C, D = (x[..., 0] if x.ndim == 3 else x for x in _scan_arguments(b, d, n, 1))
    h = torch.randn(b, d, n, generator=generator, dtype=torch.float64)
    before = h.clone()
    answer = my_recurrence(h, u, delta, A, B, C)
    both = isinstance(answer, tuple | list) and len(answer) == 2
    assert both, "return two things: the new state and the output"
    new, y = (x.double() for x in answer)
    assert new.shape == (b, d, n), f"the state has shape {tuple(new.shape)}: (b, d, n) = {(b, d, n)} is due"
    assert y.shape == (b, d), f"the output has shape {tuple(y.shape)}: (b, d) = {(b, d)}, summed over the states"
    assert h.equal(before), "the old state was changed in place: autograd and the check still need it"
    one_step = u[..., None], delta[..., None], A, B[..., None], C[..., None], torch.zeros(d), h
    out, state = _scan_loop(*one_step)
    for message, mistake in _SCAN_MISTAKES.items():
        wrong_out, wrong_state = _scan_loop(*one_step, **mistake)
        assert not (torch.allclose(new, wrong_state) and torch.allclose(y, wrong_out[..., 0])), message
    no_u = torch.allclose(new - state, (delta * (1 - u))[..., None] * B[:, None])
    assert not no_u, "the input u_t is missing: delta_t B_t u_t is added to the state"
    assert torch.allclose(new, state), "the new state is wrong: exp(delta A) h + delta B u, each with the right axes"
    sums = "the state is right, the output is not: y[d] = sum over n of C[n] h[d, n]"
    assert torch.allclose(y, out[..., 0]), sums


@check
def scan(my_scan) -> None:
    """Against a loop over batch, channels, time and states."""
    arguments = _scan_arguments(2, 3, 4, 7)
    kept = [x.clone() for x in arguments]
    u, delta, A, B, C, D = arguments
    y = my_scan(*arguments)
    assert isinstance(y, torch.Tensor), f"return y, a tensor (b, d, l), not {type(y).__name__}"
    y = y.double()
    assert y.shape == u.shape, f"shape {tuple(y.shape)}: y is like u, (b, d, l) = {tuple(u.shape)}"
    assert all(x.equal(old) for x, old in zip(arguments, kept)), "an argument was changed in place"
    expected, near = _scan_loop(*arguments)[0], functools.partial(torch.allclose, y)
    skip = D[:, None] * u
    for message, mistake in _SCAN_MISTAKES.items():
        assert not near(_scan_loop(*arguments, **mistake)[0]), message
    assert not near(_scan_loop(u, delta, A, C, B, D)[0]), "B and C are swapped: B writes into the state, C reads it"
    assert not near(_scan_loop(u, delta, A, B, B, D)[0]), "the output reads with B: it is C_t . h_t"
    assert not near((expected - skip) / A.shape[1] + skip), "a mean over the states: y_t is their sum, C_t . h_t"
    assert not near(expected - skip + delta * skip), "the skip is multiplied by delta: it is D u_t"
    turned = _scan_loop(*(x.flip(-1) if x.ndim == 3 else x for x in arguments))[0].flip(-1)
    assert not near(turned), "time runs backwards: step t must follow step t-1"
    assert not near(turned.flip(-1)), "time runs backwards: the outputs come last step first"
    steps = [_scan_loop(*(x[..., t : t + 1] if x.ndim == 3 else x for x in arguments))[0] for t in range(7)]
    assert not near(torch.cat(steps, -1)), "no state is carried from step to step"
    assert not near(expected - skip), "the skip is missing: D u_t is added to y_t"
    assert not near(expected - skip + D[:, None]), "the skip is D u_t, not D"
    raw = _scan_loop(u, torch.log1p(delta.exp()), A, B, C, D)[0]
    assert not near(raw), "softplus was applied: here delta is positive already"
    first = "the first step is wrong already: from a state of 0 it is C . (delta B u) + D u, each with the right axes"
    assert torch.allclose(y[..., 0], expected[..., 0]), first
    assert near(expected), "the first step is right, later ones are not: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t"


@check
def scan_gradient(my_scan_gradient) -> None:
    """Against the products of decays between all pairs of steps."""
    l, generator = 6, torch.Generator().manual_seed(2)
    a = torch.rand(l, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    x, g = torch.randn(2, l, generator=generator, dtype=torch.float64)

    def link(s, t):  # dh_t / dx_s
        return math.prod(a[s + 1 : t + 1].tolist())

    h = [sum(link(s, t) * x[s].item() for s in range(t + 1)) for t in range(l)]
    G = torch.tensor([sum(link(s, t) * g[t].item() for t in range(s, l)) for s in range(l)], dtype=torch.float64)
    h, past = torch.tensor(h, dtype=torch.float64), torch.tensor([0.0, *h[:-1]], dtype=torch.float64)
    try:
        with torch.inference_mode():  # in which torch.enable_grad() does not help either
            answer = my_scan_gradient(a.clone(), x.clone(), g.clone())
    except RuntimeError as error:
        assert "does not require grad" not in str(error), "without autograd: write the two recurrences out"
        raise
    assert isinstance(answer, tuple | list) and len(answer) == 2, "return two things: dL/da and dL/dx"
    da, dx = (torch.as_tensor(gradient).double() for gradient in answer)
    assert da.shape == dx.shape == (l,), f"shapes {tuple(da.shape)}, {tuple(dx.shape)}: both are (l,) = ({l},)"
    swapped = torch.allclose(da, G) and torch.allclose(dx, G * past)
    assert not swapped, "the two are swapped: dL/da comes first, then dL/dx"
    assert not torch.allclose(dx, g), "nothing comes from the future: h_t also acts through h_{t+1}"

    def backward(factor, order=None):  # G_t = g_t + factor_t G_{t+1}, with other factors
        out, carry = torch.zeros(l, dtype=torch.float64), 0.0
        for t in order or reversed(range(l)):
            out[t] = carry = g[t] + factor[t] * carry
        return out

    assert not torch.allclose(dx, backward(a)), "the decay is one step off: G_{t+1} comes with a_{t+1}, not with a_t"
    assert not torch.allclose(dx, backward(torch.ones(l))), "the decay is missing: G_t = g_t + a_{t+1} G_{t+1}"
    assert not torch.allclose(dx, backward(a, range(l))), "time runs forwards: the gradient comes from the last step"
    assert torch.allclose(dx, G), "dL/dx is wrong: G_t = g_t + a_{t+1} G_{t+1}, from the last step to the first"
    assert not torch.allclose(da, G * h), "dL/da has h_t: a_t multiplies the state before, so it is G_t h_{t-1}"
    assert not torch.allclose(da, g * past), "dL/da has g_t: the whole gradient of h_t is G_t"
    assert torch.allclose(da, G * past), "dL/da is wrong: G_t h_{t-1}, and 0 at the first step"


# --- 03 vision mamba --------------------------------------------------------------------------------------------------


@check
def causal_convolution(my_causal_convolution) -> None:
    """Against a loop over tokens, channels and weights in fp64; also one weight, and more weights than tokens."""
    generator, b, d = torch.Generator().manual_seed(3), 2, 3
    for l, k in ((7, 4), (5, 3), (4, 1), (2, 4), (3, 5)):
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
        assert not near(torch.nn.functional.silu(expected)), f"{case}: there is a SiLU too much, only convolve"
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
            forward = y[:, :, i].flip(1) if i in (1, 3) else y[:, :, i]
            turned = forward.view(2, rows, columns, d).transpose(1, 2).flatten(1, 2)
            mistakes = {
                "it was read backwards: flip it along the tokens": read[i - 1] if i in (1, 3) else None,
                "it was read by columns: transpose it back to rows": read[i - 2] if i > 1 else None,
                "it was read by columns and backwards: transpose it back, and flip it": by_rows if i == 3 else None,
            }
            mistakes = {mistake: put_back(order) for mistake, order in mistakes.items() if order}
            if i > 1:
                mistakes["by columns it is a grid of (columns, rows): unflatten it so before transposing"] = turned
            for mistake, result in mistakes.items():
                assert near(expected) or not near(result), f"{where}: {mistake}"
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
            "r is d/16 rounded up, here it was rounded down": expected - g * 2 * d * (r - d // 16) if d % 16 else None,
            "A_log is missing, n per channel and direction": expected - g * own["A_log"],
            "d per direction are missing: the bias of conv1d or of dt_proj, or D": expected - g * d,
            "2 d per direction are missing, of the biases of conv1d and dt_proj and of D": expected - 2 * g * d,
            "B and C need n outputs of x_proj each": expected - g * d * n,
            "in_proj makes two things, x and z: 2 d outputs": expected - d * d,
            "the convolution is depthwise: k weights per channel, not k d": expected + g * (d * d * k - d * k),
        }
        for mistake, value in mistakes.items():
            assert mine != value or value == expected, f"{case}: {mistake}"
        assert mine == expected, f"{case}: {mine:,} instead of {expected:,}, {mine - expected:+,}"


# --- 04 autoregressive objective --------------------------------------------------------------------------------------


@check
def cluster_mask(my_cluster_mask) -> None:
    """Against a loop over every pair of a query and an encoder token."""
    for n, size in ((4, 3), (9, 16), (2, 4), (5, 1)):
        case, m, mine = f"n = {n}, size = {size}", (n - 1) * size, torch.as_tensor(my_cluster_mask(n, size))
        assert mine.shape == (m, m), f"{case}: shape {tuple(mine.shape)}, {(m, m)} is due: n-1 clusters are read"
        assert mine.dtype == torch.bool, f"{case}: dtype {mine.dtype}, a boolean is due, True where a query may look"
        rows, late, strict = [], [], []
        for query in range(m):
            asked = 2 + query // size  # the cluster of which the query is a patch, from 1
            rows.append([1 + token // size < asked for token in range(m)])
            late.append([1 + token // size <= asked for token in range(m)])
            strict.append([1 + token // size < asked - 1 for token in range(m)])
        expected, late, strict = (torch.tensor(x) for x in (rows, late, strict))
        right, mine = mine.equal(expected), mine.cpu()
        assert right or not mine.equal(~expected), f"{case}: True and False are swapped: True means may look"
        assert right or not mine.equal(late), f"{case}: a leak: a query for cluster k+1 sees cluster k+1 itself"
        assert right or not mine.equal(torch.ones(m, m).bool()), f"{case}: a leak: every query sees everything"
        token = f"{case}: token-causal: a query must see the whole cluster before its own, not only some of its tokens"
        assert right or not mine.equal(torch.ones(m, m).tril().bool()), token
        blind = f"{case}: strict: a query for cluster k+1 does not see cluster k, and those for cluster 2 see nothing"
        assert right or not (mine.equal(strict) or mine.equal(torch.ones(m, m).tril(-1).bool())), blind
        assert right or not mine.equal(expected.T), f"{case}: transposed: rows are queries, columns encoder tokens"
        leaks = (mine & ~expected).sum().item()
        assert leaks == 0, f"{case}: a leak: {leaks} pairs let a query see its own cluster or a later one"
        assert right, f"{case}: {(expected & ~mine).sum().item()} pairs are hidden though the token comes before"


@check
def normalised_target(my_normalised_target) -> None:
    """Against sums in fp64; patches with much contrast, with little, with colours far apart, and with none."""
    generator, b, l, p = torch.Generator().manual_seed(6), 2, 5, 12  # 2x2 pixels, 3 colours
    patches = torch.randn(b, l, p, generator=generator)
    patches[:, 1] = 3 + 1e-3 * patches[:, 1]
    patches[:, 2] = 0.5
    patches[:, 3] += torch.tensor([0.0, 2, 5]).repeat(4)
    mine, x = my_normalised_target(patches.clone()), patches.double()
    assert mine.shape == (b, l, p), f"shape {tuple(mine.shape)}, {(b, l, p)} is due"
    assert mine.isfinite().all(), "a constant patch must give 0, not NaN or infinity: add 1e-6 under the root"

    def scaled(centred, count, along=-1):
        return centred / (centred.square().sum(along, keepdim=True) / count + 1e-6).sqrt()

    near = functools.partial(torch.allclose, mine.double().cpu(), rtol=5e-3, atol=2e-3)
    centred, colours = x - x.sum(-1, keepdim=True) / p, x.view(b, l, 4, 3)
    colours = colours - colours.sum(2, keepdim=True) / 4
    whole = x - x.sum((1, 2), keepdim=True) / (l * p)
    variance = centred.square().sum(-1, keepdim=True) / (p - 1)
    assert not near(x), "not normalised: these are the plain pixels"
    assert not near(centred), "only the mean is removed: also divide by the standard deviation"
    assert not near(x / (variance + 1e-6).sqrt()), "divided without removing the mean"
    assert not near(scaled(centred, p)), "the variance is biased: divide the sum of squares by p - 1, not by p"
    each = "each colour is normalised by itself: take mean and variance over all p values together"
    assert not any(near(scaled(colours, n, along=2).flatten(2)) for n in (3, 4)), each
    one = "mean and variance are those of the whole image: every patch has its own"
    assert not any(near(scaled(whole, n, along=(1, 2))) for n in (l * p, l * p - 1)), one
    assert not near(centred / (variance + 1e-6)), "divided by the variance: take its square root"
    outside = "1e-6 is added to the standard deviation: it belongs to the variance, under the root"
    assert not near(centred / (variance.sqrt() + 1e-6)), outside
    assert near(scaled(centred, p - 1)), "each patch must be (x - mean) / sqrt(unbiased variance + 1e-6)"


@check
def cluster_losses(my_cluster_losses) -> None:
    """Against a loop over images, clusters, patches and values in fp64."""
    generator = torch.Generator().manual_seed(7)
    for b, n, size, p in ((2, 4, 3, 5), (3, 3, 2, 4)):
        case = f"n = {n}, size = {size}"
        tokens, prediction = (torch.randn(b, k * size, p, generator=generator) for k in (n, n - 1))
        mine = torch.as_tensor(my_cluster_losses(prediction.clone(), tokens.clone(), size))
        one_each = f"{(n - 1,)} is due: one loss for each predicted cluster"
        assert mine.shape == (n - 1,), f"{case}: shape {tuple(mine.shape)}, {one_each}"

        def losses(shift, mixed=False, power=2, b=b, n=n, size=size, x=prediction, y=tokens):
            result = torch.zeros(n - 1, dtype=torch.float64)
            for k in range(n - 1):
                for j in range(size):
                    here = j * (n - 1) + k if mixed else k * size + j
                    error = x[:, here].double() - y[:, here + shift].double()
                    result[k] += error.abs().pow(power).sum() / (b * size * len(error[0]))
            return result

        expected, near = losses(size), functools.partial(torch.allclose, mine.double().cpu(), atol=1e-4)
        unshifted = f"{case}: the target is not shifted: prediction 1 is of cluster 2, the first cluster is only read"
        assert not near(losses(0)), unshifted
        assert size == 1 or not near(losses(1)), f"{case}: the target is shifted by one patch: shift it by a cluster"
        assert not near(losses(size, power=1)), f"{case}: absolute errors: square them"
        assert not near(expected.sqrt()), f"{case}: there is a root too much: the mean of the squares is due"
        mixed = f"{case}: patches of different clusters are mixed: a cluster's {size} patches follow each other"
        assert not near(losses(size, mixed=True)), mixed
        summed = [expected * factor for factor in (b, size, p, b * size, b * p, size * p, b * size * p)]
        mean = f"{case}: there is a sum where a mean is due: over images, patches and values"
        assert not any(near(x) for x in summed), mean
        assert near(expected), f"{case}: not the mean squared error of each cluster from 2 to n"


@check
def dependence(my_dependence) -> None:
    """On predictors of which it is known what they read: one value, a difference of tokens, a square, and zeros."""
    generator = torch.Generator().manual_seed(8)
    n, m, size, d, e = 5, 4, 3, 4, 2

    def ask(predict, tokens):
        before = tokens.clone()
        mine = my_dependence(predict, tokens, size)
        assert tokens.equal(before), "tokens was changed in place: work on a clone"
        assert mine.shape == (n, m), f"shape {tuple(mine.shape)}, {(n, m)} is due: changed cluster, predicted cluster"
        assert mine.dtype == torch.bool, f"dtype {mine.dtype}, a boolean is due"
        return mine.cpu()

    tokens = torch.randn(1, n * size, d, generator=generator)
    tokens[:, size : 2 * size] = 0  # cluster 1, from 0
    for case in range(20):
        truth = torch.rand(n, m, generator=generator) < 0.5
        reads, writes, channel, value = (torch.randint(high, (), generator=generator) for high in (size, size, d, e))

        def predict(x, truth=truth, reads=reads, writes=writes, channel=channel, value=value, signs=False, case=case):
            x = x.unflatten(1, (n, size))  # (b, n, size, d)
            read = x[:, :, reads, channel]  # one value of each cluster
            if case % 5 == 1:  # a difference of tokens: a constant added to all of them is invisible
                read = read - x[:, :, (reads + 1) % size, channel]
            elif case % 5 == 4:  # the same for channels
                read = read - x[:, :, reads, (channel + 1) % d]
            elif case % 5 == 3:  # a square: it has no slope where the value is zero
                read = read.square()
            out = torch.zeros(len(x), m, size, e)
            out[:, :, writes, value] = read @ truth.float() * 0.1
            if case % 5 == 2:  # two values that always cancel
                out[:, :, writes, 1 - value] = -out[:, :, writes, value]
            return out.flatten(1, 2)

        mine = ask(predict, tokens) | ask(predict, tokens)  # noise so near 0 that its square is not seen: not twice
        few = "changes go unseen: change every value of every token of the cluster, and look at every predicted value"
        if case % 5 in (1, 4):
            what = "tokens" if case % 5 == 1 else "channels of a token"
            few = f"a predictor that compares {what} goes unseen: change each value by its own random amount"
        elif case % 5 == 2:
            few = "two changes that cancel go unseen: look at absolute differences before summing or averaging"
        assert (mine | ~truth)[torch.arange(n) != 1].all(), few
        flat = "a square has no slope at 0: change values by about 1, a gradient or a tiny change is not enough"
        zeros = "a cluster of zeros is not changed by setting or multiplying it: add noise"
        assert (mine | ~truth).all(), flat if case % 5 == 3 else zeros
        assert not (mine & ~truth).any(), "reports a dependence that is not there: change one cluster at a time"
    assert not ask(lambda x: x[:, : m * size, :e] * 1e-9, tokens).any(), "only changes above 1e-6 count"


# --- 05 pretraining ---------------------------------------------------------------------------------------------------


@check
def rate_at(my_rate_at) -> None:
    """Against cos^2, which is half a cosine too; at steps within epochs, with and without warm-up."""
    for per_epoch, epochs, warmup, peak, low in ((7, 20, 5, 2e-3, 1e-4), (3, 9, 2.5, 1.0, 0.0), (10, 4, 0, 1.0, 0.1)):

        def fall(progress, low, peak):
            return low + (peak - low) * math.cos(math.pi * progress / 2) ** 2

        for step in range(per_epoch * epochs):
            e, case = step / per_epoch, f"step {step} of {per_epoch * epochs}, {per_epoch} per epoch, warm-up {warmup}"
            mine = my_rate_at(step, per_epoch, epochs, warmup, peak, low)
            assert isinstance(mine, float | int), f"a rate is a float, this is a {type(mine).__name__}"
            expected = peak * e / warmup if e < warmup else fall((e - warmup) / (epochs - warmup), low, peak)
            if e < warmup:
                mistakes = {
                    "the warm-up counts from 1: step 0 has rate 0": peak * (step + 1) / per_epoch / warmup,
                    "the warm-up is in epochs, this one is in steps": min(peak, peak * step / warmup),
                    "the warm-up starts at 0, not at the minimum": low + (peak - low) * e / warmup,
                    "the rate jumps once per epoch: use fractions of an epoch": peak * (step // per_epoch) / warmup,
                    "there is no warm-up": fall(e / epochs, low, peak),
                }
            else:
                progress = (e - warmup) / (epochs - warmup)
                whole = (step // per_epoch - warmup) / (epochs - warmup)
                mistakes = {
                    "the cosine is measured from step 0: its clock starts at the end of the warm-up": fall(
                        e / epochs, low, peak
                    ),
                    "a whole cosine goes down and up again: half of one is wanted": fall(2 * progress, low, peak),
                    "the minimum is missing": fall(progress, 0.0, peak),
                    "the minimum comes on top of the peak: scale by peak - minimum": low + fall(progress, 0.0, peak),
                    "the rate jumps once per epoch: use fractions of an epoch": fall(whole, low, peak),
                    "the cosine is to end at `epochs`, not `warmup` after it": fall((e - warmup) / epochs, low, peak),
                }
            near = functools.partial(math.isclose, mine, rel_tol=1e-5, abs_tol=1e-6 * peak)  # fp32 will do
            for mistake, value in mistakes.items() if not near(expected) else ():
                assert not near(value), f"{case}: {mistake}"
            assert near(expected), f"{case}: {mine:.9g}, not {expected:.9g}"


@check
def decays(my_decays) -> None:
    """Against a table written by hand, of both stages' names."""
    mixer, block = "encoder.layers.3.mixer.", "layers.11."
    no_a = "decays: it has two dimensions, but decay pulls every A towards -1"
    scale = "decays: it is a scale or an offset, whatever it is called"
    learned = "decays: tokens and positions are inputs, not maps, though they have three dimensions"
    matrix = "does not decay, though it is a matrix or a convolution kernel"
    table = {mixer + "A_log": ((768, 16), False, no_a), "layers.0.mixer.A_log": ((3072, 16), False, no_a)}
    for name in ("ar_token", "cls_token"):
        table[name] = (1, 1, 512), False, learned
    table["pos_embed"] = (1, 197, 768), False, learned
    for name in ("D", "conv1d.bias", "dt_proj.bias"):
        table[mixer + name] = (768,), False, scale
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "mlp.w3.bias"):
        table[block + name] = (768,), False, scale
    for name in ("norm_f.weight", "head.bias", "tap_norms.2.weight", "ar_norm.bias", "decoder.0.norm_kv.weight"):
        table[name] = (512,), False, scale
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        table[f"{mixer}{name}.weight"] = (768, 768), True, matrix
    for name in ("mlp.w1", "mlp.w3", "mixer.out_proj"):
        table[f"{block}{name}.weight"] = (768, 2048), True, matrix
    for name in ("head.weight", "enc2dec.weight", "ar_pred.weight", "decoder.1.kv.weight", "decoder.1.fc1.weight"):
        table[name] = (1000, 768), True, matrix
    table[mixer + "conv1d.weight"] = (768, 1, 4), True, matrix
    table["encoder.patch_embed.weight"] = table["patch_embed.weight"] = (768, 3, 16, 16), True, matrix
    for name, (shape, expected, mistake) in table.items():
        mine = my_decays(name, shape)
        assert isinstance(mine, bool), f"the answer for {name} is a {type(mine).__name__}: True or False is wanted"
        assert mine == expected, f"{name} {mistake}"


@check
def accumulate(my_accumulate) -> None:
    """Against the closed form for a linear model, 2/b X^T (X w - y), in fp64, with something left in .grad or not."""
    generator = torch.Generator().manual_seed(0)
    for b, parts, before in ((12, 3, 100.0), (8, 1, 100.0), (8, 8, 100.0), (6, 2, None)):
        batch = torch.randn(b, 5, dtype=torch.float64, generator=generator)  # four inputs and what to predict
        model, seen, case = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64), [], f"{b} images in {parts} parts"
        left, weight = torch.full_like(model.weight, before or 0.0), model.weight.detach().clone()
        model.weight.grad = left.clone() if before else None

        def loss_of(net, piece, seen=seen):
            seen.append((len(piece), None if net.weight.grad is None else net.weight.grad.clone()))
            return (net(piece[:, :4])[:, 0] - piece[:, 4]).square().mean()

        try:
            mine = my_accumulate(model, loss_of, batch.clone(), parts)
        except AttributeError as error:
            assert before, f"{case}: {error}: before a first step .grad is None"
            raise
        assert model.weight.equal(weight), f"{case}: the weights were changed: only their gradient is asked for"
        lengths, grad = [length for length, _ in seen], model.weight.grad
        assert lengths == [b // parts] * parts, f"{case}: pieces of {lengths} were passed, not {parts} of {b // parts}"
        assert grad is not None and bool(grad.count_nonzero()), f"{case}: there is no gradient in .grad: backward?"
        error = batch[:, :4] @ model.weight.detach()[0] - batch[:, 4]
        by_piece = [2 * (e @ x[:, :4]) / len(x) for e, x in zip(error.chunk(parts), batch.chunk(parts))]
        expected, losses = sum(by_piece) / parts, [e.square().mean().item() for e in error.chunk(parts)]

        def is_(value, grad=grad):
            return torch.allclose(grad[0], value, rtol=1e-9, atol=1e-12)

        if not is_(expected):
            assert not is_(parts * expected), f"{case}: the gradient is {parts} times too large: divide each loss"
            old = f"{case}: what was in .grad before is still in there: zero it first"
            assert not is_(expected + left[0]) and not is_(parts * expected + left[0]), old
            images = f"{case}: divided by a number of images: a loss is a mean already, divide it by {parts}, the parts"
            assert not is_(sum(by_piece) / b) and not is_(sum(by_piece) * parts / b), images
            last = f"{case}: only the last piece's gradient is left: zero .grad once, before the loop"
            assert not is_(by_piece[-1]) and not is_(by_piece[-1] / parts), last
        assert is_(expected), f"{case}: .grad is {grad[0].tolist()}, not {expected.tolist()}"
        late = parts > 1 and (seen[1][1] is None or not seen[1][1].count_nonzero())
        assert not late, f"{case}: one backward pass after all pieces keeps the activations of all: one for each piece"
        assert isinstance(mine, float), f"{case}: the loss is to be a float (.item()), this is a {type(mine).__name__}"
        if not math.isclose(mine, sum(losses) / parts, rel_tol=1e-9):
            ends = math.isclose(mine, losses[-1]) or math.isclose(mine, losses[-1] / parts)
            assert not ends, f"{case}: the loss is the last piece's: add them up"
            assert not math.isclose(mine, sum(losses)), f"{case}: the loss is the sum over pieces: divide by {parts}"
        assert math.isclose(mine, sum(losses) / parts, rel_tol=1e-9), f"{case}: loss {mine}, not {sum(losses) / parts}"


@check
def complete(my_complete) -> None:
    """Against the closed form for a predictor that answers with the sum of all clusters so far: then sums double."""
    generator = torch.Generator().manual_seed(0)
    for given in (1, 2, 4, 5):
        b, n, size, values = 2, 5, 3, 4
        tokens = torch.randn(b, n * size, values, generator=generator)
        x, case = tokens.unflatten(1, (n, size)), f"{given} of {n} clusters given"

        def predict(t, n=n, size=size):
            return t.unflatten(1, (n, size)).cumsum(1)[:, :-1].flatten(1, 2)

        before, where = tokens.clone(), "the prediction of cluster k is in the rows from (k-1)*size to k*size"
        try:
            mine = my_complete(predict, tokens, given, size)
        except NotImplementedError:
            raise
        except (RuntimeError, IndexError) as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error} (hint: {where})") from error
        assert tokens.equal(before), f"{case}: `tokens` was changed: work on a clone"
        assert mine.shape == tokens.shape, f"{case}: shape {tuple(mine.shape)}, not {tuple(tokens.shape)}"
        mine, start = mine.unflatten(1, (n, size)), x[:, :given].sum(1)
        assert mine[:, :given].equal(x[:, :given]), f"{case}: a given cluster was changed"

        def holds(clusters, mine=mine, given=given):
            return all(torch.allclose(mine[:, given + i], c, atol=1e-4) for i, c in enumerate(clusters))

        doubled, true = [2.0**i * start for i in range(n - given)], x.cumsum(1)
        if not holds(doubled):
            forced = [true[:, given + i - 1] for i in range(n - given)]
            assert not holds(forced), f"{case}: clusters are predicted from the true ones: put each prediction in first"
            once = f"{case}: all clusters come from one call, so none has read the one before it: call again for each"
            assert not holds([start] * (n - given)), once
            assert not holds([x[:, given + i] for i in range(n - given)]), f"{case}: nothing was predicted"
            same = torch.allclose(mine[:, given], true[:, given], atol=1e-4)
            assert not same, f"{case}: cluster {given} was predicted from itself: {where}"
        wrong = [given + i for i, c in enumerate(doubled) if not torch.allclose(mine[:, given + i], c, atol=1e-4)]
        assert not wrong, f"{case}: the first wrong prediction is of cluster {wrong[0]}; {where}"


def completed(predict, tokens: torch.Tensor, given: int, size: int) -> torch.Tensor:
    """Tokens (b, n*size, values), all clusters but the first `given` predicted on their own output; for the figures."""
    clusters = list(tokens.split(size, dim=1))
    for k in range(given, len(clusters)):
        clusters[k] = predict(torch.cat(clusters, dim=1)).split(size, dim=1)[k - 1]
    return torch.cat(clusters, dim=1)


# --- 06 finetuning ----------------------------------------------------------------------------------------------------


@check
def resize(my_resize) -> None:
    """Against bicubic weights written out (cubic convolution, a = -3/4, edges repeated), rows and columns apart."""

    def weights(old, new):  # (new, old), fp64
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            x = (i + 0.5) * old / new - 0.5
            for j in range(math.floor(x) - 1, math.floor(x) + 3):
                t, a = abs(x - j), -0.75
                near = ((a + 2) * t - (a + 3)) * t * t + 1
                far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
                matrix[i, min(max(j, 0), old - 1)] += near if t <= 1 else far
        return matrix

    def stretch(grid, new):  # (rows, columns, d) -> (new rows, new columns, d)
        rows, columns = (weights(*sides) for sides in zip(grid.shape[:2], new))
        return torch.einsum("ir,jc,rcd->ijd", rows, columns, grid)

    generator = torch.Generator().manual_seed(0)
    for old, new in (((3, 5), (4, 7)), ((4, 4), (6, 6)), ((5, 3), (4, 2)), ((2, 3), (2, 3))):
        (r, c), (r2, c2), case = old, new, f"{old} to {new}"
        pos = torch.randn(1, r * c + 1, 8, generator=generator)
        before, mine = pos.clone(), my_resize(pos, old, new)
        assert mine.shape == (1, r2 * c2 + 1, 8), f"{case}: shape {tuple(mine.shape)}, not {(1, r2 * c2 + 1, 8)}"
        assert pos.equal(before), f"{case}: `pos` itself was changed"
        middle, middle2, rows = r * c // 2, r2 * c2 // 2, list(pos[0].double())
        token, x = rows.pop(middle), mine[0].double()
        grid = torch.stack(rows)

        def is_(here, expected, x=x):
            return torch.allclose(x[here], expected, atol=1e-4)

        rest = [t for t in range(r2 * c2 + 1) if t != middle2]
        expected = stretch(grid.view(r, c, 8), new).flatten(0, 1)
        if not (is_(middle2, token) and is_(rest, expected)):
            place = f"{case}: the class token's row belongs into the new middle, at {middle2}, not"
            assert not (is_(0, token) and is_(slice(1, None), expected)), f"{place} to the front"
            assert not (is_(-1, token) and is_(slice(0, -1), expected)), f"{place} to the end"
            others = [t for t in range(r2 * c2 + 1) if t != middle]
            assert not (middle < len(x) and is_(middle, token) and is_(others, expected)), f"{place} at the old index"
            gone = f"{case}: the class token's row is to stay as it is: here it is zero"
            assert not is_(middle2, torch.zeros_like(token)), gone
            still = "the class token's row was interpolated with the grid: take it out first"
            first = pos[0, 1:].double()  # as if the class token came first
            assert not is_(slice(1, None), stretch(first.view(r, c, 8), new).flatten(0, 1)), f"{case}: {still}"
            for mode in ("linear", "nearest"):
                flat = F.interpolate(pos.mT, r2 * c2 + 1, mode=mode)[0].mT.double()
                assert not is_(slice(None), flat), f"{case}: {still}"
            swapped = stretch(grid.view(c, r, 8), new[::-1]).flatten(0, 1)
            assert not is_(rest, swapped), f"{case}: rows and columns are swapped: the grid is (rows, columns)"
            turned = stretch(grid.view(r, c, 8), new).transpose(0, 1).flatten(0, 1)
            assert not is_(rest, turned), f"{case}: the result goes down the columns: flatten row by row"
            mixed = stretch(grid.view(8, r, c).permute(1, 2, 0), new).flatten(0, 1)
            mixed_too = stretch(grid.view(8, r, c).permute(1, 2, 0), new).permute(2, 0, 1).reshape(-1, 8)
            view = f"{case}: channels and places are mixed up: (r*c, d) needs a permute to become (d, r, c), not a view"
            assert not is_(rest, mixed) and not is_(rest, mixed_too), view
            image = grid.view(r, c, 8).permute(2, 0, 1)[None]
            for mode, corners in (("bicubic", True), ("bilinear", True), ("bilinear", False)):
                other = F.interpolate(image, new, mode=mode, align_corners=corners)[0].flatten(1).mT
                assert not is_(rest, other), f"{case}: this is mode={mode}, align_corners={corners}"
        assert is_(middle2, token), f"{case}: row {middle2} is not the class token's"
        assert is_(rest, expected), f"{case}: the grid's rows are wrong"


@check
def scale(my_scale) -> None:
    """Against a table filled from the top down, one multiplication a layer."""
    for depth, decay in ((12, 0.65), (24, 0.75), (2, 0.5)):
        table, factor = {"norm_f.weight": 1.0, "norm_f.bias": 1.0, "head.weight": 1.0, "head.bias": 1.0}, 1.0
        number = dict.fromkeys(table, depth + 1)
        for i in reversed(range(depth)):
            factor *= decay
            for name in ("mixer.A_log", "mlp.w1.weight", "norm1.bias"):
                table[f"layers.{i}.{name}"], number[f"layers.{i}.{name}"] = factor, i + 1
        for name in ("patch_embed.weight", "patch_embed.bias", "pos_embed", "cls_token"):
            table[name], number[name] = factor * decay, 0
        answers = {name: my_scale(name, depth, decay) for name in table}
        turned = all(math.isclose(answers[name], decay ** number[name]) for name in table)
        assert not turned, f"depth {depth}: upside down: the top has scale 1, not the bottom"
        for name, expected in table.items():
            mine, case, k = answers[name], f"{name}, depth {depth}", number[name]
            assert isinstance(mine, float | int), f"{case}: a factor is a float, this is a {type(mine).__name__}"
            if not math.isclose(mine, expected, rel_tol=1e-9):
                same = f"{case}: this has the scale of the layer below: block i is layer i + 1"
                assert not (0 < k <= depth and math.isclose(mine, decay ** (depth + 2 - k))), same
                inner = f"{case}: norm1 and norm2 are inside their blocks: only norm_f is at the top"
                assert not ("norm1" in name and mine == 1), inner
                above = f"{case}: this has the scale of the layer above: there are depth + 2 layers, top is depth + 1"
                assert not math.isclose(mine, decay ** (depth - k)), above
                digit = name.startswith("layers.1") and math.isclose(mine, decay ** (depth - 1))
                assert not digit, f"{case}: a block's number may have two digits"
                place = "norm_f and head are layer depth + 1" if k else "embeddings and class token are layer 0"
                assert 0 < k <= depth, f"{case}: {mine:.4g} instead of {expected:.4g}: {place}"
            assert math.isclose(mine, expected, rel_tol=1e-9), f"{case}: {mine:.4g} instead of {expected:.4g}"


@check
def ema_update(my_update) -> None:
    """Against the closed form: after k updates, decay^k of the start plus (1 - decay) decay^(k-j) of each weight."""
    generator, decay, shapes = torch.Generator().manual_seed(0), 0.9, {"a": (3, 2), "b": (4,)}
    series = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(6)
    ]
    average = {name: value.clone() for name, value in series[0].items()}
    for k, weights in enumerate(series[1:], start=1):
        given = {name: (average[name].clone(), weights[name].clone()) for name in shapes}
        mine = my_update(average, weights, decay)
        assert isinstance(mine, dict) and mine.keys() == shapes.keys(), "return a dict with the same names"
        for name in shapes:
            old, new = given[name]
            assert average[name].equal(old), f"{name}: the old average was changed in place: make new tensors"
            assert weights[name].equal(new), f"{name}: the weights were changed in place: make new tensors"
            expected = decay**k * series[0][name]
            expected += sum((1 - decay) * decay ** (k - j) * series[j][name] for j in range(1, k + 1))
            if not torch.allclose(mine[name], expected):
                swapped = (1 - decay) * old + decay * new
                hint = "the factors are swapped: `decay` is the share of the old average"
                assert not torch.allclose(mine[name], swapped), f"step {k}: {hint}"
                corrected = f"step {k}: the start counts: no warm-up and no correction of the bias"
                assert not torch.allclose(mine[name], new), f"step {k}: these are the weights, not an average"
                assert not torch.allclose(mine[name], expected / (1 - decay**k)), corrected
            wanted = f"{name} after step {k} is not decay * average + (1 - decay) * weights"
            assert torch.allclose(mine[name], expected), wanted
        average = mine


@check
def balanced(my_balanced) -> None:
    """Against counting, over classes of different sizes and any numbers, in any order, and many seeds."""
    targets = [c for c, size in {2: 40, 3: 5, 7: 12, 9: 20}.items() for _ in range(size)]
    random.Random(0).shuffle(targets)
    for number in (4, 8, 10, 15):
        before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
        mine = list(map(int, my_balanced(list(targets), number, 3)))
        case = f"{number} of {len(targets)} images in 4 classes"
        after = random.getstate(), repr(np.random.get_state())
        untouched = torch.get_rng_state().equal(before[0]) and after == before[1:]
        assert untouched, "a global random state was used or set: make a generator of your own"
        short = len(mine) == number // 4 * 4 and number % 4
        assert not short, f"{case}: {len(mine)} indices, what is left over after equal shares is missing"
        assert len(mine) == number, f"{case}: {len(mine)} indices"
        assert len(set(mine)) == number, f"{case}: an image is chosen twice: draw without replacement"
        assert all(0 <= i < len(targets) for i in mine), f"{case}: not all are indices into `targets`"
        counts = [sum(targets[i] == c for i in mine) for c in sorted(set(targets))]
        assert max(counts) - min(counts) <= 1, f"{case}: {counts} of the classes differ by more than one"
        again = map(int, my_balanced(list(targets), number, 3))
        assert sorted(again) == sorted(mine), f"{case}: the same seed, another answer"
    draws = [set(map(int, my_balanced(list(targets), 8, seed))) for seed in range(300)]
    assert len({tuple(sorted(draw)) for draw in draws}) > 250, "other seeds must give other images, not the first ones"
    times = [sum(i in draw for draw in draws) for i in range(len(targets))]
    for i, c in enumerate(targets):
        often = 300 * 2 / targets.count(c)  # expected; two of each class
        spread = 6 * math.sqrt(often * (1 - often / 300))
        uneven = f"image {i} came {times[i]} times in 300 draws, not about {often:.0f}: shuffle each class"
        assert abs(times[i] - often) <= spread, uneven


# --- 07 does it work --------------------------------------------------------------------------------------------------

T_975 = {1: 12.70620, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 7: 2.36462}  # t quantiles, from printed tables


@check
def paired_interval(my_interval) -> None:
    """Against sums over pairs and a printed table of t quantiles, with seeds in another order and seeds missing."""
    luck = [71.0, 80.5, 64.2, 77.7, 69.1, 83.0, 75.4, 60.3]
    for n in (5, 2, 3, 8):
        ours = {seed: luck[seed] - 0.6 + (7 * seed % 5) / 2 for seed in range(n)}
        theirs = {seed: luck[seed] - (3 * seed % 4) / 3 for seed in reversed(range(n))}
        for alone in (False, True):
            mine = dict(ours), dict(theirs)
            if alone:
                mine[0][50], mine[1][60] = 90.0, 10.0
            case = f"{n} shared seeds{', and one more on each side' if alone else ''}"
            try:
                answer = my_interval(*mine)
            except KeyError as error:
                raise AssertionError(f"{case}: seed {error} is in one dict only: take those that both have") from None
            assert isinstance(answer, tuple) and len(answer) == 2, "return a tuple (mean, half width)"
            mean, half = answer
            d = [ours[seed] - theirs[seed] for seed in range(n)]
            expected = sum(d) / n
            assert not math.isclose(mean, -expected, rel_tol=1e-6), f"{case}: the sign: ours minus theirs"
            if not math.isclose(mean, expected, rel_tol=1e-6):
                absolute = math.isclose(mean, sum(map(abs, d)) / n, rel_tol=1e-6)
                assert not absolute, f"{case}: absolute differences: where theirs is ahead, it counts against ours"
                hint = "a seed that only one side has must not count" if alone else "look at the mean alone first"
                raise AssertionError(f"{case}: mean {mean:.3f}, not {expected:.3f}: {hint}")
            squares, t = sum((x - expected) ** 2 for x in d), T_975[n - 1]
            error = math.sqrt(squares / (n - 1) / n)

            def is_(value, half=half):
                return math.isclose(half, value, rel_tol=1e-4)

            def squared(x, n=n):
                return sum((value - sum(x) / n) ** 2 for value in x)

            if not is_(t * error):
                assert not is_(t * error * math.sqrt(n)), f"{case}: no sqrt(n): the spread of one run, not of the mean"
                assert not is_(t * error / math.sqrt(n)), f"{case}: divided by n, not by sqrt(n)"
                assert not is_(t * math.sqrt(squares) / n), f"{case}: the variance is over n - 1, not over n"
                assert not is_(1.959964 * error), f"{case}: the normal quantile: the spread is itself a guess, take t"
                assert not is_(error), f"{case}: one standard error, not multiplied by the t quantile"
                assert not is_(2 * t * error), f"{case}: the whole width, the half is due"
                more = {2: 2.91999, 3: 2.35336, 5: 2.01505, 8: 1.85955}  # t quantiles 0.95 at n, and at n - 1
                less = {2: 6.31375, 3: 2.91999, 5: 2.13185, 8: 1.89458}
                one_sided = is_(less[n] * error) or is_(more[n] * error)
                assert not one_sided, f"{case}: the quantile of a one-sided interval: 0.975 leaves 2.5 % on each side"
                freedom = {2: 4.30265, 3: 3.18245, 5: 2.57058, 8: 2.30600}[n]
                assert not is_(freedom * error), f"{case}: n - 1 degrees of freedom, these are n"
                apart = math.sqrt((squared(list(ours.values())) + squared(list(theirs.values()))) / (n - 1) / n)
                both = {2: 4.30265, 3: 2.77645, 5: 2.30600, 8: 2.14479}[n]  # at 2n - 2
                unpaired = is_(apart * t) or is_(apart * both) or is_(apart * 1.959964)
                assert not unpaired, f"{case}: unpaired: luck that both sides share counts as doubt; take differences"
                place = [x - y for x, y in zip(ours.values(), theirs.values())]
                by_place = is_(t * math.sqrt(squared(place) / (n - 1) / n))
                assert not by_place, f"{case}: paired by place in the dicts: pair by seed, theirs come in another order"
            assert is_(t * error), f"{case}: half width {half:.4f} instead of {t * error:.4f}"


@check
def accuracy_error(my_error) -> None:
    """Against the definition: the spread of the accuracy over all numbers of right answers, each with its chance."""
    for percent, images in ((80.0, 355), (50.0, 100), (97.0, 40), (12.5, 64)):
        p, mine, variance = percent / 100, my_error(percent, images), 0.0
        for right in range(images + 1):
            chance = math.comb(images, right) * p**right * (1 - p) ** (images - right)
            variance += chance * (100 * right / images - percent) ** 2
        expected, case = math.sqrt(variance), f"{percent} % of {images} images"
        assert not isinstance(mine, complex), f"{case}: the root of a negative number: an accuracy of 80 is p = 0.8"
        if not math.isclose(mine, expected, rel_tol=1e-6):
            assert not math.isclose(mine, expected / 100, rel_tol=1e-6), f"{case}: a fraction: points are due"
            assert not math.isclose(mine, variance, rel_tol=1e-6), f"{case}: the variance: its root is due"
            twice = math.isclose(mine, 100 * expected, rel_tol=1e-6)
            assert not twice, f"{case}: 100 times too large: the root of percents is in points already"
            fraction = math.isclose(mine, variance / 1e4, rel_tol=1e-6)
            assert not fraction, f"{case}: the variance, of a fraction: its root is due, in points"
            one = f"{case}: the spread of one answer: the mean of {images} varies less"
            assert not math.isclose(mine, expected * math.sqrt(images), rel_tol=1e-6), one
            wide = any(math.isclose(mine, expected * z, rel_tol=1e-3) for z in (1.96, 2.0))
            assert not wide, f"{case}: the half width of a 95 % interval: one standard error is due"
            half = math.isclose(mine, 50 / math.sqrt(images), rel_tol=1e-6)
            assert not half, f"{case}: the error at 50 %, the largest: it depends on the accuracy"
        assert math.isclose(mine, expected, rel_tol=1e-6), f"{case}: {mine:.4f} instead of {expected:.4f}"


@check
def choose(my_choice) -> None:
    """Against a table worked out by hand, in which every wrong rule has a winner of its own."""
    table = {  # name: scores by seed, held-out and test
        "one lucky seed": ({0: 60.0, 1: 61.0, 2: 95.0}, {0: 70.0, 1: 71.0, 2: 72.0}),  # mean 72
        "most seeds": ({0: 78.0, 1: 79.0, 2: 80.0, 3: 81.0}, {0: 73.0, 1: 74.0}),  # mean 79.5, the largest sum
        "right": ({0: 80.0, 3: 84.0, 4: 85.0}, {0: 74.0, 5: 78.0, 6: 79.0}),  # mean 83
        "best test": ({0: 75.0, 1: 76.0, 2: 77.0}, {0: 90.0, 1: 91.0, 2: 92.0}),
        "best test run": ({0: 50.0, 1: 51.0, 2: 53.0}, {0: 99.0, 1: 40.0, 2: 41.0}),
        "high middle": ({0: 60.0, 1: 90.0, 2: 91.0}, {0: 70.0, 1: 72.0, 2: 73.0}),  # mean 80.3, the highest median
        "never bad": ({0: 82.0, 1: 82.4, 2: 82.6}, {0: 60.0, 1: 61.0, 2: 62.0}),  # mean 82.3
        "good at first": ({0: 86.0, 1: 70.0, 2: 71.0}, {0: 50.0, 1: 51.0, 2: 52.0}),  # seed 0 is all that all have
        "lowest": ({0: 40.0, 1: 41.0, 2: 42.0}, {0: 44.0, 1: 45.0, 2: 46.0}),
        "high seeds": ({0: 68.0, 40: 69.0, 41: 70.0}, {0: 56.0, 40: 57.0, 41: 58.0}),
    }
    for order in (list(table), list(reversed(table))):
        try:
            answer = my_choice({name: dict(zip(("held-out", "test"), map(dict, table[name]))) for name in order})
        except KeyError as error:
            raise AssertionError(f"no seed {error}: held-out and test runs may have others: take .values()") from None
        assert isinstance(answer, tuple) and len(answer) == 2, "return a tuple (name, mean test score)"
        name, score = answer
        assert name != "best test", "chosen by the mean test score: what is reported must not decide"
        assert name != "best test run", "chosen by the best single test score"
        assert name != "never bad", "chosen by the lowest score: the exercise asks for the highest mean"
        assert name != "good at first", "compared on seeds that all have: each setting has a mean of its own"
        assert name != "lowest", "this has the lowest mean: the highest is due"
        assert name != "high seeds" and score > 10, "a mean of the seeds themselves: take .values()"
        assert name != "one lucky seed", "chosen by the best single held-out run: compare means over seeds"
        assert name != "high middle", "chosen by the median: the exercise asks for the highest mean"
        assert name != "most seeds", "chosen by the sum: settings with more seeds win; compare means"
        assert name == "right", f"{name!r} does not have the highest mean held-out score"
        assert not math.isclose(score, 83.0), "the held-out mean was returned: it chose, so it flatters; report test"
        assert not math.isclose(score, 74.0), "only the seeds of the held-out runs: report the mean of all test scores"
        assert not math.isclose(score, 79.0), "the best test run was returned: report the mean over seeds"
        assert not math.isclose(score, 91.0), "the test score of another setting"
        assert math.isclose(score, 77.0), f"score {score}, the mean test score of the chosen setting is 77.0"
