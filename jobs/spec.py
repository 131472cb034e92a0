"""The job file: YAML or JSON in, a validated `pipeline.job.Job` out, and its JSON schema.

Validation is strict (a number is not a string, nothing is coerced) and every mistake is a ConfigError that names the
key, the value and the remedy.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Ge, Gt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jobs import checks, documents, explain
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Job, Limits, Model, Output, Source, Task

SCHEMA_PATH = Path(__file__).with_name("job.schema.json")


class JobSpec(BaseModel):
    """What to read, what to ask, where to write.

    The fields are the pipeline's own dataclasses; this model's configuration (unknown keys refused, strict types)
    reaches into them because they are stdlib dataclasses without a configuration of their own.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="smolvlm job")

    name: Annotated[str, AfterValidator(checks.job_name)]
    source: Annotated[Source, AfterValidator(checks.source)]
    output: Annotated[Output, AfterValidator(checks.output)]
    model: Annotated[Model, AfterValidator(checks.model)]
    tasks: Annotated[tuple[Task, ...], MinLen(1), AfterValidator(checks.tasks)]
    image: ImageOptions = Field(default_factory=ImageOptions)
    engine: Annotated[EngineOptions, AfterValidator(checks.engine)] = Field(default_factory=EngineOptions)
    limit: Annotated[int, Gt(0)] | None = None
    seed: Annotated[int, Ge(0)] = 0
    limits: Annotated[Limits, AfterValidator(checks.limits)] = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _runs_where_it_is_placed(self) -> Self:
        checks.place(self.model, self.engine)
        return self

    def to_job(self) -> Job:
        """Return the job as the pipeline takes it."""
        return Job(**{name: getattr(self, name) for name in type(self).model_fields})


def load(path: str | Path) -> JobSpec:
    """Read a job file (.yaml, .yml or .json). Raises ConfigError naming file, key, value and remedy."""
    return parse(documents.read(Path(path)), origin=str(path))


def parse(content: Mapping[str, Any], origin: str = "job") -> JobSpec:
    """Validate the content of a job file. Raises ConfigError listing every mistake, each on a line of its own."""
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {explain.not_json(content)}") from error
    try:
        # Through JSON, because there strict types still take a list for a tuple and an object for a dataclass.
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        lines = explain.validation_error(error, json_schema())
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a job file, as committed in `job.schema.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}


def schema_text() -> str:
    """Return the schema as the committed file holds it."""
    return json.dumps(json_schema(), indent=2) + "\n"
