"""Draw in the browser: a prompt, and every resolution of its pictures or clips while they are denoised.

  mdm web
  mdm web mdm_t2i_emoji_64 --port 8000
  mdm web runs/emoji-64 --host 0.0.0.0          for others on the network too

Without a model it takes the first that comes along with the largest pictures. Needs the extra `web`; no network.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mdm_models.commands.line import Dtype, command, device_of, dtype_of
from mdm_models.pipeline import Pipeline, PipelineConfig, model_directory
from mdm_models.shipped import shipped_names, shipped_or


@dataclass(frozen=True)
class Options:
    model: Annotated[Positional[Path | None], arg(metavar="MODEL")] = None
    """a name of `mdm models --pretrained`, a run, or what `mdm convert` or save_pretrained wrote"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0: all of this machine's"""
    port: int | None = None
    """default: a free one from 7860 on"""
    browser: bool = False
    """open the page"""
    text_encoder: str | None = None
    """use this text encoder in place of the one that the model names"""
    device: str = "auto"
    """auto: a GPU if there is one"""
    dtype: Dtype | None = None
    """to compute in; default: bfloat16 on a GPU; on a CPU the file's, or float32 if it has no units for that"""


def web(options: Options) -> None:
    """Serve a model's page until it is stopped. Raises OSError, ValueError or TypeError in one line."""
    from mdm_models.web import build, serve  # needs gradio, seconds to import

    device = device_of(options.device)
    given = options.model or default_model()
    pipeline = Pipeline.from_pretrained(
        model_directory(given), text_encoder=options.text_encoder, dtype=dtype_of(options.dtype, device), device=device
    )
    serve(build(pipeline, given.name), options.host, options.port, browser=options.browser)


def default_model() -> Path:
    """The shipped model of the largest pictures. Raises ValueError if none is shipped."""
    sizes = {name: PipelineConfig.load(shipped_or(name)).size for name in shipped_names()}
    if not sizes:
        raise ValueError("no model comes with this package; name a run or a saved model: mdm web runs/emoji-64")
    return Path(max(sizes, key=lambda name: sizes[name]))


main = command("web", __doc__, Options, web)
