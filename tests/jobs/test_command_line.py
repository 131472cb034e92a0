"""How a command says what went wrong."""

import pytest
import typer

from jobs.command_line import plain_errors
from pipeline.errors import ConfigError, FingerprintMismatch, LeaseHeld, LeaseLost, PipelineError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("`model`: no such folder"), 2),
        (FingerprintMismatch("other job"), 2),
        (LeaseHeld("another driver"), 2),
        (LeaseLost("another driver took over"), 1),
        (PipelineError("workers died"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_wrong_use_a_run_that_broke_and_an_interrupt_have_codes_of_their_own(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as raised, plain_errors("stopped by you"):
        raise error
    assert raised.value.exit_code == code
    said = "stopped by you" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
    assert capsys.readouterr() == ("", f"{said}\n")
