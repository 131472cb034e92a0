"""The engine: add requests, step until they are done."""

from __future__ import annotations

import logging
from collections import abc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from smolvlm.attention import KVCache
from smolvlm.config import ModelConfig
from smolvlm.cpu.build import native_library
from smolvlm.engine.admission import Limits
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.prefix import BlockKeys, TileNames, by_content, by_identity
from smolvlm.engine.runner import Chosen, DecodeMode, Runner
from smolvlm.engine.scheduler import Decode, Encode, Prefill, Scheduler, Work
from smolvlm.engine.sequence import BATCH, ONLINE, Completion, OnToken, Sequence, Token
from smolvlm.engine.stats import Counters
from smolvlm.hub import resolve_checkpoint
from smolvlm.model import SmolVLM
from smolvlm.packed import can_pack, pack_linears
from smolvlm.precision import cache_dtype_named, dtype_named
from smolvlm.quantization import check_quantization, quantize
from smolvlm.sampling import SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from smolvlm.processor import ModelInput

logger = logging.getLogger(__name__)

GIB = 2**30
BLOCK_SIZE = 16
CPU_LIMITS = Limits(16, 2048, tile_batch=1, online_sequences=16, piece_tokens=512, piece_tiles=1)
GPU_LIMITS = Limits(256, 16384, tile_batch=64, online_sequences=128, piece_tokens=4096, piece_tiles=8)
ONLINE_SHARE = 8  # one page in so many is kept for online sequences
AHEAD_BYTES = GIB // 4  # of a GPU, for features of tiles that are encoded before their sequences have pages
CPU_CACHE_BYTES = GIB * ONLINE_SHARE // (ONLINE_SHARE - 1)  # 1 GiB for batch work


class PromptTooLong(ValueError):
    """A prompt that leaves no room for an answer, in the model's context or in the key/value cache."""


class Engine:
    """Generates answers for many inputs at once, on one device. Not thread-safe: EngineLoop gives it a thread.

    New sequences join between steps and finished ones leave. What an input holds (tiles, image features, cache pages)
    is given back as soon as it is used up. With `prefix_caching`, prompts that begin alike share the pages of what they
    have in common: the turns of a conversation, and several tasks on one image that precedes them.
    """

    def __init__(
        self,
        model: SmolVLM,
        cache: KVCache,
        num_blocks: int,
        limits: Limits,
        device: torch.device,
        prefix_caching: bool = True,
        decode: DecodeMode | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.max_tokens = min(model.config.text.max_positions, (num_blocks - limits.online_blocks) * cache.block_size)
        self.prefix_caching = prefix_caching
        self.runner = Runner(model, cache, device, decode)
        self.scheduler = Scheduler(limits, BlockManager(num_blocks, cache.block_size), self.runner.vision)
        self.counters = Counters()
        self._tile_digests, self._tile_identities = TileNames(by_content), TileNames(by_identity)
        self._eos_token_ids = frozenset(model.config.eos_token_ids)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        *,
        max_num_sequences: int | None = None,
        max_num_tokens: int | None = None,
        tile_batch: int | None = None,
        kv_cache_bytes: int | None = None,
        prefix_caching: bool = True,
        decode: DecodeMode | None = None,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
    ) -> Engine:
        """Load a checkpoint directory or a pinned hub revision.

        Args:
            path: directory, or hub id together with `revision`.
            device: "cpu", "cuda" or "cuda:N". Threads on a CPU are the caller's choice (torch.set_num_threads).
            dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device is fast at it,
                else float32.
            max_num_sequences: answers generated together, default 16 on a CPU, 256 elsewhere; 16 or 128 more if online.
            max_num_tokens: prompt tokens per prefill; default 2,048 on a CPU, 16,384 elsewhere.
            tile_batch: tiles per encoder batch; default 1 on a CPU, 64 elsewhere.
            kv_cache_bytes: memory for keys and values, an eighth of it for online sequences alone once there are any;
                default 8/7 GiB on a CPU, touched as needed, else most of what is free after loading.
            prefix_caching: compute equal beginnings of prompts once.
            decode: "graph", the default on a GPU, replays CUDA graphs around kernels written in Triton; "eager", the
                default on a CPU, runs torch's own operators one by one.
            quantization: "int8" rounds the weights of all blocks to 8-bit integers, and their inputs as they come:
                faster on a CPU without bfloat16 tiles (AMX), slightly less exact. "fp8" rounds weights and inputs of
                the encoder's linear layers to 8-bit floats, for GPUs of compute capability 8.9 or above in bfloat16; a
                CPU computes the same, slowly.
            kv_cache_dtype: "fp8" keeps keys and values as 8-bit floats (e4m3), so that the same memory holds two or
                four times as many tokens, slightly less exact; "auto" keeps them as they are computed.

        Raises:
            ValueError: an argument is out of range, or the checkpoint is not one that this model can load.
            ImportError: `decode` is "graph" and Triton is not installed.
        """
        place = torch.device(device)
        kind = dtype_named(dtype, place)
        _check_decode(decode, place)
        cache_kind = cache_dtype_named(kv_cache_dtype, kind, place)
        check_quantization(quantization, place, kind)
        given = {"max_num_sequences": max_num_sequences, "max_num_tokens": max_num_tokens, "tile_batch": tile_batch}
        limits = _limits(place, {name: value for name, value in given.items() if value is not None})
        model = _load(resolve_checkpoint(str(path), revision), place, kind, quantization)
        budget = _default_cache_bytes(place) if kv_cache_bytes is None else kv_cache_bytes
        num_blocks = _num_blocks(model.config, budget, limits, cache_kind)
        limits = replace(limits, online_blocks=num_blocks // ONLINE_SHARE, ahead_tiles=_ahead_tiles(model.config, kind))
        cache = KVCache(model.config.text, num_blocks, BLOCK_SIZE, place, cache_kind)
        return cls(model, cache, num_blocks, limits, place, prefix_caching, decode)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def prepare(
        self, model_input: ModelInput, params: SamplingParams, priority: int = BATCH, on_token: OnToken | None = None
    ) -> Sequence:
        """Check an input and make a sequence of it, without queueing it. Safe to call from any thread.

        `max_new_tokens` is lowered to what the context and the cache leave beside the prompt.

        Raises:
            PromptTooLong: the prompt leaves no room for an answer.
            ValueError: no tokens, unknown tokens, or image tokens that do not match the tiles.
        """
        prompt = model_input.prompt_token_ids
        _check_prompt(prompt, self.config.text.vocab_size)
        _check_tiles(model_input, self.config)
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"prompt has {len(prompt)} tokens; context and cache leave room for {self.max_tokens - 1}: use fewer "
                "or smaller images (longest_edge, image_splitting=False), a shorter text, or a larger kv_cache_bytes"
            )
        max_new_tokens = min(params.max_new_tokens, room)
        ends, keys = self._tile_ends(model_input), self._keys(model_input, priority)
        return Sequence(list(prompt), list(model_input.tiles), params, priority, max_new_tokens, on_token, ends, keys)

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a prepared sequence."""
        self.scheduler.add(sequence)

    def add(self, model_input: ModelInput, params: SamplingParams, priority: int = BATCH) -> Sequence:
        """Queue an input; sequences of higher priority are admitted first. Raises as `prepare` does."""
        sequence = self.prepare(model_input, params, priority)
        self.enqueue(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Do the next piece of work and return the sequences that it finished.

        Where the device has no memory for it, the work is queued again and its limit halved, with a warning in the log.
        """
        self.counters.steps += 1
        work = self.scheduler.schedule()
        try:
            with _current(self.runner.device):
                return self._do(work)
        except torch.OutOfMemoryError:
            limit = None if work is None else self.scheduler.halve(work)
            if limit is None:
                raise
            logger.warning("the device ran out of memory; from here on at most %s", limit)
        _release_unused(self.runner.device)  # out here, since the exception kept what the failed work had taken
        return []

    def _do(self, work: Work | None) -> list[Sequence]:
        match work:
            case Encode(spans):
                self.runner.encode(spans)
            case Prefill(sequences):
                chosen = self.runner.prefill(sequences)
                complete = self.scheduler.start(sequences)
                self.counters.prompt_tokens += sum(len(sequence.prompt_token_ids) for sequence in complete)
                self.counters.cached_tokens += sum(sequence.num_cached for sequence in complete)
                return self._finish(complete, chosen)
            case Decode(sequences):
                return self._finish(sequences, self.runner.decode(sequences))
        return []

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now (finish_reason "aborted") and free what it holds; one that is finished stays as it is."""
        self.scheduler.abort(sequence)

    def generate(
        self, inputs: abc.Sequence[ModelInput], params: SamplingParams | abc.Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answer all inputs; completions come in the order of the inputs. One `params` for all, or one each.

        Raises as `prepare` does, before any work is done, naming the input.
        """
        each = [params] * len(inputs) if isinstance(params, SamplingParams) else params
        if len(each) != len(inputs):
            raise ValueError(f"{len(each)} SamplingParams for {len(inputs)} inputs; give one, or one for each input")
        sequences = [self._prepare_numbered(*item) for item in zip(range(len(inputs)), inputs, each, strict=True)]
        for sequence in sequences:
            self.enqueue(sequence)
        try:
            while any(sequence.finish_reason is None for sequence in sequences):
                self.step()
        finally:
            for sequence in sequences:
                self.abort(sequence)
        return [sequence.completion() for sequence in sequences]

    def _tile_ends(self, model_input: ModelInput) -> list[list[int]]:
        """Where in the prompt the tokens of each image's tiles end."""
        if not model_input.tiles:
            return []
        positions = np.flatnonzero(np.asarray(model_input.prompt_token_ids) == self.config.image_token_id)
        ends = positions[self.config.image_seq_len - 1 :: self.config.image_seq_len] + 1
        counts = [len(tiles.pixels) for tiles in model_input.tiles]
        return [part.tolist() for part in np.split(ends, np.cumsum(counts)[:-1])]

    def _keys(self, model_input: ModelInput, priority: int) -> BlockKeys | None:
        if not self.prefix_caching:
            return None
        name = self._tile_digests if priority >= ONLINE else self._tile_identities
        names = [each for tiles in model_input.tiles for each in name(tiles)]
        block_size = self.scheduler.blocks.block_size
        keys = BlockKeys(block_size, self.config.image_token_id, self.config.image_seq_len, names)
        keys.extend(model_input.prompt_token_ids)
        return keys

    def _prepare_numbered(self, number: int, model_input: ModelInput, params: SamplingParams) -> Sequence:
        try:
            return self.prepare(model_input, params)
        except ValueError as error:
            raise type(error)(f"input {number}: {error}") from error

    def _finish(self, sequences: list[Sequence], chosen: Chosen) -> list[Sequence]:
        for sequence, tokens in zip(sequences, chosen, strict=True):
            self._append(sequence, tokens)
        finished = [sequence for sequence in sequences if sequence.finish_reason is not None]
        if finished:
            self.scheduler.finish(finished)
        return finished

    def _append(self, sequence: Sequence, tokens: list[Token]) -> None:
        """Those behind the one that ends the answer are thrown away."""
        for token in tokens:
            self.counters.generated_tokens += 1
            sequence.append(token.token_id, token.logprob, self._eos_token_ids)
            sequence.deliver(token)
            if sequence.finish_reason is not None:
                return


def _check_decode(decode: str | None, device: torch.device) -> None:
    if decode not in (None, "eager", "graph"):
        raise ValueError(f"decode is {decode!r}; it must be 'eager' or 'graph'")
    if decode == "graph" and device.type != "cuda":
        raise ValueError(f"decode is 'graph' and device {str(device)!r}; CUDA graphs need a CUDA device: leave it out")


def _check_prompt(prompt: list[int], vocab_size: int) -> None:
    if not prompt:
        raise ValueError("prompt_token_ids is empty; a prompt has at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ValueError(
            f"prompt token id {bad} lies outside the vocabulary of {vocab_size}: is the tokenizer the model's?"
        )


def _check_tiles(model_input: ModelInput, config: ModelConfig) -> None:
    size = config.vision.image_size
    for tiles in model_input.tiles:
        if tiles.pixels.shape[1:] != (size, size, config.vision.num_channels) or tiles.pixels.dtype != "uint8":
            raise ValueError(
                f"tiles are {tiles.pixels.dtype} {list(tiles.pixels.shape)}; this model takes uint8 "
                f"[N, {size}, {size}, 3]: prepare them with the checkpoint's own processor"
            )
    given = sum(len(tiles.pixels) for tiles in model_input.tiles) * config.image_seq_len
    asked = model_input.prompt_token_ids.count(config.image_token_id)
    if given != asked:
        raise ValueError(
            f"prompt has {asked} image tokens, its tiles make {given}; both must come from one processor call"
        )


def _limits(device: torch.device, given: dict[str, int]) -> Limits:
    return replace(CPU_LIMITS if device.type == "cpu" else GPU_LIMITS, **given)


def _load(directory: Path, device: torch.device, dtype: torch.dtype, quantization: str | None) -> SmolVLM:
    model = SmolVLM.from_pretrained(directory, device, dtype)
    quantize(model, quantization)
    if device.type == "cpu":
        native_library("attention")  # compiling it is nothing that the first answer should wait for
        if can_pack(dtype):
            pack_linears(model)
    return model


def _num_blocks(config: ModelConfig, budget: int, limits: Limits, dtype: torch.dtype) -> int:
    """Blocks that the budget holds, but no more than all sequences at full context could ever fill."""
    block_bytes = KVCache.block_bytes(config.text, BLOCK_SIZE, dtype)
    if budget < block_bytes:
        raise ValueError(
            f"kv_cache_bytes is {budget}; one block of {BLOCK_SIZE} tokens takes {block_bytes}: give it more"
        )
    num_sequences = limits.max_num_sequences + limits.online_sequences
    return min(budget // block_bytes, num_sequences * -(-config.text.max_positions // BLOCK_SIZE))


def _ahead_tiles(config: ModelConfig, dtype: torch.dtype) -> int:
    """Tiles whose features AHEAD_BYTES hold."""
    return AHEAD_BYTES // (config.image_seq_len * config.text.hidden_size * dtype.itemsize)


def _default_cache_bytes(device: torch.device) -> int:
    """What the key/value cache may take: of a GPU 85 % of what is free, less 2 GiB for activations and AHEAD_BYTES."""
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, int(0.85 * free) - 2 * GIB - AHEAD_BYTES)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels written in Triton run on the current device, whatever their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _release_unused(device: torch.device) -> None:
    """Give memory that torch keeps in pieces of the wrong size back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
