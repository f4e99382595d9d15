"""POST /v1/embeddings: texts as vectors.

A decoder was not trained for it, but the mean of its last hidden states says what a text is about. The vectors have
length 1, so that their inner product is the cosine of the angle between them. The openai client asks for base64
(little-endian fp32), which is a third of the size of the numbers in JSON.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from zero2hero.serve.prompts import all_prompts, check_context, served
from zero2hero.serve.schema import EmbeddingsRequest
from zero2hero.serve.worker import Worker

if TYPE_CHECKING:
    from zero2hero.language_model import LanguageModel


async def embeddings(worker: Worker, body: EmbeddingsRequest, adapter: str | None = None) -> dict[str, Any]:
    """The answer; each text is read by itself, between two steps of those that are being written."""
    lm = served(worker.engine, adapter)
    prompts = all_prompts(lm, body.input)
    check_context(lm, prompts, None)
    data = []
    for index, ids in enumerate(prompts):
        vector = await worker.call(lambda ids=ids: mean_state(lm, ids, adapter))  # type: ignore[misc]
        shown: Any = base64.b64encode(vector).decode() if body.encoding_format == "base64" else None
        if shown is None:
            import numpy

            shown = numpy.frombuffer(vector, "<f4").tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    read = sum(map(len, prompts))
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def mean_state(lm: LanguageModel, ids: list[int], adapter: str | None = None) -> bytes:
    """The mean of the hidden states, of length 1, as little-endian fp32."""
    import torch

    from zero2hero.generate.reader import evaluating, wearing
    from zero2hero.generate.request import checked_prompt

    ids = checked_prompt(lm.model, ids, 0)
    with torch.inference_mode(), evaluating(lm.model), wearing(lm.model, adapter):
        hidden_BTD = lm.model(torch.tensor([ids], device=lm.model.embed_tokens.weight.device))
        mean = torch.nn.functional.normalize(hidden_BTD[0].float().mean(0), dim=0)
    return mean.cpu().numpy().astype("<f4").tobytes()
