"""Data: from the user's text, or built-in text, to training batches.

source = open_source("stories")                      sources.py, files.py, hub.py
cache = tokenize_to_cache(source, tokenizer)         cache.py
train, validation = split_documents(cache)
batches = Batches(train, max_length=256, batch_size=16, seed=0)     batches.py
batches[0].to("cpu")

batches = StreamingBatches(Stream(source, tokenizer), max_length=256, batch_size=16)     streaming.py

records = read_records("chats.jsonl")                conversations.py, messages.py
examples = encode_records(records, tokenizer, max_length=1024).examples          examples.py
batches = PackedBatches(examples, max_length=1024, batch_size=4, seed=0)          packed.py

pixels = ImageProcessor.from_pretrained("runs/vit")(["cat.png", "dog.jpg"])     images.py
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it
_PUBLIC = {
    "Source": "sources",
    "open_source": "sources",
    "Corpus": "cache",
    "TokenCache": "cache",
    "split_documents": "cache",
    "tokenize_to_cache": "cache",
    "Batch": "batches",
    "Batches": "batches",
    "MaskedBatches": "corrupt",
    "Seq2SeqBatch": "pairs",
    "SpanBatches": "corrupt",
    "evaluation_windows": "batches",
    "Example": "examples",
    "ImageProcessor": "images",
    "PackedBatches": "packed",
    "Record": "conversations",
    "encode_pair": "examples",
    "encode_records": "examples",
    "read_records": "conversations",
    "open_image": "images",
    "Stream": "streaming",
    "StreamingBatches": "streaming",
}

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "Example",
    "ImageProcessor",
    "MaskedBatches",
    "PackedBatches",
    "Record",
    "Seq2SeqBatch",
    "Source",
    "SpanBatches",
    "Stream",
    "StreamingBatches",
    "TokenCache",
    "encode_pair",
    "encode_records",
    "evaluation_windows",
    "open_image",
    "open_source",
    "read_records",
    "split_documents",
    "tokenize_to_cache",
]

if TYPE_CHECKING:
    from zero2hero.data.batches import Batch, Batches, evaluation_windows
    from zero2hero.data.cache import Corpus, TokenCache, split_documents, tokenize_to_cache
    from zero2hero.data.conversations import Record, read_records
    from zero2hero.data.corrupt import MaskedBatches, SpanBatches
    from zero2hero.data.examples import Example, encode_pair, encode_records
    from zero2hero.data.images import ImageProcessor, open_image
    from zero2hero.data.packed import PackedBatches
    from zero2hero.data.pairs import Seq2SeqBatch
    from zero2hero.data.sources import Source, open_source
    from zero2hero.data.streaming import Stream, StreamingBatches


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zero2hero.data.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'zero2hero.data' has no attribute {name!r}")
