import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import training_file
from pipeline.errors import ConfigError
from smolvlm.scratch import Shape, TextShape, VisionShape
from smolvlm.training.documents import DocumentOptions
from smolvlm.training.plan import Evaluation, LabelledData, Losses, Optimizer, Stage, Start, TrainingPlan

SHA = "7e3e67edbbed1bf9888184d9df282b700a323964"
EXAMPLES = sorted((Path(training_file.__file__).parent / "examples").glob("train_*.yaml"))
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "vocab_size": 402,
}
STAGE = {"name": "words", "steps": 5, "batch_size": 4, "learning_rate": [0.001, 0.0001]}
BASE: dict[str, Any] = {
    "name": "ocr",
    "output": "/runs/ocr",
    "start": {"shape": {"vision": VISION, "text": TEXT, "scale_factor": 2, "longest_edge": 64}},
    "stages": [{**STAGE, "documents": {}}],
}


def content(*path: str | int, value: Any = None, **changes: Any) -> dict[str, Any]:
    """A training file's content with top-level changes, and with `value` at `path`."""
    changed = deepcopy({**BASE, **changes})
    node: Any = changed
    for step in path[:-1]:
        node = node[step]
    if path:
        node[path[-1]] = value
    return changed


def test_every_key_arrives_in_the_plan(tmp_path: Path) -> None:
    text = f"""
name: receipts
output: /runs/receipts
prompt: "Read it."
start: {{id: HuggingFaceTB/SmolVLM-256M-Instruct, revision: {SHA}}}
source: {{uri: s3://bucket/labels.parquet, text_column: transcript, column: image, endpoint_url: "http://host:9000"}}
stages:
  - name: warm
    steps: 10
    batch_size: 8
    micro_batches: 2
    learning_rate: [1.0e-4, 5.0e-5]
    warmup_steps: 3
    freeze: [vision, connector]
  - {{name: mix, steps: 7, batch_size: 4, learning_rate: [0.001, 0.001], losses: {{text: 0.5, glyph: 1, reading: 2}},
     documents: {{kinds: {{word: 1, line: 2}}, text_px: [8, 20], longest_edge: [64, 128], degraded_share: 0.5}}}}
optimizer: {{kind: adamw8bit, weight_decay: 0.1, betas: [0.9, 0.95], max_grad_norm: 2}}
evaluation: {{every_steps: 5, count: 3, max_new_tokens: 64, source: {{uri: s3://bucket/test.parquet}}}}
precision: float32
device: cuda
processes: 2
checkpoint_activations: false
compile: true
checkpoint_every: 9
save_dtype: bfloat16
data_workers: 3
threads: 4
seed: 11
"""
    path = tmp_path / "train.yaml"
    path.write_text(text)
    assert training_file.load(path) == TrainingPlan(
        name="receipts",
        output="/runs/receipts",
        prompt="Read it.",
        start=Start("HuggingFaceTB/SmolVLM-256M-Instruct", SHA),
        source=LabelledData("s3://bucket/labels.parquet", "transcript", "image", "http://host:9000"),
        stages=(
            Stage("warm", 10, 8, (1e-4, 5e-5), 3, 2, freeze=("vision", "connector")),
            Stage(
                "mix",
                7,
                4,
                (0.001, 0.001),
                losses=Losses(0.5, 1, 2),
                documents=DocumentOptions({"word": 1, "line": 2}, (64, 128), (8, 20), degraded_share=0.5),
            ),
        ),
        optimizer=Optimizer("adamw8bit", weight_decay=0.1, betas=(0.9, 0.95), max_grad_norm=2),
        evaluation=Evaluation(5, 3, 64, source=LabelledData("s3://bucket/test.parquet")),
        precision="float32",
        device="cuda",
        processes=2,
        checkpoint_activations=False,
        compile=True,
        checkpoint_every=9,
        save_dtype="bfloat16",
        data_workers=3,
        threads=4,
        seed=11,
    )


def test_what_is_left_out_has_the_plans_own_defaults() -> None:
    shape = Shape(VisionShape(**VISION), TextShape(**TEXT), 2, 64)
    stage = Stage("words", 5, 4, (0.001, 0.0001), documents=DocumentOptions())
    assert training_file.parse(BASE) == TrainingPlan("ocr", "/runs/ocr", Start(shape=shape), (stage,))


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(BASE))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(BASE))
    assert training_file.load(tmp_path / "a.json") == training_file.load(tmp_path / "a.yaml")


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    plan = training_file.parse(
        content(
            output="out",
            start={"id": "checkpoint"},
            source={"uri": "a.parquet"},
            evaluation={"source": {"uri": "b.parquet"}},
        )
    )
    assert plan.source is not None
    assert plan.evaluation is not None
    assert plan.evaluation.source is not None
    places = (plan.output, plan.start.id, plan.source.uri, plan.evaluation.source.uri)
    assert places == tuple(str(tmp_path / name) for name in ("out", "checkpoint", "a.parquet", "b.parquet"))


def test_an_output_may_be_given_apart(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in BASE.items() if key != "output"}))
    assert training_file.load(path, str(tmp_path / "out")).output == str(tmp_path / "out")


def test_fresh_weights_may_go_around_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    start = training_file.parse(content("start", "id", value=str(tmp_path))).start
    assert start.id == str(tmp_path)
    assert start.shape is not None


def stage(**changes: Any) -> dict[str, Any]:
    return content(stages=[{**STAGE, "documents": {}, **changes}])


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key at the top": (content(stagez=[]), ["`stagez`", "unknown key", "did you mean `stages`"]),
    "unknown key in a stage": (stage(stepz=1), ["`stages[0].stepz`", "did you mean `steps`"]),
    "unknown key in documents": (
        stage(documents={"text_pix": [8, 20]}),
        ["`stages[0].documents.text_pix`", "did you mean `text_px`"],
    ),
    "unknown key in a shape": (
        content("start", "shape", "vision", "patch_sise", value=8),
        ["`start.shape.vision.patch_sise`", "did you mean `patch_size`"],
    ),
    "unknown key in the evaluation": (
        content(evaluation={"documents": {}, "counts": 3}),
        ["`evaluation.counts`", "did you mean `count`"],
    ),
    "missing keys": (
        {"name": "x"},
        ["`output`: missing", "`start`: missing; add it (id, revision, shape, keep)", "`stages`: miss"],
    ),
    "missing key of a stage": (content(stages=[{"name": "a"}]), ["`stages[0].steps`: missing"]),
    "a number as text": (stage(steps="5"), ['`stages[0].steps`: "5"', "whole number, without quotes"]),
    "exponent without a point": (stage(learning_rate=["1e-3", 0.1]), ['"1e-3"', "must be a number"]),
    "one learning rate": (stage(learning_rate=0.1), ["`stages[0].learning_rate`", "must be a list"]),
    "a rate of 0": (stage(learning_rate=[0.1, 0]), ["`stages[0].learning_rate[1]`", "greater than 0"]),
    "no stages": (content(stages=[]), ["`stages`", "must not be empty"]),
    "an unknown part": (stage(freeze=["head"]), ["`stages[0].freeze[0]`", '"head"', "'connector'"]),
    "an unknown optimizer": (content(optimizer={"kind": "sgd"}), ["`optimizer.kind`", '"sgd"', "'muon'"]),
    "an unknown kind of document": (stage(documents={"kinds": {"novel": 1}}), ["`stages[0].documents`", "novel"]),
    "text too small to read": (stage(documents={"text_px": [1, 20]}), ["`stages[0].documents`", "text_px is (1", "6"]),
    "neither checkpoint nor shape": (content(start={}), ["`start`", "`id`", "`shape`"]),
    "a revision of fresh weights": (content("start", "revision", value=SHA), ["`start.revision`", "leave it out"]),
    "no such checkpoint": (content(start={"id": "/no/such"}), ["`start.id`", '"/no/such"', "no such directory"]),
    "an unpinned hub model": (content(start={"id": "owner/model"}), ["`start.revision`", "40 hex digits"]),
    "no data": (content(stages=[STAGE]), ["`stages[0].documents`", "`source`"]),
    "dense losses on a source": (
        content(stages=[{**STAGE, "losses": {"glyph": 1}}], source={"uri": "/a.parquet"}),
        ["`stages[0].losses`", "glyph 1", "set them to 0"],
    ),
    "a number of rows": (
        content(stages=[{**STAGE, "num_documents": 3}], source={"uri": "/a.parquet"}),
        ["`stages[0].num_documents`: 3", "leave it out"],
    ),
    "compiled and recomputed": (
        content(compile=True, checkpoint_activations=True),
        ["`compile`: true", "choose one"],
    ),
    "no losses": (stage(losses={"text": 0}), ["`stages[0].losses`", "nothing would be learned"]),
    "a batch that cannot be cut": (
        {**stage(batch_size=6, micro_batches=2), "processes": 2},
        ["`stages[0].batch_size`: 6", "2 × 2"],
    ),
    "all warm-up": (stage(warmup_steps=6), ["`stages[0].warmup_steps`: 6", "steps, 5"]),
    "an evaluation of nothing": (content(evaluation={}), ["`evaluation`", "`documents`", "`source`"]),
    "an output in a bucket": (content(output="s3://bucket/x"), ["`output`", '"s3://bucket/x"', "write its path"]),
    "a source that is no URL": (content(source={"uri": "s4://b/x"}), ["`source.uri`", "did you mean s3://"]),
    "a name with a slash": (content(name="a/b"), ["`name`", '"a/b"', "letters"]),
    "NaN": (stage(learning_rate=[float("nan"), 0.1]), ["`stages[0].learning_rate[0]`", "nan", "finite number"]),
    "a start that is a text": (
        content(start="bundled"),
        ["`start`", "must be a mapping of keys (id, revision, shape, keep)"],
    ),
}


@pytest.mark.parametrize(("wrong", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_key_value_and_remedy(wrong: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        training_file.parse(wrong, origin="train.yaml")
    assert str(error.value).startswith("train.yaml: `")
    assert [part for part in said if part not in str(error.value)] == []


def test_every_mistake_is_listed() -> None:
    wrong = {**stage(warmup_steps=9, batch_size=3, micro_batches=2), "name": "a/b", "output": "s3://x/y"}
    with pytest.raises(ConfigError) as error:
        training_file.parse(wrong, origin="train.yaml")
    assert [line.partition("`: ")[0] for line in str(error.value).splitlines()] == [
        "train.yaml: `name",
        "train.yaml: `output",
        "train.yaml: `stages[0].batch_size",
        "train.yaml: `stages[0].warmup_steps",
    ]


def test_a_credential_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as error:
        training_file.parse(content(source={"uri": "s3://key:hunter2@bucket/x"}))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    assert training_file.load(path).stages


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"train_finetune", "train_overfit"}
