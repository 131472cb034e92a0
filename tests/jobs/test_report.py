"""`report.html`: what it shows, what it hides, what it weighs, and how it looks in a real browser."""

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from chromium import chromium, logged, needs_browser
from finished import SCHEMA, TASKS, begin, commit, finish, row
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from jobs.report import Gallery, gather, write, write_report
from jobs.report_page import page
from jobs.report_plot import throughput, working_time
from jobs.report_sample import groups_of, shares
from pipeline import ranges
from pipeline.commit import Commit
from pipeline.errors import ConfigError
from pipeline.lease import Holder
from pipeline.storage import Location

EVIL = "</pre></article><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'\"\u202e\u0000"
IMAGES = 60
LENGTH, LOOPS, UNSURE, GONE, BROKEN, DENIED = 5, 6, 7, 8, 9, range(10, 20)


def picture(number: int, noise: bool = False) -> bytes:
    """A picture whose shape and colour say which it is."""
    buffer = io.BytesIO()
    if noise:
        pixels = np.random.default_rng(number).integers(0, 256, (300, 300, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.new("RGB", (200 + 10 * number, 400), (4 * number, 80, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def answer(number: int, **changes: Any) -> dict[str, Any]:
    base = {"finish_reason": "stop", "prompt_tokens": 90, "output_tokens": 9, "mean_logprob": -0.3}
    return {**base, "text": f"caption of {number}", **changes}


def rows_of(uris: list[str]) -> list[dict[str, Any]]:
    """Rows of every group; some say what no page should believe."""
    rows = [row(number, uri) for number, uri in enumerate(uris)]
    rows[1]["ocr"] = answer(1, text=EVIL)
    rows[LENGTH]["ocr"] = answer(LENGTH, finish_reason="length")
    rows[LOOPS]["caption"] = answer(LOOPS, finish_reason="repetition", text="a cat a cat a cat")
    rows[UNSURE]["caption"] = answer(UNSURE, mean_logprob=-1.4)
    for number in DENIED:
        rows[number] = row(number, uris[number], "forbidden")
    rows[12]["error"]["message"] = f"{EVIL} https://host/x?X-Amz-Signature=hunter2"
    rows[20] = row(20, uris[20], "decode_failed")
    return rows


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Location:
    folder = tmp_path_factory.mktemp("report")
    (folder / "in").mkdir()
    for number in range(IMAGES):
        if number != GONE:
            content = picture(number) if number != BROKEN else picture(number)[:-40]
            (folder / "in" / f"{number}.png").write_bytes(content)
    destination = Location(str(folder / "out"))
    uris = [str(folder / "in" / f"{number}.png") for number in range(IMAGES)]
    begin(destination, uris, str(folder / "in"))
    rows = rows_of(uris)
    for start in range(0, IMAGES, 10):
        commit(destination, rows[start : start + 10], **{"smolvlm.committed_at": f"{1.7e9 + 60 * start}"})
    finish(destination, IMAGES)
    return destination


@pytest.fixture(scope="module")
def gallery(output: Location) -> Gallery:
    return gather(output.uri, None, 40, 0)


def numbers(gallery: Gallery) -> list[int]:
    return sorted(sample.row["row"] for sample in gallery.samples)


class TestSample:
    """Which rows are shown."""

    def test_every_group_is_counted_and_shown(self, gallery: Gallery) -> None:
        groups = {"ok": 46, "length": 1, "repetition": 1, "unsure": 1, "error.forbidden": 10, "error.decode_failed": 1}
        assert gallery.groups == groups
        shown = Counter(sample.group for sample in gallery.samples)
        assert shown == {**groups, "ok": 26}
        assert len(set(numbers(gallery))) == 40
        assert {5, 6, 7, 20, *DENIED} <= set(numbers(gallery))

    def test_the_seed_decides(self, output: Location, gallery: Gallery) -> None:
        assert numbers(gather(output.uri, None, 40, 0)) == numbers(gallery)
        assert numbers(gather(output.uri, None, 40, 1)) != numbers(gallery)
        assert numbers(gather(output.uri, None, 5000, 0)) == list(range(IMAGES))

    def test_the_worst_answer_names_the_group(self) -> None:
        rows = [row(n, f"u{n}") for n in range(4)]
        rows[1]["ocr"] = answer(1, finish_reason="length", mean_logprob=-3.0)
        rows[2]["caption"] = answer(2, finish_reason="repetition")
        rows[2]["ocr"] = answer(2, finish_reason="length")
        rows[3] = row(3, "u3", "prompt_too_long", caption=answer(3, finish_reason="length"))
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        groups = groups_of(table, [task.name for task in TASKS]).tolist()
        assert groups == ["ok", "length", "repetition", "error.prompt_too_long"]

    @pytest.mark.parametrize(
        ("totals", "samples", "wanted"),
        [
            ({"a": 3, "b": 100, "c": 50}, 60, {"a": 3, "b": 28, "c": 29}),
            ({"a": 3, "b": 4}, 60, {"a": 3, "b": 4}),
            ({"a": 9, "b": 9, "c": 9}, 2, {"a": 1, "b": 1, "c": 0}),
        ],
    )
    def test_shares(self, totals: dict[str, int], samples: int, wanted: dict[str, int]) -> None:
        assert shares(totals, samples) == wanted

    def test_pictures_are_those_of_the_source_in_their_own_shape(self, output: Location) -> None:
        whole = gather(output.uri, None, 5000, 0)
        for sample in whole.samples:
            number = sample.row["row"]
            if number == GONE:
                assert "not_found" in sample.why_blank
            elif number == BROKEN:
                assert "truncated" in sample.why_blank
            elif sample.group.startswith("error"):
                assert (sample.picture, sample.why_blank) == (None, "")
            else:
                assert sample.picture is not None
                width = 200 + 10 * number
                assert sample.picture.size == (
                    round(width * 176 / max(width, 400)),
                    round(400 * 176 / max(width, 400)),
                )
                assert sample.picture.getpixel((5, 5)) == (4 * number, 80, 200)

    def test_nothing_to_show_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no _job\.json"):
            gather(str(tmp_path), None, 10, 0)
        begin(Location(str(tmp_path)), ["u0"])
        with pytest.raises(ConfigError, match="no rows here yet"):
            gather(str(tmp_path), None, 10, 0)


class Elements(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


class TestPage:
    """What stands in the page."""

    def test_it_loads_nothing_and_holds_no_markup_of_others(self, output: Location) -> None:
        html = page(gather(output.uri, None, 5000, 0))
        found = Elements(html)
        tags = {tag for tag, _ in found.elements}
        assert tags & {"script", "link", "iframe", "object", "form", "base", "video", "use", "image"} == set()
        for tag, attributes in found.elements:
            assert not attributes.keys() & {"style", "onload", "onerror", "srcset"}
            assert str(attributes.get("src", "data:image/")).startswith("data:image/")
            assert tag != "a" or re.fullmatch(r"#page-\d+", str(attributes["href"]))
        assert "url(" not in html
        assert found.text.count("<script>alert(1)</script>") == 1  # the answer; the message beside it is hidden
        assert len([tag for tag, _ in found.elements if tag == "img"]) == 47
        policy = next(meta["content"] for tag, meta in found.elements if tag == "meta" and "http-equiv" in meta)
        assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'sha256-")

    def test_what_carries_a_credential_is_not_repeated(self, output: Location) -> None:
        html = page(gather(output.uri, None, 5000, 0))
        assert "hunter2" not in html
        assert "holds a credential" in html

    def test_figures_errors_and_what_is_gone(self, output: Location) -> None:
        text = Elements(page(gather(output.uri, None, 5000, 0))).text
        for part in ("60 of 60: 49 ok, 11 errors", "forbidden1016.67 %", "decode_failed11.67 %", "went in circles"):
            assert part in text
        assert "can no longer be shown: not_found" in text
        assert "13 samples have no picture" in text  # the eleven error rows among them
        assert "logprob -1.40" in text

    def test_it_stays_below_ten_megabytes_whatever_is_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        uris = [str(tmp_path / "in" / f"{'é' * 90}{number}.png") for number in range(1000)]
        noise = [picture(number, noise=True) for number in range(8)]
        for number, uri in enumerate(uris):
            Path(uri).write_bytes(noise[number % 8])
        destination = Location(str(tmp_path / "out"))
        begin(destination, uris, str(tmp_path / "in"))
        long = {"caption": answer(0, text="<&\"'>" * 2000), "ocr": answer(0, text="漢字\n" * 2000)}
        rows = [{**row(n, uri, "prompt_too_long" if n % 2 else None), **long} for n, uri in enumerate(uris)]
        for each in rows[1::2]:
            each["error"] |= {"stage": "generate", "message": "é'" * 500}
        commit(destination, rows)
        place = write_report(destination.uri, samples=1000)
        size = Path(place).stat().st_size
        assert 4_000_000 < size < 10_000_000
        assert Path(place).read_text().count("<article>") == 1000


class TestPlot:
    """Speed over time."""

    def test_pauses_between_runs_are_cut_out(self) -> None:
        times = np.array([110.0, 120.0, 1010.0, 1030.0])
        worked, starts = working_time(times, [100.0, 500.0, 1000.0, 2000.0])
        assert worked.tolist() == [10.0, 20.0, 30.0, 50.0]
        assert starts == [0.0, 20.0]
        assert working_time(times, [])[0].tolist() == [0.0, 10.0, 900.0, 920.0]

    def test_figures_are_those_of_the_commits(self) -> None:
        commits = [Commit(f"{n}", ranges.of_rows(np.arange(30)), 100.0 + 10 * n) for n in range(1, 5)]
        markup = throughput(commits, [Holder("x", "h", "b", 1, 100.0, 140.0)])
        assert "120 rows in 1 runs of 40 s together: 3.00 images/s" in markup
        assert markup.count("<rect") == 4
        assert throughput(commits[:1], []).count("<rect") == 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        driver.set_window_size(1200, 1000)
        yield driver


@needs_browser
def test_in_a_browser(output: Location, browser: webdriver.Chrome, tmp_path: Path) -> None:
    place = write(gather(output.uri, None, 5000, 0))
    browser.get(f"file://{place}")
    sections = browser.find_elements(By.TAG_NAME, "section")
    assert [section.is_displayed() for section in sections] == [True] + [False] * (len(sections) - 1)
    links = browser.find_elements(By.CSS_SELECTOR, "nav a")
    assert [link.get_attribute("hash") for link in links] == [f"#page-{n + 1}" for n in range(len(sections))]
    for index, link in enumerate(links):
        browser.execute_script("arguments[0].click()", link)
        assert [section.is_displayed() for section in sections] == [at == index for at in range(len(sections))]
        widths = [each.size["width"] for each in sections[index].find_elements(By.TAG_NAME, "img")]
        assert all(0 < width <= 176 + 2 for width in widths)
    ratio = browser.execute_script("return document.documentElement.scrollWidth / innerWidth")
    assert ratio <= 1
    assert logged(browser, "browser") == []
    browser.get(f"file://{place}#page-1")
    shot = Image.open(io.BytesIO(base64.b64decode(browser.get_screenshot_as_base64())))
    shot.save(tmp_path / "report.png")
    assert len(shot.convert("RGB").getcolors(1 << 24) or []) > 200  # bars, tables, pictures
