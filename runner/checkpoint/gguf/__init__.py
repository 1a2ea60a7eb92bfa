"""GGUF files, read without conversion and presented as a hub checkpoint, tensor by tensor.

container                               the bytes: header and tensors
formats, bits, blocks, codebook_blocks  block formats; codebooks and codebook_tables hold the grids of the IQ types
architectures, settings, pretokenizers  tables, and config.json made from metadata
tokenizer, checkpoint                   tokenizer.json made from metadata; the file as a model
"""

from __future__ import annotations

from runner.checkpoint.gguf.checkpoint import GGUF

__all__ = ["GGUF"]
