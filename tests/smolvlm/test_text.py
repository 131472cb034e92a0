import math

import torch

from smolvlm.attention import packed_prefill
from smolvlm.config import TextConfig
from smolvlm.text import TextDecoder, rotary_table, rotate

CONFIG = TextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=50,
    rope_theta=1e4,
    max_positions=64,
    rms_norm_eps=1e-5,
)


def test_rotation_turns_each_pair_by_its_own_angle() -> None:
    """Dimension i pairs with i + D/2 and turns by position / theta^(2i/D), as in RoFormer."""
    cos, sin = rotary_table(CONFIG)
    heads = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    position = 13
    turned = rotate(heads, cos[position], sin[position])[0, 0]
    for i in range(4):
        angle = position / CONFIG.rope_theta ** (2 * i / 8)
        a, b = heads[0, 0, i].item(), heads[0, 0, i + 4].item()
        assert math.isclose(turned[i].item(), a * math.cos(angle) - b * math.sin(angle), abs_tol=1e-5)
        assert math.isclose(turned[i + 4].item(), b * math.cos(angle) + a * math.sin(angle), abs_tol=1e-5)


def test_packed_sequences_equal_separate_ones() -> None:
    decoder = TextDecoder(CONFIG)
    embeddings = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    packed = decoder(embeddings, packed_prefill((4, 5), embeddings.device))
    parts = [decoder(part, packed_prefill((len(part),), part.device)) for part in embeddings.split((4, 5))]
    torch.testing.assert_close(packed, torch.cat(parts))


def test_later_tokens_do_not_change_earlier_ones() -> None:
    decoder = TextDecoder(CONFIG)
    embeddings = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    whole = decoder(embeddings, packed_prefill((6,), embeddings.device))
    start = decoder(embeddings[:3], packed_prefill((3,), embeddings.device))
    torch.testing.assert_close(whole[:3], start)


def test_gradients_reach_every_parameter_but_the_embedding() -> None:
    decoder = TextDecoder(CONFIG)
    decoder(torch.randn(5, 32), packed_prefill((5,), torch.device("cpu"))).square().sum().backward()
    without = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert without == ["embedding.weight"]
