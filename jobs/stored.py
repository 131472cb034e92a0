"""What a destination says of the job it belongs to: `_job.json`."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jobs.shortcuts import Options, with_options
from jobs.spec import parse
from pipeline.errors import ConfigError
from pipeline.job import Job
from pipeline.storage import Location


@dataclass(frozen=True)
class StoredJob:
    """The job as it was claimed, and the fingerprint that a resume must have."""

    location: Location
    job: Job
    fingerprint: dict[str, Any]
    content: dict[str, Any]

    def to_run(self, options: Options) -> Job:
        """Return the job as one to run here now: into this destination, without limits, `options` laid over it.

        Raises ConfigError as for a job file, e.g. where the checkpoint's directory is gone.
        """
        output = {"uri": self.location.uri, "rows_per_file": self.job.output.rows_per_file}
        content = {key: value for key, value in self.content.items() if key != "limits"} | {"output": output}
        return parse(with_options(content, options), f"{self.location.uri}/_job.json").to_job()


def stored_job(uri: str, endpoint_url: str | None = None) -> StoredJob:
    """Read it. Raises ConfigError if there is none, or none that this version understands."""
    location = Location(uri, endpoint_url)
    try:
        content = json.loads(location.child("_job.json").read())
        job = TypeAdapter(Job).validate_python(content["job"])
        return StoredJob(location, job, content["fingerprint"], content["job"])
    except FileNotFoundError:
        raise ConfigError(f"{uri}: no _job.json here, so no job's output; check the address") from None
    except (KeyError, TypeError, ValidationError, json.JSONDecodeError) as error:
        raise ConfigError(f"{uri}/_job.json is not what a job writes ({type(error).__name__}: {error})") from error
