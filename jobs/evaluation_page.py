"""`evaluation.html`: one page without scripts or outside parts, with the table and the worst readings as pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image
from rapidfuzz.distance import Levenshtein

from jobs import html_page
from jobs.evaluation_report import HEADINGS, remarks, table
from jobs.readings import Documents, Reading
from pipeline.errors import RowError
from smolvlm.image import decode_image
from smolvlm.training.metrics import character_error_rate, normalise

_WORST_OF_A_KIND = 3
_MOST_CASES = 24
_MOST_TABLE_ROWS = 100
_PICTURE_EDGE = 560
_PICTURE_BYTES = 110_000  # 24 of them, in base64, leave the page below 4 MB
_SHOWN_CHARACTERS = 1200

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --bad: #b3261e; --good: #1b6e3c; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --good: #7fdca4; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; } thead th { font-weight: 600; } .part th { padding-left: 1.6rem; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 1.2rem 0; padding: 1rem; }
article h3 { font-size: 1rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.case { display: flex; flex-wrap: wrap; gap: 1rem; } .case > * { flex: 1 1 20rem; min-width: 0; }
img { max-width: 100%; height: auto; align-self: flex-start; border: 1px solid var(--line); background: #fff; }
h4 { font-size: .85rem; margin: 0; } code, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--soft); padding: .5rem; margin: .2rem 0 .8rem; }
del { color: var(--bad); text-decoration: line-through; } ins { color: var(--good); text-decoration: underline; }
small, .note { opacity: .75; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def worst(readings: Sequence[Reading]) -> list[Reading]:
    """Return those with the highest character error rates, a few of every kind, the worst first."""
    by_kind: dict[str, list[tuple[float, Reading]]] = {}
    for reading in readings:
        rate = character_error_rate((reading.reference, reading.prediction))
        if rate > 0:
            by_kind.setdefault(reading.kind, []).append((rate, reading))
    kept = _WORST_OF_A_KIND if len(by_kind) > 1 else _MOST_CASES
    chosen = [case for cases in by_kind.values() for case in sorted(cases, key=_by_rate)[:kept]]
    return [reading for _, reading in sorted(chosen, key=_by_rate)[:_MOST_CASES]]


def page(content: Mapping[str, Any], cases: Sequence[Reading], documents: Documents) -> str:
    """Return the page. The pictures of `cases` are read again from `documents`."""
    images = documents.read([case.index for case in cases])
    shown = [_case(case, image) for case, image in zip(cases, images, strict=True)]
    body = (
        "<h1>Evaluation</h1>",
        _facts(content),
        _table(content),
        _paragraphs([*remarks(content), f"Normalisation: {content['normalisation']}."]),
        f"<h2>Worst readings</h2>{''.join(shown) or '<p>Every document was read without an error.</p>'}",
    )
    return html_page.document("Evaluation", _STYLE, "".join(body))


def _by_rate(case: tuple[float, Reading]) -> tuple[float, int]:
    return -case[0], case[1].index


def _facts(content: Mapping[str, Any]) -> str:
    model, files = content["model"], content["model"]["files"]
    weights = ", ".join(f"{name} {digest[:12]}…" for name, digest in files.items() if name.endswith(".safetensors"))
    facts = {
        "model": " ".join(filter(None, (model["model"], model["revision"]))),
        "weights (SHA-256)": weights,
        "computed as": " ".join(filter(None, (model["quantization"], model["dtype"], "on", model["device"]))),
        "prompt": model["prompt"],
        "documents": ", ".join(f"{name} {value}" for name, value in content["source"].items() if value is not None),
        "versions": ", ".join(f"{name} {value}" for name, value in content["versions"].items()),
    }
    return (
        f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>' for name, value in facts.items())}</dl>"
    )


def _table(content: Mapping[str, Any]) -> str:
    rows = list(table(content))
    body = "".join(_row(row) for row in rows[:_MOST_TABLE_ROWS])
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in ("", *HEADINGS))
    left = len(rows) - _MOST_TABLE_ROWS
    more = f"<p>{left:,} more rows are in evaluation.json.</p>" if left > 0 else ""
    note = "In brackets: 95 % bootstrap intervals over documents."
    return (
        f'<h2>Figures</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'{more}<p class="note">{note}</p>'
    )


def _row(row: Sequence[str]) -> str:
    part = ' class="part"' if row[0].endswith((", clean", ", degraded")) else ""
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<tr{part}><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _case(reading: Reading, image: Any) -> str:
    reference, prediction = normalise(reading.reference), normalise(reading.prediction)
    missed, invented = _differences(reference, prediction)
    rate = character_error_rate((reference, prediction))
    title = " · ".join(filter(None, (reading.name, reading.kind, "degraded" if reading.degraded else "")))
    ending = f"{100 * rate:.1f} % CER · {reading.output_tokens} tokens · ended by {reading.finish_reason}"
    return (
        f"<article><h3>{escape(title)} <small>{escape(ending)}</small></h3>"
        f'<div class="case">{_picture(image, reading.name)}<div>'
        f"<h4>In the picture</h4><pre>{_marked(reference, missed, 'del')}</pre>"
        f"<h4>Read</h4><pre>{_marked(prediction, invented, 'ins')}</pre></div></div></article>"
    )


Spans = list[tuple[int, int]]


def _differences(reference: str, prediction: str) -> tuple[Spans, Spans]:
    """Return which parts of the reference are missing from the prediction, and which of the prediction are new."""
    codes = [code for code in Levenshtein.opcodes(reference, prediction) if code.tag != "equal"]
    missed = [(code.src_start, code.src_end) for code in codes if code.src_end > code.src_start]
    return missed, [(code.dest_start, code.dest_end) for code in codes if code.dest_end > code.dest_start]


def _marked(text: str, spans: Spans, tag: str) -> str:
    return "".join(_pieces(text[:_SHOWN_CHARACTERS], spans, tag)) + (
        f"<small> … {len(text) - _SHOWN_CHARACTERS:,} more characters</small>" if len(text) > _SHOWN_CHARACTERS else ""
    )


def _pieces(text: str, spans: Spans, tag: str) -> Iterator[str]:
    end = 0
    for start, stop in spans:
        yield escape(text[end:start])
        if piece := text[start:stop]:
            yield f"<{tag}>{escape(piece)}</{tag}>"
        end = stop
    yield escape(text[end:])


def _picture(image: Any, name: str) -> str:
    if isinstance(image, RowError):  # it was there when it was read
        return f"<p>{escape(image.message)}</p>"
    picture = decode_image(image.data).image
    picture.thumbnail((_PICTURE_EDGE, _PICTURE_EDGE), Image.Resampling.LANCZOS)
    return html_page.picture(picture, name, _PICTURE_BYTES)
