// The list of the CPU's implementations: every one runs here or says why not, and those that run are chosen from.
#include "core/cpu/implementations.h"

#include <cstdio>
#include <cstring>
#include <set>
#include <string>

#include "core/cpu/context.h"

namespace {

using namespace pfa;

int failures = 0;

void expect(bool condition, const char* what, const char* name) {
  if (condition) return;
  ++failures;
  std::printf("%s: %s\n", name, what);
}

}  // namespace

int main() {
  const auto& compiled = cpu::compiled_implementations();
  const auto& usable = cpu::usable_implementations();
  expect(compiled.front()->why_not() == nullptr, "runs on every processor", compiled.front()->name);

  std::set<std::string> names;
  auto next = usable.begin();
  for (const cpu::Implementation* implementation : compiled) {
    expect(names.insert(implementation->name).second, "has a name of its own", implementation->name);
    const char* why_not = implementation->why_not();
    const bool is_usable = next != usable.end() && *next == implementation;
    expect(is_usable == !why_not, "is usable, or says why not, in the list's order", implementation->name);
    if (is_usable) ++next;
    if (why_not) std::printf("%s: %s\n", implementation->name, why_not);
    expect(!why_not || std::strlen(why_not) > 0, "gives a reason", implementation->name);
  }
  expect(next == usable.end(), "usable ones are compiled ones", "list");
  expect(cpu::Context().implementation == usable.back(), "the best is taken", "context");
  return failures ? 1 : 0;
}
