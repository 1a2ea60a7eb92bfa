"""Hugging Face's quantization formats: `quantization_config` and tensors in, MLX's quantized form or plain numbers out.

Which layers are quantized, and how, is read from the tensors and compared with the config; a method's name that has
outlived its tensors is nothing, and float8 weights with scales are read under any name. Lists of modules to leave
alone (`modules_to_not_convert`, `ignore`, `targets`) need not be matched, since the tensors of such a layer are plain.
Activations and caches are never rounded: where a scheme would round them at run time, we compute the product that it
approximates, and the scales stored for that stay unread (`runner inspect` names them).
"""

from runner.checkpoint.quantized.checkpoint import as_mlx as as_mlx
