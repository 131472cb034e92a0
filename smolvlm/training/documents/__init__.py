"""Synthetic text documents: picture, text and every character's place follow from a seed and an index."""

from smolvlm.training.documents.fonts import font_families
from smolvlm.training.documents.generator import Document, DocumentGenerator
from smolvlm.training.documents.options import KINDS, DocumentOptions, Split

__all__ = ["KINDS", "Document", "DocumentGenerator", "DocumentOptions", "Split", "font_families"]
