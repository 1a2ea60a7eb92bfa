from collections.abc import Sequence

import mlx.core as mx

built_for_mlx: str

def accepts_array(x: mx.array) -> bool: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def self_test(rounds: int) -> bool: ...
def read_seconds(size: int, passes: int) -> float: ...
def isa() -> str: ...
def why_no_tiles() -> str | None: ...
def set_isa(name: str) -> bool: ...
def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array: ...
def linear_each(x: mx.array, weight: mx.array) -> mx.array: ...
def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None,
    group_size: int,
    bits: int,
    int8: bool = False,
) -> mx.array: ...
def small_float_linear(
    x: mx.array, weight: mx.array, scales: mx.array, bias: mx.array | None, mode: str, int8: bool = False
) -> mx.array: ...
def gather_linear(x: mx.array, weight: mx.array, experts: mx.array, bias: mx.array | None = None) -> mx.array: ...
def gather_quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    experts: mx.array,
    bias: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
    int8: bool = False,
) -> mx.array: ...
def route(
    logits: mx.array,
    correction: mx.array | None,
    count: int,
    sigmoid: bool,
    groups: int,
    kept: int,
    members: int,
    normalized: bool,
    eps: float,
    factor: float,
) -> tuple[mx.array, mx.array]: ...
def mixture(outputs: mx.array, weights: mx.array) -> mx.array: ...
def embed(ids: mx.array, weight: mx.array, dtype: mx.Dtype) -> mx.array: ...
def quantized_embed(
    ids: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    dtype: mx.Dtype,
) -> mx.array: ...
def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array: ...
def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array: ...
def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array | None, eps: float) -> tuple[mx.array, mx.array]: ...
def rope(
    x: mx.array,
    offset: int | mx.array | Sequence[int],
    *,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    freqs: mx.array | None,
) -> mx.array: ...
def attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    mask: str | mx.array | None,
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
    length: int | None = None,
    softcap: float | None = None,
    start: int = 0,
) -> mx.array: ...
def attention_rows(
    query: mx.array,
    histories: Sequence[tuple[mx.array, mx.array, int, int, int, int]],
    counts: Sequence[int],
    *,
    scale: float,
    sinks: mx.array | None,
    softcap: float | None,
) -> mx.array: ...
def empty(shape: Sequence[int], dtype: mx.Dtype, powers: mx.array | None = None) -> mx.array: ...
def append(keys: mx.array, values: mx.array, k: mx.array, v: mx.array, at: int) -> tuple[mx.array, mx.array]: ...
def append_rows(
    buffers: Sequence[tuple[mx.array, mx.array]],
    keys: mx.array,
    values: mx.array,
    at: Sequence[int],
    counts: Sequence[int],
) -> list[tuple[mx.array, mx.array]]: ...
def glu(gate_up: mx.array, activation: str) -> mx.array: ...
def clamped_glu(gate_up: mx.array, alpha: float, limit: float) -> mx.array: ...
def activate(x: mx.array, activation: str) -> mx.array: ...
def short_conv(
    x: mx.array, rows: mx.array, weight: mx.array, bias: mx.array | None, activation: str | None
) -> mx.array: ...
def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]: ...
def state_space(
    mixed: mx.array,
    dt: mx.array,
    a_log: mx.array,
    d: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    groups: int,
    least: float,
    most: float,
) -> tuple[mx.array, mx.array]: ...
def selective_scan(
    x: mx.array, steps: mx.array, b: mx.array, c: mx.array, rates: mx.array, skip: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]: ...
def selective_step(
    states: Sequence[mx.array],
    at: Sequence[int],
    x: mx.array,
    steps: mx.array,
    b: mx.array,
    c: mx.array,
    rates: mx.array,
    skip: mx.array,
) -> list[mx.array]: ...
def conv_step(
    rows: Sequence[mx.array],
    at: Sequence[int],
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    activation: str | None,
) -> list[mx.array]: ...
def recurrent_step(
    rows: Sequence[mx.array],
    states: Sequence[mx.array],
    at: Sequence[int],
    mixed: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    activation: str | None,
    a: mx.array,
    b: mx.array | None,
    a_log: mx.array,
    dt_bias: mx.array,
    d: mx.array | None,
    groups: int,
    least: float,
    most: float,
) -> list[mx.array]: ...
def gated_norm(
    x: mx.array, gate: mx.array, weight: mx.array, eps: float, groups: int, gate_first: bool
) -> mx.array: ...
def gate(x: mx.array, gate: mx.array) -> mx.array: ...
def argmax(x: mx.array) -> mx.array: ...
def greatest(x: mx.array) -> tuple[mx.array, mx.array]: ...
def draw(logits: mx.array, rows: Sequence[tuple[float, float, int, float, float]]) -> tuple[mx.array, mx.array]: ...
def log_probabilities(logits: mx.array, tokens: mx.array, tops: Sequence[int]) -> list[mx.array]: ...
def masked(logits: mx.array, bits: mx.array) -> mx.array: ...
def pages(size: int) -> mx.array: ...
def move_into(array: mx.array, pages: mx.array, at: int) -> bool: ...
def schedule(arrays: list[mx.array]) -> None: ...
def slot(shape: list[int]) -> mx.array: ...
def record(slot: mx.array, outputs: list[mx.array], ahead: list[int], caches: list[mx.array]) -> Program | None: ...

class Outline:
    def record(self, slot: mx.array, output: mx.array, caches: list[mx.array], count: int) -> Program | None: ...
    def same_as(self, other: Outline) -> bool: ...

class Program:
    @property
    def outline(self) -> Outline: ...
    def run(self, token: mx.array) -> mx.array: ...
