"""The sample against the images themselves."""

from collections import Counter
from pathlib import Path

from mixed_source import CAPTION, OCR, job_of
from PIL import Image

from jobs.plan_sample import prepare_sample
from jobs.plan_survey import survey
from pipeline.job import Task
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, split_image
from smolvlm.processor import Processor


def test_tiles_tokens_and_errors_are_those_of_the_images(mixed: Path, tiny_checkpoint: Path) -> None:
    job = job_of(mixed, tiny_checkpoint, CAPTION, OCR)
    sample = prepare_sample(job, survey(job.source, None, 1000, 0).sample, keep=4)
    processor = Processor.from_pretrained(tiny_checkpoint)
    config = ImageConfig.from_pretrained(tiny_checkpoint)
    good = [image for image in sample.images if image.error is None]
    for image in good:
        size = (image.prepared.width or 0, image.prepared.height or 0)
        tiles = split_image(Image.new("RGB", size), config, ImagePolicy())
        assert image.prepared.num_tiles == len(tiles.pixels)
        wanted = [messages(task) for task in job.tasks]
        tokens = sum(len(processor.from_tiles(each, [tiles]).prompt_token_ids) for each in wanted)
        assert image.prompt_tokens == tokens
    bad = Counter(image.error.code for image in sample.images if image.error is not None)
    assert bad == {"not_an_image": 1, "truncated": 1}
    assert len(good) == 40 + 10 + 12 + 2 + 9
    assert 0 < len(sample.tiles) <= 4
    assert sample.prepare_cpu_s > 0


def messages(task: Task) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.prompt}]}]
