// How numbers are stored, and what packed ones are unpacked to: all that the kernels know of a form of weights is here.
// Nothing is included, so that no CUDA headers are needed.
typedef unsigned long long u64;
#define ALL 0xffffffffu
#define DI __device__ __forceinline__

#ifdef __CUDACC__  // tests compile this text for the CPU, with these of their own
DI float half_of(unsigned short h) { float f; asm("cvt.f32.f16 %0,%1;" : "=f"(f) : "h"(h)); return f; }
DI unsigned short to_half(float f) { unsigned short h; asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(f)); return h; }
// Byte i of the result is the byte of (b, a) that hexadecimal digit i of `s` names, from 0 to 7; its sign eight times
// where the digit is greater.
DI unsigned permuted(unsigned a, unsigned b, unsigned s) { unsigned r; asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(s)); return r; }
DI float as_float(unsigned u) { return __uint_as_float(u); }
#endif
DI float lowf(unsigned u) { return as_float(u << 16); }
DI float highf(unsigned u) { return as_float(u & 0xffff0000u); }

// Types of plain numbers: 0 float32, 1 float16, 2 bfloat16.
template <int T> struct Size { static constexpr int B = T == 0 ? 4 : 2; };
template <int T, class Index> DI float one(const void* p, Index i) {
  if (T == 0) return ((const float*)p)[i];
  const unsigned short u = ((const unsigned short*)p)[i];
  return T == 1 ? half_of(u) : as_float((unsigned)u << 16);
}
template <int T> DI void two(unsigned u, float& a, float& b) {
  if (T == 1) { a = half_of((unsigned short)u); b = half_of((unsigned short)(u >> 16)); }
  else { a = lowf(u); b = highf(u); }
}

// Packed numbers have BITS (4 or 8), lie in words from the lowest bits on, and share with the G of a group what S says:
// a scale and a bias of 16 bits each (code x scale + bias), or a scale alone, of 8 bits: a power of two (E8M0: mxfp4 and
// mxfp8) or a number (E4M3: nvfp4). With a scale alone, numbers of 4 bits are E2M1, those of 8 bits E4M3.
constexpr int AFFINE = 0, E8M0 = 1, E4M3 = 2;

// Bytes of a group's scale.
template <int S> struct Scale { static constexpr int B = S == AFFINE ? 2 : 1; };
// A scale of 8 bits, the lowest of `u`. Exponents of zero make subnormal numbers, in both forms.
template <int S> DI float scale_of(unsigned u) {
  if (S == E8M0) { const unsigned e = (u & 255) << 23; return as_float(e ? e : 0x00400000u); }
  return as_float((u & 0x7f) << 20 | (u & 0x80) << 24) * as_float(247u << 23);  // 2^120: the exponents' biases are 7, 127
}
// The numbers of bytes 0 and 2, as two float16 that are too small by a factor 2^8.
DI unsigned halves_of(unsigned u) { return ((u << 7) & 0x3f803f80u) | ((u << 8) & 0x80008000u); }
// A number without its scale, from the lowest bits of `u`.
template <int BITS> DI float number_of(unsigned u) {
  if (BITS == 4) return as_float((u & 7) << 22 | (u & 8) << 28) * as_float(253u << 23);
  return scale_of<E4M3>(u);
}
// Number i of a matrix, counted through its rows, which have whole groups; T is the type of its scales and biases.
template <int BITS, int G, int S, int T> DI float element(const void* words, const void* scales, const void* biases, u64 i) {
  constexpr int PER = 32 / BITS;
  const unsigned code = (((const unsigned*)words)[i / PER] >> (BITS * (unsigned)(i % PER))) & ((1u << BITS) - 1);
  if (S == AFFINE) return (float)code * one<T>(scales, i / G) + one<T>(biases, i / G);
  return number_of<BITS>(code) * scale_of<S>(((const unsigned char*)scales)[i / G]);
}

// Eight E2M1 numbers of a word as bytes, in their order: 12 more than twice the number, which is what a sum of products
// has too much: 12 times the sum of the vector.
DI void bytes_of(unsigned w, unsigned& low, unsigned& high) {
  // A digit of 8 and more, a negative number, finds no table but the second, where its sign was turned; the other gives 0.
  const unsigned turned = w ^ 0x88888888u;
  low = permuted(0x0f0e0d0cu, 0x18141210u, w) | permuted(0x090a0b0cu, 0x00040608u, turned);
  high = permuted(0x0f0e0d0cu, 0x18141210u, w >> 16) | permuted(0x090a0b0cu, 0x00040608u, turned >> 16);
}
// Two numbers as 16-bit ones of type T, which has more exponents: they are too small by the factor `missing` stands for.
// Of 4 bits numbers i and i + 4 of a word, of 8 bits numbers 2 i and 2 i + 1.
template <int BITS, int T> DI unsigned pair_of(unsigned w, int i) {
  if (BITS == 4) {
    const unsigned x = w << (12 - 4 * i);
    return (x & 0x80008000u) | (T == 1 ? (x >> 3) & 0x0e000e00u : (x >> 6) & 0x01c001c0u);
  }
  const unsigned x = permuted(w, 0u, i ? 0x3424u : 0x1404u);
  return (x & 0x80008000u) | (T == 1 ? (x >> 1) & 0x3f803f80u : (x >> 4) & 0x07f007f0u);
}
// That factor, twice as a 16-bit number of type T: powers of two, 14 or 8 in float16, 126 or 120 in bfloat16.
template <int BITS, int T> DI unsigned missing() {
  if (T == 1) return BITS == 4 ? 0x74007400u : 0x5c005c00u;
  return BITS == 4 ? 0x7e807e80u : 0x7b807b80u;
}
