// Who sees whom, and where rows lie: visibility.h and qkv_layout.h against their definitions, element by element.
#include <cstdint>
#include <cstdio>
#include <utility>
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
bool sees(const pfa::AttentionParams& p, int64_t i, int64_t j) {
  const int64_t aligned = i + p.keys - p.queries;
  return j >= 0 && j < p.keys && (!p.causal || j <= aligned) && (p.window_left < 0 || j >= aligned - p.window_left) &&
         (p.window_right < 0 || j <= aligned + p.window_right);
}

// All tiles of queries and keys, also such as reach past the ends.
template <class Index>
void check_visibility(const pfa::AttentionParams& p, Index tile) {
  const auto visibility = pfa::visibility_of<Index>(p);
  const Index queries = static_cast<Index>(p.queries);
  const Index all_keys = static_cast<Index>(p.keys);
  bool is_uneven = false;
  for (Index i = 0; i < queries; ++i) {
    for (Index j = 0; j < all_keys + tile; ++j) {
      expect(visibility.sees(i, j) == sees(p, i, j), "sees", i, j);
      expect(visibility.queries_of(j).contains(i) == sees(p, i, j), "queries_of", i, j);
      is_uneven |= j < all_keys && !sees(p, i, j);
    }
  }
  for (Index i0 = 0; i0 < queries; i0 += tile) {
    const Index i1 = i0 + tile < queries ? i0 + tile : queries;
    for (Index j0 = 0; j0 < all_keys; j0 += tile) {
      bool any = false, all = true;
      for (Index i = i0; i < i1; ++i) {
        for (Index j = j0; j < j0 + tile; ++j) (sees(p, i, j) ? any : all) = sees(p, i, j);
      }
      expect(visibility.hides_any(i0, i1, j0, j0 + tile) == !all, "hides_any", i0, j0);
      const auto keys = visibility.keys_of(i0, i1);
      expect(!any || (j0 < keys.end && j0 + tile > keys.first), "keys_of: the walk comes to the tile", i0, j0);
      const auto seeing = visibility.queries_of(j0, j0 + tile);
      expect(!any || (i0 < seeing.end && i1 > seeing.first), "queries_of: the walk comes to the tile", i0, j0);
      if (any) continue;
      // Nobody of the tile sees anything of it: the walks end before it, or begin after it.
      expect(keys.first >= keys.end || j0 >= keys.end || j0 + tile <= keys.first, "keys_of: left out", i0, j0);
      expect(seeing.first >= seeing.end || i0 >= seeing.end || i1 <= seeing.first, "queries_of: left out", i0, j0);
    }
  }
  expect(is_uneven == visibility.is_uneven(), "is_uneven", is_uneven, 0);
}

// Flash masks, by their definition.
void check_hidden_ranges() {
  constexpr int64_t kQueries = 7;
  for (int columns : {1, 2, 4}) {
    for (bool between : {false, true}) {
      for (int32_t code = 0; code < 9 * 9 * 9 * 9; code += 5) {
        const int32_t c[4] = {code % 9, code / 9 % 9, code / 81 % 9, code / 729};
        const pfa::HiddenRanges<int64_t> ranges{c, columns, between, kQueries};
        const auto hidden = ranges.of_key(0);
        for (int64_t i = 0; i < kQueries; ++i) {
          const bool expected = columns == 1   ? i >= c[0]
                                : columns == 4 ? (i >= c[0] && i < c[1]) || (i >= c[2] && i < c[3])
                                : between      ? i >= c[0] && i < c[1]
                                               : i >= c[0] || i < c[1];
          expect(hidden.contains(i) == expected, "hidden", code, i);
          for (int64_t end = i + 1; end <= kQueries; ++end) {
            bool all = true;
            for (int64_t n = i; n < end; ++n) all &= hidden.contains(n);
            expect(all || !hidden.contain(i, end), "hides all", code, i);
          }
        }
      }
    }
  }
}

void check_layout() {
  pfa::AttentionParams p;
  p.batch = 2, p.queries = 3, p.keys = 4, p.num_heads = 6, p.num_kv_heads = 3, p.head_dim = 5;
  p.first_head = 8, p.total_heads = 16;
  std::vector<int64_t> numbers(2 * 4 * 3 * 6 * 5);
  for (size_t at = 0; at < numbers.size(); ++at) numbers[at] = static_cast<int64_t>(at);
  const pfa::Heads<void> query{numbers.data(), 3 * 6 * 5, 6 * 5, 5};         // [batch, queries, H, D]
  const pfa::Heads<void> value{numbers.data() + 15, 4 * 2 * 15, 2 * 15, 5};  // [batch, keys, 2, 3, D], the second
  const auto layout = pfa::qkv_layout(p);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const auto h = layout.head(b * p.num_heads + head);
      expect(h.batch == b && h.head == head && h.flat == b * p.num_heads + head, "head", b, head);
      expect(h.kv_head == head / 2, "kv_head", b, head);
      expect(h.dropout_head == b * 16 + 8 + head, "dropout_head", b, head);
      expect(layout.statistics(h) == (b * p.num_heads + head) * p.queries, "statistics", b, head);
      for (int64_t i = 0; i < p.queries; ++i) {
        expect(*layout.query_rows<int64_t>(query, h).row(i) == ((b * 3 + i) * 6 + head) * 5, "query_rows", head, i);
      }
      for (int64_t i = 0; i < p.keys; ++i) {
        const int64_t begin = (((b * 4 + i) * 2 + 1) * 3 + head / 2) * 5;
        expect(*layout.key_rows<int64_t>(value, h).row(i) == begin, "key_rows", head, i);
      }
    }
  }
  const int32_t query_starts[] = {0, 1, 4}, key_starts[] = {0, 6, 8};
  p.query_starts = query_starts, p.key_starts = key_starts, p.packed_queries = 4, p.packed_keys = 8, p.queries = 3,
  p.keys = 6;
  const auto packed = pfa::qkv_layout(p);
  const auto h = packed.head(p.num_heads + 5);  // the second sequence's last head
  expect(packed.statistics(h) == 5 * 4 + 1, "statistics of packed sequences", 0, 0);
  expect(*packed.query_rows<int64_t>(pfa::Heads<void>{numbers.data(), 0, 30, 5}, h).row(2) == 3 * 30 + 25,
         "packed query_rows", 0, 0);
  expect(*packed.key_rows<int64_t>(pfa::Heads<void>{numbers.data(), 0, 15, 5}, h).row(1) == 7 * 15 + 10,
         "packed key_rows", 0, 0);
}

}  // namespace

int main() {
  for (const auto& [queries, keys] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 1}, {2, 2}, {7, 7}, {8, 8}, {9, 9}, {31, 31}, {1, 9}, {9, 1}, {5, 12}, {12, 5}}) {
    for (bool causal : {false, true}) {
      for (int64_t left : {-1, 0, 3, 40}) {
        for (int64_t right : {-1, 0, 2, 40}) {
          pfa::AttentionParams p;
          p.queries = queries, p.keys = keys, p.causal = causal, p.window_left = left, p.window_right = right;
          for (int tile : {1, 4, 8}) {
            check_visibility<int>(p, tile);
            check_visibility<int64_t>(p, tile);
          }
        }
      }
    }
  }
  check_hidden_ranges();
  check_layout();
  return failures ? 1 : 0;
}
