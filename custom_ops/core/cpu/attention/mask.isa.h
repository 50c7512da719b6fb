// The mask on a tile of scores [keys][kQueryTile]: what each element adds. A float element is added; of other types
// only whether it is 0 counts.

namespace pfa::cpu::PFA_ISA {

constexpr int64_t kQueryTile = 64;  // of queries in a tile
constexpr int64_t kKeyTile = 64;

template <class A, class M>
inline A mask_term(M value) {
  if constexpr (std::is_integral_v<M>) {
    return value ? A(0) : -std::numeric_limits<A>::infinity();
  } else {
    return static_cast<A>(widen(value));
  }
}

// Adds the mask to scores [keys][kQueryTile].
template <class A, class M>
void add_mask_typed(const Mask& mask, const HeadIndex& h, int64_t i0, int64_t j0, int64_t queries, int64_t keys,
                    A* scores) {
  const M* origin = static_cast<const M*>(mask.data) + h.batch * mask.strides[0] + h.head * mask.strides[1] +
                    i0 * mask.strides[2] + j0 * mask.strides[3];
  const int64_t i_stride = mask.strides[2];
  const int64_t j_stride = mask.strides[3];
  if (i_stride == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const A term = mask_term<A>(origin[j * j_stride]);
      for (int64_t i = 0; i < queries; ++i) scores[j * kQueryTile + i] += term;
    }
    return;
  }
  constexpr int64_t strip = 16;
  for (int64_t jb = 0; jb < keys; jb += strip) {
    const int64_t j_end = std::min(jb + strip, keys);
    for (int64_t i = 0; i < queries; ++i) {
      const M* row = origin + i * i_stride;
      for (int64_t j = jb; j < j_end; ++j) scores[j * kQueryTile + i] += mask_term<A>(row[j * j_stride]);
    }
  }
}

template <class A>
void add_mask(const Params& p, const HeadIndex& h, int64_t i0, int64_t j0, int64_t queries, int64_t keys, A* scores) {
  const auto add = [&](auto type) { add_mask_typed<A, decltype(type)>(p.mask, h, i0, j0, queries, keys, scores); };
  switch (p.mask.dtype) {
    case DType::kFloat32:
      return add(float{});
    case DType::kFloat64:
      return add(double{});
    case DType::kFloat16:
      return add(Float16{});
    case DType::kBFloat16:
      return add(BFloat16{});
    case DType::kBool:
    case DType::kUInt8:
    case DType::kInt8:
      return add(uint8_t{});
    case DType::kInt16:
      return add(int16_t{});
    case DType::kInt32:
      return add(int32_t{});
    case DType::kInt64:
      return add(int64_t{});
  }
}

}  // namespace pfa::cpu::PFA_ISA
