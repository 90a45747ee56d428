/* The C ABI of lumiere_fast. It knows neither torch nor Python, and no exception crosses it.
 *
 * Functions that can fail return an lf_status and write their results through pointers; when they fail they write
 * nothing.
 * Every code is a fixed-width integer with a value that will not change, so that callers need not be compiled with the
 * compiler that built the library.
 */
#ifndef LUMIERE_FAST_H
#define LUMIERE_FAST_H

#include <stdint.h>

#if defined(LF_STATIC)
#define LF_API
#elif defined(_WIN32) && defined(LF_BUILDING)
#define LF_API __declspec(dllexport)
#elif defined(_WIN32)
#define LF_API __declspec(dllimport)
#else
#define LF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
#define LF_NOEXCEPT noexcept
extern "C" {
#else
#define LF_NOEXCEPT
#endif

/* The version of the library that is loaded: major * 10000 + minor * 100 + patch. */
LF_API int32_t lf_version(void) LF_NOEXCEPT;

/* The same as "major.minor.patch". The string is static. */
LF_API const char* lf_version_string(void) LF_NOEXCEPT;

/* How the library was built, as a JSON object: version, compiler, flags, avx2 (true or false), cuda (the toolkit's
 * version, or null where the CUDA half was not built), cuda_archs, cuda_flags (nvcc's, or null), and sources (for each
 * op a hash of its source files). The string is static. */
LF_API const char* lf_build_info(void) LF_NOEXCEPT;

typedef int32_t lf_status;
enum {
  LF_OK = 0,
  LF_INVALID_ARGUMENT = 1,    /* a pointer that must not be null is null, or a number is not one of those accepted */
  LF_UNSUPPORTED_DTYPE = 2,   /* the code is none of those below, or of a dtype that is not taken there */
  LF_INVALID_SHAPE = 3,       /* a size is not one of those accepted, groups do not divide it, or shapes do not fit */
  LF_INVALID_STRIDES = 4,     /* an output may lie on top of itself, a tensor leaves memory, or see the function */
  LF_WINDOW_OUT_OF_RANGE = 5, /* a window sticks out of the video */
  LF_UNCOVERED = 6,           /* a position of the video is in no window */
  LF_INVALID_WEIGHTS = 7,     /* a weight is not positive and finite, or the windows it is for differ in length */
  LF_OUT_OF_MEMORY = 8,       /* working memory on the host could not be had */
  LF_NOT_BUILT = 9,           /* this library was built without its CUDA half */
  LF_CUDA_ERROR = 10,         /* CUDA reported an error: lf_last_cuda_error() says which */
  LF_TOO_MANY = 11,           /* more windows over one position, weights or outputs than one launch can take */
  LF_UNEVEN_WEIGHTS = 12,     /* the largest weight of an axis is over 1e100 times its least */
  LF_SHARED_MEMORY = 13,      /* an output, or a workspace, lies in the memory of another tensor */
  LF_NO_WORKSPACE = 14,       /* the working memory is missing, too small, or not aligned */
  LF_UNSUPPORTED_DEVICE = 15  /* the device cannot run what was asked for */
};

/* A short English sentence for a status, "unknown status" for a code that is none of the above. The string is
 * static. */
LF_API const char* lf_status_string(lf_status status) LF_NOEXCEPT;

/* What CUDA said when a call of this thread last returned LF_CUDA_ERROR; "" if none did. Valid until the next one. */
LF_API const char* lf_last_cuda_error(void) LF_NOEXCEPT;

/* Element types of activations, weights and statistics. */
typedef int32_t lf_dtype;
enum {
  LF_FLOAT32 = 0,
  LF_FLOAT64 = 1,
  LF_FLOAT16 = 2, /* IEEE 754 binary16 */
  LF_BFLOAT16 = 3 /* the upper half of a binary32 */
};

/* Bytes of one element of `dtype`.
 * LF_UNSUPPORTED_DTYPE: `dtype` is not a code above; LF_INVALID_ARGUMENT: `bytes` is null. */
LF_API lf_status lf_dtype_size(lf_dtype dtype, int64_t* bytes) LF_NOEXCEPT;

/* Where the CPU functions take their threads from. By default each call starts its own, and they end with it. With the
 * function GOMP_parallel of an OpenMP runtime they are that runtime's, so that a program which already computes with it
 * has one pool of threads and not two that hold the cores against each other. `parallel` calls work(data) on up to
 * `num_threads` threads at once and returns when all have returned; `flags` is 0. Null: the default again.
 *
 * Either way no thread is inside this library when a call returns, and it may be unloaded when no call is under way. So
 * a call waits for each thread it started, also for one that the system runs only when all is done: where other
 * programs hold the cores, ask for no more threads than there are free ones.
 * The pointer is kept until the next lf_borrow_threads: the runtime it belongs to has to stay loaded as long. */
typedef void (*lf_parallel)(void (*work)(void*), void* data, uint32_t num_threads, uint32_t flags);
LF_API void lf_borrow_threads(lf_parallel parallel) LF_NOEXCEPT;

/* blend_windows: out[p] = sum_i w[p - start_i] windows_i[p - start_i] / sum_i w[p - start_i] over the windows i that
 * cover p. A position that one window covers is that window's, bit for bit. Sums are in fp32 at least.
 *
 * dtype         of the windows and of out
 * num_windows   N >= 1
 * windows       N pointers to element (0, 0, 0, 0, 0) of each window, in the device's memory for the CUDA call
 * shapes        N x 5 sizes (B, C, T, H, W); nothing may be 0 but B
 * strides       N x 5, in elements, of any sign
 * axes          1: windows lie in time, and B, C, H, W are the video's. 3: they lie in time and space
 * starts        N x axes: where in the video each window begins, (t) or (t, h, w)
 * weights       null for equal weights; or T' + H' + W' (T' where axes is 1) positive values, one vector behind the
 *               other, whose product weighs a position of a window. Windows must then be alike in length. Of one vector
 *               the largest may be 1e100 times the least; only ratios matter, so that none is too large or too small
 * out           may not share memory with a window: from its first byte to its last, no byte may be between the first
 *               and the last of a window
 * out_shape     5 sizes: the video's
 * out_strides   5, in elements, of any sign. Over the axes of sizes above 1, from the smallest to the largest, each
 *               must be larger than the distance from the first to the last element along all the smaller ones
 *
 * All arrays but the tensors themselves are in host memory and are read before the call returns. */

/* On the CPU, with at most `num_threads` >= 1 threads, the caller's among them; little work takes only that one. */
LF_API lf_status lf_blend_windows_cpu(lf_dtype dtype, int64_t num_windows, const void* const* windows,
                                      const int64_t* shapes, const int64_t* strides, int32_t axes,
                                      const int64_t* starts, const double* weights, void* out,
                                      const int64_t* out_shape, const int64_t* out_strides,
                                      int32_t num_threads) LF_NOEXCEPT;

/* On CUDA device `device`, queued on `stream` (a cudaStream_t; null is the default stream), without waiting for it. It
 * allocates nothing and can be captured in a graph. The current device is the caller's again when it returns.
 * LF_TOO_MANY: over 640 windows at one position, or over 32 that all differ in strides (128 and 8 where space is
 * weighted); over 2880 weights for 3 axes. */
LF_API lf_status lf_blend_windows_cuda(lf_dtype dtype, int64_t num_windows, const void* const* windows,
                                       const int64_t* shapes, const int64_t* strides, int32_t axes,
                                       const int64_t* starts, const double* weights, void* out,
                                       const int64_t* out_shape, const int64_t* out_strides, int32_t device,
                                       void* stream) LF_NOEXCEPT;

/* What group_norm does after the norm. */
typedef int32_t lf_activation;
enum {
  LF_NO_ACTIVATION = 0,
  LF_SILU = 1 /* z / (1 + exp(-z)) */
};

/* One number for each clip, frame and channel. Element (b, t, c) is at data[b * strides[0] + t * strides[1] +
 * c * strides[2]]; a stride is 0 along an axis on which nothing changes. */
typedef struct {
  const void* data;
  int64_t strides[3]; /* in elements, of any sign */
  lf_dtype dtype;     /* x's, or that of the arithmetic: LF_FLOAT32, and LF_FLOAT64 where x is that */
} lf_per_channel;

/* group_norm: y = act(z) with z = (n * weight + bias) * (1 + scale) + shift and n = (x - mean) / sqrt(variance + eps).
 * mean and the biased variance are those of a group's channels and all pixels of a frame, or of a clip. Arithmetic is
 * in fp32 at least, and rounded once at the end. Results do not depend on the number of threads; on another processor
 * they may differ in the last bits.
 *
 * dtype        of x and of what is written in its place
 * shape        5 sizes (B, C, T, H, W); nothing may be 0 but B
 * x_strides    5, in elements, of any sign; fastest where channels lie behind one another, next where pixels do
 * num_groups   divides C
 * weight, bias, scale, shift   null for 1, 0, 0 and 0
 * eps          > 0
 * per_frame    0: statistics of a whole clip; any other: of each frame
 * out          of x's shape. May not share memory with x: from its first byte to its last, no byte may be between the
 *              first and the last of x. Strides as of blend_windows' out
 * num_threads  at most so many >= 1, the caller's among them; little work takes only that one
 *
 * LF_INVALID_STRIDES, LF_SHARED_MEMORY: of whatever is written; else as above. */
LF_API lf_status lf_group_norm_cpu(lf_dtype dtype, const void* x, const int64_t* shape, const int64_t* x_strides,
                                   int64_t num_groups, const lf_per_channel* weight, const lf_per_channel* bias,
                                   const lf_per_channel* scale, const lf_per_channel* shift, lf_activation act,
                                   double eps, int32_t per_frame, void* out, const int64_t* out_strides,
                                   int32_t num_threads) LF_NOEXCEPT;

/* The statistics alone: mean and rstd = 1 / sqrt(variance + eps), each (B, T, num_groups) with 3 strides, in fp32, or
 * fp64 where x is that. Of a whole clip T is 1. */
LF_API lf_status lf_group_norm_stats_cpu(lf_dtype dtype, const void* x, const int64_t* shape, const int64_t* x_strides,
                                         int64_t num_groups, double eps, int32_t per_frame, void* mean,
                                         const int64_t* mean_strides, void* rstd, const int64_t* rstd_strides,
                                         int32_t num_threads) LF_NOEXCEPT;

/* Backward: from the gradient of y that of x, and what those of the other arguments are made of: the sums over a
 * frame's pixels of the gradient of z, and of the same times n. With them (sums over what an argument does not depend
 * on)
 *
 *   of weight: n_sums * (1 + scale)           of scale: n_sums * weight + sums * bias
 *   of bias:   sums * (1 + scale)             of shift: sums
 *
 * gy           gradient of y, of x's shape and dtype; strides of any sign
 * gx           null where it is not wanted
 * sums, n_sums (B, T, C), behind one another, in fp32, or fp64 where x is that */
LF_API lf_status lf_group_norm_backward_cpu(lf_dtype dtype, const void* gy, const int64_t* gy_strides, const void* x,
                                            const int64_t* shape, const int64_t* x_strides, int64_t num_groups,
                                            const lf_per_channel* weight, const lf_per_channel* bias,
                                            const lf_per_channel* scale, const lf_per_channel* shift,
                                            lf_activation act, double eps, int32_t per_frame, void* gx,
                                            const int64_t* gx_strides, void* sums, void* n_sums,
                                            int32_t num_threads) LF_NOEXCEPT;

/* temporal_conv: at each pixel, with r = k / 2 and h = silu(x * multiplier + offset) where there is a norm, without the
 * SiLU where it is linear, else h = x,
 *
 *   y[t, o] = act(sum_j sum_c weight[o, c, j] h[t + j - r, c] + bias[t, o]) + residual[t, o]
 *
 * Frames outside the clip are zeros, or copies of its first and last h. The norm's factors, with the group g of c, are
 *
 *   multiplier = rstd[t, g] * weight[c] * (1 + scale[t, c])
 *   offset = (bias[c] - mean[t, g] * rstd[t, g] * weight[c]) * (1 + scale[t, c]) + shift[t, c]
 *
 * Sums are in fp32, y is rounded once. The statistics of y are taken in each frame over the pixels and the channels of
 * a group, before y is rounded: the mean, and 1 / sqrt(variance + 1e-5). They, and y, do not depend on the number of
 * threads.
 *
 * A tensor is a pointer to its first element, the code of its dtype, and its strides in elements. Where `data` is null
 * there is no such tensor. */
typedef struct lf_clip { /* (B, C, T, H, W) */
  void* data;
  int64_t strides[5];
} lf_clip;

/* What bounds the x0 of denoise_step. */
typedef int32_t lf_bound;
enum {
  LF_BOUND_NONE = 0,
  LF_BOUND_STATIC = 1, /* clamp(x0, -1, 1) */
  LF_BOUND_CLIP = 2,   /* clamp(x0, -s, s) / s with s = max(quantile of |x0| over the clip, 1) */
  LF_BOUND_FRAME = 3   /* over each frame */
};

/* denoise_step: one sampler step of a video from the predictions of its windows.
 *
 *   pred = the windows blended as blend_windows does; guided: u + guidance_scale * (c - u) of its two halves
 *   x0   = bounded(x0_latent * latent + x0_prediction * pred)
 *   next = latent_coefficient * latent + x0_coefficient * x0 + history_coefficient * history + noise_coefficient * noise
 *
 * Arithmetic is in fp32, or fp64 where either dtype is, and rounded once to `next` and to `x0`; the quantile is exact,
 * and interpolated linearly between its neighbours. A NaN counts as the largest. */
typedef struct lf_denoise_step {
  lf_dtype window_dtype;      /* these eight as for blend_windows, but that */
  int64_t num_windows;
  const void* const* windows; /* guided, a window's batch is twice the video's: the conditional half, then the other */
  const int64_t* window_shapes;
  const int64_t* window_strides;
  int32_t axes;
  const int64_t* starts;
  const double* weights;
  lf_dtype dtype;             /* of the five clips */
  int64_t shape[5];           /* theirs, (B, C, T, H, W); nothing may be 0 but B */
  lf_clip latent, history, noise; /* the last two are not looked at where their coefficient is 0 */
  lf_clip next, x0;           /* written, with strides as of blend_windows' out. They may not share memory with another
                                 tensor; but `next` may be exactly `latent`, and `x0` exactly `history` */
  double x0_latent, x0_prediction, latent_coefficient, x0_coefficient, history_coefficient, noise_coefficient;
  int32_t guided;             /* 0: guidance_scale is not looked at */
  double guidance_scale;
  lf_bound bound;
  double percentile;          /* of a dynamic bound, in (0, 1] */
} lf_denoise_step;

/* With at most `num_threads` >= 1 threads, the caller's among them, whose number changes no result; little work takes
 * only that one. For a dynamic bound it works in some memory, at most 4 MB (8 MB of fp64) or a 32nd of the video. */
LF_API lf_status lf_denoise_step_cpu(const lf_denoise_step* arguments, int32_t num_threads) LF_NOEXCEPT;

typedef struct lf_temporal_conv {
  lf_dtype dtype; /* of x, weight, residual and y: LF_FLOAT32, LF_FLOAT16 or LF_BFLOAT16 */
  int64_t batch, channels_in, channels_out, frames, height, width; /* nothing may be 0 but the batch */
  int64_t taps;                                                    /* k, odd */
  int32_t replicate, silu;   /* padding by copies, not zeros; act is SiLU, not the identity */
  int64_t norm_groups;       /* of the norm of x, 0 for none; divides channels_in */
  int64_t stats_groups;      /* of y's statistics, 0 for none; divides channels_out */
  lf_clip x, residual, y;    /* residual is optional. y may not share memory with another: as for blend_windows' out */
  const void* weight;        /* (channels_out, channels_in, k) */
  int64_t weight_strides[3];
  lf_per_channel bias;       /* (B, T, channels_out), optional, as all below but norm_mean and norm_rstd of a norm */
  lf_per_channel norm_mean, norm_rstd; /* (B, T, norm_groups) */
  lf_per_channel norm_weight, norm_bias, norm_scale, norm_shift; /* (B, T, channels_in) */
  float* mean;               /* (B, T, stats_groups), one row behind the other, written */
  float* rstd;
  int32_t norm_linear;       /* no SiLU follows the norm */
} lf_temporal_conv;

/* With at most `num_threads` >= 1 threads, the caller's among them; little work takes only that one. */
LF_API lf_status lf_temporal_conv_cpu(const lf_temporal_conv* arguments, int32_t num_threads) LF_NOEXCEPT;

/* Lanes of the vectors that the function above computes with on this processor: 16 or 8, or at most 4 where it has
 * neither AVX-512 nor AVX2 (or may not use them), which is no faster than a plain loop. */
LF_API int32_t lf_temporal_conv_lanes(void) LF_NOEXCEPT;

/* temporal_attention: at each pixel and head by itself, over the frames s that are not left out,
 *
 *   y[t] = sum_s softmax_s(scale * r_t(q[t]) . r_s(k[s]) + bias[head, t - s + T - 1]) v[s]
 *
 * where r_t turns each pair of channels by an angle of the frame's, (cos, sin) = rotary[t, i]:
 * x[2i], x[2i + 1] -> x[2i] cos - x[2i + 1] sin, x[2i] sin + x[2i + 1] cos; without `rotary` it is the identity. A row
 * that is left with no frame, where the bias is -inf, gives 0. Arithmetic is in fp32, what is written is rounded once.
 * Results do not depend on the number of threads. */
typedef struct lf_heads { /* (B, T, H, W, heads, D) */
  void* data;
  int64_t strides[6]; /* in elements, of any sign; fastest where the D of a head lie behind one another, next heads */
} lf_heads;

typedef struct lf_temporal_attention {
  lf_dtype dtype; /* of q, k, v, y and their gradients: LF_FLOAT32, LF_FLOAT16 or LF_BFLOAT16 */
  int64_t batch, frames, height, width, heads, channels; /* channels is D; nothing may be 0 but the batch */
  lf_heads q, k, v, y;     /* what is written may not share memory with another: as for blend_windows' out */
  const void* bias;        /* (heads, 2T - 1), or null */
  lf_dtype bias_dtype;
  int64_t bias_strides[2];
  const float* rotary;     /* (T, D / 2, 2), behind one another, D even; or null */
  int32_t causal;          /* any but 0: frames s > t are left out */
  int64_t window;          /* those with |t - s| > window too; -1 for none */
  double scale;            /* finite */
  lf_heads gq, gk, gv;     /* of the backward alone: the gradients, each null where it is not wanted */
  float* gbias;            /* (heads, 2T - 1), behind one another */
} lf_temporal_attention;

/* With at most `num_threads` >= 1 threads, the caller's among them; little work takes only that one. */
LF_API lf_status lf_temporal_attention_cpu(const lf_temporal_attention* arguments, int32_t num_threads) LF_NOEXCEPT;

/* Backward: y is the gradient of the result, which is read, and may lie anyhow. The scores are computed again: nothing
 * is needed of the forward. */
LF_API lf_status lf_temporal_attention_backward_cpu(const lf_temporal_attention* arguments,
                                                    int32_t num_threads) LF_NOEXCEPT;

/* space_time_downsample and space_time_upsample: a clip divided, or multiplied, by factor = (t, h, w).
 *
 * Fixed taps are separable. With y[i] = sum_j tap(i, j) x[j] along an axis of factor f:
 *
 *   down  LF_NEAREST  y[i] = x[f i]
 *         LF_LINEAR   y[i] = x[f i + f / 2] for odd f, for even f the mean of that sample and the one before
 *         LF_AREA     y[i] = the mean of x[f i] .. x[f i + f - 1]
 *         LF_BLUR     y[i] = (x[f i - 1] + 2 x[f i] + x[f i + 1]) / 4 with x[-1] = x[0]; for f = 1 y[i] = x[i]
 *   up    LF_NEAREST  y[f i + p] = x[i] for 0 <= p < f
 *         LF_LINEAR   y[f i + p] = x at i + (p + 1/2) / f - 1/2 between its neighbours, beyond the ends the end sample
 *
 * Where there is a weight the resize in time is learned: LF_NEAREST .. LF_BLUR act on H and W alone and give s, and
 *
 *   down  y[i, o] = bias[o] + sum_k sum_c weight[o, c, k] s[t i - taps / 2 + k, c]
 *   up    y[j, o] = bias[o] + sum_k sum_c weight[o, c, k] s[(j - taps / 2 + k) / t, c]    (the quotient rounded down)
 *
 * with zeros outside the clip. Arithmetic is in fp32 at least and is rounded once; between a learned resize in time and
 * one in space there is one rounding more. Results do not depend on the number of threads.
 *
 * On the CPU 3 taps over at least 4 frames, of s and of y, and at least 24 channels, of both, are done by minimal
 * filtering, but for t > 2 going down: sums of an output's frames are multiplied by sums of its taps. An error of fp32
 * rounding is then relative to
 *
 *   |bias[o]| + sum_c (sum_k |weight[o, c, k]|) (sum_k |s[frame k, c]|)
 *
 * over the frames that the output takes and no others, also where a frame's own weight is small or 0. Where that, or
 * the sum of two frames or taps, is no finite number of fp32, the output may be infinite or NaN. */
typedef int32_t lf_resize_mode;
enum { LF_NEAREST = 0, LF_LINEAR = 1, LF_AREA = 2, LF_BLUR = 3 };

typedef struct lf_space_time {
  lf_dtype dtype;      /* of x, y, weight and bias; with a weight LF_FLOAT16, LF_BFLOAT16 or, on a CPU, LF_FLOAT32 */
  lf_resize_mode mode; /* up there are LF_NEAREST and LF_LINEAR */
  int64_t batch, channels, frames, height, width; /* of x; nothing may be 0 but the batch */
  int64_t factor[3];   /* t, h, w, each >= 1. Going down by fixed taps it divides the sizes; frames need not be
                          divisible where there is a weight: there are ceil(frames / t) then */
  lf_clip x, y;        /* strides of any sign; fastest where channels lie behind one another. What is written may not
                          share memory with another, as for blend_windows' out */
  const void* weight;  /* (channels_out, channels, taps), taps odd; null for fixed taps. The next 5 are its own */
  int64_t weight_strides[3];
  int64_t channels_out, taps;
  const void* bias;    /* (channels_out), or null */
  int64_t bias_stride;
  int32_t wgmma;       /* on a CUDA device with a weight: 1 for warpgroup instructions and bulk copies, of a device of
                          compute capability 9.0 alone; 0 for those that any from 8.0 on has */
  void* workspace;     /* memory to work in, on the device, at a multiple of 64 bytes; null where none is needed */
  int64_t workspace_size; /* its bytes, at least as many as asked for */
} lf_space_time;

/* How many bytes of working memory a call takes: on the CPU with `num_threads`, on a CUDA device with 0. 0 for fixed
 * taps. x, y, bias and the workspace are not looked at, so that they may be null. */
LF_API lf_status lf_space_time_downsample_workspace(const lf_space_time* arguments, int32_t num_threads,
                                                    int64_t* bytes) LF_NOEXCEPT;
LF_API lf_status lf_space_time_upsample_workspace(const lf_space_time* arguments, int32_t num_threads,
                                                  int64_t* bytes) LF_NOEXCEPT;

/* With at most `num_threads` >= 1 threads, the caller's among them; little work takes only that one.
 * LF_NO_WORKSPACE: it is null, too small or not at a multiple of 64 bytes. LF_SHARED_MEMORY: also where it overlaps
 * another operand, be that only read. */
LF_API lf_status lf_space_time_downsample_cpu(const lf_space_time* arguments, int32_t num_threads) LF_NOEXCEPT;
LF_API lf_status lf_space_time_upsample_cpu(const lf_space_time* arguments, int32_t num_threads) LF_NOEXCEPT;

/* The adjoint of fixed taps, x[j] = sum_i tap(i, j) y[i]: y is read and x written. There may be no weight. */
LF_API lf_status lf_space_time_downsample_adjoint_cpu(const lf_space_time* arguments, int32_t num_threads) LF_NOEXCEPT;
LF_API lf_status lf_space_time_upsample_adjoint_cpu(const lf_space_time* arguments, int32_t num_threads) LF_NOEXCEPT;

/* The same on CUDA device `device`, queued on `stream`, as for blend_windows: nothing is allocated, and a graph can
 * capture it. LF_NO_WORKSPACE, LF_SHARED_MEMORY: as on the CPU, also of the workspace. LF_TOO_MANY: more outputs of
 * fixed taps than one launch can number. LF_UNSUPPORTED_DEVICE: there is a weight, and the device's compute capability
 * is below 8.0. With `wgmma`
 *
 * LF_UNSUPPORTED_DEVICE  the device's compute capability is not 9.0, or the library was not built for it
 * LF_INVALID_SHAPE       also where the batch, channels, frames, pixels of a frame or taps are over 2^31 - 257
 * LF_INVALID_STRIDES     also where not all of x lies as bulk copies need it: channels behind one another, rows of
 *                        pixels too, the address at a multiple of 16 bytes, and all other strides above 0, below 2^40
 *                        bytes and multiples of 16 bytes. Going down in H or W that is the clip between space and time:
 *                        channels must be a multiple of 8, and x may lie anyhow */
LF_API lf_status lf_space_time_downsample_cuda(const lf_space_time* arguments, int32_t device,
                                               void* stream) LF_NOEXCEPT;
LF_API lf_status lf_space_time_upsample_cuda(const lf_space_time* arguments, int32_t device, void* stream) LF_NOEXCEPT;
LF_API lf_status lf_space_time_downsample_adjoint_cuda(const lf_space_time* arguments, int32_t device,
                                                       void* stream) LF_NOEXCEPT;
LF_API lf_status lf_space_time_upsample_adjoint_cuda(const lf_space_time* arguments, int32_t device,
                                                     void* stream) LF_NOEXCEPT;

#ifdef __cplusplus
} /* extern "C" */
#endif

#undef LF_NOEXCEPT

#endif /* LUMIERE_FAST_H */
