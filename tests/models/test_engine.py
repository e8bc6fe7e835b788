"""Engines draw the pictures of the model itself: captured graphs by a recorded stand-in, as CI has no GPU."""

import copy

import pytest
import torch

from mdm_models import UNetConfig, build_model, engine
from mdm_models.diffusion import SAMPLERS, MatryoshkaDiffusion, sample
from mdm_models.engine import GraphedModel, Windowed, engine_for, window_starts
from mdm_models.unet import UNet
from tests.models import recorded_graph

INNER = UNetConfig(
    channels=(32,), blocks=(1,), attention=(1,), num_heads=2, mid_blocks=True, embed_dim=32,
    micro=(("scale", 8.0),), context_dim=16,
)  # fmt: skip
NESTED = UNetConfig(channels=(32, 32), blocks=(1, 1), embed_dim=32, inner=INNER)
EVERYWHERE = (0.0, float("inf"))


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    model = build_model(NESTED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def graphs(monkeypatch):
    return recorded_graph.install(monkeypatch)[0]


def draw(model, prompt: int = 1, rows: int = 1, tokens: int = 5, **options) -> torch.Tensor:
    """Pictures by two steps, for a text that follows from the number `prompt`."""
    context, negative = torch.randn(2, rows, tokens, 16, generator=torch.Generator().manual_seed(prompt))
    return sample(
        model,
        MatryoshkaDiffusion(NESTED.noise_scales(8, 0)),
        [(rows, 3, 8, 8), (rows, 3, 4, 4)],
        context,
        negative_context=negative,
        **{"guidance_scale": 3.0, "num_inference_steps": 3, "seed": 2} | options,
    )


@pytest.mark.parametrize("interval", [EVERYWHERE, (200.0, 600.0)])
@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.7)])
def test_replayed_graphs_draw_the_pictures_of_the_model(model, graphs, sampler, eta, interval):
    options = {"sampler": sampler, "eta": eta, "guidance_interval": interval}
    assert torch.equal(draw(GraphedModel(model), **options), draw(model, **options))
    assert len(graphs) == (1 if interval == EVERYWHERE else 2)  # alone, and beside the negative text
    assert sum(graph.replays for graph in graphs) == (5 if sampler == "heun" else 3)


def test_another_prompt_of_the_same_length_is_drawn_by_the_same_graph(model, graphs):
    graphed = GraphedModel(model)
    pictures = [draw(graphed, prompt) for prompt in (1, 2, 1)]
    assert len(graphs) == 1
    assert torch.equal(pictures[1], draw(model, 2))
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    "other",
    [{"rows": 2}, {"tokens": 4}, {"micro": {"scale": torch.tensor([16.0])}}, {"context_mask": torch.ones(1, 5)}],
)
def test_other_shapes_and_other_inputs_have_graphs_of_their_own(model, graphs, other):
    graphed = GraphedModel(model)
    draw(graphed)
    assert torch.equal(draw(graphed, **other), draw(model, **other))
    draw(graphed)
    assert len(graphs) == 2


def test_a_switch_of_the_kernels_is_followed(model, graphs, monkeypatch):
    graphed = GraphedModel(model)
    for on_triton in (False, True, False):
        monkeypatch.setattr(engine, "chooses_triton", lambda x, on_triton=on_triton: on_triton)
        draw(graphed)
    assert len(graphs) == 2


def test_warm_up_runs_on_a_stream_of_its_own_before_the_capture(model, monkeypatch):
    _, log = recorded_graph.install(monkeypatch)
    draw(GraphedModel(model))
    assert log == ["wait", "side", "wait", "capture"]


def test_new_values_of_the_weights_are_read_and_new_memory_is_captured_anew(model, graphs):
    own = copy.deepcopy(model)
    graphed = GraphedModel(own)
    draw(graphed)
    with torch.no_grad():
        own.conv_out.weight.mul_(2)
    assert torch.equal(draw(graphed), draw(own))
    assert len(graphs) == 1
    own.conv_out.weight = torch.nn.Parameter(3 * own.conv_out.weight)
    assert torch.equal(draw(graphed), draw(own))
    assert len(graphs) == 2


def test_the_oldest_graph_goes_first(model, graphs, monkeypatch):
    monkeypatch.setattr(engine, "GRAPHS", 2)
    graphed = GraphedModel(model)
    for tokens in (3, 4, 3, 5, 3):  # 4 goes when 5 comes
        draw(graphed, tokens=tokens)
    assert len(graphs) == 3
    draw(graphed, tokens=4)
    assert len(graphs) == 4


def test_a_model_that_cannot_be_captured_runs_as_it_is(model, graphs):
    own = copy.deepcopy(model)
    own.conv_out.register_forward_hook(lambda module, inputs, output: output * float(output.isfinite().all()))
    with pytest.warns(UserWarning, match="runs without a CUDA graph: operation not permitted"):
        pictures = draw(GraphedModel(own))
    assert torch.equal(pictures, draw(own))


def test_under_autocast_nothing_is_captured(model, graphs):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(GraphedModel(model)), draw(model))
    assert not graphs


def test_graphs_captured_in_inference_mode_serve_outside_of_it(model, graphs):
    graphed = GraphedModel(model)
    with torch.inference_mode():
        first = draw(graphed)
    assert torch.equal(draw(graphed), first)
    assert len(graphs) == 1


def test_a_compiled_model_is_prepared_and_draws_nearly_the_same(model):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(draw(compiled), draw(model), rtol=0, atol=1e-4)


def test_auto_captures_on_a_gpu_alone(model, monkeypatch):
    assert engine_for(model, "auto") is model
    assert engine_for(model, "eager") is model
    monkeypatch.setattr(engine, "_device_type", lambda model: "cuda")
    assert isinstance(engine_for(model, "auto"), GraphedModel)
    assert isinstance(engine_for(model, "graph"), GraphedModel)
    assert engine_for(model, "eager") is model


@pytest.mark.parametrize(
    ("name", "message"), [("fast", "engine is 'fast'; it must be one of auto"), ("graph", "needs a GPU.*on cpu")]
)
def test_an_engine_that_cannot_be_is_named(model, name, message):
    with pytest.raises(ValueError, match=message):
        engine_for(model, name)


# Clips longer than the model's


def numbered(x: list[torch.Tensor], time: torch.Tensor, *condition) -> list[torch.Tensor]:
    """Predicts for every frame of a window the number in its first one, and lets a level of one frame as it is."""
    high, low = x
    return [high[:, :, :1].expand_as(high), low]


@pytest.mark.parametrize(
    ("count", "length", "starts"),
    [(20, 8, [0, 4, 8, 12]), (21, 8, [0, 4, 8, 12, 13]), (9, 8, [0, 1]), (8, 8, [0]), (3, 1, [0, 1, 2])],
)
def test_windows_overlap_by_half_and_cover_every_frame(count, length, starts):
    assert window_starts(count, length) == starts
    assert {frame for start in starts for frame in range(start, start + length)} == set(range(count))


def test_what_windows_predict_for_a_frame_is_averaged():
    frames = torch.arange(7.0).view(1, 1, 7, 1, 1)
    windowed = Windowed(numbered, [4, 1], 7)
    assert (windowed.starts, windowed.counts) == ([0, 2, 3], [7, 3])
    low = torch.tensor([10.0, 20.0, 30.0]).view(1, 1, 3, 1, 1)
    high, own = windowed([frames, low], torch.zeros(1))
    assert high.flatten().tolist() == pytest.approx([0, 0, 1, 5 / 3, 2.5, 2.5, 3])
    assert torch.equal(own, low)  # each window has its own frame there


def test_each_window_sees_its_frames_at_every_level_and_what_the_text_was_made_into():
    class Seen:
        def __init__(self):
            self.calls = []

        def prepare(self, *condition):
            return "prepared", *condition

        def __call__(self, x, time, condition):
            self.calls.append(([level.flatten().tolist() for level in x], condition))
            return x

    seen = Seen()
    windowed = Windowed(seen, [4, 4, 2], 6)
    x = [torch.arange(float(count)).view(1, 1, count, 1, 1) for count in windowed.counts]
    assert all(torch.equal(a, b) for a, b in zip(windowed(x, torch.zeros(1), windowed.prepare("text")), x, strict=True))
    first, second = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]], [[2, 3, 4, 5], [2, 3, 4, 5], [2, 3]]
    assert seen.calls == [(first, ("prepared", "text")), (second, ("prepared", "text"))]


def test_a_model_in_half_precision_is_averaged_in_float32():
    x = [torch.full((1, 1, 3, 1, 1), 0.1, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 1, 1, dtype=torch.bfloat16)]
    high, _ = Windowed(numbered, [2, 1], 3)(x, torch.zeros(1))
    assert high.dtype == torch.float32
