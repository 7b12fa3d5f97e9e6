"""Right answers to the exercises of this notebook, and wrong ones with the message that names the mistake."""

import functools

import checks
import torch
import torch.nn.functional as F


def discretise(delta, A, B):
    decay = torch.exp(delta * A)
    return decay, (decay - 1) / A * B, delta * B


def recurrence(h, u, delta, A, B, C, sign=1.0, scale=True, late=False, decays=True, held=False, stepless=False):
    decay = torch.exp(sign * (1.0 if stepless else delta[..., None]) * A) if decays else 1.0
    factor = (decay - 1) / A if held else delta[..., None] if scale else 1.0
    new = decay * h + factor * u[..., None] * B[:, None]
    return new, ((h if late else new) * C[:, None]).sum(-1)


def scan(u, delta, A, B, C, D, **mistake):
    h, ys = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for parts in zip(u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2)):
        h, y = recurrence(h, *parts[:2], A, *parts[2:], **mistake)
        ys.append(y)
    return torch.stack(ys, dim=2) + D[:, None] * u


def backwards(u, delta, A, B, C, D):
    return scan(u.flip(2), delta.flip(2), A, B.flip(2), C.flip(2), D).flip(2)


def stateless(u, delta, A, B, C, D):
    return torch.cat([scan(*(x[..., t : t + 1] for x in (u, delta)), A, B[..., t : t + 1], C[..., t : t + 1], D)
                      for t in range(u.shape[2])], dim=2)  # fmt: skip


def input_decayed(h, u, delta, A, B, C):
    new = torch.exp(delta[..., None] * A) * (h + (delta * u)[..., None] * B[:, None])
    return new, (new * C[:, None]).sum(-1)


def forgets(u, delta, A, B, C, D):
    """Starts again in the middle."""
    pieces = zip(*(x.split(4, dim=2) for x in (u, delta, B, C)))
    return torch.cat([scan(u_i, delta_i, A, B_i, C_i, D) for u_i, delta_i, B_i, C_i in pieces], dim=2)


def in_place(h, *arguments):
    new, y = recurrence(h, *arguments)
    return h.copy_(new), y


def scan_gradient(a, x, g, shift=1, past=True, whole=True):
    """Right as it is; shift=0 uses a_t for a_{t+1}, past=False h_t for h_{t-1}, whole=False g_t for G_t in dL/da."""
    h, states = torch.zeros((), dtype=a.dtype), [torch.zeros((), dtype=a.dtype)]
    for a_t, x_t in zip(a, x):
        h = a_t * h + x_t
        states.append(h)
    before = torch.stack(states[:-1] if past else states[1:])
    factor = F.pad(a, (0, 1))[shift:]
    G, carry = torch.zeros_like(a), 0.0
    for t in reversed(range(len(a))):
        G[t] = carry = g[t] + factor[t] * carry
    return (G if whole else g) * before, G


def forwards(a, x, g):
    _, G = scan_gradient(a.flip(0), x.flip(0), g.flip(0), shift=0)
    return scan_gradient(a, x, g)[0], G.flip(0)


def wrong(function, **mistake):
    return functools.partial(function, **mistake)


def by_autograd(a, x, g):
    a, x = a.requires_grad_(), x.requires_grad_()
    h, loss = 0.0, 0.0
    for t in range(len(a)):
        h = a[t] * h + x[t]
        loss = loss + g[t] * h
    return torch.autograd.grad(loss, (a, x))


WRONG = {
    "discretise: positive A": (checks.discretise, lambda t, A, B: discretise(t, -A, B), "A was taken as positive"),
    "discretise: Euler decay": (checks.discretise, lambda t, A, B: (1 + t * A, *discretise(t, A, B)[1:]), "Euler's"),
    "discretise: delta outside": (checks.discretise, lambda t, A, B: (t * A.exp(), B, B), "the decay is wrong"),
    "discretise: not divided by A": (
        checks.discretise,
        lambda t, A, B: (torch.exp(t * A), (torch.exp(t * A) - 1) * B, t * B),
        "not divided by A",
    ),
    "discretise: wrong sign": (
        checks.discretise,
        lambda t, A, B: (torch.exp(t * A), (1 - torch.exp(t * A)) / A * B, t * B),
        "wrong sign",
    ),
    "discretise: Euler twice": (
        checks.discretise,
        lambda t, A, B: (torch.exp(t * A), t * B, t * B),
        "exact input factor is Euler",
    ),
    "discretise: delta not in B": (
        checks.discretise,
        lambda t, A, B: (*discretise(t, A, B)[:2], B),
        "delta is not multiplied into B",
    ),
    "step: read before update": (checks.recurrence, wrong(recurrence, late=True), "read before it was updated"),
    "step: no decay": (checks.recurrence, wrong(recurrence, decays=False), "the decay is missing"),
    "step: positive A": (checks.recurrence, wrong(recurrence, sign=-1.0), "A was taken as positive"),
    "step: delta not in B": (checks.recurrence, wrong(recurrence, scale=False), "not multiplied by delta"),
    "step: no input": (
        checks.recurrence,
        lambda h, u, *rest: recurrence(h, torch.ones_like(u), *rest),
        "the input u_t is missing",
    ),
    "step: exact factor": (checks.recurrence, wrong(recurrence, held=True), "the exact input factor"),
    "step: in place": (checks.recurrence, in_place, "changed in place"),
    "step: output before state": (checks.recurrence, lambda *x: recurrence(*x)[::-1], "the state has shape"),
    "step: mean of states": (
        checks.recurrence,
        lambda *x: (recurrence(*x)[0], recurrence(*x)[1] / 4),
        "the state is right, the output is not",
    ),
    "step: decay without delta": (checks.recurrence, wrong(recurrence, stepless=True), r"the decay is exp\(A\)"),
    "step: input decayed": (checks.recurrence, input_decayed, "the input is decayed too"),
    "scan: nothing returned": (checks.scan, lambda *x: None, "does the function end with a return"),
    "scan: a list": (checks.scan, lambda *x: list(scan(*x)), "return y, a tensor"),
    "scan: exact factor": (checks.scan, wrong(scan, held=True), "the exact input factor"),
    "scan: read before update": (checks.scan, wrong(scan, late=True), "read before it was updated"),
    "scan: no decay": (checks.scan, wrong(scan, decays=False), "the decay is missing"),
    "scan: positive A": (checks.scan, wrong(scan, sign=-1.0), "A was taken as positive"),
    "scan: delta not in B": (checks.scan, wrong(scan, scale=False), "not multiplied by delta"),
    "scan: reversed time": (checks.scan, backwards, "time runs backwards: step t"),
    "scan: reversed outputs": (checks.scan, lambda *x: backwards(*x).flip(2), "time runs backwards: the outputs"),
    "scan: no state carried": (checks.scan, stateless, "no state is carried"),
    "scan: decay without delta": (checks.scan, wrong(scan, stepless=True), r"the decay is exp\(A\)"),
    "scan: swapped": (checks.scan, lambda u, delta, A, B, C, D: scan(u, delta, A, C, B, D), "B and C are swapped"),
    "scan: B twice": (checks.scan, lambda u, delta, A, B, C, D: scan(u, delta, A, B, B, D), "reads with B"),
    "scan: mean of states": (checks.scan, lambda u, delta, A, B, C, D: scan(u, delta, A, B, C / 4, D), "a mean over"),
    "scan: delta in the skip": (
        checks.scan,
        lambda *x: scan(*x[:5], 0 * x[5]) + x[5][:, None] * x[0] * x[1],
        "the skip is multiplied by delta",
    ),
    "scan: all skips": (
        checks.scan,
        lambda *x: scan(*x[:5], x[5].sum().expand_as(x[5])),
        "the first step is wrong already",
    ),
    "scan: state cut": (checks.scan, forgets, "the first step is right"),
    "scan: no skip": (checks.scan, lambda *x: scan(*x[:5], 0 * x[5]), "the skip is missing"),
    "scan: softplus": (checks.scan, lambda u, delta, *x: scan(u, F.softplus(delta), *x), "softplus was applied"),
    "gradient: no future": (checks.scan_gradient, lambda a, x, g: (scan_gradient(a, x, g)[0], g), "from the future"),
    "gradient: decay one off": (checks.scan_gradient, wrong(scan_gradient, shift=0), "one step off"),
    "gradient: no decay": (
        checks.scan_gradient,
        lambda a, x, g: (a, scan_gradient(torch.ones_like(a), x, g)[1]),
        "the decay is missing",
    ),
    "gradient: swapped": (checks.scan_gradient, lambda *a: scan_gradient(*a)[::-1], "the two are swapped"),
    "gradient: by autograd": (checks.scan_gradient, by_autograd, "without autograd"),
    "gradient: by autograd, switched on": (checks.scan_gradient, torch.enable_grad()(by_autograd), "without autograd"),
    "gradient: forwards": (checks.scan_gradient, forwards, "time runs forwards"),
    "gradient: state of now": (checks.scan_gradient, wrong(scan_gradient, past=False), "dL/da has h_t"),
    "gradient: g for G": (checks.scan_gradient, wrong(scan_gradient, whole=False), "dL/da has g_t"),
}

RIGHT = {
    checks.discretise: discretise,
    checks.recurrence: recurrence,
    checks.scan: scan,
    checks.scan_gradient: scan_gradient,
}
