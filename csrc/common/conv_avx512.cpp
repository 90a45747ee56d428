// Compiled for AVX-512; called only where the processor has it.
#include "common/conv_kernel.h"

namespace lf {

ConvKernels conv_kernels_avx512(lf_dtype dtype) noexcept { return kernels_for(dtype); }

}  // namespace lf
