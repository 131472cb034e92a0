"""Storage on a local disk, in memory and on a real S3 server, healthy and flaky."""

import itertools
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flaky_proxy import flaky_proxy

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.storage import Location, read_failure, with_retries

_names = itertools.count()


@pytest.fixture(params=["file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty prefix of each kind of store."""
    name = f"storage-{next(_names)}"
    if request.param == "file":
        return Location(str(tmp_path / name))
    if request.param == "memory":
        return Location(f"memory://{name}")
    return Location(f"s3://test/{name}", request.getfixturevalue("s3"))


def put_all(place: Location, names: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: place.child(name).put(name.encode()), names))


def test_put_read_replace_delete(place: Location) -> None:
    location = place.child("a/b.bin")
    assert location.info() is None
    location.put(b"0123456789")
    assert (location.read(), location.read(2, 5), location.read(5, 100)) == (b"0123456789", b"234", b"56789")
    before = location.info()
    assert before is not None
    assert (before.uri, before.size) == (location.uri, 10)
    location.put(b"other content")
    after = location.info()
    assert after is not None
    assert after.etag != before.etag
    location.delete()
    location.delete()
    assert location.info() is None
    with pytest.raises(FileNotFoundError):
        location.read()


def test_a_range_of_an_empty_object_is_empty(place: Location) -> None:
    place.child("empty").put(b"")
    assert place.child("empty").read() == b""
    assert place.child("empty").read(0, 100) == b""


def test_list_is_complete_with_sizes_and_readable_uris(place: Location) -> None:
    names = ["a.jpg", "b/c.jpg", "b/d/e f.jpg", "b/ü+%41.jpg", "z.jpg"]
    put_all(place, names)
    found = {info.uri: info for info in place.list()}
    assert {uri.rpartition(f"{place.uri.rpartition('/')[2]}/")[2] for uri in found} == set(names)
    for uri, info in found.items():
        assert place.at(uri).read() == uri.rpartition(f"{place.uri.rpartition('/')[2]}/")[2].encode()
        assert info.size == len(place.at(uri).read())
        assert info.etag


def test_list_of_one_object_and_of_nothing(place: Location) -> None:
    put_all(place, ["a.jpg", "a.jpg.bak", "ab/c.jpg"])
    assert [Path(info.uri).name for info in place.child("a.jpg").list()] == ["a.jpg"]
    assert [Path(info.uri).name for info in place.child("ab").list()] == ["c.jpg"]
    assert list(place.child("a").list()) == []  # a prefix ends at a path border


def test_put_if_absent_writes_once_and_keeps_the_first(place: Location) -> None:
    location = place.child("claim.json")
    assert location.put_if_absent(b"first")
    assert not location.put_if_absent(b"second")
    assert location.read() == b"first"
    assert [info.size for info in place.list()] == [5]  # no temporary file is left


@pytest.mark.parametrize("store", ["file", "s3"])
def test_of_twenty_racing_writers_exactly_one_wins(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    uri = str(tmp_path) if store == "file" else f"s3://test/race-{next(_names)}"
    endpoint = None if store == "file" else request.getfixturevalue("s3")
    for round_ in range(2):
        location = Location(f"{uri}/{round_}", endpoint)
        with ThreadPoolExecutor(20) as pool:
            won = list(pool.map(lambda i, at=location: at.put_if_absent(b"%d" % i * 1000), range(20)))
        assert sum(won) == 1
        assert location.read() == b"%d" % won.index(True) * 1000


def test_s3_listing_streams_page_by_page(s3: str) -> None:
    place = Location("s3://test/many", s3)
    names = [f"{i:04d}.jpg" for i in range(1203)]
    put_all(place, names)
    calls: list[str] = []
    original = place.fs.call_s3

    def counted(method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return original(method, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.fs, "call_s3", counted)
        listing = place.list()
        first = next(listing)
        assert calls.count("list_objects_v2") == 1  # the second page is not fetched before it is wanted
        rest = [info.uri for info in listing]
    assert calls.count("list_objects_v2") == 2
    assert [first.uri, *rest] == [f"s3://test/many/{name}" for name in names]


def test_a_location_pickles_as_its_two_strings(s3: str) -> None:
    location = Location("s3://test/x", s3)
    _ = location.fs
    assert pickle.loads(pickle.dumps(location)) == location
    assert len(pickle.dumps(location)) < 300


def test_an_unknown_store_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nosuch://"):
        _ = Location("nosuch://bucket/x").fs


def test_forbidden_objects_are_refused_without_a_retry(s3: str, forbidden: Location) -> None:
    assert Location("s3://test/open.jpg", s3).put_if_absent(b"x")
    with pytest.raises(PermissionError) as caught:
        forbidden.read()
    error = read_failure(caught.value, forbidden.uri).error
    assert (error.code, error.stage, error.attempts) == ("forbidden", "read", 1)
    assert forbidden.uri in error.message


@pytest.fixture
def forbidden(s3: str) -> Iterator[Location]:
    """An object that a bucket policy denies to everyone."""
    location = Location("s3://test/forbidden/secret.jpg", s3)
    location.put(b"secret")
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": ["s3:GetObject"],
        "Resource": ["arn:aws:s3:::test/forbidden/*"],
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    location.fs.call_s3("put_bucket_policy", Bucket="test", Policy=policy)
    yield location
    location.fs.call_s3("delete_bucket_policy", Bucket="test")


def test_a_flaky_store_loses_nothing_and_costs_half_again_as_many_requests(s3: str) -> None:
    """20 % answers of 503, 5 % resets, 5 % short bodies."""
    contents = {f"{i:03d}": (b"%03d" % i) * 700 for i in range(100)}
    healthy = Location("s3://test/flaky", s3)
    with flaky_proxy(s3, seed=5) as proxy, ThreadPoolExecutor(24) as pool:
        place = Location(healthy.uri, proxy.url)
        list(pool.map(lambda item: place.child(item[0]).put(item[1]), contents.items()))
        read = list(pool.map(lambda name: place.child(name).read(), contents))
        listed = [info.uri.rpartition("/")[2] for info in place.list()]
        assert proxy.faults > 50
        assert proxy.requests <= 1.5 * (2 * len(contents) + 2)
    assert read == list(contents.values())
    assert listed == list(contents)
    assert {name: healthy.child(name).read() for name in contents} == contents


def test_put_if_absent_over_a_flaky_store_writes_whole_objects_once(s3: str) -> None:
    with flaky_proxy(s3, unavailable=0.1, reset=0.1, short=0.0, seed=3) as proxy, ThreadPoolExecutor(16) as pool:
        place = Location(f"s3://test/flaky-{next(_names)}", proxy.url)
        names = [f"{i}" for i in range(40)] * 2
        won = list(pool.map(lambda name: place.child(name).put_if_absent(name.encode() * 1000), names))
    healthy = Location(place.uri, s3)
    assert sum(won) <= 40
    assert {info.uri.rpartition("/")[2]: info.size for info in healthy.list()} == {n: len(n) * 1000 for n in names}


class TestRetries:
    """`with_retries` alone."""

    @pytest.fixture(autouse=True)
    def _no_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.0)

    def failing(self, error: Exception, times: int) -> tuple[Any, list[int]]:
        calls: list[int] = []

        def call() -> str:
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "done"

        return call, calls

    @pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), OSError("Please reduce your rate")])
    def test_transient_faults_are_retried(self, error: Exception) -> None:
        call, calls = self.failing(error, storage.MAX_ATTEMPTS - 1)
        assert (with_retries(call), len(calls)) == ("done", storage.MAX_ATTEMPTS)

    def test_the_last_fault_is_raised(self) -> None:
        call, calls = self.failing(ConnectionResetError("once too often"), 100)
        with pytest.raises(ConnectionResetError, match="once too often"):
            with_retries(call)
        assert len(calls) == storage.MAX_ATTEMPTS

    @pytest.mark.parametrize(
        "error", [FileNotFoundError(), PermissionError(), FileExistsError(), ValueError(), KeyError()]
    )
    def test_plain_refusals_and_bugs_are_not(self, error: Exception) -> None:
        call, calls = self.failing(error, 100)
        with pytest.raises(type(error)):
            with_retries(call)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("x"), "not_found"),
        (IsADirectoryError("x"), "not_found"),
        (PermissionError("x"), "forbidden"),
        (OSError("x"), "read_failed"),
        (RuntimeError("x"), "read_failed"),
    ],
)
def test_read_failures_have_codes(error: Exception, code: str) -> None:
    found = read_failure(error, "s3://b/k.jpg").error
    assert (found.code, found.stage) == (code, "read")
    assert "s3://b/k.jpg" in found.message


def test_local_listing_has_the_sizes_and_order_of_the_disk(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/2.jpg", "a/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    assert [(i.uri, i.size) for i in Location(str(tmp_path)).list()] == [
        (str(tmp_path / "b.jpg"), 5),
        (str(tmp_path / "a/1.jpg"), 7),
        (str(tmp_path / "a/2.jpg"), 7),
    ]
    assert all(info.etag for info in Location(f"file://{tmp_path}").list())


def test_links_in_a_local_listing_are_inputs_and_never_followed_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "real.jpg").write_bytes(b"1234")
    (tmp_path / "a" / "b" / "circle").symlink_to(tmp_path / "a")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a" / "real.jpg")
    (tmp_path / "to-nothing.jpg").symlink_to(tmp_path / "gone.jpg")
    found = {info.uri.removeprefix(f"{tmp_path}/"): info.size for info in Location(str(tmp_path)).list()}
    circle = found.pop("a/b/circle")
    assert circle is not None
    assert found == {"a/real.jpg": 4, "link.jpg": 4, "to-nothing.jpg": 0}


def test_a_file_that_goes_while_its_folder_is_listed_is_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"x")
    listing = Location(str(tmp_path)).list()
    assert next(listing).uri == str(tmp_path / "a")
    (tmp_path / "b").unlink()
    assert [info.uri for info in listing] == [str(tmp_path / "c")]
