"""LoRA and DoRA adapters in PEFT's format and mlx-lm's: read, matched against a model, applied or merged."""

from runner.adapters.base import Base as Base
from runner.adapters.files import AdapterFiles as AdapterFiles
from runner.adapters.files import Given as Given
from runner.adapters.files import open_adapters as open_adapters
from runner.adapters.model import Adapters as Adapters
from runner.adapters.model import fit as fit
from runner.adapters.tokens import with_added_tokens as with_added_tokens
