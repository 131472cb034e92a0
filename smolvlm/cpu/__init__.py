"""Native attention for CPUs, compiled where it runs."""

from smolvlm.cpu.attention import decode_attention, encoder_attention

__all__ = ["decode_attention", "encoder_attention"]
