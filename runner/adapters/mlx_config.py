"""`adapter_config.json` of mlx-lm's LoRA, DoRA and full fine-tuning: the keys that change results.

Source: mlx-lm 0.32.2 (`mlx_lm.tuner.utils.load_adapters`, `linear_to_lora_layers`). The file also holds every argument
of the training run; all but the keys below are ignored, as mlx-lm ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.adapters.values import number, positive, short_value
from runner.config.problems import listed
from runner.errors import ConfigError

KINDS = ("lora", "dora", "full")
_SIGNS = ("fine_tune_type", "lora_parameters", "lora_layers")


def is_mlx(raw: Mapping[str, Any]) -> bool:
    """Whether `adapter_config.json` is mlx-lm's and not PEFT's."""
    return "peft_type" not in raw and any(key in raw for key in _SIGNS)


@dataclass(frozen=True, kw_only=True)
class MlxConfig:
    """The keys of mlx-lm's `adapter_config.json` that are used.

    Attributes:
        kind: "lora", "dora" or "full" (whole tensors).
        rank: the rank r, 0 where whole tensors were trained.
        scale: the factor that multiplies the product of the factors; no rank divides it.
        keys: module names within a layer, or full names outside the layers; None: every linear layer.
        num_layers: how many of the last layers have adapters; None: all.
    """

    kind: str
    rank: int = 0
    scale: float = 1.0
    keys: frozenset[str] | None = None
    num_layers: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MlxConfig:
        """Read the object in `adapter_config.json`.

        Releases before 0.19 wrote `lora_layers` and `use_dora` for `num_layers` and `fine_tune_type`. `alpha` stands in
        many configs and has counted in no release since 0.14.3 (June 2024).

        Raises:
            ConfigError: a value is invalid or missing; the message lists all problems.
        """
        kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") is True else "lora")
        if kind not in KINDS:
            raise ConfigError(f"fine_tune_type must be lora, dora or full, not {short_value(kind)}")
        problems: list[str] = []
        layers = raw.get("num_layers", raw.get("lora_layers"))
        if isinstance(layers, bool) or not isinstance(layers, int | None) or (layers is None and kind != "full"):
            problems.append(f"num_layers must be the number of layers with adapters, not {short_value(layers)}")
        count = layers if isinstance(layers, int) and layers > 0 else None  # mlx-lm takes 0 and less as all layers
        if kind == "full":
            if problems:
                raise ConfigError(listed(problems, "; "))
            return cls(kind=kind, num_layers=count)
        parameters = raw.get("lora_parameters")
        if not isinstance(parameters, dict):
            raise ConfigError("; ".join([*problems, "lora_parameters must be an object with rank and scale"]))
        values: dict[str, Any] = {}
        for name, read in (("rank", positive), ("scale", number), ("keys", _keys)):
            try:
                values[name] = read(parameters.get(name))
            except ConfigError as error:
                problems.append(f"lora_parameters.{name} {error}, not {short_value(parameters.get(name))}")
        if problems:
            raise ConfigError(listed(problems, "; "))
        return cls(kind=kind, num_layers=count, **values)

    def gives(self, module: str, layer: int | None, within: str, layers: int) -> bool:
        """Whether the config gives a module an adapter.

        Args:
            module: its full name.
            layer: the index of its layer; None outside the layers.
            within: its name within the layer.
            layers: the number of layers of the model.
        """
        if self.keys is not None and module in self.keys:
            return True
        if layer is None or layer < layers - (self.num_layers or layers):
            return False
        return self.keys is None or within in self.keys


def _keys(value: object) -> frozenset[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError("must be a list of module names")
    return frozenset(value)
