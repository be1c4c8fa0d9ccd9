"""The table of a network says what the pytree holds; its picture shows all parts, none covered."""

import itertools
import re
import warnings
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jaxtyping import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hamux.display.drawing import draw
from hamux.display.tables import describe
from hamux.network.hypergraph import HAM
from hamux.network.neurons import IdentityLayer, NeuronLayer, ReluLayer, SoftmaxLayer, TanhLayer
from hamux.synapses.grids import ConvSynapse
from hamux.synapses.linear import BiasSynapse, DenseSynapse, LinearSynapse


class Blend(eqx.Module):
    "A synapse of a user: one part learns, another is held, a power and a mask are constants."

    free: LinearSynapse
    held: LinearSynapse
    scale: Array
    mask: Array
    power: int

    def __call__(self, a, b):
        return self.scale * (self.free(a, b) + self.held(a, b * self.mask)) ** self.power


def ones(*shape, dtype=jnp.float32): return jnp.ones(shape, dtype)


def two_layers():
    return HAM(
        {"pattern": IdentityLayer(64), "memory": SoftmaxLayer(100, 8.0)},
        {"patterns": LinearSynapse(ones(64, 100))},
        [(("pattern", "memory"), "patterns")],
    )


def three_layers():
    layers = {
        "input": IdentityLayer(7),
        "labels": SoftmaxLayer(8, jnp.array(2.0)),
        "hidden": TanhLayer(9, jnp.ones(9), tau=jnp.array(3.0)),
    }
    return HAM(
        layers,
        {"d1": LinearSynapse(ones(7, 9)), "d2": LinearSynapse(ones(8, 9), trainable=False)},
        [(("input", "hidden"), "d1"), (("labels", "hidden"), "d2")],
    )


def deep_chain():
    shapes = [(64, 64, 3), (32, 32, 8), (16, 16, 8), (8, 8, 16), (4, 4, 16), (2, 2, 32), (1, 1, 64)]
    layers = {f"features_{i}": ReluLayer(s) for i, s in enumerate(shapes)}
    convs = {
        f"conv_3x3_stride_2_{i}": ConvSynapse(ones(b[-1], a[-1], 3, 3), 2)
        for i, (a, b) in enumerate(itertools.pairwise(shapes))
    }
    return HAM(
        layers, convs, [((f"features_{i}", f"features_{i + 1}"), s) for i, s in enumerate(convs)]
    )


def selves():
    synapses = {
        "recurrent": LinearSynapse(ones(12, 12)),
        "rest": BiasSynapse(ones(12)),
        "drive": LinearSynapse(ones(12, 5)),
        "back": LinearSynapse(ones(5, 12)),
        "cube": DenseSynapse(ones(5, 5, 5)),
    }
    return HAM(
        {"units": TanhLayer(12), "slow": TanhLayer(5)},
        synapses,
        [
            (("units", "units"), "recurrent"),
            (("units",), "rest"),
            (("units", "slow"), "drive"),
            (("slow", "units"), "back"),
            (("slow",) * 3, "cube"),
        ],
    )


def many_body():
    layers = {
        "left": TanhLayer(6),
        "right": TanhLayer(6),
        "gate": SoftmaxLayer(3),
        "memory": ReluLayer(20),
    }
    synapses = {
        "store": LinearSynapse(ones(6, 20)),
        "select": DenseSynapse(ones(6, 6, 3)),
        "rest": BiasSynapse(ones(20)),
        "within": LinearSynapse(ones(20, 20)),
        "square": DenseSynapse(ones(3, 3, 6)),
    }
    return HAM(
        layers,
        synapses,
        [
            (("left", "memory"), "store"),
            (("right", "memory"), "store"),
            (("left", "right", "gate"), "select"),
            (("memory",), "rest"),
            (("memory", "memory"), "within"),
            (("gate", "gate", "left"), "square"),
        ],
    )


def random_ten(n=10, more=6, seed=0):
    rng = np.random.default_rng(seed)
    joined = [(int(rng.integers(i)), i) for i in range(1, n)] + [
        tuple(map(int, rng.permutation(n)[: rng.integers(1, 4)])) for _ in range(more)
    ]
    return HAM(
        {f"area {i}": TanhLayer(2) for i in range(n)},
        {f"w{k}": DenseSynapse(ones(*(2 for _ in c))) for k, c in enumerate(joined)},
        [(tuple(f"area {i}" for i in c), f"w{k}") for k, c in enumerate(joined)],
    )


def positions():
    return HAM(
        [IdentityLayer(4), TanhLayer(4), NeuronLayer(lambda x: (x**2).sum(), 5, leak=False)],
        [
            LinearSynapse(ones(4, 4)),
            Blend(
                LinearSynapse(ones(4, 5)),
                LinearSynapse(ones(4, 5), False),
                jnp.array(2.0),
                jnp.ones(5, bool),
                2,
            ),
            lambda a: (a**4).sum(),
        ],
        [([0, 1], 0), ([1, 2], 1), ([2], 2), ([0, 0], 0), ([0, 1], 0)],
    )


def everyone(): # each of six layers with each other
    pairs = list(itertools.combinations(range(6), 2))
    return HAM(
        [TanhLayer(3) for _ in range(6)],
        [LinearSynapse(ones(3, 3)) for _ in pairs],
        [(p, k) for k, p in enumerate(pairs)],
    )


def alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HAM(
            {"a $x$": TanhLayer(3), "b": TanhLayer(3), "c": TanhLayer(3)},
            {
                "w": LinearSynapse(ones(3, 3)),
                "v": LinearSynapse(ones(3, 3)),
                "idle": LinearSynapse(ones(3, 3)),
            },
            [(("a $x$", "b"), "w"), (("b", "a $x$"), "v")],
        )


def half_precision():
    return HAM(
        [TanhLayer(3)],
        [LinearSynapse(ones(3, 3, dtype=jnp.bfloat16)), BiasSynapse(ones(3))],
        [((0, 0), 0), ((0,), 1)],
    )


NETWORKS = [
    two_layers,
    three_layers,
    deep_chain,
    selves,
    many_body,
    random_ten,
    positions,
    everyone,
    alone,
    half_precision,
]
networks = pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)


# --- the table ------------------------------------------------------------------------------------


def rows(ham):
    "The cells of the table: {first cell: [cells]} of the layers, and of the synapses."
    blocks = describe(ham).split("\n\n")
    return [
        {
            line.split("  ")[0]: [c for c in re.split(r"\s{2,}", line) if c]
            for line in block.splitlines()[2:]
            if not line.startswith(" ")
        }
        for block in blocks[1:3]
    ]


def number(cell): return int(cell.split()[0].replace(",", ""))


@networks
def test_counts_are_those_of_the_pytree(network):
    ham = network()
    leaves = jtu.tree_leaves(ham)
    last = describe(ham).splitlines()[-1]
    size, weight = sum(v.size for v in leaves), sum(v.nbytes for v in leaves)
    assert last.startswith(f"parameters in all: {size:,}")
    assert (
        f"; {weight} bytes of"
        if weight < 1000
        else f"; {weight / 1000:.1f} kB of" if weight < 1e6 else " MB of"
    ) in last
    for dtype in {str(v.dtype) for v in leaves}: assert dtype in last
    layers, synapses = rows(ham)
    for name, layer in ham.neurons.items():
        assert (
            str(layer.shape) in layers[str(name)]
            and f"{np.prod(layer.shape):,}" in layers[str(name)]
        )
    parts = [
        *((layers[str(n)], v, 4) for n, v in ham.neurons.items()),
        *((synapses[str(s)], v, -2) for s, v in ham.hypersynapses.items()),
    ]
    for cells, part, column in parts:
        assert number(cells[column]) == sum(
            v.size for v in jtu.tree_leaves(eqx.filter(part, eqx.is_inexact_array))
        )


@networks
def test_the_table_needs_no_values(network):
    ham = network()
    words = lambda text: re.sub("=[0-9.]+(?= learned)", "", text).replace("─", "").split()
    seen = []
    jax.jit(lambda h: seen.append(describe(h)))(ham)
    for text in (*seen, describe(jax.eval_shape(lambda: ham))):
        assert words(text) == words(describe(ham))


def test_what_is_marked():
    text = describe(three_layers())
    assert (
        "softmax(beta=2 learned)" in text
        and "tanh(beta learned (9,))" in text
        and "tau=3 learned" in text
        and "72 frozen" in text
        and "(72 frozen)" in text
    )
    text = describe(positions())
    assert (
        "no leak" in text
        and "0 – 0 (self)" in text
        and "free.W (4, 5), held.W (4, 5), scale ()" in text
        and "41 (20 frozen)" in text
        and "Blend(" in text
        and "power=2" in text
    )
    assert "slow – slow – slow (self, 3-body)" in describe(
        selves()
    ) and "left – right – gate (3-body)" in describe(many_body())
    assert "isolated" in describe(alone()) and "nothing" in describe(alone())
    assert "bfloat16 and float32" in describe(half_precision())


def test_shared_weights_are_told_once():
    lines = describe(many_body()).splitlines()
    k = next(k for k, line in enumerate(lines) if line.startswith("store"))
    assert lines[k].endswith("left – memory") and lines[k + 1].strip() == "right – memory"


@networks
def test_connections_are_listed_with_their_synapse(network):
    ham = network()
    listed, current = [], None
    for line in describe(ham).split("\n\n")[2].splitlines()[2:]:
        if not line.startswith(" "): current = line.split("  ")[0]
        listed.append((current, re.split(r"\s{2,}", line)[-1].split(" (")[0]))
    used = {s for _, s in ham.connections}
    want = [(str(s), " – ".join(map(str, names))) for names, s in ham.connections] + [
        (str(s), "nothing") for s in ham.hypersynapses if s not in used
    ]
    assert sorted(listed) == sorted(want)


def test_repr_is_the_table():
    ham = two_layers()
    assert repr(ham) == str(ham) == describe(ham)
    many = ham.vectorize()
    assert repr(many) == describe(many) and describe(many).startswith(
        "VectorizedHAM, over a leading batch axis: 2 layers (164 neurons), 1 hypersynapse, 1"
        " connection"
    )
    assert describe(many).splitlines()[1:] == describe(ham).splitlines()[1:]


def test_networks_of_other_things():
    ham = three_layers()
    xs = ham.init_states()
    slope = jax.jit(jax.grad(lambda h, a, x: h.energy(a, x)))(ham, xs, xs)
    assert "146 (72 frozen)" in describe(slope)
    assert "no parameters" in describe(jtu.tree_map(lambda v: None, ham))
    assert "no parameters" in describe(jtu.tree_map(lambda v: object(), ham))
    assert "b (4, 3)" in describe(
        eqx.filter_vmap(lambda k: HAM([TanhLayer(3)], [BiasSynapse(jnp.ones(3) * k)], [((0,), 0)]))(
            jnp.arange(4.0)
        )
    )
    given_away = jtu.tree_map(lambda v: v + 0, ham)
    for leaf in jtu.tree_leaves(given_away): leaf.delete()
    assert "beta learned" in describe(given_away)


def test_long_networks_are_folded():
    n = 60
    ham = HAM(
        [TanhLayer(2) for _ in range(n)],
        [LinearSynapse(ones(2, 2))],
        [((i, i + 1), 0) for i in range(n - 1)],
    )
    text = describe(ham)
    assert (
        len(text.splitlines()) < 50
        and max(map(len, text.splitlines())) < 160
        and "… 37 more" in text
        and "… 52 more" in text
    )
    wide = HAM(
        {"x" * 300: TanhLayer(2)},
        {"y" * 300: lambda *a: sum(v.sum() for v in a)},
        [(("x" * 300,) * 40, "y" * 300)],
    )
    assert max(map(len, describe(wide).splitlines())) < 200


# --- the picture ----------------------------------------------------------------------------------


def canvas(w=6, h=4):
    "Axes that pyplot does not know."
    figure = Figure(figsize=(w, h))
    FigureCanvasAgg(figure)
    return figure.add_axes((0, 0, 1, 1))


def parts(ax, kind):
    found = {}
    for a in ax.get_children():
        if (a.get_gid() or "").startswith(kind + " "):
            found.setdefault(a.get_gid().removeprefix(kind + " "), []).append(a)
    return found


def box(artist):
    renderer = artist.figure.canvas.get_renderer()
    return artist.get_window_extent(renderer)


def apart(a, b): return a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def check_picture(ham, ax):
    "Every part is there, texts lie in their boxes, no label or line covers a box or another label."
    layers, connections, labels, texts = (
        parts(ax, k) for k in ("layer", "connection", "label", "text")
    )
    assert list(layers) == [str(n) for n in ham.neurons] and all(
        len(v) == 1 for v in layers.values()
    )
    assert set(connections) == {str(k) for k in range(ham.n_connections)}
    ax.figure.canvas.draw()
    boxes = {n: box(v[0]) for n, v in layers.items()}
    shown = [box(v[0]) for v in labels.values()]
    for a, b in itertools.combinations([*boxes.values(), *shown], 2):
        assert apart(a, b)
    for n, lines in texts.items():
        for t in map(box, lines):
            assert (
                boxes[n].x0 <= t.x0
                and t.x1 <= boxes[n].x1
                and boxes[n].y0 <= t.y0
                and t.y1 <= boxes[n].y1
            )
    for k, (names, _) in enumerate(ham.connections):
        for line in connections[str(k)]:
            if not hasattr(line, "get_xydata"):
                continue
            points = ax.transData.transform(line.get_xydata())
            for n, b in boxes.items():
                if n not in map(str, names):
                    assert not ((points > [b.x0, b.y0]) & (points < [b.x1, b.y1])).all(1).any()
    frame = ax.figure.bbox
    for b in [*boxes.values(), *shown]:
        assert frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1


@networks
def test_everything_is_seen(network):
    ham = network()
    ax = draw(ham)
    check_picture(ham, ax)
    uses = Counter(s for _, s in ham.connections)
    assert len(parts(ax, "label")) == len(uses) # one label for each synapse in use


@pytest.mark.parametrize("layout", ["circle", "mine"])
@pytest.mark.parametrize(
    "network", [three_layers, selves, many_body, positions], ids=lambda f: f.__name__
)
def test_other_layouts(network, layout):
    ham = network()
    mine = {n: (i % 2, 10 * (i // 2)) for i, n in enumerate(ham.neurons)}
    ax = draw(ham, layout=mine if layout == "mine" else layout)
    check_picture(ham, ax)
    if layout == "mine":
        at = np.array(
            [
                (p.get_x() + p.get_width() / 2, p.get_y() + p.get_height() / 2)
                for v in parts(ax, "layer").values()
                for p in v
            ]
        )
        want = np.array(list(mine.values()), float)
        scale = np.linalg.norm(at[1] - at[0])
        np.testing.assert_allclose((at - at[0]) / scale, want - want[0], atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_twelve_layers(seed):
    ham = random_ten(12, 8, seed)
    check_picture(ham, draw(ham))


def test_the_number_of_ends_is_drawn():
    connections = parts(draw(many_body(), canvas()), "connection")
    lines = {k: sum(hasattr(a, "get_xydata") for a in v) for k, v in connections.items()}
    # a line, a line, three spokes, a stub, a loop, three spokes of which two to one layer
    assert lines == {"0": 1, "1": 1, "2": 3, "3": 1, "4": 1, "5": 3}
    # the squares
    assert [k for k, v in connections.items() if any(hasattr(a, "get_width") for a in v)] == [
        "2",
        "5",
    ]
    drawn = parts(draw(selves(), canvas()), "connection")
    # three ends at one layer: two loops
    assert {k: len(v) for k, v in drawn.items()} == {"0": 1, "1": 1, "2": 1, "3": 1, "4": 2}
    there, back = (drawn[k][0].get_xydata()[30] for k in "23")
    assert np.linalg.norm(there - back) > 0.25 # side by side


def test_shared_synapses_look_the_same():
    drawn = parts(draw(many_body(), canvas()), "connection")
    style = lambda k: next(a for a in drawn[k] if hasattr(a, "get_xydata")).get_linestyle()
    assert style("0") == style("1") == "--" and style("3") == style("4") == "-"


def test_the_same_network_is_the_same_picture():

    def paths():
        return [
            a.get_xydata()
            for v in parts(draw(random_ten(), canvas()), "connection").values()
            for a in v
            if hasattr(a, "get_xydata")
        ]

    for a, b in zip(paths(), paths()): np.testing.assert_array_equal(a, b)


def test_given_axes_are_used_and_pyplot_is_left_alone():
    before = dict(plt.rcParams)
    for size in ((2, 1.5), (12, 9)):
        ax = canvas(*size)
        assert draw(many_body(), ax) is ax
        check_picture(many_body(), ax)
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before
    assert draw(many_body()).figure.number in plt.get_fignums()


def test_it_draws_shapes_and_batches():
    ham = many_body()
    jax.jit(lambda h: draw(h, canvas()) and None)(ham)
    draw(jax.eval_shape(lambda: ham), canvas()); draw(ham.vectorize(), canvas())


def test_energies_are_widths():
    ham = two_layers()
    both = HAM(ham.neurons, ham.hypersynapses, [*ham.connections] * 3)
    drawn = draw(both, canvas(20, 20), energies=[-4.0, 2.0, 0.0])
    widths = [v[0].get_linewidth() for v in parts(drawn, "connection").values()]
    np.testing.assert_allclose(widths[0] - widths[1], widths[1] - widths[2], rtol=1e-6)
    assert widths[0] > widths[1] > widths[2] > 0
    assert [v[0].get_text() for v in parts(drawn, "label").values()] == [
        "patterns −4",
        "patterns 2",
        "patterns 0",
    ]
    xs = ham.init_states()
    check_picture(ham, draw(ham, energies=ham.connection_energies(ham.activations(xs))))
    assert [
        v[0].get_text() for v in parts(draw(ham, canvas(), energies=[-0.0]), "label").values()
    ] == ["patterns 0"]


def test_bad_input():
    ham = two_layers()
    for f in (describe, draw):
        message = f"{f.__name__}: ham must be a HAM or a VectorizedHAM, got dict"
        with pytest.raises(TypeError, match=message): f({})
    for kwargs, kind, message in [
        (dict(ax="axes"), TypeError, "ax must be matplotlib axes, got str"),
        (dict(layout="star"), ValueError, "'spring', 'circle' or a dictionary.*'star'"),
        (dict(layout=np.zeros((2, 2))), ValueError, "'spring', 'circle' or a dictionary"),
        (dict(layout={"pattern": (0, 0)}), ValueError, r"missing names \['memory'\] and unknown"),
        (
            dict(layout={"pattern": (0, 0), "memory": (1, 1), "x": (2, 2)}),
            ValueError,
            r"unknown names \['x'\]",
        ),
        (
            dict(layout={"pattern": (0, 0), "memory": (0, 0)}),
            ValueError,
            "got one place twice",
        ),
        (
            dict(layout={"pattern": (0, 0), "memory": (0, np.nan)}),
            ValueError,
            "'memory' two finite numbers",
        ),
        (
            dict(layout={"pattern": (0, 0), "memory": "up"}),
            ValueError,
            "'memory' two finite numbers",
        ),
        (dict(energies=3.0), TypeError, "one number per connection"),
        (dict(energies=[np.ones(3)]), TypeError, "one number per connection"),
        (dict(energies=[1.0, 2.0]), ValueError, "each of 1 connection, got 2 energies"),
        (dict(energies=[np.inf]), ValueError, "must be finite"),
    ]:
        with pytest.raises(kind, match=message): draw(ham, **kwargs)
    assert plt.get_fignums() == []
    with pytest.raises(TypeError, match="Draw outside of jit"):
        jax.jit(lambda e: draw(ham, canvas(), energies=[e]) and None)(1.0)
