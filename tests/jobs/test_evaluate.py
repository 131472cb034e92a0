"""`smolvlm evaluate` and `smolvlm documents`: what is written is what was read, figure by figure and byte by byte.

The checkpoint is a tiny random one: it reads nothing right, and everything around it can still be checked exactly.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.command_line import OK, TOO_MANY_ERRORS, WRONG_USE
from jobs.evaluation_page import page, worst
from jobs.evaluation_report import figures, summary_text
from jobs.generated import Drawn, draw
from jobs.readings import Reading
from pipeline.labelled import LabelledImage
from pipeline.storage import Location
from smolvlm import Engine, Processor, SamplingParams
from smolvlm.cpu.linear import has_int8
from smolvlm.image import decode_image
from smolvlm.training.metrics import measure

COUNT, SEED, TOKENS = 10, 11, 12


def smolvlm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluate(checkpoint: Path, output: Path | str, *arguments: object) -> Result:
    options = ("--dtype", "float32", "--max-new-tokens", TOKENS, "--json")
    return smolvlm("evaluate", "--model", checkpoint, "-o", output, *options, *arguments)


def content(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Return the report, the predictions and the page."""
    lines = (folder / "predictions.jsonl").read_text().split("\n")[:-1]  # a text may hold what else ends a line
    predictions = [json.loads(line) for line in lines]
    return json.loads((folder / "evaluation.json").read_text()), predictions, (folder / "evaluation.html").read_text()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "held-out"
    done = smolvlm("documents", "-o", folder, "--count", COUNT, "--seed", SEED)
    assert done.exit_code == OK, done.output
    return folder


@pytest.fixture(scope="module")
def evaluated(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    done = evaluate(tiny_checkpoint, folder, "--documents", COUNT, "--seed", SEED)
    assert done.exit_code == OK, done.output
    assert json.loads(done.stdout) == content(folder)[0]
    return folder


class TestDocuments:
    """The built-in documents as files."""

    def test_files_and_labels_are_the_generator_s(self, documents: Path) -> None:
        rows = [json.loads(line) for line in (documents / "labels.jsonl").read_text().splitlines()]
        expected = list(draw("held_out", SEED, COUNT))
        assert rows == [
            {"uri": each.name, "text": each.text, "kind": each.kind, "degraded": each.degraded} for each in expected
        ]
        assert [(documents / row["uri"]).read_bytes() for row in rows] == [each.data for each in expected]
        assert sorted(path.name for path in documents.iterdir()) == sorted(
            ["labels.jsonl", *(row["uri"] for row in rows)]
        )

    def test_a_second_set_does_not_mix_with_the_first(self, documents: Path) -> None:
        before = {path: path.read_bytes() for path in documents.iterdir()}
        done = smolvlm("documents", "-o", documents, "--count", 2, "--seed", 1)
        assert done.exit_code == WRONG_USE
        assert "labels.jsonl is there already" in done.stderr
        assert {path: path.read_bytes() for path in documents.iterdir()} == before

    def test_an_unknown_split(self, tmp_path: Path) -> None:
        done = smolvlm("documents", "-o", tmp_path, "--split", "test")
        assert done.exit_code == WRONG_USE
        assert "'test' is unknown; it must be one of train, held_out" in done.stderr


class TestReport:
    """`evaluation.json` and `predictions.jsonl`."""

    def test_predictions_are_the_engine_s(self, evaluated: Path, tiny_checkpoint: Path) -> None:
        _, predictions, _ = content(evaluated)
        documents = list(draw("held_out", SEED, COUNT))
        processor, engine = Processor.from_pretrained(tiny_checkpoint), Engine.from_pretrained(tiny_checkpoint)
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe all text."}]}]
        inputs = [processor(asked, [decode_image(each.data).image]) for each in documents]
        answers = engine.generate(inputs, SamplingParams(max_new_tokens=TOKENS))
        assert [each["prediction"] for each in predictions] == [
            processor.decode(answer.token_ids).strip() for answer in answers
        ]
        assert [each["finish_reason"] for each in predictions] == [answer.finish_reason for answer in answers]
        assert [(each["index"], each["name"], each["reference"], each["kind"]) for each in predictions] == [
            (index, each.name, each.text, each.kind) for index, each in enumerate(documents)
        ]

    def test_figures_are_those_of_the_predictions(self, evaluated: Path) -> None:
        report, predictions, _ = content(evaluated)

        def cer(chosen: list[dict[str, Any]]) -> float:
            return measure((each["reference"], each["prediction"]) for each in chosen).cer.value

        assert report["overall"]["all"]["cer"]["value"] == cer(predictions)
        assert report["overall"]["all"]["documents"] == report["documents"] == COUNT
        assert set(report["kinds"]) == {each["kind"] for each in predictions}
        for kind, parts in report["kinds"].items():
            for part, metrics in parts.items():
                wanted = {"all": (True, False), "clean": (False,), "degraded": (True,)}[part]
                chosen = [each for each in predictions if each["kind"] == kind and each["degraded"] in wanted]
                assert (metrics["cer"]["value"], metrics["documents"]) == (cer(chosen), len(chosen))
        split = report["overall"]["clean"]["documents"], report["overall"]["degraded"]["documents"]
        assert split == tuple(sum(each["degraded"] is bad for each in predictions) for bad in (False, True))
        assert sum(report["finish_reasons"].values()) == COUNT
        assert report["output_tokens"] == sum(each["output_tokens"] for each in predictions)
        assert report["images_per_s"] == pytest.approx(COUNT / report["seconds"], rel=0.01)

    def test_it_says_what_read_what(self, evaluated: Path, tiny_checkpoint: Path) -> None:
        report, _, _ = content(evaluated)
        weights = hashlib.sha256((tiny_checkpoint / "model.safetensors").read_bytes()).hexdigest()
        assert report["model"]["files"]["model.safetensors"] == weights
        assert (report["model"]["dtype"], report["model"]["quantization"]) == ("float32", None)
        assert report["source"] | {"sha256": ""} == {"built_in": "held_out", "count": COUNT, "seed": SEED, "sha256": ""}
        assert report["versions"]["rapidfuzz"]

    @pytest.mark.skipif(not has_int8(), reason="no C++ compiler, or no AVX2")
    def test_8_bit_weights_are_measured_as_such(self, tmp_path: Path) -> None:
        options = ("--dtype", "float32", "--quantization", "int8", "--documents", 2, "--max-new-tokens", TOKENS)
        done = smolvlm("evaluate", "-o", tmp_path / "out", *options)
        assert done.exit_code == OK, done.output
        report, _, page = content(tmp_path / "out")
        assert report["model"]["quantization"] == "int8"
        assert "int8 float32 on cpu" in page

    def test_written_files_give_the_same_figures(
        self, evaluated: Path, documents: Path, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        columns = ("--kind-column", "kind", "--degraded-column", "degraded")
        done = evaluate(tiny_checkpoint, tmp_path, "--source", documents / "labels.jsonl", *columns)
        assert done.exit_code == OK, done.output
        (ours, predictions, _), (theirs, expected, _) = content(tmp_path), content(evaluated)
        assert [each["prediction"] for each in predictions] == [each["prediction"] for each in expected]
        for key in ("overall", "kinds", "finish_reasons", "output_tokens", "documents"):
            assert ours[key] == theirs[key]
        assert ours["source"]["sha256"] == theirs["source"]["sha256"]
        assert ours["source"]["uri"] == str(documents / "labels.jsonl")

    def test_from_s3_to_s3_and_only_the_first(
        self, s3: str, documents: Path, evaluated: Path, tiny_checkpoint: Path
    ) -> None:
        for path in documents.iterdir():
            Location(f"s3://test/evaluate/{path.name}", s3).put(path.read_bytes())
        arguments = ("--source", "s3://test/evaluate/labels.jsonl", "--limit", 3, "--endpoint-url", s3)
        done = evaluate(tiny_checkpoint, "s3://test/report", *arguments)
        assert done.exit_code == OK, done.output
        lines = Location("s3://test/report/predictions.jsonl", s3).read().decode().splitlines()
        expected = content(evaluated)[1][:3]
        assert [json.loads(line)["prediction"] for line in lines] == [each["prediction"] for each in expected]
        report = json.loads(Location("s3://test/report/evaluation.json", s3).read())
        assert (report["documents"], report["kinds"], set(report["overall"])) == (3, {}, {"all"})

    def test_the_repetition_stop_is_counted(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        """Without its layers a model's next token follows from the last one alone, so it must go in circles."""
        circling = shutil.copytree(tiny_checkpoint, tmp_path / "model")
        weights = load_file(circling / "model.safetensors")
        silenced = [name for name in weights if re.search(r"text_model.*(o_proj|down_proj)", name)]
        assert silenced
        save_file(weights | {name: np.zeros_like(weights[name]) for name in silenced}, circling / "model.safetensors")
        done = evaluate(circling, tmp_path / "out", "--documents", 3, "--max-new-tokens", 600)
        assert done.exit_code == OK, done.output
        report, predictions, _ = content(tmp_path / "out")
        assert report["finish_reasons"] == {"stop": 0, "length": 0, "repetition": 3}
        assert {each["finish_reason"] for each in predictions} == {"repetition"}
        assert all(each["output_tokens"] < 600 for each in predictions)

    def test_the_table_for_a_terminal(self, evaluated: Path) -> None:
        report, _, _ = content(evaluated)
        lines = summary_text(report).splitlines()
        overall = report["overall"]["all"]
        assert lines[1].split()[:3] == ["overall", str(COUNT), f"{overall['characters']:,}"]
        assert f"{100 * overall['cer']['value']:.1f} ({100 * overall['cer']['low']:.1f}–" in lines[1]
        names = [line.split("  ")[0] for line in lines[1 : lines.index("")]]
        assert [name for name in names if ", " not in name] == ["overall", *report["kinds"]]


class TestBadInput:
    """Errors of a row stay with the row; everything else is one message."""

    def test_unreadable_images_are_named_and_counted_apart(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), "teal").save(buffer, "PNG")
        good = buffer.getvalue()
        images = pa.array([good, b"no image", good[:60], None, good], pa.binary())
        pq.write_table(pa.table({"image": images, "text": ["a", "b", "c", "d", "e"]}), tmp_path / "in.parquet")
        done = evaluate(tiny_checkpoint, tmp_path / "out", "--source", tmp_path / "in.parquet")
        assert done.exit_code == TOO_MANY_ERRORS
        report, predictions, _ = content(tmp_path / "out")
        assert [(error["code"], error["message"].split(" ")[1]) for error in report["errors"]] == [
            ("not_an_image", "1"),
            ("truncated", "2"),
            ("empty", "3"),
        ]
        assert [each["index"] for each in predictions] == [0, 4]
        assert (report["documents"], report["overall"]["all"]["documents"]) == (5, 2)
        assert evaluate(
            tiny_checkpoint, tmp_path / "out", "--source", tmp_path / "in.parquet", "--max-error-share", 0.6
        ).exit_code == (OK)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--kind-column", "kind"], "--kind-column kind belongs to a labelled source"),
            (["--source", "x.jsonl", "--documents", "3"], "--documents 3 draws built-in documents"),
            (["--source", "nothing.jsonl"], "nothing.jsonl"),
            (["--documents", "2", "--dtype", "int8"], "dtype is 'int8'; it must be one of"),
            (["--documents", "2", "--quantization", "int4"], "quantization is 'int4'; it must be 'int8' or 'fp8'"),
            (["--documents", "2", "--model", "no/model"], "does not pin a commit"),
        ],
    )
    def test_one_message(self, arguments: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
        done = evaluate(tiny_checkpoint, tmp_path / "out", *arguments)
        assert done.exit_code == WRONG_USE, done.output
        assert message in done.stderr
        assert not (tmp_path / "out").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        done = evaluate(tiny_checkpoint, tmp_path / "out", "--documents", 1, "--device", "cuda")
        assert done.exit_code == WRONG_USE
        assert "device cuda: PyTorch finds no CUDA device here; use cpu" in done.stderr

    def test_nothing_readable(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "l.jsonl").write_text('{"uri": "a.png", "text": "x"}')
        done = evaluate(tiny_checkpoint, tmp_path / "out", "--source", tmp_path / "l.jsonl")
        assert done.exit_code == WRONG_USE
        assert "none of 1 documents could be read" in done.stderr
        assert f"row 0 ({tmp_path}/a.png)" in done.stderr

    def test_a_missing_extra_is_named(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.startswith(("jobs.eval", "smolvlm.training.metrics"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
        done = evaluate(tiny_checkpoint, tmp_path)
        assert done.exit_code == WRONG_USE
        assert "needs the package rapidfuzz" in done.stderr
        assert "pip install -c constraints.txt -e '.[train]'" in done.stderr


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside the style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def case(index: int, reference: str, prediction: str, **more: Any) -> Reading:
    values = {"name": f"{index}.png", "kind": "", "degraded": None, "finish_reason": "stop", "output_tokens": 3}
    return Reading(index=index, reference=reference, prediction=prediction, mean_logprob=-0.1, **(values | more))


class Pictures:
    """One picture for every index."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1000

    def read(self, indices: Any) -> list[LabelledImage]:
        return [LabelledImage(f"{index}.png", self.data, "x") for index in indices]


def png(width: int, height: int, noise: bool = False) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256 if noise else 1, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class TestPage:
    """`evaluation.html`."""

    def test_it_shows_the_worst_with_their_pictures(self, evaluated: Path) -> None:
        report, predictions, html = content(evaluated)
        found = Elements(html)
        shown = worst([Reading(**each) for each in predictions])
        assert [image["alt"] for image in found.all("img")] == [reading.name for reading in shown]
        pictures = [base64.b64decode(str(image["src"]).partition(",")[2]) for image in found.all("img")]
        originals = Drawn(list(draw("held_out", SEED, COUNT))).read([reading.index for reading in shown])
        for image, data, original in zip(found.all("img"), pictures, originals, strict=True):
            size = decode_image(data).image.size
            assert (str(size[0]), str(size[1])) == (image["width"], image["height"])
            if str(image["src"]).startswith("data:image/png") and max(decode_image(original.data).image.size) <= 560:
                assert decode_image(data).image.tobytes() == decode_image(original.data).image.tobytes()
        for name in ("overall", *report["kinds"]):
            assert name in found.text

    def test_it_loads_nothing_and_holds_under_its_own_policy(self, evaluated: Path) -> None:
        found = Elements(content(evaluated)[2])
        assert {tag for tag, _ in found.elements} & {"script", "link", "iframe", "object", "form", "base"} == set()
        for _, attributes in found.elements:
            assert not attributes.keys() & {"style", "href", "srcset", "onload", "onerror"}
            assert str(attributes.get("src", "data:image/")).startswith("data:image/")
        assert "url(" not in found.style
        assert "@import" not in found.style
        (policy,) = [meta["content"] for meta in found.all("meta") if meta.get("http-equiv")]
        digest = base64.b64encode(hashlib.sha256(found.style.encode()).digest()).decode()
        assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"

    def test_what_documents_say_never_becomes_markup(self, evaluated: Path) -> None:
        report = content(evaluated)[0]
        evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
        cases = [case(0, evil, f"{evil}'\"<b>", name=evil, kind=evil)]
        report["kinds"] = {evil: figures(cases)}
        report["model"]["prompt"] = evil
        found = Elements(page(report, cases, Pictures(png(9, 9))))
        assert {tag for tag, _ in found.elements} & {"script", "b"} == set()
        assert len(found.all("img")) == 1
        assert found.text.count("<script>alert(1)</script>") >= 5

    def test_differences_are_marked(self, evaluated: Path) -> None:
        html = page(
            content(evaluated)[0], [case(0, "Total 4.20\nEUR", "Total 9.2\nEURO", degraded=True)], Pictures(png(9, 9))
        )
        assert "<pre>Total <del>4</del>.2<del>0</del>\nEUR</pre>" in html
        assert "<pre>Total <ins>9</ins>.2\nEUR<ins>O</ins></pre>" in html
        assert "0.png · degraded" in html

    def test_it_stays_small_whatever_is_in_it(self, evaluated: Path) -> None:
        report = content(evaluated)[0]
        noise, words = Pictures(png(600, 580, noise=True)), "ab<c " * 500
        cases = [case(n, words, words[::-1], kind=f"kind {n}") for n in range(90)]
        report["kinds"] = {each.kind: report["overall"] for each in cases}
        html = page(report, worst(cases), noise)
        assert len(html.encode()) < 5_000_000
        found = Elements(html)
        assert len(found.all("img")) == 24
        assert re.search(r"1\d\d more rows are in evaluation\.json", found.text)
        assert f"{len(words.strip()) - 1200:,} more characters" in found.text

    def test_a_perfect_reader_has_no_worst(self, evaluated: Path) -> None:
        cases = [case(0, "a  b\n", "a b")]
        assert worst(cases) == []
        assert "Every document was read without an error" in page(content(evaluated)[0], [], Pictures(b""))

    def test_the_worst_come_from_every_kind(self) -> None:
        cases = [case(n, "abcd" * 5, "x" * n, kind="bad") for n in range(40)]
        cases += [case(100 + n, "abcd" * 5, "abcd" * 5 + "!" * n, kind="good") for n in range(6)]
        chosen = worst(cases)
        assert [reading.index for reading in chosen] == [39, 38, 37, 105, 104, 103]
        assert len(worst([reading for reading in cases if reading.kind == "bad"])) == 24
