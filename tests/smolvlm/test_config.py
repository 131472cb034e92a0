"""Configs as published, as older and newer transformers write them, and those that are refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolvlm.config import ImageConfig, ModelConfig

DATA = Path(__file__).parents[3] / "shared" / "data" / "smolvlm"


@pytest.fixture
def rewrite(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give a function that copies the tiny checkpoint's JSON files with changed contents."""

    def apply(**changes: Callable[[dict[str, Any]], object]) -> Path:
        for file in tiny_checkpoint.glob("*.json"):
            content = json.loads(file.read_text())
            if file.stem in changes:
                changes[file.stem](content)
            (tmp_path / file.name).write_text(json.dumps(content))
        return tmp_path

    return apply


@pytest.mark.parametrize(
    ("name", "vision", "text", "image", "sequence"),
    [
        ("256m", (512, 16, 768, 3072, 12, 12), (576, 1536, 30, 9, 3, 1e5), (512, 2048), (4, 64)),
        ("500m", (512, 16, 768, 3072, 12, 12), (960, 2560, 32, 15, 5, 1e5), (512, 2048), (4, 64)),
        ("2.2b-v2", (384, 14, 1152, 4304, 27, 16), (2048, 8192, 24, 32, 32, 1.3e5), (384, 1536), (3, 81)),
    ],
)
def test_published_configs(
    name: str,
    vision: tuple[int, ...],
    text: tuple[int, int, int, int, int, float],
    image: tuple[int, int],
    sequence: tuple[int, int],
) -> None:
    if not DATA.exists():
        pytest.skip("the published configs are not beside this checkout")
    config = ModelConfig.from_pretrained(DATA / name)
    v, t = config.vision, config.text
    assert (v.image_size, v.patch_size, v.hidden_size, v.intermediate_size, v.num_layers, v.num_heads) == vision
    assert (v.num_channels, v.layer_norm_eps, v.head_dim) == (3, 1e-6, vision[2] // vision[5])
    assert v.num_patches == (vision[0] // vision[1]) ** 2
    read = (t.hidden_size, t.intermediate_size, t.num_layers, t.num_heads, t.num_kv_heads, t.rope_theta)
    assert read == text
    assert (t.head_dim, t.vocab_size, t.max_positions, t.rms_norm_eps) == (64, 49280, 8192, 1e-5)
    assert (config.image.tile_size, config.image.longest_edge) == image
    assert (config.image.mean, config.image.std, config.image.do_image_splitting) == ((0.5,) * 3, (0.5,) * 3, True)
    assert (config.scale_factor, config.image_seq_len) == sequence
    assert (config.image_token_id, config.eos_token_ids, config.tie_word_embeddings) == (49190, (49279,), False)


def test_missing_keys_take_the_defaults_of_transformers(rewrite: Callable[..., Path]) -> None:
    """The published 2.2B configs leave out what equals the defaults."""
    omitted = ("hidden_size", "num_attention_heads", "layer_norm_eps", "num_channels", "hidden_act")

    def change(config: dict[str, Any]) -> None:
        for key in omitted:
            del config["vision_config"][key]
        for key in ("head_dim", "hidden_act", "attention_bias", "mlp_bias"):
            del config["text_config"][key]

    config = ModelConfig.from_pretrained(rewrite(config=change))
    assert (config.vision.hidden_size, config.vision.num_heads) == (1152, 16)
    assert (config.vision.layer_norm_eps, config.vision.num_channels) == (1e-6, 3)
    assert config.text.head_dim == config.text.hidden_size // config.text.num_heads


def test_smolvlm_is_read_like_idefics3(rewrite: Callable[..., Path], tiny_checkpoint: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["model_type"] = "smolvlm"
        config["vision_config"]["model_type"] = "smolvlm_vision"

    assert ModelConfig.from_pretrained(rewrite(config=change)) == ModelConfig.from_pretrained(tiny_checkpoint)


def test_theta_is_found_where_older_configs_keep_it(rewrite: Callable[..., Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["text_config"]["rope_parameters"]
        config["text_config"] |= {"rope_theta": 273768.0, "rope_scaling": None}

    assert ModelConfig.from_pretrained(rewrite(config=change)).text.rope_theta == 273768.0


FIRST_2B = """{
"scale_factor": 3, "image_token_id": 49153, "vocab_size": 49155, "pad_token_id": 128002,
"vision_config": {"model_type": "idefics3", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "use_base_siglip": false,
    "max_image_size": {"longest_edge": 384}, "size": {"longest_edge": 1536}, "tie_word_embeddings": false},
"text_config": {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rope_scaling": null, "rope_theta": 273768.0, "max_position_embeddings": 16384, "vocab_size": 49155,
    "rms_norm_eps": 1e-05, "pad_token_id": 2, "pixel_shuffle_factor": 3, "qk_layer_norms": false}
}"""


def test_the_first_2b_checkpoint(rewrite: Callable[..., Path]) -> None:
    """Written by early training code: theta in its old place, keys that nobody reads any more."""

    def change(config: dict[str, Any]) -> None:
        config |= json.loads(FIRST_2B)

    config = ModelConfig.from_pretrained(rewrite(config=change))
    assert (config.vision.head_dim, config.vision.num_patches, config.image_seq_len) == (72, 729, 81)
    assert (config.text.head_dim, config.text.num_kv_heads, config.text.rope_theta) == (64, 32, 273768.0)
    assert (config.text.vocab_size, config.text.max_positions, config.text.rms_norm_eps) == (49155, 16384, 1e-5)


def test_a_missing_theta_is_not_guessed(rewrite: Callable[..., Path]) -> None:
    directory = rewrite(config=lambda config: config["text_config"].pop("rope_parameters"))
    with pytest.raises(ValueError, match="names no rope_theta"):
        ModelConfig.from_pretrained(directory)


def test_all_ends_of_an_answer_count(rewrite: Callable[..., Path]) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["eos_token_id"] = 0

    directory = rewrite(config=change, generation_config=lambda config: config.update(eos_token_id=[2, 7]))
    end_of_utterance = ModelConfig.from_pretrained(directory).text.vocab_size - 1
    assert ModelConfig.from_pretrained(directory).eos_token_ids == (0, 2, 7, end_of_utterance)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        (None, "model_type", "llava", "model_type 'llava' is not a SmolVLM"),
        ("text_config", "model_type", "mistral", "text_config.model_type is 'mistral'"),
        ("text_config", "hidden_act", "gelu", "text_config.hidden_act is 'gelu'.*'silu'"),
        ("text_config", "attention_bias", True, "text_config.attention_bias is True"),
        ("text_config", "mlp_bias", True, "text_config.mlp_bias is True"),
        ("vision_config", "hidden_act", "gelu", "vision_config.hidden_act is 'gelu'"),
        ("vision_config", "patch_size", [8, 8], r"vision_config.patch_size is \[8, 8\]"),
        ("text_config", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "'linear'"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(
    rewrite: Callable[..., Path], section: str | None, key: str, value: object, words: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        (config[section] if section else config)[key] = value

    with pytest.raises(ValueError, match=words):
        ModelConfig.from_pretrained(rewrite(config=change))


def test_another_resampling_filter_is_refused(rewrite: Callable[..., Path]) -> None:
    directory = rewrite(preprocessor_config=lambda config: config.update(resample=3))
    with pytest.raises(ValueError, match="resample 3 in preprocessor_config"):
        ImageConfig.from_pretrained(directory)


def test_the_image_config_may_stand_inside_the_processor_config(rewrite: Callable[..., Path]) -> None:
    """transformers 5 writes one file when it saves a whole processor."""
    directory = rewrite()
    own = directory / "preprocessor_config.json"
    expected = ImageConfig.from_pretrained(directory)
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(own.read_text())}))
    own.unlink()
    assert ImageConfig.from_pretrained(directory) == expected


def test_an_incomplete_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        ImageConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.from_pretrained(tmp_path)


def test_the_image_config_needs_no_transformers(tiny_checkpoint: Path) -> None:
    script = (
        "import sys; from smolvlm.config import ImageConfig; ImageConfig.from_pretrained(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
