"""Hugging Face's quantization formats: `quantization_config` and tensors in, MLX's quantized form or plain numbers out.

Which layers are quantized, and how, is read from the tensors and compared with the config. Lists of modules to leave
alone (`modules_to_not_convert`, `ignore`, `targets`) need not be matched, since the tensors of such a layer are plain.
Activations are never rounded: where a scheme would round them at run time, we compute the product that it approximates.
"""

from runner.checkpoint.quantized.checkpoint import as_mlx as as_mlx
