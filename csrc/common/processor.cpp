#include "common/processor.h"

#include <cstdlib>
#include <cstring>

namespace lf {
namespace {

bool detect() {
#if defined(LF_WITH_AVX2)
  const char* portable = std::getenv("LUMIERE_FAST_PORTABLE");
  if (portable && std::strcmp(portable, "") != 0 && std::strcmp(portable, "0") != 0) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

}  // namespace

bool has_avx2() {
  static const bool found = detect();
  return found;
}

}  // namespace lf
