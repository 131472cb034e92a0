"""The peer of the endpoint: FastAPI before transformers' `generate`, one request at a time.

    python benchmarks/serving/peer.py CHECKPOINT PORT DTYPE THREADS

Weights, preparation of the picture and prompt are ours, so that only the engine and the server differ.
"""

import base64
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import Idefics3ForConditionalGeneration

from smolvlm.image import ImagePolicy, decode_image, split_image
from smolvlm.processor import Processor


def serve_peer(checkpoint: str, port: int, dtype: str, threads: int) -> None:
    """Answer until the process is ended."""
    torch.set_num_threads(threads)
    model: Any = Idefics3ForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    processor = Processor.from_pretrained(checkpoint)
    policy, lock, app = ImagePolicy(upscale=False, image_splitting=False), threading.Lock(), FastAPI()

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        image, text = body["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        tiles = split_image(decode_image(data).image, processor.config.image, policy)
        content = [{"type": "image"}, {"type": "text", "text": text["text"]}]
        ids = torch.tensor([processor.from_tiles([{"role": "user", "content": content}], [tiles]).prompt_token_ids])
        pixels = torch.from_numpy(tiles.pixels)[None].permute(0, 1, 4, 2, 3).to(model.dtype).div(255).sub(0.5).div(0.5)
        with lock, torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                pad_token_id=0,
            )
        return {"text": processor.decode(out[0, ids.shape[1] :].tolist())}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve_peer(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
