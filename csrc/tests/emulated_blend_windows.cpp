// blend_windows.cu, compiled for the host and run thread after thread: they wait for nobody.
#include "../blend_windows.cu"

namespace {

template <class T, class B> bool run(const void* kernel, dim3 grid, dim3 block, void** parameters) {
  if (kernel != reinterpret_cast<const void*>(&lf::blend_kernel<T, B>)) return false;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
      lf::blend_kernel<T, B>(*static_cast<const B*>(parameters[0]));
    }
  }
  return true;
}

template <class B> bool run_any(const void* kernel, dim3 grid, dim3 block, void** parameters) {
  return run<float, B>(kernel, grid, block, parameters) || run<double, B>(kernel, grid, block, parameters) ||
         run<lf::Half, B>(kernel, grid, block, parameters) || run<lf::BFloat16, B>(kernel, grid, block, parameters);
}

}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t,
                             cudaStream_t stream) {
  if (stream != LF_EMULATED_STREAM) return cudaErrorInvalidResourceHandle;
  const bool known = run_any<lf::SmallBatch>(kernel, grid, block, parameters) ||
                     run_any<lf::LargeBatch>(kernel, grid, block, parameters) ||
                     run_any<lf::VaryingBatch>(kernel, grid, block, parameters);
  return known ? cudaSuccess : cudaErrorInvalidDevice;
}
