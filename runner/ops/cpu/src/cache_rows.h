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

// The powers of a head's channels: 0 but for those whose greatest magnitude is more than twice the median channel's, so
// that these few no longer take the codes of all others. most: working memory for [2, d].
template <class T>
void choose_powers(const AppendArgs& a, const typename T::S* x, float* most, int16_t* powers) {
  float* sorted = most + a.d;
  for (int64_t i = 0; i < a.d; ++i) most[i] = 0.0f;
  const VF inf = set1(__builtin_inff());
  for (int64_t l = 0; l < a.l; ++l) {  // every number of the prompt's keys and values: the loop that costs
    const auto* row = x + l * a.sl;
    int64_t i = 0;
    for (; i + W <= a.d; i += W) {
      VF v = vabs(T::load_v(row + i));
      store(most + i, vmax(select_lt(v, inf, v, zero()), load(most + i)));
    }
    for (; i < a.d; ++i) {
      float v = __builtin_fabsf(T::to(row[i]));
      most[i] = v > most[i] && v < __builtin_inff() ? v : most[i];
    }
  }
  for (int64_t i = 0; i < a.d; ++i) {  // by insertion: once for each head of a prompt
    int64_t j = i;
    for (; j > 0 && sorted[j - 1] > most[i]; --j) sorted[j] = sorted[j - 1];
    sorted[j] = most[i];
  }
  const float limit = 2.0f * sorted[a.d / 2];
  auto power_of = [&](int64_t i) {
    int power = 0;
    for (float size = most[i]; power < 60 && limit > 0.0f && size > limit; size *= 0.5f) ++power;
    return power;
  };
  for (int64_t i = 0; i < a.d; ++i) {
    int power = power_of(i);
    // What stands out may turn into the other half later, or never: half its power costs little in either case.
    if (a.paired) {
      int half = (power_of((i + a.d / 2) % a.d) + 1) / 2;
      power = half > power ? half : power;
    }
    powers[i] = (int16_t)power;
  }
}

inline void append(const AppendArgs& a) {
  const bool packed = a.type == DType::i16;
  auto powers_of = [&](int64_t head) {
    return (int16_t*)a.to + ((head + 1) * a.capacity - 1) * (a.d + 2);
  };
  if (packed && a.at == 0) {
    over_rows(a.b * a.h, a.l * a.d, [&](int64_t first, int64_t last) {
      float* most = (float*)scratch(Slot::row, 2 * a.d * 4);
      with_type(a.xt, [&](auto from) {
        using T = decltype(from);
        for (int64_t r = first; r < last; ++r) {
          const auto* x = (const typename T::S*)a.x + r / a.h * a.sb + r % a.h * a.sh;
          choose_powers<T>(a, x, most, powers_of(r));
        }
      });
    });
  }
  over_rows(a.b * a.h * a.l, a.d, [&](int64_t first, int64_t last) {
    float* line = (float*)scratch(Slot::row, a.d * 4);
    with_type(a.xt, [&](auto from) {
      using T = decltype(from);
      for (int64_t r = first; r < last; ++r) {
        int64_t l = r % a.l, head = r / a.l, row = head * a.capacity + a.at + l;
        const auto* x = (const typename T::S*)a.x + head / a.h * a.sb + head % a.h * a.sh + l * a.sl;
        to_float<T>(x, line, a.d);
        if (packed) {
          const int16_t* powers = powers_of(head);
          for (int64_t i = 0; i < a.d; ++i) line[i] *= power_of_two(-powers[i]);
          pack_row(line, a.d, (int16_t*)a.to + row * (a.d + 2));
        } else {
          with_type(a.type, [&](auto type) {
            using U = decltype(type);
            from_float<U>(line, (typename U::S*)a.to + row * a.d, a.d);
          });
        }
      }
    });
  });
}
