"""Shapes of models, as kernels for NVIDIA GPUs see them."""

from __future__ import annotations

import dataclasses

from runner.ops.cuda.shape import Form, StepShape

HOPPER, AMPERE = (132, 232448), (108, 166912)
"""Multiprocessors, and bytes of shared memory for a block, of an H200 and of an A100."""

PACKED = Form(4, 64)
FORMS = {
    "4 bits": PACKED,
    "8 bits": Form(8, 32),
    "mxfp4": Form(4, 32, "mxfp4"),
    "mxfp8": Form(8, 32, "mxfp8"),
    "nvfp4": Form(4, 16, "nvfp4"),
}
"""One of each kind of packed weights."""

LLAMA_8B = StepShape(
    hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, layers=32, vocab=128256,
    forms=(PACKED,) * 5, embedding=PACKED, weights="bfloat16", scales="bfloat16", small="bfloat16", cache="bfloat16",
    table="bfloat16", biased=(False,) * 5, norm_eps=(1e-5,) * 3, rope_dims=128,
)  # fmt: skip
SMOLLM2 = dataclasses.replace(
    LLAMA_8B, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, layers=30, vocab=49152,
    forms=(Form(),) * 5, embedding=Form(), rope_dims=64,
)  # fmt: skip
QWEN = dataclasses.replace(
    SMOLLM2, hidden=896, heads=14, kv_heads=2, intermediate=4864, layers=24, vocab=151936, forms=(Form(8, 32),) * 5,
    biased=(True, False, False, False, False),
)  # fmt: skip
MIXED = dataclasses.replace(LLAMA_8B, forms=(PACKED, PACKED, PACKED, PACKED, Form()), head_norms=True, gated=False)
MIXTURE = dataclasses.replace(
    LLAMA_8B, hidden=2048, kv_heads=4, intermediate=768, vocab=151936, experts=128, chosen=8, chosen_norm=True,
    head_norms=True,
)  # fmt: skip
PLAIN_8B = dataclasses.replace(LLAMA_8B, forms=(Form(),) * 5, embedding=Form())
PART = dataclasses.replace(
    PLAIN_8B, heads=16, kv_heads=4, intermediate=7168, biased=(False, True, False, True, False),
    ranks=2, summed=(True, True), gathered=True,
)  # fmt: skip
PART_OF_EXPERTS = dataclasses.replace(
    MIXTURE, heads=16, kv_heads=2, intermediate=384, forms=(Form(),) * 5, embedding=Form(), ranks=2,
    summed=(True, True), gathered=True,
)  # fmt: skip
FLOATS = {
    name: dataclasses.replace(LLAMA_8B, forms=(form,) * 5, embedding=form)
    for name, form in FORMS.items()
    if form.scaled
}
