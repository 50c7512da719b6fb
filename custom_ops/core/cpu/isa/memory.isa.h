// Typed parts of a stage's workspace.

namespace pfa::cpu::PFA_ISA {

template <class T>
T* take(Arena& arena, int64_t count) {
  return static_cast<T*>(arena.take(count * sizeof(T)));
}

// `source` [count] of type T as accumulators in the workspace; null stays null.
template <class T, class A = Accumulator<T>>
const A* widened(Arena& arena, const void* source, int64_t count) {
  if (!source) return nullptr;
  if constexpr (std::is_same_v<T, A>) {
    return static_cast<const A*>(source);
  } else {
    A* target = take<A>(arena, count);
    if (target) load_row(static_cast<const T*>(source), count, target);
    return target;
  }
}

}  // namespace pfa::cpu::PFA_ISA
