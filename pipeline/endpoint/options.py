"""What the operator of an endpoint sets. Frozen values, validated by whoever built them (`jobs/serve.py`)."""

import ipaddress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Interval

from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Model

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one gateway takes, so that no request can hurt the others. Seconds, bytes, counts."""

    max_requests: Annotated[int, Gt(0)] = 256
    """Completions under way at once; more are answered 429."""
    max_body_bytes: Annotated[int, Gt(0)] = 32 * MIB
    max_total_body_bytes: Annotated[int, Gt(0)] = 512 * MIB
    """Bodies of all requests under way together; more are answered 429."""
    max_images: Annotated[int, Ge(0)] = 16
    max_tiles: Annotated[int, Gt(0)] = 68
    """Of all images of a request together."""
    max_total_tiles: Annotated[int, Gt(0)] = 2048
    """Of all requests under way together; more are answered 429. A tile of 512 × 512 pixels holds 768 KiB."""
    max_text_chars: Annotated[int, Gt(0)] = 65_536
    max_output_tokens: Annotated[int, Gt(0)] = 4096
    default_output_tokens: Annotated[int, Gt(0)] = 1024
    """For requests that do not say."""
    max_connections: Annotated[int, Gt(0)] = 1024
    header_timeout_s: Annotated[float, Gt(0)] = 10.0
    body_timeout_s: Annotated[float, Gt(0)] = 30.0
    first_token_timeout_s: Annotated[float, Gt(0)] = 120.0
    request_timeout_s: Annotated[float, Gt(0)] = 600.0


@dataclass(frozen=True)
class EndpointOptions:
    """One endpoint: a model, its engines, and the gateway before them."""

    model: Model
    host: str = "127.0.0.1"
    port: Annotated[int, Interval(ge=1, le=65535)] = 8000
    api_key_file: str | None = None
    """One key a line, or `sha256:` and its digest in hex; read on every node that has a gateway."""
    insecure: bool = False
    """Take requests without a key from other machines."""
    allowed_image_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from, `*.example.org` for all below; none: `data:` URLs only."""
    image: ImageOptions = field(default_factory=lambda: ImageOptions(upscale=False, timeout_s=5.0))
    engine: EngineOptions = field(default_factory=EngineOptions)
    gateways: Annotated[int, Gt(0)] = 1
    gateway_cpus: Annotated[float, Gt(0)] = 0.1
    """CPUs reserved for a gateway."""
    decoders: Annotated[int, Gt(0)] = 2
    """Decoding processes of a gateway."""
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def model_name(self) -> str:
        """What clients call the model: of a directory its name, never a path of this machine."""
        return Path(self.model.id).name if Path(self.model.id).is_absolute() else self.model.id


def check_exposure(options: EndpointOptions) -> None:
    """Raise ConfigError if other machines could ask without a key and nobody said that they may."""
    if options.api_key_file is None and not options.insecure and not _is_loopback(options.host):
        raise ConfigError(
            f"host {options.host} is open to other machines, but there are no API keys: give an api_key_file, keep the "
            "host 127.0.0.1, or say insecure if everyone may ask"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
