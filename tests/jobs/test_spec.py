import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from jobs import spec
from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task

FOLDER = Path(spec.__file__).parent / "examples"
SHA = "7e3e67edbbed1bf9888184d9df282b700a323964"
EXAMPLES = sorted(set(FOLDER.glob("*.yaml")) - set(FOLDER.glob("train_*.yaml")))


def content(**changes: Any) -> dict[str, Any]:
    """A job file's content; `section__key=value` changes one key of a section."""
    base: dict[str, Any] = {
        "name": "receipts",
        "source": {"uri": "s3://bucket/receipts/"},
        "output": {"uri": "s3://bucket/receipts-text/"},
        "model": {"id": "HuggingFaceTB/SmolVLM-256M-Instruct", "revision": SHA},
        "tasks": [{"name": "caption", "prompt": "Describe this image."}],
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            base[section] = {**base.get(section, {}), key: value}
        else:
            base[section] = value
    return base


def task(**changes: Any) -> dict[str, Any]:
    return {"name": "caption", "prompt": "Describe this image.", **changes}


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_job_file_of_the_readme(tmp_path: Path) -> None:
    text = f"""
name: receipts
source: {{uri: s3://bucket/receipts/}}
output: {{uri: s3://bucket/receipts-text/}}
model: {{id: HuggingFaceTB/SmolVLM-256M-Instruct, revision: {SHA}, dtype: bfloat16}}
tasks:
  - {{name: caption, prompt: "Describe this image.", max_new_tokens: 128}}
  - {{name: ocr, prompt: "Transcribe all text.", max_new_tokens: 1024}}
image: {{longest_edge: 2048, upscale: false}}
engine: {{mode: dedicated, replicas: [1, 8], gpus: 1}}
"""
    assert spec.load(write(tmp_path, text)).to_job() == Job(
        name="receipts",
        source=Source("s3://bucket/receipts/"),
        output=Output("s3://bucket/receipts-text/"),
        model=Model("HuggingFaceTB/SmolVLM-256M-Instruct", SHA, "bfloat16"),
        tasks=(Task("caption", "Describe this image.", 128), Task("ocr", "Transcribe all text.", 1024)),
        image=ImageOptions(longest_edge=2048, upscale=False),
        engine=EngineOptions(replicas=(1, 8), gpus=1),
    )


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    from_json = spec.load(write(tmp_path, json.dumps(content()), "job.json"))
    assert from_json == spec.load(write(tmp_path, yaml.safe_dump(content())))


def test_a_date_stays_text(tmp_path: Path) -> None:
    text = yaml.safe_dump(content()).replace("name: receipts", "name: 2024-01-01")
    assert spec.load(write(tmp_path, text)).name == "2024-01-01"


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    job = spec.parse(content(source__uri="photos", output__uri="out", model={"id": "checkpoint"})).to_job()
    assert (job.source.uri, job.output.uri, job.model.id) == tuple(
        str(tmp_path / name) for name in ("photos", "out", "checkpoint")
    )


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key at the top": (content(taks=[]), ["`taks`", "unknown key", "did you mean `tasks`"]),
    "unknown key in a section": (
        content(source__colum="x"),
        ["`source.colum`", "did you mean `column`", "endpoint_url"],
    ),
    "unknown key in a task": (content(tasks=[task(promt="x")]), ["`tasks[0].promt`", "did you mean `prompt`"]),
    "missing section": (
        {"name": "x"},
        ["`source`: missing", "`output`: missing", "`model`: missing", "`tasks`: missing"],
    ),
    "missing key": (content(tasks=[{"name": "a"}]), ["`tasks[0].prompt`: missing"]),
    "section is a text": (content(source="s3://bucket/x/"), ["`source`", "must be a mapping of keys (uri, format"]),
    "section is null": (content(model=None), ["`model`", "null", "must be a mapping of keys (id, revision"]),
    "no tasks": (content(tasks=[]), ["`tasks`", "must not be empty"]),
    "tasks is a mapping": (content(tasks=task()), ["`tasks`", "must be a list"]),
    "task twice": (content(tasks=[task(), task()]), ["`tasks[1].name`", '"caption"', "rename one"]),
    "task twice but for case": (content(tasks=[task(), task(name="Caption")]), ["`tasks[1].name`", "rename one"]),
    "task named like a column": (content(tasks=[task(name="uri")]), ["`tasks[0].name`", '"uri"', "choose another"]),
    "task name no identifier": (content(tasks=[task(name="my-task")]), ["`tasks[0].name`", '"my-task"', "letters"]),
    "blank prompt": (content(tasks=[task(prompt="  ")]), ["`tasks[0].prompt`", "write the prompt"]),
    "no tokens": (content(tasks=[task(max_new_tokens=0)]), ["`tasks[0].max_new_tokens`", ": 0:", "greater than 0"]),
    "number as text": (content(tasks=[task(max_new_tokens="128")]), ['"128"', "whole number, without quotes"]),
    "half a token": (content(tasks=[task(max_new_tokens=1.5)]), ["1.5", "whole number"]),
    "temperature as text": (content(tasks=[task(temperature="1e-1")]), ['"1e-1"', "must be a number"]),
    "negative temperature": (content(tasks=[task(temperature=-1)]), ["-1", "greater than or equal to 0"]),
    "top_p of 0": (content(tasks=[task(top_p=0)]), ["`tasks[0].top_p`", "greater than 0"]),
    "not a truth value": (content(image__upscale="no"), ["`image.upscale`", '"no"', "must be true or false"]),
    "edge too long": (content(image__longest_edge=100_000), ["`image.longest_edge`", "4096"]),
    "NaN": (content(image__timeout_s=float("nan")), ["`image.timeout_s`", "nan", "finite number"]),
    "bytes": (content(name=b"x"), ["`name`", "b'x'", "cannot stand in a job file"]),
    "unknown format": (content(source__format="tars"), ["`source.format`", '"tars"', "'webdataset'"]),
    "unknown dtype": (content(model__dtype="int8"), ["`model.dtype`", '"int8"', "'bfloat16'"]),
    "unknown quantization": (content(model__quantization="int4"), ["`model.quantization`", '"int4"', "'int8'"]),
    "integers on a GPU": (
        content(model__quantization="int8", engine__gpus=1),
        ["`model.quantization`", "for CPUs", "engine.gpus 0"],
    ),
    "integers beside float16": (
        content(model__quantization="int8", model__dtype="float16"),
        ["`model.dtype`", '"float16"', "float32 or bfloat16"],
    ),
    "8-bit floats beside float32 on a GPU": (
        content(model__quantization="fp8", model__dtype="float32", engine__gpus=1),
        ["`model.dtype`", '"float32"', "bfloat16 on a GPU"],
    ),
    "unknown cache": (content(model__kv_cache_dtype="int8"), ["`model.kv_cache_dtype`", '"int8"', "'fp8'"]),
    "column of images": (content(source__format="images", source__column="x"), ["`source.column`", "no columns"]),
    "blank glob": (content(source__glob=" "), ["`source.glob`", "**/*.jpg"]),
    "unknown scheme": (content(source__uri="s4://b/x"), ["`source.uri`", '"s4://b/x"', "did you mean s3://"]),
    "one slash": (content(source__uri="s3:/b/x"), ["`source.uri`", '"s3:/b/x"', "s3://"]),
    "capital scheme": (content(source__uri="S3://b/x"), ["`source.uri`", "did you mean s3://"]),
    "no bucket": (content(source__uri="s3://"), ["`source.uri`", "add the bucket"]),
    "empty url": (content(output__uri=""), ["`output.uri`", "empty"]),
    "http output": (content(output__uri="https://host/x"), ["`output.uri`", "reading only"]),
    "endpoint for files": (
        content(source={"uri": "/data", "endpoint_url": "http://host:1"}),
        ["`source.endpoint_url`", "s3:// URL only"],
    ),
    "endpoint without scheme": (content(source__endpoint_url="host:9000"), ["`source.endpoint_url`", "http(s)://host"]),
    "unpinned model": (content(model={"id": "owner/model"}), ["`model.revision`", "null", "40 hex digits"]),
    "branch as revision": (content(model__revision="main"), ["`model.revision`", '"main"', "40 hex digits"]),
    "no such checkpoint": (content(model={"id": "/no/such"}), ["`model.id`", '"/no/such"', "no such directory"]),
    "bundled with revision": (content(model={"id": "bundled", "revision": SHA}), ["`model.revision`", "leave it out"]),
    "replicas reversed": (content(engine__replicas=[8, 1]), ["`engine.replicas`", "[8, 1]", "write [1, 8]"]),
    "replicas one number": (content(engine__replicas=4), ["`engine.replicas`", "4", "must be a list"]),
    "replicas of three": (content(engine__replicas=[1, 2, 3]), ["`engine.replicas`", "at most 2"]),
    "no replicas": (content(engine__replicas=[0, 1]), ["`engine.replicas[0]`", "greater than 0"]),
    "workers reversed": (content(engine__prepare_workers=[3, 2]), ["`engine.prepare_workers`", "write [2, 3]"]),
    "one and a half GPUs": (content(engine__gpus=1.5), ["`engine.gpus`", "1.5", "whole number"]),
    "unknown mode": (content(engine__mode="borrowed"), ["`engine.mode`", '"borrowed"', "'dedicated'"]),
    "limit of 0": (content(limit=0), ["`limit`", "greater than 0"]),
    "limit is a truth value": (content(limit=True), ["`limit`", "true", "whole number"]),
    "negative seed": (content(seed=-1), ["`seed`", "-1"]),
    "job name with a slash": (content(name="a/b"), ["`name`", '"a/b"', "letters"]),
    "cost without a price": (
        content(limits__max_cost=5),
        ["`limits.price_per_hour`", "null", "replica costs"],
    ),
    "price without a cost": (content(limits__price_per_hour=2), ["`limits.max_cost`", "leave both out"]),
    "free of charge": (content(limits__max_cost=0), ["`limits.max_cost`", "greater than 0"]),
    "time without a zone": (content(limits__finish_by="2026-11-25T18:00:00"), ["`limits.finish_by`", "+01:00"]),
    "no time at all": (
        content(limits__finish_by="tomorrow"),
        ["`limits.finish_by`", '"tomorrow"', "and zone"],
    ),
    "no images": (content(limits__max_images=0), ["`limits.max_images`", "greater than 0"]),
}

WRONG_ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "no job file": (["run"], "Missing argument 'JOB.yaml'"),
    "job file that is not there": (["run", "/no/such.yaml"], "/no/such.yaml: no such file"),
    "unknown command": (["capton"], "No such command 'capton'"),
    "unknown option": (["run", "JOB", "--lmit", "3"], "No such option: --lmit"),
    "limit of 0": (["run", "JOB", "--limit", "0"], "`limit`: 0: must be greater than 0"),
    "limit no number": (["run", "JOB", "--limit", "many"], "'--limit': Input should be a valid integer"),
    "unknown dtype": (["run", "JOB", "--dtype", "int4"], '`model.dtype`: "int4": must be one of'),
    "unknown quantization": (["run", "JOB", "--quantization", "int4"], '`model.quantization`: "int4": must be one of'),
    "replicas reversed": (["run", "JOB", "--replicas", "8", "1"], "`engine.replicas`: [8, 1]: the smallest"),
    "one and a half GPUs": (["run", "JOB", "--gpus", "1.5"], "`engine.gpus`: 1.5: use a whole number"),
    "endpoint without scheme": (["run", "JOB", "--endpoint-url", "host:9"], "`source.endpoint_url`"),
    "another model without revision": (["run", "JOB", "--model", "a/b"], "`model.revision`: null: a hub model is"),
    "share above 1": (
        ["run", "JOB", "--max-error-share", "2"],
        "'--max-error-share': Input should be less than or equal to 1",
    ),
    "no output": (["caption", "s3://b/x"], "Missing option '--output'"),
    "output to http": (["ocr", "s3://b/x", "-o", "https://host/x"], "`output.uri`"),
    "plan of no images": (["plan", "JOB", "--sample", "0"], "'--sample': Input should be greater than or equal to 1"),
    "profile that is not there": (["plan", "JOB", "--profile", "/no/p.json"], "--profile /no/p.json: "),
    "price below 0": (["plan", "JOB", "--price", "-1"], "'--price': Input should be greater than or equal to 0"),
    "cluster without scheme": (["submit", "JOB", "--address", "host:6379"], "--address host:6379: give the address"),
    "secret with its value": (["preflight", "JOB", "--secret", "A=hunter2"], "--secret A: not the name"),
    "logs of nothing": (["logs"], "Missing argument 'ID'"),
    "cancel of nothing": (["cancel"], "Missing argument 'ID'"),
    "verify of nothing": (["verify"], "Missing argument 'DEST'"),
    "port out of range": (["serve", "--port", "70000"], "`port`: 70000: must be less than or equal to 65535"),
    "open to all without keys": (["serve", "--host", "0.0.0.0"], "0.0.0.0"),
    "temperature above 2": (["chat", "--temperature", "3"], "'--temperature': Input should be less than or equal to 2"),
}
REFUSED_WITHIN_S = 2.0


@pytest.mark.parametrize(("wrong", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_key_value_and_remedy(wrong: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        spec.parse(wrong, origin="job.yaml")
    assert str(error.value).startswith("job.yaml: ")
    assert [part for part in said if part not in str(error.value)] == []


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever would start an actor or fetch a model."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a mistake must be refused before anything starts")

    for name in ("jobs.run.ray_session", "jobs.run.resolve_checkpoint"):
        monkeypatch.setattr(name, refuse)


def refused(arguments: list[str]) -> str:
    """What the command line says about a mistake, in one line; the CPU time it took stands for a quiet machine's."""
    started_s = time.process_time()
    done = CliRunner().invoke(app, arguments)
    assert time.process_time() - started_s < REFUSED_WITHIN_S
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    return " ".join(done.stderr.replace("│", " ").split())


IN_A_FILE = {name: case for name, case in WRONG.items() if name != "bytes"}  # YAML has no such thing


@pytest.mark.parametrize(("wrong", "said"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_wrong_job_file_is_refused_at_once(
    tmp_path: Path, no_ray: None, wrong: dict[str, Any], said: list[str]
) -> None:
    answer = refused(["run", str(write(tmp_path, yaml.safe_dump(wrong)))])
    assert [part for part in said if part not in answer] == []


@pytest.mark.parametrize(("arguments", "said"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_at_once(tmp_path: Path, no_ray: None, arguments: list[str], said: str) -> None:
    job = str(write(tmp_path, yaml.safe_dump(content())))
    assert said in refused([job if word == "JOB" else word for word in arguments])


def test_every_mistake_is_listed_and_nothing_else() -> None:
    with pytest.raises(ConfigError) as error:
        spec.parse(content(limit=0, image__upscale=1, tasks=[task(promt="x")]), origin="job.yaml")
    assert [line.partition("`: ")[0] for line in str(error.value).splitlines()] == [
        "job.yaml: `tasks[0].promt",
        "job.yaml: `image.upscale",
        "job.yaml: `limit",
    ]


SECRET = "hunter2hunter2"
LEAKS: dict[str, dict[str, Any]] = {
    "password in the url": content(source__uri=f"s3://key:{SECRET}@bucket/x"),
    "password in the endpoint": content(source__endpoint_url=f"https://user:{SECRET}@host"),
    "signed url": content(source__uri=f"https://host/list.csv?X-Amz-Signature={SECRET}"),
    "AWS key id": content(output__uri="s3://bucket/AKIAIOSFODNN7EXAMPLE/"),
    "section is a url with a password": content(source=f"s3://key:{SECRET}@bucket/x"),
    "unknown key with a secret": content(source__aws_secret_access_key=SECRET),
}


@pytest.mark.parametrize("wrong", LEAKS.values(), ids=LEAKS)
def test_a_credential_is_refused_and_not_repeated(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        spec.parse(wrong)
    assert SECRET not in str(error.value)
    assert "AKIA" not in str(error.value)


DOCUMENTS = {
    "empty": ("job.yaml", "", "the file is empty"),
    "only a comment": ("job.yaml", "# nothing\n", "the file is empty"),
    "empty JSON": ("job.json", " ", "the file is empty"),
    "a list": ("job.yaml", "- a\n- b\n", "the top level is a list"),
    "a text": ("job.yaml", "hello\n", "the top level is a text"),
    "key twice": ("job.yaml", "name: a\nname: b\n", "line 2: key `name` stands twice"),
    "nested key twice": ("job.yaml", "source:\n  uri: a\n  uri: b\n", "line 3: key `uri` stands twice"),
    "key twice in JSON": ("job.json", '{"name": "a", "name": "b"}', "key `name` stands twice"),
    "broken YAML": ("job.yaml", "name: [a\n", "not valid YAML: line 2"),
    "python tag": ("job.yaml", "name: !!python/object/apply:os.getcwd []\n", "not valid YAML: line 1"),
    "broken JSON": ("job.json", '{"name": }', "not valid JSON: line 1"),
    "other suffix": ("job.txt", "name: a\n", "ends in .yaml, .yml or .json"),
}


@pytest.mark.parametrize(("name", "text", "said"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_file_that_is_no_job_file(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(ConfigError) as error:
        spec.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "huge.yaml").write_text("#" * 1_000_001)
    for name, said in {
        "latin": "not UTF-8",
        "folder": "cannot be read",
        "huge": "too large",
        "none": "no such file",
    }.items():
        with pytest.raises(ConfigError, match=said):
            spec.load(tmp_path / f"{name}.yaml")


def test_the_committed_schema_is_current() -> None:
    assert spec.SCHEMA_PATH.read_text() == spec.schema_text(), "run: smolvlm schema > jobs/job.schema.json"


def test_the_schema_takes_right_files_and_refuses_wrong_keys() -> None:
    validator = jsonschema.Draft202012Validator(spec.json_schema())
    assert list(validator.iter_errors(content())) == []
    for wrong in (content(x=1), content(source__x=1), content(tasks=[task(x=1)]), content(tasks=[]), content(seed=-1)):
        assert len(list(validator.iter_errors(wrong))) == 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert path.read_text().startswith("# yaml-language-server: $schema=../job.schema.json\n")
    assert spec.load(path).to_job().name == path.stem


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"receipts", "webdataset", "parquet"}
