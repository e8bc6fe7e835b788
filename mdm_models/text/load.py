"""One function that opens any text encoder."""

import os
from pathlib import Path

import torch

from mdm_models.plain_text import read_lines
from mdm_models.storage import check_local
from mdm_models.text import clip, precomputed, trained
from mdm_models.text.classes import ClassLabels
from mdm_models.text.clip import OpenClipTextEncoder
from mdm_models.text.frozen import loading
from mdm_models.text.huggingface import HuggingFaceTextEncoder
from mdm_models.text.interface import TextEncoder
from mdm_models.text.precomputed import PrecomputedText
from mdm_models.text.trained import TransformerTextEncoder

NUMBERED = "classes:"
KINDS = ("huggingface", "open_clip", "classes", "precomputed", "trained")


def load_text_encoder(
    path_or_name: str | Path,
    *,
    kind: str | None = None,
    max_tokens: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> TextEncoder:
    """Open a text encoder, frozen and in evaluation mode. Nothing that is found in a file is run.

    path_or_name: a directory of Hugging Face transformers (T5, BERT, CLIP, ...: "huggingface") or of open_clip
    ("open_clip"), a text file with the name of a class on each line, or "classes:1000" for a thousand numbers
    ("classes"), or a folder of features that `mdm precompute` wrote ("precomputed"), or the encoder
    that was trained with a pipeline's model ("trained"). None of these touches the network. Anything else is taken for
    the id of a model on the Hugging Face hub, behind "hf-hub:" if it is open_clip's, and is downloaded.
    kind: one of the words in quotes above; by default, found out from what is there.
    max_tokens: longest prompt in tokens, 128 as in the official models; less if the encoder cannot take as many.
    dtype: of weights and features; the official models read float32 features.

    Raises ValueError in one line that names the path and the remedy.
    """
    path = str(path_or_name)
    kind = kind or _kind(path)
    if kind == "huggingface":
        return HuggingFaceTextEncoder.load(path, max_tokens, dtype, device)
    if kind == "open_clip":
        return OpenClipTextEncoder.load(path, max_tokens, dtype, device)
    if kind == "classes" and path.startswith(NUMBERED):
        return ClassLabels(_count(path), dtype=dtype, device=device)
    if kind == "classes":
        with loading(f"classes {path}", "give a text file with the name of a class on each line"):
            return ClassLabels(read_lines(Path(path)), dtype=dtype, device=device)
    if kind == "precomputed":
        return PrecomputedText(path, dtype=dtype, device=device)
    if kind == "trained":
        return TransformerTextEncoder.load(path, dtype, device)
    raise ValueError(f"kind {kind!r} must be one of {', '.join(KINDS)}")


def _count(classes: str) -> int:
    """"classes:1000" → 1000."""
    number = classes.removeprefix(NUMBERED)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"text encoder {classes}: give the number of classes as {NUMBERED}1000")
    return int(number)


def _kind(path: str) -> str:
    if path.startswith(NUMBERED):
        return "classes"
    check_local(path, "text encoder")
    if os.path.isdir(path):
        signs = {
            clip.CONFIG: "open_clip",
            precomputed.UNCONDITIONAL: "precomputed",
            trained.CONFIG: "trained",
            "config.json": "huggingface",
        }
        for file, kind in signs.items():
            if os.path.isfile(os.path.join(path, file)):
                return kind
        raise ValueError(f"text encoder {path}: the directory has none of {', '.join(signs)}; is it the right one?")
    if os.path.isfile(path):
        return "classes"
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"text encoder {path}: there is no such directory or file")
    return "open_clip" if path.startswith("hf-hub:") else "huggingface"
