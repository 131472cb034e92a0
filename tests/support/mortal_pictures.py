"""Training data for several processes: a step is the same pictures however many share it, and one of them may kill."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from word_pictures import WORDS, WordPictures

from smolvlm.training.batches import WINDOW_STEPS
from smolvlm.training.examples import Labelled

FOUR_LETTERS = [index for index, word in enumerate(WORDS) if len(word) == 4]
COUNT = 999
# Where an index comes in the first pass over a source of COUNT examples, for the first stage of seed 0.
PLACES = np.random.default_rng((0, 0)).permutation(COUNT).argsort().tolist()


@dataclass(frozen=True)
class MortalPictures:
    """Words of four letters; asked for the example in place `fatal` the first `deaths` times, the process is killed.

    Examples of one length keep their order in a window. One process shuffles its steps as the first of two does, and
    for the second they are all alike: so the steps of both hold what those of one hold.
    """

    batch_size: int
    grave: Path
    fatal: int = -1
    deaths: int = 0

    def __call__(self, index: int) -> Labelled:
        died = len(self.grave.read_text()) if self.grave.exists() else 0
        place = PLACES[index]
        if place == self.fatal and died < self.deaths:
            self.grave.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        number = place // (WINDOW_STEPS * self.batch_size) if place % 2 else place // 2
        return WordPictures()(FOUR_LETTERS[number % len(FOUR_LETTERS)])
