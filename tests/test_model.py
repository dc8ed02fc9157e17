"""Models in and out of arrays, seeded values, teachers, and batch statistics that change only when told to."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import assert_same
from test_methods import fit_one, job_of, model_of
from torch import nn

from fedssl import seeds
from fedssl.errors import ConfigError, ProtocolError
from fedssl.model import derive, ema_, frozen, load_arrays, norm_keys, pairs, seed_parameters, tensors, to_arrays
from fedssl.networks.heads import mlp
from fedssl.networks.norms import KINDS, commit_statistics, is_norm, norm1d, norm2d
from fedssl.parts import Part, Share

TEACHER = Part("teacher", trainable=False, share=Share.derived, follows=("encoder", "head"))


class Odd(nn.Module):
    """Names that mean nothing: a parameter of no layer, a 0-d one, a buffer, a normalisation called `conv`."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 400))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.conv = norm2d("batch", 6)
        self.norm = nn.Conv2d(3, 6, 3)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def build() -> nn.ModuleDict:
    student = {"encoder": Odd(), "head": mlp(6, 12, 7, norm="layer")}
    return nn.ModuleDict({**student, "teacher": frozen(student)})


def test_seeded_values_depend_on_seed_and_name_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = build(), build(), build()
    seed_parameters(a, 1)
    middle = torch.get_rng_state()
    torch.manual_seed(99)
    seed_parameters(b, 1)
    seed_parameters(c, 2)
    assert_same(to_arrays(a), to_arrays(b))
    assert any((x != y).any() for x, y in zip(to_arrays(a).values(), to_arrays(c).values(), strict=True))
    alone = nn.ModuleDict({"head": mlp(6, 12, 7, norm="layer")})
    seed_parameters(alone, 1)
    assert_same(to_arrays(alone), {k: v for k, v in to_arrays(a).items() if k.startswith("head.")})
    torch.set_rng_state(middle)
    seed_parameters(a, 3)
    assert torch.equal(middle, torch.get_rng_state()), "the global generator is neither read nor moved"
    torch.set_rng_state(state)


def test_every_parameter_has_its_own_stream() -> None:
    model = nn.ModuleDict({str(i): nn.Linear(5, 5) for i in range(4)})
    seed_parameters(model, 0)
    values = [p.detach().flatten()[:5] for p in model.parameters()]
    assert len({tuple(v.tolist()) for v in values}) == len(values)


def test_initial_scales() -> None:
    model = build()
    seed_parameters(model, 0)
    encoder = model["encoder"]
    kernel, bias = encoder.norm.weight.detach(), encoder.norm.bias.detach()
    bound = 1 / np.sqrt(27)
    assert 0.9 * bound < kernel.abs().max() <= bound
    assert 0 < bias.abs().max() <= bound
    assert kernel.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.2)
    assert encoder.token.detach().std().item() == pytest.approx(0.02, rel=0.2)
    assert 0 < abs(encoder.temperature.item()) < 0.2
    assert (encoder.conv.weight == 1).all()
    assert (encoder.conv.bias == 0).all()
    assert encoder.count == 3


@pytest.mark.parametrize(
    "layer", [nn.RMSNorm(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)]
)
def test_every_normalisation_of_torch_starts_at_one(layer: nn.Module) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(layer)})
    seed_parameters(model, 0)
    assert (model["encoder"][0].weight == 1).all()
    assert norm_keys(model) == {k for k, _ in tensors(model)}


def test_arrays_are_copies() -> None:
    model = build()
    arrays = to_arrays(model)
    assert list(arrays) == [k for k, _ in tensors(model)]
    assert not any("scratch" in key for key in arrays)
    for key, value in tensors(model):
        assert not np.shares_memory(arrays[key], value.detach().numpy()), key
        assert arrays[key].shape == tuple(value.shape)
    assert arrays["encoder.temperature"].shape == ()
    assert arrays["encoder.count"].dtype == np.int64
    assert to_arrays(model, ["encoder.count"]).keys() == {"encoder.count"}
    arrays["encoder.token"][:] = 5
    assert (model["encoder"].token == 0).all()


def test_arrays_come_back() -> None:
    model, twin = build(), build()
    seed_parameters(model, 4)
    model["encoder"].count.fill_(11)
    arrays = to_arrays(model)
    for value in arrays.values():
        value.flags.writeable = False
    load_arrays(twin, arrays)
    assert_same(to_arrays(twin), arrays)
    load_arrays(twin, {"encoder.token": np.ones((1, 1, 400), np.float64) / 3, "encoder.count": np.array(5, np.int32)})
    assert twin["encoder"].token.dtype == torch.float32
    assert twin["encoder"].token[0, 0, 0].item() == np.float32(1 / 3)
    assert twin["encoder"].count.item() == 5
    assert twin["encoder"].count.dtype == torch.int64


def test_arrays_of_any_layout_come_back() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.Linear(3, 4), "conv": nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)}
    )
    weight = np.arange(12, dtype=np.float32).reshape(3, 4).T
    load_arrays(model, {"encoder.weight": weight, "encoder.bias": np.arange(8, dtype=np.float32)[::-2]})
    assert_same(to_arrays(model, ["encoder.weight"]), {"encoder.weight": weight})
    assert model["encoder"].bias.tolist() == [7, 5, 3, 1]
    twin = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3)})
    load_arrays(twin, to_arrays(model, ["conv.weight", "conv.bias"]))
    assert torch.equal(twin["conv"].weight, model["conv"].weight)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"encoder.tokens": np.zeros(3, np.float32)}, "'encoder.tokens' has no place"),
        ({"encoder.scratch": np.zeros(2, np.float32)}, "no place"),
        ({"encoder.token": np.zeros((1, 400), np.float32)}, r"\(1, 400\), the model wants \(1, 1, 400\)"),
        ({"encoder.temperature": np.zeros(1, np.float32)}, "the model wants"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        load_arrays(build(), arrays)


def test_norm_keys_are_found_by_type() -> None:
    found = norm_keys(build())
    own = {f"encoder.conv.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    own |= {"head.1.weight", "head.1.bias"}
    assert found == own | {f"teacher.{key}" for key in own}
    assert norm_keys(nn.ModuleDict({"encoder": nn.Linear(2, 2)})) == frozenset()


def test_derive_copies_whole_parts_and_nothing_else() -> None:
    model = build()
    seed_parameters(model, 0)
    before = to_arrays(model)
    derive(model, [TEACHER, Part("encoder")], ["encoder.token"])
    assert_same(before, to_arrays(model))
    model["encoder"].count.fill_(8)
    derive(model, [TEACHER], ["teacher.encoder.token"])
    assert all(torch.equal(a, b) for a, b in pairs(model, TEACHER))
    assert model["teacher"]["encoder"].count == 8
    assert len(list(pairs(model, TEACHER))) == sum(k.startswith("teacher.") for k in before)
    with torch.no_grad():
        model["encoder"].token.fill_(9)
    assert not (model["teacher"]["encoder"].token == 9).any()
    assert not any(p.requires_grad for p in model["teacher"].parameters())


def test_the_tensors_of_a_model_are_those_of_its_state() -> None:
    """A module that is there twice has two names for its arrays, and a teacher moves it once."""
    layer = nn.Linear(2, 2)
    layer.register_buffer("seen", torch.zeros(1))
    layer.register_buffer("scratch", torch.zeros(1), persistent=False)
    layer.register_buffer("absent", None)
    model = nn.ModuleDict({"encoder": nn.Sequential(layer, nn.BatchNorm1d(2), layer)})
    model["teacher"] = frozen({"encoder": model["encoder"]})
    state = model.state_dict(keep_vars=True)
    found = list(tensors(model))
    assert [name for name, _ in found] == list(state)
    assert all(value is state[name] for name, value in found)
    with torch.no_grad():
        layer.weight += 1
        before = model.get_parameter("teacher.encoder.0.weight").clone()
    ema_(model, Part("teacher", trainable=False, follows=("encoder",)), 0.75)
    torch.testing.assert_close(model.get_parameter("teacher.encoder.2.weight"), before + 0.25)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.996, 1.0])
def test_a_teacher_is_the_closed_form_of_its_students(decay: float) -> None:
    model = build().double()
    seed_parameters(model, 0)
    start = {k: v.copy() for k, v in to_arrays(model).items() if k.startswith("teacher.")}
    students, t = [], 7
    for k in range(t):
        seed_parameters(nn.ModuleDict({n: model[n] for n in TEACHER.follows}), 100 + k)
        with torch.no_grad():
            model["encoder"].conv.running_mean.fill_(float(k))
        model["encoder"].count.fill_(k)
        students.append(to_arrays(nn.ModuleDict({n: model[n] for n in TEACHER.follows})))
        ema_(model, TEACHER, decay)
    arrays = to_arrays(model)
    for key, value in start.items():
        own = key.removeprefix("teacher.")
        if value.dtype == np.int64:
            assert arrays[key] == students[-1][own], "counters are copied"
            continue
        expected = decay**t * value + (1 - decay) * sum(decay ** (t - 1 - k) * students[k][own] for k in range(t))
        np.testing.assert_allclose(arrays[key], expected, rtol=0, atol=1e-12, err_msg=key)
        if decay == 0:
            assert arrays[key].tobytes() == students[-1][own].tobytes()
        if decay == 1:
            assert arrays[key].tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("one", "shape"), [(nn.BatchNorm1d, (9, 7)), (nn.BatchNorm1d, (4, 7, 5)), (nn.BatchNorm2d, (3, 7, 4, 5))]
)
def test_deferred_batch_norm_equals_torch(one: type[nn.Module], shape: tuple[int, ...]) -> None:
    theirs, ours = one(7), norm2d("batch", 7)
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *ours.parameters()):
            parameter.copy_(torch.linspace(-1, 2, 7))
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        views = [torch.randn(shape, generator=generator) * 3 + step for _ in range(2)]
        before = {k: v.clone() for k, v in ours.named_buffers()}
        mine = [ours(view) for view in views]
        assert all(torch.equal(v, before[k]) for k, v in ours.named_buffers()), "forward leaves the buffers alone"
        reference = [theirs(view) for view in views]
        commit_statistics(nn.Sequential(ours))
        for a, b in zip(mine, reference, strict=True):
            torch.testing.assert_close(a, b)
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, msg=name)
    commit_statistics(ours)
    assert ours.num_batches_tracked == 8, "a second commit has nothing to fold in"
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(views[0]), theirs(views[0]))
    torch.testing.assert_close(ours(views[0][:1]), theirs(views[0][:1]))
    commit_statistics(ours)
    assert ours.num_batches_tracked == 8, "evaluation counts no batch"
    load_arrays(ours, {k: v.detach().numpy() for k, v in theirs.state_dict().items()})


def test_deferred_gradients_equal_torch() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    grads = [torch.autograd.grad((norm(x) ** 3).sum(), x)[0] for norm in (nn.BatchNorm1d(5), norm1d("batch", 5))]
    torch.testing.assert_close(*grads)


def test_a_client_that_fails_leaves_nothing_to_the_next_one() -> None:
    """A worker uses its model again: statistics of a batch whose loss was refused belong to nobody."""
    job = job_of("byol", "encoder.norm=batch", "method.norm=batch")
    used, fresh = model_of(job), model_of(job)
    start = to_arrays(used)
    with pytest.raises(ConfigError, match="norm=group"):
        fit_one(job, used, n=1)  # the encoder's layers have seen the image, the head refused it
    load_arrays(used, start)
    fit_one(job, used)
    fit_one(job, fresh)
    assert_same(to_arrays(used), to_arrays(fresh))


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1, 1), (0, 6)])
def test_one_example_has_no_batch_statistics(shape: tuple[int, ...]) -> None:
    norm = norm2d("batch", 6)
    with pytest.raises(ConfigError, match="norm=group"):
        norm(torch.zeros(shape))
    commit_statistics(norm)
    assert norm.num_batches_tracked == 0
    assert norm(torch.zeros(1, 6, 2, 1)).shape == (1, 6, 2, 1), "one image has as many values as pixels"
    with pytest.raises(ConfigError, match="shape"):
        norm(torch.zeros(6))


@pytest.mark.parametrize("channels", [1, 2, 4, 7, 8, 12, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_every_width(kind: str, channels: int) -> None:
    image = torch.randn(5, channels, 3, 3, generator=torch.Generator().manual_seed(0))
    layer = norm2d(kind, channels)
    out = layer(image)
    assert out.shape == image.shape
    assert is_norm(layer) == (kind != "none")
    assert out.std(0).max() > 0.1, "the examples can still be told apart"
    if kind in ("group", "layer"):
        torch.testing.assert_close(layer(image[:1]), out[:1])
    row = image[:, :, 0, 0]
    assert norm1d(kind, channels)(row).shape == row.shape


@pytest.mark.parametrize("channels", [2, 4, 7, 8, 12, 16])
def test_group_norm_of_rows_keeps_their_information(channels: int) -> None:
    rows = torch.randn(64, channels, generator=torch.Generator().manual_seed(0))
    out = norm1d("group", channels)(rows)
    assert out.std(0).max() > 0.1, "a group of one value is always zero"
    assert norm1d("group", channels)(rows[:1]).shape == (1, channels)


@pytest.mark.parametrize("make", [norm1d, norm2d])
def test_an_unknown_kind_is_refused(make: object) -> None:
    for kind in ("", "Batch", "instance"):
        with pytest.raises(ConfigError, match="batch, group, layer, none"):
            make(kind, 4)  # type: ignore[operator]


def test_heads() -> None:
    head = mlp(4, 6, 3, norm="batch", layers=3, norm_last=True)
    kinds = [type(m).__name__.lstrip("_") for m in head]
    assert kinds == ["Linear", "DeferredBatchNorm", "ReLU"] * 2 + ["Linear", "DeferredBatchNorm"]
    assert [m.bias is None for m in head if isinstance(m, nn.Linear)] == [True, True, True]
    assert [m.bias is None for m in mlp(4, 6, 3, norm="none") if isinstance(m, nn.Linear)] == [False, False]
    assert len(mlp(4, 6, 3, norm="batch", layers=1)) == 1
    for sizes in ((0, 6, 3), (4, 0, 3), (4, 6, 0)):
        with pytest.raises(ConfigError, match="all must be positive"):
            mlp(*sizes, norm="none")
    assert isinstance(copy.deepcopy(nn.Sequential(OrderedDict(a=head)))[0], nn.Sequential)


def test_streams_are_named() -> None:
    assert seeds.key(0, "a", 1) != seeds.key(0, "a1")
    assert seeds.key(0, "a", 1) != seeds.key(0, "a", "1")
    assert seeds.key(0, "a", 1) == seeds.key(np.int64(0), "a", np.int64(1)), "the same number of another type"
    assert seeds.key(0) != seeds.key(1)
    assert 0 <= seeds.key(2**70, "x") < 2**63
    assert seeds.key(0, "client", 3) == 7075076349040673574, "the same on every machine"
