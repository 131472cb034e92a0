"""`smolvlm serve`, and the same endpoint for a Serve config: options in, a running endpoint until it is interrupted."""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from annotated_types import Gt, Interval
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jobs import checks, explain
from jobs.run import draining, fetch_checkpoint, ray_session
from jobs.shortcuts import DEFAULT_MODEL, DEFAULT_REVISION, Options, has_gpu, with_options
from pipeline.endpoint.keys import ApiKeys
from pipeline.endpoint.options import EndpointOptions, Limits, check_exposure
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Model

if TYPE_CHECKING:
    from ray.serve import Application


_IMAGE_HOST = re.compile(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)+(:[0-9]{1,5})?", re.IGNORECASE)


def _image_host(value: str) -> str:
    if not _IMAGE_HOST.fullmatch(value):
        checks.refuse("", value, "write a host, example.org or example.org:8443, or *.example.org for all below it")
    return value


class EndpointSpec(BaseModel):
    """The `args` of a Serve config, and what the command line comes to. Fields as in `EndpointOptions`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="smolvlm endpoint")

    model: Annotated[Model, AfterValidator(checks.model)]
    host: str = EndpointOptions.host
    port: Annotated[int, Interval(ge=1, le=65535)] = EndpointOptions.port
    api_key_file: str | None = None
    insecure: bool = False
    allowed_image_hosts: tuple[Annotated[str, AfterValidator(_image_host)], ...] = ()
    image: ImageOptions = Field(default_factory=lambda: ImageOptions(upscale=False, timeout_s=5.0))
    engine: Annotated[EngineOptions, AfterValidator(checks.own_engine)] = Field(default_factory=EngineOptions)
    gateways: Annotated[int, Gt(0)] = EndpointOptions.gateways
    gateway_cpus: Annotated[float, Gt(0)] = EndpointOptions.gateway_cpus
    decoders: Annotated[int, Gt(0)] = EndpointOptions.decoders
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _runs_where_it_is_placed(self) -> Self:
        checks.place(self.model, self.engine)
        return self

    def to_options(self) -> EndpointOptions:
        """Return the endpoint as the pipeline takes it. Raises ConfigError if it would be open to strangers."""
        options = EndpointOptions(**{name: getattr(self, name) for name in type(self).model_fields})
        check_exposure(options)
        return options


@dataclass(frozen=True)
class Started:
    """Where a running endpoint is."""

    url: str
    model: str
    ray_address: str


def parse(content: Mapping[str, Any], origin: str = "endpoint") -> EndpointSpec:
    """Validate. Raises ConfigError with a line for every mistake: key, value and remedy."""
    try:
        return EndpointSpec.model_validate_json(json.dumps(content, allow_nan=False))
    except ValidationError as error:
        lines = explain.validation_error(error, EndpointSpec.model_json_schema())
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def application(args: dict[str, Any]) -> "Application":
    """Build the application of a Serve config (`import_path: jobs.serve:application`)."""
    from pipeline.serve import build_application

    return build_application(parse(args).to_options())


def content_of(options: Options, given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the command line's options over the defaults; of `given`, None means not given."""
    defaults: dict[str, Any] = {
        "model": {"id": DEFAULT_MODEL, "revision": DEFAULT_REVISION},
        "engine": {"gpus": 1 if has_gpu() else 0},
    }
    return with_options({**defaults, **{key: value for key, value in given.items() if value is not None}}, options)


def serve(
    options: EndpointOptions,
    on_start: Callable[[Started], None],
    on_stop: Callable[[], None],
    address: str | None = None,
) -> None:
    """Run the endpoint on the Ray cluster at `address`, or on this machine, until SIGINT or SIGTERM.

    Then it drains: what is under way is answered. A second signal ends it at once with KeyboardInterrupt. Raises
    ConfigError for what a user can cause.
    """
    fetch_checkpoint(options.model)
    if address is None:
        _check_here(options)
    stop_asked = threading.Event()
    with ray_session(address), draining(stop_asked, lambda _: on_stop()):
        import ray

        from pipeline.serve import start, stop

        try:
            start(options)
            ray_address = str(ray.get_runtime_context().gcs_address)
            on_start(Started(f"http://{_shown(options.host)}:{options.port}", options.model_name, ray_address))
            stop_asked.wait()
        finally:
            stop()


def _check_here(options: EndpointOptions) -> None:
    """Find out before Ray starts what would otherwise fail inside a replica."""
    from pipeline.endpoint.server import bind

    if options.api_key_file is not None:
        ApiKeys.from_file(options.api_key_file)
    try:
        bind(options.host, options.port).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port}: {reason}; choose another --port, or stop what uses it"
        ) from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
