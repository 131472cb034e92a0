"""Jobs on a cluster through Ray's job API: submit, watch, follow, cancel, list.

What travels is the job as it was validated here, and the code unless the nodes have it installed. Secrets do not: Ray
shows a job's environment to whoever may ask, so there are only names in it, and the nodes must have the values.
"""

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.claim import package_version
from pipeline.errors import ConfigError
from pipeline.job import Job
from smolvlm.hub import BUNDLED

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DRAIN_S = 3600  # what a cancelled job may take for the images that it has begun
JOB_FILE = "job.json"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_PACKAGES = ("smolvlm", "pipeline", "jobs")
_POLL_S = 0.5
_SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds it, or put it in ~/.ray/auth_token"
)


@dataclass(frozen=True)
class Submitted:
    """One submitted job. `state` is PENDING, RUNNING or one of ENDED; times are seconds since 1970."""

    id: str
    job: str
    state: str
    message: str
    output: str
    submitted_at: float | None
    ended_at: float | None
    exit_code: int | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in ENDED


@dataclass(frozen=True)
class Shipping:
    """How a job goes to the cluster.

    `installed`: the nodes have the package, so only the job file travels. `secrets`: names of variables that every node
    must have. `preflight`: check the cluster before the run.
    """

    installed: bool = False
    secrets: tuple[str, ...] = ()
    preflight: bool = True
    max_error_share: float = 0.05


class Cluster:
    """The job API of one cluster. Every call raises ConfigError where the cluster cannot be reached or refuses."""

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address}: give the address of the cluster's dashboard, such as {DEFAULT_ADDRESS}; it "
                "listens on the head node alone, so forward its port (ssh -L, kubectl port-forward)"
            )
        self.address = address.rstrip("/")
        with self._errors():
            self._client = _connect(self.address)

    def submit(self, job: Job, shipping: Shipping) -> str:
        """Hand a job to the cluster and return its submission id at once."""
        check_names(shipping.secrets)
        submission_id = f"{job.name}-{uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as folder, self._errors():
            pack(Path(folder), job, with_code=not shipping.installed)
            self._client.submit_job(
                entrypoint=entrypoint(shipping),
                submission_id=submission_id,
                runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_S)}},
                metadata={"smolvlm.job": job.name, "smolvlm.output": job.output.uri},
            )
        return submission_id

    def status(self, submission_id: str) -> Submitted:
        """Return how a submitted job is doing."""
        with self._errors(submission_id):
            return _submitted(self._client.get_job_info(submission_id))

    def list(self) -> list[Submitted]:
        """Return the jobs that were submitted by `submit`, the newest first."""
        with self._errors():
            ours = [each for each in self._client.list_jobs() if "smolvlm.job" in (each.metadata or {})]
        return sorted(map(_submitted, ours), key=lambda each: each.submitted_at or 0.0, reverse=True)

    def logs(self, submission_id: str) -> str:
        """Return what the job's driver has printed so far."""
        with self._errors(submission_id):
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str) -> Iterator[str]:
        """Yield what the driver prints, from the beginning until the job has ended."""
        self.status(submission_id)
        with self._errors(submission_id), asyncio.Runner() as runner:
            lines = self._client.tail_job_logs(submission_id)
            while (text := runner.run(_next(lines))) is not None:
                yield text

    def cancel(self, submission_id: str) -> None:
        """Ask the job to stop: images under way are finished and committed, within DRAIN_S."""
        with self._errors(submission_id):
            self._client.stop_job(submission_id)

    def wait(self, submission_id: str) -> Submitted:
        """Wait for the job's end and return how it ended."""
        while not (found := self.status(submission_id)).has_ended:
            time.sleep(_POLL_S)
        return found

    @contextmanager
    def _errors(self, submission_id: str | None = None) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise ConfigError(f"--address {self.address}: the cluster wants its token; {_TOKEN_REMEDY}") from None
        except OSError as error:  # so are the errors of the HTTP libraries
            remedy = "is the cluster up, and its dashboard's port forwarded?"
            raise ConfigError(f"--address {self.address}: {error}; {remedy}") from None
        except RuntimeError as error:
            if submission_id is not None and "does not exist" in str(error):
                remedy = f"see `smolvlm list --address {self.address}`"
                raise ConfigError(f"{submission_id}: no such job on {self.address}; {remedy}") from None
            raise ConfigError(f"--address {self.address}: {error}") from None


def entrypoint(shipping: Shipping) -> str:
    """Return the command that the cluster runs. `exec`: signals must reach the driver, not a shell before it."""
    job = f"{JOB_FILE} --address auto"
    run = f"exec python -m jobs run {job} --max-error-share {shipping.max_error_share:g}"
    names = "".join(f" --secret {shlex.quote(name)}" for name in shipping.secrets)
    return f"python -m jobs preflight {job}{names} && {run}" if shipping.preflight else run


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError if one is not the name of an environment variable, without repeating what may be a secret."""
    for name in names:
        if not _SECRET_NAME.fullmatch(name):
            shown = name.partition("=")[0] if "=" in name else "<hidden>"
            remedy = "give the name alone; the value belongs into the nodes' environment"
            raise ConfigError(f"--secret {shown}: not the name of an environment variable; {remedy}")


def pack(folder: Path, job: Job, with_code: bool) -> None:
    """Put what travels into `folder`: the job, and the packages without caches and without weights it does not need."""
    (folder / JOB_FILE).write_text(json.dumps(asdict(job), indent=1))
    if not with_code:
        return
    unwanted = ["__pycache__"] if job.model.id == BUNDLED else ["__pycache__", "assets"]
    for name in _PACKAGES:
        package = Path(sys.modules[f"{name}"].__path__[0])
        shutil.copytree(package, folder / name, ignore=shutil.ignore_patterns(*unwanted))
    version = package_version()
    metadata = folder / f"smolvlm_pipeline-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: smolvlm-pipeline\nVersion: {version}\n")


def exit_code(ended: Submitted, failed: int, interrupted: int) -> int:
    """Return the exit code of an ended job: its driver's own, where it has one."""
    if ended.state == "SUCCEEDED":
        return 0
    if ended.state == "STOPPED":
        return interrupted
    return ended.exit_code if ended.exit_code and ended.exit_code > 0 else failed


def _connect(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray puts this, and RAY_ADDRESS, before what it is given
    return JobSubmissionClient(address)


async def _next(lines: Any) -> str | None:
    return await anext(lines, None)


def _submitted(details: "JobDetails") -> Submitted:
    metadata = details.metadata or {}
    return Submitted(
        id=str(details.submission_id),
        job=metadata.get("smolvlm.job", ""),
        state=str(details.status.value),
        message=(details.message or "").partition(", last available logs")[0],  # `logs` shows them
        output=metadata.get("smolvlm.output", ""),
        submitted_at=None if details.start_time is None else details.start_time / 1000,
        ended_at=None if not details.end_time else details.end_time / 1000,
        exit_code=details.driver_exit_code,
    )
