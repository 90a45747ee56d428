// Compiled for AVX-512; called only where the processor has it.
#include "temporal_attention_kernel.h"

namespace lf {

AttentionKernels attention_kernels_avx512(lf_dtype dtype) noexcept { return kernels_for(dtype); }

}  // namespace lf
