from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mdm_models.config import UNetConfig
from mdm_models.data.stream import Batch
from mdm_models.errors import TrainingError
from mdm_models.processes import Processes
from mdm_models.text import ClassLabels
from mdm_models.training import learner as learner_module
from mdm_models.training.checkpoint.checkpoints import Checkpoints
from mdm_models.training.config import ModelConfig, TrainConfig, changed
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.learner import Learner
from tests.training.models import CLIP_MODEL, IMAGE_MODEL, NESTED_MODEL, clips, settings

HERE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return settings(tmp_path / "none.tar", tmp_path / "run")


@pytest.fixture
def learner_of(config) -> Callable[..., Learner]:
    def make(model: UNetConfig = CLIP_MODEL, encoder=None, **changes) -> Learner:
        changes = changed(config, **changes)
        return Learner(changes, model, encoder or open_encoder(changes.model, seed=0, device=HERE.device), HERE)

    return make


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in learner.model.named_parameters()}


def halves(batch: Batch) -> list[Batch]:
    half = len(batch.captions) // 2
    return [
        Batch(batch.images[part], batch.captions[part], []) for part in (slice(None, half), slice(half, None))
    ]


def test_the_loss_falls(learner_of):
    learner = learner_of(IMAGE_MODEL, frames=1, lr=3e-3, batch_size=8)
    white = Batch(torch.full((8, 3, 1, 16, 16), 255, dtype=torch.uint8), ["white"] * 8, [])
    losses = [learner.learn([white]).loss for _ in range(20)]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_the_levels_losses_add_up_to_the_loss(learner_of):
    outcome = learner_of(level_weights=(3.0, 0.5)).learn([clips()])
    high, low = outcome.level_losses
    assert 3 * high + 0.5 * low == pytest.approx(outcome.loss, rel=1e-5)


def test_the_losses_of_a_step_are_means_over_its_chunks(learner_of, monkeypatch):
    learner = learner_of(batch_size=4)
    chunks, losses = halves(clips(4)), []
    f = learner._level_losses
    monkeypatch.setattr(learner, "_level_losses", lambda *a: losses.append(f(*a)) or losses[-1])
    outcome = learner.learn(chunks)
    assert outcome.loss == pytest.approx(sum(levels.sum().item() for levels in losses) / 2)
    assert outcome.level_losses[0] == pytest.approx(sum(levels[0].item() for levels in losses) / 2)


def test_chunks_one_after_another_give_the_gradient_of_the_whole_batch(learner_of, monkeypatch):
    """With the same noise and times, drawn here for each sample, as a chunk's own follow from its number."""
    clip, whole, learners = clips(4), [], [learner_of(batch_size=4), learner_of(batch_size=4, micro_batch=2)]
    for learner, chunks in zip(learners, ([clip], halves(clip)), strict=True):
        given_time = torch.tensor([10, 300, 600, 900])
        noise = [torch.randn(4, *s, generator=torch.Generator().manual_seed(7)) for s in CLIP_MODEL.sample_shapes(16)]
        count = 4 // len(chunks)
        diffusion = learner.diffusion
        part = {"now": slice(None)}

        def times(n, number, part=part, count=count, time=given_time):
            part["now"] = slice(number * count, (number + 1) * count)
            return time[part["now"]]

        def add(images, time, strides, seed, f=diffusion.add_noise, part=part, noise=noise):
            return f(images, time, strides, [level[part["now"]] for level in noise])

        def loss(preds, images, time, seed, per_level, f=diffusion.per_sample_loss, part=part, noise=noise):
            return f(preds, images, time, [level[part["now"]] for level in noise], per_level=per_level)

        monkeypatch.setattr(learner, "_times", times)
        monkeypatch.setattr(diffusion, "add_noise", add)
        monkeypatch.setattr(diffusion, "per_sample_loss", loss)
        torch.nn.init.normal_(learner.model.unet.conv_out.weight, generator=torch.Generator().manual_seed(3))
        learner.learn(chunks)
        whole.append(gradients(learner))
    for name, gradient in whole[0].items():
        torch.testing.assert_close(whole[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_times_of_a_step_are_spread_evenly_over_its_chunks(learner_of):
    learner = learner_of(batch_size=8)
    times = torch.cat([learner._times(2, number) for number in range(4)]).sort().values
    gaps = times.diff()
    assert ((gaps >= 124) & (gaps <= 126)).all()
    assert 0 <= times.min() <= times.max() < 1000


@pytest.mark.parametrize(("times", "whole"), [("discrete", True), ("continuous", False), ("logit_normal", False)])
def test_times_are_drawn_as_the_settings_say(learner_of, times, whole):
    drawn = learner_of(times=times, batch_size=64)._times(64, 0)
    assert drawn.is_floating_point() != whole
    assert 0 <= drawn.min() <= drawn.max() <= 999


def test_the_logit_of_logit_normal_times_has_the_mean_and_deviation_of_the_settings(learner_of):
    drawn = learner_of(times="logit_normal", times_mean=1.0, times_deviation=1.5, batch_size=1024)._times(1024, 0)
    logits = torch.logit(drawn.double() / 999)
    assert abs(logits.mean() - 1) < 0.02
    assert abs(logits.std() - 1.5) < 0.02


def test_a_mixed_batch_trains_the_outer_level_on_its_share(learner_of, monkeypatch):
    learner = learner_of(NESTED_MODEL, frames=1, level_shares=(0.5, 1.0), batch_size=4)
    seen = []
    learner.parallel.register_forward_pre_hook(lambda module, inputs: seen.append([len(x) for x in inputs[0]]))
    assert learner.learn([clips(4, frames=1)]).finite
    assert seen == [[2, 4]]


def test_single_pictures_in_a_batch_train_the_innermost_level_alone(learner_of):
    learner = learner_of(images=("a.tar",), image_share=0.5, batch_size=4)
    torch.nn.init.normal_(learner.model.unet.conv_out.weight)
    torch.nn.init.normal_(learner.model.unet.inner.conv_out.weight)
    batch = clips(4)
    outer, inner = learner._level_losses(batch, 0).tolist()
    batch.images[2:] = 255 - batch.images[2:]
    outer_after, inner_after = learner._level_losses(batch, 0).tolist()
    assert outer_after == outer
    assert inner_after != inner
    batch.images[:2] = 255 - batch.images[:2]
    assert learner._level_losses(batch, 0)[0].item() != outer


def test_two_thirds_of_a_batch_are_rounded_to_whole_samples(learner_of):
    learner = learner_of(NESTED_MODEL, frames=1, level_shares=(2 / 3, 1.0))
    assert [learner.level_rows(n) for n in (1, 2, 3, 16)] == [[1, 1], [1, 2], [2, 3], [11, 16]]


def test_warm_up_is_linear(learner_of):
    learner = learner_of(warmup=4, lr=0.4)
    used = [learner.learn([clips()]).lr for _ in range(6)]
    assert used == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_the_cool_down_ends_at_0_with_the_run(learner_of):
    learner = learner_of(warmup=2, lr=0.4, steps=6, cooldown=4)
    used = [learner.learn([clips()]).lr for _ in range(6)]
    assert used == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_the_first_step_of_a_new_run_is_adams_first(learner_of, config):
    """It moves what has a gradient by the learning rate, whatever the gradient's size."""
    learner = learner_of(warmup=0, lr=1e-2)
    learner.resume(Checkpoints(Path(config.out), learner.identity(), keep=1, processes=HERE))
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    learner.learn([clips()])
    moved = torch.cat([(before[name] - p).abs().flatten() for name, p in learner.model.named_parameters()])
    assert moved.max().item() == pytest.approx(1e-2, rel=1e-3)


def test_every_step_and_chunk_has_noise_of_its_own(learner_of, monkeypatch):
    learner, seeds = learner_of(batch_size=4), []
    add = learner.diffusion.add_noise
    monkeypatch.setattr(learner.diffusion, "add_noise", lambda *a, seed: seeds.append(seed) or add(*a, seed=seed))
    for _ in range(2):
        learner.learn(halves(clips(4)))
    assert len(set(seeds)) == 4


def test_bf16_autocast_trains_float32_weights(learner_of):
    learner = learner_of(precision="bf16")
    assert learner.learn([clips()]).finite
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}


def test_an_image_model_trains_on_single_frames(learner_of):
    assert learner_of(IMAGE_MODEL, frames=1).learn([clips(frames=1)]).finite


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_weights_have_the_memory_format_asked_for(learner_of, channels_last):
    learner = learner_of(NESTED_MODEL, frames=1, channels_last=channels_last)
    seen = []
    learner.model.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output))
    learner.learn([clips(frames=1)])
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert seen[0].is_contiguous(memory_format=expected)
    assert learner.model.unet.conv_in.weight.is_contiguous(memory_format=expected)


def test_a_frozen_text_encoder_is_not_trained_and_not_saved(learner_of):
    learner = learner_of(encoder=ClassLabels(32))
    learner.learn([Batch(clips().images, ["3", ""], [])])
    assert not any(name.startswith("text.") for name in learner.model.state_dict())


def test_a_frozen_text_encoder_computes_outside_of_autocast(learner_of, monkeypatch):
    """Which would cast all of its weights at each step; it is opened in the dtype that it computes in."""
    learner, seen = learner_of(encoder=ClassLabels(32), precision="bf16"), []
    encode = ClassLabels.__call__
    note = lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or encode(*given)  # noqa: E731
    monkeypatch.setattr(ClassLabels, "__call__", note)
    assert learner.learn([Batch(clips().images, ["3", ""], [])]).finite
    assert seen == [False]
    config = ModelConfig(text_encoder="classes:32")
    for in_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        features, _ = open_encoder(config, 0, HERE.device, in_bf16)(["3"])
        assert features.dtype == dtype


def test_a_caption_that_the_encoder_cannot_read_is_one_line(learner_of):
    learner = learner_of(encoder=ClassLabels(32))
    with pytest.raises(TrainingError, match=r"captions: no class '99'"):
        learner.learn([Batch(clips().images, ["3", "99"], [])])


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_counted(learner_of, monkeypatch):
    learner = learner_of(max_bad_steps=3)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    loss = learner.diffusion.per_sample_loss
    monkeypatch.setattr(learner.diffusion, "per_sample_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    learner.learn([clips()])
    learner.learn([clips()])
    assert (learner.bad_steps, learner.ema.updates, learner.step) == (2, 0, 2)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    with pytest.raises(TrainingError, match="no finite loss in 3 steps"):
        learner.learn([clips()])


def test_the_optimizer_is_asked_before_the_device_is_waited_for(learner_of, monkeypatch):
    """So that a GPU has work while the host reads what a step measured."""
    learner, asked = learner_of(), []
    step, reading = learner.optimizer.step, learner_module._reading
    monkeypatch.setattr(learner.optimizer, "step", lambda: asked.append("step") or step())
    monkeypatch.setattr(learner_module, "_reading", lambda x: lambda: asked.append("read") or reading(x)())
    learner.learn([clips()])
    assert asked == ["step", "read"]


def test_a_bad_step_leaves_adam_as_if_it_had_not_been(learner_of, monkeypatch):
    learner, other = learner_of(), learner_of()
    loss = learner.diffusion.per_sample_loss
    with monkeypatch.context() as patched:
        patched.setattr(learner.diffusion, "per_sample_loss", lambda *a, **k: loss(*a, **k) * float("inf"))
        assert not learner.learn([clips()]).finite
    other.step = 1
    learner.learn([clips()])
    other.learn([clips()])
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {1}
    for mine, theirs in zip(learner.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_whoever_asks_to_stop_is_heard_with_the_step(learner_of):
    learner = learner_of()
    assert learner.learn([clips()], stop=lambda: True).stop
    assert not learner.learn([clips()]).stop


def test_an_optimizer_setting_can_change_between_runs(config, learner_of):
    def checkpoints() -> Checkpoints:
        return Checkpoints(Path(config.out), learner_of().identity(), 3, HERE)

    learner, storage = learner_of(), checkpoints()
    for _ in range(3):
        learner.learn([clips()])
    learner.save(storage)
    storage.finish()
    other = learner_of(beta1=0.5)
    other.resume(checkpoints())
    [group] = other.optimizer.param_groups
    assert group["betas"] == (0.5, 0.99)
    assert {int(state["step"]) for state in other.optimizer.state.values()} == {3}
    assert other.learn([clips()]).loss == learner.learn([clips()]).loss


@pytest.mark.parametrize(
    ("options", "compiled_modules"),
    [
        (("checkpoint_activations",), set()),
        (("compile",), {"NestedUNet"}),
        (("checkpoint_activations", "compile"), {"ResidualBlock", "AttentionBlock", "TextSelfAttention"}),
    ],
)
def test_how_it_is_computed_does_not_change_the_gradients(learner_of, monkeypatch, options, compiled_modules):
    compiled = []

    def compile(forward):
        compiled.append(type(forward.__self__).__name__)
        return torch_compile(forward, backend="eager")  # others take minutes

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    plain = learner_of(NESTED_MODEL, frames=1)
    other = learner_of(NESTED_MODEL, frames=1, **dict.fromkeys(options, True))
    assert set(compiled) == compiled_modules
    for learner in (plain, other):
        torch.nn.init.normal_(learner.model.unet.conv_out.weight, generator=torch.Generator().manual_seed(3))
        learner.learn([clips(frames=1)])
    expected, found = gradients(plain), gradients(other)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_compute_their_insides_twice(learner_of):
    calls = []
    learner = learner_of(NESTED_MODEL, frames=1, checkpoint_activations=True)
    learner.model.unet.down[0].resnets[0].conv1.register_forward_hook(lambda *a: calls.append(1))
    learner.learn([clips(frames=1)])
    assert len(calls) == 2
