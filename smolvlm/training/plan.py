"""What a training run does: its model, stages, losses, optimizer and data, as frozen values.

The reader of training files (`jobs/training_file.py`) uses these dataclasses as its field types, so there is one
definition of each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from smolvlm.scratch import Shape
from smolvlm.training.documents import DocumentOptions

Share = Annotated[float, Interval(ge=0, le=1)]
Part = Literal["vision", "connector", "text"]


@dataclass(frozen=True)
class Start:
    """What training begins with: a checkpoint (`id`: directory, `bundled` or a hub id with `revision`), or fresh
    weights of a `shape` with a byte-level tokenizer. With both, fresh weights around the checkpoint's parts `keep`: an
    encoder that has learned glyphs gets a new decoder, or all goes on with more layers and larger tiles."""

    id: str | None = None
    revision: str | None = None
    shape: Shape | None = None
    keep: Annotated[tuple[Part, ...], MinLen(1)] = ("vision",)
    """Layers that the checkpoint lacks begin as identities, positions of more patches are interpolated."""


@dataclass(frozen=True)
class Losses:
    """Weights of the three losses; one that is 0 is not computed.

    text: next-token loss on the answer's tokens.
    glyph: cross entropy of the characters whose middle lies in each patch, from the vision encoder alone.
    reading: cross entropy of where one attention head looks for the next character.

    The last two need the place of every character, which only the built-in documents know.
    """

    text: Annotated[float, Ge(0)] = 1.0
    glyph: Annotated[float, Ge(0)] = 0.0
    reading: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture of data and one learning-rate curve.

    The learning rate rises over `warmup_steps` to its first value and falls along a cosine to its second.
    `batch_size` is examples per optimizer step over all processes; `micro_batches` cuts a process's share of it.
    """

    name: str
    steps: Annotated[int, Gt(0)]
    batch_size: Annotated[int, Gt(0)]
    learning_rate: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]]
    warmup_steps: Annotated[int, Ge(0)] = 0
    micro_batches: Annotated[int, Gt(0)] = 1
    losses: Losses = field(default_factory=Losses)
    documents: DocumentOptions | None = None
    """The built-in documents to draw; left out, the run's labelled source is read."""
    num_documents: Annotated[int, Gt(0)] | None = None
    """So many documents, again and again in a new order; left out, new ones without end."""
    freeze: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Optimizer:
    """AdamW; `adamw8bit` keeps its two moments in 8 bits (bitsandbytes). `muon` orthogonalises the updates of the
    inner matrices (https://kellerjordan.github.io/posts/muon/) and leaves the rest to AdamW: from fresh
    weights it learned in a quarter of the steps. Its rate is the stage's times `muon_rate`."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    muon_rate: Annotated[float, Gt(0)] = 10.0
    weight_decay: Annotated[float, Ge(0)] = 0.05
    betas: tuple[Share, Share] = (0.9, 0.98)
    max_grad_norm: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True)
class LabelledData:
    """A labelled source: images with the text that a model should answer (pipeline.labelled)."""

    uri: str
    text_column: str = "text"
    column: str | None = None
    """The image column of Parquet, or the URI column of a list; found by name and type when left out."""
    endpoint_url: str | None = None
    digest: str | None = None
    """SHA-256 of the names and texts; the run notes it, so that a resume notices a source that has changed."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements along the way, with the engine that serves: `count` answers every `every_steps`, and at the end.

    They are taken on built-in `documents` that training does not draw, or on a `source` of labelled images.
    """

    every_steps: Annotated[int, Gt(0)] = 1000
    count: Annotated[int, Gt(0)] = 64
    max_new_tokens: Annotated[int, Gt(0)] = 512
    documents: DocumentOptions | None = None
    source: LabelledData | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what a run learns, and where it writes."""

    name: str
    output: str
    start: Start
    stages: Annotated[tuple[Stage, ...], MinLen(1)]
    average: tuple[str, ...] = ()
    """Stages whose last weights the finished model is the mean of; left out, it is what the last stage ends with."""
    prompt: str = "Transcribe all text."
    source: LabelledData | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; `auto` is bfloat16 where the device is fast at it, else float32."""
    device: Literal["cpu", "cuda"] = "cpu"
    processes: Annotated[int, Gt(0)] = 1
    checkpoint_activations: bool = False
    compile: bool = False
    checkpoint_every: Annotated[int, Gt(0)] = 500
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the finished model is stored in; checkpoints to resume from are float32."""
    data_workers: Annotated[int, Ge(0)] = 1
    """Processes that draw examples ahead, for each training process; 0: it draws them itself."""
    threads: Annotated[int, Gt(0)] | None = None
    """CPU threads that each process computes with; left out: the machine's cores, shared by the processes."""
    seed: Annotated[int, Ge(0)] = 0

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def ends(self) -> dict[str, int]:
        """After how many steps of the run each stage ends."""
        return dict(zip((stage.name for stage in self.stages), accumulate(s.steps for s in self.stages), strict=True))

    def stage_at(self, step: int) -> tuple[int, int]:
        """Which stage optimizer step `step` (from 0) belongs to, and the step inside it."""
        assert 0 <= step < self.total_steps
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise AssertionError("the stages' steps add up to total_steps")

    def fingerprint(self, step: int) -> dict[str, Any]:
        """What must not change between a run and its resume after `step` steps; stages still to come may."""
        free = {"output", "stages", "average", "evaluation", "checkpoint_every", "data_workers", "compile",
                "checkpoint_activations", "save_dtype", "threads"}  # fmt: skip
        fixed = {name: value for name, value in asdict(self).items() if name not in free}
        begun = self.stage_at(step - 1)[0] + 1 if step else 0
        return fixed | {f"stages[{number}]": asdict(stage) for number, stage in enumerate(self.stages[:begun])}
