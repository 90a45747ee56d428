// The driver's side of cuda.h.
#include "cuda.h"

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!lf::emulation::context) return CUDA_ERROR_INVALID_CONTEXT;
  constexpr cuuint64_t kElement = 2;
  bool taken = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  taken = taken && data && rank >= 1 && rank <= 5 && box[0] * kElement % 16 == 0;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) taken = taken && box[0] * kElement <= 128;
  if (!taken) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(data), static_cast<int>(rank), swizzle == CU_TENSOR_MAP_SWIZZLE_128B, {}, {}, {}};
  for (cuuint32_t i = 0; i < rank; ++i) {
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    map->strides[i] = i == 0 ? kElement : strides[i - 1];
    if (sizes[i] == 0 || sizes[i] > cuuint64_t{1} << 32 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (map->strides[i] % 16 != 0 || map->strides[i] >= cuuint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;  // others are not emulated
  }
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
