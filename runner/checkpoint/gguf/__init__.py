"""GGUF files, read without conversion and presented as a hub checkpoint, tensor by tensor.

container, blocks                       the bytes: header, tensors, block formats
architectures, settings, pretokenizers  tables, and config.json made from metadata
tokenizer, checkpoint                   tokenizer.json made from metadata; the file as a model
"""

from __future__ import annotations

from runner.checkpoint.gguf.checkpoint import GGUF

__all__ = ["GGUF"]
