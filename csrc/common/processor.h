// Which instructions the processor at hand has.
#ifndef LF_COMMON_PROCESSOR_H
#define LF_COMMON_PROCESSOR_H

namespace lf {

// Whether the code built for AVX2 may run: built in, offered by the processor and the system, and not switched off by
// LUMIERE_FAST_PORTABLE=1, which is read once.
bool has_avx2();

// Whether the code built for AVX-512 (F, BW, DQ, VL) may run: as above, and not switched off by
// LUMIERE_FAST_NO_AVX512=1.
bool has_avx512();

}  // namespace lf

#endif  // LF_COMMON_PROCESSOR_H
