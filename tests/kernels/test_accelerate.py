"""accelerate on plain PyTorch modules: same results, same state dict, nothing fused that must not be, undo."""

import copy
import functools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import mdm_kernels as mk
from mdm_kernels.accelerate import fused
from tests.kernels.accelerated import assert_same, output_and_gradients


@pytest.fixture
def fused_calls(monkeypatch):
    """The norms that ran as one op with a SiLU, in order."""
    calls = []

    def norm_silu(norm, *args):
        calls.append(norm)
        return original(norm, *args)

    original = fused.norm_silu
    monkeypatch.setattr(fused, "norm_silu", norm_silu)
    return calls


def block(activation=None, affine=True):
    norm = nn.GroupNorm(2, 8, affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm, activation or nn.SiLU())


def two_blocks_with_one_silu():
    silu = nn.SiLU()
    return nn.Sequential(*block(silu), *block(silu))


def norm_in_two_places():
    norm = nn.GroupNorm(2, 8)
    return nn.Sequential(norm, nn.SiLU(), norm, nn.GELU())


MODELS = {  # a model, and how many of its norms run with a SiLU
    "norm and SiLU": (block, 1),
    "SiLU in place": (lambda: block(nn.SiLU(inplace=True)), 1),
    "no weight and bias": (lambda: block(affine=False), 1),
    "another activation": (lambda: block(nn.GELU()), 0),
    "a SiLU that follows something else": (lambda: nn.Sequential(*block(nn.Identity()), nn.SiLU()), 0),
    "a norm at the end": (lambda: nn.Sequential(*block(), nn.GroupNorm(4, 8)), 1),
    "nested": (lambda: nn.Sequential(block(), nn.ModuleDict({"deep": nn.Sequential(block())})["deep"]), 2),
    "one SiLU for two norms": (two_blocks_with_one_silu, 2),
    "one norm in two places": (norm_in_two_places, 1),
    "no Sequential": (lambda: nn.GroupNorm(2, 8), 0),
}


@pytest.mark.parametrize(("make_model", "fused_norms"), MODELS.values(), ids=MODELS.keys())
def test_results_stay_and_every_silu_after_a_norm_is_fused(make_model, fused_norms, fused_calls):
    model, x = make_model(), torch.randn(2, 8, 5, 4)
    before = output_and_gradients(model, x)
    mk.accelerate(model)
    assert_same(output_and_gradients(model, x), before)
    assert len(fused_calls) == fused_norms


def test_results_stay_with_the_kernels():
    model, x = nn.Sequential(block(), nn.GroupNorm(4, 8)), torch.randn(2, 8, 5, 4)
    before = output_and_gradients(model, x)
    mk.accelerate(model)
    with mk.use_backend("triton"):
        assert_same(output_and_gradients(model, x), before)


def test_a_module_called_alone_computes_what_it_did():
    """As UNets do that put the time embedding's scale and shift between the norm and the SiLU of a Sequential."""
    model, x = block(), torch.randn(2, 8, 5, 4)

    def modulated(model, x):
        conv_and_norm, rest = model[:-1], model[-1:]
        return rest(conv_and_norm(x) * 2 + 1)

    before = modulated(model, x), model[1](x)
    mk.accelerate(model)
    torch.testing.assert_close((modulated(model, x), model[1](x)), before)


@pytest.mark.parametrize("registered", ["before", "after"])
@pytest.mark.parametrize("position", [1, 2])
def test_hooks_see_what_they_saw(position, registered):
    model, x, seen = block(), torch.randn(2, 8, 5, 4), []
    expected = (model[:2] if position == 1 else model)(x)
    if registered == "after":
        mk.accelerate(model)
    model[position].register_forward_hook(lambda module, args, output: seen.append(output))
    if registered == "before":
        mk.accelerate(model)
    model(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_hooks_of_all_modules_see_what_they_saw():
    model, x, seen = block(), torch.randn(2, 8, 5, 4), []
    mk.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == [*model, model]


def test_arguments_keep_their_names():
    model, x = block(), torch.randn(2, 8, 5, 4)
    before = model(input=x), model[1](input=x)
    mk.accelerate(model)
    torch.testing.assert_close((model(input=x), model[1](input=x)), before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_parametrised_norm_keeps_its_parametrisation(registered):
    model, x = block(), torch.randn(2, 8, 5, 4)
    if registered == "after":
        mk.accelerate(model)
    parametrize.register_parametrization(model[1], "weight", Doubled())
    if registered == "before":
        report = mk.accelerate(model)
        assert [entry.path for entry in report.left] == ["1"]
    expected = F.silu(F.group_norm(model[0](x), 2, 2 * model[1].parametrizations.weight.original, model[1].bias))
    torch.testing.assert_close(model(x), expected)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype) + 1


class Chain(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("make_model", "left"),
    [
        (lambda: nn.Sequential(GroupNorm32(2, 8), nn.SiLU()), ("0", "GroupNorm32")),
        (lambda: nn.Sequential(Chain(nn.GroupNorm(2, 8), nn.SiLU())), ("0", "Chain")),
    ],
    ids=["GroupNorm", "Sequential"],
)
def test_a_subclass_with_a_forward_of_its_own_is_left_and_reported(make_model, left, fused_calls):
    model, x = make_model(), torch.randn(2, 8, 5, 4)
    before, kind = model(x), type(model.get_submodule(left[0]))
    report = mk.accelerate(model)
    assert [entry[:2] for entry in report.left] == [left]
    assert type(model.get_submodule(left[0])) is kind
    assert not fused_calls
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("position", [0, 1])
def test_a_forward_put_on_the_instance_before_is_left_and_reported(position):
    """As libraries that move weights between devices do."""
    model = nn.Sequential(block())
    module = (model[0], model[0][1])[position]
    module.forward = lambda x: x + 1
    report = mk.accelerate(model)
    assert [entry.path for entry in report.left] == [("0", "0.1")[position]]
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(module(x), x + 1)


def test_a_forward_put_on_the_instance_afterwards_is_called():
    model, x = block(), torch.randn(2, 8, 5, 4)
    mk.accelerate(model)
    model[1].forward = lambda x: x + 1
    torch.testing.assert_close(model(x), F.silu(model[0](x) + 1))


def test_a_norm_with_a_silu_of_its_own_keeps_both():
    model, x = nn.Sequential(*block(), mk.GroupNormSiLU(2, 8), nn.SiLU()), torch.randn(2, 8, 5, 4)
    before = model(x)
    mk.accelerate(model)
    torch.testing.assert_close(model(x), before)


class OwnAttention(nn.Module):
    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class AttentionByName(nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class FusedAttention(nn.Module):
    def forward(self, x):
        return mk.scaled_dot_product_attention(x, x, x)


def test_modules_that_call_the_attention_of_torch_are_reported():
    model = nn.ModuleList([OwnAttention(), AttentionByName(), nn.MultiheadAttention(8, 2), FusedAttention()])
    assert [entry.path for entry in mk.accelerate(model).left] == ["0", "1", "2"]


def test_modules_and_tensors_stay_the_same_objects():
    model = nn.Sequential(block(), nn.GroupNorm(4, 8))
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    mk.accelerate(model)
    assert dict(model.named_modules()) == modules
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    assert isinstance(model[0], nn.Sequential)
    assert isinstance(model[1], nn.GroupNorm)


def test_undo_restores_classes_attributes_and_bits():
    model, x = nn.Sequential(block(), nn.GroupNorm(4, 8)), torch.randn(2, 8, 5, 4)
    before, kinds = model(x), [(type(module), sorted(vars(module))) for module in model.modules()]
    report = mk.accelerate(model)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] != kinds
    report.undo()
    report.undo()
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == kinds
    assert torch.equal(model(x), before)


def test_undo_leaves_what_has_changed_since():
    model = block()
    report = mk.accelerate(model)
    parametrize.register_parametrization(model[1], "weight", Doubled())
    parametrised = type(model[1])
    report.undo()
    assert type(model) is nn.Sequential
    assert type(model[1]) is parametrised


def test_a_second_call_swaps_only_what_is_new():
    model = nn.Sequential(block())
    first = mk.accelerate(model)
    assert mk.accelerate(model).swapped == []
    model.append(block())
    second = mk.accelerate(model)
    assert [entry.path for entry in second.swapped] == ["1.1"]
    first.undo()
    second.undo()
    assert {type(module) for module in model.modules()} == {nn.Sequential, nn.Conv2d, nn.GroupNorm, nn.SiLU}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated_too(copied, fused_calls):
    model, x = block(), torch.randn(2, 8, 5, 4)
    mk.accelerate(model)
    again = copied(model)
    torch.testing.assert_close(again(x), model(x))
    assert fused_calls == [again[1], model[1]]


def test_torch_compile_without_graph_breaks():
    model, x = nn.Sequential(block(), nn.GroupNorm(4, 8)), torch.randn(2, 8, 5, 4)
    before = output_and_gradients(model, x)
    mk.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = output_and_gradients(compiled, x)
    assert_same({name.removeprefix("_orig_mod."): result for name, result in results.items()}, before)


def test_the_report_is_a_table():
    model = nn.Sequential(block(), block(), nn.GroupNorm(4, 8), GroupNorm32(2, 8))
    assert str(mk.accelerate(model)).splitlines() == [
        "Sequential: 3 parts swapped, 1 left",
        "         part              count  runs as / is left because                                    first at",
        "swapped  GroupNorm + SiLU  2      mk.group_norm_silu                                           0.1",
        "swapped  GroupNorm         1      mk.group_norm_silu, activation=None                          2",
        "left     GroupNorm32       1      is a subclass of GroupNorm; mk.GroupNormSiLU may replace it  3",
    ]


def test_the_report_of_nothing_is_one_line():
    assert str(mk.accelerate(nn.Linear(2, 2))) == "Linear: 0 parts swapped, 0 left"


def test_a_forward_that_wraps_a_builtin_is_left_alone():
    class Joined(nn.Module):
        @functools.wraps(torch.cat)
        def forward(self, x):
            return torch.cat([x, x], 1)

    model, x = nn.Sequential(Joined(), nn.GroupNorm(2, 8)), torch.randn(2, 4, 3)
    before = model(x)
    assert [entry.part for entry in mk.accelerate(model).swapped] == ["GroupNorm"]
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_is_exported_with_a_named_dynamic_batch(backend, film):
    class Film(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = mk.GroupNormSiLU(2, 8)

        def forward(self, x):
            scale = x.mean((2, 3)) if film else None
            return self.norm(x, scale, scale)

    model, batch = Film(), torch.export.Dim("batch")
    with mk.use_backend(backend):
        program = torch.export.export(model, (torch.randn(3, 8, 4, 5),), dynamic_shapes={"x": {0: batch}})
        for rows in (1, 2, 7):
            x = torch.randn(rows, 8, 4, 5)
            torch.testing.assert_close(program.module()(x), model(x))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model is dict; it must be an nn\.Module"):
        mk.accelerate({})


def test_a_plain_model_does_not_import_diffusers():
    code = """if True:
        import sys, torch, mdm_kernels as mk
        mk.accelerate(torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU()))
        sys.exit("diffusers" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
