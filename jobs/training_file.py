"""The training file: YAML or JSON in, a validated `smolvlm.training.plan.TrainingPlan` out.

Validation is strict, as that of a job file, and every mistake is a ConfigError that names the key, the value and the
remedy.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from jobs import checks, documents, explain
from pipeline.errors import ConfigError
from pipeline.job import Model, Source
from smolvlm.training.checks import plan_mistakes
from smolvlm.training.plan import LabelledData, Start, TrainingPlan

T = TypeVar("T")


class TrainingFile(BaseModel):
    """A training plan as a user writes it; the configuration below reaches into the plan's dataclasses."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="smolvlm training")

    plan: TrainingPlan


def load(path: str | Path, output: str | None = None) -> TrainingPlan:
    """Read a training file (.yaml, .yml or .json); `output` takes the place of the file's own.

    Raises ConfigError naming file, key, value and remedy.
    """
    content = documents.read(Path(path))
    return parse(content if output is None else {**content, "output": output}, origin=str(path))


def parse(content: Mapping[str, Any], origin: str = "training") -> TrainingPlan:
    """Validate the content of a training file. Raises ConfigError listing every mistake, each on a line of its own.

    Local paths in the plan become absolute, so that they mean the same in every process.
    """
    try:
        text = json.dumps({"plan": content}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {explain.not_json(content)}") from error
    try:
        # Through JSON, because there strict types still take a list for a tuple and an object for a dataclass.
        plan = TrainingFile.model_validate_json(text).plan
    except ValidationError as error:
        lines = explain.validation_error(error, TrainingFile.model_json_schema())
        raise ConfigError(_listed(origin, (line.replace("`plan.", "`", 1) for line in lines))) from None
    plan, refusals = _resolved(plan)
    mistakes = [*refusals, *plan_mistakes(plan)]
    if mistakes:
        raise ConfigError(_listed(origin, mistakes))
    return plan


def _listed(origin: str, lines: Iterable[str]) -> str:
    return "\n".join(f"{origin}: {line}" for line in lines)


def _resolved(plan: TrainingPlan) -> tuple[TrainingPlan, list[str]]:
    """The plan with absolute paths, and what is wrong with the names and places in it."""
    refusals: list[str] = []

    def checked(key: str, check: Callable[[T], T], value: T) -> T:
        try:
            return check(value)
        except PydanticCustomError as error:
            refusals.append(explain.refusal(key, error))
            return value

    evaluation = plan.evaluation
    if evaluation is not None:
        evaluation = replace(evaluation, source=checked("evaluation.source", _labelled, evaluation.source))
    plan = replace(
        plan,
        name=checked("name", checks.job_name, plan.name),
        output=checked("output", _folder, plan.output),
        start=checked("start", _start, plan.start),
        source=checked("source", _labelled, plan.source),
        evaluation=evaluation,
    )
    return plan, refusals


def _folder(output: str) -> str:
    if "://" in output or not output.strip():
        checks.refuse("", output, "checkpoints go to a folder of a file system; write its path")
    return str(Path(output).expanduser().absolute())


def _start(start: Start) -> Start:
    if start.id is None:
        return start
    model = checks.model(Model(start.id, start.revision))
    return replace(start, id=model.id)


def _labelled(data: LabelledData | None) -> LabelledData | None:
    if data is None:
        return None
    source = checks.source(Source(data.uri, column=data.column, endpoint_url=data.endpoint_url))
    return replace(data, uri=source.uri)
