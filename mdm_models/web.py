"""A page in the browser: a prompt, and every resolution level of its pictures or clips while they are denoised.

Nothing is fetched from a network: the page's fonts are the system's, and gradio's analytics are off.
"""

import base64
import html
import io
import os
import queue
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from mdm_models.errors import one_line
from mdm_models.pictures import Clip, save_animation, to_pictures
from mdm_models.pipeline import Pipeline

AS_WRITTEN = "as written"
STYLES = ("3d", "noto", "twemoji", "flat", "gradient", "blob", "firefox", "emojione")
MOST_PICTURES, MOST_STEPS, LARGEST_SEED = 8, 100, 2**32 - 1
COLUMNS = 4  # pictures side by side
AT_ONCE = 2  # users whose pictures are made; the others wait in line, and see their place in it
EXAMPLES = ("red apple", "penguin", "hot air balloon", "grinning face", "tropical fish", "cactus", "fire engine")
CLIP_EXAMPLES = ("grinning face", "butterfly", "rocket", "red heart", "rooster", "fire engine", "tropical fish")

Levels = list[list[Image.Image]] | list[list[Clip]]
"""the pictures or clips of each resolution, highest first"""


@dataclass(frozen=True)
class Shown:
    """How far the pictures are. steps_done of steps; levels: what the model believes them to be by now."""

    steps_done: int
    steps: int
    levels: Levels


class _Left(Exception):
    """Nobody looks at the pictures any more."""


def denoise(
    pipeline: Pipeline, prompt: str, *, count: int, steps: int, guidance_scale: float, seed: int
) -> Iterator[Shown]:
    """Yield the pictures after each step, the last ones as they stay. Ending the iteration ends the sampling after its
    step.

    Raises what the pipeline raises.
    """
    shown: queue.Queue[Shown | Exception] = queue.Queue()
    left = threading.Event()

    def after_step(i: int, _: float, levels: list[Tensor]) -> None:
        if left.is_set():
            raise _Left
        if i + 1 < steps:
            pictures = [to_pictures(level, pipeline.config.frame_rate) for level in levels]
            shown.put(Shown(i + 1, steps, cast(Levels, pictures)))

    def run() -> None:
        try:
            levels = pipeline(
                prompt if pipeline.text_encoder is not None else "",
                num_images_per_prompt=count,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                seed=seed,
                return_levels=True,
                callback=after_step,
                progress=False,
            )
            shown.put(Shown(steps, steps, cast(Levels, levels)))
        except Exception as error:
            shown.put(error)

    threading.Thread(target=run, name="denoise", daemon=True).start()
    try:
        while True:
            now = shown.get()
            if isinstance(now, Exception):
                raise now
            yield now
            if now.steps_done == steps:
                return
    finally:
        left.set()


def page(shown: Shown, prompt: str, seed: int) -> str:
    """Give the pictures as HTML that stands for itself; a click on one saves it."""
    rows = []
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "picture"
    is_done = shown.steps_done == shown.steps
    for level, pictures in enumerate(shown.levels):
        figures = []
        for i, picture in enumerate(pictures):
            file, data = _encoded(picture)
            link = f'href="{data}" download="{name}-{seed}-{i}.{file}" title="Save"' if is_done and level == 0 else ""
            figures.append(f'<a {link}><img alt="{html.escape(prompt)}" src="{data}"></a>')
        size, frames = _size(pictures[0])
        note = f"{size} × {size}" + (f", {frames} frames" if frames > 1 else "")
        columns = f"--columns: {min(len(pictures), COLUMNS) * (1 if level == 0 else 2)}"
        rows.append(f'<div class="level" data-size="{size}" style="{columns}"><h3>{note}</h3>{"".join(figures)}</div>')
    share = 100 * shown.steps_done / shown.steps
    bar = f'<div class="bar"><div style="width:{share:.1f}%"></div></div>'
    state = f"Step {shown.steps_done} of {shown.steps}"
    if is_done:
        every = f'href="{_archive(shown, name, seed)}" download="{name}-{seed}.zip"'
        state = f'Seed {seed}. A click on a picture saves it, <a class="all" {every}>or all of them</a>.'
    return f'<div class="shown {"done" if is_done else "busy"}">{"".join(rows)}{bar}<p class="state">{state}</p></div>'


def _size(picture: Image.Image | Clip) -> tuple[int, int]:
    """Width, and number of frames."""
    return (picture.frames[0].width, len(picture.frames)) if isinstance(picture, Clip) else (picture.width, 1)


def _file(picture: Image.Image | Clip) -> tuple[str, bytes]:
    """Suffix and content: a PNG, or an animated WebP."""
    file = io.BytesIO()
    if isinstance(picture, Clip) and len(picture.frames) > 1:
        save_animation(file, picture.frames, picture.frame_rate, "webp", quality=95)
        return "webp", file.getvalue()
    (picture.frames[0] if isinstance(picture, Clip) else picture).save(file, format="PNG")
    return "png", file.getvalue()


def _encoded(picture: Image.Image | Clip) -> tuple[str, str]:
    suffix, data = _file(picture)
    return suffix, f"data:image/{suffix};base64,{base64.b64encode(data).decode()}"


def _archive(shown: Shown, name: str, seed: int) -> str:
    """All pictures of all resolutions, as a link."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for pictures in shown.levels:
            for i, picture in enumerate(pictures):
                suffix, data = _file(picture)
                archive.writestr(f"{name}-{seed}-{i}-{_size(picture)[0]}.{suffix}", data)
    return f"data:application/zip;base64,{base64.b64encode(file.getvalue()).decode()}"


def checked(prompt: str, style: str, seed: str, takes_text: bool) -> tuple[str, int]:
    """Give the whole prompt, and the seed, drawn if there is none. Raises ValueError that says what to mend."""
    prompt, seed = prompt.strip(), seed.strip()
    if takes_text and not prompt:
        raise ValueError("Write what to draw first, such as “red apple”.")
    if not seed:
        seed = str(np.random.SeedSequence().generate_state(1)[0])
    if not (seed.isascii() and seed.isdecimal() and int(seed) <= LARGEST_SEED):
        raise ValueError(f"The seed is “{seed}”; it must be a whole number from 0 to {LARGEST_SEED}, or empty.")
    return (prompt if style == AS_WRITTEN or not prompt else f"{prompt}, {style} style"), int(seed)


def build(pipeline: Pipeline, name: str, steps: int | None = None) -> gr.Blocks:
    """Build the page for a model; `name` is what it is called there, steps what its slider begins at: the model's own
    if None. Serve it with `serve`."""
    takes_text = pipeline.text_encoder is not None
    is_video = pipeline.model.config.is_video
    draws_emoji = takes_text and "emoji" in name
    has_styles = draws_emoji and not is_video  # the clips are all in one
    sizes = " around ".join(f"{shape[-1]}²" for shape in pipeline.shapes)
    kind = "Clips" if is_video else "Pictures"

    def draw(prompt, style, count, seed, steps, guidance_scale) -> Iterator[Any]:
        try:
            whole, seed = checked(prompt, style, seed, takes_text)
            for shown in denoise(
                pipeline, whole, count=int(count), steps=int(steps), guidance_scale=guidance_scale, seed=seed
            ):
                yield page(shown, whole, seed)
        except (ValueError, TypeError) as error:
            raise gr.Error(one_line(error), title="Not drawn", duration=None, print_exception=False) from None

    with gr.Blocks(title=f"{name} · Matryoshka Diffusion", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<header><h1>{html.escape(name)}</h1><p>{kind} at {sizes}, denoised together</p></header>")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="red apple", autofocus=True, visible=takes_text, elem_id="prompt",
                    max_length=500,
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop", min_width=80, scale=0)
                if draws_emoji:
                    examples = CLIP_EXAMPLES if is_video else EXAMPLES
                    gr.Examples([[example] for example in examples], [prompt], label="Try", elem_id="try")
                style = gr.Radio(
                    [*STYLES, AS_WRITTEN], value=STYLES[0] if has_styles else AS_WRITTEN, label="Style",
                    visible=has_styles, elem_id="style",
                )  # fmt: skip
                count = gr.Slider(1, MOST_PICTURES, 4, step=1, label=kind, elem_id="count", buttons=[])
                step_count = gr.Slider(
                    2, MOST_STEPS, steps or pipeline.config.num_inference_steps, step=1, label="Steps",
                    elem_id="steps", buttons=[],
                )  # fmt: skip
                guidance_scale = gr.Slider(
                    1, 12, pipeline.config.guidance_scale, step=0.5, label="Guidance", visible=takes_text, buttons=[],
                    elem_id="guidance",
                )  # fmt: skip
                seed = gr.Textbox(label="Seed", placeholder="a new one each time", elem_id="seed", max_length=20)
            with gr.Column(scale=2, min_width=320):
                out = gr.HTML(INVITATION, elem_id="out")
        events = [go.click, prompt.submit]
        inputs = [prompt, style, count, seed, step_count, guidance_scale]
        drawing = [
            event(draw, inputs, out, concurrency_limit=AT_ONCE, concurrency_id="draw", show_progress="hidden")
            for event in events
        ]
        stop.click(None, cancels=cast(Any, drawing))  # its type asks for dicts
    return blocks


def serve(blocks: gr.Blocks, host: str, port: int | None, *, wait: bool = True, browser: bool = False) -> str:
    """Serve the page, until Ctrl-C if `wait`; → its address. port: None for a free one from 7860 on.

    Raises OSError if the port is taken, or the host is none of this machine; ValueError for a port that there is not.
    """
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"port is {port}; it must be in 1…65535")
    try:
        family, *_, where = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(where[:2], family=family).close()
    except OSError as error:  # which would have gradio try a hundred ports
        raise OSError(f"nothing can be served at {host}, port {port or 'any'}: {one_line(error)}") from None
    blocks.queue(max_size=64)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        inbrowser=browser,
        quiet=True,
        theme=gr.themes.Base(
            primary_hue="orange", neutral_hue="stone", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        run_history=False,
    )
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if wait:
        blocks.block_thread()
    return address


INVITATION = (
    """<div class="shown empty"><p>Every resolution of a picture appears here while it is denoised.</p></div>"""
)
CSS = """
footer { display: none !important }
header h1 { font-size: 1.4rem; margin: 0 } header p { margin: 0; opacity: .65 }
.gradio-container { padding-top: 10px !important }
#style label { padding: 3px 10px; border-radius: 99px; cursor: pointer } #style input { display: none }
#style label.selected { background: var(--primary-600); color: white }
#try table, #try .gallery { gap: 4px } #try .label { display: none }
.shown { min-height: 26rem; padding: 1rem; border-radius: 12px; background: var(--background-fill-secondary) }
.shown.empty { display: grid; place-items: center; opacity: .65 }
.level { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 10px; margin-bottom: 1rem }
.level h3 { grid-column: 1 / -1; margin: 0; font-size: .85rem; font-weight: 600; opacity: .65 }
.level img { width: 100%; max-width: 20rem; image-rendering: pixelated; border-radius: 8px; margin: 0 }
.level a { display: block } .level a[href]:hover img { outline: 3px solid var(--primary-500) }
.bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden }
.bar div { height: 100%; background: var(--primary-500); transition: width .2s }
.state { margin: .5rem 0 0; font-size: .9rem; font-variant-numeric: tabular-nums }
.state a { text-decoration: underline; margin: 0; padding: 0 }
"""
