"""Every Lagrangian in 200-bit arithmetic: value, gradient, Hessian-vector product, and how
sensitive each is to its inputs.

Written from the definitions, not from the library. A *condition* here is componentwise: the sum of
the absolute changes of a quantity, per unit, when every entry of x, every entry of the direction t
and every hyperparameter moves by a relative unit. An error of a few eps × condition is what
rounding the inputs once would already cause; more than that is the code's own doing. Differences of
nearly equal numbers are written out (1 − p_i as the sum of the other p_j), so that the conditions
do not hide the loss of the small number.
"""

from dataclasses import dataclass

import mpmath

mp = mpmath.MPContext()
mp.prec = 200


@dataclass
class Ref:
    value: list
    value_cond: list
    grad: list
    grad_cond: list
    hvp: list
    hvp_cond: list
    # how far the one-sided limits are apart where the derivative jumps: all between is a
    # (sub)derivative
    grad_kink: list
    hvp_kink: list
    # the entry of the Hessian behind each product: where that does not fit in the dtype, neither
    # need its product
    hvp_scale: list
    # what an intermediate result that flushes to zero can be multiplied by afterwards
    floor: float = 1.0
    # the same where the direction's entries are not first compared with each other: Σ_j |H_ij t_j|
    # in place of |Σ_j H_ij t_j|
    hvp_cond_t: list = ()
    # what a norm divides by; a radius below the smallest normal flushes to zero, and its Hessian is
    # then 0
    radius: float = mp.inf
    # eps × |x| is as large as what the norm measures: rounding x once can turn its direction around
    wild: bool = False


def exp(x):
    """exp, with a limited exponent: e^±1e6 is beyond every dtype, and mpmath is slow at e^1e308."""
    return mp.exp(x) if abs(x) < 1e6 else mp.exp(1e6) if x > 0 else mp.zero


# Elementwise Lagrangians Σ ψ(βx)/β: ψ and its first three derivatives, and the right limits of (ψ',
# ψ'') at a kink


def psi_identity(z):
    return z * z / 2, z, mp.one, mp.zero


def psi_exp(z):
    return (exp(z),) * 4


def psi_rexp(z):
    if z <= 0:
        return mp.one, mp.zero, mp.zero, mp.zero
    e = exp(z)
    return e - z, mp.expm1(z) if z < 1 else e - 1, e, e


def psi_tanh(z):
    a = abs(z)
    e = exp(-2 * a)
    value = mp.log1p(2 * mp.sinh(a / 2) ** 2) if a < 1 else a + mp.log1p(e) - mp.log(2)
    slope = mp.sign(z) * (-mp.expm1(-2 * a) if a < 1 else 1 - e) / (1 + e)
    curve = 4 * e / (1 + e) ** 2
    return value, slope, curve, -2 * slope * curve


def psi_sigmoid(z):
    e = exp(-abs(z))
    s = 1 / (1 + e)
    curve = e * s * s
    return (
        max(z, mp.zero) + mp.log1p(e),
        s if z >= 0 else e * s,
        curve,
        -mp.sign(z) * curve * (1 - e) * s,
    )


def elementwise(psi, x, t, beta):
    out = Ref([mp.zero], [mp.zero], [], [], [], [], [], [], [], floor=1 + beta + 1 / beta)
    for xi, ti in zip(x, t):
        z = beta * xi
        f, f1, f2, f3 = psi(z)
        out.value[0] += f / beta
        out.value_cond[0] += abs(f / beta) + abs(xi * f1) + abs(xi * f1 - f / beta)
        out.grad.append(f1)
        out.grad_cond.append(abs(f1) + 2 * abs(z * f2))
        out.hvp.append(beta * f2 * ti)
        out.hvp_scale.append(beta * f2)
        out.hvp_cond.append(beta * abs(ti) * (abs(f2) + abs(z * f3) + abs(f2 + z * f3)))
        out.grad_kink.append(mp.zero)
        out.hvp_kink.append(beta * abs(ti) if psi is psi_rexp and xi == 0 else mp.zero)
    return out


def repu(x, t, n):
    out = Ref([mp.zero], [mp.zero], [], [], [], [], [], [], [], floor=n)
    for xi, ti in zip(x, t):
        f = g = h = cf = cg = ch = gk = hk = mp.zero
        if xi > 0:
            log = mp.log(xi)
            f, g, h = xi**n / n, xi ** (n - 1), (n - 1) * xi ** (n - 2)
            cf = f + n * f + abs(f * (n * log - 1))
            cg = g * (1 + (n - 1) + n * abs(log))
            ch = abs(ti) * (h * (1 + abs(n - 2)) + n * xi ** (n - 2) * abs(1 + (n - 1) * log))
        elif xi == 0:
            gk, hk = mp.mpf(n == 1), abs(ti) * (n == 2)
        out.value[0] += f
        out.value_cond[0] += cf
        for name, v in dict(
            grad=g, grad_cond=cg, hvp=h * ti, hvp_cond=ch, grad_kink=gk, hvp_kink=hk, hvp_scale=h
        ).items():
            getattr(out, name).append(v)
    return out


# Normalised exponentials


def softmax(x, t, beta, ghost=False):
    """(1/β) log Σ exp(βx); the ghost is one more entry, fixed at 0."""
    n = len(x)
    if ghost:
        x, t = [*x, mp.zero], [*t, mp.zero]
    every = range(len(x))
    top = max(every, key=lambda i: x[i])
    w = [exp(beta * (xi - x[top])) for xi in x]
    rest = sum(w[j] for j in every if j != top)
    p = [wi / (1 + rest) for wi in w]
    value = x[top] + mp.log1p(rest) / beta
    q = [sum(p[j] for j in every if j != i) for i in every]  # 1 - p_i, not by subtraction
    px = sum(pi * xi for pi, xi in zip(p, x))
    cf = abs(value) + sum(abs(pi * xi) for pi, xi in zip(p, x)) + abs(px - value)
    # the relative change of p_i when every x_k, and β, moves by a relative unit
    move = [beta * (sum(abs(x[k]) * (q[i] if i == k else p[k]) for k in every)
                    + abs(sum(p[k] * (x[i] - x[k]) for k in every))) for i in every]
    cg = [p[i] * (1 + move[i]) for i in range(n)]
    pair = [[beta * p[i] * p[j] * (t[i] - t[j]) for j in every] for i in range(n)]
    h = [sum(row) for row in pair]
    ch = [
        sum(abs(v) * (1 + move[i] + move[j]) for j, v in enumerate(row))
        for i, row in enumerate(pair)
    ]
    cht = [
        beta
        * p[i]
        * (
            q[i] * abs(t[i]) * (1 + move[i])
            + sum(p[j] * abs(t[j]) * (1 + move[j]) for j in every if j != i)
        )
        + ch[i]
        for i in range(n)
    ]
    none = [mp.zero] * n
    return Ref(
        [value], [cf], p[:n], cg, h, ch, none, none, none, floor=1 + beta + 1 / beta, hvp_cond_t=cht
    )


# Norms: w γ sqrt(Σd²/w + eps) + Σδx, with d = x − mean(x) and w = D (layer norm), or d = x and w =
# 1 (spherical norm)


def norm(x, t, gamma, delta, eps, unit, center):
    n = len(x)
    every = range(n)
    w = mp.mpf(n if center else 1)
    mean = (lambda v: sum(v) / n) if center else (lambda v: mp.zero)
    proj = [[mp.mpf(i == j) - (1 / w if center else 0) for j in every] for i in every]
    d = [xi - mean(x) for xi in x]
    pt = [ti - mean(t) for ti in t]
    r = mp.sqrt(sum(v * v for v in d) / w + eps)
    shift, ashift = sum(a * b for a, b in zip(delta, x)), sum(abs(a * b) for a, b in zip(delta, x))
    value, size = w * gamma * r + shift, max(map(abs, x))
    wild = 64 * unit * size >= r
    none = [mp.zero] * n
    if r == 0:  # the kink of the norm: 0 lies in the subdifferential and is the convention
        cf = ashift + gamma * sum(map(abs, x))
        return Ref(
            [value],
            [cf],
            delta,
            list(map(abs, delta)),
            none,
            none,
            none,
            none,
            none,
            floor=1 + gamma,
            wild=size > 0,
        )
    u = [v / r for v in d]
    s = sum(a * b for a, b in zip(u, t))
    g = [gamma * ui + di for ui, di in zip(u, delta)]
    hess = [[gamma / r * (proj[i][j] - u[i] * u[j] / w) for j in every] for i in every]
    eps_u = eps / r**2 / 2  # relative change of r per relative change of eps
    cf = w * gamma * r * (2 + eps_u) + 2 * ashift + sum(abs(xi * gi) for xi, gi in zip(x, g))
    cf += gamma * sum(map(abs, x)) if wild else 0
    cg = [
        gamma * abs(u[i]) * (2 + eps_u) + abs(delta[i]) + sum(abs(x[j] * hess[i][j]) for j in every)
        for i in every
    ]
    h = [gamma / r * (pt[i] - u[i] * s / w) for i in every]

    def third(i, k):  # ∂h_i/∂x_k
        return (
            -gamma
            / r**2
            * (
                u[k] / w * (pt[i] - u[i] * s / w)
                + (proj[i][k] * s + u[i] * pt[k] - 2 * u[i] * u[k] * s / w) / w
            )
        )

    # The projection t − u<u,t>/w is measured against its own terms, i.e. relative to |t| and not to
    # what is left of it.
    terms = [(abs(t[i]) + (sum(map(abs, t)) / n if center else 0)
              + abs(u[i]) * sum(abs(a * b) for a, b in zip(u, t)) / w) for i in every]
    ch = [
        gamma / r * terms[i] * (1 + 3 * eps_u) + sum(abs(x[k] * third(i, k)) for k in every)
        for i in every
    ]
    return Ref(
        [value],
        [cf],
        g,
        cg,
        h,
        ch,
        none,
        none,
        [gamma / r] * n,
        floor=(1 + gamma) * (n + 1 / r),
        radius=r,
        wild=wild,
    )


# Weights that share a total: p = g(s), s_i = β(x_i − x_ref) − T, T where they add up to k

SPARSE = ["sparsemax", "entmax", "normmax", "ksubsets"]


class Sharing:
    "A member of the sparse family at one row: its level, weights and Hessian."

    def __init__(self, name, x, beta, alpha, k):
        self.name, self.a, self.k, self.beta = name, alpha - 1, k, beta
        self.ref = sorted(x)[-k]
        gap = [beta * (xi - self.ref) for xi in x]
        T = self.by_pieces(gap) if name == "ksubsets" else self.by_newton(gap)
        self.t = [g - T for g in gap]

    def by_pieces(self, gap):
        "The middle of the interval of levels at which Σ min(max(1 + gap − T, 0), 1) = k."
        total = lambda T: sum(min(max(1 + g - T, mp.zero), mp.one) for g in gap)
        ends = sorted({*gap, *(g + 1 for g in gap)})
        if self.k == len(gap): return min(gap)
        low = max(T for T in ends if total(T) >= self.k)
        if total(low) > self.k:
            high = min(T for T in ends if T > low)
            return low + (total(low) - self.k) * (high - low) / (total(low) - total(high))
        return (low + min(T for T in ends if total(T) >= self.k and total(T) == self.k)) / 2

    def by_newton(self, gap):
        T = mp.zero
        for _ in range(200):
            t = [g - T for g in gap]
            shares = [self.share(v, self.a) for v in t]
            slopes = self.slopes(t, self.a, shares)
            log = mp.log(sum(shares))
            e = self.a if self.name == "entmax" else self.a / (1 + self.a)
            root = mp.expm1(e * log) / e if e else log
            move = root * mp.exp((1 - e) * log) / sum(slopes)
            T += move
            if move <= mp.ldexp(max(T, mp.mpf(2) ** -1200), 20 - mp.prec): break
        return T

    def share(self, t, a, order=0):
        "g(t) or its derivative, or ∂g/∂a for order 'a'; 0 off the support."
        if self.name == "ksubsets":
            return (min(max(1 + t, mp.zero), mp.one) if order == 0 else
                    mp.mpf(order == 1 and -1 < t < 0))
        if order == "a":
            step = mp.mpf(2) ** -70
            return (self.share(t, a + step) - self.share(t, a)) / step
        if self.name == "entmax":
            if not a: return exp(t)
            v, e, c = 1 + a * t, 1 / a, a
        else: v, e, c = 1 + t, 1 + 1 / a, mp.one
        if v <= 0: return mp.zero
        return v**e if order == 0 else e * c * v ** (e - 1)

    def live(self, t, a):
        return 1 + (a if self.name == "entmax" else 1) * t > 0

    def weights(self, t, a):
        if self.name != "normmax": return [self.share(v, a) for v in t]
        y = [(1 + v) ** (1 / a) if self.live(v, a) else mp.zero for v in t]
        return [v / sum(y) for v in y]

    def hessian(self, t, a, p):
        "∂p/∂z, from the weights."
        every = range(len(t))
        if self.name != "normmax":
            s = self.slopes(t, a, p)
            whole = sum(s) or mp.one
            return [[(s[i] * (whole - s[i]) if i == j else -s[i] * s[j]) / whole for j in every]
                    for i in every]
        s = [p[i] / (a * (1 + t[i])) if p[i] else mp.zero for i in every]
        off = lambda k, i: mp.mpf(k == i) - p[i]
        return [[sum(s[k] * off(k, i) * off(k, j) for k in every) for j in every] for i in every]

    def slopes(self, t, a, shares):
        "g′(t), from g(t): for powers of a linear function no second power is taken."
        if self.name == "ksubsets": return [self.share(v, a, 1) for v in t]
        if not a: return shares # exp is its own slope
        if self.name == "entmax": return [g / (1 + a * v) if g else g for v, g in zip(t, shares)]
        return [(1 + 1 / a) * g / (1 + v) if g else g for v, g in zip(t, shares)]

    def both(self, t, a):
        "The weights, and after them the Hessian row by row."
        p = self.weights(t, a)
        return [*p, *(v for row in self.hessian(t, a, p) for v in row)]

    def moved(self, moves):
        "The change of `both` for each move of z and a, the level along with them."
        slopes = self.slopes(self.t, self.a, [self.share(v, self.a) for v in self.t])
        old, step, tilts = self.both(self.t, self.a), mp.mpf(2) ** -70, None
        changes = []
        for dz, da in moves:
            rise = sum(s * d for s, d in zip(slopes, dz))
            if da:
                tilts = tilts or sum(self.share(v, self.a, "a") for v in self.t)
                rise += da * tilts
            dT = rise / (sum(slopes) or mp.one)
            size = step / (1 + max(abs(d - dT) for d in dz) + abs(da))
            there = [v + size * (d - dT) for v, d in zip(self.t, dz)]
            new = self.both(there, self.a + size * da)
            changes.append([(v - w) / size for v, w in zip(new, old)])
        return changes

    def value_and_weights(self, x):
        "The value, the weights and the entropy."
        p = self.weights(self.t, self.a)
        with mp.workprec(1200): # H may be a difference of nearly equal numbers
            H = self.entropy(self.weights(self.t, self.a), self.a)
            return sum(pi * xi for pi, xi in zip(p, x)) + H / self.beta, p, H

    def entropy(self, p, a):
        alpha = 1 + a
        if self.name == "ksubsets": return sum(v * (1 - v) for v in p) / 2
        if self.name == "normmax": return 1 - sum(v**alpha for v in p if v) ** (1 / alpha)
        if not a: return -sum(v * mp.log(v) for v in p if v)
        return (1 - sum(v**alpha for v in p if v)) / (alpha * a)


def sharing(name, x, hyper):
    "The `Sharing` of a Lagrangian with its hyperparameters in the order of its signature."
    alpha, beta = hyper if len(hyper) == 2 else (mp.mpf(2), *hyper)
    kind, k = "entmax" if name == "sparsemax" else name, 2 if name == "ksubsets" else 1
    return Sharing(kind, x, beta, alpha, k)


def sparse(at, x, t, unit=2.0**-53):
    "(1/β) max <p, βx> + H(p), as `Ref`."
    name, beta, every = at.name, at.beta, range(len(x))
    value, p, H = at.value_and_weights(x)
    a, step = at.a, mp.mpf(2) ** -70
    drift = (at.entropy(p, a + step) - at.entropy(p, a)) / step if name != "ksubsets" else mp.zero
    cf = abs(value) + sum(abs(pi * xi) for pi, xi in zip(p, x)) + abs(H / beta)
    cf += abs((1 + a) * drift / beta)
    gap = [xi - at.ref for xi in x]
    # off the support an entry may move without any effect
    near = [g if at.live(v, a) else mp.zero for g, v in zip(gap, at.t)]
    moves = [([beta * x[j] * (i == j) for i in every], 0) for j in every if at.live(at.t[j], a)]
    moves += [([beta * g for g in near], 0), ([mp.zero] * len(x), 1 + a)]
    if name == "ksubsets": moves.pop()
    n, J = len(x), at.both(at.t, a)[len(x):]
    changes = at.moved(moves)
    dp, dJ = [c[:n] for c in changes], [c[n:] for c in changes]
    cg = [p[i] + sum(abs(d[i]) for d in dp) for i in every]
    size = [abs(J[m]) + sum(abs(d[m]) for d in dJ) for m in range(n * n)]
    # rows of the Hessian sum to 0
    h = [beta * sum(J[i * n + j] * (t[j] - t[i]) for j in every) for i in every]
    ch = [beta * sum(size[i * n + j] * abs(t[i] - t[j]) for j in every) for i in every]
    cht = [beta * sum(size[i * n + j] * abs(t[j]) for j in every) + ch[i] for i in every]
    # where rounding the state once can bring an entry over an end of its support
    c = a if name == "entmax" else 1
    blur = [64 * unit * (c * beta * (abs(xi) + abs(at.ref)) + 1) for xi in x]
    ends = [1 + c * v for v in at.t], at.t if name == "ksubsets" else [mp.inf] * n
    unsure = [a > 0 and any(abs(e[i]) <= blur[i] for e in ends) for i in every]
    kink = [mp.inf if any(unsure) else mp.zero] * n
    edge = [blur[i] ** (1 / a) if name == "normmax" and unsure[i] else mp.zero for i in every]
    if any(edge): edge = [sum(edge)] * n
    return Ref([value], [cf], p, cg, h, ch, edge, kink, [abs(J[i * n + i]) * beta for i in every],
               floor=1 + beta + 1 / beta, hvp_cond_t=cht)


def reference(name, x, t, hyper, unit=2.0**-53):
    """`Ref` of the Lagrangian `lagr_<name>` at the exact vectors x, t and the hyperparameters, in
    the order of its signature."""
    x, t = [mp.mpf(v) for v in x], [mp.mpf(v) for v in t]
    hyper = [[mp.mpf(u) for u in v] if isinstance(v, (list, tuple)) else mp.mpf(v) for v in hyper]
    if name in ("repu", "relu"):
        return repu(x, t, hyper[0] if hyper else mp.mpf(2))
    if name in ("softmax", "ghostmax"):
        return softmax(x, t, *hyper, ghost=name == "ghostmax")
    if name in SPARSE: return sparse(sharing(name, x, hyper), x, t, unit)
    if name in ("layernorm", "spherical_norm"):
        return norm(x, t, *hyper, unit, center=name == "layernorm")
    psi = dict(
        identity=psi_identity, exp=psi_exp, rexp=psi_rexp, tanh=psi_tanh, sigmoid=psi_sigmoid
    )[name]
    return elementwise(psi, x, t, *(hyper or [mp.one]))


def value_and_gradient(name, x, hyper):
    "The value and the gradient of `reference`, in a list, without what takes it long."
    if name not in SPARSE:
        ref = reference(name, x, [mp.zero] * len(x), hyper)
        return [ref.value[0], *ref.grad]
    x = [mp.mpf(v) for v in x]
    value, weights, _ = sharing(name, x, [mp.mpf(v) for v in hyper]).value_and_weights(x)
    return [value, *weights]


def derivative(fn, args, k, rel=2.0**-60):
    """∂fn/∂args[k] by central differences with a step relative to args[k] (absolute at 0), for fn
    with values in a list."""
    step = (abs(args[k]) or mp.one) * mp.mpf(rel)
    up, down = ([*args[:k], args[k] + s, *args[k + 1:]] for s in (step, -step))
    return [(a - b) / (2 * step) for a, b in zip(fn(up), fn(down))]


def with_cond(fn, args, k, rel=2.0**-60):
    """∂fn/∂args[k], and its componentwise condition in all args."""
    slope = lambda a: derivative(fn, a, k, rel)  # noqa: E731
    value = slope(args)
    cond = [abs(v) for v in value]
    for j, a in enumerate(args):
        if a != 0:
            cond = [c + abs(a * d) for c, d in zip(cond, derivative(slope, args, j, rel))]
    return value, cond
