// Which instructions the processor at hand has.
#ifndef LF_COMMON_PROCESSOR_H
#define LF_COMMON_PROCESSOR_H

namespace lf {

// Whether the code built for AVX2 may run: built in, offered by the processor and the system, and not switched off by
// LUMIERE_FAST_PORTABLE=1, which is read once.
bool has_avx2();

}  // namespace lf

#endif  // LF_COMMON_PROCESSOR_H
