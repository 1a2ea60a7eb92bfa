"""GGUF files, read as they are: as checkpoints of the hub, tensor by tensor.

container, blocks                      bytes: header, tensors, block formats
architectures, settings, pretokenizers tables, and config.json from metadata
tokenizer, checkpoint                  tokenizer.json from metadata; the whole as a model
"""

from __future__ import annotations

from runner.checkpoint.gguf.checkpoint import GGUF

__all__ = ["GGUF"]
