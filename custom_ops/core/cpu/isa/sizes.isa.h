// Sizes in whole parts.

namespace pfa::cpu::PFA_ISA {

inline int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

inline int64_t round_down(int64_t n, int64_t multiple) { return n / multiple * multiple; }

}  // namespace pfa::cpu::PFA_ISA
