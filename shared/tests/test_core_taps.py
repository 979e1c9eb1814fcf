from __future__ import annotations

import gc
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.core.taps import FeatureTap, LayerMap, Projector, find_module, similarity_matrix, tap_qkv


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor, *, bias: Tensor | None = None) -> dict[str, object]:
        h = self.first(x)
        return {"h": h, "pair": (self.act(h), None), "bias": bias}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x, bias=torch.ones(2))["pair"][0]  # type: ignore[index]
        return self.head(x)


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


# --- FeatureTap
# -------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_network_and_carry_its_gradient():
    net, x = Net(), normal(1, 5, 3)
    with FeatureTap(net, {"stem": "stem", "x": "stem:in", "h": "blocks.0:out:h", "head": "head:in:0"}) as tap:
        output = net(x)
        values = tap.pop()
    assert torch.equal(values["x"], x)
    assert torch.equal(values["stem"], net.stem(x))
    assert torch.equal(values["h"], net.blocks[0].first(net.stem(x)))
    assert torch.equal(net.head(values["head"]), output)
    (gradient,) = torch.autograd.grad(values["stem"].sum(), net.stem.bias)
    assert gradient.tolist() == [5.0] * 4
    assert hooks(net) == 0


def test_index_reaches_keywords_and_nested_names():
    net, x = Net(), normal(1, 5, 3)
    with FeatureTap(
        net, ["blocks.1:in:bias", "blocks.1:out:bias"], detach=True, to_dtype=torch.float64
    ) as tap:
        net(x)
        values = tap.pop()
    assert values["blocks.1:in:bias"].tolist() == [1.0, 1.0]
    assert values["blocks.1:out:bias"].dtype == torch.float64
    assert not values["blocks.1:out:bias"].requires_grad


def test_pop_forgets_and_says_what_did_not_run():
    net = Net()
    tap = FeatureTap(net, {"a": "stem", "b": "head"})
    net(normal(0, 2, 3))
    assert set(tap.pop()) == {"a", "b"} == set(tap.names)
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
    net.stem(normal(0, 2, 3))
    with pytest.raises(RuntimeError, match=r"\['b'\]"):
        tap.pop()
    tap.remove()
    tap.remove()
    net(normal(0, 2, 3))
    with pytest.raises(RuntimeError, match="removed"):
        tap.pop()


def test_hooks_go_away_after_an_exception_and_hold_no_memory():
    net = Net()

    def fail() -> None:
        with FeatureTap(net, ["stem"]):
            net(normal(0, 2, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks(net) == 0
    tap = FeatureTap(net, ["stem"])
    net(normal(0, 2, 3))
    reference = weakref.ref(tap.pop()["stem"])
    gc.collect()
    assert reference() is None


def test_two_taps_on_one_network_do_not_disturb_each_other():
    one, two, x = Net(), Net(), normal(0, 2, 3)
    with FeatureTap(one, {"v": "stem"}) as first:
        second = FeatureTap(two, {"v": "head"})
        third = FeatureTap(one, {"v": "head"}, detach=True)
        one(x)
        two(x)
        third_value = third.pop()["v"]
        third.remove()
        assert first.pop()["v"].shape == (2, 4)
        assert second.pop()["v"].requires_grad
        assert not third_value.requires_grad
        one(x)
        assert first.pop()["v"].shape == (2, 4)


def test_repeated_modules():
    act = nn.ReLU()
    net, x = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act), normal(0, 3, 2)
    with FeatureTap(net, {"a": "1"}) as tap:
        y = net(x)
        assert torch.equal(tap.pop()["a"], y)
    with FeatureTap(net, {"a": "1"}, repeats="list") as tap:
        net(x)
        first, last = tap.pop()["a"]
        assert torch.equal(first, net[:2](x))
        assert torch.equal(last, y)
    with FeatureTap(net, {"a": "1"}, repeats="error") as tap, pytest.raises(RuntimeError, match="ran twice"):
        net(x)


def test_in_place_change_after_the_tap_is_noticed():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), normal(0, 4, 3)
    with FeatureTap(net, {"pre": "0"}) as tap:
        net(x)
        with pytest.raises(RuntimeError, match="clone=True"):
            tap.pop()
    with FeatureTap(net, {"pre": "0"}, clone=True) as tap:
        net(x)
        assert torch.equal(tap.pop()["pre"], net[0](x))


def test_inference_tensors_can_be_tapped():
    net = Net()
    with torch.inference_mode(), FeatureTap(net, {"y": "stem"}) as tap:
        net(normal(0, 2, 3))
        assert tap.pop()["y"].is_inference()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


@pytest.mark.parametrize(
    "path", ["blocks.0.first", "module.blocks.0.first", "module._orig_mod.blocks.0.first"]
)
def test_names_do_not_depend_on_wrappers(path: str):
    net = Net()
    for wrapped in (
        net,
        Wrapper(net, "module"),
        Wrapper(Wrapper(net, "_orig_mod"), "module"),
        nn.DataParallel(net),
    ):
        assert find_module(wrapped, path) is net.blocks[0].first
        assert find_module(wrapped, "") is net
    net.blocks[0] = Wrapper(net.blocks[0], "_checkpoint_wrapped_module")
    assert find_module(net, path) is net.blocks[0]._checkpoint_wrapped_module.first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_names_inside_a_compiled_network():
    net = Net()
    assert find_module(torch.compile(net), "blocks.0.first") is net.blocks[0].first


def test_a_real_child_named_module_is_no_wrapper():
    net = nn.ModuleDict({"module": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    assert find_module(net, "") is net
    assert find_module(net, "module") is net["module"]
    twice = nn.ModuleDict(
        {"module": nn.ModuleDict({"x": nn.Linear(1, 1)}), "_orig_mod": nn.ModuleDict({"x": nn.Linear(1, 1)})}
    )
    with pytest.raises(ValueError, match="may mean any"):
        find_module(twice, "x")
    assert find_module(twice, "module.x") is twice["module"]["x"]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("blocks.0.frist", "blocks.0.first"),
        ("first", r"'blocks\.0\.first', 'blocks\.1\.first'"),
        ("stm", "'stem'"),
        ("zzz", "there are"),
        ("stem:output", "tap path"),
        ("stem:in:0:1", "tap path"),
        ("stem:in:", "tap path"),
    ],
)
def test_unknown_paths_list_near_misses(path: str, word: str):
    net = Net()
    with pytest.raises(ValueError, match=word):
        FeatureTap(net, {"a": path})
    assert hooks(net) == 0


@pytest.mark.parametrize(
    ("path", "error", "word"),
    [
        ("blocks.0", TypeError, "keys"),
        ("blocks.0:out:pair", TypeError, "of 2; append :0 … :1"),
        ("blocks.0:out:g", ValueError, "no element 'g'.*'h'"),
        ("stem:in:3", ValueError, "no element 3 in 1 elements"),
        ("stem:in:mask", ValueError, "no element 'mask'"),
    ],
)
def test_what_is_no_tensor_is_explained(path: str, error: type[Exception], word: str):
    net = Net()
    with FeatureTap(net, {"a": path}), pytest.raises(error, match=word):
        net(normal(0, 2, 3))


def test_tap_arguments():
    for arguments, error in (
        ({"paths": "stem"}, TypeError),
        ({"paths": {}}, ValueError),
        ({"paths": ["stem"], "repeats": "all"}, ValueError),
    ):
        with pytest.raises(error):
            FeatureTap(Net(), **arguments)  # type: ignore[arg-type]


# --- queries, keys and values
# -----------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention written out, [B, L, D] → [B, L, Dv]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("batch_first", "widths"), [(True, {}), (False, {}), (True, {"kdim": 6, "vdim": 5})])
def test_multihead_attention_values_reproduce_its_output(batch_first: bool, widths: dict[str, int]):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **widths)
    nn.init.normal_(attention.in_proj_bias)
    q, k, v = (
        normal(1, 3, 5, 8),
        normal(2, 3, 7, widths.get("kdim", 8)),
        normal(3, 3, 7, widths.get("vdim", 8)),
    )
    arguments = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
    with tap_qkv(attention, {"a": ""}) as tap:
        output = attention(arguments[0], key=arguments[1], value=arguments[2])[0]
        values = tap.pop()["a"]
        with pytest.raises(RuntimeError, match="not run"):
            tap.pop()
    assert hooks(attention) == 0
    expected = attention.out_proj(attend(*values, heads=2))
    torch.testing.assert_close(expected if batch_first else expected.transpose(0, 1), output)
    values.v.sum().backward()
    assert (attention.v_proj_weight if widths else attention.in_proj_weight).grad is not None


def test_encoder_layer_in_eval_mode_still_shows_its_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = normal(0, 2, 4, 8)
    with torch.no_grad(), tap_qkv(layer, {"a": "self_attn"}, detach=True) as tap:
        layer(x)
        values = tap.pop()["a"]
    torch.testing.assert_close(values.q, x @ layer.self_attn.in_proj_weight[:8].T)


class Separate(nn.Module):
    def __init__(self, names: tuple[str, str, str]) -> None:
        super().__init__()
        for name, width in zip(names, (8, 4, 4), strict=True):
            self.add_module(name, nn.Linear(8, width))
        self.names = names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in self.names)


class Fused(nn.Module):
    def __init__(self, name: str, width: int = 24) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(8, width))
        self.name = name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return getattr(self, self.name)(x).split(8, dim=-1)


@pytest.mark.parametrize(
    "module",
    [
        Separate(("q_proj", "k_proj", "v_proj")),
        Separate(("query", "key", "value")),
        Fused("qkv"),
        Fused("c_attn"),
    ],
)
def test_separate_and_fused_projections(module: nn.Module):
    x = normal(0, 2, 3, 8)
    with tap_qkv(nn.Sequential(module), {"a": "0"}) as tap:
        expected = module(x)
        for mine, theirs in zip(tap.pop()["a"], expected, strict=True):
            assert torch.equal(mine, theirs)
    assert hooks(module) == 0


def test_explicit_projections_and_refusals():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with tap_qkv(module, {"a": ("2", "0", "1")}) as tap:
        x = normal(0, 2, 3, 8)
        y = module(x)
        assert torch.equal(tap.pop()["a"].q, y)
    net = nn.ModuleDict({"good": Fused("qkv"), "grouped": Fused("qkv", 16), "odd": Fused("query_key_value")})
    for name, word in (("grouped", "8 to 16"), ("odd", "query_key_value")):
        with pytest.raises(ValueError, match=word):
            tap_qkv(net, {"a": "good", "b": name})
        assert hooks(net) == 0


# --- LayerMap
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        (LayerMap.uniform(4, 12), ((1, 3), (2, 6), (3, 9), (4, 12))),
        (LayerMap.uniform(3, 12, embedding=True), ((0, 0), (1, 4), (2, 8), (3, 12))),
        (LayerMap.uniform(4, 6), ((1, 2), (2, 3), (3, 5), (4, 6))),  # 1.5 and 4.5 upwards
        (LayerMap.uniform(6, 2), ((1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2))),
        (LayerMap.uniform(1, 5), ((1, 5),)),
        (LayerMap.last(2, 4, 12), ((3, 11), (4, 12))),
        (LayerMap.first_last(4, 12), ((1, 1), (4, 12))),
        (LayerMap.first_last(1, 12), ((1, 12),)),
        (LayerMap.explicit([(0, 0), (2, 7)]), ((0, 0), (2, 7))),
    ],
)
def test_layer_maps(layers: LayerMap, pairs: tuple):
    assert layers.pairs == pairs == tuple(layers)
    assert len(layers) == len(pairs)


def test_select_knows_the_embedding_entry():
    layers = LayerMap.uniform(2, 4)
    student, teacher = ["e", "s1", "s2"], ["E", "t1", "t2", "t3", "t4"]
    assert layers.select(student, teacher) == [("s1", "t2"), ("s2", "t4")]
    with pytest.raises(ValueError, match="embedding"):
        layers.select(student, teacher[1:])  # block outputs alone: the classical off-by-one
    with pytest.raises(ValueError, match="at least 8"):
        LayerMap.explicit([(0, 7)]).select(student, teacher)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: LayerMap(()), "pairs"),
        (lambda: LayerMap.explicit([(3, 1)], student_layers=2), "student layer 3"),
        (lambda: LayerMap.explicit([(1, -1)]), "teacher layer -1"),
        (lambda: LayerMap.explicit([(0, 0)], student_layers=0), "student_layers"),
        (lambda: LayerMap.last(3, 2, 12), "n must"),
        (lambda: LayerMap.uniform(0, 12), "≥ 1"),
        (lambda: LayerMap.search([], [torch.zeros(3, 2)]), "samples"),
        (lambda: LayerMap.search([torch.zeros(2, 2)], [torch.zeros(3, 2)]), "samples"),
    ],
)
def test_layer_map_errors(build, word: str):
    with pytest.raises(ValueError, match=word):
        build()


def test_search_finds_planted_layers():
    teacher = [normal(seed, 40, 6) for seed in range(5)]
    rotation, _ = torch.linalg.qr(normal(99, 6, 6))
    planted = [1, 1, 3, 4]
    student = [3.0 * (teacher[t] @ rotation) + 0.1 * normal(7 + t, 40, 6) + 5.0 for t in planted]
    layers = LayerMap.search(student, teacher)
    assert layers.pairs == ((1, 2), (2, 2), (3, 4), (4, 5))
    assert (layers.student_layers, layers.teacher_layers) == (4, 5)
    swapped = [student[3], *student[1:]]
    assert LayerMap.search(swapped, teacher, monotone=False).pairs[0] == (1, 5)
    assert [t for _, t in LayerMap.search(swapped, teacher)] == sorted(
        t for _, t in LayerMap.search(swapped, teacher)
    )
    images = [feature.reshape(40, 3, 2, 1) for feature in student]
    torch.testing.assert_close(similarity_matrix(images, teacher), similarity_matrix(student, teacher))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_search_is_the_best_monotone_map_by_brute_force(data: st.DataObject):
    students, teachers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    table = [[data.draw(st.integers(-5, 5)) for _ in range(teachers)] for _ in range(students)]
    features = [torch.full((1, 1), float(i)) for i in range(4)]
    layers = LayerMap.search(
        features[:students],
        features[:teachers],
        similarity=lambda s, t: torch.tensor(float(table[int(s)][int(t)])),
    )
    chosen = [t - 1 for _, t in layers]
    assert chosen == sorted(chosen)
    best = max(
        sum(row[t] for row, t in zip(table, combination, strict=True))
        for combination in itertools.combinations_with_replacement(range(teachers), students)
    )
    assert sum(row[t] for row, t in zip(table, chosen, strict=True)) == best


# --- Projector
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_dim", "out_dim"), [(4, 9), (9, 4), (6, 6)])
def test_orthogonal_projector_stays_orthogonal_under_training(in_dim: int, out_dim: int):
    torch.manual_seed(0)
    projector = Projector("orthogonal", in_dim, out_dim).double()
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5)
    x, target = normal(0, 20, in_dim).double(), normal(1, 20, out_dim).double()
    losses = []
    for _ in range(20):
        loss = (projector(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    weight = projector.map.weight  # type: ignore[union-attr]
    gram = weight.T @ weight if in_dim <= out_dim else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-6)
    if in_dim <= out_dim:
        torch.testing.assert_close(torch.pdist(projector(x)), torch.pdist(x), rtol=1e-5, atol=0)


def test_conv1x1_is_the_linear_map_over_channels():
    torch.manual_seed(0)
    for spatial in (1, 2, 3):
        convolution, linear = Projector("conv1x1", 3, 5, spatial=spatial), Projector("linear", 3, 5)
        linear.map.weight.data.copy_(convolution.map.weight.data.view(5, 3))  # type: ignore[union-attr,operator]
        linear.map.bias.data.copy_(convolution.map.bias.data)  # type: ignore[union-attr,operator]
        x = normal(0, 2, 3, *[4] * spatial)
        torch.testing.assert_close(convolution(x).movedim(1, -1), linear(x.movedim(1, -1)))


def test_initial_values():
    x = normal(0, 7, 3)
    assert torch.equal(Projector("identity", 3, 3)(x), x)
    assert list(Projector("identity", 3, 3).parameters()) == []
    assert torch.equal(Projector("linear", 3, 5, init="eye")(x), torch.cat([x, torch.zeros(7, 2)], 1))
    square = Projector("conv1x1", 3, 3, init="eye")
    assert torch.equal(square(x[:, :, None, None])[:, :, 0, 0], x)
    weight = Projector("linear", 3, 5, init="orthogonal").map.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(3))  # type: ignore[union-attr,operator]
    torch.manual_seed(0)
    mlp = Projector("mlp", 300, 200, hidden=100, init="xavier")
    assert mlp.map[0].weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.05)  # type: ignore[index,union-attr]
    assert mlp.map[2].bias.abs().sum() == 0  # type: ignore[index,union-attr]
    assert "mlp, 300 → 200" in repr(mlp)
    assert Projector("mlp", 3, 5).map[0].out_features == 5  # type: ignore[index,union-attr]
    assert Projector("linear", 3, 5, bias=False).map.bias is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("lin", 3, 3, {}), "kind"),
        (("linear", 0, 3, {}), "in_dim"),
        (("linear", 3, 3, {"init": "zero"}), "init"),
        (("linear", 3, 3, {"hidden": 5}), "hidden"),
        (("identity", 3, 4, {}), "equal widths"),
        (("orthogonal", 3, 4, {"init": "eye"}), "means nothing"),
        (("conv1x1", 3, 4, {"spatial": 4}), "spatial"),
    ],
)
def test_projector_arguments(arguments: tuple, word: str):
    kind, in_dim, out_dim, options = arguments
    with pytest.raises(ValueError, match=word):
        Projector(kind, in_dim, out_dim, **options)


def test_projector_checks_the_width_on_the_right_axis():
    with pytest.raises(ValueError, match=r"width 3 in dimension -1.*\[2, 4\]"):
        Projector("linear", 3, 3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="dimension 1"):
        Projector("conv1x1", 3, 3)(torch.zeros(2, 4, 3, 3))
