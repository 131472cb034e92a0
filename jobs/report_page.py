"""`report.html`: figures, errors and samples on one page without scripts. Whatever a model or a file says is escaped.

The page turns by itself: of the sections that hold samples only the one named in the address is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from jobs import html_page
from jobs.explain import holds_secret
from jobs.report import Gallery, Sample
from jobs.report_plot import throughput
from jobs.report_sample import LOW_LOGPROB, group_label
from pipeline.job import Model

_PER_PAGE = 24
_PICTURE_BYTES = 4_500
_TEXT_BYTES = 2_400  # of all texts of a sample as they stand in the page: with the picture 10 kB at most
_NAME_CHARS = 160
_EXAMPLES = 3
_NOT_SHOWN = "(not shown: it holds a credential)"

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --bad: #b3261e; --accent: #2456b8; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --accent: #9dbcff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; } dt, small, .note { opacity: .75; } a { color: var(--accent); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } td.number { text-align: right; white-space: nowrap; } td div { margin-bottom: .3rem; }
svg { width: 100%; height: auto; } svg rect { fill: var(--accent); } svg line { stroke: currentColor; opacity: .4; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; } svg line.run { stroke-dasharray: 4 3; }
nav ul { padding: 0; margin: .3rem 0; list-style: none; } nav li { margin: .1rem 0; } nav a { padding: 0 .25rem; }
section { display: none; } section:target { display: block; }
body:not(:has(section:target)) section:first-of-type { display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
article h3 { font-size: .85rem; font-weight: 500; margin: 0 0 .5rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
.blank { background: var(--soft); padding: .6rem; overflow-wrap: anywhere; font-size: .85rem; margin: 0; }
h4 { font-size: .85rem; margin: .6rem 0 .1rem; } .flag { color: var(--bad); font-weight: 600; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre { background: var(--soft); padding: .5rem; margin: 0; max-height: 18rem; overflow-y: auto; }
"""


def page(gallery: Gallery) -> str:
    """Return the page: 10 MB at most for 1,000 samples, whatever is in them."""
    sections = list(_sections(gallery.samples))
    body = (
        f"<h1>{escape(gallery.job.name)}</h1>",
        _facts(gallery),
        "<h2>Speed</h2>",
        throughput(gallery.commits, gallery.runs),
        _errors(gallery),
        _contents(gallery, sections),
        *(_section(index, group, samples) for index, (group, samples) in enumerate(sections)),
    )
    return html_page.document(f"{gallery.job.name}: report", _STYLE, "".join(body))


def _sections(samples: Sequence[Sample]) -> Iterator[tuple[str, Sequence[Sample]]]:
    """Cut the samples into pages, each of one group."""
    for group, members in groupby(samples, key=lambda sample: sample.group):
        of_group = list(members)
        for start in range(0, len(of_group), _PER_PAGE):
            yield group, of_group[start : start + _PER_PAGE]


def _facts(gallery: Gallery) -> str:
    job, errors = gallery.job, sum(gallery.errors.values())
    facts = {
        "rows": f"{gallery.rows:,} of {gallery.inputs:,}: {gallery.rows - errors:,} ok, {errors:,} errors",
        "source": job.source.uri,
        "output": gallery.location.uri,
        "model": _model(job.model),
        **{f"task {task.name}": f"{task.prompt} (max_new_tokens {task.max_new_tokens})" for task in job.tasks},
    }
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{_safe(text, 600)}</dd>' for name, text in facts.items())}</dl>"


def _model(model: Model) -> str:
    cache = "" if model.kv_cache_dtype == "auto" else f"kv_cache_dtype {model.kv_cache_dtype}"
    return " ".join(filter(None, (model.id, model.revision, model.dtype, model.quantization, cache)))


def _errors(gallery: Gallery) -> str:
    if not gallery.errors:
        return "<h2>Errors</h2><p>None.</p>"
    rows = "".join(_error_row(gallery, code, count) for code, count in gallery.errors.items())
    head = "<tr><th>code</th><th>rows</th><th>share</th><th>examples</th></tr>"
    return f'<h2>Errors</h2><div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _error_row(gallery: Gallery, code: str, count: int) -> str:
    of_code = [sample for sample in gallery.samples if sample.group == f"error.{code}"]
    examples = "".join(_example(sample.row) for sample in of_code[:_EXAMPLES])
    figures = f'<td class="number">{count:,}</td><td class="number">{100 * count / gallery.rows:.2f} %</td>'
    return f"<tr><td>{escape(code)}</td>{figures}<td>{examples}</td></tr>"


def _example(row: Mapping[str, Any]) -> str:
    return f"<div>{_safe(_name(row), _NAME_CHARS)}<br><small>{_safe(row['error']['message'], 300)}</small></div>"


def _contents(gallery: Gallery, sections: Sequence[tuple[str, Sequence[Sample]]]) -> str:
    lines = []
    for group, members in groupby(enumerate(sections), key=lambda item: item[1][0]):
        pages = list(members)
        shown = sum(len(samples) for _, (_, samples) in pages)
        links = "".join(f'<a href="#page-{index + 1}">{index + 1}</a>' for index, _ in pages)
        of_all = f"{shown:,} of {gallery.groups[group]:,} rows"
        lines.append(f"<li>{escape(group_label(group))} <small>({of_all})</small>: {links}</li>")
    note = (
        "Rows were drawn at random within each group, so that what is rare is seen: groups are not in proportion. "
        f"Below mean_logprob {LOW_LOGPROB:g} the model was on average less than 37 % sure of a token."
    )
    blank = f" {gallery.num_blank:,} samples have no picture; each says why." if gallery.num_blank else ""
    return f'<h2>Samples</h2><nav><ul>{"".join(lines)}</ul></nav><p class="note">{note}{blank}</p>'


def _section(index: int, group: str, samples: Sequence[Sample]) -> str:
    articles = "".join(map(_article, samples))
    return (
        f'<section id="page-{index + 1}"><h2>Page {index + 1}: {escape(group_label(group))}</h2>'
        f'<div class="grid">{articles}</div></section>'
    )


def _article(sample: Sample) -> str:
    row = sample.row
    size = f" · {row['width']} × {row['height']} · {row['num_tiles']} tiles" if row["num_tiles"] else ""
    return (
        f"<article><h3>{_safe(_name(row), _NAME_CHARS)}<small>{escape(size)}</small></h3>"
        f"{_picture(sample)}{_outcome(row)}</article>"
    )


def _picture(sample: Sample) -> str:
    if sample.picture is not None:
        return html_page.picture(sample.picture, _shown(_name(sample.row), _NAME_CHARS), _PICTURE_BYTES)
    if sample.why_blank:
        return f'<p class="blank">The picture can no longer be shown: {_safe(sample.why_blank, 300)}</p>'
    return ""


def _outcome(row: Mapping[str, Any]) -> str:
    """The error, if any, and each task's answer with what is remarkable about it."""
    answers = {name: value for name, value in row.items() if isinstance(value, dict) and "finish_reason" in value}
    parts = []
    if row["error"] is not None:
        error = row["error"]
        where = f"{error['code']} ({error['stage']}, {error['attempts']} attempts)"
        parts.append(f'<h4 class="flag">{escape(where)}</h4><pre dir="auto">{_safe(error["message"], 400)}</pre>')
    for name, answer in answers.items():
        text = _cut(answer["text"] or "", _TEXT_BYTES // len(answers))
        parts.append(f'<h4>{escape(name)} {_flags(answer)}</h4><pre dir="auto">{text}</pre>')
    return "".join(parts)


def _flags(answer: Mapping[str, Any]) -> str:
    reason, logprob = answer["finish_reason"], answer["mean_logprob"]
    remarks = [] if reason == "stop" else [f'<span class="flag">{escape(str(reason))}</span>']
    if logprob is not None:
        is_low = logprob < LOW_LOGPROB
        remarks.append(f"<small{' class=flag' if is_low else ''}>logprob {logprob:.2f}</small>")
    return " ".join([*remarks, f"<small>{answer['output_tokens']} tokens</small>"])


def _name(row: Mapping[str, Any]) -> str:
    return " / ".join(filter(None, (row["uri"], row["member"])))


def _shown(text: str, max_chars: int) -> str:
    """The text without credentials and no longer than that."""
    if holds_secret(text):
        return _NOT_SHOWN
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def _safe(text: str, max_chars: int) -> str:
    return escape(_shown(text, max_chars))


def _cut(text: str, max_bytes: int) -> str:
    """Escape as much of the text as stays within `max_bytes`, and say how much more there is."""
    size = 0
    for index, character in enumerate(text):
        size += len(escape(character).encode())
        if size > max_bytes:
            return f"{escape(text[:index])}<small> … {len(text) - index:,} more characters</small>"
    return escape(text)
