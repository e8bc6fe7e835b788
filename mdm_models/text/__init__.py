"""Prompts → features for cross-attention: one interface, `TextEncoder`, over whatever turns text into vectors."""

from mdm_models.text.classes import ClassLabels
from mdm_models.text.clip import OpenClipTextEncoder
from mdm_models.text.frozen import FrozenTextEncoder
from mdm_models.text.huggingface import HuggingFaceTextEncoder
from mdm_models.text.interface import EncoderIdentity, TextEncoder
from mdm_models.text.load import load_text_encoder
from mdm_models.text.precomputed import PrecomputedText
from mdm_models.text.trained import TransformerTextEncoder

__all__ = [
    "ClassLabels",
    "EncoderIdentity",
    "FrozenTextEncoder",
    "HuggingFaceTextEncoder",
    "OpenClipTextEncoder",
    "PrecomputedText",
    "TextEncoder",
    "TransformerTextEncoder",
    "load_text_encoder",
]
