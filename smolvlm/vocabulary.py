"""SmolVLM's tokenizer around a byte-level BPE vocabulary: which special tokens there are and which ids they have.

The published order: 17 special tokens of SmolLM2 first, then the BPE vocabulary, then SmolVLM's 128 added tokens.
"""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolvlm.config import END_OF_UTTERANCE

BOS, PAD = "<|im_start|>", "<|im_end|>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"

# fmt: off
LEADING_TOKENS = (
    "<|endoftext|>", BOS, PAD, "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>",
    "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
    "<jupyter_script>", "<empty_output>",
)
# fmt: on
ADDED_TOKENS = (
    GLOBAL,
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    FAKE,
    IMAGE,
    *(f"<|reserved_special_token_{index}|>" for index in range(88)),
    END_OF_UTTERANCE,
)

# Enough for a tokenizer that compresses chat and captions somewhat; `\n\n` must become one token, as in the real one.
TRAINING_TEXT = """\
User: What is in this image?
Assistant: The image shows a small red house beside a lake, with two people and a dog in front of the house.

User: Describe this image. Can you describe the picture?
Assistant: This is a photograph of a street in the city. There are cars, trees and a sign with text on it.

User: Transcribe all text in the image.
Assistant: The text of the page is: Invoice number 1, date, total amount, thank you for your order.

User: What color is the car? How many people are there? Where is the cat? Is it day or night?
Assistant: The car is blue. There are three people. The cat is on the table, next to the window. It is night.

"""


def train_tokenizer(num_base_tokens: int) -> Tokenizer:
    """Train a compact tokenizer on a built-in text. It has `num_base_tokens` + 128 tokens.

    Ids that the text gives no merge for are filled with tokens that no text produces, so that the added tokens have
    the published ids at the published size. Raises ValueError below 17 special tokens + 256 bytes.
    """
    if num_base_tokens < len(LEADING_TOKENS) + 256:
        raise ValueError(f"num_base_tokens {num_base_tokens} must be at least {len(LEADING_TOKENS) + 256}")
    tokenizer = _empty(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=num_base_tokens,
        special_tokens=list(LEADING_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    return assemble_tokenizer(*_vocabulary_and_merges(tokenizer), num_base_tokens)


def assemble_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], num_base_tokens: int) -> Tokenizer:
    """Build the tokenizer from a byte-level BPE vocabulary (its ids count from 0 and begin with the leading tokens)."""
    filler = {f"<|unused_{index}|>": index for index in range(len(vocabulary), num_base_tokens)}
    tokenizer = _empty(models.BPE(vocab=vocabulary | filler, merges=merges))
    tokenizer.add_special_tokens([_special(content) for content in LEADING_TOKENS + ADDED_TOKENS])
    assert tokenizer.get_vocab_size() == num_base_tokens + len(ADDED_TOKENS)
    return tokenizer


def token_id(tokenizer: Tokenizer, content: str) -> int:
    """The id of a token that must be there. Raises ValueError naming it where it is not."""
    found = tokenizer.token_to_id(content)
    if found is None:
        raise ValueError(f"the tokenizer has no token {content!r}; it is not SmolVLM's")
    return found


def _empty(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(content: str) -> AddedToken:
    return AddedToken(content, normalized=False, special=True)


def _vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
