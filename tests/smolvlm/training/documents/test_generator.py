import hashlib
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from smolvlm.training.documents import KINDS, Document, DocumentGenerator, DocumentOptions, font_families
from smolvlm.training.documents.drawing import draw_ink
from smolvlm.training.documents.generator import Draft
from smolvlm.training.documents.options import Split
from smolvlm.training.documents.vocabulary import units

ALL = DocumentOptions(kinds=dict.fromkeys(KINDS, 1.0))


def of_kind(kind: str, split: Split = "train", share: float = 0.3) -> DocumentGenerator:
    return DocumentGenerator(split, 11, DocumentOptions(kinds={kind: 1.0}, degraded_share=share))


def digest(document: Document) -> str:
    content = document.image.tobytes() + document.text.encode() + document.boxes.tobytes() + document.font.encode()
    return hashlib.sha256(content).hexdigest()


def digests(split: Split, seed: int, count: int) -> list[str]:
    generator = DocumentGenerator(split, seed, DocumentOptions(kinds=ALL.kinds, degraded_share=0.5))
    return [digest(generator.document(index)) for index in range(count)]


def test_every_process_draws_the_same_bytes() -> None:
    code = "import runpy, sys; names = runpy.run_path(sys.argv[1]); print(*names['digests']('train', 7, 16), sep='\\n')"
    environment = {"PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == digests("train", 7, 16)


def test_documents_do_not_depend_on_the_order_they_are_asked_for() -> None:
    generator = pickle.loads(pickle.dumps(DocumentGenerator("held_out", 3, ALL)))
    backwards = [digest(generator.document(index)) for index in reversed(range(12))]
    assert backwards[::-1] == [digest(DocumentGenerator("held_out", 3, ALL).document(index)) for index in range(12)]


def test_seed_index_and_split_change_the_document() -> None:
    found = {*digests("train", 7, 5), *digests("train", 8, 5), *digests("held_out", 7, 5)}
    assert len(found) == 15


def test_documents_of_the_splits_share_no_font_and_no_unit() -> None:
    fonts: dict[Split, set[str]] = {"train": set(), "held_out": set()}
    texts: dict[Split, set[str]] = {"train": set(), "held_out": set()}
    for split in fonts:
        for draft in map(DocumentGenerator(split, 0, ALL).draft, range(400)):
            fonts[split].add(draft.font)
            texts[split].update(units(draft.page.text))
        assert fonts[split] <= set(font_families(split))
    assert not fonts["train"] & fonts["held_out"]
    assert not texts["train"] & texts["held_out"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_visible_character_has_a_box_within_the_image(kind: str) -> None:
    for index in range(12):
        document = of_kind(kind).document(index)
        width, height = document.image.size
        visible = np.array([not character.isspace() for character in document.text])
        assert document.kind == kind
        assert document.image.mode == "RGB"
        assert document.boxes.dtype == np.float32
        assert document.boxes.shape == (len(document.text), 4)
        np.testing.assert_array_equal(~np.isnan(document.boxes).any(axis=1), visible)
        boxes = document.boxes[visible]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= [width, height]).all()
        assert 0.5 <= width / height <= 2


def ink_of(draft: Draft) -> np.ndarray:
    ink = draw_ink(draft.page, draft.size, draft.font_size, draft.look)
    return np.asarray(draft.warp.image(ink) if draft.warp else ink).astype(float)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", ["word", "line", "paragraph", "dense"])
def test_boxes_hold_the_ink_and_nothing_is_cut_off(kind: str, split: Split) -> None:
    for index in range(25):
        draft = of_kind(kind, split).draft(index)
        boxes = draft.warp.boxes(draft.page.boxes) if draft.warp else draft.page.boxes
        ink = ink_of(draft)
        outside = ink.copy()
        for letter, (x0, y0, x1, y1) in zip(draft.page.text, boxes, strict=True):
            if letter.isspace():
                continue
            # Two pixels: fonts kern pairs and lift a hyphen beside capitals, which a glyph's own box does not know.
            around = np.s_[max(int(y0) - 2, 0) : int(y1) + 3, max(int(x0) - 2, 0) : int(x1) + 3]
            least = 40 if letter == "\\" else 60  # it may be a hairline
            assert ink[around].max() > least, draft.page.text
            outside[around] = 0
        assert outside.sum() <= 0.01 * ink.sum(), draft.page.text
        assert max(ink[0].max(), ink[-1].max(), ink[:, 0].max(), ink[:, -1].max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_lines_and_words_do_not_reach_into_each_other(kind: str) -> None:
    for index in range(25):
        draft = of_kind(kind, "held_out").draft(index)
        start = 0
        bottoms = [0.0]
        for line in draft.page.text.split("\n"):
            boxes = draft.page.boxes[start : start + len(line)]
            start += len(line) + 1
            words = np.split(boxes, [place for place, letter in enumerate(line) if letter == " "])
            spans = [(np.nanmin(word[:, 0]), np.nanmax(word[:, 2])) for word in words]
            assert all(left[1] < right[0] + 1 for left, right in pairwise(spans)), line
            middle = float(np.nanmean((boxes[:, 1] + boxes[:, 3]) / 2))
            assert middle > bottoms[-1]
            bottoms.append(float(np.nanmedian(boxes[:, 3])))


@pytest.mark.parametrize("kind", ["receipt", "form", "table", "screenshot"])
def test_rules_lie_between_the_rows(kind: str) -> None:
    places = set()
    for draft in map(of_kind(kind).draft, range(60)):
        boxes = draft.page.boxes[~np.isnan(draft.page.boxes[:, 0])]
        for x0, y0, x1, y1 in draft.page.lines:
            if y0 == y1:
                crossed = (boxes[:, 1] + 1 < y0) & (y0 < boxes[:, 3] - 1) & (boxes[:, 0] < x1) & (x0 < boxes[:, 2])
                assert not crossed.any(), draft.page.text
                above = boxes[:, 3] <= y0 + 1
                places.add("above" if not above.any() else "below" if above.all() else "between")
    assert "between" in places


def test_blocks_of_a_receipt_stand_apart_and_titles_may_be_larger() -> None:
    gaps, heights = [], []
    for draft in map(of_kind("receipt").draft, range(60)):
        lines = [run.y for run in draft.page.runs]
        pitches = np.diff(sorted(set(lines)))
        gaps += [pitches.max() / pitches.min()] if len(pitches) > 3 else []
        heights.append(max(run.face.size for run in draft.page.runs) / min(run.face.size for run in draft.page.runs))
    assert min(gaps) < 1.1
    assert max(gaps) > 1.5
    assert min(heights) == 1.0
    assert 1.3 < max(heights) <= 1.55


def test_text_is_read_off_the_boxes_in_order() -> None:
    for index in range(40):
        page = DocumentGenerator("train", 5, ALL).draft(index).page
        for start, line in zip(
            np.cumsum([0, *(len(line) + 1 for line in page.text.split("\n"))]), page.text.split("\n"), strict=False
        ):
            middles = page.boxes[start : start + len(line), [0, 2]].mean(axis=1)
            assert (np.diff(middles[~np.isnan(middles)]) > 0).all(), line


def test_type_has_the_size_asked_for_at_the_reference_edge() -> None:
    options = DocumentOptions(kinds=ALL.kinds, longest_edge=(300, 900), text_px=(16.0, 24.0))
    for draft in map(DocumentGenerator("train", 1, options).draft, range(150)):
        size = draft.font_size * options.reference_edge / max(draft.size)
        assert 16.0 - 0.5 <= size <= 24.0
        assert 300 <= max(draft.size) <= 900


@pytest.mark.parametrize("kind", KINDS)
def test_tight_options_are_kept(kind: str) -> None:
    options = DocumentOptions(
        kinds={kind: 1.0}, longest_edge=(64, 80), text_px=(25.0, 64.0), degraded_share=1.0, max_chars=8, max_lines=2
    )
    for document in map(DocumentGenerator("held_out", 2, options).document, range(20)):
        assert 1 <= len(document.text) <= 8
        assert document.text.count("\n") <= 1


def test_the_asked_share_is_degraded() -> None:
    for share in (0.0, 0.3, 1.0):
        drafts = map(DocumentGenerator("train", 4, DocumentOptions(degraded_share=share)).draft, range(150))
        assert sum(draft.degraded for draft in drafts) / 150 == pytest.approx(share, abs=0.1)


def test_kinds_are_drawn_by_their_weights() -> None:
    options = DocumentOptions(kinds={"word": 3.0, "sign": 1.0, "line": 0.0})
    kinds = [draft.kind for draft in map(DocumentGenerator("train", 4, options).draft, range(400))]
    assert set(kinds) == {"word", "sign"}
    assert kinds.count("word") / 400 == pytest.approx(0.75, abs=0.07)


def test_ordinary_documents_have_contrast_and_faint_ones_less() -> None:
    def contrast(document: Document) -> float:
        grey = np.asarray(document.image.convert("L"), np.float64)
        inside = [grey[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] for x0, y0, x1, y1 in document.boxes if x0 == x0]
        return float(np.median([np.ptp(part) for part in inside]))

    plain = [contrast(document) for document in map(of_kind("line", share=0.0).document, range(40))]
    assert min(plain) > 55
    assert np.median(plain) > 110


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 0), "split is 'test'; it must be one of train, held_out"),
        (("train", -1), "seed is -1; it must be at least 0"),
    ],
)
def test_a_wrong_generator_is_refused(arguments: tuple[Split, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentGenerator(*arguments)


def test_a_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="index is -1; it must be at least 0"):
        DocumentGenerator("train", 0).document(-1)
