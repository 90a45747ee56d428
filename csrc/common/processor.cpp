#include "common/processor.h"

#include <cstdlib>
#include <cstring>

namespace lf {
namespace {

#if defined(LF_WITH_AVX2)

bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
}

bool detect_avx2() {
  if (is_set("LUMIERE_FAST_PORTABLE")) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool detect_avx512() {
  if (!has_avx2() || is_set("LUMIERE_FAST_NO_AVX512")) return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && 
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#else

bool detect_avx2() { return false; }
bool detect_avx512() { return false; }

#endif

}  // namespace

bool has_avx2() {
  static const bool found = detect_avx2();
  return found;
}

bool has_avx512() {
  static const bool found = detect_avx512();
  return found;
}

}  // namespace lf
