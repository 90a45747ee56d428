// What one CUDA launch of blend_windows takes. A launch's parameters hold it all, so that these are limits of a call:
// over one position, and of the weights for 3 axes. The Python module tells them too.
#ifndef LF_BLEND_WINDOWS_LIMITS_H
#define LF_BLEND_WINDOWS_LIMITS_H

namespace lf {

constexpr int kMostWindows = 640, kMostLayouts = 32;
// Where space is weighted.
constexpr int kMostVaryingWindows = 128, kMostVaryingLayouts = 8, kMostWeights = 2880;

}  // namespace lf

#endif  // LF_BLEND_WINDOWS_LIMITS_H
