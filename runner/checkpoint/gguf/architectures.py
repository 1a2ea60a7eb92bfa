"""All GGUF architectures that are read, by `general.architecture`."""

from __future__ import annotations

from collections.abc import Mapping

from runner.checkpoint.gguf.architecture import Architecture
from runner.checkpoint.gguf.dense import DENSE
from runner.checkpoint.gguf.fused import FUSED
from runner.checkpoint.gguf.gemmas import GEMMAS
from runner.checkpoint.gguf.hybrids import HYBRIDS
from runner.checkpoint.gguf.mixtures import MIXTURES

ARCHITECTURES: Mapping[str, Architecture] = {**DENSE, **MIXTURES, **GEMMAS, **HYBRIDS, **FUSED}
