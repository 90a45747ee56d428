/* What the C tests share of numbers: drawing them, and elements of every dtype. */
#ifndef LF_TESTS_NUMBERS_H
#define LF_TESTS_NUMBERS_H

#include "lumiere_fast.h"

#include "check.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

static uint32_t random_state = 1;
static double uniform(void) { /* in [-1, 1) */
  random_state = random_state * 1664525u + 1013904223u;
  return (double)(random_state >> 8) / (1 << 23) - 1.0;
}

static int64_t size_of(lf_dtype dtype) {
  int64_t bytes = 0;
  CHECK(lf_dtype_size(dtype, &bytes) == LF_OK);
  return bytes;
}

/* Numbers that every dtype holds: whole multiples of 1/64 in [-2, 2). */
static double number(void) { return floor(uniform() * 128) / 64; }

static double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                           : exponent == 0 ? ldexp(fraction, -24)
                                           : ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

static double read_element(const void* at, lf_dtype dtype) {
  float single;
  double full;
  uint16_t bits;
  uint32_t wide;
  switch (dtype) {
    case LF_FLOAT32: memcpy(&single, at, 4); return single;
    case LF_FLOAT64: memcpy(&full, at, 8); return full;
    case LF_FLOAT16: memcpy(&bits, at, 2); return half_value(bits);
    default:
      memcpy(&bits, at, 2);
      wide = (uint32_t)bits << 16;
      memcpy(&single, &wide, 4);
      return single;
  }
}

/* For infinity, and numbers of few enough bits, which `number` makes. */
static void write_element(void* at, lf_dtype dtype, double value) {
  float single = (float)value;
  uint32_t wide, magnitude;
  uint16_t bits;
  memcpy(&wide, &single, 4);
  switch (dtype) {
    case LF_FLOAT32: memcpy(at, &single, 4); return;
    case LF_FLOAT64: memcpy(at, &value, 8); return;
    case LF_FLOAT16:
      magnitude = isinf(value) ? 0x7c00 : value == 0 ? 0 : ((wide & 0x7fffffff) - 0x38000000) >> 13;
      bits = (uint16_t)((wide >> 16 & 0x8000) | magnitude);
      memcpy(at, &bits, 2);
      return;
    default: bits = (uint16_t)(wide >> 16); memcpy(at, &bits, 2);
  }
}

#endif
