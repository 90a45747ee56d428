// The loops of group_norm over one tile: rows of lanes that lie behind one another in memory. A lane is a channel at
// one of a few neighbouring pixels, so that what belongs to a channel is a vector along the lanes and the same in every
// row. Three translation units include this file: for any processor of the architecture, for AVX2 and for AVX-512.
#ifndef LF_GROUP_NORM_KERNELS_H
#define LF_GROUP_NORM_KERNELS_H

#include "common/silu.h"

namespace lf {

// What normalising does to a lane: z = (x - mean) * multiplier + offset. Where SiLU follows, multiplier and offset are
// times kSiluScale.
template <class A> struct Lanes {
  const A *mean, *multiplier, *offset;
};

// What a lane's gradient is made of: gx = gz * factor + (x - mean) * slope + constant.
template <class A> struct GradientLanes {
  const A *factor, *slope, *constant;
};

template <class T> struct NormKernels {
  // sum += x - pivot and squares += (x - pivot)^2, lane by lane.
  void (*moments)(const T* x, int64_t rows, int64_t lanes, const Acc<T>* pivot, Acc<T>* sum, Acc<T>* squares);
  // y = z, or silu(z). Meanwhile it asks for what lies `ahead` elements after x, which is to be measured next.
  void (*apply)(const T* x, int64_t rows, int64_t lanes, Lanes<Acc<T>> of, bool silu, int64_t ahead,
                T* y);
  // sum += gz and moment += gz * (x - mean), lane by lane, where gz = gy or gy * silu'(z).
  void (*gradient_sums)(const T* x, const T* gy, int64_t rows, int64_t lanes, Lanes<Acc<T>> of, bool silu, Acc<T>* sum,
                        Acc<T>* moment);
  void (*gradient)(const T* x, const T* gy, int64_t rows, int64_t lanes, Lanes<Acc<T>> of, GradientLanes<Acc<T>> back,
                   bool silu, T* gx);
};

template <class T> const NormKernels<T>& norm_kernels_avx2() noexcept;
template <class T> const NormKernels<T>& norm_kernels_avx512() noexcept;

namespace {

constexpr int64_t kRunRows = 16;  // summed by themselves first, so that roundings do not pile up

// Calls add(row, k, first, second) down the rows of a strip, for each of its packs; what it adds to the last two is
// added to `sum` and `squares`.
template <class S, class A, class Add> inline void add_down(int64_t rows, A* sum, A* squares, const Add& add) {
  using P = typename S::type;
  P total[S::packs], total_squares[S::packs];
  for (int k = 0; k < S::packs; ++k) {
    total[k] = P::load(sum + k * S::width);
    total_squares[k] = P::load(squares + k * S::width);
  }
  for (int64_t row = 0; row < rows;) {
    P first[S::packs], second[S::packs];
    for (int k = 0; k < S::packs; ++k) first[k] = second[k] = P::fill(0);
    for (const int64_t end = rows - row < kRunRows ? rows : row + kRunRows; row < end; ++row) {
      for (int k = 0; k < S::packs; ++k) add(row, k, first[k], second[k]);
    }
    for (int k = 0; k < S::packs; ++k) {
      total[k] = total[k] + first[k];
      total_squares[k] = total_squares[k] + second[k];
    }
  }
  for (int k = 0; k < S::packs; ++k) {
    total[k].store(sum + k * S::width);
    total_squares[k].store(squares + k * S::width);
  }
}

// Down one strip after the other, whose sums stay in registers.
template <class T>
void moments(const T* x, int64_t rows, int64_t lanes, const Acc<T>* pivot, Acc<T>* sum, Acc<T>* squares) {
  over_strips<Acc<T>>(lanes, [&](auto strip, int64_t at) {
    using S = decltype(strip);
    using P = typename S::type;
    P center[S::packs];
    for (int k = 0; k < S::packs; ++k) center[k] = P::load(pivot + at + k * S::width);
    add_down<S>(rows, sum + at, squares + at, [&](int64_t row, int k, P& first, P& second) {
      const P d = P::load(x + row * lanes + at + k * S::width) - center[k];
      first = first + d;
      second = multiply_add(d, d, second);
    });
  });
}

// x - mean and z of the numbers of a pack.
template <class P> struct Normalised {
  P centred, z;
};

template <class P, class T> inline Normalised<P> normalise(const T* x, const Lanes<Acc<T>>& of, int64_t lane) {
  const P centred = P::load(x) - P::load(of.mean + lane);
  return {centred, multiply_add(centred, P::load(of.multiplier + lane), P::load(of.offset + lane))};
}

template <bool kSilu, class T>
void apply_act(const T* x, int64_t rows, int64_t lanes, const Lanes<Acc<T>>& of, int64_t ahead, T* y) {
  for (int64_t row = 0; row < rows; ++row, x += lanes, y += lanes) {
    over_strips<Acc<T>>(lanes, [&](auto strip, int64_t at) {
      using S = decltype(strip);
      using P = typename S::type;
      for (int64_t lane = at; lane < at + S::packs * S::width; lane += S::width) {
        prefetch(x + lane + ahead);
        const P z = normalise<P>(x + lane, of, lane).z;
        if constexpr (kSilu) silu_of_scaled(z).store(y + lane);
        else z.store(y + lane);
      }
    });
  }
}

template <class T>
void apply(const T* x, int64_t rows, int64_t lanes, Lanes<Acc<T>> of, bool silu, int64_t ahead, T* y) {
  silu ? apply_act<true>(x, rows, lanes, of, ahead, y) : apply_act<false>(x, rows, lanes, of, ahead, y);
}

template <bool kSilu, class P, class T> inline P gradient_of_z(const T* gy, P z) {
  if constexpr (kSilu) return P::load(gy) * silu_derivative_of_scaled(z);
  else return P::load(gy);
}

template <bool kSilu, class T>
void gradient_sums_act(const T* x, const T* gy, int64_t rows, int64_t lanes, const Lanes<Acc<T>>& of, Acc<T>* sum,
                       Acc<T>* moment) {
  over_strips<Acc<T>>(lanes, [&](auto strip, int64_t at) {
    using S = decltype(strip);
    using P = typename S::type;
    add_down<S>(rows, sum + at, moment + at, [&](int64_t row, int k, P& first, P& second) {
      const int64_t lane = at + k * S::width;
      const Normalised<P> of_x = normalise<P>(x + row * lanes + lane, of, lane);
      const P gz = gradient_of_z<kSilu>(gy + row * lanes + lane, of_x.z);
      first = first + gz;
      second = multiply_add(gz, of_x.centred, second);
    });
  });
}

template <class T>
void gradient_sums(const T* x, const T* gy, int64_t rows, int64_t lanes, Lanes<Acc<T>> of, bool silu, Acc<T>* sum,
                   Acc<T>* moment) {
  (silu ? gradient_sums_act<true, T> : gradient_sums_act<false, T>)(x, gy, rows, lanes, of, sum, moment);
}

template <bool kSilu, class T>
void gradient_act(const T* x, const T* gy, int64_t rows, int64_t lanes, const Lanes<Acc<T>>& of,
                  const GradientLanes<Acc<T>>& back, T* gx) {
  for (int64_t row = 0; row < rows; ++row, x += lanes, gy += lanes, gx += lanes) {
    over_strips<Acc<T>>(lanes, [&](auto strip, int64_t at) {
      using S = decltype(strip);
      using P = typename S::type;
      for (int64_t lane = at; lane < at + S::packs * S::width; lane += S::width) {
        const Normalised<P> of_x = normalise<P>(x + lane, of, lane);
        const P slope = P::load(back.slope + lane), constant = P::load(back.constant + lane);
        const P gz = gradient_of_z<kSilu>(gy + lane, of_x.z);
        const P through_statistics = multiply_add(of_x.centred, slope, constant);
        multiply_add(gz, P::load(back.factor + lane), through_statistics).store(gx + lane);
      }
    });
  }
}

template <class T>
void gradient(const T* x, const T* gy, int64_t rows, int64_t lanes, Lanes<Acc<T>> of, GradientLanes<Acc<T>> back,
              bool silu, T* gx) {
  (silu ? gradient_act<true, T> : gradient_act<false, T>)(x, gy, rows, lanes, of, back, gx);
}

template <class T> constexpr NormKernels<T> kNormKernels = {moments<T>, apply<T>, gradient_sums<T>, gradient<T>};

}  // namespace
}  // namespace lf

#endif  // LF_GROUP_NORM_KERNELS_H
