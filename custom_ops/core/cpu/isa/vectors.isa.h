// Some vectors at a time, for functions whose steps wait for each other: while a step of one vector waits, those of the
// others are done. Processors look only a few steps ahead, so such steps have to stand side by side.

namespace pfa::cpu::PFA_ISA {

template <class T, int kCount>
struct Vectors {
  Vec<T> v[kCount];
};

// So many hide that a function's steps wait, and leave registers for its constants.
constexpr int kTogether = 4;

// The vectors f(0), f(1), ...
template <int kCount, class F>
[[gnu::always_inline]] inline auto each(F&& f) {
  Vectors<std::remove_reference_t<decltype(f(0)[0])>, kCount> result;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result.v[i] = f(i);
  return result;
}

template <int kCount, class T>
[[gnu::always_inline]] inline Vectors<T, kCount> load_vectors(const T* p) {
  return each<kCount>([&](int i) { return load(p + i * kLanes<T>); });
}

template <class T, int kCount>
[[gnu::always_inline]] inline void store(T* p, const Vectors<T, kCount>& x) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(p + i * kLanes<T>, x.v[i]);
}

// Lanes of the vectors as keep_lanes has it of one; `first` is that of the first.
template <class T, int kCount>
[[gnu::always_inline]] inline Vectors<T, kCount> keep_lanes(const uint64_t* bits, int64_t first,
                                                            const Vectors<T, kCount>& x) {
  return each<kCount>([&](int i) { return keep_lanes<T>(bits, first + i * kLanes<T>, x.v[i]); });
}

#define PFA_OPERATOR(op)                                                                                     \
  template <class T, int kCount>                                                                             \
  [[gnu::always_inline]] inline auto operator op(const Vectors<T, kCount>& a, const Vectors<T, kCount>& b) { \
    return each<kCount>([&](int i) { return a.v[i] op b.v[i]; });                                            \
  }                                                                                                          \
  template <class T, int kCount>                                                                             \
  [[gnu::always_inline]] inline auto operator op(const Vectors<T, kCount>& a, std::common_type_t<T> b) {     \
    return each<kCount>([&](int i) { return a.v[i] op b; });                                                 \
  }                                                                                                          \
  template <class T, int kCount>                                                                             \
  [[gnu::always_inline]] inline auto operator op(std::common_type_t<T> a, const Vectors<T, kCount>& b) {     \
    return each<kCount>([&](int i) { return a op b.v[i]; });                                                 \
  }
PFA_OPERATOR(+)
PFA_OPERATOR(-)
PFA_OPERATOR(*)
PFA_OPERATOR(/)
#undef PFA_OPERATOR

}  // namespace pfa::cpu::PFA_ISA
