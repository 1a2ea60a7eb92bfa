"""Parts of the kernels' texts, compiled for the CPU (`cuda_lanes.h`): their arithmetic, and where they find what."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.ops.cuda.shape import SLOT, Division, Form, Product, text

_ALL_FORMS = """
extern "C" void elements(int n, const void* words, const void* scales, const void* biases, float* out) {
  for (int i = 0; i < n; i++) out[i] = element<BITS, G, S, T>(words, scales, biases, i);
}
"""
_TILES = """
inline unsigned pack(float a, float b) {
  return XT == 1 ? to_half(a) | (unsigned)to_half(b) << 16 : to_bfloat(a) | (unsigned)to_bfloat(b) << 16;
}
inline float number(unsigned u) { return XT == 1 ? half_of((unsigned short)u) : as_float(u << 16); }
inline unsigned fma2(unsigned a, unsigned b, unsigned c) {
  const auto each = [&](int s) { return (float)((double)number(a >> s) * number(b >> s) + number(c >> s)); };
  return pack(each(0), each(16));
}
inline void core(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiplied<16>(c, {a0, a1, a2, a3, b0, b1}, number, number);
}
inline uint4 stream(const char* p) { return *(const uint4*)p; }
"""
_RUN_TILES = """
extern "C" void products(int rows, const char* x, const void* w, const void* s, const void* z, float* y) {
  in_warps((N + 15) / 16, [&](int warp, int lane) {
    const int first = warp * 16, g = lane >> 2, t = lane & 3;
    Tile<BITS, G, S, K> tile[1];
    tile[0].begin(w, s, z, first + g, N, t);
    Lines<BITS, 1> look{{x + ((long)min(g, rows - 1) * K + t * (Form<BITS>::KB / 4)) * 2}};
    float c[1][1][4] = {{{0, 0, 0, 0}}};
    multiply<BITS, G, S, K, 1, 1, 1>(tile, look, 0, lane, c);
    for (int i = 0; i < 4; i++) {
      const int line = first + g + 8 * (i >> 1), n = 2 * t + (i & 1);
      if (line < N && n < rows) y[n * N + line] = c[0][0][i];
    }
  });
}
"""
_RUN_PRODUCT = """
extern "C" void product(int index, int rows, const float* x, const char* stages, int count, float* slots) {
  alignas(1024) static char xs[1 << 20];
  float2* xn = (float2*)(xs + PLANES);
  const Product& p = PRODUCTS[index];
  memcpy(sm, stages, (size_t)count * STAGE);
  in_warps(16, [&](int warp, int lane) {
    for (int k = warp * 128; k < p.columns; k += 2048) {
      const int c = k + lane * 4;
      const bool in = c < p.columns;
      const float4 a = in ? float4{x[c], x[c + 1], x[c + 2], x[c + 3]} : float4{0, 0, 0, 0};
      STORE_X
    }
  });
  in_warps(16, [&](int warp, int lane) { Ring rg{0, 0}; float* out = slots; PRODUCT });
}
"""
_BLOCKS = """
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define __expf expf
#define __shfl_xor_sync shown
struct { int x, y; } blockIdx, gridDim;
constexpr int THREADS = 256;
ucontext_t block_of, threads[THREADS];
float shows[THREADS];
int waiting, meetings;
std::function<void()> work_of;
bool done[THREADS];
void run_thread() { work_of(); done[threadIdx.x] = true; }
// Threads take turns: those of a warp stop equally often, so that after each turn all have come as far.
void turn() { const int own = threadIdx.x; swapcontext(&threads[own], &block_of); }
float shown(unsigned, float mine, int other) {
  shows[threadIdx.x] = mine;
  turn();
  const float theirs = shows[threadIdx.x ^ other];
  turn();
  return theirs;
}
void __syncthreads() {
  const int meeting = meetings;
  if (++waiting == THREADS) waiting = 0, meetings++;
  while (meeting == meetings) turn();
}
unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
"""
_RUN_SEVERAL = """
extern "C" void several(int rows, int heads, const Number* q, const Number* k, const Number* v, const int* places,
                        const Number* sinks, Number** b, Number* out) {
  static std::vector<char> stacks(THREADS << 16);
  gridDim = {rows, heads};
  for (int block = 0; block < rows * heads; block++) {
    blockIdx = {block % rows, block / rows};
    work_of = [&] { ATTEND(q, k, v, places, sinks, GIVEN, out, rows); };
    for (int t = 0; t < THREADS; t++) {
      getcontext(&threads[t]);
      threads[t].uc_stack.ss_sp = stacks.data() + ((size_t)t << 16);
      threads[t].uc_stack.ss_size = 1 << 16;
      threads[t].uc_link = &block_of;
      makecontext(&threads[t], run_thread, 0);
      done[t] = false;
    }
    for (bool more = true; more;) {
      more = false;
      for (int t = 0; t < THREADS; t++)
        if (!done[t]) threadIdx.x = t, swapcontext(&block_of, &threads[t]), more = true;
    }
  }
}
"""


def several(kernel: Any, arrays: list[np.ndarray], buffers: list[np.ndarray], out: np.ndarray, tmp: Path) -> None:
    """What a kernel of `runner.ops.cuda.several` does with queries, keys, values, places and sinks, and its buffers."""
    given = "#define GIVEN " + ", ".join(f"b[{i}]" for i in range(2 * kernel.most))
    library = _built([_lanes(), _BLOCKS, kernel.source, given, _RUN_SEVERAL], tmp)
    pointers = (ctypes.c_void_p * (2 * kernel.most))(*(buffer.ctypes.data for buffer in buffers))
    library.several(out.shape[0], arrays[1].shape[1], *map(_at, arrays), pointers, _at(out))


_RUN_BOX = """
inline void unit(unsigned d, u64 p, int n, u64) {
  memset(sm + d, 0, 16);
  memcpy(sm + d, (const void*)p, n);
}
%s
extern "C" void boxes(
    const char* matrix, int pitch, int all, int row, int rows, int line, int lines, int width, char* out) {
  in_warps(1, [&](int, int) { box(0, 0, (u64)matrix, pitch, all, row, rows, line, lines, width, 0, 0); });
  memcpy(out, sm, (size_t)rows * lines * width);
}
"""


def boxes(product: Product, matrix: list[np.ndarray], base: int, piece: int, tmp: Path) -> np.ndarray:
    """A stage as the producer's lanes fill it, on GPUs without bulk copies."""
    source = text("step.cu")
    start = source.index("DI void box(")
    run = _RUN_BOX % source[start : source.index("DI void done(", start)]
    library = _built([_lanes(), text("forms.cu"), run], tmp)
    stage = np.zeros(product.bytes, np.uint8)
    places = (0, product.scale_at, product.bias_at)
    for array, box, place in zip(matrix, product.boxes, places, strict=False):
        part = np.zeros(box.rows * box.lines * box.width, np.uint8)
        line = piece * box.lines
        library.boxes(_at(array), box.pitch, len(array), base, box.rows, line, box.lines, box.width, _at(part))
        stage[place : place + part.size] = part
    return stage


def elements(
    form: Form, words: np.ndarray, scales: np.ndarray, biases: np.ndarray, count: int, tmp: Path
) -> np.ndarray:
    """The first `count` numbers of a packed matrix, whose scales are float16 where the form has 16-bit ones."""
    constants = f"constexpr int T = 1, BITS = {form.bits}, G = {form.group}, S = {form.scaled};"
    library = _built([constants, _lanes(), text("forms.cu"), _ALL_FORMS], tmp)
    out = np.zeros(count, np.float32)
    library.elements(count, *map(_at, (words, scales, biases, out)))
    return out


def tiles(form: Form, kind: int, x: np.ndarray, matrix: list[np.ndarray], tmp: Path) -> np.ndarray:
    """Products by `tiles.cu` of vectors of bytes, two a number: `[R, N]`. `kind` is their type, 1 or 2."""
    rows, columns, outputs = x.shape[0], x.shape[1] // 2, matrix[0].shape[0]
    names = {"XT": kind, "K": columns, "N": outputs, "BITS": form.bits, "G": form.group or 1, "S": form.scaled}
    constants = "constexpr int " + ", ".join(f"{name} = {value}" for name, value in names.items()) + ";"
    library = _built([constants, _lanes(), text("forms.cu"), _TILES, text("tiles.cu"), _RUN_TILES], tmp)
    y = np.zeros((rows, outputs), np.float32)
    arrays = [*matrix, *matrix[-1:] * 2][:3]  # what a form has not is not read
    library.products(rows, *map(_at, (x, *arrays, y)))
    return y


def block(division: Division, index: int, x: np.ndarray, matrix: list[np.ndarray], tmp: Path) -> np.ndarray:
    """One block's product of a vector float32 with the rows of a packed matrix, by `step.cu`: `[rows]`."""
    product, rows, source = division.products[index], matrix[0].shape[0], division.source
    parts = [
        re.sub("NST = [0-9]+;", "NST = 1000;", source[: source.index("// How numbers are stored")]),
        _lanes(),
        text("forms.cu"),
        f"constexpr int SLOT = {SLOT};\n#define __constant__",
        source[source.index("// Products: 0 q, k, v;") : source.index("DI void owned(")],
        source[source.index("// The vector for packed weights") : source.index("// bfloat16 rows on the tensor core")],
        _RUN_PRODUCT,
    ]
    stages = [
        (mapped if product.mapped else _loose)(product, matrix, base, piece, division.stage)
        for base in range(0, rows, 16 * product.tiles)
        for piece in range(product.pieces)
    ]
    slots = np.zeros((rows + 16 * product.tiles, SLOT), np.float32)
    ring = np.concatenate(stages)
    _built(parts, tmp).product(index, rows, _at(x), _at(ring), len(stages), _at(slots))
    return slots[:rows, : product.shares].sum(1)


def mapped(product: Product, matrix: list[np.ndarray], base: int, piece: int, size: int) -> np.ndarray:
    """A stage as tensor maps fill it: lines of bytes from all rows, units of 16 bytes exchanged by the row."""
    stage, rows = np.zeros(size, np.uint8), 16 * product.tiles
    places = (0, product.scale_at, product.bias_at)
    for array, box, place in zip(matrix, product.boxes, places, strict=False):
        assert array.shape[1] == box.pitch and box.pitch % 16 == 0 and box.rows == rows
        part = np.zeros((rows, box.lines * box.width), np.uint8)
        start = piece * box.lines * box.width
        found = array[base : base + rows, start : start + box.lines * box.width]
        part[: found.shape[0], : found.shape[1]] = found
        units = part.reshape(rows, box.lines, box.width // 16, 16).swapaxes(0, 1).copy()
        if box.width == 128:
            for row in range(rows):
                units[:, row] = units[:, row, np.arange(8) ^ (row & 7)]
        stage[place : place + units.size] = units.ravel()
    return stage


def _loose(product: Product, matrix: list[np.ndarray], base: int, piece: int, size: int) -> np.ndarray:
    """A stage as copies of rows fill it: scales and biases with what lies beside them within 16 bytes."""
    stage, first = np.zeros(size, np.uint8), piece * product.piece
    columns = min(product.piece, product.columns - first)
    count = min(16 * product.tiles, matrix[0].shape[0] - base)
    start, length = first * product.bits // 8, columns * product.bits // 8
    for row in range(count):
        stage[row * product.pitch :][:length] = matrix[0][base + row, start : start + length]
    each = 1 if product.scaled else 2
    line, length = product.columns // product.group * each, columns // product.group * each
    for array, place in zip(matrix[1:], (product.scale_at, product.bias_at), strict=False):
        flat = np.append(array.ravel(), np.zeros(16, np.uint8))
        for row in range(count):
            at = (base + row) * line + first // product.group * each
            offset = row * line % 16
            assert (at - offset) % 16 == 0
            whole = -(-(offset + length) // 16) * 16
            assert whole <= product.scale_pitch
            stage[place + row * product.scale_pitch :][:whole] = flat[at - offset : at - offset + whole]
    return stage


def _lanes() -> str:
    return Path(__file__).with_name("cuda_lanes.h").read_text()


def _built(parts: list[str], tmp: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C++ compiler here, or no Linux")
    source = tmp / "kernel.cpp"
    source.write_text("\n".join(parts))
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", str(source)]
    subprocess.run([*command, "-o", str(tmp / "kernel.so")], check=True)
    return ctypes.CDLL(str(tmp / "kernel.so"))


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
