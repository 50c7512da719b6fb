// Who sees whom, and where rows lie: visibility.h and qkv_layout.h against their definitions, element by element.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "core/qkv_layout.h"
#include "core/visibility.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t a, int64_t b) {
  if (holds) return;
  ++failures;
  std::printf("%s: fails for %lld, %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
}

// The definition.
bool sees(const pfa::AttentionParams& p, int64_t i, int64_t j) { return j < p.seq_len && (!p.causal || j <= i); }

// All tiles of queries and keys, also such as reach past the ends.
template <class Index>
void check_visibility(const pfa::AttentionParams& p, Index tile) {
  const auto visibility = pfa::visibility_of<Index>(p);
  const Index size = static_cast<Index>(p.seq_len);
  for (Index i = 0; i < size; ++i) {
    for (Index j = 0; j < size + tile; ++j) {
      expect(visibility.sees(i, j) == sees(p, i, j), "sees", i, j);
      expect(visibility.queries_of(j).contains(i) == sees(p, i, j), "queries_of", i, j);
    }
  }
  for (Index i0 = 0; i0 < size; i0 += tile) {
    const Index i1 = i0 + tile < size ? i0 + tile : size;
    for (Index j0 = 0; j0 < size; j0 += tile) {
      bool any = false, all = true;
      for (Index i = i0; i < i1; ++i) {
        for (Index j = j0; j < j0 + tile; ++j) (sees(p, i, j) ? any : all) = sees(p, i, j);
      }
      expect(visibility.hides_any(i0, i1, j0, j0 + tile) == !all, "hides_any", i0, j0);
      const auto keys = visibility.keys_of(i0, i1);
      expect((j0 < keys.end && j0 + tile > keys.first) == any, "keys_of: whether the walk comes to the tile", i0, j0);
      const auto queries = visibility.queries_of(j0, j0 + tile);
      expect((i0 < queries.end && i1 > queries.first) == any, "queries_of: whether the walk comes to the tile", i0, j0);
    }
  }
  expect(p.causal == visibility.is_uneven(), "is_uneven", p.causal, 0);
}

void check_layout() {
  pfa::AttentionParams p;
  p.batch = 2, p.seq_len = 3, p.num_heads = 4, p.head_dim = 5, p.first_head = 8, p.total_heads = 16;
  const auto layout = pfa::qkv_layout(p);
  std::vector<int64_t> qkv(2 * 3 * 3 * 4 * 5);
  for (size_t at = 0; at < qkv.size(); ++at) qkv[at] = static_cast<int64_t>(at);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const auto h = layout.head(b * p.num_heads + head);
      expect(h.batch == b && h.head == head && h.flat == b * p.num_heads + head, "head", b, head);
      expect(h.dropout_head == b * 16 + 8 + head, "dropout_head", b, head);
      for (int64_t i = 0; i < p.seq_len; ++i) {
        for (int part = 0; part < 3; ++part) {  // [batch, seq_len, 3, H, D]
          const int64_t begin = (((b * p.seq_len + i) * 3 + part) * p.num_heads + head) * p.head_dim;
          expect(*layout.rows(qkv.data(), h, static_cast<pfa::QkvPart>(part)).row(i) == begin, "rows", part, i);
        }
        const int64_t begin = ((b * p.seq_len + i) * p.num_heads + head) * p.head_dim;  // [batch, seq_len, H, D]
        expect(*layout.out_rows(qkv.data(), h).row(i) == begin, "out_rows", head, i);
      }
    }
  }
}

}  // namespace

int main() {
  for (bool causal : {false, true}) {
    for (int64_t seq_len : {1, 2, 7, 8, 9, 31}) {
      pfa::AttentionParams p;
      p.seq_len = seq_len;
      p.causal = causal;
      for (int tile : {1, 4, 8}) {
        check_visibility<int>(p, tile);
        check_visibility<int64_t>(p, tile);
      }
    }
  }
  check_layout();
  return failures ? 1 : 0;
}
