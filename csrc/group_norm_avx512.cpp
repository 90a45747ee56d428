// Compiled for AVX-512; called only where the processor has them.
#include "group_norm_kernels.h"

namespace lf {

template <class T> const NormKernels<T>& norm_kernels_avx512() noexcept { return kNormKernels<T>; }

template const NormKernels<float>& norm_kernels_avx512() noexcept;
template const NormKernels<double>& norm_kernels_avx512() noexcept;
template const NormKernels<Half>& norm_kernels_avx512() noexcept;
template const NormKernels<BFloat16>& norm_kernels_avx512() noexcept;

}  // namespace lf
