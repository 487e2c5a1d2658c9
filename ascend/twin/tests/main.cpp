// twin_tests --list | twin_tests NAME... | twin_tests: all.
#include <cstdio>

#include "check.h"

namespace twin_tests {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

}  // namespace twin_tests

int main(int argc, char** argv) {
  int failed = 0, ran = 0;
  for (const twin_tests::Test& t : twin_tests::tests()) {
    const std::string name = t.name;
    if (argc == 2 && std::string(argv[1]) == "--list") {
      std::puts(t.name);
      ++ran;
      continue;
    }
    bool chosen = argc == 1;
    for (int i = 1; i < argc; ++i) chosen |= name == argv[i];
    if (!chosen) continue;
    ++ran;
    try {
      t.run();
    } catch (const std::exception& e) {
      std::printf("FAILED %s: %s\n", t.name, e.what());
      ++failed;
    }
  }
  if (ran == 0) std::puts("FAILED: no such test");
  return failed > 0 || ran == 0;
}
