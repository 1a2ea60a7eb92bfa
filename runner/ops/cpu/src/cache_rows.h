// Writing rows into a key/value cache. Included inside an ISA namespace.

// One row as codes of 16 bits and a scale; NaN or infinity in it make the scale, hence the whole row, NaN.
RUNNER_INLINE void pack_row(const float* x, int64_t d, int16_t* to) {
  VF m = zero(), s = zero();
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    VF v = load(x + i);
    m = vmax(vabs(v), m);
    s = s + (v - v);
  }
  float most = hmax(m), odd = hsum(s);  // odd: NaN unless all are finite
  for (; i < d; ++i) {
    float v = __builtin_fabsf(x[i]);
    most = v > most ? v : most;
    odd += v - v;
  }
  float scale = odd == 0.0f ? most / 32767.0f : __builtin_nanf("");
  float inverse = odd == 0.0f && most > 1e-30f ? 32767.0f / most : 0.0f;
  if (odd == 0.0f) {
    for (i = 0; i + W <= d; i += W) store_i16(to + i, load(x + i) * set1(inverse));
    for (; i < d; ++i) to[i] = (int16_t)__builtin_rintf(x[i] * inverse);
  } else {
    memset(to, 0, (size_t)d * 2);
  }
  memcpy(to + d, &scale, 4);
}

RUNNER_INLINE float power_of_two(int exponent) { return bits_to_float((uint32_t)(127 + exponent) << 23); }

// The first of a head's rows that are written, and its powers: a cache's last row, which is no token's.
RUNNER_INLINE char* appended(const AppendArgs& a, int64_t head, int64_t ahead) {
  const int64_t width = a.type == DType::i16 ? a.d + 2 : a.d;
  return (char*)a.to + (head * a.capacity + a.at + ahead) * width * size_of(a.type);
}
RUNNER_INLINE const int16_t* powers_of(const AppendArgs& a, int64_t head) {
  return (const int16_t*)a.to + ((head + 1) * a.capacity - 1) * (a.d + 2);
}

inline void append_rows(const AppendArgs& a, int64_t ahead) {
  over_rows(a.b * a.h * a.l, a.d, [&](int64_t first, int64_t last) {
    float* line = (float*)scratch(Slot::row, a.d * 4);
    with_type(a.xt, [&](auto from) {
      using T = decltype(from);
      for (int64_t r = first; r < last; ++r) {
        const int64_t l = r % a.l, head = r / a.l;
        const auto* x = (const typename T::S*)a.x + head / a.h * a.sb + head % a.h * a.sh + l * a.sl;
        to_float<T>(x, line, a.d);
        if (a.type == DType::i16) {
          const int16_t* powers = powers_of(a, head);
          for (int64_t i = 0; i < a.d; ++i) line[i] *= power_of_two(-powers[i]);
          pack_row(line, a.d, (int16_t*)appended(a, head, ahead) + l * (a.d + 2));
        } else {
          with_type(a.type, [&](auto type) {
            using U = decltype(type);
            from_float<U>(line, (typename U::S*)appended(a, head, ahead) + l * a.d, a.d);
          });
        }
      }
    });
  });
}

inline void append(const AppendArgs* list, int count, int64_t ahead) {
  // Single rows of many heads, and their powers, are asked for at once: they lie far apart.
  for (const AppendArgs* a = list; a < list + count; ++a) {
    if (a->l > 1) continue;
    for (int64_t head = 0; head < a->b * a->h; ++head) {
      const char *row = appended(*a, head, ahead), *powers = (const char*)powers_of(*a, head);
      for (int64_t i = 0; i < (a->d + 2) * size_of(a->type); i += 64) {
        prefetch(row + i);
        if (a->type == DType::i16) prefetch(powers + i);
      }
    }
  }
  for (int i = 0; i < count; ++i) append_rows(list[i], ahead);
}
