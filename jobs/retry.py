"""`smolvlm retry`: the error rows of an output once more, with the job that it names itself."""

import threading
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from jobs.progress import Display, duration
from jobs.run import draining, fetch_checkpoint, ray_session
from jobs.shortcuts import Options
from jobs.stored import stored_job
from pipeline.errors import CODES, ConfigError

if TYPE_CHECKING:
    from pipeline.retry import Retried

_STOPPING = "stopping: images under way are finished and replaced; interrupt again to abort"


def retry(uri: str, codes: Sequence[str], options: Options, display: Display, address: str | None = None) -> "Retried":
    """Run the error rows of `codes` again, all of them where it is empty; interrupts act as in `jobs.run.execute`.

    Raises pipeline.errors.PipelineError for what a user can cause.
    """
    for code in codes:
        _check_code(code)
    job = stored_job(uri, options.endpoint_url).to_run(options)
    fetch_checkpoint(job.model)
    drain = threading.Event()
    with ray_session(address), draining(drain, display.say, _STOPPING):
        from pipeline.retry import retry as run_again

        return run_again(job, frozenset(codes) or None, on_progress=display, drain=drain, say=display.say)


def retried_object(done: "Retried") -> dict[str, Any]:
    """Return the last object of a retry."""
    return {"event": "summary", **vars(done)}


def retried_text(done: "Retried") -> str:
    """Return the last lines of a retry for a person."""
    state = "stopped early; run it again to go on" if done.interrupted else "finished"
    lines = [
        f"{state}: {done.retried:,} error rows run again in {duration(done.elapsed_s)}, {done.recovered:,} are ok now",
        f"the output holds {done.inputs:,} rows ({done.ok:,} ok, {done.error:,} errors)",
    ]
    if done.hopeless:
        lines.append(f"{done.hopeless:,} rows were bad when the source was listed: only a new output lists it again")
    if done.errors_by_code:
        lines.append("errors: " + ", ".join(f"{code} {count:,}" for code, count in done.errors_by_code.items()))
    return "\n".join([*lines, f"output: {done.output_uri}"])


def _check_code(code: str) -> None:
    if code not in CODES:
        close = get_close_matches(code, CODES, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--code {code}: no such error code; {hint}there are: {', '.join(sorted(CODES))}")
