"""What a model would be in memory, before any of its weights is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.engine.dtypes import choose
from runner.families import find
from runner.ops.device import current
from runner.weights import loading
from runner.weights.plan import count_by_form, plan
from runner.weights.tags import Source


@dataclass(frozen=True)
class Planned:
    """What the headers of a model's tensors say of it.

    Attributes:
        nbytes: bytes of its weights in memory.
        forms: how many parameters are kept in which form, as `count_by_form` has them.
    """

    nbytes: int
    forms: Counter[str]


def planned(raw: Mapping[str, Any], source: Source, *, dtype: str | None = None) -> Planned:
    """What a model's weights would take in memory; only the headers of its tensors are read.

    Raises:
        RunnerError: as `assemble`, but for what only the tensors themselves can show.
    """
    config_class, model_class = find(raw)
    device = current()
    dtypes = choose(dtype, device, raw, source.headers)
    provided = {"ops": device.ops, "activations": dtypes.activations}
    layout = plan(model_class, config_class.from_dict(raw), source.headers, provided)
    return Planned(loading.planned_nbytes(layout, source.headers, dtypes.weights), count_by_form(layout))
