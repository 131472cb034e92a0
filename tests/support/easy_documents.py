"""Clean documents of large type, which the bundled model reads nearly without a mistake."""

from smolvlm import Processor
from smolvlm.hub import BUNDLED
from smolvlm.processor import ModelInput
from smolvlm.training.documents import Document, DocumentGenerator, DocumentOptions

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe all text."}]}]
EASY = DocumentOptions(kinds={"word": 1.0, "line": 1.0, "receipt": 1.0}, text_px=(16.0, 28.0), degraded_share=0.0)


def easy_documents(count: int) -> list[Document]:
    """Draw the first `count`: words, lines and receipts of fonts that the model was not trained on."""
    return list(map(DocumentGenerator("held_out", 5, EASY).document, range(count)))


def bundled_inputs(documents: list[Document]) -> list[ModelInput]:
    """Prepare them for the bundled model, to be transcribed."""
    processor = Processor.from_pretrained(BUNDLED)
    return [processor(PROMPT, [document.image]) for document in documents]
