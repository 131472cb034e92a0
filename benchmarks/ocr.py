"""The engine beside Tesseract 5: the same held-out documents, written as PNG once and read by both, in one run.

    apt-get install tesseract-ocr
    python benchmarks/ocr.py --model bundled --documents 500

Tesseract gets every help that its documentation names, and gets it per kind of document: page segmentation, enlarging
and thresholding are those with which it reads documents of the *training* split best (`--tune` of each kind). Its
typographic quotes, dashes and ligatures, which no document holds, count as the plain characters, for both sides. One
process of it reads all documents of a kind, so that loading its model costs next to nothing. The table and, as the last
line, one JSON object hold the error rates of both per kind, of clean and of degraded documents, and seconds per image.

Sources: tesseract-ocr.github.io/tessdoc/ImproveQuality.html; `tesseract --help-psm`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.generated import COLUMNS, LABELS, draw, write_documents
from jobs.readings import Settings, read_documents
from pipeline.job import Source
from pipeline.labelled import LabelledSource
from pipeline.storage import Location
from smolvlm.training.documents import DocumentOptions
from smolvlm.training.documents.options import EVERYDAY
from smolvlm.training.metrics import Metrics, measure

PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "‚": ",", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "ﬁ": "fi", "ﬂ": "fl"}
)
TUNING_SEED = 1
PARTS = ("all", "clean", "degraded")


@dataclass(frozen=True)
class TesseractSettings:
    """psm: page segmentation mode. scale: how much the picture is enlarged. thresholding: 0 Otsu, 2 Sauvola."""

    psm: int = 6
    scale: int = 2
    thresholding: int = 0


CHOICES: dict[str, tuple[int, ...]] = {
    "psm": (6, 3, 4, 7, 8, 11),
    "scale": (2, 1, 3, 4),
    "thresholding": (0, 2),
}


@dataclass(frozen=True)
class Document:
    """A file, what stands in it, and what a reader made of it."""

    file: Path
    kind: str
    degraded: bool
    reference: str
    prediction: str = ""


@dataclass(frozen=True)
class Side:
    """A reader's readings of all documents, in their order, and the seconds they took."""

    documents: list[Document]
    seconds: float


def written(folder: Path, split: str, seed: int, count: int, kinds: Iterable[str]) -> list[Document]:
    """Write documents as files and return them, unread."""
    options = DocumentOptions(kinds=dict.fromkeys(kinds, 1.0))
    write_documents(draw(split, seed, count, options), Location(str(folder)))
    rows = [json.loads(line) for line in (folder / LABELS).read_text().split("\n")[:-1]]
    return [Document(folder / row["uri"], row["kind"], row["degraded"], row["text"]) for row in rows]


def ours(documents: Sequence[Document], settings: Settings) -> Side:
    """Read the files with the engine: from PNG to text."""
    source = LabelledSource(Source(str(documents[0].file.parent / LABELS)), COLUMNS)
    evaluation = read_documents(source, len(documents), settings, lambda done, errors: None)
    assert not evaluation.errors, evaluation.errors
    texts = [reading.prediction.translate(PLAIN) for reading in evaluation.readings]
    return Side([replace(d, prediction=text) for d, text in zip(documents, texts, strict=True)], evaluation.seconds)


def tesseract(documents: Sequence[Document], settings: TesseractSettings) -> Side:
    """Read the files with one process of Tesseract; enlarging them is not in the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        files = [_enlarged(document.file, settings.scale, Path(folder)) for document in documents]
        flags = f"-l eng --dpi 300 --psm {settings.psm} -c thresholding_method={settings.thresholding}".split()
        start = time.perf_counter()
        pages = _pages(files, flags, Path(folder) / "files.txt")
        seconds = time.perf_counter() - start
    read = zip(documents, pages, strict=True)
    return Side([replace(document, prediction=page.translate(PLAIN)) for document, page in read], seconds)


def _pages(files: Sequence[Path], flags: Sequence[str], listed: Path) -> list[str]:
    """The text of every file, from one process; from one for each half where it passed over an empty picture."""
    listed.write_text("".join(f"{file}\n" for file in files))
    done = subprocess.run(["tesseract", str(listed), "-", *flags], capture_output=True, check=True)
    pages = done.stdout.decode().removesuffix("\f").split("\f")
    if len(pages) == len(files):
        return pages
    if len(files) == 1:
        return ["\n".join(pages)]
    half = len(files) // 2
    return [*_pages(files[:half], flags, listed), *_pages(files[half:], flags, listed)]


def _enlarged(file: Path, scale: int, folder: Path) -> Path:
    if scale == 1:
        return file
    with Image.open(file) as image:
        larger = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    larger.save(folder / file.name, compress_level=1)
    return folder / file.name


def tuned(documents: Sequence[Document]) -> TesseractSettings:
    """Return the settings that read `documents` best, found one setting after the other."""

    @cache
    def error(settings: TesseractSettings) -> float:
        return figures(tesseract(documents, settings).documents).cer.value

    best = TesseractSettings()
    for name, values in CHOICES.items():
        best = min((replace(best, **{name: value}) for value in values), key=error)
    return best


def tesseract_at_its_best(documents: Sequence[Document], settings: dict[str, TesseractSettings]) -> Side:
    """Read every kind with the settings found for it; the documents come back in their order."""
    sides = [tesseract([each for each in documents if each.kind == kind], best) for kind, best in settings.items()]
    by_file = {document.file: document for side in sides for document in side.documents}
    return Side([by_file[document.file] for document in documents], sum(side.seconds for side in sides))


def figures(documents: Iterable[Document]) -> Metrics:
    return measure((document.reference, document.prediction) for document in documents)


def compared(ours: Side, peer: Side) -> dict[str, dict[str, dict[str, Any]]]:
    """Return kind → part → figures of both; parts without documents are left out."""
    kinds = sorted({document.kind for document in ours.documents})
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in ("overall", *kinds):
        for part in PARTS:
            chosen = [i for i, each in enumerate(ours.documents) if _is_in(each, kind, part)]
            if chosen:
                both = {"ours": ours, "tesseract": peer}
                values = {name: asdict(figures(side.documents[i] for i in chosen)) for name, side in both.items()}
                table.setdefault(kind, {})[part] = values
    return table


def _is_in(document: Document, kind: str, part: str) -> bool:
    return kind in ("overall", document.kind) and (part == "all" or document.degraded == (part == "degraded"))


def show(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print the table: of each pair of columns, ours and then Tesseract's."""
    headings = f"{'documents':>12}{'CER % ours':>22}{'Tesseract':>22}"
    print(f"{'':14}{headings}{'WER % ours':>12}{'Tesseract':>10}{'exact % ours':>14}{'Tesseract':>10}")
    for kind, parts in table.items():
        for part, both in parts.items():
            sides = both["ours"], both["tesseract"]
            cer = "".join(f"{_interval(side['cer']):>22}" for side in sides)
            wer, exact = ([100 * side[name]["value"] for side in sides] for name in ("wer", "exact"))
            others = f"{wer[0]:12.1f}{wer[1]:10.1f}{exact[0]:14.1f}{exact[1]:10.1f}"
            print(f"{kind if part == 'all' else f'  {part}':14}{sides[0]['documents']:12}{cer}{others}")


def _interval(rate: dict[str, float]) -> str:
    return f"{100 * rate['value']:.1f} ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})"


def tesseract_version() -> str:
    """Return the first line of `tesseract --version`; end the program where there is none."""
    if shutil.which("tesseract") is None:
        sys.exit("tesseract is not installed: apt-get install tesseract-ocr (Debian, Ubuntu), or put it on PATH")
    return subprocess.run(["tesseract", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="checkpoint directory or `bundled`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", default=list(EVERYDAY))
    parser.add_argument("--tune", type=int, default=12, help="training documents of each kind to tune Tesseract on")
    parser.add_argument("--smoke", action="store_true", help="a tiny random checkpoint and a few documents")
    return parser.parse_args()


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    kinds = [(kind, written(folder / kind, "train", TUNING_SEED, options.tune, [kind])) for kind in options.kinds]
    settings = {kind: tuned(documents) for kind, documents in kinds}
    documents = written(folder / "held_out", "held_out", options.seed, options.documents, options.kinds)
    settings = {kind: best for kind, best in settings.items() if any(each.kind == kind for each in documents)}
    reader = Settings(options.model, dtype=options.dtype, device=options.device)
    read, peer = ours(documents, reader), tesseract_at_its_best(documents, settings)
    table = compared(read, peer)
    show(table)
    overall = {name: table["overall"]["all"][name]["cer"]["value"] for name in ("ours", "tesseract")}
    return {
        "ours": overall["ours"],
        "peer": overall["tesseract"],
        "ratio": overall["ours"] / overall["tesseract"],
        "unit": "character error rate",
        "seconds_per_image": {"ours": read.seconds / len(documents), "tesseract": peer.seconds / len(documents)},
        "settings": {kind: asdict(best) for kind, best in settings.items()},
        "kinds": table,
    }


def main() -> None:
    options, peer_version = parse(), tesseract_version()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.smoke:
            from smolvlm.scratch import create_checkpoint

            options.model, options.dtype = str(create_checkpoint(folder / "tiny", "tiny")), "float32"
            options.documents, options.tune, options.kinds = 6, 1, ["word", "line"]
        result = compare(folder, options)
    versions = {"tesseract": peer_version, **{name: version(name) for name in ("torch", "pillow", "rapidfuzz")}}
    machine = {"architecture": platform.machine(), "cpus": os.cpu_count(), "device": options.device}
    print(
        json.dumps({**result, "model": options.model, "seed": options.seed, "machine": machine, "versions": versions})
    )


if __name__ == "__main__":
    main()
