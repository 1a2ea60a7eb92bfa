"""Published Hugging Face quantisations: `quantization_config` and tensors in, MLX's packed form or plain numbers out.

Which layers are packed, and how, is read from the tensors and held against what the config says: lists of modules to
leave alone (`modules_to_not_convert`, `ignore`, `targets`) need not be matched, since such a layer is stored plain.
Activations are not rounded: where a scheme would round them as it runs, the product here is the one it approximates.
"""

from runner.checkpoint.quantized.checkpoint import as_mlx as as_mlx
