"""Prompts → pictures: what a pipeline makes, saves, loads and refuses."""

import copy
import dataclasses
import functools
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mdm_models import UNetConfig, build_model, engine, private_torch
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import ClassLabels, TransformerTextEncoder
from tests.models import recorded_graph

SIZE = 16
INNER = UNetConfig(
    channels=(32,), blocks=(1,), attention=(1,), num_heads=2, mid_blocks=True, embed_dim=32,
    micro=(("scale", 8.0),), context_dim=16,
)  # fmt: skip
IMAGES = UNetConfig(channels=(32, 32), blocks=(1, 1), embed_dim=32, inner=INNER)  # 16² around 8²
CLIPS = UNetConfig(channels=(32, 32), blocks=(1, 1), kind="time", embed_dim=32, inner=INNER)  # two frames around one


def pipeline_of(config: UNetConfig, **settings) -> Pipeline:
    torch.manual_seed(0)
    model, text = build_model(config), TransformerTextEncoder(16, layers=1, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero too
            parameter.normal_(std=0.1)
    return Pipeline(model, text, PipelineConfig(size=SIZE, max_tokens=32, **settings))


@pytest.fixture(scope="module")
def images() -> Pipeline:
    return pipeline_of(IMAGES)


@pytest.fixture(scope="module")
def clips() -> Pipeline:
    return pipeline_of(CLIPS, frame_rate=5.0)


def draw(pipeline: Pipeline, prompt="a penguin", negative_prompt=None, **options):
    settings = {"num_inference_steps": 3, "seed": 1, "output_type": "pt", "progress": False}
    return pipeline(prompt, negative_prompt, **settings | options)


def test_a_prompt_gives_a_picture_of_the_configured_size(images):
    (picture,) = draw(images, output_type="pil")
    assert isinstance(picture, Image.Image)
    assert picture.size == (SIZE, SIZE)


def test_steps_guidance_and_sampler_are_the_pipelines_own_unless_told_otherwise(images, monkeypatch):
    own = {"num_inference_steps": 2, "guidance_scale": 1.5, "sampler": "dpmpp_2m"}
    told = draw(images, **own)
    monkeypatch.setattr(images, "config", dataclasses.replace(images.config, **own))
    torch.testing.assert_close(draw(images, num_inference_steps=None), told, rtol=0, atol=0)
    assert not torch.equal(draw(images, num_inference_steps=None, sampler="ddim"), told)


def test_each_prompt_gives_its_pictures_in_turn(images):
    both = draw(images, ["a penguin", "an apple"], num_images_per_prompt=2)
    assert both.shape == (4, 3, SIZE, SIZE)
    torch.testing.assert_close(both[:2], draw(images, num_images_per_prompt=2), rtol=0, atol=1e-4)


def test_arrays_are_the_pixels_of_the_pictures(images):
    pixels, pictures = draw(images, output_type="np"), draw(images, output_type="pil")
    np.testing.assert_array_equal(pixels[0], np.asarray(pictures[0]))


def test_a_generator_decides_the_picture(images):
    first, second = (draw(images, seed=None, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.allclose(first, draw(images, seed=None, generator=torch.Generator().manual_seed(6)))


def test_the_prompt_and_the_negative_prompt_change_the_picture(images):
    plain = draw(images)
    assert not torch.allclose(plain, draw(images, "an apple"), atol=1e-3)
    assert not torch.allclose(plain, draw(images, negative_prompt="an apple"), atol=1e-3)
    torch.testing.assert_close(plain, draw(images, negative_prompt=[""]), rtol=0, atol=0)


def test_the_guidance_of_the_config_is_the_default(images):
    torch.testing.assert_close(draw(images), draw(images, guidance_scale=images.config.guidance_scale), rtol=0, atol=0)
    assert not torch.allclose(draw(images), draw(images, guidance_scale=1.0), atol=1e-3)


def test_low_memory_gives_the_same_pictures_a_row_at_a_time(images, monkeypatch):
    prompts = ["a penguin", "an apple"]
    expected = draw(images, prompts)
    rows, forward = [], images.model.forward

    def counted(x, *rest):
        rows.append(x[0].shape[0])
        return forward(x, *rest)

    monkeypatch.setattr(images.model, "forward", counted)
    torch.testing.assert_close(draw(images, prompts, low_memory=True), expected, rtol=0, atol=1e-4)
    assert set(rows) == {1}


def test_a_graph_draws_the_same_pictures_and_goes_when_the_pipeline_moves(images, monkeypatch):
    options = [{}, {"prompt": "an apple"}, {"prompt": ["a", "b"], "low_memory": True}]
    expected = [draw(images, **each) for each in options]  # before there are graphs
    graphs, _ = recorded_graph.install(monkeypatch)
    monkeypatch.setattr(engine, "_device_type", lambda model: "cuda")
    pipeline = Pipeline(images.model, images.text_encoder, images.config)
    for each, pictures in zip(options, expected, strict=True):
        torch.testing.assert_close(draw(pipeline, **each), pictures, rtol=0, atol=0)
    assert len(graphs) == 2  # a batch of two, and one row
    pipeline.to("cpu")
    draw(pipeline)
    assert len(graphs) == 3


def test_an_eager_pipeline_captures_nothing(images, monkeypatch):
    graphs, _ = recorded_graph.install(monkeypatch)
    monkeypatch.setattr(engine, "_device_type", lambda model: "cuda")
    draw(Pipeline(images.model, images.text_encoder, images.config, engine="eager"))
    assert not graphs


def test_a_compiled_pipeline_draws_again_and_is_copied_without_its_engine(images, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    pipeline = Pipeline(images.model, images.text_encoder, images.config, engine="compile")
    first, again = draw(pipeline), draw(pipeline)
    assert torch.equal(first, again)
    for copied in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(draw(copied), first)


def test_a_graph_stays_where_it_was_captured_when_its_pipeline_is_copied(images, monkeypatch):
    graphs, _ = recorded_graph.install(monkeypatch)
    monkeypatch.setattr(engine, "_device_type", lambda model: "cuda")
    pipeline = Pipeline(images.model, images.text_encoder, images.config)
    first = draw(pipeline)
    for copied in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(draw(copied), first)
    assert len(graphs) == 3


def test_an_engine_that_there_is_not_is_named(images, tmp_path):
    images.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="engine is 'fast'; it must be one of auto, eager, graph, compile"):
        Pipeline.from_pretrained(tmp_path, engine="fast")


def test_return_levels_gives_every_resolution(images):
    high, low = draw(images, return_levels=True)
    assert (high.shape[2:], low.shape[2:]) == ((16, 16), (8, 8))


def test_callback_sees_every_step(images):
    seen = []
    draw(images, callback=lambda i, t, x_0: seen.append((i, [x.shape[2] for x in x_0])))
    assert seen == [(0, [16, 8]), (1, [16, 8]), (2, [16, 8])]


def test_little_strength_keeps_the_picture(images):
    photo = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((40, 60), np.uint8))).convert("RGB")
    near, far = (draw(images, image=photo, strength=strength, output_type="np") for strength in (0.005, 1.0))
    kept = np.asarray(photo.crop((20, 0, 100, 80)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)).astype(int)
    assert abs(near[0] - kept).mean() < 20 < abs(far[0] - kept).mean()


def test_an_image_may_be_given_for_each_prompt(images):
    pictures = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    both = draw(images, ["a", "b"], image=pictures, strength=0.3)
    torch.testing.assert_close(both[:1], draw(images, "a", image=pictures[:1], strength=0.3), rtol=0, atol=1e-4)


def test_a_video_model_gives_clips(clips):
    (clip,) = draw(clips, output_type="pil")
    assert len(clip.frames) == 2
    assert clip.frame_rate == 5.0
    assert draw(clips, output_type="np").shape == (1, 2, SIZE, SIZE, 3)


def test_a_clip_may_be_longer_than_the_models(clips):
    (clip,) = draw(clips, frames=5, output_type="pil")
    assert len(clip.frames) == 5
    high, low = draw(clips, frames=5, return_levels=True)
    assert high.shape == (1, 3, 5, SIZE, SIZE)
    assert low.shape == (1, 3, 4, SIZE, SIZE)  # a frame for each of the windows at 0, 1, 2 and 3
    assert torch.equal(draw(clips, frames=2), draw(clips))
    both = draw(clips, ["a penguin", "an apple"], frames=5, low_memory=True)
    torch.testing.assert_close(both[:1], high, rtol=0, atol=1e-4)


def test_frames_that_no_window_covers_are_refused(clips, images):
    with pytest.raises(ValueError, match="frames is 1; this model makes clips of 2 frames, or longer ones"):
        draw(clips, frames=1)
    with pytest.raises(ValueError, match="frames is 5; this model makes pictures"):
        draw(images, frames=5)
    with pytest.raises(ValueError, match="image is given; a clip of 5 frames, not 2, begins from noise"):
        draw(clips, frames=5, image=Image.new("RGB", (SIZE, SIZE)))


def test_a_picture_starts_a_clip(clips):
    assert draw(clips, image=Image.new("RGB", (30, 20), "red"), strength=0.5).shape == (1, 3, 2, SIZE, SIZE)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_clip_is_saved_as_an_endless_animation(clips, tmp_path, suffix):
    draw(clips, output_type="pil")[0].save(tmp_path / f"clip.{suffix}")
    with Image.open(tmp_path / f"clip.{suffix}") as saved:
        assert (saved.n_frames, saved.size, saved.info["loop"]) == (2, (SIZE, SIZE), 0)
        saved.seek(1)
        saved.load()
        assert saved.info["duration"] == 200


def test_a_clip_is_saved_as_mp4(clips, tmp_path):
    import av

    draw(clips, output_type="pil")[0].save(tmp_path / "clip.mp4")
    with av.open(tmp_path / "clip.mp4") as saved:
        frames = [frame.to_ndarray(format="rgb24") for frame in saved.decode(video=0)]
        assert [frame.shape for frame in frames] == [(SIZE, SIZE, 3)] * 2
        assert saved.streams.video[0].average_rate == 5


def test_mp4_without_av_says_what_to_do(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        draw(clips, output_type="pil")[0].save(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match=r"clip\.avi.*\.mp4, \.gif, \.webp"):
        draw(clips, output_type="pil")[0].save(tmp_path / "clip.avi")


def test_a_saved_pipeline_samples_the_same(clips, tmp_path):
    clips.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert loaded.config == dataclasses.replace(clips.config, text_encoder="text_encoder")
    torch.testing.assert_close(draw(loaded), draw(clips), rtol=0, atol=0)


def test_an_encoder_that_was_not_trained_along_is_loaded_from_where_it_is(images, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(f"class {i}" for i in range(16)))
    labelled = Pipeline(images.model, ClassLabels(16), PipelineConfig(size=SIZE, text_encoder=str(names)))
    labelled.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(draw(loaded, "class 3"), draw(labelled, "3"), rtol=0, atol=0)


def test_another_encoder_may_be_given(images, tmp_path):
    images.save_pretrained(tmp_path)
    labels = ClassLabels(16)
    assert Pipeline.from_pretrained(tmp_path, text_encoder=labels).text_encoder is labels


def test_a_model_without_text_takes_the_empty_prompt():
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(INNER, context_dim=0, attention=()))
    pipeline = Pipeline(model, None, PipelineConfig(size=SIZE))
    assert draw(pipeline, ["", ""]).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="no text encoder"):
        draw(pipeline, "a penguin")


@pytest.mark.parametrize(
    ("saved", "has_units", "computed"),
    [
        (torch.bfloat16, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, True, torch.float32),
        (torch.float64, False, torch.float64),
    ],
)
def test_a_cpu_computes_in_float32_where_it_has_no_units_for_the_files_dtype(
    tmp_path, monkeypatch, saved, has_units, computed
):
    monkeypatch.setattr(private_torch, "cpu_multiplies_bf16", lambda: has_units)
    pipeline_of(IMAGES).to(dtype=saved).save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {computed}
    assert {tensor.dtype for tensor in Pipeline.from_pretrained(tmp_path, dtype=saved).model.parameters()} == {saved}
    assert draw(loaded).isfinite().all()


def test_bfloat16_stays_near_float32(images, tmp_path):
    images.save_pretrained(tmp_path)
    rounded = Pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.model.conv_in.weight.dtype == torch.bfloat16
    error = (draw(rounded, guidance_scale=1.0) - draw(images, guidance_scale=1.0)).abs().mean()
    assert error < 0.05


def test_an_encoder_of_another_width_is_refused(images):
    with pytest.raises(ValueError, match="text_encoder is 9 wide; the model reads text features 16 wide"):
        Pipeline(images.model, ClassLabels(9), images.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries; there are 1 prompts"),
        ({"image": torch.zeros(1, 3, 8, 8)}, r"image has shape \(1, 3, 8, 8\)"),
        ({"image": torch.zeros(1, 3, SIZE, SIZE), "strength": 0.0}, "strength is 0.0"),
        ({"sampler": "dpmpp"}, "did you mean 'dpmpp_2m'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"micro": {"scael": 8.0}}, "scael"),
        ({"prompt": []}, "prompt is an empty list"),
    ],
)
def test_what_does_not_fit_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        draw(images, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt is None; it must be a string or a list of strings"),
        ({"prompt": ["a", 3]}, r"prompt is \['a', 3\]"),
        ({"prompt": b"a"}, "prompt is b'a'"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"image": "photo.png"}, "image is 'photo.png'; it must be a picture of PIL"),
        ({"image": [np.zeros((SIZE, SIZE, 3))]}, "it must be a picture of PIL"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be an integer"),
        ({"seed": 1.5, "generator": None}, "seed is 1.5; it must be an integer"),
        ({"guidance_scale": "3"}, "guidance_scale is '3'"),
    ],
)
def test_what_is_of_another_type_is_named(images, options, message):
    with pytest.raises(TypeError, match=message):
        draw(images, **options)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:20], "is damaged"),
        (lambda text: "[]", "is not a pipeline's config"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "is not a pipeline's config"),
        (lambda text: json.dumps(json.loads(text) | {"sise": 3}), "no keys but .*: see sise"),
        (lambda text: text.replace('"size"', '"prediction"'), "has no size"),
        (lambda text: json.dumps(json.loads(text) | {"size": "16"}), "size is '16'; it must be of type int"),
        (lambda text: json.dumps(json.loads(text) | {"size": 0}), "size is 0; it must be at least 1"),
        (lambda text: json.dumps(json.loads(text) | {"max_tokens": 0}), "max_tokens is 0; it must be at least 1"),
        (lambda text: json.dumps(json.loads(text) | {"shift_power": math.inf}), "shift_power is inf; it must be"),
        (lambda text: json.dumps(json.loads(text) | {"frame_rate": 0.0}), "frame_rate is 0.0; it must be above 0"),
    ],
)
def test_a_damaged_config_is_named(images, tmp_path, damage, message):
    images.save_pretrained(tmp_path)
    path = tmp_path / "pipeline.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"pipeline\.json.*{message}"):
        Pipeline.from_pretrained(tmp_path)


def test_a_config_from_before_a_key_existed_takes_its_default(images, tmp_path):
    images.save_pretrained(tmp_path)
    path = tmp_path / "pipeline.json"
    values = json.loads(path.read_text())
    del values["unshifted_size"]
    path.write_text(json.dumps(values))
    assert Pipeline.from_pretrained(tmp_path).config == PipelineConfig.load(tmp_path)
    assert PipelineConfig.load(tmp_path).unshifted_size == 0


def test_noise_is_shifted_relative_to_the_size_that_the_config_names(images):
    level = len(images.shapes) - 1
    inner = images.shapes[level][-1]
    other = Pipeline(images.model, images.text_encoder, dataclasses.replace(images.config, unshifted_size=2 * inner))
    own, shifted = (p.diffusion.alpha_bar(500, level).item() for p in (images, other))
    assert shifted / (1 - shifted) == pytest.approx(2 * own / (1 - own), rel=1e-4)  # half the size: less noise


def test_a_folder_without_a_pipeline_says_what_to_do(images, tmp_path):
    images.model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pipeline\.json: no such file; convert"):
        Pipeline.from_pretrained(tmp_path)
