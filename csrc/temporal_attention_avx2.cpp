// Compiled for AVX2, FMA and F16C; called only where the processor has them.
#include "temporal_attention_kernel.h"

namespace lf {

AttentionKernels attention_kernels_avx2(lf_dtype dtype) noexcept { return kernels_for(dtype); }

}  // namespace lf
