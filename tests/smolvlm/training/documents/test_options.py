from typing import Any

import pytest

from smolvlm.training.documents import KINDS, DocumentOptions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": {"poster": 1.0}}, r"kinds is \['poster'\]; it must be chosen from word, line"),
        ({"kinds": {}}, r"kinds is {}; it must be of finite weights, one of them above 0"),
        ({"kinds": {"word": 0.0}}, "one of them above 0"),
        ({"kinds": {"word": -1.0, "line": 3.0}}, "weights from 0 up"),
        ({"kinds": {"word": float("inf")}}, "of finite weights"),
        ({"longest_edge": (512, 256)}, r"longest_edge is \(512, 256\); it must be \(low, high\)"),
        ({"longest_edge": (32, 64)}, "64 <= low"),
        ({"text_px": (4.0, 20.0)}, r"text_px is \(4.0, 20.0\)"),
        ({"text_px": (30.0, 40.0)}, "low <= 25.6"),
        ({"text_px": (20.0, 12.0)}, "text_px"),
        ({"text_px": (12.0, 65.0)}, "at most a quarter of reference_edge"),
        ({"reference_edge": 32}, "reference_edge is 32; it must be at least 64"),
        ({"degraded_share": 1.5}, "degraded_share is 1.5; it must be a share from 0 to 1"),
        ({"degraded_share": float("nan")}, "degraded_share is nan"),
        ({"max_chars": 3}, "max_chars is 3; it must be at least 4"),
        ({"max_lines": 0}, "max_lines is 0; it must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentOptions(**arguments)


def test_every_kind_but_the_dense_page_is_drawn_by_default() -> None:
    assert set(DocumentOptions().kinds) == set(KINDS) - {"dense"}
