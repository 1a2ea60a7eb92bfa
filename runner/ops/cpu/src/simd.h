// Vectors of float for one instruction set; included once by each isa_*.cpp inside its own namespace.
// VF is the vector, W its width. The names are the same for all three, the kernels are written once over them.

#if RUNNER_ISA == 512

constexpr int W = 16;
constexpr int kRegisters = 32;
using VF = __m512;
RUNNER_INLINE VF zero() { return _mm512_setzero_ps(); }
RUNNER_INLINE VF set1(float x) { return _mm512_set1_ps(x); }
RUNNER_INLINE VF load(const float* p) { return _mm512_loadu_ps(p); }
RUNNER_INLINE void store(float* p, VF v) { _mm512_storeu_ps(p, v); }
RUNNER_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
RUNNER_INLINE VF vmax(VF a, VF b) { return _mm512_max_ps(a, b); }
RUNNER_INLINE float hsum(VF v) { return _mm512_reduce_add_ps(v); }
RUNNER_INLINE float hmax(VF v) { return _mm512_reduce_max_ps(v); }
RUNNER_INLINE VF load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
RUNNER_INLINE VF load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
RUNNER_INLINE void store_bf16(uint16_t* p, VF v) {
  __m512i u = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
RUNNER_INLINE void store_f16(uint16_t* p, VF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
RUNNER_INLINE VF load_i16(const int16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}
RUNNER_INLINE VF load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
RUNNER_INLINE void store_i16(int16_t* p, VF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}
RUNNER_INLINE VF vabs(VF v) { return _mm512_abs_ps(v); }
RUNNER_INLINE VF vround(VF v) { return _mm512_roundscale_ps(v, 0); }
RUNNER_INLINE VF pow2(VF n) { return _mm512_scalef_ps(set1(1.0f), n); }
// a < b ? x : y, per lane
RUNNER_INLINE VF select_lt(VF a, VF b, VF x, VF y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
// One bit for each lane with low <= v < high.
RUNNER_INLINE uint32_t lanes_between(VF v, VF low, VF high) {
  return (uint32_t)(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, high, _CMP_LT_OQ));
}

#elif RUNNER_ISA == 2

constexpr int W = 8;
constexpr int kRegisters = 16;
using VF = __m256;
RUNNER_INLINE VF zero() { return _mm256_setzero_ps(); }
RUNNER_INLINE VF set1(float x) { return _mm256_set1_ps(x); }
RUNNER_INLINE VF load(const float* p) { return _mm256_loadu_ps(p); }
RUNNER_INLINE void store(float* p, VF v) { _mm256_storeu_ps(p, v); }
RUNNER_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
RUNNER_INLINE VF vmax(VF a, VF b) { return _mm256_max_ps(a, b); }
RUNNER_INLINE float hsum(VF v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
RUNNER_INLINE float hmax(VF v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
RUNNER_INLINE VF load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
RUNNER_INLINE VF load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
RUNNER_INLINE void store_bf16(uint16_t* p, VF v) {
  __m256i u = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(r));
}
RUNNER_INLINE void store_f16(uint16_t* p, VF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
RUNNER_INLINE VF load_i16(const int16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)));
}
RUNNER_INLINE VF load_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
RUNNER_INLINE void store_i16(int16_t* p, VF v) {
  __m256i code = _mm256_cvtps_epi32(v);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1)));
}
RUNNER_INLINE VF vabs(VF v) { return _mm256_andnot_ps(set1(-0.0f), v); }
RUNNER_INLINE VF vround(VF v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RUNNER_INLINE VF pow2(VF n) {  // -127 < n < 128
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
RUNNER_INLINE VF select_lt(VF a, VF b, VF x, VF y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
RUNNER_INLINE uint32_t lanes_between(VF v, VF low, VF high) {
  __m256 inside = _mm256_and_ps(_mm256_cmp_ps(v, low, _CMP_GE_OQ), _mm256_cmp_ps(v, high, _CMP_LT_OQ));
  return (uint32_t)_mm256_movemask_ps(inside);
}

#else  // portable: GCC/Clang vectors of four, which SSE2 and NEON have

constexpr int W = 4;
constexpr int kRegisters = 16;
typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
typedef uint32_t VU __attribute__((vector_size(16)));
RUNNER_INLINE VF set1(float x) { return VF{x, x, x, x}; }
RUNNER_INLINE VF zero() { return set1(0.0f); }
RUNNER_INLINE VF load(const float* p) {
  VF v;
  memcpy(&v, p, sizeof v);
  return v;
}
RUNNER_INLINE void store(float* p, VF v) { memcpy(p, &v, sizeof v); }
RUNNER_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
// As the x86 instruction: the second operand where either is NaN.
RUNNER_INLINE VF vmax(VF a, VF b) { return a > b ? a : b; }
RUNNER_INLINE float hsum(VF v) { return (v[0] + v[2]) + (v[1] + v[3]); }
RUNNER_INLINE float hmax(VF v) {
  float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
RUNNER_INLINE VF load_bf16(const uint16_t* p) {
  VI u = {p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16};
  return (VF)u;
}
RUNNER_INLINE VF load_i16(const int16_t* p) { return VF{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
RUNNER_INLINE VF load_u8(const uint8_t* p) { return VF{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
RUNNER_INLINE void store_i16(int16_t* p, VF v) {
  for (int i = 0; i < W; ++i) p[i] = (int16_t)__builtin_rintf(v[i]);
}
RUNNER_INLINE VF vabs(VF v) { return (VF)((VI)v & 0x7fffffff); }
RUNNER_INLINE VF vround(VF v) {  // |v| < 2^22
  VF magic = set1(12582912.0f);
  return (v + magic) - magic;
}
RUNNER_INLINE VF pow2(VF n) { return (VF)((__builtin_convertvector(n, VI) + 127) << 23); }
RUNNER_INLINE VF select_lt(VF a, VF b, VF x, VF y) { return a < b ? x : y; }
RUNNER_INLINE uint32_t lanes_between(VF v, VF low, VF high) {
  VI inside = (v >= low) & (v < high);
  return (uint32_t)((inside[0] & 1) | (inside[1] & 2) | (inside[2] & 4) | (inside[3] & 8));
}

#endif

RUNNER_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// The same for what is read once: it takes no room in the outer caches.
RUNNER_INLINE void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

// ---- scalar conversions, exact and the same everywhere

RUNNER_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
RUNNER_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
RUNNER_INLINE float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }
RUNNER_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if (f != f) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
#if RUNNER_ISA > 0
RUNNER_INLINE float f16_to_float(uint16_t h) { return _cvtsh_ss(h); }
RUNNER_INLINE uint16_t float_to_f16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
// Multiplying by 2^112 moves a half's exponent to a float's and normalises subnormals.
RUNNER_INLINE float f16_to_float(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return bits_to_float(sign | magnitude | 0x7f800000);  // inf, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * bits_to_float(0x77800000)));
}
RUNNER_INLINE uint16_t float_to_f16(float f) {
  uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (u >> 13 & 0x3ff));
  if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);
  if (u < 0x38800000) {  // subnormal half: let a float addition do the rounding
    return (uint16_t)(sign | (float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000));
  }
  return (uint16_t)(sign | ((u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13));
}
RUNNER_INLINE void store_bf16(uint16_t* p, VF v) {
  for (int i = 0; i < W; ++i) p[i] = float_to_bf16(v[i]);
}
RUNNER_INLINE void store_f16(uint16_t* p, VF v) {
  for (int i = 0; i < W; ++i) p[i] = float_to_f16(v[i]);
}
RUNNER_INLINE VF load_f16(const uint16_t* p) {
  return VF{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
#endif

// ---- pairs of 16-bit numbers in lanes of 32 bits: the lower and the upper one, as floats

#if RUNNER_ISA == 512
RUNNER_INLINE VF low_i16(VF v) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_castps_si512(v), 16), 16));
}
RUNNER_INLINE VF high_i16(VF v) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_castps_si512(v), 16)); }
RUNNER_INLINE VF low_bf16(VF v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); }
RUNNER_INLINE VF high_bf16(VF v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-65536)));
}
RUNNER_INLINE VF low_f16(VF v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_castps_si512(v))); }
RUNNER_INLINE VF high_f16(VF v) {
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)));
}
#elif RUNNER_ISA == 2
RUNNER_INLINE VF lower_f16(__m256i v) {  // of lanes whose upper halves are 0
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08)));
}
RUNNER_INLINE VF low_f16(VF v) { return lower_f16(_mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0xffff))); }
RUNNER_INLINE VF high_f16(VF v) { return lower_f16(_mm256_srli_epi32(_mm256_castps_si256(v), 16)); }
RUNNER_INLINE VF low_i16(VF v) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(v), 16), 16));
}
RUNNER_INLINE VF high_i16(VF v) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_castps_si256(v), 16)); }
RUNNER_INLINE VF low_bf16(VF v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16)); }
RUNNER_INLINE VF high_bf16(VF v) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(-65536))); }
#else
RUNNER_INLINE VF low_i16(VF v) { return __builtin_convertvector((VI)((VU)(VI)v << 16) >> 16, VF); }
RUNNER_INLINE VF high_i16(VF v) { return __builtin_convertvector((VI)v >> 16, VF); }
RUNNER_INLINE VF low_bf16(VF v) { return (VF)((VU)(VI)v << 16); }
RUNNER_INLINE VF high_bf16(VF v) { return (VF)((VI)v & -65536); }
#endif

// ---- the three element types behind one spelling: T::S is what lies in memory

struct F32 {
  using S = float;
  static constexpr bool kCodes = false, kPairs = false;
  static RUNNER_INLINE VF load_v(const S* p) { return load(p); }
  static RUNNER_INLINE void store_v(S* p, VF v) { store(p, v); }
  static RUNNER_INLINE float to(S x) { return x; }
  static RUNNER_INLINE S from(float x) { return x; }
};
struct BF16 {
  using S = uint16_t;
  static constexpr bool kCodes = false, kPairs = true;
  static RUNNER_INLINE VF low(VF pairs) { return low_bf16(pairs); }
  static RUNNER_INLINE VF high(VF pairs) { return high_bf16(pairs); }
  static RUNNER_INLINE VF load_v(const S* p) { return load_bf16(p); }
  static RUNNER_INLINE void store_v(S* p, VF v) { store_bf16(p, v); }
  static RUNNER_INLINE float to(S x) { return bf16_to_float(x); }
  static RUNNER_INLINE S from(float x) { return float_to_bf16(x); }
};
struct F16 {
  using S = uint16_t;
  static constexpr bool kCodes = false, kPairs = false;
#if RUNNER_ISA > 0
  static RUNNER_INLINE VF low(VF pairs) { return low_f16(pairs); }
  static RUNNER_INLINE VF high(VF pairs) { return high_f16(pairs); }
#endif
  static RUNNER_INLINE VF load_v(const S* p) { return load_f16(p); }
  static RUNNER_INLINE void store_v(S* p, VF v) { store_f16(p, v); }
  static RUNNER_INLINE float to(S x) { return f16_to_float(x); }
  static RUNNER_INLINE S from(float x) { return float_to_f16(x); }
};

// Codes of a cache's rows: their scale lies at the end of the row and is applied by the reader.
struct I16 {
  using S = int16_t;
  static constexpr bool kCodes = true, kPairs = true;
  static RUNNER_INLINE VF low(VF pairs) { return low_i16(pairs); }
  static RUNNER_INLINE VF high(VF pairs) { return high_i16(pairs); }
  static RUNNER_INLINE VF load_v(const S* p) { return load_i16(p); }
  static RUNNER_INLINE float to(S x) { return (float)x; }
};

// Powers of two as one byte: 2^(x - 127). 0 is a subnormal float; 255, NaN by the standard, is infinity in MLX and here.
struct E8M0 {
  using S = uint8_t;
  static constexpr bool kCodes = false;
  static RUNNER_INLINE float to(S x) { return bits_to_float(x ? (uint32_t)x << 23 : 1u << 22); }
  static RUNNER_INLINE VF load_v(const S* p) {
    alignas(64) float v[W];
    for (int i = 0; i < W; ++i) v[i] = to(p[i]);
    return load(v);
  }
};

// Small floats as one byte: sign, four bits of exponent, three of fraction; no infinity, one NaN.
RUNNER_INLINE float e4m3_to_float(uint8_t x) {
  if ((x & 0x7f) == 0x7f) return __builtin_nanf("");
  uint32_t magnitude = (uint32_t)(x & 0x7f) << 20;
  return bits_to_float((uint32_t)(x & 0x80) << 24 | float_to_bits(bits_to_float(magnitude) * bits_to_float(0x7b800000)));
}

// Calls f with the type that stands for `t`.
template <class F>
RUNNER_INLINE auto with_type(DType t, F&& f) {
  if (t == DType::f32) return f(F32{});
  if (t == DType::bf16) return f(BF16{});
  return f(F16{});
}

RUNNER_INLINE float load_one(const void* p, DType t, int64_t i) {
  if (t == DType::f32) return ((const float*)p)[i];
  uint16_t h = ((const uint16_t*)p)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// dst[0, n) = src[0, n) as float
template <class T>
RUNNER_INLINE void to_float(const typename T::S* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, T::load_v(src + i));
  for (; i < n; ++i) dst[i] = T::to(src[i]);
}
template <class T>
RUNNER_INLINE void from_float(const float* src, typename T::S* dst, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) T::store_v(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = T::from(src[i]);
}

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a Taylor polynomial of degree 7 in r. NaN stays, -inf gives 0.
RUNNER_INLINE VF vexp(VF x) {
  VF c = select_lt(x, set1(-87.3f), set1(-87.3f), x);
  c = select_lt(set1(88.72f), c, set1(88.72f), c);
  VF n = vround(c * set1(1.44269504088896341f));
  VF r = fma(n, set1(-0.693359375f), c);
  r = fma(n, set1(2.12194440e-4f), r);
  VF p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  // Two steps, so that n = 128 does not overflow the exponent of 2^n.
  VF half = vround(n * set1(0.5f));
  p = p * pow2(half) * pow2(n - half);
  p = select_lt(x, set1(-87.3f), zero(), p);
  return select_lt(set1(88.72f), x, set1(__builtin_inff()), p);
}

// Turns a W x W block of 32-bit values around, whatever they are: lane i of r[j] becomes lane j of r[i].
RUNNER_INLINE void turn(VF r[W]) {
#if RUNNER_ISA == 512
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
#elif RUNNER_ISA == 2
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) t[i] = r[i], t[i + 4] = r[i + 4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
#else
  const VF a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = VF{a[0], b[0], c[0], d[0]};
  r[1] = VF{a[1], b[1], c[1], d[1]};
  r[2] = VF{a[2], b[2], c[2], d[2]};
  r[3] = VF{a[3], b[3], c[3], d[3]};
#endif
}

#if RUNNER_ISA > 0
// Four columns of W rows of 32-bit values: r[c] holds the c-th of each. part(j): the four of row j, a __m128.
template <class F>
RUNNER_INLINE void turn_columns(F&& part, VF r[4]) {
  VF t[4], u[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if RUNNER_ISA == 512
    t[i] = _mm512_insertf32x4(_mm512_castps128_ps512(part(i)), part(i + 4), 1);
    t[i] = _mm512_insertf32x4(t[i], part(i + 8), 2);
    t[i] = _mm512_insertf32x4(t[i], part(i + 12), 3);
#else
    t[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(part(i)), part(i + 4), 1);
#endif
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
#if RUNNER_ISA == 512
    u[i] = _mm512_unpacklo_ps(t[i], t[i + 1]);
    u[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 1]);
#else
    u[i] = _mm256_unpacklo_ps(t[i], t[i + 1]);
    u[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 1]);
#endif
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
#if RUNNER_ISA == 512
    r[2 * j] = _mm512_shuffle_ps(u[j], u[j + 2], 0x44);
    r[2 * j + 1] = _mm512_shuffle_ps(u[j], u[j + 2], 0xee);
#else
    r[2 * j] = _mm256_shuffle_ps(u[j], u[j + 2], 0x44);
    r[2 * j + 1] = _mm256_shuffle_ps(u[j], u[j + 2], 0xee);
#endif
  }
}
#endif

#if RUNNER_ISA == 512
// Eight columns likewise; part(j): the eight values of row j, a __m256. Half of the loads, which are what four at a time
// wait for.
template <class F>
RUNNER_INLINE void turn_eight_columns(F&& part, VF r[8]) {
  VF u[4], v[2][4];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {  // rows 8 h and on, and those four behind them
    VF t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_insertf32x8(_mm512_castps256_ps512(part(8 * h + i)), part(8 * h + i + 4), 1);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      u[i] = _mm512_unpacklo_ps(t[i], t[i + 1]);
      u[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 1]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      v[h][2 * j] = _mm512_shuffle_ps(u[j], u[j + 2], 0x44);
      v[h][2 * j + 1] = _mm512_shuffle_ps(u[j], u[j + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm512_shuffle_f32x4(v[0][c], v[1][c], 0x88);
    r[c + 4] = _mm512_shuffle_f32x4(v[0][c], v[1][c], 0xdd);
  }
}
#endif

// The same of rows in memory, W values of 32 bits at the place `at` of each: parts of rows are put side by side as they are
// loaded, which takes half of the shuffles.
template <class S>
RUNNER_INLINE void turn_rows(const S* const rows[W], int64_t at, VF r[W]) {
#if RUNNER_ISA > 0
#pragma GCC unroll 4
  for (int c = 0; c < W; c += 4) {
    turn_columns([&](int j) { return _mm_loadu_ps((const float*)(rows[j] + at) + c); }, r + c);
  }
#else
  for (int i = 0; i < W; ++i) memcpy(r + i, rows[i] + at, sizeof(VF));
  turn(r);
#endif
}

// Transposes a W x W block of 32-bit values: dst[j * ldd + i] = src[i * lds + j].
RUNNER_INLINE void transpose_block(const float* src, int64_t lds, float* dst, int64_t ldd) {
  VF r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = load(src + i * lds);
  turn(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(dst + i * ldd, r[i]);
}

// Lane i of the result is the sum over acc[i]: a third of the instructions of W calls of hsum.
RUNNER_INLINE VF sums(const VF acc[W]) {
#if RUNNER_ISA == 512
  VF a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_unpacklo_ps(acc[2 * i], acc[2 * i + 1]) + _mm512_unpackhi_ps(acc[2 * i], acc[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44) + _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee);
  }
  VF c = _mm512_shuffle_f32x4(b[0], b[1], 0x88) + _mm512_shuffle_f32x4(b[0], b[1], 0xdd);
  VF d = _mm512_shuffle_f32x4(b[2], b[3], 0x88) + _mm512_shuffle_f32x4(b[2], b[3], 0xdd);
  return _mm512_shuffle_f32x4(c, d, 0x88) + _mm512_shuffle_f32x4(c, d, 0xdd);
#elif RUNNER_ISA == 2
  VF a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_unpacklo_ps(acc[2 * i], acc[2 * i + 1]) + _mm256_unpackhi_ps(acc[2 * i], acc[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[i] = _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44) + _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee);
  }
  return _mm256_permute2f128_ps(b[0], b[1], 0x20) + _mm256_permute2f128_ps(b[0], b[1], 0x31);
#else
  return VF{hsum(acc[0]), hsum(acc[1]), hsum(acc[2]), hsum(acc[3])};
#endif
}

// dst[j * ldd + i] = src[i * lds + j] for i < rows, j < cols.
RUNNER_INLINE void transpose(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
  int64_t i = 0;
  for (; i + W <= rows; i += W) {
    int64_t j = 0;
    for (; j + W <= cols; j += W) transpose_block(src + i * lds + j, lds, dst + j * ldd + i, ldd);
    for (; j < cols; ++j) {
      for (int r = 0; r < W; ++r) memcpy(dst + j * ldd + i + r, src + (i + r) * lds + j, 4);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) memcpy(dst + j * ldd + i, src + i * lds + j, 4);
  }
}
